//! Commands about character devices.

use std::rc::Rc;

use super::Service;
use super::command::Commands;
use crate::chardev::{BACKENDS, ChardevBackend};
use crate::qapi::QmpError;
use crate::qapi_struct;

qapi_struct! {
    /// A character device to be made.
    pub struct ChardevAdd {
        /// Its name.
        id: String = "id",
        /// What it is made of.
        backend: ChardevBackend = "backend",
    }
}

qapi_struct! {
    /// What was made.
    pub struct ChardevReturn {
        /// The path of a terminal, of which there are none here.
        pty: Option<String> = "pty",
    }
}

qapi_struct! {
    /// A character device to be removed.
    pub struct ChardevRemove {
        /// Which.
        id: String = "id",
    }
}

qapi_struct! {
    /// A character device.
    pub struct ChardevInfo {
        /// Its name.
        label: String = "label",
        /// What it is.
        filename: String = "filename",
        /// Whether somebody uses it.
        frontend_open: bool = "frontend-open",
    }
}

qapi_struct! {
    /// Something that a character device can be made of.
    pub struct ChardevBackendInfo {
        /// The word for it.
        name: String = "name",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("chardev-add", chardev_add);
    commands.add("chardev-remove", chardev_remove);
    commands.add("query-chardev", query_chardev);
    commands.add("query-chardev-backends", query_backends);
}

async fn chardev_add(
    service: Rc<Service>,
    arguments: ChardevAdd,
) -> Result<ChardevReturn, QmpError> {
    let ChardevAdd { id, backend } = arguments;
    let exists = service.chardevs.borrow().contains_key(&id);
    let added = service.add_chardev(&id, &backend);
    match added {
        Ok(_) => Ok(ChardevReturn { pty: None }),
        Err(error) if exists => Err(error),
        Err(error) => Err(QmpError::generic(format!(
            "Failed to add chardev '{id}': {}",
            error.desc
        ))),
    }
}

async fn chardev_remove(service: Rc<Service>, arguments: ChardevRemove) -> Result<(), QmpError> {
    let id = arguments.id;
    let mut chardevs = service.chardevs.borrow_mut();
    match chardevs.get(&id).map(|device| device.is_used()) {
        None => Err(QmpError::generic(format!("Chardev '{id}' not found"))),
        Some(true) => Err(QmpError::generic(format!("Chardev '{id}' is busy"))),
        Some(false) => {
            chardevs.remove(&id);
            Ok(())
        }
    }
}

async fn query_chardev(service: Rc<Service>, (): ()) -> Result<Vec<ChardevInfo>, QmpError> {
    let chardevs = service.chardevs.borrow();
    let info = |device: &Rc<crate::chardev::Chardev>| ChardevInfo {
        label: device.id().to_owned(),
        filename: device.describe(),
        frontend_open: device.is_used(),
    };
    Ok(chardevs.values().map(info).collect())
}

async fn query_backends(_: Rc<Service>, (): ()) -> Result<Vec<ChardevBackendInfo>, QmpError> {
    let info = |name: &&str| ChardevBackendInfo {
        name: (*name).to_owned(),
    };
    Ok(BACKENDS.iter().map(info).collect())
}
