//! [`Change`]: a transaction over the graph.
//!
//! A change works on a copy of the graph's shape. Its calls open nodes, move edges, reopen nodes; any of
//! them may fail, and then the change is to be given up, by dropping it: nodes that it opened are
//! closed, and drivers undo what they had prepared. [`Change::prepare`] is the last thing that may fail:
//! it works out permissions for all of the copy, has drivers take what they need for them, and drains
//! every root whose requests would go another way. [`Prepared::commit`] puts the copy in the graph's
//! place and gives the workers their plans. What is left, closing nodes that went, is for
//! [`Closing::finish`].
//!
//! Invariant: the graph's shape changes only in a commit, and only one change is under way.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use super::compile::View;
use super::node::DriverCell;
use super::permission::{self, Permissions};
use super::recording::{self, NewStates, Written};
use super::reopen::Reopening;
use super::roots::{RootRecord, RootSpec, RootUser};
use super::shape::{Cumulative, Edge, Parent, Shape};
use super::{Control, EdgeId, Graph, Node, NodeId, RootId};
use crate::drain::{Drained, Scope};
use crate::driver::{DriverIo, DriverKind};
use crate::fault::{self, Fault};
use crate::io::{Io, Plan, RequestKind, Root};
use crate::turns::Turn;
use crate::{Error, ErrorKind};

/// See the module's header.
pub struct Change {
    control: Control,
    /// `None` once it is committed or given up.
    state: Option<Box<State>>,
    /// How many backing images are being opened because a header asks for them.
    pub(super) chain_depth: usize,
}

pub(super) struct State {
    pub(super) shape: Shape,
    /// Opened by this change.
    pub(super) nodes: BTreeMap<NodeId, Node>,
    /// The order in which they were opened: children first.
    opened: Vec<NodeId>,
    new_roots: BTreeMap<RootId, Option<Rc<dyn RootUser>>>,
    pub(super) new_states: NewStates,
    /// What was written into state files for this change.
    pub(super) written: Vec<Written>,
    units: BTreeMap<RootId, u32>,
    removed: Vec<NodeId>,
    /// I/O halves from the commit on.
    pub(super) replaced: BTreeMap<NodeId, Arc<dyn DriverIo>>,
    pub(super) reopened: Vec<Reopening>,
    /// Handed over by this change, in that order.
    pub(super) inactivated: Vec<NodeId>,
    /// What drivers have been asked to be ready for.
    permissions: BTreeMap<NodeId, Cumulative>,
    pub(super) drained: Vec<Drained>,
    turn: Turn,
}

/// A change that can be committed, and cannot fail any more.
pub struct Prepared {
    change: Change,
    plans: BTreeMap<RootId, Arc<Plan>>,
}

/// What is left to do after a commit. Dropped without [`finish`](Self::finish), it is done all the same,
/// and failures are reported as warnings.
pub struct Closing {
    control: Control,
    rest: Option<Box<Rest>>,
}

struct Rest {
    /// As it was before, for the nodes that went.
    shape: Shape,
    nodes: BTreeMap<NodeId, Node>,
    /// Parents first.
    order: Vec<NodeId>,
    reopened: Vec<NodeId>,
    resized: Vec<NodeId>,
    /// Whose permissions have changed.
    permitted: Vec<NodeId>,
    _turn: Turn,
}

impl Control {
    /// Begins a change, when those that were begun before are over.
    pub async fn begin(&self) -> Change {
        let turn = self.turns.next().await;
        let (shape, units) = self.read(|graph| (graph.shape.clone(), graph.units.clone()));
        Change {
            control: self.clone(),
            chain_depth: 0,
            state: Some(Box::new(State {
                shape,
                nodes: BTreeMap::new(),
                opened: Vec::new(),
                new_roots: BTreeMap::new(),
                new_states: NewStates::new(),
                written: Vec::new(),
                units,
                removed: Vec::new(),
                replaced: BTreeMap::new(),
                reopened: Vec::new(),
                inactivated: Vec::new(),
                permissions: BTreeMap::new(),
                drained: Vec::new(),
                turn,
            })),
        }
    }
}

