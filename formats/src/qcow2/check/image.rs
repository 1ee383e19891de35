//! [`Image`]: the file of an image that is checked: its header, and its bytes.

use blockcore::driver::WriteFlags;
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, align};
use blockcore::{Error, ErrorKind, IoError};

use crate::qcow2::layout::Geometry;
use crate::qcow2::layout::bytes::words;
use crate::qcow2::layout::header::{Features, Header, PREFIX_BYTES, Purpose, field};
use blockcore::driver::Fix;

/// Files and disks are counted in sectors.
pub(super) const SECTOR_BYTES: u64 = 512;
/// How much of a table is read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// See the module's header.
pub(super) struct Image<'a> {
    io: Io<'a>,
    pub(super) header: Header,
    pub(super) geometry: Geometry,
}

impl<'a> Image<'a> {
    /// Reads the header. For a repair, also says there that what others keep beside the image is out of
    /// date from now on.
    pub(super) async fn open(io: Io<'a>, repair: Fix) -> Result<Self, Error> {
        let prefix = read(io, 0, PREFIX_BYTES as u64).await?;
        let cluster_bytes = Header::cluster_bytes_in(&prefix)?;
        let first = read(io, 0, cluster_bytes.min(io.bytes())).await?;
        let header = Header::parse(&first, Purpose::Check)?;
        let mut image = Self {
            io,
            geometry: header.geometry(),
            header,
        };
        let stale = image.header.unknown_autoclear() | Features::SEGMENT;
        let autoclear = image.header.features.autoclear;
        if repair != Fix::None && autoclear & stale != 0 {
            image.header.features.autoclear = autoclear & !stale;
            let field = image.header.features.autoclear.to_be_bytes();
            image.write(field::AUTOCLEAR, &field).await?;
            image.flush().await?;
        }
        Ok(image)
    }

    /// How long the file is, in whole sectors.
    pub(super) fn bytes(&self) -> u64 {
        self.io.bytes().next_multiple_of(SECTOR_BYTES)
    }

    /// The `bytes` bytes at `offset`; zeroes past the end of the file.
    pub(super) async fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, Error> {
        read(self.io, offset, bytes).await
    }

    /// A table of `entries` words, up to the last that is not zero: what lies past the end of the file is.
    pub(super) async fn words(&self, offset: u64, entries: u64) -> Result<Vec<u64>, Error> {
        let inside = self.io.bytes().saturating_sub(offset);
        let bytes = (entries * 8).min(inside.next_multiple_of(8));
        let (mut table, mut zeroes) = (Vec::new(), 0);
        for (piece, piece_bytes) in align::pieces(offset, bytes, PIECE_BYTES) {
            for word in words(&self.read(piece, piece_bytes).await?) {
                if word == 0 {
                    zeroes += 1;
                    continue;
                }
                table.resize(table.len() + zeroes, 0);
                table.push(word);
                zeroes = 0;
            }
        }
        Ok(table)
    }

    pub(super) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let end = offset + bytes.len() as u64;
        if end > self.io.bytes() {
            self.lengthen(end).await?;
        }
        let memory = Segments::allocate(bytes.len(), 4096);
        memory.copy_from(bytes);
        let written = self.io.write(offset, memory, WriteFlags::empty()).await;
        written.map_err(|error| self.failed("write to", error))
    }

    async fn lengthen(&self, bytes: u64) -> Result<(), Error> {
        use blockcore::driver::{Preallocation, TruncateFlags};
        let (none, flags) = (Preallocation::Off, TruncateFlags::ZERO);
        let longer = self.io.truncate(bytes, false, none, flags).await;
        longer.map_err(|error| self.failed("make room in", error))
    }

    pub(super) async fn flush(&self) -> Result<(), Error> {
        let flushed = self.io.flush().await;
        flushed.map_err(|error| self.failed("flush", error))
    }

    /// Clears incompatible features in the header, and makes that durable.
    pub(super) async fn clear_features(&mut self, features: u64) -> Result<(), Error> {
        if self.header.features.incompatible & features == 0 {
            return Ok(());
        }
        self.header.features.incompatible &= !features;
        let field = self.header.features.incompatible.to_be_bytes();
        self.write(field::INCOMPATIBLE, &field).await?;
        self.flush().await
    }

    /// Clears autoclear features in the header, and makes that durable.
    pub(super) async fn clear_autoclear(&mut self, features: u64) -> Result<(), Error> {
        self.header.features.autoclear &= !features;
        let field = self.header.features.autoclear.to_be_bytes();
        self.write(field::AUTOCLEAR, &field).await?;
        self.flush().await
    }

    fn failed(&self, what: &str, error: IoError) -> Error {
        failed(self.io, what, error)
    }
}

async fn read(io: Io<'_>, offset: u64, bytes: u64) -> Result<Vec<u8>, Error> {
    let mut data = vec![0; bytes as usize];
    let inside = io.bytes().saturating_sub(offset).min(bytes);
    if inside > 0 {
        let memory = Segments::allocate(inside as usize, 4096);
        let done = io.read(offset, memory.clone()).await;
        done.map_err(|error| failed(io, "read", error))?;
        memory.copy_to(&mut data);
    }
    Ok(data)
}

fn failed(io: Io<'_>, what: &str, error: IoError) -> Error {
    let kind = match error {
        IoError::NoSpace | IoError::OutOfRange => ErrorKind::NoSpace,
        IoError::ReadOnly => ErrorKind::PermissionDenied,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("cannot {what} node '{}': {error}", io.name()))
}
