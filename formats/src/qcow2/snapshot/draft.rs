//! [`Draft`]: what an image's reference counts are going to be, made beside those that there are.
//!
//! A draft never changes what the image has. New metadata lies in clusters that are free by the counts that
//! hold, and nothing says that they are taken: until the header names the draft's refcount table they are
//! free, and nothing has been leaked when it never does. Blocks whose counts change get a copy at a new
//! place; the others are shared with the table that there is.
//!
//! Whoever has a draft is alone: nothing is allocated and nothing is let go of meanwhile.
//!
//! Memory: of the blocks' copies only [`LOADED_BYTES`] are kept, the others wait at their new places.

use std::collections::BTreeMap;

use blockcore::IoError;
use blockcore::io::Io;

use super::super::image::{Image, read_bytes, write_bytes};
use super::super::layout::bytes::from_words;
use super::super::layout::header::MAX_REFCOUNT_TABLE_BYTES;
use super::super::layout::{HostOffset, refcount, set_refcount};
use super::super::refcount::{BlockNumber, ClusterNumber, Missing, Run};
use super::Failure;

/// How much of the copies of blocks is in memory.
const LOADED_BYTES: u64 = 32 << 20;
/// How many runs of clusters that become free are remembered, so that the host can be told.
const FREED_RUNS: usize = 1 << 16;

/// See the module's header.
pub(in super::super) struct Draft<'a> {
    image: &'a Image,
    io: Io<'a>,
    table: Vec<u64>,
    blocks: BTreeMap<BlockNumber, Block>,
    loaded: u64,
    /// Where the search for the next new cluster begins.
    next: ClusterNumber,
    /// Changes that wait, so that a block's copy needs no other block's at once.
    pending: Vec<(Run, Change)>,
    /// New metadata.
    added: Vec<Run>,
    /// Metadata that lost a reference.
    dropped: Vec<Run>,
}

struct Block {
    place: HostOffset,
    /// `None`: they are at the place.
    counts: Option<Vec<u8>>,
}

/// How a count changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Change {
    /// There is another reference to what is referred to already.
    More,
    /// There is one reference less.
    Less,
    /// It was free.
    New,
}

impl Change {
    fn of(self, before: u64) -> Option<u64> {
        match self {
            Self::More => before.checked_add(1),
            Self::Less => before.checked_sub(1),
            Self::New => (before == 0).then_some(1),
        }
    }
}

/// A draft that is in the image's file, and waits for the header to name it.
pub(super) struct Written {
    pub(super) table: Vec<u64>,
    pub(super) table_place: HostOffset,
    /// New metadata.
    pub(super) added: Vec<Run>,
    /// What is no metadata any more, and free.
    pub(super) removed: Vec<Run>,
    /// What becomes free, or as much of it as is remembered.
    pub(super) freed: Vec<Run>,
    /// The first cluster that becomes free.
    pub(super) first_freed: Option<ClusterNumber>,
}

impl<'a> Draft<'a> {
    /// A draft with the counts that there are. Nothing about the image is dirty, and no cluster is reserved.
    pub(in super::super) fn new(image: &'a Image, io: Io<'a>) -> Self {
        Self {
            image,
            io,
            table: image.refcounts.table(),
            blocks: BTreeMap::new(),
            loaded: 0,
            next: 0,
            pending: Vec::new(),
            added: Vec::new(),
            dropped: Vec::new(),
        }
    }

    /// New clusters for metadata, side by side, which count as 1. The file has them.
    pub(in super::super) async fn allocate(
        &mut self,
        clusters: u64,
    ) -> Result<HostOffset, Failure> {
        let run = self.allocate_run(clusters).await?;
        self.added.push(run);
        Ok(HostOffset(run.start << self.image.geometry.cluster_bits))
    }

    /// A new cluster for data, as [`allocate`](Self::allocate).
    pub(in super::super) async fn allocate_data(&mut self) -> Result<HostOffset, Failure> {
        let run = self.allocate_run(1).await?;
        Ok(HostOffset(run.start << self.image.geometry.cluster_bits))
    }

    async fn allocate_run(&mut self, clusters: u64) -> Result<Run, Failure> {
        let run = self.find(clusters).await?;
        let g = self.image.geometry;
        let place = HostOffset(run.start << g.cluster_bits);
        let bytes = clusters << g.cluster_bits;
        self.image.check_free(self.io, run.start, clusters).await?;
        self.image.lengthen(self.io, place.0 + bytes).await?;
        self.next = run.start + clusters;
        self.pending.push((run, Change::New));
        Ok(run)
    }