impl State {
    pub(super) fn with_view<T>(&self, graph: &Graph, look: impl FnOnce(&View<'_>) -> T) -> T {
        look(&View {
            shape: &self.shape,
            nodes: [&self.nodes, &graph.nodes],
            replaced: &self.replaced,
            units: &self.units,
            types: &graph.types,
            limits: RefCell::default(),
        })
    }

    pub(super) fn node<'a>(&'a self, graph: &'a Graph, id: NodeId) -> Option<&'a Node> {
        self.nodes.get(&id).or_else(|| graph.nodes.get(&id))
    }
}

impl Change {
    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    pub(super) fn state(&self) -> &State {
        self.state.as_ref().expect("until committed or given up")
    }

    pub(super) fn state_mut(&mut self) -> &mut State {
        self.state.as_mut().expect("until committed or given up")
    }

    /// The node called `name`, in the graph or opened by this change.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn find(&self, name: &str) -> Result<NodeId, Error> {
        let state = self.state();
        let mut vertices = state.shape.nodes();
        let found = vertices.find(|(_, vertex)| *vertex.name == *name);
        found
            .map(|(id, _)| id)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no node '{name}'")))
    }

    pub(super) fn driver_of(&self, id: NodeId) -> DriverCell {
        self.control.read(|graph| {
            let node = self.state().node(graph, id);
            node.expect("every vertex of a shape has a node")
                .driver
                .clone()
        })
    }

    pub(super) fn next_edge(&self) -> EdgeId {
        EdgeId(self.control.read(Graph::next_id))
    }

    /// Uses a node from outside the graph.
    ///
    /// # Errors
    ///
    /// None now; [`prepare`](Self::prepare) says whether others allow it.
    pub fn add_root(&mut self, node: NodeId, spec: RootSpec) -> Result<RootId, Error> {
        let id = RootId(self.control.read(Graph::next_id));
        let edge = self.next_edge();
        let state = self.state_mut();
        state.units.insert(id, spec.unit_bytes.max(1));
        state.new_roots.insert(id, spec.user);
        if let Some(recorded) = spec.state {
            state.new_states.insert(id, recorded);
        }
        state.shape.attach(
            edge,
            Edge {
                parent: Parent::Root(id),
                child: node,
                role: RootSpec::role(),
                needs: spec.needs,
                shares: spec.shares,
                who: spec.who.into(),
                frozen: 0,
                stays: spec.stays,
            },
        )?;
        Ok(id)
    }

    fn root_edge(&self, id: RootId) -> Result<EdgeId, Error> {
        let edge = self.state().shape.root_edge(id);
        edge.ok_or_else(|| Error::new(ErrorKind::NotFound, "the root is gone"))
    }

    /// Changes what a root needs and shares.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if the root is gone.
    pub fn set_root_permissions(
        &mut self,
        id: RootId,
        needs: Permissions,
        shares: Permissions,
    ) -> Result<(), Error> {
        let edge = self.root_edge(id)?;
        let edge = self.state_mut().shape.edge_mut(edge);
        (edge.needs, edge.shares) = (needs, shares);
        Ok(())
    }

    /// Ends a root. A node that then nobody uses and nobody holds by name goes with it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if the root is gone already.
    pub fn remove_root(&mut self, id: RootId) -> Result<(), Error> {
        let edge = self.root_edge(id)?;
        let state = self.state_mut();
        let child = state.shape.edge(edge).child;
        state.shape.detach(edge)?;
        state.units.remove(&id);
        self.drop_if_unused(child)
    }

    fn drop_if_unused(&mut self, node: NodeId) -> Result<(), Error> {
        let state = self.state_mut();
        let used = state.shape.parents(node).next().is_some();
        if used || state.shape.vertex(node).owned {
            return Ok(());
        }
        let removed = state.shape.remove(node)?;
        state.removed.extend(removed);
        Ok(())
    }

    /// Takes out a node that an operator added, with the nodes below that only it used and that nobody
    /// holds by name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] that names a user, or who blocks it;
    /// [`ErrorKind::Invalid`] for a node that belongs to its parent.
    pub fn remove(&mut self, name: &str) -> Result<(), Error> {
        let id = self.find(name)?;
        self.control
            .read(|graph| Self::check_unblocked(graph, id))?;
        let state = self.state_mut();
        if !state.shape.vertex(id).owned {
            return Err(Error::invalid(format!(
                "node '{name}' was not added by itself, and goes with the node above it"
            )));
        }
        let removed = state.shape.remove(id)?;
        state.removed.extend(removed);
        Ok(())
    }

