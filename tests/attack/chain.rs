//! Descriptor chains that are no requests, and requests that no driver may send.

use harness::frontend::blk::{self, Request, kind};
use harness::frontend::memory::GuestMemory;
use harness::frontend::ring::{Descriptor, INDIRECT, NEXT, Part, Ring, WRITE, chain};
use harness::frontend::{Frontend, MEMORY_BYTES, MEMORY_START, Pending};

use crate::{Arena, Fate, SECTOR, breakage, content, fate, works};

const MEMORY_END: u64 = MEMORY_START + MEMORY_BYTES;

/// The buffers of one request that an attack is made of: one sector, at sector 8.
struct Victim {
    header: Part,
    data: Part,
    status: Part,
    /// Room for tables of descriptors.
    table: u64,
}

impl Victim {
    fn parts(&self) -> Vec<Part> {
        vec![self.header, self.data, self.status]
    }

    fn data_flags(&self) -> u16 {
        if self.data.writable { WRITE } else { 0 }
    }
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

fn write_table(memory: &GuestMemory, table: u64, entries: &[Descriptor]) {
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_bytes()).collect();
    memory.write(table, &bytes);
}

/// For each case, sends what `build` lays out, once as a read and once as a write, and requires
/// an error: in the status where the device can reach it, else in the fate of the queue.
/// `build` returns the head.
#[track_caller]
fn are_errors<Case: Copy>(
    cases: &[Case],
    build: impl Fn(Case, &mut Frontend, &mut Ring, &Victim) -> u16,
) {
    let arena = Arena::new();
    for &case in cases {
        for request in [Request::read(8, SECTOR), Request::write(8, &[0xbd; SECTOR])] {
            let mut frontend = arena.attacker();
            let mut ring = frontend.start_queue(0, 64);
            let mut other = frontend.start_queue(1, 64);
            let (parts, pending) = frontend.place(&request);
            let table = frontend.heap.take(1 << 20, 4096);
            let victim = Victim {
                header: parts[0],
                data: parts[1],
                status: parts[2],
                table,
            };
            let head = build(case, &mut frontend, &mut ring, &victim);
            ring.offer(head);
            ring.publish();
            ring.kick_if_wanted();
            ends_in_error(&frontend, &ring, &pending);
            after_an_error(&mut frontend, &mut ring, &mut other);
        }
    }
    arena.verdict();
}

#[track_caller]
fn is_an_error(build: impl Fn(&mut Frontend, &mut Ring, &Victim) -> u16) {
    are_errors(&[()], |(), frontend, ring, victim| {
        build(frontend, ring, victim)
    });
}

/// A well-formed chain over other parts than those of the victim.
#[track_caller]
fn parts_are_errors<Case: Copy>(cases: &[Case], change: impl Fn(Case, &Victim) -> Vec<Part>) {
    are_errors(cases, |case, _, ring, victim| {
        ring.lay_out(&change(case, victim))
    });
}

#[track_caller]
fn parts_are_an_error(change: impl Fn(&Victim) -> Vec<Part>) {
    parts_are_errors(&[()], |(), victim| change(victim));
}

/// A chain of one indirect descriptor to a table of the victim's parts, changed at will.
#[track_caller]
fn indirect_are_errors<Case: Copy>(
    cases: &[Case],
    change: impl Fn(Case, &mut Vec<Descriptor>, &mut Descriptor, &Victim),
) {
    are_errors(cases, |case, frontend, ring, victim| {
        let mut entries = chain(&victim.parts(), &[0, 1, 2]);
        let mut outer = descriptor(victim.table, 48, INDIRECT, 0);
        change(case, &mut entries, &mut outer, victim);
        write_table(&frontend.memory, victim.table, &entries);
        ring.set_descriptor(0, outer);
        0
    });
}

#[track_caller]
fn indirect_is_an_error(change: impl Fn(&mut Vec<Descriptor>, &mut Descriptor, &Victim)) {
    indirect_are_errors(&[()], |(), entries, outer, victim| {
        change(entries, outer, victim);
    });
}

#[track_caller]
fn ends_in_error(frontend: &Frontend, ring: &Ring, pending: &Pending) {
    let fate = fate(frontend, ring);
    let status = frontend.memory.read(pending.status, 1)[0];
    assert_ne!(status, blk::OK, "a broken chain was a success ({fate:?})");
}

