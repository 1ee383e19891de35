//! Jobs: long operations on nodes, with states and verbs, while guests go on.
//!
//! A `Job` is what every kind has in common: its state, who has it held, how fast it may be, how far it
//! is, how it ended. What it does is a `Work`: `backup`, `commit`, `mirror` and `stream` are one
//! policy each; what they share of copying is in `copy`. A job is a task on the control thread, and
//! does its I/O through a root of its own, like any user of a disk.
//!
//! **Held and drained.** Somebody who has a job paused waits for nothing: the job sees to it by itself
//! that it has nothing in flight, and only then says that it is paused. A drained section holds the job's
//! requests where they enter, and the job need not know. A job that changes the graph has nothing of its
//! own in flight then, so a change never waits for itself.
//!
//! **Ending.** When the work is done the job *waits* for its peers (it has none yet), is *pending* until
//! its result may be a fact, and then prepares it: the last thing that may fail. Whatever
//! happened, `Work::clean` leaves the graph without the job.
//!
//! Threads: control thread only.

mod backup;
mod commit;
mod copy;
mod mirror;
mod registry;
pub mod state;
mod stream;

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use event_listener::{Event, EventListener};
use futures_util::future::LocalBoxFuture;

pub use self::backup::{BackupSpec, BackupSync};
pub use self::commit::CommitSpec;
pub use self::mirror::{MirrorSpec, MirrorSync};
pub use self::registry::Jobs;
use self::registry::Registry;
pub use self::state::{JobState, Verb};
pub use self::stream::StreamSpec;
use crate::graph::Control;
use crate::io::policy::{Action, IoStatus, OnError};
use crate::throttle::RateLimit;
use crate::{Error, ErrorKind, IoError};

/// What kind of job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Copies a disk as it was at one moment.
    Backup,
    /// Writes what overlays hold to an image below.
    Commit,
    /// Copies a disk, and goes on with what changes.
    Mirror,
    /// Writes into an overlay what images below hold.
    Stream,
}

impl JobKind {
    /// As operators know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Commit => "commit",
            Self::Mirror => "mirror",
            Self::Stream => "stream",
        }
    }
}

/// What all jobs are told when they are made.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// Its name, which no other job has.
    pub id: String,
    /// Bytes per second, at most; 0 for no limit.
    pub speed: u64,
    /// Whether its result becomes a fact without a word.
    pub auto_finalize: bool,
    /// Whether it is forgotten when it is over.
    pub auto_dismiss: bool,
}

/// What happens to a job, for whoever listens.
#[derive(Clone, Debug)]
pub enum JobEvent {
    /// It is in another state.
    StatusChange {
        /// Which job.
        id: String,
        /// The state.
        state: JobState,
    },
    /// Everything is copied, and it can be completed.
    Ready(JobView),
    /// It waits to be finalized.
    Pending(JobView),
    /// It is over.
    Completed(JobView),
    /// It is over, as it was told to give up.
    Cancelled(JobView),
    /// Something could not be read or written.
    Error {
        /// Which job.
        id: String,
        /// Whether it was to be read.
        is_read: bool,
        /// What becomes of it.
        action: Action,
    },
}

/// A job as it is at one moment.
#[derive(Clone, Debug)]
pub struct JobView {
    /// Its name.
    pub id: String,
    /// What kind.
    pub kind: JobKind,
    /// Its state.
    pub state: JobState,
    /// How much is done, in bytes.
    pub done: u64,
    /// How much there is to do, as far as is known, in bytes.
    pub total: u64,
    /// Bytes per second, at most; 0 for no limit.
    pub speed: u64,
    /// Whether it was stopped for a failure.
    pub io_status: IoStatus,
    /// Whether it has been told to hold still.
    pub is_paused: bool,
    /// Whether it works right now.
    pub is_busy: bool,
    /// See [`JobSpec::auto_finalize`].
    pub auto_finalize: bool,
    /// See [`JobSpec::auto_dismiss`].
    pub auto_dismiss: bool,
    /// Of a mirror: whether its target is the same as its source now, and stays so.
    pub actively_synced: Option<bool>,
    /// Why it failed.
    pub error: Option<String>,
}

/// How a job does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// It has been told to give up.
    Cancelled,
    /// It failed; in a sentence.
    Failed(String),
}

impl From<IoError> for Stopped {
    fn from(error: IoError) -> Self {
        Self::Failed(as_host_says(error).to_owned())
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error.report())
    }
}

