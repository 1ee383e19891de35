//! Images in states that are easily forgotten, each used as a guest would. What must not happen with any of
//! them, and which other tests show that, is listed in `tests/hazards.md`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use blockcore::driver::ZeroFlags;
use blockcore::{Error, ErrorKind};

use crate::setup::{Disk, Images, Process, assert_clean, contents, qemu};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 65536;

fn name(path: &Path) -> &str {
    path.to_str().expect("a path of ours")
}

fn create(path: &Path, options: &str, more: &[&str]) {
    let arguments = [
        &["create", "-f", "qcow2", "-o", options][..],
        more,
        &[name(path), "1M"],
    ];
    qemu("qemu-img", &arguments.concat());
}

/// What the image has on the host.
fn occupied(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn io(path: &Path, command: &str) {
    qemu("qemu-io", &["-f", "qcow2", "-c", command, name(path)]);
}

fn options(path: &Path) -> String {
    format!(
        "driver=qcow2,discard=unmap,file.driver=file,file.filename={}",
        name(path)
    )
}

fn open(path: &Path) -> Disk {
    Process::new().open(&options(path)).expect("it can be used")
}

/// With a backing image of ones, as long as the disk.
fn overlay(images: &Images, version: &str) -> std::path::PathBuf {
    let (base, path) = (images.path("base"), images.path("overlay"));
    fs::write(&base, vec![1; MIB as usize]).unwrap();
    let backing = ["-b", name(&base), "-F", "raw"];
    create(&path, &format!("compat={version}"), &backing);
    path
}

fn open_overlay(images: &Images, path: &Path) -> Disk {
    let options = format!(
        "{},backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
        options(path),
        name(&images.path("base"))
    );
    Process::new().open(&options).expect("it can be used")
}

fn refused(path: &Path, read_only: bool) -> Error {
    let process = Process::new();
    let opened = match read_only {
        false => process.open(&options(path)),
        true => process.open_to_read(&format!("read-only=on,{}", options(path))),
    };
    match opened {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    }
}

/// A guest would have had its plaintext written into an image that is labelled as encrypted.
#[test]
fn an_encrypted_image_is_refused_for_reading_and_writing() {
    for method in [1_u32, 2, 3] {
        let images = Images::new();
        let path = images.path("image");
        create(&path, "cluster_size=64k", &[]);
        let mut bytes = fs::read(&path).unwrap();
        bytes[32..36].copy_from_slice(&method.to_be_bytes());
        fs::write(&path, &bytes).unwrap();
        for read_only in [false, true] {
            let error = refused(&path, read_only);
            let kinds = [
                ErrorKind::Unsupported,
                ErrorKind::Corrupt,
                ErrorKind::Invalid,
            ];
            assert!(kinds.contains(&error.kind()), "{error:?}");
        }
        assert!(fs::read(&path).unwrap() == bytes);
    }
}

#[test]
fn an_image_that_is_marked_as_corrupt_is_refused_for_writing_only() {
    let images = Images::new();
    let path = images.path("image");
    create(&path, "cluster_size=64k", &[]);
    io(&path, "write -P 7 0 64k");
    let mut bytes = fs::read(&path).unwrap();
    bytes[79] |= 2;
    fs::write(&path, &bytes).unwrap();
    assert_eq!(refused(&path, false).kind(), ErrorKind::Corrupt);
    let read = Process::new().read_all(&options(&path)).unwrap();
    assert!(read[..CLUSTER as usize] == [7; CLUSTER as usize]);
    assert!(fs::read(&path).unwrap() == bytes);
}

/// A backup of what a bitmap says has changed would have missed what was written without it.
#[test]
fn a_bitmap_is_not_up_to_date_once_an_image_was_opened_for_writing_and_is_once_it_was_read() {
    let images = Images::new();
    let path = images.path("image");
    create(&path, "cluster_size=64k", &[]);
    qemu("qemu-img", &["bitmap", "--add", name(&path), "b"]);
    let autoclear = || fs::read(&path).unwrap()[95];
    assert_eq!(autoclear() & 1, 1);
    Process::new().read_all(&options(&path)).unwrap();
    assert_eq!(autoclear() & 1, 1);
    let disk = open(&path);
    assert_eq!(autoclear() & 1, 0);
    disk.write(0, &[1; 512]);
    disk.close().unwrap();
    assert_eq!(autoclear() & 1, 0);
}

/// The guest would have found what had been there before, or what the backing image has.
#[test]
fn what_is_zeroed_or_discarded_in_an_overlay_reads_as_zeroes_to_everybody() {
    for version in ["0.10", "1.1"] {
        let images = Images::new();
        let path = overlay(&images, version);
        let disk = open_overlay(&images, &path);
        disk.write(4 * CLUSTER, &[2; 2 * CLUSTER as usize]);
        for flags in [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP] {
            let first = 4 * u64::from(flags.contains(ZeroFlags::MAY_UNMAP));
            disk.write_zeroes(first * CLUSTER, 2 * CLUSTER, flags);
            disk.write_zeroes((first + 2) * CLUSTER + 512, 1024, flags);
        }
        disk.discard(10 * CLUSTER, CLUSTER);
        let mut expected = vec![1; MIB as usize];
        for first in [0, 4] {
            let begin = (first * CLUSTER) as usize;
            expected[begin..begin + 2 * CLUSTER as usize].fill(0);
            let begin = ((first + 2) * CLUSTER + 512) as usize;
            expected[begin..begin + 1024].fill(0);
        }
        // Version 2 cannot say of a cluster that nothing of it shines through: it is left as it was.
        let discarded = 10 * CLUSTER as usize..11 * CLUSTER as usize;
        if version == "1.1" {
            expected[discarded].fill(0);
        }
        assert!(disk.read(0, MIB) == expected, "{version}");
        disk.close().unwrap();
        assert!(contents(&path) == expected, "{version}");
        assert_clean(&path, version);
    }
}

#[test]
fn a_cluster_that_reads_as_zeroes_and_has_a_place_does_so_around_what_is_written() {
    let images = Images::new();
    let path = images.path("image");
    create(&path, "cluster_size=64k", &[]);
    io(&path, "write -P 7 0 128k");
    io(&path, "write -z 0 128k");
    let disk = open(&path);
    assert!(disk.read(0, 2 * CLUSTER).iter().all(|byte| *byte == 0));
    disk.write(1024, &[3; 512]);
    let mut expected = vec![0; 2 * CLUSTER as usize];
    expected[1024..1536].fill(3);
    assert!(disk.read(0, 2 * CLUSTER) == expected);
    disk.close().unwrap();
    assert!(contents(&path)[..2 * CLUSTER as usize] == expected);
}

/// Where compressed data begins at an odd byte its entry looks like that of a cluster of zeroes.
#[test]
fn compressed_data_at_an_odd_byte_is_data() {
    for options in ["compression_type=zlib", "compression_type=zstd"] {
        let images = Images::new();
        let path = images.path("image");
        create(&path, options, &[]);
        let disk = open(&path);
        let data = |cluster: u64| -> Vec<u8> {
            let byte = |at: u64| (at / (100 + 7 * cluster)) as u8;
            (0..CLUSTER).map(byte).collect()
        };
        for cluster in 0..16 {
            disk.write_compressed(cluster * CLUSTER, &data(cluster));
        }
        disk.close().unwrap();
        let bytes = fs::read(&path).unwrap();
        let word = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap());
        let table = word(word(40) as usize) & 0x00ff_ffff_ffff_fe00;
        let is_odd = |index: &usize| word(table as usize + 8 * index) & 1 == 1;
        let odd = (0..16).filter(is_odd).count();
        assert!(odd > 0, "{options}");
        let disk = open(&path);
        for cluster in 0..16 {
            let found = disk.read(cluster * CLUSTER, CLUSTER);
            assert!(found == data(cluster), "{options}: {cluster}");
        }
        disk.close().unwrap();
        assert_clean(&path, options);
    }
}

