//! [`Client`]: requests, and the connection that they go to, made anew when it is lost.
//!
//! Threads: any worker. The state's lock is held over memory operations only.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use blockcore::driver::{
    DriverIo, Place, Preallocation, Status, StatusFlags, TruncateFlags, WriteFlags, ZeroFlags,
};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoContext, IoFuture};
use blockcore::{Error, IoError};
use event_listener::Event;
use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::connect::{Agreed, Asked, connect};
use super::link::{Link, Lost, Reply, Wanted};
use crate::nbd::codec::reply::Allocation;
use crate::nbd::codec::request::{Command, CommandFlags};
use crate::nbd::codec::{Errno, ExportFlags};

/// Longest that one attempt to connect takes; who has not answered then does not.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Longest that saying goodbye takes.
const GOODBYE: Duration = Duration::from_secs(1);
/// Until the second attempt; then twice as long each time, up to `LONGEST_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Most that is asked about at once, in every mode.
const MAX_STATUS_BYTES: u64 = 1 << 30;

/// See the module's header.
pub(super) struct Client {
    asked: Asked,
    /// As it was when the node was opened; a server that offers something else later is another.
    first: Agreed,
    reconnect_delay: Duration,
    state: Mutex<State>,
    /// The state is another, or a drained section has begun.
    changed: Event,
    /// Nobody may wait for a remote end.
    drained: AtomicBool,
}

enum State {
    /// There is a connection, which may be lost.
    Up(Arc<Link>),
    /// There is none since then, on the engines' clock.
    Down(Duration),
    /// As that, and somebody is at it.
    Connecting(Duration),
}

/// Somebody's attempt to connect; the next may try if it comes to nothing.
struct Attempt<'a> {
    client: &'a Client,
    since: Duration,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let mut state = self.client.state();
        if matches!(*state, State::Connecting(_)) {
            *state = State::Down(self.since);
        }
        drop(state);
        self.client.changed.notify(usize::MAX);
    }
}

