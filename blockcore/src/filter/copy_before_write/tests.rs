//! On the simulated engine, with disks in memory whose reads and writes are not of one moment.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::FutureExt;

use super::*;
use crate::drain::Scope;
use crate::engine::sim::{Random, Simulation, Worker};
use crate::graph::{Control, Graph, RootId, RootSpec};
use crate::io::Root;
use crate::node::Notice;
use crate::options::Options;
use crate::{ErrorKind, IoError};

const LIMIT: Duration = Duration::from_secs(3600);
const CLUSTER: u64 = 64 << 10;
/// Not a whole number of clusters.
const BYTES: u64 = 7 * CLUSTER + 4096;

/// Driver `memory`: a disk that the test holds under the node's name.
static MEMORY: DriverType = DriverType {
    name: "memory",
    options: &[],
    open: |request| async move { Ok(open_memory(&request)) }.boxed_local(),
    ..DriverType::PROTOCOL
};

thread_local! {
    static DISKS: RefCell<BTreeMap<String, Arc<Disk>>> = const { RefCell::new(BTreeMap::new()) };
}

struct Disk {
    data: Mutex<Vec<u8>>,
    random: Mutex<Random>,
    /// Writes fail with this.
    fails: Mutex<Option<IoError>>,
    /// Writes wait for as long as this is set.
    hangs: AtomicBool,
}

struct Plain;

impl Driver for Plain {}

fn open_memory(request: &OpenRequest) -> Opened {
    let disk = DISKS.with_borrow(|disks| Arc::clone(&disks[&request.node_name]));
    Opened {
        driver: Box::new(Plain),
        io: Arc::new(MemoryIo(disk)),
    }
}

struct MemoryIo(Arc<Disk>);

impl MemoryIo {
    async fn pause(&self, io: Io<'_>) {
        let micros = self.0.random.lock().unwrap().below(300);
        io.context().delay(Duration::from_micros(micros)).await;
    }

    async fn put(&self, io: Io<'_>, offset: u64, data: Vec<u8>) -> Result<(), IoError> {
        while self.0.hangs.load(Ordering::SeqCst) {
            io.context().delay(Duration::from_millis(10)).await;
        }
        if let Some(error) = *self.0.fails.lock().unwrap() {
            return Err(error);
        }
        self.pause(io).await;
        let half = data.len() / 2;
        for (begin, end) in [(0, half), (half, data.len())] {
            let at = offset as usize;
            self.0.data.lock().unwrap()[at + begin..at + end].copy_from_slice(&data[begin..end]);
            self.pause(io).await;
        }
        Ok(())
    }
}

impl DriverIo for MemoryIo {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.0.data.lock().unwrap().len() as u64
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            let bytes = into.bytes();
            let half = bytes / 2;
            for (begin, end) in [(0, half), (half, bytes)] {
                self.pause(io).await;
                let (from, to) = ((offset + begin) as usize, (offset + end) as usize);
                let part = into.slice(begin, end - begin);
                part.copy_from(&self.0.data.lock().unwrap()[from..to]);
            }
            Ok(())
        }
        .boxed_local()
    }

    fn write<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments, _: WriteFlags) -> IoFuture<'a> {
        self.put(io, offset, from.to_vec()).boxed_local()
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        _: ZeroFlags,
    ) -> IoFuture<'a> {
        self.put(io, offset, vec![0; bytes as usize]).boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        // What is read afterwards is up to the host.
        self.put(io, offset, vec![0xd1; bytes as usize])
            .boxed_local()
    }
}

/// A simulated process with disks `source` and `target`, and a guest on two workers.
struct Process {
    simulation: Simulation,
    workers: Vec<Rc<Worker>>,
    control: Control,
    source: Arc<Disk>,
    target: Arc<Disk>,
    guest: RootId,
}

