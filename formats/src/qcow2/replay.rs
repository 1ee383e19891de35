//! What a process that was killed left behind, put into its image.
//!
//! The order is that of a round of the committer: data that the dead process wrote first, then counts, then
//! entries of tables. So a power cut meanwhile leaves what one during a round would. Putting records there
//! a second time changes nothing.
//!
//! Records come from a file that anybody with this user's rights may have changed. So each must tell of a
//! place that is of its kind: counts in refcount blocks, entries in the tables that the image has with what
//! was recorded before. No table may lie where there is other metadata, and none of it may become free. What
//! does not fit is refused as a whole, before anything is written. That a new table lies where the guest has
//! data cannot be seen, short of reading all tables.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use blockcore::IoError;
use blockcore::driver::WriteFlags;
use blockcore::io::Root;
use blockcore::io::buffer::Segments;
use futures_util::future::LocalBoxFuture;

use super::alloc::RESERVE_CLUSTERS;
use super::layout::entry::L1Entry;
use super::layout::{BLOCK_OFFSET, Geometry, HostOffset, refcount, set_refcount};
use super::overlap::Metadata;
use super::refcount::{BlockNumber, ClusterNumber, Run};
use super::segment::{Left, Record};

/// The most clusters that an extent has which is reserved.
const MOST_RESERVED: u64 = *RESERVE_CLUSTERS.end();
/// The most clusters that all records together say are taken: far more than is taken between two rounds.
const MOST_TAKEN: u64 = 1 << 22;

/// The tables of an image as they are in its file.
pub(super) struct Tables<'a> {
    pub(super) geometry: Geometry,
    pub(super) l1_place: HostOffset,
    pub(super) l1: &'a mut Vec<L1Entry>,
    pub(super) table_place: HostOffset,
    pub(super) table: &'a mut Vec<u64>,
}

/// What is going to be written, each place once.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// Blocks that are new: zero but for what `counts` says.
    blocks: BTreeMap<BlockNumber, HostOffset>,
    counts: BTreeMap<ClusterNumber, u64>,
    l2: BTreeMap<u64, u64>,
    l1: BTreeMap<u64, u64>,
    reserved: Vec<Run>,
    /// How many clusters have been said to be taken.
    taken: u64,
}

impl Replay {
    /// What `left` tells to write to the image with these tables, which are changed accordingly.
    ///
    /// # Errors
    ///
    /// What about a record cannot be; the tables may have been changed.
    pub(super) fn new(
        left: Left,
        tables: &mut Tables<'_>,
        file_bytes: u64,
    ) -> Result<Self, String> {
        let mut replay = Self::default();
        for record in &left.records {
            replay.add(*record, tables, file_bytes)?;
        }
        let l2_tables: BTreeSet<u64> = tables
            .l1
            .iter()
            .filter(|entry| entry.is_copied())
            .filter_map(|entry| Some(entry.table()?.0))
            .collect();
        let g = tables.geometry;
        for place in replay.l2.keys() {
            if !l2_tables.contains(&g.cluster_start(*place)) {
                return Err(format!("there is no L2 table at offset {place:#x}"));
            }
        }
        for run in &left.reserved {
            if run.count > MOST_RESERVED {
                return Err(format!("no extent of {} clusters is reserved", run.count));
            }
            for cluster in run.start..run.start + run.count {
                replay.check_count(tables, cluster, 0)?;
            }
        }
        replay.reserved = left.reserved;
        Ok(replay)
    }

