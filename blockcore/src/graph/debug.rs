//! Suspending requests at events, for tests: by the first node below that can.

use super::{Control, NodeId};
use crate::driver::Driver;
use crate::{Error, ErrorKind};

impl Control {
    /// Suspends the next request that comes to `event` in `node`, or in the first node below it (by
    /// primary children) that suspends requests, under `tag`.
    ///
    /// Waits for nobody: whoever changes the graph may be waiting for what is suspended.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is no such node; [`ErrorKind::Invalid`] for an event that does not
    /// exist; [`ErrorKind::Unsupported`] if nobody there suspends requests.
    pub fn suspend_at(&self, node: &str, event: &str, tag: &str) -> Result<(), Error> {
        self.first_debugger(node, |driver| driver.suspend_at(event, tag))
    }

    /// Lets requests suspended under `tag` go on, and forgets the tag.
    ///
    /// # Errors
    ///
    /// As [`suspend_at`](Self::suspend_at); [`ErrorKind::NotFound`] if there is no such tag.
    pub fn resume(&self, node: &str, tag: &str) -> Result<(), Error> {
        self.first_debugger(node, |driver| driver.resume(tag))
    }

    /// Whether a request is suspended under `tag`, in `node` or below it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if there is no such node.
    pub fn is_suspended(&self, node: &str, tag: &str) -> Result<bool, Error> {
        let found = self.first_debugger(node, |driver| match driver.is_suspended(tag) {
            true => Ok(()),
            false => Err(Error::unsupported("nothing is suspended here")),
        });
        match found {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The answer of the first driver that does not call it unsupported.
    fn first_debugger(
        &self,
        node: &str,
        mut ask: impl FnMut(&mut dyn Driver) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut next: Option<NodeId> = Some(self.read(|graph| graph.node(node).map(|n| n.id()))?);
        while let Some(id) = next {
            let (driver, below) = self.read(|graph| {
                let driver = graph.node_by_id(id).map(|node| node.driver.clone());
                (driver, graph.primary_child(id))
            });
            // A driver that an operation has across a wait is not one of a debug node.
            if let Some(mut driver) = driver.as_ref().and_then(super::node::DriverCell::try_take) {
                match ask(&mut *driver) {
                    Err(error) if error.kind() == ErrorKind::Unsupported => {}
                    answer => return answer,
                }
            }
            next = below;
        }
        Err(Error::unsupported(format!(
            "neither node '{node}' nor a node below it suspends requests: it takes one of driver \
             'blkdebug'"
        )))
    }
}
