//! A client whose types are made from QEMU's schema: what it does not know, or misses, ends it.

use std::io::BufReader;
use std::os::unix::net::UnixStream;

use harness::frontend::Frontend;
use qapi::qmp::{self, Event, QmpCommand};
use qapi::{ExecuteError, Qmp, Stream};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::client::{Served, Which};

type Typed = Qmp<Stream<BufReader<UnixStream>, UnixStream>>;

/// Sends a command, which its type reads from this.
#[track_caller]
fn call<C: QmpCommand + DeserializeOwned>(client: &mut Typed, arguments: Value) -> C::Ok {
    let command: C = serde_json::from_value(arguments).expect("QEMU's schema has it");
    match client.execute(&command) {
        Ok(reply) => reply,
        Err(error) => panic!("{}: {error}", C::NAME),
    }
}

#[test]
fn a_client_made_from_qemus_schema_drives_it_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    std::fs::File::create(format!("{path}/disk"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let served = Served::start(Which::Ours, &[]);
    let stream = UnixStream::connect(served.socket()).unwrap();
    let reader = BufReader::new(stream.try_clone().unwrap());
    let mut client = Qmp::new(Stream::new(reader, stream));
    let greeting = client.handshake().expect("a greeting that it knows");
    assert_eq!(greeting.version.qemu.major, 10);

    let file = json!({"driver": "file", "node-name": "f", "filename": format!("{path}/disk")});
    call::<qmp::blockdev_add>(&mut client, file);
    let raw = json!({"driver": "raw", "node-name": "r", "file": "f"});
    call::<qmp::blockdev_add>(&mut client, raw.clone());
    let export = json!({
        "type": "vhost-user-blk", "id": "vda", "node-name": "r", "writable": true,
        "addr": {"type": "unix", "path": format!("{path}/vm.sock")},
    });
    call::<qmp::block_export_add>(&mut client, export);
    let mut frontend = Frontend::connect(&folder.path().join("vm.sock"));
    let mut ring = frontend.start_queue(0, 16);
    frontend.write(&mut ring, 0, &[7; 512]);

    let discarding = json!({"driver": "raw", "node-name": "r", "file": "f", "discard": "unmap"});
    call::<qmp::blockdev_reopen>(&mut client, json!({"options": [discarding]}));
    call::<qmp::block_resize>(&mut client, json!({"node-name": "r", "size": 2 << 20}));
    frontend.write(&mut ring, 4095, &[8; 512]);
    assert_eq!(frontend.read(&mut ring, 0, 512), [7; 512]);
    let nodes = call::<qmp::query_named_block_nodes>(&mut client, json!({}));
    let lengths: Vec<_> = nodes
        .iter()
        .map(|node| node.image.base.virtual_size)
        .collect();
    assert_eq!(lengths, [2 << 20, 2 << 20]);
    let exports = call::<qmp::query_block_exports>(&mut client, json!({}));
    assert_eq!((exports.len(), &*exports[0].id), (1, "vda"));
    let stats = call::<qmp::query_blockstats>(&mut client, json!({}));
    assert_eq!(stats[0].stats.wr_operations, 2);

    // A front-end is protected.
    let safe = qmp::block_export_del {
        mode: None,
        id: "vda".into(),
    };
    match client.execute(&safe) {
        Err(ExecuteError::Qapi(error)) => assert!(error.desc.contains("still in use"), "{error}"),
        other => panic!("{other:?}"),
    }
    drop(frontend);
    let hard = json!({"id": "vda", "mode": "hard"});
    call::<qmp::block_export_del>(&mut client, hard);
    while !client
        .events()
        .any(|event| matches!(event, Event::BLOCK_EXPORT_DELETED { .. }))
    {
        client.nop().expect("it goes on");
    }
    call::<qmp::blockdev_del>(&mut client, json!({"node-name": "r"}));
    call::<qmp::blockdev_del>(&mut client, json!({"node-name": "f"}));
    call::<qmp::quit>(&mut client, json!({}));
    assert!(served.wait().success());
}
