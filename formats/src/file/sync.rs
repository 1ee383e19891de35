//! One sync of a file at a time, and one for all who wait.
//!
//! Linux reports a failed write-back once per open file description: of two syncs at the same time one
//! gets the error, and the other may succeed although what it should have covered is lost. So workers
//! that share a description take turns. Who comes while a sync runs waits for the next, which then
//! serves everybody who has come; a sync that began earlier may not have seen their writes.
//!
//! Threads: any worker. The lock is held over a look at the counts, never over a wait.

use std::sync::{Mutex, MutexGuard};

use blockcore::IoError;
use event_listener::Event;

/// The syncs of one open file.
#[derive(Default)]
pub(super) struct SyncGroup {
    rounds: Mutex<Rounds>,
    ended: Event,
}

struct Rounds {
    begun: u64,
    /// Equal to `begun`, or one less while a round runs.
    ended: u64,
    /// Of the last that ended.
    outcome: Result<(), IoError>,
}

impl Default for Rounds {
    fn default() -> Self {
        Self {
            begun: 0,
            ended: 0,
            outcome: Ok(()),
        }
    }
}

impl SyncGroup {
    /// Waits for a round that began after this call, and gives its outcome or that of a later one. If
    /// none runs, this call's `sync` is the round.
    ///
    /// # Cancellation
    ///
    /// Dropped while its own `sync` runs, the round has failed for all who wait for it.
    pub(super) async fn join(
        &self,
        sync: impl Future<Output = Result<(), IoError>>,
    ) -> Result<(), IoError> {
        let mine = self.lock().begun + 1;
        loop {
            let ended = self.ended.listen();
            {
                let mut rounds = self.lock();
                if rounds.ended >= mine {
                    return rounds.outcome;
                }
                if rounds.begun == rounds.ended {
                    rounds.begun += 1;
                    break;
                }
            }
            ended.await;
        }
        let mut round = Round {
            group: self,
            outcome: Err(IoError::Failed),
        };
        round.outcome = sync.await;
        round.outcome
    }

    fn lock(&self) -> MutexGuard<'_, Rounds> {
        self.rounds.lock().expect("no panic while counting")
    }
}

/// A round that runs; dropping it ends it.
struct Round<'a> {
    group: &'a SyncGroup,
    outcome: Result<(), IoError>,
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        {
            let mut rounds = self.group.lock();
            rounds.ended = rounds.begun;
            rounds.outcome = self.outcome;
        }
        self.group.ended.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::pin;

    use futures_channel::oneshot;
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn who_comes_while_a_sync_runs_shares_the_next_one() {
        let (group, syncs) = (SyncGroup::default(), Cell::new(0));
        let (end, running) = oneshot::channel::<()>();
        let mut first = pin!(group.join(async {
            let _ = running.await;
            Ok(())
        }));
        assert_eq!(first.as_mut().now_or_never(), None);
        let next = || {
            group.join(async {
                syncs.set(syncs.get() + 1);
                Err(IoError::NoSpace)
            })
        };
        let (mut second, mut third) = (pin!(next()), pin!(next()));
        assert_eq!(second.as_mut().now_or_never(), None);
        assert_eq!(third.as_mut().now_or_never(), None);
        end.send(()).unwrap();
        assert_eq!(first.now_or_never(), Some(Ok(())));
        assert_eq!(second.now_or_never(), Some(Err(IoError::NoSpace)));
        assert_eq!(third.now_or_never(), Some(Err(IoError::NoSpace)));
        assert_eq!(syncs.get(), 1);
    }

    #[test]
    fn a_sync_that_is_dropped_has_failed_and_the_next_can_run() {
        let group = SyncGroup::default();
        let mut dropped = Box::pin(group.join(std::future::pending()));
        assert_eq!(dropped.as_mut().now_or_never(), None);
        drop(dropped);
        assert_eq!(group.lock().outcome, Err(IoError::Failed));
        let next = group.join(async { Ok(()) });
        assert_eq!(next.now_or_never(), Some(Ok(())));
    }
}
