//! What an image's tables say of each cluster of its file, read without believing anything.
//!
//! A second, small reader of the format, so that what is judged does not judge itself. What cannot be is
//! left out: a table past the end of the file, or more entries than there is file for.

use std::collections::BTreeMap;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What something in the image says that a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    Header,
    L1,
    RefcountTable,
    RefcountBlock,
    /// A table of the disk's, by its entry in the L1 table, and whether that says that it is its own.
    L2(u64, bool),
    SnapshotTable,
    SnapshotL1,
    SnapshotL2,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
    /// Of a cluster of the disk, and whether it may be written in place.
    Data(u64, bool),
    /// Of a cluster of the disk, and maybe of others.
    Compressed(u64),
    SnapshotData,
}

impl Claim {
    /// What the guest of no disk may ever write to, and no change of the disk's needs to.
    pub(crate) fn is_kept_as_it_is(self) -> bool {
        use Claim::*;
        matches!(self, SnapshotTable | SnapshotL1 | SnapshotL2)
    }

    /// What belongs to bitmaps, which are stored anew.
    pub(crate) fn is_bitmap(self) -> bool {
        use Claim::*;
        matches!(self, BitmapDirectory | BitmapTable | BitmapData)
    }

    /// What holds a guest's bytes.
    pub(crate) fn is_data(self) -> bool {
        use Claim::*;
        matches!(self, Data(..) | Compressed(_) | SnapshotData)
    }
}

/// See the module's header.
pub(crate) struct Walk<'a> {
    bytes: &'a [u8],
    pub(crate) cluster_bits: u32,
    extended: bool,
    refcount_order: u32,
    pub(crate) claims: BTreeMap<u64, Vec<Claim>>,
}

pub(crate) fn number(bytes: &[u8], at: u64, size: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let part = bytes.get(at..at.checked_add(size)?)?;
    Some(part.iter().fold(0, |all, byte| all << 8 | u64::from(*byte)))
}

impl<'a> Walk<'a> {
    /// `None` where not even the header tells how to read it.
    pub(crate) fn new(bytes: &'a [u8]) -> Option<Self> {
        let field = |at: u64, size: usize| number(bytes, at, size);
        let version = field(4, 4)?;
        let cluster_bits = u32::try_from(field(20, 4)?).ok()?;
        if !(9..=21).contains(&cluster_bits) || !(2..=3).contains(&version) {
            return None;
        }
        let (incompatible, refcount_order) = match version {
            2 => (0, 4),
            _ => (field(72, 8)?, u32::try_from(field(96, 4)?).ok()?),
        };
        if refcount_order > 6 {
            return None;
        }
        let mut walk = Self {
            bytes,
            cluster_bits,
            extended: incompatible & 1 << 4 != 0,
            refcount_order,
            claims: BTreeMap::new(),
        };
        walk.claim(0, walk.cluster_bytes(), Claim::Header);
        let (table, clusters) = (field(48, 8)?, field(56, 4)?);
        let table_bytes = clusters << cluster_bits;
        walk.claim(table, table_bytes, Claim::RefcountTable);
        for entry in walk.words(table, table_bytes) {
            if entry & !0x1ff != 0 {
                walk.claim(entry & !0x1ff, walk.cluster_bytes(), Claim::RefcountBlock);
            }
        }
        let (l1, entries) = (field(40, 8)?, field(36, 4)?);
        walk.claim(l1, 8 * entries, Claim::L1);
        for (index, entry) in walk.words(l1, 8 * entries).into_iter().enumerate() {
            let is_own = entry & COPIED != 0;
            walk.table(
                entry,
                Claim::L2(index as u64, is_own),
                |cluster, word| match word & COMPRESSED {
                    0 => Claim::Data(cluster, is_own && word & COPIED != 0),
                    _ => Claim::Compressed(cluster),
                },
            );
        }
        walk.snapshots(field(64, 8)?, field(60, 4)?);
        if version == 3 {
            walk.bitmaps(field(100, 4)?);
        }
        Some(walk)
    }

    pub(crate) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where the L1 table begins.
    pub(crate) fn l1_place(&self) -> u64 {
        number(self.bytes, 40, 8).unwrap_or(0)
    }

    /// Bytes of an L2 entry.
    pub(crate) fn entry_bytes(&self) -> u64 {
        match self.extended {
            true => 16,
            false => 8,
        }
    }

    /// The words of a table, as far as the file has them.
    pub(crate) fn words(&self, offset: u64, bytes: u64) -> Vec<u64> {
        let words = (0..bytes / 8).map_while(|index| {
            let at = offset.checked_add(8 * index)?;
            number(self.bytes, at, 8)
        });
        words.collect()
    }

