//! What a guest sees of a disk: features, configuration, every request, every way to start and
//! stop a ring, to the letter of the virtio and vhost-user specifications.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use harness::daemon::{Daemon, Place, eventually};
use harness::frontend::blk::{self, Request, feature, kind};
use harness::frontend::connection::{code, config_access, protocol, ring_state};
use harness::frontend::event::Event;
use harness::frontend::memory::GuestMemory;
use harness::frontend::ring::{Part, Ring};
use harness::frontend::{Frontend, LIMIT, MEMORY_BYTES, MEMORY_START, Wanted};
use harness::random::Random;

const SECTOR: usize = 512;
const DISK_SECTORS: u64 = 32 << 10;
const DISK_BYTES: u64 = DISK_SECTORS * SECTOR as u64;
const MIB_SECTORS: u64 = 2048;
/// Long enough that a ring which serves requests would have served one.
const A_WHILE: Duration = Duration::from_millis(150);

/// A served disk whose every sector holds its own number.
struct Disk {
    daemon: Daemon,
    socket: PathBuf,
    file: PathBuf,
    _place: Place,
}

impl Disk {
    fn serve(options: &[&str]) -> Self {
        let place = Place::new();
        let file = place.file("disk.raw", &content(0, DISK_SECTORS));
        let socket = place.join("vm.sock");
        let daemon = Daemon::serve(&file, &socket, options);
        Self {
            daemon,
            socket,
            file,
            _place: place,
        }
    }

    fn connect(&self) -> Frontend {
        Frontend::connect(&self.socket)
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.file).expect("the image can be read")
    }

    fn allocated_bytes(&self) -> u64 {
        fs::metadata(&self.file)
            .expect("the image is there")
            .blocks()
            * 512
    }

    /// Its descriptors, threads and mapped regions.
    fn footprint(&self) -> [usize; 3] {
        [
            self.daemon.descriptors(),
            self.daemon.threads(),
            self.daemon.mapped_regions(),
        ]
    }

    #[track_caller]
    fn footprint_returns_to(&self, before: [usize; 3]) {
        eventually("descriptors, threads and mappings are given back", || {
            self.footprint()
                .iter()
                .zip(&before)
                .all(|(now, before)| now <= before)
        });
    }
}

/// What the disk holds at first.
fn content(sector: u64, sectors: u64) -> Vec<u8> {
    (sector..sector + sectors)
        .flat_map(|number| number.to_le_bytes().repeat(SECTOR / 8))
        .collect()
}

fn bit_names(bits: u64) -> Vec<u32> {
    (0..64).filter(|bit| bits & (1 << bit) != 0).collect()
}

// --- what is offered ---------------------------------------------------------------------------

#[test]
fn the_offered_features_are_exactly_those_that_work() {
    let disk = Disk::serve(&[]);
    let frontend = Frontend::unshared(&disk.socket, &Wanted::default());
    let offered = frontend.connection.ask(code::GET_FEATURES, &[]).number();
    let expected = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | feature::PROTOCOL_FEATURES
        | feature::VERSION_1;
    assert_eq!(bit_names(offered), bit_names(expected));
}

#[test]
fn the_offered_protocol_features_are_exactly_those_that_work() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    let offered = frontend
        .connection
        .ask(code::GET_PROTOCOL_FEATURES, &[])
        .number();
    let expected = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::BACKEND_REQ
        | protocol::CONFIG
        | protocol::CONFIGURE_MEM_SLOTS;
    assert_eq!(bit_names(offered), bit_names(expected));
}

#[test]
fn a_read_only_disk_says_so_and_refuses_every_change() {
    let disk = Disk::serve(&["--read-only"]);
    let mut frontend = disk.connect();
    assert!(frontend.has(feature::RO));
    let mut ring = frontend.start_queue(0, 128);
    for request in [
        Request::write(0, &[0xff; SECTOR]),
        Request::discard(&[blk::segment(0, 8, 0)]),
        Request::write_zeroes(&[blk::segment(0, 8, 0)]),
    ] {
        assert_eq!(
            frontend.status(&mut ring, &request),
            blk::IOERR,
            "{request:?}"
        );
    }
    assert_eq!(frontend.read(&mut ring, 7, SECTOR), content(7, 1));
    frontend.succeed(&mut ring, &Request::flush());
    drop(frontend);
    assert!(disk.bytes() == content(0, DISK_SECTORS));
}

#[test]
fn the_configuration_space_describes_the_disk() {
    let disk = Disk::serve(&["--queues", "3"]);
    let frontend = disk.connect();
    let config = frontend.config();
    assert_eq!(config.capacity_sectors, DISK_SECTORS);
    assert_eq!(config.blk_size, 512);
    assert_eq!(config.num_queues, 3);
    assert_eq!(config.writeback, 1);
    assert_eq!(config.write_zeroes_may_unmap, 1);
    assert!(config.size_max >= 4096, "{config:?}");
    assert!(config.seg_max >= 1, "{config:?}");
    assert!(config.max_discard_sectors >= 1, "{config:?}");
    assert!(config.max_discard_seg >= 1, "{config:?}");
    assert!(config.discard_sector_alignment >= 1, "{config:?}");
    assert!(config.max_write_zeroes_sectors >= 1, "{config:?}");
    assert!(config.max_write_zeroes_seg >= 1, "{config:?}");
    let queues = frontend.connection.ask(code::GET_QUEUE_NUM, &[]).number();
    assert_eq!(queues, 3);
}

