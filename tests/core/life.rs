//! [`Life`]: one process: a graph, its roots and workers, from its beginning to the end that the seed
//! chooses.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use blockcore::engine::sim::Worker;
use blockcore::engine::{Event, OpResult};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use futures_channel::oneshot;
use harness::overlay;
use harness::pass::PASS_THROUGH;

use crate::marks::{Marks, Mirror};
use crate::view::View;
use crate::{LIMIT, Test};

/// Operations started without a task, by token.
type FastPath = Rc<RefCell<BTreeMap<u64, oneshot::Sender<(OpResult, Segments)>>>>;

/// See the module's header.
pub(crate) struct Life {
    pub(crate) test: Rc<Test>,
    /// Changes the graph, and serves nobody.
    pub(crate) office: Rc<Worker>,
    pub(crate) control: Control,
    pub(crate) workers: Vec<(Rc<Worker>, FastPath)>,
    pub(crate) roots: RefCell<Vec<Rc<User>>>,
    pub(crate) outstanding: Cell<usize>,
    /// The operator's tasks that have not ended.
    pub(crate) tasks: Cell<usize>,
    pub(crate) stopping: Cell<bool>,
    pub(crate) marks: RefCell<Vec<Marks>>,
    pub(crate) mirrors: Vec<Mirror>,
    pub(crate) next_name: Cell<u32>,
    /// Another process has tried to have a disk.
    pub(crate) has_intruder: Cell<bool>,
    /// Whether somebody writes to each disk's file.
    pub(crate) is_written: Vec<Cell<bool>>,
    /// Whether nobody did at some time since somebody looked last.
    pub(crate) was_unwritten: Vec<Cell<bool>>,
}

/// Somebody who uses a node.
pub(crate) struct User {
    pub(crate) id: RootId,
    pub(crate) unit: u64,
    pub(crate) writes: bool,
    /// It may change the length.
    pub(crate) resizes: bool,
    pub(crate) view: RefCell<Rc<View>>,
    /// By worker.
    pub(crate) places: Vec<Cell<Place>>,
    /// Requests that have entered and not ended.
    pub(crate) in_flight: Cell<usize>,
}

