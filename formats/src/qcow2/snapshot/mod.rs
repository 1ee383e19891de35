//! Internal snapshots: taking, applying and deleting them.
//!
//! A snapshot is an L1 table of its own. What the disk and snapshots have in common counts once for each of
//! them, and is copied by whoever writes to it: no flag says any more that it may be written in place.
//!
//! **What a power cut leaves.** Counts, flags and tables belong together, and no order of changing them in
//! place would do: between two writes counts and flags would not match. So nothing is changed in place. All
//! that becomes different is written to clusters that are free ([`draft`]): the counts, the disk's L1 table,
//! those of its L2 tables whose flags change, and the table of snapshots. Then, all of this being durable, one
//! write changes the header's fields from the disk's length to the place of the snapshot table. They lie in
//! one sector, of which a power cut leaves the old or the new:
//!
//! * Before that write: the image is as it was. Clusters that had been free have been written to; nothing
//!   counts them, so not even space is lost.
//! * After it: the image is as it shall be. What the old tables had alone counts as free, by the new counts.
//!
//! A process that is killed leaves the same. It leaves no records in its crash segment, either: all that had
//! been recorded is in the image before the first step, and until the last one nothing changes that would be.
//! A failure is a return before that write, with the image in memory as it was. Where the write itself fails
//! nobody knows which header there is; nothing more is done with the image until it is opened again.
//!
//! **Who loses what.** A snapshot takes over the disk's L1 table where it is, with the L2 tables that it names;
//! the disk gets new ones. So nothing that a snapshot has is ever written to again. Flags in its tables are
//! of no meaning; they are made anew when it is applied.
//!
//! **Cost.** Every L2 table of the disk is read, and those are written that had something to write in place.
//! Space for these, and for the refcount blocks that count what they map, must be free.
//!
//! Threads: control thread, in a drained section. Clusters that become free are free at once: nobody is
//! reading them.

pub(super) mod draft;
pub(super) mod tables;

use std::ops::Range;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use blockcore::driver::{SnapshotInfo, SnapshotRef, SnapshotSpec};
use blockcore::io::Io;
use blockcore::{Error, ErrorKind, IoError};

use self::draft::{Change, Draft, Written};
use self::tables::TableReferences;
use super::image::{FILE, Image, read_bytes, write_bytes};
use super::layout::HostOffset;
use super::layout::bytes::words;
use super::layout::entry::L1Entry;
use super::layout::header::{MAX_L1_BYTES, MAX_SNAPSHOTS, field};
use super::layout::snapshot::{KNOWN_EXTRA_BYTES, Snapshot};
use super::open::MAX_INACTIVE_BYTES;
use super::refcount::{ClusterNumber, Run};

/// The header's fields that change: the disk's length, and those up to the place of the snapshot table. They
/// end within the first sector.
const SWITCHED: Range<usize> = field::BYTES as usize..field::INCOMPATIBLE as usize;

/// The snapshots that an image has.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// Bytes of the table that they are in.
    pub(super) table_bytes: u64,
}

/// Why it could not be done.
pub(super) enum Failure {
    Io(IoError),
    /// This cluster would have more references than a count has room for.
    TooMany(ClusterNumber),
    /// This cluster has a count that does not fit what refers to it.
    BadCount(ClusterNumber, u64),
    Refused(Error),
}

impl From<IoError> for Failure {
    fn from(error: IoError) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// What the image shall be.
pub(super) struct Next {
    /// The disk's L1 table, and where it is already, if so.
    pub(super) l1: Vec<L1Entry>,
    pub(super) l1_place: Option<HostOffset>,
    pub(super) bytes: u64,
    pub(super) snapshots: Vec<Snapshot>,
    /// The host is told of what becomes free.
    pub(super) passes_discards: bool,
}

impl Snapshot {
    /// As operators see it.
    pub(super) fn info(&self) -> SnapshotInfo {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        SnapshotInfo {
            id: text(&self.id),
            name: text(&self.name),
            seconds: self.date_seconds.into(),
            nanoseconds: self.date_nanoseconds,
            vm_clock_ns: self.vm_clock_nanoseconds,
            instructions: self.icount,
            vm_state_bytes: self.vm_state_bytes,
        }
    }
}

impl Snapshots {
    /// As operators see them.
    pub(super) fn infos(&self) -> Vec<SnapshotInfo> {
        self.list.iter().map(Snapshot::info).collect()
    }

