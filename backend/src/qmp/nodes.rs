//! Commands that change nodes.

use std::rc::Rc;

use blockcore::ErrorKind;
use blockcore::driver::{BackingName, Preallocation};
use blockcore::graph::Control;

use super::Service;
use super::command::Commands;
use crate::config::is_identifier;
use crate::qapi::QmpError;
use crate::qapi::node::NodeOptions;
use crate::qapi_struct;

qapi_struct! {
    /// Nodes to be reopened, and how.
    pub struct BlockdevReopen {
        /// Each with all of its options.
        options: Vec<NodeOptions> = "options",
    }
}

qapi_struct! {
    /// A node to be removed.
    pub struct BlockdevDel {
        /// Which.
        node_name: String = "node-name",
    }
}

qapi_struct! {
    /// Nodes that are to be another process's, or ours again.
    pub struct BlockdevSetActive {
        /// Which; all by default.
        node_name: Option<String> = "node-name",
        /// Whether they are to be ours.
        active: bool = "active",
    }
}

qapi_struct! {
    /// A node that is to have another length.
    pub struct BlockResize {
        /// Devices have none here, so nothing is found by this name.
        device: Option<String> = "device",
        /// Which.
        node_name: Option<String> = "node-name",
        /// The length in bytes.
        size: i64 = "size",
    }
}

qapi_struct! {
    /// An image whose header is to say another backing image.
    pub struct ChangeBackingFile {
        /// A node of the chain.
        device: String = "device",
        /// The node of the image.
        image_node_name: String = "image-node-name",
        /// What its header is to say.
        backing_file: String = "backing-file",
    }
}

qapi_struct! {
    /// A node whose writes are watched.
    pub struct BlockSetWriteThreshold {
        /// Which.
        node_name: String = "node-name",
        /// The offset beyond which a write is told of, in bytes; 0 for none.
        write_threshold: u64 = "write-threshold",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("blockdev-add", blockdev_add);
    commands.add("blockdev-del", blockdev_del);
    commands.add("blockdev-reopen", blockdev_reopen);
    commands.add("blockdev-set-active", blockdev_set_active);
    commands.add("block_resize", block_resize);
    commands.add("change-backing-file", change_backing_file);
    commands.add("block-set-write-threshold", set_write_threshold);
}

fn refuse<T>(sentence: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(sentence))
}

fn is_node(control: &Control, name: &str) -> bool {
    control.read(|graph| graph.node(name).is_ok())
}

async fn blockdev_add(
    service: Rc<Service>,
    NodeOptions(options): NodeOptions,
) -> Result<(), QmpError> {
    match options.get("node-name") {
        None => return refuse("'node-name' must be specified for the root node"),
        Some(name) if !is_identifier(name) => {
            return refuse(format!("Invalid node-name: '{name}'"));
        }
        Some(name) if is_node(service.control(), name) => {
            return refuse(format!("Duplicate nodes with node-name='{name}'"));
        }
        Some(_) => {}
    }
    service.control().add(options).await?;
    Ok(())
}

async fn blockdev_del(service: Rc<Service>, arguments: BlockdevDel) -> Result<(), QmpError> {
    let name = arguments.node_name;
    let owned = service.control().read(|graph| {
        let node = graph.node(&name).ok()?;
        Some(graph.is_owned(node.id()))
    });
    match owned {
        None => refuse(format!("Failed to find node with node-name='{name}'")),
        Some(false) => refuse(format!("Node {name} is not owned by the monitor")),
        Some(true) => Ok(service.control().remove(&name).await?),
    }
}

async fn blockdev_reopen(service: Rc<Service>, arguments: BlockdevReopen) -> Result<(), QmpError> {
    let entries: Vec<_> = arguments
        .options
        .into_iter()
        .map(|NodeOptions(o)| o)
        .collect();
    for entry in &entries {
        match entry.get("node-name") {
            None => return refuse("node-name not specified"),
            Some(name) if !is_node(service.control(), name) => {
                return refuse(format!("Failed to find node with node-name='{name}'"));
            }
            Some(_) => {}
        }
    }
    Ok(service.control().reopen(entries).await?)
}

async fn blockdev_set_active(
    service: Rc<Service>,
    arguments: BlockdevSetActive,
) -> Result<(), QmpError> {
    let control = service.control();
    let names = match arguments.node_name {
        Some(name) if !is_node(control, &name) => {
            return refuse(format!("Failed to find node with node-name='{name}'"));
        }
        Some(name) => vec![name],
        // Those on top: what is below goes with them.
        None => control.read(|graph| {
            let below: Vec<_> = graph
                .lines()
                .into_iter()
                .filter(|line| matches!(line.from, blockcore::graph::LineEnd::Node(_)))
                .map(|line| line.to)
                .collect();
            let top = graph.nodes().filter(|node| !below.contains(&node.id()));
            top.map(|node| node.name().to_owned()).collect()
        }),
    };
    for name in names {
        match control.set_active(&name, arguments.active).await {
            // Gone meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(())
}

async fn block_resize(service: Rc<Service>, arguments: BlockResize) -> Result<(), QmpError> {
    let control = service.control();
    let name = arguments.node_name.unwrap_or_default();
    if !is_node(control, &name) {
        let device = arguments.device.unwrap_or_default();
        return refuse(format!(
            "Cannot find device='{device}' nor node-name='{name}'"
        ));
    }
    let Ok(bytes) = u64::try_from(arguments.size) else {
        return refuse("Parameter 'size' expects a >0 size");
    };
    Ok(control.resize(&name, bytes, Preallocation::Off).await?)
}

async fn change_backing_file(
    service: Rc<Service>,
    arguments: ChangeBackingFile,
) -> Result<(), QmpError> {
    let control = service.control();
    let ChangeBackingFile {
        device,
        image_node_name: image,
        backing_file,
    } = arguments;
    if !is_node(control, &device) {
        return refuse(format!(
            "Cannot find device='{device}' nor node-name='{device}'"
        ));
    }
    let found = control.read(|graph| {
        let node = graph.node(&image).ok()?;
        let backing = graph.backing_chain_next(node.id());
        let below = backing.and_then(|id| graph.node_by_id(id));
        Some((node.id(), below.map(|node| node.driver_name().to_owned())))
    });
    match found {
        None => refuse(format!("Cannot find device='' nor node-name='{image}'")),
        Some((_, None)) => {
            refuse("not allowing backing file change on an image without a backing file")
        }
        Some((id, format)) => {
            let backing = BackingName {
                name: backing_file,
                format,
            };
            Ok(control.change_backing_name(id, Some(backing)).await?)
        }
    }
}

async fn set_write_threshold(
    service: Rc<Service>,
    arguments: BlockSetWriteThreshold,
) -> Result<(), QmpError> {
    let threshold = Some(arguments.write_threshold).filter(|bytes| *bytes > 0);
    service
        .control()
        .read(|graph| match graph.node(&arguments.node_name) {
            Ok(node) => {
                node.state().set_write_threshold(threshold);
                Ok(())
            }
            Err(_) => refuse(format!("Device '{}' not found", arguments.node_name)),
        })
}
