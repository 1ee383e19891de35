//! What a simulated file holds: its bytes, its length, and where it has space.
//!
//! Pure: a [`Change`] in, another state out. The page cache and the disk below it are two values of
//! [`Contents`] to which the same changes are applied at different times, or never.

use std::collections::BTreeMap;

use super::random::Random;

/// Unit of allocation; the block size of most file systems.
pub(super) const BLOCK_BYTES: u64 = 4096;
/// What a disk writes as a whole or not at all.
pub(super) const SECTOR_BYTES: u64 = 512;

/// The bytes of a file and where it has space for them.
#[derive(Clone, Default)]
pub(super) struct Contents {
    bytes: u64,
    /// By number of the block. One that is not there is a hole.
    blocks: BTreeMap<u64, Block>,
}

#[derive(Clone)]
enum Block {
    /// Has space, reads as zeroes, and is a hole to who asks for data.
    Unwritten,
    Data(Box<[u8; BLOCK_BYTES as usize]>),
}

/// One change to a file.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    /// The range reads as zeroes and keeps its space, or gives back the blocks that it covers whole.
    Zero {
        offset: u64,
        bytes: u64,
        keep_space: bool,
    },
    /// The range has space; what it reads does not change, nor does the length.
    Reserve {
        offset: u64,
        bytes: u64,
    },
    Length(u64),
}

impl Contents {
    /// Nothing but a hole of `bytes` bytes.
    pub(super) fn new(bytes: u64) -> Self {
        Self {
            bytes,
            blocks: BTreeMap::new(),
        }
    }

    /// The length.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many blocks have space.
    pub(super) fn allocated_blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// How many more blocks a write to the range would take.
    pub(super) fn missing_blocks(&self, offset: u64, bytes: u64) -> u64 {
        if bytes == 0 {
            return 0;
        }
        let (first, last) = (offset / BLOCK_BYTES, (offset + bytes - 1) / BLOCK_BYTES);
        last - first + 1 - self.blocks.range(first..=last).count() as u64
    }

    /// Fills `into` from `offset` on, with zeroes where there is nothing.
    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        for (block, skip, range) in pieces(offset, into.len() as u64) {
            let into = &mut into[range];
            match self.blocks.get(&block) {
                Some(Block::Data(data)) => into.copy_from_slice(&data[skip..skip + into.len()]),
                Some(Block::Unwritten) | None => into.fill(0),
            }
        }
    }

    /// The next range of blocks with data that ends after `offset`, within the length.
    pub(super) fn data_extent(&self, offset: u64) -> Option<(u64, u64)> {
        let mut data = self
            .blocks
            .range(offset / BLOCK_BYTES..)
            .filter(|(_, block)| matches!(block, Block::Data(_)))
            .map(|(number, _)| *number);
        let first = data.next()?;
        let mut end = first + 1;
        while data.next() == Some(end) {
            end += 1;
        }
        let begin = (first * BLOCK_BYTES).max(offset);
        (begin < self.bytes).then(|| (begin, (end * BLOCK_BYTES).min(self.bytes)))
    }

    /// Makes the whole change.
    pub(super) fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { offset, data } => self.write(*offset, data),
            Change::Zero {
                offset,
                bytes,
                keep_space,
            } => self.zero(*offset, *bytes, *keep_space),
            Change::Reserve { offset, bytes } => self.reserve(*offset, *bytes),
            Change::Length(bytes) => self.set_length(*bytes),
        }
    }

    /// Makes what a power cut leaves of the change: nothing, all of it, or some of its sectors.
    pub(super) fn apply_torn(&mut self, change: &Change, random: &mut Random) {
        match random.below(3) {
            0 => return,
            1 => return self.apply(change),
            _ => {}
        }
        match change {
            Change::Write { offset, data } => {
                for (begin, end) in sectors(*offset, data.len() as u64) {
                    if random.chance(500) {
                        let range = (begin - offset) as usize..(end - offset) as usize;
                        self.write(begin, &data[range]);
                    }
                }
            }
            Change::Zero { offset, bytes, .. } => {
                for (begin, end) in sectors(*offset, *bytes) {
                    if random.chance(500) {
                        self.zero(begin, end - begin, true);
                    }
                }
            }
            Change::Reserve { .. } | Change::Length(_) => {
                if random.chance(500) {
                    self.apply(change);
                }
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (block, skip, range) in pieces(offset, data.len() as u64) {
            let data = &data[range];
            self.data(block)[skip..skip + data.len()].copy_from_slice(data);
        }
        self.bytes = self.bytes.max(offset + data.len() as u64);
    }

    fn zero(&mut self, offset: u64, bytes: u64, keep_space: bool) {
        let bytes = bytes.min(
            self.bytes
                .next_multiple_of(BLOCK_BYTES)
                .saturating_sub(offset),
        );
        for (block, skip, range) in pieces(offset, bytes) {
            if range.len() as u64 == BLOCK_BYTES {
                if keep_space {
                    self.blocks.insert(block, Block::Unwritten);
                } else {
                    self.blocks.remove(&block);
                }
                continue;
            }
            if let Some(Block::Data(data)) = self.blocks.get_mut(&block) {
                data[skip..skip + range.len()].fill(0);
            } else if keep_space {
                self.blocks.insert(block, Block::Unwritten);
            }
        }
    }

    fn reserve(&mut self, offset: u64, bytes: u64) {
        for (block, _, _) in pieces(offset, bytes) {
            self.blocks.entry(block).or_insert(Block::Unwritten);
        }
    }

    fn set_length(&mut self, bytes: u64) {
        if bytes < self.bytes {
            // What grows back later must read as zeroes.
            self.blocks.split_off(&bytes.div_ceil(BLOCK_BYTES));
            if let Some(Block::Data(data)) = self.blocks.get_mut(&(bytes / BLOCK_BYTES)) {
                data[(bytes % BLOCK_BYTES) as usize..].fill(0);
            }
        }
        self.bytes = bytes;
    }

    fn data(&mut self, block: u64) -> &mut [u8; BLOCK_BYTES as usize] {
        let entry = self.blocks.entry(block).or_insert(Block::Unwritten);
        if let Block::Unwritten = entry {
            *entry = Block::Data(Box::new([0; BLOCK_BYTES as usize]));
        }
        match entry {
            Block::Data(data) => data,
            Block::Unwritten => unreachable!("made data of just above"),
        }
    }
}

/// The range by blocks: number, offset within, and which bytes of the range these are.
fn pieces(offset: u64, bytes: u64) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    units(offset, bytes, BLOCK_BYTES).map(move |(begin, end)| {
        let range = (begin - offset) as usize..(end - offset) as usize;
        (begin / BLOCK_BYTES, (begin % BLOCK_BYTES) as usize, range)
    })
}

