//! Drivers `file` and `host_device`: a regular file or a block device of the host.
//!
//! The leaf of almost every chain. Requests go to the engine as they are; what the host leaves undone
//! (short transfers, interrupted calls) is seen through to the end here, and what it cannot do has a
//! fall-back.
//!
//! A failed flush is final for a description whose data goes through the page cache: Linux may have
//! marked pages clean that never reached the disk, so from then on every flush fails until the node
//! is opened again.

mod create;
mod lock;
mod sync;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockcore::driver::{
    Driver, DriverIo, DriverType, Limits, Mapping, OpenModes, OpenRequest, Opened, Reopened,
    WriteFlags, ZeroFlags,
};
use blockcore::engine::{
    Allocate, Errno, FileType, HostCall, HostReply, Metadata, Op, OpenFile, OpenOptions,
};
use blockcore::graph::permission::Permissions;
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoContext, IoFuture, Root, align};
use blockcore::options::{OptionKind, OptionSpec};
use blockcore::{Error, ErrorKind, IoError};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

pub use self::create::CREATE_OPTIONS;
use self::lock::Locks;
use self::sync::SyncGroup;

/// Driver `file`, as registered.
pub static FILE: DriverType = DriverType {
    name: "file",
    about: "a regular file of the host",
    options: OPTIONS,
    open: |request| open(request, Kind::File).boxed_local(),
    create: Some(|context, options| create::create(context, options).boxed_local()),
    ..DriverType::PROTOCOL
};

/// Driver `host_device`, as registered.
pub static HOST_DEVICE: DriverType = DriverType {
    name: "host_device",
    about: "a block device of the host",
    options: OPTIONS,
    open: |request| open(request, Kind::Device).boxed_local(),
    ..DriverType::PROTOCOL
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "filename",
        kind: OptionKind::Text,
        default: None,
        reopen: false,
        changes_data: true,
        help: "path of the file or device",
    },
    OptionSpec {
        name: "locking",
        kind: OptionKind::Choice(&["auto", "on", "off"]),
        default: Some("auto"),
        reopen: false,
        changes_data: false,
        help: "whether to keep other processes out (auto: where the file system can)",
    },
];

/// How often a call that the host puts off (`EAGAIN`) is tried again, a millisecond apart.
const MAX_PUT_OFF: u32 = 10_000;

/// Longest range for one call that zeroes or deallocates: these cannot be interrupted.
const MAX_RANGE_BYTES: u64 = 1 << 30;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    File,
    Device,
}

/// The I/O half; see the module's header.
struct FileIo {
    files: [Arc<OpenFile>; 1],
    bytes: AtomicU64,
    device: bool,
    direct: bool,
    request_alignment: u64,
    syncs: SyncGroup,
    /// Cleared when the host says that it cannot, so that it is asked once.
    can_zero_range: AtomicBool,
    can_punch: AtomicBool,
}

/// The global-state half.
struct FileDriver {
    path: String,
    limits: Limits,
    force_share: bool,
    /// `None` where an operator wants none.
    locks: Option<Rc<Locks>>,
}

async fn open(request: OpenRequest, kind: Kind) -> Result<Opened, Error> {
    let path = request.options.text(OPTIONS, "filename").to_owned();
    let modes = request.modes;
    let context = Rc::clone(&request.context);
    let file = match request.file {
        Some(file) => file,
        None => open_file(&context, &path, modes).await?,
    };
    let metadata = metadata(&context, &file).await?;
    check_type(&path, kind, &metadata)?;
    let locking = request.options.text(OPTIONS, "locking");
    let locks = (locking != "off")
        .then(|| Locks::new(Rc::clone(&context), Arc::clone(&file), locking == "auto"));
    if metadata.read_only && !modes.read_only {
        return Err(Error::new(
            ErrorKind::PermissionDenied,
            format!("device '{path}' is read-only: open it with 'read-only=on'"),
        ));
    }
    if modes.direct
        && !metadata
            .bytes
            .is_multiple_of(u64::from(metadata.direct_alignment))
    {
        return Err(Error::invalid(format!(
            "'{path}' has {} bytes, not a multiple of the {} that direct I/O needs there: use the \
             page cache (cache mode writeback or writethrough) or extend it",
            metadata.bytes, metadata.direct_alignment
        )));
    }
    let limits = limits(&metadata);
    let io = FileIo {
        bytes: AtomicU64::new(metadata.bytes),
        device: metadata.file_type == FileType::BlockDevice,
        direct: modes.direct,
        request_alignment: u64::from(limits.request_alignment),
        syncs: SyncGroup::default(),
        can_zero_range: AtomicBool::new(true),
        can_punch: AtomicBool::new(true),
        files: [file],
    };
    Ok(Opened {
        driver: Box::new(FileDriver {
            path,
            limits,
            force_share: modes.force_share,
            locks,
        }),
        io: Arc::new(io),
    })
}

