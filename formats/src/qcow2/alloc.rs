//! Finding host clusters for what is written, and giving back those that nothing refers to.
//!
//! Free clusters are reserved in extents, which grow with demand: their counts become 1 in memory at
//! once, and the committer writes counts before the entries that rest on them. So a crash leaks what was
//! reserved and not mapped, and no more. Metadata has extents of its own, and does not lie between data.
//!
//! A refcount block lies in the first cluster that it counts: where there is no block nothing is in use, so
//! that cluster is free.

use std::collections::VecDeque;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use blockcore::IoError;
use blockcore::driver::{Preallocation, TruncateFlags};
use blockcore::fault::{self, Fault};
use blockcore::io::Io;

use super::image::{FILE, Image, TURN_BITS, read_bytes, write_bytes};
use super::layout::bytes::from_words;
use super::layout::header::{MAX_REFCOUNT_TABLE_BYTES, field};
use super::layout::{HostOffset, set_refcount};
use super::limbo::{Cause, Freed};
use super::refcount::{BlockNumber, ClusterNumber, Missing, Run};

/// Smallest and largest extent that is reserved, in clusters.
pub(super) const RESERVE_CLUSTERS: std::ops::RangeInclusive<u64> = 16..=1024;
/// No extent of clusters is longer than this, so that small images do not reserve more than they hold.
const RESERVE_BYTES: u64 = 64 << 20;
/// Past this many pieces in limbo a round is run for their sake.
const LIMBO_PIECES: usize = 1024;

/// What a cluster is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Data,
    Metadata,
}

/// Clusters that are reserved, side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reserved {
    pub(super) start: ClusterNumber,
    pub(super) count: u64,
    /// Nothing was ever written there: it reads as zeroes.
    pub(super) zeroed: bool,
}

/// Reserved clusters, by what for.
#[derive(Default)]
pub(super) struct Pools {
    data: Pool,
    metadata: Pool,
}

#[derive(Default)]
struct Pool {
    extents: VecDeque<Reserved>,
    /// How large the latest extent was.
    reserved: u64,
}

impl Pools {
    fn pool(&mut self, class: Class) -> &mut Pool {
        match class {
            Class::Data => &mut self.data,
            Class::Metadata => &mut self.metadata,
        }
    }
}

impl Pool {
    /// The first clusters of the first extent, at most `most`.
    fn take(&mut self, most: u64) -> Option<Reserved> {
        let first = self.extents.front_mut()?;
        let count = most.min(first.count);
        let taken = Reserved { count, ..*first };
        first.start += count;
        first.count -= count;
        if first.count == 0 {
            self.extents.pop_front();
        }
        Some(taken)
    }
}

impl Image {
    fn pools(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().expect("no panic while counting")
    }

    /// Changes what is reserved; the segment has it so before anybody uses what was taken.
    fn with_pools<R>(&self, change: impl FnOnce(&mut Pools) -> R) -> R {
        let mut pools = self.pools();
        let result = change(&mut pools);
        if let Some(segment) = &self.segment {
            let extents = pools.metadata.extents.iter().chain(&pools.data.extents);
            segment.set_reserved(extents.map(|reserved| Run {
                start: reserved.start,
                count: reserved.count,
            }));
        }
        result
    }

    /// Clusters side by side, at least one and at most `most`. They are the caller's: to be mapped, or
    /// [given back](Self::give_back).
    pub(super) async fn allocate(
        &self,
        io: Io<'_>,
        class: Class,
        most: u64,
    ) -> Result<Reserved, IoError> {
        loop {
            self.check_whole()?;
            let taken = self.with_pools(|pools| pools.pool(class).take(most));
            if let Some(taken) = taken {
                self.check_free(io, taken.start, taken.count).await?;
                return Ok(taken);
            }
            let _turn = self.reserving.begin(0, 1, true).await;
            if self.pools().pool(class).extents.is_empty() {
                self.reserve(io, class, most).await?;
            }
        }
    }

    /// Whether clusters that count as free, or that nothing counts, hold no metadata: before anything is
    /// written there.
    pub(super) async fn check_free(
        &self,
        io: Io<'_>,
        start: ClusterNumber,
        count: u64,
    ) -> Result<(), IoError> {
        let place = HostOffset(start << self.geometry.cluster_bits);
        let bytes = count << self.geometry.cluster_bits;
        if !self.metadata.overlaps(place, bytes) {
            return Ok(());
        }
        let message = format!(
            "clusters at offset {:#x} count as free, and hold metadata",
            place.0
        );
        Err(self.corrupt(io, message, (place, bytes), true).await)
    }

