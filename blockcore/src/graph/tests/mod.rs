//! Tests of the graph and of the pipeline around its nodes, with drivers that note what they are asked.

mod announced;
mod chain;
mod change;
mod drain;
mod image;
mod named;
mod permissions;
mod pipeline;
mod reopen;
mod status;

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::permission::Permissions;
use super::{Control, Graph, NodeId, RootId, RootSpec};
use crate::driver::{
    ChildSpec, Driver, DriverIo, DriverType, Limits, OpenRequest, Opened, Place, Preallocation,
    ReopenRequest, Reopened, Role, Status, StatusFlags, TruncateFlags, WriteFlags, ZeroFlags,
};
use crate::engine::sim::{Simulation, Worker};
use crate::io::buffer::Segments;
use crate::io::{Io, IoContext, IoFuture, MemoryRange, Root};
use crate::options::{OptionKind, OptionSpec, Options};
use crate::{Error, ErrorKind, IoError};

const LIMIT: Duration = Duration::from_secs(60);

/// What the layers of [`LAYER`] allocate in.
const UNIT: u64 = 512;

thread_local! {
    // A simulation is one thread, and so is a test.
    static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

fn log(line: String) {
    LOG.with_borrow_mut(|log| log.push(line));
}

/// What drivers were asked since the last call.
fn told() -> Vec<String> {
    LOG.take()
}

/// What of that contains `word`.
fn told_of(word: &str) -> Vec<String> {
    let mut told = told();
    told.retain(|line| line.contains(word));
    told
}

/// A control thread and a worker on a simulated host.
struct Bench {
    simulation: Simulation,
    worker: Rc<Worker>,
    control: Control,
}

impl Bench {
    fn new() -> Self {
        Self::with(vec![&MEMORY, &LAYER, &PASS])
    }

    fn with(types: Vec<&'static DriverType>) -> Self {
        let simulation = Simulation::new(1);
        let worker = simulation.worker();
        let control = Control::new(Graph::new(types), Rc::clone(worker.context()));
        told();
        Self {
            simulation,
            worker,
            control,
        }
    }

    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let run = self.simulation.run(&self.worker, LIMIT, future);
        run.expect("the simulation is not stuck")
    }

    /// Lets everything happen that can.
    fn settle(&self) {
        for _ in 0..200 {
            self.simulation.step();
        }
    }

    fn try_add(&self, text: &str) -> Result<NodeId, Error> {
        let (control, options) = (self.control.clone(), options(text));
        self.run(async move { control.add(options).await })
    }

    fn add(&self, text: &str) -> NodeId {
        self.try_add(text).unwrap()
    }

    fn try_root(&self, node: &str, spec: RootSpec) -> Result<RootId, Error> {
        let (control, node) = (self.control.clone(), node.to_owned());
        self.run(async move { control.add_root(&node, spec).await })
    }

    /// A root on the control thread's own worker, with requests of whole units.
    fn root(&self, node: &str, spec: RootSpec) -> Rc<Root> {
        let id = self.try_root(node, spec.in_units_of(512)).unwrap();
        self.control.root_here(id).unwrap()
    }

    fn remove(&self, node: &str) -> Result<(), Error> {
        let (control, node) = (self.control.clone(), node.to_owned());
        self.run(async move { control.remove(&node).await })
    }

    fn remove_root(&self, id: RootId) -> Result<(), Error> {
        let control = self.control.clone();
        self.run(async move { control.remove_root(id).await })
    }

    fn reopen(&self, entries: &[&str]) -> Result<(), Error> {
        let control = self.control.clone();
        let entries = entries.iter().map(|text| options(text)).collect();
        self.run(async move { control.reopen(entries).await })
    }

    fn id(&self, name: &str) -> NodeId {
        self.control.read(|graph| graph.node(name).unwrap().id())
    }

    fn has(&self, name: &str) -> bool {
        self.control.read(|graph| graph.node(name).is_ok())
    }

    /// The name of a node's child.
    fn child(&self, node: &str, child: &str) -> Option<String> {
        self.control.read(|graph| {
            let id = graph.node(node).unwrap().id();
            let mut children = graph.children(id);
            let found = children.find(|(name, _)| *name == child)?;
            Some(found.1.name().to_owned())
        })
    }

    fn write(&self, root: &Rc<Root>, offset: u64, bytes: u64, value: u8) -> Result<(), IoError> {
        let (root, from) = (Rc::clone(root), Segments::allocate(bytes as usize, 512));
        from.fill(value);
        self.run(async move { root.write(offset, from, WriteFlags::empty()).await })
    }

    fn read(&self, root: &Rc<Root>, offset: u64, bytes: u64) -> Result<Vec<u8>, IoError> {
        let (root, into) = (Rc::clone(root), Segments::allocate(bytes as usize, 512));
        into.fill(0xa5);
        self.run(async move {
            root.read(offset, into.clone()).await?;
            Ok(into.to_vec())
        })
    }
}

