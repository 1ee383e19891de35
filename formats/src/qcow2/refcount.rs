//! [`Refcounts`]: how often each host cluster is referred to, as far as it is in memory.
//!
//! The refcount table is here whole. Its blocks are loaded when they are needed, and clean ones go again
//! when there are too many. What is changed is dirty until the committer has written it; a dirty block
//! stays. Whoever needs a block that is not here is told so: reading it in is not done here.
//!
//! Threads: any worker. One lock, held over memory operations only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use super::layout::{BLOCK_OFFSET, Geometry, HostOffset, refcount, set_refcount};
use super::segment::{CrashSegment, Record};

/// A cluster of the image's file, by number.
pub(crate) type ClusterNumber = u64;

/// Which refcount block, in the order of the table.
pub(crate) type BlockNumber = u64;

/// See the module's header.
pub(crate) struct Refcounts {
    geometry: Geometry,
    /// How many clean blocks are kept.
    kept_blocks: usize,
    /// Where changes are recorded before anybody relies on them.
    segment: Option<Arc<CrashSegment>>,
    inner: Mutex<Inner>,
}

struct Inner {
    place: HostOffset,
    table: Vec<u64>,
    dirty_entries: BTreeSet<usize>,
    blocks: BTreeMap<BlockNumber, Block>,
    /// Counts looks and changes.
    clock: u64,
}

struct Block {
    counts: Box<[u8]>,
    /// When it was last changed; `None` for a clean one.
    changed: Option<u64>,
    used: u64,
}

/// What has to be done before an answer can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The block is in the image, here.
    Load(BlockNumber, HostOffset),
    /// There is no such block.
    Make(BlockNumber),
}

/// Free clusters that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first.
    pub(crate) start: ClusterNumber,
    /// How many.
    pub(crate) count: u64,
}

/// A dirty block as it was at one moment.
pub(crate) struct BlockCopy {
    block: BlockNumber,
    /// Where it goes.
    pub(crate) place: HostOffset,
    /// What it holds.
    pub(crate) counts: Vec<u8>,
    changed: u64,
}

/// Entries of the table that are dirty, as they were at one moment.
pub(crate) struct TableCopy {
    /// Each with its place in the image and its value.
    pub(crate) entries: Vec<(HostOffset, u64)>,
    indices: Vec<usize>,
}

/// A count that would exceed what it has room for, or fall below zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadCount {
    /// Whose count.
    pub(crate) cluster: ClusterNumber,
    /// What it is.
    pub(crate) count: u64,
}

impl Refcounts {
    /// The counts of an image whose table, as it is in the image, lies at `place`; keeps about
    /// `kept_blocks` blocks.
    pub(crate) fn new(
        geometry: Geometry,
        place: HostOffset,
        table: Vec<u64>,
        kept_blocks: usize,
        segment: Option<Arc<CrashSegment>>,
    ) -> Self {
        Self {
            geometry,
            kept_blocks: kept_blocks.max(4),
            segment,
            inner: Mutex::new(Inner {
                place,
                table,
                dirty_entries: BTreeSet::new(),
                blocks: BTreeMap::new(),
                clock: 0,
            }),
        }
    }

    /// Where the table is.
    pub(crate) fn place(&self) -> HostOffset {
        self.lock().place
    }

    /// How many blocks the table has room for.
    pub(crate) fn capacity(&self) -> u64 {
        self.lock().table.len() as u64
    }

    /// The table as it is now.
    pub(crate) fn table(&self) -> Vec<u64> {
        self.lock().table.clone()
    }

    /// Which block a cluster's count is in, and where there.
    fn locate(&self, cluster: ClusterNumber) -> (BlockNumber, usize) {
        let counts = self.geometry.block_counts();
        (cluster / counts, (cluster % counts) as usize)
    }

