//! The client: it keeps a number of requests in flight and measures them.
//!
//! Each queue has a thread. Threads run from the first request to the last without a pause; what
//! is counted is what completes while the phase is [`MEASURE`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use harness::model;
use harness::peer::Format;
use harness::peer::{Peer, cpu_time};
use harness::random::Random;
use hdrhistogram::Histogram;

use crate::machine::Activity;
use crate::row::{BLOCK_BYTES, Operation, Row};

/// Time beyond its own after which a measurement is taken to hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// Polls in vain after which a client that shares its CPU lets others run.
const POLLS_BEFORE_YIELD: u32 = 64;

/// Blocks of an image's cluster.
const CLUSTER_BLOCKS: u64 = (64 << 10) / BLOCK_BYTES as u64;

/// What scatters first writes.
const SCATTER: u64 = 0x9e37_79b1;

/// What to do.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) row: Row,
    pub(crate) file: &'a Path,
    /// What that is.
    pub(crate) format: Format,
    /// The disk's size in blocks: a power of two clusters for first writes.
    pub(crate) blocks: u64,
    pub(crate) seconds: Duration,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measurement {
    pub(crate) iops: f64,
    pub(crate) median_us: f64,
    pub(crate) p99_us: f64,
    /// CPU time of the back-end's process per request.
    pub(crate) cpu_us: f64,
    /// What part of the machine's CPU time went to neither back-end nor client meanwhile.
    pub(crate) others: f64,
}

impl Job<'_> {
    /// The file, as the row wants it opened.
    pub(crate) fn open(&self) -> io::Result<File> {
        let direct = if self.row.is_direct() {
            libc::O_DIRECT
        } else {
            0
        };
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(direct)
            .open(self.file)
    }
}

/// One block, aligned for O_DIRECT.
#[repr(align(4096))]
#[derive(Clone)]
pub(crate) struct Block(pub(crate) [u8; BLOCK_BYTES]);

/// A queue of requests of one block each, whoever serves it.
pub(crate) trait Lane: Send {
    /// Puts a request into the queue.
    fn submit(&mut self, slot: usize, operation: Operation, block: u64) -> io::Result<()>;

    /// Sees to it that the requests are noticed.
    fn kick(&mut self) -> io::Result<()>;

    /// Adds the slots of completed requests to `done`; a failed request is an error.
    fn reap(&mut self, done: &mut Vec<usize>) -> io::Result<()>;

    /// Called when nothing has completed: sleeps, or returns at once if it polls.
    fn wait(&mut self) -> io::Result<()>;

    /// The data of a slot whose request is not in flight.
    fn buffer(&mut self, slot: usize) -> &mut [u8];
}

const WARM_UP: u8 = 0;
const MEASURE: u8 = 1;
const STOP: u8 = 2;

/// Runs `job` on `lanes`, one per queue. `prepare_thread` is called on each client thread first.
///
/// Without a `server` the client serves itself, and the CPU time is its own.
pub(crate) fn measure<L: Lane>(
    job: &Job<'_>,
    lanes: Vec<L>,
    prepare_thread: impl Fn() -> io::Result<()> + Sync,
    may_yield: bool,
    server: Option<&Peer>,
) -> io::Result<Measurement> {
    let client_time = || cpu_time(std::process::id());
    let server_time = || server.map_or(Ok(Duration::ZERO), Peer::cpu_time);
    let sample = || Ok::<_, io::Error>((client_time()?, server_time()?, Activity::now()?));
    let phase = AtomicU8::new(WARM_UP);
    let has_progressed = AtomicBool::new(false);
    let (sender, outcomes) = mpsc::channel();
    let queues = lanes.len();
    std::thread::scope(|scope| {
        for (index, lane) in lanes.into_iter().enumerate() {
            let client = Client {
                lane,
                row: job.row,
                index: index as u64,
                submitted: 0,
                blocks: job.blocks,
                random: Random::new(index as u64 + 1),
                phase: &phase,
                has_progressed: &has_progressed,
                may_yield,
            };
            let sender = sender.clone();
            let prepare_thread = &prepare_thread;
            scope.spawn(move || {
                let outcome = prepare_thread().and_then(|()| client.run());
                // Nobody receives after an error of another client.
                let _ = sender.send(outcome);
            });
        }
        std::thread::sleep(job.seconds / 4);
        let before = sample()?;
        let start = Instant::now();
        phase.store(MEASURE, Ordering::Relaxed);
        std::thread::sleep(job.seconds);
        // A disk that stalls for so long is slow, which is a result too.
        while !has_progressed.load(Ordering::Relaxed) && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        phase.store(STOP, Ordering::Relaxed);
        let seconds = start.elapsed().as_secs_f64();
        let after = sample()?;
        let (client, server_only) = (after.0 - before.0, after.1 - before.1);

        let mut latency = histogram()?;
        for _ in 0..queues {
            let outcome = outcomes.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                // Its thread cannot be ended, and would be waited for.
                eprintln!("bench: {}: no completion within {PATIENCE:?}", job.row);
                std::process::exit(1);
            });
            latency.add(outcome?).map_err(io::Error::other)?;
        }
        let requests = latency.len() as f64;
        if requests == 0.0 {
            return Err(io::Error::other("nothing completed in time"));
        }
        let us = |quantile: f64| latency.value_at_quantile(quantile) as f64 / 1e3;
        Ok(Measurement {
            iops: requests / seconds,
            median_us: us(0.5),
            p99_us: us(0.99),
            cpu_us: server.map_or(client, |_| server_only).as_secs_f64() * 1e6 / requests,
            others: after.2.others_since(before.2, client + server_only),
        })
    })
}

