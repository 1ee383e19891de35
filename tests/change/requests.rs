//! Changes of the graph beside requests: what a root's requests, flushes and bitmaps may rely on.
//!
//! Each test was a bug: it opens with what would have been seen.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockcore::drain::Scope;
use blockcore::driver::{
    Driver, DriverIo, DriverType, Opened, Preallocation, TruncateFlags, WriteFlags,
};
use blockcore::engine::sim::{FileProperties, Simulation, Worker};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture, Root};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use futures_util::FutureExt;

const LIMIT: Duration = Duration::from_secs(60);
const PATH: &str = "/simulated/disk";

/// Driver `elastic`: stores nothing, and is as long as it was made last.
static ELASTIC: DriverType = DriverType {
    name: "elastic",
    open: |_| async { Ok(opened(Elastic(AtomicU64::new(65536)))) }.boxed_local(),
    ..DriverType::PROTOCOL
};

/// Driver `holder`: a format of a megabyte whose file grows as it is written to.
static HOLDER: DriverType = DriverType {
    name: "holder",
    open: |_| async { Ok(opened(Holder)) }.boxed_local(),
    ..DriverType::FORMAT
};

struct Elastic(AtomicU64);
struct Holder;
struct Unit;

impl Driver for Unit {}

fn opened(io: impl DriverIo + 'static) -> Opened {
    Opened {
        driver: Box::new(Unit),
        io: Arc::new(io),
    }
}

impl DriverIo for Elastic {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn write<'a>(&'a self, _: Io<'a>, _: u64, _: Segments, _: WriteFlags) -> IoFuture<'a> {
        async { Ok(()) }.boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        _: Io<'a>,
        bytes: u64,
        _: bool,
        _: Preallocation,
        _: TruncateFlags,
    ) -> IoFuture<'a> {
        self.0.store(bytes, Ordering::SeqCst);
        async { Ok(()) }.boxed_local()
    }
}

impl DriverIo for Holder {
    fn bytes(&self, _children: &[u64]) -> u64 {
        1 << 20
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        io.child(0).read(offset, into).boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        io.child(0).write(offset, from, flags).boxed_local()
    }
}

/// A simulated process: the control thread's worker and another.
struct Process {
    simulation: Simulation,
    workers: [Rc<Worker>; 2],
    control: Control,
}

impl Process {
    fn new(seed: u64) -> Self {
        let simulation = Simulation::new(seed);
        simulation.create_file(PATH, FileProperties::default(), 65536);
        let workers = [simulation.worker(), simulation.worker()];
        let mut types = formats::drivers();
        types.extend([&ELASTIC, &HOLDER]);
        let control = Control::new(Graph::new(types), Rc::clone(workers[0].context()));
        Self {
            simulation,
            workers,
            control,
        }
    }

    /// Runs a task of the control thread to its end.
    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let run = self.simulation.run(&self.workers[0], LIMIT, future);
        run.expect("it goes on")
    }

    fn add(&self, options: &str) {
        let control = self.control.clone();
        let options = Options::parse(options, None).unwrap();
        self.run(async move { control.add(options).await }).unwrap();
    }

    /// Uses a node on the second worker.
    fn serve(&self, node: &'static str, spec: RootSpec) -> (RootId, Rc<Root>) {
        let control = self.control.clone();
        let handle = self.workers[1].context().handle().clone();
        let id = self.run(async move {
            let id = control.add_root(node, spec).await?;
            control.attach(id, &handle).await?;
            Ok::<_, Error>(id)
        });
        let id = id.unwrap();
        (id, self.workers[1].context().root(id).unwrap())
    }

    /// Runs a task of the second worker to its end.
    fn there<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let run = self.simulation.run(&self.workers[1], LIMIT, future);
        run.expect("it goes on")
    }
}

fn segments(bytes: usize, fill: u8) -> Segments {
    let segments = Segments::allocate(bytes, 4096);
    segments.fill(fill);
    segments
}

/// What the guest would have seen: it flushes while flushes are ignored, and again when they are not any
/// more; the second finds nothing to do, and a power cut takes what both were for.
#[test]
fn the_first_flush_after_flushes_were_ignored_reaches_the_disk() {
    let process = Process::new(1);
    let options = format!("driver=file,node-name=disk,filename={PATH}");
    process.add(&format!("{options},cache.no-flush=on"));
    let (_, root) = process.serve("disk", RootSpec::writer("a guest"));
    let guest = Rc::clone(&root);
    let flushed = process.there(async move {
        guest
            .write(0, segments(4096, 7), WriteFlags::empty())
            .await?;
        guest.flush().await
    });
    flushed.unwrap();
    let control = process.control.clone();
    let reopened =
        process.run(async move { control.reopen(vec![Options::parse(&options, None)?]).await });
    reopened.unwrap();
    process.there(async move { root.flush().await }).unwrap();
    process.simulation.power_cut();
    let left = process.simulation.contents(PATH).unwrap();
    assert!(left[..4096] == [7; 4096], "the data is lost");
}

