//! Writing: in place where the cluster is there and nobody else's, else into clusters of its own.

use blockcore::IoError;
use blockcore::driver::WriteFlags;
use blockcore::fault::{self, Fault};
use blockcore::io::Io;
use blockcore::io::buffer::Segments;

use super::alloc::{Class, Reserved};
use super::image::{FILE, Image, TURN_BITS, read_bytes, write_bytes};
use super::layout::entry::{Kind, L1Entry, L2Entry};
use super::layout::{Geometry, HostOffset};
use super::limbo::{Cause, Freed};
use super::mapping::Extent;
use super::segment::Record;

/// Longest range for which clusters are allocated at once.
const RUN_BYTES: u64 = 4 << 20;

/// Clusters that are going to be written, one after the other, all in the same way.
enum Target {
    /// There is nothing to do but write in place.
    InPlace,
    /// The cluster has its place, but not all of it counts.
    Partly(HostOffset, L2Entry),
    /// So many clusters need a place.
    New(u64, L2Entry, L2Entry),
}

impl Image {
    pub(super) async fn write(
        &self,
        io: Io<'_>,
        offset: u64,
        from: Segments,
    ) -> Result<(), IoError> {
        let mut done = 0;
        while done < from.bytes() {
            let rest = from.slice(done, from.bytes() - done);
            done += self.write_some(io, offset + done, rest).await?;
        }
        Ok(())
    }

    /// Writes some of it, or nothing where something else came first.
    async fn write_some(&self, io: Io<'_>, offset: u64, from: Segments) -> Result<u64, IoError> {
        let extent = self.extent(io, offset, from.bytes()).await?;
        if extent.kind == Kind::Data && extent.is_copied {
            self.write_in_place(io, extent, from.slice(0, extent.bytes))
                .await?;
            return Ok(extent.bytes);
        }
        let g = self.geometry;
        let table_end = (self.l1_index(offset) as u64 + 1) * g.table_covers();
        let end = (offset + from.bytes().min(RUN_BYTES)).min(table_end);
        let begin = g.cluster_start(offset);
        let _turn = self
            .turns
            .begin(begin, g.clusters(end) << g.cluster_bits, true)
            .await;
        self.own_table(io, self.l1_index(offset)).await?;
        match self.target(io, offset, end).await? {
            // Somebody else was first: again, without the turn.
            Target::InPlace => Ok(0),
            Target::Partly(host, entry) => {
                let bytes = end.min(begin + g.cluster_bytes()) - offset;
                let from = from.slice(0, bytes);
                self.write_partly(io, offset, from, host, entry).await?;
                Ok(bytes)
            }
            Target::New(clusters, first, last) => {
                let place = self.place_for(io, begin, clusters).await?;
                let bytes = end.min(begin + (place.count << g.cluster_bits)) - offset;
                let last = match place.count == clusters {
                    true => last,
                    false => L2Entry::default(),
                };
                let from = from.slice(0, bytes);
                let written = self.fill_new(io, offset, from, place, (first, last)).await;
                if written.is_err() && !g.data_file {
                    self.give_back(Class::Data, place);
                }
                written?;
                self.map_new(io, offset, bytes, place).await?;
                Ok(bytes)
            }
        }
    }

    /// Writes to clusters that are there already and nobody else's.
    async fn write_in_place(
        &self,
        io: Io<'_>,
        extent: Extent,
        from: Segments,
    ) -> Result<(), IoError> {
        let host = extent.host.expect("data has a place");
        let child = self.data_child();
        // Before any wait: see `try_extent`.
        let _using = io.using(child, host.0, extent.bytes);
        self.check_free_of_metadata(io, host, extent.bytes).await?;
        io.child(FILE).event("write_aio").await?;
        let flags = WriteFlags::empty();
        io.child(child).write(host.0, from, flags).await?;
        match self.may_lose_entries() {
            true => self.commit(io).await,
            false => Ok(()),
        }
    }

    /// No guest's data is written over metadata, whatever the tables say.
    async fn check_free_of_metadata(
        &self,
        io: Io<'_>,
        host: HostOffset,
        bytes: u64,
    ) -> Result<(), IoError> {
        if self.geometry.data_file {
            return Ok(());
        }
        if !self.metadata.overlaps(host, bytes) {
            // An image's last clusters may not have been written to their ends, or not at all.
            let inside = self.geometry.cluster_start(host.0) < io.child(FILE).bytes();
            if inside || self.count(io, host.0 >> self.geometry.cluster_bits).await? > 0 {
                return Ok(());
            }
            let message = format!(
                "an L2 entry points to offset {:#x}, past the end of the image's file, where nothing counts",
                host.0
            );
            return Err(self.corrupt(io, message, (host, bytes), true).await);
        }
        let message = format!(
            "preventing a write of {bytes} bytes to offset {:#x}, where there is metadata",
            host.0
        );
        Err(self.corrupt(io, message, (host, bytes), true).await)
    }

