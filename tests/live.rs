//! A daemon in the test's own process, reached as operators will reach it: queues moved between workers
//! and the graph changed under load, front-ends told of changes, nothing left when it has stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use backend::config::{ExportConfig, ProcessConfig, SocketAddress};
use backend::daemon::{ControlHandle, Daemon};
use blockcore::Error;
use blockcore::drain::Scope;
use blockcore::engine::EngineChoice;
use blockcore::io::policy::ErrorPolicy;
use blockcore::options::Options;
use harness::daemon::{Place, eventually};
use harness::frontend::blk::{self, Request};
use harness::frontend::connection::End;
use harness::frontend::ring::{Ring, Used};
use harness::frontend::{Frontend, LIMIT, Pending};
use harness::load::Load;
use harness::random::Random;

const SECTOR: usize = 512;
const DISK_SECTORS: u64 = 4096;
const WORKERS: usize = 2;
const QUEUES: u32 = 2;
/// Requests that each queue has in flight.
const DEPTH: usize = 8;
/// What each request moves.
const SECTORS: u64 = 8;
const ENGINES: [EngineChoice; 2] = [EngineChoice::Threads, EngineChoice::Uring];

/// Tests that count what this process has must not run beside others that have something.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn queues_move_between_workers_under_load_and_no_request_is_lost() {
    let _alone = alone();
    for engine in ENGINES {
        let served = Served::start(engine);
        let busy = Busy::start(&served);
        let mut moves = served.mover(300);
        let mut slowest = Duration::ZERO;
        for number in 0.. {
            match moves.recv_timeout(LIMIT) {
                Ok(pause) => slowest = slowest.max(pause),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    assert_eq!(number, 300, "{engine:?}: the control ended early");
                    break;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    panic!("{engine:?}: move {number} does not end");
                }
            }
            if number % 30 == 0 {
                busy.goes_on();
            }
        }
        let rounds = busy.finish();
        println!("{engine:?}: 300 moves, the slowest took {slowest:?}, {rounds} rounds meanwhile");
        // A verified load over another connection finds the disk whole, on the workers of last.
        moves = served.mover(20);
        served.zero();
        let load = Load::start(&served.socket);
        while moves.recv_timeout(LIMIT).is_ok() {}
        load.finish();
        served.stop();
    }
}

#[test]
fn the_graph_changes_a_thousand_times_under_load_and_no_request_is_lost() {
    let _alone = alone();
    for engine in ENGINES {
        let served = Served::start(engine);
        let busy = Busy::start(&served);
        let mut slowest: BTreeMap<&str, (u32, Duration)> = BTreeMap::new();
        for (number, step) in steps().into_iter().enumerate() {
            let begin = Instant::now();
            let (done, result) = mpsc::channel();
            let (control, image) = (served.control.clone(), served.disk.clone());
            std::thread::spawn(move || done.send(step.run(&control, &image)));
            match result.recv_timeout(LIMIT) {
                Ok(Some(Ok(()))) => {}
                Ok(outcome) => panic!("{engine:?}: change {number}, {step:?}: {outcome:?}"),
                Err(_) => panic!(
                    "{engine:?}: change {number}, {step:?}, does not end; in flight by worker: {}",
                    in_flight(&served.control)
                ),
            }
            let (count, worst) = slowest.entry(step.name()).or_default();
            (*count, *worst) = (*count + 1, (*worst).max(begin.elapsed()));
            if number % 50 == 0 {
                busy.goes_on();
            }
        }
        let pause = Duration::from_micros(busy.worst.load(Ordering::Relaxed));
        let rounds = busy.finish();
        println!("{engine:?}: changes with the slowest of each: {slowest:?}");
        println!("{engine:?}: {rounds} rounds meanwhile, the slowest took {pause:?}");
        served.stop();
    }
}

/// What can be done to the graph below a busy export.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A node on top of the one that takes its parents, and another such node in place of an earlier one.
    Insert {
        name: u32,
    },
    Replace {
        from: u32,
        to: u32,
    },
    Remove {
        name: u32,
    },
    Reopen {
        direct: bool,
        unmap: bool,
    },
    Move {
        queue: u16,
    },
    Drain {
        micros: u64,
        all: bool,
    },
}

