//! [`Shape`]: which nodes there are, who is whose child, and who may do what. Pure.
//!
//! A change of the graph works on a copy of the shape; what is refused leaves the graph as it was.
//! Permissions are worked out anew for the whole copy: from the roots down, each node gets what all its
//! parents need together and what all of them share, and asks its own children accordingly.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::permission::Permissions;
use super::{EdgeId, NodeId, RootId};
use crate::driver::{ChildPermissions, ChildQuery, DriverKind, DriverType, OpenModes, Role};
use crate::fault::{self, Fault};
use crate::{Error, ErrorKind};

/// See the module's header.
#[derive(Clone, Default)]
pub(crate) struct Shape {
    nodes: BTreeMap<NodeId, Vertex>,
    edges: BTreeMap<EdgeId, Edge>,
    roots: BTreeMap<RootId, EdgeId>,
}

/// A node, without its driver.
#[derive(Clone)]
pub(crate) struct Vertex {
    pub(crate) name: Arc<str>,
    pub(crate) kind: &'static DriverType,
    pub(crate) modes: OpenModes,
    /// Inserted by the core itself, and hidden from those who ask for the operator's graph.
    pub(crate) implicit: bool,
    /// Its format was guessed.
    pub(crate) probed: bool,
    /// Put in by a job for as long as it runs: no part of what is recorded of an export's tree.
    pub(crate) transient: bool,
    /// What it defers to its backing node for is being overwritten there with what it holds itself, which
    /// changes nothing that can be read through it.
    pub(crate) being_committed: bool,
    /// The operator holds it by name: it stays when nobody uses it.
    pub(crate) owned: bool,
    /// The links of its chain down to there stay as they are.
    pub(crate) keeps_chain_to: Option<NodeId>,
    /// By the driver's index.
    pub(crate) children: Vec<Option<EdgeId>>,
    parents: Vec<EdgeId>,
}

impl Vertex {
    pub(crate) fn new(name: Arc<str>, kind: &'static DriverType, modes: OpenModes) -> Self {
        Self {
            name,
            kind,
            modes,
            implicit: false,
            probed: false,
            transient: false,
            being_committed: false,
            owned: false,
            keeps_chain_to: None,
            children: vec![None; kind.children.len()],
            parents: Vec::new(),
        }
    }

    fn may_write(&self) -> bool {
        !self.modes.read_only && !self.modes.inactive
    }
}

/// Who is at the upper end of an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// A node, with the driver's index of the child.
    Node(NodeId, usize),
    /// Somebody outside the graph.
    Root(RootId),
}

/// A parent's hold on a child.
#[derive(Clone)]
pub(crate) struct Edge {
    pub(crate) parent: Parent,
    pub(crate) child: NodeId,
    pub(crate) role: Role,
    pub(crate) needs: Permissions,
    pub(crate) shares: Permissions,
    /// Who it is, if it is not a node: `export 'vda'`.
    pub(crate) who: Arc<str>,
    /// How many hold it as it is: it can be neither replaced nor cut.
    pub(crate) frozen: u32,
    /// Stays with its child when that is replaced.
    pub(crate) stays: bool,
}

/// What all parents of a node need and share together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cumulative {
    pub(crate) needs: Permissions,
    pub(crate) shares: Permissions,
}

impl Shape {
    pub(crate) fn vertex(&self, id: NodeId) -> &Vertex {
        &self.nodes[&id]
    }

    pub(crate) fn vertex_mut(&mut self, id: NodeId) -> &mut Vertex {
        self.nodes.get_mut(&id).expect("a node of this shape")
    }

