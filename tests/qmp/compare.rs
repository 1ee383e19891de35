//! Each command, beside the same call to `qemu-storage-daemon`.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::{Served, Which};

/// How our answer compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// The same value, or the same class and text of an error.
    Same,
    /// An error of the same class, whose text says more or other things.
    Class,
    /// As [`Same`](Self::Same), but for what we do not have.
    Fewer,
    /// As [`Same`](Self::Same), but for what we have besides.
    More,
}
use How::{Class, Fewer, More, Same};

fn images(folder: &Path) {
    let make = |arguments: &[&str]| {
        let status = Command::new("qemu-img")
            .current_dir(folder)
            .args(arguments)
            .output();
        assert!(status.unwrap().status.success());
    };
    make(&["create", "-f", "qcow2", "base.qcow2", "1M"]);
    make(&[
        "create",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
        "1M",
    ]);
    make(&["create", "-f", "raw", "raw.img", "1M"]);
    make(&["snapshot", "-c", "snap", "top.qcow2"]);
}

/// What depends on the machine, the process or an order that means nothing is made alike.
fn plain(value: &Value, folder: &Path) -> Value {
    match value {
        Value::String(text) if text.starts_with("#block") => "#block".into(),
        Value::String(text) if text.contains("qmp.sock") => "the monitor's socket".into(),
        Value::String(text) => text.replace(folder.to_str().unwrap(), "FOLDER").into(),
        Value::Array(list) => {
            let mut list: Vec<_> = list.iter().map(|value| plain(value, folder)).collect();
            list.sort_by_key(Value::to_string);
            Value::Array(list)
        }
        Value::Object(map) => {
            // An image's header may be written when it is opened, or not yet.
            let of_host = ["actual-size", "date-sec", "date-nsec", "wr_highest_offset"];
            let members = map
                .iter()
                .filter(|(name, _)| !of_host.contains(&name.as_str()));
            // Which of the host's blocks are filled is its own affair; whether that is told is not.
            let mut members: serde_json::Map<_, _> = members
                .map(|(name, value)| (name.clone(), plain(value, folder)))
                .collect();
            if map.contains_key("actual-size") {
                members.insert("actual-size".into(), 0.into());
            }
            Value::Object(members)
        }
        value => value.clone(),
    }
}

/// Whether all that ours tells is in QEMU's.
fn is_part(ours: &Value, qemus: &Value) -> bool {
    match (ours, qemus) {
        (Value::Array(ours), Value::Array(qemus)) => ours
            .iter()
            .all(|ours| qemus.iter().any(|qemus| is_part(ours, qemus))),
        (Value::Object(ours), Value::Object(qemus)) => {
            let mut ours = ours.iter();
            ours.all(|(name, ours)| qemus.get(name).is_some_and(|qemus| is_part(ours, qemus)))
        }
        (ours, qemus) => ours == qemus,
    }
}

/// Has both daemons do all of this, each on images of its own, and compares.
fn compare(arguments: &[&str], calls: &[(How, &str, Value)]) {
    let answers = [Which::Ours, Which::Qemus].map(|which| {
        let folder = tempfile::tempdir().unwrap();
        images(folder.path());
        let served = Served::start(which, arguments);
        let mut client = served.client();
        let path = folder.path().to_str().unwrap();
        let answers: Vec<_> = calls
            .iter()
            .map(|(_, name, arguments)| {
                let arguments = arguments.to_string().replace("FOLDER", path);
                let answer = client.call(name, serde_json::from_str(&arguments).unwrap());
                plain(&answer, folder.path())
            })
            .collect();
        client.call("quit", json!({}));
        assert!(served.wait().success(), "{which:?}");
        answers
    });
    let [ours, qemus] = answers;
    for (((how, name, arguments), ours), qemus) in calls.iter().zip(ours).zip(qemus) {
        let alike = match how {
            Same => ours == qemus,
            Class => {
                ours["error"]["class"].is_string()
                    && ours["error"]["class"] == qemus["error"]["class"]
            }
            Fewer => is_part(&ours, &qemus),
            More => is_part(&qemus, &ours),
        };
        assert!(alike, "{name} {arguments}\n ours {ours}\nqemus {qemus}");
    }
}

