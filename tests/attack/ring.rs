//! Rings whose size, place, indexes or heads are wrong.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::frontend::blk::{self, Request};
use harness::frontend::connection::{Verdict, code, ring_addresses, ring_state};
use harness::frontend::memory::USER_OFFSET;
use harness::frontend::ring::{Part, Ring};
use harness::frontend::{Frontend, MEMORY_BYTES, MEMORY_START};

use crate::{A_WHILE, Arena, Fate, SECTOR, breaks, content, fate, works};

const MEMORY_END: u64 = MEMORY_START + MEMORY_BYTES;

// --- what is in a running ring -----------------------------------------------------------------

/// Does `attack` to a running ring, which must break without taking the other one along.
#[track_caller]
fn breaks_its_queue_only(attack: impl Fn(&mut Frontend, &mut Ring)) {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let mut other = frontend.start_queue(1, 64);
        works(&mut frontend, &mut ring);
        attack(&mut frontend, &mut ring);
        ring.publish();
        ring.kick.signal();
        if breaks(&frontend, &ring) == Fate::Broken {
            works(&mut frontend, &mut other);
            // A stopped and started ring is whole again.
            frontend.stop_queue(&ring);
            ring.reset();
            frontend.start(&ring, 0);
            works(&mut frontend, &mut ring);
        }
    }
    arena.verdict();
}

#[test]
fn what_breaks_a_ring_is_not_counted_as_taken() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        works(&mut frontend, &mut ring);
        // No writable byte for the status: popped, and no request.
        let addr = frontend.heap.take(16, 16);
        frontend
            .memory
            .write(addr, &blk::header(blk::kind::FLUSH, 0));
        let head = ring.lay_out(&[Part::readable(addr, 16)]);
        for head in [head, 64] {
            ring.offer(head);
            ring.publish();
            ring.kick.signal();
            assert_eq!(breaks(&frontend, &ring), Fate::Broken);
            let base = frontend.stop_queue(&ring);
            assert_eq!(base, ring.used_index(), "the next completion leaves a gap");
            // Once more, with another chain in its place.
            ring.reset();
            frontend.start(&ring, 0);
            works(&mut frontend, &mut ring);
            ring.error.take();
        }
    }
    arena.verdict();
}

#[test]
fn a_head_outside_the_table_breaks_its_queue_only() {
    for head in [64, 65, 0x7fff, 0xffff] {
        breaks_its_queue_only(|_, ring| ring.offer(head));
    }
}

#[test]
fn a_jump_of_the_available_index_breaks_its_queue_only() {
    for jump in [65, 66, 0x7fff, 0x8000, 0xfff0, 0xffff_u16] {
        let arena = Arena::new();
        {
            let mut frontend = arena.attacker();
            let mut ring = frontend.start_queue(0, 64);
            let mut other = frontend.start_queue(1, 64);
            works(&mut frontend, &mut ring);
            ring.publish_index(ring.available_index().wrapping_add(jump));
            ring.kick.signal();
            if breaks(&frontend, &ring) == Fate::Broken {
                works(&mut frontend, &mut other);
            }
        }
        arena.verdict();
    }
}

#[test]
fn the_same_head_twice_is_answered_without_harm() {
    let arena = Arena::new();
    for times in [2, 3, 64] {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let mut other = frontend.start_queue(1, 64);
        let (parts, pending) = frontend.place(&Request::read(8, SECTOR));
        let head = ring.lay_out(&parts);
        for _ in 0..times {
            ring.offer(head);
        }
        ring.publish();
        ring.kick_if_wanted();
        // Either the first is served, or the queue is broken before.
        if let Fate::Used(length) = fate(&frontend, &ring) {
            let status = frontend.memory.read(pending.status, 1)[0];
            if status == blk::OK {
                assert_eq!(length, SECTOR as u32 + 1);
                assert_eq!(frontend.memory.read(pending.input, SECTOR), content(8, 1));
            }
        }
        works(&mut frontend, &mut other);
    }
    arena.verdict();
}

#[test]
fn heads_that_share_descriptors_are_answered_without_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let (parts, _) = frontend.place(&Request::write(3000, &[9; 8 * SECTOR]));
        let head = ring.lay_out(&parts);
        // The tail of a chain is a chain, too: its header is the data.
        for index in [head, head.wrapping_sub(1), head.wrapping_sub(2), head] {
            ring.offer(index % 64);
        }
        ring.publish();
        ring.kick_if_wanted();
        fate(&frontend, &ring);
    }
    arena.verdict();
}

