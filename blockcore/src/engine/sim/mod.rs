//! The simulated engine: a host, its page cache and its time, from one seed and in one thread.
//!
//! A [`Simulation`] is the host. Each simulated worker has a [`SimEngine`] of it, and whatever takes
//! turns (workers, guests) is registered as a [`Turn`]. The seed decides who runs next, how long
//! each operation takes, in how many parts it happens, and what goes wrong ([`Faults`]). Time stands
//! still while there is work, but for a little per turn, and jumps to the next completion or timer
//! when there is none. Two runs of one seed give the same [`Simulation::hash`].
//!
//! Two ends are simulated: [`Simulation::kill`], after which the page cache is whole and operations
//! that had reached the host still land, and [`Simulation::power_cut`], after which only what was
//! synced is sure.
//!
//! What replays must not depend on addresses: give memory that is used for direct I/O an alignment of
//! its own ([`Segments::allocate`](crate::io::buffer::Segments::allocate)).
//!
//! Threads: one. No clock, thread, random number or order of a hash is looked at.

mod contents;
mod engine;
mod host;
mod random;
mod run;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

pub use self::engine::SimEngine;
pub use self::host::FileProperties;
pub(super) use self::host::Token;
pub use self::random::Random;
pub use self::run::{Stuck, Turn, Worker};

use self::contents::BLOCK_BYTES;
use self::engine::{Aftermath, Due, EngineState, Running, RunningCall};
use self::host::Host;
use self::run::Actor;
use super::{Segment, Work};

/// What goes wrong, and how often. The default is a host without faults whose operations take a
/// while, end in any order and are torn against each other.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Reads that fail with `EIO`, having filled some of the memory.
    pub read_error_permille: u32,
    /// Writes that fail with `EIO`, having written some of the bytes.
    pub write_error_permille: u32,
    /// Writes and allocations that fail with `ENOSPC`, writes having written some of the bytes.
    pub no_space_permille: u32,
    /// Allocations (holes, zeroed ranges, reservations) that fail with `EIO`, done or not.
    pub allocate_error_permille: u32,
    /// Syncs that fail with `EIO`: each change they cover is durable or never will be.
    pub sync_error_permille: u32,
    /// Host calls other than [`HostCall::Unlock`](super::HostCall::Unlock) that fail with `EIO`.
    pub call_error_permille: u32,
    /// Reads and writes that move fewer bytes than asked, but some; writes up to the end of a sector.
    pub short_permille: u32,
    /// Writes that move nothing and do not say why.
    pub stalled_permille: u32,
    /// Reads, writes and allocations that end with `EINTR`, nothing done.
    pub interrupted_permille: u32,
    /// Reads and writes that end with `EAGAIN`, nothing done.
    pub again_permille: u32,
    /// Reads and writes that happen in several parts, other operations in between.
    pub split_permille: u32,
    /// [Preemption points](super::preempt) that yield.
    pub preempt_permille: u32,
    /// Shortest and longest time an operation takes.
    pub latency_us: (u64, u64),
    /// Operations that take up to `slow_us` instead.
    pub slow_permille: u32,
    /// See `slow_permille`.
    pub slow_us: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            read_error_permille: 0,
            write_error_permille: 0,
            no_space_permille: 0,
            allocate_error_permille: 0,
            sync_error_permille: 0,
            call_error_permille: 0,
            short_permille: 0,
            stalled_permille: 0,
            interrupted_permille: 0,
            again_permille: 0,
            split_permille: 300,
            preempt_permille: 300,
            latency_us: (0, 200),
            slow_permille: 10,
            slow_us: 20_000,
        }
    }
}

/// A simulated host and everybody on it. Dropping it is a [`kill`](Self::kill).
pub struct Simulation {
    state: Rc<RefCell<State>>,
    actors: RefCell<Vec<Actor>>,
}

/// What the simulation and its engines share.
struct State {
    seed: u64,
    random: Random,
    now: Duration,
    hash: u64,
    faults: Faults,
    host: Host,
    engines: Vec<EngineState>,
    /// Operations that have reached the host, by number.
    running: BTreeMap<u64, Running>,
    /// Host calls under way, by number.
    calls: BTreeMap<u64, RunningCall>,
    /// Offloaded work that is not done, by number.
    work: BTreeMap<u64, Work>,
    /// What happens next: when, then in a seeded order.
    due: BTreeMap<(Duration, u64, u64), Due>,
    last_number: u64,
}