    /// A cluster's count; 0 where there is no block.
    ///
    /// # Errors
    ///
    /// [`Missing::Load`].
    pub(crate) fn get(&self, cluster: ClusterNumber) -> Result<u64, Missing> {
        let (number, index) = self.locate(cluster);
        let mut inner = self.lock();
        match inner.block(number) {
            Ok(block) => Ok(refcount(&block.counts, self.geometry.refcount_order, index)),
            Err(Missing::Make(_)) => Ok(0),
            Err(missing) => Err(missing),
        }
    }

    /// Where a block is, and a copy of it.
    ///
    /// # Errors
    ///
    /// [`Missing`].
    pub(crate) fn copy(&self, number: BlockNumber) -> Result<(HostOffset, Vec<u8>), Missing> {
        let mut inner = self.lock();
        let counts = inner.block(number)?.counts.to_vec();
        let place = inner.table[number as usize] & BLOCK_OFFSET;
        Ok((HostOffset(place), counts))
    }

    /// Adds to a cluster's count, and gives what it is then; or why that cannot be.
    ///
    /// # Errors
    ///
    /// [`Missing`].
    pub(crate) fn add(
        &self,
        cluster: ClusterNumber,
        difference: i64,
    ) -> Result<Result<u64, BadCount>, Missing> {
        let (number, index) = self.locate(cluster);
        let order = self.geometry.refcount_order;
        let mut inner = self.lock();
        let clock = inner.clock;
        let block = inner.block(number)?;
        let before = refcount(&block.counts, order, index);
        let after = before
            .checked_add_signed(difference)
            .filter(|after| *after <= self.geometry.max_refcount());
        let Some(after) = after else {
            let count = before;
            return Ok(Err(BadCount { cluster, count }));
        };
        set_refcount(&mut block.counts, order, index, after);
        block.changed = Some(clock + 1);
        self.record(Record::Count(cluster, after));
        Ok(Ok(after))
    }

    /// Free clusters from `from` on, at most `most`, all in one block: the first that there are.
    ///
    /// # Errors
    ///
    /// [`Missing`]: the search stopped at a block that is not here.
    pub(crate) fn find_free(&self, from: ClusterNumber, most: u64) -> Result<Run, Missing> {
        let counts = self.geometry.block_counts();
        let order = self.geometry.refcount_order;
        let mut inner = self.lock();
        let mut cluster = from;
        loop {
            let (number, first) = (cluster / counts, (cluster % counts) as usize);
            let block = inner.block(number)?;
            let is_free = |index: usize| refcount(&block.counts, order, index) == 0;
            if let Some(start) = (first..counts as usize).find(|index| is_free(*index)) {
                let limit = (counts as usize - start).min(most as usize);
                let count = (1..limit).find(|n| !is_free(start + n)).unwrap_or(limit);
                return Ok(Run {
                    start: number * counts + start as u64,
                    count: count as u64,
                });
            }
            cluster = (number + 1) * counts;
        }
    }

    /// Takes free clusters: their counts become 1. Returns false, and has changed nothing, where one was
    /// not free any more.
    ///
    /// # Errors
    ///
    /// [`Missing`].
    pub(crate) fn take(&self, run: Run) -> Result<bool, Missing> {
        let order = self.geometry.refcount_order;
        let (number, first) = self.locate(run.start);
        let mut inner = self.lock();
        let clock = inner.clock;
        let block = inner.block(number)?;
        let indices = first..first + run.count as usize;
        if indices
            .clone()
            .any(|index| refcount(&block.counts, order, index) != 0)
        {
            return Ok(false);
        }
        for index in indices {
            set_refcount(&mut block.counts, order, index, 1);
        }
        block.changed = Some(clock + 1);
        self.record(Record::Taken(run));
        Ok(true)
    }

    /// Puts a block as it was read from the image in its place, unless it is here already.
    pub(crate) fn install(&self, number: BlockNumber, counts: Vec<u8>) {
        let mut inner = self.lock();
        inner.evict(self.kept_blocks);
        let used = inner.tick();
        inner.blocks.entry(number).or_insert(Block {
            counts: counts.into(),
            changed: None,
            used,
        });
    }

