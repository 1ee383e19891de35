//! A worker: the virtqueues it serves, one engine, and the loop that moves requests between them.
//!
//! The loop never waits but in [`IoContext::sleep`]. While a queue is busy the worker looks at it by
//! itself and its guest does not kick; after a while without work it asks for kicks, looks once more
//! and sleeps. How long that while is adapts to what it bought lately.
//!
//! Threads: everything here belongs to the worker. Others reach it by [`Command`]s in its mailbox and
//! get one reply each; the worker waits for nobody.
//!
//! Invariants: a request is completed exactly once, by the worker that has its queue, and after its last
//! access to the guest's memory. A queue leaves the worker only with nothing of it in flight; requests
//! that are held ([`Holds`]) go with it.

mod disk;
mod held;
mod queue;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use blockcore::IoError;
use blockcore::engine::{Errno, Event, OpResult, WatchId};
use blockcore::graph::RootId;
use blockcore::io::IoContext;
use blockcore::io::account::Recorder;
use blockcore::io::buffer::Segments;
use blockcore::mailbox::Mailbox;
use futures_channel::oneshot;

pub use self::disk::Disk;
use self::disk::{Finished, Served, Task, spawn, split};
use self::held::Failure;
pub use self::held::{HeldRequest, HoldEvent, Holds, Notice, Operation, Parked};
use self::queue::{Queue, Stopping, Taken};
use crate::polling::{PollLimit, Polling};
use crate::vhost_user::memory::{self, GuestMap, GuestView};
use crate::virtio::blk::{self, Request};
use crate::virtio::queue::{Chain, Ring, RingState};

/// Requests taken from one queue before the others and the host have their turn.
const BATCH: usize = 8;
/// The same for a disk past the page cache, which works beside us: it should get its next request early.
const DIRECT_BATCH: usize = 4;
/// The same where the worker shares its core: each turn may then cost it the core.
const CROWDED_BATCH: usize = 64;
/// Completions after which the guest is told, however many more are to come: it can deal with them on
/// its own core meanwhile.
const ANNOUNCE_EVERY: u16 = 8;
/// Turns after which the worker looks whether it has a core to itself.
const CROWDING_LOOK: u32 = 512;
/// It has not if so many turns of those, or more, ended with another thread on its core. Then telling
/// the guest early only makes both take turns more often.
const CROWDED: u64 = 64;
/// How often queues whose guest cannot kick are looked at when idle.
const UNKICKED_LOOK: Duration = Duration::from_millis(1);
/// When a queue that should stop is reported as stuck.
const STUCK: Duration = Duration::from_secs(1);

/// Names a device in this process, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceId(pub u32);

/// Names a virtqueue of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueKey {
    /// Whose it is.
    pub device: DeviceId,
    /// Which of them.
    pub index: u16,
}

/// What control asks of a worker.
pub enum Command {
    /// Serve a queue; refused if something is wrong with its ring.
    Start(Box<StartQueue>, oneshot::Sender<Result<(), Refused>>),
    /// Take no more requests from a queue, finish those in flight, and give back what another can be
    /// made of; `None` if it is not served here.
    Stop(QueueKey, Stop, oneshot::Sender<Option<Stopped>>),
    /// Tell the guest of completions by another descriptor, or by none.
    SetCall(QueueKey, Option<Arc<OwnedFd>>, oneshot::Sender<()>),
    /// Whether writes of a device may complete before they are stable, from the reply on. What has
    /// completed before is the caller's to flush.
    SetWriteback(DeviceId, bool, oneshot::Sender<()>),
    /// Try a device's held requests again. They are reported again if they fail.
    Resume(DeviceId, oneshot::Sender<()>),
    /// No change of a device is held any more: begin the flushes that waited for that.
    LetFlushesGo(DeviceId),
    /// Say which requests of a device are held here.
    ListHeld(DeviceId, oneshot::Sender<Vec<HeldRequest>>),
    /// End, once no queue is served.
    Exit,
}

/// What becomes of a queue's held requests when it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// They complete with the failures that they met: nobody would complete them later.
    End,
    /// They go along to the queue that is started in its place.
    TakeAlong,
}

