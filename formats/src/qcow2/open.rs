//! Opening an image: what it says of itself is checked, and its tables are read.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use blockcore::dirty_bitmap::KeptBitmap;
use blockcore::driver::{Fix, OpenModes, OpenRequest, Opened, SnapshotRef, WriteFlags};
use blockcore::io::buffer::Segments;
use blockcore::io::tracked::Tracker;
use blockcore::io::{RequestKind, Root};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind, IoError};

use super::OPTIONS;
use super::adopt;
use super::alloc::Pools;
use super::bitmaps::load::Loaded;
use super::bitmaps::{self, Bitmaps};
use super::cache::{SliceCache, WAYS};
use super::driver::Qcow2Driver;
use super::gate::Gate;
use super::image::{DATA_FILE, Image, L1, RunOptions};
use super::io::Qcow2Io;
use super::layout::bytes::words;
use super::layout::entry::L1Entry;
use super::layout::extension::BITMAPS;
use super::layout::header::{Features, Header, PREFIX_BYTES, Purpose, field};
use super::layout::room;
use super::layout::snapshot::{MAX_TABLE_BYTES, Snapshot};
use super::layout::{BLOCK_OFFSET, Geometry, HostOffset};
use super::limbo::Limbo;
use super::overlap::Metadata;
use super::refcount::Refcounts;
use super::snapshot::Snapshots;
use crate::rounds::Rounds;

/// Most memory for L2 tables unless options say otherwise, as QEMU has it.
const DEFAULT_L2_BYTES: u64 = 32 << 20;
/// Part of a table that is loaded at once, unless options say otherwise.
const DEFAULT_SLICE_BYTES: u64 = 4096;
/// Refcount blocks that are kept at least, as QEMU has it.
const LEAST_BLOCKS: u64 = 4;
/// L1 tables of snapshots, and tables of bitmaps, are read only so far: the time that opening takes is not
/// for an image to decide.
pub(super) const MAX_INACTIVE_BYTES: u64 = 1 << 30;

pub(super) async fn open(request: OpenRequest) -> Result<Opened, Error> {
    if request.modes.check {
        return super::check::driver::open(request).await;
    }
    let file = request.children[0].as_ref().expect("not optional");
    let source = Source {
        node: request.node_name.clone(),
        root: Rc::clone(&file.root),
        runtime_directory: request.runtime_directory.clone(),
    };
    let has_data_file = request.children[DATA_FILE].is_some();
    if has_data_file && !source.header(Purpose::Use).await?.geometry().data_file {
        return Err(Error::invalid(format!(
            "'data-file' can only be set for images with an external data file, and that of node '{}' has none",
            source.node
        )));
    }
    let (image, bitmaps) = open_image(&source, &request.options, request.modes).await?;
    Ok(Opened {
        driver: Box::new(Qcow2Driver::new(&image, bitmaps, source.runtime_directory)),
        io: Arc::new(Qcow2Io(image)),
    })
}

/// Where an image is opened from.
pub(super) struct Source {
    /// The node's name, for messages.
    pub(super) node: String,
    /// The child that holds the image.
    pub(super) root: Rc<Root>,
    /// Where what completes is kept until it is in the image; `None`: nothing has to outlive this process.
    pub(super) runtime_directory: Option<PathBuf>,
}

