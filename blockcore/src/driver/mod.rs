//! What a format or a protocol implements: [`DriverType`], [`Driver`] and [`DriverIo`].
//!
//! A driver has two halves, as it has two kinds of caller. [`Driver`] is its global-state half: it
//! lives on the control thread with the graph, and is `!Send`. [`DriverIo`] is its I/O half: shared
//! by all workers, it moves data and changes nothing but what it guards itself. The pipeline in
//! [`crate::io`] stands in front of the I/O half and keeps its promises: ranges are inside the node,
//! aligned as the limits say, not longer than they allow, and no write comes to a read-only node.
//!
//! [`DriverType`] is what both are made from: data beside the driver's code, from which options are
//! parsed, checked and shown.
//!
//! A driver implements what it has; the defaults are the core's rules. A **filter** forwards what it
//! leaves out to the child that it filters, and refuses by implementing it and answering
//! [`IoError::Unsupported`](crate::IoError::Unsupported). A **format** or a **protocol** that leaves
//! something out cannot do it.

mod control;
mod io;
mod limits;

use std::rc::Rc;
use std::sync::Arc;

use bitflags::bitflags;
use futures_util::future::LocalBoxFuture;

pub use self::control::{
    Activation, BackingName, ChildPermissions, ChildQuery, Driver, ReopenRequest, Reopened,
};
pub use self::io::{
    CopyFlags, DriverInfo, DriverIo, Mapping, Place, Preallocation, SnapshotIo, Status,
    StatusFlags, TruncateFlags, WriteFlags, ZeroFlags,
};
pub use self::limits::Limits;
use crate::Error;
use crate::dirty_bitmap::Bits;
use crate::engine::OpenFile;
use crate::io::{IoContext, Modes, Root};
use crate::options::{OptionSpec, Options};

/// What kind of node a driver makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverKind {
    /// Talks to the host or a remote: the end of a chain.
    Protocol,
    /// Gives its child's bytes a meaning of its own. Its children are never probed, backing files
    /// without a recorded format excepted.
    Format,
    /// Passes data through unchanged, from and to one child.
    Filter,
}

bitflags! {
    /// What a child is to its parent. At least one of the first four; `FILTERED` and `COW` exclude
    /// the others but `PRIMARY`, and a node has at most one child of each of these three.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Role: u8 {
        /// Holds the parent's data.
        const DATA = 1;
        /// Holds the parent's metadata.
        const METADATA = 2;
        /// The node that a filter passes through.
        const FILTERED = 4;
        /// Where what the parent does not hold comes from.
        const COW = 8;
        /// The one that names the parent.
        const PRIMARY = 16;
        /// Holds everything of a format.
        const IMAGE = Self::DATA.bits() | Self::METADATA.bits() | Self::PRIMARY.bits();
    }
}

/// A child that nodes of a driver have.
#[derive(Debug)]
pub struct ChildSpec {
    /// The option that names it.
    pub name: &'static str,
    /// What it is to the parent.
    pub role: Role,
    /// A node without it can be opened.
    pub optional: bool,
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
    /// A child's role where that depends on the options; `None` for what `children` says.
    pub role: Option<fn(&Options, usize) -> Role>,
    /// Nodes can have a backing node and defer to it what they do not hold.
    pub backing: bool,
    /// Scores the first bytes of an image (at most [`PROBE_BYTES`], fewer if it is shorter) from 0
    /// ("not mine") to 100; pure. `None` for a driver that is never guessed.
    pub probe: Option<fn(&[u8]) -> u32>,
    /// The words before a colon that name this driver in a file name, with the function that turns
    /// such a name into options.
    pub prefixes: &'static [(&'static str, ParseName)],
    /// Opens a node.
    pub open: OpenFn,
    /// Makes an image; `None` if the driver has nothing to make.
    pub create: Option<CreateFn>,
}

/// How much of an image a probe sees.
pub const PROBE_BYTES: usize = 512;

/// Turns a file name with one of the driver's prefixes into its options.
pub type ParseName = fn(&str) -> Result<Options, Error>;

/// Opens a node: may do I/O, and on failure leaves nothing open.
pub type OpenFn = fn(OpenRequest) -> LocalBoxFuture<'static, Result<Opened, Error>>;

