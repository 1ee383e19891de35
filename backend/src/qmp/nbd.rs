//! Commands that start and stop the NBD server, and the older ones that offer a node to its clients.

use std::rc::Rc;

use super::Service;
use super::command::Commands;
use super::exports::BlockExportRemoveMode;
use crate::daemon::Removal;
use crate::nbd::config::BitmapChoice;
use crate::nbd::server::NbdServerStart;
use crate::nbd::{NbdExportConfig, ServerOptions};
use crate::qapi::QmpError;
use crate::qapi_struct;

qapi_struct! {
    /// A node that is offered to NBD clients.
    pub struct NbdServerAdd {
        /// What clients call it, and its name in this process; by default the node's.
        name: Option<String> = "name",
        /// What it is, for people.
        description: Option<String> = "description",
        /// The node.
        device: String = "device",
        /// Whether clients may write; they may not to a read-only node, whatever this says.
        writable: Option<bool> = "writable",
        /// A dirty bitmap that they may read.
        bitmap: Option<String> = "bitmap",
    }
}

qapi_struct! {
    /// A node that is no longer offered.
    pub struct NbdServerRemove {
        /// What clients call it.
        name: String = "name",
        /// Whether from under them; not by default.
        mode: Option<BlockExportRemoveMode> = "mode",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("nbd-server-start", nbd_server_start);
    commands.add("nbd-server-stop", nbd_server_stop);
    commands.add("nbd-server-add", nbd_server_add);
    commands.add("nbd-server-remove", nbd_server_remove);
}

async fn nbd_server_start(service: Rc<Service>, arguments: NbdServerStart) -> Result<(), QmpError> {
    let options = ServerOptions::from_command(arguments, service.control())?;
    Ok(service.daemon()?.start_nbd_server(&options)?)
}

async fn nbd_server_stop(service: Rc<Service>, (): ()) -> Result<(), QmpError> {
    for removing in service.daemon()?.stop_nbd_server()? {
        removing.gone().await;
    }
    Ok(())
}

async fn nbd_server_add(service: Rc<Service>, arguments: NbdServerAdd) -> Result<(), QmpError> {
    let (node, read_only) = service.control().read(|graph| {
        let node = graph.node(&arguments.device).map_err(|_| {
            let device = &arguments.device;
            QmpError::generic(format!(
                "Cannot find device='{device}' nor node-name='{device}'"
            ))
        })?;
        Ok::<_, QmpError>((node.name().to_owned(), graph.modes(node.id()).read_only))
    })?;
    let name = arguments.name.unwrap_or(arguments.device);
    let bitmaps = arguments
        .bitmap
        .map(|name| BitmapChoice { node: None, name });
    let config = NbdExportConfig {
        id: name.clone(),
        node,
        name,
        description: arguments.description.unwrap_or_default(),
        writable: arguments.writable.unwrap_or(false) && !read_only,
        writethrough: false,
        iothreads: Vec::new(),
        bitmaps: bitmaps.into_iter().collect(),
        allocation_depth: false,
    };
    config.check()?;
    service.daemon()?.add_export(config).await?;
    Ok(())
}

async fn nbd_server_remove(
    service: Rc<Service>,
    arguments: NbdServerRemove,
) -> Result<(), QmpError> {
    let (daemon, name) = (service.daemon()?, &arguments.name);
    if daemon.export(name).is_some() {
        let text = format!("Block export '{name}' is not an NBD export");
        return Err(QmpError::generic(text));
    }
    let removal = match arguments.mode {
        Some(BlockExportRemoveMode::Hard) => Removal::Hard,
        Some(BlockExportRemoveMode::Safe) | None => Removal::Safe,
    };
    let removing = daemon.remove_export(name, removal)?;
    if !removing.had_front_end {
        removing.gone().await;
    }
    Ok(())
}