/// What is left of a queue that was stopped.
pub struct Stopped {
    /// Its ring; what is parked counts as taken.
    pub ring: RingState,
    /// Its held requests.
    pub parked: Vec<Parked>,
    /// What counts its requests.
    pub recorder: Recorder,
}

/// A queue that was not started.
pub struct Refused {
    /// What is wrong.
    pub why: String,
    /// What was asked for.
    pub start: Box<StartQueue>,
}

/// Everything a worker needs to serve a queue.
pub struct StartQueue {
    /// Which queue.
    pub key: QueueKey,
    /// Where its ring is.
    pub ring: RingState,
    /// The guest's memory.
    pub memory: Arc<GuestMap>,
    /// Readable when the guest kicks; `None` if it never does.
    pub kick: Option<Arc<OwnedFd>>,
    /// Written to when the guest is to be told.
    pub call: Option<Arc<OwnedFd>>,
    /// Written to when the ring is broken.
    pub error: Option<Arc<OwnedFd>>,
    /// The disk: attached to this worker already.
    pub root: RootId,
    /// What its requests are checked against and answered with.
    pub disk: Disk,
    /// Whether writes may complete before they are stable.
    pub writeback: bool,
    /// Ends the front-end's connection, without waiting.
    pub hang_up: Arc<dyn Fn() + Send + Sync>,
    /// Held requests of the queue in whose place it is started; its ring has as many descriptors.
    pub parked: Vec<Parked>,
    /// Counts its requests.
    pub recorder: Recorder,
    /// Counts requests of no known kind, and broken rings.
    pub nonsense: Arc<AtomicU64>,
}

/// See the module's header.
pub struct Worker {
    context: Rc<IoContext>,
    commands: Arc<Mailbox<Command>>,
    inbox: Vec<Command>,
    queues: Vec<Option<Queue>>,
    disks: BTreeMap<DeviceId, Rc<Served>>,
    finished: Finished,
    events: Vec<Event>,
    /// Reused from one request to the next.
    chain: Chain,
    faults: u32,
    /// Another thread's work is done on this worker's core.
    crowded: bool,
    exiting: bool,
    fast_path: bool,
}

impl Worker {
    /// A worker without queues, whose commands come in `commands`.
    pub fn new(context: Rc<IoContext>, commands: Arc<Mailbox<Command>>) -> Self {
        Self {
            context,
            commands,
            inbox: Vec::new(),
            queues: Vec::new(),
            disks: BTreeMap::new(),
            finished: Finished::default(),
            events: Vec::new(),
            chain: Chain::default(),
            faults: memory::faults(),
            crowded: false,
            exiting: false,
            fast_path: true,
        }
    }

    /// Sends every request the slow way: a test of that way.
    pub fn disable_fast_path(&mut self) {
        self.fast_path = false;
    }

    /// Serves until told to exit.
    pub fn run(mut self, poll_max: &PollLimit) {
        let mut polling = Polling::new(poll_max.get());
        let mut idle_since = None;
        let (mut turns, mut preemptions) = (0, 0);
        while !self.is_done() {
            if self.turn() {
                turns += 1;
                if turns == CROWDING_LOOK {
                    let now = self.context.engine().preemptions();
                    self.crowded = now - std::mem::replace(&mut preemptions, now) >= CROWDED;
                    turns = 0;
                }
                if idle_since.take().is_some() {
                    polling.caught();
                }
                continue;
            }
            let now = self.context.engine().now();
            let since = *idle_since.get_or_insert(now);
            if now - since < polling.window() {
                std::hint::spin_loop();
                continue;
            }
            if !self.arm() {
                continue;
            }
            self.sleep();
            polling.set_max(poll_max.get());
            polling.slept(self.context.engine().now() - now);
            idle_since = None;
        }
    }

    /// Whether it was told to exit and nothing holds it.
    pub fn is_done(&self) -> bool {
        self.exiting && self.queues.iter().all(Option::is_none) && self.context.tasks() == 0
    }

