//! The block layer of stonework: a graph of nodes through which virtual disks are read and written.
//!
//! A **node** has a driver: a protocol at the end of a chain (a file on the host), a format that gives
//! its child's bytes a meaning, or a filter. Nodes are joined by edges that carry permissions. Whoever
//! uses a disk, an export or a job, uses a node.
//!
//! There are two APIs, and the compiler tells them apart:
//!
//! * [`graph`], the **global-state API**, opens, changes and closes nodes. It belongs to the control
//!   thread: everything in it is `!Send` and hangs on a [`graph::Control`].
//! * [`io`], the **I/O API**, moves data. It belongs to the workers: everything in it starts from an
//!   [`io::Root`], which has its worker's [`io::IoContext`] and a compiled [`io::Plan`], and cannot
//!   reach the graph.
//!
//! Who waits for whom: connection threads for the control thread, the control thread for workers,
//! workers for the kernel. Nobody waits the other way; a worker *posts* and goes on.
//!
//! Under `--cfg loom` only the modelled files are built: the model checker's locks and counts take the
//! place of real ones, and nothing else can use those.

#[cfg(not(loom))]
pub mod credentials;
pub mod dirty_bitmap;
#[cfg(not(loom))]
pub mod drain;
#[cfg(not(loom))]
pub mod driver;
#[cfg(not(loom))]
pub mod engine;
#[cfg(not(loom))]
pub mod error;
#[cfg(not(loom))]
pub mod executor;
#[cfg(not(loom))]
pub mod fault;
#[cfg(not(loom))]
pub mod filename;
#[cfg(not(loom))]
pub mod filter;
#[cfg(not(loom))]
pub mod graph;
#[cfg(not(loom))]
pub mod io;
#[cfg(not(loom))]
pub mod job;
pub mod mailbox;
#[cfg(not(loom))]
pub mod node;
#[cfg(not(loom))]
pub mod options;
pub(crate) mod sync;
#[cfg(not(loom))]
pub mod throttle;
#[cfg(not(loom))]
pub mod turns;
#[cfg_attr(loom, expect(dead_code, reason = "its users are not built there"))]
pub(crate) mod window;

#[cfg(not(loom))]
pub use error::{Error, ErrorKind, IoError};
