//! [`Node`]: a node of the graph as the control thread has it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;
use std::sync::Arc;

use super::NodeId;
use crate::dirty_bitmap::BitmapSet;
use crate::driver::{BackingName, Driver, DriverIo, DriverType, Limits};
use crate::node::NodeState;
use crate::options::Options;

/// A vertex: a driver, what it was opened with and what is kept of it.
pub struct Node {
    pub(super) id: NodeId,
    pub(super) name: Arc<str>,
    pub(super) kind: &'static DriverType,
    /// As given, children left out, with the driver's and the common ones together.
    pub(super) options: Options,
    pub(super) driver: DriverCell,
    pub(super) io: Arc<dyn DriverIo>,
    pub(super) state: Arc<NodeState>,
    pub(super) limits: Limits,
    /// What describes it wholly, if a plain name does.
    pub(super) exact_name: Option<String>,
    /// What its header says of its backing image.
    pub(super) backing: Option<BackingName>,
    /// The file name of the backing node that was opened because the header said so: to see whether the
    /// one there is now is another.
    pub(super) backing_opened: Option<String>,
    /// As that, of the other children that its image names, by their index.
    pub(super) named_opened: BTreeMap<usize, String>,
    pub(super) bitmaps: BitmapSet,
}

impl Node {
    /// Which node it is, for ever.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Its name, unique in the graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its driver's description.
    pub fn driver_type(&self) -> &'static DriverType {
        self.kind
    }

    /// The word for its driver.
    pub fn driver_name(&self) -> &'static str {
        self.kind.name
    }

    /// Its length in bytes, now.
    pub fn bytes(&self) -> u64 {
        self.state.bytes()
    }

    /// Its limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What it was opened with, its children's options left out.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Its I/O half.
    pub fn io(&self) -> &Arc<dyn DriverIo> {
        &self.io
    }

    /// What all plans that reach it share of it.
    pub fn state(&self) -> &Arc<NodeState> {
        &self.state
    }

    /// The plain file name that describes it wholly, with default options; `None` if there is none.
    pub fn exact_name(&self) -> Option<&str> {
        self.exact_name.as_deref()
    }

    /// What its image's header says of a backing image.
    pub fn backing_in_header(&self) -> Option<&BackingName> {
        self.backing.as_ref()
    }

    /// Its dirty bitmaps.
    pub fn bitmaps(&self) -> &BitmapSet {
        &self.bitmaps
    }
}

/// A node's global-state half, which one operation has at a time: also across its awaits.
#[derive(Clone)]
pub(super) struct DriverCell(Rc<Cell<Option<Box<dyn Driver>>>>);

/// The driver while an operation has it.
pub(super) struct DriverTurn {
    cell: DriverCell,
    driver: Option<Box<dyn Driver>>,
}

impl DriverCell {
    pub(super) fn new(driver: Box<dyn Driver>) -> Self {
        Self(Rc::new(Cell::new(Some(driver))))
    }

    /// Takes the driver, unless an operation has it.
    pub(super) fn try_take(&self) -> Option<DriverTurn> {
        let driver = Some(self.0.take()?);
        Some(DriverTurn {
            cell: self.clone(),
            driver,
        })
    }

    /// Takes the driver until what is returned is dropped. Whoever changes the graph holds the ticket,
    /// so nobody else has it.
    pub(super) fn take(&self) -> DriverTurn {
        let driver = self.0.take();
        assert!(driver.is_some(), "one operation at a time has a driver");
        DriverTurn {
            cell: self.clone(),
            driver,
        }
    }
}

impl Deref for DriverTurn {
    type Target = dyn Driver;

    fn deref(&self) -> &Self::Target {
        &**self.driver.as_ref().expect("until dropped")
    }
}

impl DerefMut for DriverTurn {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut **self.driver.as_mut().expect("until dropped")
    }
}

impl Drop for DriverTurn {
    fn drop(&mut self) {
        self.cell.0.set(self.driver.take());
    }
}
