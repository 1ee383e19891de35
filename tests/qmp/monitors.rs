//! Monitors in number, and monitors that do not read.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use harness::daemon::eventually;
use serde_json::json;

use crate::client::{Client, Served, Which};

/// Memory that a process has, in bytes.
fn resident_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.unwrap().split_whitespace().nth(1).unwrap();
    kilobytes.parse::<u64>().unwrap() << 10
}

fn second_monitor(folder: &tempfile::TempDir) -> (String, std::path::PathBuf) {
    let path = folder.path().join("second.sock");
    let chardev = format!("socket,id=two,path={},server=on,wait=off", path.display());
    (chardev, path)
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody_and_takes_bounded_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (chardev, path) = second_monitor(&folder);
    let served = Served::start(Which::Ours, &["--chardev", &chardev, "--monitor", "two"]);
    let mut deaf = served.client();
    let mut other = Client::connect(&path);
    other.call("qmp_capabilities", json!({}));
    let before = resident_bytes(served.id());
    // Each reply is some hundred kilobytes. The socket takes no more at some point, which is meant.
    let command = b"{\"execute\":\"query-qmp-schema\"}";
    let mut asked = 0;
    deaf.stream().set_nonblocking(true).unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        match deaf.stream().write(command) {
            Ok(written) if written == command.len() => asked += 1,
            Ok(_) => break,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    assert!(asked > 100);
    let begun = Instant::now();
    assert_eq!(other.call("query-block", json!({})), json!({"return": []}));
    assert!(begun.elapsed() < Duration::from_secs(2));
    let more = resident_bytes(served.id()).saturating_sub(before);
    assert!(more < 32 << 20, "{more} bytes more");
    // It is all there when it is read.
    deaf.stream().set_nonblocking(false).unwrap();
    for number in 0..asked.min(100) {
        let reply = deaf.next().unwrap();
        assert!(reply["return"].is_array(), "reply {number}");
    }
}

#[test]
fn a_thousand_clients_one_after_the_other_and_many_at_once_are_served() {
    let served = Served::start(Which::Ours, &[]);
    for number in 0..1000 {
        let client = UnixStream::connect(served.socket()).unwrap();
        if number % 3 == 0 {
            let _ = (&client).write_all(b"{\"execute\":");
        }
    }
    // They wait for each other; one that goes away without a word is passed over.
    let mut waiting: Vec<_> = (0..50)
        .map(|_| UnixStream::connect(served.socket()).unwrap())
        .collect();
    for stream in waiting.drain(..) {
        let mut client = Client::of(stream);
        assert!(client.next().unwrap().get("QMP").is_some());
        client.call("qmp_capabilities", json!({}));
        assert_eq!(client.call("query-block", json!({})), json!({"return": []}));
    }
}

#[test]
fn a_client_that_has_said_all_gets_its_replies() {
    let served = Served::start(Which::Ours, &[]);
    let mut client = served.client();
    for id in 0..5 {
        client.send(format!("{{\"execute\":\"query-version\",\"id\":{id}}}").as_bytes());
    }
    client.stream().shutdown(Shutdown::Write).unwrap();
    for id in 0..5 {
        assert_eq!(client.next().unwrap()["id"], id);
    }
    assert_eq!(client.next(), None);
    // The next one is served.
    served.client();
}

#[test]
fn a_command_runs_to_its_end_when_its_client_has_gone() {
    let served = Served::start(Which::Ours, &[]);
    let mut client = served.client();
    let add =
        json!({"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n"}});
    client.send(add.to_string().as_bytes());
    drop(client);
    let mut other = served.client();
    eventually("the node is there", || {
        let nodes = other.call("query-named-block-nodes", json!({}));
        nodes["return"].as_array().unwrap().len() == 1
    });
}

#[test]
fn all_clients_are_told_of_an_export_that_ends_with_the_daemon() {
    for which in [Which::Ours, Which::Qemus] {
        let folder = tempfile::tempdir().unwrap();
        let (chardev, path) = second_monitor(&folder);
        let export = format!(
            "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={}",
            folder.path().join("e.sock").display()
        );
        let arguments = [
            "--blockdev",
            "null-co,node-name=n",
            "--export",
            &export,
            "--chardev",
            &chardev,
            "--monitor",
            "two",
        ];
        let served = Served::start(which, &arguments);
        let mut asks = served.client();
        let mut other = Client::connect(&path);
        other.call("qmp_capabilities", json!({}));
        asks.send(b"{\"execute\":\"quit\"}");
        for client in [&mut asks, &mut other] {
            let mut event = client.next().unwrap();
            // The reply may come before or after.
            let mut replies = 0;
            if event.get("return").is_some() {
                event = client.next().unwrap();
                replies += 1;
            }
            assert_eq!(event["event"], "BLOCK_EXPORT_DELETED", "{which:?}");
            assert_eq!(event["data"], json!({"id": "e"}), "{which:?}");
            assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000);
            assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
            while let Some(reply) = client.next() {
                assert_eq!(reply, json!({"return": {}}), "{which:?}");
                replies += 1;
            }
            assert!(replies <= 1, "{which:?}");
        }
        assert!(served.wait().success(), "{which:?}");
    }
}
