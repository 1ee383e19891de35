//! Jobs on the simulated engine: random jobs under random guests, with an operator who disturbs them, up to
//! an end in order, a kill or a power cut; then the next life serves what was recorded.
//!
//! Each guest has blocks of its own, so that what every block may hold is known: after an end in order or a
//! kill what completed last, after a power cut that or anything since the last flush. A backup must hold
//! what the disk held when the job began, a mirror that ended what the disk held then.
//!
//! The environment chooses the seeds: see [`harness::seeds`].

mod disk;
#[cfg(feature = "planted-faults")]
mod faults;
mod life;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use blockcore::engine::sim::{Faults, FileProperties, Random, Simulation};
use harness::seeds;

use disk::{Disk, Templates};
use life::{End, Life};

/// Seeds tried when nothing is said.
const DEFAULT_SEEDS: u64 = 150;
/// Simulated time after which a wait that has not ended is stuck.
const LIMIT: Duration = Duration::from_secs(600);

/// What a seed decides before anything runs.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    lives: usize,
    jobs: u64,
    guests: u64,
    /// How long a guest rests between two requests, at most.
    rest_us: u64,
    faults: Faults,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut of = |choices: &[u64]| choices[random.below(choices.len() as u64) as usize];
        Self {
            seed,
            lives: of(&[1, 2, 3]) as usize,
            jobs: of(&[2, 4, 8]),
            guests: of(&[1, 3, 6]),
            rest_us: of(&[10, 500, 5000]),
            faults: Faults {
                split_permille: of(&[0, 300, 900]) as u32,
                latency_us: (0, of(&[1, 100, 2000])),
                slow_permille: of(&[0, 10, 100]) as u32,
                short_permille: of(&[0, 50]) as u32,
                ..Faults::default()
            },
        }
    }
}

/// What the seeds reached together, so that a test that tests nothing is seen.
#[derive(Clone, Debug, Default)]
struct Totals {
    writes: u64,
    reads: u64,
    jobs: u64,
    completed: u64,
    cancelled: u64,
    compared: u64,
    pivots: u64,
    snapshots: u64,
    commits: u64,
    streams: u64,
    pauses: u64,
    kills: u64,
    power_cuts: u64,
    restored: u64,
}

impl Totals {
    fn check(&self) {
        assert!(self.writes > 5_000 && self.reads > 2_000, "{self:?}");
        assert!(self.jobs > 300 && self.completed > 200, "{self:?}");
        assert!(self.cancelled > 20 && self.pauses > 100, "{self:?}");
        assert!(self.compared > 60 && self.pivots > 50, "{self:?}");
        assert!(self.snapshots > 50 && self.commits > 20, "{self:?}");
        assert!(self.streams > 10 && self.restored > 30, "{self:?}");
        assert!(self.kills > 20 && self.power_cuts > 20, "{self:?}");
    }
}

#[test]
fn guests_find_what_they_wrote_whatever_jobs_do_and_wherever_they_are_cut_off() {
    let templates = Rc::new(Templates::make());
    let run = |seed: u64, totals: &mut Totals| {
        let case = Case::new(seed);
        seeds::replayable(seed, &case, |case| try_case(&templates, case, totals))
    };
    if let Some(totals) = seeds::try_all(DEFAULT_SEEDS, run) {
        totals.check();
    }
}

/// Lives every life; returns the simulation's hash.
fn try_case(templates: &Rc<Templates>, case: &Case, totals: &mut Totals) -> Result<u64, String> {
    let simulation = Rc::new(Simulation::new(case.seed));
    templates.load(&simulation, "disk0", None);
    let disk = Rc::new(Disk::new(case.guests));
    let mut random = Random::new(case.seed ^ 0x6a6f_6273);
    let totals_now = Rc::new(RefCell::new(std::mem::take(totals)));
    let images = Rc::new(Cell::new(1));
    for number in 0..case.lives {
        simulation.set_faults(case.faults.clone());
        let end = match (number + 1 == case.lives, random.below(3)) {
            (true, _) | (_, 0) => End::InOrder,
            (_, 1) => End::Kill,
            _ => End::PowerCut,
        };
        let life = Life::begin(&simulation, templates, &disk, &totals_now, &images)?;
        let lived = life.live(case, random.fork(), end);
        lived.map_err(|why| format!("life {number} ({end:?}): {why}\n{}", life.story()))?;
    }
    *totals = totals_now.take();
    Ok(simulation.hash())
}

fn properties() -> FileProperties {
    FileProperties::default()
}
