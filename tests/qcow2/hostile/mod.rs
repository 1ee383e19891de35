//! Images whose metadata says anything at all: they are refused or used, and nothing else happens.
//!
//! No panic, no wait without end, no memory in proportion to what an image claims. And what is not asked for
//! stays as it is, so far as an image that is not whole allows to say what that is:
//!
//! * Of a snapshot or bitmap no table changes, whatever else says that it is data, is free or is a table.
//! * Nothing of the guest's is written where the header, an active table or a count is. Of these only that
//!   changes which belongs to what was asked for.
//! * A cluster with data that nobody asked to change keeps its bytes, if its count covers all who refer to it
//!   and no entry for an address that was written to says that it may be written in place. Where a damaged
//!   image has two say that of one cluster, or counts it as free, nothing can be promised: whoever writes to
//!   one changes the other.
//! * An image in which QEMU finds nothing wrong is such an image afterwards.
//!
//! What the tables say is read by a reader of its own, `walk`.

mod crafted;
mod segment;
mod walk;

use std::fs;
use std::path::Path;

use blockcore::driver::{SnapshotRef, SnapshotSpec, WriteFlags, ZeroFlags};
use blockcore::engine::sim::Random;
use blockcore::io::RequestKind;
use blockcore::io::buffer::Segments;

use crate::setup::{Disk, Images, Process, qemu, qemu_output};
use walk::{Claim, Walk, number};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 400;
const DISK_BYTES: u64 = 1 << 20;
/// The most that a test of these may have in memory, beyond what it had before.
const MOST_RESIDENT_BYTES: u64 = 600 << 20;

/// How much longer an image's file may become: one whose counts are something else has its free clusters
/// behind all that these count.
const MOST_GROWTH_BYTES: u64 = 256 << 20;

/// The bytes that a guest writes.
const GUEST: [u8; 16] = *b"guest was here! ";

#[test]
fn images_with_damaged_metadata_are_refused_or_used_and_what_nobody_asked_for_stays() {
    let images = Images::new();
    let whole: Vec<_> = KINDS.iter().map(|kind| make(&images, kind)).collect();
    let before = resident_bytes();
    let totals = harness::seeds::try_all(DEFAULT_SEEDS, |seed, totals: &mut Totals| {
        let whole = &whole[seed as usize % whole.len()];
        let case = Case::new(whole, seed);
        harness::seeds::replayable(seed, &case.what, |_| try_one(&images, &case, totals));
        0_u64
    });
    let grown = resident_bytes().saturating_sub(before);
    assert!(
        grown < MOST_RESIDENT_BYTES,
        "{grown} bytes more than before"
    );
    if let Some(totals) = totals {
        let least = DEFAULT_SEEDS;
        assert!(totals.opened > least / 3, "{totals:?}");
        assert!(totals.refused > least / 20, "{totals:?}");
        assert!(totals.failed > least / 20, "{totals:?}");
        assert!(totals.kept > least * 50, "{totals:?}");
        assert!(totals.snapshots > least / 40, "{totals:?}");
    }
}

#[derive(Debug, Default)]
struct Totals {
    opened: u64,
    refused: u64,
    /// Requests that failed.
    failed: u64,
    /// Clusters that had to be as they were.
    kept: u64,
    /// Snapshots that were taken, deleted or applied.
    snapshots: u64,
    resized: u64,
}

/// Options for `qemu-img create`.
const KINDS: [&str; 6] = [
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=65536,refcount_bits=64,compression_type=zstd",
    "cluster_size=1024,refcount_bits=8",
];

/// An image with data, zeroes and compressed clusters, and with a bitmap and a snapshot where there can be.
fn make(images: &Images, options: &str) -> Vec<u8> {
    let path = images.path("whole.qcow2");
    let name = path.to_str().unwrap();
    let size = DISK_BYTES.to_string();
    qemu(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", options, name, &size],
    );
    let io = |command: &str| qemu("qemu-io", &["-f", "qcow2", "-c", command, name]);
    // Not with version 2.
    qemu_output("qemu-img", &["bitmap", "--add", "-g", "4096", name, "b"]);
    io("write -P 1 0 200k");
    io("write -c -P 2 512k 64k");
    // Not with counts of one bit.
    qemu_output("qemu-img", &["snapshot", "-c", "one", name]);
    io("write -P 3 64k 64k");
    io("write -z 256k 64k");
    qemu_output("qemu-img", &["snapshot", "-c", "two", name]);
    io("write -P 4 100k 100k");
    io("write -P 5 900k 50k");
    fs::read(&path).unwrap()
}

