//! What a format or a protocol implements: [`DriverType`], [`Driver`] and [`DriverIo`].
//!
//! A driver has two halves, as it has two kinds of caller. [`Driver`] is its global-state half: it
//! lives on the control thread with the graph, and is `!Send`. [`DriverIo`] is its I/O half: shared
//! by all workers, it moves data and changes nothing but what it guards itself. The pipeline in
//! [`crate::io`] stands in front of the I/O half and keeps its promises: ranges are inside the node,
//! aligned as the limits say, and no write comes to a read-only node.
//!
//! A driver implements what it has; the defaults are the core's rules.

use std::rc::Rc;
use std::sync::Arc;

use bitflags::bitflags;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use crate::engine::{FileId, OpenFile};
use crate::io::buffer::Segments;
use crate::io::{Io, IoContext, IoFuture, Modes};
use crate::options::{OptionSpec, Options};
use crate::{Error, IoError};

/// What kind of node a driver makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverKind {
    /// Talks to the host or a remote: the end of a chain.
    Protocol,
    /// Gives its child's bytes a meaning of its own.
    Format,
    /// Passes data through unchanged.
    Filter,
}

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Holds the parent's data and metadata.
    Storage,
    /// The node that a filter passes through.
    Filtered,
    /// Where what the parent does not hold comes from.
    Backing,
}

/// A child that nodes of a driver have.
#[derive(Debug)]
pub struct ChildSpec {
    /// The option that names it.
    pub name: &'static str,
    /// What it is to the parent.
    pub role: Role,
}

/// A driver as it is registered: data beside its code.
pub struct DriverType {
    /// The word for `driver=` and `--format`.
    pub name: &'static str,
    /// One line for a person.
    pub about: &'static str,
    /// What kind of nodes it makes.
    pub kind: DriverKind,
    /// Every option it takes, children and common options excepted.
    pub options: &'static [OptionSpec],
    /// Its children, in the order in which the driver sees them.
    pub children: &'static [ChildSpec],
    /// Opens a node.
    pub open: OpenFn,
    /// Makes an image; `None` if the driver has nothing to make.
    pub create: Option<CreateFn>,
}

/// Opens a node: may do I/O, and on failure leaves nothing open.
pub type OpenFn = fn(OpenRequest) -> LocalBoxFuture<'static, Result<Opened, Error>>;

/// Makes an image from the driver's creation options; a failed creation leaves nothing behind.
pub type CreateFn = fn(Rc<IoContext>, Options) -> LocalBoxFuture<'static, Result<(), Error>>;

/// What a driver opens from.
pub struct OpenRequest {
    /// The context to do I/O with.
    pub context: Rc<IoContext>,
    /// The node's name, for messages.
    pub node_name: String,
    /// The driver's own options.
    pub options: Options,
    /// How the node is to be opened.
    pub modes: OpenModes,
    /// The children, opened already, in the order of the driver's type.
    pub children: Vec<OpenChild>,
    /// An open file to use instead of opening one by name.
    pub file: Option<Arc<OpenFile>>,
}

/// Common options that decide how a driver opens.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenModes {
    /// Without the right to write.
    pub read_only: bool,
    /// Past the host's page cache.
    pub direct: bool,
    /// Flushes do nothing.
    pub no_flush: bool,
    /// Guests' discards are honoured.
    pub unmap: bool,
}

impl From<OpenModes> for Modes {
    fn from(open: OpenModes) -> Self {
        Self {
            read_only: open.read_only,
            unmap: open.unmap,
            no_flush: open.no_flush,
        }
    }
}

/// A child as its parent's driver sees it when it opens.
#[derive(Clone)]
pub struct OpenChild {
    /// The child's name.
    pub name: String,
    /// Its I/O half.
    pub io: Arc<dyn DriverIo>,
    /// Its limits.
    pub limits: Limits,
}

/// An opened node's two halves.
pub struct Opened {
    /// For the control thread.
    pub driver: Box<dyn Driver>,
    /// For the workers.
    pub io: Arc<dyn DriverIo>,
    /// What requests must keep to.
    pub limits: Limits,
}

