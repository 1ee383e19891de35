//! The load on a back-end, through virtio-driver.

use std::io;
use std::time::Duration;

use harness::driver::{Driver, Layout, Queue, Waiting};
use harness::peer::{Peer, Program, Setup};

use crate::load::{self, Job, Lane, Measurement};
use crate::machine::Placement;
use crate::row::{BLOCK_BYTES, Operation};

/// Four descriptors for each of 32 requests, of which each needs three.
const DESCRIPTORS: u16 = 128;

/// How long a back-end may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts `program`, checks that it serves the file, and measures it.
pub(crate) fn measure(
    program: Program,
    job: &Job<'_>,
    placement: &Placement,
) -> io::Result<Measurement> {
    let setup = Setup {
        file: job.file,
        format: job.format,
        queues: job.row.queues,
        direct: job.row.is_direct(),
    };
    let peer = placement.with_server_cpus(job.row, || Peer::start(program, setup))?;
    let measured = load_peer(&peer, job, placement)
        .map_err(|error| io::Error::other(format!("{error} {}", peer.complaints().trim_end())))?;
    peer.stop()?;
    Ok(measured)
}

fn load_peer(peer: &Peer, job: &Job<'_>, placement: &Placement) -> io::Result<Measurement> {
    let layout = Layout {
        queues: job.row.queues,
        slots: job.row.depth,
        slot_bytes: BLOCK_BYTES,
        descriptors: DESCRIPTORS,
    };
    let driver = Driver::connect(&peer.socket(), layout, PATIENCE)?;
    if driver.capacity_bytes != job.blocks * BLOCK_BYTES as u64 {
        return Err(io::Error::other("the disk has another size than the file"));
    }
    let waiting = job.row.waiting();
    let mut lanes: Vec<Served> = driver
        .queues
        .into_iter()
        .map(|queue| Served::new(queue, waiting))
        .collect();
    // A number that no earlier measurement had.
    load::verify(job, &mut lanes, u64::from(peer.id()))?;
    if peer.is_direct(job.file)? != Some(job.row.is_direct()) {
        return Err(io::Error::other(
            "the back-end has not opened the file as it was told to",
        ));
    }
    load::measure(
        job,
        lanes,
        || placement.pin_client(job.row),
        placement.is_shared(job.row),
        Some(peer),
    )
}

/// A virtqueue under load.
struct Served {
    queue: Queue,
    waiting: Waiting,
}

impl Served {
    fn new(mut queue: Queue, waiting: Waiting) -> Self {
        queue.set_waiting(waiting);
        Self { queue, waiting }
    }
}

impl Lane for Served {
    fn submit(&mut self, slot: usize, operation: Operation, block: u64) -> io::Result<()> {
        let offset = block * BLOCK_BYTES as u64;
        match operation {
            Operation::Read => self.queue.read(slot, offset, BLOCK_BYTES, 1),
            Operation::Write | Operation::First => self.queue.write(slot, offset, BLOCK_BYTES, 1),
        }
    }

    fn kick(&mut self) -> io::Result<()> {
        self.queue.kick()
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> io::Result<()> {
        let mut failure = Ok(());
        self.queue.completions(|slot, outcome| {
            done.push(slot);
            if outcome.is_err() {
                failure = outcome;
            }
        });
        failure
    }

    fn wait(&mut self) -> io::Result<()> {
        match self.waiting {
            Waiting::Eventfd => self.queue.wait(),
            Waiting::Polling => {
                std::hint::spin_loop();
                Ok(())
            }
        }
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        self.queue.buffer(slot)
    }
}
