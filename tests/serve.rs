//! The command line of `stonework serve`: what it says, what it refuses, how it ends.
//!
//! Every refusal is one line on stderr that names what was refused and why, and a status: 1 for
//! what is wrong with the world, 2 for what is wrong with the command line. None costs data.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use harness::daemon::{Daemon, Place, Refusal, eventually, run, serve, stonework, stonework_path};
use harness::frontend::blk::{self, Request};
use harness::frontend::{Frontend, LIMIT};
use rustix::process::Signal;

const SECTOR: usize = 512;
const MIB: u64 = 1 << 20;

/// Checks a refusal's form and that it says each of these words.
#[track_caller]
fn says(refusal: &Refusal, status: i32, words: &[&str]) {
    assert_eq!(refusal.code, Some(status), "{refusal:?}");
    let lines: Vec<&str> = refusal.errors.lines().collect();
    assert_eq!(lines.len(), 1, "not one line: {refusal:?}");
    assert!(lines[0].starts_with("stonework: "), "{refusal:?}");
    let line = lines[0].to_lowercase();
    for word in words {
        assert!(
            line.contains(&word.to_lowercase()),
            "does not say '{word}': {refusal:?}"
        );
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are text")
}

/// Reads and writes a sector of a served disk.
#[track_caller]
fn serves(socket: &Path) {
    let mut frontend = Frontend::connect(socket);
    let mut ring = frontend.start_queue(0, 64);
    let data = frontend.read(&mut ring, 0, SECTOR);
    frontend.write(&mut ring, 0, &data);
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The same command as somebody without rights; the executable is where they can reach it.
fn without_rights(place: &Place, args: &[&str]) -> Command {
    if !is_root() {
        return stonework(args);
    }
    let binary = place.join("stonework");
    fs::copy(stonework_path(), &binary).expect("the executable can be copied");
    for path in [place.path(), &binary] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(binary)
        .args(args);
    command
}

// --- how it begins and ends --------------------------------------------------------------------

#[test]
fn help_names_every_option_and_ends_well() {
    let help = run(stonework(["serve", "--help"]));
    assert_eq!(help.code, Some(0), "{help:?}");
    for option in [
        "--socket",
        "--format",
        "--read-only",
        "--cache",
        "--queues",
        "--workers",
        "--cpus",
        "--poll-max-us",
        "--engine",
        "--serial",
        "--block-size",
        "--create",
    ] {
        assert!(help.output.contains(option), "{option}: {}", help.output);
    }
    let help = run(stonework(["--help"]));
    assert_eq!(help.code, Some(0), "{help:?}");
    assert!(help.output.contains("serve"), "{}", help.output);
}

#[test]
fn it_says_what_it_serves_and_how_to_attach_it() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(&disk, &socket, &[]);
    eventually("it has said all", || {
        let said = daemon.output();
        said.contains(text(&disk))
            && said.contains(text(&socket))
            && said.contains("vhost-user-blk-pci")
            && said.contains("vhost_user=")
    });
    daemon.stop();
}

#[test]
fn each_signal_to_end_ends_it_well_and_takes_the_socket_away() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let place = Place::new();
        let disk = place.sparse("disk.raw", MIB);
        let socket = place.join("vm.sock");
        let mut daemon = Daemon::serve(&disk, &socket, &[]);
        serves(&socket);
        daemon.signal(signal);
        let status = daemon.wait();
        assert!(status.success(), "{signal:?}: {status}");
        assert!(!socket.exists(), "{signal:?}: the socket is still there");
    }
}

