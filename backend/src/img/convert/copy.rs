//! [`Copy`]: the copying itself.
//!
//! Several streams each take the next piece, read it, and write it when those before it have been
//! written (or at once, if order does not matter): the target grows from its beginning to its end, the
//! same way each time.

use std::cell::Cell;
use std::time::Duration;

use blockcore::driver::{CopyFlags, ZeroFlags};
use blockcore::io::buffer::Segments;
use blockcore::turns::Turns;
use blockcore::{Error, IoError};
use futures_util::future;

use crate::img::Program;
use crate::img::open::Image;
use crate::img::progress::Progress;
use crate::img::walk::{self, SECTOR_BYTES};

/// Zeroes in a row that are left out unless `-S` says otherwise: a page of the host.
pub(super) const DEFAULT_SPARSE_BYTES: u64 = 4096;
/// Longest piece of data.
const CHUNK_BYTES: u64 = 2 << 20;
/// Longest piece of zeroes: a host may take a while for one.
const MAX_ZERO_BYTES: u64 = 1 << 30;

/// What becomes of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeroes {
    /// Nothing: the target has them already.
    Leave,
    /// The target is told that there are some.
    Write,
}

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) zeroes: Zeroes,
    /// As many zeroes in a row count as such; 0 if none do.
    pub(super) sparse_bytes: u64,
    /// Compressed, in clusters of so many bytes.
    pub(super) cluster_bytes: Option<u64>,
    /// Length of the target's backing image, which has what the source does not have itself.
    pub(super) backing_bytes: Option<u64>,
    pub(super) in_order: bool,
    pub(super) parallel: usize,
    /// Bytes per second.
    pub(super) rate: Option<u64>,
    /// The host copies, as long as it can.
    pub(super) by_host: bool,
    /// What cannot be read is zero.
    pub(super) salvage: bool,
    pub(super) quiet: bool,
}

/// What there is to do for a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Copy,
    Zero,
    /// The target has it from its backing image.
    Skip,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    offset: u64,
    bytes: u64,
    work: Work,
}

/// See the module's header.
pub(super) struct Copy<'a> {
    program: &'a Program,
    sources: Vec<Image>,
    target: Image,
    plan: Plan,
    /// Bytes of all sources.
    bytes: u64,
    finding: Turns,
    writing: Turns,
    next: Cell<u64>,
    done: Cell<u64>,
    by_host: Cell<bool>,
    /// When the bytes so far are paid for.
    paid: Cell<Duration>,
}

impl<'a> Copy<'a> {
    /// The sources one after the other, to the beginning of a target with room for them.
    pub(super) fn new(
        program: &'a Program,
        sources: Vec<Image>,
        target: Image,
        plan: Plan,
    ) -> Self {
        Self {
            program,
            bytes: sources.iter().map(Image::bytes).sum(),
            sources,
            target,
            by_host: Cell::new(plan.by_host),
            plan,
            finding: Turns::default(),
            writing: Turns::default(),
            next: Cell::new(0),
            done: Cell::new(0),
            paid: Cell::new(program.control.context().engine().now()),
        }
    }

    /// Copies everything.
    ///
    /// # Errors
    ///
    /// What could not be read or written; the target is incomplete.
    pub(super) async fn run(&self, progress: &Progress) -> Result<(), Error> {
        let streams = (0..self.plan.parallel).map(|_| self.stream(progress));
        future::try_join_all(streams).await.map(drop)
    }

    /// The images, to be closed.
    pub(super) fn into_images(self) -> (Vec<Image>, Image) {
        (self.sources, self.target)
    }

    async fn stream(&self, progress: &Progress) -> Result<(), Error> {
        let mut buffer = None;
        loop {
            let finding = self.finding.next().await;
            let Some(piece) = self.next_piece().await? else {
                return Ok(());
            };
            self.next.set(piece.offset + piece.bytes);
            // The place among the writes is taken with the piece.
            let place = self.plan.in_order.then(|| self.writing.next());
            drop(finding);
            self.pay(&piece).await;
            let mut work = piece.work;
            let mut data = None;
            if work == Work::Copy && self.by_host.get() && self.copy_by_host(&piece).await? {
                work = Work::Skip;
            }
            if work == Work::Copy {
                let whole = buffer.get_or_insert_with(|| self.buffer());
                let part = whole.slice(0, piece.bytes);
                self.read(piece.offset, part.clone()).await?;
                data = Some(part);
            }
            let _turn = match place {
                Some(place) => Some(place.await),
                None => None,
            };
            match (work, data) {
                (Work::Copy, Some(data)) => self.write(&piece, data).await?,
                (Work::Zero, _) => self.zero(piece.offset, piece.bytes).await?,
                _ => {}
            }
            self.done.set(self.done.get() + piece.bytes);
            progress.at(self.done.get(), self.bytes);
        }
    }

    fn buffer(&self) -> Segments {
        let bytes = CHUNK_BYTES.max(self.plan.cluster_bytes.unwrap_or(0));
        Segments::allocate(bytes as usize, 4096)
    }

    /// The source in which an offset lies, the offset there, and how many bytes it has from there on.
    fn locate(&self, offset: u64) -> (&Image, u64, u64) {
        let mut begin = 0;
        for source in &self.sources {
            let end = begin + source.bytes();
            if offset < end {
                return (source, offset - begin, end - offset);
            }
            begin = end;
        }
        unreachable!("offsets are inside the sources")
    }

