//! The I/O API: moves data through a plan; any worker.
//!
//! A [`Plan`] is what a root's requests need of the graph, compiled when the graph changes: the nodes
//! below the root with their limits and modes. Each worker that serves the root holds it in a
//! [`Root`] of its own. Requests enter there, by one of two ways:
//!
//! * [`Root::start_read`] and [`Root::start_write`] ask every layer *where* the bytes live and start
//!   one operation on the leaf. They allocate nothing and lock nothing; when a layer cannot answer at
//!   once they give the request back.
//! * [`Root::read`] and its kin are tasks: always there, always correct. Each layer's checks,
//!   alignment, splitting and fall-backs are in [`Io`], around its driver.
//!
//! Threads: a [`Root`] and everything below it stays on its worker; the plan and its drivers' I/O
//! halves are shared and change nothing but atomics.
//!
//! Not here: which nodes there are and who may use them (`graph`), and how long requests may be held
//! back (`drain`).

pub mod account;
pub mod align;
pub mod buffer;
mod context;
pub mod tracked;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use self::buffer::Segments;
use self::context::BounceRoom;
pub use self::context::IoContext;
use self::tracked::Tracker;
use crate::IoError;
use crate::driver::{DriverIo, Limits, Mapping, WriteFlags, ZeroFlags};
use crate::engine::{FileId, Notify, Op};

/// Bounce buffers and zero buffers are at most this large; longer requests are cut.
const BOUNCE_BYTES: u64 = 1 << 20;

/// A future of an I/O function.
pub type IoFuture<'a, T = ()> = LocalBoxFuture<'a, Result<T, IoError>>;

/// What one root's requests need of the graph; immutable, shared by the workers that serve it.
pub struct Plan {
    /// The root first; every child after its parent.
    pub(crate) nodes: Vec<PlanNode>,
    fast: Fast,
}

/// One node of a plan.
pub struct PlanNode {
    pub(crate) name: Arc<str>,
    pub(crate) io: Arc<dyn DriverIo>,
    pub(crate) limits: Limits,
    pub(crate) modes: Modes,
    pub(crate) children: Vec<usize>,
    /// Shared by all plans that reach this node; there when a write may have to be widened.
    pub(crate) tracker: Option<Arc<Tracker>>,
}

/// How a node was opened, as far as its requests are concerned.
#[derive(Clone, Copy, Debug, Default)]
pub struct Modes {
    /// Writes are refused.
    pub read_only: bool,
    /// Discards reach the driver; otherwise they do nothing.
    pub unmap: bool,
    /// Flushes stop here: the data may not survive the host.
    pub no_flush: bool,
}

/// What decides whether the path without a task can take a request.
struct Fast {
    /// Offset and length must be multiples, for every layer.
    alignment: u64,
    /// Memory must be aligned so, for every layer.
    memory_alignment: usize,
    /// No layer has to see each write.
    untracked: bool,
}

impl Plan {
    pub(crate) fn new(nodes: Vec<PlanNode>) -> Arc<Self> {
        let all = |value: fn(&Limits) -> u32| {
            let values = nodes.iter().map(|node| value(&node.limits));
            values.max().unwrap_or(1)
        };
        let fast = Fast {
            alignment: u64::from(all(|limits| limits.request_alignment)),
            memory_alignment: all(|limits| limits.memory_alignment) as usize,
            untracked: nodes.iter().all(|node| node.tracker.is_none()),
        };
        Arc::new(Self { nodes, fast })
    }

    /// The length of the root in bytes, now.
    pub fn bytes(&self) -> u64 {
        self.nodes[0].io.bytes()
    }

    /// The root's limits.
    pub fn limits(&self) -> &Limits {
        &self.nodes[0].limits
    }

    /// How the root was opened.
    pub fn modes(&self) -> Modes {
        self.nodes[0].modes
    }

    /// Whether requests go past the host's page cache, so that the disk works beside the worker.
    pub fn is_direct(&self) -> bool {
        self.fast.alignment > 1
    }

    /// How many syncs engines have started on the files below.
    pub fn host_syncs(&self) -> u64 {
        let files = self.nodes.iter().flat_map(|node| node.io.files());
        files.map(|file| file.syncs()).sum()
    }

    /// Where the bytes of a request live, if every layer knows at once.
    fn map(&self, write: bool, mut offset: u64, bytes: u64) -> Option<(FileId, u64)> {
        let mut node = &self.nodes[0];
        loop {
            match node.io.map(write, offset, bytes) {
                Mapping::Child { index, offset: to } => {
                    node = &self.nodes[*node.children.get(index)?];
                    offset = to;
                }
                Mapping::File { file, offset } => return Some((file, offset)),
                Mapping::Ask => return None,
            }
        }
    }
}

