//! Front-ends that come, go, die and come back.

use std::time::Duration;

use harness::daemon::eventually;
use harness::frontend::blk::Request;
use harness::frontend::connection::{code, ring_state};
use harness::random::Random;

use crate::{A_WHILE, Disk, SECTOR, content};
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
    let used = disk.daemon.cpu_time().saturating_sub(before);
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
