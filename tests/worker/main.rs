//! Workers, an export and its guest on the simulated engine, checked against the disk's history.
//!
//! A seed decides the disk, what goes wrong, how many workers and queues there are, how the guest's
//! driver behaves and what it asks. While requests are in flight or held for their failures, queues are
//! stopped, started, set up differently, moved from worker to worker and broken, the disk is drained, and
//! the write cache is turned off and on. Who holds requests says so, or nobody resumes them and the guest
//! waits for ever. A disk lives several lives: each ends in order, by a kill or by a power cut, and the
//! next has a new guest.
//!
//! The environment chooses the seeds: see [`harness::seeds`].

mod case;
mod guest;
mod life;
mod request;
mod server;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use backend::export::{Export, RootSide, WorkerHandle};
use backend::worker::{DeviceId, Notice};
use blockcore::engine::sim::{Random, Simulation, Worker};
use blockcore::graph::Control;
use blockcore::mailbox::Mailbox;
use blockcore::{Error, ErrorKind};
use harness::history::History;
use harness::seeds;

use case::Case;
use life::Life;

/// Seeds tried when nothing is said: about ten seconds.
const DEFAULT_SEEDS: u64 = 400;
/// Simulated time after which a wait that has not ended is stuck.
const LIMIT: Duration = Duration::from_secs(60);
/// The simulated image.
const PATH: &str = "/simulated/disk";
/// What GET_ID answers.
const SERIAL: &str = "simulated";

#[test]
fn every_request_is_completed_once_and_leaves_only_what_the_history_allows() {
    if let Some(totals) = seeds::try_all(DEFAULT_SEEDS, try_seed) {
        totals.check();
    }
}

/// Runs a seed; a failure says how to have it again.
fn try_seed(seed: u64, totals: &mut Totals) -> (u64, u64) {
    let case = Case::new(seed);
    seeds::replayable(seed, &case, |case| Test::run(case, totals))
}

/// What the seeds reached together, so that a test that tests nothing is seen.
#[derive(Clone, Debug, Default)]
struct Totals {
    requests: u64,
    failed: u64,
    refused: u64,
    moves: u64,
    restarts: u64,
    broken: u64,
    toggles: u64,
    drains: u64,
    held: u64,
    given_up: u64,
    resumes: u64,
    kills: u64,
    power_cuts: u64,
    announced: u64,
}

impl Totals {
    fn check(&self) {
        assert!(self.requests > 20_000, "{self:?}");
        assert!(self.failed > 1_000 && self.refused > 1_000, "{self:?}");
        assert!(self.moves > 500 && self.restarts > 500, "{self:?}");
        assert!(self.broken > 100 && self.toggles > 400, "{self:?}");
        assert!(self.held > 500 && self.resumes > 200, "{self:?}");
        assert!(self.given_up > 20 && self.drains > 100, "{self:?}");
        assert!(self.kills > 100 && self.power_cuts > 200, "{self:?}");
        assert!(self.announced > 1_000, "{self:?}");
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.refused += other.refused;
        self.moves += other.moves;
        self.restarts += other.restarts;
        self.broken += other.broken;
        self.toggles += other.toggles;
        self.drains += other.drains;
        self.held += other.held;
        self.given_up += other.given_up;
        self.resumes += other.resumes;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.announced += other.announced;
    }
}

/// What the guest saw in one life, as the export should have counted it.
#[derive(Debug, Default)]
struct Seen {
    reads: u64,
    writes: u64,
    flushes: u64,
    ranges: u64,
    errors: u64,
    refused_ranges: u64,
}

/// A disk across its lives.
struct Test {
    case: Case,
    history: RefCell<History>,
    random: RefCell<Random>,
    next_tag: Cell<u32>,
    /// This life's export is.
    read_only: Cell<bool>,
    /// Writes that complete now are durable.
    stable: Cell<bool>,
    /// The write cache is being turned on or off.
    toggling: Cell<bool>,
    /// A flush was lost in this life: none can succeed that begins after it.
    lost: Cell<bool>,
    /// Somebody is going to resume what is held.
    resuming: Cell<bool>,
    /// Changes of queues under way, and which queues they may stop.
    tasks: Cell<usize>,
    changing: RefCell<Vec<bool>>,
    hash: Cell<u64>,
    seen: RefCell<Seen>,
    totals: RefCell<Totals>,
    failure: RefCell<Option<String>>,
}

