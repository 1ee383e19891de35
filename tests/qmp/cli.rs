//! The daemon's options that have to do with control, beside those of `qemu-storage-daemon`.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::{Child, ExitStatus, Stdio};

use harness::daemon::eventually;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::client::{Client, Which};

/// Runs a daemon that is to end by itself; its status and what it said.
fn run(which: Which, arguments: &[&str]) -> (ExitStatus, String) {
    let mut command = which.command();
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let status = ended(&mut child);
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    (status, said)
}

fn ended(child: &mut Child) -> ExitStatus {
    let mut status = None;
    eventually("the daemon ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

#[test]
fn options_are_refused_as_qemu_does() {
    let sentence = |said: &str, argument: &str| {
        let after = said
            .lines()
            .next()
            .unwrap_or_default()
            .split_once(&format!("{argument}: "));
        after
            .map(|(_, sentence)| sentence.to_owned())
            .unwrap_or_default()
    };
    for arguments in [
        &["--chardev", "null"][..],
        &["--chardev", "zz,id=a"],
        &["--chardev", "socket,id=a,path=/nonexistent/x"],
        &["--chardev", "socket,id=a,path=x,server=zzz"],
        &["--chardev", "socket,id=a,path=x,foo=1"],
        &["--chardev", "file,id=a"],
        &["--chardev", "socket,id=a,fd=77"],
        &["--monitor", "nope"],
        &["--monitor", "pretty=on"],
        &["--chardev", "null,id=a", "--monitor", "a,mode=readline"],
        &["--chardev", "null,id=a", "--monitor", "a,mode=zz"],
        &["--chardev", "null,id=a", "--monitor", "a,pretty=zz"],
        &["--chardev", "null,id=a", "--monitor", "a,foo=1"],
        &["--chardev", "null,id=a", "--monitor", "a", "--monitor", "a"],
        &[
            "--chardev",
            "null,id=a",
            "--monitor",
            "{\"chardev\":\"a\",\"pretty\":\"on\"}",
        ],
        &["--object", "zz,id=a"],
        &["--object", "iothread"],
        &["--object", "iothread,id=a,poll-max-ns=x"],
        &["--object", "iothread,id=a,zz=1"],
        &[
            "--object",
            "{\"qom-type\":\"iothread\",\"id\":\"a\",\"poll-max-ns\":\"1\"}",
        ],
        &["--object", "{\"qom-type\":\"iothread\",\"id\":\"a\""],
        &["--object", "throttle-group,id=a,limits.iops-total=x"],
        &["--object", "secret,id=a,data=x,format=zz"],
    ] {
        let ((ours, we_said), (qemus, it_said)) =
            (run(Which::Ours, arguments), run(Which::Qemus, arguments));
        assert_eq!(ours.code(), qemus.code(), "{arguments:?}: {we_said}");
        let last = arguments[arguments.len() - 1];
        let (we_said, it_said) = (sentence(&we_said, last), sentence(&it_said, last));
        assert_eq!(we_said, it_said, "{arguments:?}");
        assert!(!we_said.is_empty(), "{arguments:?}");
    }
}

#[test]
fn what_there_is_not_is_refused_by_name_with_what_there_is() {
    for (arguments, part) in [
        (["--chardev", "pty,id=a"], "'pty'"),
        (
            ["--chardev", "socket,id=a,path=x,reconnect=1"],
            "'reconnect'",
        ),
        (
            ["--nbd-server", "addr.type=unix,addr.path=x,tls-authz=t"],
            "'tls-authz'",
        ),
        (["--trace", "enable=x,file=y"], "'file'"),
        (["--trace", "a b"], "a b"),
    ] {
        let (status, said) = run(Which::Ours, &arguments);
        assert_eq!(status.code(), Some(1), "{arguments:?}");
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

#[test]
fn help_is_printed_and_nothing_served() {
    for (arguments, part) in [
        (["--object", "help"], "  throttle-group\n"),
        (["--object", "iothread,help"], "  poll-max-ns=<int>\n"),
        (["--trace", "help"], "blockcore"),
    ] {
        let (status, said) = run(Which::Ours, &arguments);
        assert!(
            status.success() && said.contains(part),
            "{arguments:?}: {said}"
        );
    }
}

#[test]
fn the_pidfile_is_written_when_all_is_ready_locked_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pid");
    let shown = path.to_str().unwrap();
    for which in [Which::Ours, Which::Qemus] {
        let mut first = which.command().args(["--pidfile", shown]).spawn().unwrap();
        eventually("the pidfile is there", || {
            std::fs::read_to_string(&path).is_ok_and(|text| text == format!("{}\n", first.id()))
        });
        // Whoever comes second, ours or QEMU's.
        for other in [Which::Ours, Which::Qemus] {
            let (status, said) = run(other, &["--pidfile", shown]);
            assert_eq!(status.code(), Some(1), "{which:?} then {other:?}");
            assert!(said.contains("PID file"), "{said}");
        }
        kill_process(Pid::from_child(&first), Signal::TERM).unwrap();
        assert!(ended(&mut first).success());
        assert!(!path.exists(), "{which:?}");
    }
    // A start that fails leaves none.
    let (status, _) = run(Which::Ours, &["--pidfile", shown, "--blockdev", "foo"]);
    assert_eq!((status.code(), path.exists()), (Some(1), false));
}

#[test]
fn in_the_background_the_parent_ends_when_all_is_ready_or_has_failed() {
    let folder = tempfile::tempdir().unwrap();
    let (pidfile, socket) = (folder.path().join("pid"), folder.path().join("qmp"));
    let chardev = format!("socket,id=m,path={},server=on,wait=off", socket.display());
    let arguments = [
        "--daemonize",
        "--pidfile",
        pidfile.to_str().unwrap(),
        "--chardev",
        &chardev,
        "--monitor",
        "m",
    ];
    let (status, said) = run(Which::Ours, &arguments);
    assert!(status.success() && said.is_empty(), "{said}");
    let pid: i32 = std::fs::read_to_string(&pidfile)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let session = rustix::process::getsid(Pid::from_raw(pid)).unwrap();
    assert_eq!(session.as_raw_pid(), pid, "it has left our session");
    let mut client = Client::connect(&socket);
    client.call("qmp_capabilities", json!({}));
    assert_eq!(client.call("quit", json!({})), json!({"return": {}}));
    eventually("it has gone", || !pidfile.exists() && !socket.exists());

    let (status, said) = run(Which::Ours, &["--daemonize", "--blockdev", "foo"]);
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("'foo'"), "{said}");
}

#[test]
fn a_monitor_connects_out_and_lays_out_its_replies_for_people() {
    for which in [Which::Ours, Which::Qemus] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let chardev = format!("socket,id=m,path={}", path.display());
        let mut child = which
            .command()
            .args(["--chardev", &chardev, "--monitor", "m,pretty=on"])
            .spawn()
            .unwrap();
        let mut client = Client::of(listener.accept().unwrap().0);
        client.send(b"{'execute':'qmp_capabilities'}{'execute':'query-block','id':{'a':[1]}}{'execute':'quit'}");
        let mut text = String::new();
        while let Some(line) = client.next_line() {
            text += &line;
            text += "\n";
        }
        assert!(text.starts_with("{\n    \"QMP\": {\n"), "{which:?}: {text}");
        assert!(
            text.contains("\"a\": [\n            1\n        ]"),
            "{which:?}: {text}"
        );
        assert!(ended(&mut child).success());
    }
}
