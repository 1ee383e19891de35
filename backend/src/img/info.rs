//! `stonework img info`: what an image is.

use std::rc::Rc;

use blockcore::driver::{DriverInfo, SnapshotInfo};
use blockcore::filename::full_backing_name;
use blockcore::graph::NodeId;
use blockcore::io::Io;
use blockcore::{Error, ErrorKind};
use clap::Args;
use serde_json::{Map, Value, json};

use super::cli::{FormatArgs, OutputFormat};
use super::open::{How, Image, Probing};
use super::walk::SECTOR_BYTES;
use super::{Failure, Program, output, snapshot};

/// Longest chain of images that is followed: longer ones are a mistake, or a loop.
const MAX_CHAIN: usize = 200;

/// `stonework img info`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// How to print it
    #[arg(long, value_enum, default_value_t)]
    pub output: OutputFormat,
    /// Its backing images, too
    #[arg(short, long)]
    pub backing_chain: bool,
    /// Look at it although somebody may be changing it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// The image
    pub filename: String,
}

/// What is printed of an image.
struct ImageInfo {
    filename: String,
    format: &'static str,
    bytes: u64,
    allocated: Option<u64>,
    driver: DriverInfo,
    backing: Option<Backing>,
    snapshots: Vec<SnapshotInfo>,
    children: Vec<ChildInfo>,
}

/// What its header says of its backing image.
struct Backing {
    name: String,
    /// Seen from this process's directory; `None` if that cannot be said.
    full: Option<String>,
    format: Option<String>,
}

/// What is printed of a node below.
struct ChildInfo {
    name: &'static str,
    filename: String,
    format: &'static str,
    is_protocol: bool,
    bytes: u64,
    allocated: Option<u64>,
    driver: DriverInfo,
    children: Vec<ChildInfo>,
}

pub(super) async fn run(program: Rc<Program>, args: InfoArgs) -> Result<u8, Failure> {
    let mut how = How {
        force_share: args.force_share,
        backing: false,
        ..How::reading(&args.format, Probing::Allowed)?
    };
    let mut infos: Vec<ImageInfo> = Vec::new();
    let mut next = Some(args.filename);
    while let Some(name) = next.take() {
        if infos.len() == MAX_CHAIN {
            return Err(Error::invalid(format!(
                "the chain of '{}' is longer than {MAX_CHAIN} images, or a loop",
                infos[0].filename
            ))
            .into());
        }
        let image = program.open(&name, &how).await?;
        let mut info = look(&image).await?;
        if how.image_opts {
            let node = image.node;
            info.filename = program.control.read(|graph| graph.described(node).name());
        }
        image.close().await?;
        if let Some(backing) = info.backing.as_ref().filter(|_| args.backing_chain) {
            let Some(full) = &backing.full else {
                return Err(Error::invalid(format!(
                    "cannot tell where backing image '{}' of '{name}' is",
                    backing.name
                ))
                .into());
            };
            next = Some(full.clone());
            how.format.clone_from(&backing.format);
            how.image_opts = false;
        }
        infos.push(info);
    }
    match args.output {
        OutputFormat::Human => {
            let texts: Vec<_> = infos.iter().map(ImageInfo::human).collect();
            program.say(texts.join("\n\n"))?;
        }
        OutputFormat::Json => {
            let mut values: Vec<_> = infos.iter().map(ImageInfo::json).collect();
            let value = match args.backing_chain {
                true => Value::Array(values),
                false => values.swap_remove(0),
            };
            program.say(output::json(&value))?;
        }
    }
    Ok(0)
}

async fn look(image: &Image) -> Result<ImageInfo, Error> {
    let children = children_of(image).await?;
    let request = image.request().await;
    let allocated = request.io().allocated_bytes().await.ok().flatten();
    let header = image.look(|node| node.backing_in_header().cloned());
    let backing = header.map(|backing| Backing {
        full: full_backing_name(&image.name, &backing.name).ok().flatten(),
        name: backing.name,
        format: backing.format,
    });
    Ok(ImageInfo {
        filename: image.name.clone(),
        format: image.format(),
        bytes: image.bytes(),
        allocated,
        driver: image.look(|node| node.io().info()),
        backing,
        snapshots: snapshot::list(&image.control, &image.look(|node| node.name().to_owned()))
            .await?,
        children,
    })
}

/// A child before its request: which, and its place among its parent's.
struct Below {
    index: usize,
    name: &'static str,
    node: NodeId,
}

