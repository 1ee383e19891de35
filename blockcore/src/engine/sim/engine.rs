//! One simulated worker's engine, and how its operations come to pass.
//!
//! An operation started is queued; [`poll`](Engine::poll) and [`wait`](Engine::wait) hand it to the
//! host, which decides then how it will end and when each of its parts happens. Bytes are copied
//! when a part happens, so memory that changes meanwhile is seen changed. The completion comes last.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::State;
use super::contents::{Change, SECTOR_BYTES};
use super::random::mix;
use crate::engine::threads::Files;
use crate::engine::{
    Allocate, Engine, Errno, Event, FileId, HostCall, HostReply, Notify, Op, OpResult, OpenFile,
    WatchId, Work,
};
use crate::io::buffer::Segments;
use crate::mailbox::{Sleeper, Wake};

/// Most segments that a kernel takes at once (`IOV_MAX`); what is beyond them makes a short transfer.
const MAX_SEGMENTS: usize = 1024;
/// Most parts in which one transfer happens.
const MAX_PARTS: u64 = 5;

/// The engine of one simulated worker; made by [`Simulation::engine`](super::Simulation::engine).
pub struct SimEngine {
    state: Rc<RefCell<State>>,
    index: usize,
    sleeper: Arc<Sleeper>,
}

/// An engine as its host sees it.
pub(super) struct EngineState {
    alive: bool,
    files: Files,
    queued: Vec<(Arc<OpenFile>, Op, Notify)>,
    done: Vec<(Notify, OpResult, Segments)>,
    ready: Vec<WatchId>,
    watches: BTreeMap<WatchId, Arc<OwnedFd>>,
    in_flight: usize,
    asleep: bool,
    deadline: Option<Duration>,
    woken: Arc<AtomicBool>,
}

/// An operation that has reached the host.
pub(super) struct Running {
    engine: usize,
    description: u64,
    kind: Kind,
    offset: u64,
    segments: Segments,
    /// Gone when the process was killed.
    notify: Option<Notify>,
    result: OpResult,
}

impl Running {
    /// What a part of it that lands changes, and in which description's file; `None` if it is no write.
    pub(super) fn change(&self, begin: u64, end: u64) -> Option<(u64, Change)> {
        let Kind::Write = self.kind else {
            return None;
        };
        let change = Change::Write {
            offset: self.offset + begin,
            data: self.segments.slice(begin, end - begin).to_vec(),
        };
        Some((self.description, change))
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
    /// Up to which change.
    Sync {
        covered: u64,
    },
    Allocate {
        bytes: u64,
        mode: Allocate,
    },
}

/// A host call under way.
pub(super) struct RunningCall {
    call: HostCall,
    /// Which descriptions it holds open: the one that it names, and all of its process once that was
    /// killed, as a thread in a system call keeps the table of open files.
    descriptions: Vec<u64>,
    /// Whether its process was killed.
    orphaned: bool,
    waiter: Rc<CallWaiter>,
}

#[derive(Default)]
struct CallWaiter {
    result: RefCell<Option<Result<HostReply, Errno>>>,
    waker: Cell<Option<Waker>>,
}

/// Something that happens at a time.
pub(super) enum Due {
    /// Some bytes of an operation (all, of one that moves none) take effect.
    Part {
        operation: u64,
        begin: u64,
        end: u64,
    },
    /// An operation completes.
    Done { operation: u64 },
    /// A host call takes effect and is answered.
    Call { call: u64 },
    /// Offloaded work is done.
    Work { work: u64 },
    /// A watched descriptor becomes readable.
    Ready { engine: usize, watch: WatchId },
}

/// What is to be done about something that happened when nothing is borrowed: woken tasks look at
/// the simulation, and dropped memory may belong to somebody who does.
#[derive(Default)]
pub(super) struct Aftermath {
    pub(super) wakers: Vec<Waker>,
    pub(super) dropped: Vec<Segments>,
    pub(super) work: Vec<Work>,
}

/// What killed processes held, to be dropped when nothing is borrowed.
#[derive(Default)]
pub(super) struct Killed {
    queued: Vec<(Arc<OpenFile>, Op, Notify)>,
    done: Vec<(Notify, OpResult, Segments)>,
    notify: Vec<Notify>,
    waiters: Vec<Rc<CallWaiter>>,
    work: Vec<Work>,
    files: Vec<Files>,
}

struct WakeFlag(Arc<AtomicBool>);

impl Wake for WakeFlag {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl SimEngine {
    pub(super) fn new(state: Rc<RefCell<State>>, index: usize, woken: Arc<AtomicBool>) -> Self {
        let sleeper = Sleeper::new(Box::new(WakeFlag(woken)));
        Self {
            state,
            index,
            sleeper,
        }
    }

