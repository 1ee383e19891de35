//! Bitmaps that somebody has damaged, that claim to be more than can be, or that say things that we do not
//! know.

use std::path::Path;

use blockcore::ErrorKind;

use super::{
    CLUSTER, add, image, listed, marked, marked_by_qemu, open, persistent, remove, statuses, text,
};
use crate::setup::{Images, Process, assert_clean, qemu, qemu_output};

/// Bytes of an image, to be changed.
struct Bytes(Vec<u8>);

impl Bytes {
    fn number(&self, at: usize, bytes: usize) -> usize {
        let field = self.0[at..at + bytes].iter();
        field.fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Where the data of the bitmaps extension is.
    fn extension(&self) -> usize {
        let mut at = self.number(100, 4);
        loop {
            match self.number(at, 4) {
                0x2385_2875 => return at + 8,
                0 => panic!("there are bitmaps"),
                _ => at += 8 + self.number(at + 4, 4).next_multiple_of(8),
            }
        }
    }

    fn directory(&self) -> usize {
        self.number(self.extension() + 16, 8)
    }
}

fn patch(path: &Path, change: impl FnOnce(&mut Bytes)) {
    let mut bytes = Bytes(std::fs::read(path).unwrap());
    change(&mut bytes);
    std::fs::write(path, bytes.0).unwrap();
}

/// An image with two bitmaps, in which the second megabyte is marked.
fn marked_image(images: &Images) -> std::path::PathBuf {
    let path = image(images, "compat=1.1", "10M");
    for name in ["a", "b"] {
        qemu("qemu-img", &["bitmap", "--add", text(&path), name]);
    }
    qemu("qemu-io", &["-c", "write 1M 1M", text(&path)]);
    path
}

#[test]
fn a_table_that_means_nothing_keeps_the_image_shut_unless_the_bitmap_means_nothing_anyway() {
    let images = Images::new();
    let process = Process::new();
    for entry in [1_u64 << 62, 0x1_0001, 0x200] {
        let path = marked_image(&images);
        patch(&path, |bytes| {
            let table = bytes.number(bytes.directory(), 8);
            bytes.put(table, &entry.to_be_bytes());
        });
        let theirs = qemu_output("qemu-img", &["info", text(&path)]);
        assert!(!theirs.status.success());
        let read = process.read_all(&open(&path)).unwrap_err();
        assert_eq!(read.kind(), ErrorKind::Corrupt);
        assert!(read.to_string().contains("bitmap 'a'"), "{read}");
        let opened = process.open(&open(&path)).map(drop).unwrap_err();
        assert_eq!(opened.kind(), ErrorKind::Corrupt);
        patch(&path, |bytes| {
            let flags = bytes.directory() + 12;
            bytes.put(flags, &3_u32.to_be_bytes());
        });
        let disk = process.open(&open(&path)).unwrap();
        assert!(statuses(&disk)[0].inconsistent && !statuses(&disk)[1].inconsistent);
        disk.write(0, &[1; 512]);
        remove(&disk, "a").unwrap();
        disk.close().unwrap();
        assert_eq!(
            marked_by_qemu(&path, "b"),
            [(0, CLUSTER), (1 << 20, 1 << 20)]
        );
    }
}

#[test]
fn a_table_that_lies_in_other_metadata_is_not_written_around() {
    let images = Images::new();
    let path = marked_image(&images);
    patch(&path, |bytes| {
        let (directory, l1) = (bytes.directory(), bytes.number(40, 8));
        bytes.put(directory, &(l1 as u64).to_be_bytes());
        bytes.put(directory + 12, &1_u32.to_be_bytes());
    });
    let refused = Process::new().open(&open(&path)).map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
    assert!(refused.to_string().contains("other metadata"), "{refused}");
}

#[test]
fn a_bitmap_with_data_that_nobody_here_knows_is_left_as_it_is_and_not_believed_after_a_write() {
    let images = Images::new();
    for flags in [2_u32, 2 | 4, 0] {
        let path = marked_image(&images);
        patch(&path, |bytes| {
            // Its name is one byte: it moves behind the data.
            let entry = bytes.directory();
            bytes.put(entry + 12, &flags.to_be_bytes());
            bytes.put(entry + 20, &7_u32.to_be_bytes());
            bytes.put(entry + 24, b"unknown");
            let second = bytes.0[entry + 32..entry + 64].to_vec();
            bytes.put(entry + 32, &[0; 8]);
            bytes.put(entry + 31, b"a");
            bytes.put(entry + 32, &second);
        });
        let process = Process::new();
        let disk = process.open(&open(&path)).unwrap();
        let names: Vec<_> = statuses(&disk)
            .into_iter()
            .map(|status| status.name)
            .collect();
        let is_compatible = flags & 4 != 0;
        match is_compatible {
            true => assert_eq!(names, ["a", "b"]),
            false => assert_eq!(names, ["b"]),
        }
        disk.write(5 << 20, &[1; 512]);
        disk.close().unwrap();
        patch(&path, |bytes| {
            let entry = bytes.directory();
            let flags_now = bytes.number(entry + 12, 4) as u32;
            match (is_compatible, flags) {
                // It is up to date, and what belongs to it is there still.
                (true, _) => assert_eq!(flags_now, 6),
                // It was to follow writes, and has not.
                (false, 2) => assert_eq!(flags_now, 3),
                (false, _) => assert_eq!(flags_now, 0),
            }
            assert_eq!(&bytes.0[entry + 24..entry + 32], b"unknowna");
        });
        let disk = process.open(&open(&path)).unwrap();
        assert_eq!(marked(&disk, "b"), [(1 << 20, 1 << 20), (5 << 20, CLUSTER)]);
        if is_compatible {
            assert_eq!(marked(&disk, "a"), marked(&disk, "b"));
        }
        disk.close().unwrap();
    }
}

#[test]
fn what_a_program_without_bitmaps_has_written_makes_them_all_go() {
    let images = Images::new();
    let path = marked_image(&images);
    patch(&path, |bytes| bytes.put(88, &[0; 8]));
    let process = Process::new();
    let before = std::fs::read(&path).unwrap();
    let disk = process
        .open_to_read(&format!("read-only=on,{}", open(&path)))
        .unwrap();
    assert!(statuses(&disk).is_empty());
    disk.close().unwrap();
    assert!(std::fs::read(&path).unwrap() == before);
    let disk = process.open(&open(&path)).unwrap();
    assert!(statuses(&disk).is_empty());
    add(&disk, persistent("a")).unwrap();
    disk.write(0, &[1; 512]);
    disk.close().unwrap();
    assert_eq!(marked_by_qemu(&path, "a"), [(0, CLUSTER)]);
    // What the old ones had is leaked, and found.
    qemu("qemu-img", &["check", "-q", "-r", "leaks", text(&path)]);
    assert_clean(&path, "repaired");
    assert_eq!(marked_by_qemu(&path, "a"), [(0, CLUSTER)]);
    // The name is gone from the header with the last bitmap: nobody warns.
    let disk = process.open(&open(&path)).unwrap();
    remove(&disk, "a").unwrap();
    disk.close().unwrap();
    let info = qemu_output("qemu-img", &["info", text(&path)]);
    assert!(info.stderr.is_empty(), "{info:?}");
    assert!(listed(&path).is_empty());
}

#[test]
fn bitmaps_that_would_take_too_much_memory_are_refused_to_writers_and_ignored_for_readers() {
    let images = Images::new();
    let path = image(&images, "compat=1.1", "2T");
    let process = Process::new();
    let granular = |name: &str| blockcore::graph::BitmapSpec {
        granularity_bytes: Some(4096),
        ..persistent(name)
    };
    let disk = process.open(&open(&path)).unwrap();
    let mut names = Vec::new();
    let refused = loop {
        let name = format!("b{}", names.len());
        match add(&disk, granular(&name)) {
            Ok(()) => names.push(name),
            Err(error) => break error,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert!(names.len() > 10 && names.len() < 20, "{names:?}");
    disk.close().unwrap();
    let disk = process.open(&open(&path)).unwrap();
    assert_eq!(statuses(&disk).len(), names.len());
    disk.close().unwrap();
    for name in ["more", "and more"] {
        qemu(
            "qemu-img",
            &["bitmap", "--add", "-g", "4k", text(&path), name],
        );
    }
    let refused = process.open(&open(&path)).map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    let disk = process
        .open_to_read(&format!("read-only=on,{}", open(&path)))
        .unwrap();
    assert!(statuses(&disk).is_empty());
    disk.close().unwrap();
}
