//! Where bytes of the disk live.

use blockcore::IoError;
use blockcore::driver::Mapping;
use blockcore::io::Io;

use super::cache::SliceNumber;
use super::image::{BACKING, Image, TURN_BITS, read_bytes};
use super::layout::bytes::words;
use super::layout::entry::{self, COPIED, CompressedExtent, Kind, L1Entry, L2Entry};
use super::layout::{Geometry, HostOffset};
use super::segment::Record;

/// Longest range that is looked at for the path without a task, in clusters.
const FAST_CLUSTERS: u64 = 64;

/// A range of the disk that is all of one kind, and, where it is data, lies in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) kind: Kind,
    /// Where it begins in the child that holds data; meaningful for data, and for zeroes that keep their
    /// place.
    pub(super) host: Option<HostOffset>,
    /// All of its clusters may be written in place.
    pub(super) is_copied: bool,
    pub(super) bytes: u64,
    /// For a compressed cluster: where all of it is.
    pub(super) compressed: Option<CompressedExtent>,
}

/// Why there is no answer yet.
#[derive(Debug)]
pub(super) enum Need {
    /// A slice has to be loaded.
    Slice(SliceNumber),
    /// An entry makes no sense.
    Corrupt(blockcore::Error, L2Entry),
}

/// Where a slice is to be found.
struct SlicePlace {
    l1_index: usize,
    /// Bytes from the beginning of its table.
    offset: u64,
}

impl Image {
    /// Entries of a slice.
    pub(super) fn slice_entries(&self) -> u64 {
        1 << self.slice_bits
    }

    /// Which slice has a cluster's entry, and at which of its words.
    #[inline]
    pub(super) fn locate(&self, cluster: u64) -> (SliceNumber, usize) {
        let index = cluster & (self.slice_entries() - 1);
        (
            cluster >> self.slice_bits,
            index as usize * self.geometry.entry_words(),
        )
    }

    fn slice_place(&self, slice: SliceNumber) -> SlicePlace {
        let slices = self.geometry.table_entries() / self.slice_entries();
        SlicePlace {
            l1_index: (slice / slices) as usize,
            offset: slice % slices * self.slice_bytes(),
        }
    }

    pub(super) fn slice_bytes(&self) -> u64 {
        8 * self.cache.slice_words() as u64
    }

    /// Where in the image's file a slice is; `None` if its table is not there.
    pub(super) fn slice_host(&self, slice: SliceNumber) -> Option<HostOffset> {
        let place = self.slice_place(slice);
        let table = self.l1().get(place.l1_index).table()?;
        Some(HostOffset(table.0 + place.offset))
    }

    /// Which slices the table at an index of the L1 table has.
    pub(super) fn slices_of(&self, l1_index: usize) -> std::ops::Range<SliceNumber> {
        let slices = self.geometry.table_entries() / self.slice_entries();
        let first = l1_index as u64 * slices;
        first..first + slices
    }

    /// Whether slices of the disk's tables may have to make room for others.
    pub(super) fn cache_evicts(&self) -> bool {
        let clusters = self.geometry.clusters(self.gate.bytes());
        clusters.div_ceil(self.slice_entries()) > self.cache.capacity() as u64
    }

    /// Which entry of the L1 table an offset of the disk is under.
    pub(super) fn l1_index(&self, offset: u64) -> usize {
        (offset / self.geometry.table_covers()) as usize
    }

    #[inline]
    fn cached(&self, cluster: u64) -> Option<L2Entry> {
        let (slice, index) = self.locate(cluster);
        let extended = self.geometry.extended;
        let (word, second) = self.cache.get(slice, index, extended)?;
        Some(L2Entry::from_words(word, second, self.geometry))
    }

    /// For the path without a task: see [`blockcore::driver::DriverIo::map`].
    #[inline]
    pub(super) fn map_fast(&self, write: bool, offset: u64, bytes: u64) -> Mapping {
        if let Some(place) = self.map_in_cluster(write, offset, bytes) {
            return place;
        }
        self.try_map_fast(write, offset, bytes)
            .unwrap_or(Mapping::Ask)
    }

