//! Persistent bitmaps: by us and by QEMU's tools in turns (`differential`), cut off at any moment (`cut`), and
//! in images that nobody should believe (`hostile`); through a daemon (`served`).

mod cut;
mod differential;
mod hostile;
mod served;

use std::path::Path;

use blockcore::dirty_bitmap::Status;
use blockcore::graph::BitmapSpec;
use blockcore::{Error, ErrorKind};
use serde_json::Value;

use crate::setup::{Disk, Images, Process, assert_clean, qemu};

const CLUSTER: u64 = 65536;

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

fn open(path: &Path) -> String {
    format!(
        "driver=qcow2,discard=unmap,file.driver=file,file.filename={}",
        text(path)
    )
}

/// A persistent bitmap that records.
fn persistent(name: &str) -> BitmapSpec {
    BitmapSpec {
        name: name.into(),
        granularity_bytes: None,
        persistent: true,
        enabled: true,
    }
}

fn add(disk: &Disk, spec: BitmapSpec) -> Result<(), Error> {
    disk.control(|control| async move { control.add_bitmap("disk", &spec).await })
}

fn remove(disk: &Disk, name: &'static str) -> Result<(), Error> {
    disk.control(move |control| async move { control.remove_bitmap("disk", name).await })
}

fn statuses(disk: &Disk) -> Vec<Status> {
    disk.look(|graph| graph.node("disk").unwrap().bitmaps().statuses())
}

/// What a bitmap has marked: where, and how many bytes.
fn marked(disk: &Disk, name: &str) -> Vec<(u64, u64)> {
    disk.look(|graph| {
        let bits = graph.node("disk").unwrap().bitmaps().get(name).unwrap();
        let bits = bits.bits();
        let areas = bits.areas(0, bits.length(), u64::MAX);
        areas.map(|area| (area.offset, area.bytes)).collect()
    })
}

/// What a stored bitmap has marked, by QEMU's judgement.
fn marked_by_qemu(image: &Path, name: &str) -> Vec<(u64, u64)> {
    let directory = tempfile::tempdir().expect("there is room for tests");
    let (socket, pid) = (directory.path().join("s"), directory.path().join("pid"));
    let file = format!(
        "driver=file,node-name=f,read-only=on,locking=off,filename={}",
        text(image)
    );
    let server = format!("addr.type=unix,addr.path={}", text(&socket));
    let export = format!("type=nbd,id=e,node-name=q,name=q,bitmaps.0={name}");
    qemu(
        "qemu-storage-daemon",
        &[
            "--blockdev",
            &file,
            "--blockdev",
            "driver=qcow2,node-name=q,file=f,read-only=on",
            "--nbd-server",
            &server,
            "--export",
            &export,
            "--pidfile",
            text(&pid),
            "--daemonize",
        ],
    );
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=q,x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        text(&socket)
    );
    let map = qemu(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &options],
    );
    let pid = std::fs::read_to_string(&pid).expect("it is running");
    let killed = std::process::Command::new("kill").arg(pid.trim()).status();
    assert!(killed.expect("there is a kill").success());
    let map: Value = serde_json::from_str(&map).expect("it prints JSON");
    let extents = map.as_array().expect("a list").iter();
    let dirty = extents.filter(|extent| extent["data"] == false);
    let number = |extent: &Value, key: &str| extent[key].as_u64().expect("a number");
    dirty
        .map(|extent| (number(extent, "start"), number(extent, "length")))
        .collect()
}

/// The bitmaps in an image that is open: name, granularity, flags.
fn listed_now(image: &Path) -> Vec<(String, u64, Vec<String>)> {
    let copy = image.with_extension("now");
    std::fs::copy(image, &copy).expect("there is room for tests");
    listed(&copy)
}

/// The bitmaps that QEMU lists: name, granularity, flags.
fn listed(image: &Path) -> Vec<(String, u64, Vec<String>)> {
    let info = qemu("qemu-img", &["info", "--output=json", text(image)]);
    let info: Value = serde_json::from_str(&info).expect("it prints JSON");
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array();
    let bitmaps = bitmaps.cloned().unwrap_or_default();
    let described = bitmaps.iter().map(|bitmap| {
        let flags = bitmap["flags"].as_array().expect("a list").iter();
        (
            bitmap["name"].as_str().expect("a text").to_owned(),
            bitmap["granularity"].as_u64().expect("a number"),
            flags
                .map(|flag| flag.as_str().unwrap().to_owned())
                .collect(),
        )
    });
    described.collect()
}

fn image(images: &Images, options: &str, size: &str) -> std::path::PathBuf {
    let path = images.path("image.qcow2");
    let arguments = ["create", "-f", "qcow2", "-o", options, text(&path), size];
    qemu("qemu-img", &arguments);
    path
}

