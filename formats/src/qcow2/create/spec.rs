//! [`Spec`]: what a new image is to be.

use blockcore::Error;
use blockcore::driver::{BackingName, Preallocation};
use blockcore::options::{OptionKind, OptionSpec, Options};

use crate::qcow2::layout::Geometry;
use crate::qcow2::layout::extension::Extensions;
use crate::qcow2::layout::header::{
    CLUSTER_BITS, Compression, EXTENDED_BITS, Features, Header, MAX_BACKING_BYTES,
};

/// Disks have a whole number of sectors.
const SECTOR_BYTES: u64 = 512;

/// Options of creation, under QEMU's names. Those of the image's file, and of its external data file,
/// come under `file.` and `data-file.`.
pub const CREATE_OPTIONS: &[OptionSpec] = &[
    option(
        "size",
        OptionKind::Size,
        None,
        "length of the disk in bytes, a multiple of 512",
    ),
    option(
        "version",
        OptionKind::Choice(&["v2", "v3", "0.10", "1.1"]),
        Some("v3"),
        "version of the format: v2 (0.10) or v3 (1.1)",
    ),
    option(
        "cluster-size",
        OptionKind::Size,
        Some("64k"),
        "bytes of a cluster, a power of two from 512 to 2M",
    ),
    option(
        "refcount-bits",
        OptionKind::Size,
        Some("16"),
        "bits of a reference count, a power of two up to 64",
    ),
    option(
        "preallocation",
        OptionKind::Choice(&["off", "metadata", "falloc", "full"]),
        Some("off"),
        "metadata: every cluster has its place; falloc: and space; full: and zeroes written",
    ),
    option(
        "lazy-refcounts",
        OptionKind::Bool,
        Some("off"),
        "write reference counts late, and repair them after a crash",
    ),
    option(
        "backing-file",
        OptionKind::Text,
        Some(""),
        "name of the backing image",
    ),
    option(
        "backing-fmt",
        OptionKind::Text,
        Some(""),
        "format of the backing image",
    ),
    option(
        "data-file-raw",
        OptionKind::Bool,
        Some("off"),
        "keep the external data file readable as a raw disk",
    ),
    option(
        "extended-l2",
        OptionKind::Bool,
        Some("off"),
        "allocate in 32 parts of a cluster",
    ),
    option(
        "compression-type",
        OptionKind::Choice(&["zlib", "zstd"]),
        Some("zlib"),
        "how clusters are compressed",
    ),
];

pub(in super::super) const fn option(
    name: &'static str,
    kind: OptionKind,
    default: Option<&'static str>,
    help: &'static str,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        reopen: false,
        changes_data: false,
        help,
    }
}

/// What a new image is to be; checked.
#[derive(Clone, Debug)]
pub(super) struct Spec {
    /// Length of the disk.
    pub(super) bytes: u64,
    pub(super) preallocation: Preallocation,
    pub(super) version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    lazy_refcounts: bool,
    backing: Option<BackingName>,
    /// The name of the external data file.
    data_file: Option<String>,
    /// That can be read as raw.
    pub(super) data_file_raw: bool,
    extended: bool,
    compression: Compression,
}

