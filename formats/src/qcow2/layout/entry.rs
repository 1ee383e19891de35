//! Entries of L1 and L2 tables (specification, "Cluster mapping").

use blockcore::Error;

use super::{Geometry, HostOffset};

/// The cluster has exactly this one reference: it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes; only without extended entries.
const ZERO: u64 = 1;
/// Where in an entry the host offset is.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Sectors in which a compressed cluster's length is counted.
const SECTOR_BYTES: u64 = 512;

/// An entry of the L1 table: where an L2 table is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L1Entry(pub(crate) u64);

impl L1Entry {
    /// An entry for a table that nobody else refers to.
    pub(crate) fn new(table: HostOffset) -> Self {
        Self(table.0 | COPIED)
    }

    /// An L1 table of these entries.
    pub(crate) fn table_bytes(entries: &[Self]) -> Vec<u8> {
        let words = entries.iter().flat_map(|entry| entry.0.to_be_bytes());
        words.collect()
    }

    /// Where the table is; `None` if there is none.
    pub(crate) fn table(self) -> Option<HostOffset> {
        let offset = self.0 & OFFSET_MASK;
        (offset != 0).then_some(HostOffset(offset))
    }

    /// Whether the table may be changed in place.
    pub(crate) fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }
}

/// Where all of a cluster is, if its entry, which is not extended, says nothing but that; and, with
/// `in_place`, that it may be written there.
#[inline]
pub(crate) fn plain_host(word: u64, in_place: bool) -> Option<HostOffset> {
    let (looked_at, wanted) = match in_place {
        true => (COMPRESSED | ZERO | COPIED, COPIED),
        false => (COMPRESSED | ZERO, 0),
    };
    let host = word & OFFSET_MASK;
    (word & looked_at == wanted && host != 0).then_some(HostOffset(host))
}

/// An L2 entry, extended or not: an extended one's word and bitmap, or what they would be for a cluster
/// with one subcluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2Entry {
    /// Host offset, [`COPIED`] and whether it is compressed.
    pub(crate) word: u64,
    /// Bit `n`: subcluster `n` is in the cluster. Bit `32 + n`: it reads as zeroes.
    pub(crate) bitmap: u64,
}

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing here decides: the backing image does, or it is zero.
    Absent,
    /// Reads as zeroes.
    Zero,
    /// In the entry's host cluster.
    Data,
    /// The whole cluster is compressed.
    Compressed,
}

/// Where a compressed cluster's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CompressedExtent {
    /// Where it begins; any byte.
    pub(crate) host: HostOffset,
    /// How long it may be, in bytes: up to the end of its last sector.
    pub(crate) bytes: u64,
}

const fn both(alloc: u32, zero: u32) -> u64 {
    alloc as u64 | (zero as u64) << 32
}

impl L2Entry {
    /// The entry that these words of a table are; `words` has one or two, as the geometry says.
    pub(crate) fn from_words(word: u64, second: u64, geometry: Geometry) -> Self {
        if geometry.extended {
            let bitmap = match word & COMPRESSED {
                0 => second,
                _ => 0,
            };
            return Self { word, bitmap };
        }
        if word & COMPRESSED != 0 {
            return Self { word, bitmap: 0 };
        }
        let is_zero = geometry.zero_flag && word & ZERO != 0;
        let word = word & !ZERO;
        let has_place = word & OFFSET_MASK != 0 || (geometry.data_file && word & COPIED != 0);
        let bitmap = match (is_zero, has_place) {
            (true, _) => both(0, 1),
            (false, true) => both(1, 0),
            (false, false) => 0,
        };
        Self { word, bitmap }
    }

    /// The words of a table that are this entry; the second is of use for extended ones only.
    pub(crate) fn to_words(self, geometry: Geometry) -> (u64, u64) {
        if geometry.extended || self.is_compressed() {
            return (self.word, self.bitmap);
        }
        (self.word | self.bitmap >> 32 & ZERO, 0)
    }

    /// All of the cluster is in `host`, and nobody else refers to that.
    pub(crate) fn data(host: HostOffset, geometry: Geometry) -> Self {
        Self {
            word: host.0 | COPIED,
            bitmap: both(all(geometry), 0),
        }
    }