/// What clients of QEMU know a failure by: what the host says of it.
fn as_host_says(error: IoError) -> &'static str {
    match error {
        IoError::NoSpace => "No space left on device",
        IoError::Unsupported => "Operation not supported",
        IoError::OutOfRange => "Invalid argument",
        IoError::ReadOnly => "Operation not permitted",
        IoError::Busy => "Device or resource busy",
        IoError::Failed | IoError::FlushLost => "Input/output error",
    }
}

/// What a job does. Each call is made once, in this order; those after [`run`](Self::run) have nothing of
/// the job's in flight.
pub(crate) trait Work {
    /// Does it.
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>>;

    /// Makes the result a fact: the last thing that may fail.
    fn prepare<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>>;

    /// Leaves nothing of the job in the graph.
    fn clean<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, ()>;

    /// Of a job that does not end by itself: whether it can be told to.
    fn can_complete(&self) -> bool {
        false
    }

    /// Whether its target is the same as its source now, and stays so, if that can be said of the kind.
    fn actively_synced(&self) -> Option<bool> {
        None
    }

    /// Has guests wait for the target from now on, or not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden.
    fn change_copy_mode(&self, write_blocking: bool) -> Result<(), Error> {
        let _ = write_blocking;
        Err(Error::unsupported("Job type does not support change"))
    }
}

/// How a job is told to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cancel {
    /// One that is ready ends well, and leaves everything where it is.
    Soft,
    /// At once.
    Forced,
}

/// See the module's header.
pub(crate) struct Job {
    spec: JobSpec,
    kind: JobKind,
    control: Control,
    registry: Weak<Registry>,
    work: RefCell<Option<Rc<dyn Work>>>,
    state: Cell<JobState>,
    /// An operator holds it, or it holds itself after a failure: one and the same.
    user_paused: Cell<bool>,
    cancel: Cell<Option<Cancel>>,
    complete: Cell<bool>,
    finalize: Cell<bool>,
    busy: Cell<bool>,
    done: Cell<u64>,
    total: Cell<u64>,
    limit: RefCell<RateLimit>,
    io_status: Cell<IoStatus>,
    /// Of a mirror that is over: whether the two were the same last.
    was_synced: Cell<Option<bool>>,
    error: RefCell<Option<String>>,
    /// Something was asked of it, or it has another state.
    changed: Event,
}