#[test]
fn a_bitmap_is_kept_and_goes_on_recording_when_the_image_is_opened_again() {
    let images = Images::new();
    let path = image(&images, "compat=1.1", "10M");
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    add(&disk, persistent("b")).unwrap();
    disk.write(CLUSTER, &[1; 512]);
    disk.close().unwrap();
    assert_clean(&path, "after the first");
    assert_eq!(marked_by_qemu(&path, "b"), [(CLUSTER, CLUSTER)]);
    let disk = process.open(&open(&path)).unwrap();
    assert_eq!(marked(&disk, "b"), [(CLUSTER, CLUSTER)]);
    assert!(statuses(&disk)[0].recording && statuses(&disk)[0].persistent);
    disk.discard(4 * CLUSTER, CLUSTER);
    disk.close().unwrap();
    assert_clean(&path, "after the second");
    let both = [(CLUSTER, CLUSTER), (4 * CLUSTER, CLUSTER)];
    assert_eq!(marked_by_qemu(&path, "b"), both);
    // QEMU goes on where we have ended, and we where QEMU has.
    qemu("qemu-io", &["-c", "write 6M 64k", text(&path)]);
    let disk = process.open(&open(&path)).unwrap();
    assert_eq!(marked(&disk, "b")[2], (6 << 20, CLUSTER));
    disk.close().unwrap();
    assert_eq!(listed(&path), [("b".into(), CLUSTER, vec!["auto".into()])]);
    assert_clean(&path, "at the end");
}

#[test]
fn a_bitmap_of_an_image_that_is_only_read_is_read_only_and_the_image_stays_as_it_is() {
    let images = Images::new();
    let path = image(&images, "compat=1.1", "10M");
    qemu("qemu-img", &["bitmap", "--add", text(&path), "b"]);
    qemu("qemu-io", &["-c", "write 1M 64k", text(&path)]);
    let before = std::fs::read(&path).unwrap();
    let process = Process::new();
    let disk = process
        .open_to_read(&format!("read-only=on,{}", open(&path)))
        .unwrap();
    assert_eq!(marked(&disk, "b"), [(1 << 20, CLUSTER)]);
    let refused = remove(&disk, "b").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    let refused = add(&disk, persistent("c")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
    // Nor does it change where it could be written to, and is not.
    let disk = process.open(&open(&path)).unwrap();
    assert_eq!(marked(&disk, "b"), [(1 << 20, CLUSTER)]);
    disk.close().unwrap();
    assert_eq!(listed(&path).len(), 1);
    assert_eq!(marked_by_qemu(&path, "b"), [(1 << 20, CLUSTER)]);
}

#[test]
fn what_is_written_without_the_bitmap_being_stored_makes_it_inconsistent_until_it_is_removed() {
    let images = Images::new();
    let path = image(&images, "compat=1.1", "10M");
    for name in ["a", "b"] {
        qemu("qemu-img", &["bitmap", "--add", text(&path), name]);
    }
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    let copy = images.path("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    assert!(!listed(&copy)[0].2.contains(&"in-use".to_owned()));
    // As a kill right after would leave it.
    disk.write(0, &[1; 512]);
    std::fs::copy(&path, &copy).unwrap();
    disk.close().unwrap();
    let in_use = vec!["in-use".to_owned(), "auto".to_owned()];
    assert_eq!(listed(&copy)[1], ("b".into(), CLUSTER, in_use));
    let disk = process.open(&open(&copy)).unwrap();
    assert!(statuses(&disk).iter().all(|status| status.inconsistent));
    let refused = disk.control(|control| async move {
        let change =
            |bitmaps: &mut blockcore::dirty_bitmap::BitmapSet| bitmaps.get_mut("a")?.enable();
        control.change_bitmaps("disk", change).await
    });
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Corrupt);
    let resized = disk.control(|control| async move {
        let off = blockcore::driver::Preallocation::Off;
        control.resize("disk", 20 << 20, off).await
    });
    assert_eq!(resized.unwrap_err().kind(), ErrorKind::Corrupt);
    remove(&disk, "a").unwrap();
    disk.close().unwrap();
    assert_eq!(listed(&copy).len(), 1);
    assert_clean(&copy, "with one removed");
    let disk = process.open(&open(&copy)).unwrap();
    remove(&disk, "b").unwrap();
    disk.close().unwrap();
    assert!(listed(&copy).is_empty());
    assert_clean(&copy, "with both removed");
}

#[test]
fn a_bitmap_follows_the_length_of_its_disk() {
    let images = Images::new();
    let path = image(&images, "cluster_size=4k", "1M");
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    add(&disk, persistent("b")).unwrap();
    disk.write((1 << 20) - 4096, &[1; 4096]);
    let resize = |disk: &Disk, bytes: u64| {
        let off = blockcore::driver::Preallocation::Off;
        disk.control(move |control| async move { control.resize("disk", bytes, off).await })
    };
    resize(&disk, 1 << 30).unwrap();
    disk.write(1 << 29, &[1; 4096]);
    disk.close().unwrap();
    assert_clean(&path, "longer");
    let marks = [((1 << 20) - 4096, 4096), (1 << 29, 4096)];
    assert_eq!(marked_by_qemu(&path, "b"), marks);
    let disk = process.open(&open(&path)).unwrap();
    assert_eq!(marked(&disk, "b"), marks);
    resize(&disk, 1 << 20).unwrap();
    disk.close().unwrap();
    assert_clean(&path, "shorter again");
    assert_eq!(marked_by_qemu(&path, "b"), marks[..1]);
}

#[test]
fn what_an_image_cannot_keep_is_refused_before_there_is_a_bitmap() {
    let images = Images::new();
    let path = image(&images, "compat=0.10", "10M");
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    let refused = add(&disk, persistent("b")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.to_string().contains("version 2"), "{refused}");
    let volatile = BitmapSpec {
        persistent: false,
        ..persistent("b")
    };
    add(&disk, volatile).unwrap();
    let again = add(&disk, persistent("b")).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Exists);
    disk.close().unwrap();
    let path = image(&images, "compat=1.1", "512G");
    let disk = process.open(&open(&path)).unwrap();
    let fine = BitmapSpec {
        granularity_bytes: Some(512),
        ..persistent("b")
    };
    let refused = add(&disk, fine).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.to_string().contains("granularity"), "{refused}");
    disk.close().unwrap();
    assert!(listed(&path).is_empty());
}

