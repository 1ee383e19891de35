//! What the roots' users ask, and what they expect.

use std::rc::Rc;

use blockcore::IoError;
use blockcore::driver::{StatusFlags, WriteFlags, ZeroFlags};
use blockcore::engine::{OpResult, preempt};
use blockcore::graph::Graph;
use blockcore::io::buffer::Segments;
use blockcore::io::{Request, RequestKind};
use futures_channel::oneshot;
use harness::history::{self, Flushed, Outcome};

use crate::life::{Life, User};
use crate::view::View;

/// A user's request that has entered.
pub(crate) struct Asking {
    pub(crate) life: Rc<Life>,
    pub(crate) user: Rc<User>,
    worker: usize,
    pub(crate) request: Request,
    pub(crate) view: Rc<View>,
    /// What its disk's length was, as [`Length::cuts`](crate::length::Length::cuts) has it.
    cuts: u32,
}

impl Life {
    /// Starts a task for one random request.
    pub(crate) fn issue(self: &Rc<Self>) {
        let test = &self.test;
        let roots = self.roots.borrow();
        let user = &roots[test.below(roots.len() as u64) as usize];
        let what = test.below(100);
        self.spawn(user, move |asking| async move {
            match what {
                0..28 => asking.read().await,
                28..52 => asking.write().await,
                52..56 => asking.copy().await,
                56..60 => asking.compress().await,
                60..72 => asking.zero().await,
                72..78 => asking.discard().await,
                78..88 => asking.flush().await,
                88..95 => asking.look().await,
                95..98 => asking.truncate().await,
                _ => asking.out_of_range().await,
            }
        });
    }

    pub(crate) fn issue_flush(self: &Rc<Self>, user: &Rc<User>) {
        self.spawn(user, |asking| async move { asking.flush().await });
    }

    fn spawn<F: Future<Output = ()>>(
        self: &Rc<Self>,
        user: &Rc<User>,
        ask: impl FnOnce(Asking) -> F + 'static,
    ) {
        let attached = |worker: &usize| user.places[*worker].get().attached;
        let places: Vec<_> = (0..self.workers.len()).filter(attached).collect();
        if places.is_empty() {
            return;
        }
        let worker = places[self.test.below(places.len() as u64) as usize];
        let (life, user) = (Rc::clone(self), Rc::clone(user));
        self.outstanding.set(self.outstanding.get() + 1);
        self.test.count(|totals| &mut totals.requests);
        let context = self.workers[worker].0.context();
        context.spawn(async move {
            if let Some(asking) = Asking::enter(&life, &user, worker).await {
                ask(asking).await;
            }
            life.outstanding.set(life.outstanding.get() - 1);
        });
    }

    /// Waits until a read by `user` on `worker` is over.
    pub(crate) fn spawn_read(
        self: &Rc<Self>,
        user: &Rc<User>,
        worker: usize,
        done: impl FnOnce() + 'static,
    ) {
        let (life, user) = (Rc::clone(self), Rc::clone(user));
        let context = self.workers[worker].0.context();
        context.spawn(async move {
            if let Some(asking) = Asking::enter(&life, &user, worker).await {
                asking.read().await;
            }
            done();
        });
    }
}

/// Whether an operation without a task was started and has done all that was asked; if not, the request
/// is made again with a task.
async fn is_whole(started: Option<impl Future<Output = OpResult>>, bytes: u64) -> bool {
    match started {
        Some(done) => done.await == Ok(bytes),
        None => false,
    }
}

impl Asking {
    /// Enters at the root; `None` if it has moved away.
    pub(crate) async fn enter(life: &Rc<Life>, user: &Rc<User>, worker: usize) -> Option<Self> {
        let on = &life.workers[worker].0;
        preempt(&**on.engine()).await;
        if !user.places[worker].get().attached {
            return None;
        }
        let root = on.context().root(user.id)?;
        let place = &user.places[worker];
        let change = |by: isize| {
            let mut now = place.get();
            now.entering = now.entering.wrapping_add_signed(by);
            place.set(now);
        };
        change(1);
        let request = root.enter(RequestKind::Other, 0, 0).await;
        change(-1);
        Some(Self::entered(life, user, worker, request))
    }

