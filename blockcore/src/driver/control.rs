//! [`Driver`]: the global-state half of a node's driver.
//!
//! Threads: control thread only. One graph-changing operation runs at a time, so no two of these
//! calls are ever under way for one node; queries that need no change ask the I/O half or what the
//! graph has kept.

use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::{
    CheckReport, DriverIo, DriverKind, Fix, Limits, OpenModes, Role, SnapshotInfo, SnapshotRef,
    SnapshotSpec,
};
use crate::dirty_bitmap::KeptBitmap;
use crate::graph::NodeId;
use crate::graph::permission::{self, Permissions};
use crate::io::buffer::Segments;
use crate::io::{IoContext, Root};
use crate::options::{OptionSpec, Options};
use crate::{Error, ErrorKind};

/// The global-state half of a node's driver; see the module's header.
///
/// A future of these runs to its end. Where a `root` is given, it enters at this very node, with
/// nothing of a guest's under way: its children are reached through
/// [`Request::io`](crate::io::Request::io) and [`Io::child`](crate::io::Io::child).
pub trait Driver {
    /// Lets go of everything, after the last request. Flushing has been done.
    ///
    /// # Errors
    ///
    /// What could not be written. The node is gone in any case.
    fn close(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = root;
        async { Ok(()) }.boxed_local()
    }

    /// What requests must keep to, given the children's limits (`None`: no such child). Asked after
    /// opening and whenever a child's limits change. The default is the first child's for a filter
    /// without demands of its own, and what users should know of it for the rest.
    fn limits(&self, children: &[Option<Limits>]) -> Limits {
        match children.first() {
            Some(Some(child)) => child.above(),
            _ => Limits::default(),
        }
    }

