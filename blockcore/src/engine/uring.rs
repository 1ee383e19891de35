//! The io_uring engine: one ring per worker, which is also its only wait point.
//!
//! Operations are queued as they start and handed to the kernel in one call per turn of the worker's
//! loop; that call also runs the completions that the kernel has put off (`DEFER_TASKRUN`). Kicks
//! and wake-ups are multishot polls of their eventfds, which nobody ever reads: each write to an
//! eventfd is one event, so a wait costs no further system call.
//!
//! Threads: the worker that made it.
//!
//! Invariant: an operation's segments stay in its boxed slot from the moment its entry is queued
//! until its completion has been taken, and its file stays open as long. The ring is torn down only
//! when nothing is in flight.

#![expect(
    unsafe_code,
    reason = "queue entries carry pointers to segments that the slots own"
)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::inline::Guard;
use super::threads::{Files, WakeFd, host_on_pool};
use super::{
    Engine, Errno, Event, FileId, HostCall, HostReply, Interest, Notify, Op, OpResult, OpenFile,
    ReadyId, Waiter, WatchId, Work, clock, host, pool,
};
use crate::io::buffer::Segments;
use crate::mailbox::Sleeper;

/// Submission entries; more operations than this in one turn cost one more system call.
const ENTRIES: u32 = 256;
/// Completion entries; beyond them the kernel keeps completions until there is room.
const COMPLETIONS: u32 = 4096;
/// Files in the ring's own table; files beyond it are used by descriptor.
const FIXED_FILES: u32 = 1024;

/// Which kind of entry a completion belongs to, in the top byte of its user data.
const TAG_SHIFT: u32 = 56;
const TAG_OP: u64 = 0;
const TAG_WATCH: u64 = 1;
const TAG_WAKE: u64 = 2;
const TAG_IGNORE: u64 = 3;
const TAG_READY: u64 = 4;
const DATA_MASK: u64 = (1 << TAG_SHIFT) - 1;

/// See the module's header.
pub struct Uring {
    ring: RefCell<IoUring>,
    slots: RefCell<Slots>,
    files: RefCell<Files>,
    /// Operations under way, by file.
    busy: RefCell<Vec<u32>>,
    /// Files whose last attachment ended while they were busy: open, and locked, until they are not.
    closing: RefCell<Vec<Arc<OpenFile>>>,
    watches: RefCell<BTreeMap<WatchId, Arc<OwnedFd>>>,
    /// Sockets that are waited for, each open until its entry has completed.
    readies: RefCell<Readies>,
    wake: Arc<OwnedFd>,
    sleeper: Arc<Sleeper>,
    in_flight: Cell<usize>,
    fixed_files: bool,
    queued: Cell<bool>,
    /// Completions of operations that never reached the ring.
    early: RefCell<Vec<Event>>,
    inline: Guard,
}

#[derive(Default)]
struct Slots {
    // Boxed: the kernel reads the segment lists when the entries are submitted, after this table
    // may have grown.
    #[expect(clippy::vec_box, reason = "slots must not move")]
    list: Vec<Box<Slot>>,
    free: Vec<usize>,
}

/// A socket, and who waits for it, unless that is forgotten.
type Waited = (Arc<OwnedFd>, Option<Rc<Waiter>>);

#[derive(Default)]
struct Readies {
    list: Vec<Option<Waited>>,
    free: Vec<usize>,
}

#[derive(Default)]
struct Slot {
    file: usize,
    segments: Segments,
    notify: Option<Notify>,
}

