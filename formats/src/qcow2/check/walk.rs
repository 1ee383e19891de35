//! Counting what L1 and L2 tables refer to, and looking whether their entries make sense.

use blockcore::{Error, ErrorKind};

use super::{Check, Repairs};
use crate::qcow2::layout::Geometry;
use crate::qcow2::layout::bytes::{from_words, words};
use crate::qcow2::layout::entry::L2Entry;
use crate::qcow2::layout::header::MAX_L1_BYTES;
use blockcore::driver::Fix;

/// Where in an entry the host offset is.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);
/// Of entries that are not compressed. The zero flag is reserved with extended entries, and QEMU does
/// not mind it there.
const L2_RESERVED: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ZERO);
/// Bits of an extended entry's bitmap: subclusters that are allocated.
const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// Entries of an L2 table that say "reads as zeroes", without extended entries.
const ZERO_ENTRY: u64 = ZERO;

/// What an L2 entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    Absent,
    Zero,
    /// It has a place, and reads as zeroes.
    ZeroWithPlace,
    Data,
    Compressed,
}

impl EntryKind {
    pub(super) fn of(word: u64, geometry: Geometry) -> Self {
        let has_offset = word & OFFSET_MASK != 0;
        if word & COMPRESSED != 0 {
            return Self::Compressed;
        }
        // As QEMU has it, in version 2 too.
        if word & ZERO != 0 && !geometry.extended {
            return match has_offset {
                true => Self::ZeroWithPlace,
                false => Self::Zero,
            };
        }
        match has_offset || (geometry.data_file && word & COPIED != 0) {
            true => Self::Data,
            false => Self::Absent,
        }
    }

    pub(super) fn has_place(self) -> bool {
        matches!(self, Self::Data | Self::ZeroWithPlace)
    }
}

/// Which tables are walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tables {
    /// The disk's as it is now.
    Active,
    /// A snapshot's.
    Inactive,
}

impl Check<'_, '_> {
    /// Counts what the disk as it is now refers to.
    pub(super) async fn count_active(&mut self, repair: Fix) -> Result<(), Error> {
        let (offset, entries) = (
            self.image.header.l1_offset,
            u64::from(self.image.header.l1_entries),
        );
        let report = &mut self.report;
        (report.allocated_clusters, report.fragmented_clusters) = (0, 0);
        report.compressed_clusters = 0;
        self.count_l1(offset, entries, Tables::Active, repair).await
    }

    /// Counts what snapshots refer to, and their table.
    pub(super) async fn count_snapshots(&mut self, repair: Fix) -> Result<(), Error> {
        let snapshots = self.snapshots.list.len();
        if self.image.geometry.data_file && snapshots > 0 {
            self.corrupt(&format!(
                "there are {snapshots} snapshots, and an external data file, which has none"
            ));
        }
        for index in 0..snapshots {
            let snapshot = &self.snapshots.list[index];
            let (offset, entries) = (snapshot.l1_offset, u64::from(snapshot.l1_entries));
            let who = snapshot.shown();
            if !self.image.geometry.is_aligned(offset) {
                self.corrupt(&format!(
                    "the L1 table of {who} is at {offset:#x}, where no cluster begins"
                ));
                continue;
            }
            if entries * 8 > MAX_L1_BYTES {
                self.corrupt(&format!("the L1 table of {who} has {entries} entries"));
                continue;
            }
            self.count_l1(offset, entries, Tables::Inactive, repair)
                .await?;
        }
        let (offset, bytes) = (
            self.image.header.snapshots_offset,
            self.snapshots.table_bytes,
        );
        self.refer(offset, bytes);
        Ok(())
    }

    async fn count_l1(
        &mut self,
        offset: u64,
        entries: u64,
        tables: Tables,
        repair: Fix,
    ) -> Result<(), Error> {
        if offset > i64::MAX as u64 - MAX_L1_BYTES {
            self.corrupt(&format!("an L1 table is at {offset:#x}, beyond any file"));
            return Ok(());
        }
        self.refer(offset, entries * 8);
        let geometry = self.image.geometry;
        let l1 = self.image.words(offset, entries).await?;
        for (index, entry) in l1.into_iter().enumerate().filter(|(_, entry)| *entry != 0) {
            if entry & L1_RESERVED != 0 {
                self.corrupt(&format!(
                    "L1 entry {index} has reserved bits set: {entry:#018x}"
                ));
            }
            let table = entry & OFFSET_MASK;
            self.refer(table, geometry.cluster_bytes());
            if !geometry.is_aligned(table) {
                self.corrupt(&format!(
                    "L1 entry {index} points to no beginning of a cluster: {entry:#018x}"
                ));
            }
            self.count_l2(table, tables, repair).await?;
        }
        Ok(())
    }

    async fn count_l2(&mut self, table: u64, tables: Tables, repair: Fix) -> Result<(), Error> {
        let geometry = self.image.geometry;
        let bytes = self.image.read(table, geometry.cluster_bytes()).await?;
        let mut walk = L2Walk {
            table,
            tables,
            repair,
            follows: None,
        };
        let (size, mut words) = (geometry.entry_words(), words(&bytes));
        let mut index = 0;
        while let Some(word) = words.next() {
            let bitmap = if size > 1 {
                words.next().unwrap_or(0)
            } else {
                0
            };
            if word != 0 || bitmap != 0 {
                self.count_entry(&mut walk, index, word, bitmap).await?;
            }
            index += 1;
        }
        Ok(())
    }

