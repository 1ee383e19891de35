//! The nodes `mirror_top` and `commit_top`: what jobs put above a node that they copy to another, `target`.
//!
//! Everything that changes the source comes through this node, which notes it in [`Link::dirty`]; the job
//! clears a mark and then copies. So what is not marked, and not being copied, is the same in both.
//!
//! **Marks and copies.** A mark falls before the copy reads, and is set after a write has ended and before
//! its guest is told, as for every dirty bitmap ([`crate::dirty_bitmap`]). A write that a copy overlaps has
//! set its mark when the copy is over, and the range is copied again.
//!
//! **Write-blocking.** A write then goes to both before its guest is told, and needs no mark unless one of
//! the two fails: what guests write is never left to do. So that both get the same bytes in the same order,
//! such a write has its range alone, also against copies, and goes through memory of our own. A write that
//! began before the mode was changed sets its mark as before.
//!
//! **Who waits for whom.** A turn is had by requests that have entered the graph, one at a time; what is
//! done within it waits only for nodes below. So waits form no circle, and a drained section sees all
//! through. A guest waits for copies and for the target only while the mode is write-blocking.
//!
//! The source is written to by nobody past this node, and the target by nobody else at all; the graph's
//! permissions see to that.
//!
//! Threads: any worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt;

use crate::IoError;
use crate::dirty_bitmap::Bits;
use crate::dirty_bitmap::bits::TooManyBits;
use crate::driver::{
    ChildPermissions, ChildQuery, ChildSpec, Driver, DriverIo, DriverType, Mapping, Opened,
    Preallocation, Role, StatusFlags, TruncateFlags, WriteFlags, ZeroFlags,
};
use crate::fault::{self, Fault};
use crate::graph::NodeId;
use crate::graph::permission::{self, Permissions};
use crate::io::buffer::Segments;
use crate::io::tracked::Tracker;
use crate::io::{Io, IoFuture, align};

/// The children of the node, in its type's order.
const SOURCE: usize = 0;
const TARGET: usize = 1;
/// Longest piece that is copied at once: it is memory, and it is what others wait for.
const PIECE_BYTES: u64 = 1 << 20;
/// Alignment of memory of our own; enough for every host.
const ALIGNMENT: usize = 4096;

const CHILDREN: &[ChildSpec] = &[
    ChildSpec {
        name: "backing",
        role: Role::FILTERED.union(Role::PRIMARY),
        optional: false,
    },
    ChildSpec {
        name: "target",
        role: Role::DATA,
        optional: false,
    },
];

/// Above what a mirror, or a commit of what guests write to, copies from. Not registered: operators cannot
/// add one.
pub(crate) static MIRROR_TOP: DriverType = DriverType {
    name: "mirror_top",
    about: "what a mirror copies from",
    children: CHILDREN,
    ..DriverType::FILTER
};

/// Above what a commit copies from.
pub(crate) static COMMIT_TOP: DriverType = DriverType {
    name: "commit_top",
    about: "what a commit copies from",
    children: CHILDREN,
    ..DriverType::FILTER
};

/// At which end copying failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopySide {
    /// It could not be read.
    Source,
    /// It could not be written.
    Target,
}

/// Why something could not be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyFailure {
    /// Where.
    pub(crate) side: CopySide,
    /// What was met there.
    pub(crate) error: IoError,
}

impl CopyFailure {
    pub(crate) fn source(error: IoError) -> Self {
        let side = CopySide::Source;
        Self { side, error }
    }

    pub(crate) fn target(error: IoError) -> Self {
        let side = CopySide::Target;
        Self { side, error }
    }
}

/// What a job and its node share.
pub(crate) struct Link {
    dirty: Arc<Bits>,
    turns: Tracker,
    write_blocking: AtomicBool,
    /// Whether what is zero may be given back in the target.
    unmap: bool,
    /// Layers from this one on are not copied.
    base: Option<NodeId>,
    /// The target may be made longer.
    grows: bool,
}

/// How a [`Link`] is made.
pub(crate) struct LinkSpec {
    /// The length of the source in bytes.
    pub(crate) bytes: u64,
    /// How much a mark stands for; a power of two.
    pub(crate) granularity_bytes: u64,
    /// Whether guests wait for the target.
    pub(crate) write_blocking: bool,
    /// Whether what is zero may be given back in the target.
    pub(crate) unmap: bool,
    /// Layers from this one on are not copied.
    pub(crate) base: Option<NodeId>,
    /// The target may be made longer.
    pub(crate) grows: bool,
}

impl Link {
    /// Nothing is marked yet.
    ///
    /// # Errors
    ///
    /// [`TooManyBits`].
    pub(crate) fn new(spec: &LinkSpec) -> Result<Arc<Self>, TooManyBits> {
        Ok(Arc::new(Self {
            dirty: Arc::new(Bits::new(spec.bytes, spec.granularity_bytes)?),
            turns: Tracker::default(),
            write_blocking: AtomicBool::new(spec.write_blocking),
            unmap: spec.unmap,
            base: spec.base,
            grows: spec.grows,
        }))
    }

