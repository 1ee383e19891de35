//! Making all reference counts anew, beside the old ones.

use std::mem;

use blockcore::Error;

use super::Check;
use super::blocks::Blocks;
use super::counts::Counts;
use crate::qcow2::layout::bytes::from_words;
use crate::qcow2::layout::extension::corrupt;
use crate::qcow2::layout::header::MAX_REFCOUNT_TABLE_BYTES;
use blockcore::driver::Fix;

/// Where in the header these begin: offset and clusters of the refcount table, number and offset of
/// snapshots. All in one sector.
const FIELDS_AT: u64 = 48;

impl Check<'_, '_> {
    /// Makes the reference counts of an image anew that cannot be corrected one by one, and counts once
    /// more what is wrong then.
    pub(super) async fn rebuild(&mut self) -> Result<(), Error> {
        self.say("making all reference counts anew");
        let before = self.report;
        (self.report.corruptions, self.report.leaks) = (0, 0);
        self.replace_refcounts().await?;
        let report = &mut self.report;
        report.corruptions_fixed += before.corruptions.saturating_sub(report.corruptions);
        report.leaks_fixed += before.leaks;
        // What could not be read before is not looked at any more.
        report.check_errors = 0;
        Ok(())
    }

    /// Writes a snapshot table in free clusters and puts it in the old one's place, with new reference
    /// counts.
    pub(super) async fn replace_snapshot_table(&mut self, table: &[u8]) -> Result<(), Error> {
        let cluster_bits = self.image.geometry.cluster_bits;
        let clusters = self.image.geometry.clusters(table.len() as u64);
        let mut first = 0;
        if clusters > 0 {
            first = self.counts.take_free(1, clusters);
            self.image.write(first << cluster_bits, table).await?;
        }
        let header = &mut self.image.header;
        header.snapshots_offset = first << cluster_bits;
        header.snapshots = self.snapshots.list.len() as u32;
        self.snapshots.table_bytes = table.len() as u64;
        // What is counted again is not found again.
        let report = self.report;
        self.replace_refcounts().await?;
        self.report = report;
        Ok(())
    }

    /// Counts all references again and writes what comes out to free clusters, and then their place to
    /// the header. What the old counts took is free from then on.
    async fn replace_refcounts(&mut self) -> Result<(), Error> {
        let geometry = self.image.geometry;
        if self.counts.has_lost_too_much() {
            return Err(corrupt(
                "too much of what the image refers to lies past the end of its file",
            ));
        }
        let new = Counts::new(geometry, self.image.bytes());
        let mut taken = mem::replace(&mut self.counts, new);
        self.count(Fix::None).await?;
        let (first, table) = self.place_refcounts(&mut taken)?;
        for (index, offset) in table.iter().enumerate().filter(|(_, offset)| **offset != 0) {
            let block = self.counts.block(index as u64 * geometry.block_counts());
            self.image.write(*offset, &block).await?;
        }
        let table_offset = first << geometry.cluster_bits;
        self.image.write(table_offset, &from_words(&table)).await?;
        self.image.flush().await?;
        let header = &mut self.image.header;
        header.refcount_table_offset = table_offset;
        header.refcount_table_clusters = geometry.clusters(table.len() as u64 * 8) as u32;
        let mut fields = table_offset.to_be_bytes().to_vec();
        fields.extend(header.refcount_table_clusters.to_be_bytes());
        fields.extend(header.snapshots.to_be_bytes());
        fields.extend(header.snapshots_offset.to_be_bytes());
        self.image.write(FIELDS_AT, &fields).await?;
        self.image.flush().await?;
        self.blocks = Blocks::read(&self.image).await?;
        self.rebuild = false;
        self.highest = self.counts.highest();
        Ok(())
    }

    /// Finds clusters that are not `taken` for a table and for the blocks of all clusters that are referred
    /// to, which these are, too. Returns the table's first cluster, and the table.
    fn place_refcounts(&mut self, taken: &mut Counts) -> Result<(u64, Vec<u64>), Error> {
        let geometry = self.image.geometry;
        let per_cluster = geometry.cluster_bytes() / 8;
        let mut words: Vec<u64> = Vec::new();
        let mut table: Option<(u64, u64)> = None;
        loop {
            let wanted = self.counts.blocks();
            let entries = wanted.last().map_or(1, |last| last + 1);
            let clusters = entries.div_ceil(per_cluster);
            if clusters << geometry.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                return Err(corrupt(
                    "a refcount table for all that is referred to would be longer than it may be",
                ));
            }
            words.resize((clusters * per_cluster) as usize, 0);
            let mut is_done = true;
            let mut from = 1;
            for block in wanted {
                let word = &mut words[block as usize];
                if *word == 0 {
                    let cluster = taken.take_free(from, 1);
                    self.counts.set(cluster, 1);
                    *word = cluster << geometry.cluster_bits;
                    (is_done, from) = (false, cluster);
                }
            }
            if table.is_none_or(|(_, has)| has < clusters) {
                if let Some((first, clusters)) = table {
                    // Not worth being taken again: the longer one follows it.
                    (first..first + clusters).for_each(|cluster| self.counts.set(cluster, 0));
                }
                let first = taken.take_free(1, clusters);
                (first..first + clusters).for_each(|cluster| self.counts.set(cluster, 1));
                table = Some((first, clusters));
                is_done = false;
            }
            if is_done {
                break;
            }
        }
        let (first, _) = table.expect("the loop has placed it");
        Ok((first, words))
    }
}