/// What is tried: an image, and what is done to it.
struct Case {
    bytes: Vec<u8>,
    what: What,
    random: Random,
}

/// What a failure tells of a case.
#[derive(Debug, Default)]
struct What {
    damage: Vec<String>,
    read_only: bool,
    options: &'static str,
}

impl Case {
    fn new(whole: &[u8], seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut bytes = whole.to_vec();
        let mut what = What {
            read_only: random.chance(100),
            options: match random.below(3) {
                0 => "",
                1 => ",pass-discard-other=on",
                _ => ",l2-cache-size=4096,refcount-cache-size=2048",
            },
            ..What::default()
        };
        let walk = Walk::new(whole).expect("it is whole");
        for _ in 0..=random.below(3) {
            what.damage.extend(damage(&walk, &mut bytes, &mut random));
        }
        Self {
            bytes,
            what,
            random,
        }
    }
}

fn try_one(images: &Images, case: &Case, totals: &mut Totals) -> Result<(), String> {
    let path = images.path("damaged.qcow2");
    fs::write(&path, &case.bytes).unwrap();
    let checked = check(&path);
    let file = path.to_str().unwrap();
    let options = format!(
        "driver=qcow2,discard=unmap,read-only={}{},file.driver=file,file.discard=unmap,file.filename={file}",
        ["off", "on"][usize::from(case.what.read_only)],
        case.what.options
    );
    let process = Process::new();
    let opened = match case.what.read_only {
        false => process.open(&options),
        true => process.open_to_read(&options),
    };
    let mut asked = Asked::default();
    match opened {
        Ok(disk) => {
            totals.opened += 1;
            use_it(disk, &mut case.random.clone(), &mut asked, totals);
        }
        Err(_) => totals.refused += 1,
    }
    let length = fs::metadata(&path).unwrap().len();
    if length > case.bytes.len() as u64 + MOST_GROWTH_BYTES {
        return Err(format!("its file has become {length} bytes long"));
    }
    let after = fs::read(&path).unwrap();
    totals.kept += look(&case.bytes, &after, &asked)?;
    let checked_after = check(&path);
    if let (Some((0, leaks)), Some((corruptions, leaks_after))) = (checked, checked_after)
        && (corruptions > 0 || leaks_after > leaks + leaks_to_come(&case.bytes))
    {
        return Err(format!(
            "it was whole, and leaked {leaks}; now {corruptions} are wrong and {leaks_after} leak"
        ));
    }
    // Readers find it usable, or are refused.
    if let Ok(disk) = process.open_to_read(&options.replace("read-only=off", "read-only=on")) {
        read_all(&disk);
        let _ = disk.close();
    }
    Ok(())
}

/// How many clusters leak by QEMU's count once bitmaps are not up to date, or the file reaches so far.
fn leaks_to_come(bytes: &[u8]) -> u64 {
    let Some(walk) = Walk::new(bytes) else {
        return 0;
    };
    let is_bitmap = |claim: &Claim| {
        use Claim::*;
        matches!(claim, BitmapDirectory | BitmapTable | BitmapData)
    };
    let claims = walk.claims.values();
    let bitmaps = claims.filter(|claims| claims.iter().any(is_bitmap)).count() as u64;
    let end = (bytes.len() as u64).div_ceil(walk.cluster_bytes());
    let behind = (end..end + 4096).filter(|cluster| walk.count(*cluster) > 0);
    bitmaps + behind.count() as u64
}