    /// The identifier that the next one gets: one more than the largest number.
    fn next_id(&self) -> String {
        let number = |id: &[u8]| {
            let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
            digits.fold(0_u64, |number, digit| {
                number
                    .saturating_mul(10)
                    .saturating_add(u64::from(digit - b'0'))
            })
        };
        let largest = self.list.iter().map(|snapshot| number(&snapshot.id)).max();
        largest.unwrap_or(0).saturating_add(1).to_string()
    }
}

impl Image {
    pub(super) fn snapshots(&self) -> MutexGuard<'_, Snapshots> {
        self.snapshots.lock().expect("no panic while looking")
    }

    /// See [`Driver::snapshot_create`](blockcore::driver::Driver::snapshot_create).
    pub(super) async fn take_snapshot(&self, io: Io<'_>, spec: &SnapshotSpec) -> Result<(), Error> {
        let what = format!("take snapshot '{}'", spec.name);
        let taken = self.try_take(io, spec).await;
        taken.map_err(|failure| self.explain(io, &what, failure))
    }

    async fn try_take(&self, io: Io<'_>, spec: &SnapshotSpec) -> Result<(), Failure> {
        self.begin(io).await?;
        let (place, entries) = {
            let l1 = self.l1();
            (l1.place, l1.entries.clone())
        };
        let mut snapshots = self.snapshots().clone();
        let id = spec.id.clone().unwrap_or_else(|| snapshots.next_id());
        snapshots.list.push(Snapshot {
            l1_offset: place.0,
            l1_entries: entries.len() as u32,
            id: id.into_bytes(),
            name: spec.name.clone().into_bytes(),
            date_seconds: u32::try_from(spec.seconds).unwrap_or(u32::MAX),
            date_nanoseconds: spec.nanoseconds,
            vm_clock_nanoseconds: spec.vm_clock_ns,
            vm_state_bytes: spec.vm_state_bytes,
            disk_bytes: Some(self.bytes()),
            icount: spec.instructions,
            extra: Vec::new(),
            extra_bytes: KNOWN_EXTRA_BYTES as u32,
        });
        check_number(&snapshots.list)?;
        let mut l1 = entries;
        if spec.vm_state_bytes > 0 {
            // The machine's state is the snapshot's from now on.
            l1[self.vm_state_index()..].fill(L1Entry::default());
        }
        let mut draft = Draft::new(self, io);
        self.count_data(io, &mut draft, &l1, Change::More).await?;
        let l1 = self
            .rewrite(io, &mut draft, &l1, TableReferences::ToBeMade)
            .await?;
        let next = Next {
            l1,
            l1_place: None,
            bytes: self.bytes(),
            snapshots: snapshots.list,
            passes_discards: false,
        };
        self.become_next(io, draft, next).await
    }

    /// See [`Driver::snapshot_apply`](blockcore::driver::Driver::snapshot_apply).
    pub(super) async fn apply_snapshot(
        &self,
        io: Io<'_>,
        which: &SnapshotRef,
    ) -> Result<(), Error> {
        let applied = self.try_apply(io, which).await;
        applied.map_err(|failure| self.explain(io, &format!("apply {which}"), failure))
    }

