//! [`Root`]: a root of the graph on one worker, where requests enter; and [`Request`]: one that has.
//!
//! A root outlives its plans. A drained section holds it: requests that have entered go on to their end,
//! and none enters until it is let go. The plan is replaced only while it is held and nothing is in
//! flight.
//!
//! Invariant: every request that may touch the host has entered, and ends on the worker on which it
//! began. A request that waits for somebody's decision (held back, throttled at the root) has not
//! entered, or has been dropped: drained sections do not wait for it.
//!
//! Threads: a root and its requests stay on their worker. The control thread reaches them by posts to
//! the worker's context ([`super::context`]); nobody here waits for it.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use event_listener::Event;
use futures_channel::oneshot;

use super::announced::Announced;
use super::buffer::Segments;
use super::plan::{LocalPlan, Movable, Plan};
use super::uses::UseId;
use super::{Io, IoContext, Modes};
use crate::IoError;
use crate::driver::{Limits, Preallocation, Status, TruncateFlags, WriteFlags, ZeroFlags};
use crate::engine::{FileId, Notify, Op};
use crate::fault::{self, Fault};
use crate::graph::{NodeId, RootId};

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Zeroes a range.
    WriteZeroes,
    /// Discards a range.
    Discard,
    /// Makes durable what has completed.
    Flush,
    /// Changes the length.
    Truncate,
    /// Anything else, or several of these.
    Other,
}

impl RequestKind {
    fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Flush)
    }
}

/// A request in flight, as a message shows it.
#[derive(Clone, Copy, Debug)]
pub struct InFlight {
    /// What it is about.
    pub kind: RequestKind,
    /// Where, in bytes.
    pub offset: u64,
    /// How much.
    pub bytes: u64,
    /// When it entered, on the engine's clock.
    pub since: Duration,
}

impl fmt::Display for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} of {} bytes at {}",
            self.kind, self.bytes, self.offset
        )
    }
}

/// See the module's header.
pub struct Root {
    id: RootId,
    context: Rc<IoContext>,
    plan: RefCell<Rc<LocalPlan>>,
    held: Cell<bool>,
    /// It is being detached: drained sections wait for it, and nobody new finds it.
    leaving: Cell<bool>,
    fast_path: Cell<bool>,
    requests: RefCell<Requests>,
    /// Who is to be told when nothing is in flight.
    quiet: RefCell<Vec<oneshot::Sender<()>>>,
    let_go: Event,
    pub(super) announced: Announced,
}

#[derive(Default)]
struct Requests {
    slots: Vec<Option<InFlight>>,
    free: Vec<u32>,
}

