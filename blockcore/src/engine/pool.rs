//! Threads for work that may block: host calls of every real engine, and all I/O of `threads`.
//!
//! One pool per process. Threads are started as work waits, up to a limit, and end after a while
//! without work. Past the limit work queues in order.
//!
//! Threads: [`run`] from any; it never waits.

#![expect(
    clippy::disallowed_methods,
    reason = "the real engines are the context that others take their threads from"
)]

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// As many blocking calls at once as QEMU's thread pool allows.
const MAX_THREADS: usize = 64;
/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

type Work = Box<dyn FnOnce() + Send>;

struct Pool {
    state: Mutex<State>,
    posted: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Work>,
    idle: usize,
    threads: usize,
}

static POOL: Pool = Pool {
    state: Mutex::new(State {
        queue: VecDeque::new(),
        idle: 0,
        threads: 0,
    }),
    posted: Condvar::new(),
};

/// Runs `work` on some thread of the pool.
pub(crate) fn run(work: Work) {
    let mut state = POOL.state.lock().expect("work runs outside the lock");
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

fn worker() {
    let mut state = POOL.state.lock().expect("work runs outside the lock");
    loop {
        if let Some(work) = state.queue.pop_front() {
            drop(state);
            work();
            state = POOL.state.lock().expect("work runs outside the lock");
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