    /// All of the cluster reads as zeroes, and nothing is kept for it.
    pub(crate) fn zero(geometry: Geometry) -> Self {
        Self {
            word: 0,
            bitmap: both(0, all(geometry)),
        }
    }

    /// A compressed cluster of `bytes` at `host`.
    pub(crate) fn compressed(host: HostOffset, bytes: u64, geometry: Geometry) -> Self {
        let sectors = (host.0 % SECTOR_BYTES + bytes).div_ceil(SECTOR_BYTES) - 1;
        let shift = 62 - (geometry.cluster_bits - 8);
        Self {
            word: COMPRESSED | host.0 | sectors << shift,
            bitmap: 0,
        }
    }

    /// Whether the cluster is compressed.
    pub(crate) fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    /// Whether its host cluster may be written in place.
    pub(crate) fn is_copied(self) -> bool {
        self.word & (COPIED | COMPRESSED) == COPIED
    }

    /// Its host cluster; `None` if it has none, or is compressed.
    pub(crate) fn host(self, geometry: Geometry) -> Option<HostOffset> {
        if self.is_compressed() {
            return None;
        }
        let offset = self.word & OFFSET_MASK;
        let is_there = offset != 0 || (geometry.data_file && self.word & COPIED != 0);
        is_there.then_some(HostOffset(offset))
    }

    /// Where its compressed data is; `None` if it is not compressed.
    pub(crate) fn compressed_extent(self, geometry: Geometry) -> Option<CompressedExtent> {
        if !self.is_compressed() {
            return None;
        }
        let shift = 62 - (geometry.cluster_bits - 8);
        let host = self.word & ((1 << shift) - 1);
        let sectors = self.word >> shift & ((1 << (geometry.cluster_bits - 8)) - 1);
        Some(CompressedExtent {
            host: HostOffset(host),
            bytes: (sectors + 1) * SECTOR_BYTES - host % SECTOR_BYTES,
        })
    }

    /// What subcluster `index` is. A host cluster without which "data" means nothing has been checked by
    /// [`check`](Self::check).
    pub(crate) fn kind(self, index: u32) -> Kind {
        if self.is_compressed() {
            return Kind::Compressed;
        }
        let bits = self.bitmap >> index;
        match (bits & 1 != 0, bits >> 32 & 1 != 0) {
            (_, true) => Kind::Zero,
            (true, false) => Kind::Data,
            (false, false) => Kind::Absent,
        }
    }

    /// How many subclusters from `index` on are of the same kind as that one, up to the cluster's end.
    pub(crate) fn run(self, index: u32, geometry: Geometry) -> u32 {
        let most = geometry.subclusters() - index;
        if self.is_compressed() {
            return most;
        }
        let kind = self.kind(index);
        let mut same = 1;
        while same < most && self.kind(index + same) == kind {
            same += 1;
        }
        same
    }

    /// The same entry with `count` subclusters from `index` on made data.
    #[must_use]
    pub(crate) fn with_data(self, index: u32, count: u32) -> Self {
        let mask = mask(index, count);
        Self {
            bitmap: (self.bitmap | both(mask, 0)) & !both(0, mask),
            ..self
        }
    }

    /// The same entry with `count` subclusters from `index` on made zero.
    #[must_use]
    pub(crate) fn with_zero(self, index: u32, count: u32) -> Self {
        let mask = mask(index, count);
        Self {
            bitmap: (self.bitmap | both(0, mask)) & !both(mask, 0),
            ..self
        }
    }

    /// Whether every subcluster is of `kind`.
    pub(crate) fn is_all(self, kind: Kind, geometry: Geometry) -> bool {
        self.kind(0) == kind && self.run(0, geometry) == geometry.subclusters()
    }

