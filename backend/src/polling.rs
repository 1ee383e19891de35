//! How long a worker looks for work by itself before it sleeps. Pure.
//!
//! Polling pays when the next work comes within a few microseconds: it saves a sleep and a wake-up,
//! which cost more than that. It does harm when whoever makes the work needs the core that polls. So
//! a worker learns from its sleeps how long it usually waits, polls a little longer than that, and
//! gives polling up for a while when the work does not come meanwhile, for longer each time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Polled beyond the time that work usually takes to come.
const MARGIN: Duration = Duration::from_micros(4);
/// Most sleeps without polling after polling in vain.
const MAX_PENALTY: u32 = 1024;

/// For how long a worker polls at most, which others may change while it runs.
#[derive(Debug)]
pub struct PollLimit(AtomicU64);

impl PollLimit {
    /// So long; zero for never.
    pub fn new(max: Duration) -> Self {
        Self(AtomicU64::new(nanoseconds(max)))
    }

    /// How long.
    pub fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }

    /// So long from the next sleep on.
    pub fn set(&self, max: Duration) {
        self.0.store(nanoseconds(max), Ordering::Relaxed);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// See the module's header.
#[derive(Debug)]
pub struct Polling {
    max: Duration,
    window: Duration,
    /// Sleeps to come without polling.
    hold: u32,
    /// What `hold` will be after the next time in vain.
    penalty: u32,
}

impl Polling {
    /// Polls for at most `max` at a time; zero for never.
    pub fn new(max: Duration) -> Self {
        Self {
            max,
            window: Duration::ZERO,
            hold: 0,
            penalty: 1,
        }
    }

    /// Polls for at most `max` from now on.
    pub fn set_max(&mut self, max: Duration) {
        self.max = max;
        self.window = self.window.min(max);
    }

    /// How long to look for work before the next sleep.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// Work came while polling.
    pub fn caught(&mut self) {
        self.penalty = (self.penalty / 2).max(1);
    }

    /// The worker slept for `time`, after it had polled for the window in vain.
    pub fn slept(&mut self, time: Duration) {
        if !self.window.is_zero() {
            self.window = Duration::ZERO;
            self.hold = self.penalty;
            self.penalty = (self.penalty * 2).min(MAX_PENALTY);
            return;
        }
        if self.hold > 0 {
            self.hold -= 1;
            return;
        }
        if time < self.max {
            self.window = (time * 2 + MARGIN).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn a_short_sleep_is_polled_through_the_next_time() {
        let mut polling = Polling::new(micros(50));
        assert_eq!(polling.window(), Duration::ZERO);
        polling.slept(micros(10));
        assert_eq!(polling.window(), micros(24));
        polling.caught();
        assert_eq!(polling.window(), micros(24));
    }

    #[test]
    fn an_idle_worker_does_not_poll() {
        let mut polling = Polling::new(micros(50));
        for _ in 0..10 {
            polling.slept(micros(1000));
            assert_eq!(polling.window(), Duration::ZERO);
        }
    }

    #[test]
    fn polling_in_vain_is_tried_less_and_less_often() {
        let mut polling = Polling::new(micros(50));
        let mut polled = Vec::new();
        for sleep in 0..200 {
            if !polling.window().is_zero() {
                polled.push(sleep);
            }
            polling.slept(micros(5));
        }
        let gaps: Vec<_> = polled.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(gaps[..5], [3, 4, 6, 10, 18]);
    }

    #[test]
    fn success_makes_up_for_failures() {
        let mut polling = Polling::new(micros(50));
        for _ in 0..100 {
            polling.slept(micros(5));
        }
        assert!(polling.penalty > 8);
        for _ in 0..16 {
            polling.caught();
        }
        assert_eq!(polling.penalty, 1);
    }

    #[test]
    fn zero_means_never() {
        let mut polling = Polling::new(Duration::ZERO);
        polling.slept(Duration::ZERO);
        assert_eq!(polling.window(), Duration::ZERO);
    }
}
