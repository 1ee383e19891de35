//! [`Io`]: one node of a plan, with the pipeline around its driver: reads and writes.
//!
//! A driver reaches its children through this, and a request its root's node. Each call checks the
//! range, registers where the plan says so, widens, bounces and cuts what the driver cannot take as it
//! is, and marks what was changed.
//!
//! Zeroing and discarding are in `zero`, flushing in `flush`, lengths in `length`, status in `status`,
//! copying by the host in `copy`.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use futures_util::FutureExt;

use super::buffer::Segments;
use super::context::BounceRoom;
use super::plan::PlanNode;
use super::root::Request;
use super::tracked::Tracked;
use super::uses::Using;
use super::{BOUNCE_BYTES, IoContext, IoFuture, Modes, align};
use crate::IoError;
use crate::driver::{DetectZeroes, DriverKind, Limits, Role, SnapshotIo, WriteFlags, ZeroFlags};
use crate::fault::{self, Fault};
use crate::graph::RootId;
use crate::graph::permission::Permissions;
use crate::node::NodeState;

/// See the module's header.
#[derive(Clone, Copy)]
pub struct Io<'a> {
    request: &'a Request,
    index: usize,
}

/// See [`Io::fork`]. Drained sections wait for it.
pub struct Fork {
    request: Request,
    index: usize,
}

impl Fork {
    /// The node with the pipeline around it.
    pub fn io(&self) -> Io<'_> {
        Io::root(&self.request).at(self.index)
    }
}

impl<'a> Io<'a> {
    pub(crate) fn root(request: &'a Request) -> Self {
        Self { request, index: 0 }
    }

