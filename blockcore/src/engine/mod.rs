//! Engines: where a worker's leaf I/O is done, its kicks are heard and its time comes from.
//!
//! One trait, three implementations: `uring` (one io_uring is the worker's only wait point),
//! `threads` (where io_uring is forbidden: epoll and a pool) and `sim` (seeded and deterministic).
//! Everything a leaf asks of its host goes through here, so a driver runs unchanged on each.
//!
//! Two kinds of request: an [`Op`] moves or settles bytes of an attached file, is bounded and
//! allocates nothing; a [`HostCall`] (open, stat, lock …) is rare and may block, so the real engines
//! give it to a pool.
//!
//! Threads: an engine belongs to one worker and is `!Send`. The files it works on are shared.
//!
//! Invariant: from [`Engine::start`] until the completion is handed out, the engine owns the
//! operation's segments and keeps its file open. Dropping whatever waits for it is always safe.

mod clock;
mod host;
mod inline;
mod pool;
mod segment;
pub mod sim;
mod socket;
pub mod threads;
pub mod uring;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
pub use rustix::io::Errno;

pub use self::segment::Segment;
pub use self::socket::Socket;
use crate::io::buffer::Segments;
use crate::mailbox::Sleeper;

/// A worker's engine. See the module's header for what stays true.
pub trait Engine {
    /// Makes `file` usable in [`Op`]s on this engine. Attachments nest.
    fn attach(&self, file: &Arc<OpenFile>);

    /// Ends one attachment. The file stays open until the operations on it have completed.
    fn detach(&self, file: FileId);

    /// Starts an operation; `notify` says where its completion goes. Operations may complete in any
    /// order. Never blocks and never fails: an error is a completion.
    fn start(&self, op: Op, notify: Notify);

    /// Does a rare host call, possibly on another thread.
    ///
    /// # Cancellation
    ///
    /// A call whose future is dropped still runs to its end.
    fn host(&self, call: HostCall) -> LocalBoxFuture<'static, Result<HostReply, Errno>>;

    /// Does work that takes the processor for a while, on another thread. Never waits. Work runs to its
    /// end, and as much at once as there are processors. It must depend on nothing but what it was given,
    /// so that a simulation replays.
    fn offload(&self, work: Work);

    /// Reports [`Event::Ready`] whenever `fd` becomes readable (again). The descriptor's contents
    /// are never read here, so it may be a blocking one.
    fn watch(&self, fd: Arc<OwnedFd>) -> WatchId;

    /// Ends a watch. An event of it that is on its way may still be reported.
    fn unwatch(&self, watch: WatchId);

    /// Completes `waiter`, once, when `fd` can be read from or written to without waiting, or its other
    /// end is gone. It stays open until then. An engine that has no sockets says so (`ENOSYS`), which is
    /// the default.
    fn ready(&self, fd: &Arc<OwnedFd>, interest: Interest, waiter: &Rc<Waiter>) -> ReadyId {
        let _ = (fd, interest);
        waiter.complete(Err(Errno::NOSYS), Segments::default());
        ReadyId(u64::MAX)
    }

    /// Nobody waits for this any more, or it has completed.
    fn forget_ready(&self, ready: ReadyId) {
        let _ = ready;
    }

    /// Hands queued operations to the host and adds what has completed to `events`. Never sleeps.
    fn poll(&self, events: &mut Vec<Event>);

    /// As [`poll`](Self::poll), and sleeps until there is something, `timeout` is over (if given) or
    /// the engine's [`Sleeper`] is woken. Call only after [`Sleeper::falling_asleep`]; the return from
    /// the sleep is [`Sleeper::awake`].
    fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>);

    /// Whether operations are under way.
    fn in_flight(&self) -> usize;

    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;

    /// How often the host has taken the core away from this worker's thread for another's sake.
    fn preemptions(&self) -> u64 {
        0
    }

    /// What wakes this engine from [`wait`](Self::wait).
    fn sleeper(&self) -> &Arc<Sleeper>;

    /// Whether a task that stands at a [preemption point](preempt) should let others run. Only a
    /// simulated engine ever says so.
    fn preempts(&self) -> bool {
        false
    }

    /// The name by which an operator chooses this engine.
    fn name(&self) -> &'static str;
}

/// Something for [`Engine::offload`] to do.
pub type Work = Box<dyn FnOnce() + Send>;

/// A file known to this process: dense, unique while the file is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(u32);

