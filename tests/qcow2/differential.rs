//! Random operations on images of every kind, by us and by `qemu-io` in turns: the disk holds what was
//! written, both read the same, and `qemu-img check` finds nothing wrong after every turn.

use std::fmt::Write as _;
use std::path::Path;

use blockcore::driver::ZeroFlags;
use blockcore::engine::sim::Random;

use crate::setup::{Images, Process, assert_clean, contents, qemu, qemu_output};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 60;
/// Turns of each image, by us and by QEMU alternately.
const TURNS: u64 = 4;
/// Operations of a turn.
const OPERATIONS: u64 = 12;
/// The pattern that compressed and plain writes have: one byte, so that `qemu-io` can write it, too.
type Fill = u8;

#[derive(Debug)]
struct Case {
    seed: u64,
    options: String,
    open: String,
    cluster: u64,
    bytes: u64,
    compat_v2: bool,
    data_file: bool,
    backing: Option<(u64, &'static str)>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut one_of = |many: u64| random.below(many);
        let cluster = 1_u64 << (9 + one_of(10));
        let compat_v2 = one_of(4) == 0;
        let bytes = (cluster * (20 + one_of(200))).clamp(1 << 16, 4 << 20) / 512 * 512;
        let mut options = format!("cluster_size={cluster}");
        let extended = !compat_v2 && cluster >= 16384 && one_of(2) == 0;
        let data_file = !compat_v2 && one_of(6) == 0;
        match compat_v2 {
            true => options.push_str(",compat=0.10"),
            false => {
                write!(options, ",refcount_bits={}", 1 << one_of(7)).unwrap();
                if extended {
                    options.push_str(",extended_l2=on");
                }
                if one_of(3) == 0 {
                    options.push_str(",lazy_refcounts=on");
                }
                if one_of(3) == 0 && !data_file {
                    options.push_str(",compression_type=zstd");
                }
            }
        }
        if one_of(4) == 0 {
            options.push_str(",preallocation=metadata");
        }
        let backing = match one_of(3) {
            0 if !options.contains("preallocation") => {
                let length = match one_of(3) {
                    0 => bytes,
                    1 => (bytes / 2).next_multiple_of(512),
                    _ => bytes + 65536,
                };
                Some((length, ["raw", "qcow2"][one_of(2) as usize]))
            }
            _ => None,
        };
        let mut open = "driver=qcow2,discard=unmap".to_owned();
        match one_of(4) {
            0 => open.push_str(",l2-cache-size=4k,refcount-cache-size=1k"),
            1 => open.push_str(",l2-cache-entry-size=512"),
            2 => open.push_str(",pass-discard-other=on"),
            _ => {}
        }
        if !compat_v2 && one_of(6) == 0 {
            open.push_str(",discard-no-unref=on");
        }
        Self {
            seed,
            options,
            open,
            cluster,
            bytes,
            compat_v2,
            data_file,
            backing,
        }
    }
}

#[test]
fn images_of_every_kind_hold_what_we_and_qemu_wrote_in_turns() {
    harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, |case, _: &mut ()| run(case));
}

fn run(case: &Case) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let mut model = vec![0; case.bytes as usize];
    let mut create = vec!["create".to_owned(), "-f".into(), "qcow2".into()];
    let mut options = case.options.clone();
    if case.data_file {
        write!(options, ",data_file={}", text(&images.path("data.raw"))).unwrap();
    }
    create.extend(["-o".to_owned(), options]);
    if let Some((bytes, format)) = case.backing {
        let base = images.path("base");
        qemu(
            "qemu-img",
            &["create", "-f", format, &text(&base), &bytes.to_string()],
        );
        qemu(
            "qemu-io",
            &[
                "-f",
                format,
                "-c",
                &format!("write -P 0xbb 0 {bytes}"),
                &text(&base),
            ],
        );
        let shared = model.len().min(bytes as usize);
        model[..shared].fill(0xbb);
        create.extend(["-b".to_owned(), text(&base), "-F".into(), format.into()]);
    }
    create.extend([text(&image), case.bytes.to_string()]);
    let create: Vec<_> = create.iter().map(String::as_str).collect();
    qemu("qemu-img", &create);
    let mut random = Random::new(case.seed.wrapping_add(1000));
    for turn in 0..TURNS {
        match (turn + case.seed) % 2 {
            0 => our_turn(case, &image, &mut random, &mut model),
            _ => qemus_turn(case, &image, &mut random, &mut model),
        }
        assert_clean(&image, &format!("after turn {turn}"));
        compare(
            &contents(&image),
            &model,
            &format!("QEMU, after turn {turn}"),
        );
    }
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
    let most = (bytes - offset).min(case.cluster * 5);
    let length = (1 + random.below(most.div_ceil(unit))) * unit;
    (offset, length.min(bytes - offset))
}

