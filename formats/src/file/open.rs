//! Opening a file of the host one way or another, and what is learnt from it.

use std::sync::Arc;

use blockcore::driver::{Limits, OpenModes};
use blockcore::engine::{Errno, FileType, HostCall, HostReply, Metadata, OpenFile, OpenOptions};
use blockcore::io::IoContext;
use blockcore::{Error, ErrorKind};

/// Longest range for one call that zeroes or deallocates: these cannot be interrupted.
const MAX_RANGE_BYTES: u64 = 1 << 30;

/// What an operator said that the path names.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    File,
    Device,
}

/// What decides with which flags a file is opened; other modes are the pipeline's affair.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Way {
    pub(super) write: bool,
    pub(super) direct: bool,
}

impl Way {
    /// How a node in these modes has its file open while it has writers or not.
    pub(super) fn new(modes: OpenModes, writers: bool) -> Self {
        Self {
            write: !modes.read_only && (!modes.auto_read_only || writers),
            direct: modes.direct,
        }
    }
}

/// An open file description, with what the host says of it.
pub(super) struct Description {
    pub(super) file: Arc<OpenFile>,
    pub(super) way: Way,
    pub(super) metadata: Metadata,
}

impl Description {
    /// Opens `path`, or takes a file that somebody else has opened so.
    pub(super) async fn open(
        context: &IoContext,
        path: &str,
        kind: Kind,
        way: Way,
        given: Option<Arc<OpenFile>>,
    ) -> Result<Self, Error> {
        let file = match given {
            Some(file) => file,
            None => open_file(context, path, way).await?,
        };
        let metadata = metadata(context, &file).await?;
        check_type(path, kind, &metadata)?;
        if metadata.read_only && way.write {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!("device '{path}' is read-only: open it with 'read-only=on'"),
            ));
        }
        Ok(Self {
            file,
            way,
            metadata,
        })
    }

    /// Which file it is, whatever names it has.
    pub(super) fn identity(&self) -> (u64, u64) {
        (self.metadata.device, self.metadata.inode)
    }

    pub(super) fn is_device(&self) -> bool {
        self.metadata.file_type == FileType::BlockDevice
    }

    /// What requests must keep to.
    pub(super) fn limits(&self) -> Limits {
        let metadata = &self.metadata;
        // The page cache hides a device's blocks from reads and writes only.
        let (range_alignment, logical_block_bytes) = match self.is_device() {
            true => (metadata.logical_block_bytes, metadata.logical_block_bytes),
            false => (1, 512),
        };
        Limits {
            request_alignment: metadata.direct_alignment,
            memory_alignment: metadata.memory_alignment,
            zero_alignment: range_alignment,
            discard_alignment: range_alignment,
            max_zero_bytes: MAX_RANGE_BYTES,
            max_discard_bytes: MAX_RANGE_BYTES,
            discard_granularity_bytes: metadata.discard_granularity_bytes,
            physical_block_bytes: metadata.physical_block_bytes,
            logical_block_bytes,
            optimal_io_bytes: metadata.optimal_io_bytes,
            ..Limits::default()
        }
    }
}

async fn open_file(context: &IoContext, path: &str, way: Way) -> Result<Arc<OpenFile>, Error> {
    let options = OpenOptions {
        write: way.write,
        direct: way.direct,
        create: false,
    };
    let call = HostCall::Open(path.into(), options);
    let refused = match context.host(call).await {
        Ok(HostReply::File(file)) => return Ok(file),
        Ok(reply) => unreachable!("an open answered with {reply:?}"),
        Err(error) => error,
    };
    let for_what = match way.write {
        true => "reading and writing",
        false => "reading",
    };
    let what_next = match refused {
        Errno::INVAL if way.direct => {
            " (its file system has no direct I/O: use cache mode writeback or writethrough)"
        }
        Errno::ACCESS | Errno::PERM | Errno::ROFS if way.write => {
            " (read-only access may do: --read-only, or 'read-only=on')"
        }
        _ => "",
    };
    Err(Error::host(
        format!("cannot open '{path}' for {for_what}{what_next}"),
        refused,
    ))
}

/// What the host says of an open file, now.
pub(super) async fn metadata(context: &IoContext, file: &Arc<OpenFile>) -> Result<Metadata, Error> {
    match context.host(HostCall::Metadata(Arc::clone(file))).await {
        Ok(HostReply::Metadata(mut metadata)) => {
            // Part of an aligned transfer, as after a short one, must have aligned memory too.
            let unit = metadata.direct_alignment.max(metadata.memory_alignment);
            metadata.direct_alignment = unit;
            Ok(*metadata)
        }
        Ok(reply) => unreachable!("a stat answered with {reply:?}"),
        Err(error) => Err(Error::host(
            format!("cannot examine '{}'", file.path().display()),
            error,
        )),
    }
}

fn check_type(path: &str, kind: Kind, metadata: &Metadata) -> Result<(), Error> {
    let wrong = match (metadata.file_type, kind) {
        (FileType::Regular, Kind::File) | (FileType::BlockDevice, _) => return Ok(()),
        (FileType::Regular, Kind::Device) => "regular file: use driver 'file'",
        (FileType::Other(what), _) => what,
    };
    Err(Error::invalid(format!("'{path}' is a {wrong}")))
}
