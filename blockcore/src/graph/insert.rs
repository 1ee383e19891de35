//! Nodes that jobs put into the graph and take out again: filters that no operator can add.
//!
//! A filter of a job is put above the node that the job copies from; whoever used that node uses the
//! filter from then on. It is *transient*: what is recorded of an export's tree is without it, so a
//! restart serves the same disk and knows nothing of the job.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use super::node::DriverCell;
use super::permission::Permissions;
use super::shape::Vertex;
use super::{Change, NodeId, RootId};
use crate::dirty_bitmap::BitmapSet;
use crate::driver::{DriverType, Limits, OpenModes, Opened};
use crate::graph::Node;
use crate::io::Root;
use crate::node::NodeState;
use crate::options::Options;
use crate::{Error, ErrorKind};

/// A filter that a job puts in.
pub(crate) struct FilterSpec {
    /// What kind of node; its first child is the one that it filters.
    pub(crate) kind: &'static DriverType,
    /// What it is called; `None`: what no operator's node can be called.
    pub(crate) name: Option<String>,
    /// The node that it is put above.
    pub(crate) above: NodeId,
    /// Its other child, if its kind has one.
    pub(crate) target: Option<NodeId>,
    /// Its two halves.
    pub(crate) opened: Opened,
}

/// Whether an operator may call a node so.
fn is_well_formed(name: &str) -> bool {
    name.len() < 32
        && name.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && name
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter))
}

impl Change {
    /// Puts a filter above a node, and gives it all parents of that node.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] or [`ErrorKind::Exists`] for a name that cannot be had;
    /// [`ErrorKind::Busy`] if a link is frozen; what the graph refuses to let the filter have. The change
    /// is to be given up then.
    pub(crate) async fn insert_filter(&mut self, spec: FilterSpec) -> Result<NodeId, Error> {
        let name = match spec.name {
            None => self.control().make_name(),
            Some(name) if !is_well_formed(&name) => {
                return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
            }
            Some(name) if self.find(&name).is_ok() => {
                let text = format!("Duplicate nodes with node-name='{name}'");
                return Err(Error::new(ErrorKind::Exists, text));
            }
            Some(name) => name,
        };
        let id = NodeId(self.control().read(super::Graph::next_id));
        let name: Arc<str> = name.into();
        let below = self.state().shape.vertex(spec.above).modes;
        let modes = OpenModes {
            unmap: true,
            detect_zeroes: crate::driver::DetectZeroes::Off,
            ..below
        };
        let mut vertex = Vertex::new(Arc::clone(&name), spec.kind, modes);
        vertex.transient = true;
        vertex.implicit = name.starts_with('#');
        self.state_mut().shape.add_node(id, vertex);
        let children = [Some(spec.above), spec.target];
        for (index, child) in children.into_iter().enumerate() {
            if let Some(child) = child {
                let role = spec.kind.children[index].role;
                self.add_child(id, index, role, child)?;
            }
        }
        let notices = Arc::clone(&self.control().notices);
        let node = Node {
            id,
            kind: spec.kind,
            options: Options::default(),
            exact_name: None,
            backing: None,
            backing_opened: None,
            named_opened: BTreeMap::new(),
            driver: DriverCell::new(spec.opened.driver),
            io: spec.opened.io,
            state: NodeState::new(id, Arc::clone(&name), notices),
            limits: Limits::default(),
            bitmaps: BitmapSet::new(Arc::clone(&name), 0),
            name: Arc::clone(&name),
        };
        self.state_mut().add_opened(node);
        let control = self.control().clone();
        let limits = control.read(|graph| {
            self.state().with_view(graph, |view| {
                view.update_length(id);
                view.limits(id)
            })
        });
        let node = self.state_mut().nodes.get_mut(&id).expect("just added");
        node.limits = limits;
        let bytes = node.state.bytes();
        node.bitmaps = BitmapSet::new(name, bytes);
        self.state_mut().shape.replace_node(spec.above, id)?;
        Ok(id)
    }

    /// Takes a job's filter out: its parents get `to` instead, or what it filters now, which need not be
    /// what it was put above: somebody may have put something in between. The job's own use of it ends; that
    /// has been [detached](super::Control::detach).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if a link is frozen.
    pub(crate) fn remove_filter(
        &mut self,
        filter: NodeId,
        root: RootId,
        to: Option<NodeId>,
    ) -> Result<(), Error> {
        let filtered = self.state().shape.child(filter, 0).map(|edge| edge.child);
        let Some(to) = to.or(filtered) else {
            return Err(Error::invalid("a filter has something that it filters"));
        };
        self.state_mut().shape.vertex_mut(filter).keeps_chain_to = None;
        self.replace_node(filter, to)?;
        self.remove_root(root)
    }

    /// Gives a node another backing node, or none.
    ///
    /// # Errors
    ///
    /// As [`set_child`](Self::set_child).
    pub(crate) fn set_backing(
        &mut self,
        node: NodeId,
        backing: Option<NodeId>,
    ) -> Result<(), Error> {
        let kind = self.state().shape.vertex(node).kind;
        let mut children = kind.children.iter();
        let spec = children.find(|spec| spec.role.contains(crate::driver::Role::COW));
        let Some(spec) = spec else {
            return Err(Error::unsupported(format!(
                "images of driver '{}' have no backing image",
                kind.name
            )));
        };
        self.set_child(node, spec.name, backing)
    }

    /// A way to a node that this change has drained: for what a job has left to do there.
    pub(crate) fn held_root(&self, node: NodeId) -> Rc<Root> {
        self.temporary_root(node, Permissions::all())
    }

    /// Notes of the nodes of a chain, from `top` down to the one above `base`, whether what they defer to
    /// is being overwritten with what they hold themselves.
    pub(crate) fn set_being_committed(&mut self, top: NodeId, base: NodeId, committed: bool) {
        let shape = &mut self.state_mut().shape;
        let mut next = Some(top);
        while let Some(id) = next.filter(|id| *id != base) {
            next = shape.next_in_chain(id);
            shape.vertex_mut(id).being_committed = committed;
        }
    }

    /// Lets go of the part of a chain that a node keeps as it is for as long as it is there.
    pub(crate) fn keep_chain_to(&mut self, node: NodeId, base: Option<NodeId>) {
        self.state_mut().shape.vertex_mut(node).keeps_chain_to = base;
    }
}
