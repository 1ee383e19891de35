//! Exports: a node offered to a guest, and where its virtqueues are served.
//!
//! An export outlives its front-ends: which worker serves which queue, the write cache mode, what becomes
//! of requests that fail and the counters are here, while what one connection negotiated is in its
//! session.
//!
//! Threads: the control thread. Workers are asked by message and waited for without blocking; one
//! change of an export's queues runs at a time, the others wait in order.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockcore::driver::Limits;
use blockcore::graph::{Control, ExportState, RootId, RootSpec, RootUser};
use blockcore::io::account::{Account, AccountOptions, AccountSum, Histogram, Kind, Recorder};
use blockcore::io::policy::IoStatus;
use blockcore::io::{ContextHandle, InFlight, Plan};
use blockcore::mailbox::Mailbox;
use blockcore::turns::Turns;
use blockcore::{Error, IoError};
use futures_channel::oneshot;

use crate::config::ExportConfig;
use crate::vhost_user::memory::GuestMap;
use crate::virtio::blk::{self, DiskInfo};
use crate::virtio::queue::RingState;
use crate::worker::{
    Command, DeviceId, Disk, HeldRequest, Holds, Notice, Parked, QueueKey, StartQueue, Stop,
};

/// A worker as the control thread knows it.
#[derive(Clone)]
pub struct WorkerHandle {
    /// For commands.
    pub commands: Arc<Mailbox<Command>>,
    /// For the roots of the disks that it serves.
    pub context: ContextHandle,
}

/// A queue as a session wants it served.
pub struct QueueSetup {
    /// Where its ring is.
    pub ring: RingState,
    /// The guest's memory.
    pub memory: Arc<GuestMap>,
    /// Readable when the guest kicks.
    pub kick: Option<Arc<OwnedFd>>,
    /// Written to when the guest is to be told.
    pub call: Option<Arc<OwnedFd>>,
    /// Written to when the ring is broken.
    pub error: Option<Arc<OwnedFd>>,
    /// Whether the guest can flush; one that cannot gets every write stable.
    pub guest_flushes: bool,
    /// Ends the front-end's connection, without waiting.
    pub hang_up: Arc<dyn Fn() + Send + Sync>,
}

/// What an export's root has besides its permissions.
#[derive(Default)]
pub struct RootSide {
    /// Who is told what happens to the node.
    pub user: Option<Rc<dyn RootUser>>,
    /// Where changes of what the guest reads are recorded ahead.
    pub state: Option<Rc<ExportState>>,
}

/// See the module's header.
pub struct Export {
    config: ExportConfig,
    device: DeviceId,
    control: Control,
    root: RootId,
    block_bytes: u32,
    writeback: Cell<bool>,
    workers: Vec<WorkerHandle>,
    /// The worker of each queue, by index.
    assignment: RefCell<Vec<usize>>,
    /// What was counted, by queue.
    accounts: Vec<Arc<Account>>,
    /// Who writes the accounts; with the workers of the queues that are served.
    recorders: RefCell<Vec<Option<Recorder>>>,
    /// Requests of no known kind, and broken rings.
    nonsense: Arc<AtomicU64>,
    holds: Arc<Holds>,
    /// Queues that are served, with how they were set up.
    running: RefCell<BTreeMap<u16, QueueSetup>>,
    /// Held requests of queues that are to be started again, with the rings that they belong to.
    parked: RefCell<BTreeMap<u16, (RingState, Vec<Parked>)>>,
    turns: Turns,
}

