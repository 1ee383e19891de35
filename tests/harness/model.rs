//! The model disk: what each sector may hold, given what was sent to a disk and what it answered.
//!
//! While a write is in flight a sector may hold the old content or the new one, and writes in
//! flight together may land in either order. So the model keeps, per sector, every content that
//! is still possible, and a read is right if each sector it returned was possible at some moment
//! while the read was in flight.
//!
//! Contents are not stored: each write has a number, its *stamp*, and a sector's bytes follow from
//! the stamp and the sector's address. A sector that was moved, torn or never written shows.
//!
//! Not here: what survives a power cut.

use std::collections::HashMap;
use std::ops::Range;

use crate::random::mix;

/// The model's grain, and the unit of virtio-blk's addresses.
pub const SECTOR_BYTES: usize = 512;

/// The number of a write. Sectors that were zeroed, and those of a new disk, have [`ZEROES`].
pub type Stamp = u64;

/// The stamp of sectors that read as zeroes.
pub const ZEROES: Stamp = 0;

/// A request that [`ModelDisk`] was told of and that has not ended.
#[derive(Debug, PartialEq, Eq, Hash, Clone, Copy)]
pub struct Ticket(u64);

/// What a request does to the sectors it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// They hold the content of this stamp. Zeroing them is writing [`ZEROES`].
    Write(Stamp),
    /// They hold what they held, or zeroes.
    Discard,
}

/// A disk that remembers what it may contain.
#[derive(Debug)]
pub struct ModelDisk {
    sectors: Vec<Vec<Content>>,
    changes: HashMap<Ticket, (Range<usize>, Change)>,
    reads: HashMap<Ticket, Reading>,
    /// Counts beginnings and ends, so that they can be put in order.
    clock: u64,
}

/// A content that a sector may have.
#[derive(Debug, Clone, Copy)]
struct Content {
    stamp: Stamp,
    began: u64,
    /// `None` while the write is in flight.
    ended: Option<u64>,
}

#[derive(Debug)]
struct Reading {
    sectors: Range<usize>,
    /// Per sector, what the read may return: it grows with each write that begins meanwhile.
    possible: Vec<Vec<Stamp>>,
}

impl ModelDisk {
    /// A disk of `sectors` sectors, all zeroes.
    pub fn new(sectors: usize) -> Self {
        let zeroes = Content {
            stamp: ZEROES,
            began: 0,
            ended: Some(0),
        };
        Self {
            sectors: vec![vec![zeroes]; sectors],
            changes: HashMap::new(),
            reads: HashMap::new(),
            clock: 0,
        }
    }

    /// The disk's size.
    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    /// A change of `sectors` is about to be sent.
    pub fn begin_change(&mut self, sectors: Range<usize>, change: Change) -> Ticket {
        let now = self.tick();
        let stamp = match change {
            Change::Write(stamp) => stamp,
            Change::Discard => ZEROES,
        };
        for contents in &mut self.sectors[sectors.clone()] {
            contents.push(Content {
                stamp,
                began: now,
                ended: None,
            });
        }
        for reading in self.reads.values_mut() {
            let start = reading.sectors.start.max(sectors.start);
            let end = reading.sectors.end.min(sectors.end);
            for sector in start..end {
                let possible = &mut reading.possible[sector - reading.sectors.start];
                if !possible.contains(&stamp) {
                    possible.push(stamp);
                }
            }
        }
        let ticket = Ticket(now);
        self.changes.insert(ticket, (sectors, change));
        ticket
    }

    /// The change has been answered with success.
    ///
    /// # Panics
    ///
    /// If `ticket` is not that of a change in flight.
    pub fn end_change(&mut self, ticket: Ticket) {
        let (sectors, change) = self.changes.remove(&ticket).expect("a change in flight");
        let now = self.tick();
        let Ticket(began) = ticket;
        for contents in &mut self.sectors[sectors] {
            if let Change::Write(_) = change {
                // Whatever had ended before this one began has been overwritten. What was in
                // flight beside it may have landed before it or after it.
                contents.retain(|content| content.ended.is_none_or(|ended| ended > began));
            }
            for content in contents {
                if content.began == began {
                    content.ended = Some(now);
                }
            }
        }
    }

    /// A read of `sectors` is about to be sent.
    pub fn begin_read(&mut self, sectors: Range<usize>) -> Ticket {
        let ticket = Ticket(self.tick());
        let possible = self.sectors[sectors.clone()]
            .iter()
            .map(|contents| {
                let mut possible: Vec<Stamp> =
                    contents.iter().map(|content| content.stamp).collect();
                possible.dedup();
                possible
            })
            .collect();
        self.reads.insert(ticket, Reading { sectors, possible });
        ticket
    }

    /// The read has returned `data`.
    ///
    /// # Errors
    ///
    /// A sentence that names the first sector which holds what it cannot hold, and what it could.
    ///
    /// # Panics
    ///
    /// If `ticket` is not that of a read in flight, or `data` has another length than was asked
    /// for.
    pub fn end_read(&mut self, ticket: Ticket, data: &[u8]) -> Result<(), String> {
        let reading = self.reads.remove(&ticket).expect("a read in flight");
        assert_eq!(data.len(), reading.sectors.len() * SECTOR_BYTES);
        let sectors = reading.sectors.clone().zip(&reading.possible);
        for ((sector, possible), bytes) in sectors.zip(data.chunks_exact(SECTOR_BYTES)) {
            if let Some(word) = impossible_word(possible, sector, bytes) {
                return Err(format!(
                    "sector {sector} (offset {:#x}) holds {:02x?} at {:#x}, but could hold only {}",
                    sector * SECTOR_BYTES,
                    &bytes[word * 8..][..8],
                    word * 8,
                    possible
                        .iter()
                        .map(|&stamp| describe(stamp, sector, word))
                        .collect::<Vec<_>>()
                        .join(" or ")
                ));
            }
        }
        Ok(())
    }