    /// The halves of a node that has this link.
    pub(crate) fn opened(self: &Arc<Self>) -> Opened {
        Opened {
            driver: Box::new(LinkDriver { grows: self.grows }),
            io: Arc::new(LinkIo(Arc::clone(self))),
        }
    }

    /// What is to be copied.
    pub(crate) fn dirty(&self) -> &Arc<Bits> {
        &self.dirty
    }

    /// Whether guests wait for the target.
    pub(crate) fn is_write_blocking(&self) -> bool {
        self.write_blocking.load(Ordering::SeqCst)
    }

    /// From now on guests wait for the target.
    pub(crate) fn block_writes(&self) {
        self.write_blocking.store(true, Ordering::SeqCst);
    }

    /// Copies a range, whose marks have been cleared; `io` is the link's node.
    pub(crate) async fn copy(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<(), CopyFailure> {
        let alone = !fault::is_planted(Fault::MirrorTurn);
        let _turn = self.turns.begin(offset, offset + bytes, alone).await;
        let end = offset + bytes;
        let mut next = offset;
        while next < end {
            next += self.copy_alike(io, next, end - next).await?;
        }
        Ok(())
    }

    /// Copies as much from `offset` on as is of one kind, and at most `bytes`; returns how much.
    async fn copy_alike(&self, io: Io<'_>, offset: u64, bytes: u64) -> Result<u64, CopyFailure> {
        let (source, target) = (io.child(SOURCE), io.child(TARGET));
        let is_base = |layer: Io<'_>| Some(layer.state().id()) == self.base;
        let status = source.status_above(is_base, true, offset, bytes);
        let (status, _) = status.boxed_local().await.map_err(CopyFailure::source)?;
        let (flags, alike) = match status.bytes {
            // Cut off since, and zero.
            0 => (StatusFlags::ZERO | StatusFlags::ALLOCATED, bytes),
            alike => (status.flags, alike.min(bytes)),
        };
        if self.base.is_some() && !flags.contains(StatusFlags::ALLOCATED) {
            return Ok(alike);
        }
        if flags.contains(StatusFlags::ZERO) {
            let zero = match self.unmap {
                true => ZeroFlags::MAY_UNMAP,
                false => ZeroFlags::empty(),
            };
            let zeroed = target.write_zeroes(offset, alike, zero).boxed_local();
            zeroed.await.map_err(CopyFailure::target)?;
            return Ok(alike);
        }
        let alike = alike.min(PIECE_BYTES);
        let data = Segments::allocate(alike as usize, ALIGNMENT);
        let read = source.read(offset, data.clone()).boxed_local();
        read.await.map_err(CopyFailure::source)?;
        let written = target
            .write(offset, data, WriteFlags::empty())
            .boxed_local();
        written.await.map_err(CopyFailure::target)?;
        Ok(alike)
    }

    /// Marks what of a range the source has above the base, or all that it has; returns how far that was
    /// found out. Guests' writes meanwhile have marks of their own.
    pub(crate) async fn look(
        &self,
        io: Io<'_>,
        base: Option<NodeId>,
        offset: u64,
        bytes: u64,
    ) -> Result<u64, CopyFailure> {
        let is_base = |layer: Io<'_>| Some(layer.state().id()) == base;
        let status = io.child(SOURCE).status_above(is_base, false, offset, bytes);
        let (status, _) = status.boxed_local().await.map_err(CopyFailure::source)?;
        let alike = match status.bytes {
            0 => bytes,
            alike => alike.min(bytes),
        };
        if status.flags.contains(StatusFlags::ALLOCATED) || status.bytes == 0 {
            self.dirty.set(offset, alike);
        }
        Ok(alike)
    }

    /// Makes durable what the target has.
    pub(crate) async fn flush_target(&self, io: Io<'_>) -> Result<(), CopyFailure> {
        let flushed = io.child(TARGET).flush().boxed_local();
        flushed.await.map_err(CopyFailure::target)
    }

    /// Makes the target at least as long as the source.
    pub(crate) async fn grow_target(&self, io: Io<'_>) -> Result<(), CopyFailure> {
        let (bytes, target) = (io.child(SOURCE).bytes(), io.child(TARGET));
        if target.bytes() >= bytes {
            return Ok(());
        }
        let grown = target.truncate(bytes, true, Preallocation::Off, TruncateFlags::ZERO);
        grown.boxed_local().await.map_err(CopyFailure::target)
    }

    fn mark(&self, offset: u64, bytes: u64) -> Mark<'_> {
        Mark {
            link: self,
            offset,
            bytes,
            is_needed: true,
        }
    }
}

