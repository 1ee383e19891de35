//! Random operations and snapshots on images of every kind, by us and by QEMU in turns: the disk and each
//! snapshot hold what they should by both, and `qemu-img check` finds nothing wrong after any step.

use std::fmt::Write as _;
use std::path::Path;

use blockcore::ErrorKind;
use blockcore::driver::{SnapshotRef, ZeroFlags};
use blockcore::engine::sim::Random;

use super::{listed, named, snapshot_contents, text};
use crate::setup::{Disk, Images, Process, assert_clean, contents, qemu, qemu_output};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 15;
/// Steps that each image goes through.
const STEPS: u64 = 12;
/// Most snapshots that an image has at a time.
const MOST: usize = 4;

#[derive(Debug)]
struct Case {
    seed: u64,
    options: String,
    open: String,
    cluster: u64,
    bytes: u64,
    compat_v2: bool,
    refcount_bits: u64,
    backing: bool,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut one_of = |many: u64| random.below(many);
        let cluster = 1_u64 << (9 + one_of(8));
        let compat_v2 = one_of(5) == 0;
        let bytes = (cluster * (20 + one_of(200))).clamp(1 << 16, 1 << 20) / 512 * 512;
        let mut options = format!("cluster_size={cluster}");
        let mut refcount_bits = 16;
        match compat_v2 {
            true => options.push_str(",compat=0.10"),
            false => {
                refcount_bits = 1 << one_of(7);
                write!(options, ",refcount_bits={refcount_bits}").unwrap();
                if cluster >= 16384 && one_of(2) == 0 {
                    options.push_str(",extended_l2=on");
                }
                if one_of(3) == 0 {
                    options.push_str(",compression_type=zstd");
                }
            }
        }
        let mut open = "driver=qcow2,discard=unmap".to_owned();
        match one_of(4) {
            0 => open.push_str(",l2-cache-size=4k,refcount-cache-size=1k"),
            1 => open.push_str(",l2-cache-entry-size=512"),
            2 => open.push_str(",pass-discard-snapshot=off"),
            _ => {}
        }
        Self {
            seed,
            options,
            open,
            cluster,
            bytes,
            compat_v2,
            refcount_bits,
            backing: one_of(3) == 0,
        }
    }
}

/// What the image must hold.
struct Model {
    disk: Vec<u8>,
    /// Each by its identifier.
    snapshots: Vec<(String, Vec<u8>)>,
    names: u64,
}

/// What was tried.
#[derive(Debug, Default)]
struct Totals {
    taken: u64,
    applied: u64,
    deleted: u64,
    refused: u64,
}

#[test]
fn snapshots_of_images_of_every_kind_hold_what_they_held_when_they_were_taken() {
    let totals = harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, run);
    if let Some(totals) = totals {
        let least = [totals.taken, totals.applied, totals.deleted, totals.refused];
        assert!(least.iter().all(|count| *count > 5), "{totals:?}");
    }
}

fn run(case: &Case, totals: &mut Totals) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    let mut model = Model {
        disk: vec![0; case.bytes as usize],
        snapshots: Vec::new(),
        names: 0,
    };
    let bytes = case.bytes.to_string();
    let mut create = vec!["create", "-f", "qcow2", "-o", &case.options];
    let base = images.path("base");
    if case.backing {
        qemu("qemu-img", &["create", "-f", "raw", text(&base), &bytes]);
        let fill = format!("write -P 0xbb 0 {bytes}");
        qemu("qemu-io", &["-f", "raw", "-c", &fill, text(&base)]);
        model.disk.fill(0xbb);
        create.extend(["-b", text(&base), "-F", "raw"]);
    }
    create.extend([text(&image), &bytes]);
    qemu("qemu-img", &create);
    let mut random = Random::new(case.seed.wrapping_add(1000));
    for step in 0..STEPS {
        let ours = random.below(3) > 0;
        match ours {
            true => our_turn(case, &image, &mut random, &mut model, totals),
            false => qemus_turn(case, &image, &mut random, &mut model),
        }
        let when = format!("step {step}, {}", if ours { "ours" } else { "QEMU's" });
        assert_clean(&image, &when);
        compare(&contents(&image), &model.disk, &when);
        check_snapshots(case, &image, &model, &when);
    }
}

fn check_snapshots(case: &Case, image: &Path, model: &Model, when: &str) {
    let ids: Vec<_> = listed(image)
        .iter()
        .map(|snapshot| snapshot["id"].as_str().expect("a text").to_owned())
        .collect();
    let expected: Vec<_> = model.snapshots.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(ids, expected, "{when}");
    for (id, held) in &model.snapshots {
        let found = match held.len() == model.disk.len() {
            true => Some(snapshot_contents(image, id)),
            // It shows a snapshot with the disk's length of now.
            false => applied_to_copy(image, id),
        };
        if let Some(found) = found {
            compare(&found, held, &format!("{when}: QEMU of snapshot {id}"));
        }
        let view = Process::new().read_all(&format!(
            "{},snapshot.id={id},file.driver=file,file.filename={}",
            case.open,
            text(image)
        ));
        let view = view.expect("it can be shown");
        compare(&view, held, &format!("{when}: we of snapshot {id}"));
    }
}

/// What QEMU makes of the disk with a snapshot; `None` where it finds no room to count that.
fn applied_to_copy(image: &Path, id: &str) -> Option<Vec<u8>> {
    let copy = image.with_extension("copy");
    std::fs::copy(image, &copy).expect("there is room for tests");
    let arguments = ["snapshot", "-a", id, text(&copy)];
    let applied = qemu_output("qemu-img", &arguments).status.success();
    applied.then(|| {
        assert_clean(&copy, "applied to a copy");
        contents(&copy)
    })
}

