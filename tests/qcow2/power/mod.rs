//! Images on the simulated engine: power cuts, kills and failures at any moment, and what they leave.
//!
//! A seed decides the image, which QEMU makes, what goes wrong, how many workers there are, what their
//! guests ask, and what the operator does meanwhile. An image lives several lives: each ends in order, by a
//! kill or by a power cut. At many moments of each, several states are drawn that a power cut could leave
//! at that moment; those, and what the ends leave, are read by us and compared with what was asked,
//! acknowledged and flushed, and are looked at by `qemu-img check`: nothing may be corrupt. Clusters may leak
//! when a life did not end in order, and then only.
//!
//! The environment chooses the seeds: see [`harness::seeds`].

mod case;
#[cfg(feature = "planted-faults")]
mod faults;
mod guest;
mod judge;
mod life;
mod read;

use std::cell::{Cell, RefCell, RefMut};
use std::rc::Rc;
use std::time::Duration;

use blockcore::engine::sim::{FileProperties, Random, Simulation};
use harness::history::{self, Flushed, History};
use harness::seeds;

use case::{BASE_TAG, Case, Files};
use judge::{Image, Judge};
use life::Life;

/// Seeds tried when nothing is said.
const DEFAULT_SEEDS: u64 = 520;
/// Simulated time after which a wait that has not ended is stuck.
const LIMIT: Duration = Duration::from_secs(600);
/// How many states are drawn at one moment at most.
const MOST_STATES: usize = 16;
/// Files that are written to.
const WRITTEN: [&str; 2] = ["image", "data"];

#[test]
fn images_are_whole_after_every_power_cut_and_hold_what_was_flushed() {
    let judge = Judge::new();
    let totals = seeds::try_all(DEFAULT_SEEDS, |seed, totals: &mut Totals| {
        let case = Case::new(seed);
        seeds::replayable(seed, &case, |case| {
            let hash = Test::run(case, &judge, totals)?;
            match judge.wrong().first() {
                Some(wrong) => Err(wrong.clone()),
                None => Ok(hash),
            }
        })
    });
    let (wrong, leaking) = judge.settle();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    eprintln!("{} distinct states, {leaking} with leaks", judge.distinct());
    if let Some(totals) = totals {
        totals.check();
        assert!(judge.distinct() > 20_000, "{}", judge.distinct());
    }
}

/// What the seeds reached together, so that a test that tests nothing is seen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Totals {
    requests: u64,
    fast: u64,
    failed: u64,
    states: u64,
    closed: u64,
    kills: u64,
    recovered: u64,
    power_cuts: u64,
    resizes: u64,
    compressed: u64,
    flushes: u64,
}

impl Totals {
    fn check(&self) {
        assert!(self.requests > 10_000 && self.fast > 500, "{self:?}");
        assert!(self.failed > 100 && self.states > 20_000, "{self:?}");
        assert!(self.closed > 80 && self.kills > 80, "{self:?}");
        assert!(self.recovered > 80, "{self:?}");
        assert!(self.power_cuts > 150 && self.resizes > 100, "{self:?}");
        assert!(self.compressed > 300 && self.flushes > 300, "{self:?}");
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.fast += other.fast;
        self.failed += other.failed;
        self.states += other.states;
        self.closed += other.closed;
        self.kills += other.kills;
        self.recovered += other.recovered;
        self.power_cuts += other.power_cuts;
        self.resizes += other.resizes;
        self.compressed += other.compressed;
        self.flushes += other.flushes;
    }
}

/// An image across all lives.
pub(crate) struct Test<'a> {
    case: Case,
    judge: &'a Judge,
    simulation: Rc<Simulation>,
    disk: Rc<Disk>,
    /// The process was killed, and what completed is to be found when the image is opened again.
    is_kept: Cell<bool>,
}

/// What is known of the disk, and what its users share.
pub(crate) struct Disk {
    history: RefCell<History>,
    /// How long it may be after a power cut.
    lengths: RefCell<Vec<u64>>,
    simulation: Rc<Simulation>,
    /// Syncs that have failed, as far as the history knows.
    lost_syncs: Cell<u64>,
    random: RefCell<Random>,
    next_tag: Cell<u32>,
    failure: RefCell<Option<String>>,
    totals: RefCell<Totals>,
}

