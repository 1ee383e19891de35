//! Exports that come and go, and graphs that change, under clients.

use std::process::{Child, Stdio};

use harness::daemon::eventually;
use serde_json::json;

use crate::setup::{Server, Which, run, tool};

fn started(folder: &std::path::Path) -> Server {
    let path = folder.join("d.qcow2");
    run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        path.to_str().unwrap(),
        "128M",
    ]);
    Server::start(
        Which::Ours,
        folder,
        &[
            "--blockdev",
            "file,node-name=f,filename=FOLDER/d.qcow2",
            "--blockdev",
            "qcow2,node-name=d,file=f",
            "--export",
            "nbd,id=e,node-name=d,writable=on",
        ],
    )
}

/// Writes, and later looks whether that is there, for so many seconds.
fn load(server: &Server, seconds: u32) -> Child {
    let (uri, time) = (
        format!("--uri={}", server.uri("d")),
        format!("--runtime={seconds}"),
    );
    tool(&[
        "fio",
        "--name=load",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=16",
        "--size=64M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--time_based",
        &time,
    ])
    .stdout(Stdio::null())
    .spawn()
    .unwrap()
}

fn is_connected(server: &mut Server) -> bool {
    server.ask("query-block-exports", json!({}))[0]["connected"] == true
}

#[test]
fn an_export_goes_safely_without_clients_and_hard_from_under_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = started(folder.path());
    let mut load = load(&server, 60);
    eventually("fio is connected", || is_connected(&mut server));
    let refused = server.call("block-export-del", json!({"id": "e"}));
    let text = refused["error"]["desc"].as_str().unwrap();
    assert!(text.contains("still in use"), "{text}");
    server.ask("block-export-del", json!({"id": "e", "mode": "hard"}));
    assert_eq!(server.event("BLOCK_EXPORT_DELETED")["data"]["id"], "e");
    assert!(!load.wait().unwrap().success());
    // The node is free again, and whole.
    server.ask("blockdev-del", json!({"node-name": "d"}));
    let add = json!({"driver": "qcow2", "node-name": "d", "file": "f"});
    server.ask("blockdev-add", add);
    let again = json!({"type": "nbd", "id": "e", "node-name": "d"});
    server.ask("block-export-add", again);
    run(&["nbdinfo", "--size", &server.uri("d")]);
    eventually("nobody is connected", || !is_connected(&mut server));
    server.ask("block-export-del", json!({"id": "e"}));
    assert_eq!(server.ask("query-block-exports", json!({})), json!([]));
    server.quit();
    let path = folder.path().join("d.qcow2");
    run(&["qemu-img", "check", "-q", path.to_str().unwrap()]);
}

#[test]
fn clients_notice_nothing_of_a_graph_that_changes_below_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = started(folder.path());
    let mut load = load(&server, 4);
    eventually("fio is connected", || is_connected(&mut server));
    for round in 0..12 {
        let direct = round % 2 == 0;
        let path = folder.path().join("d.qcow2");
        let options = json!({"options": [{"driver": "file", "node-name": "f", "filename": path,
            "cache": {"direct": direct}}]});
        server.ask("blockdev-reopen", options);
        let resized = server.call("block_resize", json!({"node-name": "d", "size": 1 << 28}));
        // Clients know one length.
        assert!(resized["error"]["desc"].is_string(), "{resized}");
    }
    assert!(load.wait().unwrap().success());
    server.quit();
}

#[test]
fn a_server_that_is_stopped_takes_its_exports_along_and_can_be_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = started(folder.path());
    let mut load = load(&server, 60);
    eventually("fio is connected", || is_connected(&mut server));
    server.ask("nbd-server-stop", json!({}));
    assert!(!load.wait().unwrap().success());
    assert_eq!(server.event("BLOCK_EXPORT_DELETED")["data"]["id"], "e");
    assert!(!server.socket().exists());
    let refused = server.call("nbd-server-stop", json!({}));
    assert_eq!(refused["error"]["desc"], "NBD server not running");
    // Over TCP, at a port that is free.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let addr = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": port}});
    server.ask(
        "nbd-server-start",
        json!({"addr": addr, "max-connections": 1}),
    );
    server.ask("nbd-server-add", json!({"device": "d", "writable": true}));
    let uri = format!("nbd://127.0.0.1:{port}/d");
    let info = run(&["nbdinfo", "--json", &uri]);
    assert!(info.contains("\"can_multi_conn\": false"), "{info}");
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -P 7 1M 1M",
        "-c",
        "read -P 7 1M 1M",
        &uri,
    ]);
    server.ask("nbd-server-remove", json!({"name": "d"}));
    server.quit();
}

#[test]
fn requests_of_nbd_clients_are_listed_while_they_are_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        "--blockdev",
        "null-co,node-name=slow,size=1048576,latency-ns=1000000000",
        "--export",
        "nbd,id=e,node-name=slow",
    ];
    let mut server = Server::start(Which::Ours, folder.path(), &arguments);
    let uri = server.uri("slow");
    let mut reader = tool(&["qemu-io", "-f", "raw", "-r", "-c", "read 64k 4k", &uri])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut listed = json!([]);
    eventually("the read is listed", || {
        listed = server.ask("query-block-requests", json!({}));
        listed[0]["offset"] == 65536
    });
    let request = &listed[0];
    assert_eq!(
        (&request["export"], &request["node-name"]),
        (&json!("e"), &json!("slow"))
    );
    assert_eq!(
        (&request["kind"], &request["bytes"]),
        (&json!("read"), &json!(4096))
    );
    assert_eq!(request["phase"], "in-flight");
    assert!(reader.wait().unwrap().success());
    assert_eq!(server.ask("query-block-requests", json!({})), json!([]));
}