    /// What a write from `offset` to `end`, all under one L2 table, has to do first. The caller has the
    /// turn for its clusters.
    async fn target(&self, io: Io<'_>, offset: u64, end: u64) -> Result<Target, IoError> {
        let g = self.geometry;
        let first = offset >> g.cluster_bits;
        let entry = self.entry(io, first).await?;
        if entry.is_copied()
            && let Some(host) = entry.host(g)
        {
            let until = end.min((first + 1) << g.cluster_bits) - 1;
            let mut touched = g.subcluster(offset)..=g.subcluster(until);
            return Ok(match touched.all(|index| entry.kind(index) == Kind::Data) {
                true => Target::InPlace,
                false => Target::Partly(host, entry),
            });
        }
        let (mut count, mut last) = (1, entry);
        while first + count < g.clusters(end) {
            let next = self.entry(io, first + count).await?;
            if next.is_copied() && next.host(g).is_some() {
                break;
            }
            (count, last) = (count + 1, next);
        }
        Ok(Target::New(count, entry, last))
    }

    /// Where new clusters for the disk's from `begin` on are to be; maybe fewer.
    async fn place_for(&self, io: Io<'_>, begin: u64, count: u64) -> Result<Reserved, IoError> {
        if self.geometry.data_file {
            return Ok(Reserved {
                start: begin >> self.geometry.cluster_bits,
                count,
                zeroed: false,
            });
        }
        io.child(FILE).event("cluster_alloc").await?;
        let place = self.allocate(io, Class::Data, count).await?;
        let bits = self.geometry.cluster_bits;
        let host = HostOffset(place.start << bits);
        self.check_free_of_metadata(io, host, place.count << bits)
            .await?;
        Ok(place)
    }

    /// Writes to a cluster that has its place, of which a part does not count yet.
    async fn write_partly(
        &self,
        io: Io<'_>,
        offset: u64,
        from: Segments,
        host: HostOffset,
        entry: L2Entry,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let end = offset + from.bytes();
        let (first, last) = (g.subcluster(offset), g.subcluster(end - 1));
        let begin = offset & !(g.subcluster_bytes() - 1);
        // What lies around it in subclusters that count already is there.
        let head = match entry.kind(first) {
            Kind::Data => offset,
            _ => begin,
        };
        let tail = match entry.kind(last) {
            Kind::Data => end,
            _ => end.next_multiple_of(g.subcluster_bytes()),
        };
        let within = HostOffset(host.0 + g.offset_in_cluster(head));
        self.check_free_of_metadata(io, within, tail - head).await?;
        let whole = self.with_edges(io, head, offset, from, tail).await?;
        let child = io.child(self.data_child());
        child.write(within.0, whole, WriteFlags::empty()).await?;
        let count = last - first + 1;
        self.publish(io, offset >> g.cluster_bits, 1, |_, entry| {
            entry.with_data(first, count)
        })
        .await
    }

    /// Writes to clusters that are new, with what lies around it. `edges` are the first and the last one's
    /// entries as they are. The caller has the turn for the clusters.
    async fn fill_new(
        &self,
        io: Io<'_>,
        offset: u64,
        from: Segments,
        place: Reserved,
        edges: (L2Entry, L2Entry),
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let end = offset + from.bytes();
        let begin = g.cluster_start(offset);
        let host = HostOffset(place.start << g.cluster_bits);
        let unit = |entry: L2Entry| match keeps_data(entry, g) {
            true => g.cluster_bytes(),
            false => g.subcluster_bytes(),
        };
        let mut head = offset & !(unit(edges.0) - 1);
        let mut tail = end.next_multiple_of(unit(edges.1));
        if end - begin <= g.cluster_bytes() {
            // Both edges are in one cluster.
            tail = end.next_multiple_of(unit(edges.0));
        }
        let is_covered = |at: u64| at == offset || at == end;
        if place.zeroed && !is_covered(head) && self.is_zero(io, head, offset - head).await? {
            head = offset;
        }
        if place.zeroed && !is_covered(tail) && self.is_zero(io, end, tail - end).await? {
            tail = end;
        }
        let whole = self.with_edges(io, head, offset, from, tail).await?;
        io.child(FILE).event("write_aio").await?;
        let to = host.0 + (head - begin);
        let child = io.child(self.data_child());
        child.write(to, whole, WriteFlags::empty()).await
    }

    /// Maps clusters that have been filled. The caller has the turn for them.
    async fn map_new(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        place: Reserved,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let end = offset + bytes;
        let first = offset >> g.cluster_bits;
        self.publish(io, first, place.count, |cluster, old| {
            let host = (place.start + cluster - first) << g.cluster_bits;
            let new = L2Entry::data(HostOffset(host), g);
            if !g.extended || keeps_data(old, g) {
                return new;
            }
            let start = offset.max(cluster << g.cluster_bits);
            let last = end.min((cluster + 1) << g.cluster_bits) - 1;
            let index = g.subcluster(start);
            let kept = L2Entry {
                bitmap: old.bitmap,
                ..new
            };
            kept.with_data(index, g.subcluster(last) - index + 1)
        })
        .await
    }

