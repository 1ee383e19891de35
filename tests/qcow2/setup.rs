//! Images on the host, opened by us in this process or used by QEMU's tools.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::{
    Preallocation, SnapshotInfo, SnapshotRef, SnapshotSpec, Status, StatusFlags, TruncateFlags,
    WriteFlags, ZeroFlags,
};
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, RequestKind, Root};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind, IoError};

/// Runs one of QEMU's tools, which must succeed, and gives what it prints.
pub(crate) fn qemu(tool: &str, arguments: &[&str]) -> String {
    let output = qemu_output(tool, arguments);
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("it prints text")
}

/// Runs one of QEMU's tools.
pub(crate) fn qemu_output(tool: &str, arguments: &[&str]) -> Output {
    let run = || {
        let output = Command::new(tool).args(arguments).output();
        output.unwrap_or_else(|error| panic!("{tool} cannot be run: {error}"))
    };
    again_while_locked(run, |output| {
        let said = String::from_utf8_lossy(&output.stderr);
        said.contains("Failed to get") && said.contains("lock")
    })
}

/// Tries again for some time where an image is locked: a child that another test starts has this process's
/// open files, and with them the locks, until it runs its program.
fn again_while_locked<T>(mut run: impl FnMut() -> T, is_locked: impl Fn(&T) -> bool) -> T {
    for _ in 0..100 {
        let done = run();
        if !is_locked(&done) {
            return done;
        }
        drop(done);
        std::thread::sleep(Duration::from_millis(10));
    }
    run()
}

