//! The operator: changes of the graph under load, and tries at what must be refused.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use blockcore::drain::Scope;
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Change, NodeId, RootSpec};
use blockcore::options::Options;
use blockcore::throttle::{Limits, Rate};
use blockcore::{Error, ErrorKind};
use futures_channel::oneshot;

use crate::life::{Life, Place, User};
use crate::view::{difference, dump};

/// How long a request may wait for nothing that concerns it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the operator looks whether something has happened.
const LOOK: Duration = Duration::from_micros(50);

/// Filters that there are for operators.
const REAL_FILTERS: [&str; 4] = ["throttle", "copy-on-read", "compress", "preallocate"];

/// Which roots a drained section covers, by the graph as it is when that is asked.
enum Covered {
    All,
    Reaching(String),
    These(Vec<Rc<User>>),
}

/// How an attempt at a change ended.
pub(crate) enum Outcome {
    Committed,
    GivenUp,
    Refused(Error),
}

/// The locks on a file: byte, and whether it excludes others.
type Locks = Vec<(u64, bool)>;

impl Life {
    /// Starts the operator's work, which goes on until the life is to end.
    pub(crate) fn operate(self: &Rc<Self>) {
        let life = Rc::clone(self);
        self.spawn_task(async move {
            while !life.stopping.get() && !life.test.has_failed() {
                let rest = life.test.below(life.test.case.rest_us);
                life.rest(Duration::from_micros(rest)).await;
                if let Err(why) = life.work().await {
                    life.test.fail(why);
                }
                life.control.take_notices();
                // Somebody may have changed a length.
                life.update_views();
            }
        });
    }

    fn spawn_task(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        let life = Rc::clone(self);
        self.tasks.set(self.tasks.get() + 1);
        self.office.context().spawn(async move {
            task.await;
            life.tasks.set(life.tasks.get() - 1);
        });
    }

    pub(crate) async fn rest(&self, time: Duration) {
        self.office.context().delay(time).await;
    }

    async fn work(self: &Rc<Self>) -> Result<(), String> {
        match self.test.below(155) {
            150..155 => self.look_back().await,
            120..130 => self.work_on_marks().await,
            130..135 => {
                let disk = self.any_disk();
                self.mirror(disk).await
            }
            135..144 => {
                self.compare_mirror(self.any_disk()).await;
                Ok(())
            }
            144..150 => self.resize().await,
            100..106 => self.reopen_file().await,
            106..110 => self.write_for_a_while().await,
            110..114 => self.freeze().await,
            114..117 => self.insert_real_filter().await,
            117 => {
                self.change_rates();
                Ok(())
            }
            118 => {
                self.intrude();
                Ok(())
            }
            0..15 => self.insert_filter().await,
            15..25 => self.remove_filter().await,
            25..37 => self.reopen_part().await,
            37..47 => self.reopen_filters().await,
            47..52 => self.replace_child().await,
            52..65 => {
                self.drain_for_a_while();
                Ok(())
            }
            65..72 => self.wait_elsewhere().await,
            72..80 => self.move_root().await,
            80..87 => self.work_on_marks().await,
            87..92 => {
                let disk = self.any_disk();
                self.mirror(disk).await
            }
            92..96 => {
                self.compare_mirror(self.any_disk()).await;
                Ok(())
            }
            96..98 => self.claim_what_is_not_shared().await,
            _ => self.resize().await,
        }
    }

