//! Commit: writes what overlays hold to an image below them, which then takes their place.
//!
//! Of a chain `active - … - top - … - base` everything that lies above `base`, from `top` on, is written to
//! `base`. Whatever is read through the chain stays the same all the time: what is overwritten in `base`
//! is what some layer above it holds, too. Nobody may read one of the layers between by another way,
//! since what it defers to changes.
//!
//! If guests write to `top`, the job is a [`mirror`](super::mirror) to `base`. Else it ends by itself: the
//! overlay of `top` gets `base` for its backing image, first in its header, then in the graph. At every
//! moment the chain that the headers name reads the same.

use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::backup::{remove_filter_with, user};
use super::copy::Copying;
use super::mirror::{First, Mirror};
use super::registry::Jobs;
use super::{Job, JobKind, JobSpec, Stopped, Work};
use crate::driver::{BackingName, DriverKind};
use crate::filter::link::{COMMIT_TOP, Link, LinkSpec, MIRROR_TOP};
use crate::graph::permission::Permissions;
use crate::graph::{
    BlockerId, Change, Control, FilterSpec, Graph, NodeId, Operation, RootId, RootSpec,
};
use crate::io::policy::OnError;
use crate::io::{RequestKind, Root};
use crate::{Error, ErrorKind};

/// How much is copied where a little has changed, in bytes.
const GRANULARITY_BYTES: u64 = 64 << 10;
/// Memory for what is under way.
const BUFFER_BYTES: u64 = 16 << 20;

/// A commit to be started.
#[derive(Clone, Debug)]
pub struct CommitSpec {
    /// What all jobs are told.
    pub job: JobSpec,
    /// The name of the node at which guests are.
    pub active: String,
    /// The name of the topmost node that is committed; `None`: the active one.
    pub top: Option<String>,
    /// The name of the node that gets the data; `None`: the last of the chain.
    pub base: Option<String>,
    /// What the overlay's header is to say of its backing image; `None`: the base's name.
    pub backing_name: Option<String>,
    /// Whether a base that is no image format is called `raw` there.
    pub mask_protocol: bool,
    /// What becomes of failures.
    pub on_error: OnError,
    /// What the filter above the topmost node is called.
    pub filter_name: Option<String>,
}

/// The part of a chain that is committed.
pub(super) struct Chain {
    filter: NodeId,
    top: NodeId,
    base: NodeId,
    /// The base was open for reading only.
    reopened: bool,
    /// Keep others from reading layers between consistently.
    guards: Vec<RootId>,
}

impl Chain {
    /// Lets go of the chain, in the change that takes the filter out.
    pub(super) fn thaw(&self, change: &mut Change) {
        change.thaw_chain(self.filter, Some(self.base));
        change.set_being_committed(self.top, self.base, false);
        for guard in &self.guards {
            // It is there until now.
            let _ = change.remove_root(*guard);
        }
    }

    /// Opens the base as it was before.
    pub(super) async fn restore(&self, control: &Control) {
        if !self.reopened {
            return;
        }
        if let Err(error) = control.set_read_only(self.base, true).await {
            tracing::warn!(error = %error.report(), "the base of a commit stays open for writing");
        }
    }
}

/// Has the header of a node say another backing image; the node may be open for reading only.
pub(super) async fn rewrite_backing(
    control: &Control,
    overlay: NodeId,
    backing: Option<BackingName>,
) -> Result<(), Error> {
    let read_only = control.read(|graph| graph.modes(overlay).read_only);
    if read_only {
        control.set_read_only(overlay, false).await?;
    }
    let changed = control.change_backing_name(overlay, backing).await;
    if read_only && let Err(error) = control.set_read_only(overlay, true).await {
        tracing::warn!(error = %error.report(), "an overlay stays open for writing");
    }
    changed
}

/// What a header is to call a node: by a name that was given, or the node's own.
pub(super) fn backing_name(
    graph: &Graph,
    node: NodeId,
    given: Option<&str>,
    mask_protocol: bool,
) -> BackingName {
    let unfiltered = graph.skip_filters(node);
    let kind = graph.node_by_id(unfiltered).map(|node| node.driver_type());
    let format = kind.map(|kind| match kind.kind {
        DriverKind::Protocol if mask_protocol => "raw",
        _ => kind.name,
    });
    BackingName {
        name: match given {
            Some(name) => name.to_owned(),
            None => graph.described(unfiltered).name(),
        },
        format: format.map(str::to_owned),
    }
}

struct Commit {
    link: Arc<Link>,
    root: Rc<Root>,
    chain: Chain,
    overlay: NodeId,
    backing_name: Option<String>,
    mask_protocol: bool,
    on_error: OnError,
    blockers: Vec<BlockerId>,
    is_out: std::cell::Cell<bool>,
}