/// A queue that returned the chain goes on; one that is broken does not take the other along.
#[track_caller]
fn after_an_error(frontend: &mut Frontend, ring: &mut Ring, other: &mut Ring) {
    match breakage(frontend, ring) {
        None => {
            let served = ring.used_index().wrapping_add(1);
            frontend.stop_queue(ring);
            // The driver's own books are wrong now; it begins anew.
            assert!(ring.peek().is_some(), "chain {served} was taken back");
            ring.reset();
            frontend.start(ring, 0);
            works(frontend, ring);
            works(frontend, other);
        }
        Some(Fate::Closed) => {}
        Some(_) => works(frontend, other),
    }
}

// --- links -------------------------------------------------------------------------------------

#[test]
fn a_descriptor_loop_is_an_error() {
    is_an_error(|_, ring, victim| {
        let flags = victim.data_flags() | NEXT;
        ring.set_descriptor(0, descriptor(victim.header.addr, 16, NEXT, 1));
        ring.set_descriptor(1, descriptor(victim.data.addr, 512, flags, 2));
        ring.set_descriptor(2, descriptor(victim.data.addr, 512, flags, 1));
        0
    });
}

#[test]
fn a_descriptor_that_is_its_own_next_is_an_error() {
    is_an_error(|_, ring, victim| {
        ring.set_descriptor(0, descriptor(victim.header.addr, 16, NEXT, 0));
        0
    });
}

#[test]
fn a_next_outside_the_table_is_an_error() {
    are_errors(&[64, 65, 0x7fff, 0xffff], |next, _, ring, victim| {
        ring.set_descriptor(0, descriptor(victim.header.addr, 16, NEXT, 1));
        let flags = victim.data_flags() | NEXT;
        ring.set_descriptor(1, descriptor(victim.data.addr, 512, flags, next));
        0
    });
}

#[test]
fn a_chain_with_more_segments_than_offered_is_an_error() {
    let arena = Arena::new();
    let mut frontend = arena.attacker();
    let segments = frontend.config().seg_max + 1;
    let size = (segments + 2).next_power_of_two().max(64) as u16;
    let mut ring = frontend.start_queue(0, size);
    let mut other = frontend.start_queue(1, 64);
    let request = Request::read(0, segments as usize * SECTOR);
    let (parts, pending) = frontend.place(&request);
    let mut many = vec![parts[0]];
    many.extend(
        (0..segments).map(|number| Part::writable(parts[1].addr + u64::from(number) * 512, 512)),
    );
    many.push(parts[2]);
    ring.submit(&many);
    ends_in_error(&frontend, &ring, &pending);
    after_an_error(&mut frontend, &mut ring, &mut other);
    drop(frontend);
    arena.verdict();
}

// --- indirect tables ---------------------------------------------------------------------------

#[test]
fn an_indirect_table_in_an_indirect_table_is_an_error() {
    is_an_error(|frontend, ring, victim| {
        let inner = chain(&victim.parts(), &[0, 1, 2]);
        let table = victim.table + 4096;
        write_table(&frontend.memory, table, &inner);
        let outer = descriptor(table, 48, INDIRECT, 0);
        write_table(&frontend.memory, victim.table, &[outer]);
        ring.set_descriptor(0, descriptor(victim.table, 16, INDIRECT, 0));
        0
    });
}

#[test]
fn an_indirect_table_that_names_itself_is_an_error() {
    indirect_is_an_error(|entries, outer, victim| {
        *entries = vec![descriptor(victim.table, 16, INDIRECT, 0)];
        outer.len = 16;
    });
}

#[test]
fn an_indirect_table_of_no_whole_number_of_descriptors_is_an_error() {
    indirect_are_errors(&[1, 15, 47, 49, 56], |len, _, outer, _| outer.len = len);
}

#[test]
fn an_empty_indirect_table_is_an_error() {
    indirect_is_an_error(|_, outer, _| outer.len = 0);
}

#[test]
fn an_indirect_table_outside_memory_is_an_error() {
    let outside = [
        0,
        MEMORY_END,
        MEMORY_END - 16,
        1 << 50,
        u64::MAX - 47,
        u64::MAX - 15,
    ];
    indirect_are_errors(&outside, |addr, _, outer, _| outer.addr = addr);
}

