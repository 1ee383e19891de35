//! A simulated machine with a graph, for one test.

use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::engine::sim::{FileProperties, Random, Simulation, Worker};
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::Root;
use blockcore::io::buffer::Segments;
use blockcore::options::Options;
use blockcore::{Error, IoError};

/// Simulated time after which a test is stuck.
pub(crate) const LIMIT: Duration = Duration::from_secs(3600);

/// A machine: the graph's control thread and one more worker.
pub(crate) struct Machine {
    pub(crate) simulation: Simulation,
    pub(crate) thread: Rc<Worker>,
    pub(crate) worker: Rc<Worker>,
    pub(crate) control: Control,
}

impl Machine {
    pub(crate) fn new(seed: u64) -> Self {
        Self::on(Simulation::new(seed))
    }

    /// As [`new`](Self::new), with what a life before has left.
    pub(crate) fn on(simulation: Simulation) -> Self {
        let thread = simulation.worker();
        let worker = simulation.worker();
        let graph = Graph::new(harness::overlay::drivers());
        Self {
            control: Control::new(graph, Rc::clone(thread.context())),
            simulation,
            thread,
            worker,
        }
    }

    /// The same machine after its processes were killed.
    pub(crate) fn killed(self) -> Self {
        let Self { simulation, .. } = self;
        simulation.kill();
        Self::on(simulation)
    }

    pub(crate) fn create_file(&self, path: &str, bytes: u64) {
        let properties = FileProperties::default();
        self.simulation.create_file(path, properties, bytes);
    }

    /// Runs a task on the control thread.
    pub(crate) fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let done = self.simulation.run(&self.thread, LIMIT, future);
        done.unwrap_or_else(|stuck| panic!("{stuck}"))
    }

    /// Runs a task on the worker.
    pub(crate) fn serve<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let done = self.simulation.run(&self.worker, LIMIT, future);
        done.unwrap_or_else(|stuck| panic!("{stuck}"))
    }

    pub(crate) fn try_add(&self, options: &str) -> Result<(), Error> {
        let (control, options) = (self.control.clone(), parse(options));
        self.run(async move { control.add(options).await })
            .map(|_| ())
    }

    pub(crate) fn add(&self, options: &str) {
        let added = self.try_add(options);
        added.unwrap_or_else(|error| panic!("{}", error.report()));
    }

    pub(crate) fn reopen(&self, options: &str) -> Result<(), Error> {
        let (control, options) = (self.control.clone(), parse(options));
        self.run(async move { control.reopen(vec![options]).await })
    }

    pub(crate) fn remove(&self, node: &str) -> Result<(), Error> {
        let (control, node) = (self.control.clone(), node.to_owned());
        self.run(async move { control.remove(&node).await })
    }

    pub(crate) fn try_root(&self, node: &str, spec: RootSpec) -> Result<Rc<Root>, Error> {
        let (control, node) = (self.control.clone(), node.to_owned());
        let handle = self.worker.context().handle().clone();
        let id = self.run(async move {
            let id = control.add_root(&node, spec).await?;
            control.attach(id, &handle).await?;
            Ok::<_, Error>(id)
        })?;
        Ok(self.worker.context().root(id).expect("attached"))
    }

    /// A way to read and write a node on the worker.
    pub(crate) fn root(&self, node: &str) -> Rc<Root> {
        let root = self.try_root(node, RootSpec::writer("a guest"));
        root.unwrap_or_else(|error| panic!("{}", error.report()))
    }

    pub(crate) fn remove_root(&self, root: Rc<Root>) {
        let (control, id) = (self.control.clone(), root.id());
        drop(root);
        let removed = self.run(async move { control.remove_root(id).await });
        removed.unwrap_or_else(|error| panic!("{}", error.report()));
    }

    pub(crate) fn read(
        &self,
        root: &Rc<Root>,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>, IoError> {
        let into = Segments::allocate(bytes as usize, 4096);
        let (root, inner) = (Rc::clone(root), into.clone());
        self.serve(async move { root.read(offset, inner).await })?;
        Ok(into.to_vec())
    }

    pub(crate) fn write(&self, root: &Rc<Root>, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let (root, from) = (Rc::clone(root), segments(data));
        self.serve(async move { root.write(offset, from, WriteFlags::empty()).await })
    }

    pub(crate) fn zero(&self, root: &Rc<Root>, offset: u64, bytes: u64) -> Result<(), IoError> {
        let root = Rc::clone(root);
        self.serve(async move { root.write_zeroes(offset, bytes, ZeroFlags::empty()).await })
    }

    pub(crate) fn discard(&self, root: &Rc<Root>, offset: u64, bytes: u64) -> Result<(), IoError> {
        let root = Rc::clone(root);
        self.serve(async move { root.discard(offset, bytes).await })
    }

    pub(crate) fn flush(&self, root: &Rc<Root>) -> Result<(), IoError> {
        let root = Rc::clone(root);
        self.serve(async move { root.flush().await })
    }
}

pub(crate) fn parse(options: &str) -> Options {
    Options::parse(options, None).expect("well-formed")
}

pub(crate) fn segments(data: &[u8]) -> Segments {
    let segments = Segments::allocate(data.len(), 4096);
    segments.copy_from(data);
    segments
}

/// The seed to try, and more of them where nobody asks for one.
pub(crate) fn seeds(more: u64) -> std::ops::Range<u64> {
    match std::env::var("STONEWORK_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("a number");
            seed..seed + 1
        }
        Err(_) => 1..more + 1,
    }
}

/// Bytes that are not zero and tell where they are from.
pub(crate) fn pattern(tag: u8, bytes: u64) -> Vec<u8> {
    (0..bytes).map(|i| tag ^ (i as u8 | 1)).collect()
}

/// A range of a disk of `length` bytes: often small, sometimes aligned, never empty.
pub(crate) fn range(random: &mut Random, length: u64) -> (u64, u64) {
    let unit = [1, 512, 4096][random.below(3) as usize];
    let offset = random.below(length) / unit * unit;
    let most = [unit, 16384, length][random.below(3) as usize];
    let bytes = (1 + random.below(most)).next_multiple_of(unit);
    (offset, bytes.min(length - offset))
}
