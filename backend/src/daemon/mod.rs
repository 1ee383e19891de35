//! The daemon: owns graph, exports and workers, and stops them in order.
//!
//! Threads: a [`Daemon`] lives on the control thread, whose loop is [`Daemon::run`]. Connection
//! threads reach it through a [`ControlHandle`] and wait for its answer; it asks workers by message
//! and goes on with other things until they answer. So it always answers, and nobody waits upwards.

mod exports;
mod nbd;
mod slow;
mod workers;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc;

use blockcore::Error;
use blockcore::driver::DriverType;
use blockcore::engine::{self, Event, WatchId};
use blockcore::graph::{Control, Graph};
use blockcore::io::IoContext;
use blockcore::job::Jobs;
use blockcore::mailbox::Mailbox;
use blockcore::options::Options;

use self::exports::ExportEntry;
pub use self::exports::{ExportView, Removal};
use self::workers::WorkerThread;
use crate::config::{ProcessConfig, SocketAddress};
use crate::export::Export;
use crate::nbd::{NbdExport, NbdServer};
use crate::qmp::Service;
use crate::signals::Signals;
use crate::vhost_user::session::BackendChannel;
use crate::worker::{HeldRequest, HoldEvent, Notice};

/// Something for the control thread to do.
type Call = Box<dyn FnOnce(&Rc<Daemon>) + Send>;

/// The way to the control thread from any other.
#[derive(Clone)]
pub struct ControlHandle {
    calls: Arc<Mailbox<Call>>,
    ended: Arc<AtomicBool>,
}

impl ControlHandle {
    /// Runs `work` on the control thread and waits for its result; `None` if the daemon is gone.
    /// Never call this on the control thread or a worker: they would wait for themselves.
    pub fn call<T, F, W>(&self, work: F) -> Option<T>
    where
        T: Send + 'static,
        F: FnOnce(Rc<Daemon>) -> W + Send + 'static,
        W: Future<Output = T> + 'static,
    {
        let (reply, answer) = mpsc::sync_channel(1);
        self.post(Box::new(move |daemon| {
            let result = work(Rc::clone(daemon));
            daemon.control.context().spawn(async move {
                // Nobody waits any more if the caller's thread is gone.
                let _ = reply.send(result.await);
            });
        }));
        answer.recv().ok()
    }

    /// Looks at an export; `None` if there is no such export.
    pub fn export<T: Send + 'static>(
        &self,
        id: &str,
        look: impl FnOnce(&Export) -> T + Send + 'static,
    ) -> Option<T> {
        self.queue(id, move |export| async move { look(&export) })
    }

    /// Changes an export's queues; `None` if there is no such export.
    pub fn queue<T, F, W>(&self, id: &str, change: F) -> Option<T>
    where
        T: Send + 'static,
        F: FnOnce(Rc<Export>) -> W + Send + 'static,
        W: Future<Output = T> + 'static,
    {
        let id = id.to_owned();
        self.call(move |daemon| async move {
            let export = daemon.export(&id)?;
            Some(change(export).await)
        })
        .flatten()
    }

    /// Tries an export's held requests again; `None` if there is no such export.
    pub fn resume(&self, id: &str) -> Option<()> {
        self.queue(id, |export| async move { export.resume().await })
    }

    /// An export's held requests; `None` if there is no such export.
    pub fn held(&self, id: &str) -> Option<Vec<HeldRequest>> {
        self.queue(id, |export| async move { export.held().await })
    }

    /// Sets the way to tell an export's front-end of changes.
    pub(crate) fn set_backend_channel(&self, id: &str, channel: Option<BackendChannel>) {
        let id = id.to_owned();
        self.call(move |daemon| async move {
            if let Some(entry) = daemon.exports.borrow_mut().get_mut(&id) {
                entry.channel = channel;
            }
        });
    }

    /// Tells an export's front-end that the configuration has changed.
    pub fn config_changed(&self, id: &str) {
        let id = id.to_owned();
        self.call(move |daemon| async move { daemon.config_changed(&id) });
    }

    /// Asks the daemon to stop, without waiting for it.
    pub fn quit(&self) {
        self.post(Box::new(|daemon| daemon.quitting.set(true)));
    }

    /// Has `call` run on the control thread, without waiting for it.
    pub(crate) fn post(&self, call: Call) {
        self.calls.post(call);
        // Posting is ordered before this look, as the end is before the daemon's last look.
        if self.ended.load(Ordering::SeqCst) {
            self.drop_calls();
        }
    }

    /// Drops calls that nobody will take any more, so that who waits for their answers is told.
    fn drop_calls(&self) {
        self.calls.take(&mut Vec::new());
    }
}