    /// A new block, which lies at `place` and is dirty, as is its entry in the table. Its first cluster, which
    /// is itself, counts as 1.
    ///
    /// # Panics
    ///
    /// If the table has no room for it: see [`capacity`](Self::capacity).
    pub(crate) fn make(&self, number: BlockNumber, place: HostOffset) {
        let mut counts = vec![0; self.geometry.cluster_bytes() as usize];
        set_refcount(&mut counts, self.geometry.refcount_order, 0, 1);
        let mut inner = self.lock();
        let used = inner.tick();
        inner.table[number as usize] = place.0;
        inner.dirty_entries.insert(number as usize);
        let block = Block {
            counts: counts.into(),
            changed: Some(used),
            used,
        };
        inner.blocks.insert(number, block);
        self.record(Record::Block(number, place));
    }

    /// In the lock. Where there is no room, whoever completes a request that rests on this waits for a
    /// round.
    fn record(&self, record: Record) {
        if let Some(segment) = &self.segment {
            segment.record(record);
        }
    }

    /// Another table takes the place of the one there is, and is in the image already.
    pub(crate) fn replace_table(&self, place: HostOffset, table: Vec<u64>) {
        let mut inner = self.lock();
        inner.place = place;
        inner.table = table;
        inner.dirty_entries.clear();
    }

    /// How many blocks are dirty.
    pub(crate) fn dirty_count(&self) -> usize {
        let inner = self.lock();
        inner
            .blocks
            .values()
            .filter(|b| b.changed.is_some())
            .count()
    }

    /// Every dirty block, and the dirty part of the table, copied at one moment.
    pub(crate) fn copy_dirty(&self) -> (Vec<BlockCopy>, TableCopy) {
        let inner = self.lock();
        let blocks = inner.blocks.iter().filter_map(|(number, block)| {
            Some(BlockCopy {
                block: *number,
                place: HostOffset(inner.table[*number as usize] & BLOCK_OFFSET),
                counts: block.counts.to_vec(),
                changed: block.changed?,
            })
        });
        let indices: Vec<_> = inner.dirty_entries.iter().copied().collect();
        let entry = |index: &usize| {
            let place = HostOffset(inner.place.0 + 8 * *index as u64);
            (place, inner.table[*index])
        };
        let table = TableCopy {
            entries: indices.iter().map(entry).collect(),
            indices,
        };
        (blocks.collect(), table)
    }

    /// The copies are durable in the image.
    pub(crate) fn settle(&self, blocks: &[BlockCopy], table: &TableCopy) {
        let mut inner = self.lock();
        for copy in blocks {
            if let Some(block) = inner.blocks.get_mut(&copy.block)
                && block.changed == Some(copy.changed)
            {
                block.changed = None;
            }
        }
        for (index, (_, value)) in table.indices.iter().zip(&table.entries) {
            if inner.table.get(*index) == Some(value) {
                inner.dirty_entries.remove(index);
            }
        }
        inner.evict(self.kept_blocks);
    }

    /// Forgets every block; for when the image has changed below us. Nothing is dirty.
    pub(crate) fn forget(&self) {
        self.lock().blocks.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while counting")
    }
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn block(&mut self, number: BlockNumber) -> Result<&mut Block, Missing> {
        let used = self.tick();
        if let Some(block) = self.blocks.get_mut(&number) {
            block.used = used;
            return Ok(block);
        }
        let entry = self.table.get(number as usize).copied().unwrap_or(0) & BLOCK_OFFSET;
        match entry {
            0 => Err(Missing::Make(number)),
            place => Err(Missing::Load(number, HostOffset(place))),
        }
    }