impl Process {
    fn new(seed: u64) -> Rc<Self> {
        let simulation = Simulation::new(seed);
        let workers: Vec<_> = (0..3).map(|_| simulation.worker()).collect();
        let disk = |name: &str, random: &mut Random, bytes: u64| {
            let data = (0..bytes).map(|at| (at % 251) as u8 ^ (at >> 12) as u8);
            let disk = Arc::new(Disk {
                data: Mutex::new(data.collect()),
                random: Mutex::new(random.fork()),
                fails: Mutex::default(),
                hangs: AtomicBool::default(),
            });
            DISKS.with_borrow_mut(|disks| disks.insert(name.to_owned(), Arc::clone(&disk)));
            disk
        };
        let mut random = simulation.random();
        let source = disk("source", &mut random, BYTES);
        let target = disk("target", &mut random, BYTES);
        disk("short", &mut random, 4096);
        target.data.lock().unwrap().fill(0xee);
        let types = vec![&MEMORY, &COPY_BEFORE_WRITE, &SNAPSHOT_ACCESS];
        let control = Control::new(Graph::new(types), Rc::clone(workers[0].context()));
        let inner = control.clone();
        let handles = [1, 2].map(|i: usize| workers[i].context().handle().clone());
        let guest = simulation.run(&workers[0], LIMIT, async move {
            for name in ["source", "target", "short"] {
                let text = format!("driver=memory,node-name={name},discard=unmap");
                inner.add(Options::parse(&text, None)?).await?;
            }
            let spec = RootSpec::writer("a guest").in_units_of(512);
            let guest = inner.add_root("source", spec).await?;
            for handle in &handles {
                inner.attach(guest, handle).await?;
            }
            Ok::<_, Error>(guest)
        });
        Rc::new(Self {
            guest: guest.unwrap().unwrap(),
            simulation,
            workers,
            control,
            source,
            target,
        })
    }

    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        self.simulation
            .run(&self.workers[0], LIMIT, future)
            .expect("it goes on")
    }

    /// The guest on one of its workers.
    fn guest(&self, worker: usize) -> Rc<Root> {
        self.workers[worker].context().root(self.guest).unwrap()
    }

    fn there<T: 'static>(&self, worker: usize, future: impl Future<Output = T> + 'static) -> T {
        let run = self.simulation.run(&self.workers[worker], LIMIT, future);
        run.expect("it goes on")
    }

    fn write(&self, worker: usize, offset: u64, bytes: u64) -> Result<(), IoError> {
        let guest = self.guest(worker);
        self.there(
            worker,
            async move { write(&guest, offset, bytes, 0x77).await },
        )
    }

    /// Puts the filter above the source and a snapshot on it; returns a reader on the first worker and
    /// what the disk was.
    fn fleece(&self, options: &str) -> (Rc<Root>, Vec<u8>) {
        let text =
            format!("driver=copy-before-write,node-name=cbw,file=source,target=target{options}");
        let (control, source) = (self.control.clone(), Arc::clone(&self.source));
        self.run(async move { fleece(&control, &text, &source).await })
            .unwrap()
    }
}

async fn fleece(
    control: &Control,
    text: &str,
    source: &Disk,
) -> Result<(Rc<Root>, Vec<u8>), Error> {
    let mut change = control.begin().await;
    let cbw = change.add(Options::parse(text, None)?, None).await?;
    let below = change.find("source")?;
    change.replace_node(below, cbw)?;
    let access = "driver=snapshot-access,node-name=old,file=cbw,discard=unmap";
    let old = change.add(Options::parse(access, None)?, None).await?;
    let reader = change.add_root(old, RootSpec::writer("a reader"))?;
    let prepared = change.prepare().await?;
    let was = source.data.lock().unwrap().clone();
    prepared.commit().finish().await?;
    Ok((control.root_here(reader)?, was))
}

async fn unfleece(control: &Control, reader: RootId) -> Result<(), Error> {
    control.remove_root(reader).await?;
    let mut change = control.begin().await;
    change.remove("old")?;
    let (cbw, source) = (change.find("cbw")?, change.find("source")?);
    change.replace_node(cbw, source)?;
    change.remove("cbw")?;
    change.prepare().await?.commit().finish().await
}

async fn write(root: &Rc<Root>, offset: u64, bytes: u64, fill: u8) -> Result<(), IoError> {
    let from = Segments::allocate(bytes as usize, 4096);
    from.fill(fill);
    root.write(offset, from, WriteFlags::empty()).await
}

