//! Who uses which bytes of a child: what a driver must know before it gives bytes away that a request
//! may still be reading or writing.
//!
//! A driver whose mapping changes while requests are under way
//! ([`DriverIo::moves_data`](crate::driver::DriverIo::moves_data)) first changes it, then waits
//! ([`Io::wait_unused`](super::Io::wait_unused)) for those who resolved before, and only then uses the
//! old bytes for something else. A use is recorded where a request resolves, with nothing in between at
//! which its worker could do something else: by the path without a task itself, and elsewhere by
//! [`Io::using`](super::Io::using).
//!
//! Each worker records its own uses, in a table that nobody else looks at. Who waits posts to every
//! worker that has a plan with the node. What is posted runs between a worker's turns, so a request
//! there has either recorded its use, and is waited for, or resolves later and finds what the mapping
//! has become: the post orders the change before it.
//!
//! Threads: [`Uses`] its worker; [`Servers`] any, its lock held for a look.

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use futures_channel::oneshot;

use super::ContextHandle;
use crate::graph::NodeId;

/// The uses that one worker has recorded.
#[derive(Default)]
pub(crate) struct Uses {
    table: RefCell<Table>,
}

#[derive(Default)]
struct Table {
    /// By [`UseId`]. At most one per request and one per [`Using`], so as many as those are.
    open: Vec<Option<Use>>,
    free: Vec<u32>,
    /// How many there have been.
    count: u64,
    waits: Vec<Wait>,
}

/// Bytes of a node's child that are being used.
struct Use {
    /// Unique on the worker for ever.
    number: u64,
    node: NodeId,
    child: usize,
    begin: u64,
    end: u64,
}

/// Names a use that has not ended, on its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UseId(u32);

/// Somebody who waits for uses of this worker.
struct Wait {
    numbers: Vec<u64>,
    reply: oneshot::Sender<()>,
}

impl Uses {
    /// Records a use, until [`end`](Self::end).
    pub(super) fn begin(&self, node: NodeId, child: usize, offset: u64, bytes: u64) -> UseId {
        let mut table = self.table.borrow_mut();
        let number = table.count;
        table.count += 1;
        let new = Some(Use {
            number,
            node,
            child,
            begin: offset,
            end: offset.saturating_add(bytes),
        });
        if let Some(place) = table.free.pop() {
            table.open[place as usize] = new;
            return UseId(place);
        }
        table.open.push(new);
        UseId((table.open.len() - 1) as u32)
    }

    pub(super) fn end(&self, id: UseId) {
        let mut table = self.table.borrow_mut();
        let ended = table.open[id.0 as usize].take();
        let number = ended.expect("a use ends once").number;
        table.free.push(id.0);
        if table.waits.is_empty() {
            return;
        }
        for wait in table.waits.extract_if(.., |wait| {
            wait.numbers.retain(|other| *other != number);
            wait.numbers.is_empty()
        }) {
            // Who does not wait any more need not know.
            let _ = wait.reply.send(());
        }
    }

    /// Tells `reply` when no use is left of those that are open now and overlap one of `ranges`, which
    /// are in order and apart from each other.
    fn when_unused(
        &self,
        node: NodeId,
        child: usize,
        ranges: &[Range<u64>],
        reply: oneshot::Sender<()>,
    ) {
        let mut table = self.table.borrow_mut();
        let overlaps = |one: &&Use| {
            let after = ranges.partition_point(|range| range.end <= one.begin);
            let near = ranges.get(after).is_some_and(|range| range.start < one.end);
            near && (one.node, one.child) == (node, child)
        };
        let open = table.open.iter().flatten().filter(overlaps);
        let numbers: Vec<_> = open.map(|one| one.number).collect();
        if numbers.is_empty() {
            let _ = reply.send(());
            return;
        }
        table.waits.push(Wait { numbers, reply });
    }

    /// Nobody will end what is open here: the worker is gone, and who waits for it is told.
    pub(super) fn abandon(&self) {
        self.table.borrow_mut().waits.clear();
    }
}

/// A use of a child's bytes; it ends when this is dropped. See
/// [`Io::using`](super::Io::using).
#[must_use = "the use ends when this is dropped"]
pub struct Using<'a> {
    uses: &'a Uses,
    id: UseId,
}

impl<'a> Using<'a> {
    pub(super) fn new(uses: &'a Uses, node: NodeId, child: usize, offset: u64, bytes: u64) -> Self {
        Self {
            uses,
            id: uses.begin(node, child, offset, bytes),
        }
    }
}

impl Drop for Using<'_> {
    fn drop(&mut self) {
        self.uses.end(self.id);
    }
}

/// The workers that have plans with a node: one entry for each plan.
#[derive(Default)]
pub(crate) struct Servers {
    table: Mutex<Vec<ContextHandle>>,
}

impl Servers {
    /// Before the plan's first request.
    pub(super) fn register(&self, worker: &ContextHandle) {
        self.table().push(worker.clone());
    }

    /// After the plan's last request.
    pub(super) fn retire(&self, worker: &ContextHandle) {
        let mut table = self.table();
        let place = table.iter().position(|other| other.is_same(worker));
        table.swap_remove(place.expect("registered when the plan was made"));
    }

    /// See [`Io::wait_unused`](super::Io::wait_unused).
    pub(super) fn wait_unused(
        &self,
        node: NodeId,
        child: usize,
        ranges: Arc<[Range<u64>]>,
    ) -> impl Future<Output = ()> + use<> {
        let ranges = in_order(ranges);
        let mut workers: Vec<ContextHandle> = Vec::new();
        for worker in self.table().iter() {
            if !workers.iter().any(|other| other.is_same(worker)) {
                workers.push(worker.clone());
            }
        }
        let answers: Vec<_> = workers
            .into_iter()
            .map(|worker| {
                let (reply, answer) = oneshot::channel();
                let ranges = Arc::clone(&ranges);
                worker.post(move |context| {
                    context.uses().when_unused(node, child, &ranges, reply);
                });
                answer
            })
            .collect();
        async move {
            for answer in answers {
                // A worker that is gone uses nothing.
                let _ = answer.await;
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Vec<ContextHandle>> {
        self.table.lock().expect("no panic while looking")
    }
}

/// The same bytes in ascending ranges that do not meet and are not empty.
fn in_order(ranges: Arc<[Range<u64>]>) -> Arc<[Range<u64>]> {
    let apart = ranges
        .array_windows()
        .all(|[one, next]| one.end < next.start);
    if apart && !ranges.iter().any(Range::is_empty) {
        return ranges;
    }
    let mut sorted: Vec<_> = ranges
        .iter()
        .filter(|one| !one.is_empty())
        .cloned()
        .collect();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined.into()
}

#[cfg(test)]
mod tests;
