//! Header extensions: what a header says beyond its fields (specification, "Header extensions").
//!
//! Extensions that are not known are kept byte for byte, in their order.

use blockcore::{Error, ErrorKind};

use super::bytes::{u32_at, u64_at};
use super::header::{Features, MAX_BITMAPS};
use super::room::{FREE, HEAD_BYTES};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const BITMAPS: u32 = 0x2385_2875;
const LUKS: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
/// Of our own, "StNW": what tells an image from others; see [`Extensions::cookie`].
const COOKIE: u32 = 0x5374_4e57;

/// QEMU takes no longer name of a format.
const MAX_FORMAT_BYTES: usize = 15;
/// Bytes of one entry of the table of feature names: kind, bit, name.
const NAME_BYTES: usize = 48;
/// The cookie, and as much that is zero and may get a meaning.
const COOKIE_BYTES: usize = 32;
/// Longest bitmap directory, as QEMU has it.
pub(crate) const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

/// What the extensions of a header say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    /// The format of the backing image.
    pub(crate) backing_format: Option<String>,
    /// The name of the external data file.
    pub(crate) data_file: Option<String>,
    /// Where the bitmap directory is; `None` also where the header says that it is out of date.
    pub(crate) bitmaps: Option<BitmapDirectory>,
    /// The header names a bitmap directory, and says that it is out of date.
    pub(crate) has_stale_bitmaps: bool,
    /// A number that this image has and its copies have too, until one of them gets another. Means
    /// nothing unless autoclear feature [`Features::SEGMENT`] is set.
    pub(crate) cookie: Option<[u8; 16]>,
    /// Names of features, of those that this program has none for.
    pub(crate) names: Vec<FeatureName>,
    /// Extensions that this program does not know: kind and data.
    pub(crate) unknown: Vec<(u32, Vec<u8>)>,
}

/// Where the bitmap directory is (specification, "Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapDirectory {
    /// How many bitmaps.
    pub(crate) bitmaps: u32,
    /// In bytes, a multiple of the cluster size.
    pub(crate) offset: u64,
    /// How long the directory is, in bytes.
    pub(crate) bytes: u64,
}

/// One entry of the table of feature names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FeatureName {
    /// Which kind of feature.
    pub(crate) kind: FeatureKind,
    /// Which bit, 0 to 63.
    pub(crate) bit: u8,
    /// What to call it.
    pub(crate) name: String,
}

/// Kinds of features; the numbers are those of the table of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FeatureKind {
    /// Whoever does not know it must not open the image.
    Incompatible = 0,
    /// Whoever does not know it may ignore it.
    Compatible = 1,
    /// Whoever does not know it clears it before writing.
    Autoclear = 2,
}

/// What [`FeatureName`]s this program writes: QEMU's, under its names, and ours.
const OWN_NAMES: [(FeatureKind, u64, &str); 9] = [
    (FeatureKind::Incompatible, Features::DIRTY, "dirty bit"),
    (FeatureKind::Incompatible, Features::CORRUPT, "corrupt bit"),
    (
        FeatureKind::Incompatible,
        Features::DATA_FILE,
        "external data file",
    ),
    (
        FeatureKind::Incompatible,
        Features::COMPRESSION,
        "compression type",
    ),
    (
        FeatureKind::Incompatible,
        Features::EXTENDED_L2,
        "extended L2 entries",
    ),
    (
        FeatureKind::Compatible,
        Features::LAZY_REFCOUNTS,
        "lazy refcounts",
    ),
    (FeatureKind::Autoclear, Features::BITMAPS, "bitmaps"),
    (
        FeatureKind::Autoclear,
        Features::RAW_DATA_FILE,
        "raw external data",
    ),
    (
        FeatureKind::Autoclear,
        Features::SEGMENT,
        "stonework crash segment",
    ),
];

fn own_names() -> impl Iterator<Item = FeatureName> {
    OWN_NAMES
        .into_iter()
        .map(|(kind, feature, name)| FeatureName {
            kind,
            bit: feature.trailing_zeros() as u8,
            name: name.to_owned(),
        })
}

