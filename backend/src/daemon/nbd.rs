//! The daemon's NBD server and what it offers.
//!
//! Threads: the control thread.

use std::rc::Rc;

use blockcore::{Error, ErrorKind};
use futures_channel::oneshot;

use super::exports::{Removal, Removing};
use super::{Daemon, DaemonEvent};
use crate::nbd::{NbdExport, NbdExportConfig, NbdServer, ServerOptions};

impl Daemon {
    /// Begins to listen for NBD clients.
    ///
    /// # Errors
    ///
    /// That is so already; the host's refusal.
    pub fn start_nbd_server(&self, options: &ServerOptions) -> Result<(), Error> {
        if self.nbd_server.borrow().is_some() {
            return Err(Error::busy("NBD server already running"));
        }
        let server = NbdServer::start(options.clone(), self.control.context())?;
        self.nbd_server.replace(Some(server));
        Ok(())
    }

    /// Ends all connections of NBD clients, and removes what was offered to them; listens no more. It goes
    /// on by itself.
    ///
    /// # Errors
    ///
    /// There is no server.
    pub fn stop_nbd_server(self: &Rc<Self>) -> Result<Vec<Removing>, Error> {
        let server = self.nbd_server.take().ok_or_else(not_running)?;
        server.stop();
        let exports = self.nbd_exports();
        let going = exports.iter().filter(|export| !export.is_going());
        going
            .map(|export| self.remove_nbd_export(export, Removal::Hard))
            .collect()
    }

    /// What is offered to NBD clients.
    pub fn nbd_exports(&self) -> Vec<Rc<NbdExport>> {
        self.nbd_exports.borrow().values().cloned().collect()
    }

    /// The export of this name that is offered to NBD clients.
    pub fn nbd_export(&self, id: &str) -> Option<Rc<NbdExport>> {
        self.nbd_exports.borrow().get(id).cloned()
    }

    pub(super) async fn add_nbd_export(&self, config: NbdExportConfig) -> Result<(), Error> {
        let id = config.id.clone();
        let _reserved = self.reserve(&id, None)?;
        let server = self.nbd_server.borrow().clone().ok_or_else(not_running)?;
        if server.has(&config.name) {
            return Err(NbdServer::taken(&config.name));
        }
        // Connections are spread over as many workers as there may be.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = self.workers_for(&config.iothreads, cores.try_into().unwrap_or(u16::MAX))?;
        let several = server.takes_several();
        let export = NbdExport::new(config, &self.control, workers, several).await?;
        let now = self.nbd_server.borrow().clone();
        let is_here = now.is_some_and(|now| Rc::ptr_eq(&now, &server));
        let added = match is_here && !self.quitting.get() {
            true => server.add(&export),
            false => Err(not_running()),
        };
        if let Err(error) = added {
            export.close().await?;
            return Err(error);
        }
        self.nbd_exports.borrow_mut().insert(id, export);
        Ok(())
    }

    pub(super) fn remove_nbd_export(
        self: &Rc<Self>,
        export: &Rc<NbdExport>,
        removal: Removal,
    ) -> Result<Removing, Error> {
        let id = export.config().id.clone();
        if export.is_going() {
            return Err(Error::busy(format!(
                "Export '{id}' is already shutting down"
            )));
        }
        let clients = export.connections();
        if removal == Removal::Safe && clients > 0 {
            return Err(Error::busy(format!(
                "export '{id}' still in use: {clients} NBD clients are connected; disconnect them, or remove \
                 the export with mode 'hard'"
            )));
        }
        export.set_going();
        if let Some(server) = &*self.nbd_server.borrow() {
            server.remove(&export.config().name);
        }
        let (gone, done) = oneshot::channel();
        let (daemon, export) = (Rc::clone(self), Rc::clone(export));
        self.control.context().spawn(async move {
            export.disconnect().await;
            let flushed = export.flush().await;
            let closed = export.close().await;
            if let Err(error) = flushed.and(closed) {
                tracing::error!(export = %id, error = %error.report(), "an export did not end well");
                daemon.failure.borrow_mut().get_or_insert(error);
            }
            daemon.nbd_exports.borrow_mut().remove(&id);
            daemon.announce(&DaemonEvent::ExportDeleted(&id));
            drop(gone);
        });
        Ok(Removing {
            had_front_end: clients > 0,
            done,
        })
    }
}

fn not_running() -> Error {
    Error::new(ErrorKind::Invalid, "NBD server not running")
}
