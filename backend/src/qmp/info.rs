//! What is told of nodes and images: `BlockDeviceInfo`, `ImageInfo` and the like.

use blockcore::driver::{DetectZeroes, Role};
use blockcore::graph::{Control, Graph, NodeId};
use serde_json::{Map, Value};

use crate::img;
use crate::qapi_struct;

qapi_struct! {
    /// A node.
    pub struct BlockDeviceInfo {
        /// What it is called in full.
        file: String = "file",
        /// Its name.
        node_name: Option<String> = "node-name",
        /// Whether it refuses writes.
        ro: bool = "ro",
        /// Its driver.
        drv: String = "drv",
        /// Its image's backing image.
        backing_file: Option<String> = "backing_file",
        /// How many are in its image's part below.
        backing_file_depth: i64 = "backing_file_depth",
        /// Whether it is ours, and not another process's.
        active: bool = "active",
        /// Whether its image is encrypted.
        encrypted: bool = "encrypted",
        /// What becomes of zeroes that are written.
        detect_zeroes: DetectZeroesWord = "detect_zeroes",
        /// No limit; limits are throttle nodes'.
        bps: i64 = "bps",
        /// No limit.
        bps_rd: i64 = "bps_rd",
        /// No limit.
        bps_wr: i64 = "bps_wr",
        /// No limit.
        iops: i64 = "iops",
        /// No limit.
        iops_rd: i64 = "iops_rd",
        /// No limit.
        iops_wr: i64 = "iops_wr",
        /// Its image.
        image: ImageInfo = "image",
        /// How it is cached.
        cache: CacheInfo = "cache",
        /// The offset beyond which a write is told of; 0 for none.
        write_threshold: u64 = "write_threshold",
        /// Its dirty bitmaps.
        dirty_bitmaps: Option<Vec<BitmapInfo>> = "dirty-bitmaps",
    }
}

crate::qapi_enum! {
    /// What becomes of zeroes that are written.
    pub enum DetectZeroesWord {
        /// They are written.
        Off = "off",
        /// They become a zeroed range.
        On = "on",
        /// And their space is given back.
        Unmap = "unmap",
    }
}

qapi_struct! {
    /// How a node is cached.
    pub struct CacheInfo {
        /// Whether writes complete before they are stable.
        writeback: bool = "writeback",
        /// Whether the host's page cache is passed by.
        direct: bool = "direct",
        /// Whether flushes are ignored.
        no_flush: bool = "no-flush",
    }
}

qapi_struct! {
    /// A dirty bitmap.
    pub struct BitmapInfo {
        /// Its name.
        name: Option<String> = "name",
        /// How much is marked, in bytes.
        count: u64 = "count",
        /// Bytes of disk for each bit.
        granularity: u64 = "granularity",
        /// Whether writes are noted.
        recording: bool = "recording",
        /// Whether somebody uses it.
        busy: bool = "busy",
        /// Whether its image is to keep it.
        persistent: bool = "persistent",
        /// Whether it means nothing, as it was not stored in time.
        inconsistent: Option<bool> = "inconsistent",
    }
}

qapi_struct! {
    /// A snapshot inside of an image.
    pub struct SnapshotInfo {
        /// Unique in the image.
        id: String = "id",
        /// Its name.
        name: String = "name",
        /// How much of a machine's state it has, in bytes.
        vm_state_size: u64 = "vm-state-size",
        /// When it was taken, in seconds since 1970.
        date_sec: u64 = "date-sec",
        /// And nanoseconds.
        date_nsec: u64 = "date-nsec",
        /// How long the machine had run, in seconds.
        vm_clock_sec: u64 = "vm-clock-sec",
        /// And nanoseconds.
        vm_clock_nsec: u64 = "vm-clock-nsec",
        /// How many instructions it had done.
        icount: Option<u64> = "icount",
    }
}

qapi_struct! {
    /// What only one format has.
    pub struct ImageInfoSpecific {
        /// The format.
        kind: String = "type",
        /// What it has.
        data: Value = "data",
    }
}

qapi_struct! {
    /// An image.
    pub struct ImageInfo {
        /// What it is called in full.
        filename: String = "filename",
        /// Its format.
        format: String = "format",
        /// Whether it was not closed in order.
        dirty_flag: Option<bool> = "dirty-flag",
        /// How much space it takes on its host, in bytes.
        actual_size: Option<u64> = "actual-size",
        /// The length of the disk, in bytes.
        virtual_size: u64 = "virtual-size",
        /// In what units it allocates, in bytes.
        cluster_size: Option<u64> = "cluster-size",
        /// Whether it is encrypted.
        encrypted: Option<bool> = "encrypted",
        /// Whether all of it is compressed.
        compressed: Option<bool> = "compressed",
        /// What its header says of its backing image.
        backing_filename: Option<String> = "backing-filename",
        /// Where that is.
        full_backing_filename: Option<String> = "full-backing-filename",
        /// And its format.
        backing_filename_format: Option<String> = "backing-filename-format",
        /// The snapshots inside.
        snapshots: Option<Vec<SnapshotInfo>> = "snapshots",
        /// What only its format has.
        format_specific: Option<ImageInfoSpecific> = "format-specific",
        /// Its backing image.
        backing_image: Option<Box<ImageInfo>> = "backing-image",
    }
}