impl FeatureName {
    fn is_own(&self) -> bool {
        own_names().any(|own| (own.kind, own.bit) == (self.kind, self.bit))
    }
}

/// What to call bit `bit`: the image's own name for it if it has one.
pub(crate) fn feature_name(names: &[FeatureName], kind: FeatureKind, bit: u8) -> String {
    let named = |name: &&FeatureName| (name.kind, name.bit) == (kind, bit);
    match names.iter().find(named) {
        Some(found) => format!("'{}'", found.name.escape_debug()),
        None => format!("bit {bit}"),
    }
}

/// Where extensions are found, and what the header's fields say that matters to them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    /// Bytes of a cluster.
    pub(crate) cluster_bytes: u64,
    /// Autoclear features that are set.
    pub(crate) autoclear: u64,
}

/// The names of features in `bytes`, whatever else is wrong there: for a message about one of them.
pub(crate) fn find_names(bytes: &[u8]) -> Vec<FeatureName> {
    let mut names = Vec::new();
    let mut rest = bytes;
    while let Ok(Some(found)) = next_extension(rest) {
        if found.kind == FEATURE_NAMES {
            names.extend(parse_names(found.data));
        }
        rest = found.rest;
    }
    names
}

/// One extension among others.
struct Found<'a> {
    kind: u32,
    data: &'a [u8],
    /// What follows it.
    rest: &'a [u8],
}

/// The first extension; `None` at the end.
fn next_extension(bytes: &[u8]) -> Result<Option<Found<'_>>, Error> {
    if bytes.len() < HEAD_BYTES {
        return Ok(None);
    }
    let (kind, length) = (u32_at(bytes, 0), u32_at(bytes, 4) as usize);
    if kind == END {
        return Ok(None);
    }
    let rest = &bytes[HEAD_BYTES..];
    if length > rest.len() {
        return Err(corrupt(format!(
            "header extension {kind:#010x} says that it has {length} bytes, and there are {} up to the \
             end of the header's cluster or the backing name",
            rest.len()
        )));
    }
    let next = length.next_multiple_of(8).min(rest.len());
    Ok(Some(Found {
        kind,
        data: &rest[..length],
        rest: &rest[next..],
    }))
}

fn parse_names(data: &[u8]) -> impl Iterator<Item = FeatureName> + '_ {
    data.chunks_exact(NAME_BYTES).filter_map(|entry| {
        let kind = match entry[0] {
            0 => FeatureKind::Incompatible,
            1 => FeatureKind::Compatible,
            2 => FeatureKind::Autoclear,
            _ => return None,
        };
        let name = &entry[2..];
        let end = name.iter().position(|byte| *byte == 0);
        let name = &name[..end.unwrap_or(name.len())];
        Some(FeatureName {
            kind,
            bit: entry[1],
            name: String::from_utf8_lossy(name).into_owned(),
        })
    })
}

impl Extensions {
    /// The extensions in `bytes`, which begin where the header's fields end and end where the backing
    /// name begins or the cluster ends.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] for one that is longer than there is room or than it may be, or says what
    /// cannot be.
    pub(crate) fn parse(bytes: &[u8], context: Context) -> Result<Self, Error> {
        let mut extensions = Self::default();
        let mut rest = bytes;
        while let Some(found) = next_extension(rest)? {
            extensions.add(found.kind, found.data, context)?;
            rest = found.rest;
        }
        Ok(extensions)
    }

