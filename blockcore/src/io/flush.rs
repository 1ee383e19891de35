//! One sync for all that wait: flushes of a root are grouped on each worker.
//!
//! A flush covers every write that completed before it was asked for. One that is asked for while a
//! sync runs may follow writes that this sync no longer sees, so it joins the *next* one, together
//! with all others that have come meanwhile.
//!
//! Threads: the root's worker. Flushes of other workers make syncs of their own.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use futures_channel::oneshot;

use super::Root;
use crate::IoError;

/// The flushes of one root on one worker.
#[derive(Default)]
pub(super) struct FlushGroup {
    running: Cell<bool>,
    waiting: RefCell<Vec<oneshot::Sender<Result<(), IoError>>>>,
}

impl FlushGroup {
    /// Waits until a sync that began after this call has ended, and gives its outcome.
    ///
    /// # Cancellation
    ///
    /// The sync goes on.
    pub(super) async fn join(root: &Rc<Root>) -> Result<(), IoError> {
        let (outcome, mine) = oneshot::channel();
        let group = &root.flushes;
        group.waiting.borrow_mut().push(outcome);
        if !group.running.replace(true) {
            let root = Rc::clone(root);
            root.context().spawn(Self::run(Rc::clone(&root)));
        }
        mine.await.unwrap_or(Err(IoError::Failed))
    }

    async fn run(root: Rc<Root>) {
        let group = &root.flushes;
        loop {
            let round = group.waiting.take();
            if round.is_empty() {
                group.running.set(false);
                return;
            }
            let outcome = root.io().flush().await;
            for waiting in round {
                let _ = waiting.send(outcome);
            }
        }
    }
}
