//! The global-state API: the graph of nodes and everything that changes it; control thread only.
//!
//! A change has two parts. *Prepare* ([`Control::open`]) is async and may do I/O; it holds no borrow
//! of the graph across an await, so queries go on meanwhile, and what it read before an await it
//! checks again after it. *Commit* ([`Graph::insert`], [`Graph::claim`] …) is a plain function of
//! `&mut Graph`, in which no await can be.
//!
//! The graph is `!Send`: it cannot leave the control thread, and no worker can have it. What workers
//! need of it they get as a [`Plan`].
//!
//! ```compile_fail
//! fn on_a_worker<T: Send>(_: T) {}
//! on_a_worker(blockcore::graph::Graph::new(Vec::new()));
//! ```

pub mod permission;
pub mod record;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use self::permission::{Claim, Permissions};
use crate::driver::{
    Driver, DriverIo, DriverKind, DriverType, Limits, OpenChild, OpenModes, OpenRequest, Role,
};
use crate::engine::OpenFile;
use crate::io::tracked::Tracker;
use crate::io::{IoContext, Modes, Plan, PlanNode};
use crate::options::{OptionKind, OptionSpec, Options};
use crate::{Error, ErrorKind};

/// Options that every node takes.
pub const NODE_OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "driver",
        kind: OptionKind::Text,
        default: None,
        reopen: false,
        changes_data: true,
        help: "what kind of node",
    },
    OptionSpec {
        name: "node-name",
        kind: OptionKind::Text,
        default: Some(""),
        reopen: false,
        changes_data: false,
        help: "name of the node",
    },
    OptionSpec {
        name: "read-only",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "open without the right to write",
    },
    OptionSpec {
        name: "discard",
        kind: OptionKind::Choice(&["ignore", "unmap"]),
        default: Some("ignore"),
        reopen: true,
        changes_data: false,
        help: "whether discards give space back to the host",
    },
    OptionSpec {
        name: "cache.direct",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "bypass the host's page cache",
    },
    OptionSpec {
        name: "cache.no-flush",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "ignore flushes; the data may not survive the host",
    },
];

/// The nodes of this process and who uses them.
pub struct Graph {
    types: Vec<&'static DriverType>,
    nodes: BTreeMap<Arc<str>, Node>,
    next_claim: u64,
    // The control thread's alone, whatever its fields become.
    not_send: PhantomData<*const ()>,
}

/// A vertex: a driver, its limits, its children and who uses it.
pub struct Node {
    name: Arc<str>,
    kind: &'static DriverType,
    driver: Box<dyn Driver>,
    io: Arc<dyn DriverIo>,
    limits: Limits,
    modes: OpenModes,
    children: Vec<Arc<str>>,
    claims: BTreeMap<ClaimId, Claim>,
    child_claims: Vec<(Arc<str>, ClaimId)>,
    tracker: Option<Arc<Tracker>>,
}

/// Names one claim on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClaimId(u64);

impl Node {
    /// Its name, unique in the graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The word for its driver.
    pub fn driver_name(&self) -> &'static str {
        self.kind.name
    }

    /// Its length in bytes, now.
    pub fn bytes(&self) -> u64 {
        self.io.bytes()
    }

    /// What to call it in a message: its name and, where there is one, its file.
    pub fn describe(&self, graph: &Graph) -> String {
        let mut node = self;
        while let Some(child) = node.children.first().and_then(|name| graph.node(name).ok()) {
            node = child;
        }
        match node.io.files().first() {
            Some(file) => format!("node '{}' ('{}')", self.name, file.path().display()),
            None => format!("node '{}'", self.name),
        }
    }

    /// Its limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How it was opened.
    pub fn modes(&self) -> OpenModes {
        self.modes
    }

    /// Its children's names, in its driver's order.
    pub fn children(&self) -> &[Arc<str>] {
        &self.children
    }

    fn check_claim(&self, claim: &Claim) -> Result<(), Error> {
        let writes = Permissions::WRITE | Permissions::RESIZE;
        if self.modes.read_only && claim.needs.intersects(writes) {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!(
                    "{} needs to write to node '{}', which is read-only",
                    claim.who, self.name
                ),
            ));
        }
        permission::check(&self.name, claim, self.claims.values())
    }
}