    /// Gives every parent of `from` the node `to` instead: roots and nodes, but those that stay with it
    /// and those below `to` (a filter just put on top keeps its child).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if a link is frozen. `from` stays if somebody holds it by name or uses it.
    pub fn replace_node(&mut self, from: NodeId, to: NodeId) -> Result<(), Error> {
        self.state_mut().shape.replace_node(from, to)?;
        self.drop_if_unused(from)
    }

    /// Gives a node another child under `name`, or none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the driver has no such child, needs it, or it would make a loop;
    /// [`ErrorKind::Busy`] if the link is frozen.
    pub fn set_child(
        &mut self,
        node: NodeId,
        name: &str,
        child: Option<NodeId>,
    ) -> Result<(), Error> {
        let vertex = self.state().shape.vertex(node);
        let (kind, parent) = (vertex.kind, Arc::clone(&vertex.name));
        let specs = kind.children.iter();
        let found = specs.enumerate().find(|(_, spec)| spec.name == name);
        let Some((index, spec)) = found else {
            return Err(Error::invalid(format!(
                "driver '{}' of node '{parent}' has no child '{name}'",
                kind.name
            )));
        };
        let options = self
            .control
            .read(|graph| Some(self.state().node(graph, node)?.options.clone()));
        let role = options.map_or(spec.role, |options| self.child_role(node, &options, index));
        let before = self.state().shape.vertex(node).children[index];
        let old = before.map(|edge| self.state().shape.edge(edge).child);
        match (before, child) {
            (Some(edge), Some(child)) => self.state_mut().shape.replace_child(edge, child)?,
            (None, Some(child)) => self.add_child(node, index, role, child)?,
            (Some(_), None) if !spec.optional => {
                return Err(Error::invalid(format!(
                    "node '{parent}' cannot do without its child '{name}'"
                )));
            }
            (Some(edge), None) => self.state_mut().shape.detach(edge)?,
            (None, None) => {}
        }
        match old {
            Some(old) if Some(old) != child => self.drop_if_unused(old),
            _ => Ok(()),
        }
    }

    pub(super) fn add_child(
        &mut self,
        parent: NodeId,
        index: usize,
        role: crate::driver::Role,
        child: NodeId,
    ) -> Result<(), Error> {
        let id = self.next_edge();
        let edge = Edge {
            parent: Parent::Node(parent, index),
            child,
            role,
            needs: Permissions::empty(),
            shares: Permissions::all(),
            who: "".into(),
            frozen: 0,
            stays: false,
        };
        self.state_mut().shape.attach(id, edge)
    }

    /// The child of a node under `name`, if there is one.
    pub fn child(&self, node: NodeId, name: &str) -> Option<NodeId> {
        let shape = &self.state().shape;
        let mut names = shape.vertex(node).kind.children.iter();
        let index = names.position(|spec| spec.name == name)?;
        Some(shape.child(node, index)?.child)
    }

    /// Marks a node as put in by the core itself: hidden from those who ask for the operator's graph.
    pub fn set_implicit(&mut self, node: NodeId) {
        self.state_mut().shape.vertex_mut(node).implicit = true;
    }

    /// Holds back requests to these nodes until the change is over. What is learnt about them
    /// afterwards stays true.
    pub async fn drain(&mut self, scope: Scope) {
        let drained = self.control.drain(scope).await;
        self.state_mut().drained.push(drained);
    }

    /// A way to read and write a node, as it will be, while the change is prepared. Nothing of a root's
    /// must be in flight there that this could meet.
    pub(super) fn temporary_root(&self, node: NodeId, granted: Permissions) -> Rc<Root> {
        let plan = self.control.read(|graph| {
            self.state().with_view(graph, |view| {
                let tracked = view.tracked();
                view.plan(node, granted, &tracked)
            })
        });
        self.control.unused_root(plan)
    }

