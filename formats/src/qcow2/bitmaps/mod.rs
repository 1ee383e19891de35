//! Persistent dirty bitmaps: those that an image keeps while nobody has it open.
//!
//! | what | where |
//! |---|---|
//! | reading them when an image is opened | [`load`] |
//! | storing and removing them | `store` |
//! | letting the header name another directory (pure) | [`switch`] |
//!
//! The bits in memory are the node's ([`blockcore::dirty_bitmap`]); what this has of a bitmap is its entry in
//! the image's directory.
//!
//! **Never does a bitmap look valid that misses a write.** An entry has a flag for "in use", which says that
//! the bitmap means nothing. All entries have it, durably, before the first byte changes that a guest can
//! read, and before an operator changes what a bitmap says ([`Image::use_bitmaps`]). Until then writes do not
//! pass the [gate](super::gate); so an image that is opened for writing, and not written to, keeps its bitmaps
//! whatever happens. The flags are set in place: if the power goes meanwhile some have it and some have not,
//! and all of these say the truth, since nothing has been written yet.
//!
//! The flag is cleared only by storing all of a bitmap, while the node is drained. Tables, bits and a
//! directory are written to new clusters. A round of the committer makes them durable, the counts of their
//! clusters, and whatever guests have written. Then the header names the new directory ([`switch`]). Before
//! that write the image has the old directory, which says "in use"; after it the bitmaps that were stored. The
//! old clusters are let go of last. A kill leaves the same as a power cut, since nothing of this is in the
//! crash segment but counts.
//!
//! Once they are stored the image may be written to again, as when a reopen is given up: the first write says
//! "in use" again.
//!
//! Bitmaps with extra data that we do not know and must not ignore are left as they are. If one of these is to
//! track writes it is in use from the first write on, and for good: we cannot keep it up to date.
//!
//! Memory: an image's bitmaps take at most [`MAX_BITS_BYTES`], if every bit is set; others are refused.
//!
//! Threads: [`Image::use_bitmaps`] any worker; all else the control thread, with the node drained.

pub(super) mod load;
mod store;
mod switch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use blockcore::dirty_bitmap::KeptBitmap;
use blockcore::fault::{self, Fault};
use blockcore::io::Io;
use blockcore::io::tracked::Tracker;
use blockcore::{Error, ErrorKind, IoError};

use super::image::{Image, write_bytes};
use super::layout::HostOffset;
use super::layout::bitmap::{Bitmap, MAX_BITMAP_BYTES, MAX_TABLE_ENTRIES};
use super::layout::extension::MAX_DIRECTORY_BYTES;
use super::layout::header::MAX_BITMAPS;

/// Most memory for the bits of all bitmaps of an image.
const MAX_BITS_BYTES: u64 = 1 << 30;
/// What a bitmap without a bit takes, in bits for each byte of that: its table of parts.
const BITS_PER_TABLE_BYTE: u64 = 1 << 14;

/// The bitmaps that an image keeps.
#[derive(Default)]
pub(super) struct Bitmaps {
    list: Mutex<Vec<Entry>>,
    /// What the guest's bytes are may change: no entry claims to be up to date.
    in_use: AtomicBool,
    /// For whoever sets the flags.
    marking: Tracker,
}

/// A bitmap's entry in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) bitmap: Bitmap,
    pub(super) belief: Belief,
}

/// What is believed of a bitmap in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Belief {
    /// What it says, when it was read or stored: the node has it since then.
    Valid,
    /// That it means nothing: it was in use when the image was opened.
    Nothing,
    /// We do not know all about it, and leave it alone.
    Unknown,
}

impl Entry {
    fn is_in_use(&self) -> bool {
        self.bitmap.flags & Bitmap::IN_USE != 0
    }

    /// It would be wrong once something is written.
    fn must_be_in_use(&self) -> bool {
        self.belief != Belief::Unknown || self.bitmap.flags & Bitmap::AUTO != 0
    }
}

impl Bitmaps {
    pub(super) fn new(list: Vec<Entry>) -> Self {
        let bitmaps = Self::default();
        bitmaps.replace(list);
        bitmaps
    }

    fn list(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.list.lock().expect("no panic while looking")
    }

