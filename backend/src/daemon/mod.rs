//! The daemon: owns graph, exports and workers, and stops them in order.
//!
//! Threads: a [`Daemon`] lives on the control thread, whose loop is [`Daemon::run`]. Connection
//! threads reach it through a [`ControlHandle`] and wait for its answer; it asks workers by message
//! and goes on with other things until they answer. So it always answers, and nobody waits upwards.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use blockcore::driver::DriverType;
use blockcore::engine::{self, Event, WatchId};
use blockcore::graph::{Control, ExportState, Graph, RootUser};
use blockcore::io::IoContext;
use blockcore::mailbox::Mailbox;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};

use crate::config::{ExportConfig, ProcessConfig};
use crate::export::{Export, RootSide, WorkerHandle};
use crate::signals::Signals;
use crate::vhost_user::listener::{Server, Socket};
use crate::vhost_user::session::BackendChannel;
use crate::worker::{Command, DeviceId, HeldRequest, HoldEvent, Notice, Worker};

/// How often the end of a connection thread is looked for while stopping.
const STOP_LOOK: Duration = Duration::from_millis(2);

/// What follows a socket's path in that of its export's state file.
const STATE_SUFFIX: &str = ".state";

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

    fn post(&self, call: Call) {
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

struct ExportEntry {
    export: Rc<Export>,
    server: Server,
    channel: Option<BackendChannel>,
}

/// Tells an export's front-end what happens to its node.
struct ExportUser {
    id: String,
    handle: ControlHandle,
}

impl RootUser for ExportUser {
    fn resized(&self, _bytes: u64) {
        let id = self.id.clone();
        self.handle
            .post(Box::new(move |daemon| daemon.config_changed(&id)));
    }
}

struct WorkerThread {
    handle: WorkerHandle,
    thread: JoinHandle<()>,
}

/// See the module's header.
pub struct Daemon {
    process: ProcessConfig,
    control: Control,
    calls: Arc<Mailbox<Call>>,
    /// What workers have to say of held requests.
    notices: Arc<Mailbox<Notice>>,
    /// No call is taken any more.
    ended: Arc<AtomicBool>,
    workers: RefCell<Vec<WorkerThread>>,
    exports: RefCell<BTreeMap<String, ExportEntry>>,
    next_device: Cell<u32>,
    next_worker: Cell<usize>,
    quitting: Cell<bool>,
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
            control,
            calls,
            notices,
            ended: Arc::default(),
            workers: RefCell::default(),
            exports: RefCell::default(),
            next_device: Cell::new(0),
            next_worker: Cell::new(0),
            quitting: Cell::new(false),
        }))
    }

    /// The way to this daemon for other threads.
    pub fn handle(&self) -> ControlHandle {
        ControlHandle {
            calls: Arc::clone(&self.calls),
            ended: Arc::clone(&self.ended),
        }
    }

    /// The graph's control.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The export called `id`.
    pub fn export(&self, id: &str) -> Option<Rc<Export>> {
        let exports = self.exports.borrow();
        exports.get(id).map(|entry| Rc::clone(&entry.export))
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers.borrow().len()
    }

    /// The name of the engine that is used.
    pub fn engine_name(&self) -> &'static str {
        self.control.context().engine().name()
    }

    /// Runs something on the control thread before [`run`](Self::run) does.
    pub fn block_on<T: 'static>(&self, work: impl Future<Output = T> + 'static) -> T {
        self.control.context().block_on(work)
    }

    /// Opens a node, as `--blockdev` describes it.
    ///
    /// # Errors
    ///
    /// What is wrong with the description or could not be opened; nothing is left open.
    pub fn add_node(self: &Rc<Self>, options: Options) -> Result<(), Error> {
        let daemon = Rc::clone(self);
        self.block_on(async move { daemon.control.add(options).await.map(drop) })
    }

    /// Starts workers for exports with up to so many queues, unless there are workers.
    ///
    /// # Errors
    ///
    /// The host's refusal of a thread or an engine.
    pub fn start_workers(&self, queues: u16) -> Result<(), Error> {
        let mut workers = self.workers.borrow_mut();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let default = usize::from(queues).min(cores);
        let wanted = self.process.workers.unwrap_or(default).max(1);
        while workers.len() < wanted {
            let number = workers.len();
            workers.push(start_worker(number, &self.process)?);
        }
        Ok(())
    }

    /// Offers a node to front-ends.
    ///
    /// # Errors
    ///
    /// What is wrong with the export, its node or its socket; nothing is left of it.
    pub fn add_export(&self, mut config: ExportConfig) -> Result<(), Error> {
        let id = config.id.clone();
        if self.exports.borrow().contains_key(&id) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("there is an export '{id}' already"),
            ));
        }
        if let Some(other) = self.listens_at(&config.socket) {
            return Err(Error::busy(format!(
                "socket '{}' is in use: export '{other}' listens there",
                config.socket.display()
            )));
        }
        self.start_workers(config.queues)?;
        let queues = usize::from(config.queues);
        let device = DeviceId(self.next_device.replace(self.next_device.get() + 1));
        let first = self.next_worker.replace(self.next_worker.get() + queues);
        let workers = self.workers.borrow();
        let workers: Vec<_> = workers.iter().map(|worker| worker.handle.clone()).collect();
        let path = config.socket.clone();
        let user: Rc<dyn RootUser> = Rc::new(ExportUser {
            id: id.clone(),
            handle: self.handle(),
        });
        let (control, notices) = (self.control.clone(), Arc::clone(&self.notices));
        let discard = self.process.discard_state;
        let export = self.block_on(async move {
            let mut state_path = config.socket.clone().into_os_string();
            state_path.push(STATE_SUFFIX);
            let state =
                ExportState::open(&control, Path::new(&state_path), &config.id, discard).await?;
            config.node = control.recorded_node(&state, &config.node).await?;
            let root = RootSide {
                user: Some(user),
                state: Some(state),
            };
            Export::new(config, device, &control, workers, first, root, notices).await
        })?;
        let server =
            Socket::bind(&path).and_then(|socket| Server::start(socket, &id, self.handle()));
        let server = match server {
            Ok(server) => server,
            Err(error) => {
                self.block_on(async move { export.close().await })?;
                return Err(error);
            }
        };
        self.exports.borrow_mut().insert(
            id,
            ExportEntry {
                export,
                server,
                channel: None,
            },
        );
        Ok(())
    }

    /// Serves until a signal or [`ControlHandle::quit`], then stops in order: connections, workers,
    /// a flush of every node, nodes.
    ///
    /// # Errors
    ///
    /// What could not be made durable or closed.
    pub fn run(self: &Rc<Self>, signals: Option<&Signals>) -> Result<(), Error> {
        let engine = self.control.context().engine();
        let watches = signals.map(|signals| signals.watch(engine));
        while !self.quitting.get() {
            self.turn(None, |daemon, watch| {
                if let (Some(signals), Some(watches)) = (signals, &watches) {
                    daemon.signalled(signals, watches, watch);
                }
            });
        }
        self.stop()
    }

    /// The export that listens at a path.
    fn listens_at(&self, path: &Path) -> Option<String> {
        let exports = self.exports.borrow();
        let mut exports = exports.iter();
        let found = exports.find(|(_, entry)| entry.export.config().socket == path);
        found.map(|(id, _)| id.clone())
    }

    fn config_changed(&self, id: &str) {
        let exports = self.exports.borrow();
        if let Some(channel) = exports.get(id).and_then(|entry| entry.channel.as_ref()) {
            channel.config_changed();
        }
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

    fn turn(self: &Rc<Self>, limit: Option<Duration>, mut ready: impl FnMut(&Rc<Self>, WatchId)) {
        let context = self.control.context();
        let (mut calls, mut events) = (Vec::new(), Vec::new());
        self.calls.take(&mut calls);
        let mut busy = !calls.is_empty();
        for call in calls {
            call(self);
        }
        for notice in self.control.take_notices() {
            tell(&notice);
            busy = true;
        }
        let mut held = Vec::new();
        self.notices.take(&mut held);
        busy |= !held.is_empty();
        held.iter().for_each(say);
        busy |= context.turn(&mut events);
        if !busy && events.is_empty() {
            let (calls, notices) = (&self.calls, &self.notices);
            let control = &self.control;
            context.sleep(&mut events, limit, || {
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
        for entry in self.exports.borrow().values() {
            entry.server.stop();
        }
        let connected = |daemon: &Self| {
            let exports = daemon.exports.borrow();
            exports.values().any(|entry| !entry.server.is_finished())
        };
        // Connections that end ask the control thread to stop their queues.
        while connected(self) {
            self.turn(Some(STOP_LOOK), |_, _| {});
        }
        let mut outcome = Ok(());
        for (id, entry) in self.exports.take() {
            entry.server.join();
            outcome = outcome.and(self.flush(&id, &entry.export));
            let export = entry.export;
            outcome = outcome.and(self.block_on(async move { export.close().await }));
        }
        for worker in self.workers.borrow().iter() {
            worker.handle.commands.post(Command::Exit);
        }
        for worker in self.workers.take() {
            let _ = worker.thread.join();
        }
        let control = self.control.clone();
        outcome = outcome.and(self.block_on(async move { control.close_all().await }));
        self.ended.store(true, Ordering::SeqCst);
        // Orders the end before the last look; pairs with the fence in posting.
        fence(Ordering::SeqCst);
        self.handle().drop_calls();
        outcome
    }

    fn flush(&self, id: &str, export: &Rc<Export>) -> Result<(), Error> {
        if !export.config().writable {
            return Ok(());
        }
        let export = Rc::clone(export);
        let flushed = self.block_on(async move { export.flush().await });
        flushed.map_err(|error| {
            Error::new(
                ErrorKind::Io,
                format!("what export '{id}' wrote last may not be on the disk: {error}"),
            )
        })
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
        HoldEvent::GivenUp => tracing::warn!(
            %export, %operation, no_space, error = message,
            "a held request was completed with its failure, as its queue was stopped"
        ),
    }
}

#[expect(clippy::disallowed_methods, reason = "workers are real threads here")]
fn start_worker(number: usize, process: &ProcessConfig) -> Result<WorkerThread, Error> {
    let choice = process.engine;
    let max_poll = process.poll_max;
    let cpu = match process.cpus.len() {
        0 => None,
        cpus => Some(process.cpus[number % cpus]),
    };
    let (made, ready) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker {number}"))
        .spawn(move || {
            // The engine belongs to the thread that made it.
            let context = pin(cpu)
                .and_then(|()| engine::make(choice))
                .map(IoContext::new);
            let context = match context {
                Ok(context) => context,
                Err(error) => {
                    let _ = made.send(Err(error));
                    return;
                }
            };
            let commands = Mailbox::new(Arc::clone(context.engine().sleeper()));
            let _ = made.send(Ok(WorkerHandle {
                commands: Arc::clone(&commands),
                context: context.handle().clone(),
            }));
            Worker::new(Rc::clone(&context), commands).run(max_poll);
            context.abandon();
        })
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a worker: {error}")))?;
    let handle = ready
        .recv()
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "a worker ended at its start")))?;
    Ok(WorkerThread { handle, thread })
}

fn pin(cpu: Option<usize>) -> Result<(), Error> {
    let Some(cpu) = cpu else {
        return Ok(());
    };
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|errno| Error::host(format!("cannot pin a worker to core {cpu}"), errno))
}
