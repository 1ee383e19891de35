//! Handing images to another process and taking them back: active and inactive nodes, as a migration's
//! hand-over needs them; changing a node's length; and emptying one.
//!
//! An inactive node is not written to, and what it knows of its image may be out of date. Going inactive,
//! parents write back before their children; coming back, children are read before their parents.

use std::collections::BTreeSet;

use super::permission::Permissions;
use super::{Change, Control, NodeId, Operation, RootSpec};
use crate::drain::Scope;
use crate::driver::{DriverKind, Preallocation, TruncateFlags};
use crate::io::RequestKind;
use crate::{Error, ErrorKind, IoError, dirty_bitmap};

impl Control {
    /// Hands the images of a node and of all below it to another process, or takes them back.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::PermissionDenied`] if somebody here needs to write to one that is to be inactive;
    /// [`ErrorKind::Busy`] if another process still has one that is to be active; else what could not be
    /// written back or read. Everything is as it was.
    pub async fn set_active(&self, node: &str, active: bool) -> Result<(), Error> {
        let mut change = self.begin().await;
        let id = change.find(node)?;
        let changed = match active {
            true => change.activate(id).await,
            false => change.inactivate(id).await,
        };
        if let Err(error) = changed {
            change.abort().await;
            return Err(error);
        }
        change.prepare().await?.commit().finish().await
    }

    /// Makes a node `bytes` long. What is added reads as zeroes. Requests are held back meanwhile; users
    /// of the node are told.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if somebody needs the length to stay, naming who;
    /// [`ErrorKind::PermissionDenied`] for a read-only node; [`ErrorKind::Unsupported`] if the driver
    /// cannot; [`ErrorKind::NoSpace`].
    pub async fn resize(
        &self,
        node: &str,
        bytes: u64,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        let mut change = self.begin().await;
        let resized = change.resize(node, bytes, preallocation).await;
        // The claim goes with it, and that cannot fail; the length is what it is.
        change.abort().await;
        resized
    }

    /// Drops everything that a node's own layer holds, so that all comes from its backing node again.
    /// Requests are held back meanwhile. Whoever asks has flushed what holds the data now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; else as [`Driver::make_empty`](crate::driver::Driver::make_empty).
    pub async fn make_empty(&self, node: &str) -> Result<(), Error> {
        let mut change = self.begin().await;
        let id = change.find(node)?;
        change.drain(Scope::Nodes(BTreeSet::from([id]))).await;
        let root = change.temporary_root(id, Permissions::all());
        let driver = change.driver_of(id);
        let emptied = driver.take().make_empty(root).await;
        let finished = change.prepare().await?.commit().finish().await;
        emptied.and(finished)
    }
}

impl Change {
    /// Changes a node's length. Everybody who could write to it is held back, also those who come to what is
    /// below by another way.
    async fn resize(
        &mut self,
        node: &str,
        bytes: u64,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        let (control, id) = (self.control().clone(), self.find(node)?);
        control.read(|graph| {
            graph.check_operation(id, Operation::Resize)?;
            let mut bitmaps = graph.nodes[&id].bitmaps.iter();
            bitmaps.try_for_each(|bitmap| bitmap.check(dirty_bitmap::Operation::Resize))
        })?;
        let claim = RootSpec {
            needs: Permissions::RESIZE,
            shares: Permissions::all(),
            ..RootSpec::reader("a resize")
        };
        self.add_root(id, claim)?;
        self.prepare_permissions().await?;
        self.drain(Scope::Subtrees(BTreeSet::from([id]))).await;
        // A user may have changed the length, and written, and not be heard of yet.
        control.fit_drained_bitmaps(id, true);
        let root = self.temporary_root(id, Permissions::all());
        let request = root.enter(RequestKind::Truncate, bytes, 0).await;
        let flags = TruncateFlags::ZERO;
        let mut truncated = request.truncate(bytes, true, preallocation, flags).await;
        if truncated.is_ok() && !self.state().replaced.is_empty() {
            // Halves that go with the change would take the news of a failed write with them.
            truncated = request.flush().await;
        }
        drop(request);
        control.fit_drained_bitmaps(id, false);
        truncated.map_err(|error| {
            let kind = match error {
                IoError::Unsupported => ErrorKind::Unsupported,
                IoError::NoSpace => ErrorKind::NoSpace,
                IoError::ReadOnly => ErrorKind::PermissionDenied,
                IoError::OutOfRange => ErrorKind::Invalid,
                _ => ErrorKind::Io,
            };
            Error::new(
                kind,
                format!("cannot make node '{node}' {bytes} bytes long: {error}"),
            )
        })
    }

    /// As [`Control::set_active`] with `false`, as a part of this change. The nodes stay drained until it
    /// is over.
    ///
    /// # Errors
    ///
    /// As there. The change is to be given up then, which takes back what was handed over.
    pub async fn inactivate(&mut self, node: NodeId) -> Result<(), Error> {
        let nodes = self.in_order(node);
        self.drain(Scope::Subtrees(BTreeSet::from([node]))).await;
        for id in nodes {
            let modes = self.state().shape.vertex(id).modes;
            if modes.inactive {
                continue;
            }
            let root = self.temporary_root(id, Permissions::all());
            if !modes.read_only {
                let name = self.state().shape.vertex(id).name.clone();
                let request = root.enter(RequestKind::Flush, 0, 0).await;
                request.flush().await.map_err(|error| {
                    Error::new(
                        ErrorKind::Io,
                        format!("cannot flush node '{name}' before it is inactive: {error}"),
                    )
                })?;
            }
            if !modes.read_only {
                self.store_bitmaps(id, &root).await?;
            }
            let driver = self.driver_of(id);
            driver.take().inactivate(root).await?;
            let state = self.state_mut();
            state.inactivated.push(id);
            state.shape.vertex_mut(id).modes.inactive = true;
        }
        Ok(())
    }

    /// As [`Control::set_active`] with `true`, as a part of this change.
    ///
    /// # Errors
    ///
    /// As there. The change is to be given up then.
    pub async fn activate(&mut self, node: NodeId) -> Result<(), Error> {
        let nodes = self.in_order(node);
        self.drain(Scope::Subtrees(BTreeSet::from([node]))).await;
        for id in nodes.into_iter().rev() {
            if !self.state().shape.vertex(id).modes.inactive {
                continue;
            }
            self.state_mut().shape.vertex_mut(id).modes.inactive = false;
            // Others are kept out before the driver looks at what they have left.
            self.prepare_permissions().await?;
            for below in self.in_order(id) {
                self.look_again(below).await?;
            }
            let root = self.temporary_root(id, Permissions::all());
            let driver = self.driver_of(id);
            let io = driver.take().activate(root).await?;
            if let Some(io) = io {
                self.state_mut().replaced.insert(id, io);
            }
            // Another process may have written to it.
            if self.state().shape.vertex(id).kind.kind == DriverKind::Format {
                self.reread(id, None).await?;
            }
        }
        Ok(())
    }

    /// A node and those below it, parents before children.
    fn in_order(&self, node: NodeId) -> Vec<NodeId> {
        let shape = &self.state().shape;
        let below = shape.below([node]);
        let mut order = shape.topmost_first();
        order.retain(|id| below.contains(id));
        order
    }
}