    /// Checks `data`, the whole disk, while nothing is in flight.
    ///
    /// # Errors
    ///
    /// As [`end_read`](Self::end_read).
    pub fn check(&mut self, data: &[u8]) -> Result<(), String> {
        let all = self.begin_read(0..self.sectors());
        self.end_read(all, data)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

/// Fills `data` with what a write of `stamp` puts to `first_sector` and those that follow.
pub fn fill(data: &mut [u8], stamp: Stamp, first_sector: usize) {
    for (index, sector) in data.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        for (word, bytes) in sector.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&content(stamp, first_sector + index, word).to_ne_bytes());
        }
    }
}

/// The first word of `bytes`, read from `sector`, that no write in `possible` puts there.
fn impossible_word(possible: &[Stamp], sector: usize, bytes: &[u8]) -> Option<usize> {
    bytes.chunks_exact(8).enumerate().position(|(word, bytes)| {
        !possible
            .iter()
            .any(|&stamp| bytes == content(stamp, sector, word).to_ne_bytes())
    })
}

/// One of a sector's 64 words.
fn content(stamp: Stamp, sector: usize, word: usize) -> u64 {
    if stamp == ZEROES {
        return 0;
    }
    mix(mix(stamp) ^ ((sector as u64) << 6 | word as u64))
}

fn describe(stamp: Stamp, sector: usize, word: usize) -> String {
    if stamp == ZEROES {
        return "zeroes".to_owned();
    }
    let bytes = content(stamp, sector, word).to_ne_bytes();
    format!("write {stamp} ({bytes:02x?})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(stamp: Stamp, sector: usize) -> Vec<u8> {
        let mut data = vec![0; SECTOR_BYTES];
        fill(&mut data, stamp, sector);
        data
    }

    /// What a read of sector 1, begun and ended now, may return out of `stamps`.
    fn possible(disk: &mut ModelDisk, stamps: &[Stamp]) -> Vec<Stamp> {
        let holds = |stamp: &&Stamp| {
            let read = disk.begin_read(1..2);
            disk.end_read(read, &sector(**stamp, 1)).is_ok()
        };
        stamps.iter().filter(holds).copied().collect()
    }

    #[test]
    fn a_write_in_flight_may_or_may_not_be_seen_and_once_done_must_be() {
        let mut disk = ModelDisk::new(4);
        let write = disk.begin_change(1..3, Change::Write(5));
        assert_eq!(possible(&mut disk, &[0, 5, 6]), [0, 5]);
        disk.end_change(write);
        assert_eq!(possible(&mut disk, &[0, 5, 6]), [5]);
    }

    #[test]
    fn writes_in_flight_together_may_land_in_either_order() {
        let mut disk = ModelDisk::new(4);
        let first = disk.begin_change(1..2, Change::Write(5));
        let second = disk.begin_change(1..2, Change::Write(6));
        disk.end_change(second);
        assert_eq!(possible(&mut disk, &[0, 5, 6]), [5, 6]);
        disk.end_change(first);
        assert_eq!(possible(&mut disk, &[0, 5, 6]), [5, 6]);
        let third = disk.begin_change(1..2, Change::Write(7));
        disk.end_change(third);
        assert_eq!(possible(&mut disk, &[0, 5, 6, 7]), [7]);
    }

    #[test]
    fn a_read_may_return_what_was_overwritten_while_it_was_in_flight() {
        let mut disk = ModelDisk::new(4);
        for stamp in [0, 5, 6] {
            let mut disk = ModelDisk::new(4);
            let read = disk.begin_read(1..2);
            for stamp in [5, 6] {
                let write = disk.begin_change(1..2, Change::Write(stamp));
                disk.end_change(write);
            }
            disk.end_read(read, &sector(stamp, 1)).unwrap();
        }
        let read = disk.begin_read(1..2);
        disk.end_read(read, &sector(5, 1)).unwrap_err();
    }

    #[test]
    fn a_sector_read_while_it_is_written_may_be_half_old_and_half_new() {
        let mut disk = ModelDisk::new(4);
        let mut mixture = sector(5, 1);
        mixture[..SECTOR_BYTES / 2].fill(0);
        let read = disk.begin_read(1..2);
        let write = disk.begin_change(1..2, Change::Write(5));
        disk.end_change(write);
        disk.end_read(read, &mixture).unwrap();
        let read = disk.begin_read(1..2);
        disk.end_read(read, &mixture).unwrap_err();
    }

    #[test]
    fn a_discarded_sector_holds_its_old_content_or_zeroes() {
        let mut disk = ModelDisk::new(4);
        let write = disk.begin_change(1..2, Change::Write(5));
        disk.end_change(write);
        let discard = disk.begin_change(0..4, Change::Discard);
        disk.end_change(discard);
        assert_eq!(possible(&mut disk, &[0, 5, 6]), [0, 5]);
        let zero = disk.begin_change(0..4, Change::Write(ZEROES));
        disk.end_change(zero);
        assert_eq!(possible(&mut disk, &[0, 5, 6]), [0]);
    }

    #[test]
    fn content_in_the_wrong_place_is_noticed_and_named() {
        let mut disk = ModelDisk::new(4);
        let write = disk.begin_change(0..2, Change::Write(5));
        disk.end_change(write);
        let read = disk.begin_read(0..2);
        let mut data = sector(5, 0);
        data.extend(sector(5, 0));
        let error = disk.end_read(read, &data).unwrap_err();
        assert!(error.starts_with("sector 1 (offset 0x200)"), "{error}");
        assert!(error.contains("only write 5"), "{error}");
    }
}
