//! Changing the length of the disk.

use blockcore::IoError;
use blockcore::driver::{Preallocation, TruncateFlags, WriteFlags, ZeroFlags};
use blockcore::io::Io;
use blockcore::io::buffer::Segments;

use super::alloc::Class;
use super::image::{Image, write_bytes};
use super::layout::entry::{L1Entry, L2Entry};
use super::layout::header::{MAX_L1_BYTES, field};
use super::layout::{Geometry, HostOffset};
use super::limbo::{Cause, Freed};

/// How much is preallocated at once.
const PIECE_BYTES: u64 = 64 << 20;

impl Image {
    /// Changes the length; what is added reads as zeroes, whether flags ask for that or not.
    pub(super) async fn resize(
        &self,
        io: Io<'_>,
        bytes: u64,
        preallocation: Preallocation,
        _flags: TruncateFlags,
    ) -> Result<(), IoError> {
        let (snapshots, version) = {
            let header = self.header();
            (header.snapshots, header.version)
        };
        if snapshots > 0 && version < 3 {
            // A snapshot of version 2 does not know how long its disk was.
            return Err(IoError::Unsupported);
        }
        let before = self.bytes();
        if bytes != before {
            self.drop_state(io).await?;
        }
        if bytes < before {
            return self.shrink(io, before, bytes).await;
        }
        self.grow_l1(io, bytes).await?;
        if self.geometry.data_file && self.raw_data_file() {
            let data = io.child(self.data_child());
            let off = TruncateFlags::empty();
            data.truncate(bytes, false, Preallocation::Off, off).await?;
        }
        if bytes == before {
            return Ok(());
        }
        // Before the length says so: nobody sees what a backing node has there, or what was left when the
        // disk was cut off and the power went, after a power cut either.
        self.cover(io, before, bytes).await?;
        self.commit(io).await?;
        self.set_length(io, bytes).await?;
        self.preallocate(io, before, bytes, preallocation).await
    }

    /// Makes what is going to be added read as zeroes, whatever a backing node has there.
    async fn cover(&self, io: Io<'_>, before: u64, bytes: u64) -> Result<(), IoError> {
        let unit = self.geometry.subcluster_bytes();
        let whole = before.next_multiple_of(unit).min(bytes);
        self.write_zero_buffers(io, before, whole).await?;
        if whole == bytes {
            return Ok(());
        }
        if !self.geometry.zero_flag && self.shines_through(io, whole) {
            // What "not there" would say is what the backing node has.
            return self.write_zero_buffers(io, whole, bytes).await;
        }
        match self
            .write_zeroes(io, whole, bytes - whole, ZeroFlags::MAY_UNMAP)
            .await
        {
            Err(IoError::Unsupported) => self.write_zero_buffers(io, whole, bytes).await,
            result => result,
        }
    }

    async fn write_zero_buffers(&self, io: Io<'_>, begin: u64, end: u64) -> Result<(), IoError> {
        let most = (1 << 20).min(end - begin);
        let zeroes = Segments::allocate(most as usize, 4096);
        zeroes.fill(0);
        let mut next = begin;
        while next < end {
            let bytes = most.min(end - next);
            self.write(io, next, zeroes.slice(0, bytes)).await?;
            next += bytes;
        }
        Ok(())
    }

    /// Gives clusters that have been added their places.
    async fn preallocate(
        &self,
        io: Io<'_>,
        before: u64,
        bytes: u64,
        preallocation: Preallocation,
    ) -> Result<(), IoError> {
        if preallocation == Preallocation::Off {
            return Ok(());
        }
        let g = self.geometry;
        let mut next = before.next_multiple_of(g.cluster_bytes());
        while next < bytes {
            let table_end = (self.l1_index(next) as u64 + 1) * g.table_covers();
            let until = bytes.min(table_end).min(next + PIECE_BYTES);
            let first = next >> g.cluster_bits;
            let end = g.clusters(until);
            let _turn = self.turns.begin(next, end << g.cluster_bits, true).await;
            self.own_table(io, self.l1_index(next)).await?;
            let mut wanted = 0;
            while first + wanted < end && !has_place(self.entry(io, first + wanted).await?, g) {
                wanted += 1;
            }
            if wanted == 0 {
                next += g.cluster_bytes();
                continue;
            }
            let place = match g.data_file {
                true => super::alloc::Reserved {
                    start: first,
                    count: wanted,
                    zeroed: false,
                },
                false => self.allocate(io, Class::Data, wanted).await?,
            };
            let host = place.start << g.cluster_bits;
            let length = place.count << g.cluster_bits;
            let child = io.child(self.data_child());
            match preallocation {
                Preallocation::Full => {
                    let zeroes = Segments::allocate((1 << 20).min(length) as usize, 4096);
                    zeroes.fill(0);
                    let mut at = 0;
                    while at < length {
                        let part = zeroes.slice(0, zeroes.bytes().min(length - at));
                        let written = part.bytes();
                        child.write(host + at, part, WriteFlags::empty()).await?;
                        at += written;
                    }
                }
                Preallocation::Metadata if place.zeroed => {}
                _ => {
                    child.write_zeroes(host, length, ZeroFlags::empty()).await?;
                }
            }
            self.publish(io, first, place.count, |cluster, _| {
                let host = (place.start + cluster - first) << g.cluster_bits;
                L2Entry::data(HostOffset(host), g)
            })
            .await?;
            next += length;
        }
        self.commit(io).await
    }