impl Graph {
    /// An empty graph of nodes of these types.
    pub fn new(types: Vec<&'static DriverType>) -> Self {
        Self {
            types,
            nodes: BTreeMap::new(),
            next_claim: 0,
            not_send: PhantomData,
        }
    }

    /// The node called `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn node(&self, name: &str) -> Result<&Node, Error> {
        self.nodes.get(name).ok_or_else(|| no_such_node(name))
    }

    /// Every node, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
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

    /// Commit: adds nodes that were prepared. Their claims on nodes that were there before are
    /// checked again, since those may have been taken meanwhile.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Exists`] or [`ErrorKind::Busy`], with the prepared nodes for
    /// [`Prepared::abort`]; the graph is as it was.
    pub fn insert(&mut self, prepared: Prepared) -> Result<(), (Error, Prepared)> {
        if let Err(error) = self.check_insert(&prepared) {
            return Err((error, prepared));
        }
        for mut node in prepared.nodes {
            for index in 0..node.children.len() {
                let child = Arc::clone(&node.children[index]);
                let claim = child_claim(&node, index);
                let id = self.grant(&child, claim);
                node.child_claims.push((child, id));
            }
            self.nodes.insert(Arc::clone(&node.name), node);
        }
        Ok(())
    }

    fn check_insert(&self, prepared: &Prepared) -> Result<(), Error> {
        for (place, node) in prepared.nodes.iter().enumerate() {
            let before = &prepared.nodes[..place];
            let twice = before.iter().any(|other| other.name == node.name);
            if twice || self.nodes.contains_key(&node.name) {
                return Err(Error::new(
                    ErrorKind::Exists,
                    format!("there is a node '{}' already", node.name),
                ));
            }
            for (index, child) in node.children.iter().enumerate() {
                // A child that is being inserted too has no other user, but may be read-only.
                let child = match before.iter().find(|other| other.name == *child) {
                    Some(child) => child,
                    None => self.node(child)?,
                };
                child.check_claim(&child_claim(node, index))?;
            }
        }
        Ok(())
    }

    fn grant(&mut self, node: &str, claim: Claim) -> ClaimId {
        let id = ClaimId(self.next_claim);
        self.next_claim += 1;
        let node = self.nodes.get_mut(node).expect("checked before commit");
        node.claims.insert(id, claim);
        id
    }

    /// Commit: lets somebody outside the graph use a node.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] that names who holds what;
    /// [`ErrorKind::PermissionDenied`] if the claim needs to write to a read-only node.
    pub fn claim(&mut self, name: &str, claim: Claim) -> Result<ClaimId, Error> {
        let node = self.node(name)?;
        if node.modes.read_only
            && claim
                .needs
                .intersects(Permissions::WRITE | Permissions::RESIZE)
        {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!(
                    "{} needs to write to node '{name}', which is read-only",
                    claim.who
                ),
            ));
        }
        permission::check(name, &claim, node.claims.values())?;
        Ok(self.grant(name, claim))
    }

    /// Commit: ends a claim.
    pub fn release(&mut self, name: &str, id: ClaimId) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.claims.remove(&id);
        }
    }

    /// Commit: takes a node that nobody uses out of the graph, with the children that only it used
    /// and that were opened with it. They are still open: see [`Prepared::abort`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] that names a user.
    pub fn remove(&mut self, name: &str) -> Result<Prepared, Error> {
        let node = self.node(name)?;
        if let Some(claim) = node.claims.values().next() {
            return Err(Error::busy(format!(
                "cannot remove node '{name}': {} uses it",
                claim.who
            )));
        }
        let mut nodes = Vec::new();
        let mut next = vec![Arc::clone(&node.name)];
        while let Some(name) = next.pop() {
            let node = self.nodes.remove(&name).expect("listed once, while there");
            for (child, id) in &node.child_claims {
                self.release(child, *id);
                let unused = self.nodes.get(child).is_some_and(|c| c.claims.is_empty());
                if unused && child.starts_with('#') {
                    next.push(Arc::clone(child));
                }
            }
            nodes.insert(0, node);
        }
        Ok(Prepared { nodes })
    }

    /// What requests through `root` need of the graph, if they come in multiples of
    /// `guest_block_bytes`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn plan(&self, root: &str, guest_block_bytes: u32) -> Result<Arc<Plan>, Error> {
        let mut nodes = Vec::new();
        self.plan_node(root, guest_block_bytes, &mut nodes)?;
        Ok(Plan::new(nodes))
    }

    fn plan_node(&self, name: &str, block: u32, nodes: &mut Vec<PlanNode>) -> Result<usize, Error> {
        let node = self.node(name)?;
        let index = nodes.len();
        let tracked = node.limits.request_alignment > block;
        nodes.push(PlanNode {
            name: Arc::clone(&node.name),
            io: Arc::clone(&node.io),
            limits: node.limits,
            modes: Modes::from(node.modes),
            children: Vec::new(),
            tracker: node.tracker.clone().filter(|_| tracked),
        });
        for child in &node.children {
            let child = self.plan_node(child, node.io.child_unit(block), nodes)?;
            nodes[index].children.push(child);
        }
        Ok(index)
    }
}

