//! QMP: the protocol by which the daemon is controlled, as QEMU has it.
//!
//! [`json`] reads a stream of values, [`session`] is one conversation, [`monitor`] the thread that holds
//! it, [`event`] what clients are told unasked; [`command`] has every command with its types
//! ([`crate::qapi`]), and the other files are commands by subject.
//!
//! Threads: a [`Service`] belongs to the control thread. Each monitor has a thread of its own, which
//! posts what a command asks for and is posted what it came to: the control thread waits for none.

pub mod basic;
pub mod bitmaps;
pub mod command;
pub mod debug;
pub mod devices;
pub mod event;
pub mod exports;
pub mod info;
pub mod jobs;
pub mod json;
pub mod keys;
pub mod monitor;
pub mod nbd;
pub mod nodes;
pub mod objects;
pub mod query;
pub mod session;
pub mod snapshots;
mod writer;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use blockcore::graph::{Control, Graph};
use serde_json::Value;

use self::command::Commands;
use self::event::{BlockExportDeleted, Event, Limiter, Verdict};
use self::monitor::Monitor;
use self::objects::Objects;
use crate::chardev::{Chardev, ChardevBackend};
use crate::daemon::{ControlHandle, Daemon, DaemonEvent};
use crate::qapi::QmpError;
use crate::qapi_enum;
use crate::qapi_struct;

qapi_enum! {
    /// How a monitor talks.
    pub enum MonitorMode {
        /// To people, which we cannot.
        Readline = "readline",
        /// To programs.
        Control = "control",
    }
}

qapi_struct! {
    /// What `--monitor` says.
    pub struct MonitorOptions {
        /// Nothing has this name here; taken as QEMU takes it.
        id: Option<String> = "id",
        /// How it talks.
        mode: Option<MonitorMode> = "mode",
        /// Whether what it says is laid out for people.
        pretty: Option<bool> = "pretty",
        /// The character device.
        chardev: String = "chardev",
    }
}

/// See the module's header.
pub struct Service {
    daemon: Weak<Daemon>,
    control: Control,
    handle: ControlHandle,
    commands: Arc<Commands>,
    chardevs: RefCell<BTreeMap<String, Rc<Chardev>>>,
    monitors: RefCell<Vec<Monitor>>,
    objects: Objects,
    limiter: RefCell<Limiter>,
}

impl Service {
    /// A service of `daemon`, without monitors.
    pub fn new(daemon: &Rc<Daemon>) -> Rc<Self> {
        let control = daemon.control().clone();
        let drivers = control.read(|graph| graph.driver_types().to_vec());
        let mut commands = Commands::new(drivers);
        basic::add(&mut commands);
        nodes::add(&mut commands);
        query::add(&mut commands);
        exports::add(&mut commands);
        nbd::add(&mut commands);
        objects::add(&mut commands);
        devices::add(&mut commands);
        debug::add(&mut commands);
        jobs::add(&mut commands);
        bitmaps::add(&mut commands);
        snapshots::add(&mut commands);
        let service = Rc::new(Self {
            daemon: Rc::downgrade(daemon),
            objects: Objects::new(daemon),
            control,
            handle: daemon.handle(),
            commands: Arc::new(commands),
            chardevs: RefCell::default(),
            monitors: RefCell::default(),
            limiter: RefCell::default(),
        });
        let listener = Rc::downgrade(&service);
        daemon.jobs().listen(move |event| {
            if let Some(service) = listener.upgrade() {
                service.emit(&Event::of_job(event));
            }
        });
        let listener = Rc::downgrade(&service);
        daemon.listen(move |event| {
            if let Some(service) = listener.upgrade() {
                service.heard(event);
            }
        });
        service
    }

    /// Something has happened.
    fn heard(self: &Rc<Self>, event: &DaemonEvent<'_>) {
        match event {
            DaemonEvent::Node(notice) => {
                if let Some(event) = Event::of_node(notice) {
                    self.emit(&event);
                }
            }
            DaemonEvent::Request(notice) => {
                let node = self.node_of(&notice.export);
                if let Some(event) = Event::of_request(notice, node) {
                    self.emit(&event);
                }
            }
            DaemonEvent::ExportDeleted(id) => {
                let id = (*id).to_owned();
                self.emit(&Event::BlockExportDeleted(BlockExportDeleted { id }));
            }
        }
    }

