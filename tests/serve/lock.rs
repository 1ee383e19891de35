//! Image locks, as QEMU knows them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use harness::daemon::{Daemon, Place, run, serve};
use harness::frontend::Frontend;

use crate::{MIB, SECTOR, says, serves, text};

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
    // As raw, its size has to be a whole number of sectors.
    fs::File::options()
        .write(true)
        .open(&image)
        .and_then(|file| file.set_len(MIB))
        .expect("it can grow");
    let before = fs::read(&image).expect("it was made");
    let socket = place.join("vm.sock");
    let holder = Holder::open(&image);
    for options in [&[][..], &["--read-only"]] {
        let refusal = run(serve(&image, &socket, options));
        says(&refusal, 1, &[text(&image), "in use"]);
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
        says(&refusal, 1, &[text(&disk), "in use"]);
        assert!(!place.join("second.sock").exists());
    }
    // Under another name, it is the same file.
    let link = place.join("link.raw");
    fs::hard_link(&disk, &link).expect("a link can be made");
    let refusal = run(serve(&link, &place.join("second.sock"), &[]));
    says(&refusal, 1, &[text(&link), "in use"]);
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
    says(&refusal, 1, &[text(&disk), "in use"]);
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
