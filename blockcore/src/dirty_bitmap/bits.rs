//! The bits of a dirty bitmap: set by workers without a lock, searched and cleared by one at a time.
//!
//! A bit stands for `granularity_bytes` of the disk. 64 bits are a *leaf word*; 4096 leaf words are a
//! *chunk*, which exists from the first bit that is set in it; and two levels of *summaries* have a bit
//! per leaf word and a bit per chunk, so that a search skips what is clean. A third summary, of leaf
//! words found all dirty, lets a search for a clean bit skip what is dirty.
//!
//! Who may do what: [`Bits::set`] and [`Bits::get`] belong to the data path, take no lock and may run
//! anywhere at any time. Everything that searches or clears (*consumers*) takes a lock that no setter
//! ever takes, so consumers exclude each other and nobody else.
//!
//! # Why no write is lost
//!
//! **A bit and the disk.** A worker ends its I/O, then calls `set`; a consumer calls
//! [`clear`](Bits::clear) (or [`take`](Bits::take)), then reads the disk. Either the consumer reads what
//! was written, or the bit is set when `set` returns and nobody has cleared it since:
//!
//! * If `set` changes the word, that change comes before or after the consumer's in the order of the
//!   word's changes. After: the bit stays. Before: the consumer's change acquires what `set` released,
//!   and with it the end of the I/O.
//! * If `set` finds the bit set and writes nothing, it has read a value from after the consumer's
//!   change, and the bit stays, or one from before. Then: there is a sequentially consistent fence between the end of the I/O and that look, and one
//!   between the consumer's change and its read of the disk. The first must come before the second, or
//!   the look would have seen the change; so the read sees the write.
//!
//! **A bit and its summaries.** When `set` has returned, a search finds the bit, though another worker's
//! `set` of the same bit may be half done. Invariant, whenever the consumers' lock is free: a set bit
//! whose summary is not set belongs to calls of `set` that have not returned. For this
//!
//! * setters go upwards, leaf before summary, and look at every level even if the leaf was set already;
//! * consumers go downwards: the summary falls *first*, then the word below is cleared, and if that
//!   change shows that something is left, the summary is set again before the lock is given back.
//!
//! A setter whose change (or whose look at another's change) of the lower word comes after the
//! consumer's has acquired that the summary fell, and sets it again. One that comes before is seen by
//! the consumer's change. Both are read-modify-writes of one word, so there is no third case. Searches
//! never see a summary that fell for a moment, since they take the lock too.
//!
//! **Full words** are noted by searches, under the lock, and forgotten by clears, under the lock; between
//! the two a word only gains bits. Setters have nothing to do with them.
//!
//! Modelled: `RUSTFLAGS="--cfg loom" cargo test -p blockcore --release dirty_bitmap`.

use std::fmt;

use super::chunk::{CHUNK_BITS, Chunk, LEAF_WORDS, lower, raise};
use crate::sync::{AtomicU64, Mutex, MutexGuard, OnceLock, Ordering, fence};

/// The most bits that a bitmap may have: 1 PiB at 64 KiB per bit, or 8 TiB at 512 bytes.
///
/// With this many, the table of chunks takes 1 MiB from the start, and the bits take 2 GiB if all of
/// the disk is written.
pub const MAX_BITS: u64 = 1 << 34;

/// A bitmap over `length` bytes, with a bit for each `granularity_bytes` of them.
///
/// The last bit stands for less if the length is not a multiple of the granularity. Ranges may begin
/// and end anywhere; what lies past the length is left out.
pub struct Bits {
    length: u64,
    granularity_shift: u32,
    /// How many bits there are.
    bits: u64,
    /// A bit per chunk: something in it is dirty.
    dirty: Box<[AtomicU64]>,
    chunks: Box<[OnceLock<Box<Chunk>>]>,
    /// Held by whoever searches or clears.
    consumer: Mutex<()>,
}

/// Bytes of a disk: `bytes` of them from `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; never 0.
    pub bytes: u64,
}

/// A bitmap was asked for that would need more than [`MAX_BITS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyBits {
    /// How many it would need.
    pub bits: u64,
    /// The smallest granularity at which the length could have a bitmap.
    pub granularity_bytes: u64,
}

impl fmt::Display for TooManyBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "it would need {} bits and there can be {MAX_BITS}; the granularity must be at least {} \
             bytes",
            self.bits, self.granularity_bytes
        )
    }
}

impl std::error::Error for TooManyBits {}

