//! Driver `nbd` with others' servers: QEMU's, nbdkit with its filters, and our own.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::daemon::{eventually, stonework_path};
use serde_json::json;

use crate::setup::{Server, Which, run, tool};

/// A server of others'; killed when dropped.
pub(crate) struct Far(Child);

impl Far {
    /// Starts it, and waits until somebody listens.
    pub(crate) fn start(words: &[&str], socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(words[0]);
        let child = command.args(&words[1..]).stdin(Stdio::null()).spawn();
        let mut far = Self(child.unwrap());
        eventually("the server listens", || {
            let status = far.0.try_wait().unwrap();
            assert!(status.is_none(), "{words:?} ended: {status:?}");
            std::os::unix::net::UnixStream::connect(socket).is_ok()
        });
        far
    }

    /// `nbdkit` with these arguments.
    fn nbdkit(folder: &Path, arguments: &[&str]) -> (Self, String) {
        let socket = folder.join("far");
        let path = socket.to_str().unwrap();
        let words = [&["nbdkit", "-f", "-U", path], arguments].concat();
        let uri = format!("nbd+unix:///?socket={path}");
        (Self::start(&words, &socket), uri)
    }

    /// `qemu-nbd` of an image, as export `x`.
    fn qemu_nbd(folder: &Path, format: &str, image: &Path) -> (Self, String) {
        let socket = folder.join("far");
        let (path, image) = (socket.to_str().unwrap(), image.to_str().unwrap());
        let words = [
            "qemu-nbd", "-t", "-e", "8", "-x", "x", "-f", format, "-k", path, image,
        ];
        let uri = format!("nbd+unix:///x?socket={path}");
        (Self::start(&words, &socket), uri)
    }

    pub(crate) fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `stonework img`; whether it succeeds, and what it prints, errors too.
pub(crate) fn img(words: &[&str]) -> (bool, String) {
    let program = stonework_path();
    let words = [&[program.to_str().unwrap(), "img"], words].concat();
    let output = tool(&words).output().unwrap();
    let all = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&all).into_owned(),
    )
}

#[track_caller]
fn img_does(words: &[&str]) -> String {
    let (done, said) = img(words);
    assert!(done, "{words:?}: {said}");
    said
}

/// A file of changing bytes with holes.
fn pattern(path: &Path, bytes: usize) {
    let mut all = vec![0; bytes];
    for (place, block) in all.chunks_mut(65536).enumerate() {
        if place % 3 != 1 {
            block.fill(place as u8 | 1);
        }
    }
    std::fs::write(path, all).unwrap();
}

#[test]
fn an_image_is_looked_at_and_copied_to_and_from_qemus_server_as_qemu_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (image, source) = (folder.path().join("d.qcow2"), folder.path().join("source"));
    run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        image.to_str().unwrap(),
        "16M",
    ]);
    pattern(&source, 16 << 20);
    let (_far, uri) = Far::qemu_nbd(folder.path(), "qcow2", &image);
    img_does(&[
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        &path("source"),
        &uri,
    ]);
    run(&[
        "qemu-img",
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        &path("source"),
        &uri,
    ]);
    img_does(&["convert", "-f", "raw", "-O", "raw", &uri, &path("copy")]);
    assert!(std::fs::read(path("copy")).unwrap() == std::fs::read(&source).unwrap());
    img_does(&["compare", "-f", "raw", "-F", "raw", &path("source"), &uri]);
    let map = ["map", "-f", "raw", "--output=json", &uri];
    assert_eq!(img_does(&map), run(&[&["qemu-img"], &map[..]].concat()));
    let info = ["info", "--output=json", &uri];
    let ours: serde_json::Value = serde_json::from_str(&img_does(&info)).unwrap();
    let qemus = run(&[&["qemu-img"], &info[..]].concat());
    let qemus: serde_json::Value = serde_json::from_str(&qemus).unwrap();
    for name in ["filename", "format", "virtual-size"] {
        assert_eq!(ours[name], qemus[name], "{name}");
    }
}

