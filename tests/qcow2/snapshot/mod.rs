//! Internal snapshots: by us and by `qemu-img` in turns (`differential`), and cut off at any moment
//! (`cut`).

pub(crate) mod cut;
mod differential;

use std::path::Path;

use blockcore::ErrorKind;
use blockcore::driver::{SnapshotRef, SnapshotSpec};
use serde_json::Value;

use crate::setup::{Images, Process, assert_clean, contents, qemu, qemu_output};

const CLUSTER: u64 = 65536;

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

pub(crate) fn open(path: &Path) -> String {
    format!(
        "driver=qcow2,discard=unmap,file.driver=file,file.filename={}",
        text(path)
    )
}

pub(crate) fn named(name: &str) -> SnapshotSpec {
    SnapshotSpec {
        name: name.into(),
        seconds: 1_700_000_000,
        nanoseconds: 5_000_000,
        ..SnapshotSpec::default()
    }
}

/// A disk with data in its first clusters.
fn image(images: &Images, options: &str) -> std::path::PathBuf {
    let path = images.path("image.qcow2");
    let arguments = ["create", "-f", "qcow2", "-o", options, text(&path), "1M"];
    qemu("qemu-img", &arguments);
    qemu("qemu-io", &["-c", "write -P 1 0 256k", text(&path)]);
    path
}

/// What QEMU finds in a snapshot.
fn snapshot_contents(image: &Path, id: &str) -> Vec<u8> {
    let raw = image.with_extension("snapshot");
    let which = format!("snapshot.id={id}");
    let arguments = [
        "convert",
        "-l",
        &which,
        "-O",
        "raw",
        text(image),
        text(&raw),
    ];
    qemu("qemu-img", &arguments);
    let bytes = std::fs::read(&raw).expect("just made");
    std::fs::remove_file(&raw).expect("just made");
    bytes
}

/// The snapshots that QEMU lists.
fn listed(image: &Path) -> Vec<Value> {
    let info = qemu("qemu-img", &["info", "--output=json", text(image)]);
    let info: Value = serde_json::from_str(&info).expect("it prints JSON");
    let snapshots = info.get("snapshots").and_then(Value::as_array);
    snapshots.cloned().unwrap_or_default()
}

#[test]
fn what_is_overwritten_or_discarded_is_still_in_the_snapshot() {
    let images = Images::new();
    let path = image(&images, "compat=1.1");
    let before = contents(&path);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    disk.take_snapshot(named("kept")).unwrap();
    disk.write(0, &[2; 4096]);
    disk.discard(CLUSTER, CLUSTER);
    // What the next writes allocate must be nothing that the snapshot has.
    disk.write(512 << 10, &vec![3; 4 * CLUSTER as usize]);
    disk.close().unwrap();
    assert_clean(&path, "after the writes");
    assert_eq!(snapshot_contents(&path, "1"), before);
    let now = contents(&path);
    assert_eq!((now[0], now[4096]), (2, 1));
    assert_eq!(now[CLUSTER as usize], 0);
}

#[test]
fn a_snapshot_is_listed_as_it_was_described() {
    let images = Images::new();
    let path = image(&images, "compat=1.1");
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    let spec = SnapshotSpec {
        vm_clock_ns: 3_000_000_001,
        vm_state_bytes: 5 << 32,
        instructions: Some(77),
        ..named("a name")
    };
    disk.take_snapshot(spec).unwrap();
    let spec = SnapshotSpec {
        id: Some("12".into()),
        ..named("another")
    };
    disk.take_snapshot(spec).unwrap();
    disk.take_snapshot(named("third")).unwrap();
    let infos = disk.snapshots();
    disk.close().unwrap();
    let found = listed(&path);
    assert_eq!(found[0]["name"], "a name");
    assert_eq!(found[0]["vm-state-size"], 5_u64 << 32);
    assert_eq!(found[0]["date-sec"], 1_700_000_000);
    assert_eq!(found[0]["date-nsec"], 5_000_000);
    assert_eq!(found[0]["vm-clock-sec"], 3);
    assert_eq!(found[0]["vm-clock-nsec"], 1);
    assert_eq!(found[0]["icount"], 77);
    assert_eq!(
        (&found[1]["id"], &found[2]["id"]),
        (&"12".into(), &"13".into())
    );
    let disk = process.open(&open(&path)).unwrap();
    assert_eq!(disk.snapshots(), infos);
    assert_eq!(infos[0].instructions, Some(77));
    assert_eq!(infos[1].instructions, None);
    disk.close().unwrap();
}

