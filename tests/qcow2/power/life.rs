//! [`Life`]: one process that has the image open, from its beginning to the end that the seed chooses.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::Preallocation;
use blockcore::engine::sim::Worker;
use blockcore::engine::{Event, OpResult};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::node::Notice;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use futures_channel::oneshot;

use super::case::{Case, Files};
use super::{Disk, LIMIT, Test, read};

/// Operations started without a task, by token.
pub(super) type FastPath = Rc<RefCell<BTreeMap<u64, oneshot::Sender<(OpResult, Segments)>>>>;

/// See the module's header.
pub(super) struct Life {
    pub(super) case: Case,
    pub(super) disk: Rc<Disk>,
    /// Changes the graph, and serves nobody.
    office: Rc<Worker>,
    control: Control,
    pub(super) workers: Vec<(Rc<Worker>, FastPath)>,
    pub(super) root: Cell<Option<RootId>>,
    /// By worker: requests that have not ended.
    pub(super) outstanding: Vec<Cell<usize>>,
    operating: Cell<bool>,
    stopping: Cell<bool>,
    /// The files as they were once they were open: what was lost before has been lost.
    found: RefCell<Files>,
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    InOrder,
    Kill,
    PowerCut,
    KillThenPowerCut,
}

impl Life {
    /// Opens the image as it is; what has survived a kill must be there.
    pub(super) fn begin(test: &Test<'_>) -> Result<Rc<Self>, String> {
        let life = Self::start(test)?;
        let opening = Rc::clone(&life);
        life.run(test, async move { opening.open().await })??;
        life.found.replace(test.files());
        if test.is_kept.take() {
            life.find_what_completed(test)?;
        }
        Ok(life)
    }

    /// Begins to open the image, and is killed before or after that is done.
    pub(super) fn die_young(test: &Test<'_>) -> Result<(), String> {
        let life = Self::start(test)?;
        let opening = Rc::clone(&life);
        life.office.context().spawn(async move {
            let _ = opening.open().await;
        });
        for _ in 0..test.disk.below(150) {
            test.simulation.step();
        }
        test.simulation.kill();
        Ok(())
    }

    /// The disk holds all that had completed when the process before was killed.
    fn find_what_completed(&self, test: &Test<'_>) -> Result<(), String> {
        let root = self.workers[0]
            .0
            .context()
            .root(self.root.get().expect("open"));
        let root = root.expect("attached");
        let unit = self.case.grain.max(512);
        let bytes = root.bytes();
        let into = Segments::allocate(bytes.next_multiple_of(unit) as usize, 4096);
        let reading = (Rc::clone(&root), into.clone());
        let read = test.simulation.run(&self.workers[0].0, LIMIT, async move {
            let (root, into) = reading;
            root.read(0, into.slice(0, bytes)).await
        });
        match read.map_err(|stuck| stuck.to_string())? {
            Ok(()) => {}
            Err(_) if self.case.fails => return Ok(()),
            Err(error) => return Err(format!("what completed cannot be read: {error}")),
        }
        self.disk.check_length(bytes)?;
        let contents = into.slice(0, bytes).to_vec();
        let found = self.disk.history().check_now(&contents);
        found.map_err(|wrong| format!("after a kill: {wrong}"))?;
        self.disk.count(|totals| &mut totals.recovered);
        Ok(())
    }

    fn start(test: &Test<'_>) -> Result<Rc<Self>, String> {
        let simulation = &test.simulation;
        // What was in flight keeps its descriptions; new ones would not see its end.
        let landed = simulation.run_until(LIMIT, || simulation.in_flight() == 0);
        landed.map_err(|stuck| stuck.to_string())?;
        let office = simulation.worker();
        let control = Control::new(Graph::new(formats::drivers()), Rc::clone(office.context()));
        if test.case.keeps {
            control.set_runtime_directory(Some("/run".into()));
        }
        let workers = (0..test.case.workers).map(|_| {
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
        });
        Ok(Rc::new(Self {
            case: test.case.clone(),
            disk: Rc::clone(&test.disk),
            workers: workers.collect(),
            office,
            control,
            root: Cell::new(None),
            outstanding: (0..test.case.workers).map(|_| Cell::new(0)).collect(),
            operating: Cell::new(false),
            stopping: Cell::new(false),
            found: RefCell::default(),
        }))
    }

