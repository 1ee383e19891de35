//! Disks that get longer and shorter: by the operator, and by users who have the right.

use std::cell::Cell;
use std::rc::Rc;

use blockcore::driver::{Preallocation, TruncateFlags};
use blockcore::engine::FileType;
use blockcore::{ErrorKind, IoError};
use harness::history::{Outcome, Write};

use crate::Test;
use crate::case::DiskCase;
use crate::guest::Asking;
use crate::life::Life;
use crate::view::View;

/// In units of what a disk changes its length.
const UNIT: u64 = 4096;

/// How long a disk is, across all lives.
pub(crate) struct Length {
    bytes: Cell<u64>,
    /// How long it may become.
    pub(crate) most: u64,
    /// How often somebody began or ended to make it shorter: whoever saw another number may have meant
    /// something that is not there any more.
    cuts: Cell<u32>,
    /// How many change it just now.
    changing: Cell<u32>,
    /// A flush has made it durable.
    flushed: Cell<bool>,
    /// How often a change of it has begun.
    begun: Cell<u32>,
    /// Syncs of the file that had failed when the last one began: one that fails later may lose it.
    lost_syncs: Cell<u64>,
}

/// A change of a disk's length under way.
pub(crate) struct Changing {
    disk: usize,
    bytes: u64,
    /// The number of the change.
    number: u32,
    /// [`Length::lost_syncs`] as they were before.
    lost_before: u64,
    cut: Write,
}

/// How a change of a disk's length ended.
enum Changed {
    Done,
    Failed,
    /// Nothing has happened.
    Refused,
}

impl Length {
    pub(crate) fn new(case: &DiskCase) -> Self {
        Self {
            bytes: Cell::new(case.bytes),
            most: case.most_bytes(),
            cuts: Cell::new(0),
            changing: Cell::new(0),
            flushed: Cell::new(true),
            begun: Cell::new(0),
            lost_syncs: Cell::new(0),
        }
    }

    /// How long the disk is, as far as that is known.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// What somebody remembers who goes by the length of now.
    pub(crate) fn cuts(&self) -> u32 {
        self.cuts.get()
    }

    /// Whether something of it may have gone since somebody saw `cuts`.
    pub(crate) fn may_be_cut(&self, cuts: u32) -> bool {
        self.changing.get() > 0 || self.cuts.get() != cuts
    }

    /// Names the state of now, for [`flushed`](Self::flushed); `None` while it changes.
    pub(crate) fn state(&self) -> Option<u32> {
        (self.changing.get() == 0).then(|| self.begun.get())
    }

    /// A flush has succeeded that began when this was the state, and so many syncs have failed by now.
    pub(crate) fn flushed(&self, state: Option<u32>, lost_syncs: u64) {
        let is_sure = lost_syncs == self.lost_syncs.get();
        if is_sure && state.is_some() && state == self.state() {
            self.flushed.set(true);
        }
    }

    /// A process begins, and the file is so long.
    pub(crate) fn found(&self, bytes: u64, after_power_cut: bool) -> Result<(), String> {
        let sure = self.flushed.get() || !after_power_cut;
        let known = sure && self.changing.get() == 0;
        if known && bytes != self.bytes.get() {
            return Err(format!(
                "a disk had {} bytes, for sure, and has {bytes}",
                self.bytes.get()
            ));
        }
        self.bytes.set(bytes);
        self.changing.set(0);
        if after_power_cut {
            self.flushed.set(true);
        }
        Ok(())
    }
}

impl Test {
    /// A disk's length is about to be changed: what will be past the end may be gone from now on.
    fn begin_length(&self, disk: usize, bytes: u64) -> Changing {
        let length = &self.disks[disk].length;
        length.cuts.set(length.cuts.get() + 1);
        length.changing.set(length.changing.get() + 1);
        length.begun.set(length.begun.get() + 1);
        length.flushed.set(false);
        let lost_syncs = self.simulation.lost_syncs(&self.disks[disk].path);
        let lost_before = length.lost_syncs.replace(lost_syncs);
        let cut = self
            .history(disk)
            .begin_write(0, bytes, length.most - bytes);
        Changing {
            disk,
            bytes,
            number: length.begun.get(),
            lost_before,
            cut,
        }
    }

    fn end_length(&self, change: Changing, changed: &Changed) {
        let length = &self.disks[change.disk].length;
        let mut history = self.history(change.disk);
        match changed {
            Changed::Done => history.end_write(change.cut, Outcome::Done),
            Changed::Failed => history.end_write(change.cut, Outcome::Failed),
            Changed::Refused => history.refuse_write(change.cut),
        }
        drop(history);
        if !matches!(changed, Changed::Done) {
            // The length is as before, and as little sure.
            length.lost_syncs.set(change.lost_before);
        }
        length.cuts.set(length.cuts.get() + 1);
        // Of two at once either may be the last.
        let alone = length.changing.get() == 1 && length.begun.get() == change.number;
        length.changing.set(length.changing.get() - 1);
        let is = self.file_bytes(change.disk);
        if is != change.bytes && alone && matches!(changed, Changed::Done) {
            self.fail(format!(
                "a disk was made {} bytes long and has {is}",
                change.bytes
            ));
        }
        length.bytes.set(is);
    }
}