    /// Reserved clusters that were not mapped, for the next who needs some. Nothing is being written there.
    pub(super) fn give_back(&self, class: Class, reserved: Reserved) {
        self.with_pools(|pools| {
            pools.pool(class).extents.push_front(Reserved {
                zeroed: false,
                ..reserved
            });
        });
    }

    /// Reserves another extent. The caller has the turn.
    async fn reserve(&self, io: Io<'_>, class: Class, at_least: u64) -> Result<(), IoError> {
        let (smallest, largest) = RESERVE_CLUSTERS.into_inner();
        let bound = (RESERVE_BYTES >> self.geometry.cluster_bits).max(smallest);
        let most = match class {
            Class::Data => largest.min(bound),
            Class::Metadata => smallest,
        };
        let before = self.pools().pool(class).reserved;
        let wanted = (before * 2).max(at_least).clamp(smallest, most);
        let run = self.find_free(io, wanted).await?;
        self.check_free(io, run.start, run.count).await?;
        let end = (run.start + run.count) << self.geometry.cluster_bits;
        let end_before = self.geometry.clusters(io.child(FILE).bytes());
        if let Err(error) = self.lengthen(io, end).await {
            self.uncount(io, run).await?;
            return Err(error);
        }
        let old = end_before.saturating_sub(run.start).min(run.count);
        let parts = [
            (run.start, old, false),
            (run.start + old, run.count - old, true),
        ];
        self.with_pools(|pools| {
            let pool = pools.pool(class);
            pool.reserved = wanted;
            for (start, count, zeroed) in parts {
                if count > 0 {
                    pool.extents.push_back(Reserved {
                        start,
                        count,
                        zeroed,
                    });
                }
            }
        });
        Ok(())
    }

    /// Finds free clusters and counts them as used.
    async fn find_free(&self, io: Io<'_>, most: u64) -> Result<Run, IoError> {
        let begun = self.first_free.load(Ordering::Acquire);
        let mut from = begun;
        loop {
            let missing = match self.refcounts.find_free(from, most) {
                Ok(run) => match self.refcounts.take(run) {
                    Ok(true) => {
                        let next = run.start + run.count;
                        // Unless something before it was freed meanwhile.
                        let _ = self.first_free.compare_exchange(
                            begun,
                            next,
                            Ordering::AcqRel,
                            Ordering::Acquire,
                        );
                        return Ok(run);
                    }
                    Ok(false) => continue,
                    Err(missing) => missing,
                },
                Err(missing) => missing,
            };
            let block = match missing {
                Missing::Load(block, _) | Missing::Make(block) => block,
            };
            from = from.max(block * self.geometry.block_counts());
            self.supply(io, missing).await?;
        }
    }

    /// Metadata clusters that lie side by side, all of them.
    pub(super) async fn allocate_side_by_side(
        &self,
        io: Io<'_>,
        count: u64,
    ) -> Result<HostOffset, IoError> {
        let _turn = self.reserving.begin(0, 1, true).await;
        let mut from = self.first_free.load(Ordering::Acquire);
        loop {
            match self.refcounts.find_free(from, count) {
                Ok(run) if run.count == count => {
                    if !self.refcounts.take(run).unwrap_or(false) {
                        continue;
                    }
                    let place = HostOffset(run.start << self.geometry.cluster_bits);
                    let bytes = count << self.geometry.cluster_bits;
                    self.check_free(io, run.start, count).await?;
                    if let Err(error) = self.lengthen(io, place.0 + bytes).await {
                        self.uncount(io, run).await?;
                        return Err(error);
                    }
                    return Ok(place);
                }
                Ok(run) => from = run.start + run.count,
                Err(missing) => {
                    let counts = self.geometry.block_counts();
                    let (Missing::Make(block) | Missing::Load(block, _)) = missing;
                    // All before it is taken, and need not be in memory for another look.
                    from = from.max(block * counts);
                    // What is made there is not free: a run goes on behind it at the earliest.
                    if matches!(missing, Missing::Make(_)) && count >= counts {
                        return Err(IoError::NoSpace);
                    }
                    self.supply(io, missing).await?;
                }
            }
        }
    }