struct Ends {
    top: NodeId,
    base: NodeId,
    /// `None` if guests write to the topmost node.
    overlay: Option<NodeId>,
    bytes: u64,
}

fn find_ends(graph: &Graph, spec: &CommitSpec) -> Result<Ends, Error> {
    let no_node = |name: &str| {
        let text = format!("Cannot find device='' nor node-name='{name}'");
        Error::new(ErrorKind::NotFound, text)
    };
    let no_chain =
        |name: &str| Error::invalid(format!("'{name}' is not in this backing file chain"));
    let active = graph
        .node(&spec.active)
        .map_err(|_| no_node(&spec.active))?
        .id();
    let top = match &spec.top {
        None => active,
        Some(name) => {
            let top = graph.node(name).map_err(|_| no_node(name))?.id();
            if !graph.chain_contains(active, top) {
                return Err(no_chain(name));
            }
            top
        }
    };
    let base = match &spec.base {
        None => graph.base_of(top),
        Some(name) => {
            let base = graph.node(name).map_err(|_| no_node(name))?.id();
            if !graph.chain_contains(top, base) {
                return Err(no_chain(name));
            }
            base
        }
    };
    if top == base {
        return Err(match spec.base {
            Some(_) => Error::invalid("cannot commit an image into itself"),
            None => Error::invalid("There is no backing image to commit to"),
        });
    }
    let mut layer = Some(top);
    while let Some(id) = layer.filter(|id| *id != base) {
        graph.check_operation(id, Operation::CommitSource)?;
        layer = graph.next_in_chain(id);
    }
    graph.check_operation(base, Operation::CommitTarget)?;
    let is_active = graph.skip_filters(top) == graph.skip_filters(active);
    let overlay = match is_active {
        true => None,
        false => Some(
            graph
                .overlay_of(active, top)
                .ok_or_else(|| no_chain(&spec.active))?,
        ),
    };
    if is_active && spec.backing_name.is_some() {
        return Err(Error::invalid(
            "'backing-file' specified, but 'top' is the active layer",
        ));
    }
    let bytes = graph.node_by_id(top).map_or(0, crate::graph::Node::bytes);
    Ok(Ends {
        top,
        base,
        overlay,
        bytes,
    })
}

impl Jobs {
    /// Starts a commit.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who does not let it begin; nothing has been done.
    pub async fn commit(&self, spec: CommitSpec) -> Result<(), Error> {
        let ends = self.control().read(|graph| find_ends(graph, &spec))?;
        let job = self.create(&spec.job, JobKind::Commit)?;
        match ends.overlay {
            None => {
                let work = self.begin_active(&job, &spec).await;
                self.start(&job, work)
            }
            Some(_) => {
                let work = self.begin_commit(&job, &spec).await;
                self.start(&job, work)
            }
        }
    }

    async fn begin_active(&self, job: &Rc<Job>, spec: &CommitSpec) -> Result<Mirror, Error> {
        let (link, root, chain, blockers, _) = self.begin(job, spec).await?;
        Ok(Mirror {
            link,
            root,
            filter: chain.filter,
            target: chain.base,
            replaces: None,
            first: First::Above(Some(chain.base)),
            buffer_bytes: BUFFER_BYTES,
            on_source_error: spec.on_error,
            on_target_error: spec.on_error,
            blockers,
            commit: Some(chain),
            is_out: std::cell::Cell::new(false),
        })
    }

    async fn begin_commit(&self, job: &Rc<Job>, spec: &CommitSpec) -> Result<Commit, Error> {
        let (link, root, chain, blockers, ends) = self.begin(job, spec).await?;
        job.set_total(ends.bytes);
        Ok(Commit {
            link,
            root,
            chain,
            overlay: ends.overlay.unwrap_or(ends.top),
            backing_name: spec.backing_name.clone(),
            mask_protocol: spec.mask_protocol,
            on_error: spec.on_error,
            blockers,
            is_out: std::cell::Cell::new(false),
        })
    }

    async fn begin(
        &self,
        job: &Rc<Job>,
        spec: &CommitSpec,
    ) -> Result<(Arc<Link>, Rc<Root>, Chain, Vec<BlockerId>, Ends), Error> {
        let control = self.control();
        let mut change = control.begin().await;
        let begun = insert(control, &mut change, job, spec).await;
        let (link, root, chain, ends) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                change.abort().await;
                return Err(error);
            }
        };
        change.prepare().await?.commit().finish().await?;
        let why = format!("it is used by {} (commit)", job.who());
        let mut blocked: Vec<_> = control.read(|graph| {
            let chain = graph.chain(ends.top);
            chain.take_while(|id| *id != ends.base).collect()
        });
        blocked.extend([ends.base].into_iter().chain(ends.overlay));
        let block = |id: &NodeId| control.block(*id, Operation::ALL, &why);
        let blockers = blocked.iter().map(block).collect();
        Ok((link, control.root_here(root)?, chain, blockers, ends))
    }
}

