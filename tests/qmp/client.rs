//! A daemon with a monitor, ours or QEMU's, and a client of it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use harness::daemon::{eventually, stonework_path};
use serde_json::{Value, json};

/// How long an answer may take on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Ours,
    Qemus,
}

impl Which {
    pub(crate) fn command(self) -> Command {
        match self {
            Self::Ours => {
                let mut command = Command::new(stonework_path());
                command.arg("daemon").env("STONEWORK_LOG", "warn");
                command
            }
            Self::Qemus => Command::new("qemu-storage-daemon"),
        }
    }
}

/// A daemon with one monitor on a socket; killed when dropped.
pub(crate) struct Served {
    child: Child,
    socket: PathBuf,
    _folder: tempfile::TempDir,
}

impl Served {
    /// Starts it with these arguments before those of its monitor.
    pub(crate) fn start(which: Which, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp.sock");
        let chardev = format!("socket,id=mon,path={},server=on,wait=off", socket.display());
        let mut command = which.command();
        command.args(arguments);
        command.args(["--chardev", &chardev, "--monitor", "mon"]);
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        eventually("the monitor's socket is there", || {
            let status = child.try_wait().unwrap();
            assert!(status.is_none(), "{which:?} ended: {status:?}");
            socket.exists()
        });
        Self {
            child,
            socket,
            _folder: folder,
        }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// A client that has said hello.
    pub(crate) fn client(&self) -> Client {
        let mut client = Client::connect(&self.socket);
        let hello =
            client.ask(&json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}));
        assert_eq!(hello, json!({"return": {}}));
        client
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> ExitStatus {
        let mut status = None;
        eventually("the daemon ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client's end of a conversation.
pub(crate) struct Client {
    stream: UnixStream,
    unread: Vec<u8>,
}

impl Client {
    /// Connects and takes the greeting.
    pub(crate) fn connect(socket: &Path) -> Self {
        // A socket is there a moment before somebody listens at it.
        let mut stream = None;
        eventually("somebody listens", || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let mut client = Self::of(stream.expect("just connected"));
        let greeting = client.next().expect("a greeting");
        assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
        assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 10);
        client
    }

    pub(crate) fn of(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let unread = Vec::new();
        Self { stream, unread }
    }

    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next message, as text without its line's end; `None` at the end.
    pub(crate) fn next_line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<_> = self.unread.drain(..end + 2).collect();
                return Some(String::from_utf8(line[..end].to_vec()).unwrap());
            }
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(count) => self.unread.extend(&chunk[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("nothing comes: {error}"),
            }
        }
    }

    /// The next message; `None` at the end.
    pub(crate) fn next(&mut self) -> Option<Value> {
        self.next_line()
            .map(|line| serde_json::from_str(&line).unwrap())
    }

    /// The reply to a command; events that come before are passed over.
    pub(crate) fn ask(&mut self, command: &Value) -> Value {
        self.send(command.to_string().as_bytes());
        loop {
            let message = self.next().expect("a reply");
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    /// As [`ask`](Self::ask), of a command by its name and arguments.
    pub(crate) fn call(&mut self, name: &str, arguments: Value) -> Value {
        self.ask(&json!({"execute": name, "arguments": arguments}))
    }
}