#[test]
fn ending_with_a_front_end_and_requests_in_flight_loses_nothing_completed() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", 64 * MIB);
    let socket = place.join("vm.sock");
    let mut daemon = Daemon::serve(&disk, &socket, &[]);
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 256);
    let data = vec![0x5e; 128 * SECTOR];
    let pending: Vec<_> = (0..64)
        .map(|number| frontend.submit(&mut ring, &Request::write(128 * number, &data)))
        .collect();
    daemon.signal(Signal::TERM);
    let status = daemon.wait();
    assert!(status.success(), "{status}");
    assert!(frontend.connection.closes_within(LIMIT));

    let bytes = fs::read(&disk).expect("the image can be read");
    while let Some(used) = ring.try_pop() {
        let number = pending
            .iter()
            .position(|pending| u32::from(pending.head) == used.head)
            .expect("it was in flight");
        assert_eq!(frontend.outcome(&pending[number], used).status, blk::OK);
        let at = number * data.len();
        assert!(bytes[at..at + data.len()] == data, "request {number}");
    }
}

#[test]
fn completed_writes_survive_the_process() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(&disk, &socket, &[]);
    {
        let mut frontend = Frontend::connect(&socket);
        let mut ring = frontend.start_queue(0, 64);
        frontend.write(&mut ring, 7, &[0x99; SECTOR]);
    }
    daemon.kill();
    assert!(fs::read(&disk).expect("the image is there")[7 * SECTOR..][..SECTOR] == [0x99; SECTOR]);
    // The socket of the killed one is in the way, and is replaced.
    assert!(socket.exists());
    let daemon = Daemon::serve(&disk, &socket, &[]);
    serves(&socket);
    daemon.stop();
}

// --- the command line --------------------------------------------------------------------------

#[test]
fn bad_option_values_are_usage_errors() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    for options in [
        &["--cache", "fast"][..],
        &["--queues", "0"],
        &["--queues", "many"],
        &["--queues", "70000"],
        &["--queues", "-1"],
        &["--workers", "0"],
        &["--workers", "none"],
        &["--cpus", "first"],
        &["--cpus", "3-1"],
        &["--cpus", ""],
        &["--poll-max-us", "soon"],
        &["--poll-max-us", "-5"],
        &["--engine", "steam"],
        &["--block-size", "0"],
        &["--block-size", "513"],
        &["--block-size", "256"],
        &["--block-size", "large"],
        &["--create", "12Q"],
        &["--create", "big"],
        &["--create", "-1"],
        &["--no-such-option"],
    ] {
        let refusal = run(serve(&disk, &socket, options));
        assert_eq!(refusal.code, Some(2), "{options:?}: {refusal:?}");
        assert!(!refusal.errors.is_empty(), "{options:?}");
        assert!(!socket.exists(), "{options:?}");
    }
    let path = text(&disk);
    for args in [
        &["serve"][..],
        &["serve", path],
        &["serve", "--socket", text(&socket)],
        &["sevre", path],
        &[],
    ] {
        let refusal = run(stonework(args));
        assert_eq!(refusal.code, Some(2), "{args:?}: {refusal:?}");
        assert!(!refusal.errors.is_empty(), "{args:?}");
    }
}

#[test]
fn an_unknown_format_is_refused_by_name() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let refusal = run(serve(&disk, &place.join("s"), &["--format", "qcow9"]));
    assert!(matches!(refusal.code, Some(1 | 2)), "{refusal:?}");
    assert!(refusal.errors.contains("qcow9"), "{refusal:?}");
    assert!(refusal.errors.contains("raw"), "{refusal:?}");
}

// --- the image ---------------------------------------------------------------------------------

#[test]
fn a_missing_file_is_refused_and_not_made() {
    let place = Place::new();
    let disk = place.join("none.raw");
    let refusal = run(serve(&disk, &place.join("vm.sock"), &[]));
    says(&refusal, 1, &[text(&disk), "no such file"]);
    assert!(!disk.exists());
    assert!(!place.join("vm.sock").exists());
}

#[test]
fn a_directory_is_refused() {
    let place = Place::new();
    let disk = place.join("dir");
    fs::create_dir(&disk).expect("a directory can be made");
    for options in [&[][..], &["--read-only"]] {
        let refusal = run(serve(&disk, &place.join("vm.sock"), options));
        says(&refusal, 1, &[text(&disk), "directory"]);
    }
}

