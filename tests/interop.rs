//! Front-ends that others wrote, against our back-end.
//!
//! Each test runs a verified random load, several connections in turn, through a public driver
//! crate and compares every sector read with a model disk. The same load runs against other
//! people's back-ends too: that shows what a failure says, the back-end or the test.
//!
//! `INTEROP_SEED` repeats a run that failed.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use harness::driver::{Driver, Layout, Queue, Waiting};
use harness::libblkio::{self, Libblkio, Request};
use harness::model::{self, Change, ModelDisk, SECTOR_BYTES, Stamp, Ticket, ZEROES};
use harness::peer::{Aio, Format, Peer, Program, Setup};
use harness::random::Random;
use tempfile::TempDir;

/// Small, so that requests in flight overlap often.
const DISK_SECTORS: usize = 16 * 1024;

/// The largest read or write.
const REQUEST_SECTORS: usize = 128;

/// The largest discard or write of zeroes.
const ZERO_SECTORS: usize = 2048;

const LAYOUT: Layout = Layout {
    queues: 2,
    slots: 12,
    slot_bytes: REQUEST_SECTORS * SECTOR_BYTES,
    descriptors: 256,
};

/// Requests of one connection.
const REQUESTS: usize = 4000;

/// Longer than any request takes on a busy machine; a hang is a failure.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn virtio_driver_reads_back_what_it_wrote_through_the_page_cache() {
    check(Program::Stonework, false, &[Waiting::Eventfd; 3]);
}

#[test]
fn virtio_driver_reads_back_what_it_wrote_when_it_polls() {
    check(Program::Stonework, false, &[Waiting::Polling; 3]);
}

#[test]
fn virtio_driver_reads_back_what_it_wrote_past_the_page_cache() {
    check(
        Program::Stonework,
        true,
        &[Waiting::Eventfd, Waiting::Polling, Waiting::Eventfd],
    );
}

#[test]
fn the_same_load_passes_on_the_baseline() {
    for direct in [false, true] {
        check(
            Program::Baseline,
            direct,
            &[Waiting::Eventfd, Waiting::Polling],
        );
    }
}

#[test]
fn the_same_load_passes_on_qemu_storage_daemon() {
    let program = Program::StorageDaemon(Aio::Threads);
    if program.executable().is_none() {
        assert!(
            std::env::var_os("CI").is_none(),
            "qemu-storage-daemon is missing"
        );
        eprintln!("SKIPPED: qemu-storage-daemon is not installed");
        return;
    }
    check(program, false, &[Waiting::Eventfd, Waiting::Polling]);
}

#[test]
fn libblkio_reads_back_what_it_wrote() {
    check_libblkio(Program::Stonework, false);
    check_libblkio(Program::Stonework, true);
}

#[test]
fn libblkio_reads_back_what_it_wrote_to_the_baseline() {
    check_libblkio(Program::Baseline, false);
}

#[test]
fn discarded_and_unmapped_ranges_leave_the_file() {
    let disk = Disk::new();
    let peer = Peer::start(Program::Stonework, disk.setup(false)).unwrap();
    let mut driver = Driver::connect(&peer.socket(), LAYOUT, PATIENCE).unwrap();
    assert_eq!(driver.capacity_bytes, disk.bytes());
    let queue = &mut driver.queues[0];
    for start in (0..DISK_SECTORS).step_by(REQUEST_SECTORS) {
        model::fill(queue.buffer(0), 1, start);
        queue.write(0, offset(start), LAYOUT.slot_bytes, 1).unwrap();
        finish(queue).unwrap();
    }
    let full = disk.allocated_bytes();
    assert!(full >= disk.bytes(), "only {full} bytes are allocated");

    let quarter = disk.bytes() / 4;
    queue.discard(0, 0, quarter).unwrap();
    finish(queue).unwrap();
    let after_discard = disk.allocated_bytes();
    assert!(after_discard <= full - quarter, "{after_discard} of {full}");

    queue.write_zeroes(0, 2 * quarter, quarter, true).unwrap();
    finish(queue).unwrap();
    let after_unmap = disk.allocated_bytes();
    assert!(
        after_unmap <= after_discard - quarter,
        "{after_unmap} of {after_discard}"
    );

    queue.write_zeroes(0, 3 * quarter, quarter, false).unwrap();
    finish(queue).unwrap();
    assert_eq!(disk.allocated_bytes(), after_unmap);
    drop(driver);
    peer.stop().unwrap();
}