    /// Makes a change, or gives it up; then everything must be as it was.
    pub(crate) async fn attempt(
        self: &Rc<Self>,
        build: impl AsyncFnOnce(&mut Change) -> Result<(), Error>,
    ) -> Result<Outcome, String> {
        let test = &self.test;
        let mut change = self.control.begin().await;
        let roots: Vec<_> = self.roots.borrow().iter().map(|user| user.id).collect();
        let look = || {
            let dump = dump(&self.control, &test.case, &roots);
            (dump, self.locks() == self.needed_locks())
        };
        let before = look();
        let refused = match build(&mut change).await {
            Err(error) => {
                if test.chance(500) {
                    change.abort().await;
                } else {
                    drop(change);
                }
                Some(error)
            }
            Ok(()) => match change.prepare().await {
                Err(error) => Some(error),
                Ok(prepared) if test.chance(100) => {
                    drop(prepared);
                    None
                }
                Ok(prepared) => {
                    let closing = prepared.commit();
                    self.update_views();
                    test.count(|totals| &mut totals.changes);
                    if test.chance(800) {
                        let finished = closing.finish().await;
                        if let Err(error) = finished {
                            self.check_error("the end of a change", &error)?;
                        }
                    }
                    return Ok(Outcome::Committed);
                }
            },
        };
        test.count(|totals| &mut totals.given_up);
        // Whoever has the next turn finds nothing left of it, but locks that are being given up.
        self.control.begin().await.abort().await;
        let mut after = look();
        let end = self.office.context().engine().now() + Duration::from_secs(1);
        let is_over = || self.office.context().engine().now() >= end || self.has_intruder.get();
        while !after.1 && !is_over() {
            self.rest(LOOK).await;
            after = look();
        }
        if !after.1 && !self.has_intruder.get() {
            return Err(format!(
                "a change was given up; the locks were to be {:?} and are {:?}",
                self.needed_locks(),
                self.locks()
            ));
        }
        if let Some(difference) = difference(&before.0, &after.0) {
            return Err(format!("a change was given up ({refused:?}): {difference}"));
        }
        Ok(refused.map_or(Outcome::GivenUp, Outcome::Refused))
    }

    fn locks(&self) -> Vec<Locks> {
        let disks = self.test.disks.iter();
        let locks = disks.map(|disk| {
            let mut locks = self.test.simulation.locks(&disk.path);
            locks.sort_unstable();
            locks
        });
        locks.collect()
    }

    /// What keeps other processes from what the users of each file do not share: for each permission that
    /// they need byte 100 and so on, for each that they do not share byte 200 and so on.
    fn needed_locks(&self) -> Vec<Locks> {
        let bytes = |begin: u64, set: Permissions| {
            let bits = (0..8).filter(move |bit| set.bits() & (1 << bit) != 0);
            bits.map(move |bit| (begin + bit, false))
        };
        self.control.read(|graph| {
            let files = (0..self.test.disks.len()).map(|disk| {
                let node = graph.node(&format!("file{disk}")).expect("leaves stay");
                let (needs, shares) = graph.cumulative_permissions(node.id());
                let unshared = bytes(200, Permissions::all() - shares);
                bytes(100, needs).chain(unshared).collect()
            });
            files.collect()
        })
    }

    /// An attempt that only the host may foil.
    pub(crate) async fn change(
        self: &Rc<Self>,
        what: &str,
        build: impl AsyncFnOnce(&mut Change) -> Result<(), Error>,
    ) -> Result<bool, String> {
        match self.attempt(build).await? {
            Outcome::Committed => Ok(true),
            Outcome::GivenUp => Ok(false),
            Outcome::Refused(error) => self.check_error(what, &error).map(|()| false),
        }
    }

    async fn insert_filter(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let filters = self.filters();
        if filters.len() >= 5 {
            return self.remove_filter().await;
        }
        let disk = self.any_disk();
        let images = test.chance(400);
        let (below, name) = (self.any_node(disk, images), self.new_name());
        let ask = ["on", "off"][test.below(2) as usize];
        let options =
            format!("driver=pass-through,node-name={name},discard=unmap,ask={ask},file={below}");
        let fails = test.chance(150);
        let insert = async |change: &mut Change| {
            let options = Options::parse(&options, None)?;
            let filter = change.add(options, None).await?;
            let below = change.find(&below)?;
            change.replace_node(below, filter)?;
            match fails {
                true => Err(Error::new(ErrorKind::Io, "half way")),
                false => Ok(()),
            }
        };
        match self.attempt(insert).await? {
            Outcome::Refused(_) if fails => Ok(()),
            Outcome::Refused(error) => self.check_error("inserting a filter", &error),
            _ => Ok(()),
        }
    }

    fn filters_of(&self, drivers: &[&str]) -> Vec<String> {
        self.control.read(|graph| {
            let filters = graph.nodes().filter(|n| drivers.contains(&n.driver_name()));
            filters.map(|node| node.name().to_owned()).collect()
        })
    }

    /// Whether somewhere what is written is compressed in whole clusters: a write that does not come through
    /// there could be undone by one that does.
    pub(crate) fn has_compressing(&self) -> bool {
        !self.filters_of(&["compress"]).is_empty()
    }

    fn filters(&self) -> Vec<String> {
        self.filters_of(&["pass-through"])
    }

