//! What is asked of a node's image as a whole: internal snapshots, the machine's state, checks,
//! amendments, and how large an image becomes.
//!
//! Each is a change of its own, in the order in which all changes are made, during which the node is
//! drained. It claims what it needs like any user, so whoever does not share that is named; the claim
//! ends with it.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::open::Inherited;
use super::permission::Permissions;
use super::{Change, Control, Graph, NodeId, Operation, RootSpec};
use crate::drain::Scope;
use crate::driver::{
    CheckReport, Driver, Fix, MeasureSource, Measured, OpenModes, Preallocation, ReopenRequest,
    SnapshotInfo, SnapshotRef, SnapshotSpec,
};
use crate::io::Root;
use crate::io::buffer::Segments;
use crate::options::Options;
use crate::{Error, ErrorKind};

/// What somebody is about to do to an image.
#[derive(Clone, Copy)]
struct Claim {
    /// For messages: `take a snapshot of`.
    verb: &'static str,
    needs: Permissions,
    shares: Permissions,
    operation: Option<Operation>,
    /// What was written comes first.
    flushes: bool,
}

impl Claim {
    /// Reads metadata, and bears what others do.
    const fn reading(verb: &'static str) -> Self {
        Self {
            verb,
            needs: Permissions::CONSISTENT_READ,
            shares: Permissions::all(),
            operation: None,
            flushes: true,
        }
    }

    /// Changes metadata and nothing that a guest reads, and bears what others do.
    const fn changing(verb: &'static str) -> Self {
        Self {
            needs: Permissions::CONSISTENT_READ.union(Permissions::WRITE_UNCHANGED),
            ..Self::reading(verb)
        }
    }
}

/// What is done with a driver, and a root at its node.
type Work<T> =
    Box<dyn for<'a> FnOnce(&'a mut dyn Driver, Rc<Root>) -> LocalBoxFuture<'a, Result<T, Error>>>;

impl Control {
    /// The internal snapshots of a node's image, in the order in which the image has them.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] if its images have none.
    pub async fn snapshots(&self, node: &str) -> Result<Vec<SnapshotInfo>, Error> {
        // A turn, so that no other operation has the driver.
        let change = self.begin().await;
        let id = self.read(|graph| Ok::<_, Error>(graph.skip_filters(change.find(node)?)))?;
        change.check_snapshots(id, "list the snapshots of")?;
        let snapshots = change.driver_of(id).take().snapshots();
        change.abort().await;
        Ok(snapshots)
    }

    /// Takes an internal snapshot of a node's image, after a flush.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Exists`] if there is one with this name or identifier; [`ErrorKind::Invalid`] without a
    /// name; [`ErrorKind::Unsupported`] if its images have none; [`ErrorKind::PermissionDenied`] for a
    /// read-only node; [`ErrorKind::Busy`]; else what could not be written. The image is as it was.
    pub async fn take_snapshot(&self, node: &str, spec: SnapshotSpec) -> Result<(), Error> {
        let claim = Claim {
            operation: Some(Operation::InternalSnapshot),
            ..Claim::changing("take a snapshot of")
        };
        let work: Work<()> = Box::new(move |driver, root| {
            async move {
                if spec.name.is_empty() {
                    return Err(Error::invalid("a snapshot needs a name"));
                }
                let snapshots = driver.snapshots();
                let by_name = SnapshotRef::name(&*spec.name);
                let by_id = spec.id.as_deref().map(SnapshotRef::id);
                for taken in [Some(by_name), by_id].into_iter().flatten() {
                    if taken.find(&snapshots).is_some() {
                        let message = format!("there is a {taken} already");
                        return Err(Error::new(ErrorKind::Exists, message));
                    }
                }
                driver.snapshot_create(root, spec).await
            }
            .boxed_local()
        });
        self.with_snapshots(node, claim, work).await
    }

    /// Makes a node's disk what it was when a snapshot was taken; what it is now is lost. Nobody else may
    /// use the node.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] that names a user, or if there are dirty bitmaps, which
    /// would no longer say what has changed; else as [`take_snapshot`](Self::take_snapshot).
    pub async fn apply_snapshot(&self, node: &str, snapshot: &SnapshotRef) -> Result<(), Error> {
        let claim = Claim {
            verb: "apply a snapshot to",
            needs: Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE,
            shares: Permissions::empty(),
            operation: None,
            flushes: true,
        };
        let (control, snapshot) = (self.clone(), snapshot.clone());
        let work: Work<()> = Box::new(move |driver, root| {
            async move {
                let node = root.node();
                let marks = |graph: &Graph| !graph.nodes[&node].bitmaps.is_empty();
                if control.read(marks) {
                    return Err(Error::busy("it has dirty bitmaps"));
                }
                found(&*driver, &snapshot)?;
                driver.snapshot_apply(root, &snapshot).await
            }
            .boxed_local()
        });
        self.with_snapshots(node, claim, work).await
    }