#[test]
fn a_device_or_pipe_that_is_no_disk_is_refused() {
    let place = Place::new();
    let refusal = run(serve(Path::new("/dev/null"), &place.join("vm.sock"), &[]));
    says(&refusal, 1, &["/dev/null"]);
    let pipe = place.join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).expect("no pipe");
    let refusal = run(serve(&pipe, &place.join("vm.sock"), &[]));
    says(&refusal, 1, &[text(&pipe)]);
}

#[test]
fn a_file_without_permission_is_refused() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o000)).expect("it is ours");
    // The socket's place is not the question here.
    let sockets = Place::new();
    fs::set_permissions(sockets.path(), fs::Permissions::from_mode(0o777)).expect("it is ours");
    let socket = sockets.join("vm.sock");
    let args = [
        "serve",
        text(&disk),
        "--format",
        "raw",
        "--socket",
        text(&socket),
    ];
    let refusal = run(without_rights(&place, &args));
    says(&refusal, 1, &[text(&disk), "permission denied"]);
    assert!(!socket.exists());
}

#[test]
fn a_read_only_file_is_served_read_only_or_not_at_all() {
    let place = Place::new();
    let disk = place.file("disk.raw", &[0x31; 4096]);
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o444)).expect("it is ours");
    let sockets = Place::new();
    fs::set_permissions(sockets.path(), fs::Permissions::from_mode(0o777)).expect("it is ours");
    let socket = sockets.join("vm.sock");
    let mut args = vec![
        "serve",
        text(&disk),
        "--format",
        "raw",
        "--socket",
        text(&socket),
    ];
    let refusal = run(without_rights(&place, &args));
    says(&refusal, 1, &[text(&disk), "--read-only"]);

    args.push("--read-only");
    let daemon = Daemon::start_announced(without_rights(&place, &args));
    let mut frontend = Frontend::connect(&socket);
    assert!(frontend.has(blk::feature::RO));
    let mut ring = frontend.start_queue(0, 64);
    assert_eq!(frontend.read(&mut ring, 1, SECTOR), [0x31; SECTOR]);
    let status = frontend.status(&mut ring, &Request::write(1, &[0; SECTOR]));
    assert_eq!(status, blk::IOERR);
    drop(frontend);
    daemon.stop();
    assert!(fs::read(&disk).expect("it is there") == [0x31; 4096]);
}

#[test]
fn a_size_that_is_no_multiple_of_512_is_refused() {
    let place = Place::new();
    for bytes in [1, 511, 513, 1_000_000] {
        let disk = place.file("disk.raw", &vec![0x44; bytes]);
        let refusal = run(serve(&disk, &place.join("vm.sock"), &[]));
        says(&refusal, 1, &[text(&disk), "512", &bytes.to_string()]);
        assert!(fs::read(&disk).expect("it is there") == vec![0x44; bytes]);
    }
}

#[test]
fn a_size_that_is_no_multiple_of_the_block_size_is_refused() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB + 512);
    let refusal = run(serve(
        &disk,
        &place.join("vm.sock"),
        &["--block-size", "4096"],
    ));
    says(&refusal, 1, &[text(&disk), "4096"]);
    let daemon = Daemon::serve(&disk, &place.join("vm.sock"), &[]);
    serves(&place.join("vm.sock"));
    daemon.stop();
}

/// How images of formats that are not raw begin: name, offset, bytes.
const MAGICS: &[(&str, usize, &[u8])] = &[
    ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile\n"),
    ("vdi", 0x40, &[0x7f, 0x10, 0xda, 0xbe]),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
];

#[test]
fn a_file_that_begins_like_a_format_is_not_guessed_at() {
    for &(format, offset, magic) in MAGICS {
        let place = Place::new();
        let mut bytes = vec![0; 1 << 16];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        let disk = place.file("disk.img", &bytes);
        let socket = place.join("vm.sock");
        let args = ["serve", text(&disk), "--socket", text(&socket)];
        // Both ways out are commands to copy.
        let as_format = format!("--format {format}");
        let refusal = run(stonework(args));
        says(&refusal, 1, &[text(&disk), "--format raw", &as_format]);
        assert!(!socket.exists(), "{format}");

        let daemon = Daemon::serve(&disk, &socket, &["--format", "raw"]);
        let mut frontend = Frontend::connect(&socket);
        let mut ring = frontend.start_queue(0, 64);
        assert!(frontend.read(&mut ring, 0, SECTOR) == bytes[..SECTOR]);
        drop(frontend);
        daemon.stop();
        assert!(fs::read(&disk).expect("it is there") == bytes, "{format}");
    }
}