    /// One turn of the loop: never waits. Returns whether there was anything to do.
    pub fn turn(&mut self) -> bool {
        let mut progress = self.take_commands();
        self.look_for_faults();
        let now = self.context.turn_time();
        for queue in self.queues.iter_mut().flatten() {
            queue.look_at_the_time(now);
        }
        for slot in 0..self.queues.len() {
            progress |= self.pump(slot);
        }
        let mut events = std::mem::take(&mut self.events);
        progress |= self.context.turn(&mut events);
        progress |= !events.is_empty();
        let announce_every = if self.crowded {
            u16::MAX
        } else {
            ANNOUNCE_EVERY
        };
        for event in events.drain(..) {
            match event {
                Event::Done {
                    token,
                    result,
                    segments,
                } => {
                    self.transferred(token, result, segments);
                    let (slot, _) = split(token);
                    if let Some(queue) = &mut self.queues[slot]
                        && queue.ring.unpublished() >= announce_every
                    {
                        queue.announce();
                    }
                }
                Event::Ready(watch) => self.kicked(watch),
            }
        }
        self.events = events;
        progress |= self.collect_finished();
        for queue in self.queues.iter_mut().flatten() {
            queue.announce();
        }
        self.finish_stops();
        progress
    }

    /// Asks the guests to kick; returns whether the worker may sleep.
    pub fn arm(&mut self) -> bool {
        for queue in self.queues.iter_mut().flatten() {
            if queue.may_try_again() {
                return false;
            }
            if !queue.armed && queue.may_pop() {
                queue.armed = queue.watch.is_some();
                if queue.ring.want_kicks() {
                    queue.armed = false;
                    return false;
                }
            }
        }
        true
    }

    /// Sleeps until something happens, after [`arm`](Self::arm) has allowed it.
    pub fn sleep(&mut self) {
        let unkicked = self
            .queues
            .iter()
            .flatten()
            .any(|queue| queue.watch.is_none() && queue.may_pop());
        let stopping = self.queues.iter().flatten().any(|q| q.stopping.is_some());
        let now = self.context.engine().now();
        let retries = self.queues.iter().flatten().filter_map(|q| q.retry_at);
        let limits = [
            unkicked.then_some(UNKICKED_LOOK),
            stopping.then_some(STUCK),
            retries.min().map(|at| at.saturating_sub(now)),
        ];
        let limit = limits.into_iter().flatten().min();
        let commands = &self.commands;
        self.context
            .sleep(&mut self.events, limit, || commands.is_empty());
    }

    fn take_commands(&mut self) -> bool {
        let mut inbox = std::mem::take(&mut self.inbox);
        self.commands.take(&mut inbox);
        let any = !inbox.is_empty();
        for command in inbox.drain(..) {
            self.command(command);
        }
        self.inbox = inbox;
        any
    }

    fn command(&mut self, command: Command) {
        let now = self.context.engine().now();
        match command {
            Command::Start(start, reply) => self.start(start, reply),
            Command::Stop(key, how, reply) => match self.find(key) {
                Some(queue) if queue.stopping.is_none() => {
                    queue.stopping = Some(Stopping {
                        reply,
                        how,
                        report_at: Some(now + STUCK),
                    });
                }
                // Two stops of one queue come from nobody; the second is told that it is gone.
                _ => {
                    let _ = reply.send(None);
                }
            },
            Command::SetCall(key, call, reply) => {
                if let Some(queue) = self.find(key) {
                    queue.call = call;
                    // What was announced to the old descriptor may not have been heard.
                    queue.signal();
                }
                let _ = reply.send(());
            }
            Command::SetWriteback(device, writeback, reply) => {
                if let Some(served) = self.disks.get(&device) {
                    served.writeback.set(writeback);
                }
                let _ = reply.send(());
            }
            Command::Resume(device, reply) => {
                self.each_of(device).for_each(Queue::resume);
                let _ = reply.send(());
            }
            Command::LetFlushesGo(device) => {
                self.each_of(device).for_each(Queue::let_flushes_go);
            }
            Command::ListHeld(device, reply) => {
                let held = self
                    .each_of(device)
                    .flat_map(|queue| queue.held_requests(now));
                let _ = reply.send(held.collect());
            }
            Command::Exit => self.exiting = true,
        }
    }