#[test]
fn a_disk_has_sixteen_queues_unless_told_otherwise() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    assert_eq!(frontend.config().num_queues, 16);
    assert_eq!(
        frontend.connection.ask(code::GET_QUEUE_NUM, &[]).number(),
        16
    );
}

#[test]
fn the_configuration_space_reads_the_same_in_pieces() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    let whole = frontend.config_bytes(0, blk::CONFIG_BYTES);
    for (offset, bytes) in [(0, 8), (8, 4), (12, 4), (20, 4), (32, 1), (34, 2), (56, 4)] {
        assert_eq!(
            frontend.config_bytes(offset, bytes),
            whole[offset as usize..][..bytes as usize],
            "{bytes} bytes at {offset}"
        );
    }
}

#[test]
fn there_is_room_for_many_memory_regions() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    let slots = frontend
        .connection
        .ask(code::GET_MAX_MEM_SLOTS, &[])
        .number();
    assert!(slots >= 32, "{slots} slots");
    for number in 0..31 {
        let region = frontend.memory.add((1 << 40) + (number << 21), 1 << 21);
        frontend.share_region(&region);
    }
}

#[test]
fn a_backend_channel_is_taken_and_can_be_replaced() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let first = frontend.open_backend_channel();
    let mut ring = frontend.start_queue(0, 16);
    assert_eq!(frontend.read(&mut ring, 1, SECTOR), content(1, 1));
    let _second = frontend.open_backend_channel();
    assert!(
        first.closes_within(LIMIT),
        "the replaced channel is kept open"
    );
    assert_eq!(frontend.read(&mut ring, 2, SECTOR), content(2, 1));
}

// --- requests ----------------------------------------------------------------------------------

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
fn a_serial_of_twenty_bytes_or_more_fills_all_twenty() {
    for serial in ["abcdefghijklmnopqrst", "abcdefghijklmnopqrstuvwxyz"] {
        let disk = Disk::serve(&["--serial", serial]);
        let mut frontend = disk.connect();
        let mut ring = frontend.start_queue(0, 16);
        let outcome = frontend.request(&mut ring, &Request::get_id());
        assert_eq!((outcome.status, outcome.used_length), (blk::OK, 21));
        assert_eq!(outcome.data, b"abcdefghijklmnopqrst");
    }
}

// --- how a request may lie in memory -----------------------------------------------------------

/// Splits each part of a request into buffers of at most these lengths, then of any length.
fn split(parts: &[Part], readable: &[u32], writable: &[u32]) -> Vec<Part> {
    let mut pieces = Vec::new();
    let mut lengths = [readable.iter(), writable.iter()];
    for part in parts {
        let lengths = &mut lengths[usize::from(part.writable)];
        let mut done = 0;
        while done < part.len {
            let rest = part.len - done;
            let here = lengths.next().map_or(rest, |&length| length.min(rest));
            pieces.push(Part {
                addr: part.addr + u64::from(done),
                len: here,
                writable: part.writable,
            });
            done += here;
        }
    }
    pieces
}

#[track_caller]
fn request_in_pieces(
    frontend: &mut Frontend,
    ring: &mut Ring,
    request: &Request,
    readable: &[u32],
    writable: &[u32],
) -> blk::Outcome {
    let (parts, pending) = frontend.place(request);
    let head = ring.submit(&split(&parts, readable, writable));
    let used = ring.pop();
    frontend.outcome(&harness::frontend::Pending { head, ..pending }, used)
}

#[test]
fn headers_and_data_may_be_split_anywhere() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);
    for (readable, writable) in [
        (&[1, 7, 8][..], &[1, 511][..]),
        (&[8, 8], &[511, 1]),
        (&[15, 1], &[3, 5, 7, 11, 13]),
        (&[1; 16], &[1; 64]),
        (&[4, 4, 4, 4], &[1023, 1]),
    ] {
        let request = Request::read(5, 2 * SECTOR);
        let outcome = request_in_pieces(&mut frontend, &mut ring, &request, readable, writable);
        assert_eq!((outcome.status, outcome.used_length), (blk::OK, 1025));
        assert!(outcome.data == content(5, 2), "{readable:?} {writable:?}");
    }
    let mut random = Random::announced("split writes");
    for readable in [
        &[16, 1, 511][..],
        &[1, 7, 8, 511, 1],
        &[16, 3, 5, 7, 11, 13],
        &[2, 14, 1023, 1],
    ] {
        let data = random.bytes(2 * SECTOR);
        let request = Request::write(40, &data);
        let outcome = request_in_pieces(&mut frontend, &mut ring, &request, readable, &[]);
        assert_eq!((outcome.status, outcome.used_length), (blk::OK, 1));
        assert!(
            disk.bytes()[40 * SECTOR..][..data.len()] == data,
            "{readable:?}"
        );
    }
}

