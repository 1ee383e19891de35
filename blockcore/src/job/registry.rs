//! [`Jobs`]: all jobs of a process, by name, and what operators ask of them.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Job, JobEvent, JobKind, JobSpec, JobState, JobView, Work};
use crate::graph::Control;
use crate::{Error, ErrorKind};

/// Every job of a process; control thread only.
#[derive(Clone)]
pub struct Jobs {
    registry: Rc<Registry>,
    control: Control,
}

type Listener = Rc<dyn Fn(&JobEvent)>;

#[derive(Default)]
pub(super) struct Registry {
    /// The latest first.
    jobs: RefCell<Vec<Rc<Job>>>,
    listeners: RefCell<Vec<Listener>>,
}

impl Registry {
    pub(super) fn emit(&self, event: &JobEvent) {
        let listeners = self.listeners.borrow().clone();
        for listener in listeners {
            listener(event);
        }
    }

    pub(super) fn remove(&self, job: &Job) {
        let mut jobs = self.jobs.borrow_mut();
        jobs.retain(|other| !std::ptr::eq(&**other, job));
    }
}

impl Jobs {
    /// No jobs yet; those that come work on the graph of `control`.
    pub fn new(control: &Control) -> Self {
        Self {
            registry: Rc::default(),
            control: control.clone(),
        }
    }

    /// Has `listener` told what happens to jobs, from now on.
    pub fn listen(&self, listener: impl Fn(&JobEvent) + 'static) {
        let mut listeners = self.registry.listeners.borrow_mut();
        listeners.push(Rc::new(listener));
    }

    /// Every job as it is now, the latest first.
    pub fn views(&self) -> Vec<JobView> {
        let jobs = self.registry.jobs.borrow();
        jobs.iter().map(|job| job.view()).collect()
    }

    fn find(&self, id: &str) -> Result<Rc<Job>, Error> {
        let jobs = self.registry.jobs.borrow();
        let found = jobs.iter().find(|job| job.id() == id).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, "Job not found"))
    }

    /// Has a job hold still, as soon as it has nothing in flight.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] if it is held already, or its state has no such
    /// verb: so for all that follow.
    pub fn pause(&self, id: &str) -> Result<(), Error> {
        self.find(id)?.pause()
    }

    /// Has a job go on that was paused, or that stopped for a failure.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause).
    pub fn resume(&self, id: &str) -> Result<(), Error> {
        self.find(id)?.resume()
    }

    /// Has a job give up: at once with `force`; else one that is ready ends well and changes nothing.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause).
    pub fn cancel(&self, id: &str, force: bool) -> Result<(), Error> {
        self.find(id)?.cancel(force)
    }

    /// As [`cancel`](Self::cancel) without force, but refuses a job that an operator has paused, as QEMU's
    /// older command does.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause).
    pub fn cancel_unless_paused(&self, id: &str) -> Result<(), Error> {
        let job = self.find(id)?;
        if job.is_user_paused() {
            return Err(Error::busy(format!(
                "The block job for device '{id}' is currently paused"
            )));
        }
        job.cancel(false)
    }

    /// Has a job that would go on for ever end, and its result take its place.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause).
    pub fn complete(&self, id: &str) -> Result<(), Error> {
        self.find(id)?.complete()
    }

    /// Has a job make its result a fact, and waits until it has, or failed to.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause).
    pub async fn finalize(&self, id: &str) -> Result<(), Error> {
        let job = self.find(id)?;
        job.finalize()?;
        job.concluded().await;
        Ok(())
    }

    /// Forgets a job that is over.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause).
    pub fn dismiss(&self, id: &str) -> Result<(), Error> {
        self.find(id)?.dismiss()
    }

    /// Lets a job move so many bytes per second, from now on; 0 for no limit.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause); [`ErrorKind::Invalid`] for a negative one.
    pub fn set_speed(&self, id: &str, speed: i64) -> Result<(), Error> {
        self.find(id)?.set_speed(speed)
    }

    /// Has guests wait for a mirror's target from now on, so that the two stay the same.
    ///
    /// # Errors
    ///
    /// As for [`pause`](Self::pause); [`ErrorKind::Unsupported`] for a job of another kind, and to have
    /// them wait no more.
    pub fn change_copy_mode(&self, id: &str, write_blocking: bool) -> Result<(), Error> {
        self.find(id)?.change_copy_mode(write_blocking)
    }

    /// Has all jobs give up at once, and waits until they are over.
    pub async fn cancel_all(&self) {
        let jobs = self.registry.jobs.borrow().clone();
        for job in &jobs {
            if !matches!(job.view().state, JobState::Concluded | JobState::Null) {
                job.cancel_now(true);
            }
        }
        for job in jobs {
            job.concluded().await;
        }
    }

    /// Refuses a name that cannot be had.
    fn check_id(&self, id: &str) -> Result<(), Error> {
        let well_formed = id.starts_with(|letter: char| letter.is_ascii_alphabetic())
            && id
                .chars()
                .all(|letter| letter.is_ascii_alphanumeric() || "-._".contains(letter));
        if !well_formed {
            return Err(Error::invalid(format!("Invalid job ID '{id}'")));
        }
        if self.find(id).is_ok() {
            let text = format!("Job ID '{id}' already in use");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        Ok(())
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// Makes a job that has not begun. Its name is taken; [`start`](Self::start) must follow.
    pub(super) fn create(&self, spec: &JobSpec, kind: JobKind) -> Result<Rc<Job>, Error> {
        self.check_id(&spec.id)?;
        let job = Job::new(spec.clone(), kind, &self.control, &self.registry);
        self.registry.jobs.borrow_mut().insert(0, Rc::clone(&job));
        job.emit(&JobEvent::StatusChange {
            id: spec.id.clone(),
            state: JobState::Created,
        });
        Ok(job)
    }

    /// Begins the work of a job, or forgets it if that could not be made.
    pub(super) fn start<W: Work + 'static>(
        &self,
        job: &Rc<Job>,
        work: Result<W, Error>,
    ) -> Result<(), Error> {
        match work {
            Ok(work) => {
                job.start(Rc::new(work));
                Ok(())
            }
            Err(error) => {
                job.forget();
                Err(error)
            }
        }
    }
}
