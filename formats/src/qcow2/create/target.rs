//! [`Target`]: what an image is made on, a node or a file that was just made.

use std::rc::Rc;
use std::sync::Arc;

use blockcore::driver::{Preallocation, TruncateFlags, WriteFlags, ZeroFlags};
use blockcore::engine::{Errno, HostCall, Op, OpenFile};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoContext};
use blockcore::{Error, ErrorKind, IoError};

use crate::file::prepare_space;

/// How much is written at once.
const STREAM_BYTES: usize = 1 << 20;

/// See the module's header.
pub(super) enum Target<'a> {
    /// A node, whose length may be fixed and that may have had other contents.
    Node(Io<'a>),
    /// A file that nobody else knows.
    File(Attached),
}

/// A file that can be used in operations of this context.
pub(super) struct Attached {
    context: Rc<IoContext>,
    file: Arc<OpenFile>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.context.engine().detach(self.file.id());
    }
}

impl Target<'_> {
    pub(super) fn file(context: &Rc<IoContext>, file: Arc<OpenFile>) -> Self {
        context.engine().attach(&file);
        Self::File(Attached {
            context: Rc::clone(context),
            file,
        })
    }

    fn failed_io(&self, what: &str, error: IoError) -> Error {
        let kind = match error {
            IoError::NoSpace | IoError::OutOfRange => ErrorKind::NoSpace,
            IoError::Unsupported => ErrorKind::Unsupported,
            IoError::ReadOnly => ErrorKind::PermissionDenied,
            _ => ErrorKind::Io,
        };
        let name = match self {
            Self::Node(io) => format!("node '{}'", io.name()),
            Self::File(attached) => format!("'{}'", attached.file.path().display()),
        };
        Error::new(kind, format!("cannot {what} {name}: {error}"))
    }

    fn failed(&self, what: &str, errno: Errno) -> Error {
        let Self::File(attached) = self else {
            unreachable!("nodes answer otherwise")
        };
        let path = attached.file.path().display();
        Error::host(format!("cannot {what} '{path}'"), errno)
    }

    /// Takes away what there is. Afterwards it is no image; where its length is fixed it may have its
    /// other contents.
    pub(super) async fn empty(&self) -> Result<(), Error> {
        let Self::Node(io) = self else { return Ok(()) };
        let none = TruncateFlags::empty();
        io.truncate(0, false, Preallocation::Off, none)
            .await
            .map_err(|error| self.failed_io("empty", error))?;
        // What began with a header must not look like an image while it is none.
        let head = io.bytes().min(STREAM_BYTES as u64);
        if head > 0 {
            io.write_zeroes(0, head, ZeroFlags::MAY_UNMAP)
                .await
                .map_err(|error| self.failed_io("empty", error))?;
            self.sync().await?;
        }
        Ok(())
    }

    /// Makes it at least `bytes` long, with space for what is added as `preallocation` says. Returns how
    /// long it was: what was added reads as zeroes.
    pub(super) async fn lengthen(
        &self,
        bytes: u64,
        preallocation: Preallocation,
    ) -> Result<u64, Error> {
        let preallocation = match preallocation {
            // Of no meaning to a file.
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        match self {
            Self::Node(io) => {
                let before = io.bytes();
                if bytes > before {
                    io.truncate(bytes, false, preallocation, TruncateFlags::ZERO)
                        .await
                        .map_err(|error| self.failed_io("make room in", error))?;
                }
                Ok(before)
            }
            Self::File(Attached { context, file }) => {
                let before = self.file_bytes().await?;
                if bytes > before {
                    prepare_space(context, file, (before, bytes), 1, preallocation)
                        .await
                        .map_err(|errno| self.failed("reserve space in", errno))?;
                    let call = HostCall::Truncate(Arc::clone(file), bytes);
                    let truncated = context.host(call).await;
                    truncated.map_err(|errno| self.failed("make room in", errno))?;
                }
                Ok(before)
            }
        }
    }

    async fn file_bytes(&self) -> Result<u64, Error> {
        let Self::File(Attached { context, file }) = self else {
            unreachable!("nodes know their length")
        };
        let call = HostCall::Metadata(Arc::clone(file));
        match context.host(call).await {
            Ok(blockcore::engine::HostReply::Metadata(metadata)) => Ok(metadata.bytes),
            Ok(reply) => unreachable!("a stat answered with {reply:?}"),
            Err(errno) => Err(self.failed("look at", errno)),
        }
    }

    /// Makes a range read as zeroes that may have other contents.
    pub(super) async fn zero(&self, begin: u64, end: u64) -> Result<(), Error> {
        let bytes = end.saturating_sub(begin);
        let Self::Node(io) = self else {
            // Nobody has written there.
            return Ok(());
        };
        if bytes == 0 {
            return Ok(());
        }
        let zeroed = io.write_zeroes(begin, bytes, ZeroFlags::empty()).await;
        zeroed.map_err(|error| self.failed_io("zero", error))
    }

    /// Writes `bytes` at `offset`.
    pub(super) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let memory = Segments::allocate(bytes.len(), 4096);
        memory.copy_from(bytes);
        match self {
            Self::Node(io) => io
                .write(offset, memory, WriteFlags::empty())
                .await
                .map_err(|error| self.failed_io("write to", error)),
            Self::File(Attached { context, file }) => {
                let mut done = 0;
                while done < memory.bytes() {
                    let op = Op::Write {
                        file: file.id(),
                        offset: offset + done,
                        segments: memory.slice(done, memory.bytes() - done),
                    };
                    match context.op(op).await.0 {
                        Ok(0) => return Err(self.failed("write to", Errno::NOSPC)),
                        Ok(moved) => done += moved,
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(self.failed("write to", errno)),
                    }
                }
                Ok(())
            }
        }
    }

    /// Makes everything durable.
    pub(super) async fn sync(&self) -> Result<(), Error> {
        match self {
            Self::Node(io) => {
                let flushed = io.flush().await;
                flushed.map_err(|error| self.failed_io("flush", error))
            }
            Self::File(Attached { context, file }) => {
                let synced = context.op(Op::Sync { file: file.id() }).await.0;
                synced.map_err(|errno| self.failed("flush", errno))?;
                Ok(())
            }
        }
    }
}

