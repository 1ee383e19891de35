//! A simulated host with an image, for what is cut off at any moment or fails.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use blockcore::engine::sim::{FileProperties, Random, Simulation, Worker};
use blockcore::graph::{Control, Graph};
use blockcore::options::Options;

use crate::setup::qemu_output;

/// Longer than anything takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(3600);
/// Options that open the image.
pub(crate) const OPEN: &str =
    "node-name=disk,driver=qcow2,discard=unmap,file.driver=file,file.filename=/simulated/image";
/// Where the image is.
pub(crate) const PATH: &str = "/simulated/image";

/// The host, and a process with one worker.
pub(crate) struct World {
    pub(crate) simulation: Simulation,
    worker: Rc<Worker>,
    pub(crate) control: Control,
}

impl World {
    /// The image is there, durably.
    pub(crate) fn new(seed: u64, image: &[u8]) -> Self {
        let simulation = Simulation::new(seed);
        simulation.load_file(PATH, FileProperties::default(), image);
        Self::begin(simulation)
    }

    /// And is open.
    pub(crate) fn opened(seed: u64, image: &[u8]) -> Self {
        let world = Self::new(seed, image);
        let options = Options::parse(OPEN, None).unwrap();
        let opened = world.run(|control| async move { control.add(options).await });
        opened.expect("nothing fails yet");
        world
    }

    /// A process begins.
    fn begin(simulation: Simulation) -> Self {
        let worker = simulation.worker();
        let graph = Graph::new(formats::drivers());
        let control = Control::new(graph, Rc::clone(worker.context()));
        Self {
            simulation,
            worker,
            control,
        }
    }

    /// The next process begins, after a kill.
    pub(crate) fn begin_again(self) -> Self {
        Self::begin(self.simulation)
    }

    pub(crate) fn run<T: 'static, W>(&self, work: impl FnOnce(Control) -> W) -> T
    where
        W: Future<Output = T> + 'static,
    {
        let done = self.run_for(LIMIT, work);
        done.unwrap_or_else(|| panic!("it ends"))
    }

    /// Does something, for as long as `limit`; `None` if it was not done by then.
    pub(crate) fn run_for<T: 'static, W>(
        &self,
        limit: Duration,
        work: impl FnOnce(Control) -> W,
    ) -> Option<T>
    where
        W: Future<Output = T> + 'static,
    {
        let work = work(self.control.clone());
        self.simulation.run(&self.worker, limit, work).ok()
    }

    /// Cuts the power, or kills the process, and says which.
    pub(crate) fn cut_off(&self, random: &mut Random) -> bool {
        let is_kill = random.below(4) == 0;
        match is_kill {
            true => self.simulation.kill(),
            false => self.simulation.power_cut(),
        }
        is_kill
    }

    pub(crate) fn dump(&self, image: &Path) {
        let bytes = self.simulation.contents(PATH).expect("it is there");
        std::fs::write(image, bytes).expect("there is room for tests");
    }
}

/// A moment, as a share of all in thousandths: often near the end, where things become facts.
pub(crate) fn moment(random: &mut Random) -> u64 {
    1000 - random.below(1000) * random.below(1000) / 1000
}

/// QEMU finds leaks at most.
#[track_caller]
pub(crate) fn assert_usable(image: &Path, when: &str) {
    let path = image.to_str().expect("a path of ours");
    let output = qemu_output("qemu-img", &["check", "-f", "qcow2", path]);
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "{when}: {}",
        String::from_utf8_lossy(&output.stdout)
    );
}
