//! The global-state API: the graph of nodes and everything that changes it; control thread only.
//!
//! A [`Change`] is a transaction over any number of nodes. It has three phases. *Prepare* is async and
//! may do I/O: nodes are opened, edges moved on a copy of the graph's shape, permissions worked out for
//! all of it, drivers asked to get ready, roots whose requests would go another way drained. *Commit* is
//! a plain function, in which no await can be, and cannot fail. A change that is given up, or dropped,
//! leaves everything as it was. One change runs at a time, in the order in which they were begun;
//! queries ([`Control::read`]) never wait for it.
//!
//! The graph is `!Send`: it cannot leave the control thread, and no worker can have it. What workers
//! need of it they get as a [`Plan`]; what they have to say they post as a [`Notice`].
//!
//! # What does not compile
//!
//! Each pair differs in one thing.
//!
//! Control stays on its thread: a worker cannot be handed it, while the control thread has the way to
//! each worker.
//!
//! ```
//! # use blockcore::{graph::Control, io::{ContextHandle, IoContext}};
//! fn tell(worker: &ContextHandle, control: Control) {
//!     worker.post(move |context| drop(context.handle().clone()));
//!     drop(control);
//! }
//! ```
//!
//! ```compile_fail,E0277
//! # use blockcore::{graph::Control, io::{ContextHandle, IoContext}};
//! fn tell(worker: &ContextHandle, control: Control) {
//!     worker.post(move |context| drop(control));
//! }
//! ```
//!
//! Nor can the graph itself, for all that it is made of:
//!
//! ```
//! # use blockcore::graph::Graph;
//! let graph = Graph::new(Vec::new());
//! drop(graph);
//! ```
//!
//! ```compile_fail,E0277
//! # use blockcore::graph::Graph;
//! let graph = Graph::new(Vec::new());
//! std::thread::spawn(move || drop(graph));
//! ```
//!
//! What a worker has does not lead to the graph: calls that change it hang on a [`Control`], which no
//! context gives out.
//!
//! ```
//! # use blockcore::{drain::Scope, graph::Control, io::IoContext};
//! # use std::rc::Rc;
//! async fn hold(control: &Control, context: &Rc<IoContext>) {
//!     let held = Control::drain(control, Scope::All).await;
//! }
//! ```
//!
//! ```compile_fail,E0308
//! # use blockcore::{drain::Scope, graph::Control, io::IoContext};
//! # use std::rc::Rc;
//! async fn hold(control: &Control, context: &Rc<IoContext>) {
//!     let held = Control::drain(context, Scope::All).await;
//! }
//! ```
//!
//! A request stays on the worker on which it entered:
//!
//! ```
//! # use blockcore::io::{ContextHandle, Request};
//! fn end(worker: &ContextHandle, request: Request) {
//!     let bytes = request.io().bytes();
//!     worker.post(move |_| drop(bytes));
//! }
//! ```
//!
//! ```compile_fail,E0277
//! # use blockcore::io::{ContextHandle, Request};
//! fn end(worker: &ContextHandle, request: Request) {
//!     worker.post(move |_| drop(request));
//! }
//! ```
//!
//! and nothing that leads to a node's driver outlives it, so that none is left when a drained section
//! begins:
//!
//! ```
//! # use blockcore::io::Request;
//! fn length(request: Request) -> u64 {
//!     let io = request.io();
//!     let bytes = io.bytes();
//!     drop(request);
//!     bytes
//! }
//! ```
//!
//! ```compile_fail,E0505
//! # use blockcore::io::Request;
//! fn length(request: Request) -> u64 {
//!     let io = request.io();
//!     drop(request);
//!     io.bytes()
//! }
//! ```
//!
//! A commit waits for nothing, and happens once:
//!
//! ```
//! # use blockcore::graph::Prepared;
//! async fn make_it_so(change: Prepared) {
//!     change.commit();
//! }
//! ```
//!
//! ```compile_fail,E0277
//! # use blockcore::graph::Prepared;
//! async fn make_it_so(change: Prepared) {
//!     change.commit().await;
//! }
//! ```
//!
//! ```compile_fail,E0382
//! # use blockcore::graph::Prepared;
//! async fn make_it_so(change: Prepared) {
//!     change.commit();
//!     change.commit();
//! }
//! ```
//!
//! What was seen in the graph is not kept across an await: names and identifiers are, and looked up
//! again.
//!
//! ```
//! # use blockcore::graph::{Control, Node, NodeId};
//! async fn look(control: &Control) {
//!     let disk: Option<NodeId> = control.read(|graph| Some(graph.node("disk").ok()?.id()));
//!     control.begin().await;
//!     drop(disk);
//! }
//! ```
//!
//! ```compile_fail
//! # use blockcore::graph::{Control, Node, NodeId};
//! async fn look(control: &Control) {
//!     let disk: Option<&Node> = control.read(|graph| Some(graph.node("disk").ok()?));
//!     control.begin().await;
//!     drop(disk);
//! }
//! ```

