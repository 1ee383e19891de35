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
//!
//! # Two small drivers, whole
//!
//! A protocol that keeps a disk in memory, and a filter that counts what passes through it.
//!
//! ```
//! use std::rc::Rc;
//! use std::sync::Mutex;
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! use blockcore::driver::{Driver, DriverIo, DriverType, Opened, WriteFlags};
//! use blockcore::engine::{EngineChoice, make};
//! use blockcore::graph::{Control, Graph, RootSpec};
//! use blockcore::io::buffer::Segments;
//! use blockcore::io::{Io, IoContext, IoFuture};
//! use blockcore::options::{OptionKind, OptionSpec, Options};
//! use futures_util::FutureExt;
//!
//! /// What operators may say: parsed, checked and explained from this table.
//! const OPTIONS: &[OptionSpec] = &[OptionSpec {
//!     name: "size",
//!     kind: OptionKind::Size,
//!     default: Some("64k"),
//!     reopen: false,
//!     changes_data: true,
//!     help: "length of the disk in bytes",
//! }];
//!
//! static MEMORY: DriverType = DriverType {
//!     name: "memory",
//!     about: "a disk in this process's memory",
//!     options: OPTIONS,
//!     open: |request| {
//!         async move {
//!             let bytes = request.options.size(OPTIONS, "size");
//!             Ok(Opened {
//!                 driver: Box::new(Nothing),
//!                 io: std::sync::Arc::new(Memory(Mutex::new(vec![0; bytes as usize]))),
//!             })
//!         }
//!         .boxed_local()
//!     },
//!     ..DriverType::PROTOCOL
//! };
//!
//! static COUNT: DriverType = DriverType {
//!     name: "count",
//!     about: "counts the bytes that pass through it",
//!     open: |_request| {
//!         async {
//!             Ok(Opened {
//!                 driver: Box::new(Nothing),
//!                 io: std::sync::Arc::new(Count::default()),
//!             })
//!         }
//!         .boxed_local()
//!     },
//!     ..DriverType::FILTER
//! };
//!
//! /// The global-state half of both: they keep nothing there, and the core's rules will do.
//! struct Nothing;
//!
//! impl Driver for Nothing {}
//!
//! /// The bytes. The lock is held while some are copied, never over an await.
//! struct Memory(Mutex<Vec<u8>>);
//!
//! impl DriverIo for Memory {
//!     fn bytes(&self, _children: &[u64]) -> u64 {
//!         self.0.lock().unwrap().len() as u64
//!     }
//!
//!     // The pipeline has checked the range; what is left out here (zeroing, lengths) it does by
//!     // writing, or refuses.
//!     fn read<'a>(&'a self, _io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
//!         async move {
//!             into.copy_from(&self.0.lock().unwrap()[offset as usize..]);
//!             Ok(())
//!         }
//!         .boxed_local()
//!     }
//!
//!     fn write<'a>(
//!         &'a self,
//!         _io: Io<'a>,
//!         offset: u64,
//!         from: Segments,
//!         _flags: WriteFlags,
//!     ) -> IoFuture<'a> {
//!         async move {
//!             from.copy_to(&mut self.0.lock().unwrap()[offset as usize..]);
//!             Ok(())
//!         }
//!         .boxed_local()
//!     }
//! }
//!
//! #[derive(Default)]
//! struct Count {
//!     read: AtomicU64,
//!     written: AtomicU64,
//! }
//!
//! // What is left out is forwarded. `map` is left out too, so that every request comes here.
//! impl DriverIo for Count {
//!     fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
//!         self.read.fetch_add(into.bytes(), Ordering::Relaxed);
//!         io.child(0).read(offset, into).boxed_local()
//!     }
//!
//!     fn write<'a>(
//!         &'a self,
//!         io: Io<'a>,
//!         offset: u64,
//!         from: Segments,
//!         flags: WriteFlags,
//!     ) -> IoFuture<'a> {
//!         self.written.fetch_add(from.bytes(), Ordering::Relaxed);
//!         io.child(0).write(offset, from, flags).boxed_local()
//!     }
//!
//!     fn write_flags(&self) -> WriteFlags {
//!         WriteFlags::STABLE | WriteFlags::UNCHANGED
//!     }
//!
//!     fn statistics(&self) -> Vec<(&'static str, u64)> {
//!         let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
//!         vec![("read", value(&self.read)), ("written", value(&self.written))]
//!     }
//! }
//!
//! # fn main() -> Result<(), blockcore::Error> {
//! // One thread is both here: the control thread, and a worker.
//! let context = IoContext::new(make(EngineChoice::Threads)?);
//! let control = Control::new(Graph::new(vec![&MEMORY, &COUNT]), Rc::clone(&context));
//! let graph = control.clone();
//! context.block_on(async move {
//!     let disk = "driver=count,node-name=disk,file.driver=memory,file.size=1M";
//!     control.add(Options::parse(disk, None)?).await?;
//!     // The pipeline asks for no multiple of anything, so requests come in bytes.
//!     let root = control.add_root("disk", RootSpec::writer("an example")).await?;
//!     let root = control.root_here(root)?;
//!
//!     let memory = Segments::allocate(5, 1);
//!     memory.copy_from(b"hello");
//!     let written = root.write(4095, memory, WriteFlags::empty()).await;
//!     written.expect("inside the disk");
//!     let memory = Segments::allocate(7, 1);
//!     root.read(4094, memory.clone()).await.expect("inside the disk");
//!     assert_eq!(memory.to_vec(), b"\0hello\0");
//!
//!     let id = root.id();
//!     drop(root);
//!     control.remove_root(id).await
//! })?;
//! let seen = graph.read(|graph| Ok::<_, blockcore::Error>(graph.node("disk")?.io().statistics()))?;
//! assert_eq!(seen, [("read", 7), ("written", 5)]);
//! # Ok(())
//! # }
//! ```