/// A file to serve. It is on disk and not on tmpfs, which lacks O_DIRECT on older kernels.
struct Disk {
    file: PathBuf,
    _directory: TempDir,
}

impl Disk {
    fn new() -> Self {
        let executable = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(executable.parent().unwrap()).unwrap();
        let file = directory.path().join("disk.raw");
        File::create(&file)
            .and_then(|file| file.set_len(offset(DISK_SECTORS)))
            .unwrap();
        Self {
            file,
            _directory: directory,
        }
    }

    fn bytes(&self) -> u64 {
        offset(DISK_SECTORS)
    }

    fn setup(&self, direct: bool) -> Setup<'_> {
        Setup {
            format: Format::Raw,
            file: &self.file,
            queues: LAYOUT.queues,
            direct,
        }
    }

    fn allocated_bytes(&self) -> u64 {
        // What is only in the page cache may not be allocated yet.
        File::open(&self.file).unwrap().sync_all().unwrap();
        fs::metadata(&self.file).unwrap().blocks() * 512
    }
}

fn offset(sector: usize) -> u64 {
    (sector * SECTOR_BYTES) as u64
}

/// Runs one connection per element of `connections` against `program`, one after the other on one
/// disk, then compares the file with the model as well.
fn check(program: Program, direct: bool, connections: &[Waiting]) {
    let seed = Random::seed("INTEROP_SEED");
    println!("{program} direct={direct}: INTEROP_SEED={seed}");
    let disk = Disk::new();
    let peer = Peer::start(program, disk.setup(direct)).unwrap();
    let mut load = Load::new(seed);
    for &waiting in connections {
        let mut driver = Driver::connect(&peer.socket(), LAYOUT, PATIENCE).unwrap();
        assert_eq!(driver.capacity_bytes, disk.bytes());
        for queue in &mut driver.queues {
            queue.set_waiting(waiting);
        }
        let outcome = load
            .run(&mut driver.queues, waiting)
            .and_then(|()| load.read_all(&mut driver.queues[1]));
        if let Err(error) = outcome {
            panic!(
                "{program} direct={direct} {waiting:?} INTEROP_SEED={seed}: {error}\n{}",
                peer.complaints()
            );
        }
        assert_eq!(peer.is_direct(&disk.file).unwrap(), Some(direct));
    }
    peer.stop().unwrap();
    load.model.check(&fs::read(&disk.file).unwrap()).unwrap();
}

/// The load of [`check`] in batches, through libblkio, on connections in turn.
fn check_libblkio(program: Program, direct: bool) {
    let seed = Random::seed("INTEROP_SEED");
    println!("{program} direct={direct}, libblkio: INTEROP_SEED={seed}");
    let disk = Disk::new();
    let peer = Peer::start(program, disk.setup(direct)).unwrap();
    // libblkio does not wait for a back-end to listen.
    drop(Driver::connect(&peer.socket(), LAYOUT, PATIENCE).unwrap());
    let mut load = Load::new(seed);
    for _ in 0..3 {
        let mut front_end = Libblkio::connect(&peer.socket(), LAYOUT.slot_bytes).unwrap();
        assert_eq!(front_end.property("capacity").unwrap(), disk.bytes());
        // Products of limits that we state: they must not overflow in there.
        let max_transfer = front_end.property("max-transfer").unwrap();
        assert!(i32::try_from(max_transfer).is_ok(), "{max_transfer:#x}");
        for batch in 0..REQUESTS / libblkio::MAX_BATCH {
            let queue = batch % front_end.queues();
            if let Err(error) = load.batch(&mut front_end, queue) {
                panic!(
                    "{program} direct={direct} INTEROP_SEED={seed}, queue {queue}: {error}\n{}",
                    peer.complaints()
                );
            }
        }
    }
    peer.stop().unwrap();
    load.model.check(&fs::read(&disk.file).unwrap()).unwrap();
}