impl Job {
    fn new(spec: JobSpec, kind: JobKind, control: &Control, registry: &Rc<Registry>) -> Rc<Self> {
        Rc::new(Self {
            limit: RefCell::new(RateLimit::new(spec.speed)),
            spec,
            kind,
            control: control.clone(),
            registry: Rc::downgrade(registry),
            work: RefCell::default(),
            state: Cell::new(JobState::Created),
            user_paused: Cell::default(),
            cancel: Cell::default(),
            complete: Cell::default(),
            finalize: Cell::default(),
            busy: Cell::default(),
            done: Cell::default(),
            total: Cell::default(),
            io_status: Cell::default(),
            was_synced: Cell::default(),
            error: RefCell::default(),
            changed: Event::new(),
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.spec.id
    }

    /// Who it is, for messages.
    pub(crate) fn who(&self) -> String {
        format!("job '{}'", self.spec.id)
    }

    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    /// How it is now.
    pub(crate) fn view(&self) -> JobView {
        let work = self.work.borrow().clone();
        JobView {
            id: self.spec.id.clone(),
            kind: self.kind,
            state: self.state.get(),
            done: self.done.get(),
            total: self.total.get(),
            speed: self.limit.borrow().speed(),
            io_status: self.io_status.get(),
            is_paused: self.user_paused.get(),
            is_busy: self.busy.get(),
            auto_finalize: self.spec.auto_finalize,
            auto_dismiss: self.spec.auto_dismiss,
            actively_synced: match work {
                Some(work) => work.actively_synced(),
                None => self.was_synced.get(),
            },
            error: self.error.borrow().clone(),
        }
    }

    fn emit(&self, event: &JobEvent) {
        if let Some(registry) = self.registry.upgrade() {
            registry.emit(event);
        }
    }

    fn enter(&self, state: JobState) {
        let before = self.state.replace(state);
        debug_assert!(before.leads_to(state), "{before} does not lead to {state}");
        self.emit(&JobEvent::StatusChange {
            id: self.spec.id.clone(),
            state,
        });
        self.changed.notify(usize::MAX);
    }

    /// Wakes when something is asked of it. To be had before looking whether that is so already.
    pub(crate) fn listen(&self) -> EventListener {
        self.changed.listen()
    }

    fn tell(&self) {
        self.changed.notify(usize::MAX);
    }

    // What its work asks.

    /// Whether it is to end at once: told to give up, and not ready to do it well.
    pub(crate) fn is_cancelled(&self) -> bool {
        match self.cancel.get() {
            Some(Cancel::Forced) => true,
            Some(Cancel::Soft) | None => false,
        }
    }

    /// Whether a job that would go on for ever is to end well, and whether its result is to take the
    /// source's place then.
    pub(crate) fn is_to_end(&self) -> Option<bool> {
        match (self.complete.get(), self.cancel.get()) {
            (_, Some(_)) => Some(false),
            (true, None) => Some(true),
            (false, None) => None,
        }
    }

    /// Whether it is to stop what it does as soon as nothing is in flight.
    pub(crate) fn must_stop(&self) -> bool {
        self.user_paused.get() || self.is_cancelled()
    }

    /// Holds still for as long as it is told to. Nothing of the job's is in flight.
    ///
    /// # Errors
    ///
    /// [`Stopped::Cancelled`].
    pub(crate) async fn pause_point(&self) -> Result<(), Stopped> {
        if self.user_paused.get() && !self.is_cancelled() {
            let (held, goes_on) = match self.state.get() {
                JobState::Ready => (JobState::Standby, JobState::Ready),
                _ => (JobState::Paused, JobState::Running),
            };
            self.busy.set(false);
            self.enter(held);
            loop {
                let told = self.listen();
                if !self.user_paused.get() || self.is_cancelled() {
                    break;
                }
                told.await;
            }
            self.enter(goes_on);
        }
        match self.is_cancelled() {
            true => Err(Stopped::Cancelled),
            false => Ok(()),
        }
    }

    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.set(busy);
    }

    /// Everything is copied.
    pub(crate) fn set_ready(&self) {
        if self.state.get() == JobState::Running {
            self.enter(JobState::Ready);
            self.emit(&JobEvent::Ready(self.view()));
        }
    }

    pub(crate) fn add_done(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        self.total.set(self.total.get().max(self.done.get()));
    }

    pub(crate) fn done(&self) -> u64 {
        self.done.get()
    }

    pub(crate) fn set_total(&self, bytes: u64) {
        self.total.set(bytes.max(self.done.get()));
    }

    /// How long the job must not move anything from now on.
    pub(crate) fn delay(&self) -> Duration {
        let now = self.control.context().engine().now();
        self.limit.borrow_mut().delay(now)
    }

    /// Counts bytes that are about to be moved.
    pub(crate) fn charge(&self, bytes: u64) {
        let now = self.control.context().engine().now();
        self.limit.borrow_mut().charge(now, bytes);
    }

    /// What becomes of a failure: tells of it, and holds the job if it is to stop for it.
    pub(crate) fn failed(&self, policy: OnError, is_read: bool, error: IoError) -> Action {
        let action = policy.action(error);
        let id = self.spec.id.clone();
        self.emit(&JobEvent::Error {
            id,
            is_read,
            action,
        });
        if action == Action::Stop {
            self.user_paused.set(true);
            self.io_status.set(self.io_status.get().after(error));
        }
        action
    }

    // What operators ask.

    fn check(&self, verb: Verb) -> Result<(), Error> {
        self.state.get().check(&self.spec.id, verb)
    }

    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.check(Verb::Pause)?;
        if self.user_paused.replace(true) {
            return Err(Error::invalid("Job is already paused"));
        }
        self.tell();
        Ok(())
    }

    pub(crate) fn resume(&self) -> Result<(), Error> {
        if !self.user_paused.get() {
            return Err(Error::invalid("Can't resume a job that was not paused"));
        }
        self.check(Verb::Resume)?;
        self.user_paused.set(false);
        self.io_status.set(IoStatus::Ok);
        self.tell();
        Ok(())
    }

    /// Gives up; without `force` a job that is ready ends well.
    pub(crate) fn cancel(&self, force: bool) -> Result<(), Error> {
        self.check(Verb::Cancel)?;
        self.cancel_now(force);
        Ok(())
    }