impl Requests {
    #[inline]
    fn add(&mut self, request: InFlight) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(request);
            return slot;
        }
        self.slots.push(Some(request));
        (self.slots.len() - 1) as u32
    }

    #[inline]
    fn end(&mut self, slot: u32) -> Option<InFlight> {
        self.free.push(slot);
        self.slots[slot as usize].take()
    }

    fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Root {
    /// The root called `id` on the worker of `context`, with `plan` to begin with.
    pub(crate) fn new(id: RootId, context: Rc<IoContext>, plan: Arc<Plan>, held: bool) -> Rc<Self> {
        Rc::new(Self {
            id,
            plan: RefCell::new(LocalPlan::new(&context, plan)),
            context,
            held: Cell::new(held),
            leaving: Cell::new(false),
            fast_path: Cell::new(true),
            requests: RefCell::default(),
            quiet: RefCell::default(),
            let_go: Event::new(),
            announced: Announced::default(),
        })
    }

    /// Which root this is.
    pub fn id(&self) -> RootId {
        self.id
    }

    /// The worker's context.
    pub fn context(&self) -> &Rc<IoContext> {
        &self.context
    }

    /// The plan that requests begin with, now.
    pub fn plan(&self) -> Arc<Plan> {
        Arc::clone(&self.plan.borrow().plan)
    }

    /// Which node it is, now.
    pub(crate) fn node(&self) -> NodeId {
        self.plan.borrow().plan.nodes[0].state.id()
    }

    /// The length in bytes, now.
    pub fn bytes(&self) -> u64 {
        self.plan.borrow().plan.bytes()
    }

    /// How the root's node was opened.
    pub fn modes(&self) -> Modes {
        self.plan.borrow().plan.modes()
    }

    /// The root's node's limits.
    pub fn limits(&self) -> Limits {
        *self.plan.borrow().plan.limits()
    }

    /// Whether requests go past the host's page cache, so that the disk works beside the worker.
    pub fn is_direct(&self) -> bool {
        self.plan.borrow().plan.is_direct()
    }

    /// Sends every request the slow way: a test of that way.
    pub fn disable_fast_path(&self) {
        self.fast_path.set(false);
        self.plan.borrow().set_fast_path(false);
    }

    /// Whether a drained section holds requests back.
    #[inline]
    pub fn is_held(&self) -> bool {
        self.held.get()
    }

    /// How many requests are in flight.
    pub fn in_flight(&self) -> usize {
        self.requests.borrow().count()
    }

    /// The requests in flight, for messages and queries.
    pub fn requests(&self) -> Vec<InFlight> {
        let requests = self.requests.borrow();
        requests.slots.iter().flatten().copied().collect()
    }

    /// Lets a request in; `None` while a drained section holds the root.
    #[inline]
    pub fn try_enter(
        self: &Rc<Self>,
        kind: RequestKind,
        offset: u64,
        bytes: u64,
    ) -> Option<Request> {
        if self.held.get() {
            return None;
        }
        let slot = self.requests.borrow_mut().add(InFlight {
            kind,
            offset,
            bytes,
            since: self.context.turn_time(),
        });
        Some(Request {
            plan: Rc::clone(&self.plan.borrow()),
            root: Rc::clone(self),
            slot,
            in_use: Cell::new(None),
        })
    }

    /// Lets a request in, after waiting for the drained sections that hold the root.
    ///
    /// # Cancellation
    ///
    /// Dropped while it waits, nothing has happened.
    pub async fn enter(self: &Rc<Self>, kind: RequestKind, offset: u64, bytes: u64) -> Request {
        loop {
            let let_go = self.let_go.listen();
            if let Some(request) = self.try_enter(kind, offset, bytes) {
                return request;
            }
            let_go.await;
        }
    }

    /// Reads `into.bytes()` bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`IoError::OutOfRange`] past the end; else what the host said. The segments may then hold
    /// anything.
    pub async fn read(self: &Rc<Self>, offset: u64, into: Segments) -> Result<(), IoError> {
        let request = self.enter(RequestKind::Read, offset, into.bytes()).await;
        request.read(offset, into).await
    }

    /// Writes `from.bytes()` bytes at `offset`. With [`WriteFlags::STABLE`] it is durable when it
    /// completes; the leaf lets one sync serve all such writes that wait.
    ///
    /// # Errors
    ///
    /// [`IoError::ReadOnly`], [`IoError::OutOfRange`]; else what the host said, and the range then
    /// holds old data, new data or a mixture.
    pub async fn write(
        self: &Rc<Self>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let request = self.enter(RequestKind::Write, offset, from.bytes()).await;
        request.write(offset, from, flags).await
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub async fn write_zeroes(
        self: &Rc<Self>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        let request = self.enter(RequestKind::WriteZeroes, offset, bytes).await;
        request.write_zeroes(offset, bytes, flags).await
    }

    /// Tells the host that a range's contents are of no interest. What it reads afterwards is up to
    /// the host.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write); a host that cannot discard is no error.
    pub async fn discard(self: &Rc<Self>, offset: u64, bytes: u64) -> Result<(), IoError> {
        let request = self.enter(RequestKind::Discard, offset, bytes).await;
        request.discard(offset, bytes).await
    }

    /// Makes everything durable that completed before the call.
    ///
    /// # Errors
    ///
    /// [`IoError::FlushLost`] from the first failure on.
    pub async fn flush(self: &Rc<Self>) -> Result<(), IoError> {
        self.enter(RequestKind::Flush, 0, 0).await.flush().await
    }

    /// Holds requests back from now on, or lets them in again.
    pub(crate) fn hold(&self, held: bool) {
        self.held.set(held);
        if !held {
            self.let_go.notify(usize::MAX);
        }
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// Nobody finds the root any more; its requests go on to their end.
    pub(crate) fn leave(&self) {
        self.leaving.set(true);
    }

    /// Tells `reply` when nothing is in flight.
    pub(crate) fn when_quiet(&self, reply: oneshot::Sender<()>) {
        if self.in_flight() == 0 || fault::is_planted(Fault::DrainWait) {
            let _ = reply.send(());
            return;
        }
        self.quiet.borrow_mut().push(reply);
    }

    /// Gives requests another plan from now on.
    pub(crate) fn set_plan(&self, plan: Arc<Plan>) {
        let careless =
            fault::is_planted(Fault::PlanWithoutDrain) || fault::is_planted(Fault::DrainWait);
        assert!(
            careless || self.in_flight() == 0,
            "a plan is replaced in a drained section"
        );
        // The new one first: files of both stay attached.
        let local = LocalPlan::new(&self.context, plan);
        local.set_fast_path(self.fast_path.get());
        let before = self.plan.replace(Rc::clone(&local));
        self.announced
            .plan_changes(&self.context, &before.plan, &local.plan);
    }

    fn ended(&self, slot: u32) {
        self.requests.borrow_mut().end(slot);
        if self.quiet.borrow().is_empty() || self.in_flight() > 0 {
            return;
        }
        for reply in self.quiet.take() {
            // Who does not wait any more need not know.
            let _ = reply.send(());
        }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.announced.end(&self.context, &self.plan.borrow().plan);
    }
}

/// A request that has entered at a root; dropping it ends it.
///
/// It keeps the plan with which it began. Its calls do not wait for drained sections, which wait for
/// it.
pub struct Request {
    root: Rc<Root>,
    plan: Rc<LocalPlan>,
    slot: u32,
    /// What the operation that was started without a task uses, where a layer might move it.
    in_use: Cell<Option<UseId>>,
}

impl Request {
    /// Where it entered.
    pub fn root(&self) -> &Rc<Root> {
        &self.root
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan.plan
    }

    /// The root's node with the pipeline around it. What was started without a task has ended before.
    pub fn io(&self) -> Io<'_> {
        self.end_use();
        Io::root(self)
    }

    /// Another request that goes the same way and has entered as this one has, whatever holds the root by
    /// now: who waits for this one waits for that, too.
    pub(super) fn fork(&self) -> Self {
        let mut requests = self.root.requests.borrow_mut();
        let this = requests.slots[self.slot as usize].expect("until dropped");
        Self {
            slot: requests.add(this),
            root: Rc::clone(&self.root),
            plan: Rc::clone(&self.plan),
            in_use: Cell::new(None),
        }
    }

    /// Something has been changed, well or not: a flush that begins later must cover it.
    pub(crate) fn changed(&self) {
        self.plan.changed();
    }

    /// What [`start_write`](Self::start_write) started has ended, well or not: a flush that begins later
    /// must cover it.
    pub fn wrote(&self) {
        self.changed();
    }

    /// Where an operation without a task goes, recorded as used if a layer might move it.
    #[inline]
    fn place(&self, write: bool, offset: u64, segments: &Segments) -> Option<(FileId, u64)> {
        if !self.plan.may_be_fast() {
            return None;
        }
        if self.plan().moves_data() {
            return self.movable_place(write, offset, segments);
        }
        self.plan().fast(write, offset, segments)
    }

    #[inline]
    fn movable_place(
        &self,
        write: bool,
        offset: u64,
        segments: &Segments,
    ) -> Option<(FileId, u64)> {
        let (place, movable) = self.plan().fast_movable(write, offset, segments)?;
        self.end_use();
        if let Some(Movable {
            node,
            child,
            offset,
        }) = movable
        {
            let uses = self.root.context.uses();
            let id = uses.begin(node, child, offset, segments.bytes());
            self.in_use.set(Some(id));
        }
        Some(place)
    }

    #[inline]
    fn end_use(&self) {
        if let Some(id) = self.in_use.take() {
            self.root.context.uses().end(id);
        }
    }

    /// Starts a read as one operation, completed in [`crate::engine::Engine::poll`] under `token`
    /// with the host's result, which may be short. The request must be kept until then, and starts one
    /// operation at a time.
    ///
    /// # Errors
    ///
    /// Gives the segments back if the request needs [`read`](Self::read).
    #[inline]
    pub fn start_read(&self, offset: u64, into: Segments, token: u64) -> Result<(), Segments> {
        let Some((file, offset)) = self.place(false, offset, &into) else {
            return Err(into);
        };
        let op = Op::Read {
            file,
            offset,
            segments: into,
        };
        self.root.context.engine().start(op, Notify::Token(token));
        Ok(())
    }

    /// As [`start_read`](Self::start_read), for a write that need not be stable when it completes.
    ///
    /// # Errors
    ///
    /// Gives the segments back if the request needs [`write`](Self::write).
    #[inline]
    pub fn start_write(&self, offset: u64, from: Segments, token: u64) -> Result<(), Segments> {
        let Some((file, offset)) = self.place(true, offset, &from) else {
            return Err(from);
        };
        let op = Op::Write {
            file,
            offset,
            segments: from,
        };
        self.root.context.engine().start(op, Notify::Token(token));
        Ok(())
    }

    /// See [`Root::read`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn read(&self, offset: u64, into: Segments) -> Result<(), IoError> {
        self.io().read(offset, into).await
    }

    /// See [`Root::write`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn write(
        &self,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        self.io().write(offset, from, flags).await
    }

    /// See [`Root::write_zeroes`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        self.io().write_zeroes(offset, bytes, flags).await
    }

    /// See [`Root::discard`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn discard(&self, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.io().discard(offset, bytes).await
    }

    /// See [`Root::flush`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn flush(&self) -> Result<(), IoError> {
        self.io().flush().await
    }

    /// See [`Io::truncate`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn truncate(
        &self,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> Result<(), IoError> {
        self.io().truncate(bytes, exact, preallocation, flags).await
    }

    /// See [`Io::block_status`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn block_status(
        &self,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<Status, IoError> {
        self.io().block_status(exact, offset, bytes).await
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.end_use();
        let slots = self.root.requests.borrow();
        let changes = slots.slots[self.slot as usize].is_some_and(|live| live.kind.changes());
        drop(slots);
        if changes {
            self.plan.changed();
        }
        self.root.ended(self.slot);
    }
}
