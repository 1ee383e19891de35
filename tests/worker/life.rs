//! One life of the disk: workers, an export and a guest, from the opening to the end.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use backend::export::Export;
use backend::virtio::blk::Request;
use backend::worker::{Command, HoldEvent, Notice};
use blockcore::drain::Scope;
use blockcore::engine::sim::{Simulation, Worker};
use blockcore::graph::{Control, Graph};
use blockcore::io::IoContext;
use blockcore::mailbox::Mailbox;
use harness::history::Flushed;
use harness::pass::{self, PASS_THROUGH};

use crate::guest::{Driver, Guest};
use crate::server::{self, Handle};
use crate::{LIMIT, Test};

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    InOrder,
    Kill,
    PowerCut,
    KillThenPowerCut,
}

/// Everything there is in one life.
pub(crate) struct Life<'a> {
    simulation: &'a Simulation,
    test: Rc<Test>,
    control: Control,
    /// Where the control's tasks run.
    office: Rc<Worker>,
    workers: Vec<Handle>,
    export: Rc<Export>,
    /// What the workers say of held requests.
    notices: Arc<Mailbox<Notice>>,
    guest: Rc<RefCell<Guest>>,
}

impl<'a> Life<'a> {
    /// Opens the disk and starts workers and a guest.
    pub(crate) fn begin(test: &Rc<Test>, simulation: &'a Simulation) -> Result<Self, String> {
        let case = &test.case;
        test.lost.set(false);
        test.toggling.set(false);
        test.resuming.set(false);
        test.tasks.set(0);
        test.read_only.set(test.chance(50));
        test.stable.set(case.writethrough);
        test.changing.replace(vec![false; case.queues]);
        test.seen.take();
        let office = simulation.worker();
        let context = Rc::clone(office.context());
        // What a kill leaves half done is nobody's mistake.
        pass::take_misuse();
        let mut drivers = formats::drivers();
        drivers.push(&PASS_THROUGH);
        let control = Control::new(Graph::new(drivers), context);
        test.open(simulation, &office, &control)?;
        // What the life before had under way is over, some of it unheard of.
        let lost = test.flushes_can_be_lost();
        test.history.borrow_mut().killed(lost);
        let workers: Vec<_> = (0..case.workers)
            .map(|_| server::start(simulation, case.fast_path))
            .collect();
        let handles: Vec<_> = workers.iter().map(|worker| worker.handle.clone()).collect();
        let first = test.below(case.workers as u64) as usize;
        let notices = Mailbox::new(Arc::clone(office.context().engine().sleeper()));
        let export = test.export(simulation, &office, &control, handles, first, &notices)?;
        let guest = Guest::new(Rc::clone(test));
        simulation.add(None, Box::new(Driver(Rc::clone(&guest))));
        Ok(Self {
            simulation,
            test: Rc::clone(test),
            control,
            office,
            workers,
            export,
            notices,
            guest,
        })
    }

    /// Serves the guest to the end that the seed chooses.
    pub(crate) fn live(self) -> Result<(), String> {
        let (test, case) = (Rc::clone(&self.test), &self.test.case);
        for index in 0..case.queues {
            self.spawn(Some(index), |test, export, guest| async move {
                let next = guest.borrow().used_index(index);
                let setup = guest.borrow().setup(index, next);
                if let Err(why) = export.start_queue(index as u16, setup).await {
                    test.fail(format!("queue {index} does not start: {why}"));
                }
            });
        }
        let end = [
            End::InOrder,
            End::Kill,
            End::PowerCut,
            End::KillThenPowerCut,
        ][test.below(4) as usize];
        let requests = match end {
            End::InOrder => case.requests,
            _ => test.below(case.requests as u64 + 1) as usize,
        };
        for _ in 0..requests {
            self.act()?;
        }
        let simulation = self.simulation;
        let contexts = self.contexts();
        match end {
            End::InOrder => self.close()?,
            End::Kill => {
                test.count(|totals| &mut totals.kills);
                self.kill();
            }
            End::PowerCut | End::KillThenPowerCut => {
                test.count(|totals| &mut totals.power_cuts);
                if end == End::KillThenPowerCut {
                    self.kill();
                    for _ in 0..test.below(10) {
                        simulation.step();
                    }
                } else {
                    drop(self);
                }
                simulation.power_cut();
                let left = test.contents(simulation);
                let cut = test.history.borrow_mut().power_cut(&left);
                cut.map_err(|wrong| wrong.to_string())?;
            }
        }
        // Tasks of a killed process that waited for one another.
        contexts.iter().for_each(|context| context.abandon());
        Ok(())
    }