impl Export {
    /// Offers a node; its queues go to `workers` in turn, beginning with the one numbered `first`. What
    /// happens to held requests is posted to `notices`.
    ///
    /// # Errors
    ///
    /// The node does not exist, is held by somebody, is read-only and should be written to, or
    /// cannot be a disk with this block size.
    pub async fn new(
        config: ExportConfig,
        device: DeviceId,
        control: &Control,
        workers: Vec<WorkerHandle>,
        first: usize,
        root: RootSide,
        notices: Arc<Mailbox<Notice>>,
    ) -> Result<Rc<Self>, Error> {
        config.check()?;
        let block_bytes = control.read(|graph| {
            let node = graph.node(&config.node)?;
            let name = graph.describe(node);
            block_bytes(&config, &name, node.bytes(), node.limits())
        })?;
        // A change of length is told to the guest; other writers would corrupt its disk.
        let who = format!("export '{}'", config.id);
        let spec = match config.writable {
            true => RootSpec::writer(who),
            false => RootSpec::reader(who),
        };
        let spec = RootSpec {
            user: root.user,
            state: root.state,
            ..spec.in_units_of(block_bytes)
        };
        let root = control.add_root(&config.node, spec).await?;
        for worker in &workers {
            if let Err(error) = control.attach(root, &worker.context).await {
                control.remove_root(root).await?;
                return Err(error);
            }
        }
        let queues = usize::from(config.queues);
        let now = control.context().engine().now();
        let accounts = (0..queues).map(|_| Account::open(AccountOptions::default(), now));
        let accounts: Vec<_> = accounts.collect::<Result<_, _>>()?;
        let (accounts, recorders) = accounts.into_iter().map(|(a, r)| (a, Some(r))).unzip();
        let mailboxes = workers.iter().map(|worker| Arc::clone(&worker.commands));
        let holds = Holds::new(
            config.id.as_str().into(),
            device,
            config.on_error,
            config.retry_held,
            mailboxes.collect(),
            notices,
        );
        Ok(Rc::new(Self {
            device,
            control: control.clone(),
            root,
            block_bytes,
            writeback: Cell::new(!config.writethrough),
            assignment: RefCell::new((0..queues).map(|i| (first + i) % workers.len()).collect()),
            workers,
            accounts,
            recorders: RefCell::new(recorders),
            nonsense: Arc::default(),
            holds,
            running: RefCell::default(),
            parked: RefCell::default(),
            turns: Turns::default(),
            config,
        }))
    }

    /// How it was asked for.
    pub fn config(&self) -> &ExportConfig {
        &self.config
    }

    /// What the guest sees of the disk, now.
    pub fn info(&self) -> DiskInfo {
        let plan = self.plan();
        let limits = plan.limits();
        DiskInfo {
            bytes: plan.bytes(),
            block_bytes: self.block_bytes,
            physical_block_bytes: limits.physical_block_bytes.max(self.block_bytes),
            optimal_io_bytes: limits.optimal_io_bytes,
            discard_granularity_bytes: limits.discard_granularity_bytes,
            queues: self.config.queues,
            read_only: !self.config.writable,
            unmap: plan.modes().unmap,
            writeback: self.writeback.get(),
        }
    }

    /// Serves a queue. Requests that were held when it was [suspended](Self::suspend_queue) are held
    /// again, if the ring goes on where it was.
    ///
    /// # Errors
    ///
    /// What is wrong with its ring.
    pub async fn start_queue(&self, index: u16, setup: QueueSetup) -> Result<(), String> {
        let _turn = self.turns.next().await;
        let parked = self.parked.borrow_mut().remove(&index);
        let goes_on =
            |ring: &RingState| (ring.size, ring.next) == (setup.ring.size, setup.ring.next);
        let parked = parked.filter(|(ring, _)| goes_on(ring));
        self.start(
            index,
            setup,
            parked.map_or_else(Vec::new, |(_, parked)| parked),
        )
        .await
    }

    /// Stops a queue with nothing of it in flight; `None` if it was not served. Held requests complete
    /// with the failures that they met.
    pub async fn stop_queue(&self, index: u16) -> Option<RingState> {
        let _turn = self.turns.next().await;
        // Of an earlier suspension: their ring is gone.
        self.parked.borrow_mut().remove(&index);
        let (setup, _) = self.stop(index, Stop::End).await?;
        Some(setup.ring)
    }

