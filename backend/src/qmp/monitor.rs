//! Monitors: a thread each, between a character device and the control thread.
//!
//! The thread reads, understands and answers; what a command asks for is posted to the control thread, and
//! what it came to is posted back. So the control thread never waits for a monitor, and a monitor that
//! stops reading holds up nobody but itself. What is kept for one is bounded:
//!
//! * commands: one runs, `session::MAX_QUEUED` wait, then nothing more is read;
//! * replies: with [`MAX_UNSENT_BYTES`] unsent no further command begins, so there is one reply more at most;
//! * events: a client that leaves [`MAX_EVENTS`] of them unread is disconnected. Were some left out
//!   instead, it would believe to have been told of everything.
//!
//! A command runs to its end, whether or not its client is still there. A client that has said all it wants
//! to (an end of file) gets the replies that are due, then the conversation ends.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use blockcore::Error;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use serde_json::Value;

use super::command::{Commands, Outcome, Work};
use super::json::Reader;
use super::session::{Next, Session};
use super::writer;
use crate::chardev::{Connection, Listener, Source};
use crate::daemon::ControlHandle;
use crate::qapi::QmpError;

/// With so much unsent no further command begins.
pub const MAX_UNSENT_BYTES: usize = 1 << 20;
/// A client that leaves more events unread is disconnected.
pub const MAX_EVENTS: usize = 8192;
/// Read and written at once; as much as a pipe takes without waiting.
const CHUNK_BYTES: usize = 4096;
/// How long a monitor that is stopped tries to get rid of what it has to say.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a thread waits before it accepts again after the host refused.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What the control thread puts down for a monitor, without waiting.
pub struct Inbox {
    posts: Mutex<Posts>,
    wake: OwnedFd,
    stop: AtomicBool,
}

#[derive(Default)]
struct Posts {
    /// The conversation that is told of events; `None` before it has asked for them.
    session: Option<u64>,
    events: VecDeque<Arc<Value>>,
    overflow: bool,
    /// Of which conversation's command.
    outcomes: Vec<(u64, Outcome)>,
}

impl Inbox {
    fn new() -> Result<Self, Error> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::host("cannot make an eventfd", errno))?;
        Ok(Self {
            posts: Mutex::default(),
            wake,
            stop: AtomicBool::new(false),
        })
    }

    /// Tells the client of something, if it wants to know.
    pub fn tell(&self, event: &Arc<Value>) {
        let mut posts = self.posts();
        if posts.session.is_none() {
            return;
        }
        if posts.events.len() >= MAX_EVENTS {
            posts.overflow = true;
        } else {
            posts.events.push_back(Arc::clone(event));
        }
        drop(posts);
        self.wake();
    }

    fn answer(&self, session: u64, outcome: Outcome) {
        self.posts().outcomes.push((session, outcome));
        self.wake();
    }

    /// Ends the monitor, once it has sent what it has to or a second has gone by.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn posts(&self) -> MutexGuard<'_, Posts> {
        self.posts.lock().expect("no panic while posting")
    }
}

/// Answers a command exactly once: dropped without an answer, it says that the daemon is going.
struct Answer {
    inbox: Arc<Inbox>,
    session: u64,
    given: bool,
}

impl Answer {
    fn give(mut self, outcome: Outcome) {
        self.given = true;
        self.inbox.answer(self.session, outcome);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.given {
            let gone = QmpError::generic("the daemon is stopping");
            self.inbox.answer(self.session, Err(gone));
        }
    }
}

/// A monitor as the control thread has it.
pub struct Monitor {
    inbox: Arc<Inbox>,
    thread: JoinHandle<()>,
}

impl Monitor {
    /// Starts a monitor on what a character device has; `connected` is told whether somebody is there.
    ///
    /// # Errors
    ///
    /// The host's refusal of a thread or a descriptor.
    #[expect(
        clippy::disallowed_methods,
        reason = "a monitor waits for its client only"
    )]
    pub fn start(
        source: Source,
        connected: Arc<AtomicBool>,
        pretty: bool,
        commands: Arc<Commands>,
        control: ControlHandle,
    ) -> Result<Self, Error> {
        let inbox = Arc::new(Inbox::new()?);
        let thread = Thread {
            inbox: Arc::clone(&inbox),
            connected,
            pretty,
            commands,
            control,
            session: 0,
        };
        let thread = std::thread::Builder::new()
            .name("monitor".into())
            .spawn(move || thread.run(source))
            .map_err(|error| {
                let message = format!("cannot start a monitor's thread: {error}");
                Error::new(blockcore::ErrorKind::Io, message)
            })?;
        Ok(Self { inbox, thread })
    }

    /// Where to put down what it is to say.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Waits for its end; [`Inbox::stop`] comes first.
    pub fn join(self) {
        let _ = self.thread.join();
    }
}

