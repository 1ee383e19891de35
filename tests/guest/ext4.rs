//! An empty ext4 with a journal, as `mkfs.ext4` would leave it, in as few words as the format allows.
//!
//! Blocks of 4 KiB, groups of 128 MiB, no checksums and no feature that a checker or a kernel of the
//! last ten years would miss. Everything that may be read before it is written (inode tables,
//! bitmaps, the journal) is written here, so that a disk with old content will do.
//!
//! Layout: the kernel's documentation, "ext4 Data Structures and Algorithms".

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{Report, said};

const BLOCK_BYTES: usize = 4096;
/// One bit each in the one block of a group's bitmap.
const GROUP_BLOCKS: u32 = 8 * BLOCK_BYTES as u32;
const INODE_BYTES: usize = 256;
const GROUP_INODES: u32 = 2048;
const TABLE_BLOCKS: u32 = GROUP_INODES * INODE_BYTES as u32 / BLOCK_BYTES as u32;
const DESCRIPTOR_BYTES: usize = 32;

const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
const LOST_FOUND_INODE: u32 = 11;
/// What the kernel's journal takes at least.
const MIN_JOURNAL_BLOCKS: u32 = 1024;
const MAX_JOURNAL_BLOCKS: u32 = 4096;

const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;

/// Makes the file system over all of `device`, a disk or a file.
pub(crate) fn make(device: &str) -> Result<Report, String> {
    let mut file = said(
        &format!("open '{device}'"),
        File::options().read(true).write(true).open(device),
    )?;
    let bytes = said(&format!("size '{device}'"), file.seek(SeekFrom::End(0)))?;
    let mut uuid = [0; 16];
    said(
        "read random bytes",
        File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut uuid)),
    )?;
    // Version 4, as everybody's.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let layout = Layout::new(bytes, uuid, now.map_or(0, |now| now.as_secs() as u32))?;
    said(&format!("write to '{device}'"), layout.write(&file))?;
    Ok(vec![
        ("blocks", layout.blocks.to_string()),
        ("groups", layout.groups.to_string()),
        ("journal_blocks", layout.journal_blocks.to_string()),
    ])
}

/// Where everything is. Group 0 holds, after its tables, the root directory, `lost+found` and the
/// journal; all other groups are empty.
struct Layout {
    blocks: u32,
    groups: u32,
    /// Blocks that the group descriptors take, after each copy of the superblock.
    descriptor_blocks: u32,
    journal_blocks: u32,
    uuid: [u8; 16],
    now: u32,
}

impl Layout {
    fn new(bytes: u64, uuid: [u8; 16], now: u32) -> Result<Self, String> {
        let mut blocks = u32::try_from(bytes / BLOCK_BYTES as u64)
            .map_err(|_| "an ext4 of more than 16 TiB is not made here")?;
        let descriptor_blocks =
            |groups: u32| (groups as usize * DESCRIPTOR_BYTES).div_ceil(BLOCK_BYTES) as u32;
        // A last group with no room for its own tables is left out.
        let tail = blocks % GROUP_BLOCKS;
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        if groups > 1 && tail != 0 && tail < 1 + descriptor_blocks(groups) + 2 + TABLE_BLOCKS + 64 {
            blocks -= tail;
        }
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        let layout = Self {
            blocks,
            groups,
            descriptor_blocks: descriptor_blocks(groups),
            journal_blocks: (blocks / 64).clamp(MIN_JOURNAL_BLOCKS, MAX_JOURNAL_BLOCKS),
            uuid,
            now,
        };
        if layout.used_blocks(0) + 64 > layout.blocks_of(0) {
            return Err(format!(
                "{bytes} bytes are too few for an ext4 with a journal"
            ));
        }
        Ok(layout)
    }

    fn blocks_of(&self, group: u32) -> u32 {
        (self.blocks - group * GROUP_BLOCKS).min(GROUP_BLOCKS)
    }

    /// Copies of the superblock are in groups 0, 1 and the powers of 3, 5 and 7 ("sparse_super").
    fn has_superblock(group: u32) -> bool {
        let is_power_of = |base: u32| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        group <= 1 || [3, 5, 7].into_iter().any(is_power_of)
    }

    /// Blocks before the group's block bitmap.
    fn header_blocks(&self, group: u32) -> u32 {
        if Self::has_superblock(group) {
            return 1 + self.descriptor_blocks;
        }
        0
    }