    /// Stops a queue that is to be started again, set up another way: held requests go on being held, and
    /// count as taken in the ring's state. `None` if it was not served.
    pub async fn suspend_queue(&self, index: u16) -> Option<RingState> {
        let _turn = self.turns.next().await;
        let (setup, parked) = self.stop(index, Stop::TakeAlong).await?;
        if !parked.is_empty() {
            let parked = (setup.ring, parked);
            self.parked.borrow_mut().insert(index, parked);
        }
        Some(setup.ring)
    }

    /// Tries held requests again, on all workers. Those that fail again are held again, and reported.
    pub async fn resume(&self) {
        // Not while a queue is on its way with some of them.
        let _turn = self.turns.next().await;
        self.holds.reset_status();
        for (_, parked) in self.parked.borrow_mut().values_mut() {
            parked.iter_mut().for_each(Parked::resume);
        }
        let device = self.device;
        self.ask_all(|reply| Command::Resume(device, reply)).await;
    }

    /// The requests that are held, but for those of queues that are moved or set up anew just now.
    pub async fn held(&self) -> Vec<HeldRequest> {
        let device = self.device;
        let held = self.ask_all(|reply| Command::ListHeld(device, reply)).await;
        held.into_iter().flatten().collect()
    }

    /// The requests that the disk is working on, each with the number of its worker; for messages.
    pub async fn in_flight(&self) -> Vec<(usize, InFlight)> {
        requests_of(self.root, &self.workers).await
    }

    /// Whether the guest's requests were stopped for a failure since the last resume; `None` if the
    /// export's policies never stop.
    pub fn io_status(&self) -> Option<IoStatus> {
        self.holds.status()
    }

    /// Tells the guest of a queue's completions by another descriptor.
    pub async fn set_call(&self, index: u16, call: Option<Arc<OwnedFd>>) {
        let _turn = self.turns.next().await;
        match self.running.borrow_mut().get_mut(&index) {
            Some(setup) => setup.call.clone_from(&call),
            None => return,
        }
        let key = self.key(index);
        self.ask(index, |reply| Command::SetCall(key, call, reply))
            .await;
    }

    /// Changes whether writes may complete before they are stable. What completed before a change to
    /// "not" is durable when this returns: the guest sends no more flushes for it.
    ///
    /// # Errors
    ///
    /// What was written before could not be flushed.
    pub async fn set_writeback(&self, writeback: bool) -> Result<(), IoError> {
        let _turn = self.turns.next().await;
        self.writeback.set(writeback);
        let device = self.device;
        self.ask_all(|reply| Command::SetWriteback(device, writeback, reply))
            .await;
        if writeback || !self.config.writable {
            return Ok(());
        }
        // One flush for all workers, also for what queues wrote that have been stopped or moved since.
        self.flush().await
    }

    /// Makes durable what the guest's queues have completed, on whichever worker.
    ///
    /// # Errors
    ///
    /// What could not be made durable.
    pub async fn flush(&self) -> Result<(), IoError> {
        let root = self.control.root_here(self.root);
        root.map_err(|_| IoError::Failed)?.flush().await
    }

    /// Moves a queue to another worker, running or not. Held requests go along.
    ///
    /// # Errors
    ///
    /// There is no such queue or worker.
    pub async fn move_queue(&self, index: u16, worker: usize) -> Result<(), Error> {
        let known = usize::from(index) < self.assignment.borrow().len();
        if !known || worker >= self.workers.len() {
            return Err(Error::invalid(format!(
                "export '{}' has no queue {index}, or there is no worker {worker}",
                self.config.id
            )));
        }
        let _turn = self.turns.next().await;
        let stopped = self.stop(index, Stop::TakeAlong).await;
        self.assignment.borrow_mut()[usize::from(index)] = worker;
        if let Some((setup, parked)) = stopped {
            // A queue that nobody serves would hang its guest; a lost connection it can see.
            let hang_up = Arc::clone(&setup.hang_up);
            let started = self.start(index, setup, parked).await;
            started.inspect_err(|_| hang_up()).map_err(Error::invalid)?;
        }
        Ok(())
    }

