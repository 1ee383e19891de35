//! [`Image`]: what all workers share of an open image.
//!
//! Most of what it does is beside it: finding where bytes live (`mapping`), host clusters (`alloc`,
//! `refcount`, `limbo`), writes and zeroes (`write`, `zero`), and what goes to the image's file in which
//! order (`committer`).
//!
//! **Who waits for whom.** The first request after bitmaps were stored says that they are out of date, under
//! a turn of its own and before it has any other (`bitmaps`). A request that changes what guest clusters map to has a turn for these clusters
//! (`turns`), then, to make or copy an L2 table, one for that table (`tables`), or, to find room for
//! compressed data, the one turn for that (`packing`), which who gives clusters back has, too; then, to find
//! free clusters, the one turn for that (`reserving`); loads of metadata have turns of their own (`loads`), last.
//! A committer's round takes none of these but loads. So waits form no circle. Locks are held over memory
//! operations only, and taken in this order: `l1`, then those inside of `cache`; every other alone.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use blockcore::IoError;
use blockcore::driver::WriteFlags;
use blockcore::io::Io;
use blockcore::io::buffer::Segments;
use blockcore::io::tracked::Tracker;

use super::alloc::Pools;
use super::bitmaps::Bitmaps;
use super::cache::SliceCache;
use super::compress::Tail;
use super::gate::Gate;
use super::layout::entry::L1Entry;
use super::layout::header::{Features, Header, field};
use super::layout::room::Step;
use super::layout::{Geometry, HostOffset};
use super::limbo::Limbo;
use super::overlap::Metadata;
use super::refcount::Refcounts;
use super::segment::{CrashSegment, Record};
use super::snapshot::Snapshots;
use crate::rounds::Rounds;

/// The child that holds the image.
pub(super) const FILE: usize = 0;
/// The child that holds the data where that is not the image.
pub(super) const DATA_FILE: usize = 1;
/// The child that is deferred to.
pub(super) const BACKING: usize = 2;

/// Spreads turns for things that are counted over the shards of a [`Tracker`].
pub(super) const TURN_BITS: u32 = 20;

/// See the module's header.
pub(super) struct Image {
    /// This, for work that goes on behind a request.
    pub(super) this: Weak<Image>,
    pub(super) geometry: Geometry,
    /// How long the disk is, and who may go how far into it.
    pub(super) gate: Gate,
    /// As it is in the image.
    pub(super) header: Mutex<Header>,
    pub(super) l1: Mutex<L1>,
    pub(super) snapshots: Mutex<Snapshots>,
    /// Persistent bitmaps, as the image keeps them.
    pub(super) bitmaps: Bitmaps,
    pub(super) cache: SliceCache,
    /// Binary logarithm of a slice's entries.
    pub(super) slice_bits: u32,
    /// Loads of slices, and, far away from these, of refcount blocks.
    pub(super) loads: Tracker,
    pub(super) refcounts: Refcounts,
    pub(super) pools: Mutex<Pools>,
    /// Where a search for free clusters begins.
    pub(super) first_free: AtomicU64,
    pub(super) reserving: Tracker,
    /// Where compressed clusters go next.
    pub(super) tail: Mutex<Option<Tail>>,
    pub(super) packing: Tracker,
    pub(super) metadata: Metadata,
    /// Where metadata that is not in the image yet outlives this process; `None`: nowhere.
    pub(super) segment: Option<Arc<CrashSegment>>,
    pub(super) limbo: Limbo,
    /// Releases of clusters that are under way.
    pub(super) releasing: AtomicU64,
    pub(super) turns: Tracker,
    pub(super) tables: Tracker,
    pub(super) rounds: Rounds,
    /// A round that nobody waits for is on its way.
    pub(super) committing: AtomicBool,
    /// See [`check_not_lost`](Self::check_not_lost).
    pub(super) lost: AtomicBool,
    /// What completes is to outlive this process. Where nothing else does, a request that changes what is
    /// mapped waits for a round before it completes.
    pub(super) must_outlive: bool,
    pub(super) options: Mutex<RunOptions>,
}

