//! Storing bitmaps in the image, and removing them. In which order, and why, is told in the module above.

use blockcore::dirty_bitmap::{Bits, KeptBitmap};
use blockcore::fault::{self, Fault};
use blockcore::io::Io;
use blockcore::{Error, ErrorKind, IoError};

use super::{Entry, directory, new_entry, switch};
use crate::qcow2::alloc::Class;
use crate::qcow2::image::{FILE, Image, read_bytes, write_bytes};
use crate::qcow2::layout::HostOffset;
use crate::qcow2::layout::bitmap::{Bitmap, BitmapCluster};
use crate::qcow2::layout::bytes::{from_words, words};
use crate::qcow2::layout::extension::{BitmapDirectory, MAX_DIRECTORY_BYTES};
use crate::qcow2::layout::header::{Features, MAX_BITMAPS};
use crate::qcow2::layout::room::Step;

/// Clusters side by side: where, and how many.
type Place = (HostOffset, u64);

/// Why bitmaps could not be stored.
enum Failure {
    Io(IoError),
    /// The header has no room for them.
    NoRoom,
}

impl From<IoError> for Failure {
    fn from(error: IoError) -> Self {
        Self::Io(error)
    }
}

impl Image {
    /// See [`Driver::store_bitmaps`](blockcore::driver::Driver::store_bitmaps).
    pub(in crate::qcow2) async fn store_bitmaps(
        &self,
        io: Io<'_>,
        kept: Vec<KeptBitmap>,
    ) -> Result<(), Error> {
        let bytes = self.bytes();
        if let Some(other) = kept.iter().find(|bitmap| bitmap.bits.length() != bytes) {
            let text = format!(
                "cannot store bitmaps in the image of node '{}': bitmap '{}' is over {} bytes, and the disk has \
                 {bytes}",
                io.name(),
                other.name,
                other.bits.length()
            );
            return Err(Error::invalid(text));
        }
        let before = self.bitmaps.list().clone();
        let is_stored = |bitmap: &KeptBitmap| {
            let mut entries = before.iter();
            bitmap.inconsistent
                || entries.any(|entry| entry.bitmap.name == bitmap.name && !entry.is_in_use())
        };
        if kept.iter().all(is_stored) {
            // What the image keeps of them was not touched.
            return Ok(());
        }
        let stored = self.try_store(io, before, kept).await;
        stored.map_err(|failure| self.cannot(io, "store bitmaps in", failure))
    }

    /// See [`Driver::remove_bitmap`](blockcore::driver::Driver::remove_bitmap).
    pub(in crate::qcow2) async fn remove_bitmap(
        &self,
        io: Io<'_>,
        name: &str,
    ) -> Result<(), Error> {
        let mut list = self.bitmaps.list().clone();
        let Some(index) = list.iter().position(|entry| entry.bitmap.name == name) else {
            return Ok(());
        };
        let gone = list.remove(index);
        let removed = self.try_remove(io, list, &gone.bitmap).await;
        let what = format!("remove bitmap '{name}' from");
        removed.map_err(|failure| self.cannot(io, &what, failure))
    }

    async fn try_store(
        &self,
        io: Io<'_>,
        before: Vec<Entry>,
        kept: Vec<KeptBitmap>,
    ) -> Result<(), Failure> {
        self.check_whole()?;
        let (mut next, mut old, mut new) = (before, Vec::new(), Vec::new());
        let written = self.write_all(io, &kept, &mut next, &mut old, &mut new);
        let written = written.await;
        self.become_current(io, written.map(|()| next), old, new)
            .await
    }

    async fn try_remove(&self, io: Io<'_>, next: Vec<Entry>, gone: &Bitmap) -> Result<(), Failure> {
        self.check_whole()?;
        let old = self.places(io, gone).await;
        self.become_current(io, Ok(next), old, Vec::new()).await
    }

