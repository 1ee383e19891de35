//! The speed of a job.

use std::time::Duration;

use super::Rate;
use super::bucket::Bucket;

/// Holds a job to so many bytes per second in the long run.
///
/// The job charges what it is about to move, and sleeps as long as it is told before it moves more. A
/// chunk may be larger than a second's worth: it is not delayed, and what follows is. A pause is not
/// made up for by more than a moment's worth.
#[derive(Clone, Debug, Default)]
pub struct RateLimit {
    bucket: Bucket,
    now: Duration,
    bytes_per_second: u64,
}

impl RateLimit {
    /// So many bytes per second; 0 is no limit.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bucket: Bucket::new(Rate::per_second(bytes_per_second)),
            now: Duration::ZERO,
            bytes_per_second,
        }
    }

    /// The speed in bytes per second; 0 is no limit.
    pub fn speed(&self) -> u64 {
        self.bytes_per_second
    }

    /// Changes the speed. A job that sleeps asks [`delay`](Self::delay) again: what it was told before
    /// is not true any more. It has at most a moment to wait then, not at the old speed's pace.
    pub fn set_speed(&mut self, now: Duration, bytes_per_second: u64) {
        self.advance(now);
        self.bytes_per_second = bytes_per_second;
        self.bucket.set_rate(Rate::per_second(bytes_per_second));
    }

    /// Counts `bytes` about to be moved. `now` is the engine's clock, here and below.
    pub fn charge(&mut self, now: Duration, bytes: u64) {
        self.advance(now);
        self.bucket.charge(u128::from(bytes) * 1_000_000_000);
    }

    /// How long the job must not move anything from now on.
    pub fn delay(&mut self, now: Duration) -> Duration {
        self.advance(now);
        self.bucket.wait()
    }

    fn advance(&mut self, now: Duration) {
        self.bucket.leak(now.saturating_sub(self.now));
        self.now = self.now.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How many bytes a job moves in chunks from `from` to `to`.
    fn moved(limit: &mut RateLimit, from: Duration, to: Duration, chunk: u64) -> u64 {
        let (mut now, mut moved) = (from, 0);
        loop {
            now += limit.delay(now);
            if now >= to {
                return moved;
            }
            limit.charge(now, chunk);
            moved += chunk;
        }
    }

    #[test]
    fn a_job_moves_what_its_speed_allows_whatever_the_size_of_its_chunks() {
        for chunk in [512, 65_536, 1 << 20] {
            let mut limit = RateLimit::new(10 << 20);
            let start = 7 * SECOND;
            let bytes = moved(&mut limit, start, start + 10 * SECOND, chunk);
            let off = bytes.abs_diff(100 << 20);
            assert!(off <= (1 << 20) + chunk, "{bytes} in chunks of {chunk}");
        }
    }

    #[test]
    fn a_changed_speed_holds_from_then_on() {
        let mut limit = RateLimit::new(1 << 30);
        moved(&mut limit, Duration::ZERO, SECOND, 1 << 20);
        limit.set_speed(SECOND, 1 << 20);
        assert_eq!(limit.speed(), 1 << 20);
        let slow = moved(&mut limit, SECOND, 11 * SECOND, 65_536);
        assert!(slow.abs_diff(10 << 20) <= (1 << 17), "{slow}");
        limit.charge(11 * SECOND, 1 << 30);
        assert!(limit.delay(11 * SECOND) > 1000 * SECOND);
        limit.set_speed(11 * SECOND, 0);
        assert_eq!(limit.delay(11 * SECOND), Duration::ZERO);
    }

    #[test]
    fn a_chunk_of_many_seconds_goes_at_once_and_is_paid_for_afterwards() {
        let mut limit = RateLimit::new(1000);
        assert_eq!(limit.delay(SECOND), Duration::ZERO);
        limit.charge(SECOND, 60_000);
        let delay = limit.delay(SECOND);
        assert!(delay > 59 * SECOND && delay <= 60 * SECOND, "{delay:?}");
        assert_eq!(limit.delay(SECOND + delay), Duration::ZERO);
    }
}