fn our_turn(case: &Case, image: &Path, random: &mut Random, model: &mut Vec<u8>) {
    let process = Process::new();
    let filename = image.to_str().unwrap();
    let options = format!("{},file.driver=file,file.filename={filename}", case.open);
    let disk = process.open(&options).expect("it can be opened");
    for _ in 0..OPERATIONS {
        let bytes = model.len() as u64;
        let (offset, length) = range(case, random, bytes);
        let part = offset as usize..(offset + length) as usize;
        let fill = random.below(255) as Fill + 1;
        match random.below(12) {
            0..=4 => {
                let data = vec![fill; length as usize];
                disk.write(offset, &data);
                model[part].copy_from_slice(&data);
            }
            5 => {
                disk.write_zeroes(offset, length, ZeroFlags::empty());
                model[part].fill(0);
            }
            6 => {
                disk.write_zeroes(offset, length, ZeroFlags::MAY_UNMAP);
                model[part].fill(0);
            }
            7 => {
                disk.discard(offset, length);
                model[part].copy_from_slice(&disk.read(offset, length));
            }
            8 if !case.data_file => {
                let offset = offset / case.cluster * case.cluster;
                let length = case.cluster.min(bytes - offset);
                let data = vec![fill; length as usize];
                disk.write_compressed(offset, &data);
                model[offset as usize..(offset + length) as usize].copy_from_slice(&data);
            }
            9 => disk.flush(),
            10 if random.below(3) == 0 => {
                let bytes = (bytes / 2 + random.below(bytes)).next_multiple_of(512);
                disk.resize(bytes);
                model.resize(bytes as usize, 0);
            }
            _ => compare(&disk.read(offset, length), &model[part], "we"),
        }
    }
    disk.check_status(model);
    compare(&disk.read(0, model.len() as u64), model, "we, at the end");
    disk.close().expect("it can be closed");
}

fn qemus_turn(case: &Case, image: &Path, random: &mut Random, model: &mut [u8]) {
    compress_by_qemu(case, image, random, model);
    let mut arguments = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
    let mut discarded = false;
    for _ in 0..OPERATIONS {
        let bytes = model.len() as u64;
        let (offset, length) = range(case, random, bytes);
        let part = offset as usize..(offset + length) as usize;
        let fill = random.below(255) as Fill + 1;
        let command = match random.below(8) {
            0..=3 => {
                model[part].fill(fill);
                format!("write -P {fill} {offset} {length}")
            }
            4 => {
                model[part].fill(0);
                format!("write -z {offset} {length}")
            }
            5 => {
                model[part].fill(0);
                format!("write -z -u {offset} {length}")
            }
            6 if !case.compat_v2 && !discarded => {
                discarded = true;
                format!("discard {offset} {length}")
            }
            _ => "flush".to_owned(),
        };
        arguments.extend(["-c".to_owned(), command]);
    }
    arguments.push(image.to_str().unwrap().to_owned());
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    qemu("qemu-io", &arguments);
    if discarded {
        // What a discarded range holds is QEMU's to say.
        model.copy_from_slice(&contents(image));
    }
}

/// One compressed cluster; QEMU does not write one where there is a plain one.
fn compress_by_qemu(case: &Case, image: &Path, random: &mut Random, model: &mut [u8]) {
    let (offset, _) = range(case, random, model.len() as u64);
    let offset = offset / case.cluster * case.cluster;
    let Some(cluster) = model.get_mut(offset as usize..(offset + case.cluster) as usize) else {
        return;
    };
    let fill = random.below(255) as Fill + 1;
    let command = format!("write -c -P {fill} {offset} {}", case.cluster);
    let image = image.to_str().unwrap();
    if qemu_output("qemu-io", &["-f", "qcow2", "-c", &command, image])
        .status
        .success()
    {
        cluster.fill(fill);
    }
}

/// QEMU with lazy reference counts, killed: they are wrong in the image, and the image says so.
#[test]
fn an_image_whose_writer_was_killed_is_repaired_when_it_is_opened_for_writing() {
    let images = Images::new();
    let image = images.path("image.qcow2");
    let path = image.to_str().unwrap();
    let options = "lazy_refcounts=on,cluster_size=4096";
    qemu(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", options, path, "1M"],
    );
    let writes = ["-c", "write -P 7 0 64k", "-c", "flush", "-c", "abort"];
    qemu_output(
        "qemu-io",
        &[&["-f", "qcow2"][..], &writes, &[path]].concat(),
    );
    let dirty = qemu_output("qemu-img", &["check", "-f", "qcow2", path]);
    assert_ne!(
        dirty.status.code(),
        Some(0),
        "QEMU has left nothing to repair"
    );
    let process = Process::new();
    let options = format!("driver=qcow2,file.driver=file,file.filename={path}");
    let disk = process.open(&options).unwrap();
    let mut model = vec![0; 1 << 20];
    model[..65536].fill(7);
    disk.write(65536, &[8; 4096]);
    model[65536..69632].fill(8);
    compare(&disk.read(0, 1 << 20), &model, "we");
    disk.close().unwrap();
    assert_clean(&image, "at the end");
    compare(&contents(&image), &model, "QEMU");
}