fn node(driver: &str, name: &str, more: Value) -> Value {
    let mut value = json!({"driver": driver, "node-name": name});
    value
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    value
}

fn file(name: &str) -> Value {
    json!({"driver": "file", "filename": format!("FOLDER/{name}")})
}

#[test]
fn nodes_are_added_told_of_and_removed_as_qemu_does() {
    let top = json!({"file": {"driver": "file", "filename": "FOLDER/top.qcow2", "node-name": "top-file"}});
    compare(
        &["--object", "throttle-group,id=g"],
        &[
            (Same, "blockdev-add", node("qcow2", "top", top)),
            (
                Same,
                "blockdev-add",
                node(
                    "raw",
                    "r",
                    json!({"file": file("raw.img"), "read-only": true}),
                ),
            ),
            (
                Same,
                "blockdev-add",
                node("null-co", "n", json!({"detect-zeroes": "on"})),
            ),
            (Same, "query-named-block-nodes", json!({})),
            (Same, "query-named-block-nodes", json!({"flat": true})),
            (
                Same,
                "blockdev-add",
                node("throttle", "t", json!({"file": "n", "throttle-group": "g"})),
            ),
            (Same, "query-block", json!({})),
            (Same, "query-blockstats", json!({})),
            (Same, "query-blockstats", json!({"query-nodes": true})),
            (Same, "blockdev-del", json!({"node-name": "top-file"})),
            (Same, "blockdev-del", json!({"node-name": "nope"})),
            (Class, "blockdev-del", json!({"node-name": "n"})),
            (Same, "blockdev-del", json!({"node-name": "t"})),
            (Same, "blockdev-del", json!({"node-name": "n"})),
            (Same, "blockdev-del", json!({"node-name": "top"})),
            (Same, "blockdev-add", node("null-co", "n", json!({}))),
            (Same, "blockdev-add", node("null-co", "n", json!({}))),
            (Same, "blockdev-add", node("null-co", "1n", json!({}))),
            (Same, "blockdev-add", node("null-co", "", json!({}))),
            (Same, "blockdev-add", json!({"driver": "null-co"})),
            (
                Class,
                "blockdev-add",
                node("raw", "x", json!({"file": file("none")})),
            ),
            (
                Class,
                "blockdev-add",
                node("raw", "x", json!({"file": "none"})),
            ),
            (
                Class,
                "blockdev-add",
                node("qcow2", "x", json!({"file": {"driver": "null-co"}})),
            ),
            (Class, "blockdev-add", node("foo", "x", json!({}))),
            (Same, "blockdev-add", node("raw", "x", json!({}))),
            (Same, "blockdev-add", node("file", "x", json!({}))),
            (
                Same,
                "blockdev-add",
                node("file", "x", json!({"filename": 1})),
            ),
            (
                Same,
                "blockdev-add",
                node("null-co", "x", json!({"size": "1"})),
            ),
            (
                Same,
                "blockdev-add",
                node("null-co", "x", json!({"read-only": "on"})),
            ),
            (Same, "blockdev-add", json!({})),
        ],
    );
}