/// A random load whose every read is checked.
struct Load {
    model: ModelDisk,
    random: Random,
    last_stamp: Stamp,
}

/// A request before it is sent.
#[derive(Debug, Clone)]
struct Planned {
    kind: Kind,
    sectors: Range<usize>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Read,
    Write(Stamp),
    WriteZeroes { unmap: bool },
    Discard,
    Flush,
}

impl Planned {
    fn offset(&self) -> u64 {
        offset(self.sectors.start)
    }

    fn bytes(&self) -> usize {
        self.sectors.len() * SECTOR_BYTES
    }
}

/// What a slot is waiting for.
enum Pending {
    Read { ticket: Ticket, bytes: usize },
    Change(Ticket),
    Flush,
}

impl Load {
    fn new(seed: u64) -> Self {
        Self {
            model: ModelDisk::new(DISK_SECTORS),
            random: Random::new(seed),
            last_stamp: ZEROES,
        }
    }

    /// Makes up a request.
    fn plan(&mut self) -> Planned {
        let kind = match self.random.below(100) {
            0..40 => Kind::Read,
            40..85 => {
                self.last_stamp += 1;
                Kind::Write(self.last_stamp)
            }
            85..90 => Kind::Flush,
            90..95 => Kind::Discard,
            _ => Kind::WriteZeroes {
                unmap: self.random.below(2) == 0,
            },
        };
        let longest = match kind {
            Kind::Read | Kind::Write(_) | Kind::Flush => REQUEST_SECTORS,
            Kind::WriteZeroes { .. } | Kind::Discard => ZERO_SECTORS,
        };
        // Short ones more often, for many partial overlaps.
        let longest = 1 + self.random.below(longest as u64);
        let count = 1 + self.random.below(longest) as usize;
        let start = self.random.below((DISK_SECTORS - count + 1) as u64) as usize;
        Planned {
            kind,
            sectors: start..start + count,
        }
    }

    /// Tells the model of a request that is about to be sent, and prepares its `buffer`.
    fn begin(&mut self, planned: &Planned, buffer: &mut [u8]) -> Pending {
        let buffer = &mut buffer[..planned.bytes().min(LAYOUT.slot_bytes)];
        let sectors = planned.sectors.clone();
        let change = match planned.kind {
            Kind::Flush => return Pending::Flush,
            Kind::Read => {
                // What was there before must not pass for what was read.
                buffer.fill(0xa5);
                return Pending::Read {
                    ticket: self.model.begin_read(sectors),
                    bytes: planned.bytes(),
                };
            }
            Kind::Write(stamp) => {
                model::fill(buffer, stamp, sectors.start);
                Change::Write(stamp)
            }
            Kind::WriteZeroes { .. } => Change::Write(ZEROES),
            Kind::Discard => Change::Discard,
        };
        Pending::Change(self.model.begin_change(sectors, change))
    }

    /// Tells the model of a request's success, and checks its `buffer`.
    fn end(&mut self, done: Pending, buffer: &[u8]) -> Result<(), String> {
        match done {
            Pending::Read { ticket, bytes } => self.model.end_read(ticket, &buffer[..bytes])?,
            Pending::Change(ticket) => self.model.end_change(ticket),
            Pending::Flush => {}
        }
        Ok(())
    }

    /// Keeps a random number of requests in flight in both queues until [`REQUESTS`] are done.
    fn run(&mut self, queues: &mut [Queue], waiting: Waiting) -> Result<(), String> {
        let mut pending: Vec<Vec<Option<Pending>>> = queues
            .iter()
            .map(|queue| (0..queue.slots()).map(|_| None).collect())
            .collect();
        let mut left = REQUESTS;
        let mut progress = Instant::now();
        while left > 0 || pending.iter().flatten().any(Option::is_some) {
            for (queue, pending) in queues.iter_mut().zip(&mut pending) {
                for (slot, pending) in pending.iter_mut().enumerate() {
                    if left > 0 && pending.is_none() && self.random.below(4) > 0 {
                        *pending = Some(self.send(queue, slot).map_err(sentence)?);
                        left -= 1;
                    }
                }
                queue.kick().map_err(sentence)?;
            }
            for (queue, pending) in queues.iter_mut().zip(&mut pending) {
                if pending.iter().all(Option::is_none) {
                    continue;
                }
                for slot in completed(queue, waiting)? {
                    progress = Instant::now();
                    let done = pending[slot]
                        .take()
                        .ok_or("a request completed that was not in flight")?;
                    self.end(done, queue.buffer(slot))?;
                }
            }
            if progress.elapsed() > PATIENCE {
                return Err(format!("no completion within {PATIENCE:?}"));
            }
        }
        Ok(())
    }