#[test]
fn descriptors_that_change_while_they_are_read_do_no_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let (parts, pending) = frontend.place(&Request::read(8, SECTOR));
        let stop = AtomicBool::new(false);
        let end = Instant::now() + Duration::from_secs(2);
        let memory = frontend.memory.clone();
        let table = ring.areas.descriptors;
        let head = ring.lay_out(&parts);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut turn = 0_u64;
                while !stop.load(Ordering::Relaxed) && Instant::now() < end {
                    // Address and length of the data, right and wrong in turn.
                    let index = u64::from(head) - 1;
                    let (addr, len) = match turn % 3 {
                        0 => (parts[1].addr, 512_u32),
                        1 => (MEMORY_END - 256, 512),
                        _ => (u64::MAX - 3, u32::MAX),
                    };
                    memory.write(table + 16 * index, &addr.to_le_bytes());
                    memory.write(table + 16 * index + 8, &len.to_le_bytes());
                    turn += 1;
                }
            });
            for _ in 0..300 {
                frontend.memory.write(pending.status, &[blk::UNTOUCHED]);
                ring.offer(head);
                ring.publish();
                ring.kick_if_wanted();
                if fate(&frontend, &ring) == Fate::Closed || take(&mut ring).is_none() {
                    break;
                }
                let status = frontend.memory.read(pending.status, 1)[0];
                assert_ne!(status, blk::UNTOUCHED);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
    arena.verdict();
}

/// Takes a completion and keeps the chain.
fn take(ring: &mut Ring) -> Option<()> {
    let used = ring.peek()?;
    let base = ring.used_index().wrapping_add(1);
    let available = ring.available_index();
    assert_eq!(base, available, "one at a time; {used:?}");
    ring.skip_used();
    Some(())
}

// --- how a ring is set up ----------------------------------------------------------------------

#[test]
fn ring_sizes_that_are_no_power_of_two_up_to_32768_are_refused() {
    let arena = Arena::new();
    for size in [
        0,
        3,
        100,
        127,
        32769,
        49152,
        65535,
        65536,
        1 << 20,
        u32::MAX,
    ] {
        let mut frontend = arena.attacker();
        let mut other = frontend.start_queue(1, 64);
        let verdict = frontend
            .connection
            .try_tell(code::SET_VRING_NUM, &ring_state(0, size), &[]);
        assert!(verdict.is_refusal(), "{size} was accepted");
        if verdict != Verdict::Closed && !frontend.connection.closes_within(A_WHILE) {
            works(&mut frontend, &mut other);
        }
    }
    arena.verdict();
}

/// Sets up a ring with these areas. It must be refused or break, not run.
#[track_caller]
fn areas_are_refused(arena: &Arena, change: impl Fn(&mut Ring)) {
    let mut frontend = arena.attacker();
    let mut ring = frontend.new_ring(0, 64);
    change(&mut ring);
    if frontend.try_set_up(&ring, 0).is_refusal() {
        return;
    }
    let enabled = frontend
        .connection
        .try_tell(code::SET_VRING_ENABLE, &ring_state(0, 1), &[]);
    if enabled.is_refusal() {
        return;
    }
    ring.kick.signal();
    breaks(&frontend, &ring);
}

#[test]
fn ring_areas_outside_memory_are_refused() {
    let arena = Arena::new();
    for addr in [
        0,
        MEMORY_START - 4096,
        MEMORY_END,
        1 << 50,
        u64::MAX - 4095 - USER_OFFSET,
    ] {
        areas_are_refused(&arena, |ring| ring.areas.descriptors = addr);
        areas_are_refused(&arena, |ring| ring.areas.available = addr);
        areas_are_refused(&arena, |ring| ring.areas.used = addr);
    }
    arena.verdict();
}

#[test]
fn ring_areas_that_end_outside_memory_are_refused() {
    let arena = Arena::new();
    areas_are_refused(&arena, |ring| ring.areas.descriptors = MEMORY_END - 16 * 63);
    areas_are_refused(&arena, |ring| {
        ring.areas.available = MEMORY_END - (4 + 2 * 63);
    });
    // The index at which to call lies behind the last entry.
    areas_are_refused(&arena, |ring| {
        ring.areas.available = MEMORY_END - (4 + 2 * 64);
    });
    areas_are_refused(&arena, |ring| {
        ring.areas.used = MEMORY_END - (4 + 8 * 63);
    });
    arena.verdict();
}

