//! Memory announced to drivers before requests use it.
//!
//! Whoever has a root says which memory its requests are going to use: an export its guest's, when a queue
//! begins to be served. Each layer of the root's plan is told ([`DriverIo::memory_announced`]) and may register it
//! with whatever it drives. When the plan changes, layers that are new in it are told of all that is announced,
//! and those that are gone of its end. So each layer hears of the end of what it heard of, once.
//!
//! Requests need not use such memory, and one that does costs nothing more for it.
//!
//! Nothing here registers it with io_uring. Registered buffers pin a guest's memory, all of it and for as long as
//! they are registered; and they go on with the pages that were there when its front-end cut it short, past those
//! that take their place then.
//!
//! Threads: the root's worker. A root that several workers have is told on each of them.
//!
//! Invariant: what is announced stays mapped until its [`Announcement`] is dropped, after the last request
//! that uses it.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::plan::Plan;
use super::{IoContext, Root};
use crate::driver::DriverIo;

/// A range of this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryRange {
    /// Where it begins, as this process sees it.
    pub address: usize,
    /// How long it is.
    pub bytes: usize,
}

/// What a root's requests are going to use, with how many have announced it.
#[derive(Default)]
pub(super) struct Announced(RefCell<Vec<(MemoryRange, usize)>>);

/// Memory is announced until this is dropped. It does not keep the root.
pub struct Announcement {
    root: Weak<Root>,
    memory: MemoryRange,
}

impl Root {
    /// Tells the drivers below that requests of this root on this worker may use `memory` from now on. The
    /// same range may be announced several times; drivers hear of the first one, and of the end of the last.
    ///
    /// The caller keeps it mapped for as long as it has what is returned, and has that for as long as some
    /// request uses the memory.
    #[must_use]
    pub fn announce(self: &Rc<Self>, memory: MemoryRange) -> Announcement {
        if self.announced.add(memory) {
            each(&self.plan(), |half| {
                half.memory_announced(self.context(), memory)
            });
        }
        Announcement {
            root: Rc::downgrade(self),
            memory,
        }
    }

    /// What is announced here.
    pub fn announced(&self) -> Vec<MemoryRange> {
        self.announced.all()
    }
}

impl Announced {
    /// Returns whether it is the first of its kind.
    fn add(&self, memory: MemoryRange) -> bool {
        let mut all = self.0.borrow_mut();
        match all.iter_mut().find(|(known, _)| *known == memory) {
            Some((_, count)) => {
                *count += 1;
                false
            }
            None => {
                all.push((memory, 1));
                true
            }
        }
    }

    /// Returns whether it was the last of its kind.
    fn remove(&self, memory: MemoryRange) -> bool {
        let mut all = self.0.borrow_mut();
        let place = all.iter().position(|(known, _)| *known == memory);
        let Some(place) = place else {
            return false;
        };
        all[place].1 -= 1;
        let last = all[place].1 == 0;
        if last {
            all.swap_remove(place);
        }
        last
    }

    fn all(&self) -> Vec<MemoryRange> {
        self.0.borrow().iter().map(|(memory, _)| *memory).collect()
    }

    /// A root's requests go another way from now on.
    pub(super) fn plan_changes(&self, context: &IoContext, before: &Plan, after: &Plan) {
        let all = self.all();
        if all.is_empty() {
            return;
        }
        each(after, |half| {
            if !is_in(half, before) {
                all.iter()
                    .for_each(|memory| half.memory_announced(context, *memory));
            }
        });
        each(before, |half| {
            if !is_in(half, after) {
                all.iter()
                    .for_each(|memory| half.memory_withdrawn(context, *memory));
            }
        });
    }

    /// The root is gone, whatever its users still have.
    pub(super) fn end(&self, context: &IoContext, plan: &Plan) {
        for memory in self.all() {
            each(plan, |half| half.memory_withdrawn(context, memory));
        }
        self.0.borrow_mut().clear();
    }
}

fn is_in(half: &Arc<dyn DriverIo>, plan: &Plan) -> bool {
    plan.nodes.iter().any(|node| Arc::ptr_eq(&node.io, half))
}

/// Every half of a plan, once: a node may be reached by two ways.
fn each(plan: &Plan, tell: impl Fn(&Arc<dyn DriverIo>)) {
    for (place, node) in plan.nodes.iter().enumerate() {
        let mut before = plan.nodes[..place].iter();
        if !before.any(|other| Arc::ptr_eq(&other.io, &node.io)) {
            tell(&node.io);
        }
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // A root that is gone has told them.
        let Some(root) = self.root.upgrade() else {
            return;
        };
        if root.announced.remove(self.memory) {
            let memory = self.memory;
            each(&root.plan(), |half| {
                half.memory_withdrawn(root.context(), memory)
            });
        }
    }
}
