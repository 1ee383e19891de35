//! The graph, recorded ahead: what a daemon that starts again has to serve.
//!
//! After a snapshot, a pivot or a reopen, the arguments that a daemon was started with name images that
//! its guests no longer use. So whatever changes which image an export's guest reads or writes first
//! puts a [`Record`] of the graph as it will be into the daemon's [`StateFile`]: in *prepare*, so that
//! *commit* has nothing left that can fail. A restart finds the old record or the new one, and at the
//! instant of the change both are right. [`agree`] says what a restart is to serve, or that its
//! arguments contradict the record.
//!
//! Nodes are in a flat table, children by name: chains are longer than JSON may be deep, and a node may
//! have several parents.
//!
//! Not here: opening what is recorded, and finding out an image's identity.

mod agreement;
mod state_file;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

pub use self::agreement::{Tables, Verdict, agree};
pub use self::state_file::StateFile;
use crate::options::{OptionValue, Options};
use crate::{Error, ErrorKind};

/// Most bytes of an export's, a node's or a child's name.
const MAX_NAME_BYTES: usize = 255;

/// What a daemon serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Rises with each record that is written.
    pub epoch: u64,
    /// By the export's id.
    pub exports: BTreeMap<String, ExportRecord>,
}

/// What one export's guest reads and writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportRecord {
    /// What the arguments described when the export was first served; `None` if it was added by a
    /// command, and no argument tells of it.
    pub given: Option<Tree>,
    /// What it is now, or will be in a moment.
    pub current: Tree,
}

/// A node and everything below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The topmost node.
    pub root: String,
    /// Every node, by name. Each can be reached from the root, and none from itself.
    pub nodes: BTreeMap<String, NodeRecord>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRecord {
    /// Its own options, driver included; its name and its children are not among them.
    pub options: Options,
    /// What is said of its children, by what they are to it: `file`, `backing`.
    pub children: BTreeMap<String, ChildRecord>,
    /// Which image it is, of nodes that are one.
    pub identity: Option<Identity>,
}

/// A child of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildRecord {
    /// There is none, whatever the image asks for.
    Absent,
    /// This node.
    Node {
        /// Its name.
        name: String,
        /// Whether it is there because the image asks for it, and not because somebody said so.
        implied: bool,
    },
}

/// Which image a file is, wherever its name leads today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The device that it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// The random number in its header, of images that have one.
    pub cookie: Option<u128>,
}

impl Identity {
    /// Whether `found` is the same image. A cookie that only one has tells nothing.
    pub fn matches(&self, found: &Self) -> bool {
        let cookies = self.cookie.zip(found.cookie);
        let place = (self.device, self.inode) == (found.device, found.inode);
        place && cookies.is_none_or(|(one, other)| one == other)
    }
}

impl ChildRecord {
    /// The node's name, if there is one.
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Absent => None,
            Self::Node { name, .. } => Some(name),
        }
    }
}

impl Record {
    /// Checks what the types do not say. What is written was checked, and so is what is read.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`], naming the export.
    pub fn check(&self) -> Result<(), Error> {
        let mut seen: BTreeMap<&str, &NodeRecord> = BTreeMap::new();
        for (id, export) in &self.exports {
            let wrong = |error: Error| Error::invalid(format!("export '{id}': {error}"));
            check_name(id).map_err(wrong)?;
            export.current.check().map_err(wrong)?;
            if let Some(given) = &export.given {
                given.check().map_err(wrong)?;
            }
            // All that is served is one graph, in which a name is one node.
            for (name, node) in &export.current.nodes {
                if *seen.entry(name).or_insert(node) != node {
                    let error = format!("node '{name}' is another than in a former export");
                    return Err(wrong(Error::invalid(error)));
                }
            }
        }
        Ok(())
    }
}

impl Tree {
    /// The nodes from the root down, each after all of its parents.
    fn check(&self) -> Result<(), Error> {
        for (name, node) in &self.nodes {
            check_name(name)?;
            if !matches!(node.options.value("driver"), Some(OptionValue::Text(_))) {
                return Err(Error::invalid(format!("node '{name}' has no driver")));
            }
            for (role, child) in &node.children {
                check_name(role)?;
                if let Some(child) = child.node()
                    && !self.nodes.contains_key(child)
                {
                    return Err(Error::invalid(format!(
                        "node '{name}' has child '{child}', which is not there"
                    )));
                }
            }
        }
        self.check_shape()
    }

    /// Every node below the root and none below itself: nodes are taken away whose parents are all
    /// gone, and none is left.
    fn check_shape(&self) -> Result<(), Error> {
        let mut parents: BTreeMap<&str, usize> = BTreeMap::new();
        for child in self.nodes.values().flat_map(NodeRecord::nodes) {
            *parents.entry(child).or_default() += 1;
        }
        let mut next = vec![self.root.as_str()];
        let mut left: BTreeSet<&str> = self.nodes.keys().map(String::as_str).collect();
        if parents.contains_key(self.root.as_str()) {
            next.clear();
        }
        while let Some(name) = next.pop() {
            let Some(node) = self.nodes.get(name).filter(|_| left.remove(name)) else {
                return Err(Error::invalid(format!("its node '{name}' is not there")));
            };
            for child in node.nodes() {
                let count = parents.get_mut(child).expect("counted above");
                *count -= 1;
                if *count == 0 {
                    next.push(child);
                }
            }
        }
        match left.first() {
            None => Ok(()),
            Some(name) => Err(Error::invalid(format!(
                "node '{name}' is below itself, or not below node '{}'",
                self.root
            ))),
        }
    }
}

impl NodeRecord {
    /// The names of its children.
    fn nodes(&self) -> impl Iterator<Item = &str> {
        self.children.values().filter_map(ChildRecord::node)
    }
}

/// For messages: the nodes' options with their children's in brackets, the depths left out.
impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = SHOWN_NODES;
        self.show(f, &self.root, 0, &mut left)
    }
}

/// Most nodes that a message names, and how many levels of them.
const SHOWN_NODES: usize = 12;
const SHOWN_LEVELS: usize = 6;

impl Tree {
    fn show(
        &self,
        f: &mut fmt::Formatter<'_>,
        name: &str,
        level: usize,
        left: &mut usize,
    ) -> fmt::Result {
        let node = self.nodes.get(name).filter(|_| level < SHOWN_LEVELS);
        let Some(node) = node.filter(|_| *left > 0) else {
            return f.write_str("…");
        };
        *left -= 1;
        // Names that were made up tell nobody anything.
        if !name.starts_with('#') {
            write!(f, "node-name={name},")?;
        }
        f.write_str(&node.options.to_text())?;
        for (role, child) in &node.children {
            write!(f, " [{role}: ")?;
            match child.node() {
                Some(child) => self.show(f, child, level + 1, left)?,
                None => f.write_str("none")?,
            }
            f.write_str("]")?;
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let printable = !name.chars().any(char::is_control);
    if !name.is_empty() && name.len() <= MAX_NAME_BYTES && printable {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(Error::new(
        ErrorKind::Invalid,
        format!("'{}' cannot be a name", shown.escape_debug()),
    ))
}

#[cfg(test)]
mod tests;
