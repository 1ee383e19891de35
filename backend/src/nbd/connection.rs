//! A client that has chosen an export: its requests, and the replies to them.
//!
//! One task receives requests, each of which is a task of its own; replies go out in the order in which
//! requests end, by whoever ends while nobody sends. What was received of a connection before it ends is done;
//! nobody is told.
//!
//! Threads: the worker that the connection was given to.
//!
//! Limits: [`REQUESTS`] under way, and [`BYTES`] of data in memory, which one request may exceed by itself.
//! Replies that the client does not take count, so one that does not read stops itself and nobody else.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use blockcore::driver::{StatusFlags, WriteFlags, ZeroFlags};
use blockcore::engine::Errno as HostErrno;
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, RequestKind, Root};
use blockcore::{Error, IoError};
use formats::nbd::codec::reply::{self, Allocation, DIRTY, Extent, Replied, chunk};
use formats::nbd::codec::request::{
    Command, CommandFlags, EXTENDED_BYTES, Request, StatusQuery, header_bytes,
};
use formats::nbd::codec::{Errno, MAX_PAYLOAD_BYTES, Mode};
use formats::nbd::stream::{Reader, Stream, copied};
use futures_channel::oneshot;

use super::export::{Context, Facts};

/// Requests of one connection that are under way at once; `nbdcopy` has 64.
const REQUESTS: usize = 128;
/// Data of one connection that is in memory at once.
const BYTES: u64 = 32 << 20;
/// What every request counts as at least.
const LEAST_BYTES: u64 = 4096;
/// Replies that are sent in one system call.
const BATCH: usize = 64;
/// Memory for data, so that direct I/O needs no other.
const ALIGNMENT: usize = 4096;
/// Extents in one answer; 16 bytes each.
const MAX_EXTENTS: usize = 32 << 10;
/// Reads up to here are looked through for zeroes; longer ones ask first where there are any.
const LOOKED_THROUGH_BYTES: u64 = 64 << 10;

/// What a worker needs to serve a client.
pub(super) struct Link {
    pub(super) reader: Reader,
    pub(super) mode: Mode,
    /// Contexts that the client asks the status of, by their places.
    pub(super) contexts: Vec<u32>,
    pub(super) facts: Arc<Facts>,
}

/// Serves a client until it ends, and what it has under way.
pub(super) async fn serve(context: &Rc<IoContext>, root: Rc<Root>, link: Link) {
    let Link {
        mut reader,
        mode,
        contexts,
        facts,
    } = link;
    let connection = Rc::new(Connection {
        context: Rc::clone(context),
        stream: Arc::clone(reader.stream()),
        root,
        facts,
        mode,
        contexts,
        requests: Cell::new(0),
        bytes: Cell::new(0),
        waits: Cell::new(None),
        replies: RefCell::default(),
        sending: Cell::new(false),
    });
    match connection.receive(&mut reader).await {
        Ok(()) => {}
        Err(End::Lost(error)) => {
            tracing::debug!(export = %connection.facts.id, %error, "an NBD client is gone");
        }
        Err(End::Wrong(error)) => {
            tracing::warn!(
                export = %connection.facts.id, error = %error.report(),
                "an NBD client does not keep to the protocol"
            );
            connection.stream.shut_down();
        }
    }
    connection.quiet().await;
    connection.stream.shut_down();
}

/// Why no more requests come.
enum End {
    Lost(HostErrno),
    Wrong(Error),
}

impl From<HostErrno> for End {
    fn from(errno: HostErrno) -> Self {
        Self::Lost(errno)
    }
}

struct Connection {
    context: Rc<IoContext>,
    stream: Arc<Stream>,
    root: Rc<Root>,
    facts: Arc<Facts>,
    mode: Mode,
    contexts: Vec<u32>,
    /// Requests under way, until their replies are sent.
    requests: Cell<usize>,
    bytes: Cell<u64>,
    /// The one who receives, where it waits for some of these to end.
    waits: Cell<Option<oneshot::Sender<()>>>,
    replies: RefCell<VecDeque<(Segments, Place)>>,
    sending: Cell<bool>,
}

/// A request's share of the limits; given back when dropped.
struct Place {
    connection: Rc<Connection>,
    bytes: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.requests.set(connection.requests.get() - 1);
        connection.bytes.set(connection.bytes.get() - self.bytes);
        if let Some(waits) = connection.waits.take() {
            let _ = waits.send(());
        }
    }
}

