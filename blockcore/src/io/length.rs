//! Changing a node's length.

use super::{Io, MAX_BYTES};
use crate::IoError;
use crate::driver::{Preallocation, TruncateFlags};
use crate::graph::permission::Permissions;
use crate::node::Notice;

impl Io<'_> {
    /// Makes the node `bytes` long; with `exact` that long, else at least that. What is added reads as
    /// zeroes if `flags` say so, and also where a longer backing node would shine through.
    ///
    /// # Errors
    ///
    /// [`IoError::ReadOnly`] for a read-only node or one that the caller may not resize;
    /// [`IoError::Unsupported`] if the driver cannot, or not so; [`IoError::OutOfRange`] past the longest
    /// possible node, or for preallocation of a node that shrinks.
    pub async fn truncate(
        self,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        mut flags: TruncateFlags,
    ) -> Result<(), IoError> {
        let node = self.node();
        if self.modes().read_only || !node.granted.contains(Permissions::RESIZE) {
            return Err(IoError::ReadOnly);
        }
        if bytes > MAX_BYTES {
            return Err(IoError::OutOfRange);
        }
        let before = self.bytes();
        let added = bytes.saturating_sub(before);
        if added == 0 && preallocation != Preallocation::Off {
            return Err(IoError::OutOfRange);
        }
        // Preallocation must not overwrite what a request writes to the new part meanwhile.
        let _turn = match added {
            0 => None,
            added => self.track(before, added, true).await,
        };
        if added > 0
            && let Some(backing) = self.backing()
            && backing.bytes() > before
        {
            flags |= TruncateFlags::ZERO;
        }
        let truncated = node
            .io
            .truncate(self, bytes, exact, preallocation, flags)
            .await;
        self.invalidate_status(before.min(bytes), u64::MAX / 2);
        self.request().changed();
        // A failed attempt may have changed the length, too.
        self.update_bytes();
        truncated
    }

    /// Asks the driver for the length, and tells the control thread if it is another one.
    pub(crate) fn update_bytes(self) {
        let node = self.node();
        let children: Vec<_> = (0..node.children.len())
            .map(|index| match self.has_child(index) {
                true => self.child(index).bytes(),
                false => 0,
            })
            .collect();
        if node.state.set_bytes(node.io.bytes(&children)) {
            node.state.notify(Notice::Resized {
                node: node.state.id(),
            });
        }
    }

    /// Asks the host for the length again, where it may have changed under us, from the leaves up.
    ///
    /// # Errors
    ///
    /// What the host answered; the length is then as before.
    pub async fn refresh_bytes(self) -> Result<(), IoError> {
        for index in 0..self.node().children.len() {
            if self.has_child(index) {
                // Boxed: the recursion has no bound that the compiler could see.
                Box::pin(self.child(index).refresh_bytes()).await?;
            }
        }
        self.node().io.refresh_bytes(self).await?;
        self.update_bytes();
        Ok(())
    }

    /// Host space that the node occupies, in bytes; `None` if nobody knows.
    ///
    /// # Errors
    ///
    /// What the host answered.
    pub async fn allocated_bytes(self) -> Result<Option<u64>, IoError> {
        self.node().io.allocated_bytes(self).await
    }

    pub(crate) async fn children_allocated_bytes(self) -> Result<Option<u64>, IoError> {
        use crate::driver::Role;
        let holds = Role::DATA | Role::METADATA | Role::FILTERED;
        let mut sum = None;
        for child in self.node().children.iter().flatten() {
            if !child.role.intersects(holds) {
                continue;
            }
            match Box::pin(self.at(child.index).allocated_bytes()).await? {
                Some(bytes) => sum = Some(sum.unwrap_or(0) + bytes),
                None => return Ok(None),
            }
        }
        Ok(sum)
    }
}
