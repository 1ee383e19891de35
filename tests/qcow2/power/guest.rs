//! What the guests ask, and what they expect.

use std::rc::Rc;

use blockcore::IoError;
use blockcore::driver::{StatusFlags, WriteFlags, ZeroFlags};
use blockcore::engine::{OpResult, preempt};
use blockcore::io::buffer::Segments;
use blockcore::io::{Request, RequestKind};
use futures_channel::oneshot;
use harness::history::{self, Flushed, Outcome};

use super::Disk;
use super::life::Life;

/// A guest's request that has entered.
struct Asking {
    life: Rc<Life>,
    worker: usize,
    request: Request,
    /// How long the disk is as long as the request is under way.
    bytes: u64,
}

impl Life {
    /// Starts a task for one random request.
    pub(super) fn issue(self: &Rc<Self>, worker: usize) {
        let what = self.disk.below(100);
        let life = Rc::clone(self);
        self.count_outstanding(worker, 1);
        self.disk.count(|totals| &mut totals.requests);
        self.workers[worker].0.context().spawn(async move {
            let asking = Asking::enter(&life, worker).await;
            match what {
                0..15 => asking.read().await,
                15..50 => asking.write().await,
                50..62 => asking.zero().await,
                62..74 => asking.discard().await,
                74..84 => asking.compress().await,
                84..94 => asking.flush().await,
                _ => asking.look().await,
            }
            life.count_outstanding(worker, -1);
        });
    }

    fn count_outstanding(&self, worker: usize, by: isize) {
        let count = &self.outstanding[worker];
        count.set(count.get().wrapping_add_signed(by));
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
    async fn enter(life: &Rc<Life>, worker: usize) -> Self {
        let on = &life.workers[worker].0;
        preempt(&**on.engine()).await;
        let root = on.context().root(life.root.get().expect("open"));
        let root = root.expect("attached");
        let request = root.enter(RequestKind::Other, 0, 0).await;
        Self {
            life: Rc::clone(life),
            worker,
            request,
            bytes: root.bytes(),
        }
    }

    fn disk(&self) -> &Disk {
        &self.life.disk
    }

    /// A range of the disk in whole units: a few sectors, a few clusters, or any number.
    fn range(&self) -> (u64, u64) {
        let disk = self.disk();
        let case = &self.life.case;
        let whole = self.bytes / case.grain * case.grain;
        let unit = match disk.below(3) {
            0 => case.grain,
            1 => 512.max(case.grain),
            _ => case.cluster,
        };
        let most = match disk.below(20) {
            0 if case.cluster < 16384 => whole,
            0..5 => (20 * case.cluster).min(1 << 16),
            5..12 => 3 * case.cluster,
            _ => 2048.max(case.grain),
        };
        // Mostly near the beginning, so that things meet.
        let reach = match disk.chance(600) {
            true => whole.min(24 * case.cluster),
            false => whole,
        };
        let begin = disk.below(reach) / unit * unit;
        let bytes = (1 + disk.below(most)).next_multiple_of(unit);
        let begin = begin / case.grain * case.grain;
        (begin, bytes.min(whole - begin))
    }

    /// Memory for a request: one piece or two.
    fn memory(&self, bytes: u64) -> Segments {
        let disk = self.disk();
        if bytes < 1024 || !disk.chance(200) {
            return Segments::allocate(bytes as usize, 4096);
        }
        let first = (1 + disk.below(bytes / 512 - 1)) * 512;
        Segments::join(vec![
            Segments::allocate(first as usize, 4096),
            Segments::allocate((bytes - first) as usize, 4096),
        ])
    }

    async fn read(self) {
        let (offset, bytes) = self.range();
        let disk = self.disk();
        let into = self.memory(bytes);
        into.fill(0xa5);
        let read = disk.history().begin_read(offset, bytes);
        let started = self.start(|token| self.request.start_read(offset, into.clone(), token));
        let result = match is_whole(started, bytes).await {
            true => Ok(()),
            false => self.request.read(offset, into.clone()).await,
        };
        let data = result.is_ok().then(|| into.to_vec());
        if let Err(wrong) = disk.history().end_read(read, data.as_deref()) {
            disk.fail(wrong.to_string());
        }
        self.check("a read", result);
    }

    async fn write(self) {
        let (offset, bytes) = self.range();
        let disk = self.disk();
        let tag = match disk.chance(50) {
            // Zeroes, as data.
            true => 0,
            false => disk.tag(false),
        };
        let stable = disk.chance(60);
        let flags = match stable {
            true => WriteFlags::STABLE,
            false => WriteFlags::empty(),
        };
        let from = self.memory(bytes);
        from.copy_from(&history::data(tag, offset, bytes));
        let write = disk.history().begin_write(tag, offset, bytes);
        let started = match stable {
            true => None,
            false => self.start(|token| self.request.start_write(offset, from.clone(), token)),
        };
        let result = match is_whole(started, bytes).await {
            true => {
                self.request.wrote();
                Ok(())
            }
            false => self.request.write(offset, from.clone(), flags).await,
        };
        self.end_write("a write", write, result, stable);
    }

    async fn zero(self) {
        let (offset, bytes) = self.range();
        let disk = self.disk();
        let stable = disk.chance(60);
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, disk.chance(600));
        flags.set(ZeroFlags::STABLE, stable);
        let write = disk.history().begin_write(0, offset, bytes);
        let result = self.request.write_zeroes(offset, bytes, flags).await;
        self.end_write("zeroing", write, result, stable);
    }

