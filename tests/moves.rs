//! A driver that moves data while requests are under way, on several simulated workers: nobody's bytes
//! are given to somebody else while a request that resolved to them has not ended.
//!
//! Every cluster of the disk always has the same content. A move writes it to a free place, changes the
//! map, waits, and fills the old place with garbage before somebody else gets it. A read of garbage, or
//! a write that lands in another cluster's place, is a request that was not waited for.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockcore::IoError;
use blockcore::driver::{
    ChildSpec, CopyFlags, Driver, DriverIo, DriverType, Mapping, Opened, Role, WriteFlags,
};
use blockcore::engine::sim::{Faults, FileProperties, Random, Simulation, Worker};
use blockcore::engine::{Event, OpResult, preempt};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture, Request, RequestKind, Root};
use blockcore::options::Options;
use futures_channel::oneshot;
use futures_util::FutureExt;
use harness::seeds;

/// Seeds tried when nothing is said: a few seconds.
const DEFAULT_SEEDS: u64 = 60;
/// Simulated time after which what has not ended is stuck.
const LIMIT: Duration = Duration::from_secs(3600);
const PATH: &str = "/simulated/disk";

const CLUSTER_BYTES: u64 = 4096;
/// Clusters of the disk.
const CLUSTERS: u64 = 8;
/// Places in the file: few are free, so that each is soon somebody else's.
const PLACES: u64 = 12;
/// In the map: the backing node has it.
const ABSENT: u64 = u64::MAX;

/// The driver. Its disk has [`CLUSTERS`] clusters, the last of which is the backing node's, if there is
/// one.
static MOVING: DriverType = DriverType {
    name: "moving",
    about: "moves its clusters about, for tests",
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
    backing: true,
    open: |request| {
        async move {
            let io = Arc::new(Moving::new(request.children[1].is_some()));
            LAST_OPENED.set(Some(Arc::clone(&io)));
            Ok(Opened {
                driver: Box::new(Nothing),
                io,
            })
        }
        .boxed_local()
    },
    ..DriverType::FORMAT
};

thread_local! {
    // A simulation is one thread.
    static LAST_OPENED: RefCell<Option<Arc<Moving>>> = const { RefCell::new(None) };
}

struct Nothing;

impl Driver for Nothing {}

struct Moving {
    /// Where each cluster is, by the number of the place.
    places: Vec<AtomicU64>,
    free: Mutex<Vec<u64>>,
    /// Clusters that are being moved.
    under_way: Mutex<BTreeSet<u64>>,
}

impl Moving {
    fn new(backed: bool) -> Self {
        let held = CLUSTERS - u64::from(backed);
        let place = |cluster| if cluster < held { cluster } else { ABSENT };
        Self {
            places: (0..CLUSTERS)
                .map(|cluster| AtomicU64::new(place(cluster)))
                .collect(),
            free: Mutex::new((CLUSTERS..PLACES).collect()),
            under_way: Mutex::default(),
        }
    }

    fn place(&self, cluster: u64) -> u64 {
        self.places[cluster as usize].load(Ordering::Acquire)
    }

    /// Moves some clusters, one after the other, and waits for the old places together. Returns how many.
    async fn relocate(&self, io: Io<'_>, clusters: &[u64]) -> usize {
        let mut old = Vec::new();
        for &cluster in clusters {
            if !self.under_way.lock().unwrap().insert(cluster) {
                continue;
            }
            let new = self.free.lock().unwrap().pop();
            let Some(new) = new else {
                self.under_way.lock().unwrap().remove(&cluster);
                continue;
            };
            write(io, new, &content(cluster)).await;
            let before = self.places[cluster as usize].swap(new, Ordering::AcqRel);
            old.push((cluster, before));
        }
        let ranges: Arc<[Range<u64>]> = old.iter().map(|(_, place)| range(*place)).collect();
        io.wait_unused(0, ranges).await;
        for (cluster, place) in &old {
            write(io, *place, &[0xee; CLUSTER_BYTES as usize]).await;
            self.free.lock().unwrap().push(*place);
            self.under_way.lock().unwrap().remove(cluster);
        }
        old.len()
    }
}

fn range(place: u64) -> Range<u64> {
    place * CLUSTER_BYTES..(place + 1) * CLUSTER_BYTES
}

