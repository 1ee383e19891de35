//! A verified load: a front-end on a thread of its own that writes, reads back and compares.
//!
//! It runs beside a test of something else and shows that the something else did not reach it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::daemon::eventually;
use crate::frontend::Frontend;
use crate::frontend::blk::Request;
use crate::frontend::ring::Ring;
use crate::random::Random;

const SECTOR: usize = 512;
const MAX_SECTORS: u64 = 64;
/// What the disk is thought to have: the model is kept in memory.
const DISK_SECTORS: u64 = 4096;

/// A running load. [`finish`](Self::finish) says how it went; dropping it ends it as well.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Starts one on the disk behind `socket`, which holds at least 2 MiB of zeros.
    pub fn start(socket: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let (stop, rounds, socket) =
                (Arc::clone(&stop), Arc::clone(&rounds), socket.to_path_buf());
            move || work(&socket, &stop, &rounds)
        });
        let load = Self {
            stop,
            rounds,
            thread: Some(thread),
        };
        load.goes_on();
        load
    }

    /// Waits until it has done more than it had.
    ///
    /// # Panics
    ///
    /// If it stands still, or has failed.
    #[track_caller]
    pub fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        eventually("the other disk's load goes on", || {
            assert!(
                !self.thread.as_ref().is_none_or(JoinHandle::is_finished),
                "the other disk's load failed; its own message is above"
            );
            // The first round may have begun before, so it proves nothing.
            self.rounds.load(Ordering::Relaxed) > before + 2
        });
    }

    /// Ends it.
    ///
    /// # Panics
    ///
    /// If anything it read was not what it had written, or any request failed.
    #[track_caller]
    pub fn finish(mut self) {
        self.goes_on();
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            matches!(ended, Some(Ok(()))),
            "the other disk's load failed; its own message is above"
        );
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(socket: &Path, stop: &AtomicBool, rounds: &AtomicU64) {
    let mut random = Random::announced("load");
    let mut frontend = Frontend::connect(socket);
    let mut rings = [frontend.start_queue(0, 64), frontend.start_queue(1, 64)];
    let mut model = vec![0; DISK_SECTORS as usize * SECTOR];
    while !stop.load(Ordering::Relaxed) {
        for ring in &mut rings {
            round(&mut frontend, ring, &mut model, &mut random);
        }
        rounds.fetch_add(1, Ordering::Relaxed);
        // A verified load, not a stress: other tests share the machine.
        std::thread::sleep(Duration::from_micros(500));
    }
    for ring in &rings {
        frontend.stop_queue(ring);
    }
}

fn round(frontend: &mut Frontend, ring: &mut Ring, model: &mut [u8], random: &mut Random) {
    let (start, sectors) = range(random);
    let data = random.bytes(sectors * SECTOR);
    frontend.write(ring, start as u64, &data);
    model[start * SECTOR..][..data.len()].copy_from_slice(&data);
    if random.below(8) == 0 {
        frontend.succeed(ring, &Request::flush());
    }

    let (start, sectors) = range(random);
    let read = frontend.read(ring, start as u64, sectors * SECTOR);
    assert!(
        read == model[start * SECTOR..][..sectors * SECTOR],
        "sectors {start} to {} are not what was written",
        start + sectors
    );
}

fn range(random: &mut Random) -> (usize, usize) {
    let sectors = 1 + random.below(MAX_SECTORS);
    let start = random.below(DISK_SECTORS - sectors);
    (start as usize, sectors as usize)
}
