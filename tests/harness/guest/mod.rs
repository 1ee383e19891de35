//! A real guest: Linux in QEMU, obeying a test verb by verb.
//!
//! The guest's user space is one program of ours (`tests/guest`), so that a test says what happens
//! inside (`guest.run("fill /mnt/data 1000000 7")`), looks at the host side while the guest waits,
//! and goes on. The kernel's console is kept apart and shown when something fails.
//!
//! What QEMU and its guest need is found by [`Tools::find`]; a test without it does not run.
//!
//! Every wait ends at the guest's time limit, with a panic that says what was waited for.

mod child;
mod initramfs;
mod served;
mod tools;
mod trace;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io::{BufRead, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

pub use served::{Serve, Served, stonework, strace_is_there};
pub use tools::{Accelerator, Tools};
pub use trace::{Call, Trace};

/// How long a guest may run: many times what the slowest test takes under emulation.
const TIME_LIMIT: Duration = Duration::from_secs(180);

/// A machine that is not running yet.
pub struct Machine<'a> {
    tools: &'a Tools,
    accelerator: Option<Accelerator>,
    disks: Vec<Disk>,
    cpus: u32,
    memory_mib: u32,
    time_limit: Duration,
}

struct Disk {
    socket: PathBuf,
    queues: u16,
    reconnect: bool,
}

impl<'a> Machine<'a> {
    /// Two processors and 256 MiB, without a disk.
    pub fn new(tools: &'a Tools) -> Self {
        Self {
            tools,
            accelerator: None,
            disks: Vec::new(),
            cpus: 2,
            memory_mib: 256,
            time_limit: TIME_LIMIT,
        }
    }

    /// Attaches the disk that is served at `socket`. The first is the guest's `/dev/vda`.
    #[must_use]
    pub fn disk(self, socket: &Path) -> Self {
        let queues = self.cpus as u16;
        self.disk_with(socket, queues, false)
    }

    /// [`disk`](Self::disk) with so many queues; with `reconnect` QEMU waits for a back-end that went
    /// away and goes on with the next one.
    #[must_use]
    pub fn disk_with(mut self, socket: &Path, queues: u16, reconnect: bool) -> Self {
        self.disks.push(Disk {
            socket: socket.to_owned(),
            queues,
            reconnect,
        });
        self
    }

    /// Gives the guest until then, from its start.
    #[must_use]
    pub fn time_limit(mut self, time_limit: Duration) -> Self {
        self.time_limit = time_limit;
        self
    }

    /// Runs on `accelerator`, working or not.
    fn accelerated_by(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = Some(accelerator);
        self
    }

    /// Starts the guest and waits until it takes commands.
    ///
    /// # Panics
    ///
    /// With the guest's console, if it does not get there.
    pub fn boot(self) -> Guest {
        match self.try_boot() {
            Ok(guest) => guest,
            Err(story) => panic!("{story}"),
        }
    }

    fn try_boot(self) -> Result<Guest, String> {
        let dir = tempfile::tempdir().expect("a temporary folder for the guest");
        let initramfs = dir.path().join("initramfs");
        fs::write(&initramfs, self.tools.initramfs()).expect("the initramfs is written");
        let console = dir.path().join("console");
        let stderr = dir.path().join("stderr");

        let mut command = self.command(&initramfs, &console);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr).expect("a file for QEMU's stderr"));
        let mut child = child::spawn(&mut command);
        let stdin = child.stdin.take().expect("stdin is a pipe");
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let (sender, answers) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut guest = Guest {
            child,
            stdin,
            answers,
            transcript: String::new(),
            started: Instant::now(),
            time_limit: self.time_limit,
            console,
            stderr,
            ready: Answer::default(),
            _dir: dir,
        };
        guest.ready = guest.answer("the guest is up")?;
        Ok(guest)
    }

    fn command(&self, initramfs: &Path, console: &Path) -> Command {
        let mut command = Command::new(&self.tools.qemu);
        let memory = self.memory_mib;
        let accelerator = self.accelerator.unwrap_or_else(|| self.tools.accelerator());
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args(["-machine", "pc,memory-backend=memory"])
            .args(accelerator.arguments())
            // Shared, since the back-end maps the guest's memory.
            .arg("-object")
            .arg(format!(
                "memory-backend-memfd,id=memory,size={memory}M,share=on"
            ))
            .args(["-m", &format!("{memory}M"), "-smp", &self.cpus.to_string()])
            .arg("-kernel")
            .arg(&self.tools.kernel)
            .arg("-initrd")
            .arg(initramfs)
            // A kernel that panics restarts, and -no-reboot makes that QEMU's end.
            .args(["-append", "console=ttyS0 quiet loglevel=4 panic=-1"])
            .arg("-chardev")
            .arg(format!("file,id=console,path={}", console.display()))
            .args(["-serial", "chardev:console"])
            .args([
                "-chardev",
                "stdio,id=host,signal=off",
                "-serial",
                "chardev:host",
            ]);
        for (index, disk) in self.disks.iter().enumerate() {
            let reconnect = if disk.reconnect {
                self.tools.reconnect_option()
            } else {
                ""
            };
            command
                .arg("-chardev")
                .arg(format!(
                    "socket,id=disk{index},path={}{reconnect}",
                    disk.socket.display()
                ))
                .arg("-device")
                .arg(format!(
                    "vhost-user-blk-pci,chardev=disk{index},num-queues={}",
                    disk.queues
                ));
        }
        command
    }
}

