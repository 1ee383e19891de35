//! [`Header`]: what an image says of itself in its first cluster (specification, "Header").
//!
//! What this program does not know is kept: fields past the known ones, extensions, compatible
//! features. What nobody may touch without knowing it is refused, and named.

use blockcore::{Error, ErrorKind};

use super::Geometry;
use super::bytes::{u32_at, u64_at};
use super::extension::{Context, Extensions, FeatureKind, corrupt, feature_name, find_names};

/// `QFI` and a byte.
const MAGIC: u32 = 0x5146_49fb;
/// Bytes of version 2's header.
const V2_BYTES: usize = 72;
/// Least bytes of version 3's.
const V3_BYTES: usize = 104;
/// Bytes of version 3's with every field that is known, and padding.
const KNOWN_BYTES: usize = 112;
/// Where fields are that are read or written by themselves.
pub(crate) mod field {
    /// Length of the disk.
    pub(crate) const BYTES: u64 = 24;
    /// Size and offset of the L1 table.
    pub(crate) const L1: u64 = 36;
    /// Offset and size of the refcount table.
    pub(crate) const REFCOUNT_TABLE: u64 = 48;
    /// Incompatible features.
    pub(crate) const INCOMPATIBLE: u64 = 72;
    /// Autoclear features.
    pub(crate) const AUTOCLEAR: u64 = 88;
    /// Length of the header.
    pub(crate) const HEADER_BYTES: u64 = 100;
}

/// How much of a file [`Header::cluster_bytes_in`] wants to see.
pub(crate) const PREFIX_BYTES: usize = 24;

/// Binary logarithm of the smallest and the largest cluster, as QEMU has them.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Longest L1 table, as QEMU has it.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// Longest refcount table, as QEMU has it.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots, as QEMU has it.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// Most bitmaps, as QEMU has it.
pub(crate) const MAX_BITMAPS: u32 = 65535;
/// Longest backing name (specification).
pub(crate) const MAX_BACKING_BYTES: usize = 1023;
/// Bytes of a snapshot table's entry, without names and extra data.
const SNAPSHOT_HEAD_BYTES: u64 = 40;
/// Smaller clusters have no table of feature names, as QEMU has it: it would take the room of the
/// backing name.
const NAMES_FROM_BYTES: u64 = 8192;
/// Smallest cluster with extended entries: 32 subclusters of a sector.
pub(crate) const EXTENDED_BITS: u32 = 14;

/// Optional things about an image, by their bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    /// Those without which an image cannot be opened.
    pub(crate) incompatible: u64,
    /// Those that may be ignored.
    pub(crate) compatible: u64,
    /// Those that a writer who does not know them clears.
    pub(crate) autoclear: u64,
}

impl Features {
    /// Incompatible: refcounts may be out of date.
    pub(crate) const DIRTY: u64 = 1;
    /// Incompatible: metadata was found to be wrong; not to be written until repaired.
    pub(crate) const CORRUPT: u64 = 1 << 1;
    /// Incompatible: data is in another file.
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    /// Incompatible: the compression is not zlib's.
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    /// Incompatible: L2 entries have 16 bytes.
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    /// Compatible: refcounts need not be written as long as the image is marked dirty.
    pub(crate) const LAZY_REFCOUNTS: u64 = 1;
    /// Autoclear: the bitmaps are up to date.
    pub(crate) const BITMAPS: u64 = 1;
    /// Autoclear: the external data file can be read as raw.
    pub(crate) const RAW_DATA_FILE: u64 = 1 << 1;
    /// Autoclear, of our own: nobody else has written since the cookie was. A high bit, out of the way
    /// of what the specification may get.
    pub(crate) const SEGMENT: u64 = 1 << 62;

    const KNOWN_INCOMPATIBLE: u64 =
        Self::DIRTY | Self::CORRUPT | Self::DATA_FILE | Self::COMPRESSION | Self::EXTENDED_L2;
    const KNOWN_AUTOCLEAR: u64 = Self::BITMAPS | Self::RAW_DATA_FILE | Self::SEGMENT;
}

/// How clusters are compressed; the numbers are those of the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Raw deflate.
    #[default]
    Zlib = 0,
    /// Zstandard.
    Zstd = 1,
}

