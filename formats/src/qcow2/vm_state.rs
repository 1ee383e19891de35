//! A machine's state: what the L1 table maps behind the disk's end.
//!
//! It begins with the first L2 table that has nothing of the disk, so where it is depends on the disk's
//! length. A snapshot that is taken takes it along ([`snapshot`](super::snapshot)), and one that is applied
//! brings its own back. A disk whose length changes loses it, since it would be elsewhere, or a part of the
//! disk.
//!
//! It is written like the disk, in whole clusters; a backing image has no part in it.

use blockcore::IoError;
use blockcore::io::Io;
use blockcore::io::buffer::Segments;

use super::image::Image;
use super::layout::entry::{Kind, L2Entry};
use super::layout::header::MAX_L1_BYTES;

impl Image {
    /// The first entry of the L1 table that does not belong to the disk; maybe past the table's end.
    pub(super) fn vm_state_index(&self) -> usize {
        self.geometry.l1_entries(self.bytes()) as usize
    }

    /// Where `bytes` of the state are, from `offset` on, as if they were the disk's.
    fn vm_state_begin(&self, offset: u64, bytes: u64) -> Result<u64, IoError> {
        let g = self.geometry;
        let base = self.vm_state_index() as u64 * g.table_covers();
        let begin = base.checked_add(offset).ok_or(IoError::OutOfRange)?;
        let end = begin.checked_add(bytes).ok_or(IoError::OutOfRange)?;
        match g.l1_entries(end) * 8 <= MAX_L1_BYTES && end <= blockcore::io::MAX_BYTES {
            true => Ok(begin),
            false => Err(IoError::OutOfRange),
        }
    }

    /// Writes a part of the state. Durable with the next commit.
    pub(super) async fn save_state(
        &self,
        io: Io<'_>,
        offset: u64,
        from: Segments,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let mut next = self.vm_state_begin(offset, from.bytes())?;
        let end = next + from.bytes();
        self.reach(io, end).await?;
        let mut done = 0;
        while next < end {
            let begin = g.cluster_start(next);
            let whole = Segments::allocate(g.cluster_bytes() as usize, 4096);
            let bytes = (begin + g.cluster_bytes()).min(end) - next;
            if bytes < g.cluster_bytes() {
                self.read_state(io, begin, whole.clone()).await?;
            }
            let part = from.slice(done, bytes).to_vec();
            whole.slice(next - begin, bytes).copy_from(&part);
            self.write(io, begin, whole).await?;
            (next, done) = (next + bytes, done + bytes);
        }
        Ok(())
    }

    /// Sees to it that the L1 table reaches `end`.
    async fn reach(&self, io: Io<'_>, end: u64) -> Result<(), IoError> {
        let g = self.geometry;
        let (needed, entries) = (g.l1_entries(end), self.l1().entries.len() as u64);
        if needed <= entries {
            return Ok(());
        }
        // Half as many again, so that it is not done often.
        let wanted = (entries * 3 / 2).min(MAX_L1_BYTES / 8).max(needed);
        self.grow_l1(io, wanted * g.table_covers()).await
    }

    /// Reads a part of the state. What nobody has written reads as zeroes.
    pub(super) async fn load_state(
        &self,
        io: Io<'_>,
        offset: u64,
        into: Segments,
    ) -> Result<(), IoError> {
        let begin = self.vm_state_begin(offset, into.bytes())?;
        self.read_state(io, begin, into).await
    }

    async fn read_state(&self, io: Io<'_>, offset: u64, into: Segments) -> Result<(), IoError> {
        let mut done = 0;
        while done < into.bytes() {
            let rest = into.bytes() - done;
            let extent = self.extent(io, offset + done, rest).await?;
            let part = into.slice(done, extent.bytes);
            match extent.kind {
                Kind::Absent => part.fill(0),
                _ => self.read_extent(io, offset + done, extent, part).await?,
            }
            done += extent.bytes;
        }
        Ok(())
    }

    /// Lets go of the state that the disk has; snapshots keep theirs.
    pub(super) async fn drop_state(&self, io: Io<'_>) -> Result<(), IoError> {
        let tables = self.l1().entries.len();
        let mut has_any = false;
        for l1_index in self.vm_state_index()..tables {
            if self.l1().get(l1_index).table().is_none() {
                continue;
            }
            has_any = true;
            self.own_table(io, l1_index).await?;
            let (first, count) = self.clusters_of(l1_index);
            for cluster in first..first + count {
                self.entry(io, cluster).await?;
            }
            self.publish(io, first, count, |_, _| L2Entry::default())
                .await?;
        }
        match has_any {
            true => self.commit(io).await,
            false => Ok(()),
        }
    }

    fn clusters_of(&self, l1_index: usize) -> (u64, u64) {
        let entries = self.geometry.table_entries();
        (l1_index as u64 * entries, entries)
    }
}