    fn replace(&self, list: Vec<Entry>) {
        let is_up_to_date = |entry: &Entry| entry.must_be_in_use() && !entry.is_in_use();
        let in_use = !list.iter().any(is_up_to_date);
        *self.list() = list;
        self.in_use.store(in_use, Ordering::SeqCst);
    }

    /// Whether no entry claims to be up to date.
    pub(super) fn are_in_use(&self) -> bool {
        self.in_use.load(Ordering::SeqCst)
    }

    /// What `qemu-img info` says of them, as a list in JSON; `None` if there are none.
    pub(super) fn describe(&self) -> Option<String> {
        let list = self.list();
        let described = list.iter().map(|Entry { bitmap, .. }| {
            let known = [(Bitmap::IN_USE, "in-use"), (Bitmap::AUTO, "auto")];
            let set = known.iter().filter(|(flag, _)| bitmap.flags & flag != 0);
            let flags: Vec<_> = set.map(|(_, name)| format!("\"{name}\"")).collect();
            format!(
                "{{\"flags\": [{}], \"name\": {}, \"granularity\": {}}}",
                flags.join(", "),
                json_text(&bitmap.name),
                1_u64 << bitmap.granularity_bits
            )
        });
        let described: Vec<_> = described.collect();
        (!described.is_empty()).then(|| format!("[{}]", described.join(", ")))
    }

    /// Whether the disk may get another length: a bitmap of which nothing is known would keep its own, and
    /// one that means nothing is not changed.
    fn can_be_resized(&self) -> bool {
        let list = self.list();
        list.iter().all(|entry| entry.belief == Belief::Valid)
    }
}

/// A text as JSON has it.
fn json_text(text: &str) -> String {
    let mut json = String::from("\"");
    for letter in text.chars() {
        match letter {
            '"' | '\\' => json.extend(['\\', letter]),
            letter if u32::from(letter) < 0x20 => {
                json.push_str(&format!("\\u{:04x}", u32::from(letter)));
            }
            letter => json.push(letter),
        }
    }
    json + "\""
}

/// Memory that a bitmap takes at most.
fn bits_bytes(disk_bytes: u64, granularity_bits: u8, has_bits: bool) -> u64 {
    let bits = disk_bytes.div_ceil(1 << granularity_bits);
    bits / BITS_PER_TABLE_BYTE + if has_bits { bits / 8 } else { 0 }
}

impl Image {
    /// From the return on every bitmap that is going to be out of date says so in the image.
    ///
    /// # Errors
    ///
    /// What could not be written: nothing may be changed.
    pub(super) async fn use_bitmaps(&self, io: Io<'_>) -> Result<(), IoError> {
        if self.bitmaps.are_in_use() {
            return Ok(());
        }
        let _turn = self.bitmaps.marking.begin(0, 1, true).await;
        if self.bitmaps.are_in_use() {
            return Ok(());
        }
        self.check_whole()?;
        let place = self.header().extensions.bitmaps.map(|there| there.offset);
        let place = HostOffset(place.expect("bitmaps have a directory"));
        let mut list = self.bitmaps.list().clone();
        for entry in list.iter_mut().filter(|entry| entry.must_be_in_use()) {
            entry.bitmap.flags |= Bitmap::IN_USE;
        }
        if !fault::is_planted(Fault::BitmapsNotInUse) {
            // The same bytes but for flags, which never cross a sector.
            write_bytes(io, place, &directory(&list)).await?;
            self.flush_file(io).await?;
        }
        self.bitmaps.replace(list);
        self.allow_plain_writes();
        Ok(())
    }

    /// As [`use_bitmaps`](Self::use_bitmaps), for another length of the disk.
    ///
    /// # Errors
    ///
    /// Also [`IoError::Unsupported`] if there are bitmaps that would not get that length.
    pub(super) async fn resize_bitmaps(&self, io: Io<'_>) -> Result<(), IoError> {
        if !self.bitmaps.can_be_resized() {
            return Err(IoError::Unsupported);
        }
        self.use_bitmaps(io).await
    }