    fn add(
        &mut self,
        record: Record,
        tables: &mut Tables<'_>,
        file_bytes: u64,
    ) -> Result<(), String> {
        let g = tables.geometry;
        match record {
            Record::L2(place, word, second) => {
                let inside = place.0.checked_add(g.entry_bytes());
                let is_entry = place.0.is_multiple_of(g.entry_bytes());
                if !is_entry || inside.is_none_or(|end| end > file_bytes) {
                    return Err(format!("no L2 entry can be at offset {:#x}", place.0));
                }
                self.l2.insert(place.0, word);
                if g.extended {
                    self.l2.insert(place.0 + 8, second);
                }
            }
            Record::L1(place, word) => {
                let index = index_in(place, tables.l1_place, tables.l1.len());
                let index = index.ok_or(format!("no L1 entry is at offset {:#x}", place.0))?;
                tables.l1[index] = L1Entry(word);
                self.l1.insert(place.0, word);
            }
            Record::Count(cluster, count) => {
                self.check_count(tables, cluster, count)?;
                self.counts.insert(cluster, count);
            }
            Record::Taken(run) => {
                let end = run.start.checked_add(run.count);
                self.taken = self.taken.saturating_add(run.count);
                let is_too_much = run.count > g.block_counts() || self.taken > MOST_TAKEN;
                let end = end.filter(|_| !is_too_much);
                for cluster in run.start..end.ok_or("a run of clusters is too long")? {
                    self.check_count(tables, cluster, 1)?;
                    self.counts.insert(cluster, 1);
                }
            }
            Record::Block(block, place) => {
                let first = block.checked_mul(g.block_counts());
                let own = first.and_then(|first| first.checked_mul(g.cluster_bytes()));
                let before = tables.table.get(block as usize).copied();
                let is_free = before.is_some_and(|before| before == 0 || before == place.0);
                if own != Some(place.0) || place.0 >= file_bytes || !is_free {
                    return Err(format!(
                        "refcount block {block} cannot be at {:#x}",
                        place.0
                    ));
                }
                tables.table[block as usize] = place.0;
                self.blocks.insert(block, place);
                self.counts.insert(block * g.block_counts(), 1);
            }
        }
        Ok(())
    }

    fn check_count(
        &self,
        tables: &Tables<'_>,
        cluster: ClusterNumber,
        count: u64,
    ) -> Result<(), String> {
        let g = tables.geometry;
        let block = (cluster / g.block_counts()) as usize;
        let place = tables.table.get(block).map(|entry| entry & BLOCK_OFFSET);
        let has_block = place.is_some_and(|place| place != 0 && g.is_aligned(place));
        match has_block && count <= g.max_refcount() {
            true => Ok(()),
            false => Err(format!("cluster {cluster} cannot have the count {count}")),
        }
    }

    /// Looks that what the image needs, `metadata`, stays counted, and that no table of the disk's is a
    /// table of a snapshot's or a bitmap's, `inactive`.
    ///
    /// # Errors
    ///
    /// Which cluster is not what it should be.
    pub(super) fn check_metadata(
        &self,
        geometry: Geometry,
        metadata: &Metadata,
        inactive: &Metadata,
    ) -> Result<(), String> {
        let host = |cluster: ClusterNumber| HostOffset(cluster << geometry.cluster_bits);
        let in_use = |cluster: ClusterNumber| {
            metadata.is_in_cluster(host(cluster)) || inactive.is_in_cluster(host(cluster))
        };
        let reserved = self.reserved.iter();
        let mut free = reserved.flat_map(|run| run.start..run.start + run.count);
        let mut uncounted = self.counts.iter().filter(|(_, count)| **count == 0);
        if let Some(cluster) = free.find(|cluster| in_use(*cluster)).or_else(|| {
            let found = uncounted.find(|(cluster, _)| in_use(**cluster));
            found.map(|(cluster, _)| *cluster)
        }) {
            return Err(format!(
                "cluster {cluster} is to be free, and holds metadata"
            ));
        }
        // A new block counts what has been recorded since, and nothing else.
        let per_block = geometry.block_counts();
        for block in self.blocks.keys() {
            let mut clusters = block * per_block..(block + 1) * per_block;
            if let Some(cluster) =
                clusters.find(|cluster| in_use(*cluster) && !self.counts.contains_key(cluster))
            {
                return Err(format!(
                    "cluster {cluster} holds metadata, and block {block} is to be new"
                ));
            }
        }
        let tables = self.l2.keys().map(|place| HostOffset(*place));
        let mut places = tables.chain(self.blocks.values().copied());
        match places.find(|place| inactive.is_in_cluster(*place)) {
            None => Ok(()),
            Some(place) => Err(format!(
                "what is at offset {:#x} belongs to a snapshot or a bitmap",
                place.0
            )),
        }
    }