impl Uring {
    /// An engine for the calling thread.
    ///
    /// # Errors
    ///
    /// The host's refusal: io_uring is absent, forbidden, or older than Linux 5.19 (no
    /// cooperative completions) or 5.13 (no multishot poll).
    pub fn new() -> Result<Self, Errno> {
        let to_errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let build = |defer: bool| {
            let mut builder = IoUring::builder();
            builder.setup_clamp().setup_cqsize(COMPLETIONS);
            if defer {
                builder
                    .setup_single_issuer()
                    .setup_defer_taskrun()
                    .setup_taskrun_flag();
            } else {
                builder.setup_coop_taskrun().setup_taskrun_flag();
            }
            builder.build(ENTRIES)
        };
        // Linux before 6.1 has no deferred completions.
        let ring = build(true).or_else(|_| build(false)).map_err(to_errno)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(Errno::NOSYS);
        }
        let fixed_files = ring.submitter().register_files_sparse(FIXED_FILES).is_ok();
        let wake = WakeFd::new()?;
        let engine = Self {
            ring: RefCell::new(ring),
            slots: RefCell::default(),
            files: RefCell::default(),
            busy: RefCell::default(),
            closing: RefCell::default(),
            watches: RefCell::default(),
            readies: RefCell::default(),
            wake: Arc::clone(&wake.0),
            sleeper: Sleeper::new(Box::new(wake)),
            in_flight: Cell::new(0),
            fixed_files,
            queued: Cell::new(false),
            early: RefCell::default(),
            inline: Guard::default(),
        };
        engine.arm(engine.wake.as_raw_fd(), TAG_WAKE << TAG_SHIFT);
        Ok(engine)
    }

    fn fixed(&self, file: FileId) -> bool {
        self.fixed_files && file.index() < FIXED_FILES as usize
    }

    /// Queues an entry, handing the queue to the kernel first if it is full.
    fn push(&self, entry: &squeue::Entry) {
        let mut ring = self.ring.borrow_mut();
        // SAFETY: pointers in the entry are to a slot's segments, which live until its completion.
        while unsafe { ring.submission().push(entry) }.is_err() {
            if let Err(error) = ring.submit() {
                check_submit(&error);
            }
        }
        self.queued.set(true);
    }

    fn arm(&self, fd: RawFd, user_data: u64) {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(user_data);
        self.push(&entry);
    }

    fn entry(&self, file: &OpenFile, op: &Op, slot: &Slot) -> squeue::Entry {
        // The two ways to name a file are two types, so each opcode is written once, here.
        macro_rules! build {
            ($fd:expr) => {
                match *op {
                    Op::Read { offset, .. } => match slot.segments.list() {
                        [one] => opcode::Read::new($fd, one.as_ptr(), one.bytes() as u32)
                            .offset(offset)
                            .build(),
                        list => opcode::Readv::new($fd, list.as_ptr().cast(), count(list.len()))
                            .offset(offset)
                            .build(),
                    },
                    Op::Write { offset, .. } => match slot.segments.list() {
                        [one] => opcode::Write::new($fd, one.as_ptr(), one.bytes() as u32)
                            .offset(offset)
                            .build(),
                        list => opcode::Writev::new($fd, list.as_ptr().cast(), count(list.len()))
                            .offset(offset)
                            .build(),
                    },
                    Op::Sync { .. } => opcode::Fsync::new($fd)
                        .flags(types::FsyncFlags::DATASYNC)
                        .build(),
                    Op::Allocate {
                        offset,
                        bytes,
                        mode,
                        ..
                    } => opcode::Fallocate::new($fd, bytes)
                        .offset(offset)
                        .mode(host::allocate_mode(mode))
                        .build(),
                }
            };
        }
        if self.fixed(file.id()) {
            return build!(types::Fixed(file.id().index() as u32));
        }
        let fd = file.fd().as_ref().map_or(-1, AsRawFd::as_raw_fd);
        build!(types::Fd(fd))
    }

    /// One system call: gives the kernel what is queued, lets it run put-off completions, and waits
    /// for `want` of them, no longer than `timeout`.
    fn enter(&self, want: usize, timeout: Option<Duration>) {
        let ring = self.ring.borrow();
        let result = match (want, timeout) {
            (0, _) => {
                // SAFETY: no argument is passed; the queue is ours (see `push`).
                let queued = unsafe { ring.submission_shared() }.len() as u32;
                const GETEVENTS: u32 = 1;
                // SAFETY: as above.
                unsafe {
                    ring.submitter()
                        .enter::<libc::sigset_t>(queued, 0, GETEVENTS, None)
                }
            }
            (want, None) => ring.submit_and_wait(want),
            (want, Some(timeout)) => {
                let time = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&time);
                ring.submitter().submit_with_args(want, &args)
            }
        };
        self.queued.set(false);
        if let Err(error) = result {
            // What was not taken stays queued for the next turn.
            self.queued.set(true);
            check_submit(&error);
        }
    }

    /// How many operations the kernel has not been given yet.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.ring.borrow_mut().submission().len()
    }

    /// Takes completions out of the ring.
    fn reap(&self, events: &mut Vec<Event>) {
        events.append(&mut self.early.borrow_mut());
        loop {
            // A batch on the stack: delivering may start operations, which use the ring.
            let mut batch: [Option<(u64, i32, u32)>; 32] = [None; 32];
            let mut taken = 0;
            {
                let mut ring = self.ring.borrow_mut();
                let mut completions = ring.completion();
                for place in &mut batch {
                    let Some(entry) = completions.next() else {
                        break;
                    };
                    *place = Some((entry.user_data(), entry.result(), entry.flags()));
                    taken += 1;
                }
            }
            for (user_data, result, flags) in batch.into_iter().flatten() {
                self.completed(user_data, result, flags, events);
            }
            if taken < batch.len() {
                return;
            }
        }
    }

    fn completed(&self, user_data: u64, result: i32, flags: u32, events: &mut Vec<Event>) {
        let data = user_data & DATA_MASK;
        match user_data >> TAG_SHIFT {
            TAG_OP => {
                let slot = data as usize;
                let (file, segments, notify) = {
                    let mut slots = self.slots.borrow_mut();
                    slots.free.push(slot);
                    let slot = &mut slots.list[slot];
                    let segments = std::mem::take(&mut slot.segments);
                    (slot.file, segments, slot.notify.take())
                };
                self.in_flight.set(self.in_flight.get() - 1);
                self.ended(file);
                let result: OpResult = match u64::try_from(result) {
                    Ok(bytes) => Ok(bytes),
                    Err(_) => Err(Errno::from_raw_os_error(-result)),
                };
                let notify = notify.expect("a completion for an operation under way");
                notify.deliver(result, segments, events);
            }
            TAG_WATCH => {
                let watch = WatchId(data);
                let Some(fd) = self.watches.borrow().get(&watch).map(Arc::clone) else {
                    return;
                };
                // A descriptor whose other end is gone is ready for ever: it is not asked again.
                let gone = (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) as i32;
                if result >= 0 {
                    events.push(Event::Ready(watch));
                    if !cqueue::more(flags) && result & gone == 0 {
                        self.arm(fd.as_raw_fd(), user_data);
                    }
                } else {
                    tracing::warn!(
                        error = %Errno::from_raw_os_error(-result),
                        "cannot watch a descriptor"
                    );
                }
            }
            TAG_READY => {
                let slot = data as usize;
                let entry = {
                    let mut readies = self.readies.borrow_mut();
                    readies.free.push(slot);
                    readies.list[slot].take()
                };
                let (_fd, waiter) = entry.expect("a completion for a socket that is waited for");
                if let Some(waiter) = waiter {
                    let result = match result {
                        0.. => Ok(0),
                        error => Err(Errno::from_raw_os_error(-error)),
                    };
                    waiter.complete(result, Segments::default());
                }
            }
            TAG_WAKE if !cqueue::more(flags) => self.arm(self.wake.as_raw_fd(), user_data),
            _ => {}
        }
    }

    fn began(&self, file: usize) {
        let mut busy = self.busy.borrow_mut();
        if busy.len() <= file {
            busy.resize(file + 1, 0);
        }
        busy[file] += 1;
    }

    fn ended(&self, file: usize) {
        let mut busy = self.busy.borrow_mut();
        busy[file] -= 1;
        if busy[file] == 0 {
            let mut closing = self.closing.borrow_mut();
            if !closing.is_empty() {
                closing.retain(|open| open.id().index() != file);
            }
        }
    }

    fn has_completions(&self) -> bool {
        !self.early.borrow().is_empty() || !self.ring.borrow_mut().completion().is_empty()
    }
}

