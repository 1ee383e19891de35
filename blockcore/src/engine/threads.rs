//! The engine for hosts that forbid io_uring: epoll to wait with, a pool of threads for the I/O.
//!
//! Reads that the page cache can answer are done in place; everything else goes to the pool, whose
//! threads post completions back to the worker.
//!
//! Threads: the engine belongs to its worker. Pool threads hold a file and the raw segments of the
//! operation, which stay in the engine's table until the completion has been taken.

#![expect(
    unsafe_code,
    reason = "lends an operation's segments to the pool thread that runs it"
)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::event::epoll;
use rustix::event::{EventfdFlags, Timespec, eventfd};

use super::{
    Engine, Errno, Event, FileId, HostCall, HostReply, Interest, Notify, Op, OpResult, OpenFile,
    ReadyId, Waiter, WatchId, Work, clock, host, pool,
};
use crate::io::buffer::{Segment, Segments};
use crate::mailbox::{Mailbox, Sleeper, Wake};

/// Epoll's name for the wake-up descriptor; watches count from zero.
const WAKE: u64 = u64::MAX;
/// Bit of the names of sockets that are waited for.
const READY: u64 = 1 << 63;
/// How many events one wait takes.
const EVENTS: usize = 64;

/// An eventfd that ends a wait.
pub(super) struct WakeFd(pub(super) Arc<OwnedFd>);

impl WakeFd {
    pub(super) fn new() -> Result<Self, Errno> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(fd)))
    }
}

impl Wake for WakeFd {
    fn wake(&self) {
        // A full counter means that a wake-up is pending already.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }
}

/// See the module's header.
pub struct Threads {
    epoll: OwnedFd,
    sleeper: Arc<Sleeper>,
    files: RefCell<Files>,
    slots: RefCell<Slots>,
    done: Arc<Mailbox<(usize, OpResult)>>,
    taken: RefCell<Vec<(usize, OpResult)>>,
    watches: RefCell<Vec<(WatchId, Arc<OwnedFd>)>>,
    /// Sockets that are waited for, by name: each under a descriptor of its own, as epoll has a descriptor
    /// once only.
    readies: RefCell<BTreeMap<u64, (OwnedFd, Rc<Waiter>)>>,
    next_ready: Cell<u64>,
    in_flight: Cell<usize>,
    ready: RefCell<Vec<Event>>,
}

/// Files attached to an engine, by identifier, with how often.
#[derive(Default)]
pub(super) struct Files(Vec<Option<(Arc<OpenFile>, usize)>>);

impl Files {
    /// Adds an attachment; returns whether it is the first of this file.
    pub(super) fn attach(&mut self, file: &Arc<OpenFile>) -> bool {
        let index = file.id().index();
        if self.0.len() <= index {
            self.0.resize_with(index + 1, || None);
        }
        match &mut self.0[index] {
            Some((_, count)) => {
                *count += 1;
                false
            }
            empty => {
                *empty = Some((Arc::clone(file), 1));
                true
            }
        }
    }

    /// Ends an attachment; returns the file if it was the last.
    pub(super) fn detach(&mut self, file: FileId) -> Option<Arc<OpenFile>> {
        let entry = self.0.get_mut(file.index())?;
        let (_, count) = entry.as_mut()?;
        *count -= 1;
        if *count > 0 {
            return None;
        }
        entry.take().map(|(file, _)| file)
    }