struct Thread {
    inbox: Arc<Inbox>,
    connected: Arc<AtomicBool>,
    pretty: bool,
    commands: Arc<Commands>,
    control: ControlHandle,
    /// The number of the conversation.
    session: u64,
}

impl Thread {
    fn run(mut self, source: Source) {
        match source {
            Source::Once(connection) => self.converse(&connection),
            Source::Listener(listener) => {
                while let Some(connection) = self.accept(&listener) {
                    self.converse(&connection);
                }
            }
        }
        // What is still posted must not be kept for ever.
        self.inbox.posts().session = None;
    }

    /// Waits for a client; `None` when the monitor is to end.
    fn accept(&self, listener: &Listener) -> Option<Connection> {
        loop {
            if self.inbox.is_stopping() {
                return None;
            }
            match listener.accept() {
                Ok(Some(connection)) => return Some(connection),
                Ok(None) => {}
                Err(error) => {
                    // Out of descriptors, as a rule: others may give some back.
                    tracing::warn!(%error, "cannot accept a monitor's client");
                    std::thread::sleep(ACCEPT_AGAIN);
                }
            }
            let mut fds = [
                PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.inbox.wake.as_fd(), PollFlags::IN),
            ];
            let _ = poll(&mut fds, None);
            self.inbox.clear_wake();
            // Outcomes of those who have gone.
            self.inbox.posts().outcomes.clear();
        }
    }

    fn converse(&mut self, connection: &Connection) {
        self.session += 1;
        self.connected.store(true, Ordering::Relaxed);
        let mut conversation = Conversation::new(connection);
        conversation.say(&Session::greeting(), self.pretty);
        while self.turn(&mut conversation) {}
        self.connected.store(false, Ordering::Relaxed);
        let mut posts = self.inbox.posts();
        posts.session = None;
        posts.events = VecDeque::new();
        posts.overflow = false;
        drop(posts);
        if connection.is_socket
            && let Some(socket) = &connection.output
        {
            // Also where others hold the socket, too.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }

    /// One round of reading, doing and writing; returns whether there is another.
    fn turn(&mut self, talk: &mut Conversation<'_>) -> bool {
        self.collect(talk);
        self.work(talk);
        if talk.is_broken {
            return false;
        }
        let stopping = self.inbox.is_stopping();
        let is_done = talk.unsent.is_empty() && talk.session.is_idle();
        if is_done && (stopping || (talk.is_ended && talk.connection.is_socket)) {
            return false;
        }
        let patience = stopping.then_some(FAREWELL);
        if !talk.wait(&self.inbox, patience) && stopping {
            return false;
        }
        talk.read();
        talk.write();
        true
    }

    /// Takes what the control thread has put down.
    fn collect(&mut self, talk: &mut Conversation<'_>) {
        let mut posts = self.inbox.posts();
        if posts.overflow {
            tracing::warn!("a monitor's client does not read, and is disconnected");
            talk.is_broken = true;
        }
        let outcomes = std::mem::take(&mut posts.outcomes);
        let mut events = Vec::new();
        let mut room = MAX_UNSENT_BYTES.saturating_sub(talk.unsent.len()) / CHUNK_BYTES;
        while room > 0
            && let Some(event) = posts.events.pop_front()
        {
            events.push(event);
            room -= 1;
        }
        drop(posts);
        // Events that came before the reply are sent before it.
        for event in events {
            talk.say(&event, self.pretty);
        }
        for (session, outcome) in outcomes {
            if session == self.session
                && let Some(reply) = talk.session.done(outcome)
            {
                talk.say(&reply, self.pretty);
            }
        }
    }

    /// Understands what was read, and begins what is next.
    fn work(&mut self, talk: &mut Conversation<'_>) {
        loop {
            let stopping = self.inbox.is_stopping();
            while talk.session.has_room() && !stopping {
                let mut rest = &talk.unread[talk.understood..];
                let read = talk.reader.next(&mut rest);
                talk.understood = talk.unread.len() - rest.len();
                let Some(read) = read else {
                    talk.unread.clear();
                    talk.understood = 0;
                    break;
                };
                if let Some(reply) = talk.session.accept(read, &self.commands) {
                    talk.say(&reply, self.pretty);
                }
            }
            if talk.unsent.len() >= MAX_UNSENT_BYTES || stopping {
                return;
            }
            match talk.session.next(&self.commands) {
                Some(Next::Reply(reply)) => {
                    talk.say(&reply, self.pretty);
                    if talk.session.is_negotiated() {
                        self.inbox.posts().session = Some(self.session);
                    }
                }
                Some(Next::Run(work)) => self.run_work(work),
                None => return,
            }
        }
    }

    fn run_work(&self, work: Work) {
        let answer = Answer {
            inbox: Arc::clone(&self.inbox),
            session: self.session,
            given: false,
        };
        self.control.post(Box::new(move |daemon| {
            if daemon.is_quitting() {
                return;
            }
            let service = std::rc::Rc::clone(daemon.service());
            let context = std::rc::Rc::clone(daemon.control().context());
            context.spawn(async move { answer.give(work(service).await) });
        }));
    }
}

/// A conversation's ends and what is under way.
struct Conversation<'a> {
    connection: &'a Connection,
    session: Session,
    reader: Reader,
    unread: Vec<u8>,
    /// So much of it has been understood.
    understood: usize,
    unsent: VecDeque<u8>,
    is_ended: bool,
    is_broken: bool,
    /// What [`wait`](Self::wait) found.
    can_read: bool,
    can_write: bool,
}

