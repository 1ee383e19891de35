//! From the graph to plans: what each root's requests need, worked out for a shape that need not be the
//! graph's yet.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::permission::Permissions;
use super::shape::Shape;
use super::{Node, NodeId, RootId};
use crate::driver::{DriverIo, DriverKind, DriverType, Limits, PROBE_BYTES};
use crate::io::{HeaderGuard, Modes, Plan, PlanChild, PlanNode};

/// The graph as it is, or as it will be when a change is committed.
pub(super) struct View<'a> {
    pub(super) shape: &'a Shape,
    /// Looked through in order.
    pub(super) nodes: [&'a BTreeMap<NodeId, Node>; 2],
    /// I/O halves that take the place of the nodes' own.
    pub(super) replaced: &'a BTreeMap<NodeId, Arc<dyn DriverIo>>,
    /// In what units requests of each root come.
    pub(super) units: &'a BTreeMap<RootId, u32>,
    /// Every registered driver.
    pub(super) types: &'a [&'static DriverType],
    pub(super) limits: RefCell<BTreeMap<NodeId, Limits>>,
}

impl View<'_> {
    pub(super) fn node(&self, id: NodeId) -> &Node {
        let mut nodes = self.nodes.iter();
        let node = nodes.find_map(|nodes| nodes.get(&id));
        node.expect("every vertex of a shape has a node")
    }

    pub(super) fn io(&self, id: NodeId) -> &Arc<dyn DriverIo> {
        self.replaced.get(&id).unwrap_or_else(|| &self.node(id).io)
    }

    /// A node's limits, from those below it up.
    pub(super) fn limits(&self, id: NodeId) -> Limits {
        if let Some(limits) = self.limits.borrow().get(&id) {
            return *limits;
        }
        let children: Vec<_> = (0..self.shape.vertex(id).children.len())
            .map(|index| {
                let edge = self.shape.child(id, index)?;
                Some(self.limits(edge.child))
            })
            .collect();
        let mut limits = self.node(id).driver.take().limits(&children);
        if self.shape.vertex(id).probed {
            // What the guard of the first bytes looks at comes whole.
            limits.request_alignment = limits.request_alignment.max(PROBE_BYTES as u32);
        }
        self.limits.borrow_mut().insert(id, limits);
        limits
    }

    /// The nodes to which requests must register, since one that comes by some root may have to keep
    /// others off its bytes, or cut them off. It takes one such root for all of them to register.
    pub(super) fn tracked(&self) -> BTreeSet<NodeId> {
        let mut tracked = BTreeSet::new();
        for (root, edge) in self.shape.roots() {
            let unit = self.units.get(&root).copied().unwrap_or(1);
            self.track_below(edge.child, unit, &mut tracked);
            if edge.needs.contains(Permissions::RESIZE) {
                self.track_resized(edge.child, &mut tracked);
            }
        }
        tracked
    }

    /// What a root's user may make shorter, while others write: the node, and what follows from it below.
    fn track_resized(&self, id: NodeId, tracked: &mut BTreeSet<NodeId>) {
        tracked.insert(id);
        for (_, edge) in self.shape.children(id) {
            if edge.needs.contains(Permissions::RESIZE) {
                self.track_resized(edge.child, tracked);
            }
        }
    }

    fn track_below(&self, id: NodeId, unit: u32, tracked: &mut BTreeSet<NodeId>) {
        let io = self.io(id);
        if self.limits(id).request_alignment > unit || io.serialises() {
            tracked.insert(id);
        }
        let copied = io.copies_child();
        for (index, edge) in self.shape.children(id) {
            if copied == Some(index) {
                tracked.insert(edge.child);
            }
            self.track_below(edge.child, io.child_unit(unit), tracked);
        }
    }

    /// What requests to `id` need, if their parent was granted `granted`.
    pub(super) fn plan(
        &self,
        id: NodeId,
        granted: Permissions,
        tracked: &BTreeSet<NodeId>,
    ) -> Arc<Plan> {
        let mut nodes = Vec::new();
        self.plan_node(id, granted, false, tracked, &mut nodes);
        Plan::new(nodes)
    }

    fn plan_node(
        &self,
        id: NodeId,
        granted: Permissions,
        holds_data: bool,
        tracked: &BTreeSet<NodeId>,
        nodes: &mut Vec<PlanNode>,
    ) -> usize {
        let (node, vertex) = (self.node(id), self.shape.vertex(id));
        let index = nodes.len();
        nodes.push(PlanNode {
            state: Arc::clone(&node.state),
            kind: vertex.kind.kind,
            io: Arc::clone(self.io(id)),
            limits: self.limits(id),
            modes: Modes::from(vertex.modes),
            children: Vec::new(),
            granted,
            holds_data,
            tracked: tracked.contains(&id),
            guard: vertex
                .probed
                .then(|| HeaderGuard::new(vertex.kind, self.types)),
            bitmaps: node
                .bitmaps
                .iter()
                .filter_map(|bitmap| bitmap.recording_bits().cloned())
                .collect(),
        });
        let holds_data = holds_data || vertex.kind.kind != DriverKind::Filter;
        for number in 0..vertex.children.len() {
            let child = self.shape.child(id, number).map(|edge| PlanChild {
                index: self.plan_node(edge.child, edge.needs, holds_data, tracked, nodes),
                role: edge.role,
            });
            nodes[index].children.push(child);
        }
        index
    }

    /// Sets the lengths that follow from others', from the leaves up. Returns the nodes whose length
    /// changed by it.
    pub(super) fn update_lengths(&self) -> Vec<NodeId> {
        let mut changed = Vec::new();
        for id in self.shape.topmost_first().into_iter().rev() {
            if self.update_length(id) {
                changed.push(id);
            }
        }
        changed
    }

    pub(super) fn update_length(&self, id: NodeId) -> bool {
        let children: Vec<_> = (0..self.shape.vertex(id).children.len())
            .map(|index| {
                let edge = self.shape.child(id, index);
                edge.map_or(0, |edge| self.node(edge.child).state.bytes())
            })
            .collect();
        let bytes = self.io(id).bytes(&children);
        let state = &self.node(id).state;
        match self.shape.vertex(id).kind.kind {
            DriverKind::Protocol => state.follow_bytes(bytes),
            _ => state.set_bytes(bytes),
        }
    }
}
