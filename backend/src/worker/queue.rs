//! A virtqueue that is served: its ring, and the requests that were taken from it and not completed,
//! be they in flight or held ([`super::held`]).
//!
//! Threads: the worker's. A queue is made and ends in [`super::Worker`].

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockcore::IoError;
use blockcore::engine::{Engine, WatchId};
use blockcore::io::account::{Kind, Recorder};
use blockcore::io::buffer::{Byte, Segments};
use blockcore::io::policy::Action;
use blockcore::io::{self, IoContext, RequestKind};
use futures_channel::oneshot;

use super::disk::{Finished, Served, Task, spawn, token};
use super::held::{Failure, HeldRequest, Hold, HoldEvent, Parked};
use super::{QueueKey, Stop, Stopped};
use crate::virtio::blk::{self, Range, Request, Status};
use crate::virtio::queue::{Chain, Ring, RingError};

/// How long a queue that has reported a failed request only counts the next ones.
const QUIET: Duration = Duration::from_secs(1);

/// A request that was popped and is neither completed nor parked.
pub(super) struct Pending {
    pub(super) request: Request,
    pub(super) status: Byte,
    /// Bytes written to the guest if it succeeds.
    pub(super) written: u32,
    /// Bytes that it moves, discards or zeroes.
    pub(super) bytes: u64,
    /// When it was taken first, on the engine's clock.
    pub(super) since: Duration,
    /// Control knows that it was held.
    pub(super) reported: bool,
    /// It was held, and is tried again.
    pub(super) hold: Option<Hold>,
    /// What has entered at the disk's root; `None` where a task has it, or the disk is not asked.
    pub(super) entered: Option<io::Request>,
}

pub(super) struct Queue {
    pub(super) key: QueueKey,
    pub(super) ring: Ring,
    pub(super) served: Rc<Served>,
    pub(super) watch: Option<WatchId>,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) error: Option<Arc<OwnedFd>>,
    pub(super) pending: Vec<Option<Pending>>,
    pub(super) in_flight: usize,
    /// Held requests, in the order in which they failed.
    pub(super) parked: Vec<Parked>,
    /// Held requests that are to be tried again, as soon as the queue may take some.
    pub(super) again: VecDeque<Parked>,
    /// When held requests are tried again by themselves.
    pub(super) retry_at: Option<Duration>,
    /// The guest will kick for the next request: there is no need to look.
    pub(super) armed: bool,
    /// The disk's root was held at the last look: its guest may have kicked since.
    pub(super) held: bool,
    pub(super) broken: bool,
    pub(super) stopping: Option<Stopping>,
    /// Until when failures are only counted, and how many were: a guest can make them at will.
    pub(super) quiet_until: Duration,
    pub(super) unsaid: u64,
    pub(super) hang_up: Arc<dyn Fn() + Send + Sync>,
    pub(super) recorder: Recorder,
    /// Requests of no kind that was counted, and broken rings.
    pub(super) nonsense: Arc<AtomicU64>,
}

/// A queue that takes no more requests and ends when none is in flight.
pub(super) struct Stopping {
    pub(super) reply: oneshot::Sender<Option<Stopped>>,
    pub(super) how: Stop,
    /// When those who wait for it should read why, if it has not ended.
    pub(super) report_at: Option<Duration>,
}

impl Queue {
    pub(super) fn may_pop(&self) -> bool {
        !self.broken && self.stopping.is_none() && !self.served.root.is_held()
    }

    /// Looks whether a drained section holds the disk's root, and looks at the ring again after it did.
    pub(super) fn look_for_hold(&mut self) {
        let held = self.served.root.is_held();
        if std::mem::replace(&mut self.held, held) && !held {
            self.armed = false;
        }
    }

    /// Says, once, which requests a stop has been waiting for.
    pub(super) fn report_stuck(&mut self, engine: &dyn Engine) {
        let Some(stopping) = &mut self.stopping else {
            return;
        };
        if stopping.report_at.is_none_or(|at| engine.now() < at) {
            return;
        }
        stopping.report_at = None;
        let waits: Vec<_> = self.pending.iter().flatten().map(|p| p.request).collect();
        tracing::warn!(
            export = %self.served.disk.export,
            queue = self.key.index,
            ?waits,
            "still waiting for the host to finish requests"
        );
    }

    /// Whether a held request can be tried again now.
    pub(super) fn may_try_again(&self) -> bool {
        !self.again.is_empty() && self.may_pop()
    }

