//! Recording ahead: every change of what an export's guest reads or writes is in the export's state file
//! before it is a fact.
//!
//! The last step of preparing a change looks at the tree below each recorded root, as it will be; where
//! that is another than the one recorded last, it is written down, durably. A commit then has nothing
//! left that can fail. A change that is given up after that writes the old tree back.
//!
//! As long as an export serves what the arguments described first, nothing is written: a start with the
//! same arguments serves the same, and one with others is the operator's choice.
//!
//! A restart finds one of the two. At the instant of the change both are right, since its roots are
//! drained: what the old tree reads, the new one reads.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::compile::View;
use super::record::{
    ChildRecord, ExportRecord, Identity, NodeRecord, Record, StateFile, Tree, Verdict, agree,
};
use super::{Change, Control, NodeId, RootId};
use crate::driver::Role;
use crate::engine::{Errno, HostCall, HostReply, OpenFile};
use crate::options::{OptionSpec, OptionValue, Options};
use crate::{Error, ErrorKind};

/// What begins the name of a node that nobody named.
const MADE_UP: char = '#';

/// The state file of one export.
pub struct ExportState {
    export: String,
    path: PathBuf,
    /// `None` until there is something to record.
    file: RefCell<Option<Rc<StateFile>>>,
    epoch: Cell<u64>,
    recorded: RefCell<Option<ExportRecord>>,
    /// What the arguments described.
    first: RefCell<Option<Tree>>,
}

impl ExportState {
    /// Takes the state file at `path`, if there is one, which nobody else may use meanwhile. With
    /// `discard` what it holds is thrown away.
    ///
    /// # Errors
    ///
    /// As [`StateFile::open`]; [`ErrorKind::Invalid`] for one that is another export's.
    pub async fn open(
        control: &Control,
        path: &Path,
        export: &str,
        discard: bool,
    ) -> Result<Rc<Self>, Error> {
        let context = control.context();
        let there = context.host(HostCall::Canonical(path.to_owned())).await;
        let (file, record) = match (there, discard) {
            (Err(Errno::NOENT), _) => (None, None),
            (_, true) => {
                let file = StateFile::open_discarding(context, path).await?;
                (Some(Rc::new(file)), None)
            }
            (_, false) => {
                let (file, record) = StateFile::open(context, path).await?;
                (Some(Rc::new(file)), record)
            }
        };
        let mut record = record.unwrap_or_default();
        let recorded = record.exports.remove(export);
        if let Some(other) = record.exports.keys().next() {
            return Err(Error::invalid(format!(
                "state file '{}' is that of export '{other}', and not of '{export}' (option \
                 --discard-state discards it)",
                path.display()
            )));
        }
        Ok(Rc::new(Self {
            export: export.to_owned(),
            path: path.to_owned(),
            file: RefCell::new(file),
            epoch: Cell::new(record.epoch),
            first: RefCell::new(recorded.as_ref().and_then(|known| known.given.clone())),
            recorded: RefCell::new(recorded),
        }))
    }

    /// What was recorded last.
    pub fn recorded(&self) -> Option<ExportRecord> {
        self.recorded.borrow().clone()
    }

    /// What is to be recorded for a tree, if that is not what is recorded already.
    fn to_record(&self, current: Tree) -> Option<Option<ExportRecord>> {
        let mut first = self.first.borrow_mut();
        let recorded = self.recorded.borrow();
        let given = first.get_or_insert_with(|| current.clone()).clone();
        let after = (given != current).then_some(ExportRecord {
            given: Some(given),
            current,
        });
        (*recorded != after).then_some(after)
    }

    async fn write(&self, control: &Control, export: Option<ExportRecord>) -> Result<(), Error> {
        let epoch = self.epoch.get() + 1;
        self.epoch.set(epoch);
        let exports = export.clone().map(|export| (self.export.clone(), export));
        let record = Record {
            epoch,
            exports: exports.into_iter().collect(),
        };
        let known = self.file.borrow().clone();
        let file = match known {
            Some(file) => file,
            None => {
                let (file, _) = StateFile::open(control.context(), &self.path).await?;
                let file = Rc::new(file);
                self.file.replace(Some(Rc::clone(&file)));
                file
            }
        };
        file.write(control.context(), &record).await?;
        self.recorded.replace(export);
        Ok(())
    }
}

/// A tree that was written down for a change, with what was there before.
pub(super) struct Written {
    state: Rc<ExportState>,
    before: Option<ExportRecord>,
}