    /// Reopen, first of three: the only one that may fail or do I/O. On failure it has undone what
    /// it did itself. Options that were left out have their defaults in the request; an option that
    /// may not change has been refused before. With nothing to prepare the I/O half stays.
    ///
    /// # Errors
    ///
    /// What cannot be changed, or not now.
    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move { request.generic() }.boxed_local()
    }

    /// Reopen, second of three: the change is a fact. All nodes of the transaction have been
    /// prepared; nothing is in flight.
    fn reopen_commit(&mut self) {}

    /// Reopen, instead of the second: undoes everything that the first did.
    fn reopen_abort(&mut self) {}

    /// Reopen, third of three: after every node of the transaction was committed; may do I/O. For
    /// what could not be done while the other nodes were not there yet.
    ///
    /// # Errors
    ///
    /// Reported; the reopen stands.
    fn reopen_after_commit(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = root;
        async { Ok(()) }.boxed_local()
    }

    /// What this node needs of one of its children and lets others have, from what its own parents
    /// need and share. Must answer from the query alone: it is asked for children about to be
    /// attached and for the state after a reopen too. The default is [`permission::default_rule`].
    fn child_permissions(&self, query: &ChildQuery) -> ChildPermissions {
        permission::default_rule(query)
    }

    /// Permissions, first of two: users of this node are going to need `needs` and to share `shares`,
    /// all together. A driver that keeps other processes out takes here what it does not have yet and
    /// gives up nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`], naming who holds it. What was taken has been given up again.
    ///
    /// May be asked again before it is committed or aborted: the last answer counts.
    fn prepare_permissions(
        &mut self,
        context: Rc<IoContext>,
        needs: Permissions,
        shares: Permissions,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        let _ = (context, needs, shares);
        async { Ok(Reopened::default()) }.boxed_local()
    }

    /// Permissions, second of two: what was prepared holds, and what it does not need may be given
    /// up. Cannot fail.
    fn commit_permissions(&mut self) {}

    /// Permissions, instead of the second: back to what holds. May be called where nothing was
    /// prepared, and then does nothing.
    fn abort_permissions(&mut self) {}

    /// Waits until what a commit or an abort has let go of is free for others.
    fn settle_permissions(&mut self) -> LocalBoxFuture<'_, ()> {
        async {}.boxed_local()
    }

    /// A file name that describes this node wholly, with the options that the driver's table marks as
    /// changing its data at their defaults. `None` if there is none. Formats and filters leave this to
    /// the core.
    fn exact_name(&self) -> Option<String> {
        None
    }

    /// The directory that relative names in this node's image are relative to. `None`: that of the
    /// primary child.
    fn directory(&self) -> Option<String> {
        None
    }

    /// What the image's header says of its backing image; `None` if there is none.
    fn backing(&self) -> Option<BackingName> {
        None
    }

    /// A node below in the chain, down to which the chain stays as it is for as long as this node is there:
    /// none of its links can be replaced or cut. Asked once the driver has opened.
    fn keeps_chain_to(&self) -> Option<NodeId> {
        None
    }

    /// The children that the image itself names, by their index among those of the driver's type; the
    /// backing image excepted. Asked once the driver has opened, which it does without them: those that the
    /// options do not give are opened then, and attached. Their names are paths, never a protocol or
    /// options, relative to the image: an operator who looks at an image for its backing image sees what
    /// that is, and does not look for these.
    fn named_children(&self) -> Vec<(usize, BackingName)> {
        Vec::new()
    }

    /// What the child at `index` is to this node, where that depends on the image; `None`: what its type
    /// and options say. Asked once the driver has opened, and when its children change.
    fn child_role(&self, index: usize) -> Option<Role> {
        let _ = index;
        None
    }

    /// Rewrites what the header says, and nothing else: no node is attached or detached.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden; [`ErrorKind::NoSpace`] if the header cannot hold
    /// the name. The header is as it was.
    fn change_backing(
        &mut self,
        root: Rc<Root>,
        backing: Option<BackingName>,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = (root, backing);
        refuse("have a backing image")
    }

    /// The image is this process's again, after another had it. Permissions and parents are the graph's
    /// affair; and so is it that a format's metadata is read anew: [`reopen_prepare`](Self::reopen_prepare)
    /// follows, unless a change that was to hand the image over is given up. Nobody else had it then.
    ///
    /// # Errors
    ///
    /// What could not be read; the node stays inactive.
    fn activate(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Activation> {
        let _ = root;
        async { Ok(None) }.boxed_local()
    }

    /// Writes everything back and touches the image no more, until activated. It has been flushed.
    ///
    /// # Errors
    ///
    /// What could not be written; the node stays active.
    fn inactivate(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = root;
        async { Ok(()) }.boxed_local()
    }

    /// The node is going to be reopened for reading only, and its children may be; or it is going to be
    /// taken out from above a child that stays, which others may write to from then on. It has been flushed;
    /// whoever leaves something for its end does that now. May be called for a change that is given up:
    /// the node goes on as it is then.
    ///
    /// # Errors
    ///
    /// What could not be done; the node stays as it is.
    fn stop_writing(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = root;
        async { Ok(()) }.boxed_local()
    }

    /// The persistent dirty bitmaps that the image keeps, where the driver has read them since it was asked
    /// last: by opening, by a reopen that was committed, or by being activated. `None`: those that there are
    /// stay.
    fn take_bitmaps(&mut self) -> Option<Vec<KeptBitmap>> {
        None
    }

    /// Whether an image like this can keep bitmaps: what follows is asked for only then, but for
    /// [`check_new_bitmap`](Self::check_new_bitmap).
    fn keeps_bitmaps(&self) -> bool {
        false
    }

    /// Whether a new bitmap could be kept in the image beside those that are to be kept already.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden; else why not: there are too many, the name or the
    /// granularity is none that the format has.
    fn check_new_bitmap(&self, kept: &[KeptBitmap], new: &KeptBitmap) -> Result<(), Error> {
        let _ = (kept, new);
        Err(Error::unsupported("images of this driver keep no bitmaps"))
    }

    /// The persistent bitmaps are going to differ from what the image keeps, since an operator or a job
    /// changes them. From the return on the image says that what it keeps is not up to date. What guests
    /// write is for the driver to notice by itself.
    ///
    /// # Errors
    ///
    /// What could not be written; nothing may be changed.
    fn use_bitmaps(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = root;
        async { Ok(()) }.boxed_local()
    }

    /// Stores the persistent bitmaps of the node, before it is closed, stops writing or is made inactive:
    /// with everything that was written, they are durable on return. One that the image keeps and that is
    /// not among them stays as the image has it. The node may go on to be written to all the same.
    ///
    /// # Errors
    ///
    /// What could not be written. The image says that these bitmaps are not up to date.
    fn store_bitmaps(
        &mut self,
        root: Rc<Root>,
        bitmaps: Vec<KeptBitmap>,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = (root, bitmaps);
        async { Ok(()) }.boxed_local()
    }

    /// Removes a bitmap from those that the image keeps; one that it does not keep is no error.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden; else what could not be written: it is there still.
    fn remove_bitmap<'a>(
        &'a mut self,
        root: Rc<Root>,
        name: &'a str,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        let _ = (root, name);
        refuse("keep bitmaps")
    }

    /// Whether everything of a freshly made image is guaranteed to read as zeroes. A filter is asked
    /// about its child by the core.
    fn has_zero_init(&self) -> bool {
        false
    }

    /// Drops everything that this layer holds, so that all comes from the backing node again. Flushed
    /// by the caller, below first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden.
    fn make_empty(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = root;
        refuse("be emptied")
    }

    /// Whether images of this driver can have internal snapshots: what follows is asked for only then.
    fn has_snapshots(&self) -> bool {
        false
    }

    /// The internal snapshots, in the order in which the image has them. Looks at nothing but memory.
    fn snapshots(&self) -> Vec<SnapshotInfo> {
        Vec::new()
    }

    /// Takes an internal snapshot. The node is drained and has been flushed; there is no snapshot with
    /// this name or identifier.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden; else what could not be written. The image is as it
    /// was.
    fn snapshot_create(
        &mut self,
        root: Rc<Root>,
        spec: SnapshotSpec,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = (root, spec);
        refuse("have internal snapshots")
    }

    /// Makes the disk what it was when a snapshot was taken, its length too. The node is drained, and used
    /// by nobody. There is such a snapshot; [`SnapshotRef::find`] says which.
    ///
    /// # Errors
    ///
    /// As [`snapshot_create`](Self::snapshot_create).
    fn snapshot_apply<'a>(
        &'a mut self,
        root: Rc<Root>,
        snapshot: &'a SnapshotRef,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        let _ = (root, snapshot);
        refuse("have internal snapshots")
    }

    /// Deletes a snapshot. As for [`snapshot_apply`](Self::snapshot_apply), but the node may have users.
    ///
    /// # Errors
    ///
    /// As [`snapshot_create`](Self::snapshot_create); the snapshot is there or not, and what belongs to it
    /// alone may be leaked.
    fn snapshot_delete<'a>(
        &'a mut self,
        root: Rc<Root>,
        snapshot: &'a SnapshotRef,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        let _ = (root, snapshot);
        refuse("have internal snapshots")
    }

    /// Writes a part of a machine's state, from `offset` bytes after its beginning on. The node is
    /// drained.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden; else what could not be written.
    fn save_vm_state(
        &mut self,
        root: Rc<Root>,
        offset: u64,
        from: Segments,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = (root, offset, from);
        refuse("hold a machine's state")
    }

    /// Reads a part of it. What nobody has written reads as zeroes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden; else what could not be read.
    fn load_vm_state(
        &mut self,
        root: Rc<Root>,
        offset: u64,
        into: Segments,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = (root, offset, into);
        refuse("hold a machine's state")
    }

    /// Looks whether the image contradicts itself, and repairs what `fix` says. The node is drained and
    /// has been flushed, and is flushed again; to be repaired it has no other writer.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden; else what kept the check from going on. What is found
    /// wrong is no error.
    fn check(
        &mut self,
        root: Rc<Root>,
        fix: Fix,
    ) -> LocalBoxFuture<'_, Result<CheckReport, Error>> {
        let _ = (root, fix);
        refuse("be checked")
    }

    /// Amend, first of three: on the control thread before the image is changed, for permissions that
    /// the change needs.
    ///
    /// # Errors
    ///
    /// Stops the amendment.
    fn amend_begin(&mut self, options: &Options) -> Result<(), Error> {
        let _ = options;
        Err(Error::unsupported("this driver cannot amend its images"))
    }

    /// Amend, second of three: changes the image's own properties, as options of
    /// [`DriverType::amend_options`](super::DriverType::amend_options) say. An option `size` is checked
    /// here, and done by the core afterwards. Whether it succeeds or not, the image is read anew:
    /// [`reopen_prepare`](Self::reopen_prepare) follows, as if the image had been inactive.
    ///
    /// # Errors
    ///
    /// What could not be changed.
    fn amend(
        &mut self,
        root: Rc<Root>,
        options: Options,
        force: bool,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        let _ = (root, options, force);
        refuse("be amended")
    }

    /// Amend, last of three, also after a failure: undoes [`amend_begin`](Self::amend_begin).
    fn amend_end(&mut self) {}

    /// Interrupts waiting whose result nobody wants any more, such as for a lost connection.
    fn cancel_in_flight(&mut self) {}

    /// Suspends the next request that reaches `event`, under `tag`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] unless overridden: the core then asks the primary child.
    fn suspend_at(&mut self, event: &str, tag: &str) -> Result<(), Error> {
        let _ = (event, tag);
        Err(Error::unsupported("this driver suspends no requests"))
    }

    /// Lets requests suspended under `tag` go on, and forgets the tag.
    ///
    /// # Errors
    ///
    /// As [`suspend_at`](Self::suspend_at); [`ErrorKind::NotFound`] if there is no such tag.
    fn resume(&mut self, tag: &str) -> Result<(), Error> {
        let _ = tag;
        Err(Error::unsupported("this driver suspends no requests"))
    }

    /// Whether a request is suspended under `tag`.
    fn is_suspended(&self, tag: &str) -> bool {
        let _ = tag;
        false
    }
}