impl Source {
    pub(super) fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        let text = format!("the image of node '{}' is corrupt: {what}", self.node);
        Error::new(ErrorKind::Corrupt, text)
    }

    pub(super) fn failed(&self, what: &str, error: IoError) -> Error {
        let text = format!("cannot {what} the image of node '{}': {error}", self.node);
        Error::new(ErrorKind::Io, text)
    }

    /// Changes a part of the header, durably.
    pub(super) async fn write_header(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let from = Segments::allocate(bytes.len(), 512);
        from.copy_from(bytes);
        let written = self.root.write(offset, from, WriteFlags::STABLE).await;
        written.map_err(|error| self.failed("write the header of", error))
    }

    /// Reads a part of the file, which has it.
    pub(super) async fn read(&self, what: &str, offset: u64, bytes: u64) -> Result<Vec<u8>, Error> {
        let length = self.root.bytes();
        if offset > length || bytes > length - offset {
            return Err(self.corrupt(format!(
                "the {what} has {bytes} bytes at offset {offset:#x}, and the file only {length}"
            )));
        }
        let into = Segments::allocate(bytes as usize, 4096);
        let read = self.root.read(offset, into.clone()).await;
        read.map_err(|error| self.failed(&format!("read the {what} of"), error))?;
        Ok(into.to_vec())
    }

    /// Reads the header.
    pub(super) async fn header(&self, purpose: Purpose) -> Result<Header, Error> {
        let length = self.root.bytes();
        let head = self
            .read("header", 0, length.min(PREFIX_BYTES as u64))
            .await?;
        let named = |error: Error| {
            let text = format!("cannot open the image of node '{}': {error}", self.node);
            Error::new(error.kind(), text)
        };
        let bytes = Header::cluster_bytes_in(&head).map_err(named)?;
        let cluster = self.read("header", 0, length.min(bytes)).await?;
        Header::parse(&cluster, purpose).map_err(named)
    }
}

/// Reads an image and makes it usable as `modes` say. Also gives the bitmaps that it keeps.
pub(super) async fn open_image(
    source: &Source,
    options: &Options,
    modes: OpenModes,
) -> Result<(Arc<Image>, Vec<KeptBitmap>), Error> {
    let mut header = source.header(Purpose::Use).await?;
    let geometry = header.geometry();
    let writable = !modes.read_only && !modes.inactive;
    if writable {
        check_writable(source, &header)?;
        if header.features.incompatible & Features::DIRTY != 0 {
            repair(source).await?;
            header = source.header(Purpose::Use).await?;
        }
    }
    let snapshots = read_snapshots(source, &header).await?;
    let disk_bytes = header.bytes;
    show_snapshot(source, options, modes, &snapshots, &mut header)?;
    let l1_bytes = 8 * u64::from(header.l1_entries);
    let l1 = source.read("L1 table", header.l1_offset, l1_bytes).await?;
    let mut l1: Vec<_> = words(&l1).map(L1Entry).collect();
    let table = source
        .read(
            "refcount table",
            header.refcount_table_offset,
            header.refcount_table_bytes(),
        )
        .await?;
    let mut table: Vec<u64> = words(&table).collect();
    let mut segment = None;
    if writable {
        segment = adopt::adopt(source, &mut header, &snapshots, &mut l1, &mut table).await?;
    }
    let metadata = Metadata::new(geometry);
    let mut budget = Budget(MAX_INACTIVE_BYTES);
    if writable {
        let marked = mark_active(&metadata, &header, &l1, &table);
        marked.map_err(|what| source.corrupt(what))?;
        mark_snapshots(source, &metadata, &header, &snapshots, &mut budget).await?;
    }
    if header.extensions.has_stale_bitmaps {
        tracing::warn!(
            "the image of node '{}' was written to by a program that knows no bitmaps: its bitmaps mean \
             nothing any more, and their space is leaked until a repair ('stonework img check -r leaks')",
            source.node
        );
    }
    let mut loaded = Loaded::default();
    // A snapshot of another length than the disk has nothing to do with its bitmaps.
    if header.bytes == disk_bytes {
        let metadata = writable.then_some(&metadata);
        loaded = bitmaps::load::load(source, &header, metadata, &mut budget).await?;
    }
    if writable {
        clear_features(source, &mut header, segment.is_some()).await?;
        drop_stale_bitmaps(source, &mut header).await?;
    }
    let bitmaps = Bitmaps::new(loaded.list);
    let sizes = CacheSizes::new(options, geometry, header.bytes, &source.node)?;
    let run_options = run_options(options, modes, &header, &source.node)?;
    let place = HostOffset(header.refcount_table_offset);
    let must_outlive = writable && source.runtime_directory.is_some();
    let keeps = (!must_outlive || segment.is_some()) && bitmaps.are_in_use();
    let image = Arc::new_cyclic(|this| Image {
        this: this.clone(),
        geometry,
        gate: Gate::new(header.bytes, !geometry.extended, keeps),
        l1: Mutex::new(L1 {
            place: HostOffset(header.l1_offset),
            entries: l1,
            dirty: BTreeSet::new(),
        }),
        slice_bits: (sizes.slice_bytes / geometry.entry_bytes()).trailing_zeros(),
        snapshots: Mutex::new(snapshots),
        cache: SliceCache::new(sizes.slice_bytes as usize / 8, sizes.slices),
        loads: Tracker::default(),
        refcounts: Refcounts::new(
            geometry,
            place,
            table,
            sizes.blocks as usize,
            segment.clone(),
        ),
        pools: Mutex::new(Pools::default()),
        first_free: AtomicU64::new(0),
        reserving: Tracker::default(),
        tail: Mutex::new(None),
        packing: Tracker::default(),
        metadata,
        limbo: Limbo::default(),
        releasing: AtomicU64::new(0),
        turns: Tracker::default(),
        tables: Tracker::default(),
        rounds: Rounds::default(),
        committing: AtomicBool::new(false),
        lost: AtomicBool::new(false),
        segment,
        must_outlive,
        options: Mutex::new(run_options),
        header: Mutex::new(header),
        bitmaps,
    });
    Ok((image, loaded.kept))
}

