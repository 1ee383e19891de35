//! [`Life`]: one process with a disk, guests, and an operator who has jobs done.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use blockcore::drain::Scope;
use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::engine::sim::{Random, Simulation, Worker};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, ExportState, Graph, RootId, RootSpec};
use blockcore::io::Root;
use blockcore::io::buffer::Segments;
use blockcore::io::policy::OnError;
use blockcore::job::{
    BackupSpec, BackupSync, CommitSpec, JobEvent, JobSpec, JobState, Jobs, MirrorSpec, MirrorSync,
    StreamSpec,
};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};

use crate::disk::{
    BLOCK_BYTES, BLOCKS, BYTES, Disk, FOLDER, Shared, Templates, bytes_of, value_of,
};
use crate::{Case, LIMIT, Totals};

/// What is written to a block that was torn.
const MENDED: u32 = 0xeded_eded;

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    InOrder,
    Kill,
    PowerCut,
}

/// See the module's header.
pub(crate) struct Life {
    simulation: Rc<Simulation>,
    office: Rc<Worker>,
    floor: Rc<Worker>,
    control: Control,
    jobs: Jobs,
    root: RootId,
    disk: Rc<Disk>,
    totals: Shared<Totals>,
    /// How many images there are on the host.
    images: Rc<Cell<u32>>,
    /// Guests begin nothing.
    held: Cell<bool>,
    stopping: Cell<bool>,
    guests: Cell<u64>,
    in_flight: Cell<u64>,
    operators: Cell<u64>,
    failure: RefCell<Option<String>>,
    /// What jobs that are over came to.
    ended: RefCell<Vec<(String, bool, Option<String>)>>,
    templates: Rc<Templates>,
    story: RefCell<Vec<String>>,
}

fn text(error: &Error) -> String {
    error.report()
}

fn node(name: &str, backing: Option<&str>) -> Options {
    let backing = match backing {
        None => String::new(),
        Some(below) => format!(",backing={below}"),
    };
    let text = format!(
        "driver=qcow2,node-name={name},file.driver=file,file.filename={FOLDER}/{name}.qcow2{backing}"
    );
    Options::parse(&text, None).expect("well-formed")
}

impl Life {
    /// Serves what was recorded last of the disk that began as `disk0`.
    pub(crate) fn begin(
        simulation: &Rc<Simulation>,
        templates: &Rc<Templates>,
        disk: &Rc<Disk>,
        totals: &Shared<Totals>,
        images: &Rc<Cell<u32>>,
    ) -> Result<Rc<Self>, String> {
        let landed = simulation.run_until(LIMIT, || simulation.in_flight() == 0);
        landed.map_err(|stuck| stuck.to_string())?;
        let (office, floor) = (simulation.worker(), simulation.worker());
        let mut drivers = formats::drivers();
        drivers.extend(blockcore::filter::drivers());
        drivers.sort_by_key(|kind| kind.name);
        drivers.dedup_by_key(|kind| kind.name);
        let control = Control::new(Graph::new(drivers), Rc::clone(office.context()));
        // What completed survives a kill.
        control.set_runtime_directory(Some("/run".into()));
        let opening = control.clone();
        let (handle, seen) = (floor.context().handle().clone(), Rc::clone(totals));
        let opened = simulation.run(&office, LIMIT, async move {
            opening.add(node("disk0", None)).await?;
            let path = Path::new("/simulated/vda.state");
            let state = ExportState::open(&opening, path, "vda", false).await?;
            if state.recorded().is_some() {
                seen.borrow_mut().restored += 1;
            }
            let node = opening.recorded_node(&state, "disk0").await?;
            let spec = RootSpec {
                state: Some(state),
                ..RootSpec::writer("export 'vda'").in_units_of(512)
            };
            let root = opening.add_root(&node, spec).await?;
            opening.attach(root, &handle).await?;
            Ok(root)
        });
        let opened = opened.map_err(|stuck| stuck.to_string())?;
        let root = opened.map_err(|error: Error| format!("opening: {}", text(&error)))?;
        let jobs = Jobs::new(&control);
        let life = Rc::new(Self {
            simulation: Rc::clone(simulation),
            office,
            floor,
            control,
            jobs,
            root,
            disk: Rc::clone(disk),
            totals: Rc::clone(totals),
            images: Rc::clone(images),
            held: Cell::default(),
            stopping: Cell::default(),
            guests: Cell::default(),
            in_flight: Cell::default(),
            operators: Cell::default(),
            failure: RefCell::default(),
            ended: RefCell::default(),
            templates: Rc::clone(templates),
            story: RefCell::default(),
        });
        life.tell(format!("serving {:?}", life.chain().1));
        let listener = Rc::downgrade(&life);
        life.jobs.listen(move |event| {
            let Some(life) = listener.upgrade() else {
                return;
            };
            if let JobEvent::StatusChange { id, state } = event {
                life.tell(format!("{id} is {state}, at {:?}", life.simulation.now()));
            }
            let (job, well) = match event {
                JobEvent::Completed(job) => (job, job.error.is_none()),
                JobEvent::Cancelled(job) => (job, false),
                _ => return,
            };
            let mut ended = life.ended.borrow_mut();
            ended.push((job.id.clone(), well, job.error.clone()));
        });
        Ok(life)
    }

