//! `stonework ctl graph`: who uses which node, as a tree, for Graphviz, or as the daemon has it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::{Value, json};

use super::cli::Drawing;
use super::node::NODES;
use super::table::{list, text};
use super::{Ctl, Failure};

/// The command that gives the graph.
const GRAPH: &str = "x-debug-query-block-graph";

/// A graph as it is drawn.
#[derive(Default)]
struct Picture {
    /// What to call each vertex.
    labels: BTreeMap<u64, String>,
    /// Below which there are these, each with the edge's name.
    children: BTreeMap<u64, Vec<(String, u64)>>,
}

impl Ctl {
    pub(super) fn draw(&mut self, format: Drawing) -> Result<(), Failure> {
        let Some(graph) = self.ask(GRAPH, json!({}))? else {
            return Ok(());
        };
        if self.how.json || format == Drawing::Json {
            return self.print_json(&graph);
        }
        let nodes = self.ask(NODES, json!({"flat": true}))?.unwrap_or_default();
        let exports = self
            .ask("query-block-exports", json!({}))?
            .unwrap_or_default();
        let picture = Picture::new(&graph, &nodes, &exports, |bytes| self.bytes(bytes));
        let drawn = match format {
            Drawing::Dot => picture.dot(),
            _ => picture.tree(),
        };
        self.print(drawn.trim_end_matches('\n'))
    }
}

impl Picture {
    fn new(
        graph: &Value,
        nodes: &Value,
        exports: &Value,
        bytes: impl Fn(Option<u64>) -> String,
    ) -> Self {
        let mut picture = Self::default();
        for vertex in list(&graph["nodes"]) {
            let Some(id) = vertex["id"].as_u64() else {
                continue;
            };
            let name = text(&vertex["name"]);
            let mut known = list(nodes).iter();
            let node = known.find(|node| node["node-name"] == vertex["name"]);
            let label = match (text(&vertex["type"]).as_str(), node) {
                ("block-driver", Some(node)) => {
                    let size = bytes(node["image"]["virtual-size"].as_u64());
                    let mut label = format!("{name}  {}, {size}", text(&node["drv"]));
                    if node["ro"] == true {
                        label += ", read-only";
                    }
                    let is_leaf = !list(&graph["edges"])
                        .iter()
                        .any(|edge| edge["parent"] == id);
                    if let Some(file) = node["file"].as_str().filter(|_| is_leaf) {
                        let _ = write!(label, ", {file}");
                    }
                    label
                }
                ("block-driver", None) => name,
                ("block-job", _) => format!("job {name}"),
                (_, _) => {
                    let below = list(&graph["edges"])
                        .iter()
                        .find(|edge| edge["parent"] == id);
                    user(&name, below, graph, exports)
                }
            };
            picture.labels.insert(id, label);
        }
        for edge in list(&graph["edges"]) {
            if let (Some(parent), Some(child)) = (edge["parent"].as_u64(), edge["child"].as_u64()) {
                let children = picture.children.entry(parent).or_default();
                children.push((text(&edge["name"]), child));
            }
        }
        picture
    }

    /// Each vertex that has nobody above it, with what is below.
    fn tree(&self) -> String {
        let below: BTreeSet<_> = self
            .children
            .values()
            .flatten()
            .map(|(_, id)| *id)
            .collect();
        let mut text = String::new();
        let mut shown = BTreeSet::new();
        for (id, label) in self.labels.iter().filter(|(id, _)| !below.contains(id)) {
            let _ = writeln!(text, "{label}");
            self.branch(*id, "", &mut shown, &mut text);
        }
        text
    }

    fn branch(&self, id: u64, indent: &str, shown: &mut BTreeSet<u64>, text: &mut String) {
        let children = self.children.get(&id).map_or(&[][..], Vec::as_slice);
        for (index, (name, child)) in children.iter().enumerate() {
            let (tick, more) = match index + 1 == children.len() {
                true => ("└─ ", "   "),
                false => ("├─ ", "│  "),
            };
            let label = self.labels.get(child).map_or("?", String::as_str);
            // Shared by several, and drawn in full once.
            let is_again = !shown.insert(*child) && self.children.contains_key(child);
            let again = if is_again { "  (see above)" } else { "" };
            let _ = writeln!(text, "{indent}{tick}{name}: {label}{again}");
            if !is_again {
                self.branch(*child, &format!("{indent}{more}"), shown, text);
            }
        }
    }

    fn dot(&self) -> String {
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let mut text = "digraph blocks {\n  node [shape=box];\n".to_owned();
        for (id, label) in &self.labels {
            let _ = writeln!(text, "  n{id} [label=\"{}\"];", quoted(label));
        }
        for (parent, children) in &self.children {
            for (name, child) in children {
                let _ = writeln!(
                    text,
                    "  n{parent} -> n{child} [label=\"{}\"];",
                    quoted(name)
                );
            }
        }
        text.push_str("}\n");
        text
    }
}

/// Who uses a node from outside: an export is known by its node, where no name says more.
fn user(name: &str, edge: Option<&Value>, graph: &Value, exports: &Value) -> String {
    if !name.is_empty() {
        return name.to_owned();
    }
    let node = edge.and_then(|edge| {
        let mut nodes = list(&graph["nodes"]).iter();
        nodes.find(|node| node["id"] == edge["child"])
    });
    let of_node = |export: &&Value| node.is_some_and(|node| export["node-name"] == node["name"]);
    let mut exports = list(exports).iter().filter(of_node);
    match (exports.next(), exports.next()) {
        (Some(export), None) => format!("export '{}'", text(&export["id"])),
        _ => "somebody".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Picture {
        let graph = json!({
            "nodes": [
                {"id": 1, "type": "block-backend", "name": ""},
                {"id": 2, "type": "block-driver", "name": "top"},
                {"id": 3, "type": "block-driver", "name": "base"},
                {"id": 4, "type": "block-driver", "name": "f\"1"},
            ],
            "edges": [
                {"parent": 1, "child": 2, "name": "root"},
                {"parent": 2, "child": 4, "name": "file"},
                {"parent": 2, "child": 3, "name": "backing"},
            ],
        });
        let node = |name: &str, driver: &str, read_only: bool| {
            let image = json!({"virtual-size": 1 << 20});
            json!({"node-name": name, "drv": driver, "ro": read_only, "image": image, "file": "/a"})
        };
        let nodes = json!([
            node("top", "qcow2", false),
            node("base", "raw", true),
            node("f\"1", "file", false)
        ]);
        let exports = json!([{"id": "vda", "node-name": "top"}]);
        Picture::new(&graph, &nodes, &exports, |bytes| {
            super::super::table::bytes(bytes.unwrap_or(0))
        })
    }

    #[test]
    fn a_tree_shows_each_node_below_its_users() {
        let expected = "export 'vda'\n\
                        └─ root: top  qcow2, 1 MiB\n   \
                        ├─ file: f\"1  file, 1 MiB, /a\n   \
                        └─ backing: base  raw, 1 MiB, read-only, /a\n";
        assert_eq!(picture().tree(), expected);
    }

    #[test]
    fn graphviz_gets_names_in_quotes() {
        let dot = picture().dot();
        assert!(
            dot.contains("  n4 [label=\"f\\\"1  file, 1 MiB, /a\"];\n"),
            "{dot}"
        );
        assert!(dot.contains("  n2 -> n3 [label=\"backing\"];\n"), "{dot}");
    }
}
