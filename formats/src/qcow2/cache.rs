//! [`SliceCache`]: parts of L2 tables in memory, read by all workers without a lock.
//!
//! A *slice* is a run of entries of one L2 table; slice `n` maps the `n`th part of the guest's disk. The
//! cache is set-associative: slice `n` may be in any of the [`WAYS`] slots of set `n % sets`. So its
//! memory is bounded by its size and by nothing that an image claims, and a cache that is as large as all
//! of a disk's tables never evicts.
//!
//! **Reading** takes no lock and writes nothing shared: a slot has a version, odd while the slot is being
//! changed. A reader looks at the version, then at the slot's key, then at the words, then at the version
//! again; if that is the same and even, what it read was there together at one moment. Else, or if no slot
//! has the slice, the caller takes the slow way, which may look again.
//!
//! **Changing** is under the slot's lock. A changed slice is dirty until the committer has written what it
//! has; a dirty slice is never evicted. A slice that changed again since it was copied stays dirty.
//!
//! Modelled: `RUSTFLAGS="--cfg loom" cargo test -p formats --release --lib`.
//!
//! Locks, in this order: placement, a slot's, the list of dirty slices. All are held over memory operations
//! only.

use std::collections::BTreeSet;

use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, OnceLock, Ordering, fence};

/// Slots of a set: what one cache line of keys holds.
pub(crate) const WAYS: usize = 8;

/// Which part of the disk's mapping.
pub(crate) type SliceNumber = u64;

/// See the module's header.
pub(crate) struct SliceCache {
    slice_words: usize,
    sets: Box<[Set]>,
    slots: Box<[Slot]>,
    /// Held while a slot is given to another slice.
    placement: Mutex<()>,
    dirty: Mutex<BTreeSet<SliceNumber>>,
}

#[derive(Default)]
#[repr(align(64))]
struct Set {
    /// The number of the slice in each way's slot, plus one; 0 for none.
    keys: [AtomicU64; WAYS],
}

struct Slot {
    version: AtomicU64,
    /// Made when the slot is first used, and kept.
    words: OnceLock<Box<[AtomicU64]>>,
    /// It was looked at since it was last considered for eviction.
    touched: AtomicBool,
    state: Mutex<State>,
}

/// What only those who hold the lock may see.
#[derive(Default)]
struct State {
    /// Counts changes; 0 for a slot that is clean.
    change: u64,
    /// Never goes back, so that no change is taken for another.
    changes: u64,
}

/// A dirty slice as it was at one moment.
pub(crate) struct SliceCopy {
    /// Which one.
    pub(crate) slice: SliceNumber,
    /// Its words.
    pub(crate) words: Vec<u64>,
    change: u64,
}

/// A slice that is being changed.
pub(crate) struct SliceWords<'a> {
    words: &'a [AtomicU64],
    changed: bool,
}

impl SliceWords<'_> {
    /// The word at `index`.
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Relaxed)
    }

    /// Changes the word at `index`.
    pub(crate) fn set(&mut self, index: usize, word: u64) {
        self.words[index].store(word, Ordering::Relaxed);
        self.changed = true;
    }
}

