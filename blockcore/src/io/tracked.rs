//! Requests that must not run beside others on the same bytes.
//!
//! A write that is widened to the node's alignment reads, changes and writes back bytes that its
//! guest did not name; another write to those bytes in between would be undone. Copy-on-read writes
//! what it has read before; a write in between would be undone, too. So on a node where that can happen
//! every request registers the bytes it touches, widened, and waits for those that came before,
//! overlap, and of which at least one is *serialising*.
//!
//! A request waits only for requests that registered before it, so waits cannot form a circle. One that
//! turns out to have to serialise registers anew, as the latest: it waits for all that are there, and
//! while it waits it touches nothing, so whoever registers after it need not wait for what it did.
//!
//! The table is cut into shards by offset, each with a lock of its own: requests to different places
//! do not meet.
//!
//! Threads: any worker. A lock is held over a look at its shard, never over a wait; more than one is
//! taken in ascending order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use event_listener::{Event, EventListener};

use crate::fault::{self, Fault};

/// How many shards there are, at most 32.
const SHARDS: usize = 16;
/// How many bytes lie in one shard before the next one's turn.
const STRIPE_BITS: u32 = 20;

/// The registered requests of one node.
#[derive(Default)]
pub struct Tracker {
    /// The next request's number. Taken with the locks of all its shards held, so that of two that
    /// overlap the one with the lower number is in their common shard first.
    next: AtomicU64,
    shards: [Shard; SHARDS],
}

#[derive(Default)]
struct Shard {
    requests: Mutex<Vec<Request>>,
    /// Notified whenever a request ends.
    ended: Event,
}

#[derive(Clone, Copy)]
struct Request {
    number: u64,
    begin: u64,
    end: u64,
    serialising: bool,
}

impl Request {
    fn must_wait_for(&self, other: &Self) -> bool {
        other.number < self.number
            && other.begin < self.end
            && self.begin < other.end
            && (other.serialising || self.serialising)
    }

    /// The shards that it touches, one bit each.
    fn shards(&self) -> u32 {
        let first = self.begin >> STRIPE_BITS;
        let last = (self.end.max(self.begin + 1) - 1) >> STRIPE_BITS;
        if last - first >= SHARDS as u64 {
            return u32::MAX >> (32 - SHARDS);
        }
        (first..=last).fold(0, |mask, stripe| mask | 1 << (stripe % SHARDS as u64))
    }
}

fn each(mask: u32) -> impl Iterator<Item = usize> {
    (0..SHARDS).filter(move |index| mask & (1 << index) != 0)
}

impl Tracker {
    /// Registers a request for the bytes from `begin` to `end` and waits for its turn. The request ends
    /// when what is returned is dropped.
    ///
    /// # Cancellation
    ///
    /// Dropped while it waits, the request is gone as if it had ended.
    pub async fn begin(&self, begin: u64, end: u64, serialising: bool) -> Tracked<'_> {
        let tracked = self.register(begin, end, serialising);
        tracked.wait().await;
        tracked
    }

    /// As [`begin`](Self::begin), but gives up where it would have to wait.
    pub fn try_begin(&self, begin: u64, end: u64, serialising: bool) -> Option<Tracked<'_>> {
        let tracked = self.register(begin, end, serialising);
        tracked.blocker().is_none().then_some(tracked)
    }

    fn register(&self, begin: u64, end: u64, serialising: bool) -> Tracked<'_> {
        let mut request = Request {
            number: 0,
            begin,
            end,
            serialising,
        };
        let mask = request.shards();
        let mut locked: Vec<_> = each(mask).map(|index| self.lock(index)).collect();
        request.number = self.next.fetch_add(1, Ordering::Relaxed);
        for shard in &mut locked {
            shard.push(request);
        }
        Tracked {
            tracker: self,
            request,
            mask,
        }
    }

    fn unregister(&self, mask: u32, number: u64) {
        for index in each(mask) {
            self.lock(index).retain(|other| other.number != number);
            self.shards[index].ended.notify(usize::MAX);
        }
    }

    fn lock(&self, shard: usize) -> MutexGuard<'_, Vec<Request>> {
        let requests = self.shards[shard].requests.lock();
        requests.expect("no panic while looking")
    }

    /// How many requests are registered.
    pub fn registered(&self) -> usize {
        let mut numbers: Vec<_> = (0..SHARDS)
            .flat_map(|index| {
                self.lock(index)
                    .iter()
                    .map(|r| r.number)
                    .collect::<Vec<_>>()
            })
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.len()
    }
}