    /// Which worker serves a queue.
    pub fn worker_of(&self, index: u16) -> Option<usize> {
        self.assignment.borrow().get(usize::from(index)).copied()
    }

    /// Gives the node up. The export's queues have been stopped.
    ///
    /// # Errors
    ///
    /// What a node that went with it could not write back.
    pub async fn close(&self) -> Result<(), Error> {
        debug_assert!(self.running.borrow().is_empty(), "queues are stopped first");
        self.control.remove_root(self.root).await
    }

    /// The disk below.
    pub fn root(&self) -> RootId {
        self.root
    }

    /// What the requests of its guest need of the graph, now.
    pub fn plan(&self) -> Arc<Plan> {
        let plan = self.control.read(|graph| graph.plan(self.root));
        plan.expect("an export has its root until it is closed")
    }

    /// What its guests' requests counted as, all queues together.
    pub fn account(&self) -> AccountSum {
        let mut sum = AccountSum::new(self.control.context().engine().now());
        for account in &self.accounts {
            sum.add(account);
        }
        sum
    }

    /// Counts latencies of one kind of requests from now on, in bins between these boundaries; in none
    /// without boundaries.
    ///
    /// # Errors
    ///
    /// As [`Histogram::new`]; nothing has changed.
    pub fn set_histogram(&self, kind: Kind, boundaries_ns: Option<&[u64]>) -> Result<(), Error> {
        let histogram = boundaries_ns.map(Histogram::new).transpose()?;
        for account in &self.accounts {
            account.set_histogram(kind, histogram.as_ref().map(Histogram::fresh));
        }
        Ok(())
    }

    /// One line of counters, as `SIGUSR1` prints it: requests that ended, well or not, by kind; those that
    /// failed or made no sense; and the average latency of each kind in microseconds.
    pub fn stats_line(&self) -> String {
        let sum = self.account();
        let kind = |kind| sum.kind(kind);
        let ended = |one| kind(one).operations + kind(one).failed;
        let errors: u64 = Kind::ALL
            .into_iter()
            .map(|one| kind(one).failed + kind(one).invalid)
            .sum();
        let average_us = |one| {
            let average_ns = kind(one).time_ns.checked_div(ended(one));
            average_ns.unwrap_or(0) / 1000
        };
        format!(
            "stats export={} reads={} writes={} flushes={} discards={} errors={} host_syncs={} \
             read_us={} write_us={} flush_us={} discard_us={} zero_us={}",
            self.config.id,
            ended(Kind::Read),
            ended(Kind::Write),
            ended(Kind::Flush),
            ended(Kind::Discard) + ended(Kind::WriteZeroes),
            errors + self.nonsense.load(Ordering::Relaxed),
            self.plan().host_syncs(),
            average_us(Kind::Read),
            average_us(Kind::Write),
            average_us(Kind::Flush),
            average_us(Kind::Discard),
            average_us(Kind::WriteZeroes),
        )
    }

    fn key(&self, index: u16) -> QueueKey {
        QueueKey {
            device: self.device,
            index,
        }
    }

    async fn start(
        &self,
        index: u16,
        setup: QueueSetup,
        parked: Vec<Parked>,
    ) -> Result<(), String> {
        let gone = || "its worker has ended".to_owned();
        let recorder = self.recorders.borrow_mut()[usize::from(index)].take();
        let start = StartQueue {
            key: self.key(index),
            ring: setup.ring,
            memory: Arc::clone(&setup.memory),
            kick: setup.kick.clone(),
            call: setup.call.clone(),
            error: setup.error.clone(),
            root: self.root,
            disk: Disk {
                export: self.config.id.as_str().into(),
                block_bytes: self.block_bytes,
                read_only: !self.config.writable,
                id: blk::id(&self.config.serial),
                holds: Arc::clone(&self.holds),
            },
            writeback: self.writeback.get() && setup.guest_flushes,
            hang_up: Arc::clone(&setup.hang_up),
            parked,
            // It went with its worker, if it is not here.
            recorder: recorder.ok_or_else(gone)?,
            nonsense: Arc::clone(&self.nonsense),
        };
        let started = self.ask(index, |reply| Command::Start(Box::new(start), reply));
        if let Err(refused) = started.await.ok_or_else(gone)? {
            self.keep_recorder(index, refused.start.recorder);
            return Err(refused.why);
        }
        self.running.borrow_mut().insert(index, setup);
        Ok(())
    }

