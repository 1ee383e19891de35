//! A worker context: the engine, tasks and timers that everything on one worker shares.
//!
//! The control thread and jobs have one too, so that their I/O takes part in whatever queues' I/O
//! takes part in.
//!
//! Other threads reach a worker's roots by its [`ContextHandle`]: what they post runs at the worker's
//! next turn, in order. Posts come before events and tasks of the same turn.
//!
//! Threads: its worker. Waits only in [`IoContext::sleep`], which is the worker's one wait point.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::{Poll, Waker};
use std::time::Duration;

use event_listener::Event as Changed;
use futures_channel::oneshot;

use crate::engine::{
    Engine, Errno, Event, HostCall, HostReply, Interest, Op, OpFuture, OpResult, ReadyFuture,
};
use crate::executor::Executor;
use crate::graph::RootId;
use crate::io::Root;
use crate::io::buffer::Segments;
use crate::io::uses::Uses;
use crate::mailbox::Mailbox;

/// How much memory the bounce buffers of one worker may have. A guest decides how many requests it has
/// under way and how its memory is aligned; those beyond this wait.
const BOUNCE_BYTES: u64 = 64 << 20;

/// Buffers of this size are kept for the next who needs one: taken from the system and given back again
/// and again, they would leave its heap in pieces.
const POOLED_BYTES: usize = 1 << 20;
/// Alignment of those; enough for every host.
const POOLED_ALIGNMENT: usize = 4096;
/// How many are kept when nobody has one.
const POOLED_IDLE: usize = 4;

/// See the module's header.
pub struct IoContext {
    engine: Rc<dyn Engine>,
    executor: Executor,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    next_timer: Cell<u64>,
    bounce_bytes: Cell<u64>,
    bounce_freed: Changed,
    bounce_pool: RefCell<Vec<Segments>>,
    /// This context, for posts.
    this: Weak<Self>,
    handle: ContextHandle,
    roots: RefCell<BTreeMap<RootId, Rc<Root>>>,
    uses: Uses,
    /// The engine's clock at the beginning of this turn.
    turn_time: Cell<Duration>,
}

/// Something to do on a worker.
type Post = Box<dyn FnOnce(&Rc<IoContext>) + Send>;

/// The way to a worker's context from any thread. Nobody waits for it here.
#[derive(Clone)]
pub struct ContextHandle {
    posts: Arc<Mailbox<Post>>,
    ended: Arc<AtomicBool>,
}

impl ContextHandle {
    /// Has `work` done on the worker at its next turn. Where the worker is gone, it is dropped.
    pub fn post(&self, work: impl FnOnce(&Rc<IoContext>) + Send + 'static) {
        self.posts.post(Box::new(work));
        // Posting is ordered before this look, as the end is before the context's last look.
        if self.ended.load(Ordering::SeqCst) {
            self.posts.take(&mut Vec::new());
        }
    }

    /// Whether both lead to the same context.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.posts, &other.posts)
    }

    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        // Orders the end before the last look; pairs with the fence in posting.
        fence(Ordering::SeqCst);
        self.posts.take(&mut Vec::new());
    }
}

impl IoContext {
    /// A context on `engine`, without tasks.
    pub fn new(engine: Rc<dyn Engine>) -> Rc<Self> {
        Rc::new_cyclic(|this| Self {
            executor: Executor::new(Arc::clone(engine.sleeper())),
            timers: RefCell::default(),
            next_timer: Cell::new(0),
            bounce_bytes: Cell::new(0),
            bounce_freed: Changed::new(),
            bounce_pool: RefCell::default(),
            this: Weak::clone(this),
            handle: ContextHandle {
                posts: Mailbox::new(Arc::clone(engine.sleeper())),
                ended: Arc::default(),
            },
            roots: RefCell::default(),
            uses: Uses::default(),
            turn_time: Cell::new(engine.now()),
            engine,
        })
    }

    /// The way to this context from other threads.
    pub fn handle(&self) -> &ContextHandle {
        &self.handle
    }

    /// The root called `id`, if it is attached here.
    pub fn root(&self, id: RootId) -> Option<Rc<Root>> {
        self.any_root(id).filter(|root| !root.is_leaving())
    }

    /// As [`root`](Self::root); also one that is being detached, which may have requests in flight.
    pub(crate) fn any_root(&self, id: RootId) -> Option<Rc<Root>> {
        self.roots.borrow().get(&id).cloned()
    }

    pub(crate) fn add_root(&self, root: Rc<Root>) {
        self.roots.borrow_mut().insert(root.id(), root);
    }

    pub(crate) fn remove_root(&self, id: RootId) {
        self.roots.borrow_mut().remove(&id);
    }

    /// Which bytes requests on this worker use.
    pub(super) fn uses(&self) -> &Uses {
        &self.uses
    }