#[test]
fn header_and_data_may_share_a_buffer_and_so_may_data_and_status() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 128);

    let addr = frontend.heap.take(4096, 512);
    frontend.memory.write(addr, &blk::header(kind::IN, 9));
    frontend.memory.write(addr + 512, &[blk::UNTOUCHED; 520]);
    ring.submit(&[Part::readable(addr, 16), Part::writable(addr + 512, 513)]);
    assert_eq!(ring.pop().length, 513);
    let answer = frontend.memory.read(addr + 512, 514);
    assert!(answer[..512] == content(9, 1));
    assert_eq!(answer[512..], [blk::OK, blk::UNTOUCHED]);

    frontend.memory.write(addr, &blk::header(kind::OUT, 11));
    frontend.memory.write(addr + 16, &[0x77; 512]);
    frontend.memory.write(addr + 1024, &[blk::UNTOUCHED]);
    ring.submit(&[Part::readable(addr, 528), Part::writable(addr + 1024, 1)]);
    assert_eq!(ring.pop().length, 1);
    assert_eq!(frontend.memory.read(addr + 1024, 1), [blk::OK]);
    assert!(disk.bytes()[11 * SECTOR..12 * SECTOR] == [0x77; SECTOR]);
}

#[test]
fn a_buffer_may_cross_into_an_adjacent_region_with_another_file() {
    let disk = Disk::serve(&[]);
    let half = MEMORY_BYTES / 2;
    let wanted =
        Wanted::default().with_memory(&[(MEMORY_START, half), (MEMORY_START + half, half)]);
    let mut frontend = Frontend::connect_with(&disk.socket, &wanted);
    let mut ring = frontend.start_queue(0, 128);
    // Every part crosses once, at every kind of place: header, data, and both in between.
    for before in [1, 8, 15, 16, 200, 16 + 512, 16 + 1000, 16 + 1024] {
        let addr = MEMORY_START + half - before;
        frontend.memory.write(addr, &blk::header(kind::IN, 3));
        frontend.memory.write(addr + 16, &[blk::UNTOUCHED; 1026]);
        ring.submit(&[Part::readable(addr, 16), Part::writable(addr + 16, 1025)]);
        assert_eq!(ring.pop().length, 1025);
        let answer = frontend.memory.read(addr + 16, 1026);
        assert!(
            answer[..1024] == content(3, 2),
            "{before} bytes before the border"
        );
        assert_eq!(answer[1024..], [blk::OK, blk::UNTOUCHED]);

        let data = Random::new(before).bytes(1024);
        frontend.memory.write(addr, &blk::header(kind::OUT, 50));
        frontend.memory.write(addr + 16, &data);
        frontend.memory.write(addr + 16 + 1024, &[blk::UNTOUCHED]);
        ring.submit(&[
            Part::readable(addr, 16 + 1024),
            Part::writable(addr + 16 + 1024, 1),
        ]);
        assert_eq!(ring.pop().length, 1);
        assert_eq!(frontend.memory.read(addr + 16 + 1024, 1), [blk::OK]);
        assert!(disk.bytes()[50 * SECTOR..52 * SECTOR] == data);
    }
}

#[test]
fn regions_may_begin_anywhere_in_their_file() {
    let disk = Disk::serve(&[]);
    let mut frontend = Frontend::unshared(&disk.socket, &Wanted::default());
    // The file is the whole memory; what the back-end is given is its second half.
    let region = frontend.memory.regions()[0].clone();
    let mut entry = region.entry;
    let half = MEMORY_BYTES / 2;
    entry.guest_addr += half;
    entry.user_addr += half;
    entry.bytes -= half;
    entry.mmap_offset = half;
    frontend.connection.tell(
        code::ADD_MEM_REG,
        &harness::frontend::connection::memory_region(entry),
        &[region.file()],
    );
    frontend.heap.skip_to(MEMORY_START + half);
    let mut ring = frontend.start_queue(0, 128);
    assert!(frontend.read(&mut ring, 70, 8 * SECTOR) == content(70, 8));
}

#[test]
fn a_whole_request_may_lie_in_an_indirect_table() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    // One descriptor is enough for a ring then.
    for size in [1, 2, 128] {
        let mut ring = frontend.start_queue(0, size);
        for sector in 0..5 {
            let (parts, pending) = frontend.place(&Request::read(sector, 4 * SECTOR));
            let parts = split(&parts, &[8, 8], &[512, 1, 511, 512, 512]);
            let table = frontend.heap.take(16 * parts.len() as u64, 16);
            let head = ring.lay_out_indirect(table, &parts);
            ring.offer(head);
            ring.publish();
            ring.kick_if_wanted();
            let used = ring.pop();
            let pending = harness::frontend::Pending { head, ..pending };
            let outcome = frontend.outcome(&pending, used);
            assert_eq!((outcome.status, outcome.used_length), (blk::OK, 2049));
            assert!(outcome.data == content(sector, 4));
        }
        frontend.stop_queue(&ring);
    }
}

#[test]
fn as_many_segments_as_offered_fit_in_a_request() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let segments = frontend.config().seg_max.min(1022);
    let size = (segments + 2).next_power_of_two() as u16;
    let mut ring = frontend.start_queue(0, size);
    let lengths = vec![SECTOR as u32; segments as usize];
    let bytes = segments as usize * SECTOR;

    let request = Request::read(100, bytes);
    let outcome = request_in_pieces(&mut frontend, &mut ring, &request, &[], &lengths);
    assert_eq!(outcome.status, blk::OK);
    assert!(outcome.data == content(100, u64::from(segments)));

    let (parts, pending) = frontend.place(&request);
    let parts = split(&parts, &[], &lengths);
    assert_eq!(parts.len() as u32, segments + 2);
    let table = frontend.heap.take(16 * parts.len() as u64, 16);
    let head = ring.lay_out_indirect(table, &parts);
    ring.offer(head);
    ring.publish();
    ring.kick_if_wanted();
    let used = ring.pop();
    let outcome = frontend.outcome(&harness::frontend::Pending { head, ..pending }, used);
    assert_eq!(outcome.status, blk::OK);
    assert!(outcome.data == content(100, u64::from(segments)));
}

