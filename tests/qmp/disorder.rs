//! Commands in any order, at any time, while guests have I/O under way.

use std::time::{Duration, Instant};

use harness::load::Load;
use harness::random::Random;
use serde_json::{Value, json};

use crate::client::{Client, Served, Which};

/// How long clients go on, each.
const TIME: Duration = Duration::from_secs(6);
/// An answer that takes longer was held up by something that it must not wait for.
const PATIENCE: Duration = Duration::from_secs(10);

fn one_of(random: &mut Random, among: &[&'static str]) -> &'static str {
    let picked: &&str = random.pick(among);
    picked
}

/// A command that makes sense at some moments and not at others. None is for the disk of the load, but such
/// as may be asked of any disk.
fn command(random: &mut Random, folder: &str) -> (&'static str, Value) {
    let node = one_of(random, &["a", "b", "c", "disk", "none", ""]);
    let own = one_of(random, &["a", "b", "c"]);
    // Not the load's: it would have another length.
    let file = one_of(random, &["a", "b", "c", "none"]);
    let export = one_of(random, &["x", "y", "none"]);
    let size = 512 * random.below(1 << 16);
    match random.below(25) {
        0 | 1 => (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": own, "size": size}),
        ),
        2 => (
            "blockdev-add",
            json!({"driver": "raw", "node-name": own, "file": file}),
        ),
        3 => {
            let file = format!("{folder}/spare.qcow2");
            let file = json!({"driver": "file", "filename": file});
            (
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": own, "file": file}),
            )
        }
        4 | 5 => ("blockdev-del", json!({"node-name": node})),
        6 => {
            let options = json!([{"driver": "raw", "node-name": own, "file": file}]);
            ("blockdev-reopen", json!({"options": options}))
        }
        7 => ("block_resize", json!({"node-name": own, "size": size})),
        8 | 9 => {
            let path = format!("{folder}/{export}.sock");
            let addr = json!({"type": "unix", "path": path});
            let writable = random.below(2) == 0;
            let export = json!({
                "type": "vhost-user-blk", "id": export, "node-name": node, "addr": addr,
                "writable": writable,
            });
            ("block-export-add", export)
        }
        10 | 11 => {
            let mode = one_of(random, &["safe", "hard"]);
            ("block-export-del", json!({"id": export, "mode": mode}))
        }
        12 => ("query-block-exports", json!({})),
        13 => (
            "query-named-block-nodes",
            json!({"flat": random.below(2) == 0}),
        ),
        14 => (
            "query-blockstats",
            json!({"query-nodes": random.below(2) == 0}),
        ),
        15 => ("x-debug-query-block-graph", json!({})),
        16 => (
            "block-set-write-threshold",
            json!({"node-name": node, "write-threshold": size}),
        ),
        17 => ("object-add", json!({"qom-type": "iothread", "id": own})),
        18 => ("object-del", json!({"id": own})),
        19 => {
            let limits = json!({"iops-total": 1 + random.below(1000)});
            (
                "object-add",
                json!({"qom-type": "throttle-group", "id": own, "limits": limits}),
            )
        }
        20 => ("query-qmp-schema", json!({})),
        21 => ("query-block-requests", json!({})),
        22 => ("block-export-resume", json!({"id": export})),
        23 => (
            "blockdev-set-active",
            json!({"node-name": own, "active": random.below(2) == 0}),
        ),
        _ => (
            "block-export-add",
            json!({"type": "vhost-user-blk", "id": 7, "node-name": [node], "addr": null}),
        ),
    }
}

fn go_on(mut client: Client, mut random: Random, folder: String) -> u64 {
    let end = Instant::now() + TIME;
    let mut answers = 0;
    while Instant::now() < end {
        let (name, arguments) = command(&mut random, &folder);
        let begin = Instant::now();
        let reply = client.call(name, arguments.clone());
        let class = &reply["error"]["class"];
        let is_clear = reply.get("return").is_some()
            || matches!(class.as_str(), Some("GenericError" | "DeviceNotFound"))
                && reply["error"]["desc"]
                    .as_str()
                    .is_some_and(|text| !text.is_empty());
        assert!(is_clear, "{name} {arguments}: {reply}");
        assert!(
            begin.elapsed() < PATIENCE,
            "{name} {arguments} took {:?}",
            begin.elapsed()
        );
        answers += 1;
    }
    answers
}

#[test]
fn commands_in_any_order_are_answered_and_do_not_reach_a_guests_load() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap().to_owned();
    let spare = format!("{path}/spare.qcow2");
    let create = ["create", "-q", "-f", "qcow2", &spare, "1M"];
    let made = std::process::Command::new("qemu-img").args(create).status();
    assert!(made.unwrap().success());
    std::fs::File::create(format!("{path}/disk"))
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    let monitor =
        |name: &str| format!("socket,id={name},path={path}/{name}.qmp,server=on,wait=off");
    let node = format!("file,node-name=disk,filename={path}/disk");
    let export = format!(
        "vhost-user-blk,id=load,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={path}/load"
    );
    let (two, three) = (monitor("two"), monitor("three"));
    let served = Served::start(
        Which::Ours,
        &[
            "--blockdev",
            &node,
            "--export",
            &export,
            "--chardev",
            &two,
            "--monitor",
            "two",
            "--chardev",
            &three,
            "--monitor",
            "three",
        ],
    );
    let load = Load::start(&folder.path().join("load"));
    let mut random = Random::announced("commands");
    let mut clients = vec![served.client()];
    for name in ["two", "three"] {
        let socket = folder.path().join(format!("{name}.qmp"));
        let mut client = Client::connect(&socket);
        client.call("qmp_capabilities", json!({}));
        clients.push(client);
    }
    let threads: Vec<_> = clients
        .into_iter()
        .map(|client| {
            let (random, path) = (Random::new(random.next_u64()), path.clone());
            std::thread::spawn(move || go_on(client, random, path))
        })
        .collect();
    for thread in threads {
        let answers = thread.join().expect("its message is above");
        assert!(answers > 100, "only {answers} answers");
    }
    load.finish();
    let mut client = served.client();
    assert_eq!(client.call("quit", json!({})), json!({"return": {}}));
    assert!(served.wait().success());
}