    /// Deletes an internal snapshot; returns what it was.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; else as [`take_snapshot`](Self::take_snapshot).
    pub async fn delete_snapshot(
        &self,
        node: &str,
        snapshot: &SnapshotRef,
    ) -> Result<SnapshotInfo, Error> {
        let claim = Claim {
            operation: Some(Operation::InternalSnapshotDelete),
            ..Claim::changing("delete a snapshot of")
        };
        let snapshot = snapshot.clone();
        let work: Work<SnapshotInfo> = Box::new(move |driver, root| {
            async move {
                let info = found(&*driver, &snapshot)?;
                driver.snapshot_delete(root, &snapshot).await?;
                Ok(info)
            }
            .boxed_local()
        });
        self.with_snapshots(node, claim, work).await
    }

    /// Saves a part of a machine's state, `offset` bytes after its beginning, for the snapshot that is
    /// taken next.
    ///
    /// # Errors
    ///
    /// As [`take_snapshot`](Self::take_snapshot).
    pub async fn save_vm_state(
        &self,
        node: &str,
        offset: u64,
        from: Segments,
    ) -> Result<(), Error> {
        let claim = Claim {
            flushes: false,
            ..Claim::changing("save a machine's state in")
        };
        let work: Work<()> = Box::new(move |driver, root| driver.save_vm_state(root, offset, from));
        self.with_snapshots(node, claim, work).await
    }

    /// Loads a part of the state that belongs to the snapshot which was applied last.
    ///
    /// # Errors
    ///
    /// As [`snapshots`](Self::snapshots); else what could not be read.
    pub async fn load_vm_state(
        &self,
        node: &str,
        offset: u64,
        into: Segments,
    ) -> Result<(), Error> {
        let claim = Claim {
            flushes: false,
            ..Claim::reading("load a machine's state from")
        };
        let work: Work<()> = Box::new(move |driver, root| driver.load_vm_state(root, offset, into));
        self.with_snapshots(node, claim, work).await
    }

    /// Checks a node's image, after a flush, and repairs what `fix` says. To repair it, nobody else may
    /// write to the node.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] if the driver has nothing to check;
    /// [`ErrorKind::PermissionDenied`] to repair a read-only node; [`ErrorKind::Busy`] that names who
    /// writes. What is found wrong is no error, but in the report.
    pub async fn check(&self, node: &str, fix: Fix) -> Result<CheckReport, Error> {
        let mut change = self.begin().await;
        let checked = match change.find(node) {
            Ok(id) => change.check(id, fix).await,
            Err(error) => Err(error),
        };
        change.end(checked).await
    }

    /// Opens an image for nothing else than to check it: also one that is too damaged for use, and
    /// without its backing image. It is closed again.
    ///
    /// # Errors
    ///
    /// As [`Change::add`] and [`check`](Self::check).
    pub async fn check_image(&self, options: Options, fix: Fix) -> Result<CheckReport, Error> {
        let mut change = self.begin().await;
        let opened = change.open_node(options, Inherited::TO_CHECK, None).await;
        let checked = match opened {
            Ok(id) => {
                // It does not go with the claim of the check.
                change.state_mut().shape.vertex_mut(id).owned = true;
                change.check(id, fix).await
            }
            Err(error) => Err(error),
        };
        // Given up, which closes it.
        change.abort().await;
        checked
    }

