//! Changing a node's length.
//!
//! What is cut off must not come back: a write past the new end that was let in before would make the host's
//! file longer again, or land in what the host has given to somebody else by then. So a node gets shorter only
//! when nobody is writing to it, which is sure in one of two ways. Either the request has no user, as those of
//! a change of the graph, which has drained the node; or everybody's requests register there, and the change of
//! length waits for theirs and theirs for it. Where a root may change the length they do register
//! ([`Permissions::RESIZE`]). Elsewhere the node stays as long as it is.

use super::{Io, MAX_BYTES};
use crate::IoError;
use crate::driver::{Preallocation, TruncateFlags};
use crate::graph::RootId;
use crate::graph::permission::Permissions;
use crate::node::Notice;

impl Io<'_> {
    /// Makes the node `bytes` long; with `exact` that long, else at least that. What is added reads as
    /// zeroes if `flags` say so, and also where a longer backing node would shine through.
    ///
    /// # Errors
    ///
    /// [`IoError::ReadOnly`] for a read-only node or one that the caller may not resize;
    /// [`IoError::Unsupported`] if the driver cannot, or not so, or if the node would get shorter under
    /// requests that nobody knows of (see the module's header); [`IoError::OutOfRange`] past the longest
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
        // Preallocation must not overwrite what a request writes to the new part meanwhile, nor a request
        // write to what is cut off.
        let (turn, before) = loop {
            let before = self.bytes();
            let begin = before.min(bytes);
            let turn = match before == bytes {
                true => None,
                false => self.track(begin, MAX_BYTES - begin, true).await,
            };
            // Another change of the length may have come first.
            if turn.is_none() || self.bytes() == before {
                break (turn, before);
            }
        };
        if bytes <= before && preallocation != Preallocation::Off {
            return Err(IoError::OutOfRange);
        }
        let without_user = self.request().root().id() == RootId::default();
        if bytes < before && turn.is_none() && !without_user {
            return Err(IoError::Unsupported);
        }
        if bytes > before
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