/// What a cluster of the disk always has.
fn content(cluster: u64) -> Vec<u8> {
    vec![cluster as u8 + 1; CLUSTER_BYTES as usize]
}

fn memory(bytes: &[u8]) -> Segments {
    let segments = Segments::allocate(bytes.len(), 4096);
    segments.copy_from(bytes);
    segments
}

async fn write(io: Io<'_>, place: u64, bytes: &[u8]) {
    let file = io.child(0);
    let written = file.write(place * CLUSTER_BYTES, memory(bytes), WriteFlags::empty());
    written.await.expect("nothing fails");
}

impl DriverIo for Moving {
    fn bytes(&self, _children: &[u64]) -> u64 {
        CLUSTERS * CLUSTER_BYTES
    }

    fn moves_data(&self) -> bool {
        true
    }

    fn map(&self, _write: bool, offset: u64, bytes: u64) -> Mapping {
        let (cluster, within) = (offset / CLUSTER_BYTES, offset % CLUSTER_BYTES);
        if within + bytes > CLUSTER_BYTES {
            return Mapping::Ask;
        }
        match self.place(cluster) {
            ABSENT => Mapping::Child { index: 1, offset },
            place => Mapping::Child {
                index: 0,
                offset: place * CLUSTER_BYTES + within,
            },
        }
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            let mut done = 0;
            while done < into.bytes() {
                let (at, rest) = (offset + done, into.bytes() - done);
                let bytes = rest.min(CLUSTER_BYTES - at % CLUSTER_BYTES);
                let Mapping::Child { index, offset } = self.map(false, at, bytes) else {
                    unreachable!("it is in one cluster");
                };
                let _used = io.using(index, offset, bytes);
                preempt(io.context().engine()).await;
                let part = into.slice(done, bytes);
                io.child(index).read(offset, part).await?;
                done += bytes;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        _flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            let mut done = 0;
            while done < from.bytes() {
                let (at, rest) = (offset + done, from.bytes() - done);
                let bytes = rest.min(CLUSTER_BYTES - at % CLUSTER_BYTES);
                let Mapping::Child { index, offset } = self.map(true, at, bytes) else {
                    unreachable!("it is in one cluster");
                };
                let _used = io.using(index, offset, bytes);
                preempt(io.context().engine()).await;
                let part = from.slice(done, bytes);
                io.child(index)
                    .write(offset, part, WriteFlags::empty())
                    .await?;
                done += bytes;
            }
            Ok(())
        }
        .boxed_local()
    }
}

/// What the seeds reached together, so that a test that tests nothing is seen.
#[derive(Clone, Debug, Default)]
struct Totals {
    fast: u64,
    slow: u64,
    copied: u64,
    moved: u64,
}

#[test]
fn a_moved_clusters_old_place_is_nobodys_before_the_last_request_that_resolved_to_it_ends() {
    let totals = seeds::try_all(DEFAULT_SEEDS, |seed, totals| {
        let mut random = Random::new(seed);
        let case = Case {
            seed,
            workers: random.between(1, 4) as usize,
            depth: random.between(1, 4) as usize,
            movers: random.between(1, 2) as usize,
            slow_permille: [0, 100, 500][random.below(3) as usize],
            latency_us: [1, 50, 500][random.below(3) as usize],
        };
        seeds::replayable(seed, &case, |case| Ok(case.run(totals)))
    });
    if let Some(totals) = totals {
        let Totals {
            fast,
            slow,
            copied,
            moved,
        } = totals;
        assert!(fast > 10_000 && slow > 5_000, "{totals:?}");
        assert!(copied > 500 && moved > 5_000, "{totals:?}");
    }
}

/// What a seed decides before anything runs.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    workers: usize,
    /// Tasks with requests, per worker.
    depth: usize,
    /// Tasks that move clusters, per worker.
    movers: usize,
    /// Requests that take a task though they need not.
    slow_permille: u32,
    latency_us: u64,
}

