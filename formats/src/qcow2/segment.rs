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
//! **Room.** The host's memory is taken for records in chunks, as the ring advances, and given back behind it:
//! a disk whose guest flushes often takes little, one that maps many clusters between two flushes need not be
//! held up by rounds. A round that has succeeded has made all records superfluous that were there when it began.
//! When there is no room, nothing more is recorded, since later records may rest on the one that is missing,
//! until a round that began after that has succeeded; requests wait for a round before they complete
//! meanwhile.
//!
//! What an earlier process left is not trusted: see `replay`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blockcore::engine::Segment;

use super::layout::HostOffset;
use super::refcount::{BlockNumber, ClusterNumber, Run};

/// Bytes of a segment: its head's page, and chunks.
pub(super) const BYTES: u64 = (8 << 20) + 8 * RECORDS_AT as u64;
/// `stonewk` and the version of what is described here.
const MAGIC: u64 = u64::from_be_bytes(*b"stonewk\x02");

/// Words of the head.
const HEAD_WORDS: usize = 128;
const AT_MAGIC: usize = 0;
const AT_COOKIE: usize = 1;
const AT_DEVICE: usize = 2;
const AT_INODE: usize = 3;
/// The number of the first record that counts.
const AT_FIRST: usize = 4;
/// The number of the first record for which there is no memory yet.
const AT_END: usize = 5;
/// Where the reserved clusters begin. What there is no room for leaks when the process is killed.
const AT_RESERVED: usize = 64;
/// A reserved extent is one word, so that it changes at once: its first cluster above, how many below.
const RESERVED_COUNT_BITS: u32 = 24;