impl Connection {
    /// Receives requests until the client ends.
    async fn receive(self: &Rc<Self>, reader: &mut Reader) -> Result<(), End> {
        let context = &*self.context;
        loop {
            let mut header = [0; EXTENDED_BYTES];
            let header = &mut header[..header_bytes(self.mode)];
            reader.exact(context, header).await?;
            let request = Request::parse(self.mode, header).map_err(End::Wrong)?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let follows = request.payload_bytes(self.mode).map_err(End::Wrong)?;
            let place = self.place(self.memory_of(&request)).await;
            let mut payload = Segments::default();
            if request.command == Command::Write {
                payload = Segments::allocate(follows as usize, ALIGNMENT);
                reader.segments(context, &payload).await?;
            } else if follows > 0 && u64::from(follows) <= LEAST_BYTES {
                payload = copied(&reader.vec(context, follows as usize).await?);
            } else {
                reader.skip(context, u64::from(follows)).await?;
            }
            let this = Rc::clone(self);
            context.spawn(async move {
                let reply = this.answer(&request, follows, payload).await;
                this.send(reply, place).await;
            });
        }
    }

    /// How much memory a request takes.
    fn memory_of(&self, request: &Request) -> u64 {
        let bytes = match request.command {
            Command::Read | Command::Write => request.bytes.min(u64::from(MAX_PAYLOAD_BYTES)),
            Command::BlockStatus => (MAX_EXTENTS * 16 * self.contexts.len()) as u64,
            _ => 0,
        };
        bytes.max(LEAST_BYTES)
    }

    /// Waits until a request may be begun that takes so much memory.
    async fn place(self: &Rc<Self>, bytes: u64) -> Place {
        loop {
            let (requests, taken) = (self.requests.get(), self.bytes.get());
            if requests < REQUESTS && (taken == 0 || taken + bytes <= BYTES) {
                self.requests.set(requests + 1);
                self.bytes.set(taken + bytes);
                return Place {
                    connection: Rc::clone(self),
                    bytes,
                };
            }
            self.a_request_ends().await;
        }
    }

    /// Waits until nothing is under way.
    async fn quiet(&self) {
        while self.requests.get() > 0 {
            self.a_request_ends().await;
        }
    }

    async fn a_request_ends(&self) {
        let (waits, ended) = oneshot::channel();
        self.waits.set(Some(waits));
        let _ = ended.await;
    }

    /// Sends a reply, with those that come meanwhile, unless somebody is at it already.
    async fn send(&self, reply: Segments, place: Place) {
        self.replies.borrow_mut().push_back((reply, place));
        if self.sending.replace(true) {
            return;
        }
        loop {
            let (mut parts, mut places) = (Vec::new(), Vec::new());
            {
                let mut replies = self.replies.borrow_mut();
                let count = replies.len().min(BATCH);
                for (reply, place) in replies.drain(..count) {
                    parts.push(reply);
                    places.push(place);
                }
            }
            let all = match parts.len() {
                0 => break,
                1 => parts.remove(0),
                _ => Segments::join(parts),
            };
            if self.stream.send(&self.context, all).await.is_err() {
                // Nobody is told any more; who receives requests sees the end, too.
                self.stream.shut_down();
            }
        }
        self.sending.set(false);
    }

    fn to(&self, request: &Request) -> Replied {
        Replied {
            mode: self.mode,
            cookie: request.cookie,
            offset: request.offset,
        }
    }

    /// Does a request; the reply to it.
    async fn answer(&self, request: &Request, follows: u32, payload: Segments) -> Segments {
        let result = match self.check(request) {
            Ok(()) => self.run(request, follows, payload).await,
            Err(refused) => Err(refused),
        };
        let (to, mut bytes) = (self.to(request), Vec::new());
        match result {
            Ok(Some(reply)) => return reply,
            Ok(None) if self.mode == Mode::Simple => {
                reply::put_simple(&mut bytes, to.cookie, Ok(()));
            }
            Ok(None) => reply::put_chunk(&mut bytes, to, true, chunk::NONE, 0),
            Err((errno, _)) if self.mode == Mode::Simple => {
                reply::put_simple(&mut bytes, to.cookie, Err(errno));
            }
            Err((errno, text)) => reply::put_error(&mut bytes, to, true, errno, &text),
        }
        copied(&bytes)
    }

