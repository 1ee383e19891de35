//! Latencies over the last while.

use crate::window::{Seen, Window};

/// Latencies of one kind over the last while. There are two windows, each as long as the interval, the
/// second begun in the middle of the first; each counts everything, and starts anew when it is over.
/// The older of them is what is read: it covers from half an interval to a whole one.
pub(super) struct Interval {
    length_ns: u64,
    windows: [Window; 2],
}

impl Interval {
    pub(super) fn new(length_ns: u64, now_ns: u64) -> Self {
        let window = |length_ns| Window::new(now_ns, now_ns.saturating_add(length_ns));
        Self {
            length_ns,
            windows: [window(length_ns.div_ceil(2)), window(length_ns)],
        }
    }

    pub(super) fn count(&self, latency_ns: u64, now_ns: u64) {
        for window in &self.windows {
            let end_ns = window.end_ns();
            if now_ns >= end_ns {
                let (begin_ns, end_ns) = self.window_at(end_ns, now_ns);
                window.restart(begin_ns, end_ns);
            }
            window.count(latency_ns);
        }
    }

    /// The window, of those that follow one that ended at `end_ns`, in which `now_ns` is.
    fn window_at(&self, end_ns: u64, now_ns: u64) -> (u64, u64) {
        let begin_ns = now_ns - (now_ns - end_ns) % self.length_ns;
        (begin_ns, begin_ns.saturating_add(self.length_ns))
    }

    pub(super) fn read(&self, now_ns: u64) -> Latencies {
        let windows = self.windows.each_ref().map(|window| {
            let seen = window.read();
            match seen.end_ns {
                // Nobody has counted anything since.
                end_ns if now_ns >= end_ns => {
                    let (begin_ns, end_ns) = self.window_at(end_ns, now_ns);
                    Seen::new(begin_ns, end_ns)
                }
                _ => seen,
            }
        });
        let [one, other] = windows;
        let older = if one.end_ns <= other.end_ns {
            one
        } else {
            other
        };
        Latencies::new(&older, now_ns)
    }
}

/// Latencies over the last while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latencies {
    least_ns: u64,
    most_ns: u64,
    sum_ns: u64,
    requests: u64,
    queue_depth: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self::new(&Seen::new(0, 0), 0)
    }
}

impl Latencies {
    fn new(seen: &Seen, now_ns: u64) -> Self {
        Self {
            least_ns: seen.least_ns,
            most_ns: seen.most_ns,
            sum_ns: seen.sum_ns,
            requests: seen.requests,
            queue_depth: match now_ns.saturating_sub(seen.begin_ns) {
                0 => 0.0,
                elapsed_ns => seen.sum_ns as f64 / elapsed_ns as f64,
            },
        }
    }

    /// How many requests ended.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// The shortest, in nanoseconds; 0 if there was none.
    pub fn min_ns(&self) -> u64 {
        if self.requests == 0 { 0 } else { self.least_ns }
    }

    /// The longest, in nanoseconds; 0 if there was none.
    pub fn max_ns(&self) -> u64 {
        self.most_ns
    }

    /// The average, in nanoseconds; 0 if there was none.
    pub fn average_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.requests).unwrap_or(0)
    }

    /// How many requests were under way at a time, on average; 0 if no time has passed.
    pub fn average_queue_depth(&self) -> f64 {
        self.queue_depth
    }

    /// Adds another kind's, or the same kind's of another account.
    pub fn add(&mut self, other: &Self) {
        self.least_ns = self.least_ns.min(other.least_ns);
        self.most_ns = self.most_ns.max(other.most_ns);
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        self.requests += other.requests;
        self.queue_depth += other.queue_depth;
    }
}
