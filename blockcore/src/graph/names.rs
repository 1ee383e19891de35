//! What nodes are called, images opened by name, and the backing images that headers ask for.
//!
//! A format is never guessed unless the caller asks for it by name, in [`Change::add_image`]; what an
//! image's header says of its backing image counts, and where it says nothing of the format, the
//! operator has to. A raw image whose format was guessed refuses writes that would make it look like
//! another's: its guest could otherwise name any file of the host as its backing image.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::compile::View;
use super::open::{Inherited, WantedBacking};
use super::{Change, Control, Graph, NodeId};
use crate::driver::{BackingName, DriverKind, DriverType, OpenModes, PROBE_BYTES, Role};
use crate::engine::{HostCall, HostReply};
use crate::filename::{
    self, ChildPart, Described, NameSource, NodeParts, Protocol, Sameness, backing_overridden,
};
use crate::graph::open::NODE_OPTIONS;
use crate::graph::permission::Permissions;
use crate::io::RequestKind;
use crate::io::buffer::Segments;
use crate::options::Options;
use crate::{Error, ErrorKind};

/// The longest chain of backing images that is opened because headers ask for it: longer ones are a
/// mistake, or made to exhaust us.
const MAX_CHAIN: usize = 200;

impl Graph {
    /// What a node is called: a plain name if one says it all, else its options as a `json:` name.
    pub fn described(&self, id: NodeId) -> Described {
        described(&self.view(), id)
    }

    /// What relative names in a node's image are relative to: a directory with its final slash, or
    /// nothing for this process's own.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for a node that is in no directory.
    pub fn directory(&self, id: NodeId) -> Result<String, Error> {
        let name = place(&self.view(), id)?;
        filename::base_directory(&name).map(str::to_owned)
    }

    /// Where the backing image is that a node's header asks for; `None` if it asks for none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the name is relative and the node is in no directory.
    pub fn full_backing_name(&self, id: NodeId) -> Result<Option<String>, Error> {
        match self.nodes[&id].backing.clone() {
            None => Ok(None),
            Some(backing) => {
                let overlay = place(&self.view(), id).unwrap_or_default();
                filename::full_backing_name(&overlay, &backing.name)
            }
        }
    }

    /// Whether the backing node is another than the one that the header asks for, or there is none
    /// although it does.
    pub fn is_backing_overridden(&self, id: NodeId) -> bool {
        backing_is_overridden(&self.view(), id)
    }

    /// The words that names may begin with, and the drivers they lead to.
    fn protocols(&self) -> Vec<Protocol> {
        let types = self.types.iter();
        types
            .flat_map(|kind| {
                let prefixes = kind.prefixes.iter();
                prefixes.map(|(prefix, parse)| Protocol {
                    prefix,
                    driver: kind.name,
                    parse: *parse,
                })
            })
            .collect()
    }

    /// The options of the protocol node of an image called `name`.
    ///
    /// # Errors
    ///
    /// As [`filename::to_options`].
    pub fn options_of_name(&self, name: &str) -> Result<Options, Error> {
        filename::to_options(name, &self.protocols(), "file")
    }
}

pub(super) fn backing_is_overridden(view: &View<'_>, id: NodeId) -> bool {
    let attached = view.shape.child_with(id, Role::COW);
    let attached = attached.map(|edge| described(view, edge.child).name());
    is_overridden(view, id, attached)
}

/// As [`backing_is_overridden`], if the backing node that there is is called `attached`.
fn is_overridden(view: &View<'_>, id: NodeId, attached: Option<String>) -> bool {
    let node = view.node(id);
    let opened = node.backing_opened.as_deref();
    let header = match (&node.backing, opened) {
        (None, _) => "",
        (Some(_), Some(opened)) => opened,
        // It was not opened for that, but may be the one all the same.
        (Some(backing), None) => &backing.name,
    };
    backing_overridden(header, attached.as_deref())
}