/// The range by the sectors that it touches, as offsets in the file.
fn sectors(offset: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    units(offset, bytes, SECTOR_BYTES)
}

fn units(offset: u64, bytes: u64, unit: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + bytes;
    let first = offset / unit;
    (first..end.div_ceil(unit).max(first))
        .map(move |number| ((number * unit).max(offset), ((number + 1) * unit).min(end)))
        .filter(|(begin, end)| begin < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, data: &[u8]) -> Change {
        let data = data.to_vec();
        Change::Write { offset, data }
    }

    fn read(contents: &Contents, offset: u64, bytes: usize) -> Vec<u8> {
        let mut into = vec![0xaa; bytes];
        contents.read(offset, &mut into);
        into
    }

    #[test]
    fn only_blocks_that_a_punch_covers_whole_give_their_space_back() {
        let mut contents = Contents::new(0);
        contents.apply(&write(0, &[7; 16384]));
        assert_eq!(contents.allocated_blocks(), 4);
        contents.apply(&Change::Zero {
            offset: 4000,
            bytes: 4300,
            keep_space: false,
        });
        assert_eq!(contents.allocated_blocks(), 3);
        assert_eq!(contents.missing_blocks(0, 16384), 1);
        let bytes = read(&contents, 3999, 4302);
        assert_eq!((bytes[0], bytes[4301]), (7, 7));
        assert!(bytes[1..4301].iter().all(|byte| *byte == 0));
        assert_eq!(contents.data_extent(0), Some((0, 4096)));
        assert_eq!(contents.data_extent(4096), Some((8192, 16384)));
        assert_eq!(contents.data_extent(16384), None);
    }

    #[test]
    fn reserved_space_is_a_hole_that_needs_no_further_block() {
        let mut contents = Contents::new(8192);
        contents.apply(&Change::Reserve {
            offset: 0,
            bytes: 8192,
        });
        assert_eq!(contents.missing_blocks(0, 8192), 0);
        assert_eq!(contents.data_extent(0), None);
        assert_eq!(read(&contents, 0, 8192), [0; 8192]);
    }

    #[test]
    fn what_was_cut_off_reads_as_zeroes_when_it_grows_back() {
        let mut contents = Contents::new(0);
        contents.apply(&write(0, &[7; 10000]));
        contents.apply(&Change::Length(100));
        contents.apply(&Change::Length(10000));
        assert_eq!(read(&contents, 99, 2), [7, 0]);
        assert!(read(&contents, 100, 9900).iter().all(|byte| *byte == 0));
        assert_eq!(contents.allocated_blocks(), 1);
    }

    #[test]
    fn a_torn_write_leaves_whole_sectors_old_or_new() {
        let mut random = Random::new(3);
        let (mut old, mut new, mut mixed) = (0, 0, 0);
        for _ in 0..100 {
            let mut contents = Contents::new(0);
            contents.apply(&write(0, &[1; 4096]));
            contents.apply_torn(&write(100, &[2; 2000]), &mut random);
            let bytes = read(&contents, 0, 4096);
            let sectors: Vec<u8> = sectors(100, 2000)
                .map(|(begin, end)| {
                    let sector = &bytes[begin as usize..end as usize];
                    assert!(sector.iter().all(|byte| *byte == sector[0]));
                    sector[0]
                })
                .collect();
            match (sectors.contains(&1), sectors.contains(&2)) {
                (true, true) => mixed += 1,
                (true, false) => old += 1,
                _ => new += 1,
            }
        }
        assert!(old > 10 && new > 10 && mixed > 10, "{old} {new} {mixed}");
    }
}
