//! Driver `raw`: its child's bytes as they are, or a range of them.

use blockcore::driver::{
    ChildSpec, Driver, DriverIo, DriverKind, DriverType, Limits, Mapping, OpenRequest, Opened,
    Role, ZeroFlags,
};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture};
use blockcore::options::{OptionKind, OptionSpec};
use blockcore::{Error, IoError};
use futures_util::FutureExt;
use std::sync::Arc;

/// Driver `raw`, as registered.
pub static RAW: DriverType = DriverType {
    name: "raw",
    about: "the bytes of a file or device as they are",
    kind: DriverKind::Format,
    options: OPTIONS,
    children: &[ChildSpec {
        name: "file",
        role: Role::Storage,
    }],
    open: |request| async move { open(&request) }.boxed_local(),
    create: None,
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "offset",
        kind: OptionKind::Size,
        default: Some("0"),
        reopen: true,
        changes_data: true,
        help: "where the disk begins in its child, in bytes",
    },
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: Some(""),
        reopen: true,
        changes_data: true,
        help: "length of the disk in bytes; all that follows the offset by default",
    },
];

struct Raw {
    child: Arc<dyn DriverIo>,
    offset: u64,
    /// `None`: to the child's end, wherever that is.
    bytes: Option<u64>,
}

fn open(request: &OpenRequest) -> Result<Opened, Error> {
    let child = &request.children[0];
    let offset = request.options.size(OPTIONS, "offset");
    let bytes = request
        .options
        .get("size")
        .map(|_| request.options.size(OPTIONS, "size"));
    let whole = child.io.bytes();
    let room = whole.checked_sub(offset).ok_or_else(|| {
        Error::invalid(format!(
            "option 'offset' of node '{}' is {offset}, past the end of '{}' ({whole} bytes)",
            request.node_name, child.name
        ))
    })?;
    if let Some(bytes) = bytes.filter(|bytes| *bytes > room) {
        return Err(Error::invalid(format!(
            "option 'size' of node '{}' is {bytes}, but '{}' has only {room} bytes after the offset",
            request.node_name, child.name
        )));
    }
    let limits = Limits {
        // The child widens what is not aligned for it.
        request_alignment: 1,
        memory_alignment: 1,
        zero_alignment: 1,
        discard_alignment: 1,
        max_zero_bytes: 0,
        max_discard_bytes: 0,
        ..child.limits
    };
    Ok(Opened {
        driver: Box::new(Unit),
        io: Arc::new(Raw {
            child: Arc::clone(&child.io),
            offset,
            bytes,
        }),
        limits,
    })
}

/// Nothing to close.
struct Unit;

impl Driver for Unit {}

impl DriverIo for Raw {
    fn bytes(&self) -> u64 {
        let room = self.child.bytes().saturating_sub(self.offset);
        self.bytes.map_or(room, |bytes| bytes.min(room))
    }

    fn map(&self, _write: bool, offset: u64, _bytes: u64) -> Mapping {
        Mapping::Child {
            index: 0,
            offset: self.offset + offset,
        }
    }

    fn child_unit(&self, unit: u32) -> u32 {
        match self.offset {
            0 => unit,
            offset => unit.min(1 << offset.trailing_zeros().min(31)),
        }
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        io.child(0).read(self.offset + offset, into).boxed_local()
    }

    fn write<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        io.child(0).write(self.offset + offset, from).boxed_local()
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        let child = io.child(0);
        async move {
            // The child has the fall-back: nothing is left for this node's own.
            let flags = if io.modes().unmap {
                flags
            } else {
                flags - ZeroFlags::MAY_UNMAP
            };
            child.write_zeroes(self.offset + offset, bytes, flags).await
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        let child = io.child(0);
        async move {
            match self.offset.checked_add(offset) {
                Some(offset) => child.discard(offset, bytes).await,
                None => Err(IoError::OutOfRange),
            }
        }
        .boxed_local()
    }
}