    async fn count_entry(
        &mut self,
        walk: &mut L2Walk,
        index: u64,
        word: u64,
        bitmap: u64,
    ) -> Result<(), Error> {
        let geometry = self.image.geometry;
        let kind = EntryKind::of(word, geometry);
        let here = format!(
            "L2 entry {word:#018x} ({index} of the table at {:#x})",
            walk.table
        );
        if kind != EntryKind::Compressed && word & L2_RESERVED != 0 {
            self.corrupt(&format!("{here} has reserved bits set"));
        }
        match kind {
            EntryKind::Compressed => self.count_compressed(walk, &here, word, bitmap),
            EntryKind::Data | EntryKind::ZeroWithPlace => {
                let offset = word & OFFSET_MASK;
                if (bitmap >> 32) & bitmap != 0 {
                    // Nobody knows which of both is right, so it stays for whoever does.
                    self.corrupt(&format!(
                        "{here} says of a part that it is both data and zero"
                    ));
                }
                if !geometry.is_aligned(offset) {
                    let has_data = match geometry.extended {
                        true => bitmap & ALL_ALLOCATED != 0,
                        false => word & ZERO == 0,
                    };
                    let what = format!("{here} points to no beginning of a cluster");
                    if has_data {
                        self.corrupt(&what);
                    } else if self.found_and_clear(walk, index, bitmap, &what).await? {
                        // It points nowhere any more.
                        return Ok(());
                    }
                }
                if walk.tables == Tables::Active {
                    self.report.allocated_clusters += 1;
                    let follows = walk.follows.replace(offset + geometry.cluster_bytes());
                    if follows.is_some_and(|follows| follows != offset) {
                        self.report.fragmented_clusters += 1;
                    }
                }
                if !geometry.data_file {
                    self.refer(offset, geometry.cluster_bytes());
                }
            }
            EntryKind::Absent if bitmap & ALL_ALLOCATED != 0 => {
                self.corrupt(&format!("{here} has no place, and parts that are there"));
            }
            EntryKind::Absent | EntryKind::Zero => {}
        }
        Ok(())
    }

    fn count_compressed(&mut self, walk: &L2Walk, here: &str, word: u64, bitmap: u64) {
        let geometry = self.image.geometry;
        if word & COPIED != 0 {
            self.corrupt(&format!(
                "{here} is compressed, and says that it can be written in place"
            ));
        }
        let wrong = if geometry.data_file {
            "is compressed, in an image with an external data file"
        } else if bitmap != 0 {
            "is compressed, and says that it has parts"
        } else {
            let entry = L2Entry::from_words(word & !COPIED, 0, geometry);
            let extent = entry.compressed_extent(geometry).expect("it is compressed");
            self.refer(extent.host.0, extent.bytes);
            if walk.tables == Tables::Active {
                let report = &mut self.report;
                report.allocated_clusters += 1;
                report.compressed_clusters += 1;
                // Never a neighbour that one read could take along.
                report.fragmented_clusters += 1;
            }
            return;
        };
        self.corrupt(&format!("{here} {wrong}"));
    }

    /// A corrupt entry that would better read as zeroes; returns whether it does now.
    async fn found_and_clear(
        &mut self,
        walk: &L2Walk,
        index: u64,
        bitmap: u64,
        what: &str,
    ) -> Result<bool, Error> {
        let verb = walk.repair.verb();
        self.say(&format!("{verb}: {what}"));
        if !walk.repair.has_errors() {
            self.report.corruptions += 1;
            return Ok(false);
        }
        let geometry = self.image.geometry;
        let offset = walk.table + index * geometry.entry_bytes();
        if let Some(name) = self.metadata_at(offset, geometry.entry_bytes()) {
            let what = format!(
                "an L2 table at {:#x} lies in the {name}: not repaired",
                walk.table
            );
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let words = match geometry.extended {
            // What was data or zero reads as zeroes, and the rest comes from where it came from.
            true => vec![0, (bitmap | bitmap << 32) & !ALL_ALLOCATED],
            false => vec![ZERO_ENTRY],
        };
        self.image.write(offset, &from_words(&words)).await?;
        self.report.corruptions_fixed += 1;
        Ok(true)
    }

    /// What metadata other than L2 tables lies in a range, if any does.
    pub(super) fn metadata_at(&self, offset: u64, bytes: u64) -> Option<&'static str> {
        let geometry = self.image.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let header = &self.image.header;
        let meets = |begin: u64, length: u64| offset < begin + length && begin < offset + bytes;
        if meets(0, cluster_bytes) {
            return Some("header");
        }
        if meets(header.l1_offset, u64::from(header.l1_entries) * 8) {
            return Some("L1 table");
        }
        if meets(header.refcount_table_offset, header.refcount_table_bytes()) {
            return Some("refcount table");
        }
        let blocks = 0..self.blocks.table().len() as u64;
        let mut blocks = blocks.map(|block| self.blocks.offset(block));
        if blocks.any(|block| block != 0 && meets(block, cluster_bytes)) {
            return Some("refcount blocks");
        }
        if meets(header.snapshots_offset, self.snapshots.table_bytes) {
            return Some("snapshot table");
        }
        let mut inactive = self.snapshots.list.iter();
        let inactive_l1 = inactive.any(|snapshot| {
            let entries = u64::from(snapshot.l1_entries);
            let is_sane = snapshot.l1_offset < i64::MAX as u64;
            is_sane && meets(snapshot.l1_offset, entries * 8)
        });
        inactive_l1.then_some("L1 table of a snapshot")
    }
}

/// An L2 table whose entries are looked at.
struct L2Walk {
    table: u64,
    tables: Tables,
    repair: Fix,
    /// Where a cluster would be that follows the last one.
    follows: Option<u64>,
}