/// All slots in which a slice could be are dirty: they must be written first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl SliceCache {
    /// A cache for slices of `slice_words` words with room for at least [`WAYS`] of them and at most
    /// `slices`, rounded down to what a set-associative cache can have.
    pub(crate) fn new(slice_words: usize, slices: u64) -> Self {
        let sets = (slices / WAYS as u64).max(1);
        let sets = 1_usize << sets.ilog2();
        let slot = |_| Slot {
            version: AtomicU64::new(0),
            words: OnceLock::new(),
            touched: AtomicBool::new(false),
            state: Mutex::new(State::default()),
        };
        Self {
            slice_words,
            sets: (0..sets).map(|_| Set::default()).collect(),
            slots: (0..sets * WAYS).map(slot).collect(),
            placement: Mutex::new(()),
            dirty: Mutex::new(BTreeSet::new()),
        }
    }

    /// Words of a slice.
    pub(crate) fn slice_words(&self) -> usize {
        self.slice_words
    }

    /// How many slices there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many slices are dirty, or being changed.
    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty_list().len()
    }

    /// The words at `index` and, with `both`, at `index + 1` of a slice, as they were together; `None` if
    /// the slice is not here or is being changed.
    #[inline]
    pub(crate) fn get(&self, slice: SliceNumber, index: usize, both: bool) -> Option<(u64, u64)> {
        let set = self.set_of(slice);
        for way in 0..WAYS {
            let key = &self.sets[set].keys[way];
            if key.load(Ordering::Relaxed) != slice + 1 {
                continue;
            }
            let slot = &self.slots[set * WAYS + way];
            let version = slot.version.load(Ordering::Acquire);
            if !version.is_multiple_of(2) || key.load(Ordering::Relaxed) != slice + 1 {
                return None;
            }
            let words = slot.words.get()?;
            let word = words[index].load(Ordering::Relaxed);
            let second = match both {
                true => words[index + 1].load(Ordering::Relaxed),
                false => 0,
            };
            // Orders the loads above before the look below; pairs with the release in `Change::begin`.
            fence(Ordering::Acquire);
            if slot.version.load(Ordering::Relaxed) != version {
                return None;
            }
            if !slot.touched.load(Ordering::Relaxed) {
                slot.touched.store(true, Ordering::Relaxed);
            }
            return Some((word, second));
        }
        None
    }

    /// Whether the slice is here.
    pub(crate) fn contains(&self, slice: SliceNumber) -> bool {
        self.find(slice).is_some()
    }

    /// Changes a slice; `None` if it is not here. It is dirty afterwards if a word was set. A reader sees
    /// all of the change or nothing.
    pub(crate) fn change<R>(
        &self,
        slice: SliceNumber,
        change: impl FnOnce(&mut SliceWords<'_>) -> R,
    ) -> Option<R> {
        let slot = self.find(slice)?;
        let mut state = lock(&slot.state);
        // It may have been given away before the lock was had.
        if !std::ptr::eq(self.find(slice)?, slot) {
            return None;
        }
        let words = slot.words.get()?;
        let was_clean = state.change == 0;
        if was_clean {
            // Before the change: a round that makes what it records superfluous has to find it, and waits
            // for the slot's lock.
            self.dirty_list().insert(slice);
        }
        let version = Change::begin(slot);
        let mut slice_words = SliceWords {
            words,
            changed: false,
        };
        let result = change(&mut slice_words);
        let changed = slice_words.changed;
        drop(version);
        if changed {
            state.changes += 1;
            state.change = state.changes;
        } else if was_clean {
            self.dirty_list().remove(&slice);
        }
        Some(result)
    }

    /// Puts a slice as it was read from the image into a slot, unless it is here already.
    ///
    /// # Errors
    ///
    /// [`Full`]. Nothing has changed.
    pub(crate) fn install(&self, slice: SliceNumber, words: &[u64]) -> Result<(), Full> {
        let _placement = lock(&self.placement);
        if self.find(slice).is_some() {
            return Ok(());
        }
        let set = self.set_of(slice);
        let way = self.free_way(set).ok_or(Full)?;
        let slot = &self.slots[set * WAYS + way];
        let state = lock(&slot.state);
        // A change of what was here may have come before the lock was had.
        if state.change != 0 {
            return Err(Full);
        }
        let version = Change::begin(slot);
        self.sets[set].keys[way].store(slice + 1, Ordering::Relaxed);
        let room = slot
            .words
            .get_or_init(|| (0..self.slice_words).map(|_| AtomicU64::new(0)).collect());
        for (word, value) in room.iter().zip(words) {
            word.store(*value, Ordering::Relaxed);
        }
        slot.touched.store(true, Ordering::Relaxed);
        drop(version);
        drop(state);
        Ok(())
    }

    /// Forgets clean slices that `which` says; for when what they were read from has moved. Nobody changes
    /// them meanwhile.
    pub(crate) fn forget(&self, which: impl Fn(SliceNumber) -> bool) {
        let _placement = lock(&self.placement);
        for (index, slot) in self.slots.iter().enumerate() {
            let key = &self.sets[index / WAYS].keys[index % WAYS];
            let Some(slice) = key.load(Ordering::Relaxed).checked_sub(1) else {
                continue;
            };
            let state = lock(&slot.state);
            if state.change == 0 && which(slice) {
                let version = Change::begin(slot);
                key.store(0, Ordering::Relaxed);
                drop(version);
            }
        }
    }

    /// Every dirty slice, copied.
    pub(crate) fn copy_dirty(&self) -> Vec<SliceCopy> {
        let dirty: Vec<_> = self.dirty_list().iter().copied().collect();
        let copies = dirty.into_iter().filter_map(|slice| {
            // Dirty slices stay where they are.
            let slot = self.find(slice)?;
            let state = lock(&slot.state);
            let words = slot.words.get()?;
            (state.change != 0).then(|| SliceCopy {
                slice,
                words: words.iter().map(|w| w.load(Ordering::Relaxed)).collect(),
                change: state.change,
            })
        });
        copies.collect()
    }

    /// The copy is durable in the image: the slice is clean, unless it has changed since.
    pub(crate) fn settle(&self, copy: &SliceCopy) {
        let Some(slot) = self.find(copy.slice) else {
            return;
        };
        let mut state = lock(&slot.state);
        if state.change == copy.change {
            state.change = 0;
            self.dirty_list().remove(&copy.slice);
        }
    }

    fn set_of(&self, slice: SliceNumber) -> usize {
        slice as usize & (self.sets.len() - 1)
    }

    fn find(&self, slice: SliceNumber) -> Option<&Slot> {
        let set = self.set_of(slice);
        let mut keys = self.sets[set].keys.iter();
        let way = keys.position(|key| key.load(Ordering::Acquire) == slice + 1)?;
        Some(&self.slots[set * WAYS + way])
    }

    /// A way of the set that is empty, or else clean, and preferably not looked at since the last search.
    fn free_way(&self, set: usize) -> Option<usize> {
        let keys = &self.sets[set].keys;
        if let Some(way) = keys.iter().position(|key| key.load(Ordering::Relaxed) == 0) {
            return Some(way);
        }
        let slots = &self.slots[set * WAYS..(set + 1) * WAYS];
        let is_clean = |way: &usize| lock(&slots[*way].state).change == 0;
        let clean: Vec<_> = (0..WAYS).filter(is_clean).collect();
        let mut idle = clean.iter().copied();
        if let Some(way) = idle.find(|way| !slots[*way].touched.load(Ordering::Relaxed)) {
            return Some(way);
        }
        for slot in slots {
            slot.touched.store(false, Ordering::Relaxed);
        }
        clean.first().copied()
    }

    fn dirty_list(&self) -> MutexGuard<'_, BTreeSet<SliceNumber>> {
        lock(&self.dirty)
    }
}

