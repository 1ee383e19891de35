//! [`CrashSegment`]: metadata that has changed and is not in the image yet, where it outlives this process.
//!
//! A guest has been told that its write completed; the entry that maps it may be in this process's memory
//! only. So every change of a table is recorded in shared memory as well, before the request completes. A
//! later process finds the records and puts them into the image, in the order in which a round of the
//! committer would (`replay`).
//!
//! **What is there**: a head, which names the image and its opening; the clusters that are reserved and not
//! mapped; and a ring of records. Each record says what a place in the image holds from then on, so that
//! putting records there again changes nothing. A record is made in the lock under which what it tells of
//! changes; so two that tell of one place are in order.
//!
//! **Holes.** A record counts once its tag, which has its number, is stored. One whose process ended
//! half-way does not count, and nothing that completed rests on it.
//!
//! **Room.** A round that has succeeded has made all records superfluous that were there when it began.
//! When there is no room, nothing more is recorded, since later records may rest on the one that is missing,
//! until a round that began after that has succeeded; requests wait for a round before they complete
//! meanwhile.
//!
//! What an earlier process left is not trusted: see `replay`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blockcore::engine::Segment;

use super::layout::HostOffset;
use super::refcount::{BlockNumber, ClusterNumber, Run};

/// Bytes of a segment.
pub(super) const BYTES: u64 = 1 << 20;
/// `stonewk` and the version of what is described here.
const MAGIC: u64 = u64::from_be_bytes(*b"stonewk\x01");

/// Words of the head.
const HEAD_WORDS: usize = 128;
const AT_MAGIC: usize = 0;
const AT_COOKIE: usize = 1;
const AT_DEVICE: usize = 2;
const AT_INODE: usize = 3;
/// The number of the first record that counts.
const AT_FIRST: usize = 4;
/// Where the reserved clusters begin. What there is no room for leaks when the process is killed.
const AT_RESERVED: usize = 64;
/// A reserved extent is one word, so that it changes at once: its first cluster above, how many below.
const RESERVED_COUNT_BITS: u32 = 24;

/// Words of a record: its tag, and three that depend on its kind.
const RECORD_WORDS: usize = 4;
/// The tag's bits that tell the kind.
const KIND_BITS: u32 = 8;

/// Which image, and which opening of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// The cookie in the image's header.
    pub(super) cookie: u64,
    /// The device that the image's file is on.
    pub(super) device: u64,
    /// The file's number there.
    pub(super) inode: u64,
}

/// What a place in the image holds from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// An L2 entry; the second word is of use for extended ones.
    L2(HostOffset, u64, u64),
    /// An entry of the L1 table.
    L1(HostOffset, u64),
    /// The count of a cluster.
    Count(ClusterNumber, u64),
    /// Clusters whose counts are 1.
    Taken(Run),
    /// A new refcount block, in which only the first cluster counts, as 1: itself.
    Block(BlockNumber, HostOffset),
}

impl Record {
    fn to_words(self) -> (u64, [u64; 3]) {
        match self {
            Self::L2(place, word, second) => (1, [place.0, word, second]),
            Self::L1(place, word) => (2, [place.0, word, 0]),
            Self::Count(cluster, count) => (3, [cluster, count, 0]),
            Self::Taken(run) => (4, [run.start, run.count, 0]),
            Self::Block(block, place) => (5, [block, place.0, 0]),
        }
    }

    fn from_words(kind: u64, [one, two, three]: [u64; 3]) -> Option<Self> {
        Some(match kind {
            1 => Self::L2(HostOffset(one), two, three),
            2 => Self::L1(HostOffset(one), two),
            3 => Self::Count(one, two),
            4 => Self::Taken(Run {
                start: one,
                count: two,
            }),
            5 => Self::Block(one, HostOffset(two)),
            _ => return None,
        })
    }
}

/// See the module's header.
pub(super) struct CrashSegment {
    memory: Arc<Segment>,
    path: PathBuf,
    /// The number of the next record.
    next: AtomicU64,
    /// As in the head.
    first: AtomicU64,
    /// How often there was no room, and how many of these times a round has made up for.
    overflows: AtomicU64,
    made_up_for: AtomicU64,
    /// It is nobody's any more.
    closed: AtomicBool,
}

/// What a round that begins will have made superfluous.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    next: u64,
    overflows: u64,
}

