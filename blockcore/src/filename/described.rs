//! What a node is called: a plain name if that says it all, else its options in JSON.
//!
//! A plain name describes a node if opening it gives the same node again: the same driver on the same
//! file, with no option that changes what a guest reads and no child that the image does not ask for
//! by itself. A name that would lie is left out.

use super::json_name;
use crate::driver::DriverKind;
use crate::options::{OptionSpec, OptionValue, Options};

/// A node's name in both forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The plain name, if it describes the node.
    pub exact: Option<String>,
    /// The options that do: those that change what a guest reads, and the children's.
    pub full: Options,
    /// Whether the node is the end of a chain, from whose name a format's may come.
    pub protocol: bool,
}

impl Described {
    /// The name: plain where that is true, else `json:`.
    pub fn name(&self) -> String {
        self.exact.clone().unwrap_or_else(|| json_name(&self.full))
    }
}

/// Where a node's plain name comes from.
#[derive(Clone, Debug)]
pub enum NameSource {
    /// Its driver, from its options; `None` if no plain name says them.
    Driver(Option<String>),
    /// Its first child, as a format's does: the file that it is in.
    File,
}

/// A child, as far as it matters for its parent's name.
#[derive(Clone, Copy, Debug)]
pub struct ChildPart<'a> {
    /// What it is to its parent: `file`, `backing`.
    pub name: &'a str,
    /// The child; `None` if the parent was told to have none although its image asks for one.
    pub node: Option<&'a Described>,
    /// Whether opening the parent by its name finds this very child: the image asks for it, and nobody
    /// [overrode](super::backing_overridden) that.
    pub from_image: bool,
}

/// What a node's name is made of.
#[derive(Debug)]
pub struct NodeParts<'a> {
    /// Its driver.
    pub driver: &'a str,
    /// What kind of driver that is.
    pub kind: DriverKind,
    /// Its own options as given, its children's excepted.
    pub options: &'a Options,
    /// Every table that these are in, that of the options which all nodes take included.
    pub tables: &'a [&'a [OptionSpec]],
    /// Where its plain name comes from.
    pub source: NameSource,
    /// Its children. The first is the one that it stores its data in or passes requests to.
    pub children: &'a [ChildPart<'a>],
}

/// What a node is called.
///
/// A filter has no plain name but one of its own driver's: opening its child's name would give the
/// child.
pub fn describe(node: &NodeParts<'_>) -> Described {
    let mut full = node.options.strong(node.tables).canonical(node.tables);
    full.take("driver");
    let as_image_says = full.is_empty();
    full.set("driver", node.driver);

    let (primary, others) = match node.children.split_first() {
        Some((primary, others)) => (Some(primary), others),
        None => (None, node.children),
    };
    let overridden = others.iter().filter(|child| !child.from_image);
    let nothing_overridden = overridden.clone().next().is_none();
    for child in primary.into_iter().chain(overridden) {
        match child.node {
            Some(described) => full.set_nested(child.name, described.full.clone()),
            None => full.set_value(child.name, OptionValue::Null),
        }
    }

    let exact = match &node.source {
        NameSource::Driver(name) => name.clone(),
        NameSource::File => {
            let file = primary.and_then(|child| child.node);
            let of_file = file.filter(|file| file.protocol && node.kind == DriverKind::Format);
            of_file
                .filter(|_| as_image_says && nothing_overridden)
                .and_then(|file| file.exact.clone())
        }
    };
    Described {
        exact,
        full,
        protocol: node.kind == DriverKind::Protocol,
    }
}