    /// Most requests: inside of one cluster, which is data and has no subclusters.
    #[inline]
    fn map_in_cluster(&self, write: bool, offset: u64, bytes: u64) -> Option<Mapping> {
        let g = &self.geometry;
        // Where it wraps it is in another cluster.
        let last = offset.wrapping_add(bytes - 1);
        let cluster = offset >> g.cluster_bits;
        if last >> g.cluster_bits != cluster {
            return None;
        }
        let index = cluster & ((1 << self.slice_bits) - 1);
        let slice = cluster >> self.slice_bits;
        let (word, _) = self.cache.get(slice, index as usize, false)?;
        let host = entry::plain_host(word, write)?;
        // After the look at the entry: see `Gate`.
        if last >= self.gate.limit(write) || !g.is_aligned(host.0) {
            return None;
        }
        if write && !g.data_file && self.metadata.is_in_cluster(host) {
            return None;
        }
        Some(Mapping::Child {
            index: self.data_child(),
            offset: host.0 + g.offset_in_cluster(offset),
        })
    }

    #[inline]
    fn try_map_fast(&self, write: bool, offset: u64, bytes: u64) -> Option<Mapping> {
        let g = self.geometry;
        let end = offset.checked_add(bytes)?;
        let (first, last) = (offset >> g.cluster_bits, (end - 1) >> g.cluster_bits);
        // A child of another format asks without a look at the length.
        if end > self.bytes() || last - first >= FAST_CLUSTERS || self.gate.is_broken() {
            return None;
        }
        let entry = self.cached(first)?;
        if entry.is_compressed() {
            return None;
        }
        let until = |cluster: u64| end.min((cluster + 1) << g.cluster_bits) - 1;
        let all = |entry: L2Entry, kind: Kind, begin: u64, last: u64| {
            (g.subcluster(begin)..=g.subcluster(last)).all(|index| entry.kind(index) == kind)
        };
        if !write && all(entry, Kind::Absent, offset, until(first)) {
            for cluster in first + 1..=last {
                let entry = self.cached(cluster)?;
                let begin = cluster << g.cluster_bits;
                if entry.is_compressed() || !all(entry, Kind::Absent, begin, until(cluster)) {
                    return None;
                }
            }
            return Some(Mapping::Child {
                index: BACKING,
                offset,
            });
        }
        let host = entry.host(g)?;
        let is_usable = |entry: L2Entry, begin: u64, last: u64| {
            all(entry, Kind::Data, begin, last) && (!write || entry.is_copied())
        };
        if !g.is_aligned(host.0) || !is_usable(entry, offset, until(first)) {
            return None;
        }
        for cluster in first + 1..=last {
            let entry = self.cached(cluster)?;
            let expected = host.0 + ((cluster - first) << g.cluster_bits);
            let begin = cluster << g.cluster_bits;
            if entry.host(g)?.0 != expected || !is_usable(entry, begin, until(cluster)) {
                return None;
            }
        }
        let host = HostOffset(host.0 + g.offset_in_cluster(offset));
        if write && !g.data_file && self.metadata.overlaps(host, bytes) {
            return None;
        }
        // After the look at the entries, as above.
        if write && !self.keeps_entries() {
            return None;
        }
        Some(Mapping::Child {
            index: self.data_child(),
            offset: host.0,
        })
    }

    /// What the range begins with: the longest part of it that is of one kind and in one piece, as far as
    /// is known at once.
    ///
    /// Between this and what is done with the answer there must be no wait.
    pub(super) fn try_extent(&self, offset: u64, bytes: u64) -> Result<Extent, Need> {
        let first = self.part(offset, bytes)?;
        let mut extent = first;
        if first.kind == Kind::Compressed {
            return Ok(extent);
        }
        while extent.bytes < bytes {
            let next = offset + extent.bytes;
            let Ok(part) = self.part(next, bytes - extent.bytes) else {
                break;
            };
            let follows = match (extent.host, part.host) {
                (Some(host), Some(next)) => host.0 + extent.bytes == next.0,
                (None, None) => true,
                _ => false,
            };
            if part.kind != extent.kind || !follows || part.is_copied != extent.is_copied {
                break;
            }
            extent.bytes += part.bytes;
        }
        Ok(extent)
    }