    pub(super) fn get(&self, file: FileId) -> Option<&Arc<OpenFile>> {
        self.0.get(file.index())?.as_ref().map(|(file, _)| file)
    }
}

#[derive(Default)]
struct Slots {
    list: Vec<Option<(Box<Segments>, Notify)>>,
    free: Vec<usize>,
}

impl Threads {
    /// An engine for the calling thread.
    ///
    /// # Errors
    ///
    /// The host's refusal to make an epoll or an eventfd.
    pub fn new() -> Result<Self, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = WakeFd::new()?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &*wake.0, epoll::EventData::new_u64(WAKE), flags)?;
        let sleeper = Sleeper::new(Box::new(wake));
        Ok(Self {
            epoll,
            done: Mailbox::new(Arc::clone(&sleeper)),
            sleeper,
            files: RefCell::default(),
            slots: RefCell::default(),
            taken: RefCell::default(),
            watches: RefCell::default(),
            readies: RefCell::default(),
            next_ready: Cell::new(READY),
            in_flight: Cell::new(0),
            ready: RefCell::default(),
        })
    }

    fn collect(&self, events: &mut Vec<Event>) {
        events.append(&mut self.ready.borrow_mut());
        let mut taken = self.taken.take();
        self.done.take(&mut taken);
        for (slot, result) in taken.drain(..) {
            let finished = {
                let mut slots = self.slots.borrow_mut();
                slots.free.push(slot);
                slots.list[slot].take()
            };
            let (segments, notify) = finished.expect("a completion for an operation under way");
            self.in_flight.set(self.in_flight.get() - 1);
            notify.deliver(result, *segments, events);
        }
        self.taken.replace(taken);
    }

    fn epoll_wait(&self, events: &mut Vec<Event>, timeout: Option<&Timespec>) {
        let mut list = Vec::with_capacity(EVENTS);
        let found = epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut list),
            timeout,
        );
        match found {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => panic!("epoll fails on descriptors of our own: {error}"),
        }
        for event in list {
            let name = event.data.u64();
            if name == WAKE {
                continue;
            }
            if name & READY == 0 {
                events.push(Event::Ready(WatchId(name)));
                continue;
            }
            // Closing the descriptor would do only if it had no copies.
            let entry = self.readies.borrow_mut().remove(&name);
            if let Some((fd, waiter)) = entry {
                let _ = epoll::delete(&self.epoll, fd.as_fd());
                waiter.complete(Ok(0), Segments::default());
            }
        }
    }
}

/// An operation as a pool thread sees it.
struct Job {
    file: Arc<OpenFile>,
    kind: Kind,
    offset: u64,
    segments: *const Segment,
    count: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
    Sync,
    Allocate { mode: i32, bytes: u64 },
}

// SAFETY: `segments` points into a boxed `Segments` in the engine's table, which nobody touches
// before this job has posted its completion, and whose memory may be used from any thread.
unsafe impl Send for Job {}

impl Job {
    fn run(&self) -> OpResult {
        let fd = self.file.fd().ok_or(Errno::BADF)?;
        // SAFETY: see `Send` above; the box stays in the table until the completion is taken.
        let segments = unsafe { std::slice::from_raw_parts(self.segments, self.count) };
        match self.kind {
            Kind::Read => host::read(fd, self.offset, segments),
            Kind::Write => host::write(fd, self.offset, segments),
            Kind::Sync => host::sync(fd),
            Kind::Allocate { mode, bytes } => host::fallocate(fd, mode, self.offset, bytes),
        }
    }
}

impl Engine for Threads {
    fn attach(&self, file: &Arc<OpenFile>) {
        self.files.borrow_mut().attach(file);
    }

    fn detach(&self, file: FileId) {
        self.files.borrow_mut().detach(file);
    }

    fn start(&self, op: Op, notify: Notify) {
        let (id, kind, offset, segments) = match op {
            Op::Read {
                file,
                offset,
                segments,
            } => (file, Kind::Read, offset, segments),
            Op::Write {
                file,
                offset,
                segments,
            } => (file, Kind::Write, offset, segments),
            Op::Sync { file } => (file, Kind::Sync, 0, Segments::default()),
            Op::Allocate {
                file,
                offset,
                bytes,
                mode,
            } => {
                let mode = host::allocate_mode(mode);
                (
                    file,
                    Kind::Allocate { mode, bytes },
                    offset,
                    Segments::default(),
                )
            }
        };
        let Some(file) = self.files.borrow().get(id).map(Arc::clone) else {
            let mut ready = self.ready.borrow_mut();
            return notify.deliver(Err(Errno::BADF), segments, &mut ready);
        };
        match kind {
            Kind::Read => {
                let fd = file.fd().expect("real engines have real files");
                if let Ok(bytes) = host::read_cached(fd, offset, segments.list()) {
                    let mut ready = self.ready.borrow_mut();
                    return notify.deliver(Ok(bytes), segments, &mut ready);
                }
            }
            Kind::Sync => file.count_sync(),
            Kind::Write | Kind::Allocate { .. } => {}
        }
        let segments = Box::new(segments);
        let job = Job {
            file,
            kind,
            offset,
            segments: segments.list().as_ptr(),
            count: segments.list().len(),
        };
        let slot = {
            let mut slots = self.slots.borrow_mut();
            let entry = Some((segments, notify));
            match slots.free.pop() {
                Some(slot) => {
                    slots.list[slot] = entry;
                    slot
                }
                None => {
                    slots.list.push(entry);
                    slots.list.len() - 1
                }
            }
        };
        self.in_flight.set(self.in_flight.get() + 1);
        let done = Arc::clone(&self.done);
        pool::run(Box::new(move || {
            let result = job.run();
            drop(job);
            done.post((slot, result));
        }));
    }