    pub(crate) fn cancel_now(&self, force: bool) {
        let is_ready = matches!(self.state.get(), JobState::Ready | JobState::Standby);
        let cancel = match force || !is_ready {
            true => Cancel::Forced,
            false => Cancel::Soft,
        };
        // What was forced stays so.
        if self.cancel.get() != Some(Cancel::Forced) {
            self.cancel.set(Some(cancel));
        }
        if self.user_paused.replace(false) {
            self.io_status.set(IoStatus::Ok);
        }
        self.tell();
    }

    pub(crate) fn is_user_paused(&self) -> bool {
        self.user_paused.get()
    }

    pub(crate) fn complete(&self) -> Result<(), Error> {
        self.check(Verb::Complete)?;
        let work = self.work.borrow().clone();
        let can = work.is_some_and(|work| work.can_complete());
        if self.cancel.get().is_some() || !can {
            return Err(Error::invalid(format!(
                "The active block job '{}' cannot be completed",
                self.spec.id
            )));
        }
        self.complete.set(true);
        self.tell();
        Ok(())
    }

    pub(crate) fn finalize(&self) -> Result<(), Error> {
        self.check(Verb::Finalize)?;
        self.finalize.set(true);
        self.tell();
        Ok(())
    }

    pub(crate) fn dismiss(&self) -> Result<(), Error> {
        self.check(Verb::Dismiss)?;
        self.forget();
        Ok(())
    }

    pub(crate) fn set_speed(&self, speed: i64) -> Result<(), Error> {
        self.check(Verb::SetSpeed)?;
        let speed = u64::try_from(speed)
            .map_err(|_| Error::invalid("Parameter 'speed' expects a non-negative value"))?;
        let now = self.control.context().engine().now();
        self.limit.borrow_mut().set_speed(now, speed);
        self.tell();
        Ok(())
    }

    /// Has guests wait for the target from now on, or not.
    pub(crate) fn change_copy_mode(&self, write_blocking: bool) -> Result<(), Error> {
        self.check(Verb::Change)?;
        let work = self.work.borrow().clone();
        let gone = || Error::new(ErrorKind::Invalid, "the job has not begun");
        work.ok_or_else(gone)?.change_copy_mode(write_blocking)
    }

    /// Waits until it is over.
    pub(crate) async fn concluded(&self) {
        loop {
            let told = self.listen();
            if matches!(self.state.get(), JobState::Concluded | JobState::Null) {
                return;
            }
            told.await;
        }
    }

    fn forget(&self) {
        self.enter(JobState::Null);
        if let Some(registry) = self.registry.upgrade() {
            registry.remove(self);
        }
    }

    // How it goes.

    /// Begins to work; the work goes on by itself.
    fn start(self: &Rc<Self>, work: Rc<dyn Work>) {
        self.work.replace(Some(Rc::clone(&work)));
        self.enter(JobState::Running);
        let job = Rc::clone(self);
        self.control
            .context()
            .spawn(async move { job.drive(work).await });
    }

    async fn drive(self: Rc<Self>, work: Rc<dyn Work>) {
        self.busy.set(true);
        let mut outcome = work.run(&self).await;
        if outcome.is_ok() && self.is_cancelled() {
            outcome = Err(Stopped::Cancelled);
        }
        if outcome.is_ok() {
            outcome = self.finish(&work).await;
        }
        self.busy.set(false);
        if let Err(stopped) = &outcome {
            let text = match stopped {
                Stopped::Cancelled => "Operation canceled",
                Stopped::Failed(text) => text,
            };
            self.error.replace(Some(text.to_owned()));
            self.enter(JobState::Aborting);
        }
        work.clean(&self).await;
        self.was_synced.set(work.actively_synced());
        // With what it has open.
        self.work.replace(None);
        drop(work);
        self.emit(&match &outcome {
            Err(Stopped::Cancelled) => JobEvent::Cancelled(self.view()),
            Ok(()) | Err(Stopped::Failed(_)) => JobEvent::Completed(self.view()),
        });
        self.enter(JobState::Concluded);
        if self.spec.auto_dismiss {
            self.forget();
        }
    }

    async fn finish(self: &Rc<Self>, work: &Rc<dyn Work>) -> Result<(), Stopped> {
        self.busy.set(false);
        self.enter(JobState::Waiting);
        self.enter(JobState::Pending);
        if !self.spec.auto_finalize {
            self.emit(&JobEvent::Pending(self.view()));
            loop {
                let told = self.listen();
                if self.is_cancelled() {
                    return Err(Stopped::Cancelled);
                }
                if self.finalize.get() {
                    break;
                }
                told.await;
            }
        }
        work.prepare(self).await
    }
}