/// An image must be whole, without leaks, by QEMU's judgement.
pub(crate) fn assert_clean(image: &Path, when: &str) {
    let image = image.to_str().expect("a path of ours");
    let output = qemu_output("qemu-img", &["check", "-f", "qcow2", image]);
    assert!(
        output.status.success(),
        "{when}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What a guest would read of an image, by QEMU's judgement.
pub(crate) fn contents(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("contents");
    let (from, to) = (image.to_str().unwrap(), raw.to_str().unwrap());
    qemu(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", from, to],
    );
    let bytes = std::fs::read(&raw).expect("just made");
    std::fs::remove_file(&raw).expect("just made");
    bytes
}

/// A graph in this process.
pub(crate) struct Process {
    context: Rc<IoContext>,
    control: Control,
}

/// A disk that is open in this process.
pub(crate) struct Disk {
    context: Rc<IoContext>,
    control: Control,
    pub(crate) root: Rc<Root>,
    id: RootId,
}

impl Process {
    pub(crate) fn new() -> Self {
        let context = IoContext::new(make(EngineChoice::Auto).expect("an engine"));
        let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
        Self { context, control }
    }

    /// As [`new`](Self::new), with a directory for what has to outlive this process.
    pub(crate) fn keeping(directory: &Path) -> Self {
        let process = Self::new();
        let directory = Some(directory.to_owned());
        process.control.set_runtime_directory(directory);
        process
    }

    /// Opens what options describe, for writing.
    pub(crate) fn open(&self, options: &str) -> Result<Disk, Error> {
        self.open_for(options, true)
    }

    /// As [`open`](Self::open), for reading only.
    pub(crate) fn open_to_read(&self, options: &str) -> Result<Disk, Error> {
        self.open_for(options, false)
    }

    /// What a reader finds on what options describe.
    pub(crate) fn read_all(&self, options: &str) -> Result<Vec<u8>, Error> {
        let disk = self.open_to_read(&format!("read-only=on,{options}"))?;
        let bytes = disk.read(0, disk.root.bytes());
        disk.close()?;
        Ok(bytes)
    }

    fn open_for(&self, options: &str, writes: bool) -> Result<Disk, Error> {
        let options = Options::parse(&format!("node-name=disk,{options}"), None)?;
        let open = || {
            let (control, options) = (self.control.clone(), options.clone());
            self.context.block_on(async move {
                control.add(options).await?;
                let used = use_it(&control, writes).await;
                if used.is_err() {
                    control.remove("disk").await?;
                }
                used
            })
        };
        let is_locked = |opened: &Result<_, Error>| {
            let error = opened.as_ref().err();
            error.is_some_and(|error| error.kind() == ErrorKind::Busy)
        };
        let (root, id) = again_while_locked(open, is_locked)?;
        Ok(Disk {
            context: Rc::clone(&self.context),
            control: self.control.clone(),
            root,
            id,
        })
    }
}

/// A root at the disk that is open.
async fn use_it(control: &Control, writes: bool) -> Result<(Rc<Root>, RootId), Error> {
    let mut spec = match writes {
        true => RootSpec::writer("a test"),
        false => RootSpec::reader("a test"),
    };
    if writes {
        spec.needs |= Permissions::RESIZE;
    }
    let id = control.add_root("disk", spec).await?;
    Ok((control.root_here(id)?, id))
}

impl Disk {
    /// What a request, or several, give.
    pub(crate) fn run<T: 'static, F>(&self, requests: impl FnOnce(Rc<Root>) -> F) -> T
    where
        F: Future<Output = T> + 'static,
    {
        self.context.block_on(requests(Rc::clone(&self.root)))
    }

    /// Does something to the disk with the control API.
    pub(crate) fn control<T: 'static, F>(&self, work: impl FnOnce(Control) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>> + 'static,
    {
        self.context.block_on(work(self.control.clone()))
    }

    pub(crate) fn amend(&self, options: &str, force: bool) -> Result<(), Error> {
        let options = Options::parse(options, None)?;
        self.control(|control| async move { control.amend("disk", options, force).await })
    }

    /// Reopens the node with these options; what is left out has its default.
    pub(crate) fn reopen(&self, options: &str) -> Result<(), Error> {
        let options = Options::parse(&format!("node-name=disk,{options}"), None)?;
        self.control(|control| async move { control.reopen(vec![options]).await })
    }

    /// Hands the image over to another process, which is `other`, and takes it back.
    pub(crate) fn lend(mut self, other: impl FnOnce()) -> Result<Self, Error> {
        let (root, id) = (self.root, self.id);
        let control = self.control.clone();
        self.context.block_on(async move {
            drop(root);
            control.remove_root(id).await?;
            control.set_active("disk", false).await
        })?;
        other();
        let control = self.control.clone();
        (self.root, self.id) = self.context.block_on(async move {
            control.set_active("disk", true).await?;
            use_it(&control, true).await
        })?;
        Ok(self)
    }

    /// Looks at the graph.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Graph) -> T) -> T {
        self.control.read(look)
    }

    pub(crate) fn take_snapshot(&self, spec: SnapshotSpec) -> Result<(), Error> {
        self.control(|control| async move { control.take_snapshot("disk", spec).await })
    }

    pub(crate) fn delete_snapshot(&self, which: SnapshotRef) -> Result<SnapshotInfo, Error> {
        self.control(|control| async move { control.delete_snapshot("disk", &which).await })
    }

    /// Applies a snapshot, while nobody uses the disk.
    pub(crate) fn apply_snapshot(mut self, which: SnapshotRef) -> Result<Self, Error> {
        let (root, id) = (self.root, self.id);
        let control = self.control.clone();
        (self.root, self.id) = self.context.block_on(async move {
            drop(root);
            control.remove_root(id).await?;
            control.apply_snapshot("disk", &which).await?;
            use_it(&control, true).await
        })?;
        Ok(self)
    }

    /// The same disk, read only from now on by whoever has it.
    pub(crate) fn without_writer(self) -> Result<Self, Error> {
        self.used_again(false)
    }

    /// The same disk, for writing.
    pub(crate) fn with_writer(self) -> Result<Self, Error> {
        self.used_again(true)
    }

    fn used_again(mut self, writes: bool) -> Result<Self, Error> {
        let (root, id) = (self.root, self.id);
        let control = self.control.clone();
        (self.root, self.id) = self.context.block_on(async move {
            drop(root);
            control.remove_root(id).await?;
            use_it(&control, writes).await
        })?;
        Ok(self)
    }

    pub(crate) fn snapshots(&self) -> Vec<SnapshotInfo> {
        let list = self.control(|control| async move { control.snapshots("disk").await });
        list.expect("images have them")
    }

    pub(crate) fn save_vm_state(&self, offset: u64, bytes: &[u8]) {
        let from = Segments::allocate(bytes.len(), 4096);
        from.copy_from(bytes);
        let saved = self
            .control(|control| async move { control.save_vm_state("disk", offset, from).await });
        saved.expect("it can be saved");
    }

    pub(crate) fn load_vm_state(&self, offset: u64, bytes: u64) -> Vec<u8> {
        let into = Segments::allocate(bytes as usize, 4096);
        into.fill(0x5a);
        let given = into.clone();
        let loaded = self
            .control(|control| async move { control.load_vm_state("disk", offset, given).await });
        loaded.expect("it can be loaded");
        into.to_vec()
    }

    pub(crate) fn read(&self, offset: u64, bytes: u64) -> Vec<u8> {
        let root = Rc::clone(&self.root);
        self.context.block_on(async move {
            let into = Segments::allocate(bytes as usize, 4096);
            into.fill(0x5a);
            root.read(offset, into.clone())
                .await
                .expect("it can be read");
            into.to_vec()
        })
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let root = Rc::clone(&self.root);
        let from = Segments::allocate(bytes.len(), 4096);
        from.copy_from(bytes);
        let written = async move { root.write(offset, from, WriteFlags::empty()).await };
        self.context.block_on(written).expect("it can be written");
    }

    pub(crate) fn write_compressed(&self, offset: u64, bytes: &[u8]) {
        let root = Rc::clone(&self.root);
        let from = Segments::allocate(bytes.len(), 4096);
        from.copy_from(bytes);
        let written = async move {
            let request = root.enter(RequestKind::Write, offset, from.bytes()).await;
            request.io().write_compressed(offset, from).await
        };
        self.context
            .block_on(written)
            .expect("it can be compressed");
    }

    pub(crate) fn write_zeroes(&self, offset: u64, bytes: u64, flags: ZeroFlags) {
        let root = Rc::clone(&self.root);
        let written = async move { root.write_zeroes(offset, bytes, flags).await };
        self.context.block_on(written).expect("it can be zeroed");
    }

    pub(crate) fn discard(&self, offset: u64, bytes: u64) {
        let root = Rc::clone(&self.root);
        let discarded = async move { root.discard(offset, bytes).await };
        self.context
            .block_on(discarded)
            .expect("it can be discarded");
    }

    pub(crate) fn flush(&self) {
        let root = Rc::clone(&self.root);
        let flushed = async move { root.flush().await };
        self.context.block_on(flushed).expect("it can be flushed");
    }

    pub(crate) fn resize(&self, bytes: u64) {
        self.try_resize(bytes).expect("it can be resized");
    }

    pub(crate) fn try_resize(&self, bytes: u64) -> Result<(), IoError> {
        let root = Rc::clone(&self.root);
        self.context.block_on(async move {
            let request = root.enter(RequestKind::Truncate, 0, 0).await;
            let flags = TruncateFlags::empty();
            request
                .truncate(bytes, true, Preallocation::Off, flags)
                .await
        })
    }

    /// Whether each byte is said to be zero, data, or neither.
    pub(crate) fn status(&self, offset: u64, bytes: u64) -> Status {
        let root = Rc::clone(&self.root);
        self.context.block_on(async move {
            let request = root.enter(RequestKind::Other, offset, bytes).await;
            request
                .block_status(true, offset, bytes)
                .await
                .expect("it has a status")
        })
    }

    /// What is said to read as zeroes reads as zeroes.
    pub(crate) fn check_status(&self, model: &[u8]) {
        let mut offset = 0;
        while offset < model.len() as u64 {
            let status = self.status(offset, model.len() as u64 - offset);
            let end = (offset + status.bytes).min(model.len() as u64);
            if status.flags.contains(StatusFlags::ZERO) {
                let part = &model[offset as usize..end as usize];
                assert!(
                    part.iter().all(|byte| *byte == 0),
                    "{status:?} at {offset:#x}"
                );
            }
            offset = end;
        }
    }

    pub(crate) fn close(self) -> Result<(), Error> {
        let Self {
            context,
            control,
            root,
            id,
        } = self;
        drop(root);
        let closed = context.block_on(async move {
            control.remove_root(id).await?;
            control.remove("disk").await
        });
        // The context lets go of the root, and so of itself, at its next turn.
        context.turn(&mut Vec::new());
        closed
    }
}

/// A directory with images in it.
pub(crate) struct Images {
    directory: tempfile::TempDir,
}

impl Images {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("there is room for tests");
        Self { directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}
