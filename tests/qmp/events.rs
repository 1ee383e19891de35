//! What clients are told unasked.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use harness::libblkio::{Libblkio, Request};
use serde_json::{Value, json};

use crate::client::{Client, Served, Which};

const LIMIT: Duration = Duration::from_secs(10);
const BLOCK: usize = 4096;

/// A daemon that exports a node described so, and the front-end of that.
fn exported(folder: &Path, node: &str) -> (Served, Client, Libblkio) {
    let socket = folder.join("e.sock");
    let export = format!(
        "vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={}",
        socket.display()
    );
    let served = Served::start(Which::Ours, &["--blockdev", node, "--export", &export]);
    let client = served.client();
    let front_end = Libblkio::connect(&socket, BLOCK).unwrap();
    (served, client, front_end)
}

fn write(offset: u64) -> Request {
    Request::Write {
        offset,
        bytes: BLOCK,
    }
}

fn event(client: &mut Client, name: &str) -> Value {
    let event = client.next().unwrap();
    assert_eq!(event["event"], name, "{event}");
    event["data"].clone()
}

#[test]
fn a_write_beyond_a_threshold_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let (_served, mut client, mut front_end) = exported(folder.path(), "null-co,node-name=n");
    let set = json!({"node-name": "n", "write-threshold": 8192});
    assert_eq!(
        client.call("block-set-write-threshold", set),
        json!({"return": {}})
    );
    for offset in [4096, 8192, 12288] {
        front_end.perform(0, &[write(offset)], LIMIT).unwrap();
    }
    let data = event(&mut client, "BLOCK_WRITE_THRESHOLD");
    let expected = json!({"node-name": "n", "write-threshold": 8192, "amount-exceeded": 4096});
    assert_eq!(data, expected);
    // No other comes before this reply.
    client.send(b"{\"execute\":\"query-block\"}");
    assert_eq!(client.next().unwrap(), json!({"return": []}));
}

#[test]
fn a_request_that_failed_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let node = "blkdebug,node-name=n,image.driver=null-co,inject-error.0.event=none,\
                inject-error.0.iotype=write,inject-error.0.errno=28";
    let (_served, mut client, mut front_end) = exported(folder.path(), node);
    front_end.perform(0, &[write(0)], LIMIT).unwrap_err();
    let data = event(&mut client, "BLOCK_IO_ERROR");
    for (member, value) in [
        ("device", json!("e")),
        ("qom-path", json!("")),
        ("node-name", json!("n")),
        ("operation", json!("write")),
        ("action", json!("report")),
        ("nospace", json!(true)),
    ] {
        assert_eq!(data[member], value, "{data}");
    }
    assert!(data["reason"].is_string());
}

#[test]
fn an_image_that_contradicts_its_format_is_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("i.qcow2");
    for (program, arguments) in [
        ("qemu-img", &["create", "-f", "qcow2"][..]),
        ("qemu-io", &["-f", "qcow2", "-c", "write 0 64k"]),
    ] {
        let mut command = Command::new(program);
        command.args(arguments).arg(&image);
        if program == "qemu-img" {
            command.arg("1M");
        }
        assert!(command.output().unwrap().status.success());
    }
    // The first cluster's place, in the first L2 table, is made one that is not aligned.
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00
    };
    let table = number(number(40));
    file.write_all_at(&(1_u64 << 63 | (number(table) + 512)).to_be_bytes(), table)
        .unwrap();
    let node = format!(
        "qcow2,node-name=n,file.driver=file,file.filename={}",
        image.display()
    );
    let (_served, mut client, mut front_end) = exported(folder.path(), &node);
    let read = Request::Read {
        offset: 0,
        bytes: BLOCK,
    };
    front_end.perform(0, &[read], LIMIT).unwrap_err();
    let data = loop {
        let event = client.next().unwrap();
        if event["event"] == "BLOCK_IMAGE_CORRUPTED" {
            break event["data"].clone();
        }
    };
    assert_eq!(
        (&data["node-name"], &data["device"]),
        (&json!("n"), &json!(""))
    );
    assert!(
        data["msg"].is_string() && data["fatal"].is_boolean(),
        "{data}"
    );
}