/// A slot's version is odd while this lives. The slot's lock is held.
struct Change<'a> {
    version: &'a AtomicU64,
    value: u64,
}

impl<'a> Change<'a> {
    fn begin(slot: &'a Slot) -> Self {
        let value = slot.version.load(Ordering::Relaxed);
        slot.version.store(value + 1, Ordering::Relaxed);
        // Orders the odd version before every store of the change; pairs with the fence in `get`.
        fence(Ordering::Release);
        Self {
            version: &slot.version,
            value,
        }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.version.store(self.value + 2, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while holding it")
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn words(first: u64) -> Vec<u64> {
        (first..first + 4).collect()
    }

    #[test]
    fn a_slice_counts_as_dirty_before_it_changes() {
        let cache = SliceCache::new(4, 8);
        cache.install(3, &[0; 4]).unwrap();
        let seen = cache.change(3, |words| {
            words.set(0, 1);
            cache.dirty_count()
        });
        assert_eq!((seen, cache.dirty_count()), (Some(1), 1));
        cache.install(4, &[0; 4]).unwrap();
        cache.change(4, |_| ()).unwrap();
        assert_eq!(cache.dirty_count(), 1);
    }

    #[test]
    fn what_was_installed_is_read_until_it_is_evicted() {
        let cache = SliceCache::new(4, 8);
        assert_eq!(cache.get(3, 0, false), None);
        for slice in 0..8 {
            cache.install(slice, &words(slice * 10)).unwrap();
        }
        assert_eq!(cache.get(3, 1, false), Some((31, 0)));
        assert_eq!(cache.get(3, 2, true), Some((32, 33)));
        cache.install(8, &words(80)).unwrap();
        assert_eq!(cache.get(8, 0, false), Some((80, 0)));
        assert_eq!((0..8).filter(|slice| cache.contains(*slice)).count(), 7);
    }

    #[test]
    fn dirty_slices_are_not_evicted_and_become_clean_only_as_they_were_copied() {
        let cache = SliceCache::new(4, 8);
        for slice in 0..8 {
            cache.install(slice, &words(0)).unwrap();
            cache.change(slice, |words| words.set(1, 99)).unwrap();
        }
        assert_eq!(cache.install(8, &words(0)), Err(Full));
        let copies = cache.copy_dirty();
        cache.change(5, |words| words.set(2, 7)).unwrap();
        for copy in &copies {
            assert_eq!(copy.words[1], 99);
            cache.settle(copy);
        }
        assert_eq!(cache.dirty_count(), 1);
        cache.install(8, &words(0)).unwrap();
        assert_eq!(cache.get(5, 2, false), Some((7, 0)));
        cache.forget(|_| true);
        assert!(cache.contains(5) && !cache.contains(8));
    }

    #[test]
    fn a_change_that_sets_nothing_leaves_the_slice_clean() {
        let cache = SliceCache::new(4, 8);
        cache.install(1, &words(5)).unwrap();
        assert_eq!(cache.change(1, |words| words.get(3)), Some(8));
        assert_eq!(cache.change(2, |words| words.get(3)), None);
        assert_eq!(cache.dirty_count(), 0);
    }
}

#[cfg(all(test, loom))]
mod model {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    fn cache() -> Arc<SliceCache> {
        let cache = SliceCache::new(2, 1);
        // Every slot's words exist, as the facade's cell cannot be made under the model.
        for slice in 0..WAYS as u64 {
            cache.install(slice, &[slice, slice]).unwrap();
        }
        Arc::new(cache)
    }

    /// Two words that always are the same are never read apart.
    #[test]
    fn a_reader_sees_all_of_a_change_or_nothing() {
        loom::model(|| {
            let cache = cache();
            let writer = thread::spawn({
                let cache = Arc::clone(&cache);
                move || {
                    cache.change(0, |words| {
                        words.set(0, 70);
                        words.set(1, 70);
                    })
                }
            });
            if let Some((one, other)) = cache.get(0, 0, true) {
                assert_eq!(one, other);
                assert!(one == 0 || one == 70);
            }
            writer.join().unwrap();
        });
    }

    /// What a reader gets for a slice is never another slice's.
    #[test]
    fn a_reader_that_races_with_eviction_gets_nothing_or_the_slice() {
        loom::model(|| {
            let cache = cache();
            let evictor = thread::spawn({
                let cache = Arc::clone(&cache);
                move || cache.install(100, &[100, 100])
            });
            if let Some(words) = cache.get(0, 0, true) {
                assert_eq!(words, (0, 0));
            }
            if let Some(words) = cache.get(100, 0, true) {
                assert_eq!(words, (100, 100));
            }
            evictor.join().unwrap().unwrap();
        });
    }
}
