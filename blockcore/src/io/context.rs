//! A worker context: the engine, tasks and timers that everything on one worker shares.
//!
//! The control thread and jobs have one too, so that their I/O takes part in whatever queues' I/O
//! takes part in.
//!
//! Threads: its worker. Waits only in [`IoContext::sleep`], which is the worker's one wait point.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use event_listener::Event as Changed;

use crate::engine::{Engine, Errno, Event, HostCall, HostReply, Op, OpFuture, OpResult};
use crate::executor::Executor;
use crate::io::buffer::Segments;

/// How much memory the bounce buffers of one worker may have. A guest decides how many requests it has
/// under way and how its memory is aligned; those beyond this wait.
const BOUNCE_BYTES: u64 = 64 << 20;

/// See the module's header.
pub struct IoContext {
    engine: Rc<dyn Engine>,
    executor: Executor,
    timers: RefCell<BTreeMap<(Duration, u64), Waker>>,
    next_timer: Cell<u64>,
    bounce_bytes: Cell<u64>,
    bounce_freed: Changed,
}

impl IoContext {
    /// A context on `engine`, without tasks.
    pub fn new(engine: Rc<dyn Engine>) -> Rc<Self> {
        Rc::new(Self {
            executor: Executor::new(Arc::clone(engine.sleeper())),
            engine,
            timers: RefCell::default(),
            next_timer: Cell::new(0),
            bounce_bytes: Cell::new(0),
            bounce_freed: Changed::new(),
        })
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

    /// Does a rare host call and waits for it.
    pub async fn host(&self, call: HostCall) -> Result<HostReply, Errno> {
        self.engine.host(call).await
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
                };
            }
            freed.await;
        }
    }

    /// One turn: hands queued operations to the host, takes completions (those for the caller go to
    /// `events`), fires timers and runs the tasks that were woken. Returns whether a task ran.
    pub fn turn(&self, events: &mut Vec<Event>) -> bool {
        self.engine.poll(events);
        self.fire_timers();
        self.executor.run()
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
        if !self.executor.is_idle() || !idle() {
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
    }

    /// When the next timer fires, on the engine's clock.
    pub fn next_timer(&self) -> Option<Duration> {
        self.timers.borrow().keys().next().map(|(end, _)| *end)
    }

    /// Drops the tasks whose wake-up nobody will see any more, when the worker is gone.
    pub fn abandon(&self) {
        drop(self.timers.take());
        self.executor.abandon();
    }

    /// Whether a task waits to run.
    pub fn has_runnable(&self) -> bool {
        !self.executor.is_idle()
    }

    fn fire_timers(&self) {
        let mut timers = self.timers.borrow_mut();
        if timers.is_empty() {
            return;
        }
        let now = self.engine.now();
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
        while !task.is_finished() {
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

/// Room for a bounce buffer; given back when dropped.
pub(crate) struct BounceRoom<'a> {
    context: &'a IoContext,
    bytes: u64,
}

impl Drop for BounceRoom<'_> {
    fn drop(&mut self) {
        let taken = &self.context.bounce_bytes;
        taken.set(taken.get() - self.bytes);
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
