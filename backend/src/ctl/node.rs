//! `stonework ctl node`.

use serde_json::{Value, json};

use super::cli::{NewSize, NodeVerb};
use super::table::{Table, list, text};
use super::{Ctl, Failure, node_options};

impl Ctl {
    pub(super) fn node(&mut self, verb: &NodeVerb) -> Result<(), Failure> {
        match verb {
            NodeVerb::Ls { all } => {
                let all = *all;
                self.show(NODES, json!({"flat": true}), |ctl, nodes| {
                    ctl.list_nodes(nodes, all)
                })
            }
            NodeVerb::Show { node } => self.show_node(node),
            NodeVerb::Add { options } => {
                let options = self.options(options)?;
                self.change("blockdev-add", options)
            }
            NodeVerb::Rm { node } => self.change("blockdev-del", json!({"node-name": node})),
            NodeVerb::Resize { node, size } => self.resize(node, *size),
            NodeVerb::Reopen { options } => {
                let all = options.iter().map(|options| self.options(options));
                let all: Vec<_> = all.collect::<Result<_, _>>()?;
                self.change("blockdev-reopen", json!({"options": all}))
            }
            NodeVerb::Activate { node } => self.set_active(node.as_deref(), true),
            NodeVerb::Deactivate { node } => self.set_active(node.as_deref(), false),
            NodeVerb::Threshold { node, offset } => {
                let what = json!({"node-name": node, "write-threshold": offset});
                self.change("block-set-write-threshold", what)
            }
        }
    }

    /// Options as typed, in the types that the schema has.
    fn options(&self, given: &str) -> Result<Value, Failure> {
        let options = node_options(given, &self.graph);
        options
            .map(|options| options.to_json())
            .map_err(|error| Failure::Usage(error.report()))
    }

    fn set_active(&mut self, node: Option<&str>, active: bool) -> Result<(), Failure> {
        let mut what = json!({"active": active});
        if let Some(node) = node {
            what["node-name"] = json!(node);
        }
        self.change("blockdev-set-active", what)
    }

    fn list_nodes(&mut self, nodes: &Value, all: bool) -> Result<(), Failure> {
        let mut table = Table::new(&["NODE", "DRIVER", "SIZE", "ACCESS", "CACHE", "FILE"]);
        let mut rows: Vec<_> = list(nodes).iter().collect();
        rows.retain(|node| all || !text(&node["node-name"]).starts_with('#'));
        rows.sort_by_key(|node| text(&node["node-name"]));
        for node in rows {
            let access = match (&node["active"], &node["ro"]) {
                (Value::Bool(false), _) => "inactive",
                (_, Value::Bool(true)) => "read-only",
                _ => "read-write",
            };
            table.row(vec![
                text(&node["node-name"]),
                text(&node["drv"]),
                self.bytes(node["image"]["virtual-size"].as_u64()),
                access.to_owned(),
                cache(&node["cache"]).to_owned(),
                text(&node["file"]),
            ]);
        }
        self.print_table(&table)
    }

    /// The node called `name`, as the daemon describes it; `None` on a dry run.
    fn find(&mut self, name: &str) -> Result<Option<Value>, Failure> {
        let Some(nodes) = self.ask(NODES, json!({"flat": true}))? else {
            return Ok(None);
        };
        let mut nodes = list(&nodes).iter();
        let found = nodes.find(|node| node["node-name"] == name).cloned();
        found.map(Some).ok_or_else(|| Failure::Refused {
            class: "GenericError".to_owned(),
            text: format!("there is no node '{name}'; 'stonework ctl node ls' lists them"),
        })
    }

    fn show_node(&mut self, name: &str) -> Result<(), Failure> {
        let Some(node) = self.find(name)? else {
            return Ok(());
        };
        if self.how.json {
            return self.print_json(&node);
        }
        let image = &node["image"];
        let mut lines = vec![
            ("node", text(&node["node-name"])),
            ("driver", text(&node["drv"])),
            ("file", text(&node["file"])),
            ("size", self.bytes(image["virtual-size"].as_u64())),
            ("on disk", self.bytes(image["actual-size"].as_u64())),
            ("read-only", text(&node["ro"])),
            ("active", text(&node["active"])),
            ("cache", cache(&node["cache"]).to_owned()),
            ("detect-zeroes", text(&node["detect_zeroes"])),
        ];
        if let Some(backing) = node["backing_file"].as_str() {
            lines.push(("backing", backing.to_owned()));
        }
        if let Some(offset) = node["write_threshold"]
            .as_u64()
            .filter(|offset| *offset > 0)
        {
            lines.push(("write threshold", self.bytes(Some(offset))));
        }
        if let Some(format) = image["format-specific"]["data"].as_object() {
            for (key, value) in format {
                lines.push((key, text(value)));
            }
        }
        let shown = |bytes: &Value| self.bytes(bytes.as_u64());
        let bitmaps = list(&node["dirty-bitmaps"]).iter().map(|bitmap| {
            let name = text(&bitmap["name"]);
            format!("{name} ({} dirty)", shown(&bitmap["count"]))
        });
        let bitmaps: Vec<_> = bitmaps.collect();
        if !bitmaps.is_empty() {
            lines.push(("bitmaps", bitmaps.join(", ")));
        }
        let width = lines.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
        for (key, value) in lines {
            self.print(&format!("{key:width$}  {value}"))?;
        }
        Ok(())
    }

    fn resize(&mut self, node: &str, size: NewSize) -> Result<(), Failure> {
        let size = match size {
            NewSize::Bytes(bytes) => bytes,
            NewSize::More(more) => {
                let Some(found) = self.find(node)? else {
                    return Ok(());
                };
                let bytes = found["image"]["virtual-size"].as_u64().unwrap_or(0);
                bytes.checked_add(more).ok_or_else(|| {
                    Failure::Usage(format!("node '{node}' cannot be longer by {more} bytes"))
                })?
            }
        };
        self.change("block_resize", json!({"node-name": node, "size": size}))
    }
}

/// The command that lists nodes.
pub(super) const NODES: &str = "query-named-block-nodes";

/// QEMU's word for how writes are kept, as far as a node decides it.
fn cache(cache: &Value) -> &'static str {
    match (&cache["direct"], &cache["no-flush"]) {
        (_, Value::Bool(true)) => "unsafe",
        (Value::Bool(true), _) => "none",
        _ => "writeback",
    }
}