    fn any_filter(&self) -> Option<String> {
        let mut filters = self.filters_of(&REAL_FILTERS);
        filters.extend(self.filters());
        let chosen = self.test.below(filters.len() as u64) as usize;
        filters.get(chosen).cloned()
    }

    /// Rates for those who are throttled: none, or slow for a simulated disk.
    pub(crate) fn any_rates(test: &crate::Test) -> Limits {
        match test.chance(400) {
            true => Limits::default(),
            false => Limits {
                iops_total: Rate::per_second(500 + test.below(5000)),
                ..Limits::default()
            },
        }
    }

    fn change_rates(&self) {
        let changed = self
            .control
            .set_throttle_limits("slow", Self::any_rates(&self.test));
        changed.expect("they make sense");
    }

    /// One of the filters that there are for operators.
    async fn insert_real_filter(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let disk = self.any_disk();
        let is_image = test.case.disks[disk].cluster.is_some();
        let name = self.new_name();
        let there = self.filters_of(&REAL_FILTERS);
        if there.len() >= 3 {
            return self.remove_filter().await;
        }
        let (options, below) = match test.below(4) {
            0 => (
                "driver=throttle,throttle-group=slow",
                self.any_node(disk, true),
            ),
            1 => ("driver=copy-on-read", self.any_node(disk, false)),
            // All that is written goes through it, or its clusters would undo what does not.
            2 if is_image => ("driver=compress", format!("part{disk}")),
            // A file that nobody writes to any more cannot be cut off.
            3 if is_image && !test.case.disks[disk].auto_read_only => (
                "driver=preallocate,prealloc-align=4K,prealloc-size=64K",
                format!("file{disk}"),
            ),
            _ => return Ok(()),
        };
        let options = format!("{options},node-name={name},discard=unmap,file={below}");
        let insert = async |change: &mut Change| {
            let filter = change.add(Options::parse(&options, None)?, None).await?;
            let below = change.find(&below)?;
            change.replace_node(below, filter)
        };
        match self.attempt(insert).await? {
            Outcome::Committed => test.count(|totals| &mut totals.filters),
            Outcome::GivenUp => {}
            // A base is only read, and nothing is copied into it.
            Outcome::Refused(error) if error.kind() == ErrorKind::PermissionDenied => {}
            Outcome::Refused(error) => self.check_error(&options, &error)?,
        }
        Ok(())
    }

    async fn remove_filter(self: &Rc<Self>) -> Result<(), String> {
        let Some(filter) = self.any_filter() else {
            return Ok(());
        };
        let remove = async |change: &mut Change| {
            let id = change.find(&filter)?;
            let below = change.child(id, "file").expect("filters have one");
            change.replace_node(id, below)?;
            change.remove(&filter)
        };
        self.change("removing a filter", remove).await.map(|_| ())
    }

    /// Another part of a disk, or the same with other modes.
    async fn reopen_part(self: &Rc<Self>) -> Result<(), String> {
        let (test, disk) = (&self.test, self.any_disk());
        let options = Options::parse(&self.part_options(disk), None).expect("well-formed");
        let reopen = async |change: &mut Change| change.reopen(vec![options]).await;
        match self.attempt(reopen).await? {
            Outcome::Committed => {
                self.forget_marks(&format!("part{disk}"));
                self.settle().await;
                Ok(())
            }
            Outcome::GivenUp => Ok(()),
            Outcome::Refused(error) if error.kind() == ErrorKind::Invalid => {
                // Its child may be another, shorter disk by now.
                Ok(())
            }
            Outcome::Refused(error) if error.kind() == ErrorKind::Busy => {
                // Whoever uses a part needs the length to stay, and somebody may change it.
                test.count(|totals| &mut totals.refused);
                Ok(())
            }
            Outcome::Refused(error) => self.check_error("reopening a part", &error),
        }
    }

    /// What follows from a commit in the background: bitmaps are made to fit.
    pub(crate) async fn settle(&self) {
        self.rest(Duration::from_millis(1)).await;
        self.control.begin().await.abort().await;
    }

