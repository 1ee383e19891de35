//! Dirty bitmaps of the graph's nodes: which there are, and which record.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use super::{Control, Graph, NodeId};
use crate::dirty_bitmap::BitmapSet;
use crate::drain::Scope;
use crate::driver::FindBitmap;
use crate::{Error, ErrorKind};

impl Control {
    /// A way to find bitmaps that needs no hold on the graph.
    pub(super) fn find_bitmap(&self) -> FindBitmap {
        let control = self.clone();
        Rc::new(move |node, name| {
            control.read(|graph| {
                let bitmap = graph.node(node)?.bitmaps().get(name)?;
                match bitmap.is_inconsistent() {
                    false => Ok(Arc::clone(bitmap.bits())),
                    true => Err(Error::new(
                        ErrorKind::Corrupt,
                        format!(
                            "bitmap '{name}' of node '{node}' was not stored when the node was last written \
                             to: it means nothing"
                        ),
                    )),
                }
            })
        })
    }

    /// Changes which bitmaps a node has or which of them record, with requests to it held back; none is
    /// in flight that would mark the old ones and not the new.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::NotFound`] if there is no such node; else what `change` says.
    pub async fn change_bitmaps<T>(
        &self,
        node: &str,
        change: impl FnOnce(&mut BitmapSet) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let _turn = self.turns.next().await;
        let id = self.read(|graph| graph.node(node).map(super::Node::id))?;
        let _drained = self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        self.change(|graph| {
            let changed = change(&mut graph.node_mut(id).bitmaps)?;
            graph.replan();
            Ok(changed)
        })
    }

    /// Makes the bitmaps of a node as long as the node is. What was added is marked in those that record:
    /// writes may have gone there since the node became longer.
    pub(super) async fn fit_bitmaps(&self, id: NodeId) {
        let _turn = self.turns.next().await;
        let _drained = self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        self.change(|graph| {
            let Some(node) = graph.nodes.get_mut(&id) else {
                return;
            };
            let bytes = node.state.bytes();
            let covered = node.bitmaps.length();
            match node.bitmaps.resize(bytes) {
                // Whatever was written there before now could not be noted.
                Ok(()) => node.bitmaps.mark(covered, bytes.saturating_sub(covered)),
                Err(error) => {
                    tracing::error!(node = %node.name, error = %error.report(), "bitmaps do not cover the node");
                }
            }
            graph.replan();
        });
    }
}

impl Graph {
    /// Gives every root whose requests would go another way the plan for it. Such roots are drained.
    pub(super) fn replan(&mut self) {
        let view = self.view();
        let tracked = view.tracked();
        let roots = self.shape.roots();
        let plans = roots
            .map(|(id, edge)| (id, view.plan(edge.child, edge.needs, &tracked)))
            .collect();
        self.update_roots(std::collections::BTreeMap::new(), plans);
    }
}
