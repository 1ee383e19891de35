//! Driver `raw`: its child's bytes as they are, or a range of them.

use std::sync::Arc;

use blockcore::driver::{
    ChildPermissions, ChildQuery, Driver, DriverIo, DriverType, Limits, Mapping, MeasureSource,
    Measured, OpenRequest, Opened, Place, Preallocation, ReopenRequest, Reopened, Role, Status,
    StatusFlags, TruncateFlags, WriteFlags, ZeroFlags,
};
use blockcore::graph::permission::{self, Permissions};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture};
use blockcore::options::{OptionKind, OptionSpec, Options};
use blockcore::{Error, IoError};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

/// Driver `raw`, as registered.
pub static RAW: DriverType = DriverType {
    name: "raw",
    about: "the bytes of a file or device as they are",
    options: OPTIONS,
    // All of the child is passed through; a part of it only lies there.
    role: Some(|options, _| match is_whole(options) {
        true => Role::FILTERED.union(Role::PRIMARY),
        false => Role::DATA.union(Role::PRIMARY),
    }),
    // Anything is raw if it is nothing else.
    probe: Some(|_| 1),
    open: |request| async move { open(&request) }.boxed_local(),
    measure: Some(|options, source| async move { measure(&options, source) }.boxed_local()),
    ..DriverType::FORMAT
};

/// Disks are whole sectors long.
const SECTOR_BYTES: u64 = 512;

fn is_whole(options: &Options) -> bool {
    options.get("offset").is_none_or(|offset| offset == "0") && options.get("size").is_none()
}

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "offset",
        kind: OptionKind::Bytes,
        default: Some("0"),
        reopen: true,
        changes_data: true,
        help: "where the disk begins in its child, in bytes",
    },
    OptionSpec {
        name: "size",
        kind: OptionKind::Bytes,
        default: Some(""),
        reopen: true,
        changes_data: true,
        help: "length of the disk in bytes; all that follows the offset by default",
    },
];

struct Raw {
    offset: u64,
    /// `None`: to the child's end, wherever that is.
    bytes: Option<u64>,
}

fn open(request: &OpenRequest) -> Result<Opened, Error> {
    let child = request.children[0].as_ref().expect("not optional");
    let io = part(
        &request.options,
        &request.node_name,
        &child.name,
        child.bytes(),
    )?;
    Ok(Opened {
        driver: Box::new(RawDriver),
        io: Arc::new(io),
    })
}

/// What creation options of raw images say.
const CREATE_OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "size",
    kind: OptionKind::Size,
    default: Some("0"),
    reopen: false,
    changes_data: false,
    help: "length of the disk in bytes",
}];

/// As long as the disk is, whatever is in it: a file's holes do not make it shorter.
fn measure(options: &Options, source: Option<MeasureSource>) -> Result<Measured, Error> {
    options.check(&[CREATE_OPTIONS], "a raw image")?;
    let bytes = match source {
        Some(source) => source.root.bytes(),
        None => options.size(CREATE_OPTIONS, "size"),
    };
    let bytes = bytes
        .checked_next_multiple_of(SECTOR_BYTES)
        .ok_or_else(|| Error::invalid(format!("a raw image cannot have {bytes} bytes")))?;
    Ok(Measured {
        required_bytes: bytes,
        fully_allocated_bytes: bytes,
        bitmaps_bytes: None,
    })
}

/// The part of a child of `whole` bytes that the options name.
fn part(options: &Options, node: &str, child: &str, whole: u64) -> Result<Raw, Error> {
    let offset = options.size(OPTIONS, "offset");
    let bytes = options
        .get("size")
        .filter(|text| !text.is_empty())
        .map(|_| options.size(OPTIONS, "size"));
    if let Some(bytes) = bytes.filter(|bytes| !bytes.is_multiple_of(512)) {
        return Err(Error::invalid(format!(
            "Specified size is not multiple of 512: option 'size' of node '{node}' is {bytes}"
        )));
    }
    let room = whole.checked_sub(offset).ok_or_else(|| {
        Error::invalid(format!(
            "option 'offset' of node '{node}' is {offset}, past the end of '{child}' ({whole} bytes)"
        ))
    })?;
    if let Some(bytes) = bytes.filter(|bytes| *bytes > room) {
        return Err(Error::invalid(format!(
            "option 'size' of node '{node}' is {bytes}, but '{child}' has only {room} bytes after the \
             offset"
        )));
    }
    Ok(Raw { offset, bytes })
}

