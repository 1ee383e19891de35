//! Reopening nodes: another state of their options, modes and children, as one change.
//!
//! What an entry leaves out returns to its default; what may not change has to stay as it is. The
//! driver and the node's name never change. The rules are those of QEMU's `blockdev-reopen`.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use super::node::DriverCell;
use super::open::{Inherited, NODE_OPTIONS, modes_of};
use super::{Change, Control, NodeId};
use crate::Error;
use crate::drain::Scope;
use crate::driver::{ReopenRequest, Role};
use crate::io::{RequestKind, Root};
use crate::options::{ChildOption, Options};

/// A node whose driver has prepared to be reopened.
pub(super) struct Reopening {
    pub(super) id: NodeId,
    pub(super) driver: DriverCell,
    pub(super) options: Options,
}

impl Control {
    /// Reopens nodes, in a change of its own: all of them, or none.
    ///
    /// # Errors
    ///
    /// As [`Change::reopen`] and [`Change::prepare`]; everything is as it was.
    pub async fn reopen(&self, entries: Vec<Options>) -> Result<(), Error> {
        let mut change = self.begin().await;
        if let Err(error) = change.reopen(entries).await {
            change.abort().await;
            return Err(error);
        }
        change.prepare().await?.commit().finish().await
    }
}

impl Change {
    /// Reopens nodes, each named by option `node-name`. A child may be given as options (it is reopened
    /// with them), as the name it has (it keeps its options), as another node's name (which takes its
    /// place) or, where the driver can do without, as an empty name.
    ///
    /// The nodes stay drained until the change is over.
    ///
    /// # Errors
    ///
    /// What may not change, or what a driver could not do; a loop, a frozen link, a missing child. The
    /// change is to be given up then.
    pub async fn reopen(&mut self, entries: Vec<Options>) -> Result<(), Error> {
        let mut queue = Vec::new();
        for entry in entries {
            let Some(name) = entry.get("node-name").filter(|name| !name.is_empty()) else {
                return Err(Error::invalid(
                    "an entry to reopen needs the node's name: option 'node-name'",
                ));
            };
            let node = self.find(name)?;
            self.enqueue(node, entry, Inherited::NOTHING, &mut queue)?;
        }
        let nodes: BTreeSet<_> = queue.iter().map(|entry| entry.node).collect();
        if nodes.len() < queue.len() {
            return Err(Error::invalid("a node to reopen is named twice"));
        }
        // A later entry may have cut off what an earlier one names.
        if let Some(gone) = queue
            .iter()
            .find(|entry| !self.state().shape.contains(entry.node))
        {
            return Err(Error::invalid(format!(
                "cannot reopen node '{}': another node takes its place, and nobody else uses it",
                gone.name
            )));
        }
        self.reopen_queue(nodes, queue).await
    }

    /// Has nodes opened for writing that may only be read, or the other way round, with the files below
    /// them: for a job that writes to an image which others only read. Options stay as they were given.
    ///
    /// The nodes stay drained until the change is over.
    ///
    /// # Errors
    ///
    /// As [`reopen`](Self::reopen).
    pub(crate) async fn set_read_only(
        &mut self,
        node: NodeId,
        read_only: bool,
    ) -> Result<(), Error> {
        let mut queue: Vec<Entry> = Vec::new();
        let mut next = vec![node];
        while let Some(id) = next.pop() {
            let vertex = self.state().shape.vertex(id);
            if vertex.modes.read_only == read_only || queue.iter().any(|entry| entry.node == id) {
                continue;
            }
            let options = self.control().read(|graph| {
                let node = self.state().node(graph, id);
                let node = node.expect("every vertex of a shape has a node");
                node.options.clone()
            });
            queue.push(Entry {
                node: id,
                name: Arc::clone(&vertex.name),
                options,
                before: vertex.modes,
                modes: crate::driver::OpenModes {
                    read_only,
                    ..vertex.modes
                },
                root: None,
            });
            let shape = &self.state().shape;
            let below = shape.children(id).map(|(_, edge)| edge);
            // A backing image stays as it is, and a file that others have by name is theirs to open.
            let own = below
                .filter(|edge| !edge.role.contains(Role::COW) && !shape.vertex(edge.child).owned);
            next.extend(own.map(|edge| edge.child));
        }
        let nodes = queue.iter().map(|entry| entry.node).collect();
        self.reopen_queue(nodes, queue).await
    }

