//! Amendments: of a disk that is in use, and cut off at any moment. What they make of images is compared with
//! QEMU's in test `img`.

use std::path::Path;

use blockcore::ErrorKind;
use blockcore::driver::{SnapshotRef, ZeroFlags};
use blockcore::engine::sim::{Faults, Random};
use blockcore::options::Options;
use serde_json::Value;

use crate::setup::{Images, Process, assert_clean, contents, qemu};
use crate::snapshot::cut::Held;
use crate::snapshot::{named, open, text};
use crate::world::{LIMIT, World, assert_usable, moment};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 25;
/// How often the power is cut in each amendment.
const CUTS: u64 = 8;
const CLUSTER: u64 = 65536;

/// What QEMU says of an image's version and features.
fn features(image: &Path) -> Value {
    let info = qemu("qemu-img", &["info", "--output=json", text(image)]);
    let mut info: Value = serde_json::from_str(&info).expect("it prints JSON");
    info["format-specific"]["data"].take()
}

#[test]
fn a_disk_in_use_is_amended_and_goes_on() {
    let images = Images::new();
    let path = images.path("image.qcow2");
    qemu("qemu-img", &["create", "-f", "qcow2", text(&path), "2M"]);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    let mut model = vec![0; 2 << 20];
    let mut write = |disk: &crate::setup::Disk, offset: usize, byte: u8| {
        disk.write(offset as u64, &vec![byte; 100_000]);
        model[offset..offset + 100_000].fill(byte);
    };
    write(&disk, 0, 1);
    disk.take_snapshot(named("before")).unwrap();
    write(&disk, 50_000, 2);
    disk.write_zeroes(0, CLUSTER, ZeroFlags::empty());
    // Less than what snapshots need at once.
    let error = disk.amend("refcount-bits=1", false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    for options in [
        "refcount-bits=64,lazy-refcounts=on",
        "refcount-bits=2,lazy-refcounts=off",
        "refcount-bits=16,version=v2",
        "version=v3",
    ] {
        disk.amend(options, false).unwrap();
        write(&disk, 300_000, options.len() as u8);
        disk.flush();
    }
    disk.amend("size=3M", false).unwrap();
    assert_eq!(disk.root.bytes(), 3 << 20);
    let error = disk.amend("size=2M", false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    disk.amend("size=2M", true).unwrap();
    write(&disk, 1 << 20, 9);
    model[..CLUSTER as usize].fill(0);
    assert_eq!(disk.read(0, 2 << 20), model);
    let disk = disk.apply_snapshot(SnapshotRef::name("before")).unwrap();
    let mut snapshot = vec![0; 2 << 20];
    snapshot[..100_000].fill(1);
    assert_eq!(disk.read(0, 2 << 20), snapshot);
    disk.close().unwrap();
    assert_clean(&path, "closed");
    assert_eq!(contents(&path), snapshot);
}

#[test]
fn a_refused_amendment_writes_nothing() {
    let images = Images::new();
    let path = images.path("image.qcow2");
    let create = ["create", "-f", "qcow2", text(&path), "1M"];
    qemu("qemu-img", &create);
    qemu("qemu-io", &["-c", "write -P 1 0 256k", text(&path)]);
    qemu("qemu-img", &["snapshot", "-c", "one", text(&path)]);
    let before = std::fs::read(&path).unwrap();
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    for options in [
        // The snapshot and the disk have clusters in common.
        "refcount-bits=1",
        "lazy-refcounts=on,refcount-bits=1",
        "version=v2,refcount-bits=8",
        "version=v2,size=2M",
        "size=512k",
        "data-file=x",
        "backing-file=x",
    ] {
        disk.amend(options, false).unwrap_err();
        assert_eq!(disk.read(0, 4096), [1; 4096]);
        assert!(std::fs::read(&path).unwrap() == before, "{options}");
    }
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "closed");
}

#[derive(Debug)]
struct Case {
    seed: u64,
    create: String,
    amend: String,
    bytes: u64,
    cluster: u64,
    backing: bool,
    snapshots: bool,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let cluster = 1_u64 << (9 + random.below(8));
        let bytes = (cluster * (40 + random.below(200))).min(1 << 20) / 512 * 512;
        let is_v2 = random.below(3) == 0;
        let bits = |random: &mut Random| 4 << random.below(5);
        let mut create = format!("cluster_size={cluster}");
        match is_v2 {
            true => create.push_str(",compat=0.10"),
            false => create.push_str(&format!(",refcount_bits={}", bits(&mut random))),
        }
        let amend = match random.below(4) {
            0 if !is_v2 => "version=v2,refcount-bits=16".into(),
            1 if !is_v2 => format!("refcount-bits={}", bits(&mut random)),
            2 if is_v2 => "version=v3".into(),
            _ => {
                let bits = bits(&mut random);
                format!("version=v3,lazy-refcounts=on,refcount-bits={bits}")
            }
        };
        Self {
            seed,
            create,
            amend,
            bytes,
            cluster,
            backing: random.below(4) == 0,
            snapshots: random.below(3) > 0,
        }
    }

    /// An image with all kinds of clusters, which QEMU has made.
    fn make(&self, images: &Images, image: &Path) {
        let mut random = Random::new(self.seed + 1);
        let (path, bytes) = (text(image), self.bytes.to_string());
        let mut create = vec!["create", "-f", "qcow2", "-o", &self.create];
        let base = images.path("base");
        if self.backing {
            qemu("qemu-img", &["create", "-f", "raw", text(&base), &bytes]);
            let fill = format!("write -P 0xbb 0 {bytes}");
            qemu("qemu-io", &["-f", "raw", "-c", &fill, text(&base)]);
            create.extend(["-b", text(&base), "-F", "raw"]);
        }
        create.extend([path, &bytes]);
        qemu("qemu-img", &create);
        let is_v2 = self.create.contains("0.10");
        for index in 0..3 {
            let mut commands = Vec::new();
            for _ in 0..3 + random.below(6) {
                let first = random.below(self.bytes / self.cluster) * self.cluster;
                let length = (1 + random.below(8)) * self.cluster;
                let length = length.min(self.bytes - first);
                let fill = 1 + random.below(255);
                commands.push(match random.below(4) {
                    0 if !is_v2 => format!("write -z {first} {length}"),
                    1 if !is_v2 => format!("write -z -u {first} {length}"),
                    _ => format!("write -P {fill} {first} {length}"),
                });
            }
            let mut arguments = vec!["-f", "qcow2"];
            for command in &commands {
                arguments.extend(["-c", command]);
            }
            arguments.push(path);
            qemu("qemu-io", &arguments);
            if index < 2 && self.snapshots {
                let name = format!("theirs {index}");
                qemu("qemu-img", &["snapshot", "-c", &name, path]);
            }
        }
        if self.backing {
            // It is not there in the simulation, and must not be missed.
            let rebase = ["rebase", "-u", "-f", "qcow2", "-b", "", path];
            qemu("qemu-img", &rebase);
        }
    }
}

