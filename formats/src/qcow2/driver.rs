//! [`Qcow2Driver`]: the global-state half.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::dirty_bitmap::KeptBitmap;
use blockcore::driver::{
    BackingName, Driver, Limits, OpenModes, ReopenRequest, Reopened, Role, SnapshotInfo,
    SnapshotRef, SnapshotSpec,
};
use blockcore::engine::HostCall;
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, RequestKind, Root};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind, IoError};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::head;
use super::image::{DATA_FILE, FILE, Image, RunOptions, write_steps};
use super::io::Qcow2Io;
use super::layout::entry::L2Entry;
use super::layout::header::{Features, MAX_BACKING_BYTES, field};
use super::open::{Source, open_image, run_options};

/// See the module's header.
pub(super) struct Qcow2Driver {
    image: Arc<Image>,
    runtime_directory: Option<PathBuf>,
    /// What was read of bitmaps, until the graph asks for it.
    loaded: Option<Vec<KeptBitmap>>,
    /// What a reopen has prepared.
    prepared: RefCell<Option<Prepared>>,
    /// The image's file has been changed otherwise than what is in memory, which is to be read anew and
    /// must not be written back.
    is_stale: bool,
}

/// What a reopen will have changed.
enum Prepared {
    /// Another image: this one was read-only.
    Image(Arc<Image>, Vec<KeptBitmap>),
    /// What the image goes by.
    Options(RunOptions),
}

impl Qcow2Driver {
    pub(super) fn new(
        image: &Arc<Image>,
        bitmaps: Vec<KeptBitmap>,
        runtime_directory: Option<PathBuf>,
    ) -> Self {
        Self {
            image: Arc::clone(image),
            runtime_directory,
            loaded: Some(bitmaps),
            prepared: RefCell::new(None),
            is_stale: false,
        }
    }

    /// Does no more with an image that could not be read anew when it had to be.
    fn give_up_stale(&self) {
        if self.is_stale {
            self.image.gate.break_off();
        }
    }

    /// Writes everything back and gives back what is reserved: the image is as if nobody had it open.
    async fn finish(&self, root: &Rc<Root>) -> Result<(), Error> {
        let request = root.enter(RequestKind::Other, 0, 0).await;
        let io = request.io();
        if io.modes().read_only || self.image.gate.is_broken() {
            return Ok(());
        }
        let finished = self.image.finish(io).await;
        finished.map_err(|error| failed(io.name(), "write the metadata of", error))?;
        let left = self.image.leave_segment(io).await;
        left.map_err(|error| failed(io.name(), "write the header of", error))
    }
}

fn failed(node: &str, what: &str, error: IoError) -> Error {
    let text = format!("cannot {what} the image of node '{node}': {error}");
    Error::new(ErrorKind::Io, text)
}

impl Driver for Qcow2Driver {
    fn close(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move { self.finish(&root).await }.boxed_local()
    }

