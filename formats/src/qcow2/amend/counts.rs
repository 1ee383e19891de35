//! Reference counts of another width.
//!
//! A new refcount table with new blocks is made in clusters that are free by the counts that hold; nothing
//! says that they are taken. They count what the old ones count, themselves, and not the old ones. Until the
//! header names them nothing has been lost; once it does, the old ones are free.

use std::collections::{BTreeMap, BTreeSet};

use blockcore::io::Io;

use crate::qcow2::image::{Image, write_bytes};
use crate::qcow2::layout::bytes::from_words;
use crate::qcow2::layout::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::qcow2::layout::{BLOCK_OFFSET, Geometry, HostOffset, refcount, set_refcount};
use crate::qcow2::refcount::{BlockNumber, ClusterNumber};
use crate::qcow2::snapshot::Failure;
use crate::qcow2::snapshot::draft::Draft;

/// A refcount table that waits for the header to name it.
pub(super) struct NewTable {
    pub(super) place: HostOffset,
    pub(super) clusters: u64,
}

/// Refuses a width that has no room for a count that there is. Nothing is written.
pub(super) async fn check_width(
    image: &Image,
    io: Io<'_>,
    refcount_order: u32,
) -> Result<(), Failure> {
    let old = image.geometry;
    let new = Geometry {
        refcount_order,
        ..old
    };
    if new.max_refcount() >= old.max_refcount() {
        return Ok(());
    }
    for number in 0..image.refcounts.capacity() {
        let Some((_, counts)) = image.block_counts(io, number).await? else {
            continue;
        };
        for index in 0..old.block_counts() as usize {
            if refcount(&counts, old.refcount_order, index) > new.max_refcount() {
                return Err(Failure::TooMany(number * old.block_counts() + index as u64));
            }
        }
    }
    Ok(())
}

/// Writes the counts anew, with `1 << refcount_order` bits each. Not durable yet. Nothing about the image is
/// dirty, and no cluster is reserved.
pub(super) async fn widen(
    image: &Image,
    io: Io<'_>,
    refcount_order: u32,
) -> Result<NewTable, Failure> {
    let mut counts = Counts {
        image,
        io,
        new: Geometry {
            refcount_order,
            ..image.geometry
        },
        loaded: None,
    };
    let wanted = counts.blocks_with_counts().await?;
    let places = counts.place(wanted).await?;
    counts.write(&places).await
}

struct Counts<'a> {
    image: &'a Image,
    io: Io<'a>,
    new: Geometry,
    /// The old block that was looked at last.
    loaded: Option<(BlockNumber, Option<Vec<u8>>)>,
}

/// Where what is new lies.
struct Places {
    blocks: BTreeMap<BlockNumber, HostOffset>,
    table: HostOffset,
    table_clusters: u64,
}