impl Change {
    /// Writes down every recorded root's tree that this change makes another.
    pub(super) async fn record(&mut self) -> Result<(), Error> {
        let wanted: Vec<_> = self.control().read(|graph| {
            let state = self.state();
            let roots = state.shape.roots();
            roots
                .filter_map(|(id, edge)| {
                    let known = graph.roots.get(&id).and_then(|root| root.state.clone());
                    let new = state.new_states.get(&id).cloned();
                    Some((known.or(new)?, edge.child))
                })
                .collect()
        });
        for (state, node) in wanted {
            let mut current = self
                .control()
                .read(|graph| self.state().with_view(graph, |view| tree(view, node)));
            let files = self.control().read(|graph| {
                self.state()
                    .with_view(graph, |view| files_below(view, node))
            });
            for (name, file) in files {
                let identity = identity(self.control(), &file).await?;
                if let Some(node) = current.nodes.get_mut(&name) {
                    node.identity = Some(identity);
                }
            }
            let Some(after) = state.to_record(current) else {
                continue;
            };
            let before = state.recorded();
            // Noted first: a write that fails late may have had its effect.
            self.state_mut().written.push(Written {
                state: Rc::clone(&state),
                before,
            });
            state.write(self.control(), after).await?;
        }
        Ok(())
    }
}

/// Puts back what was recorded before a change that is given up.
pub(super) async fn undo(control: &Control, written: Vec<Written>) {
    for Written { state, before } in written.into_iter().rev() {
        if let Err(error) = state.write(control, before).await {
            tracing::error!(
                export = %state.export,
                error = %error.report(),
                "the state file may name images of a change that was given up"
            );
        }
    }
}

/// The node below those that jobs have put in, and that go with them.
fn lasting(view: &View<'_>, mut id: NodeId) -> NodeId {
    while view.shape.vertex(id).transient
        && let Some(edge) = view.shape.child(id, 0)
    {
        id = edge.child;
    }
    id
}

/// A node and all that is below it, without what jobs have put in.
fn lasting_below(view: &View<'_>, root: NodeId) -> BTreeSet<NodeId> {
    let mut found = BTreeSet::new();
    let mut next = vec![root];
    while let Some(id) = next.pop() {
        let id = lasting(view, id);
        if found.insert(id) {
            next.extend(view.shape.children(id).map(|(_, edge)| edge.child));
        }
    }
    found
}

/// The tree below a node, identities left out. What a running job has put in is left out as well: a
/// restart begins without the job.
fn tree(view: &View<'_>, root: NodeId) -> Tree {
    let ids = lasting_below(view, root);
    let nodes = ids.into_iter().map(|id| {
        let vertex = view.shape.vertex(id);
        let node = view.node(id);
        let specs = vertex.kind.children.iter().enumerate();
        let children = specs.filter_map(|(index, spec)| {
            let is_backing = spec.role.contains(Role::COW);
            let child = match view.shape.child(id, index) {
                Some(edge) => ChildRecord::Node {
                    name: view
                        .shape
                        .vertex(lasting(view, edge.child))
                        .name
                        .to_string(),
                    implied: is_backing && !super::names::backing_is_overridden(view, id),
                },
                None if is_backing && node.backing_in_header().is_some() => ChildRecord::Absent,
                None => return None,
            };
            Some((spec.name.to_owned(), child))
        });
        let record = NodeRecord {
            options: node.options().clone(),
            children: children.collect(),
            identity: None,
        };
        (vertex.name.to_string(), record)
    });
    Tree {
        root: view.shape.vertex(lasting(view, root)).name.to_string(),
        nodes: nodes.collect(),
    }
}

/// The file of each protocol node below a node.
fn files_below(view: &View<'_>, root: NodeId) -> Vec<(String, Arc<OpenFile>)> {
    let ids = view.shape.below([root]).into_iter();
    ids.filter_map(|id| {
        let file = view.io(id).files().first()?;
        let leaf = view.shape.children(id).next().is_none();
        leaf.then(|| (view.shape.vertex(id).name.to_string(), Arc::clone(file)))
    })
    .collect()
}

async fn identity(control: &Control, file: &Arc<OpenFile>) -> Result<Identity, Error> {
    let call = HostCall::Metadata(Arc::clone(file));
    match control.context().host(call).await {
        Ok(HostReply::Metadata(found)) => Ok(Identity {
            device: found.device,
            inode: found.inode,
            cookie: None,
        }),
        Ok(reply) => unreachable!("a stat answered with {reply:?}"),
        Err(error) => Err(Error::host(
            format!("cannot examine '{}'", file.path().display()),
            error,
        )),
    }
}