/// Reads the table of snapshots.
async fn read_snapshots(source: &Source, header: &Header) -> Result<Snapshots, Error> {
    if header.snapshots == 0 {
        return Ok(Snapshots::default());
    }
    let rest = source.root.bytes().saturating_sub(header.snapshots_offset);
    let most = rest.min(MAX_TABLE_BYTES);
    let table = source
        .read("snapshot table", header.snapshots_offset, most)
        .await?;
    let (mut list, bytes) =
        Snapshot::parse_table(&table, header.snapshots).map_err(|error| source.corrupt(error))?;
    for snapshot in &mut list {
        // Who did not write it down cannot have changed it since.
        snapshot.disk_bytes.get_or_insert(header.bytes);
    }
    Ok(Snapshots {
        list,
        table_bytes: bytes as u64,
    })
}

/// Makes the header that of the snapshot which options name, if they do: its L1 table, and the disk's length
/// then.
fn show_snapshot(
    source: &Source,
    options: &Options,
    modes: OpenModes,
    snapshots: &Snapshots,
    header: &mut Header,
) -> Result<(), Error> {
    let given = |name: &str| options.get(name).filter(|text| !text.is_empty());
    let which = SnapshotRef {
        id: given("snapshot.id").map(str::to_owned),
        name: given("snapshot.name").map(str::to_owned),
    };
    if which == SnapshotRef::default() {
        return Ok(());
    }
    let node = &source.node;
    if !modes.read_only {
        return Err(Error::invalid(format!(
            "node '{node}' would show {which}, which nobody can write to: give it 'read-only=on'"
        )));
    }
    let Some(index) = which.find(&snapshots.infos()) else {
        let text = format!("the image of node '{node}' has no {which}");
        return Err(Error::new(ErrorKind::NotFound, text));
    };
    let (snapshot, geometry) = (&snapshots.list[index], header.geometry());
    snapshot
        .check_l1(geometry, source.root.bytes())
        .map_err(|error| source.corrupt(error))?;
    header.bytes = snapshot.disk_bytes.unwrap_or(header.bytes);
    header.l1_offset = snapshot.l1_offset;
    header.l1_entries = snapshot.l1_entries;
    let needed = geometry.l1_entries(header.bytes);
    if needed > u64::from(header.l1_entries) || header.bytes > i64::MAX as u64 {
        return Err(source.corrupt(format!(
            "{which} has an L1 table of {} entries for a disk of {} bytes, which needs {needed}",
            header.l1_entries, header.bytes
        )));
    }
    Ok(())
}

