//! [`DriverIo`]: the I/O half of a node's driver.
//!
//! Threads: any worker, several at once. What it guards itself it guards with locks that are held over
//! memory operations only, never over an await.

use std::sync::Arc;

use bitflags::bitflags;
use futures_util::FutureExt;

use crate::engine::{FileId, OpenFile};
use crate::io::buffer::Segments;
use crate::io::{Io, IoContext, IoFuture, MemoryRange};

/// Where the bytes of a request live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// In a child, all of them, from `offset` on.
    Child {
        /// Which child.
        index: usize,
        /// In bytes.
        offset: u64,
    },
    /// In a file, all of them, from `offset` on; the length is inside the file.
    File {
        /// Which file, one of [`DriverIo::files`].
        file: FileId,
        /// In bytes.
        offset: u64,
    },
    /// The driver must do the request itself.
    Ask,
}

/// The I/O half of a node's driver; any worker. See the module's header, and
/// [`crate::driver`] for what the pipeline promises and what becomes of what is left out.
pub trait DriverIo: Send + Sync {
    /// The length in bytes, given the children's. The core keeps it and asks again after whatever may
    /// have changed it. The default is the first child's.
    fn bytes(&self, children: &[u64]) -> u64 {
        children.first().copied().unwrap_or(0)
    }