/// From below, each node once: chains are long.
fn described(view: &View<'_>, id: NodeId) -> Described {
    let mut known = BTreeMap::new();
    let mut waiting = vec![id];
    while let Some(next) = waiting.last().copied() {
        let children = view.shape.children(next).map(|(_, edge)| edge.child);
        let unknown: Vec<_> = children
            .filter(|child| !known.contains_key(child))
            .collect();
        if !unknown.is_empty() {
            waiting.extend(unknown);
            continue;
        }
        waiting.pop();
        known.insert(next, describe_one(view, next, &known));
    }
    known.remove(&id).expect("the last one")
}

/// Describes a node whose children are described.
fn describe_one(view: &View<'_>, id: NodeId, below: &BTreeMap<NodeId, Described>) -> Described {
    let (node, vertex) = (view.node(id), view.shape.vertex(id));
    let attached = view.shape.child_with(id, Role::COW);
    let attached = attached.map(|edge| below[&edge.child].name());
    let overridden = is_overridden(view, id, attached);
    let children: Vec<_> = vertex
        .kind
        .children
        .iter()
        .enumerate()
        .filter_map(|(index, spec)| {
            let is_backing = spec.role.contains(Role::COW);
            match view.shape.child(id, index) {
                Some(edge) => {
                    let child = &below[&edge.child];
                    let from_image = match is_backing {
                        true => !overridden,
                        false => node.named_opened.get(&index) == Some(&child.name()),
                    };
                    Some((spec.name, from_image, Some(child)))
                }
                // Said only where the image asks for one.
                None => {
                    let is_cut = is_backing && node.backing.is_some();
                    is_cut.then_some((spec.name, !overridden, None))
                }
            }
        })
        .collect();
    let parts: Vec<_> = children
        .iter()
        .map(|(name, from_image, node)| ChildPart {
            name,
            node: *node,
            from_image: *from_image,
        })
        .collect();
    let source = match (&node.exact_name, vertex.kind.kind) {
        (None, DriverKind::Format) => NameSource::File,
        (name, _) => NameSource::Driver(name.clone()),
    };
    filename::describe(&NodeParts {
        driver: vertex.kind.name,
        kind: vertex.kind.kind,
        options: &node.options,
        tables: &[NODE_OPTIONS, vertex.kind.options],
        source,
        children: &parts,
    })
}

/// A name in the place where a node's image is.
fn place(view: &View<'_>, id: NodeId) -> Result<String, Error> {
    let mut at = id;
    loop {
        let node = view.node(at);
        if let Some(name) = &node.exact_name {
            return Ok(name.clone());
        }
        let driver = node.driver.try_take();
        if let Some(directory) = driver.and_then(|driver| driver.directory()) {
            return Ok(format!("{}/", directory.trim_end_matches('/')));
        }
        match view.shape.child_with(at, Role::PRIMARY) {
            Some(edge) => at = edge.child,
            None => {
                return Err(Error::invalid(format!(
                    "node '{}' is in no directory: names cannot be relative to it",
                    view.node(id).name()
                )));
            }
        }
    }
}

impl Change {
    pub(super) fn described(&self, id: NodeId) -> Described {
        self.control()
            .read(|graph| self.state().with_view(graph, |view| described(view, id)))
    }

