//! Disks that get another length.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use std::rc::Rc;
use std::sync::Arc;

use blockcore::driver::{
    Driver, DriverIo, DriverType, Opened, Preallocation, TruncateFlags, WriteFlags, ZeroFlags,
};
use blockcore::engine::EngineChoice;
use blockcore::graph::RootSpec;
use blockcore::graph::permission::Permissions;
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture};
use blockcore::options::Options;
use blockcore::{Error, IoError};
use harness::host::{LoopDevice, Mount, skip};

use crate::{Disk, MIB, engines, file_options, places};

const NONE: TruncateFlags = TruncateFlags::empty();

/// Opens a node for somebody who changes its length.
fn open(engine: EngineChoice, options: &str) -> Disk {
    let mut spec = RootSpec::writer("a test").in_units_of(512);
    spec.needs |= Permissions::RESIZE;
    Disk::open_for(engine, options, spec).expect("it opens")
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).expect("it is there").len()
}

#[test]
fn a_file_gets_longer_with_the_space_that_is_asked_for_and_reads_as_zeroes_there() {
    for engine in engines() {
        for place in places() {
            for direct in ["off", "on"] {
                for (preallocation, occupied) in [
                    (Preallocation::Off, 0..=64 << 10),
                    (Preallocation::Reserve, 2 * MIB..=3 * MIB),
                    (Preallocation::Full, 2 * MIB..=3 * MIB),
                ] {
                    let path = place.sparse("disk.raw", MIB);
                    let disk = open(
                        engine,
                        &file_options(&path, &format!(",cache.direct={direct}")),
                    );
                    disk.truncate(3 * MIB, true, preallocation, TruncateFlags::ZERO)
                        .expect("there is room");
                    assert_eq!((disk.bytes(), length(&path)), (3 * MIB, 3 * MIB));
                    let data = disk.read(0, 3 * MIB as usize).expect("a read");
                    assert!(data.iter().all(|byte| *byte == 0), "{preallocation:?}");
                    disk.flush().expect("a flush");
                    let now = fs::metadata(&path).expect("it is there").blocks() * 512;
                    assert!(occupied.contains(&now), "{preallocation:?}: {now}");
                    assert_eq!(disk.allocated_bytes(), Some(now));
                    disk.write(3 * MIB - 4096, &[1; 4096]).expect("inside now");
                    // And back: what is cut off is gone.
                    disk.truncate(MIB / 2, true, Preallocation::Off, NONE)
                        .expect("it shrinks");
                    assert_eq!((disk.bytes(), length(&path)), (MIB / 2, MIB / 2));
                    let refused = disk.truncate(MIB / 4, true, Preallocation::Full, NONE);
                    assert_eq!(refused, Err(IoError::OutOfRange));
                    assert_eq!(disk.read(MIB / 2, 512), Err(IoError::OutOfRange));
                    disk.close();
                }
            }
        }
    }
}

#[test]
fn what_somebody_else_put_behind_the_end_does_not_shine_through() {
    for engine in engines() {
        for place in places() {
            let path = place.sparse("disk.raw", MIB);
            let disk = open(engine, &file_options(&path, ""));
            fs::write(&path, vec![9; 2 * MIB as usize]).expect("it is ours");
            disk.truncate(3 * MIB, true, Preallocation::Off, TruncateFlags::ZERO)
                .expect("there is room");
            assert!(disk.read(0, 4096).expect("a read") == [9; 4096]);
            let added = disk.read(MIB, 2 * MIB as usize).expect("a read");
            assert!(added.iter().all(|byte| *byte == 0));
            disk.close();
        }
    }
}

/// What the operator would have seen: a resize that failed, and a disk that is longer all the same.
#[test]
fn a_file_that_cannot_get_longer_is_as_long_as_before() {
    for engine in engines() {
        let mount = match Mount::tmpfs(4 * MIB) {
            Ok(mount) => mount,
            Err(reason) => return skip("growing on a full file system", &reason),
        };
        let path = mount.sparse("disk.raw", MIB);
        let disk = open(engine, &file_options(&path, ""));
        for preallocation in [Preallocation::Reserve, Preallocation::Full] {
            let refused = disk.truncate(16 * MIB, true, preallocation, NONE);
            assert_eq!(refused, Err(IoError::NoSpace), "{preallocation:?}");
            assert_eq!((disk.bytes(), length(&path)), (MIB, MIB));
        }
        let refused = disk.truncate(2 * MIB, true, Preallocation::Metadata, NONE);
        assert_eq!(refused, Err(IoError::Unsupported));
        assert_eq!((disk.bytes(), length(&path)), (MIB, MIB));
        disk.truncate(3 * MIB, true, Preallocation::Full, NONE)
            .expect("the space came back");
        disk.close();
        let mount = match Mount::ramfs() {
            Ok(mount) => mount,
            Err(reason) => return skip("growing where nothing can be reserved", &reason),
        };
        let path = mount.sparse("disk.raw", MIB);
        let disk = open(engine, &file_options(&path, ""));
        let refused = disk.truncate(2 * MIB, true, Preallocation::Reserve, NONE);
        assert_eq!(refused, Err(IoError::Unsupported));
        assert_eq!((disk.bytes(), length(&path)), (MIB, MIB));
        disk.close();
    }
}