    fn block_bitmap(&self, group: u32) -> u32 {
        group * GROUP_BLOCKS + self.header_blocks(group)
    }

    fn inode_bitmap(&self, group: u32) -> u32 {
        self.block_bitmap(group) + 1
    }

    fn inode_table(&self, group: u32) -> u32 {
        self.inode_bitmap(group) + 1
    }

    fn root_block(&self) -> u32 {
        self.inode_table(0) + TABLE_BLOCKS
    }

    fn lost_found_block(&self) -> u32 {
        self.root_block() + 1
    }

    fn journal_block(&self) -> u32 {
        self.lost_found_block() + 1
    }

    /// Blocks in use, which are always the group's first.
    fn used_blocks(&self, group: u32) -> u32 {
        let tables = self.header_blocks(group) + 2 + TABLE_BLOCKS;
        if group == 0 {
            return tables + 2 + self.journal_blocks;
        }
        tables
    }

    fn used_inodes(group: u32) -> u32 {
        if group == 0 { LOST_FOUND_INODE } else { 0 }
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let at = |block: u32| u64::from(block) * BLOCK_BYTES as u64;
        let descriptors = self.descriptors();
        for group in 0..self.groups {
            let first = group * GROUP_BLOCKS;
            if Self::has_superblock(group) {
                // In group 0 the first 1024 bytes are the boot loader's, elsewhere there are none.
                let inside = if group == 0 { 1024 } else { 0 };
                let mut block = vec![0; BLOCK_BYTES];
                block[inside..inside + 1024].copy_from_slice(&self.superblock(group).0);
                file.write_all_at(&block, at(first))?;
                file.write_all_at(&descriptors, at(first + 1))?;
            }
            let blocks = bitmap(self.used_blocks(group), self.blocks_of(group));
            let inodes = bitmap(Self::used_inodes(group), GROUP_INODES);
            file.write_all_at(&blocks, at(self.block_bitmap(group)))?;
            file.write_all_at(&inodes, at(self.inode_bitmap(group)))?;
            let mut table = vec![0; TABLE_BLOCKS as usize * BLOCK_BYTES];
            if group == 0 {
                self.fill_inodes(&mut table);
            }
            file.write_all_at(&table, at(self.inode_table(group)))?;
        }
        let root = directory(&[
            (ROOT_INODE, "."),
            (ROOT_INODE, ".."),
            (LOST_FOUND_INODE, "lost+found"),
        ]);
        file.write_all_at(&root, at(self.root_block()))?;
        let lost_found = directory(&[(LOST_FOUND_INODE, "."), (ROOT_INODE, "..")]);
        file.write_all_at(&lost_found, at(self.lost_found_block()))?;

        let mut journal = vec![0; self.journal_blocks as usize * BLOCK_BYTES];
        journal[..1024].copy_from_slice(&self.journal_superblock().0);
        file.write_all_at(&journal, at(self.journal_block()))?;
        file.sync_all()
    }

    fn superblock(&self, group: u32) -> Fields<1024> {
        let free_blocks: u32 = (0..self.groups)
            .map(|group| self.blocks_of(group) - self.used_blocks(group))
            .sum();
        let mut fields = Fields([0; 1024]);
        fields.u32(0x00, self.groups * GROUP_INODES);
        fields.u32(0x04, self.blocks);
        fields.u32(0x0c, free_blocks);
        fields.u32(0x10, self.groups * GROUP_INODES - LOST_FOUND_INODE);
        fields.u32(0x18, 2); // log2 of the block size, less 10
        fields.u32(0x1c, 2); // the same for clusters, which are blocks here
        fields.u32(0x20, GROUP_BLOCKS);
        fields.u32(0x24, GROUP_BLOCKS);
        fields.u32(0x28, GROUP_INODES);
        fields.u32(0x30, self.now); // last written
        fields.u16(0x36, 0xffff); // never check because of many mounts
        fields.u16(0x38, 0xef53); // magic
        fields.u16(0x3a, 1); // unmounted cleanly
        fields.u16(0x3c, 1); // go on after errors
        fields.u32(0x40, self.now); // last checked
        fields.u32(0x4c, 1); // revision with features
        fields.u32(0x54, LOST_FOUND_INODE); // first inode that is not reserved
        fields.u16(0x58, INODE_BYTES as u16);
        fields.u16(0x5a, group as u16);
        fields.u32(0x5c, 0x4); // compatible: has_journal
        fields.u32(0x60, 0x2 | 0x40); // incompatible: filetype, extents
        fields.u32(0x64, 0x1 | 0x2 | 0x40); // read-only: sparse_super, large_file, extra_isize
        fields.bytes(0x68, &self.uuid);
        fields.u32(0xe0, JOURNAL_INODE);
        fields.bytes(0xec, &self.uuid); // seed of directory hashes: any random bytes
        fields.u8(0xfc, 1); // directory hash: half MD4
        fields.u8(0xfd, 1); // the journal's inode is copied below
        fields.u32(0x108, self.now); // made
        fields.bytes(0x10c, &self.journal_extents().0);
        fields.u32(0x10c + 64, self.journal_blocks * BLOCK_BYTES as u32);
        fields.u16(0x15c, 32); // least and wanted size of an inode's extra fields
        fields.u16(0x15e, 32);
        fields.u32(0x160, 1); // directory hashes take chars as signed
        fields
    }

