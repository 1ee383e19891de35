//! Mirror: a copy of a disk that follows what guests change, until it takes the disk's place.
//!
//! A filter above the disk marks what guests change ([`link`](crate::filter::link)); the job copies what is
//! marked. It is *ready* once no more is left than can be copied while guests wait.
//!
//! **The end** is one change of the graph. With the guests' requests held back, what is left is copied and
//! made durable; then, in the same change, which is recorded ahead, users of the disk get the target
//! instead. A job that is cancelled softly ends the same way, and its users keep the source. Until then,
//! also while the job waits to be finalized, guests go on and are followed.
//!
//! A commit of what guests write to is a mirror to an image below: [`commit`](super::commit).

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use event_listener::EventListener;
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, select};

use super::backup::{remove_filter_with, report, user};
use super::copy::Copying;
use super::registry::Jobs;
use super::{Job, JobKind, JobSpec, Stopped, Work};
use crate::drain::Scope;
use crate::fault::{self, Fault};
use crate::filter::link::{CopyFailure, Link, LinkSpec, MIRROR_TOP};
use crate::graph::{BlockerId, Change, Control, FilterSpec, Graph, NodeId, Operation};
use crate::io::policy::OnError;
use crate::io::{RequestKind, Root};
use crate::{Error, ErrorKind};

/// How much may be left to copy while guests wait: what a disk does in a few milliseconds.
const WHILE_GUESTS_WAIT_BYTES: u64 = 4 << 20;
/// How often a job that is ready looks what guests have changed.
const LOOK: Duration = Duration::from_millis(100);
/// How much of the source is looked through at once for what it has.
const LOOK_BYTES: u64 = 1 << 30;

/// Which part of a disk a mirror copies at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorSync {
    /// All of it.
    Full,
    /// What its topmost image has itself.
    Top,
    /// Nothing.
    None,
}

/// A mirror to be started.
#[derive(Clone, Debug)]
pub struct MirrorSpec {
    /// What all jobs are told.
    pub job: JobSpec,
    /// The name of the disk's node.
    pub source: String,
    /// The name of the node that is to have the copy.
    pub target: String,
    /// The name of the node whose place the target takes; `None`: the source's.
    pub replaces: Option<String>,
    /// What is copied at first.
    pub sync: MirrorSync,
    /// How much is copied where a little has changed, in bytes, a power of two.
    pub granularity_bytes: u64,
    /// Memory for what is under way, in bytes.
    pub buffer_bytes: u64,
    /// What becomes of failures to read.
    pub on_source_error: OnError,
    /// What becomes of failures to write.
    pub on_target_error: OnError,
    /// Whether space in the target may be given back where the source has zeroes.
    pub unmap: bool,
    /// What the filter above the disk is called.
    pub filter_name: Option<String>,
    /// Whether guests wait for the target.
    pub write_blocking: bool,
}

/// What of the source is copied at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// All of it.
    All,
    /// What layers above this one have.
    Above(Option<NodeId>),
    /// Nothing.
    Nothing,
}

/// A mirror, or a commit of what guests write to.
pub(super) struct Mirror {
    pub(super) link: Arc<Link>,
    pub(super) root: Rc<Root>,
    pub(super) filter: NodeId,
    pub(super) target: NodeId,
    pub(super) replaces: Option<NodeId>,
    pub(super) first: First,
    pub(super) buffer_bytes: u64,
    pub(super) on_source_error: OnError,
    pub(super) on_target_error: OnError,
    pub(super) blockers: Vec<BlockerId>,
    /// Of a commit: the base, with what is to be put back if it fails.
    pub(super) commit: Option<super::commit::Chain>,
    /// The change at the end has been made.
    pub(super) is_out: std::cell::Cell<bool>,
}

