//! Connecting to a server, and the first conversation with it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use blockcore::engine::{Errno, HostCall, HostReply, Interest, Socket};
use blockcore::io::{IoContext, MAX_BYTES};
use blockcore::{Error, ErrorKind};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::nbd::codec::option::{
    self, ClientOption, EXPORT_NAME_PADDING, HandshakeFlags, Info, OPTION_REPLY_BYTES, OptionReply,
    OptionReplyHeader, Queries, Refusal, Wanted, info,
};
use crate::nbd::codec::{ExportFlags, MAX_PAYLOAD_BYTES, Mode};
use crate::nbd::stream::{Reader, Stream};

/// How long is waited for room among those who want to connect to a Unix socket.
const CROWDED: Duration = Duration::from_millis(10);

/// Where a server is.
#[derive(Clone, Debug)]
pub(super) enum Address {
    /// A path.
    Unix(String),
    /// A host and a port.
    Inet(String, u16),
}

/// What is asked of a server.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) address: Address,
    pub(super) export: String,
    /// The context whose status is told.
    pub(super) context: String,
}

/// What a server and we have agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreed {
    pub(super) bytes: u64,
    pub(super) flags: ExportFlags,
    pub(super) mode: Mode,
    /// Requests are multiples of it.
    pub(super) minimum: u32,
    /// Multiples of it are fast.
    pub(super) preferred: u32,
    /// Longest read or write.
    pub(super) maximum: u32,
    /// By which replies name the context, if the server has it.
    pub(super) context: Option<u32>,
}

/// Connects and chooses the export.
pub(super) async fn connect(context: &IoContext, asked: &Asked) -> Result<(Agreed, Reader), Error> {
    let socket = match &asked.address {
        Address::Unix(path) => connect_unix(context, path).await?,
        Address::Inet(host, port) => connect_inet(context, host, *port).await?,
    };
    let stream = Stream::plain(Socket::new(socket));
    let agreed = async {
        let mut talk = Talk {
            context,
            asked,
            reader: Reader::new(Arc::clone(&stream)),
        };
        let agreed = talk.agree().await?;
        Ok::<_, Error>((agreed, talk.reader))
    };
    agreed.await.map_err(|error| {
        let kind = error.kind();
        Error::new(
            kind,
            format!("NBD server {}: {}", asked.address.shown(), error.report()),
        )
    })
}

impl Address {
    /// For messages.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Unix(path) => format!("'{path}'"),
            Self::Inet(host, port) => format!("'{host}:{port}'"),
        }
    }
}

async fn connect_unix(context: &IoContext, path: &str) -> Result<OwnedFd, Error> {
    let failed = |errno| Error::host(format!("Failed to connect to '{path}'"), errno);
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    loop {
        let socket = socket(AddressFamily::UNIX).map_err(failed)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            // More are waiting to be accepted than the server wanted.
            Err(Errno::AGAIN) => context.delay(CROWDED).await,
            Err(errno) => return Err(failed(errno)),
        }
    }
}

async fn connect_inet(context: &IoContext, host: &str, port: u16) -> Result<OwnedFd, Error> {
    let text = format!("Failed to connect to '{host}:{port}'");
    let resolved = context.host(HostCall::Resolve(host.to_owned(), port)).await;
    let addresses = match resolved {
        Ok(HostReply::Addresses(addresses)) if !addresses.is_empty() => addresses,
        _ => {
            let text = format!("address resolution failed for {host}:{port}");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
    };
    let mut last = Errno::ADDRNOTAVAIL;
    for address in addresses {
        match connect_to(context, &address).await {
            Ok(socket) => {
                // Small messages are not to wait for larger ones.
                let _ = sockopt::set_tcp_nodelay(&socket, true);
                return Ok(socket);
            }
            Err(errno) => last = errno,
        }
    }
    Err(Error::host(text, last))
}

async fn connect_to(context: &IoContext, address: &SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket(family)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) => return Ok(socket),
        Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err(errno),
    }
    let socket = Arc::new(socket);
    context.ready(&socket, Interest::Send).await?;
    sockopt::socket_error(&*socket)??;
    rustix::io::fcntl_dupfd_cloexec(&*socket, 0)
}

fn socket(family: AddressFamily) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(family, SocketType::STREAM, flags, None)
}

/// The first conversation.
struct Talk<'a> {
    context: &'a IoContext,
    asked: &'a Asked,
    reader: Reader,
}

