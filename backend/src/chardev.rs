//! Character devices: where a monitor's bytes come from and go to, under QEMU's names.
//!
//! There are sockets (as server or client; by path, by address, or by a descriptor that was inherited),
//! standard input and output, files and nothing. A device belongs to one user at a time, which takes its
//! [`Source`] to a thread of its own; what the device is like can be asked at any time.
//!
//! Threads: [`Chardev`] is the control thread's, [`Source`] and [`Connection`] are the user's.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind as IoErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use blockcore::Error;
use blockcore::options::{Options, parse_bool};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::qapi::{Object, Qapi, QmpError};
use crate::{qapi_struct, qapi_union};

qapi_struct! {
    /// An address of the internet.
    pub struct InetAddress {
        /// Name or number of the host.
        host: String = "host",
        /// Number of the port; 0 for one that is free.
        port: String = "port",
    }
}

qapi_struct! {
    /// A path.
    pub struct UnixAddress {
        /// The path.
        path: String = "path",
    }
}

qapi_struct! {
    /// A descriptor that this process was started with.
    pub struct FdAddress {
        /// Its number.
        number: String = "str",
    }
}

/// What a union of QEMU's older kind has in its case: one member.
#[derive(Clone, Debug)]
pub struct Data<T>(pub T);

impl<T: Qapi> Qapi for Data<T> {
    fn parse(input: crate::qapi::Input<'_>) -> Result<Self, QmpError> {
        crate::qapi::parse_object(input)
    }

    fn emit(&self) -> Option<serde_json::Value> {
        Some(crate::qapi::emit_object(self))
    }

    fn describe(schema: &mut crate::qapi::Schema) -> String {
        schema.object::<Self>(std::any::type_name::<Self>())
    }
}

impl<T: Qapi> Object for Data<T> {
    fn take(members: &mut crate::qapi::Members<'_>) -> Result<Self, QmpError> {
        members.take("data").map(Self)
    }

    fn put(&self, map: &mut serde_json::Map<String, serde_json::Value>) {
        map.extend(self.0.emit().map(|value| ("data".to_owned(), value)));
    }

    fn list(schema: &mut crate::qapi::Schema) -> Vec<crate::qapi::Member> {
        vec![crate::qapi::Member {
            name: "data".into(),
            kind: T::describe(schema),
            optional: false,
        }]
    }
}

qapi_union! {
    /// Where a socket is.
    pub enum SocketAddress by "type" {
        /// On a network.
        Inet(Data<InetAddress>) = "inet",
        /// In the file system.
        Unix(Data<UnixAddress>) = "unix",
        /// Open already.
        Fd(Data<FdAddress>) = "fd",
    }
}

qapi_struct! {
    /// A socket.
    pub struct ChardevSocket {
        /// Where.
        addr: SocketAddress = "addr",
        /// Whether others connect to it (the default), instead of it to another.
        server: Option<bool> = "server",
        /// Whether starting waits until somebody has connected; not by default.
        wait: Option<bool> = "wait",
        /// Whether small messages are sent at once.
        nodelay: Option<bool> = "nodelay",
    }
}

qapi_struct! {
    /// Standard input and output.
    pub struct ChardevStdio {
        /// Whether the terminal's keys raise signals, which they always do.
        signal: Option<bool> = "signal",
    }
}

qapi_struct! {
    /// A file that is written to.
    pub struct ChardevFile {
        /// Another that is read; none by default.
        input: Option<String> = "in",
        /// The file.
        out: String = "out",
        /// Whether what it has is kept; not by default.
        append: Option<bool> = "append",
    }
}

qapi_union! {
    /// What a character device is made of.
    pub enum ChardevBackend by "type" {
        /// A file.
        File(Data<ChardevFile>) = "file",
        /// A socket.
        Socket(Data<ChardevSocket>) = "socket",
        /// Nothing.
        Null(Data<()>) = "null",
        /// Standard input and output.
        Stdio(Data<ChardevStdio>) = "stdio",
    }
}

/// The words for what there is.
pub const BACKENDS: [&str; 4] = ["file", "socket", "null", "stdio"];

/// Those that QEMU has and we do not, to be refused by name.
const ELSEWHERE: [&str; 9] = [
    "hub", "memory", "mux", "parallel", "pipe", "pty", "ringbuf", "serial", "udp",
];