    /// Works out permissions for the shape as it is now, and has drivers take what they need.
    pub(super) async fn prepare_permissions(&mut self) -> Result<(), Error> {
        let control = self.control.clone();
        control.read(|graph| {
            let state = self.state_mut();
            let (nodes, shape) = (&state.nodes, &mut state.shape);
            shape.refresh_permissions(|id, query| {
                match nodes.get(&id).or_else(|| graph.nodes.get(&id)) {
                    Some(node) => node.driver.take().child_permissions(query),
                    // Being opened: its driver is not there yet.
                    None => permission::default_rule(query),
                }
            })
        })?;
        for id in self.state().shape.topmost_first() {
            let all = self.state().shape.cumulative(id);
            let before = self.permissions_before(id);
            let driver = self.control.read(|graph| {
                let node = self.state().node(graph, id)?;
                Some(node.driver.clone())
            });
            let Some(driver) = driver.filter(|_| before != all) else {
                continue;
            };
            // Noted first: who fails half way has given up what it took, and aborting does nothing.
            self.state_mut().permissions.insert(id, all);
            let context = Rc::clone(&self.control.context);
            let prepared = driver
                .take()
                .prepare_permissions(context, all.needs, all.shares)
                .await;
            if let Some(io) = prepared?.io {
                self.state_mut().replaced.insert(id, io);
            }
            if before.needs.is_empty() && !all.needs.is_empty() {
                self.look_again(id).await?;
            }
        }
        Ok(())
    }

    /// What a node's driver has been asked to be ready for last.
    fn permissions_before(&self, id: NodeId) -> Cumulative {
        let nobody = Cumulative {
            needs: Permissions::empty(),
            shares: Permissions::all(),
        };
        if let Some(prepared) = self.state().permissions.get(&id) {
            return *prepared;
        }
        self.control.read(|graph| {
            let known = graph.nodes.contains_key(&id);
            if known {
                graph.shape.cumulative(id)
            } else {
                nobody
            }
        })
    }

    /// A node has its first user: others may have changed it before they were kept out.
    pub(super) async fn look_again(&mut self, id: NodeId) -> Result<(), Error> {
        if self.state().shape.vertex(id).kind.kind != DriverKind::Protocol {
            return Ok(());
        }
        let root = self.temporary_root(id, Permissions::CONSISTENT_READ);
        // Nothing is changed by it, which flushes would have to cover.
        let request = root.enter(RequestKind::Read, 0, 0).await;
        let name = &self.state().shape.vertex(id).name;
        Io::root(&request).refresh_bytes().await.map_err(|error| {
            Error::new(
                ErrorKind::Io,
                format!("cannot find out the length of node '{name}': {error}"),
            )
        })
    }

    /// The last phase that may fail. See the module's header.
    ///
    /// # Errors
    ///
    /// Who does not allow what, or what a driver could not do. Everything is as it was.
    pub async fn prepare(mut self) -> Result<Prepared, Error> {
        match self.get_ready().await {
            Ok(plans) => Ok(Prepared {
                change: self,
                plans,
            }),
            Err(error) => {
                self.abort().await;
                Err(error)
            }
        }
    }

    async fn get_ready(&mut self) -> Result<BTreeMap<RootId, Arc<Plan>>, Error> {
        self.stop_removed().await?;
        self.prepare_permissions().await?;
        let plans = self.compile();
        let moved = self.control.read(|graph| {
            let roots = plans.iter().filter(|(id, plan)| {
                let before = graph.roots.get(id);
                before.is_some_and(|root| !root.plan.is_same(plan))
            });
            roots.map(|(id, _)| *id).collect::<BTreeSet<_>>()
        });
        if !moved.is_empty() && !fault::is_planted(Fault::PlanWithoutDrain) {
            self.drain(Scope::Roots(moved)).await;
        }
        // Last: the roots stand still, so the old tree and the new one read the same.
        self.record().await?;
        Ok(plans)
    }

