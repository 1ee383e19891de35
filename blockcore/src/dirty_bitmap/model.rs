//! The bits under the model checker: every interleaving and every order of memory that the rules allow.
//!
//! A chunk has two words here. `Disk` stands for what a write leaves behind, with no ordering of its own.

use super::bits::Bits;
use crate::sync::{Arc, AtomicU64, Ordering};

const GRANULE: u64 = 512;
const WORD: u64 = 64 * GRANULE;
const CHUNK: u64 = 2 * WORD;

type Disk = Arc<AtomicU64>;

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    // Every known way to break this shows with fewer; all of them would take hours.
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(model);
}

fn bits(length: u64) -> Arc<Bits> {
    Arc::new(Bits::new(length, GRANULE).expect("few bits"))
}

fn write(disk: &Disk, bits: &Bits, offset: u64) {
    disk.store(1, Ordering::Relaxed);
    bits.set(offset, 1);
}

fn a_clear_sees_the_write_or_leaves_the_bit(before: &'static [u64]) {
    check(move || {
        let (bits, disk) = (bits(WORD), Disk::default());
        for offset in before {
            bits.set(*offset, 1);
        }
        let writer = {
            let (bits, disk) = (Arc::clone(&bits), Arc::clone(&disk));
            loom::thread::spawn(move || write(&disk, &bits, 0))
        };
        bits.clear(0, GRANULE);
        let seen = disk.load(Ordering::Relaxed) == 1;
        writer.join().unwrap();
        assert!(seen || bits.next_dirty(0, GRANULE) == Some(0));
        assert_eq!(bits.count() > 0, bits.next_dirty(0, WORD).is_some());
    });
}

#[test]
fn a_clear_sees_a_write_to_what_was_clean_or_leaves_its_bit() {
    a_clear_sees_the_write_or_leaves_the_bit(&[]);
}

#[test]
fn a_clear_sees_a_write_to_what_was_dirty_or_leaves_its_bit() {
    a_clear_sees_the_write_or_leaves_the_bit(&[0]);
}

#[test]
fn a_clear_sees_a_write_beside_what_is_dirty_or_leaves_its_bit() {
    a_clear_sees_the_write_or_leaves_the_bit(&[GRANULE]);
}

/// What `set` marks is found by a search of the same thread at once, while another thread clears the
/// only other bit there is, which lies at `other`. The bit is in the second word: a search looks at its
/// first word in any case, at others by the summaries.
fn a_set_bit_is_found_while_another_is_cleared(other: u64) {
    check(move || {
        let bits = bits(CHUNK);
        bits.set(other, 1);
        let setter = {
            let bits = Arc::clone(&bits);
            loom::thread::spawn(move || {
                bits.set(WORD, 1);
                let found = bits.areas(0, CHUNK, GRANULE).last();
                assert!(found.is_some_and(|area| area.offset >= WORD));
            })
        };
        bits.clear(other, GRANULE);
        setter.join().unwrap();
        let found: Vec<_> = bits.areas(0, CHUNK, u64::MAX).collect();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].offset, found[0].bytes), (WORD, GRANULE));
        assert_eq!(bits.count(), 1);
    });
}

#[test]
fn a_bit_is_found_while_another_of_its_word_is_cleared() {
    a_set_bit_is_found_while_another_is_cleared(WORD + GRANULE);
}

#[test]
fn a_bit_is_found_while_another_of_its_chunk_is_cleared() {
    a_set_bit_is_found_while_another_is_cleared(0);
}

/// The bit lies in the second word, so that the search must go by the summaries.
#[test]
fn a_bit_that_another_worker_is_setting_is_found_once_set_returns() {
    check(|| {
        let bits = bits(CHUNK);
        let other = {
            let bits = Arc::clone(&bits);
            loom::thread::spawn(move || bits.set(WORD, 1))
        };
        bits.set(WORD, 1);
        assert_eq!(bits.next_dirty(0, CHUNK), Some(WORD));
        other.join().unwrap();
        assert_eq!(bits.count(), 1);
    });
}

