//! [`Client`]: a connection to a daemon's QMP monitor.
//!
//! One command at a time; events that come between are kept until somebody asks for them.

use std::collections::VecDeque;
use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::de::{IoRead, StreamDeserializer};
use serde_json::{Value, json};

use super::Failure;

/// See the module's header.
pub(super) struct Client {
    stream: UnixStream,
    replies: StreamDeserializer<'static, IoRead<BufReader<UnixStream>>, Value>,
    events: VecDeque<Value>,
    verbose: bool,
    path: String,
}

impl Client {
    /// Connects to the monitor at `path`, and agrees on what is spoken there.
    pub(super) fn connect(path: &Path, limit: Duration, verbose: bool) -> Result<Self, Failure> {
        let shown = path.display().to_string();
        let failed = |error: io::Error| {
            let next = match error.kind() {
                io::ErrorKind::NotFound => {
                    "; is the daemon running, with '--control PATH' (serve) or '--chardev \
                     socket,id=c,path=PATH,server=on,wait=off --monitor c' (daemon)?"
                }
                io::ErrorKind::ConnectionRefused => "; nobody listens there any more",
                _ => "",
            };
            Failure::Connect(format!("cannot connect to '{shown}': {error}{next}"))
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(limit)).map_err(failed)?;
        stream.set_write_timeout(Some(limit)).map_err(failed)?;
        let reader = BufReader::new(stream.try_clone().map_err(failed)?);
        let replies = serde_json::Deserializer::from_reader(reader).into_iter();
        let mut client = Self {
            stream,
            replies,
            events: VecDeque::new(),
            verbose,
            path: shown,
        };
        let greeting = client.receive().map_err(|failure| match failure {
            Failure::Timeout(_) => Failure::Timeout(format!(
                "'{}' does not greet: somebody else may be connected to it, and one at a time is served",
                client.path
            )),
            other => other,
        })?;
        if greeting.get("QMP").is_none() {
            return Err(Failure::Connect(format!(
                "'{}' is not a daemon's control socket: it does not speak QMP",
                client.path
            )));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Does a command, and gives what it returns.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        self.send(&request(command, arguments))
    }

    /// Sends a message as it is, and gives what the answer returns.
    pub(super) fn send(&mut self, message: &Value) -> Result<Value, Failure> {
        let text = message.to_string();
        if self.verbose {
            super::note(&format!("-> {text}"));
        }
        let sent = self.stream.write_all(text.as_bytes());
        sent.map_err(|error| self.lost(&error))?;
        loop {
            let mut reply = self.receive()?;
            if reply.get("event").is_some() {
                self.events.push_back(reply);
                continue;
            }
            if let Some(error) = reply.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                return Err(Failure::Refused {
                    class: text("class"),
                    text: text("desc"),
                });
            }
            return Ok(reply["return"].take());
        }
    }

    /// The next event, for which it waits without limit.
    pub(super) fn event(&mut self) -> Result<Value, Failure> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        let unlimited = self.stream.set_read_timeout(None);
        unlimited.map_err(|error| self.lost(&error))?;
        self.receive()
    }

    fn receive(&mut self) -> Result<Value, Failure> {
        let message = match self.replies.next() {
            None => Err(Failure::Connect(format!(
                "'{}': the daemon has ended the connection",
                self.path
            ))),
            Some(Ok(message)) => Ok(message),
            Some(Err(error)) => match error.io_error_kind() {
                Some(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    Err(Failure::Timeout(format!(
                        "'{}': no answer in time (--timeout); what was asked for may still be done",
                        self.path
                    )))
                }
                _ => Err(Failure::Connect(format!(
                    "'{}': its answer cannot be read: {error}",
                    self.path
                ))),
            },
        }?;
        if self.verbose {
            super::note(&format!("<- {message}"));
        }
        Ok(message)
    }

    fn lost(&self, error: &io::Error) -> Failure {
        Failure::Connect(format!("'{}': the connection is lost: {error}", self.path))
    }
}

/// A command as a message.
pub(super) fn request(command: &str, arguments: Value) -> Value {
    let is_empty = arguments.as_object().is_none_or(serde_json::Map::is_empty);
    match is_empty {
        true => json!({"execute": command}),
        false => json!({"execute": command, "arguments": arguments}),
    }
}
