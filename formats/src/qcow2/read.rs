//! Reading, and what a range is.

use blockcore::IoError;
use blockcore::driver::{Place, Status, StatusFlags};
use blockcore::io::Io;
use blockcore::io::buffer::Segments;

use super::image::{BACKING, FILE, Image};
use super::layout::entry::Kind;
use super::mapping::Extent;

impl Image {
    pub(super) async fn read(
        &self,
        io: Io<'_>,
        offset: u64,
        into: Segments,
    ) -> Result<(), IoError> {
        let mut done = 0;
        while done < into.bytes() {
            let rest = into.bytes() - done;
            let extent = self.extent(io, offset + done, rest).await?;
            let part = into.slice(done, extent.bytes);
            self.read_extent(io, offset + done, extent, part).await?;
            done += extent.bytes;
        }
        Ok(())
    }

    pub(super) async fn read_extent(
        &self,
        io: Io<'_>,
        offset: u64,
        extent: Extent,
        into: Segments,
    ) -> Result<(), IoError> {
        match extent.kind {
            Kind::Zero => {
                into.fill(0);
                Ok(())
            }
            Kind::Absent => read_backing(io, offset, into).await,
            Kind::Data => {
                let host = extent.host.expect("data has a place");
                let child = self.data_child();
                // Before any wait: see `try_extent`.
                let _using = io.using(child, host.0, extent.bytes);
                io.child(FILE).event("read_aio").await?;
                io.child(child).read(host.0, into).await
            }
            Kind::Compressed => self.read_compressed(io, offset, extent, into).await,
        }
    }

    /// Reads what lies inside the disk; the rest of its last cluster is zero.
    pub(super) async fn read_clipped(
        &self,
        io: Io<'_>,
        offset: u64,
        into: Segments,
    ) -> Result<(), IoError> {
        let inside = self.bytes().saturating_sub(offset).min(into.bytes());
        into.slice(inside, into.bytes() - inside).fill(0);
        if inside == 0 {
            return Ok(());
        }
        // Boxed: writing reads.
        Box::pin(self.read(io, offset, into.slice(0, inside))).await
    }

    /// Whether a range is known to read as zeroes without a look at data.
    pub(super) async fn is_zero(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<bool, IoError> {
        let end = (offset + bytes).min(self.bytes());
        let mut next = offset;
        while next < end {
            let extent = self.extent(io, next, end - next).await?;
            let is_zero = match extent.kind {
                Kind::Zero => true,
                Kind::Absent => !io.has_child(BACKING) || io.child(BACKING).bytes() <= next,
                Kind::Data | Kind::Compressed => false,
            };
            if !is_zero {
                return Ok(false);
            }
            next += extent.bytes;
        }
        Ok(true)
    }

    pub(super) async fn block_status(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<Status, IoError> {
        let extent = self.extent(io, offset, bytes).await?;
        let mut status = Status::new(StatusFlags::empty(), extent.bytes);
        status.flags = match extent.kind {
            Kind::Absent => StatusFlags::empty(),
            Kind::Zero => StatusFlags::ZERO,
            Kind::Data => StatusFlags::DATA,
            Kind::Compressed => StatusFlags::DATA | StatusFlags::COMPRESSED,
        };
        if let Some(host) = extent.host {
            status.flags |= StatusFlags::PLACE;
            status.place = Place {
                child: Some(self.data_child()),
                offset: host.0,
            };
        }
        Ok(status)
    }
}

/// Reads what the backing node has, and zeroes past its end or where there is none.
async fn read_backing(io: Io<'_>, offset: u64, into: Segments) -> Result<(), IoError> {
    let there = match io.has_child(BACKING) {
        true => io.child(BACKING).bytes().saturating_sub(offset),
        false => 0,
    };
    let inside = there.min(into.bytes());
    into.slice(inside, into.bytes() - inside).fill(0);
    if inside == 0 {
        return Ok(());
    }
    io.child(FILE).event("read_backing_aio").await?;
    // Boxed: a chain is as long as it is.
    Box::pin(io.child(BACKING).read(offset, into.slice(0, inside))).await
}
