//! Opening nodes from their options.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::node::DriverCell;
use super::shape::Vertex;
use super::{Change, Control, Node, NodeId};
use crate::dirty_bitmap::BitmapSet;
use crate::driver::{
    BackingName, DetectZeroes, DriverKind, DriverType, OpenChild, OpenModes, OpenRequest, Role,
};
use crate::engine::OpenFile;
use crate::node::NodeState;
use crate::options::{ChildOption, OptionKind, OptionSpec, Options, parse_bool};
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
        name: "active",
        kind: OptionKind::Bool,
        default: Some("on"),
        reopen: false,
        changes_data: false,
        help: "off: another process owns the image for now, until the node is made active",
    },
    OptionSpec {
        name: "auto-read-only",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "open for writing only while somebody writes, and only reading where writing is refused",
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
        name: "detect-zeroes",
        kind: OptionKind::Choice(&["off", "on", "unmap"]),
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "whether written zeroes become zeroed ranges",
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
    OptionSpec {
        name: "force-share",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "let others change the image meanwhile; for looking at one that is in use",
    },
];

impl Control {
    /// Opens a node and those that its options describe, in a change of its own.
    ///
    /// # Errors
    ///
    /// As [`Change::add`] and [`Change::prepare`]; nothing is left open.
    pub async fn add(&self, options: Options) -> Result<NodeId, Error> {
        let mut change = self.begin().await;
        let opened = match change.add(options, None).await {
            Ok(node) => change.prepare().await.map(|prepared| (node, prepared)),
            Err(error) => {
                change.abort().await;
                Err(error)
            }
        };
        let (node, prepared) = opened?;
        prepared.commit().finish().await?;
        Ok(node)
    }

    /// Closes a node that was added, in a change of its own.
    ///
    /// # Errors
    ///
    /// As [`Change::remove`]; or what could not be written back: the node is gone then.
    pub async fn remove(&self, name: &str) -> Result<(), Error> {
        let mut change = self.begin().await;
        change.remove(name)?;
        change.prepare().await?.commit().finish().await
    }

    /// Closes every node that was added and that nobody uses, with those below.
    ///
    /// # Errors
    ///
    /// The first node's that could not write back what it held; the others are closed all the same.
    pub async fn close_all(&self) -> Result<(), Error> {
        let mut outcome = Ok(());
        loop {
            let unused = self.read(|graph| {
                let mut nodes = graph.shape.nodes();
                let unused = nodes
                    .find(|(id, vertex)| vertex.owned && graph.shape.parents(*id).next().is_none());
                unused.map(|(_, vertex)| vertex.name.to_string())
            });
            let Some(name) = unused else { return outcome };
            let closed = self.remove(&name).await;
            if self.read(|graph| graph.node(&name).is_ok()) {
                // It would be found again for ever.
                return outcome.and(closed);
            }
            outcome = outcome.and(closed);
        }
    }

    /// A name that no operator's node can have.
    pub(super) fn make_name(&self) -> String {
        let number = self.next_name.get();
        self.next_name.set(number + 1);
        format!("#block{number:03}")
    }
}

/// How the parent was opened, and what that makes the defaults of its child's modes.
#[derive(Clone, Copy)]
pub(super) struct Inherited {
    modes: OpenModes,
    role: Option<Role>,
}

impl Inherited {
    /// No parent: the defaults are those of the table.
    pub(super) const NOTHING: Self = Self {
        modes: OpenModes {
            read_only: false,
            auto_read_only: false,
            direct: false,
            no_flush: false,
            unmap: false,
            detect_zeroes: DetectZeroes::Off,
            force_share: false,
            inactive: false,
            check: false,
        },
        role: None,
    };

    /// As that, for an image that is opened to be checked.
    pub(super) const TO_CHECK: Self = Self {
        modes: OpenModes {
            check: true,
            ..Self::NOTHING.modes
        },
        role: None,
    };

    pub(super) fn new(modes: OpenModes, role: Role) -> Self {
        Self {
            modes,
            role: Some(role),
        }
    }

    /// What the child is to its parent.
    pub(super) fn role(self) -> Role {
        self.role.unwrap_or_else(Role::empty)
    }

