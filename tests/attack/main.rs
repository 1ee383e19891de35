//! What a hostile front-end or guest can do: nothing, beyond losing its own connection or queue.
//!
//! Each test has a daemon of its own with two disks. One is attacked. The other carries a
//! verified load all the time, which must not notice. Afterwards the daemon must be the same
//! process with the same descriptors, threads and mappings, the attacked disk must serve the
//! next front-end, its content must be what it was, and the daemon must end in order.

mod chain;
mod event;
mod fuzz;
mod memory;
mod message;
mod ring;

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::daemon::{Daemon, Place, eventually};
use harness::frontend::event::readable;
use harness::frontend::ring::Ring;
use harness::frontend::{Frontend, LIMIT, Wanted};
use harness::load::Load;
use harness::random::Random;

const SECTOR: usize = 512;
const DISK_SECTORS: u64 = 4096;
/// Sectors from here on may be written by a test; those before must stay as they were.
const SCRATCH: u64 = 2048;
/// Long enough for a daemon to do what it should not.
const A_WHILE: Duration = Duration::from_millis(100);

/// A daemon with a disk to attack and one beside it.
struct Arena {
    load: Load,
    daemon: Daemon,
    socket: PathBuf,
    file: PathBuf,
    footprint: [usize; 3],
    _place: Place,
}

impl Arena {
    fn new() -> Self {
        let place = Place::new();
        let file = place.file("attacked.raw", &content(0, DISK_SECTORS));
        let other = place.sparse("other.raw", 4 << 20);
        let socket = place.join("attacked.sock");
        let other_socket = place.join("other.sock");
        let daemon = Daemon::exports(&[(&file, &socket), (&other, &other_socket)]);
        let load = Load::start(&other_socket);
        // What the first front-end makes once and for all does not count.
        next_front_end_is_served(&socket);
        let footprint = settled_footprint(&daemon);
        Self {
            load,
            daemon,
            socket,
            file,
            footprint,
            _place: place,
        }
    }

    fn attacker(&self) -> Frontend {
        Frontend::connect(&self.socket)
    }

    fn attacker_with(&self, wanted: &Wanted) -> Frontend {
        Frontend::connect_with(&self.socket, wanted)
    }

    /// The attack is over and the attacker gone: nothing may be left of it.
    #[track_caller]
    fn verdict(self) {
        self.conclude(true);
    }

    /// As [`verdict`](Self::verdict), when the attack was allowed to write anywhere.
    #[track_caller]
    fn verdict_but_for_content(self) {
        self.conclude(false);
    }

    #[track_caller]
    fn conclude(self, content_stays: bool) {
        let Self {
            load,
            mut daemon,
            socket,
            file,
            footprint: before,
            _place,
        } = self;
        daemon.assert_running();
        next_front_end_is_served(&socket);
        let end = Instant::now() + LIMIT;
        loop {
            let now = footprint(&daemon);
            if now.iter().zip(&before).all(|(now, before)| now <= before) {
                break;
            }
            assert!(
                Instant::now() < end,
                "descriptors, threads and mappings were {before:?} and are {now:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        load.finish();
        daemon.stop();
        if content_stays {
            let bytes = fs::read(file).expect("the attacked image can be read");
            let kept = SCRATCH as usize * SECTOR;
            assert!(
                bytes[..kept] == content(0, SCRATCH),
                "the attacked disk was changed"
            );
        }
    }
}

/// Descriptors, threads, mapped regions.
fn footprint(daemon: &Daemon) -> [usize; 3] {
    [
        daemon.descriptors(),
        daemon.threads(),
        daemon.mapped_regions(),
    ]
}

/// The same, once it stays the same.
fn settled_footprint(daemon: &Daemon) -> [usize; 3] {
    let mut before = footprint(daemon);
    let mut since = Instant::now();
    eventually("the daemon's footprint settles", || {
        let now = footprint(daemon);
        if now != before {
            before = now;
            since = Instant::now();
        }
        since.elapsed() > Duration::from_millis(60)
    });
    before
}

/// What the attacked disk holds: each sector its own number.
fn content(sector: u64, sectors: u64) -> Vec<u8> {
    (sector..sector + sectors)
        .flat_map(|number| number.to_le_bytes().repeat(SECTOR / 8))
        .collect()
}

/// Shows that a ring serves: what is written is read back.
#[track_caller]
fn works(frontend: &mut Frontend, ring: &mut Ring) {
    let sector = DISK_SECTORS - 2 - 2 * u64::from(ring.queue);
    let data = Random::new(u64::from(ring.available_index())).bytes(2 * SECTOR);
    frontend.write(ring, sector, &data);
    let read = frontend.read(ring, sector, data.len());
    assert!(read == data, "sector {sector} is not what was written");
}

#[track_caller]
fn next_front_end_is_served(socket: &Path) {
    let mut frontend = Frontend::connect(socket);
    let mut rings = [frontend.start_queue(0, 64), frontend.start_queue(1, 64)];
    for ring in &mut rings {
        works(&mut frontend, ring);
    }
    for ring in &rings {
        frontend.stop_queue(ring);
    }
}

/// What became of a chain, or of the ring it was in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It was returned with this used length.
    Used(u32),
    /// The queue was reported broken.
    Broken,
    /// The connection was ended.
    Closed,
}

/// Waits for the fate of the first chain in `ring`.
///
/// # Panics
///
/// If there is none within the time limit: the guest would hang.
#[track_caller]
fn fate(frontend: &Frontend, ring: &Ring) -> Fate {
    let end = Instant::now() + LIMIT;
    ring.ask_for_call(ring.used_index());
    loop {
        if let Some(used) = ring.peek() {
            return Fate::Used(used.length);
        }
        if let Some(fate) = breakage(frontend, ring) {
            return fate;
        }
        assert!(
            Instant::now() < end,
            "the chain is neither returned nor its queue reported broken"
        );
        ring.call.wait(Duration::from_millis(2));
        ring.call.take();
    }
}

/// Whether the queue was reported broken or the connection ended.
fn breakage(frontend: &Frontend, ring: &Ring) -> Option<Fate> {
    if ring.error.wait(Duration::ZERO) {
        return Some(Fate::Broken);
    }
    readable(frontend.connection.as_fd(), Duration::ZERO).then_some(Fate::Closed)
}

/// Waits until the queue is reported broken or the connection ended, whatever is in the ring.
#[track_caller]
fn breaks(frontend: &Frontend, ring: &Ring) -> Fate {
    let mut fate = None;
    eventually(
        "the queue is reported broken or the connection ended",
        || {
            fate = breakage(frontend, ring);
            fate.is_some()
        },
    );
    fate.expect("just seen")
}