    /// Free clusters, from where the last ones ended on. Those behind all refcount blocks are free.
    async fn find(&self, clusters: u64) -> Result<Run, Failure> {
        let g = self.image.geometry;
        let per_block = g.block_counts();
        let (mut start, mut count) = (self.next, 0);
        while count < clusters {
            let from = start + count;
            let run = match self.image.refcounts.find_free(from, clusters - count) {
                Ok(run) => run,
                Err(Missing::Load(block, place)) => {
                    self.image.load_block(self.io, block, place).await?;
                    if block * per_block > from {
                        // All before it is taken, and need not be in memory for another look.
                        (start, count) = (block * per_block, 0);
                    }
                    continue;
                }
                Err(Missing::Make(block)) => {
                    let first = from.max(block * per_block);
                    Run {
                        start: first,
                        count: ((block + 1) * per_block - first).min(clusters - count),
                    }
                }
            };
            if run.start != from {
                (start, count) = (run.start, 0);
            }
            count += run.count;
            let end = HostOffset((start + count) << g.cluster_bits);
            if !self.image.metadata.reaches(end) || end.0 > blockcore::io::MAX_BYTES {
                return Err(IoError::NoSpace.into());
            }
        }
        Ok(Run { start, count })
    }

    /// Metadata has lost a reference.
    pub(in super::super) async fn drop_metadata(
        &mut self,
        place: HostOffset,
        clusters: u64,
    ) -> Result<(), Failure> {
        let run = Run {
            start: place.0 >> self.image.geometry.cluster_bits,
            count: clusters,
        };
        if clusters == 0 {
            return Ok(());
        }
        self.dropped.push(run);
        self.change(run, Change::Less).await
    }

    /// Changes the counts of clusters.
    pub(in super::super) async fn change(
        &mut self,
        run: Run,
        change: Change,
    ) -> Result<(), Failure> {
        let g = self.image.geometry;
        let (per_block, order) = (g.block_counts(), g.refcount_order);
        let end = run.start + run.count;
        let mut cluster = run.start;
        while cluster < end {
            let number = cluster / per_block;
            let first = number * per_block;
            let until = end.min(first + per_block);
            if change != Change::New && !self.has_block(number) {
                return Err(Failure::BadCount(cluster, 0));
            }
            let counts = self.block(number).await?;
            for cluster in cluster..until {
                let index = (cluster - first) as usize;
                let before = refcount(counts, order, index);
                if before == 0 && change == Change::More {
                    return Err(Failure::BadCount(cluster, 0));
                }
                let after = change
                    .of(before)
                    .ok_or(Failure::BadCount(cluster, before))?;
                if after > g.max_refcount() {
                    return Err(Failure::TooMany(cluster));
                }
                set_refcount(counts, order, index, after);
            }
            cluster = until;
        }
        Ok(())
    }

    /// A cluster's count, once [`settle`](Self::settle) has been called.
    pub(super) async fn count(&mut self, cluster: ClusterNumber) -> Result<u64, Failure> {
        let g = self.image.geometry;
        let number = cluster / g.block_counts();
        if !self.blocks.contains_key(&number) {
            return Ok(self.image.count(self.io, cluster).await?);
        }
        let index = (cluster % g.block_counts()) as usize;
        let counts = self.block(number).await?;
        Ok(refcount(counts, g.refcount_order, index))
    }

    fn has_block(&self, number: BlockNumber) -> bool {
        self.table
            .get(number as usize)
            .is_some_and(|place| *place != 0)
    }

    /// The counts of a block, to be changed: it has a new place from now on.
    async fn block(&mut self, number: BlockNumber) -> Result<&mut [u8], Failure> {
        let cluster = self.image.geometry.cluster_bytes();
        let is_loaded = self
            .blocks
            .get(&number)
            .is_some_and(|block| block.counts.is_some());
        if !is_loaded {
            self.make_room().await?;
            let (place, counts) = match self.blocks.get(&number) {
                Some(block) => (
                    block.place,
                    read_bytes(self.io, block.place, cluster).await?,
                ),
                None => self.copy(number).await?,
            };
            self.loaded += cluster;
            let counts = Some(counts);
            self.blocks.insert(number, Block { place, counts });
        }
        let block = self.blocks.get_mut(&number).expect("just loaded");
        Ok(block.counts.as_mut().expect("just loaded"))
    }

    /// The counts of a block as they are, and the place for what they become.
    async fn copy(&mut self, number: BlockNumber) -> Result<(HostOffset, Vec<u8>), Failure> {
        let old = self.image.block_counts(self.io, number).await?;
        let place = self.allocate(1).await?;
        let index = number as usize;
        if self.table.len() <= index {
            self.table.resize(index + 1, 0);
        }
        self.table[index] = place.0;
        let g = self.image.geometry;
        let Some((old_place, counts)) = old else {
            return Ok((place, vec![0; g.cluster_bytes() as usize]));
        };
        let run = Run {
            start: old_place.0 >> g.cluster_bits,
            count: 1,
        };
        self.dropped.push(run);
        self.pending.push((run, Change::Less));
        Ok((place, counts))
    }

