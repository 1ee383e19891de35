//! Bitmaps that the image keeps: what they refer to.
//!
//! A bitmap that is damaged must not be believed: what it does not name would be missing from a backup. So a
//! repair keeps it, marked as one that was not closed in order; where the directory itself means
//! nothing, all bitmaps go.

use blockcore::Error;

use super::{Check, Repairs};
use crate::qcow2::layout::bitmap::{Bitmap, BitmapCluster};
use crate::qcow2::layout::header::Features;
use blockcore::driver::Fix;

/// Where in a directory's entry the flags are.
const FLAGS_AT: u64 = 12;

impl Check<'_, '_> {
    pub(super) async fn count_bitmaps(&mut self, repair: Fix) -> Result<(), Error> {
        let Some(directory) = self.image.header.extensions.bitmaps else {
            return Ok(());
        };
        let geometry = self.image.geometry;
        // Past the end of the file there is nothing to keep.
        let bytes = directory.bytes.min(self.image.bytes());
        let data = self.image.read(directory.offset, bytes).await?;
        let disk_bytes = self.image.header.bytes;
        let parsed = Bitmap::parse_directory(&data, directory.bitmaps, disk_bytes, geometry);
        let bitmaps = match parsed {
            Ok(bitmaps) => bitmaps,
            Err(error) if repair.has_errors() => {
                self.say(&format!("repairing: dropping all bitmaps: {error}"));
                self.image.clear_autoclear(Features::BITMAPS).await?;
                self.image.header.extensions.bitmaps = None;
                self.report.corruptions_fixed += 1;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.refer(directory.offset, directory.bytes);
        let mut entry_at = directory.offset;
        for bitmap in bitmaps {
            self.count_bitmap(&bitmap, entry_at, repair).await?;
            entry_at += bitmap.entry_bytes();
        }
        Ok(())
    }

    async fn count_bitmap(
        &mut self,
        bitmap: &Bitmap,
        entry_at: u64,
        repair: Fix,
    ) -> Result<(), Error> {
        let geometry = self.image.geometry;
        let (offset, entries) = (bitmap.table_offset, u64::from(bitmap.table_entries));
        self.refer(offset, entries * 8);
        let table = self.image.words(offset, entries).await?;
        for (index, entry) in table.into_iter().enumerate() {
            match BitmapCluster::parse(entry, geometry) {
                Ok(BitmapCluster::Data(data)) => self.refer(data, geometry.cluster_bytes()),
                Ok(_) => {}
                Err(error) if repair.has_errors() => {
                    self.say(&format!(
                        "repairing: bitmap '{}' counts no more: {error}",
                        bitmap.name
                    ));
                    let flags = (bitmap.flags | Bitmap::IN_USE).to_be_bytes();
                    self.image.write(entry_at + FLAGS_AT, &flags).await?;
                    self.image.flush().await?;
                    let place = offset + index as u64 * 8;
                    self.image.write(place, &[0; 8]).await?;
                    self.report.corruptions_fixed += 1;
                }
                Err(error) => self.corrupt(&format!("bitmap '{}': {error}", bitmap.name)),
            }
        }
        Ok(())
    }
}