    /// How large an image of driver `driver` with these creation options becomes: empty, or with what a
    /// node has.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] if the driver cannot tell; what is wrong with
    /// the options.
    pub async fn measure(
        &self,
        driver: &str,
        options: Options,
        node: Option<&str>,
    ) -> Result<Measured, Error> {
        let kind = self.read(|graph| graph.driver_type(driver))?;
        let measure = kind.measure.ok_or_else(|| {
            Error::unsupported(format!(
                "driver '{driver}' cannot tell how large its images become"
            ))
        })?;
        let Some(node) = node else {
            return measure(options, None).await;
        };
        let spec = RootSpec {
            shares: Permissions::all(),
            ..RootSpec::reader("a measurement")
        };
        let root = self.add_root(node, spec).await?;
        let measured = match self.root_here(root) {
            Ok(root) => {
                let bitmaps = self.read(|graph| {
                    let node = graph.node(node).ok()?;
                    graph.keeps_bitmaps(node.id()).then(|| node.bitmaps.kept())
                });
                measure(options, Some(MeasureSource { root, bitmaps })).await
            }
            Err(error) => Err(error),
        };
        let released = self.remove_root(root).await;
        measured.and_then(|measured| released.map(|()| measured))
    }

    /// Changes properties of a node's image itself. `force` allows what may lose data, such as the last
    /// key. An option `size`, if the driver takes it, is changed last, as [`resize`](Self::resize) does;
    /// what is past the new end is lost, so a disk gets shorter only with `force`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] if the driver cannot, or not this;
    /// [`ErrorKind::PermissionDenied`] for a read-only node; [`ErrorKind::Busy`] that names who does not
    /// share what it needs; else what could not be written.
    pub async fn amend(&self, node: &str, options: Options, force: bool) -> Result<(), Error> {
        let mut change = self.begin().await;
        let new_bytes = options.get("size").map(str::to_owned);
        let amended = match change.find(node) {
            Ok(id) => change.amend(id, options, force).await,
            Err(error) => Err(error),
        };
        change.end(amended).await?;
        // Checked by the driver, which takes it.
        let new_bytes = new_bytes.and_then(|text| crate::options::parse_size(&text));
        let Some(bytes) = new_bytes else {
            return Ok(());
        };
        if self.read(|graph| graph.node(node).map(super::Node::bytes))? == bytes {
            return Ok(());
        }
        self.resize(node, bytes, Preallocation::Off).await
    }

    async fn with_snapshots<T: 'static>(
        &self,
        node: &str,
        claim: Claim,
        work: Work<T>,
    ) -> Result<T, Error> {
        let mut change = self.begin().await;
        let id = self.read(|graph| Ok::<_, Error>(graph.skip_filters(change.find(node)?)));
        let checked = id.and_then(|id| change.check_snapshots(id, claim.verb).map(|()| id));
        let done = match checked {
            Ok(id) => change.claimed(id, claim, work).await,
            Err(error) => Err(error),
        };
        change.end(done).await
    }
}

/// The snapshot that is meant.
fn found(driver: &dyn Driver, snapshot: &SnapshotRef) -> Result<SnapshotInfo, Error> {
    let mut snapshots = driver.snapshots();
    match snapshot.find(&snapshots) {
        Some(index) => Ok(snapshots.swap_remove(index)),
        None => Err(Error::new(
            ErrorKind::NotFound,
            format!("there is no {snapshot}"),
        )),
    }
}

impl Change {
    /// Whether images of the node's driver can have internal snapshots.
    fn check_snapshots(&self, id: NodeId, verb: &str) -> Result<(), Error> {
        if self.driver_of(id).take().has_snapshots() {
            return Ok(());
        }
        let vertex = self.state().shape.vertex(id);
        Err(Error::unsupported(format!(
            "cannot {verb} node '{}': images of driver '{}' have no internal snapshots",
            vertex.name, vertex.kind.name
        )))
    }

    async fn check(&mut self, id: NodeId, fix: Fix) -> Result<CheckReport, Error> {
        let claim = match fix {
            Fix::None => Claim::reading("check"),
            Fix::Leaks | Fix::All => Claim {
                shares: Permissions::all()
                    .difference(Permissions::WRITE)
                    .difference(Permissions::RESIZE),
                ..Claim::changing("repair")
            },
        };
        let work: Work<CheckReport> = Box::new(move |driver, root| driver.check(root, fix));
        let report = self.claimed(id, claim, work).await?;
        if fix != Fix::None && report.corruptions == 0 {
            let control = self.control().clone();
            control.read(|graph| {
                let node = self.state().node(graph, id);
                node.inspect(|node| node.state().forget_corruption());
            });
        }
        Ok(report)
    }

