//! A back-end process: started, watched through `/proc`, stopped.
//!
//! The daemon under test is `stonework` beside the test's own executable, or what
//! `STONEWORK_BIN` names. What it prints is kept and shown when a test fails.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::frontend::LIMIT;
use crate::frontend::memory::MEMORY_NAME;

/// The daemon's executable.
///
/// # Panics
///
/// If it was not built.
pub fn stonework_path() -> PathBuf {
    if let Some(path) = std::env::var_os("STONEWORK_BIN") {
        return path.into();
    }
    let test = std::env::current_exe().expect("this test has an executable");
    let path = test
        .parent()
        .and_then(Path::parent)
        .expect("test executables lie in target/PROFILE/deps")
        .join("stonework");
    assert!(
        path.exists(),
        "{} does not exist: build it first (cargo build -p backend)",
        path.display()
    );
    path
}

/// A command line that begins with the daemon's executable.
pub fn stonework(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(stonework_path());
    command.args(args);
    command
}

/// `stonework serve` of a raw disk.
pub fn serve(disk: &Path, socket: &Path, options: &[&str]) -> Command {
    let mut command = stonework(["serve"]);
    command.arg(disk).arg("--socket").arg(socket);
    if !options.contains(&"--format") {
        command.args(["--format", "raw"]);
    }
    command.args(options);
    command
}

/// Waits until `check` holds.
///
/// # Panics
///
/// If it does not within [`LIMIT`]; `what` says what was waited for.
#[track_caller]
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !check() {
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A running back-end. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    output: Output,
    errors: Output,
}

impl Daemon {
    /// Starts `stonework serve` of a raw disk and waits until it listens.
    #[track_caller]
    pub fn serve(disk: &Path, socket: &Path, options: &[&str]) -> Self {
        Self::start_announced(serve(disk, socket, options))
    }

    /// Starts one `stonework daemon` with a writable export of two queues for each
    /// `(disk, socket)`, and waits until all sockets are there.
    #[track_caller]
    pub fn exports(exports: &[(&Path, &Path)]) -> Self {
        let mut command = stonework(["daemon"]);
        for (number, (disk, socket)) in exports.iter().enumerate() {
            command
                .arg("--blockdev")
                .arg(format!(
                    "driver=file,node-name=node{number},filename={},discard=unmap",
                    disk.display()
                ))
                .arg("--export")
                .arg(format!(
                    "type=vhost-user-blk,id=export{number},node-name=node{number},\
                     addr.type=unix,addr.path={},writable=on,num-queues=2",
                    socket.display()
                ));
        }
        let mut daemon = Self::spawn(command);
        eventually("the daemon makes its sockets", || {
            daemon.assert_running();
            exports.iter().all(|(_, socket)| socket.exists())
        });
        daemon
    }

    /// Starts a command and waits until it has printed a line, which says that it is ready.
    #[track_caller]
    pub fn start_announced(command: Command) -> Self {
        let mut daemon = Self::spawn(command);
        let end = Instant::now() + LIMIT;
        while !daemon.output.has_line(Duration::from_millis(20)) {
            daemon.assert_running();
            assert!(
                Instant::now() < end,
                "the daemon does not say that it is ready; it said on stderr: {}",
                daemon.errors()
            );
        }
        daemon
    }

    /// Starts a command and does not wait.
    #[track_caller]
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let output = Output::of(child.stdout.take().expect("stdout is a pipe"));
        let errors = Output::of(child.stderr.take().expect("stderr is a pipe"));
        Self {
            child,
            output,
            errors,
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it printed on stdout.
    pub fn output(&self) -> String {
        self.output.text()
    }

    /// All that it printed on stderr.
    pub fn errors(&self) -> String {
        self.errors.text()
    }

    /// How it ended, if it did.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child
            .try_wait()
            .expect("a child can be asked for its status")
    }

    /// # Panics
    ///
    /// If it has ended.
    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.exit_status() {
            panic!("the daemon ended with {status}; stderr: {}", self.errors());
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the daemon can be signalled");
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.exit_status() {
                return status;
            }
            assert!(
                Instant::now() < end,
                "the daemon does not end; stderr: {}",
                self.errors()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to end, which it must do in order.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(
            status.success(),
            "the daemon ended with {status}; stderr: {}",
            self.errors()
        );
    }

    /// Ends it without warning.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    /// How many threads it has, without those by which the kernel serves its io_uring and which
    /// come and go as the kernel likes.
    pub fn threads(&self) -> usize {
        fs::read_dir(self.proc("task"))
            .expect("the daemon is running")
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| !name.starts_with("iou-"))
            .count()
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(self.proc("fd"))
            .expect("the daemon is running")
            .count()
    }

