//! Flushing: what has to be flushed, and in which order.
//!
//! Each worker counts the changes that have ended under each plan it serves; one writer per counter.
//! A flush looks at the sum of all counters that reach the node *before* it begins; once it has
//! succeeded, everything up to that sum is durable, and a later flush that finds the same sum has
//! nothing to do. A node begins in doubt: what an earlier life of this process completed may not be
//! durable, so the first flush is a real one. So is the first after a change of what is below.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::Io;
use crate::IoError;
use crate::driver::{DriverKind, Role};
use crate::fault::{self, Fault};

/// How much was changed under a node, and how much of that a flush has covered.
#[derive(Default)]
pub(crate) struct Generation {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    counters: Vec<Arc<AtomicU64>>,
    /// What counters that are gone had.
    retired: u64,
    /// Up to which sum a flush has succeeded; `None`: none has.
    flushed: Option<u64>,
    /// How often that was thrown away: what began before says nothing of the time after.
    doubts: u64,
}

/// What a flush that has begun will cover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Covers {
    sum: u64,
    doubts: u64,
}

impl Table {
    fn sum(&self) -> u64 {
        let counts = self.counters.iter();
        counts
            .map(|count| count.load(Ordering::Acquire))
            .sum::<u64>()
            + self.retired
    }
}

impl Generation {
    /// Counts what `counter` counts, too.
    pub(crate) fn register(&self, counter: &Arc<AtomicU64>) {
        self.table().counters.push(Arc::clone(counter));
    }

    /// The owner of `counter` is gone.
    pub(crate) fn retire(&self, counter: &Arc<AtomicU64>) {
        let mut table = self.table();
        let place = table
            .counters
            .iter()
            .position(|other| Arc::ptr_eq(other, counter));
        if let Some(place) = place {
            table.counters.swap_remove(place);
            table.retired += counter.load(Ordering::Acquire);
        }
    }

    /// What a flush that begins now will cover; `None` if all of that is durable.
    fn begin(&self) -> Option<Covers> {
        let table = self.table();
        let sum = table.sum();
        let in_doubt =
            table.flushed.is_none() && !fault::is_planted(Fault::FlushElidedAfterRestart);
        (in_doubt || table.flushed.unwrap_or(0) < sum).then_some(Covers {
            sum,
            doubts: table.doubts,
        })
    }

    /// Requests go another way from now on: what was flushed on the old one may not be durable on the new
    /// one, as with flushes that were ignored, or a child that somebody else wrote to. Nothing is in
    /// flight.
    pub(crate) fn doubt(&self) {
        let mut table = self.table();
        table.flushed = None;
        table.doubts += 1;
    }

    /// A flush has succeeded; one that was under way when another failed, or the way changed, tells nothing.
    fn succeeded(&self, covered: Covers) {
        let mut table = self.table();
        if table.doubts == covered.doubts {
            let before = table.flushed.unwrap_or(0);
            table.flushed = Some(before.max(covered.sum));
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no panic while counting")
    }
}

impl Io<'_> {
    /// Makes everything durable that completed before the call, in this node and below. Succeeds on a
    /// read-only node, which has nothing to write back.
    ///
    /// A driver that does it all itself is left to it. Else it hands what it keeps to the host; then,
    /// unless flushes are ignored, the host makes it durable; then the children that hold the node's
    /// data or metadata are flushed, or the one that a filter passes through. A backing node never is.
    pub async fn flush(self) -> Result<(), IoError> {
        let node = self.node();
        if node.modes.read_only {
            return Ok(());
        }
        let Some(covers) = node.state.generation.begin() else {
            // Somebody else may have written to a child.
            return self.flush_children().await;
        };
        if fault::is_planted(Fault::Flush) && node.kind == DriverKind::Protocol {
            return Ok(());
        }
        let flushed = self.flush_now().await;
        match flushed {
            Ok(()) => node.state.generation.succeeded(covers),
            // None after it is elided: whoever keeps a failure for good is asked.
            Err(_) => node.state.generation.doubt(),
        }
        flushed
    }

    /// Flushes, whatever was flushed before.
    async fn flush_now(self) -> Result<(), IoError> {
        let node = self.node();
        self.event("flush_to_os").await?;
        if let Some(flush) = node.io.flush_all(self) {
            return flush.await;
        }
        node.io.flush_to_host(self).await?;
        if !node.modes.no_flush {
            self.event("flush_to_disk").await?;
            node.io.flush_to_disk(self).await?;
        }
        self.flush_children().await
    }

    /// Flushes the children that hold data or metadata of this node, or that it filters, in order.
    /// With no flushes to the disk wanted, the children still hand what they keep to the host.
    pub async fn flush_children(self) -> Result<(), IoError> {
        let holds = Role::DATA | Role::METADATA | Role::FILTERED;
        for child in self.node().children.iter().flatten() {
            if child.role.intersects(holds) {
                // Boxed: the recursion through the drivers has no bound that the compiler could see.
                Box::pin(self.at(child.index).flush()).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_is_elided_only_when_one_has_covered_every_change() {
        let generation = Generation::default();
        let one = Arc::new(AtomicU64::new(0));
        generation.register(&one);
        // Nothing was written in this life; what the last one completed may be in doubt.
        let first = generation.begin().unwrap();
        generation.succeeded(first);
        assert_eq!(generation.begin(), None);
        one.store(1, Ordering::Release);
        let second = generation.begin().unwrap();
        // A change that ends while the flush runs is not covered.
        one.store(2, Ordering::Release);
        generation.succeeded(second);
        let third = generation.begin().unwrap();
        generation.retire(&one);
        generation.succeeded(third);
        assert_eq!(generation.begin(), None);
    }

    #[test]
    fn a_flush_that_was_under_way_when_another_failed_tells_nothing() {
        let generation = Generation::default();
        let (one, other) = (generation.begin().unwrap(), generation.begin().unwrap());
        generation.doubt();
        generation.succeeded(other);
        assert!(generation.begin().is_some());
        generation.succeeded(one);
        assert!(generation.begin().is_some());
    }

    #[test]
    fn a_failed_flush_covers_nothing() {
        let generation = Generation::default();
        generation.succeeded(generation.begin().unwrap());
        generation.register(&Arc::new(AtomicU64::new(1)));
        assert!(generation.begin().is_some());
        assert!(generation.begin().is_some());
    }
}