#[test]
fn nodes_are_changed_as_qemu_does() {
    compare(
        &[],
        &[
            (
                Same,
                "blockdev-add",
                node("qcow2", "top", json!({"file": file("top.qcow2")})),
            ),
            (
                Same,
                "blockdev-add",
                node(
                    "raw",
                    "r",
                    json!({"file": {"driver": "file", "filename": "FOLDER/raw.img", "node-name": "f"}}),
                ),
            ),
            (Same, "blockdev-add", node("null-co", "n", json!({}))),
            (
                Same,
                "blockdev-reopen",
                json!({"options": [node("raw", "r", json!({"file": "f", "discard": "unmap"}))]}),
            ),
            (
                Same,
                "blockdev-reopen",
                json!({"options": [node("raw", "r", json!({"file": "f"}))]}),
            ),
            (
                Same,
                "blockdev-reopen",
                json!({"options": [{"driver": "raw", "file": "f"}]}),
            ),
            (
                Same,
                "blockdev-reopen",
                json!({"options": [node("raw", "none", json!({"file": "f"}))]}),
            ),
            (
                Same,
                "blockdev-reopen",
                json!({"options": [{"driver": "raw", "x": 1}]}),
            ),
            (
                Same,
                "blockdev-reopen",
                json!({"options": {"driver": "raw"}}),
            ),
            (
                Class,
                "blockdev-reopen",
                json!({"options": [node("raw", "r", json!({"file": "none"}))]}),
            ),
            (
                Class,
                "blockdev-reopen",
                json!({"options": [node("qcow2", "r", json!({"file": "f"}))]}),
            ),
            (
                Same,
                "block_resize",
                json!({"node-name": "r", "size": 2 << 20}),
            ),
            (
                Same,
                "block_resize",
                json!({"node-name": "top", "size": 2 << 20}),
            ),
            (
                Class,
                "block_resize",
                json!({"node-name": "n", "size": 1024}),
            ),
            (
                Same,
                "block_resize",
                json!({"node-name": "r", "size": -512}),
            ),
            (
                Same,
                "block_resize",
                json!({"node-name": "none", "size": 512}),
            ),
            (Same, "block_resize", json!({"device": "r", "size": 512})),
            (Same, "block_resize", json!({"size": 512})),
            (Same, "block_resize", json!({"node-name": "r"})),
            (
                Same,
                "change-backing-file",
                json!({"device": "top", "image-node-name": "top", "backing-file": "FOLDER/base.qcow2"}),
            ),
            (
                Same,
                "change-backing-file",
                json!({"device": "none", "image-node-name": "top", "backing-file": "x"}),
            ),
            (
                Same,
                "change-backing-file",
                json!({"device": "r", "image-node-name": "r", "backing-file": "x"}),
            ),
            (
                Same,
                "block-set-write-threshold",
                json!({"node-name": "r", "write-threshold": 4096}),
            ),
            (
                Same,
                "block-set-write-threshold",
                json!({"node-name": "none", "write-threshold": 1}),
            ),
            (
                Class,
                "block-set-write-threshold",
                json!({"node-name": "r", "write-threshold": "1"}),
            ),
            (Same, "query-named-block-nodes", json!({})),
            (
                Same,
                "blockdev-set-active",
                json!({"node-name": "r", "active": false}),
            ),
            (Same, "query-named-block-nodes", json!({"flat": true})),
            (
                Same,
                "blockdev-set-active",
                json!({"node-name": "none", "active": false}),
            ),
            (Same, "blockdev-set-active", json!({"active": true})),
            (Same, "blockdev-set-active", json!({"active": false})),
            (Same, "blockdev-set-active", json!({"active": true})),
            (Same, "blockdev-set-active", json!({})),
        ],
    );
}