// --- rings -------------------------------------------------------------------------------------

#[test]
fn rings_of_every_size_serve_more_requests_than_they_hold() {
    let disk = Disk::serve(&["--queues", "1"]);
    for size in [4, 128, 1024, 32768] {
        let mut frontend = disk.connect();
        let mut ring = frontend.start_queue(0, size);
        for sector in 0..20 {
            assert_eq!(
                frontend.read(&mut ring, sector, SECTOR),
                content(sector, 1),
                "ring of {size}"
            );
        }
    }
}

#[test]
fn indexes_of_a_ring_wrap() {
    let disk = Disk::serve(&["--queues", "1"]);
    for features in [0, feature::EVENT_IDX] {
        let wanted = Wanted::default().without(features);
        let mut frontend = Frontend::connect_with(&disk.socket, &wanted);
        let mut ring = frontend.new_ring(0, 64);
        ring.set_base(65500);
        frontend.start(&ring, 65500);
        let requests: Vec<_> = (0..16)
            .map(|sector| Request::read(sector, SECTOR))
            .collect();
        for _ in 0..10 {
            let outcomes = frontend.request_all(&mut ring, &requests);
            for (sector, outcome) in outcomes.iter().enumerate() {
                assert_eq!(outcome.status, blk::OK);
                assert_eq!(outcome.data, content(sector as u64, 1));
            }
        }
        assert_eq!(frontend.stop_queue(&ring), 65500_u16.wrapping_add(160));
    }
}

#[test]
fn all_queues_serve_at_once_and_each_request_once() {
    let disk = Disk::serve(&["--queues", "4"]);
    let mut frontend = disk.connect();
    let mut rings: Vec<_> = (0..4)
        .map(|queue| frontend.start_queue(queue, 128))
        .collect();
    let mut random = Random::announced("queues");
    for _ in 0..10 {
        let mark = frontend.heap.mark();
        let mut in_flight = Vec::new();
        for number in 0..128_u64 {
            // Each request has sectors of its own, so that their order does not matter.
            let sector = number * 16;
            let queue = (number % 4) as usize;
            let write = number % 8 < 4;
            let request = if write {
                Request::write(sector + 4096, &random.bytes(8 * SECTOR))
            } else {
                Request::read(sector, 8 * SECTOR)
            };
            let pending = frontend.submit(&mut rings[queue], &request);
            in_flight.push((queue, sector, request, pending));
        }
        let mut used: Vec<_> = rings
            .iter_mut()
            .map(|ring| (0..32).map(|_| ring.pop()).collect::<Vec<_>>())
            .collect();
        for (queue, sector, request, pending) in &in_flight {
            let position = used[*queue]
                .iter()
                .position(|used| used.head == u32::from(pending.head))
                .expect("each request is completed");
            let outcome = frontend.outcome(pending, used[*queue].swap_remove(position));
            assert_eq!(outcome.status, blk::OK);
            if request.kind == kind::IN {
                assert!(outcome.data == content(*sector, 8));
            } else {
                let at = (sector + 4096) as usize * SECTOR;
                assert!(disk.bytes()[at..][..8 * SECTOR] == request.output);
            }
        }
        frontend.heap.release(mark);
    }
}

