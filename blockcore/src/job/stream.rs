//! Stream: writes into an overlay what the images below it hold, so that it needs fewer of them.
//!
//! A `copy-on-read` filter is put above the overlay, and the job has it copy everything that lies above
//! the base. Then the overlay gets the base for its backing image, or none: first in its header, which is
//! true as soon as all is copied and durable, then in the graph.

use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::backup::{remove_filter_with, report, user};
use super::commit::{backing_name, rewrite_backing};
use super::copy::Copying;
use super::registry::Jobs;
use super::{Job, JobKind, JobSpec, Stopped, Work};
use crate::dirty_bitmap::Bits;
use crate::filter::copy_on_read::{self, COPY_ON_READ};
use crate::filter::link::CopyFailure;
use crate::graph::{BlockerId, Change, Control, FilterSpec, Graph, NodeId, Operation, RootId};
use crate::io::policy::OnError;
use crate::io::{RequestKind, Root};
use crate::{Error, ErrorKind};

/// How much is looked at, and copied, at once at least, in bytes.
const GRANULARITY_BYTES: u64 = 512 << 10;
/// Memory for what is under way.
const BUFFER_BYTES: u64 = 8 << 20;

/// A stream to be started.
#[derive(Clone, Debug)]
pub struct StreamSpec {
    /// What all jobs are told.
    pub job: JobSpec,
    /// The name of the overlay's node.
    pub device: String,
    /// The name of the node below which nothing is copied from, and itself neither; `None`, and `bottom`
    /// as well: the whole chain is copied.
    pub base: Option<String>,
    /// The name of the lowest node that is copied from, instead of `base`.
    pub bottom: Option<String>,
    /// What the overlay's header is to say of its backing image; `None`: the base's name.
    pub backing_name: Option<String>,
    /// Whether a base that is no image format is called `raw` there.
    pub mask_protocol: bool,
    /// What becomes of failures.
    pub on_error: OnError,
    /// What the filter above the overlay is called.
    pub filter_name: Option<String>,
}

/// What there is to stream.
struct Ends {
    device: NodeId,
    /// The overlay itself, filters skipped.
    overlay: NodeId,
    /// The lowest node that is copied from; `None`: there is nothing below.
    bottom: Option<NodeId>,
    bytes: u64,
}

struct Stream {
    ends: Ends,
    /// Its filter and its own use of that, if there is something to do.
    inside: Option<(NodeId, Rc<Root>)>,
    backing_name: Option<String>,
    mask_protocol: bool,
    on_error: OnError,
    blockers: Vec<BlockerId>,
    reopened: bool,
    is_out: std::cell::Cell<bool>,
}

fn find_ends(graph: &Graph, spec: &StreamSpec) -> Result<Ends, Error> {
    let find = |name: &str| {
        graph.node(name).map(crate::graph::Node::id).map_err(|_| {
            let text = format!("Cannot find device='' nor node-name='{name}'");
            Error::new(ErrorKind::NotFound, text)
        })
    };
    let device = find(&spec.device)?;
    let overlay = graph.skip_filters(device);
    let not_below = |name: &str| {
        let text = format!("Node '{name}' is not a backing image of '{}'", spec.device);
        Error::invalid(text)
    };
    let layers = |from: NodeId| {
        std::iter::successors(Some(from), |id| graph.backing_chain_next(*id)).skip(1)
    };
    let bottom = match (&spec.base, &spec.bottom) {
        (Some(name), None) => {
            let base = graph.skip_filters(find(name)?);
            if !layers(overlay).any(|id| id == base) {
                return Err(not_below(name));
            }
            let above = std::iter::once(overlay).chain(layers(overlay));
            let above = above.take_while(|id| *id != base).last();
            above.filter(|id| *id != overlay)
        }
        (None, Some(name)) => {
            let bottom = find(name)?;
            if graph.filtered_by(bottom).is_some() {
                return Err(Error::invalid(format!(
                    "Node '{name}' is a filter, use a non-filter node as 'bottom'"
                )));
            }
            if !graph.chain_contains(device, bottom) {
                return Err(Error::invalid(format!(
                    "Node '{name}' is not in a chain starting from '{}'",
                    spec.device
                )));
            }
            (bottom != overlay).then_some(bottom)
        }
        _ => layers(overlay).last(),
    };
    let mut chain = Some(device);
    while let Some(id) = chain {
        graph.check_operation(id, Operation::Stream)?;
        chain = match Some(id) == bottom || bottom.is_none() && id == overlay {
            true => None,
            false => graph.next_in_chain(id),
        };
    }
    // With `bottom` it is not known here what is below; QEMU refuses a name for that, too.
    if spec.base.is_none() && spec.backing_name.is_some() {
        return Err(Error::invalid(
            "backing file specified, but streaming the entire chain",
        ));
    }
    let bytes = graph
        .node_by_id(overlay)
        .map_or(0, crate::graph::Node::bytes);
    Ok(Ends {
        device,
        overlay,
        bottom,
        bytes,
    })
}

impl Jobs {
    /// Starts a stream.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or who does not let it begin; nothing has been done.
    pub async fn stream(&self, spec: StreamSpec) -> Result<(), Error> {
        self.control().read(|graph| find_ends(graph, &spec))?;
        let job = self.create(&spec.job, JobKind::Stream)?;
        let work = self.begin_stream(&job, &spec).await;
        self.start(&job, work)
    }

