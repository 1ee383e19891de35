//! A worker: the virtqueues it serves, one engine, and the loop that moves requests between them.
//!
//! The loop never waits but in [`IoContext::sleep`]. While a queue is busy the worker looks at it by
//! itself and its guest does not kick; after a while without work it asks for kicks, looks once more
//! and sleeps. How long that while is adapts to what it bought lately.
//!
//! Threads: everything here belongs to the worker. Others reach it by [`Command`]s in its mailbox and
//! get one reply each; the worker waits for nobody.
//!
//! Invariants: a request is completed exactly once, by the worker that popped it, and after its last
//! access to the guest's memory. A queue leaves the worker only with nothing of it in flight. While the
//! write cache is off no write completes before it is stable, in whatever mode it began.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockcore::IoError;
use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::engine::{Engine, Errno, Event, OpResult, WatchId};
use blockcore::io::buffer::{Byte, Segments};
use blockcore::io::{IoContext, Plan, Root};
use blockcore::mailbox::Mailbox;
use futures_channel::oneshot;

use crate::polling::Polling;
use crate::vhost_user::memory::{self, GuestMap, GuestView};
use crate::virtio::blk::{self, Geometry, Range, Request, Status};
use crate::virtio::queue::{Chain, Ring, RingError, RingState};

/// Requests taken from one queue before the others and the host have their turn.
const BATCH: usize = 16;
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
    /// Serve a queue; the answer says what is wrong with its ring.
    Start(Box<StartQueue>, oneshot::Sender<Result<(), String>>),
    /// Take no more requests from a queue, finish those in flight, and give its state back; `None` if
    /// it is not served here.
    Stop(QueueKey, oneshot::Sender<Option<RingState>>),
    /// Tell the guest of completions by another descriptor, or by none.
    SetCall(QueueKey, Option<OwnedFd>, oneshot::Sender<()>),
    /// Whether writes of a device may complete before they are stable. What was written before a
    /// change to "not" is flushed before the reply.
    SetWriteback(DeviceId, bool, oneshot::Sender<Result<(), IoError>>),
    /// End, once no queue is served.
    Exit,
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
    pub call: Option<OwnedFd>,
    /// Written to when the ring is broken.
    pub error: Option<OwnedFd>,
    /// The disk.
    pub plan: Arc<Plan>,
    /// What its requests are checked against and answered with.
    pub disk: Disk,
    /// Whether writes may complete before they are stable.
    pub writeback: bool,
    /// Ends the front-end's connection, without waiting.
    pub hang_up: Arc<dyn Fn() + Send + Sync>,
    /// What is counted.
    pub stats: Arc<Stats>,
}

/// What the device is besides its plan.
#[derive(Clone, Debug)]
pub struct Disk {
    /// For messages.
    pub export: Arc<str>,
    /// Smallest unit of a request.
    pub block_bytes: u32,
    /// Nothing may be changed.
    pub read_only: bool,
    /// What GET_ID answers.
    pub id: [u8; blk::ID_BYTES],
}

/// Counters of one queue. Only the worker that serves it adds; anybody may read.
#[derive(Default)]
pub struct Stats {
    /// Reads completed, failed ones included.
    pub reads: AtomicU64,
    /// Writes completed, failed ones included.
    pub writes: AtomicU64,
    /// Flushes completed, failed ones included.
    pub flushes: AtomicU64,
    /// Discards and zeroings completed, failed ones included.
    pub ranges: AtomicU64,
    /// Requests that did not end well, invalid ones included.
    pub errors: AtomicU64,
}

