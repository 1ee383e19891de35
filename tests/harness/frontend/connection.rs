//! The vhost-user socket: messages built by hand, answers with a time limit.
//!
//! Two layers. [`Connection::send`] and [`Connection::receive`] move any bytes, legal or not.
//! [`Connection::try_tell`] and [`Connection::ask`] follow the protocol: the first says what
//! became of a message without an answer of its own, the second returns the answer.
//!
//! Layout and codes: vhost-user protocol specification, "Message Specification".

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};

use super::memory::RegionEntry;

/// How long anything may take before it counts as a hang.
pub const LIMIT: Duration = Duration::from_secs(15);

/// Message codes of the front-end.
#[expect(missing_docs, reason = "named as the specification names them")]
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Protocol feature bits.
#[expect(missing_docs, reason = "named as the specification names them")]
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// Message code of the back-end, on its own channel: the configuration space has changed.
pub const CONFIG_CHANGE: u32 = 2;

/// Header flags: the version, which is always 1.
pub const VERSION: u32 = 1;
/// Header flags: this is an answer.
pub const REPLY: u32 = 1 << 2;
/// Header flags: an answer is wanted.
pub const NEED_REPLY: u32 = 1 << 3;

/// The answer of the back-end to one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Which message it is, or answers.
    pub code: u32,
    /// Version and flags.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl Message {
    /// The body as the one number that it is.
    #[track_caller]
    pub fn number(&self) -> u64 {
        let body: [u8; 8] = self.body.as_slice().try_into().unwrap_or_else(|_| {
            panic!(
                "the answer to message {} is no 64-bit number: {:02x?}",
                self.code, self.body
            )
        });
        u64::from_le_bytes(body)
    }
}

/// Why no message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The back-end closed the connection.
    Closed,
    /// Nothing, or a part only, within the time limit.
    Silent,
}

/// What became of a message that has no answer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Acknowledged with zero, or no acknowledgement was negotiated.
    Accepted,
    /// Acknowledged with this number.
    Refused(u64),
    /// The back-end ended the connection.
    Closed,
}

impl Verdict {
    /// Whether the back-end said no, one way or the other.
    pub fn is_refusal(self) -> bool {
        self != Self::Accepted
    }
}

/// A front-end's end of the socket.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// Whether `REPLY_ACK` was negotiated, so that every message is acknowledged on demand.
    pub acknowledges: bool,
}

