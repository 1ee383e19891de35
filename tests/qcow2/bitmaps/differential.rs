//! Bitmaps of one image by us and by QEMU's tools in turns: whoever looks finds the same marks.

use blockcore::driver::{Preallocation, ZeroFlags};
use blockcore::engine::sim::Random;
use blockcore::graph::BitmapSpec;

use super::{add, image, listed, marked, marked_by_qemu, open, remove, statuses, text};
use crate::setup::{Images, Process, assert_clean, qemu};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 10;
const TURNS: usize = 8;

#[test]
fn both_find_the_marks_of_what_either_has_written() {
    harness::seeds::try_all(DEFAULT_SEEDS, |seed, _: &mut ()| {
        take_turns(seed);
        Ok::<_, String>(())
    });
}

/// A bitmap as it should be: which granules are marked.
struct Model {
    name: String,
    granularity: u64,
    marks: Vec<bool>,
}

impl Model {
    fn mark(&mut self, offset: u64, bytes: u64) {
        let end = (offset + bytes).div_ceil(self.granularity);
        for granule in offset / self.granularity..end {
            self.marks[granule as usize] = true;
        }
    }

    fn resize(&mut self, bytes: u64) {
        self.marks
            .resize(bytes.div_ceil(self.granularity) as usize, false);
    }

    /// What is marked of a disk of so many bytes: where, and how many.
    fn areas(&self, bytes: u64) -> Vec<(u64, u64)> {
        let mut areas: Vec<(u64, u64)> = Vec::new();
        for (granule, marked) in self.marks.iter().enumerate() {
            let offset = granule as u64 * self.granularity;
            let part = self.granularity.min(bytes - offset);
            match areas.last_mut() {
                _ if !marked => {}
                Some(area) if area.0 + area.1 == offset => area.1 += part,
                _ => areas.push((offset, part)),
            }
        }
        areas
    }
}

fn take_turns(seed: u64) {
    let mut random = Random::new(seed);
    let images = Images::new();
    let cluster = 1_u64 << (9 + random.below(9));
    let mut options = format!("cluster_size={cluster}");
    if random.below(3) == 0 {
        options.push_str(",refcount_bits=1");
    }
    let mut bytes = (cluster * (20 + random.below(2000))).min(64 << 20);
    let path = image(&images, &options, &bytes.to_string());
    let process = Process::new();
    let mut models: Vec<Model> = Vec::new();
    for turn in 0..TURNS {
        let when = format!("seed {seed}, turn {turn}, {options}, {bytes} bytes");
        let is_ours = random.below(2) == 0;
        let mut commands = Vec::new();
        let disk = is_ours.then(|| process.open(&open(&path)).unwrap());
        if let Some(disk) = &disk {
            for model in &models {
                assert_eq!(marked(disk, &model.name), model.areas(bytes), "{when}");
            }
        }
        let name = format!("b{turn}");
        match random.below(8) {
            0..4 => {
                let granularity = 1_u64 << (9 + random.below(10));
                models.push(Model {
                    name: name.clone(),
                    granularity,
                    marks: vec![false; bytes.div_ceil(granularity) as usize],
                });
                match &disk {
                    Some(disk) => add(
                        disk,
                        BitmapSpec {
                            name,
                            granularity_bytes: Some(granularity),
                            persistent: true,
                            enabled: true,
                        },
                    )
                    .unwrap(),
                    None => {
                        let granularity = granularity.to_string();
                        let add = ["bitmap", "--add", "-g", &granularity, text(&path), &name];
                        drop(qemu("qemu-img", &add));
                    }
                }
            }
            4 if !models.is_empty() => {
                let gone = models.remove(random.below(models.len() as u64) as usize);
                match &disk {
                    Some(disk) => remove(disk, Box::leak(gone.name.into_boxed_str())).unwrap(),
                    None => {
                        let remove = ["bitmap", "--remove", text(&path), &gone.name];
                        drop(qemu("qemu-img", &remove));
                    }
                }
            }
            5 => {
                bytes = (bytes / 2 + random.below(bytes)).next_multiple_of(512);
                models.iter_mut().for_each(|model| model.resize(bytes));
                match &disk {
                    Some(disk) => disk
                        .control(move |control| async move {
                            control.resize("disk", bytes, Preallocation::Off).await
                        })
                        .unwrap(),
                    None => {
                        let bytes = bytes.to_string();
                        let resize = ["resize", "-f", "qcow2", "--shrink", text(&path), &bytes];
                        drop(qemu("qemu-img", &resize));
                    }
                }
            }
            _ => {}
        }
        for _ in 0..random.below(6) {
            let offset = random.below(bytes / 512) * 512;
            let length = ((1 + random.below(200)) * 512).min(bytes - offset);
            let zeroes = random.below(4) == 0;
            models
                .iter_mut()
                .for_each(|model| model.mark(offset, length));
            match (&disk, zeroes) {
                (Some(disk), true) => disk.write_zeroes(offset, length, ZeroFlags::empty()),
                (Some(disk), false) => disk.write(offset, &vec![turn as u8 + 1; length as usize]),
                (None, true) => commands.push(format!("write -z {offset} {length}")),
                (None, false) => commands.push(format!("write {offset} {length}")),
            }
        }
        if let Some(disk) = disk {
            assert!(statuses(&disk).iter().all(|status| !status.inconsistent));
            disk.close().unwrap();
        } else if !commands.is_empty() {
            let mut arguments = vec!["-f", "qcow2"];
            for command in &commands {
                arguments.extend(["-c", command]);
            }
            arguments.push(text(&path));
            qemu("qemu-io", &arguments);
        }
        assert_clean(&path, &when);
        let mut names: Vec<_> = listed(&path).into_iter().map(|bitmap| bitmap.0).collect();
        names.sort();
        let mut expected: Vec<_> = models.iter().map(|model| model.name.clone()).collect();
        expected.sort();
        assert_eq!(names, expected, "{when}");
        for model in &models {
            let theirs = marked_by_qemu(&path, &model.name);
            assert_eq!(theirs, model.areas(bytes), "{when}, bitmap {}", model.name);
        }
    }
}
