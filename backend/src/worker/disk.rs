//! A device's disk on one worker: what its requests run against, and the way with a task.
//!
//! Threads: the worker's; [`Disk`] and [`Stats`] come from the control thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockcore::IoError;
use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, Request, Root};

use crate::virtio::blk::{self, Geometry, Range};

/// What the device is besides its plan.
#[derive(Clone, Debug)]
pub struct Disk {
    /// For messages.
    pub export: Arc<str>,
    /// Smallest unit of a request.
    pub block_bytes: u32,
    /// Nothing may be changed.
    pub read_only: bool,
    /// What GET_ID answers.
    pub id: [u8; blk::ID_BYTES],
}

/// Counters of one queue. Only the worker that serves it adds; anybody may read.
#[derive(Default)]
pub struct Stats {
    /// Reads completed, failed ones included.
    pub reads: AtomicU64,
    /// Writes completed, failed ones included.
    pub writes: AtomicU64,
    /// Flushes completed, failed ones included.
    pub flushes: AtomicU64,
    /// Discards and zeroings completed, failed ones included.
    pub ranges: AtomicU64,
    /// Requests that did not end well, invalid ones included.
    pub errors: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    // One writer: no need of an atomic addition.
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// The disk of a device, as far as this worker serves it.
pub(super) struct Served {
    pub(super) root: Rc<Root>,
    pub(super) disk: Disk,
    pub(super) writeback: Cell<bool>,
}

impl Served {
    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            bytes: self.root.bytes(),
            block_bytes: self.disk.block_bytes,
            read_only: self.disk.read_only,
        }
    }

    /// Comes between the end of a change and its completion. The mode that holds now counts, not the
    /// one in which the change began: a guest that has left writeback sends no flush for it.
    pub(super) async fn settle(&self, request: &Request) -> Result<(), IoError> {
        match self.writeback.get() {
            true => Ok(()),
            false => request.flush().await,
        }
    }
}

/// Outcomes of requests that took the slow way, on their way back to their queues.
pub(super) type Finished = Rc<RefCell<Vec<(u64, Result<(), IoError>)>>>;

/// A request that takes the slow way.
pub(super) enum Task {
    Read(u64, Segments),
    Write(u64, Segments),
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

impl Task {
    pub(super) async fn run(self, served: &Served, request: &Request) -> Result<(), IoError> {
        let flags = WriteFlags::empty();
        match self {
            Self::Read(offset, into) => return request.read(offset, into).await,
            Self::Flush => return request.flush().await,
            Self::Write(offset, from) => request.write(offset, from, flags).await?,
            Self::Discard(ranges) => {
                for range in ranges {
                    request.discard(range.offset, range.bytes).await?;
                }
            }
            Self::WriteZeroes(ranges) => {
                for range in ranges {
                    let zero = match range.unmap {
                        true => ZeroFlags::MAY_UNMAP,
                        false => ZeroFlags::empty(),
                    };
                    request
                        .write_zeroes(range.offset, range.bytes, zero)
                        .await?;
                }
            }
        }
        served.settle(request).await
    }
}

pub(super) fn spawn(
    context: &IoContext,
    finished: &Finished,
    token: u64,
    served: Rc<Served>,
    request: Request,
    task: Task,
) {
    let finished = Rc::clone(finished);
    context.spawn(async move {
        let result = task.run(&served, &request).await;
        // Nothing of it touches the disk any more: a drained section need not wait for the guest.
        drop(request);
        finished.borrow_mut().push((token, result));
    });
}

pub(super) fn token(slot: usize, head: u16) -> u64 {
    (slot as u64) << 16 | u64::from(head)
}

pub(super) fn split(token: u64) -> (usize, u16) {
    ((token >> 16) as usize, token as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_queue_and_head() {
        assert_eq!(split(token(70_000, 65_535)), (70_000, 65_535));
    }
}