/// Options that a running image goes by.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunOptions {
    /// What a guest's discard frees is discarded below.
    pub(super) pass_discard_request: bool,
    /// What the deletion of a snapshot frees is, too.
    pub(super) pass_discard_snapshot: bool,
    /// And so is what else is freed.
    pub(super) pass_discard_other: bool,
    /// A discarded cluster keeps its place.
    pub(super) discard_no_unref: bool,
}

/// The L1 table, whole.
pub(super) struct L1 {
    pub(super) place: HostOffset,
    pub(super) entries: Vec<L1Entry>,
    pub(super) dirty: BTreeSet<usize>,
}

impl L1 {
    /// The entry at `index`; none past the end.
    pub(super) fn get(&self, index: usize) -> L1Entry {
        self.entries.get(index).copied().unwrap_or_default()
    }

    /// Changes an entry, which is dirty then. Gives where it is in the image.
    pub(super) fn set(&mut self, index: usize, entry: L1Entry) -> HostOffset {
        self.entries[index] = entry;
        self.dirty.insert(index);
        HostOffset(self.place.0 + 8 * index as u64)
    }
}

impl Image {
    /// The child that holds the data.
    pub(super) fn data_child(&self) -> usize {
        match self.geometry.data_file {
            true => DATA_FILE,
            false => FILE,
        }
    }

    /// Length of the disk, now.
    pub(super) fn bytes(&self) -> u64 {
        self.gate.bytes()
    }

    /// The disk has another length.
    pub(super) fn set_bytes(&self, bytes: u64) {
        self.gate.set_bytes(bytes, || self.allows_plain_writes());
    }

    /// Whether what maps a cluster is where it outlives this process, or does not have to be.
    pub(super) fn keeps_entries(&self) -> bool {
        let segment = self.segment.as_ref();
        !self.must_outlive || segment.is_some_and(|segment| segment.is_open())
    }

    /// Whether writes may go in place without another look: entries are kept, and no bitmap claims to be up
    /// to date that would not be afterwards.
    fn allows_plain_writes(&self) -> bool {
        self.keeps_entries() && self.bitmaps.are_in_use()
    }

    /// Lets writes go in place without another look, or not, as things are now.
    pub(super) fn allow_plain_writes(&self) {
        self.gate.allow_writes(|| self.allows_plain_writes());
    }