/// A root on a worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub(crate) attached: bool,
    /// Requests that wait to enter.
    pub(crate) entering: usize,
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
    /// Opens what the seed likes on the disks as they are.
    pub(crate) fn begin(test: &Rc<Test>) -> Result<Rc<Self>, String> {
        let simulation = &test.simulation;
        // What was in flight keeps its descriptions; new ones would not see its end.
        let landed = simulation.run_until(LIMIT, || simulation.in_flight() == 0);
        landed.map_err(|stuck| stuck.to_string())?;
        for disk in 0..test.disks.len() {
            test.history(disk).killed(false);
            if test.case.disks[disk].resizes {
                let bytes = test.file_bytes(disk);
                test.disks[disk].length.found(bytes, false)?;
            }
        }
        if test.chance(200) {
            // What a process has left that was killed, or has closed, is anybody's.
            test.visit()?;
        }
        let office = simulation.worker();
        let mut drivers = overlay::drivers();
        drivers.push(&PASS_THROUGH);
        let control = Control::new(Graph::new(drivers), Rc::clone(office.context()));
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
        let mirrors = test.disks.iter().map(|_| Mirror::default());
        let life = Rc::new(Self {
            test: Rc::clone(test),
            workers: workers.collect(),
            office,
            control,
            roots: RefCell::default(),
            outstanding: Cell::new(0),
            tasks: Cell::new(0),
            stopping: Cell::new(false),
            marks: RefCell::default(),
            mirrors: mirrors.collect(),
            next_name: Cell::new(0),
            has_intruder: Cell::new(false),
            is_written: test.disks.iter().map(|_| Cell::new(false)).collect(),
            was_unwritten: test.disks.iter().map(|_| Cell::new(true)).collect(),
        });
        life.control
            .add_throttle_group("slow", Self::any_rates(test))
            .expect("they make sense");
        let building = Rc::clone(&life);
        let built = life.run(async move { building.build().await })?;
        built.map(|()| life)
    }

    /// Runs something on the control thread.
    fn run<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> Result<T, String> {
        let run = self.test.simulation.run(&self.office, LIMIT, task);
        self.test.check()?;
        run.map_err(|stuck| stuck.to_string())
    }

    /// A file or device for each disk, a part of it and some filters, and the roots.
    async fn build(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        for (number, disk) in test.case.disks.iter().enumerate() {
            self.add(&self.file_options(number, disk.direct, false))
                .await?;
            if disk.cluster.is_some() {
                self.add(&format!(
                    "driver=file,node-name=base{number},filename={},read-only=on",
                    disk.base_path
                ))
                .await?;
            }
            let part = self.part_options(number);
            self.add(&format!("{part},file=file{number}")).await?;
            for _ in 0..test.below(3) {
                let name = self.new_name();
                let below = self.any_node(number, true);
                self.add(&format!(
                    "driver=pass-through,node-name={name},discard=unmap,ask={},file={below}",
                    ["on", "off"][test.below(2) as usize]
                ))
                .await?;
            }
        }
        for number in 0..test.case.roots {
            let disk = test.below(test.disks.len() as u64) as usize;
            let node = self.any_node(disk, false);
            let writes = match test.case.readers_only {
                true => false,
                false => number == 0 || test.chance(800),
            };
            self.add_user(&node, writes).await?;
        }
        Ok(())
    }

    /// Adds a node, as often as it takes.
    async fn add(&self, options: &str) -> Result<(), String> {
        for _ in 0..10_000 {
            let options = Options::parse(options, None).expect("well-formed");
            match self.control.add(options).await {
                Ok(_) => return Ok(()),
                Err(error) => self.check_error("adding a node", &error)?,
            }
        }
        Err("a node cannot be added".into())
    }

    /// Injected failures may make any change fail, and so may another process that tries to have a disk: it
    /// holds some locks while it tries.
    pub(crate) fn check_error(&self, what: &str, error: &Error) -> Result<(), String> {
        match error.kind() {
            ErrorKind::Busy if self.has_intruder.get() => Ok(()),
            _ => self.test.check_error(what, error),
        }
    }

    pub(crate) fn new_name(&self) -> String {
        let number = self.next_name.replace(self.next_name.get() + 1);
        format!("pass{number}")
    }

    /// Options for the part of a disk, or for all of an image.
    pub(crate) fn part_options(&self, number: usize) -> String {
        let test = &self.test;
        let grain = test.case.grain;
        let cells = test.disks[number].length.bytes() / grain;
        let offset = test.below(cells / 2) * [0, 1][test.below(2) as usize];
        let bytes = 1 + test.below(cells - offset);
        let is_part = !test.case.disks[number].resizes || test.chance(300);
        let unmap = test.chance(500);
        let detect = match test.below(3) {
            0 if unmap => "unmap",
            1 => "on",
            _ => "off",
        };
        let modes = format!(
            "detect-zeroes={detect},discard={}",
            if unmap { "unmap" } else { "ignore" }
        );
        let disk = &test.case.disks[number];
        let Some(cluster) = disk.cluster else {
            if !is_part {
                // To the end of the disk, wherever that is.
                let offset = offset * grain;
                return format!("driver=raw,node-name=part{number},offset={offset},{modes}");
            }
            return format!(
                "driver=raw,node-name=part{number},offset={},size={},{modes}",
                offset * grain,
                // A size is in sectors, an offset need not be.
                (bytes.max(cells / 4).min(cells - offset) * grain / 512 * 512).max(512),
            );
        };
        // A backing node has to be named in each reopening.
        let backing = self.control.read(|graph| {
            let node = graph.node(&format!("part{number}")).ok()?;
            let backing = graph.backing_of(node.id())?;
            Some(graph.node_by_id(backing)?.name().to_owned())
        });
        let backing = backing.unwrap_or_else(|| format!("base{number}"));
        format!(
            "driver=overlay,node-name=part{number},cluster-size={cluster},size={},backing={backing},\
             {modes}",
            disk.bytes
        )
    }

    /// Some node that shows a disk, or, with `images`, what an image of it is made of.
    pub(crate) fn any_node(&self, disk: usize, images: bool) -> String {
        let names: Vec<_> = self.control.read(|graph| {
            let nodes = graph
                .nodes()
                .map(|node| (node.name().to_owned(), node.id()));
            let mine = nodes.filter(|(_, id)| {
                let view = View::of(graph, &self.test.case, *id);
                view.disk == disk && (images || !view.image)
            });
            mine.map(|(name, _)| name).collect()
        });
        names[self.test.below(names.len() as u64) as usize].clone()
    }

    /// Uses a node, from some workers.
    async fn add_user(self: &Rc<Self>, node: &str, writes: bool) -> Result<(), String> {
        let test = &self.test;
        let grain = test.case.grain;
        let unit = [grain, grain, 512, 4096][test.below(4) as usize].max(grain);
        let spec = RootSpec {
            needs: match writes {
                true => Permissions::CONSISTENT_READ | Permissions::WRITE,
                false => Permissions::CONSISTENT_READ,
            },
            shares: Permissions::all(),
            ..RootSpec::writer(format!("guest {}", self.roots.borrow().len()))
        };
        let mut spec = spec.in_units_of(unit as u32);
        let mut resizes = writes && test.chance(400);
        let id = loop {
            spec.needs.set(Permissions::RESIZE, resizes);
            match self.control.add_root(node, spec.clone()).await {
                Ok(id) => break id,
                // Somebody beside it needs the length to stay.
                Err(error) if resizes && error.kind() == ErrorKind::Busy => resizes = false,
                // The part of a disk keeps its length for itself.
                Err(error) => self.check_error("adding a root", &error)?,
            }
        };
        let user = Rc::new(User {
            id,
            unit,
            writes,
            resizes,
            view: RefCell::default(),
            places: (0..self.workers.len()).map(|_| Cell::default()).collect(),
            in_flight: Cell::new(0),
        });
        self.roots.borrow_mut().push(Rc::clone(&user));
        self.update_views();
        let first = test.below(self.workers.len() as u64) as usize;
        for worker in 0..self.workers.len() {
            if worker == first || test.chance(500) {
                self.attach(&user, worker).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn attach(&self, user: &User, worker: usize) -> Result<(), String> {
        let handle = self.workers[worker].0.context().handle();
        let attached = self.control.attach(user.id, handle).await;
        attached.map_err(|error| error.report())?;
        let root = self.workers[worker].0.context().root(user.id);
        if !self.test.case.fast_path {
            root.expect("attached").disable_fast_path();
        }
        user.places[worker].set(Place {
            attached: true,
            entering: 0,
        });
        Ok(())
    }

    /// Works out what each root reaches, after a commit and before anybody else runs.
    pub(crate) fn update_views(&self) {
        self.control.read(|graph| {
            for user in self.roots.borrow().iter() {
                let Some(node) = self.control.node_of(user.id) else {
                    continue;
                };
                user.view.replace(View::of(graph, &self.test.case, node));
            }
            if let Err(why) = crate::view::check_permissions(graph) {
                self.test.fail(why);
            }
        });
        for disk in 0..self.test.disks.len() {
            let written = self.needs_of_file(disk).contains(Permissions::WRITE);
            self.is_written[disk].set(written);
            self.was_unwritten[disk].set(self.was_unwritten[disk].get() || !written);
        }
    }

    /// From the first request to the end.
    pub(crate) fn live(self: Rc<Self>) -> Result<(), String> {
        let test = Rc::clone(&self.test);
        let end = [
            End::InOrder,
            End::Kill,
            End::PowerCut,
            End::KillThenPowerCut,
        ][test.below(4) as usize];
        let mut requests = match end {
            End::InOrder => test.case.requests,
            _ => test.below(test.case.requests as u64 + 1) as usize,
        };
        if test.chance(300) {
            // What the life before completed is not durable yet.
            for user in self.roots.borrow().iter() {
                self.issue_flush(user);
            }
            let idle = || self.outstanding.get() == 0 || test.has_failed();
            self.until(idle)?;
            if test.chance(400) {
                // And nothing but that is done.
                requests = 0;
            }
        }
        self.operate();
        self.serve(requests)?;
        let simulation = &test.simulation;
        match end {
            End::InOrder => {
                self.close()?;
                if !test.has_lost_an_image() {
                    return Ok(());
                }
            }
            // The host has marked clean what it has lost. A new process cannot know, and an image goes on
            // where a map says so that never reached the disk: no process follows without a power cut.
            End::Kill if !test.has_lost_an_image() => {
                test.count(|totals| &mut totals.kills);
                simulation.kill();
                return test.check();
            }
            End::PowerCut => {}
            End::Kill | End::KillThenPowerCut => {
                simulation.kill();
                for _ in 0..test.below(10) {
                    simulation.step();
                }
            }
        }
        test.cut_power()
    }

    fn until(&self, done: impl FnMut() -> bool) -> Result<(), String> {
        let run = self.test.simulation.run_until(LIMIT, done);
        self.test.check()?;
        run.map_err(|stuck| format!("{stuck}\n{}", self.report()))
    }

    /// Who waits for what, when nothing goes on.
    fn report(&self) -> String {
        let mut lines = vec![format!(
            "{} requests and {} of the operator's tasks have not ended",
            self.outstanding.get(),
            self.tasks.get()
        )];
        for user in self.roots.borrow().iter() {
            for (worker, (on, _)) in self.workers.iter().enumerate() {
                let Some(root) = on.context().root(user.id) else {
                    continue;
                };
                lines.push(format!(
                    "{:?} on worker {worker}: held {}, in flight {:?}",
                    user.id,
                    root.is_held(),
                    root.requests()
                ));
            }
        }
        lines.join("\n  ")
    }

    /// Issues requests, never more than the depth at once, the simulation running in between.
    fn serve(self: &Rc<Self>, requests: usize) -> Result<(), String> {
        let test = &self.test;
        for _ in 0..requests {
            let free = || self.outstanding.get() < test.case.depth || test.has_failed();
            self.until(free)?;
            for _ in 0..test.below(10) {
                test.simulation.step();
            }
            self.issue();
        }
        Ok(())
    }

    /// Waits for everybody, looks at the disks, and takes the graph apart.
    fn close(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        self.stopping.set(true);
        self.until(|| {
            let over = self.outstanding.get() == 0 && self.tasks.get() == 0;
            over || test.has_failed()
        })?;
        for disk in 0..test.disks.len() {
            if test.case.disks[disk].resizes {
                let bytes = test.file_bytes(disk);
                test.disks[disk].length.found(bytes, false)?;
            }
            let checked = test.history(disk).check_now(&test.contents(disk));
            checked.map_err(|wrong| format!("{}: {wrong}", test.disks[disk].path))?;
        }
        let life = Rc::clone(self);
        self.run(async move { life.take_apart().await })??;
        self.until(|| test.simulation.in_flight() == 0)?;
        for disk in &test.disks {
            let locks = test.simulation.locks(&disk.path);
            if !locks.is_empty() {
                return Err(format!("{} is still locked: {locks:?}", disk.path));
            }
        }
        Ok(())
    }

    async fn take_apart(&self) -> Result<(), String> {
        let mut roots: Vec<_> = self.roots.borrow().iter().map(|user| user.id).collect();
        roots.extend(self.mirrors.iter().filter_map(Mirror::root));
        for root in roots {
            // A change that fails before its commit can be made again.
            while let Err(error) = self.control.remove_root(root).await {
                self.check_error("ending a root", &error)?;
                if self.control.node_of(root).is_none() {
                    break;
                }
            }
        }
        loop {
            let top = self.control.read(|graph| {
                let mut nodes = graph.nodes();
                let top = nodes.find(|node| graph.users(node.id()).is_empty())?;
                Some(top.name().to_owned())
            });
            let Some(top) = top else { break };
            if let Err(error) = self.control.remove(&top).await {
                self.check_error("removing a node", &error)?;
            }
        }
        match self.control.read(|graph| graph.nodes().count()) {
            0 => Ok(()),
            left => Err(format!("{left} nodes are left")),
        }
    }
}