    /// Makes room for one more block.
    fn evict(&mut self, kept: usize) {
        while self.blocks.len() >= kept {
            let clean = self
                .blocks
                .iter()
                .filter(|(_, block)| block.changed.is_none());
            let Some(oldest) = clean.min_by_key(|(_, block)| block.used).map(|(n, _)| *n) else {
                return;
            };
            self.blocks.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        cluster_bits: 9,
        refcount_order: 4,
        extended: false,
        zero_flag: true,
        data_file: false,
    };

    fn counts() -> Refcounts {
        // 256 counts to a block; block 0 at 0x400, block 1 at 0x600, no other.
        let refcounts = Refcounts::new(
            GEOMETRY,
            HostOffset(0x200),
            vec![0x400, 0x600, 0, 0],
            4,
            None,
        );
        refcounts.install(0, vec![0; 512]);
        refcounts
    }

    #[test]
    fn what_is_missing_is_named() {
        let refcounts = counts();
        assert_eq!(refcounts.get(256), Err(Missing::Load(1, HostOffset(0x600))));
        assert_eq!(refcounts.get(512), Ok(0));
        assert_eq!(refcounts.add(512, 1), Err(Missing::Make(2)));
        assert_eq!(refcounts.add(256 * 9, 1), Err(Missing::Make(9)));
    }

    #[test]
    fn free_clusters_are_found_taken_and_given_back() {
        let refcounts = counts();
        assert!(refcounts.take(Run { start: 0, count: 3 }).unwrap());
        assert_eq!(refcounts.add(10, 1), Ok(Ok(1)));
        let run = refcounts.find_free(0, 100).unwrap();
        assert_eq!(run, Run { start: 3, count: 7 });
        assert!(!refcounts.take(Run { start: 9, count: 2 }).unwrap());
        assert_eq!(refcounts.get(9), Ok(0));
        let bad = BadCount {
            cluster: 9,
            count: 0,
        };
        assert_eq!(refcounts.add(9, -1), Ok(Err(bad)));
        assert!(refcounts.add(20, 65535).unwrap().is_ok());
        assert!(refcounts.add(20, 1).unwrap().is_err());
        let whole = Run {
            start: 11,
            count: 9,
        };
        assert_eq!(refcounts.find_free(11, 100).unwrap(), whole);
    }

    #[test]
    fn a_search_past_a_full_block_needs_the_next() {
        let refcounts = counts();
        assert!(
            refcounts
                .take(Run {
                    start: 0,
                    count: 256
                })
                .unwrap()
        );
        let missing = refcounts.find_free(0, 1).unwrap_err();
        assert_eq!(missing, Missing::Load(1, HostOffset(0x600)));
    }

    #[test]
    fn a_block_is_clean_once_its_last_change_was_written() {
        let refcounts = counts();
        refcounts.make(2, HostOffset(0x4_0000));
        assert_eq!(refcounts.get(512), Ok(1));
        let (blocks, table) = refcounts.copy_dirty();
        assert_eq!(blocks[0].place, HostOffset(0x4_0000));
        assert_eq!(table.entries, [(HostOffset(0x210), 0x4_0000)]);
        refcounts.add(513, 1).unwrap().unwrap();
        refcounts.settle(&blocks, &table);
        assert_eq!(refcounts.dirty_count(), 1);
        let (blocks, table) = refcounts.copy_dirty();
        assert!(table.entries.is_empty());
        refcounts.settle(&blocks, &table);
        assert_eq!(refcounts.dirty_count(), 0);
    }

    #[test]
    fn clean_blocks_go_when_there_are_too_many() {
        let table = (1..=20).map(|n| n * 512).collect();
        let refcounts = Refcounts::new(GEOMETRY, HostOffset(0x200), table, 4, None);
        refcounts.install(0, vec![0; 512]);
        refcounts.add(0, 1).unwrap().unwrap();
        for block in 1..20 {
            refcounts.install(block, vec![0; 512]);
        }
        assert_eq!(refcounts.get(0), Ok(1));
        assert!(refcounts.get(256).is_err());
        assert_eq!(refcounts.get(256 * 19), Ok(0));
    }
}