    /// Whether the worker would be running on a real host: it does not sleep, or something has ended
    /// its sleep.
    pub(super) fn is_runnable(&self) -> bool {
        let state = self.state.borrow();
        let engine = &state.engines[self.index];
        let woken = engine.woken.load(Ordering::Relaxed);
        let overdue = engine.deadline.is_some_and(|at| at <= state.now);
        !engine.asleep || woken || overdue || engine.has_events()
    }

    /// Ends a sleep, as the return from a real engine's wait does.
    pub(super) fn resume(&self) {
        let mut state = self.state.borrow_mut();
        let engine = &mut state.engines[self.index];
        if !engine.asleep {
            return;
        }
        engine.asleep = false;
        engine.deadline = None;
        engine.woken.store(false, Ordering::Relaxed);
        drop(state);
        self.sleeper.awake();
    }

    /// Hands what is queued to the host.
    fn submit(&self) {
        let mut refused = Vec::new();
        {
            let mut state = self.state.borrow_mut();
            let queued = std::mem::take(&mut state.engines[self.index].queued);
            for (file, op, notify) in queued {
                state.submit(self.index, &file, op, notify, &mut refused);
            }
            state.engines[self.index].done.append(&mut refused);
        }
    }

    /// Gives out what has completed, now and then not all of it at once.
    fn collect(&self, events: &mut Vec<Event>) {
        let (done, ready) = {
            let mut state = self.state.borrow_mut();
            let count = state.engines[self.index].done.len() as u64;
            let now = if state.random.chance(250) {
                state.random.below(count + 1) as usize
            } else {
                count as usize
            };
            let engine = &mut state.engines[self.index];
            engine.in_flight -= now;
            let done: Vec<_> = engine.done.drain(..now).collect();
            (done, std::mem::take(&mut engine.ready))
        };
        events.extend(ready.into_iter().map(Event::Ready));
        for (notify, result, segments) in done {
            notify.deliver(result, segments, events);
        }
    }
}

impl Engine for SimEngine {
    fn attach(&self, file: &Arc<OpenFile>) {
        let mut state = self.state.borrow_mut();
        state.engines[self.index].files.attach(file);
    }

    fn detach(&self, file: FileId) {
        let mut state = self.state.borrow_mut();
        let file = state.engines[self.index].files.detach(file);
        drop((state, file));
    }

    fn start(&self, op: Op, notify: Notify) {
        let (Op::Read { file, .. }
        | Op::Write { file, .. }
        | Op::Sync { file }
        | Op::Allocate { file, .. }) = &op;
        let mut state = self.state.borrow_mut();
        let engine = &mut state.engines[self.index];
        if !engine.alive {
            drop(state);
            return drop((op, notify));
        }
        engine.in_flight += 1;
        let Some(file) = engine.files.get(*file).map(Arc::clone) else {
            let segments = match op {
                Op::Read { segments, .. } | Op::Write { segments, .. } => segments,
                Op::Sync { .. } | Op::Allocate { .. } => Segments::default(),
            };
            engine.done.push((notify, Err(Errno::BADF), segments));
            return;
        };
        if let Op::Sync { .. } = op {
            file.count_sync();
        }
        engine.queued.push((file, op, notify));
    }

    fn host(&self, call: HostCall) -> LocalBoxFuture<'static, Result<HostReply, Errno>> {
        let waiter = Rc::new(CallWaiter::default());
        let mut state = self.state.borrow_mut();
        if state.engines[self.index].alive {
            state.begin_call(call, Rc::clone(&waiter));
        } else {
            drop(state);
            drop(call);
        }
        CallFuture(waiter).boxed_local()
    }

    /// Done in place, when its time has come.
    fn offload(&self, work: Work) {
        let mut state = self.state.borrow_mut();
        if !state.engines[self.index].alive {
            drop(state);
            return drop(work);
        }
        let number = state.number();
        state.work.insert(number, work);
        let at = state.now + state.latency();
        state.schedule(at, Due::Work { work: number });
    }