/// Marks a range when it is dropped: after the I/O, and before anybody is told; also after a failure.
struct Mark<'a> {
    link: &'a Link,
    offset: u64,
    bytes: u64,
    is_needed: bool,
}

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        if self.is_needed && !fault::is_planted(Fault::MirrorMark) {
            self.link.dirty.set(self.offset, self.bytes);
        }
    }
}

struct LinkDriver {
    grows: bool,
}

struct LinkIo(Arc<Link>);

impl Driver for LinkDriver {
    /// The target is written to, and by nobody else; nor is the source, past this node.
    fn child_permissions(&self, query: &ChildQuery) -> ChildPermissions {
        let alone = Permissions::WRITE | Permissions::RESIZE;
        if query.role.contains(Role::FILTERED) {
            let mut answer = permission::default_rule(query);
            answer.needs |= Permissions::CONSISTENT_READ;
            answer.shares -= alone;
            return answer;
        }
        let needs = match self.grows {
            true => alone,
            false => Permissions::WRITE,
        };
        ChildPermissions {
            needs,
            shares: Permissions::all() - alone,
        }
    }
}

impl LinkIo {
    /// Has a request done for the source, and for the target as well where guests wait for that.
    async fn follow<'a>(
        &'a self,
        offset: u64,
        bytes: u64,
        for_source: IoFuture<'a>,
        for_target: Option<IoFuture<'a>>,
    ) -> Result<(), IoError> {
        let turn = match &for_target {
            Some(_) => {
                let end = offset.saturating_add(bytes);
                let alone = !fault::is_planted(Fault::MirrorTurn);
                Some(self.0.turns.begin(offset, end, alone).await)
            }
            None => None,
        };
        let mut mark = self.0.mark(offset, bytes);
        for_source.await?;
        if let Some(for_target) = for_target {
            // A target that fails is the job's affair, which finds the mark.
            mark.is_needed = for_target.await.is_err();
        }
        drop(mark);
        drop(turn);
        Ok(())
    }
}

impl DriverIo for LinkIo {
    fn map(&self, write: bool, offset: u64, _bytes: u64) -> Mapping {
        match write {
            true => Mapping::Ask,
            false => Mapping::Child {
                index: SOURCE,
                offset,
            },
        }
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::STABLE | WriteFlags::UNCHANGED
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        let source = io.child(SOURCE);
        if flags.contains(WriteFlags::UNCHANGED) {
            return source.write(offset, from, flags).boxed_local();
        }
        if !self.0.is_write_blocking() {
            let write = source.write(offset, from.clone(), flags).boxed_local();
            return self.follow(offset, from.bytes(), write, None).boxed_local();
        }
        async move {
            // A guest's memory may change between the two.
            for (piece, bytes) in align::pieces(offset, from.bytes(), PIECE_BYTES) {
                let data = Segments::allocate(bytes as usize, ALIGNMENT);
                data.copy_from_segments(&from.slice(piece - offset, bytes));
                let write = source.write(piece, data.clone(), flags).boxed_local();
                let target = io.child(TARGET);
                let also = target.write(piece, data, WriteFlags::empty()).boxed_local();
                self.follow(piece, bytes, write, Some(also)).await?;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        let bytes = from.bytes();
        let write = io.child(SOURCE).write_compressed(offset, from);
        self.follow(offset, bytes, write.boxed_local(), None)
            .boxed_local()
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        let source = io.child(SOURCE).write_zeroes(offset, bytes, flags);
        let source = source.boxed_local();
        if flags.contains(ZeroFlags::UNCHANGED) {
            return source;
        }
        let also = self.0.is_write_blocking().then(|| {
            let may_unmap = match self.0.unmap {
                true => flags & ZeroFlags::MAY_UNMAP,
                false => ZeroFlags::empty(),
            };
            let zero = io.child(TARGET).write_zeroes(offset, bytes, may_unmap);
            zero.boxed_local()
        });
        self.follow(offset, bytes, source, also).boxed_local()
    }

    /// What a range reads afterwards is up to each of the two, so it is always left to be copied.
    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        let discard = io.child(SOURCE).discard(offset, bytes).boxed_local();
        self.follow(offset, bytes, discard, None).boxed_local()
    }

    /// A target has the length that the source had when the job began.
    fn truncate<'a>(
        &'a self,
        _io: Io<'a>,
        _bytes: u64,
        _exact: bool,
        _preallocation: Preallocation,
        _flags: TruncateFlags,
    ) -> IoFuture<'a> {
        async { Err(IoError::Unsupported) }.boxed_local()
    }

    fn flush_all<'a>(&'a self, io: Io<'a>) -> Option<IoFuture<'a>> {
        Some(io.child(SOURCE).flush().boxed_local())
    }

    fn allocated_bytes<'a>(&'a self, io: Io<'a>) -> IoFuture<'a, Option<u64>> {
        io.child(SOURCE).allocated_bytes().boxed_local()
    }
}