impl FileId {
    /// For tables indexed by file. Small: identifiers are used again.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A file or device that the host has open for us, shared by all workers.
pub struct OpenFile {
    id: FileId,
    kind: FileKind,
    path: PathBuf,
    write_ways: inline::WriteWays,
    flush_lost: AtomicBool,
    syncs: AtomicU64,
}

/// Who has the file open.
#[derive(Debug)]
pub(crate) enum FileKind {
    /// The operating system.
    Host(OwnedFd),
    /// A simulation.
    Simulated(sim::Token),
}

impl OpenFile {
    pub(crate) fn new(kind: FileKind, path: PathBuf) -> Arc<Self> {
        let buffered = match &kind {
            FileKind::Host(fd) => rustix::fs::fcntl_getfl(fd)
                .is_ok_and(|flags| !flags.contains(rustix::fs::OFlags::DIRECT)),
            FileKind::Simulated(_) => false,
        };
        Arc::new(Self {
            id: file_ids::next(),
            write_ways: inline::WriteWays::new(buffered),
            kind,
            path,
            flush_lost: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
        })
    }

    /// A file that was opened elsewhere, for example handed over by a service manager.
    pub fn from_fd(fd: OwnedFd, path: PathBuf) -> Arc<Self> {
        Self::new(FileKind::Host(fd), path)
    }

    /// The name for [`Op`]s.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// The path it was opened by, for messages.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            FileKind::Host(fd) => Some(fd.as_fd()),
            FileKind::Simulated(_) => None,
        }
    }

    /// Whether a flush of this description has failed: Linux may have marked pages clean that never
    /// reached the disk, so no later flush can be believed.
    pub fn flush_lost(&self) -> bool {
        self.flush_lost.load(Ordering::Acquire)
    }

    /// Records that a flush failed.
    pub fn set_flush_lost(&self) {
        self.flush_lost.store(true, Ordering::Release);
    }

    /// How many syncs engines have started on this file.
    pub fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    pub(crate) fn count_sync(&self) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        file_ids::release(self.id);
    }
}

impl fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.path.display(), self.id)
    }
}

/// Dense identifiers, so that engines can keep their files in a plain table.
mod file_ids {
    use super::FileId;
    use std::sync::Mutex;

    static FREE: Mutex<(Vec<u32>, u32)> = Mutex::new((Vec::new(), 0));

    pub(super) fn next() -> FileId {
        let mut ids = FREE.lock().expect("no panic while counting");
        let id = ids.0.pop().unwrap_or_else(|| {
            ids.1 += 1;
            ids.1 - 1
        });
        FileId(id)
    }

    pub(super) fn release(id: FileId) {
        FREE.lock().expect("no panic while counting").0.push(id.0);
    }
}

/// An operation on the bytes of an attached file.
#[derive(Debug)]
pub enum Op {
    /// Read as many bytes as the segments have. May complete short; zero is the end of the file.
    Read {
        /// From which file.
        file: FileId,
        /// In bytes.
        offset: u64,
        /// Where to.
        segments: Segments,
    },
    /// Write all bytes of the segments. May complete short.
    Write {
        /// To which file.
        file: FileId,
        /// In bytes.
        offset: u64,
        /// Where from.
        segments: Segments,
    },
    /// Make all completed writes durable, with the metadata needed to read them (`fdatasync`).
    Sync {
        /// Which file.
        file: FileId,
    },
    /// Change how a range is allocated.
    Allocate {
        /// Of which file.
        file: FileId,
        /// In bytes.
        offset: u64,
        /// In bytes, above zero.
        bytes: u64,
        /// In which way.
        mode: Allocate,
    },
}

/// What to do to the allocation of a range. None of these changes the length of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Deallocate; the range then reads as zeroes.
    PunchHole,
    /// Make the range read as zeroes and keep space for it.
    ZeroRange,
    /// Reserve space; what the range reads does not change.
    Reserve,
}

/// Where a completion goes.
pub enum Notify {
    /// Out of [`Engine::poll`], under a token of the caller's: the path without a task.
    Token(u64),
    /// To whoever waits for this [`OpFuture`].
    Waiter(Rc<Waiter>),
}

/// The outcome of an [`Op`]: bytes moved (zero for those that move none) or the host's error.
pub type OpResult = Result<u64, Errno>;

/// What [`Engine::poll`] found.
#[derive(Debug)]
pub enum Event {
    /// An operation started with [`Notify::Token`] is over.
    Done {
        /// The caller's token.
        token: u64,
        /// How it ended.
        result: OpResult,
        /// The operation's segments, given back.
        segments: Segments,
    },
    /// A watched descriptor is readable.
    Ready(WatchId),
}

/// A watch on a descriptor; unique in its engine for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WatchId(pub(crate) u64);

/// What is waited for at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// There is something to receive, or its end.
    Receive,
    /// There is room to send.
    Send,
}

/// Names what [`Engine::ready`] waits for, until it has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReadyId(pub(crate) u64);