/// The global-state half of a node's driver; control thread only.
pub trait Driver {
    /// Lets go of everything, after the last request. Flushing has been done.
    ///
    /// # Errors
    ///
    /// What could not be written. The node is gone in any case.
    fn close(&mut self, context: Rc<IoContext>) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = context;
        async { Ok(()) }.boxed_local()
    }
}

/// Where the bytes of a request live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// In a child, all of them, from `offset` on.
    Child {
        /// Which child.
        index: usize,
        /// In bytes.
        offset: u64,
    },
    /// In a file, all of them, from `offset` on; the length is inside the file.
    File {
        /// Which file, one of [`DriverIo::files`].
        file: FileId,
        /// In bytes.
        offset: u64,
    },
    /// The driver must do the request itself.
    Ask,
}

/// The I/O half of a node's driver; any worker. See the module's header for what the pipeline
/// promises.
pub trait DriverIo: Send + Sync {
    /// The length in bytes.
    fn bytes(&self) -> u64;

    /// Files that [`map`](Self::map) or the driver's own requests name. Fixed while the node lives.
    fn files(&self) -> &[Arc<OpenFile>] {
        &[]
    }

    /// Where a request's bytes live, if that is known at once: no allocation, no lock, no wait.
    /// The range is inside the node and aligned.
    fn map(&self, write: bool, offset: u64, bytes: u64) -> Mapping {
        let _ = (write, offset, bytes);
        Mapping::Ask
    }

    /// The unit in which requests to the children come when those to the node come in multiples of
    /// `unit` (a power of two).
    fn child_unit(&self, unit: u32) -> u32 {
        unit
    }

    /// Reads. The driver sees short results of its host through to the end.
    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a>;

    /// Writes. The memory may be a guest's, which changes it: what must not change is copied.
    fn write<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a>;

    /// Makes a range read as zeroes better than by writing them. [`IoError::Unsupported`] sends the
    /// pipeline to do just that.
    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        let _ = (io, offset, bytes, flags);
        async { Err(IoError::Unsupported) }.boxed_local()
    }

    /// Deallocates a range. [`IoError::Unsupported`] is no error to the caller.
    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        let _ = (io, offset, bytes);
        async { Err(IoError::Unsupported) }.boxed_local()
    }

    /// Makes completed writes durable. The default flushes the children.
    fn flush<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        io.flush_children().boxed_local()
    }
}

bitflags! {
    /// What a caller wants of a write besides the data.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct WriteFlags: u8 {
        /// Durable when it completes (QEMU's `BDRV_REQ_FUA`).
        const STABLE = 1;
    }
}

bitflags! {
    /// How a range may be zeroed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ZeroFlags: u8 {
        /// The space may be given back.
        const MAY_UNMAP = 1;
        /// Rather fail than write zero buffers.
        const NO_FALLBACK = 2;
    }
}

/// What requests to a node must keep to, and what its users should know. Bytes; alignments are powers
/// of two; 0 is "no limit" for a maximum and "no preference" for the rest.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Offset and length must be multiples; the pipeline widens what is not.
    pub request_alignment: u32,
    /// Memory must be aligned so; the pipeline bounces what is not.
    pub memory_alignment: u32,
    /// Zeroing works on whole units.
    pub zero_alignment: u32,
    /// Discarding works on whole units; what lies in others is left as it is.
    pub discard_alignment: u32,
    /// Longest zeroing at once.
    pub max_zero_bytes: u64,
    /// Longest discard at once.
    pub max_discard_bytes: u64,
    /// Unit in which discarding is worth while.
    pub discard_granularity_bytes: u32,
    /// Smallest unit that the medium writes without reading first.
    pub physical_block_bytes: u32,
    /// Smallest block that the medium knows.
    pub logical_block_bytes: u32,
    /// Preferred unit of large transfers.
    pub optimal_io_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            memory_alignment: 1,
            zero_alignment: 1,
            discard_alignment: 1,
            max_zero_bytes: 0,
            max_discard_bytes: 0,
            discard_granularity_bytes: 0,
            physical_block_bytes: 512,
            logical_block_bytes: 512,
            optimal_io_bytes: 0,
        }
    }
}