/// A plan on one worker: where requests enter.
pub struct Root {
    context: Rc<IoContext>,
    plan: Arc<Plan>,
    fast_path: Cell<bool>,
}

impl Root {
    /// Makes `plan` usable on the worker of `context`.
    pub fn new(context: Rc<IoContext>, plan: Arc<Plan>) -> Rc<Self> {
        for node in &plan.nodes {
            for file in node.io.files() {
                context.engine().attach(file);
            }
        }
        Rc::new(Self {
            context,
            plan,
            fast_path: Cell::new(true),
        })
    }

    /// The worker's context.
    pub fn context(&self) -> &IoContext {
        &self.context
    }

    /// The plan.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Sends every request the slow way: a test of that way.
    pub fn disable_fast_path(&self) {
        self.fast_path.set(false);
    }

    /// Starts a read as one operation, completed in [`crate::engine::Engine::poll`] under `token`
    /// with the host's result, which may be short.
    ///
    /// # Errors
    ///
    /// Gives the segments back if the request needs [`read`](Self::read).
    pub fn start_read(&self, offset: u64, into: Segments, token: u64) -> Result<(), Segments> {
        let Some((file, offset)) = self.fast(false, offset, &into) else {
            return Err(into);
        };
        let op = Op::Read {
            file,
            offset,
            segments: into,
        };
        self.context.engine().start(op, Notify::Token(token));
        Ok(())
    }

    /// As [`start_read`](Self::start_read), for a write that need not be stable when it completes.
    ///
    /// # Errors
    ///
    /// Gives the segments back if the request needs [`write`](Self::write).
    pub fn start_write(&self, offset: u64, from: Segments, token: u64) -> Result<(), Segments> {
        if self.plan.modes().read_only || !self.plan.fast.untracked {
            return Err(from);
        }
        let Some((file, offset)) = self.fast(true, offset, &from) else {
            return Err(from);
        };
        let op = Op::Write {
            file,
            offset,
            segments: from,
        };
        self.context.engine().start(op, Notify::Token(token));
        Ok(())
    }

    fn fast(&self, write: bool, offset: u64, segments: &Segments) -> Option<(FileId, u64)> {
        let fast = &self.plan.fast;
        let bytes = segments.bytes();
        let fits = offset <= self.plan.bytes() && bytes <= self.plan.bytes() - offset;
        let aligned = align::is_aligned(offset, bytes, fast.alignment)
            && (fast.memory_alignment == 1 || segments.is_aligned(fast.memory_alignment));
        if !self.fast_path.get() || !fits || !aligned || bytes == 0 {
            return None;
        }
        let (file, offset) = self.plan.map(write, offset, bytes)?;
        // A layer may have shifted the range off the alignment of those below.
        (offset & (fast.alignment - 1) == 0).then_some((file, offset))
    }

    /// Reads `into.bytes()` bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`IoError::OutOfRange`] past the end; else what the host said. The segments may then hold
    /// anything.
    pub async fn read(self: &Rc<Self>, offset: u64, into: Segments) -> Result<(), IoError> {
        self.io().read(offset, into).await
    }

    /// Writes `from.bytes()` bytes at `offset`. With [`WriteFlags::STABLE`] it is durable when it
    /// completes; the leaf lets one sync serve all such writes that wait.
    ///
    /// # Errors
    ///
    /// [`IoError::ReadOnly`], [`IoError::OutOfRange`]; else what the host said, and the range then
    /// holds old data, new data or a mixture.
    pub async fn write(
        self: &Rc<Self>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        self.io().write(offset, from).await?;
        self.stabilise(flags).await
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub async fn write_zeroes(
        self: &Rc<Self>,
        offset: u64,
        bytes: u64,
        zero: ZeroFlags,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        self.io().write_zeroes(offset, bytes, zero).await?;
        self.stabilise(flags).await
    }

    /// Tells the host that a range's contents are of no interest. What it reads afterwards is up to
    /// the host.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write); a host that cannot discard is no error.
    pub async fn discard(
        self: &Rc<Self>,
        offset: u64,
        bytes: u64,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        self.io().discard(offset, bytes).await?;
        self.stabilise(flags).await
    }

    /// Makes everything durable that completed before the call.
    ///
    /// # Errors
    ///
    /// [`IoError::FlushLost`] from the first failure on.
    pub async fn flush(self: &Rc<Self>) -> Result<(), IoError> {
        self.io().flush().await
    }

    async fn stabilise(self: &Rc<Self>, flags: WriteFlags) -> Result<(), IoError> {
        if flags.contains(WriteFlags::STABLE) {
            return self.flush().await;
        }
        Ok(())
    }

    fn io(self: &Rc<Self>) -> Io<'_> {
        Io {
            root: self,
            index: 0,
        }
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for node in &self.plan.nodes {
            for file in node.io.files() {
                self.context.engine().detach(file.id());
            }
        }
    }
}