impl Counts<'_> {
    /// The new blocks in which something counts.
    async fn blocks_with_counts(&mut self) -> Result<BTreeSet<BlockNumber>, Failure> {
        let old = self.image.geometry;
        let mut wanted = BTreeSet::new();
        for number in 0..self.image.refcounts.capacity() {
            let Some((_, counts)) = self.image.block_counts(self.io, number).await? else {
                continue;
            };
            let first = number * old.block_counts();
            for index in 0..old.block_counts() {
                if refcount(&counts, old.refcount_order, index as usize) > 0 {
                    wanted.insert((first + index) / self.new.block_counts());
                }
            }
        }
        Ok(wanted)
    }

    /// Finds places for the blocks and the table, and for those blocks that count them.
    async fn place(&mut self, wanted: BTreeSet<BlockNumber>) -> Result<Places, Failure> {
        let bits = self.new.cluster_bits;
        let per_block = self.new.block_counts();
        // Only to find clusters by: what it would count is not written.
        let mut draft = Draft::new(self.image, self.io);
        let mut blocks = BTreeMap::new();
        let mut waiting = wanted;
        loop {
            while let Some(number) = waiting.pop_first() {
                let place = draft.allocate(1).await?;
                blocks.insert(number, place);
                let own = (place.0 >> bits) / per_block;
                if !blocks.contains_key(&own) {
                    waiting.insert(own);
                }
            }
            let last = blocks.last_key_value().map_or(0, |(number, _)| *number);
            let table_clusters = self.new.clusters(8 * (last + 1));
            if table_clusters << bits > MAX_REFCOUNT_TABLE_BYTES {
                return Err(blockcore::IoError::NoSpace.into());
            }
            let table = draft.allocate(table_clusters).await?;
            let first = table.0 >> bits;
            let own = first / per_block..=(first + table_clusters - 1) / per_block;
            waiting.extend(own.filter(|number| !blocks.contains_key(number)));
            if waiting.is_empty() {
                return Ok(Places {
                    blocks,
                    table,
                    table_clusters,
                });
            }
            // The table's own clusters need blocks: it is placed again, behind these. What it would have had
            // stays free.
        }
    }

    async fn write(&mut self, places: &Places) -> Result<NewTable, Failure> {
        let (image, io, new) = (self.image, self.io, self.new);
        let bits = new.cluster_bits;
        let mut fewer: BTreeMap<ClusterNumber, u64> = BTreeMap::new();
        let mut lose = |start: ClusterNumber, count: u64| {
            for cluster in start..start + count {
                *fewer.entry(cluster).or_default() += 1;
            }
        };
        let (old_table, old_clusters) = {
            let header = image.header();
            (
                header.refcount_table_offset >> bits,
                u64::from(header.refcount_table_clusters),
            )
        };
        lose(old_table, old_clusters);
        let old_blocks = image.refcounts.table();
        for block in old_blocks.iter().map(|entry| entry & BLOCK_OFFSET) {
            if block != 0 {
                lose(block >> bits, 1);
            }
        }
        let mut more: BTreeSet<ClusterNumber> =
            places.blocks.values().map(|p| p.0 >> bits).collect();
        let table = places.table.0 >> bits;
        more.extend(table..table + places.table_clusters);
        let bytes = places.table_clusters << bits;
        let mut words = vec![0_u64; bytes as usize / 8];
        for (number, place) in &places.blocks {
            words[*number as usize] = place.0;
            let mut block = vec![0; new.cluster_bytes() as usize];
            let first = number * new.block_counts();
            for index in 0..new.block_counts() {
                let cluster = first + index;
                let before = self.count(cluster).await?;
                let gone = fewer.get(&cluster).copied().unwrap_or(0);
                let kept = before.checked_sub(gone);
                let mut count = kept.ok_or(Failure::BadCount(cluster, before))?;
                count += u64::from(more.contains(&cluster));
                if count > 0 {
                    if count > new.max_refcount() {
                        return Err(Failure::TooMany(cluster));
                    }
                    set_refcount(&mut block, new.refcount_order, index as usize, count);
                }
            }
            write_bytes(io, *place, &block).await?;
        }
        write_bytes(io, places.table, &from_words(&words)).await?;
        Ok(NewTable {
            place: places.table,
            clusters: places.table_clusters,
        })
    }

    /// A cluster's count by the old ones, of which clusters are asked for in their order.
    async fn count(&mut self, cluster: ClusterNumber) -> Result<u64, Failure> {
        let old = self.image.geometry;
        let number = cluster / old.block_counts();
        if self
            .loaded
            .as_ref()
            .is_none_or(|(loaded, _)| *loaded != number)
        {
            let counts = self.image.block_counts(self.io, number).await?;
            self.loaded = Some((number, counts.map(|(_, counts)| counts)));
        }
        let counts = self.loaded.as_ref().and_then(|(_, counts)| counts.as_ref());
        let index = (cluster % old.block_counts()) as usize;
        Ok(counts.map_or(0, |counts| refcount(counts, old.refcount_order, index)))
    }
}
