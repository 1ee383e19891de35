//! A device's disk on one worker: what its requests run against, and the way with a task.
//!
//! Threads: the worker's; [`Disk`] comes from the control thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, Request, Root};

use super::held::{Failure, Holds};
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
    /// What becomes of requests that fail.
    pub holds: Arc<Holds>,
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
    pub(super) async fn settle(&self, request: &Request) -> Result<(), Failure> {
        match self.writeback.get() {
            true => Ok(()),
            false => request.flush().await.map_err(Failure::of_flush),
        }
    }
}

/// Outcomes of requests that took the slow way, on their way back to their queues.
pub(super) type Finished = Rc<RefCell<Vec<(u64, Result<(), Failure>)>>>;

/// A request that takes the slow way.
pub(super) enum Task {
    Read(u64, Segments),
    Write(u64, Segments),
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

impl Task {
    pub(super) async fn run(self, served: &Served, request: &Request) -> Result<(), Failure> {
        let flags = WriteFlags::empty();
        match self {
            Self::Read(offset, into) => return Ok(request.read(offset, into).await?),
            Self::Flush => return request.flush().await.map_err(Failure::of_flush),
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