async fn read(root: &Rc<Root>, offset: u64, bytes: u64) -> Result<Vec<u8>, IoError> {
    let into = Segments::allocate(bytes as usize, 4096);
    root.read(offset, into.clone()).await?;
    Ok(into.to_vec())
}

fn range(random: &mut Random, unit: u64) -> (u64, u64) {
    let units = BYTES / unit;
    let begin = random.below(units);
    let most = (units - begin).min(3 * CLUSTER / unit);
    (begin * unit, (1 + random.below(most)) * unit)
}

/// Random requests of the guest until `stop`.
async fn load(root: Rc<Root>, mut random: Random, stop: Rc<Cell<bool>>, done: Rc<Cell<usize>>) {
    while !stop.get() {
        let (offset, bytes) = range(&mut random, 512);
        let done_well = match random.below(4) {
            0 => root.write_zeroes(offset, bytes, ZeroFlags::MAY_UNMAP).await,
            1 => root.discard(offset, bytes).await,
            _ => write(&root, offset, bytes, random.below(256) as u8).await,
        };
        done_well.expect("nothing fails");
        done.set(done.get() + 1);
        let pause = Duration::from_micros(random.below(3000));
        root.context().delay(pause).await;
    }
}

#[test]
fn a_snapshot_is_the_old_disk_whatever_guests_write_and_whoever_drains() {
    let mut copied = 0;
    for seed in 1..=40 {
        eprintln!("seed {seed}");
        let process = Process::new(seed);
        let mut random = process.simulation.random();
        let stop = Rc::new(Cell::new(false));
        let (done, ended) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
        for task in 0..8 {
            let guest = process.guest(1 + task % 2);
            let requests = load(guest, random.fork(), Rc::clone(&stop), Rc::clone(&done));
            let ended = Rc::clone(&ended);
            process.workers[1 + task % 2].context().spawn(async move {
                requests.await;
                ended.set(ended.get() + 1);
            });
        }
        let began = process.simulation.run_until(LIMIT, || done.get() > 20);
        began.unwrap();
        let timeout = ["", ",cbw-timeout=1000"][random.below(2) as usize];
        let (reader, was) = process.fleece(timeout);
        let reads = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let (reader, was, mut random) = (Rc::clone(&reader), was.clone(), random.fork());
            let reads = Rc::clone(&reads);
            process.workers[0].context().spawn(async move {
                for _ in 0..30 {
                    let (offset, bytes) = range(&mut random, 1);
                    let seen = read(&reader, offset, bytes).await.expect("nothing fails");
                    let expected = &was[offset as usize..][..bytes as usize];
                    assert!(seen == expected, "seed {seed}: {bytes} bytes at {offset}");
                    reads.set(reads.get() + 1);
                }
            });
        }
        while reads.get() < 90 {
            let (control, before) = (process.control.clone(), reads.get());
            process.run(async move { drop(control.drain(Scope::All).await) });
            let more = || reads.get() > before + 5 || reads.get() == 90;
            process.simulation.run_until(LIMIT, more).unwrap();
        }
        let whole = Rc::clone(&reader);
        let seen = process.run(async move { read(&whole, 0, BYTES).await });
        assert!(seen.unwrap() == was, "seed {seed}");
        copied += process
            .control
            .read(|graph| graph.node("cbw").unwrap().io().statistics()[0].1);
        let (control, id) = (process.control.clone(), reader.id());
        drop(reader);
        process
            .run(async move { unfleece(&control, id).await })
            .unwrap();
        let before = done.get();
        process
            .simulation
            .run_until(LIMIT, || done.get() > before + 10)
            .unwrap();
        stop.set(true);
        process
            .simulation
            .run_until(LIMIT, || ended.get() == 8)
            .unwrap();
        assert!(process.control.read(|graph| graph.node("cbw").is_err()));
    }
    assert!(copied > 100 * CLUSTER, "{copied}");
}