#[test]
fn a_dirty_bitmap_is_told_as_block_status_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.qcow2");
    let path = path.to_str().unwrap();
    run(&["qemu-img", "create", "-q", "-f", "qcow2", path, "4M"]);
    run(&["qemu-img", "bitmap", "--add", path, "b"]);
    run(&["qemu-io", "-f", "qcow2", "-c", "write 1M 64K", path]);
    for which in [Which::Ours, Which::Qemus] {
        let server = Server::start(
            which,
            folder.path(),
            &[
                "--blockdev",
                "qcow2,node-name=d,read-only=on,file.driver=file,file.filename=FOLDER/d.qcow2",
                "--export",
                "nbd,id=e,node-name=d,bitmaps.0=b",
            ],
        );
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},export=d,x-dirty-bitmap=qemu:dirty-bitmap:",
            server.socket().display()
        );
        let map = |name: &str| {
            let options = format!("{options}{name}");
            ["map", "--output=json", "--image-opts", &options].map(str::to_owned)
        };
        let words = map("b");
        let words = words.each_ref().map(String::as_str);
        assert_eq!(
            img_does(&words),
            run(&[&["qemu-img"], &words[..]].concat()),
            "{which:?}"
        );
        let words = map("none");
        let (done, said) = img(&words.each_ref().map(String::as_str));
        assert!(
            !done && said.contains("x-dirty-bitmap qemu:dirty-bitmap:none not found"),
            "{said}"
        );
    }
}

#[test]
fn a_server_that_takes_certain_lengths_only_gets_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    pattern(&folder.path().join("source"), 8 << 20);
    let (_far, uri) = Far::nbdkit(
        folder.path(),
        &[
            "--filter=blocksize-policy",
            "memory",
            "8M",
            "blocksize-minimum=4096",
            "blocksize-preferred=8192",
            "blocksize-maximum=65536",
            "blocksize-error-policy=error",
        ],
    );
    img_does(&[
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        &path("source"),
        &uri,
    ]);
    img_does(&["compare", "-f", "raw", "-F", "raw", &path("source"), &uri]);
    // Parts of a block are written by reading the rest of it.
    let arguments = [
        "--blockdev",
        "nbd,node-name=f,server.type=unix,server.path=FOLDER/far",
        "--export",
        "nbd,id=e,node-name=f,writable=on",
    ];
    let server = Server::start(Which::Ours, folder.path(), &arguments);
    let here = server.uri("f");
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -P 9 100 5000",
        "-c",
        "read -P 9 100 5000",
        &here,
    ]);
    drop(server);
    let mut expected = std::fs::read(path("source")).unwrap();
    expected[100..5100].fill(9);
    let copy = path("copy");
    run(&["qemu-img", "convert", "-f", "raw", "-O", "raw", &uri, &copy]);
    assert!(std::fs::read(copy).unwrap() == expected);
}

#[test]
fn what_is_written_twice_is_the_same_and_flags_reach_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    pattern(&folder.path().join("source"), 8 << 20);
    {
        // Fails a write of anything but what is there.
        let file = path("source");
        let check = ["--filter=checkwrite", "file", &file];
        let (_far, uri) = Far::nbdkit(folder.path(), &check);
        img_does(&["convert", "-n", "-f", "raw", "-O", "raw", &file, &uri]);
        std::fs::write(path("other"), vec![0x55; 8 << 20]).unwrap();
        let (done, said) = img(&[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            &path("other"),
            &uri,
        ]);
        assert!(!done, "{said}");
    }
    let log = format!("logfile={}", path("log"));
    let (_far, _) = Far::nbdkit(folder.path(), &["--filter=log", "memory", "8M", &log]);
    let arguments = [
        "--blockdev",
        "nbd,node-name=f,discard=unmap,server.type=unix,server.path=FOLDER/far",
        "--export",
        "nbd,id=e,node-name=f,writable=on",
    ];
    let server = Server::start(Which::Ours, folder.path(), &arguments);
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-t",
        "none",
        "-d",
        "unmap",
        "-c",
        "write -f 0 4k",
        "-c",
        "write -z 64k 64k",
        "-c",
        "write -z -u 128k 64k",
        "-c",
        "discard 256k 64k",
        "-c",
        "flush",
        &server.uri("f"),
    ]);
    server.quit();
    let log = std::fs::read_to_string(path("log")).unwrap();
    for part in [
        "Write id=",
        "offset=0x0 count=0x1000 fua=1",
        "offset=0x10000 count=0x10000 trim=0",
        "offset=0x20000 count=0x10000 trim=1",
        "offset=0x40000 count=0x10000 fua=0",
        "Flush",
    ] {
        assert!(log.contains(part), "{part}: {log}");
    }
}