#[test]
fn objects_are_made_changed_and_removed_as_qemu_does() {
    let limits = json!({"iops-total": 5, "iops-total-max": 9, "bps-read": 4096});
    let object = |kind: &str, id: &str, more: Value| {
        let mut value = json!({"qom-type": kind, "id": id});
        value
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        value
    };
    let get = |path: &str, property: &str| json!({"path": path, "property": property});
    let set = |path: &str, property: &str, value: Value| json!({"path": path, "property": property, "value": value});
    compare(
        &[],
        &[
            (
                Same,
                "object-add",
                object("iothread", "io", json!({"poll-max-ns": 7})),
            ),
            (Same, "object-add", object("iothread", "io", json!({}))),
            (Same, "object-add", object("iothread", "1", json!({}))),
            (
                Same,
                "object-add",
                object("iothread", "x", json!({"zz": 1})),
            ),
            (
                Same,
                "object-add",
                object("iothread", "x", json!({"poll-max-ns": -1})),
            ),
            (Same, "object-add", object("zz", "x", json!({}))),
            (Same, "object-add", json!({"qom-type": "iothread"})),
            (Same, "object-add", json!({"id": "x"})),
            (
                Same,
                "object-add",
                object("throttle-group", "tg", json!({"limits": limits})),
            ),
            (
                Class,
                "object-add",
                object(
                    "throttle-group",
                    "x",
                    json!({"limits": {"iops-total": 1, "iops-read": 1}}),
                ),
            ),
            (
                Same,
                "object-add",
                object("throttle-group", "x", json!({"x-iops-total": "1"})),
            ),
            (
                Same,
                "object-add",
                object(
                    "throttle-group",
                    "tx",
                    json!({"x-iops-total": 1, "x-iops-total-max": 2}),
                ),
            ),
            (
                Same,
                "object-add",
                object("secret", "s", json!({"data": "YWJj", "format": "base64"})),
            ),
            (Same, "object-add", object("secret", "x", json!({}))),
            (
                Same,
                "object-add",
                object("secret", "x", json!({"data": "a", "file": "b"})),
            ),
            (
                Same,
                "object-add",
                object("secret", "x", json!({"data": "!!", "format": "base64"})),
            ),
            (
                Class,
                "object-add",
                object("secret", "x", json!({"file": "/nonexistent"})),
            ),
            (Same, "object-add", object("main-loop", "ml", json!({}))),
            (Same, "object-add", object("main-loop", "ml2", json!({}))),
            (Same, "qom-list", json!({"path": "/objects"})),
            (Fewer, "qom-list", json!({"path": "/"})),
            (Same, "qom-list", json!({"path": "/objects/io"})),
            (Same, "qom-list", json!({"path": "tg"})),
            (Same, "qom-list", json!({"path": "none"})),
            (Same, "qom-list-properties", json!({"typename": "iothread"})),
            (
                Same,
                "qom-list-properties",
                json!({"typename": "throttle-group"}),
            ),
            (
                Same,
                "qom-list-properties",
                json!({"typename": "main-loop"}),
            ),
            (Fewer, "qom-list-properties", json!({"typename": "secret"})),
            (Same, "qom-list-properties", json!({"typename": "none"})),
            (
                Fewer,
                "qom-list-types",
                json!({"implements": "user-creatable"}),
            ),
            (Same, "qom-get", get("io", "poll-max-ns")),
            (Same, "qom-get", get("/objects/io", "poll-grow")),
            (Same, "qom-get", get("io", "thread-pool-max")),
            (Same, "qom-get", get("io", "type")),
            (Same, "qom-get", get("io", "zz")),
            (Same, "qom-get", get("none", "zz")),
            (Same, "qom-get", get("tg", "limits")),
            (Same, "qom-get", get("tx", "x-iops-total-max")),
            (Same, "qom-get", get("s", "format")),
            (Same, "qom-set", set("io", "poll-max-ns", json!(5))),
            (Same, "qom-get", get("io", "poll-max-ns")),
            (Same, "qom-set", set("io", "poll-max-ns", json!(-5))),
            (Same, "qom-set", set("io", "poll-max-ns", json!("a"))),
            (Same, "qom-set", set("io", "zz", json!(1))),
            (Same, "qom-set", set("none", "zz", json!(1))),
            (
                Same,
                "qom-set",
                set("tg", "limits", json!({"iops-total": 6})),
            ),
            (Same, "qom-set", set("tg", "limits", json!({"zz": 6}))),
            (
                Class,
                "qom-set",
                set("tg", "limits", json!({"iops-total": 5, "iops-read": 3})),
            ),
            (Same, "qom-set", set("tg", "x-iops-total", json!(7))),
            (Same, "qom-get", get("tg", "limits")),
            (Same, "object-del", json!({"id": "none"})),
            (Same, "object-del", json!({"id": "ml"})),
            (
                Same,
                "blockdev-add",
                node(
                    "throttle",
                    "t",
                    json!({"file": {"driver": "null-co"}, "throttle-group": "tg"}),
                ),
            ),
            (Same, "object-del", json!({"id": "tg"})),
            (Same, "blockdev-del", json!({"node-name": "t"})),
            (Same, "object-del", json!({"id": "tg"})),
            (Same, "object-del", json!({"id": "io"})),
            (Same, "object-del", json!({"id": "s"})),
        ],
    );
}