    /// Has nodes that go leave what stays below them as it is to be: afterwards others may write there, or
    /// nobody.
    async fn stop_removed(&mut self) -> Result<(), Error> {
        let (going, above) = self.control.read(|graph| {
            let state = self.state();
            let leaves_something = |id: &NodeId| {
                let known = graph.nodes.contains_key(id);
                let writes = known && {
                    let modes = graph.shape.vertex(*id).modes;
                    !modes.read_only && !modes.inactive
                };
                let mut children = graph.shape.children(*id);
                writes && children.any(|(_, edge)| state.shape.contains(edge.child))
            };
            let going: Vec<_> = state
                .removed
                .iter()
                .copied()
                .filter(leaves_something)
                .collect();
            let above = graph.roots_above(&going.iter().copied().collect());
            (going, above)
        });
        if !above.is_empty() {
            self.drain(Scope::Roots(above)).await;
        }
        for id in going {
            let (driver, cuts, plan) = self.control.read(|graph| {
                let (view, node) = (graph.view(), &graph.nodes[&id]);
                let plan = view.plan(id, Permissions::all(), &view.tracked());
                // A filter keeps nothing but what it must not do once others write below it.
                let is_filter = node.driver_type().kind == DriverKind::Filter;
                let is_used = !graph.roots_above(&BTreeSet::from([id])).is_empty();
                (node.driver.clone(), is_filter && is_used, plan)
            });
            let root = self.control.unused_root(plan);
            if let Err(error) = self.stop(id, &driver, root).await {
                if cuts {
                    return Err(error);
                }
                // Closing it meets that again, and says so.
                tracing::debug!(error = %error.report(), "while stopping a node that goes");
            }
        }
        Ok(())
    }

    /// Has a node that nothing is in flight at finish what it does when it is written to no more.
    async fn stop(&self, id: NodeId, driver: &DriverCell, root: Rc<Root>) -> Result<(), Error> {
        // Closing it flushes again, and says if that fails.
        let _ = root.flush().await;
        let kept = self.control.bitmaps_to_store(id);
        if !kept.is_empty() {
            driver.take().store_bitmaps(Rc::clone(&root), kept).await?;
        }
        driver.take().stop_writing(root).await
    }

    /// The plan of every root, as it will be.
    fn compile(&self) -> BTreeMap<RootId, Arc<Plan>> {
        let state = self.state();
        self.control.read(|graph| {
            state.with_view(graph, |view| {
                let tracked = view.tracked();
                let roots = state.shape.roots();
                roots
                    .map(|(id, edge)| (id, view.plan(edge.child, edge.needs, &tracked)))
                    .collect()
            })
        })
    }

    /// Gives the change up, and waits until nothing of it is left. Dropping it does the same, without
    /// waiting.
    pub async fn abort(mut self) {
        if let Some(state) = self.state.take() {
            abort(&self.control, state).await;
        }
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            let control = self.control.clone();
            let context = Rc::clone(&control.context);
            context.spawn(async move { abort(&control, state).await });
        }
    }
}

async fn abort(control: &Control, mut state: Box<State>) {
    recording::undo(control, std::mem::take(&mut state.written)).await;
    for reopening in state.reopened.drain(..).rev() {
        if !fault::is_planted(Fault::ReopenAbort) {
            reopening.driver.take().reopen_abort();
        }
    }
    for id in std::mem::take(&mut state.permissions).into_keys() {
        let driver = control.read(|graph| Some(state.node(graph, id)?.driver.clone()));
        if let Some(driver) = driver {
            driver.take().abort_permissions();
        }
    }
    state.replaced.clear();
    for id in std::mem::take(&mut state.inactivated).into_iter().rev() {
        take_back(control, id).await;
    }
    // The topmost first: what it holds back goes through those below.
    let order = state.shape.topmost_first();
    let depth = |id: &NodeId| order.iter().position(|other| other == id);
    state
        .opened
        .sort_by_cached_key(|id| std::cmp::Reverse(depth(id)));
    while let Some(id) = state.opened.pop() {
        let plan = control.read(|graph| {
            state.with_view(graph, |view| {
                view.plan(id, Permissions::all(), &BTreeSet::new())
            })
        });
        let root = control.unused_root(plan);
        let Some(node) = state.nodes.get_mut(&id) else {
            continue;
        };
        let modes = state
            .shape
            .contains(id)
            .then(|| state.shape.vertex(id).modes);
        let stored = match modes {
            Some(modes) => node.store_bitmaps(modes, &root).await,
            None => Ok(()),
        };
        let closed = stored.and(node.driver.take().close(root).await);
        if let Err(error) = closed {
            tracing::warn!(error = %error.report(), node = %node.name, "while closing again");
        }
        state.nodes.remove(&id);
    }
}