mod activity;
mod bitmaps;
mod blockers;
mod chain;
mod change;
mod compile;
mod debug;
mod image;
mod insert;
mod look;
mod names;
mod node;
mod open;
pub mod permission;
pub mod record;
mod recording;
mod reopen;
mod roots;
mod shape;
mod snapshot;
mod typed;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

pub use self::bitmaps::BitmapSpec;
pub use self::blockers::{BlockerId, Operation};
pub use self::change::{Change, Closing, Prepared};
use self::compile::View;
pub(crate) use self::insert::FilterSpec;
pub use self::look::{Line, LineEnd};
pub use self::node::Node;
pub use self::open::{NODE_OPTIONS, open_modes};
pub use self::recording::ExportState;
use self::roots::RootRecord;
pub use self::roots::{RootSpec, RootUser};
use self::shape::Shape;
pub use self::typed::typed_options;
use crate::credentials::Credentials;
use crate::drain::{Held, Scope, SectionId};
use crate::driver::{DriverType, OpenModes};
use crate::io::{IoContext, Plan};
use crate::mailbox::Mailbox;
use crate::node::Notice;
use crate::throttle::Groups;
use crate::turns::Turns;
use crate::{Error, ErrorKind};

macro_rules! ids {
    ($($(#[$about:meta])* $name:ident;)*) => {$(
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub(crate) u64);
    )*};
}

ids! {
    /// Names a node in this process, for ever.
    NodeId;
    /// Names somebody's use of a node from outside the graph, for ever.
    RootId;
    /// Names an edge, for ever.
    EdgeId;
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// The nodes of this process and who uses them.
pub struct Graph {
    types: Vec<&'static DriverType>,
    shape: Shape,
    nodes: BTreeMap<NodeId, Node>,
    names: BTreeMap<Arc<str>, NodeId>,
    roots: BTreeMap<RootId, RootRecord>,
    units: BTreeMap<RootId, u32>,
    pub(crate) sections: BTreeMap<SectionId, Scope>,
    /// What the sections hold, as the workers and drivers have been told.
    pub(crate) held: Held,
    blockers: blockers::Blockers,
    next_id: Cell<u64>,
    // The control thread's alone, whatever its fields become.
    not_send: PhantomData<*const ()>,
}

impl Graph {
    /// An empty graph of nodes of these types.
    pub fn new(types: Vec<&'static DriverType>) -> Self {
        Self {
            types,
            shape: Shape::default(),
            nodes: BTreeMap::new(),
            names: BTreeMap::new(),
            roots: BTreeMap::new(),
            units: BTreeMap::new(),
            sections: BTreeMap::new(),
            held: Held::default(),
            blockers: blockers::Blockers::default(),
            next_id: Cell::new(1),
            not_send: PhantomData,
        }
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.replace(self.next_id.get() + 1)
    }

    /// The node called `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn node(&self, name: &str) -> Result<&Node, Error> {
        let id = self.names.get(name);
        id.map(|id| &self.nodes[id])
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no node '{name}'")))
    }

    /// The node called `id`; `None` if it is gone.
    pub fn node_by_id(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes.get_mut(&id).expect("a node of this graph")
    }

    /// Every node, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.names.values().map(|id| &self.nodes[id])
    }

    /// How a node was opened.
    pub fn modes(&self, id: NodeId) -> OpenModes {
        self.shape.vertex(id).modes
    }

    /// The registered drivers.
    pub fn driver_types(&self) -> &[&'static DriverType] {
        &self.types
    }

    /// The registered driver called `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], listing what there is.
    pub fn driver_type(&self, name: &str) -> Result<&'static DriverType, Error> {
        let found = self.types.iter().find(|kind| kind.name == name);
        found.copied().ok_or_else(|| {
            let known: Vec<_> = self.types.iter().map(|kind| kind.name).collect();
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "there is no driver '{name}'; there are {}",
                    known.join(", ")
                ),
            )
        })
    }

    /// What to call a node in a message: its name and, where there is one, its file.
    pub fn describe(&self, node: &Node) -> String {
        let mut leaf = node.id;
        while let Some(edge) = self.shape.children(leaf).next().map(|(_, edge)| edge) {
            leaf = edge.child;
        }
        match self.nodes[&leaf].io.files().first() {
            Some(file) => format!("node '{}' ('{}')", node.name, file.path().display()),
            None => format!("node '{}'", node.name),
        }
    }

    /// A node's children: the option that names each, and the node.
    pub fn children(&self, id: NodeId) -> impl Iterator<Item = (&'static str, &Node)> {
        let kind = self.shape.vertex(id).kind;
        let children = self.shape.children(id);
        children.map(|(index, edge)| (kind.children[index].name, &self.nodes[&edge.child]))
    }

    /// Who uses a node, for messages: `node 'overlay'`, `export 'vda'`.
    pub fn users(&self, id: NodeId) -> Vec<String> {
        let parents = self.shape.parents(id);
        parents.map(|edge| self.shape.who(edge)).collect()
    }

    /// What all users of a node need together, and what all of them share.
    pub fn cumulative_permissions(
        &self,
        id: NodeId,
    ) -> (permission::Permissions, permission::Permissions) {
        let all = self.shape.cumulative(id);
        (all.needs, all.shares)
    }

    /// Every edge, for those who draw the graph: who, the node, and what it needs and shares.
    pub fn edges(&self) -> impl Iterator<Item = EdgeView<'_>> {
        self.shape.edges().map(|edge| EdgeView {
            parent: self.shape.who(edge),
            child: &self.nodes[&edge.child],
            role: edge.role,
            needs: edge.needs,
            shares: edge.shares,
        })
    }

    fn view(&self) -> View<'_> {
        const NOTHING: &BTreeMap<NodeId, Node> = &BTreeMap::new();
        static NO_HALVES: BTreeMap<NodeId, Arc<dyn crate::driver::DriverIo>> = BTreeMap::new();
        View {
            shape: &self.shape,
            nodes: [&self.nodes, NOTHING],
            replaced: &NO_HALVES,
            units: &self.units,
            types: &self.types,
            limits: RefCell::default(),
        }
    }

    /// The plan of a root, as its workers have it.
    pub fn plan(&self, root: RootId) -> Option<Arc<Plan>> {
        self.roots.get(&root).map(|root| Arc::clone(&root.plan))
    }
}