    fn watch(&self, fd: Arc<OwnedFd>) -> WatchId {
        let watch = crate::engine::next_watch();
        let mut state = self.state.borrow_mut();
        state.engines[self.index].watches.insert(watch, fd);
        watch
    }

    fn unwatch(&self, watch: WatchId) {
        let mut state = self.state.borrow_mut();
        state.engines[self.index].watches.remove(&watch);
    }

    fn poll(&self, events: &mut Vec<Event>) {
        self.resume();
        self.submit();
        self.collect(events);
    }

    /// Never sleeps: where a real engine would, this returns at once without events, and the worker is
    /// not run again before something ends the sleep.
    fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) {
        self.submit();
        {
            let mut state = self.state.borrow_mut();
            let now = state.now;
            let engine = &mut state.engines[self.index];
            let woken = engine.woken.swap(false, Ordering::Relaxed);
            if !woken && !engine.has_events() && timeout != Some(Duration::ZERO) {
                engine.asleep = true;
                engine.deadline = timeout.map(|timeout| now.saturating_add(timeout));
                return;
            }
        }
        self.sleeper.awake();
        self.collect(events);
    }

    fn in_flight(&self) -> usize {
        self.state.borrow().engines[self.index].in_flight
    }

    fn now(&self) -> Duration {
        self.state.borrow().now
    }

    fn sleeper(&self) -> &Arc<Sleeper> {
        &self.sleeper
    }

    fn preempts(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let permille = state.faults.preempt_permille;
        state.random.chance(permille)
    }

    fn name(&self) -> &'static str {
        "sim"
    }
}

impl EngineState {
    pub(super) fn new(woken: Arc<AtomicBool>) -> Self {
        Self {
            alive: true,
            files: Files::default(),
            queued: Vec::new(),
            done: Vec::new(),
            ready: Vec::new(),
            watches: BTreeMap::new(),
            in_flight: 0,
            asleep: false,
            deadline: None,
            woken,
        }
    }

    /// When a sleep with a timeout ends.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.deadline.filter(|_| self.alive && self.asleep)
    }

    /// The watches on a descriptor.
    pub(super) fn watching(&self, fd: RawFd) -> Vec<WatchId> {
        let watches = self.watches.iter();
        watches
            .filter(|(_, watched)| watched.as_raw_fd() == fd)
            .map(|(watch, _)| *watch)
            .collect()
    }

    /// One line for whoever asks why nothing goes on.
    pub(super) fn report(&self) -> Option<String> {
        let sleep = if self.asleep { "asleep" } else { "awake" };
        let (queued, in_flight) = (self.queued.len(), self.in_flight);
        self.alive
            .then(|| format!("{sleep}, {in_flight} operations under way ({queued} queued)"))
    }

    fn has_events(&self) -> bool {
        !self.done.is_empty() || !self.ready.is_empty()
    }
}