#[test]
fn an_error_breaks_the_guests_write_and_leaves_the_snapshot() {
    let process = Process::new(1);
    let (reader, was) = process.fleece("");
    *process.target.fails.lock().unwrap() = Some(IoError::NoSpace);
    assert_eq!(process.write(1, 4096, 4096), Err(IoError::NoSpace));
    assert!(
        *process.source.data.lock().unwrap() == was,
        "the guest's write was not made"
    );
    let again = Rc::clone(&reader);
    let seen = process.run(async move { read(&again, 0, BYTES).await });
    assert!(seen.unwrap() == was);
    *process.target.fails.lock().unwrap() = None;
    assert_eq!(process.write(2, 4096, 4096), Ok(()));
    let seen = process.run(async move { read(&reader, 0, BYTES).await });
    assert!(seen.unwrap() == was);
    assert_eq!(process.source.data.lock().unwrap()[4096], 0x77);
}

#[test]
fn an_error_breaks_the_snapshot_for_good_and_no_write_of_the_guest() {
    let process = Process::new(1);
    let (reader, _) = process.fleece(",on-cbw-error=break-snapshot");
    *process.target.fails.lock().unwrap() = Some(IoError::Failed);
    assert_eq!(process.write(1, 4096, 4096), Ok(()));
    *process.target.fails.lock().unwrap() = None;
    assert_eq!(process.write(1, 2 * CLUSTER, 4096), Ok(()));
    let mut notices = process.control.take_notices();
    notices.retain(|notice| matches!(notice, Notice::SnapshotLost { .. }));
    let lost = Notice::SnapshotLost {
        node: "cbw".into(),
        error: IoError::Failed,
    };
    assert_eq!(notices, [lost]);
    let seen = process.run(async move {
        let status = reader.enter(crate::io::RequestKind::Other, 0, 0).await;
        (
            read(&reader, 5 * CLUSTER, 4096).await,
            status.block_status(true, 0, BYTES).await,
        )
    });
    assert_eq!(seen, (Err(IoError::Failed), Err(IoError::Failed)));
    let target = process.target.data.lock().unwrap();
    assert!(
        target.iter().all(|byte| *byte == 0xee),
        "nobody copies any more"
    );
}

#[test]
fn a_target_that_hangs_fails_the_guests_write_in_time() {
    let process = Process::new(1);
    let (reader, was) = process.fleece(",cbw-timeout=2");
    process.target.hangs.store(true, Ordering::SeqCst);
    for worker in [1, 2, 1] {
        let begun = process.simulation.now();
        assert_eq!(process.write(worker, 4096, 4096), Err(IoError::Failed));
        let waited = process.simulation.now() - begun;
        assert!((2..4).contains(&waited.as_secs()), "{waited:?}");
    }
    process.target.hangs.store(false, Ordering::SeqCst);
    // What is copied behind the guest's back is waited for.
    let control = process.control.clone();
    process.run(async move { drop(control.drain(Scope::All).await) });
    assert_eq!(
        process.workers[1].context().tasks() + process.workers[2].context().tasks(),
        0
    );
    assert!(process.target.data.lock().unwrap()[..CLUSTER as usize] == was[..CLUSTER as usize]);
    assert_eq!(process.write(1, 4096, 4096), Ok(()));
    let seen = process.run(async move { read(&reader, 0, BYTES).await });
    assert!(seen.unwrap() == was);
}

#[test]
fn a_target_that_hangs_breaks_the_snapshot_in_time_and_holds_up_no_reader() {
    let process = Process::new(1);
    let (reader, _) = process.fleece(",cbw-timeout=2,on-cbw-error=break-snapshot");
    process.target.hangs.store(true, Ordering::SeqCst);
    let refused = Rc::new(Cell::new(false));
    let seen = Rc::clone(&refused);
    let guest = process.guest(1);
    process.workers[1].context().spawn(async move {
        assert_eq!(write(&guest, 4096, 4096, 0x77).await, Ok(()));
    });
    let soon = process.simulation.now() + Duration::from_millis(100);
    let hung = process
        .simulation
        .run_until(LIMIT, || process.simulation.now() > soon);
    hung.unwrap();
    // Waits for its turn until the snapshot is given up.
    process.workers[0].context().spawn(async move {
        assert!(read(&reader, 0, 4096).await == Err(IoError::Failed));
        seen.set(true);
    });
    let run = process
        .simulation
        .run_until(Duration::from_secs(4), || refused.get());
    run.unwrap();
    assert_eq!(process.write(2, 4096, 4096), Ok(()));
    process.target.hangs.store(false, Ordering::SeqCst);
    let control = process.control.clone();
    process.run(async move { drop(control.drain(Scope::All).await) });
}