    async fn amend(&mut self, id: NodeId, options: Options, force: bool) -> Result<(), Error> {
        let driver = self.driver_of(id);
        driver
            .take()
            .amend_begin(&options)
            .map_err(|error| self.cannot("amend", id, &error))?;
        let (control, begun) = (self.control().clone(), Rc::new(Cell::new(false)));
        let has_begun = Rc::clone(&begun);
        let work: Work<()> = Box::new(move |driver, root| {
            async move {
                // They are read anew with the image.
                let kept = control.bitmaps_to_store(root.node());
                if !kept.is_empty() {
                    driver.store_bitmaps(Rc::clone(&root), kept).await?;
                }
                begun.set(true);
                driver.amend(root, options, force).await
            }
            .boxed_local()
        });
        let amended = self.claimed(id, Claim::changing("amend"), work).await;
        driver.take().amend_end();
        if !has_begun.get() {
            // It may not even be drained, nor are its bitmaps stored.
            return amended;
        }
        // Also after a failure: some of it may have been done.
        let root = self.temporary_root(id, Permissions::all());
        let reread = self.reread(id, Some(root)).await;
        amended.and(reread)
    }

    /// Has a node's driver read its image anew, which has changed below it: a reopen with the options that
    /// there are, by which nothing of before is kept.
    pub(super) async fn reread(&mut self, id: NodeId, root: Option<Rc<Root>>) -> Result<(), Error> {
        let vertex = self.state().shape.vertex(id);
        let (kind, modes, node_name) = (vertex.kind, vertex.modes, vertex.name.to_string());
        let options = self.control().read(|graph| {
            let node = self.state().node(graph, id);
            let node = node.expect("every vertex of a shape has a node");
            node.options.clone()
        });
        let request = ReopenRequest {
            context: Rc::clone(self.control().context()),
            node_name,
            table: kind.options,
            before: options.clone(),
            options,
            modes_before: OpenModes {
                inactive: true,
                ..modes
            },
            modes,
            will_write: !modes.read_only,
            children: self.open_children_of(id),
            root,
        };
        self.prepare_reopen(id, request).await
    }

    /// Does something to the image of a node that is drained and claimed for it.
    async fn claimed<T>(&mut self, id: NodeId, claim: Claim, work: Work<T>) -> Result<T, Error> {
        if let Some(operation) = claim.operation {
            self.control()
                .read(|graph| graph.check_operation(id, operation))?;
        }
        let user = self.add_root(
            id,
            RootSpec {
                needs: claim.needs,
                shares: claim.shares,
                ..RootSpec::reader(format!("somebody who is to {} it", claim.verb))
            },
        )?;
        let done = self.with_claim(id, claim, work).await;
        self.remove_root(user)?;
        done
    }

    async fn with_claim<T>(&mut self, id: NodeId, claim: Claim, work: Work<T>) -> Result<T, Error> {
        self.prepare_permissions().await?;
        self.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        let root = self.temporary_root(id, Permissions::all());
        if claim.flushes {
            root.flush().await.map_err(|error| {
                let error = Error::new(ErrorKind::Io, format!("it cannot be flushed: {error}"));
                self.cannot(claim.verb, id, &error)
            })?;
        }
        let driver = self.driver_of(id);
        let mut driver = driver.take();
        let done = work(&mut *driver, Rc::clone(&root)).await;
        drop(driver);
        let done = done.map_err(|error| self.cannot(claim.verb, id, &error))?;
        if claim.flushes
            && claim
                .needs
                .intersects(Permissions::WRITE | Permissions::WRITE_UNCHANGED)
        {
            root.flush().await.map_err(|error| {
                let error = Error::new(ErrorKind::Io, format!("it cannot be flushed: {error}"));
                self.cannot(claim.verb, id, &error)
            })?;
        }
        Ok(done)
    }

    fn cannot(&self, verb: &str, id: NodeId, error: &Error) -> Error {
        let vertex = self.state().shape.vertex(id);
        Error::new(
            error.kind(),
            format!(
                "cannot {verb} node '{}' (driver '{}'): {}",
                vertex.name,
                vertex.kind.name,
                error.report()
            ),
        )
    }

    /// Commits what looking at the image anew brings; gives the change up after a failure to claim it.
    async fn end<T>(self, done: Result<T, Error>) -> Result<T, Error> {
        // Also after a failure half way: what the image is now is what it is.
        let finished = match self.prepare().await {
            Ok(prepared) => prepared.commit().finish().await,
            Err(error) => Err(error),
        };
        done.and_then(|value| finished.map(|()| value))
    }
}
