//! [`Plan`]: what a root's requests need of the graph, compiled when the graph changes.
//!
//! A plan is immutable and shared by the workers that serve its root. Each worker has it in a
//! [`LocalPlan`], with what is counted there; a request keeps the local plan that it began with.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::align;
use super::{HeaderGuard, IoContext};
use crate::dirty_bitmap::Bits;
use crate::driver::{DetectZeroes, DriverIo, DriverKind, Limits, Mapping, Role, SnapshotIo};
use crate::engine::{FileId, OpenFile};
use crate::graph::NodeId;
use crate::graph::permission::Permissions;
use crate::io::buffer::Segments;
use crate::node::NodeState;

/// See the module's header.
pub struct Plan {
    /// The root's node first; every child after a parent of it. A node that is reached by two ways is
    /// there twice.
    pub(crate) nodes: Vec<PlanNode>,
    fast: Fast,
}

/// One node of a plan.
pub(crate) struct PlanNode {
    pub(crate) state: Arc<NodeState>,
    pub(crate) kind: DriverKind,
    pub(crate) io: Arc<dyn DriverIo>,
    pub(crate) limits: Limits,
    pub(crate) modes: Modes,
    pub(crate) children: Vec<Option<PlanChild>>,
    /// What the parent by which the plan comes here may do.
    pub(crate) granted: Permissions,
    /// Some node above in the plan is no filter: what this one holds is for that to say.
    pub(crate) holds_data: bool,
    /// Requests register: one of them may have to keep others off its bytes.
    pub(crate) tracked: bool,
    /// Keeps the first bytes from looking like another format's: the node's was guessed.
    pub(crate) guard: Option<HeaderGuard>,
    /// Set after every change of the node's bytes.
    pub(crate) bitmaps: Vec<Arc<Bits>>,
}

/// A child of a plan's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlanChild {
    /// Where in the plan.
    pub(crate) index: usize,
    pub(crate) role: Role,
}

/// How a node was opened, as far as its requests are concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Modes {
    /// Writes are refused.
    pub read_only: bool,
    /// Discards reach the driver; otherwise they do nothing.
    pub unmap: bool,
    /// Flushes stop short of the disk: the data may not survive the host.
    pub no_flush: bool,
    /// What becomes of written zeroes.
    pub detect_zeroes: DetectZeroes,
}

/// What decides whether the path without a task can take a request.
struct Fast {
    /// Offset and length must be multiples, for every layer.
    alignment: u64,
    /// Memory must be aligned so, for every layer.
    memory_alignment: usize,
    /// Longest request, for every layer.
    max_bytes: u64,
    /// No layer has to see each read.
    reads: bool,
    /// No layer has to see each write.
    writes: bool,
    /// Some layer may change where bytes live while requests are under way.
    moves_data: bool,
}

/// Where in a child a request's bytes live that its node may move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Movable {
    pub(super) node: NodeId,
    pub(super) child: usize,
    pub(super) offset: u64,
}

impl PlanNode {
    /// Whether the driver may give bytes of the child at `index` to others while requests use them.
    pub(super) fn may_move(&self, index: usize) -> bool {
        let child = self.children.get(index).and_then(Option::as_ref);
        self.io.moves_data() && child.is_some_and(|child| child.role.contains(Role::DATA))
    }
}

impl Plan {
    pub(crate) fn new(nodes: Vec<PlanNode>) -> Arc<Self> {
        let all = |value: fn(&Limits) -> u32| {
            let values = nodes.iter().map(|node| value(&node.limits));
            values.max().unwrap_or(1)
        };
        let longest = |node: &PlanNode| match node.limits.max_transfer_bytes {
            0 => u64::MAX,
            bytes => bytes,
        };
        let untracked = nodes.iter().all(|node| !node.tracked);
        let writes = |node: &PlanNode| {
            node.modes.detect_zeroes == DetectZeroes::Off
                && node.bitmaps.is_empty()
                && node.guard.is_none()
        };
        let fast = Fast {
            alignment: u64::from(all(|limits| limits.request_alignment)),
            memory_alignment: all(|limits| limits.memory_alignment) as usize,
            max_bytes: nodes.iter().map(longest).min().unwrap_or(u64::MAX),
            reads: untracked,
            writes: untracked
                && !nodes[0].modes.read_only
                && nodes[0].granted.contains(Permissions::WRITE)
                && nodes.iter().all(writes),
            moves_data: nodes.iter().any(|node| node.io.moves_data()),
        };
        Arc::new(Self { nodes, fast })
    }