#[test]
fn an_image_that_another_program_made_is_not_guessed_at() {
    for format in ["qcow2", "vmdk", "vdi", "vhdx", "qed", "vpc"] {
        let place = Place::new();
        let disk = place.join("disk.img");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format, text(&disk), "8M"])
            .status()
            .expect("qemu-img is installed");
        assert!(made.success(), "{format}");
        let args = ["serve", text(&disk), "--socket", text(&place.join("s"))].map(str::to_owned);
        let refusal = run(stonework(args));
        let as_format = format!("--format {format}");
        says(&refusal, 1, &[text(&disk), "--format raw", &as_format]);
    }
}

#[test]
fn a_file_that_begins_like_nothing_is_raw() {
    let place = Place::new();
    for (name, content) in [("zeros", vec![0; 4096]), ("text", vec![b'#'; 4096])] {
        let disk = place.file(name, &content);
        let socket = place.join(&format!("{name}.sock"));
        let args = ["serve", text(&disk), "--socket", text(&socket)];
        let daemon = Daemon::start_announced(stonework(args));
        serves(&socket);
        daemon.stop();
    }
}

// --- image locks -------------------------------------------------------------------------------

/// A `qemu-io` that has a qcow2 image open and waits. (With a raw one, it lets others write.)
struct Holder(Child);

impl Holder {
    fn open(image: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is installed");
        let input = child.stdin.as_mut().expect("stdin is a pipe");
        input.write_all(b"read 0 512\n").expect("it listens");
        let mut line = String::new();
        let output = child.stdout.as_mut().expect("stdout is a pipe");
        BufReader::new(output)
            .read_line(&mut line)
            .expect("it answers");
        assert!(line.contains("read 512/512"), "{line}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_qemu_writes_is_refused_until_it_is_free() {
    let place = Place::new();
    let image = place.join("disk.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", text(&image), "1M"])
        .status()
        .expect("qemu-img is installed");
    assert!(made.success());
    let before = fs::read(&image).expect("it was made");
    let socket = place.join("vm.sock");
    let holder = Holder::open(&image);
    for options in [&[][..], &["--read-only"]] {
        let refusal = run(serve(&image, &socket, options));
        says(&refusal, 1, &[text(&image), "lock"]);
        assert!(!socket.exists());
    }
    assert!(fs::read(&image).expect("it is there") == before);
    drop(holder);
    let daemon = Daemon::serve(&image, &socket, &[]);
    serves(&socket);
    daemon.stop();
}

#[test]
fn an_image_that_the_daemon_serves_is_closed_to_qemu() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let copy = place.join("copy.raw");
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(&disk, &socket, &[]);
    for args in [
        &["qemu-io", "-f", "raw", text(&disk), "-c", "write 0 512"][..],
        &["qemu-img", "resize", "-f", "raw", text(&disk), "2M"],
        &["qemu-img", "create", "-f", "raw", text(&disk), "2M"],
        &["qemu-img", "convert", "-f", "raw", text(&disk), text(&copy)],
    ] {
        let output = Command::new(args[0])
            .args(&args[1..])
            .output()
            .expect("QEMU's tools are installed");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?}");
        assert!(errors.contains("lock"), "{args:?}: {errors}");
    }
    serves(&socket);
    daemon.stop();
    assert_eq!(fs::metadata(&disk).expect("it is there").len(), MIB);
    let free = Command::new("qemu-io")
        .args(["-f", "raw", text(&disk), "-c", "write 0 512"])
        .output()
        .expect("QEMU's tools are installed");
    assert!(free.status.success(), "{free:?}");
}

