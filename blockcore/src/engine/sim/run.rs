//! Whose turn it is: the simulated scheduler, and a worker for those who need no more than tasks.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use super::engine::{Aftermath, EngineState, SimEngine};
use super::{Simulation, State};
use crate::engine::{Engine, Event};
use crate::io::IoContext;

/// Somebody who runs when the seed says so.
pub trait Turn {
    /// Does what can be done now; returns whether there was anything.
    ///
    /// Who is registered with an engine runs whenever its worker would not be asleep in
    /// [`Engine::wait`], whatever this returns. Who is not runs again when anything else has happened.
    fn turn(&mut self) -> bool;

    /// What it waits for, for the report when nothing goes on.
    fn pending(&self) -> String;

    /// Its process was killed: it has no more turns, and lets go of what it has.
    fn killed(&mut self) {}
}

/// Somebody registered.
pub(super) struct Actor {
    /// Empty during its turn.
    turn: Option<Box<dyn Turn>>,
    engine: Option<Rc<SimEngine>>,
    idle: bool,
}

impl Actor {
    /// See [`Turn::killed`].
    pub(super) fn killed(&mut self) {
        if let Some(turn) = &mut self.turn {
            turn.killed();
        }
    }

    fn is_runnable(&self) -> bool {
        match &self.engine {
            Some(engine) => engine.is_runnable(),
            None => !self.idle,
        }
    }
}

/// Nothing goes on, or nothing comes of it: what was waited for, and by whom.
#[derive(Debug)]
pub struct Stuck(String);

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Stuck {}

impl Simulation {
    /// Registers somebody who runs from now on, until the next [`kill`](Self::kill); with the engine
    /// on which it sleeps, if it has one.
    pub fn add(&self, engine: Option<Rc<SimEngine>>, turn: Box<dyn Turn>) {
        let turn = Some(turn);
        let idle = false;
        self.actors.borrow_mut().push(Actor { turn, engine, idle });
    }

    /// A registered worker that runs tasks, each of which waits for its own I/O.
    pub fn worker(&self) -> Rc<Worker> {
        self.worker_with(|event| panic!("{event:?} is for nobody"))
    }

    /// A registered worker that runs tasks and gives its events to `handler`.
    pub fn worker_with(&self, handler: impl FnMut(Event) + 'static) -> Rc<Worker> {
        let engine = self.engine();
        let worker = Rc::new(Worker {
            context: IoContext::new(Rc::clone(&engine) as Rc<dyn Engine>),
            engine: Rc::clone(&engine),
        });
        let turn = WorkerTurn {
            worker: Rc::clone(&worker),
            handler: Box::new(handler),
        };
        self.add(Some(engine), Box::new(turn));
        worker
    }

    /// Gives one turn to somebody who can run, or lets time pass to the next thing that happens.
    /// Returns whether there was either.
    pub fn step(&self) -> bool {
        let mut aftermath = Aftermath::default();
        let landed = self.state.borrow_mut().land_due(&mut aftermath);
        drop(aftermath.dropped);
        for work in aftermath.work {
            work();
        }
        for waker in aftermath.wakers {
            waker.wake();
        }
        if landed {
            self.end_idling();
        }
        let runnable: Vec<usize> = {
            let actors = self.actors.borrow();
            let runnable = actors.iter().enumerate();
            let runnable = runnable.filter(|(_, actor)| actor.is_runnable());
            runnable.map(|(index, _)| index).collect()
        };
        if runnable.is_empty() {
            return landed || self.state.borrow_mut().skip_to_next();
        }
        let chosen = {
            let mut state = self.state.borrow_mut();
            let chosen = runnable[state.random.below(runnable.len() as u64) as usize];
            state.note(&[6, chosen as u64]);
            chosen
        };
        self.give_turn(chosen);
        self.state.borrow_mut().pass_time();
        true
    }

    /// Steps until `done`, for no more than `limit` of simulated time.
    ///
    /// # Errors
    ///
    /// [`Stuck`] if nobody can run and nothing will happen, or the time is over. Nothing is undone.
    pub fn run_until(&self, limit: Duration, mut done: impl FnMut() -> bool) -> Result<(), Stuck> {
        let end = self.now() + limit;
        while !done() {
            if self.now() > end {
                return Err(self.stuck("the time is over"));
            }
            if !self.step() {
                return Err(self.stuck("nobody can run and nothing is due"));
            }
        }
        Ok(())
    }