fn no_such_node(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no node '{name}'"))
}

/// What a node needs of its child at `index`.
fn child_claim(node: &Node, index: usize) -> Claim {
    let role = node.kind.children[index].role;
    let mut needs = Permissions::CONSISTENT_READ;
    let mut shares = Permissions::all();
    if !node.modes.read_only && role != Role::Backing {
        needs |= Permissions::WRITE | Permissions::RESIZE;
    }
    if node.kind.kind == DriverKind::Format {
        // Somebody else's writes below a format would change it unseen.
        shares -= Permissions::WRITE | Permissions::RESIZE;
    }
    Claim {
        who: format!("node '{}'", node.name),
        needs,
        shares,
    }
}

/// Nodes that are open and not in the graph: on their way in or out. Children come first.
pub struct Prepared {
    nodes: Vec<Node>,
}

impl Prepared {
    /// The topmost node's name.
    pub fn name(&self) -> &str {
        self.nodes.last().map_or("", Node::name)
    }

    /// Closes the nodes, topmost first.
    ///
    /// # Errors
    ///
    /// The first node's that could not write back what it held; the others are closed all the same.
    pub async fn abort(mut self, context: &Rc<IoContext>) -> Result<(), Error> {
        let mut outcome = Ok(());
        while let Some(mut node) = self.nodes.pop() {
            let closed = node.driver.close(Rc::clone(context)).await;
            outcome = outcome.and(closed);
        }
        outcome
    }
}

/// The control thread's hold on the graph: may be kept across an await, where `&mut Graph` may not.
#[derive(Clone)]
pub struct Control {
    graph: Rc<RefCell<Graph>>,
    context: Rc<IoContext>,
    next_name: Rc<Cell<u64>>,
}

impl Control {
    /// Control over `graph`, with `context` for its I/O.
    pub fn new(graph: Graph, context: Rc<IoContext>) -> Self {
        Self {
            graph: Rc::new(RefCell::new(graph)),
            context,
            next_name: Rc::default(),
        }
    }

    /// Looks at the graph.
    pub fn read<T>(&self, look: impl FnOnce(&Graph) -> T) -> T {
        look(&self.graph.borrow())
    }

    /// Changes the graph: for commit and abort.
    pub fn change<T>(&self, change: impl FnOnce(&mut Graph) -> T) -> T {
        change(&mut self.graph.borrow_mut())
    }

    /// The control thread's context.
    pub fn context(&self) -> &Rc<IoContext> {
        &self.context
    }

    /// Prepare: opens a node from its options, and the children that these describe.
    ///
    /// # Errors
    ///
    /// What was wrong with the options or could not be opened; everything opened on the way is
    /// closed again.
    pub async fn open(
        &self,
        options: Options,
        file: Option<Arc<OpenFile>>,
    ) -> Result<Prepared, Error> {
        if options.get("node-name").is_none_or(str::is_empty) {
            return Err(Error::invalid("a node needs a name: option 'node-name'"));
        }
        let mut nodes = Vec::new();
        match self
            .open_node(options, OpenModes::default(), file, &mut nodes)
            .await
        {
            Ok(_) => Ok(Prepared { nodes }),
            Err(error) => {
                let opened = Prepared { nodes };
                if let Err(second) = opened.abort(&self.context).await {
                    tracing::warn!(error = %second.report(), "while closing again");
                }
                Err(error)
            }
        }
    }

