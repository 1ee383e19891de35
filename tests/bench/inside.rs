//! One worker and two, in this process: what a second one adds.
//!
//! Each worker is a thread with a context of its own that keeps requests in flight through a root, and waits
//! for nothing else: no client, no virtqueue, no notification. The disk is in the page cache and an image's
//! clusters are all there, so that the workers share what the graph and the format share, and no more.

use std::error::Error;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockcore::driver::WriteFlags;
use blockcore::engine::{EngineChoice, Event, make};
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, Request, RequestKind, Root};
use blockcore::options::Options;
use blockcore::{ErrorKind, IoError};
use harness::peer::Format;
use harness::random::Random;

use crate::Arguments;
use crate::cell::Spread;
use crate::disk::Disk;
use crate::row::{BLOCK_BYTES, Operation};

/// Requests in flight on each worker.
const DEPTH: usize = 32;

/// How long a root takes to come to a worker, at most.
const PATIENCE: Duration = Duration::from_secs(10);

/// Measures and prints, one line for each operation.
pub(crate) fn run(format: Format, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let mut disk = Disk::create(&arguments.file, arguments.mebibytes << 20)?;
    if format == Format::Qcow2 {
        disk.make_image()?;
    }
    let seconds = Duration::from_secs_f64(arguments.seconds);
    println!(
        "{format}, {} MiB, qd{DEPTH}, cached, in process",
        arguments.mebibytes
    );
    for operation in [Operation::Read, Operation::Write] {
        let mut rounds: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
        for _ in 0..arguments.rounds {
            for (index, rates) in rounds.iter_mut().enumerate() {
                let file = disk.file(format);
                rates.push(measure(file, format, operation, index + 1, seconds)?);
                disk.settle()?;
            }
        }
        let pairs = rounds[0].iter().zip(&rounds[1]);
        let ratio = Spread::of(pairs.map(|(one, two)| two / one).collect());
        let [one, two] = rounds.map(Spread::of);
        println!(
            "{operation:?}: one worker {:.0} kIOPS ({:.0}-{:.0}), two {:.0} ({:.0}-{:.0}); {:.2} times \
             ({:.2}-{:.2})",
            one.median / 1e3,
            one.least / 1e3,
            one.most / 1e3,
            two.median / 1e3,
            two.least / 1e3,
            two.most / 1e3,
            ratio.median,
            ratio.least,
            ratio.most,
        );
    }
    Ok(())
}

/// Requests per second of all workers together.
fn measure(
    file: &Path,
    format: Format,
    operation: Operation,
    workers: usize,
    seconds: Duration,
) -> Result<f64, Box<dyn Error>> {
    let context = IoContext::new(make(EngineChoice::Auto)?);
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
    let options = format!(
        "driver={format},node-name=disk,file.driver=file,file.filename={}",
        file.display()
    );
    let options = Options::parse(&options, None)?;
    let opener = control.clone();
    let root = context.block_on(async move {
        opener.add(options).await?;
        let spec = RootSpec::writer("a bench").in_units_of(512);
        let root = opener.add_root("disk", spec).await?;
        warm_up(opener.root_here(root)?, operation).await?;
        Ok::<_, blockcore::Error>(root)
    })?;
    let stop = AtomicBool::new(false);
    let counts = std::thread::scope(|scope| -> Result<u64, Box<dyn Error>> {
        let (handles, ready) = mpsc::channel();
        let threads: Vec<_> = (0..workers)
            .map(|index| {
                let (handles, stop) = (handles.clone(), &stop);
                scope.spawn(move || {
                    let engine = make(EngineChoice::Auto).expect("the control thread has one");
                    let context = IoContext::new(engine);
                    let _ = handles.send(context.handle().clone());
                    drop(handles);
                    let began = Instant::now();
                    let root = loop {
                        context.turn(&mut Vec::new());
                        if let Some(root) = context.root(root) {
                            break root;
                        }
                        assert!(began.elapsed() < PATIENCE, "the root does not come");
                        std::thread::yield_now();
                    };
                    Worker::new(root, operation, index as u64 + 1).run(stop)
                })
            })
            .collect();
        drop(handles);
        for handle in ready {
            let attacher = control.clone();
            context.block_on(async move { attacher.attach(root, &handle).await })?;
        }
        std::thread::sleep(seconds);
        stop.store(true, Ordering::Relaxed);
        let counted = threads
            .into_iter()
            .map(|thread| thread.join().expect("no worker panics"));
        Ok(counted.sum())
    })?;
    context.block_on(async move {
        // The workers are gone, with nothing in flight.
        control.remove_root(root).await?;
        control.remove("disk").await
    })?;
    Ok(counts as f64 / seconds.as_secs_f64())
}

/// Has everything in memory that requests need to know.
async fn warm_up(root: Rc<Root>, operation: Operation) -> Result<(), blockcore::Error> {
    let failed = |error: IoError| blockcore::Error::new(ErrorKind::Io, error.to_string());
    for offset in (0..root.bytes()).step_by(1 << 20) {
        let memory = Segments::allocate(BLOCK_BYTES, 4096);
        root.read(offset, memory.clone()).await.map_err(failed)?;
        if operation != Operation::Read {
            let written = root.write(offset, memory, WriteFlags::empty()).await;
            written.map_err(failed)?;
        }
    }
    root.flush().await.map_err(failed)
}

/// Keeps requests in flight.
struct Worker {
    root: Rc<Root>,
    operation: Operation,
    blocks: u64,
    random: Random,
    /// By token.
    in_flight: Vec<Option<Request>>,
}

impl Worker {
    fn new(root: Rc<Root>, operation: Operation, seed: u64) -> Self {
        Self {
            blocks: root.bytes() / BLOCK_BYTES as u64,
            root,
            operation,
            random: Random::new(seed),
            in_flight: (0..DEPTH).map(|_| None).collect(),
        }
    }

    /// Until it is told to stop; returns how many requests have completed till then.
    fn run(mut self, stop: &AtomicBool) -> u64 {
        let context = Rc::clone(self.root.context());
        for token in 0..DEPTH {
            self.start(token, Segments::allocate(BLOCK_BYTES, 4096));
        }
        let (mut completed, mut events, mut left) = (0, Vec::new(), DEPTH);
        while left > 0 {
            context.turn(&mut events);
            for event in events.drain(..) {
                let Event::Done {
                    token,
                    result,
                    segments,
                } = event
                else {
                    continue;
                };
                assert_eq!(result, Ok(BLOCK_BYTES as u64), "a request failed");
                self.in_flight[token as usize] = None;
                if stop.load(Ordering::Relaxed) {
                    left -= 1;
                    continue;
                }
                completed += 1;
                self.start(token as usize, segments);
            }
        }
        drop(self);
        context.abandon();
        completed
    }

    fn start(&mut self, token: usize, segments: Segments) {
        let offset = self.random.below(self.blocks) * BLOCK_BYTES as u64;
        let kind = match self.operation {
            Operation::Read => RequestKind::Read,
            Operation::Write | Operation::First => RequestKind::Write,
        };
        let request = self.root.try_enter(kind, offset, BLOCK_BYTES as u64);
        let request = request.expect("nobody holds the root");
        let started = match self.operation {
            Operation::Read => request.start_read(offset, segments, token as u64),
            Operation::Write | Operation::First => {
                request.start_write(offset, segments, token as u64)
            }
        };
        assert!(
            started.is_ok(),
            "a layer needs a task for what is cached and in place"
        );
        self.in_flight[token] = Some(request);
    }
}