fn below(image: &Image, node: NodeId) -> Vec<Below> {
    image.control.read(|graph| {
        let children = graph.children(node);
        let kind = graph.node_by_id(node).map(|node| node.driver_type());
        let places = kind.map_or(&[][..], |kind| kind.children);
        children
            .filter_map(|(name, child)| {
                let index = places.iter().position(|spec| spec.name == name)?;
                Some(Below {
                    index,
                    name,
                    node: child.id(),
                })
            })
            .collect()
    })
}

async fn children_of(image: &Image) -> Result<Vec<ChildInfo>, Error> {
    let request = image.request().await;
    let mut children = Vec::new();
    for child in below(image, image.node) {
        children.push(look_at_child(image, child, request.io()).await?);
    }
    Ok(children)
}

async fn look_at_child(image: &Image, child: Below, parent: Io<'_>) -> Result<ChildInfo, Error> {
    let io = parent.child(child.index);
    let mut children = Vec::new();
    for grandchild in below(image, child.node) {
        // Boxed: the recursion has no bound that the compiler could see.
        children.push(Box::pin(look_at_child(image, grandchild, io)).await?);
    }
    let allocated = io.allocated_bytes().await.ok().flatten();
    image.control.read(|graph| {
        let gone = || Error::new(ErrorKind::NotFound, "the node is gone");
        let node = graph.node_by_id(child.node).ok_or_else(gone)?;
        Ok(ChildInfo {
            name: child.name,
            filename: graph.described(child.node).name(),
            format: node.driver_name(),
            is_protocol: node.driver_type().children.is_empty(),
            // As disks have it: in whole sectors.
            bytes: node.bytes().next_multiple_of(SECTOR_BYTES),
            allocated,
            driver: node.io().info(),
            children,
        })
    })
}

/// A property of a format as JSON. Words and whole numbers are what they look like; a number with a
/// point is a version, and text; and so is what names a file.
fn property(name: &str, text: &str) -> Value {
    match text {
        text if name.ends_with("file") => Value::String(text.to_owned()),
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        text if text.starts_with(['[', '{']) => {
            serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
        }
        text => match text.parse::<u64>() {
            Ok(number) => Value::from(number),
            Err(_) => Value::String(text.to_owned()),
        },
    }
}

/// Adds what only one format has, under `format-specific`.
pub(crate) fn add_specific(info: &mut Map<String, Value>, format: &str, driver: &DriverInfo) {
    // `qemu-img` has this for files, too, where it is empty.
    if driver.specific.is_empty() && !matches!(format, "file" | "host_device") {
        return;
    }
    let properties = driver.specific.iter();
    let properties = properties.map(|(name, text)| ((*name).to_owned(), property(name, text)));
    let data = Value::Object(properties.collect());
    let of_format = json!({"type": format, "data": data});
    info.insert("format-specific".into(), of_format);
}

impl ImageInfo {
    fn json(&self) -> Value {
        let mut info = Map::new();
        let children: Vec<_> = self.children.iter().map(ChildInfo::json).collect();
        info.insert("children".into(), Value::Array(children));
        info.insert("virtual-size".into(), json!(self.bytes));
        info.insert("filename".into(), json!(self.filename));
        info.insert("format".into(), json!(self.format));
        info.insert("dirty-flag".into(), json!(self.driver.is_dirty));
        if let Some(allocated) = self.allocated {
            info.insert("actual-size".into(), json!(allocated));
        }
        if self.driver.cluster_bytes > 0 {
            info.insert("cluster-size".into(), json!(self.driver.cluster_bytes));
        }
        if let Some(backing) = &self.backing {
            info.insert("backing-filename".into(), json!(backing.name));
            if let Some(full) = &backing.full {
                info.insert("full-backing-filename".into(), json!(full));
            }
            if let Some(format) = &backing.format {
                info.insert("backing-filename-format".into(), json!(format));
            }
        }
        if !self.snapshots.is_empty() {
            let snapshots = self.snapshots.iter().map(snapshot::to_json);
            info.insert("snapshots".into(), Value::Array(snapshots.collect()));
        }
        add_specific(&mut info, self.format, &self.driver);
        Value::Object(info)
    }

