//! Making a file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;

use blockcore::engine::{EngineChoice, make};
use blockcore::io::IoContext;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use harness::daemon::{Place, eventually};
use harness::host::{Mount, skip};

use crate::{Disk, MIB, engines, file_options, places};

fn create(engine: EngineChoice, options: &str) -> Result<(), Error> {
    let context = IoContext::new(make(engine)?);
    let options = Options::parse(options, None)?;
    let make_file = formats::file::FILE.create.expect("files can be made");
    context.block_on(make_file(Rc::clone(&context), options))
}

fn occupied_bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("it is there").blocks() * 512
}

#[test]
fn preallocation_decides_what_a_new_file_occupies() {
    for engine in engines() {
        for place in places() {
            let path = place.join("disk.raw");
            // A length that is a multiple of nothing: a file may have any.
            for bytes in [3 * MIB, 3 * MIB + 777, 1, 0] {
                for (preallocation, least, most) in [
                    ("off", 0, 64 << 10),
                    ("falloc", bytes, bytes + MIB),
                    ("full", bytes, bytes + MIB),
                ] {
                    let options = format!(
                        "filename={},size={bytes},preallocation={preallocation}",
                        path.display()
                    );
                    create(engine, &options).expect("there is room");
                    let occupied = occupied_bytes(&path);
                    assert!(
                        (least..=most).contains(&occupied),
                        "{options} occupies {occupied}"
                    );
                    let disk = Disk::open(engine, &file_options(&path, "")).expect("it opens");
                    assert_eq!(disk.bytes(), bytes);
                    let data = disk.read(0, bytes as usize).expect("it can be read");
                    assert!(data.iter().all(|byte| *byte == 0), "{options}");
                    disk.close();
                    fs::remove_file(&path).expect("it is ours");
                }
            }
        }
    }
}

#[test]
fn what_a_file_system_does_not_know_of_is_only_a_wish() {
    let mut all = places();
    let memory = Mount::ramfs();
    if let Err(reason) = &memory {
        skip("creation where nothing can be reserved", reason);
    }
    let paths = all
        .iter_mut()
        .map(|place| place.join("disk.raw"))
        .chain(memory.iter().map(|mount| mount.join("disk.raw")));
    for path in paths {
        for more in [
            "nocow=on",
            "nocow=off",
            "extent-size-hint=0",
            "extent-size-hint=1M",
            "extent-size-hint=5",
            "extent-size-hint=100G",
            "nocow=on,extent-size-hint=64k,preallocation=full",
        ] {
            let options = format!("filename={},size=1M,{more}", path.display());
            create(EngineChoice::Threads, &options).expect("a wish is no demand");
            assert!(fs::read(&path).expect("it was made") == vec![0; MIB as usize]);
            fs::remove_file(&path).expect("it is ours");
        }
    }
}

#[test]
fn a_creation_that_the_host_refuses_leaves_no_file_and_no_lost_space() {
    let mount = match Mount::tmpfs(4 * MIB) {
        Ok(mount) => mount,
        Err(reason) => return skip("creation on a full file system", &reason),
    };
    let path = mount.join("disk.raw");
    for engine in engines() {
        for (more, kind) in [
            ("size=64M,preallocation=falloc", ErrorKind::NoSpace),
            ("size=64M,preallocation=full", ErrorKind::NoSpace),
        ] {
            let options = format!("filename={},{more}", path.display());
            let error = create(engine, &options).unwrap_err();
            assert_eq!(error.kind(), kind, "{options}: {}", error.report());
            assert!(error.report().contains("disk.raw"), "{}", error.report());
            assert!(!path.exists(), "{options}");
        }
        // All of it is there again, once no process that another test is starting shares the file.
        let options = format!("filename={},size=3M,preallocation=full", path.display());
        eventually("it fits", || create(engine, &options).is_ok());
        fs::remove_file(&path).expect("it is ours");
    }
}

#[test]
fn space_that_a_file_system_cannot_reserve_is_refused_and_leaves_no_file() {
    let mount = match Mount::ramfs() {
        Ok(mount) => mount,
        Err(reason) => return skip("creation where nothing can be reserved", &reason),
    };
    let path = mount.join("disk.raw");
    let options = format!("filename={},size=1M,preallocation=falloc", path.display());
    let error = create(EngineChoice::Threads, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", error.report());
    assert!(!path.exists());
    let options = format!("filename={},size=1M,preallocation=full", path.display());
    create(EngineChoice::Threads, &options).expect("zeroes can be written anywhere");
}

#[test]
fn a_creation_with_wrong_options_leaves_no_file() {
    let place = Place::new();
    let path = place.join("disk.raw");
    for (options, kind, word) in [
        ("size=-1", ErrorKind::Invalid, "size"),
        ("size=lots", ErrorKind::Invalid, "size"),
        ("size=9E", ErrorKind::Invalid, "no file can be that long"),
        ("size=17E", ErrorKind::Invalid, "size"),
        // Longer than a file can be on ext4, xfs and tmpfs with small pages.
        ("size=9223372036854775807", ErrorKind::NoSpace, "disk.raw"),
        ("nocow=on", ErrorKind::Invalid, "size"),
        (
            "size=1M,preallocation=metadata",
            ErrorKind::Invalid,
            "off, falloc, full",
        ),
        ("size=1M,nocow=perhaps", ErrorKind::Invalid, "nocow"),
        ("size=1M,colour=red", ErrorKind::Invalid, "colour"),
    ] {
        let options = format!("filename={},{options}", path.display());
        let error = create(EngineChoice::Threads, &options).unwrap_err();
        assert_eq!(error.kind(), kind, "{options}: {}", error.report());
        assert!(error.report().contains(word), "{}", error.report());
        assert!(!path.exists(), "{options}");
    }
    let error = create(EngineChoice::Threads, "size=1M").unwrap_err();
    assert!(error.report().contains("filename"), "{}", error.report());
}

#[test]
fn a_file_that_exists_is_left_as_it_is() {
    let place = Place::new();
    let path = place.file("disk.raw", &[0x77; 8192]);
    let before = fs::metadata(&path).expect("it is there");
    for engine in engines() {
        for preallocation in ["off", "falloc", "full"] {
            let options = format!(
                "filename={},size=1M,nocow=on,preallocation={preallocation}",
                path.display()
            );
            let error = create(engine, &options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Exists, "{}", error.report());
        }
    }
    let after = fs::metadata(&path).expect("it is there");
    assert_eq!(
        (before.ino(), before.mtime_nsec()),
        (after.ino(), after.mtime_nsec())
    );
    assert!(fs::read(&path).expect("it is there") == [0x77; 8192]);
}
