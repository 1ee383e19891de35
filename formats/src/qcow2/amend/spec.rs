//! [`Amendment`]: what an image is to become; checked against what it is, before anything is written.

use blockcore::options::{OptionKind, OptionSpec, Options};
use blockcore::{Error, ErrorKind};

use crate::qcow2::create::{option, refcount_order};
use crate::qcow2::layout::header::{Compression, Features, Header};
use crate::qcow2::layout::snapshot::Snapshot;

/// Disks have a whole number of sectors.
const SECTOR_BYTES: u64 = 512;
/// Counts of version 2 have so many bits, as a binary logarithm.
const V2_REFCOUNT_ORDER: u32 = 4;

/// Options of amendments, under QEMU's names. What is left out stays as it is: nothing has a default that
/// counts.
pub(in crate::qcow2) const AMEND_OPTIONS: &[OptionSpec] = &[
    option(
        "backing-file",
        OptionKind::Text,
        Some(""),
        "file name of the backing image; 'rebase' changes it",
    ),
    option(
        "backing-fmt",
        OptionKind::Text,
        Some(""),
        "format of the backing image; 'rebase' changes it",
    ),
    option(
        "data-file",
        OptionKind::Text,
        Some(""),
        "file name of the external data file, where there is one; empty for no name",
    ),
    option(
        "data-file-raw",
        OptionKind::Bool,
        Some("off"),
        "whether the external data file stays readable as a raw disk; it can be given up only",
    ),
    option(
        "lazy-refcounts",
        OptionKind::Bool,
        Some("off"),
        "reference counts may be written later",
    ),
    option(
        "refcount-bits",
        OptionKind::Size,
        Some("0"),
        "bits of a reference count, a power of two up to 64",
    ),
    option(
        "size",
        OptionKind::Size,
        Some("0"),
        "length of the disk in bytes, a multiple of 512",
    ),
    option(
        "version",
        OptionKind::Choice(&["v2", "v3", "0.10", "1.1"]),
        Some("v3"),
        "version of the format: v2 (0.10) or v3 (1.1)",
    ),
];

/// What an image is now, as far as amendments look at it.
pub(super) struct Present<'a> {
    pub(super) header: &'a Header,
    pub(super) snapshots: &'a [Snapshot],
    /// The running image keeps places of discarded clusters.
    pub(super) discard_no_unref: bool,
}

/// See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Amendment {
    pub(super) version: u32,
    pub(super) refcount_order: u32,
    /// Whether counts may be written later.
    lazy_refcounts: bool,
    /// The external data file's name; `None` for none.
    data_file: Option<String>,
    /// It can be read as raw.
    data_file_raw: bool,
}

impl Amendment {
    /// What options say of an image. `force` allows a shorter disk.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for what cannot be or cannot be changed, [`ErrorKind::Unsupported`] for what
    /// the image has and the new one could not.
    pub(super) fn parse(
        options: &Options,
        present: &Present<'_>,
        force: bool,
    ) -> Result<Self, Error> {
        const TABLE: &[OptionSpec] = AMEND_OPTIONS;
        options.check(&[TABLE], "the amendment of a qcow2 image")?;
        let header = present.header;
        let given = |name: &str| options.get(name).is_some();
        let had = Self::of(header);
        let mut new = had.clone();
        check_backing(options, header)?;
        if given("version") {
            new.version = match options.text(TABLE, "version") {
                "v2" | "0.10" => 2,
                _ => 3,
            };
        }
        if given("refcount-bits") {
            new.refcount_order = refcount_order(options.size(TABLE, "refcount-bits"))?;
        }
        if given("lazy-refcounts") {
            new.lazy_refcounts = options.bool(TABLE, "lazy-refcounts");
        } else if new.version < 3 {
            new.lazy_refcounts = false;
        }
        if given("data-file") {
            if !header.geometry().data_file {
                return Err(Error::invalid(
                    "'data-file' can only be set for images that use an external data file",
                ));
            }
            let name = options.text(TABLE, "data-file");
            new.data_file = (!name.is_empty()).then(|| name.to_owned());
        }
        if given("data-file-raw") {
            new.data_file_raw = options.bool(TABLE, "data-file-raw");
            if new.data_file_raw && !had.data_file_raw {
                return Err(Error::invalid(
                    "'data-file-raw' cannot be set on an image that exists: its data file may hold what \
                     the image says is zero",
                ));
            }
        }
        new.check_version()?;
        if new.version < header.version {
            check_downgrade(present)?;
        }
        check_size(options, present, new.version, force)?;
        Ok(new)
    }

