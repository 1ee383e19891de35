//! [`Rounds`]: something that is done one at a time, and once for all who wait.
//!
//! Who comes while a round runs waits for the next, which then serves everybody who has come: one that
//! began earlier may not have seen what they did.
//!
//! Threads: any worker. The lock is held over a look at the counts, never over a wait.

use std::sync::{Mutex, MutexGuard};

use blockcore::IoError;
use blockcore::fault::{self, Fault};
use event_listener::Event;

/// See the module's header.
#[derive(Default)]
pub(crate) struct Rounds {
    state: Mutex<State>,
    ended: Event,
}

struct State {
    begun: u64,
    /// Equal to `begun`, or one less while a round runs.
    ended: u64,
    /// Of the last that ended.
    outcome: Result<(), IoError>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            begun: 0,
            ended: 0,
            outcome: Ok(()),
        }
    }
}

impl Rounds {
    /// Waits for a round that began after this call, and gives its outcome or that of a later one. If
    /// none runs, this call's `round` is the one.
    ///
    /// # Cancellation
    ///
    /// Dropped while its own `round` runs, that has failed for all who wait for it.
    pub(crate) async fn join(
        &self,
        round: impl Future<Output = Result<(), IoError>>,
    ) -> Result<(), IoError> {
        let mine = {
            let state = self.lock();
            match fault::is_planted(Fault::JoinRunningRound) && state.begun > state.ended {
                true => state.begun,
                false => state.begun + 1,
            }
        };
        loop {
            let ended = self.ended.listen();
            {
                let mut state = self.lock();
                if state.ended >= mine {
                    return state.outcome;
                }
                if state.begun == state.ended {
                    state.begun += 1;
                    break;
                }
            }
            ended.await;
        }
        let mut running = Round {
            rounds: self,
            outcome: Err(IoError::Failed),
        };
        running.outcome = round.await;
        running.outcome
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while counting")
    }
}

/// A round that runs; dropping it ends it.
struct Round<'a> {
    rounds: &'a Rounds,
    outcome: Result<(), IoError>,
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.rounds.lock();
            state.ended = state.begun;
            state.outcome = self.outcome;
        }
        self.rounds.ended.notify(usize::MAX);
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
    fn who_comes_while_a_round_runs_shares_the_next_one() {
        let (rounds, count) = (Rounds::default(), Cell::new(0));
        let (end, running) = oneshot::channel::<()>();
        let mut first = pin!(rounds.join(async {
            let _ = running.await;
            Ok(())
        }));
        assert_eq!(first.as_mut().now_or_never(), None);
        let next = || {
            rounds.join(async {
                count.set(count.get() + 1);
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
        assert_eq!(count.get(), 1);
    }

    #[test]
    fn a_round_that_is_dropped_has_failed_and_the_next_can_run() {
        let rounds = Rounds::default();
        let mut dropped = Box::pin(rounds.join(std::future::pending()));
        assert_eq!(dropped.as_mut().now_or_never(), None);
        drop(dropped);
        assert_eq!(rounds.lock().outcome, Err(IoError::Failed));
        let next = rounds.join(async { Ok(()) });
        assert_eq!(next.now_or_never(), Some(Ok(())));
    }
}