impl Simulation {
    /// A host without files whose every decision follows from `seed`.
    pub fn new(seed: u64) -> Self {
        let state = State {
            seed,
            random: Random::new(seed),
            now: Duration::from_secs(1),
            hash: random::mix(seed),
            faults: Faults::default(),
            host: Host::default(),
            engines: Vec::new(),
            running: BTreeMap::new(),
            calls: BTreeMap::new(),
            work: BTreeMap::new(),
            due: BTreeMap::new(),
            last_number: 0,
        };
        Self {
            state: Rc::new(RefCell::new(state)),
            actors: RefCell::default(),
        }
    }

    /// What goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state.borrow_mut().faults = faults;
    }

    /// Puts a file of `bytes` bytes, all hole, at `path`. It is durable at once.
    pub fn create_file(&self, path: impl AsRef<Path>, properties: FileProperties, bytes: u64) {
        let mut state = self.state.borrow_mut();
        state.host.create(path.as_ref(), properties, bytes);
    }

    /// As [`create_file`](Self::create_file), with these bytes in it, which are durable, too.
    pub fn load_file(&self, path: impl AsRef<Path>, properties: FileProperties, bytes: &[u8]) {
        let mut state = self.state.borrow_mut();
        let path = path.as_ref();
        state.host.create(path, properties, bytes.len() as u64);
        state.host.fill(path, bytes);
    }

    /// How much space all regular files have together, rounded down to blocks of 4 KiB. `None`, as at
    /// first: as much as they like.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state.borrow_mut().host.capacity_blocks = bytes.map(|bytes| bytes / BLOCK_BYTES);
    }

    /// What a read of the whole file through the page cache gives now; `None` if there is no file.
    pub fn contents(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        self.state.borrow().host.contents(path.as_ref())
    }

    /// The shared memory that a process has left at `path`, or has open; `None` if there is none.
    pub fn segment(&self, path: impl AsRef<Path>) -> Option<Arc<Segment>> {
        self.state.borrow().host.segment(path.as_ref())
    }

    /// What a [`power_cut`](Self::power_cut) now could leave of a file, one of many possibilities; `None`
    /// if there is no file. Nothing happens to anybody. `random` chooses, and only that.
    pub fn possible_contents(
        &self,
        path: impl AsRef<Path>,
        random: &mut Random,
    ) -> Option<Vec<u8>> {
        self.state.borrow().possible_contents(path.as_ref(), random)
    }

    /// Where a file was changed by what is not known to be durable: offset and bytes of each change.
    pub fn unsynced(&self, path: impl AsRef<Path>) -> Vec<(u64, u64)> {
        self.state.borrow().host.unsynced(path.as_ref())
    }

    /// The locks that anybody holds on a file: byte, and whether it excludes others; in order.
    pub fn locks(&self, path: impl AsRef<Path>) -> Vec<(u64, bool)> {
        self.state.borrow_mut().host.locks(path.as_ref())
    }

    /// How many syncs of a file have failed and left pages marked clean that never reached the disk.
    pub fn lost_syncs(&self, path: impl AsRef<Path>) -> u64 {
        self.state.borrow().host.lost_syncs(path.as_ref())
    }

    /// A new engine, for a worker that the caller runs or [registers](Self::add).
    pub fn engine(&self) -> Rc<SimEngine> {
        let woken = Arc::new(AtomicBool::new(false));
        let mut state = self.state.borrow_mut();
        state.engines.push(EngineState::new(Arc::clone(&woken)));
        let index = state.engines.len() - 1;
        Rc::new(SimEngine::new(Rc::clone(&self.state), index, woken))
    }

    /// Tells everybody who watches `fd` that it is readable: a kick, since no eventfd is read here.
    pub fn kick(&self, fd: &OwnedFd) {
        let fd: RawFd = fd.as_raw_fd();
        let mut state = self.state.borrow_mut();
        for engine in 0..state.engines.len() {
            for watch in state.engines[engine].watching(fd) {
                let at = state.now + Duration::from_nanos(state.random.below(20_000));
                state.schedule(at, Due::Ready { engine, watch });
            }
        }
    }

    /// The simulated time.
    pub fn now(&self) -> Duration {
        self.state.borrow().now
    }

    /// A generator that follows from the seed, for whoever drives the simulation.
    pub fn random(&self) -> Random {
        self.state.borrow_mut().random.fork()
    }

    /// Adds something that was seen to the [`hash`](Self::hash).
    pub fn note(&self, seen: u64) {
        self.state.borrow_mut().note(&[seen]);
    }

    /// A sum of all that has happened, in order. Two runs of one seed that differ in it are a bug:
    /// something besides the seed was looked at.
    pub fn hash(&self) -> u64 {
        self.state.borrow().hash
    }

    /// How many operations and calls have reached the host and not landed. Those of killed processes
    /// count too.
    pub fn in_flight(&self) -> usize {
        let state = self.state.borrow();
        state.running.len() + state.calls.len()
    }

    /// Ends every process at once: engines, and what was registered. The page cache stays.
    ///
    /// Of the operations that had reached the host, some parts still land, later; until the last one
    /// has, they hold their open file description and with it its locks. Engines of before do nothing
    /// any more; new ones may be made at once.
    pub fn kill(&self) {
        // What goes is dropped when nothing is borrowed: it may belong to anybody.
        let mut actors = self.actors.take();
        let held = self.state.borrow_mut().kill();
        drop(held);
        actors.iter_mut().for_each(Actor::killed);
    }

    /// A [`kill`](Self::kill), and the power goes: what was synced stays. Every other change has
    /// happened or not, in whole or in part, by sectors of 512 bytes. What was in flight never lands.
    pub fn power_cut(&self) {
        self.kill();
        let lost = self.state.borrow_mut().power_cut();
        drop(lost);
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        self.kill();
        // Operations may own memory whose owner holds an engine, and so this very state.
        let running = std::mem::take(&mut self.state.borrow_mut().running);
        drop(running);
    }
}