impl Bits {
    /// A clean bitmap over `length` bytes.
    ///
    /// # Panics
    ///
    /// If `granularity_bytes` is not a power of two: it has been checked where it came from.
    ///
    /// # Errors
    ///
    /// [`TooManyBits`]. Nothing has been allocated.
    pub fn new(length: u64, granularity_bytes: u64) -> Result<Self, TooManyBits> {
        assert!(
            granularity_bytes.is_power_of_two(),
            "granularity is checked"
        );
        let bits = length.div_ceil(granularity_bytes);
        if bits > MAX_BITS {
            return Err(TooManyBits {
                bits,
                granularity_bytes: length.div_ceil(MAX_BITS).next_power_of_two(),
            });
        }
        let chunks = bits.div_ceil(CHUNK_BITS);
        Ok(Self {
            length,
            granularity_shift: granularity_bytes.trailing_zeros(),
            bits,
            dirty: (0..chunks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            consumer: Mutex::new(()),
        })
    }

    /// How many bytes of disk it is about.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of disk per bit, a power of two.
    pub fn granularity_bytes(&self) -> u64 {
        1 << self.granularity_shift
    }

    /// Marks every granule that the range touches. The write that it tells of must have ended before.
    ///
    /// The data path: takes no lock, and allocates only where nothing was dirty before.
    pub fn set(&self, offset: u64, bytes: u64) {
        // Orders the end of the write before the looks below; pairs with the fence in `Consumer::drop`.
        fence(Ordering::SeqCst);
        if let Some((first, last)) = self.touched(offset, bytes) {
            self.set_bits(first, last);
        }
    }

    /// Whether the granule that `offset` lies in is marked; false past the end.
    pub fn get(&self, offset: u64) -> bool {
        offset < self.length && {
            let bit = offset >> self.granularity_shift;
            self.word(bit / 64) & 1 << (bit % 64) != 0
        }
    }

    /// How many bits are set. While others set and clear, a recent number; exact when nobody does.
    pub fn count(&self) -> u64 {
        let chunks = self.chunks.iter().filter_map(OnceLock::get);
        let count = chunks.fold(0_i64, |sum, chunk| sum.wrapping_add(chunk.count()));
        u64::try_from(count).unwrap_or(0)
    }

    /// Unmarks every granule that lies wholly in the range, which a shorter last one does if the range
    /// reaches the end of the disk.
    ///
    /// Whoever reads the disk after this sees every write whose mark is now gone.
    pub fn clear(&self, offset: u64, bytes: u64) {
        if let Some((first, last)) = self.covered(offset, bytes) {
            self.consume().clear(first, last);
        }
    }

    /// Unmarks everything.
    pub fn clear_all(&self) {
        self.consume().take(|_, _| ());
    }

    /// Unmarks everything and gives out what was marked. A mark that is set meanwhile is in what is
    /// returned or remains, and none is lost.
    pub fn take(&self) -> Self {
        let taken = self.clean_copy();
        self.consume()
            .take(|index, value| taken.set_word(index, value));
        taken
    }

    /// A bitmap of the same shape with the same marks.
    pub fn copy(&self) -> Self {
        let copy = self.clean_copy();
        self.consume()
            .visit(|index, value| copy.set_word(index, value));
        copy
    }

    /// A bitmap of `length` bytes with the same granularity and marks: what was added is clean, what
    /// was cut off is gone. A granule that the new end cuts through keeps its mark.
    ///
    /// # Errors
    ///
    /// [`TooManyBits`]. Nothing has changed.
    pub fn resized(&self, length: u64) -> Result<Self, TooManyBits> {
        let resized = Self::new(length, self.granularity_bytes())?;
        self.consume()
            .visit(|index, value| resized.set_word(index, value));
        Ok(resized)
    }

    /// Marks what `source` has marked. The granularities may differ; what either marks stays within
    /// the shorter of the two.
    pub fn merge(&self, source: &Self) {
        if std::ptr::eq(self, source) {
            return;
        }
        source.consume().visit(|index, mut value| {
            if self.granularity_shift == source.granularity_shift {
                self.set_word(index, value);
                return;
            }
            while value != 0 {
                let low = value.trailing_zeros();
                let high = low + (value >> low).trailing_ones();
                let (begin, end) = (index * 64 + u64::from(low), index * 64 + u64::from(high));
                let offset = begin << source.granularity_shift;
                self.set(offset, source.begin_of(end) - offset);
                value &= u64::MAX.checked_shl(high).unwrap_or(0);
            }
        });
    }

    /// The first marked byte of the range.
    pub fn next_dirty(&self, offset: u64, bytes: u64) -> Option<u64> {
        let (first, last) = self.touched(offset, bytes)?;
        let bit = self.consume().find_dirty(first, last)?;
        Some(self.begin_of(bit).max(offset))
    }

    /// The first byte of the range that is not marked.
    pub fn next_clean(&self, offset: u64, bytes: u64) -> Option<u64> {
        let (first, last) = self.touched(offset, bytes)?;
        let bit = self.consume().find_clean(first, last)?;
        Some(self.begin_of(bit).max(offset))
    }

    /// The first marked area in the range: from its first marked byte up to one that is not, to the end
    /// of the range, or `max_bytes` further.
    ///
    /// # Panics
    ///
    /// If `max_bytes` is 0.
    pub fn next_area(&self, offset: u64, bytes: u64, max_bytes: u64) -> Option<Area> {
        assert!(max_bytes > 0, "an area has bytes");
        let (first, last) = self.touched(offset, bytes)?;
        let consumer = self.consume();
        let begin = consumer.find_dirty(first, last)?;
        let offset_found = self.begin_of(begin).max(offset);
        let limit = offset.saturating_add(bytes).min(self.length);
        let limit = limit.min(offset_found.saturating_add(max_bytes));
        let last = (limit - 1) >> self.granularity_shift;
        let end = match consumer.find_clean(begin, last) {
            Some(clean) => self.begin_of(clean),
            None => limit,
        };
        Some(Area {
            offset: offset_found,
            bytes: end - offset_found,
        })
    }

    /// The marked areas in the range, in order, none longer than `max_bytes`. What is set or cleared
    /// ahead of it while it runs is taken into account.
    pub fn areas(&self, offset: u64, bytes: u64, max_bytes: u64) -> impl Iterator<Item = Area> {
        let end = offset.saturating_add(bytes);
        let mut next = offset;
        std::iter::from_fn(move || {
            let area = self.next_area(next, end - next, max_bytes)?;
            next = area.offset + area.bytes;
            Some(area)
        })
    }

    /// Whether nothing in the range is marked.
    pub fn is_clean(&self, offset: u64, bytes: u64) -> bool {
        self.next_dirty(offset, bytes).is_none()
    }

    /// The leaf word `index` of the whole bitmap.
    pub(super) fn word(&self, index: u64) -> u64 {
        let (chunk, word) = locate(index);
        self.chunks[chunk].get().map_or(0, |chunk| chunk.word(word))
    }

    /// Sets what is set in `value`, of the bits that there are, in the leaf word `index`.
    pub(super) fn set_word(&self, index: u64, value: u64) {
        let value = value & self.existing(index);
        if value == 0 {
            return;
        }
        let (chunk, word) = locate(index);
        self.chunk(chunk).set_word(word, value);
        self.raise_chunk(chunk);
    }

    /// Makes the leaf word `index` equal to `value`, of the bits that there are.
    pub(super) fn put_word(&self, index: u64, value: u64) {
        self.consume().clear_word(index, !value);
        self.set_word(index, value);
    }

    /// Which bits of the leaf word `index` stand for something.
    fn existing(&self, index: u64) -> u64 {
        match self.bits.saturating_sub(index.saturating_mul(64)) {
            0 => 0,
            bits @ 1..64 => (1 << bits) - 1,
            _ => u64::MAX,
        }
    }

    fn clean_copy(&self) -> Self {
        Self::new(self.length, self.granularity_bytes()).expect("the same shape as this one")
    }

    /// The first and the last granule that the range touches, if it touches any.
    fn touched(&self, offset: u64, bytes: u64) -> Option<(u64, u64)> {
        let end = offset.saturating_add(bytes).min(self.length);
        (offset < end).then(|| {
            (
                offset >> self.granularity_shift,
                (end - 1) >> self.granularity_shift,
            )
        })
    }

    /// The first and the last granule that lies wholly in the range, if any does.
    fn covered(&self, offset: u64, bytes: u64) -> Option<(u64, u64)> {
        let end = offset.saturating_add(bytes);
        let first = offset.div_ceil(self.granularity_bytes());
        let end = if end >= self.length {
            self.bits
        } else {
            end >> self.granularity_shift
        };
        (first < end).then(|| (first, end - 1))
    }

    /// Where a granule begins, or the length for the one past the last.
    fn begin_of(&self, bit: u64) -> u64 {
        if bit >= self.bits {
            return self.length;
        }
        bit << self.granularity_shift
    }

    fn set_bits(&self, first: u64, last: u64) {
        for (chunk, first, last) in by_chunk(first, last) {
            self.chunk(chunk).set(first, last);
            self.raise_chunk(chunk);
        }
    }

    fn raise_chunk(&self, chunk: usize) {
        raise(&self.dirty[chunk / 64], 1 << (chunk % 64));
    }

    fn chunk(&self, index: usize) -> &Chunk {
        self.chunks[index].get_or_init(Chunk::new)
    }

    fn consume(&self) -> Consumer<'_> {
        Consumer {
            bits: self,
            _alone: self.consumer.lock().expect("no panic while looking"),
        }
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bits")
            .field("length", &self.length)
            .field("granularity_bytes", &self.granularity_bytes())
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

/// The right to search and to clear, which one thread has at a time.
struct Consumer<'a> {
    bits: &'a Bits,
    _alone: MutexGuard<'a, ()>,
}

impl Consumer<'_> {
    fn find_dirty(&self, first: u64, last: u64) -> Option<u64> {
        let mut from = first;
        while from <= last {
            let chunk = self.next_dirty_chunk(from)?;
            let begin = chunk as u64 * CHUNK_BITS;
            let found = self.bits.chunks[chunk]
                .get()
                .and_then(|chunk| chunk.find_dirty(from.saturating_sub(begin) as usize));
            if let Some(found) = found {
                let bit = begin + found as u64;
                return (bit <= last).then_some(bit);
            }
            from = begin + CHUNK_BITS;
        }
        None
    }