/// Its clusters could not have been read by anybody afterwards.
#[test]
fn an_image_keeps_what_its_header_says_when_it_is_written_and_resized() {
    for (options, says) in [
        ("compression_type=zstd", "compression type: zstd"),
        ("lazy_refcounts=on", "lazy refcounts: true"),
        ("refcount_bits=2", "refcount bits: 2"),
        ("extended_l2=on", "extended l2: true"),
        ("compat=0.10", "compat: 0.10"),
    ] {
        let images = Images::new();
        let path = images.path("image");
        create(&path, options, &[]);
        io(&path, "write -c -P 5 0 64k");
        let before = fs::read(&path).unwrap();
        let disk = open(&path);
        disk.write(CLUSTER, &[6; 2 * CLUSTER as usize]);
        // Further than the L1 table is for.
        disk.resize(600 * MIB);
        disk.write(599 * MIB, &[7; 512]);
        disk.discard(CLUSTER, CLUSTER);
        disk.close().unwrap();
        let after = fs::read(&path).unwrap();
        if options == "compat=0.10" {
            // What is a field in version 3 is not one here.
            assert!(before[72..512] == after[72..512]);
        }
        assert_eq!(before[72..88], after[72..88], "{options}: features");
        let info = qemu("qemu-img", &["info", name(&path)]);
        assert!(info.contains(says), "{options}: {info}");
        assert_clean(&path, options);
        let disk = open(&path);
        assert!(disk.read(0, CLUSTER) == [5; CLUSTER as usize]);
        assert!(disk.read(2 * CLUSTER, CLUSTER) == [6; CLUSTER as usize]);
        disk.close().unwrap();
    }
}

