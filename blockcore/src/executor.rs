//! Tasks of one worker: a single-threaded executor whose wakers may be used from any thread.
//!
//! A task is `!Send`: it is spawned, polled and dropped on its worker. Its waker is `Send` and does
//! one thing: it posts the task to the worker's mailbox. Tasks run in the order in which they were
//! woken, so a run is deterministic wherever the wake-ups are.
//!
//! Threads: the owning worker only.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::sync::Arc;

use async_task::{Runnable, Task};

use crate::mailbox::{Mailbox, Sleeper};

/// The tasks of one worker.
pub struct Executor {
    runnable: Arc<Mailbox<Runnable>>,
    batch: RefCell<Vec<Runnable>>,
    alive: std::rc::Rc<Cell<usize>>,
}

impl Executor {
    /// An executor without tasks, whose owner sleeps in `sleeper`.
    pub fn new(sleeper: Arc<Sleeper>) -> Self {
        Self {
            runnable: Mailbox::new(sleeper),
            batch: RefCell::new(Vec::new()),
            alive: std::rc::Rc::default(),
        }
    }

    /// Starts a task that runs to its end whether or not anybody waits for it.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.spawn_task(future).detach();
    }

    /// Starts a task whose handle gives its output and, when dropped, cancels it.
    ///
    /// # Cancellation
    ///
    /// The task's future is dropped at the executor's next turn. I/O that it started goes on: the
    /// engine owns its buffers.
    pub fn spawn_task<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Task<T> {
        let alive = Alive::new(&self.alive);
        let mailbox = Arc::clone(&self.runnable);
        let (runnable, task) = async_task::spawn_local(
            async move {
                let _alive = alive;
                future.await
            },
            move |runnable| mailbox.post(runnable),
        );
        runnable.schedule();
        task
    }

    /// Runs every task that was woken before the call, once. Returns whether there was any.
    pub fn run(&self) -> bool {
        if self.is_idle() {
            return false;
        }
        let mut batch = self.batch.take();
        self.runnable.take(&mut batch);
        let any = !batch.is_empty();
        for runnable in batch.drain(..) {
            runnable.run();
        }
        self.batch.replace(batch);
        any
    }

    /// Drops the tasks that wait to run instead of running them, and those that this wakes: what
    /// becomes of tasks whose worker is gone.
    pub fn abandon(&self) {
        let mut batch = Vec::new();
        while !self.is_idle() {
            self.runnable.take(&mut batch);
            batch.clear();
        }
    }

    /// Whether no task waits to run; the owner's last look before it sleeps.
    pub fn is_idle(&self) -> bool {
        self.runnable.is_empty()
    }

    /// How many tasks have not ended.
    pub fn tasks(&self) -> usize {
        self.alive.get()
    }
}

struct Alive(std::rc::Rc<Cell<usize>>);

impl Alive {
    fn new(count: &std::rc::Rc<Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Self(std::rc::Rc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mailbox::Wake;

    struct Nobody;

    impl Wake for Nobody {
        fn wake(&self) {}
    }

    #[test]
    fn abandoned_tasks_are_dropped_with_those_that_waited_for_them() {
        let executor = Executor::new(Sleeper::new(Box::new(Nobody)));
        let (promise, wait) = futures_channel::oneshot::channel::<()>();
        executor.spawn(async move {
            let _ = wait.await;
            panic!("an abandoned task ran");
        });
        assert!(executor.run());
        executor.spawn(async move {
            std::future::pending::<()>().await;
            drop(promise);
        });
        assert_eq!(executor.tasks(), 2);
        executor.abandon();
        assert_eq!(executor.tasks(), 0);
    }
}