    /// Enters at another root of the same worker, without waiting.
    pub(crate) fn another(&self, user: &Rc<User>) -> Option<Self> {
        if !user.places[self.worker].get().attached {
            return None;
        }
        let root = self.life.workers[self.worker].0.context().root(user.id)?;
        let request = root.try_enter(RequestKind::Other, 0, 0)?;
        Some(Self::entered(&self.life, user, self.worker, request))
    }

    fn entered(life: &Rc<Life>, user: &Rc<User>, worker: usize, request: Request) -> Self {
        user.in_flight.set(user.in_flight.get() + 1);
        // A request that has entered keeps its way: no commit comes before its end.
        let mut view = Rc::clone(&user.view.borrow());
        if life.test.case.disks[view.disk].resizes {
            // But for the length.
            let node = life.control.node_of(user.id).expect("it has entered there");
            let now = |graph: &Graph| View::of(graph, &life.test.case, node);
            view = life.control.read(now);
        }
        Self {
            life: Rc::clone(life),
            user: Rc::clone(user),
            worker,
            request,
            cuts: life.test.disks[view.disk].length.cuts(),
            view,
        }
    }

    /// Whether what it meant may have been cut off.
    pub(crate) fn is_cut(&self) -> bool {
        let length = &self.life.test.disks[self.view.disk].length;
        length.may_be_cut(self.cuts)
    }

    /// A range of the root in whole units, mostly small; `None` if the root is too short for one.
    fn range(&self) -> Option<(u64, u64)> {
        let test = &self.life.test;
        let unit = self.user.unit;
        let cells = self.view.bytes / unit;
        if cells == 0 {
            return None;
        }
        let most = match test.below(100) {
            0..3 => cells,
            _ => (8192 / unit).clamp(1, cells),
        };
        let mut count = 1 + test.below(most);
        let mut begin = test.below(cells - count + 1);
        if test.chance(300) {
            let aligned = (4096 / unit).clamp(1, cells);
            begin -= begin % aligned;
            count = count.next_multiple_of(aligned).min(cells - begin);
        }
        Some((begin * unit, count * unit))
    }

    /// Memory for a request: one piece or two, at alignments that the seed chooses.
    pub(crate) fn memory(&self, bytes: u64) -> Segments {
        let test = &self.life.test;
        let unit = [1, 16, 512, 4096][test.below(4) as usize];
        let part = match test.chance(300) {
            true => (1 + test.below(bytes)).next_multiple_of(unit).min(bytes),
            false => bytes,
        };
        let piece = |bytes: u64| {
            let skip = test.below(4096 / unit) * unit;
            Segments::allocate((skip + bytes) as usize, 4096).slice(skip, bytes)
        };
        match bytes - part {
            0 => piece(bytes),
            rest => Segments::join(vec![piece(part), piece(rest)]),
        }
    }

    pub(crate) fn on_disk(&self, offset: u64) -> u64 {
        self.view.base + offset
    }

    pub(crate) async fn read(self) {
        let Some((offset, bytes)) = self.range() else {
            return;
        };
        let test = &self.life.test;
        let into = self.memory(bytes);
        into.fill(0xa5);
        let at = self.on_disk(offset);
        let read = test.history(self.view.disk).begin_read(at, bytes);
        let started = self.start(|token| self.request.start_read(offset, into.clone(), token));
        let result = match is_whole(started, bytes).await {
            true => Ok(()),
            false => self.request.read(offset, into.clone()).await,
        };
        let data = result.is_ok().then(|| into.to_vec());
        let checked = test.history(self.view.disk).end_read(read, data.as_deref());
        if let Err(wrong) = checked {
            test.fail(format!("{:?} by {:?}: {wrong}", self.user.id, self.view));
        }
        self.check("a read", result);
    }

    pub(crate) async fn write(self) {
        if !self.user.writes {
            return self.read().await;
        }
        let Some((offset, bytes)) = self.range() else {
            return;
        };
        let test = &self.life.test;
        let tag = match test.chance(100) {
            // Zeroes, as data.
            true => 0,
            false => test.next_tag.replace(test.next_tag.get() + 1),
        };
        let flags = self.write_flags();
        let (from, at) = (self.memory(bytes), self.on_disk(offset));
        from.copy_from(&history::data(tag, at, bytes));
        let write = test.history(self.view.disk).begin_write(tag, at, bytes);
        let started = match flags.is_empty() {
            true => self.start(|token| self.request.start_write(offset, from.clone(), token)),
            false => None,
        };
        let result = match is_whole(started, bytes).await {
            true => {
                self.request.wrote();
                Ok(())
            }
            false => self.request.write(offset, from.clone(), flags).await,
        };
        self.end_write("a write", write, result, flags, (at, bytes));
    }

