//! Taking, applying and deleting snapshots on a simulated host, cut off by a power cut or a kill at any
//! moment, and with a host that fails: what is left is what was before or what should be after, and clean.

use std::path::Path;
use std::time::Duration;

use blockcore::Error;
use blockcore::driver::SnapshotRef;
use blockcore::engine::sim::{Faults, Random};

use super::{listed, named, snapshot_contents, text};
use crate::setup::{Images, assert_clean, contents, qemu};
use crate::world::{LIMIT, World, assert_usable, moment};

/// Images tried when nothing is said.
const DEFAULT_SEEDS: u64 = 25;
/// How often the power is cut in what is done to each.
const CUTS: u64 = 8;

/// What is done.
#[derive(Clone, Copy, Debug)]
enum Verb {
    Take,
    Apply,
    Delete,
}

#[derive(Debug)]
struct Case {
    seed: u64,
    options: String,
    bytes: u64,
    writes: Vec<String>,
    verb: Verb,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let cluster = 1_u64 << (9 + random.below(4));
        let bytes = cluster * (40 + random.below(400));
        let mut options = format!("cluster_size={cluster}");
        if random.below(4) == 0 {
            options.push_str(",compat=0.10");
        } else {
            options.push_str(&format!(",refcount_bits={}", 4 << random.below(5)));
        }
        let mut writes = Vec::new();
        for _ in 0..3 {
            let mut commands = String::new();
            for _ in 0..2 + random.below(6) {
                let offset = random.below(bytes / 512) * 512;
                let length = (1 + random.below(cluster * 20 / 512)) * 512;
                let length = length.min(bytes - offset);
                let fill = 1 + random.below(255);
                commands.push_str(&format!("write -P {fill} {offset} {length}\n"));
            }
            writes.push(commands);
        }
        let verb = [Verb::Take, Verb::Apply, Verb::Delete][random.below(3) as usize];
        Self {
            seed,
            options,
            bytes,
            writes,
            verb,
        }
    }

    /// An image with two snapshots, which QEMU has made.
    fn make(&self, image: &Path) {
        let (path, bytes) = (text(image), self.bytes.to_string());
        let create = ["create", "-f", "qcow2", "-o", &self.options, path, &bytes];
        qemu("qemu-img", &create);
        for (index, commands) in self.writes.iter().enumerate() {
            let mut arguments = vec!["-f", "qcow2"];
            for command in commands.lines() {
                arguments.extend(["-c", command]);
            }
            arguments.push(path);
            qemu("qemu-io", &arguments);
            if index < 2 {
                let name = format!("theirs {index}");
                qemu("qemu-img", &["snapshot", "-c", &name, path]);
            }
        }
    }
}

/// What an image holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Held {
    /// By QEMU's judgement.
    pub(crate) fn by(image: &Path) -> Self {
        let ids = listed(image);
        let ids = ids.iter().map(|snapshot| snapshot["id"].as_str().unwrap());
        Self {
            disk: contents(image),
            snapshots: ids
                .map(|id| (id.to_owned(), snapshot_contents(image, id)))
                .collect(),
        }
    }

    fn after(&self, verb: Verb) -> Self {
        let mut after = self.clone();
        match verb {
            Verb::Take => after.snapshots.push(("3".into(), self.disk.clone())),
            Verb::Apply => after.disk.clone_from(&self.snapshots[0].1),
            Verb::Delete => drop(after.snapshots.remove(0)),
        }
        after
    }
}

/// Does it, for as long as `limit`; `None` if it was not done by then.
fn attempt(world: &World, verb: Verb, limit: Duration) -> Option<Result<(), Error>> {
    world.run_for(limit, |control| async move {
        match verb {
            Verb::Take => control.take_snapshot("disk", named("ours")).await,
            Verb::Apply => control.apply_snapshot("disk", &SnapshotRef::id("1")).await,
            Verb::Delete => {
                let which = SnapshotRef::id("1");
                control.delete_snapshot("disk", &which).await.map(drop)
            }
        }
    })
}

#[derive(Debug, Default)]
struct Totals {
    before: u64,
    after: u64,
    failed: u64,
}

#[test]
fn a_power_cut_leaves_a_clean_image_as_it_was_or_as_it_shall_be() {
    let totals = harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, cut);
    if let Some(totals) = totals {
        let least = totals.before.min(totals.after);
        assert!(least > DEFAULT_SEEDS, "{totals:?}");
    }
}

fn cut(case: &Case, totals: &mut Totals) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    case.make(&image);
    let before = Held::by(&image);
    let after = before.after(case.verb);
    let bytes = std::fs::read(&image).expect("just made");
    let world = World::opened(case.seed, &bytes);
    let begun = world.simulation.now();
    let done = attempt(&world, case.verb, LIMIT);
    done.expect("it ends").expect("nothing fails");
    let takes = world.simulation.now() - begun;
    let left = images.path("left.qcow2");
    world.dump(&left);
    assert_clean(&left, "uncut");
    assert_eq!(Held::by(&left), after, "uncut");
    let mut random = Random::new(case.seed);
    for index in 0..CUTS {
        let world = World::opened(case.seed, &bytes);
        let share = moment(&mut random);
        attempt(&world, case.verb, takes * share as u32 / 1000);
        let is_kill = world.cut_off(&mut random);
        world.dump(&left);
        let when = format!("cut {index}, after {share} permille, kill: {is_kill}");
        assert_clean(&left, &when);
        match Held::by(&left) {
            held if held == before => totals.before += 1,
            held if held == after => totals.after += 1,
            _ => panic!("{when}: it is neither as before nor as after"),
        }
    }
}

#[test]
fn a_host_that_fails_leaves_the_image_as_it_was_or_as_it_shall_be() {
    let totals = harness::seeds::try_cases(DEFAULT_SEEDS, Case::new, fail);
    if let Some(totals) = totals {
        assert!(totals.failed > DEFAULT_SEEDS, "{totals:?}");
    }
}

fn fail(case: &Case, totals: &mut Totals) {
    let images = Images::new();
    let image = images.path("image.qcow2");
    case.make(&image);
    let before = Held::by(&image);
    let after = before.after(case.verb);
    let bytes = std::fs::read(&image).expect("just made");
    let left = images.path("left.qcow2");
    let mut random = Random::new(case.seed);
    for index in 0..4 {
        let world = World::opened(case.seed + 1000 * index, &bytes);
        let permille = 1 + random.below(80) as u32;
        world.simulation.set_faults(Faults {
            read_error_permille: permille / 4,
            write_error_permille: permille,
            sync_error_permille: permille,
            no_space_permille: permille,
            ..Faults::default()
        });
        let done = attempt(&world, case.verb, LIMIT).expect("it ends");
        world.simulation.set_faults(Faults::default());
        // What this process goes on with is whole, if it goes on.
        let closed = world.run(|control| async move { control.remove("disk").await });
        world.dump(&left);
        assert_usable(&left, &format!("{done:?}, {closed:?}"));
        let held = Held::by(&left);
        match done {
            Ok(()) => assert!(held == after, "it was done"),
            Err(error) => {
                totals.failed += 1;
                let is_either = held == before || held == after;
                assert!(is_either, "{error}: neither as before nor as after");
            }
        }
    }
}
