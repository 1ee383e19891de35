//! [`NbdExport`]: a node offered over NBD, and who is connected to it.
//!
//! Threads: the control thread; its facts are shared.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use blockcore::dirty_bitmap::Bits;
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, RootId, RootSpec};
use blockcore::io::InFlight;
use blockcore::{Error, ErrorKind};
use formats::nbd::codec::ExportFlags;
use formats::nbd::stream::Stream;
use futures_channel::oneshot;

use super::config::{BitmapChoice, NbdExportConfig};
use super::connection::{self, Link};
use crate::export::{WorkerHandle, requests_of};

/// See the module's header.
pub struct NbdExport {
    config: NbdExportConfig,
    control: Control,
    root: RootId,
    facts: Arc<Facts>,
    workers: Vec<WorkerHandle>,
    /// Which worker the next connection goes to.
    next: Cell<usize>,
    links: RefCell<BTreeMap<u64, Arc<Stream>>>,
    is_going: Cell<bool>,
    /// Who waits until nobody is connected.
    quiet: RefCell<Vec<oneshot::Sender<()>>>,
    /// Bitmaps that it holds, by the names of their nodes and their own.
    held: Vec<(String, String)>,
}

/// What is true of an export as long as it is there.
pub(super) struct Facts {
    /// Its name in this process, for messages.
    pub(super) id: String,
    pub(super) flags: ExportFlags,
    pub(super) writable: bool,
    /// Each write is stable when it completes.
    pub(super) writethrough: bool,
    /// What block status can be asked of; clients name them by their places here.
    pub(super) contexts: Vec<Context>,
}

/// Something that ranges have a status of.
pub(super) enum Context {
    /// `base:allocation`: where space is, and what reads as zeroes.
    Allocation,
    /// `qemu:allocation-depth`: which layer holds a range.
    Depth,
    /// `qemu:dirty-bitmap:NAME`: what a bitmap has marked.
    Bitmap(String, Arc<Bits>),
}

impl Context {
    /// As clients call it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Allocation => "base:allocation".to_owned(),
            Self::Depth => "qemu:allocation-depth".to_owned(),
            Self::Bitmap(name, _) => format!("qemu:dirty-bitmap:{name}"),
        }
    }

    /// Whether a query means it. A name or, where contexts are only listed, what several begin with.
    pub(super) fn matches(&self, query: &str, listing: bool) -> bool {
        let spaces: &[&str] = match self {
            Self::Allocation => &["base:"],
            Self::Depth => &["qemu:"],
            Self::Bitmap(..) => &["qemu:", "qemu:dirty-bitmap:"],
        };
        query == self.name() || (listing && spaces.contains(&query))
    }
}

