//! A daemon, ours or QEMU's, that offers nodes over NBD, and the tools that talk to it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use harness::daemon::{eventually, stonework_path};
use serde_json::{Value, json};

/// Longest that a tool may take on a busy machine, in seconds.
const LIMIT: &str = "120";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Ours,
    Qemus,
}

/// A daemon with an NBD server and a monitor in a folder that it shares with others; killed when dropped.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
    monitor: BufReader<UnixStream>,
    /// What happened while nobody asked.
    pub(crate) events: Vec<Value>,
}

impl Server {
    /// Starts it; `FOLDER` in the arguments is the folder.
    pub(crate) fn start(which: Which, folder: &Path, arguments: &[&str]) -> Self {
        Self::with(which, folder, "", arguments)
    }

    /// As [`start`](Self::start), with more options of the server.
    pub(crate) fn with(which: Which, folder: &Path, more: &str, arguments: &[&str]) -> Self {
        let name = format!("{which:?}").to_lowercase();
        let socket = folder.join(format!("{name}.nbd"));
        let qmp = folder.join(format!("{name}.qmp"));
        let mut command = match which {
            Which::Ours => {
                let mut command = Command::new(stonework_path());
                command.arg("daemon").env("STONEWORK_LOG", "warn");
                command
            }
            Which::Qemus => Command::new("qemu-storage-daemon"),
        };
        let server = format!("addr.type=unix,addr.path={}{more}", socket.display());
        command.args(["--nbd-server", &server]);
        let place = folder.to_str().unwrap();
        command.args(arguments.iter().map(|text| text.replace("FOLDER", place)));
        let chardev = format!("socket,id=mon,path={},server=on,wait=off", qmp.display());
        command.args(["--chardev", &chardev, "--monitor", "mon"]);
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut monitor = None;
        eventually("the monitor answers", || {
            let status = child.try_wait().unwrap();
            assert!(status.is_none(), "{which:?} ended: {status:?}");
            monitor = UnixStream::connect(&qmp).ok();
            monitor.is_some()
        });
        let mut server = Self {
            child,
            socket,
            monitor: BufReader::new(monitor.unwrap()),
            events: Vec::new(),
        };
        assert!(server.message()["QMP"].is_object());
        server.ask("qmp_capabilities", json!({}));
        server
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// How clients find an export.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    fn message(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Does a command; its reply or error.
    pub(crate) fn call(&mut self, command: &str, arguments: Value) -> Value {
        let message = json!({"execute": command, "arguments": arguments});
        // In one piece: a daemon that quits does not wait for the end of a line.
        let line = format!("{message}\n");
        self.monitor.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let message = self.message();
            if message["event"].is_null() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// Does a command that succeeds.
    #[track_caller]
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let reply = self.call(command, arguments);
        assert!(reply["error"].is_null(), "{command}: {reply}");
        reply["return"].clone()
    }

    /// Waits for an event.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(place) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(place);
            }
            let message = self.message();
            self.events.push(message);
        }
    }

    /// Ends it in order.
    pub(crate) fn quit(mut self) {
        self.ask("quit", json!({}));
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A tool, with `FOLDER` in its arguments, that has not ended well by itself after a while is ended.
pub(crate) fn tool(words: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.arg(LIMIT).args(words).stdin(Stdio::null());
    command
}

/// Runs a tool that succeeds; what it prints.
#[track_caller]
pub(crate) fn run(words: &[&str]) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = tool(words).output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr),
    );
    assert!(status.success(), "{words:?}: {status}\n{stdout}{stderr}");
    stdout.into_owned()
}

/// Runs a program for libnbd's Python client, called `h` and connected to `uri`; what it prints.
#[track_caller]
pub(crate) fn python(uri: &str, program: &str) -> String {
    let text = format!(
        "import nbd, sys\n\
         def attempt(name, f):\n    try:\n        f(); print(name, 'done')\n    \
         except nbd.Error as e:\n        print(name, e.errno)\n\
         h = nbd.NBD()\nuri = sys.argv[1]\n{program}\n"
    );
    run(&["/usr/bin/python3", "-c", &text, uri])
}
