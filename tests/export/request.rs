//! Every request and every error status.

use harness::frontend::blk::{self, Request, kind};
use harness::random::Random;

use crate::{DISK_BYTES, DISK_SECTORS, Disk, MIB_SECTORS, SECTOR, content};
#[test]
fn reads_return_the_bytes_and_the_length_written() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    for (sector, sectors) in [
        (0, 1),
        (1, 3),
        (17, 256),
        (DISK_SECTORS - 1, 1),
        (DISK_SECTORS - 2048, 2048),
    ] {
        let data = frontend.read(&mut ring, sector, sectors as usize * SECTOR);
        assert!(data == content(sector, sectors), "{sectors} at {sector}");
    }
}

#[test]
fn writes_reach_the_file_and_nothing_beside() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    let mut random = Random::announced("writes");
    let mut expected = content(0, DISK_SECTORS);
    for (sector, sectors) in [(0, 1), (3, 5), (100, 257), (DISK_SECTORS - 1, 1)] {
        let data = random.bytes(sectors * SECTOR);
        frontend.write(&mut ring, sector, &data);
        expected[sector as usize * SECTOR..][..data.len()].copy_from_slice(&data);
        assert!(frontend.read(&mut ring, sector, data.len()) == data);
    }
    frontend.succeed(&mut ring, &Request::flush());
    assert!(disk.bytes() == expected);
}

#[test]
fn discarded_space_is_given_back_and_reads_as_zero() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    let before = disk.allocated_bytes();
    let segment = blk::segment(2 * MIB_SECTORS, MIB_SECTORS as u32, 0);
    frontend.succeed(&mut ring, &Request::discard(&[segment]));
    let after = disk.allocated_bytes();
    assert!(after + (1 << 20) <= before, "{before} to {after} bytes");
    assert!(frontend.read(&mut ring, 2 * MIB_SECTORS, 1 << 20) == vec![0; 1 << 20]);
    for beside in [2 * MIB_SECTORS - 1, 3 * MIB_SECTORS] {
        assert_eq!(frontend.read(&mut ring, beside, SECTOR), content(beside, 1));
    }
    assert_eq!(disk.bytes().len() as u64, DISK_BYTES);
}

#[test]
fn zeroed_space_reads_as_zero_and_is_given_back_if_unmap_is_set() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    // Odd bounds: not whole file system blocks.
    let segment = blk::segment(3, 2 * MIB_SECTORS as u32 + 2, 0);
    frontend.succeed(&mut ring, &Request::write_zeroes(&[segment]));
    let bytes = disk.bytes();
    assert!(bytes[..3 * SECTOR] == content(0, 3));
    let end = 2 * MIB_SECTORS + 5;
    assert!(
        bytes[3 * SECTOR..end as usize * SECTOR]
            .iter()
            .all(|&byte| byte == 0)
    );
    assert!(bytes[end as usize * SECTOR..] == content(end, DISK_SECTORS - end));

    let before = disk.allocated_bytes();
    let segment = blk::segment(4 * MIB_SECTORS, MIB_SECTORS as u32, blk::UNMAP);
    frontend.succeed(&mut ring, &Request::write_zeroes(&[segment]));
    let after = disk.allocated_bytes();
    assert!(after + (1 << 20) <= before, "{before} to {after} bytes");
    assert!(frontend.read(&mut ring, 4 * MIB_SECTORS, 1 << 20) == vec![0; 1 << 20]);
}

#[test]
fn as_many_ranges_as_offered_are_discarded_by_one_request() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let config = frontend.config();
    let mut ring = frontend.start_queue(0, 128);
    let segments = |count: u32, flags: u32| -> Vec<_> {
        (0..u64::from(count))
            .map(|number| blk::segment(16 * number, 8, flags))
            .collect()
    };
    let room = (DISK_SECTORS / 16) as u32;
    let count = config.max_discard_seg.min(room);
    frontend.succeed(&mut ring, &Request::discard(&segments(count, 0)));
    let count = config.max_write_zeroes_seg.min(room);
    frontend.succeed(&mut ring, &Request::write_zeroes(&segments(count, 0)));
    for number in 0..u64::from(count) {
        let data = frontend.read(&mut ring, 16 * number, 16 * SECTOR);
        assert!(data[..8 * SECTOR].iter().all(|&byte| byte == 0));
        assert!(data[8 * SECTOR..] == content(16 * number + 8, 8));
    }
}

