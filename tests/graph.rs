//! Random requests through the node pipeline on the simulated engine, checked against their history.
//!
//! A seed decides the disk (file or device, alignment, direct or not, raw with an offset), what goes
//! wrong, how many workers there are and what they ask. A disk lives several lives: each ends in order,
//! by a kill or by a power cut, and the next begins with what is left.
//!
//! The environment chooses the seeds: see [`harness::seeds`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::engine::sim::{Faults, FileProperties, Random, Simulation, Worker};
use blockcore::engine::{Event, FileType, OpResult, preempt};
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{Request, RequestKind, Root};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind, IoError};
use futures_channel::oneshot;
use harness::history::{self, Flushed, History, Outcome};
use harness::seeds;

/// Seeds tried when nothing is said: about twenty seconds.
const DEFAULT_SEEDS: u64 = 250;
/// Simulated time after which a life that has not ended is stuck.
const LIMIT: Duration = Duration::from_secs(3600);
/// The simulated image.
const PATH: &str = "/simulated/disk";

#[test]
fn random_requests_with_faults_kills_and_power_cuts_leave_only_what_the_history_allows() {
    if let Some(totals) = seeds::try_all(DEFAULT_SEEDS, try_seed) {
        totals.check();
    }
}

/// What the guest would have seen: two queues flush at once, the host fails to write, one flush is told
/// and fails, the other succeeds; after a power cut the data that it promised is not there.
#[test]
fn of_two_flushes_at_once_neither_succeeds_unless_the_data_is_durable() {
    let mut succeeded = 0;
    for seed in 0..200 {
        let simulation = Simulation::new(seed);
        simulation.create_file(PATH, FileProperties::default(), 65536);
        let workers = [simulation.worker(), simulation.worker()];
        let control = Control::new(
            Graph::new(formats::drivers()),
            Rc::clone(workers[0].context()),
        );
        let options = format!("driver=file,node-name=disk,filename={PATH}");
        let (inner, options) = (control.clone(), Options::parse(&options, None).unwrap());
        let handles = [0, 1].map(|i: usize| workers[i].context().handle().clone());
        let opened = simulation.run(&workers[0], LIMIT, async move {
            inner.add(options).await?;
            let spec = RootSpec::writer("a guest").in_units_of(512);
            let root = inner.add_root("disk", spec).await?;
            for handle in &handles {
                inner.attach(root, handle).await?;
            }
            Ok::<_, Error>(root)
        });
        let root = opened.unwrap().unwrap();
        let roots = [0, 1].map(|i: usize| workers[i].context().root(root).unwrap());

        let from = Segments::allocate(4096, 4096);
        from.fill(7);
        let root = Rc::clone(&roots[0]);
        let written = simulation.run(&workers[0], LIMIT, async move {
            root.write(0, from, WriteFlags::empty()).await
        });
        written.unwrap().unwrap();
        simulation.set_faults(Faults {
            sync_error_permille: 500,
            ..Faults::default()
        });
        let results = Rc::<RefCell<Vec<_>>>::default();
        for (worker, root) in workers.iter().zip(roots) {
            let results = Rc::clone(&results);
            worker.context().spawn(async move {
                let result = root.flush().await;
                results.borrow_mut().push(result);
            });
        }
        let run = simulation.run_until(LIMIT, || results.borrow().len() == 2);
        run.unwrap();
        simulation.power_cut();
        if results.borrow().contains(&Ok(())) {
            succeeded += 1;
            let left = simulation.contents(PATH).unwrap();
            assert!(
                left[..4096] == [7; 4096],
                "seed {seed}: {results:?}, and the data is lost"
            );
        }
    }
    assert!(succeeded > 20, "{succeeded}");
}

/// Runs a seed; a failure says how to have it again.
fn try_seed(seed: u64, totals: &mut Totals) -> u64 {
    let case = Case::new(seed);
    seeds::replayable(seed, &case, |case| case.run(totals))
}

/// What the seeds reached together, so that a test that tests nothing is seen.
#[derive(Clone, Debug, Default)]
struct Totals {
    requests: u64,
    fast: u64,
    failed: u64,
    flushes_lost: u64,
    kills: u64,
    power_cuts: u64,
    opened_behind_io: u64,
}