impl Jobs {
    /// Starts a mirror.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who does not let it begin; nothing has been done.
    pub async fn mirror(&self, spec: MirrorSpec) -> Result<(), Error> {
        self.control().read(|graph| find_ends(graph, &spec))?;
        let job = self.create(&spec.job, JobKind::Mirror)?;
        let work = self.begin_mirror(&job, spec).await;
        self.start(&job, work)
    }

    async fn begin_mirror(&self, job: &Rc<Job>, spec: MirrorSpec) -> Result<Mirror, Error> {
        let mut change = self.control().begin().await;
        let begun = insert_mirror(self.control(), &mut change, job, &spec).await;
        let (link, filter, root, ends) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                change.abort().await;
                return Err(error);
            }
        };
        change.prepare().await?.commit().finish().await?;
        let (control, why) = (
            self.control(),
            format!("it is used by {} (mirror)", job.who()),
        );
        let blockers = [ends.source, ends.target].map(|id| control.block(id, Operation::ALL, &why));
        let first = match spec.sync {
            MirrorSync::Full => First::All,
            MirrorSync::Top => {
                First::Above(control.read(|graph| graph.backing_chain_next(ends.source)))
            }
            MirrorSync::None => First::Nothing,
        };
        Ok(Mirror {
            link,
            root: control.root_here(root)?,
            filter,
            target: ends.target,
            replaces: ends.replaces,
            first,
            buffer_bytes: spec.buffer_bytes,
            on_source_error: spec.on_source_error,
            on_target_error: spec.on_target_error,
            blockers: blockers.into(),
            commit: None,
            is_out: std::cell::Cell::new(false),
        })
    }
}

struct Ends {
    source: NodeId,
    target: NodeId,
    replaces: Option<NodeId>,
    bytes: u64,
}

fn find_ends(graph: &Graph, spec: &MirrorSpec) -> Result<Ends, Error> {
    let (from, to) = (graph.node(&spec.source)?, graph.node(&spec.target)?);
    if from.id() == to.id() {
        return Err(Error::invalid("Can't mirror node into itself"));
    }
    let replaces = match &spec.replaces {
        None => None,
        Some(name) => Some(graph.node(name).map_err(|_| {
            let text = format!("Failed to find node with node-name='{name}'");
            Error::new(ErrorKind::NotFound, text)
        })?),
    };
    graph.check_operation(from.id(), Operation::MirrorSource)?;
    graph.check_operation(to.id(), Operation::MirrorTarget)?;
    if let Some(replaces) = replaces {
        graph.check_operation(replaces.id(), Operation::Replace)?;
        if graph.skip_filters(replaces.id()) != graph.skip_filters(from.id()) {
            return Err(Error::invalid(format!(
                "Cannot replace '{}' by a node mirrored from '{}', because it cannot be guaranteed that \
                 doing so would not lead to an abrupt change of visible data",
                replaces.name(),
                from.name()
            )));
        }
        if replaces.bytes() != from.bytes() {
            return Err(Error::invalid(
                "cannot replace image with a mirror image of different size",
            ));
        }
    }
    if from.bytes() != to.bytes() {
        return Err(Error::invalid(
            "Source and target image have different sizes",
        ));
    }
    Ok(Ends {
        source: from.id(),
        target: to.id(),
        replaces: replaces.map(crate::graph::Node::id),
        bytes: from.bytes(),
    })
}

async fn insert_mirror(
    control: &Control,
    change: &mut Change,
    job: &Rc<Job>,
    spec: &MirrorSpec,
) -> Result<(Arc<Link>, NodeId, crate::graph::RootId, Ends), Error> {
    // Again: they may be others since.
    let ends = control.read(|graph| find_ends(graph, spec))?;
    let link = Link::new(&LinkSpec {
        bytes: ends.bytes,
        granularity_bytes: spec.granularity_bytes,
        write_blocking: spec.write_blocking,
        unmap: spec.unmap,
        base: None,
        grows: false,
    });
    let link = link.map_err(|error| Error::unsupported(error.to_string()))?;
    let filter = change
        .insert_filter(FilterSpec {
            kind: &MIRROR_TOP,
            name: spec.filter_name.clone(),
            above: ends.source,
            target: Some(ends.target),
            opened: link.opened(),
        })
        .await?;
    let root = change.add_root(filter, user(job))?;
    Ok((link, filter, root, ends))
}

