//! The copying that all jobs have in common: [`Copying`].
//!
//! What is left to do is marked in a bitmap. A piece of it is taken by clearing its marks; then it is
//! copied, as the job's node sees fit; a piece that fails is marked again, unless that ends the job.
//! So what is neither marked nor under way has been copied, and a guest's write that overlaps a copy
//! marks what it changed after the copy has taken its mark: it is copied again.
//!
//! Bounded: at most [`PARALLEL`] pieces of [`PIECE_BYTES`] are under way, each with a buffer of its own;
//! the speed says when the next may begin. Where operators hold the job, pieces under way are seen
//! through first. Each piece enters at the job's root, so drained sections hold it back like any
//! request; it enters once, for both ends, so it never waits half way in.
//!
//! Policy is the jobs': what is marked at first, what an end is.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use event_listener::EventListener;
use futures_util::StreamExt;
use futures_util::future::{Either, LocalBoxFuture, select};
use futures_util::stream::FuturesUnordered;

use super::{Job, Stopped};
use crate::dirty_bitmap::{Area, Bits};
use crate::fault::{self, Fault};
use crate::filter::link::{CopyFailure, CopySide};
use crate::io::policy::{Action, OnError};
use crate::io::{Io, RequestKind, Root};

/// How many pieces are under way at once, at most.
const PARALLEL: usize = 16;
/// Longest piece.
const PIECE_BYTES: u64 = 1 << 20;
/// How long a job rests after a failure that it is to ignore: it is going to meet it again.
const AFTER_IGNORED: Duration = Duration::from_millis(100);

/// Copies a range of the job's node, at which `io` is.
pub(super) type CopyRange =
    Rc<dyn for<'a> Fn(Io<'a>, u64, u64) -> LocalBoxFuture<'a, Result<(), CopyFailure>>>;

/// See the module's header.
pub(super) struct Copying {
    /// Where the job enters.
    pub(super) root: Rc<Root>,
    /// What is left.
    pub(super) todo: Arc<Bits>,
    /// How.
    pub(super) copy: CopyRange,
    /// What becomes of failures to read.
    pub(super) on_source_error: OnError,
    /// What becomes of failures to write.
    pub(super) on_target_error: OnError,
    /// Bytes that may be under way at once.
    pub(super) buffer_bytes: u64,
    /// A piece that fails, and is to be ignored, is left out instead of being tried again.
    pub(super) skips_failed: bool,
    /// Guests go on to mark what there is to do, so that nobody knows how much that is.
    pub(super) grows: bool,
}

/// What a [`Copying`] has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Copied {
    /// The first failure of a piece that was left out.
    pub(super) left_out: Option<CopyFailure>,
}

type Piece = (Area, Result<(), CopyFailure>);

impl Copying {
    /// How many bytes one piece moves.
    fn piece_bytes(&self) -> u64 {
        let one = self.buffer_bytes.min(PIECE_BYTES);
        one.max(self.todo.granularity_bytes())
    }

    /// How much is left, in bytes.
    pub(super) fn left_bytes(&self) -> u64 {
        let marked = self.todo.count() * self.todo.granularity_bytes();
        marked.min(self.todo.length())
    }

    async fn copy_piece(&self, area: Area) -> Piece {
        let Area { offset, bytes } = area;
        let request = self.root.enter(RequestKind::Other, offset, bytes).await;
        (area, (self.copy)(request.io(), offset, bytes).await)
    }

    /// Copies until nothing is left, or until no more than `enough` says, in bytes, when everything has
    /// been gone through.
    ///
    /// # Errors
    ///
    /// [`Stopped`]; nothing is under way then.
    pub(super) async fn run(
        &self,
        job: &Rc<Job>,
        enough: impl Fn() -> u64,
    ) -> Result<Copied, Stopped> {
        let parallel = (self.buffer_bytes / self.piece_bytes()).clamp(1, PARALLEL as u64) as usize;
        let mut under_way = FuturesUnordered::new();
        let mut copied = Copied::default();
        let mut next = 0;
        let mut failed = None;
        // Whether something of this pass has to be tried again.
        let mut tries_again = false;
        loop {
            let told = job.listen();
            if (job.must_stop() || failed.is_some()) && under_way.is_empty() {
                if let Some(failure) = failed.take() {
                    return Err(failure);
                }
                job.pause_point().await?;
                job.set_busy(true);
                continue;
            }
            let may_begin = !job.must_stop() && failed.is_none() && under_way.len() < parallel;
            let delay = job.delay();
            if may_begin && delay.is_zero() {
                let area = self
                    .todo
                    .next_area(next, u64::MAX - next, self.piece_bytes());
                if let Some(area) = area {
                    // Before anything is read.
                    self.todo.clear(area.offset, area.bytes);
                    job.charge(area.bytes);
                    next = area.offset + area.bytes;
                    under_way.push(self.copy_piece(area));
                    continue;
                }
                if under_way.is_empty() {
                    let enough = if tries_again { 0 } else { enough() };
                    if self.left_bytes() <= enough {
                        return Ok(copied);
                    }
                    // From the beginning: what was changed meanwhile, or failed.
                    (next, tries_again) = (0, false);
                    continue;
                }
            }
            let limited = (may_begin && !delay.is_zero()).then_some(delay);
            let piece = first(job, under_way.next(), limited, told).await;
            let Some((area, result)) = piece else {
                continue;
            };
            match result {
                Ok(()) => {
                    if fault::is_planted(Fault::MarkFallsLate) {
                        self.todo.clear(area.offset, area.bytes);
                    }
                    self.count(job, area.bytes);
                }
                Err(failure) => {
                    tries_again = true;
                    failed = self.handle(job, area, failure, &mut copied).await.err();
                }
            }
        }
    }

    fn count(&self, job: &Rc<Job>, bytes: u64) {
        job.add_done(bytes);
        if self.grows {
            job.set_total(job.done() + self.left_bytes());
        }
    }

    /// Decides what becomes of a piece that failed.
    async fn handle(
        &self,
        job: &Rc<Job>,
        area: Area,
        failure: CopyFailure,
        copied: &mut Copied,
    ) -> Result<(), Stopped> {
        let is_read = failure.side == CopySide::Source;
        let policy = match failure.side {
            CopySide::Source => self.on_source_error,
            CopySide::Target => self.on_target_error,
        };
        match job.failed(policy, is_read, failure.error) {
            Action::Report => {
                self.todo.set(area.offset, area.bytes);
                Err(failure.error.into())
            }
            Action::Ignore if self.skips_failed => {
                copied.left_out.get_or_insert(failure);
                job.add_done(area.bytes);
                Ok(())
            }
            Action::Ignore => {
                self.todo.set(area.offset, area.bytes);
                job.control().context().delay(AFTER_IGNORED).await;
                Ok(())
            }
            Action::Stop => {
                self.todo.set(area.offset, area.bytes);
                Ok(())
            }
        }
    }
}

/// The next piece that ends, unless something is asked of the job before, or the delay is over.
async fn first(
    job: &Rc<Job>,
    piece: impl Future<Output = Option<Piece>>,
    delay: Option<Duration>,
    told: EventListener,
) -> Option<Piece> {
    let piece = async {
        match piece.await {
            // Nothing is under way: only the others can wake it.
            None => std::future::pending().await,
            ended => ended,
        }
    };
    let delayed = async {
        match delay {
            Some(delay) => job.control().context().delay(delay).await,
            None => std::future::pending().await,
        }
    };
    match select(pin!(piece), select(pin!(delayed), told)).await {
        Either::Left((piece, _)) => piece,
        Either::Right(_) => None,
    }
}