    /// What the operator has had done.
    pub(crate) fn story(&self) -> String {
        self.story.borrow().join("\n")
    }

    fn tell(&self, what: String) {
        self.story.borrow_mut().push(what);
    }

    fn fail(&self, why: String) {
        self.failure.borrow_mut().get_or_insert(why);
    }

    fn until(&self, mut done: impl FnMut() -> bool) -> Result<(), String> {
        let ran = self
            .simulation
            .run_until(LIMIT, || done() || self.failure.borrow().is_some());
        if let Some(why) = self.failure.borrow().clone() {
            return Err(why);
        }
        ran.map_err(|stuck| {
            format!(
                "{stuck}; {} requests in flight, jobs {:?}",
                self.in_flight.get(),
                self.jobs.views()
            )
        })
    }

    pub(crate) fn live(
        self: &Rc<Self>,
        case: &Case,
        mut random: Random,
        end: End,
    ) -> Result<(), String> {
        self.read_all()?;
        for guest in 0..case.guests {
            let (life, random, rest) = (Rc::clone(self), random.fork(), case.rest_us);
            self.guests.set(self.guests.get() + 1);
            self.floor.context().spawn(async move {
                life.be_guest(guest, random, rest).await;
                life.guests.set(life.guests.get() - 1);
            });
        }
        let (life, jobs) = (Rc::clone(self), case.jobs);
        let operator = random.fork();
        self.operators.set(1);
        self.office.context().spawn(async move {
            if let Err(why) = life.operate(jobs, operator).await {
                life.fail(why);
            }
            life.operators.set(life.operators.get() - 1);
        });
        match end {
            End::InOrder => {
                self.until(|| self.operators.get() == 0)?;
                self.stopping.set(true);
                self.until(|| self.guests.get() == 0)?;
                self.read_all()?;
                self.close()
            }
            End::Kill | End::PowerCut => {
                let when = self.simulation.now() + Duration::from_micros(random.below(400_000));
                self.until(|| self.simulation.now() >= when)?;
                self.stopping.set(true);
                match end {
                    End::PowerCut => {
                        self.totals.borrow_mut().power_cuts += 1;
                        self.simulation.power_cut();
                        self.disk.power_cut();
                    }
                    _ => {
                        self.totals.borrow_mut().kills += 1;
                        self.simulation.kill();
                    }
                }
                Ok(())
            }
        }
    }

