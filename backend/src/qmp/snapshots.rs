//! Commands that take and delete snapshots: overlays, and those inside of an image.

use std::rc::Rc;

use blockcore::driver::{SnapshotRef, SnapshotSpec};

use super::Service;
use super::command::Commands;
use super::info::{self, SnapshotInfo};
use crate::qapi::QmpError;
use crate::qapi_struct;

qapi_struct! {
    /// A node that is to have an overlay.
    pub struct BlockdevSnapshot {
        /// Which.
        node: String = "node",
        /// The overlay's node, which has no backing node yet.
        overlay: String = "overlay",
    }
}

qapi_struct! {
    /// A snapshot to be taken inside of an image.
    pub struct BlockdevSnapshotInternal {
        /// The image's node.
        device: String = "device",
        /// What it is called.
        name: String = "name",
    }
}

qapi_struct! {
    /// A snapshot to be deleted from inside of an image.
    pub struct BlockdevSnapshotDeleteInternalSync {
        /// The image's node.
        device: String = "device",
        /// Its identifier.
        id: Option<String> = "id",
        /// Its name.
        name: Option<String> = "name",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("blockdev-snapshot", |service, snapshot| async move {
        let BlockdevSnapshot { node, overlay } = snapshot;
        Ok(service.control().snapshot(&node, &overlay).await?)
    });
    commands.add("blockdev-snapshot-internal-sync", take);
    commands.add("blockdev-snapshot-delete-internal-sync", delete);
}

fn refuse<T>(sentence: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(sentence))
}

/// The driver of the node called `device`.
fn driver_of(service: &Service, device: &str) -> Result<&'static str, QmpError> {
    let name = service
        .control()
        .read(|graph| graph.node(device).map(|node| node.driver_name()));
    name.map_err(|_| {
        QmpError::generic(format!(
            "Cannot find device='{device}' nor node-name='{device}'"
        ))
    })
}

async fn take(service: Rc<Service>, arguments: BlockdevSnapshotInternal) -> Result<(), QmpError> {
    let BlockdevSnapshotInternal { device, name } = arguments;
    let driver = driver_of(&service, &device)?;
    let control = service.control();
    let Ok(snapshots) = control.snapshots(&device).await else {
        return refuse(format!(
            "Block format '{driver}' used by device '{device}' does not support internal snapshots"
        ));
    };
    if name.is_empty() {
        return refuse("Name is empty");
    }
    if snapshots.iter().any(|snapshot| snapshot.name == name) {
        return refuse(format!(
            "Snapshot with name '{name}' already exists on device '{device}'"
        ));
    }
    let now = super::since_1970();
    let spec = SnapshotSpec {
        name,
        seconds: now.as_secs(),
        nanoseconds: now.subsec_nanos(),
        ..SnapshotSpec::default()
    };
    Ok(control.take_snapshot(&device, spec).await?)
}

async fn delete(
    service: Rc<Service>,
    arguments: BlockdevSnapshotDeleteInternalSync,
) -> Result<SnapshotInfo, QmpError> {
    let BlockdevSnapshotDeleteInternalSync { device, id, name } = arguments;
    driver_of(&service, &device)?;
    if id.is_none() && name.is_none() {
        return refuse("Name or id must be provided");
    }
    let control = service.control();
    let Ok(snapshots) = control.snapshots(&device).await else {
        return refuse("Failed to get a snapshot list: Operation not supported");
    };
    let found = snapshots.iter().find(|snapshot| {
        id.as_ref().is_none_or(|id| snapshot.id == *id)
            && name.as_ref().is_none_or(|name| snapshot.name == *name)
    });
    let Some(found) = found else {
        let said = |text: &Option<String>| text.clone().unwrap_or_else(|| "null".to_owned());
        return refuse(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
            said(&id),
            said(&name)
        ));
    };
    let which = SnapshotRef::id(found.id.clone());
    let deleted = control.delete_snapshot(&device, &which).await?;
    Ok(info::snapshot(deleted))
}