/// What options say of a running image.
pub(super) fn run_options(
    options: &Options,
    modes: OpenModes,
    header: &Header,
    node: &str,
) -> Result<RunOptions, Error> {
    let pass = |name: &str, default: bool| match options.get(name) {
        None | Some("") => default,
        Some(_) => options.bool(OPTIONS, name),
    };
    let run_options = RunOptions {
        pass_discard_request: pass("pass-discard-request", modes.unmap),
        pass_discard_snapshot: pass("pass-discard-snapshot", true),
        pass_discard_other: pass("pass-discard-other", false),
        discard_no_unref: pass("discard-no-unref", false),
    };
    let lazy = pass("lazy-refcounts", false);
    if lazy && header.version < 3 {
        return Err(Error::invalid(format!(
            "node '{node}' cannot have 'lazy-refcounts=on': its image has version 2, which has no way to say \
             that counts are written later"
        )));
    }
    check_overlap_options(options, node)?;
    if options.size(OPTIONS, "cache-clean-interval") > u64::from(u32::MAX) {
        return Err(Error::invalid(format!(
            "Cache clean interval too big: node '{node}' can have one of at most {} seconds",
            u32::MAX
        )));
    }
    if run_options.discard_no_unref && header.version < 3 {
        return Err(Error::invalid(format!(
            "node '{node}' cannot have 'discard-no-unref=on': its image has version 2, which has no way to \
             say that a cluster with a place reads as zeroes"
        )));
    }
    Ok(run_options)
}

/// Which metadata is looked for before other metadata is written is taken as QEMU takes it. Here all of it
/// always is: what may not be written over is known from opening on, and a look costs one load
/// ([`Metadata`]).
fn check_overlap_options(options: &Options, node: &str) -> Result<(), Error> {
    let given = |name: &str| options.get(name).filter(|text| !text.is_empty());
    match (given("overlap-check"), given("overlap-check.template")) {
        (Some(one), Some(other)) if one != other => Err(Error::invalid(format!(
            "node '{node}' has conflicting values for 'overlap-check' ('{one}') and 'overlap-check.template' \
             ('{other}')"
        ))),
        _ => Ok(()),
    }
}

fn check_writable(source: &Source, header: &Header) -> Result<(), Error> {
    if header.features.incompatible & Features::CORRUPT != 0 {
        return Err(source.corrupt(
            "it was marked so when its metadata was found to be wrong; open it read-only, or repair it \
             with 'stonework img check -r all'",
        ));
    }
    Ok(())
}

/// Counts references anew, in an image whose last writer was killed and had left counts for later.
async fn repair(source: &Source) -> Result<(), Error> {
    let request = source.root.enter(RequestKind::Other, 0, 0).await;
    let node = &source.node;
    tracing::info!(
        "image of node '{node}' was not closed in order: its reference counts are repaired"
    );
    let mut log = |what: &str| tracing::info!("image of node '{node}': {what}");
    let checked = super::check::check(request.io(), Fix::All, &mut log).await;
    let report = checked.map_err(|error| {
        let text =
            format!("cannot repair the image of node '{node}', which was not closed in order");
        Error::new(error.kind(), format!("{text}: {error}"))
    })?;
    if report.check_errors > 0 || report.corruptions > report.corruptions_fixed {
        return Err(source.corrupt("it was not closed in order, and not all of it can be repaired"));
    }
    Ok(())
}

/// What is not up to date any more when we write says so no longer. On disk before anything else is.
async fn clear_features(
    source: &Source,
    header: &mut Header,
    has_segment: bool,
) -> Result<(), Error> {
    let mut stale = header.unknown_autoclear();
    if header.extensions.bitmaps.is_none() {
        stale |= Features::BITMAPS;
    }
    if !has_segment {
        // What a segment has is about another image from here on.
        stale |= Features::SEGMENT;
    }
    if header.version < 3 || header.features.autoclear & stale == 0 {
        return Ok(());
    }
    if header.features.autoclear & stale & Features::SEGMENT != 0 {
        tracing::warn!(
            "image of node '{}' was not closed in order, and is written to without what was kept of it: writes \
             that had completed and were not flushed are given up",
            source.node
        );
    }
    header.features.autoclear &= !stale;
    let bytes = header.features.autoclear.to_be_bytes();
    source.write_header(field::AUTOCLEAR, &bytes).await
}

