//! A host's disk that is full, and one that does not answer, as an operator sees them.

use std::path::Path;
use std::process::Command;

use harness::daemon::{eventually, run, stonework};
use harness::frontend::Frontend;
use harness::frontend::blk::{self, Request};
use serde_json::{Value, json};

use crate::client::{Client, Served, Which};

const MIB: usize = 1 << 20;

/// A file system of its own, as long as this lives.
struct Cramped(tempfile::TempDir);

impl Cramped {
    /// `None` where mounting is not allowed.
    fn new(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(folder.path())
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then_some(Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Cramped {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn event(client: &mut Client, name: &str) -> Value {
    loop {
        let message = client.next().expect("an event");
        if message["event"] == name {
            return message["data"].clone();
        }
    }
}

#[test]
fn a_guest_waits_while_the_hosts_disk_is_full_until_an_operator_resumes_it() {
    let Some(cramped) = Cramped::new("8m") else {
        assert!(
            std::env::var_os("CI").is_none(),
            "mounting is not allowed here"
        );
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let image = cramped.path().join("disk.qcow2");
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        image.to_str().unwrap(),
        "64M",
    ];
    assert!(
        Command::new("qemu-img")
            .args(create)
            .status()
            .unwrap()
            .success()
    );
    let filler = cramped.path().join("filler");
    std::fs::write(&filler, vec![1; 4 * MIB]).unwrap();
    let node = format!(
        "qcow2,node-name=disk,file.driver=file,file.filename={}",
        image.display()
    );
    let socket = folder.path().join("vm.sock");
    let export = format!(
        "vhost-user-blk,id=vda,node-name=disk,writable=on,num-queues=2,on-write-error=enospc,\
         addr.type=unix,addr.path={}",
        socket.display()
    );
    let served = Served::start(Which::Ours, &["--blockdev", &node, "--export", &export]);
    let mut client = served.client();
    let mut frontend = Frontend::connect(&socket);
    let (mut ring, mut other) = (frontend.start_queue(0, 16), frontend.start_queue(1, 16));
    let data = |number: usize| vec![number as u8 + 1; MIB / 2];
    let mut number = 0;
    let held = loop {
        let request = Request::write((number * MIB / 2 / 512) as u64, &data(number));
        let pending = frontend.submit(&mut ring, &request);
        ring.kick_if_wanted();
        match ring.wait(std::time::Duration::from_secs(2)) {
            Some(used) => assert_eq!(frontend.outcome(&pending, used).status, blk::OK),
            None => break pending,
        }
        number += 1;
        assert!(number < 32, "the disk does not get full");
    };
    let data_of_event = event(&mut client, "BLOCK_IO_ERROR");
    for (member, value) in [
        ("device", json!("vda")),
        ("operation", json!("write")),
        ("action", json!("stop")),
        ("nospace", json!(true)),
    ] {
        assert_eq!(data_of_event[member], value, "{data_of_event}");
    }
    let exports = client.call("query-block-exports", json!({}));
    assert_eq!(exports["return"][0]["io-status"], "nospace", "{exports}");
    // It still reads, and the control thread still answers. What needs room says that there is none.
    assert!(frontend.read(&mut other, 0, MIB / 2) == data(0));
    let file = json!({"driver": "file", "filename": image.to_str().unwrap()});
    let options =
        json!([{"driver": "qcow2", "node-name": "disk", "file": file, "discard": "unmap"}]);
    let reopened = client.call("blockdev-reopen", json!({"options": options}));
    let refusal = reopened["error"]["desc"].as_str().unwrap_or_default();
    assert!(refusal.contains("no space left on the host"), "{reopened}");
    // Without room it is held again.
    client.call("block-export-resume", json!({"id": "vda"}));
    eventually("it is held again", || {
        let exports = client.call("query-block-exports", json!({}));
        exports["return"][0]["held-requests"] == 1
    });
    std::fs::remove_file(&filler).unwrap();
    client.call("block-export-resume", json!({"id": "vda"}));
    let used = ring.wait(crate::client::LIMIT).expect("there is room");
    assert_eq!(frontend.outcome(&held, used).status, blk::OK);
    frontend.succeed(&mut ring, &Request::flush());
    for number in 0..=number {
        let found = frontend.read(&mut other, (number * MIB / 2 / 512) as u64, MIB / 2);
        assert!(found == data(number), "piece {number}");
    }
    drop(frontend);
    assert_eq!(client.call("quit", json!({})), json!({"return": {}}));
    assert!(served.wait().success());
    let check = ["check", "-q", image.to_str().unwrap()];
    assert!(
        Command::new("qemu-img")
            .args(check)
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn a_request_that_is_stuck_at_the_host_is_found_with_one_command() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(MIB as u64)
        .unwrap();
    let node = format!(
        "raw,node-name=disk,file.driver=blkdebug,file.node-name=slow,file.image.driver=file,\
         file.image.filename={}",
        image.display()
    );
    let socket = folder.path().join("vm.sock");
    let export = format!(
        "vhost-user-blk,id=vda,node-name=disk,writable=on,addr.type=unix,addr.path={}",
        socket.display()
    );
    let served = Served::start(Which::Ours, &["--blockdev", &node, "--export", &export]);
    let mut client = served.client();
    let suspend = json!({"node-name": "slow", "event": "pwritev", "tag": "stuck"});
    assert_eq!(
        client.call("blkdebug-suspend", suspend),
        json!({"return": {}})
    );
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 16);
    let pending = frontend.submit(&mut ring, &Request::write(24, &[7; 4096]));
    ring.kick_if_wanted();
    let find = || {
        let mut command = stonework(["ctl", "--socket"]);
        command.arg(served.socket()).args(["-H", "requests"]);
        run(command).output
    };
    // The monitor serves one client at a time.
    let resume = json!({"node-name": "slow", "tag": "stuck"});
    drop(client);
    eventually("it is found", || find().contains("in-flight"));
    let found = find();
    let columns: Vec<_> = found.trim_end().split('\t').collect();
    assert!(columns[6].contains("disk.raw"), "{found}");
    assert_eq!(
        columns[1..6],
        ["vda", "write", "12288", "4 KiB", "in-flight"],
        "{found}"
    );
    assert_eq!(ring.wait(std::time::Duration::from_millis(50)), None);
    let mut client = served.client();
    assert_eq!(
        client.call("blkdebug-resume", resume.clone()),
        json!({"return": {}})
    );
    let used = ring.wait(crate::client::LIMIT).expect("it goes on");
    assert_eq!(frontend.outcome(&pending, used).status, blk::OK);
    // There is no such request any more, nor ever was one at a node that is not for debugging.
    assert_eq!(
        client.call("blkdebug-resume", resume)["error"]["class"],
        "GenericError"
    );
    let none = json!({"node-name": "none", "event": "pwritev", "tag": "t"});
    assert_eq!(
        client.call("blkdebug-suspend", none)["error"]["class"],
        "GenericError"
    );
}

/// An NBD server that is stopped answers nothing, and keeps its connections.
#[test]
fn a_request_that_is_stuck_at_a_remote_host_is_found_with_one_command() {
    let folder = tempfile::tempdir().unwrap();
    let (image, remote) = (folder.path().join("disk.raw"), folder.path().join("remote"));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(MIB as u64)
        .unwrap();
    let mut server = Command::new("qemu-nbd")
        .args(["--persistent", "--format", "raw", "--socket"])
        .args([&remote, &image])
        .spawn()
        .unwrap();
    eventually("the remote host listens", || remote.exists());
    let node = format!(
        "nbd,node-name=disk,open-timeout=5,server.type=unix,server.path={}",
        remote.display()
    );
    let socket = folder.path().join("vm.sock");
    let export = format!(
        "vhost-user-blk,id=vda,node-name=disk,writable=on,addr.type=unix,addr.path={}",
        socket.display()
    );
    let served = Served::start(Which::Ours, &["--blockdev", &node, "--export", &export]);
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 16);
    frontend.write(&mut ring, 0, &[6; 512]);
    let signal = |signal| {
        let id = rustix::process::Pid::from_child(&server);
        rustix::process::kill_process(id, signal).unwrap();
    };
    signal(rustix::process::Signal::STOP);
    let pending = frontend.submit(&mut ring, &Request::write(24, &[7; 4096]));
    ring.kick_if_wanted();
    let find = || {
        let mut command = stonework(["ctl", "--socket"]);
        command.arg(served.socket()).args(["-H", "requests"]);
        run(command).output
    };
    eventually("it is found", || find().contains("in-flight"));
    let found = find();
    let columns: Vec<_> = found.trim_end().split('\t').collect();
    assert_eq!(
        columns[1..6],
        ["vda", "write", "12288", "4 KiB", "in-flight"],
        "{found}"
    );
    assert!(columns[6].starts_with("nbd+unix://"), "{found}");
    signal(rustix::process::Signal::CONT);
    let used = ring.wait(crate::client::LIMIT).expect("it goes on");
    assert_eq!(frontend.outcome(&pending, used).status, blk::OK);
    server.kill().unwrap();
    server.wait().unwrap();
}