#[test]
fn exports_are_added_told_of_and_removed_as_qemu_does() {
    let add = |id: &str, node: &str, more: Value| {
        let mut value = json!({"type": "vhost-user-blk", "id": id, "node-name": node,
            "addr": {"type": "unix", "path": format!("FOLDER/{id}.sock")}});
        let members = value.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        value
    };
    compare(
        &["--blockdev", "null-co,node-name=n"],
        &[
            (
                Same,
                "block-export-add",
                add("e", "n", json!({"writable": true})),
            ),
            (Class, "block-export-add", add("e", "n", json!({}))),
            (Class, "block-export-add", add("x", "none", json!({}))),
            (Class, "block-export-add", add("1", "n", json!({}))),
            (
                Same,
                "block-export-add",
                add("x", "n", json!({"writable": "on"})),
            ),
            (
                Class,
                "block-export-add",
                json!({"type": "fuse", "id": "x"}),
            ),
            (Class, "block-export-add", json!({})),
            (More, "query-block-exports", json!({})),
            (Class, "blockdev-del", json!({"node-name": "n"})),
            (Class, "block-export-del", json!({"id": "none"})),
            (Same, "block-export-del", json!({"id": "e", "mode": "hard"})),
            (Class, "block-export-del", json!({"id": "e", "mode": "zz"})),
        ],
    );
}

#[test]
fn nodes_are_offered_over_nbd_as_qemu_does() {
    let unix = |name: &str| {
        let path = format!("FOLDER/{name}");
        json!({"addr": {"type": "unix", "data": {"path": path}}})
    };
    let add = |id: &str, more: Value| {
        let mut value = json!({"type": "nbd", "id": id, "node-name": "n"});
        let members = value.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        value
    };
    compare(
        &[
            "--blockdev",
            "null-co,node-name=n",
            "--blockdev",
            "null-co,node-name=r,read-only=on",
        ],
        &[
            (Same, "nbd-server-stop", json!({})),
            (Class, "block-export-add", add("e", json!({}))),
            (Same, "nbd-server-add", json!({"device": "n"})),
            (Same, "nbd-server-start", json!({})),
            (Same, "nbd-server-start", unix("nbd.sock")),
            (Same, "nbd-server-start", unix("other.sock")),
            (
                Same,
                "block-export-add",
                add("e", json!({"writable": true})),
            ),
            (Same, "block-export-add", add("e", json!({}))),
            (Same, "block-export-add", add("f", json!({}))),
            (
                Same,
                "block-export-add",
                add(
                    "f",
                    json!({"name": "f", "description": "a node", "allocation-depth": true}),
                ),
            ),
            (
                Same,
                "block-export-add",
                add("g", json!({"name": "g", "bitmaps": ["none"]})),
            ),
            (
                Class,
                "block-export-add",
                add("g", json!({"name": "g", "bitmaps": [{"node": "n"}]})),
            ),
            (
                Class,
                "block-export-add",
                add("g", json!({"name": "g".repeat(5000)})),
            ),
            (More, "query-block-exports", json!({})),
            (Same, "nbd-server-add", json!({"device": "none"})),
            (
                Same,
                "nbd-server-add",
                json!({"device": "r", "writable": true}),
            ),
            (Same, "nbd-server-add", json!({"device": "r"})),
            (
                Same,
                "nbd-server-add",
                json!({"device": "r", "name": "s", "bitmap": "b"}),
            ),
            (Class, "blockdev-del", json!({"node-name": "r"})),
            (Same, "nbd-server-remove", json!({"name": "none"})),
            (Same, "nbd-server-remove", json!({"name": "r"})),
            (Same, "blockdev-del", json!({"node-name": "r"})),
            (Same, "block-export-del", json!({"id": "e"})),
            (More, "query-block-exports", json!({})),
            (Same, "nbd-server-stop", json!({})),
            (More, "query-block-exports", json!({})),
            (Same, "nbd-server-start", unix("nbd.sock")),
            (Same, "block-export-add", add("e", json!({}))),
        ],
    );
}

#[test]
fn character_devices_are_made_and_removed_as_qemu_does() {
    let add = |id: &str, kind: &str, data: Value| json!({"id": id, "backend": {"type": kind, "data": data}});
    let unix = |path: &str| json!({"type": "unix", "data": {"path": path}});
    compare(
        &[],
        &[
            (Same, "chardev-add", add("c1", "null", json!({}))),
            (Same, "chardev-add", add("c1", "null", json!({}))),
            (
                Same,
                "chardev-add",
                add("c2", "file", json!({"out": "FOLDER/out"})),
            ),
            (
                Same,
                "chardev-add",
                add(
                    "c3",
                    "socket",
                    json!({"addr": unix("FOLDER/s"), "server": true, "wait": false}),
                ),
            ),
            (
                Same,
                "chardev-add",
                add(
                    "x",
                    "socket",
                    json!({"addr": unix("FOLDER/none"), "server": false}),
                ),
            ),
            (
                Same,
                "chardev-add",
                add("x", "file", json!({"out": "/nonexistent/x"})),
            ),
            (Same, "chardev-add", add("x", "zz", json!({}))),
            (Same, "chardev-add", add("x", "socket", json!({}))),
            (Same, "chardev-add", json!({"id": "x"})),
            (Fewer, "query-chardev-backends", json!({})),
            (Same, "query-chardev", json!({})),
            (Same, "chardev-remove", json!({"id": "none"})),
            (Same, "chardev-remove", json!({"id": "mon"})),
            (Same, "chardev-remove", json!({"id": "c3"})),
            (Same, "chardev-remove", json!({"id": "c1"})),
        ],
    );
}

