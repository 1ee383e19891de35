//! A window of time in which one worker counts latencies and anybody reads them.
//!
//! The worker starts its window anew now and then. A reader sees figures of before that or of after
//! it, never of both; within one window it may see a request in one figure and not yet in another.
//!
//! Threads: one writes, any reads. Nobody takes a lock; a reader looks again while the window starts
//! anew, which is a few stores.
//!
//! Modelled: `RUSTFLAGS="--cfg loom" cargo test -p blockcore --release window`.

use crate::sync::{AtomicU64, Ordering, fence};

/// See the module's header.
pub(crate) struct Window {
    /// Odd while the window starts anew.
    version: AtomicU64,
    begin_ns: AtomicU64,
    end_ns: AtomicU64,
    least_ns: AtomicU64,
    most_ns: AtomicU64,
    sum_ns: AtomicU64,
    requests: AtomicU64,
}

/// What a window held at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// When it began.
    pub(crate) begin_ns: u64,
    /// When it is over.
    pub(crate) end_ns: u64,
    /// The shortest latency; the highest number if there was none.
    pub(crate) least_ns: u64,
    /// The longest latency.
    pub(crate) most_ns: u64,
    /// All latencies together.
    pub(crate) sum_ns: u64,
    /// How many there were.
    pub(crate) requests: u64,
}

impl Seen {
    /// What an empty window holds.
    pub(crate) fn new(begin_ns: u64, end_ns: u64) -> Self {
        Self {
            begin_ns,
            end_ns,
            least_ns: u64::MAX,
            most_ns: 0,
            sum_ns: 0,
            requests: 0,
        }
    }
}

impl Window {
    /// An empty window.
    pub(crate) fn new(begin_ns: u64, end_ns: u64) -> Self {
        let empty = Seen::new(begin_ns, end_ns);
        Self {
            version: AtomicU64::new(0),
            begin_ns: AtomicU64::new(empty.begin_ns),
            end_ns: AtomicU64::new(empty.end_ns),
            least_ns: AtomicU64::new(empty.least_ns),
            most_ns: AtomicU64::new(empty.most_ns),
            sum_ns: AtomicU64::new(empty.sum_ns),
            requests: AtomicU64::new(empty.requests),
        }
    }

    /// When it is over.
    pub(crate) fn end_ns(&self) -> u64 {
        self.end_ns.load(Ordering::Relaxed)
    }

    /// Counts a request. For the one who writes.
    pub(crate) fn count(&self, latency_ns: u64) {
        let least = self.least_ns.load(Ordering::Relaxed).min(latency_ns);
        self.least_ns.store(least, Ordering::Relaxed);
        let most = self.most_ns.load(Ordering::Relaxed).max(latency_ns);
        self.most_ns.store(most, Ordering::Relaxed);
        increase(&self.sum_ns, latency_ns);
        increase(&self.requests, 1);
    }

    /// Empties the window for another time. For the one who writes.
    pub(crate) fn restart(&self, begin_ns: u64, end_ns: u64) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        // Who sees any of the following stores sees the odd version, or a later one, at its second
        // look; pairs with the fence in `try_read`.
        fence(Ordering::Release);
        let empty = Seen::new(begin_ns, end_ns);
        self.begin_ns.store(empty.begin_ns, Ordering::Relaxed);
        self.end_ns.store(empty.end_ns, Ordering::Relaxed);
        self.least_ns.store(empty.least_ns, Ordering::Relaxed);
        self.most_ns.store(empty.most_ns, Ordering::Relaxed);
        self.sum_ns.store(empty.sum_ns, Ordering::Relaxed);
        self.requests.store(empty.requests, Ordering::Relaxed);
        // Who sees the new version at its first look sees all of them.
        self.version.store(version + 2, Ordering::Release);
    }

    /// What it holds.
    #[cfg(not(loom))]
    pub(crate) fn read(&self) -> Seen {
        loop {
            if let Some(seen) = self.try_read() {
                return seen;
            }
            std::hint::spin_loop();
        }
    }

    /// What it holds; `None` if it started anew meanwhile.
    fn try_read(&self) -> Option<Seen> {
        let version = self.version.load(Ordering::Acquire);
        let seen = Seen {
            begin_ns: self.begin_ns.load(Ordering::Relaxed),
            end_ns: self.end_ns.load(Ordering::Relaxed),
            least_ns: self.least_ns.load(Ordering::Relaxed),
            most_ns: self.most_ns.load(Ordering::Relaxed),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let same = self.version.load(Ordering::Relaxed) == version;
        (same && version.is_multiple_of(2)).then_some(seen)
    }
}

/// Adds to a counter that only the caller writes: a plain load and a plain store.
pub(crate) fn increase(counter: &AtomicU64, by: u64) {
    let value = counter.load(Ordering::Relaxed);
    counter.store(value.wrapping_add(by), Ordering::Relaxed);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_window_holds_what_was_counted_since_it_started_anew() {
        let window = Window::new(0, 100);
        window.count(30);
        window.count(10);
        let seen = Seen {
            begin_ns: 0,
            end_ns: 100,
            least_ns: 10,
            most_ns: 30,
            sum_ns: 40,
            requests: 2,
        };
        assert_eq!(window.read(), seen);
        window.restart(100, 200);
        assert_eq!((window.read(), window.end_ns()), (Seen::new(100, 200), 200));
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::sync::Arc;

    #[test]
    fn a_reader_sees_one_window_and_no_mixture_of_two() {
        loom::model(|| {
            let window = Arc::new(Window::new(1, 2));
            window.count(10);
            let shared = Arc::clone(&window);
            let writer = loom::thread::spawn(move || shared.restart(2, 3));
            if let Some(seen) = window.try_read() {
                let old = Seen {
                    begin_ns: 1,
                    end_ns: 2,
                    least_ns: 10,
                    most_ns: 10,
                    sum_ns: 10,
                    requests: 1,
                };
                assert!([old, Seen::new(2, 3)].contains(&seen), "{seen:?}");
            }
            writer.join().unwrap();
        });
    }
}