    /// As [`try_extent`](Self::try_extent), within one cluster, or within what an L1 entry leaves out.
    fn part(&self, offset: u64, bytes: u64) -> Result<Extent, Need> {
        let g = self.geometry;
        let cluster = offset >> g.cluster_bits;
        let Some(entry) = self.cached(cluster) else {
            let l1_index = self.l1_index(offset);
            if self.l1().get(l1_index).table().is_some() {
                return Err(Need::Slice(self.locate(cluster).0));
            }
            let end = (l1_index as u64 + 1).saturating_mul(g.table_covers());
            return Ok(Extent {
                kind: Kind::Absent,
                host: None,
                is_copied: false,
                bytes: bytes.min(end - offset),
                compressed: None,
            });
        };
        entry
            .check(g)
            .map_err(|error| Need::Corrupt(error, entry))?;
        let within = g.offset_in_cluster(offset);
        let index = g.subcluster(offset);
        let kind = entry.kind(index);
        let end = u64::from(index + entry.run(index, g)) << g.subcluster_bits();
        if g.data_file && kind == Kind::Data && entry.host(g) != Some(HostOffset(offset - within)) {
            let message = format!(
                "L2 entry {:#018x} is for guest offset {:#x}, and an external data file has data where the \
                 guest has it",
                entry.word,
                offset - within
            );
            let error = blockcore::Error::new(blockcore::ErrorKind::Corrupt, message);
            return Err(Need::Corrupt(error, entry));
        }
        let host = entry.host(g).map(|host| HostOffset(host.0 + within));
        Ok(Extent {
            kind,
            host: host.filter(|_| kind != Kind::Absent),
            is_copied: entry.is_copied() && kind != Kind::Absent,
            bytes: bytes.min(end - within),
            compressed: entry.compressed_extent(g),
        })
    }