    fn of(header: &Header) -> Self {
        let has = |set: u64, feature: u64| set & feature != 0;
        Self {
            version: header.version,
            refcount_order: header.refcount_order,
            lazy_refcounts: has(header.features.compatible, Features::LAZY_REFCOUNTS),
            data_file: header.extensions.data_file.clone(),
            data_file_raw: has(header.features.autoclear, Features::RAW_DATA_FILE),
        }
    }

    fn check_version(&self) -> Result<(), Error> {
        if self.version >= 3 {
            return Ok(());
        }
        let what = if self.refcount_order != V2_REFCOUNT_ORDER {
            "'compat=0.10' needs 'refcount_bits=16'"
        } else if self.lazy_refcounts {
            "lazy reference counts need 'compat=1.1'"
        } else {
            return Ok(());
        };
        Err(Error::invalid(what))
    }

    /// What the header says once it is so, but for where tables are.
    pub(super) fn apply(&self, header: &mut Header) {
        let set = |bits: &mut u64, feature: u64, is: bool| match is {
            true => *bits |= feature,
            false => *bits &= !feature,
        };
        header.version = self.version;
        header.refcount_order = self.refcount_order;
        header.extensions.data_file.clone_from(&self.data_file);
        let features = &mut header.features;
        let lazy = Features::LAZY_REFCOUNTS;
        set(&mut features.compatible, lazy, self.lazy_refcounts);
        let raw = Features::RAW_DATA_FILE;
        set(&mut features.autoclear, raw, self.data_file_raw);
        if self.version < 3 {
            // Version 2 has no fields for these, and nobody would clear the bit that vouches for a cookie.
            header.features = Features::default();
            header.compression = Compression::Zlib;
            header.extensions.cookie = None;
            header.extensions.names.clear();
            header.unknown.clear();
        }
    }
}

fn check_backing(options: &Options, header: &Header) -> Result<(), Error> {
    let now = [
        ("backing-file", header.backing.as_deref()),
        ("backing-fmt", header.extensions.backing_format.as_deref()),
    ];
    for (name, now) in now {
        if options.get(name).is_some_and(|given| Some(given) != now) {
            return Err(Error::invalid(
                "the backing image cannot be amended: 'stonework img rebase' changes it",
            ));
        }
    }
    Ok(())
}

/// Version 2 can say all that the image says.
fn check_downgrade(present: &Present<'_>) -> Result<(), Error> {
    let header = present.header;
    let features = header.features.incompatible;
    let has = |feature: u64| features & feature != 0;
    let what = if has(Features::DATA_FILE) {
        "an external data file"
    } else if has(Features::EXTENDED_L2) {
        "extended L2 entries"
    } else if has(Features::COMPRESSION) {
        "compression with zstd"
    } else if header.extensions.bitmaps.is_some() {
        "bitmaps, which 'stonework img bitmap --remove' takes away"
    } else if present.discard_no_unref {
        "the option 'discard-no-unref=on', which needs clusters that are zero and keep their place"
    } else {
        return check_snapshots(present);
    };
    Err(Error::unsupported(format!(
        "an image with {what} cannot have 'compat=0.10'"
    )))
}

/// Other programs find a snapshot's disk as long as it was, too.
fn check_snapshots(present: &Present<'_>) -> Result<(), Error> {
    let bytes = present.header.bytes;
    let is_other = |snapshot: &&Snapshot| {
        u32::try_from(snapshot.vm_state_bytes).is_err()
            || snapshot.disk_bytes.is_some_and(|then| then != bytes)
    };
    match present.snapshots.iter().find(is_other) {
        None => Ok(()),
        Some(snapshot) => Err(Error::unsupported(format!(
            "{} has a disk of another length, or a machine's state of 4 GiB or more, which 'compat=0.10' \
             cannot say: delete it",
            snapshot.shown()
        ))),
    }
}

fn check_size(
    options: &Options,
    present: &Present<'_>,
    version: u32,
    force: bool,
) -> Result<(), Error> {
    if options.get("size").is_none() {
        return Ok(());
    }
    let (before, bytes) = (present.header.bytes, options.size(AMEND_OPTIONS, "size"));
    if !bytes.is_multiple_of(SECTOR_BYTES) || bytes > i64::MAX as u64 {
        return Err(Error::invalid(format!(
            "the new size must be a multiple of {SECTOR_BYTES} bytes below 2^63, and {bytes} is not"
        )));
    }
    if bytes < before && !force {
        return Err(Error::invalid(format!(
            "the disk of {before} bytes would get shorter: all data past {bytes} bytes is lost then; '--force' \
             does it all the same"
        )));
    }
    if bytes != before && version < 3 && !present.snapshots.is_empty() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "a disk with snapshots cannot change its length with 'compat=0.10'",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