async fn insert(
    control: &Control,
    change: &mut Change,
    job: &Rc<Job>,
    spec: &CommitSpec,
) -> Result<(Arc<Link>, RootId, Chain, Ends), Error> {
    // Again: it may be another chain since.
    let ends = control.read(|graph| find_ends(graph, spec))?;
    let Ends { top, base, .. } = ends;
    let is_active = ends.overlay.is_none();
    let link = Link::new(&LinkSpec {
        bytes: ends.bytes,
        granularity_bytes: GRANULARITY_BYTES,
        write_blocking: false,
        unmap: true,
        base: (!is_active).then_some(base),
        grows: true,
    });
    let link = link.map_err(|error| Error::unsupported(error.to_string()))?;
    change.set_being_committed(top, base, true);
    let filter = change
        .insert_filter(FilterSpec {
            kind: match is_active {
                true => &MIRROR_TOP,
                false => &COMMIT_TOP,
            },
            name: spec.filter_name.clone(),
            above: top,
            target: Some(base),
            opened: link.opened(),
        })
        .await?;
    let root = change.add_root(filter, user(job))?;
    let between: Vec<_> = control.read(|graph| {
        let below = graph.chain(top).skip(1);
        below.take_while(|id| *id != base).collect()
    });
    let mut guards = Vec::new();
    for id in between {
        let guard = RootSpec {
            needs: Permissions::empty(),
            shares: Permissions::all() - Permissions::CONSISTENT_READ,
            stays: true,
            ..RootSpec::reader(job.who())
        };
        guards.push(change.add_root(id, guard)?);
    }
    change.freeze_chain(filter, Some(base))?;
    let reopened = control.read(|graph| graph.modes(base).read_only);
    if reopened {
        change.set_read_only(base, false).await?;
    }
    let chain = Chain {
        filter,
        top,
        base,
        reopened,
        guards,
    };
    Ok((link, root, chain, ends))
}

impl Work for Commit {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>> {
        async move {
            grow(&self.link, &self.root).await?;
            let todo = self.link.dirty();
            todo.set(0, todo.length());
            let link = Arc::clone(&self.link);
            let copying = Copying {
                root: Rc::clone(&self.root),
                todo: Arc::clone(todo),
                copy: Rc::new(move |io, offset, bytes| {
                    let link = Arc::clone(&link);
                    async move { link.copy(io, offset, bytes).await }.boxed_local()
                }),
                on_source_error: self.on_error,
                on_target_error: self.on_error,
                buffer_bytes: BUFFER_BYTES,
                skips_failed: false,
                grows: false,
            };
            copying.run(job, || 0).await.map(drop)
        }
        .boxed_local()
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
                let thaw = |change: &mut Change| self.chain.thaw(change);
                let (filter, root) = (self.chain.filter, self.root.id());
                let removed = remove_filter_with(job, filter, root, None, thaw).await;
                super::backup::report(job, removed);
            }
            self.chain.restore(job.control()).await;
        }
        .boxed_local()
    }
}

/// Makes the base at least as long as what is committed to it.
pub(super) async fn grow(link: &Link, root: &Rc<Root>) -> Result<(), Stopped> {
    let request = root.enter(RequestKind::Truncate, 0, 0).await;
    let grown = link.grow_target(request.io()).await;
    grown.map_err(|failure| failure.error.into())
}

impl Commit {
    async fn end(&self, job: &Rc<Job>) -> Result<(), Stopped> {
        let control = job.control();
        let request = self.root.enter(RequestKind::Flush, 0, 0).await;
        let flushed = self.link.flush_target(request.io()).await;
        drop(request);
        flushed.map_err(|failure| Stopped::from(failure.error))?;
        let (base, given) = (self.chain.base, self.backing_name.as_deref());
        let name = control.read(|graph| backing_name(graph, base, given, self.mask_protocol));
        rewrite_backing(control, self.overlay, Some(name)).await?;
        let thaw = |change: &mut Change| self.chain.thaw(change);
        let filter = self.chain.filter;
        remove_filter_with(job, filter, self.root.id(), Some(base), thaw).await?;
        self.is_out.set(true);
        Ok(())
    }
}
