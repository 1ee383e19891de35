//! Values of `--blockdev` made from a seed, in either form, half of them with mistakes.

use blockcore::engine::sim::Random;
use serde_json::{Map, Value, json};

/// The options of a node, in JSON's types; `{}` around other nodes.
fn node(random: &mut Random, depth: u64, names: &mut u64) -> Map<String, Value> {
    let mut options = Map::new();
    let kinds = if depth == 0 { 4 } else { 8 };
    let mut set = |key: &str, value: Value| {
        options.insert(key.to_owned(), value);
    };
    let mut below = None;
    match random.below(kinds) {
        0 | 1 => {
            set("driver", json!("null-co"));
            if random.below(2) == 0 {
                set("size", json!(512 * (1 + random.below(5000))));
            }
            if random.below(4) == 0 {
                set("read-zeroes", json!(random.below(2) == 0));
            }
        }
        2 => {
            set("driver", json!("null-aio"));
            set("latency-ns", json!(random.below(1000)));
        }
        3 => {
            set("driver", json!("file"));
            set("filename", json!("DIR/a.raw"));
            set("locking", json!("off"));
        }
        4 => {
            set("driver", json!("qcow2"));
            let overlay = random.below(2) == 0;
            let name = if overlay {
                "DIR/b.qcow2"
            } else {
                "DIR/a.qcow2"
            };
            let file = json!({"driver": "file", "filename": name, "locking": "off"});
            set("file", file);
            match random.below(4) {
                0 => set("backing", Value::Null),
                1 if overlay => {
                    let file =
                        json!({"driver": "file", "filename": "DIR/a.qcow2", "locking": "off"});
                    set("backing", json!({"driver": "qcow2", "file": file}));
                }
                // Locks of an image that is named in the header are taken.
                _ => set("read-only", json!(true)),
            }
            if random.below(3) == 0 {
                set("l2-cache-entry-size", json!(512 << random.below(9)));
            }
            if random.below(3) == 0 {
                set("discard-no-unref", json!(false));
            }
        }
        5 => {
            set("driver", json!("copy-on-read"));
            below = Some("file");
        }
        6 => {
            set("driver", json!("blkdebug"));
            if random.below(2) == 0 {
                let rule = json!({"event": "read_aio", "errno": random.below(40), "once": true});
                set("inject-error", json!([rule, {"event": "write_aio"}]));
            }
            below = Some("image");
        }
        _ => {
            set("driver", json!("raw"));
            below = Some("file");
        }
    }
    for (key, share) in [("read-only", 4), ("auto-read-only", 8), ("force-share", 12)] {
        if random.below(share) == 0 {
            set(key, json!(random.below(2) == 0));
        }
    }
    if random.below(5) == 0 {
        set(
            "discard",
            json!(["ignore", "unmap"][random.below(2) as usize]),
        );
    }
    if random.below(5) == 0 {
        let words = ["off", "on", "unmap"];
        set("detect-zeroes", json!(words[random.below(3) as usize]));
    }
    if random.below(5) == 0 {
        set("cache", json!({"no-flush": random.below(2) == 0}));
    }
    if random.below(3) == 0 {
        *names += 1;
        set("node-name", json!(format!("n{names}")));
    }
    if let Some(child) = below {
        let nested = node(random, depth - 1, names);
        options.insert(child.to_owned(), Value::Object(nested));
    }
    options
}

/// Where in a tree of options to make a mistake: any object in it.
fn some_object<'a>(
    random: &mut Random,
    options: &'a mut Map<String, Value>,
) -> &'a mut Map<String, Value> {
    let nested: Vec<_> = options
        .iter()
        .filter(|(_, value)| value.is_object())
        .map(|(key, _)| key.clone())
        .collect();
    let choice = random.below(nested.len() as u64 + 1) as usize;
    match nested.get(choice) {
        Some(key) => {
            let inner = options.get_mut(key).and_then(Value::as_object_mut);
            some_object(random, inner.expect("it is one"))
        }
        None => options,
    }
}

fn spoil(random: &mut Random, options: &mut Map<String, Value>) {
    let place = some_object(random, options);
    let keys: Vec<_> = place.keys().cloned().collect();
    let key = keys[random.below(keys.len() as u64) as usize].clone();
    match random.below(6) {
        0 => {
            place.remove(&key);
        }
        1 => {
            place.insert(format!("{key}x"), json!("1"));
        }
        2 => {
            let value = place.remove(&key).expect("it is there");
            place.insert(key.to_uppercase(), value);
        }
        3 => {
            place.insert(key, json!("nonsense"));
        }
        4 => {
            place.insert(key, json!({"x": "y"}));
        }
        _ => {
            place.insert(key, json!(-3));
        }
    }
}

/// As `key=value`; nothing if it has no such form.
fn key_values(prefix: &str, value: &Value, parts: &mut Vec<String>) -> Option<()> {
    let text = match value {
        Value::Object(inner) => {
            let dot = if prefix.is_empty() { "" } else { "." };
            for (key, value) in inner {
                key_values(&format!("{prefix}{dot}{key}"), value, parts)?;
            }
            return Some(());
        }
        Value::Array(inner) => {
            for (index, value) in inner.iter().enumerate() {
                key_values(&format!("{prefix}.{index}"), value, parts)?;
            }
            return Some(());
        }
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::String(text) => text.replace(',', ",,"),
        Value::Null => return None,
        other => other.to_string(),
    };
    parts.push(format!("{prefix}={text}"));
    Some(())
}

/// A value of `--blockdev`.
pub(crate) fn case(seed: u64) -> String {
    let mut random = Random::new(seed);
    let mut options = node(&mut random, 3, &mut 0);
    options.insert("node-name".to_owned(), json!("top"));
    if random.below(2) == 0 {
        spoil(&mut random, &mut options);
    }
    let options = Value::Object(options);
    let mut parts = Vec::new();
    let has_form = key_values("", &options, &mut parts).is_some();
    match random.below(2) == 0 && has_form {
        true => parts.join(","),
        false => options.to_string(),
    }
}
