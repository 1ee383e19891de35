//! Threads for work that may block: host calls of every real engine, and all I/O of `threads`.
//!
//! One pool per process. Threads are started as work waits, up to a limit, and end after a while
//! without work. Past the limit work queues in order.
//!
//! Work that takes the processor ([`compute`]) has a limit of its own, as many as there are processors, so
//! that it leaves threads for what waits.
//!
//! Threads: [`run`] and [`compute`] from any; they never wait.

#![expect(
    clippy::disallowed_methods,
    reason = "the real engines are the context that others take their threads from"
)]

use std::collections::VecDeque;
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard};
use std::time::Duration;

use super::Work;

/// As many blocking calls at once as QEMU's thread pool allows.
const MAX_THREADS: usize = 64;
/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

struct Pool {
    state: Mutex<State>,
    posted: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    idle: usize,
    threads: usize,
    /// How many threads compute.
    computing: usize,
    /// What is to be computed when one of them is done.
    computations: VecDeque<Work>,
}

/// How many computations run at once.
static PROCESSORS: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(1, usize::from));

static POOL: Pool = Pool {
    state: Mutex::new(State {
        queue: VecDeque::new(),
        idle: 0,
        threads: 0,
        computing: 0,
        computations: VecDeque::new(),
    }),
    posted: Condvar::new(),
};

/// Runs `work` on some thread of the pool.
pub(crate) fn run(work: Work) {
    let mut state = lock();
    state.queue.push_back(work);
    if state.queue.len() <= state.idle {
        drop(state);
        POOL.posted.notify_one();
        return;
    }
    if state.threads < MAX_THREADS {
        let started = std::thread::Builder::new()
            .name("pool".into())
            .spawn(worker);
        match started {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads > 0 => {
                tracing::warn!(%error, "cannot start another pool thread");
            }
            Err(error) => panic!("cannot start a thread for blocking work: {error}"),
        }
    }
}

/// Runs work that takes the processor on some thread of the pool.
pub(crate) fn compute(work: Work) {
    let mut state = lock();
    if state.computing >= *PROCESSORS {
        state.computations.push_back(work);
        return;
    }
    state.computing += 1;
    drop(state);
    run(Box::new(|| {
        let mut next = Some(work);
        while let Some(work) = next {
            work();
            next = next_computation();
        }
    }));
}

/// What the calling thread computes next; `None`: it is free for others.
fn next_computation() -> Option<Work> {
    let mut state = lock();
    let next = state.computations.pop_front();
    if next.is_none() {
        state.computing -= 1;
    }
    next
}

fn lock() -> MutexGuard<'static, State> {
    POOL.state.lock().expect("work runs outside the lock")
}

fn worker() {
    let mut state = lock();
    loop {
        if let Some(work) = state.queue.pop_front() {
            drop(state);
            work();
            state = lock();
            continue;
        }
        state.idle += 1;
        let (next, timeout) = POOL
            .posted
            .wait_timeout(state, IDLE)
            .expect("work runs outside the lock");
        state = next;
        state.idle -= 1;
        if timeout.timed_out() && state.queue.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}