/// Both ends of a conversation.
#[derive(Clone, Default)]
pub struct Connection {
    /// What is read; `None`: never anything.
    pub input: Option<Arc<OwnedFd>>,
    /// What is written to; `None`: what is written is gone.
    pub output: Option<Arc<OwnedFd>>,
    /// The end of what is read ends the conversation.
    pub is_socket: bool,
}

/// Where conversations come from.
pub enum Source {
    /// There is one, now.
    Once(Connection),
    /// One after the other connects.
    Listener(Listener),
}

/// A socket that others connect to.
pub enum Listener {
    /// In the file system; removed when dropped.
    Unix(UnixListener, Option<OwnPath>),
    /// On a network.
    Inet(TcpListener),
}

/// A path that goes with whoever made it.
pub struct OwnPath(PathBuf);

impl Drop for OwnPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Takes whoever has connected; `None` if nobody has.
    ///
    /// # Errors
    ///
    /// The host's refusal.
    pub fn accept(&self) -> std::io::Result<Option<Connection>> {
        let socket = self.accept_socket()?;
        Ok(socket.map(Connection::socket))
    }

    /// As [`accept`](Self::accept), the socket itself.
    ///
    /// # Errors
    ///
    /// The host's refusal.
    pub fn accept_socket(&self) -> std::io::Result<Option<OwnedFd>> {
        let accepted: std::io::Result<OwnedFd> = match self {
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| stream.into()),
            Self::Inet(listener) => listener.accept().map(|(stream, _)| stream.into()),
        };
        match accepted {
            Ok(socket) => Ok(Some(socket)),
            Err(error) if error.kind() == IoErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn set_nonblocking(&self) -> std::io::Result<()> {
        match self {
            Self::Unix(listener, _) => listener.set_nonblocking(true),
            Self::Inet(listener) => listener.set_nonblocking(true),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Inet(listener) => listener.as_fd(),
        }
    }
}

impl Connection {
    fn socket(socket: OwnedFd) -> Self {
        let socket = Arc::new(socket);
        Self {
            input: Some(Arc::clone(&socket)),
            output: Some(socket),
            is_socket: true,
        }
    }
}

/// See the module's header.
pub struct Chardev {
    id: String,
    /// What it is, for people: `unix:PATH,server=on`.
    about: String,
    listens: bool,
    /// Whether there is a conversation.
    connected: Arc<AtomicBool>,
    source: Mutex<Option<Source>>,
}

impl Chardev {
    /// Makes a device.
    ///
    /// # Errors
    ///
    /// What is wrong with its name or description, or the host refuses.
    pub fn new(id: &str, backend: &ChardevBackend) -> Result<Self, QmpError> {
        let failed = |why: String| QmpError::generic(why);
        let (about, source) = match backend {
            ChardevBackend::Null(_) => ("null".to_owned(), Source::Once(Connection::default())),
            ChardevBackend::Stdio(_) => {
                ("stdio".to_owned(), Source::Once(stdio().map_err(failed)?))
            }
            ChardevBackend::File(Data(file)) => (
                "file".to_owned(),
                Source::Once(open_file(file).map_err(failed)?),
            ),
            ChardevBackend::Socket(Data(socket)) => open_socket(socket).map_err(failed)?,
        };
        let listens = matches!(source, Source::Listener(_));
        Ok(Self {
            id: id.to_owned(),
            about,
            listens,
            connected: Arc::new(AtomicBool::new(false)),
            source: Mutex::new(Some(source)),
        })
    }

    /// Waits until somebody has connected, if `backend` says so. Only before anything is served: nothing
    /// else happens meanwhile.
    ///
    /// # Errors
    ///
    /// The host's refusal.
    pub fn wait(&self, backend: &ChardevBackend) -> Result<(), Error> {
        let source = self.source.lock().expect("no panic while taking");
        let Some(Source::Listener(listener)) = source.as_ref().filter(|_| backend.waits()) else {
            return Ok(());
        };
        tracing::info!(socket = self.describe(), "waiting for a connection");
        let mut fds = [rustix::event::PollFd::new(
            listener,
            rustix::event::PollFlags::IN,
        )];
        rustix::event::poll(&mut fds, None)
            .map(drop)
            .map_err(|errno| Error::host("cannot wait for a connection", errno))
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it is and whether somebody is there, as QEMU says it.
    pub fn describe(&self) -> String {
        match self.listens && !self.is_connected() {
            true => format!("disconnected:{}", self.about),
            false => self.about.clone(),
        }
    }

    /// Whether there is a conversation.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Whether somebody uses it.
    pub fn is_used(&self) -> bool {
        self.source.lock().expect("no panic while taking").is_none()
    }

    /// Takes what conversations come from, and where to say whether there is one; `None` if somebody has.
    pub fn take(&self) -> Option<(Source, Arc<AtomicBool>)> {
        let source = self.source.lock().expect("no panic while taking").take()?;
        Some((source, Arc::clone(&self.connected)))
    }
}

fn stdio() -> Result<Connection, String> {
    let own = |fd: BorrowedFd<'_>| {
        let fd = fd.try_clone_to_owned();
        fd.map(|fd| Some(Arc::new(fd)))
            .map_err(|error| format!("cannot use standard input and output: {error}"))
    };
    Ok(Connection {
        input: own(std::io::stdin().as_fd())?,
        output: own(std::io::stdout().as_fd())?,
        is_socket: false,
    })
}