    /// Opens the image called `name`: plain, with a protocol, or `json:` options. `options` are those of
    /// the topmost node, its format (`driver`) among them. Without a format, and with `probe`, it is
    /// guessed from the image's first bytes.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add); [`ErrorKind::Invalid`] without a format if it is not to be guessed.
    pub async fn add_image(
        &mut self,
        name: &str,
        mut options: Options,
        probe: bool,
    ) -> Result<NodeId, Error> {
        let below = self.control().read(|graph| graph.options_of_name(name))?;
        if let Some(driver) = options.get("driver") {
            let kind = self.control().read(|graph| graph.driver_type(driver))?;
            match kind.kind {
                DriverKind::Protocol => options.set_all(below),
                _ => options.set_nested("file", below),
            }
            return self.add(options, None).await;
        }
        let given = below.get("driver").map(str::to_owned);
        let kind =
            given.and_then(|driver| self.control().read(|graph| graph.driver_type(&driver).ok()));
        if kind.is_some_and(|kind| kind.kind != DriverKind::Protocol) {
            // A `json:` name says what format it is.
            options.set_all(below);
            return self.add(options, None).await;
        }
        if !probe {
            return Err(Error::invalid(format!(
                "the format of '{name}' is not said, and not guessed: name it with option 'driver'"
            )));
        }
        // Like any child's modes: what the format will be opened with.
        let modes = super::open::open_modes(&options, name)?;
        let role = Role::FILTERED | Role::PRIMARY;
        let file = self
            .open_node(below, Inherited::new(modes, role), None)
            .await?;
        let kind = self.probe(file).await?;
        let file_name = Arc::clone(&self.state().shape.vertex(file).name);
        options.set("driver", kind.name);
        options.set("file", &*file_name);
        let node = self.add(options, None).await?;
        self.state_mut().shape.vertex_mut(node).probed = true;
        Ok(node)
    }

