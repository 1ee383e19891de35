//! Options from text and JSON, compared, checked and written back.

use serde_json::json;

use super::*;
use crate::ErrorKind;
use crate::engine::sim::Random;

const TABLE: &[OptionSpec] = &[
    OptionSpec {
        name: "filename",
        kind: OptionKind::Text,
        default: None,
        reopen: false,
        changes_data: true,
        help: "path of the image",
    },
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: Some("0"),
        reopen: false,
        changes_data: true,
        help: "bytes",
    },
];

#[test]
fn a_doubled_comma_is_part_of_the_value() {
    let options = Options::parse("file,filename=a,,b,size=1M", Some("driver")).unwrap();
    assert_eq!(options.get("driver"), Some("file"));
    assert_eq!(options.get("filename"), Some("a,b"));
}

#[test]
fn dotted_keys_nest() {
    let mut options = Options::parse("file.driver=file,file.cache.direct=on,x=1", None).unwrap();
    let nested = options.take_nested("file");
    assert_eq!(nested.get("cache.direct"), Some("on"));
    assert_eq!(options, Options::parse("x=1", None).unwrap());
}

#[test]
fn bad_options_are_named() {
    let message = |text: &str| {
        let options = Options::parse(text, None);
        let checked = options.and_then(|o| o.check(&[TABLE], "driver 'test'"));
        checked.unwrap_err().to_string()
    };
    assert!(message("filename=a,sise=3").contains("has no option 'sise'"));
    assert!(message("filename=a,size=lots").contains("takes a size in bytes"));
    assert!(message("size=3").contains("needs option 'filename'"));
    assert!(message("filename=a,filename=b").contains("given twice"));
    assert!(message("filename=a,b").contains("key=value"));
    assert!(message("file..x=a").contains("not an option's name"));
}

#[test]
fn sizes_have_suffixes_and_never_overflow() {
    assert_eq!(parse_size("1.5G"), Some(3 << 29));
    assert_eq!(parse_size("0x200"), Some(512));
    assert_eq!(parse_size("16E"), None);
    assert_eq!(parse_size("-1"), None);
    assert_eq!(parse_size("1Q"), None);
    assert_eq!(parse_size(""), None);
}

/// The table's driver as JSON describes it.
fn from_json(value: serde_json::Value) -> Options {
    Options::from_json(&value).unwrap()
}

#[test]
fn nested_json_becomes_dotted_keys_and_goes_back() {
    let value = json!({
        "driver": "quorum",
        "read-only": true,
        "size": 1_048_576,
        "offset": -1,
        "most": u64::MAX,
        "backing": null,
        "children": [{"driver": "file", "filename": "a"}, "node1", null],
        "file": {"cache": {"direct": false}}
    });
    let options = from_json(value.clone());
    let text = |key| options.get(key);
    assert_eq!(text("children.0.filename"), Some("a"));
    assert_eq!(text("children.1"), Some("node1"));
    assert_eq!(text("file.cache.direct"), Some("off"));
    assert_eq!(text("most"), Some("18446744073709551615"));
    assert_eq!(options.value("backing"), Some(&OptionValue::Null));
    assert_eq!(text("backing"), None);
    assert_eq!(options.to_json(), value);
    assert_eq!(Options::parse_json(&value.to_string()).unwrap(), options);
}

