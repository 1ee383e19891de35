//! The file that all back-ends serve.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::peer::Format;
use harness::random::Random;
use rustix::fs::{Advice, fadvise};

use crate::row::{BLOCK_BYTES, Row};
use crate::shown;

/// Length of a disk for first writes.
const EMPTY_BYTES: u64 = 32 << 30;

/// A disk that nothing has been written to, removed when dropped.
pub(crate) struct Empty {
    path: PathBuf,
}

impl Empty {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn blocks(&self) -> u64 {
        EMPTY_BYTES / BLOCK_BYTES as u64
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// A file of our own, removed when dropped.
pub(crate) struct Disk {
    file: File,
    path: PathBuf,
    /// A qcow2 image of the same disk.
    image: Option<PathBuf>,
    bytes: u64,
    is_cached: bool,
}

impl Disk {
    /// Makes the file and writes all of it, so that every row finds its blocks allocated.
    ///
    /// # Errors
    ///
    /// There is something at `path` already: it is not overwritten. Or it cannot be written.
    pub(crate) fn create(path: &Path, bytes: u64) -> io::Result<Self> {
        let explain = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot create {}: {error}", shown(path)),
            )
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(explain)?;
        let disk = Self {
            file,
            path: path.canonicalize()?,
            image: None,
            bytes,
            is_cached: true,
        };
        // Not all equal and not zero: a file system might make something of that.
        let mut random = Random::new(bytes);
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..bytes >> 20 {
            for word in chunk.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next_u64().to_ne_bytes());
            }
            (&disk.file).write_all(&chunk).map_err(explain)?;
        }
        disk.settle()?;
        Ok(disk)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a qcow2 image of the disk, with every cluster allocated.
    ///
    /// # Errors
    ///
    /// What `qemu-img` says.
    pub(crate) fn make_image(&mut self) -> io::Result<()> {
        let image = self.path.with_extension("qcow2");
        self.image = Some(image.clone());
        let status = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2", "-S", "0"])
            .args([&self.path, &image])
            .status()?;
        match status.success() {
            true => Ok(()),
            false => Err(io::Error::other("qemu-img could not make a qcow2 image")),
        }
    }

    /// The file in a format.
    pub(crate) fn file(&self, format: Format) -> &Path {
        match (format, &self.image) {
            (Format::Qcow2, Some(image)) => image,
            _ => &self.path,
        }
    }

    /// A new disk beside the file: nothing of it has been written.
    ///
    /// # Errors
    ///
    /// What `qemu-img` says.
    pub(crate) fn make_empty(&self, format: Format) -> io::Result<Empty> {
        let path = self.path.with_extension(format!("empty.{format}"));
        let empty = Empty { path };
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", &format.to_string()])
            .arg(&empty.path)
            .arg(EMPTY_BYTES.to_string())
            .status()?;
        match status.success() {
            true => Ok(empty),
            false => Err(io::Error::other("qemu-img could not make an image")),
        }
    }

    /// How many blocks of the requests' size there are.
    pub(crate) fn blocks(&self) -> u64 {
        self.bytes / BLOCK_BYTES as u64
    }

    /// Fills or empties the page cache as `row` wants it. Returns `false` if the row cannot be
    /// run on this file system.
    pub(crate) fn prepare(&mut self, row: Row) -> io::Result<bool> {
        if !row.is_direct() {
            if !self.is_cached {
                for path in [Some(&self.path), self.image.as_ref()]
                    .into_iter()
                    .flatten()
                {
                    let mut file = File::open(path)?;
                    let mut chunk = vec![0; 1 << 20];
                    while file.read(&mut chunk)? > 0 {}
                }
                self.is_cached = true;
            }
            return Ok(true);
        }
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path);
        if opened.is_err() {
            return Ok(false);
        }
        fadvise(&self.file, 0, None, Advice::DontNeed)?;
        self.is_cached = false;
        Ok(true)
    }

    /// Waits until all that was written is on the disk.
    pub(crate) fn settle(&self) -> io::Result<()> {
        self.file.sync_data()?;
        let image = self.image.as_ref().map(File::open).transpose()?;
        if let Some(image) = &image {
            image.sync_data()?;
        }
        if !self.is_cached {
            // Reads past the back-end have left pages, which O_DIRECT writes would have to drop.
            for file in [Some(&self.file), image.as_ref()].into_iter().flatten() {
                fadvise(file, 0, None, Advice::DontNeed)?;
            }
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        if let Some(image) = &self.image {
            let _ = fs::remove_file(image);
        }
    }
}