    /// Puts one more request into `queue`.
    fn send(&mut self, queue: &mut Queue, slot: usize) -> io::Result<Pending> {
        let planned = self.plan();
        let pending = self.begin(&planned, queue.buffer(slot));
        let segments = 1 + self.random.below(8) as usize;
        let (offset, bytes) = (planned.offset(), planned.bytes());
        match planned.kind {
            Kind::Read => queue.read(slot, offset, bytes, segments)?,
            Kind::Write(_) => queue.write(slot, offset, bytes, segments)?,
            Kind::Flush => queue.flush(slot)?,
            Kind::Discard => queue.discard(slot, offset, bytes as u64)?,
            Kind::WriteZeroes { unmap } => {
                queue.write_zeroes(slot, offset, bytes as u64, unmap)?;
            }
        }
        Ok(pending)
    }

    /// Sends a batch through libblkio, in which everything is in flight at once.
    fn batch(&mut self, front_end: &mut Libblkio, queue: usize) -> Result<(), String> {
        let mut requests = Vec::new();
        let mut pending = Vec::new();
        for slot in 0..libblkio::MAX_BATCH {
            let planned = self.plan();
            pending.push(self.begin(&planned, front_end.buffer(slot)));
            let (offset, bytes) = (planned.offset(), planned.bytes());
            requests.push(match planned.kind {
                Kind::Read => Request::Read { offset, bytes },
                Kind::Write(_) => Request::Write { offset, bytes },
                Kind::Flush => Request::Flush,
                Kind::Discard => Request::Discard {
                    offset,
                    bytes: bytes as u64,
                },
                Kind::WriteZeroes { unmap } => Request::WriteZeroes {
                    offset,
                    bytes: bytes as u64,
                    unmap,
                },
            });
        }
        front_end.perform(queue, &requests, PATIENCE)?;
        for (slot, done) in pending.into_iter().enumerate() {
            self.end(done, front_end.buffer(slot))?;
        }
        Ok(())
    }

    /// Reads the whole disk and checks it.
    fn read_all(&mut self, queue: &mut Queue) -> Result<(), String> {
        queue.set_waiting(Waiting::Eventfd);
        let mut content = Vec::new();
        for start in (0..DISK_SECTORS).step_by(REQUEST_SECTORS) {
            queue
                .read(0, offset(start), LAYOUT.slot_bytes, 1)
                .map_err(sentence)?;
            finish(queue)?;
            content.extend_from_slice(queue.buffer(0));
        }
        self.model.check(&content)
    }
}

/// The slots of `queue` that have completed, at least one if it has to wait for that.
///
/// A queue that polls does not wait: the other queue may have something to do.
fn completed(queue: &mut Queue, waiting: Waiting) -> Result<Vec<usize>, String> {
    let mut done = Vec::new();
    let mut failure = None;
    loop {
        queue.completions(|slot, outcome| {
            done.push(slot);
            if let Err(error) = outcome {
                failure = Some(format!("a request failed: {error}"));
            }
        });
        if let Some(failure) = failure {
            return Err(failure);
        }
        if !done.is_empty() {
            return Ok(done);
        }
        match waiting {
            Waiting::Polling => {
                std::thread::yield_now();
                return Ok(done);
            }
            Waiting::Eventfd => {
                if !queue.wait_at_most(PATIENCE).map_err(sentence)? {
                    return Err(format!("no completion within {PATIENCE:?}"));
                }
            }
        }
    }
}

/// Submits what was put into `queue`, a single request, and waits for it.
fn finish(queue: &mut Queue) -> Result<(), String> {
    queue.kick().map_err(sentence)?;
    completed(queue, Waiting::Eventfd).map(drop)
}

fn sentence(error: io::Error) -> String {
    error.to_string()
}
