//! The record as text: a line that says what follows, and a JSON document.
//!
//! ```json
//! {"stonework-state":1,"bytes":117,"crc32":2774153221}
//! {"epoch":1,"exports":{"vda":{"current":{"root":"disk","nodes":{"disk":{...}}}}}}
//! ```
//!
//! The first line keeps its form in every version, so that a version that is not known can be told by
//! name. The second is refused unless it is whole. What is read is untrusted: it is bounded, and
//! everything in it is checked. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ChildRecord, ExportRecord, Identity, NodeRecord, Record, Tree};
use crate::options::Options;
use crate::{Error, ErrorKind};

/// The version that is written, and the only one that is read.
const VERSION: u64 = 1;
/// Longest state file. A node takes some 300 bytes: a thousand exports with chains of fifty images.
pub(super) const MAX_BYTES: u64 = 16 << 20;
/// Longest first line.
const MAX_HEADER_BYTES: usize = 256;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderText {
    #[serde(rename = "stonework-state")]
    version: u64,
    bytes: u64,
    crc32: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordText {
    epoch: u64,
    exports: BTreeMap<String, ExportText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportText {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    given: Option<TreeText>,
    current: TreeText,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TreeText {
    root: String,
    nodes: BTreeMap<String, NodeText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeText {
    options: Value,
    /// `null` for a child that is to be absent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    children: BTreeMap<String, Option<ChildText>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    identity: Option<IdentityText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChildText {
    node: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    implied: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentityText {
    device: u64,
    inode: u64,
    /// In hexadecimal digits: JSON's numbers are shorter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cookie: Option<String>,
}

/// The record as a file holds it.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for a record that [`decode`] would refuse.
pub(super) fn encode(record: &Record) -> Result<Vec<u8>, Error> {
    record.check()?;
    let body = write(&RecordText::from(record))?;
    let header = HeaderText {
        version: VERSION,
        bytes: body.len() as u64,
        crc32: crc32fast::hash(&body),
    };
    let mut text = write(&header)?;
    text.extend_from_slice(&body);
    if text.len() as u64 > MAX_BYTES {
        return Err(Error::invalid(format!(
            "the record of the graph would take {} bytes, and may take {MAX_BYTES}",
            text.len()
        )));
    }
    Ok(text)
}

fn write(value: &impl Serialize) -> Result<Vec<u8>, Error> {
    let mut line = serde_json::to_vec(value)
        .map_err(|error| Error::invalid(format!("cannot be written as JSON: {error}")))?;
    line.push(b'\n');
    Ok(line)
}

/// The record in a file.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] for another version, by its number; [`ErrorKind::Corrupt`] for anything
/// that no [`encode`] has written.
pub(super) fn decode(file: &[u8]) -> Result<Record, Error> {
    if file.len() as u64 > MAX_BYTES {
        return Err(corrupt(format!("it has more than {MAX_BYTES} bytes")));
    }
    let line = file.iter().take(MAX_HEADER_BYTES);
    let Some(end) = line.clone().position(|byte| *byte == b'\n') else {
        return Err(corrupt("it has no first line"));
    };
    let (header, body) = file.split_at(end + 1);
    let header: HeaderText = header_text(header)?;
    if body.len() as u64 != header.bytes {
        let (bytes, meant) = (body.len(), header.bytes);
        return Err(corrupt(format!(
            "its record has {bytes} bytes, where {meant} were written"
        )));
    }
    if crc32fast::hash(body) != header.crc32 {
        return Err(corrupt("its checksum is not that of its record"));
    }
    let text: RecordText = serde_json::from_slice(body).map_err(corrupt)?;
    let record = Record::try_from(text)?;
    record.check().map_err(corrupt)?;
    Ok(record)
}

fn header_text(line: &[u8]) -> Result<HeaderText, Error> {
    let value: Value = serde_json::from_slice(line).map_err(corrupt)?;
    match value.get("stonework-state").and_then(Value::as_u64) {
        Some(VERSION) => serde_json::from_value(value).map_err(corrupt),
        Some(version) => Err(Error::unsupported(format!(
            "it has version {version}, and this stonework reads version {VERSION}"
        ))),
        None => Err(corrupt("it is not a state file of stonework")),
    }
}

fn corrupt(what: impl ToString) -> Error {
    Error::new(ErrorKind::Corrupt, what.to_string())
}

impl From<&Record> for RecordText {
    fn from(record: &Record) -> Self {
        let exports = record.exports.iter().map(|(id, export)| {
            let export = ExportText {
                given: export.given.as_ref().map(TreeText::from),
                current: TreeText::from(&export.current),
            };
            (id.clone(), export)
        });
        Self {
            epoch: record.epoch,
            exports: exports.collect(),
        }
    }
}

impl From<&Tree> for TreeText {
    fn from(tree: &Tree) -> Self {
        let nodes = tree.nodes.iter();
        Self {
            root: tree.root.clone(),
            nodes: nodes
                .map(|(name, node)| (name.clone(), NodeText::from(node)))
                .collect(),
        }
    }
}

impl From<&NodeRecord> for NodeText {
    fn from(node: &NodeRecord) -> Self {
        let children = node.children.iter().map(|(role, child)| {
            let child = match child {
                ChildRecord::Absent => None,
                ChildRecord::Node { name, implied } => Some(ChildText {
                    node: name.clone(),
                    implied: *implied,
                }),
            };
            (role.clone(), child)
        });
        Self {
            options: node.options.to_json(),
            children: children.collect(),
            identity: node.identity.map(|identity| IdentityText {
                device: identity.device,
                inode: identity.inode,
                cookie: identity.cookie.map(|cookie| format!("{cookie:032x}")),
            }),
        }
    }
}

impl TryFrom<RecordText> for Record {
    type Error = Error;

    fn try_from(text: RecordText) -> Result<Self, Error> {
        let exports = text.exports.into_iter().map(|(id, export)| {
            let export = ExportRecord {
                given: export.given.map(Tree::try_from).transpose()?,
                current: Tree::try_from(export.current)?,
            };
            Ok((id, export))
        });
        Ok(Self {
            epoch: text.epoch,
            exports: exports.collect::<Result<_, Error>>()?,
        })
    }
}

impl TryFrom<TreeText> for Tree {
    type Error = Error;

    fn try_from(text: TreeText) -> Result<Self, Error> {
        let nodes = text.nodes.into_iter();
        let nodes = nodes.map(|(name, node)| Ok((name, NodeRecord::try_from(node)?)));
        Ok(Self {
            root: text.root,
            nodes: nodes.collect::<Result<_, Error>>()?,
        })
    }
}

impl TryFrom<NodeText> for NodeRecord {
    type Error = Error;

    fn try_from(text: NodeText) -> Result<Self, Error> {
        let children = text.children.into_iter().map(|(role, child)| {
            let child = match child {
                None => ChildRecord::Absent,
                Some(child) => ChildRecord::Node {
                    name: child.node,
                    implied: child.implied,
                },
            };
            (role, child)
        });
        Ok(Self {
            options: Options::from_json(&text.options).map_err(corrupt)?,
            children: children.collect(),
            identity: text.identity.map(Identity::try_from).transpose()?,
        })
    }
}

impl TryFrom<IdentityText> for Identity {
    type Error = Error;

    fn try_from(text: IdentityText) -> Result<Self, Error> {
        let cookie = text.cookie.map(|digits| {
            u128::from_str_radix(&digits, 16)
                .map_err(|error| corrupt(format!("a cookie is no number: {error}")))
        });
        Ok(Self {
            device: text.device,
            inode: text.inode,
            cookie: cookie.transpose()?,
        })
    }
}