    async fn try_apply(&self, io: Io<'_>, which: &SnapshotRef) -> Result<(), Failure> {
        self.use_bitmaps(io).await?;
        self.begin(io).await?;
        let g = self.geometry;
        let snapshots = self.snapshots().clone();
        let snapshot = &snapshots.list[find(&snapshots, which)?];
        let mut new = self.snapshot_l1(io, snapshot).await?;
        let bytes = snapshot.disk_bytes.unwrap_or(self.bytes());
        if g.l1_entries(bytes) * 8 > MAX_L1_BYTES || bytes > blockcore::io::MAX_BYTES {
            let text = format!("its disk of {bytes} bytes is longer than can be");
            return Err(Error::new(ErrorKind::Corrupt, text).into());
        }
        let needed = g.l1_entries(bytes) as usize;
        new.resize(new.len().max(needed), L1Entry::default());
        let (place, old) = {
            let l1 = self.l1();
            (l1.place, l1.entries.clone())
        };
        let mut draft = Draft::new(self, io);
        // Less first: there may not be room for both at a time.
        self.count_data(io, &mut draft, &old, Change::Less).await?;
        self.count_data(io, &mut draft, &new, Change::More).await?;
        self.drop_tables(&mut draft, &old).await?;
        let clusters = g.clusters(old.len() as u64 * 8);
        draft.drop_metadata(place, clusters).await?;
        let l1 = self
            .rewrite(io, &mut draft, &new, TableReferences::ToBeMade)
            .await?;
        let next = Next {
            l1,
            l1_place: None,
            bytes,
            snapshots: snapshots.list,
            passes_discards: true,
        };
        self.become_next(io, draft, next).await
    }

    /// See [`Driver::snapshot_delete`](blockcore::driver::Driver::snapshot_delete).
    pub(super) async fn delete_snapshot(
        &self,
        io: Io<'_>,
        which: &SnapshotRef,
    ) -> Result<(), Error> {
        let deleted = self.try_delete(io, which).await;
        deleted.map_err(|failure| self.explain(io, &format!("delete {which}"), failure))
    }

    async fn try_delete(&self, io: Io<'_>, which: &SnapshotRef) -> Result<(), Failure> {
        self.begin(io).await?;
        let g = self.geometry;
        let mut snapshots = self.snapshots().clone();
        let index = find(&snapshots, which)?;
        let snapshot = snapshots.list.remove(index);
        let gone = self.snapshot_l1(io, &snapshot).await?;
        let (place, active) = {
            let l1 = self.l1();
            (l1.place, l1.entries.clone())
        };
        let mut draft = Draft::new(self, io);
        self.count_data(io, &mut draft, &gone, Change::Less).await?;
        self.drop_tables(&mut draft, &gone).await?;
        let clusters = g.clusters(gone.len() as u64 * 8);
        let gone_place = HostOffset(snapshot.l1_offset);
        draft.drop_metadata(gone_place, clusters).await?;
        let l1 = self
            .rewrite(io, &mut draft, &active, TableReferences::There)
            .await?;
        let stays = l1 == active;
        if !stays {
            let clusters = g.clusters(active.len() as u64 * 8);
            draft.drop_metadata(place, clusters).await?;
        }
        let next = Next {
            l1,
            l1_place: stays.then_some(place),
            bytes: self.bytes(),
            snapshots: snapshots.list,
            passes_discards: true,
        };
        self.become_next(io, draft, next).await
    }

    /// Everything is in the image, durably, and nothing is reserved.
    async fn begin(&self, io: Io<'_>) -> Result<(), Failure> {
        if self.geometry.data_file {
            return Err(Error::unsupported(
                "an image with an external data file cannot have internal snapshots: what is in that file \
                 cannot be kept as it is",
            )
            .into());
        }
        self.become_still(io).await
    }

    /// As [`begin`](Self::begin), for what needs no snapshots.
    pub(super) async fn become_still(&self, io: Io<'_>) -> Result<(), Failure> {
        self.check_whole()?;
        self.finish(io).await?;
        debug_assert!(self.limbo.is_empty(), "what was let go of is free");
        debug_assert_eq!(self.refcounts.dirty_count(), 0, "counts are in the image");
        debug_assert_eq!(self.cache.dirty_count(), 0, "entries are in the image");
        Ok(())
    }

    /// The L1 table of a snapshot, as it is in the image.
    pub(super) async fn snapshot_l1(
        &self,
        io: Io<'_>,
        snapshot: &Snapshot,
    ) -> Result<Vec<L1Entry>, Failure> {
        let (place, bytes) = snapshot.l1_range();
        snapshot.check_l1(self.geometry, io.child(FILE).bytes())?;
        let table = read_bytes(io, place, bytes).await?;
        Ok(words(&table).map(L1Entry).collect())
    }