fn open_file(file: &ChardevFile) -> Result<Connection, String> {
    let failed =
        |path: &str, error: &std::io::Error| format!("Could not open '{path}': {}", reason(error));
    let append = file.append.unwrap_or(false);
    let out = OpenOptions::new()
        .create(true)
        .write(true)
        .append(append)
        .truncate(!append)
        .open(&file.out)
        .map_err(|error| failed(&file.out, &error))?;
    let input = file.input.as_ref().map(|path| {
        let file = File::open(path).map_err(|error| failed(path, &error))?;
        Ok::<_, String>(Arc::new(OwnedFd::from(file)))
    });
    Ok(Connection {
        input: input.transpose()?,
        output: Some(Arc::new(out.into())),
        is_socket: false,
    })
}

/// What the host says, without its number.
fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((reason, _)) => reason.to_owned(),
        None => text,
    }
}

fn open_socket(socket: &ChardevSocket) -> Result<(String, Source), String> {
    let server = socket.server.unwrap_or(true);
    if socket.wait.is_some() && !server {
        return Err("'wait' option is incompatible with socket in client connect mode".into());
    }
    let (about, source) = match (&socket.addr, server) {
        (SocketAddress::Unix(Data(unix)), true) => {
            let path = Path::new(&unix.path);
            let listener = bind_unix(path)?;
            let about = format!("unix:{},server=on", unix.path);
            let own = OwnPath(path.to_owned());
            (about, Source::Listener(Listener::Unix(listener, Some(own))))
        }
        (SocketAddress::Unix(Data(unix)), false) => {
            let stream = UnixStream::connect(&unix.path).map_err(|error| {
                format!("Failed to connect to '{}': {}", unix.path, reason(&error))
            })?;
            let about = format!("unix:{}", unix.path);
            (about, Source::Once(Connection::socket(stream.into())))
        }
        (SocketAddress::Inet(Data(inet)), true) => {
            let address = format!("{}:{}", inet.host, inet.port);
            let listener = TcpListener::bind(with_number(inet)?)
                .map_err(|error| format!("Failed to bind socket: {address}: {}", reason(&error)))?;
            let bound = listener.local_addr().map_err(|error| reason(&error))?;
            let about = format!("tcp:{bound},server=on");
            (about, Source::Listener(Listener::Inet(listener)))
        }
        (SocketAddress::Inet(Data(inet)), false) => {
            let address = format!("{}:{}", inet.host, inet.port);
            let stream = TcpStream::connect(with_number(inet)?)
                .map_err(|error| format!("Failed to connect to '{address}': {}", reason(&error)))?;
            let _ = stream.set_nodelay(socket.nodelay.unwrap_or(false));
            (
                format!("tcp:{address}"),
                Source::Once(Connection::socket(stream.into())),
            )
        }
        (SocketAddress::Fd(Data(fd)), server) => inherited(&fd.number, server)?,
    };
    if let Source::Listener(listener) = &source {
        listener.set_nonblocking().map_err(|error| reason(&error))?;
    }
    Ok((about, source))
}

/// Listens where `addr` says.
///
/// # Errors
///
/// What is wrong with it, or the host's refusal.
pub fn listen(addr: &SocketAddress) -> Result<Listener, String> {
    let socket = ChardevSocket {
        addr: addr.clone(),
        server: Some(true),
        wait: None,
        nodelay: None,
    };
    match open_socket(&socket)? {
        (_, Source::Listener(listener)) => Ok(listener),
        (_, Source::Once(_)) => unreachable!("a server listens"),
    }
}

