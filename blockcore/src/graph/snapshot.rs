//! External snapshots: an overlay is put above a node, which from then on stays as it is.

use std::collections::BTreeSet;

use super::permission::Permissions;
use super::{Control, Graph, NodeId, Operation};
use crate::drain::Scope;
use crate::driver::Role;
use crate::graph::shape::Parent;
use crate::{Error, ErrorKind};

impl Control {
    /// Gives all users of a node an overlay of it instead: what they write goes there, and the node stays
    /// as it is. The overlay's header is left as it is; it has no backing node yet.
    ///
    /// What was written to the node is durable by then: flushes go to the overlay alone.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if one of them is in use in a way that forbids it;
    /// [`ErrorKind::Invalid`] if the overlay cannot be one; else what could not be flushed or recorded.
    /// Everything is as it was.
    pub async fn snapshot(&self, node: &str, overlay: &str) -> Result<(), Error> {
        let mut change = self.begin().await;
        let made = async {
            let (below, above) = self.read(|graph| graph.check_snapshot(node, overlay))?;
            change.drain(Scope::Subtrees(BTreeSet::from([below]))).await;
            if !self.read(|graph| graph.modes(below).read_only) {
                let flushed = change.held_root(below).flush().await;
                flushed.map_err(|error| {
                    let text = format!("node '{node}' cannot be flushed: {error}");
                    Error::new(ErrorKind::Io, text)
                })?;
            }
            change.set_backing(above, Some(below))?;
            change.replace_node(below, above)?;
            Ok(below)
        }
        .await;
        let below = match made {
            Ok(below) => below,
            Err(error) => {
                change.abort().await;
                return Err(error);
            }
        };
        change.prepare().await?.commit().finish().await?;
        if let Err(error) = self.set_read_only(below, true).await {
            tracing::warn!(node, error = %error.report(), "a node below a snapshot stays open for writing");
        }
        Ok(())
    }

    /// Has a node open for reading only, or for writing again, in a change of its own.
    pub(crate) async fn set_read_only(&self, node: NodeId, read_only: bool) -> Result<(), Error> {
        let mut change = self.begin().await;
        if self.read(|graph| graph.node_by_id(node).is_none()) {
            // Gone with whoever used it.
            change.abort().await;
            return Ok(());
        }
        if let Err(error) = change.set_read_only(node, read_only).await {
            change.abort().await;
            return Err(error);
        }
        change.prepare().await?.commit().finish().await
    }
}

impl Graph {
    /// Refuses, in QEMU's words, what cannot be a node and its overlay.
    fn check_snapshot(&self, node: &str, overlay: &str) -> Result<(NodeId, NodeId), Error> {
        let find = |name: &str| {
            self.node(name).map_err(|_| {
                let text = format!("Cannot find device='{name}' nor node-name='{name}'");
                Error::new(ErrorKind::NotFound, text)
            })
        };
        let below = find(node)?.id();
        let mut parents = self.shape.parents(below);
        let overlay_of = parents.find_map(|edge| match edge.parent {
            Parent::Node(id, _) if edge.role.contains(Role::COW) => Some(id),
            _ => None,
        });
        if let Some(other) = overlay_of {
            return Err(Error::busy(format!(
                "Node '{node}' is busy: node is used as backing hd of '{}'",
                self.shape.vertex(other).name
            )));
        }
        self.check_operation(below, Operation::ExternalSnapshot)?;
        let above = find(overlay)?.id();
        let in_use = || Error::busy("The overlay is already in use");
        let needs = self.shape.cumulative(above).needs;
        if needs.contains(Permissions::CONSISTENT_READ) {
            return Err(in_use());
        }
        self.check_operation(above, Operation::ExternalSnapshot)?;
        let kind = self.shape.vertex(above).kind;
        let takes_one = kind
            .children
            .iter()
            .any(|spec| spec.role.contains(Role::COW));
        if !takes_one {
            return Err(Error::invalid(
                "The overlay does not support backing images",
            ));
        }
        if self.backing_of(above).is_some() {
            return Err(Error::invalid("The overlay already has a backing image"));
        }
        if self.shape.parents(above).next().is_some() || above == below {
            return Err(in_use());
        }
        Ok((below, above))
    }
}