    pub(crate) fn contains(&self, id: NodeId) -> bool {
        self.nodes.contains_key(&id)
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = (NodeId, &Vertex)> {
        self.nodes.iter().map(|(id, vertex)| (*id, vertex))
    }

    pub(crate) fn edges(&self) -> impl Iterator<Item = &Edge> {
        self.edges.values()
    }

    pub(crate) fn roots(&self) -> impl Iterator<Item = (RootId, &Edge)> {
        let edge = |(id, edge): (&RootId, &EdgeId)| (*id, &self.edges[edge]);
        self.roots.iter().map(edge)
    }

    pub(crate) fn root(&self, id: RootId) -> Option<&Edge> {
        Some(&self.edges[self.roots.get(&id)?])
    }

    pub(crate) fn edge(&self, id: EdgeId) -> &Edge {
        &self.edges[&id]
    }

    pub(crate) fn edge_mut(&mut self, id: EdgeId) -> &mut Edge {
        self.edges.get_mut(&id).expect("an edge of this shape")
    }

    pub(crate) fn root_edge(&self, id: RootId) -> Option<EdgeId> {
        self.roots.get(&id).copied()
    }

    /// The edge to the child at `index`, if there is one.
    pub(crate) fn child(&self, id: NodeId, index: usize) -> Option<&Edge> {
        let edge = (*self.vertex(id).children.get(index)?)?;
        Some(&self.edges[&edge])
    }

    /// The children, with the driver's index of each.
    pub(crate) fn children(&self, id: NodeId) -> impl Iterator<Item = (usize, &Edge)> {
        let edges = self.vertex(id).children.iter().enumerate();
        edges.filter_map(|(index, edge)| Some((index, &self.edges[edge.as_ref()?])))
    }

    pub(crate) fn parents(&self, id: NodeId) -> impl Iterator<Item = &Edge> {
        let parents = self.vertex(id).parents.iter();
        parents.map(|edge| &self.edges[edge])
    }

    /// The child with one of these roles.
    pub(crate) fn child_with(&self, id: NodeId, role: Role) -> Option<&Edge> {
        let mut children = self.children(id).map(|(_, edge)| edge);
        children.find(|edge| edge.role.intersects(role))
    }

    /// The next node of the chain below a node: what it filters, or its backing node.
    pub(crate) fn next_in_chain(&self, id: NodeId) -> Option<NodeId> {
        Some(self.edge(self.link(id)?).child)
    }

    /// The edge to it. A format that passes its child through as it is, like `raw`, ends a chain all the
    /// same.
    pub(crate) fn link(&self, id: NodeId) -> Option<EdgeId> {
        let vertex = self.vertex(id);
        let role = match vertex.kind.kind {
            DriverKind::Filter => Role::FILTERED | Role::COW,
            _ => Role::COW,
        };
        let mut children = vertex.children.iter().flatten();
        children
            .find(|edge| self.edge(**edge).role.intersects(role))
            .copied()
    }

    /// The edges of a chain from `node` down to `base`, or to its end without one.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if `base` is not below.
    pub(crate) fn links(&self, node: NodeId, base: Option<NodeId>) -> Result<Vec<EdgeId>, Error> {
        let mut links = Vec::new();
        let mut at = node;
        while Some(at) != base {
            let Some(link) = self.link(at) else {
                let Some(base) = base else { break };
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!(
                        "node '{}' is not below node '{}'",
                        self.vertex(base).name,
                        self.vertex(node).name
                    ),
                ));
            };
            links.push(link);
            at = self.edge(link).child;
        }
        Ok(links)
    }

    /// The node that keeps an edge as it is, if there is one.
    fn keeper(&self, id: EdgeId) -> Option<&Vertex> {
        let mut nodes = self.nodes.iter();
        let keeper = nodes.find(|(top, vertex)| {
            let base = vertex.keeps_chain_to;
            let links = base.map(|base| self.links(**top, Some(base)));
            links.is_some_and(|links| links.is_ok_and(|links| links.contains(&id)))
        });
        keeper.map(|(_, vertex)| vertex)
    }

    /// Who a parent is, for messages.
    pub(crate) fn who(&self, edge: &Edge) -> String {
        match edge.parent {
            Parent::Node(id, _) => format!("node '{}'", self.vertex(id).name),
            Parent::Root(_) => edge.who.to_string(),
        }
    }

    pub(crate) fn add_node(&mut self, id: NodeId, vertex: Vertex) {
        self.nodes.insert(id, vertex);
    }

    /// Adds an edge. What it needs is worked out later, for a node's; given, for a root's.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the parent would be below itself.
    pub(crate) fn attach(&mut self, id: EdgeId, edge: Edge) -> Result<(), Error> {
        match edge.parent {
            Parent::Node(parent, index) => {
                if self.reaches(edge.child, parent) {
                    return Err(self.loop_refused(parent, edge.child));
                }
                self.vertex_mut(parent).children[index] = Some(id);
            }
            Parent::Root(root) => {
                self.roots.insert(root, id);
            }
        }
        self.vertex_mut(edge.child).parents.push(id);
        self.edges.insert(id, edge);
        Ok(())
    }

    fn loop_refused(&self, parent: NodeId, child: NodeId) -> Error {
        Error::invalid(format!(
            "cannot make node '{}' a child of '{}', which is below it already: a loop",
            self.vertex(child).name,
            self.vertex(parent).name
        ))
    }

    fn check_thawed(&self, id: EdgeId) -> Result<(), Error> {
        let edge = self.edge(id);
        let holder = match (edge.frozen, self.keeper(id)) {
            (0, None) => return Ok(()),
            (0, Some(keeper)) => format!("node '{}'", keeper.name),
            _ => "a job or another operation".to_owned(),
        };
        Err(Error::busy(format!(
            "cannot change the link from {} to node '{}': it is frozen by {holder} that relies on it",
            self.who(edge),
            self.vertex(edge.child).name
        )))
    }

    /// Cuts an edge.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if it is frozen.
    pub(crate) fn detach(&mut self, id: EdgeId) -> Result<(), Error> {
        self.check_thawed(id)?;
        self.cut(id);
        Ok(())
    }

    fn cut(&mut self, id: EdgeId) {
        let edge = self.edges.remove(&id).expect("an edge of this shape");
        match edge.parent {
            Parent::Node(parent, index) => {
                if let Some(parent) = self.nodes.get_mut(&parent) {
                    parent.children[index] = None;
                }
            }
            Parent::Root(root) => {
                self.roots.remove(&root);
            }
        }
        let parents = &mut self.vertex_mut(edge.child).parents;
        parents.retain(|other| *other != id);
    }

    /// Gives an edge another child.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if it is frozen, [`ErrorKind::Invalid`] if the parent would be below itself.
    pub(crate) fn replace_child(&mut self, id: EdgeId, to: NodeId) -> Result<(), Error> {
        self.check_thawed(id)?;
        let edge = self.edge(id).clone();
        if let Parent::Node(parent, _) = edge.parent
            && self.reaches(to, parent)
        {
            return Err(self.loop_refused(parent, to));
        }
        self.vertex_mut(edge.child).parents.retain(|e| *e != id);
        self.vertex_mut(to).parents.push(id);
        self.edge_mut(id).child = to;
        Ok(())
    }

    /// Gives every parent of `from` the node `to` instead, but those that stay with it, and `to` itself
    /// and what is below it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if one of the edges is frozen.
    pub(crate) fn replace_node(&mut self, from: NodeId, to: NodeId) -> Result<(), Error> {
        for id in self.vertex(from).parents.clone() {
            let edge = self.edge(id);
            let below = match edge.parent {
                Parent::Node(parent, _) => self.reaches(to, parent),
                Parent::Root(_) => false,
            };
            if !edge.stays && !below {
                self.replace_child(id, to)?;
            }
        }
        Ok(())
    }

    /// Takes out a node that nobody uses, and the nodes below that then nobody uses and nobody holds by
    /// name. Returns them, parents first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] that names a user.
    pub(crate) fn remove(&mut self, id: NodeId) -> Result<Vec<NodeId>, Error> {
        if let Some(user) = self.parents(id).next() {
            return Err(Error::busy(format!(
                "cannot remove node '{}': {} uses it",
                self.vertex(id).name,
                self.who(user)
            )));
        }
        let mut removed = Vec::new();
        let mut next = vec![id];
        while let Some(id) = next.pop() {
            for edge in self.vertex(id).children.clone().into_iter().flatten() {
                // A node that is gone holds nothing frozen: who froze its links is above it.
                let child = self.edge(edge).child;
                self.cut(edge);
                if self.vertex(child).parents.is_empty() && !self.vertex(child).owned {
                    next.push(child);
                }
            }
            self.nodes.remove(&id);
            removed.push(id);
        }
        Ok(removed)
    }

    /// Whether `to` is `from`, or below it.
    pub(crate) fn reaches(&self, from: NodeId, to: NodeId) -> bool {
        self.below([from]).contains(&to)
    }

    /// These nodes and all below them.
    pub(crate) fn below(&self, nodes: impl IntoIterator<Item = NodeId>) -> BTreeSet<NodeId> {
        let mut found = BTreeSet::new();
        let mut next: Vec<_> = nodes.into_iter().collect();
        while let Some(id) = next.pop() {
            if self.nodes.contains_key(&id) && found.insert(id) {
                next.extend(self.children(id).map(|(_, edge)| edge.child));
            }
        }
        found
    }

    /// The roots from which a node can be reached.
    pub(crate) fn roots_above(&self, nodes: &BTreeSet<NodeId>) -> BTreeSet<RootId> {
        let mut seen = BTreeSet::new();
        let mut found = BTreeSet::new();
        let mut next: Vec<_> = nodes.iter().copied().collect();
        while let Some(id) = next.pop() {
            if !self.nodes.contains_key(&id) || !seen.insert(id) {
                continue;
            }
            for edge in self.parents(id) {
                match edge.parent {
                    Parent::Node(parent, _) => next.push(parent),
                    Parent::Root(root) => {
                        found.insert(root);
                    }
                }
            }
        }
        found
    }

    /// Every node, parents before children.
    pub(crate) fn topmost_first(&self) -> Vec<NodeId> {
        let mut waiting: BTreeMap<_, _> = self
            .nodes
            .iter()
            .map(|(id, vertex)| {
                let nodes = vertex
                    .parents
                    .iter()
                    .filter(|edge| matches!(self.edges[edge].parent, Parent::Node(..)));
                (*id, nodes.count())
            })
            .collect();
        let ready = waiting.iter().filter(|(_, parents)| **parents == 0);
        let mut order: Vec<_> = ready.map(|(id, _)| *id).collect();
        let mut done = 0;
        while done < order.len() {
            for (_, edge) in self.children(order[done]) {
                let parents = waiting.get_mut(&edge.child).expect("a node of this shape");
                *parents -= 1;
                if *parents == 0 {
                    order.push(edge.child);
                }
            }
            done += 1;
        }
        order
    }

    /// What all parents of a node need and share together.
    pub(crate) fn cumulative(&self, id: NodeId) -> Cumulative {
        let nothing = Cumulative {
            needs: Permissions::empty(),
            shares: Permissions::all(),
        };
        self.parents(id).fold(nothing, |sum, edge| Cumulative {
            needs: sum.needs | edge.needs,
            shares: sum.shares & edge.shares,
        })
    }

    /// Works out what every node needs of its children, by `rule`, and checks that nobody is refused
    /// what another does not share.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] that names who holds what; [`ErrorKind::PermissionDenied`] where a read-only
    /// node would be written to. The shape must be given up then.
    pub(crate) fn refresh_permissions(
        &mut self,
        rule: impl Fn(NodeId, &ChildQuery) -> ChildPermissions,
    ) -> Result<(), Error> {
        for id in self.topmost_first() {
            let all = self.cumulative(id);
            self.check_writable(id, all)?;
            let vertex = self.vertex(id);
            let modes = vertex.modes;
            let kind = vertex.kind.kind;
            let being_committed = vertex.being_committed;
            for edge in vertex.children.clone().into_iter().flatten() {
                let Parent::Node(_, index) = self.edge(edge).parent else {
                    unreachable!("a child's edge begins at a node");
                };
                let mut granted = rule(
                    id,
                    &ChildQuery {
                        kind,
                        index,
                        role: self.edge(edge).role,
                        needs: all.needs,
                        shares: all.shares,
                        read_only: modes.read_only || modes.inactive,
                        inactive: modes.inactive,
                    },
                );
                if modes.force_share {
                    granted.shares = Permissions::all();
                }
                if being_committed && self.edge(edge).role.contains(Role::COW) {
                    granted.needs -= Permissions::CONSISTENT_READ;
                    granted.shares |= Permissions::WRITE | Permissions::RESIZE;
                }
                let edge = self.edge_mut(edge);
                (edge.needs, edge.shares) = (granted.needs, granted.shares);
            }
        }
        let ids: Vec<_> = self.nodes.keys().copied().collect();
        ids.into_iter().try_for_each(|id| self.check_conflicts(id))
    }

    fn check_writable(&self, id: NodeId, all: Cumulative) -> Result<(), Error> {
        let vertex = self.vertex(id);
        let writes = Permissions::WRITE | Permissions::WRITE_UNCHANGED | Permissions::RESIZE;
        if vertex.may_write() || !all.needs.intersects(writes) {
            return Ok(());
        }
        let mut parents = self.parents(id);
        let writer = parents.find(|edge| edge.needs.intersects(writes));
        let who = writer.map_or_else(String::new, |edge| self.who(edge));
        let why = match vertex.modes.inactive {
            true => "inactive: another process owns its image for now",
            false => "read-only",
        };
        Err(Error::new(
            ErrorKind::PermissionDenied,
            format!(
                "{who} needs to write to node '{}', which is {why}",
                vertex.name
            ),
        ))
    }

    fn check_conflicts(&self, id: NodeId) -> Result<(), Error> {
        if fault::is_planted(Fault::PermissionCheck) {
            return Ok(());
        }
        let parents: Vec<_> = self.parents(id).collect();
        for (place, one) in parents.iter().enumerate() {
            for other in &parents[place + 1..] {
                // The later one is the one that is refused.
                self.check_pair(id, other, one)?;
            }
        }
        Ok(())
    }

    fn check_pair(&self, id: NodeId, new: &Edge, held: &Edge) -> Result<(), Error> {
        let refused = new.needs - held.shares;
        let taken = held.needs - new.shares;
        let (who, node) = (self.who(new), &self.vertex(id).name);
        if !refused.is_empty() {
            return Err(Error::busy(format!(
                "{who} cannot use node '{node}': it needs {}, which {} does not share",
                refused.names(),
                self.who(held)
            )));
        }
        if !taken.is_empty() {
            return Err(Error::busy(format!(
                "{who} cannot use node '{node}': it does not share {}, which {} uses",
                taken.names(),
                self.who(held)
            )));
        }
        Ok(())
    }
}