    /// Takes the next request and starts it, or completes it at once: first those that are to be tried
    /// again, then, unless the guest will kick for it, what is in the ring. `None` if there is nothing.
    pub(super) fn take(
        &mut self,
        slot: usize,
        chain: &mut Chain,
        context: &IoContext,
        finished: &Finished,
    ) -> Result<Option<Taken>, RingError> {
        if let Some(parked) = self.again.pop_front() {
            let walked = self.ring.take_again(parked.head, chain);
            match walked.and_then(|()| status_of(chain)) {
                Ok(status) => self.begin(slot, chain, status, Some(parked), context, finished),
                Err(error) => {
                    self.parked.push(parked);
                    return Err(error);
                }
            }
            return Ok(Some(Taken::Again));
        }
        if self.armed || !self.ring.pop(chain)? {
            return Ok(None);
        }
        let status = status_of(chain).inspect_err(|_| self.ring.put_back(chain.head))?;
        self.begin(slot, chain, status, None, context, finished);
        Ok(Some(Taken::New))
    }

    /// Starts a request, parks it, or completes it at once.
    fn begin(
        &mut self,
        slot: usize,
        chain: &mut Chain,
        status: Byte,
        earlier: Option<Parked>,
        context: &IoContext,
        finished: &Finished,
    ) {
        let head = chain.head;
        let now = context.turn_time();
        let mut header = [0; blk::HEADER_BYTES as usize];
        let whole = !chain.outside && chain.readable.copy_to(&mut header) == header.len();
        let request = if whole {
            chain.readable.skip(blk::HEADER_BYTES);
            let (readable, writable) = (chain.readable.bytes(), chain.writable.bytes());
            blk::parse(header, readable, writable, self.served.geometry())
        } else {
            Err(Status::IoError)
        };
        let request = match request {
            Ok(request) => request,
            Err(refused) => {
                match blk::kind(header).filter(|_| whole) {
                    Some(kind) => self.recorder.invalid(kind, now),
                    None => self.count_nonsense(),
                }
                status.set(refused as u8);
                self.ring.push(head, 1);
                return;
            }
        };
        self.in_flight += 1;
        let (since, reported, hold) = match earlier {
            Some(earlier) => (earlier.since, earlier.reported, earlier.hold),
            None => (now, false, None),
        };
        self.pending[usize::from(head)] = Some(Pending {
            request,
            status,
            written: 1,
            bytes: 0,
            since,
            reported,
            hold,
            entered: None,
        });
        let served = Rc::clone(&self.served);
        let token = token(slot, head);
        let (kind, offset, bytes) = match request {
            Request::GetId => {
                let bytes = chain.writable.copy_from(&served.disk.id);
                self.pending_mut(head).written = bytes as u32 + 1;
                return self.complete(head, Ok(()));
            }
            Request::Flush if served.disk.holds.changes_are_held() => {
                return self.park(head, None);
            }
            Request::Read { offset, bytes } => (RequestKind::Read, offset, bytes),
            Request::Write { offset, bytes } => (RequestKind::Write, offset, bytes),
            Request::Flush => (RequestKind::Flush, 0, 0),
            Request::Discard { .. } => (RequestKind::Discard, 0, 0),
            Request::WriteZeroes { .. } => (RequestKind::WriteZeroes, 0, 0),
        };
        self.pending_mut(head).bytes = bytes;
        let entered = served.root.try_enter(kind, offset, bytes);
        let entered = entered.expect("nothing is popped while the root is held");
        let task = match request {
            Request::Read { offset, bytes } => {
                let written = u32::try_from(bytes + 1).unwrap_or(u32::MAX);
                self.pending_mut(head).written = written;
                match entered.start_read(offset, std::mem::take(&mut chain.writable), token) {
                    Ok(()) => return self.keep(head, entered),
                    Err(into) => Task::Read(offset, into),
                }
            }
            Request::Write { offset, .. } if served.writeback.get() => {
                match entered.start_write(offset, std::mem::take(&mut chain.readable), token) {
                    Ok(()) => return self.keep(head, entered),
                    Err(from) => Task::Write(offset, from),
                }
            }
            Request::Write { offset, .. } => {
                Task::Write(offset, std::mem::take(&mut chain.readable))
            }
            Request::Flush => Task::Flush,
            Request::GetId => unreachable!("answered above"),
            Request::Discard { .. } | Request::WriteZeroes { .. } => {
                let discard = matches!(request, Request::Discard { .. });
                let ranges = match self.ranges(&chain.readable, discard) {
                    Ok(ranges) => ranges,
                    Err(refused) => return self.finish(head, refused, Ended::Invalid),
                };
                self.pending_mut(head).bytes = ranges.iter().map(|range| range.bytes).sum();
                match discard {
                    true => Task::Discard(ranges),
                    false => Task::WriteZeroes(ranges),
                }
            }
        };
        spawn(context, finished, token, served, entered, task);
    }

