//! Making an image.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use harness::daemon::{Daemon, Place, run, serve, stonework_path};
use harness::frontend::Frontend;

use crate::{MIB, says, serves, text, without_rights};

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

/// What the operator would have seen: a refusal, and a second try refused since the file exists.
#[test]
fn a_creation_that_cannot_be_made_durable_leaves_no_file() {
    let place = Place::new();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let dir = place.join("drop");
    fs::create_dir(&dir).expect("a directory can be made");
    // Files can be made in it, but it cannot be opened, so not synced either.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o333)).expect("it is ours");
    let disk = dir.join("disk.raw");
    let socket = dir.join("vm.sock");
    for _ in 0..2 {
        let args = [
            "serve",
            text(&disk),
            "--socket",
            text(&socket),
            "--create",
            "1M",
        ];
        let refusal = run(without_rights(&place, &args));
        says(&refusal, 1, &[text(&disk), "permission denied"]);
        assert!(!disk.exists());
    }
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("it is ours");
}