    async fn reopen_queue(
        &mut self,
        nodes: BTreeSet<NodeId>,
        mut queue: Vec<Entry>,
    ) -> Result<(), Error> {
        self.drain(Scope::Subtrees(nodes)).await;
        for entry in &mut queue {
            entry.root = self.flush_before(entry).await?;
        }
        for entry in &queue {
            self.state_mut().shape.vertex_mut(entry.node).modes = entry.modes;
        }
        // Children before parents: these may look at what they are going to have.
        for entry in queue.into_iter().rev() {
            let has_children = self.state().shape.children(entry.node).next().is_some();
            if has_children && entry.before.read_only && !entry.modes.read_only {
                // Its driver may write to what holds it at once.
                self.prepare_permissions().await?;
            }
            self.reopen_driver(entry).await?;
        }
        Ok(())
    }

    fn enqueue(
        &mut self,
        node: NodeId,
        mut options: Options,
        inherited: Inherited,
        queue: &mut Vec<Entry>,
    ) -> Result<(), Error> {
        let vertex = self.state().shape.vertex(node).clone();
        let name = &vertex.name;
        if let Some(driver) = options.get("driver")
            && driver != vertex.kind.name
        {
            return Err(Error::invalid(format!(
                "cannot change the option 'driver' of node '{name}': it is '{}'",
                vertex.kind.name
            )));
        }
        options.set("driver", vertex.kind.name);
        options.take("node-name");
        let modes = modes_of(&options, inherited, name)?;
        let place = queue.len();
        queue.push(Entry {
            node,
            name: Arc::clone(name),
            options: Options::default(),
            before: vertex.modes,
            modes,
            root: None,
        });
        for (index, spec) in vertex.kind.children.iter().enumerate() {
            let given = options.take_child(spec.name)?;
            let current = self.state().shape.child(node, index).map(|edge| edge.child);
            match given {
                Some(ChildOption::Inline(inline)) => {
                    let Some(child) = current else {
                        return Err(Error::invalid(format!(
                            "node '{name}' has no child '{}' to reopen: add it first and name it",
                            spec.name
                        )));
                    };
                    let given = inline.get("node-name");
                    let child_name = &self.state().shape.vertex(child).name;
                    if given.is_some_and(|given| given != &**child_name) {
                        return Err(Error::invalid(format!(
                            "child '{}' of node '{name}' is node '{child_name}': options for another \
                             node cannot take its place; add that node first and name it",
                            spec.name
                        )));
                    }
                    let role = self.child_role(node, &options, index);
                    self.enqueue(child, inline, Inherited::new(modes, role), queue)?;
                }
                Some(ChildOption::Node(wanted)) => {
                    let wanted = self.find(&wanted)?;
                    if Some(wanted) != current {
                        self.replace_on_reopen(node, spec, index, Some(wanted))?;
                    }
                }
                Some(ChildOption::Absent) => {
                    if current.is_some() {
                        self.replace_on_reopen(node, spec, index, None)?;
                    }
                }
                None => self.check_left_out(node, spec, current)?,
            }
        }
        let whose = format!("driver '{}' of node '{name}'", vertex.kind.name);
        options.check(&[NODE_OPTIONS, vertex.kind.options], &whose)?;
        queue[place].options = options;
        Ok(())
    }

    /// A child that was left out keeps its place, but a backing node has to be named: whether it stays
    /// decides what the guest reads.
    fn check_left_out(
        &self,
        node: NodeId,
        spec: &crate::driver::ChildSpec,
        current: Option<NodeId>,
    ) -> Result<(), Error> {
        let vertex = self.state().shape.vertex(node);
        let in_header = self.control().read(|graph| {
            let node = graph.node_by_id(node);
            node.is_some_and(|node| node.backing_in_header().is_some())
        });
        if spec.role.contains(Role::COW) && (current.is_some() || in_header) {
            return Err(Error::invalid(format!(
                "{} is missing for '{}'",
                spec.name, vertex.name
            )));
        }
        Ok(())
    }

    fn replace_on_reopen(
        &mut self,
        node: NodeId,
        spec: &crate::driver::ChildSpec,
        index: usize,
        wanted: Option<NodeId>,
    ) -> Result<(), Error> {
        let shape = &self.state().shape;
        let name = Arc::clone(&shape.vertex(node).name);
        if !matches!(spec.name, "file" | "backing") {
            return Err(Error::invalid(format!(
                "cannot replace child '{}' of node '{name}': only 'file' and 'backing' can be",
                spec.name
            )));
        }
        let current = shape.child(node, index).map(|edge| edge.child);
        if let Some(current) = current
            && shape.vertex(current).implicit
        {
            return Err(Error::busy(format!(
                "cannot replace child '{}' of node '{name}': a job has put a filter there",
                spec.name
            )));
        }
        self.set_child(node, spec.name, wanted)
    }