#[test]
fn two_daemons_do_not_write_one_image() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(&disk, &socket, &[]);
    for options in [&[][..], &["--read-only"]] {
        let refusal = run(serve(&disk, &place.join("second.sock"), options));
        says(&refusal, 1, &[text(&disk), "lock"]);
        assert!(!place.join("second.sock").exists());
    }
    // Under another name, it is the same file.
    let link = place.join("link.raw");
    fs::hard_link(&disk, &link).expect("a link can be made");
    let refusal = run(serve(&link, &place.join("second.sock"), &[]));
    says(&refusal, 1, &[text(&link), "lock"]);
    serves(&socket);
    daemon.stop();
}

#[test]
fn any_number_may_read_one_image() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let daemons: Vec<_> = (0..2)
        .map(|number| {
            let socket = place.join(&format!("{number}.sock"));
            let daemon = Daemon::serve(&disk, &socket, &["--read-only"]);
            let mut frontend = Frontend::connect(&socket);
            let mut ring = frontend.start_queue(0, 64);
            assert_eq!(frontend.read(&mut ring, 0, SECTOR), [0; SECTOR]);
            daemon
        })
        .collect();
    let refusal = run(serve(&disk, &place.join("writer.sock"), &[]));
    says(&refusal, 1, &[text(&disk), "lock"]);
    daemons.into_iter().for_each(Daemon::stop);
}

#[test]
fn the_lock_of_a_killed_daemon_is_free() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    Daemon::serve(&disk, &place.join("vm.sock"), &[]).kill();
    let daemon = Daemon::serve(&disk, &place.join("vm.sock"), &[]);
    serves(&place.join("vm.sock"));
    daemon.stop();
}

// --- the socket --------------------------------------------------------------------------------

#[test]
fn a_socket_in_use_is_refused_and_its_owner_goes_on() {
    let place = Place::new();
    let socket = place.join("vm.sock");
    let first = Daemon::serve(&place.sparse("a.raw", MIB), &socket, &[]);
    let inode = fs::metadata(&socket).expect("it is there").ino();
    let second = place.sparse("b.raw", MIB);
    // With a front-end and without one.
    let refusal = run(serve(&second, &socket, &[]));
    says(&refusal, 1, &[text(&socket), "in use"]);
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 64);
    let refusal = run(serve(&second, &socket, &[]));
    says(&refusal, 1, &[text(&socket), "in use"]);
    frontend.write(&mut ring, 3, &[3; SECTOR]);
    assert_eq!(frontend.read(&mut ring, 3, SECTOR), [3; SECTOR]);
    drop(frontend);
    assert_eq!(fs::metadata(&socket).expect("it is there").ino(), inode);
    serves(&socket);
    first.stop();
}

#[test]
fn a_stale_socket_is_replaced() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    drop(UnixListener::bind(&socket).expect("a socket can be made"));
    assert!(socket.exists());
    let daemon = Daemon::serve(&disk, &socket, &[]);
    serves(&socket);
    daemon.stop();
    assert!(!socket.exists());
}

#[test]
fn a_file_in_the_socket_s_place_is_kept() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let file = place.file("precious", b"data");
    let refusal = run(serve(&disk, &file, &[]));
    says(&refusal, 1, &[text(&file), "not a socket"]);
    assert_eq!(fs::read(&file).expect("it is there"), b"data");

    let dir = place.join("dir");
    fs::create_dir(&dir).expect("a directory can be made");
    let refusal = run(serve(&disk, &dir, &[]));
    says(&refusal, 1, &[text(&dir), "not a socket"]);
    assert!(dir.is_dir());

    // The disk itself, by a slip of the hand.
    let refusal = run(serve(&disk, &disk, &[]));
    says(&refusal, 1, &[text(&disk), "not a socket"]);
    assert_eq!(fs::metadata(&disk).expect("it is there").len(), MIB);
}

#[test]
fn a_socket_path_that_cannot_be_is_refused() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let nowhere = place.join("no/such/dir/vm.sock");
    let refusal = run(serve(&disk, &nowhere, &[]));
    says(&refusal, 1, &[text(&nowhere), "no such file"]);
    let long = place.join(&"x".repeat(120));
    let refusal = run(serve(&disk, &long, &[]));
    says(&refusal, 1, &["long"]);
    assert!(!long.exists());
}

