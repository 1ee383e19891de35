//! The worker under test, taking its turns when the seed says so.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use backend::export::WorkerHandle;
use backend::worker::Worker;
use blockcore::engine::Engine;
use blockcore::engine::sim::{Random, Simulation, Turn};
use blockcore::io::IoContext;
use blockcore::mailbox::Mailbox;

/// A worker's loop, cut where others may come between.
struct Server {
    context: Rc<IoContext>,
    /// None once it has ended.
    worker: Option<Worker>,
    next: Step,
    random: Random,
    done: Rc<Cell<bool>>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Turn,
    Arm,
    Sleep,
}

/// A worker as its control knows it.
pub(crate) struct Handle {
    pub(crate) handle: WorkerHandle,
    pub(crate) context: Rc<IoContext>,
    /// It was told to exit, and has.
    pub(crate) done: Rc<Cell<bool>>,
}

/// Starts a worker on the simulation.
pub(crate) fn start(simulation: &Simulation, fast_path: bool) -> Handle {
    let engine = simulation.engine();
    let context = IoContext::new(Rc::clone(&engine) as Rc<dyn Engine>);
    let mailbox = Mailbox::new(Arc::clone(engine.sleeper()));
    let mut worker = Worker::new(Rc::clone(&context), Arc::clone(&mailbox));
    if !fast_path {
        worker.disable_fast_path();
    }
    let done = Rc::<Cell<bool>>::default();
    let server = Server {
        context: Rc::clone(&context),
        worker: Some(worker),
        next: Step::Turn,
        random: simulation.random(),
        done: Rc::clone(&done),
    };
    simulation.add(Some(engine), Box::new(server));
    Handle {
        handle: WorkerHandle {
            commands: mailbox,
            context: context.handle().clone(),
        },
        context,
        done,
    }
}

impl Turn for Server {
    fn turn(&mut self) -> bool {
        let Some(worker) = &mut self.worker else {
            self.context.sleep(&mut Vec::new(), None, || true);
            return false;
        };
        match self.next {
            Step::Turn if worker.is_done() => {
                self.worker = None;
                self.done.set(true);
                return true;
            }
            Step::Turn => {
                if worker.turn() {
                    return true;
                }
                // A worker that polls looks again.
                if !self.random.chance(300) {
                    self.next = Step::Arm;
                }
            }
            Step::Arm => {
                self.next = match worker.arm() {
                    true => Step::Sleep,
                    false => Step::Turn,
                };
            }
            Step::Sleep => {
                worker.sleep();
                self.next = Step::Turn;
            }
        }
        false
    }

    fn pending(&self) -> String {
        let tasks = self.context.tasks();
        format!("a worker before its {:?}, {tasks} tasks", self.next)
    }

    fn killed(&mut self) {
        self.context.abandon();
        self.worker = None;
        self.context.abandon();
    }
}
