//! The cache mode, as it begins and as the guest switches it.

use harness::daemon::eventually;
use harness::frontend::blk::{self, Request, kind};
use harness::frontend::connection::{code, config_access};
use harness::frontend::ring::Part;
use rustix::process::Signal;

use crate::{DISK_SECTORS, Disk, SECTOR, content, with_reads_in_flight};
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

/// Syncs that the daemon has asked the host for.
fn host_syncs(disk: &Disk) -> u64 {
    let reports = |disk: &Disk| disk.daemon.errors().matches("host_syncs=").count();
    let before = reports(disk);
    disk.daemon.signal(Signal::USR1);
    eventually("the counters are printed", || reports(disk) > before);
    let said = disk.daemon.errors();
    let count = said.rsplit("host_syncs=").next().expect("just seen");
    let digits = count.split_whitespace().next().expect("a number follows");
    digits.parse().expect("a number")
}

#[test]
fn leaving_writeback_makes_durable_what_a_queue_wrote_before_it_was_stopped() {
    let disk = Disk::serve(&[]);
    let mut frontend = disk.connect();
    let mut ring = frontend.start_queue(0, 64);
    frontend.write(&mut ring, 5, &[0x17; SECTOR]);
    let base = frontend.stop_queue(&ring);
    frontend.start(&ring, base);
    let before = host_syncs(&disk);
    frontend.set_writeback(0);
    assert!(
        host_syncs(&disk) > before,
        "the write is not durable, and the guest sends no flush for it any more"
    );
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
