//! Rings: sizes, indexes, events, enabling, stopping and going on.

use std::os::fd::AsFd;
use std::time::Duration;

use harness::daemon::eventually;
use harness::frontend::blk::{self, Request, feature, kind};
use harness::frontend::connection::code;
use harness::frontend::event::Event;
use harness::frontend::{Frontend, LIMIT, Wanted};
use harness::random::Random;

use crate::{A_WHILE, DISK_SECTORS, Disk, SECTOR, content};
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
    // A call may come when the ring starts; it says nothing.
    std::thread::sleep(A_WHILE);
    ring.call.take();
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
    // The first call of a ring's life is free.
    assert_eq!(frontend.read(&mut ring, 0, SECTOR), content(0, 1));
    ring.call.take();
    ring.ask_for_call(ring.used_index() + 3);
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
    let mut pending = frontend.submit(&mut ring, &Request::read(6, SECTOR));
    std::thread::sleep(A_WHILE);
    assert_eq!(ring.peek(), None, "served before it was enabled");
    for _ in 0..3 {
        // The kick came long ago: nothing else tells the back-end to look.
        frontend.enable(1, true);
        let used = ring.pop();
        assert_eq!(frontend.outcome(&pending, used).data, content(6, 1));

        frontend.enable(1, false);
        pending = frontend.submit(&mut ring, &Request::read(6, SECTOR));
        std::thread::sleep(A_WHILE);
        assert_eq!(ring.peek(), None, "served while it was disabled");
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
