//! Driver `pass-through`: a filter that does nothing, and notices when it is asked at the wrong time.
//!
//! It is asked with a node that was closed, or by a half that a reopen replaced; it is reopened a second
//! time without being told how the first ended; the last memory that was announced to it on a worker is
//! withdrawn under a request there, or memory that was not announced is. All of that is a mistake of the
//! core's, kept for [`take_misuse`].
//!
//! Threads: whatever is noticed is for the test on the same thread; simulations have one.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::{
    Driver, DriverIo, DriverType, Mapping, OpenRequest, Opened, ReopenRequest, Reopened, WriteFlags,
};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoContext, IoFuture, MemoryRange, Root};
use blockcore::options::{OptionKind, OptionSpec, Options};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

/// Driver `pass-through`, as registered.
pub static PASS_THROUGH: DriverType = DriverType {
    name: "pass-through",
    about: "a filter for tests",
    options: OPTIONS,
    open: |request| async move { Ok(open(&request)) }.boxed_local(),
    ..DriverType::FILTER
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "ask",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "see every request, instead of saying where its bytes lie",
    },
    OptionSpec {
        name: "refuse",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: false,
        help: "refuse to be reopened so",
    },
];

thread_local! {
    static MISUSE: RefCell<Option<String>> = const { RefCell::new(None) };
    static ANNOUNCED: Cell<u64> = const { Cell::new(0) };
}

/// The first mistake that a filter of this thread has noticed since the last call.
pub fn take_misuse() -> Option<String> {
    MISUSE.take()
}

fn misused(what: &str) {
    MISUSE.with_borrow_mut(|misuse| {
        misuse.get_or_insert_with(|| what.to_owned());
    });
}

struct PassDriver {
    io: Arc<PassIo>,
    /// The half from the next commit on.
    prepared: Option<Arc<PassIo>>,
}

#[derive(Default)]
struct PassIo {
    ask: bool,
    /// No request comes here any more.
    gone: AtomicBool,
    /// By worker: the address of its context.
    workers: Mutex<BTreeMap<usize, OnWorker>>,
}

/// What happens on one worker.
#[derive(Default)]
struct OnWorker {
    announced: Vec<MemoryRange>,
    in_flight: usize,
}

/// A request in flight.
struct Busy<'a> {
    half: &'a PassIo,
    worker: usize,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.half.on(self.worker, |on| on.in_flight -= 1);
    }
}

fn half(options: &Options) -> Arc<PassIo> {
    Arc::new(PassIo {
        ask: options.bool(OPTIONS, "ask"),
        ..PassIo::default()
    })
}

fn open(request: &OpenRequest) -> Opened {
    let io = half(&request.options);
    let driver = PassDriver {
        io: Arc::clone(&io),
        prepared: None,
    };
    Opened {
        driver: Box::new(driver),
        io,
    }
}

impl Driver for PassDriver {
    fn close(&mut self, _root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        self.io.gone.store(true, Ordering::Relaxed);
        async { Ok(()) }.boxed_local()
    }

    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            if self.prepared.is_some() {
                misused("a filter is reopened that was not told how its last reopen ended");
            }
            if request.options.bool(OPTIONS, "refuse") {
                return Err(Error::unsupported("this filter refuses to be reopened"));
            }
            let io = half(&request.options);
            self.prepared = Some(Arc::clone(&io));
            Ok(Reopened { io: Some(io) })
        }
        .boxed_local()
    }

    fn reopen_commit(&mut self) {
        let Some(io) = self.prepared.take() else {
            return misused("a reopen is committed that was not prepared");
        };
        let before = std::mem::replace(&mut self.io, io);
        before.gone.store(true, Ordering::Relaxed);
    }

    fn reopen_abort(&mut self) {
        self.prepared = None;
    }
}

/// How often memory was announced to a filter of this thread, since the last call.
pub fn take_announced() -> u64 {
    ANNOUNCED.take()
}

impl PassIo {
    fn on<T>(&self, worker: usize, look: impl FnOnce(&mut OnWorker) -> T) -> T {
        let mut workers = self.workers.lock().expect("no panic while looking");
        look(workers.entry(worker).or_default())
    }

    fn begin(&self, io: Io<'_>) -> Busy<'_> {
        let worker = std::ptr::from_ref(io.context()) as usize;
        self.on(worker, |on| on.in_flight += 1);
        Busy { half: self, worker }
    }

    fn look(&self, when: &str) {
        if self.gone.load(Ordering::Relaxed) {
            misused(&format!(
                "a request {when} in a filter that was closed or reopened"
            ));
        }
    }
}

impl DriverIo for PassIo {
    fn map(&self, _write: bool, offset: u64, _bytes: u64) -> Mapping {
        self.look("is mapped");
        match self.ask {
            true => Mapping::Ask,
            false => Mapping::Child { index: 0, offset },
        }
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::STABLE | WriteFlags::UNCHANGED
    }

    fn memory_announced(&self, context: &IoContext, memory: MemoryRange) {
        let worker = std::ptr::from_ref(context) as usize;
        self.on(worker, |on| on.announced.push(memory));
        ANNOUNCED.set(ANNOUNCED.get() + 1);
    }

    fn memory_withdrawn(&self, context: &IoContext, memory: MemoryRange) {
        let worker = std::ptr::from_ref(context) as usize;
        self.on(worker, |on| {
            let place = on.announced.iter().position(|known| *known == memory);
            match place {
                Some(place) => drop(on.announced.swap_remove(place)),
                None => misused("memory is withdrawn that was not announced"),
            }
            if on.announced.is_empty() && on.in_flight > 0 {
                misused("memory is withdrawn under a request");
            }
        });
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            let _busy = self.begin(io);
            self.look("begins");
            let result = io.child(0).read(offset, into).await;
            self.look("ends");
            result
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
            let _busy = self.begin(io);
            self.look("begins");
            let result = io.child(0).write(offset, from, flags).await;
            self.look("ends");
            result
        }
        .boxed_local()
    }
}