impl Life {
    /// A length for what a node shows of its disk, with the disk's; `None` if that is fixed.
    fn any_length(&self, view: &View) -> Option<(u64, u64)> {
        let test = &self.test;
        if view.image || !test.case.disks[view.disk].resizes {
            return None;
        }
        let units = test.disks[view.disk].length.most / UNIT;
        let disk_bytes = (1 + test.below(units)) * UNIT;
        let bytes = disk_bytes
            .checked_sub(view.base)
            .filter(|bytes| *bytes > 0)?;
        Some((bytes, disk_bytes))
    }

    fn any_preallocation(&self) -> Preallocation {
        let (_, preallocation) = Preallocation::NAMES[self.test.below(4) as usize];
        match self.test.chance(500) {
            true => Preallocation::Off,
            false => preallocation,
        }
    }

    /// What follows for those who look at the whole disk.
    fn length_changed(&self, disk: usize) {
        let bytes = self.test.disks[disk].length.bytes();
        self.forget_all_marks();
        self.mirrors[disk].cut(bytes);
        self.update_views();
    }

    /// The operator gives a node another length.
    pub(crate) async fn resize(self: &Rc<Self>) -> Result<(), String> {
        let test = &self.test;
        let disk = self.any_disk();
        let node = self.any_node(disk, false);
        let view = self.control.read(|graph| {
            let id = graph.node(&node).expect("just seen").id();
            View::of(graph, &test.case, id)
        });
        let Some((bytes, disk_bytes)) = self.any_length(&view) else {
            return Ok(());
        };
        let preallocation = self.any_preallocation();
        let change = test.begin_length(view.disk, disk_bytes);
        let resized = self.control.resize(&node, bytes, preallocation).await;
        let kind = resized.as_ref().err().map(blockcore::Error::kind);
        let changed = match kind {
            None => Changed::Done,
            // Somebody needs the length to stay; it is fixed; or it gets shorter, and is to be prepared.
            Some(ErrorKind::Busy | ErrorKind::Unsupported | ErrorKind::Invalid) => Changed::Refused,
            Some(_) => Changed::Failed,
        };
        test.end_length(change, &changed);
        self.length_changed(view.disk);
        // Bitmaps are made to fit.
        self.settle().await;
        match changed {
            Changed::Done => test.count(|totals| &mut totals.resizes),
            Changed::Refused => test.count(|totals| &mut totals.refused),
            Changed::Failed => {}
        }
        match resized {
            Err(error) if matches!(changed, Changed::Failed) => {
                self.check_error("a resize", &error)
            }
            _ => Ok(()),
        }
    }
}

impl Asking {
    /// A user gives its node another length.
    pub(crate) async fn truncate(self) {
        let test = Rc::clone(&self.life.test);
        let chosen = self.life.any_length(&self.view);
        let Some((bytes, disk_bytes)) = chosen.filter(|_| self.user.resizes) else {
            return self.read().await;
        };
        let (exact, preallocation) = (test.chance(700), self.life.any_preallocation());
        let change = test.begin_length(self.view.disk, disk_bytes);
        let flags = TruncateFlags::ZERO;
        let result = self
            .request
            .truncate(bytes, exact, preallocation, flags)
            .await;
        let changed = match result {
            Ok(()) => Changed::Done,
            Err(IoError::Unsupported | IoError::OutOfRange) => Changed::Refused,
            Err(_) => Changed::Failed,
        };
        test.end_length(change, &changed);
        self.life.length_changed(self.view.disk);
        match changed {
            Changed::Done => test.count(|totals| &mut totals.truncates),
            Changed::Refused => test.count(|totals| &mut totals.refused),
            Changed::Failed => self.check("a truncate", result),
        }
    }
}

impl Asking {
    /// A write has succeeded that ends at `end` of the disk. Who may change the length may have made it longer
    /// again, and nobody else.
    pub(crate) fn wrote_to(&self, end: u64) {
        let (test, disk) = (&self.life.test, self.view.disk);
        let length = &test.disks[disk].length;
        if !test.case.disks[disk].resizes || end <= length.bytes() || length.changing.get() > 0 {
            return;
        }
        if !self.user.resizes {
            let bytes = length.bytes();
            return test.fail(format!(
                "a write up to {end:#x} of a disk of {bytes:#x} bytes succeeds, by somebody who may not make \
                 it longer: {:?}",
                self.view
            ));
        }
        length.bytes.set(test.file_bytes(disk));
        length.flushed.set(false);
        length.begun.set(length.begun.get() + 1);
        self.life.length_changed(disk);
    }
}

impl DiskCase {
    /// How long the disk may become.
    pub(crate) fn most_bytes(&self) -> u64 {
        match self.resizes {
            true => 2 * self.bytes,
            false => self.bytes,
        }
    }

    /// Only files change their length.
    pub(crate) fn can_resize(&self) -> bool {
        self.cluster.is_none() && self.properties.file_type == FileType::Regular
    }
}