#[test]
fn requests_outside_the_disk_fail_and_change_nothing() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    for (sector, sectors) in [
        (DISK_SECTORS, 1),
        (DISK_SECTORS - 1, 2),
        (DISK_SECTORS - 8, 16),
        (u64::MAX, 1),
        (u64::MAX / 512, 1),
        (u64::MAX / 512 + 1, 1),
        (1 << 55, 1),
        (1 << 63, 8),
    ] {
        for request in [
            Request::read(sector, sectors * SECTOR),
            Request::write(sector, &vec![0xee; sectors * SECTOR]),
            Request::discard(&[blk::segment(sector, sectors as u32, 0)]),
            Request::write_zeroes(&[blk::segment(sector, sectors as u32, 0)]),
        ] {
            assert_eq!(
                frontend.status(&mut ring, &request),
                blk::IOERR,
                "type {} at sector {sector}",
                request.kind
            );
        }
    }
    assert!(disk.bytes() == content(0, DISK_SECTORS));
}

#[test]
fn data_that_is_no_whole_number_of_sectors_fails() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    for bytes in [1, 511, 513, 4095] {
        let read = Request::read(0, bytes);
        assert_eq!(
            frontend.status(&mut ring, &read),
            blk::IOERR,
            "read {bytes}"
        );
        let write = Request::write(0, &vec![0xee; bytes]);
        assert_eq!(
            frontend.status(&mut ring, &write),
            blk::IOERR,
            "write {bytes}"
        );
    }
    assert!(disk.bytes() == content(0, DISK_SECTORS));
}

#[test]
fn requests_misaligned_to_the_block_size_fail() {
    let disk = Disk::serve(&["--block-size", "4096"]);
    let mut frontend = disk.connect();
    let config = frontend.config();
    assert_eq!(config.blk_size, 4096);
    assert!(config.discard_sector_alignment.is_multiple_of(8));
    assert_eq!(config.capacity_sectors, DISK_SECTORS);
    let mut ring = frontend.start_queue(0, 128);
    for (sector, sectors) in [(1, 8), (8, 1), (0, 7), (4, 4)] {
        for request in [
            Request::read(sector, sectors * SECTOR),
            Request::write(sector, &vec![0xee; sectors * SECTOR]),
            Request::write_zeroes(&[blk::segment(sector, sectors as u32, 0)]),
            Request::discard(&[blk::segment(sector, sectors as u32, 0)]),
        ] {
            assert_eq!(
                frontend.status(&mut ring, &request),
                blk::IOERR,
                "type {}, {sectors} sectors at {sector}",
                request.kind
            );
        }
    }
    assert!(disk.bytes() == content(0, DISK_SECTORS));
    assert!(frontend.read(&mut ring, 8, 4096) == content(8, 8));
    frontend.write(&mut ring, 16, &[0x11; 4096]);
    assert!(frontend.read(&mut ring, 16, 4096) == [0x11; 4096]);
}

#[test]
fn unknown_requests_are_unsupported() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    for kind in [
        2,
        3,
        5,
        9,
        kind::GET_LIFETIME,
        kind::SECURE_ERASE,
        0x1234,
        0x8000_0000,
        u32::MAX,
    ] {
        for (output, input_bytes) in [(vec![], 0), (vec![0; 512], 0), (vec![], 512)] {
            let request = Request {
                kind,
                sector: 0,
                output,
                input_bytes,
            };
            assert_eq!(
                frontend.status(&mut ring, &request),
                blk::UNSUPP,
                "{request:?}"
            );
        }
    }
}

#[test]
fn unknown_flags_of_discard_and_write_zeroes_are_unsupported() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    for flags in [blk::UNMAP, 2, 3, 0x8000_0000, u32::MAX] {
        let request = Request::discard(&[blk::segment(0, 8, flags)]);
        assert_eq!(
            frontend.status(&mut ring, &request),
            blk::UNSUPP,
            "{flags:#x}"
        );
    }
    for flags in [2, 3, 0x8000_0000, u32::MAX] {
        let request = Request::write_zeroes(&[blk::segment(0, 8, flags)]);
        assert_eq!(
            frontend.status(&mut ring, &request),
            blk::UNSUPP,
            "{flags:#x}"
        );
    }
    assert!(disk.bytes() == content(0, DISK_SECTORS));
}

#[test]
fn the_serial_is_padded_with_zeros_to_twenty_bytes() {
    let disk = Disk::serve(&["--serial", "disk-7"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 16);
    let outcome = frontend.request(&mut ring, &Request::get_id());
    assert_eq!((outcome.status, outcome.used_length), (blk::OK, 21));
    assert_eq!(outcome.data, b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn a_serial_of_twenty_bytes_fills_all_twenty() {
    let serial = "abcdefghijklmnopqrst";
    let disk = Disk::serve(&["--serial", serial]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 16);
    let outcome = frontend.request(&mut ring, &Request::get_id());
    assert_eq!((outcome.status, outcome.used_length), (blk::OK, 21));
    assert_eq!(outcome.data, serial.as_bytes());
}