#[test]
fn a_blocking_kick_descriptor_loses_no_request() {
    let disk = Disk::serve(&["--queues", "1"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.new_ring(0, 64);
    ring.replace_kick(Event::blocking());
    ring.replace_call(Event::blocking());
    frontend.start(&ring, 0);
    for number in 0..2000 {
        let sector = number % DISK_SECTORS;
        assert_eq!(frontend.read(&mut ring, sector, SECTOR), content(sector, 1));
    }
}

#[test]
fn a_second_kick_descriptor_replaces_the_first_while_the_ring_runs() {
    let disk = Disk::serve(&["--queues", "1"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    for round in 0..20 {
        assert_eq!(frontend.read(&mut ring, round, SECTOR), content(round, 1));
        ring.replace_kick(Event::new());
        let queue = 0_u64.to_le_bytes();
        frontend
            .connection
            .tell(code::SET_VRING_KICK, &queue, &[ring.kick.as_fd()]);
        assert_eq!(frontend.read(&mut ring, round, SECTOR), content(round, 1));
        ring.replace_call(Event::new());
        frontend
            .connection
            .tell(code::SET_VRING_CALL, &queue, &[ring.call.as_fd()]);
    }
}

#[test]
fn a_guest_that_wants_no_calls_gets_none() {
    let disk = Disk::serve(&["--queues", "1"]);
    // Without EVENT_IDX there is a flag for it, as firmware uses it.
    let wanted = Wanted::default().without(feature::EVENT_IDX);
    let mut frontend = Frontend::connect_with(&disk.socket, &wanted);
    let mut ring = frontend.start_queue(0, 64);
    ring.suppress_calls(true);
    assert!(
        !ring.call.wait(A_WHILE),
        "called before there was a request"
    );
    for sector in 0..4 {
        frontend.submit(&mut ring, &Request::read(sector, SECTOR));
        eventually("the request is completed", || ring.try_pop().is_some());
    }
    assert!(!ring.call.wait(A_WHILE), "called although calls are off");
    ring.suppress_calls(false);
    assert_eq!(frontend.read(&mut ring, 1, SECTOR), content(1, 1));
    drop(frontend);

    // With it there is an index: only the completion with that number is called for.
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    ring.ask_for_call(3);
    for sector in 0..3 {
        frontend.submit(&mut ring, &Request::read(sector, SECTOR));
        eventually("the request is completed", || ring.try_pop().is_some());
    }
    assert!(!ring.call.wait(A_WHILE), "called before the wanted index");
    frontend.submit(&mut ring, &Request::read(0, SECTOR));
    assert!(ring.call.wait(LIMIT), "not called at the wanted index");
}

#[test]
fn a_ring_without_a_call_descriptor_is_served() {
    let disk = Disk::serve(&["--queues", "1"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    // Bit 8: no descriptor comes with it, the driver polls.
    let body = 0x100_u64.to_le_bytes();
    frontend.connection.tell(code::SET_VRING_CALL, &body, &[]);
    frontend.connection.tell(code::SET_VRING_ERR, &body, &[]);
    for sector in 0..4 {
        let pending = frontend.submit(&mut ring, &Request::read(sector, SECTOR));
        let mut used = None;
        eventually("the request is completed", || {
            used = ring.try_pop();
            used.is_some()
        });
        let outcome = frontend.outcome(&pending, used.expect("it was completed"));
        assert_eq!(outcome.data, content(sector, 1));
    }
    assert!(!ring.call.wait(Duration::ZERO));
}

#[test]
fn a_disabled_ring_is_not_served_until_it_is_enabled() {
    let disk = Disk::serve(&["--queues", "2"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.new_ring(1, 64);
    frontend.set_up(&ring, 0);
    let pending = frontend.submit(&mut ring, &Request::read(6, SECTOR));
    std::thread::sleep(A_WHILE);
    assert_eq!(ring.peek(), None, "served before it was enabled");
    for _ in 0..3 {
        // The kick came long ago: nothing else tells the back-end to look.
        frontend.enable(1, true);
        let used = ring.pop();
        assert_eq!(frontend.outcome(&pending, used).data, content(6, 1));

        frontend.enable(1, false);
        let again = frontend.submit(&mut ring, &Request::read(6, SECTOR));
        assert_eq!(again.head, pending.head, "the descriptors were free again");
        std::thread::sleep(A_WHILE);
        assert_eq!(ring.peek(), None, "served while it was disabled");
        frontend.memory.write(pending.input, &content(6, 1));
    }
}

#[test]
fn rings_begin_enabled_without_protocol_features() {
    let disk = Disk::serve(&[]);
    let wanted = Wanted::default().without(feature::PROTOCOL_FEATURES);
    let mut frontend = Frontend::connect_with(&disk.socket, &wanted);
    let mut ring = frontend.start_queue(0, 64);
    assert_eq!(frontend.read(&mut ring, 8, SECTOR), content(8, 1));
    assert_eq!(frontend.stop_queue(&ring), 1);
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let disk = Disk::serve(&["--queues", "2"]);
    let mut base = 0;
    let mut expected = 0_u16;
    for turn in 0..3_u64 {
        // The ring is laid out anew for each connection, as its memory is another.
        let mut frontend = disk.connect();
        let mut ring = frontend.new_ring(0, 32);
        ring.set_base(base);
        frontend.start(&ring, base);
        for _ in 0..3 {
            for sector in 0..5 {
                assert_eq!(
                    frontend.read(&mut ring, sector + turn, SECTOR),
                    content(sector + turn, 1)
                );
            }
            expected += 5;
            base = frontend.stop_queue(&ring);
            assert_eq!(base, expected);
            frontend.start(&ring, base);
        }
        base = frontend.stop_queue(&ring);
        assert_eq!(base, expected);
    }
}

#[test]
fn stopping_a_ring_completes_what_was_begun_and_leaves_the_rest() {
    let disk = Disk::serve(&["--queues", "1"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 256);
    for _ in 0..20 {
        let mark = frontend.heap.mark();
        let pending: Vec<_> = (0..64)
            .map(|sector| frontend.submit(&mut ring, &Request::read(sector, 16 * SECTOR)))
            .collect();
        let base = frontend.stop_queue(&ring);
        let mut completed = Vec::new();
        while let Some(used) = ring.try_pop() {
            completed.push(used);
        }
        assert_eq!(
            base,
            ring.used_index(),
            "the base is not the number of completed requests"
        );
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(ring.peek(), None, "completed after the ring was stopped");
        frontend.start(&ring, base);
        // What was kicked for before is not kicked for again by everybody; QEMU does.
        ring.kick.signal();
        while completed.len() < pending.len() {
            completed.push(ring.pop());
        }
        for (sector, pending) in pending.iter().enumerate() {
            let used = completed
                .iter()
                .find(|used| used.head == u32::from(pending.head))
                .expect("each request is completed");
            let outcome = frontend.outcome(pending, *used);
            assert_eq!(outcome.status, blk::OK);
            assert!(outcome.data == content(sector as u64, 16));
        }
        frontend.heap.release(mark);
    }
}

#[test]
fn firmware_and_then_the_kernel_start_the_device() {
    let disk = Disk::serve(&["--queues", "4"]);
    for _ in 0..2 {
        // Firmware: one queue, few features, no calls, and the VMM enables queues that nobody
        // has set up.
        let wanted = Wanted {
            features: feature::VERSION_1
                | feature::PROTOCOL_FEATURES
                | feature::SIZE_MAX
                | feature::SEG_MAX,
            ..Wanted::default()
        };
        let mut frontend = Frontend::connect_with(&disk.socket, &wanted);
        let mut ring = frontend.new_ring(0, 128);
        ring.suppress_calls(true);
        frontend.set_up(&ring, 0);
        for queue in 0..4 {
            frontend.enable(queue, true);
        }
        for sector in 0..10 {
            let pending = frontend.submit(&mut ring, &Request::read(sector, SECTOR));
            let mut used = None;
            eventually("firmware's request is completed", || {
                used = ring.try_pop();
                used.is_some()
            });
            let outcome = frontend.outcome(&pending, used.expect("it was completed"));
            assert_eq!(outcome.data, content(sector, 1));
        }
        for queue in 0..4 {
            frontend.enable(queue, false);
        }
        assert_eq!(frontend.stop_queue(&ring), 10);

        // The kernel: on the same connection, with everything, in other memory, from index 0.
        let offered = frontend.connection.ask(code::GET_FEATURES, &[]).number();
        frontend.features = offered & Wanted::default().features;
        frontend
            .connection
            .tell(code::SET_FEATURES, &frontend.features.to_le_bytes(), &[]);
        assert!(frontend.has(feature::EVENT_IDX));
        let mut rings: Vec<_> = (0..4)
            .map(|queue| frontend.start_queue(queue, 128))
            .collect();
        for sector in 0..20 {
            for ring in &mut rings {
                assert_eq!(frontend.read(ring, sector, SECTOR), content(sector, 1));
            }
        }
        for ring in &rings {
            assert_eq!(frontend.stop_queue(ring), 20);
        }
    }
}

// --- changes while rings run -------------------------------------------------------------------

/// Keeps 32 reads in flight while `act` is done, then checks all of them.
#[track_caller]
fn with_reads_in_flight(
    frontend: &mut Frontend,
    ring: &mut Ring,
    act: impl FnOnce(&mut Frontend, &mut Ring),
) {
    let mark = frontend.heap.mark();
    let pending: Vec<_> = (0..32)
        .map(|sector| frontend.submit(ring, &Request::read(sector, 8 * SECTOR)))
        .collect();
    act(frontend, ring);
    let used: Vec<_> = (0..32).map(|_| ring.pop()).collect();
    for (sector, pending) in pending.iter().enumerate() {
        let used = used
            .iter()
            .find(|used| used.head == u32::from(pending.head))
            .expect("each request is completed");
        let outcome = frontend.outcome(pending, *used);
        assert_eq!(outcome.status, blk::OK);
        assert!(outcome.data == content(sector as u64, 8));
    }
    frontend.heap.release(mark);
}

#[test]
fn features_and_ring_addresses_may_be_set_again_while_the_ring_runs() {
    let disk = Disk::serve(&["--queues", "1"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 256);
    for _ in 0..50 {
        with_reads_in_flight(&mut frontend, &mut ring, |frontend, ring| {
            frontend
                .connection
                .tell(code::SET_FEATURES, &frontend.features.to_le_bytes(), &[]);
            let body = frontend.ring_addresses(ring);
            frontend.connection.tell(code::SET_VRING_ADDR, &body, &[]);
        });
    }
    assert_eq!(frontend.stop_queue(&ring), 50 * 32);
}

#[test]
fn the_memory_table_may_grow_and_shrink_while_the_ring_runs() {
    let disk = Disk::serve(&["--queues", "1"]);
    let wanted = Wanted::default().without_protocol(protocol::CONFIGURE_MEM_SLOTS);
    let mut frontend = Frontend::connect_with(&disk.socket, &wanted);
    let mut ring = frontend.start_queue(0, 256);
    let extra = 1 << 32;
    for round in 0..20 {
        with_reads_in_flight(&mut frontend, &mut ring, |frontend, _| {
            frontend.memory.add(extra, 1 << 20);
            frontend.set_memory_table();
        });
        read_into(&mut frontend, &mut ring, extra + 512 * round, round);
        with_reads_in_flight(&mut frontend, &mut ring, |frontend, _| {
            frontend.memory.remove(extra);
            frontend.set_memory_table();
        });
    }
}

#[test]
fn memory_regions_may_come_and_go_while_the_ring_runs() {
    let disk = Disk::serve(&["--queues", "1"]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 256);
    let before = disk.daemon.mapped_regions();
    let extra = 1 << 32;
    for round in 0..20 {
        with_reads_in_flight(&mut frontend, &mut ring, |frontend, _| {
            let region = frontend.memory.add(extra, 1 << 20);
            frontend.share_region(&region);
        });
        read_into(&mut frontend, &mut ring, extra + 512 * round, round);
        with_reads_in_flight(&mut frontend, &mut ring, |frontend, _| {
            frontend.remove_region(extra);
        });
    }
    eventually("removed regions are unmapped", || {
        disk.daemon.mapped_regions() <= before
    });
}

/// Reads one sector straight to `addr`.
#[track_caller]
fn read_into(frontend: &mut Frontend, ring: &mut Ring, addr: u64, sector: u64) {
    let mark = frontend.heap.mark();
    let (mut parts, pending) = frontend.place(&Request::read(sector, SECTOR));
    parts[1].addr = addr;
    ring.submit(&parts);
    ring.pop();
    assert_eq!(frontend.memory.read(pending.status, 1), [blk::OK]);
    assert_eq!(frontend.memory.read(addr, SECTOR), content(sector, 1));
    frontend.heap.release(mark);
}

// --- the cache mode ----------------------------------------------------------------------------

#[test]
fn the_cache_mode_begins_as_the_option_says() {
    for (mode, writeback) in [
        ("writeback", 1),
        ("none", 1),
        ("unsafe", 1),
        ("writethrough", 0),
        ("directsync", 0),
    ] {
        let disk = Disk::serve(&["--cache", mode]);
        let mut frontend = disk.connect();
        assert_eq!(frontend.config().writeback, writeback, "{mode}");
        let mut ring = frontend.start_queue(0, 64);
        // Unaligned for direct I/O on purpose: an odd guest address.
        let addr = frontend.heap.take(8192, 4096) + 1;
        frontend.memory.write(addr, &blk::header(kind::OUT, 3));
        frontend.memory.write(addr + 16, &[0x42; 1536]);
        ring.submit(&[
            Part::readable(addr, 16),
            Part::readable(addr + 16, 1536),
            Part::writable(addr + 4096, 1),
        ]);
        assert_eq!(ring.pop().length, 1);
        assert_eq!(frontend.memory.read(addr + 4096, 1), [blk::OK], "{mode}");
        assert!(frontend.read(&mut ring, 3, 1536) == [0x42; 1536], "{mode}");
        frontend.succeed(&mut ring, &Request::flush());
        let bytes = disk.bytes();
        assert!(bytes[..3 * SECTOR] == content(0, 3), "{mode}");
        assert!(bytes[3 * SECTOR..6 * SECTOR] == [0x42; 1536], "{mode}");
        assert!(
            bytes[6 * SECTOR..] == content(6, DISK_SECTORS - 6),
            "{mode}"
        );
    }
}

#[test]
fn the_guest_switches_the_cache_mode_while_it_writes() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 256);
    for round in 0..10_u64 {
        let writeback = u8::from(round % 2 == 1);
        with_reads_in_flight(&mut frontend, &mut ring, |frontend, _| {
            frontend.set_writeback(writeback);
        });
        assert_eq!(frontend.config().writeback, writeback);
        frontend.write(&mut ring, 1000 + round, &[round as u8; SECTOR]);
        frontend.succeed(&mut ring, &Request::flush());
    }
}

#[test]
fn the_cache_mode_takes_nothing_but_zero_and_one() {
    let disk = Disk::serve(&[]);
    let frontend = disk.connect();
    let body = config_access(blk::WRITEBACK_OFFSET, 1, 0, &[7]);
    let verdict = frontend.connection.try_tell(code::SET_CONFIG, &body, &[]);
    if !verdict.is_refusal() {
        // Accepting it is allowed, if what is read back is a mode.
        assert!(frontend.config().writeback <= 1);
    }
}

// --- front-ends that come and go ---------------------------------------------------------------

#[test]
fn ten_front_ends_in_turn_leave_nothing_behind() {
    let disk = Disk::serve(&["--queues", "4"]);
    let turn = |number: u64| {
        let mut frontend = disk.connect();
        let _channel = frontend.open_backend_channel();
        let mut rings: Vec<_> = (0..4)
            .map(|queue| frontend.start_queue(queue, 64))
            .collect();
        for ring in &mut rings {
            let sector = 64 + u64::from(ring.queue);
            frontend.write(ring, sector, &[number as u8; SECTOR]);
            assert_eq!(frontend.read(ring, sector, SECTOR), [number as u8; SECTOR]);
        }
        // Half of them stop their rings first, half just go.
        if number.is_multiple_of(2) {
            for ring in &rings {
                frontend.stop_queue(ring);
            }
        }
    };
    turn(0);
    // What is made once, for the first front-end, may stay.
    eventually("the first front-end's memory is unmapped", || {
        disk.daemon.mapped_regions() == 0
    });
    std::thread::sleep(A_WHILE);
    let before = disk.footprint();
    for number in 1..=10 {
        turn(number);
    }
    disk.footprint_returns_to(before);
    disk.daemon.stop();
}

#[test]
fn a_front_end_that_dies_with_requests_in_flight_is_followed_by_the_next() {
    let disk = Disk::serve(&["--queues", "2"]);
    let old = content(8192, 64 * 128);
    let new = vec![0xd1; 128 * SECTOR];
    let turn = || {
        let mut frontend = disk.connect();
        let mut rings = [frontend.start_queue(0, 256), frontend.start_queue(1, 256)];
        for number in 0..64 {
            let ring = &mut rings[number as usize % 2];
            frontend.submit(ring, &Request::write(8192 + 128 * number, &new));
        }
        // Dropped with all of them in flight: socket, memory and events are gone.
    };
    turn();
    eventually("the first front-end's memory is unmapped", || {
        disk.daemon.mapped_regions() == 0
    });
    std::thread::sleep(A_WHILE);
    let before = disk.footprint();
    for _ in 0..10 {
        turn();
        let mut frontend = disk.connect();
        let mut ring = frontend.start_queue(0, 64);
        frontend.write(&mut ring, 1, &[0xab; SECTOR]);
        assert_eq!(frontend.read(&mut ring, 1, SECTOR), [0xab; SECTOR]);
        assert_eq!(frontend.read(&mut ring, 2, SECTOR), content(2, 1));
        // A request that was in flight may have been done or not: no sector is a third thing.
        for part in 0..8 {
            let sectors = 1024;
            let read = frontend.read(&mut ring, 8192 + part * sectors, sectors as usize * SECTOR);
            for (number, sector) in read.chunks(SECTOR).enumerate() {
                let at = (part * sectors) as usize * SECTOR + number * SECTOR;
                assert!(
                    sector == &new[..SECTOR] || sector == &old[at..at + SECTOR],
                    "sector {number} of part {part} is neither old nor new"
                );
            }
        }
    }
    disk.footprint_returns_to(before);
    disk.daemon.stop();
}

#[test]
fn completed_writes_outlive_their_front_end() {
    let disk = Disk::serve(&[]);
    let mut random = Random::announced("outlive");
    let data = random.bytes(64 * SECTOR);
    {
        let mut frontend = disk.connect();
        let mut ring = frontend.start_queue(0, 64);
        frontend.write(&mut ring, 500, &data);
    }
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    assert!(frontend.read(&mut ring, 500, data.len()) == data);
}

#[test]
fn a_second_front_end_does_not_disturb_the_first() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    // It may wait, be served or be sent away.
    let second = std::os::unix::net::UnixStream::connect(&disk.socket);
    for sector in 0..10 {
        assert_eq!(frontend.read(&mut ring, sector, SECTOR), content(sector, 1));
    }
    drop(second);
    drop(frontend);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    assert_eq!(frontend.read(&mut ring, 3, SECTOR), content(3, 1));
}

#[test]
fn an_idle_disk_costs_no_processor_time() {
    let disk = Disk::serve(&["--queues", "4"]);
    let mut frontend = disk.connect();
    let mut rings: Vec<_> = (0..4)
        .map(|queue| frontend.start_queue(queue, 64))
        .collect();
    for ring in &mut rings {
        assert_eq!(frontend.read(ring, 3, SECTOR), content(3, 1));
    }
    // Polling that follows a request may run out first.
    std::thread::sleep(A_WHILE);
    let before = disk.daemon.cpu_time();
    std::thread::sleep(Duration::from_secs(1));
    let used = disk.daemon.cpu_time() - before;
    assert!(used < Duration::from_millis(10), "{used:?} in a second");
    // It still wakes up.
    for ring in &mut rings {
        assert_eq!(frontend.read(ring, 3, SECTOR), content(3, 1));
    }
}

#[test]
fn resetting_the_owner_or_stopping_twice_is_survived() {
    let disk = Disk::serve(&["--queues", "1"]);
    {
        let mut frontend = disk.connect();
        let mut ring = frontend.start_queue(0, 64);
        assert_eq!(frontend.read(&mut ring, 1, SECTOR), content(1, 1));
        assert_eq!(frontend.stop_queue(&ring), 1);
        // Deprecated and answered differently by everybody; the ring is asked about again.
        let _ = frontend.connection.try_tell(code::RESET_OWNER, &[], &[]);
        let _ = frontend
            .connection
            .try_ask(code::GET_VRING_BASE, &ring_state(0, 0));
    }
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    assert_eq!(frontend.read(&mut ring, 2, SECTOR), content(2, 1));
}

#[test]
fn both_ends_agree_on_memory_that_is_shared_twice() {
    // The same file under two guest addresses, as a VMM maps an alias.
    let disk = Disk::serve(&["--queues", "1"]);
    let mut frontend = disk.connect();
    let region = frontend.memory.regions()[0].clone();
    let alias = 1_u64 << 40;
    let mut entry = region.entry;
    entry.guest_addr = alias;
    entry.user_addr = 0x6000_0000_0000;
    frontend.connection.tell(
        code::ADD_MEM_REG,
        &harness::frontend::connection::memory_region(entry),
        &[region.file()],
    );
    let mut ring = frontend.start_queue(0, 64);
    let (mut parts, pending) = frontend.place(&Request::read(12, SECTOR));
    let through_alias = |addr: u64| addr - MEMORY_START + alias;
    parts[0].addr = through_alias(parts[0].addr);
    parts[1].addr = through_alias(parts[1].addr);
    ring.submit(&parts);
    ring.pop();
    assert_eq!(frontend.memory.read(pending.status, 1), [blk::OK]);
    assert_eq!(frontend.memory.read(pending.input, SECTOR), content(12, 1));
    // The harness's own view has no alias.
    assert_eq!(GuestMemory::regions(&frontend.memory).len(), 1);
}