    async fn zero(self) {
        if !self.user.writes {
            return self.look().await;
        }
        let Some((offset, bytes)) = self.range() else {
            return;
        };
        let test = &self.life.test;
        let unmap = test.chance(600);
        let flags = self.write_flags();
        let mut how = ZeroFlags::empty();
        how.set(ZeroFlags::MAY_UNMAP, unmap);
        how.set(ZeroFlags::STABLE, flags.contains(WriteFlags::STABLE));
        let at = self.on_disk(offset);
        if unmap && test.chance(500) {
            // What is remembered of the range from now on must be forgotten.
            let _ = self.request.block_status(true, offset, bytes).await;
        }
        let write = test.history(self.view.disk).begin_write(0, at, bytes);
        let begun = write.begun();
        let result = self.request.write_zeroes(offset, bytes, how).await;
        let ended = self.end_write("zeroing", write, result, flags, (at, bytes));
        if result.is_ok() && unmap {
            self.look_at_hole(offset, bytes, (begun, ended)).await;
        }
    }

    /// A range that was just given back to the host is known to be zero.
    async fn look_at_hole(&self, offset: u64, bytes: u64, (begun, ended): (u32, u32)) {
        let test = &self.life.test;
        let properties = &test.case.disks[self.view.disk].properties;
        let regular = properties.file_type == blockcore::engine::FileType::Regular;
        let (at, block) = (self.on_disk(offset), 4096);
        let begin = at.next_multiple_of(block);
        let end = (at + bytes) / block * block;
        // A host that cannot say where its data is has data everywhere.
        let tells = test.case.faults.call_error_permille == 0;
        let is_image = test.case.disks[self.view.disk].cluster.is_some();
        if !tells || !properties.punches || !regular || is_image || !self.view.unmap || begin >= end
        {
            return;
        }
        let from = begin - self.view.base;
        let status = self.request.block_status(true, from, end - begin).await;
        let Ok(status) = status else { return };
        let history = test.history(self.view.disk);
        let untouched = history.is_untouched(begin, end - begin, begun, ended);
        if untouched && !status.flags.contains(StatusFlags::ZERO) {
            test.fail(format!(
                "{} bytes at {from:#x} of {:?} were given back, and are {:?}",
                end - begin,
                self.view,
                status
            ));
        }
    }

    async fn discard(self) {
        if !self.user.writes {
            return self.read().await;
        }
        let Some((offset, bytes)) = self.range() else {
            return;
        };
        let test = &self.life.test;
        let at = self.on_disk(offset);
        let write = test.history(self.view.disk).begin_write(0, at, bytes);
        let result = self.request.discard(offset, bytes).await;
        test.history(self.view.disk).end_discard(write);
        self.check("a discard", result);
    }

    async fn flush(self) {
        let test = &self.life.test;
        let length = &test.disks[self.view.disk].length;
        let state = length.state();
        let flush = test.history(self.view.disk).begin_flush();
        let result = self.request.flush().await;
        if result.is_ok() {
            let path = &test.disks[self.view.disk].path;
            length.flushed(state, test.simulation.lost_syncs(path));
        }
        let flushed = match result {
            Ok(()) => Flushed::Done,
            Err(IoError::FlushLost) => Flushed::Lost,
            Err(_) => Flushed::Nothing,
        };
        test.history(self.view.disk).end_flush(flush, flushed);
        self.check("a flush", result);
    }

