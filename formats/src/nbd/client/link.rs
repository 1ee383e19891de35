//! A connection that several workers share: requests go out one after the other, and whoever waits for a
//! reply receives for all.
//!
//! Of those who wait one has the [`Reader`] and gives each reply to whom it is for, until it has its own;
//! then another goes on. So there is no task beside the requests, and with one worker no other thread
//! has a part in any of it.
//!
//! Invariant: a reply is received to its end by who began with it. One that is dropped half way, with its
//! future, takes the connection along.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};

use blockcore::engine::Errno as HostErrno;
use blockcore::io::IoContext;
use blockcore::io::buffer::Segments;
use blockcore::{Error, IoError};
use futures_channel::oneshot;
use futures_util::future::{Either, select};
use futures_util::lock::Mutex as Turn;

use super::connect::Agreed;
use crate::nbd::codec::reply::{
    Chunk, Extent, FIRST_BYTES, ReplyHeader, ReplyKind, chunk, header_bytes,
};
use crate::nbd::codec::request::{Command, CommandFlags, Request};
use crate::nbd::codec::{Errno, Mode};
use crate::nbd::stream::{Reader, Stream, copied};

/// See the module's header.
pub(super) struct Link {
    pub(super) agreed: Agreed,
    stream: Arc<Stream>,
    reader: Turn<Reader>,
    sender: Turn<()>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    slots: BTreeMap<u64, Slot>,
    next: u64,
    is_lost: bool,
}

/// Who waits for a reply.
struct Slot {
    command: Command,
    offset: u64,
    bytes: u64,
    reply: Reply,
    done: oneshot::Sender<Result<Reply, Errno>>,
    error: Option<Errno>,
}

/// What has come for a request.
#[derive(Default)]
pub(super) struct Reply {
    /// Of a read, by offset; `None` reads as zeroes.
    pieces: Vec<(u64, u64, Option<Vec<u8>>)>,
    /// How much that is.
    bytes: u64,
    /// Of block status: at least one, if it did not fail.
    pub(super) extents: Vec<Extent>,
}

/// The connection is lost; what became of the request is not known.
pub(super) struct Lost;

/// A request to be sent.
#[derive(Clone)]
pub(super) struct Wanted {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Of a write.
    pub(super) payload: Segments,
}

/// Ends the connection if a task stops half way.
struct Whole<'a>(Option<&'a Link>);

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        if let Some(link) = self.0 {
            link.lose();
        }
    }
}

impl Link {
    pub(super) fn new(agreed: Agreed, reader: Reader) -> Arc<Self> {
        Arc::new(Self {
            agreed,
            stream: Arc::clone(reader.stream()),
            reader: Turn::new(reader),
            sender: Turn::default(),
            waiting: Mutex::default(),
        })
    }

    /// Whether it is of no use any more.
    pub(super) fn is_lost(&self) -> bool {
        self.waiting().is_lost
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no panic while looking")
    }

    /// Ends it; whoever waits for a reply is told.
    pub(super) fn lose(&self) {
        self.stream.shut_down();
        let slots = {
            let mut waiting = self.waiting();
            waiting.is_lost = true;
            std::mem::take(&mut waiting.slots)
        };
        drop(slots);
    }

    /// Says goodbye, with nothing under way.
    pub(super) async fn end(&self, context: &IoContext) {
        let mut bytes = Vec::new();
        let goodbye = Request {
            flags: CommandFlags::empty(),
            command: Command::Disconnect,
            cookie: 0,
            offset: 0,
            bytes: 0,
        };
        goodbye.put(self.agreed.mode, &mut bytes);
        if !self.is_lost() {
            // It may have ended before.
            let _ = self.stream.send_bytes(context, &bytes).await;
        }
        self.lose();
    }

    /// Sends a request and waits for its reply.
    pub(super) async fn request(
        &self,
        context: &IoContext,
        wanted: &Wanted,
    ) -> Result<Result<Reply, Errno>, Lost> {
        let (done, mut reply) = oneshot::channel();
        let cookie = {
            let mut waiting = self.waiting();
            if waiting.is_lost {
                return Err(Lost);
            }
            let cookie = waiting.next;
            waiting.next += 1;
            let slot = Slot {
                command: wanted.command,
                offset: wanted.offset,
                bytes: wanted.bytes,
                reply: Reply::default(),
                done,
                error: None,
            };
            waiting.slots.insert(cookie, slot);
            cookie
        };
        self.send(context, cookie, wanted).await?;
        loop {
            let mut reader = match select(&mut reply, pin!(self.reader.lock())).await {
                Either::Left((reply, _)) => return reply.map_err(|_| Lost),
                Either::Right((reader, _)) => reader,
            };
            match reply.try_recv() {
                Ok(Some(reply)) => return Ok(reply),
                Ok(None) => {}
                Err(oneshot::Canceled) => return Err(Lost),
            }
            let mut whole = Whole(Some(self));
            match self.receive(context, &mut reader).await {
                Ok(()) => whole.0 = None,
                Err(Trouble::Host(error)) => {
                    tracing::debug!(%error, "an NBD server is gone");
                }
                Err(Trouble::Wrong(error)) => {
                    let error = error.report();
                    tracing::warn!(error, "an NBD server does not keep to the protocol");
                }
            }
        }
    }