    /// Cuts the disk off at `bytes`. Nothing is under way behind that.
    async fn shrink(&self, io: Io<'_>, before: u64, bytes: u64) -> Result<(), IoError> {
        let g = self.geometry;
        let whole = bytes.next_multiple_of(g.cluster_bytes());
        let kept = whole.min(before);
        if kept > bytes && !self.is_zero(io, bytes, kept - bytes).await? {
            // What grows there again is zero.
            self.write_zero_buffers(io, bytes, kept).await?;
        }
        // The length first: a crash leaves clusters that nobody sees, and no disk without its end.
        self.commit(io).await?;
        self.set_length(io, bytes).await?;
        let tables = g.l1_entries(before);
        for l1_index in self.l1_index(whole)..tables as usize {
            if self.l1().get(l1_index).table().is_none() {
                continue;
            }
            self.own_table(io, l1_index).await?;
            let begin = whole.max(l1_index as u64 * g.table_covers()) >> g.cluster_bits;
            let end = (l1_index as u64 + 1) * g.table_entries();
            for cluster in begin..end {
                self.entry(io, cluster).await?;
            }
            self.publish_for(io, begin, end - begin, Cause::Request, |_, _| {
                L2Entry::default()
            })
            .await?;
        }
        if g.data_file {
            let data = io.child(self.data_child());
            let off = TruncateFlags::empty();
            if data.bytes() > bytes {
                data.truncate(bytes, false, Preallocation::Off, off).await?;
            }
        }
        self.commit(io).await
    }

    async fn set_length(&self, io: Io<'_>, bytes: u64) -> Result<(), IoError> {
        self.flush_file(io).await?;
        write_bytes(io, HostOffset(field::BYTES), &bytes.to_be_bytes()).await?;
        self.flush_file(io).await?;
        self.header().bytes = bytes;
        self.set_bytes(bytes);
        Ok(())
    }

    /// Makes an L1 table that is long enough for a disk of `bytes`.
    pub(super) async fn grow_l1(&self, io: Io<'_>, bytes: u64) -> Result<(), IoError> {
        let g = self.geometry;
        let needed = g.l1_entries(bytes);
        let (old_place, old_entries) = {
            let l1 = self.l1();
            (l1.place, l1.entries.len() as u64)
        };
        if needed <= old_entries {
            return Ok(());
        }
        if needed * 8 > MAX_L1_BYTES {
            return Err(IoError::OutOfRange);
        }
        // No entry is changed meanwhile.
        let _turn = self.tables.begin(0, u64::MAX >> 1, true).await;
        // What the old one does not have yet is in the image before the new one takes its place.
        self.commit(io).await?;
        let clusters = g.clusters(needed * 8);
        let place = self.allocate_side_by_side(io, clusters).await?;
        let mut entries = self.l1().entries.clone();
        entries.resize(needed as usize, L1Entry::default());
        let table = L1Entry::table_bytes(&entries);
        self.metadata.add(place, clusters << g.cluster_bits);
        let written = match write_bytes(io, place, &table).await {
            // The counts of its clusters too, before anything refers to them.
            Ok(()) => self.commit(io).await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            self.let_go(io, place, clusters);
            return Err(error);
        }
        let mut fields = (needed as u32).to_be_bytes().to_vec();
        fields.extend(place.0.to_be_bytes());
        self.switch_header(io, &[(field::L1, fields)]).await?;
        {
            let mut header = self.header();
            header.l1_entries = needed as u32;
            header.l1_offset = place.0;
        }
        {
            let mut l1 = self.l1();
            l1.place = place;
            l1.entries = entries;
        }
        let old_clusters = g.clusters(old_entries * 8);
        if old_clusters > 0 {
            self.let_go(io, old_place, old_clusters);
        }
        Ok(())
    }

    /// These clusters held metadata, and do not any more.
    pub(super) fn let_go(&self, io: Io<'_>, host: HostOffset, clusters: u64) {
        self.metadata
            .remove(host, clusters << self.geometry.cluster_bits);
        let freed = Freed {
            host,
            clusters,
            cause: Cause::Other,
        };
        self.free(io, freed);
    }
}

/// Whether a cluster needs no other place to be written to.
fn has_place(entry: L2Entry, g: Geometry) -> bool {
    entry.host(g).is_some() || entry.is_compressed()
}