    fn human(&self) -> String {
        let mut lines = vec![
            format!("image: {}", self.filename),
            format!("file format: {}", self.format),
            format!(
                "virtual size: {} ({} bytes)",
                output::size(self.bytes),
                self.bytes
            ),
            disk_size(self.allocated),
        ];
        if self.driver.cluster_bytes > 0 {
            lines.push(format!("cluster_size: {}", self.driver.cluster_bytes));
        }
        if self.driver.is_dirty {
            lines.push("cleanly shut down: no".into());
        }
        if let Some(backing) = &self.backing {
            let at = match &backing.full {
                None => " (cannot determine actual path)".into(),
                Some(full) if *full != backing.name => format!(" (actual path: {full})"),
                Some(_) => String::new(),
            };
            lines.push(format!("backing file: {}{at}", backing.name));
            if let Some(format) = &backing.format {
                lines.push(format!("backing file format: {format}"));
            }
        }
        if !self.snapshots.is_empty() {
            lines.push(snapshot::table(&self.snapshots));
        }
        if !self.driver.specific.is_empty() {
            lines.push("Format specific information:".into());
            for (name, text) in &self.driver.specific {
                add_property(&mut lines, 4, name, &property(name, text));
            }
        }
        for child in &self.children {
            child.add_human(&mut lines, "", 0);
        }
        lines.join("\n")
    }
}

impl ChildInfo {
    fn json(&self) -> Value {
        let children: Vec<_> = self.children.iter().map(Self::json).collect();
        let mut info = Map::new();
        info.insert("children".into(), Value::Array(children));
        info.insert("virtual-size".into(), json!(self.bytes));
        info.insert("filename".into(), json!(self.filename));
        info.insert("format".into(), json!(self.format));
        info.insert("dirty-flag".into(), json!(self.driver.is_dirty));
        if let Some(allocated) = self.allocated {
            info.insert("actual-size".into(), json!(allocated));
        }
        if self.driver.cluster_bytes > 0 {
            info.insert("cluster-size".into(), json!(self.driver.cluster_bytes));
        }
        add_specific(&mut info, self.format, &self.driver);
        json!({"name": self.name, "info": info})
    }

    fn add_human(&self, lines: &mut Vec<String>, above: &str, indent: usize) {
        let path = format!("{above}/{}", self.name);
        let inner = indent + 4;
        lines.push(output::indented(indent, &format!("Child node '{path}':")));
        let kind = match self.is_protocol {
            true => "protocol type",
            false => "file format",
        };
        let length = match self.is_protocol {
            true => "file length",
            false => "virtual size",
        };
        for line in [
            format!("filename: {}", self.filename),
            format!("{kind}: {}", self.format),
            format!(
                "{length}: {} ({} bytes)",
                output::size(self.bytes),
                self.bytes
            ),
            disk_size(self.allocated),
        ] {
            lines.push(output::indented(inner, &line));
        }
        for (name, text) in &self.driver.specific {
            add_property(lines, inner, name, &property(name, text));
        }
        for child in &self.children {
            child.add_human(lines, &path, inner);
        }
    }
}

fn disk_size(allocated: Option<u64>) -> String {
    match allocated {
        Some(bytes) => format!("disk size: {}", output::size(bytes)),
        None => "disk size: unavailable".into(),
    }
}

/// A property and, below it, what it is made of.
fn add_property(lines: &mut Vec<String>, indent: usize, name: &str, value: &Value) {
    let label = name.replace('-', " ");
    let mut nested = |inner: Vec<(String, &Value)>| {
        lines.push(output::indented(indent, &format!("{label}:")));
        for (name, value) in inner {
            add_property(lines, indent + 4, &name, value);
        }
    };
    match value {
        Value::Array(list) => {
            let places = list.iter().enumerate();
            nested(
                places
                    .map(|(at, value)| (format!("[{at}]"), value))
                    .collect(),
            );
        }
        Value::Object(map) => {
            nested(
                map.iter()
                    .map(|(key, value)| (key.clone(), value))
                    .collect(),
            );
        }
        Value::String(text) => lines.push(output::indented(indent, &format!("{label}: {text}"))),
        value => lines.push(output::indented(indent, &format!("{label}: {value}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_text_and_a_width_is_a_number() {
        assert_eq!(property("compat", "1.1"), json!("1.1"));
        assert_eq!(property("refcount-bits", "16"), json!(16));
        assert_eq!(property("corrupt", "false"), json!(false));
        assert_eq!(property("data-file", "16"), json!("16"));
        assert_eq!(
            property("bitmaps", "[{\"name\": \"b\"}]"),
            json!([{"name": "b"}])
        );
        assert_eq!(property("compression-type", "[zlib"), json!("[zlib"));
    }

    #[test]
    fn lists_are_printed_with_their_places() {
        let mut lines = Vec::new();
        let value = json!([{"name": "b0", "flags": ["auto"]}]);
        add_property(&mut lines, 4, "bitmaps", &value);
        let text = lines.join("\n");
        for line in [
            "    bitmaps:\n        [0]:",
            "            name: b0",
            "                [0]: auto",
        ] {
            assert!(text.contains(line), "{text}");
        }
    }
}
