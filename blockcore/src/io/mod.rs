//! The I/O API: moves data through a plan; any worker.
//!
//! A [`Plan`] is what a root's requests need of the graph, compiled when the graph changes: the nodes
//! below the root with their limits and modes. Each worker that serves the root has a [`Root`] for it.
//! Requests enter there, as a [`Request`], and go one of two ways:
//!
//! * [`Request::start_read`] and [`Request::start_write`] ask every layer *where* the bytes live and
//!   start one operation on the leaf. They allocate nothing and lock nothing; when a layer cannot
//!   answer at once they give the request back.
//! * [`Request::read`] and its kin are tasks: always there, always correct. Each layer's checks,
//!   alignment, splitting and fall-backs are in [`Io`], around its driver.
//!
//! Threads: a [`Root`] and everything below it stays on its worker; the plan and its drivers' I/O
//! halves are shared and change nothing but atomics.
//!
//! What a request goes through at each node, in this order: is the node read-only, is the range inside
//! it (a discard asks the other way round); a turn among requests that overlap, where one of them may
//! have to serialise; zeroes recognised; widening to the node's alignment; memory of our own where the
//! guest's will not do; cutting to the longest transfer; the driver; then dirty bits, thresholds and the
//! count of changes, before anybody is told.
//!
//! Not here: which nodes there are and who may use them ([`crate::graph`]), and how requests are held
//! back while that changes ([`crate::drain`]).

pub mod account;
pub mod align;
mod announced;
pub mod buffer;
mod context;
mod copy;
mod copy_on_read;
pub(crate) mod flush;
mod guard;
mod layer;
mod length;
mod plan;
pub mod policy;
mod root;
pub(crate) mod status;
pub mod tracked;
pub(crate) mod uses;
mod zero;

use futures_util::future::LocalBoxFuture;

pub use self::announced::{Announcement, MemoryRange};
pub use self::context::{ContextHandle, IoContext};
pub(crate) use self::guard::HeaderGuard;
pub use self::layer::{Fork, Io};
pub use self::plan::{Modes, Plan};
pub(crate) use self::plan::{PlanChild, PlanNode};
pub use self::root::{InFlight, Request, RequestKind, Root};
pub use self::uses::Using;
use crate::IoError;

/// Bounce buffers and zero buffers are at most this large; longer requests are cut.
const BOUNCE_BYTES: u64 = 1 << 20;

/// The longest node: the largest signed 64-bit number, rounded down to the largest alignment (as QEMU's
/// `BDRV_MAX_LENGTH`).
pub const MAX_BYTES: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// A future of an I/O function.
pub type IoFuture<'a, T = ()> = LocalBoxFuture<'a, Result<T, IoError>>;
