//! A disk's history: what each byte may be, given what was asked, acknowledged and flushed.
//!
//! The model disk of the simulation. Beside [`crate::model`], which real front-ends have, it knows of
//! failed requests, flushes, kills and power cuts, and of units other than sectors.
//!
//! The disk is cells of `grain` bytes; requests cover whole cells. A cell knows every write that it may
//! hold, for a read now and for a reader after a power cut. The rules:
//!
//! * from its beginning on, a write may be seen;
//! * once it has completed, nothing is seen that completed before it began;
//! * a write that failed may be seen, and so may what it would have replaced;
//! * once a flush has succeeded, a power cut leaves nothing that a write had replaced before the flush
//!   began.
//!
//! A write is a tag, and a tag is a pattern of bytes that differs at every offset; tag 0 is zeroes. What is
//! copied from another place keeps its tag, and its pattern is that of the place that it comes from.

use std::fmt;

/// See the module's header.
pub struct History {
    grain: u64,
    cells: Vec<Vec<Version>>,
    /// Counts events.
    time: u32,
    /// When a failed flush last may have lost completed writes.
    lost_at: u32,
    /// When each read under way began.
    reads: Vec<u32>,
}

/// A write that a cell may hold.
#[derive(Clone, Debug)]
struct Version {
    tag: u32,
    /// How far it was copied, modulo 2^64.
    shift: u64,
    /// When its request ended, however; `u32::MAX` while it is under way.
    ended: u32,
    /// When a read first could not see it any more.
    replaced: u32,
    /// Beginning and end of a write that replaced it and that no failed flush has lost.
    buried: Option<(u32, u32)>,
    /// A power cut does not bring it back.
    gone: bool,
}

impl Version {
    /// Zeroes that were always there.
    const ZEROES: Self = Self {
        ended: 0,
        ..Self::begun(0, 0)
    };

    /// One that is under way.
    const fn begun(tag: u32, shift: u64) -> Self {
        Self {
            tag,
            shift,
            ended: u32::MAX,
            replaced: u32::MAX,
            buried: None,
            gone: false,
        }
    }

    /// The byte that it has at `offset`; `None`: any.
    fn byte(&self, offset: u64) -> Option<u8> {
        (self.tag != ANYTHING).then(|| pattern(self.tag, offset.wrapping_sub(self.shift)))
    }

    /// How many of the bytes at `offset` are its own.
    fn matching(&self, offset: u64, bytes: &[u8]) -> usize {
        if self.tag == ANYTHING {
            return bytes.len();
        }
        let own = data(
            self.tag,
            offset.wrapping_sub(self.shift),
            bytes.len() as u64,
        );
        own.iter()
            .zip(bytes)
            .filter(|(one, other)| one == other)
            .count()
    }
}

/// A write under way.
#[must_use]
#[derive(Debug)]
pub struct Write {
    tag: u32,
    offset: u64,
    bytes: u64,
    begun: u32,
}

impl Write {
    /// When it began.
    pub fn begun(&self) -> u32 {
        self.begun
    }
}

/// A copy from another place under way, where it goes to.
#[must_use]
#[derive(Debug)]
pub struct Copy {
    offset: u64,
    bytes: u64,
    begun: u32,
}

/// What a copy may have found in the cells that it comes from.
pub struct Found(Vec<Vec<(u32, u64)>>);

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It completed.
    Done,
    /// It completed and is durable.
    Stable,
    /// It failed: some of it may have happened.
    Failed,
}

/// A read under way.
#[must_use]
#[derive(Debug)]
pub struct Read {
    offset: u64,
    bytes: u64,
    begun: u32,
}

/// A flush under way.
#[must_use]
#[derive(Debug)]
pub struct Flush {
    begun: u32,
    lost_at: u32,
}