impl Case {
    /// Returns the simulation's hash.
    fn run(&self, totals: &mut Totals) -> u64 {
        // A filter and a second root above: what comes by any way counts.
        let world = World::new(self.seed, self.workers, writer(), |control| async move {
            let disk = format!(
                "driver=raw,node-name=top,file.driver=moving,file.node-name=disk,\
                 file.file.driver=file,file.file.filename={PATH}"
            );
            control.add(options(&disk)).await.expect("it opens");
            ["top", "disk"]
        });
        let contents: Vec<_> = (0..CLUSTERS).flat_map(content).collect();
        let root = Rc::clone(&world.roots[1][0]);
        let filled =
            world.run(async move { root.write(0, memory(&contents), WriteFlags::empty()).await });
        filled.expect("nothing fails");
        world.simulation.set_faults(Faults {
            latency_us: (0, self.latency_us),
            short_permille: 50,
            ..Faults::default()
        });
        let reached = Rc::<RefCell<Totals>>::default();
        let outstanding = Rc::new(Cell::new(0));
        for (index, worker) in world.workers.iter().enumerate() {
            for task in 0..self.depth + self.movers {
                let roots = world.roots.each_ref().map(|roots| Rc::clone(&roots[index]));
                let guest = Guest {
                    roots,
                    fast: Rc::clone(&world.fast[index]),
                    random: RefCell::new(world.simulation.random()),
                    slow_permille: self.slow_permille,
                    reached: Rc::clone(&reached),
                };
                let moves = task >= self.depth;
                outstanding.set(outstanding.get() + 1);
                let outstanding = Rc::clone(&outstanding);
                worker.context().spawn(async move {
                    for _ in 0..100 {
                        match moves {
                            true => guest.relocate().await,
                            false => guest.request().await,
                        }
                    }
                    outstanding.set(outstanding.get() - 1);
                });
            }
        }
        let done = world.simulation.run_until(LIMIT, || outstanding.get() == 0);
        done.expect("every wait ends");
        // What landed last, too.
        let (root, into) = (Rc::clone(&world.roots[1][0]), whole_disk());
        let read = into.clone();
        world
            .run(async move { root.read(0, read).await })
            .expect("nothing fails");
        check(0, &into);
        let reached = reached.borrow();
        totals.fast += reached.fast;
        totals.slow += reached.slow;
        totals.copied += reached.copied;
        totals.moved += reached.moved;
        world.simulation.hash()
    }
}

fn whole_disk() -> Segments {
    Segments::allocate((CLUSTERS * CLUSTER_BYTES) as usize, 4096)
}

fn options(text: &str) -> Options {
    Options::parse(text, None).expect("well-formed")
}

/// Whether what was read from `offset` on is what is always there.
fn check(offset: u64, read: &Segments) {
    for (index, byte) in read.to_vec().iter().enumerate() {
        let at = offset + index as u64;
        let cluster = at / CLUSTER_BYTES;
        assert_eq!(*byte, cluster as u8 + 1, "at {at}, in cluster {cluster}");
    }
}

/// Operations without a task, by token, and who waits for them.
type Fast = Rc<RefCell<BTreeMap<u64, oneshot::Sender<OpResult>>>>;

/// Workers with the same two roots.
struct World {
    simulation: Simulation,
    workers: Vec<Rc<Worker>>,
    fast: Vec<Fast>,
    /// For each of the two nodes, one per worker.
    roots: [Vec<Rc<Root>>; 2],
}

impl World {
    /// `open` makes the nodes and says which two are used, by whom.
    fn new<O>(seed: u64, workers: usize, user: RootSpec, open: impl FnOnce(Control) -> O) -> Self
    where
        O: Future<Output = [&'static str; 2]> + 'static,
    {
        let simulation = Simulation::new(seed);
        simulation.create_file(PATH, FileProperties::default(), PLACES * CLUSTER_BYTES);
        let fast: Vec<Fast> = (0..workers).map(|_| Rc::default()).collect();
        let workers: Vec<_> = fast
            .iter()
            .map(|fast| {
                let fast = Rc::clone(fast);
                simulation.worker_with(move |event| {
                    if let Event::Done { token, result, .. } = event
                        && let Some(done) = fast.borrow_mut().remove(&token)
                    {
                        let _ = done.send(result);
                    }
                })
            })
            .collect();
        let mut drivers = formats::drivers();
        drivers.push(&MOVING);
        let control = Control::new(Graph::new(drivers), Rc::clone(workers[0].context()));
        let handles: Vec<_> = workers
            .iter()
            .map(|worker| worker.context().handle().clone())
            .collect();
        let opened = open(control.clone());
        let ids = simulation.run(&workers[0], LIMIT, async move {
            let nodes = opened.await;
            let mut ids = Vec::new();
            for node in nodes {
                let spec = RootSpec {
                    shares: Permissions::all(),
                    ..user.clone().in_units_of(512)
                };
                let id = control.add_root(node, spec).await.expect("both bear it");
                for handle in &handles {
                    control.attach(id, handle).await.expect("they are there");
                }
                ids.push(id);
            }
            [ids[0], ids[1]]
        });
        let roots = ids.expect("it is not stuck").map(|id| {
            let roots = workers.iter().map(|worker| worker.context().root(id));
            roots.map(|root| root.expect("attached")).collect()
        });
        Self {
            simulation,
            workers,
            fast,
            roots,
        }
    }

    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let done = self.simulation.run(&self.workers[0], LIMIT, future);
        done.expect("it is not stuck")
    }

