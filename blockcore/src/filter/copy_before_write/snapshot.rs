//! [`Snapshot`]: what of a disk as it was is still on the disk, and what has been copied away.
//!
//! Every cluster is in one of three states. *Left*: to be copied before it is changed; a reader of the
//! snapshot takes it from the disk. *Copied*: a reader takes it from the target, and the guest does as it
//! likes. Neither: nobody wants it; a reader is refused.
//!
//! **Who waits for whom.** Whoever reads the snapshot has a turn for the clusters that it reads, shared with
//! other readers; whoever copies or forgets clusters has theirs alone. So a guest's write waits for the
//! readers that are reading from the disk what it is going to change, and for whoever copies it already,
//! before it copies what is left; and a reader waits for copies of what it reads. Once a cluster is not left
//! any more, no reader is under way that takes it from the disk, and the guest's writes to it wait for
//! nothing. A turn is had at the start of a call, one at a time, and what is done within it waits only for
//! nodes below; so waits form no circle, and whoever waits has entered the graph, as whoever he waits for
//! has: a drained section sees both through.
//!
//! **Giving up.** When something cannot be copied, or not in time, either the guest's request fails and the
//! snapshot stays, or the snapshot is given up for good: from then on nobody copies, who waits for a turn
//! goes on at once, and readers fail; also those that were under way, since the guest may have changed what
//! they read.
//!
//! With a time limit, copying is done in a task of its own that the guest's request stops waiting for; it
//! goes on to its end, as a driver below may have to, and drained sections wait for it.
//!
//! Threads: any worker.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use event_listener::Event;
use futures_channel::oneshot;
use futures_util::FutureExt;
use futures_util::future::{Either, select};

use crate::IoError;
use crate::dirty_bitmap::bits::TooManyBits;
use crate::dirty_bitmap::{Area, Bits};
use crate::driver::{SnapshotIo, Status, StatusFlags, WriteFlags, ZeroFlags};
use crate::fault::{self, Fault};
use crate::filter::link::CopyFailure;
use crate::io::buffer::Segments;
use crate::io::tracked::{Tracked, Tracker};
use crate::io::{Io, IoFuture, align};
use crate::node::Notice;

/// Longest piece that is copied or read at once: it is memory, and it is what others wait for.
const PIECE_BYTES: u64 = 1 << 20;
/// The children of the node, in its type's order.
const SOURCE: usize = 0;
const TARGET: usize = 1;

/// What breaks when something cannot be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnError {
    /// The guest's request.
    BreakGuestWrite,
    /// The snapshot.
    BreakSnapshot,
}

/// See the module's header.
pub(crate) struct Snapshot {
    bytes: u64,
    cluster: u64,
    left: Bits,
    copied: Bits,
    turns: Tracker,
    on_error: OnError,
    timeout: Option<Duration>,
    broken: AtomicBool,
    given_up: Event,
    copied_bytes: AtomicU64,
}

impl Snapshot {
    /// A snapshot of a disk of `bytes`, of what `only` has marked, or all of it.
    ///
    /// # Errors
    ///
    /// [`TooManyBits`] if there are too many clusters.
    pub(crate) fn new(
        bytes: u64,
        cluster: u64,
        only: Option<&Bits>,
        on_error: OnError,
        timeout: Option<Duration>,
    ) -> Result<Self, TooManyBits> {
        let left = Bits::new(bytes, cluster)?;
        match only {
            Some(only) => left.merge(only),
            None => left.set(0, bytes),
        }
        Ok(Self {
            bytes,
            cluster,
            left,
            copied: Bits::new(bytes, cluster)?,
            turns: Tracker::default(),
            on_error,
            timeout,
            broken: AtomicBool::new(false),
            given_up: Event::new(),
            copied_bytes: AtomicU64::new(0),
        })
    }

    /// How much has been copied so far.
    pub(super) fn copied_bytes(&self) -> u64 {
        self.copied_bytes.load(Ordering::Relaxed)
    }