    fn descriptors(&self) -> Vec<u8> {
        let mut all = vec![0; self.descriptor_blocks as usize * BLOCK_BYTES];
        for (group, out) in (0..self.groups).zip(all.chunks_exact_mut(DESCRIPTOR_BYTES)) {
            let mut fields = Fields([0; DESCRIPTOR_BYTES]);
            fields.u32(0x00, self.block_bitmap(group));
            fields.u32(0x04, self.inode_bitmap(group));
            fields.u32(0x08, self.inode_table(group));
            fields.u16(
                0x0c,
                (self.blocks_of(group) - self.used_blocks(group)) as u16,
            );
            fields.u16(0x0e, (GROUP_INODES - Self::used_inodes(group)) as u16);
            fields.u16(0x10, if group == 0 { 2 } else { 0 }); // directories
            out.copy_from_slice(&fields.0);
        }
        all
    }

    fn fill_inodes(&self, table: &mut [u8]) {
        let mut put = |number: u32, mode: u16, links: u16, extents: Fields<60>, blocks: u32| {
            let at = (number - 1) as usize * INODE_BYTES;
            let mut fields = Fields([0; INODE_BYTES]);
            fields.u16(0x00, mode);
            fields.u32(0x04, blocks * BLOCK_BYTES as u32); // size
            for time in [0x08, 0x0c, 0x10, 0x90] {
                fields.u32(time, self.now); // accessed, changed, modified, created
            }
            fields.u16(0x1a, links);
            fields.u32(0x1c, blocks * (BLOCK_BYTES as u32 / 512));
            fields.u32(0x20, 0x8_0000); // described by extents
            fields.bytes(0x28, &extents.0);
            fields.u16(0x80, 32); // size of the extra fields
            table[at..at + INODE_BYTES].copy_from_slice(&fields.0);
        };
        put(
            ROOT_INODE,
            DIRECTORY | 0o755,
            3,
            extents(self.root_block(), 1),
            1,
        );
        put(
            LOST_FOUND_INODE,
            DIRECTORY | 0o700,
            2,
            extents(self.lost_found_block(), 1),
            1,
        );
        put(
            JOURNAL_INODE,
            REGULAR | 0o600,
            1,
            self.journal_extents(),
            self.journal_blocks,
        );
    }

    fn journal_extents(&self) -> Fields<60> {
        extents(self.journal_block(), self.journal_blocks)
    }

    /// The journal's first block. All of its numbers are big-endian.
    fn journal_superblock(&self) -> Fields<1024> {
        let mut fields = Fields([0; 1024]);
        for (offset, value) in [
            (0x00, 0xc03b_3998), // magic
            (0x04, 4),           // this block is a superblock, version 2
            (0x0c, BLOCK_BYTES as u32),
            (0x10, self.journal_blocks),
            (0x14, 1), // first block of the log
            (0x18, 1), // first sequence number; the log's start stays 0: nothing to replay
            (0x40, 1), // file systems that use it
        ] {
            fields.bytes(offset, &value.to_be_bytes());
        }
        fields.bytes(0x30, &self.uuid);
        fields
    }
}

