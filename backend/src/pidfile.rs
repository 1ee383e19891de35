//! The file that names the process, as `qemu-storage-daemon` writes it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use blockcore::{Error, ErrorKind};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

/// A file with the process's number, locked as long as this lives and removed with it.
pub struct Pidfile {
    path: PathBuf,
    file: File,
}

impl Pidfile {
    /// Writes the file.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if a process that runs has written it; the host's refusal.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let shown = path.display();
        let failed = |what: String, error: &std::io::Error| {
            let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
            Error::host(format!("cannot create PID file: {what}"), errno)
        };
        loop {
            let mut options = OpenOptions::new();
            // What it has may be another's, as long as it is not locked.
            options.read(true).write(true).create(true).truncate(false);
            let mut file = options
                .open(path)
                .map_err(|error| failed(format!("could not create '{shown}'"), &error))?;
            match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::AGAIN | Errno::ACCESS) => {
                    return Err(Error::new(
                        ErrorKind::Busy,
                        format!(
                            "cannot create PID file: '{shown}' is locked: the process that wrote it runs"
                        ),
                    ));
                }
                Err(errno) => {
                    let message = format!("cannot create PID file: cannot lock '{shown}'");
                    return Err(Error::host(message, errno));
                }
            }
            // Its owner may have removed it between.
            if !is_at(&file, path) {
                continue;
            }
            let text = format!("{}\n", std::process::id());
            file.set_len(0)
                .and_then(|()| file.write_all(text.as_bytes()))
                .map_err(|error| failed(format!("could not write '{shown}'"), &error))?;
            return Ok(Self {
                path: path.to_owned(),
                file,
            });
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (mine, there) = (
        file.metadata().map(identity),
        fs::metadata(path).map(identity),
    );
    matches!((mine, there), (Ok(mine), Ok(there)) if mine == there)
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // Somebody may have put another in its place.
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
