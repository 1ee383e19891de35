//! Dirty bitmaps that an image keeps: the directory's entries, and those of a bitmap's table
//! (specification, "Bitmaps").

use std::fmt;

use blockcore::{Error, ErrorKind};

use super::Geometry;
use super::bytes::{u16_at, u32_at, u64_at};
use super::extension::corrupt;
use super::header::MAX_BITMAPS;

/// Bytes of an entry's fixed part.
const HEAD_BYTES: usize = 24;
/// Longest name (specification).
pub(crate) const MAX_NAME_BYTES: usize = 1023;
/// Most entries of a bitmap's table, as QEMU has it.
pub(crate) const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Most bytes that a bitmap takes in the image, as QEMU has it.
pub(crate) const MAX_BITMAP_BYTES: u64 = 0x2000_0000;
/// The one type of bitmap that there is: which bytes were written.
const DIRTY_TRACKING: u8 = 1;
/// Binary logarithm of granularities, as QEMU has them.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    /// Where its table is.
    pub(crate) table_offset: u64,
    /// Entries of that.
    pub(crate) table_entries: u32,
    /// See the constants.
    pub(crate) flags: u32,
    /// Binary logarithm of the bytes that a bit stands for.
    pub(crate) granularity_bits: u8,
    /// Unique in its image.
    pub(crate) name: String,
    /// Extra data, whose meaning is not known.
    pub(crate) extra: Vec<u8>,
}

impl Bitmap {
    /// Flag: it was not closed in order, and means nothing.
    pub(crate) const IN_USE: u32 = 1;
    /// Flag: it tracks writes.
    pub(crate) const AUTO: u32 = 1 << 1;
    /// Flag: extra data that is not known may be ignored.
    pub(crate) const EXTRA_COMPATIBLE: u32 = 1 << 2;
    const KNOWN_FLAGS: u32 = Self::IN_USE | Self::AUTO | Self::EXTRA_COMPATIBLE;