    async fn stop(&self, index: u16, how: Stop) -> Option<(QueueSetup, Vec<Parked>)> {
        if !self.running.borrow().contains_key(&index) {
            return None;
        }
        let key = self.key(index);
        let stopped = self.ask(index, |reply| Command::Stop(key, how, reply));
        let stopped = stopped.await.flatten();
        let mut setup = self.running.borrow_mut().remove(&index)?;
        let Some(stopped) = stopped else {
            return Some((setup, Vec::new()));
        };
        setup.ring = stopped.ring;
        self.keep_recorder(index, stopped.recorder);
        Some((setup, stopped.parked))
    }

    fn keep_recorder(&self, index: u16, recorder: Recorder) {
        self.recorders.borrow_mut()[usize::from(index)] = Some(recorder);
    }

    /// Asks every worker and waits for the answers; one that has ended gives none.
    async fn ask_all<T>(&self, command: impl Fn(oneshot::Sender<T>) -> Command) -> Vec<T> {
        let mut answers = Vec::new();
        for worker in &self.workers {
            let (reply, answer) = oneshot::channel();
            worker.commands.post(command(reply));
            answers.push(answer);
        }
        let mut all = Vec::new();
        for answer in answers {
            all.extend(answer.await);
        }
        all
    }

    /// Asks the worker of a queue and waits for its answer; `None` if the worker is gone.
    async fn ask<T>(
        &self,
        index: u16,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Option<T> {
        let worker = self.worker_of(index)?;
        let (reply, answer) = oneshot::channel();
        self.workers[worker].commands.post(command(reply));
        answer.await.ok()
    }
}

/// The requests of a root that are under way, each with the number of its worker.
pub(crate) async fn requests_of(root: RootId, workers: &[WorkerHandle]) -> Vec<(usize, InFlight)> {
    let mut answers = Vec::new();
    for worker in workers {
        let (reply, answer) = oneshot::channel();
        worker.context.post(move |context| {
            let root = context.root(root);
            let _ = reply.send(root.map_or_else(Vec::new, |root| root.requests()));
        });
        answers.push(answer);
    }
    let mut all = Vec::new();
    for (worker, answer) in answers.into_iter().enumerate() {
        let requests = answer.await.unwrap_or_default();
        all.extend(requests.into_iter().map(|request| (worker, request)));
    }
    all
}

/// The block size that the guest is told, if the node can be a disk with it.
fn block_bytes(
    config: &ExportConfig,
    node: &str,
    bytes: u64,
    limits: &Limits,
) -> Result<u32, Error> {
    let block = config.block_bytes.unwrap_or(limits.logical_block_bytes);
    let id = &config.id;
    if block < limits.logical_block_bytes {
        return Err(Error::invalid(format!(
            "export '{id}' cannot have blocks of {block} bytes: the device below {node} has \
             blocks of {}",
            limits.logical_block_bytes
        )));
    }
    if !bytes.is_multiple_of(u64::from(block)) {
        return Err(Error::invalid(format!(
            "export '{id}': {node} has {bytes} bytes, which is not a multiple of its block \
             size ({block} bytes); extend the image to {}, for example with 'truncate -s'",
            bytes.next_multiple_of(u64::from(block))
        )));
    }
    Ok(block)
}