impl<'a> Conversation<'a> {
    fn new(connection: &'a Connection) -> Self {
        Self {
            connection,
            session: Session::default(),
            reader: Reader::default(),
            unread: Vec::new(),
            understood: 0,
            unsent: VecDeque::new(),
            is_ended: connection.input.is_none(),
            is_broken: false,
            can_read: false,
            can_write: false,
        }
    }

    fn say(&mut self, value: &Value, pretty: bool) {
        if self.connection.output.is_none() {
            return;
        }
        let mut text = Vec::new();
        writer::write(value, pretty, &mut text);
        self.unsent.extend(text);
    }

    /// Waits until something can be read or written, or was put down; returns whether something was.
    fn wait(&mut self, inbox: &Inbox, patience: Option<Duration>) -> bool {
        let reads = !self.is_ended && self.unread.is_empty() && self.session.has_room();
        let writes = !self.unsent.is_empty();
        let mut fds = vec![PollFd::from_borrowed_fd(inbox.wake.as_fd(), PollFlags::IN)];
        let input = self.connection.input.as_ref().filter(|_| reads);
        let output = self.connection.output.as_ref().filter(|_| writes);
        if let Some(input) = input {
            fds.push(PollFd::from_borrowed_fd(input.as_fd(), PollFlags::IN));
        }
        if let Some(output) = output {
            fds.push(PollFd::from_borrowed_fd(output.as_fd(), PollFlags::OUT));
        }
        let timeout = patience.map(|time| Timespec {
            tv_sec: time.as_secs() as i64,
            tv_nsec: time.subsec_nanos().into(),
        });
        let ready = poll(&mut fds, timeout.as_ref());
        let mut states = fds.iter().skip(1).map(|fd| !fd.revents().is_empty());
        self.can_read = input.is_some() && states.next().unwrap_or(false);
        self.can_write = output.is_some() && states.next().unwrap_or(false);
        drop(fds);
        inbox.clear_wake();
        match ready {
            Ok(count) => count > 0,
            Err(Errno::INTR) => true,
            Err(error) => {
                tracing::error!(%error, "a monitor cannot wait for its client");
                self.is_broken = true;
                false
            }
        }
    }

    fn read(&mut self) {
        let Some(input) = self.connection.input.as_ref().filter(|_| self.can_read) else {
            return;
        };
        let mut chunk = [0; CHUNK_BYTES];
        match rustix::io::read(input, &mut chunk) {
            Ok(0) => self.is_ended = true,
            Ok(count) => self.unread.extend(&chunk[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.is_broken = true,
        }
    }

    fn write(&mut self) {
        let Some(output) = self.connection.output.as_ref().filter(|_| self.can_write) else {
            return;
        };
        let (front, _) = self.unsent.as_slices();
        let chunk = &front[..front.len().min(CHUNK_BYTES)];
        let written = match self.connection.is_socket {
            true => rustix::net::send(
                output,
                chunk,
                rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL,
            ),
            false => rustix::io::write(output, chunk),
        };
        match written {
            Ok(count) => drop(self.unsent.drain(..count)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.is_broken = true,
        }
    }
}
