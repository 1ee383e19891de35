//! Requests that must not run beside others on the same bytes.
//!
//! A write that is widened to the node's alignment reads, changes and writes back bytes that its
//! guest did not name; another write to those bytes in between would be undone. So on a node where
//! that can happen every write registers its widened range here first, and waits for those that came
//! before, overlap, and of which at least one is *serialising*.
//!
//! A request waits only for requests that registered before it, so waits cannot form a circle.
//!
//! Threads: any worker. The lock is held over a look at the table, never over a wait.

use std::sync::Mutex;

use event_listener::Event;

/// The registered writes of one node.
#[derive(Default)]
pub struct Tracker {
    table: Mutex<Table>,
    /// Notified whenever a request ends.
    ended: Event,
}

#[derive(Default)]
struct Table {
    next: u64,
    requests: Vec<Request>,
}

#[derive(Clone, Copy)]
struct Request {
    number: u64,
    begin: u64,
    end: u64,
    serialising: bool,
}

impl Tracker {
    /// Registers a write of the bytes from `begin` to `end` and waits for its turn. The request ends
    /// when what is returned is dropped.
    ///
    /// # Cancellation
    ///
    /// Dropped while it waits, the request is gone as if it had ended.
    pub async fn begin(&self, begin: u64, end: u64, serialising: bool) -> Tracked<'_> {
        let request = {
            let mut table = self.lock();
            let number = table.next;
            table.next += 1;
            let request = Request {
                number,
                begin,
                end,
                serialising,
            };
            table.requests.push(request);
            request
        };
        let tracked = Tracked {
            tracker: self,
            number: request.number,
        };
        loop {
            let ended = self.ended.listen();
            if !self.must_wait(request) {
                return tracked;
            }
            ended.await;
        }
    }

    fn must_wait(&self, request: Request) -> bool {
        self.lock().requests.iter().any(|other| {
            other.number < request.number
                && other.begin < request.end
                && request.begin < other.end
                && (other.serialising || request.serialising)
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().expect("no panic while looking")
    }
}

/// A registered write whose turn it is.
pub struct Tracked<'a> {
    tracker: &'a Tracker,
    number: u64,
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        self.tracker
            .lock()
            .requests
            .retain(|request| request.number != self.number);
        self.tracker.ended.notify(usize::MAX);
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
    fn plain_writes_overlap_freely_and_a_serialising_one_waits_for_them() {
        let tracker = Tracker::default();
        let one = starts(&tracker, 0, 4096, false).unwrap();
        let two = starts(&tracker, 0, 8192, false).unwrap();
        assert!(starts(&tracker, 4096, 8192, true).is_none());
        let elsewhere = starts(&tracker, 8192, 12288, true).unwrap();
        drop(two);
        assert!(starts(&tracker, 4096, 8192, true).is_some());
        drop((one, elsewhere));
        assert!(tracker.lock().requests.is_empty());
    }

    #[test]
    fn a_plain_write_waits_for_a_serialising_one_and_runs_when_it_ends() {
        let tracker = Tracker::default();
        let first = starts(&tracker, 0, 4096, true).unwrap();
        let mut second = Box::pin(tracker.begin(512, 1024, false));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert!(second.now_or_never().is_some());
    }
}
