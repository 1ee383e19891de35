//! Roots: who uses a node from outside the graph, and on which workers.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use futures_channel::oneshot;

use super::permission::Permissions;
use super::{Control, ExportState, NodeId, RootId};
use crate::driver::Role;
use crate::io::{ContextHandle, Plan, Root};
use crate::{Error, ErrorKind};

/// A use of a node from outside the graph.
#[derive(Clone)]
pub struct RootSpec {
    /// Who it is, for messages: `export 'vda'`.
    pub who: String,
    /// What it needs.
    pub needs: Permissions,
    /// What it lets others have.
    pub shares: Permissions,
    /// Its requests come in multiples of this many bytes, a power of two. With 1 every request may have
    /// to be widened.
    pub unit_bytes: u32,
    /// Stays with its node when another takes the node's place.
    pub stays: bool,
    /// Who is told what happens to the node.
    pub user: Option<Rc<dyn RootUser>>,
    /// Where the tree below is recorded before it changes; `None`: nowhere.
    pub state: Option<Rc<ExportState>>,
}

/// What a root's user is told. Called on the control thread, outside of any change.
pub trait RootUser {
    /// The node has another length, in bytes.
    fn resized(&self, bytes: u64) {
        let _ = bytes;
    }
}

impl RootSpec {
    /// Somebody who reads, and bears that others read and change the length.
    pub fn reader(who: impl Into<String>) -> Self {
        Self {
            who: who.into(),
            needs: Permissions::CONSISTENT_READ,
            shares: Permissions::all() - Permissions::WRITE,
            unit_bytes: 1,
            stays: false,
            user: None,
            state: None,
        }
    }

    /// Somebody who reads and writes, and bears what a [`reader`](Self::reader) does.
    pub fn writer(who: impl Into<String>) -> Self {
        Self {
            needs: Permissions::CONSISTENT_READ | Permissions::WRITE,
            ..Self::reader(who)
        }
    }

    /// With requests in multiples of `bytes`.
    #[must_use]
    pub fn in_units_of(self, bytes: u32) -> Self {
        Self {
            unit_bytes: bytes,
            ..self
        }
    }

    pub(super) fn role() -> Role {
        Role::FILTERED | Role::PRIMARY
    }
}

/// A root as the control thread has it.
pub(super) struct RootRecord {
    pub(super) plan: Arc<Plan>,
    /// Where it is attached.
    pub(super) contexts: Vec<ContextHandle>,
    pub(super) user: Option<Rc<dyn RootUser>>,
    pub(super) state: Option<Rc<ExportState>>,
}

impl Control {
    /// Makes a root usable on the worker of `context`, where [`IoContext::root`] finds it once this is
    /// over. A root that a drained section holds begins held.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if the root or the worker is gone.
    ///
    /// [`IoContext::root`]: crate::io::IoContext::root
    pub async fn attach(&self, id: RootId, context: &ContextHandle) -> Result<(), Error> {
        let (reply, attached) = oneshot::channel();
        self.change(|graph| {
            let held = graph.held.roots.contains(&id);
            let root = graph.roots.get_mut(&id).ok_or_else(|| gone("root"))?;
            let plan = Arc::clone(&root.plan);
            root.contexts.push(context.clone());
            // Posted with the graph as it is: what is posted to the root later finds it there.
            context.post(move |context| {
                context.add_root(Root::new(id, Rc::clone(context), plan, held));
                let _ = reply.send(());
            });
            Ok(())
        })?;
        attached.await.map_err(|_| gone("worker"))
    }

    /// Ends a root's use on the worker of `context`, once nothing of it is in flight there.
    pub async fn detach(&self, id: RootId, context: &ContextHandle) {
        let (reply, quiet) = oneshot::channel();
        context.post(move |context| {
            if let Some(root) = context.root(id) {
                root.leave();
                root.when_quiet(reply);
            }
        });
        // A worker that is gone has nothing in flight.
        let _ = quiet.await;
        context.post(move |context| context.remove_root(id));
        self.change(|graph| {
            if let Some(root) = graph.roots.get_mut(&id) {
                let place = root
                    .contexts
                    .iter()
                    .position(|other| other.is_same(context));
                if let Some(place) = place {
                    root.contexts.swap_remove(place);
                }
            }
        });
    }

    /// A root on the control thread's own context, attached if it is not there yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if the root is gone.
    pub fn root_here(&self, id: RootId) -> Result<Rc<Root>, Error> {
        if let Some(root) = self.context.root(id) {
            return Ok(root);
        }
        self.change(|graph| {
            let held = graph.held.roots.contains(&id);
            let record = graph.roots.get_mut(&id).ok_or_else(|| gone("root"))?;
            record.contexts.push(self.context.handle().clone());
            let plan = Arc::clone(&record.plan);
            let root = Root::new(id, Rc::clone(&self.context), plan, held);
            self.context.add_root(Rc::clone(&root));
            Ok(root)
        })
    }

    /// A root without a user, called [`RootId::default`], which no drained section holds: for what a
    /// change does to a node while nothing of a user's is in flight there.
    pub(super) fn unused_root(&self, plan: Arc<Plan>) -> Rc<Root> {
        Root::new(RootId::default(), Rc::clone(&self.context), plan, false)
    }

    /// The node that a root uses, now.
    pub fn node_of(&self, id: RootId) -> Option<NodeId> {
        self.read(|graph| graph.shape.root(id).map(|edge| edge.child))
    }

    /// Uses a node, in a change of its own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] that names who holds what;
    /// [`ErrorKind::PermissionDenied`] if the node is read-only and would be written to.
    pub async fn add_root(&self, node: &str, spec: RootSpec) -> Result<RootId, Error> {
        let mut change = self.begin().await;
        let node = change.find(node)?;
        let root = change.add_root(node, spec)?;
        change.prepare().await?.commit().finish().await?;
        Ok(root)
    }

    /// Ends the use of a node: on every worker once nothing is in flight there, then in the graph.
    ///
    /// # Errors
    ///
    /// What a node that went with it could not write back.
    pub async fn remove_root(&self, id: RootId) -> Result<(), Error> {
        let contexts = self.read(|graph| {
            let root = graph.roots.get(&id);
            root.map_or_else(Vec::new, |root| root.contexts.clone())
        });
        for context in contexts {
            self.detach(id, &context).await;
        }
        let mut change = self.begin().await;
        change.remove_root(id)?;
        change.prepare().await?.commit().finish().await
    }
}

fn gone(what: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the {what} is gone"))
}

impl super::Graph {
    pub(crate) fn root_ids(&self) -> impl Iterator<Item = RootId> + '_ {
        self.roots.keys().copied()
    }

    pub(crate) fn roots_above(&self, nodes: &BTreeSet<NodeId>) -> BTreeSet<RootId> {
        self.shape.roots_above(nodes)
    }

    pub(crate) fn below(&self, nodes: impl IntoIterator<Item = NodeId>) -> BTreeSet<NodeId> {
        self.shape.below(nodes)
    }

    pub(crate) fn node_of_root(&self, id: RootId) -> Option<NodeId> {
        self.shape.root(id).map(|edge| edge.child)
    }

    /// Who uses a root, for messages.
    pub(crate) fn who_is(&self, id: RootId) -> String {
        let edge = self.shape.root(id);
        edge.map_or_else(String::new, |edge| edge.who.to_string())
    }

    pub(crate) fn root_contexts(&self, id: RootId) -> &[ContextHandle] {
        self.roots.get(&id).map_or(&[], |root| &root.contexts)
    }
}