impl Totals {
    fn check(&self) {
        assert!(self.requests > 50_000, "{self:?}");
        assert!(self.fast > 5_000, "{self:?}");
        assert!(self.failed > 1_000, "{self:?}");
        assert!(self.flushes_lost > 10, "{self:?}");
        assert!(self.kills > 100 && self.power_cuts > 100, "{self:?}");
        assert!(self.opened_behind_io > 10, "{self:?}");
    }
}

/// What a seed decides before anything runs.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    /// Requests come in multiples of this.
    grain: u64,
    /// The disk as the guest sees it.
    bytes: u64,
    raw_offset: u64,
    /// What the file has after the disk.
    tail: u64,
    properties: FileProperties,
    direct: bool,
    unmap: bool,
    no_flush: bool,
    fast_path: bool,
    capacity: Option<u64>,
    workers: usize,
    depth: usize,
    lives: usize,
    requests: usize,
    faults: Faults,
}

/// How much goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Nothing.
    None,
    /// What the driver must see through: short transfers, interruptions.
    Transient,
    /// Failures too.
    Failures,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut of = |choices: &[u64]| choices[random.below(choices.len() as u64) as usize];
        let device = of(&[0, 0, 1]) == 1;
        let properties = FileProperties {
            file_type: match device {
                true => FileType::BlockDevice,
                false => FileType::Regular,
            },
            direct_alignment: of(&[512, 4096]) as u32,
            memory_alignment: of(&[4, 512, 4096]) as u32,
            punches: of(&[0, 1, 1]) == 1,
            zeroes: of(&[0, 1, 1]) == 1,
            ..FileProperties::default()
        };
        let grain = of(&[1, 16, 512, 512, 512]);
        let blocks = match grain {
            1 => of(&[4, 8, 16]),
            16 => of(&[8, 16, 64]),
            _ => of(&[8, 64, 512, 1024]),
        };
        let trouble = match of(&[0, 1, 2, 2]) {
            0 => Trouble::None,
            1 => Trouble::Transient,
            _ => Trouble::Failures,
        };
        let permille = |some: u64, trouble: bool| if trouble { some as u32 } else { 0 };
        let (transient, fails) = (trouble != Trouble::None, trouble == Trouble::Failures);
        let bytes = blocks * 4096;
        Self {
            seed,
            grain,
            bytes,
            raw_offset: of(&[0, 0, 4096, 512, 1536, 24]),
            tail: of(&[0, 0, 4096, 513]),
            properties,
            direct: of(&[0, 1]) == 1,
            unmap: of(&[0, 1]) == 1,
            no_flush: of(&[0, 0, 0, 0, 0, 1]) == 1,
            fast_path: of(&[0, 1, 1]) == 1,
            capacity: match of(&[0, 0, 0, 1]) {
                1 if !device => Some(bytes / 2),
                _ => None,
            },
            workers: of(&[1, 2, 3]) as usize,
            depth: of(&[1, 4, 16]) as usize,
            lives: of(&[1, 2, 4]) as usize,
            requests: of(&[50, 100, 300]) as usize,
            faults: Faults {
                short_permille: permille(of(&[0, 50, 300]), transient),
                interrupted_permille: permille(of(&[0, 50]), transient),
                again_permille: permille(of(&[0, 50]), transient),
                read_error_permille: permille(of(&[0, 30]), fails),
                write_error_permille: permille(of(&[0, 30]), fails),
                allocate_error_permille: permille(of(&[0, 30]), fails),
                no_space_permille: permille(of(&[0, 30]), fails),
                stalled_permille: permille(of(&[0, 30]), fails),
                sync_error_permille: permille(of(&[0, 50, 200]), fails),
                call_error_permille: permille(of(&[0, 50]), fails),
                split_permille: of(&[0, 300, 900]) as u32,
                latency_us: (0, of(&[1, 100, 2000])),
                ..Faults::default()
            },
        }
    }

    /// The node tree, as an operator would write it.
    fn options(&self) -> Options {
        let on = |mode: bool| if mode { "on" } else { "off" };
        let driver = match self.properties.file_type {
            FileType::BlockDevice => "host_device",
            _ => "file",
        };
        let text = format!(
            "driver=raw,node-name=disk,offset={},size={},discard={},cache.direct={},\
             cache.no-flush={},file.driver={driver},file.filename={PATH}",
            self.raw_offset,
            self.bytes,
            if self.unmap { "unmap" } else { "ignore" },
            on(self.direct),
            on(self.no_flush),
        );
        Options::parse(&text, None).expect("well-formed")
    }

    fn file_bytes(&self) -> u64 {
        let bytes = self.raw_offset + self.bytes + self.tail;
        let device = self.properties.file_type == FileType::BlockDevice;
        match self.direct || device {
            // The larger one is what the file driver goes by.
            true => {
                let properties = &self.properties;
                let unit = properties.direct_alignment.max(properties.memory_alignment);
                bytes.next_multiple_of(u64::from(unit))
            }
            false => bytes,
        }
    }

    /// Lives every life; returns the simulation's hash.
    fn run(&self, totals: &mut Totals) -> Result<u64, String> {
        let simulation = Simulation::new(self.seed);
        simulation.create_file(PATH, self.properties.clone(), self.file_bytes());
        simulation.set_capacity(self.capacity);
        simulation.set_faults(self.faults.clone());
        let test = Rc::new(Test {
            case: self.clone(),
            history: RefCell::new(History::new(self.bytes, self.grain)),
            random: RefCell::new(simulation.random()),
            next_tag: Cell::new(1),
            outstanding: Cell::new(0),
            flushes: Cell::new(0),
            lost: Cell::new(false),
            failure: RefCell::new(None),
            totals: RefCell::default(),
        });
        for life in 0..self.lives {
            let lived = test.live(&simulation);
            lived.map_err(|why| format!("seed {}, life {life}: {why}", self.seed))?;
        }
        totals.add(&test.totals.borrow());
        Ok(simulation.hash())
    }
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.fast += other.fast;
        self.failed += other.failed;
        self.flushes_lost += other.flushes_lost;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.opened_behind_io += other.opened_behind_io;
    }
}