    /// The entries of a directory, which must be `count`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`], naming the bitmap, for what contradicts the specification or QEMU's limits,
    /// for another number of bitmaps, and for two of one name; [`ErrorKind::Unsupported`] for a name that
    /// is not UTF-8.
    pub(crate) fn parse_directory(
        bytes: &[u8],
        count: u32,
        disk_bytes: u64,
        geometry: Geometry,
    ) -> Result<Vec<Self>, Error> {
        let mut bitmaps: Vec<Self> = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (bitmap, next) = Self::parse(rest, bitmaps.len())?;
            bitmap.check(disk_bytes, geometry)?;
            bitmaps.push(bitmap);
            if bitmaps.len() > count.min(MAX_BITMAPS) as usize {
                break;
            }
            rest = next;
        }
        if bitmaps.len() != count as usize {
            let more = if bitmaps.len() > count as usize {
                "more"
            } else {
                "fewer"
            };
            return Err(corrupt(format!(
                "the bitmap directory has {more} bitmaps than the {count} of the header"
            )));
        }
        let mut names: Vec<_> = bitmaps.iter().map(|bitmap| &bitmap.name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(corrupt(format!("there are two bitmaps '{}'", pair[0])));
        }
        Ok(bitmaps)
    }

    fn parse(bytes: &[u8], index: usize) -> Result<(Self, &[u8]), Error> {
        let broken = || {
            corrupt(format!(
                "entry {index} of the bitmap directory does not end where the directory does"
            ))
        };
        let head = bytes.get(..HEAD_BYTES).ok_or_else(broken)?;
        let name_bytes = usize::from(u16_at(head, 18));
        let extra_bytes = u32_at(head, 20) as usize;
        let name_at = HEAD_BYTES + extra_bytes;
        let end = name_at + name_bytes;
        let rest = bytes.get(end.next_multiple_of(8)..).ok_or_else(broken)?;
        if head[16] != DIRTY_TRACKING {
            return Err(corrupt(format!(
                "entry {index} of the bitmap directory has type {}, and only {DIRTY_TRACKING} is known",
                head[16]
            )));
        }
        let name = String::from_utf8(bytes[name_at..end].to_owned()).map_err(|_| {
            let message = format!("the name of bitmap {index} is not valid UTF-8");
            Error::new(ErrorKind::Unsupported, message)
        })?;
        let bitmap = Self {
            table_offset: u64_at(head, 0),
            table_entries: u32_at(head, 8),
            flags: u32_at(head, 12),
            granularity_bits: head[17],
            name,
            extra: bytes[HEAD_BYTES..name_at].to_owned(),
        };
        Ok((bitmap, rest))
    }

    fn check(&self, disk_bytes: u64, geometry: Geometry) -> Result<(), Error> {
        let name = &self.name;
        let refuse = |what: fmt::Arguments<'_>| Err(corrupt(format!("bitmap '{name}' has {what}")));
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return refuse(format_args!(
                "a name of {} bytes; 1 to {MAX_NAME_BYTES} are allowed",
                name.len()
            ));
        }
        if self.flags & !Self::KNOWN_FLAGS != 0 {
            return refuse(format_args!("reserved flags ({:#x})", self.flags));
        }
        if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            return refuse(format_args!(
                "granularity_bits {}, and must have 9 to 31",
                self.granularity_bits
            ));
        }
        let entries = self.table_entries;
        let bytes = u64::from(entries) << geometry.cluster_bits;
        if entries == 0 || entries > MAX_TABLE_ENTRIES || bytes > MAX_BITMAP_BYTES {
            return refuse(format_args!(
                "a table of {entries} entries for clusters of {} bytes; it must have some, for at most \
                 {MAX_BITMAP_BYTES} bytes",
                geometry.cluster_bytes()
            ));
        }
        let offset = self.table_offset;
        let is_beyond = offset > i64::MAX as u64 - 8 * u64::from(entries);
        if offset == 0 || !geometry.is_aligned(offset) || is_beyond {
            return refuse(format_args!(
                "its table at {offset:#x}, where no cluster can be"
            ));
        }
        // What is in use means nothing, so neither does how long it is.
        let is_in_use = self.flags & Self::IN_USE != 0;
        if !is_in_use && u128::from(disk_bytes) > u128::from(bytes * 8) << self.granularity_bits {
            return refuse(format_args!(
                "a table of {entries} entries, too few for a disk of {disk_bytes} bytes"
            ));
        }
        Ok(())
    }

    /// Whether this program may use and change it: nothing is attached that it does not know and may not
    /// ignore.
    pub(crate) fn is_known(&self) -> bool {
        self.extra.is_empty() || self.flags & Self::EXTRA_COMPATIBLE != 0
    }

    /// Bytes of its entry in a directory.
    pub(crate) fn entry_bytes(&self) -> u64 {
        entry_bytes(self.extra.len(), self.name.len())
    }

    /// The directory of these bitmaps.
    pub(crate) fn serialise_directory(bitmaps: &[Self]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for bitmap in bitmaps {
            let mut add = |field: &[u8]| bytes.extend(field);
            add(&bitmap.table_offset.to_be_bytes());
            add(&bitmap.table_entries.to_be_bytes());
            add(&bitmap.flags.to_be_bytes());
            add(&[DIRTY_TRACKING, bitmap.granularity_bits]);
            add(&(bitmap.name.len() as u16).to_be_bytes());
            add(&(bitmap.extra.len() as u32).to_be_bytes());
            add(&bitmap.extra);
            add(bitmap.name.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes
    }
}

/// Bytes of a directory's entry with so many of extra data and of a name.
pub(crate) fn entry_bytes(extra: usize, name: usize) -> u64 {
    (HEAD_BYTES + extra + name).next_multiple_of(8) as u64
}

/// An entry of a bitmap's table: what a cluster of the bitmap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitmapCluster {
    /// No bit is set.
    Zeroes,
    /// Every bit is set.
    Ones,
    /// At this offset.
    Data(u64),
}

impl BitmapCluster {
    const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
    const ALL_ONES: u64 = 1;
    const RESERVED: u64 = !(Self::OFFSET_MASK | Self::ALL_ONES);

    /// What an entry says.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] for reserved bits and an offset at which no cluster begins.
    pub(crate) fn parse(entry: u64, geometry: Geometry) -> Result<Self, Error> {
        let offset = entry & Self::OFFSET_MASK;
        let ones = entry & Self::ALL_ONES != 0;
        let is_wrong = entry & Self::RESERVED != 0 || (offset != 0 && ones);
        if is_wrong || !geometry.is_aligned(offset) {
            return Err(corrupt(format!(
                "entry {entry:#018x} of a bitmap's table means nothing"
            )));
        }
        Ok(match (offset, ones) {
            (0, false) => Self::Zeroes,
            (0, true) => Self::Ones,
            (offset, _) => Self::Data(offset),
        })
    }

    /// The entry that says this.
    pub(crate) fn serialise(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => Self::ALL_ONES,
            Self::Data(offset) => offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        zero_flag: true,
        data_file: false,
    };
    const DISK: u64 = 1 << 30;

