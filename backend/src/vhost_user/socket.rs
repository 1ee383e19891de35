//! The front-end's socket: whole messages in, with their descriptors, whole messages out.
//!
//! The socket is ours, not the `vhost` crate's: only so can messages be held, added and answered by
//! us, and a message that arrives in pieces be waited for. Every wait ends when the daemon stops.
//!
//! Threads: one session's.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes of a message's header: request, flags, size.
pub(super) const HEADER_BYTES: usize = 12;
/// Longest body: what the `vhost` crate takes.
const MAX_BODY_BYTES: usize = 4096;
/// Descriptors that may come with one message.
const MAX_FDS: usize = 32;

/// Requests that the session looks at before `vhost` does (vhost-user, "Front-end message types").
pub(super) mod request {
    /// `VHOST_USER_SET_BACKEND_REQ_FD`.
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    /// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, from back-end to front-end.
    pub(crate) const BACKEND_CONFIG_CHANGE: u32 = 2;
}

/// Protocol version 1, in a header's flags.
pub(super) const VERSION: u32 = 1;

/// One message, as it was on the socket.
#[derive(Debug)]
pub(super) struct Message {
    /// Header and body.
    pub(super) bytes: Vec<u8>,
    /// What came with it.
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    /// The request's number.
    pub(super) fn request(&self) -> u32 {
        u32::from_le_bytes(self.bytes[0..4].try_into().expect("a whole header"))
    }
}

/// Why no further message comes.
#[derive(Debug)]
pub(super) enum Closed {
    /// The front-end went away, between messages.
    Quietly,
    /// The daemon stops.
    Stopping,
    /// The front-end broke off or broke the protocol.
    Broken(String),
}

impl From<Errno> for Closed {
    fn from(error: Errno) -> Self {
        match error {
            Errno::CONNRESET | Errno::PIPE => Self::Quietly,
            error => Self::Broken(error.to_string()),
        }
    }
}

/// Waits until `fd` is ready for `what`, or `stop` is readable.
///
/// # Errors
///
/// [`Closed::Stopping`], or the host's refusal to wait.
pub(super) fn wait(
    fd: BorrowedFd<'_>,
    what: PollFlags,
    stop: BorrowedFd<'_>,
) -> Result<(), Closed> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, what),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            return Err(Closed::Stopping);
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
    }
}

/// Receives one message.
///
/// # Errors
///
/// [`Closed`]; descriptors that came so far are closed.
pub(super) fn receive(socket: &UnixStream, stop: BorrowedFd<'_>) -> Result<Message, Closed> {
    let mut message = Message {
        bytes: vec![0; HEADER_BYTES],
        fds: Vec::new(),
    };
    fill(socket, stop, &mut message, 0)?;
    let size = u32::from_le_bytes(message.bytes[8..12].try_into().expect("a whole header"));
    let size = size as usize;
    if size > MAX_BODY_BYTES {
        return Err(Closed::Broken(format!(
            "message {} claims {size} bytes, more than {MAX_BODY_BYTES}",
            message.request()
        )));
    }
    message.bytes.resize(HEADER_BYTES + size, 0);
    fill(socket, stop, &mut message, HEADER_BYTES)?;
    Ok(message)
}

fn fill(
    socket: &UnixStream,
    stop: BorrowedFd<'_>,
    message: &mut Message,
    mut done: usize,
) -> Result<(), Closed> {
    while done < message.bytes.len() {
        wait(socket.as_fd(), PollFlags::IN, stop)?;
        let into = &mut message.bytes[done..];
        match receive_some(socket.as_fd(), into, &mut message.fds) {
            Ok(0) if done == 0 => return Err(Closed::Quietly),
            Ok(0) => {
                return Err(Closed::Broken(
                    "it closed in the middle of a message".into(),
                ));
            }
            Ok(bytes) => done += bytes,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if message.fds.len() > MAX_FDS {
            return Err(Closed::Broken(format!(
                "more than {MAX_FDS} descriptors came with one message"
            )));
        }
    }
    Ok(())
}

/// Takes what is there, without waiting.
fn receive_some(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags)?;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    Ok(received.bytes)
}

/// Sends one message, waiting while the other side does not read.
///
/// # Errors
///
/// [`Closed`]; the other side may have a part of the message.
pub(super) fn send(
    socket: &UnixStream,
    stop: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<(), Closed> {
    let mut done = 0;
    while done < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if done == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Closed::Broken("too many descriptors to send".into()));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(socket, &[IoSlice::new(&bytes[done..])], &mut control, flags) {
            Ok(sent) => done += sent,
            Err(Errno::AGAIN) => wait(socket.as_fd(), PollFlags::OUT, stop)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Moves everything that waits on `from` to `to`: the answers of `vhost` to the front-end.
///
/// # Errors
///
/// [`Closed`] of the receiving side.
pub(super) fn forward(
    from: &UnixStream,
    to: &UnixStream,
    stop: BorrowedFd<'_>,
) -> Result<(), Closed> {
    let mut bytes = [0; HEADER_BYTES + MAX_BODY_BYTES];
    loop {
        let mut fds = Vec::new();
        match receive_some(from.as_fd(), &mut bytes, &mut fds) {
            Ok(0) | Err(Errno::AGAIN) => return Ok(()),
            Ok(count) => {
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                send(to, stop, &bytes[..count], &fds)?;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
