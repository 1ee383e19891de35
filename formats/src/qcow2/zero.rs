//! Zeroing and discarding whole clusters, or subclusters.

use blockcore::IoError;
use blockcore::driver::ZeroFlags;
use blockcore::io::Io;

use super::image::{BACKING, Image};
use super::layout::entry::{Kind, L2Entry};
use super::limbo::Cause;

/// Longest range that is changed under one turn.
const RUN_BYTES: u64 = 1 << 30;

/// What is to become of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// They read as zeroes, and keep their place if they have one.
    Zero,
    /// They read as zeroes, and nothing is kept for them.
    ZeroAndFree,
    /// Nobody wants them any more.
    Discard,
}

impl Image {
    pub(super) async fn write_zeroes(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        if !self.geometry.zero_flag {
            // Version 2 cannot say "zero": where nothing shines through, "not there" says it.
            let nothing_shines = !self.shines_through(io, offset);
            if !nothing_shines || !flags.contains(ZeroFlags::MAY_UNMAP) {
                return match self.is_zero(io, offset, bytes).await? {
                    true => Ok(()),
                    false => Err(IoError::Unsupported),
                };
            }
        }
        if self.raw_data_file() {
            // Who reads the data file by itself finds zeroes, too.
            io.child(self.data_child())
                .write_zeroes(offset, bytes, flags)
                .await?;
        }
        let change = match flags.contains(ZeroFlags::MAY_UNMAP) {
            true => Change::ZeroAndFree,
            false => Change::Zero,
        };
        self.change_range(io, offset, bytes, change).await
    }

    /// Whether a backing node has anything from `offset` on.
    pub(super) fn shines_through(&self, io: Io<'_>, offset: u64) -> bool {
        io.has_child(BACKING) && io.child(BACKING).bytes() > offset
    }

    pub(super) async fn discard(&self, io: Io<'_>, offset: u64, bytes: u64) -> Result<(), IoError> {
        if !self.geometry.zero_flag && io.has_child(BACKING) {
            // What the backing image has would be back.
            return Err(IoError::Unsupported);
        }
        self.change_range(io, offset, bytes, Change::Discard).await
    }

    /// Changes whole subclusters, a run of clusters at a time.
    async fn change_range(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        change: Change,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        // The disk's end may cut its last cluster short: nothing is behind it.
        let mut end = offset + bytes;
        if end == self.bytes() {
            end = end.next_multiple_of(g.cluster_bytes());
        }
        let mut next = offset;
        while next < end {
            let l1_index = self.l1_index(next);
            let table_end = (l1_index as u64 + 1) * g.table_covers();
            let until = end.min(table_end).min(next.saturating_add(RUN_BYTES));
            if !self.has_no_table_and_needs_none(io, next, change) {
                self.change_run(io, next, until, change).await?;
            }
            next = until;
        }
        Ok(())
    }

    /// Nothing is mapped there, and that is as good as what is wanted.
    fn has_no_table_and_needs_none(&self, io: Io<'_>, offset: u64, change: Change) -> bool {
        let has_table = self.l1().get(self.l1_index(offset)).table().is_some();
        let shines = self.shines_through(io, offset);
        !has_table && !shines && (change != Change::Zero || !self.geometry.data_file)
    }

    async fn change_run(
        &self,
        io: Io<'_>,
        begin: u64,
        end: u64,
        change: Change,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let first = begin >> g.cluster_bits;
        let last = g.clusters(end);
        let _turn = self
            .turns
            .begin(first << g.cluster_bits, last << g.cluster_bits, true)
            .await;
        self.own_table(io, self.l1_index(begin)).await?;
        // Corrupt entries are found before anything is changed.
        for cluster in first..last {
            let entry = self.entry(io, cluster).await?;
            let start = begin.max(cluster << g.cluster_bits);
            let until = end.min((cluster + 1) << g.cluster_bits);
            if entry.is_compressed() && until - start < g.cluster_bytes() {
                return Err(IoError::Unsupported);
            }
        }
        let has_backing = io.has_child(BACKING);
        let cause = match change {
            Change::Zero => Cause::Other,
            Change::ZeroAndFree | Change::Discard => Cause::Request,
        };
        let keep = self.options().discard_no_unref;
        self.publish_for(io, first, last - first, cause, |cluster, old| {
            let start = begin.max(cluster << g.cluster_bits);
            let until = end.min((cluster + 1) << g.cluster_bits) - 1;
            let index = g.subcluster(start);
            let count = g.subcluster(until) - index + 1;
            let is_whole = count == g.subclusters();
            match change {
                Change::Zero => zeroed(old, index, count, g),
                Change::ZeroAndFree | Change::Discard if !is_whole => zeroed(old, index, count, g),
                Change::ZeroAndFree | Change::Discard if keep && old.is_copied() => {
                    zeroed(old, index, count, g)
                }
                _ if !g.zero_flag => L2Entry::default(),
                Change::Discard if old.is_all(Kind::Absent, g) && !has_backing => old,
                Change::ZeroAndFree | Change::Discard => L2Entry::zero(g),
            }
        })
        .await?;
        if self.geometry.data_file && change != Change::Zero && self.options().pass_discard_request
        {
            let data = io.child(self.data_child());
            let bytes = end.min(data.bytes()).saturating_sub(begin);
            if bytes > 0 {
                // Space that cannot be given back is no reason to fail.
                let _ = data.discard(begin, bytes).await;
            }
        }
        Ok(())
    }
}

/// The entry with a part that reads as zeroes. Of a place that others have, too, nothing is kept where all
/// of the cluster is to be zero.
fn zeroed(old: L2Entry, index: u32, count: u32, g: super::layout::Geometry) -> L2Entry {
    let is_whole = count == g.subclusters();
    if is_whole && !old.is_copied() {
        return L2Entry::zero(g);
    }
    old.with_zero(index, count)
}