#[test]
fn only_its_owner_may_attach_to_the_socket() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(&disk, &socket, &[]);
    let metadata = fs::metadata(&socket).expect("it is there");
    assert!(metadata.file_type().is_socket());
    let others = metadata.permissions().mode() & 0o002;
    assert_eq!(others, 0, "anybody may attach to the disk");
    daemon.stop();
}

// --- making an image ---------------------------------------------------------------------------

#[test]
fn create_makes_a_sparse_disk_and_serves_it() {
    let place = Place::new();
    for (size, bytes) in [
        ("1M", MIB),
        ("64K", 64 << 10),
        ("1G", 1 << 30),
        ("1048576", MIB),
    ] {
        let disk = place.join(&format!("{size}.raw"));
        let socket = place.join(&format!("{size}.sock"));
        let daemon = Daemon::serve(&disk, &socket, &["--create", size]);
        let metadata = fs::metadata(&disk).expect("it was made");
        assert_eq!(metadata.len(), bytes, "{size}");
        assert!(metadata.blocks() * 512 <= 64 << 10, "{size} is not sparse");
        let frontend = Frontend::connect(&socket);
        assert_eq!(frontend.config().capacity_sectors, bytes / 512);
        drop(frontend);
        serves(&socket);
        daemon.stop();
    }
}

#[test]
fn create_does_not_touch_what_is_there() {
    let place = Place::new();
    let disk = place.file("disk.raw", &[0x66; 4096]);
    let refusal = run(serve(&disk, &place.join("vm.sock"), &["--create", "1M"]));
    says(&refusal, 1, &[text(&disk), "exists"]);
    assert!(fs::read(&disk).expect("it is there") == [0x66; 4096]);
    // Nor what a link leads to, even if there is nothing yet.
    let link = place.join("link.raw");
    std::os::unix::fs::symlink(place.join("target.raw"), &link).expect("a link can be made");
    let refusal = run(serve(&link, &place.join("vm.sock"), &["--create", "1M"]));
    assert_eq!(refusal.code, Some(1), "{refusal:?}");
    assert!(!place.join("target.raw").exists());
}

#[test]
fn a_failed_creation_leaves_no_file() {
    let place = Place::new();
    let disk = place.join("disk.raw");
    // No file may grow beyond 1 MiB; the signal that comes with that is ignored.
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "sh"])
        .arg(stonework_path())
        .args(["serve", text(&disk), "--format", "raw"])
        .args(["--socket", text(&place.join("vm.sock")), "--create", "1G"]);
    let refusal = run(command);
    says(&refusal, 1, &[text(&disk)]);
    assert!(!disk.exists(), "half a disk is left");

    let refusal = run(serve(
        &place.join("no/such/dir.raw"),
        &place.join("vm.sock"),
        &["--create", "1M"],
    ));
    says(&refusal, 1, &["no/such/dir.raw", "no such file"]);

    let odd = place.join("odd.raw");
    let refusal = run(serve(&odd, &place.join("vm.sock"), &["--create", "1000"]));
    assert!(matches!(refusal.code, Some(1 | 2)), "{refusal:?}");
    assert!(refusal.errors.contains("512"), "{refusal:?}");
    assert!(!odd.exists());
}

// --- a full disk -------------------------------------------------------------------------------

/// A daemon that serves a sparse disk of 64 MiB on a file system of 8 MiB, mounted for it alone.
struct Cramped {
    daemon: Daemon,
    socket: PathBuf,
    _place: Place,
}

impl Cramped {
    fn new() -> Self {
        let place = Place::new();
        let mount = place.join("small");
        fs::create_dir(&mount).expect("a directory can be made");
        let socket = place.join("vm.sock");
        let script = format!(
            "mount -t tmpfs -o size=8m none {dir} && exec \"$0\" serve {dir}/disk.raw \
             --format raw --create 64M --socket {socket}",
            dir = text(&mount),
            socket = text(&socket)
        );
        let mut command = Command::new("unshare");
        command.arg("--mount");
        if !is_root() {
            command.arg("--map-root-user");
        }
        command.args(["sh", "-c", &script]).arg(stonework_path());
        Self {
            daemon: Daemon::start_announced(command),
            socket,
            _place: place,
        }
    }
}