#[test]
fn dotted_and_nested_json_are_one_tree_and_what_is_said_twice_is_refused() {
    let dotted = from_json(json!({"file.driver": "file", "file": {"filename": "a"}}));
    let nested = from_json(json!({"file": {"driver": "file", "filename": "a"}}));
    assert_eq!(dotted, nested);
    let refused = |text: &str| {
        let error = Options::parse_json(text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    };
    assert!(refused(r#"{"a": 1, "a": 2}"#).contains("'a' is given twice"));
    assert!(refused(r#"{"a.b": 1, "a": {"b": 2}}"#).contains("'a.b' is given twice"));
    assert!(refused(r#"{"a": {}}"#).contains("'a' is empty"));
    assert!(refused(r#"{"a": []}"#).contains("'a' is empty"));
    assert!(refused(r#"{"a": 1.5}"#).contains("1.5"));
    assert!(refused(r#"{"a": 1e400}"#).contains("cannot be read"));
    assert!(refused(r#"{"a\u0000": 1}"#).contains("not an option's name"));
    assert!(refused(r#"{"": 1}"#).contains("not an option's name"));
    assert!(refused(r#"{"a": 1} {}"#).contains("trailing"));
    assert!(refused("[1]").contains("object"));
    assert!(refused("7").contains("object"));
    assert!(refused("").contains("cannot be read"));
}

#[test]
fn json_of_any_depth_is_read_or_refused_and_never_overflows() {
    let nest = |depth: usize| format!("{}1{}", r#"{"a":"#.repeat(depth), "}".repeat(depth));
    let arrays = |depth: usize| format!("{{\"a\":{}1{}}}", "[".repeat(depth), "]".repeat(depth));
    assert!(Options::parse_json(&nest(100)).is_ok());
    for depth in [101, 127, 128, 100_000] {
        assert!(Options::parse_json(&nest(depth)).is_err(), "{depth}");
        assert!(Options::parse_json(&arrays(depth)).is_err(), "{depth}");
    }
    let mut deep = json!(1);
    for _ in 0..2000 {
        deep = json!({"a": deep});
    }
    assert!(Options::from_json(&deep).is_err());
    let long = format!("{{\"{}\": 1}}", "a".repeat(2000));
    let message = Options::parse_json(&long).unwrap_err().to_string();
    assert!(message.len() < 200, "{message}");
}

#[test]
fn one_size_in_text_and_in_json_is_the_same_once_its_table_is_known() {
    let text = Options::parse("filename=a,size=1M", None).unwrap();
    let json = from_json(json!({"filename": "a", "size": 1_048_576}));
    let other = from_json(json!({"filename": "a", "size": 1_048_577}));
    assert_ne!(text, json);
    assert_eq!(text.canonical(&[TABLE]), json.canonical(&[TABLE]));
    assert!(text.differences(&json, &[TABLE]).is_empty());
    assert_eq!(text.differences(&other, &[TABLE]), ["size"]);
    assert_eq!(
        text.canonical(&[TABLE]).to_json(),
        json!({"filename": "a", "size": 1_048_576})
    );
}

#[test]
fn an_option_that_says_its_default_is_no_difference_and_not_strong() {
    let given = Options::parse("filename=a,size=0k", None).unwrap();
    let left_out = Options::parse("filename=a", None).unwrap();
    assert!(given.differences(&left_out, &[TABLE]).is_empty());
    assert_eq!(given.strong(&[TABLE]), left_out);
    let sized = Options::parse("filename=a,size=1k,other=1", None).unwrap();
    assert_eq!(sized.strong(&[TABLE]), sized);
    assert_eq!(sized.differences(&left_out, &[TABLE]), ["other", "size"]);
}

#[test]
fn a_value_of_the_wrong_json_kind_is_refused() {
    let message = |value| {
        let checked = from_json(value).check(&[TABLE], "driver 'test'");
        checked.unwrap_err().to_string()
    };
    assert!(message(json!({"filename": true})).contains("takes text, not 'on'"));
    assert!(message(json!({"filename": null})).contains("takes text, not 'null'"));
    assert!(message(json!({"filename": "a", "size": false})).contains("takes a size"));
    assert!(message(json!({"filename": "a", "size": -1})).contains("takes a size"));
    let fits = from_json(json!({"filename": 7, "size": "1M"}));
    fits.check(&[TABLE], "driver 'test'").unwrap();
    assert_eq!(fits.text(TABLE, "filename"), "7");
}

#[test]
fn a_child_is_a_node_or_options_or_absent_or_not_spoken_of() {
    let child = |value| from_json(value).take_child("backing");
    let inline = ChildOption::Inline(Options::parse("driver=file", None).unwrap());
    assert_eq!(child(json!({"file": "a"})).unwrap(), None);
    assert_eq!(
        child(json!({"backing": null})).unwrap(),
        Some(ChildOption::Absent)
    );
    assert_eq!(
        child(json!({"backing": ""})).unwrap(),
        Some(ChildOption::Absent)
    );
    assert_eq!(
        child(json!({"backing": "node"})).unwrap(),
        Some(ChildOption::Node("node".into()))
    );
    assert_eq!(
        child(json!({"backing": {"driver": "file"}})).unwrap(),
        Some(inline)
    );
    let twice = child(json!({"backing": null, "backing.driver": "file"}));
    assert!(twice.unwrap_err().to_string().contains("ruled out as well"));
}

/// A tree of options: any keys, any values.
fn any_options(random: &mut Random, prefix: &str, depth: u64, into: &mut Options) {
    for index in 0..random.between(1, 4) {
        // Numbered children of one parent, or names; never both.
        let word = match depth {
            2 => index.to_string(),
            _ => format!(
                "{}{index}",
                ["a", "file", "cache-x", "0"][random.below(4) as usize]
            ),
        };
        let key = match prefix {
            "" => word,
            prefix => format!("{prefix}.{word}"),
        };
        if depth < 3 && random.chance(400) {
            any_options(random, &key, depth + 1, into);
            continue;
        }
        let text: String = (0..random.below(6))
            .map(|_| [',', '=', 'x', '"', '\\', 'é', '\n', '.'][random.below(8) as usize])
            .collect();
        into.set_value(
            &key,
            match random.below(5) {
                0 => OptionValue::Null,
                1 => OptionValue::Bool(random.chance(500)),
                2 => OptionValue::Number((random.bits() as i64).to_string()),
                _ => OptionValue::Text(text),
            },
        );
    }
}

#[test]
fn any_options_come_back_from_json_and_from_text() {
    for seed in 0..500 {
        let mut options = Options::default();
        any_options(&mut Random::new(seed), "", 0, &mut options);
        let json = options.to_json();
        assert_eq!(Options::from_json(&json).unwrap(), options, "seed {seed}");
        let text = options.to_text();
        let back = Options::parse(&text, None).unwrap();
        assert_eq!(back.to_text(), text, "seed {seed}");
        let texts = |options: &Options| -> Vec<(String, String)> {
            let text = |value: &OptionValue| value.as_text().unwrap_or("").to_owned();
            options
                .iter()
                .map(|(key, value)| (key.to_owned(), text(value)))
                .collect()
        };
        assert_eq!(texts(&back), texts(&options), "seed {seed}");
    }
}

#[test]
fn what_cannot_nest_is_written_under_its_dotted_key() {
    let options = Options::parse("a=1,a.b=2,c.0=x,c.2=y", None).unwrap();
    let json = options.to_json();
    assert_eq!(
        json,
        json!({"a": "1", "a.b": "2", "c": {"0": "x", "2": "y"}})
    );
    assert_eq!(Options::from_json(&json).unwrap(), options);
}

#[test]
fn more_than_nine_numbered_children_keep_their_order() {
    let list: Vec<_> = (0..12).map(|number| number.to_string()).collect();
    let value = json!({"children": list});
    assert_eq!(from_json(value.clone()).to_json(), value);
}