    fn contexts(&self) -> Vec<Rc<IoContext>> {
        let workers = self.workers.iter().map(|worker| Rc::clone(&worker.context));
        workers.chain([Rc::clone(self.office.context())]).collect()
    }

    fn kill(self) {
        self.simulation.kill();
    }

    /// Does one thing that the seed chooses, once there is room for it.
    fn act(&self) -> Result<(), String> {
        let (test, case) = (&self.test, &self.test.case);
        self.wait(|| self.guest.borrow().outstanding() < case.depth)?;
        for _ in 0..test.below(6) {
            self.simulation.step();
        }
        let index = test.below(case.queues as u64) as usize;
        match test.below(100) {
            0..2 => self.restart(index),
            2 => self.set_up_anew(index),
            3..6 => self.move_queue(index),
            6..8 => self.toggle(),
            8 => self.set_call(index),
            9 if test.chance(500) => self.break_queue(index),
            10..14 => self.rest()?,
            14..16 => self.drain(),
            _ => {
                let count = 1 + test.below(4);
                let mut guest = self.guest.borrow_mut();
                guest.submit(self.simulation, index, count);
            }
        }
        Ok(())
    }

    /// Lets everybody fall asleep, if nothing is to do.
    fn rest(&self) -> Result<(), String> {
        self.wait(|| self.guest.borrow().outstanding() == 0)?;
        for _ in 0..30 {
            self.simulation.step();
        }
        Ok(())
    }

    fn wait(&self, mut until: impl FnMut() -> bool) -> Result<(), String> {
        let failed = || self.test.failure.borrow().is_some();
        let run = self.simulation.run_until(LIMIT, || {
            self.listen();
            failed() || until()
        });
        if let Some(why) = self.test.failure.take().or_else(pass::take_misuse) {
            return Err(why);
        }
        self.test.count_announced();
        run.map_err(|stuck| {
            let tasks = self.test.tasks.get();
            let disks = self.workers.iter().map(|worker| {
                let root = worker.context.root(self.export.root());
                root.map(|root| (root.is_held(), root.in_flight()))
            });
            let disks: Vec<_> = disks.collect();
            let export = Rc::clone(&self.export);
            let asking = async move { export.held().await };
            let held = self.simulation.run(&self.office, LIMIT, asking);
            format!(
                "{stuck}\n  {tasks} tasks of control, changing {:?}, disks drained and requests in \
                 flight {disks:?}, held {:?}",
                self.test.changing,
                held.ok()
            )
        })
    }

    /// Hears what is held, and sees to it that it is resumed.
    fn listen(&self) {
        let mut notices = Vec::new();
        self.notices.take(&mut notices);
        for notice in notices {
            let test = &self.test;
            match notice.event {
                HoldEvent::GivenUp => {
                    test.count(|totals| &mut totals.given_up);
                    continue;
                }
                // Nobody waits for a decision.
                HoldEvent::Ignored | HoldEvent::Reported => continue,
                _ => {}
            }
            test.count(|totals| &mut totals.held);
            if !test.case.holds() {
                test.fail(format!("{notice:?} by a policy that holds nothing"));
            }
            let by_itself = test.case.retry.is_some();
            // What is tried again by itself is said once, whatever it meets later.
            if by_itself || (notice.no_space && test.chance(300)) {
                self.simulation.set_capacity(None);
            }
            if !by_itself {
                self.resume();
            }
        }
    }

    /// Resumes what is held, after a while.
    fn resume(&self) {
        if self.test.resuming.replace(true) {
            return;
        }
        let context = Rc::clone(self.office.context());
        self.spawn(None, |test, export, _| async move {
            let pause = Duration::from_nanos(test.below(5_000_000));
            context.delay(pause).await;
            for held in export.held().await {
                if held.error.is_none() && held.request != Request::Flush {
                    test.fail(format!("{held:?} waits for nothing"));
                }
            }
            // What is held from here on needs another one.
            test.resuming.set(false);
            export.resume().await;
            test.count(|totals| &mut totals.resumes);
        });
    }

    /// Holds the disk's requests back for a while.
    fn drain(&self) {
        let control = self.control.clone();
        self.spawn(None, |test, _, _| async move {
            let drained = control.drain(Scope::All).await;
            let pause = Duration::from_nanos(test.below(100_000));
            control.context().delay(pause).await;
            drop(drained);
            test.count(|totals| &mut totals.drains);
        });
    }

