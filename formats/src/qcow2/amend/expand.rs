//! Entries that say "reads as zeroes" made such that say it without the flag, which version 2 does not know:
//! in the disk's tables and in those of snapshots.
//!
//! A cluster with a place of its own gets zeroes there, and is data. Nothing reads what is there as long as
//! the entry has the flag, so this may come first. One without becomes "not there" where there is no backing
//! image, and else a new cluster of zeroes. Tables that change are written anew, at free clusters, and become
//! a fact with the header, as a snapshot's (`snapshot`). The disk and its snapshots read as before, by the old
//! header and by the new one.

use std::collections::BTreeMap;

use blockcore::driver::ZeroFlags;
use blockcore::io::Io;

use crate::qcow2::image::{BACKING, FILE, Image, write_bytes};
use crate::qcow2::layout::HostOffset;
use crate::qcow2::layout::bytes::from_words;
use crate::qcow2::layout::entry::{COPIED, L1Entry, L2Entry};
use crate::qcow2::refcount::Run;
use crate::qcow2::snapshot::draft::{Change, Draft};
use crate::qcow2::snapshot::tables::entries;
use crate::qcow2::snapshot::{Failure, Next};

/// Tables that are written anew, each with its new place.
type Replaced = BTreeMap<HostOffset, HostOffset>;

/// Makes it so. Nothing about the image is dirty, and no cluster is reserved.
pub(super) async fn expand_zeroes(image: &Image, io: Io<'_>) -> Result<(), Failure> {
    let g = image.geometry;
    let mut snapshots = image.snapshots().list.clone();
    let (place, active) = {
        let l1 = image.l1();
        (l1.place, l1.entries.clone())
    };
    let mut inactive = Vec::new();
    for snapshot in &snapshots {
        inactive.push(image.snapshot_l1(io, snapshot).await?);
    }
    // How many L1 entries name each table.
    let mut tables: BTreeMap<HostOffset, u64> = BTreeMap::new();
    for table in active.iter().chain(inactive.iter().flatten()) {
        if let Some(table) = table.table() {
            *tables.entry(table).or_default() += 1;
        }
    }
    let mut draft = Draft::new(image, io);
    let mut replaced = Replaced::new();
    for (table, references) in tables {
        if let Some(new) = expand_table(image, io, &mut draft, table, references).await? {
            replaced.insert(table, new);
        }
    }
    if replaced.is_empty() {
        return Ok(());
    }
    let l1 = renamed(&active, &replaced);
    for (snapshot, old) in snapshots.iter_mut().zip(&inactive) {
        let new = renamed(old, &replaced);
        if new == *old {
            continue;
        }
        let clusters = g.clusters(8 * old.len() as u64);
        let old_place = HostOffset(snapshot.l1_offset);
        draft.drop_metadata(old_place, clusters).await?;
        let table = L1Entry::table_bytes(&new);
        let place = image.write_new(io, &mut draft, &table).await?;
        snapshot.l1_offset = place.0;
    }
    let stays = l1 == active;
    if !stays {
        let clusters = g.clusters(8 * active.len() as u64);
        draft.drop_metadata(place, clusters).await?;
    }
    let next = Next {
        l1,
        l1_place: stays.then_some(place),
        bytes: image.bytes(),
        snapshots,
        passes_discards: false,
    };
    image.become_next(io, draft, next).await
}

/// An L1 table that names the new tables. Which of them are only its own is as it was.
fn renamed(l1: &[L1Entry], replaced: &Replaced) -> Vec<L1Entry> {
    let new = l1.iter().map(|entry| {
        let new = entry.table().and_then(|table| replaced.get(&table));
        match new {
            Some(new) => L1Entry(entry.0 & COPIED | new.0),
            None => *entry,
        }
    });
    new.collect()
}

/// Writes an L2 table anew that has such entries, and gives its new place.
async fn expand_table(
    image: &Image,
    io: Io<'_>,
    draft: &mut Draft<'_>,
    table: HostOffset,
    references: u64,
) -> Result<Option<HostOffset>, Failure> {
    let g = image.geometry;
    let old = image.table_words(io, table).await?;
    let mut new = old.clone();
    for (index, entry) in entries(&old, g) {
        let entry = entry?;
        if !is_zero(entry) {
            continue;
        }
        new[index] = match expand(image, io, draft, entry, references).await? {
            Some(entry) => entry.to_words(g).0,
            None => 0,
        };
    }
    if new == old {
        return Ok(None);
    }
    let place = draft.allocate(1).await?;
    write_bytes(io, place, &from_words(&new)).await?;
    share(draft, place, g.cluster_bits, references).await?;
    for _ in 0..references {
        draft.drop_metadata(table, 1).await?;
    }
    Ok(Some(place))
}

fn is_zero(entry: L2Entry) -> bool {
    !entry.is_compressed() && entry.bitmap >> 32 != 0
}

/// What an entry becomes in a table with so many references; `None`: nothing is there.
async fn expand(
    image: &Image,
    io: Io<'_>,
    draft: &mut Draft<'_>,
    entry: L2Entry,
    references: u64,
) -> Result<Option<L2Entry>, Failure> {
    let g = image.geometry;
    if let Some(host) = entry.host(g) {
        let start = host.0 >> g.cluster_bits;
        if image.count(io, start).await? == references {
            // Nobody else has it.
            zero(image, io, host).await?;
            return Ok(Some(entry.with_data(0, 1)));
        }
        for _ in 0..references {
            draft.change(Run { start, count: 1 }, Change::Less).await?;
        }
    }
    let has_backing = image.header().backing.is_some() || io.has_child(BACKING);
    if !has_backing {
        return Ok(None);
    }
    let host = draft.allocate_data().await?;
    zero(image, io, host).await?;
    share(draft, host, g.cluster_bits, references).await?;
    let mut entry = L2Entry::data(host, g);
    if references > 1 {
        entry.word &= !COPIED;
    }
    Ok(Some(entry))
}

/// Counts a new cluster for all who refer to it: once, it is counted.
async fn share(
    draft: &mut Draft<'_>,
    place: HostOffset,
    cluster_bits: u32,
    references: u64,
) -> Result<(), Failure> {
    if references > 1 {
        draft.settle().await?;
    }
    let start = place.0 >> cluster_bits;
    for _ in 1..references {
        draft.change(Run { start, count: 1 }, Change::More).await?;
    }
    Ok(())
}

async fn zero(image: &Image, io: Io<'_>, host: HostOffset) -> Result<(), Failure> {
    let bytes = image.geometry.cluster_bytes();
    if image.metadata.overlaps(host, bytes) {
        let message = format!(
            "an entry that reads as zeroes has its place at offset {:#x}, where there is metadata",
            host.0
        );
        let corrupt = image.corrupt(io, message, (host, bytes), true);
        return Err(corrupt.await.into());
    }
    let flags = ZeroFlags::empty();
    io.child(FILE).write_zeroes(host.0, bytes, flags).await?;
    Ok(())
}