    /// What a child's modes are where its options do not say: the cache modes and forced sharing of its
    /// parent; a backing node is only read, and others write where the parent may. Discards that have
    /// come through the parent are honoured.
    fn defaults(self) -> OpenModes {
        let Some(role) = self.role else {
            return self.modes;
        };
        let modes = OpenModes {
            check: false,
            ..self.modes
        };
        if role.contains(Role::COW) {
            return OpenModes {
                read_only: true,
                auto_read_only: false,
                unmap: false,
                detect_zeroes: DetectZeroes::Off,
                ..modes
            };
        }
        OpenModes {
            unmap: true,
            detect_zeroes: DetectZeroes::Off,
            ..modes
        }
    }
}

/// A backing image that a header asks for, and that is to be opened.
pub(super) struct WantedBacking {
    /// Of the node that asks.
    pub(super) modes: OpenModes,
    pub(super) backing: BackingName,
}

/// A node's modes: its own options, else what follows from its parent's.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for modes that exclude each other.
pub fn open_modes(options: &Options, node: &str) -> Result<OpenModes, Error> {
    modes_of(options, Inherited::NOTHING, node)
}

pub(super) fn modes_of(
    options: &Options,
    inherited: Inherited,
    node: &str,
) -> Result<OpenModes, Error> {
    let defaults = inherited.defaults();
    let own = |name: &str, default: bool| match options.get(name) {
        Some(text) => parse_bool(text).unwrap_or(default),
        None => default,
    };
    let modes = OpenModes {
        read_only: own("read-only", defaults.read_only),
        auto_read_only: own("auto-read-only", defaults.auto_read_only),
        direct: own("cache.direct", defaults.direct),
        no_flush: own("cache.no-flush", defaults.no_flush),
        unmap: match options.get("discard") {
            Some(text) => text == "unmap",
            None => defaults.unmap,
        },
        detect_zeroes: match options.get("detect-zeroes") {
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            _ => DetectZeroes::Off,
        },
        force_share: own("force-share", defaults.force_share),
        inactive: !own("active", true),
        check: defaults.check,
    };
    if modes.force_share && !modes.read_only {
        return Err(Error::invalid(format!(
            "node '{node}' cannot have 'force-share=on' without 'read-only=on'"
        )));
    }
    if modes.detect_zeroes == DetectZeroes::Unmap && !modes.unmap {
        return Err(Error::invalid(format!(
            "node '{node}' cannot have 'detect-zeroes=unmap' without 'discard=unmap'"
        )));
    }
    Ok(modes)
}

impl Change {
    /// Opens a node from its options, and the children that these describe. `file` is used for the
    /// protocol node below instead of opening one by name.
    ///
    /// # Errors
    ///
    /// What was wrong with the options or could not be opened. The change is to be given up then, which
    /// closes what was opened on the way.
    pub async fn add(
        &mut self,
        options: Options,
        file: Option<Arc<OpenFile>>,
    ) -> Result<NodeId, Error> {
        if options.get("node-name").is_none_or(str::is_empty) {
            return Err(Error::invalid("a node needs a name: option 'node-name'"));
        }
        let node = self.open_node(options, Inherited::NOTHING, file).await?;
        self.state_mut().shape.vertex_mut(node).owned = true;
        Ok(node)
    }