impl CrashSegment {
    /// Makes `memory` the segment of `owner`, without records.
    pub(super) fn new(memory: Arc<Segment>, path: PathBuf, owner: Owner) -> Self {
        let words = memory.words();
        // It belongs to nobody until all of it is as it should be.
        words[AT_MAGIC].store(0, Ordering::SeqCst);
        for word in &words[1..] {
            word.store(0, Ordering::Relaxed);
        }
        words[AT_COOKIE].store(owner.cookie, Ordering::Relaxed);
        words[AT_DEVICE].store(owner.device, Ordering::Relaxed);
        words[AT_INODE].store(owner.inode, Ordering::Relaxed);
        words[AT_MAGIC].store(MAGIC, Ordering::SeqCst);
        Self {
            memory,
            path,
            next: AtomicU64::new(0),
            first: AtomicU64::new(0),
            overflows: AtomicU64::new(0),
            made_up_for: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// The file that it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Records a change, in the lock under which it is made. Returns false if it could not: the request
    /// that made it must wait for a round that begins after the change.
    pub(super) fn record(&self, record: Record) -> bool {
        if !self.is_open() {
            return false;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if number - self.first.load(Ordering::Acquire) >= self.capacity() {
            self.overflows.fetch_add(1, Ordering::SeqCst);
            return false;
        }
        let (kind, values) = record.to_words();
        let slot = self.slot(number);
        for (word, value) in slot[1..].iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
        // After the words that it vouches for.
        slot[0].store((number + 1) << KIND_BITS | kind, Ordering::Release);
        true
    }

    /// The extents that are reserved and not mapped. Before a cluster of them is handed out that is not among
    /// them any more.
    pub(super) fn set_reserved(&self, extents: impl Iterator<Item = Run>) {
        let words = &self.memory.words()[AT_RESERVED..HEAD_WORDS];
        let values = extents
            .map(|run| run.start << RESERVED_COUNT_BITS | run.count)
            .chain(std::iter::repeat(0));
        for (word, value) in words.iter().zip(values) {
            if word.load(Ordering::Relaxed) != value {
                word.store(value, Ordering::Release);
            }
        }
    }

    /// Whether a round should make room soon.
    pub(super) fn is_crowded(&self) -> bool {
        let used = self.next.load(Ordering::Relaxed) - self.first.load(Ordering::Relaxed);
        used * 2 > self.capacity()
    }

    /// A round begins: it makes superfluous what is recorded now. Before it looks at what has changed.
    pub(super) fn mark(&self) -> Mark {
        Mark {
            overflows: self.overflows.load(Ordering::SeqCst),
            next: self.next.load(Ordering::SeqCst),
        }
    }

    /// The round has succeeded.
    pub(super) fn forget_until(&self, mark: Mark) {
        self.memory.words()[AT_FIRST].store(mark.next, Ordering::Release);
        self.first.store(mark.next, Ordering::Release);
        self.made_up_for.store(mark.overflows, Ordering::SeqCst);
    }

    /// Nothing is recorded any more, for good: who changes something waits for a round.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.memory.words()[AT_MAGIC].store(0, Ordering::SeqCst);
    }

    /// Whether what changes is recorded.
    pub(super) fn is_open(&self) -> bool {
        let overflows = self.overflows.load(Ordering::SeqCst);
        overflows == self.made_up_for.load(Ordering::SeqCst) && !self.closed.load(Ordering::Acquire)
    }

    fn capacity(&self) -> u64 {
        capacity(&self.memory)
    }

    fn slot(&self, number: u64) -> &[AtomicU64] {
        slot(&self.memory, number)
    }
}

fn capacity(memory: &Segment) -> u64 {
    ((memory.words().len() - HEAD_WORDS) / RECORD_WORDS) as u64
}

fn slot(memory: &Segment, number: u64) -> &[AtomicU64] {
    let index = (number % capacity(memory)) as usize;
    let begin = HEAD_WORDS + index * RECORD_WORDS;
    &memory.words()[begin..begin + RECORD_WORDS]
}

/// What an earlier process left.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// Records, in order.
    pub(super) records: Vec<Record>,
    /// Extents that were reserved and not mapped.
    pub(super) reserved: Vec<Run>,
}

/// Reads what a process left in `memory`, if it was `owner`'s. `Err` where a record is none.
pub(super) fn read(memory: &Segment, owner: Owner) -> Option<Result<Left, String>> {
    let words = memory.words();
    let at = |index: usize| words[index].load(Ordering::Acquire);
    let found = Owner {
        cookie: at(AT_COOKIE),
        device: at(AT_DEVICE),
        inode: at(AT_INODE),
    };
    if at(AT_MAGIC) != MAGIC || found != owner {
        return None;
    }
    let mut left = Left::default();
    for index in AT_RESERVED..HEAD_WORDS {
        let word = at(index);
        if word != 0 {
            left.reserved.push(Run {
                start: word >> RESERVED_COUNT_BITS,
                count: word & ((1 << RESERVED_COUNT_BITS) - 1),
            });
        }
    }
    let first = at(AT_FIRST);
    for number in first..first.saturating_add(capacity(memory)) {
        let words = slot(memory, number);
        let tag = words[0].load(Ordering::Acquire);
        // Another life of the slot, or nothing yet: a later record may count all the same.
        if tag >> KIND_BITS != number.wrapping_add(1) & (u64::MAX >> KIND_BITS) {
            continue;
        }
        let value = |index: usize| words[index].load(Ordering::Relaxed);
        let kind = tag & ((1 << KIND_BITS) - 1);
        match Record::from_words(kind, [value(1), value(2), value(3)]) {
            Some(record) => left.records.push(record),
            None => return Some(Err(format!("record {number} is of an unknown kind {kind}"))),
        }
    }
    Some(Ok(left))
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use blockcore::engine::{EngineChoice, HostCall, HostReply, make};
    use blockcore::io::IoContext;

    use super::*;

    const OWNER: Owner = Owner {
        cookie: 7,
        device: 1,
        inode: 2,
    };

    /// Memory with room for four records.
    fn memory() -> Arc<Segment> {
        let directory = tempfile::tempdir().unwrap();
        let context = IoContext::new(make(EngineChoice::Threads).unwrap());
        let call = HostCall::OpenSegment {
            path: directory.path().join("segment"),
            bytes: 8 * (HEAD_WORDS + 4 * RECORD_WORDS) as u64,
        };
        let inner = Rc::clone(&context);
        match context.block_on(async move { inner.host(call).await }) {
            // It stays as long as it is mapped.
            Ok(HostReply::Segment { segment, .. }) => segment,
            other => panic!("{other:?}"),
        }
    }

    fn count(cluster: u64) -> Record {
        Record::Count(cluster, 1)
    }

    #[test]
    fn what_was_recorded_is_read_by_its_owner_only() {
        let memory = memory();
        let segment = CrashSegment::new(Arc::clone(&memory), "/run/segment".into(), OWNER);
        let records = [
            Record::L2(HostOffset(8), 1, 2),
            Record::L1(HostOffset(16), 3),
            Record::Taken(Run { start: 5, count: 6 }),
            Record::Block(1, HostOffset(512)),
        ];
        for record in records {
            assert!(segment.record(record));
        }
        segment.set_reserved([Run { start: 9, count: 2 }].into_iter());
        let left = read(&memory, OWNER).unwrap().unwrap();
        assert_eq!(left.records, records);
        assert_eq!(left.reserved, [Run { start: 9, count: 2 }]);
        let other = Owner { cookie: 8, ..OWNER };
        assert_eq!(read(&memory, other), None);
        segment.close();
        assert_eq!(read(&memory, OWNER), None);
        CrashSegment::new(Arc::clone(&memory), "/run/segment".into(), other);
        assert_eq!(read(&memory, other), Some(Ok(Left::default())));
    }

    #[test]
    fn a_round_makes_room_for_what_was_recorded_when_it_began() {
        let memory = memory();
        let segment = CrashSegment::new(Arc::clone(&memory), "/run/segment".into(), OWNER);
        for cluster in 0..3 {
            assert!(segment.record(count(cluster)));
        }
        let mark = segment.mark();
        assert!(segment.record(count(3)));
        segment.forget_until(mark);
        assert!(segment.record(count(4)));
        let left = read(&memory, OWNER).unwrap().unwrap();
        assert_eq!(left.records, [count(3), count(4)]);
    }

    #[test]
    fn without_room_nothing_is_recorded_until_a_round_that_began_afterwards() {
        let memory = memory();
        let segment = CrashSegment::new(Arc::clone(&memory), "/run/segment".into(), OWNER);
        let too_early = segment.mark();
        for cluster in 0..4 {
            assert!(segment.record(count(cluster)));
        }
        assert!(!segment.record(count(4)));
        segment.forget_until(too_early);
        assert!(!segment.record(count(5)));
        let mark = segment.mark();
        segment.forget_until(mark);
        assert!(segment.record(count(6)));
        let left = read(&memory, OWNER).unwrap().unwrap();
        assert_eq!(left.records, [count(6)]);
    }

    #[test]
    fn a_record_that_was_never_finished_is_left_out_and_those_after_it_count() {
        let memory = memory();
        let segment = CrashSegment::new(Arc::clone(&memory), "/run/segment".into(), OWNER);
        for cluster in 0..3 {
            assert!(segment.record(count(cluster)));
        }
        slot(&memory, 1)[0].store(0, Ordering::Relaxed);
        let left = read(&memory, OWNER).unwrap().unwrap();
        assert_eq!(left.records, [count(0), count(2)]);
        slot(&memory, 1)[0].store(2 << KIND_BITS | 99, Ordering::Relaxed);
        assert!(read(&memory, OWNER).unwrap().is_err());
    }
}
