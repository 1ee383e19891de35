//! The whole core on the simulated engine: random graphs that change under random requests, checked
//! against what each disk may hold.
//!
//! A seed decides the disks, what goes wrong, how many workers and roots there are, what the roots'
//! users ask, and what the operator does meanwhile: insert and remove filters, reopen and replace nodes,
//! change lengths, freeze chains, keep what a disk was, drain, move roots from worker to worker, add and
//! look at bitmaps, and try what must be refused. Another process may try to have a disk, too. A graph lives
//! several lives: each ends in order, by a kill or by a power cut, and the next builds a new graph on what
//! is left.
//!
//! The environment chooses the seeds: see [`harness::seeds`].

mod case;
mod copy;
#[cfg(feature = "planted-faults")]
mod faults;
mod guest;
mod length;
mod life;
mod marks;
mod modes;
mod moment;
mod operator;
mod other;
mod view;

use std::cell::{Cell, RefCell};
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::WriteFlags;
use blockcore::engine::sim::{FileProperties, Random, Simulation};
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use harness::history::{self, Flushed, History};
use harness::{pass, seeds};

use case::{Case, DiskCase};
use length::Length;
use life::Life;

/// Seeds tried when nothing is said.
const DEFAULT_SEEDS: u64 = 2000;
/// The write that made bases.
const BASE_TAG: u32 = 1;
/// Simulated time after which a wait that has not ended is stuck.
const LIMIT: Duration = Duration::from_secs(600);

#[test]
fn graphs_change_under_requests_and_disks_hold_only_what_their_histories_allow() {
    if let Some(totals) = seeds::try_all(DEFAULT_SEEDS, try_seed) {
        totals.check();
    }
}

#[test]
fn no_crate_but_the_tests_has_planted_faults_built() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let workspace = workspace.expect("the tests are in a workspace");
    let crates = fs::read_dir(workspace).expect("it can be read");
    let mut naming = Vec::new();
    for found in crates {
        let found = found.expect("it can be read").path();
        let Ok(manifest) = fs::read_to_string(found.join("Cargo.toml")) else {
            continue;
        };
        let naming_it = manifest
            .lines()
            .filter(|line| line.contains("planted-faults"));
        naming.extend(naming_it.map(str::to_owned));
    }
    naming.sort();
    let expected = [
        // The block layer has it, and does not enable it; the tests may.
        "planted-faults = [\"blockcore/planted-faults\"]",
        "planted-faults = []",
    ];
    assert_eq!(naming, expected);
}

/// Runs a seed; a failure says how to have it again.
fn try_seed(seed: u64, totals: &mut Totals) -> u64 {
    let case = Case::new(seed);
    seeds::replayable(seed, &case, |case| Test::run(case, totals))
}

/// What the seeds reached together, so that a test that tests nothing is seen.
#[derive(Clone, Debug, Default)]
struct Totals {
    requests: u64,
    fast: u64,
    failed: u64,
    kills: u64,
    power_cuts: u64,
    changes: u64,
    given_up: u64,
    refused: u64,
    drains: u64,
    waited_elsewhere: u64,
    moves: u64,
    mirror_looks: u64,
    mark_looks: u64,
    zero_answers: u64,
    resizes: u64,
    truncates: u64,
    cut_short: u64,
    copies: u64,
    compressed: u64,
    reopened: u64,
    read_only: u64,
    lone_writers: u64,
    frozen: u64,
    visits: u64,
    excluded: u64,
    filters: u64,
    looks_back: u64,
}

