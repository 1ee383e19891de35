//! Entries of the table of internal snapshots (specification, "Snapshots").
//!
//! An entry says how long it is in its first bytes ([`SnapshotHead`]), so whoever reads a table knows
//! what to read next without believing more than there may be.

use blockcore::{Error, ErrorKind};

use super::bytes::{u16_at, u32_at, u64_at};
use super::extension::corrupt;
use super::header::MAX_L1_BYTES;
use super::{Geometry, HostOffset};

/// Bytes of an entry's fixed part.
pub(crate) const HEAD_BYTES: usize = 40;
/// Bytes of the extra data that is known: length of the machine's state, of the disk, and a count of
/// instructions.
pub(crate) const KNOWN_EXTRA_BYTES: usize = 24;
/// Least extra data in version 3.
pub(crate) const V3_EXTRA_BYTES: u32 = 16;
/// Most extra data, as QEMU has it.
pub(crate) const MAX_EXTRA_BYTES: u32 = 1024;
/// Longest table, as QEMU has it.
pub(crate) const MAX_TABLE_BYTES: u64 = 1024 * super::header::MAX_SNAPSHOTS as u64;

/// The fixed part of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotHead {
    l1_offset: u64,
    l1_entries: u32,
    id_bytes: u16,
    name_bytes: u16,
    date_seconds: u32,
    date_nanoseconds: u32,
    vm_clock_nanoseconds: u64,
    vm_state_bytes: u32,
    /// How much extra data follows.
    pub(crate) extra_bytes: u32,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// Where its L1 table is.
    pub(crate) l1_offset: u64,
    /// Entries of that.
    pub(crate) l1_entries: u32,
    /// What tells it from the others: a number in text. Any bytes are possible, as in the name.
    pub(crate) id: Vec<u8>,
    /// What a person calls it; not necessarily the only one called so.
    pub(crate) name: Vec<u8>,
    /// When it was made, in seconds since 1970.
    pub(crate) date_seconds: u32,
    /// The rest of a second.
    pub(crate) date_nanoseconds: u32,
    /// How long the machine had been running.
    pub(crate) vm_clock_nanoseconds: u64,
    /// Length of the machine's state, which lies behind the disk's end; 0 if there is none.
    pub(crate) vm_state_bytes: u64,
    /// Length of the disk then; `None`: as it is now.
    pub(crate) disk_bytes: Option<u64>,
    /// How many instructions the machine had executed.
    pub(crate) icount: Option<u64>,
    /// Extra data beyond what is known.
    pub(crate) extra: Vec<u8>,
    /// How much extra data there was in the table.
    pub(crate) extra_bytes: u32,
}

impl SnapshotHead {
    /// The head in the first [`HEAD_BYTES`] bytes of an entry.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        Self {
            l1_offset: u64_at(bytes, 0),
            l1_entries: u32_at(bytes, 8),
            id_bytes: u16_at(bytes, 12),
            name_bytes: u16_at(bytes, 14),
            date_seconds: u32_at(bytes, 16),
            date_nanoseconds: u32_at(bytes, 20),
            vm_clock_nanoseconds: u64_at(bytes, 24),
            vm_state_bytes: u32_at(bytes, 32),
            extra_bytes: u32_at(bytes, 36),
        }
    }

    /// Bytes of the two names, which follow the extra data.
    pub(crate) fn names_bytes(self) -> usize {
        usize::from(self.id_bytes) + usize::from(self.name_bytes)
    }

    /// Bytes of the whole entry, without what fills it up to a multiple of 8.
    pub(crate) fn entry_bytes(self) -> u64 {
        HEAD_BYTES as u64 + u64::from(self.extra_bytes) + self.names_bytes() as u64
    }

    /// Whether there is more extra data than QEMU takes.
    pub(crate) fn has_too_much_extra(self) -> bool {
        self.extra_bytes > MAX_EXTRA_BYTES
    }

    /// The snapshot, with its extra data (or the first [`MAX_EXTRA_BYTES`] of it) and its names.
    pub(crate) fn with(self, extra: &[u8], names: &[u8]) -> Snapshot {
        let known = |at: usize| (extra.len() >= at + 8).then(|| u64_at(extra, at));
        let (id, name) = names.split_at(usize::from(self.id_bytes).min(names.len()));
        Snapshot {
            l1_offset: self.l1_offset,
            l1_entries: self.l1_entries,
            id: id.to_owned(),
            name: name.to_owned(),
            date_seconds: self.date_seconds,
            date_nanoseconds: self.date_nanoseconds,
            vm_clock_nanoseconds: self.vm_clock_nanoseconds,
            vm_state_bytes: known(0).unwrap_or(u64::from(self.vm_state_bytes)),
            disk_bytes: known(8),
            // QEMU writes all ones for "none".
            icount: known(16).filter(|count| *count != u64::MAX),
            extra: extra.get(KNOWN_EXTRA_BYTES..).unwrap_or(&[]).to_owned(),
            extra_bytes: self.extra_bytes,
        }
    }
}

