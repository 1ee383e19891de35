//! Zeroing and discarding, around a node's driver.
//!
//! The driver gets whole units only, in pieces no longer than it takes. What is left at the ends of a
//! range to be zeroed is written; what is left of a range to be discarded stays as it is.

use super::buffer::Segments;
use super::{BOUNCE_BYTES, Io, align};
use crate::IoError;
use crate::driver::{WriteFlags, ZeroFlags};
use crate::fault::{self, Fault};

/// Pieces of what a driver without a limit of its own gets: one call of the host cannot be interrupted.
const MAX_PIECE_BYTES: u64 = 1 << 40;

/// The part of a range that lies in whole units; empty (both the same) if there is none. Units need not
/// be powers of two.
fn whole_units(offset: u64, bytes: u64, unit: u64) -> (u64, u64) {
    let begin = offset.next_multiple_of(unit);
    let end = (offset + bytes) / unit * unit;
    (begin, end.max(begin))
}

fn limit(bytes: u64) -> u64 {
    match bytes {
        0 => MAX_PIECE_BYTES,
        bytes => bytes,
    }
}

impl<'a> Io<'a> {
    /// Makes a range read as zeroes: by the driver where it can, else by writing zeroes.
    pub async fn write_zeroes(
        self,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        self.check_write(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let whole = align::is_aligned(offset, bytes, self.unit());
        let turn = self.track(offset, bytes, !whole).await;
        if turn.is_some() {
            // Whoever was in the way may have cut off what is to be zeroed.
            self.check_write(offset, bytes)?;
        }
        let _marks = self.changes(offset, bytes);
        self.zero_inside(offset, bytes, flags).await?;
        self.stabilise(flags.contains(ZeroFlags::STABLE), false)
            .await
    }

    /// Zeroes a range that is allowed and whose turn it is.
    pub(super) async fn zero_inside(
        self,
        offset: u64,
        bytes: u64,
        mut flags: ZeroFlags,
    ) -> Result<(), IoError> {
        let node = self.node();
        if !node.modes.unmap {
            flags.remove(ZeroFlags::MAY_UNMAP);
        }
        flags.remove(ZeroFlags::STABLE);
        let end = offset + bytes;
        let (begin, whole_end) = whole_units(offset, bytes, node.limits.zero_unit());
        if begin == whole_end {
            return self.write_zero_buffers(offset, bytes, flags).await;
        }
        self.event("pwritev_zero").await?;
        self.write_zero_buffers(offset, begin - offset, flags)
            .await?;
        for (piece, piece_bytes) in
            align::pieces(begin, whole_end - begin, limit(node.limits.max_zero_bytes))
        {
            self.invalidate_status(piece, piece_bytes);
            let zeroed = node.io.write_zeroes(self, piece, piece_bytes, flags).await;
            self.invalidate_status(piece, piece_bytes);
            match zeroed {
                Err(IoError::Unsupported) => {
                    self.write_zero_buffers(piece, piece_bytes, flags).await?;
                }
                result => result?,
            }
        }
        self.write_zero_buffers(whole_end, end - whole_end, flags)
            .await
    }

    async fn write_zero_buffers(
        self,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        if bytes == 0 {
            return Ok(());
        }
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            return Err(IoError::Unsupported);
        }
        let flags = match flags.contains(ZeroFlags::UNCHANGED) {
            true => WriteFlags::UNCHANGED,
            false => WriteFlags::empty(),
        };
        let zeroes = self.bounce(bytes.min(BOUNCE_BYTES));
        for (piece, piece_bytes) in align::pieces(offset, bytes, BOUNCE_BYTES) {
            let piece_zeroes: Segments = zeroes.slice(0, piece_bytes);
            // Boxed: writes may widen, which would make this future as large as all of theirs.
            Box::pin(self.write_inside(piece, piece_zeroes, flags)).await?;
        }
        Ok(())
    }

    /// Discards what lies in whole units of the driver; the rest, and hosts that cannot, are no error.
    pub async fn discard(self, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.check(offset, bytes)?;
        self.check_write(offset, bytes)?;
        let node = self.node();
        if !node.modes.unmap || bytes == 0 {
            return Ok(());
        }
        let (begin, end) = whole_units(offset, bytes, node.limits.discard_unit());
        if begin == end {
            return Ok(());
        }
        let turn = self.track(begin, end - begin, false).await;
        if turn.is_some() {
            // As there.
            self.check(begin, end - begin)?;
        }
        let _marks = self.changes(begin, end - begin);
        for (piece, piece_bytes) in
            align::pieces(begin, end - begin, limit(node.limits.max_discard_bytes))
        {
            self.invalidate_status(piece, piece_bytes);
            let discarded = node.io.discard(self, piece, piece_bytes).await;
            self.invalidate_status(piece, piece_bytes);
            match discarded {
                Err(IoError::Unsupported) => return Ok(()),
                result => result?,
            }
        }
        Ok(())
    }

    /// Whatever was known to be data in a range may be a hole.
    pub(super) fn invalidate_status(self, offset: u64, bytes: u64) {
        if !fault::is_planted(Fault::StatusCache) {
            self.node().state.status_cache.invalidate(offset, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_units_of_any_size_are_found() {
        assert_eq!(whole_units(1, 10_000, 3000), (3000, 9000));
        assert_eq!(whole_units(0, 4096, 4096), (0, 4096));
        assert_eq!(whole_units(100, 200, 4096), (4096, 4096));
    }
}
