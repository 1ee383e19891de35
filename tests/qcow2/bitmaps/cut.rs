//! Bitmaps on a simulated host, cut off by a power cut or a kill at any moment between opening and closing,
//! and with a host that fails: what is left is whole, and no bitmap looks valid that misses a write.

use std::path::Path;
use std::time::Duration;

use blockcore::Error;
use blockcore::driver::{Preallocation, WriteFlags};
use blockcore::engine::sim::{Faults, Random};
use blockcore::graph::{Control, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::options::Options;

use super::{listed, marked_by_qemu, persistent, text};
use crate::setup::{Images, contents, qemu};
use crate::world::{LIMIT, OPEN, World, assert_usable, moment};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 16;
/// How often the power is cut in what is done to each.
const CUTS: u64 = 8;
const GRANULARITY: u64 = 4096;

/// What is done, among writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    /// Nothing else.
    Write,
    /// A bitmap is added before the second half of the writes, which go to the second half of the disk.
    Add,
    Remove,
    Resize,
    /// The node is reopened read-only, and for writing again, between the halves.
    Reopen,
}

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    options: String,
    bytes: u64,
    bitmaps: Vec<&'static str>,
    verb: Verb,
    /// Offsets of the halves.
    writes: [Vec<u64>; 2],
    /// What completed survives a kill, and is looked for.
    keeps: bool,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let cluster = 1_u64 << (9 + random.below(5));
        let bytes = (cluster * (40 + random.below(400))).next_multiple_of(2 * GRANULARITY);
        let mut writes = [Vec::new(), Vec::new()];
        for (half, writes) in writes.iter_mut().enumerate() {
            for _ in 0..1 + random.below(5) {
                let within = random.below(bytes / 2 / 512) * 512;
                writes.push(half as u64 * bytes / 2 + within);
            }
        }
        let verbs = [
            Verb::Write,
            Verb::Add,
            Verb::Remove,
            Verb::Resize,
            Verb::Reopen,
        ];
        let verb = verbs[random.below(5) as usize];
        let count = match verb {
            Verb::Add => random.below(3) as usize,
            _ => 1 + random.below(2) as usize,
        };
        Self {
            seed,
            options: format!("cluster_size={cluster}"),
            bytes,
            bitmaps: ["a", "b"][..count].to_vec(),
            verb,
            writes,
            keeps: random.below(2) == 0,
        }
    }

    /// An empty disk with bitmaps, which QEMU has made.
    fn make(&self, image: &Path) {
        let (path, bytes) = (text(image), self.bytes.to_string());
        let create = ["create", "-f", "qcow2", "-o", &self.options, path, &bytes];
        qemu("qemu-img", &create);
        for name in &self.bitmaps {
            qemu("qemu-img", &["bitmap", "--add", "-g", "4k", path, name]);
        }
    }

    /// From opening to closing.
    async fn live(self, control: Control) -> Result<(), Error> {
        control.add(Options::parse(OPEN, None)?).await?;
        self.write(&control, 0).await?;
        match self.verb {
            Verb::Write => {}
            Verb::Add => {
                let mut spec = persistent("new");
                spec.granularity_bytes = Some(GRANULARITY);
                control.add_bitmap("disk", &spec).await?;
            }
            Verb::Remove => control.remove_bitmap("disk", "a").await?,
            Verb::Resize => {
                let bytes = self.bytes + (1 << 20);
                control.resize("disk", bytes, Preallocation::Off).await?;
            }
            Verb::Reopen => {
                for read_only in ["on", "off"] {
                    let entry = format!("{OPEN},read-only={read_only}");
                    control.reopen(vec![Options::parse(&entry, None)?]).await?;
                }
            }
        }
        self.write(&control, 1).await?;
        control.remove("disk").await
    }

    async fn write(&self, control: &Control, half: usize) -> Result<(), Error> {
        let id = control.add_root("disk", RootSpec::writer("a test")).await?;
        let root = control.root_here(id)?;
        let from = Segments::allocate(512, 512);
        from.fill(1 + half as u8);
        for offset in &self.writes[half] {
            let written = root.write(*offset, from.clone(), WriteFlags::empty()).await;
            // The host may have failed.
            let _ = written;
        }
        let _ = root.flush().await;
        drop(root);
        control.remove_root(id).await
    }
}

/// The process after a kill opens the image, finds what completed, and closes it.
fn recover(world: World) -> World {
    let world = world.begin_again();
    world.control.set_runtime_directory(Some("/run".into()));
    let lived = world.run(|control| async move {
        control.add(Options::parse(OPEN, None)?).await?;
        control.remove("disk").await
    });
    lived.expect("nothing fails");
    world
}

/// Lives for as long as `limit`; `None` if it was not over by then.
fn live(world: &World, case: &Case, limit: Duration) -> Option<Result<(), Error>> {
    let directory = case.keeps.then(|| "/run".into());
    world.control.set_runtime_directory(directory);
    world.run_for(limit, |control| case.clone().live(control))
}