#[derive(Debug, Default)]
struct Totals {
    before: u64,
    after: u64,
    failed: u64,
}

async fn amend(
    control: blockcore::graph::Control,
    options: String,
) -> Result<(), blockcore::Error> {
    let options = Options::parse(&options, None)?;
    control.amend("disk", options, false).await
}

#[test]
fn a_power_cut_leaves_a_clean_image_that_holds_what_it_held_in_either_version() {
    let totals = harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, cut);
    if let Some(totals) = totals {
        let least = totals.before.min(totals.after);
        assert!(least > DEFAULT_SEEDS, "{totals:?}");
    }
}

fn cut(case: &Case, totals: &mut Totals) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    case.make(&images, &image);
    let held = Held::by(&image);
    let before = features(&image);
    let bytes = std::fs::read(&image).expect("just made");
    let world = World::opened(case.seed, &bytes);
    let begun = world.simulation.now();
    let options = case.amend.clone();
    let done = world.run(|control| amend(control, options));
    done.expect("nothing fails");
    let takes = world.simulation.now() - begun;
    let closed = world.run(|control| async move { control.remove("disk").await });
    closed.expect("nothing fails");
    let left = images.path("left.qcow2");
    world.dump(&left);
    assert_clean(&left, "uncut");
    assert_eq!(Held::by(&left), held, "uncut");
    let after = features(&left);
    let mut random = Random::new(case.seed);
    for index in 0..CUTS {
        let world = World::opened(case.seed, &bytes);
        let share = moment(&mut random);
        let options = case.amend.clone();
        world.run_for(takes * share as u32 / 1000, |control| {
            amend(control, options)
        });
        let is_kill = world.cut_off(&mut random);
        world.dump(&left);
        let when = format!("cut {index}, after {share} permille, kill: {is_kill}");
        assert_clean(&left, &when);
        assert!(Held::by(&left) == held, "{when}: it holds something else");
        match features(&left) {
            now if now == before => totals.before += 1,
            now if now == after => totals.after += 1,
            now => panic!("{when}: it is neither as before nor as after: {now}"),
        }
    }
}

#[test]
fn a_host_that_fails_leaves_the_image_as_it_was_or_amended() {
    let totals = harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, fail);
    if let Some(totals) = totals {
        assert!(totals.failed > DEFAULT_SEEDS / 2, "{totals:?}");
    }
}