/// An edge, for those who draw the graph.
pub struct EdgeView<'a> {
    /// `node 'overlay'` or `export 'vda'`.
    pub parent: String,
    /// The node below.
    pub child: &'a Node,
    /// What it is to the parent.
    pub role: crate::driver::Role,
    /// What the parent needs.
    pub needs: permission::Permissions,
    /// What it lets others have.
    pub shares: permission::Permissions,
}

/// The control thread's hold on the graph: may be kept across an await, where `&mut Graph` may not.
#[derive(Clone)]
pub struct Control {
    graph: Rc<RefCell<Graph>>,
    context: Rc<IoContext>,
    turns: Turns,
    notices: Arc<Mailbox<Notice>>,
    next_name: Rc<Cell<u64>>,
    throttle_groups: Groups,
    credentials: Credentials,
    runtime_directory: Rc<RefCell<Option<PathBuf>>>,
}

impl Control {
    /// Control over `graph`, with `context` for its I/O.
    pub fn new(graph: Graph, context: Rc<IoContext>) -> Self {
        Self {
            graph: Rc::new(RefCell::new(graph)),
            notices: Mailbox::new(Arc::clone(context.engine().sleeper())),
            context,
            throttle_groups: Groups::default(),
            credentials: Credentials::default(),
            runtime_directory: Rc::default(),
            turns: Turns::default(),
            next_name: Rc::default(),
        }
    }

    /// Looks at the graph.
    pub fn read<T>(&self, look: impl FnOnce(&Graph) -> T) -> T {
        look(&self.graph.borrow())
    }

    /// Changes the graph: for commit, and for what concerns no request.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Graph) -> T) -> T {
        change(&mut self.graph.borrow_mut())
    }

    /// The throttle groups of the process.
    pub fn throttle_groups(&self) -> &Groups {
        &self.throttle_groups
    }

    /// The keys that nodes and servers refer to by name.
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// Where drivers that open from now on keep memory that is to outlive this process, on a file system
    /// that does not outlive the host; `None`, as at first: nowhere. It need not be there.
    pub fn set_runtime_directory(&self, directory: Option<PathBuf>) {
        self.runtime_directory.replace(directory);
    }

    /// What [`set_runtime_directory`](Self::set_runtime_directory) said last.
    pub fn runtime_directory(&self) -> Option<PathBuf> {
        self.runtime_directory.borrow().clone()
    }

    /// The control thread's context.
    pub fn context(&self) -> &Rc<IoContext> {
        &self.context
    }

    /// What workers have posted since the last call.
    pub fn take_notices(&self) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.notices.take(&mut notices);
        for notice in &notices {
            if let Notice::Resized { node } = notice {
                self.resized(*node);
            }
        }
        notices
    }

    /// Whether workers have posted something; the control thread's last look before it sleeps.
    pub fn has_notices(&self) -> bool {
        !self.notices.is_empty()
    }

    /// The length of a node has changed: so may those of the nodes above.
    fn resized(&self, node: NodeId) {
        let (users, marked) = self.change(|graph| {
            let mut changed = graph.view().update_lengths();
            changed.push(node);
            let marked: Vec<_> = changed
                .iter()
                .filter(|id| graph.nodes.get(id).is_some_and(|n| !n.bitmaps.is_empty()))
                .copied()
                .collect();
            let users: Vec<_> = graph
                .shape
                .roots()
                .filter(|(_, edge)| changed.contains(&edge.child))
                .filter_map(|(id, edge)| {
                    let user = graph.roots.get(&id)?.user.clone()?;
                    Some((user, graph.nodes[&edge.child].bytes()))
                })
                .collect();
            (users, marked)
        });
        // With the graph let go of: users look at it.
        for (user, bytes) in users {
            user.resized(bytes);
        }
        for id in marked {
            let control = self.clone();
            self.context
                .spawn(async move { control.fit_bitmaps(id).await });
        }
    }
}

#[cfg(test)]
mod tests;