#[test]
fn a_next_outside_the_indirect_table_is_an_error() {
    indirect_are_errors(&[3, 4, 0xffff], |next, entries, _, _| {
        entries[1].next = next;
    });
}

#[test]
fn a_loop_in_an_indirect_table_is_an_error() {
    indirect_is_an_error(|entries, _, _| {
        entries[2].flags |= NEXT;
        entries[2].next = 1;
    });
}

#[test]
fn an_indirect_table_cut_short_is_an_error() {
    // The status is behind the end of the table.
    indirect_is_an_error(|_, outer, _| outer.len = 32);
}

#[test]
fn huge_indirect_tables_are_errors_and_hold_up_nobody() {
    let arena = Arena::new();
    let mut frontend = arena.attacker();
    let mut ring = frontend.start_queue(0, 64);
    let mut other = frontend.start_queue(1, 64);
    let (parts, pending) = frontend.place(&Request::read(8, SECTOR));
    let count = 65535_u32;
    let table = frontend.heap.take(16 * u64::from(count), 4096);
    let mut entries = vec![descriptor(parts[0].addr, 16, NEXT, 1)];
    // Data of one byte each: together fewer than the disk has.
    entries.extend((2..count).map(|next| descriptor(parts[1].addr, 1, WRITE | NEXT, next as u16)));
    entries.push(descriptor(parts[2].addr, 1, WRITE, 0));
    write_table(&frontend.memory, table, &entries);
    for index in 0..16 {
        ring.set_descriptor(index, descriptor(table, 16 * count, INDIRECT, 0));
        ring.offer(index);
    }
    ring.publish();
    ring.kick_if_wanted();
    arena.load.goes_on();
    ends_in_error(&frontend, &ring, &pending);
    works(&mut frontend, &mut other);
    drop(frontend);
    arena.verdict();
}

// --- buffers -----------------------------------------------------------------------------------

#[test]
fn a_header_of_fifteen_bytes_is_an_error() {
    parts_are_an_error(|victim| {
        vec![
            Part::readable(victim.header.addr, 15),
            Part::writable(victim.data.addr, 512),
            victim.status,
        ]
    });
}

#[test]
fn a_chain_without_a_header_is_an_error() {
    parts_are_an_error(|victim| vec![Part::writable(victim.data.addr, 512), victim.status]);
}

#[test]
fn a_chain_of_a_status_alone_is_an_error() {
    parts_are_an_error(|victim| vec![victim.status]);
}

#[test]
fn a_chain_without_a_status_is_an_error() {
    parts_are_an_error(|victim| vec![victim.header]);
    parts_are_an_error(|victim| vec![victim.header, Part::readable(victim.data.addr, 512)]);
}

#[test]
fn a_status_that_is_not_writable_is_an_error() {
    parts_are_an_error(|victim| {
        vec![
            victim.header,
            Part::readable(victim.data.addr, 512),
            Part::readable(victim.status.addr, 1),
        ]
    });
}

#[test]
fn a_status_of_no_bytes_is_an_error() {
    is_an_error(|_, ring, victim| {
        // As a write, so that the sector could not be taken for data and status.
        let data = Part::readable(victim.data.addr, 512);
        ring.lay_out(&[victim.header, data, Part::writable(victim.status.addr, 0)])
    });
}

#[test]
fn buffers_outside_memory_are_errors() {
    let outside = [
        0,
        MEMORY_START - 512,
        MEMORY_START - 1,
        MEMORY_END - 511,
        MEMORY_END - 1,
        MEMORY_END,
        1 << 47,
        1 << 63,
        u64::MAX - 511,
        u64::MAX,
    ];
    parts_are_errors(&outside, |addr, victim| {
        let data = Part {
            addr,
            ..victim.data
        };
        vec![victim.header, data, victim.status]
    });
}

#[test]
fn a_header_outside_memory_is_an_error() {
    let outside = [0, MEMORY_END - 8, MEMORY_END, u64::MAX - 15, u64::MAX];
    parts_are_errors(&outside, |addr, victim| {
        vec![Part::readable(addr, 16), victim.data, victim.status]
    });
}