/// Takes back a node that a change has handed over and that is given up. Its image was locked all the
/// time.
async fn take_back(control: &Control, id: NodeId) {
    let found = control.read(|graph| {
        let node = graph.nodes.get(&id)?;
        let plan = graph.view().plan(id, Permissions::all(), &BTreeSet::new());
        Some((node.driver.clone(), plan))
    });
    let Some((driver, plan)) = found else { return };
    let root = control.unused_root(plan);
    let activated = driver.take().activate(root).await;
    if let Err(error) = activated {
        tracing::error!(error = %error.report(), "a node that was to be inactive is neither");
    }
}

impl State {
    pub(super) fn add_opened(&mut self, node: Node) {
        self.opened.push(node.id);
        self.nodes.insert(node.id, node);
    }
}

impl Prepared {
    /// Makes the change a fact. Nothing in it waits.
    pub fn commit(mut self) -> Closing {
        let control = self.change.control.clone();
        let mut state = *self.change.state.take().expect("prepared once");
        let plans = std::mem::take(&mut self.plans);
        let rest = control.change(|graph| {
            let rest = graph.put_in_place(&mut state, plans);
            graph.update_held();
            rest
        });
        // With the graph let go of. The workers have been sent their plans before they are let go.
        let State { turn, drained, .. } = state;
        drop(drained);
        Closing {
            control,
            rest: Some(Box::new(Rest {
                _turn: turn,
                shape: rest.shape,
                nodes: rest.nodes,
                order: rest.order,
                reopened: rest.reopened,
                resized: rest.resized,
                permitted: rest.permitted,
            })),
        }
    }

    /// Gives the change up after all.
    pub async fn abort(self) {
        self.change.abort().await;
    }
}

/// What a commit leaves over.
struct Left {
    shape: Shape,
    nodes: BTreeMap<NodeId, Node>,
    order: Vec<NodeId>,
    reopened: Vec<NodeId>,
    resized: Vec<NodeId>,
    permitted: Vec<NodeId>,
}

impl Graph {
    fn put_in_place(&mut self, state: &mut State, plans: BTreeMap<RootId, Arc<Plan>>) -> Left {
        let before = std::mem::replace(&mut self.shape, std::mem::take(&mut state.shape));
        for (id, node) in std::mem::take(&mut state.nodes) {
            self.names.insert(Arc::clone(&node.name), id);
            self.nodes.insert(id, node);
        }
        for (id, io) in std::mem::take(&mut state.replaced) {
            if self.held.nodes.contains(&id) {
                io.drain_begin();
            }
            self.node_mut(id).io = io;
        }
        let mut permitted = Vec::new();
        for id in std::mem::take(&mut state.permissions).into_keys() {
            if let Some(node) = self.nodes.get(&id) {
                node.driver.take().commit_permissions();
                permitted.push(id);
            }
        }
        let mut reopened = Vec::new();
        for reopening in state.reopened.drain(..) {
            reopening.driver.take().reopen_commit();
            self.node_mut(reopening.id).options = reopening.options;
            reopened.push(reopening.id);
        }
        let order = std::mem::take(&mut state.removed);
        let mut gone = BTreeMap::new();
        for id in &order {
            let node = self.nodes.remove(id).expect("removed once, while there");
            self.names.remove(&node.name);
            gone.insert(*id, node);
        }
        self.units = std::mem::take(&mut state.units);
        let resized = self.update_nodes();
        let reloaded = self.update_bitmaps();
        let new_states = std::mem::take(&mut state.new_states);
        self.update_roots(std::mem::take(&mut state.new_roots), plans);
        if reloaded {
            // The plans were made for those that there were.
            self.replan();
        }
        for (id, recorded) in new_states {
            if let Some(root) = self.roots.get_mut(&id) {
                root.state = Some(recorded);
            }
        }
        Left {
            shape: before,
            nodes: gone,
            order,
            reopened,
            resized,
            permitted,
        }
    }

    /// Sets what follows from the new shape; returns the nodes that have another length.
    fn update_nodes(&mut self) -> Vec<NodeId> {
        let view = self.view();
        let limits: Vec<_> = self
            .nodes
            .keys()
            .map(|id| (*id, view.limits(*id)))
            .collect();
        let resized = view.update_lengths();
        for (id, limits) in limits {
            let node = self.node_mut(id);
            node.limits = limits;
            let backing = node.driver.take().backing();
            if node.backing != backing {
                // The header says another than the one that was opened for it.
                node.backing_opened = None;
            }
            node.backing = backing;
        }
        resized
    }

