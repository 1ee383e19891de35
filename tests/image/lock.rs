//! Image locks: which bytes of the file, and for how long.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use blockcore::ErrorKind;
use blockcore::engine::EngineChoice;
use harness::daemon::Place;

use crate::{Disk, MIB, engines, file_options, locked_bytes};

/// QEMU's `block/file-posix` has byte 100 + n for permission n that is used, byte 200 + n for one that is
/// not shared: 0 consistent read, 1 write, 2 write unchanged, 3 resize.
#[test]
fn the_locked_bytes_are_those_of_qemu() {
    let place = Place::new();
    for engine in engines() {
        let path = place.sparse("disk.raw", MIB);
        assert_eq!(locked_bytes(&path), BTreeSet::new());
        for (more, bytes) in [
            ("", &[100, 101, 201][..]),
            (",locking=on", &[100, 101, 201]),
            (",read-only=on", &[100, 201]),
            (",locking=off", &[]),
        ] {
            let disk = Disk::open(engine, &file_options(&path, more)).expect("it opens");
            let expected = bytes.iter().copied().collect();
            assert_eq!(locked_bytes(&path), expected, "'{more}'");
            disk.close();
        }
    }
}

#[test]
fn one_writes_or_many_read() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    let open = |more: &str| Disk::open(EngineChoice::Threads, &file_options(&path, more));
    let readers = [open(",read-only=on"), open(",read-only=on")];
    let [one, two] = readers.map(|reader| reader.expect("readers share"));
    assert_eq!(open("").err().expect("it is read").kind(), ErrorKind::Busy);
    one.release();
    assert_eq!(open("").err().expect("it is read").kind(), ErrorKind::Busy);
    two.close();
    let writer = open("").expect("nobody is left");
    for more in ["", ",read-only=on", ",locking=on"] {
        let error = open(more).err().expect("it is written to");
        assert_eq!(error.kind(), ErrorKind::Busy, "'{more}'");
    }
    // What was refused has left nothing behind.
    assert_eq!(locked_bytes(&path), [100, 101, 201].into());
    // On an operator's word, anything goes.
    open(",locking=off").expect("it is not locked").release();
    writer.close();
    open("").expect("nobody is left").close();
}

/// What the operator would have seen: ten seconds of nothing, then a message that blames a process which
/// the host does not show, when both nodes were on one command line.
#[test]
fn a_lock_that_this_process_holds_itself_is_said_to_be_so_and_not_waited_for_long() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    let open = || Disk::open(EngineChoice::Threads, &file_options(&path, ""));
    let disk = open().expect("it opens");
    let began = Instant::now();
    let error = open().err().expect("it is in use").report();
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    assert!(error.contains("this process"), "{error}");
    disk.close();
}
