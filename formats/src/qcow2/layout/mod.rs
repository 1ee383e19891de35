//! What lies where in a qcow2 image, as types. Pure: bytes in, values out.
//!
//! Everything here follows QEMU's `docs/interop/qcow2` ("the specification" in comments). Numbers in
//! an image are big-endian; here they are values.

pub(crate) mod bitmap;
pub(crate) mod bytes;
pub(crate) mod entry;
pub(crate) mod extension;
pub(crate) mod header;
pub(crate) mod room;
pub(crate) mod snapshot;

/// Where a byte lies in an image's file, or in its external data file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct HostOffset(pub(crate) u64);

/// How an image is divided; checked, so arithmetic on it does not overflow for offsets below 2^63.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Binary logarithm of the cluster's bytes, 9 to 21.
    pub(crate) cluster_bits: u32,
    /// Binary logarithm of a reference count's bits, 0 to 6.
    pub(crate) refcount_order: u32,
    /// Entries have 16 bytes and say of each of 32 subclusters what it is.
    pub(crate) extended: bool,
    /// Entries can say "reads as zeroes": version 3.
    pub(crate) zero_flag: bool,
    /// Data lies in another file, at the offsets that it has for the guest.
    pub(crate) data_file: bool,
}

/// Where in an entry of the refcount table the block's offset is.
pub(crate) const BLOCK_OFFSET: u64 = !0x1ff;

/// Subclusters of a cluster with extended entries.
const SUBCLUSTERS: u32 = 32;

impl Geometry {
    /// Bytes of a cluster.
    pub(crate) fn cluster_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether `offset` is where a cluster begins.
    pub(crate) fn is_aligned(self, offset: u64) -> bool {
        self.offset_in_cluster(offset) == 0
    }

    /// How far into its cluster an offset is.
    pub(crate) fn offset_in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_bytes() - 1)
    }

    /// Where the cluster begins that `offset` lies in.
    pub(crate) fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_bytes() - 1)
    }

    /// How many clusters `bytes` take.
    pub(crate) fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_bytes())
    }

    /// Words of 8 bytes that an L2 entry has.
    pub(crate) fn entry_words(self) -> usize {
        1 + usize::from(self.extended)
    }

    /// Bytes of an L2 entry.
    pub(crate) fn entry_bytes(self) -> u64 {
        8 * self.entry_words() as u64
    }

    /// Entries of an L2 table, which takes a cluster.
    pub(crate) fn table_entries(self) -> u64 {
        self.cluster_bytes() / self.entry_bytes()
    }

    /// Bytes of the guest's that one L2 table maps.
    pub(crate) fn table_covers(self) -> u64 {
        self.table_entries() << self.cluster_bits
    }

    /// Entries of the L1 table that a disk of `bytes` needs.
    pub(crate) fn l1_entries(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.table_covers())
    }

    /// Subclusters of a cluster: 1 unless entries are extended.
    pub(crate) fn subclusters(self) -> u32 {
        match self.extended {
            true => SUBCLUSTERS,
            false => 1,
        }
    }

    /// Binary logarithm of a subcluster's bytes.
    pub(crate) fn subcluster_bits(self) -> u32 {
        self.cluster_bits - self.subclusters().trailing_zeros()
    }

    /// Bytes of a subcluster.
    pub(crate) fn subcluster_bytes(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Which subcluster of its cluster an offset lies in.
    pub(crate) fn subcluster(self, offset: u64) -> u32 {
        (self.offset_in_cluster(offset) >> self.subcluster_bits()) as u32
    }

    /// Reference counts in a refcount block, which takes a cluster.
    pub(crate) fn block_counts(self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The largest reference count there is room for.
    pub(crate) fn max_refcount(self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        }
    }
}

/// The count at `index` of a refcount block. Counts of less than a byte begin at the lowest bit; longer
/// ones are big-endian (specification, "Host cluster management").
pub(crate) fn refcount(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let shift = (index % per_byte) << order;
            u64::from(block[index / per_byte] >> shift) & ((1 << (1 << order)) - 1)
        }
        _ => {
            let bytes = 1 << (order - 3);
            let value = &block[index * bytes..(index + 1) * bytes];
            value
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Sets the count at `index` of a refcount block; see [`refcount`].
///
/// # Panics
///
/// If `value` has more bits than a count.
pub(crate) fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    let bits = 1_u32 << order;
    assert!(bits == 64 || value >> bits == 0, "a count has {bits} bits");
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let mask = ((1_u16 << bits) - 1) as u8;
        let byte = &mut block[index / per_byte];
        *byte = *byte & !(mask << shift) | (value as u8) << shift;
        return;
    }
    let bytes = 1 << (order - 3);
    let value = &value.to_be_bytes()[8 - bytes..];
    block[index * bytes..(index + 1) * bytes].copy_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_lie_where_the_specification_says() {
        for order in 0..=6 {
            let mut block = vec![0; 64];
            let counts = (64 * 8) >> order;
            let most = match order {
                6 => u64::MAX,
                order => (1 << (1 << order)) - 1,
            };
            for index in 0..counts {
                set_refcount(&mut block, order, index, (index as u64 * 7 + 1) & most);
            }
            for index in 0..counts {
                assert_eq!(
                    refcount(&block, order, index),
                    (index as u64 * 7 + 1) & most
                );
            }
        }
        let mut block = [0; 2];
        set_refcount(&mut block, 1, 1, 3);
        assert_eq!(block, [0b1100, 0]);
        set_refcount(&mut block, 4, 0, 0x1234);
        assert_eq!(block, [0x12, 0x34]);
    }

    #[test]
    fn extended_entries_halve_what_a_table_maps() {
        let plain = Geometry {
            cluster_bits: 16,
            refcount_order: 4,
            extended: false,
            zero_flag: true,
            data_file: false,
        };
        let extended = Geometry {
            extended: true,
            ..plain
        };
        assert_eq!(plain.table_covers(), 512 << 20);
        assert_eq!(extended.table_covers(), 256 << 20);
        assert_eq!((plain.subclusters(), extended.subclusters()), (1, 32));
        assert_eq!(extended.subcluster_bytes(), 2048);
        assert_eq!(extended.subcluster(65536 + 2048), 1);
        assert_eq!(plain.block_counts(), 32768);
    }
}