    pub(crate) fn node(self) -> &'a PlanNode {
        &self.request.plan().nodes[self.index]
    }

    pub(crate) fn at(self, index: usize) -> Self {
        Self { index, ..self }
    }

    /// The worker's context.
    pub fn context(self) -> &'a IoContext {
        self.request.root().context()
    }

    /// What all plans that reach this node share of it.
    pub fn state(self) -> &'a Arc<NodeState> {
        &self.node().state
    }

    /// How this node was opened.
    pub fn modes(self) -> Modes {
        self.node().modes
    }

    /// What this node keeps of a moment, if its driver does that.
    pub fn snapshot(self) -> Option<&'a dyn SnapshotIo> {
        self.node().io.snapshot()
    }

    /// A request of its own at this node, for work that this one stops waiting for.
    pub fn fork(self) -> Fork {
        Fork {
            request: self.request.fork(),
            index: self.index,
        }
    }

    /// Records that bytes of the child at `index` are used, until what is returned is dropped. For drivers
    /// that [move data](crate::driver::DriverIo::moves_data): with no wait since they resolved, and until
    /// the operation on these bytes has ended.
    ///
    /// # Cancellation
    ///
    /// An operation goes on when the future that waits for it is dropped; its use must not end with it.
    /// Requests are not dropped half way: see [`drain`](crate::drain), which rests on that, too.
    pub fn using(self, index: usize, offset: u64, bytes: u64) -> Using<'a> {
        let uses = self.request.root().context().uses();
        Using::new(uses, self.state().id(), index, offset, bytes)
    }

    /// Resolves when every use of bytes in one of `ranges` of the child at `index` has ended that was
    /// recorded before this call: on every worker, by every request that reaches this node, however it
    /// came. Uses that begin later do not matter: the caller has changed the mapping before, and they
    /// resolve to something else. Ranges come in any order.
    ///
    /// Asks at once, whether or not the future is polled. Whoever waits has no overlapping use open that
    /// ends only after it.
    pub fn wait_unused(
        self,
        index: usize,
        ranges: Arc<[Range<u64>]>,
    ) -> impl Future<Output = ()> + use<> {
        let state = self.state();
        state.servers.wait_unused(state.id(), index, ranges)
    }

    /// This node's limits.
    pub fn limits(self) -> &'a Limits {
        &self.node().limits
    }

    /// This node's name, for messages.
    pub fn name(self) -> &'a str {
        self.node().state.name()
    }

    /// The length in bytes, now.
    pub fn bytes(self) -> u64 {
        self.node().state.bytes()
    }

    /// The child at `index`, in the order in which the driver's type lists them.
    ///
    /// # Panics
    ///
    /// If the node has no such child: see [`has_child`](Self::has_child).
    pub fn child(self, index: usize) -> Self {
        let child = self.node().children[index];
        self.at(child.expect("the driver knows which children it has").index)
    }

    /// Whether the node has a child at `index`.
    pub fn has_child(self, index: usize) -> bool {
        self.node().children.get(index).is_some_and(Option::is_some)
    }

    /// The child with one of these roles, if there is one.
    fn child_with(self, role: Role) -> Option<Self> {
        let mut children = self.node().children.iter().flatten();
        let child = children.find(|child| child.role.intersects(role))?;
        Some(self.at(child.index))
    }

    /// The child that this node passes through; `None` if it is no filter.
    pub fn filtered(self) -> Option<Self> {
        let is_filter = self.node().kind == DriverKind::Filter;
        self.child_with(Role::FILTERED).filter(|_| is_filter)
    }

    /// The child that this node defers to for what it does not hold; `None` for filters.
    pub fn backing(self) -> Option<Self> {
        self.child_with(Role::COW)
    }

    /// [`filtered`](Self::filtered) or [`backing`](Self::backing), whichever there is: the next node of
    /// the chain.
    pub fn next_in_chain(self) -> Option<Self> {
        self.filtered().or_else(|| self.backing())
    }

    /// What becomes of a call that the driver left out: a filter's goes to its child, others cannot.
    pub(crate) fn forward<T: 'a>(
        self,
        call: impl FnOnce(Self) -> IoFuture<'a, T>,
    ) -> IoFuture<'a, T> {
        match self.filtered() {
            Some(child) => call(child),
            None => async { Err(IoError::Unsupported) }.boxed_local(),
        }
    }

    /// The request has come to a point where a test may stop or fail it. Goes to this node's driver
    /// only.
    pub async fn event(self, event: &'static str) -> Result<(), IoError> {
        match self.node().io.event(self, event) {
            Some(happens) => happens.await,
            None => Ok(()),
        }
    }

    /// A parent that holds data in this node may read past its end and, with the right to resize, write
    /// there. A user may not, also not through filters: these see to it that what they pass on was inside
    /// of the node when the request began, and somebody may have cut it off since.
    fn is_growable(self) -> bool {
        // A driver that opens reaches its children by roots without a user.
        if !self.node().holds_data && self.request.root().id() != RootId::default() {
            return false;
        }
        match self.child_with(Role::FILTERED) {
            // What passes a child through grows with it.
            Some(child) => child.is_growable(),
            None => self.node().kind == DriverKind::Protocol,
        }
    }

    pub(super) fn check(self, offset: u64, bytes: u64) -> Result<(), IoError> {
        let length = self.bytes();
        if offset > length || bytes > length - offset {
            return Err(IoError::OutOfRange);
        }
        Ok(())
    }

    pub(super) fn check_write(self, offset: u64, bytes: u64) -> Result<(), IoError> {
        let may_write = Permissions::WRITE | Permissions::WRITE_UNCHANGED;
        if self.modes().read_only || !self.node().granted.intersects(may_write) {
            return Err(IoError::ReadOnly);
        }
        if self.is_growable() && self.node().granted.contains(Permissions::RESIZE) {
            let end = offset.checked_add(bytes).ok_or(IoError::OutOfRange)?;
            return (end <= super::MAX_BYTES)
                .then_some(())
                .ok_or(IoError::OutOfRange);
        }
        self.check(offset, bytes)
    }

    /// Room for a bounce buffer of a leaf. A node above may wait for those below it, so it gets its
    /// buffers without.
    async fn bounce_room(self, bytes: u64) -> Option<BounceRoom<'a>> {
        if !self.node().children.is_empty() {
            return None;
        }
        Some(self.context().bounce_room(bytes).await)
    }

    /// A buffer in room that was waited for, or without.
    fn buffer(self, room: &mut Option<BounceRoom<'_>>, bytes: u64) -> Segments {
        let alignment = (self.limits().memory_alignment as usize).max(512);
        match room {
            Some(room) => room.buffer(alignment),
            None => Segments::allocate(bytes as usize, alignment),
        }
    }

    pub(super) fn bounce(self, bytes: u64) -> Segments {
        // At least what a buffer's own allocation would have, and what the kernel likes.
        let alignment = (self.limits().memory_alignment as usize).max(512);
        Segments::allocate(bytes as usize, alignment)
    }

    /// Longest piece for one call of the driver.
    fn max_transfer(self) -> u64 {
        match self.limits().max_transfer_bytes {
            0 => u64::MAX / 2,
            bytes => bytes,
        }
    }

    pub(super) fn unit(self) -> u64 {
        u64::from(self.limits().request_alignment)
    }

    pub(super) async fn track(
        self,
        offset: u64,
        bytes: u64,
        serialising: bool,
    ) -> Option<Tracked<'a>> {
        if !self.node().tracked {
            return None;
        }
        let unit = self.unit();
        let (begin, end) = (align::down(offset, unit), align::up(offset + bytes, unit));
        Some(
            self.node()
                .state
                .tracker
                .begin(begin, end, serialising)
                .await,
        )
    }

    /// Keeps all other requests to this node off the bytes from `begin` to `end` until what is returned
    /// is dropped. For drivers whose [`serialises`](crate::driver::DriverIo::serialises) says so; the
    /// caller must hold no registration on the same bytes of the same node.
    pub async fn serialise(self, begin: u64, end: u64) -> Tracked<'a> {
        debug_assert!(self.node().tracked, "the plan knows who serialises");
        self.node().state.tracker.begin(begin, end, true).await
    }

    /// Reads, widening and bouncing where the node demands it.
    pub async fn read(self, offset: u64, into: Segments) -> Result<(), IoError> {
        let bytes = into.bytes();
        if self.is_growable() {
            return self.read_past_end(offset, into).await;
        }
        self.check(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let turn = self.track(offset, bytes, false).await;
        if turn.is_some() {
            // Whoever was in the way may have cut off what is to be read.
            self.check(offset, bytes)?;
        }
        self.read_inside(offset, into).await
    }

    /// Reads where what lies past the end is zero.
    async fn read_past_end(self, offset: u64, into: Segments) -> Result<(), IoError> {
        let bytes = into.bytes();
        offset.checked_add(bytes).ok_or(IoError::OutOfRange)?;
        let inside = || self.bytes().saturating_sub(offset).min(bytes);
        let turn = match inside() {
            0 => None,
            inside => self.track(offset, inside, false).await,
        };
        // Now: whoever was in the way may have cut some off.
        let inside = inside();
        if inside < bytes {
            into.slice(inside, bytes - inside).fill(0);
        }
        if inside == 0 {
            return Ok(());
        }
        let read = self.read_inside(offset, into.slice(0, inside)).await;
        drop(turn);
        read
    }

    /// Reads a range that is inside the node and whose turn it is.
    pub(super) async fn read_inside(self, offset: u64, into: Segments) -> Result<(), IoError> {
        let node = self.node();
        let (unit, bytes) = (self.unit(), into.bytes());
        let memory = node.limits.memory_alignment as usize;
        if align::is_aligned(offset, bytes, unit) && into.is_aligned(memory) {
            if bytes <= self.max_transfer() {
                return node.io.read(self, offset, into).await;
            }
            for (piece, piece_bytes) in align::pieces(offset, bytes, self.max_transfer()) {
                let part = into.slice(piece - offset, piece_bytes);
                node.io.read(self, piece, part).await?;
            }
            return Ok(());
        }
        for (piece, piece_bytes) in self.bounced_pieces(offset, bytes) {
            let begin = align::down(piece, unit);
            let end = align::up(piece + piece_bytes, unit);
            let mut room = self.bounce_room(end - begin).await;
            let bounce = self.buffer(&mut room, end - begin);
            node.io.read(self, begin, bounce.clone()).await?;
            into.slice(piece - offset, piece_bytes)
                .copy_from_segments(&bounce.slice(piece - begin, piece_bytes));
        }
        Ok(())
    }

    /// Cuts what must be bounced so that no piece, widened, is longer than the driver takes.
    fn bounced_pieces(self, offset: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> {
        let unit = self.unit();
        let most = align::down(BOUNCE_BYTES.min(self.max_transfer()), unit).max(unit);
        align::pieces(offset, bytes, most)
    }

    /// Writes, widening (read, change, write back) and bouncing where the node demands it.
    pub async fn write(
        self,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let bytes = from.bytes();
        self.check_write(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let whole = align::is_aligned(offset, bytes, self.unit());
        let serialising = !whole || flags.contains(WriteFlags::SERIALISING);
        let turn = match flags.contains(WriteFlags::NO_WAIT) {
            false => self.track(offset, bytes, serialising).await,
            true => self.try_track(offset, bytes, serialising)?,
        };
        if turn.is_some() {
            // Whoever was in the way may have cut off what is to be written to.
            self.check_write(offset, bytes)?;
        }
        let _marks = self.changes(offset, bytes);
        let zeroes = self.detected_zeroes(&from);
        match zeroes {
            None => self.write_inside(offset, from, flags).await?,
            Some(zero) => self.zero_inside(offset, bytes, zero).await?,
        }
        self.stabilise(flags.contains(WriteFlags::STABLE), zeroes.is_none())
            .await
    }

    /// What is written, with the part that the guard looks at in memory of our own.
    fn guarded(self, offset: u64, from: Segments) -> Result<Segments, IoError> {
        match &self.node().guard {
            Some(guard) => guard.check(offset, from),
            None => Ok(from),
        }
    }

    /// As [`track`](Self::track), but fails where it would have to wait.
    pub(super) fn try_track(
        self,
        offset: u64,
        bytes: u64,
        serialising: bool,
    ) -> Result<Option<Tracked<'a>>, IoError> {
        if !self.node().tracked {
            return Ok(None);
        }
        let unit = self.unit();
        let (begin, end) = (align::down(offset, unit), align::up(offset + bytes, unit));
        let tracker = &self.node().state.tracker;
        let turn = tracker.try_begin(begin, end, serialising);
        turn.map(Some).ok_or(IoError::Busy)
    }

    /// How to zero the range instead of writing zeroes to it; `None` where data is to be written. Looked
    /// at once: a guest that changes its memory meanwhile gets what was there at the look.
    fn detected_zeroes(self, from: &Segments) -> Option<ZeroFlags> {
        let flags = match self.modes().detect_zeroes {
            DetectZeroes::Off => return None,
            DetectZeroes::On => ZeroFlags::empty(),
            DetectZeroes::Unmap if self.modes().unmap => ZeroFlags::MAY_UNMAP,
            DetectZeroes::Unmap => ZeroFlags::empty(),
        };
        from.is_zero().then_some(flags)
    }

    /// Sees to it that what was just changed is durable, if that was asked for and the driver has not.
    pub(super) async fn stabilise(self, stable: bool, written: bool) -> Result<(), IoError> {
        let by_driver = written && self.node().io.write_flags().contains(WriteFlags::STABLE);
        if !stable || by_driver {
            return Ok(());
        }
        self.request.changed();
        // Boxed: a flush recurses as a write does.
        Box::pin(self.flush()).await
    }

    /// Writes a range that is allowed and whose turn it is.
    pub(super) async fn write_inside(
        self,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let node = self.node();
        let (unit, bytes) = (self.unit(), from.bytes());
        let memory = node.limits.memory_alignment as usize;
        let flags = flags & node.io.write_flags();
        self.event("pwritev").await?;
        let from = match align::is_aligned(offset, bytes, unit) {
            true => self.guarded(offset, from)?,
            // Looked at when the rest of its unit is there.
            false => from,
        };
        if align::is_aligned(offset, bytes, unit) && from.is_aligned(memory) {
            if bytes <= self.max_transfer() {
                node.io.write(self, offset, from, flags).await?;
            } else {
                for (piece, piece_bytes) in align::pieces(offset, bytes, self.max_transfer()) {
                    let part = from.slice(piece - offset, piece_bytes);
                    node.io.write(self, piece, part, flags).await?;
                }
            }
            return self.event("pwritev_done").await;
        }
        for (piece, piece_bytes) in self.bounced_pieces(offset, bytes) {
            let begin = align::down(piece, unit);
            let end = align::up(piece + piece_bytes, unit);
            let mut room = self.bounce_room(end - begin).await;
            let bounce = self.buffer(&mut room, end - begin);
            self.read_edges(&bounce, begin, (piece - begin, piece_bytes))
                .await?;
            bounce
                .slice(piece - begin, piece_bytes)
                .copy_from_segments(&from.slice(piece - offset, piece_bytes));
            let bounce = self.guarded(begin, bounce)?;
            node.io.write(self, begin, bounce, flags).await?;
        }
        self.event("pwritev_done").await
    }

    /// Fills the units of `bounce` (which begins at `begin`) that the changed part, given by its
    /// place in the bounce buffer, covers only partly.
    async fn read_edges(
        self,
        bounce: &Segments,
        begin: u64,
        (change, change_bytes): (u64, u64),
    ) -> Result<(), IoError> {
        if fault::is_planted(Fault::EdgeRead) {
            return Ok(());
        }
        let unit = self.unit();
        let tail = align::down(change + change_bytes, unit);
        if change > 0 {
            self.event("pwritev_rmw_head").await?;
            self.read_edge(begin, bounce.slice(0, unit)).await?;
            self.event("pwritev_rmw_after_head").await?;
        }
        let tail_is_partial = tail < bounce.bytes();
        let read_already = change > 0 && tail == 0;
        if tail_is_partial && !read_already {
            self.event("pwritev_rmw_tail").await?;
            self.read_edge(begin + tail, bounce.slice(tail, unit))
                .await?;
            self.event("pwritev_rmw_after_tail").await?;
        }
        Ok(())
    }

    /// Reads a unit that may lie past the end of a node that grows: zero there.
    async fn read_edge(self, offset: u64, into: Segments) -> Result<(), IoError> {
        if offset >= self.bytes() {
            into.fill(0);
            return Ok(());
        }
        self.node().io.read(self, offset, into).await
    }

    /// Writes data compressed: a whole cluster, or the last one up to the node's end.
    ///
    /// # Errors
    ///
    /// [`IoError::Unsupported`] if the driver cannot; else as [`write`](Self::write).
    pub async fn write_compressed(self, offset: u64, from: Segments) -> Result<(), IoError> {
        let bytes = from.bytes();
        self.check_write(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let turn = self.track(offset, bytes, false).await;
        if turn.is_some() {
            self.check_write(offset, bytes)?;
        }
        let _marks = self.changes(offset, bytes);
        self.node().io.write_compressed(self, offset, from).await
    }

    /// Whether [`write_compressed`](Self::write_compressed) leads to a driver that compresses.
    pub fn can_compress(self) -> bool {
        self.node().io.can_compress() || self.filtered().is_some_and(Self::can_compress)
    }

    /// Marks a range as changed when what is returned is dropped: after the I/O, and before anybody is
    /// told; also after a failure, which may have changed a part.
    pub(super) fn changes(self, offset: u64, bytes: u64) -> Changes<'a> {
        let changes = Changes {
            io: self,
            offset,
            bytes,
        };
        if fault::is_planted(Fault::DirtyMarkEarly) {
            changes.mark();
        }
        changes
    }

    /// What the request counts as a change that a flush must cover.
    pub(super) fn request(self) -> &'a Request {
        self.request
    }
}

/// See [`Io::changes`].
pub(super) struct Changes<'a> {
    io: Io<'a>,
    offset: u64,
    bytes: u64,
}

impl Changes<'_> {
    fn mark(&self) {
        for bitmap in &self.io.node().bitmaps {
            bitmap.set(self.offset, self.bytes);
        }
    }
}

impl Drop for Changes<'_> {
    fn drop(&mut self) {
        if !fault::is_planted(Fault::DirtyMark) && !fault::is_planted(Fault::DirtyMarkEarly) {
            self.mark();
        }
        let end = self.offset + self.bytes;
        let state = self.io.state();
        state.wrote_to(end);
        if self.io.is_growable() {
            // A failed write may have grown the host's file all the same: what lies there is then read
            // from it, as the host has it.
            state.grow_to(end);
        }
        self.io.request.changed();
    }
}