#[test]
fn errors_are_told_as_they_were_and_requests_do_not_wait_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        "--blockdev",
        "nbd,node-name=f,server.type=unix,server.path=FOLDER/far",
        "--export",
        "nbd,id=e,node-name=f,writable=on",
    ];
    for (error, said) in [
        ("ENOSPC", "No space left on device"),
        ("EIO", "Input/output error"),
    ] {
        let error = format!("error={error}");
        let fails = [
            "--filter=error",
            "memory",
            "1M",
            &error,
            "error-pwrite-rate=100%",
        ];
        let (_far, _) = Far::nbdkit(folder.path(), &fails);
        let server = Server::start(Which::Ours, folder.path(), &arguments);
        let uri = server.uri("f");
        let mut command = tool(&[
            "qemu-io",
            "-f",
            "raw",
            "-c",
            "write 0 4k",
            "-c",
            "read 0 4k",
            &uri,
        ]);
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(
            text.contains(said) && text.contains("read 4096/4096"),
            "{text}"
        );
    }
    let (_far, _) = Far::nbdkit(
        folder.path(),
        &["--filter=delay", "memory", "1M", "rdelay=100ms"],
    );
    let server = Server::start(Which::Ours, folder.path(), &arguments);
    let mut words = vec!["qemu-io".to_owned(), "-f".into(), "raw".into()];
    for place in 0..15 {
        words.extend(["-c".into(), format!("aio_read {}k 4k", place * 4)]);
    }
    words.extend(["-c".into(), "aio_flush".into(), server.uri("f")]);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let began = Instant::now();
    run(&words);
    let took = began.elapsed();
    assert!(
        took < Duration::from_millis(1000),
        "one after the other: {took:?}"
    );
}

/// Our server in front of a server far away.
const RELAY: [&str; 4] = [
    "--blockdev",
    "nbd,node-name=far,server.type=unix,server.path=FOLDER/far,export=x,reconnect-delay=30",
    "--export",
    "nbd,id=e,node-name=far,writable=on",
];

#[test]
fn a_far_side_that_is_killed_and_started_again_under_load_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("far.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let (mut far, _) = Far::qemu_nbd(folder.path(), "raw", &image);
    let server = Server::start(Which::Ours, folder.path(), &RELAY);
    let uri = format!("--uri={}", server.uri("far"));
    let mut load = tool(&[
        "fio",
        "--name=load",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bs=4k",
        "--iodepth=16",
        "--numjobs=2",
        "--size=24M",
        "--offset_increment=32M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--time_based",
        "--runtime=5",
    ])
    .stdout(Stdio::null())
    .spawn()
    .unwrap();
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(800));
        far.kill();
        std::thread::sleep(Duration::from_millis(150));
        (far, _) = Far::qemu_nbd(folder.path(), "raw", &image);
    }
    assert!(load.wait().unwrap().success());
    server.quit();
    far.kill();
}