    /// Whether a request is one that this export takes.
    fn check(&self, request: &Request) -> Result<(), (Errno, String)> {
        let refuse = |errno, text: &str| Err((errno, text.to_owned()));
        let unknown = request.flags - request.allowed_flags(self.mode);
        if !unknown.is_empty() {
            let text = format!("unsupported flags for command (got {:#x})", request.flags);
            return Err((Errno::INVAL, text));
        }
        let changes = matches!(
            request.command,
            Command::Write | Command::WriteZeroes | Command::Trim
        );
        if changes && !self.facts.writable {
            return refuse(Errno::PERM, "Export is read-only");
        }
        let counted = request.flags.contains(CommandFlags::PAYLOAD_LEN);
        match request.command {
            Command::Unknown(number) => {
                let text = format!("invalid request type ({number}) received");
                return Err((Errno::INVAL, text));
            }
            Command::Flush | Command::Disconnect => return Ok(()),
            Command::Read if request.bytes > u64::from(MAX_PAYLOAD_BYTES) => {
                return refuse(Errno::INVAL, "more than one request can read");
            }
            // What is asked about is in the payload.
            Command::BlockStatus if counted => return Ok(()),
            _ => {}
        }
        let bytes = self.root.bytes();
        if request.offset > bytes || request.bytes > bytes - request.offset {
            let errno = match request.command {
                Command::Write | Command::WriteZeroes => Errno::NOSPC,
                _ => Errno::INVAL,
            };
            let text = format!(
                "operation past EOF; From: {}, Len: {}, Size: {bytes}",
                request.offset, request.bytes
            );
            return Err((errno, text));
        }
        Ok(())
    }