impl Snapshot {
    /// The snapshots of a table of `count` entries that is in `bytes`, and how many of these it takes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`] if the table does not end where `bytes` does or earlier, or has more extra
    /// data than may be.
    pub(crate) fn parse_table(bytes: &[u8], count: u32) -> Result<(Vec<Self>, usize), Error> {
        let (mut snapshots, mut at) = (Vec::new(), 0_usize);
        for index in 0..count {
            at = at.next_multiple_of(8);
            let rest = bytes.get(at..).unwrap_or(&[]);
            let head = rest.get(..HEAD_BYTES).map(SnapshotHead::parse);
            let head = head.filter(|head| head.entry_bytes() <= rest.len() as u64);
            let head = head.ok_or_else(|| {
                corrupt(format!(
                    "entry {index} of the snapshot table does not end where the table does"
                ))
            })?;
            if head.has_too_much_extra() {
                return Err(head.too_much_extra(index));
            }
            let names = HEAD_BYTES + head.extra_bytes as usize;
            let end = names + head.names_bytes();
            snapshots.push(head.with(&rest[HEAD_BYTES..names], &rest[names..end]));
            at += end;
        }
        Ok((snapshots, at))
    }

    /// Where its L1 table is, and how many bytes that has.
    pub(crate) fn l1_range(&self) -> (HostOffset, u64) {
        (HostOffset(self.l1_offset), 8 * u64::from(self.l1_entries))
    }

    /// Whether its L1 table is where one can be, in a file of so many bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Corrupt`], saying why not.
    pub(crate) fn check_l1(&self, geometry: Geometry, file_bytes: u64) -> Result<(), Error> {
        let (HostOffset(offset), bytes) = self.l1_range();
        let is_inside = offset <= file_bytes && bytes <= file_bytes - offset;
        let why = if bytes > MAX_L1_BYTES {
            format!("has {bytes} bytes; at most {MAX_L1_BYTES} are allowed")
        } else if !geometry.is_aligned(offset) {
            format!("is at offset {offset:#x}, where no cluster begins")
        } else if !is_inside && bytes > 0 {
            format!("has {bytes} bytes at offset {offset:#x}, past the end of the file")
        } else {
            return Ok(());
        };
        Err(corrupt(format!("the L1 table of {} {why}", self.shown())))
    }

    /// What to call it in a message.
    pub(crate) fn shown(&self) -> String {
        let [id, name] = [&self.id, &self.name].map(|text| String::from_utf8_lossy(text));
        format!("snapshot '{}' ({})", name.escape_debug(), id.escape_debug())
    }