/// Two writers and a clear. When a writer's `set` has returned, a search finds its bit or the clear has
/// seen its write, though the other writer, who may have been first, is half done.
fn of_two_writers_of_a_granule_neither_is_lost_to_a_clear(dirty_before: bool) {
    check(move || {
        let bits = bits(CHUNK);
        let disks = [Disk::default(), Disk::default()];
        if dirty_before {
            bits.set(WORD, 1);
        }
        let writers = [0, 1].map(|writer: usize| {
            let (bits, disk) = (Arc::clone(&bits), Arc::clone(&disks[writer]));
            loom::thread::spawn(move || {
                write(&disk, &bits, WORD);
                writer == 0 || !bits.is_clean(0, CHUNK)
            })
        });
        bits.clear(WORD, GRANULE);
        let seen = disks.map(|disk| disk.load(Ordering::Relaxed) == 1);
        let found = writers.map(|writer| writer.join().unwrap());
        assert!(seen[1] || found[1]);
        assert!(seen == [true, true] || bits.next_dirty(0, CHUNK) == Some(WORD));
        assert_eq!(bits.count() > 0, bits.get(WORD));
    });
}

#[test]
fn of_two_writers_of_a_clean_granule_neither_is_lost_to_a_clear() {
    of_two_writers_of_a_granule_neither_is_lost_to_a_clear(false);
}

#[test]
fn of_two_writers_of_a_dirty_granule_neither_is_lost_to_a_clear() {
    of_two_writers_of_a_granule_neither_is_lost_to_a_clear(true);
}

#[test]
fn a_bit_set_while_all_are_taken_is_taken_or_remains() {
    check(|| {
        let (bits, disk) = (bits(CHUNK), Disk::default());
        bits.set(WORD + GRANULE, 1);
        let writer = {
            let (bits, disk) = (Arc::clone(&bits), Arc::clone(&disk));
            loom::thread::spawn(move || write(&disk, &bits, WORD))
        };
        let taken = bits.take();
        let seen = disk.load(Ordering::Relaxed) == 1;
        writer.join().unwrap();
        let remains = bits.next_dirty(0, CHUNK) == Some(WORD);
        assert!(remains != (taken.next_dirty(0, CHUNK) == Some(WORD)));
        assert!(seen || remains);
        assert!(taken.get(WORD + GRANULE));
        assert_eq!(
            (taken.count(), bits.count()),
            (1 + u64::from(!remains), u64::from(remains))
        );
    });
}

#[test]
fn workers_that_are_first_in_a_chunk_set_their_bits_in_the_same_one() {
    check(|| {
        let bits = bits(2 * CHUNK);
        let other = {
            let bits = Arc::clone(&bits);
            loom::thread::spawn(move || {
                bits.set(CHUNK, 1);
                assert_eq!(bits.next_dirty(0, CHUNK + GRANULE), Some(CHUNK));
            })
        };
        bits.set(CHUNK + WORD, 1);
        assert!(bits.next_dirty(0, 2 * CHUNK).is_some());
        other.join().unwrap();
        assert_eq!(bits.count(), 2);
        assert_eq!(bits.next_dirty(CHUNK + 1, CHUNK), Some(CHUNK + 1));
        assert_eq!(bits.next_dirty(CHUNK + WORD, CHUNK), Some(CHUNK + WORD));
    });
}

#[test]
fn a_search_for_clean_bits_sees_what_was_cleared_after_it_found_a_full_word() {
    check(|| {
        let bits = bits(CHUNK);
        bits.set(0, CHUNK);
        let searcher = {
            let bits = Arc::clone(&bits);
            loom::thread::spawn(move || bits.next_clean(0, CHUNK))
        };
        bits.clear(WORD, GRANULE);
        assert_eq!(bits.next_clean(0, CHUNK), Some(WORD));
        let found = searcher.join().unwrap();
        assert!(found.is_none() || found == Some(WORD));
    });
}

#[test]
fn a_word_that_is_replaced_while_it_is_set_is_counted_and_found_as_it_is() {
    check(|| {
        let bits = bits(CHUNK);
        bits.set(WORD, 1);
        let setter = {
            let bits = Arc::clone(&bits);
            loom::thread::spawn(move || bits.set(WORD + GRANULE, 1))
        };
        bits.put_word(1, 0);
        setter.join().unwrap();
        assert!(!bits.get(WORD));
        assert_eq!(bits.count(), u64::from(bits.get(WORD + GRANULE)));
        assert_eq!(bits.count() == 1, !bits.is_clean(0, CHUNK));
    });
}
