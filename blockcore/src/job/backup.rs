//! Backup: a copy of a disk as it was when the job began.
//!
//! A `copy-before-write` filter is put above the disk, which copies what guests are going to change before
//! they do; the job copies the rest in its own time. Both take turns for what they copy, so each cluster is
//! copied once, as it was.
//!
//! What a guest changes and that cannot be copied away is lost to the backup: the job fails, and the guest
//! does not notice. (QEMU's default is the other way round: the guest's write fails.)

use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::copy::Copying;
use super::registry::Jobs;
use super::{Job, JobKind, JobSpec, Stopped, Work};
use crate::filter::copy_before_write::{self, COPY_BEFORE_WRITE, OnError, Snapshot};
use crate::graph::permission::Permissions;
use crate::graph::{BlockerId, Change, FilterSpec, Graph, NodeId, Operation, RootId, RootSpec};
use crate::io::policy::OnError as Policy;
use crate::io::{RequestKind, Root};
use crate::{Error, IoError};

/// Which part of a disk a backup copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupSync {
    /// All of it.
    Full,
    /// What its topmost image has itself.
    Top,
    /// What guests are going to change, for as long as the job is there.
    None,
}

/// A backup to be started.
#[derive(Clone, Debug)]
pub struct BackupSpec {
    /// What all jobs are told.
    pub job: JobSpec,
    /// The name of the disk's node.
    pub source: String,
    /// The name of the node that is to have the copy.
    pub target: String,
    /// What is copied.
    pub sync: BackupSync,
    /// What becomes of failures to read.
    pub on_source_error: Policy,
    /// What becomes of failures to write.
    pub on_target_error: Policy,
    /// What the filter above the disk is called.
    pub filter_name: Option<String>,
    /// Pieces that are under way at once, at most.
    pub max_workers: u64,
    /// The smallest unit of copying in bytes, a power of two; 0: what suits the target.
    pub min_cluster_bytes: u64,
}

struct Backup {
    spec: BackupSpec,
    filter: NodeId,
    root: Rc<Root>,
    snapshot: Arc<Snapshot>,
    blocker: BlockerId,
}

struct Ends {
    source: NodeId,
    target: NodeId,
    bytes: u64,
    cluster_bytes: u64,
}

fn find_ends(graph: &Graph, spec: &BackupSpec) -> Result<Ends, Error> {
    let (from, to) = (graph.node(&spec.source)?, graph.node(&spec.target)?);
    if from.id() == to.id() {
        return Err(Error::invalid("Source and target cannot be the same"));
    }
    graph.check_operation(from.id(), Operation::BackupSource)?;
    graph.check_operation(to.id(), Operation::BackupTarget)?;
    if from.bytes() != to.bytes() {
        return Err(Error::invalid(
            "Source and target image have different sizes",
        ));
    }
    Ok(Ends {
        source: from.id(),
        target: to.id(),
        bytes: from.bytes(),
        cluster_bytes: copy_before_write::cluster_bytes(
            to.limits().cluster_bytes,
            spec.min_cluster_bytes,
        ),
    })
}

impl Jobs {
    /// Starts a backup.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who does not let it begin; nothing has been done.
    pub async fn backup(&self, spec: BackupSpec) -> Result<(), Error> {
        self.control().read(|graph| find_ends(graph, &spec))?;
        let job = self.create(&spec.job, JobKind::Backup)?;
        let work = self.begin_backup(&job, spec).await;
        self.start(&job, work)
    }

    async fn begin_backup(&self, job: &Rc<Job>, spec: BackupSpec) -> Result<Backup, Error> {
        let mut change = self.control().begin().await;
        let prepared = async {
            // Again: they may be others since.
            let ends = self.control().read(|graph| find_ends(graph, &spec))?;
            let Ends {
                source,
                target,
                bytes,
                cluster_bytes,
            } = ends;
            let on_error = OnError::BreakSnapshot;
            let snapshot = Snapshot::new(bytes, cluster_bytes, None, on_error, None);
            let snapshot = snapshot.map_err(|error| Error::unsupported(error.to_string()))?;
            let snapshot = Arc::new(snapshot);
            let filter = change
                .insert_filter(FilterSpec {
                    kind: &COPY_BEFORE_WRITE,
                    name: spec.filter_name.clone(),
                    above: source,
                    target: Some(target),
                    opened: copy_before_write::opened(&snapshot),
                })
                .await?;
            let root = change.add_root(filter, user(job))?;
            Ok((target, filter, root, bytes, snapshot))
        }
        .await;
        let (target, filter, root, bytes, snapshot) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                change.abort().await;
                return Err(error);
            }
        };
        change.prepare().await?.commit().finish().await?;
        job.set_total(match spec.sync {
            BackupSync::None => 0,
            _ => bytes,
        });
        let why = format!("it is the target of {} (backup)", job.who());
        Ok(Backup {
            blocker: self.control().block(target, Operation::ALL, &why),
            root: self.control().root_here(root)?,
            spec,
            filter,
            snapshot,
        })
    }
}