/// A thousand changes, in an order of their own.
fn steps() -> Vec<Step> {
    let mut random = Random::announced("changes");
    let mut top = None;
    let step = |number| match random.below(6) {
        0 | 1 => match top.take() {
            None => {
                top = Some(number);
                Step::Insert { name: number }
            }
            Some(from) if random.below(2) == 0 => {
                top = Some(number);
                Step::Replace { from, to: number }
            }
            Some(name) => Step::Remove { name },
        },
        2 => Step::Reopen {
            direct: random.below(2) == 0,
            unmap: random.below(2) == 0,
        },
        3 => Step::Move {
            queue: random.below(u64::from(QUEUES)) as u16,
        },
        _ => Step::Drain {
            micros: random.below(500),
            all: random.below(2) == 0,
        },
    };
    (0..1000).map(step).collect()
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Insert { .. } => "insert",
            Self::Replace { .. } => "replace",
            Self::Remove { .. } => "remove",
            Self::Reopen { .. } => "reopen",
            Self::Move { .. } => "move",
            Self::Drain { .. } => "drain",
        }
    }

    /// Has it done; `None` if the daemon is gone.
    fn run(self, control: &ControlHandle, image: &Path) -> Option<Result<(), String>> {
        let image = image.to_string_lossy().into_owned();
        control.call(move |daemon| async move {
            let done = self.change(&daemon, image).await;
            done.map_err(|error| error.report())
        })
    }

    async fn change(self, daemon: &Daemon, image: String) -> Result<(), Error> {
        let control = daemon.control().clone();
        let layer = |name: u32| format!("layer{name}");
        let above = |name: u32| {
            let text = format!("raw,node-name={},file=node", layer(name));
            Options::parse(&text, Some("driver")).expect("well-formed")
        };
        match self {
            Self::Insert { name } => {
                let mut change = control.begin().await;
                let node = change.find("node")?;
                let new = change.open(above(name)).await?;
                change.replace_node(node, new)?;
                change.prepare().await?.commit().finish().await
            }
            Self::Replace { from, to } => {
                let mut change = control.begin().await;
                let old = change.find(&layer(from))?;
                let new = change.open(above(to)).await?;
                change.replace_node(old, new)?;
                change.prepare().await?.commit().finish().await
            }
            Self::Remove { name } => {
                let mut change = control.begin().await;
                let (node, old) = (change.find("node")?, change.find(&layer(name))?);
                change.replace_node(old, node)?;
                change.prepare().await?.commit().finish().await
            }
            Self::Reopen { direct, unmap } => {
                let (direct, unmap) = match (direct, unmap) {
                    (direct, true) => (direct, "unmap"),
                    (direct, false) => (direct, "ignore"),
                };
                let direct = if direct { "on" } else { "off" };
                let text = format!("file,node-name=node,cache.direct={direct},discard={unmap}");
                let mut options = Options::parse(&text, Some("driver"))?;
                options.set("filename", image);
                control.reopen(vec![options]).await
            }
            Self::Move { queue } => {
                let export = daemon.export("disk").expect("it is served");
                let from = export.worker_of(queue).expect("it has one");
                export.move_queue(queue, (from + 1) % WORKERS).await
            }
            Self::Drain { micros, all } => {
                let node = control.read(|graph| graph.node("node").map(|node| node.id()))?;
                let scope = match all {
                    true => Scope::All,
                    false => Scope::Nodes([node].into()),
                };
                let drained = control.drain(scope).await;
                control.context().delay(Duration::from_micros(micros)).await;
                drop(drained);
                Ok(())
            }
        }
    }
}

/// What the workers still have, if the control answers.
fn in_flight(control: &ControlHandle) -> String {
    let (say, said) = mpsc::channel();
    let control = control.clone();
    std::thread::spawn(move || {
        let asked = control.queue("disk", |export| async move { export.in_flight().await });
        say.send(format!("{asked:?}"))
    });
    let answer = said.recv_timeout(Duration::from_secs(5));
    answer.unwrap_or_else(|_| "the control does not answer".into())
}