fn count(segments: usize) -> u32 {
    segments.min(host::MAX_SEGMENTS) as u32
}

/// Errors of `io_uring_enter` that mean "later"; all others are bugs of ours.
fn check_submit(error: &std::io::Error) {
    match Errno::from_io_error(error) {
        Some(Errno::INTR | Errno::AGAIN | Errno::BUSY | Errno::TIME | Errno::NOMEM) => {}
        _ => panic!("io_uring refuses to take requests: {error}"),
    }
}

impl Engine for Uring {
    fn attach(&self, file: &Arc<OpenFile>) {
        let first = self.files.borrow_mut().attach(file);
        if first && self.fixed(file.id()) {
            let fd = file.fd().as_ref().map_or(-1, AsRawFd::as_raw_fd);
            let updated = self
                .ring
                .borrow()
                .submitter()
                .register_files_update(file.id().index() as u32, &[fd]);
            updated.expect("an open descriptor and an index within the table");
        }
    }

    fn detach(&self, file: FileId) {
        let Some(file) = self.files.borrow_mut().detach(file) else {
            return;
        };
        if self.fixed(file.id()) {
            // Queued entries name the file by its place in the table: hand them over first.
            self.enter(0, None);
            let updated = self
                .ring
                .borrow()
                .submitter()
                .register_files_update(file.id().index() as u32, &[-1]);
            updated.expect("an index within the table");
        }
        let busy = self.busy.borrow().get(file.id().index()).copied();
        if busy.is_some_and(|operations| operations > 0) {
            self.closing.borrow_mut().push(file);
        }
    }

