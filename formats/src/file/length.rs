//! Giving a file another length, and preparing space for what is added.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blockcore::IoError;
use blockcore::driver::{Preallocation, TruncateFlags};
use blockcore::engine::{Errno, HostCall, HostReply, Op, OpenFile};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoContext, align};

use super::io::FileIo;

/// How much [`Preallocation::Full`] writes at once.
const ZERO_BYTES: u64 = 1 << 20;

/// How often a write that moved less than direct I/O can go on from is tried again.
const MAX_TRIES: u32 = 100;

impl FileIo {
    /// See [`DriverIo::truncate`](blockcore::driver::DriverIo::truncate). A device keeps its length. A
    /// file that could not be made longer is as long as before.
    pub(super) async fn resize(
        &self,
        io: Io<'_>,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> Result<(), IoError> {
        if !self.is_writable() {
            return Err(IoError::ReadOnly);
        }
        if preallocation == Preallocation::Metadata {
            return Err(IoError::Unsupported);
        }
        let before = io.bytes();
        if self.is_device() {
            let is = self.host_bytes(io).await?;
            // What lies beyond the end that was known may be anything.
            let unknown = flags.contains(TruncateFlags::ZERO) && bytes > before;
            let fits = if exact { bytes == is } else { bytes <= is };
            if !fits || unknown || preallocation != Preallocation::Off {
                return Err(IoError::Unsupported);
            }
            self.bytes().store(is, Ordering::Release);
            return Ok(());
        }
        let bytes = match exact {
            true => bytes,
            false => align::up(bytes, self.request_alignment()),
        };
        if bytes <= before {
            self.set_length(io, bytes).await?;
        } else if let Err(error) = self.grow(io, before, bytes, preallocation, flags).await {
            if let Err(second) = self.set_length(io, before).await {
                let path = self.file().path().display();
                tracing::warn!(%path, error = %second, "cannot give a file its length again");
                self.bytes()
                    .store(self.host_bytes(io).await?, Ordering::Release);
            }
            return Err(error);
        }
        self.bytes().store(bytes, Ordering::Release);
        Ok(())
    }

    async fn grow(
        &self,
        io: Io<'_>,
        before: u64,
        bytes: u64,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> Result<(), IoError> {
        if flags.contains(TruncateFlags::ZERO) && self.host_bytes(io).await? > before {
            // Somebody made the file longer, and what they have there would shine through.
            self.set_length(io, before).await?;
        }
        let context = io.context();
        prepare_space(
            context,
            self.file(),
            (before, bytes),
            self.request_alignment(),
            preallocation,
        )
        .await?;
        self.set_length(io, bytes).await
    }

    async fn set_length(&self, io: Io<'_>, bytes: u64) -> Result<(), IoError> {
        let call = HostCall::Truncate(Arc::clone(self.file()), bytes);
        io.context().host(call).await?;
        Ok(())
    }

    /// The length as the host sees it now.
    pub(super) async fn host_bytes(&self, io: Io<'_>) -> Result<u64, IoError> {
        let call = HostCall::Metadata(Arc::clone(self.file()));
        match io.context().host(call).await? {
            HostReply::Metadata(metadata) => Ok(metadata.bytes),
            reply => unreachable!("a stat answered with {reply:?}"),
        }
    }
}

/// Prepares space from `from` to `to`, which are not less than the file's length, and at least whole units of
/// it. The length may have changed afterwards, also on failure. The file is attached.
///
/// # Errors
///
/// What the host says, `EOPNOTSUPP` where it cannot reserve space.
pub(crate) async fn prepare_space(
    context: &IoContext,
    file: &Arc<OpenFile>,
    (from, to): (u64, u64),
    unit: u64,
    preallocation: Preallocation,
) -> Result<(), Errno> {
    match preallocation {
        Preallocation::Reserve if to > from => {
            let call = HostCall::Reserve(Arc::clone(file), from, to - from);
            context.host(call).await?;
            Ok(())
        }
        Preallocation::Full => {
            // Where the file ends inside of a unit, that has its place already.
            let units = (align::up(from, unit), align::up(to, unit));
            write_zeroes(context, file, units, unit).await
        }
        _ => Ok(()),
    }
}

/// Writes zeroes from one multiple of `unit` to another.
async fn write_zeroes(
    context: &IoContext,
    file: &Arc<OpenFile>,
    (from, to): (u64, u64),
    unit: u64,
) -> Result<(), Errno> {
    let zeroes = Segments::allocate(ZERO_BYTES as usize, 4096);
    let mut tries = 0;
    for (piece, piece_bytes) in align::pieces(from, to - from, ZERO_BYTES) {
        let mut done = 0;
        while done < piece_bytes {
            let op = Op::Write {
                file: file.id(),
                offset: piece + done,
                segments: zeroes.slice(done, piece_bytes - done),
            };
            match context.op(op).await.0 {
                Ok(0) => return Err(Errno::NOSPC),
                Ok(moved) if moved >= unit => done += align::down(moved, unit),
                Ok(_) | Err(Errno::AGAIN) if tries < MAX_TRIES => {
                    tries += 1;
                    context.delay(Duration::from_millis(1)).await;
                }
                Ok(_) => return Err(Errno::IO),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}
