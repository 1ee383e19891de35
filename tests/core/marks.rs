//! Dirty bitmaps: every change between two looks must be marked.
//!
//! Two looks. [`Marks`] knows which writes have completed since a bitmap was cleared, and they must be
//! marked. A [`Mirror`] copies what is marked, as a job does, while writes go on; in a drained section its
//! copy, with what is marked then, must be the disk.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use blockcore::dirty_bitmap::Bits;
use blockcore::drain::Scope;
use blockcore::graph::{RootId, RootSpec};
use blockcore::io::buffer::Segments;

use crate::life::Life;
use crate::view::View;

/// Unit of mirrors, and of their reads.
const UNIT: u64 = 4096;

/// A bitmap of some node.
pub(crate) struct Marks {
    pub(crate) node: String,
    pub(crate) name: String,
    /// Ranges of the node that were written since it was cleared: offset and bytes.
    expected: Vec<(u64, u64)>,
}

/// A copy of a disk.
#[derive(Default)]
pub(crate) struct Mirror {
    root: Cell<Option<RootId>>,
    copy: RefCell<Vec<u8>>,
}

impl Mirror {
    /// Its use of the disk, if it has begun.
    pub(crate) fn root(&self) -> Option<RootId> {
        self.root.get()
    }

    /// The disk is `bytes` long now: what was past that is zero if it gets longer again.
    pub(crate) fn cut(&self, bytes: u64) {
        self.copy.borrow_mut().truncate(bytes as usize);
    }
}

impl Life {
    /// A write has completed: all bitmaps on its way must have it.
    pub(crate) fn expect_marks(&self, view: &View, at: u64, bytes: u64) {
        for marks in self.marks.borrow_mut().iter_mut() {
            let mut path = view.path.iter();
            if let Some((_, Some(base))) = path.find(|(node, _)| *node == marks.node) {
                marks.expected.push((at - base, bytes));
            }
        }
    }

    /// Forgets what was expected of a node whose offsets mean something else now.
    pub(crate) fn forget_marks(&self, node: &str) {
        for marks in self.marks.borrow_mut().iter_mut() {
            if marks.node == node {
                marks.expected.clear();
            }
        }
    }

    /// Forgets everything that was expected.
    pub(crate) fn forget_all_marks(&self) {
        for marks in self.marks.borrow_mut().iter_mut() {
            marks.expected.clear();
        }
    }

    fn bits(&self, node: &str, name: &str) -> Option<Arc<Bits>> {
        self.control.read(|graph| {
            let node = graph.node(node).ok()?;
            Some(Arc::clone(node.bitmaps().get(name).ok()?.bits()))
        })
    }

    /// Adds a bitmap, removes one, or looks at one.
    pub(crate) async fn work_on_marks(&self) -> Result<(), String> {
        let test = &self.test;
        let count = self.marks.borrow().len();
        if count == 0 || (count < 4 && test.chance(300)) {
            let disk = test.below(test.disks.len() as u64);
            let node = format!("{}{disk}", ["part", "file"][test.below(2) as usize]);
            let name = self.new_name();
            let granularity = [512, 4096][test.below(2) as usize];
            let added = self.control.change_bitmaps(&node, |bitmaps| {
                // Known before the first request that marks it.
                self.marks.borrow_mut().push(Marks {
                    node: node.clone(),
                    name: name.clone(),
                    expected: Vec::new(),
                });
                bitmaps.add(&name, granularity).map(|_| ())
            });
            return added.await.map_err(|error| error.report());
        }
        let chosen = test.below(count as u64) as usize;
        if test.chance(200) {
            let marks = self.marks.borrow_mut().remove(chosen);
            let removed = self
                .control
                .change_bitmaps(&marks.node, |bitmaps| bitmaps.remove(&marks.name));
            return removed.await.map(|_| ()).map_err(|error| error.report());
        }
        let mut all = self.marks.borrow_mut();
        let marks = &mut all[chosen];
        let bits = self.bits(&marks.node, &marks.name).expect("added before");
        let missing = |(offset, bytes): &&(u64, u64)| bits.next_clean(*offset, *bytes).is_some();
        if let Some((offset, bytes)) = marks.expected.iter().find(missing) {
            test.fail(format!(
                "a write of {bytes} bytes at {offset:#x} of node '{}' is not marked",
                marks.node
            ));
        }
        test.count(|totals| &mut totals.mark_looks);
        if test.chance(500) {
            bits.clear_all();
            marks.expected.clear();
        }
        Ok(())
    }

