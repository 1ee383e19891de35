//! [`Counts`]: how often each cluster is referred to.

use std::collections::BTreeMap;

use crate::qcow2::layout::{Geometry, refcount, set_refcount};

/// Clusters whose counts are kept together.
const CHUNK: u64 = 4096;
/// How many ranges past the end of the file are kept.
const MAX_LOST: usize = 65536;

/// Counts as wide as the image's. Memory is taken for parts of the file that are referred to.
pub(super) struct Counts {
    geometry: Geometry,
    file_bytes: u64,
    clusters: u64,
    chunks: BTreeMap<u64, Vec<u8>>,
    /// Clusters past the end of the file that are referred to, first and last. They hold nothing, and
    /// nothing may be put there.
    lost: BTreeMap<u64, u64>,
}

impl Counts {
    /// No references yet, to a file of `file_bytes`.
    pub(super) fn new(geometry: Geometry, file_bytes: u64) -> Self {
        Self {
            geometry,
            file_bytes,
            clusters: geometry.clusters(file_bytes),
            chunks: BTreeMap::new(),
            lost: BTreeMap::new(),
        }
    }

    /// Clusters of the file, and the one beyond if it is referred to.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// How often a cluster is referred to.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let Some(chunk) = self.chunks.get(&(cluster / CHUNK)) else {
            return 0;
        };
        refcount(
            chunk,
            self.geometry.refcount_order,
            (cluster % CHUNK) as usize,
        )
    }

    /// Whether more is referred to past the end of the file than can be kept out of the way of what is put
    /// there.
    pub(super) fn has_lost_too_much(&self) -> bool {
        self.lost.len() >= MAX_LOST
    }

    /// Sets a count, also of a cluster past the end of the file.
    pub(super) fn set(&mut self, cluster: u64, count: u64) {
        let order = self.geometry.refcount_order;
        let chunk = self.chunks.entry(cluster / CHUNK);
        let chunk = chunk.or_insert_with(|| vec![0; (CHUNK as usize) << order >> 3]);
        set_refcount(chunk, order, (cluster % CHUNK) as usize, count);
        self.clusters = self.clusters.max(cluster + 1);
    }

    /// Whether nothing refers to any cluster from `first` up to `last`.
    pub(super) fn is_zero(&self, first: u64, last: u64) -> bool {
        let mut chunks = self.chunks.range(first / CHUNK..last.div_ceil(CHUNK));
        chunks.all(|(chunk, _)| {
            let begin = first.max(chunk * CHUNK);
            let end = last.min((chunk + 1) * CHUNK);
            (begin..end).all(|cluster| self.get(cluster) == 0)
        })
    }

    /// Counts a reference to every cluster that `bytes` at `offset` lie in. `wrong` is told of what cannot
    /// be counted: a range that ends a cluster or more past the end of the file, or a count that has no
    /// room for one more.
    pub(super) fn add(&mut self, offset: u64, bytes: u64, wrong: &mut dyn FnMut(String)) {
        if bytes == 0 {
            return;
        }
        let bits = self.geometry.cluster_bits;
        let past_end = (offset + bytes).saturating_sub(self.file_bytes);
        if past_end >= self.geometry.cluster_bytes() {
            wrong(format!(
                "error: {bytes} bytes at offset {offset:#x} are referred to, and the file ends at {:#x}",
                self.file_bytes
            ));
            if self.lost.len() < MAX_LOST {
                let last = self.lost.entry(offset >> bits).or_default();
                *last = (*last).max((offset + bytes - 1) >> bits);
            }
            return;
        }
        for cluster in offset >> bits..=(offset + bytes - 1) >> bits {
            let count = self.get(cluster);
            if count == self.geometry.max_refcount() {
                wrong(format!(
                    "error: cluster {cluster} is referred to more often than a reference count of this \
                     image can say ({count}): 'qemu-img amend' makes them wider, or 'qemu-img convert' a \
                     copy"
                ));
                continue;
            }
            self.set(cluster, count + 1);
        }
    }

    /// The first of `clusters` clusters in a row that nobody refers to; past the end of the file if there
    /// are none before. Looks from `from` on.
    fn find_free(&self, from: u64, clusters: u64) -> u64 {
        let mut first = from;
        let mut next = from;
        while next - first < clusters && next < self.clusters {
            if !self.chunks.contains_key(&(next / CHUNK)) {
                // None of these is referred to.
                next = ((next / CHUNK + 1) * CHUNK).min(self.clusters);
                continue;
            }
            next += 1;
            if self.get(next - 1) != 0 {
                first = next;
            }
        }
        // In order of their beginnings: what has been passed is not met again.
        for (begin, end) in &self.lost {
            if *begin < first + clusters && first <= *end {
                first = end + 1;
            }
        }
        first
    }

    /// As [`find_free`](Self::find_free), and counts a reference to each.
    pub(super) fn take_free(&mut self, from: u64, clusters: u64) -> u64 {
        let first = self.find_free(from, clusters);
        (first..first + clusters).for_each(|cluster| self.set(cluster, 1));
        first
    }

    /// The last cluster that is referred to.
    pub(super) fn highest(&self) -> u64 {
        let last = self.chunks.keys().rev().find_map(|chunk| {
            let mut clusters = (chunk * CHUNK..(chunk + 1) * CHUNK).rev();
            clusters.find(|cluster| self.get(*cluster) > 0)
        });
        last.unwrap_or(0)
    }

    /// The counts of the clusters from `first` on, as a refcount block has them.
    pub(super) fn block(&self, first: u64) -> Vec<u8> {
        let order = self.geometry.refcount_order;
        let mut block = vec![0; self.geometry.cluster_bytes() as usize];
        for index in 0..self.geometry.block_counts() {
            let count = self.get(first + index);
            if count > 0 {
                set_refcount(&mut block, order, index as usize, count);
            }
        }
        block
    }

    /// Every index of a refcount block for whose clusters there are references.
    pub(super) fn blocks(&self) -> Vec<u64> {
        let counts = self.geometry.block_counts();
        let mut blocks = Vec::new();
        for chunk in self.chunks.keys() {
            for block in chunk * CHUNK / counts..((chunk + 1) * CHUNK).div_ceil(counts) {
                let (first, last) = (block * counts, (block + 1) * counts);
                let begin = first.max(chunk * CHUNK);
                let end = last.min((chunk + 1) * CHUNK);
                if blocks.last() != Some(&block) && !self.is_zero(begin, end) {
                    blocks.push(block);
                }
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(refcount_order: u32) -> Geometry {
        Geometry {
            cluster_bits: 9,
            refcount_order,
            extended: false,
            zero_flag: true,
            data_file: false,
        }
    }

    #[test]
    fn references_are_counted_by_cluster_up_to_what_a_count_can_say() {
        let mut counts = Counts::new(geometry(1), 10_000 * 512);
        let mut wrong = Vec::new();
        for _ in 0..4 {
            counts.add(5000 * 512 + 100, 1000, &mut |what| wrong.push(what));
        }
        let found: Vec<_> = (4999..5005).map(|cluster| counts.get(cluster)).collect();
        assert_eq!(found, [0, 3, 3, 3, 0, 0]);
        assert_eq!(wrong.len(), 3);
        assert!(wrong[0].contains("cluster 5000"), "{wrong:?}");
        assert!(counts.is_zero(0, 5000) && !counts.is_zero(0, 5001));
        assert_eq!(counts.blocks(), [2]);
    }

    #[test]
    fn a_reference_may_end_within_the_cluster_after_the_end_and_no_later() {
        let mut counts = Counts::new(geometry(4), 5 * 512 + 8);
        let mut wrong = 0;
        counts.add(5 * 512, 512, &mut |_| wrong += 1);
        counts.add(6 * 512, 8, &mut |_| wrong += 1);
        assert_eq!((wrong, counts.clusters()), (1, 6));
    }

    #[test]
    fn what_is_past_the_end_and_referred_to_is_not_free() {
        let mut counts = Counts::new(geometry(4), 512);
        counts.set(0, 1);
        for (first, clusters) in [(20, 5), (3, 4), (3, 1), (8, 2)] {
            counts.add(first * 512, clusters * 512, &mut |_| ());
        }
        let found = [1, 2, 3, 10, 11].map(|clusters| counts.find_free(1, clusters));
        assert_eq!(found, [1, 1, 10, 10, 25]);
    }

    #[test]
    fn free_clusters_are_found_between_others_and_else_past_the_end() {
        let mut counts = Counts::new(geometry(4), 20_000 * 512);
        for cluster in (0..9000).step_by(3) {
            counts.set(cluster, 1);
        }
        assert_eq!(counts.find_free(0, 1), 1);
        assert_eq!(counts.find_free(3, 2), 4);
        assert_eq!(counts.find_free(0, 3), 8998);
        assert_eq!(counts.find_free(0, 11_000), 8998);
        counts.set(19_999, 1);
        assert_eq!(counts.find_free(0, 11_002), 20_000);
        assert_eq!(counts.find_free(19_990, 10), 20_000);
    }
}