fn fail(case: &Case, totals: &mut Totals) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    case.make(&images, &image);
    let held = Held::by(&image);
    let bytes = std::fs::read(&image).expect("just made");
    let left = images.path("left.qcow2");
    let mut random = Random::new(case.seed);
    for attempt in 0..4 {
        let world = World::opened(case.seed + 1000 * attempt, &bytes);
        let permille = 1 + random.below(80) as u32;
        world.simulation.set_faults(Faults {
            read_error_permille: permille / 4,
            write_error_permille: permille,
            sync_error_permille: permille,
            no_space_permille: permille,
            ..Faults::default()
        });
        let options = case.amend.clone();
        let done = world.run_for(LIMIT, |control| amend(control, options));
        let done = done.expect("it ends");
        world.simulation.set_faults(Faults::default());
        let closed = world.run(|control| async move { control.remove("disk").await });
        world.dump(&left);
        assert_usable(&left, &format!("{done:?}, {closed:?}"));
        assert!(Held::by(&left) == held, "{done:?}: it holds something else");
        totals.failed += u64::from(done.is_err());
    }
}

#[test]
fn an_image_that_another_process_had_is_read_anew() {
    let images = Images::new();
    let path = images.path("image.qcow2");
    qemu("qemu-img", &["create", "-f", "qcow2", text(&path), "2M"]);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    disk.write(0, &[1; 100_000]);
    let lent = disk.lend(|| {
        assert_clean(&path, "handed over");
        qemu("qemu-io", &["-c", "write -P 2 64k 1M", text(&path)]);
        qemu("qemu-img", &["snapshot", "-c", "theirs", text(&path)]);
        qemu("qemu-img", &["resize", "-q", text(&path), "3M"]);
    });
    let disk = lent.unwrap();
    assert_eq!(disk.root.bytes(), 3 << 20);
    assert_eq!(disk.read(CLUSTER, 4096), [2; 4096]);
    assert_eq!(disk.snapshots().len(), 1);
    // What is written goes to no cluster that they have used, and to none of the snapshot's.
    disk.write(32 << 10, &[3; 64 << 10]);
    disk.write(2 << 20, &[4; 512 << 10]);
    disk.delete_snapshot(SnapshotRef::name("theirs")).unwrap();
    disk.close().unwrap();
    assert_clean(&path, "closed");
    let now = contents(&path);
    let at = [0, 40 << 10, 100 << 10, 2 << 20].map(|offset: usize| now[offset]);
    assert_eq!(at, [1, 3, 2, 4]);
}

#[test]
fn a_disk_in_use_gets_caches_of_other_sizes() {
    let images = Images::new();
    let path = images.path("image.qcow2");
    let create = [
        "create",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=512",
        text(&path),
        "4M",
    ];
    qemu("qemu-img", &create);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    let mut random = Random::new(1);
    let mut model = vec![0; 4 << 20];
    for options in [
        "l2-cache-size=4k,refcount-cache-size=2k",
        "l2-cache-entry-size=512,cache-size=1M",
        "discard=unmap,lazy-refcounts=on,overlap-check=none",
        "overlap-check.template=all,overlap-check.inactive-l2=off",
        "discard=ignore",
    ] {
        for _ in 0..20 {
            let offset = random.below(8000) * 512;
            let byte = 1 + random.below(255) as u8;
            disk.write(offset, &[byte; 2048]);
            model[offset as usize..][..2048].fill(byte);
        }
        disk.reopen(options).unwrap();
        assert_eq!(disk.read(0, 4 << 20), model, "{options}");
    }
    for (options, says) in [
        ("l2-cache-size=2M,cache-size=1M", "cache-size"),
        ("overlap-check=some", "overlap-check"),
        (
            "overlap-check=all,overlap-check.template=none",
            "conflicting",
        ),
        ("snapshot.id=1", "snapshot"),
    ] {
        let error = disk.reopen(options).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        disk.write(0, &[7; 512]);
        assert_eq!(disk.read(0, 512), [7; 512], "{options}");
    }
    model[..512].fill(7);
    disk.close().unwrap();
    assert_clean(&path, "closed");
    assert_eq!(contents(&path), model);
}

#[test]
fn counts_that_come_later_are_refused_where_the_image_cannot_say_so() {
    let images = Images::new();
    let path = images.path("image.qcow2");
    let create = [
        "create",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        text(&path),
        "1M",
    ];
    qemu("qemu-img", &create);
    let options = format!("{},lazy-refcounts=on", open(&path));
    let error = Process::new().open(&options).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
}
