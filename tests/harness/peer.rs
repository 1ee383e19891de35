//! Back-ends as processes: ours and those that it is compared with, started alike.
#![expect(
    unsafe_code,
    reason = "prepares a child between fork and exec; reads another process's CPU clock"
)]

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use tempfile::TempDir;

/// How long an orderly stop may take.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A program that serves a file on vhost-user-blk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Program {
    /// `stonework serve`.
    Stonework,
    /// `qemu-storage-daemon` with an iothread.
    StorageDaemon(Aio),
    /// `baseline`: a plain disk on vhost-user-backend.
    Baseline,
}

/// How `qemu-storage-daemon` does a file's I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Aio {
    /// A pool of threads: its default.
    Threads,
    /// io_uring.
    IoUring,
    /// Linux AIO. Needs O_DIRECT.
    Native,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes.
    Raw,
    /// A qcow2 image. Not for `baseline`.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// What to serve, and how.
#[derive(Debug, Clone, Copy)]
pub struct Setup<'a> {
    /// Which file.
    pub file: &'a Path,
    /// What it is.
    pub format: Format,
    /// Virtqueues to offer.
    pub queues: usize,
    /// Whether the file is opened with O_DIRECT.
    pub direct: bool,
}

impl Program {
    /// Where its executable is, or `None` if it is not there.
    ///
    /// Ours are looked for beside the running executable, or beside the directory that it is in
    /// as a test is; `STONEWORK_BIN` names another `stonework`.
    pub fn executable(self) -> Option<PathBuf> {
        match self {
            Program::Stonework => std::env::var_os("STONEWORK_BIN")
                .map(PathBuf::from)
                .or_else(|| beside("stonework")),
            Program::StorageDaemon(_) => {
                let path = std::env::var_os("PATH")?;
                std::env::split_paths(&path)
                    .map(|directory| directory.join("qemu-storage-daemon"))
                    .find(|file| file.is_file())
            }
            Program::Baseline => beside("baseline"),
        }
    }

    fn arguments(self, setup: Setup<'_>, socket: &Path) -> Vec<OsString> {
        let file = setup.file.display();
        let socket = socket.display();
        let queues = setup.queues;
        let line = match self {
            Program::Stonework => {
                let cache = if setup.direct { "none" } else { "writeback" };
                let format = setup.format;
                format!(
                    "serve {file} --format {format} --socket {socket} --queues {queues} --cache {cache}"
                )
            }
            Program::StorageDaemon(aio) => {
                let direct = if setup.direct { "on" } else { "off" };
                let (file_name, image) = match setup.format {
                    Format::Raw => ("disk0", ""),
                    Format::Qcow2 => (
                        "file0",
                        "--blockdev driver=qcow2,node-name=disk0,file=file0,discard=unmap",
                    ),
                };
                format!(
                    "--object iothread,id=io0 --blockdev driver=file,node-name={file_name},\
                     filename={file},cache.direct={direct},aio={aio},discard=unmap {image} \
                     --export type=vhost-user-blk,id=export0,node-name=disk0,addr.type=unix,\
                     addr.path={socket},writable=on,num-queues={queues},iothread=io0"
                )
            }
            Program::Baseline => {
                let direct = if setup.direct { " --direct" } else { "" };
                format!("{file} --socket {socket} --queues {queues}{direct}")
            }
        };
        line.split_whitespace().map(OsString::from).collect()
    }
}

impl fmt::Display for Program {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Program::Stonework => "stonework",
            Program::StorageDaemon(_) => "qemu-storage-daemon",
            Program::Baseline => "baseline",
        })
    }
}

impl fmt::Display for Aio {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Aio::Threads => "threads",
            Aio::IoUring => "io_uring",
            Aio::Native => "native",
        })
    }
}

/// A back-end that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Peer {
    program: Program,
    child: Child,
    directory: TempDir,
}

impl Peer {
    /// Starts `program`. Its socket may take a moment to appear; see
    /// [`Driver::connect`](crate::driver::Driver::connect).
    ///
    /// It may run where the calling thread may: pinning that thread while it starts a back-end
    /// pins the back-end. It is killed when that thread ends, so that none is left behind.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if the program is not there, else what starting it reports.
    pub fn start(program: Program, setup: Setup<'_>) -> io::Result<Self> {
        let executable = program
            .executable()
            .ok_or_else(|| io::Error::new(ErrorKind::NotFound, format!("no {program} found")))?;
        let directory = tempfile::tempdir()?;
        let mut command = Command::new(executable);
        command
            .args(program.arguments(setup, &directory.path().join("socket")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("stderr"))?);
        // SAFETY: the closure makes one system call and nothing else, which is allowed between
        // fork and exec.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let child = command.spawn()?;
        Ok(Self {
            program,
            child,
            directory,
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to its standard error.
    pub fn complaints(&self) -> String {
        fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
    }

    /// CPU time of all its threads, those that have ended included.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        cpu_time(self.child.id())
    }

    /// Whether it has `file` open with O_DIRECT, or `None` if it does not have it open.
    ///
    /// # Errors
    ///
    /// The process is gone.
    pub fn is_direct(&self, file: &Path) -> io::Result<Option<bool>> {
        let file = file.canonicalize()?;
        let process = PathBuf::from(format!("/proc/{}", self.id()));
        for entry in fs::read_dir(process.join("fd"))? {
            let name = entry?.file_name();
            if fs::read_link(process.join("fd").join(&name)).is_ok_and(|target| target == file) {
                let info = fs::read_to_string(process.join("fdinfo").join(&name))?;
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
                let flags = flags.and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok());
                return Ok(flags.map(|flags| flags & libc::O_DIRECT != 0));
            }
        }
        Ok(None)
    }

    /// Asks it to stop, and waits until it has.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::TimedOut`] if ours does not stop: it has been killed then. An error as well if
    /// it ended on its own, or in another way than it promises to.
    pub fn stop(mut self) -> io::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            kill_process(pid, Signal::TERM)?;
        }
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if start.elapsed() > STOP_LIMIT {
                if matches!(self.program, Program::StorageDaemon(_)) {
                    // Dropping this kills it. All that it has completed is in its file.
                    return Ok(());
                }
                return Err(io::Error::new(
                    ErrorKind::TimedOut,
                    format!("{} does not stop: {}", self.program, self.complaints()),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        if !self.is_orderly(status) {
            return Err(io::Error::other(format!(
                "{} ended with {status}: {}",
                self.program,
                self.complaints()
            )));
        }
        Ok(())
    }

    /// Ours exits with success, and `baseline` has no orderly stop. `qemu-storage-daemon` 10.0.2
    /// now and then crashes when it is to stop just after its front-end has left, and 7.2 may
    /// not stop at all, which is not for us to judge.
    fn is_orderly(&self, status: ExitStatus) -> bool {
        match self.program {
            Program::Stonework => status.success(),
            Program::Baseline => status.signal() == Some(libc::SIGTERM),
            Program::StorageDaemon(_) => true,
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Harmless if it has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time of all threads that the process `id` has or had.
///
/// # Errors
///
/// There is no such process.
pub fn cpu_time(id: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: writes to the one place it is given.
    let error = unsafe { libc::clock_getcpuclockid(id as libc::pid_t, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: as above.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// A file of that name in the running executable's directory, or in the one above `deps`.
fn beside(name: &str) -> Option<PathBuf> {
    let executable = std::env::current_exe().ok()?;
    let directory = executable.parent()?;
    [directory, directory.parent()?]
        .iter()
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}