fn options(text: &str) -> Options {
    Options::parse(text, None).unwrap()
}

fn reader() -> RootSpec {
    RootSpec::reader("export 'ro'")
}

/// A reader that bears whatever others do.
fn easy_reader() -> RootSpec {
    RootSpec {
        shares: Permissions::all(),
        ..reader()
    }
}

fn writer() -> RootSpec {
    RootSpec::writer("export 'rw'")
}

/// Somebody who may change the length, and shares everything.
fn resizer() -> RootSpec {
    RootSpec {
        needs: Permissions::all(),
        shares: Permissions::all(),
        ..RootSpec::writer("a tool")
    }
}

const MEMORY_OPTIONS: &[OptionSpec] = &[
    option("size", OptionKind::Size, "64k", false),
    option("label", OptionKind::Text, "", true),
    // What it cannot do, and what it can.
    option("refuse", OptionKind::Text, "", true),
    option("can", OptionKind::Text, "", false),
];

const fn option(
    name: &'static str,
    kind: OptionKind,
    default: &'static str,
    reopen: bool,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default: Some(default),
        reopen,
        changes_data: false,
        help: "",
    }
}

/// A protocol in memory.
static MEMORY: DriverType = DriverType {
    name: "memory",
    options: MEMORY_OPTIONS,
    open: |request| open_memory(request).boxed_local(),
    ..DriverType::PROTOCOL
};

/// A filter that leaves everything out.
static PASS: DriverType = DriverType {
    name: "pass",
    open: |request| {
        async move {
            Ok(Opened {
                driver: Box::new(Noting(request.node_name)),
                io: Arc::new(Pass),
            })
        }
        .boxed_local()
    },
    ..DriverType::FILTER
};

/// A format that holds some units and defers to a backing node for the rest.
static LAYER: DriverType = DriverType {
    name: "layer",
    backing: true,
    children: &[
        ChildSpec {
            name: "file",
            role: Role::IMAGE,
            optional: false,
        },
        ChildSpec {
            name: "backing",
            role: Role::COW,
            optional: true,
        },
    ],
    open: |request| {
        async move {
            Ok(Opened {
                driver: Box::new(Noting(request.node_name.clone())),
                io: Arc::new(Layer {
                    name: request.node_name,
                    held: Mutex::default(),
                }),
            })
        }
        .boxed_local()
    },
    ..DriverType::FORMAT
};

/// A global-state half that notes what it is asked.
struct Noting(String);

impl Driver for Noting {
    fn limits(&self, children: &[Option<Limits>]) -> Limits {
        match children.len() {
            2 => Limits {
                request_alignment: UNIT as u32,
                ..Limits::default()
            },
            _ => children[0].map_or_else(Limits::default, Limits::above),
        }
    }

    fn close(&mut self, _: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        log(format!("{} close", self.0));
        async { Ok(()) }.boxed_local()
    }

    fn reopen_commit(&mut self) {
        log(format!("{} reopen commit", self.0));
    }

    fn reopen_abort(&mut self) {
        log(format!("{} reopen abort", self.0));
    }

    fn reopen_after_commit(&mut self, _: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        log(format!("{} reopen after", self.0));
        async { Ok(()) }.boxed_local()
    }

    fn commit_permissions(&mut self) {
        log(format!("{} permissions commit", self.0));
    }

    fn abort_permissions(&mut self) {
        log(format!("{} permissions abort", self.0));
    }
}

struct Pass;

impl DriverIo for Pass {}

/// The global-state half of [`MEMORY`].
struct MemoryDriver {
    noting: Noting,
    refuse: String,
}