/// Writes one block per slot in each of `lanes`, reads them back, and compares them with the file
/// itself, if that has the disk's bytes as they are.
pub(crate) fn verify<L: Lane>(job: &Job<'_>, lanes: &mut [L], stamp: u64) -> io::Result<()> {
    let file = File::open(job.file)?;
    let depth = job.row.depth as u64;
    let mut random = Random::new(stamp);
    for lane in lanes {
        // Distinct blocks all over the disk.
        let stride = job.blocks / depth;
        let blocks: Vec<u64> = (0..depth)
            .map(|slot| slot * stride + random.below(stride))
            .collect();
        let sector = |block: u64| block as usize * BLOCK_BYTES / model::SECTOR_BYTES;
        let mut expected = vec![0; BLOCK_BYTES];
        for operation in [Operation::Write, Operation::Read] {
            for (slot, &block) in blocks.iter().enumerate() {
                match operation {
                    Operation::Write | Operation::First => {
                        model::fill(lane.buffer(slot), stamp, sector(block));
                    }
                    Operation::Read => lane.buffer(slot).fill(0),
                }
                lane.submit(slot, operation, block)?;
            }
            lane.kick()?;
            finish(lane, blocks.len())?;
        }
        for (slot, &block) in blocks.iter().enumerate() {
            model::fill(&mut expected, stamp, sector(block));
            if lane.buffer(slot) != expected {
                return Err(io::Error::other(format!(
                    "block {block} was read back wrong"
                )));
            }
            if job.format != Format::Raw {
                continue;
            }
            let mut content = vec![0; BLOCK_BYTES];
            file.read_exact_at(&mut content, block * BLOCK_BYTES as u64)?;
            if content != expected {
                return Err(io::Error::other(format!(
                    "block {block} is wrong in the file"
                )));
            }
        }
    }
    Ok(())
}

/// Waits for `requests` requests.
fn finish<L: Lane>(lane: &mut L, requests: usize) -> io::Result<()> {
    let start = Instant::now();
    let mut done = Vec::new();
    while done.len() < requests {
        let before = done.len();
        lane.reap(&mut done)?;
        if done.len() == before {
            if start.elapsed() > PATIENCE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            lane.wait()?;
        }
    }
    Ok(())
}

/// One queue's load.
struct Client<'a, L> {
    lane: L,
    row: Row,
    /// Which of them it is.
    index: u64,
    submitted: u64,
    blocks: u64,
    random: Random,
    phase: &'a AtomicU8,
    /// Set when something has been measured.
    has_progressed: &'a AtomicBool,
    may_yield: bool,
}

impl<L: Lane> Client<'_, L> {
    fn run(mut self) -> io::Result<Histogram<u64>> {
        let mut latency = histogram()?;
        let mut started = vec![Instant::now(); self.row.depth];
        let mut done = Vec::with_capacity(self.row.depth);
        for slot in 0..self.row.depth {
            self.submit(slot)?;
        }
        self.lane.kick()?;
        let mut in_vain = 0;
        loop {
            done.clear();
            self.lane.reap(&mut done)?;
            if done.is_empty() {
                self.lane.wait()?;
                in_vain += 1;
                if self.may_yield && in_vain > POLLS_BEFORE_YIELD {
                    std::thread::yield_now();
                }
                continue;
            }
            in_vain = 0;
            let now = Instant::now();
            match self.phase.load(Ordering::Relaxed) {
                WARM_UP => {}
                MEASURE => {
                    for &slot in &done {
                        let nanoseconds = (now - started[slot]).as_nanos() as u64;
                        latency.saturating_record(nanoseconds);
                    }
                    if !self.has_progressed.load(Ordering::Relaxed) {
                        self.has_progressed.store(true, Ordering::Relaxed);
                    }
                }
                _ => break,
            }
            for &slot in &done {
                started[slot] = now;
                self.submit(slot)?;
            }
            self.lane.kick()?;
        }
        let left = self.row.depth - done.len();
        finish(&mut self.lane, left)?;
        Ok(latency)
    }

    fn submit(&mut self, slot: usize) -> io::Result<()> {
        let block = match self.row.operation {
            Operation::First => self.untouched()?,
            Operation::Read | Operation::Write => self.random.below(self.blocks),
        };
        self.lane.submit(slot, self.row.operation, block)
    }

    /// A block in a cluster that nobody has written to: all over the disk, each once.
    fn untouched(&mut self) -> io::Result<u64> {
        let clusters = self.blocks / CLUSTER_BLOCKS;
        let number = self.index + self.submitted * self.row.queues as u64;
        if number >= clusters {
            return Err(io::Error::other(
                "every cluster has been written to: measure for less time",
            ));
        }
        self.submitted += 1;
        // An odd factor makes another order of a power of two.
        let cluster = number.wrapping_mul(SCATTER) & (clusters - 1);
        Ok(cluster * CLUSTER_BLOCKS)
    }
}

/// Latencies in nanoseconds, to three digits, up to a minute.
fn histogram() -> io::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(io::Error::other)
}