    /// Asks the host for the length again, where it may have changed under us.
    fn refresh_bytes<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        let _ = io;
        async { Ok(()) }.boxed_local()
    }

    /// Files that [`map`](Self::map) or the driver's own requests name. Fixed while this half lives.
    fn files(&self) -> &[Arc<OpenFile>] {
        &[]
    }

    /// Where a request's bytes live, if that is known at once: no allocation, no lock, no wait.
    /// The range is inside the node and aligned. A filter that must see a request answers
    /// [`Mapping::Ask`], which is the default.
    fn map(&self, write: bool, offset: u64, bytes: u64) -> Mapping {
        let _ = (write, offset, bytes);
        Mapping::Ask
    }

    /// Whether where bytes live in a child that holds data ([`Role::DATA`]) may change while requests are
    /// under way, so that nothing but [`Io::wait_unused`] says when the old place is free. Then the path
    /// without a task records what [`map`](Self::map) answers, for as long as its request is under way,
    /// and the driver records ([`Io::using`]) what it resolves itself. Fixed while this half lives.
    ///
    /// [`Role::DATA`]: super::Role::DATA
    fn moves_data(&self) -> bool {
        false
    }

    /// The unit in which requests to the children come when those to the node come in multiples of
    /// `unit` (a power of two).
    fn child_unit(&self, unit: u32) -> u32 {
        unit
    }

    /// Whether some request may have to keep others off its bytes while it runs
    /// ([`Io::serialise`]): then every request to this node registers.
    fn serialises(&self) -> bool {
        false
    }

    /// A child whose bytes the driver copies on read ([`Io::read_copying`]): every request to that node
    /// registers, whichever way it comes.
    fn copies_child(&self) -> Option<usize> {
        None
    }

    /// Write flags that the driver sees to itself. Others are taken away or seen to by the pipeline:
    /// stable writes by a flush.
    fn write_flags(&self) -> WriteFlags {
        WriteFlags::empty()
    }

    /// Reads. The driver sees short results of its host through to the end. Memory may be a guest's:
    /// never use it as scratch.
    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        io.forward(|child| child.read(offset, into).boxed_local())
    }

    /// Writes. The memory may be a guest's, which changes it: what must not change is copied. `flags`
    /// has only what [`write_flags`](Self::write_flags) says.
    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        io.forward(|child| child.write(offset, from, flags).boxed_local())
    }

    /// Writes a whole cluster (or what the end of the image leaves of one) compressed.
    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        io.forward(|child| child.write_compressed(offset, from).boxed_local())
    }

    /// Whether the driver itself compresses what [`write_compressed`](Self::write_compressed) gets.
    fn can_compress(&self) -> bool {
        false
    }

    /// Copies what a read of the range would copy, without anybody who reads: for filters that copy on
    /// read.
    fn prefetch<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        io.forward(move |child| child.prefetch(offset, bytes).boxed_local())
    }

    /// Makes a range read as zeroes better than by writing them. [`crate::IoError::Unsupported`] sends the
    /// pipeline to do just that. Without [`ZeroFlags::MAY_UNMAP`] space stays reserved.
    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        io.forward(|child| child.write_zeroes(offset, bytes, flags).boxed_local())
    }

    /// Deallocates a range. [`crate::IoError::Unsupported`] is no error to the caller.
    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        io.forward(|child| child.discard(offset, bytes).boxed_local())
    }

    /// Flushes everything, below too, where the order matters. `None`, as a rule: the core flushes in
    /// three steps: [`flush_to_host`](Self::flush_to_host), then, unless flushes are ignored,
    /// [`flush_to_disk`](Self::flush_to_disk), then the children that hold data or metadata.
    fn flush_all<'a>(&'a self, io: Io<'a>) -> Option<IoFuture<'a>> {
        let _ = io;
        None
    }

    /// Hands what this process keeps back to the host: afterwards a kill loses nothing. Done also
    /// where flushes are ignored.
    fn flush_to_host<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        let _ = io;
        async { Ok(()) }.boxed_local()
    }

    /// Makes durable what the host has. A failure is final until the node is reopened.
    fn flush_to_disk<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        let _ = io;
        async { Ok(()) }.boxed_local()
    }

    /// What the bytes from `offset` on are in *this layer*, for at most what the answer says and at
    /// least one unit of the node's alignment. `bytes` is a hint: the answer may be longer. A driver
    /// that defers to its backing node answers with no flags. `exact` asks for zeroes and places;
    /// without it a long answer is worth more. The default is "data" for all of it, and what the child
    /// says for a filter.
    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        let _ = exact;
        io.default_status(offset, bytes)
    }

    /// Makes the node `bytes` long. With `exact` that long; else at least that. Space that is added is
    /// prepared as `preallocation` says and, with [`TruncateFlags::ZERO`], reads as zeroes.
    /// [`crate::IoError::Unsupported`] if only an inexact length would do.
    fn truncate<'a>(
        &'a self,
        io: Io<'a>,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        io.forward(move |child| {
            child
                .truncate(bytes, exact, preallocation, flags)
                .boxed_local()
        })
    }

    /// Where a range to be copied lies below, for copying by the host: as [`map`](Self::map), and may
    /// wait. With `write` space is made for what is going to be there. Where the driver
    /// [moves data](Self::moves_data), its answer is what it resolved last, with no wait after it: the
    /// caller records the use, which for a copy's source is open while space for its target is made.
    fn copy_place<'a>(
        &'a self,
        io: Io<'a>,
        write: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Mapping> {
        let _ = io;
        let mapping = self.map(write, offset, bytes);
        async move { Ok(mapping) }.boxed_local()
    }

    /// Host space that the node occupies, in bytes; `None` if nobody knows. The default is the sum of
    /// the children that hold data or metadata, or are filtered.
    fn allocated_bytes<'a>(&'a self, io: Io<'a>) -> IoFuture<'a, Option<u64>> {
        io.children_allocated_bytes().boxed_local()
    }

    /// What a user may want to know of the format.
    fn info(&self) -> DriverInfo {
        DriverInfo::default()
    }

    /// Counters of the driver's own, by name.
    fn statistics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// The request reaches a point that tests may stop or fail it at. Filters that inject faults
    /// implement it; others need not call their children: [`Io::event`] does.
    fn event<'a>(&'a self, io: Io<'a>, event: &'static str) -> Option<IoFuture<'a>> {
        let _ = (io, event);
        None
    }

    /// Requests on the worker of `context` may use `memory` from now on: a place to register it beforehand
    /// with what the driver drives. It stays mapped until [`memory_withdrawn`](Self::memory_withdrawn) is called
    /// for the same range on the same worker; nothing that uses it is under way then.
    ///
    /// Told once for each root that reaches the node and each worker that serves it, so the same range may be
    /// told several times; the end of each is told, too. What is mapped there may be a guest's, and be changed
    /// by it at any time.
    ///
    /// It is no more than a hint. A driver may ignore it, requests may use memory that nobody announced, and
    /// what cannot be registered is no error to anybody: requests go the way that they go without. Called with
    /// the worker's other requests waiting: nothing in it may wait.
    fn memory_announced(&self, context: &IoContext, memory: MemoryRange) {
        let _ = (context, memory);
    }

    /// The end of what [`memory_announced`](Self::memory_announced) told: it may be unmapped on return.
    fn memory_withdrawn(&self, context: &IoContext, memory: MemoryRange) {
        let _ = (context, memory);
    }

    /// A drained section that covers the node begins: requests held back inside the driver are let go,
    /// and its own sources of requests (timers, prefetch, write-back) stop. Called on the control
    /// thread, once for all nested sections; only posts.
    fn drain_begin(&self) {}

    /// The last section that covers the node ends.
    fn drain_end(&self) {}

    /// Whether work that the driver began by itself is under way.
    fn is_busy(&self) -> bool {
        false
    }

    /// What the node was when it was put in place, for a driver that keeps it.
    fn snapshot(&self) -> Option<&dyn SnapshotIo> {
        None
    }
}