    /// Copies what is left of a range that is going to be changed. `io` is the copy-before-write node.
    ///
    /// # Errors
    ///
    /// What kept it from being copied, if that is to break the guest's request: [`IoError::Failed`] if it
    /// took too long.
    pub(super) async fn before_change(
        self: &Arc<Self>,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<(), IoError> {
        let careless = fault::is_planted(Fault::BackupTurn);
        if careless || self.is_broken() || self.left.is_clean(offset, bytes) {
            return Ok(());
        }
        let (begin, end) = self.clusters(offset, bytes);
        let copied = match self.timeout {
            None => self.copy(io, begin, end).await,
            Some(timeout) => self.copy_within(timeout, io, begin, end).await,
        };
        match copied {
            Err(error) if self.on_error == OnError::BreakSnapshot => {
                self.give_up(io, error);
                Ok(())
            }
            copied => copied,
        }
    }

    async fn copy(&self, io: Io<'_>, begin: u64, end: u64) -> Result<(), IoError> {
        match self.turn(begin, end, true).await {
            Some(_turn) => {
                let copied = self.copy_left(io, begin, end, false).await;
                copied.map_err(|failure| failure.error)
            }
            None => Ok(()),
        }
    }

    /// Copies what is left of a range, for a job that is to have all of it in the target; with
    /// `own_layer_only` what the source has from its backing node is left out. `io` is the
    /// copy-before-write node.
    ///
    /// # Errors
    ///
    /// What could not be read or written, which is left still; [`IoError::Failed`] of the source once the
    /// snapshot has been given up.
    pub(crate) async fn copy_out(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        own_layer_only: bool,
    ) -> Result<(), CopyFailure> {
        let lost = || CopyFailure::source(IoError::Failed);
        let (begin, end) = self.clusters(offset, bytes);
        let _turn = self.turn(begin, end, true).await.ok_or_else(lost)?;
        self.copy_left(io, begin, end, own_layer_only).await?;
        self.check().map_err(|_| lost())
    }

    /// Makes durable what was copied.
    pub(crate) async fn flush_target(&self, io: Io<'_>) -> Result<(), CopyFailure> {
        let flushed = io.child(TARGET).flush().boxed_local();
        flushed.await.map_err(CopyFailure::target)
    }

    /// Whether something could not be copied in time, so that it is lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.is_broken()
    }

    /// What has not been copied.
    pub(crate) fn left(&self) -> &Bits {
        &self.left
    }

    async fn copy_within(
        self: &Arc<Self>,
        timeout: Duration,
        io: Io<'_>,
        begin: u64,
        end: u64,
    ) -> Result<(), IoError> {
        let (mut reply, answer) = oneshot::channel();
        let (this, request) = (Arc::clone(self), io.fork());
        io.context().spawn(async move {
            // Who only waits for a turn ends with whoever wanted it.
            let turn = match select(
                pin!(this.turn(begin, end, true)),
                pin!(reply.cancellation()),
            )
            .await
            {
                Either::Left((turn, _)) => turn,
                Either::Right(_) => return,
            };
            let copied = match &turn {
                Some(_) => {
                    let copied = this.copy_left(request.io(), begin, end, false).await;
                    copied.map_err(|failure| failure.error)
                }
                None => Ok(()),
            };
            drop(turn);
            // Nobody may wait any more.
            let _ = reply.send(copied);
        });
        match select(answer, pin!(io.context().delay(timeout))).await {
            Either::Left((copied, _)) => copied.unwrap_or(Err(IoError::Failed)),
            Either::Right(_) => Err(IoError::Failed),
        }
    }

    /// Copies clusters whose turn it is.
    async fn copy_left(
        &self,
        io: Io<'_>,
        begin: u64,
        end: u64,
        own_layer_only: bool,
    ) -> Result<(), CopyFailure> {
        let most = PIECE_BYTES.max(self.cluster);
        for area in self.left.areas(begin, end - begin, most) {
            if self.is_broken() {
                break;
            }
            let wanted = !own_layer_only || self.is_in_own_layer(io, area).await?;
            if wanted {
                self.copy_area(io, area).await?;
                // Copied before it is not left any more: readers want either.
                self.copied.set(area.offset, area.bytes);
                self.copied_bytes.fetch_add(area.bytes, Ordering::Relaxed);
            }
            self.left.clear(area.offset, area.bytes);
        }
        Ok(())
    }

    /// Whether the source itself has something of an area, and not only its backing node.
    async fn is_in_own_layer(&self, io: Io<'_>, area: Area) -> Result<bool, CopyFailure> {
        let mut done = 0;
        while done < area.bytes {
            let (offset, bytes) = (area.offset + done, area.bytes - done);
            let allocated = io.child(SOURCE).is_allocated(offset, bytes).boxed_local();
            let (is_allocated, alike) = allocated.await.map_err(CopyFailure::source)?;
            if is_allocated || alike == 0 {
                return Ok(true);
            }
            done += alike;
        }
        Ok(false)
    }

    async fn copy_area(&self, io: Io<'_>, area: Area) -> Result<(), CopyFailure> {
        let (source, target) = (io.child(SOURCE), io.child(TARGET));
        let status = source
            .status_above(|_| false, true, area.offset, area.bytes)
            .boxed_local();
        // An error here only means that it has to be read to see what it is.
        let hole = status.await.is_ok_and(|(status, _)| {
            status.flags.contains(StatusFlags::ZERO) && status.bytes >= area.bytes
        });
        let data = match hole {
            true => None,
            false => {
                let data = Segments::allocate(area.bytes as usize, 4096);
                let read = source.read(area.offset, data.clone()).boxed_local();
                read.await.map_err(CopyFailure::source)?;
                Some(data).filter(|data| !data.is_zero())
            }
        };
        let written = match data {
            None => target
                .write_zeroes(area.offset, area.bytes, ZeroFlags::MAY_UNMAP)
                .boxed_local(),
            Some(data) => target
                .write(area.offset, data, WriteFlags::empty())
                .boxed_local(),
        };
        written.await.map_err(CopyFailure::target)
    }