/// Where a completion waits for its task.
#[derive(Default)]
pub struct Waiter {
    done: Cell<Option<OpResult>>,
    segments: RefCell<Segments>,
    waker: Cell<Option<Waker>>,
}

impl Waiter {
    pub(crate) fn complete(&self, result: OpResult, segments: Segments) {
        self.segments.replace(segments);
        self.done.set(Some(result));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Notify {
    /// Delivers a completion: every engine's last step.
    pub(crate) fn deliver(self, result: OpResult, segments: Segments, events: &mut Vec<Event>) {
        match self {
            Self::Token(token) => events.push(Event::Done {
                token,
                result,
                segments,
            }),
            Self::Waiter(waiter) => waiter.complete(result, segments),
        }
    }
}

/// An operation that a task waits for.
///
/// # Cancellation
///
/// The operation goes on, and the engine keeps its segments until it is over.
pub struct OpFuture(Rc<Waiter>);

impl OpFuture {
    /// Starts `op` on `engine`.
    pub fn start(engine: &dyn Engine, op: Op) -> Self {
        let waiter = Rc::new(Waiter::default());
        engine.start(op, Notify::Waiter(Rc::clone(&waiter)));
        Self(waiter)
    }
}

impl Future for OpFuture {
    type Output = (OpResult, Segments);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(result) = self.0.done.take() else {
            self.0.waker.set(Some(cx.waker().clone()));
            return Poll::Pending;
        };
        Poll::Ready((result, self.0.segments.take()))
    }
}

/// A socket that a task waits for.
///
/// # Cancellation
///
/// The engine is told to forget it.
pub(crate) struct ReadyFuture<'a> {
    engine: &'a dyn Engine,
    id: ReadyId,
    waiter: Rc<Waiter>,
}

impl<'a> ReadyFuture<'a> {
    pub(crate) fn start(engine: &'a dyn Engine, fd: &Arc<OwnedFd>, interest: Interest) -> Self {
        let waiter = Rc::new(Waiter::default());
        let id = engine.ready(fd, interest, &waiter);
        Self { engine, id, waiter }
    }
}

impl Future for ReadyFuture<'_> {
    type Output = Result<(), Errno>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(result) = self.waiter.done.get() else {
            self.waiter.waker.set(Some(cx.waker().clone()));
            return Poll::Pending;
        };
        Poll::Ready(result.map(drop))
    }
}

impl Drop for ReadyFuture<'_> {
    fn drop(&mut self) {
        if self.waiter.done.get().is_none() {
            self.engine.forget_ready(self.id);
        }
    }
}

/// A preemption point: a place between two steps of a task where, in a simulation, others may run
/// first. Elsewhere it is ready at once.
pub async fn preempt(engine: &dyn Engine) {
    if !engine.preempts() {
        return;
    }
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// How a file is to be opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// For writing as well as reading.
    pub write: bool,
    /// Past the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Make the file, and fail if it is there already.
    pub create: bool,
}

/// A rare request to the host.
#[derive(Debug)]
pub enum HostCall {
    /// Open a file or device. Answered by [`HostReply::File`].
    Open(PathBuf, OpenOptions),
    /// What the file is. Answered by [`HostReply::Metadata`].
    Metadata(Arc<OpenFile>),
    /// Set the length in bytes. New space reads as zeroes.
    Truncate(Arc<OpenFile>, u64),
    /// Take a shared lock on one byte of the file, owned by its open file description. `EAGAIN` if
    /// somebody holds it exclusively.
    LockShared(Arc<OpenFile>, u64),
    /// As [`LockShared`](Self::LockShared), but nobody else may hold any lock on the byte. The file must
    /// be open for writing.
    LockExclusive(Arc<OpenFile>, u64),
    /// Let go of the lock on one byte.
    Unlock(Arc<OpenFile>, u64),
    /// Would an exclusive lock on this byte be granted? `EAGAIN` if another description holds it.
    TestLock(Arc<OpenFile>, u64),
    /// Deallocate a range of a block device (`BLKDISCARD`).
    DeviceDiscard(Arc<OpenFile>, u64, u64),
    /// Zero a range of a block device (`BLKZEROOUT`).
    DeviceZero(Arc<OpenFile>, u64, u64),
    /// Reserve space from an offset on, extending the file (`fallocate` with mode 0).
    Reserve(Arc<OpenFile>, u64, u64),
    /// Let go of what the page cache has of the file and need not be written back (`posix_fadvise`).
    DropCache(Arc<OpenFile>),
    /// Ask a copy-on-write file system to write this (empty) file in place (`FS_NOCOW_FL`).
    SetNocow(Arc<OpenFile>),
    /// Map shared memory that outlives this process: a file of so many bytes, a multiple of 8, made of
    /// zeroes if it is not there. Answered by [`HostReply::Segment`]; [`Segment::OTHER_LENGTH`] for one
    /// that is there and has another length. [`Remove`](Self::Remove) ends it.
    OpenSegment {
        /// On a tmpfs, as a rule. Its directory is made, for this user alone, if only that is missing.
        path: PathBuf,
        /// How long it is.
        bytes: u64,
    },
    /// Ask the file system to allocate in units of so many bytes.
    SetExtentSizeHint(Arc<OpenFile>, u32),
    /// The path without links, `.` and `..`. Answered by [`HostReply::Path`].
    Canonical(PathBuf),
    /// Remove a file.
    Remove(PathBuf),
    /// Give the file with the first path the second, in place of what has it, at once for everybody who
    /// looks. Durable only after [`SyncDirectory`](Self::SyncDirectory).
    Rename(PathBuf, PathBuf),
    /// Make a directory's entries durable.
    SyncDirectory(PathBuf),
    /// The next range that has data at or after an offset (`SEEK_DATA`, `SEEK_HOLE`). Answered by
    /// [`HostReply::Extent`].
    DataExtent(Arc<OpenFile>, u64),
    /// The numbers of a host with this name, with this port; none if nobody knows it. Answered by
    /// [`HostReply::Addresses`].
    Resolve(String, u16),
    /// Copy a range from one file to another, or within one (`copy_file_range`): the file system may
    /// share blocks. May copy less, but something. Answered by [`HostReply::Copied`].
    CopyRange {
        /// From which file.
        from: Arc<OpenFile>,
        /// Where in it, in bytes.
        offset: u64,
        /// To which file.
        to: Arc<OpenFile>,
        /// Where in it, in bytes.
        to_offset: u64,
        /// How much.
        bytes: u64,
    },
}