/// Makes an image from the driver's creation options; a failed creation leaves nothing behind.
pub type CreateFn = fn(Rc<IoContext>, Options) -> LocalBoxFuture<'static, Result<(), Error>>;

impl DriverType {
    /// What a filter's author starts from: no options, and one child called `file`.
    pub const FILTER: Self = Self {
        name: "",
        about: "",
        kind: DriverKind::Filter,
        options: &[],
        children: &[ChildSpec {
            name: "file",
            role: Role::FILTERED.union(Role::PRIMARY),
            optional: false,
        }],
        role: None,
        backing: false,
        probe: None,
        prefixes: &[],
        open: |_| unreachable!("a driver says how it opens"),
        create: None,
    };

    /// What a protocol's author starts from: no options and no children.
    pub const PROTOCOL: Self = Self {
        kind: DriverKind::Protocol,
        children: &[],
        ..Self::FILTER
    };

    /// What a format's author starts from: one child called `file` that holds everything.
    pub const FORMAT: Self = Self {
        kind: DriverKind::Format,
        children: &[ChildSpec {
            name: "file",
            role: Role::IMAGE,
            optional: false,
        }],
        ..Self::FILTER
    };

    /// The role of the child at `index` of a node with these options.
    pub fn child_role(&self, options: &Options, index: usize) -> Role {
        match self.role {
            Some(role) => role(options, index),
            None => self.children[index].role,
        }
    }
}

/// What a driver opens from.
pub struct OpenRequest {
    /// The context to do I/O with.
    pub context: Rc<IoContext>,
    /// The node's name, for messages.
    pub node_name: String,
    /// The driver's own options, checked against its table.
    pub options: Options,
    /// How the node is to be opened.
    pub modes: OpenModes,
    /// The children that were given, in the order of the driver's type; `None` for an optional one
    /// that was left out.
    pub children: Vec<Option<OpenChild>>,
    /// An open file to use instead of opening one by name.
    pub file: Option<Arc<OpenFile>>,
    /// Finds a dirty bitmap by the names of its node and its own.
    pub find_bitmap: FindBitmap,
}

/// Finds what a dirty bitmap has marked, by the names of its node and its own. Fails with
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound), or
/// [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt) if it means nothing.
pub type FindBitmap = Rc<dyn Fn(&str, &str) -> Result<Arc<Bits>, Error>>;

/// Common options that decide how a driver opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenModes {
    /// Without the right to write.
    pub read_only: bool,
    /// Fall back to reading only where writing is not allowed, and write only while somebody needs
    /// to.
    pub auto_read_only: bool,
    /// Past the host's page cache.
    pub direct: bool,
    /// Flushes do not reach the disk.
    pub no_flush: bool,
    /// Guests' discards are honoured.
    pub unmap: bool,
    /// Written zeroes become zeroed ranges.
    pub detect_zeroes: DetectZeroes,
    /// Lets others do whatever they like; for looking at an image that is in use.
    pub force_share: bool,
    /// Metadata may be stale and must not be written: another process owns the image for now.
    pub inactive: bool,
}

/// What becomes of written zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// The range is zeroed, and stays allocated.
    On,
    /// The range is zeroed, and may be deallocated if discards are honoured.
    Unmap,
}

impl From<OpenModes> for Modes {
    fn from(open: OpenModes) -> Self {
        Self {
            read_only: open.read_only || open.inactive,
            unmap: open.unmap,
            no_flush: open.no_flush,
            detect_zeroes: open.detect_zeroes,
        }
    }
}

/// A child as its parent's driver sees it when it opens.
#[derive(Clone)]
pub struct OpenChild {
    /// The child's name.
    pub name: String,
    /// Reads and writes it while the parent opens. It ends with the opening.
    pub root: Rc<Root>,
    /// Its limits.
    pub limits: Limits,
}

impl OpenChild {
    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.root.bytes()
    }
}

/// An opened node's two halves.
pub struct Opened {
    /// For the control thread.
    pub driver: Box<dyn Driver>,
    /// For the workers.
    pub io: Arc<dyn DriverIo>,
}