    /// Somebody says that these bytes are this.
    fn claim(&mut self, offset: u64, bytes: u64, claim: Claim) {
        let end = offset.saturating_add(bytes).min(self.bytes.len() as u64);
        let mut cluster = offset >> self.cluster_bits;
        while cluster << self.cluster_bits < end && bytes > 0 {
            self.claims.entry(cluster).or_default().push(claim);
            cluster += 1;
        }
    }

    /// An L2 table, and what it maps; `of` makes the claim of a cluster of its disk and the entry's word.
    fn table(&mut self, entry: u64, claim: Claim, of: impl Fn(u64, u64) -> Claim) {
        let table = entry & OFFSET;
        if table == 0 {
            return;
        }
        self.claim(table, self.cluster_bytes(), claim);
        let per_entry = self.entry_bytes() as usize / 8;
        let entries = self.cluster_bytes() / self.entry_bytes();
        let first = match claim {
            Claim::L2(index, _) => index.saturating_mul(entries),
            _ => 0,
        };
        let words = self.words(table, self.cluster_bytes());
        for (index, word) in words.into_iter().step_by(per_entry).enumerate() {
            let claim = of(first.saturating_add(index as u64), word);
            if word & COMPRESSED != 0 {
                let shift = 62 - (self.cluster_bits - 8);
                let host = word & ((1 << shift) - 1);
                let sectors = word >> shift & ((1 << (self.cluster_bits - 8)) - 1);
                self.claim(host, (sectors + 1) * 512 - host % 512, claim);
            } else if word & OFFSET != 0 {
                self.claim(word & OFFSET, self.cluster_bytes(), claim);
            }
        }
    }

    fn snapshots(&mut self, mut at: u64, count: u64) {
        let begin = at;
        for _ in 0..count.min(1000) {
            let field = |offset: u64, size: usize| number(self.bytes, at + offset, size);
            let fields = (
                field(0, 8),
                field(8, 4),
                field(12, 2),
                field(14, 2),
                field(36, 4),
            );
            let (Some(l1), Some(entries), Some(id), Some(name), Some(extra)) = fields else {
                break;
            };
            self.claim(l1, 8 * entries, Claim::SnapshotL1);
            for entry in self.words(l1, 8 * entries) {
                self.table(entry, Claim::SnapshotL2, |_, _| Claim::SnapshotData);
            }
            at += (40 + extra + id + name).next_multiple_of(8);
        }
        self.claim(begin, at - begin, Claim::SnapshotTable);
    }

    fn bitmaps(&mut self, header_bytes: u64) {
        let mut at = header_bytes;
        while let (Some(kind), Some(bytes)) =
            (number(self.bytes, at, 4), number(self.bytes, at + 4, 4))
        {
            if kind == 0 || at > self.cluster_bytes() {
                return;
            }
            if kind == 0x2385_2875 {
                break;
            }
            at += 8 + bytes.next_multiple_of(8);
        }
        let field = |offset: u64, size: usize| number(self.bytes, at + 8 + offset, size);
        let (Some(count), Some(bytes), Some(begin)) = (field(0, 4), field(8, 8), field(16, 8))
        else {
            return;
        };
        self.claim(begin, bytes, Claim::BitmapDirectory);
        let mut at = begin;
        for _ in 0..count.min(100) {
            let field =
                |offset: u64, size: usize| number(self.bytes, at.checked_add(offset)?, size);
            let fields = (field(0, 8), field(8, 4), field(18, 2), field(20, 4));
            let (Some(table), Some(entries), Some(name), Some(extra)) = fields else {
                return;
            };
            self.claim(table, 8 * entries, Claim::BitmapTable);
            for entry in self.words(table, 8 * entries) {
                let is_place = entry & !OFFSET == 0 && entry.is_multiple_of(self.cluster_bytes());
                if entry != 0 && is_place {
                    self.claim(entry, self.cluster_bytes(), Claim::BitmapData);
                }
            }
            at += (24 + extra + name).next_multiple_of(8);
        }
    }

    /// A cluster's reference count, as the refcount table has it.
    pub(crate) fn count(&self, cluster: u64) -> u64 {
        let bits = 1_u64 << self.refcount_order;
        let per_block = self.cluster_bytes() * 8 / bits;
        let table = number(self.bytes, 48, 8).unwrap_or(0);
        let clusters = number(self.bytes, 56, 4).unwrap_or(0);
        let index = cluster / per_block;
        if index * 8 >= clusters << self.cluster_bits {
            return 0;
        }
        let block = number(self.bytes, table.saturating_add(index * 8), 8).unwrap_or(0) & !0x1ff;
        if block == 0 {
            return 0;
        }
        let at = cluster % per_block * bits;
        match bits {
            8.. => number(self.bytes, block + at / 8, bits as usize / 8).unwrap_or(0),
            _ => {
                let byte = number(self.bytes, block + at / 8, 1).unwrap_or(0);
                byte >> (at % 8) & ((1 << bits) - 1)
            }
        }
    }
}
