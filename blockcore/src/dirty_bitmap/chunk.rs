//! A chunk of a dirty bitmap: leaf words, and a summary of which of them are dirty.
//!
//! Who may do what, and why no mark is lost, is told in [`bits`](super::bits). *Consumers* hold the
//! bitmap's lock.

use crate::sync::{AtomicU64, Ordering};

/// Leaf words in a chunk: 32 KiB of them, or 16 GiB of a disk at 64 KiB per bit. The model checker is
/// given two, so that it sees all there is in few steps.
pub(super) const LEAF_WORDS: usize = if cfg!(loom) { 2 } else { 4096 };
const SUMMARY_WORDS: usize = LEAF_WORDS.div_ceil(64);
pub(super) const CHUNK_BITS: u64 = LEAF_WORDS as u64 * 64;

/// The bits of one stretch of the disk. Indices are within the chunk.
pub(super) struct Chunk {
    /// How many leaf bits are set. Changed after the leaf, so it lags, and may be negative for a moment.
    count: Counter,
    /// A bit per leaf word: something in it is dirty.
    dirty: [AtomicU64; SUMMARY_WORDS],
    /// A bit per leaf word that a search found all dirty.
    full: [AtomicU64; SUMMARY_WORDS],
    leaf: [AtomicU64; LEAF_WORDS],
}

/// A counter in a cache line of its own: it changes often, what lies beside it is looked at always.
#[repr(align(64))]
struct Counter(AtomicU64);