    /// Reads all of the disk; what is there from now on is that.
    fn read_all(self: &Rc<Self>) -> Result<(), String> {
        let life = Rc::clone(self);
        let read = self.simulation.run(&self.office, LIMIT, async move {
            let root = life
                .control
                .root_here(life.root)
                .map_err(|error| text(&error))?;
            let into = Segments::allocate(BYTES as usize, 4096);
            let read = root.read(0, into.clone()).await;
            read.map_err(|error| format!("reading all: {error}"))?;
            let handle = life.office.context().handle();
            life.control.detach(life.root, handle).await;
            Ok::<_, String>(into.to_vec())
        });
        let bytes = read.map_err(|stuck| stuck.to_string())??;
        for (index, block) in bytes.chunks(BLOCK_BYTES as usize).enumerate() {
            self.disk.check(index as u64, block)?;
            // A block may have been torn by the end.
            match value_of(block) {
                Some(value) => self.disk.settle(index as u64, value),
                None => self.mend(index as u64)?,
            }
        }
        Ok(())
    }

    /// Writes a block whose sectors hold this and that.
    fn mend(self: &Rc<Self>, index: u64) -> Result<(), String> {
        let life = Rc::clone(self);
        let written = self.simulation.run(&self.floor, LIMIT, async move {
            let root = life.floor.context().root(life.root).expect("attached");
            let from = Segments::allocate(BLOCK_BYTES as usize, 4096);
            from.copy_from(&bytes_of(MENDED, BLOCK_BYTES));
            let flags = WriteFlags::empty();
            root.write(index * BLOCK_BYTES, from, flags).await?;
            root.flush().await
        });
        let written = written.map_err(|stuck| stuck.to_string())?;
        written.map_err(|error| format!("mending block {index}: {error}"))?;
        self.disk.settle(index, MENDED);
        Ok(())
    }

    fn close(self: &Rc<Self>) -> Result<(), String> {
        let life = Rc::clone(self);
        let closed = self.simulation.run(&self.office, LIMIT, async move {
            life.jobs.cancel_all().await;
            life.control.remove_root(life.root).await?;
            life.control.close_all().await
        });
        let closed = closed.map_err(|stuck| stuck.to_string())?;
        closed.map_err(|error| format!("closing: {}", text(&error)))?;
        let left = self.control.read(|graph| graph.nodes().count());
        match left {
            0 => Ok(()),
            _ => Err(format!("{left} nodes are left")),
        }
    }

    async fn be_guest(self: &Rc<Self>, guest: u64, mut random: Random, rest_us: u64) {
        let context = Rc::clone(self.floor.context());
        let root = context.root(self.root).expect("attached");
        while !self.stopping.get() {
            context
                .delay(Duration::from_micros(random.below(rest_us + 1)))
                .await;
            if self.held.get() {
                continue;
            }
            self.in_flight.set(self.in_flight.get() + 1);
            if let Err(why) = self.request(&root, guest, &mut random).await {
                self.fail(format!("guest {guest}: {why}"));
                return;
            }
            self.in_flight.set(self.in_flight.get() - 1);
        }
    }