    fn limits(&self, children: &[Option<Limits>]) -> Limits {
        let g = self.image.geometry;
        let cluster = g.cluster_bytes() as u32;
        Limits {
            zero_alignment: g.subcluster_bytes() as u32,
            discard_alignment: cluster,
            discard_granularity_bytes: cluster,
            cluster_bytes: cluster,
            ..children[0].map_or_else(Limits::default, Limits::above)
        }
    }

    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            let writes = |modes: OpenModes| !modes.read_only && !modes.inactive;
            let (wrote, will_write) = (writes(request.modes_before), writes(request.modes));
            let changed = request.changed();
            let in_place = |name: &String| {
                let options = ["discard", "lazy-refcounts", "overlap-check"];
                options.iter().any(|option| name.contains(option))
            };
            if wrote && will_write && changed.iter().all(in_place) {
                let header = self.image.header().clone();
                let options =
                    run_options(&request.options, request.modes, &header, &request.node_name)?;
                *self.prepared.borrow_mut() = Some(Prepared::Options(options));
                return Ok(Reopened::default());
            }
            if let Some(root) = request.root.as_ref().filter(|_| !self.is_stale) {
                // Nothing of it is kept back then. It stays of use if this is given up: what it writes from
                // here on is durable before it completes.
                self.finish(root).await?;
            }
            if !will_write && changed.is_empty() {
                return Ok(Reopened::default());
            }
            // It is read anew.
            if self.is_stale && self.image.gate.is_broken() {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "the image of node '{}' could not be written",
                        request.node_name
                    ),
                ));
            }
            let file = request.children[0].as_ref().expect("not optional");
            let source = Source {
                node: request.node_name.clone(),
                root: Rc::clone(&file.root),
                runtime_directory: self.runtime_directory.clone(),
            };
            let opened = open_image(&source, &request.options, request.modes).await;
            let (image, bitmaps) = opened.inspect_err(|_| self.give_up_stale())?;
            *self.prepared.borrow_mut() = Some(Prepared::Image(Arc::clone(&image), bitmaps));
            Ok(Reopened {
                io: Some(Arc::new(Qcow2Io(image))),
            })
        }
        .boxed_local()
    }

    fn reopen_commit(&mut self) {
        match self.prepared.take() {
            Some(Prepared::Image(image, bitmaps)) => {
                self.image = image;
                self.loaded = Some(bitmaps);
                self.is_stale = false;
            }
            Some(Prepared::Options(options)) => self.image.set_options(options),
            None => {}
        }
    }

    fn reopen_abort(&mut self) {
        self.prepared.take();
        self.give_up_stale();
    }

    fn stop_writing(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move { self.finish(&root).await }.boxed_local()
    }

    fn inactivate(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move { self.finish(&root).await }.boxed_local()
    }

    fn backing(&self) -> Option<BackingName> {
        let header = self.image.header();
        let name = header.backing.clone()?;
        Some(BackingName {
            name,
            format: header.extensions.backing_format.clone(),
        })
    }

    fn named_children(&self) -> Vec<(usize, BackingName)> {
        let header = self.image.header();
        let named = header.extensions.data_file.as_ref();
        let has_one = header.geometry().data_file;
        let data_file = named.filter(|_| has_one).map(|name| BackingName {
            name: name.clone(),
            format: None,
        });
        data_file
            .map(|file| (DATA_FILE, file))
            .into_iter()
            .collect()
    }

    fn child_role(&self, index: usize) -> Option<Role> {
        let has_data_file = self.image.geometry.data_file;
        (index == FILE && has_data_file).then_some(Role::METADATA | Role::PRIMARY)
    }

    fn change_backing(
        &mut self,
        root: Rc<Root>,
        backing: Option<BackingName>,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            let io = request.io();
            let mut header = self.image.header().clone();
            if let Some(new) = &backing {
                if header.geometry().data_file && self.image.raw_data_file() {
                    return Err(Error::invalid(format!(
                        "the image of node '{}' cannot have a backing image: its external data file is to \
                         be readable as raw",
                        io.name()
                    )));
                }
                if new.name.len() > MAX_BACKING_BYTES {
                    let text = format!(
                        "the name of a backing image has at most {MAX_BACKING_BYTES} bytes, and '{}' has {}",
                        new.name,
                        new.name.len()
                    );
                    return Err(Error::new(ErrorKind::NoSpace, text));
                }
            }
            header.extensions.backing_format = backing.as_ref().and_then(|new| new.format.clone());
            header.backing = backing.map(|new| new.name);
            let old = self.image.header().clone();
            let steps = head::steps(io, &old, &header).await?;
            let flushed = self.image.flush_file(io).await;
            flushed.map_err(|error| failed(io.name(), "flush", error))?;
            let written = write_steps(io, &steps).await;
            written.map_err(|error| failed(io.name(), "write the header of", error))?;
            *self.image.header() = header;
            Ok(())
        }
        .boxed_local()
    }

    fn take_bitmaps(&mut self) -> Option<Vec<KeptBitmap>> {
        self.loaded.take()
    }

    fn keeps_bitmaps(&self) -> bool {
        self.image.header().version >= 3
    }

    fn check_new_bitmap(&self, kept: &[KeptBitmap], new: &KeptBitmap) -> Result<(), Error> {
        self.image.check_new_bitmap(kept, new)
    }

    fn use_bitmaps(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            let io = request.io();
            let used = self.image.use_bitmaps(io).await;
            used.map_err(|error| failed(io.name(), "say that bitmaps are out of date in", error))
        }
        .boxed_local()
    }

    fn store_bitmaps(
        &mut self,
        root: Rc<Root>,
        bitmaps: Vec<KeptBitmap>,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            self.image.store_bitmaps(request.io(), bitmaps).await
        }
        .boxed_local()
    }

    fn remove_bitmap<'a>(
        &'a mut self,
        root: Rc<Root>,
        name: &'a str,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            self.image.remove_bitmap(request.io(), name).await
        }
        .boxed_local()
    }

    fn has_zero_init(&self) -> bool {
        !self.image.geometry.data_file
    }

    fn has_snapshots(&self) -> bool {
        true
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.image.snapshots().infos()
    }

    fn snapshot_create(
        &mut self,
        root: Rc<Root>,
        spec: SnapshotSpec,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            self.image.take_snapshot(request.io(), &spec).await
        }
        .boxed_local()
    }

    fn snapshot_apply<'a>(
        &'a mut self,
        root: Rc<Root>,
        snapshot: &'a SnapshotRef,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            self.image.apply_snapshot(request.io(), snapshot).await
        }
        .boxed_local()
    }

    fn snapshot_delete<'a>(
        &'a mut self,
        root: Rc<Root>,
        snapshot: &'a SnapshotRef,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            self.image.delete_snapshot(request.io(), snapshot).await
        }
        .boxed_local()
    }

    fn amend_begin(&mut self, _options: &Options) -> Result<(), Error> {
        Ok(())
    }

    fn amend(
        &mut self,
        root: Rc<Root>,
        options: Options,
        force: bool,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            let amended = self.image.amend(request.io(), &options, force).await;
            self.is_stale = matches!(amended, Ok(true)) || self.image.gate.is_broken();
            amended.map(drop)
        }
        .boxed_local()
    }

    fn save_vm_state(
        &mut self,
        root: Rc<Root>,
        offset: u64,
        from: Segments,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            let io = request.io();
            if self.image.geometry.data_file {
                return Err(Error::unsupported(format!(
                    "the image of node '{}' cannot hold a machine's state: its data is in another file",
                    io.name()
                )));
            }
            let saved = self.image.save_state(io, offset, from).await;
            saved.map_err(|error| failed(io.name(), "save a machine's state in", error))
        }
        .boxed_local()
    }

    fn load_vm_state(
        &mut self,
        root: Rc<Root>,
        offset: u64,
        into: Segments,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Read, 0, 0).await;
            let io = request.io();
            let loaded = self.image.load_state(io, offset, into).await;
            loaded.map_err(|error| failed(io.name(), "load a machine's state from", error))
        }
        .boxed_local()
    }

    fn make_empty(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Discard, 0, 0).await;
            let io = request.io();
            let emptied = self.image.make_empty(io).await;
            emptied.map_err(|error| failed(io.name(), "empty", error))
        }
        .boxed_local()
    }
}

