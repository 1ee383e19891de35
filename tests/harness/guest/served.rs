//! A daemon that serves one disk, as an operator starts it.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Trace, tools};

/// How long the daemon may take to start, to stop, or to tell its counters.
const PATIENCE: Duration = Duration::from_secs(30);

/// The daemon under test: `STONEWORK_BIN`, else what cargo has built beside this program.
///
/// # Panics
///
/// If there is none.
pub fn stonework() -> PathBuf {
    if let Some(path) = std::env::var_os("STONEWORK_BIN") {
        return path.into();
    }
    let own = std::env::current_exe().expect("a program knows its own path");
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("stonework"))
        .find(|program| program.is_file());
    match found {
        Some(program) => program,
        None => panic!(
            "no stonework beside {}: `cargo build` makes it",
            own.display()
        ),
    }
}

/// `stonework serve` that is not running yet.
pub struct Serve {
    disk: PathBuf,
    options: Vec<OsString>,
    socket: Option<PathBuf>,
    traced: bool,
}

impl Serve {
    /// Serves the image at `disk`.
    pub fn new(disk: &Path) -> Self {
        Self {
            disk: disk.to_owned(),
            options: Vec::new(),
            socket: None,
            traced: false,
        }
    }

    /// Adds options of `stonework serve`.
    #[must_use]
    pub fn options<T: AsRef<OsStr>>(mut self, options: impl IntoIterator<Item = T>) -> Self {
        self.options
            .extend(options.into_iter().map(|option| option.as_ref().to_owned()));
        self
    }

    /// Listens at `socket`, where a daemon before this one may have listened.
    #[must_use]
    pub fn at(mut self, socket: &Path) -> Self {
        self.socket = Some(socket.to_owned());
        self
    }

    /// Has strace write down each system call that writes or syncs.
    #[must_use]
    pub fn traced(mut self) -> Self {
        self.traced = true;
        self
    }

    /// Starts it and waits until its socket listens.
    ///
    /// # Panics
    ///
    /// With what it wrote to stderr, if it does not get there.
    pub fn start(self) -> Served {
        let dir = tempfile::tempdir().expect("a temporary folder for the socket");
        let socket = self.socket.unwrap_or_else(|| dir.path().join("socket"));
        let trace = dir.path().join("trace");
        let mut command = if self.traced {
            // -D: the daemon is our child, and strace its grandchild, so that signals and exit
            // status are the daemon's.
            let mut strace = Command::new("strace");
            strace
                .args([
                    "-D",
                    "-f",
                    "-y",
                    "-qq",
                    "-s",
                    "0",
                    "-e",
                    "signal=none",
                    "-e",
                ])
                .arg(format!("trace={}", Trace::CALLS))
                .arg("-o")
                .arg(&trace)
                .arg(stonework());
            strace
        } else {
            Command::new(stonework())
        };
        command
            .arg("serve")
            .arg(&self.disk)
            .arg("--socket")
            .arg(&socket)
            .args(&self.options);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = super::child::spawn(&mut command);
        let stdout = lines_of(child.stdout.take().expect("stdout is a pipe"));
        let stderr = lines_of(child.stderr.take().expect("stderr is a pipe"));
        let mut served = Served {
            child,
            said: Vec::new(),
            stdout,
            stderr,
            socket,
            disk: self.disk,
            trace: self.traced.then_some(trace),
            _dir: dir,
        };
        let Ok(line) = served.stdout.recv_timeout(PATIENCE) else {
            let said: Vec<String> = served.stderr.try_iter().collect();
            panic!("{command:?} did not say that it serves; stderr: {said:#?}");
        };
        served.said.push(line);
        served
    }
}

/// A daemon that serves one disk. Dropping it kills it.
pub struct Served {
    child: Child,
    said: Vec<String>,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    socket: PathBuf,
    disk: PathBuf,
    trace: Option<PathBuf>,
    _dir: tempfile::TempDir,
}

impl Served {
    /// Where a guest attaches.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn said(&mut self) -> &[String] {
        self.said.extend(self.stdout.try_iter());
        &self.said
    }

    /// The export's counters, which the daemon prints on SIGUSR1.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn stats(&self) -> BTreeMap<String, u64> {
        self.signal(Signal::USR1);
        let until = Instant::now() + PATIENCE;
        let mut said = Vec::new();
        while let Ok(line) = self
            .stderr
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            if let Some(counters) = line.strip_prefix("stats ") {
                return counters
                    .split_whitespace()
                    .filter_map(|word| word.split_once('='))
                    .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
                    .collect();
            }
            said.push(line);
        }
        panic!("no counters on SIGUSR1; stderr: {said:#?}")
    }

    /// One of the [`stats`](Self::stats).
    ///
    /// # Panics
    ///
    /// If there is no such counter.
    pub fn count(&self, counter: &str) -> u64 {
        let stats = self.stats();
        match stats.get(counter) {
            Some(count) => *count,
            None => panic!("no counter '{counter}' among {stats:?}"),
        }
    }

    /// What was traced so far.
    ///
    /// # Panics
    ///
    /// If it was not started [`traced`](Serve::traced).
    pub fn trace(&self) -> Trace {
        let path = self.trace.as_ref().expect("a daemon that is traced");
        let text = fs::read_to_string(path).unwrap_or_default();
        let disk = self.disk.canonicalize().expect("the disk has a path");
        Trace::parse(&text, &disk)
    }

    /// Stops it in good order.
    ///
    /// # Panics
    ///
    /// With what it wrote to stderr, if it does not end with status 0 in time.
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the daemon can be waited for") {
                let said: Vec<String> = self.stderr.try_iter().collect();
                assert!(
                    status.success(),
                    "the daemon ended with {status}; stderr: {said:#?}"
                );
                return;
            }
            assert!(Instant::now() < until, "the daemon did not end on SIGTERM");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the daemon is there to be signalled");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether strace is there; says so if not.
pub fn strace_is_there() -> bool {
    let there = tools::on_path("strace").is_some();
    if !there {
        tools::skip("there is no strace; `scripts/deps tools` installs it");
    }
    there
}

/// The lines of a pipe that is always read, so that its writer never waits.
fn lines_of(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            // Nobody listens any more, but the pipe must still be emptied.
            let _ = sender.send(line);
        }
    });
    lines
}
