//! Reading the bitmaps that an image keeps, when it is opened.
//!
//! What is wrong with one that claims to be up to date keeps the image from being opened, as with QEMU: to go
//! on without it would be to lose what it says. Of others nothing is believed.

use std::sync::Arc;

use blockcore::Error;
use blockcore::dirty_bitmap::{Bits, KeptBitmap, MAX_GRANULARITY_BYTES};

use super::{Belief, Entry, MAX_BITS_BYTES, bits_bytes};
use crate::qcow2::layout::Geometry;
use crate::qcow2::layout::bitmap::{Bitmap, BitmapCluster};
use crate::qcow2::layout::bytes::words;
use crate::qcow2::layout::header::Header;
use crate::qcow2::open::{Budget, Source, mark_own};
use crate::qcow2::overlap::Metadata;

/// What an image keeps.
#[derive(Default)]
pub(in crate::qcow2) struct Loaded {
    /// Its directory.
    pub(in crate::qcow2) list: Vec<Entry>,
    /// What the node gets.
    pub(in crate::qcow2) kept: Vec<KeptBitmap>,
}

/// Reads them. For an image that is going to be written to, also marks where they are in its `metadata`.
///
/// # Errors
///
/// [`ErrorKind::Corrupt`](blockcore::ErrorKind::Corrupt) for what cannot be; what could not be read.
pub(in crate::qcow2) async fn load(
    source: &Source,
    header: &Header,
    metadata: Option<&Metadata>,
    budget: &mut Budget,
) -> Result<Loaded, Error> {
    let Some(place) = header.extensions.bitmaps else {
        return Ok(Loaded::default());
    };
    let (geometry, disk_bytes) = (header.geometry(), header.bytes);
    let bytes = source
        .read("bitmap directory", place.offset, place.bytes)
        .await?;
    if let Some(metadata) = metadata {
        mark_own(metadata, "bitmap directory", place.offset, place.bytes)
            .map_err(|what| source.corrupt(what))?;
    }
    let bitmaps = Bitmap::parse_directory(&bytes, place.bitmaps, disk_bytes, geometry)
        .map_err(|error| source.corrupt(error))?;
    let memory = |bitmap: &Bitmap| {
        let in_use = bitmap.flags & Bitmap::IN_USE != 0;
        bits_bytes(disk_bytes, bitmap.granularity_bits, !in_use)
    };
    let wants_bits = bitmaps.iter().map(memory).sum::<u64>() <= MAX_BITS_BYTES;
    if !wants_bits {
        let node = &source.node;
        let text = format!(
            "the bitmaps of the image of node '{node}' may take more than {MAX_BITS_BYTES} bytes of memory"
        );
        if metadata.is_some() {
            return Err(Error::unsupported(format!("{text}: open it read-only")));
        }
        tracing::warn!("{text}, and are not used");
    }
    let mut loaded = Loaded::default();
    for bitmap in bitmaps {
        let is_known = bitmap.is_known() && wants_bits;
        let is_valid = is_known && bitmap.flags & Bitmap::IN_USE == 0;
        if !bitmap.is_known() {
            tracing::warn!(
                "bitmap '{}' of the image of node '{}' has data that this program does not know: it is left \
                 alone",
                bitmap.name,
                source.node
            );
        }
        let mut clusters = Vec::new();
        if is_valid || metadata.is_some() {
            clusters = table(source, &bitmap, geometry, (metadata, is_valid), budget).await?;
        }
        if is_known {
            let enabled = bitmap.flags & Bitmap::AUTO != 0;
            let bits = match is_valid {
                true => read_bits(source, &bitmap, disk_bytes, geometry, &clusters).await?,
                false => no_bits(disk_bytes, bitmap.granularity_bits),
            };
            loaded.kept.push(KeptBitmap {
                name: bitmap.name.clone(),
                bits: Arc::new(bits),
                enabled,
                inconsistent: !is_valid,
            });
        }
        let belief = match (is_known, is_valid) {
            (false, _) => Belief::Unknown,
            (true, true) => Belief::Valid,
            (true, false) => Belief::Nothing,
        };
        loaded.list.push(Entry { bitmap, belief });
    }
    Ok(loaded)
}

/// Reads a bitmap's table. What means nothing in one that claims nothing is left out.
async fn table(
    source: &Source,
    bitmap: &Bitmap,
    geometry: Geometry,
    (metadata, is_valid): (Option<&Metadata>, bool),
    budget: &mut Budget,
) -> Result<Vec<BitmapCluster>, Error> {
    let name = &bitmap.name;
    let named = |what: String| source.corrupt(format!("bitmap '{name}': {what}"));
    let bytes = 8 * u64::from(bitmap.table_entries);
    budget.spend(source, bytes)?;
    let table = source
        .read("table of a bitmap", bitmap.table_offset, bytes)
        .await?;
    let mark = |what: &str, offset: u64, bytes: u64| match metadata {
        None => Ok(()),
        Some(metadata) => mark_own(metadata, what, offset, bytes).map_err(named),
    };
    mark("table", bitmap.table_offset, bytes)?;
    let mut clusters = Vec::new();
    for entry in words(&table) {
        match BitmapCluster::parse(entry, geometry) {
            Ok(cluster) => {
                if let BitmapCluster::Data(host) = cluster {
                    mark("cluster", host, geometry.cluster_bytes())?;
                }
                clusters.push(cluster);
            }
            Err(error) if is_valid => return Err(named(error.to_string())),
            Err(_) => {}
        }
    }
    Ok(clusters)
}

async fn read_bits(
    source: &Source,
    bitmap: &Bitmap,
    disk_bytes: u64,
    geometry: Geometry,
    clusters: &[BitmapCluster],
) -> Result<Bits, Error> {
    let bits = Bits::new(disk_bytes, 1 << bitmap.granularity_bits)
        .map_err(|too_many| source.corrupt(format!("bitmap '{}': {too_many}", bitmap.name)))?;
    let covers = bits.serialised_coverage(geometry.cluster_bytes());
    for (index, cluster) in clusters.iter().enumerate() {
        let Some(begin) = (index as u64).checked_mul(covers) else {
            break;
        };
        if begin >= disk_bytes {
            // Whoever made it has allowed for more.
            break;
        }
        let part = covers.min(disk_bytes - begin);
        match *cluster {
            BitmapCluster::Zeroes => {}
            BitmapCluster::Ones => bits.deserialise_ones(begin, part),
            BitmapCluster::Data(host) => {
                let bytes = bits.serialised_bytes(begin, part);
                let data = source.read("cluster of a bitmap", host, bytes).await?;
                bits.deserialise(begin, part, &data);
            }
        }
    }
    Ok(bits)
}

/// For a bitmap that means nothing; of its own granularity if that can be.
fn no_bits(disk_bytes: u64, granularity_bits: u8) -> Bits {
    Bits::new(disk_bytes, 1 << granularity_bits)
        .or_else(|_| Bits::new(disk_bytes, MAX_GRANULARITY_BYTES))
        .expect("no disk is too long for the largest granularity")
}