    /// Starts a task of control, which has `queue` to itself if it may stop it.
    fn spawn<W: Future<Output = ()> + 'static>(
        &self,
        queue: Option<usize>,
        task: impl FnOnce(Rc<Test>, Rc<Export>, Rc<RefCell<Guest>>) -> W,
    ) {
        let test = Rc::clone(&self.test);
        if let Some(queue) = queue
            && std::mem::replace(&mut test.changing.borrow_mut()[queue], true)
        {
            return;
        }
        let (export, guest) = (Rc::clone(&self.export), Rc::clone(&self.guest));
        let task = task(Rc::clone(&test), export, guest);
        test.tasks.set(test.tasks.get() + 1);
        self.office.context().spawn(async move {
            task.await;
            test.tasks.set(test.tasks.get() - 1);
            if let Some(queue) = queue {
                test.changing.borrow_mut()[queue] = false;
            }
        });
    }

    /// Stops a queue and starts it again later, set up a little differently.
    fn restart(&self, index: usize) {
        let context = Rc::clone(self.office.context());
        self.spawn(Some(index), |test, export, guest| async move {
            let state = export.stop_queue(index as u16).await;
            let pause = Duration::from_nanos(test.below(300_000));
            context.delay(pause).await;
            guest.borrow_mut().change(index);
            let (broken, used) = {
                let guest = guest.borrow();
                (guest.is_broken(index), guest.used_index(index))
            };
            // A queue that broke meanwhile is mended by whoever broke it.
            match state {
                Some(state) if state.next == used || broken => {}
                state => test.fail(format!(
                    "queue {index} stopped at {state:?}, its used index is {used}"
                )),
            }
            let next = state.map_or(used, |state| state.next);
            let setup = guest.borrow().setup(index, next);
            if let Err(why) = export.start_queue(index as u16, setup).await {
                test.fail(format!("queue {index} does not start: {why}"));
            }
            test.count(|totals| &mut totals.restarts);
        });
    }

    /// As a change of memory does: held requests go on being held.
    fn set_up_anew(&self, index: usize) {
        let context = Rc::clone(self.office.context());
        self.spawn(Some(index), |test, export, guest| async move {
            let state = export.suspend_queue(index as u16).await;
            let pause = Duration::from_nanos(test.below(300_000));
            context.delay(pause).await;
            guest.borrow_mut().change(index);
            let used = guest.borrow().used_index(index);
            let Some(state) = state else {
                return test.fail(format!("queue {index} was not served"));
            };
            let held = state.next.wrapping_sub(used);
            if held > test.case.depth as u16 {
                test.fail(format!("queue {index} stopped at {state:?}, used {used}"));
            }
            let setup = guest.borrow().setup(index, state.next);
            if let Err(why) = export.start_queue(index as u16, setup).await {
                test.fail(format!("queue {index} does not start: {why}"));
            }
            test.count(|totals| &mut totals.restarts);
        });
    }

    fn move_queue(&self, index: usize) {
        let to = self.test.below(self.workers.len() as u64) as usize;
        self.spawn(None, |test, export, _| async move {
            if let Err(error) = export.move_queue(index as u16, to).await {
                test.fail(error.report());
            }
            test.count(|totals| &mut totals.moves);
        });
    }

    fn set_call(&self, index: usize) {
        self.spawn(Some(index), |_, export, guest| async move {
            let call = Arc::new(guest.borrow_mut().replace_call(index));
            export.set_call(index as u16, Some(call)).await;
        });
    }

    /// Turns the write cache on or off.
    fn toggle(&self) {
        if self.test.toggling.replace(true) {
            return;
        }
        let writeback = self.test.chance(500);
        self.spawn(None, |test, export, _| async move {
            let flush = test.history.borrow_mut().begin_flush();
            if writeback {
                test.stable.set(false);
            }
            let outcome = export.set_writeback(writeback).await;
            let nothing = writeback || test.case.no_flush || test.read_only.get();
            let flushed = match outcome {
                Ok(()) if nothing || test.stable.get() => Flushed::Nothing,
                Ok(()) => Flushed::Done,
                Err(_) if test.case.direct => Flushed::Nothing,
                Err(_) => Flushed::Lost,
            };
            test.history.borrow_mut().end_flush(flush, flushed);
            if let Err(error) = outcome
                && test.case.faults.sync_error_permille == 0
            {
                test.fail(format!("the write cache cannot be turned off: {error}"));
            }
            if outcome.is_err() {
                // The guest hears of it, and must not believe in the new mode.
                test.stable.set(false);
            } else if !writeback {
                test.stable.set(true);
            }
            test.toggling.set(false);
            test.count(|totals| &mut totals.toggles);
        });
    }

    /// Breaks a queue's ring, waits to be told, and begins anew with it.
    fn break_queue(&self, index: usize) {
        let mut guest = self.guest.borrow_mut();
        // What was made available before the break is to be answered, so the index must not jump.
        if self.test.changing.borrow()[index] || !guest.has_room(index) {
            return;
        }
        guest.break_queue(self.simulation, index);
        drop(guest);
        let context = Rc::clone(self.office.context());
        self.spawn(Some(index), |test, export, guest| async move {
            while !guest.borrow().told_broken(index) {
                context.delay(Duration::from_micros(100)).await;
            }
            export.stop_queue(index as u16).await;
            guest.borrow_mut().reset(index);
            let setup = guest.borrow().setup(index, 0);
            if let Err(why) = export.start_queue(index as u16, setup).await {
                test.fail(format!("queue {index} does not start: {why}"));
            }
            test.count(|totals| &mut totals.broken);
        });
    }

    /// Waits for every request, stops everything in order, and looks at the disk.
    fn close(self) -> Result<(), String> {
        let test = &self.test;
        self.wait(|| self.guest.borrow().outstanding() == 0 && test.tasks.get() == 0)?;
        for index in 0..test.case.queues {
            self.spawn(Some(index), |test, export, guest| async move {
                let state = export.stop_queue(index as u16).await;
                let used = guest.borrow().used_index(index);
                if state.is_none_or(|state| state.next != used) {
                    test.fail(format!("queue {index} ends at {used}, and was {state:?}"));
                }
            });
        }
        self.wait(|| test.tasks.get() == 0)?;
        self.check_counters()?;
        self.flush_and_close()?;
        let workers = self.workers.iter();
        workers
            .clone()
            .for_each(|worker| worker.handle.commands.post(Command::Exit));
        self.wait(|| workers.clone().all(|worker| worker.done.get()))?;
        let map = Arc::clone(self.guest.borrow().map());
        if Arc::strong_count(&map) != 2 {
            return Err("somebody keeps the guest's memory mapped".into());
        }
        let contents = test.contents(self.simulation);
        let checked = test.history.borrow().check_now(&contents);
        checked.map_err(|wrong| wrong.to_string())
    }

    fn flush_and_close(&self) -> Result<(), String> {
        let (test, simulation) = (&self.test, self.simulation);
        let flush = test.history.borrow_mut().begin_flush();
        let export = Rc::clone(&self.export);
        let flushing = async move { export.flush().await };
        let flushed = simulation.run(&self.office, LIMIT, flushing);
        let flushed = match flushed.map_err(|stuck| stuck.to_string())? {
            Ok(()) if !test.case.no_flush && !test.read_only.get() => Flushed::Done,
            Err(_) if test.flushes_can_be_lost() => Flushed::Lost,
            _ => Flushed::Nothing,
        };
        test.history.borrow_mut().end_flush(flush, flushed);
        let (control, export) = (self.control.clone(), Rc::clone(&self.export));
        let closing = async move {
            export.close().await?;
            control.remove("disk").await
        };
        let closed = simulation.run(&self.office, LIMIT, closing);
        match closed.map_err(|stuck| stuck.to_string())? {
            // What is lost was said already, to whoever flushed.
            Err(error) if test.case.faults.sync_error_permille == 0 => Err(error.report()),
            _ => Ok(()),
        }
    }

    fn check_counters(&self) -> Result<(), String> {
        let seen = self.test.seen.borrow();
        let line = self.export.stats_line();
        let counter = |name: &str| -> u64 {
            let (_, rest) = line.split_once(name).expect("it is counted");
            let digits = rest.split(' ').next().expect("a word");
            digits.parse().expect("a number")
        };
        let ranges = counter("discards=");
        let wrong = counter("reads=") != seen.reads
            || counter("writes=") != seen.writes
            || counter("flushes=") != seen.flushes
            || !(seen.ranges..=seen.ranges + seen.refused_ranges).contains(&ranges);
        // Broken rings are counted as errors, too.
        if wrong || counter("errors=") < seen.errors {
            return Err(format!("counted {line}, seen {seen:?}"));
        }
        Ok(())
    }
}