/// Writes one after the other, in large pieces.
pub(super) struct Stream<'t, 'a> {
    target: &'t Target<'a>,
    /// Where what is kept back belongs.
    offset: u64,
    kept: Vec<u8>,
}

impl<'t, 'a> Stream<'t, 'a> {
    /// From `offset` on.
    pub(super) fn new(target: &'t Target<'a>, offset: u64) -> Self {
        Self {
            target,
            offset,
            kept: Vec::new(),
        }
    }

    pub(super) async fn bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.kept.extend(bytes);
        if self.kept.len() >= STREAM_BYTES {
            self.put().await?;
        }
        Ok(())
    }

    /// Writes numbers of 8 bytes, and zeroes up to `bytes`.
    pub(super) async fn words(
        &mut self,
        words: impl Iterator<Item = u64>,
        bytes: u64,
    ) -> Result<(), Error> {
        let mut left = bytes;
        for word in words {
            self.bytes(&word.to_be_bytes()).await?;
            left -= 8;
        }
        let zeroes = [0; 4096];
        while left > 0 {
            let piece = left.min(4096);
            self.bytes(&zeroes[..piece as usize]).await?;
            left -= piece;
        }
        Ok(())
    }

    /// Writes what is kept back.
    pub(super) async fn end(mut self) -> Result<(), Error> {
        self.put().await
    }

    async fn put(&mut self) -> Result<(), Error> {
        if !self.kept.is_empty() {
            self.target.write(self.offset, &self.kept).await?;
            self.offset += self.kept.len() as u64;
            self.kept.clear();
        }
        Ok(())
    }
}
