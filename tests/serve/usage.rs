//! The command line itself.

use harness::daemon::{Place, run, serve, stonework};

use crate::{MIB, text};

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

#[test]
fn a_serial_of_more_than_twenty_bytes_is_refused_and_not_cut() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let serial = "abcdefghijklmnopqrstu";
    let refusal = run(serve(&disk, &place.join("s"), &["--serial", serial]));
    assert!(matches!(refusal.code, Some(1 | 2)), "{refusal:?}");
    for word in [serial, "20"] {
        assert!(refusal.errors.contains(word), "{refusal:?}");
    }
}
