//! Crash segments that say anything at all: what a killed process left is put into its image, or refused
//! before anything is written.
//!
//! An image and its segment are taken as they are while somebody writes, as a kill would leave them. Undamaged,
//! all that completed is there when the image is opened again. Damaged, the image is refused and stays as it
//! is; or it is opened, and nothing has changed where there is data or what belongs to snapshots, except at
//! places that the segment names as new tables.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use blockcore::driver::ZeroFlags;
use blockcore::engine::sim::Random;

use super::walk::{Claim, Walk};
use crate::setup::{Disk, Images, Process, qemu, qemu_output};

/// Segments tried when nothing is said.
const DEFAULT_SEEDS: u64 = 300;
const DISK_BYTES: u64 = 1 << 20;
/// Words of a segment before its records, and of a record; see `formats/src/qcow2/segment.rs`.
const HEAD_WORDS: usize = 128;
const RECORD_WORDS: usize = 4;
/// Words of the head: the cookie, the number of the first record, and reserved extents.
const HEAD: [usize; 3] = [1, AT_FIRST, 64];
const AT_FIRST: usize = 4;
/// Kinds of records.
const L2_RECORD: u64 = 1;
const L1_RECORD: u64 = 2;
const COUNT_RECORD: u64 = 3;
const TAKEN_RECORD: u64 = 4;
const BLOCK_RECORD: u64 = 5;

#[derive(Debug, Default)]
struct Totals {
    opened: u64,
    refused: u64,
    /// Opened, and the disk was as if nothing had been kept.
    given_up: u64,
    records: u64,
}

#[test]
fn a_segment_that_says_anything_is_put_into_its_image_or_refused_and_leaves_others_data_alone() {
    let images = Images::new();
    let mut random = Random::new(1);
    let kills: Vec<_> = KINDS
        .iter()
        .map(|kind| Kill::new(&images, kind, &mut random))
        .collect();
    let totals = harness::seeds::try_all(DEFAULT_SEEDS, |seed, totals: &mut Totals| {
        let kill = &kills[seed as usize % kills.len()];
        let mut random = Random::new(seed);
        let (segment, what) = kill.damaged(&mut random);
        harness::seeds::replayable(seed, &what, |_| kill.try_it(&segment, totals));
        0_u64
    });
    if let Some(totals) = totals {
        assert!(totals.opened > DEFAULT_SEEDS / 5, "{totals:?}");
        assert!(totals.refused > DEFAULT_SEEDS / 10, "{totals:?}");
        assert!(totals.given_up < totals.opened / 5, "{totals:?}");
        assert!(totals.records > 100 * KINDS.len() as u64, "{totals:?}");
    }
}

/// Options for `qemu-img create`.
const KINDS: [&str; 4] = [
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536",
];

/// What a kill leaves.
struct Kill {
    path: PathBuf,
    segment_path: PathBuf,
    runtime: PathBuf,
    image: Vec<u8>,
    segment: Vec<u64>,
    /// What had completed.
    disk: Vec<u8>,
    /// Words of the segment at which a record begins.
    records: Vec<usize>,
}

impl Kill {
    fn new(images: &Images, options: &str, random: &mut Random) -> Self {
        // Commas would end the name in options.
        let plain = options.replace(',', "-");
        let path = images.path(&format!("{plain}.qcow2"));
        let runtime = images.path(&format!("{plain}.run"));
        fs::create_dir(&runtime).unwrap();
        let name = path.to_str().unwrap();
        let size = DISK_BYTES.to_string();
        let create = ["create", "-f", "qcow2", "-o", options, name, &size];
        qemu("qemu-img", &create);
        let io = |command: &str| qemu("qemu-io", &["-f", "qcow2", "-c", command, name]);
        io("write -P 1 0 200k");
        qemu("qemu-img", &["snapshot", "-c", "one", name]);
        io("write -P 2 300k 100k");
        let mut kill = Self {
            segment_path: PathBuf::new(),
            runtime,
            image: Vec::new(),
            segment: Vec::new(),
            disk: Vec::new(),
            records: Vec::new(),
            path,
        };
        let disk = kill.open().expect("it is whole");
        let mut model = disk.read(0, DISK_BYTES);
        use_it(&disk, &mut model, 60, random);
        disk.flush();
        use_it(&disk, &mut model, 60, random);
        // The segment first: what has come into the image since is there twice.
        let mut segments = fs::read_dir(&kill.runtime).unwrap();
        kill.segment_path = segments.next().expect("one segment").unwrap().path();
        let bytes = fs::read(&kill.segment_path).unwrap();
        kill.image = fs::read(&kill.path).unwrap();
        let word = |bytes: &[u8]| u64::from_le_bytes(*bytes.first_chunk().unwrap());
        kill.segment = bytes.chunks(8).map(word).collect();
        // Those that count, in their order: a tag has its number, plus one, above the kind.
        let first = kill.segment[AT_FIRST];
        let mut records: Vec<_> = (HEAD_WORDS..kill.segment.len())
            .step_by(RECORD_WORDS)
            .filter(|at| kill.segment[*at] >> 8 > first)
            .collect();
        records.sort_by_key(|at| kill.segment[*at]);
        kill.records = records;
        kill.disk = model;
        let _ = disk.close();
        kill.check_undamaged();
        kill
    }