fn count(counter: &AtomicU64) {
    // One writer: no need of an atomic addition.
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// The disk of a device, as far as this worker serves it.
struct Served {
    root: Rc<Root>,
    disk: Disk,
    writeback: Cell<bool>,
    /// A write that need not be stable has ended since the last flush began.
    unflushed: Cell<bool>,
}

impl Served {
    fn geometry(&self) -> Geometry {
        Geometry {
            bytes: self.root.plan().bytes(),
            block_bytes: self.disk.block_bytes,
            read_only: self.disk.read_only,
        }
    }

    fn write_flags(&self) -> WriteFlags {
        match self.writeback.get() {
            true => WriteFlags::empty(),
            false => WriteFlags::STABLE,
        }
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.unflushed.set(false);
        let outcome = self.root.flush().await;
        if outcome.is_err() {
            self.unflushed.set(true);
        }
        outcome
    }
}

/// A request that was popped and is not completed.
struct Pending {
    request: Request,
    status: Byte,
    /// Bytes written to the guest if it succeeds.
    written: u32,
}

struct Queue {
    key: QueueKey,
    ring: Ring,
    served: Rc<Served>,
    watch: Option<WatchId>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    pending: Vec<Option<Pending>>,
    in_flight: usize,
    /// The guest will kick for the next request: there is no need to look.
    armed: bool,
    broken: bool,
    stopping: Option<Stopping>,
    hang_up: Arc<dyn Fn() + Send + Sync>,
    stats: Arc<Stats>,
}

/// A queue that takes no more requests and ends when none is in flight.
struct Stopping {
    reply: oneshot::Sender<Option<RingState>>,
    /// When those who wait for it should read why, if it has not ended.
    report_at: Option<Duration>,
}

/// Outcomes of requests that took the slow way, on their way back to their queues.
type Finished = Rc<RefCell<Vec<(u64, Result<(), IoError>)>>>;

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
    batch: usize,
    announce_every: u16,
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
            batch: BATCH,
            announce_every: ANNOUNCE_EVERY,
            exiting: false,
            fast_path: true,
        }
    }

    /// Sends every request the slow way: a test of that way.
    pub fn disable_fast_path(&mut self) {
        self.fast_path = false;
    }

    /// Serves until told to exit.
    pub fn run(mut self, max_poll: Duration) {
        let mut polling = Polling::new(max_poll);
        let mut idle_since = None;
        let (mut turns, mut preemptions) = (0, 0);
        while !self.is_done() {
            if self.turn() {
                turns += 1;
                if turns == CROWDING_LOOK {
                    let now = self.context.engine().preemptions();
                    let crowded = now - std::mem::replace(&mut preemptions, now) >= CROWDED;
                    (self.batch, self.announce_every) = match crowded {
                        true => (CROWDED_BATCH, u16::MAX),
                        false => (BATCH, ANNOUNCE_EVERY),
                    };
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
        for slot in 0..self.queues.len() {
            progress |= self.pump(slot);
        }
        let mut events = std::mem::take(&mut self.events);
        progress |= self.context.turn(&mut events);
        progress |= !events.is_empty();
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
                        && queue.ring.unpublished() >= self.announce_every
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
        let limit = match (unkicked, stopping) {
            (true, _) => Some(UNKICKED_LOOK),
            (false, true) => Some(STUCK),
            (false, false) => None,
        };
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
            Command::Start(start, reply) => self.start(*start, reply),
            Command::Stop(key, reply) => match self.find(key) {
                Some(queue) if queue.stopping.is_none() => {
                    queue.stopping = Some(Stopping {
                        reply,
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
                self.set_writeback(device, writeback, reply);
            }
            Command::Exit => self.exiting = true,
        }
    }

    fn find(&mut self, key: QueueKey) -> Option<&mut Queue> {
        let mut queues = self.queues.iter_mut().flatten();
        queues.find(|queue| queue.key == key)
    }

    fn start(&mut self, start: StartQueue, reply: oneshot::Sender<Result<(), String>>) {
        let view = GuestView::new(start.memory);
        let max_chain = (blk::SEG_MAX + 2) as u16;
        let ring = match Ring::new(start.ring, view, max_chain) {
            Ok(ring) => ring,
            Err(why) => {
                let _ = reply.send(Err(why));
                return;
            }
        };
        let device = start.key.device;
        let served = self.disks.entry(device).or_insert_with(|| {
            let root = Root::new(Rc::clone(&self.context), Arc::clone(&start.plan));
            if !self.fast_path {
                root.disable_fast_path();
            }
            Rc::new(Served {
                root,
                disk: start.disk,
                writeback: Cell::new(start.writeback),
                unflushed: Cell::new(false),
            })
        });
        let served = Rc::clone(served);
        served.writeback.set(start.writeback);
        let size = usize::from(ring.size());
        let queue = Queue {
            key: start.key,
            ring,
            served,
            watch: start.kick.map(|kick| self.context.engine().watch(kick)),
            call: start.call,
            error: start.error,
            pending: std::iter::repeat_with(|| None).take(size).collect(),
            in_flight: 0,
            armed: false,
            broken: false,
            stopping: None,
            hang_up: start.hang_up,
            stats: start.stats,
        };
        match self.queues.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(queue),
            None => self.queues.push(Some(queue)),
        }
        let _ = reply.send(Ok(()));
    }

    fn set_writeback(
        &self,
        device: DeviceId,
        writeback: bool,
        reply: oneshot::Sender<Result<(), IoError>>,
    ) {
        let Some(served) = self.disks.get(&device).map(Rc::clone) else {
            let _ = reply.send(Ok(()));
            return;
        };
        served.writeback.set(writeback);
        if writeback || !served.unflushed.get() {
            let _ = reply.send(Ok(()));
            return;
        }
        // A guest that leaves writeback sends no more flushes for what it wrote before.
        self.context.spawn(async move {
            let _ = reply.send(served.flush().await);
        });
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
        if queue.armed || !queue.may_pop() {
            return false;
        }
        let mut popped = false;
        for _ in 0..self.batch {
            let begun = match queue.ring.pop(&mut self.chain) {
                Ok(false) => break,
                Ok(true) => queue.begin(slot, &mut self.chain, &self.context, &self.finished),
                Err(error) => Err(error),
            };
            if !std::mem::replace(&mut popped, true) {
                queue.ring.suppress_kicks();
            }
            if let Err(error) = begun {
                queue.break_down(error);
                break;
            }
        }
        popped
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
        let pending = queue.pending[usize::from(head)].as_ref();
        let pending = pending.expect("in flight until completed");
        let bytes = segments.bytes();
        let write = matches!(pending.request, Request::Write { .. });
        if write {
            queue.served.unflushed.set(true);
        }
        let done = match result {
            Ok(done) if done == bytes => {
                if !write || queue.served.writeback.get() {
                    return queue.complete(head, Ok(()));
                }
                // The write cache was turned off meanwhile: the guest will not flush for this one.
                let served = Rc::clone(&queue.served);
                return spawn(&self.context, &self.finished, token, served, Task::Flush);
            }
            Ok(done) => done,
            Err(Errno::INTR | Errno::AGAIN) => 0,
            Err(error) => return queue.complete(head, Err(error.into())),
        };
        // Cut short: the slow way sees the rest through, from an offset that suits every layer.
        let unit = u64::from(queue.served.root.plan().limits().logical_block_bytes);
        let done = blockcore::io::align::down(done, unit.max(4096));
        let served = Rc::clone(&queue.served);
        let rest = segments.slice(done, bytes - done);
        let task = match pending.request {
            Request::Read { offset, .. } => Task::Read(offset + done, rest),
            Request::Write { offset, .. } => Task::Write(offset + done, rest),
            _ => unreachable!("only transfers take the path without tasks"),
        };
        spawn(&self.context, &self.finished, token, served, task);
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
            let _ = stopping.reply.send(Some(queue.ring.state()));
            drop(queue);
            // Nothing here keeps the memory mapped any longer.
            self.chain = Chain::default();
            let last = |served: &Rc<Served>| Rc::strong_count(served) == 1;
            if self.disks.get(&device).is_some_and(last) {
                self.disks.remove(&device);
            }
        }
    }
}

fn token(slot: usize, head: u16) -> u64 {
    (slot as u64) << 16 | u64::from(head)
}

fn split(token: u64) -> (usize, u16) {
    ((token >> 16) as usize, token as u16)
}

/// A request that takes the slow way.
enum Task {
    Read(u64, Segments),
    Write(u64, Segments),
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

impl Task {
    async fn run(self, served: &Served) -> Result<(), IoError> {
        let flags = served.write_flags();
        let changes = !matches!(self, Self::Read(..) | Self::Flush);
        let outcome = self.transfer(served, flags).await;
        if !changes || flags.contains(WriteFlags::STABLE) {
            return outcome;
        }
        served.unflushed.set(true);
        if outcome.is_ok() && !served.writeback.get() {
            // The write cache was turned off meanwhile: the guest will not flush for this one.
            return served.flush().await;
        }
        outcome
    }

    async fn transfer(self, served: &Served, flags: WriteFlags) -> Result<(), IoError> {
        let root = &served.root;
        match self {
            Self::Read(offset, into) => root.read(offset, into).await,
            Self::Write(offset, from) => root.write(offset, from, flags).await,
            Self::Flush => served.flush().await,
            Self::Discard(ranges) => {
                for range in ranges {
                    root.discard(range.offset, range.bytes, flags).await?;
                }
                Ok(())
            }
            Self::WriteZeroes(ranges) => {
                for range in ranges {
                    let zero = match range.unmap {
                        true => ZeroFlags::MAY_UNMAP,
                        false => ZeroFlags::empty(),
                    };
                    root.write_zeroes(range.offset, range.bytes, zero, flags)
                        .await?;
                }
                Ok(())
            }
        }
    }
}

fn spawn(context: &IoContext, finished: &Finished, token: u64, served: Rc<Served>, task: Task) {
    let finished = Rc::clone(finished);
    context.spawn(async move {
        let result = task.run(&served).await;
        finished.borrow_mut().push((token, result));
    });
}

impl Queue {
    fn may_pop(&self) -> bool {
        !self.broken && self.stopping.is_none()
    }

    /// Says, once, which requests a stop has been waiting for.
    fn report_stuck(&mut self, engine: &dyn Engine) {
        let Some(stopping) = &mut self.stopping else {
            return;
        };
        if stopping.report_at.is_none_or(|at| engine.now() < at) {
            return;
        }
        stopping.report_at = None;
        let waits: Vec<_> = self.pending.iter().flatten().map(|p| p.request).collect();
        tracing::warn!(
            export = %self.served.disk.export,
            queue = self.key.index,
            ?waits,
            "still waiting for the host to finish requests"
        );
    }

    /// Starts a request, or completes it at once.
    fn begin(
        &mut self,
        slot: usize,
        chain: &mut Chain,
        context: &IoContext,
        finished: &Finished,
    ) -> Result<(), RingError> {
        let head = chain.head;
        let no_status = RingError::NoStatus(head);
        if chain.outside && !chain.status_inside {
            return Err(no_status);
        }
        let status = chain.writable.take_last_byte().ok_or(no_status)?;
        let mut header = [0; blk::HEADER_BYTES as usize];
        let whole = !chain.outside && chain.readable.copy_to(&mut header) == header.len();
        let request = if whole {
            chain.readable.skip(blk::HEADER_BYTES);
            let (readable, writable) = (chain.readable.bytes(), chain.writable.bytes());
            blk::parse(header, readable, writable, self.served.geometry())
        } else {
            Err(Status::IoError)
        };
        let request = match request {
            Ok(request) => request,
            Err(refused) => {
                count(&self.stats.errors);
                status.set(refused as u8);
                self.ring.push(head, 1);
                return Ok(());
            }
        };
        self.in_flight += 1;
        self.pending[usize::from(head)] = Some(Pending {
            request,
            status,
            written: 1,
        });
        let served = Rc::clone(&self.served);
        let token = token(slot, head);
        let task = match request {
            Request::Read { offset, bytes } => {
                let written = u32::try_from(bytes + 1).unwrap_or(u32::MAX);
                self.set_written(head, written);
                match served
                    .root
                    .start_read(offset, std::mem::take(&mut chain.writable), token)
                {
                    Ok(()) => return Ok(()),
                    Err(into) => Task::Read(offset, into),
                }
            }
            Request::Write { offset, .. } if served.writeback.get() => {
                match served
                    .root
                    .start_write(offset, std::mem::take(&mut chain.readable), token)
                {
                    Ok(()) => return Ok(()),
                    Err(from) => Task::Write(offset, from),
                }
            }
            Request::Write { offset, .. } => {
                Task::Write(offset, std::mem::take(&mut chain.readable))
            }
            Request::Flush => Task::Flush,
            Request::GetId => {
                let bytes = chain.writable.copy_from(&served.disk.id);
                self.set_written(head, bytes as u32 + 1);
                self.complete(head, Ok(()));
                return Ok(());
            }
            Request::Discard { .. } | Request::WriteZeroes { .. } => {
                let discard = matches!(request, Request::Discard { .. });
                match self.ranges(&chain.readable, discard) {
                    Ok(ranges) if discard => Task::Discard(ranges),
                    Ok(ranges) => Task::WriteZeroes(ranges),
                    Err(refused) => {
                        self.finish(head, refused);
                        return Ok(());
                    }
                }
            }
        };
        spawn(context, finished, token, served, task);
        Ok(())
    }

    fn set_written(&mut self, head: u16, written: u32) {
        if let Some(pending) = &mut self.pending[usize::from(head)] {
            pending.written = written;
        }
    }

    /// Reads the ranges, once, and checks them all before the first takes effect.
    fn ranges(&self, readable: &Segments, discard: bool) -> Result<Vec<Range>, Status> {
        let geometry = self.served.geometry();
        let raw = readable.to_vec();
        let (raw, rest) = raw.as_chunks::<{ blk::RANGE_BYTES as usize }>();
        debug_assert!(rest.is_empty(), "whole ranges, checked by the parser");
        raw.iter()
            .map(|raw| blk::parse_range(*raw, discard, geometry))
            .collect()
    }

    fn complete(&mut self, head: u16, result: Result<(), IoError>) {
        let status = match result {
            Ok(()) => Status::Ok,
            Err(IoError::Unsupported) => Status::Unsupported,
            Err(_) => Status::IoError,
        };
        if let Err(error) = result {
            let pending = self.pending[usize::from(head)].as_ref();
            tracing::warn!(
                export = %self.served.disk.export,
                queue = self.key.index,
                request = ?pending.map(|pending| pending.request),
                %error,
                "a request failed"
            );
        }
        self.finish(head, status);
    }

    fn finish(&mut self, head: u16, status: Status) {
        let pending = self.pending[usize::from(head)].take();
        let pending = pending.expect("completed exactly once");
        self.in_flight -= 1;
        count(match pending.request {
            Request::Read { .. } | Request::GetId => &self.stats.reads,
            Request::Write { .. } => &self.stats.writes,
            Request::Flush => &self.stats.flushes,
            Request::Discard { .. } | Request::WriteZeroes { .. } => &self.stats.ranges,
        });
        let written = match status {
            Status::Ok => pending.written,
            Status::IoError | Status::Unsupported => {
                count(&self.stats.errors);
                1
            }
        };
        pending.status.set(status as u8);
        self.ring.push(head, written);
    }

    /// Shows the guest its completions, and calls it if it wants that.
    fn announce(&mut self) {
        if self.ring.publish() {
            self.signal();
        }
    }

    fn signal(&self) {
        if let Some(call) = &self.call {
            // Never blocks; a full counter means that a call is pending already.
            let _ = rustix::io::write(call, &1_u64.to_ne_bytes());
        }
    }

    /// The guest broke the ring's rules: nothing more is taken from it until it is started anew.
    fn break_down(&mut self, error: RingError) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        count(&self.stats.errors);
        tracing::error!(
            export = %self.served.disk.export,
            queue = self.key.index,
            %error,
            "the guest broke this virtqueue: it is stopped until its driver resets it"
        );
        if let Some(fd) = &self.error {
            let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_queue_and_head() {
        assert_eq!(split(token(70_000, 65_535)), (70_000, 65_535));
    }
}