fn with_number(inet: &InetAddress) -> Result<(&str, u16), String> {
    let port = inet.port.parse();
    let port = port.map_err(|_| format!("'{}' is not the number of a port", inet.port))?;
    let host = match inet.host.as_str() {
        "" => "0.0.0.0",
        host => host,
    };
    Ok((host, port))
}

/// Listens at a path. A socket that nobody listens at any more is replaced; a file is not.
fn bind_unix(path: &Path) -> Result<UnixListener, String> {
    let shown = path.display();
    let failed =
        |error: &std::io::Error| format!("Failed to bind socket to {shown}: {}", reason(error));
    match UnixListener::bind(path) {
        Err(error) if error.kind() == IoErrorKind::AddrInUse => {
            let left_over = UnixStream::connect(path)
                .is_err_and(|error| error.kind() == IoErrorKind::ConnectionRefused);
            if !left_over {
                return Err(failed(&error));
            }
            std::fs::remove_file(path).map_err(|error| failed(&error))?;
            UnixListener::bind(path).map_err(|error| failed(&error))
        }
        result => result.map_err(|error| failed(&error)),
    }
}

/// A socket that this process was started with.
fn inherited(number: &str, server: bool) -> Result<(String, Source), String> {
    let fd = number.parse::<i32>().ok().filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(|| format!("Unable to parse FD number {number}"))?;
    let not_a_socket = || format!("File descriptor '{number}' is not a socket");
    let fd = crate::inherited::duplicate(fd).map_err(|_| not_a_socket())?;
    let is_stream = sockopt::socket_type(&fd) == Ok(SocketType::STREAM);
    if !is_stream {
        return Err(not_a_socket());
    }
    let listens = sockopt::socket_acceptconn(&fd).unwrap_or(false);
    let about = format!("fd:{}", fd.as_raw_fd());
    if listens != server {
        return Err(format!(
            "socket {number} {}",
            match listens {
                true => "listens: it needs server=on",
                false => "does not listen: it needs server=off",
            }
        ));
    }
    if !server {
        return Ok((about, Source::Once(Connection::socket(fd))));
    }
    let is_unix = sockopt::socket_domain(&fd) == Ok(AddressFamily::UNIX);
    let listener = match is_unix {
        true => Listener::Unix(fd.into(), None),
        false => Listener::Inet(fd.into()),
    };
    Ok((format!("{about},server=on"), Source::Listener(listener)))
}

/// Reads `--chardev`: a kind, `id=` and flat options.
///
/// # Errors
///
/// What is missing, unknown or impossible, in QEMU's words.
pub fn parse_chardev(text: &str) -> Result<(String, ChardevBackend), QmpError> {
    let refuse = |sentence: String| Err(QmpError::generic(sentence));
    let mut options = Options::parse(text, Some("backend"))?;
    let Some(kind) = options.take("backend") else {
        return refuse("chardev: \"backend\" missing".into());
    };
    if ELSEWHERE.contains(&kind.as_str()) {
        return refuse(format!(
            "character devices of kind '{kind}' are not in this version of stonework, which has {}",
            BACKENDS.join(", ")
        ));
    }
    if !BACKENDS.contains(&kind.as_str()) {
        return refuse(format!("'{kind}' is not a valid char driver name"));
    }
    let Some(id) = options.take("id") else {
        return refuse("chardev: no id specified".into());
    };
    let mut flag = |name: &str| match options.take(name) {
        None => Ok(None),
        Some(text) => match parse_bool(&text) {
            Some(flag) => Ok(Some(flag)),
            None => Err(QmpError::generic(format!(
                "Parameter '{name}' expects 'on' or 'off'"
            ))),
        },
    };
    let backend = match kind.as_str() {
        "null" => ChardevBackend::Null(Data(())),
        "stdio" => ChardevBackend::Stdio(Data(ChardevStdio {
            signal: flag("signal")?,
        })),
        "file" => {
            let append = flag("append")?;
            let Some(out) = options.take("path") else {
                return refuse("chardev: file: no filename given".into());
            };
            let input = options.take("input-path");
            ChardevBackend::File(Data(ChardevFile { input, out, append }))
        }
        _ => {
            let (server, wait) = (flag("server")?, flag("wait")?);
            let nodelay = flag("nodelay")?;
            for later in ["reconnect", "reconnect-ms"] {
                if options.get(later).is_some_and(|time| time != "0") {
                    return refuse(format!(
                        "option '{later}' of a socket is not in this version of stonework"
                    ));
                }
                options.take(later);
            }
            let places = ["path", "host", "fd"].map(|place| options.take(place));
            let addr = match places {
                [Some(path), None, None] => SocketAddress::Unix(Data(UnixAddress { path })),
                [None, Some(host), None] => {
                    let Some(port) = options.take("port") else {
                        return refuse("chardev: socket: no port given".into());
                    };
                    SocketAddress::Inet(Data(InetAddress { host, port }))
                }
                [None, None, Some(number)] => SocketAddress::Fd(Data(FdAddress { number })),
                [None, None, None] => {
                    return refuse("chardev: socket: no 'path', 'host' or 'fd' given".into());
                }
                _ => {
                    return refuse(
                        "chardev: socket: 'path', 'host' and 'fd' exclude each other".into(),
                    );
                }
            };
            // On the command line a server waits unless told otherwise.
            let server = server.unwrap_or(false);
            ChardevBackend::Socket(Data(ChardevSocket {
                addr,
                server: Some(server),
                wait: if server {
                    Some(wait.unwrap_or(true))
                } else {
                    wait
                },
                nodelay,
            }))
        }
    };
    if let Some((unknown, _)) = options.iter().next() {
        return refuse(format!("Invalid parameter '{unknown}'"));
    }
    Ok((id, backend))
}