/// How many corruptions and leaks QEMU finds; `None` if it cannot look.
fn check(path: &Path) -> Option<(u64, u64)> {
    let name = path.to_str().unwrap();
    let output = qemu_output("qemu-img", &["check", "--output=json", "-f", "qcow2", name]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let count = |name: &str| report.get(name).and_then(|n| n.as_u64()).unwrap_or(0);
    (count("check-errors") == 0).then(|| (count("corruptions"), count("leaks")))
}

/// Changes a word of the image's metadata, and says which.
fn damage(walk: &Walk<'_>, bytes: &mut [u8], random: &mut Random) -> Option<String> {
    let kinds = |claim: &Claim| std::mem::discriminant(claim);
    let metadata = |claim: &Claim| !claim.is_data();
    let mut all: Vec<_> = walk
        .claims
        .values()
        .flatten()
        .filter(|c| metadata(c))
        .collect();
    all.dedup_by_key(|claim| kinds(claim));
    let wanted = kinds(all[random.below(all.len() as u64) as usize]);
    let clusters: Vec<_> = walk
        .claims
        .iter()
        .filter(|(_, claims)| claims.iter().any(|claim| kinds(claim) == wanted))
        .collect();
    let (cluster, claims) = clusters[random.below(clusters.len() as u64) as usize];
    let begin = (cluster << walk.cluster_bits) as usize;
    let end = (begin + walk.cluster_bytes() as usize).min(bytes.len());
    // Something that says something, mostly.
    let filled: Vec<_> = (begin..end - 7)
        .step_by(8)
        .filter(|at| bytes[*at..at + 8] != [0; 8])
        .collect();
    let at = match random.chance(800) && !filled.is_empty() {
        true => filled[random.below(filled.len() as u64) as usize],
        false => begin + random.below((end - begin) as u64 / 8) as usize * 8,
    };
    if at < 8 {
        // Without its magic and version it is no image.
        return None;
    }
    let now = number(bytes, at as u64, 8)?;
    let file_clusters = bytes.len() as u64 >> walk.cluster_bits;
    let place = |random: &mut Random| {
        let cluster = match random.below(4) {
            0 => random.below(file_clusters + 3),
            1 => 0,
            // Where there is something else.
            _ => *walk
                .claims
                .keys()
                .nth(random.below(walk.claims.len() as u64) as usize)
                .unwrap(),
        };
        cluster << walk.cluster_bits
    };
    let new = match random.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 | 3 => now ^ 1 << random.below(64),
        4 => random.bits(),
        5 => place(random),
        6 | 7 => place(random) | 1 << 63,
        8 => place(random) | 1 << 62 | random.below(1 << 10) << 40 | random.below(512),
        9 => now ^ [1 << 63, 1 << 62, 1][random.below(3) as usize],
        10 => now.wrapping_add(1 << (8 * random.below(8))),
        _ => now.wrapping_sub(1 << (8 * random.below(8))),
    };
    bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
    Some(format!("{claims:?} at {at:#x}: {now:#x} -> {new:#x}"))
}

/// What was asked of a disk: what may be another afterwards.
#[derive(Debug, Default)]
struct Asked {
    /// Ranges of the disk.
    ranges: Vec<(u64, u64)>,
    /// Everything from here on.
    cut: Option<u64>,
    resized: bool,
    took: bool,
    deleted: bool,
    applied: bool,
}

impl Asked {
    fn touches(&self, cluster: u64, bits: u32) -> bool {
        let (begin, end) = (cluster << bits, (cluster + 1) << bits);
        let is_cut = self.cut.is_some_and(|cut| end > cut);
        is_cut
            || self
                .ranges
                .iter()
                .any(|(from, to)| *from < end && begin < *to)
    }

    fn changes_snapshots(&self) -> bool {
        self.took || self.deleted || self.applied
    }
}

fn use_it(disk: Disk, random: &mut Random, asked: &mut Asked, totals: &mut Totals) {
    let bytes = disk.root.bytes();
    for _ in 0..12 {
        let length = (512 << random.below(9)).min(bytes);
        let offset = random.below((bytes.min(DISK_BYTES) - length.min(DISK_BYTES)) / 512 + 1) * 512;
        let memory = Segments::allocate(length as usize, 4096);
        let pattern: Vec<u8> = GUEST
            .iter()
            .copied()
            .cycle()
            .take(length as usize)
            .collect();
        memory.copy_from(&pattern);
        let kind = random.below(8);
        if kind > 0 {
            asked.ranges.push((offset, offset + length));
        }
        let done = disk.run(move |root| async move {
            match kind {
                0 => root.read(offset, memory).await,
                1..=3 => root.write(offset, memory, WriteFlags::empty()).await,
                4 => {
                    root.write_zeroes(offset, length, ZeroFlags::MAY_UNMAP)
                        .await
                }
                5 => {
                    let request = root.enter(RequestKind::Write, offset, length).await;
                    request.io().write_compressed(offset, memory).await
                }
                6 => root.flush().await,
                _ => root.discard(offset, length).await,
            }
        });
        totals.failed += u64::from(done.is_err());
    }
    let flushed = disk.run(|root| async move { root.flush().await });
    totals.failed += u64::from(flushed.is_err());
    // What cannot be written any more is an error.
    if let Some(disk) = operate(disk, random, asked, totals) {
        let _ = disk.close();
    }
}