    fn host(&self, call: HostCall) -> LocalBoxFuture<'static, Result<HostReply, Errno>> {
        host_on_pool(call)
    }

    fn offload(&self, work: Work) {
        pool::compute(work);
    }

    fn watch(&self, fd: Arc<OwnedFd>) -> WatchId {
        let watch = super::next_watch();
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        // Regular files cannot be watched and are always readable: such a watch never fires.
        let added = epoll::add(
            &self.epoll,
            fd.as_fd(),
            epoll::EventData::new_u64(watch.0),
            flags,
        );
        if let Err(error) = added {
            tracing::warn!(%error, "cannot watch a descriptor");
        }
        self.watches.borrow_mut().push((watch, fd));
        watch
    }

    fn unwatch(&self, watch: WatchId) {
        let mut watches = self.watches.borrow_mut();
        if let Some(index) = watches.iter().position(|(id, _)| *id == watch) {
            let (_, fd) = watches.swap_remove(index);
            let _ = epoll::delete(&self.epoll, fd.as_fd());
        }
    }

    fn ready(&self, fd: &Arc<OwnedFd>, interest: Interest, waiter: &Rc<Waiter>) -> ReadyId {
        let name = self.next_ready.get();
        self.next_ready.set(name + 1);
        let flags = match interest {
            Interest::Receive => epoll::EventFlags::IN,
            Interest::Send => epoll::EventFlags::OUT,
        };
        let added = rustix::io::fcntl_dupfd_cloexec(&**fd, 0).and_then(|copy| {
            let data = epoll::EventData::new_u64(name);
            let flags = flags | epoll::EventFlags::ONESHOT;
            epoll::add(&self.epoll, copy.as_fd(), data, flags)?;
            Ok(copy)
        });
        match added {
            Ok(copy) => {
                let entry = (copy, Rc::clone(waiter));
                self.readies.borrow_mut().insert(name, entry);
            }
            Err(error) => waiter.complete(Err(error), Segments::default()),
        }
        ReadyId(name)
    }

    fn forget_ready(&self, ready: ReadyId) {
        if let Some((fd, _)) = self.readies.borrow_mut().remove(&ready.0) {
            let _ = epoll::delete(&self.epoll, fd.as_fd());
        }
    }

    fn poll(&self, events: &mut Vec<Event>) {
        self.collect(events);
        if !self.watches.borrow().is_empty() || !self.readies.borrow().is_empty() {
            self.epoll_wait(events, Some(&Timespec::default()));
        }
    }

    fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) {
        let nothing = self.ready.borrow().is_empty() && self.done.is_empty();
        let timeout = if nothing {
            timeout
        } else {
            Some(Duration::ZERO)
        };
        let timeout = timeout.map(|timeout| {
            Timespec::try_from(timeout).unwrap_or(Timespec {
                tv_sec: i64::from(i32::MAX),
                tv_nsec: 0,
            })
        });
        self.epoll_wait(events, timeout.as_ref());
        self.sleeper.awake();
        self.collect(events);
    }

    fn in_flight(&self) -> usize {
        self.in_flight.get() + self.ready.borrow().len()
    }

    fn now(&self) -> Duration {
        clock::now()
    }

    fn preemptions(&self) -> u64 {
        host::preemptions()
    }

    fn sleeper(&self) -> &Arc<Sleeper> {
        &self.sleeper
    }

    fn name(&self) -> &'static str {
        "threads"
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // The pool may still use the segments: wait for every operation, whoever asked.
        let mut events = Vec::new();
        while self.in_flight.get() > 0 {
            self.sleeper.falling_asleep();
            self.wait(&mut events, None);
        }
    }
}

/// A host call on the pool, for every real engine.
pub(super) fn host_on_pool(call: HostCall) -> LocalBoxFuture<'static, Result<HostReply, Errno>> {
    let (answer, reply) = futures_channel::oneshot::channel();
    pool::run(Box::new(move || {
        let _ = answer.send(host::call(call));
    }));
    async move { reply.await.unwrap_or(Err(Errno::CANCELED)) }.boxed_local()
}