fn compare(found: &[u8], expected: &[u8], who: &str) {
    assert_eq!(found.len(), expected.len(), "{who}");
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        panic!(
            "{who}: byte {at:#x} is {:#x} and not {:#x}",
            found[at], expected[at]
        );
    }
}

/// A range of the disk; often at the edges of clusters.
fn range(case: &Case, random: &mut Random, bytes: u64) -> (u64, u64) {
    let unit = match random.below(3) {
        0 => case.cluster,
        _ => 512,
    };
    let unit = unit.min(bytes);
    let offset = random.below(bytes / unit) * unit;
    let most = (bytes - offset).min(case.cluster * 9);
    let length = (1 + random.below(most.div_ceil(unit))) * unit;
    (offset, length.min(bytes - offset))
}

fn our_turn(
    case: &Case,
    image: &Path,
    random: &mut Random,
    model: &mut Model,
    totals: &mut Totals,
) {
    let process = Process::new();
    let file = format!("file.driver=file,file.filename={}", text(image));
    let options = format!("{},{file}", case.open);
    let mut disk = process.open(&options).expect("it can be opened");
    for _ in 0..3 + random.below(8) {
        disk = our_operation(case, disk, random, model, totals);
    }
    let bytes = model.disk.len() as u64;
    disk.check_status(&model.disk);
    compare(&disk.read(0, bytes), &model.disk, "we, at the end");
    disk.close().expect("it can be closed");
}

fn our_operation(
    case: &Case,
    mut disk: Disk,
    random: &mut Random,
    model: &mut Model,
    totals: &mut Totals,
) -> Disk {
    let bytes = model.disk.len() as u64;
    let (offset, length) = range(case, random, bytes);
    let part = offset as usize..(offset + length) as usize;
    let fill = random.below(255) as u8 + 1;
    let which = model.snapshots.len();
    match random.below(14) {
        0..=4 => {
            disk.write(offset, &vec![fill; length as usize]);
            model.disk[part].fill(fill);
        }
        5 => {
            disk.write_zeroes(offset, length, ZeroFlags::MAY_UNMAP);
            model.disk[part].fill(0);
        }
        6 => {
            disk.discard(offset, length);
            model.disk[part].copy_from_slice(&disk.read(offset, length));
        }
        7 => {
            let offset = offset / case.cluster * case.cluster;
            let length = case.cluster.min(bytes - offset);
            disk.write_compressed(offset, &vec![fill; length as usize]);
            model.disk[offset as usize..(offset + length) as usize].fill(fill);
        }
        8 if !case.compat_v2 => {
            let bytes = (bytes / 2 + random.below(bytes)).next_multiple_of(512);
            disk.resize(bytes.min(2 << 20));
            model.disk.resize(bytes.min(2 << 20) as usize, 0);
        }
        9 | 10 if which < MOST => {
            model.names += 1;
            match disk.take_snapshot(named(&format!("ours {}", model.names))) {
                Ok(()) => {
                    let id = disk.snapshots().last().expect("just taken").id.clone();
                    model.snapshots.push((id, model.disk.clone()));
                    totals.taken += 1;
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                    assert!(case.refcount_bits < 16, "{error}");
                    totals.refused += 1;
                }
            }
        }
        11 if which > 0 => {
            let (id, held) = &model.snapshots[random.below(which as u64) as usize];
            disk = disk
                .apply_snapshot(SnapshotRef::id(id))
                .unwrap_or_else(|error| panic!("{error}"));
            model.disk.clone_from(held);
            totals.applied += 1;
        }
        12 if which > 0 => {
            let (id, _) = model.snapshots.remove(random.below(which as u64) as usize);
            disk.delete_snapshot(SnapshotRef::id(&id))
                .unwrap_or_else(|error| panic!("{error}"));
            totals.deleted += 1;
        }
        _ => disk.flush(),
    }
    disk
}

fn qemus_turn(case: &Case, image: &Path, random: &mut Random, model: &mut Model) {
    let mut arguments = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
    for _ in 0..random.below(6) {
        let (offset, length) = range(case, random, model.disk.len() as u64);
        let part = offset as usize..(offset + length) as usize;
        let fill = random.below(255) as u8 + 1;
        let command = match random.below(4) {
            0 => {
                model.disk[part].fill(0);
                format!("write -z -u {offset} {length}")
            }
            _ => {
                model.disk[part].fill(fill);
                format!("write -P {fill} {offset} {length}")
            }
        };
        arguments.extend(["-c".to_owned(), command]);
    }
    arguments.extend(["-c".to_owned(), "flush".into(), text(image).to_owned()]);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    qemu("qemu-io", &arguments);
    let count = model.snapshots.len();
    let chosen = random.below(count.max(1) as u64) as usize;
    // QEMU leaves an image damaged where a count overflows half-way.
    let has_room = case.refcount_bits >= 16;
    match random.below(3) {
        0 if count < MOST && has_room => {
            model.names += 1;
            let name = format!("theirs {}", model.names);
            let before = listed(image).len();
            qemu("qemu-img", &["snapshot", "-c", &name, text(image)]);
            let id = listed(image)[before]["id"].as_str().unwrap().to_owned();
            model.snapshots.push((id, model.disk.clone()));
        }
        1 if count > 0 && has_room => {
            let (id, held) = &model.snapshots[chosen];
            let arguments = ["snapshot", "-a", id, text(image)];
            if qemu_output("qemu-img", &arguments).status.success() {
                model.disk.clone_from(held);
            }
        }
        2 if count > 0 => {
            model.snapshots.remove(chosen);
            let name = listed(image)[chosen]["name"].as_str().unwrap().to_owned();
            qemu("qemu-img", &["snapshot", "-d", &name, text(image)]);
        }
        _ => {}
    }
}
