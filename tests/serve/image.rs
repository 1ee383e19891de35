//! Images that are not what they should be, and a host that is full.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use harness::daemon::{Daemon, Place, run, serve, stonework, stonework_path};
use harness::frontend::blk::{self, Request};
use harness::frontend::{Frontend, LIMIT};

use crate::{MIB, SECTOR, is_root, says, serves, text, without_rights};

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
        says(&refusal, 1, &["512", &bytes.to_string()]);
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
    says(&refusal, 1, &["4096"]);
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
fn a_full_disk_makes_writes_wait_and_loses_nothing() {
    let mut cramped = Cramped::new();
    let mut frontend = Frontend::connect(&cramped.socket);
    let mut ring = frontend.start_queue(0, 64);
    let mut other = frontend.start_queue(1, 64);
    let block = |number: u64| vec![number as u8 + 1; 256 * SECTOR];
    let write = |number: u64| Request::write(256 * number, &block(number));
    let mut written = 0;
    let first = loop {
        let pending = frontend.submit(&mut ring, &write(written));
        // The host answers much sooner.
        let Some(used) = ring.wait(Duration::from_secs(1)) else {
            break pending;
        };
        assert_eq!(frontend.outcome(&pending, used).status, blk::OK);
        written += 1;
        assert!(written < 512, "the disk does not get full");
    };
    assert!(written >= 32, "only {written} blocks fit");
    // The next ones wait, too, and what was completed is there.
    let mut waiting: BTreeMap<_, _> = [(u32::from(first.head), first)].into();
    for number in written + 1..written + 4 {
        let pending = frontend.submit(&mut ring, &write(number));
        waiting.insert(u32::from(pending.head), pending);
    }
    assert_eq!(ring.wait(Duration::from_millis(200)), None);
    for number in 0..written {
        assert!(frontend.read(&mut other, 256 * number, 256 * SECTOR) == block(number));
    }
    // Room again, and it goes on by itself; a flush waits for all of it.
    let room = blk::segment(0, 256 * 8, 0);
    let discard = frontend.submit(&mut ring, &Request::discard(&[room]));
    waiting.insert(u32::from(discard.head), discard);
    let flush = frontend.submit(&mut ring, &Request::flush());
    while !waiting.is_empty() {
        let used = ring.wait(LIMIT).expect("there is room for what waited");
        let pending = waiting.remove(&used.head).expect("the flush comes last");
        assert_eq!(frontend.outcome(&pending, used).status, blk::OK);
    }
    let used = ring.wait(LIMIT).expect("the flush has nothing to wait for");
    assert_eq!(frontend.outcome(&flush, used).status, blk::OK);
    for number in 8..written + 4 {
        assert!(frontend.read(&mut other, 256 * number, 256 * SECTOR) == block(number));
    }
    drop(frontend);
    cramped.daemon.assert_running();
    cramped.daemon.stop();
}