/// The global-state half: there is nothing but what the options say.
struct RawDriver;

impl Driver for RawDriver {
    fn limits(&self, children: &[Option<Limits>]) -> Limits {
        // The child widens what is not aligned for it.
        children[0].map_or_else(Limits::default, Limits::above)
    }

    /// A part of a child ends where it ends: nothing is ever written past it, so the right to is needed
    /// only for users who have it.
    fn child_permissions(&self, query: &ChildQuery) -> ChildPermissions {
        let writes = Permissions::WRITE | Permissions::RESIZE;
        let rule = permission::default_rule(query);
        ChildPermissions {
            needs: (rule.needs - writes) | (query.needs & writes),
            ..rule
        }
    }

    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            if request.changed().is_empty() {
                return Ok(Reopened::default());
            }
            let child = request.children[0].as_ref().expect("not optional");
            let node = &request.node_name;
            let io = part(&request.options, node, &child.name, child.bytes())?;
            Ok(Reopened {
                io: Some(Arc::new(io)),
            })
        }
        .boxed_local()
    }
}

impl Raw {
    /// Where an offset of the disk lies in the child.
    fn place(&self, offset: u64) -> Result<u64, IoError> {
        self.offset.checked_add(offset).ok_or(IoError::OutOfRange)
    }
}

impl DriverIo for Raw {
    fn bytes(&self, children: &[u64]) -> u64 {
        let room = children[0].saturating_sub(self.offset);
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

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::STABLE | WriteFlags::UNCHANGED
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move { io.child(0).read(self.place(offset)?, into).await }.boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move { io.child(0).write(self.place(offset)?, from, flags).await }.boxed_local()
    }

    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        async move {
            let place = self.place(offset)?;
            io.child(0).write_compressed(place, from).await
        }
        .boxed_local()
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        async move {
            let place = self.place(offset)?;
            // The child has the fall-back: nothing is left for this node's own.
            io.child(0).write_zeroes(place, bytes, flags).await
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move { io.child(0).discard(self.place(offset)?, bytes).await }.boxed_local()
    }

    fn block_status<'a>(
        &'a self,
        _io: Io<'a>,
        _exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        async move {
            Ok(Status {
                flags: StatusFlags::RAW | StatusFlags::PLACE,
                bytes,
                place: Place {
                    child: Some(0),
                    offset: self.place(offset)?,
                },
            })
        }
        .boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        io: Io<'a>,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        async move {
            if self.bytes.is_some() {
                // The options say how long it is.
                return Err(IoError::Unsupported);
            }
            let end = self.place(bytes)?;
            io.child(0).truncate(end, exact, preallocation, flags).await
        }
        .boxed_local()
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use blockcore::ErrorKind;
    use blockcore::engine::{EngineChoice, make};
    use blockcore::graph::{Control, Graph};
    use blockcore::io::IoContext;

    use super::*;

    #[test]
    fn a_raw_image_is_as_long_as_its_disk_in_whole_sectors() {
        let context = IoContext::new(make(EngineChoice::Threads).expect("threads are there"));
        let control = Control::new(Graph::new(crate::drivers()), Rc::clone(&context));
        let measured = |size: &str, node: Option<&'static str>| {
            let (control, mut options) = (control.clone(), Options::default());
            if !size.is_empty() {
                options.set("size", size);
            }
            context.block_on(async move {
                let measured = control.measure("raw", options, node).await?;
                assert_eq!(measured.bitmaps_bytes, None);
                Ok((measured.required_bytes, measured.fully_allocated_bytes))
            })
        };
        assert_eq!(measured("1000", None).map_err(error), Ok((1024, 1024)));
        let (adder, disk) = (control.clone(), "driver=null-co,node-name=disk,size=1536");
        let disk = Options::parse(disk, None).expect("well-formed");
        let added = context.block_on(async move { adder.add(disk).await });
        added.expect("nothing is opened");
        assert_eq!(measured("", Some("disk")).map_err(error), Ok((1536, 1536)));
        assert_eq!(
            measured("long", None).map_err(error),
            Err(ErrorKind::Invalid)
        );
        let refused = measured(&u64::MAX.to_string(), None).map_err(error);
        assert_eq!(refused, Err(ErrorKind::Invalid));
    }

    fn error(error: Error) -> ErrorKind {
        error.kind()
    }
}
