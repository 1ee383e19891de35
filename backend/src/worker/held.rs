//! Held requests: guest requests that failed and wait for somebody's decision.
//!
//! A failed request that its device's policy stops for is unwound: it has left the disk's root, and has
//! no segments and no memory map. What is left is [`Parked`]: the head of its descriptor chain, at its
//! queue, where it counts as taken from the ring and not completed. So a queue parks at most as many
//! requests as its ring has descriptors. Told to resume, the worker walks the chain again and begins the
//! request from the start.
//!
//! A parked request is not in flight. Nothing waits for it: drained sections, changes of the graph and of
//! memory, stops. A queue that moves takes its parked requests along. When the guest or its front-end
//! ends a queue, they complete with the failure that they met, as nobody would complete them later.
//!
//! **A flush behind held changes waits.** While a write, zeroing or discard of a device is held, or has
//! been and is under way again, flushes of the same device, on whichever queue, are parked as they come
//! and begin once no change is held any more. A guest that waits for its writes before it flushes never
//! sees this; one that does not never takes the flush for a sign that they are done. Where their queue
//! ends first, they fail as the changes do.
//!
//! Threads: [`Parked`] requests are their worker's and travel in messages. [`Holds`] is shared by the
//! workers of a device and by control; whoever ends the last hold posts to all workers and waits for none.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use blockcore::IoError;
use blockcore::io::RequestKind;
use blockcore::io::policy::{Action, ErrorPolicy, IoStatus};
use blockcore::mailbox::Mailbox;

use super::{Command, DeviceId};
use crate::virtio::blk::Request;

/// A failure of the I/O of a guest's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) error: IoError,
    /// It was a flush that failed, be it one that was to make a write stable: that is final.
    pub(super) flush: bool,
}

impl From<IoError> for Failure {
    fn from(error: IoError) -> Self {
        Self {
            error,
            flush: false,
        }
    }
}

impl Failure {
    /// `error` was a flush's.
    pub(super) fn of_flush(error: IoError) -> Self {
        Self { error, flush: true }
    }
}

/// A request that waits at its queue. See the module's header.
pub struct Parked {
    pub(super) head: u16,
    pub(super) request: Request,
    /// What it met; `None` for a flush that waits for held changes.
    pub(super) error: Option<IoError>,
    /// When the guest's request was taken first, on the engine's clock.
    pub(super) since: Duration,
    /// Control knows of it.
    pub(super) reported: bool,
    /// `None` for a flush.
    pub(super) hold: Option<Hold>,
    /// Resumed on its way from one worker to the next.
    pub(super) due: bool,
}

impl Parked {
    /// Has it tried again, and reported if it fails, by the worker to which it comes.
    pub fn resume(&mut self) {
        self.due = true;
        self.reported = false;
    }
}

/// A held request, for those who list them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldRequest {
    /// At which queue.
    pub queue: u16,
    /// What it asks for.
    pub request: Request,
    /// What it met; `None` for a flush that waits for held changes.
    pub error: Option<IoError>,
    /// How long ago it was taken from the queue.
    pub age: Duration,
}

/// Something about requests that failed that control should know. At most two for each held request and
/// resume; of others, few a second for each queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whose disk it is.
    pub export: Arc<str>,
    /// What happened.
    pub event: HoldEvent,
    /// To what.
    pub operation: Operation,
    /// For lack of space.
    pub no_space: bool,
    /// What was met, for a person.
    pub message: String,
}

/// What happens to a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldEvent {
    /// It is held until somebody resumes it.
    Held,
    /// It was held, and completed with its failure since its queue ended.
    GivenUp,
    /// It was completed with its failure. Not each is told of.
    Reported,
    /// It was completed as if nothing had happened. Not each is told of.
    Ignored,
}

/// What kind of request it is, as QEMU tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A read.
    Read,
    /// A write, a zeroing, a discard or a flush.
    Write,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// What kind of request a guest's is to the disk.
pub(super) fn kind_of(request: &Request) -> RequestKind {
    match request {
        Request::Read { .. } => RequestKind::Read,
        Request::Write { .. } => RequestKind::Write,
        Request::Flush => RequestKind::Flush,
        Request::Discard { .. } => RequestKind::Discard,
        Request::WriteZeroes { .. } => RequestKind::WriteZeroes,
        Request::GetId => RequestKind::Other,
    }
}