    /// Writes every bitmap that is valid to new clusters, and notes the old ones.
    async fn write_all(
        &self,
        io: Io<'_>,
        kept: &[KeptBitmap],
        next: &mut Vec<Entry>,
        old: &mut Vec<Place>,
        new: &mut Vec<Place>,
    ) -> Result<(), Failure> {
        for bitmap in kept.iter().filter(|bitmap| !bitmap.inconsistent) {
            let found = next
                .iter()
                .position(|entry| entry.bitmap.name == bitmap.name);
            if found.is_some_and(|index| !next[index].is_in_use()) {
                // Nothing has changed it.
                continue;
            }
            let index = found.unwrap_or_else(|| {
                next.push(new_entry(bitmap));
                next.len() - 1
            });
            if found.is_some() {
                old.extend(self.places(io, &next[index].bitmap).await);
            }
            let (table, entries) = self.write_bitmap(io, &bitmap.bits, new).await?;
            let entry = &mut next[index].bitmap;
            entry.table_offset = table.0;
            entry.table_entries = entries;
            entry.flags &= Bitmap::EXTRA_COMPATIBLE;
            if bitmap.enabled {
                entry.flags |= Bitmap::AUTO;
            }
        }
        Ok(())
    }

    /// Writes a bitmap's bits and its table to new clusters; gives where the table is, and its entries.
    async fn write_bitmap(
        &self,
        io: Io<'_>,
        bits: &Bits,
        new: &mut Vec<Place>,
    ) -> Result<(HostOffset, u32), IoError> {
        let g = self.geometry;
        let covers = bits.serialised_coverage(g.cluster_bytes());
        let entries = bits.length().div_ceil(covers).max(1);
        let mut table = Vec::new();
        for index in 0..entries {
            let begin = index * covers;
            let part = covers.min(bits.length() - begin);
            let cluster = if bits.is_clean(begin, part) {
                BitmapCluster::Zeroes
            } else if bits.next_clean(begin, part).is_none() {
                BitmapCluster::Ones
            } else {
                let taken = self.allocate(io, Class::Metadata, 1).await?;
                let host = HostOffset(taken.start << g.cluster_bits);
                self.note(host, 1, new);
                let mut data = vec![0; g.cluster_bytes() as usize];
                let used = bits.serialised_bytes(begin, part) as usize;
                bits.serialise(begin, part, &mut data[..used]);
                write_bytes(io, host, &data).await?;
                BitmapCluster::Data(host.0)
            };
            table.push(cluster.serialise());
        }
        let place = self.write_metadata(io, &from_words(&table), new).await?;
        Ok((place, entries as u32))
    }

    /// Writes metadata to new clusters side by side, with zeroes up to their end.
    async fn write_metadata(
        &self,
        io: Io<'_>,
        bytes: &[u8],
        new: &mut Vec<Place>,
    ) -> Result<HostOffset, IoError> {
        let g = self.geometry;
        let clusters = g.clusters(bytes.len() as u64);
        let place = self.allocate_side_by_side(io, clusters).await?;
        self.note(place, clusters, new);
        let mut padded = bytes.to_vec();
        padded.resize((clusters << g.cluster_bits) as usize, 0);
        write_bytes(io, place, &padded).await?;
        Ok(place)
    }

    /// Clusters are metadata from now on.
    fn note(&self, host: HostOffset, clusters: u64, new: &mut Vec<Place>) {
        self.metadata
            .add(host, clusters << self.geometry.cluster_bits);
        new.push((host, clusters));
    }

