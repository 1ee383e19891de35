//! [`Blocks`]: the reference counts that an image has.

use std::collections::BTreeMap;

use blockcore::Error;

use super::image::Image;
use super::{Check, Repairs};
use crate::qcow2::layout::{BLOCK_OFFSET, Geometry, refcount, set_refcount};

/// How much of the blocks is kept.
const KEPT_BYTES: u64 = 8 << 20;

/// The refcount table, and those blocks that were looked at last.
pub(super) struct Blocks {
    geometry: Geometry,
    table: Vec<u64>,
    kept: BTreeMap<u64, Vec<u8>>,
    /// Those of them that the file has not yet.
    dirty: Vec<u64>,
}

impl Blocks {
    pub(super) async fn read(image: &Image<'_>) -> Result<Self, Error> {
        let header = &image.header;
        let entries = header.refcount_table_bytes() / 8;
        Ok(Self {
            geometry: image.geometry,
            table: image.words(header.refcount_table_offset, entries).await?,
            kept: BTreeMap::new(),
            dirty: Vec::new(),
        })
    }

    pub(super) fn table(&self) -> &[u64] {
        &self.table
    }

    /// Where a block is; 0 if there is none.
    pub(super) fn offset(&self, block: u64) -> u64 {
        let entry = self.table.get(block as usize);
        entry.copied().unwrap_or(0) & BLOCK_OFFSET
    }

    /// Whether there is a block.
    pub(super) fn has(&self, block: u64) -> bool {
        self.offset(block) != 0
    }

    /// Whether a block, if there is one, is where a block can be.
    pub(super) fn is_readable(&self, block: u64) -> bool {
        let offset = self.offset(block);
        self.geometry.is_aligned(offset) && offset <= i64::MAX as u64
    }

    /// The reference count of a cluster whose block is readable.
    pub(super) async fn get(&mut self, image: &Image<'_>, cluster: u64) -> Result<u64, Error> {
        let counts = self.geometry.block_counts();
        let block = cluster / counts;
        if !self.has(block) {
            return Ok(0);
        }
        if !self.kept.contains_key(&block) {
            self.make_room(image).await?;
            let bytes = self.geometry.cluster_bytes();
            let read = image.read(self.offset(block), bytes).await?;
            self.kept.insert(block, read);
        }
        let index = (cluster % counts) as usize;
        Ok(refcount(
            &self.kept[&block],
            self.geometry.refcount_order,
            index,
        ))
    }

    /// Sets the reference count of a cluster that was just looked at.
    pub(super) fn set(&mut self, cluster: u64, count: u64) {
        let counts = self.geometry.block_counts();
        let block = cluster / counts;
        let bytes = self.kept.get_mut(&block).expect("it was just looked at");
        let index = (cluster % counts) as usize;
        set_refcount(bytes, self.geometry.refcount_order, index, count);
        if self.dirty.last() != Some(&block) {
            self.dirty.push(block);
        }
    }

    async fn make_room(&mut self, image: &Image<'_>) -> Result<(), Error> {
        let most = KEPT_BYTES >> self.geometry.cluster_bits;
        if (self.kept.len() as u64) < most {
            return Ok(());
        }
        self.write_back(image).await?;
        self.kept.clear();
        Ok(())
    }

    /// Writes what was set.
    pub(super) async fn write_back(&mut self, image: &Image<'_>) -> Result<(), Error> {
        for block in std::mem::take(&mut self.dirty) {
            image.write(self.offset(block), &self.kept[&block]).await?;
        }
        Ok(())
    }
}

impl Check<'_, '_> {
    /// Counts the references to refcount blocks, of which each must be the only one.
    pub(super) fn count_blocks(&mut self) {
        let geometry = self.image.geometry;
        for index in 0..self.blocks.table().len() {
            let entry = self.blocks.table()[index];
            let offset = entry & BLOCK_OFFSET;
            let wrong = if entry & !BLOCK_OFFSET != 0 {
                Some("has reserved bits set")
            } else if !geometry.is_aligned(offset) {
                Some("points to no beginning of a cluster")
            } else {
                None
            };
            if let Some(wrong) = wrong {
                self.corrupt(&format!(
                    "entry {index} of the refcount table {wrong}: {entry:#x}"
                ));
                self.rebuild = true;
                continue;
            }
            let cluster = offset >> geometry.cluster_bits;
            if cluster >= self.counts.clusters() {
                self.corrupt(&format!(
                    "refcount block {index} at {offset:#x} is outside of the file"
                ));
                // Nothing is known of its clusters, and the file is not made longer for an entry that
                // may say anything.
                self.rebuild |= self.repair.has_errors();
                continue;
            }
            if offset == 0 {
                continue;
            }
            self.refer(offset, geometry.cluster_bytes());
            let count = self.counts.get(cluster);
            if count != 1 {
                self.corrupt(&format!(
                    "refcount block {index} is referred to {count} times"
                ));
                self.rebuild = true;
            }
        }
    }
}