/// Where the first record is, so that chunks begin with a page.
const RECORDS_AT: usize = 512;
/// How many chunks there are, of as many records each. Memory is taken for one at a time.
const CHUNKS: u64 = 32;

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
    /// How many records a chunk has.
    chunk: u64,
    /// The number of the next record.
    next: AtomicU64,
    /// As in the head.
    first: AtomicU64,
    end: AtomicU64,
    /// Held while memory is taken and given back.
    chunks: Mutex<()>,
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
    /// Makes `memory`, which has space for its head, the segment of `owner`, without records.
    pub(super) fn new(memory: Arc<Segment>, path: PathBuf, owner: Owner) -> Self {
        let words = memory.words();
        // It belongs to nobody until all of it is as it should be.
        words[AT_MAGIC].store(0, Ordering::SeqCst);
        for word in &words[1..RECORDS_AT] {
            word.store(0, Ordering::Relaxed);
        }
        memory.give_back(RECORDS_AT..words.len());
        words[AT_COOKIE].store(owner.cookie, Ordering::Relaxed);
        words[AT_DEVICE].store(owner.device, Ordering::Relaxed);
        words[AT_INODE].store(owner.inode, Ordering::Relaxed);
        words[AT_MAGIC].store(MAGIC, Ordering::SeqCst);
        Self {
            chunk: (capacity(&memory) / CHUNKS).max(1),
            memory,
            path,
            next: AtomicU64::new(0),
            first: AtomicU64::new(0),
            end: AtomicU64::new(0),
            chunks: Mutex::new(()),
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
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        // The chunk that the first record is in is given back as a whole, so nothing else may be in it.
        let first = self.first.load(Ordering::Acquire);
        let is_room = number - first / self.chunk * self.chunk < self.capacity();
        if !is_room || number >= self.end.load(Ordering::Acquire) && !self.extend_to(number) {
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

    /// The round has succeeded. All records before its mark are finished: it had the locks that they were
    /// made in.
    pub(super) fn forget_until(&self, mark: Mark) {
        let _chunks = self.chunks.lock().expect("no panic while counting");
        let before = self.first.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        // In this order: what a reader finds from the first record on is there.
        self.memory.words()[AT_FIRST].store(mark.next, Ordering::Release);
        self.first.store(mark.next, Ordering::Release);
        let passed = before / self.chunk..mark.next.min(end) / self.chunk;
        for chunk in passed {
            self.memory.give_back(self.chunk_words(chunk));
        }
        self.made_up_for.store(mark.overflows, Ordering::SeqCst);
    }

    /// Takes memory for the record of that number. Returns false where the host has none.
    fn extend_to(&self, number: u64) -> bool {
        let _chunks = self.chunks.lock().expect("no panic while counting");
        loop {
            let end = self.end.load(Ordering::Relaxed);
            if number < end {
                return true;
            }
            // Numbers are passed over while there is no room.
            let chunk = end.max(self.first.load(Ordering::Relaxed)) / self.chunk;
            if let Err(error) = self.memory.take_space(self.chunk_words(chunk)) {
                tracing::warn!(
                    "no memory for more of '{}' ({error}): writes that allocate wait for the disk",
                    self.path.display()
                );
                return false;
            }
            let end = (chunk + 1) * self.chunk;
            self.memory.words()[AT_END].store(end, Ordering::Release);
            self.end.store(end, Ordering::Release);
        }
    }

    /// Where a chunk's records are.
    fn chunk_words(&self, chunk: u64) -> std::ops::Range<usize> {
        let begin = (chunk * self.chunk % self.capacity()) as usize;
        let begin = RECORDS_AT + begin * RECORD_WORDS;
        begin..begin + self.chunk as usize * RECORD_WORDS
    }

    /// Nothing is recorded any more, for good: who changes something waits for a round.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.memory.words()[AT_MAGIC].store(0, Ordering::SeqCst);
    }

    /// Whether it is nobody's any more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
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
    ((memory.words().len() - RECORDS_AT) / RECORD_WORDS) as u64
}

fn slot(memory: &Segment, number: u64) -> &[AtomicU64] {
    let index = (number % capacity(memory)) as usize;
    let begin = RECORDS_AT + index * RECORD_WORDS;
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
    // A chunk whose memory was given back reads as zeroes, and so does one that was never used.
    let end = at(AT_END).min(first.saturating_add(capacity(memory)));
    for number in first..end {
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
        // It stays as long as it is mapped.
        open(directory.path(), 8 * (RECORDS_AT + 4 * RECORD_WORDS) as u64)
    }

    fn open(directory: &std::path::Path, bytes: u64) -> Arc<Segment> {
        let context = IoContext::new(make(EngineChoice::Threads).unwrap());
        let path = directory.join("segment");
        let call = HostCall::OpenSegment { path, bytes };
        let inner = Rc::clone(&context);
        match context.block_on(async move { inner.host(call).await }) {
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

    /// How many records of so much memory there is space for on the host.
    fn space(directory: &std::path::Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let blocks = directory.join("segment").metadata().unwrap().blocks();
        (blocks * 512 - 8 * RECORDS_AT as u64) / (8 * RECORD_WORDS as u64)
    }

    #[test]
    fn memory_is_taken_as_records_come_and_given_back_as_rounds_end() {
        let directory = tempfile::tempdir().unwrap();
        let bytes = 8 * (RECORDS_AT as u64 + CHUNKS * 1024 * RECORD_WORDS as u64);
        let memory = open(directory.path(), bytes);
        let segment = CrashSegment::new(Arc::clone(&memory), "/run/segment".into(), OWNER);
        let has_none = || space(directory.path()) < 1024;
        assert!(has_none());
        // Around the ring more than once, with rounds that end in the midst of chunks.
        let mut expected = Vec::new();
        let mut cluster = 0;
        for round in 0..60 {
            let mark = segment.mark();
            let made_before = expected.len();
            for _ in 0..1024 + 37 * round {
                assert!(segment.record(count(cluster)));
                expected.push(count(cluster));
                cluster += 1;
            }
            assert!(space(directory.path()) <= 3 * 1024 + expected.len() as u64);
            segment.forget_until(mark);
            expected.drain(..made_before);
            assert_eq!(read(&memory, OWNER).unwrap().unwrap().records, expected);
        }
        // All but a chunk's worth can be in use at a time.
        let mark = segment.mark();
        segment.forget_until(mark);
        assert!((0..(CHUNKS - 1) * 1024).all(|cluster| segment.record(count(cluster))));
        let left = read(&memory, OWNER).unwrap().unwrap();
        assert_eq!(left.records.len() as u64, (CHUNKS - 1) * 1024);
        drop(segment);
        CrashSegment::new(Arc::clone(&memory), "/run/segment".into(), OWNER);
        assert!(has_none());
        assert_eq!(read(&memory, OWNER), Some(Ok(Left::default())));
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