/// How a flush ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// What had completed before it is durable.
    Done,
    /// Nothing is known, nothing is lost: it failed and may be tried again, or it did nothing.
    Nothing,
    /// It failed, and what had completed before it may be lost for good.
    Lost,
}

/// A byte that cannot be what it is.
#[derive(Debug)]
pub struct Mismatch(String);

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Tags with this bit have a pattern that can be compressed: it differs every 128 bytes only.
pub const COMPRESSIBLE: u32 = 1 << 31;

/// What a copy under way has put there is not known before it ends; nor is it after a kill.
const ANYTHING: u32 = u32::MAX;

/// What a write of `tag` puts at `offset`.
pub fn pattern(tag: u32, offset: u64) -> u8 {
    if tag == 0 {
        return 0;
    }
    byte_of(word(tag, offset), offset)
}

/// The bytes of a write of `tag` to a range.
pub fn data(tag: u32, offset: u64, bytes: u64) -> Vec<u8> {
    let mut data = vec![0; bytes as usize];
    if tag == 0 {
        return data;
    }
    let mut at = offset;
    while at < offset + bytes {
        let word = word(tag, at);
        let end = (at / 8 * 8 + 8).min(offset + bytes);
        for at in at..end {
            data[(at - offset) as usize] = byte_of(word, at);
        }
        at = end;
    }
    data
}

/// Where bytes found at `offset` come from, as far as that can be told: for the report.
fn origin(found: &[u8], offset: u64) -> String {
    let Some(found) = found.get(..8) else {
        return String::new();
    };
    let mut tags = (0..10_000).flat_map(|tag| [tag, tag | COMPRESSIBLE]);
    match tags.find(|tag| data(*tag, offset, 8) == found) {
        Some(tag) => format!(", what write {tag} put there"),
        None => ", no write's at this place".to_owned(),
    }
}