#[test]
fn ring_areas_of_the_wrong_alignment_are_refused() {
    let arena = Arena::new();
    for off in [1, 2, 4, 8] {
        areas_are_refused(&arena, |ring| ring.areas.descriptors += off);
    }
    areas_are_refused(&arena, |ring| ring.areas.available += 1);
    for off in [1, 2] {
        areas_are_refused(&arena, |ring| ring.areas.used += off);
    }
    arena.verdict();
}

#[test]
fn a_ring_that_grows_past_memory_after_it_was_set_up_does_no_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.new_ring(0, 64);
        ring.areas.descriptors = MEMORY_END - 16 * 64;
        frontend.set_up(&ring, 0);
        let _ = frontend
            .connection
            .try_tell(code::SET_VRING_NUM, &ring_state(0, 32768), &[]);
        let _ = frontend
            .connection
            .try_tell(code::SET_VRING_ENABLE, &ring_state(0, 1), &[]);
        for head in 0..64 {
            // Behind the end of the table that was checked, inside the one that is claimed.
            ring.offer(64 + 500 * head);
        }
        ring.publish();
        ring.kick.signal();
        std::thread::sleep(A_WHILE);
    }
    arena.verdict();
}

#[test]
fn overlapping_ring_areas_do_no_harm() {
    let arena = Arena::new();
    for (available, used) in [(0, 0), (0, 64), (64, 0), (2, 4)] {
        let mut frontend = arena.attacker();
        let mut ring = frontend.new_ring(0, 64);
        let start = ring.areas.descriptors;
        ring.areas.available = start + available;
        ring.areas.used = start + used;
        let (parts, _) = frontend.place(&Request::read(8, SECTOR));
        if frontend.try_set_up(&ring, 0).is_refusal() {
            continue;
        }
        let _ = frontend
            .connection
            .try_tell(code::SET_VRING_ENABLE, &ring_state(0, 1), &[]);
        ring.submit(&parts);
        ring.kick.signal();
        std::thread::sleep(A_WHILE);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn a_ring_over_the_guest_s_other_ring_does_no_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        works(&mut frontend, &mut ring);
        let mut twin = frontend.new_ring(1, 64);
        twin.areas = ring.areas;
        if !frontend.try_set_up(&twin, 0).is_refusal() {
            let _ = frontend
                .connection
                .try_tell(code::SET_VRING_ENABLE, &ring_state(1, 1), &[]);
            for _ in 0..50 {
                ring.kick.signal();
                twin.kick.signal();
            }
            std::thread::sleep(A_WHILE);
        }
    }
    arena.verdict();
}

#[test]
fn unaligned_user_addresses_that_wrap_are_refused() {
    let arena = Arena::new();
    for addr in [u64::MAX, u64::MAX - 15, 0, 1] {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let body = ring_addresses(0, 0, addr, addr, addr);
        let verdict = frontend
            .connection
            .try_tell(code::SET_VRING_ADDR, &body, &[]);
        if !verdict.is_refusal() {
            ring.kick.signal();
            breaks(&frontend, &ring);
        }
        ring.reset();
    }
    arena.verdict();
}

#[test]
fn a_ring_that_is_started_without_being_set_up_does_no_harm() {
    let arena = Arena::new();
    for steps in 0..6_u32 {
        let mut frontend = arena.attacker();
        let ring = frontend.new_ring(0, 64);
        let [kick, call, _] = ring.events();
        let queue = 0_u64.to_le_bytes();
        // Each step alone, and the kick first.
        let _ = match steps {
            0 => frontend
                .connection
                .try_tell(code::SET_VRING_ENABLE, &ring_state(0, 1), &[]),
            1 => frontend.connection.try_tell(
                code::SET_VRING_ADDR,
                &frontend.ring_addresses(&ring),
                &[],
            ),
            2 => frontend
                .connection
                .try_tell(code::SET_VRING_CALL, &queue, &[call]),
            3 => frontend
                .connection
                .try_tell(code::SET_VRING_BASE, &ring_state(0, 70000), &[]),
            _ => Verdict::Accepted,
        };
        let _ = frontend
            .connection
            .try_tell(code::SET_VRING_KICK, &queue, &[kick]);
        ring.kick.signal();
        let _ = frontend
            .connection
            .try_tell(code::SET_VRING_ENABLE, &ring_state(0, 1), &[]);
        ring.kick.signal();
        std::thread::sleep(A_WHILE / 4);
        let _ = frontend
            .connection
            .try_ask(code::GET_VRING_BASE, &ring_state(0, 0));
    }
    arena.verdict();
}