    fn find_clean(&self, first: u64, last: u64) -> Option<u64> {
        let mut from = first;
        while from <= last {
            let index = (from / CHUNK_BITS) as usize;
            let begin = index as u64 * CHUNK_BITS;
            let Some(chunk) = self.bits.chunks[index].get() else {
                return Some(from);
            };
            if let Some(found) = chunk.find_clean((from - begin) as usize) {
                let bit = begin + found as u64;
                return (bit <= last).then_some(bit);
            }
            from = begin + CHUNK_BITS;
        }
        None
    }

    /// The first chunk with something dirty, of those from the one that has the bit `from`.
    fn next_dirty_chunk(&self, from: u64) -> Option<usize> {
        let chunk = (from / CHUNK_BITS) as usize;
        let mut mask = u64::MAX << (chunk % 64);
        for (index, summary) in self.bits.dirty.iter().enumerate().skip(chunk / 64) {
            let dirty = summary.load(Ordering::Acquire) & mask;
            if dirty != 0 {
                return Some(index * 64 + dirty.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    /// Calls `f` with the index and the value of every leaf word that has something dirty.
    fn visit(&self, mut f: impl FnMut(u64, u64)) {
        for (index, chunk) in self.chunks() {
            chunk.visit(|word, value| f((index * LEAF_WORDS + word) as u64, value));
        }
    }

    /// As [`visit`](Self::visit), and clears each word. The summaries fall before what they tell of.
    fn take(&self, mut f: impl FnMut(u64, u64)) {
        for (index, chunk) in self.chunks() {
            lower(&self.bits.dirty[index / 64], 1 << (index % 64));
            chunk.take(|word, value| f((index * LEAF_WORDS + word) as u64, value));
        }
    }

    fn chunks(&self) -> impl Iterator<Item = (usize, &Chunk)> {
        let chunks = self.bits.chunks.iter().enumerate();
        chunks.filter_map(|(index, chunk)| Some((index, &**chunk.get()?)))
    }

    fn clear(&self, first: u64, last: u64) {
        for (index, first, last) in by_chunk(first, last) {
            let Some(chunk) = self.bits.chunks[index].get() else {
                continue;
            };
            if chunk.clear(first, last) {
                self.lower_chunk(index, chunk);
            }
        }
    }

    fn clear_word(&self, index: u64, mask: u64) {
        let (index, word) = locate(index);
        if let Some(chunk) = self.bits.chunks[index].get()
            && chunk.clear_word(word, mask)
        {
            self.lower_chunk(index, chunk);
        }
    }

    /// Lets the chunk's own bit fall if nothing in it is dirty.
    fn lower_chunk(&self, index: usize, chunk: &Chunk) {
        if !chunk.seems_clean() {
            return;
        }
        lower(&self.bits.dirty[index / 64], 1 << (index % 64));
        if !chunk.is_clean() {
            self.bits.raise_chunk(index);
        }
    }
}

impl Drop for Consumer<'_> {
    fn drop(&mut self) {
        // Orders what was cleared before the caller's next read of the disk; pairs with the fence in
        // `Bits::set`.
        fence(Ordering::SeqCst);
    }
}

/// The chunk that has the leaf word `index`, and which of its words that is.
fn locate(index: u64) -> (usize, usize) {
    let index = index as usize;
    (index / LEAF_WORDS, index % LEAF_WORDS)
}

/// Cuts the bits from `first` to `last` by chunks: the chunk, and the first and last bit within it.
fn by_chunk(first: u64, last: u64) -> impl Iterator<Item = (usize, usize, usize)> {
    (first / CHUNK_BITS..=last / CHUNK_BITS).map(move |chunk| {
        let begin = chunk * CHUNK_BITS;
        let low = first.saturating_sub(begin);
        let high = (last - begin).min(CHUNK_BITS - 1);
        (chunk as usize, low as usize, high as usize)
    })
}