    async fn request(
        &self,
        root: &Rc<Root>,
        guest: u64,
        random: &mut Random,
    ) -> Result<(), String> {
        let begin = loop {
            let block = random.below(BLOCKS);
            if self.disk.is_of(guest, block) {
                break block;
            }
        };
        let mut end = begin + 1;
        while end < BLOCKS && self.disk.is_of(guest, end) && random.chance(600) {
            end += 1;
        }
        let (offset, bytes) = (begin * BLOCK_BYTES, (end - begin) * BLOCK_BYTES);
        let failed = |error| format!("blocks {begin}..{end}: {error}");
        match random.below(10) {
            0..5 => {
                let value = (random.bits() as u32) | 1;
                let from = Segments::allocate(bytes as usize, 4096);
                from.copy_from(&bytes_of(value, bytes));
                self.disk.begins(begin..end, value);
                let written = root.write(offset, from, WriteFlags::empty()).await;
                written.map_err(failed)?;
                self.disk.ends(begin..end, value);
                self.totals.borrow_mut().writes += 1;
            }
            5 => {
                self.disk.begins(begin..end, 0);
                let zeroed = root.write_zeroes(offset, bytes, ZeroFlags::MAY_UNMAP).await;
                zeroed.map_err(failed)?;
                self.disk.ends(begin..end, 0);
            }
            6 => {
                let flushing = self.disk.flush_begins();
                root.flush().await.map_err(failed)?;
                self.disk.flush_ends(&flushing);
            }
            _ => {
                let into = Segments::allocate(bytes as usize, 4096);
                root.read(offset, into.clone()).await.map_err(failed)?;
                for (block, found) in (begin..end).zip(into.to_vec().chunks(BLOCK_BYTES as usize)) {
                    self.disk.check(block, found)?;
                }
                self.totals.borrow_mut().reads += 1;
            }
        }
        Ok(())
    }

    // The operator.

    async fn operate(self: &Rc<Self>, jobs: u64, mut random: Random) -> Result<(), String> {
        for number in 0..jobs {
            let name = format!("job{number}");
            let (active, chain) = self.chain();
            self.tell(format!("{name} on {chain:?}"));
            match random.below(7) {
                0 => self.back_up(&name, &active, &mut random).await?,
                1 => self.mirror(&name, &active, false, &mut random).await?,
                2 => self.mirror(&name, &active, true, &mut random).await?,
                3 | 4 => self.snapshot(&active).await?,
                5 if chain.len() > 1 => self.commit(&name, &chain, &mut random).await?,
                6 if chain.len() > 1 => self.stream(&name, &chain, &mut random).await?,
                _ => {}
            }
            if self.stopping.get() {
                break;
            }
        }
        Ok(())
    }

    /// The node that the guests are at, and the names of the layers from there down.
    fn chain(&self) -> (String, Vec<String>) {
        self.control.read(|graph| {
            let mut layers = Vec::new();
            let mut next = self.control.node_of(self.root);
            while let Some(id) = next {
                let node = graph.node_by_id(id).expect("in the chain");
                layers.push(node.name().to_owned());
                next = graph.backing_chain_next(id);
            }
            (layers[0].clone(), layers)
        })
    }

    /// A new image, open, with the name of its node.
    async fn image(&self, backing: Option<&str>) -> Result<String, String> {
        let number = self.images.get();
        self.images.set(number + 1);
        let name = format!("disk{number}");
        self.templates.load(&self.simulation, &name, backing);
        let mut options = node(&name, None);
        if backing.is_some() {
            options.set_value("backing", blockcore::options::OptionValue::Null);
        }
        self.control
            .add(options)
            .await
            .map_err(|error| text(&error))?;
        Ok(name)
    }

    fn spec(&self, name: &str, random: &mut Random) -> JobSpec {
        JobSpec {
            id: name.to_owned(),
            speed: [0, 0, 8 << 20][random.below(3) as usize],
            auto_finalize: random.chance(800),
            auto_dismiss: true,
        }
    }