#[test]
fn a_front_end_hears_that_the_configuration_has_changed_and_reads_it_anew() {
    let _alone = alone();
    for engine in ENGINES {
        let served = Served::start(engine);
        // Nobody listens: nothing happens.
        served.control.config_changed("disk");
        for _ in 0..2 {
            let frontend = Frontend::connect(&served.socket);
            let channel = frontend.open_backend_channel();
            assert_eq!(channel.receive(Duration::ZERO), Err(End::Silent));
            for _ in 0..3 {
                served.control.config_changed("disk");
                channel.await_config_change();
                assert_eq!(frontend.config().capacity_sectors, DISK_SECTORS);
            }
            served.control.config_changed("another");
            assert_eq!(
                channel.receive(Duration::from_millis(20)),
                Err(End::Silent),
                "another export's news"
            );
        }
        served.stop();
    }
}

#[test]
fn a_queue_or_worker_that_does_not_exist_cannot_be_moved() {
    let _alone = alone();
    let served = Served::start(EngineChoice::Auto);
    for (queue, worker) in [(QUEUES as u16, 0), (0, WORKERS)] {
        let moved = served.control.queue("disk", move |export| async move {
            export
                .move_queue(queue, worker)
                .await
                .map_err(|error| error.report())
        });
        let error = moved
            .expect("there is an export")
            .expect_err("nothing to move");
        assert!(error.contains("export 'disk' has no queue"), "{error}");
    }
    served.stop();
}

#[test]
fn who_asks_a_daemon_that_has_stopped_is_told_so() {
    let _alone = alone();
    let served = Served::start(EngineChoice::Auto);
    let control = served.control.clone();
    assert_eq!(
        control.export("disk", |export| export.info().queues),
        Some(QUEUES as u16)
    );
    assert_eq!(control.export("another", |_| ()), None);
    served.stop();
    let asked = std::thread::spawn(move || {
        control.config_changed("disk");
        control.export("disk", |_| ())
    });
    eventually("the answer comes", || asked.is_finished());
    assert_eq!(asked.join().expect("no panic"), None);
}

#[test]
fn nothing_is_left_in_the_process_when_a_daemon_has_stopped() {
    let _alone = alone();
    for engine in ENGINES {
        // What a process has once for all daemons is made by the first.
        Served::start(engine).stop();
        // A thread that has done its work may still be on its way out.
        let all_have_ended = || self::threads().is_empty();
        eventually("the first one's threads end", all_have_ended);
        let descriptors = descriptors();
        for round in 0..5 {
            let served = Served::start(engine);
            let busy = Busy::start(&served);
            assert!(!all_have_ended(), "workers are threads");
            match round % 2 {
                0 => {
                    busy.finish();
                    served.stop();
                }
                // The daemon stops under a front-end that is busy.
                _ => {
                    served.stop();
                    busy.abandon();
                }
            }
        }
        eventually("every thread ends", all_have_ended);
        let left = self::descriptors();
        assert_eq!(left, descriptors, "{engine:?}: descriptors were left open");
    }
}

/// How many descriptors of each kind this process has open.
fn descriptors() -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").expect("there is a /proc") {
        let Ok(target) = entry.and_then(|entry| fs::read_link(entry.path())) else {
            continue;
        };
        let target = target.to_string_lossy();
        // Sockets and pipes have numbers of their own.
        let kind = target.split(":[").next().unwrap_or(&target).to_owned();
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}

/// The daemon's threads, but for those of the pool, which is the process's, and those of the kernel.
fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("there is a /proc");
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let ours = |name: &String| {
        let begins = |begin| name.starts_with(begin);
        begins("worker ") || begins("export ") || begins("control")
    };
    let mut names: Vec<_> = names.filter(ours).collect();
    names.sort();
    names
}

/// A daemon on a thread of its own that serves a disk of zeroes.
struct Served {
    control: ControlHandle,
    thread: JoinHandle<Result<(), String>>,
    socket: PathBuf,
    disk: PathBuf,
    place: Place,
}

