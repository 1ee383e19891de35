//! Parts of a host that a test makes for itself: loop devices, small or strange file systems.
//!
//! They need root and a kernel that has them. Where they cannot be had, a test that wants them says so
//! and ends; under CI, for root, it fails instead.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::geteuid;

use crate::daemon::Place;

/// Says that `test` cannot run here, and why.
///
/// # Panics
///
/// Under CI as root, where everything should be there.
pub fn skip(test: &str, reason: &str) {
    let promised = std::env::var_os("CI").is_some() && geteuid().is_root();
    assert!(!promised, "{test}: {reason}");
    // Not `eprintln!`: a test that passes would keep that to itself.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// A block device on a file of this process. Detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    file: PathBuf,
    _place: Option<Place>,
}

impl LoopDevice {
    /// A device of so many zeroed bytes, with logical blocks of `block_bytes`.
    ///
    /// # Errors
    ///
    /// Why there is none to be had here.
    pub fn new(bytes: u64, block_bytes: u32) -> Result<Self, String> {
        Self::with(bytes, block_bytes, &[])
    }

    /// As [`new`](Self::new), without the right to write.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn read_only(bytes: u64, block_bytes: u32) -> Result<Self, String> {
        Self::with(bytes, block_bytes, &["--read-only"])
    }

    /// A device on a file that is there and stays when the device goes.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn on(file: &Path, block_bytes: u32) -> Result<Self, String> {
        Self::attach(file, block_bytes, &[], None)
    }

    fn with(bytes: u64, block_bytes: u32, options: &[&str]) -> Result<Self, String> {
        let place = Place::new();
        let file = place.sparse("device", bytes);
        Self::attach(&file, block_bytes, options, Some(place))
    }

    fn attach(
        file: &Path,
        block_bytes: u32,
        options: &[&str],
        place: Option<Place>,
    ) -> Result<Self, String> {
        let mut command = Command::new("losetup");
        let block = block_bytes.to_string();
        command.args(["--find", "--show", "--sector-size", &block]);
        command.args(options).arg(file);
        let path = run(command)?.trim().into();
        Ok(Self {
            path,
            file: file.to_owned(),
            _place: place,
        })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that it is on.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let mut command = Command::new("losetup");
        command.arg("--detach").arg(&self.path);
        if let Err(error) = run(command) {
            eprintln!("a loop device is left over: {error}");
        }
    }
}

/// A file system of its own. Taken down when dropped.
#[derive(Debug)]
pub struct Mount {
    place: Place,
    // Detached after the file system on it is gone.
    _device: Option<LoopDevice>,
}

impl Mount {
    /// A `tmpfs` of so many bytes.
    ///
    /// # Errors
    ///
    /// Why there is none to be had here.
    pub fn tmpfs(bytes: u64) -> Result<Self, String> {
        let size = format!("size={bytes}");
        Self::make(&["-t", "tmpfs", "-o", &size, "none"], None)
    }

    /// A `ramfs`: it can neither reserve space nor give it back, and has no direct I/O.
    ///
    /// # Errors
    ///
    /// As [`tmpfs`](Self::tmpfs).
    pub fn ramfs() -> Result<Self, String> {
        Self::make(&["-t", "ramfs", "none"], None)
    }

    /// An `ext4` of so many bytes on a device with logical blocks of `block_bytes`: direct I/O on its
    /// files has to be aligned to these.
    ///
    /// # Errors
    ///
    /// As [`tmpfs`](Self::tmpfs).
    pub fn ext4(bytes: u64, block_bytes: u32) -> Result<Self, String> {
        let device = LoopDevice::new(bytes, block_bytes)?;
        let mut command = Command::new("mkfs.ext4");
        command.args(["-q", "-b", "4096"]).arg(device.path());
        run(command)?;
        let path = device.path().to_string_lossy().into_owned();
        Self::make(&[&path], Some(device))
    }

    fn make(args: &[&str], device: Option<LoopDevice>) -> Result<Self, String> {
        let place = Place::new();
        let mut command = Command::new("mount");
        command.args(args).arg(place.path());
        run(command)?;
        Ok(Self {
            place,
            _device: device,
        })
    }

    /// A name in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Makes a sparse file of this length in it.
    pub fn sparse(&self, name: &str, bytes: u64) -> PathBuf {
        self.place.sparse(name, bytes)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        // A failed test may still have files open there.
        command.arg("--lazy").arg(self.place.path());
        if let Err(error) = run(command) {
            eprintln!("a file system is left over: {error}");
        }
    }
}

fn run(mut command: Command) -> Result<String, String> {
    // The tools that change the host live where a plain user's PATH does not look.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let first = errors.lines().next().unwrap_or("it does not say why");
        return Err(format!("{program} failed: {first}"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