    /// Runs `future` as a task of `worker`, and everybody else, until it has ended.
    ///
    /// # Errors
    ///
    /// As [`run_until`](Self::run_until); the task goes on if anybody runs it.
    pub fn run<T: 'static>(
        &self,
        worker: &Worker,
        limit: Duration,
        future: impl Future<Output = T> + 'static,
    ) -> Result<T, Stuck> {
        let output = Rc::new(RefCell::new(None));
        let place = Rc::clone(&output);
        worker.context.spawn(async move {
            let value = future.await;
            place.replace(Some(value));
        });
        self.run_until(limit, || output.borrow().is_some())?;
        let value = output.borrow_mut().take();
        Ok(value.expect("just seen there"))
    }

    fn give_turn(&self, index: usize) {
        // Taken out: whoever has the turn may register others.
        let (turn, engine) = {
            let actor = &mut self.actors.borrow_mut()[index];
            (actor.turn.take(), actor.engine.clone())
        };
        let mut turn = turn.expect("turns do not nest");
        if let Some(engine) = engine {
            engine.resume();
        }
        let progress = turn.turn();
        if progress {
            self.end_idling();
        }
        let actor = &mut self.actors.borrow_mut()[index];
        actor.idle = !progress;
        actor.turn = Some(turn);
    }

    fn end_idling(&self) {
        for actor in self.actors.borrow_mut().iter_mut() {
            actor.idle = false;
        }
    }

    fn stuck(&self, why: &str) -> Stuck {
        let state = self.state.borrow();
        let mut report = format!(
            "seed {:#x} is stuck at {:?}: {why}; {} operations and {} calls are with the host",
            state.seed,
            state.now,
            state.running.len(),
            state.calls.len(),
        );
        for (index, engine) in state.engines.iter().enumerate() {
            if let Some(line) = EngineState::report(engine) {
                report.push_str(&format!("\n  engine {index}: {line}"));
            }
        }
        drop(state);
        for (index, actor) in self.actors.borrow().iter().enumerate() {
            let pending = actor.turn.as_ref().map(|turn| turn.pending());
            report.push_str(&format!(
                "\n  actor {index}: {}",
                pending.unwrap_or_default()
            ));
        }
        Stuck(report)
    }
}

impl State {
    /// Jumps to the next thing that happens by itself.
    fn skip_to_next(&mut self) -> bool {
        let Some(next) = self.next_due() else {
            return false;
        };
        self.now = self.now.max(next);
        true
    }

    /// A turn takes a moment, and now and then the host runs somebody else for a while.
    fn pass_time(&mut self) {
        let nanos = if self.random.chance(10) {
            self.random.between(10_000, 500_000)
        } else {
            self.random.between(100, 3_000)
        };
        self.now += Duration::from_nanos(nanos);
    }
}

/// A simulated worker: an engine, and a context on it.
pub struct Worker {
    engine: Rc<SimEngine>,
    context: Rc<IoContext>,
}

impl Worker {
    /// What its tasks do their I/O with.
    pub fn engine(&self) -> &Rc<SimEngine> {
        &self.engine
    }

    /// Where its tasks are spawned.
    pub fn context(&self) -> &Rc<IoContext> {
        &self.context
    }
}

struct WorkerTurn {
    worker: Rc<Worker>,
    handler: Box<dyn FnMut(Event)>,
}

impl Turn for WorkerTurn {
    fn turn(&mut self) -> bool {
        let context = &self.worker.context;
        let mut events = Vec::new();
        let ran = context.turn(&mut events);
        let progress = ran || !events.is_empty();
        if !progress {
            context.sleep(&mut events, None, || true);
        }
        events.into_iter().for_each(&mut self.handler);
        progress
    }

    fn pending(&self) -> String {
        format!("{} tasks", self.worker.context.tasks())
    }

    fn killed(&mut self) {
        self.worker.context.abandon();
    }
}