    fn bitmap(name: &str) -> Bitmap {
        Bitmap {
            table_offset: 0x7_0000,
            table_entries: 1,
            flags: Bitmap::AUTO,
            granularity_bits: 16,
            name: name.into(),
            extra: Vec::new(),
        }
    }

    #[test]
    fn a_directory_survives_the_way_there_and_back() {
        let odd = Bitmap {
            extra: vec![9; 5],
            flags: Bitmap::IN_USE,
            ..bitmap("with something")
        };
        let directory = [bitmap("a"), odd, bitmap("b")];
        let bytes = Bitmap::serialise_directory(&directory);
        let parsed = Bitmap::parse_directory(&bytes, 3, DISK, GEOMETRY).unwrap();
        assert_eq!(parsed, directory);
        assert_eq!((parsed[0].is_known(), parsed[1].is_known()), (true, false));
    }

    #[test]
    fn what_no_bitmap_can_be_is_corrupt_and_named() {
        let plain = bitmap("b");
        let wrong = [
            (
                Bitmap {
                    table_offset: 0,
                    ..plain.clone()
                },
                "where no cluster",
            ),
            (
                Bitmap {
                    table_offset: 512,
                    ..plain.clone()
                },
                "where no cluster",
            ),
            (
                Bitmap {
                    table_offset: u64::MAX << 16,
                    ..plain.clone()
                },
                "where no cluster",
            ),
            (
                Bitmap {
                    table_entries: 0,
                    ..plain.clone()
                },
                "must have some",
            ),
            (
                Bitmap {
                    table_entries: 8193,
                    ..plain.clone()
                },
                "must have some",
            ),
            (
                Bitmap {
                    flags: 8,
                    ..plain.clone()
                },
                "reserved flags",
            ),
            (
                Bitmap {
                    granularity_bits: 8,
                    ..plain.clone()
                },
                "granularity_bits 8",
            ),
            (
                Bitmap {
                    granularity_bits: 32,
                    ..plain.clone()
                },
                "granularity_bits 32",
            ),
            (
                Bitmap {
                    granularity_bits: 9,
                    ..plain.clone()
                },
                "too few",
            ),
            (
                Bitmap {
                    name: String::new(),
                    ..plain.clone()
                },
                "a name of 0",
            ),
            (
                Bitmap {
                    name: "n".repeat(1024),
                    ..plain.clone()
                },
                "a name of 1024",
            ),
        ];
        for (bitmap, why) in wrong {
            let bytes = Bitmap::serialise_directory(&[bitmap]);
            let error = Bitmap::parse_directory(&bytes, 1, DISK, GEOMETRY).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains(why), "{error}");
        }
        let in_use = Bitmap {
            granularity_bits: 9,
            flags: Bitmap::IN_USE,
            ..plain.clone()
        };
        let bytes = Bitmap::serialise_directory(&[in_use]);
        Bitmap::parse_directory(&bytes, 1, DISK, GEOMETRY).expect("its length means nothing");
    }

    #[test]
    fn a_directory_must_have_as_many_bitmaps_as_the_header_says_and_no_name_twice() {
        let bytes = Bitmap::serialise_directory(&[bitmap("a"), bitmap("b")]);
        for (bytes, count, why) in [
            (&bytes[..], 1, "more bitmaps"),
            (&bytes[..], 3, "fewer bitmaps"),
            (&bytes[..bytes.len() - 8], 2, "does not end"),
            (
                &Bitmap::serialise_directory(&[bitmap("a"), bitmap("a")]),
                2,
                "two bitmaps 'a'",
            ),
        ] {
            let error = Bitmap::parse_directory(bytes, count, DISK, GEOMETRY).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
        let mut other = bytes.clone();
        other[16] = 2;
        let error = Bitmap::parse_directory(&other, 2, DISK, GEOMETRY).unwrap_err();
        assert!(error.to_string().contains("type 2"), "{error}");
    }

    #[test]
    fn table_entries_say_one_of_three_things() {
        for cluster in [
            BitmapCluster::Zeroes,
            BitmapCluster::Ones,
            BitmapCluster::Data(0x3_0000),
        ] {
            let entry = cluster.serialise();
            assert_eq!(BitmapCluster::parse(entry, GEOMETRY).unwrap(), cluster);
        }
        for entry in [2, 0x3_0001, 0x200, 1 << 56] {
            let error = BitmapCluster::parse(entry, GEOMETRY).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }
}
