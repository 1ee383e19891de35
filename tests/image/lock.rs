//! Image locks: which bytes of the file, and for how long.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockcore::ErrorKind;
use blockcore::engine::EngineChoice;
use blockcore::graph::RootSpec;
use blockcore::graph::permission::Permissions;
use harness::daemon::{Place, eventually};
use harness::host::skip;

use crate::{Disk, MIB, SECTOR, engines, file_options, locked_bytes};

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

/// Whether `qemu-io` can do this to the image; `None` if there is none.
fn qemu_io(path: &Path, options: &[&str], command: &str) -> Option<bool> {
    let mut program = Command::new("qemu-io");
    program
        .args(["-f", "raw"])
        .args(options)
        .args(["-c", command]);
    let output = program.arg(path).output().ok()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let locked = errors.contains("lock");
    assert!(locked != output.status.success(), "{output:?}");
    Some(!locked)
}

#[test]
fn qemu_keeps_out_of_an_image_as_its_users_here_want_it() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    let all = Permissions::all();
    let sharing = |spec: RootSpec| RootSpec {
        shares: all,
        ..spec
    };
    let (reader, writer) = (RootSpec::reader("a test"), RootSpec::writer("a test"));
    for engine in engines() {
        for (spec, more, writes) in [
            (writer.clone(), "", false),
            (reader.clone(), ",read-only=on", false),
            (reader.clone(), ",read-only=on,force-share=on", true),
            (reader.clone(), ",locking=off", true),
            (sharing(reader.clone()), ",read-only=on", true),
            (sharing(writer.clone()), "", true),
        ] {
            let who = (spec.needs, spec.shares, more);
            let options = file_options(&path, more);
            let disk = Disk::open_for(engine, &options, spec).expect("it opens");
            let Some(read) = qemu_io(&path, &["-r"], "read 0 512") else {
                return skip("locks against QEMU's", "there is no qemu-io");
            };
            // All here share reading, and so does it share everything.
            assert!(read, "{who:?}");
            let wrote = qemu_io(&path, &[], "write 0 512");
            assert_eq!(wrote, Some(writes), "{who:?}");
            disk.read(0, SECTOR).expect("a read");
            disk.close();
        }
    }
}

/// A `qemu-io` that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(path: &Path, options: &[&str]) -> Option<Self> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(options).arg(path);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let child = command.spawn().ok()?;
        eventually("qemu-io has its locks", || {
            locked_bytes(path).contains(&100)
        });
        // Its first look for others is over when it takes commands.
        std::thread::sleep(Duration::from_millis(100));
        Some(Self(child))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let stdin = self.0.stdin.take();
        let asked = stdin.map(|mut stdin| stdin.write_all(b"quit\n"));
        let _ = (asked, self.0.wait());
    }
}

#[test]
fn an_image_that_qemu_has_open_is_used_as_far_as_qemu_shares_it() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    let (reader, writer) = (RootSpec::reader("a test"), RootSpec::writer("a test"));
    let sharing = RootSpec {
        shares: Permissions::all(),
        ..reader.clone()
    };
    for engine in engines() {
        for (qemu, spec, more, works) in [
            (&[][..], &writer, "", false),
            (&[], &reader, ",read-only=on", false),
            (&[], &reader, ",read-only=on,force-share=on", true),
            (&[], &sharing, ",read-only=on", true),
            (&[], &sharing, "", true),
            (&["-r"], &writer, "", true),
            (&["-r"], &reader, ",read-only=on", true),
        ] {
            let Some(holder) = Holder::new(&path, qemu) else {
                return skip("locks against QEMU's", "there is no qemu-io");
            };
            let case = (qemu, more);
            match Disk::open_for(engine, &file_options(&path, more), spec.clone()) {
                Ok(disk) => {
                    assert!(works, "{case:?}");
                    disk.read(0, SECTOR).expect("a read");
                    disk.release();
                }
                Err(error) => {
                    assert!(!works, "{case:?}: {}", error.report());
                    assert_eq!(error.kind(), ErrorKind::Busy, "{}", error.report());
                    assert!(error.report().contains("qemu-io"), "{}", error.report());
                }
            }
            drop(holder);
            eventually("the locks are gone", || locked_bytes(&path).is_empty());
        }
    }
}
