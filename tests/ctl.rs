//! `stonework ctl`, as an operator types it: with `stonework daemon`, and with `qemu-storage-daemon`, which speaks
//! the same protocol.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use harness::daemon::{Place, Refusal, eventually, run, stonework};
use harness::frontend::Frontend;
use harness::frontend::blk::Request;
use serde_json::Value;

/// A daemon with a control socket, and a place for its files.
struct Peer {
    place: Place,
    child: Child,
}

/// Both daemons, each with its name.
fn both(arguments: &[&str]) -> [(&'static str, Peer); 2] {
    let ours = stonework(["daemon"]);
    let theirs = Command::new("qemu-storage-daemon");
    [("ours", ours), ("QEMU's", theirs)]
        .map(|(name, command)| (name, Peer::start(command, arguments)))
}

/// Ours alone, for what only it can do.
fn ours(arguments: &[&str]) -> Peer {
    Peer::start(stonework(["daemon"]), arguments)
}

impl Peer {
    fn start(mut command: Command, arguments: &[&str]) -> Self {
        let place = Place::new();
        let socket = place.join("qmp");
        let child = command
            .arg("--chardev")
            .arg(format!(
                "socket,id=c,path={},server=on,wait=off",
                socket.display()
            ))
            .args(["--monitor", "c"])
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .expect("it is installed");
        // A socket is there a moment before somebody listens at it.
        eventually("it listens", || UnixStream::connect(&socket).is_ok());
        Self { place, child }
    }

    fn socket(&self) -> PathBuf {
        self.place.join("qmp")
    }

    /// Runs `stonework ctl` on it.
    fn ctl(&self, words: &[&str]) -> Refusal {
        ctl(&self.socket(), words)
    }

    /// Runs it, and gives what it printed; it succeeds.
    #[track_caller]
    fn print(&self, words: &[&str]) -> String {
        let ended = self.ctl(words);
        assert_eq!(ended.code, Some(0), "{words:?}: {ended:?}");
        ended.output
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have been asked to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ctl(socket: &Path, words: &[&str]) -> Refusal {
    let mut command = stonework(["ctl", "--socket"]);
    command.arg(socket).args(words);
    run(command)
}

#[test]
fn nodes_are_added_listed_resized_reopened_and_removed() {
    for (whose, peer) in both(&[]) {
        println!("{whose}");
        let disk = peer.place.sparse("disk.raw", 1 << 20);
        let options = format!("file,node-name=f,filename={},discard=unmap", disk.display());
        assert_eq!(peer.print(&["node", "add", &options]), "");
        peer.print(&[
            "node",
            "add",
            r#"{"driver":"raw","node-name":"r","file":"f"}"#,
        ]);
        let listed = peer.print(&["node", "ls"]);
        let lines: Vec<_> = listed
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .collect();
        assert_eq!(
            lines[0],
            ["NODE", "DRIVER", "SIZE", "ACCESS", "CACHE", "FILE"]
        );
        assert_eq!(
            lines[1][..6],
            ["f", "file", "1", "MiB", "read-write", "writeback"]
        );
        assert_eq!(lines.len(), 3, "{listed}");
        peer.print(&["node", "resize", "f", "2M"]);
        peer.print(&["node", "resize", "f", "+512k"]);
        assert_eq!(disk.metadata().unwrap().len(), (2 << 20) + (512 << 10));
        let scripted = peer.print(&["-H", "-p", "node", "ls"]);
        assert!(
            scripted.starts_with("f\tfile\t2621440\tread-write\twriteback\t/"),
            "{scripted}"
        );
        let reopened = format!("file,node-name=f,filename={},read-only=on", disk.display());
        peer.print(&["node", "reopen", &reopened]);
        let shown = peer.print(&["node", "show", "f"]);
        let says = |key: &str, value: &str| {
            shown.lines().any(|line| {
                line.split_once("  ")
                    .is_some_and(|(k, v)| (k.trim(), v.trim()) == (key, value))
            })
        };
        assert!(
            says("read-only", "yes") && says("size", "2.5 MiB"),
            "{shown}"
        );
        let refused = peer.ctl(&["node", "rm", "f"]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(
            refused.errors.contains("'r' uses it") || refused.errors.contains("in use"),
            "{refused:?}"
        );
        peer.print(&["node", "rm", "r"]);
        peer.print(&["node", "rm", "f"]);
        assert_eq!(peer.print(&["-H", "node", "ls"]), "");
    }
}

#[test]
fn a_graph_is_a_tree_a_drawing_or_json() {
    for (whose, peer) in both(&[]) {
        println!("{whose}");
        let image = peer.place.join("a.qcow2");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg("1M")
            .status();
        assert!(made.expect("qemu-img is installed").success());
        let options = format!(
            "qcow2,node-name=top,file.driver=file,file.node-name=below,file.filename={}",
            image.display()
        );
        peer.print(&["node", "add", &options]);
        let socket = peer.place.join("vm.sock");
        let export = format!(
            "vhost-user-blk,id=vda,node-name=top,addr.type=unix,addr.path={}",
            socket.display()
        );
        peer.print(&["export", "add", &export]);
        let tree = peer.print(&["graph"]);
        let expected = format!(
            "export 'vda'\n└─ root: top  qcow2, 1 MiB\n   └─ file: below  file, 192.5 KiB, {}\n",
            image.display()
        );
        assert_eq!(tree, expected);
        let dot = peer.print(&["graph", "--format", "dot"]);
        assert!(
            dot.starts_with("digraph blocks {") && dot.contains("[label=\"file\"]"),
            "{dot}"
        );
        let json: Value =
            serde_json::from_str(&peer.print(&["graph", "--format", "json"])).unwrap();
        assert_eq!(json["nodes"].as_array().map(Vec::len), Some(3));
        let exports = peer.print(&["-H", "export", "ls"]);
        assert!(
            exports.starts_with("vda\tvhost-user-blk\ttop\t"),
            "{exports}"
        );
        peer.print(&["export", "rm", "vda", "--hard"]);
        eventually("it is gone", || {
            peer.print(&["-H", "export", "ls"]).is_empty()
        });
    }
}

#[test]
fn objects_are_made_read_changed_and_removed() {
    for (whose, peer) in both(&[]) {
        println!("{whose}");
        let group = r#"{"qom-type":"throttle-group","id":"g","limits":{"iops-total":100}}"#;
        peer.print(&["object", "add", group]);
        assert_eq!(peer.print(&["-H", "object", "ls"]), "g\tthrottle-group\n");
        peer.print(&["object", "set", "g", "limits", r#"{"iops-total":7}"#]);
        let limits: Value =
            serde_json::from_str(&peer.print(&["object", "get", "g", "limits"])).unwrap();
        assert_eq!(limits["iops-total"], 7);
        peer.print(&["object", "rm", "g"]);
        assert_eq!(peer.print(&["-H", "object", "ls"]), "");
    }
}

#[test]
fn what_would_be_sent_is_shown_and_not_sent() {
    let nowhere = Path::new("/nowhere/at/all");
    for (words, sent) in [
        (
            &["node", "rm", "d"][..],
            r#"{"arguments":{"node-name":"d"},"execute":"blockdev-del"}"#,
        ),
        (
            &[
                "node",
                "add",
                "null-co,node-name=d,size=0x200,read-zeroes=on",
            ],
            r#"{"arguments":{"driver":"null-co","node-name":"d","read-zeroes":true,"size":512},"execute":"blockdev-add"}"#,
        ),
        (
            &["node", "resize", "d", "1G"],
            r#"{"arguments":{"node-name":"d","size":1073741824},"execute":"block_resize"}"#,
        ),
        (
            &["qmp", "stop", "{\"a\":1}"],
            r#"{"arguments":{"a":1},"execute":"stop"}"#,
        ),
    ] {
        let ended = ctl(nowhere, &[&["--dry-run"][..], words].concat());
        assert_eq!(
            (ended.code, ended.output.trim_end()),
            (Some(0), sent),
            "{ended:?}"
        );
    }
}

#[test]
fn any_command_and_every_event_can_be_had() {
    for (whose, peer) in both(&["--blockdev", "null-co,node-name=d"]) {
        println!("{whose}");
        let answer: Value = serde_json::from_str(&peer.print(&["qmp", "query-version"])).unwrap();
        assert_eq!(answer["qemu"]["major"], 10);
        let text = peer.print(&["--json", "qmp", "{\"execute\":\"query-block-exports\"}"]);
        assert_eq!(text.trim(), "[]");
        assert!(peer.print(&["version"]).contains("10.0"));
        let quit = peer.ctl(&["-v", "quit"]);
        assert_eq!(quit.code, Some(0), "{quit:?}");
        assert!(
            quit.errors.contains("-> {\"execute\":\"quit\"}"),
            "{quit:?}"
        );
    }
}

#[test]
fn each_kind_of_failure_has_its_exit_status() {
    for (whose, peer) in both(&[]) {
        println!("{whose}");
        let refused = peer.ctl(&["node", "rm", "none"]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let unknown = peer.ctl(&["qmp", "no-such-command"]);
        assert_eq!(unknown.code, Some(1));
        assert!(unknown.errors.contains("CommandNotFound"), "{unknown:?}");
        for words in [
            &["node"][..],
            &["node", "add", "nosuch,node-name=d"],
            &["node", "resize", "d", "big"],
            &["qmp", "{"],
        ] {
            let usage = peer.ctl(words);
            assert_eq!(usage.code, Some(2), "{words:?}: {usage:?}");
        }
        let mut command = stonework(["ctl", "node", "ls"]);
        command.env_remove("STONEWORK_SOCKET");
        let unnamed = run(command);
        assert_eq!(unnamed.code, Some(2));
        assert!(unnamed.errors.contains("STONEWORK_SOCKET"), "{unnamed:?}");
        let nobody = ctl(&peer.place.join("none"), &["node", "ls"]);
        assert_eq!(nobody.code, Some(3));
        assert!(
            nobody.errors.contains("is the daemon running"),
            "{nobody:?}"
        );
        // One monitor serves one client at a time.
        let first = UnixStream::connect(peer.socket()).unwrap();
        let second = peer.ctl(&["--timeout", "0.3", "node", "ls"]);
        assert_eq!(second.code, Some(4), "{second:?}");
        drop(first);
    }
}

/// A guest's front-end on a daemon of ours with one export, `vda`.
fn served(node: &str, export: &str) -> (Peer, PathBuf) {
    let peer = ours(&[]);
    let socket = peer.place.join("vm.sock");
    peer.print(&["node", "add", node]);
    let export = format!(
        "vhost-user-blk,id=vda,node-name=d,addr.type=unix,addr.path={},writable=on,num-queues=2{export}",
        socket.display()
    );
    peer.print(&["export", "add", &export]);
    (peer, socket)
}

#[test]
fn an_export_with_a_front_end_is_removed_only_by_force() {
    let (peer, socket) = served("null-co,node-name=d,size=1048576", "");
    let frontend = Frontend::connect(&socket);
    eventually("it counts as connected", || {
        peer.print(&["export", "ls"]).contains("connected")
    });
    let refused = peer.ctl(&["export", "rm", "vda"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.errors.contains("front-end") && refused.errors.contains("hard"),
        "{refused:?}"
    );
    peer.print(&["export", "rm", "vda", "--hard"]);
    eventually("it is gone", || {
        peer.print(&["-H", "export", "ls"]).is_empty()
    });
    assert!(!socket.exists());
    drop(frontend);
    peer.print(&["node", "rm", "d"]);
}

#[test]
fn a_guest_sees_its_disk_grow() {
    let disk = Place::new();
    let path = disk.sparse("disk.raw", 1 << 20);
    let node = format!("file,node-name=d,filename={}", path.display());
    let (peer, socket) = served(&node, "");
    // Nobody is there who could be told.
    peer.print(&["node", "resize", "d", "2M"]);
    // Neither has this one said how.
    let mut frontend = Frontend::connect(&socket);
    assert_eq!(frontend.config().capacity_sectors, 4096);
    peer.print(&["node", "resize", "d", "3M"]);
    assert_eq!(frontend.config().capacity_sectors, 6144);
    let mut ring = frontend.start_queue(0, 16);
    frontend.write(&mut ring, 6143, &[7; 512]);
    assert_eq!(frontend.read(&mut ring, 6143, 512), [7; 512]);
}

#[test]
fn requests_are_counted_and_those_that_hang_are_found() {
    let rule = "blkdebug,node-name=d,image.driver=null-co,image.size=1048576,inject-error.0.event=none,\
                inject-error.0.iotype=write,inject-error.0.errno=28,inject-error.0.sector=8";
    let (peer, socket) = served(rule, ",on-write-error=stop");
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 16);
    frontend.write(&mut ring, 0, &[1; 1024]);
    drop(frontend.read(&mut ring, 0, 512));
    let stats: Value = serde_json::from_str(&peer.print(&["--json", "stats"])).unwrap();
    let stats = &stats[0]["stats"];
    assert_eq!(
        (&stats["wr_operations"], &stats["wr_bytes"]),
        (&1.into(), &1024.into()),
        "{stats}"
    );
    assert_eq!(
        (&stats["rd_operations"], &stats["wr_highest_offset"]),
        (&1.into(), &1024.into())
    );
    assert_eq!(peer.print(&["-H", "requests"]), "");
    let held = Request::write(8, &[2; 512]);
    frontend.submit(&mut ring, &held);
    ring.kick_if_wanted();
    eventually("it is held", || {
        peer.print(&["-H", "requests"]).contains("held")
    });
    let found = peer.print(&["-H", "requests"]);
    let columns: Vec<_> = found.trim_end().split('\t').collect();
    assert_eq!(
        columns[1..6],
        ["vda", "write", "4096", "512 B", "held"],
        "{found}"
    );
    assert!(
        peer.print(&["-H", "export", "ls"])
            .trim_end()
            .ends_with('1')
    );
    let exports = peer.print(&["qmp", "query-block-exports"]);
    assert!(exports.contains("\"io-status\": \"nospace\""), "{exports}");
    // It fails again.
    peer.print(&["export", "resume", "vda"]);
    eventually("it is held again", || {
        peer.print(&["-H", "requests"]).contains("held")
    });
}

#[test]
fn disks_are_copied_and_jobs_steered_from_the_command_line() {
    for (name, peer) in both(&[]) {
        for image in ["disk", "backup", "mirror"] {
            let path = peer.place.join(&format!("{image}.qcow2"));
            let path = path.to_str().unwrap();
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2", path, "8M"]);
            assert!(create.status().unwrap().success());
            let mut write = Command::new("qemu-io");
            write.args(["-f", "qcow2", "-c", "write -P 1 0 4M", path]);
            assert!(write.output().unwrap().status.success());
            let node = format!("qcow2,node-name={image},file.driver=file,file.filename={path}");
            peer.print(&["node", "add", &node]);
        }
        assert_eq!(peer.print(&["-H", "job", "ls"]), "", "{name}");
        peer.print(&["backup", "disk", "backup", "--wait"]);
        peer.print(&["backup", "disk", "backup", "--job", "slow", "--speed", "1"]);
        peer.print(&["job", "pause", "slow"]);
        peer.print(&["job", "speed", "slow", "1M"]);
        let jobs = peer.print(&["-H", "job", "ls"]);
        assert!(jobs.starts_with("slow\tbackup\t"), "{name}: {jobs}");
        peer.print(&["job", "cancel", "slow", "--force"]);
        peer.print(&["job", "wait", "slow"]);
        peer.print(&["mirror", "disk", "mirror", "--wait"]);
        assert!(peer.print(&["-H", "job", "ls"]).contains("ready"), "{name}");
        peer.print(&["job", "complete", "mirror-disk", "--wait"]);
        assert_eq!(peer.print(&["-H", "job", "ls"]), "", "{name}");
        peer.print(&["mirror", "mirror", "disk", "--complete"]);
        assert_eq!(peer.print(&["-H", "job", "ls"]), "", "{name}");
        let refused = peer.ctl(&["job", "pause", "none"]);
        assert_eq!(refused.code, Some(1), "{name}: {refused:?}");
        let refused = peer.ctl(&["mirror", "disk", "disk"]);
        assert_eq!(refused.code, Some(1), "{name}: {refused:?}");
        peer.print(&["quit"]);
    }
}