#[derive(Debug, Default)]
struct Totals {
    valid: u64,
    in_use: u64,
    missing: u64,
    failed: u64,
}

/// What a bitmap says is true, or it says that it means nothing.
fn check(case: &Case, image: &Path, when: &str, totals: &mut Totals) {
    assert_usable(image, when);
    let disk = contents(image);
    let found = listed(image);
    for name in &case.bitmaps {
        let is_there = found.iter().any(|bitmap| bitmap.0 == *name);
        let may_be_gone = case.verb == Verb::Remove && *name == "a";
        assert!(is_there || may_be_gone, "{when}: bitmap '{name}' is lost");
        totals.missing += u64::from(!is_there);
    }
    for (name, granularity, flags) in found {
        assert_eq!(granularity, GRANULARITY);
        if flags.contains(&"in-use".to_owned()) {
            totals.in_use += 1;
            continue;
        }
        totals.valid += 1;
        let marks = marked_by_qemu(image, &name);
        // What was there before the bitmap was is none of its business.
        let begin = match &*name {
            "new" => case.bytes / 2,
            _ => 0,
        };
        let written = disk.iter().enumerate().skip(begin as usize);
        for (at, _) in written.filter(|(_, byte)| **byte != 0) {
            let at = at as u64;
            let is_marked = marks
                .iter()
                .any(|mark| (mark.0..mark.0 + mark.1).contains(&at));
            assert!(
                is_marked,
                "{when}: bitmap '{name}' misses a write at {at:#x}"
            );
        }
    }
}

#[test]
fn no_power_cut_and_no_kill_leaves_a_bitmap_that_misses_a_write() {
    let totals = harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, cut);
    if let Some(totals) = totals {
        let least = totals.valid.min(totals.in_use);
        assert!(
            least > 2 * DEFAULT_SEEDS && totals.missing > 0,
            "{totals:?}"
        );
    }
}

fn cut(case: &Case, totals: &mut Totals) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    case.make(&image);
    let bytes = std::fs::read(&image).expect("just made");
    let world = World::new(case.seed, &bytes);
    let begun = world.simulation.now();
    let done = live(&world, case, LIMIT);
    done.expect("it ends").expect("nothing fails");
    let takes = world.simulation.now() - begun;
    let left = images.path("left.qcow2");
    world.dump(&left);
    let mut uncut = Totals::default();
    check(case, &left, "uncut", &mut uncut);
    assert_eq!(uncut.in_use, 0, "all were stored");
    let mut random = Random::new(case.seed);
    for index in 0..CUTS {
        let world = World::new(case.seed, &bytes);
        let share = moment(&mut random);
        live(&world, case, takes * share as u32 / 1000);
        let is_kill = world.cut_off(&mut random);
        let world = match is_kill && case.keeps {
            true => recover(world),
            false => world,
        };
        world.dump(&left);
        let when = format!("cut {index}, after {share} permille, kill: {is_kill}");
        check(case, &left, &when, totals);
    }
}

#[test]
fn a_host_that_fails_leaves_no_bitmap_that_misses_a_write() {
    let totals = harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, fail);
    if let Some(totals) = totals {
        assert!(totals.failed > DEFAULT_SEEDS / 2, "{totals:?}");
    }
}

fn fail(case: &Case, totals: &mut Totals) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    case.make(&image);
    let bytes = std::fs::read(&image).expect("just made");
    let left = images.path("left.qcow2");
    let mut random = Random::new(case.seed);
    for attempt in 0..4 {
        let world = World::new(case.seed + 1000 * attempt, &bytes);
        let permille = 1 + random.below(60) as u32;
        world.simulation.set_faults(Faults {
            read_error_permille: permille / 4,
            write_error_permille: permille,
            sync_error_permille: permille / 2,
            no_space_permille: permille,
            ..Faults::default()
        });
        let lived = live(&world, case, LIMIT).expect("it ends");
        totals.failed += u64::from(lived.is_err());
        // What is open still is closed, whatever its host says.
        drop(world.run(|control| async move { control.close_all().await }));
        world.simulation.set_faults(Faults::default());
        world.dump(&left);
        let when = format!("attempt {attempt}: {lived:?}");
        check(case, &left, &when, totals);
    }
}

#[cfg(feature = "planted-faults")]
#[test]
fn mistakes_with_bitmaps_are_found() {
    use blockcore::fault::{self, Fault};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    for (name, planted) in Fault::BITMAPS {
        let fails = |seed: u64, planted: Option<Fault>| {
            let case = Case::new(seed);
            fault::plant(planted);
            let run = AssertUnwindSafe(|| cut(&case, &mut Totals::default()));
            let outcome = catch_unwind(run);
            fault::plant(None);
            outcome.is_err()
        };
        let found = (1..=20).find(|seed| fails(*seed, Some(planted)));
        let seed = found.unwrap_or_else(|| panic!("{name}: not found within 20 seeds"));
        eprintln!("{name}: seed {seed}");
        assert!(!fails(seed, None), "seed {seed} fails by itself");
    }
}