async fn open_memory(request: OpenRequest) -> Result<Opened, Error> {
    let bytes = request.options.size(MEMORY_OPTIONS, "size") as usize;
    let refuse = request.options.text(MEMORY_OPTIONS, "refuse").to_owned();
    if refuse == "open" {
        return Err(Error::invalid("it does not open"));
    }
    Ok(Opened {
        io: Arc::new(Memory {
            name: request.node_name.clone(),
            bytes: Mutex::new(vec![0; bytes]),
            can: request.options.text(MEMORY_OPTIONS, "can").to_owned(),
            busy: AtomicBool::new(false),
        }),
        driver: Box::new(MemoryDriver {
            noting: Noting(request.node_name),
            refuse,
        }),
    })
}

impl Driver for MemoryDriver {
    fn limits(&self, _: &[Option<Limits>]) -> Limits {
        Limits::default()
    }

    fn close(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        self.noting.close(root)
    }

    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        let label = request.options.text(MEMORY_OPTIONS, "label");
        log(format!("{} reopen prepare '{label}'", self.noting.0));
        let refused = request.options.text(MEMORY_OPTIONS, "refuse") == "reopen";
        async move {
            match refused {
                true => Err(Error::invalid("it does not reopen")),
                false => Ok(Reopened::default()),
            }
        }
        .boxed_local()
    }

    fn reopen_commit(&mut self) {
        self.noting.reopen_commit();
    }

    fn reopen_abort(&mut self) {
        self.noting.reopen_abort();
    }

    fn reopen_after_commit(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        self.noting.reopen_after_commit(root)
    }

    fn prepare_permissions(
        &mut self,
        _: Rc<IoContext>,
        needs: Permissions,
        _: Permissions,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        log(format!("{} permissions prepare", self.noting.0));
        let writes = needs.contains(Permissions::WRITE);
        let answer = match &*self.refuse {
            "write" if writes => Err(Error::busy("another process writes to it")),
            "deny" if writes => Err(Error::new(
                ErrorKind::PermissionDenied,
                "nobody may write to it",
            )),
            _ => Ok(Reopened::default()),
        };
        async move { answer }.boxed_local()
    }

    fn commit_permissions(&mut self) {
        self.noting.commit_permissions();
    }

    fn abort_permissions(&mut self) {
        self.noting.abort_permissions();
    }
}

/// The I/O half of [`MEMORY`].
struct Memory {
    name: String,
    bytes: Mutex<Vec<u8>>,
    can: String,
    busy: AtomicBool,
}

impl Memory {
    fn can(&self, what: &str) -> bool {
        self.can.contains(what)
    }
}

impl DriverIo for Memory {
    fn memory_announced(&self, _: &IoContext, memory: MemoryRange) {
        log(format!("{} hears of {:#x}", self.name, memory.address));
    }

    fn memory_withdrawn(&self, _: &IoContext, memory: MemoryRange) {
        log(format!(
            "{} hears the end of {:#x}",
            self.name, memory.address
        ));
    }

    fn bytes(&self, _: &[u64]) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn write_flags(&self) -> WriteFlags {
        match self.can("flags") {
            true => WriteFlags::STABLE | WriteFlags::UNCHANGED,
            false => WriteFlags::empty(),
        }
    }