    /// The engine's clock as it was when this turn began, or the sleep before it ended.
    pub fn turn_time(&self) -> Duration {
        self.turn_time.get()
    }

    /// The engine below.
    pub fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// Starts a task on this worker that runs to its end.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.executor.spawn(future);
    }

    /// How many tasks have not ended.
    pub fn tasks(&self) -> usize {
        self.executor.tasks()
    }

    /// Does an operation and waits for it.
    pub async fn op(&self, op: Op) -> (OpResult, Segments) {
        OpFuture::start(self.engine(), op).await
    }

    /// Waits until a socket can be received from or sent to.
    ///
    /// # Errors
    ///
    /// The engine's; a simulated one has no sockets.
    pub async fn ready(&self, fd: &Arc<OwnedFd>, interest: Interest) -> Result<(), Errno> {
        ReadyFuture::start(self.engine(), fd, interest).await
    }

    /// Does a rare host call and waits for it.
    pub async fn host(&self, call: HostCall) -> Result<HostReply, Errno> {
        self.engine.host(call).await
    }

    /// Has work that takes the processor for a while done on another thread; begins at once. It must depend
    /// on nothing but what it was given, so that a simulation replays.
    ///
    /// # Cancellation
    ///
    /// The work goes on, and its result is dropped.
    pub fn offload<T, W>(&self, work: W) -> impl Future<Output = T> + use<T, W>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let (done, result) = oneshot::channel();
        self.engine.offload(Box::new(move || {
            let _ = done.send(work());
        }));
        async move {
            match result.await {
                Ok(result) => result,
                // Its process has been killed, and this with it.
                Err(oneshot::Canceled) => std::future::pending().await,
            }
        }
    }

    /// Waits until `time` has passed.
    pub async fn delay(&self, time: Duration) {
        let end = self.engine.now() + time;
        let key = (end, self.next_timer.get());
        self.next_timer.set(key.1 + 1);
        let timer = Timer { context: self, key };
        poll_fn(|cx| {
            if self.engine.now() >= end {
                return Poll::Ready(());
            }
            self.timers.borrow_mut().insert(key, cx.waker().clone());
            Poll::Pending
        })
        .await;
        drop(timer);
    }

    /// Waits until a bounce buffer of so many bytes may be made; it may be kept as long as what is
    /// returned. One that exceeds the limit by itself is made when there is no other.
    ///
    /// Whoever has one must not wait for another, or all could wait for each other: for leaves only.
    pub(crate) async fn bounce_room(&self, bytes: u64) -> BounceRoom<'_> {
        loop {
            // Before the look: what is freed after it wakes this task.
            let freed = self.bounce_freed.listen();
            let taken = self.bounce_bytes.get();
            if taken == 0 || taken + bytes <= BOUNCE_BYTES {
                self.bounce_bytes.set(taken + bytes);
                // There may be room for the next who waits, too.
                self.bounce_freed.notify(1);
                return BounceRoom {
                    context: self,
                    bytes,
                    pooled: None,
                };
            }
            freed.await;
        }
    }

    /// One turn: hands queued operations to the host, takes completions (those for the caller go to
    /// `events`), fires timers and runs the tasks that were woken. Returns whether a task ran.
    pub fn turn(&self, events: &mut Vec<Event>) -> bool {
        let posted = self.take_posts();
        self.engine.poll(events);
        self.turn_time.set(self.engine.now());
        self.fire_timers();
        self.executor.run() || posted
    }

    /// Does what other threads have posted; returns whether there was anything.
    fn take_posts(&self) -> bool {
        if self.handle.posts.is_empty() {
            return false;
        }
        let mut posts = Vec::new();
        self.handle.posts.take(&mut posts);
        let this = self.this.upgrade().expect("its worker has it");
        for post in posts {
            post(&this);
        }
        true
    }

    /// Sleeps until something happens or `limit` is over. `idle` is the caller's last look at what
    /// it serves besides this context; nothing is waited for if it says no.
    pub fn sleep(
        &self,
        events: &mut Vec<Event>,
        limit: Option<Duration>,
        idle: impl FnOnce() -> bool,
    ) {
        let sleeper = self.engine.sleeper();
        sleeper.falling_asleep();
        if !self.executor.is_idle() || !self.handle.posts.is_empty() || !idle() {
            sleeper.awake();
            return;
        }
        let timer = self.timers.borrow().keys().next().map(|(end, _)| *end);
        let until_timer = timer.map(|end| end.saturating_sub(self.engine.now()));
        let limit = match (limit, until_timer) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        // Wakes the sleeper: a simulated wait goes on after it has returned.
        self.engine.wait(events, limit);
        // What is taken next begins now, and not before the sleep.
        self.turn_time.set(self.engine.now());
    }

    /// When the next timer fires, on the engine's clock.
    pub fn next_timer(&self) -> Option<Duration> {
        self.timers.borrow().keys().next().map(|(end, _)| *end)
    }

    /// Drops the tasks whose wake-up nobody will see any more, and the roots, when the worker is gone.
    pub fn abandon(&self) {
        self.handle.end();
        drop(self.timers.take());
        self.executor.abandon();
        // Roots have the context.
        drop(self.roots.take());
        self.uses.abandon();
    }

    /// Whether a task or a post waits to run.
    pub fn has_runnable(&self) -> bool {
        !self.executor.is_idle() || !self.handle.posts.is_empty()
    }

    fn fire_timers(&self) {
        let mut timers = self.timers.borrow_mut();
        if timers.is_empty() {
            return;
        }
        let now = self.turn_time.get();
        while let Some(first) = timers.first_entry() {
            if first.key().0 > now {
                break;
            }
            first.remove().wake();
        }
    }

    /// Runs the context on the calling thread until `future` is done. For programs that do one thing,
    /// and for tests; events for nobody are dropped.
    pub fn block_on<T: 'static>(self: &Rc<Self>, future: impl Future<Output = T> + 'static) -> T {
        let task = self.executor.spawn_task(future);
        let mut events = Vec::new();
        // What it has posted to this context is done, too: nobody else may ever turn it.
        while !task.is_finished() || !self.handle.posts.is_empty() {
            if !self.turn(&mut events) && !task.is_finished() {
                self.sleep(&mut events, None, || true);
            }
            events.clear();
        }
        let mut task = std::pin::pin!(task);
        let mut context = std::task::Context::from_waker(Waker::noop());
        match task.as_mut().poll(&mut context) {
            Poll::Ready(output) => output,
            Poll::Pending => unreachable!("the task has finished"),
        }
    }
}