    /// Writes what is not in the image yet, lets the header name it, and goes on with that.
    pub(super) async fn become_next(
        &self,
        io: Io<'_>,
        mut draft: Draft<'_>,
        next: Next,
    ) -> Result<(), Failure> {
        let g = self.geometry;
        let table = Snapshot::serialise_table(&next.snapshots)?;
        let (old_place, old_clusters) = {
            let bytes = self.snapshots().table_bytes;
            let offset = self.header().snapshots_offset;
            (HostOffset(offset), g.clusters(bytes))
        };
        draft.drop_metadata(old_place, old_clusters).await?;
        let snapshots_place = self.write_new(io, &mut draft, &table).await?;
        let l1_place = match next.l1_place {
            Some(place) => place,
            None => {
                let table = L1Entry::table_bytes(&next.l1);
                self.write_new(io, &mut draft, &table).await?
            }
        };
        let mut needed = vec![
            (HostOffset(0), 1),
            (l1_place, g.clusters(8 * next.l1.len() as u64)),
        ];
        needed.push((snapshots_place, g.clusters(table.len() as u64)));
        let tables = next.l1.iter().filter_map(|entry| entry.table());
        needed.extend(tables.map(|table| (table, 1)));
        let lists = next.snapshots.iter().map(Snapshot::l1_range);
        needed.extend(lists.map(|(place, bytes)| (place, g.clusters(bytes))));
        let run = |(place, count): (HostOffset, u64)| Run {
            start: place.0 >> g.cluster_bits,
            count,
        };
        let needed: Vec<_> = needed.into_iter().map(run).collect();
        let written = draft.write(&needed).await?;
        // All of it is there before the header names it.
        self.flush_file(io).await?;
        let mut header = self.header().clone();
        header.bytes = next.bytes;
        header.l1_entries = next.l1.len() as u32;
        header.l1_offset = l1_place.0;
        header.refcount_table_offset = written.table_place.0;
        header.refcount_table_clusters = g.clusters(8 * written.table.len() as u64) as u32;
        header.snapshots = next.snapshots.len() as u32;
        header.snapshots_offset = snapshots_place.0;
        // From the disk's length to the place of the snapshot table.
        let fields = header.fields()[SWITCHED].to_vec();
        self.switch_header(io, &[(field::BYTES, fields)]).await?;
        *self.header() = header;
        *self.snapshots() = Snapshots {
            list: next.snapshots,
            table_bytes: table.len() as u64,
        };
        self.set_bytes(next.bytes);
        {
            let mut l1 = self.l1();
            l1.place = l1_place;
            l1.entries = next.l1;
        }
        self.cache.forget(|_| true);
        self.go_on(io, written, next.passes_discards).await;
        Ok(())
    }

    /// The counts are those of the draft from now on.
    async fn go_on(&self, io: Io<'_>, written: Written, passes_discards: bool) {
        let bits = self.geometry.cluster_bits;
        self.refcounts
            .replace_table(written.table_place, written.table);
        self.refcounts.forget();
        for run in written.removed {
            let place = HostOffset(run.start << bits);
            self.metadata.remove(place, run.count << bits);
        }
        for run in written.added {
            let place = HostOffset(run.start << bits);
            self.metadata.add(place, run.count << bits);
        }
        if let Some(first) = written.first_freed {
            self.first_free.fetch_min(first, Ordering::AcqRel);
        }
        if passes_discards && self.options().pass_discard_snapshot {
            for run in written.freed {
                let (offset, bytes) = (run.start << bits, run.count << bits);
                // Space that cannot be given back is no reason to fail.
                let _ = io.child(FILE).discard(offset, bytes).await;
            }
        }
    }

