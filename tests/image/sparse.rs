//! Discards and zeroes: what the host gives back, and what is done where it cannot.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blockcore::IoError;
use blockcore::driver::ZeroFlags;
use harness::host::{LoopDevice, Mount, skip};

use crate::{Disk, MIB, engines, file_options, places};

fn occupied_bytes(path: &Path) -> u64 {
    let file = fs::File::open(path).expect("it is there");
    // What a file occupies is settled when it is written back.
    file.sync_all().expect("it can be synced");
    file.metadata().expect("it is there").blocks() * 512
}

/// What a file occupies has changed by about so much: where its blocks are takes some as well.
#[track_caller]
fn gave_back(path: &Path, before: u64, bytes: u64) {
    let freed = before as i64 - occupied_bytes(path) as i64;
    let off = (freed - bytes as i64).abs();
    assert!(off <= 64 << 10, "{freed} bytes came back, not {bytes}");
}

fn full(disk: &Disk, bytes: u64) {
    disk.write(0, &vec![0x3c; bytes as usize]).expect("a write");
    disk.flush().expect("a flush");
}

/// The range reads as zeroes, and the bytes around it are as they were.
#[track_caller]
fn zero_only(disk: &Disk, begin: u64, end: u64) {
    let data = disk.read(0, disk.bytes() as usize).expect("a read");
    let wrong = (0..disk.bytes()).find(|at| {
        let should = if (begin..end).contains(at) { 0 } else { 0x3c };
        data[*at as usize] != should
    });
    assert_eq!(wrong, None, "zeroes from {begin} to {end}");
}

#[test]
fn a_discard_gives_space_back_if_it_may() {
    for engine in engines() {
        for place in places() {
            for (mode, given_back) in [("unmap", 2 * MIB), ("ignore", 0)] {
                let path = place.sparse("disk.raw", 4 * MIB);
                let options = file_options(&path, &format!(",discard={mode}"));
                let disk = Disk::open(engine, &options).expect("it opens");
                full(&disk, 4 * MIB);
                let before = occupied_bytes(&path);
                disk.discard(MIB, 2 * MIB).expect("a discard");
                gave_back(&path, before, given_back);
                if given_back > 0 {
                    zero_only(&disk, MIB, 3 * MIB);
                } else {
                    zero_only(&disk, 0, 0);
                }
                assert_eq!(fs::metadata(&path).expect("it is there").len(), 4 * MIB);
                // To the end: the length stays.
                disk.discard(0, 4 * MIB).expect("a discard");
                assert_eq!(fs::metadata(&path).expect("it is there").len(), 4 * MIB);
                disk.close();
            }
        }
    }
}

#[test]
fn zeroes_keep_or_free_their_space_as_they_are_told() {
    for engine in engines() {
        for place in places() {
            for (mode, flags, given_back) in [
                ("unmap", ZeroFlags::MAY_UNMAP, 2 * MIB),
                ("unmap", ZeroFlags::empty(), 0),
                ("ignore", ZeroFlags::MAY_UNMAP, 0),
            ] {
                let path = place.sparse("disk.raw", 4 * MIB);
                let options = file_options(&path, &format!(",discard={mode}"));
                let disk = Disk::open(engine, &options).expect("it opens");
                full(&disk, 4 * MIB);
                let before = occupied_bytes(&path);
                disk.zero(MIB, 2 * MIB, flags).expect("zeroes");
                zero_only(&disk, MIB, 3 * MIB);
                gave_back(&path, before, given_back);
                disk.close();
            }
        }
    }
}

#[test]
fn zeroes_of_any_range_reach_exactly_that_range() {
    for engine in engines() {
        for place in places() {
            let path = place.sparse("disk.raw", 256 << 10);
            let options = file_options(&path, ",discard=unmap");
            let disk = Disk::open(engine, &options).expect("it opens");
            for flags in [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP] {
                for (begin, end) in [
                    (0, 1),
                    (1, 4096),
                    (512, 1024),
                    (4095, 4097),
                    (4096, 8192),
                    (777, 200_000),
                    (0, 256 << 10),
                    ((256 << 10) - 1, 256 << 10),
                    (5000, 5000),
                ] {
                    full(&disk, 256 << 10);
                    disk.zero(begin, end - begin, flags).expect("zeroes");
                    zero_only(&disk, begin, end);
                }
            }
            disk.close();
        }
    }
}

