//! Images with one thing wrong, and what must not come of it.

use std::fs;
use std::path::{Path, PathBuf};

use blockcore::driver::{SnapshotRef, WriteFlags};
use blockcore::io::RequestKind;
use blockcore::io::buffer::Segments;

use super::walk::{Claim, Walk, number};
use crate::setup::{Disk, Images, Process, assert_clean, contents, qemu};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const CLUSTER: u64 = 4096;
/// One more cluster than an L2 table maps.
const DISK_BYTES: u64 = 4 << 20;

/// An image with data in its first 64 clusters and, behind its first L2 table, in one more.
fn make(images: &Images, snapshot: bool) -> PathBuf {
    let path = images.path("image.qcow2");
    let name = path.to_str().unwrap();
    let size = DISK_BYTES.to_string();
    let options = format!("cluster_size={CLUSTER}");
    qemu(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", &options, name, &size],
    );
    let io = |command: &str| qemu("qemu-io", &["-f", "qcow2", "-c", command, name]);
    io("write -P 1 0 256k");
    io("write -P 2 3M 4k");
    if snapshot {
        qemu("qemu-img", &["snapshot", "-c", "one", name]);
        io("write -P 3 0 256k");
    }
    path
}

/// Where the first cluster is that is this.
fn place(bytes: &[u8], wanted: Claim) -> u64 {
    let walk = Walk::new(bytes).expect("it is an image");
    let mut claims = walk.claims.iter();
    let found = claims.find(|(_, claims)| claims.contains(&wanted));
    found.expect("there is one").0 << walk.cluster_bits
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

fn open(path: &Path, more: &str) -> Disk {
    let options = format!(
        "driver=qcow2,discard=unmap,pass-discard-other=on{more},file.driver=file,file.discard=unmap,\
         file.filename={}",
        path.to_str().unwrap()
    );
    Process::new()
        .open(&options)
        .expect("nothing is wrong at first sight")
}

fn write(disk: &Disk, offset: u64, bytes: u64) -> bool {
    let from = Segments::allocate(bytes as usize, 4096);
    from.fill(9);
    let written =
        disk.run(move |root| async move { root.write(offset, from, WriteFlags::empty()).await });
    written.is_ok()
}

/// The guest would have had the host punch a hole into the image's header.
#[test]
fn what_an_entry_says_of_metadata_gives_none_of_it_back() {
    for wanted in [
        Claim::Header,
        Claim::L1,
        Claim::RefcountTable,
        Claim::RefcountBlock,
        Claim::L2(0, true),
        Claim::SnapshotTable,
        Claim::SnapshotL1,
        Claim::SnapshotL2,
    ] {
        for flags in [0, 1, COPIED, COPIED | 1, COMPRESSED] {
            let images = Images::new();
            let path = make(&images, true);
            let mut bytes = fs::read(&path).unwrap();
            let host = place(&bytes, wanted);
            if host == 0 && flags & COMPRESSED == 0 {
                // That is no place.
                continue;
            }
            let table = place(&bytes, Claim::L2(0, true));
            put(&mut bytes, table, host | flags);
            fs::write(&path, &bytes).unwrap();
            let what = format!("{wanted:?} with flags {flags:#x}");
            for ask in 0..4 {
                fs::write(&path, &bytes).unwrap();
                let disk = open(&path, "");
                let failed = disk.run(move |root| async move {
                    let from = Segments::allocate(CLUSTER as usize, 4096);
                    from.fill(9);
                    match ask {
                        0 => root.write(0, from, WriteFlags::empty()).await,
                        1 => root.discard(0, CLUSTER).await,
                        2 => {
                            let flags = blockcore::driver::ZeroFlags::MAY_UNMAP;
                            root.write_zeroes(0, CLUSTER, flags).await
                        }
                        _ => {
                            let request = root.enter(RequestKind::Write, 0, CLUSTER).await;
                            request.io().write_compressed(0, from).await
                        }
                    }
                });
                assert!(failed.is_err(), "{what}: {ask} was done");
                let _ = disk.close();
                let after = fs::read(&path).unwrap();
                let range = host as usize..(host + CLUSTER) as usize;
                let mut expected = bytes[range.clone()].to_vec();
                if host == 0 {
                    // It is marked as corrupt.
                    expected[79] |= 2;
                }
                assert!(expected == after[range], "{what}: {ask} changed it");
            }
        }
    }
}

/// What others leave without this flag is copied once, and what it was copied from is used again.
#[test]
fn tables_that_are_not_flagged_as_the_images_own_are_replaced_and_used_again() {
    for more in ["", ",l2-cache-size=4096,l2-cache-entry-size=512"] {
        let images = Images::new();
        let path = make(&images, false);
        let mut bytes = fs::read(&path).unwrap();
        let l1 = place(&bytes, Claim::L1);
        for index in 0..DISK_BYTES / CLUSTER / 512 {
            let entry = number(&bytes, l1 + 8 * index, 8).unwrap();
            put(&mut bytes, l1 + 8 * index, entry & !COPIED);
        }
        fs::write(&path, &bytes).unwrap();
        let disk = open(&path, more);
        for round in 0..5 {
            for cluster in (0..DISK_BYTES / CLUSTER).step_by(7) {
                disk.write(cluster * CLUSTER, &[round as u8; CLUSTER as usize]);
            }
            disk.flush();
            disk.discard(0, DISK_BYTES);
            disk.flush();
        }
        disk.write(CLUSTER, &[7; CLUSTER as usize]);
        disk.close().unwrap();
        assert_clean(&path, "once written to");
        let contents = contents(&path);
        let is_right = |(at, byte): (usize, &u8)| {
            let expected = 7 * u8::from(at as u64 / CLUSTER == 1);
            *byte == expected
        };
        assert!(contents.iter().enumerate().all(is_right));
    }
}

/// The image's file would have grown to where a table was said to be.
#[test]
fn a_table_past_the_end_of_the_file_is_none_and_the_file_stays_as_long_as_it_is() {
    let images = Images::new();
    let path = make(&images, false);
    let whole = fs::read(&path).unwrap();
    let l1 = place(&whole, Claim::L1);
    let table = place(&whole, Claim::RefcountTable);
    for (at, entry) in [(l1, COPIED | 1 << 40), (table, 1 << 40)] {
        let mut bytes = whole.clone();
        put(&mut bytes, at, entry);
        fs::write(&path, &bytes).unwrap();
        let disk = open(&path, "");
        assert!(!write(&disk, DISK_BYTES / 2 - CLUSTER, CLUSTER));
        let _ = disk.close();
        let length = fs::metadata(&path).unwrap().len();
        assert!(length < 64 << 20, "{length}");
    }
}

/// The disk would have lost its tables with a snapshot that said that they were its own.
#[test]
fn a_snapshot_that_lets_go_of_the_disks_metadata_is_not_deleted() {
    for wanted in [
        Claim::Header,
        Claim::L1,
        Claim::RefcountTable,
        Claim::RefcountBlock,
        Claim::L2(0, true),
        Claim::SnapshotTable,
        Claim::SnapshotL1,
    ] {
        for of_table in [false, true] {
            let images = Images::new();
            let path = make(&images, true);
            let mut bytes = fs::read(&path).unwrap();
            let host = place(&bytes, wanted);
            let at = match of_table {
                true => place(&bytes, Claim::SnapshotL2),
                false => place(&bytes, Claim::SnapshotL1),
            };
            let flags = match (host, of_table) {
                (0, false) => continue,
                (0, true) => COMPRESSED,
                _ => COPIED,
            };
            put(&mut bytes, at, host | flags);
            fs::write(&path, &bytes).unwrap();
            let disk = open(&path, "");
            let one = SnapshotRef {
                id: None,
                name: Some("one".into()),
            };
            let _ = disk.delete_snapshot(one);
            let _ = disk.close();
            let before = Walk::new(&bytes).unwrap();
            let after = fs::read(&path).unwrap();
            let after = Walk::new(&after).expect("it is an image still");
            for (cluster, claims) in &before.claims {
                if let [Claim::Data(guest, _)] = claims[..] {
                    let is_there = after.claims.get(cluster).is_some_and(|claims| {
                        let is_it =
                            |claim: &Claim| matches!(claim, Claim::Data(g, _) if *g == guest);
                        claims.iter().any(is_it)
                    });
                    let what = format!("{wanted:?}, {of_table}: cluster {guest} of the disk");
                    assert!(is_there, "{what} is lost");
                    assert!(after.count(*cluster) > 0, "{what} counts as free");
                }
            }
        }
    }
}

/// An opening counts the one before, which the image tells: the largest number there is, too.
#[test]
fn an_image_that_says_it_was_opened_as_often_as_can_be_is_opened_once_more() {
    let images = Images::new();
    let path = make(&images, false);
    let runtime = images.path("run");
    fs::create_dir(&runtime).unwrap();
    let options = format!(
        "driver=qcow2,file.driver=file,file.filename={}",
        path.to_str().unwrap()
    );
    let open_and_close = || {
        let disk = Process::keeping(&runtime).open(&options).unwrap();
        disk.write(0, &[4; CLUSTER as usize]);
        disk.close().unwrap();
    };
    open_and_close();
    let mut bytes = fs::read(&path).unwrap();
    let cookie = bytes.windows(4).position(|word| word == b"StNW");
    let cookie = cookie.expect("it has been opened") as u64 + 8;
    put(&mut bytes, cookie, u64::MAX);
    fs::write(&path, &bytes).unwrap();
    open_and_close();
    let after = fs::read(&path).unwrap();
    assert_eq!(number(&after, cookie, 8), Some(0));
    assert_clean(&path, "after another opening");
}
