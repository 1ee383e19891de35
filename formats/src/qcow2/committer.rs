//! The committer: writes changed metadata back, in an order in which every power cut leaves an image that is
//! whole, or has leaked clusters at worst.
//!
//! A round takes what was freed before it; copies dirty slices, dirty L1 entries and dirty counts, in this
//! order; then writes:
//!
//! 1. counts, so that nothing is mapped that does not count as used; entries of the refcount table after
//!    the blocks that they point to;
//! 2. a flush, of data too: what entries point to is there before they are;
//! 3. slices, and L1 entries, whose tables were there before the flush;
//! 4. a flush.
//!
//! Then what was copied is clean, unless it has changed since; and what was freed goes to those who wait for
//! its last users. What a slice maps was counted before it was mapped, so counts that are copied after slices
//! cover these. Counts fall only after a round that has made durable that nothing refers to the cluster.
//!
//! One round runs at a time. A flush joins the next one, never the one that runs, which may not have seen
//! what the flush must cover.

use std::sync::atomic::Ordering;

use blockcore::IoError;
use blockcore::fault::{self, Fault};
use blockcore::io::Io;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::cache::SliceCopy;
use super::image::{DATA_FILE, FILE, Image, write_bytes};
use super::layout::HostOffset;
use super::layout::bytes::from_words;
use super::layout::entry::L1Entry;
use super::refcount::{BlockCopy, TableCopy};

/// How many pieces of metadata are written at a time.
const WRITES_AT_ONCE: usize = 16;
/// Longest piece that slices side by side are written in.
const PIECE_BYTES: usize = 1 << 20;

/// What a round writes.
struct Copies {
    slices: Vec<SliceCopy>,
    l1_place: HostOffset,
    l1: Vec<(usize, L1Entry)>,
    blocks: Vec<BlockCopy>,
    table: TableCopy,
}

impl Copies {
    fn has_entries(&self) -> bool {
        !self.slices.is_empty() || !self.l1.is_empty()
    }

    fn is_empty(&self) -> bool {
        !self.has_entries() && self.blocks.is_empty() && self.table.entries.is_empty()
    }
}

impl Image {
    /// Makes durable all metadata that was changed before the call, and the data that it points to.
    pub(super) async fn commit(&self, io: Io<'_>) -> Result<(), IoError> {
        // Boxed: a round may have to load blocks, which may have to commit.
        Box::pin(self.rounds.join(self.round(io))).await
    }

    /// Starts a round that nobody waits for, unless one is on its way.
    pub(super) fn commit_behind(&self, io: Io<'_>) {
        if self.committing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.behind(io, |image, fork| async move {
            image.committing.store(false, Ordering::Release);
            if let Err(error) = image.commit(fork.io()).await {
                tracing::warn!(
                    "cannot write metadata of '{}' back: {error}",
                    fork.io().name()
                );
            }
        });
    }

    /// Starts a round where much is dirty, so that there is room when it is needed.
    pub(super) fn commit_if_crowded(&self, io: Io<'_>) {
        let is_full = self.cache_evicts() && self.cache.dirty_count() * 2 > self.cache.capacity();
        let segment = self.segment.as_ref();
        if is_full || segment.is_some_and(|segment| segment.is_crowded()) {
            self.commit_behind(io);
        }
    }

    async fn round(&self, io: Io<'_>) -> Result<(), IoError> {
        self.check_whole()?;
        self.check_not_lost()?;
        let segment = self.segment.as_ref();
        let mark = segment.map(|segment| segment.mark());
        let freed = self.limbo.take();
        let copies = self.copies();
        if let Err(error) = self.noted(self.write_back(io, &copies).await) {
            self.limbo.put_back(freed);
            return Err(error);
        }
        self.settle(&copies);
        if let (Some(segment), Some(mark)) = (segment, mark) {
            segment.forget_until(mark);
            self.allow_plain_writes();
        }
        self.release_behind(io, freed);
        Ok(())
    }

    fn copies(&self) -> Copies {
        let slices = self.cache.copy_dirty();
        let (l1_place, l1) = {
            let l1 = self.l1();
            let dirty = l1.dirty.iter();
            (
                l1.place,
                dirty.map(|index| (*index, l1.get(*index))).collect(),
            )
        };
        let (blocks, table) = self.refcounts.copy_dirty();
        Copies {
            slices,
            l1_place,
            l1,
            blocks,
            table,
        }
    }

    async fn write_back(&self, io: Io<'_>, copies: &Copies) -> Result<(), IoError> {
        if copies.is_empty() {
            return io.flush_children().await;
        }
        if fault::is_planted(Fault::EntriesBeforeCounts) {
            io.flush_children().await?;
            self.write_slices(io, &copies.slices).await?;
        }
        let blocks = copies
            .blocks
            .iter()
            .map(|block| (block.place, &block.counts));
        stream::iter(blocks.map(Ok))
            .try_for_each_concurrent(WRITES_AT_ONCE, |(place, counts)| async move {
                io.child(FILE).event("refblock_update_part").await?;
                write_bytes(io, place, counts).await
            })
            .await?;
        if !copies.table.entries.is_empty() {
            io.child(FILE).flush().await?;
            for (place, value) in &copies.table.entries {
                io.child(FILE).event("refblock_alloc_hookup").await?;
                write_bytes(io, *place, &value.to_be_bytes()).await?;
            }
        }
        if copies.has_entries() {
            io.flush_children().await?;
            match fault::is_planted(Fault::EntriesCopiedLate) {
                false => self.write_slices(io, &copies.slices).await?,
                true => self.write_slices(io, &self.cache.copy_dirty()).await?,
            }
            for (index, entry) in &copies.l1 {
                let place = HostOffset(copies.l1_place.0 + 8 * *index as u64);
                io.child(FILE).event("l1_update").await?;
                write_bytes(io, place, &entry.0.to_be_bytes()).await?;
            }
        }
        if !copies.has_entries() && io.has_child(DATA_FILE) {
            io.child(DATA_FILE).flush().await?;
        }
        io.child(FILE).flush().await
    }

    /// Writes slices, those that lie side by side in one piece.
    async fn write_slices(&self, io: Io<'_>, slices: &[SliceCopy]) -> Result<(), IoError> {
        let mut pieces: Vec<(HostOffset, Vec<u8>)> = Vec::new();
        for copy in slices {
            let host = self.slice_host(copy.slice);
            let host = host.expect("a table stays while a slice of it is dirty");
            let bytes = from_words(&copy.words);
            match pieces.last_mut() {
                Some((begin, piece))
                    if begin.0 + piece.len() as u64 == host.0 && piece.len() < PIECE_BYTES =>
                {
                    piece.extend(bytes);
                }
                _ => pieces.push((host, bytes)),
            }
        }
        stream::iter(pieces)
            .map(Ok)
            .try_for_each_concurrent(WRITES_AT_ONCE, |(host, bytes)| async move {
                io.child(FILE).event("l2_update").await?;
                write_bytes(io, host, &bytes).await
            })
            .await
    }

    fn settle(&self, copies: &Copies) {
        for slice in &copies.slices {
            self.cache.settle(slice);
        }
        {
            let mut l1 = self.l1();
            for (index, entry) in &copies.l1 {
                if l1.get(*index) == *entry {
                    l1.dirty.remove(index);
                }
            }
        }
        self.refcounts.settle(&copies.blocks, &copies.table);
    }
}
