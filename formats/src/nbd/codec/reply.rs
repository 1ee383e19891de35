//! Replies: simple, and in chunks that are structured or extended.

use bitflags::bitflags;
use blockcore::Error;

use super::{Cursor, Errno, MAX_PAYLOAD_BYTES, Mode};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

/// Length of a simple reply's header.
pub const SIMPLE_BYTES: usize = 16;
/// Length of a structured chunk's header.
pub const STRUCTURED_BYTES: usize = 20;
/// Length of an extended chunk's header.
pub const EXTENDED_BYTES: usize = 32;

/// Flag of the last chunk of a reply.
const DONE: u16 = 1;

/// Most bytes of extents and error texts that are taken in.
pub const MAX_CHUNK_BYTES: u64 = 16 << 20;

/// Kinds of chunks.
pub mod chunk {
    #![expect(missing_docs, reason = "the protocol's names")]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 32769;
    pub const ERROR_OFFSET: u16 = 32770;
}

bitflags! {
    /// What an extent of context `base:allocation` is.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Allocation: u64 {
        /// No space is tied to it.
        const HOLE = 1;
        /// It reads as zeroes.
        const ZERO = 2;
    }
}

/// What an extent of a dirty bitmap is, if it is marked.
pub const DIRTY: u64 = 1;

/// A range with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How long it is.
    pub bytes: u64,
    /// What it is, as its context has it.
    pub flags: u64,
}

/// What a chunk's, or a simple reply's, header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHeader {
    /// Of which request.
    pub cookie: u64,
    /// What follows.
    pub kind: ReplyKind,
}

/// What follows a reply's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyKind {
    /// A simple reply: the data of a read that did not fail, and nothing of others.
    Simple(Result<(), Errno>),
    /// A chunk.
    Chunk {
        /// It is the last.
        done: bool,
        /// What it has ([`chunk`]).
        kind: u16,
        /// How long that is.
        bytes: u64,
    },
}

/// How many bytes of a reply to read to know how long its header is.
pub const FIRST_BYTES: usize = 4;

/// How long the header is that begins so.
///
/// # Errors
///
/// It is none, or of none that was agreed on: the server is lost.
pub fn header_bytes(mode: Mode, first: [u8; FIRST_BYTES]) -> Result<usize, Error> {
    match (u32::from_be_bytes(first), mode) {
        (SIMPLE_MAGIC, Mode::Simple | Mode::Structured) => Ok(SIMPLE_BYTES),
        (STRUCTURED_MAGIC, Mode::Structured) => Ok(STRUCTURED_BYTES),
        (EXTENDED_MAGIC, Mode::Extended) => Ok(EXTENDED_BYTES),
        (magic, _) => Err(Error::invalid(format!(
            "a reply begins with {magic:#010x}, which is not as it was agreed"
        ))),
    }
}

impl ReplyHeader {
    /// Reads a header of [`header_bytes`] bytes.
    ///
    /// # Errors
    ///
    /// It says that more follows than any reply has: the server is lost.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor(bytes);
        let magic = cursor.u32()?;
        if magic == SIMPLE_MAGIC {
            let error = cursor.u32()?;
            let cookie = cursor.u64()?;
            let result = if error == 0 {
                Ok(())
            } else {
                Err(Errno(error))
            };
            return Ok(Self {
                cookie,
                kind: ReplyKind::Simple(result),
            });
        }
        let (flags, kind, cookie) = (cursor.u16()?, cursor.u16()?, cursor.u64()?);
        let bytes = if magic == EXTENDED_MAGIC {
            let _offset = cursor.u64()?;
            cursor.u64()?
        } else {
            u64::from(cursor.u32()?)
        };
        let most = match kind {
            chunk::OFFSET_DATA => u64::from(MAX_PAYLOAD_BYTES) + 8,
            _ => MAX_CHUNK_BYTES,
        };
        if bytes > most {
            return Err(Error::invalid(format!(
                "a reply has {bytes} bytes in one piece"
            )));
        }
        Ok(Self {
            cookie,
            kind: ReplyKind::Chunk {
                done: flags & DONE != 0,
                kind,
                bytes,
            },
        })
    }
}

/// The header of a simple reply.
pub fn put_simple(into: &mut Vec<u8>, cookie: u64, result: Result<(), Errno>) {
    into.extend(SIMPLE_MAGIC.to_be_bytes());
    into.extend(result.err().map_or(0, |error| error.0).to_be_bytes());
    into.extend(cookie.to_be_bytes());
}

/// Whose reply a chunk belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Replied {
    /// How it is laid out.
    pub mode: Mode,
    /// The request's.
    pub cookie: u64,
    /// The request's, which extended chunks repeat.
    pub offset: u64,
}