/// What an operator does at last; the disk is gone if it could not be used again.
fn operate(
    disk: Disk,
    random: &mut Random,
    asked: &mut Asked,
    totals: &mut Totals,
) -> Option<Disk> {
    let named = |random: &mut Random| SnapshotRef {
        id: None,
        name: Some(["one", "two"][random.below(2) as usize].to_owned()),
    };
    match random.below(8) {
        0 => {
            asked.took = true;
            let spec = SnapshotSpec {
                name: "three".to_owned(),
                ..SnapshotSpec::default()
            };
            totals.snapshots += u64::from(disk.take_snapshot(spec).is_ok());
        }
        1 | 2 => {
            asked.deleted = true;
            totals.snapshots += u64::from(disk.delete_snapshot(named(random)).is_ok());
        }
        3 => {
            asked.applied = true;
            let applied = disk.apply_snapshot(named(random)).ok();
            totals.snapshots += u64::from(applied.is_some());
            return applied;
        }
        4 => {
            let bytes = (random.below(2 * DISK_BYTES) / 512) * 512;
            let before = disk.root.bytes();
            asked.cut = (bytes < before).then_some(bytes);
            asked.resized = true;
            // Of all that is claimed to be there only some is looked at in time.
            if before <= 64 << 20 {
                totals.resized += u64::from(disk.try_resize(bytes).is_ok());
            }
        }
        _ => {}
    }
    Some(disk)
}

fn read_all(disk: &Disk) {
    let bytes = disk.root.bytes().min(2 * DISK_BYTES);
    for offset in (0..bytes).step_by(1 << 16) {
        let into = Segments::allocate((bytes - offset).min(1 << 16) as usize, 4096);
        let _ = disk.run(move |root| async move { root.read(offset, into).await });
    }
}

/// What must be as it was is. Gives how many clusters that are.
fn look(before: &[u8], after: &[u8], asked: &Asked) -> Result<u64, String> {
    let Some(walk) = Walk::new(before) else {
        return match before == after {
            true => Ok(0),
            false => Err("it has changed, though nobody can read it".into()),
        };
    };
    let mut kept = 0;
    for (cluster, claims) in &walk.claims {
        let must = must_keep(*cluster, claims, &walk, asked);
        let begin = (cluster << walk.cluster_bits) as usize;
        let end = (begin + walk.cluster_bytes() as usize).min(before.len());
        let (was, is) = (&before[begin..end], after.get(begin..end).unwrap_or(&[]));
        if must {
            kept += 1;
            if was != is {
                return Err(format!(
                    "the cluster at {begin:#x} has changed, which is {claims:?} and counts {}: {asked:?}",
                    walk.count(*cluster)
                ));
            }
        }
        // A table that is not the disk's own is copied, and may be let go of.
        let is_needed = |claim: &Claim| !claim.is_data() && !matches!(claim, Claim::L2(_, false));
        if claims.iter().any(is_needed) && has_guests(is) && !has_guests(was) {
            return Err(format!(
                "a guest's bytes are at {begin:#x}, where there is {claims:?}: {asked:?}"
            ));
        }
    }
    look_at_tables(&walk, after, asked)?;
    look_at_header(before, after, asked)?;
    Ok(kept)
}

fn has_guests(bytes: &[u8]) -> bool {
    bytes.windows(GUEST.len()).any(|part| part == GUEST)
}

/// Whether a cluster must hold what it held: see the module's header.
fn must_keep(cluster: u64, claims: &[Claim], walk: &Walk<'_>, asked: &Asked) -> bool {
    let bits = walk.cluster_bits;
    if claims.iter().any(|claim| claim.is_kept_as_it_is()) {
        let is_active = |claim: &Claim| !claim.is_kept_as_it_is() && !claim.is_data();
        return !claims.iter().any(is_active) && !asked.deleted && !asked.changes_snapshots();
    }
    if !claims.iter().all(|claim| claim.is_data()) || walk.count(cluster) < claims.len() as u64 {
        return false;
    }
    let is_asked_in_place = claims.iter().any(|claim| match claim {
        Claim::Data(guest, is_own) => *is_own && asked.touches(*guest, bits),
        _ => false,
    });
    let stays = |claim: &Claim| match claim {
        Claim::Data(guest, _) | Claim::Compressed(guest) => {
            !asked.applied && !asked.touches(*guest, bits)
        }
        _ => !asked.deleted,
    };
    !is_asked_in_place && claims.iter().any(stays)
}

