//! The listening socket of an export, and the thread that serves those who connect.

use std::fs;
use std::io::ErrorKind as IoErrorKind;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use blockcore::{Error, ErrorKind};
use futures_channel::oneshot;
use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::net::AddressFamily;
use rustix::net::sockopt::{socket_acceptconn, socket_domain};

use super::session;
use super::socket::{Closed, wait};
use crate::config::SocketAddress;
use crate::daemon::ControlHandle;
use crate::inherited;

/// How long a thread waits before it accepts again after the host refused.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What fits `struct sockaddr_un` besides the terminator.
const MAX_PATH_BYTES: usize = 107;

/// A socket that front-ends can connect to; removed from its directory when dropped.
pub struct Socket {
    listener: UnixListener,
    #[expect(dead_code, reason = "removed from there when it is dropped")]
    made: Option<Made>,
}

/// A socket's place in the file system.
struct Made {
    path: PathBuf,
    identity: (u64, u64),
}

impl Socket {
    /// Listens where `address` says.
    ///
    /// # Errors
    ///
    /// As [`bind`](Self::bind); or a descriptor is none of a listening Unix socket.
    pub fn at(address: &SocketAddress) -> Result<Self, Error> {
        match address {
            SocketAddress::Path(path) => Self::bind(path),
            SocketAddress::Descriptor(number) => Self::inherited(*number),
        }
    }

    fn inherited(number: RawFd) -> Result<Self, Error> {
        let descriptor = inherited::duplicate(number)?;
        let refused = |why: &str| Error::invalid(format!("File descriptor '{number}' {why}"));
        match socket_domain(&descriptor) {
            Err(_) => return Err(refused("is not a socket")),
            Ok(AddressFamily::UNIX) => {}
            Ok(_) => return Err(refused("is not a Unix socket")),
        }
        if !socket_acceptconn(&descriptor).unwrap_or(false) {
            return Err(refused("is not a socket that listens"));
        }
        let listener = UnixListener::from(descriptor);
        let failed = |error| refused(&format!("cannot be used: {error}"));
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            listener,
            made: None,
        })
    }

    /// Listens at `path`. What is left of a socket that nobody listens at is replaced.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if somebody listens there, [`ErrorKind::Exists`] if it is something else
    /// than a socket; else the host's refusal.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let shown = path.display();
        let bytes = path.as_os_str().len();
        if bytes > MAX_PATH_BYTES {
            return Err(Error::invalid(format!(
                "cannot listen at socket '{shown}': its path is too long ({bytes} bytes; a socket's \
                 has at most {MAX_PATH_BYTES})"
            )));
        }
        let failed = |error: std::io::Error| {
            let errno = rustix::io::Errno::from_io_error(&error);
            match errno {
                Some(errno) => Error::host(format!("cannot listen at socket '{shown}'"), errno),
                None => Error::invalid(format!("cannot listen at socket '{shown}': {error}")),
            }
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == IoErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        listener.set_nonblocking(true).map_err(failed)?;
        let metadata = fs::symlink_metadata(path).map_err(failed)?;
        let made = Made {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        Ok(Self {
            listener,
            made: Some(made),
        })
    }
}

impl Socket {
    /// The socket itself, for another thread.
    pub(crate) fn listener(&self) -> std::io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

fn remove_stale(path: &Path) -> Result<(), Error> {
    let shown = path.display();
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(_) => return Ok(()),
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::new(
            ErrorKind::Exists,
            format!(
                "cannot listen at '{shown}': it exists and is not a socket, and is left as it is"
            ),
        ));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == IoErrorKind::ConnectionRefused => {}
        _ => {
            return Err(Error::busy(format!(
                "socket '{shown}' is in use: another process listens there"
            )));
        }
    }
    tracing::info!(socket = %shown, "replacing a socket that nobody listens at");
    fs::remove_file(path).map_err(|error| {
        Error::invalid(format!(
            "cannot replace the unused socket '{shown}': {error}"
        ))
    })
}

impl Drop for Made {
    fn drop(&mut self) {
        // Somebody may have put another socket in its place.
        let mine = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if mine {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The thread that serves an export's front-ends.
pub struct Server {
    stop: Arc<OwnedFd>,
    connected: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Its other end goes with the thread.
    ended: Mutex<Option<oneshot::Receiver<()>>>,
}

impl Server {
    /// Serves those who connect to `socket`, one after the other.
    ///
    /// # Errors
    ///
    /// The host's refusal to make a thread or an eventfd.
    #[expect(clippy::disallowed_methods, reason = "a socket needs a real thread")]
    pub fn start(socket: Socket, export: &str, control: ControlHandle) -> Result<Self, Error> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::host("cannot make an eventfd", errno))?;
        let stop = Arc::new(stop);
        let connected = Arc::new(AtomicBool::new(false));
        let (end, ended) = oneshot::channel();
        let (id, stop_too, connected_too) =
            (export.to_owned(), Arc::clone(&stop), Arc::clone(&connected));
        let thread = std::thread::Builder::new()
            .name(format!("export {export}"))
            .spawn(move || {
                serve(&socket, &id, &control, &stop_too, &connected_too);
                drop((socket, end));
            })
            .map_err(|error| {
                Error::new(ErrorKind::Io, format!("cannot start a thread: {error}"))
            })?;
        Ok(Self {
            stop,
            connected,
            thread: Mutex::new(Some(thread)),
            ended: Mutex::new(Some(ended)),
        })
    }

    /// Ends the connection, if there is one, and accepts no other. Does not wait.
    pub fn stop(&self) {
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Waits until the connection's queues are stopped and the socket is gone. Only the first call waits.
    pub async fn ended(&self) {
        let ended = self.ended.lock().expect("no panic while it is held").take();
        if let Some(ended) = ended {
            // Nothing is ever sent.
            let _ = ended.await;
        }
    }

    /// Waits for the thread itself, which has [ended](Self::ended) but for leaving. The control thread must
    /// not call this earlier: the connection may still ask it.
    pub fn join(&self) {
        let thread = self.thread.lock().expect("no panic while joining").take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

fn serve(
    socket: &Socket,
    export: &str,
    control: &ControlHandle,
    stop: &Arc<OwnedFd>,
    connected: &AtomicBool,
) {
    loop {
        match wait(socket.listener.as_fd(), PollFlags::IN, stop.as_fd()) {
            Ok(()) => {}
            Err(Closed::Stopping) => return,
            Err(error) => {
                tracing::error!(export, ?error, "cannot wait for front-ends any more");
                return;
            }
        }
        match socket.listener.accept() {
            Ok((stream, _)) => {
                tracing::info!(export, "front-end connected");
                connected.store(true, Ordering::Relaxed);
                let closed = session::run(stream, export, control, stop);
                connected.store(false, Ordering::Relaxed);
                match closed {
                    Closed::Quietly => tracing::info!(export, "front-end disconnected"),
                    Closed::Stopping => return,
                    Closed::Broken(why) => {
                        tracing::warn!(export, why, "ended the connection of a front-end");
                    }
                }
            }
            Err(error) if error.kind() == IoErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of descriptors, as a rule: others may give some back.
                tracing::warn!(export, %error, "cannot accept a front-end");
                std::thread::sleep(ACCEPT_AGAIN);
            }
        }
    }
}