impl State {
    /// Takes an operation, and decides how it will end and when.
    fn submit(
        &mut self,
        engine: usize,
        file: &OpenFile,
        op: Op,
        notify: Notify,
        refused: &mut Vec<(Notify, OpResult, Segments)>,
    ) {
        let (kind, offset, segments) = match op {
            Op::Read {
                offset, segments, ..
            } => (Kind::Read, offset, segments),
            Op::Write {
                offset, segments, ..
            } => (Kind::Write, offset, segments),
            Op::Sync { .. } => (Kind::Sync { covered: 0 }, 0, Segments::default()),
            Op::Allocate {
                offset,
                bytes,
                mode,
                ..
            } => (Kind::Allocate { bytes, mode }, offset, Segments::default()),
        };
        let description = self.host.description(file).and_then(|description| {
            self.check(description, kind, offset, &segments)?;
            Ok(description)
        });
        let description = match description {
            Ok(description) => description,
            Err(error) => return refused.push((notify, Err(error), segments)),
        };
        self.host.begin(description);
        let operation = self.number();
        let mut running = Running {
            engine,
            description,
            kind,
            offset,
            segments,
            notify: Some(notify),
            result: Ok(0),
        };
        let parts = match kind {
            Kind::Read | Kind::Write => self.plan_transfer(operation, &mut running),
            Kind::Sync { .. } => {
                let under_way = |number| self.running.contains_key(&number);
                let covered = self
                    .host
                    .sync_begins(description, under_way, &mut self.random);
                running.kind = Kind::Sync { covered };
                vec![(0, 0)]
            }
            Kind::Allocate { .. } => {
                let mut parts = vec![(0, 0)];
                if self.random.chance(self.faults.interrupted_permille) {
                    running.result = Err(Errno::INTR);
                    parts.clear();
                } else if self.random.chance(self.faults.allocate_error_permille) {
                    running.result = Err(Errno::IO);
                    parts.truncate(self.random.below(2) as usize);
                } else if self.random.chance(self.faults.no_space_permille) {
                    running.result = Err(Errno::NOSPC);
                    parts.clear();
                }
                parts
            }
        };
        let mut end = self.now;
        for (begin, part_end) in parts {
            let at = self.now + self.latency();
            end = end.max(at);
            let due = Due::Part {
                operation,
                begin,
                end: part_end,
            };
            self.schedule(at, due);
        }
        // A completion is seen a moment after the last part, or after the failure.
        let at = end + self.latency() / 8 + Duration::from_nanos(1);
        self.schedule(at, Due::Done { operation });
        self.running.insert(operation, running);
    }

    fn check(
        &self,
        description: u64,
        kind: Kind,
        offset: u64,
        segments: &Segments,
    ) -> Result<(), Errno> {
        let writes = matches!(kind, Kind::Write | Kind::Allocate { .. });
        if writes && !self.host.is_writable(description) {
            return Err(Errno::BADF);
        }
        if let Kind::Allocate { bytes: 0, .. } = kind {
            return Err(Errno::INVAL);
        }
        if let Kind::Read | Kind::Write = kind {
            let (memory, direct) = self.host.alignment(description);
            let aligned = segments.is_aligned(memory as usize)
                && offset.is_multiple_of(direct)
                && segments.bytes().is_multiple_of(direct);
            if !aligned {
                return Err(Errno::INVAL);
            }
        }
        Ok(())
    }

    /// Decides the result of a read or write; returns which of its bytes move together, if any do.
    fn plan_transfer(&mut self, operation: u64, running: &mut Running) -> Vec<(u64, u64)> {
        let (description, offset) = (running.description, running.offset);
        let segments = running.segments.list().iter().take(MAX_SEGMENTS);
        let wanted: u64 = segments.map(|segment| segment.bytes() as u64).sum();
        let (length, grows) = self.host.length(description);
        let (_, unit) = self.host.alignment(description);
        let write = matches!(running.kind, Kind::Write);
        let mut bytes = if write && grows {
            wanted
        } else {
            wanted.min(length.saturating_sub(offset))
        };
        if wanted == 0 || (bytes == 0 && !write) {
            return Vec::new();
        }
        if bytes == 0 {
            running.result = Err(Errno::NOSPC);
            return Vec::new();
        }
        let faults = &self.faults;
        let error_permille = if write {
            faults.write_error_permille
        } else {
            faults.read_error_permille
        };
        let (short, stalled) = (faults.short_permille, faults.stalled_permille);
        let no_space = faults.no_space_permille;
        let (interrupted, again) = (faults.interrupted_permille, faults.again_permille);
        if self.random.chance(interrupted) {
            running.result = Err(Errno::INTR);
            return Vec::new();
        }
        if self.random.chance(again) {
            running.result = Err(Errno::AGAIN);
            return Vec::new();
        }
        if write {
            bytes = self.host.reserve(description, operation, offset, bytes);
            if bytes == 0 {
                running.result = Err(Errno::NOSPC);
                return Vec::new();
            }
        }
        if self.random.chance(short) {
            let less = self.random.below(bytes);
            bytes = match write {
                false => (less - less % unit).max(unit.min(bytes)),
                // No power cut comes between two parts of a sector.
                true => {
                    let end = (offset + less) / unit.max(SECTOR_BYTES) * unit.max(SECTOR_BYTES);
                    end.checked_sub(offset)
                        .filter(|less| *less > 0)
                        .unwrap_or(bytes)
                }
            };
        }
        if write && self.random.chance(stalled) {
            bytes = 0;
        }
        running.result = Ok(bytes);
        let failure = if self.random.chance(error_permille) {
            Some(Errno::IO)
        } else if write && self.random.chance(no_space) {
            Some(Errno::NOSPC)
        } else {
            None
        };
        let mut parts = self.split(offset, bytes, write || unit > 1);
        if let Some(error) = failure {
            running.result = Err(error);
            parts.retain(|_| self.random.chance(500));
        }
        parts
    }