    /// The table of these snapshots.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NoSpace`] if it would be longer than may be; [`ErrorKind::Invalid`] for a name that
    /// is too long.
    pub(crate) fn serialise_table(snapshots: &[Self]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        for snapshot in snapshots {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            snapshot.serialise(&mut bytes)?;
        }
        if bytes.len() as u64 > MAX_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "the snapshot table would have {} bytes; at most {MAX_TABLE_BYTES} are allowed",
                    bytes.len()
                ),
            ));
        }
        Ok(bytes)
    }

    fn serialise(&self, bytes: &mut Vec<u8>) -> Result<(), Error> {
        let length = |text: &[u8]| {
            u16::try_from(text.len()).map_err(|_| {
                Error::invalid(format!(
                    "the name of a snapshot has {} bytes; at most 65535 are possible",
                    text.len()
                ))
            })
        };
        let mut add = |field: &[u8]| bytes.extend(field);
        add(&self.l1_offset.to_be_bytes());
        add(&self.l1_entries.to_be_bytes());
        add(&length(&self.id)?.to_be_bytes());
        add(&length(&self.name)?.to_be_bytes());
        add(&self.date_seconds.to_be_bytes());
        add(&self.date_nanoseconds.to_be_bytes());
        add(&self.vm_clock_nanoseconds.to_be_bytes());
        // Only the long field can hold it otherwise.
        add(&u32::try_from(self.vm_state_bytes)
            .unwrap_or(0)
            .to_be_bytes());
        add(&((KNOWN_EXTRA_BYTES + self.extra.len()) as u32).to_be_bytes());
        add(&self.vm_state_bytes.to_be_bytes());
        add(&self.disk_bytes.unwrap_or(0).to_be_bytes());
        add(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
        add(&self.extra);
        add(&self.id);
        add(&self.name);
        Ok(())
    }
}

impl SnapshotHead {
    /// What to say of entry `index` with more extra data than QEMU takes.
    pub(crate) fn too_much_extra(self, index: u32) -> Error {
        corrupt(format!(
            "entry {index} of the snapshot table has {} bytes of extra data; at most {MAX_EXTRA_BYTES} are \
             allowed ('check --repair all' cuts it off)",
            self.extra_bytes
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(name: &str) -> Snapshot {
        Snapshot {
            l1_offset: 0x5_0000,
            l1_entries: 3,
            id: "7".into(),
            name: name.into(),
            date_seconds: 1_700_000_000,
            date_nanoseconds: 5,
            vm_clock_nanoseconds: 1 << 40,
            vm_state_bytes: 5 << 32,
            disk_bytes: Some(1 << 30),
            icount: None,
            extra: vec![1, 2, 3, 4],
            extra_bytes: 28,
        }
    }

    #[test]
    fn a_table_survives_the_way_there_and_back() {
        let table = [snapshot("a"), snapshot(""), snapshot("another name")];
        let bytes = Snapshot::serialise_table(&table).unwrap();
        let (parsed, end) = Snapshot::parse_table(&bytes, 3).unwrap();
        assert_eq!((&parsed[..], end), (&table[..], bytes.len()));
        // The second entry begins at a multiple of 8.
        assert_eq!(u64_at(&bytes, 72), 0x5_0000);
    }

    #[test]
    fn an_entry_of_version_2_has_a_short_state_and_no_length() {
        let mut bytes = vec![0; HEAD_BYTES + 2];
        bytes[12..16].copy_from_slice(&[0, 1, 0, 1]);
        bytes[32..36].copy_from_slice(&77_u32.to_be_bytes());
        bytes[40..].copy_from_slice(b"1x");
        let (parsed, _) = Snapshot::parse_table(&bytes, 1).unwrap();
        assert_eq!((parsed[0].vm_state_bytes, parsed[0].disk_bytes), (77, None));
        assert_eq!((&*parsed[0].id, &*parsed[0].name), (&b"1"[..], &b"x"[..]));
    }

    #[test]
    fn a_table_that_claims_more_than_there_is_is_corrupt() {
        let bytes = Snapshot::serialise_table(&[snapshot("a")]).unwrap();
        for end in 0..bytes.len() {
            let error = Snapshot::parse_table(&bytes[..end], 1).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
        let mut huge = bytes.clone();
        huge[36..40].fill(0xff);
        assert!(Snapshot::parse_table(&huge, 1).is_err());
        assert!(Snapshot::parse_table(&bytes, 2).is_err());
        let mut extra = bytes;
        extra[36..40].copy_from_slice(&1025_u32.to_be_bytes());
        extra.resize(2000, 0);
        let error = Snapshot::parse_table(&extra, 1).unwrap_err();
        assert!(
            error.to_string().contains("1025 bytes of extra data"),
            "{error}"
        );
    }
}