async fn open_file(
    context: &IoContext,
    path: &str,
    modes: OpenModes,
) -> Result<Arc<OpenFile>, Error> {
    let options = OpenOptions {
        write: !modes.read_only,
        direct: modes.direct,
        create: false,
    };
    let call = HostCall::Open(path.into(), options);
    let opened = match context.host(call).await {
        Ok(HostReply::File(file)) => return Ok(file),
        Ok(reply) => unreachable!("an open answered with {reply:?}"),
        Err(error) => error,
    };
    let for_what = if modes.read_only {
        "reading"
    } else {
        "reading and writing"
    };
    let what_next = match opened {
        Errno::INVAL if modes.direct => {
            " (its file system has no direct I/O: use cache mode writeback or writethrough)"
        }
        Errno::ACCESS | Errno::PERM | Errno::ROFS if !modes.read_only => {
            " (read-only access may do: --read-only, or 'read-only=on')"
        }
        _ => "",
    };
    Err(Error::host(
        format!("cannot open '{path}' for {for_what}{what_next}"),
        opened,
    ))
}

async fn metadata(context: &IoContext, file: &Arc<OpenFile>) -> Result<Metadata, Error> {
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

fn limits(metadata: &Metadata) -> Limits {
    let discard = metadata.discard_granularity_bytes;
    // The page cache hides a device's blocks from reads and writes only.
    let range_alignment = match metadata.file_type {
        FileType::BlockDevice => metadata.logical_block_bytes,
        _ => 1,
    };
    Limits {
        request_alignment: metadata.direct_alignment,
        memory_alignment: metadata.memory_alignment,
        zero_alignment: range_alignment,
        discard_alignment: range_alignment,
        max_zero_bytes: MAX_RANGE_BYTES,
        max_discard_bytes: MAX_RANGE_BYTES,
        discard_granularity_bytes: discard,
        physical_block_bytes: metadata.physical_block_bytes,
        logical_block_bytes: match metadata.file_type {
            FileType::BlockDevice => metadata.logical_block_bytes,
            _ => 512,
        },
        optimal_io_bytes: metadata.optimal_io_bytes,
        ..Limits::default()
    }
}

impl Driver for FileDriver {
    fn close(&mut self, _root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            // The description closes, and its locks go, with the last engine that has it attached.
            if let Some(locks) = &self.locks {
                locks.settle().await;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn limits(&self, _children: &[Option<Limits>]) -> Limits {
        self.limits
    }

    fn exact_name(&self) -> Option<String> {
        Some(self.path.clone())
    }

    fn prepare_permissions(
        &mut self,
        _context: Rc<IoContext>,
        needs: Permissions,
        shares: Permissions,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            if let Some(locks) = &self.locks {
                let shares = match self.force_share {
                    true => Permissions::all(),
                    false => shares,
                };
                locks.prepare(needs, shares).await?;
            }
            Ok(Reopened::default())
        }
        .boxed_local()
    }

    fn commit_permissions(&mut self) {
        if let Some(locks) = &self.locks {
            locks.commit();
        }
    }

    fn abort_permissions(&mut self) {
        if let Some(locks) = &self.locks {
            locks.abort();
        }
    }
}

impl FileIo {
    fn file(&self) -> &Arc<OpenFile> {
        &self.files[0]
    }

    /// How much of a short transfer counts: direct I/O goes on at an aligned offset.
    fn progress(&self, bytes: u64) -> u64 {
        match self.direct {
            true => align::down(bytes, self.request_alignment),
            false => bytes,
        }
    }

    /// Asks the host for one sync; [`SyncGroup`] sees to it that there is one at a time.
    ///
    /// # Cancellation
    ///
    /// The host goes on, and its answer is taken for a failure: it may be one.
    async fn sync(&self, io: Io<'_>) -> Result<(), IoError> {
        let file = self.file();
        if file.flush_lost() {
            return Err(IoError::FlushLost);
        }
        let mut unheard = Unheard((!self.direct).then_some(file));
        let result = io.context().op(Op::Sync { file: file.id() }).await.0;
        let Err(error) = result else {
            unheard.0 = None;
            return Ok(());
        };
        let path = file.path().display();
        tracing::error!(%path, %error, "flush failed");
        if self.direct {
            return Err(error.into());
        }
        Err(IoError::FlushLost)
    }

    /// Whether the file has nothing from `offset` on, as the host sees it now.
    async fn ends_by(&self, io: Io<'_>, offset: u64) -> Result<bool, IoError> {
        let call = HostCall::Metadata(Arc::clone(self.file()));
        match io.context().host(call).await {
            Ok(HostReply::Metadata(metadata)) => Ok(offset >= metadata.bytes),
            Ok(reply) => unreachable!("a stat answered with {reply:?}"),
            Err(error) => Err(error.into()),
        }
    }

    async fn range(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        mode: Allocate,
    ) -> Result<(), IoError> {
        let mut patience = Patience::default();
        loop {
            let op = Op::Allocate {
                file: self.file().id(),
                offset,
                bytes,
                mode,
            };
            match io.context().op(op).await.0 {
                Ok(_) => return Ok(()),
                Err(error) => patience.again(io, error).await?,
            }
        }
    }

    async fn device(&self, io: Io<'_>, call: HostCall) -> Result<(), IoError> {
        match io.context().host(call).await {
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn zero(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        if flags.contains(ZeroFlags::MAY_UNMAP) && self.can_punch.load(Ordering::Relaxed) {
            match self.range(io, offset, bytes, Allocate::PunchHole).await {
                Err(IoError::Unsupported) => self.can_punch.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        if self.can_zero_range.load(Ordering::Relaxed) {
            match self.range(io, offset, bytes, Allocate::ZeroRange).await {
                Err(IoError::Unsupported) => self.can_zero_range.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        if self.device {
            let call = HostCall::DeviceZero(Arc::clone(self.file()), offset, bytes);
            return self.device(io, call).await;
        }
        Err(IoError::Unsupported)
    }
}

/// A file whose sync has not been heard to succeed: dropping this makes every later flush fail.
struct Unheard<'a>(Option<&'a Arc<OpenFile>>);

impl Drop for Unheard<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            file.set_flush_lost();
        }
    }
}

/// How long a host that puts a request off is asked again.
#[derive(Default)]
struct Patience {
    put_off: u32,
}

impl Patience {
    /// Returns if the request should be made again.
    async fn again(&mut self, io: Io<'_>, error: Errno) -> Result<(), IoError> {
        match error {
            Errno::INTR => Ok(()),
            Errno::AGAIN if self.put_off < MAX_PUT_OFF => {
                self.put_off += 1;
                io.context().delay(Duration::from_millis(1)).await;
                Ok(())
            }
            error => Err(error.into()),
        }
    }
}

impl DriverIo for FileIo {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    fn refresh_bytes<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        async move {
            let metadata = metadata(io.context(), self.file()).await;
            let metadata = metadata.map_err(|_| IoError::Failed)?;
            self.bytes.store(metadata.bytes, Ordering::Release);
            Ok(())
        }
        .boxed_local()
    }

    fn files(&self) -> &[Arc<OpenFile>] {
        &self.files
    }

    fn map(&self, _write: bool, offset: u64, _bytes: u64) -> Mapping {
        Mapping::File {
            file: self.file().id(),
            offset,
        }
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            let bytes = into.bytes();
            let (mut done, mut patience) = (0, Patience::default());
            while done < bytes {
                let rest = into.slice(done, bytes - done);
                let op = Op::Read {
                    file: self.file().id(),
                    offset: offset + done,
                    segments: rest,
                };
                match io.context().op(op).await.0 {
                    Ok(moved) => {
                        let progress = self.progress(moved);
                        done += progress;
                        if progress > 0 {
                            continue;
                        }
                        if moved == 0 || self.ends_by(io, offset + done + moved).await? {
                            // Somebody cut the file short under us: what is not there is zero.
                            let rest = into.slice(done + moved, bytes - done - moved);
                            rest.fill(0);
                            return Ok(());
                        }
                        // Less than direct I/O could go on from: once more from the same place.
                        patience.again(io, Errno::AGAIN).await?;
                    }
                    Err(error) => patience.again(io, error).await?,
                }
            }
            Ok(())
        }
        .boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        _flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            let bytes = from.bytes();
            let (mut done, mut patience) = (0, Patience::default());
            while done < bytes {
                let op = Op::Write {
                    file: self.file().id(),
                    offset: offset + done,
                    segments: from.slice(done, bytes - done),
                };
                match io.context().op(op).await.0 {
                    Ok(moved) => {
                        let progress = self.progress(moved);
                        if moved == 0 {
                            // The host takes no more and does not say why: a full disk, as a rule.
                            return Err(IoError::NoSpace);
                        }
                        if progress == 0 {
                            // Less than direct I/O could go on from: once more from the same place.
                            patience.again(io, Errno::AGAIN).await?;
                        }
                        done += progress;
                    }
                    Err(error) => patience.again(io, error).await?,
                }
            }
            // A parent that may resize writes past the end.
            self.bytes.fetch_max(offset + bytes, Ordering::AcqRel);
            Ok(())
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
        self.zero(io, offset, bytes, flags).boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            if self.device {
                let call = HostCall::DeviceDiscard(Arc::clone(self.file()), offset, bytes);
                return self.device(io, call).await;
            }
            if !self.can_punch.load(Ordering::Relaxed) {
                return Err(IoError::Unsupported);
            }
            let result = self.range(io, offset, bytes, Allocate::PunchHole).await;
            if result == Err(IoError::Unsupported) {
                self.can_punch.store(false, Ordering::Relaxed);
            }
            result
        }
        .boxed_local()
    }

    fn flush_to_disk<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        self.syncs.join(self.sync(io)).boxed_local()
    }
}