impl Work for Mirror {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>> {
        self.follow(job).boxed_local()
    }

    fn prepare<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>> {
        self.end(job).boxed_local()
    }

    fn clean<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, ()> {
        async move {
            for blocker in &self.blockers {
                job.control().unblock(*blocker);
            }
            if !self.is_out.get() {
                let thaw = |change: &mut Change| {
                    if let Some(chain) = &self.commit {
                        chain.thaw(change);
                    }
                };
                let (filter, root) = (self.filter, self.root.id());
                report(job, remove_filter_with(job, filter, root, None, thaw).await);
                if let Some(chain) = &self.commit {
                    chain.restore(job.control()).await;
                }
            }
        }
        .boxed_local()
    }

    fn can_complete(&self) -> bool {
        true
    }

    fn actively_synced(&self) -> Option<bool> {
        let synced = self.link.is_write_blocking() && self.link.dirty().count() == 0;
        self.commit.is_none().then_some(synced)
    }

    fn change_copy_mode(&self, write_blocking: bool) -> Result<(), Error> {
        if self.commit.is_some() {
            return Err(Error::unsupported("Job type does not support change"));
        }
        match (self.link.is_write_blocking(), write_blocking) {
            (before, after) if before == after => {}
            (true, _) => {
                return Err(Error::unsupported(
                    "Change to copy mode 'background' is not implemented",
                ));
            }
            _ => self.link.block_writes(),
        }
        Ok(())
    }
}

impl Mirror {
    fn copying(&self) -> Copying {
        let link = Arc::clone(&self.link);
        Copying {
            root: Rc::clone(&self.root),
            todo: Arc::clone(self.link.dirty()),
            copy: Rc::new(move |io, offset, bytes| {
                let link = Arc::clone(&link);
                async move { link.copy(io, offset, bytes).await }.boxed_local()
            }),
            on_source_error: self.on_source_error,
            on_target_error: self.on_target_error,
            buffer_bytes: self.buffer_bytes,
            skips_failed: false,
            grows: true,
        }
    }

    async fn follow(&self, job: &Rc<Job>) -> Result<(), Stopped> {
        if self.commit.is_some() {
            super::commit::grow(&self.link, &self.root).await?;
        }
        self.mark_first(job).await?;
        let copying = self.copying();
        job.set_total(copying.left_bytes());
        let mut is_ready = false;
        loop {
            let enough = || match is_ready && job.is_to_end().is_none() {
                true => 0,
                false => WHILE_GUESTS_WAIT_BYTES,
            };
            copying.run(job, enough).await?;
            if !is_ready {
                self.flush(job).await?;
                is_ready = true;
                job.set_ready();
            }
            loop {
                let told = job.listen();
                job.pause_point().await?;
                job.set_busy(false);
                if job.is_to_end().is_some() {
                    return match copying.left_bytes() <= WHILE_GUESTS_WAIT_BYTES {
                        true => Ok(()),
                        false => {
                            // Guests would change more than can be copied meanwhile.
                            self.link.block_writes();
                            break;
                        }
                    };
                }
                if copying.left_bytes() > 0 {
                    break;
                }
                rest(job, told).await;
            }
            job.set_busy(true);
        }
    }