    /// Whether there is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.reserved.is_empty()
            && self.counts.is_empty()
            && self.l2.is_empty()
            && self.l1.is_empty()
    }

    /// How many entries and counts there are.
    pub(super) fn changes(&self) -> usize {
        self.counts.len() + self.l2.len() + self.l1.len()
    }

    /// Writes it all to the image's file, and makes it durable.
    pub(super) async fn run(self, file: &Rc<Root>, tables: Tables<'_>) -> Result<(), IoError> {
        // What the dead process wrote, and had not flushed.
        file.flush().await?;
        self.write_counts(file, &tables).await?;
        file.flush().await?;
        if !self.blocks.is_empty() {
            for (block, place) in &self.blocks {
                let entry = HostOffset(tables.table_place.0 + 8 * block);
                write(file, entry, &place.0.to_be_bytes()).await?;
            }
            file.flush().await?;
        }
        for (place, word) in self.l2.iter().chain(&self.l1) {
            write(file, HostOffset(*place), &word.to_be_bytes()).await?;
        }
        file.flush().await
    }

    async fn write_counts(&self, file: &Rc<Root>, tables: &Tables<'_>) -> Result<(), IoError> {
        let g = tables.geometry;
        let reserved = self
            .reserved
            .iter()
            .flat_map(|run| run.start..run.start + run.count);
        let reserved: BTreeSet<_> = reserved.collect();
        let touched = self.counts.keys().chain(&reserved);
        let blocks: BTreeSet<_> = touched.map(|cluster| cluster / g.block_counts()).collect();
        for block in blocks {
            let place = HostOffset(tables.table[block as usize] & BLOCK_OFFSET);
            let mut counts = match self.blocks.contains_key(&block) {
                true => vec![0; g.cluster_bytes() as usize],
                false => read(file, place, g.cluster_bytes()).await?,
            };
            let first = block * g.block_counts();
            let of_block = first..first + g.block_counts();
            for (cluster, count) in self.counts.range(of_block.clone()) {
                let index = (cluster - first) as usize;
                set_refcount(&mut counts, g.refcount_order, index, *count);
            }
            for cluster in reserved.range(of_block) {
                let index = (cluster - first) as usize;
                // Nothing refers to it; a count of more would be somebody else's.
                if refcount(&counts, g.refcount_order, index) == 1 {
                    set_refcount(&mut counts, g.refcount_order, index, 0);
                }
            }
            write(file, place, &counts).await?;
        }
        Ok(())
    }
}

/// Which word of a table of `words` words at `table` is at `place`.
fn index_in(place: HostOffset, table: HostOffset, words: usize) -> Option<usize> {
    let offset = place.0.checked_sub(table.0)?;
    let index = usize::try_from(offset / 8).ok()?;
    (offset.is_multiple_of(8) && index < words).then_some(index)
}

async fn read(file: &Rc<Root>, host: HostOffset, bytes: u64) -> Result<Vec<u8>, IoError> {
    let into = Segments::allocate(bytes as usize, 4096);
    file.read(host.0, into.clone()).await?;
    Ok(into.to_vec())
}

fn write<'a>(
    file: &'a Rc<Root>,
    host: HostOffset,
    bytes: &[u8],
) -> LocalBoxFuture<'a, Result<(), IoError>> {
    let from = Segments::allocate(bytes.len(), 4096);
    from.copy_from(bytes);
    Box::pin(async move { file.write(host.0, from, WriteFlags::empty()).await })
}
