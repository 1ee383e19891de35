//! Messages that change features, addresses or memory while rings run.

use harness::daemon::eventually;
use harness::frontend::blk::{self, Request};
use harness::frontend::connection::{code, protocol};
use harness::frontend::ring::Ring;
use harness::frontend::{Frontend, Wanted};

use crate::{Disk, SECTOR, content, with_reads_in_flight};
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