/// See the module's header.
pub struct Daemon {
    process: ProcessConfig,
    control: Control,
    jobs: Jobs,
    calls: Arc<Mailbox<Call>>,
    /// What workers have to say of held requests.
    notices: Arc<Mailbox<Notice>>,
    /// No call is taken any more.
    ended: Arc<AtomicBool>,
    workers: RefCell<Vec<WorkerThread>>,
    /// Workers with names, for exports that ask for them.
    iothreads: RefCell<BTreeMap<String, WorkerThread>>,
    exports: RefCell<BTreeMap<String, ExportEntry>>,
    /// Where NBD clients connect, and what is offered to them, by its name in this process.
    nbd_server: RefCell<Option<Rc<NbdServer>>>,
    nbd_exports: RefCell<BTreeMap<String, Rc<NbdExport>>>,
    next_device: Cell<u32>,
    next_worker: Cell<usize>,
    quitting: Cell<bool>,
    service: OnceCell<Rc<Service>>,
    /// Names of exports on their way, with the sockets of those that have one of their own.
    reserved: RefCell<BTreeMap<String, Option<SocketAddress>>>,
    /// The first of an export's end.
    failure: RefCell<Option<Error>>,
    listeners: RefCell<Vec<Listener>>,
}

/// Who is told what happens.
type Listener = Rc<dyn Fn(&DaemonEvent<'_>)>;

/// What happens in a daemon.
pub enum DaemonEvent<'a> {
    /// To a node.
    Node(&'a blockcore::node::Notice),
    /// To a request that failed.
    Request(&'a Notice),
    /// The last of this export is gone.
    ExportDeleted(&'a str),
}

impl Daemon {
    /// A daemon without nodes, whose control thread is the caller's.
    ///
    /// # Errors
    ///
    /// The host's refusal of what the engine needs.
    pub fn new(
        process: ProcessConfig,
        drivers: Vec<&'static DriverType>,
    ) -> Result<Rc<Self>, Error> {
        let context = IoContext::new(engine::make(process.engine)?);
        let calls = Mailbox::new(Arc::clone(context.engine().sleeper()));
        let notices = Mailbox::new(Arc::clone(context.engine().sleeper()));
        let control = Control::new(Graph::new(drivers), context);
        control.set_runtime_directory(process.runtime_directory.clone());
        Ok(Rc::new(Self {
            process,
            jobs: Jobs::new(&control),
            control,
            calls,
            notices,
            ended: Arc::default(),
            workers: RefCell::default(),
            iothreads: RefCell::default(),
            exports: RefCell::default(),
            nbd_server: RefCell::default(),
            nbd_exports: RefCell::default(),
            next_device: Cell::new(0),
            next_worker: Cell::new(0),
            quitting: Cell::new(false),
            service: OnceCell::new(),
            reserved: RefCell::default(),
            failure: RefCell::default(),
            listeners: RefCell::default(),
        }))
    }

    /// The way to this daemon for other threads.
    pub fn handle(&self) -> ControlHandle {
        ControlHandle {
            calls: Arc::clone(&self.calls),
            ended: Arc::clone(&self.ended),
        }
    }

    /// What answers monitors: made when it is asked for first.
    pub fn service(self: &Rc<Self>) -> &Rc<Service> {
        self.service.get_or_init(|| Service::new(self))
    }

    /// Whether it has been asked to stop: nothing new is begun.
    pub(crate) fn is_quitting(&self) -> bool {
        self.quitting.get()
    }

    /// The graph's control.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The jobs on its nodes.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// The name of the engine that is used.
    pub fn engine_name(&self) -> &'static str {
        self.control.context().engine().name()
    }

    /// Does something on the control thread before [`run`](Self::run) does, and waits for it.
    pub fn block_on<T, W>(self: &Rc<Self>, work: impl FnOnce(Rc<Self>) -> W) -> T
    where
        T: 'static,
        W: Future<Output = T> + 'static,
    {
        self.control.context().block_on(work(Rc::clone(self)))
    }

    /// Opens a node, as `--blockdev` describes it.
    ///
    /// # Errors
    ///
    /// What is wrong with the description or could not be opened; nothing is left open.
    pub async fn add_node(&self, options: Options) -> Result<(), Error> {
        self.control.add(options).await.map(drop)
    }

    /// Has `listener` told what happens, on the control thread, from now on.
    pub fn listen(&self, listener: impl Fn(&DaemonEvent<'_>) + 'static) {
        self.listeners.borrow_mut().push(Rc::new(listener));
    }

    fn announce(&self, event: &DaemonEvent<'_>) {
        let listeners = self.listeners.borrow().clone();
        for listener in listeners {
            listener(event);
        }
    }

    /// Serves until a signal or [`ControlHandle::quit`], then stops in order: connections, jobs, workers,
    /// a flush of every node, nodes.
    ///
    /// # Errors
    ///
    /// What could not be made durable or closed.
    pub fn run(self: &Rc<Self>, signals: Option<&Signals>) -> Result<(), Error> {
        let engine = self.control.context().engine();
        let watches = signals.map(|signals| signals.watch(engine));
        if let Some(limit) = self.process.slow_request {
            let watching = slow::watch(Rc::downgrade(self), limit);
            self.control.context().spawn(watching);
        }
        while !self.quitting.get() {
            self.turn(|daemon, watch| {
                if let (Some(signals), Some(watches)) = (signals, &watches) {
                    daemon.signalled(signals, watches, watch);
                }
            });
        }
        self.stop()
    }

    fn signalled(&self, signals: &Signals, watches: &[WatchId; 2], watch: WatchId) {
        if watch == watches[0] && signals.stop_requested() {
            tracing::info!("asked to stop");
            self.quitting.set(true);
        }
        if watch == watches[1] {
            for entry in self.exports.borrow().values() {
                // Nobody may read it any more; that does not concern the guest.
                let _ = writeln!(std::io::stderr(), "{}", entry.export.stats_line());
            }
        }
    }

    fn turn(self: &Rc<Self>, mut ready: impl FnMut(&Rc<Self>, WatchId)) {
        let context = self.control.context();
        let (mut calls, mut events) = (Vec::new(), Vec::new());
        self.calls.take(&mut calls);
        let mut busy = !calls.is_empty();
        for call in calls {
            call(self);
        }
        for notice in self.control.take_notices() {
            tell(&notice);
            self.announce(&DaemonEvent::Node(&notice));
            busy = true;
        }
        let mut held = Vec::new();
        self.notices.take(&mut held);
        busy |= !held.is_empty();
        for notice in &held {
            say(notice);
            self.announce(&DaemonEvent::Request(notice));
        }
        busy |= context.turn(&mut events);
        if !busy && events.is_empty() {
            let (calls, notices) = (&self.calls, &self.notices);
            let control = &self.control;
            context.sleep(&mut events, None, || {
                calls.is_empty() && notices.is_empty() && !control.has_notices()
            });
        }
        for event in events {
            if let Event::Ready(watch) = event {
                ready(self, watch);
            }
        }
    }

    /// Ends everything; also what [`run`](Self::run) does last.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub fn stop(self: &Rc<Self>) -> Result<(), Error> {
        self.quitting.set(true);
        for view in self.exports().into_iter().filter(|view| !view.is_going) {
            let id = &view.export.config().id;
            let begun = self.remove_export(id, Removal::Hard);
            begun.expect("it is there, and nobody removes it");
        }
        // An export that is on its way when its server goes is dropped by whoever adds it.
        let _ = self.stop_nbd_server();
        let is_quiet = || {
            let none = self.exports.borrow().is_empty() && self.nbd_exports.borrow().is_empty();
            none && self.reserved.borrow().is_empty()
        };
        // Connections that end ask the control thread to stop their queues.
        while !is_quiet() {
            self.turn(|_, _| {});
        }
        self.block_on(|daemon| async move { daemon.jobs.cancel_all().await });
        self.stop_workers();
        let mut outcome = self.failure.take().map_or(Ok(()), Err);
        let closed = self.block_on(|daemon| async move { daemon.control.close_all().await });
        outcome = outcome.and(closed);
        self.ended.store(true, Ordering::SeqCst);
        // Orders the end before the last look; pairs with the fence in posting.
        fence(Ordering::SeqCst);
        self.handle().drop_calls();
        outcome
    }
}

/// Tells whoever reads the log what happens to a node.
fn tell(notice: &blockcore::node::Notice) {
    use blockcore::node::Notice;
    match notice {
        // By the name and the fields that QEMU's event has.
        Notice::Corrupt {
            node,
            message,
            offset,
            bytes,
            fatal,
        } => tracing::error!(
            %node, msg = message, offset, size = bytes, fatal,
            "BLOCK_IMAGE_CORRUPTED: an image contradicts its format"
        ),
        notice => tracing::info!(?notice, "a worker has something to say"),
    }
}

/// Tells whoever reads the log what happens to a request that failed.
fn say(notice: &Notice) {
    let Notice {
        export,
        event,
        operation,
        no_space,
        message,
    } = notice;
    match event {
        HoldEvent::Held => tracing::warn!(
            %export, %operation, no_space, error = message,
            "a request failed and is held until it is resumed"
        ),
        // The worker has said so.
        HoldEvent::Ignored | HoldEvent::Reported => {}
        HoldEvent::GivenUp => tracing::warn!(
            %export, %operation, no_space, error = message,
            "a held request was completed with its failure, as its queue was stopped"
        ),
    }
}
