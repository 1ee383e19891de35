//! What a root's requests reach, worked out from the graph alone: the plans must agree.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::rc::Rc;
use std::sync::Arc;

use blockcore::graph::{Control, Graph, NodeId, RootId};

use crate::case::{Case, DiskCase};

/// A part of a disk as somebody sees it who uses a node.
#[derive(Clone, Debug, Default)]
pub(crate) struct View {
    pub(crate) disk: usize,
    /// Where the part begins in the disk.
    pub(crate) base: u64,
    pub(crate) bytes: u64,
    /// What the node shows is not a disk, but an image's file or base.
    pub(crate) image: bool,
    /// The nodes that requests can reach, the topmost first, with where each begins in the disk; `None`
    /// for those that hold an image of it.
    pub(crate) path: Vec<(String, Option<u64>)>,
    /// No layer ignores discards.
    pub(crate) unmap: bool,
}

impl View {
    /// What `node` shows.
    pub(crate) fn of(graph: &Graph, case: &Case, node: NodeId) -> Rc<Self> {
        let Some(found) = graph.node_by_id(node) else {
            return Rc::default();
        };
        let name = found.name().to_owned();
        let unmap = graph.modes(node).unmap;
        let Some(child) = graph.primary_child(node) else {
            let path = found.options().get("filename").unwrap_or_default();
            let mut disks = case.disks.iter();
            let disk = disks.position(|disk| disk.path == path || disk.base_path == path);
            let disk = disk.expect("leaves are disks");
            let image = case.disks[disk].cluster.is_some();
            return Rc::new(Self {
                disk,
                image,
                base: 0,
                bytes: match case.disks[disk].resizes {
                    true => found.bytes(),
                    false => case.disks[disk].bytes,
                },
                path: vec![(name, (!image).then_some(0))],
                unmap,
            });
        };
        let below = Self::of(graph, case, child);
        if found.driver_name() == "overlay" {
            let backing = graph.backing_of(node).expect("given when it was opened");
            let backing = Self::of(graph, case, backing);
            let image = below.path.iter().chain(&backing.path);
            let mut path = vec![(name, Some(0))];
            path.extend(image.map(|(name, _)| (name.clone(), None)));
            return Rc::new(Self {
                disk: below.disk,
                image: false,
                base: 0,
                bytes: case.disks[below.disk].bytes,
                path,
                unmap,
            });
        }
        let number = |option: &str| {
            let text = found.options().get(option)?;
            text.parse::<u64>().ok()
        };
        let offset = number("offset").unwrap_or(0);
        let room = below.bytes.saturating_sub(offset);
        let base = below.base + offset;
        let mut path = vec![(name, (!below.image).then_some(base))];
        path.extend(below.path.iter().cloned());
        let bytes = number("size").map_or(room, |bytes| bytes.min(room));
        let bytes = match case.disks[below.disk].resizes {
            // It hears of another length of the disk in a moment.
            true => bytes.min(found.bytes()),
            false => bytes,
        };
        Rc::new(Self {
            disk: below.disk,
            image: below.image,
            base,
            bytes,
            path,
            unmap: unmap && below.unmap,
        })
    }

    /// Whether requests can reach the node called `name`.
    pub(crate) fn reaches(&self, name: &str) -> bool {
        self.path.iter().any(|(node, _)| node == name)
    }
}

/// Everything that a change which is given up must leave as it was.
pub(crate) fn dump(control: &Control, case: &Case, roots: &[RootId]) -> BTreeMap<String, String> {
    control.read(|graph| {
        let mut dump = BTreeMap::new();
        for node in graph.nodes() {
            // The file of an image grows when it likes; users change the length of others.
            let view = View::of(graph, case, node.id());
            let grows = view.image || case.disks[view.disk].resizes;
            let mut line = format!(
                "{} {:?} {:?} {:?} bytes {:?} half {:p}",
                node.driver_name(),
                node.options(),
                graph.modes(node.id()),
                (!grows).then(|| node.bytes()),
                node.limits(),
                Arc::as_ptr(node.io()),
            );
            for (name, child) in graph.children(node.id()) {
                let _ = write!(line, " {name}={}", child.name());
            }
            let (needs, shares) = graph.cumulative_permissions(node.id());
            let _ = write!(line, " {needs:?} {shares:?} {:?}", graph.users(node.id()));
            dump.insert(format!("node {}", node.name()), line);
        }
        for (number, edge) in graph.edges().enumerate() {
            let line = format!(
                "{} -> {} {:?} {:?} {:?}",
                edge.parent,
                edge.child.name(),
                edge.role,
                edge.needs,
                edge.shares
            );
            dump.insert(format!("edge {number}"), line);
        }
        // Bitmaps are made to fit when they like: also those of an image's file, which grows, and of which what
        // was made ahead is cut off.
        let is_fixed = |disk: &DiskCase| !disk.resizes && disk.cluster.is_none();
        let fixed = case.disks.iter().all(is_fixed);
        for root in roots.iter().filter(|_| fixed) {
            let plan = graph.plan(*root);
            let line = plan.map_or(String::new(), |plan| format!("{:p}", Arc::as_ptr(&plan)));
            dump.insert(format!("{root:?}"), line);
        }
        dump
    })
}

/// What the first difference of two dumps is.
pub(crate) fn difference(
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
) -> Option<String> {
    let keys = before.keys().chain(after.keys());
    let mut differing = keys.filter(|key| before.get(*key) != after.get(*key));
    let key = differing.next()?;
    Some(format!(
        "{key} was {:?} and is {:?}",
        before.get(key),
        after.get(key)
    ))
}

/// Looks whether everybody is granted what all others on the same node share.
pub(crate) fn check_permissions(graph: &Graph) -> Result<(), String> {
    let edges: Vec<_> = graph.edges().collect();
    for (place, one) in edges.iter().enumerate() {
        for (other_place, other) in edges.iter().enumerate() {
            let same = one.child.id() == other.child.id() && place != other_place;
            if same && !other.shares.contains(one.needs) {
                return Err(format!(
                    "{} needs {:?} of node '{}', of which {} shares only {:?}",
                    one.parent,
                    one.needs,
                    one.child.name(),
                    other.parent,
                    other.shares
                ));
            }
        }
    }
    Ok(())
}