    /// What is written, with what is there from `head` on before it, and up to `tail` after it.
    async fn with_edges(
        &self,
        io: Io<'_>,
        head: u64,
        offset: u64,
        from: Segments,
        tail: u64,
    ) -> Result<Segments, IoError> {
        let end = offset + from.bytes();
        if head == offset && tail == end {
            return Ok(from);
        }
        io.child(FILE).event("cow_read").await?;
        let mut parts = Vec::new();
        for (begin, bytes) in [(head, offset - head), (end, tail - end)] {
            let edge = Segments::allocate(bytes as usize, 4096);
            self.read_clipped(io, begin, edge.clone()).await?;
            parts.push(edge);
        }
        parts.insert(1, from);
        parts.retain(|part| !part.is_empty());
        io.child(FILE).event("cow_write").await?;
        Ok(Segments::join(parts))
    }

    /// Changes the entries of clusters to what a write or zeroing has made of them, and lets go of what they
    /// had before. The caller has the turn for the clusters.
    pub(super) async fn publish(
        &self,
        io: Io<'_>,
        first: u64,
        count: u64,
        mut change: impl FnMut(u64, L2Entry) -> L2Entry,
    ) -> Result<(), IoError> {
        self.publish_for(io, first, count, Cause::Other, &mut change)
            .await
    }

    /// As [`publish`](Self::publish), saying what the clusters are let go of for.
    pub(super) async fn publish_for(
        &self,
        io: Io<'_>,
        first: u64,
        count: u64,
        cause: Cause,
        mut change: impl FnMut(u64, L2Entry) -> L2Entry,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let mut freed = Vec::new();
        let changed = self
            .change_entries(io, first, count, |cluster, old| {
                let new = change(cluster, old);
                if old.host(g) != new.host(g)
                    && let Some(host) = old.host(g)
                {
                    freed.push((host, 1));
                }
                if let Some(extent) = old.compressed_extent(g) {
                    let begin = g.cluster_start(extent.host.0);
                    let clusters = g.clusters(extent.host.0 + extent.bytes - begin);
                    freed.push((HostOffset(begin), clusters));
                }
                new
            })
            .await;
        if !g.data_file {
            for (host, clusters) in freed {
                let freed = Freed {
                    host,
                    clusters,
                    cause,
                };
                self.free(io, freed);
            }
        }
        let recorded = changed?;
        self.commit_if_crowded(io);
        if self.must_outlive && !recorded {
            return self.commit(io).await;
        }
        Ok(())
    }

    /// Sees to it that there is an L2 table, and that it is this disk's alone.
    pub(super) async fn own_table(&self, io: Io<'_>, l1_index: usize) -> Result<(), IoError> {
        let is_owned = || self.l1().get(l1_index).is_copied();
        if is_owned() {
            return Ok(());
        }
        let turn = (l1_index as u64) << TURN_BITS;
        let _turn = self.tables.begin(turn, turn + 1, true).await;
        if is_owned() {
            return Ok(());
        }
        let g = self.geometry;
        let old = self.l1().get(l1_index).table();
        io.child(FILE).event("l2_alloc_write").await?;
        let place = self.allocate(io, Class::Metadata, 1).await?;
        let host = HostOffset(place.start << g.cluster_bits);
        let cluster = g.cluster_bytes();
        let filled = match old {
            Some(old) => match read_bytes(io, old, cluster).await {
                Ok(table) => write_bytes(io, host, &table).await,
                Err(error) => Err(error),
            },
            None if place.zeroed || fault::is_planted(Fault::TableNotCleared) => Ok(()),
            None => write_bytes(io, host, &vec![0; cluster as usize]).await,
        };
        if let Err(error) = filled {
            self.give_back(Class::Metadata, place);
            return Err(error);
        }
        self.metadata.add(host, cluster);
        {
            let mut l1 = self.l1();
            let entry = L1Entry::new(host);
            let place = l1.set(l1_index, entry);
            // Where it cannot be recorded, neither can the entries that follow, and their requests wait.
            self.record(Record::L1(place, entry.0));
            if old.is_some() {
                // In the lock: who finds the table owned must not change a slice of the old one, which says
                // of nothing that it may be written in place.
                let slices = self.slices_of(l1_index);
                self.cache.forget(|slice| slices.contains(&slice));
            }
        }
        if let Some(old) = old {
            if self.snapshots().list.is_empty() {
                // Nobody else has it, whatever its entry said.
                self.metadata.remove(old, cluster);
            }
            self.free(
                io,
                Freed {
                    host: old,
                    clusters: 1,
                    cause: Cause::Other,
                },
            );
        }
        Ok(())
    }
}

/// Whether something of a cluster is data, so that a copy of it is a copy of all.
fn keeps_data(entry: L2Entry, g: Geometry) -> bool {
    let mut subclusters = 0..g.subclusters();
    entry.is_compressed() || subclusters.any(|index| entry.kind(index) == Kind::Data)
}