impl Served {
    #[track_caller]
    fn start(engine: EngineChoice) -> Self {
        let place = Place::new();
        let disk = place.sparse("disk.raw", DISK_SECTORS * SECTOR as u64);
        let socket = place.join("socket");
        let (ready, started) = mpsc::channel();
        let (image, path) = (disk.clone(), socket.clone());
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || {
                let daemon = build(engine, &image, path).map_err(|error| error.report())?;
                let _ = ready.send(daemon.handle());
                daemon.run(None).map_err(|error| error.report())
            })
            .expect("a thread");
        match started.recv() {
            Ok(control) => Self {
                control,
                thread,
                socket,
                disk,
                place,
            },
            Err(_) => panic!("the daemon does not start: {:?}", thread.join()),
        }
    }

    /// Moves queues from worker to worker on another thread; gives how long each move took.
    fn mover(&self, count: usize) -> mpsc::Receiver<Duration> {
        let (done, moves) = mpsc::channel();
        let control = self.control.clone();
        std::thread::spawn(move || {
            let mut random = Random::announced("moves");
            for _ in 0..count {
                let queue = random.below(u64::from(QUEUES)) as u16;
                let begin = Instant::now();
                let moved = control.queue("disk", move |export| async move {
                    let from = export.worker_of(queue).expect("it has one");
                    let to = (from + 1) % WORKERS;
                    let moved = export.move_queue(queue, to).await;
                    moved.is_ok() && export.worker_of(queue) == Some(to)
                });
                if moved != Some(true) || done.send(begin.elapsed()).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_micros(random.below(500)));
            }
        });
        moves
    }

    /// Makes the disk zeroes again, without anybody connected.
    fn zero(&self) {
        fs::write(&self.disk, vec![0; DISK_SECTORS as usize * SECTOR]).expect("the disk is there");
    }

    /// Stops the daemon, which must end in order.
    #[track_caller]
    fn stop(self) {
        self.control.quit();
        eventually("the daemon ends", || self.thread.is_finished());
        let ended = self.thread.join().expect("it does not panic");
        assert_eq!(ended, Ok(()));
        assert!(!self.socket.exists(), "the socket is removed");
        drop(self.place);
    }
}

fn build(
    engine: EngineChoice,
    image: &Path,
    socket: PathBuf,
) -> Result<std::rc::Rc<Daemon>, Error> {
    let process = ProcessConfig {
        workers: Some(WORKERS),
        engine,
        ..ProcessConfig::default()
    };
    let daemon = Daemon::new(process, formats::drivers())?;
    let mut options = Options::default();
    options.set("driver", "file");
    options.set("node-name", "node");
    options.set("filename", image.to_string_lossy());
    let export = ExportConfig {
        id: "disk".into(),
        node: "node".into(),
        socket: SocketAddress::Path(socket),
        iothreads: Vec::new(),
        writable: true,
        writethrough: false,
        queues: QUEUES as u16,
        block_bytes: None,
        serial: String::new(),
        on_error: ErrorPolicy::default(),
        retry_held: None,
    };
    daemon.block_on(|daemon| async move {
        daemon.add_node(options).await?;
        daemon.add_export(export).await
    })?;
    Ok(daemon)
}

/// A front-end that keeps both queues busy and checks all that it reads.
struct Busy {
    stop: Arc<AtomicBool>,
    /// The daemon is gone: nothing that is in flight will be answered.
    gone: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    /// Microseconds that the slowest round took.
    worst: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Busy {
    fn start(served: &Served) -> Self {
        let (stop, gone) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let rounds = Arc::new(AtomicU64::new(0));
        let worst = Arc::new(AtomicU64::new(0));
        let socket = served.socket.clone();
        let thread = std::thread::spawn({
            let (stop, gone) = (Arc::clone(&stop), Arc::clone(&gone));
            let (rounds, worst) = (Arc::clone(&rounds), Arc::clone(&worst));
            move || {
                let mut random = Random::announced("busy");
                let mut frontend = Frontend::connect(&socket);
                let mut rings = [0, 1].map(|queue| frontend.start_queue(queue, 128));
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    if round(&mut frontend, &mut rings, &mut random, &gone).is_none() {
                        return;
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    let micros = begin.elapsed().as_micros() as u64;
                    worst.fetch_max(micros, Ordering::Relaxed);
                }
                let all = rounds.load(Ordering::Relaxed) * 2 * DEPTH as u64;
                for ring in &rings {
                    assert_eq!(frontend.stop_queue(ring), all as u16, "requests served");
                }
            }
        });
        let busy = Self {
            stop,
            gone,
            rounds,
            worst,
            thread,
        };
        busy.goes_on();
        busy
    }

    #[track_caller]
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        eventually("the load goes on", || {
            assert!(!self.thread.is_finished(), "the load has failed");
            self.rounds.load(Ordering::Relaxed) > before + 1
        });
    }