    /// Marks what is copied at first.
    async fn mark_first(&self, job: &Rc<Job>) -> Result<(), Stopped> {
        let bytes = self.link.dirty().length();
        let base = match self.first {
            First::Nothing => return Ok(()),
            First::All => {
                self.link.dirty().set(0, bytes);
                return Ok(());
            }
            First::Above(base) => base,
        };
        let mut next = 0;
        while next < bytes {
            job.pause_point().await?;
            let most = LOOK_BYTES.min(bytes - next);
            let request = self.root.enter(RequestKind::Other, next, most).await;
            let looked = self.link.look(request.io(), base, next, most).await;
            drop(request);
            match looked {
                Ok(found) => next += found,
                Err(failure) => self.judge(job, failure)?,
            }
        }
        Ok(())
    }

    /// Decides what becomes of a failure of something that is tried again as a whole.
    fn judge(&self, job: &Rc<Job>, failure: CopyFailure) -> Result<(), Stopped> {
        use crate::filter::link::CopySide;
        use crate::io::policy::Action;
        let (policy, is_read) = match failure.side {
            CopySide::Source => (self.on_source_error, true),
            CopySide::Target => (self.on_target_error, false),
        };
        match job.failed(policy, is_read, failure.error) {
            Action::Stop => Ok(()),
            Action::Report | Action::Ignore => Err(failure.error.into()),
        }
    }

    /// Makes durable what the target has.
    async fn flush(&self, job: &Rc<Job>) -> Result<(), Stopped> {
        let request = self.root.enter(RequestKind::Flush, 0, 0).await;
        let flushed = self.link.flush_target(request.io()).await;
        drop(request);
        match flushed {
            Ok(()) => Ok(()),
            Err(failure) => self.judge(job, failure),
        }
    }

    /// The end: see the module's header.
    async fn end(&self, job: &Rc<Job>) -> Result<(), Stopped> {
        let pivots = job.is_to_end() == Some(true);
        let control = job.control();
        control
            .detach(self.root.id(), control.context().handle())
            .await;
        let mut change = control.begin().await;
        match self.prepare_end(job, &mut change, pivots).await {
            Ok(()) => {}
            Err(stopped) => {
                change.abort().await;
                return Err(stopped);
            }
        }
        let prepared = change.prepare().await?;
        self.is_out.set(true);
        // It stands, whatever is left to do.
        report(job, prepared.commit().finish().await);
        Ok(())
    }

    async fn prepare_end(
        &self,
        job: &Rc<Job>,
        change: &mut Change,
        pivots: bool,
    ) -> Result<(), Stopped> {
        if job.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        // Everybody who could change the source, by whichever way.
        change
            .drain(Scope::Subtrees(BTreeSet::from([self.filter])))
            .await;
        let root = change.held_root(self.filter);
        let request = root.enter(RequestKind::Other, 0, 0).await;
        let dirty = self.link.dirty();
        let copied: Result<(), CopyFailure> = async {
            while let Some(area) = dirty.next_area(0, u64::MAX, 1 << 20) {
                if fault::is_planted(Fault::PivotWithRest) {
                    break;
                }
                dirty.clear(area.offset, area.bytes);
                let copied = self.link.copy(request.io(), area.offset, area.bytes).await;
                if let Err(failure) = copied {
                    dirty.set(area.offset, area.bytes);
                    return Err(failure);
                }
                job.add_done(area.bytes);
            }
            self.link.flush_target(request.io()).await
        }
        .await;
        drop(request);
        copied.map_err(|failure| Stopped::from(failure.error))?;
        if let Some(chain) = &self.commit {
            chain.thaw(change);
        }
        let to = match (pivots, self.replaces) {
            (true, Some(replaces)) => {
                change.replace_node(replaces, self.target)?;
                None
            }
            (true, None) => Some(self.target),
            (false, _) => None,
        };
        change.remove_filter(self.filter, self.root.id(), to)?;
        Ok(())
    }
}

/// Waits until something is asked of the job, and not for long.
async fn rest(job: &Rc<Job>, told: EventListener) {
    let delay = std::pin::pin!(job.control().context().delay(LOOK));
    select(told, delay).await;
}
