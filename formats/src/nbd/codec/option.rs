//! The handshake: the server's greeting, options of the client, and the server's replies to them.

use bitflags::bitflags;
use blockcore::Error;

use super::{Cursor, ExportFlags, MAX_STRING_BYTES, put_counted};

/// `NBDMAGIC`.
const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`.
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What servers of before options say in place of it.
const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Length of a greeting.
pub const GREETING_BYTES: usize = 18;
/// Length of an option's header.
pub const OPTION_BYTES: usize = 16;
/// Length of an option reply's header.
pub const OPTION_REPLY_BYTES: usize = 20;
/// Zeroes after the answer to [`ClientOption::ExportName`], unless both sides do without.
pub const EXPORT_NAME_PADDING: usize = 124;
/// Length of that answer without them.
pub const EXPORT_NAME_BYTES: usize = 10;

/// Most of an option's data that is taken in; of longer ones nothing is kept.
pub const MAX_OPTION_BYTES: u32 = 64 << 10;
/// Most queries of contexts in one option.
const MAX_QUERIES: u32 = 1024;

bitflags! {
    /// What both sides can do before options; the same bits in each direction.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// An unknown option is answered and no reason to end.
        const FIXED_NEWSTYLE = 1;
        /// No zeroes after the answer to [`ClientOption::ExportName`].
        const NO_ZEROES = 2;
    }
}

/// The server's first words.
pub fn greeting(flags: HandshakeFlags) -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&flags.bits().to_be_bytes());
    bytes
}

/// Reads the server's first words.
///
/// # Errors
///
/// They are not those of a server that takes options.
pub fn parse_greeting(bytes: &[u8; GREETING_BYTES]) -> Result<HandshakeFlags, Error> {
    let mut cursor = Cursor(bytes);
    if cursor.u64()? != GREETING_MAGIC {
        return Err(Error::invalid("the server does not speak NBD"));
    }
    match cursor.u64()? {
        OPTION_MAGIC => Ok(HandshakeFlags::from_bits_truncate(cursor.u16()?)),
        OLD_STYLE_MAGIC => Err(Error::unsupported(
            "the server speaks NBD as it was before exports had names (oldstyle), which is not in this \
             version of stonework",
        )),
        _ => Err(Error::invalid("the server does not speak NBD")),
    }
}

/// The client's answer to a greeting.
pub fn client_flags(flags: HandshakeFlags) -> [u8; 4] {
    u32::from(flags.bits()).to_be_bytes()
}

/// Reads the client's answer to a greeting.
///
/// # Errors
///
/// It has flags that nobody offered.
pub fn parse_client_flags(bytes: [u8; 4]) -> Result<HandshakeFlags, Error> {
    let bits = u32::from_be_bytes(bytes);
    let flags = u16::try_from(bits).ok().and_then(HandshakeFlags::from_bits);
    flags.ok_or_else(|| Error::invalid(format!("the client has unknown flags {bits:#x}")))
}

/// Numbers of options.
pub mod number {
    #![expect(missing_docs, reason = "the protocol's names")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of information about an export.
pub mod info {
    #![expect(missing_docs, reason = "the protocol's names")]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What comes before an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: u32,
    /// How long its data is.
    pub bytes: u32,
}

impl OptionHeader {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// It is none: the client is lost.
    pub fn parse(bytes: &[u8; OPTION_BYTES]) -> Result<Self, Error> {
        let mut cursor = Cursor(bytes);
        if cursor.u64()? != OPTION_MAGIC {
            return Err(Error::invalid(
                "the client's option begins with something else",
            ));
        }
        let (option, bytes) = (cursor.u32()?, cursor.u32()?);
        Ok(Self { option, bytes })
    }
}

/// What a client asks for before an export is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption {
    /// Choose an export, the old way: there is no answer but success.
    ExportName(String),
    /// End.
    Abort,
    /// Name all exports.
    List,
    /// Encrypt all that follows.
    StartTls,
    /// Tell of an export.
    Info(Wanted),
    /// Tell of an export and choose it.
    Go(Wanted),
    /// Reply in chunks.
    StructuredReply,
    /// Say which contexts of an export match.
    ListMetaContext(Queries),
    /// Tell block status of the contexts that match.
    SetMetaContext(Queries),
    /// Requests and replies of 64 bits.
    ExtendedHeaders,
    /// What nobody knows.
    Unknown(u32),
}

/// An export and what a client wants to know of it besides the necessary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The export's name; empty for the default one.
    pub name: String,
    /// Kinds of information ([`info`]).
    pub kinds: Vec<u16>,
}

/// An export and patterns of contexts' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queries {
    /// The export's name.
    pub name: String,
    /// Full names, or namespaces with their colon.
    pub queries: Vec<String>,
}

impl ClientOption {
    /// Reads the data of an option.
    ///
    /// # Errors
    ///
    /// What is wrong with it; the client may go on with another option.
    pub fn parse(option: u32, data: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor(data);
        let parsed = match option {
            number::EXPORT_NAME => {
                let name = cursor.text(data.len(), "the export's name")?;
                Self::ExportName(name.to_owned())
            }
            // Whatever it has: there is nothing to tell to who leaves.
            number::ABORT => return Ok(Self::Abort),
            number::LIST => Self::List,
            number::STARTTLS => Self::StartTls,
            number::INFO => Self::Info(Wanted::parse(&mut cursor)?),
            number::GO => Self::Go(Wanted::parse(&mut cursor)?),
            number::STRUCTURED_REPLY => Self::StructuredReply,
            number::LIST_META_CONTEXT => Self::ListMetaContext(Queries::parse(&mut cursor)?),
            number::SET_META_CONTEXT => Self::SetMetaContext(Queries::parse(&mut cursor)?),
            number::EXTENDED_HEADERS => Self::ExtendedHeaders,
            option => return Ok(Self::Unknown(option)),
        };
        cursor.end("the option")?;
        Ok(parsed)
    }

    /// The number that replies to it have.
    pub fn number(&self) -> u32 {
        match self {
            Self::ExportName(_) => number::EXPORT_NAME,
            Self::Abort => number::ABORT,
            Self::List => number::LIST,
            Self::StartTls => number::STARTTLS,
            Self::Info(_) => number::INFO,
            Self::Go(_) => number::GO,
            Self::StructuredReply => number::STRUCTURED_REPLY,
            Self::ListMetaContext(_) => number::LIST_META_CONTEXT,
            Self::SetMetaContext(_) => number::SET_META_CONTEXT,
            Self::ExtendedHeaders => number::EXTENDED_HEADERS,
            Self::Unknown(option) => *option,
        }
    }

    /// The option as it is sent, header and data.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.extend(name.as_bytes()),
            Self::Info(wanted) | Self::Go(wanted) => wanted.put(&mut data),
            Self::ListMetaContext(queries) | Self::SetMetaContext(queries) => {
                queries.put(&mut data);
            }
            _ => {}
        }
        let mut bytes = Vec::with_capacity(OPTION_BYTES + data.len());
        bytes.extend(OPTION_MAGIC.to_be_bytes());
        bytes.extend(self.number().to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }
}

impl Wanted {
    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Error> {
        let name = cursor.counted("the export's name")?.to_owned();
        let count = cursor.u16()?;
        let kinds = (0..count).map(|_| cursor.u16());
        Ok(Self {
            name,
            kinds: kinds.collect::<Result<_, _>>()?,
        })
    }

    fn put(&self, into: &mut Vec<u8>) {
        put_counted(into, &self.name);
        into.extend((self.kinds.len() as u16).to_be_bytes());
        for kind in &self.kinds {
            into.extend(kind.to_be_bytes());
        }
    }
}

impl Queries {
    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Error> {
        let name = cursor.counted("the export's name")?.to_owned();
        let count = cursor.u32()?;
        if count > MAX_QUERIES {
            return Err(Error::invalid(format!("{count} queries are too many")));
        }
        let queries = (0..count).map(|_| cursor.counted("a query").map(str::to_owned));
        Ok(Self {
            name,
            queries: queries.collect::<Result<_, _>>()?,
        })
    }

    fn put(&self, into: &mut Vec<u8>) {
        put_counted(into, &self.name);
        into.extend((self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            put_counted(into, query);
        }
    }
}

/// Why an option was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal(u32);

impl Refusal {
    /// The server does not know the option.
    pub const UNSUPPORTED: Self = Self(0x8000_0001);
    /// Its operator has forbidden it.
    pub const POLICY: Self = Self(0x8000_0002);
    /// It makes no sense.
    pub const INVALID: Self = Self(0x8000_0003);
    /// Encryption has to come first.
    pub const TLS_REQUIRED: Self = Self(0x8000_0005);
    /// There is no such export.
    pub const UNKNOWN: Self = Self(0x8000_0006);
    /// The server is about to end.
    pub const SHUTDOWN: Self = Self(0x8000_0007);
    /// The client has to respect block sizes.
    pub const BLOCK_SIZE_REQUIRED: Self = Self(0x8000_0008);
    /// It is too long.
    pub const TOO_BIG: Self = Self(0x8000_0009);
    /// It is only to be had with extended headers.
    pub const EXTENDED_REQUIRED: Self = Self(0x8000_000a);
}

/// What comes before the data of an option's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// To which option.
    pub option: u32,
    /// What kind of reply.
    pub kind: u32,
    /// How long its data is.
    pub bytes: u32,
}

impl OptionReplyHeader {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// It is none, or says that longer data follows than any reply has: the server is lost.
    pub fn parse(bytes: &[u8; OPTION_REPLY_BYTES]) -> Result<Self, Error> {
        let mut cursor = Cursor(bytes);
        if cursor.u64()? != REPLY_MAGIC {
            return Err(Error::invalid(
                "the server's reply begins with something else",
            ));
        }
        let header = Self {
            option: cursor.u32()?,
            kind: cursor.u32()?,
            bytes: cursor.u32()?,
        };
        if header.bytes > MAX_OPTION_BYTES {
            return Err(Error::invalid(format!(
                "the server's reply to option {} has {} bytes",
                header.option, header.bytes
            )));
        }
        Ok(header)
    }
}

/// What a server says to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionReply {
    /// It is done; or that was all.
    Ack,
    /// There is this export.
    Server {
        /// Its name.
        name: String,
        /// What it is, for people.
        description: String,
    },
    /// Of the chosen export.
    Info(Info),
    /// A context that matches.
    MetaContext {
        /// By which replies name it.
        id: u32,
        /// Its name.
        name: String,
    },
    /// It is refused.
    Error(Refusal, String),
    /// What nobody knows.
    Unknown(u32),
}

/// A piece of information about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// The necessary.
    Export {
        /// Its length.
        bytes: u64,
        /// What can be done.
        flags: ExportFlags,
    },
    /// Its name.
    Name(String),
    /// What it is, for people.
    Description(String),
    /// Of requests, in bytes.
    BlockSize {
        /// Offsets and lengths are multiples of it.
        minimum: u32,
        /// Multiples of it are fast.
        preferred: u32,
        /// The longest.
        maximum: u32,
    },
    /// What nobody knows.
    Unknown(u16),
}

impl OptionReply {
    /// Reads the data of a reply of this kind.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(kind: u32, data: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor(data);
        let parsed = match kind {
            1 => Self::Ack,
            2 => Self::Server {
                name: cursor.counted("an export's name")?.to_owned(),
                description: {
                    let bytes = cursor.0.len();
                    cursor.text(bytes, "an export's description")?.to_owned()
                },
            },
            3 => Self::Info(Info::parse(&mut cursor)?),
            4 => Self::MetaContext {
                id: cursor.u32()?,
                name: {
                    let bytes = cursor.0.len();
                    cursor.text(bytes, "a context's name")?.to_owned()
                },
            },
            kind if kind & 0x8000_0000 != 0 => {
                let text = String::from_utf8_lossy(cursor.rest());
                let text = text.chars().take(MAX_STRING_BYTES).collect();
                Self::Error(Refusal(kind), text)
            }
            kind => return Ok(Self::Unknown(kind)),
        };
        cursor.end("the reply to an option")?;
        Ok(parsed)
    }

    /// The reply as it is sent, header and data.
    pub fn to_bytes(&self, option: u32) -> Vec<u8> {
        let mut data = Vec::new();
        let kind = match self {
            Self::Ack => 1,
            Self::Server { name, description } => {
                put_counted(&mut data, name);
                data.extend(description.as_bytes());
                2
            }
            Self::Info(info) => {
                info.put(&mut data);
                3
            }
            Self::MetaContext { id, name } => {
                data.extend(id.to_be_bytes());
                data.extend(name.as_bytes());
                4
            }
            Self::Error(refusal, text) => {
                data.extend(text.as_bytes());
                refusal.0
            }
            Self::Unknown(kind) => *kind,
        };
        let mut bytes = Vec::with_capacity(OPTION_REPLY_BYTES + data.len());
        bytes.extend(REPLY_MAGIC.to_be_bytes());
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }
}

impl Info {
    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, Error> {
        let kind = cursor.u16()?;
        let bytes = cursor.0.len();
        Ok(match kind {
            info::EXPORT => Self::Export {
                bytes: cursor.u64()?,
                flags: ExportFlags::from_bits_truncate(cursor.u16()?),
            },
            info::NAME => Self::Name(cursor.text(bytes, "the export's name")?.to_owned()),
            info::DESCRIPTION => {
                let text = cursor.text(bytes, "the export's description")?;
                Self::Description(text.to_owned())
            }
            info::BLOCK_SIZE => Self::BlockSize {
                minimum: cursor.u32()?,
                preferred: cursor.u32()?,
                maximum: cursor.u32()?,
            },
            kind => {
                cursor.rest();
                Self::Unknown(kind)
            }
        })
    }

    fn put(&self, into: &mut Vec<u8>) {
        match self {
            Self::Export { bytes, flags } => {
                into.extend(info::EXPORT.to_be_bytes());
                into.extend(bytes.to_be_bytes());
                into.extend(flags.bits().to_be_bytes());
            }
            Self::Name(name) => {
                into.extend(info::NAME.to_be_bytes());
                into.extend(name.as_bytes());
            }
            Self::Description(text) => {
                into.extend(info::DESCRIPTION.to_be_bytes());
                into.extend(text.as_bytes());
            }
            Self::BlockSize {
                minimum,
                preferred,
                maximum,
            } => {
                into.extend(info::BLOCK_SIZE.to_be_bytes());
                for number in [minimum, preferred, maximum] {
                    into.extend(number.to_be_bytes());
                }
            }
            Self::Unknown(kind) => into.extend(kind.to_be_bytes()),
        }
    }
}

/// The answer to [`ClientOption::ExportName`], with its zeroes if they are wanted.
pub fn export_name_reply(bytes: u64, flags: ExportFlags, zeroes: bool) -> Vec<u8> {
    let mut reply = Vec::with_capacity(EXPORT_NAME_BYTES + EXPORT_NAME_PADDING);
    reply.extend(bytes.to_be_bytes());
    reply.extend(flags.bits().to_be_bytes());
    if zeroes {
        reply.resize(EXPORT_NAME_BYTES + EXPORT_NAME_PADDING, 0);
    }
    reply
}

/// Reads the answer to [`ClientOption::ExportName`], without its zeroes.
pub fn parse_export_name_reply(bytes: [u8; EXPORT_NAME_BYTES]) -> (u64, ExportFlags) {
    let [a, b, c, d, e, f, g, h, high, low] = bytes;
    (
        u64::from_be_bytes([a, b, c, d, e, f, g, h]),
        ExportFlags::from_bits_truncate(u16::from_be_bytes([high, low])),
    )
}