impl ChardevBackend {
    /// Whether starting is to wait until somebody has connected.
    pub fn waits(&self) -> bool {
        match self {
            Self::Socket(Data(socket)) => socket.wait.unwrap_or(false),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        match parse_chardev(text) {
            Ok(_) => panic!("{text} is taken"),
            Err(error) => error.desc,
        }
    }

    #[test]
    fn devices_are_refused_in_qemus_words() {
        for (text, expected) in [
            ("null", "chardev: no id specified"),
            ("zz,id=a", "'zz' is not a valid char driver name"),
            (
                "socket,id=a,path=p,server=zzz",
                "Parameter 'server' expects 'on' or 'off'",
            ),
            ("socket,id=a,path=p,foo=1", "Invalid parameter 'foo'"),
            ("file,id=a", "chardev: file: no filename given"),
        ] {
            assert_eq!(refusal(text), expected);
        }
        assert!(refusal("pty,id=a").contains("which has file, socket, null, stdio"));
        assert!(refusal("socket,id=a,path=p,reconnect=1").contains("'reconnect'"));
        assert!(refusal("socket,id=a,path=p,host=h").contains("exclude each other"));
    }

    #[test]
    fn a_server_waits_unless_told_otherwise() {
        let waits = |text| parse_chardev(text).unwrap().1.waits();
        assert!(waits("socket,id=a,path=p,server=on"));
        assert!(!waits("socket,id=a,path=p,server=on,wait=off"));
        assert!(!waits("socket,id=a,path=p"));
    }

    #[test]
    fn a_device_has_one_user_and_its_socket_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let text = format!("socket,id=a,path={},server=on,wait=off", path.display());
        let (id, backend) = parse_chardev(&text).unwrap();
        let device = Chardev::new(&id, &backend).unwrap();
        assert_eq!(
            device.describe(),
            format!("disconnected:unix:{},server=on", path.display())
        );
        let again = Chardev::new("b", &backend).map(drop).unwrap_err();
        assert!(again.desc.contains("Address already in use"), "{again:?}");
        let (source, _) = device.take().unwrap();
        assert!(device.is_used() && device.take().is_none());
        let Source::Listener(listener) = &source else {
            panic!("a listener");
        };
        // Whoever tried to listen there has looked whether somebody does.
        while listener.accept().unwrap().is_some() {}
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(source);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_is_taken_over_by_its_number() {
        let (here, there) = UnixStream::pair().unwrap();
        let text = format!("socket,id=a,fd={}", there.as_raw_fd());
        let (id, backend) = parse_chardev(&text).unwrap();
        let device = Chardev::new(&id, &backend).unwrap();
        let Some((Source::Once(connection), _)) = device.take() else {
            panic!("connected");
        };
        rustix::io::write(&*connection.output.unwrap(), b"x").unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(&mut (&here), &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        let (_, backend) = parse_chardev("socket,id=a,fd=987654").unwrap();
        let error = Chardev::new("a", &backend).map(drop).unwrap_err();
        assert_eq!(error.desc, "File descriptor '987654' is not a socket");
    }
}