    /// Runs something on the control thread.
    fn run<T: 'static>(
        &self,
        test: &Test<'_>,
        task: impl Future<Output = T> + 'static,
    ) -> Result<T, String> {
        let run = test.simulation.run(&self.office, LIMIT, task);
        self.disk.check()?;
        run.map_err(|stuck| stuck.to_string())
    }

    async fn open(&self) -> Result<(), String> {
        let options = self.case.options(&self.case.open);
        self.often("opening the image", async || {
            let options = Options::parse(&options, None).expect("well-formed");
            self.control.add(options).await.map(|_| ())
        })
        .await?;
        let spec = RootSpec {
            needs: Permissions::CONSISTENT_READ | Permissions::WRITE,
            shares: Permissions::all(),
            ..RootSpec::writer("a guest")
        };
        let spec = spec.in_units_of(self.case.grain as u32);
        let id = Cell::new(None);
        self.often("adding a root", async || {
            let root = self.control.add_root("disk", spec.clone()).await?;
            id.set(Some(root));
            Ok(())
        })
        .await?;
        let id = id.get().expect("just added");
        for (worker, _) in &self.workers {
            let attached = self.control.attach(id, worker.context().handle()).await;
            attached.map_err(|error| error.report())?;
            let root = worker.context().root(id).expect("attached");
            if !self.case.fast_path {
                root.disable_fast_path();
            }
        }
        self.root.set(Some(id));
        Ok(())
    }

    /// Does what only the host may foil, as often as it takes.
    async fn often(
        &self,
        what: &str,
        attempt: impl AsyncFn() -> Result<(), Error>,
    ) -> Result<(), String> {
        for _ in 0..10_000 {
            match attempt().await {
                Ok(()) => return Ok(()),
                Err(error) => self.check_error(what, &error)?,
            }
        }
        Err(format!("{what} never works"))
    }

    fn check_error(&self, what: &str, error: &Error) -> Result<(), String> {
        let explained = matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace);
        match self.case.fails && explained {
            true => Ok(()),
            false => Err(format!(
                "{what} fails, which nothing explains: {}",
                error.report()
            )),
        }
    }

    /// From the first request to the end.
    pub(super) fn live(self: Rc<Self>, test: &Test<'_>, number: usize) -> Result<(), String> {
        let disk = Rc::clone(&self.disk);
        let end = [
            End::InOrder,
            End::Kill,
            End::PowerCut,
            End::KillThenPowerCut,
        ][disk.below(4) as usize];
        let requests = match end {
            End::InOrder => self.case.requests,
            _ => disk.below(self.case.requests as u64 + 1) as usize,
        };
        self.operate();
        self.serve(test, requests, number)?;
        let simulation = &test.simulation;
        let when = format!("life {number}, which ended with {end:?}");
        let mut survives = false;
        let mut is_cut = true;
        match end {
            End::InOrder => {
                survives = self.close(test)?;
                let files = test.files();
                if survives {
                    disk.count(|totals| &mut totals.closed);
                    // What fails half way may leak.
                    let found = (!self.case.fails).then(|| self.found.take());
                    test.submit(files.clone(), &when, found);
                    simulation.power_cut();
                    if test.files() != files {
                        return Err(format!("{when}: what was closed is not durable"));
                    }
                } else {
                    simulation.kill();
                    is_cut = false;
                }
            }
            End::Kill => {
                disk.count(|totals| &mut totals.kills);
                simulation.kill();
                is_cut = false;
            }
            End::PowerCut | End::KillThenPowerCut => {
                disk.count(|totals| &mut totals.power_cuts);
                if end == End::KillThenPowerCut {
                    simulation.kill();
                    for _ in 0..disk.below(10) {
                        simulation.step();
                    }
                }
                simulation.power_cut();
            }
        }
        if disk.lengths.borrow().len() > 1 && !is_cut {
            // What its length is is not known before what the host has is.
            simulation.power_cut();
            is_cut = true;
        }
        let landed = simulation.run_until(LIMIT, || simulation.in_flight() == 0);
        landed.map_err(|stuck| stuck.to_string())?;
        let files = test.files();
        if test.judge.is_new(&files) {
            test.submit(files.clone(), &when, None);
        }
        if self.case.keeps && !is_cut {
            // It is somewhere, and found by who opens the image next.
            disk.history().killed(false);
            test.is_kept.set(true);
            return disk.check();
        }
        let contents = read::whole(&self.case, &files)?;
        disk.check_length(contents.len() as u64)?;
        *disk.lengths.borrow_mut() = vec![contents.len() as u64];
        let mut history = disk.history();
        if survives {
            history.killed(false);
            let found = history.check_now(&contents);
            found.map_err(|wrong| format!("{when}: {wrong}"))?;
        }
        history.set_bytes(contents.len() as u64);
        let found = match is_cut {
            true => history.power_cut(&contents),
            false => history.killed_with(&contents),
        };
        found.map_err(|wrong| format!("{when}: {wrong}"))?;
        drop(history);
        disk.check()
    }

    fn until(&self, test: &Test<'_>, done: impl FnMut() -> bool) -> Result<(), String> {
        let run = test.simulation.run_until(LIMIT, done);
        self.disk.check()?;
        run.map_err(|stuck| format!("{stuck}\n{}", self.report()))
    }

    /// Who waits for what, when nothing goes on.
    fn report(&self) -> String {
        let root = self.root.get().expect("open");
        let lines = self.workers.iter().map(|(worker, _)| {
            let root = worker.context().root(root);
            root.map_or(String::new(), |root| {
                format!("held {}, in flight {:?}", root.is_held(), root.requests())
            })
        });
        lines.collect::<Vec<_>>().join("\n  ")
    }

    /// Issues requests, never more than the depth at once, the simulation running in between.
    fn serve(
        self: &Rc<Self>,
        test: &Test<'_>,
        requests: usize,
        number: usize,
    ) -> Result<(), String> {
        let disk = &self.disk;
        for request in 0..requests {
            let worker = disk.below(self.workers.len() as u64) as usize;
            let free = || self.outstanding[worker].get() < self.case.depth || disk.has_failed();
            self.until(test, free)?;
            for _ in 0..disk.below(10) {
                test.simulation.step();
            }
            self.issue(worker);
            if disk.chance(900) {
                for _ in 0..disk.below(40) {
                    test.simulation.step();
                }
                disk.check()?;
                let when = format!("life {number}, at request {request}");
                test.look_at_possible(&when)?;
            }
        }
        Ok(())
    }

    /// Waits for everybody, and takes the graph apart. Says whether all went well.
    fn close(self: &Rc<Self>, test: &Test<'_>) -> Result<bool, String> {
        let disk = &self.disk;
        self.stopping.set(true);
        self.until(test, || {
            let idle = self.outstanding.iter().all(|worker| worker.get() == 0);
            (idle && !self.operating.get()) || disk.has_failed()
        })?;
        let life = Rc::clone(self);
        let closed = self.run(test, async move { life.take_apart().await })??;
        self.until(test, || test.simulation.in_flight() == 0)?;
        Ok(closed)
    }

    async fn take_apart(&self) -> Result<bool, String> {
        let root = self.root.get().expect("open");
        let mut well = true;
        while let Err(error) = self.control.remove_root(root).await {
            self.check_error("ending a root", &error)?;
            if self.control.node_of(root).is_none() {
                break;
            }
        }
        while self.control.read(|graph| graph.node("disk").is_ok()) {
            if let Err(error) = self.control.remove("disk").await {
                self.check_error("closing the image", &error)?;
                well = false;
            }
        }
        self.look_at_notices();
        Ok(well)
    }

    /// Starts the operator's work, which goes on until the life is to end.
    fn operate(self: &Rc<Self>) {
        if self.case.rest_us == 0 {
            return;
        }
        let life = Rc::clone(self);
        self.operating.set(true);
        self.office.context().spawn(async move {
            while !life.stopping.get() && !life.disk.has_failed() {
                let rest = life.disk.below(life.case.rest_us);
                let rest = Duration::from_micros(rest);
                life.office.context().delay(rest).await;
                if life.disk.chance(300)
                    && let Err(why) = life.resize().await
                {
                    life.disk.fail(why);
                }
                life.look_at_notices();
            }
            life.operating.set(false);
        });
    }

    fn look_at_notices(&self) {
        for notice in self.control.take_notices() {
            if let Notice::Corrupt { message, .. } = notice {
                self.disk.fail(format!("the image is corrupt: {message}"));
            }
        }
    }

    async fn resize(&self) -> Result<(), String> {
        let disk = &self.disk;
        if disk.lengths.borrow().len() > 1 {
            // An attempt has failed, and nobody knows how far it came.
            return Ok(());
        }
        let before = disk.lengths.borrow()[0];
        let unit = self.case.grain.max(512);
        let bytes = (before / 2 + disk.below(before)) / unit * unit;
        let bytes = bytes.clamp(unit, self.case.bytes * 2);
        disk.lengths.borrow_mut().push(bytes);
        match bytes < before {
            // Until the length has changed, what is cut off may be zero already.
            true => drop(disk.history().begin_write(0, bytes, before - bytes)),
            false => disk.history().set_bytes(bytes),
        }
        let preallocation = match (bytes > before, disk.below(6)) {
            (true, 0) => Preallocation::Metadata,
            (true, 1) => Preallocation::Full,
            _ => Preallocation::Off,
        };
        let resized = self.control.resize("disk", bytes, preallocation).await;
        disk.count(|totals| &mut totals.resizes);
        match resized {
            Ok(()) => {
                disk.lengths.replace(vec![bytes]);
                disk.history().set_bytes(bytes);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                Err("an image without snapshots can be resized".into())
            }
            Err(error) => self.check_error("resizing", &error),
        }
    }
}