    /// As [`try_extent`](Self::try_extent), after loading what is needed. The answer holds until the
    /// next wait.
    pub(super) async fn extent(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<Extent, IoError> {
        loop {
            self.check_whole()?;
            match self.try_extent(offset, bytes) {
                Ok(extent) => return Ok(extent),
                Err(Need::Slice(slice)) => self.load_slice(io, slice).await?,
                Err(Need::Corrupt(error, entry)) => {
                    return Err(self.bad_entry(io, error, entry).await);
                }
            }
        }
    }

    pub(super) async fn bad_entry(
        &self,
        io: Io<'_>,
        error: blockcore::Error,
        entry: L2Entry,
    ) -> IoError {
        let place = entry.host(self.geometry).unwrap_or_default();
        let cluster = self.geometry.cluster_bytes();
        self.corrupt(io, error.to_string(), (place, cluster), true)
            .await
    }

    /// The entry of a cluster that is going to be changed, after loading what is needed. It makes sense, and
    /// what it lets go of is no metadata. The answer holds until the next wait, or as long as the caller has
    /// a turn for the cluster.
    pub(super) async fn entry(&self, io: Io<'_>, cluster: u64) -> Result<L2Entry, IoError> {
        loop {
            self.check_whole()?;
            if let Some(entry) = self.cached(cluster) {
                return match self.check_entry(entry) {
                    Ok(()) => Ok(entry),
                    Err(error) => Err(self.bad_entry(io, error, entry).await),
                };
            }
            let (slice, _) = self.locate(cluster);
            if self.slice_host(slice).is_none() {
                return Ok(L2Entry::default());
            }
            self.load_slice(io, slice).await?;
        }
    }

    /// An entry makes sense, and does not say that metadata is data: who changes the entry would have the
    /// metadata counted as free, and given back to the host.
    fn check_entry(&self, entry: L2Entry) -> Result<(), blockcore::Error> {
        let g = self.geometry;
        entry.check(g)?;
        if g.data_file {
            return Ok(());
        }
        let place = match entry.compressed_extent(g) {
            Some(extent) => Some((extent.host, extent.bytes)),
            None => entry.host(g).map(|host| (host, g.cluster_bytes())),
        };
        match place.filter(|(host, bytes)| self.metadata.overlaps(*host, *bytes)) {
            None => Ok(()),
            Some((host, _)) => {
                let text = format!(
                    "L2 entry {:#018x} maps what is at offset {:#x}, where there is metadata",
                    entry.word, host.0
                );
                Err(blockcore::Error::new(blockcore::ErrorKind::Corrupt, text))
            }
        }
    }

    /// Loads a slice whose table is there.
    pub(super) async fn load_slice(&self, io: Io<'_>, slice: SliceNumber) -> Result<(), IoError> {
        let turn = (slice << TURN_BITS, (slice << TURN_BITS) + 1);
        let _turn = self.loads.begin(turn.0, turn.1, true).await;
        loop {
            if self.cache.contains(slice) {
                return Ok(());
            }
            let place = self.slice_place(slice);
            let entry = self.l1().get(place.l1_index);
            let Some(table) = entry.table() else {
                return Ok(());
            };
            self.check_table(io, place.l1_index, table).await?;
            let host = HostOffset(table.0 + place.offset);
            io.child(super::image::FILE).event("l2_load").await?;
            let bytes = read_bytes(io, host, self.slice_bytes()).await?;
            let words = self.usable_words(&bytes, entry);
            let installed = {
                let l1 = self.l1();
                if l1.get(place.l1_index) != entry {
                    // The table has moved meanwhile.
                    continue;
                }
                self.cache.install(slice, &words)
            };
            if installed.is_ok() {
                return Ok(());
            }
            // Everything in its way is dirty.
            self.commit(io).await?;
        }
    }

    /// The words of a slice for the cache: of a table that others refer to nothing may be written in
    /// place, whatever its entries say.
    fn usable_words(&self, bytes: &[u8], table: L1Entry) -> Vec<u64> {
        let per_entry = self.geometry.entry_words();
        let keep = match table.is_copied() {
            true => u64::MAX,
            false => !COPIED,
        };
        let is_flagged = |index: usize| index.is_multiple_of(per_entry) && !self.geometry.data_file;
        words(bytes)
            .enumerate()
            .map(|(index, word)| match is_flagged(index) {
                true => word & keep,
                false => word,
            })
            .collect()
    }

    /// An L2 table must lie where a table can: inside of the file, which does not grow for what nobody wrote.
    async fn check_table(
        &self,
        io: Io<'_>,
        l1_index: usize,
        table: HostOffset,
    ) -> Result<(), IoError> {
        let cluster = self.geometry.cluster_bytes();
        let is_inside = table.0 < io.child(super::image::FILE).bytes();
        if self.geometry.is_aligned(table.0) && self.metadata.reaches(table) && is_inside {
            return Ok(());
        }
        let message = format!(
            "L1 entry {l1_index} points to an L2 table at offset {:#x}, where none can be",
            table.0
        );
        Err(self.corrupt(io, message, (table, cluster), true).await)
    }

    /// Changes the entries of `count` clusters from `first` on: `change` gets each cluster with its entry,
    /// and gives the new one. A reader sees each entry as it was or as it is. The caller has a turn for the
    /// clusters, and their tables are there and belong to this image alone. Returns whether all of it has
    /// been recorded where it outlives this process.
    pub(super) async fn change_entries(
        &self,
        io: Io<'_>,
        first: u64,
        count: u64,
        mut change: impl FnMut(u64, L2Entry) -> L2Entry,
    ) -> Result<bool, IoError> {
        let mut recorded = true;
        let mut cluster = first;
        while cluster < first + count {
            let (slice, _) = self.locate(cluster);
            let end = ((slice + 1) * self.slice_entries()).min(first + count);
            // A table that is this image's alone stays where it is.
            let host = self.slice_host(slice).ok_or(IoError::Failed)?;
            let done = self.cache.change(slice, |words| {
                for cluster in cluster..end {
                    let (_, index) = self.locate(cluster);
                    let new =
                        change_entry(words, index, self.geometry, |entry| change(cluster, entry));
                    if let Some((word, second)) = new {
                        let place = HostOffset(host.0 + 8 * index as u64);
                        let record = Record::L2(place, word, second);
                        if !self.record(record) {
                            recorded = false;
                            if self.must_outlive {
                                // Before anybody sees the entry.
                                self.gate.hold_writes();
                            }
                        }
                    }
                }
            });
            match done {
                Some(()) => cluster = end,
                None => self.load_slice(io, slice).await?,
            }
        }
        Ok(recorded)
    }
}

/// Changes an entry among a slice's words; `None` if it is as it was.
fn change_entry(
    words: &mut super::cache::SliceWords<'_>,
    index: usize,
    geometry: Geometry,
    change: impl FnOnce(L2Entry) -> L2Entry,
) -> Option<(u64, u64)> {
    let second = match geometry.extended {
        true => words.get(index + 1),
        false => 0,
    };
    let old = (words.get(index), second);
    let new = change(L2Entry::from_words(old.0, old.1, geometry)).to_words(geometry);
    if new.0 != old.0 {
        words.set(index, new.0);
    }
    if geometry.extended && new.1 != old.1 {
        words.set(index + 1, new.1);
    }
    let has_changed = new.0 != old.0 || (geometry.extended && new.1 != old.1);
    has_changed.then_some(new)
}