    fn pending_mut(&mut self, head: u16) -> &mut Pending {
        let pending = self.pending[usize::from(head)].as_mut();
        pending.expect("in flight until completed or parked")
    }

    /// Keeps what an operation was started from until it is over.
    fn keep(&mut self, head: u16, entered: io::Request) {
        self.pending_mut(head).entered = Some(entered);
    }

    /// Reads the ranges, once, and checks them all before the first takes effect.
    pub(super) fn ranges(&self, readable: &Segments, discard: bool) -> Result<Vec<Range>, Status> {
        let geometry = self.served.geometry();
        let raw = readable.to_vec();
        let (raw, rest) = raw.as_chunks::<{ blk::RANGE_BYTES as usize }>();
        debug_assert!(rest.is_empty(), "whole ranges, checked by the parser");
        raw.iter()
            .map(|raw| blk::parse_range(*raw, discard, geometry))
            .collect()
    }

    /// The request's I/O is over: completes it, or parks it.
    pub(super) fn complete(&mut self, head: u16, result: Result<(), Failure>) {
        let Err(failure) = result else {
            return self.finish(head, Status::Ok, Ended::Well);
        };
        let request = self.pending_mut(head).request;
        let action = self.served.disk.holds.action(&request, failure);
        if action == Action::Stop {
            return self.park(head, Some(failure.error));
        }
        let (event, status) = match action {
            Action::Ignore => (HoldEvent::Ignored, Status::Ok),
            _ => (HoldEvent::Reported, status_for(failure.error)),
        };
        self.report_failure(head, event, failure.error);
        self.finish(head, status, Ended::Badly);
    }

    /// Unwinds a request, which waits from now on: for somebody's decision about `error`, or, a flush, for
    /// the changes that do.
    fn park(&mut self, head: u16, error: Option<IoError>) {
        let pending = self.pending[usize::from(head)].take();
        let pending = pending.expect("in flight until completed or parked");
        self.in_flight -= 1;
        let holds = &self.served.disk.holds;
        let hold = match pending.hold {
            None if error.is_some() => Some(holds.hold(&pending.request)),
            hold => hold,
        };
        let parked = Parked {
            head,
            request: pending.request,
            error,
            since: pending.since,
            reported: error.is_some(),
            hold,
            due: false,
        };
        // Left at last, with the hold taken: whoever waits for the disk to be quiet finds it held.
        drop(pending.entered);
        if let Some(error) = error {
            holds.stopped(error);
            if !pending.reported {
                holds.tell(HoldEvent::Held, &parked);
            }
        }
        if let Some(retry) = holds.retry()
            && self.retry_at.is_none()
        {
            self.retry_at = Some(self.served.root.context().turn_time() + retry);
        }
        self.parked.push(parked);
    }

    /// Tries held requests again: all of them.
    pub(super) fn resume(&mut self) {
        self.parked.iter_mut().for_each(Parked::resume);
        self.again
            .append(&mut std::mem::take(&mut self.parked).into());
        self.retry_at = None;
    }

    /// Begins the flushes that waited for held changes.
    pub(super) fn let_flushes_go(&mut self) {
        let waits = |parked: &mut Parked| parked.error.is_none();
        self.again.extend(self.parked.extract_if(.., waits));
    }

