//! What service managers, scrapers and shells see of the daemon.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use harness::daemon::{Daemon, Place, eventually, run, serve, stonework, stonework_path};
use harness::frontend::Frontend;

use crate::{MIB, text};

/// Longer than anything takes.
const LIMIT: Duration = Duration::from_secs(20);

/// Asks for something over HTTP.
fn get(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).expect("it listens");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn metrics_count_what_guests_ask_for() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let (socket, metrics) = (place.join("vm.sock"), place.join("metrics"));
    let daemon = Daemon::serve(&disk, &socket, &["--metrics", text(&metrics)]);
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 16);
    frontend.write(&mut ring, 0, &[1; 2048]);
    let answer = get(&metrics, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    for line in [
        "stonework_requests_total{export=\"disk\",kind=\"write\"} 1.0",
        "stonework_transferred_bytes_total{export=\"disk\",kind=\"write\"} 2048.0",
        "stonework_frontend_connected{export=\"disk\"} 1.0",
        "stonework_in_flight_requests{export=\"disk\"} 0.0",
    ] {
        assert!(
            answer.lines().any(|found| found == line),
            "{line}\n{answer}"
        );
    }
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("\r\n\r\n", "405"),
    ] {
        let answer = get(&metrics, request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{request:?}: {answer}"
        );
    }
    // Neither one that says nothing nor one that says too much keeps others from it.
    drop(UnixStream::connect(&metrics).expect("it listens"));
    let silent = UnixStream::connect(&metrics).expect("it listens");
    let mut endless = UnixStream::connect(&metrics).expect("it listens");
    let _ = endless.write_all(&[b'x'; 100_000]);
    let answer = get(&metrics, "GET /metrics HTTP/1.1\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    drop(silent);
    daemon.stop();
    assert!(!metrics.exists());
}

#[test]
fn metrics_are_not_offered_to_other_hosts() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let mut command = serve(&disk, &place.join("vm.sock"), &[]);
    command.args(["--metrics", "0.0.0.0:9000"]);
    let refused = run(command);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.errors.contains("this host alone"), "{refused:?}");
}

#[test]
fn a_service_manager_is_told_when_it_is_ready_and_when_it_stops() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let notify = UnixDatagram::bind(place.join("notify")).expect("there is room for tests");
    notify
        .set_read_timeout(Some(LIMIT))
        .expect("a socket has one");
    let mut command = serve(&disk, &place.join("vm.sock"), &[]);
    command.env("NOTIFY_SOCKET", place.join("notify"));
    let daemon = Daemon::start_announced(command);
    let mut said = [0; 64];
    let bytes = notify.recv(&mut said).expect("it says so");
    assert_eq!(&said[..bytes], b"READY=1\n");
    daemon.stop();
    let bytes = notify.recv(&mut said).expect("it says so");
    assert_eq!(&said[..bytes], b"STOPPING=1\n");
}

#[test]
fn a_service_logs_to_the_journal_with_levels_and_fields() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let journal = UnixDatagram::bind(place.join("journal")).expect("there is room for tests");
    journal
        .set_read_timeout(Some(LIMIT))
        .expect("a socket has one");
    // As systemd sets it up.
    let script = format!(
        "mount -t tmpfs none /run && mkdir -p /run/systemd/journal \
         && ln -s {journal} /run/systemd/journal/socket && exec 2>{log} \
         && export JOURNAL_STREAM=$(stat -c %d:%i {log}) && exec \"$0\" serve {disk} --format raw \
         --socket {socket}",
        journal = text(&place.join("journal")),
        log = text(&place.join("log")),
        disk = text(&disk),
        socket = text(&place.join("vm.sock")),
    );
    let mut command = std::process::Command::new("unshare");
    command.arg("--mount");
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(["sh", "-c", &script]).arg(stonework_path());
    command.env("STONEWORK_LOG", "trace");
    let daemon = Daemon::start_announced(command);
    let mut said = [0; 4096];
    // A front-end that makes no sense is worth a line.
    let mut other = UnixStream::connect(place.join("vm.sock")).expect("it is served");
    other.write_all(&[0xff; 64]).expect("it is read");
    // What finds out whether anybody is there says nothing.
    let mut bytes = 0;
    while bytes == 0 {
        bytes = journal.recv(&mut said).expect("it is told something");
    }
    let said = String::from_utf8_lossy(&said[..bytes]);
    for field in [
        "PRIORITY\n",
        "MESSAGE\n",
        "SYSLOG_IDENTIFIER\n",
        "stonework",
    ] {
        assert!(said.contains(field), "{said:?}");
    }
    daemon.stop();
    let log = std::fs::read_to_string(place.join("log")).expect("the shell made it");
    assert_eq!(log, "", "what the journal has is not said twice");
}