/// A running guest. Dropping it pulls the plug.
pub struct Guest {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
    /// What was said so far, for a failure's message.
    transcript: String,
    started: Instant,
    time_limit: Duration,
    console: PathBuf,
    stderr: PathBuf,
    ready: Answer,
    _dir: tempfile::TempDir,
}

impl Guest {
    /// Has the guest do a verb, and waits for it.
    ///
    /// # Panics
    ///
    /// With the guest's console and all that was said before, if the verb fails, the guest dies or
    /// its time is over.
    pub fn run(&mut self, verb: &str) -> Answer {
        match self.try_run(verb) {
            Ok(answer) => answer,
            Err(error) => panic!("{}", self.story(&format!("guest: '{verb}': {error}"))),
        }
    }

    /// [`run`](Self::run) for a verb that may fail, with the guest's sentence.
    ///
    /// # Panics
    ///
    /// If the guest dies or its time is over.
    pub fn try_run(&mut self, verb: &str) -> Result<Answer, String> {
        let _ = writeln!(self.transcript, "> {verb}");
        // A guest that died is noticed by its answer missing.
        let _ = self.stdin.write_all(format!("{verb}\n").as_bytes());
        let answer = match self.answer(&format!("the answer to '{verb}'")) {
            Ok(answer) => answer,
            Err(story) => panic!("{story}"),
        };
        answer.outcome.clone().map_or(Ok(answer), Err)
    }

    /// Has the guest begin a verb of which nobody waits for the end: the guest is going to be killed.
    pub fn begin(&mut self, verb: &str) {
        let _ = writeln!(self.transcript, "> {verb}");
        let _ = self.stdin.write_all(format!("{verb}\n").as_bytes());
    }

    /// Shuts the guest down in good order.
    ///
    /// # Panics
    ///
    /// If QEMU does not end well in time.
    pub fn power_off(mut self) {
        let _ = writeln!(self.transcript, "> poweroff");
        let _ = self.stdin.write_all(b"poweroff\n");
        loop {
            if let Some(status) = self.child.try_wait().expect("QEMU can be waited for") {
                assert!(
                    status.success(),
                    "{}",
                    self.story(&format!("QEMU ended with {status}"))
                );
                return;
            }
            assert!(
                self.started.elapsed() < self.time_limit,
                "{}",
                self.story("the guest did not power off in time"),
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Pulls the plug: QEMU is killed.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The version of the guest's kernel.
    pub fn kernel(&self) -> &str {
        self.ready.get("kernel")
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How long ago it was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    fn answer(&mut self, awaited: &str) -> Result<Answer, String> {
        let left = self.time_limit.saturating_sub(self.started.elapsed());
        let line = match self.answers.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                let limit = self.time_limit.as_secs();
                return Err(self.story(&format!("after {limit} s still waiting until {awaited}")));
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait();
                return Err(self.story(&format!("QEMU ended ({status:?}) before {awaited}")));
            }
        };
        let _ = writeln!(self.transcript, "< {line}");
        Ok(Answer::parse(&line))
    }

    /// `sentence`, and all there is to read about this guest.
    fn story(&self, sentence: &str) -> String {
        let read =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        format!(
            "{sentence}\n--- said\n{}--- console\n{}\n--- QEMU\n{}---",
            self.transcript,
            read(&self.console),
            read(&self.stderr),
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the guest found out.
#[derive(Debug, Default)]
pub struct Answer {
    values: BTreeMap<String, String>,
    outcome: Option<String>,
}

impl Answer {
    fn parse(line: &str) -> Self {
        if let Some(error) = line.strip_prefix("error ") {
            return Self {
                outcome: Some(error.to_owned()),
                ..Self::default()
            };
        }
        let pairs = line
            .split_whitespace()
            .filter_map(|word| word.split_once('='));
        Self {
            values: pairs
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
            outcome: None,
        }
    }

    /// The value of `key`.
    ///
    /// # Panics
    ///
    /// If the guest did not say.
    pub fn get(&self, key: &str) -> &str {
        match self.values.get(key) {
            Some(value) => value,
            None => panic!("the guest said nothing of '{key}', but {:?}", self.values),
        }
    }

    /// The value of `key`, which is a number.
    ///
    /// # Panics
    ///
    /// If the guest did not say, or it is none.
    pub fn number(&self, key: &str) -> u64 {
        let value = self.get(key);
        match value.parse() {
            Ok(number) => number,
            Err(error) => panic!("'{key}' is '{value}', no number: {error}"),
        }
    }
}