    async fn discard(self) {
        let (offset, bytes) = self.range();
        let disk = self.disk();
        let write = disk.history().begin_write(0, offset, bytes);
        let result = self.request.discard(offset, bytes).await;
        disk.history().end_discard(write);
        self.check("a discard", result);
    }

    /// Writes whole clusters compressed.
    async fn compress(self) {
        let disk = self.disk();
        let cluster = self.life.case.cluster;
        let clusters = self.bytes / cluster;
        if self.life.case.data_file || clusters == 0 {
            return self.write().await;
        }
        let first = disk.below(clusters.min(24));
        let count = (1 + disk.below(4)).min(clusters - first);
        let (offset, bytes) = (first * cluster, count * cluster);
        // Some cannot be made smaller.
        let tag = disk.tag(!disk.chance(100));
        let from = self.memory(bytes);
        from.copy_from(&history::data(tag, offset, bytes));
        let write = disk.history().begin_write(tag, offset, bytes);
        let io = self.request.io();
        let result = io.write_compressed(offset, from).await;
        disk.count(|totals| &mut totals.compressed);
        self.end_write("a compressed write", write, result, false);
    }

    async fn flush(self) {
        let disk = self.disk();
        let flush = disk.history().begin_flush();
        let result = self.request.flush().await;
        let flushed = match result {
            Ok(()) => Flushed::Done,
            Err(IoError::FlushLost) => Flushed::Lost,
            Err(_) => Flushed::Nothing,
        };
        disk.history().end_flush(flush, flushed);
        disk.count(|totals| &mut totals.flushes);
        self.check("a flush", result);
    }

    /// Asks what a range is: where it is zero, zeroes must be there.
    async fn look(self) {
        let (offset, bytes) = self.range();
        let disk = self.disk();
        let read = disk.history().begin_read(offset, bytes);
        let status = self.request.block_status(true, offset, bytes).await;
        let zeroes = match status {
            Ok(status) if status.flags.contains(StatusFlags::ZERO) => {
                Some(vec![0; status.bytes.min(bytes) as usize])
            }
            _ => None,
        };
        if let Err(wrong) = disk.history().end_read(read, zeroes.as_deref()) {
            disk.fail(format!("{status:?} at {offset:#x}: {wrong}"));
        }
        self.check("a look", status.map(|_| ()));
    }

    /// Starts an operation without a task, if that is possible.
    fn start(
        &self,
        start: impl FnOnce(u64) -> Result<(), Segments>,
    ) -> Option<impl Future<Output = OpResult>> {
        let token = self.disk().random.borrow_mut().bits();
        start(token).ok()?;
        self.disk().count(|totals| &mut totals.fast);
        let (done, wait) = oneshot::channel();
        let fast = &self.life.workers[self.worker].1;
        fast.borrow_mut().insert(token, done);
        Some(async move { wait.await.expect("the event comes").0 })
    }

    fn end_write(
        &self,
        what: &str,
        write: history::Write,
        result: Result<(), IoError>,
        stable: bool,
    ) {
        let disk = self.disk();
        let outcome = match result {
            Ok(()) if stable => Outcome::Stable,
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::Failed,
        };
        let mut history = disk.history();
        history.end_write(write, outcome);
        if result == Err(IoError::FlushLost) {
            let flush = history.begin_flush();
            history.end_flush(flush, Flushed::Lost);
        }
        drop(history);
        self.check(what, result);
    }

    fn check(&self, what: &str, result: Result<(), IoError>) {
        let Err(error) = result else { return };
        self.disk().count(|totals| &mut totals.failed);
        let case = &self.life.case;
        let explained = matches!(
            error,
            IoError::Failed | IoError::NoSpace | IoError::FlushLost
        );
        if !(case.fails && explained) {
            self.disk().fail(format!(
                "{what} fails with {error:?}, which nothing explains"
            ));
        }
    }
}