/// A disk across its lives.
struct Test {
    case: Case,
    history: RefCell<History>,
    random: RefCell<Random>,
    next_tag: Cell<u32>,
    outstanding: Cell<usize>,
    /// Flushes and stable writes under way.
    flushes: Cell<usize>,
    /// A flush was lost in this life: none can succeed that begins after it.
    lost: Cell<bool>,
    failure: RefCell<Option<String>>,
    totals: RefCell<Totals>,
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    InOrder,
    Kill,
    PowerCut,
    KillThenPowerCut,
}

/// A worker that serves the disk.
struct Server {
    worker: Rc<Worker>,
    root: Rc<Root>,
    fast: FastPath,
    test: Rc<Test>,
}

/// Operations started without a task, by token.
type FastPath = Rc<RefCell<BTreeMap<u64, oneshot::Sender<(OpResult, Segments)>>>>;

impl Test {
    fn below(&self, limit: u64) -> u64 {
        self.random.borrow_mut().below(limit)
    }

    fn chance(&self, permille: u32) -> bool {
        self.random.borrow_mut().chance(permille)
    }

    fn fail(&self, why: String) {
        self.failure.borrow_mut().get_or_insert(why);
    }

    fn check(&self) -> Result<(), String> {
        self.failure.borrow_mut().take().map_or(Ok(()), Err)
    }

