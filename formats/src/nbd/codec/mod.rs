//! The NBD protocol as bytes: what both ends say, and how it is read; no I/O.
//!
//! [`option`] is the conversation before an export is chosen, [`request`] and [`reply`] are what goes
//! on after it. Everything begins with a header of a fixed size, which says how long the rest is; who
//! reads it decides whether to take that much. Nothing here allocates by a number that a peer sent,
//! without as many bytes being there.
//!
//! Numbers are big-endian. Names are as in the protocol's own document ("The NBD protocol", doc/proto.md of
//! the NBD project), without their prefix.

pub mod option;
pub mod reply;
pub mod request;
#[cfg(test)]
mod tests;

use bitflags::bitflags;
use blockcore::{Error, IoError};

/// Longest name, description or query that either side may send.
pub const MAX_STRING_BYTES: usize = 4096;

/// Most bytes that one request moves, as QEMU has it; larger ones are refused.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// The port that `nbd://` names mean.
pub const DEFAULT_PORT: u16 = 10809;

bitflags! {
    /// What can be done to an export, and how.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ExportFlags: u16 {
        /// There are flags; always set.
        const HAS_FLAGS = 1;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// Flushes.
        const SEND_FLUSH = 1 << 2;
        /// Writes that are stable when they complete.
        const SEND_FUA = 1 << 3;
        /// Requests in order of offsets are faster.
        const ROTATIONAL = 1 << 4;
        /// Trims.
        const SEND_TRIM = 1 << 5;
        /// Writes of zeroes.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// Reads can be asked not to be fragmented.
        const SEND_DF = 1 << 7;
        /// What one connection has flushed is stable for all, and each sees what the others wrote.
        const CAN_MULTI_CONN = 1 << 8;
        /// The length can be changed, in a protocol that nobody has.
        const SEND_RESIZE = 1 << 9;
        /// Reading ahead.
        const SEND_CACHE = 1 << 10;
        /// Writes of zeroes can be asked to be fast or fail.
        const SEND_FAST_ZERO = 1 << 11;
        /// Block status can be asked of some contexts only.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

/// How replies and requests are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// One reply for each request, of a fixed shape.
    #[default]
    Simple,
    /// Replies in chunks of several kinds.
    Structured,
    /// As that, with lengths of 64 bits.
    Extended,
}

/// How a request failed, as the protocol has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub u32);

impl Errno {
    /// Not permitted.
    pub const PERM: Self = Self(1);
    /// The host failed.
    pub const IO: Self = Self(5);
    /// No memory.
    pub const NOMEM: Self = Self(12);
    /// The request makes no sense.
    pub const INVAL: Self = Self(22);
    /// No space.
    pub const NOSPC: Self = Self(28);
    /// Too large for what was asked of it.
    pub const OVERFLOW: Self = Self(75);
    /// It cannot be done, or not fast.
    pub const NOTSUP: Self = Self(95);
    /// The server is about to end.
    pub const SHUTDOWN: Self = Self(108);

    /// How it is told here; a number that means nothing is a failure of the host.
    pub fn to_io(self) -> IoError {
        match self {
            Self::PERM => IoError::ReadOnly,
            Self::NOSPC => IoError::NoSpace,
            Self::NOTSUP => IoError::Unsupported,
            _ => IoError::Failed,
        }
    }

    /// How it is told to a client.
    pub fn of_io(error: IoError) -> Self {
        match error {
            IoError::NoSpace => Self::NOSPC,
            IoError::Unsupported => Self::NOTSUP,
            IoError::OutOfRange => Self::INVAL,
            IoError::ReadOnly => Self::PERM,
            _ => Self::IO,
        }
    }
}

/// Takes numbers and text from the front of a message.
pub(crate) struct Cursor<'a>(pub(crate) &'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let Some((taken, rest)) = self.0.split_at_checked(count) else {
            return Err(Error::invalid(format!(
                "a message ends {} bytes early",
                count - self.0.len()
            )));
        };
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let taken = self.bytes(N)?;
        Ok(taken.try_into().expect("as many as were asked for"))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_be_bytes)
    }

    /// Text of so many bytes.
    pub(crate) fn text(&mut self, bytes: usize, what: &str) -> Result<&'a str, Error> {
        if bytes > MAX_STRING_BYTES {
            return Err(Error::invalid(format!("{what} is too long: {bytes} bytes")));
        }
        let taken = self.bytes(bytes)?;
        std::str::from_utf8(taken).map_err(|_| Error::invalid(format!("{what} is not valid UTF-8")))
    }

    /// Text after its length.
    pub(crate) fn counted(&mut self, what: &str) -> Result<&'a str, Error> {
        let bytes = self.u32()?;
        self.text(bytes as usize, what)
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(crate) fn end(self, what: &str) -> Result<(), Error> {
        match self.0.len() {
            0 => Ok(()),
            more => Err(Error::invalid(format!("{more} bytes follow {what}"))),
        }
    }
}

/// Text after its length.
pub(crate) fn put_counted(into: &mut Vec<u8>, text: &str) {
    into.extend((text.len() as u32).to_be_bytes());
    into.extend(text.as_bytes());
}