/// What the bytes of a write of `tag` around `offset` are made of.
fn word(tag: u32, offset: u64) -> u64 {
    let place = match tag & COMPRESSIBLE {
        0 => offset >> 3,
        _ => offset >> 7,
    };
    let word = u64::from(tag).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place;
    word.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

fn byte_of(word: u64, offset: u64) -> u8 {
    (word >> (32 + (offset & 7) * 4)) as u8
}

impl History {
    /// A disk of zeroes, durable ones.
    pub fn new(bytes: u64, grain: u64) -> Self {
        assert!(bytes.is_multiple_of(grain), "a disk of whole cells");
        Self {
            grain,
            cells: vec![vec![Version::ZEROES]; (bytes / grain) as usize],
            time: 0,
            lost_at: 0,
            reads: Vec::new(),
        }
    }

    /// A write of `tag` (zeroing is one of tag 0) is about to be asked for.
    pub fn begin_write(&mut self, tag: u32, offset: u64, bytes: u64) -> Write {
        let begun = self.tick();
        for cell in self.range(offset, bytes) {
            self.cells[cell].push(Version::begun(tag, 0));
        }
        Write {
            tag,
            offset,
            bytes,
            begun,
        }
    }

    /// When the latest event was.
    pub fn now(&self) -> u32 {
        self.time
    }

    /// A write has ended.
    pub fn end_write(&mut self, write: Write, outcome: Outcome) {
        let now = self.tick();
        let oldest_read = self.reads.iter().min().copied().unwrap_or(now);
        let lost_at = self.lost_at;
        for cell in self.range(write.offset, write.bytes) {
            let cell = &mut self.cells[cell];
            let own = cell
                .iter_mut()
                .find(|version| version.tag == write.tag && version.ended == u32::MAX);
            own.expect("begun, and not ended before").ended = now;
            if outcome == Outcome::Failed {
                continue;
            }
            for version in cell.iter_mut().filter(|old| old.ended < write.begun) {
                version.replaced = version.replaced.min(now);
                if version.buried.is_none_or(|(begun, _)| begun <= lost_at) {
                    version.buried = Some((write.begun, now));
                }
                version.gone |= outcome == Outcome::Stable;
            }
            cell.retain(|version| !version.gone || version.replaced >= oldest_read);
        }
    }

    /// A copy into a range is about to be asked for. A read is begun where it comes from, before.
    pub fn begin_copy(&mut self, offset: u64, bytes: u64) -> Copy {
        let begun = self.tick();
        for cell in self.range(offset, bytes) {
            self.cells[cell].push(Version::begun(ANYTHING, u64::from(begun)));
        }
        Copy {
            offset,
            bytes,
            begun,
        }
    }

    /// What a copy that ends now may have found where it comes from.
    pub fn end_found(&mut self, read: Read) -> Found {
        self.reads.retain(|begun| *begun != read.begun);
        let cells = self.range(read.offset, read.bytes).map(|cell| {
            let versions = self.cells[cell].iter();
            let seen = versions.filter(|version| version.replaced >= read.begun);
            seen.map(|version| (version.tag, version.shift)).collect()
        });
        Found(cells.collect())
    }

    /// A copy has ended; `from` is where it comes from.
    pub fn end_copy(&mut self, copy: Copy, from: u64, found: Found, outcome: Outcome) {
        let now = self.tick();
        let oldest_read = self.reads.iter().min().copied().unwrap_or(now);
        let lost_at = self.lost_at;
        for (cell, found) in self.range(copy.offset, copy.bytes).zip(found.0) {
            let cell = &mut self.cells[cell];
            let before = cell.len();
            cell.retain(|version| {
                let own = version.tag == ANYTHING && version.shift == u64::from(copy.begun);
                !own || version.ended != u32::MAX
            });
            assert_eq!(cell.len() + 1, before, "begun, and not ended before");
            if outcome != Outcome::Failed {
                for version in cell.iter_mut().filter(|old| old.ended < copy.begun) {
                    version.replaced = version.replaced.min(now);
                    if version.buried.is_none_or(|(begun, _)| begun <= lost_at) {
                        version.buried = Some((copy.begun, now));
                    }
                }
            }
            let shift = copy.offset.wrapping_sub(from);
            cell.extend(found.into_iter().map(|(tag, already)| Version {
                ended: now,
                ..Version::begun(tag, already.wrapping_add(shift))
            }));
            cell.retain(|version| !version.gone || version.replaced >= oldest_read);
        }
    }

    /// A write was refused before anything of it happened.
    pub fn refuse_write(&mut self, write: Write) {
        for cell in self.range(write.offset, write.bytes) {
            let cell = &mut self.cells[cell];
            let mut versions = cell.iter();
            let own =
                versions.position(|version| version.tag == write.tag && version.ended == u32::MAX);
            cell.remove(own.expect("begun, and not ended before"));
        }
    }

    /// A discard has ended well: the range holds what it held, or zeroes.
    pub fn end_discard(&mut self, write: Write) {
        assert_eq!(write.tag, 0, "a discard begins as a write of zeroes");
        self.end_write(write, Outcome::Failed);
    }

    /// A read is about to be asked for.
    pub fn begin_read(&mut self, offset: u64, bytes: u64) -> Read {
        let begun = self.tick();
        self.reads.push(begun);
        Read {
            offset,
            bytes,
            begun,
        }
    }

    /// A read has ended: well, with what it read (all or the beginning), or with nothing to look at.
    pub fn end_read(&mut self, read: Read, data: Option<&[u8]>) -> Result<(), Mismatch> {
        self.reads.retain(|begun| *begun != read.begun);
        let Some(data) = data else { return Ok(()) };
        assert!(data.len() as u64 <= read.bytes);
        self.check(read.offset, data, "read", |version| {
            version.replaced >= read.begun
        })
    }

    /// Whether no write to a range was under way at any time since `begun`, but the one that ended at
    /// `ended`.
    pub fn is_untouched(&self, offset: u64, bytes: u64, begun: u32, ended: u32) -> bool {
        let mut cells = self.range(offset, bytes);
        cells.all(|cell| {
            let mut versions = self.cells[cell].iter();
            versions.all(|version| version.ended < begun || version.ended == ended)
        })
    }

    /// A flush is about to be asked for.
    pub fn begin_flush(&mut self) -> Flush {
        Flush {
            begun: self.tick(),
            lost_at: self.lost_at,
        }
    }

    /// A flush has ended.
    pub fn end_flush(&mut self, flush: Flush, flushed: Flushed) {
        let now = self.tick();
        match flushed {
            Flushed::Nothing => {}
            Flushed::Lost => self.lost_at = now,
            Flushed::Done => {
                let oldest_read = self.reads.iter().min().copied().unwrap_or(now);
                for cell in self.cells.iter_mut().filter(|cell| cell.len() > 1) {
                    for version in cell.iter_mut() {
                        version.gone |= version.buried.is_some_and(|(begun, ended)| {
                            begun > flush.lost_at && ended < flush.begun
                        });
                    }
                    cell.retain(|version| !version.gone || version.replaced >= oldest_read);
                }
            }
        }
    }

    /// The process was killed, and all that it had under way has landed or never will. A flush among it
    /// may have failed unheard.
    pub fn killed(&mut self, flush_may_have_failed: bool) {
        let now = self.tick();
        self.reads.clear();
        for version in self.cells.iter_mut().flatten() {
            version.ended = version.ended.min(now);
        }
        if flush_may_have_failed {
            self.lost_at = now;
        }
    }

    /// What the disk holds now, with nothing under way.
    pub fn check_now(&self, contents: &[u8]) -> Result<(), Mismatch> {
        self.check(0, contents, "disk", |version| version.replaced == u32::MAX)
    }

    /// What the disk would hold if the power were cut now, as far as `contents` go.
    pub fn check_power_cut(&self, contents: &[u8]) -> Result<(), Mismatch> {
        self.check(0, contents, "disk after a power cut", |version| {
            !version.gone
        })
    }

    /// How long the disk is.
    pub fn bytes(&self) -> u64 {
        self.grain * self.cells.len() as u64
    }

    /// The disk has another length. What is added reads as zeroes, durably.
    pub fn set_bytes(&mut self, bytes: u64) {
        assert!(bytes.is_multiple_of(self.grain), "a disk of whole cells");
        let zeroes = vec![Version::ZEROES];
        self.cells.resize((bytes / self.grain) as usize, zeroes);
    }

    /// The power was cut, and this is what the disk holds now. It is the whole history from here on.
    pub fn power_cut(&mut self, contents: &[u8]) -> Result<(), Mismatch> {
        self.check_power_cut(contents)?;
        self.tick();
        self.reads.clear();
        self.keep_what_is_seen(contents, |_, _| false);
        Ok(())
    }

    /// The process was killed, and with it went what it kept to itself. This is what the disk holds now; a
    /// power cut may bring something else back, unless a flush comes first. All that was under way has
    /// landed or never will.
    pub fn killed_with(&mut self, contents: &[u8]) -> Result<(), Mismatch> {
        self.check_power_cut(contents)?;
        let now = self.tick();
        self.reads.clear();
        self.keep_what_is_seen(contents, |version, is_seen| {
            version.replaced = if is_seen { u32::MAX } else { now };
            version.buried = (!is_seen).then_some((now, now));
            true
        });
        Ok(())
    }

    /// Of each cell, what can be seen in `contents`, and of the rest what `keep` says.
    fn keep_what_is_seen(&mut self, contents: &[u8], keep: impl Fn(&mut Version, bool) -> bool) {
        let (now, grain) = (self.time, self.grain as usize);
        for (index, cell) in self.cells.iter_mut().enumerate() {
            let offset = index as u64 * self.grain;
            let bytes = &contents[index * grain..(index + 1) * grain];
            cell.retain(|version| !version.gone);
            let matching = |version: &Version| version.matching(offset, bytes);
            // Torn by sectors it may hold two writes; otherwise it holds one.
            let is_one = cell.iter().any(|version| matching(version) == grain);
            let least = if is_one { grain } else { 1 };
            cell.retain_mut(|version| {
                version.ended = version.ended.min(now);
                let is_seen = matching(version) >= least;
                if is_seen {
                    version.replaced = u32::MAX;
                    version.buried = None;
                }
                keep(version, is_seen) || is_seen
            });
        }
    }

    fn check(
        &self,
        offset: u64,
        data: &[u8],
        what: &str,
        possible: impl Fn(&Version) -> bool,
    ) -> Result<(), Mismatch> {
        let mut next = 0;
        while next < data.len() {
            // Mostly a cell holds one write.
            let at = offset + next as u64;
            let end = ((at / self.grain + 1) * self.grain - offset).min(data.len() as u64) as usize;
            let part = &data[next..end];
            let cell = &self.cells[(at / self.grain) as usize];
            let mut versions = cell.iter().filter(|version| possible(version));
            let is_one = versions.any(|version| version.matching(at, part) == part.len());
            if !is_one {
                self.check_bytes(at, part, what, &possible)?;
            }
            next = end;
        }
        Ok(())
    }

    /// As [`check`](Self::check), byte by byte.
    fn check_bytes(
        &self,
        offset: u64,
        data: &[u8],
        what: &str,
        possible: impl Fn(&Version) -> bool,
    ) -> Result<(), Mismatch> {
        for (at, byte) in (offset..).zip(data) {
            let cell = &self.cells[(at / self.grain) as usize];
            let mut versions = cell.iter().filter(|version| possible(version));
            if !versions.any(|version| version.byte(at).is_none_or(|own| own == *byte)) {
                let run = (at..offset + data.len() as u64)
                    .take_while(|at| {
                        let cell = &self.cells[(at / self.grain) as usize];
                        let byte = data[(at - offset) as usize];
                        !cell
                            .iter()
                            .any(|v| possible(v) && v.byte(*at).is_none_or(|own| own == byte))
                    })
                    .count();
                let found = &data[(at - offset) as usize..];
                return Err(Mismatch(format!(
                    "{what}: byte {at:#x} is {byte:#04x} (and {run} bytes from it are wrong{}); it may \
                     be {}; its history is {cell:?} at {}, flush lost at {}",
                    origin(found, at),
                    cell.iter()
                        .filter(|version| possible(version))
                        .map(|v| format!("{:#04x?} (write {})", v.byte(at), v.tag))
                        .collect::<Vec<_>>()
                        .join(" or "),
                    self.time,
                    self.lost_at,
                )));
            }
        }
        Ok(())
    }

    fn range(&self, offset: u64, bytes: u64) -> std::ops::Range<usize> {
        debug_assert!((offset | bytes).is_multiple_of(self.grain));
        (offset / self.grain) as usize..((offset + bytes) / self.grain) as usize
    }

    fn tick(&mut self) -> u32 {
        self.time += 1;
        self.time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 64;

    fn disk() -> History {
        History::new(BYTES, 16)
    }

    fn write(disk: &mut History, tag: u32, outcome: Outcome) {
        let write = disk.begin_write(tag, 16, 32);
        disk.end_write(write, outcome);
    }

    fn with(tag: u32) -> Vec<u8> {
        let mut bytes = vec![0; BYTES as usize];
        bytes[16..48].copy_from_slice(&data(tag, 16, 32));
        bytes
    }

    fn reads(disk: &mut History, bytes: &[u8]) -> bool {
        let read = disk.begin_read(0, BYTES);
        disk.end_read(read, Some(bytes)).is_ok()
    }

    #[test]
    fn a_completed_write_is_read_and_nothing_before_it() {
        let mut disk = disk();
        write(&mut disk, 1, Outcome::Done);
        write(&mut disk, 2, Outcome::Done);
        assert!(reads(&mut disk, &with(2)));
        assert!(!reads(&mut disk, &with(1)));
        assert!(!reads(&mut disk, &with(0)));
        let mut one_byte_off = with(2);
        one_byte_off[47] ^= 1;
        assert!(!reads(&mut disk, &one_byte_off));
    }

    #[test]
    fn a_failed_write_is_read_or_what_was_there() {
        let mut disk = disk();
        write(&mut disk, 1, Outcome::Done);
        write(&mut disk, 2, Outcome::Failed);
        assert!(reads(&mut disk, &with(2)));
        assert!(reads(&mut disk, &with(1)));
        assert!(!reads(&mut disk, &with(0)));
        let mut torn = with(1);
        torn[16..24].copy_from_slice(&with(2)[16..24]);
        assert!(reads(&mut disk, &torn));
    }

    #[test]
    fn writes_at_the_same_time_end_in_either_order() {
        let mut disk = disk();
        let one = disk.begin_write(1, 16, 32);
        let two = disk.begin_write(2, 16, 32);
        disk.end_write(one, Outcome::Done);
        disk.end_write(two, Outcome::Done);
        assert!(reads(&mut disk, &with(1)) && reads(&mut disk, &with(2)));
        assert!(!reads(&mut disk, &with(0)));
    }

    #[test]
    fn a_read_may_give_what_was_there_when_it_began() {
        let mut disk = disk();
        let read = disk.begin_read(0, BYTES);
        write(&mut disk, 1, Outcome::Done);
        write(&mut disk, 2, Outcome::Stable);
        assert!(disk.end_read(read, Some(&with(0))).is_ok());
        assert!(!reads(&mut disk, &with(0)));
    }

    #[test]
    fn a_power_cut_may_undo_what_was_not_flushed_and_nothing_else() {
        for (flushed, may_be) in [
            (Flushed::Done, [false, true, true]),
            (Flushed::Nothing, [true, true, true]),
        ] {
            for (tag, may_be) in may_be.into_iter().enumerate() {
                let mut disk = disk();
                write(&mut disk, 1, Outcome::Done);
                let flush = disk.begin_flush();
                write(&mut disk, 2, Outcome::Done);
                disk.end_flush(flush, flushed);
                let result = disk.power_cut(&with(tag as u32));
                assert_eq!(result.is_ok(), may_be, "{flushed:?} {tag}");
            }
        }
    }

    #[test]
    fn what_a_killed_process_kept_to_itself_may_come_back_only_until_the_next_flush() {
        let mut disk = disk();
        write(&mut disk, 1, Outcome::Done);
        write(&mut disk, 2, Outcome::Done);
        assert!(disk.killed_with(&with(3)).is_err());
        disk.killed_with(&with(1)).unwrap();
        assert!(reads(&mut disk, &with(1)) && !reads(&mut disk, &with(2)));
        assert!(disk.check_power_cut(&with(2)).is_ok());
        let flush = disk.begin_flush();
        disk.end_flush(flush, Flushed::Done);
        assert!(disk.check_power_cut(&with(1)).is_ok());
        assert!(disk.check_power_cut(&with(2)).is_err());
    }

    #[test]
    fn after_a_lost_flush_only_writes_since_then_can_be_made_durable() {
        let mut disk = disk();
        write(&mut disk, 1, Outcome::Done);
        let lost = disk.begin_flush();
        disk.end_flush(lost, Flushed::Lost);
        let flush = disk.begin_flush();
        disk.end_flush(flush, Flushed::Done);
        assert!(disk.power_cut(&with(0)).is_ok());

        let mut disk = self::disk();
        write(&mut disk, 1, Outcome::Done);
        let lost = disk.begin_flush();
        disk.end_flush(lost, Flushed::Lost);
        write(&mut disk, 2, Outcome::Done);
        let flush = disk.begin_flush();
        disk.end_flush(flush, Flushed::Done);
        assert!(disk.power_cut(&with(0)).is_err());
        assert!(disk.power_cut(&with(2)).is_ok());
    }

    #[test]
    fn a_flush_that_overlaps_a_lost_one_and_succeeds_is_held_to_it() {
        let mut disk = disk();
        write(&mut disk, 1, Outcome::Done);
        let (lost, flush) = (disk.begin_flush(), disk.begin_flush());
        disk.end_flush(lost, Flushed::Lost);
        disk.end_flush(flush, Flushed::Done);
        assert!(disk.power_cut(&with(0)).is_err());
    }

    #[test]
    fn a_stable_write_survives_the_power_cut_and_what_it_replaced_does_not() {
        let mut disk = disk();
        write(&mut disk, 1, Outcome::Stable);
        assert!(disk.power_cut(&with(0)).is_err());
        assert!(disk.power_cut(&with(1)).is_ok());
        assert!(!reads(&mut disk, &with(0)));
    }

    #[test]
    fn a_copy_is_what_was_at_the_other_place_while_it_was_made_and_nothing_else() {
        let (mut disk, mut other) = (disk(), History::new(BYTES, 16));
        write(&mut disk, 1, Outcome::Done);
        write(&mut disk, 2, Outcome::Done);
        let read = disk.begin_read(16, 32);
        let copy = other.begin_copy(0, 32);
        assert!(reads(&mut other, &[0; BYTES as usize]));
        let late = disk.begin_write(3, 16, 16);
        let found = disk.end_found(read);
        disk.end_write(late, Outcome::Done);
        other.end_copy(copy, 16, found, Outcome::Done);
        let moved = |first: u32, second: u32| {
            let mut bytes = vec![0; BYTES as usize];
            bytes[..16].copy_from_slice(&data(first, 16, 16));
            bytes[16..32].copy_from_slice(&data(second, 32, 16));
            bytes
        };
        assert!(reads(&mut other, &moved(2, 2)) && reads(&mut other, &moved(3, 2)));
        assert!(!reads(&mut other, &moved(1, 2)) && !reads(&mut other, &moved(2, 3)));
        assert!(!reads(&mut other, &[0; BYTES as usize]));
        // From there to a third place, and back.
        let read = other.begin_read(0, 16);
        let copy = disk.begin_copy(48, 16);
        let found = other.end_found(read);
        disk.end_copy(copy, 0, found, Outcome::Failed);
        for last in [vec![0; 16], data(2, 16, 16), data(3, 16, 16)] {
            let read = disk.begin_read(48, 16);
            assert!(disk.end_read(read, Some(&last)).is_ok());
        }
        let read = disk.begin_read(48, 16);
        assert!(disk.end_read(read, Some(&data(2, 48, 16))).is_err());
    }

    #[test]
    fn a_write_that_a_kill_cut_off_may_be_seen_until_another_completes() {
        let mut disk = disk();
        let _cut_off = disk.begin_write(1, 16, 32);
        disk.killed(false);
        assert!(reads(&mut disk, &with(1)) && reads(&mut disk, &with(0)));
        write(&mut disk, 2, Outcome::Done);
        assert!(!reads(&mut disk, &with(1)));
        assert!(disk.check_now(&with(2)).is_ok());
    }

    #[test]
    fn patterns_of_two_writes_and_of_two_places_differ() {
        let one = data(1, 0, 4096);
        let two = data(2, 0, 4096);
        let equal = one.iter().zip(&two).filter(|(a, b)| a == b).count();
        assert!(equal < 100, "{equal}");
        let shifted = one.iter().zip(&one[512..]).filter(|(a, b)| a == b).count();
        assert!(shifted < 100, "{shifted}");
    }
}