#[test]
fn what_runs_is_told_as_qemu_does() {
    compare(
        &[],
        &[
            (Class, "query-commands", json!({"x": 1})),
            (Same, "query-version", json!({"x": 1})),
            (Same, "query-commands", json!({"x": 1})),
            (Same, "query-block", json!({"x": 1})),
            (Same, "nope", json!({})),
        ],
    );
}

/// Nodes and edges by their names: the numbers, and who comes first, are each daemon's own.
fn edges(graph: &Value) -> Vec<String> {
    let nodes = graph["nodes"].as_array().unwrap();
    let name = |id: &Value| {
        let node = nodes.iter().find(|node| node["id"] == *id).unwrap();
        format!("{} {}", node["type"], node["name"])
    };
    let edges = graph["edges"].as_array().unwrap().iter();
    let mut edges: Vec<_> = edges
        .map(|edge| {
            let list = |name: &str| {
                let mut list: Vec<_> = edge[name]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(Value::to_string)
                    .collect();
                list.sort();
                list.join(",")
            };
            let ends = (name(&edge["parent"]), name(&edge["child"]));
            format!(
                "{} -{}- {}: {} / {}",
                ends.0,
                edge["name"],
                ends.1,
                list("perm"),
                list("shared-perm")
            )
        })
        .collect();
    edges.sort();
    edges
}

#[test]
fn the_graph_is_drawn_as_qemu_does() {
    let drawings = [Which::Ours, Which::Qemus].map(|which| {
        let folder = tempfile::tempdir().unwrap();
        images(folder.path());
        let served = Served::start(which, &[]);
        let mut client = served.client();
        let file = |name: &str, node: &str| {
            let path = folder.path().join(name);
            json!({"driver": "file", "filename": path, "node-name": node})
        };
        let base = node(
            "qcow2",
            "base",
            json!({"file": file("base.qcow2", "base-file"), "read-only": true}),
        );
        let top = node(
            "qcow2",
            "top",
            json!({"file": file("top.qcow2", "top-file"), "backing": "base"}),
        );
        for node in [base, top] {
            assert_eq!(
                client.call("blockdev-add", node),
                json!({"return": {}}),
                "{which:?}"
            );
        }
        edges(&client.call("x-debug-query-block-graph", json!({}))["return"])
    });
    assert_eq!(drawings[0], drawings[1]);
    assert_eq!(drawings[0].len(), 3);
}