    /// Writes new metadata, with zeroes up to the end of its last cluster. Nothing has no place.
    pub(super) async fn write_new(
        &self,
        io: Io<'_>,
        draft: &mut Draft<'_>,
        bytes: &[u8],
    ) -> Result<HostOffset, Failure> {
        let clusters = self.geometry.clusters(bytes.len() as u64);
        if clusters == 0 {
            return Ok(HostOffset::default());
        }
        let place = draft.allocate(clusters).await?;
        let mut padded = bytes.to_vec();
        padded.resize((clusters << self.geometry.cluster_bits) as usize, 0);
        write_bytes(io, place, &padded).await?;
        Ok(place)
    }

    pub(super) fn explain(&self, io: Io<'_>, what: &str, failure: Failure) -> Error {
        let name = io.name();
        let host = |cluster: ClusterNumber| cluster << self.geometry.cluster_bits;
        let (kind, why) = match failure {
            Failure::Io(IoError::NoSpace) => (ErrorKind::NoSpace, IoError::NoSpace.to_string()),
            Failure::Io(error) => (ErrorKind::Io, error.to_string()),
            Failure::TooMany(cluster) => (
                ErrorKind::NoSpace,
                format!(
                    "the cluster at offset {:#x} would have more references than its count of {} bits has \
                     room for; delete a snapshot, or give the image wider counts with 'stonework img amend \
                     -o refcount_bits=16'",
                    host(cluster),
                    1 << self.geometry.refcount_order
                ),
            ),
            Failure::BadCount(cluster, count) => (
                ErrorKind::Corrupt,
                format!(
                    "the reference count of the cluster at offset {:#x} is {count}, which does not fit what \
                     refers to it; repair the image with 'stonework img check -r all'",
                    host(cluster)
                ),
            ),
            Failure::Refused(error) => (error.kind(), error.to_string()),
        };
        Error::new(
            kind,
            format!("cannot {what} in the image of node '{name}': {why}"),
        )
    }
}

/// Where in the list a snapshot is.
fn find(snapshots: &Snapshots, which: &SnapshotRef) -> Result<usize, Error> {
    let index = which.find(&snapshots.infos());
    index.ok_or_else(|| Error::new(ErrorKind::NotFound, "there is none"))
}

/// There may be only so many, so that the image can be opened again.
fn check_number(snapshots: &[Snapshot]) -> Result<(), Error> {
    let tables: u64 = snapshots
        .iter()
        .map(|snapshot| 8 * u64::from(snapshot.l1_entries))
        .sum();
    let too_many = |what: String| Err(Error::new(ErrorKind::NoSpace, what));
    if snapshots.len() as u64 > u64::from(MAX_SNAPSHOTS) {
        return too_many(format!("there are {MAX_SNAPSHOTS} snapshots already"));
    }
    if tables > MAX_INACTIVE_BYTES {
        return too_many(format!(
            "the L1 tables of all snapshots would have more than {MAX_INACTIVE_BYTES} bytes"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str) -> Snapshot {
        Snapshot {
            l1_offset: 0,
            l1_entries: 0,
            id: id.into(),
            name: "a".into(),
            date_seconds: 0,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            vm_state_bytes: 0,
            disk_bytes: Some(0),
            icount: None,
            extra: Vec::new(),
            extra_bytes: 0,
        }
    }

    #[test]
    fn the_next_identifier_is_one_more_than_the_largest_number() {
        let id_after = |ids: &[&str]| {
            Snapshots {
                list: ids.iter().map(|id| snapshot(id)).collect(),
                table_bytes: 0,
            }
            .next_id()
        };
        assert_eq!(id_after(&[]), "1");
        assert_eq!(id_after(&["3", "12", "7"]), "13");
        assert_eq!(id_after(&["day", "5th"]), "6");
    }

    #[test]
    fn so_many_snapshots_are_refused_that_the_image_could_not_be_opened_again() {
        let mut list = vec![snapshot("1"); 33];
        for snapshot in &mut list {
            snapshot.l1_entries = (MAX_L1_BYTES / 8) as u32;
        }
        assert!(check_number(&list[..32]).is_ok());
        let refused = check_number(&list).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NoSpace);
    }
}