    /// Reopens filters, one of which may refuse: then none is.
    async fn reopen_filters(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let filters = self.filters();
        let chosen: Vec<_> = filters.iter().filter(|_| test.chance(600)).collect();
        if chosen.is_empty() {
            return Ok(());
        }
        let refuses = test
            .chance(400)
            .then(|| test.below(chosen.len() as u64) as usize);
        let entries: Vec<_> = chosen
            .iter()
            .enumerate()
            .map(|(number, name)| {
                let ask = ["on", "off"][test.below(2) as usize];
                let refuse = if Some(number) == refuses { "on" } else { "off" };
                let text = format!(
                    "driver=pass-through,node-name={name},discard=unmap,ask={ask},refuse={refuse}"
                );
                Options::parse(&text, None).expect("well-formed")
            })
            .collect();
        let reopen = async |change: &mut Change| change.reopen(entries).await;
        match self.attempt(reopen).await? {
            Outcome::Committed if refuses.is_some() => {
                Err("a filter that refuses is reopened".into())
            }
            Outcome::Refused(error)
                if refuses.is_some() && error.kind() == ErrorKind::Unsupported =>
            {
                test.count(|totals| &mut totals.refused);
                Ok(())
            }
            Outcome::Refused(error) => self.check_error("reopening filters", &error),
            _ => Ok(()),
        }
    }

