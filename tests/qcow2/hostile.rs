//! Images whose metadata says anything at all: they are refused or used, and nothing else happens.
//!
//! No panic, no wait without end, no memory in proportion to what an image claims, and no write of a
//! guest's over what the image needs: its header stays one.

use std::fs;
use std::path::Path;

use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::engine::sim::Random;
use blockcore::io::buffer::Segments;

use crate::setup::{Disk, Images, Process, qemu, qemu_output};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 400;
const DISK_BYTES: u64 = 1 << 20;
/// The most that a test of these may have in memory, beyond what it had before.
const MOST_RESIDENT_BYTES: u64 = 600 << 20;

/// The bytes that a guest writes: found in the header, they have been written over it.
const GUEST: [u8; 16] = *b"guest was here! ";

#[test]
fn images_with_damaged_metadata_are_refused_or_used_and_nothing_else_happens() {
    let images = Images::new();
    let whole: Vec<_> = KINDS.iter().map(|kind| make(&images, kind)).collect();
    let before = resident_bytes();
    let totals = harness::seeds::try_all(DEFAULT_SEEDS, |seed, totals: &mut Totals| {
        let whole = &whole[seed as usize % whole.len()];
        try_one(&images, whole, seed, totals);
        0_u64
    });
    let grown = resident_bytes().saturating_sub(before);
    assert!(
        grown < MOST_RESIDENT_BYTES,
        "{grown} bytes more than before"
    );
    if let Some(totals) = totals {
        let Totals {
            opened,
            refused,
            failed,
        } = totals;
        assert!(opened > DEFAULT_SEEDS / 5, "{totals:?}");
        assert!(refused > DEFAULT_SEEDS / 20, "{totals:?}");
        assert!(failed > DEFAULT_SEEDS / 20, "{totals:?}");
    }
}

#[derive(Debug, Default)]
struct Totals {
    opened: u64,
    refused: u64,
    /// Requests that failed.
    failed: u64,
}

/// Options for `qemu-img create`.
const KINDS: [&str; 5] = [
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536,refcount_bits=64,compression_type=zstd",
];

/// An image with data, zeroes and compressed clusters, and with a snapshot where there can be one.
fn make(images: &Images, options: &str) -> Vec<u8> {
    let path = images.path("whole.qcow2");
    let name = path.to_str().unwrap();
    let size = DISK_BYTES.to_string();
    qemu(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", options, name, &size],
    );
    let io = |command: &str| qemu("qemu-io", &["-f", "qcow2", "-c", command, name]);
    io("write -P 1 0 200k");
    io("write -c -P 2 512k 64k");
    // Not with counts of one bit.
    qemu_output("qemu-img", &["snapshot", "-c", "one", name]);
    io("write -P 3 64k 64k");
    io("write -z 256k 64k");
    fs::read(&path).unwrap()
}

fn try_one(images: &Images, whole: &[u8], seed: u64, totals: &mut Totals) {
    let mut random = Random::new(seed);
    let mut bytes = whole.to_vec();
    damage(&mut bytes, &mut random);
    let path = images.path("damaged.qcow2");
    fs::write(&path, &bytes).unwrap();
    let process = Process::new();
    let file = path.to_str().unwrap();
    let read_only = ["", ",read-only=on"][usize::from(random.chance(300))];
    let options =
        format!("driver=qcow2,discard=unmap{read_only},file.driver=file,file.filename={file}");
    let opened = match read_only {
        "" => process.open(&options),
        _ => process.open_to_read(&options),
    };
    match opened {
        Ok(disk) => {
            totals.opened += 1;
            use_it(&disk, &mut random, totals);
            // What cannot be written any more is an error.
            let _ = disk.close();
        }
        Err(_) => totals.refused += 1,
    }
    check_header(&path, seed);
}

/// Changes some words of what the image's metadata is: wherever it is not only data.
fn damage(bytes: &mut [u8], random: &mut Random) {
    let number = |bytes: &[u8], at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap());
    let tables = [
        (0, 112),
        (number(bytes, 40) as usize, 64),
        (number(bytes, 48) as usize, 64),
        (number(bytes, 64) as usize, 96),
    ];
    let clusters = bytes.len() as u64 / 512;
    for _ in 0..=random.below(3) {
        let mut table = tables[random.below(tables.len() as u64) as usize];
        // One level further down: an L2 table, or a refcount block.
        if random.chance(500) && table.0 > 0 && table.0 + 8 <= bytes.len() {
            let next = number(bytes, table.0) & 0x00ff_ffff_ffff_fe00;
            table = (next as usize, 512);
        }
        let at = table
            .0
            .saturating_add(random.below(table.1) as usize / 4 * 4);
        let Some(word) = bytes.get_mut(at..at + 4) else {
            continue;
        };
        let now = u32::from_be_bytes(*word.first_chunk().unwrap());
        let new = match random.below(7) {
            0 => 0,
            1 => u32::MAX,
            2 => now ^ 1 << random.below(32),
            3 => random.bits() as u32,
            // Something else that is in the image.
            4 => (random.below(clusters) as u32) << 9,
            5 => now.wrapping_add(1),
            _ => 0x8000_0000,
        };
        word.copy_from_slice(&new.to_be_bytes());
    }
}

fn use_it(disk: &Disk, random: &mut Random, totals: &mut Totals) {
    let bytes = disk.root.bytes();
    for _ in 0..12 {
        let length = (512 << random.below(8)).min(bytes);
        let offset = random.below((bytes.min(1 << 30) - length) / 512 + 1) * 512;
        let memory = Segments::allocate(length as usize, 4096);
        let pattern: Vec<u8> = GUEST
            .iter()
            .copied()
            .cycle()
            .take(length as usize)
            .collect();
        memory.copy_from(&pattern);
        let kind = random.below(6);
        let done = disk.run(move |root| async move {
            match kind {
                0 | 1 => root.read(offset, memory).await,
                2 | 3 => root.write(offset, memory, WriteFlags::empty()).await,
                4 => {
                    root.write_zeroes(offset, length, ZeroFlags::MAY_UNMAP)
                        .await
                }
                _ => root.discard(offset, length).await,
            }
        });
        totals.failed += u64::from(done.is_err());
    }
    let flushed = disk.run(|root| async move { root.flush().await });
    totals.failed += u64::from(flushed.is_err());
}

/// Nothing of the guest's is where the header was.
fn check_header(path: &Path, seed: u64) {
    let bytes = fs::read(path).unwrap();
    let head = &bytes[..512.min(bytes.len())];
    let is_overwritten = head.windows(GUEST.len()).any(|part| part == GUEST);
    assert!(
        !is_overwritten,
        "seed {seed}: a guest's bytes are in the header"
    );
}

fn resident_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