    /// Asks what a range is: where it is zero, zeroes must be there.
    async fn look(self) {
        let Some((offset, bytes)) = self.range() else {
            return;
        };
        let test = &self.life.test;
        let exact = test.chance(700);
        let read = test
            .history(self.view.disk)
            .begin_read(self.on_disk(offset), bytes);
        let status = self.request.block_status(exact, offset, bytes).await;
        let zeroes = match status {
            Ok(status) if status.flags.contains(StatusFlags::ZERO) => {
                test.count(|totals| &mut totals.zero_answers);
                Some(vec![0; status.bytes.min(bytes) as usize])
            }
            Ok(status) => {
                if status.bytes == 0 && !self.is_cut() {
                    test.fail("a status of no bytes inside of a node".into());
                }
                None
            }
            Err(_) => None,
        };
        let checked = test
            .history(self.view.disk)
            .end_read(read, zeroes.as_deref());
        if let Err(wrong) = checked {
            test.fail(format!(
                "{status:?} at {offset:#x} of {:?}: {wrong}",
                self.view
            ));
        }
        self.check("a look", status.map(|_| ()));
    }

    async fn out_of_range(self) {
        let test = &self.life.test;
        if test.case.disks[self.view.disk].resizes {
            // Somebody may make it longer meanwhile.
            return;
        }
        let (end, unit) = (self.view.bytes, self.user.unit);
        let (into, flags) = (self.memory(unit), WriteFlags::empty());
        let mut results = vec![self.request.read(end, into.clone()).await];
        if self.user.writes {
            results.push(self.request.discard(end, unit).await);
            // The file below grows for whoever may make it.
            if self.view.path.len() > 1 {
                results.push(self.request.write(end, into, flags).await);
            }
        }
        if results
            .iter()
            .any(|result| *result != Err(IoError::OutOfRange))
        {
            test.fail(format!(
                "past the end of {:?} everything fails, and not so: {results:?}",
                self.view
            ));
        }
    }

    fn write_flags(&self) -> WriteFlags {
        match self.life.test.chance(100) {
            true => WriteFlags::STABLE,
            false => WriteFlags::empty(),
        }
    }

    /// Starts an operation without a task, if that is possible.
    fn start(
        &self,
        start: impl FnOnce(u64) -> Result<(), Segments>,
    ) -> Option<impl Future<Output = OpResult>> {
        let token = self.life.test.random.borrow_mut().bits();
        start(token).ok()?;
        self.life.test.count(|totals| &mut totals.fast);
        let (done, wait) = oneshot::channel();
        let fast = &self.life.workers[self.worker].1;
        fast.borrow_mut().insert(token, done);
        Some(async move { wait.await.expect("the event comes").0 })
    }

    pub(crate) fn end_write(
        &self,
        what: &str,
        write: history::Write,
        result: Result<(), IoError>,
        flags: WriteFlags,
        (at, bytes): (u64, u64),
    ) -> u32 {
        let test = &self.life.test;
        let outcome = match result {
            Ok(()) if flags.contains(WriteFlags::STABLE) => Outcome::Stable,
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::Failed,
        };
        if result.is_ok() {
            self.wrote_to(at + bytes);
        }
        let mut history = test.history(self.view.disk);
        history.end_write(write, outcome);
        let ended = history.now();
        if result == Err(IoError::FlushLost) {
            let flush = history.begin_flush();
            history.end_flush(flush, Flushed::Lost);
        }
        drop(history);
        // A stable one is marked when it is written, and completes when it is durable: whoever looks and clears
        // in between has the data.
        if result.is_ok() && !flags.contains(WriteFlags::STABLE) {
            self.life.expect_marks(&self.view, at, bytes);
        }
        self.check(what, result);
        ended
    }

    pub(crate) fn check(&self, what: &str, result: Result<(), IoError>) {
        let Err(error) = result else { return };
        let test = &self.life.test;
        if error == IoError::OutOfRange && self.is_cut() {
            return test.count(|totals| &mut totals.cut_short);
        }
        test.count(|totals| &mut totals.failed);
        let faults = &test.case.faults;
        let syncs = faults.sync_error_permille > 0;
        let fails = faults.read_error_permille > 0
            || faults.write_error_permille > 0
            || faults.allocate_error_permille > 0
            || faults.call_error_permille > 0
            || syncs;
        let explained = match error {
            IoError::Failed => fails,
            IoError::NoSpace => faults.no_space_permille > 0,
            IoError::FlushLost => syncs,
            _ => false,
        };
        if !explained {
            test.fail(format!(
                "{what} of {:?} fails with {error:?}, which nothing explains",
                self.view
            ));
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // Before the request itself ends.
        self.user.in_flight.set(self.user.in_flight.get() - 1);
    }
}