/// Takes what names bitmaps that are out of date out of the header.
async fn drop_stale_bitmaps(source: &Source, header: &mut Header) -> Result<(), Error> {
    if !header.extensions.has_stale_bitmaps || header.version < 3 {
        return Ok(());
    }
    let cluster_bytes = header.geometry().cluster_bytes();
    let length = cluster_bytes.min(source.root.bytes());
    let mut cluster = source.read("header", 0, length).await?;
    cluster.resize(cluster_bytes as usize, 0);
    while let Some((offset, bytes)) = room::remove(&cluster, BITMAPS) {
        cluster[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        source.write_header(offset, &bytes).await?;
    }
    header.extensions.has_stale_bitmaps = false;
    Ok(())
}

/// Marks a table's clusters, where they are where something can be.
fn mark(metadata: &Metadata, offset: u64, bytes: u64) {
    let end = HostOffset(offset.saturating_add(bytes));
    if bytes > 0 && metadata.reaches(HostOffset(offset)) && metadata.reaches(end) {
        metadata.add(HostOffset(offset), bytes);
    }
}

/// As [`mark`], for what must share its clusters with no other metadata: what there is says so otherwise.
pub(super) fn mark_own(
    metadata: &Metadata,
    what: &str,
    offset: u64,
    bytes: u64,
) -> Result<(), String> {
    let end = HostOffset(offset.saturating_add(bytes));
    let is_there = metadata.reaches(HostOffset(offset)) && metadata.reaches(end);
    if bytes > 0 && is_there && metadata.overlaps(HostOffset(offset), bytes) {
        return Err(format!(
            "the {what} at offset {offset:#x} lies where there is other metadata; repair it with \
             'stonework img check -r all'"
        ));
    }
    mark(metadata, offset, bytes);
    Ok(())
}

/// Marks what the image needs to be read and written. No two of these may share a cluster: a change of one
/// would be a change of the other.
pub(super) fn mark_active(
    metadata: &Metadata,
    header: &Header,
    l1: &[L1Entry],
    table: &[u64],
) -> Result<(), String> {
    let cluster = metadata.cluster_bytes();
    let own = |what: &str, offset: u64, bytes: u64| mark_own(metadata, what, offset, bytes);
    own("header", 0, cluster)?;
    own("L1 table", header.l1_offset, 8 * l1.len() as u64)?;
    own(
        "refcount table",
        header.refcount_table_offset,
        header.refcount_table_bytes(),
    )?;
    for block in table.iter().filter(|block| **block != 0) {
        own("refcount block", block & BLOCK_OFFSET, cluster)?;
    }
    for table in l1.iter().filter_map(|entry| entry.table()) {
        own("L2 table", table.0, cluster)?;
    }
    Ok(())
}

fn mark_tables(metadata: &Metadata, l1: &[L1Entry]) {
    for table in l1.iter().filter_map(|entry| entry.table()) {
        mark(metadata, table.0, metadata.cluster_bytes());
    }
}

/// How much of tables is read that only need to be kept safe.
pub(super) struct Budget(u64);

impl Budget {
    /// Takes something from it.
    pub(super) fn spend(&mut self, source: &Source, bytes: u64) -> Result<(), Error> {
        let left = self.0.checked_sub(bytes).ok_or_else(|| {
            Error::unsupported(format!(
                "the snapshots and bitmaps of node '{}' have tables of more than {MAX_INACTIVE_BYTES} bytes, \
                 too much to be kept safe from writes: open it read-only",
                source.node
            ))
        })?;
        self.0 = left;
        Ok(())
    }
}

/// Marks what belongs to snapshots and bitmaps.
pub(super) async fn mark_inactive(
    source: &Source,
    metadata: &Metadata,
    header: &Header,
    snapshots: &Snapshots,
) -> Result<(), Error> {
    let mut budget = Budget(MAX_INACTIVE_BYTES);
    mark_snapshots(source, metadata, header, snapshots, &mut budget).await?;
    bitmaps::load::load(source, header, Some(metadata), &mut budget).await?;
    Ok(())
}

/// Marks what belongs to snapshots.
async fn mark_snapshots(
    source: &Source,
    metadata: &Metadata,
    header: &Header,
    snapshots: &Snapshots,
    budget: &mut Budget,
) -> Result<(), Error> {
    mark(metadata, header.snapshots_offset, snapshots.table_bytes);
    for snapshot in &snapshots.list {
        let (place, bytes) = snapshot.l1_range();
        budget.spend(source, bytes)?;
        let l1 = source
            .read("L1 table of a snapshot", place.0, bytes)
            .await?;
        mark(metadata, place.0, bytes);
        mark_tables(metadata, &words(&l1).map(L1Entry).collect::<Vec<_>>());
    }
    Ok(())
}

/// How much of an image's metadata is kept in memory.
#[derive(Debug, PartialEq, Eq)]
struct CacheSizes {
    slice_bytes: u64,
    slices: u64,
    blocks: u64,
}

impl CacheSizes {
    /// As QEMU's options have it: what is left out follows from what is given.
    fn new(
        options: &Options,
        geometry: Geometry,
        disk_bytes: u64,
        node: &str,
    ) -> Result<Self, Error> {
        let given = |name: &str| match options.get(name) {
            None | Some("") => None,
            Some(_) => Some(options.size(OPTIONS, name)),
        };
        let (total, l2, blocks) = (
            given("cache-size"),
            given("l2-cache-size"),
            given("refcount-cache-size"),
        );
        let refuse = |why: &str| Err(Error::invalid(format!("node '{node}': {why}")));
        let cluster = geometry.cluster_bytes();
        let least_blocks = LEAST_BLOCKS * cluster;
        let needed = geometry.clusters(disk_bytes) * geometry.entry_bytes();
        let (l2, blocks) = match (total, l2, blocks) {
            (Some(_), Some(_), Some(_)) => {
                return refuse(
                    "'cache-size', 'l2-cache-size' and 'refcount-cache-size' may not be set at the same time",
                );
            }
            (Some(total), Some(l2), None) if l2 <= total => (l2, total - l2),
            (Some(total), None, Some(blocks)) if blocks <= total => (total - blocks, blocks),
            (Some(_), Some(_), None) => {
                return refuse("'l2-cache-size' may not exceed 'cache-size'");
            }
            (Some(_), None, Some(_)) => {
                return refuse("'refcount-cache-size' may not exceed 'cache-size'");
            }
            (Some(total), None, None) => {
                let l2 = needed.min(total.saturating_sub(least_blocks));
                (l2, total - l2)
            }
            (None, l2, blocks) => (
                l2.unwrap_or(needed.min(DEFAULT_L2_BYTES)),
                blocks.unwrap_or(least_blocks),
            ),
        };
        let slice_bytes = given("l2-cache-entry-size").unwrap_or(DEFAULT_SLICE_BYTES.min(cluster));
        if !slice_bytes.is_power_of_two() || !(512..=cluster).contains(&slice_bytes) {
            return refuse(
                "'l2-cache-entry-size' must be a power of two from 512 to the cluster size",
            );
        }
        let disk_slices = needed.div_ceil(slice_bytes);
        // Where there is room for all of the disk's, no more than these are ever kept, however many slots
        // there are; with fewer slots than slices some would be evicted for others.
        let slices = match l2 / slice_bytes {
            room if room >= disk_slices => disk_slices.next_power_of_two(),
            room => room,
        };
        Ok(Self {
            slice_bytes,
            slices: slices.max(WAYS as u64),
            blocks: (blocks / cluster).max(LEAST_BLOCKS),
        })
    }
}