/// The header of a chunk that is followed by so many bytes.
pub fn put_chunk(into: &mut Vec<u8>, to: Replied, done: bool, kind: u16, bytes: u64) {
    let extended = to.mode == Mode::Extended;
    let magic = if extended {
        EXTENDED_MAGIC
    } else {
        STRUCTURED_MAGIC
    };
    into.extend(magic.to_be_bytes());
    into.extend(if done { DONE } else { 0 }.to_be_bytes());
    into.extend(kind.to_be_bytes());
    into.extend(to.cookie.to_be_bytes());
    if extended {
        into.extend(to.offset.to_be_bytes());
        into.extend(bytes.to_be_bytes());
    } else {
        let bytes = u32::try_from(bytes);
        into.extend(bytes.expect("chunks are bounded").to_be_bytes());
    }
}

/// All of a chunk of data but its data.
pub fn put_data(into: &mut Vec<u8>, to: Replied, done: bool, offset: u64, bytes: u64) {
    put_chunk(into, to, done, chunk::OFFSET_DATA, bytes + 8);
    into.extend(offset.to_be_bytes());
}

/// A chunk that says that a range reads as zeroes.
pub fn put_hole(into: &mut Vec<u8>, to: Replied, done: bool, offset: u64, bytes: u32) {
    put_chunk(into, to, done, chunk::OFFSET_HOLE, 12);
    into.extend(offset.to_be_bytes());
    into.extend(bytes.to_be_bytes());
}

/// A chunk that says how a request failed; `text` is for people.
pub fn put_error(into: &mut Vec<u8>, to: Replied, done: bool, error: Errno, text: &str) {
    let text = &text[..text.floor_char_boundary(super::MAX_STRING_BYTES)];
    put_chunk(into, to, done, chunk::ERROR, 6 + text.len() as u64);
    into.extend(error.0.to_be_bytes());
    into.extend((text.len() as u16).to_be_bytes());
    into.extend(text.as_bytes());
}

/// The extents of one context.
pub fn put_status(into: &mut Vec<u8>, to: Replied, done: bool, context: u32, extents: &[Extent]) {
    let count = extents.len() as u64;
    if to.mode == Mode::Extended {
        put_chunk(into, to, done, chunk::BLOCK_STATUS_EXT, 8 + 16 * count);
        into.extend(context.to_be_bytes());
        into.extend((count as u32).to_be_bytes());
        for extent in extents {
            into.extend(extent.bytes.to_be_bytes());
            into.extend(extent.flags.to_be_bytes());
        }
        return;
    }
    put_chunk(into, to, done, chunk::BLOCK_STATUS, 4 + 8 * count);
    into.extend(context.to_be_bytes());
    for extent in extents {
        // Who makes them keeps to 32 bits, as requests of this mode do.
        let bytes = u32::try_from(extent.bytes).unwrap_or(u32::MAX);
        into.extend(bytes.to_be_bytes());
        into.extend((extent.flags as u32).to_be_bytes());
    }
}

/// What a chunk has, its data excepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing.
    None,
    /// A range that reads as zeroes.
    Hole {
        /// Where.
        offset: u64,
        /// How long.
        bytes: u32,
    },
    /// Extents of a context.
    Status {
        /// Which.
        context: u32,
        /// At least one, each of at least one byte.
        extents: Vec<Extent>,
    },
    /// The request failed.
    Error(Errno, String),
}

impl Chunk {
    /// Reads what a chunk of this kind has. Data ([`chunk::OFFSET_DATA`]) is not for here.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(kind: u16, data: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor(data);
        let parsed = match kind {
            chunk::NONE => Self::None,
            chunk::OFFSET_HOLE => Self::Hole {
                offset: cursor.u64()?,
                bytes: cursor.u32()?,
            },
            chunk::BLOCK_STATUS => {
                let context = cursor.u32()?;
                let mut extents = Vec::new();
                while !cursor.0.is_empty() {
                    extents.push(Extent {
                        bytes: u64::from(cursor.u32()?),
                        flags: u64::from(cursor.u32()?),
                    });
                }
                Self::status(context, extents)?
            }
            chunk::BLOCK_STATUS_EXT => {
                let (context, count) = (cursor.u32()?, cursor.u32()?);
                let mut extents = Vec::new();
                while !cursor.0.is_empty() {
                    extents.push(Extent {
                        bytes: cursor.u64()?,
                        flags: cursor.u64()?,
                    });
                }
                if extents.len() != count as usize {
                    return Err(Error::invalid(format!(
                        "a reply has {} extents in place of {count}",
                        extents.len()
                    )));
                }
                Self::status(context, extents)?
            }
            // Other errors than those two are as good as the first.
            kind if kind & 0x8000 != 0 => {
                let error = cursor.u32()?;
                let bytes = usize::from(cursor.u16()?);
                let text = String::from_utf8_lossy(cursor.bytes(bytes)?).into_owned();
                cursor.rest();
                Self::Error(Errno(error), text)
            }
            kind => {
                return Err(Error::invalid(format!(
                    "a reply has a chunk of kind {kind}"
                )));
            }
        };
        cursor.end("a chunk")?;
        Ok(parsed)
    }

    fn status(context: u32, extents: Vec<Extent>) -> Result<Self, Error> {
        if extents.is_empty() || extents.iter().any(|extent| extent.bytes == 0) {
            return Err(Error::invalid("a reply has extents of nothing"));
        }
        Ok(Self::Status { context, extents })
    }
}