/// A job's own use of its filter.
pub(super) fn user(job: &Rc<Job>) -> RootSpec {
    RootSpec {
        needs: Permissions::CONSISTENT_READ,
        shares: Permissions::all(),
        stays: true,
        ..RootSpec::reader(job.who()).in_units_of(512)
    }
}

/// Takes a job's filter out of the graph, and gives its parents `to`, or what it filters. What `before` does
/// is done first, in the same change.
///
/// # Errors
///
/// What keeps it there.
pub(super) async fn remove_filter_with(
    job: &Rc<Job>,
    filter: NodeId,
    root: RootId,
    to: Option<NodeId>,
    before: impl FnOnce(&mut Change),
) -> Result<(), Error> {
    let control = job.control();
    control.detach(root, control.context().handle()).await;
    let mut change = control.begin().await;
    before(&mut change);
    if let Err(error) = change.remove_filter(filter, root, to) {
        change.abort().await;
        return Err(error);
    }
    let closed = change.prepare().await?.commit().finish().await;
    // It is out.
    report(job, closed);
    Ok(())
}

/// Tells whoever reads the log what could not be done after a job.
pub(super) fn report(job: &Rc<Job>, outcome: Result<(), Error>) {
    if let Err(error) = outcome {
        tracing::error!(job = job.id(), error = %error.report(), "after a job");
    }
}

impl Work for Backup {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>> {
        async move {
            if self.spec.sync == BackupSync::None {
                return self.wait(job).await;
            }
            let todo = Arc::new(self.snapshot.left().copy());
            let (snapshot, own_layer_only) = (
                Arc::clone(&self.snapshot),
                self.spec.sync == BackupSync::Top,
            );
            let copying = Copying {
                root: Rc::clone(&self.root),
                todo,
                copy: Rc::new(move |io, offset, bytes| {
                    let snapshot = Arc::clone(&snapshot);
                    async move { snapshot.copy_out(io, offset, bytes, own_layer_only).await }
                        .boxed_local()
                }),
                on_source_error: self.spec.on_source_error,
                on_target_error: self.spec.on_target_error,
                buffer_bytes: self.spec.max_workers.clamp(1, 64) << 20,
                skips_failed: false,
                grows: false,
            };
            let outcome = copying.run(job, || 0).await;
            if self.snapshot.is_lost() {
                return Err(lost());
            }
            outcome.map(drop)
        }
        .boxed_local()
    }

    fn prepare<'a>(&'a self, _job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>> {
        async move {
            if self.snapshot.is_lost() {
                return Err(lost());
            }
            let request = self.root.enter(RequestKind::Flush, 0, 0).await;
            let flushed = self.snapshot.flush_target(request.io()).await;
            flushed.map_err(|failure| failure.error.into())
        }
        .boxed_local()
    }

    fn clean<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, ()> {
        async move {
            job.control().unblock(self.blocker);
            let (filter, root) = (self.filter, self.root.id());
            report(
                job,
                remove_filter_with(job, filter, root, None, |_| {}).await,
            );
        }
        .boxed_local()
    }
}

impl Backup {
    /// Lets guests' writes fill the target until the job is cancelled.
    async fn wait(&self, job: &Rc<Job>) -> Result<(), Stopped> {
        loop {
            let told = job.listen();
            job.pause_point().await?;
            if self.snapshot.is_lost() {
                return Err(lost());
            }
            told.await;
        }
    }
}

/// Something of the disk as it was is not to be had any more.
fn lost() -> Stopped {
    IoError::Failed.into()
}