/// A node as it was at one moment, kept by a filter above it while requests go on changing it. The `io`
/// of each call is that filter's node.
pub trait SnapshotIo: Send + Sync {
    /// How long the node was, in bytes.
    fn bytes(&self) -> u64;

    /// Reads what was there. Fails with [`crate::IoError::Failed`] where it is not kept, or not any more.
    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a>;

    /// Nobody reads the range any more: it need not be kept. What is kept in larger units stays where a
    /// unit is covered only partly.
    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a>;

    /// Data or zeroes, from `offset` on; fails as reading does. `exact` as for
    /// [`DriverIo::block_status`].
    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status>;
}

bitflags! {
    /// What a caller wants of a write besides the data.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct WriteFlags: u8 {
        /// Durable when it completes (QEMU's `BDRV_REQ_FUA`).
        const STABLE = 1;
        /// What is read afterwards is what was read before (`BDRV_REQ_WRITE_UNCHANGED`).
        const UNCHANGED = 2;
        /// Keeps all others off its bytes (`BDRV_REQ_SERIALISING`).
        const SERIALISING = 4;
        /// With `SERIALISING`: fails with [`crate::IoError::Busy`] instead of waiting (`BDRV_REQ_NO_WAIT`).
        const NO_WAIT = 8;
    }
}

bitflags! {
    /// How a range may be zeroed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ZeroFlags: u8 {
        /// The space may be given back (`BDRV_REQ_MAY_UNMAP`).
        const MAY_UNMAP = 1;
        /// Rather fail than write zero buffers (`BDRV_REQ_NO_FALLBACK`).
        const NO_FALLBACK = 2;
        /// It reads as zeroes already (`BDRV_REQ_WRITE_UNCHANGED`).
        const UNCHANGED = 4;
        /// Durable when it completes.
        const STABLE = 8;
    }
}

bitflags! {
    /// How a copy by the host is done.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CopyFlags: u8 {
        /// The target's bytes become zeroes; the source is not looked at.
        const ZERO = 1;
    }
}

bitflags! {
    /// How a length is changed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct TruncateFlags: u8 {
        /// What is added reads as zeroes, whatever a backing node has there (`BDRV_REQ_ZERO_WRITE`).
        const ZERO = 1;
    }
}

/// How space for what is added is prepared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Not.
    #[default]
    Off,
    /// Metadata is allocated, data is not.
    Metadata,
    /// Space is reserved by the host.
    Reserve,
    /// Zeroes are written.
    Full,
}

impl Preallocation {
    /// As operators write it.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("off", Self::Off),
        ("metadata", Self::Metadata),
        ("falloc", Self::Reserve),
        ("full", Self::Full),
    ];
}

bitflags! {
    /// What a range of bytes is.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct StatusFlags: u8 {
        /// Space for data is tied to this layer.
        const DATA = 0x01;
        /// Reads as zeroes.
        const ZERO = 0x02;
        /// The answer says where the bytes lie.
        const PLACE = 0x04;
        /// The answer is that of the child at the place; drivers only, with `PLACE` alone.
        const RAW = 0x08;
        /// This layer decides what is read. Set by the core.
        const ALLOCATED = 0x10;
        /// The answer reaches the end of the node. Set by the core.
        const END = 0x20;
        /// The child may know better where zeroes are; drivers only, with `DATA` and `PLACE`.
        const RECURSE = 0x40;
        /// The data is compressed.
        const COMPRESSED = 0x80;
    }
}

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// See [`StatusFlags`].
    pub flags: StatusFlags,
    /// How many bytes this holds for; above zero inside the node.
    pub bytes: u64,
    /// Where they lie; meaningful with [`StatusFlags::PLACE`].
    pub place: Place,
}

/// Where bytes lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// In the child of that index; `None`: in the node's own file.
    pub child: Option<usize>,
    /// In bytes.
    pub offset: u64,
}

impl Status {
    /// A range without a place.
    pub fn new(flags: StatusFlags, bytes: u64) -> Self {
        Self {
            flags,
            bytes,
            place: Place::default(),
        }
    }
}

/// What a user may want to know of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriverInfo {
    /// Unit of allocation; 0 if there is none.
    pub cluster_bytes: u64,
    /// The image was not closed in order.
    pub is_dirty: bool,
    /// Writes must be compressed.
    pub needs_compressed_writes: bool,
    /// Properties of the format, by name, as text.
    pub specific: Vec<(&'static str, String)>,
}