    /// How many guest memory regions made by this harness it has mapped.
    pub fn mapped_regions(&self) -> usize {
        self.proc_file("maps")
            .lines()
            .filter(|line| line.contains(MEMORY_NAME))
            .count()
    }

    /// How much memory is resident.
    pub fn resident_bytes(&self) -> u64 {
        let status = self.proc_file("status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("a running process has a resident size");
        let kib: u64 = line
            .trim()
            .trim_end_matches("kB")
            .trim()
            .parse()
            .expect("a number of kB");
        kib << 10
    }

    /// How much processor time all its threads have used.
    pub fn cpu_time(&self) -> Duration {
        let tasks = fs::read_dir(self.proc("task")).expect("a running process has tasks");
        let nanos: u64 = tasks
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
            .filter_map(|line| line.split(' ').next()?.parse::<u64>().ok())
            .sum();
        Duration::from_nanos(nanos)
    }

    #[track_caller]
    fn proc_file(&self, name: &str) -> String {
        fs::read_to_string(self.proc(name)).expect("the daemon is running")
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.pid()).into()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the daemon's stderr ---\n{}---", self.errors());
        }
    }
}

/// How a command that must not go on ended.
#[derive(Debug)]
pub struct Refusal {
    /// Its exit status; none if a signal ended it.
    pub code: Option<i32>,
    /// What it printed on stdout.
    pub output: String,
    /// What it printed on stderr.
    pub errors: String,
}

/// Runs a command that ends by itself.
///
/// # Panics
///
/// If it does not end within [`LIMIT`].
#[track_caller]
pub fn run(command: Command) -> Refusal {
    let mut daemon = Daemon::spawn(command);
    let end = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = daemon.exit_status() {
            break status;
        }
        assert!(
            Instant::now() < end,
            "it goes on, and should have refused; stdout: {} stderr: {}",
            daemon.output(),
            daemon.errors()
        );
        std::thread::sleep(Duration::from_millis(5));
    };
    Refusal {
        code: status.code(),
        output: daemon.output.all(),
        errors: daemon.errors.all(),
    }
}

/// What a process prints, collected as it comes.
#[derive(Clone, Debug)]
struct Output(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Output {
    fn of(pipe: impl Read + Send + 'static) -> Self {
        let this = Self(Arc::default());
        let shared = this.clone();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(pipe);
            loop {
                let mut line = Vec::new();
                let read = lines.read_until(b'\n', &mut line).unwrap_or(0);
                let (collected, changed) = &*shared.0;
                let mut collected = collected.lock().unwrap();
                collected.bytes.extend(line);
                collected.ended = read == 0;
                changed.notify_all();
                if read == 0 {
                    return;
                }
            }
        });
        this
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap().bytes).into_owned()
    }

    /// All of it, after the process has ended. A descendant that holds the pipe open must not
    /// hold up a test, so there is a limit.
    fn all(&self) -> String {
        let (collected, changed) = &*self.0;
        let guard = collected.lock().unwrap();
        let _ended = changed
            .wait_timeout_while(guard, LIMIT, |collected| !collected.ended)
            .unwrap();
        drop(_ended);
        self.text()
    }

    fn has_line(&self, limit: Duration) -> bool {
        let (collected, changed) = &*self.0;
        let guard = collected.lock().unwrap();
        let (guard, _) = changed
            .wait_timeout_while(guard, limit, |collected| !collected.bytes.contains(&b'\n'))
            .unwrap();
        guard.bytes.contains(&b'\n')
    }
}

/// A directory of a test's own, with short names for what it needs. Removed when dropped.
#[derive(Debug)]
pub struct Place(tempfile::TempDir);

impl Place {
    /// A new, empty one.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("stonework-")
            .tempdir()
            .expect("cannot make a temporary directory");
        Self(dir)
    }

    /// A new, empty one in a directory that is there.
    ///
    /// # Errors
    ///
    /// Why it cannot be made there.
    pub fn within(directory: &Path) -> std::io::Result<Self> {
        tempfile::Builder::new()
            .prefix("stonework-")
            .tempdir_in(directory)
            .map(Self)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A name in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, content).expect("cannot write a test file");
        path
    }

    /// Makes a sparse file of this length.
    pub fn sparse(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.join(name);
        fs::File::create(&path)
            .and_then(|file| file.set_len(bytes))
            .expect("cannot make a test file");
        path
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}
