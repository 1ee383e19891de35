//! A disk that keeps nothing: what its guest writes goes to an overlay in a nameless file, which is gone when
//! the process is, however it ends. The disk below is only read.
//!
//! Nothing of the overlay has to be durable, or to outlive this process: its flushes reach no disk, and no crash
//! segment is kept of it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockcore::driver::NewChild;
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, RootSpec};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::daemon::Daemon;

/// The overlay's format.
const FORMAT: &str = "qcow2";
/// Where the file is if `TMPDIR` says nothing: it may become as large as the disk, which is too much for what
/// hosts keep in memory.
const DIRECTORY: &str = "/var/tmp";
/// How many names are tried where files without one cannot be made.
const NAMES: u32 = 100;

/// Adds a node called `name` over the node `base`, and a node for its file.
///
/// # Errors
///
/// What could not be made.
pub(crate) fn add(daemon: &Rc<Daemon>, name: &str, base: &str) -> Result<(), Error> {
    let directory = std::env::var_os("TMPDIR").filter(|directory| !directory.is_empty());
    let directory = directory.map_or_else(|| DIRECTORY.into(), PathBuf::from);
    let file = nameless(&directory).map_err(|error| {
        let text = format!(
            "cannot make a file in '{}' for what is written to the temporary disk (TMPDIR names another \
             place)",
            directory.display()
        );
        Error::host(text, error)
    })?;
    let file_node = format!("{name}-file");
    let mut options = Options::default();
    options.set("driver", "file");
    options.set("node-name", &*file_node);
    options.set("discard", "unmap");
    options.set("cache.no-flush", "on");
    // Opened anew, so that it is the node's own.
    options.set("filename", format!("/proc/self/fd/{}", file.as_raw_fd()));
    daemon.block_on(|daemon| async move { daemon.add_node(options).await })?;
    let bytes = daemon
        .control()
        .read(|graph| graph.node(base).map(|node| node.bytes()))?;
    let filled = file_node.clone();
    daemon.block_on(|daemon| fill(daemon.control().clone(), filled, bytes))?;
    let mut options = Options::default();
    options.set("driver", FORMAT);
    options.set("node-name", name);
    options.set("discard", "unmap");
    options.set("cache.no-flush", "on");
    options.set("file", file_node);
    options.set("backing", base);
    daemon.block_on(|daemon| async move { daemon.add_node(options).await })
}

/// A file that is nowhere to be found.
fn nameless(directory: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        // Not every file system can.
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
        result => return result,
    }
    let process = std::process::id();
    for number in 0..NAMES {
        let path = directory.join(format!("stonework-{process}-{number}"));
        let file = match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode) {
            Err(Errno::EXIST) => continue,
            result => result?,
        };
        rustix::fs::unlinkat(CWD, &path, rustix::fs::AtFlags::empty())?;
        return Ok(file);
    }
    Err(Errno::EXIST)
}

/// Makes an image on the file's node.
async fn fill(control: Control, file_node: String, bytes: u64) -> Result<(), Error> {
    let kind = control.read(|graph| graph.driver_type(FORMAT))?;
    let create_on = kind.create_on.ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("images of format '{FORMAT}' cannot be made by this version of stonework"),
        )
    })?;
    let mut spec = RootSpec::writer("its making").in_units_of(512);
    spec.needs |= Permissions::RESIZE;
    let id = control.add_root(&file_node, spec).await?;
    let root = control.root_here(id)?;
    let mut children = vec![None; kind.children.len()];
    children[0] = Some(NewChild {
        root,
        name: String::new(),
    });
    let mut options = Options::default();
    options.set("size", bytes.to_string());
    let made = create_on(children, options).await;
    let released = control.remove_root(id).await;
    made.and(released)
}
