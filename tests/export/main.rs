//! What a guest sees of a disk: features, configuration, every request, every way to start and
//! stop a ring, to the letter of the virtio and vhost-user specifications.

mod cache;
mod change;
mod layout;
mod offer;
mod request;
mod ring;
mod session;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use harness::daemon::{Daemon, Place, eventually};
use harness::frontend::Frontend;
use harness::frontend::blk::{self, Request};
use harness::frontend::ring::Ring;

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
