//! Amendments: an image becomes one of another version, with counts of another width, or with other features.
//!
//! What is asked is checked against what the image is (`spec`); then, in this order:
//!
//! 1. Everything is in the image, durably, and its crash segment is given up: nothing outside of it says
//!    anything about it any more.
//! 2. What the other version cannot say is said otherwise: snapshots get the fields that version 3 wants, or
//!    entries that read as zeroes lose their flag (`expand`). Each of these is a fact with one write of the
//!    header's first sector, after which the image reads as before, in the version that it has.
//! 3. Counts of another width are written to free clusters (`counts`).
//! 4. The new header takes the old one's place (`head`): version, features, names, and where the new counts
//!    are, all at once.
//!
//! **What a power cut leaves.** Before 4, the image as it was, of the old version: what was written lay in
//! clusters that were free, or nobody reads. After it, the new one. No count is ever too low, and nothing is
//! leaked. A process that is killed leaves the same. After a failure before 4 the image in memory is as it is
//! in the file, too; where the header's write itself fails nobody knows which one there is, and nothing more is
//! done with the image.
//!
//! The image in memory is not changed: it is read anew, which the core asks for. A disk's new length is the
//! core's affair, too.
//!
//! Threads: control thread, in a drained section.

mod counts;
mod expand;
mod spec;

use blockcore::Error;
use blockcore::io::Io;
use blockcore::options::Options;

pub(super) use self::spec::AMEND_OPTIONS;
use self::spec::{Amendment, Present};
use super::head;
use super::image::Image;
use super::layout::snapshot::V3_EXTRA_BYTES;
use super::snapshot::draft::Draft;
use super::snapshot::{Failure, Next};

impl Image {
    /// See [`Driver::amend`](blockcore::driver::Driver::amend). Returns whether the image in the file is another
    /// than the one in memory, which is of no use any more then.
    pub(super) async fn amend(
        &self,
        io: Io<'_>,
        options: &Options,
        force: bool,
    ) -> Result<bool, Error> {
        self.check_whole()
            .map_err(|error| self.explain(io, "amend anything", error.into()))?;
        let amendment = self.amendment(options, force)?;
        let mut header = self.header().clone();
        amendment.apply(&mut header);
        if header == *self.header() {
            return Ok(false);
        }
        let amended = self.become_amended(io, &amendment).await.map(|()| true);
        amended.map_err(|failure| self.explain(io, "make these amendments", failure))
    }

    fn amendment(&self, options: &Options, force: bool) -> Result<Amendment, Error> {
        let header = self.header().clone();
        let present = Present {
            header: &header,
            snapshots: &self.snapshots().list,
            discard_no_unref: self.options().discard_no_unref,
        };
        Amendment::parse(options, &present, force)
    }

    async fn become_amended(&self, io: Io<'_>, amendment: &Amendment) -> Result<(), Failure> {
        let (version, refcount_order) = {
            let header = self.header();
            (header.version, header.refcount_order)
        };
        let has_other_width = amendment.refcount_order != refcount_order;
        if has_other_width {
            counts::check_width(self, io, amendment.refcount_order).await?;
        }
        self.become_still(io).await?;
        self.leave_segment(io).await?;
        if version < amendment.version {
            self.complete_snapshots(io).await?;
        }
        if version > amendment.version {
            expand::expand_zeroes(self, io).await?;
        }
        let old = self.header().clone();
        let mut new = old.clone();
        amendment.apply(&mut new);
        if has_other_width {
            let table = counts::widen(self, io, amendment.refcount_order).await?;
            new.refcount_table_offset = table.place.0;
            new.refcount_table_clusters = table.clusters as u32;
        }
        let steps = head::steps(io, &old, &new).await?;
        // All of it is there before the header names it.
        self.flush_file(io).await?;
        Ok(self.switch_header(io, &steps).await?)
    }

    /// Writes down of each snapshot how long its disk is, which version 3 wants.
    async fn complete_snapshots(&self, io: Io<'_>) -> Result<(), Failure> {
        let mut snapshots = self.snapshots().list.clone();
        let is_short = |extra_bytes: u32| extra_bytes < V3_EXTRA_BYTES;
        if !snapshots.iter().any(|known| is_short(known.extra_bytes)) {
            return Ok(());
        }
        for snapshot in &mut snapshots {
            snapshot.extra_bytes = snapshot.extra_bytes.max(V3_EXTRA_BYTES);
        }
        let (place, l1) = {
            let l1 = self.l1();
            (l1.place, l1.entries.clone())
        };
        let next = Next {
            l1,
            l1_place: Some(place),
            bytes: self.bytes(),
            snapshots,
            passes_discards: false,
        };
        self.become_next(io, Draft::new(self, io), next).await
    }
}