    /// Whether nobody uses a place in the file of node `disk`, which is that of the second roots.
    fn is_free(&self, place: u64) -> bool {
        let request = enter(&self.roots[1][0]);
        let wait = request.io().wait_unused(0, Arc::from([range(place)]));
        let done = Rc::new(Cell::new(false));
        let seen = Rc::clone(&done);
        self.workers[0].context().spawn(async move {
            wait.await;
            seen.set(true);
        });
        for _ in 0..200 {
            self.simulation.step();
        }
        done.get()
    }
}

fn writer() -> RootSpec {
    RootSpec::writer("a guest")
}

fn reader() -> RootSpec {
    RootSpec::reader("a guest")
}

fn enter(root: &Rc<Root>) -> Request {
    let request = root.try_enter(RequestKind::Other, 0, 0);
    request.expect("nobody holds the root")
}

/// One task's requests.
struct Guest {
    roots: [Rc<Root>; 2],
    fast: Fast,
    random: RefCell<Random>,
    slow_permille: u32,
    reached: Rc<RefCell<Totals>>,
}

impl Guest {
    fn below(&self, limit: u64) -> u64 {
        self.random.borrow_mut().below(limit)
    }

    async fn request(&self) {
        preempt(self.roots[0].context().engine()).await;
        let root = Rc::clone(&self.roots[self.below(2) as usize]);
        let sectors = CLUSTERS * CLUSTER_BYTES / 512;
        let first = self.below(sectors);
        let bytes = 512 * (1 + self.below((sectors - first).min(8)));
        match self.below(9) {
            0..4 => self.read(&root, first * 512, bytes).await,
            4..8 => self.write(&root, first * 512, bytes).await,
            _ => self.copy(&root).await,
        }
    }

    async fn read(&self, root: &Rc<Root>, offset: u64, bytes: u64) {
        let into = Segments::allocate(bytes as usize, 512);
        let request = root.enter(RequestKind::Read, offset, bytes).await;
        let fast = self.start(|token| request.start_read(offset, into.clone(), token));
        if !is_whole(fast, bytes).await {
            let read = request.read(offset, into.clone()).await;
            read.expect("nothing fails");
        }
        check(offset, &into);
    }

    async fn write(&self, root: &Rc<Root>, offset: u64, bytes: u64) {
        let all: Vec<_> = (0..CLUSTERS).flat_map(content).collect();
        let from = memory(&all[offset as usize..][..bytes as usize]);
        let request = root.enter(RequestKind::Write, offset, bytes).await;
        let fast = self.start(|token| request.start_write(offset, from.clone(), token));
        if !is_whole(fast, bytes).await {
            let written = request.write(offset, from, WriteFlags::empty()).await;
            written.expect("nothing fails");
        }
    }

    /// Has the host copy a cluster onto itself: the same bytes, wherever they are.
    async fn copy(&self, root: &Rc<Root>) {
        let offset = self.below(CLUSTERS) * CLUSTER_BYTES;
        let request = root.enter(RequestKind::Other, offset, CLUSTER_BYTES).await;
        let (bytes, flags) = (CLUSTER_BYTES, CopyFlags::empty());
        let copied = request.copy_range(offset, &request, offset, bytes, flags);
        match copied.await {
            Ok(()) => self.reached.borrow_mut().copied += 1,
            // A file is not copied onto the very same bytes.
            Err(IoError::Unsupported) => {}
            Err(error) => panic!("nothing fails: {error}"),
        }
    }

