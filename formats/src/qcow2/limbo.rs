//! [`Limbo`]: host clusters that nothing refers to any more, but that must not be used again yet.
//!
//! A cluster is let go of in three steps. The entry that named it is changed; the cluster is put here. The
//! committer makes that change durable: until then a power cut brings the old entry back, and with it what
//! the cluster holds. Then nobody may be using it any more who found it before. Only then does its
//! reference count fall. A crash in between leaks it and nothing else.
//!
//! Threads: any worker. A lock, held over a look.

use std::sync::{Mutex, MutexGuard};

use super::layout::HostOffset;

/// Clusters that lie side by side and were let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Freed {
    /// Where the first begins.
    pub(crate) host: HostOffset,
    /// How many.
    pub(crate) clusters: u64,
    /// What for.
    pub(crate) cause: Cause,
}

/// What a cluster was let go of for; decides whether the host is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The guest discarded it or let it be zeroed.
    Request,
    /// Anything else.
    Other,
}

/// See the module's header.
#[derive(Default)]
pub(crate) struct Limbo {
    waiting: Mutex<Vec<Freed>>,
}

impl Limbo {
    /// Puts clusters here whose last entry has just been changed. Returns how many pieces there are.
    pub(crate) fn add(&self, freed: Freed) -> usize {
        let mut waiting = self.lock();
        waiting.push(freed);
        waiting.len()
    }

    /// Takes everything, before what the entries are is copied for the image.
    pub(crate) fn take(&self) -> Vec<Freed> {
        std::mem::take(&mut *self.lock())
    }

    /// Puts back what [`take`](Self::take) gave, since the entries could not be made durable.
    pub(crate) fn put_back(&self, freed: Vec<Freed>) {
        self.lock().splice(0..0, freed);
    }

    /// Whether there is nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Freed>> {
        self.waiting.lock().expect("no panic while looking")
    }
}