impl Image {
    /// Writes everything back, and leaves nothing counted that nothing refers to. No request is under way.
    pub(super) async fn finish(&self, io: Io<'_>) -> Result<(), IoError> {
        self.commit(io).await?;
        while self.releasing.load(Ordering::Acquire) > 0 {
            io.context()
                .delay(std::time::Duration::from_millis(1))
                .await;
        }
        *self.tail() = None;
        self.give_back_reserved(io).await?;
        self.commit(io).await
    }

    /// Everything is in the image: nothing needs to outlive this process. What is written all the same is
    /// made durable before it completes.
    pub(super) async fn leave_segment(&self, io: Io<'_>) -> Result<(), IoError> {
        // Once: by now somebody else may have the image, and a segment of that name.
        let Some(segment) = self.segment.as_ref().filter(|left| !left.is_closed()) else {
            return Ok(());
        };
        let autoclear = {
            let mut header = self.header();
            header.features.autoclear &= !Features::SEGMENT;
            header.features.autoclear
        };
        let cleared = (field::AUTOCLEAR, autoclear.to_be_bytes().to_vec());
        write_steps(io, &[cleared]).await?;
        segment.close();
        self.allow_plain_writes();
        let removed = io
            .context()
            .host(HostCall::Remove(segment.path().to_owned()));
        if let Err(error) = removed.await {
            tracing::warn!("cannot remove '{}': {error}", segment.path().display());
        }
        Ok(())
    }

    /// Lets go of all that is mapped.
    async fn make_empty(&self, io: Io<'_>) -> Result<(), IoError> {
        let g = self.geometry;
        let tables = self.l1().entries.len();
        for l1_index in 0..tables {
            if self.l1().get(l1_index).table().is_none() {
                continue;
            }
            self.own_table(io, l1_index).await?;
            let first = l1_index as u64 * g.table_entries();
            for cluster in first..first + g.table_entries() {
                self.entry(io, cluster).await?;
            }
            self.publish(io, first, g.table_entries(), |_, _| L2Entry::default())
                .await?;
        }
        self.commit(io).await
    }
}