    /// Cuts a transfer into parts. Writes are cut at sectors, which a kernel never writes back half
    /// changed; reads of the page cache anywhere.
    fn split(&mut self, offset: u64, bytes: u64, at_sectors: bool) -> Vec<(u64, u64)> {
        if bytes == 0 {
            return Vec::new();
        }
        let mut cuts = vec![0, bytes];
        if self.random.chance(self.faults.split_permille) {
            for _ in 1..self.random.between(2, MAX_PARTS) {
                let cut = self.random.below(bytes);
                let aligned = if at_sectors {
                    let at = offset + cut;
                    (at - at % SECTOR_BYTES).saturating_sub(offset)
                } else {
                    cut
                };
                cuts.push(aligned);
            }
        }
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|pair| (pair[0], pair[1])).collect()
    }

    fn latency(&mut self) -> Duration {
        let (low, high) = self.faults.latency_us;
        let (slow_permille, slow) = (self.faults.slow_permille, self.faults.slow_us);
        let (low, high) = if self.random.chance(slow_permille) {
            (high, slow.max(high))
        } else {
            (low, high)
        };
        Duration::from_nanos(self.random.between(low * 1000, high * 1000))
    }

    fn begin_call(&mut self, call: HostCall, waiter: Rc<CallWaiter>) {
        let description = match &call {
            HostCall::Open(..)
            | HostCall::OpenSegment { .. }
            | HostCall::Remove(_)
            | HostCall::Canonical(_)
            | HostCall::Resolve(..)
            | HostCall::Rename(..)
            | HostCall::SyncDirectory(_) => None,
            HostCall::Metadata(file)
            | HostCall::Truncate(file, _)
            | HostCall::LockShared(file, _)
            | HostCall::LockExclusive(file, _)
            | HostCall::Unlock(file, _)
            | HostCall::TestLock(file, _)
            | HostCall::DeviceDiscard(file, _, _)
            | HostCall::DeviceZero(file, _, _)
            | HostCall::Reserve(file, _, _)
            | HostCall::DropCache(file)
            | HostCall::SetNocow(file)
            | HostCall::SetExtentSizeHint(file, _)
            | HostCall::CopyRange { to: file, .. }
            | HostCall::DataExtent(file, _) => self.host.description(file).ok(),
        };
        if let Some(description) = description {
            self.host.begin(description);
        }
        let number = self.number();
        let running = RunningCall {
            call,
            descriptions: description.into_iter().collect(),
            orphaned: false,
            waiter,
        };
        self.calls.insert(number, running);
        let at = self.now + self.latency();
        self.schedule(at, Due::Call { call: number });
    }

    /// Lets something happen.
    pub(super) fn land(&mut self, due: Due, aftermath: &mut Aftermath) {
        let at = self.now.as_nanos() as u64;
        match due {
            Due::Part {
                operation,
                begin,
                end,
            } => self.land_part(operation, begin, end),
            Due::Done { operation } => {
                let running = self.running.remove(&operation);
                let running = running.expect("one completion for each operation");
                self.host.end(running.description);
                let (what, value) = match running.result {
                    Ok(bytes) => (2, bytes),
                    Err(error) => (3, error.raw_os_error() as u64),
                };
                self.note(&[what, at, operation, value]);
                match running.notify {
                    Some(notify) => {
                        let done = &mut self.engines[running.engine].done;
                        done.push((notify, running.result, running.segments));
                    }
                    None => aftermath.dropped.push(running.segments),
                }
            }
            Due::Call { call } => {
                let number = call;
                let running = self.calls.remove(&number);
                let running = running.expect("one answer for each call");
                let fails = self.random.chance(self.faults.call_error_permille)
                    && !matches!(running.call, HostCall::Unlock(..));
                let result = if fails {
                    Err(Errno::IO)
                } else {
                    self.host.call(&running.call, number, &mut self.random)
                };
                for description in running.descriptions {
                    self.host.end(description);
                }
                self.note(&[4, at, number, u64::from(result.is_ok())]);
                running.waiter.result.replace(Some(result));
                aftermath.wakers.extend(running.waiter.waker.take());
            }
            Due::Work { work } => {
                self.note(&[7, at, work]);
                aftermath.work.extend(self.work.remove(&work));
            }
            Due::Ready { engine, watch } => {
                self.note(&[5, at, engine as u64]);
                let engine = &mut self.engines[engine];
                if engine.watches.contains_key(&watch) && !engine.ready.contains(&watch) {
                    engine.ready.push(watch);
                }
            }
        }
    }

    fn land_part(&mut self, operation: u64, begin: u64, end: u64) {
        let running = self.running.get_mut(&operation);
        let running = running.expect("parts come before the completion");
        let (description, offset) = (running.description, running.offset + begin);
        let mut sum = 0;
        match running.kind {
            Kind::Read => {
                let mut bytes = vec![0; (end - begin) as usize];
                self.host.read(description, offset, &mut bytes);
                running.segments.slice(begin, end - begin).copy_from(&bytes);
                sum = checksum(&bytes);
            }
            Kind::Write => {
                let data = running.segments.slice(begin, end - begin).to_vec();
                sum = checksum(&data);
                let change = Change::Write { offset, data };
                self.host.change(description, operation, change);
            }
            Kind::Sync { covered } => {
                let fails = self.random.chance(self.faults.sync_error_permille);
                running.result = if fails {
                    self.host.sync_fails(description, covered, &mut self.random);
                    Err(Errno::IO)
                } else {
                    self.host.sync(description, covered).map(|()| 0)
                };
            }
            Kind::Allocate { bytes, mode } => {
                let done = self
                    .host
                    .allocate(description, operation, (offset, bytes), mode);
                if running.result.is_ok() {
                    running.result = done.map(|()| 0);
                }
            }
        }
        let at = self.now.as_nanos() as u64;
        self.note(&[1, at, operation, begin, end, sum]);
    }

    /// Ends all processes; see [`Simulation::kill`](super::Simulation::kill).
    pub(super) fn kill(&mut self) -> Killed {
        let mut killed = Killed::default();
        for engine in &mut self.engines {
            engine.alive = false;
            engine.asleep = false;
            engine.in_flight = 0;
            engine.watches.clear();
            engine.ready.clear();
            killed.queued.append(&mut engine.queued);
            killed.done.append(&mut engine.done);
            killed.files.push(std::mem::take(&mut engine.files));
        }
        for running in self.running.values_mut() {
            killed.notify.extend(running.notify.take());
        }
        for call in self.calls.values_mut() {
            killed.waiters.push(std::mem::take(&mut call.waiter));
        }
        killed
            .work
            .extend(std::mem::take(&mut self.work).into_values());
        // A kernel cancels what it has not begun, and lets the rest go on. Nobody is left whom a file
        // could be opened for.
        let (random, calls) = (&mut self.random, &mut self.calls);
        let mut cancelled = Vec::new();
        self.due.retain(|_, due| match due {
            Due::Part { .. } => !random.chance(300),
            Due::Done { .. } => true,
            Due::Ready { .. } | Due::Work { .. } => false,
            Due::Call { call } => {
                let opens = matches!(calls[call].call, HostCall::Open(..));
                let goes_on = !opens && !random.chance(300);
                if !goes_on {
                    cancelled.extend(calls.remove(call));
                }
                goes_on
            }
        });
        for description in cancelled.iter().flat_map(|call| &call.descriptions) {
            self.host.end(*description);
        }
        for call in self.calls.values_mut().filter(|call| !call.orphaned) {
            call.orphaned = true;
            call.descriptions.append(&mut self.host.begin_all());
        }
        self.host.orphan_all();
        self.note(&[u64::from_le_bytes(*b"*killed*")]);
        killed
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(bytes.len() as u64, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(sum ^ u64::from_le_bytes(word))
    })
}

struct CallFuture(Rc<CallWaiter>);

impl Future for CallFuture {
    type Output = Result<HostReply, Errno>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(result) = self.0.result.borrow_mut().take() else {
            self.0.waker.set(Some(cx.waker().clone()));
            return Poll::Pending;
        };
        Poll::Ready(result)
    }
}