    pub(super) fn l1(&self) -> MutexGuard<'_, L1> {
        self.l1.lock().expect("no panic while looking")
    }

    pub(super) fn tail(&self) -> MutexGuard<'_, Option<Tail>> {
        self.tail.lock().expect("no panic while looking")
    }

    /// Whether somebody may read the external data file by itself.
    pub(super) fn raw_data_file(&self) -> bool {
        let header = self.header();
        self.geometry.data_file && header.features.autoclear & Features::RAW_DATA_FILE != 0
    }

    pub(super) fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().expect("no panic while looking")
    }

    /// Records a change, in the lock under which it is made. Returns false if nothing does.
    pub(super) fn record(&self, record: Record) -> bool {
        self.segment
            .as_ref()
            .is_some_and(|segment| segment.record(record))
    }

    pub(super) fn set_options(&self, options: RunOptions) {
        *self.options.lock().expect("no panic while looking") = options;
    }

    /// What it goes by now.
    pub(super) fn options(&self) -> RunOptions {
        *self.options.lock().expect("no panic while looking")
    }

    /// Entries that bytes are written in place by may be in this process's memory only, though what completes
    /// is to outlive it: the request waits for a round.
    pub(super) fn may_lose_entries(&self) -> bool {
        !self.keeps_entries() && self.cache.dirty_count() > 0
    }

    /// Fails once the image was found to be broken.
    pub(super) fn check_whole(&self) -> Result<(), IoError> {
        match self.gate.is_broken() {
            true => Err(IoError::Failed),
            false => Ok(()),
        }
    }

    /// Fails once a flush of the image's file was lost. What was written before it may never reach the disk, so
    /// nothing is built on it: neither when the file is opened again, below an image that stays open.
    pub(super) fn check_not_lost(&self) -> Result<(), IoError> {
        match self.lost.load(Ordering::Acquire) {
            true => Err(IoError::FlushLost),
            false => Ok(()),
        }
    }

    /// Remembers a flush that was lost.
    pub(super) fn noted(&self, flushed: Result<(), IoError>) -> Result<(), IoError> {
        if flushed == Err(IoError::FlushLost) {
            self.lost.store(true, Ordering::Release);
        }
        flushed
    }

    /// Makes what was written to the image's file durable.
    pub(super) async fn flush_file(&self, io: Io<'_>) -> Result<(), IoError> {
        self.check_not_lost()?;
        self.noted(io.child(FILE).flush().await)
    }

    /// The image contradicts itself: operators are told, and with `fatal` nothing more is done with it.
    /// Marked as corrupt if it can be.
    pub(super) async fn corrupt(
        &self,
        io: Io<'_>,
        message: String,
        (host, bytes): (HostOffset, u64),
        fatal: bool,
    ) -> IoError {
        let fatal = fatal && !io.modes().read_only;
        let was_broken = fatal && self.gate.break_off();
        if !was_broken {
            io.state()
                .report_corruption(message, Some(host.0), Some(bytes), fatal);
        }
        if fatal && !was_broken {
            self.mark_corrupt(io).await;
        }
        IoError::Failed
    }

    /// Changes the header so that it names something else, durably. What it names is durable.
    ///
    /// Where that fails nobody knows which header there is: what is changed from here on may be changed in
    /// vain, so nothing more is done with the image until it is opened again.
    pub(super) async fn switch_header(&self, io: Io<'_>, steps: &[Step]) -> Result<(), IoError> {
        let written = write_steps(io, steps).await;
        if let Err(error) = written {
            self.gate.break_off();
            tracing::error!(
                "the header of '{}' could not be written ({error}); nothing more is done with the image until \
                 it is opened again",
                io.name()
            );
        }
        written
    }

    async fn mark_corrupt(&self, io: Io<'_>) {
        let features = {
            let mut header = self.header();
            if header.version < 3 {
                return;
            }
            header.features.incompatible |= Features::CORRUPT;
            header.features.incompatible
        };
        let mark = (field::INCOMPATIBLE, features.to_be_bytes().to_vec());
        if let Err(error) = write_steps(io, &[mark]).await {
            tracing::error!("cannot mark image '{}' as corrupt: {error}", io.name());
        }
    }

    /// Does `work` behind the request that `io` is part of: drained sections wait for it.
    pub(super) fn behind<F>(
        &self,
        io: Io<'_>,
        work: impl FnOnce(Arc<Image>, blockcore::io::Fork) -> F,
    ) where
        F: Future<Output = ()> + 'static,
    {
        let Some(image) = self.this.upgrade() else {
            return;
        };
        io.context().spawn(work(image, io.fork()));
    }
}

/// Reads `bytes` of the image's file.
pub(super) async fn read_bytes(
    io: Io<'_>,
    host: HostOffset,
    bytes: u64,
) -> Result<Vec<u8>, IoError> {
    let into = Segments::allocate(bytes as usize, 4096);
    io.child(FILE).read(host.0, into.clone()).await?;
    Ok(into.to_vec())
}

/// Writes `bytes` to the image's file. Not durable before a flush.
pub(super) async fn write_bytes(io: Io<'_>, host: HostOffset, bytes: &[u8]) -> Result<(), IoError> {
    let from = Segments::allocate(bytes.len(), 4096);
    from.copy_from(bytes);
    io.child(FILE)
        .write(host.0, from, WriteFlags::empty())
        .await
}

/// Writes steps into the image, each durable before the next.
pub(super) async fn write_steps(io: Io<'_>, steps: &[Step]) -> Result<(), IoError> {
    for (offset, bytes) in steps {
        write_bytes(io, HostOffset(*offset), bytes).await?;
        io.child(FILE).flush().await?;
    }
    Ok(())
}