/// Of active tables that only has changed which belongs to what was asked for.
fn look_at_tables(walk: &Walk<'_>, after: &[u8], asked: &Asked) -> Result<(), String> {
    if asked.changes_snapshots() || asked.resized {
        return Ok(());
    }
    let bits = walk.cluster_bits;
    let entries = walk.cluster_bytes() / walk.entry_bytes();
    for (cluster, claims) in &walk.claims {
        let begin = cluster << bits;
        let mut tables = claims.iter().filter(|claim| !claim.is_data());
        let (Some(table), None) = (tables.next(), tables.next()) else {
            continue;
        };
        for (at, was) in walk.words(begin, walk.cluster_bytes()).iter().enumerate() {
            let may_change = match table {
                Claim::L2(index, true) => {
                    let guest = index * entries + at as u64 * 8 / walk.entry_bytes();
                    asked.touches(guest, bits)
                }
                Claim::L1 => {
                    let first = (begin + 8 * at as u64 - walk.l1_place()) / 8 * entries;
                    (first..first + entries).any(|guest| asked.touches(guest, bits))
                }
                // Blocks are added, and where they are stays.
                Claim::RefcountTable => *was == 0,
                _ => true,
            };
            let is = number(after, begin + 8 * at as u64, 8);
            if is != Some(*was) && !may_change {
                return Err(format!(
                    "word {at} of what is {claims:?} at {begin:#x} was {was:#x} and is {is:x?}: {asked:?}"
                ));
            }
        }
    }
    let Some(now) = Walk::new(after) else {
        return Err("its header is none any more".into());
    };
    let may_change = |claim: &Claim| match claim {
        Claim::Data(guest, _) | Claim::Compressed(guest) => asked.touches(*guest, bits),
        // It is copied, and let go of.
        Claim::L2(_, is_own) => !is_own,
        // A table that has become too short is moved.
        Claim::RefcountTable => true,
        // They are stored anew when the image is closed.
        Claim::BitmapDirectory | Claim::BitmapTable | Claim::BitmapData => true,
        _ => false,
    };
    let mut blocks = walk.claims.values();
    let tables = |claims: &[Claim]| claims.iter().filter(|claim| !claim.is_data()).count();
    if blocks.any(|claims| claims.contains(&Claim::RefcountBlock) && tables(claims) > 1) {
        // Counts that are something else, too, mean nothing.
        return Ok(());
    }
    for (cluster, claims) in &walk.claims {
        let (was, is) = (walk.count(*cluster), now.count(*cluster));
        if was > 0 && was != is && !claims.iter().any(may_change) {
            return Err(format!(
                "the count of {:#x}, which is {claims:?}, was {was} and is {is}: {asked:?}",
                cluster << bits
            ));
        }
    }
    Ok(())
}

/// Where the header has the place of the bitmaps' directory.
fn bitmap_extension(header: &[u8]) -> std::ops::Range<usize> {
    let word = |at: usize| number(header, at as u64, 4).unwrap_or(0) as usize;
    let mut at = word(100);
    while at < 512 && word(at) != 0 {
        let end = at + 8 + word(at + 4).next_multiple_of(8);
        if word(at) == 0x2385_2875 {
            return at + 8..end;
        }
        at = end;
    }
    0..0
}

/// The header says the same, but for what is changed in order.
fn look_at_header(before: &[u8], after: &[u8], asked: &Asked) -> Result<(), String> {
    let bytes = before.len().min(after.len()).min(512);
    let directory = bitmap_extension(before);
    for at in 0..bytes {
        let (was, is) = (before[at], after[at]);
        let may_change = match at {
            // Bitmaps are stored anew.
            at if directory.contains(&at) => true,
            24..72 => asked.changes_snapshots() || asked.resized || (48..60).contains(&at),
            // Marked as corrupt; or as in use no more.
            72..80 | 88..96 => true,
            _ => false,
        };
        if was != is && !may_change {
            return Err(format!(
                "byte {at} of the header was {was} and is {is}: {asked:?}"
            ));
        }
    }
    Ok(())
}

fn resident_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