#[test]
fn a_far_side_that_stays_away_fails_requests_after_the_delay_and_drained_sections_do_not_wait() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("far.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let (far, _) = Far::qemu_nbd(folder.path(), "raw", &image);
    let soon = RELAY[1].replace("reconnect-delay=30", "reconnect-delay=2");
    let mut server = Server::start(
        Which::Ours,
        folder.path(),
        &[
            "--blockdev",
            &soon.replace("node-name=far", "node-name=soon"),
            "--blockdev",
            RELAY[1],
            "--export",
            "nbd,id=e,node-name=soon,writable=on",
            "--export",
            "nbd,id=f,node-name=far",
        ],
    );
    for name in ["soon", "far"] {
        run(&[
            "qemu-io",
            "-f",
            "raw",
            "-r",
            "-c",
            "read 0 4k",
            &server.uri(name),
        ]);
    }
    far.kill();
    let began = Instant::now();
    let read = |uri: &str| {
        let mut command = tool(&["qemu-io", "-f", "raw", "-r", "-c", "read 0 4k", uri]);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let failed = read(&server.uri("soon")).wait_with_output().unwrap();
    let took = began.elapsed();
    let text = String::from_utf8_lossy(&failed.stdout).into_owned();
    assert!(text.contains("Input/output error"), "{text}");
    assert!(
        took >= Duration::from_millis(1900) && took < Duration::from_secs(20),
        "{took:?}"
    );
    // This one would wait for half a minute, and with it whoever changes the graph.
    let waiting = read(&server.uri("far"));
    eventually("the read is under way", || {
        let requests = server.ask("query-block-exports", json!({}));
        requests[1]["connected"] == true
    });
    std::thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    // A change of the node drains it. Then it is told that nothing can be flushed, which is not what is
    // looked at here.
    let reopen = json!({"options": [{"driver": "nbd", "node-name": "far", "export": "x",
        "server": {"type": "unix", "path": folder.path().join("far")},
        "reconnect-delay": 30, "read-only": true}]});
    let reply = server.call("blockdev-reopen", reopen);
    assert!(
        reply["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("cannot flush"),
        "{reply}"
    );
    let failed = waiting.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&failed.stdout).into_owned();
    assert!(text.contains("Input/output error"), "{text}");
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    // Once it is there again, all goes on.
    let (_far, _) = Far::qemu_nbd(folder.path(), "raw", &image);
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-r",
        "-c",
        "read 0 4k",
        &server.uri("far"),
    ]);
}

#[test]
fn what_cannot_be_opened_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let image = folder.path().join("far.raw");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let (far, uri) = Far::qemu_nbd(folder.path(), "raw", &image);
    let none = uri.replace("///x", "///none");
    let (done, said) = img(&["info", &none]);
    assert!(!done && said.contains("not available: 'none'"), "{said}");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},tls-creds=t",
        path("far")
    );
    let (done, said) = img(&["info", "--image-opts", &options]);
    assert!(
        !done && said.contains("No TLS credentials with id 't'"),
        "{said}"
    );
    let (done, said) = img(&["info", "nbds://localhost/x"]);
    assert!(!done && said.contains("nbds"), "{said}");
    far.kill();
    let (done, said) = img(&["info", &uri]);
    assert!(!done && said.contains("Failed to connect to"), "{said}");
    let (done, said) = img(&["info", "nbd://127.0.0.1:1/x"]);
    assert!(
        !done && said.contains("Failed to connect to '127.0.0.1:1'"),
        "{said}"
    );
    // A server that starts late is waited for.
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=x,open-timeout=20",
        path("far")
    );
    let program = stonework_path();
    let mut late = tool(&[
        program.to_str().unwrap(),
        "img",
        "info",
        "--image-opts",
        &options,
    ])
    .stdout(Stdio::null())
    .spawn()
    .unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(late.try_wait().unwrap().is_none());
    let (far, _) = Far::qemu_nbd(folder.path(), "raw", &image);
    assert!(late.wait().unwrap().success());
    // One that offers something else when it is back is another disk.
    let server = Server::start(
        Which::Ours,
        folder.path(),
        &[RELAY[0], &RELAY[1].replace("=30", "=3"), RELAY[2], RELAY[3]],
    );
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "read 0 4k",
        &server.uri("far"),
    ]);
    far.kill();
    std::fs::File::create(&image)
        .unwrap()
        .set_len(2 << 20)
        .unwrap();
    let (_far, _) = Far::qemu_nbd(folder.path(), "raw", &image);
    let mut command = tool(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "read 0 4k",
        &server.uri("far"),
    ]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("Input/output error"), "{text}");
}
