//! How large an image becomes. Pure, but for the look at what is copied.
//!
//! As `qemu-img measure` has it: clusters of the external data file count as the image's own, and with a
//! backing image everything counts as its own, since nobody knows what the two have in common.

use std::rc::Rc;

use blockcore::dirty_bitmap::KeptBitmap;
use blockcore::driver::{MeasureSource, Measured, StatusFlags};
use blockcore::io::{RequestKind, Root};
use blockcore::options::{OptionSpec, Options};
use blockcore::{Error, ErrorKind};

use super::plan::Plan;
use super::spec::{CREATE_OPTIONS, Spec};
use crate::qcow2::layout::bitmap::entry_bytes;

/// Disks have a whole number of sectors.
const SECTOR_BYTES: u64 = 512;

/// See [`DriverType::measure`](blockcore::driver::DriverType::measure).
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for options that make no image; what could not be looked at.
pub(in super::super) async fn measure(
    mut options: Options,
    source: Option<MeasureSource>,
) -> Result<Measured, Error> {
    const TABLE: &[OptionSpec] = CREATE_OPTIONS;
    let take = |options: &mut Options, name: &str| {
        let value = options.take(name);
        value.is_some_and(|value| !value.is_empty())
    };
    let has_backing = take(&mut options, "backing-file");
    for name in [
        "backing-fmt",
        "data-file",
        "data-file-raw",
        "lazy-refcounts",
    ] {
        take(&mut options, name);
    }
    let is_full = matches!(options.text(TABLE, "preallocation"), "falloc" | "full");
    // Its plan has all clusters, and tables for them.
    options.set("preallocation", "metadata");
    if let Some(source) = &source {
        let bytes = source.root.bytes().next_multiple_of(SECTOR_BYTES);
        options.set("size", bytes.to_string());
    }
    let spec = Spec::parse(&options, None)?;
    let cluster = spec.geometry().cluster_bytes();
    let disk_bytes = spec.bytes.next_multiple_of(cluster);
    let fully_allocated_bytes = Plan::unchecked(&spec)?.bytes();
    let data_bytes = match &source {
        _ if is_full => disk_bytes,
        None => 0,
        Some(_) if has_backing => disk_bytes,
        Some(source) => data_bytes(&source.root, cluster).await?,
    };
    Ok(Measured {
        required_bytes: fully_allocated_bytes - disk_bytes + data_bytes,
        fully_allocated_bytes,
        bitmaps_bytes: source
            .and_then(|source| source.bitmaps)
            .filter(|_| spec.version >= 3)
            .map(|bitmaps| bitmaps_bytes(&bitmaps, cluster)),
    })
}

/// Bytes of clusters for bitmaps with a bit set in each: bits, tables and the directory.
fn bitmaps_bytes(bitmaps: &[KeptBitmap], cluster: u64) -> u64 {
    let (mut bytes, mut directory) = (0, 0_u64);
    for bitmap in bitmaps {
        let bits = bitmap
            .bits
            .length()
            .div_ceil(bitmap.bits.granularity_bytes());
        let clusters = bits.div_ceil(8).div_ceil(cluster);
        bytes += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += entry_bytes(0, bitmap.name.len());
    }
    bytes + directory.next_multiple_of(cluster)
}

/// Bytes of clusters with anything in them but zeroes.
async fn data_bytes(source: &Rc<Root>, cluster: u64) -> Result<u64, Error> {
    let end = source.bytes();
    let (mut offset, mut counted) = (0, 0);
    while offset < end {
        let request = source.enter(RequestKind::Other, 0, 0).await;
        let io = request.io();
        let status = io.status_above(|_| false, true, offset, end - offset).await;
        let (status, _) = status.map_err(|error| {
            let text = format!(
                "cannot look at node '{}' at offset {offset}: {error}",
                io.name()
            );
            Error::new(ErrorKind::Io, text)
        })?;
        let mut bytes = status.bytes.min(end - offset);
        if bytes == 0 {
            return Err(Error::new(ErrorKind::Io, "it gets shorter meanwhile"));
        }
        let held = StatusFlags::DATA | StatusFlags::ALLOCATED;
        if status.flags.contains(held) && !status.flags.contains(StatusFlags::ZERO) {
            // The whole of its last cluster, and of its first.
            bytes = (offset + bytes).next_multiple_of(cluster) - offset;
            counted += offset % cluster + bytes;
        }
        offset += bytes;
    }
    Ok(counted)
}
