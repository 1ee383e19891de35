//! Requests, compact and extended.

use bitflags::bitflags;
use blockcore::Error;

use super::{Cursor, MAX_PAYLOAD_BYTES, Mode};

const COMPACT_MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Length of a compact request's header.
pub const COMPACT_BYTES: usize = 28;
/// Length of an extended request's header.
pub const EXTENDED_BYTES: usize = 32;

/// How long a request's header is.
pub fn header_bytes(mode: Mode) -> usize {
    match mode {
        Mode::Simple | Mode::Structured => COMPACT_BYTES,
        Mode::Extended => EXTENDED_BYTES,
    }
}

bitflags! {
    /// How a request is to be done.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Stable when it completes.
        const FUA = 1;
        /// Zeroes keep their space.
        const NO_HOLE = 1 << 1;
        /// A read is answered in one piece.
        const DF = 1 << 2;
        /// Block status of one extent only.
        const REQ_ONE = 1 << 3;
        /// Zeroes are fast, or fail.
        const FAST_ZERO = 1 << 4;
        /// The length is that of what follows; extended requests only.
        const PAYLOAD_LEN = 1 << 5;
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Bytes.
    Read,
    /// Bytes are sent along.
    Write,
    /// The end of the connection.
    Disconnect,
    /// What has completed becomes stable.
    Flush,
    /// The contents are of no interest.
    Trim,
    /// Read ahead.
    Cache,
    /// Zeroes.
    WriteZeroes,
    /// What is where.
    BlockStatus,
    /// What nobody knows.
    Unknown(u16),
}

impl Command {
    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(number) => number,
        }
    }

    fn of(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            number => Self::Unknown(number),
        }
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags that are known and those that are not.
    pub flags: CommandFlags,
    /// What is asked for.
    pub command: Command,
    /// By which the reply names it; any number.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; of what follows, with [`CommandFlags::PAYLOAD_LEN`].
    pub bytes: u64,
}

impl Request {
    /// Reads a header of [`header_bytes`] bytes.
    ///
    /// # Errors
    ///
    /// It is none: the client is lost.
    pub fn parse(mode: Mode, bytes: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor(bytes);
        let magic = match mode {
            Mode::Simple | Mode::Structured => COMPACT_MAGIC,
            Mode::Extended => EXTENDED_MAGIC,
        };
        let begins = cursor.u32()?;
        if begins != magic {
            return Err(Error::invalid(format!(
                "a request begins with {begins:#010x} in place of {magic:#010x}"
            )));
        }
        let request = Self {
            flags: CommandFlags::from_bits_retain(cursor.u16()?),
            command: Command::of(cursor.u16()?),
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            bytes: match mode {
                Mode::Simple | Mode::Structured => u64::from(cursor.u32()?),
                Mode::Extended => cursor.u64()?,
            },
        };
        cursor.end("a request")?;
        Ok(request)
    }

    /// The header as it is sent. A length that a compact one cannot say is the caller's mistake.
    pub fn put(&self, mode: Mode, into: &mut Vec<u8>) {
        let magic = match mode {
            Mode::Simple | Mode::Structured => COMPACT_MAGIC,
            Mode::Extended => EXTENDED_MAGIC,
        };
        into.extend(magic.to_be_bytes());
        into.extend(self.flags.bits().to_be_bytes());
        into.extend(self.command.number().to_be_bytes());
        into.extend(self.cookie.to_be_bytes());
        into.extend(self.offset.to_be_bytes());
        match mode {
            Mode::Simple | Mode::Structured => {
                let bytes = u32::try_from(self.bytes);
                into.extend(bytes.expect("requests are cut to 32 bits").to_be_bytes());
            }
            Mode::Extended => into.extend(self.bytes.to_be_bytes()),
        }
    }

    /// How many bytes follow the header.
    ///
    /// # Errors
    ///
    /// More than anybody may send: the client is lost, as what follows cannot be told from requests.
    pub fn payload_bytes(&self, mode: Mode) -> Result<u32, Error> {
        let extended = mode == Mode::Extended;
        let counted = extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        let follows = self.command == Command::Write || counted;
        let bytes = if follows { self.bytes } else { 0 };
        match u32::try_from(bytes) {
            Ok(bytes) if bytes <= MAX_PAYLOAD_BYTES => Ok(bytes),
            _ => Err(Error::invalid(format!(
                "a request has {bytes} bytes of data, more than {MAX_PAYLOAD_BYTES}"
            ))),
        }
    }

    /// The flags that a request of its kind may have.
    pub fn allowed_flags(&self, mode: Mode) -> CommandFlags {
        let mut allowed = CommandFlags::FUA;
        allowed |= match self.command {
            Command::Read => CommandFlags::DF,
            Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            Command::BlockStatus => CommandFlags::REQ_ONE,
            _ => CommandFlags::empty(),
        };
        if self.command == Command::Read && mode == Mode::Simple {
            allowed.remove(CommandFlags::DF);
        }
        let counts = matches!(self.command, Command::Write | Command::BlockStatus);
        if mode == Mode::Extended && counts {
            allowed.insert(CommandFlags::PAYLOAD_LEN);
        }
        allowed
    }
}

/// What follows a request of block status that names contexts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusQuery {
    /// How much is asked about, in bytes.
    pub bytes: u64,
    /// Which contexts.
    pub contexts: Vec<u32>,
}

impl StatusQuery {
    /// Reads it.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(data: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor(data);
        let bytes = cursor.u64()?;
        let mut contexts = Vec::new();
        while !cursor.0.is_empty() {
            contexts.push(cursor.u32()?);
        }
        Ok(Self { bytes, contexts })
    }

    /// As it is sent.
    pub fn put(&self, into: &mut Vec<u8>) {
        into.extend(self.bytes.to_be_bytes());
        for context in &self.contexts {
            into.extend(context.to_be_bytes());
        }
    }
}