    fn open_node<'a>(
        &'a self,
        mut options: Options,
        inherited: OpenModes,
        file: Option<Arc<OpenFile>>,
        nodes: &'a mut Vec<Node>,
    ) -> LocalBoxFuture<'a, Result<OpenChild, Error>> {
        async move {
            let driver = options.get("driver").unwrap_or("").to_owned();
            if driver.is_empty() {
                return Err(Error::invalid("a node needs option 'driver'"));
            }
            let kind = self.read(|graph| graph.driver_type(&driver))?;
            let name = self.name_for(&mut options)?;
            let children = self
                .open_children(kind, &name, &mut options, inherited, file.clone(), nodes)
                .await?;
            let whose = format!("driver '{driver}' of node '{name}'");
            options.check(&[NODE_OPTIONS, kind.options], &whose)?;
            let modes = open_modes(&options, inherited);
            let opened = (kind.open)(OpenRequest {
                context: Rc::clone(&self.context),
                node_name: name.clone(),
                options,
                modes,
                file: file.filter(|_| kind.kind == DriverKind::Protocol),
                children: children.clone(),
            })
            .await?;
            let name: Arc<str> = name.into();
            nodes.push(Node {
                name: Arc::clone(&name),
                kind,
                driver: opened.driver,
                io: Arc::clone(&opened.io),
                limits: opened.limits,
                modes,
                children: children
                    .iter()
                    .map(|child| child.name.as_str().into())
                    .collect(),
                claims: BTreeMap::new(),
                child_claims: Vec::new(),
                tracker: (kind.kind == DriverKind::Protocol).then(Arc::default),
            });
            Ok(OpenChild {
                name: name.to_string(),
                io: opened.io,
                limits: opened.limits,
            })
        }
        .boxed_local()
    }

    fn name_for(&self, options: &mut Options) -> Result<String, Error> {
        let name = options.take("node-name").unwrap_or_default();
        if name.is_empty() {
            // Written so that no operator's name can be the same.
            let number = self.next_name.get();
            self.next_name.set(number + 1);
            return Ok(format!("#block{number:03}"));
        }
        let well_formed = name.len() < 32
            && name.starts_with(|letter: char| letter.is_ascii_alphabetic())
            && name
                .chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter));
        if !well_formed {
            return Err(Error::invalid(format!(
                "'{name}' cannot name a node: a name begins with a letter, goes on with letters, \
                 digits, '-', '.' and '_', and has at most 31 of them"
            )));
        }
        if self.read(|graph| graph.nodes.contains_key(name.as_str())) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("there is a node '{name}' already"),
            ));
        }
        Ok(name)
    }

    async fn open_children(
        &self,
        kind: &'static DriverType,
        name: &str,
        options: &mut Options,
        inherited: OpenModes,
        file: Option<Arc<OpenFile>>,
        nodes: &mut Vec<Node>,
    ) -> Result<Vec<OpenChild>, Error> {
        let mut children = Vec::new();
        for spec in kind.children {
            let reference = options.take(spec.name);
            let inline = options.take_nested(spec.name);
            let child = match (reference, inline.is_empty()) {
                (Some(node), true) => self.read(|graph| {
                    let node = graph.node(&node)?;
                    Ok(OpenChild {
                        name: node.name().to_owned(),
                        io: Arc::clone(&node.io),
                        limits: node.limits,
                    })
                })?,
                (None, false) => {
                    let modes = open_modes(options, inherited);
                    self.open_node(inline, modes, file.clone(), nodes).await?
                }
                (Some(_), false) => {
                    return Err(Error::invalid(format!(
                        "node '{name}' has both a reference and options for child '{}'",
                        spec.name
                    )));
                }
                (None, true) => {
                    return Err(Error::invalid(format!(
                        "driver '{}' of node '{name}' needs child '{}': a node's name, or its \
                         options as {}.driver=... and so on",
                        kind.name, spec.name, spec.name
                    )));
                }
            };
            children.push(child);
        }
        Ok(children)
    }
}

/// A node's modes: its own options, else what its parent was given.
fn open_modes(options: &Options, inherited: OpenModes) -> OpenModes {
    let own = |name: &str, inherited: bool| match options.get(name) {
        Some(text) => matches!(text, "on" | "yes" | "true" | "y" | "unmap"),
        None => inherited,
    };
    OpenModes {
        read_only: own("read-only", inherited.read_only),
        direct: own("cache.direct", inherited.direct),
        no_flush: own("cache.no-flush", inherited.no_flush),
        unmap: own("discard", inherited.unmap),
    }
}