impl Test<'_> {
    /// Lives every life; returns the simulation's hash.
    pub(crate) fn run(case: &Case, judge: &Judge, totals: &mut Totals) -> Result<u64, String> {
        let simulation = Rc::new(Simulation::new(case.seed));
        for (name, bytes) in case.files() {
            simulation.load_file(path(name), FileProperties::default(), &bytes);
        }
        simulation.set_faults(case.faults.clone());
        let mut history = History::new(case.bytes, case.grain);
        if let Some((bytes, _)) = case.backing {
            let base = history.begin_write(BASE_TAG, 0, bytes.min(case.bytes));
            history.end_write(base, history::Outcome::Stable);
        }
        let disk = Rc::new(Disk {
            history: RefCell::new(history),
            lengths: RefCell::new(vec![case.bytes]),
            simulation: Rc::clone(&simulation),
            lost_syncs: Cell::new(0),
            random: RefCell::new(simulation.random()),
            next_tag: Cell::new(BASE_TAG + 1),
            failure: RefCell::default(),
            totals: RefCell::default(),
        });
        let test = Test {
            case: case.clone(),
            judge,
            simulation,
            disk,
            is_kept: Cell::new(false),
        };
        for life in 0..case.lives {
            while test.disk.chance(150) {
                Life::die_young(&test)?;
            }
            let lived = Life::begin(&test).and_then(|begun| begun.live(&test, life));
            lived.map_err(|why| format!("seed {}, life {life}: {why}", case.seed))?;
        }
        if test.is_kept.get() {
            let found = Life::begin(&test).map(drop);
            found.map_err(|why| format!("seed {}, at the end: {why}", case.seed))?;
        }
        totals.add(&test.disk.totals.borrow());
        Ok(test.simulation.hash())
    }

    fn what(&self, when: &str) -> String {
        format!("seed {}, {when}", self.case.seed)
    }

    /// The files as they are now.
    fn files(&self) -> Files {
        let names = self.case.files().into_keys();
        names
            .map(|name| (name, self.simulation.contents(path(name)).expect("stays")))
            .collect()
    }

    /// Draws states that a power cut could leave now, the more the more of the metadata is not durable, and
    /// looks at those that are new.
    fn look_at_possible(&self, when: &str) -> Result<(), String> {
        let mut random = self.disk.random.borrow_mut().fork();
        let files = self.files();
        let metadata = judge::metadata(&files["image"]);
        let unsynced = self.simulation.unsynced(path("image"));
        let uncertain = unsynced.iter().filter(|(offset, bytes)| {
            let (begin, end) = (*offset as usize, (offset + bytes) as usize);
            metadata
                .iter()
                .any(|piece| piece.0 < end && begin < piece.1)
        });
        let states = match uncertain.count() {
            0 => 1,
            some => (2 * some).min(MOST_STATES),
        };
        for state in 0..states {
            let mut files = files.clone();
            for name in WRITTEN {
                if let Some(file) = files.get_mut(name) {
                    let possible = self.simulation.possible_contents(path(name), &mut random);
                    *file = possible.expect("stays");
                }
            }
            self.disk.count(|totals| &mut totals.states);
            let is_new = self.judge.is_new(&files);
            if is_new || state == 0 {
                let contents = read::whole(&self.case, &files)?;
                self.disk.check_length(contents.len() as u64)?;
                let checked = self.disk.history().check_power_cut(&contents);
                checked.map_err(|wrong| format!("{when}: {wrong}"))?;
            }
            if is_new {
                self.submit(files, when, None);
            }
        }
        Ok(())
    }

    /// Has QEMU look at files.
    fn submit(&self, files: Files, when: &str, closed: Option<Files>) {
        self.judge.submit(Image {
            what: self.what(when),
            files,
            closed,
        });
    }
}

impl Disk {
    fn below(&self, limit: u64) -> u64 {
        self.random.borrow_mut().below(limit)
    }

    fn chance(&self, permille: u32) -> bool {
        self.random.borrow_mut().chance(permille)
    }

    fn tag(&self, compressible: bool) -> u32 {
        let tag = self.next_tag.replace(self.next_tag.get() + 1);
        match compressible {
            true => tag | history::COMPRESSIBLE,
            false => tag,
        }
    }

    fn fail(&self, why: String) {
        self.failure.borrow_mut().get_or_insert(why);
    }

    fn has_failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    fn check(&self) -> Result<(), String> {
        self.failure.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn count(&self, which: impl FnOnce(&mut Totals) -> &mut u64) {
        *which(&mut self.totals.borrow_mut()) += 1;
    }

    fn check_length(&self, bytes: u64) -> Result<(), String> {
        let lengths = self.lengths.borrow();
        match lengths.contains(&bytes) {
            true => Ok(()),
            false => Err(format!("the disk has {bytes} bytes, and not {lengths:?}")),
        }
    }

    /// The history, with the flushes that failed without any guest being told.
    fn history(&self) -> RefMut<'_, History> {
        let mut history = self.history.borrow_mut();
        let lost = WRITTEN
            .iter()
            .map(|name| self.simulation.lost_syncs(path(name)))
            .sum();
        if self.lost_syncs.replace(lost) != lost {
            let flush = history.begin_flush();
            history.end_flush(flush, Flushed::Lost);
        }
        history
    }
}

/// Where a file is on the simulated host.
fn path(name: &str) -> String {
    format!("/simulated/{name}")
}