    /// The whole clusters that a range touches; the last may end with the disk.
    fn clusters(&self, offset: u64, bytes: u64) -> (u64, u64) {
        let end = align::up(offset.saturating_add(bytes).min(self.bytes), self.cluster);
        (align::down(offset, self.cluster), end.min(self.bytes))
    }

    /// Waits for a turn; `None` if the snapshot is given up before it comes.
    async fn turn(&self, begin: u64, end: u64, alone: bool) -> Option<Tracked<'_>> {
        // Before the look: giving up after it wakes this task.
        let given_up = self.given_up.listen();
        if self.is_broken() {
            return None;
        }
        match select(pin!(self.turns.begin(begin, end, alone)), given_up).await {
            Either::Left((turn, _)) => Some(turn),
            Either::Right(_) => None,
        }
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    fn give_up(&self, io: Io<'_>, error: IoError) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            tracing::warn!(node = io.name(), %error, "the snapshot is lost: something could not be copied");
            let node = Arc::clone(io.state().name());
            io.state().notify(Notice::SnapshotLost { node, error });
        }
        self.given_up.notify(usize::MAX);
    }

    /// Refuses whoever has read something while the snapshot was given up.
    fn check(&self) -> Result<(), IoError> {
        (!self.is_broken()).then_some(()).ok_or(IoError::Failed)
    }

    /// In which child the byte at `offset` is, and for how many of `bytes` that holds. For who has a turn.
    fn place(&self, offset: u64, bytes: u64) -> Result<(usize, u64), IoError> {
        for (child, bits) in [(TARGET, &self.copied), (SOURCE, &self.left)] {
            if bits.get(offset) {
                let inside = bytes.min(self.bytes - offset);
                let end = bits.next_clean(offset, inside);
                return Ok((child, end.map_or(inside, |end| end - offset)));
            }
        }
        Err(IoError::Failed)
    }

    async fn read_piece(&self, io: Io<'_>, offset: u64, into: Segments) -> Result<(), IoError> {
        let bytes = into.bytes();
        let (begin, end) = self.clusters(offset, bytes);
        let _turn = self.turn(begin, end, false).await.ok_or(IoError::Failed)?;
        let mut done = 0;
        while done < bytes {
            let (child, alike) = self.place(offset + done, bytes - done)?;
            let part = into.slice(done, alike);
            io.child(child).read(offset + done, part).await?;
            done += alike;
        }
        self.check()
    }

    async fn status(
        &self,
        io: Io<'_>,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<Status, IoError> {
        let (begin, end) = self.clusters(offset, bytes);
        let _turn = self.turn(begin, end, false).await.ok_or(IoError::Failed)?;
        let (child, alike) = self.place(offset, bytes)?;
        let below = io
            .child(child)
            .status_above(|_| false, exact, offset, alike)
            .boxed_local()
            .await?
            .0;
        self.check()?;
        // Where it lies concerns nobody: it may be somewhere else in a moment.
        let flags = match below.flags & (StatusFlags::DATA | StatusFlags::ZERO) {
            flags if flags.is_empty() => StatusFlags::DATA,
            flags => flags,
        };
        match below.bytes {
            0 => Ok(Status::new(StatusFlags::ZERO, alike)),
            below => Ok(Status::new(flags, below.min(alike))),
        }
    }

    async fn forget(&self, io: Io<'_>, offset: u64, bytes: u64) -> Result<(), IoError> {
        let (begin, end) = self.clusters(offset, bytes);
        let Some(_turn) = self.turn(begin, end, true).await else {
            return Ok(());
        };
        let first = align::up(offset, self.cluster);
        let last = match offset + bytes >= self.bytes {
            true => self.bytes,
            false => align::down(offset + bytes, self.cluster),
        };
        if first >= last {
            return Ok(());
        }
        self.left.clear(first, last - first);
        self.copied.clear(first, last - first);
        let discarded = io.child(TARGET).discard(first, last - first);
        discarded.boxed_local().await
    }
}

impl SnapshotIo for Snapshot {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            for (piece, bytes) in align::pieces(offset, into.bytes(), PIECE_BYTES) {
                let part = into.slice(piece - offset, bytes);
                self.read_piece(io, piece, part).await?;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        self.forget(io, offset, bytes).boxed_local()
    }

    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        self.status(io, exact, offset, bytes).boxed_local()
    }
}
