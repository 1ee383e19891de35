//! The socket and what may be in its place.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use harness::daemon::{Daemon, Place, run, serve};
use harness::frontend::Frontend;

use crate::{MIB, SECTOR, says, serves, text};

#[test]
fn a_socket_in_use_is_refused_and_its_owner_goes_on() {
    let place = Place::new();
    let socket = place.join("vm.sock");
    let first = Daemon::serve(&place.sparse("a.raw", MIB), &socket, &[]);
    let inode = fs::metadata(&socket).expect("it is there").ino();
    let second = place.sparse("b.raw", MIB);
    // With a front-end and without one.
    let refusal = run(serve(&second, &socket, &[]));
    says(&refusal, 1, &[text(&socket), "another process listens"]);
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 64);
    let refusal = run(serve(&second, &socket, &[]));
    says(&refusal, 1, &[text(&socket), "another process listens"]);
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