    /// As [`add`](Self::add), for a node that belongs to whoever attaches it: with no name of its own it
    /// gets one, and it goes when nobody uses it.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn open(&mut self, options: Options) -> Result<NodeId, Error> {
        self.open_node(options, Inherited::NOTHING, None).await
    }

    /// Opens a node with all that is below it. Recurses as deep as the options are nested, and no deeper:
    /// how long a chain of images is, the images say.
    pub(super) fn open_node(
        &mut self,
        options: Options,
        inherited: Inherited,
        file: Option<Arc<OpenFile>>,
    ) -> LocalBoxFuture<'_, Result<NodeId, Error>> {
        async move {
            let (id, backing) = self.open_layer(options, inherited, file).await?;
            if let Some(backing) = backing {
                self.open_chain(id, backing).await?;
            }
            Ok(id)
        }
        .boxed_local()
    }

    /// As [`open_node`](Self::open_node), but for the backing image that the node's header asks for: returns
    /// it if it is to be opened.
    pub(super) fn open_layer(
        &mut self,
        mut options: Options,
        inherited: Inherited,
        file: Option<Arc<OpenFile>>,
    ) -> LocalBoxFuture<'_, Result<(NodeId, Option<WantedBacking>), Error>> {
        async move {
            let driver = options.get("driver").unwrap_or("").to_owned();
            if driver.is_empty() {
                return Err(Error::invalid("a node needs option 'driver'"));
            }
            let kind = self.control().read(|graph| graph.driver_type(&driver))?;
            let name = self.name_for(&mut options)?;
            let mut modes = modes_of(&options, inherited, &name)?;
            let said: Vec<_> = kind
                .children
                .iter()
                .map(|spec| {
                    let nested = format!("{}.", spec.name);
                    let mut keys = options.iter().map(|(key, _)| key);
                    keys.any(|key| key == spec.name || key.starts_with(&nested))
                })
                .collect();
            let mut specs = kind.children.iter().zip(&said);
            let backing_is_said = specs.any(|(spec, said)| *said && spec.role.contains(Role::COW));
            let children = self
                .open_children(kind, &name, &mut options, modes, file.clone())
                .await?;
            let whose = format!("driver '{driver}' of node '{name}'");
            options.check(&[NODE_OPTIONS, kind.options], &whose)?;
            let id = self.add_vertex(kind, &name, modes, &options, &children)?;
            self.check_active(id)?;
            // Others are kept out before the driver looks at what its children hold.
            if let Err(error) = self.prepare_permissions().await {
                let denied = error.kind() == ErrorKind::PermissionDenied;
                if !denied || modes.read_only || !modes.auto_read_only {
                    return Err(error);
                }
                // What it is in may only be read, and reading will do.
                modes.read_only = true;
                self.state_mut().shape.vertex_mut(id).modes = modes;
                self.prepare_permissions().await?;
            }
            let file = file.filter(|_| kind.kind == DriverKind::Protocol);
            self.open_driver(id, kind, options.clone(), modes, file)
                .await?;
            let base = self.driver_of(id).take().keeps_chain_to();
            self.state_mut().shape.vertex_mut(id).keeps_chain_to = base;
            if self.update_roles(id, &options) {
                self.prepare_permissions().await?;
            }
            self.open_named_children(id, modes, &said).await?;
            let backing = self.state().nodes[&id].backing.clone();
            let backing = backing.filter(|_| !backing_is_said && !modes.check);
            Ok((id, backing.map(|backing| WantedBacking { modes, backing })))
        }
        .boxed_local()
    }

    /// What is active is not above what another process may change.
    fn check_active(&self, id: NodeId) -> Result<(), Error> {
        let shape = &self.state().shape;
        let parent = shape.vertex(id);
        if parent.modes.inactive {
            return Ok(());
        }
        for (index, edge) in shape.children(id) {
            let child = shape.vertex(edge.child);
            if child.modes.inactive {
                return Err(Error::invalid(format!(
                    "Inactive '{}' can't be a {} child of active '{}'",
                    child.name, parent.kind.children[index].name, parent.name
                )));
            }
        }
        Ok(())
    }

    fn name_for(&self, options: &mut Options) -> Result<String, Error> {
        let name = options.take("node-name").unwrap_or_default();
        if name.is_empty() {
            return Ok(self.control().make_name());
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
        self.check_free(&name)?;
        Ok(name)
    }

    fn check_free(&self, name: &str) -> Result<(), Error> {
        match self.find(name) {
            Err(_) => Ok(()),
            Ok(_) => Err(Error::new(
                ErrorKind::Exists,
                format!("there is a node '{name}' already"),
            )),
        }
    }

    async fn open_children(
        &mut self,
        kind: &'static DriverType,
        name: &str,
        options: &mut Options,
        modes: OpenModes,
        file: Option<Arc<OpenFile>>,
    ) -> Result<BTreeMap<usize, NodeId>, Error> {
        let mut children = BTreeMap::new();
        for (index, spec) in kind.children.iter().enumerate() {
            let given = options.take_child(spec.name).map_err(|error| {
                Error::invalid(format!(
                    "node '{name}' has both a reference and options, or neither: {error}"
                ))
            })?;
            let child = match given {
                Some(ChildOption::Node(node)) => self.find(&node)?,
                Some(ChildOption::Inline(inline)) => {
                    let role = kind.child_role(options, index);
                    let inherited = Inherited::new(modes, role);
                    self.open_node(inline, inherited, file.clone()).await?
                }
                None | Some(ChildOption::Absent) if spec.optional => continue,
                None | Some(ChildOption::Absent) => {
                    return Err(Error::invalid(format!(
                        "driver '{}' of node '{name}' needs child '{}': a node's name, or its \
                         options as {}.driver=... and so on",
                        kind.name, spec.name, spec.name
                    )));
                }
            };
            children.insert(index, child);
        }
        Ok(children)
    }

    fn add_vertex(
        &mut self,
        kind: &'static DriverType,
        name: &str,
        modes: OpenModes,
        options: &Options,
        children: &BTreeMap<usize, NodeId>,
    ) -> Result<NodeId, Error> {
        // Again: one of the children may have taken it.
        self.check_free(name)?;
        let id = NodeId(self.control().read(super::Graph::next_id));
        let vertex = Vertex::new(name.into(), kind, modes);
        self.state_mut().shape.add_node(id, vertex);
        for (index, child) in children {
            let role = kind.child_role(options, *index);
            self.add_child(id, *index, role, *child)?;
        }
        Ok(id)
    }

    /// What the child at `index` of a node with these options is to it: for a driver that has opened to
    /// say, first of all.
    pub(super) fn child_role(&self, id: NodeId, options: &Options, index: usize) -> Role {
        let by_image = self.control().read(|graph| {
            let node = self.state().node(graph, id)?;
            node.driver.take().child_role(index)
        });
        let kind = self.state().shape.vertex(id).kind;
        by_image.unwrap_or_else(|| kind.child_role(options, index))
    }

    /// Works out anew what children are to a node; returns whether that has changed.
    pub(super) fn update_roles(&mut self, id: NodeId, options: &Options) -> bool {
        let edges = self.state().shape.vertex(id).children.clone();
        let mut changed = false;
        for (index, edge) in edges.into_iter().enumerate() {
            let Some(edge) = edge else { continue };
            let role = self.child_role(id, options, index);
            let edge = self.state_mut().shape.edge_mut(edge);
            changed |= std::mem::replace(&mut edge.role, role) != role;
        }
        changed
    }

    /// The children of a node as its driver sees them.
    pub(super) fn open_children_of(&self, id: NodeId) -> Vec<Option<OpenChild>> {
        let shape = &self.state().shape;
        let indices = 0..shape.vertex(id).children.len();
        let children = indices.map(|index| {
            let edge = shape.child(id, index)?;
            let limits = self.control().read(|graph| {
                self.state()
                    .with_view(graph, |view| view.limits(edge.child))
            });
            Some(OpenChild {
                name: shape.vertex(edge.child).name.to_string(),
                root: self.temporary_root(edge.child, edge.needs),
                limits,
            })
        });
        children.collect()
    }

    async fn open_driver(
        &mut self,
        id: NodeId,
        kind: &'static DriverType,
        options: Options,
        modes: OpenModes,
        file: Option<Arc<OpenFile>>,
    ) -> Result<(), Error> {
        let name = Arc::clone(&self.state().shape.vertex(id).name);
        let mut opened = (kind.open)(OpenRequest {
            context: Rc::clone(self.control().context()),
            node_name: name.to_string(),
            options: options.clone(),
            modes,
            children: self.open_children_of(id),
            file,
            find_bitmap: self.control().find_bitmap(),
            throttle_groups: self.control().throttle_groups().clone(),
            credentials: self.control().credentials().clone(),
            runtime_directory: self.control().runtime_directory(),
        })
        .await?;
        let notices = Arc::clone(&self.control().notices);
        let kept = opened.driver.take_bitmaps();
        let node = Node {
            id,
            kind,
            options,
            exact_name: opened.driver.exact_name(),
            backing: opened.driver.backing(),
            backing_opened: None,
            named_opened: BTreeMap::new(),
            driver: DriverCell::new(opened.driver),
            io: opened.io,
            state: NodeState::new(id, Arc::clone(&name), notices),
            limits: crate::driver::Limits::default(),
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
        let node = self.state_mut().nodes.get_mut(&id);
        let node = node.expect("just opened");
        node.limits = limits;
        let bytes = node.state.bytes();
        node.bitmaps = BitmapSet::new(name, bytes);
        let read_only = modes.read_only || modes.inactive;
        node.bitmaps
            .load(kept.unwrap_or_default(), bytes, read_only);
        Ok(())
    }
}
