//! Leaky buckets: how long the next request must wait. Pure.
//!
//! A bucket's level rises by what is admitted and falls at the average rate. While it is above what
//! the bucket holds, nobody is admitted; so a request may overfill it, however large it is, and those
//! after it wait for that. With a burst the bucket holds the whole burst, and a second bucket, which
//! leaks at the burst's rate, keeps the burst from going faster than it is set.
//!
//! Levels are exact: integers in billionths of a unit, since `rate * nanoseconds` is in those.

use std::time::Duration;

use super::{Direction, Limits, Rate};

/// What a bucket holds where no burst is set, as time at its rate. A waiter may be woken late by that
/// much without loss of rate. It must stay below a fiftieth of a second for the first second after a
/// pause to be within 2 % of the rate; QEMU's is a tenth, and its first second 10 % above.
const SLACK: Duration = Duration::from_millis(15);

const BILLION: u128 = 1_000_000_000;

/// One limit and how much of it is used up.
#[derive(Clone, Debug, Default)]
pub(super) struct Bucket {
    rate: Rate,
    /// Billionths of a unit.
    level: u128,
    /// Of the second bucket; used only where a burst has a length.
    burst_level: u128,
}

impl Bucket {
    /// An empty bucket.
    pub(super) fn new(rate: Rate) -> Self {
        Self {
            rate,
            ..Self::default()
        }
    }

    /// Changes the rate. A bucket that was full is full for the new rate, so that a change neither
    /// gives a new burst away nor has anybody wait at the old rate's pace.
    pub(super) fn set_rate(&mut self, rate: Rate) {
        self.rate = rate;
        self.level = self.level.min(self.capacity());
        self.burst_level = match self.has_burst_bucket() {
            true => self.burst_level.min(self.burst_capacity()),
            false => 0,
        };
    }

    /// Time passes.
    pub(super) fn leak(&mut self, elapsed: Duration) {
        let nanos = elapsed.as_nanos();
        let leaked = |rate: u64| u128::from(rate).saturating_mul(nanos);
        self.level = self.level.saturating_sub(leaked(self.rate.average));
        if self.has_burst_bucket() {
            self.burst_level = self.burst_level.saturating_sub(leaked(self.rate.burst));
        }
    }

    /// Counts something admitted, in billionths of a unit.
    pub(super) fn charge(&mut self, amount: u128) {
        if self.rate.average == 0 {
            return;
        }
        self.level = self.level.saturating_add(amount);
        if self.has_burst_bucket() {
            self.burst_level = self.burst_level.saturating_add(amount);
        }
    }

    /// Takes back a charge of a while ago.
    pub(super) fn refund(&mut self, amount: u128) {
        self.level = self.level.saturating_sub(amount);
        self.burst_level = self.burst_level.saturating_sub(amount);
    }

    /// How long nobody may be admitted, if nobody is meanwhile.
    pub(super) fn wait(&self) -> Duration {
        if self.rate.average == 0 {
            return Duration::ZERO;
        }
        let average = time(self.level, self.capacity(), self.rate.average);
        if !self.has_burst_bucket() {
            return average;
        }
        average.max(time(
            self.burst_level,
            self.burst_capacity(),
            self.rate.burst,
        ))
    }

    fn capacity(&self) -> u128 {
        match self.rate.burst {
            0 => u128::from(self.rate.average) * SLACK.as_nanos(),
            burst => u128::from(burst) * u128::from(self.rate.burst_seconds) * BILLION,
        }
    }

    fn burst_capacity(&self) -> u128 {
        u128::from(self.rate.burst) * SLACK.as_nanos()
    }

    /// A burst of one second may go at once, as it does in QEMU.
    fn has_burst_bucket(&self) -> bool {
        self.rate.burst_seconds > 1
    }
}

/// How long it takes `level` to fall to `capacity` at `rate`, rounded up.
fn time(level: u128, capacity: u128, rate: u64) -> Duration {
    let nanos = level.saturating_sub(capacity).div_ceil(u128::from(rate));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The six buckets of a group, and the time up to which they have leaked.
#[derive(Clone, Debug)]
pub(super) struct Buckets {
    /// Total, reads, writes.
    iops: [Bucket; 3],
    /// Total, reads, writes.
    bps: [Bucket; 3],
    iops_size_bytes: u64,
    now: Duration,
}

impl Buckets {
    /// Empty buckets. They count from the first time they are told.
    pub(super) fn new(limits: &Limits) -> Self {
        let [iops, bps] = rates(limits);
        Self {
            iops: iops.map(Bucket::new),
            bps: bps.map(Bucket::new),
            iops_size_bytes: limits.iops_size_bytes,
            now: Duration::ZERO,
        }
    }

    /// Changes the limits, see [`Bucket::set_rate`].
    pub(super) fn set_limits(&mut self, limits: &Limits) {
        let [iops, bps] = rates(limits);
        self.iops_size_bytes = limits.iops_size_bytes;
        let buckets = self.iops.iter_mut().chain(&mut self.bps);
        for (bucket, rate) in buckets.zip(iops.into_iter().chain(bps)) {
            bucket.set_rate(rate);
        }
    }

    /// Until when time has passed.
    pub(super) fn now(&self) -> Duration {
        self.now
    }

    /// Lets time pass until `now`. One worker may have looked at the clock a moment before another
    /// did and come later: no time passes then.
    pub(super) fn advance(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.now);
        if elapsed.is_zero() {
            return;
        }
        self.now = now;
        for bucket in self.iops.iter_mut().chain(&mut self.bps) {
            bucket.leak(elapsed);
        }
    }

    /// How long no request in this direction may be admitted, if none is meanwhile.
    pub(super) fn wait(&self, direction: Direction) -> Duration {
        let own = own(direction);
        let (iops, bps) = (&self.iops, &self.bps);
        let concerned = [&iops[0], &iops[own], &bps[0], &bps[own]];
        concerned.map(Bucket::wait).into_iter().max().expect("four")
    }

    /// Counts a request that is admitted.
    pub(super) fn charge(&mut self, direction: Direction, bytes: u64) {
        self.count(direction, bytes, Bucket::charge);
    }

    /// Takes back the charge of a request that was admitted and did not come.
    pub(super) fn refund(&mut self, direction: Direction, bytes: u64) {
        self.count(direction, bytes, Bucket::refund);
    }

    fn count(&mut self, direction: Direction, bytes: u64, count: fn(&mut Bucket, u128)) {
        let amount = u128::from(bytes) * BILLION;
        let requests = match u128::from(self.iops_size_bytes) {
            size if size > 0 && u128::from(bytes) > size => amount / size,
            _ => BILLION,
        };
        for index in [0, own(direction)] {
            count(&mut self.iops[index], requests);
            count(&mut self.bps[index], amount);
        }
    }
}

/// The index of a direction's own bucket, beside the total's.
fn own(direction: Direction) -> usize {
    match direction {
        Direction::Read => 1,
        Direction::Write => 2,
    }
}

fn rates(limits: &Limits) -> [[Rate; 3]; 2] {
    [
        [limits.iops_total, limits.iops_read, limits.iops_write],
        [limits.bps_total, limits.bps_read, limits.bps_write],
    ]
}