    /// Lets the header name a directory of `next`, if that could be written, and gives back what nobody
    /// refers to then: the `old` clusters, or, after a failure, the `new` ones.
    async fn become_current(
        &self,
        io: Io<'_>,
        next: Result<Vec<Entry>, Failure>,
        mut old: Vec<Place>,
        mut new: Vec<Place>,
    ) -> Result<(), Failure> {
        let written = match next {
            Ok(next) => {
                let written = self.write_directory(io, &next, &mut new).await;
                written.map(|(directory, steps)| (next, directory, steps))
            }
            Err(failure) => Err(failure),
        };
        let (next, directory, steps) = match written {
            Ok(written) => written,
            Err(failure) => {
                self.let_all_go(io, new);
                return Err(failure);
            }
        };
        self.switch_header(io, &steps).await?;
        let before = {
            let mut header = self.header();
            match directory {
                Some(_) => header.features.autoclear |= Features::BITMAPS,
                None => header.features.autoclear &= !Features::BITMAPS,
            }
            std::mem::replace(&mut header.extensions.bitmaps, directory)
        };
        if let Some(before) = before {
            old.push((
                HostOffset(before.offset),
                self.geometry.clusters(before.bytes),
            ));
        }
        self.bitmaps.replace(next);
        // What is up to date now has to be looked at before the next write.
        self.allow_plain_writes();
        self.let_all_go(io, old);
        Ok(())
    }

    /// Writes a directory to new clusters, and makes everything durable that it rests on. Gives the steps
    /// that are left for the header.
    async fn write_directory(
        &self,
        io: Io<'_>,
        next: &[Entry],
        new: &mut Vec<Place>,
    ) -> Result<(Option<BitmapDirectory>, Vec<Step>), Failure> {
        let bytes = directory(next);
        if bytes.len() as u64 > MAX_DIRECTORY_BYTES || next.len() > MAX_BITMAPS as usize {
            return Err(IoError::NoSpace.into());
        }
        let directory = match next.is_empty() {
            true => None,
            false => Some(BitmapDirectory {
                bitmaps: next.len() as u32,
                offset: self.write_metadata(io, &bytes, new).await?.0,
                bytes: bytes.len() as u64,
            }),
        };
        if !fault::is_planted(Fault::BitmapsNamedEarly) {
            self.commit(io).await?;
        }
        let g = self.geometry;
        let length = g.cluster_bytes().min(io.child(FILE).bytes());
        let mut cluster = read_bytes(io, HostOffset(0), length).await?;
        cluster.resize(g.cluster_bytes() as usize, 0);
        let autoclear = self.header().features.autoclear;
        let steps = switch::steps(&cluster, autoclear, directory.as_ref());
        Ok((directory, steps.ok_or(Failure::NoRoom)?))
    }

    /// The clusters of a stored bitmap. Of one that cannot be read, what can be found: the others are
    /// leaked.
    async fn places(&self, io: Io<'_>, bitmap: &Bitmap) -> Vec<Place> {
        let g = self.geometry;
        let bytes = 8 * u64::from(bitmap.table_entries);
        let table = HostOffset(bitmap.table_offset);
        let mut places = vec![(table, g.clusters(bytes))];
        let Ok(entries) = read_bytes(io, table, bytes).await else {
            return places;
        };
        for entry in words(&entries) {
            if let Ok(BitmapCluster::Data(host)) = BitmapCluster::parse(entry, g) {
                places.push((HostOffset(host), 1));
            }
        }
        places
    }

    /// Nothing refers to these any more.
    fn let_all_go(&self, io: Io<'_>, places: Vec<Place>) {
        for (host, clusters) in places {
            self.let_go(io, host, clusters);
        }
    }

    fn cannot(&self, io: Io<'_>, what: &str, failure: Failure) -> Error {
        let (kind, why) = match failure {
            Failure::Io(IoError::NoSpace) => (ErrorKind::NoSpace, IoError::NoSpace.to_string()),
            Failure::Io(error) => (ErrorKind::Io, error.to_string()),
            Failure::NoRoom => (
                ErrorKind::NoSpace,
                "its header has no room for a bitmap directory".to_owned(),
            ),
        };
        let text = format!("cannot {what} the image of node '{}': {why}", io.name());
        Error::new(kind, text)
    }
}