impl Talk<'_> {
    async fn agree(&mut self) -> Result<Agreed, Error> {
        let greeting = self.reader.array(self.context).await.map_err(lost)?;
        let both = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
        let flags = option::parse_greeting(&greeting)? & both;
        self.send(&option::client_flags(flags)).await?;
        let mut agreed = Agreed {
            bytes: 0,
            flags: ExportFlags::empty(),
            mode: Mode::Simple,
            minimum: 1,
            preferred: 4096,
            maximum: MAX_PAYLOAD_BYTES,
            context: None,
        };
        if !flags.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return self.by_name(flags, agreed).await;
        }
        if self.takes(&ClientOption::ExtendedHeaders).await? {
            agreed.mode = Mode::Extended;
        } else if self.takes(&ClientOption::StructuredReply).await? {
            agreed.mode = Mode::Structured;
        }
        if agreed.mode > Mode::Simple {
            agreed.context = self.choose_context().await?;
        }
        match self.go(&mut agreed).await? {
            true => checked(agreed),
            false => self.by_name(flags, agreed).await,
        }
    }

    async fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        let sent = self.reader.stream().send_bytes(self.context, bytes).await;
        sent.map_err(lost)
    }

    /// The next reply to this option.
    async fn reply(&mut self, option: &ClientOption) -> Result<OptionReply, Error> {
        let context = self.context;
        let header = self.reader.array::<OPTION_REPLY_BYTES>(context).await;
        let header = OptionReplyHeader::parse(&header.map_err(lost)?)?;
        if header.option != option.number() {
            return Err(Error::invalid(format!(
                "it answers option {}, and was asked for {}",
                header.option,
                option.number()
            )));
        }
        let data = self.reader.vec(context, header.bytes as usize).await;
        OptionReply::parse(header.kind, &data.map_err(lost)?)
    }

    /// Whether the server takes an option that is done or not.
    async fn takes(&mut self, option: &ClientOption) -> Result<bool, Error> {
        self.send(&option.to_bytes()).await?;
        match self.reply(option).await? {
            OptionReply::Ack => Ok(true),
            OptionReply::Error(refusal, text) => match refused(refusal, &text) {
                Some(error) => Err(error),
                None => Ok(false),
            },
            other => Err(unexpected(&other)),
        }
    }

    async fn choose_context(&mut self) -> Result<Option<u32>, Error> {
        let option = ClientOption::SetMetaContext(Queries {
            name: self.asked.export.clone(),
            queries: vec![self.asked.context.clone()],
        });
        self.send(&option.to_bytes()).await?;
        let mut chosen = None;
        loop {
            match self.reply(&option).await? {
                OptionReply::Ack => return Ok(chosen),
                OptionReply::MetaContext { id, name } if name == self.asked.context => {
                    chosen = Some(id);
                }
                // That the export is not there is told again, in better words.
                OptionReply::Error(refusal, text) => match refused(refusal, &text) {
                    Some(error) => return Err(error),
                    None => return Ok(None),
                },
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Chooses the export; whether the server knows how.
    async fn go(&mut self, agreed: &mut Agreed) -> Result<bool, Error> {
        let option = ClientOption::Go(Wanted {
            name: self.asked.export.clone(),
            kinds: vec![info::BLOCK_SIZE],
        });
        self.send(&option.to_bytes()).await?;
        let mut is_told = false;
        loop {
            match self.reply(&option).await? {
                OptionReply::Ack if is_told => return Ok(true),
                OptionReply::Info(Info::Export { bytes, flags }) => {
                    (agreed.bytes, agreed.flags) = (bytes, flags);
                    is_told = true;
                }
                OptionReply::Info(Info::BlockSize {
                    minimum,
                    preferred,
                    maximum,
                }) => {
                    (agreed.minimum, agreed.preferred) = (minimum, preferred);
                    agreed.maximum = maximum.min(MAX_PAYLOAD_BYTES);
                }
                OptionReply::Info(_) => {}
                OptionReply::Error(Refusal::UNSUPPORTED, _) => return Ok(false),
                OptionReply::Error(Refusal::UNKNOWN, text) => {
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!(
                            "Requested export not available: '{}': {text}",
                            self.asked.export
                        ),
                    ));
                }
                OptionReply::Error(refusal, text) => {
                    return Err(refused(refusal, &text).unwrap_or_else(|| {
                        Error::invalid(format!("it refuses export '{}': {text}", self.asked.export))
                    }));
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Chooses the export in the way from before there were answers.
    async fn by_name(&mut self, flags: HandshakeFlags, agreed: Agreed) -> Result<Agreed, Error> {
        let option = ClientOption::ExportName(self.asked.export.clone());
        self.send(&option.to_bytes()).await?;
        let gone = |errno| {
            let text = format!("it has no export '{}'", self.asked.export);
            Error::host(text, errno)
        };
        let reply = self.reader.array(self.context).await.map_err(gone)?;
        let (bytes, export) = option::parse_export_name_reply(reply);
        if !flags.contains(HandshakeFlags::NO_ZEROES) {
            let padding = EXPORT_NAME_PADDING as u64;
            self.reader
                .skip(self.context, padding)
                .await
                .map_err(lost)?;
        }
        checked(Agreed {
            bytes,
            flags: export,
            ..agreed
        })
    }
}

fn lost(errno: Errno) -> Error {
    Error::host("the connection is lost", errno)
}

fn unexpected(reply: &OptionReply) -> Error {
    Error::invalid(format!("an answer that was not asked for: {reply:?}"))
}

/// A refusal that says more than that the server does not know something.
fn refused(refusal: Refusal, text: &str) -> Option<Error> {
    match refusal {
        Refusal::TLS_REQUIRED => Some(Error::unsupported(format!(
            "it takes encrypted connections only, which are not in this version of stonework: {text}"
        ))),
        Refusal::SHUTDOWN => Some(Error::busy(format!("it is about to end: {text}"))),
        _ => None,
    }
}

/// What a server says of an export, if that can be.
fn checked(agreed: Agreed) -> Result<Agreed, Error> {
    let Agreed {
        bytes,
        minimum,
        maximum,
        ..
    } = agreed;
    let blocks = minimum.is_power_of_two() && minimum <= 65536 && maximum >= minimum;
    if !blocks {
        return Err(Error::invalid(format!(
            "it takes requests of {minimum} to {maximum} bytes, which cannot be"
        )));
    }
    if bytes > MAX_BYTES {
        return Err(Error::invalid(format!(
            "its export has {bytes} bytes, which is more than there can be"
        )));
    }
    if !bytes.is_multiple_of(u64::from(minimum)) {
        return Err(Error::unsupported(format!(
            "its export has {bytes} bytes, which is not a multiple of the {minimum} that it takes requests in"
        )));
    }
    Ok(Agreed {
        maximum: maximum / minimum * minimum,
        preferred: agreed.preferred.max(minimum),
        ..agreed
    })
}
