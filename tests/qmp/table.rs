//! `commands.md` says of every command and event of `qemu-storage-daemon` whether it is here: and is right.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::client::{Served, Which};

const TABLE: &str = include_str!("../commands.md");

/// Each name with what shows it, or `absent` with a reason.
fn rows() -> BTreeMap<&'static str, &'static str> {
    let lines = TABLE.lines().filter(|line| line.starts_with("| `"));
    lines
        .map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [name, _, shown] = cells[..] else {
                panic!("three cells: {line}");
            };
            (name.trim_matches('`'), shown)
        })
        .collect()
}

fn schema(which: Which) -> Vec<Value> {
    let served = Served::start(which, &[]);
    let reply = served.client().call("query-qmp-schema", json!({}));
    reply["return"].as_array().unwrap().clone()
}

fn names<'a>(schema: &'a [Value], meta: &str) -> BTreeSet<&'a str> {
    let entries = schema.iter().filter(|entry| entry["meta-type"] == meta);
    entries
        .map(|entry| entry["name"].as_str().unwrap())
        .collect()
}

fn tests() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("qmp");
    let files = fs::read_dir(folder).unwrap();
    files
        .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
        .collect()
}

#[test]
fn every_command_and_event_of_qemus_is_here_with_a_test_or_absent() {
    let (rows, tests) = (rows(), tests());
    let (ours, qemus) = (schema(Which::Ours), schema(Which::Qemus));
    for meta in ["command", "event"] {
        let (ours, qemus) = (names(&ours, meta), names(&qemus, meta));
        for name in &qemus {
            let shown = rows
                .get(name)
                .unwrap_or_else(|| panic!("{name} has no row"));
            let is_absent = shown.starts_with("absent: ");
            assert_eq!(ours.contains(name), !is_absent, "{name}: {shown}");
        }
        for name in ours.difference(&qemus) {
            // An event that is ours alone would break clients that know QEMU's only.
            assert!(meta == "command" && rows.contains_key(name), "{name}");
        }
    }
    for (name, shown) in rows {
        for test in shown
            .split(", ")
            .filter(|shown| !shown.starts_with("absent: "))
        {
            assert!(
                tests.contains(&format!("fn {test}()")),
                "{name}: there is no test {test}"
            );
        }
    }
}

#[test]
fn what_is_absent_is_not_found() {
    let served = Served::start(Which::Ours, &[]);
    let mut client = served.client();
    let absent = rows()
        .into_iter()
        .filter(|(_, shown)| shown.starts_with("absent: "));
    for (name, _) in absent {
        let reply = client.call(name, json!({}));
        assert_eq!(reply["error"]["class"], "CommandNotFound", "{name}");
    }
}

/// An object's members, with those of all of its cases.
fn members(schema: &BTreeMap<&str, &Value>, kind: &Value) -> BTreeMap<String, (bool, String)> {
    let entry = schema[kind.as_str().unwrap()];
    let list = entry["members"].as_array();
    list.into_iter()
        .flatten()
        .map(|member| {
            let kind = schema[member["type"].as_str().unwrap()];
            let json = kind["json-type"].as_str().or(kind["meta-type"].as_str());
            let optional = member.get("default").is_some();
            let name = member["name"].as_str().unwrap().to_owned();
            (name, (optional, json.unwrap().to_owned()))
        })
        .collect()
}

#[test]
fn the_schema_has_of_each_command_and_event_what_qemus_has() {
    let (ours, qemus) = (schema(Which::Ours), schema(Which::Qemus));
    fn by_name(schema: &[Value]) -> BTreeMap<&str, &Value> {
        schema
            .iter()
            .map(|entry| (entry["name"].as_str().unwrap(), entry))
            .collect()
    }
    let (ours, qemus) = (by_name(&ours), by_name(&qemus));
    let interesting =
        |entry: &&Value| entry["meta-type"] == "command" || entry["meta-type"] == "event";
    let by_case = ["block-export-add", "block-job-change"];
    let mut compared = 0;
    for entry in ours.values().copied().filter(interesting) {
        let name = entry["name"].as_str().unwrap();
        let Some(theirs) = qemus.get(name) else {
            continue;
        };
        assert_eq!(
            entry.get("features"),
            theirs
                .get("features")
                .filter(|_| entry.get("features").is_some()),
            "{name}"
        );
        let (ours, qemus) = (
            members(&ours, &entry["arg-type"]),
            members(&qemus, &theirs["arg-type"]),
        );
        for (member, ours) in &ours {
            if (name, member.as_str()) == ("block-export-add", "iothread") {
                // Ours may be a list as well.
                continue;
            }
            let qemus = qemus.get(member);
            assert_eq!(Some(ours), qemus, "{name}.{member}");
            compared += 1;
        }
        // Where ours has all members in its cases, they are not in the base.
        let is_union = by_case.contains(&name);
        for (member, (optional, _)) in &qemus {
            let here = *optional || is_union || ours.contains_key(member);
            assert!(here, "{name} lacks {member}");
        }
    }
    assert!(compared > 40, "{compared}");
}