    /// Gives a part another disk, or a filter another node: what its users read is another disk then.
    async fn replace_child(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        if self.has_compressing() {
            // Nobody may come to write past it.
            return Ok(());
        }
        let disk = self.any_disk();
        let node = self.any_node(disk, false);
        let child = self.any_node(self.any_disk(), false);
        let is_image = node == format!("part{disk}") && test.case.disks[disk].cluster.is_some();
        if node.starts_with("file") || is_image {
            return Ok(());
        }
        let replace = async |change: &mut Change| {
            let (node, child) = (change.find(&node)?, change.find(&child)?);
            change.set_child(node, "file", Some(child))
        };
        match self.attempt(replace).await? {
            Outcome::Committed => {
                // Offsets of every node above mean something else.
                let marks: Vec<_> = self.marks.borrow().iter().map(|m| m.node.clone()).collect();
                let above = marks.iter().filter(|node| !node.starts_with("file"));
                above.for_each(|node| self.forget_marks(node));
                self.settle().await;
                Ok(())
            }
            Outcome::GivenUp => Ok(()),
            // A loop; or another part keeps the length for itself.
            Outcome::Refused(error)
                if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Busy) =>
            {
                test.count(|totals| &mut totals.refused);
                Ok(())
            }
            Outcome::Refused(error) => self.check_error("replacing a child", &error),
        }
    }

    /// Drains a part of the graph for some time, beside whatever else goes on.
    fn drain_for_a_while(self: &Rc<Self>) {
        let test = &self.test;
        let (scope, users) = self.any_scope();
        let life = Rc::clone(self);
        let times = [test.below(1500), test.below(500)];
        let nested = test.chance(300).then(|| self.any_scope());
        self.spawn_task(async move {
            let section = life.control.drain(scope).await;
            life.check_quiet(&users);
            life.rest(Duration::from_micros(times[0])).await;
            if let Some((scope, more)) = nested {
                let inner = life.control.drain(scope).await;
                life.check_quiet(&more);
                life.rest(Duration::from_micros(times[1])).await;
                life.check_quiet(&more);
                drop(inner);
            }
            life.check_quiet(&users);
            drop(section);
            life.test.count(|totals| &mut totals.drains);
        });
    }

    /// Some scope, and which roots it covers.
    fn any_scope(&self) -> (Scope, Covered) {
        let test = &self.test;
        let all = self.roots.borrow().clone();
        let disk = test.below(test.disks.len() as u64) as usize;
        let name = self.any_node(disk, test.chance(300));
        let node = |name: &str| self.control.read(|graph| graph.node(name).map(|n| n.id()));
        let id: NodeId = node(&name).expect("just seen");
        match test.below(4) {
            0 => (Scope::All, Covered::All),
            1 => (Scope::Nodes(BTreeSet::from([id])), Covered::Reaching(name)),
            2 => (
                Scope::Subtrees(BTreeSet::from([id])),
                Covered::Reaching(name),
            ),
            _ => {
                let some: Vec<_> = all.into_iter().filter(|_| test.chance(500)).collect();
                let ids = some.iter().map(|user| user.id).collect();
                (Scope::Roots(ids), Covered::These(some))
            }
        }
    }

    fn check_quiet(&self, covered: &Covered) {
        let users = match covered {
            Covered::These(users) => users.clone(),
            _ => self.roots.borrow().clone(),
        };
        for user in users {
            if let Covered::Reaching(node) = covered
                && !user.view.borrow().reaches(node)
            {
                continue;
            }
            let requests = user.in_flight.get();
            if requests > 0 {
                self.test.fail(format!(
                    "{:?} has {requests} requests in flight in a drained section",
                    user.id
                ));
            }
        }
    }

    /// A request stays in flight at one root, which is being drained; requests at another go on.
    async fn wait_elsewhere(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let roots = self.roots.borrow().clone();
        let one = &roots[test.below(roots.len() as u64) as usize];
        let other = &roots[test.below(roots.len() as u64) as usize];
        let place = |user: &User| user.places.iter().position(|place| place.get().attached);
        let (Some(on), Some(other_on)) = (place(one), place(other)) else {
            return Ok(());
        };
        let (release, released) = oneshot::channel::<()>();
        let root = self.workers[on].0.context().root(one.id).expect("attached");
        let Some(request) = root.try_enter(blockcore::io::RequestKind::Other, 0, 0) else {
            return Ok(());
        };
        if one.id == other.id {
            return Ok(());
        }
        self.workers[on].0.context().spawn(async move {
            let _ = released.await;
            drop(request);
        });
        let (life, id) = (Rc::clone(self), one.id);
        let drained = Rc::new(Cell::new(false));
        let seen = Rc::clone(&drained);
        self.spawn_task(async move {
            let section = life.control.drain(Scope::Roots(BTreeSet::from([id]))).await;
            seen.set(true);
            drop(section);
        });
        let done = Rc::new(Cell::new(false));
        let ended = Rc::clone(&done);
        self.spawn_read(other, other_on, move || ended.set(true));
        let begun = self.office.context().engine().now();
        let other_root = self.workers[other_on].0.context().root(other.id);
        let other_root = other_root.expect("attached");
        // Another section may hold it, and wait for the first.
        while !done.get() && !other_root.is_held() {
            if self.office.context().engine().now() - begun > PATIENCE {
                return Err(format!(
                    "a request at {:?} waits for a drain of {:?}",
                    other.id, one.id
                ));
            }
            self.rest(LOOK).await;
        }
        if drained.get() {
            return Err(format!("{:?} is drained with a request in flight", one.id));
        }
        test.count(|totals| &mut totals.waited_elsewhere);
        drop(release);
        Ok(())
    }

    /// Takes a root from one worker to another.
    async fn move_root(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let roots = self.roots.borrow().clone();
        let user = &roots[test.below(roots.len() as u64) as usize];
        let worker = test.below(self.workers.len() as u64) as usize;
        let place = user.places[worker].get();
        if !place.attached {
            return self.attach(user, worker).await;
        }
        // Those that wait at the door go in first.
        user.places[worker].set(Place {
            attached: false,
            ..place
        });
        while user.places[worker].get().entering > 0 {
            self.rest(LOOK).await;
        }
        let handle = self.workers[worker].0.context().handle();
        self.control.detach(user.id, handle).await;
        test.count(|totals| &mut totals.moves);
        if user.places.iter().any(|place| place.get().attached) {
            return Ok(());
        }
        let next = test.below(self.workers.len() as u64) as usize;
        self.attach(user, next).await
    }

    /// Somebody who bears no writer comes to where there is one.
    async fn claim_what_is_not_shared(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let roots = self.roots.borrow().clone();
        let Some(writer) = roots.iter().find(|user| user.writes) else {
            return Ok(());
        };
        let mut path = writer.view.borrow().path.clone();
        // A base is only read.
        path.retain(|(_, base)| base.is_some());
        let (node, _) = &path[test.below(path.len() as u64) as usize];
        let claim = async |change: &mut Change| {
            let node = change.find(node)?;
            let spec = RootSpec {
                shares: Permissions::all() - Permissions::WRITE,
                ..RootSpec::reader("somebody who bears no writer")
            };
            change.add_root(node, spec).map(|_| ())
        };
        match self.attempt(claim).await? {
            Outcome::Refused(error) if error.kind() == ErrorKind::Busy => {
                test.count(|totals| &mut totals.refused);
                Ok(())
            }
            Outcome::Refused(error) => self.check_error("a conflicting claim", &error),
            _ => Err(format!("two have what neither shares on node '{node}'")),
        }
    }
}