    fn add(&mut self, kind: u32, data: &[u8], context: Context) -> Result<(), Error> {
        match kind {
            BACKING_FORMAT => {
                if data.len() > MAX_FORMAT_BYTES {
                    return Err(corrupt(format!(
                        "the name of the backing image's format has {} bytes; at most {MAX_FORMAT_BYTES} \
                         are allowed",
                        data.len()
                    )));
                }
                self.backing_format = Some(text(data, "the backing image's format")?);
            }
            DATA_FILE => self.data_file = Some(text(data, "the external data file")?),
            FEATURE_NAMES => {
                let foreign = parse_names(data).filter(|name| !name.is_own());
                self.names.extend(foreign);
            }
            BITMAPS => {
                if context.autoclear & Features::BITMAPS == 0 {
                    // Somebody who knows no bitmaps has written since: they mean nothing.
                    self.has_stale_bitmaps = true;
                    return Ok(());
                }
                if self.bitmaps.is_some() {
                    return Err(corrupt("there are two header extensions for bitmaps"));
                }
                self.bitmaps = Some(BitmapDirectory::parse(data, context.cluster_bytes)?);
            }
            LUKS => {
                return Err(corrupt(
                    "there is a header extension for encryption with LUKS, and the header says that the \
                     image is not encrypted",
                ));
            }
            FREE => {}
            COOKIE if data.len() == COOKIE_BYTES => {
                self.cookie = data.first_chunk().copied();
            }
            _ => self.unknown.push((kind, data.to_owned())),
        }
        Ok(())
    }

    /// The bytes of all extensions, the end mark too. With `names`, also the table of feature names:
    /// without it there is room for a long backing name in a small cluster.
    pub(crate) fn serialise(&self, names: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut add = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            add(BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            add(DATA_FILE, name.as_bytes());
        }
        if names {
            add(FEATURE_NAMES, &self.serialise_names());
        }
        if let Some(bitmaps) = &self.bitmaps {
            add(BITMAPS, &bitmaps.serialise());
        }
        if let Some(cookie) = &self.cookie {
            let mut data = cookie.to_vec();
            data.resize(COOKIE_BYTES, 0);
            add(COOKIE, &data);
        }
        for (kind, data) in &self.unknown {
            add(*kind, data);
        }
        add(END, &[]);
        bytes
    }

    fn serialise_names(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for name in own_names().chain(self.names.iter().cloned()) {
            let end = data.len() + NAME_BYTES;
            data.push(name.kind as u8);
            data.push(name.bit);
            data.extend(name.name.as_bytes());
            data.resize(end, 0);
        }
        data
    }
}

impl BitmapDirectory {
    const BYTES: usize = 24;

    fn parse(data: &[u8], cluster_bytes: u64) -> Result<Self, Error> {
        if data.len() != Self::BYTES {
            return Err(corrupt(format!(
                "the bitmaps extension has {} bytes instead of {}",
                data.len(),
                Self::BYTES
            )));
        }
        let found = Self {
            bitmaps: u32_at(data, 0),
            bytes: u64_at(data, 8),
            offset: u64_at(data, 16),
        };
        let wrong = if u32_at(data, 4) != 0 {
            "a reserved field that is not zero".to_owned()
        } else if found.bitmaps == 0 {
            "no bitmaps, and would not be there then".to_owned()
        } else if found.bitmaps > MAX_BITMAPS {
            format!(
                "{} bitmaps; at most {MAX_BITMAPS} are allowed",
                found.bitmaps
            )
        } else if !found.offset.is_multiple_of(cluster_bytes) {
            format!(
                "directory offset {:#x}, which is not a multiple of the cluster size ({cluster_bytes} \
                 bytes)",
                found.offset
            )
        } else if found.bytes > MAX_DIRECTORY_BYTES {
            format!(
                "a directory of {} bytes; at most {MAX_DIRECTORY_BYTES} are allowed",
                found.bytes
            )
        } else if found.offset > i64::MAX as u64 - MAX_DIRECTORY_BYTES {
            format!("directory offset {:#x}, beyond any file", found.offset)
        } else {
            return Ok(found);
        };
        Err(corrupt(format!("the bitmaps extension has {wrong}")))
    }

    /// The extension's data.
    pub(crate) fn serialise(&self) -> Vec<u8> {
        let mut data = self.bitmaps.to_be_bytes().to_vec();
        data.extend([0; 4]);
        data.extend(self.bytes.to_be_bytes());
        data.extend(self.offset.to_be_bytes());
        data
    }
}

fn text(data: &[u8], what: &str) -> Result<String, Error> {
    let text = str::from_utf8(data);
    let text = text.map_err(|_| {
        let message = format!("the name of {what} is not valid UTF-8");
        Error::new(ErrorKind::Unsupported, message)
    })?;
    Ok(text.to_owned())
}

/// An image contradicts its format.
pub(crate) fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}