#[test]
fn a_status_outside_memory_is_an_error() {
    parts_are_errors(&[0, MEMORY_END, u64::MAX], |addr, victim| {
        vec![victim.header, victim.data, Part::writable(addr, 1)]
    });
}

#[test]
fn a_buffer_of_almost_four_gigabytes_is_an_error() {
    let lengths = [u32::MAX, u32::MAX - 511, 1 << 31, MEMORY_BYTES as u32 + 512];
    parts_are_errors(&lengths, |len, victim| {
        let data = Part { len, ..victim.data };
        vec![victim.header, data, victim.status]
    });
}

#[test]
fn lengths_that_overflow_when_added_are_an_error() {
    // 2^32 and one sector: one sector, to who adds in 32 bits.
    parts_are_an_error(|victim| {
        let mut parts = vec![victim.header];
        for len in [1 << 31, 1 << 31, 512] {
            parts.push(Part { len, ..victim.data });
        }
        parts.push(victim.status);
        parts
    });
}

#[test]
fn a_whole_ring_of_the_same_huge_buffer_costs_no_memory() {
    let arena = Arena::new();
    let before = arena.daemon.resident_bytes();
    let mut frontend = arena.attacker();
    let mut ring = frontend.start_queue(0, 64);
    let (parts, pending) = frontend.place(&Request::read(0, SECTOR));
    // The whole of memory, in as many segments as fit: far more than the disk has.
    let mut many = vec![parts[0]];
    many.extend((0..60).map(|_| Part::writable(MEMORY_START, MEMORY_BYTES as u32)));
    many.push(parts[2]);
    ring.submit(&many);
    ends_in_error(&frontend, &ring, &pending);
    let grown = arena.daemon.resident_bytes().saturating_sub(before);
    // Guest memory that the daemon looked at counts as resident, too.
    assert!(grown < 16 << 20, "{grown} bytes more");
    drop(frontend);
    arena.verdict();
}

#[test]
fn empty_buffers_in_a_chain_are_skipped_or_an_error() {
    let arena = Arena::new();
    for (kind, request) in [
        (kind::IN, Request::read(8, SECTOR)),
        (kind::OUT, Request::write(3000, &[0x3c; SECTOR])),
    ] {
        for position in 0..=3 {
            let mut frontend = arena.attacker();
            let mut ring = frontend.start_queue(0, 64);
            let mut other = frontend.start_queue(1, 64);
            let (mut parts, pending) = frontend.place(&request);
            // Of the kind of its neighbour, so that readable ones stay in front.
            let writable = position > if kind == kind::IN { 0 } else { 1 };
            parts.insert(
                position,
                Part {
                    addr: parts[0].addr,
                    len: 0,
                    writable,
                },
            );
            let head = ring.submit(&parts);
            let fate = fate(&frontend, &ring);
            let status = frontend.memory.read(pending.status, 1)[0];
            if status == blk::OK {
                assert_eq!(fate, Fate::Used(request.input_bytes as u32 + 1));
                let used = ring.pop();
                let outcome = frontend.outcome(&Pending { head, ..pending }, used);
                assert_eq!(outcome.status, blk::OK);
                if kind == kind::IN {
                    assert_eq!(outcome.data, content(8, 1));
                } else {
                    assert_eq!(frontend.read(&mut ring, 3000, SECTOR), [0x3c; SECTOR]);
                }
                works(&mut frontend, &mut ring);
            } else {
                after_an_error(&mut frontend, &mut ring, &mut other);
            }
        }
    }
    arena.verdict();
}

// --- requests that no driver may send ----------------------------------------------------------

/// Sends a request whose chain is sound. It must be answered with an error.
#[track_caller]
fn requests_are_errors(requests: &[Request]) {
    let arena = Arena::new();
    let mut frontend = arena.attacker();
    let mut ring = frontend.start_queue(0, 64);
    for request in requests {
        let status = frontend.status(&mut ring, request);
        assert!(
            status == blk::IOERR || status == blk::UNSUPP,
            "type {} with {} and {} bytes: status {status}",
            request.kind,
            request.output.len(),
            request.input_bytes
        );
    }
    works(&mut frontend, &mut ring);
    drop(frontend);
    arena.verdict();
}