#[test]
fn exports_that_cannot_be_are_refused_as_qemu_refuses_them() {
    let export = |more: Value| {
        let mut value = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n",
            "addr": {"type": "unix", "path": "FOLDER/socket"}});
        let members = value.as_object_mut().unwrap();
        members.extend(more.as_object().unwrap().clone());
        members.retain(|_, value| !value.is_null());
        value
    };
    let add = "block-export-add";
    compare(
        &["--object", "iothread,id=io"],
        &[
            (
                Same,
                "blockdev-add",
                node("null-co", "n", json!({"size": 1048576})),
            ),
            (
                Same,
                add,
                export(json!({"num-queues": 2, "writable": true})),
            ),
            (Same, add, export(json!({}))),
            (More, "query-block-exports", json!({})),
            (Class, "blockdev-del", json!({"node-name": "n"})),
            (Same, "block-export-del", json!({"id": "none"})),
            (Same, "block-export-del", json!({"id": "e", "mode": "soft"})),
            (Same, "block-export-del", json!({"id": "e"})),
            (Same, "block-export-del", json!({"id": "e"})),
            (Same, "query-block-exports", json!({})),
            (Same, add, export(json!({"iothread": "none"}))),
            (
                Same,
                add,
                export(json!({"iothread": "io", "fixed-iothread": true})),
            ),
            (Same, "block-export-del", json!({"id": "e", "mode": "hard"})),
            (Class, add, export(json!({"id": "1"}))),
            (Same, add, export(json!({"id": null}))),
            (Same, add, export(json!({"addr": null}))),
            (Same, add, export(json!({"addr": {"type": "unix"}}))),
            (
                Class,
                add,
                export(json!({"addr": {"type": "inet", "host": "::", "port": "1"}})),
            ),
            (Class, add, export(json!({"node-name": "none"}))),
            (Class, add, export(json!({"type": "none"}))),
            (Class, add, export(json!({"num-queues": 0}))),
            (Class, add, export(json!({"num-queues": "2"}))),
            (Class, add, export(json!({"logical-block-size": 513}))),
            (Class, add, export(json!({"allow-inactive": true}))),
            (Class, add, export(json!({"colour": "red"}))),
            (Same, add, export(json!({"writable": "on"}))),
            (Same, "query-block-exports", json!({})),
            (Same, "blockdev-del", json!({"node-name": "n"})),
        ],
    );
}

#[test]
fn a_hint_at_a_worker_is_taken_as_qemu_does() {
    let hint = |node: &str, iothread: Value, force: bool| match force {
        true => json!({"node-name": node, "iothread": iothread, "force": true}),
        false => json!({"node-name": node, "iothread": iothread}),
    };
    let set = "x-blockdev-set-iothread";
    let export = json!({
        "type": "vhost-user-blk", "id": "e", "node-name": "r",
        "addr": {"type": "unix", "path": "FOLDER/socket"},
    });
    compare(
        &["--object", "iothread,id=io"],
        &[
            (Same, "blockdev-add", node("null-co", "n", json!({}))),
            (Same, "blockdev-add", node("raw", "r", json!({"file": "n"}))),
            (Same, set, hint("none", json!("io"), false)),
            (Same, set, hint("n", json!("io"), false)),
            (Same, set, hint("r", json!("io"), false)),
            (Same, set, hint("r", json!("none"), false)),
            (Same, set, hint("r", json!(null), false)),
            (Same, set, hint("r", json!(5), false)),
            (Same, set, json!({"node-name": "r"})),
            (Same, "block-export-add", export),
            (Same, set, hint("r", json!("io"), false)),
            (Same, set, hint("r", json!("io"), true)),
        ],
    );
}

#[test]
fn what_is_ours_alone_answers() {
    let served = Served::start(
        Which::Ours,
        &["--blockdev", "null-co,node-name=n,size=1048576"],
    );
    let mut client = served.client();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n",
        "addr": {"type": "unix", "path": path.to_str().unwrap()}});
    let nothing = json!({"return": {}});
    assert_eq!(client.call("block-export-add", export), nothing);
    assert_eq!(
        client.call("query-block-requests", json!({})),
        json!({"return": []})
    );
    assert_eq!(
        client.call("block-export-resume", json!({"id": "e"})),
        nothing
    );
    let bins = json!({"id": "e", "boundaries": [10, 100], "boundaries-read": [5]});
    assert_eq!(client.call("block-latency-histogram-set", bins), nothing);
    let stats = client.call("query-blockstats", json!({}));
    let stats = &stats["return"][0]["stats"];
    assert_eq!(
        stats["rd_latency_histogram"],
        json!({"boundaries": [5], "bins": [0, 0]})
    );
    let of_writes = json!({"boundaries": [10, 100], "bins": [0, 0, 0]});
    assert_eq!(stats["wr_latency_histogram"], of_writes);
    let falling = json!({"id": "e", "boundaries": [10, 5]});
    for (command, arguments) in [
        ("block-latency-histogram-set", falling),
        ("block-latency-histogram-set", json!({"id": "none"})),
        ("block-export-resume", json!({"id": "none"})),
    ] {
        let reply = client.call(command, arguments);
        assert_eq!(
            reply["error"]["class"], "GenericError",
            "{command}: {reply}"
        );
    }
}