#[test]
fn bitmaps_are_stored_when_a_node_stops_writing_and_recorded_again_when_it_may_write() {
    let images = Images::new();
    let path = image(&images, "compat=1.1", "10M");
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    add(&disk, persistent("b")).unwrap();
    disk.write(0, &[1; 512]);
    let reopen = |disk: &Disk, read_only: &str| {
        let name = text(&path);
        let entry = format!(
            "node-name=disk,driver=qcow2,read-only={read_only},discard=unmap,file.driver=file,\
             file.filename={name}"
        );
        let entry = blockcore::options::Options::parse(&entry, None).unwrap();
        disk.control(|control| async move { control.reopen(vec![entry]).await })
    };
    // A writer is there: the reopen is given up after all was stored.
    let refused = reopen(&disk, "on").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    assert_eq!(
        listed_now(&path),
        [("b".into(), CLUSTER, vec!["auto".into()])]
    );
    disk.write(CLUSTER, &[1; 512]);
    assert!(listed_now(&path)[0].2.contains(&"in-use".to_owned()));
    let disk = disk.without_writer().unwrap();
    reopen(&disk, "on").unwrap();
    assert_eq!(marked_by_qemu(&path, "b"), [(0, 2 * CLUSTER)]);
    reopen(&disk, "off").unwrap();
    let disk = disk.with_writer().unwrap();
    disk.write(5 * CLUSTER, &[1; 512]);
    assert!(listed_now(&path)[0].2.contains(&"in-use".to_owned()));
    disk.close().unwrap();
    let marks = [(0, 2 * CLUSTER), (5 * CLUSTER, CLUSTER)];
    assert_eq!(marked_by_qemu(&path, "b"), marks);
    assert_clean(&path, "at the end");
}

#[test]
fn an_amended_image_has_the_bitmaps_that_its_disk_had() {
    let images = Images::new();
    let path = image(&images, "cluster_size=4096", "1M");
    let process = Process::new();
    let disk = process.open(&open(&path)).unwrap();
    add(&disk, persistent("kept")).unwrap();
    disk.write(CLUSTER, &[1; 4096]);
    let amend = |disk: &Disk, options| disk.amend(options, false);
    amend(&disk, "refcount-bits=64").unwrap();
    disk.write(5 * CLUSTER, &[2; 4096]);
    assert_eq!(
        marked(&disk, "kept"),
        [(CLUSTER, 4096), (5 * CLUSTER, 4096)]
    );
    // Nothing is done then, and nothing is lost.
    amend(&disk, "version=v2").unwrap_err();
    disk.write(9 * CLUSTER, &[3; 4096]);
    let expected = [1, 5, 9].map(|n| (n * CLUSTER, 4096));
    assert_eq!(marked(&disk, "kept"), expected);
    disk.close().unwrap();
    assert_clean(&path, "closed");
    assert_eq!(marked_by_qemu(&path, "kept"), expected);
}