#[test]
fn an_export_can_listen_at_an_inherited_socket() {
    let place = Place::new();
    let listener = UnixListener::bind(place.join("vm.sock")).expect("there is room for tests");
    let number = listener.as_raw_fd();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).expect("it is open");
    let mut command = stonework(["daemon", "--blockdev", "null-co,node-name=d,size=1048576"]);
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str={number}"
    ));
    let daemon = Daemon::spawn(command);
    let frontend = Frontend::connect(&place.join("vm.sock"));
    assert_eq!(frontend.config().capacity_sectors, 2048);
    drop(frontend);
    daemon.stop();
    // Who made it removes it.
    assert!(place.join("vm.sock").exists());
}

#[test]
fn the_manual_has_a_page_for_each_command() {
    let place = Place::new();
    let written = run(stonework(["man", text(place.path())]));
    assert_eq!(written.code, Some(0), "{written:?}");
    for page in [
        "stonework",
        "stonework-serve",
        "stonework-ctl-node-resize",
        "stonework-img-convert",
    ] {
        let page = fs::read_to_string(place.join(&format!("{page}.1"))).expect("it is there");
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
    }
}

#[test]
fn a_shell_completes_names_that_the_daemon_has() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let control = place.join("qmp");
    let daemon = Daemon::serve(
        &disk,
        &place.join("vm.sock"),
        &["--control", text(&control)],
    );
    let mut command = stonework(["--", "stonework", "ctl", "node", "show", "d"]);
    command
        .env("COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "4")
        .env("_CLAP_IFS", "\n")
        .env("STONEWORK_SOCKET", &control);
    let completed = run(command);
    assert_eq!(
        (completed.code, completed.output.trim()),
        (Some(0), "disk"),
        "{completed:?}"
    );
    daemon.stop();
    assert!(!control.exists());
}

#[test]
fn a_request_that_takes_long_is_named_with_its_image_and_place() {
    let place = Place::new();
    let node =
        "blkdebug,node-name=d,image.driver=null-co,image.size=1048576,image.latency-ns=1500000000";
    let export = format!(
        "vhost-user-blk,id=slow,node-name=d,addr.type=unix,addr.path={}",
        text(&place.join("vm.sock"))
    );
    let daemon = Daemon::spawn(stonework([
        "daemon",
        "--slow-request-ms",
        "200",
        "--blockdev",
        node,
        "--export",
        &export,
    ]));
    eventually("it listens", || place.join("vm.sock").exists());
    let mut frontend = Frontend::connect(&place.join("vm.sock"));
    let mut ring = frontend.start_queue(0, 16);
    drop(frontend.read(&mut ring, 24, 4096));
    drop(frontend);
    let said = daemon.errors();
    daemon.stop();
    let named: Vec<_> = said
        .lines()
        .filter(|line| line.contains("takes long"))
        .collect();
    assert_eq!(named.len(), 1, "{said}");
    for word in ["slow", "offset=12288", "bytes=4096", "Read", "in flight"] {
        assert!(named[0].contains(word), "{word}: {said}");
    }
}
