//! Memory regions that lie about themselves, or change under the daemon.

use std::fs::File;
use std::io::pipe;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use harness::frontend::blk::{self, Request};
use harness::frontend::connection::{
    Verdict, code, memory_region, memory_table, protocol, ring_state,
};
use harness::frontend::event::Event;
use harness::frontend::memory::{Region, RegionEntry, USER_OFFSET, memory_file};
use harness::frontend::ring::Part;
use harness::frontend::{Frontend, LIMIT, MEMORY_BYTES, MEMORY_START, Wanted};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::{A_WHILE, Arena, Fate, SECTOR, breakage, breaks, fate, works};

const EXTRA: u64 = 1 << 32;
const EXTRA_BYTES: u64 = 1 << 20;
const HUGE: u64 = 2 << 20;

fn entry(guest_addr: u64, bytes: u64) -> RegionEntry {
    RegionEntry {
        guest_addr,
        bytes,
        user_addr: guest_addr.wrapping_add(USER_OFFSET),
        mmap_offset: 0,
    }
}

fn add(frontend: &Frontend, entry: RegionEntry, file: BorrowedFd<'_>) -> Verdict {
    frontend
        .connection
        .try_tell(code::ADD_MEM_REG, &memory_region(entry), &[file])
}

/// Adds a region beside sound memory, in both ways. It must be refused.
#[track_caller]
fn regions_are_refused(cases: &[(RegionEntry, BorrowedFd<'_>)]) {
    let arena = Arena::new();
    for &(entry, file) in cases {
        let frontend = arena.attacker();
        let verdict = add(&frontend, entry, file);
        assert!(verdict.is_refusal(), "{entry:x?} was added");
        drop(frontend);

        let wanted = Wanted::default().without_protocol(protocol::CONFIGURE_MEM_SLOTS);
        let frontend = arena.attacker_with(&wanted);
        let sound = &frontend.memory.regions()[0];
        let verdict = frontend.connection.try_tell(
            code::SET_MEM_TABLE,
            &memory_table(2, &[sound.entry, entry]),
            &[sound.file(), file],
        );
        assert!(verdict.is_refusal(), "{entry:x?} was taken in a table");
    }
    arena.verdict();
}

// --- what regions say --------------------------------------------------------------------------

#[test]
fn a_region_longer_than_its_file_is_refused() {
    let file = memory_file(EXTRA_BYTES);
    let empty = memory_file(0);
    let mut behind = entry(EXTRA, EXTRA_BYTES);
    behind.mmap_offset = 4096;
    regions_are_refused(&[
        (entry(EXTRA, EXTRA_BYTES + 1), file.as_fd()),
        (entry(EXTRA, EXTRA_BYTES + 4096), file.as_fd()),
        (entry(EXTRA, 1 << 45), file.as_fd()),
        (entry(EXTRA, 4096), empty.as_fd()),
        (behind, file.as_fd()),
    ]);
}

#[test]
fn an_empty_region_is_refused() {
    let file = memory_file(EXTRA_BYTES);
    regions_are_refused(&[(entry(EXTRA, 0), file.as_fd())]);
}

#[test]
fn a_region_that_wraps_around_is_refused() {
    let file = memory_file(EXTRA_BYTES);
    let mut user = entry(EXTRA, EXTRA_BYTES);
    user.user_addr = u64::MAX - 4095;
    let mut offset = entry(EXTRA, EXTRA_BYTES);
    offset.mmap_offset = u64::MAX - 4095;
    let mut negative = entry(EXTRA, EXTRA_BYTES);
    negative.mmap_offset = 1 << 63;
    regions_are_refused(&[
        (entry(u64::MAX - 4095, EXTRA_BYTES), file.as_fd()),
        (entry(u64::MAX - 4095, u64::MAX), file.as_fd()),
        (entry(4096, u64::MAX), file.as_fd()),
        (entry(0, u64::MAX - 4095), file.as_fd()),
        (user, file.as_fd()),
        (offset, file.as_fd()),
        (negative, file.as_fd()),
    ]);
}

#[test]
fn overlapping_regions_are_refused() {
    let file = memory_file(MEMORY_BYTES);
    regions_are_refused(&[
        (entry(MEMORY_START, MEMORY_BYTES), file.as_fd()),
        (entry(MEMORY_START, 4096), file.as_fd()),
        (entry(MEMORY_START + 4096, 4096), file.as_fd()),
        (entry(MEMORY_START - 4096, 8192), file.as_fd()),
        (
            entry(MEMORY_START + MEMORY_BYTES - 4096, 8192),
            file.as_fd(),
        ),
        (entry(MEMORY_START - 4096, MEMORY_BYTES), file.as_fd()),
    ]);
}

#[test]
fn a_region_whose_descriptor_is_no_memory_is_refused() {
    let (reader, _writer) = pipe().expect("no pipe");
    let event = Event::new();
    let directory = File::open("/").expect("it is there");
    let null = File::open("/dev/null").expect("it is there");
    let socket = std::os::unix::net::UnixStream::pair()
        .expect("no sockets")
        .0;
    let region = entry(EXTRA, 4096);
    regions_are_refused(&[
        (region, reader.as_fd()),
        (region, event.as_fd()),
        (region, directory.as_fd()),
        (region, null.as_fd()),
        (region, socket.as_fd()),
    ]);
}

/// Huge pages, of which the host may have none: touching them is then an error.
fn huge_memory() -> Option<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("huge", flags).ok()?;
    ftruncate(&file, HUGE).expect("a memory file can grow");
    Some(file)
}

#[test]
fn a_part_of_a_huge_page_is_refused() {
    let Some(file) = huge_memory() else {
        return eprintln!("this host has no huge pages at all");
    };
    regions_are_refused(&[
        (entry(EXTRA, 4096), file.as_fd()),
        (entry(EXTRA, HUGE - 4096), file.as_fd()),
    ]);
}

#[test]
fn a_ring_in_huge_pages_that_the_host_does_not_have_harms_nobody_else() {
    let arena = Arena::new();
    for bytes in [4096, HUGE] {
        let Some(file) = huge_memory() else {
            return eprintln!("this host has no huge pages at all");
        };
        let mut frontend = arena.attacker();
        if add(&frontend, entry(EXTRA, bytes), file.as_fd()).is_refusal() {
            continue;
        }
        let mut ring = frontend.new_ring(0, 64);
        ring.areas.used = EXTRA;
        // Its first store there may end the connection at any of these messages.
        let _ = frontend.try_set_up(&ring, 0);
        let enable = ring_state(0, 1);
        let _ = frontend
            .connection
            .try_tell(code::SET_VRING_ENABLE, &enable, &[]);
        std::thread::sleep(A_WHILE);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn a_region_whose_file_may_not_be_written_is_refused() {
    let file: OwnedFd = memory_file(EXTRA_BYTES);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = File::open(path).expect("it can be opened again");
    regions_are_refused(&[(entry(EXTRA, EXTRA_BYTES), read_only.as_fd())]);
}

#[test]
fn a_memory_table_that_lies_about_its_length_is_refused() {
    let arena = Arena::new();
    for (count, listed) in [
        (0_u32, 1_usize),
        (2, 1),
        (5, 1),
        (1, 2),
        (9, 8),
        (33, 33),
        (64, 33),
        (u32::MAX, 1),
        (0x1000_0000, 1),
    ] {
        let wanted = Wanted::default().without_protocol(protocol::CONFIGURE_MEM_SLOTS);
        let frontend = arena.attacker_with(&wanted);
        let regions: Vec<_> = (0..listed as u64)
            .map(|number| Region::new(EXTRA + (number << 20), 4096))
            .collect();
        let entries: Vec<_> = regions.iter().map(|region| region.entry).collect();
        let files: Vec<_> = regions.iter().map(Region::file).collect();
        let verdict = frontend.connection.try_tell(
            code::SET_MEM_TABLE,
            &memory_table(count, &entries),
            &files,
        );
        assert!(
            verdict.is_refusal(),
            "{count} regions claimed, {listed} listed"
        );
    }
    arena.verdict();
}

#[test]
fn more_regions_than_slots_are_refused() {
    let arena = Arena::new();
    {
        let frontend = arena.attacker();
        let slots = frontend
            .connection
            .ask(code::GET_MAX_MEM_SLOTS, &[])
            .number();
        assert!(slots <= 1024, "{slots} slots are not worth trying");
        let file = memory_file(4096);
        // The guest's memory has one of them.
        for number in 1..slots {
            let verdict = add(&frontend, entry(EXTRA + (number << 13), 4096), file.as_fd());
            assert_eq!(verdict, Verdict::Accepted, "region {number} of {slots}");
        }
        let verdict = add(&frontend, entry(EXTRA, 4096), file.as_fd());
        assert!(verdict.is_refusal(), "one more than {slots} was added");
    }
    arena.verdict();
}

#[test]
fn removing_what_is_not_there_is_refused() {
    let arena = Arena::new();
    for region in [
        entry(EXTRA, 4096),
        entry(MEMORY_START, MEMORY_BYTES - 4096),
        entry(MEMORY_START + 4096, MEMORY_BYTES - 4096),
        entry(0, 0),
    ] {
        let frontend = arena.attacker();
        let verdict = frontend
            .connection
            .try_tell(code::REM_MEM_REG, &memory_region(region), &[]);
        assert!(verdict.is_refusal(), "{region:x?} was removed");
    }
    arena.verdict();
}

// --- memory that changes under a running ring --------------------------------------------------

#[test]
fn data_in_memory_that_was_cut_off_is_an_error() {
    let arena = Arena::new();
    for request in [Request::read(8, SECTOR), Request::write(3000, &[1; SECTOR])] {
        let mut frontend = arena.attacker();
        let region = frontend.memory.add(EXTRA, EXTRA_BYTES);
        frontend.share_region(&region);
        let mut ring = frontend.start_queue(0, 64);
        works(&mut frontend, &mut ring);
        let (mut parts, pending) = frontend.place(&request);
        parts[1].addr = EXTRA + EXTRA_BYTES - 4096;
        region.truncate(4096);
        ring.submit(&parts);
        let fate = fate(&frontend, &ring);
        let status = frontend.memory.read(pending.status, 1)[0];
        assert_ne!(status, blk::OK, "{fate:?}");
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn odd_data_in_memory_that_was_cut_off_is_an_error() {
    // Not aligned and in odd pieces, so that a daemon is tempted to copy by itself.
    let arena = Arena::new();
    for write in [false, true] {
        let mut frontend = arena.attacker();
        let region = frontend.memory.add(EXTRA, EXTRA_BYTES);
        frontend.share_region(&region);
        let mut ring = frontend.start_queue(0, 64);
        let request = if write {
            Request::write(3000, &[1; SECTOR])
        } else {
            Request::read(8, SECTOR)
        };
        let (parts, pending) = frontend.place(&request);
        let gone = EXTRA + EXTRA_BYTES - 4096 + 1;
        let piece = |addr, len| Part {
            addr,
            len,
            writable: !write,
        };
        region.truncate(4096);
        ring.submit(&[
            parts[0],
            piece(gone, 1),
            piece(gone + 7, 510),
            piece(gone + 1000, 1),
            parts[2],
        ]);
        let fate = fate(&frontend, &ring);
        let status = frontend.memory.read(pending.status, 1)[0];
        assert_ne!(status, blk::OK, "{fate:?}");
        arena.load.goes_on();
    }
    arena.verdict();
}

/// Which part of a request, or of a ring, is cut off.
#[derive(Clone, Copy, Debug)]
enum CutOff {
    Header,
    Status,
    IndirectTable,
    DiscardRanges,
    SerialBuffer,
}

#[test]
fn what_the_daemon_reads_itself_in_memory_that_was_cut_off_ends_the_connection_only() {
    let arena = Arena::new();
    for what in [
        CutOff::Header,
        CutOff::Status,
        CutOff::IndirectTable,
        CutOff::DiscardRanges,
        CutOff::SerialBuffer,
    ] {
        let mut frontend = arena.attacker();
        let region = frontend.memory.add(EXTRA, EXTRA_BYTES);
        frontend.share_region(&region);
        let mut ring = frontend.start_queue(0, 64);
        works(&mut frontend, &mut ring);
        let request = match what {
            CutOff::DiscardRanges => Request::discard(&[blk::segment(8, 8, 0)]),
            CutOff::SerialBuffer => Request::get_id(),
            _ => Request::read(8, SECTOR),
        };
        let (mut parts, pending) = frontend.place(&request);
        let gone = EXTRA + EXTRA_BYTES - 8192;
        let head = match what {
            CutOff::IndirectTable => ring.lay_out_indirect(gone, &parts),
            _ => {
                let part = match what {
                    CutOff::Header => 0,
                    CutOff::Status => 2,
                    _ => 1,
                };
                parts[part].addr = gone;
                ring.lay_out(&parts)
            }
        };
        region.truncate(4096);
        ring.offer(head);
        ring.publish();
        ring.kick_if_wanted();
        let fate = fate(&frontend, &ring);
        let status = frontend.memory.read(pending.status, 1)[0];
        // Who reads zeros in place of what is gone may take them for a request, if that is the
        // last that it does for this front-end.
        assert!(
            status != blk::OK || frontend.connection.closes_within(LIMIT),
            "{what:?} was cut off, and the request a success ({fate:?})"
        );
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn rings_in_memory_that_was_cut_off_end_the_connection_only() {
    let arena = Arena::new();
    // All of the ring, or only the last area of it.
    for kept in [0, 4096] {
        let mut frontend = arena.attacker();
        let region = frontend.memory.add(EXTRA, EXTRA_BYTES);
        frontend.share_region(&region);
        let mut ring = frontend.new_ring(0, 64);
        ring.areas.used = EXTRA + 8192;
        if kept == 0 {
            ring.areas.descriptors = EXTRA;
            ring.areas.available = EXTRA + 4096;
        }
        frontend.start(&ring, 0);
        works(&mut frontend, &mut ring);
        if kept == 0 {
            region.truncate(0);
        } else {
            let (parts, _) = frontend.place(&Request::read(8, SECTOR));
            let head = ring.lay_out(&parts);
            ring.offer(head);
            region.truncate(kept);
            ring.publish();
        }
        ring.kick.signal();
        breaks(&frontend, &ring);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn memory_that_is_cut_off_under_requests_in_flight_harms_nobody_else() {
    let arena = Arena::new();
    for _ in 0..5 {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 256);
        for number in 0..64 {
            frontend.submit(&mut ring, &Request::write(2048 + number * 16, &[7; 8192]));
        }
        let region = frontend.memory.regions()[0].clone();
        region.truncate(0);
        ring.kick.signal();
        std::thread::sleep(A_WHILE / 4);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn removing_the_memory_of_a_running_ring_harms_nobody_else() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 256);
        for number in 0..32 {
            frontend.submit(&mut ring, &Request::read(16 * number, 8192));
        }
        let (parts, pending) = frontend.place(&Request::read(8, SECTOR));
        let head = ring.lay_out(&parts);
        let entry = frontend.memory.regions()[0].entry;
        let verdict = frontend
            .connection
            .try_tell(code::REM_MEM_REG, &memory_region(entry), &[]);
        if verdict == Verdict::Accepted {
            ring.offer(head);
            ring.publish();
            ring.kick.signal();
            breaks(&frontend, &ring);
            assert_eq!(
                frontend.memory.read(pending.status, 1),
                [blk::UNTOUCHED],
                "memory was written after it was taken away"
            );
        }
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn requests_into_removed_memory_are_errors() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let region = frontend.memory.add(EXTRA, EXTRA_BYTES);
        frontend.share_region(&region);
        let mut ring = frontend.start_queue(0, 256);
        let mut pending = Vec::new();
        for number in 0..32 {
            let (mut parts, answer) = frontend.place(&Request::read(number, SECTOR));
            parts[1].addr = EXTRA + 4096 * number;
            ring.submit(&parts);
            pending.push(answer);
        }
        frontend.remove_region(EXTRA);
        // Those in flight end, one way or the other; none may be left with the device.
        let ended = pending
            .iter()
            .filter(|_| ring.wait(LIMIT).is_some())
            .count();
        assert!(
            ended == pending.len() || breakage(&frontend, &ring).is_some(),
            "{ended} of {} requests ended",
            pending.len()
        );
        if breakage(&frontend, &ring).is_none() {
            let (mut parts, answer) = frontend.place(&Request::read(1, SECTOR));
            parts[1].addr = EXTRA;
            ring.submit(&parts);
            let fate = fate(&frontend, &ring);
            let status = frontend.memory.read(answer.status, 1)[0];
            assert_ne!(status, blk::OK, "{fate:?}");
            if let Fate::Used(_) = fate {
                ring.pop();
                works(&mut frontend, &mut ring);
            }
        }
    }
    arena.verdict();
}

#[test]
fn replacing_all_memory_under_a_running_ring_harms_nobody_else() {
    let arena = Arena::new();
    {
        let wanted = Wanted::default().without_protocol(protocol::CONFIGURE_MEM_SLOTS);
        let mut frontend = arena.attacker_with(&wanted);
        let mut ring = frontend.start_queue(0, 256);
        for number in 0..32 {
            frontend.submit(&mut ring, &Request::read(16 * number, 8192));
        }
        // The same addresses, in other memory: zeros where the ring was.
        let other = Region::new(MEMORY_START, MEMORY_BYTES);
        let verdict = frontend.connection.try_tell(
            code::SET_MEM_TABLE,
            &memory_table(1, &[other.entry]),
            &[other.file()],
        );
        if verdict == Verdict::Accepted {
            ring.kick.signal();
        }
        std::thread::sleep(A_WHILE);
        // And nothing at all.
        let _ = frontend
            .connection
            .try_tell(code::SET_MEM_TABLE, &memory_table(0, &[]), &[]);
        ring.kick.signal();
        std::thread::sleep(A_WHILE);
        arena.load.goes_on();
    }
    arena.verdict();
}