impl Chunk {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            count: Counter(AtomicU64::new(0)),
            dirty: std::array::from_fn(|_| AtomicU64::new(0)),
            full: std::array::from_fn(|_| AtomicU64::new(0)),
            leaf: std::array::from_fn(|_| AtomicU64::new(0)),
        })
    }

    /// Sets the bits from `first` to `last`.
    pub(super) fn set(&self, first: usize, last: usize) {
        let mut added = 0;
        for group in first / 64 / 64..=last / 64 / 64 {
            let mut summary = 0;
            for (word, mask) in by_word(group, first, last) {
                added += raise(&self.leaf[word], mask);
                summary |= 1 << (word % 64);
            }
            raise(&self.dirty[group], summary);
        }
        self.add(added);
    }

    /// Sets the bits of `mask`.
    pub(super) fn set_word(&self, word: usize, mask: u64) {
        let added = raise(&self.leaf[word], mask);
        raise(&self.dirty[word / 64], 1 << (word % 64));
        self.add(added);
    }

    fn add(&self, added: u32) {
        if added > 0 {
            self.count.0.fetch_add(added.into(), Ordering::Relaxed);
        }
    }

    /// Calls `f` with every word that has something dirty. For a consumer.
    pub(super) fn visit(&self, mut f: impl FnMut(usize, u64)) {
        for (group, summary) in self.dirty.iter().enumerate() {
            for word in ones(summary.load(Ordering::Acquire)) {
                let word = group * 64 + word;
                let value = self.leaf[word].load(Ordering::Acquire);
                if value != 0 {
                    f(word, value);
                }
            }
        }
    }

    /// As [`visit`](Self::visit), and clears each word. For a consumer, who has let the chunk's own bit
    /// fall before.
    pub(super) fn take(&self, mut f: impl FnMut(usize, u64)) {
        let mut count = 0;
        for (group, summary) in self.dirty.iter().enumerate() {
            self.full[group].store(0, Ordering::Relaxed);
            for word in ones(summary.swap(0, Ordering::AcqRel)) {
                let word = group * 64 + word;
                let value = self.leaf[word].swap(0, Ordering::AcqRel);
                if value != 0 {
                    count += u64::from(value.count_ones());
                    f(word, value);
                }
            }
        }
        self.count.0.fetch_sub(count, Ordering::Relaxed);
    }

    /// Clears the bits from `first` to `last`. Returns whether the bit of a word fell in the summary.
    /// For a consumer.
    pub(super) fn clear(&self, first: usize, last: usize) -> bool {
        let mut fell = false;
        for group in first / 64 / 64..=last / 64 / 64 {
            if self.dirty[group].load(Ordering::Acquire) == 0 {
                continue;
            }
            for (word, mask) in by_word(group, first, last) {
                fell |= self.clear_word(word, mask);
            }
        }
        fell
    }

    /// Clears the bits of `mask`. Returns whether the word's bit in the summary fell. For a consumer.
    pub(super) fn clear_word(&self, word: usize, mask: u64) -> bool {
        let leaf = &self.leaf[word];
        let value = leaf.load(Ordering::Relaxed);
        if value & mask == 0 {
            return false;
        }
        let (group, bit) = (word / 64, 1 << (word % 64));
        if self.full[group].load(Ordering::Relaxed) & bit != 0 {
            self.full[group].fetch_and(!bit, Ordering::Relaxed);
        }
        // Nobody else clears: what is set besides `mask` stays set, and so may the summary.
        let empties = value & !mask == 0;
        if empties {
            lower(&self.dirty[group], bit);
        }
        let old = leaf.fetch_and(!mask, Ordering::AcqRel);
        let cleared = (old & mask).count_ones();
        self.count.0.fetch_sub(cleared.into(), Ordering::Relaxed);
        if empties && old & !mask != 0 {
            raise(&self.dirty[group], bit);
            return false;
        }
        empties
    }

    /// Whether nothing is dirty, at a glance.
    pub(super) fn seems_clean(&self) -> bool {
        let clean = |summary: &AtomicU64| summary.load(Ordering::Relaxed) == 0;
        self.dirty.iter().all(clean)
    }

    /// Whether nothing is dirty, asked by a consumer who has let the chunk's own bit fall. By a change
    /// that changes nothing: what a setter has raised before it is seen, and whoever raises after it
    /// sees that the chunk's bit fell.
    pub(super) fn is_clean(&self) -> bool {
        let clean = |summary: &AtomicU64| summary.fetch_or(0, Ordering::AcqRel) == 0;
        self.dirty.iter().all(clean)
    }

    /// How many bits are set; while others set and clear, a recent number, which may be negative.
    pub(super) fn count(&self) -> i64 {
        self.count.0.load(Ordering::Relaxed).cast_signed()
    }

    /// The leaf word, for anybody.
    pub(super) fn word(&self, word: usize) -> u64 {
        self.leaf[word].load(Ordering::Acquire)
    }

    /// The first dirty bit from `from`. For a consumer.
    pub(super) fn find_dirty(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        let value = self.leaf[word].load(Ordering::Acquire) & u64::MAX << (from % 64);
        if value != 0 {
            return Some(word * 64 + value.trailing_zeros() as usize);
        }
        let next = word + 1;
        let mut mask = u64::MAX << (next % 64);
        for group in next / 64..SUMMARY_WORDS {
            for word in ones(self.dirty[group].load(Ordering::Acquire) & mask) {
                let word = group * 64 + word;
                let value = self.leaf[word].load(Ordering::Acquire);
                if value != 0 {
                    return Some(word * 64 + value.trailing_zeros() as usize);
                }
            }
            mask = u64::MAX;
        }
        None
    }

    /// The first clean bit from `from`. For a consumer.
    pub(super) fn find_clean(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        let value = !self.leaf[word].load(Ordering::Acquire) & u64::MAX << (from % 64);
        if value != 0 {
            return Some(word * 64 + value.trailing_zeros() as usize);
        }
        let next = word + 1;
        let mut mask = u64::MAX << (next % 64);
        for group in next / 64..SUMMARY_WORDS {
            for word in ones(!self.full[group].load(Ordering::Relaxed) & mask) {
                let word = group * 64 + word;
                // The model checker's chunks do not fill their summary.
                if word >= LEAF_WORDS {
                    return None;
                }
                let value = !self.leaf[word].load(Ordering::Acquire);
                if value != 0 {
                    return Some(word * 64 + value.trailing_zeros() as usize);
                }
                self.full[group].fetch_or(1 << (word % 64), Ordering::Relaxed);
            }
            mask = u64::MAX;
        }
        None
    }
}

/// Sets the bits of `mask` that are not set, and returns how many those were. Looks first: a line that
/// only needs to be looked at stays in every worker's cache.
pub(super) fn raise(word: &AtomicU64, mask: u64) -> u32 {
    if word.load(Ordering::Acquire) & mask == mask {
        return 0;
    }
    let old = word.fetch_or(mask, Ordering::AcqRel);
    (mask & !old).count_ones()
}

/// Clears the bits of `mask` in a summary. The change of the word below, which follows, releases this.
pub(super) fn lower(summary: &AtomicU64, mask: u64) {
    summary.fetch_and(!mask, Ordering::Relaxed);
}

/// The leaf words of the summary word `group` that have bits from `first` to `last`, with those bits.
fn by_word(group: usize, first: usize, last: usize) -> impl Iterator<Item = (usize, u64)> {
    let low = (first / 64).max(group * 64);
    let high = (last / 64).min(group * 64 + 63);
    (low..=high).map(move |word| {
        let begin = word * 64;
        let below = u64::MAX << first.saturating_sub(begin);
        let above = u64::MAX >> (63 - (last - begin).min(63));
        (word, below & above)
    })
}

/// The positions of the bits that are set, from the lowest.
fn ones(mut value: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = value.trailing_zeros();
        value &= value.wrapping_sub(1);
        (bit < 64).then_some(bit as usize)
    })
}