/// What the workers of a device share of its held requests.
pub struct Holds {
    export: Arc<str>,
    device: DeviceId,
    policy: ErrorPolicy,
    retry: Option<Duration>,
    /// Requests that are held, or have been and are under way again.
    all: AtomicUsize,
    /// Those of them that change the disk.
    changes: AtomicUsize,
    /// An [`IoStatus`].
    status: AtomicU8,
    workers: Vec<Arc<Mailbox<Command>>>,
    notices: Arc<Mailbox<Notice>>,
}

impl Holds {
    /// Nothing held, for a device that `workers` serve. With `retry`, held requests are tried again by
    /// themselves after that time.
    pub fn new(
        export: Arc<str>,
        device: DeviceId,
        policy: ErrorPolicy,
        retry: Option<Duration>,
        workers: Vec<Arc<Mailbox<Command>>>,
        notices: Arc<Mailbox<Notice>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            export,
            device,
            policy,
            retry,
            all: AtomicUsize::new(0),
            changes: AtomicUsize::new(0),
            status: AtomicU8::new(IoStatus::Ok as u8),
            workers,
            notices,
        })
    }

    /// After what time held requests are tried again by themselves.
    pub(super) fn retry(&self) -> Option<Duration> {
        self.retry
    }

    /// What to do about a failure.
    pub(super) fn action(&self, request: &Request, failure: Failure) -> Action {
        match failure.flush {
            true => Action::Report,
            false => self.policy.action(kind_of(request), failure.error),
        }
    }

    /// Whether a flush has to wait.
    pub(super) fn changes_are_held(&self) -> bool {
        self.changes.load(Ordering::Acquire) > 0
    }

    /// Holds a request; flushes wait from now on if it changes the disk.
    pub(super) fn hold(self: &Arc<Self>, request: &Request) -> Hold {
        let change = !matches!(request, Request::Read { .. });
        self.all.fetch_add(1, Ordering::AcqRel);
        if change {
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        Hold {
            holds: Arc::clone(self),
            change,
        }
    }

    /// The disk was stopped for a failure.
    pub(super) fn stopped(&self, error: IoError) {
        let status = IoStatus::Ok.after(error) as u8;
        let order = Ordering::Relaxed;
        // The first one stays.
        let _ = self
            .status
            .compare_exchange(IoStatus::Ok as u8, status, order, order);
    }

    /// Tells control what happened to a request; a flush has no failure of its own to tell.
    pub(super) fn tell(&self, event: HoldEvent, parked: &Parked) {
        if let Some(error) = parked.error {
            self.tell_of(event, &parked.request, error);
        }
    }

    /// Tells control what became of a request that met `error`.
    pub(super) fn tell_of(&self, event: HoldEvent, request: &Request, error: IoError) {
        let operation = match request {
            Request::Read { .. } => Operation::Read,
            _ => Operation::Write,
        };
        self.notices.post(Notice {
            export: Arc::clone(&self.export),
            event,
            operation,
            no_space: error == IoError::NoSpace,
            message: error.to_string(),
        });
    }

    /// Whether the disk was stopped for a failure since the last resume; `None` if it cannot be.
    pub fn status(&self) -> Option<IoStatus> {
        let status = self.status.load(Ordering::Relaxed);
        let mut all = IoStatus::NAMES.into_iter();
        let found = all.find(|(_, known)| *known as u8 == status);
        self.policy
            .may_stop()
            .then(|| found.map(|(_, known)| known))?
    }

    /// The disk is resumed.
    pub fn reset_status(&self) {
        self.status.store(IoStatus::Ok as u8, Ordering::Relaxed);
    }
}

impl fmt::Debug for Holds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holds")
            .field("policy", &self.policy)
            .field("changes", &self.changes)
            .finish_non_exhaustive()
    }
}

/// What a held request has until it completes; dropping the last change's lets flushes go.
pub(super) struct Hold {
    holds: Arc<Holds>,
    change: bool,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let holds = &self.holds;
        if holds.all.fetch_sub(1, Ordering::AcqRel) == 1 && holds.retry.is_some() {
            // Nobody resumes such a device: it has resumed by itself.
            holds.reset_status();
        }
        if !self.change || holds.changes.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        // A worker that saw the hold has parked its flush before it takes this.
        for worker in &holds.workers {
            worker.post(Command::LetFlushesGo(holds.device));
        }
    }
}