#[test]
fn memory_cannot_zero_a_range_in_place_so_zeroes_are_written() {
    let mount = match Mount::tmpfs(64 * MIB) {
        Ok(mount) => mount,
        Err(reason) => return skip("zeroes in memory", &reason),
    };
    for engine in engines() {
        let path = mount.sparse("disk.raw", 8 * MIB);
        let options = file_options(&path, ",discard=unmap");
        let disk = Disk::open(engine, &options).expect("it opens");
        full(&disk, 8 * MIB);
        // Who asks for no fall-back learns that there is nothing better.
        let quick = disk.zero(MIB, 4 * MIB, ZeroFlags::NO_FALLBACK);
        assert_eq!(quick, Err(IoError::Unsupported));
        zero_only(&disk, 0, 0);
        let quick = disk.zero(MIB, MIB, ZeroFlags::NO_FALLBACK | ZeroFlags::MAY_UNMAP);
        assert_eq!(quick, Ok(()), "a hole is better than zeroes");
        zero_only(&disk, MIB, 2 * MIB);
        disk.zero(MIB, 4 * MIB + 100, ZeroFlags::empty())
            .expect("zeroes");
        zero_only(&disk, MIB, 5 * MIB + 100);
        disk.close();
    }
}

#[test]
fn where_the_host_can_nothing_discards_do_nothing_and_zeroes_are_written() {
    let mount = match Mount::ramfs() {
        Ok(mount) => mount,
        Err(reason) => return skip("a host that cannot punch", &reason),
    };
    for engine in engines() {
        let path = mount.sparse("disk.raw", 4 * MIB);
        let options = file_options(&path, ",discard=unmap");
        let disk = Disk::open(engine, &options).expect("it opens");
        full(&disk, 4 * MIB);
        // Twice: the second time it is known.
        for _ in 0..2 {
            disk.discard(MIB, MIB).expect("no error to the guest");
            zero_only(&disk, 0, 0);
            let both = ZeroFlags::NO_FALLBACK | ZeroFlags::MAY_UNMAP;
            assert_eq!(disk.zero(0, MIB, both), Err(IoError::Unsupported));
            zero_only(&disk, 0, 0);
        }
        disk.zero(1000, 2 * MIB, ZeroFlags::MAY_UNMAP)
            .expect("zeroes");
        zero_only(&disk, 1000, 2 * MIB + 1000);
        disk.close();
    }
}

#[test]
fn a_device_gives_space_back_and_zeroes_it() {
    for engine in engines() {
        for block in [512, 4096] {
            let device = match LoopDevice::new(8 * MIB, block) {
                Ok(device) => device,
                Err(reason) => return skip("discards of a device", &reason),
            };
            for direct in ["off", "on"] {
                let options = format!(
                    "host_device,filename={},discard=unmap,cache.direct={direct}",
                    device.path().display()
                );
                let disk = Disk::open(engine, &options).expect("it opens");
                full(&disk, 8 * MIB);
                let before = occupied_bytes(device.file());
                disk.discard(MIB, 2 * MIB).expect("a discard");
                zero_only(&disk, MIB, 3 * MIB);
                gave_back(device.file(), before, 2 * MIB);

                full(&disk, 8 * MIB);
                disk.zero(MIB, 2 * MIB, ZeroFlags::MAY_UNMAP)
                    .expect("zeroes");
                zero_only(&disk, MIB, 3 * MIB);
                full(&disk, 8 * MIB);
                // Not in whole blocks: the edges are written.
                for flags in [ZeroFlags::MAY_UNMAP, ZeroFlags::empty()] {
                    disk.zero(512, 65536, flags).expect("zeroes");
                    zero_only(&disk, 512, 512 + 65536);
                }
                disk.close();
            }
        }
    }
}

/// What the guest would have seen: an error for a discard that a disk with coarse blocks can only leave
/// partly undone.
#[test]
fn a_discard_off_the_blocks_of_a_device_takes_the_whole_blocks_within() {
    for engine in engines() {
        for direct in ["off", "on"] {
            let device = match LoopDevice::new(MIB, 4096) {
                Ok(device) => device,
                Err(reason) => return skip("discards of a device", &reason),
            };
            let options = format!(
                "host_device,filename={},discard=unmap,cache.direct={direct}",
                device.path().display()
            );
            let disk = Disk::open(engine, &options).expect("it opens");
            full(&disk, MIB);
            disk.discard(512, 1024).expect("less than a block");
            zero_only(&disk, 0, 0);
            disk.discard(512, 65536).expect("blocks and edges");
            zero_only(&disk, 4096, 65536);
            disk.close();
        }
    }
}
