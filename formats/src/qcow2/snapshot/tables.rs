//! What L1 tables refer to: counting it, and the flags of the disk's own tables.

use blockcore::io::Io;
use blockcore::{Error, ErrorKind};

use super::super::image::{Image, read_bytes, write_bytes};
use super::super::layout::bytes::{from_words, words};
use super::super::layout::entry::{COPIED, L1Entry, L2Entry};
use super::super::layout::{Geometry, HostOffset};
use super::super::refcount::Run;
use super::Failure;
use super::draft::{Change, Draft};

/// Whether what the disk's L1 table refers to is counted for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TableReferences {
    /// The L2 tables have been the disk's.
    There,
    /// They are somebody else's, and the disk's from now on, too.
    ToBeMade,
}

impl Image {
    /// Changes the counts of all that is mapped by L2 tables; not those of the tables.
    pub(super) async fn count_data(
        &self,
        io: Io<'_>,
        draft: &mut Draft<'_>,
        l1: &[L1Entry],
        change: Change,
    ) -> Result<(), Failure> {
        for table in l1.iter().filter_map(|entry| entry.table()) {
            let words = self.table_words(io, table).await?;
            for run in runs(&words, self.geometry)? {
                draft.change(run, change).await?;
            }
        }
        Ok(())
    }

    /// Takes back the references that an L1 table has to L2 tables.
    pub(super) async fn drop_tables(
        &self,
        draft: &mut Draft<'_>,
        l1: &[L1Entry],
    ) -> Result<(), Failure> {
        for table in l1.iter().filter_map(|entry| entry.table()) {
            draft.drop_metadata(table, 1).await?;
        }
        Ok(())
    }

    /// The disk's L1 table with the L2 tables of `l1`, as counts in the draft have it: each entry says whether
    /// it is the only one. Where that makes an L2 table different there is a new one. All other counts have
    /// been changed.
    pub(super) async fn rewrite(
        &self,
        io: Io<'_>,
        draft: &mut Draft<'_>,
        l1: &[L1Entry],
        references: TableReferences,
    ) -> Result<Vec<L1Entry>, Failure> {
        let g = self.geometry;
        let mut tables = Vec::with_capacity(l1.len());
        draft.settle().await?;
        for entry in l1 {
            let Some(table) = entry.table() else {
                tables.push(None);
                continue;
            };
            let old = self.table_words(io, table).await?;
            let new = flagged(draft, &old, g).await?;
            let is_other = new != old;
            tables.push(Some(match is_other {
                true => {
                    let place = draft.allocate(1).await?;
                    write_bytes(io, place, &from_words(&new)).await?;
                    place
                }
                false => table,
            }));
            match (references, is_other) {
                (TableReferences::There, true) => draft.drop_metadata(table, 1).await?,
                (TableReferences::ToBeMade, false) => {
                    let start = table.0 >> g.cluster_bits;
                    draft.change(Run { start, count: 1 }, Change::More).await?;
                }
                _ => {}
            }
        }
        draft.settle().await?;
        let mut entries = Vec::with_capacity(tables.len());
        for table in tables {
            entries.push(match table {
                None => L1Entry::default(),
                Some(table) => match draft.count(table.0 >> g.cluster_bits).await? {
                    1 => L1Entry::new(table),
                    _ => L1Entry(table.0),
                },
            });
        }
        Ok(entries)
    }

    /// The words of an L2 table.
    pub(in super::super) async fn table_words(
        &self,
        io: Io<'_>,
        table: HostOffset,
    ) -> Result<Vec<u64>, Failure> {
        let cluster = self.geometry.cluster_bytes();
        if !self.geometry.is_aligned(table.0) || !self.metadata.reaches(table) {
            let text = format!(
                "an L1 entry points to an L2 table at offset {:#x}, where none can be",
                table.0
            );
            return Err(Error::new(ErrorKind::Corrupt, text).into());
        }
        let bytes = read_bytes(io, table, cluster).await?;
        Ok(words(&bytes).collect())
    }
}

/// The entries of a table, each with the index of its first word.
pub(in super::super) fn entries(
    words: &[u64],
    g: Geometry,
) -> impl Iterator<Item = (usize, Result<L2Entry, Error>)> + use<'_> {
    let size = g.entry_words();
    words.chunks(size).enumerate().map(move |(index, words)| {
        let second = words.get(1).copied().unwrap_or(0);
        let entry = L2Entry::from_words(words[0], second, g);
        (index * size, entry.check(g).map(|()| entry))
    })
}

/// The clusters that a table refers to, once for each reference; those side by side together.
fn runs(words: &[u64], g: Geometry) -> Result<Vec<Run>, Failure> {
    let mut runs: Vec<Run> = Vec::new();
    for (_, entry) in entries(words, g) {
        let entry = entry?;
        let run = if let Some(extent) = entry.compressed_extent(g) {
            let start = extent.host.0 >> g.cluster_bits;
            let end = g.clusters(extent.host.0 + extent.bytes);
            let count = end - start;
            Run { start, count }
        } else if let Some(host) = entry.host(g) {
            let start = host.0 >> g.cluster_bits;
            Run { start, count: 1 }
        } else {
            continue;
        };
        match runs.last_mut() {
            Some(last) if last.start + last.count == run.start => last.count += run.count,
            _ => runs.push(run),
        }
    }
    Ok(runs)
}

/// The words of a table with the flags that the counts in the draft ask for.
async fn flagged(draft: &mut Draft<'_>, old: &[u64], g: Geometry) -> Result<Vec<u64>, Failure> {
    let mut new = old.to_vec();
    for (index, entry) in entries(old, g) {
        let Some(host) = entry?.host(g) else {
            continue;
        };
        new[index] &= !COPIED;
        if draft.count(host.0 >> g.cluster_bits).await? == 1 {
            new[index] |= COPIED;
        }
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_table_refers_to_is_counted_once_for_each_reference() {
        let g = Geometry {
            cluster_bits: 9,
            refcount_order: 4,
            extended: false,
            zero_flag: true,
            data_file: false,
        };
        // Two plain ones side by side, one that reads as zeroes and keeps its place, nothing, and two that are
        // compressed, of which the second reaches into another cluster.
        let compressed = |host: u64, bytes| L2Entry::compressed(HostOffset(host), bytes, g).word;
        let table = [
            COPIED | 0x400,
            0x600,
            COPIED | 0xa01,
            0,
            1,
            compressed(0x1000, 100),
            compressed(0x1064, 500),
        ];
        let runs = runs(&table, g).unwrap_or_else(|_| panic!("it makes sense"));
        let expected = [(2, 2), (5, 1), (8, 1), (8, 2)].map(|(start, count)| Run { start, count });
        assert_eq!(runs, expected);
    }
}