    /// What comes next; `None` at the end.
    async fn next_piece(&self) -> Result<Option<Piece>, Error> {
        let offset = self.next.get();
        if offset >= self.bytes {
            return Ok(None);
        }
        let (source, inner, left) = self.locate(offset);
        let (extent, is_foreign) = match self.plan.backing_bytes {
            None => (source.extent(inner, left).await, false),
            // Only what the source's own layer has: the rest is in the target's backing image.
            Some(_) => {
                let extent = source.top_extent(inner, left).await;
                let is_foreign = extent.as_ref().is_ok_and(|extent| {
                    !extent.is_allocated() && !extent.is_zero() && !extent.is_data()
                });
                (extent, is_foreign)
            }
        };
        let extent = match extent {
            Ok(extent) => extent,
            Err(error) => {
                if !self.plan.salvage {
                    return Err(error);
                }
                let bytes = left.min(CHUNK_BYTES);
                return Ok(Some(self.whole_clusters(Piece {
                    offset,
                    bytes,
                    work: Work::Copy,
                })));
            }
        };
        let past_backing = self.plan.backing_bytes.is_some_and(|bytes| offset >= bytes);
        let work = match (extent.is_zero(), is_foreign) {
            (true, _) if past_backing => Work::Skip,
            (true, _) if self.plan.sparse_bytes == 0 => Work::Copy,
            (true, _) => Work::Zero,
            (_, true) => Work::Skip,
            _ => Work::Copy,
        };
        let most = match work {
            Work::Copy => CHUNK_BYTES,
            Work::Zero => MAX_ZERO_BYTES,
            Work::Skip => u64::MAX,
        };
        let bytes = extent.bytes.min(most);
        let piece = Piece {
            offset,
            bytes,
            work,
        };
        Ok(Some(self.whole_clusters(piece)))
    }

    /// Compressed data is written in whole clusters, up to the end: one at a time, and of ranges that
    /// need no data as many as there are.
    fn whole_clusters(&self, mut piece: Piece) -> Piece {
        let Some(cluster) = self.plan.cluster_bytes else {
            return piece;
        };
        let left = self.bytes - piece.offset;
        if piece.work != Work::Copy && (piece.bytes >= cluster || piece.bytes == left) {
            if piece.bytes < left {
                piece.bytes -= piece.bytes % cluster;
            }
            return piece;
        }
        piece.bytes = cluster.min(left);
        piece.work = Work::Copy;
        piece
    }

    /// Waits until a piece may be copied under the rate.
    async fn pay(&self, piece: &Piece) {
        let Some(rate) = self.plan.rate.filter(|_| piece.work == Work::Copy) else {
            return;
        };
        let context = self.program.control.context();
        let now = context.engine().now();
        let begin = self.paid.get().max(now);
        let costs = Duration::from_secs_f64(piece.bytes as f64 / rate as f64);
        self.paid.set(begin + costs);
        context.delay(begin - now).await;
    }

    /// Reads from as many sources as the range has to do with.
    async fn read(&self, offset: u64, into: Segments) -> Result<(), Error> {
        let mut done = 0;
        while done < into.bytes() {
            let (source, inner, left) = self.locate(offset + done);
            let part = into.slice(done, left.min(into.bytes() - done));
            let bytes = part.bytes();
            match source.read(inner, part.clone()).await {
                Ok(()) => {}
                Err(error) if !self.plan.salvage => return Err(error),
                Err(_) => self.salvage(source, inner, part).await,
            }
            done += bytes;
        }
        Ok(())
    }

    /// Reads what can be read; the rest is zero.
    async fn salvage(&self, source: &Image, offset: u64, into: Segments) {
        let mut done = 0;
        while done < into.bytes() {
            let part = into.slice(done, SECTOR_BYTES.min(into.bytes() - done));
            if let Err(error) = source.read(offset + done, part.clone()).await {
                part.fill(0);
                if !self.plan.quiet {
                    self.program.warn(error.report());
                }
            }
            done += part.bytes();
        }
    }

    /// Has the host copy; says whether it did.
    async fn copy_by_host(&self, piece: &Piece) -> Result<bool, Error> {
        let (source, inner, left) = self.locate(piece.offset);
        if left < piece.bytes {
            return Ok(false);
        }
        let (from, to) = (source.request().await, self.target.request().await);
        let flags = CopyFlags::empty();
        match from
            .copy_range(inner, &to, piece.offset, piece.bytes, flags)
            .await
        {
            Ok(()) => Ok(true),
            Err(IoError::Unsupported) => {
                // It will not learn it.
                self.by_host.set(false);
                Ok(false)
            }
            Err(error) => Err(self.target.failed("copy to", piece.offset, error)),
        }
    }

    async fn zero(&self, offset: u64, bytes: u64) -> Result<(), Error> {
        if self.plan.zeroes == Zeroes::Leave {
            return Ok(());
        }
        self.target
            .write_zeroes(offset, bytes, ZeroFlags::MAY_UNMAP)
            .await
    }

    async fn write(&self, piece: &Piece, data: Segments) -> Result<(), Error> {
        let least = (self.plan.sparse_bytes > 0).then_some(self.plan.sparse_bytes);
        if self.plan.cluster_bytes.is_some() {
            if least.is_some() && data.is_zero() {
                return self.zero(piece.offset, piece.bytes).await;
            }
            return self.target.write_compressed(piece.offset, data).await;
        }
        let unit = u64::from(self.target.root.limits().request_alignment);
        let unit = unit
            .max(self.plan.sparse_bytes.min(DEFAULT_SPARSE_BYTES))
            .max(SECTOR_BYTES);
        let runs = match least {
            Some(least) => walk::runs(&data.to_vec(), unit, least),
            None => vec![(false, piece.bytes)],
        };
        let mut offset = 0;
        for (zero, bytes) in runs {
            match zero {
                true => self.zero(piece.offset + offset, bytes).await?,
                false => {
                    let part = data.slice(offset, bytes);
                    self.target.write(piece.offset + offset, part).await?;
                }
            }
            offset += bytes;
        }
        Ok(())
    }
}