    /// Waits until a job is over, disturbing it; whether it ended well. With `ready` a job that can be
    /// completed is, or is told to stop; what is done before that is the caller's.
    async fn see_through(
        self: &Rc<Self>,
        name: &str,
        random: &mut Random,
        mut ready: impl AsyncFnMut() -> Result<(), String>,
    ) -> Result<bool, String> {
        self.totals.borrow_mut().jobs += 1;
        let may_cancel = random.chance(150);
        let mut is_told = false;
        loop {
            let delay = Duration::from_micros(random.below(3000));
            self.office.context().delay(delay).await;
            let views = self.jobs.views();
            let Some(view) = views.into_iter().find(|view| view.id == name) else {
                break;
            };
            if view.done > view.total {
                return Err(format!("more is done than there is to do: {view:?}"));
            }
            match view.state {
                JobState::Ready | JobState::Standby if !is_told => {
                    is_told = true;
                    if view.state == JobState::Standby {
                        let _ = self.jobs.resume(name);
                    }
                    ready().await?;
                }
                JobState::Pending => {
                    // It may be on its way by itself.
                    let _ = self.jobs.finalize(name).await;
                }
                JobState::Running | JobState::Paused => match random.below(8) {
                    0 => {
                        let paused = u64::from(self.jobs.pause(name).is_ok());
                        self.totals.borrow_mut().pauses += paused;
                    }
                    1..4 => {
                        let _ = self.jobs.resume(name);
                    }
                    4 => {
                        let speed = [0, 1 << 20, 64 << 20][random.below(3) as usize];
                        let _ = self.jobs.set_speed(name, speed);
                    }
                    6 => {
                        let held = self.control.drain(Scope::All).await;
                        let delay = Duration::from_micros(random.below(300));
                        self.office.context().delay(delay).await;
                        drop(held);
                    }
                    5 if may_cancel => {
                        let _ = self.jobs.cancel(name, true);
                    }
                    _ => {}
                },
                _ => {}
            }
        }
        let ended = self.ended.take();
        let Some((_, well, error)) = ended.into_iter().find(|(id, ..)| id == name) else {
            return Err(format!("nothing was said of the end of {name}"));
        };
        match (well, error) {
            (true, _) => self.totals.borrow_mut().completed += 1,
            (false, Some(error)) if error != "Operation canceled" => {
                return Err(format!("{name} failed: {error}"));
            }
            _ => self.totals.borrow_mut().cancelled += 1,
        }
        Ok(well)
    }

    /// Has the guests begin nothing, and waits for what they have begun.
    async fn hold_guests(&self) {
        self.held.set(true);
        while self.in_flight.get() > 0 {
            self.office.context().delay(Duration::from_micros(50)).await;
        }
    }

    /// A copy must hold these values.
    async fn compare(&self, copy: &str, expected: &[u32]) -> Result<(), String> {
        let spec = RootSpec {
            shares: Permissions::all(),
            ..RootSpec::reader("a look").in_units_of(512)
        };
        let looked = async {
            let root = self.control.add_root(copy, spec).await?;
            let here = self.control.root_here(root)?;
            let into = Segments::allocate(BYTES as usize, 4096);
            let read = here.read(0, into.clone()).await;
            drop(here);
            self.control.remove_root(root).await?;
            read.map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
            Ok::<_, Error>(into.to_vec())
        };
        let bytes = looked.await.map_err(|error| text(&error))?;
        for (index, (block, expected)) in
            bytes.chunks(BLOCK_BYTES as usize).zip(expected).enumerate()
        {
            if value_of(block) != Some(*expected) {
                let found = value_of(block);
                return Err(format!(
                    "block {index} of copy '{copy}' holds {found:x?}, and should hold {expected:#x}"
                ));
            }
        }
        self.totals.borrow_mut().compared += 1;
        Ok(())
    }

    async fn remove(&self, name: &str) -> Result<(), String> {
        let removed = self.control.remove(name).await;
        removed.map_err(|error| text(&error))
    }

    async fn back_up(
        self: &Rc<Self>,
        name: &str,
        active: &str,
        random: &mut Random,
    ) -> Result<(), String> {
        let target = self.image(None).await?;
        self.hold_guests().await;
        let then = self.disk.values();
        let started = self.jobs.backup(BackupSpec {
            job: self.spec(name, random),
            source: active.to_owned(),
            target: target.clone(),
            sync: BackupSync::Full,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            filter_name: None,
            max_workers: 1 + random.below(8),
            min_cluster_bytes: 0,
        });
        started.await.map_err(|error| text(&error))?;
        self.held.set(false);
        if random.chance(300) {
            // Below the job's filter.
            self.snapshot(active).await?;
        }
        if self.see_through(name, random, async || Ok(())).await? {
            self.compare(&target, &then).await?;
        }
        self.remove(&target).await
    }