    /// Whether the entry means something.
    ///
    /// # Errors
    ///
    /// [`blockcore::ErrorKind::Corrupt`], with the entry and what is wrong with it.
    pub(crate) fn check(self, geometry: Geometry) -> Result<(), Error> {
        let corrupt = |what: String| {
            let text = format!("L2 entry {:#018x} {what}", self.word);
            Err(Error::new(blockcore::ErrorKind::Corrupt, text))
        };
        if self.is_compressed() {
            if geometry.data_file {
                return corrupt("is compressed, in an image with an external data file".into());
            }
            return Ok(());
        }
        let (alloc, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
        if alloc & zero != 0 {
            let bitmap = self.bitmap;
            return corrupt(format!(
                "says of a subcluster that it is both data and zero (bitmap {bitmap:#018x})"
            ));
        }
        match self.host(geometry) {
            Some(host) if !geometry.is_aligned(host.0) => corrupt(format!(
                "points to offset {:#x}, which is not a multiple of the cluster size ({} bytes)",
                host.0,
                geometry.cluster_bytes()
            )),
            None if alloc != 0 => corrupt("has data and no place for it".into()),
            _ => Ok(()),
        }
    }
}

/// Bits of all subclusters.
fn all(geometry: Geometry) -> u32 {
    mask(0, geometry.subclusters())
}

fn mask(index: u32, count: u32) -> u32 {
    (((1_u64 << count) - 1) << index) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(cluster_bits: u32, extended: bool) -> Geometry {
        Geometry {
            cluster_bits,
            refcount_order: 4,
            extended,
            zero_flag: true,
            data_file: false,
        }
    }

    #[test]
    fn l2_entry_with_misaligned_offset_is_reported_as_corrupt() {
        let entry = L2Entry::from_words(COPIED | 0x1_0200, 0, geometry(16, false));
        let error = entry.check(geometry(16, false)).unwrap_err();
        assert_eq!(error.kind(), blockcore::ErrorKind::Corrupt);
    }

    #[test]
    fn plain_entries_survive_the_way_there_and_back() {
        let g = geometry(16, false);
        let words = [0, 1, COPIED | 0x5_0000, COPIED | 0x5_0001, 0x5_0000];
        for word in words {
            assert_eq!(L2Entry::from_words(word, 0, g).to_words(g), (word, 0));
        }
        let kinds = words.map(|word| L2Entry::from_words(word, 0, g).kind(0));
        let (absent, zero, data) = (Kind::Absent, Kind::Zero, Kind::Data);
        assert_eq!(kinds, [absent, zero, data, zero, data]);
        let kept = L2Entry::from_words(COPIED | 0x5_0001, 0, g);
        assert_eq!(kept.host(g), Some(HostOffset(0x5_0000)));
    }

    #[test]
    fn version_2_has_no_zero_flag() {
        let g = Geometry {
            zero_flag: false,
            ..geometry(16, false)
        };
        assert_eq!(L2Entry::from_words(1, 0, g).kind(0), Kind::Absent);
    }

    #[test]
    fn compressed_extents_end_with_their_last_sector() {
        for bits in 9..=21 {
            let g = geometry(bits, false);
            for (host, bytes) in [(0x5_0000, 1), (0x5_0123, 400), (0x5_01ff, 2)] {
                let entry = L2Entry::compressed(HostOffset(host), bytes, g);
                let extent = entry.compressed_extent(g).unwrap();
                assert_eq!(extent.host, HostOffset(host));
                assert_eq!((host + extent.bytes) % 512, 0);
                assert!(extent.bytes >= bytes && extent.bytes - bytes < 512);
                assert_eq!((entry.is_copied(), entry.host(g)), (false, None));
            }
        }
    }

    #[test]
    fn subclusters_change_one_by_one() {
        let g = geometry(16, true);
        let entry = L2Entry::zero(g).with_data(3, 2);
        assert_eq!((entry.kind(2), entry.kind(3)), (Kind::Zero, Kind::Data));
        assert_eq!(
            (entry.run(0, g), entry.run(3, g), entry.run(5, g)),
            (3, 2, 27)
        );
        assert!(entry.with_zero(0, 32).is_all(Kind::Zero, g));
        assert!(L2Entry::data(HostOffset(0x5_0000), g).is_all(Kind::Data, g));
        let contradiction = L2Entry::from_words(COPIED | 0x5_0000, both(1, 1), g);
        assert!(contradiction.check(g).is_err());
        assert!(L2Entry::from_words(0, 1, g).check(g).is_err());
    }
}
