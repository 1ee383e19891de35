//! The "copied" flags of the disk's own tables: set where exactly one reference is, and nowhere else.

use blockcore::{Error, ErrorKind};

use super::Check;
use super::walk::{COPIED, EntryKind, OFFSET_MASK};
use crate::qcow2::layout::bytes::{from_words, words};
use blockcore::driver::Fix;

impl Check<'_, '_> {
    /// Looks at the flags of all entries that have a place, after reference counts have been repaired.
    pub(super) async fn check_copied(&mut self) -> Result<(), Error> {
        let report = self.report;
        let repair = match self.repair {
            Fix::All => true,
            // Only where the counts are known to be right.
            Fix::Leaks => (report.check_errors, report.corruptions, report.leaks) == (0, 0, 0),
            Fix::None => false,
        };
        let header = &self.image.header;
        let (offset, entries) = (header.l1_offset, u64::from(header.l1_entries));
        let l1 = self.image.words(offset, entries).await?;
        for (index, entry) in l1.into_iter().enumerate() {
            let table = entry & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            let Some(right) = self.right_flag(entry).await? else {
                continue;
            };
            if right != entry {
                self.found_flag(&format!("L1 entry {index} ({entry:#018x})"), repair);
                if repair {
                    let place = offset + index as u64 * 8;
                    self.image.write(place, &right.to_be_bytes()).await?;
                }
            }
            self.check_copied_table(table, repair).await?;
        }
        Ok(())
    }

    async fn check_copied_table(&mut self, table: u64, repair: bool) -> Result<(), Error> {
        let geometry = self.image.geometry;
        let bytes = self.image.read(table, geometry.cluster_bytes()).await?;
        let mut entries: Vec<_> = words(&bytes).collect();
        let mut is_changed = false;
        for index in (0..entries.len()).step_by(geometry.entry_words()) {
            let entry = entries[index];
            if !EntryKind::of(entry, geometry).has_place() {
                continue;
            }
            let right = match geometry.data_file {
                true => Some(entry | COPIED),
                false => self.right_flag(entry).await?,
            };
            let Some(right) = right.filter(|right| *right != entry) else {
                continue;
            };
            self.found_flag(
                &format!("L2 entry {entry:#018x} (table at {table:#x})"),
                repair,
            );
            entries[index] = right;
            is_changed = true;
        }
        if is_changed && repair {
            if let Some(name) = self.metadata_at(table, geometry.cluster_bytes()) {
                let what = format!("an L2 table at {table:#x} lies in the {name}: not repaired");
                return Err(Error::new(ErrorKind::Corrupt, what));
            }
            self.image.write(table, &from_words(&entries)).await?;
        }
        Ok(())
    }

    /// The entry with the flag that it should have; `None` if nobody can tell.
    async fn right_flag(&mut self, entry: u64) -> Result<Option<u64>, Error> {
        let geometry = self.image.geometry;
        let cluster = (entry & OFFSET_MASK) >> geometry.cluster_bits;
        if !self.blocks.is_readable(cluster / geometry.block_counts()) {
            return Ok(None);
        }
        let count = self.blocks.get(&self.image, cluster).await?;
        Ok(Some(match count {
            1 => entry | COPIED,
            _ => entry & !COPIED,
        }))
    }

    fn found_flag(&mut self, which: &str, repair: bool) {
        let verb = if repair { "repairing" } else { "error" };
        self.say(&format!(
            "{verb}: the 'copied' flag of {which} contradicts the reference count"
        ));
        match repair {
            true => self.report.corruptions_fixed += 1,
            false => self.report.corruptions += 1,
        }
    }
}