    /// Ends it in order; returns how many rounds it made.
    #[track_caller]
    fn finish(self) -> u64 {
        self.goes_on();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the load verifies all it reads");
        self.rounds.load(Ordering::Relaxed)
    }

    /// Its daemon is gone: it ends without its answers. What was answered must have been right.
    #[track_caller]
    fn abandon(self) {
        self.gone.store(true, Ordering::Relaxed);
        self.thread.join().expect("the load verifies all it reads");
    }
}

/// Writes at random places through both queues at once, and reads the same back through the other.
/// `None` if the daemon is gone.
fn round(
    frontend: &mut Frontend,
    rings: &mut [Ring; 2],
    random: &mut Random,
    gone: &AtomicBool,
) -> Option<()> {
    let mark = frontend.heap.mark();
    let places = DISK_SECTORS / SECTORS;
    let first = random.below(places);
    let place = |number: usize| (first + number as u64 * 31) % places * SECTORS;
    let data: Vec<_> = (0..2 * DEPTH)
        .map(|_| random.bytes(SECTORS as usize * SECTOR))
        .collect();
    let writes = (0..2 * DEPTH).map(|number| Request::write(place(number), &data[number]));
    for outcome in run(frontend, rings, writes.collect(), gone)? {
        assert_eq!((outcome.status, outcome.used_length), (blk::OK, 1));
    }
    // One further, so that what one queue wrote comes through the other.
    let number = |read: usize| (read + 1) % (2 * DEPTH);
    let bytes = SECTORS as usize * SECTOR;
    let reads = (0..2 * DEPTH).map(|read| Request::read(place(number(read)), bytes));
    let outcomes = run(frontend, rings, reads.collect(), gone)?;
    for (read, outcome) in outcomes.into_iter().enumerate() {
        let right = (blk::OK, bytes as u32 + 1);
        assert_eq!((outcome.status, outcome.used_length), right);
        assert!(
            outcome.data == data[number(read)],
            "sector {} is not what was written",
            place(number(read))
        );
    }
    frontend.heap.release(mark);
    Some(())
}

/// Sends all requests, in turn over both queues, and waits for all. `None` if the daemon is gone.
fn run(
    frontend: &mut Frontend,
    rings: &mut [Ring; 2],
    requests: Vec<Request>,
    gone: &AtomicBool,
) -> Option<Vec<blk::Outcome>> {
    let mut pending: Vec<(usize, Pending)> = Vec::new();
    for (number, request) in requests.iter().enumerate() {
        let queue = number % 2;
        pending.push((queue, frontend.submit(&mut rings[queue], request)));
    }
    let mut used = BTreeMap::new();
    for (queue, _) in &pending {
        let entry = next(&mut rings[*queue], gone)?;
        let again = used.insert((*queue, entry.head), entry);
        assert_eq!(again, None, "a request is completed once");
    }
    let outcomes = pending.iter().map(|(queue, pending)| {
        let entry = used[&(*queue, u32::from(pending.head))];
        frontend.outcome(pending, entry)
    });
    Some(outcomes.collect())
}

/// The next completion; `None` if the daemon is gone before it comes.
fn next(ring: &mut Ring, gone: &AtomicBool) -> Option<Used> {
    let end = Instant::now() + LIMIT;
    loop {
        let used = ring.wait(Duration::from_millis(50));
        if used.is_some() || gone.load(Ordering::Relaxed) {
            return used;
        }
        assert!(
            Instant::now() < end,
            "queue {}: a request is lost ({} in flight, available index {}, used index {})",
            ring.queue,
            ring.in_flight(),
            ring.available_index(),
            ring.used_index()
        );
    }
}