/// One node of a plan on one worker, with the pipeline around its driver: what a driver calls its
/// children through.
#[derive(Clone, Copy)]
pub struct Io<'a> {
    root: &'a Rc<Root>,
    index: usize,
}

impl<'a> Io<'a> {
    fn node(self) -> &'a PlanNode {
        &self.root.plan.nodes[self.index]
    }

    /// The worker's context.
    pub fn context(self) -> &'a IoContext {
        &self.root.context
    }

    /// How this node was opened.
    pub fn modes(self) -> Modes {
        self.node().modes
    }

    /// This node's limits.
    pub fn limits(self) -> &'a Limits {
        &self.node().limits
    }

    /// This node's name, for messages.
    pub fn name(self) -> &'a str {
        &self.node().name
    }

    /// The child at `index`, in the order in which the driver's type lists them.
    pub fn child(self, index: usize) -> Io<'a> {
        Io {
            root: self.root,
            index: self.node().children[index],
        }
    }

    /// The length in bytes, now.
    pub fn bytes(self) -> u64 {
        self.node().io.bytes()
    }

    fn check(self, offset: u64, bytes: u64) -> Result<(), IoError> {
        let length = self.bytes();
        if offset > length || bytes > length - offset {
            return Err(IoError::OutOfRange);
        }
        Ok(())
    }

    fn check_write(self, offset: u64, bytes: u64) -> Result<(), IoError> {
        if self.modes().read_only {
            return Err(IoError::ReadOnly);
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

    fn bounce(self, bytes: u64) -> Segments {
        // At least what a buffer's own allocation would have, and what the kernel likes.
        let alignment = (self.limits().memory_alignment as usize).max(512);
        Segments::allocate(bytes as usize, alignment)
    }

    /// Reads, widening and bouncing where the node demands it.
    pub async fn read(self, offset: u64, into: Segments) -> Result<(), IoError> {
        let bytes = into.bytes();
        self.check(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let node = self.node();
        let unit = u64::from(node.limits.request_alignment);
        let memory = node.limits.memory_alignment as usize;
        if align::is_aligned(offset, bytes, unit) && into.is_aligned(memory) {
            return node.io.read(self, offset, into).await;
        }
        for (piece, piece_bytes) in align::pieces(offset, bytes, BOUNCE_BYTES) {
            let begin = align::down(piece, unit);
            let end = align::up(piece + piece_bytes, unit);
            let _room = self.bounce_room(end - begin).await;
            let bounce = self.bounce(end - begin);
            node.io.read(self, begin, bounce.clone()).await?;
            into.slice(piece - offset, piece_bytes)
                .copy_from_segments(&bounce.slice(piece - begin, piece_bytes));
        }
        Ok(())
    }

    /// Writes, widening (read, change, write back) and bouncing where the node demands it.
    pub async fn write(self, offset: u64, from: Segments) -> Result<(), IoError> {
        let bytes = from.bytes();
        self.check_write(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let node = self.node();
        let unit = u64::from(node.limits.request_alignment);
        let memory = node.limits.memory_alignment as usize;
        let whole = align::is_aligned(offset, bytes, unit);
        let _turn = self.track(offset, bytes, !whole).await;
        if whole && from.is_aligned(memory) {
            return node.io.write(self, offset, from).await;
        }
        for (piece, piece_bytes) in align::pieces(offset, bytes, BOUNCE_BYTES) {
            let begin = align::down(piece, unit);
            let end = align::up(piece + piece_bytes, unit);
            let _room = self.bounce_room(end - begin).await;
            let bounce = self.bounce(end - begin);
            self.read_edges(&bounce, begin, (piece - begin, piece_bytes))
                .await?;
            bounce
                .slice(piece - begin, piece_bytes)
                .copy_from_segments(&from.slice(piece - offset, piece_bytes));
            node.io.write(self, begin, bounce).await?;
        }
        Ok(())
    }

    /// Fills the units of `bounce` (which begins at `begin`) that the changed part, given by its
    /// place in the bounce buffer, covers only partly.
    async fn read_edges(
        self,
        bounce: &Segments,
        begin: u64,
        (change, change_bytes): (u64, u64),
    ) -> Result<(), IoError> {
        let node = self.node();
        let unit = u64::from(node.limits.request_alignment);
        let tail = align::down(change + change_bytes, unit);
        if change > 0 {
            node.io.read(self, begin, bounce.slice(0, unit)).await?;
        }
        let tail_is_partial = tail < bounce.bytes();
        let read_already = change > 0 && tail == 0;
        if tail_is_partial && !read_already {
            let edge = bounce.slice(tail, unit);
            node.io.read(self, begin + tail, edge).await?;
        }
        Ok(())
    }

    async fn track(
        self,
        offset: u64,
        bytes: u64,
        serialising: bool,
    ) -> Option<tracked::Tracked<'a>> {
        let node = self.node();
        let unit = u64::from(node.limits.request_alignment);
        let tracker = node.tracker.as_deref()?;
        let (begin, end) = (align::down(offset, unit), align::up(offset + bytes, unit));
        Some(tracker.begin(begin, end, serialising).await)
    }

    /// Makes a range read as zeroes: by the driver where it can, else by writing zeroes.
    pub async fn write_zeroes(
        self,
        offset: u64,
        bytes: u64,
        mut flags: ZeroFlags,
    ) -> Result<(), IoError> {
        self.check_write(offset, bytes)?;
        let node = self.node();
        if !node.modes.unmap {
            flags.remove(ZeroFlags::MAY_UNMAP);
        }
        let unit = u64::from(
            node.limits
                .zero_alignment
                .max(node.limits.request_alignment),
        );
        let begin = align::up(offset, unit);
        let end = align::down(offset + bytes, unit);
        if begin >= end {
            return self.write_zero_buffers(offset, bytes, flags).await;
        }
        self.write_zero_buffers(offset, begin - offset, flags)
            .await?;
        let limit = match node.limits.max_zero_bytes {
            0 => u64::MAX / 2,
            limit => limit,
        };
        for (piece, piece_bytes) in align::pieces(begin, end - begin, limit) {
            let turn = self.track(piece, piece_bytes, false).await;
            match node.io.write_zeroes(self, piece, piece_bytes, flags).await {
                Err(IoError::Unsupported) => {
                    drop(turn);
                    self.write_zero_buffers(piece, piece_bytes, flags).await?;
                }
                result => result?,
            }
        }
        self.write_zero_buffers(end, offset + bytes - end, flags)
            .await
    }

    async fn write_zero_buffers(
        self,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        if bytes == 0 {
            return Ok(());
        }
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(IoError::Unsupported);
        }
        let zeroes = self.bounce(bytes.min(BOUNCE_BYTES));
        for (piece, piece_bytes) in align::pieces(offset, bytes, BOUNCE_BYTES) {
            // Boxed: writes may widen, which would make this future as large as all of theirs.
            Box::pin(self.write(piece, zeroes.slice(0, piece_bytes))).await?;
        }
        Ok(())
    }

    /// Discards what lies in whole units of the driver; the rest, and hosts that cannot, are no error.
    pub async fn discard(self, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.check_write(offset, bytes)?;
        let node = self.node();
        if !node.modes.unmap {
            return Ok(());
        }
        let unit = u64::from(
            node.limits
                .discard_alignment
                .max(node.limits.request_alignment),
        );
        let begin = align::up(offset, unit);
        let end = align::down(offset + bytes, unit);
        if begin >= end {
            return Ok(());
        }
        let limit = match node.limits.max_discard_bytes {
            0 => u64::MAX / 2,
            limit => limit,
        };
        for (piece, piece_bytes) in align::pieces(begin, end - begin, limit) {
            let _turn = self.track(piece, piece_bytes, false).await;
            match node.io.discard(self, piece, piece_bytes).await {
                Err(IoError::Unsupported) => return Ok(()),
                result => result?,
            }
        }
        Ok(())
    }

    /// Makes everything durable that completed before the call, in this node and below.
    pub async fn flush(self) -> Result<(), IoError> {
        if self.modes().no_flush {
            return Ok(());
        }
        self.node().io.flush(self).await
    }

    /// Flushes every child, in order: what a driver without state of its own does.
    pub async fn flush_children(self) -> Result<(), IoError> {
        for index in 0..self.node().children.len() {
            // Boxed: the recursion through the drivers has no bound that the compiler could see.
            Box::pin(self.child(index).flush()).await?;
        }
        Ok(())
    }
}
