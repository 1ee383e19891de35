//! The daemon's exports: added and removed, on the command line or while guests run.
//!
//! A name and a socket are taken from when an export is asked for until the last of it is gone, so nobody
//! meets one that is on its way. A removal is begun by [`Daemon::remove_export`] and goes on by itself:
//! the front-end's connection ends, which stops the queues; what guests wrote is flushed; the node is let
//! go; and [`DaemonEvent::ExportDeleted`] says that it is done.
//!
//! Threads: the control thread.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use blockcore::graph::{ExportState, RootId, RootUser};
use blockcore::io::InFlight;
use blockcore::{Error, ErrorKind};
use futures_channel::oneshot;

use super::{ControlHandle, Daemon, DaemonEvent};
use crate::config::{AnyExportConfig, ExportConfig, SocketAddress};
use crate::export::{Export, RootSide};
use crate::vhost_user::listener::{Server, Socket};
use crate::vhost_user::session::BackendChannel;
use crate::worker::DeviceId;

/// What follows a socket's path in that of its export's state file.
const STATE_SUFFIX: &str = ".state";

/// Whether an export is removed from under a front-end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Removal {
    /// Only if no front-end is connected.
    #[default]
    Safe,
    /// The connection is ended.
    Hard,
}

/// An export and who serves its socket.
pub(super) struct ExportEntry {
    pub(super) export: Rc<Export>,
    server: Rc<Server>,
    pub(super) channel: Option<BackendChannel>,
    is_going: bool,
}

/// What is known of an export from outside.
pub struct ExportView {
    /// The export.
    pub export: Rc<Export>,
    /// A front-end is connected.
    pub is_connected: bool,
    /// It is being removed.
    pub is_going: bool,
}

/// A removal that goes on by itself.
pub struct Removing {
    /// Whether a front-end was connected, which takes as long to end as its requests do.
    pub had_front_end: bool,
    pub(super) done: oneshot::Receiver<()>,
}

impl Removing {
    /// Waits until the export is gone.
    pub async fn gone(self) {
        // Nothing is ever sent.
        let _ = self.done.await;
    }
}

/// Tells an export's front-end what happens to its node.
struct ExportUser {
    id: String,
    handle: ControlHandle,
}

impl RootUser for ExportUser {
    fn resized(&self, _bytes: u64) {
        let id = self.id.clone();
        self.handle
            .post(Box::new(move |daemon| daemon.config_changed(&id)));
    }
}

/// A name and a socket that are taken by an export on its way.
pub(super) struct Reservation<'a> {
    daemon: &'a Daemon,
    id: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.daemon.reserved.borrow_mut().remove(&self.id);
    }
}

impl Daemon {
    /// Offers a node to front-ends.
    ///
    /// # Errors
    ///
    /// What is wrong with the export, its node or its socket; nothing is left of it.
    pub async fn add_export(&self, config: impl Into<AnyExportConfig>) -> Result<(), Error> {
        let config = match config.into() {
            AnyExportConfig::VhostUser(config) => config,
            AnyExportConfig::Nbd(config) => return self.add_nbd_export(config).await,
        };
        let (id, address) = (config.id.clone(), config.socket.clone());
        let _reserved = self.reserve(&id, Some(&address))?;
        let export = self.open_export(config).await?;
        let server = match self.quitting.get() {
            true => Err(Error::busy("the daemon is being stopped")),
            false => {
                let socket = Socket::at(&address);
                socket.and_then(|socket| Server::start(socket, &id, self.handle()))
            }
        };
        let server = match server {
            Ok(server) => server,
            Err(error) => {
                export.close().await?;
                return Err(error);
            }
        };
        let entry = ExportEntry {
            export,
            server: Rc::new(server),
            channel: None,
            is_going: false,
        };
        self.exports.borrow_mut().insert(id, entry);
        Ok(())
    }

    async fn open_export(&self, mut config: ExportConfig) -> Result<Rc<Export>, Error> {
        config.check()?;
        let workers = self.workers_for(&config.iothreads, config.queues)?;
        let queues = usize::from(config.queues);
        let device = DeviceId(self.next_device.replace(self.next_device.get() + 1));
        let first = self.next_worker.replace(self.next_worker.get() + queues);
        let user: Rc<dyn RootUser> = Rc::new(ExportUser {
            id: config.id.clone(),
            handle: self.handle(),
        });
        let (control, discard) = (&self.control, self.process.discard_state);
        let state = match state_path(&config.socket) {
            Some(path) => Some(ExportState::open(control, &path, &config.id, discard).await?),
            None => None,
        };
        if let Some(state) = &state {
            config.node = control.recorded_node(state, &config.node).await?;
        }
        let root = RootSide {
            user: Some(user),
            state,
        };
        let notices = Arc::clone(&self.notices);
        Export::new(config, device, control, workers, first, root, notices).await
    }

