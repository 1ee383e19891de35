//! How a request may lie in memory: split, joined, across regions, indirect.

use harness::frontend::blk::{self, Outcome, Request, kind};
use harness::frontend::connection::{code, memory_region};
use harness::frontend::ring::{Descriptor, INDIRECT, Part, Ring, WRITE, chain};
use harness::frontend::{Frontend, MEMORY_BYTES, MEMORY_START, Pending, Wanted};
use harness::random::Random;

use crate::{Disk, SECTOR, content};
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
) -> Outcome {
    let (parts, pending) = frontend.place(request);
    let head = ring.submit(&split(&parts, readable, writable));
    let used = ring.pop();
    frontend.outcome(&Pending { head, ..pending }, used)
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
    frontend
        .connection
        .tell(code::ADD_MEM_REG, &memory_region(entry), &[region.file()]);
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
            let pending = Pending { head, ..pending };
            let outcome = frontend.outcome(&pending, used);
            assert_eq!((outcome.status, outcome.used_length), (blk::OK, 2049));
            assert!(outcome.data == content(sector, 4));
        }
        frontend.stop_queue(&ring);
    }
}

#[test]
fn the_write_flag_of_an_indirect_descriptor_means_nothing() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 16);
    let (parts, pending) = frontend.place(&Request::read(4, SECTOR));
    let table = frontend.heap.take(16 * parts.len() as u64, 16);
    let head = ring.lay_out_indirect(table, &parts);
    ring.set_descriptor(
        head,
        Descriptor {
            addr: table,
            len: 16 * parts.len() as u32,
            flags: INDIRECT | WRITE,
            next: 0,
        },
    );
    ring.offer(head);
    ring.publish();
    ring.kick_if_wanted();
    let used = ring.pop();
    let outcome = frontend.outcome(&Pending { head, ..pending }, used);
    assert_eq!((outcome.status, outcome.used_length), (blk::OK, 513));
    assert_eq!(outcome.data, content(4, 1));
}

#[test]
fn an_indirect_table_may_end_a_chain() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 16);
    let (parts, pending) = frontend.place(&Request::read(4, SECTOR));
    // The header in a descriptor of the ring, data and status in the table.
    let table = frontend.heap.take(32, 16);
    for (index, entry) in chain(&parts[1..], &[0, 1]).iter().enumerate() {
        let at = table + 16 * index as u64;
        frontend.memory.write(at, &entry.to_bytes());
    }
    let head = ring.lay_out(&[parts[0], Part::readable(table, 32)]);
    ring.set_descriptor(
        head - 1,
        Descriptor {
            addr: table,
            len: 32,
            flags: INDIRECT,
            next: 0,
        },
    );
    ring.offer(head);
    ring.publish();
    ring.kick_if_wanted();
    let used = ring.pop();
    let outcome = frontend.outcome(&Pending { head, ..pending }, used);
    assert_eq!((outcome.status, outcome.used_length), (blk::OK, 513));
    assert_eq!(outcome.data, content(4, 1));
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
    let outcome = frontend.outcome(&Pending { head, ..pending }, used);
    assert_eq!(outcome.status, blk::OK);
    assert!(outcome.data == content(100, u64::from(segments)));
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
    frontend
        .connection
        .tell(code::ADD_MEM_REG, &memory_region(entry), &[region.file()]);
    let mut ring = frontend.start_queue(0, 64);
    let (mut parts, pending) = frontend.place(&Request::read(12, SECTOR));
    let through_alias = |addr: u64| addr - MEMORY_START + alias;
    parts[0].addr = through_alias(parts[0].addr);
    parts[1].addr = through_alias(parts[1].addr);
    ring.submit(&parts);
    ring.pop();
    assert_eq!(frontend.memory.read(pending.status, 1), [blk::OK]);
    assert_eq!(frontend.memory.read(pending.input, SECTOR), content(12, 1));
}