    /// From opening the disk to the end that the seed chooses.
    fn live(self: &Rc<Self>, simulation: &Simulation) -> Result<(), String> {
        let case = &self.case;
        self.lost.set(false);
        let workers: Vec<_> = (0..case.workers)
            .map(|_| {
                let fast = FastPath::default();
                let waiting = Rc::clone(&fast);
                let worker = simulation.worker_with(move |event| match event {
                    Event::Done {
                        token,
                        result,
                        segments,
                    } => {
                        let waits = waiting.borrow_mut().remove(&token);
                        let _ = waits.expect("one event each").send((result, segments));
                    }
                    Event::Ready(_) => unreachable!("nothing is watched"),
                });
                (worker, fast)
            })
            .collect();
        let context = Rc::clone(workers[0].0.context());
        let control = Control::new(Graph::new(formats::drivers()), context);
        let root_id = self.open(simulation, &workers, &control)?;
        // What the life before had under way is over: it would have held its locks.
        let flush_may_have_failed = self.flushes.take() > 0 && self.flushes_can_be_lost();
        self.history.borrow_mut().killed(flush_may_have_failed);
        self.outstanding.set(0);

        let servers: Vec<_> = workers
            .into_iter()
            .map(|(worker, fast)| {
                let root = worker.context().root(root_id).expect("attached");
                if !case.fast_path {
                    root.disable_fast_path();
                }
                Rc::new(Server {
                    worker,
                    root,
                    fast,
                    test: Rc::clone(self),
                })
            })
            .collect();
        let end = [
            End::InOrder,
            End::Kill,
            End::PowerCut,
            End::KillThenPowerCut,
        ][self.below(4) as usize];
        let issued = match end {
            End::InOrder => case.requests,
            _ => self.below(case.requests as u64 + 1) as usize,
        };
        self.serve(simulation, &servers, issued)?;
        let plan = control.read(|graph| graph.plan(root_id));
        if case.no_flush && plan.is_some_and(|plan| plan.host_syncs() > 0) {
            return Err("a node that ignores flushes has made one".into());
        }
        match end {
            End::InOrder => self.close(simulation, servers, root_id, &control),
            End::Kill => {
                self.totals.borrow_mut().kills += 1;
                simulation.kill();
                Ok(())
            }
            End::PowerCut | End::KillThenPowerCut => {
                self.totals.borrow_mut().power_cuts += 1;
                if end == End::KillThenPowerCut {
                    simulation.kill();
                    for _ in 0..self.below(10) {
                        simulation.step();
                    }
                }
                simulation.power_cut();
                self.flushes.set(0);
                let left = self.contents(simulation);
                let mut history = self.history.borrow_mut();
                history.power_cut(&left).map_err(|wrong| wrong.to_string())
            }
        }
    }

