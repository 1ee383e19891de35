//! [`FileIo`]: the I/O half, one for each way in which the file has been opened.
//!
//! Requests go to the engine as they are; what the host leaves undone (short transfers, interrupted
//! calls) is seen through to the end here, and what it cannot do has a fall-back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blockcore::IoError;
use blockcore::driver::{
    DriverIo, Mapping, Preallocation, Status, TruncateFlags, WriteFlags, ZeroFlags,
};
use blockcore::engine::{Allocate, Errno, HostCall, HostReply, Op, OpenFile};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture, align};
use futures_util::FutureExt;

use super::open::{Description, Way};
use crate::rounds::Rounds;

/// How often a call that the host puts off (`EAGAIN`) is tried again, a millisecond apart.
const MAX_PUT_OFF: u32 = 10_000;

/// See the module's header.
pub(super) struct FileIo {
    files: [Arc<OpenFile>; 1],
    way: Way,
    device: bool,
    request_alignment: u64,
    /// The node's, whichever half it has.
    bytes: Arc<AtomicU64>,
    /// One sync at a time: Linux reports a failed write-back once per open file description, so of two at
    /// the same time one gets the error, and the other may succeed although what it should have covered is
    /// lost.
    syncs: Rounds,
    /// Cleared when the host says that it cannot, so that it is asked once.
    can_zero_range: AtomicBool,
    can_punch: AtomicBool,
}

impl FileIo {
    /// For a node whose length is `bytes`.
    pub(super) fn new(description: &Description, bytes: Arc<AtomicU64>) -> Self {
        Self {
            files: [Arc::clone(&description.file)],
            way: description.way,
            device: description.is_device(),
            request_alignment: u64::from(description.limits().request_alignment),
            bytes,
            syncs: Rounds::default(),
            can_zero_range: AtomicBool::new(true),
            can_punch: AtomicBool::new(true),
        }
    }

    pub(super) fn file(&self) -> &Arc<OpenFile> {
        &self.files[0]
    }

    pub(super) fn way(&self) -> Way {
        self.way
    }

    pub(super) fn is_writable(&self) -> bool {
        self.way.write
    }

    pub(super) fn is_device(&self) -> bool {
        self.device
    }

    pub(super) fn request_alignment(&self) -> u64 {
        self.request_alignment
    }

    /// The length of the node, as far as it is known.
    pub(super) fn bytes(&self) -> &Arc<AtomicU64> {
        &self.bytes
    }

    /// Permissions keep those who may not write away; this is for who asks all the same.
    fn check_writable(&self) -> Result<(), IoError> {
        match self.is_writable() {
            true => Ok(()),
            false => Err(IoError::ReadOnly),
        }
    }

    /// How much of a short transfer counts: direct I/O goes on at an aligned offset.
    fn progress(&self, bytes: u64) -> u64 {
        match self.way.direct {
            true => align::down(bytes, self.request_alignment),
            false => bytes,
        }
    }

    /// Asks the host for one sync; [`Rounds`] sees to it that there is one at a time.
    ///
    /// # Cancellation
    ///
    /// The host goes on, and its answer is taken for a failure: it may be one.
    async fn sync(&self, io: Io<'_>) -> Result<(), IoError> {
        let file = self.file();
        if file.flush_lost() {
            return Err(IoError::FlushLost);
        }
        let mut unheard = Unheard((!self.way.direct).then_some(file));
        let result = io.context().op(Op::Sync { file: file.id() }).await.0;
        let Err(error) = result else {
            unheard.0 = None;
            return Ok(());
        };
        let path = file.path().display();
        tracing::error!(%path, %error, "flush failed");
        if self.way.direct {
            return Err(error.into());
        }
        Err(IoError::FlushLost)
    }

    /// Whether the file has nothing from `offset` on, as the host sees it now.
    async fn ends_by(&self, io: Io<'_>, offset: u64) -> Result<bool, IoError> {
        Ok(offset >= self.host_bytes(io).await?)
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

    /// Zeroes a range, and makes the file longer if it ends beyond its end.
    async fn zero(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        self.check_writable()?;
        self.zero_in_place(io, offset, bytes, flags).await?;
        let end = offset + bytes;
        if end > self.bytes.load(Ordering::Acquire) {
            // That changes no length. This does, and never makes a file shorter that another request
            // has made longer meanwhile.
            let call = HostCall::Reserve(Arc::clone(self.file()), offset, bytes);
            io.context().host(call).await?;
            self.bytes.fetch_max(end, Ordering::AcqRel);
        }
        Ok(())
    }

    async fn zero_in_place(
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
            let bytes = self.host_bytes(io).await?;
            self.bytes.store(bytes, Ordering::Release);
            Ok(())
        }
        .boxed_local()
    }

    fn files(&self) -> &[Arc<OpenFile>] {
        &self.files
    }

    fn map(&self, write: bool, offset: u64, _bytes: u64) -> Mapping {
        if write && !self.is_writable() {
            return Mapping::Ask;
        }
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
            self.check_writable()?;
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
                        self.bytes.fetch_max(offset + done, Ordering::AcqRel);
                    }
                    Err(error) => patience.again(io, error).await?,
                }
            }
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
            self.check_writable()?;
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

    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        self.status(io, exact, offset, bytes).boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        io: Io<'a>,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        self.resize(io, bytes, exact, preallocation, flags)
            .boxed_local()
    }

    fn allocated_bytes<'a>(&'a self, io: Io<'a>) -> IoFuture<'a, Option<u64>> {
        async move {
            let call = HostCall::Metadata(Arc::clone(self.file()));
            match io.context().host(call).await? {
                HostReply::Metadata(metadata) => Ok(Some(metadata.allocated_bytes)),
                reply => unreachable!("a stat answered with {reply:?}"),
            }
        }
        .boxed_local()
    }
}
