//! [`NbdServer`]: listens for clients and knows by which names they find exports.
//!
//! Threads: the control thread. A client that says nothing, or slowly, has a task that waits and, after
//! [`ServerOptions::handshake_max`], no connection any more.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockcore::engine::{Errno, Interest, Socket};
use blockcore::io::IoContext;
use blockcore::{Error, ErrorKind};
use formats::nbd::stream::{Reader, Stream};
use futures_channel::oneshot;
use futures_util::future::{Either, select};
use rustix::event::epoll;

use super::connection::Link;
use super::export::NbdExport;
use super::handshake::{self, Ended};
use crate::chardev::{self, Data, FdAddress, InetAddress, Listener, SocketAddress, UnixAddress};
use crate::{qapi_struct, qapi_union};

/// How long is waited before accepting again after the host has refused.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Connections at once, unless said otherwise.
const DEFAULT_CONNECTIONS: u64 = 100;
/// How long a client may take to choose an export, unless said otherwise.
const DEFAULT_HANDSHAKE: u64 = 10;

/// What is readable while clients wait to be accepted.
///
/// The engine waits for this and not for the socket itself: a ring outlives a process that was killed by some
/// moments, with what it waits for, and its successor would find somebody listening.
fn arrivals(listener: &Listener) -> Result<OwnedFd, Errno> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(0);
    epoll::add(&epoll, listener.as_fd(), data, epoll::EventFlags::IN)?;
    Ok(epoll)
}

qapi_union! {
    /// Where a socket is.
    pub enum PlainSocketAddress by "type" {
        /// On a network.
        Inet(InetAddress) = "inet",
        /// In the file system.
        Unix(UnixAddress) = "unix",
        /// Open already.
        Fd(FdAddress) = "fd",
    }
}

qapi_struct! {
    /// What `--nbd-server` says.
    pub struct NbdServerOptions {
        /// Where to listen.
        addr: PlainSocketAddress = "addr",
        /// How long a client may take to choose an export, in seconds; 0 for as long as it likes.
        handshake_max_seconds: Option<u64> = "handshake-max-seconds",
        /// Keys for encryption.
        tls_creds: Option<String> = "tls-creds",
        /// Who may connect, of those whose key is known.
        tls_authz: Option<String> = "tls-authz",
        /// Connections at once; 0 for any number.
        max_connections: Option<u64> = "max-connections",
    }
}

qapi_struct! {
    /// What `nbd-server-start` says.
    pub struct NbdServerStart {
        /// Where to listen.
        addr: SocketAddress = "addr",
        /// How long a client may take to choose an export, in seconds; 0 for as long as it likes.
        handshake_max_seconds: Option<u64> = "handshake-max-seconds",
        /// Keys for encryption.
        tls_creds: Option<String> = "tls-creds",
        /// Who may connect, of those whose key is known.
        tls_authz: Option<String> = "tls-authz",
        /// Connections at once; 0 for any number.
        max_connections: Option<u64> = "max-connections",
    }
}

/// What a server is to be.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where it listens.
    pub addr: SocketAddress,
    /// Connections at once; `None` for any number.
    pub max_connections: Option<u64>,
    /// How long a client may take to choose an export; `None` for as long as it likes.
    pub handshake_max: Option<Duration>,
}

impl ServerOptions {
    /// From what `--nbd-server` says.
    ///
    /// # Errors
    ///
    /// It asks for encryption.
    pub fn from_flag(options: NbdServerOptions) -> Result<Self, Error> {
        let addr = match options.addr {
            PlainSocketAddress::Inet(inet) => SocketAddress::Inet(Data(inet)),
            PlainSocketAddress::Unix(unix) => SocketAddress::Unix(Data(unix)),
            PlainSocketAddress::Fd(fd) => SocketAddress::Fd(Data(fd)),
        };
        Self::from_command(NbdServerStart {
            addr,
            handshake_max_seconds: options.handshake_max_seconds,
            tls_creds: options.tls_creds,
            tls_authz: options.tls_authz,
            max_connections: options.max_connections,
        })
    }

    /// From what `nbd-server-start` says.
    ///
    /// # Errors
    ///
    /// It asks for encryption.
    pub fn from_command(options: NbdServerStart) -> Result<Self, Error> {
        let tls = [
            ("tls-creds", options.tls_creds.is_some()),
            ("tls-authz", options.tls_authz.is_some()),
        ];
        if let Some((name, _)) = tls.iter().find(|(_, given)| *given) {
            return Err(Error::unsupported(format!(
                "option '{name}' of an NBD server is not in this version of stonework"
            )));
        }
        let above_zero = |number: &u64| *number > 0;
        let connections = options.max_connections.unwrap_or(DEFAULT_CONNECTIONS);
        let seconds = options.handshake_max_seconds.unwrap_or(DEFAULT_HANDSHAKE);
        Ok(Self {
            addr: options.addr,
            max_connections: Some(connections).filter(above_zero),
            handshake_max: Some(seconds).filter(above_zero).map(Duration::from_secs),
        })
    }
}

/// See the module's header.
pub struct NbdServer {
    options: ServerOptions,
    context: Rc<IoContext>,
    exports: RefCell<BTreeMap<String, Rc<NbdExport>>>,
    /// Everybody who is connected.
    streams: RefCell<BTreeMap<u64, Arc<Stream>>>,
    next: Cell<u64>,
    /// Dropped when the server is stopped.
    running: RefCell<Option<oneshot::Sender<()>>>,
    /// The one who accepts, where it waits for somebody to leave.
    waits: Cell<Option<oneshot::Sender<()>>>,
}