#[test]
fn direct_io_has_any_length_and_a_little_more_where_that_will_do() {
    let mount = match Mount::ext4(64 * MIB, 4096) {
        Ok(mount) => mount,
        Err(reason) => return skip("lengths on coarse blocks", &reason),
    };
    let path = mount.sparse("disk.raw", MIB);
    let disk = open(
        EngineChoice::Threads,
        &file_options(&path, ",cache.direct=on"),
    );
    disk.truncate(MIB + 512, false, Preallocation::Off, NONE)
        .expect("at least so long");
    assert_eq!((disk.bytes(), length(&path)), (MIB + 4096, MIB + 4096));
    disk.write(MIB, &[0x56; 1024]).expect("a write");
    for (bytes, preallocation) in [
        (MIB + 512, Preallocation::Off),
        (MIB + 1536, Preallocation::Full),
        (2 * MIB + 512, Preallocation::Reserve),
        (3 * MIB + 512, Preallocation::Full),
    ] {
        disk.truncate(bytes, true, preallocation, TruncateFlags::ZERO)
            .expect("there is room");
        assert_eq!((disk.bytes(), length(&path)), (bytes, bytes));
        let data = disk.read(MIB, (bytes - MIB) as usize).expect("a read");
        assert!(data[..512] == [0x56; 512] && data[512..].iter().all(|byte| *byte == 0));
    }
    // A part of the last unit, with what follows it.
    disk.write(3 * MIB, &[0x78; 512]).expect("a write");
    assert!(disk.read(3 * MIB, 512).expect("a read") == [0x78; 512]);
    disk.close();
}

#[test]
fn a_device_keeps_its_length() {
    for engine in engines() {
        let device = match LoopDevice::new(MIB, 512) {
            Ok(device) => device,
            Err(reason) => return skip("the length of a device", &reason),
        };
        let disk = open(
            engine,
            &format!("host_device,filename={}", device.path().display()),
        );
        let off = Preallocation::Off;
        for (bytes, exact, result) in [
            (MIB, true, Ok(())),
            (MIB / 2, false, Ok(())),
            (MIB / 2, true, Err(IoError::Unsupported)),
            (2 * MIB, true, Err(IoError::Unsupported)),
            (2 * MIB, false, Err(IoError::Unsupported)),
        ] {
            assert_eq!(
                disk.truncate(bytes, exact, off, NONE),
                result,
                "{bytes} {exact}"
            );
            assert_eq!(disk.bytes(), MIB);
        }
        disk.close();
    }
}

#[test]
fn who_may_not_change_the_length_does_not() {
    for place in places() {
        let path = place.sparse("disk.raw", MIB);
        let disk = Disk::open(EngineChoice::Threads, &file_options(&path, "")).expect("it opens");
        let refused = disk.truncate(2 * MIB, true, Preallocation::Off, NONE);
        assert_eq!((refused, length(&path)), (Err(IoError::ReadOnly), MIB));
        disk.close();
    }
}

/// A format as far as it makes its file longer by what it writes: a disk of a fixed length, of which the
/// file has the beginning.
pub(crate) static WINDOW: DriverType = DriverType {
    name: "window",
    about: "a test",
    open: |_| {
        let opened = Opened {
            driver: Box::new(WindowDriver),
            io: Arc::new(Window),
        };
        Box::pin(async move { Ok(opened) })
    },
    ..DriverType::FORMAT
};

struct WindowDriver;

impl Driver for WindowDriver {}

struct Window;

impl DriverIo for Window {
    fn bytes(&self, _children: &[u64]) -> u64 {
        64 * MIB
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        Box::pin(io.child(0).read(offset, into))
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        Box::pin(io.child(0).write(offset, from, flags))
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(io.child(0).write_zeroes(offset, bytes, flags))
    }
}

/// What the guest would have seen: after any change of the graph, zeroes where it had written beyond
/// what had been the end of the file.
#[test]
fn a_file_that_a_format_makes_longer_stays_so_whatever_happens_to_the_graph() {
    for engine in engines() {
        let (places, memory) = (places(), Mount::ramfs());
        let mut all: Vec<_> = places.iter().map(|place| place.join("disk.raw")).collect();
        all.extend(memory.iter().map(|mount| mount.join("disk.raw")));
        for path in all {
            fs::write(&path, []).expect("it is ours");
            let disk = Disk::open(
                engine,
                &format!(
                    "window,discard=unmap,file.driver=file,file.node-name=leaf,file.filename={}",
                    path.display()
                ),
            )
            .expect("it opens");
            let is_long = |bytes: u64| {
                // Any change works lengths out anew.
                let control = disk.control.clone();
                let context = Rc::clone(control.context());
                let changed = context.block_on(async move {
                    let options = Options::parse("null-co,node-name=other", Some("driver"))?;
                    control.add(options).await?;
                    control.remove("other").await
                });
                changed.expect("it is added and taken out");
                let leaf = disk.control.read(|graph| {
                    let leaf = graph.node("leaf")?;
                    Ok::<_, Error>(leaf.bytes())
                });
                assert_eq!(leaf.expect("it is there"), bytes, "{}", path.display());
                assert_eq!(length(&path), bytes, "{}", path.display());
            };
            disk.write(MIB, &[1; 4096]).expect("a write");
            is_long(MIB + 4096);
            disk.zero(2 * MIB, 8192, ZeroFlags::empty())
                .expect("zeroes");
            is_long(2 * MIB + 8192);
            disk.zero(3 * MIB, 8192, ZeroFlags::MAY_UNMAP)
                .expect("zeroes");
            is_long(3 * MIB + 8192);
            // Partly behind the end.
            disk.write(3 * MIB + 4096, &[2; 8192]).expect("a write");
            disk.zero(3 * MIB + 8192, 16384, ZeroFlags::MAY_UNMAP)
                .expect("zeroes");
            is_long(3 * MIB + 24576);
            let data = disk.read(0, 4 * MIB as usize).expect("a read");
            let mut expected = vec![0; 4 * MIB as usize];
            expected[MIB as usize..][..4096].fill(1);
            expected[3 * MIB as usize + 4096..][..4096].fill(2);
            assert!(data == expected, "{}", path.display());
            disk.close();
        }
    }
}