/// The host would have run out of space for what nobody had any more.
#[test]
fn an_image_that_is_written_and_discarded_again_and_again_does_not_grow() {
    let images = Images::new();
    let path = images.path("image");
    create(&path, "cluster_size=4k", &[]);
    let disk = open(&path);
    let mut first = 0;
    for round in 0..40_u64 {
        for cluster in 0..16 {
            let offset = cluster * CLUSTER;
            match (round + cluster) % 3 {
                0 => disk.discard(offset, CLUSTER),
                1 => {
                    let data: Vec<u8> = (0..CLUSTER).map(|at| (at / 200) as u8).collect();
                    disk.write_compressed(offset, &data);
                }
                _ => disk.write(offset, &[round as u8 + 1; CLUSTER as usize]),
            }
        }
        disk.flush();
        let now = occupied(&path);
        match round {
            0..5 => first = first.max(now),
            _ => assert!(now <= 2 * first, "{now} after {first}"),
        }
    }
    disk.close().unwrap();
    let length = fs::metadata(&path).unwrap().len();
    // At most 1024 clusters are reserved at once, and these may be behind others.
    assert!(length <= first + (8 << 20), "{length} after {first}");
    assert_clean(&path, "at the end");
}

/// Opening would have written as much as a small file claims to have.
#[test]
fn a_small_file_that_claims_a_large_disk_is_opened_without_writing_or_reading_much() {
    let images = Images::new();
    let path = images.path("image");
    create(&path, "cluster_size=2M", &[]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[24..32].copy_from_slice(&(1_u64 << 39).to_be_bytes());
    fs::write(&path, &bytes).unwrap();
    let begin = std::time::Instant::now();
    let disk = open(&path);
    disk.write(0, &[1; 512]);
    assert!(disk.read(512, 512).iter().all(|byte| *byte == 0));
    disk.close().unwrap();
    assert!(begin.elapsed().as_secs() < 5);
    // What is reserved at once is a hole.
    assert!(occupied(&path) < 16 * MIB);
}

/// Memory would have been another's, or the name whatever stood there.
#[test]
fn a_name_or_an_extension_that_is_not_inside_of_the_headers_cluster_is_refused() {
    let images = Images::new();
    let path = overlay(&images, "1.1");
    let whole = fs::read(&path).unwrap();
    let length = u32::from_be_bytes(*whole[100..].first_chunk().unwrap());
    let fields: [(usize, u64); 4] = [
        (8, CLUSTER - 4),
        (8, u64::MAX),
        (8, 1 << 40),
        // The first extension's type and length.
        (length as usize, 0x1234_5678_ffff_fff0),
    ];
    for (at, value) in fields {
        let mut bytes = whole.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        fs::write(&path, &bytes).unwrap();
        for read_only in [false, true] {
            let error = refused(&path, read_only);
            let kinds = [
                ErrorKind::Corrupt,
                ErrorKind::Invalid,
                ErrorKind::Unsupported,
            ];
            assert!(kinds.contains(&error.kind()), "{at}: {error:?}");
        }
    }
}