    /// The driver whose probe scores highest on a node's first bytes.
    async fn probe(&mut self, node: NodeId) -> Result<&'static DriverType, Error> {
        let root = self.temporary_root(node, Permissions::CONSISTENT_READ);
        let bytes = root.bytes().min(PROBE_BYTES as u64);
        let head = Segments::allocate(bytes as usize, 1);
        let request = root.enter(RequestKind::Read, 0, bytes).await;
        request.read(0, head.clone()).await.map_err(|error| {
            let name = &self.state().shape.vertex(node).name;
            Error::new(
                ErrorKind::Io,
                format!("cannot read node '{name}' to find out its format: {error}"),
            )
        })?;
        let head = head.to_vec();
        let types = self.control().read(|graph| graph.types.clone());
        let scored = types.into_iter().filter_map(|kind| {
            let score = (kind.probe?)(&head);
            (score > 0).then_some((score, kind))
        });
        let best = scored.max_by_key(|(score, _)| *score);
        best.map(|(_, kind)| kind)
            .ok_or_else(|| Error::unsupported("no driver knows this image's format"))
    }

    /// Opens the backing image that a node's header asks for, and attaches it; then the one that this asks
    /// for, and so on.
    pub(super) async fn open_chain(
        &mut self,
        top: NodeId,
        wanted: WantedBacking,
    ) -> Result<(), Error> {
        let (mut links, mut next) = (Vec::new(), Some((top, wanted)));
        let mut opened = Ok(());
        while let Some((overlay, wanted)) = next.take() {
            let link = self.open_backing(overlay, &wanted).await;
            links.push((overlay, wanted.backing));
            self.chain_depth += 1;
            match link {
                Ok((child, below)) => next = below.map(|below| (child, below)),
                Err(error) => opened = Err(error),
            }
        }
        self.chain_depth -= links.len();
        // From below: what an image is called says what is below it.
        for (overlay, backing) in links.into_iter().rev() {
            let vertex = self.state().shape.vertex(overlay);
            match opened {
                Err(error) => {
                    let text = format!(
                        "cannot open backing image '{}' of node '{}': {}",
                        backing.name,
                        vertex.name,
                        error.report()
                    );
                    opened = Err(Error::new(error.kind(), text));
                }
                Ok(()) => {
                    let child = self.state().shape.child_with(overlay, Role::COW);
                    let name = self.described(child.expect("just attached").child).name();
                    let node = self.state_mut().nodes.get_mut(&overlay);
                    node.expect("just opened").backing_opened = Some(name);
                }
            }
        }
        opened
    }

    /// Opens one backing image without those below it, and attaches it. Returns what its own header asks for.
    async fn open_backing(
        &mut self,
        id: NodeId,
        wanted: &WantedBacking,
    ) -> Result<(NodeId, Option<WantedBacking>), Error> {
        let options = self.backing_options(id, &wanted.backing)?;
        let vertex = self.state().shape.vertex(id);
        let mut specs = vertex.kind.children.iter();
        let index = specs.position(|spec| spec.role.contains(Role::COW));
        let Some(index) = index else {
            return Err(Error::unsupported(format!(
                "driver '{}' of node '{}' cannot have a backing node",
                vertex.kind.name, vertex.name
            )));
        };
        let inherited = self.inherited_from_image(id, index, wanted.modes)?;
        let (child, below) = self.open_layer(options, inherited, None).await?;
        self.add_child(id, index, inherited.role(), child)?;
        self.prepare_permissions().await?;
        Ok((child, below))
    }

    /// Opens the children that a node's image names, and attaches them. Those that the options `said`
    /// something of are left alone.
    pub(super) async fn open_named_children(
        &mut self,
        id: NodeId,
        modes: OpenModes,
        said: &[bool],
    ) -> Result<(), Error> {
        let named = self.driver_of(id).take().named_children();
        for (index, named) in named {
            let vertex = self.state().shape.vertex(id);
            let (name, child) = (Arc::clone(&vertex.name), vertex.kind.children[index].name);
            let context = |error: Error| {
                Error::new(
                    error.kind(),
                    format!(
                        "cannot open '{}', which the image of node '{name}' names as its '{child}': {}",
                        named.name,
                        error.report()
                    ),
                )
            };
            if vertex.children[index].is_some() {
                continue;
            }
            if said[index] {
                return Err(Error::invalid(format!(
                    "node '{name}' cannot do without its child '{child}': its image has a part there"
                )));
            }
            let options = self.named_options(id, &named).map_err(context)?;
            let opened = self.open_from_image(id, index, modes, options).await;
            let opened = opened.map_err(context)?;
            let node = self.state_mut().nodes.get_mut(&id).expect("just opened");
            node.named_opened.insert(index, opened);
        }
        Ok(())
    }

    /// Opens a child because the image of a node asks for it, and attaches it; returns its name.
    async fn open_from_image(
        &mut self,
        id: NodeId,
        index: usize,
        modes: OpenModes,
        options: Options,
    ) -> Result<String, Error> {
        let inherited = self.inherited_from_image(id, index, modes)?;
        self.chain_depth += 1;
        let opened = self.open_node(options, inherited, None).await;
        self.chain_depth -= 1;
        let child = opened?;
        self.add_child(id, index, inherited.role(), child)?;
        self.prepare_permissions().await?;
        Ok(self.described(child).name())
    }

    /// What a child takes over from a node whose image asks for it.
    fn inherited_from_image(
        &self,
        id: NodeId,
        index: usize,
        modes: OpenModes,
    ) -> Result<Inherited, Error> {
        if self.chain_depth >= MAX_CHAIN {
            return Err(Error::invalid(format!(
                "the chain is longer than {MAX_CHAIN} images, or a loop"
            )));
        }
        let options = self.control().read(|graph| {
            let node = self.state().node(graph, id);
            node.expect("just opened").options.clone()
        });
        Ok(Inherited::new(modes, self.child_role(id, &options, index)))
    }

    /// The options of an image that another one names, and not as its backing image. The name is a path
    /// whatever it looks like; without a format, or with `raw`, it is the file itself.
    fn named_options(&self, id: NodeId, named: &BackingName) -> Result<Options, Error> {
        let place = self
            .control()
            .read(|graph| self.state().with_view(graph, |view| place(view, id)))?;
        let path = filename::combine(&place, &named.name)?;
        let plain = filename::of_path(&path);
        let plain = plain.ok_or_else(|| Error::invalid("its header gives it an empty name"))?;
        let below = self.control().read(|graph| graph.options_of_name(&plain))?;
        let format = named.format.as_deref().filter(|format| *format != "raw");
        let Some(format) = format else {
            return Ok(below);
        };
        let kind = self.control().read(|graph| graph.driver_type(format))?;
        let mut options = Options::default();
        options.set("driver", kind.name);
        options.set_nested("file", below);
        Ok(options)
    }

    /// The options of the backing image that a header names.
    fn backing_options(&self, id: NodeId, backing: &BackingName) -> Result<Options, Error> {
        let overlay = self.control().read(|graph| {
            self.state()
                .with_view(graph, |view| place(view, id).unwrap_or_default())
        });
        let Some(full) = filename::full_backing_name(&overlay, &backing.name)? else {
            return Err(Error::invalid("its header gives it an empty name"));
        };
        let below = self.control().read(|graph| graph.options_of_name(&full))?;
        let kind_of = |driver: &str| self.control().read(|graph| graph.driver_type(driver));
        let said = below.get("driver").map(kind_of).transpose()?;
        if said.is_some_and(|kind| kind.kind != DriverKind::Protocol) {
            return Ok(below);
        }
        let Some(format) = &backing.format else {
            return Err(Error::invalid(format!(
                "its format is not recorded, and not guessed: say it with 'backing.driver=...' and \
                 'backing.file.filename={full}', or record it (qemu-img rebase -u -F FORMAT)"
            )));
        };
        let kind = kind_of(format)?;
        if kind.kind == DriverKind::Protocol {
            return Ok(below);
        }
        let mut options = Options::default();
        options.set("driver", kind.name);
        options.set_nested("file", below);
        Ok(options)
    }
}