/// A header. Whoever changes a field keeps to what [`Header::parse`] checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub(crate) version: u32,
    /// See [`Geometry::cluster_bits`].
    pub(crate) cluster_bits: u32,
    /// See [`Geometry::refcount_order`].
    pub(crate) refcount_order: u32,
    /// Length of the disk; any number of bytes.
    pub(crate) bytes: u64,
    /// The name of the backing image.
    pub(crate) backing: Option<String>,
    /// Where the L1 table is.
    pub(crate) l1_offset: u64,
    /// Its entries; at least as many as the disk needs.
    pub(crate) l1_entries: u32,
    /// Where the refcount table is.
    pub(crate) refcount_table_offset: u64,
    /// Its clusters.
    pub(crate) refcount_table_clusters: u32,
    /// How many snapshots there are.
    pub(crate) snapshots: u32,
    /// Where their table is.
    pub(crate) snapshots_offset: u64,
    /// What else there is about the image; zero in version 2.
    pub(crate) features: Features,
    /// How clusters are compressed.
    pub(crate) compression: Compression,
    /// What the extensions say.
    pub(crate) extensions: Extensions,
    /// Fields past the known ones.
    pub(crate) unknown: Vec<u8>,
}

/// What a header is parsed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To use the image.
    Use,
    /// To check or repair it: what a check finds by itself is no reason to refuse.
    Check,
}