    fn serialises(&self) -> bool {
        self.can("serialise")
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            if self.can("slow") {
                io.context().delay(Duration::from_millis(10)).await;
            }
            let bytes = self.bytes.lock().unwrap();
            into.copy_from(&bytes[offset as usize..]);
            Ok(())
        }
        .boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            log(format!(
                "{} write {offset} {} {:#x}",
                self.name,
                from.bytes(),
                flags.bits()
            ));
            if self.can("slow") {
                io.context().delay(Duration::from_millis(10)).await;
            }
            if self.can("fail") {
                return Err(IoError::Failed);
            }
            let mut bytes = self.bytes.lock().unwrap();
            let end = (offset + from.bytes()) as usize;
            let longer = bytes.len().max(end);
            bytes.resize(longer, 0);
            from.copy_to(&mut bytes[offset as usize..]);
            Ok(())
        }
        .boxed_local()
    }

    fn write_zeroes<'a>(
        &'a self,
        _: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        async move {
            if !self.can("zero") {
                return Err(IoError::Unsupported);
            }
            log(format!(
                "{} zero {offset} {bytes} {:#x}",
                self.name,
                flags.bits()
            ));
            let mut all = self.bytes.lock().unwrap();
            all[offset as usize..][..bytes as usize].fill(0);
            Ok(())
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, _: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            log(format!("{} discard {offset} {bytes}", self.name));
            match self.can("discard") {
                true => Ok(()),
                false => Err(IoError::Unsupported),
            }
        }
        .boxed_local()
    }

    fn flush_to_host<'a>(&'a self, _: Io<'a>) -> IoFuture<'a> {
        log(format!("{} flush host", self.name));
        async { Ok(()) }.boxed_local()
    }

    fn flush_to_disk<'a>(&'a self, _: Io<'a>) -> IoFuture<'a> {
        log(format!("{} flush disk", self.name));
        let fails = self.can("badflush");
        async move {
            match fails {
                true => Err(IoError::FlushLost),
                false => Ok(()),
            }
        }
        .boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        _: Io<'a>,
        bytes: u64,
        _: bool,
        _: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        async move {
            log(format!(
                "{} truncate {bytes} {:#x}",
                self.name,
                flags.bits()
            ));
            self.bytes.lock().unwrap().resize(bytes as usize, 0);
            Ok(())
        }
        .boxed_local()
    }

    fn drain_begin(&self) {
        log(format!("{} drain begin", self.name));
    }

    fn drain_end(&self) {
        log(format!("{} drain end", self.name));
    }

    fn is_busy(&self) -> bool {
        self.can("busy") && !self.busy.swap(true, Ordering::Relaxed)
    }
}

/// The I/O half of [`LAYER`]: which units it holds; they lie in the file where they are in the disk.
struct Layer {
    name: String,
    held: Mutex<std::collections::BTreeSet<u64>>,
}

impl Layer {
    /// Whether a unit is held, and how many bytes from it on are treated alike.
    fn run(&self, offset: u64, end: u64) -> (bool, u64) {
        let held = self.held.lock().unwrap();
        let first = held.contains(&(offset / UNIT));
        let units = (offset..end).step_by(UNIT as usize);
        let alike = units.take_while(|at| held.contains(&(at / UNIT)) == first);
        (first, alike.count() as u64 * UNIT)
    }
}

impl DriverIo for Layer {
    fn memory_announced(&self, _: &IoContext, memory: MemoryRange) {
        log(format!("{} hears of {:#x}", self.name, memory.address));
    }

    fn memory_withdrawn(&self, _: &IoContext, memory: MemoryRange) {
        log(format!(
            "{} hears the end of {:#x}",
            self.name, memory.address
        ));
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            let end = offset + into.bytes();
            let mut at = offset;
            while at < end {
                let (held, run) = self.run(at, end);
                let part = into.slice(at - offset, run);
                match io.backing() {
                    _ if held => io.child(0).read(at, part).await?,
                    Some(backing) => {
                        let there = backing.bytes().saturating_sub(at).min(run);
                        part.fill(0);
                        if there > 0 {
                            backing.read(at, part.slice(0, there)).await?;
                        }
                    }
                    None => part.fill(0),
                }
                at += run;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn write<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments, _: WriteFlags) -> IoFuture<'a> {
        async move {
            let bytes = from.bytes();
            let written = io.child(0).write(offset, from, WriteFlags::empty());
            written.await?;
            let units = offset / UNIT..(offset + bytes) / UNIT;
            self.held.lock().unwrap().extend(units);
            Ok(())
        }
        .boxed_local()
    }

    fn flush_to_host<'a>(&'a self, _: Io<'a>) -> IoFuture<'a> {
        log(format!("{} flush host", self.name));
        async { Ok(()) }.boxed_local()
    }

    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        _: bool,
        offset: u64,
        _: u64,
    ) -> IoFuture<'a, Status> {
        async move {
            // Longer than was asked, where that is known.
            let (held, run) = self.run(offset, io.bytes().next_multiple_of(UNIT));
            Ok(match held {
                true => Status {
                    flags: StatusFlags::DATA | StatusFlags::PLACE | StatusFlags::RECURSE,
                    bytes: run,
                    place: Place {
                        child: Some(0),
                        offset,
                    },
                },
                false => Status::new(StatusFlags::empty(), run),
            })
        }
        .boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        io: Io<'a>,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        async move {
            log(format!(
                "{} truncate {bytes} {:#x}",
                self.name,
                flags.bits()
            ));
            let file = io.child(0);
            file.truncate(bytes, exact, preallocation, TruncateFlags::empty())
                .await
        }
        .boxed_local()
    }
}