    fn open(&self) -> Result<Disk, blockcore::Error> {
        let options = format!(
            "driver=qcow2,discard=unmap,file.driver=file,file.discard=unmap,file.filename={}",
            self.path.to_str().unwrap()
        );
        Process::keeping(&self.runtime).open(&options)
    }

    /// The image is as the kill left it, and so is the segment, or it is another.
    fn lay_out(&self, segment: &[u64]) {
        // In place: a segment is of one file.
        fs::write(&self.path, &self.image).unwrap();
        let bytes: Vec<u8> = segment.iter().flat_map(|word| word.to_le_bytes()).collect();
        fs::write(&self.segment_path, bytes).unwrap();
    }

    fn check_undamaged(&self) {
        self.lay_out(&self.segment);
        let disk = self.open().expect("it is whole");
        assert!(disk.read(0, DISK_BYTES) == self.disk, "what completed");
        disk.close().expect("it can be closed");
        let name = self.path.to_str().unwrap();
        let checked = qemu_output("qemu-img", &["check", "-f", "qcow2", name]);
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
        let left = fs::read_dir(&self.runtime).unwrap().count();
        assert_eq!(left, 0, "what an orderly end leaves");
    }

    fn damaged(&self, random: &mut Random) -> (Vec<u64>, Vec<String>) {
        let (mut segment, mut what) = (self.segment.clone(), Vec::new());
        if random.chance(400) {
            what.push(self.forge(&mut segment, random));
            return (segment, what);
        }
        for _ in 0..=random.below(3) {
            let record = self.records[random.below(self.records.len() as u64) as usize];
            let at = match random.below(20) {
                0 => HEAD[random.below(HEAD.len() as u64) as usize],
                1 => 64 + random.below(64) as usize,
                2 => record,
                _ => record + 1 + random.below(3) as usize,
            };
            let now = segment[at];
            // Somewhere in the file, or in what another record tells of.
            let other = self.records[random.below(self.records.len() as u64) as usize];
            let other = segment[other + 1 + random.below(2) as usize];
            let file_sectors = self.image.len() as u64 / 512;
            let place = random.below(file_sectors) * 512;
            let new = match random.below(14) {
                0 => 0,
                1 => u64::MAX,
                2 => now ^ 1 << random.below(64),
                3 => random.bits(),
                4 | 5 => other,
                6 => place,
                7 | 8 => (place / 4096 * 4096) | (1 << 63),
                9 => place + random.below(64) * 8,
                10 => now.wrapping_add(1),
                11 => random.below(file_sectors),
                // Another kind of record, of the same number.
                _ => (now >> 8) << 8 | random.below(7),
            };
            segment[at] = new;
            what.push(format!("word {at} of {record}: {now:#x} -> {new:#x}"));
        }
        (segment, what)
    }

    /// Has records say that metadata is something else.
    fn forge(&self, segment: &mut [u64], random: &mut Random) -> String {
        let walk = Walk::new(&self.image).expect("it is whole");
        let places = walk.claims.iter();
        let metadata = places.filter(|(_, claims)| claims.iter().all(|claim| !claim.is_data()));
        let metadata: Vec<_> = metadata.collect();
        let (cluster, claims) = metadata[random.below(metadata.len() as u64) as usize];
        let host = cluster << walk.cluster_bits;
        let mut second = self.records.len() / 2;
        let first = random.below(second as u64) as usize;
        second += random.below(second as u64) as usize;
        let mut put = |index: usize, kind: u64, words: [u64; 3]| {
            let at = self.records[index];
            segment[at] = segment[at] >> 8 << 8 | kind;
            segment[at + 1..at + 4].copy_from_slice(&words);
        };
        let per_block = walk.cluster_bytes() / 2;
        let what = match random.below(5) {
            0 => {
                put(first, L1_RECORD, [walk.l1_place(), host | 1 << 63, 0]);
                let entry = host + random.below(walk.cluster_bytes() / 16) * 16;
                put(second, L2_RECORD, [entry, random.bits(), random.bits()]);
                "is a table"
            }
            1 => {
                put(first, COUNT_RECORD, [*cluster, 0, 0]);
                "is free"
            }
            2 => {
                segment[64] = (cluster << 24) | (random.below(3) + 1);
                "is reserved"
            }
            3 => {
                let clusters = random.bits() >> random.below(64);
                put(first, TAKEN_RECORD, [*cluster, clusters, 0]);
                segment[65] = cluster << 24 | clusters & 0xff_ffff;
                "begins what is taken"
            }
            _ => {
                put(first, BLOCK_RECORD, [cluster / per_block, host, 0]);
                "is a block"
            }
        };
        format!("{host:#x}, where there is {claims:?}, {what}")
    }