    /// Writes copies of blocks to their places, where too many are in memory.
    async fn make_room(&mut self) -> Result<(), Failure> {
        if self.loaded < LOADED_BYTES {
            return Ok(());
        }
        for block in self.blocks.values_mut() {
            if let Some(counts) = block.counts.take() {
                write_bytes(self.io, block.place, &counts).await?;
            }
        }
        self.loaded = 0;
        Ok(())
    }

    /// Makes the changes that wait. Each may have others follow; they end, since a new cluster has room for
    /// more counts than one.
    pub(in super::super) async fn settle(&mut self) -> Result<(), Failure> {
        while let Some((run, change)) = self.pending.pop() {
            self.change(run, change).await?;
        }
        Ok(())
    }

    /// Writes it all to new places. Not durable yet. `needed` is the metadata that the header is going to name.
    ///
    /// # Errors
    ///
    /// [`Failure::BadCount`] where something needed would be free: a table that was let go of has referred to
    /// it, too.
    pub(super) async fn write(mut self, needed: &[Run]) -> Result<Written, Failure> {
        let g = self.image.geometry;
        let (table_place, clusters) = self.place_table().await?;
        self.check_counted(needed).await?;
        let mut removed = Vec::new();
        for run in std::mem::take(&mut self.dropped) {
            for start in run.start..run.start + run.count {
                if self.count(start).await? == 0 {
                    removed.push(Run { start, count: 1 });
                }
            }
        }
        let (freed, first_freed) = self.write_blocks().await?;
        self.table
            .resize((clusters << g.cluster_bits) as usize / 8, 0);
        write_bytes(self.io, table_place, &from_words(&self.table)).await?;
        Ok(Written {
            table: self.table,
            table_place,
            added: self.added,
            removed,
            freed,
            first_freed,
        })
    }

    /// All of this counts, and so do all blocks.
    async fn check_counted(&mut self, needed: &[Run]) -> Result<(), Failure> {
        let bits = self.image.geometry.cluster_bits;
        let blocks = self.table.iter().filter(|place| **place != 0);
        let blocks: Vec<_> = blocks
            .map(|place| Run {
                start: place >> bits,
                count: 1,
            })
            .collect();
        for run in needed.iter().chain(&blocks) {
            for cluster in run.start..run.start + run.count {
                if self.count(cluster).await? == 0 {
                    return Err(Failure::BadCount(cluster, 0));
                }
            }
        }
        Ok(())
    }

    /// Finds a place for the table, and how many clusters it has. No count changes any more.
    async fn place_table(&mut self) -> Result<(HostOffset, u64), Failure> {
        let g = self.image.geometry;
        let (old_place, old_clusters) = {
            let header = self.image.header();
            (
                HostOffset(header.refcount_table_offset),
                u64::from(header.refcount_table_clusters),
            )
        };
        self.drop_metadata(old_place, old_clusters).await?;
        loop {
            self.settle().await?;
            let clusters = g.clusters(8 * self.table.len() as u64);
            if clusters << g.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                return Err(IoError::NoSpace.into());
            }
            let place = self.allocate(clusters).await?;
            self.settle().await?;
            if g.clusters(8 * self.table.len() as u64) == clusters {
                return Ok((place, clusters));
            }
            // Its own clusters' counts made it longer.
            let start = place.0 >> g.cluster_bits;
            self.added.retain(|run| run.start != start);
            let count = clusters;
            self.pending.push((Run { start, count }, Change::Less));
        }
    }

    /// Writes the copies of blocks, and finds out what becomes free.
    async fn write_blocks(&mut self) -> Result<(Vec<Run>, Option<ClusterNumber>), Failure> {
        let g = self.image.geometry;
        let (mut freed, mut first_freed) = (Vec::<Run>::new(), None);
        let numbers: Vec<_> = self.blocks.keys().copied().collect();
        for number in numbers {
            let old = self.image.block_counts(self.io, number).await?;
            let (io, place) = (self.io, self.blocks[&number].place);
            let counts = self.block(number).await?;
            if let Some((_, old)) = old {
                for index in 0..g.block_counts() as usize {
                    let [before, after] = [&old[..], &*counts]
                        .map(|counts| refcount(counts, g.refcount_order, index));
                    if before == 0 || after != 0 {
                        continue;
                    }
                    let cluster = number * g.block_counts() + index as u64;
                    first_freed.get_or_insert(cluster);
                    let last = freed.last_mut();
                    if let Some(run) = last.filter(|run| run.start + run.count == cluster) {
                        run.count += 1;
                    } else if freed.len() < FREED_RUNS {
                        freed.push(Run {
                            start: cluster,
                            count: 1,
                        });
                    }
                }
            }
            write_bytes(io, place, counts).await?;
        }
        Ok((freed, first_freed))
    }
}