    fn start(&self, op: Op, notify: Notify) {
        let file_id = match &op {
            Op::Read { file, .. }
            | Op::Write { file, .. }
            | Op::Sync { file }
            | Op::Allocate { file, .. } => *file,
        };
        let files = self.files.borrow();
        let Some(file) = files.get(file_id) else {
            drop(files);
            let segments = segments_of(op);
            let mut early = self.early.borrow_mut();
            return notify.deliver(Err(Errno::BADF), segments, &mut early);
        };
        let mut op = op;
        match &mut op {
            Op::Sync { .. } => file.count_sync(),
            Op::Write {
                offset, segments, ..
            } => {
                let done = file
                    .fd()
                    .and_then(|fd| self.inline.write(&file.write_ways, fd, *offset, segments));
                if let Some(result) = done {
                    let mut early = self.early.borrow_mut();
                    return notify.deliver(result, std::mem::take(segments), &mut early);
                }
            }
            Op::Read { .. } | Op::Allocate { .. } => {}
        }
        let entry = {
            let mut slots = self.slots.borrow_mut();
            let index = slots.free.pop().unwrap_or_else(|| {
                slots.list.push(Box::default());
                slots.list.len() - 1
            });
            let slot = &mut slots.list[index];
            slot.file = file_id.index();
            if let Op::Read { segments, .. } | Op::Write { segments, .. } = &mut op {
                slot.segments = std::mem::take(segments);
            }
            slot.notify = Some(notify);
            self.entry(file, &op, slot).user_data(index as u64)
        };
        drop(files);
        self.in_flight.set(self.in_flight.get() + 1);
        self.began(file_id.index());
        self.push(&entry);
    }

    fn host(&self, call: HostCall) -> LocalBoxFuture<'static, Result<HostReply, Errno>> {
        host_on_pool(call)
    }

    fn offload(&self, work: Work) {
        pool::compute(work);
    }

    fn watch(&self, fd: Arc<OwnedFd>) -> WatchId {
        let watch = super::next_watch();
        self.arm(fd.as_raw_fd(), TAG_WATCH << TAG_SHIFT | watch.0);
        self.watches.borrow_mut().insert(watch, fd);
        watch
    }

    fn unwatch(&self, watch: WatchId) {
        let Some(_fd) = self.watches.borrow_mut().remove(&watch) else {
            return;
        };
        let entry = opcode::PollRemove::new(TAG_WATCH << TAG_SHIFT | watch.0)
            .build()
            .user_data(TAG_IGNORE << TAG_SHIFT);
        self.push(&entry);
        // The descriptor may be closed and its number used again after this: no entry may name it.
        self.enter(0, None);
    }

    fn ready(&self, fd: &Arc<OwnedFd>, interest: Interest, waiter: &Rc<Waiter>) -> ReadyId {
        let slot = {
            let mut readies = self.readies.borrow_mut();
            let slot = readies.free.pop().unwrap_or_else(|| {
                readies.list.push(None);
                readies.list.len() - 1
            });
            readies.list[slot] = Some((Arc::clone(fd), Some(Rc::clone(waiter))));
            slot
        };
        let flags = match interest {
            Interest::Receive => libc::POLLIN,
            Interest::Send => libc::POLLOUT,
        };
        let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), flags as u32)
            .build()
            .user_data(TAG_READY << TAG_SHIFT | slot as u64);
        self.push(&entry);
        ReadyId(slot as u64)
    }

    fn forget_ready(&self, ready: ReadyId) {
        let mut readies = self.readies.borrow_mut();
        let Some(Some((_, waiter))) = readies.list.get_mut(ready.0 as usize) else {
            return;
        };
        *waiter = None;
        drop(readies);
        let entry = opcode::PollRemove::new(TAG_READY << TAG_SHIFT | ready.0)
            .build()
            .user_data(TAG_IGNORE << TAG_SHIFT);
        self.push(&entry);
    }

    fn poll(&self, events: &mut Vec<Event>) {
        let put_off = self.ring.borrow_mut().submission().taskrun();
        if self.queued.get() || put_off {
            self.enter(0, None);
        }
        self.reap(events);
    }

    fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) {
        let want = usize::from(!self.has_completions());
        self.enter(want, timeout);
        self.sleeper.awake();
        self.reap(events);
    }

    fn in_flight(&self) -> usize {
        self.in_flight.get() + self.early.borrow().len()
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
        "io_uring"
    }
}

fn segments_of(op: Op) -> Segments {
    match op {
        Op::Read { segments, .. } | Op::Write { segments, .. } => segments,
        Op::Sync { .. } | Op::Allocate { .. } => Segments::default(),
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still write to the segments: wait for every operation, whoever asked.
        let mut events = Vec::new();
        while self.in_flight.get() > 0 {
            self.enter(1, None);
            self.reap(&mut events);
        }
    }
}