impl NbdServer {
    /// Listens.
    ///
    /// # Errors
    ///
    /// The host's refusal.
    pub fn start(options: ServerOptions, context: &Rc<IoContext>) -> Result<Rc<Self>, Error> {
        let listener =
            chardev::listen(&options.addr).map_err(|why| Error::new(ErrorKind::Io, why))?;
        let arrivals = arrivals(&listener)
            .map_err(|errno| Error::host("cannot wait for NBD clients", errno))?;
        let (running, stopped) = oneshot::channel();
        let server = Rc::new(Self {
            options,
            context: Rc::clone(context),
            exports: RefCell::default(),
            streams: RefCell::default(),
            next: Cell::new(0),
            running: RefCell::new(Some(running)),
            waits: Cell::new(None),
        });
        let accepting = Rc::clone(&server);
        context.spawn(async move {
            let accept = pin!(accepting.accept(&listener, Arc::new(arrivals)));
            // Nothing is ever sent.
            select(accept, stopped).await;
        });
        Ok(server)
    }

    /// Whether clients may have several connections.
    pub fn takes_several(&self) -> bool {
        self.options.max_connections != Some(1)
    }

    /// Listens no more, and ends connections; those to exports end with what they have under way.
    pub fn stop(&self) {
        self.running.take();
        for stream in self.streams.borrow().values() {
            stream.shut_down();
        }
    }

    /// Has clients find an export by its name.
    ///
    /// # Errors
    ///
    /// They find another by that name.
    pub fn add(&self, export: &Rc<NbdExport>) -> Result<(), Error> {
        let name = &export.config().name;
        let mut exports = self.exports.borrow_mut();
        if exports.contains_key(name) {
            return Err(Self::taken(name));
        }
        exports.insert(name.clone(), Rc::clone(export));
        Ok(())
    }

    /// That an export's name is another's.
    pub fn taken(name: &str) -> Error {
        let text = format!("NBD server already has export named '{name}'");
        Error::new(ErrorKind::Exists, text)
    }

    /// Whether clients find an export by this name.
    pub fn has(&self, name: &str) -> bool {
        self.exports.borrow().contains_key(name)
    }

    /// Clients do not find an export by its name any more.
    pub fn remove(&self, name: &str) {
        self.exports.borrow_mut().remove(name);
    }

    /// The export of this name.
    pub(super) fn export(&self, name: &str) -> Option<Rc<NbdExport>> {
        self.exports.borrow().get(name).cloned()
    }

    /// All exports' names and descriptions.
    pub(super) fn names(&self) -> Vec<(String, String)> {
        let exports = self.exports.borrow();
        let names = exports.values().map(|export| {
            let config = export.config();
            (config.name.clone(), config.description.clone())
        });
        names.collect()
    }

    async fn accept(self: &Rc<Self>, listener: &Listener, fd: Arc<OwnedFd>) {
        loop {
            while self.is_full() {
                let (waits, left) = oneshot::channel();
                self.waits.set(Some(waits));
                let _ = left.await;
            }
            match listener.accept_socket() {
                Ok(Some(socket)) => self.greet(socket),
                Ok(None) => {
                    if let Err(error) = self.context.ready(&fd, Interest::Receive).await {
                        tracing::error!(%error, "cannot wait for NBD clients");
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an NBD client");
                    self.context.delay(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    fn is_full(&self) -> bool {
        let connections = self.streams.borrow().len() as u64;
        let most = self.options.max_connections;
        most.is_some_and(|most| connections >= most)
    }

    /// Serves somebody who has connected, in a task of its own.
    fn greet(self: &Rc<Self>, socket: OwnedFd) {
        // Small messages are not to wait for larger ones; other sockets have no such thing.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        let stream = Stream::plain(Socket::new(socket));
        let number = self.next.get();
        self.next.set(number + 1);
        self.streams
            .borrow_mut()
            .insert(number, Arc::clone(&stream));
        let server = Rc::clone(self);
        self.context.spawn(async move {
            server.serve(number, Arc::clone(&stream)).await;
            stream.shut_down();
            server.streams.borrow_mut().remove(&number);
            if let Some(waits) = server.waits.take() {
                let _ = waits.send(());
            }
        });
    }

    async fn serve(&self, number: u64, stream: Arc<Stream>) {
        let mut reader = Reader::new(Arc::clone(&stream));
        let agreed = {
            let talk = pin!(handshake::talk(&self.context, self, &mut reader));
            match self.options.handshake_max {
                None => talk.await,
                Some(limit) => match select(talk, pin!(self.context.delay(limit))).await {
                    Either::Left((agreed, _)) => agreed,
                    Either::Right(_) => Err(Ended::Wrong("the handshake takes too long".into())),
                },
            }
        };
        let agreed = match agreed {
            Ok(agreed) => agreed,
            Err(Ended::Left) => return,
            Err(Ended::Lost(error)) => {
                tracing::debug!(%error, "an NBD client is gone");
                return;
            }
            Err(Ended::Wrong(error)) => {
                tracing::warn!(error, "an NBD client was disconnected");
                return;
            }
        };
        let link = Link {
            reader,
            mode: agreed.mode,
            contexts: agreed.contexts,
            facts: Arc::clone(agreed.export.facts()),
        };
        agreed.export.serve(number, stream, link).await;
    }
}