impl Control {
    /// Rewrites what a node's header says of its backing image, and nothing else.
    ///
    /// # Errors
    ///
    /// As [`Driver::change_backing`](crate::driver::Driver::change_backing).
    pub async fn change_backing_name(
        &self,
        node: NodeId,
        backing: Option<BackingName>,
    ) -> Result<(), Error> {
        let mut change = self.begin().await;
        change
            .drain(crate::drain::Scope::Nodes([node].into()))
            .await;
        let root = change.temporary_root(node, Permissions::all());
        let driver = change.driver_of(node);
        let changed = driver.take().change_backing(root, backing).await;
        // The commit looks at the header anew.
        let finished = change.prepare().await?.commit().finish().await;
        changed.and(finished)
    }

    /// The layer of the chain of `top` whose image is called `name`, as an operator writes it: relative
    /// to the overlay that has it, or absolute. Never relative to this process's directory.
    pub async fn find_in_chain(&self, top: NodeId, name: &str) -> Option<NodeId> {
        let layers = self.read(|graph| {
            let mut layers = Vec::new();
            let mut overlay = graph.skip_filters(top);
            while let Some(below) = graph.backing_chain_next(overlay) {
                let place = place(&graph.view(), overlay).unwrap_or_default();
                let live = graph.described(below).exact;
                let header = graph.nodes[&overlay].backing.clone();
                let names = [live, header.map(|backing| backing.name)];
                layers.push((below, place, names));
                overlay = below;
            }
            layers
        });
        for (node, overlay, names) in layers {
            for known in names.into_iter().flatten() {
                let same = match filename::same_backing(name, &overlay, &known) {
                    Sameness::Same => true,
                    Sameness::Different => false,
                    Sameness::IfCanonical { one, other } => self.are_same_path(one, other).await,
                };
                if same {
                    return Some(node);
                }
            }
        }
        None
    }

    async fn are_same_path(&self, one: String, other: String) -> bool {
        let mut paths = Vec::new();
        for path in [one, other] {
            match self.context.host(HostCall::Canonical(path.into())).await {
                Ok(HostReply::Path(path)) => paths.push(path),
                // A path that has no canonical form is nobody's.
                _ => return false,
            }
        }
        paths[0] == paths[1]
    }
}