impl Test {
    /// Lives every life; returns the simulation's hash and that of what the guest saw.
    fn run(case: &Case, totals: &mut Totals) -> Result<(u64, u64), String> {
        let simulation = Simulation::new(case.seed);
        simulation.create_file(PATH, case.properties.clone(), case.file_bytes());
        simulation.set_capacity(case.capacity);
        simulation.set_faults(case.faults.clone());
        let test = Rc::new(Self {
            case: case.clone(),
            history: RefCell::new(History::new(case.bytes, 512)),
            random: RefCell::new(simulation.random()),
            next_tag: Cell::new(1),
            read_only: Cell::new(false),
            stable: Cell::new(false),
            toggling: Cell::new(false),
            lost: Cell::new(false),
            resuming: Cell::new(false),
            tasks: Cell::new(0),
            changing: RefCell::default(),
            hash: Cell::new(0),
            seen: RefCell::default(),
            totals: RefCell::default(),
            failure: RefCell::new(None),
        });
        for life in 0..case.lives {
            let lived = Life::begin(&test, &simulation).and_then(Life::live);
            lived.map_err(|why| format!("seed {}, life {life}: {why}", case.seed))?;
        }
        totals.add(&test.totals.borrow());
        Ok((simulation.hash(), test.hash.get()))
    }

    fn below(&self, limit: u64) -> u64 {
        self.random.borrow_mut().below(limit)
    }

    fn chance(&self, permille: u32) -> bool {
        self.random.borrow_mut().chance(permille)
    }

    /// Adds what drivers were told of memory.
    fn count_announced(&self) {
        self.totals.borrow_mut().announced += harness::pass::take_announced();
    }

    fn fail(&self, why: String) {
        self.failure.borrow_mut().get_or_insert(why);
    }

    /// Adds something that the guest saw to the hash.
    fn see(&self, what: u64) {
        let hash = self.hash.get() ^ what;
        self.hash.set(harness::random::mix(hash).wrapping_add(1));
    }

    fn flushes_can_be_lost(&self) -> bool {
        !self.case.direct && self.case.faults.sync_error_permille > 0
    }

    /// Opens the disk, as often as it takes.
    fn open(
        &self,
        simulation: &Simulation,
        office: &Worker,
        control: &Control,
    ) -> Result<(), String> {
        for _ in 0..10_000 {
            let (inner, options) = (control.clone(), self.case.options(self.read_only.get()));
            let opening = async move { inner.add(options).await };
            let opened = simulation.run(office, LIMIT, opening);
            match opened.map_err(|stuck| stuck.to_string())? {
                Ok(_) => {
                    // Readers need not wait for what a writer left behind.
                    let landed = || simulation.in_flight() == 0;
                    let run = simulation.run_until(LIMIT, landed);
                    return run.map_err(|stuck| stuck.to_string());
                }
                Err(error) => self.check_open_error(&error)?,
            }
        }
        Err("the disk cannot be opened".into())
    }

    /// Injected failures may keep the disk from being opened; locks only make it wait.
    fn check_open_error(&self, error: &Error) -> Result<(), String> {
        if error.kind() == ErrorKind::Io && self.case.faults.call_error_permille > 0 {
            return Ok(());
        }
        Err(format!("cannot open: {}", error.report()))
    }

    /// Offers the disk, as often as it takes: locks are host calls, which may fail.
    fn export(
        &self,
        simulation: &Simulation,
        office: &Worker,
        control: &Control,
        workers: Vec<WorkerHandle>,
        first: usize,
        notices: &Arc<Mailbox<Notice>>,
    ) -> Result<Rc<Export>, String> {
        let config = self.case.export(self.read_only.get());
        for _ in 0..10_000 {
            let (control, config, workers) = (control.clone(), config.clone(), workers.clone());
            let (device, notices) = (DeviceId(7), Arc::clone(notices));
            let offering = async move {
                let root = RootSide::default();
                Export::new(config, device, &control, workers, first, root, notices).await
            };
            let offered = simulation.run(office, LIMIT, offering);
            match offered.map_err(|stuck| stuck.to_string())? {
                Ok(export) => return Ok(export),
                Err(error) => self.check_open_error(&error)?,
            }
        }
        Err("the disk cannot be offered".into())
    }

    /// The disk's part of the file.
    fn contents(&self, simulation: &Simulation) -> Vec<u8> {
        let file = simulation.contents(PATH).expect("nobody removes it");
        file[self.case.raw_offset as usize..][..self.case.bytes as usize].to_vec()
    }

    fn count(&self, which: impl FnOnce(&mut Totals) -> &mut u64) {
        *which(&mut self.totals.borrow_mut()) += 1;
    }
}