/// Disks have whole sectors.
const SECTOR_BYTES: u64 = 512;

/// What can be told of a node; with `chain` also of its backing images. `None` if it is gone.
pub(super) async fn device(control: &Control, id: NodeId, chain: bool) -> Option<BlockDeviceInfo> {
    let image = image(control, id, chain).await?;
    control.read(|graph| {
        let node = graph.node_by_id(id)?;
        let modes = graph.modes(id);
        let bitmaps: Vec<_> = node.bitmaps().statuses().into_iter().map(bitmap).collect();
        Some(BlockDeviceInfo {
            file: image.filename.clone(),
            node_name: Some(node.name().to_owned()),
            ro: modes.read_only,
            drv: node.driver_name().to_owned(),
            backing_file: backing_child(graph, id).map(|id| graph.described(id).name()),
            backing_file_depth: depth(image.backing_image.as_deref()),
            active: !modes.inactive,
            encrypted: false,
            detect_zeroes: match modes.detect_zeroes {
                DetectZeroes::Off => DetectZeroesWord::Off,
                DetectZeroes::On => DetectZeroesWord::On,
                DetectZeroes::Unmap => DetectZeroesWord::Unmap,
            },
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            cache: CacheInfo {
                writeback: true,
                direct: modes.direct,
                no_flush: modes.no_flush,
            },
            write_threshold: node.state().write_threshold().unwrap_or(0),
            dirty_bitmaps: Some(bitmaps).filter(|bitmaps| !bitmaps.is_empty()),
            image,
        })
    })
}

fn depth(mut backing: Option<&ImageInfo>) -> i64 {
    let mut depth = 0;
    while let Some(image) = backing {
        depth += 1;
        backing = image.backing_image.as_deref();
    }
    depth
}

fn backing_child(graph: &Graph, id: NodeId) -> Option<NodeId> {
    let kind = graph.node_by_id(id)?.driver_type();
    let is_backing = |name: &str| {
        let mut specs = kind.children.iter();
        specs.any(|spec| spec.name == name && spec.role.contains(Role::COW))
    };
    let mut children = graph.children(id);
    let found = children.find(|(name, _)| is_backing(name));
    found.map(|(_, child)| child.id())
}

fn bitmap(status: blockcore::dirty_bitmap::Status) -> BitmapInfo {
    BitmapInfo {
        name: Some(status.name),
        count: status.count_bytes,
        granularity: status.granularity_bytes,
        recording: status.recording,
        busy: status.busy,
        persistent: status.persistent,
        inconsistent: status.inconsistent.then_some(true),
    }
}

async fn image(control: &Control, id: NodeId, chain: bool) -> Option<ImageInfo> {
    let allocated = control.allocated_bytes(id).await;
    let (mut info, backing) = control.read(|graph| {
        let node = graph.node_by_id(id)?;
        let driver = node.io().info();
        let mut specific = Map::new();
        img::info::add_specific(&mut specific, node.driver_name(), &driver);
        let specific = specific
            .get("format-specific")
            .map(|part| ImageInfoSpecific {
                kind: node.driver_name().to_owned(),
                data: part["data"].clone(),
            });
        let snapshots: Vec<_> = graph.snapshots_now(id).into_iter().map(snapshot).collect();
        let header = node.backing_in_header();
        let knows_dirty = !matches!(node.driver_name(), "null-co" | "null-aio");
        let info = ImageInfo {
            filename: graph.described(id).name(),
            format: node.driver_name().to_owned(),
            dirty_flag: knows_dirty.then_some(driver.is_dirty),
            actual_size: allocated,
            virtual_size: node.bytes().next_multiple_of(SECTOR_BYTES),
            cluster_size: Some(driver.cluster_bytes).filter(|bytes| *bytes > 0),
            encrypted: None,
            compressed: None,
            backing_filename: header.map(|backing| backing.name.clone()),
            full_backing_filename: graph.full_backing_name(id).ok().flatten(),
            backing_filename_format: header.and_then(|backing| backing.format.clone()),
            snapshots: Some(snapshots).filter(|snapshots| !snapshots.is_empty()),
            format_specific: specific,
            backing_image: None,
        };
        Some((info, backing_child(graph, id)))
    })?;
    if let Some(backing) = backing.filter(|_| chain) {
        // Boxed: the recursion has no bound that the compiler could see.
        info.backing_image = Box::pin(image(control, backing, true)).await.map(Box::new);
    }
    Some(info)
}

pub(super) fn snapshot(snapshot: blockcore::driver::SnapshotInfo) -> SnapshotInfo {
    SnapshotInfo {
        id: snapshot.id,
        name: snapshot.name,
        vm_state_size: snapshot.vm_state_bytes,
        date_sec: snapshot.seconds,
        date_nsec: snapshot.nanoseconds.into(),
        vm_clock_sec: snapshot.vm_clock_ns / 1_000_000_000,
        vm_clock_nsec: snapshot.vm_clock_ns % 1_000_000_000,
        icount: snapshot.instructions,
    }
}