impl Control {
    /// The node that an export serves, given the one that the arguments describe and what was recorded
    /// last: the arguments' own, or the recorded one, whose tree is opened then. The images are verified
    /// to be those that were recorded.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the arguments contradict the record, naming both trees, or an image is
    /// another than it was; else what could not be opened.
    pub async fn recorded_node(&self, state: &ExportState, given: &str) -> Result<String, Error> {
        let Some(recorded) = state.recorded() else {
            return Ok(given.to_owned());
        };
        let given_tree = self.read(|graph| {
            let id = graph.node(given)?.id();
            Ok::<_, Error>(tree(&graph.view(), id))
        })?;
        let record = Record {
            epoch: state.epoch.get(),
            exports: BTreeMap::from([(state.export.clone(), recorded.clone())]),
        };
        let arguments = BTreeMap::from([(state.export.clone(), given_tree)]);
        let tables = |driver: &str| -> Option<Vec<&'static [OptionSpec]>> {
            let kind = self.read(|graph| graph.driver_type(driver)).ok()?;
            Some(vec![super::NODE_OPTIONS, kind.options])
        };
        let verdicts = agree(&record, &arguments, &tables)?;
        let node = match verdicts.get(&state.export) {
            Some(Verdict::AsRecorded) => self.restore(&recorded.current).await?,
            _ => given.to_owned(),
        };
        self.verify(&state.export, &node, &recorded.current).await?;
        Ok(node)
    }

    /// Opens what is recorded and not there yet; returns the topmost node's name.
    async fn restore(&self, tree: &Tree) -> Result<String, Error> {
        let mut opened = BTreeSet::new();
        self.restore_node(tree, &tree.root, &mut opened).await?;
        tracing::info!(%tree, "serving what was recorded last");
        Ok(tree.root.clone())
    }

    async fn restore_node(
        &self,
        tree: &Tree,
        name: &str,
        opened: &mut BTreeSet<String>,
    ) -> Result<(), Error> {
        // Named children first: others refer to them by name. A node with a name that nobody gave is
        // part of its parent's options.
        for below in named_below(tree, name) {
            Box::pin(self.restore_node(tree, &below, opened)).await?;
        }
        let there = self.read(|graph| graph.node(name).is_ok());
        if there || !opened.insert(name.to_owned()) {
            return Ok(());
        }
        let mut options = options_of(tree, name);
        options.set("node-name", name);
        self.add(options).await?;
        Ok(())
    }

    /// Checks that the images below a node are those that were recorded.
    async fn verify(&self, export: &str, node: &str, recorded: &Tree) -> Result<(), Error> {
        let files = self.read(|graph| {
            let id = graph.node(node)?.id();
            let mut files = Vec::new();
            recorded_files(&graph.view(), id, recorded, &recorded.root, &mut files);
            Ok::<_, Error>(files)
        })?;
        for (expected, file) in files {
            let found = identity(self, &file).await?;
            if !expected.matches(&found) {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "cannot serve export '{export}': '{}' is not the image that it was served \
                         from last, but another of that name (option --discard-state serves it all \
                         the same)",
                        file.path().display()
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// The files below a node that is recorded as `name`, with what is recorded of each. By what each node is to
/// its parent: a name that nobody gave is another one in every process.
fn recorded_files(
    view: &View<'_>,
    id: NodeId,
    tree: &Tree,
    name: &str,
    found: &mut Vec<(Identity, Arc<OpenFile>)>,
) {
    let Some(record) = tree.nodes.get(name) else {
        return;
    };
    let vertex = view.shape.vertex(id);
    let mut children = view.shape.children(id).peekable();
    if children.peek().is_none()
        && let (Some(expected), Some(file)) = (&record.identity, view.io(id).files().first())
    {
        found.push((*expected, Arc::clone(file)));
    }
    for (index, edge) in children {
        let role = vertex.kind.children[index].name;
        let below = record.children.get(role).and_then(ChildRecord::node);
        if let Some(below) = below {
            recorded_files(view, edge.child, tree, below, found);
        }
    }
}

/// The nodes that an operator named nearest below one.
fn named_below(tree: &Tree, name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for child in tree
        .nodes
        .get(name)
        .iter()
        .flat_map(|n| n.children.values())
    {
        match child.node() {
            Some(child) if child.starts_with(MADE_UP) => found.extend(named_below(tree, child)),
            Some(child) => found.push(child.to_owned()),
            None => {}
        }
    }
    found
}

/// The options that open a recorded node.
fn options_of(tree: &Tree, name: &str) -> Options {
    let Some(node) = tree.nodes.get(name) else {
        return Options::default();
    };
    let mut options = node.options.clone();
    for (role, child) in &node.children {
        match child {
            ChildRecord::Absent => options.set_value(role, OptionValue::Null),
            // The image asks for it by itself; its own options were none.
            ChildRecord::Node {
                name,
                implied: true,
            } if name.starts_with(MADE_UP) => {}
            ChildRecord::Node { name, .. } if name.starts_with(MADE_UP) => {
                options.set_nested(role, options_of(tree, name));
            }
            ChildRecord::Node { name, .. } => options.set(role, name.clone()),
        }
    }
    options
}

/// The states of roots that a change adds.
pub(super) type NewStates = BTreeMap<RootId, Rc<ExportState>>;
