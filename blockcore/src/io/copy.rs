//! Copying by the host: from one node to another without the data passing through this process.
//!
//! Both ranges are followed down to the files where they lie, through every layer's checks; the host
//! then copies from file to file, sharing blocks where its file system can. It is never done any other
//! way: a caller who is told that it cannot be done copies by reading and writing, and stops asking.

use smallvec::SmallVec;

use super::layer::Changes;
use super::root::Request;
use super::tracked::Tracked;
use super::uses::Using;
use super::{Io, align};
use crate::IoError;
use crate::driver::{CopyFlags, Mapping, ZeroFlags};
use crate::engine::{Errno, FileId, HostCall, HostReply, OpenFile};
use std::sync::Arc;

/// What is held while a range is copied, for each layer.
type Held<'a> = SmallVec<[(Option<Tracked<'a>>, Option<Changes<'a>>, Option<Using<'a>>); 4]>;

/// Where a range lies.
struct Place<'a> {
    file: Arc<OpenFile>,
    offset: u64,
    _held: Held<'a>,
}

impl Request {
    /// Copies `bytes` bytes from `offset` of this request's root to `to_offset` of another's, on the
    /// same worker. With [`CopyFlags::ZERO`] zeroes the target instead.
    ///
    /// # Errors
    ///
    /// [`IoError::Unsupported`] where the host cannot, with nothing or a part copied; else as for
    /// [`read`](Request::read) and [`write`](Request::write).
    pub async fn copy_range(
        &self,
        offset: u64,
        to: &Self,
        to_offset: u64,
        bytes: u64,
        flags: CopyFlags,
    ) -> Result<(), IoError> {
        let (source, target) = (Io::root(self), Io::root(to));
        if flags.contains(CopyFlags::ZERO) {
            return target
                .write_zeroes(to_offset, bytes, ZeroFlags::NO_FALLBACK)
                .await;
        }
        if bytes == 0 {
            return Ok(());
        }
        let (from, into) = loop {
            let from = source.copy_place(false, true, offset, bytes).await?;
            match target.copy_place(true, false, to_offset, bytes).await {
                Ok(into) => break (from, into),
                Err(IoError::Busy) => {}
                Err(error) => return Err(error),
            }
            // Whoever is in the way of the target may wait for the source: it has to be let go, and both
            // are tried again when the target was free.
            drop(from);
            drop(target.copy_place(true, true, to_offset, bytes).await?);
        };
        let mut done = 0;
        while done < bytes {
            let call = HostCall::CopyRange {
                from: Arc::clone(&from.file),
                offset: from.offset + done,
                to: Arc::clone(&into.file),
                to_offset: into.offset + done,
                bytes: bytes - done,
            };
            match target.context().host(call).await {
                Ok(HostReply::Copied(0)) => return Err(IoError::Unsupported),
                Ok(HostReply::Copied(copied)) => done += copied,
                Ok(reply) => unreachable!("a copy answered with {reply:?}"),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::BADF) => return Err(IoError::Unsupported),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl<'a> Io<'a> {
    /// Follows a range down to its file, its turn had in every layer. [`IoError::Busy`] where that means
    /// waiting, and it is not to `wait`.
    async fn copy_place(
        self,
        write: bool,
        wait: bool,
        mut offset: u64,
        bytes: u64,
    ) -> Result<Place<'a>, IoError> {
        let mut held = Held::new();
        let mut layer = self;
        loop {
            let guarded = write && layer.node().guard.is_some();
            if guarded || !align::is_aligned(offset, bytes, layer.unit()) {
                return Err(IoError::Unsupported);
            }
            let check = || match write {
                true => layer.check_write(offset, bytes),
                false => layer.check(offset, bytes),
            };
            check()?;
            let turn = match wait {
                true => layer.track(offset, bytes, false).await,
                false => layer.try_track(offset, bytes, false)?,
            };
            if turn.is_some() {
                // Whoever was in the way may have cut off what is to be copied, or where to.
                check()?;
            }
            let marks = write.then(|| layer.changes(offset, bytes));
            held.push((turn, marks, None));
            let node = layer.node();
            match node.io.copy_place(layer, write, offset, bytes).await? {
                Mapping::Child { index, offset: to } => {
                    if node.may_move(index) {
                        let last = held.last_mut().expect("just pushed");
                        last.2 = Some(layer.using(index, to, bytes));
                    }
                    layer = layer.child(index);
                    offset = to;
                }
                Mapping::File { file, offset } => {
                    return Ok(Place {
                        file: layer.file(file)?,
                        offset,
                        _held: held,
                    });
                }
                Mapping::Ask => return Err(IoError::Unsupported),
            }
        }
    }

    fn file(self, id: FileId) -> Result<Arc<OpenFile>, IoError> {
        let mut files = self.node().io.files().iter();
        let file = files.find(|file| file.id() == id);
        file.cloned().ok_or(IoError::Unsupported)
    }
}