    /// Tries held requests again by itself, if it is time to.
    pub(super) fn look_at_the_time(&mut self, now: Duration) {
        if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = None;
            self.again.extend(self.parked.drain(..));
        }
    }

    /// Its held requests, for those who list them.
    pub(super) fn held_requests(&self, now: Duration) -> impl Iterator<Item = HeldRequest> {
        let index = self.key.index;
        let held = self.parked.iter().chain(&self.again);
        held.map(move |parked| HeldRequest {
            queue: index,
            request: parked.request,
            error: parked.error,
            age: now.saturating_sub(parked.since),
        })
    }

    /// The end of a queue with nothing in flight: what another can be made of. Held requests go along, or
    /// complete with what they met.
    pub(super) fn stopped(mut self, how: Stop, chain: &mut Chain) -> Stopped {
        let mut parked = std::mem::take(&mut self.parked);
        parked.extend(self.again.drain(..));
        if how == Stop::End {
            for parked in parked.drain(..) {
                self.give_up(parked, chain);
            }
            self.announce();
        }
        Stopped {
            ring: self.ring.state(),
            parked,
            recorder: self.recorder,
        }
    }

    fn give_up(&mut self, parked: Parked, chain: &mut Chain) {
        let error = parked.error.unwrap_or(IoError::Failed);
        let walked = self.ring.take_again(parked.head, chain);
        let written = match walked.and_then(|()| status_of(chain)) {
            Ok(status) => {
                status.set(status_for(error) as u8);
                1
            }
            // The guest took it apart meanwhile: there is no place for a status.
            Err(_) => 0,
        };
        self.ring.push(parked.head, written);
        if let Some(kind) = account_kind(&parked.request) {
            let now = self.served.root.context().turn_time();
            self.recorder.failed(kind, parked.since, now);
        }
        self.served.disk.holds.tell(HoldEvent::GivenUp, &parked);
    }

    pub(super) fn report_failure(&mut self, head: u16, event: HoldEvent, error: IoError) {
        let now = self.served.root.context().engine().now();
        if now < self.quiet_until {
            self.unsaid += 1;
            return;
        }
        self.quiet_until = now + QUIET;
        let pending = self.pending[usize::from(head)].as_ref();
        if let Some(pending) = pending {
            let holds = &self.served.disk.holds;
            holds.tell_of(event, &pending.request, error);
        }
        tracing::warn!(
            export = %self.served.disk.export,
            queue = self.key.index,
            request = ?pending.map(|pending| pending.request),
            %error,
            unsaid = std::mem::take(&mut self.unsaid),
            "a request failed"
        );
    }

    fn finish(&mut self, head: u16, status: Status, ended: Ended) {
        let pending = self.pending[usize::from(head)].take();
        let mut pending = pending.expect("completed exactly once");
        // Ends, and counts as a change, before the guest can know of it.
        drop(pending.entered.take());
        self.in_flight -= 1;
        if let Some(kind) = account_kind(&pending.request) {
            let now = self.served.root.context().turn_time();
            match ended {
                Ended::Well => self.recorder.done(kind, pending.bytes, pending.since, now),
                Ended::Badly => self.recorder.failed(kind, pending.since, now),
                Ended::Invalid => self.recorder.invalid(kind, now),
            }
        }
        let written = match status {
            Status::Ok => pending.written,
            Status::IoError | Status::Unsupported => 1,
        };
        pending.status.set(status as u8);
        self.ring.push(head, written);
    }

    /// Only the queue's worker adds.
    fn count_nonsense(&self) {
        self.nonsense.fetch_add(1, Ordering::Relaxed);
    }

    /// Shows the guest its completions, and calls it if it wants that.
    pub(super) fn announce(&mut self) {
        if self.ring.publish() {
            self.signal();
        }
    }

    pub(super) fn signal(&self) {
        if let Some(call) = &self.call {
            // Never blocks; a full counter means that a call is pending already.
            let _ = rustix::io::write(call, &1_u64.to_ne_bytes());
        }
    }

    /// The guest broke the ring's rules: nothing more is taken from it until it is started anew.
    pub(super) fn break_down(&mut self, error: RingError) {
        if std::mem::replace(&mut self.broken, true) {
            return;
        }
        self.count_nonsense();
        tracing::error!(
            export = %self.served.disk.export,
            queue = self.key.index,
            %error,
            "the guest broke this virtqueue: it is stopped until its driver resets it"
        );
        if let Some(fd) = &self.error {
            let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
        }
    }
}

/// Where a request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// The ring.
    New,
    /// It was held.
    Again,
}

/// How a request counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Well,
    Badly,
    Invalid,
}

/// Where a chain's status belongs.
fn status_of(chain: &mut Chain) -> Result<Byte, RingError> {
    let no_status = RingError::NoStatus(chain.head);
    if chain.outside && !chain.status_inside {
        return Err(no_status);
    }
    chain.writable.take_last_byte().ok_or(no_status)
}

fn status_for(error: IoError) -> Status {
    match error {
        IoError::Unsupported => Status::Unsupported,
        _ => Status::IoError,
    }
}

/// What a request counts as; identification is no I/O.
fn account_kind(request: &Request) -> Option<Kind> {
    match request {
        Request::Read { .. } => Some(Kind::Read),
        Request::Write { .. } => Some(Kind::Write),
        Request::Flush => Some(Kind::Flush),
        Request::Discard { .. } => Some(Kind::Discard),
        Request::WriteZeroes { .. } => Some(Kind::WriteZeroes),
        Request::GetId => None,
    }
}