#[test]
fn get_id_without_a_buffer_is_an_error() {
    requests_are_errors(&[Request {
        input_bytes: 0,
        ..Request::get_id()
    }]);
}

#[test]
fn get_id_writes_no_more_than_its_buffer_holds() {
    let arena = Arena::new();
    let mut frontend = arena.attacker();
    let mut ring = frontend.start_queue(0, 64);
    for input_bytes in [1, 10, 19, 20, 21, 512] {
        let request = Request {
            input_bytes,
            ..Request::get_id()
        };
        let mark = frontend.heap.mark();
        frontend.memory.write(mark, &[0; 4096]);
        let pending = frontend.submit(&mut ring, &request);
        let used = ring.pop();
        assert!(used.length as usize <= input_bytes + 1);
        let outcome = frontend.outcome(&pending, used);
        assert_ne!(outcome.status, blk::UNTOUCHED);
        let behind = frontend.memory.read(pending.status + 1, 1)[0];
        assert_eq!(behind, 0, "written behind the status");
        if input_bytes > 20 {
            assert!(
                outcome.data[20..]
                    .iter()
                    .all(|&byte| byte == blk::UNTOUCHED),
                "more than twenty bytes were written"
            );
        }
        frontend.heap.release(mark);
    }
    drop(frontend);
    arena.verdict();
}

#[test]
fn discards_of_no_or_broken_ranges_are_errors() {
    let mut requests = Vec::new();
    for bytes in [1, 8, 15, 17, 24] {
        for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
            requests.push(Request {
                kind,
                sector: 0,
                output: vec![0; bytes],
                input_bytes: 0,
            });
        }
    }
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        requests.push(Request {
            kind,
            sector: 0,
            output: Vec::new(),
            input_bytes: 0,
        });
    }
    requests_are_errors(&requests);
}

#[test]
fn discards_of_ranges_outside_the_disk_are_errors() {
    let mut requests = Vec::new();
    for (sector, sectors) in [
        (0, u32::MAX),
        (1, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 7, 8),
        (u64::MAX, u32::MAX),
        (1 << 55, 8),
        (4096, 1),
    ] {
        let segments = [blk::segment(sector, sectors, 0)];
        requests.push(Request::discard(&segments));
        requests.push(Request::write_zeroes(&segments));
    }
    requests_are_errors(&requests);
}

#[test]
fn discards_of_more_ranges_than_offered_are_errors() {
    let arena = Arena::new();
    let mut frontend = arena.attacker();
    let config = frontend.config();
    let mut ring = frontend.start_queue(0, 64);
    for (limit, kind) in [
        (config.max_discard_seg, kind::DISCARD),
        (config.max_write_zeroes_seg, kind::WRITE_ZEROES),
    ] {
        for count in [limit + 1, 65536] {
            // One sector each, all the same, in the kept part: none may be done.
            let segments = vec![blk::segment(8, 1, 0); count as usize];
            let request = Request {
                kind,
                ..Request::discard(&segments)
            };
            let status = frontend.status(&mut ring, &request);
            assert!(
                status == blk::IOERR || status == blk::UNSUPP,
                "{count} ranges: status {status}"
            );
            arena.load.goes_on();
        }
    }
    works(&mut frontend, &mut ring);
    drop(frontend);
    arena.verdict();
}

#[test]
fn odd_requests_are_answered() {
    let arena = Arena::new();
    let mut frontend = arena.attacker();
    let mut ring = frontend.start_queue(0, 64);
    for kind in [
        kind::IN,
        kind::OUT,
        kind::FLUSH,
        kind::GET_ID,
        kind::DISCARD,
        kind::WRITE_ZEROES,
        77,
    ] {
        for output in [0, 1, 512, 65536] {
            for input_bytes in [0, 1, 512, 65536] {
                let request = Request {
                    kind,
                    sector: 3000,
                    output: vec![0; output],
                    input_bytes,
                };
                // Which status is a matter of taste for some; none may hang or kill.
                frontend.status(&mut ring, &request);
            }
        }
    }
    works(&mut frontend, &mut ring);
    drop(frontend);
    // Zeros are a range of no sectors at sector 0, which changes nothing.
    arena.verdict();
}