    async fn relocate(&self) {
        let root = &self.roots[1];
        root.context()
            .delay(Duration::from_micros(self.below(300)))
            .await;
        let request = root.enter(RequestKind::Other, 0, 0).await;
        let clusters: Vec<_> = (0..1 + self.below(3))
            .map(|_| self.below(CLUSTERS))
            .collect();
        let moving = LAST_OPENED.with_borrow(|io| io.clone().expect("opened"));
        let moved = moving.relocate(request.io(), &clusters).await;
        self.reached.borrow_mut().moved += moved as u64;
    }

    /// Starts an operation without a task, if that is possible and wanted.
    fn start(
        &self,
        start: impl FnOnce(u64) -> Result<(), Segments>,
    ) -> Option<oneshot::Receiver<OpResult>> {
        let token = self.random.borrow_mut().bits();
        let slow = self.random.borrow_mut().chance(self.slow_permille);
        if slow || start(token).is_err() {
            self.reached.borrow_mut().slow += 1;
            return None;
        }
        self.reached.borrow_mut().fast += 1;
        let (done, wait) = oneshot::channel();
        self.fast.borrow_mut().insert(token, done);
        Some(wait)
    }
}

async fn is_whole(started: Option<oneshot::Receiver<OpResult>>, bytes: u64) -> bool {
    match started {
        None => false,
        Some(wait) => wait.await.expect("the event comes") == Ok(bytes),
    }
}

#[test]
fn an_operation_without_a_task_uses_its_bytes_until_its_request_ends_or_goes_on_as_a_task() {
    let world = World::new(1, 2, writer(), |control| async move {
        let disk = format!("driver=moving,node-name=disk,file.driver=file,file.filename={PATH}");
        control.add(options(&disk)).await.expect("it opens");
        ["disk", "disk"]
    });
    // On another worker, by another root.
    let request = enter(&world.roots[0][1]);
    let into = || Segments::allocate(512, 512);
    assert!(request.start_read(CLUSTER_BYTES + 512, into(), 1).is_ok());
    assert!(!world.is_free(1));
    assert!(world.is_free(0) && world.is_free(2));
    // What follows takes a task.
    assert_eq!(request.io().name(), "disk");
    assert!(world.is_free(1));
    assert!(request.start_write(2 * CLUSTER_BYTES, into(), 2).is_ok());
    assert!(!world.is_free(2));
    drop(request);
    assert!(world.is_free(2));
}

#[test]
fn what_the_backing_node_has_is_not_the_drivers_to_move_and_is_not_recorded() {
    let world = World::new(1, 1, reader(), |control| async move {
        let disk = format!(
            "driver=moving,node-name=disk,file.driver=file,file.filename={PATH},\
             backing.driver=moving,backing.node-name=base,backing.file.driver=file,\
             backing.file.filename={PATH},backing.read-only=on,backing.file.locking=off,\
             file.locking=off"
        );
        control.add(options(&disk)).await.expect("it opens");
        ["disk", "base"]
    });
    let request = enter(&world.roots[0][0]);
    let into = Segments::allocate(512, 512);
    let last = CLUSTERS - 1;
    // Through a node that moves data to another one that does: one record is enough.
    assert!(request.start_read(last * CLUSTER_BYTES, into, 1).is_ok());
    assert!(!world.is_free(last));
}

#[test]
fn a_request_through_two_layers_that_move_data_takes_a_task() {
    let world = World::new(1, 1, reader(), |control| async move {
        let disk = format!(
            "driver=moving,node-name=disk,file.driver=moving,file.node-name=below,\
             file.file.driver=file,file.file.filename={PATH}"
        );
        control.add(options(&disk)).await.expect("it opens");
        ["disk", "below"]
    });
    let into = || Segments::allocate(512, 512);
    let request = enter(&world.roots[0][0]);
    assert!(request.start_read(0, into(), 1).is_err());
    assert!(world.is_free(0));
    let request = enter(&world.roots[1][0]);
    assert!(request.start_read(0, into(), 2).is_ok());
}