    /// A node that will not be written to any more keeps nothing back. Gives a root at a node that writes.
    async fn flush_before(&mut self, entry: &Entry) -> Result<Option<Rc<Root>>, Error> {
        if entry.before.read_only || entry.before.inactive {
            return Ok(None);
        }
        // Through the children that it has had until now.
        let everything = super::permission::Permissions::all();
        let plan = self.control().read(|graph| {
            let view = graph.view();
            let known = graph.node_by_id(entry.node).is_some();
            known.then(|| view.plan(entry.node, everything, &view.tracked()))
        });
        let root = match plan {
            Some(plan) => self.control().unused_root(plan),
            None => self.temporary_root(entry.node, everything),
        };
        // Whoever wrote has been told by then.
        let known_lost = root.plan().files().any(|file| file.flush_lost());
        let request = root.enter(RequestKind::Flush, 0, 0).await;
        let name = &self.state().shape.vertex(entry.node).name;
        let still_good = request.flush().await;
        match still_good {
            Ok(()) => {}
            // That is what reopening is for.
            Err(crate::IoError::FlushLost) if known_lost => {}
            Err(error) => {
                return Err(Error::new(
                    crate::ErrorKind::Io,
                    format!("cannot flush node '{name}' before it is reopened: {error}"),
                ));
            }
        }
        drop(request);
        if !entry.modes.read_only && !entry.modes.inactive {
            if still_good.is_ok() {
                // The driver may read them anew.
                self.store_bitmaps(entry.node, &root).await?;
            }
            return Ok(Some(root));
        }
        self.store_bitmaps(entry.node, &root).await?;
        let driver = self.driver_of(entry.node);
        driver.take().stop_writing(Rc::clone(&root)).await?;
        Ok(Some(root))
    }

    async fn reopen_driver(&mut self, entry: Entry) -> Result<(), Error> {
        let (id, kind) = (entry.node, self.state().shape.vertex(entry.node).kind);
        let before = self.control().read(|graph| {
            let node = self.state().node(graph, id);
            let node = node.expect("every vertex of a shape has a node");
            node.options.clone()
        });
        let name = self.state().shape.vertex(id).name.to_string();
        let mut options = entry.options;
        let is_fixed = |name: &str| {
            let mut specs = kind.options.iter();
            specs.any(|spec| spec.is_key(name) && !spec.reopen)
        };
        for (key, had) in before.iter().filter(|(key, _)| is_fixed(key)) {
            // What cannot change may be left out.
            if options.value(key).is_none() {
                options.set_value(key, had.clone());
            }
        }
        let changed = before.differences(&options, &[kind.options]);
        if let Some(option) = changed.iter().find(|name| is_fixed(name)) {
            return Err(Error::invalid(format!(
                "cannot change the option '{option}' of node '{name}'"
            )));
        }
        self.update_roles(id, &options);
        // As far as the shape says now: who writes to the node once the change is done.
        let writes = super::permission::Permissions::WRITE
            | super::permission::Permissions::WRITE_UNCHANGED
            | super::permission::Permissions::RESIZE;
        let will_write = self.state().shape.cumulative(id).needs.intersects(writes);
        let request = ReopenRequest {
            context: Rc::clone(self.control().context()),
            node_name: name,
            table: kind.options,
            before,
            options,
            modes_before: entry.before,
            modes: entry.modes,
            will_write,
            children: self.open_children_of(id),
            root: entry.root,
        };
        self.prepare_reopen(id, request).await
    }

    /// Has a node's driver prepare to be what is requested, which it becomes when the change is committed.
    pub(super) async fn prepare_reopen(
        &mut self,
        id: NodeId,
        request: ReopenRequest,
    ) -> Result<(), Error> {
        let driver = self.driver_of(id);
        let options = request.options.clone();
        let prepared = driver.take().reopen_prepare(request).await?;
        let state = self.state_mut();
        state.reopened.push(Reopening {
            id,
            driver,
            options,
        });
        if let Some(io) = prepared.io {
            state.replaced.insert(id, io);
        }
        Ok(())
    }
}

/// A node on its way to be reopened.
struct Entry {
    node: NodeId,
    name: Arc<str>,
    options: Options,
    before: crate::driver::OpenModes,
    modes: crate::driver::OpenModes,
    /// The node as it is, if it writes.
    root: Option<Rc<Root>>,
}