    pub(super) fn update_roots(
        &mut self,
        mut new: BTreeMap<RootId, Option<Rc<dyn RootUser>>>,
        plans: BTreeMap<RootId, Arc<Plan>>,
    ) {
        self.roots.retain(|id, _| plans.contains_key(id));
        for (id, plan) in plans {
            let before = self.roots.get(&id);
            if before.is_none_or(|root| !root.plan.is_same(&plan)) {
                plan.doubt_flushes();
            }
            let Some(root) = self.roots.get_mut(&id) else {
                let user = new.remove(&id).flatten();
                self.roots.insert(
                    id,
                    RootRecord {
                        plan,
                        contexts: Vec::new(),
                        user,
                        state: None,
                    },
                );
                continue;
            };
            if root.plan.is_same(&plan) {
                continue;
            }
            root.plan = Arc::clone(&plan);
            for context in &root.contexts {
                let plan = Arc::clone(&plan);
                context.post(move |context| {
                    if let Some(root) = context.any_root(id) {
                        root.set_plan(plan);
                    }
                });
            }
        }
    }
}

impl Closing {
    /// Does what is left: what reopened nodes do last, and closing those that went, flushed first.
    ///
    /// # Errors
    ///
    /// The first failure; the change stands and everything is closed.
    pub async fn finish(mut self) -> Result<(), Error> {
        match self.rest.take() {
            Some(rest) => finish(self.control.clone(), rest).await,
            None => Ok(()),
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        let Some(rest) = self.rest.take() else { return };
        let control = self.control.clone();
        let context = Rc::clone(&control.context);
        context.spawn(async move {
            if let Err(error) = finish(control, rest).await {
                tracing::warn!(error = %error.report(), "after a change of the graph");
            }
        });
    }
}

async fn finish(control: Control, mut rest: Box<Rest>) -> Result<(), Error> {
    let mut outcome = Ok(());
    for id in std::mem::take(&mut rest.resized) {
        control.resized(id);
    }
    for id in std::mem::take(&mut rest.permitted) {
        let driver = control.read(|graph| Some(graph.nodes.get(&id)?.driver.clone()));
        if let Some(driver) = driver {
            driver.take().settle_permissions().await;
        }
    }
    for id in std::mem::take(&mut rest.reopened) {
        let found = control.read(|graph| {
            let node = graph.nodes.get(&id)?;
            let plan = graph
                .view()
                .plan(id, Permissions::all(), &graph.view().tracked());
            Some((node.driver.clone(), plan))
        });
        if let Some((driver, plan)) = found {
            let root = control.unused_root(plan);
            outcome = outcome.and(driver.take().reopen_after_commit(root).await);
        }
    }
    for id in std::mem::take(&mut rest.order) {
        let plan = control.read(|graph| {
            let view = View {
                shape: &rest.shape,
                nodes: [&rest.nodes, &graph.nodes],
                replaced: &BTreeMap::new(),
                units: &BTreeMap::new(),
                types: &graph.types,
                limits: RefCell::default(),
            };
            // Nodes that this change both opened and took out were in no shape before.
            let known = rest.shape.contains(id);
            known.then(|| view.plan(id, Permissions::all(), &graph.view().tracked()))
        });
        let Some(node) = rest.nodes.get_mut(&id) else {
            continue;
        };
        let Some(plan) = plan else { continue };
        let modes = rest.shape.vertex(id).modes;
        let root = control.unused_root(plan);
        if !modes.read_only && !modes.inactive {
            let flushed = root.flush().await.map_err(|error| {
                Error::new(
                    ErrorKind::Io,
                    format!(
                        "what was written last to node '{}' may not be on the disk: {error}",
                        node.name
                    ),
                )
            });
            outcome = outcome.and(flushed);
        }
        outcome = outcome.and(node.store_bitmaps(modes, &root).await);
        let closed = node.driver.take().close(root).await;
        outcome = outcome.and(closed);
        rest.nodes.remove(&id);
    }
    outcome
}