/// What [`Driver::activate`] gives: another I/O half where the image turned out different.
pub type Activation = Result<Option<Arc<dyn DriverIo>>, Error>;

/// What an image says of its backing image, or of another that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// As it stands there: relative to the image itself unless absolute or with a protocol.
    pub name: String,
    /// The name of its format; `None` if none is recorded.
    pub format: Option<String>,
}

/// What [`Driver::child_permissions`] is asked.
#[derive(Clone, Copy, Debug)]
pub struct ChildQuery {
    /// What kind of node asks.
    pub kind: DriverKind,
    /// Which child, in the order of the driver's type.
    pub index: usize,
    /// What it is to the node.
    pub role: Role,
    /// What all parents of the node need together.
    pub needs: Permissions,
    /// What all of them share.
    pub shares: Permissions,
    /// The node may not write.
    pub read_only: bool,
    /// The node has handed its image to another process.
    pub inactive: bool,
}

/// What [`Driver::child_permissions`] answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChildPermissions {
    /// What the node needs of the child.
    pub needs: Permissions,
    /// What it lets others have.
    pub shares: Permissions,
}

/// What a node is to become.
pub struct ReopenRequest {
    /// The context to do I/O with.
    pub context: Rc<IoContext>,
    /// The node's name, for messages.
    pub node_name: String,
    /// The driver's own options, as declared.
    pub table: &'static [OptionSpec],
    /// Options as they are.
    pub before: Options,
    /// As they shall be: what may be left out and was has its default.
    pub options: Options,
    /// Modes as they are.
    pub modes_before: OpenModes,
    /// As they shall be.
    pub modes: OpenModes,
    /// Somebody is going to write to the node: what `auto_read_only` goes by.
    pub will_write: bool,
    /// The children after the change.
    pub children: Vec<Option<super::OpenChild>>,
    /// The node as it is, which is drained and has been flushed; `None` if it does not write.
    pub root: Option<Rc<Root>>,
}

/// What preparing a reopen gives.
#[derive(Default)]
pub struct Reopened {
    /// The I/O half from the commit on; `None`: the one there is.
    pub io: Option<Arc<dyn DriverIo>>,
}

impl ReopenRequest {
    /// The names of the driver's options that would change.
    pub fn changed(&self) -> Vec<String> {
        let mut changed = self.before.differences(&self.options, &[self.table]);
        changed.retain(|name| self.table.iter().any(|spec| spec.is_key(name)));
        changed
    }

    /// What a driver without state of its own answers: modes are the pipeline's affair, and its own
    /// options stay as they are.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] that names an option which would change.
    pub fn generic(&self) -> Result<Reopened, Error> {
        match self.changed().first() {
            None => Ok(Reopened::default()),
            Some(name) => Err(Error::unsupported(format!(
                "cannot change the option '{name}' of node '{}'",
                self.node_name
            ))),
        }
    }
}

fn refuse<'a, T: 'a>(what: &str) -> LocalBoxFuture<'a, Result<T, Error>> {
    let message = format!("images of this driver cannot {what}");
    async move { Err(Error::new(ErrorKind::Unsupported, message)) }.boxed_local()
}