    /// Takes back what was counted for clusters that could not be had after all.
    async fn uncount(&self, io: Io<'_>, run: Run) -> Result<(), IoError> {
        for cluster in run.start..run.start + run.count {
            self.add_count(io, cluster, -1).await?;
        }
        self.first_free.fetch_min(run.start, Ordering::AcqRel);
        Ok(())
    }

    /// Sees to it that the file reaches `end`: what is reserved lies inside of it.
    pub(super) async fn lengthen(&self, io: Io<'_>, end: u64) -> Result<(), IoError> {
        if end <= io.child(FILE).bytes() {
            return Ok(());
        }
        let (off, flags) = (Preallocation::Off, TruncateFlags::empty());
        io.child(FILE).truncate(end, false, off, flags).await
    }

    /// Loads or makes a refcount block.
    async fn supply(&self, io: Io<'_>, missing: Missing) -> Result<(), IoError> {
        match missing {
            Missing::Load(block, place) => self.load_block(io, block, place).await,
            Missing::Make(block) => self.make_block(io, block).await,
        }
    }

    pub(super) async fn load_block(
        &self,
        io: Io<'_>,
        block: BlockNumber,
        place: HostOffset,
    ) -> Result<(), IoError> {
        // Far from the turns for slices.
        let turn = (1 << 62) + (block << TURN_BITS);
        let _turn = self.loads.begin(turn, turn + 1, true).await;
        let cluster = self.geometry.cluster_bytes();
        if self.refcounts.get(block * self.geometry.block_counts())
            != Err(Missing::Load(block, place))
        {
            return Ok(());
        }
        let is_inside = place.0 < io.child(FILE).bytes();
        if !self.geometry.is_aligned(place.0) || !self.metadata.reaches(place) || !is_inside {
            let message = format!(
                "refcount block {block} is at offset {:#x}, where none can be",
                place.0
            );
            return Err(self.corrupt(io, message, (place, cluster), true).await);
        }
        io.child(FILE).event("refblock_load").await?;
        let counts = read_bytes(io, place, cluster).await?;
        self.refcounts.install(block, counts);
        Ok(())
    }

    /// Makes a refcount block where there is none. The caller has the turn for reserving.
    async fn make_block(&self, io: Io<'_>, block: BlockNumber) -> Result<(), IoError> {
        if block >= self.refcounts.capacity() {
            return self.grow_table(io, block).await;
        }
        let first = block * self.geometry.block_counts();
        let place = self.new_metadata(io, first, 1).await?;
        self.refcounts.make(block, place);
        Ok(())
    }

    /// Makes clusters metadata for which there has been no refcount block.
    async fn new_metadata(
        &self,
        io: Io<'_>,
        first: ClusterNumber,
        count: u64,
    ) -> Result<HostOffset, IoError> {
        let bits = self.geometry.cluster_bits;
        let place = HostOffset(first.checked_mul(1 << bits).ok_or(IoError::NoSpace)?);
        let bytes = count << bits;
        let end = HostOffset(place.0 + bytes);
        if !self.metadata.reaches(end) || end.0 > blockcore::io::MAX_BYTES {
            return Err(IoError::NoSpace);
        }
        self.check_free(io, first, count).await?;
        self.lengthen(io, end.0).await?;
        self.metadata.add(place, bytes);
        Ok(place)
    }

