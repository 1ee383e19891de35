//! Turns: one at a time, in the order in which they were asked for.
//!
//! Not a lock from a library: those let whoever comes go before those who wait, or look at the time to
//! decide who is next, and a simulated run could not be had again.
//!
//! Threads: one. A turn is `!Send`, as the tasks that have one are.

use std::cell::RefCell;
use std::rc::Rc;

use futures_channel::oneshot;

/// See the module's header.
#[derive(Clone, Default)]
pub struct Turns {
    /// The end of the turn that was given out last.
    last: Rc<RefCell<Option<oneshot::Receiver<()>>>>,
}

/// One turn; dropping it ends it.
pub struct Turn(#[expect(dead_code, reason = "dropping it tells the next")] oneshot::Sender<()>);

impl Turns {
    /// Takes the next place, at once; the future waits until everybody who came before has ended.
    ///
    /// # Cancellation
    ///
    /// Who waits must not be dropped: the next would take it for an end. Tasks of control run to theirs.
    pub fn next(&self) -> impl Future<Output = Turn> + 'static {
        let (end, ended) = oneshot::channel();
        let before = self.last.replace(Some(ended));
        async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            Turn(end)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn turns_are_had_in_the_order_in_which_they_were_asked_for() {
        let turns = Turns::default();
        let first = turns.next().now_or_never().unwrap();
        let (mut second, mut third) = (Box::pin(turns.next()), Box::pin(turns.next()));
        // Whoever is polled first: the place was taken before.
        assert!(third.as_mut().now_or_never().is_none());
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert!(third.as_mut().now_or_never().is_none());
        let second = second.as_mut().now_or_never().unwrap();
        assert!(third.as_mut().now_or_never().is_none());
        drop(second);
        assert!(third.now_or_never().is_some());
    }
}