#[test]
fn a_full_disk_fails_writes_and_loses_nothing() {
    let mut cramped = Cramped::new();
    let mut frontend = Frontend::connect(&cramped.socket);
    let mut ring = frontend.start_queue(0, 64);
    let block = |number: u64| vec![number as u8 + 1; 256 * SECTOR];
    let write = |number: u64| Request::write(256 * number, &block(number));
    let mut written = 0;
    let status = loop {
        let status = frontend.status(&mut ring, &write(written));
        if status != blk::OK {
            break status;
        }
        written += 1;
        assert!(written < 512, "the disk does not get full");
    };
    assert_eq!(status, blk::IOERR);
    assert!(written >= 32, "only {written} blocks fit");
    // The next ones fail, too, and what was completed is there.
    for number in written + 1..written + 5 {
        assert_eq!(frontend.status(&mut ring, &write(number)), blk::IOERR);
    }
    for number in 0..written {
        assert!(frontend.read(&mut ring, 256 * number, 256 * SECTOR) == block(number));
    }
    frontend.succeed(&mut ring, &Request::flush());
    // Room again, and it goes on.
    let room = blk::segment(0, 256 * 8, 0);
    frontend.succeed(&mut ring, &Request::discard(&[room]));
    for number in 0..4 {
        assert_eq!(
            frontend.status(&mut ring, &write(written + number)),
            blk::OK
        );
    }
    for number in 8..written + 4 {
        assert!(frontend.read(&mut ring, 256 * number, 256 * SECTOR) == block(number));
    }
    drop(frontend);
    cramped.daemon.assert_running();
    cramped.daemon.stop();
}

// --- options that change how it works ----------------------------------------------------------

#[test]
fn every_engine_and_number_of_workers_serves() {
    for options in [
        &["--engine", "threads"][..],
        &["--engine", "io_uring"],
        &["--engine", "auto"],
        &["--workers", "1"],
        &["--workers", "4", "--queues", "2"],
        &["--cpus", "0"],
        &["--cpus", "0-1", "--workers", "2"],
        &["--poll-max-us", "0"],
        &["--poll-max-us", "100"],
        &["--engine", "threads", "--cache", "none"],
        &["--engine", "threads", "--cache", "writethrough"],
        &[
            "--engine",
            "threads",
            "--workers",
            "2",
            "--poll-max-us",
            "0",
        ],
    ] {
        let place = Place::new();
        let disk = place.sparse("disk.raw", 16 * MIB);
        let socket = place.join("vm.sock");
        let daemon = Daemon::serve(&disk, &socket, options);
        {
            let mut frontend = Frontend::connect(&socket);
            let mut rings = [frontend.start_queue(0, 64), frontend.start_queue(1, 64)];
            for turn in 0..20_u64 {
                for ring in &mut rings {
                    let sector = 16 * turn + 8 * u64::from(ring.queue);
                    let data = [turn as u8 + 1; 8 * SECTOR];
                    frontend.write(ring, sector, &data);
                    assert!(
                        frontend.read(ring, sector, 8 * SECTOR) == data,
                        "{options:?}"
                    );
                }
            }
            let ring = &mut rings[0];
            frontend.succeed(ring, &Request::flush());
            let range = [blk::segment(0, 8, 0)];
            frontend.succeed(ring, &Request::discard(&range));
            frontend.succeed(ring, &Request::write_zeroes(&range));
            assert!(frontend.read(ring, 0, 8 * SECTOR) == [0; 8 * SECTOR]);
            let beyond = Request::read(32 << 10, SECTOR);
            assert_eq!(frontend.status(ring, &beyond), blk::IOERR, "{options:?}");
        }
        daemon.stop();
    }
}
