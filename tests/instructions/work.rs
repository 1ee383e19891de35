//! What is counted: requests one after the other, with the graph in between or without it.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockcore::engine::{
    self, Engine, EngineChoice, Errno, Event, FileId, HostCall, HostReply, Notify, Op, OpenFile,
    WatchId,
};
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, RequestKind, Root};
use blockcore::mailbox::Sleeper;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use clap::ValueEnum;
use futures_util::future::LocalBoxFuture;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Operation {
    Read,
    Write,
}

/// The way that requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// Straight to the engine.
    Direct,
    /// Through a root: it enters, is mapped, started, completed and ends.
    Graph,
    /// As `graph`, on a qcow2 image whose clusters are all there and whose tables are in memory.
    Qcow2,
    /// As `graph`, each in a turn of its own of the worker's context: as when it is alone.
    Turn,
}

/// One request, in bytes.
const REQUEST_BYTES: u64 = 4096;
/// The length of the disk, in bytes.
const DISK_BYTES: u64 = 1 << 20;

/// Makes `requests` requests; returns how many allocations they made together.
pub(crate) fn run(
    way: Way,
    operation: Operation,
    requests: u64,
) -> Result<u64, Box<dyn std::error::Error>> {
    let file = tempfile::NamedTempFile::new()?;
    file.as_file().set_len(DISK_BYTES)?;
    let engine = Rc::new(AtOnce::new()?);
    let context = IoContext::new(Rc::clone(&engine) as Rc<dyn Engine>);
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
    let path = file.path().display();
    let format = match way {
        Way::Qcow2 => "qcow2",
        _ => "raw",
    };
    if way == Way::Qcow2 {
        let image = format!("file.filename={path}.qcow2,size={DISK_BYTES},preallocation=metadata");
        let image = Options::parse(&image, None)?;
        context.block_on(formats::qcow2::create::create(Rc::clone(&context), image))?;
        std::fs::rename(format!("{path}.qcow2"), file.path())?;
    }
    let options = format!("driver={format},node-name=disk,file.driver=file,file.filename={path}");
    let options = Options::parse(&options, None)?;
    let opener = control.clone();
    let opened = context.block_on(async move {
        opener.add(options).await?;
        let spec = RootSpec::writer("a guest").in_units_of(512);
        let root = opener.add_root("disk", spec).await?;
        let root = opener.root_here(root)?;
        // What a layer has to know is in memory then.
        let memory = Segments::allocate(REQUEST_BYTES as usize, 4096);
        let read = root.read(0, memory).await;
        read.map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
        Ok::<_, Error>(root)
    });
    let root = opened?;

    let mut load = Load {
        operation,
        memory: Segments::allocate(REQUEST_BYTES as usize, 4096),
        events: Vec::new(),
    };
    engine.answers_at_once.set(true);
    let mut work: Box<dyn FnMut(u64)> = match way {
        Way::Direct => {
            let file = engine.last_attached.get().expect("the disk's file");
            // As the graph has it: not known to be this one.
            let engine: Rc<dyn Engine> = black_box(engine);
            Box::new(move |number| load.straight(&*engine, file, number))
        }
        Way::Graph | Way::Qcow2 => Box::new(move |number| load.through(&root, number, false)),
        Way::Turn => Box::new(move |number| load.through(&root, number, true)),
    };
    // Tables that grow to the size that they need have done so.
    work(0);
    let counted = allocation_counter::measure(|| (0..requests).for_each(&mut work));
    Ok(counted.count_total)
}

/// Requests of one kind, one after the other.
struct Load {
    operation: Operation,
    memory: Segments,
    events: Vec<Event>,
}

impl Load {
    #[inline(never)]
    fn straight(&mut self, engine: &dyn Engine, file: FileId, number: u64) {
        let offset = number * REQUEST_BYTES % DISK_BYTES;
        let segments = std::mem::take(&mut self.memory);
        let op = match self.operation {
            Operation::Read => Op::Read {
                file,
                offset,
                segments,
            },
            Operation::Write => Op::Write {
                file,
                offset,
                segments,
            },
        };
        engine.start(op, Notify::Token(number));
        engine.poll(&mut self.events);
        self.complete(number);
    }