#[test]
fn what_is_not_in_the_bitmap_or_was_discarded_is_neither_copied_nor_readable() {
    let process = Process::new(1);
    let control = process.control.clone();
    let marked = process.run(async move {
        let change = |set: &mut crate::dirty_bitmap::BitmapSet| {
            set.add("only", 4096)
                .map(|bitmap| bitmap.bits().set(2 * CLUSTER + 5, 3 * CLUSTER))
        };
        control.change_bitmaps("source", change).await
    });
    marked.unwrap();
    let (reader, was) = process.fleece(",bitmap.node=source,bitmap.name=only");
    let copied = || {
        let io = process
            .control
            .read(|graph| Arc::clone(graph.node("cbw").unwrap().io()));
        io.statistics()[0].1
    };
    assert_eq!(process.write(1, 0, 2 * CLUSTER), Ok(()));
    assert_eq!(copied(), 0);
    assert_eq!(process.write(1, 2 * CLUSTER, 512), Ok(()));
    assert_eq!(copied(), CLUSTER);
    let kept = was[2 * CLUSTER as usize..6 * CLUSTER as usize].to_vec();
    let seen = process.run(async move {
        let seen = read(&reader, 2 * CLUSTER, 4 * CLUSTER).await.unwrap();
        assert!(seen == kept);
        for outside in [2 * CLUSTER - 1, 6 * CLUSTER] {
            assert_eq!(read(&reader, outside, 1).await, Err(IoError::Failed));
        }
        let request = reader.enter(crate::io::RequestKind::Other, 0, 0).await;
        let status = request
            .block_status(true, 2 * CLUSTER + 512, BYTES)
            .await
            .unwrap();
        assert_eq!(status.bytes, CLUSTER - 512);
        drop(request);
        // The cluster that it covers only partly stays.
        reader.discard(2 * CLUSTER, 3 * CLUSTER - 1).await.unwrap();
        (
            read(&reader, 2 * CLUSTER, 1).await,
            read(&reader, 3 * CLUSTER, 1).await,
            read(&reader, 4 * CLUSTER, 1).await.is_ok(),
        )
    });
    assert_eq!(seen, (Err(IoError::Failed), Err(IoError::Failed), true));
    assert_eq!(
        process.target.data.lock().unwrap()[2 * CLUSTER as usize],
        0xd1
    );
    assert_eq!(process.write(1, 3 * CLUSTER, 512), Ok(()));
    assert_eq!(copied(), CLUSTER);
}

#[test]
fn a_filter_that_guests_go_past_is_refused_to_readers() {
    let process = Process::new(1);
    let control = process.control.clone();
    let kinds = process.run(async move {
        let add = async |text: &str| {
            let added = control.add(Options::parse(text, None).unwrap()).await;
            added.err().map(|error| error.kind())
        };
        [
            add("driver=copy-before-write,node-name=no,file=source,target=short").await,
            add("driver=copy-before-write,node-name=no,file=source,target=target,min-cluster-size=5")
                .await,
            add("driver=copy-before-write,node-name=no,file=source,target=target,bitmap.name=b").await,
            add("driver=snapshot-access,node-name=old,file=source").await,
            add("driver=copy-before-write,node-name=cbw,file=source,target=target").await,
            // The guest writes to the source.
            add("driver=snapshot-access,node-name=old,file=cbw").await,
        ]
    });
    let invalid = Some(ErrorKind::Invalid);
    assert_eq!(
        kinds,
        [
            invalid,
            invalid,
            invalid,
            invalid,
            None,
            Some(ErrorKind::Busy)
        ]
    );
}