    /// The node that an export offers.
    pub(super) fn node_of(&self, export: &str) -> Option<String> {
        let export = self.daemon.upgrade()?.export(export)?;
        let node = self.control.node_of(export.root())?;
        let name = |graph: &Graph| Some(graph.node_by_id(node)?.name().to_owned());
        self.control.read(name)
    }

    /// The daemon.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn daemon(&self) -> Result<Rc<Daemon>, QmpError> {
        let gone = || QmpError::generic("the daemon is stopping");
        self.daemon.upgrade().ok_or_else(gone)
    }

    /// The graph's control.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Every command.
    pub fn commands(&self) -> &Arc<Commands> {
        &self.commands
    }

    /// The objects that were made.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Makes a character device.
    ///
    /// # Errors
    ///
    /// There is one of that name; else as [`Chardev::new`].
    pub fn add_chardev(&self, id: &str, backend: &ChardevBackend) -> Result<Rc<Chardev>, QmpError> {
        if self.chardevs.borrow().contains_key(id) {
            let sentence = format!("Chardev with id '{id}' already exists");
            return Err(QmpError::generic(sentence));
        }
        let chardev = Rc::new(Chardev::new(id, backend)?);
        let mut chardevs = self.chardevs.borrow_mut();
        chardevs.insert(id.to_owned(), Rc::clone(&chardev));
        Ok(chardev)
    }

    /// Starts a monitor.
    ///
    /// # Errors
    ///
    /// There is no such character device, or it is in use; the host's refusal of a thread.
    pub fn add_monitor(&self, options: &MonitorOptions) -> Result<(), QmpError> {
        if options.mode == Some(MonitorMode::Readline) {
            return Err(QmpError::generic("Only QMP is supported"));
        }
        let id = &options.chardev;
        let chardev = self.chardevs.borrow().get(id).cloned();
        let chardev =
            chardev.ok_or_else(|| QmpError::generic(format!("chardev \"{id}\" not found")))?;
        let taken = chardev.take();
        let (source, connected) =
            taken.ok_or_else(|| QmpError::generic(format!("chardev '{id}' is already in use")))?;
        let monitor = Monitor::start(
            source,
            connected,
            options.pretty.unwrap_or(false),
            Arc::clone(&self.commands),
            self.handle.clone(),
        )?;
        self.monitors.borrow_mut().push(monitor);
        Ok(())
    }

    /// Tells all monitors' clients of something that happens now.
    pub fn emit(self: &Rc<Self>, event: &Event) {
        let now = self.control.context().engine().now();
        let message = event.message(since_1970());
        let verdict = self.limiter.borrow_mut().judge(event, &message, now);
        match verdict {
            Verdict::Send => self.send(message),
            Verdict::Wait(None) => {}
            Verdict::Wait(Some(due)) => {
                let service = Rc::clone(self);
                self.control.context().spawn(async move {
                    let context = Rc::clone(service.control.context());
                    context.delay(due.saturating_sub(now)).await;
                    let now = context.engine().now();
                    let due = service.limiter.borrow_mut().due(now.max(due));
                    due.into_iter().for_each(|message| service.send(message));
                });
            }
        }
    }

    fn send(&self, message: Value) {
        let message = Arc::new(message);
        for monitor in self.monitors.borrow().iter() {
            monitor.inbox().tell(&message);
        }
    }

    /// Ends all monitors, after what they have to say; one whose client does not read is given a second.
    pub fn stop(&self) {
        let monitors = self.monitors.take();
        for monitor in &monitors {
            monitor.inbox().stop();
        }
        monitors.into_iter().for_each(Monitor::join);
        self.chardevs.take();
    }
}

/// The time of day, for people who read events.
fn since_1970() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