impl Header {
    /// How many bytes of a file that begins with `head` [`parse`](Self::parse) wants: the first
    /// cluster.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if it is no qcow2 image; [`ErrorKind::Unsupported`] for another version;
    /// [`ErrorKind::Corrupt`] for a cluster size that cannot be.
    pub(crate) fn cluster_bytes_in(head: &[u8]) -> Result<u64, Error> {
        if head.len() < PREFIX_BYTES || u32_at(head, 0) != MAGIC {
            return Err(Error::invalid("it is not a qcow2 image"));
        }
        let version = u32_at(head, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!(
                "it is a qcow2 image of version {version}; this program knows versions 2 and 3"
            )));
        }
        let bits = u32_at(head, 20);
        if !CLUSTER_BITS.contains(&bits) {
            return Err(corrupt(format!(
                "the header's cluster_bits is {bits}, and must be 9 to 21"
            )));
        }
        Ok(1 << bits)
    }

    /// The header in `bytes`, an image's first cluster. Where the file ends within it the rest counts as
    /// zero.
    ///
    /// # Errors
    ///
    /// As [`cluster_bytes_in`](Self::cluster_bytes_in); [`ErrorKind::Unsupported`] for what this program
    /// does not know and must not ignore, and for encryption; [`ErrorKind::Corrupt`], naming field and
    /// value, for what contradicts the specification or QEMU's limits.
    pub(crate) fn parse(bytes: &[u8], purpose: Purpose) -> Result<Self, Error> {
        let cluster_bytes = Self::cluster_bytes_in(bytes)? as usize;
        let padded;
        let bytes = match bytes.get(..cluster_bytes) {
            Some(cluster) => cluster,
            None => {
                padded = [bytes, &vec![0; cluster_bytes - bytes.len()]].concat();
                &padded
            }
        };
        let version = u32_at(bytes, 4);
        let header_bytes = match version {
            2 => V2_BYTES,
            _ => header_bytes(bytes)?,
        };
        check_encryption(u32_at(bytes, 32))?;
        let backing_offset = u64_at(bytes, 8);
        if backing_offset > cluster_bytes as u64 {
            return Err(corrupt(format!(
                "the header's backing_file_offset is {backing_offset:#x}, outside of the first cluster \
                 ({cluster_bytes} bytes)"
            )));
        }
        let end = match backing_offset as usize {
            0 => cluster_bytes,
            offset => offset,
        };
        // Empty where the backing name begins within the fields.
        let extensions = bytes.get(header_bytes..end).unwrap_or(&[]);
        let features = match version {
            2 => Features::default(),
            _ => Features {
                incompatible: u64_at(bytes, field::INCOMPATIBLE as usize),
                compatible: u64_at(bytes, 80),
                autoclear: u64_at(bytes, field::AUTOCLEAR as usize),
            },
        };
        check_incompatible(features, extensions)?;
        let header = Self {
            version,
            cluster_bits: u32_at(bytes, 20),
            refcount_order: match version {
                2 => 4,
                _ => u32_at(bytes, 96),
            },
            bytes: u64_at(bytes, 24),
            backing: backing_name(bytes, backing_offset as usize)?,
            l1_entries: u32_at(bytes, 36),
            l1_offset: u64_at(bytes, 40),
            refcount_table_offset: u64_at(bytes, 48),
            refcount_table_clusters: u32_at(bytes, 56),
            snapshots: u32_at(bytes, 60),
            snapshots_offset: u64_at(bytes, 64),
            features,
            compression: match header_bytes > V3_BYTES {
                true => compression(bytes[V3_BYTES])?,
                false => Compression::default(),
            },
            extensions: Extensions::parse(
                extensions,
                Context {
                    cluster_bytes: cluster_bytes as u64,
                    autoclear: features.autoclear,
                },
            )?,
            unknown: match header_bytes > KNOWN_BYTES {
                true => bytes[KNOWN_BYTES..header_bytes].to_owned(),
                false => Vec::new(),
            },
        };
        header.check(purpose)?;
        Ok(header)
    }

    /// How the image is divided.
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended: self.features.incompatible & Features::EXTENDED_L2 != 0,
            zero_flag: self.version >= 3,
            data_file: self.features.incompatible & Features::DATA_FILE != 0,
        }
    }

    /// Bytes of the refcount table.
    pub(crate) fn refcount_table_bytes(&self) -> u64 {
        u64::from(self.refcount_table_clusters) << self.cluster_bits
    }

    /// Autoclear features that are set and that this program does not know: it clears them before it
    /// writes for the first time.
    pub(crate) fn unknown_autoclear(&self) -> u64 {
        self.features.autoclear & !Features::KNOWN_AUTOCLEAR
    }

    fn check(&self, purpose: Purpose) -> Result<(), Error> {
        let refuse = |field: &str, value: String, why: &str| {
            Err(corrupt(format!("the header's {field} is {value}, {why}")))
        };
        if self.refcount_order > 6 {
            let order = self.refcount_order.to_string();
            return refuse("refcount_order", order, "and must be at most 6 (64 bits)");
        }
        let geometry = self.geometry();
        if geometry.extended && self.cluster_bits < EXTENDED_BITS {
            let bits = self.cluster_bits.to_string();
            return refuse(
                "cluster_bits",
                bits,
                "too small for extended L2 entries (14)",
            );
        }
        if self.bytes > i64::MAX as u64 {
            return refuse(
                "size",
                self.bytes.to_string(),
                "longer than any disk (2^63)",
            );
        }
        let compression = self.features.incompatible & Features::COMPRESSION != 0;
        if compression != (self.compression != Compression::Zlib) {
            let kind = (self.compression as u8).to_string();
            let why = match compression {
                true => "which needs no incompatible feature 'compression type', and it is set",
                false => "which needs incompatible feature 'compression type', and it is not set",
            };
            return refuse("compression_type", kind, why);
        }
        let reftable = u64::from(self.refcount_table_clusters);
        if reftable == 0 && purpose == Purpose::Use {
            return refuse(
                "refcount_table_clusters",
                "0".into(),
                "and an image has at least 1",
            );
        }
        let cluster_bytes = geometry.cluster_bytes();
        self.check_table(
            "refcount table",
            (self.refcount_table_offset, reftable, cluster_bytes),
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        if purpose == Purpose::Use {
            let most = SNAPSHOT_HEAD_BYTES * u64::from(MAX_SNAPSHOTS);
            let snapshots = u64::from(self.snapshots);
            let table = (self.snapshots_offset, snapshots, SNAPSHOT_HEAD_BYTES);
            self.check_table("snapshot table", table, most)?;
        }
        let table = (self.l1_offset, u64::from(self.l1_entries), 8);
        self.check_table("L1 table", table, MAX_L1_BYTES)?;
        let needed = geometry.l1_entries(self.bytes);
        if needed > u64::from(self.l1_entries) {
            let why = format!("and a disk of {} bytes needs {needed}", self.bytes);
            return refuse("l1_size", self.l1_entries.to_string(), &why);
        }
        self.check_data_file()
    }

    fn check_table(
        &self,
        name: &str,
        (offset, entries, entry_bytes): (u64, u64, u64),
        max_bytes: u64,
    ) -> Result<(), Error> {
        let bytes = entries * entry_bytes;
        if bytes > max_bytes {
            return Err(corrupt(format!(
                "the {name} has {bytes} bytes ({entries} times {entry_bytes}); at most {max_bytes} are \
                 allowed"
            )));
        }
        if !self.geometry().is_aligned(offset) {
            return Err(corrupt(format!(
                "the {name} is at offset {offset:#x}, which is not a multiple of the cluster size ({} \
                 bytes)",
                self.geometry().cluster_bytes()
            )));
        }
        if offset > i64::MAX as u64 - bytes {
            return Err(corrupt(format!(
                "the {name} is at offset {offset:#x}, beyond any file"
            )));
        }
        Ok(())
    }

    fn check_data_file(&self) -> Result<(), Error> {
        let raw = self.features.autoclear & Features::RAW_DATA_FILE != 0;
        if raw && self.geometry().data_file && self.backing.is_some() {
            return Err(corrupt(
                "the header names a backing image, and says that the external data file can be read as \
                 raw, without one",
            ));
        }
        Ok(())
    }

    /// The first cluster of the image, whole.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSpace`] if names and extensions do not fit into it.
    pub(crate) fn serialise(&self) -> Result<Vec<u8>, Error> {
        let has_room = self.geometry().cluster_bytes() >= NAMES_FROM_BYTES;
        self.serialise_with(self.version >= 3 && has_room)
    }

    /// As [`serialise`](Self::serialise), without the table of feature names, which only a person misses.
    pub(crate) fn serialise_bare(&self) -> Result<Vec<u8>, Error> {
        self.serialise_with(false)
    }

    fn serialise_with(&self, names: bool) -> Result<Vec<u8>, Error> {
        let cluster_bytes = self.geometry().cluster_bytes();
        let mut bytes = self.fields();
        bytes.extend(self.extensions.serialise(names));
        if let Some(name) = &self.backing {
            let offset = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        if bytes.len() as u64 > cluster_bytes {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "the header with its names and extensions has {} bytes, and its cluster \
                     {cluster_bytes}",
                    bytes.len()
                ),
            ));
        }
        bytes.resize(cluster_bytes as usize, 0);
        Ok(bytes)
    }

    /// All fields, those of the backing name zero.
    pub(crate) fn fields(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut add = |field: &[u8]| bytes.extend(field);
        add(&MAGIC.to_be_bytes());
        add(&self.version.to_be_bytes());
        add(&[0; 12]);
        add(&self.cluster_bits.to_be_bytes());
        add(&self.bytes.to_be_bytes());
        // Not encrypted.
        add(&[0; 4]);
        add(&self.l1_entries.to_be_bytes());
        add(&self.l1_offset.to_be_bytes());
        add(&self.refcount_table_offset.to_be_bytes());
        add(&self.refcount_table_clusters.to_be_bytes());
        add(&self.snapshots.to_be_bytes());
        add(&self.snapshots_offset.to_be_bytes());
        if self.version == 2 {
            return bytes;
        }
        add(&self.features.incompatible.to_be_bytes());
        add(&self.features.compatible.to_be_bytes());
        add(&self.features.autoclear.to_be_bytes());
        add(&self.refcount_order.to_be_bytes());
        add(&((KNOWN_BYTES + self.unknown.len()) as u32).to_be_bytes());
        add(&[self.compression as u8]);
        add(&[0; KNOWN_BYTES - V3_BYTES - 1]);
        add(&self.unknown);
        bytes
    }
}