/// Connects within `limit`, trying again; at least once.
pub(super) async fn open(
    context: &IoContext,
    asked: &Asked,
    limit: Duration,
) -> Result<Arc<Link>, Error> {
    let end = context.engine().now() + limit;
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match attempt(context, asked, ATTEMPT).await {
            Ok(link) => return Ok(link),
            Err(error) => error,
        };
        let left = end.saturating_sub(context.engine().now());
        if left.is_zero() {
            return Err(error);
        }
        context.delay(pause.min(left)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Connects, once, and no longer than that.
async fn attempt(context: &IoContext, asked: &Asked, limit: Duration) -> Result<Arc<Link>, Error> {
    let connecting = pin!(connect(context, asked));
    match select(connecting, pin!(context.delay(limit))).await {
        Either::Left((Ok((agreed, reader)), _)) => Ok(Link::new(agreed, reader)),
        Either::Left((Err(error), _)) => Err(error),
        Either::Right(_) => Err(Error::busy(format!(
            "NBD server {} does not answer",
            asked.address.shown()
        ))),
    }
}

impl Client {
    pub(super) fn new(asked: Asked, link: Arc<Link>, reconnect_delay: Duration) -> Arc<Self> {
        Arc::new(Self {
            asked,
            first: link.agreed,
            reconnect_delay,
            state: Mutex::new(State::Up(link)),
            changed: Event::new(),
            drained: AtomicBool::new(false),
        })
    }

    pub(super) fn agreed(&self) -> &Agreed {
        &self.first
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while looking")
    }

    /// Says goodbye to the server.
    pub(super) async fn end(&self, context: &IoContext) {
        let link = match &*self.state() {
            State::Up(link) => Some(Arc::clone(link)),
            State::Down(_) | State::Connecting(_) => None,
        };
        if let Some(link) = link {
            let goodbye = pin!(link.end(context));
            // One that does not read is left without.
            select(goodbye, pin!(context.delay(GOODBYE))).await;
            link.lose();
        }
    }

    /// Whether a request waits no longer for a connection that is lost since then.
    fn gives_up(&self, context: &IoContext, since: Duration) -> bool {
        let now = context.engine().now();
        self.drained.load(Ordering::SeqCst) || now >= since + self.reconnect_delay
    }

    /// The connection, made anew if it has to be.
    async fn link(&self, context: &IoContext) -> Result<Arc<Link>, IoError> {
        loop {
            let changed = self.changed.listen();
            let (since, is_ours) = {
                let mut state = self.state();
                let (since, is_ours) = match &*state {
                    State::Up(link) if !link.is_lost() => return Ok(Arc::clone(link)),
                    State::Up(_) => (context.engine().now(), true),
                    State::Down(since) => (*since, true),
                    State::Connecting(since) => (*since, false),
                };
                if is_ours {
                    *state = State::Connecting(since);
                }
                (since, is_ours)
            };
            if is_ours {
                let attempt = Attempt {
                    client: self,
                    since,
                };
                let link = self.reconnect(context, since).await?;
                *self.state() = State::Up(Arc::clone(&link));
                drop(attempt);
                return Ok(link);
            }
            if self.gives_up(context, since) {
                return Err(IoError::Failed);
            }
            let left = (since + self.reconnect_delay).saturating_sub(context.engine().now());
            select(changed, pin!(context.delay(left))).await;
        }
    }

    /// Connects, at least once, until nobody waits for it any more.
    async fn reconnect(&self, context: &IoContext, since: Duration) -> Result<Arc<Link>, IoError> {
        let mut pause = FIRST_PAUSE;
        let mut is_said = false;
        loop {
            let changed = self.changed.listen();
            // With a section that has begun before it is one attempt, which the next request begins.
            if self.drained.load(Ordering::SeqCst) {
                return Err(IoError::Failed);
            }
            let end = since + self.reconnect_delay;
            let left = end.saturating_sub(context.engine().now());
            let limit = match left.is_zero() {
                true => ATTEMPT,
                false => left.min(ATTEMPT),
            };
            let attempt = pin!(attempt(context, &self.asked, limit));
            let made = match select(attempt, changed).await {
                Either::Left((made, _)) => made,
                Either::Right(_) => continue,
            };
            match made.and_then(|link| self.checked(link)) {
                Ok(link) => {
                    tracing::info!(server = self.asked.address.shown(), "connected again");
                    return Ok(link);
                }
                Err(error) if !std::mem::replace(&mut is_said, true) => {
                    let error = error.report();
                    tracing::warn!(error, "cannot connect again");
                }
                Err(error) => tracing::debug!(error = error.report(), "cannot connect again"),
            }
            if self.gives_up(context, since) {
                return Err(IoError::Failed);
            }
            let changed = self.changed.listen();
            select(changed, pin!(context.delay(pause.min(left)))).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether the server offers what it did.
    fn checked(&self, link: Arc<Link>) -> Result<Arc<Link>, Error> {
        let (before, now) = (&self.first, &link.agreed);
        let other = |what: &str| {
            let server = self.asked.address.shown();
            Err(Error::invalid(format!(
                "NBD server {server} offers another export than before: {what}"
            )))
        };
        if now.bytes != before.bytes {
            return other(&format!("it has {} bytes, not {}", now.bytes, before.bytes));
        }
        if now.minimum > before.minimum || now.maximum < before.maximum {
            return other("it takes other lengths of requests");
        }
        let writes = ExportFlags::READ_ONLY;
        let needed = before.flags & (ExportFlags::SEND_FLUSH | ExportFlags::SEND_FUA);
        if (now.flags & writes) != (before.flags & writes) || !now.flags.contains(needed) {
            return other("it can do less");
        }
        Ok(link)
    }

    /// Does a request; it is sent again on another connection if this one is lost.
    async fn request(
        &self,
        context: &IoContext,
        flags: impl Fn(&Agreed) -> Result<CommandFlags, IoError>,
        mut wanted: Wanted,
    ) -> Result<Reply, IoError> {
        loop {
            let link = self.link(context).await?;
            wanted.flags = flags(&link.agreed)?;
            match link.request(context, &wanted).await {
                Ok(Ok(reply)) => return Ok(reply),
                // It says that it is about to end: the next may do it.
                Ok(Err(Errno::SHUTDOWN)) => link.lose(),
                Ok(Err(error)) => return Err(error.to_io()),
                Err(Lost) => {}
            }
            let since = self.lost(context, &link);
            if self.gives_up(context, since) {
                return Err(IoError::Failed);
            }
        }
    }

    /// Since when there is no connection, if this one was the last.
    fn lost(&self, context: &IoContext, link: &Arc<Link>) -> Duration {
        let mut state = self.state();
        match &*state {
            State::Up(now) if Arc::ptr_eq(now, link) => {
                let since = context.engine().now();
                *state = State::Down(since);
                since
            }
            // Somebody has made another already.
            State::Up(_) => context.engine().now(),
            State::Down(since) | State::Connecting(since) => *since,
        }
    }

    fn wanted(command: Command, offset: u64, bytes: u64) -> Wanted {
        Wanted {
            command,
            flags: CommandFlags::empty(),
            offset,
            bytes,
            payload: Segments::default(),
        }
    }
}

/// No flags, where the server can do the command at all.
fn plain(needs: ExportFlags) -> impl Fn(&Agreed) -> Result<CommandFlags, IoError> {
    move |agreed| match agreed.flags.contains(needs) {
        true => Ok(CommandFlags::empty()),
        false => Err(IoError::Unsupported),
    }
}

impl DriverIo for Client {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.first.bytes
    }

    fn write_flags(&self) -> WriteFlags {
        match self.first.flags.contains(ExportFlags::SEND_FUA) {
            true => WriteFlags::STABLE,
            false => WriteFlags::empty(),
        }
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            let wanted = Self::wanted(Command::Read, offset, into.bytes());
            let none = plain(ExportFlags::empty());
            let reply = self.request(io.context(), none, wanted).await?;
            reply.copy_to(&into)
        }
        .boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            let mut wanted = Self::wanted(Command::Write, offset, from.bytes());
            wanted.payload = from;
            let fua = match flags.contains(WriteFlags::STABLE) {
                true => CommandFlags::FUA,
                false => CommandFlags::empty(),
            };
            self.request(io.context(), |_| Ok(fua), wanted).await?;
            Ok(())
        }
        .boxed_local()
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        async move {
            let how = move |agreed: &Agreed| {
                let mut how = plain(ExportFlags::SEND_WRITE_ZEROES)(agreed)?;
                how.set(CommandFlags::NO_HOLE, !flags.contains(ZeroFlags::MAY_UNMAP));
                if flags.contains(ZeroFlags::NO_FALLBACK) {
                    how |= plain(ExportFlags::SEND_FAST_ZERO)(agreed)?;
                    how |= CommandFlags::FAST_ZERO;
                }
                if flags.contains(ZeroFlags::STABLE) {
                    how |= plain(ExportFlags::SEND_FUA)(agreed)?;
                    how |= CommandFlags::FUA;
                }
                Ok(how)
            };
            let wanted = Self::wanted(Command::WriteZeroes, offset, bytes);
            self.request(io.context(), how, wanted).await?;
            Ok(())
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            let wanted = Self::wanted(Command::Trim, offset, bytes);
            let how = plain(ExportFlags::SEND_TRIM);
            self.request(io.context(), how, wanted).await?;
            Ok(())
        }
        .boxed_local()
    }

    fn flush_to_disk<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        async move {
            if !self.first.flags.contains(ExportFlags::SEND_FLUSH) {
                // It has nothing that it keeps back.
                return Ok(());
            }
            let wanted = Self::wanted(Command::Flush, 0, 0);
            let none = plain(ExportFlags::empty());
            self.request(io.context(), none, wanted).await?;
            Ok(())
        }
        .boxed_local()
    }

    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        _exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        async move {
            let status = |flags, bytes| Status {
                flags: flags | StatusFlags::PLACE,
                bytes,
                place: Place {
                    child: None,
                    offset,
                },
            };
            if self.first.context.is_none() {
                return Ok(status(StatusFlags::DATA, bytes));
            }
            let unit = u64::from(self.first.minimum);
            let asked = bytes.min(MAX_STATUS_BYTES).max(unit);
            let wanted = Self::wanted(Command::BlockStatus, offset, asked);
            let one = |agreed: &Agreed| match agreed.context {
                Some(_) => Ok(CommandFlags::REQ_ONE),
                None => Err(IoError::Unsupported),
            };
            let reply = match self.request(io.context(), one, wanted).await {
                // Another server than it was.
                Err(IoError::Unsupported) => return Ok(status(StatusFlags::DATA, asked)),
                reply => reply?,
            };
            let extent = reply.extents.first().ok_or(IoError::Failed)?;
            let whole = extent.bytes.min(asked) / unit * unit;
            if whole == 0 {
                // Less than a unit of one kind: what is in it is for a read to say.
                return Ok(status(StatusFlags::DATA, unit));
            }
            let said = Allocation::from_bits_truncate(extent.flags);
            let mut flags = StatusFlags::empty();
            flags.set(StatusFlags::DATA, !said.contains(Allocation::HOLE));
            flags.set(StatusFlags::ZERO, said.contains(Allocation::ZERO));
            Ok(status(flags, whole))
        }
        .boxed_local()
    }

    /// The protocol has no way to say it: what fits is taken.
    fn truncate<'a>(
        &'a self,
        _io: Io<'a>,
        bytes: u64,
        exact: bool,
        _preallocation: Preallocation,
        _flags: TruncateFlags,
    ) -> IoFuture<'a> {
        let now = self.first.bytes;
        let fits = bytes == now || (!exact && bytes < now);
        async move {
            if fits {
                Ok(())
            } else {
                Err(IoError::Unsupported)
            }
        }
        .boxed_local()
    }

    fn allocated_bytes<'a>(&'a self, _io: Io<'a>) -> IoFuture<'a, Option<u64>> {
        async { Ok(None) }.boxed_local()
    }

    fn drain_begin(&self) {
        self.drained.store(true, Ordering::SeqCst);
        self.changed.notify(usize::MAX);
    }

    fn drain_end(&self) {
        self.drained.store(false, Ordering::SeqCst);
    }
}