    async fn send(&self, context: &IoContext, cookie: u64, wanted: &Wanted) -> Result<(), Lost> {
        let mut head = Vec::new();
        let mut flags = wanted.flags;
        let extended = self.agreed.mode == Mode::Extended;
        flags.set(
            CommandFlags::PAYLOAD_LEN,
            extended && wanted.command == Command::Write,
        );
        let request = Request {
            flags,
            command: wanted.command,
            cookie,
            offset: wanted.offset,
            bytes: wanted.bytes,
        };
        request.put(self.agreed.mode, &mut head);
        let head = copied(&head);
        let all = match wanted.command {
            Command::Write => Segments::join(vec![head, wanted.payload.clone()]),
            _ => head,
        };
        let _turn = self.sender.lock().await;
        let mut whole = Whole(Some(self));
        match self.stream.send(context, all).await {
            Ok(()) => {
                whole.0 = None;
                Ok(())
            }
            Err(_) => Err(Lost),
        }
    }

    /// Receives a reply, or a chunk of one, and gives it to whom it is for.
    async fn receive(&self, context: &IoContext, reader: &mut Reader) -> Result<(), Trouble> {
        let mut header = [0; 32];
        let (first, rest) = header.split_at_mut(FIRST_BYTES);
        reader.exact(context, first).await?;
        let first = first.try_into().expect("as many as that");
        let bytes = header_bytes(self.agreed.mode, first)?;
        reader
            .exact(context, &mut rest[..bytes - FIRST_BYTES])
            .await?;
        let ReplyHeader { cookie, kind } = ReplyHeader::parse(&header[..bytes])?;
        let (command, offset, asked) = {
            let waiting = self.waiting();
            let slot = waiting.slots.get(&cookie).ok_or_else(|| {
                Error::invalid(format!("a reply to request {cookie}, which there is not"))
            })?;
            (slot.command, slot.offset, slot.bytes)
        };
        match kind {
            ReplyKind::Simple(Ok(())) if command == Command::Read => {
                let data = reader.vec(context, asked as usize).await?;
                self.add(cookie, offset, asked, Some(data))?;
            }
            // A server that has agreed on more has no other way to tell of block status.
            ReplyKind::Simple(Ok(())) if command == Command::BlockStatus => {
                return Err(Error::invalid("block status in a simple reply").into());
            }
            ReplyKind::Simple(Ok(())) => {}
            ReplyKind::Simple(Err(error)) => self.fail(cookie, error),
            ReplyKind::Chunk { kind, bytes, done } => {
                if kind == chunk::OFFSET_DATA {
                    let at = reader.array(context).await?;
                    let data = bytes.checked_sub(8).filter(|data| *data <= asked);
                    let data =
                        data.ok_or_else(|| Error::invalid("more data than was asked for"))?;
                    let piece = reader.vec(context, data as usize).await?;
                    self.add(cookie, u64::from_be_bytes(at), data, Some(piece))?;
                } else {
                    let data = reader.vec(context, bytes as usize).await?;
                    self.chunk(cookie, Chunk::parse(kind, &data)?)?;
                }
                if !done {
                    return Ok(());
                }
            }
        }
        let slot = self.waiting().slots.remove(&cookie);
        if let Some(slot) = slot {
            let result = match slot.error {
                Some(error) => Err(error),
                None => Ok(slot.reply),
            };
            // Who does not wait any more need not know.
            let _ = slot.done.send(result);
        }
        Ok(())
    }

    fn chunk(&self, cookie: u64, chunk: Chunk) -> Result<(), Error> {
        match chunk {
            Chunk::None => {}
            Chunk::Hole { offset, bytes } => self.add(cookie, offset, u64::from(bytes), None)?,
            Chunk::Status { context, extents } => {
                let is_ours = self.agreed.context == Some(context);
                if let Some(slot) = self.waiting().slots.get_mut(&cookie) {
                    if slot.command != Command::BlockStatus || !is_ours {
                        return Err(Error::invalid("block status that nobody asked for"));
                    }
                    slot.reply.extents = extents;
                }
            }
            Chunk::Error(error, text) => {
                tracing::debug!(?error, text, "a request to an NBD server failed");
                self.fail(cookie, error);
            }
        }
        Ok(())
    }

    /// Of a request's data a piece has come.
    fn add(
        &self,
        cookie: u64,
        offset: u64,
        bytes: u64,
        data: Option<Vec<u8>>,
    ) -> Result<(), Error> {
        let mut waiting = self.waiting();
        let Some(slot) = waiting.slots.get_mut(&cookie) else {
            return Ok(());
        };
        let at = offset.checked_sub(slot.offset);
        let fits = at.is_some_and(|at| at <= slot.bytes && bytes <= slot.bytes - at);
        let fits = fits && bytes > 0 && slot.reply.bytes + bytes <= slot.bytes;
        if slot.command != Command::Read || !fits {
            return Err(Error::invalid("data that nobody asked for"));
        }
        slot.reply.bytes += bytes;
        let at = offset - slot.offset;
        slot.reply.pieces.push((at, bytes, data));
        Ok(())
    }

    fn fail(&self, cookie: u64, error: Errno) {
        if let Some(slot) = self.waiting().slots.get_mut(&cookie) {
            slot.error.get_or_insert(error);
        }
    }
}

impl Reply {
    /// Puts what was read where it belongs. Fails if some of it has not come: what is there would be what
    /// somebody else had in this memory.
    pub(super) fn copy_to(mut self, into: &Segments) -> Result<(), IoError> {
        self.pieces.sort_by_key(|(at, ..)| *at);
        let mut end = 0;
        for (at, bytes, data) in self.pieces {
            if at != end {
                return Err(IoError::Failed);
            }
            end += bytes;
            let place = into.slice(at, bytes);
            match data {
                Some(data) => {
                    place.copy_from(&data);
                }
                None => place.fill(0),
            }
        }
        match end == into.bytes() {
            true => Ok(()),
            false => Err(IoError::Failed),
        }
    }
}

enum Trouble {
    Host(HostErrno),
    Wrong(Error),
}

impl From<HostErrno> for Trouble {
    fn from(errno: HostErrno) -> Self {
        Self::Host(errno)
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Wrong(error)
    }
}