    /// Copies what is marked of a disk, with requests under way; begins a mirror that has not.
    pub(crate) async fn mirror(&self, disk: usize) -> Result<(), String> {
        let mirror = &self.mirrors[disk];
        let node = format!("file{disk}");
        if self.test.case.disks[disk].cluster.is_some() {
            // An image's file grows, and its node keeps it for itself.
            return Ok(());
        }
        let Some(id) = mirror.root.get() else {
            let spec = RootSpec {
                shares: blockcore::graph::permission::Permissions::all(),
                // A filter above the file may come to show another disk.
                stays: true,
                ..RootSpec::reader(format!("mirror of disk {disk}"))
            };
            let root = self
                .control
                .add_root(&node, spec.in_units_of(UNIT as u32))
                .await;
            let root = match root {
                Ok(root) => root,
                Err(error) => return self.check_error("a mirror's root", &error),
            };
            mirror.root.set(Some(root));
            self.update_views();
            let added = self.control.change_bitmaps(&node, |bitmaps| {
                bitmaps.add("mirror", UNIT)?;
                // What changes from here on is marked.
                let mut copy = self.test.contents(disk);
                copy.truncate(self.test.file_bytes(disk) as usize);
                mirror.copy.replace(copy);
                Ok(())
            });
            return added.await.map_err(|error| error.report());
        };
        if mirror.copy.borrow().is_empty() {
            return Ok(());
        }
        let bits = self.bits(&node, "mirror").expect("added before");
        let taken = bits.take();
        let root = self.control.root_here(id).map_err(|error| error.report())?;
        for area in taken.areas(0, taken.length(), 4 * UNIT).collect::<Vec<_>>() {
            let into = Segments::allocate(area.bytes as usize, 4096);
            let length = &self.test.disks[disk].length;
            let cuts = length.cuts();
            match root.read(area.offset, into.clone()).await {
                Ok(()) if !length.may_be_cut(cuts) => {
                    let (at, end) = (area.offset as usize, (area.offset + area.bytes) as usize);
                    let mut copy = mirror.copy.borrow_mut();
                    if copy.len() < end {
                        copy.resize(end, 0);
                    }
                    copy[at..end].copy_from_slice(&into.to_vec());
                }
                // It may have been made to fit since.
                _ => {
                    let bits = self.bits(&node, "mirror").expect("added before");
                    bits.set(area.offset, area.bytes);
                }
            }
        }
        Ok(())
    }

    /// Compares a mirror with its disk, with nothing under way.
    pub(crate) async fn compare_mirror(&self, disk: usize) {
        let mirror = &self.mirrors[disk];
        if mirror.copy.borrow().is_empty() {
            return;
        }
        if self.test.case.disks[disk].resizes {
            // The bitmap may have to be made to fit.
            self.control.take_notices();
            self.settle().await;
        }
        let node = format!("file{disk}");
        let id = self.control.read(|graph| graph.node(&node).map(|n| n.id()));
        let scope = Scope::Nodes(BTreeSet::from([id.expect("leaves stay")]));
        let _drained = self.control.drain(scope).await;
        let bits = self.bits(&node, "mirror").expect("added before");
        let mut contents = self.test.contents(disk);
        contents.truncate(self.test.file_bytes(disk) as usize);
        if bits.length() != contents.len() as u64 {
            // Once more.
            return;
        }
        let mut copy = mirror.copy.borrow_mut();
        copy.resize(contents.len(), 0);
        for area in bits.take().areas(0, bits.length(), u64::MAX) {
            let range = area.offset as usize..(area.offset + area.bytes) as usize;
            copy[range.clone()].copy_from_slice(&contents[range]);
        }
        if let Some(at) = (0..contents.len()).find(|at| copy[*at] != contents[*at]) {
            self.test
                .fail(format!("a change of {node} at {at:#x} was never marked"));
        }
        self.test.count(|totals| &mut totals.mirror_looks);
    }

    /// A disk whose mirror may be worked on: one that exists.
    pub(crate) fn any_disk(self: &Rc<Self>) -> usize {
        self.test.below(self.test.disks.len() as u64) as usize
    }
}