impl State {
    /// Notes what happens, in the order in which it does.
    fn note(&mut self, words: &[u64]) {
        for word in words {
            self.hash = random::mix(self.hash ^ word).wrapping_add(*word);
        }
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Has `due` happen at `at`, in a seeded order among what happens then.
    fn schedule(&mut self, at: Duration, due: Due) {
        let key = (at, self.random.bits(), self.number());
        self.due.insert(key, due);
    }

    /// Lets everything happen whose time has come; returns whether there was anything.
    fn land_due(&mut self, aftermath: &mut Aftermath) -> bool {
        let mut any = false;
        while let Some(entry) = self.due.first_entry()
            && entry.key().0 <= self.now
        {
            let due = entry.remove();
            self.land(due, aftermath);
            any = true;
        }
        any
    }

    /// When something happens next without anybody's turn.
    fn next_due(&self) -> Option<Duration> {
        let event = self.due.keys().next().map(|(at, _, _)| *at);
        let timers = self.engines.iter().filter_map(EngineState::deadline);
        event.into_iter().chain(timers).min()
    }

    fn possible_contents(&self, path: &Path, random: &mut Random) -> Option<Vec<u8>> {
        let mut landing = Vec::new();
        for due in self.due.values() {
            if let Due::Part {
                operation,
                begin,
                end,
            } = due
                && random.chance(500)
            {
                landing.extend(self.running[operation].change(*begin, *end));
            }
        }
        self.host.possible_contents(path, &landing, random)
    }

    fn power_cut(&mut self) -> Vec<Running> {
        for (_, due) in std::mem::take(&mut self.due) {
            if let Due::Part { .. } = due
                && self.random.chance(500)
            {
                self.land(due, &mut Aftermath::default());
            }
        }
        self.calls.clear();
        let running = std::mem::take(&mut self.running);
        self.host.power_cut(&mut self.random);
        self.note(&[u64::from_le_bytes(*b"powercut")]);
        running.into_values().collect()
    }
}

#[cfg(test)]
mod tests;