    /// Whether requests would be treated alike by both, so that one may take the other's place with
    /// requests under way.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.nodes.len() == other.nodes.len()
            && self.nodes.iter().zip(&other.nodes).all(|(one, other)| {
                one.state.id() == other.state.id()
                    && Arc::ptr_eq(&one.io, &other.io)
                    && (one.limits, one.modes, one.tracked, one.granted)
                        == (other.limits, other.modes, other.tracked, other.granted)
                    && one.children == other.children
                    && one.guard.is_some() == other.guard.is_some()
                    && one.bitmaps.len() == other.bitmaps.len()
                    && one
                        .bitmaps
                        .iter()
                        .zip(&other.bitmaps)
                        .all(|(one, other)| Arc::ptr_eq(one, other))
            })
    }

    /// The next flush of every node is a real one: some of them may have other children, or other modes,
    /// than when they were flushed.
    pub(crate) fn doubt_flushes(&self) {
        for node in &self.nodes {
            node.state.generation.doubt();
        }
    }

    /// The length of the root in bytes, now.
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.nodes[0].state.bytes()
    }

    /// The root's limits.
    pub fn limits(&self) -> &Limits {
        &self.nodes[0].limits
    }

    /// How the root was opened.
    pub fn modes(&self) -> Modes {
        self.nodes[0].modes
    }

    /// What the root's node keeps of a moment.
    pub(crate) fn snapshot(&self) -> Option<&dyn SnapshotIo> {
        self.nodes[0].io.snapshot()
    }

    /// Whether requests go past the host's page cache, so that the disk works beside the worker.
    pub fn is_direct(&self) -> bool {
        self.fast.alignment > 1
    }

    /// The files of the host below, those of the root's own first.
    pub fn files(&self) -> impl Iterator<Item = &Arc<OpenFile>> {
        self.nodes.iter().flat_map(|node| node.io.files())
    }

    /// How many syncs engines have started on the files below.
    pub fn host_syncs(&self) -> u64 {
        self.files().map(|file| file.syncs()).sum()
    }

    /// Whether some layer may change where bytes live while requests are under way, so that
    /// [`fast_movable`](Self::fast_movable) has to be asked.
    #[inline]
    pub(super) fn moves_data(&self) -> bool {
        self.fast.moves_data
    }

    /// Where in a file a request's bytes live, if it may go there without a task.
    #[inline]
    pub(super) fn fast(
        &self,
        write: bool,
        offset: u64,
        segments: &Segments,
    ) -> Option<(FileId, u64)> {
        self.fast_through(write, offset, segments, |_, _, _| true)
    }

    /// As [`fast`](Self::fast), with what has to be recorded before the request goes there. There is room
    /// for one record: a request that passes two layers which move data takes a task.
    #[inline]
    pub(super) fn fast_movable(
        &self,
        write: bool,
        offset: u64,
        segments: &Segments,
    ) -> Option<((FileId, u64), Option<Movable>)> {
        let mut movable = None;
        let place = self.fast_through(write, offset, segments, |node, child, offset| {
            if !node.may_move(child) {
                return true;
            }
            let node = node.state.id();
            let first = Movable {
                node,
                child,
                offset,
            };
            movable.replace(first).is_none()
        })?;
        Some((place, movable))
    }

    /// As [`fast`](Self::fast), where `pass` says of every child on the way (its parent, its index there
    /// and the offset in it) whether the request may go on.
    #[inline]
    fn fast_through(
        &self,
        write: bool,
        offset: u64,
        segments: &Segments,
        pass: impl FnMut(&PlanNode, usize, u64) -> bool,
    ) -> Option<(FileId, u64)> {
        let fast = &self.fast;
        let (bytes, length) = (segments.bytes(), self.bytes());
        let allowed = if write { fast.writes } else { fast.reads };
        let fits = offset <= length && bytes <= length - offset && bytes <= fast.max_bytes;
        let aligned = align::is_aligned(offset, bytes, fast.alignment)
            && (fast.memory_alignment == 1 || segments.is_aligned(fast.memory_alignment));
        if !allowed || !fits || !aligned || bytes == 0 {
            return None;
        }
        let (file, offset) = self.map(write, offset, bytes, pass)?;
        // A layer may have shifted the range off the alignment of those below.
        (offset & (fast.alignment - 1) == 0).then_some((file, offset))
    }

    /// Where the bytes of a request live, if every layer knows at once.
    fn map(
        &self,
        write: bool,
        mut offset: u64,
        bytes: u64,
        mut pass: impl FnMut(&PlanNode, usize, u64) -> bool,
    ) -> Option<(FileId, u64)> {
        let mut node = &self.nodes[0];
        loop {
            if write {
                node.state.wrote_to(offset + bytes);
            }
            match node.io.map(write, offset, bytes) {
                Mapping::Child { index, offset: to } => {
                    if !pass(node, index, to) {
                        return None;
                    }
                    node = &self.nodes[node.children.get(index)?.as_ref()?.index];
                    offset = to;
                }
                Mapping::File { file, offset } => {
                    let inside = offset.checked_add(bytes)? <= node.state.bytes();
                    return inside.then_some((file, offset));
                }
                Mapping::Ask => return None,
            }
        }
    }
}

/// A plan on one worker.
pub(super) struct LocalPlan {
    pub(crate) plan: Arc<Plan>,
    context: Rc<IoContext>,
    /// Changes that have ended here. One writer; whoever flushes reads.
    changes: Arc<AtomicU64>,
    fast_path: Cell<bool>,
}

impl LocalPlan {
    /// Makes `plan` usable on the worker of `context`.
    pub(super) fn new(context: &Rc<IoContext>, plan: Arc<Plan>) -> Rc<Self> {
        let changes = Arc::new(AtomicU64::new(0));
        for node in &plan.nodes {
            for file in node.io.files() {
                context.engine().attach(file);
            }
            node.state.generation.register(&changes);
            node.state.servers.register(context.handle());
        }
        Rc::new(Self {
            plan,
            context: Rc::clone(context),
            changes,
            fast_path: Cell::new(true),
        })
    }

    pub(super) fn set_fast_path(&self, allowed: bool) {
        self.fast_path.set(allowed);
    }

    pub(super) fn may_be_fast(&self) -> bool {
        self.fast_path.get()
    }

    /// A change has ended, well or not; comes before anybody is told.
    #[inline]
    pub(super) fn changed(&self) {
        let changes = self.changes.load(Ordering::Relaxed);
        self.changes.store(changes + 1, Ordering::Release);
    }
}

impl Drop for LocalPlan {
    fn drop(&mut self) {
        for node in &self.plan.nodes {
            node.state.generation.retire(&self.changes);
            node.state.servers.retire(self.context.handle());
            for file in node.io.files() {
                self.context.engine().detach(file.id());
            }
        }
    }
}