impl Totals {
    fn check(&self) {
        assert!(self.requests > 40_000 && self.fast > 2_000, "{self:?}");
        assert!(self.failed > 500, "{self:?}");
        assert!(self.kills > 200 && self.power_cuts > 400, "{self:?}");
        assert!(self.changes > 5_000 && self.given_up > 500, "{self:?}");
        assert!(self.refused > 500 && self.drains > 2_000, "{self:?}");
        assert!(self.waited_elsewhere > 100 && self.moves > 500, "{self:?}");
        assert!(self.mirror_looks > 500 && self.mark_looks > 500, "{self:?}");
        assert!(self.resizes > 100 && self.truncates > 80, "{self:?}");
        assert!(self.cut_short > 20, "{self:?}");
        assert!(self.copies > 500 && self.compressed > 200, "{self:?}");
        assert!(self.reopened > 500 && self.read_only > 20, "{self:?}");
        assert!(self.lone_writers > 20 && self.frozen > 100, "{self:?}");
        assert!(self.visits > 300 && self.excluded > 30, "{self:?}");
        assert!(self.filters > 250 && self.looks_back > 300, "{self:?}");
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.fast += other.fast;
        self.failed += other.failed;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.changes += other.changes;
        self.given_up += other.given_up;
        self.refused += other.refused;
        self.drains += other.drains;
        self.waited_elsewhere += other.waited_elsewhere;
        self.moves += other.moves;
        self.mirror_looks += other.mirror_looks;
        self.mark_looks += other.mark_looks;
        self.zero_answers += other.zero_answers;
        self.resizes += other.resizes;
        self.truncates += other.truncates;
        self.cut_short += other.cut_short;
        self.copies += other.copies;
        self.compressed += other.compressed;
        self.reopened += other.reopened;
        self.read_only += other.read_only;
        self.lone_writers += other.lone_writers;
        self.frozen += other.frozen;
        self.visits += other.visits;
        self.excluded += other.excluded;
        self.filters += other.filters;
        self.looks_back += other.looks_back;
    }
}

/// The disks across all lives.
struct Test {
    case: Case,
    simulation: Rc<Simulation>,
    disks: Vec<Disk>,
    random: RefCell<Random>,
    next_tag: Cell<u32>,
    failure: RefCell<Option<String>>,
    totals: RefCell<Totals>,
}

/// A disk and what it may hold.
struct Disk {
    path: String,
    length: Length,
    history: RefCell<History>,
    /// Syncs of it that have failed, as far as the history knows.
    lost_syncs: Cell<u64>,
}

impl Test {
    /// Lives every life; returns the simulation's hash.
    fn run(case: &Case, totals: &mut Totals) -> Result<u64, String> {
        pass::take_misuse();
        let simulation = Rc::new(Simulation::new(case.seed));
        for disk in &case.disks {
            simulation.create_file(&disk.path, disk.properties.clone(), disk.file_bytes());
            if disk.cluster.is_some() {
                make_base(&simulation, disk)?;
            }
        }
        simulation.set_faults(case.faults.clone());
        let disks = case.disks.iter().map(|disk| {
            let mut history = History::new(disk.most_bytes(), case.grain);
            if disk.cluster.is_some() {
                let base = history.begin_write(BASE_TAG, 0, disk.base_bytes);
                history.end_write(base, history::Outcome::Stable);
            }
            Disk {
                path: disk.path.clone(),
                length: Length::new(disk),
                history: RefCell::new(history),
                lost_syncs: Cell::new(0),
            }
        });
        let test = Rc::new(Self {
            disks: disks.collect(),
            random: RefCell::new(simulation.random()),
            case: case.clone(),
            simulation: Rc::clone(&simulation),
            next_tag: Cell::new(BASE_TAG + 1),
            failure: RefCell::default(),
            totals: RefCell::default(),
        });
        for life in 0..case.lives {
            let lived = Life::begin(&test).and_then(|begun| begun.live());
            lived.map_err(|why| format!("seed {}, life {life}: {why}", case.seed))?;
        }
        totals.add(&test.totals.borrow());
        Ok(simulation.hash())
    }

    fn below(&self, limit: u64) -> u64 {
        self.random.borrow_mut().below(limit)
    }

    fn chance(&self, permille: u32) -> bool {
        self.random.borrow_mut().chance(permille)
    }

    fn fail(&self, why: String) {
        self.failure.borrow_mut().get_or_insert(why);
    }

    fn has_failed(&self) -> bool {
        if let Some(misuse) = pass::take_misuse() {
            self.fail(misuse);
        }
        self.failure.borrow().is_some()
    }

