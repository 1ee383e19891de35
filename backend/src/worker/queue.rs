//! A virtqueue that is served: its ring, and the requests that were taken from it and not completed.
//!
//! Threads: the worker's. A queue is made and ends in [`super::Worker`].

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockcore::IoError;
use blockcore::engine::{Engine, WatchId};
use blockcore::io::buffer::{Byte, Segments};
use blockcore::io::{self, IoContext, RequestKind};
use futures_channel::oneshot;

use super::QueueKey;
use super::disk::{Finished, Served, Stats, Task, count, spawn, token};
use crate::virtio::blk::{self, Range, Request, Status};
use crate::virtio::queue::{Chain, Ring, RingError, RingState};

/// How long a queue that has reported a failed request only counts the next ones.
const QUIET: Duration = Duration::from_secs(1);

/// A request that was popped and is not completed.
pub(super) struct Pending {
    pub(super) request: Request,
    pub(super) status: Byte,
    /// Bytes written to the guest if it succeeds.
    pub(super) written: u32,
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
    pub(super) stats: Arc<Stats>,
}

/// A queue that takes no more requests and ends when none is in flight.
pub(super) struct Stopping {
    pub(super) reply: oneshot::Sender<Option<RingState>>,
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

    /// Starts a request, or completes it at once; after an error it has done neither.
    pub(super) fn begin(
        &mut self,
        slot: usize,
        chain: &mut Chain,
        context: &IoContext,
        finished: &Finished,
    ) -> Result<(), RingError> {
        let head = chain.head;
        let no_status = RingError::NoStatus(head);
        if chain.outside && !chain.status_inside {
            return Err(no_status);
        }
        let status = chain.writable.take_last_byte().ok_or(no_status)?;
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
                count(&self.stats.errors);
                status.set(refused as u8);
                self.ring.push(head, 1);
                return Ok(());
            }
        };
        self.in_flight += 1;
        self.pending[usize::from(head)] = Some(Pending {
            request,
            status,
            written: 1,
            entered: None,
        });
        let served = Rc::clone(&self.served);
        let token = token(slot, head);
        let (kind, offset, bytes) = match request {
            Request::GetId => {
                let bytes = chain.writable.copy_from(&served.disk.id);
                self.set_written(head, bytes as u32 + 1);
                self.complete(head, Ok(()));
                return Ok(());
            }
            Request::Read { offset, bytes } => (RequestKind::Read, offset, bytes),
            Request::Write { offset, bytes } => (RequestKind::Write, offset, bytes),
            Request::Flush => (RequestKind::Flush, 0, 0),
            Request::Discard { .. } => (RequestKind::Discard, 0, 0),
            Request::WriteZeroes { .. } => (RequestKind::WriteZeroes, 0, 0),
        };
        let entered = served.root.try_enter(kind, offset, bytes);
        let entered = entered.expect("nothing is popped while the root is held");
        let task = match request {
            Request::Read { offset, bytes } => {
                let written = u32::try_from(bytes + 1).unwrap_or(u32::MAX);
                self.set_written(head, written);
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
                match self.ranges(&chain.readable, discard) {
                    Ok(ranges) if discard => Task::Discard(ranges),
                    Ok(ranges) => Task::WriteZeroes(ranges),
                    Err(refused) => {
                        self.finish(head, refused);
                        return Ok(());
                    }
                }
            }
        };
        spawn(context, finished, token, served, entered, task);
        Ok(())
    }

    /// Keeps what an operation was started from until it is over.
    fn keep(&mut self, head: u16, entered: io::Request) -> Result<(), RingError> {
        if let Some(pending) = &mut self.pending[usize::from(head)] {
            pending.entered = Some(entered);
        }
        Ok(())
    }

    pub(super) fn set_written(&mut self, head: u16, written: u32) {
        if let Some(pending) = &mut self.pending[usize::from(head)] {
            pending.written = written;
        }
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

    pub(super) fn complete(&mut self, head: u16, result: Result<(), IoError>) {
        let status = match result {
            Ok(()) => Status::Ok,
            Err(IoError::Unsupported) => Status::Unsupported,
            Err(_) => Status::IoError,
        };
        if let Err(error) = result {
            self.report_failure(head, error);
        }
        self.finish(head, status);
    }

    pub(super) fn report_failure(&mut self, head: u16, error: IoError) {
        let now = self.served.root.context().engine().now();
        if now < self.quiet_until {
            self.unsaid += 1;
            return;
        }
        self.quiet_until = now + QUIET;
        let pending = self.pending[usize::from(head)].as_ref();
        tracing::warn!(
            export = %self.served.disk.export,
            queue = self.key.index,
            request = ?pending.map(|pending| pending.request),
            %error,
            unsaid = std::mem::take(&mut self.unsaid),
            "a request failed"
        );
    }

    pub(super) fn finish(&mut self, head: u16, status: Status) {
        let pending = self.pending[usize::from(head)].take();
        let mut pending = pending.expect("completed exactly once");
        // Ends, and counts as a change, before the guest can know of it.
        drop(pending.entered.take());
        self.in_flight -= 1;
        count(match pending.request {
            Request::Read { .. } | Request::GetId => &self.stats.reads,
            Request::Write { .. } => &self.stats.writes,
            Request::Flush => &self.stats.flushes,
            Request::Discard { .. } | Request::WriteZeroes { .. } => &self.stats.ranges,
        });
        let written = match status {
            Status::Ok => pending.written,
            Status::IoError | Status::Unsupported => {
                count(&self.stats.errors);
                1
            }
        };
        pending.status.set(status as u8);
        self.ring.push(head, written);
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
        count(&self.stats.errors);
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