/// The answer to a [`HostCall`].
#[derive(Debug)]
pub enum HostReply {
    /// Done; nothing to tell.
    Done,
    /// The file, opened.
    File(Arc<OpenFile>),
    /// What the file is.
    Metadata(Box<Metadata>),
    /// Where data begins and ends; `None` if only holes follow.
    Extent(Option<(u64, u64)>),
    /// A path.
    Path(PathBuf),
    /// How many bytes were copied; zero at the end of the source.
    Copied(u64),
    /// Where a host is.
    Addresses(Vec<SocketAddr>),
    /// Shared memory.
    Segment {
        /// The memory.
        segment: Arc<Segment>,
        /// It was there: an earlier life, or somebody else, has left it.
        existed: bool,
    },
}

/// What kind of thing a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// A character device, directory, socket …
    Other(&'static str),
}

/// What the host says of a file.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// What it is.
    pub file_type: FileType,
    /// Its length; of a device, its size.
    pub bytes: u64,
    /// What it occupies on the host.
    pub allocated_bytes: u64,
    /// Which device it is on; with `inode`, which file it is.
    pub device: u64,
    /// See `device`.
    pub inode: u64,
    /// Smallest unit of direct I/O: offset and length must be multiples. 1 if opened without
    /// `direct`.
    pub direct_alignment: u32,
    /// What memory for direct I/O must be aligned to. 1 if opened without `direct`.
    pub memory_alignment: u32,
    /// Logical block size of a device; 512 for files.
    pub logical_block_bytes: u32,
    /// Physical block size of a device; the file system's block size for files.
    pub physical_block_bytes: u32,
    /// Preferred unit of large transfers, 0 if the host has none.
    pub optimal_io_bytes: u32,
    /// Granularity of a device's discard, 0 if unknown.
    pub discard_granularity_bytes: u32,
    /// Whether a device says that it is read-only.
    pub read_only: bool,
}

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the host allows it, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Threads and epoll.
    Threads,
}

/// Makes an engine for the calling thread.
///
/// # Errors
///
/// The host's refusal, if the engine that was asked for cannot be had.
pub fn make(choice: EngineChoice) -> Result<Rc<dyn Engine>, crate::Error> {
    let uring = match choice {
        EngineChoice::Threads => None,
        EngineChoice::Auto => uring::Uring::new().ok(),
        EngineChoice::Uring => Some(uring::Uring::new().map_err(|errno| {
            crate::Error::host(
                "cannot set up io_uring on this host (engine 'threads' works without it)",
                errno,
            )
        })?),
    };
    if let Some(uring) = uring {
        return Ok(Rc::new(uring));
    }
    let threads = threads::Threads::new()
        .map_err(|errno| crate::Error::host("cannot set up epoll", errno))?;
    Ok(Rc::new(threads))
}

/// The number of the next watch, in any engine of this process.
pub(crate) fn next_watch() -> WatchId {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    WatchId(u64::from(NEXT.fetch_add(1, Ordering::Relaxed)))
}

#[cfg(test)]
mod tests;