    /// Makes a refcount table with room for `block`, and, since nothing before it is known to be free,
    /// puts it with blocks of its own where that block's clusters begin. The caller has the turn for
    /// reserving, so no other entry of the table is made meanwhile.
    async fn grow_table(&self, io: Io<'_>, block: BlockNumber) -> Result<(), IoError> {
        // What the old table does not have yet is in the image before the new one takes its place.
        self.commit(io).await?;
        let g = self.geometry;
        let per_block = g.block_counts();
        let (mut blocks, mut clusters) = (1, 0);
        loop {
            // Half as many again as are needed, so that it is not done often.
            let entries = (block + blocks) * 3 / 2;
            let needed = g.clusters(entries * 8);
            let blocks_needed = (blocks + needed).div_ceil(per_block);
            if (needed, blocks_needed) == (clusters, blocks) {
                break;
            }
            (clusters, blocks) = (needed, blocks_needed.max(blocks));
        }
        if clusters << g.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
            return Err(IoError::NoSpace);
        }
        let first = block * per_block;
        let used = blocks + clusters;
        let place = self.new_metadata(io, first, used).await?;
        let mut table = self.refcounts.table();
        table.resize((clusters << g.cluster_bits) as usize / 8, 0);
        for index in 0..blocks {
            table[(block + index) as usize] = place.0 + (index << g.cluster_bits);
        }
        let table_place = HostOffset(place.0 + (blocks << g.cluster_bits));
        let written = self.write_table(io, place, blocks, used, &table).await;
        if let Err(error) = written {
            // Nothing names it, and nothing counts it.
            self.metadata.remove(place, used << g.cluster_bits);
            return Err(error);
        }
        let mut fields = table_place.0.to_be_bytes().to_vec();
        fields.extend((clusters as u32).to_be_bytes());
        self.switch_header(io, &[(field::REFCOUNT_TABLE, fields)])
            .await?;
        let old_place = self.refcounts.place();
        let old_clusters = {
            let mut header = self.header();
            header.refcount_table_offset = table_place.0;
            std::mem::replace(&mut header.refcount_table_clusters, clusters as u32)
        };
        self.refcounts.replace_table(table_place, table);
        self.let_go(io, old_place, u64::from(old_clusters));
        Ok(())
    }

    /// Writes a new refcount table behind its `blocks` blocks, durably. From `place` on they count `used`
    /// clusters: themselves.
    async fn write_table(
        &self,
        io: Io<'_>,
        place: HostOffset,
        blocks: u64,
        used: u64,
        table: &[u64],
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let per_block = g.block_counts();
        for index in 0..blocks {
            let counted = used.saturating_sub(index * per_block).min(per_block);
            let mut counts = vec![0; g.cluster_bytes() as usize];
            for count in 0..counted as usize {
                set_refcount(&mut counts, g.refcount_order, count, 1);
            }
            let host = HostOffset(place.0 + (index << g.cluster_bits));
            write_bytes(io, host, &counts).await?;
        }
        let behind = HostOffset(place.0 + (blocks << g.cluster_bits));
        write_bytes(io, behind, &from_words(table)).await?;
        self.flush_file(io).await
    }

    /// Adds to a cluster's count; loads what is needed.
    pub(super) async fn add_count(
        &self,
        io: Io<'_>,
        cluster: ClusterNumber,
        difference: i64,
    ) -> Result<u64, IoError> {
        loop {
            self.check_whole()?;
            let missing = match self.refcounts.add(cluster, difference) {
                Ok(Ok(count)) => return Ok(count),
                Ok(Err(bad)) => return Err(self.bad_count(io, bad.cluster, bad.count).await),
                Err(missing) => missing,
            };
            match missing {
                Missing::Load(block, place) => self.load_block(io, block, place).await?,
                // What is in use is counted.
                Missing::Make(_) => return Err(self.bad_count(io, cluster, 0).await),
            }
        }
    }

    /// A cluster's count; loads what is needed.
    pub(super) async fn count(&self, io: Io<'_>, cluster: ClusterNumber) -> Result<u64, IoError> {
        loop {
            self.check_whole()?;
            match self.refcounts.get(cluster) {
                Ok(count) => return Ok(count),
                Err(Missing::Load(block, place)) => self.load_block(io, block, place).await?,
                Err(Missing::Make(_)) => return Ok(0),
            }
        }
    }

    /// Where a refcount block is, and what it holds; `None` if there is none.
    pub(super) async fn block_counts(
        &self,
        io: Io<'_>,
        block: BlockNumber,
    ) -> Result<Option<(HostOffset, Vec<u8>)>, IoError> {
        loop {
            match self.refcounts.copy(block) {
                Ok(counts) => return Ok(Some(counts)),
                Err(Missing::Load(block, place)) => self.load_block(io, block, place).await?,
                Err(Missing::Make(_)) => return Ok(None),
            }
        }
    }

    async fn bad_count(&self, io: Io<'_>, cluster: ClusterNumber, count: u64) -> IoError {
        let cluster_bytes = self.geometry.cluster_bytes();
        let host = HostOffset(cluster << self.geometry.cluster_bits);
        let message = format!(
            "the reference count of the cluster at offset {:#x} is {count}, which does not fit what refers \
             to it",
            host.0
        );
        self.corrupt(io, message, (host, cluster_bytes), true).await
    }

    /// Clusters have lost a reference. They are used again when that is durable and nobody uses them any
    /// more.
    pub(super) fn free(&self, io: Io<'_>, freed: Freed) {
        if fault::is_planted(Fault::NoLimbo) {
            return self.release_behind(io, vec![freed]);
        }
        if self.limbo.add(freed) >= LIMBO_PIECES {
            self.commit_behind(io);
        }
    }

    /// [Releases](Self::release) clusters without anybody waiting for it.
    pub(super) fn release_behind(&self, io: Io<'_>, freed: Vec<Freed>) {
        if freed.is_empty() {
            return;
        }
        self.releasing.fetch_add(1, Ordering::AcqRel);
        self.behind(io, |image, fork| async move {
            if let Err(error) = image.release(fork.io(), freed).await {
                let name = fork.io().name();
                tracing::warn!("clusters of '{name}' could not be freed and are lost: {error}");
            }
            image.releasing.fetch_sub(1, Ordering::AcqRel);
        });
    }

    /// What was in limbo and has become durable: waits for those who use it still, then gives it back.
    pub(super) async fn release(&self, io: Io<'_>, freed: Vec<Freed>) -> Result<(), IoError> {
        let bits = self.geometry.cluster_bits;
        let ranges = freed
            .iter()
            .map(|freed| freed.host.0..freed.host.0 + (freed.clusters << bits))
            .collect();
        if !fault::is_planted(Fault::NoWaitForUsers) {
            io.wait_unused(FILE, ranges).await;
        }
        for freed in freed {
            let first = freed.host.0 >> bits;
            for cluster in first..first + freed.clusters {
                self.release_cluster(io, cluster, freed.cause).await?;
            }
        }
        Ok(())
    }

    async fn release_cluster(
        &self,
        io: Io<'_>,
        cluster: ClusterNumber,
        cause: Cause,
    ) -> Result<(), IoError> {
        let bits = self.geometry.cluster_bits;
        let options = self.options();
        let pass = match cause {
            Cause::Request => options.pass_discard_request,
            Cause::Other => options.pass_discard_other,
        };
        // Nobody packs compressed data behind what was there from here on.
        let _turn = self.packing.begin(0, 1, true).await;
        self.forget_tail(cluster);
        // Before anybody can have it.
        if pass && self.count(io, cluster).await? == 1 {
            let (offset, bytes) = (cluster << bits, 1 << bits);
            // Space that cannot be given back is no reason to fail.
            let _ = io.child(FILE).discard(offset, bytes).await;
        }
        if self.add_count(io, cluster, -1).await? == 0 {
            self.first_free.fetch_min(cluster, Ordering::AcqRel);
        }
        Ok(())
    }

    fn forget_tail(&self, cluster: ClusterNumber) {
        let bits = self.geometry.cluster_bits;
        let mut tail = self.tail();
        *tail = tail.filter(|tail| !tail.is_in(cluster, bits));
    }

    /// Gives back what is reserved, at the end.
    pub(super) async fn give_back_reserved(&self, io: Io<'_>) -> Result<(), IoError> {
        let reserved: Vec<_> = self.with_pools(|pools| {
            let data = std::mem::take(&mut pools.data.extents);
            let metadata = std::mem::take(&mut pools.metadata.extents);
            data.into_iter().chain(metadata).collect()
        });
        let mut runs: Vec<_> = reserved
            .into_iter()
            .map(|reserved| Run {
                start: reserved.start,
                count: reserved.count,
            })
            .collect();
        for run in &runs {
            self.uncount(io, *run).await?;
        }
        runs.sort_by_key(|run| std::cmp::Reverse(run.start));
        self.cut_off(io, &runs).await
    }

    /// Makes the file end before free clusters at its end. `runs` are free, the last one first.
    async fn cut_off(&self, io: Io<'_>, runs: &[Run]) -> Result<(), IoError> {
        let bits = self.geometry.cluster_bits;
        let file_bytes = io.child(FILE).bytes();
        let mut end = file_bytes >> bits;
        for run in runs {
            if run.start + run.count == end {
                end = run.start;
            }
        }
        if end << bits >= file_bytes || !file_bytes.is_multiple_of(1 << bits) {
            return Ok(());
        }
        let (off, flags) = (Preallocation::Off, TruncateFlags::empty());
        match io
            .child(FILE)
            .truncate(end << bits, false, off, flags)
            .await
        {
            // A device is as long as it is.
            Err(IoError::Unsupported | IoError::OutOfRange) => Ok(()),
            result => result,
        }
    }
}