    /// Takes a name, and a socket, for an export on its way.
    pub(super) fn reserve(
        &self,
        id: &str,
        address: Option<&SocketAddress>,
    ) -> Result<Reservation<'_>, Error> {
        let mut reserved = self.reserved.borrow_mut();
        let exports = self.exports.borrow();
        let is_taken = exports.contains_key(id) || self.nbd_exports.borrow().contains_key(id);
        if is_taken || reserved.contains_key(id) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("Block export id '{id}' is already in use"),
            ));
        }
        let served = exports.iter();
        let served = served.map(|(id, entry)| (id, Some(&entry.export.config().socket)));
        let on_their_way = reserved.iter().map(|(id, taken)| (id, taken.as_ref()));
        let mut taken = served.chain(on_their_way);
        let clash = taken.find(|(_, taken)| taken.is_some() && *taken == address);
        if let (Some((other, _)), Some(address)) = (clash, address) {
            return Err(Error::busy(format!(
                "socket {address} is in use: export '{other}' listens there"
            )));
        }
        reserved.insert(id.to_owned(), address.cloned());
        Ok(Reservation {
            daemon: self,
            id: id.to_owned(),
        })
    }

    /// Begins to remove an export; it is gone when [`DaemonEvent::ExportDeleted`] says so.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if it is being removed already or, for
    /// [`Removal::Safe`], has a front-end.
    pub fn remove_export(self: &Rc<Self>, id: &str, removal: Removal) -> Result<Removing, Error> {
        if let Some(export) = self.nbd_export(id) {
            return self.remove_nbd_export(&export, removal);
        }
        let mut exports = self.exports.borrow_mut();
        let entry = exports.get_mut(id).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("Export '{id}' is not found"))
        })?;
        if entry.is_going {
            return Err(Error::busy(format!(
                "Export '{id}' is already shutting down"
            )));
        }
        if removal == Removal::Safe && entry.server.is_connected() {
            return Err(Error::busy(format!(
                "export '{id}' still in use: a front-end is connected to socket {}; disconnect it, or remove \
                 the export with mode 'hard'",
                entry.export.config().socket
            )));
        }
        entry.is_going = true;
        let had_front_end = entry.server.is_connected();
        let (gone, done) = oneshot::channel();
        let (daemon, id) = (Rc::clone(self), id.to_owned());
        let (export, server) = (Rc::clone(&entry.export), Rc::clone(&entry.server));
        self.control.context().spawn(async move {
            // The connection's end stops the queues.
            server.stop();
            server.ended().await;
            server.join();
            let flushed = flush(&id, &export).await;
            let closed = export.close().await;
            if let Err(error) = flushed.and(closed) {
                tracing::error!(export = %id, error = %error.report(), "an export did not end well");
                daemon.failure.borrow_mut().get_or_insert(error);
            }
            daemon.exports.borrow_mut().remove(&id);
            daemon.announce(&DaemonEvent::ExportDeleted(&id));
            drop(gone);
        });
        Ok(Removing {
            had_front_end,
            done,
        })
    }

    /// The export called `id`.
    pub fn export(&self, id: &str) -> Option<Rc<Export>> {
        let exports = self.exports.borrow();
        exports.get(id).map(|entry| Rc::clone(&entry.export))
    }

    /// Every export, by name.
    pub fn exports(&self) -> Vec<ExportView> {
        let exports = self.exports.borrow();
        let views = exports.values().map(|entry| ExportView {
            export: Rc::clone(&entry.export),
            is_connected: entry.server.is_connected(),
            is_going: entry.is_going,
        });
        views.collect()
    }

    /// The requests that are under way of everybody who is connected, over whichever protocol: the export, its
    /// root, the number of the worker and the request.
    pub(crate) async fn under_way(&self) -> Vec<(String, RootId, usize, InFlight)> {
        let mut all = Vec::new();
        for view in self.exports().iter().filter(|view| view.is_connected) {
            let (id, root) = (&view.export.config().id, view.export.root());
            let requests = view.export.in_flight().await.into_iter();
            all.extend(requests.map(|(worker, request)| (id.clone(), root, worker, request)));
        }
        for export in self.nbd_exports() {
            if export.connections() == 0 {
                continue;
            }
            let (id, root) = (&export.config().id, export.root());
            let requests = export.in_flight().await.into_iter();
            all.extend(requests.map(|(worker, request)| (id.clone(), root, worker, request)));
        }
        all
    }

    /// The name of the image that an export's root reads and writes, as it is now.
    pub(crate) fn image_of(&self, root: RootId) -> Option<String> {
        let node = self.control.node_of(root)?;
        self.control
            .read(|graph| Some(graph.described(node).name()))
    }

    pub(super) fn config_changed(&self, id: &str) {
        let exports = self.exports.borrow();
        if let Some(channel) = exports.get(id).and_then(|entry| entry.channel.as_ref()) {
            channel.config_changed();
        }
    }
}

/// Where an export records what its guest reads; `None` for one whose socket has no name.
fn state_path(socket: &SocketAddress) -> Option<PathBuf> {
    let SocketAddress::Path(path) = socket else {
        return None;
    };
    let mut path = path.clone().into_os_string();
    path.push(STATE_SUFFIX);
    Some(path.into())
}

async fn flush(id: &str, export: &Rc<Export>) -> Result<(), Error> {
    if !export.config().writable {
        return Ok(());
    }
    export.flush().await.map_err(|error| {
        Error::new(
            ErrorKind::Io,
            format!("what export '{id}' wrote last may not be on the disk: {error}"),
        )
    })
}