    async fn begin_stream(&self, job: &Rc<Job>, spec: &StreamSpec) -> Result<Stream, Error> {
        let control = self.control();
        let mut change = control.begin().await;
        let begun = insert(control, &mut change, job, spec).await;
        let (ends, inside, reopened) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                change.abort().await;
                return Err(error);
            }
        };
        change.prepare().await?.commit().finish().await?;
        let why = format!("it is used by {} (stream)", job.who());
        let mut blocked = vec![ends.device, ends.overlay];
        if let Some(bottom) = ends.bottom {
            let chain: Vec<_> = control.read(|graph| graph.chain(ends.overlay).collect());
            let to_bottom = chain.iter().position(|id| *id == bottom).unwrap_or(0);
            blocked.extend(&chain[..=to_bottom]);
        }
        blocked.sort_unstable();
        blocked.dedup();
        let block = |id: &NodeId| control.block(*id, Operation::ALL, &why);
        let blockers = blocked.iter().map(block).collect();
        let inside = match inside {
            Some((filter, root)) => Some((filter, control.root_here(root)?)),
            None => None,
        };
        if inside.is_some() {
            job.set_total(ends.bytes);
        }
        Ok(Stream {
            ends,
            inside,
            backing_name: spec.backing_name.clone(),
            mask_protocol: spec.mask_protocol,
            on_error: spec.on_error,
            blockers,
            reopened,
            is_out: std::cell::Cell::new(false),
        })
    }
}

type Inserted = (Ends, Option<(NodeId, RootId)>, bool);

async fn insert(
    control: &Control,
    change: &mut Change,
    job: &Rc<Job>,
    spec: &StreamSpec,
) -> Result<Inserted, Error> {
    // Again: it may be another chain since.
    let ends = control.read(|graph| find_ends(graph, spec))?;
    let Some(bottom) = ends.bottom else {
        return Ok((ends, None, false));
    };
    let filter = change
        .insert_filter(FilterSpec {
            kind: &COPY_ON_READ,
            name: spec.filter_name.clone(),
            above: ends.overlay,
            target: None,
            opened: copy_on_read::opened(bottom),
        })
        .await?;
    change.keep_chain_to(filter, Some(bottom));
    let root = change.add_root(filter, user(job))?;
    let reopened = control.read(|graph| graph.modes(ends.overlay).read_only);
    if reopened {
        change.set_read_only(ends.overlay, false).await?;
    }
    Ok((ends, Some((filter, root)), reopened))
}

impl Work for Stream {
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> LocalBoxFuture<'a, Result<(), Stopped>> {
        async move {
            let Some((_, root)) = &self.inside else {
                return Ok(());
            };
            let todo = Bits::new(self.ends.bytes, GRANULARITY_BYTES);
            let todo = todo.map_err(|error| Stopped::Failed(error.to_string()))?;
            todo.set(0, self.ends.bytes);
            let copying = Copying {
                root: Rc::clone(root),
                todo: Arc::new(todo),
                copy: Rc::new(|io, offset, bytes| {
                    async move {
                        let copied = io.prefetch(offset, bytes).await;
                        copied.map_err(CopyFailure::source)
                    }
                    .boxed_local()
                }),
                on_source_error: self.on_error,
                on_target_error: self.on_error,
                buffer_bytes: BUFFER_BYTES,
                skips_failed: true,
                grows: false,
            };
            let copied = copying.run(job, || 0).await?;
            match copied.left_out {
                // The backing image is needed for what was left out.
                Some(failure) => Err(failure.error.into()),
                None => Ok(()),
            }
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
            if let Some((filter, root)) = &self.inside
                && !self.is_out.get()
            {
                let removed = remove_filter_with(job, *filter, root.id(), None, |_| {}).await;
                report(job, removed);
            }
            if self.reopened {
                let control = job.control();
                let restored = control.set_read_only(self.ends.overlay, true).await;
                report(job, restored);
            }
        }
        .boxed_local()
    }
}

impl Stream {
    async fn end(&self, job: &Rc<Job>) -> Result<(), Stopped> {
        let (Some((filter, root)), Some(bottom)) = (&self.inside, self.ends.bottom) else {
            return Ok(());
        };
        let control = job.control();
        let request = root.enter(RequestKind::Flush, 0, 0).await;
        let flushed = request.flush().await;
        drop(request);
        flushed?;
        let overlay = self.ends.overlay;
        let (base, backing) = control.read(|graph| {
            let base = graph.next_in_chain(bottom);
            let given = self.backing_name.as_deref();
            let name = base.map(|base| backing_name(graph, base, given, self.mask_protocol));
            (base, name)
        });
        rewrite_backing(control, overlay, backing).await?;
        control.detach(root.id(), control.context().handle()).await;
        let mut change = control.begin().await;
        let changed = change
            .remove_filter(*filter, root.id(), None)
            .and_then(|()| change.set_backing(overlay, base));
        if let Err(error) = changed {
            change.abort().await;
            return Err(error.into());
        }
        let prepared = change.prepare().await?;
        self.is_out.set(true);
        report(job, prepared.commit().finish().await);
        Ok(())
    }
}