/// What would have been seen: a node is closed or changed with a request to it under way.
#[test]
fn a_drained_section_waits_for_a_root_that_is_being_detached() {
    for seed in 0..20 {
        let process = Process::new(seed);
        process.add("driver=null-co,node-name=disk,latency-ns=50000000");
        let (id, root) = process.serve("disk", RootSpec::reader("a guest"));
        let guest = Rc::clone(&root);
        let context = process.workers[1].context();
        context.spawn(async move { guest.read(0, segments(4096, 0)).await.unwrap() });
        let begun = process.simulation.run_until(LIMIT, || root.in_flight() > 0);
        begun.unwrap();
        let (control, handle) = (process.control.clone(), context.handle().clone());
        let detached = Rc::new(Cell::new(false));
        let done = Rc::clone(&detached);
        process.workers[0].context().spawn(async move {
            control.detach(id, &handle).await;
            done.set(true);
        });
        let left = process
            .simulation
            .run_until(LIMIT, || process.workers[1].context().root(id).is_none());
        left.unwrap();
        assert!(!detached.get(), "a request is under way");
        let control = process.control.clone();
        let in_flight = process.run(async move {
            let _drained = control.drain(Scope::All).await;
            root.in_flight()
        });
        assert_eq!(in_flight, 0, "seed {seed}");
    }
}

/// What would have been seen: the node below is closed with the control thread's own request under way.
#[test]
fn removing_a_root_waits_for_its_requests_on_the_control_thread() {
    let process = Process::new(1);
    process.add("driver=null-co,node-name=disk,latency-ns=50000000");
    let control = process.control.clone();
    let in_flight = process.run(async move {
        let id = control.add_root("disk", RootSpec::reader("a job")).await?;
        let root = control.root_here(id)?;
        let job = Rc::clone(&root);
        let request = async move { job.read(0, segments(4096, 0)).await.unwrap() };
        control.context().spawn(request);
        while root.in_flight() == 0 {
            control.context().delay(Duration::from_micros(1)).await;
        }
        control.remove_root(id).await?;
        Ok::<_, Error>(root.in_flight())
    });
    assert_eq!(in_flight.unwrap(), 0);
}

/// What would have been seen: one command, and the daemon is gone with all its disks.
#[test]
fn reopening_a_node_that_the_same_reopen_takes_out_is_refused() {
    let process = Process::new(1);
    process.add(&format!(
        "driver=raw,node-name=disk,file.driver=file,file.node-name=below,file.filename={PATH}"
    ));
    process
        .simulation
        .create_file("/simulated/other", FileProperties::default(), 65536);
    process.add("driver=file,node-name=other,filename=/simulated/other");
    let control = process.control.clone();
    let reopened = process.run(async move {
        let below = format!("driver=file,node-name=below,filename={PATH}");
        let entries = [below.as_str(), "driver=raw,node-name=disk,file=other"];
        let entries = entries.map(|entry| Options::parse(entry, None).unwrap());
        control.reopen(entries.to_vec()).await
    });
    assert_eq!(reopened.unwrap_err().kind(), ErrorKind::Invalid);
    let still = |graph: &Graph| graph.node("below").is_ok();
    assert!(process.control.read(still), "nothing has changed");
}

/// What the guest would have seen: zeroes where it had written, after somebody added another disk.
#[test]
fn a_file_that_was_written_past_its_end_stays_as_long_through_a_change_of_the_graph() {
    let process = Process::new(1);
    process.add(&format!(
        "driver=holder,node-name=disk,file.driver=file,file.node-name=below,file.filename={PATH}"
    ));
    let (_, root) = process.serve("disk", RootSpec::writer("a guest"));
    let guest = Rc::clone(&root);
    let written = process.there(async move {
        guest
            .write(1 << 19, segments(4096, 7), WriteFlags::empty())
            .await
    });
    written.unwrap();
    let bytes = |graph: &Graph| graph.node("below").unwrap().bytes();
    assert_eq!(process.control.read(bytes), (1 << 19) + 4096);
    process.add("driver=null-co,node-name=unrelated");
    assert_eq!(process.control.read(bytes), (1 << 19) + 4096);
    let into = segments(4096, 0);
    let memory = into.clone();
    process
        .there(async move { root.read(1 << 19, memory).await })
        .unwrap();
    assert!(into.to_vec() == [7; 4096]);
}

/// What would have been seen: an incremental backup without what a guest wrote right after its disk grew.
#[test]
fn what_is_written_to_a_part_that_was_just_added_is_dirty() {
    let process = Process::new(1);
    process.add("driver=elastic,node-name=disk");
    let control = process.control.clone();
    let added = process.run(async move {
        let add = |set: &mut blockcore::dirty_bitmap::BitmapSet| set.add("b", 4096).map(|_| ());
        control.change_bitmaps("disk", add).await
    });
    added.unwrap();
    let mut spec = RootSpec::writer("a guest");
    spec.needs |= Permissions::RESIZE;
    let (_, root) = process.serve("disk", spec);
    let written = process.there(async move {
        use blockcore::io::RequestKind;
        let grow = root.enter(RequestKind::Truncate, 0, 0).await;
        let none = (Preallocation::Off, TruncateFlags::empty());
        grow.truncate(1 << 20, true, none.0, none.1).await?;
        drop(grow);
        root.write(1 << 19, segments(4096, 7), WriteFlags::empty())
            .await
    });
    written.unwrap();
    process.control.take_notices();
    process
        .simulation
        .run_until(LIMIT, || process.workers[0].context().tasks() == 0)
        .unwrap();
    let dirty = process.control.read(|graph| {
        let bits = graph
            .node("disk")
            .unwrap()
            .bitmaps()
            .get("b")
            .unwrap()
            .bits()
            .clone();
        (bits.length(), bits.get(1 << 19), bits.get(0))
    });
    assert_eq!(dirty, (1 << 20, true, false));
}