    /// Opens the disk, as often as it takes.
    fn open(
        &self,
        simulation: &Simulation,
        workers: &[(Rc<Worker>, FastPath)],
        control: &Control,
    ) -> Result<RootId, String> {
        if simulation.in_flight() > 0 {
            self.totals.borrow_mut().opened_behind_io += 1;
        }
        let grain = self.case.grain as u32;
        for _ in 0..10_000 {
            let (inner, options) = (control.clone(), self.case.options());
            let opened = simulation.run(&workers[0].0, LIMIT, async move {
                match inner.add(options).await {
                    Err(error) if error.kind() != ErrorKind::Exists => return Err(error),
                    _ => {}
                }
                let spec = RootSpec::writer("a guest");
                let spec = spec.in_units_of(grain);
                inner.add_root("disk", spec).await
            });
            match opened.map_err(|stuck| stuck.to_string())? {
                Ok(root) => {
                    if simulation.in_flight() > 0 {
                        return Err("opened while I/O of the life before is under way".into());
                    }
                    for (worker, _) in workers {
                        let (inner, handle) = (control.clone(), worker.context().handle().clone());
                        let attach = async move { inner.attach(root, &handle).await };
                        let attached = simulation.run(&workers[0].0, LIMIT, attach);
                        let attached = attached.map_err(|stuck| stuck.to_string())?;
                        attached.map_err(|error| error.report())?;
                    }
                    return Ok(root);
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

    /// Issues requests, never more than the depth at once, the simulation running in between.
    fn serve(
        self: &Rc<Self>,
        simulation: &Simulation,
        servers: &[Rc<Server>],
        requests: usize,
    ) -> Result<(), String> {
        for _ in 0..requests {
            let free =
                || self.outstanding.get() < self.case.depth || self.failure.borrow().is_some();
            let run = simulation.run_until(LIMIT, free);
            self.check()?;
            run.map_err(|stuck| stuck.to_string())?;
            for _ in 0..self.below(6) {
                simulation.step();
            }
            let server = &servers[self.below(servers.len() as u64) as usize];
            server.issue();
            if self.chance(20) {
                // As guests do when each of their processors syncs.
                servers.iter().for_each(Server::issue_flush);
            }
        }
        Ok(())
    }

    /// Waits for every request, looks at the disk, and closes it.
    fn close(
        self: &Rc<Self>,
        simulation: &Simulation,
        servers: Vec<Rc<Server>>,
        root: RootId,
        control: &Control,
    ) -> Result<(), String> {
        let idle = || self.outstanding.get() == 0 || self.failure.borrow().is_some();
        let run = simulation.run_until(LIMIT, idle);
        self.check()?;
        run.map_err(|stuck| stuck.to_string())?;
        let bytes = servers[0].root.bytes();
        if bytes != self.case.bytes {
            return Err(format!("the disk has {bytes} bytes now"));
        }
        let contents = self.contents(simulation);
        let checked = self.history.borrow().check_now(&contents);
        checked.map_err(|wrong| wrong.to_string())?;
        let worker = Rc::clone(&servers[0].worker);
        drop(servers);
        let inner = control.clone();
        let closed = simulation.run(&worker, LIMIT, async move {
            inner.remove_root(root).await?;
            inner.remove("disk").await
        });
        match closed.map_err(|stuck| stuck.to_string())? {
            // What is lost was said already, to whoever flushed.
            Err(error) if self.case.faults.sync_error_permille == 0 => return Err(error.report()),
            _ => {}
        }
        let nothing_left = || simulation.in_flight() == 0;
        let run = simulation.run_until(LIMIT, nothing_left);
        run.map_err(|stuck| stuck.to_string())
    }

    /// The disk's part of the file, past everything of ours.
    fn contents(&self, simulation: &Simulation) -> Vec<u8> {
        let file = simulation.contents(PATH).expect("nobody removes it");
        assert_eq!(file.len() as u64, self.case.file_bytes());
        let (begin, end) = (
            self.case.raw_offset as usize,
            (self.case.raw_offset + self.case.bytes) as usize,
        );
        let around = [&file[..begin], &file[end..]].concat();
        assert!(
            around.iter().all(|byte| *byte == 0),
            "bytes outside the disk were written"
        );
        file[begin..end].to_vec()
    }

    fn flushes_can_be_lost(&self) -> bool {
        !self.case.direct && self.case.faults.sync_error_permille > 0
    }

    /// A range of the disk in whole grains, mostly small and often where others are.
    fn range(&self) -> (u64, u64) {
        let grain = self.case.grain;
        let cells = self.case.bytes / grain;
        let most = match self.below(100) {
            0..2 => cells,
            2..20 => (65536 / grain).min(cells),
            _ => (8192 / grain).min(cells),
        };
        let (mut begin, mut count) = (0, 1 + self.below(most));
        begin += self.below(cells - count + 1);
        if self.chance(300) {
            // At the alignments that matter, where the fast path is.
            let unit = (4096 / grain).min(cells);
            begin -= begin % unit;
            count = count.next_multiple_of(unit).min(cells - begin);
        }
        (begin * grain, count * grain)
    }

    /// Memory for a request: one piece or several, at alignments that the seed chooses.
    fn memory(&self, bytes: u64) -> Segments {
        let unit = [1, 16, 512, 4096][self.below(4) as usize];
        let mut parts = Vec::new();
        let mut left = bytes;
        while left > 0 {
            let part = match parts.len() {
                0..5 if self.chance(400) => (1 + self.below(left)).next_multiple_of(unit).min(left),
                _ => left,
            };
            let skip = self.below(4096 / unit) * unit;
            let memory = Segments::allocate((skip + part) as usize, 4096);
            parts.push(memory.slice(skip, part));
            left -= part;
        }
        match parts.len() {
            1 => parts.remove(0),
            _ => Segments::join(parts),
        }
    }
}

/// Whether an operation without a task was started and has done all that was asked; if not, the request
/// is made again with a task.
async fn is_whole(started: Option<impl Future<Output = OpResult>>, bytes: u64) -> bool {
    match started {
        Some(done) => done.await == Ok(bytes),
        None => false,
    }
}

impl Server {
    /// Starts a task for one random request.
    fn issue(self: &Rc<Self>) {
        let test = &self.test;
        let server = Rc::clone(self);
        let (offset, bytes) = test.range();
        let what = test.below(100);
        self.spawn(async move {
            match what {
                0..35 => server.read(offset, bytes).await,
                35..70 => server.write(offset, bytes).await,
                70..78 => server.zero(offset, bytes).await,
                78..86 => server.discard(offset, bytes).await,
                86..97 => server.flush().await,
                _ => server.out_of_range(bytes).await,
            }
        });
    }

    fn issue_flush(self: &Rc<Self>) {
        let server = Rc::clone(self);
        self.spawn(async move { server.flush().await });
    }

    fn spawn(self: &Rc<Self>, request: impl Future<Output = ()> + 'static) {
        let server = Rc::clone(self);
        self.test.outstanding.set(self.test.outstanding.get() + 1);
        self.test.totals.borrow_mut().requests += 1;
        self.worker.context().spawn(async move {
            preempt(&**server.worker.engine()).await;
            request.await;
            let outstanding = &server.test.outstanding;
            outstanding.set(outstanding.get() - 1);
        });
    }

    async fn read(&self, offset: u64, bytes: u64) {
        let test = &self.test;
        let into = test.memory(bytes);
        into.fill(0xa5);
        let read = test.history.borrow_mut().begin_read(offset, bytes);
        let request = self.enter(RequestKind::Read, offset, bytes).await;
        let started = self.start(|token| request.start_read(offset, into.clone(), token));
        let result = match is_whole(started, bytes).await {
            true => Ok(()),
            false => request.read(offset, into.clone()).await,
        };
        drop(request);
        let data = result.is_ok().then(|| into.to_vec());
        let checked = test.history.borrow_mut().end_read(read, data.as_deref());
        if let Err(wrong) = checked {
            test.fail(wrong.to_string());
        }
        let faults = &test.case.faults;
        let may_fail = faults.read_error_permille > 0 || faults.call_error_permille > 0;
        self.check_result("read", result, &[(IoError::Failed, may_fail)]);
    }

    async fn write(&self, offset: u64, bytes: u64) {
        let test = &self.test;
        let tag = test.next_tag.replace(test.next_tag.get() + 1);
        let from = test.memory(bytes);
        from.copy_from(&history::data(tag, offset, bytes));
        let flags = self.write_flags();
        let write = test.history.borrow_mut().begin_write(tag, offset, bytes);
        let request = self.enter(RequestKind::Write, offset, bytes).await;
        let started = match flags.is_empty() {
            true => self.start(|token| request.start_write(offset, from.clone(), token)),
            false => None,
        };
        let result = match is_whole(started, bytes).await {
            true => Ok(()),
            false => {
                let slow = request.write(offset, from.clone(), flags);
                self.counted(flags, slow).await
            }
        };
        drop(request);
        self.end_write("write", write, result, flags);
    }

    async fn zero(&self, offset: u64, bytes: u64) {
        let test = &self.test;
        let mut how = ZeroFlags::empty();
        how.set(ZeroFlags::MAY_UNMAP, test.chance(500));
        let flags = self.write_flags();
        let write = test.history.borrow_mut().begin_write(0, offset, bytes);
        how.set(ZeroFlags::STABLE, flags.contains(WriteFlags::STABLE));
        let zero = self.root.write_zeroes(offset, bytes, how);
        let result = self.counted(flags, zero).await;
        self.end_write("zeroing", write, result, flags);
    }

    async fn discard(&self, offset: u64, bytes: u64) {
        let test = &self.test;
        let flags = self.write_flags();
        let write = test.history.borrow_mut().begin_write(0, offset, bytes);
        let discard = async {
            self.root.discard(offset, bytes).await?;
            match flags.contains(WriteFlags::STABLE) {
                true => self.root.flush().await,
                false => Ok(()),
            }
        };
        let result = self.counted(flags, discard).await;
        test.history.borrow_mut().end_discard(write);
        self.after_stable(flags, result);
        self.check_write_result("discard", result);
    }

    async fn flush(&self) {
        let test = &self.test;
        let lost_before = test.lost.get();
        let flush = test.history.borrow_mut().begin_flush();
        let result = self.counted(WriteFlags::STABLE, self.root.flush()).await;
        let flushed = match result {
            Ok(()) if test.case.no_flush => Flushed::Nothing,
            Ok(()) => Flushed::Done,
            Err(_) if test.case.direct => Flushed::Nothing,
            Err(_) => Flushed::Lost,
        };
        if lost_before && result.is_ok() && !test.case.no_flush {
            test.fail("a flush succeeds after one was lost".into());
        }
        test.history.borrow_mut().end_flush(flush, flushed);
        self.after_stable(WriteFlags::STABLE, result);
        let may_fail = test.case.faults.sync_error_permille > 0;
        let (buffered, direct) = (!test.case.direct, test.case.direct);
        self.check_result(
            "flush",
            result,
            &[
                (IoError::FlushLost, may_fail && buffered),
                (IoError::Failed, may_fail && direct),
            ],
        );
    }

    async fn out_of_range(&self, bytes: u64) {
        let end = self.test.case.bytes;
        let into = self.test.memory(bytes);
        let (write, outside) = (WriteFlags::empty(), end - bytes + self.test.case.grain);
        let results = [
            self.root.read(outside, into.clone()).await,
            self.root.write(outside, into, write).await,
            self.root
                .write_zeroes(u64::MAX - 511, 512, ZeroFlags::empty())
                .await,
            self.root.discard(end, bytes).await,
        ];
        if results != [Err(IoError::OutOfRange); 4] {
            self.test
                .fail(format!("outside the disk everything fails: {results:?}"));
        }
    }

    fn write_flags(&self) -> WriteFlags {
        match self.test.chance(100) {
            true => WriteFlags::STABLE,
            false => WriteFlags::empty(),
        }
    }

    async fn enter(&self, kind: RequestKind, offset: u64, bytes: u64) -> Request {
        self.root.enter(kind, offset, bytes).await
    }

    /// Starts an operation without a task, if that is possible.
    fn start(
        &self,
        start: impl FnOnce(u64) -> Result<(), Segments>,
    ) -> Option<impl Future<Output = OpResult>> {
        let token = self.test.random.borrow_mut().bits();
        start(token).ok()?;
        self.test.totals.borrow_mut().fast += 1;
        let (done, wait) = oneshot::channel();
        self.fast.borrow_mut().insert(token, done);
        Some(async move { wait.await.expect("the event comes").0 })
    }

    /// Counts a request as a flush while it runs, if it is one too.
    async fn counted<T>(&self, flags: WriteFlags, request: impl Future<Output = T>) -> T {
        let one = usize::from(flags.contains(WriteFlags::STABLE));
        let flushes = &self.test.flushes;
        flushes.set(flushes.get() + one);
        let result = request.await;
        flushes.set(flushes.get() - one);
        result
    }

    fn end_write(
        &self,
        what: &str,
        write: history::Write,
        result: Result<(), IoError>,
        flags: WriteFlags,
    ) {
        let test = &self.test;
        let stable = flags.contains(WriteFlags::STABLE) && !test.case.no_flush;
        let outcome = match result {
            Ok(()) if stable => Outcome::Stable,
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::Failed,
        };
        test.history.borrow_mut().end_write(write, outcome);
        self.after_stable(flags, result);
        self.check_write_result(what, result);
    }

    /// What a flush's end means for those after it.
    fn after_stable(&self, flags: WriteFlags, result: Result<(), IoError>) {
        let test = &self.test;
        if flags.contains(WriteFlags::STABLE) && result == Err(IoError::FlushLost) {
            test.lost.set(true);
            test.totals.borrow_mut().flushes_lost += 1;
            let mut history = test.history.borrow_mut();
            let flush = history.begin_flush();
            history.end_flush(flush, Flushed::Lost);
        }
    }

    fn check_write_result(&self, what: &str, result: Result<(), IoError>) {
        let case = &self.test.case;
        let faults = &case.faults;
        let syncs_fail = faults.sync_error_permille > 0;
        let fails = faults.write_error_permille > 0
            || faults.read_error_permille > 0
            || faults.allocate_error_permille > 0
            || faults.call_error_permille > 0
            || (syncs_fail && case.direct);
        let full =
            faults.no_space_permille > 0 || faults.stalled_permille > 0 || case.capacity.is_some();
        self.check_result(
            what,
            result,
            &[
                (IoError::Failed, fails),
                (IoError::NoSpace, full),
                (IoError::FlushLost, syncs_fail && !case.direct),
            ],
        );
    }

    fn check_result(&self, what: &str, result: Result<(), IoError>, expected: &[(IoError, bool)]) {
        let Err(error) = result else { return };
        self.test.totals.borrow_mut().failed += 1;
        if !expected.contains(&(error, true)) {
            let mut why = format!("{what} failed with {error:?}, which nothing explains");
            let _ = write!(why, " at {:?}", self.worker.context().engine().now());
            self.test.fail(why);
        }
    }
}