fn header_bytes(bytes: &[u8]) -> Result<usize, Error> {
    let length = u32_at(bytes, 100) as usize;
    let wrong = if length < V3_BYTES {
        format!("and must be at least {V3_BYTES}")
    } else if length > bytes.len() {
        format!("more than a cluster has ({} bytes)", bytes.len())
    } else if !length.is_multiple_of(8) {
        "which is not a multiple of 8".to_owned()
    } else {
        return Ok(length);
    };
    Err(corrupt(format!(
        "the header's header_length is {length}, {wrong}"
    )))
}

fn check_incompatible(features: Features, extensions: &[u8]) -> Result<(), Error> {
    let unknown = features.incompatible & !Features::KNOWN_INCOMPATIBLE;
    if unknown == 0 {
        return Ok(());
    }
    let names = find_names(extensions);
    let bits = (0..64).filter(|bit| unknown >> bit & 1 != 0);
    let called = bits.map(|bit| feature_name(&names, FeatureKind::Incompatible, bit));
    let called: Vec<_> = called.collect();
    Err(Error::unsupported(format!(
        "the image has incompatible features that this program does not know: {}",
        called.join(", ")
    )))
}

fn check_encryption(method: u32) -> Result<(), Error> {
    let name = match method {
        0 => return Ok(()),
        1 => "AES",
        2 => "LUKS",
        other => {
            return Err(corrupt(format!(
                "the header's crypt_method is {other}, and only 0 to 2 mean something"
            )));
        }
    };
    Err(Error::unsupported(format!(
        "the image is encrypted with {name}, which this program cannot do; 'qemu-img convert' makes a \
         copy that is not encrypted"
    )))
}

fn compression(number: u8) -> Result<Compression, Error> {
    match number {
        0 => Ok(Compression::Zlib),
        1 => Ok(Compression::Zstd),
        other => Err(Error::unsupported(format!(
            "the header's compression_type is {other}; this program knows 0 (zlib) and 1 (zstd)"
        ))),
    }
}

fn backing_name(bytes: &[u8], offset: usize) -> Result<Option<String>, Error> {
    if offset == 0 {
        return Ok(None);
    }
    let length = u32_at(bytes, 16) as usize;
    let room = MAX_BACKING_BYTES.min(bytes.len() - offset);
    if length > room {
        return Err(corrupt(format!(
            "the header's backing_file_size is {length}, and at most {room} bytes can be there"
        )));
    }
    let name = str::from_utf8(&bytes[offset..offset + length])
        .map_err(|_| Error::unsupported("the name of the backing image is not valid UTF-8"))?;
    // An empty name is none: QEMU opens no backing image then.
    Ok(Some(name.to_owned()).filter(|name| !name.is_empty()))
}

#[cfg(test)]
pub(crate) mod tests;
