//! What queries ask of nodes without a change of the graph, so that they wait for none.

use std::rc::Rc;

use super::permission::Permissions;
use super::shape::Parent;
use super::{Control, Graph, NodeId, RootId};
use crate::driver::SnapshotInfo;
use crate::io::RequestKind;

/// An edge, for those who draw the graph with names.
pub struct Line {
    /// Who is above.
    pub from: LineEnd,
    /// The node below.
    pub to: NodeId,
    /// The option that names the node below; `root` for a user from outside.
    pub name: &'static str,
    /// What the parent needs.
    pub needs: Permissions,
    /// What it lets others have.
    pub shares: Permissions,
}

/// Who is above an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LineEnd {
    /// A node.
    Node(NodeId),
    /// A user from outside.
    Root(RootId),
}

impl Graph {
    /// Every edge.
    pub fn lines(&self) -> Vec<Line> {
        let edges = self.shape.edges();
        let line = |edge: &super::shape::Edge| {
            let (from, name) = match edge.parent {
                Parent::Node(id, index) => {
                    let kind = self.shape.vertex(id).kind;
                    (LineEnd::Node(id), kind.children[index].name)
                }
                Parent::Root(id) => (LineEnd::Root(id), "root"),
            };
            Line {
                from,
                to: edge.child,
                name,
                needs: edge.needs,
                shares: edge.shares,
            }
        };
        edges.map(line).collect()
    }

    /// Whether an operator added a node, and may remove it.
    pub fn is_owned(&self, id: NodeId) -> bool {
        self.shape.contains(id) && self.shape.vertex(id).owned
    }

    /// The snapshots inside of a node's image, as far as they can be told now: none while an operation has
    /// its driver.
    pub fn snapshots_now(&self, id: NodeId) -> Vec<SnapshotInfo> {
        let driver = self.nodes.get(&id).map(|node| &node.driver);
        let driver = driver.and_then(super::node::DriverCell::try_take);
        driver.map_or_else(Vec::new, |driver| driver.snapshots())
    }
}

impl Control {
    /// How much space a node takes on its host, in bytes; `None` if that cannot be told.
    pub async fn allocated_bytes(&self, id: NodeId) -> Option<u64> {
        let plan = self.read(|graph| {
            graph.nodes.contains_key(&id).then(|| {
                let view = graph.view();
                // As they were found last: an operation may have the drivers, which would say.
                let limits = graph.nodes.iter().map(|(id, node)| (*id, node.limits));
                view.limits.borrow_mut().extend(limits);
                view.plan(id, Permissions::all(), &view.tracked())
            })
        });
        // Nothing is read or written, so no drained section need know of it.
        let root: Rc<_> = self.unused_root(plan?);
        let request = root.enter(RequestKind::Other, 0, 0).await;
        request.io().allocated_bytes().await.ok().flatten()
    }
}
