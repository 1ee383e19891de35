//! Operation blockers: who does not want what done to a node, and why.

use std::collections::BTreeMap;

use super::{Control, Graph, NodeId};
use crate::Error;

/// What may be done to a node, and blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// Be copied by a backup.
    BackupSource,
    /// Receive a backup.
    BackupTarget,
    /// Be committed down.
    CommitSource,
    /// Receive a commit.
    CommitTarget,
    /// Have a snapshot put on top.
    ExternalSnapshot,
    /// Have a snapshot taken inside.
    InternalSnapshot,
    /// Have an inner snapshot deleted.
    InternalSnapshotDelete,
    /// Be mirrored.
    MirrorSource,
    /// Receive a mirror.
    MirrorTarget,
    /// Be put in the place of another node.
    Replace,
    /// Change its length.
    Resize,
    /// Receive its backing node's data.
    Stream,
    /// Be changed by another process while it is inactive here.
    Inactivate,
}

impl Operation {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::BackupSource,
        Self::BackupTarget,
        Self::CommitSource,
        Self::CommitTarget,
        Self::ExternalSnapshot,
        Self::InternalSnapshot,
        Self::InternalSnapshotDelete,
        Self::MirrorSource,
        Self::MirrorTarget,
        Self::Replace,
        Self::Resize,
        Self::Stream,
        Self::Inactivate,
    ];
}

/// Names one blocker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockerId(u64);

#[derive(Default)]
pub(super) struct Blockers {
    /// By node, operation and order.
    reasons: BTreeMap<(NodeId, Operation, BlockerId), String>,
}

impl Graph {
    /// Whether nobody blocks an operation on a node.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Busy`] with the first who does, and why.
    pub fn check_operation(&self, node: NodeId, operation: Operation) -> Result<(), Error> {
        let all = (node, operation, BlockerId(0))..=(node, operation, BlockerId(u64::MAX));
        let Some((_, why)) = self.blockers.reasons.range(all).next() else {
            return Ok(());
        };
        let name = self.nodes.get(&node).map_or("", |node| &node.name);
        Err(Error::busy(format!("node '{name}' is busy: {why}")))
    }
}

impl Control {
    /// Blocks operations on a node until [`unblock`](Self::unblock); `why` names who and for what, as
    /// in `block device is in use by job 'commit0'`.
    pub fn block(&self, node: NodeId, operations: &[Operation], why: &str) -> BlockerId {
        self.change(|graph| {
            let id = BlockerId(graph.next_id());
            for operation in operations {
                let key = (node, *operation, id);
                graph.blockers.reasons.insert(key, why.to_owned());
            }
            id
        })
    }

    /// Ends what [`block`](Self::block) began, on every node.
    pub fn unblock(&self, id: BlockerId) {
        self.change(|graph| graph.blockers.reasons.retain(|key, _| key.2 != id));
    }
}

impl super::Change {
    /// Lets another blocker's node go with the change: for nodes that are taken out.
    pub(super) fn check_unblocked(graph: &Graph, node: NodeId) -> Result<(), Error> {
        let mut reasons = graph.blockers.reasons.iter();
        match reasons.find(|((blocked, ..), _)| *blocked == node) {
            None => Ok(()),
            Some((_, why)) => {
                let name = graph.nodes.get(&node).map_or("", |node| &node.name);
                Err(Error::busy(format!("node '{name}' is busy: {why}")))
            }
        }
    }
}
