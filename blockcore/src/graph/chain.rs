//! Chains: a node, what it filters or defers to, and so on down.

use super::shape::Shape;
use super::{Change, Graph, NodeId};
use crate::Error;
use crate::driver::{DriverKind, Role};

impl Graph {
    /// The next node below: what a filter filters, or the backing node; never both.
    pub fn next_in_chain(&self, node: NodeId) -> Option<NodeId> {
        self.shape.next_in_chain(node)
    }

    /// The child that a node defers to; `None` for filters.
    pub fn backing_of(&self, node: NodeId) -> Option<NodeId> {
        Some(self.shape.child_with(node, Role::COW)?.child)
    }

    /// The child that a filter passes through.
    pub fn filtered_by(&self, node: NodeId) -> Option<NodeId> {
        let kind = self.shape.vertex(node).kind.kind;
        let filtered = self.shape.child_with(node, Role::FILTERED)?;
        (kind == DriverKind::Filter).then_some(filtered.child)
    }

    /// The child that names a node.
    pub fn primary_child(&self, node: NodeId) -> Option<NodeId> {
        Some(self.shape.child_with(node, Role::PRIMARY)?.child)
    }

    /// A node and all below it along the chain.
    pub fn chain(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(node), |node| self.next_in_chain(*node))
    }

    /// The first node of a chain that is no filter.
    pub fn skip_filters(&self, node: NodeId) -> NodeId {
        self.skip(node, |shape, id| {
            shape.vertex(id).kind.kind == DriverKind::Filter
        })
    }

    /// The first node of a chain that the core has not inserted by itself.
    pub fn skip_implicit(&self, node: NodeId) -> NodeId {
        self.skip(node, |shape, id| shape.vertex(id).implicit)
    }

    fn skip(&self, node: NodeId, passes: impl Fn(&Shape, NodeId) -> bool) -> NodeId {
        let mut chain = self.chain(node);
        chain
            .find(|id| !passes(&self.shape, *id) || self.next_in_chain(*id).is_none())
            .unwrap_or(node)
    }

    /// The next node that is no filter below one; `None` at the end.
    pub fn backing_chain_next(&self, node: NodeId) -> Option<NodeId> {
        let bottom = self.skip_filters(node);
        Some(self.skip_filters(self.next_in_chain(bottom)?))
    }

    /// The node directly above `node`, filters skipped, in the chain of `active`; `None` if they are the
    /// same or `node` is not in it.
    pub fn overlay_of(&self, active: NodeId, node: NodeId) -> Option<NodeId> {
        let node = self.skip_filters(node);
        let active = self.skip_filters(active);
        let mut layers = std::iter::successors(Some(active), |id| self.backing_chain_next(*id));
        layers.find(|id| self.backing_chain_next(*id) == Some(node))
    }

    /// The last node of a chain.
    pub fn base_of(&self, node: NodeId) -> NodeId {
        let mut layers = std::iter::successors(Some(node), |id| self.backing_chain_next(*id));
        let mut last = node;
        for layer in layers.by_ref() {
            last = layer;
        }
        last
    }

    /// Whether `below` is in the chain of `node`, filters included.
    pub fn chain_contains(&self, node: NodeId, below: NodeId) -> bool {
        self.chain(node).any(|id| id == below)
    }

    /// Whether everything of a freshly made image like this node's is sure to read as zeroes. A filter is
    /// what it filters; an overlay is not, nor is a node that an operation has just now.
    pub fn has_zero_init(&self, node: NodeId) -> bool {
        if let Some(filtered) = self.filtered_by(node) {
            return self.has_zero_init(filtered);
        }
        if self.backing_of(node).is_some() {
            return false;
        }
        let driver = self.nodes[&node].driver.try_take();
        driver.is_some_and(|driver| driver.has_zero_init())
    }

    /// How many backing links there are below a node.
    pub fn chain_depth(&self, node: NodeId) -> usize {
        std::iter::successors(Some(node), |id| self.backing_chain_next(*id)).count() - 1
    }
}

impl Change {
    /// Holds the links of a chain from `node` down to `base` (to its end without one) as they are: none
    /// can be replaced or cut until [`thaw_chain`](Self::thaw_chain).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if one is frozen already; [`ErrorKind::NotFound`] if `base` is not below.
    ///
    /// [`ErrorKind::Busy`]: crate::ErrorKind::Busy
    /// [`ErrorKind::NotFound`]: crate::ErrorKind::NotFound
    pub fn freeze_chain(&mut self, node: NodeId, base: Option<NodeId>) -> Result<(), Error> {
        let shape = &mut self.state_mut().shape;
        let links = shape.links(node, base)?;
        for link in &links {
            let edge = shape.edge(*link);
            if edge.frozen > 0 {
                return Err(Error::busy(format!(
                    "cannot freeze the link from {} to node '{}': it is frozen already",
                    shape.who(edge),
                    shape.vertex(edge.child).name
                )));
            }
        }
        for link in links {
            shape.edge_mut(link).frozen += 1;
        }
        Ok(())
    }

    /// Ends what [`freeze_chain`](Self::freeze_chain) began, for the same two nodes.
    pub fn thaw_chain(&mut self, node: NodeId, base: Option<NodeId>) {
        let shape = &mut self.state_mut().shape;
        for link in shape.links(node, base).unwrap_or_default() {
            let edge = shape.edge_mut(link);
            debug_assert!(edge.frozen > 0, "thawed as often as frozen");
            edge.frozen = edge.frozen.saturating_sub(1);
        }
    }
}
