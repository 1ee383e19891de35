//! The daemon's workers: threads that serve queues, those that every export shares and named ones.
//!
//! Threads: the control thread.

use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use blockcore::engine::{self, EngineChoice};
use blockcore::io::IoContext;
use blockcore::mailbox::Mailbox;
use blockcore::{Error, ErrorKind};

use super::Daemon;
use crate::export::WorkerHandle;
use crate::polling::PollLimit;
use crate::worker::{Command, Worker};

/// A worker's thread.
pub(super) struct WorkerThread {
    handle: WorkerHandle,
    poll_max: Arc<PollLimit>,
    thread: JoinHandle<()>,
}

impl WorkerThread {
    /// Ends it, when it serves no queue any more.
    fn stop(self) {
        self.handle.commands.post(Command::Exit);
        let _ = self.thread.join();
    }
}

impl Daemon {
    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers.borrow().len()
    }

    /// The workers that an export's queues or connections go to: those of these names, or those that all
    /// exports share, of which there are so many at least that queues profit from.
    pub(super) fn workers_for(
        &self,
        names: &[String],
        queues: u16,
    ) -> Result<Vec<WorkerHandle>, Error> {
        if names.is_empty() {
            self.start_workers(queues)?;
            let workers = self.workers.borrow();
            return Ok(workers.iter().map(|worker| worker.handle.clone()).collect());
        }
        let iothreads = self.iothreads.borrow();
        let named = names.iter().map(|name| {
            let worker = iothreads.get(name).ok_or_else(|| no_iothread(name))?;
            Ok(worker.handle.clone())
        });
        named.collect()
    }

    /// Starts a named worker, which serves exports that ask for it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Exists`]; the host's refusal of a thread or an engine.
    pub fn add_iothread(&self, name: &str, poll_max: Duration) -> Result<(), Error> {
        let mut iothreads = self.iothreads.borrow_mut();
        if iothreads.contains_key(name) {
            let text = format!("there is an iothread '{name}' already");
            return Err(Error::new(ErrorKind::Exists, text));
        }
        let worker = start_worker(name.to_owned(), None, poll_max, self.process.engine)?;
        iothreads.insert(name.to_owned(), worker);
        Ok(())
    }

    /// Ends a named worker.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`], naming an export that it serves.
    pub fn remove_iothread(&self, name: &str) -> Result<(), Error> {
        let used = |names: &[String]| names.iter().any(|used| used == name);
        let views = self.exports();
        let mut configs = views.iter().map(|view| view.export.config());
        let user = configs.find(|config| used(&config.iothreads));
        let nbd = self.nbd_exports();
        let mut nbd = nbd.iter().map(|export| export.config());
        let user = user.map(|config| &config.id).or_else(|| {
            let config = nbd.find(|config| used(&config.iothreads))?;
            Some(&config.id)
        });
        if let Some(id) = user {
            return Err(Error::busy(format!(
                "object '{name}' is in use, can not be deleted: export '{id}' is served by it"
            )));
        }
        if !self.reserved.borrow().is_empty() {
            return Err(Error::busy(format!(
                "object '{name}' is in use, can not be deleted: an export is being added"
            )));
        }
        let worker = self.iothreads.borrow_mut().remove(name);
        worker.ok_or_else(|| no_iothread(name))?.stop();
        Ok(())
    }

    /// How long a named worker looks for work by itself before it sleeps, at most; set to another time if
    /// one is given.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn iothread_poll(&self, name: &str, set: Option<Duration>) -> Result<Duration, Error> {
        let iothreads = self.iothreads.borrow();
        let worker = iothreads.get(name).ok_or_else(|| no_iothread(name))?;
        if let Some(set) = set {
            worker.poll_max.set(set);
        }
        Ok(worker.poll_max.get())
    }

    /// Starts workers for exports with up to so many queues, unless there are workers.
    ///
    /// # Errors
    ///
    /// The host's refusal of a thread or an engine.
    fn start_workers(&self, queues: u16) -> Result<(), Error> {
        let mut workers = self.workers.borrow_mut();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let default = usize::from(queues).min(cores);
        let wanted = self.process.workers.unwrap_or(default).max(1);
        while workers.len() < wanted {
            let number = workers.len();
            let cpu = match self.process.cpus.len() {
                0 => None,
                cpus => Some(self.process.cpus[number % cpus]),
            };
            let name = format!("worker {number}");
            let (poll_max, engine) = (self.process.poll_max, self.process.engine);
            workers.push(start_worker(name, cpu, poll_max, engine)?);
        }
        Ok(())
    }

    /// Ends all workers, which serve no queue any more.
    pub(super) fn stop_workers(&self) {
        let named = self.iothreads.take().into_values();
        for worker in self.workers.take().into_iter().chain(named) {
            worker.stop();
        }
    }
}

fn no_iothread(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("iothread \"{name}\" not found"),
    )
}

#[expect(clippy::disallowed_methods, reason = "workers are real threads here")]
fn start_worker(
    name: String,
    cpu: Option<usize>,
    poll_max: Duration,
    choice: EngineChoice,
) -> Result<WorkerThread, Error> {
    let poll_max = Arc::new(PollLimit::new(poll_max));
    let limit = Arc::clone(&poll_max);
    let (made, ready) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(name)
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
            Worker::new(Rc::clone(&context), commands).run(&limit);
            context.abandon();
        })
        .map_err(|error| Error::new(ErrorKind::Io, format!("cannot start a worker: {error}")))?;
    let handle = ready
        .recv()
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "a worker ended at its start")))?;
    Ok(WorkerThread {
        handle,
        poll_max,
        thread,
    })
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