    #[inline(never)]
    fn through(&mut self, root: &Rc<Root>, number: u64, turn: bool) {
        let offset = number * REQUEST_BYTES % DISK_BYTES;
        let segments = std::mem::take(&mut self.memory);
        let kind = match self.operation {
            Operation::Read => RequestKind::Read,
            Operation::Write => RequestKind::Write,
        };
        let request = root.try_enter(kind, offset, REQUEST_BYTES);
        let request = request.expect("nobody holds the root");
        let started = match self.operation {
            Operation::Read => request.start_read(offset, segments, number),
            Operation::Write => request.start_write(offset, segments, number),
        };
        assert!(started.is_ok(), "no layer needs a task");
        let context = root.context();
        if turn {
            context.turn(&mut self.events);
        } else {
            context.engine().poll(&mut self.events);
        }
        self.complete(number);
        drop(black_box(request));
    }

    fn complete(&mut self, number: u64) {
        let Some(Event::Done {
            token,
            result,
            segments,
        }) = self.events.pop()
        else {
            panic!("a request was not answered at once");
        };
        assert!(token == number && result == Ok(REQUEST_BYTES));
        self.memory = segments;
    }
}

/// An engine that answers operations for its caller without doing them. What a host or a real engine does
/// meanwhile depends on time, and is the same on both ways. Opening goes to a real engine.
struct AtOnce {
    below: Rc<dyn Engine>,
    answers_at_once: Cell<bool>,
    last_attached: Cell<Option<FileId>>,
    done: RefCell<Vec<Event>>,
}

impl AtOnce {
    fn new() -> Result<Self, Error> {
        Ok(Self {
            below: engine::make(EngineChoice::Threads)?,
            answers_at_once: Cell::new(false),
            last_attached: Cell::new(None),
            done: RefCell::default(),
        })
    }
}

impl Engine for AtOnce {
    fn attach(&self, file: &Arc<OpenFile>) {
        self.last_attached.set(Some(file.id()));
        self.below.attach(file);
    }

    fn detach(&self, file: FileId) {
        self.below.detach(file);
    }

    fn start(&self, op: Op, notify: Notify) {
        if !self.answers_at_once.get() {
            return self.below.start(op, notify);
        }
        let (Op::Read { segments, .. } | Op::Write { segments, .. }, Notify::Token(token)) =
            (op, notify)
        else {
            panic!("only reads and writes without a task are counted");
        };
        self.done.borrow_mut().push(Event::Done {
            token,
            result: Ok(segments.bytes()),
            segments,
        });
    }

    fn host(&self, call: HostCall) -> LocalBoxFuture<'static, Result<HostReply, Errno>> {
        self.below.host(call)
    }

    fn offload(&self, work: engine::Work) {
        self.below.offload(work);
    }

    fn watch(&self, fd: Arc<OwnedFd>) -> WatchId {
        self.below.watch(fd)
    }

    fn unwatch(&self, watch: WatchId) {
        self.below.unwatch(watch);
    }

    fn poll(&self, events: &mut Vec<Event>) {
        if self.answers_at_once.get() {
            events.append(&mut self.done.borrow_mut());
            return;
        }
        self.below.poll(events);
    }

    fn wait(&self, events: &mut Vec<Event>, timeout: Option<Duration>) {
        self.below.wait(events, timeout);
    }

    fn in_flight(&self) -> usize {
        self.below.in_flight()
    }

    fn now(&self) -> Duration {
        // The kernel's own code for this cannot be run under valgrind, and nothing here waits.
        Duration::ZERO
    }

    fn sleeper(&self) -> &Arc<Sleeper> {
        self.below.sleeper()
    }

    fn name(&self) -> &'static str {
        "at-once"
    }
}