/// A registered request whose turn it is.
pub struct Tracked<'a> {
    tracker: &'a Tracker,
    request: Request,
    mask: u32,
}

impl Tracked<'_> {
    /// Keeps all others off the bytes from `begin` to `end`, which include the request's own, from now
    /// to its end. Returns whether it had to wait: what was learnt before may no longer hold then.
    pub async fn serialise(&mut self, begin: u64, end: u64) -> bool {
        let begin = begin.min(self.request.begin);
        let end = end.max(self.request.end);
        // Registered anew before the old entry goes, so that nobody slips in between.
        let mut wider = self.tracker.register(begin, end, true);
        std::mem::swap(self, &mut wider);
        drop(wider);
        self.wait().await
    }

    /// Waits until nobody who came before is in the way; returns whether it had to.
    async fn wait(&self) -> bool {
        let mut waited = false;
        if fault::is_planted(Fault::SerialisingWait) {
            return waited;
        }
        while let Some(ended) = self.blocker() {
            ended.await;
            waited = true;
        }
        waited
    }

    /// What to wait for before looking again; `None` if nobody is in the way.
    fn blocker(&self) -> Option<EventListener> {
        each(self.mask).find_map(|index| {
            // Before the look: what ends after it wakes this task.
            let is_blocked = |requests: &[Request]| {
                let mut requests = requests.iter();
                requests.any(|other| self.request.must_wait_for(other))
            };
            if !is_blocked(&self.tracker.lock(index)) {
                return None;
            }
            let ended = self.tracker.shards[index].ended.listen();
            is_blocked(&self.tracker.lock(index)).then_some(ended)
        })
    }
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        self.tracker.unregister(self.mask, self.request.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn starts(tracker: &Tracker, begin: u64, end: u64, serialising: bool) -> Option<Tracked<'_>> {
        tracker.begin(begin, end, serialising).now_or_never()
    }

    #[test]
    fn plain_requests_overlap_freely_and_a_serialising_one_waits_for_them() {
        let tracker = Tracker::default();
        let one = starts(&tracker, 0, 4096, false).unwrap();
        let two = starts(&tracker, 0, 8192, false).unwrap();
        assert!(starts(&tracker, 4096, 8192, true).is_none());
        let elsewhere = starts(&tracker, 8192, 12288, true).unwrap();
        drop(two);
        assert!(starts(&tracker, 4096, 8192, true).is_some());
        drop((one, elsewhere));
        assert_eq!(tracker.registered(), 0);
    }

    #[test]
    fn a_plain_request_waits_for_a_serialising_one_and_runs_when_it_ends() {
        let tracker = Tracker::default();
        let first = starts(&tracker, 0, 4096, true).unwrap();
        assert!(tracker.try_begin(512, 1024, false).is_none());
        let mut second = Box::pin(tracker.begin(512, 1024, false));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert!(second.now_or_never().is_some());
    }

    #[test]
    fn requests_meet_in_whichever_shards_they_share() {
        let tracker = Tracker::default();
        let stripe = 1 << STRIPE_BITS;
        let wide = starts(&tracker, stripe - 512, 40 * stripe, true).unwrap();
        for begin in [stripe - 512, stripe, 39 * stripe] {
            assert!(starts(&tracker, begin, begin + 512, false).is_none());
        }
        assert!(starts(&tracker, 0, 512, true).is_some());
        // In the same shard, far away.
        assert!(starts(&tracker, 48 * stripe, 48 * stripe + 512, true).is_some());
        drop(wide);
        assert_eq!(tracker.registered(), 0);
    }

    #[test]
    fn two_that_serialise_late_wait_for_each_other_in_turn_and_not_for_ever() {
        let tracker = Tracker::default();
        let mut one = starts(&tracker, 0, 512, false).unwrap();
        let mut two = starts(&tracker, 512, 1024, false).unwrap();
        let mut first = Box::pin(async move {
            one.serialise(0, 4096).await;
            one
        });
        assert!(first.as_mut().now_or_never().is_none());
        let mut second = Box::pin(async move {
            two.serialise(0, 4096).await;
            two
        });
        // The second waits, so it touches nothing: the first has its turn.
        assert!(second.as_mut().now_or_never().is_none());
        let one = first.now_or_never().expect("its turn");
        assert!(second.as_mut().now_or_never().is_none());
        drop(one);
        assert!(second.now_or_never().is_some());
        assert_eq!(tracker.registered(), 0);
    }
}