mod control;
mod image;
mod io;
mod limits;

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use bitflags::bitflags;
use futures_util::future::LocalBoxFuture;

pub use self::control::{
    Activation, BackingName, ChildPermissions, ChildQuery, Driver, ReopenRequest, Reopened,
};
pub use self::image::{CheckReport, Fix, Measured, SnapshotInfo, SnapshotRef, SnapshotSpec};
pub use self::io::{
    CopyFlags, DriverInfo, DriverIo, Mapping, Place, Preallocation, SnapshotIo, Status,
    StatusFlags, TruncateFlags, WriteFlags, ZeroFlags,
};
pub use self::limits::Limits;
use crate::Error;
use crate::credentials::Credentials;
use crate::dirty_bitmap::{Bits, KeptBitmap};
use crate::engine::OpenFile;
use crate::io::{IoContext, Modes, Root};
use crate::options::{OptionSpec, Options};
use crate::throttle::Groups;

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
    /// Makes an image on nodes that there are, in place of what they hold; `None` if the driver cannot.
    pub create_on: Option<CreateOnFn>,
    /// What [`create`](Self::create) and [`create_on`](Self::create_on) take, children excepted.
    pub create_options: &'static [OptionSpec],
    /// What [`Driver::amend`] takes; none if images cannot be amended.
    pub amend_options: &'static [OptionSpec],
    /// How large an image becomes; `None` if the driver cannot tell.
    pub measure: Option<MeasureFn>,
}

/// How much of an image a probe sees.
pub const PROBE_BYTES: usize = 512;

/// Turns a file name with one of the driver's prefixes into its options.
pub type ParseName = fn(&str) -> Result<Options, Error>;

/// Opens a node: may do I/O, and on failure leaves nothing open.
pub type OpenFn = fn(OpenRequest) -> LocalBoxFuture<'static, Result<Opened, Error>>;

/// Makes an image from the driver's creation options; a failed creation leaves nothing behind.
pub type CreateFn = fn(Rc<IoContext>, Options) -> LocalBoxFuture<'static, Result<(), Error>>;

/// Makes an image on its children, given in the order of the driver's type, from the driver's creation
/// options. Of a failed creation no image is left.
pub type CreateOnFn =
    fn(Vec<Option<NewChild>>, Options) -> LocalBoxFuture<'static, Result<(), Error>>;

/// A node on which an image is made.
#[derive(Clone)]
pub struct NewChild {
    /// Reads, writes and resizes it.
    pub root: Rc<Root>,
    /// How the image is to call it, where it has to: relative to the image's own place.
    pub name: String,
}

/// Works out how large an image becomes that is made with these creation options: empty, or with what can
/// be read there. Without the latter, the options say how long the disk is.
pub type MeasureFn =
    fn(Options, Option<MeasureSource>) -> LocalBoxFuture<'static, Result<Measured, Error>>;

/// What would be copied to an image that is measured.
#[derive(Clone)]
pub struct MeasureSource {
    /// Reads it.
    pub root: Rc<Root>,
    /// The persistent bitmaps that its image keeps; `None` if images like that keep none.
    pub bitmaps: Option<Vec<KeptBitmap>>,
}

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
        create_on: None,
        create_options: &[],
        amend_options: &[],
        measure: None,
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
    /// Where throttle groups are found.
    pub throttle_groups: Groups,
    /// Where keys are found that options name.
    pub credentials: Credentials,
    /// Where memory that is to outlive this process is kept
    /// ([`HostCall::OpenSegment`](crate::engine::HostCall::OpenSegment)); `None`: nowhere.
    pub runtime_directory: Option<PathBuf>,
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
    /// Only to be checked, and perhaps repaired: what is wrong with the image's metadata is for the check
    /// to say and refuses nothing that it can do without, and there is no backing node.
    pub check: bool,
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