    fn check(&self) -> Result<(), String> {
        self.has_failed();
        self.failure.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn count(&self, which: impl FnOnce(&mut Totals) -> &mut u64) {
        *which(&mut self.totals.borrow_mut()) += 1;
    }

    /// A disk's history, with the flushes that failed without anybody of ours being told: those of
    /// changes of the graph, and those that a kill cut off.
    fn history(&self, disk: usize) -> std::cell::RefMut<'_, History> {
        let disk = &self.disks[disk];
        let mut history = disk.history.borrow_mut();
        let lost = self.simulation.lost_syncs(&disk.path);
        if disk.lost_syncs.replace(lost) != lost {
            let flush = history.begin_flush();
            history.end_flush(flush, Flushed::Lost);
        }
        history
    }

    /// Injected failures may make any change fail.
    fn check_error(&self, what: &str, error: &Error) -> Result<(), String> {
        let faults = &self.case.faults;
        let fails = faults.call_error_permille > 0
            || faults.sync_error_permille > 0
            || faults.read_error_permille > 0
            || faults.write_error_permille > 0
            || faults.no_space_permille > 0;
        let is_full = error.kind() == ErrorKind::NoSpace && faults.no_space_permille > 0;
        if is_full || (error.kind() == ErrorKind::Io && fails) {
            return Ok(());
        }
        Err(format!(
            "{what} fails, which nothing explains: {}",
            error.report()
        ))
    }

    /// The power goes, and each disk is what it may be then.
    fn cut_power(&self) -> Result<(), String> {
        self.count(|totals| &mut totals.power_cuts);
        self.simulation.power_cut();
        for disk in 0..self.disks.len() {
            let contents = self.contents(disk);
            let cut = self.history(disk).power_cut(&contents);
            cut.map_err(|wrong| format!("{}: {wrong}", self.disks[disk].path))?;
            if self.case.disks[disk].resizes {
                self.disks[disk].length.found(self.file_bytes(disk), true)?;
            }
        }
        self.check()
    }

    /// Whether a sync of an image has failed, in this life or one that was killed before.
    fn has_lost_an_image(&self) -> bool {
        let disks = self.case.disks.iter().filter(|disk| disk.cluster.is_some());
        let mut lost = disks.map(|disk| self.simulation.lost_syncs(&disk.path));
        lost.any(|lost| lost > 0)
    }

    /// How long a disk's file is now.
    fn file_bytes(&self, disk: usize) -> u64 {
        let file = self.simulation.contents(&self.disks[disk].path);
        file.expect("nobody removes it").len() as u64
    }

    /// What a disk holds, as long as it may become.
    fn contents(&self, disk: usize) -> Vec<u8> {
        let case = &self.case.disks[disk];
        let file = self.simulation.contents(&case.path);
        let base = self.simulation.contents(&case.base_path);
        let file = file.expect("nobody removes it");
        case.decode(&file, &base.unwrap_or_default())
    }
}

/// Writes what is below an image.
fn make_base(simulation: &Simulation, disk: &DiskCase) -> Result<(), String> {
    let properties = FileProperties::default();
    simulation.create_file(&disk.base_path, properties, disk.base_bytes);
    let worker = simulation.worker();
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(worker.context()));
    let options = format!("driver=file,node-name=base,filename={}", disk.base_path);
    let data = history::data(BASE_TAG, 0, disk.base_bytes);
    let made = simulation.run(&worker, LIMIT, async move {
        let options = Options::parse(&options, None)?;
        control.add(options).await?;
        let id = control
            .add_root("base", RootSpec::writer("the past"))
            .await?;
        let root = control.root_here(id)?;
        let from = Segments::allocate(data.len(), 4096);
        from.copy_from(&data);
        let written = root.write(0, from, WriteFlags::STABLE).await;
        written.map_err(|error| Error::new(ErrorKind::Io, error.to_string()))
    });
    made.map_err(|stuck| stuck.to_string())?
        .map_err(|error| error.report())?;
    simulation.kill();
    let landed = simulation.run_until(LIMIT, || simulation.in_flight() == 0);
    landed.map_err(|stuck| stuck.to_string())
}
