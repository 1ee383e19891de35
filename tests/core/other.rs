//! Another process on the same host: it may have a disk that nobody else writes to, and only that.

use std::rc::Rc;

use blockcore::ErrorKind;
use blockcore::engine::sim::Worker;
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::Root;
use blockcore::options::Options;
use harness::overlay;

use crate::life::Life;
use crate::{LIMIT, Test};

/// A graph of another process, with a disk's file.
struct Other {
    control: Control,
    root: Option<RootId>,
}

impl Other {
    fn new(worker: &Worker) -> Self {
        let graph = Graph::new(overlay::drivers());
        Self {
            control: Control::new(graph, Rc::clone(worker.context())),
            root: None,
        }
    }

    /// Opens a disk's file, and uses it as somebody does who bears no other writer.
    async fn open(
        &mut self,
        test: &Test,
        disk: usize,
        writes: bool,
    ) -> Result<Rc<Root>, blockcore::Error> {
        let case = &test.case.disks[disk];
        let text = format!(
            "driver={},node-name=theirs,filename={}",
            crate::case::Case::driver(case),
            case.path
        );
        self.control.add(Options::parse(&text, None)?).await?;
        let spec = match writes {
            true => RootSpec::writer("another process"),
            false => RootSpec::reader("another process"),
        };
        let spec = spec.in_units_of(test.case.grain as u32);
        let root = self.control.add_root("theirs", spec).await?;
        self.root = Some(root);
        self.control.root_here(root)
    }

    /// Lets go of everything, as often as it takes.
    async fn close(&self, test: &Test) -> Result<(), String> {
        while let Some(root) = self.root.filter(|id| self.control.node_of(*id).is_some()) {
            if let Err(error) = self.control.remove_root(root).await {
                test.check_error("ending another process", &error)?;
            }
        }
        let is_there = || self.control.read(|graph| graph.node("theirs").is_ok());
        while is_there() {
            if let Err(error) = self.control.remove("theirs").await {
                test.check_error("ending another process", &error)?;
            }
        }
        Ok(())
    }
}

impl Test {
    /// Another process uses each disk, which nobody has open: that must be possible, and what it finds is what
    /// the disk may hold.
    pub(crate) fn visit(self: &Rc<Self>) -> Result<(), String> {
        for disk in 0..self.disks.len() {
            let worker = self.simulation.worker();
            let (test, visitor) = (Rc::clone(self), Rc::clone(&worker));
            let visited = self.simulation.run(&worker, LIMIT, async move {
                for _ in 0..1000 {
                    let mut other = Other::new(&visitor);
                    let opened = other.open(&test, disk, true).await;
                    if let Err(error) = &opened {
                        test.check_error("another process that is alone", error)?;
                        other.close(&test).await?;
                        continue;
                    }
                    other.close(&test).await?;
                    test.count(|totals| &mut totals.visits);
                    return Ok(());
                }
                Err("another process cannot have a disk that nobody has".to_owned())
            });
            visited.map_err(|stuck| stuck.to_string())??;
        }
        Ok(())
    }
}

impl Life {
    /// Another process tries to use a disk that this one writes to.
    pub(crate) fn intrude(self: &Rc<Self>) {
        let test = &self.test;
        let disk = self.any_disk();
        if !self.is_written[disk].get() || self.has_intruder.replace(true) {
            return;
        }
        let worker = test.simulation.worker();
        let (life, writes) = (Rc::clone(self), test.chance(500));
        self.tasks.set(self.tasks.get() + 1);
        let other = Rc::clone(&worker);
        // From here on.
        self.was_unwritten[disk].set(false);
        worker.context().spawn(async move {
            let test = &life.test;
            let mut other = Other::new(&other);
            let opened = other.open(test, disk, writes).await;
            match opened.map(|_| ()) {
                Ok(()) if life.was_unwritten[disk].get() => {}
                Ok(()) => test.fail("two processes have a disk to which one writes".into()),
                Err(error) if error.kind() == ErrorKind::Busy => {
                    test.count(|totals| &mut totals.excluded);
                }
                Err(error) => {
                    if let Err(why) = test.check_error("another process", &error) {
                        test.fail(why);
                    }
                }
            }
            if let Err(why) = other.close(test).await {
                test.fail(why);
            }
            life.tasks.set(life.tasks.get() - 1);
        });
    }
}