impl Spec {
    /// What the options say of an image with this external data file.
    ///
    /// # Errors
    ///
    /// [`blockcore::ErrorKind::Invalid`] for options that exclude each other or make no image.
    pub(super) fn parse(options: &Options, data_file: Option<&str>) -> Result<Self, Error> {
        const TABLE: &[OptionSpec] = CREATE_OPTIONS;
        options.check(&[TABLE], "creation of a qcow2 image")?;
        let wanted = options.text(TABLE, "preallocation");
        let mut names = Preallocation::NAMES.into_iter();
        let preallocation = names.find(|(name, _)| *name == wanted);
        let data_file_raw = options.bool(TABLE, "data-file-raw");
        let spec = Self {
            bytes: options.size(TABLE, "size"),
            preallocation: preallocation.expect("one of the table's").1,
            version: match options.text(TABLE, "version") {
                "v2" | "0.10" => 2,
                _ => 3,
            },
            cluster_bits: cluster_bits(options.size(TABLE, "cluster-size"))?,
            refcount_order: refcount_order(options.size(TABLE, "refcount-bits"))?,
            lazy_refcounts: options.bool(TABLE, "lazy-refcounts"),
            backing: backing(
                options.text(TABLE, "backing-file"),
                options.text(TABLE, "backing-fmt"),
            )?,
            data_file: data_file.map(str::to_owned),
            data_file_raw,
            extended: options.bool(TABLE, "extended-l2"),
            compression: match options.text(TABLE, "compression-type") {
                "zstd" => Compression::Zstd,
                _ => Compression::Zlib,
            },
        };
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), Error> {
        if !self.bytes.is_multiple_of(SECTOR_BYTES) || self.bytes > i64::MAX as u64 {
            return Err(Error::invalid(format!(
                "the size of an image must be a multiple of {SECTOR_BYTES} bytes below 2^63, and {} is \
                 not",
                self.bytes
            )));
        }
        let for_version_3 = [
            (
                self.refcount_order != 4,
                "reference counts of another width than 16 bits",
            ),
            (self.lazy_refcounts, "lazy reference counts"),
            (self.data_file.is_some(), "an external data file"),
            (self.extended, "extended L2 entries"),
            (
                self.compression != Compression::Zlib,
                "another compression than zlib",
            ),
        ];
        let mut wanted = for_version_3.into_iter().filter(|(wanted, _)| *wanted);
        if let Some((_, what)) = wanted.next().filter(|_| self.version < 3) {
            return Err(Error::invalid(format!(
                "an image with {what} needs 'version=v3'"
            )));
        }
        if self.extended && self.cluster_bits < EXTENDED_BITS {
            return Err(Error::invalid(format!(
                "extended L2 entries need clusters of at least {} bytes",
                1 << EXTENDED_BITS
            )));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(Error::invalid("'data-file-raw=on' needs 'data-file'"));
        }
        if self.data_file_raw && self.backing.is_some() {
            return Err(Error::invalid(
                "an image whose data file can be read as raw can have no backing image",
            ));
        }
        let is_preallocated = self.preallocation != Preallocation::Off;
        if self.backing.is_some() && is_preallocated && !self.extended {
            return Err(Error::invalid(
                "an image with a backing image can be preallocated only with 'extended-l2=on': else \
                 nothing of the backing image would be seen",
            ));
        }
        Ok(())
    }

    /// Whether every cluster of the disk has its place from the beginning.
    pub(super) fn is_mapped(&self) -> bool {
        // A raw data file is read where no place is said, too.
        self.preallocation != Preallocation::Off || self.data_file_raw
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended: self.extended,
            zero_flag: self.version >= 3,
            data_file: self.data_file.is_some(),
        }
    }

    /// The header, without where the tables are.
    pub(super) fn header(&self) -> Header {
        let bit = |is: bool, feature: u64| if is { feature } else { 0 };
        let backing = self.backing.as_ref();
        Header {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            bytes: self.bytes,
            backing: backing.map(|backing| backing.name.clone()),
            l1_offset: 0,
            l1_entries: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshots: 0,
            snapshots_offset: 0,
            features: Features {
                incompatible: bit(self.data_file.is_some(), Features::DATA_FILE)
                    | bit(self.compression != Compression::Zlib, Features::COMPRESSION)
                    | bit(self.extended, Features::EXTENDED_L2),
                compatible: bit(self.lazy_refcounts, Features::LAZY_REFCOUNTS),
                autoclear: bit(self.data_file_raw, Features::RAW_DATA_FILE),
            },
            compression: self.compression,
            extensions: Extensions {
                backing_format: backing.and_then(|backing| backing.format.clone()),
                data_file: self.data_file.clone(),
                ..Extensions::default()
            },
            unknown: Vec::new(),
        }
    }
}

fn cluster_bits(bytes: u64) -> Result<u32, Error> {
    let bits = bytes.trailing_zeros();
    if bytes.is_power_of_two() && CLUSTER_BITS.contains(&bits) {
        return Ok(bits);
    }
    Err(Error::invalid(format!(
        "'cluster-size' must be a power of two from 512 to 2M, and {bytes} is not"
    )))
}

pub(in super::super) fn refcount_order(bits: u64) -> Result<u32, Error> {
    if bits.is_power_of_two() && bits <= 64 {
        return Ok(bits.trailing_zeros());
    }
    Err(Error::invalid(format!(
        "'refcount-bits' must be a power of two up to 64, and {bits} is not"
    )))
}

fn backing(name: &str, format: &str) -> Result<Option<BackingName>, Error> {
    let wrong = match (name.is_empty(), format.is_empty()) {
        (true, true) => return Ok(None),
        (false, false) if name.len() > MAX_BACKING_BYTES => format!(
            "the name of a backing image has at most {MAX_BACKING_BYTES} bytes, and this one {}",
            name.len()
        ),
        (false, false) => {
            return Ok(Some(BackingName {
                name: name.to_owned(),
                format: Some(format.to_owned()),
            }));
        }
        (false, true) => "'backing-file' needs 'backing-fmt': a format is never guessed".to_owned(),
        (true, false) => "'backing-fmt' needs 'backing-file'".to_owned(),
    };
    Err(Error::invalid(wrong))
}
