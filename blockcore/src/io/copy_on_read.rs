//! Copy-on-read: what a node defers to its backing node for is written into it when it is read.

use super::buffer::Segments;
use super::{BOUNCE_BYTES, Io, align};
use crate::IoError;
use crate::driver::{WriteFlags, ZeroFlags};
use crate::graph::permission::Permissions;

impl Io<'_> {
    /// Reads, and writes into this node what it did not hold; with `into` left out only that. Whole
    /// clusters are copied, through memory of our own: a guest's may change between the two.
    ///
    /// The clusters are kept from all other requests meanwhile, or a write in between would be undone.
    /// What is read does not change by it, so dirty bitmaps are not marked and the right to write
    /// unchanged bytes is enough.
    ///
    /// # Errors
    ///
    /// [`IoError::ReadOnly`] without that right; a failure to write fails the read.
    pub async fn read_copying(
        self,
        offset: u64,
        bytes: u64,
        into: Option<Segments>,
    ) -> Result<(), IoError> {
        self.check(offset, bytes)?;
        let may_write = Permissions::WRITE | Permissions::WRITE_UNCHANGED;
        if self.modes().read_only || !self.node().granted.intersects(may_write) {
            return Err(IoError::ReadOnly);
        }
        if bytes == 0 {
            return Ok(());
        }
        let cluster = u64::from(self.limits().cluster_bytes).max(self.unit());
        let begin = align::down(offset, cluster);
        let end = align::up(offset + bytes, cluster);
        let _turn = self.serialise(begin, end).await;
        let (end, mut next) = (end.min(self.bytes()), begin);
        while next < end {
            let most = BOUNCE_BYTES.max(cluster).min(end - next);
            let (allocated, alike) = self.is_allocated(next, most).await?;
            let piece = if allocated {
                alike
            } else {
                // What is copied ends with a cluster, or with the node.
                align::up(next + alike, cluster).min(end) - next
            };
            let wanted = overlap((next, next + piece), (offset, offset + bytes));
            if !allocated {
                let copied = self.copy_up(next, piece).await?;
                if let (Some(into), Some((from, to))) = (&into, wanted) {
                    into.slice(from - offset, to - from)
                        .copy_from_segments(&copied.slice(from - next, to - from));
                }
            } else if let (Some(into), Some((from, to))) = (&into, wanted) {
                let part = into.slice(from - offset, to - from);
                self.read_inside(from, part).await?;
            }
            next += piece;
        }
        Ok(())
    }

    /// Has a filter that copies on read do so, here or below: what a read would do for the chain, with
    /// nobody who reads.
    ///
    /// # Errors
    ///
    /// [`IoError::Unsupported`] if nobody copies on read; else as [`read_copying`](Self::read_copying).
    pub async fn prefetch(self, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.check(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let _turn = self.track(offset, bytes, false).await;
        self.node().io.prefetch(self, offset, bytes).await
    }

    /// Copies what lies below a range of this node into it; returns what that was.
    async fn copy_up(self, offset: u64, bytes: u64) -> Result<Segments, IoError> {
        let bounce = self.bounce(bytes);
        self.read_inside(offset, bounce.clone()).await?;
        self.event("cor_write").await?;
        if bounce.is_zero() {
            // Not unmapped: a layer that defers to its backing node must hold the zeroes itself.
            let zeroed = self.zero_inside(offset, bytes, ZeroFlags::UNCHANGED).await;
            zeroed?;
        } else {
            self.write_inside(offset, bounce.clone(), WriteFlags::UNCHANGED)
                .await?;
        }
        self.request().changed();
        Ok(bounce)
    }
}

fn overlap(one: (u64, u64), other: (u64, u64)) -> Option<(u64, u64)> {
    let (from, to) = (one.0.max(other.0), one.1.min(other.1));
    (from < to).then_some((from, to))
}