    async fn mirror(
        self: &Rc<Self>,
        name: &str,
        active: &str,
        pivots: bool,
        random: &mut Random,
    ) -> Result<(), String> {
        let target = self.image(None).await?;
        let started = self.jobs.mirror(MirrorSpec {
            job: self.spec(name, random),
            source: active.to_owned(),
            target: target.clone(),
            replaces: None,
            sync: MirrorSync::Full,
            granularity_bytes: [4096, 65536][random.below(2) as usize],
            buffer_bytes: 1 << (16 + random.below(5)),
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            unmap: random.chance(500),
            filter_name: None,
            write_blocking: random.chance(400),
        });
        started.await.map_err(|error| text(&error))?;
        let switches = random.chance(200);
        let held = Cell::new(false);
        let holds = random.chance(600);
        let well = self
            .see_through(name, random, async || {
                if switches {
                    let _ = self.jobs.change_copy_mode(name, true);
                }
                if pivots {
                    let _ = self.jobs.complete(name);
                    return Ok(());
                }
                if holds {
                    self.hold_guests().await;
                    held.set(true);
                }
                let _ = self.jobs.cancel(name, false);
                Ok(())
            })
            .await?;
        if well && held.get() {
            self.compare(&target, &self.disk.values()).await?;
        }
        self.held.set(false);
        if !(well && pivots) {
            return self.remove(&target).await;
        }
        self.totals.borrow_mut().pivots += 1;
        // What the guests have left stays open if something else needs it.
        let _ = self.control.remove(active).await;
        Ok(())
    }

    async fn snapshot(self: &Rc<Self>, active: &str) -> Result<(), String> {
        let overlay = self.image(Some(active)).await?;
        let taken = self.control.snapshot(active, &overlay).await;
        taken.map_err(|error| text(&error))?;
        self.totals.borrow_mut().snapshots += 1;
        Ok(())
    }

    async fn commit(
        self: &Rc<Self>,
        name: &str,
        chain: &[String],
        random: &mut Random,
    ) -> Result<(), String> {
        let top = random.below(chain.len() as u64 - 1) as usize;
        let base = top + 1 + random.below((chain.len() - top - 1) as u64) as usize;
        let started = self.jobs.commit(CommitSpec {
            job: self.spec(name, random),
            active: chain[0].clone(),
            top: Some(chain[top].clone()),
            base: Some(chain[base].clone()),
            backing_name: None,
            mask_protocol: false,
            on_error: OnError::Report,
            filter_name: None,
        });
        started.await.map_err(|error| text(&error))?;
        let completes = random.chance(700);
        let well = self
            .see_through(name, random, async || {
                let _ = match completes {
                    true => self.jobs.complete(name),
                    false => self.jobs.cancel(name, false),
                };
                Ok(())
            })
            .await?;
        if well && (top > 0 || completes) {
            self.totals.borrow_mut().commits += 1;
            for layer in &chain[top..base] {
                let _ = self.control.remove(layer).await;
            }
        }
        Ok(())
    }

    async fn stream(
        self: &Rc<Self>,
        name: &str,
        chain: &[String],
        random: &mut Random,
    ) -> Result<(), String> {
        let base = 1 + random.below(chain.len() as u64) as usize;
        let started = self.jobs.stream(StreamSpec {
            job: self.spec(name, random),
            device: chain[0].clone(),
            base: chain.get(base).cloned(),
            bottom: None,
            backing_name: None,
            mask_protocol: false,
            on_error: OnError::Report,
            filter_name: None,
        });
        started.await.map_err(|error| text(&error))?;
        if self.see_through(name, random, async || Ok(())).await? {
            self.totals.borrow_mut().streams += 1;
            for layer in chain.iter().skip(1) {
                let _ = self.control.remove(layer).await;
            }
        }
        Ok(())
    }
}