    async fn run(
        &self,
        request: &Request,
        follows: u32,
        payload: Segments,
    ) -> Result<Option<Segments>, (Errno, String)> {
        let failed = |error: IoError| (Errno::of_io(error), error.to_string());
        let (root, offset, bytes) = (&self.root, request.offset, request.bytes);
        let stable = self.facts.writethrough || request.flags.contains(CommandFlags::FUA);
        match request.command {
            Command::Read => {
                if request.flags.contains(CommandFlags::FUA) {
                    root.flush().await.map_err(failed)?;
                }
                return self.read(request).await.map(Some).map_err(failed);
            }
            Command::Write => {
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::STABLE, stable);
                root.write(offset, payload, flags).await
            }
            Command::Flush => root.flush().await,
            Command::Trim => match root.discard(offset, bytes).await {
                Ok(()) if stable => root.flush().await,
                result => result,
            },
            Command::WriteZeroes => {
                let mut flags = ZeroFlags::empty();
                let has = |flag| request.flags.contains(flag);
                flags.set(ZeroFlags::MAY_UNMAP, !has(CommandFlags::NO_HOLE));
                flags.set(ZeroFlags::NO_FALLBACK, has(CommandFlags::FAST_ZERO));
                flags.set(ZeroFlags::STABLE, stable);
                root.write_zeroes(offset, bytes, flags).await
            }
            Command::Cache => {
                let entered = root.enter(RequestKind::Read, offset, bytes).await;
                match entered.io().prefetch(offset, bytes).await {
                    // There is nothing to read ahead to.
                    Err(IoError::Unsupported) => Ok(()),
                    result => result,
                }
            }
            Command::BlockStatus => return self.status(request, follows, &payload).await.map(Some),
            Command::Disconnect | Command::Unknown(_) => Ok(()),
        }
        .map_err(failed)?;
        Ok(None)
    }

    /// Reads, and tells holes where the client takes that.
    async fn read(&self, request: &Request) -> Result<Segments, IoError> {
        let (offset, bytes) = (request.offset, request.bytes);
        let (to, mut head) = (self.to(request), Vec::new());
        let data = |bytes| Segments::allocate(bytes as usize, ALIGNMENT);
        if self.mode == Mode::Simple {
            let into = data(bytes);
            self.root.read(offset, into.clone()).await?;
            reply::put_simple(&mut head, to.cookie, Ok(()));
            return Ok(Segments::join(vec![copied(&head), into]));
        }
        if bytes == 0 {
            reply::put_chunk(&mut head, to, true, chunk::NONE, 0);
            return Ok(copied(&head));
        }
        let whole = request.flags.contains(CommandFlags::DF);
        if whole || bytes <= LOOKED_THROUGH_BYTES {
            let into = data(bytes);
            self.root.read(offset, into.clone()).await?;
            if !whole && into.is_zero() {
                reply::put_hole(&mut head, to, true, offset, bytes as u32);
                return Ok(copied(&head));
            }
            reply::put_data(&mut head, to, true, offset, bytes);
            return Ok(Segments::join(vec![copied(&head), into]));
        }
        let entered = self.root.enter(RequestKind::Read, offset, bytes).await;
        let (mut parts, mut done) = (Vec::new(), 0);
        while done < bytes {
            let (at, rest) = (offset + done, bytes - done);
            let status = entered.io().status_above(|_| false, true, at, rest).await;
            // Who cannot say reads as data.
            let (zero, length) = match status {
                Ok((status, _)) if status.bytes > 0 => (
                    status.flags.contains(StatusFlags::ZERO),
                    status.bytes.min(rest),
                ),
                _ => (false, rest),
            };
            // Pieces that are hardly worth their headers go with what follows.
            let (zero, length) = match length < LEAST_BYTES {
                true => (false, LEAST_BYTES.min(rest)),
                false => (zero, length),
            };
            let last = length == rest;
            head.clear();
            if zero {
                reply::put_hole(&mut head, to, last, at, length as u32);
                parts.push(copied(&head));
            } else {
                let into = data(length);
                entered.read(at, into.clone()).await?;
                reply::put_data(&mut head, to, last, at, length);
                parts.push(copied(&head));
                parts.push(into);
            }
            done += length;
        }
        Ok(Segments::join(parts))
    }

    /// Tells what is where, in all contexts that are asked about.
    async fn status(
        &self,
        request: &Request,
        follows: u32,
        payload: &Segments,
    ) -> Result<Segments, (Errno, String)> {
        let refuse = |text: &str| (Errno::INVAL, text.to_owned());
        let (mut contexts, mut bytes) = (self.contexts.clone(), request.bytes);
        if self.contexts.is_empty() {
            return Err(refuse("block status without contexts"));
        }
        if request.flags.contains(CommandFlags::PAYLOAD_LEN) {
            if u64::from(follows) > LEAST_BYTES {
                return Err(refuse("block status of too many contexts"));
            }
            let query = StatusQuery::parse(&payload.to_vec());
            let query = query.map_err(|error| refuse(&error.to_string()))?;
            let known = |id: &u32| self.contexts.contains(id);
            if query.contexts.is_empty() || !query.contexts.iter().all(known) {
                return Err(refuse("block status of contexts that were not chosen"));
            }
            (contexts, bytes) = (query.contexts, query.bytes);
            contexts.sort_unstable();
            contexts.dedup();
        }
        let end = self.root.bytes();
        if bytes == 0 || request.offset > end || bytes > end - request.offset {
            return Err(refuse("block status of nothing, or past the end"));
        }
        let most = match request.flags.contains(CommandFlags::REQ_ONE) {
            true => 1,
            false => MAX_EXTENTS,
        };
        let mut reply = Vec::new();
        for (place, id) in contexts.iter().enumerate() {
            let extents = self.extents(*id, request.offset, bytes, most).await;
            let extents = extents.map_err(|error| (Errno::of_io(error), error.to_string()))?;
            let last = place + 1 == contexts.len();
            reply::put_status(&mut reply, self.to(request), last, *id, &extents);
        }
        Ok(copied(&reply))
    }

    /// The extents of one context from `offset` on, at most so many.
    async fn extents(
        &self,
        id: u32,
        offset: u64,
        bytes: u64,
        most: usize,
    ) -> Result<Vec<Extent>, IoError> {
        let context = &self.facts.contexts[id as usize];
        let mut extents: Vec<Extent> = Vec::new();
        let entered = self.root.enter(RequestKind::Read, offset, bytes).await;
        let mut done = 0;
        while done < bytes {
            let (at, rest) = (offset + done, bytes - done);
            let exact = matches!(context, Context::Allocation);
            let extent = match context {
                Context::Allocation | Context::Depth => {
                    let io = entered.io();
                    let (status, depth) = io.status_above(|_| false, exact, at, rest).await?;
                    Extent {
                        bytes: status.bytes.min(rest),
                        flags: match exact {
                            true => allocation(status.flags).bits(),
                            false if status.flags.contains(StatusFlags::ALLOCATED) => {
                                depth as u64 + 1
                            }
                            false => 0,
                        },
                    }
                }
                Context::Bitmap(_, bits) => {
                    let dirty = bits.get(at);
                    let next = match dirty {
                        true => bits.next_clean(at, rest),
                        false => bits.next_dirty(at, rest),
                    };
                    Extent {
                        bytes: next.map_or(rest, |next| next - at),
                        flags: if dirty { DIRTY } else { 0 },
                    }
                }
            };
            if extent.bytes == 0 {
                // It has become shorter.
                break;
            }
            let is_full = extents.len() == most;
            match extents.last_mut() {
                Some(last) if last.flags == extent.flags => last.bytes += extent.bytes,
                _ if is_full => break,
                _ => extents.push(extent),
            }
            done += extent.bytes;
        }
        match extents.is_empty() {
            true => Err(IoError::Failed),
            false => Ok(extents),
        }
    }
}

/// A range's status as `base:allocation` has it.
fn allocation(flags: StatusFlags) -> Allocation {
    let mut allocation = Allocation::empty();
    allocation.set(Allocation::HOLE, !flags.contains(StatusFlags::DATA));
    allocation.set(Allocation::ZERO, flags.contains(StatusFlags::ZERO));
    allocation
}
