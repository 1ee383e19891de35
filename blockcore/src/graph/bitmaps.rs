//! Dirty bitmaps of the graph's nodes: which there are, and which record.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use super::permission::Permissions;
use super::{Change, Control, Graph, Node, NodeId};
use crate::dirty_bitmap::{
    BitmapSet, Bits, DirtyBitmap, KeptBitmap, Operation, default_granularity_bytes,
};
use crate::drain::Scope;
use crate::driver::{FindBitmap, OpenModes};
use crate::io::Root;
use crate::{Error, ErrorKind};

/// A dirty bitmap to be added.
#[derive(Clone, Debug)]
pub struct BitmapSpec {
    /// Its name, unique on its node.
    pub name: String,
    /// Bytes of disk per bit; `None`: as [`default_granularity_bytes`] says.
    pub granularity_bytes: Option<u64>,
    /// Whether the image is to keep it.
    pub persistent: bool,
    /// Whether it records.
    pub enabled: bool,
}

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

    /// Adds a clean dirty bitmap to a node. A persistent one is in the image once it has been stored: when
    /// the node is closed, stops writing or is made inactive.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is no such node; [`ErrorKind::Exists`]; [`ErrorKind::Invalid`] for a
    /// name or a granularity that cannot be; for a persistent one also [`ErrorKind::PermissionDenied`] on a
    /// read-only node, and [`ErrorKind::Unsupported`] or [`ErrorKind::NoSpace`] if the image cannot keep it.
    pub async fn add_bitmap(&self, node: &str, spec: &BitmapSpec) -> Result<(), Error> {
        let _turn = self.turns.next().await;
        let (id, cluster_bytes) = self.read(|graph| {
            let node = graph.node(node)?;
            let cluster_bytes = node.io().info().cluster_bytes;
            Ok::<_, Error>((node.id(), Some(cluster_bytes).filter(|bytes| *bytes > 0)))
        })?;
        let default = default_granularity_bytes(cluster_bytes);
        let granularity_bytes = spec.granularity_bytes.unwrap_or(default);
        let _drained = self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        self.change(|graph| {
            let modes = graph.modes(id);
            let node = graph.node_mut(id);
            let (name, length) = (Arc::clone(&node.name), node.bitmaps.length());
            let mut bitmap = DirtyBitmap::new(name, &spec.name, length, granularity_bytes)?;
            if !spec.enabled {
                bitmap.disable()?;
            }
            bitmap.set_persistent(spec.persistent);
            let is_there = node.bitmaps.get(&spec.name).is_ok();
            if spec.persistent && !is_there {
                node.check_can_keep(modes, &bitmap)?;
            }
            node.bitmaps.insert(bitmap)?;
            graph.replan();
            Ok(())
        })
    }

    /// Removes a dirty bitmap from a node, and from the image if that keeps it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; as [`DirtyBitmap::check`] says for [`Operation::Remove`]; what could not be
    /// written: the bitmap is there still.
    pub async fn remove_bitmap(&self, node: &str, name: &str) -> Result<(), Error> {
        let _turn = self.turns.next().await;
        let (id, persistent) = self.read(|graph| {
            let node = graph.node(node)?;
            let bitmap = node.bitmaps().get(name)?;
            bitmap.check(Operation::Remove)?;
            Ok::<_, Error>((node.id(), bitmap.is_persistent()))
        })?;
        let _drained = self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        if persistent {
            let root = self.bitmap_root(id);
            let driver = self.read(|graph| graph.nodes[&id].driver.clone());
            driver.take().remove_bitmap(root, name).await?;
        }
        self.change(|graph| {
            graph.node_mut(id).bitmaps.remove(name)?;
            graph.replan();
            Ok(())
        })
    }

    /// Marks in bitmap `target` of a node what any of the sources has marked, each given by the name of its
    /// node and its own; in all of it or, on an error, in none.
    ///
    /// # Errors
    ///
    /// As [`DirtyBitmap::merge`]; [`ErrorKind::NotFound`]; what kept the image from saying that what it
    /// keeps is not up to date.
    pub async fn merge_bitmaps(
        &self,
        node: &str,
        target: &str,
        sources: &[(String, String)],
    ) -> Result<(), Error> {
        let _turn = self.turns.next().await;
        let id = self.read(|graph| graph.node(node).map(Node::id))?;
        let _drained = self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        self.use_bitmaps(id).await?;
        self.read(|graph| {
            let find = |(node, name): &(String, String)| graph.node(node)?.bitmaps().get(name);
            let found: Vec<&DirtyBitmap> = sources.iter().map(find).collect::<Result<_, _>>()?;
            graph.nodes[&id].bitmaps.get(target)?.merge(&found)
        })
    }

    /// Has a drained node's image say that the bitmaps that it keeps are not up to date, if it keeps some.
    async fn use_bitmaps(&self, id: NodeId) -> Result<(), Error> {
        let keeps = self.read(|graph| {
            let modes = graph.modes(id);
            let is_written = !modes.read_only && !modes.inactive;
            is_written && graph.nodes[&id].bitmaps.has_persistent()
        });
        if !keeps {
            return Ok(());
        }
        let root = self.bitmap_root(id);
        let driver = self.read(|graph| graph.nodes[&id].driver.clone());
        driver.take().use_bitmaps(root).await
    }

    /// A way to a node that is drained, for its driver.
    fn bitmap_root(&self, id: NodeId) -> Rc<Root> {
        let plan = self.read(|graph| {
            let view = graph.view();
            view.plan(id, Permissions::all(), &view.tracked())
        });
        self.unused_root(plan)
    }

    /// Changes which bitmaps a node has or which of them record, with requests to it held back; none is
    /// in flight that would mark the old ones and not the new. A persistent one that is new or goes is for
    /// [`add_bitmap`](Self::add_bitmap) and [`remove_bitmap`](Self::remove_bitmap).
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::NotFound`] if there is no such node; else what `change` says, or what kept the
    /// image from saying that what it keeps is not up to date.
    pub async fn change_bitmaps<T>(
        &self,
        node: &str,
        change: impl FnOnce(&mut BitmapSet) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let _turn = self.turns.next().await;
        let id = self.read(|graph| graph.node(node).map(super::Node::id))?;
        let _drained = self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        self.use_bitmaps(id).await?;
        self.change(|graph| {
            let changed = change(&mut graph.node_mut(id).bitmaps)?;
            graph.replan();
            Ok(changed)
        })
    }

    /// Takes a bitmap for `user` (`export 'nbd0'`), who reads its bits while it goes on recording: until
    /// [`release_bitmap`](Self::release_bitmap) nobody changes it otherwise.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; as [`DirtyBitmap::check`] says for [`Operation::Use`].
    pub fn hold_bitmap(&self, node: &str, name: &str, user: &str) -> Result<Arc<Bits>, Error> {
        self.change(|graph| {
            let id = graph.node(node)?.id();
            let bitmap = graph.node_mut(id).bitmaps.get_mut(name)?;
            bitmap.hold(user)?;
            Ok(Arc::clone(bitmap.bits()))
        })
    }

    /// Gives up a bitmap that was [taken](Self::hold_bitmap). One that has gone with its node is none.
    pub fn release_bitmap(&self, node: &str, name: &str) {
        self.change(|graph| {
            let Ok(id) = graph.node(node).map(Node::id) else {
                return;
            };
            if let Ok(bitmap) = graph.node_mut(id).bitmaps.get_mut(name) {
                bitmap.release();
            }
        });
    }

    /// Makes the bitmaps of a node as long as the node is. It is drained; something `may_be_written` to it since
    /// it has another length, or nothing is.
    pub(super) fn fit_drained_bitmaps(&self, id: NodeId, may_be_written: bool) {
        self.change(|graph| {
            if graph.node_mut(id).fit_bitmaps(may_be_written) {
                graph.replan();
            }
        });
    }

    /// The persistent bitmaps of a node that is drained, as they are now; none of one that is not in the
    /// graph yet, which has changed none.
    pub(super) fn bitmaps_to_store(&self, id: NodeId) -> Vec<KeptBitmap> {
        self.change(|graph| {
            let Some(node) = graph.nodes.get_mut(&id) else {
                return Vec::new();
            };
            // Somebody may be about to tell that it has another length.
            if node.bitmaps.has_persistent() && node.fit_bitmaps(true) {
                graph.replan();
            }
            graph.nodes[&id].bitmaps.kept()
        })
    }

    /// Makes the bitmaps of a node as long as the node is. What was added is marked in those that record:
    /// writes may have gone there since the node became longer.
    pub(super) async fn fit_bitmaps(&self, id: NodeId) {
        let _turn = self.turns.next().await;
        let _drained = self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        self.change(|graph| {
            let node = graph.nodes.get_mut(&id);
            if node.is_some_and(|node| node.fit_bitmaps(true)) {
                graph.replan();
            }
        });
    }
}

impl Node {
    /// Makes its bitmaps as long as it is, if they are not; says so: another plan is needed. What was added
    /// is marked in those that record, if something `may_be_written` there already and could not be noted.
    fn fit_bitmaps(&mut self, may_be_written: bool) -> bool {
        let (bytes, covered) = (self.state.bytes(), self.bitmaps.length());
        if bytes == covered {
            return false;
        }
        if let Err(error) = self.bitmaps.resize(bytes) {
            tracing::error!(node = %self.name, error = %error.report(), "bitmaps do not cover the node");
            return false;
        }
        if may_be_written {
            self.bitmaps.mark(covered, bytes.saturating_sub(covered));
        }
        true
    }

    /// Has the driver store the persistent bitmaps of a node that is open with these modes, and drained.
    pub(super) async fn store_bitmaps(
        &mut self,
        modes: OpenModes,
        root: &Rc<Root>,
    ) -> Result<(), Error> {
        if modes.read_only || modes.inactive || !self.bitmaps.has_persistent() {
            return Ok(());
        }
        self.fit_bitmaps(true);
        let kept = self.bitmaps.kept();
        self.driver
            .take()
            .store_bitmaps(Rc::clone(root), kept)
            .await
    }

    /// Whether the image could keep a bitmap that there is not yet.
    fn check_can_keep(&self, modes: OpenModes, bitmap: &DirtyBitmap) -> Result<(), Error> {
        let (name, node) = (bitmap.name(), &self.name);
        if modes.read_only || modes.inactive {
            let text = format!(
                "cannot keep bitmap '{name}' in the image of node '{node}': it is open read-only"
            );
            return Err(Error::new(ErrorKind::PermissionDenied, text));
        }
        // It may be about to have as many that are not stored yet.
        let kept = self.bitmaps.kept();
        let checked = self.driver.take().check_new_bitmap(&kept, &bitmap.kept());
        checked.map_err(|error| {
            let text =
                format!("cannot keep bitmap '{name}' in the image of node '{node}': {error}");
            Error::new(error.kind(), text)
        })
    }
}

impl Change {
    /// Has a node's driver store the persistent bitmaps. The node is drained, and may be written to.
    pub(super) async fn store_bitmaps(&self, id: NodeId, root: &Rc<Root>) -> Result<(), Error> {
        let kept = self.control().bitmaps_to_store(id);
        if kept.is_empty() {
            return Ok(());
        }
        let driver = self.driver_of(id);
        driver.take().store_bitmaps(Rc::clone(root), kept).await
    }
}

impl Graph {
    /// Whether images like this node's can keep bitmaps.
    pub fn keeps_bitmaps(&self, node: NodeId) -> bool {
        let driver = self.nodes[&node].driver.try_take();
        driver.is_some_and(|driver| driver.keeps_bitmaps())
    }

    /// Takes over bitmaps that drivers have read anew, and what nodes may be written to now. Whoever has a
    /// plan needs another if this says so.
    pub(super) fn update_bitmaps(&mut self) -> bool {
        let mut reloaded = false;
        for (id, node) in &mut self.nodes {
            let modes = self.shape.vertex(*id).modes;
            let read_only = modes.read_only || modes.inactive;
            let kept = node.driver.take().take_bitmaps();
            if let Some(kept) = kept {
                node.bitmaps.load(kept, node.state.bytes(), read_only);
                reloaded = true;
            }
            node.bitmaps.set_read_only(read_only);
        }
        reloaded
    }

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