#[test]
fn a_count_without_room_for_another_reference_refuses_the_snapshot_and_changes_nothing() {
    let images = Images::new();
    let path = image(&images, "refcount_bits=1");
    let before = contents(&path);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    let refused = disk.take_snapshot(named("no room")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    let sentence = refused.to_string();
    assert!(
        sentence.contains("'no room'") && sentence.contains("1 bits"),
        "{sentence}"
    );
    disk.write(0, &[2; 512]);
    disk.close().unwrap();
    assert_clean(&path, "after the refusal");
    assert_eq!(listed(&path).len(), 0);
    assert_eq!(contents(&path)[512..], before[512..]);
}

#[test]
fn an_image_with_an_external_data_file_has_no_snapshots() {
    let images = Images::new();
    let data = images.path("data.raw");
    let path = image(&images, &format!("data_file={}", text(&data)));
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    let refused = disk.take_snapshot(named("a")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("external data file"));
    disk.close().unwrap();
}

#[test]
fn a_snapshot_brings_back_its_length() {
    let images = Images::new();
    let path = image(&images, "compat=1.1");
    let before = contents(&path);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    disk.take_snapshot(named("short")).unwrap();
    disk.resize(2 << 30);
    disk.write((2 << 30) - 4096, &[7; 4096]);
    disk.take_snapshot(named("long")).unwrap();
    let disk = disk.apply_snapshot(SnapshotRef::name("short")).unwrap();
    assert_eq!(disk.root.bytes(), 1 << 20);
    assert_eq!(disk.read(0, 1 << 20), before);
    let disk = disk.apply_snapshot(SnapshotRef::name("long")).unwrap();
    assert_eq!(disk.root.bytes(), 2 << 30);
    assert_eq!(disk.read((2 << 30) - 4096, 4096), [7; 4096]);
    let disk = disk.apply_snapshot(SnapshotRef::name("short")).unwrap();
    disk.close().unwrap();
    assert_clean(&path, "after all of that");
    assert_eq!(contents(&path), before);
}

#[test]
fn a_snapshot_can_be_shown_to_readers_and_not_to_writers() {
    let images = Images::new();
    let path = image(&images, "compat=1.1");
    let before = contents(&path);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    disk.take_snapshot(named("then")).unwrap();
    disk.write(0, &[9; 4096]);
    disk.resize(2 << 20);
    disk.close().unwrap();
    let view = |which: &str| process.read_all(&format!("{},{which}", open(&path)));
    assert_eq!(view("snapshot.name=then").unwrap(), before);
    assert_eq!(view("snapshot.id=1,snapshot.name=then").unwrap(), before);
    assert_eq!(view("snapshot.id=1").unwrap(), before);
    let missing = view("snapshot.id=2").unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let written = process.open(&format!("{},snapshot.id=1", open(&path)));
    let refused = written.map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
}

#[test]
fn a_machines_state_goes_with_its_snapshot_and_comes_back_with_it() {
    for (options, unit) in [("cluster_size=512", 700), ("cluster_size=64k", 300_000)] {
        let images = Images::new();
        let path = image(&images, options);
        let before = contents(&path);
        let state: Vec<u8> = (0..1_000_000_u32).map(|n| (n / 7) as u8).collect();
        let process = Process::new();
        let disk = process.open(&open(&path)).unwrap();
        for (index, part) in state.chunks(unit).enumerate() {
            disk.save_vm_state((index * unit) as u64, part);
        }
        assert_eq!(disk.load_vm_state(0, 1_000_100)[..1_000_000], state);
        assert_eq!(disk.load_vm_state(1_000_000, 100), [0; 100]);
        let spec = SnapshotSpec {
            vm_state_bytes: state.len() as u64,
            ..named("with state")
        };
        disk.take_snapshot(spec).unwrap();
        // It is the snapshot's now.
        assert_eq!(disk.load_vm_state(0, 4096), [0; 4096]);
        disk.write(0, &[5; 100_352]);
        disk.close().unwrap();
        assert_clean(&path, "with a state");
        // QEMU brings it back, and we do.
        qemu("qemu-img", &["snapshot", "-a", "with state", text(&path)]);
        let disk = process.open(&open(&path)).unwrap();
        assert_eq!(disk.load_vm_state(0, 1_000_000), state);
        // A part of another state, over what the snapshot has.
        disk.save_vm_state(1000, &[0xee; 3000]);
        let mut other = state.clone();
        other[1000..4000].fill(0xee);
        assert_eq!(disk.load_vm_state(0, 1_000_000), other);
        let disk = disk.apply_snapshot(SnapshotRef::id("1")).unwrap();
        assert_eq!(disk.load_vm_state(0, 1_000_000), state);
        assert_eq!(disk.read(0, 1 << 20), before);
        // A disk that grows must not find it.
        disk.resize(64 << 20);
        assert!(disk.read(1 << 20, 63 << 20).iter().all(|byte| *byte == 0));
        disk.delete_snapshot(SnapshotRef::id("1")).unwrap();
        disk.close().unwrap();
        assert_clean(&path, "without the snapshot");
    }
}

#[test]
fn snapshots_of_qemus_are_deleted_by_us_and_those_of_ours_by_qemu() {
    let images = Images::new();
    let path = image(&images, "compat=1.1");
    qemu("qemu-img", &["snapshot", "-c", "theirs", text(&path)]);
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    disk.take_snapshot(named("ours")).unwrap();
    let info = disk.delete_snapshot(SnapshotRef::name("theirs")).unwrap();
    assert_eq!((&*info.id, &*info.name), ("1", "theirs"));
    disk.close().unwrap();
    assert_clean(&path, "after ours");
    let before = std::fs::metadata(&path).unwrap().len();
    qemu("qemu-img", &["snapshot", "-d", "ours", text(&path)]);
    assert_clean(&path, "after theirs");
    assert_eq!(listed(&path).len(), 0);
    // Nobody has leaked: taking and deleting them again takes no more space.
    for _ in 0..20 {
        let disk = process.open(&open(&path)).unwrap();
        disk.take_snapshot(named("again")).unwrap();
        disk.delete_snapshot(SnapshotRef::name("again")).unwrap();
        disk.close().unwrap();
    }
    assert_clean(&path, "after many");
    let after = std::fs::metadata(&path).unwrap().len();
    assert!(
        after <= before + 8 * CLUSTER,
        "{before} bytes, then {after}"
    );
    let output = qemu_output("qemu-img", &["compare", text(&path), text(&path)]);
    assert!(output.status.success());
}