    /// See [`Driver::check_new_bitmap`](blockcore::driver::Driver::check_new_bitmap).
    pub(super) fn check_new_bitmap(
        &self,
        kept: &[KeptBitmap],
        new: &KeptBitmap,
    ) -> Result<(), Error> {
        if self.header().version < 3 {
            return Err(Error::unsupported(
                "images of version 2 keep no bitmaps; 'qemu-img amend -o compat=1.1' makes it version 3",
            ));
        }
        let full = |what: String| Err(Error::new(ErrorKind::NoSpace, what));
        let mut entries = self.bitmaps.list().clone();
        for bitmap in kept.iter().chain([new]) {
            let is_there = |entry: &Entry| entry.bitmap.name == bitmap.name;
            if !entries.iter().any(is_there) {
                entries.push(new_entry(bitmap));
            }
        }
        if entries.len() > MAX_BITMAPS as usize {
            return full(format!("there are {MAX_BITMAPS} bitmaps already"));
        }
        let bytes: u64 = entries.iter().map(|entry| entry.bitmap.entry_bytes()).sum();
        if bytes > MAX_DIRECTORY_BYTES {
            return full(format!(
                "the directory of bitmaps would have more than {MAX_DIRECTORY_BYTES} bytes"
            ));
        }
        let (length, shift) = (new.bits.length(), granularity_bits(new));
        let table = u64::from(MAX_TABLE_ENTRIES) << self.geometry.cluster_bits;
        if length.div_ceil(1 << shift) > MAX_BITMAP_BYTES.min(table) {
            return Err(Error::invalid(
                "it would take too much space; use a larger granularity",
            ));
        }
        let memory = |entry: &Entry| bits_bytes(length, entry.bitmap.granularity_bits, true);
        if entries.iter().map(memory).sum::<u64>() > MAX_BITS_BYTES {
            return full(format!(
                "the bitmaps of the image would take more than {MAX_BITS_BYTES} bytes"
            ));
        }
        Ok(())
    }
}

fn granularity_bits(bitmap: &KeptBitmap) -> u8 {
    bitmap.bits.granularity_bytes().trailing_zeros() as u8
}

/// The entry of a bitmap that is not stored yet.
fn new_entry(bitmap: &KeptBitmap) -> Entry {
    Entry {
        bitmap: Bitmap {
            table_offset: 0,
            table_entries: 0,
            flags: 0,
            granularity_bits: granularity_bits(bitmap),
            name: bitmap.name.clone(),
            extra: Vec::new(),
        },
        belief: Belief::Valid,
    }
}

/// The bytes of a directory.
fn directory(entries: &[Entry]) -> Vec<u8> {
    let bitmaps: Vec<_> = entries.iter().map(|entry| entry.bitmap.clone()).collect();
    Bitmap::serialise_directory(&bitmaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, flags: u32, belief: Belief) -> Entry {
        let bitmap = Bitmap {
            table_offset: 0x1_0000,
            table_entries: 1,
            flags,
            granularity_bits: 16,
            name: name.into(),
            extra: Vec::new(),
        };
        Entry { bitmap, belief }
    }

    #[test]
    fn writes_wait_until_no_bitmap_claims_to_be_up_to_date() {
        let are_in_use = |list: &[Entry]| Bitmaps::new(list.to_vec()).are_in_use();
        assert!(are_in_use(&[]));
        assert!(are_in_use(&[entry("a", Bitmap::IN_USE, Belief::Nothing)]));
        assert!(!are_in_use(&[entry("a", 0, Belief::Valid)]));
        assert!(!are_in_use(&[entry("a", Bitmap::AUTO, Belief::Unknown)]));
        // Nobody claims that this one follows writes.
        assert!(are_in_use(&[entry("a", 0, Belief::Unknown)]));
    }

    #[test]
    fn bitmaps_are_described_as_json() {
        let list = vec![
            entry("a \"b\"\n", Bitmap::IN_USE | Bitmap::AUTO, Belief::Nothing),
            entry("c", 0, Belief::Valid),
        ];
        assert_eq!(Bitmaps::new(Vec::new()).describe(), None);
        assert_eq!(
            Bitmaps::new(list).describe().unwrap(),
            "[{\"flags\": [\"in-use\", \"auto\"], \"name\": \"a \\\"b\\\"\\u000a\", \"granularity\": 65536}, \
             {\"flags\": [], \"name\": \"c\", \"granularity\": 65536}]"
        );
    }
}
