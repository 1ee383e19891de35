//! Whether the arguments of a daemon agree with what it has recorded. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::{ChildRecord, NodeRecord, Record, Tree};
use crate::Error;
use crate::options::{OptionSpec, Options};

/// The tables of a driver's options, with those of the options that all nodes take; `None` for a driver
/// that there is not.
pub type Tables<'a> = &'a dyn Fn(&str) -> Option<Vec<&'static [OptionSpec]>>;

/// What a daemon that starts is to do with one export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Serve what the arguments describe: nothing is recorded, or the same images with the same effect.
    /// Other options than before, such as those of caching, are the operator's new ones.
    AsGiven,
    /// Serve what is recorded. The arguments are those of the first start, and the graph may have
    /// changed since; or the export was added by a command.
    AsRecorded,
    /// Do not serve it, and keep what is recorded of it: the arguments do not have it any more.
    NotGiven,
}

/// Compares the record of the last life with what the arguments of this one describe, by export. Paths
/// are compared as they are written.
///
/// # Errors
///
/// [`crate::ErrorKind::Invalid`] if an export's arguments describe other images than it has served
/// last, naming both trees. To serve the arguments' would give the guest an old disk.
pub fn agree(
    record: &Record,
    given: &BTreeMap<String, Tree>,
    tables: Tables<'_>,
) -> Result<BTreeMap<String, Verdict>, Error> {
    let mut verdicts = BTreeMap::new();
    for id in record.exports.keys().chain(given.keys()) {
        let verdict = match (record.exports.get(id), given.get(id)) {
            (None, _) => Verdict::AsGiven,
            (Some(export), None) if export.given.is_none() => Verdict::AsRecorded,
            (Some(_), None) => Verdict::NotGiven,
            (Some(export), Some(given)) => {
                let first = export.given.as_ref();
                if first.is_some_and(|first| same(first, given, tables, same_node)) {
                    Verdict::AsRecorded
                } else if same(&export.current, given, tables, same_images) {
                    Verdict::AsGiven
                } else {
                    return Err(contradiction(id, &export.current, given));
                }
            }
        };
        verdicts.insert(id.clone(), verdict);
    }
    Ok(verdicts)
}

fn contradiction(id: &str, recorded: &Tree, given: &Tree) -> Error {
    Error::invalid(format!(
        "cannot serve export '{id}' from {given}, as the arguments describe it: it was last served \
         from {recorded}. Describe that instead; option --discard-state discards the record, and the \
         guest gets whatever the images in the arguments hold"
    ))
}

/// Compares two nodes, their children excepted.
type SameNode = fn(&Named<'_>, &Named<'_>, &[&[OptionSpec]]) -> bool;

struct Named<'a> {
    name: &'a str,
    node: &'a NodeRecord,
}

/// Whether two trees have the same shape, and the same nodes in the same places. A child that an image
/// asks for need not be spoken of.
fn same(one: &Tree, other: &Tree, tables: Tables<'_>, same_node: SameNode) -> bool {
    let mut seen = BTreeSet::new();
    let mut next = vec![(one.root.as_str(), other.root.as_str())];
    while let Some((one_name, other_name)) = next.pop() {
        if !seen.insert((one_name, other_name)) {
            continue;
        }
        let found = one.nodes.get(one_name).zip(other.nodes.get(other_name));
        let Some((one_node, other_node)) = found else {
            return false;
        };
        let tables = driver(one_node).and_then(tables).unwrap_or_default();
        let named = |name, node| Named { name, node };
        let (one_named, other_named) = (named(one_name, one_node), named(other_name, other_node));
        if !same_node(&one_named, &other_named, &tables) {
            return false;
        }
        for role in one_node.children.keys().chain(other_node.children.keys()) {
            match (one_node.children.get(role), other_node.children.get(role)) {
                (Some(ChildRecord::Absent), Some(ChildRecord::Absent)) => {}
                (
                    Some(ChildRecord::Node { name: one, .. }),
                    Some(ChildRecord::Node { name: other, .. }),
                ) => next.push((one, other)),
                (Some(ChildRecord::Node { implied: true, .. }), None)
                | (None, Some(ChildRecord::Node { implied: true, .. })) => {}
                _ => return false,
            }
        }
    }
    true
}

fn driver(node: &NodeRecord) -> Option<&str> {
    node.options.get("driver")
}

/// The same name, unless it was made up, and the same options.
fn same_node(one: &Named<'_>, other: &Named<'_>, tables: &[&[OptionSpec]]) -> bool {
    let made_up = |named: &Named<'_>| named.name.starts_with('#');
    let same_name = one.name == other.name || (made_up(one) && made_up(other));
    let differences = one.node.options.differences(&other.node.options, tables);
    same_name && differences.is_empty()
}

/// The same options, of those that change what is read.
fn same_images(one: &Named<'_>, other: &Named<'_>, tables: &[&[OptionSpec]]) -> bool {
    let strong = |options: &Options| options.strong(tables);
    let (one, other) = (strong(&one.node.options), strong(&other.node.options));
    one.differences(&other, tables).is_empty()
}