impl Connection {
    /// Connects, waiting up to [`LIMIT`] for the back-end to listen.
    #[track_caller]
    pub fn open(path: &Path) -> Self {
        let end = Instant::now() + LIMIT;
        loop {
            match Self::try_open(path) {
                Ok(connection) => return connection,
                Err(error) => assert!(
                    Instant::now() < end
                        && matches!(
                            error.kind(),
                            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                        ),
                    "cannot connect to {}: {error}",
                    path.display()
                ),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Connects, once.
    ///
    /// # Errors
    ///
    /// As `connect`: `NotFound` or `ConnectionRefused` when nobody listens, `WouldBlock` when
    /// nobody accepts within [`LIMIT`] and the queue of those who wait is full.
    pub fn try_open(path: &Path) -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The limit on sending covers connecting, too.
        set_socket_timeout(&socket, Timeout::Send, Some(LIMIT))?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self::from_stream(socket.into()))
    }

    /// A connection over a socket that is there already, such as the backend channel's.
    pub fn from_stream(socket: UnixStream) -> Self {
        socket
            .set_write_timeout(Some(LIMIT))
            .expect("a time limit can be set");
        Self {
            socket,
            acknowledges: false,
        }
    }

    /// The socket itself.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends bytes and descriptors as they are, in one piece.
    ///
    /// # Errors
    ///
    /// As `sendmsg`: `BrokenPipe` or `ConnectionReset` when the back-end has closed.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); 64 + 4 * fds.len()];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(fds));
            assert!(fits, "no room for {} descriptors", fds.len());
        }
        let mut sent = sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        while sent < bytes.len() {
            sent += rustix::net::send(&self.socket, &bytes[sent..], SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Sends a message with any header flags.
    ///
    /// # Errors
    ///
    /// As [`send_raw`](Self::send_raw).
    pub fn send(
        &self,
        code: u32,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut bytes = header(code, flags, body.len() as u32);
        bytes.extend_from_slice(body);
        self.send_raw(&bytes, fds)
    }

    /// The next message of the back-end.
    ///
    /// # Errors
    ///
    /// [`End`], if none comes within `limit`.
    pub fn receive(&self, limit: Duration) -> Result<Message, End> {
        let end = Instant::now() + limit;
        let mut header = [0; 12];
        self.fill(&mut header, end)?;
        let field =
            |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let mut body = vec![0; field(8) as usize];
        self.fill(&mut body, end)?;
        Ok(Message {
            code: field(0),
            flags: field(4),
            body,
        })
    }

    fn fill(&self, mut bytes: &mut [u8], end: Instant) -> Result<(), End> {
        while !bytes.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            // Zero would mean for ever.
            let left = left.max(Duration::from_millis(1));
            self.socket
                .set_read_timeout(Some(left))
                .expect("a time limit can be set");
            match (&self.socket).read(bytes) {
                Ok(0) => return Err(End::Closed),
                Ok(read) => bytes = &mut bytes[read..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if Instant::now() >= end {
                        return Err(End::Silent);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(End::Closed),
            }
        }
        Ok(())
    }

    /// Sends a message that has no answer of its own and says what became of it.
    ///
    /// # Panics
    ///
    /// If an acknowledgement is due and does not come within [`LIMIT`], or answers another
    /// message.
    #[track_caller]
    pub fn try_tell(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Verdict {
        let need_reply = if self.acknowledges { NEED_REPLY } else { 0 };
        if self.send(code, VERSION | need_reply, body, fds).is_err() {
            return Verdict::Closed;
        }
        if !self.acknowledges {
            return Verdict::Accepted;
        }
        match self.receive(LIMIT) {
            Ok(answer) => {
                assert_eq!(
                    answer.code, code,
                    "message {code} was acknowledged as another"
                );
                assert_eq!(
                    answer.flags & (REPLY | 3),
                    REPLY | VERSION,
                    "the acknowledgement of message {code} is not marked as a reply"
                );
                match answer.number() {
                    0 => Verdict::Accepted,
                    number => Verdict::Refused(number),
                }
            }
            Err(End::Closed) => Verdict::Closed,
            Err(End::Silent) => panic!("message {code} was not acknowledged within {LIMIT:?}"),
        }
    }

    /// As [`try_tell`](Self::try_tell), for a message that must be accepted.
    #[track_caller]
    pub fn tell(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let verdict = self.try_tell(code, body, fds);
        assert_eq!(verdict, Verdict::Accepted, "message {code}, {body:02x?}");
    }

    /// Sends a message that has an answer and returns it.
    ///
    /// # Errors
    ///
    /// [`End::Closed`], if the back-end closed instead.
    ///
    /// # Panics
    ///
    /// If nothing happens within [`LIMIT`], or the answer is to another message.
    #[track_caller]
    pub fn try_ask(&self, code: u32, body: &[u8]) -> Result<Message, End> {
        if self.send(code, VERSION, body, &[]).is_err() {
            return Err(End::Closed);
        }
        match self.receive(LIMIT) {
            Ok(answer) => {
                assert_eq!(answer.code, code, "message {code} got another's answer");
                Ok(answer)
            }
            Err(End::Silent) => panic!("message {code} was not answered within {LIMIT:?}"),
            Err(End::Closed) => Err(End::Closed),
        }
    }

    /// As [`try_ask`](Self::try_ask), for a message that must be answered.
    #[track_caller]
    pub fn ask(&self, code: u32, body: &[u8]) -> Message {
        self.try_ask(code, body)
            .unwrap_or_else(|end| panic!("no answer to message {code}: {end:?}"))
    }

    /// Waits on a backend channel for the news that the configuration space has changed, and
    /// acknowledges it if the back-end wants that.
    ///
    /// # Panics
    ///
    /// If something else comes, or nothing within [`LIMIT`].
    #[track_caller]
    pub fn await_config_change(&self) {
        let message = self
            .receive(LIMIT)
            .unwrap_or_else(|end| panic!("no news on the backend channel: {end:?}"));
        assert_eq!(message.code, CONFIG_CHANGE, "other news: {message:?}");
        assert!(message.body.is_empty(), "{message:?}");
        if message.flags & NEED_REPLY != 0 {
            self.send(CONFIG_CHANGE, VERSION | REPLY, &0_u64.to_le_bytes(), &[])
                .expect("the back-end waits for it");
        }
    }

    /// Whether the back-end closes the connection within `limit`. Messages on the way are
    /// thrown away.
    pub fn closes_within(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            match self.receive(end.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(end) => return end == End::Closed,
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A message header.
pub fn header(code: u32, flags: u32, bytes: u32) -> Vec<u8> {
    [code, flags, bytes]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
}

/// Body of the messages about a ring that carry one number.
pub fn ring_state(queue: u32, number: u32) -> Vec<u8> {
    [queue, number]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
}

/// Body of `SET_VRING_ADDR`; all three are user addresses.
pub fn ring_addresses(
    queue: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
) -> Vec<u8> {
    let mut body = ring_state(queue, flags);
    for address in [descriptors, used, available, 0] {
        body.extend(address.to_le_bytes());
    }
    body
}

/// Body of `SET_MEM_TABLE`, with a count that may lie.
pub fn memory_table(count: u32, regions: &[RegionEntry]) -> Vec<u8> {
    let mut body = ring_state(count, 0);
    for region in regions {
        body.extend(region.to_bytes());
    }
    body
}

/// Body of `ADD_MEM_REG` and `REM_MEM_REG`.
pub fn memory_region(region: RegionEntry) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(region.to_bytes());
    body
}

/// Body of `GET_CONFIG` and `SET_CONFIG`; `bytes` is the size that the header claims.
pub fn config_access(offset: u32, bytes: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut body: Vec<u8> = [offset, bytes, flags]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect();
    body.extend_from_slice(payload);
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_of_a_config_change_is_acknowledged_on_demand() {
        let (ours, theirs) = UnixStream::pair().expect("no sockets");
        let (ours, theirs) = (
            Connection::from_stream(ours),
            Connection::from_stream(theirs),
        );
        for flags in [VERSION | NEED_REPLY, VERSION] {
            theirs
                .send(CONFIG_CHANGE, flags, &[], &[])
                .expect("it is sent");
        }
        ours.await_config_change();
        ours.await_config_change();
        let answer = theirs.receive(LIMIT).expect("an acknowledgement");
        assert_eq!((answer.flags, answer.number()), (VERSION | REPLY, 0));
        assert_eq!(theirs.receive(Duration::ZERO), Err(End::Silent));
    }

    #[test]
    fn a_message_cut_short_is_an_end_and_not_a_hang() {
        let (ours, theirs) = UnixStream::pair().expect("no sockets");
        let ours = Connection::from_stream(ours);
        rustix::io::write(&theirs, &header(1, VERSION | REPLY, 8)).expect("it is sent");
        assert_eq!(ours.receive(Duration::from_millis(10)), Err(End::Silent));
        rustix::io::write(&theirs, &header(1, VERSION | REPLY, 8)[..5]).expect("it is sent");
        drop(theirs);
        assert_eq!(ours.receive(LIMIT), Err(End::Closed));
    }
}
