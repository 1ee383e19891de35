//! The snapshot table: reading it as far as that can be done, and writing it anew.

use blockcore::Error;

use super::{Check, Repairs};
use crate::qcow2::layout::extension::corrupt;
use crate::qcow2::layout::header::MAX_SNAPSHOTS;
use crate::qcow2::layout::snapshot::{
    HEAD_BYTES, MAX_EXTRA_BYTES, MAX_TABLE_BYTES, Snapshot, SnapshotHead, V3_EXTRA_BYTES,
};

/// The snapshots of the image.
#[derive(Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// How long their table is.
    pub(super) table_bytes: u64,
    /// What is wrong with the table and is right when it is written anew.
    corruptions: u64,
}

impl Check<'_, '_> {
    /// Reads the table. What a repair would cut off is left out; without one it is an error.
    pub(super) async fn read_snapshots(&mut self) -> Result<(), Error> {
        let all = self.repair.has_errors();
        let (mut count, start) = (
            self.image.header.snapshots,
            self.image.header.snapshots_offset,
        );
        if count > MAX_SNAPSHOTS {
            if !all {
                return Err(corrupt(format!(
                    "the header says that there are {count} snapshots; at most {MAX_SNAPSHOTS} are \
                     allowed ('check --repair all' drops the others)"
                )));
            }
            self.say(&format!(
                "dropping {} snapshots too many",
                count - MAX_SNAPSHOTS
            ));
            self.snapshots.corruptions += u64::from(count - MAX_SNAPSHOTS);
            count = MAX_SNAPSHOTS;
        }
        if !self.image.geometry.is_aligned(start) || start > i64::MAX as u64 - MAX_TABLE_BYTES {
            return Err(corrupt(format!(
                "the snapshot table is at {start:#x}, where none can be"
            )));
        }
        let mut at = start;
        for index in 0..count {
            let begin = at.next_multiple_of(8);
            if begin >= self.image.bytes() {
                self.miss_snapshots(count - index);
                at = begin + u64::from(count - index) * HEAD_BYTES as u64;
                break;
            }
            let (snapshot, end) = self.read_snapshot(index, begin).await?;
            if end - start > MAX_TABLE_BYTES {
                if !all {
                    return Err(corrupt(format!(
                        "the snapshot table is longer than {MAX_TABLE_BYTES} bytes ('check --repair all' \
                         drops what is beyond)"
                    )));
                }
                self.say(&format!(
                    "dropping {} snapshots: the table is too long",
                    count - index
                ));
                self.snapshots.corruptions += u64::from(count - index);
                break;
            }
            self.snapshots.list.push(snapshot);
            at = end;
        }
        self.snapshots.table_bytes = at - start;
        if self.image.header.version >= 3 {
            for index in 0..self.snapshots.list.len() {
                if self.snapshots.list[index].extra_bytes < V3_EXTRA_BYTES {
                    self.snapshots.corruptions += 1;
                    let verb = self.repair.verb();
                    self.say(&format!(
                        "{verb}: entry {index} of the snapshot table is incomplete"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The file ends before the last snapshots. They would be empty; a repair leaves them out.
    fn miss_snapshots(&mut self, missing: u32) {
        if self.image.header.version >= 3 {
            let verb = self.repair.verb();
            self.say(&format!(
                "{verb}: {missing} snapshots are past the end of the file"
            ));
            self.snapshots.corruptions += u64::from(missing);
        }
    }

    /// An entry, and where it ends.
    async fn read_snapshot(&mut self, index: u32, begin: u64) -> Result<(Snapshot, u64), Error> {
        let head = self.image.read(begin, HEAD_BYTES as u64).await?;
        let head = SnapshotHead::parse(&head);
        if head.has_too_much_extra() {
            if !self.repair.has_errors() {
                return Err(head.too_much_extra(index));
            }
            let bytes = head.extra_bytes;
            self.say(&format!(
                "cutting {bytes} bytes of extra data of entry {index} of the snapshot table"
            ));
            self.snapshots.corruptions += 1;
        }
        let extra_at = begin + HEAD_BYTES as u64;
        let extra_bytes = head.extra_bytes.min(MAX_EXTRA_BYTES);
        let extra = self.image.read(extra_at, extra_bytes.into()).await?;
        let names_at = extra_at + u64::from(head.extra_bytes);
        let names = self.image.read(names_at, head.names_bytes() as u64).await?;
        let snapshot = head.with(&extra, &names);
        Ok((snapshot, begin + head.entry_bytes()))
    }

    /// Writes the table anew if something is wrong with it, with all reference counts.
    pub(super) async fn write_snapshots(&mut self) -> Result<(), Error> {
        let wrong = self.snapshots.corruptions;
        if wrong == 0 {
            return Ok(());
        }
        if !self.repair.has_errors() {
            self.report.corruptions += wrong;
            return Ok(());
        }
        for snapshot in &mut self.snapshots.list {
            // Of version 2: it was as long as the disk is.
            snapshot.disk_bytes.get_or_insert(self.image.header.bytes);
        }
        let table = Snapshot::serialise_table(&self.snapshots.list)?;
        self.replace_snapshot_table(&table).await?;
        self.report.corruptions_fixed += wrong;
        Ok(())
    }
}