impl NbdExport {
    /// Offers a node; its connections go to `workers` in turn.
    ///
    /// # Errors
    ///
    /// The node or a bitmap does not exist, is held by somebody, or is read-only and should be written to.
    pub async fn new(
        config: NbdExportConfig,
        control: &Control,
        workers: Vec<WorkerHandle>,
        multi_conn: bool,
    ) -> Result<Rc<Self>, Error> {
        config.check()?;
        let who = format!("export '{}'", config.id);
        let mut needs = Permissions::CONSISTENT_READ;
        needs.set(Permissions::WRITE, config.writable);
        // Clients know one length.
        let spec = RootSpec {
            needs,
            shares: Permissions::all() - Permissions::RESIZE,
            ..RootSpec::reader(&who)
        };
        let root = control.add_root(&config.node, spec).await?;
        let (held, bitmaps) = match Self::attach(&config, control, root, &workers, &who).await {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                control.remove_root(root).await?;
                return Err(error);
            }
        };
        let mut contexts = vec![Context::Allocation];
        if config.allocation_depth {
            contexts.push(Context::Depth);
        }
        contexts.extend(bitmaps);
        Ok(Rc::new(Self {
            facts: Arc::new(Facts {
                id: config.id.clone(),
                flags: flags(config.writable, multi_conn),
                writable: config.writable,
                writethrough: config.writethrough,
                contexts,
            }),
            control: control.clone(),
            root,
            workers,
            next: Cell::new(0),
            links: RefCell::default(),
            is_going: Cell::new(false),
            quiet: RefCell::default(),
            held,
            config,
        }))
    }

    /// Attaches the root to all workers and holds the bitmaps; on an error, no bitmap is held.
    async fn attach(
        config: &NbdExportConfig,
        control: &Control,
        root: RootId,
        workers: &[WorkerHandle],
        who: &str,
    ) -> Result<(Vec<(String, String)>, Vec<Context>), Error> {
        for worker in workers {
            control.attach(root, &worker.context).await?;
        }
        let (mut held, mut contexts) = (Vec::new(), Vec::new());
        for choice in &config.bitmaps {
            let taken = Self::hold(config, control, choice, who);
            match taken {
                Ok((node, bits)) => {
                    contexts.push(Context::Bitmap(choice.name.clone(), bits));
                    held.push((node, choice.name.clone()));
                }
                Err(error) => {
                    release(control, &held);
                    return Err(error);
                }
            }
        }
        Ok((held, contexts))
    }

    /// Finds a bitmap and takes it for the export.
    fn hold(
        config: &NbdExportConfig,
        control: &Control,
        choice: &BitmapChoice,
        who: &str,
    ) -> Result<(String, Arc<Bits>), Error> {
        let name = &choice.name;
        let node = control.read(|graph| {
            let node = match &choice.node {
                Some(node) => Some(graph.node(node)?),
                None => {
                    let top = graph.node(&config.node)?.id();
                    let mut chain = graph.chain(top).filter_map(|id| graph.node_by_id(id));
                    chain.find(|node| node.bitmaps().get(name).is_ok())
                }
            };
            let found = node.filter(|node| node.bitmaps().get(name).is_ok());
            let node = found.ok_or_else(|| {
                Error::new(ErrorKind::NotFound, format!("Bitmap '{name}' is not found"))
            })?;
            let records = node.bitmaps().get(name)?.recording_bits().is_some();
            let is_written = !graph.modes(node.id()).read_only;
            if !config.writable && is_written && records {
                return Err(Error::invalid(format!(
                    "Enabled bitmap '{name}' incompatible with readonly export"
                )));
            }
            Ok(node.name().to_owned())
        })?;
        let bits = control.hold_bitmap(&node, name, who)?;
        Ok((node, bits))
    }

    /// How it was asked for.
    pub fn config(&self) -> &NbdExportConfig {
        &self.config
    }

    pub(super) fn facts(&self) -> &Arc<Facts> {
        &self.facts
    }

    /// The disk below.
    pub fn root(&self) -> RootId {
        self.root
    }

    /// How long it is, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        let plan = self.control.read(|graph| graph.plan(self.root));
        plan.map_or(0, |plan| plan.bytes())
    }

    /// How many clients have chosen it.
    pub fn connections(&self) -> usize {
        self.links.borrow().len()
    }

    /// The requests that the disk is working on, each with the number of its worker; for messages.
    pub async fn in_flight(&self) -> Vec<(usize, InFlight)> {
        requests_of(self.root, &self.workers).await
    }

    /// Whether it is being removed.
    pub fn is_going(&self) -> bool {
        self.is_going.get()
    }

    /// Serves a client until it ends.
    pub(super) async fn serve(&self, number: u64, stream: Arc<Stream>, link: Link) {
        if self.is_going.get() {
            stream.shut_down();
            return;
        }
        self.links.borrow_mut().insert(number, stream);
        let place = self.next.get();
        self.next.set((place + 1) % self.workers.len());
        let (done, ended) = oneshot::channel::<()>();
        let root = self.root;
        self.workers[place].context.post(move |context| {
            if let Some(root) = context.root(root) {
                let inner = Rc::clone(context);
                context.spawn(async move {
                    connection::serve(&inner, root, link).await;
                    drop(done);
                });
            }
        });
        // Nothing is ever sent.
        let _ = ended.await;
        self.links.borrow_mut().remove(&number);
        if self.links.borrow().is_empty() {
            self.quiet.take();
        }
    }

    /// Takes no more clients.
    pub(crate) fn set_going(&self) {
        self.is_going.set(true);
    }

    /// Takes no more clients and ends those that are connected; resolves when they are gone, with what
    /// they had in flight.
    pub(crate) async fn disconnect(&self) {
        self.is_going.set(true);
        for stream in self.links.borrow().values() {
            stream.shut_down();
        }
        while !self.links.borrow().is_empty() {
            let (tell, quiet) = oneshot::channel();
            self.quiet.borrow_mut().push(tell);
            let _ = quiet.await;
        }
    }

    /// Makes durable what clients have written.
    ///
    /// # Errors
    ///
    /// What could not be made durable.
    pub(crate) async fn flush(&self) -> Result<(), Error> {
        if !self.config.writable {
            return Ok(());
        }
        let root = self.control.root_here(self.root)?;
        root.flush().await.map_err(|error| {
            let text = format!(
                "what export '{}' wrote last may not be on the disk: {error}",
                self.config.id
            );
            Error::new(ErrorKind::Io, text)
        })
    }

    /// Gives the node and the bitmaps up. Nobody is connected.
    ///
    /// # Errors
    ///
    /// What a node that went with it could not write back.
    pub(crate) async fn close(&self) -> Result<(), Error> {
        release(&self.control, &self.held);
        self.control.remove_root(self.root).await
    }
}

fn release(control: &Control, held: &[(String, String)]) {
    for (node, name) in held {
        control.release_bitmap(node, name);
    }
}

/// What clients are told that they can do. All connections go to one node, whose flush covers what any of
/// them has completed, so several are as good as one.
fn flags(writable: bool, multi_conn: bool) -> ExportFlags {
    let mut flags = ExportFlags::HAS_FLAGS
        | ExportFlags::SEND_FLUSH
        | ExportFlags::SEND_FUA
        | ExportFlags::SEND_CACHE;
    flags.set(ExportFlags::CAN_MULTI_CONN, multi_conn);
    flags |= match writable {
        true => {
            ExportFlags::SEND_TRIM | ExportFlags::SEND_WRITE_ZEROES | ExportFlags::SEND_FAST_ZERO
        }
        false => ExportFlags::READ_ONLY,
    };
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_means_its_contexts_only_where_they_are_listed() {
        let bits = Arc::new(Bits::new(1 << 20, 65536).unwrap());
        let bitmap = Context::Bitmap("b".into(), bits);
        for (query, listed, set) in [
            ("qemu:dirty-bitmap:b", true, true),
            ("qemu:dirty-bitmap:", true, false),
            ("qemu:", true, false),
            ("qemu:dirty-bitmap:c", false, false),
            ("base:", false, false),
            ("", false, false),
        ] {
            assert_eq!(bitmap.matches(query, true), listed, "{query}");
            assert_eq!(bitmap.matches(query, false), set, "{query}");
        }
        assert!(Context::Allocation.matches("base:allocation", false));
        assert!(Context::Depth.matches("qemu:allocation-depth", false));
    }
}