/// A block of `used` ones, then zeroes, then ones from `valid` on, where nothing exists.
fn bitmap(used: u32, valid: u32) -> Vec<u8> {
    let mut bits = vec![0; BLOCK_BYTES];
    for bit in (0..used).chain(valid..8 * BLOCK_BYTES as u32) {
        bits[bit as usize / 8] |= 1 << (bit % 8);
    }
    bits
}

/// An inode's map of one run of blocks.
fn extents(first_block: u32, blocks: u32) -> Fields<60> {
    let mut fields = Fields([0; 60]);
    fields.u16(0x00, 0xf30a); // magic
    fields.u16(0x02, 1); // extents that follow
    fields.u16(0x04, 4); // as many would fit
    fields.u16(0x10, blocks as u16);
    fields.u32(0x14, first_block);
    fields
}

/// One block of a directory of directories.
fn directory(entries: &[(u32, &str)]) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut at = 0;
    for (index, (inode, name)) in entries.iter().enumerate() {
        let bytes = if index == entries.len() - 1 {
            BLOCK_BYTES - at
        } else {
            (8 + name.len()).next_multiple_of(4)
        };
        block[at..at + 4].copy_from_slice(&inode.to_le_bytes());
        block[at + 4..at + 6].copy_from_slice(&(bytes as u16).to_le_bytes());
        block[at + 6] = name.len() as u8;
        block[at + 7] = 2; // a directory
        block[at + 8..at + 8 + name.len()].copy_from_slice(name.as_bytes());
        at += bytes;
    }
    block
}

/// A structure on the disk, filled in by offset.
struct Fields<const BYTES: usize>([u8; BYTES]);

impl<const BYTES: usize> Fields<BYTES> {
    fn bytes(&mut self, offset: usize, value: &[u8]) {
        self.0[offset..offset + value.len()].copy_from_slice(value);
    }

    fn u8(&mut self, offset: usize, value: u8) {
        self.0[offset] = value;
    }

    fn u16(&mut self, offset: usize, value: u16) {
        self.bytes(offset, &value.to_le_bytes());
    }

    fn u32(&mut self, offset: usize, value: u32) {
        self.bytes(offset, &value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const MIB: u64 = 1 << 20;

    /// Sizes with one group, whole groups, a last group of each awkward size, many groups.
    const SIZES: [u64; 8] = [
        8 * MIB,
        100 * MIB,
        128 * MIB,
        128 * MIB + 300 * 1024,
        200 * MIB + 4096,
        1024 * MIB,
        3333 * MIB + 512,
        40 * 1024 * MIB,
    ];

    #[test]
    fn what_is_made_on_a_disk_full_of_garbage_is_clean_to_e2fsck() {
        if Command::new("e2fsck").arg("-V").output().is_err() {
            assert!(
                std::env::var_os("CI").is_none(),
                "e2fsck is missing: run scripts/deps tools"
            );
            eprintln!("SKIPPED: e2fsck is missing: run scripts/deps tools");
            return;
        }
        for bytes in SIZES {
            let disk = tempfile::NamedTempFile::new().unwrap();
            disk.as_file().set_len(bytes).unwrap();
            let garbage = vec![0xa5; MIB as usize];
            for offset in (0..bytes.min(32 * MIB)).step_by(garbage.len()) {
                disk.as_file().write_all_at(&garbage, offset).unwrap();
            }
            disk.as_file().set_len(bytes).unwrap();
            make(disk.path().to_str().unwrap()).unwrap();
            let check = Command::new("e2fsck")
                .arg("-fn")
                .arg(disk.path())
                .output()
                .unwrap();
            assert!(
                check.status.success(),
                "{bytes} bytes:\n{}{}",
                String::from_utf8_lossy(&check.stdout),
                String::from_utf8_lossy(&check.stderr),
            );
        }
    }

    #[test]
    fn a_disk_without_room_for_a_journal_is_refused() {
        let error = Layout::new(4 * MIB, [0; 16], 0).err().unwrap();
        assert!(error.contains("too few"), "{error}");
    }

    #[test]
    fn superblock_copies_are_in_groups_0_1_and_powers_of_3_5_7() {
        let copies: Vec<u32> = (0..130)
            .filter(|&group| Layout::has_superblock(group))
            .collect();
        assert_eq!(copies, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }
}