    /// Places that a segment names as L2 tables.
    fn tables(&self, segment: &[u64]) -> BTreeSet<u64> {
        let records = self.records.iter();
        let tables = records.filter(|at| segment[**at] & 0xff == L1_RECORD);
        tables
            .map(|at| segment[at + 2] & 0x00ff_ffff_ffff_fe00)
            .collect()
    }

    fn try_it(&self, segment: &[u64], totals: &mut Totals) -> Result<(), String> {
        self.lay_out(segment);
        totals.records += self.records.len() as u64;
        let opened = self.open();
        let Ok(disk) = opened else {
            totals.refused += 1;
            return match fs::read(&self.path).unwrap() == self.image {
                true => Ok(()),
                false => Err("it was refused, and has been written to".into()),
            };
        };
        totals.opened += 1;
        let is_kept = segment[1] == self.segment[1];
        totals.given_up += u64::from(!is_kept);
        let _ = disk.close();
        let after = fs::read(&self.path).unwrap();
        let walk = Walk::new(&self.image).expect("it is whole");
        let tables = self.tables(segment);
        for (cluster, claims) in &walk.claims {
            let begin = (cluster << walk.cluster_bits) as usize;
            let end = (begin + walk.cluster_bytes() as usize).min(self.image.len());
            let stays = |claim: &Claim| claim.is_data() || claim.is_kept_as_it_is();
            if claims.iter().all(stays)
                && !tables.contains(&(begin as u64))
                && after.get(begin..end) != Some(&self.image[begin..end])
            {
                return Err(format!("{begin:#x} has changed, which is {claims:?}"));
            }
        }
        self.check_tables(&walk, &after)?;
        if Walk::new(&after).is_none() || after[8..72] != self.image[8..72] {
            return Err("its header has changed".into());
        }
        Ok(())
    }
}

impl Kill {
    /// What is a table, a count or the header is that still, and counts.
    fn check_tables(&self, walk: &Walk<'_>, after: &[u8]) -> Result<(), String> {
        let now = Walk::new(after).ok_or("its header is none any more")?;
        let kind = |claim: &Claim| std::mem::discriminant(claim);
        for (cluster, claims) in &now.claims {
            let metadata: Vec<_> = claims.iter().filter(|claim| !claim.is_data()).collect();
            let before = walk.claims.get(cluster).map_or(&[][..], |claims| claims);
            let is_other = metadata.iter().any(|claim| {
                let mut before = before.iter().filter(|claim| !claim.is_data());
                before.any(|before| kind(before) != kind(claim) && !may_become(before, claim))
            });
            let host = cluster << now.cluster_bits;
            if is_other {
                return Err(format!("{host:#x} was {before:?} and is {claims:?}"));
            }
            if !metadata.is_empty() && now.count(*cluster) == 0 {
                return Err(format!("{host:#x}, which is {claims:?}, counts as free"));
            }
        }
        Ok(())
    }
}

/// A table that was shared with a snapshot is the snapshot's.
fn may_become(before: &Claim, after: &Claim) -> bool {
    matches!(before, Claim::L2(..)) && matches!(after, Claim::SnapshotL2)
}

fn use_it(disk: &Disk, model: &mut [u8], times: u64, random: &mut Random) {
    for _ in 0..times {
        let length = (512 << random.below(7)).min(DISK_BYTES);
        let offset = random.below((DISK_BYTES - length) / 512) * 512;
        let range = offset as usize..(offset + length) as usize;
        match random.below(8) {
            0..6 => {
                model[range.clone()].fill(random.below(255) as u8 + 1);
                disk.write(offset, &model[range]);
            }
            6 => {
                disk.write_zeroes(offset, length, ZeroFlags::MAY_UNMAP);
                model[range].fill(0);
            }
            _ => {
                disk.discard(offset, length);
                let now = disk.read(offset, length);
                model[range].copy_from_slice(&now);
            }
        }
    }
}