    fn find(&mut self, key: QueueKey) -> Option<&mut Queue> {
        let mut queues = self.queues.iter_mut().flatten();
        queues.find(|queue| queue.key == key)
    }

    fn each_of(&mut self, device: DeviceId) -> impl Iterator<Item = &mut Queue> {
        let queues = self.queues.iter_mut().flatten();
        queues.filter(move |queue| queue.key.device == device)
    }

    fn start(&mut self, start: Box<StartQueue>, reply: oneshot::Sender<Result<(), Refused>>) {
        let view = GuestView::new(Arc::clone(&start.memory));
        let max_chain = (blk::SEG_MAX + 2) as u16;
        let ring = Ring::new(start.ring, Rc::clone(&view), max_chain);
        let root = self.context.root(start.root);
        let root = root.ok_or_else(|| "its disk is gone".to_owned());
        let (mut ring, root) = match ring.and_then(|ring| Ok((ring, root?))) {
            Ok(both) => both,
            Err(why) => {
                let _ = reply.send(Err(Refused { why, start }));
                return;
            }
        };
        view.announce_to(&root);
        let start = *start;
        let device = start.key.device;
        ring.take_along(start.parked.iter().map(|parked| parked.head));
        let served = self.disks.entry(device).or_insert_with(|| {
            if !self.fast_path {
                root.disable_fast_path();
            }
            Rc::new(Served {
                root,
                disk: start.disk,
                writeback: Cell::new(start.writeback),
            })
        });
        let served = Rc::clone(served);
        served.writeback.set(start.writeback);
        let size = usize::from(ring.size());
        let (due, parked): (Vec<_>, _) = start.parked.into_iter().partition(|one| one.due);
        // Held requests wait as long again: the queue begins anew.
        let retry = served.disk.holds.retry().filter(|_| !parked.is_empty());
        let retry_at = retry.map(|retry| self.context.turn_time() + retry);
        let flushes_may_go = !served.disk.holds.changes_are_held();
        let mut queue = Queue {
            key: start.key,
            ring,
            served,
            watch: start.kick.map(|kick| self.context.engine().watch(kick)),
            call: start.call,
            error: start.error,
            pending: std::iter::repeat_with(|| None).take(size).collect(),
            in_flight: 0,
            parked,
            again: due.into(),
            retry_at,
            armed: false,
            held: false,
            broken: false,
            stopping: None,
            quiet_until: Duration::ZERO,
            unsaid: 0,
            hang_up: start.hang_up,
            recorder: start.recorder,
            nonsense: start.nonsense,
        };
        if flushes_may_go {
            // They were on their way here when the last change was over.
            queue.let_flushes_go();
        }
        match self.queues.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(queue),
            None => self.queues.push(Some(queue)),
        }
        let _ = reply.send(Ok(()));
    }

    fn look_for_faults(&mut self) {
        let faults = memory::faults();
        if faults == self.faults {
            return;
        }
        self.faults = faults;
        for queue in self.queues.iter_mut().flatten() {
            if queue.ring.view().map().faulted() && !queue.broken {
                queue.broken = true;
                tracing::error!(
                    export = %queue.served.disk.export,
                    "the front-end cut its memory short: ending its connection"
                );
                (queue.hang_up)();
            }
        }
    }

    /// Takes requests from one queue and starts them.
    fn pump(&mut self, slot: usize) -> bool {
        let Some(queue) = &mut self.queues[slot] else {
            return false;
        };
        queue.look_for_hold();
        if !queue.may_pop() || (queue.armed && queue.again.is_empty()) {
            return false;
        }
        let mut progress = false;
        let batch = match (self.crowded, queue.served.root.is_direct()) {
            (true, _) => CROWDED_BATCH,
            (false, true) => DIRECT_BATCH,
            (false, false) => BATCH,
        };
        let mut suppressed = false;
        for _ in 0..batch {
            let taken = queue.take(slot, &mut self.chain, &self.context, &self.finished);
            if matches!(taken, Ok(None)) {
                break;
            }
            progress = true;
            // A guest that is to kick must not be asked to leave that: nobody looks at its ring.
            let new = !queue.armed && !matches!(taken, Ok(Some(Taken::Again)));
            if new && !std::mem::replace(&mut suppressed, true) {
                queue.ring.suppress_kicks();
            }
            if let Err(error) = taken {
                queue.break_down(error);
                break;
            }
        }
        progress
    }

    fn kicked(&mut self, watch: WatchId) {
        let mut queues = self.queues.iter_mut().flatten();
        if let Some(queue) = queues.find(|queue| queue.watch == Some(watch)) {
            queue.armed = false;
        }
    }

    /// An operation of the path without tasks is over.
    fn transferred(&mut self, token: u64, result: OpResult, segments: Segments) {
        let (slot, head) = split(token);
        let queue = self.queues[slot].as_mut();
        let queue = queue.expect("a queue stays while requests of it are in flight");
        let pending = queue.pending[usize::from(head)].as_mut();
        let pending = pending.expect("in flight until completed");
        let bytes = segments.bytes();
        let done = match result {
            Ok(done) if done == bytes => {
                let changed = matches!(pending.request, Request::Write { .. });
                if !changed || queue.served.writeback.get() {
                    return queue.complete(head, Ok(()));
                }
                // The guest left writeback while this was under way.
                let entered = pending.entered.take().expect("kept until it is over");
                entered.wrote();
                let served = Rc::clone(&queue.served);
                let (context, finished) = (&self.context, &self.finished);
                return spawn(context, finished, token, served, entered, Task::Flush);
            }
            Ok(done) => done,
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Err(error) => return queue.complete(head, Err(Failure::from(IoError::from(error)))),
        };
        // Cut short: the slow way sees the rest through, from an offset that suits every layer.
        let unit = u64::from(queue.served.root.limits().logical_block_bytes);
        let done = blockcore::io::align::down(done, unit.max(4096));
        let served = Rc::clone(&queue.served);
        let rest = segments.slice(done, bytes - done);
        let entered = pending.entered.take().expect("kept until it is over");
        let task = match pending.request {
            Request::Read { offset, .. } => Task::Read(offset + done, rest),
            Request::Write { offset, .. } => Task::Write(offset + done, rest),
            _ => unreachable!("only transfers take the path without tasks"),
        };
        let (context, finished) = (&self.context, &self.finished);
        spawn(context, finished, token, served, entered, task);
    }

    fn collect_finished(&mut self) -> bool {
        let mut finished = self.finished.take();
        let any = !finished.is_empty();
        for (token, result) in finished.drain(..) {
            let (slot, head) = split(token);
            let queue = self.queues[slot].as_mut();
            let queue = queue.expect("a queue stays while requests of it are in flight");
            queue.complete(head, result);
        }
        let mut place = self.finished.borrow_mut();
        if place.is_empty() {
            *place = finished;
        }
        any
    }

    fn finish_stops(&mut self) {
        for slot in &mut self.queues {
            let stopped = |queue: &Queue| queue.stopping.is_some() && queue.in_flight == 0;
            if !slot.as_ref().is_some_and(stopped) {
                if let Some(queue) = slot {
                    queue.report_stuck(self.context.engine());
                }
                continue;
            }
            let mut queue = slot.take().expect("looked at above");
            if let Some(watch) = queue.watch {
                self.context.engine().unwatch(watch);
            }
            let device = queue.key.device;
            let stopping = queue.stopping.take().expect("looked at above");
            let stopped = queue.stopped(stopping.how, &mut self.chain);
            // Nothing here keeps the memory mapped any longer.
            self.chain = Chain::default();
            let _ = stopping.reply.send(Some(stopped));
            let last = |served: &Rc<Served>| Rc::strong_count(served) == 1;
            if self.disks.get(&device).is_some_and(last) {
                self.disks.remove(&device);
            }
        }
    }
}