impl Drop for IoContext {
    fn drop(&mut self) {
        // Who waits for an answer is told that there will be none.
        self.handle.end();
    }
}

/// Room for a bounce buffer; given back when dropped, with the buffer.
pub(crate) struct BounceRoom<'a> {
    context: &'a IoContext,
    bytes: u64,
    pooled: Option<Segments>,
}

impl BounceRoom<'_> {
    /// A buffer of as many bytes as there is room for. It may hold anything that this process has read
    /// or written before.
    pub(crate) fn buffer(&mut self, alignment: usize) -> Segments {
        let bytes = self.bytes as usize;
        if bytes <= POOLED_BYTES / 8 || bytes > POOLED_BYTES || alignment > POOLED_ALIGNMENT {
            return Segments::allocate(bytes, alignment);
        }
        let kept = self.context.bounce_pool.borrow_mut().pop();
        let whole = kept.unwrap_or_else(|| Segments::allocate(POOLED_BYTES, POOLED_ALIGNMENT));
        let buffer = whole.slice(0, self.bytes);
        self.pooled = Some(whole);
        buffer
    }
}

impl Drop for BounceRoom<'_> {
    fn drop(&mut self) {
        let taken = &self.context.bounce_bytes;
        taken.set(taken.get() - self.bytes);
        let mut pool = self.context.bounce_pool.borrow_mut();
        // An operation that nobody waits for any more may still have the buffer.
        pool.extend(self.pooled.take().filter(Segments::is_sole_owner));
        if taken.get() == 0 {
            pool.truncate(POOLED_IDLE);
        }
        // One at a time: each who finds room wakes the next, and each who has some will free it.
        self.context.bounce_freed.notify(1);
    }
}

/// Removes a timer whose future was dropped.
struct Timer<'a> {
    context: &'a IoContext,
    key: (Duration, u64),
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        self.context.timers.borrow_mut().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{EngineChoice, make};

    #[test]
    fn what_was_posted_last_is_done_when_the_caller_has_its_answer() {
        let cx = IoContext::new(make(EngineChoice::Threads).unwrap());
        let done = Arc::new(AtomicBool::new(false));
        let (handle, sign) = (cx.handle().clone(), Arc::clone(&done));
        cx.block_on(async move { handle.post(move |_| sign.store(true, Ordering::SeqCst)) });
        assert!(done.load(Ordering::SeqCst));
    }

    #[test]
    fn timers_fire_in_order_and_a_dropped_one_leaves_nothing_behind() {
        for choice in [EngineChoice::Threads, EngineChoice::Auto] {
            let cx = IoContext::new(make(choice).unwrap());
            let order = Rc::new(RefCell::new(Vec::new()));
            for millis in [20, 5, 10] {
                let (inner, order) = (Rc::clone(&cx), Rc::clone(&order));
                cx.spawn(async move {
                    inner.delay(Duration::from_millis(millis)).await;
                    order.borrow_mut().push(millis);
                });
            }
            let inner = Rc::clone(&cx);
            cx.block_on(async move { inner.delay(Duration::from_millis(40)).await });
            assert_eq!(*order.borrow(), [5, 10, 20]);
            assert_eq!((cx.next_timer(), cx.tasks()), (None, 0));
        }
    }
}
