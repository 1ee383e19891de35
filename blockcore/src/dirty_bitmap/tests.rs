//! Bitmaps against a list of booleans, states against a table, and threads against each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bits::{Area, Bits, MAX_BITS};
use super::*;
use crate::ErrorKind;

const KIB: u64 = 1024;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// What one chunk covers at 512 bytes per bit.
const CHUNK: u64 = 128 * KIB * KIB;

/// SplitMix64: enough for choosing what to try.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// What a bitmap should be: a boolean per granule.
struct Model {
    length: u64,
    granularity_bytes: u64,
    dirty: Vec<bool>,
}

impl Model {
    fn new(length: u64, granularity_bytes: u64) -> Self {
        Self {
            length,
            granularity_bytes,
            dirty: vec![false; length.div_ceil(granularity_bytes) as usize],
        }
    }

    /// Where a granule begins and ends.
    fn span(&self, index: usize) -> (u64, u64) {
        let begin = index as u64 * self.granularity_bytes;
        (begin, (begin + self.granularity_bytes).min(self.length))
    }

    fn set(&mut self, offset: u64, bytes: u64) {
        for index in 0..self.dirty.len() {
            let (begin, end) = self.span(index);
            self.dirty[index] |= begin.max(offset) < end.min(offset + bytes);
        }
    }

    fn clear(&mut self, offset: u64, bytes: u64) {
        for index in 0..self.dirty.len() {
            let (begin, end) = self.span(index);
            self.dirty[index] &= begin < offset || end > offset + bytes;
        }
    }

    fn next(&self, wanted: bool, offset: u64, bytes: u64) -> Option<u64> {
        (0..self.dirty.len())
            .filter(|index| self.dirty[*index] == wanted)
            .map(|index| self.span(index))
            .find(|(begin, end)| (*begin).max(offset) < (*end).min(offset + bytes))
            .map(|(begin, _)| begin.max(offset))
    }

    fn next_area(&self, offset: u64, bytes: u64, max_bytes: u64) -> Option<Area> {
        let begin = self.next(true, offset, bytes)?;
        let end = (offset + bytes).min(self.length);
        let end = self.next(false, begin, end - begin).unwrap_or(end);
        Some(Area {
            offset: begin,
            bytes: (end - begin).min(max_bytes),
        })
    }

    fn count(&self) -> u64 {
        self.dirty.iter().filter(|dirty| **dirty).count() as u64
    }

    /// As the qcow2 specification has it, padded to whole words.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.dirty.len().div_ceil(64) * 8];
        for (index, dirty) in self.dirty.iter().enumerate() {
            bytes[index / 8] |= u8::from(*dirty) << (index % 8);
        }
        bytes
    }

    fn agrees_with(&self, bits: &Bits, context: &str) {
        let mut bytes = vec![0xee; bits.serialised_bytes(0, self.length) as usize];
        bits.serialise(0, self.length, &mut bytes);
        assert!(bytes == self.bytes(), "content differs, {context}");
        assert_eq!(bits.count(), self.count(), "{context}");
        let areas: u64 = bits
            .areas(0, u64::MAX, u64::MAX)
            .map(|area| area.bytes)
            .sum();
        let spans = (0..self.dirty.len()).filter(|index| self.dirty[*index]);
        let dirty: u64 = spans
            .map(|index| self.span(index).1 - self.span(index).0)
            .sum();
        assert_eq!(areas, dirty, "{context}");
    }
}

/// A place where something ends or begins, or beside it, or anywhere.
fn place(random: &mut Random, model: &Model) -> u64 {
    let unit = [1, 8, 64, 4096, 262_144][random.below(5) as usize] * model.granularity_bytes;
    let offset = random.below(model.length + 1);
    match random.below(4) {
        0 => offset,
        1 => model.length - random.below(model.length.min(3) + 1),
        _ => (offset / unit * unit + random.below(3)).saturating_sub(1),
    }
}

fn range(random: &mut Random, model: &Model) -> (u64, u64) {
    let (one, other) = (place(random, model), place(random, model));
    let begin = one.min(other);
    match random.below(4) {
        0 => (begin, random.below(4 * model.granularity_bytes)),
        1 => (begin, 1),
        _ => (begin, one.max(other) - begin),
    }
}

fn compare_with_model(seed: u64, longest_bits: u64, steps: u64) {
    let random = &mut Random(seed);
    let granularity_bytes = 512 << random.below(10);
    let length = 1 + random.below(longest_bits * granularity_bytes);
    let mut bits = Bits::new(length, granularity_bytes).unwrap();
    let mut model = Model::new(length, granularity_bytes);
    for step in 0..steps {
        let context = format!("seed {seed} step {step}");
        let (offset, bytes) = range(random, &model);
        match random.below(16) {
            0..=4 => {
                bits.set(offset, bytes);
                model.set(offset, bytes);
            }
            5..=7 => {
                bits.clear(offset, bytes);
                model.clear(offset, bytes);
            }
            8 => {
                let taken = bits.take();
                model.agrees_with(&taken, &context);
                assert!(bits.is_clean(0, model.length), "{context}");
                assert_eq!(bits.count(), 0, "{context}");
                match random.below(3) {
                    0 => model.dirty.fill(false),
                    1 => bits = taken,
                    _ => bits.merge(&taken),
                }
            }
            9 => {
                let length = 1 + random.below(longest_bits * granularity_bytes);
                bits = bits.resized(length).unwrap();
                model.length = length;
                let granules = length.div_ceil(granularity_bytes) as usize;
                model.dirty.resize(granules, false);
            }
            10 => {
                let align = bits.serialised_align();
                let begin = offset / align * align;
                let end = (offset + bytes).next_multiple_of(align).min(model.length);
                let part = end.max(begin) - begin;
                let mut data = vec![0; bits.serialised_bytes(begin, part) as usize];
                let kind = random.below(4);
                data.fill_with(|| [0, 0xff, random.next() as u8, 1][kind as usize]);
                match kind {
                    0 => bits.deserialise_zeroes(begin, part),
                    1 => bits.deserialise_ones(begin, part),
                    _ => bits.deserialise(begin, part, &data),
                }
                let first = (begin / granularity_bytes) as usize;
                for (index, dirty) in model.dirty.iter_mut().skip(first).enumerate() {
                    if let Some(byte) = data.get(index / 8) {
                        *dirty = byte & 1 << (index % 8) != 0;
                    }
                }
            }
            11 => {
                let other_granularity_bytes = 512 << random.below(10);
                let source = Bits::new(model.length, other_granularity_bytes).unwrap();
                let mut other = Model::new(model.length, other_granularity_bytes);
                if other.dirty.len() as u64 > longest_bits {
                    continue;
                }
                for _ in 0..random.below(5) {
                    let (offset, bytes) = range(random, &other);
                    source.set(offset, bytes);
                    other.set(offset, bytes);
                }
                bits.merge(&source);
                other.agrees_with(&source, &context);
                for index in 0..other.dirty.len() {
                    if other.dirty[index] {
                        let (begin, end) = other.span(index);
                        let first = (begin / granularity_bytes) as usize;
                        let last = ((end - 1) / granularity_bytes) as usize;
                        model.dirty[first..=last].fill(true);
                    }
                }
            }
            _ => {
                let dirty = model.next(true, offset, bytes);
                let clean = model.next(false, offset, bytes);
                assert_eq!(bits.next_dirty(offset, bytes), dirty, "{context}");
                assert_eq!(bits.next_clean(offset, bytes), clean, "{context}");
                assert_eq!(bits.is_clean(offset, bytes), dirty.is_none(), "{context}");
                let max_bytes = 1 + random.below(model.length);
                let area = model.next_area(offset, bytes, max_bytes);
                assert_eq!(bits.next_area(offset, bytes, max_bytes), area, "{context}");
                let index = (offset / granularity_bytes) as usize;
                let dirty = offset < model.length && model.dirty[index];
                assert_eq!(bits.get(offset), dirty, "{context}");
            }
        }
        if steps < 1000 || step % 16 == 0 {
            model.agrees_with(&bits, &context);
        }
    }
    model.agrees_with(&bits, &format!("seed {seed}"));
}

#[test]
fn small_bitmaps_do_what_a_list_of_booleans_does() {
    for seed in 0..300 {
        compare_with_model(seed, 400, 60);
    }
}

#[test]
fn bitmaps_of_several_summaries_do_what_a_list_of_booleans_does() {
    for seed in 1000..1060 {
        compare_with_model(seed, 20_000, 60);
    }
}

#[test]
fn bitmaps_of_several_chunks_do_what_a_list_of_booleans_does() {
    for seed in 2000..2010 {
        compare_with_model(seed, 700_000, 60);
    }
}

#[test]
fn a_range_that_reaches_past_the_end_stops_at_the_end() {
    let bits = Bits::new(10 * KIB + 1, 4 * KIB).unwrap();
    bits.set(8 * KIB, u64::MAX);
    assert_eq!(
        bits.next_area(0, u64::MAX, u64::MAX),
        area(8 * KIB, 2 * KIB + 1)
    );
    bits.set(10 * KIB + 1, 4 * KIB);
    bits.set(u64::MAX, 1);
    assert_eq!(bits.count(), 1);
    assert!(!bits.get(10 * KIB + 1));
    assert_eq!(bits.next_clean(8 * KIB, u64::MAX), None);
    bits.clear(8 * KIB, 2 * KIB);
    assert_eq!(
        bits.count(),
        1,
        "the last granule is not wholly in the range"
    );
    bits.clear(8 * KIB, 2 * KIB + 1);
    assert_eq!(bits.count(), 0);
}

fn area(offset: u64, bytes: u64) -> Option<Area> {
    Some(Area { offset, bytes })
}

#[test]
fn offsets_near_the_largest_are_marked_and_found() {
    for length in [u64::MAX, u64::MAX - 511, 1 << 63, (1 << 63) - 1] {
        let bits = Bits::new(length, 2 * GIB).unwrap();
        let last = (length - 1) / (2 * GIB) * (2 * GIB);
        bits.set(length - 1, 1);
        assert_eq!(bits.next_dirty(0, u64::MAX), Some(last));
        assert_eq!(
            bits.next_area(0, u64::MAX, u64::MAX),
            area(last, length - last)
        );
        assert_eq!(
            bits.next_area(length - 1, u64::MAX, u64::MAX),
            area(length - 1, 1)
        );
        assert_eq!(bits.next_clean(last, u64::MAX), None);
        assert_eq!(
            bits.areas(0, length, GIB).count() as u64,
            (length - last).div_ceil(GIB)
        );
        let align = bits.serialised_align();
        let part = last / align * align;
        let mut bytes = [0; 8];
        bits.serialise(part, length - part, &mut bytes);
        let copy = Bits::new(length, 2 * GIB).unwrap();
        copy.deserialise(part, length - part, &bytes);
        assert_eq!(copy.next_dirty(0, length), Some(last));
        bits.clear(last, length - last);
        assert!(bits.is_clean(0, length));
    }
}

#[test]
fn a_bitmap_with_too_many_bits_is_refused_with_a_granularity_that_would_do() {
    let refused = Bits::new(1 << 60, 512).unwrap_err();
    assert_eq!(refused.bits, 1 << 51);
    assert_eq!(refused.granularity_bytes, 1 << 26);
    assert!(Bits::new(1 << 60, refused.granularity_bytes).is_ok());
    assert!(Bits::new(1 << 60, refused.granularity_bytes / 2).is_err());
    assert!(Bits::new(MAX_BITS * 512, 512).is_ok());
    assert!(Bits::new(MAX_BITS * 512 + 1, 512).is_err());
    let error = DirtyBitmap::new("disk0".into(), "b0", 1 << 60, 512)
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(
        error.to_string(),
        "cannot add bitmap 'b0' to node 'disk0': it would need 2251799813685248 bits and there can \
         be 17179869184; the granularity must be at least 67108864 bytes"
    );
}

#[test]
fn an_empty_disk_has_an_empty_bitmap() {
    let bits = Bits::new(0, 512).unwrap();
    bits.set(0, 512);
    bits.clear(0, 512);
    assert_eq!((bits.count(), bits.get(0)), (0, false));
    assert_eq!(bits.next_dirty(0, u64::MAX), None);
    assert_eq!(bits.next_clean(0, u64::MAX), None);
    assert_eq!(bits.serialised_bytes(0, 0), 0);
    assert_eq!(bits.resized(4096).unwrap().next_clean(0, 4096), Some(0));
}

#[test]
fn a_search_finds_its_way_through_a_huge_disk() {
    let bits = Bits::new(900 * TIB, 64 * KIB).unwrap();
    bits.set(0, 1);
    bits.set(899 * TIB, 1);
    let areas: Vec<_> = bits.areas(0, u64::MAX, u64::MAX).collect();
    assert_eq!(areas.len(), 2);
    assert_eq!(areas[1].offset, 899 * TIB);
    bits.set(100 * GIB, 200 * GIB);
    for _ in 0..2 {
        assert_eq!(bits.next_clean(100 * GIB, u64::MAX), Some(300 * GIB));
    }
    bits.clear(200 * GIB + 1, 128 * KIB);
    assert_eq!(
        bits.next_clean(100 * GIB, u64::MAX),
        Some(200 * GIB + 64 * KIB)
    );
    assert_eq!(
        bits.next_area(100 * GIB, u64::MAX, u64::MAX).unwrap().bytes,
        100 * GIB + 64 * KIB
    );
}

#[test]
fn serialised_bits_begin_at_the_low_end_of_the_first_byte() {
    let bits = Bits::new(700 * 512, 512).unwrap();
    assert_eq!(bits.serialised_align(), 64 * 512);
    assert_eq!(bits.serialised_bytes(0, 700 * 512), 88);
    assert_eq!(bits.serialised_coverage(88), 704 * 512);
    bits.set(0, 512);
    bits.set(9 * 512, 512);
    bits.set(699 * 512, 512);
    let mut bytes = [0; 88];
    bits.serialise(0, 700 * 512, &mut bytes);
    assert_eq!(bytes[..3], [1, 2, 0]);
    assert_eq!(bytes[86], 0);
    assert_eq!(bytes[699 / 8], 1 << (699 % 8));
}

#[test]
fn what_is_set_in_the_padding_of_serialised_bits_is_ignored() {
    let bits = Bits::new(3 * 512, 512).unwrap();
    bits.deserialise(0, 3 * 512, &[0xff; 8]);
    assert_eq!(bits.count(), 3);
    let mut bytes = [0; 8];
    bits.serialise(0, 3 * 512, &mut bytes);
    assert_eq!(bytes, [7, 0, 0, 0, 0, 0, 0, 0]);
    let grown = bits.resized(64 * 512).unwrap();
    assert_eq!(grown.next_clean(0, u64::MAX), Some(3 * 512));
}

#[test]
fn a_bitmap_that_shrinks_and_grows_again_is_clean_where_it_was_cut() {
    let bits = Bits::new(3 * CHUNK, 512).unwrap();
    bits.set(0, 3 * CHUNK);
    let cut = bits.resized(CHUNK + 700).unwrap();
    assert_eq!(cut.count(), CHUNK / 512 + 2);
    assert_eq!(cut.next_area(0, u64::MAX, u64::MAX), area(0, CHUNK + 700));
    let grown = cut.resized(2 * CHUNK).unwrap();
    assert_eq!(grown.next_clean(0, u64::MAX), Some(CHUNK + 1024));
    assert_eq!(grown.count(), CHUNK / 512 + 2);
}

/// A mirror under load: if this fails, the copy misses a write that its guest was told is done.
#[test]
fn a_copier_that_clears_then_reads_ends_with_what_the_writers_wrote() {
    const CELLS: u64 = 3000;
    const WRITERS: u64 = 4;
    let new_cells = || (0..CELLS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let (disk, running) = (new_cells(), AtomicU64::new(WRITERS));
    let mut copied = vec![0; CELLS as usize];
    let bits = Bits::new(CELLS * 512, 512).unwrap();
    let copy = |copied: &mut Vec<u64>| {
        for area in bits.areas(0, u64::MAX, 64 * KIB) {
            bits.clear(area.offset, area.bytes);
            for cell in area.offset / 512..(area.offset + area.bytes) / 512 {
                copied[cell as usize] = disk[cell as usize].load(Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for seed in 0..WRITERS {
            let (bits, disk, running) = (&bits, &disk, &running);
            scope.spawn(move || {
                let random = &mut Random(seed);
                for _ in 0..60_000 {
                    let first = random.below(CELLS);
                    let count = (1 + random.below(3)).min(CELLS - first);
                    for cell in first..first + count {
                        disk[cell as usize].fetch_add(1, Ordering::Relaxed);
                    }
                    bits.set(first * 512, count * 512);
                }
                running.fetch_sub(1, Ordering::Release);
            });
        }
        while running.load(Ordering::Acquire) > 0 {
            copy(&mut copied);
        }
    });
    copy(&mut copied);
    let written: Vec<u64> = disk.into_iter().map(AtomicU64::into_inner).collect();
    assert!(copied == written);
    assert_eq!(bits.count(), 0);
    assert!(bits.is_clean(0, u64::MAX));
}

#[test]
fn workers_that_mark_side_by_side_leave_every_mark_and_an_exact_count() {
    let bits = Bits::new(2 * CHUNK, 512).unwrap();
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let bits = &bits;
            scope.spawn(move || {
                for granule in (worker..2 * CHUNK / 512).step_by(4) {
                    bits.set(granule * 512, 512 + granule % 2);
                }
            });
        }
    });
    assert_eq!(bits.count(), 2 * CHUNK / 512);
    assert_eq!(bits.next_clean(0, u64::MAX), None);
}

// What an operator knows.

const DISK: u64 = 1 << 20;

fn bitmap(name: &str) -> DirtyBitmap {
    DirtyBitmap::new("disk0".into(), name, DISK, 64 * KIB).unwrap()
}

fn refusal<T>(result: Result<T, crate::Error>) -> (ErrorKind, String) {
    let error = result.err().expect("refused");
    (error.kind(), error.to_string())
}

#[test]
fn names_and_granularities_outside_their_bounds_are_refused() {
    let new = |name: &str, granularity| DirtyBitmap::new("disk0".into(), name, DISK, granularity);
    assert!(new("b", 512).is_ok());
    assert!(new(&"b".repeat(1023), 1 << 31).is_ok());
    let long = "ä".repeat(512);
    for (name, granularity) in [
        ("", 512),
        (long.as_str(), 512),
        ("b", 0),
        ("b", 256),
        ("b", 513),
        ("b", 1 << 32),
    ] {
        assert_eq!(refusal(new(name, granularity)).0, ErrorKind::Invalid);
    }
    assert_eq!(
        refusal(new("b", 1000)).1,
        "cannot add bitmap 'b' to node 'disk0': the granularity must be a power of two from 512 to \
         2147483648 bytes, not 1000"
    );
}

#[test]
fn the_default_granularity_is_the_cluster_size_within_bounds() {
    for (cluster_bytes, granularity_bytes) in [
        (None, 65536),
        (Some(512), 4096),
        (Some(4096), 4096),
        (Some(16384), 16384),
        (Some(2 << 20), 65536),
    ] {
        assert_eq!(default_granularity_bytes(cluster_bytes), granularity_bytes);
    }
}

#[test]
fn each_state_refuses_what_would_change_what_it_protects() {
    use Operation::*;
    let all = [
        Remove, Clear, Enable, Disable, MergeInto, MergeFrom, Use, Freeze, Resize,
    ];
    let mut busy = bitmap("b");
    busy.hold("export 'nbd0'").unwrap();
    let mut inconsistent = bitmap("b");
    inconsistent.set_inconsistent();
    let mut read_only = bitmap("b");
    read_only.set_read_only(true);
    for operation in all {
        bitmap("b").check(operation).unwrap();
        assert_eq!(refusal(busy.check(operation)).0, ErrorKind::Busy);
        match operation {
            Remove => inconsistent.check(operation).unwrap(),
            _ => assert_eq!(refusal(inconsistent.check(operation)).0, ErrorKind::Corrupt),
        }
        match operation {
            Enable | Disable | MergeFrom | Use => read_only.check(operation).unwrap(),
            _ => assert_eq!(
                refusal(read_only.check(operation)).0,
                ErrorKind::PermissionDenied
            ),
        }
    }
    assert_eq!(
        refusal(busy.clear()).1,
        "cannot clear bitmap 'b' of node 'disk0': export 'nbd0' uses it"
    );
    assert_eq!(
        refusal(inconsistent.enable()).1,
        "cannot enable bitmap 'b' of node 'disk0': it is inconsistent, since it was not stored when \
         its image was last written to; it can only be removed"
    );
    assert_eq!(
        refusal(read_only.clear_with_backup()).1,
        "cannot clear bitmap 'b' of node 'disk0': it is stored in an image that is open read-only"
    );
    busy.release();
    busy.clear().unwrap();
}

#[test]
fn what_is_written_after_a_clear_stays_marked_when_the_clear_is_undone() {
    let bitmap = bitmap("b");
    bitmap.bits().set(0, 1);
    let backup = bitmap.clear_with_backup().unwrap();
    assert_eq!(bitmap.status().count_bytes, 0);
    bitmap.bits().set(128 * KIB, 1);
    bitmap.restore(backup);
    assert!(bitmap.bits().get(0) && bitmap.bits().get(128 * KIB));
    assert_eq!(bitmap.status().count_bytes, 128 * KIB);
}

#[test]
fn a_merge_of_several_marks_what_any_has_and_can_be_undone() {
    let (target, one) = (bitmap("target"), bitmap("one"));
    let two = DirtyBitmap::new("disk1".into(), "two", DISK, 4 * KIB).unwrap();
    target.bits().set(0, 1);
    one.bits().set(64 * KIB, 1);
    two.bits().set(256 * KIB - 1, 2);
    let backup = target.merge_with_backup(&[&one, &two, &target]).unwrap();
    let areas: Vec<_> = target.bits().areas(0, DISK, DISK).collect();
    assert_eq!(areas.len(), 2);
    assert_eq!(Some(areas[0]), area(0, 128 * KIB));
    assert_eq!(Some(areas[1]), area(192 * KIB, 128 * KIB));
    target.restore(backup);
    assert_eq!(target.bits().areas(0, DISK, DISK).next(), area(0, 64 * KIB));
    assert_eq!(target.status().count_bytes, 64 * KIB);
}

#[test]
fn a_merge_that_one_source_refuses_changes_nothing() {
    let (target, good) = (bitmap("target"), bitmap("good"));
    good.bits().set(0, DISK);
    let longer = DirtyBitmap::new("disk1".into(), "longer", DISK + 1, 64 * KIB).unwrap();
    assert_eq!(
        refusal(target.merge(&[&good, &longer])),
        (
            ErrorKind::Invalid,
            "cannot merge bitmap 'longer' of node 'disk1' into bitmap 'target' of node 'disk0': one \
             is over 1048577 bytes and the other over 1048576"
                .into()
        )
    );
    let mut used = bitmap("used");
    used.freeze("job 'backup0'").unwrap();
    assert_eq!(
        refusal(target.merge_with_backup(&[&good, &used])),
        (
            ErrorKind::Busy,
            "cannot merge bitmap 'used' of node 'disk0': job 'backup0' uses it".into()
        )
    );
    assert_eq!(target.status().count_bytes, 0);
}

#[test]
fn a_frozen_bitmap_stays_as_it_is_while_its_successor_records() {
    let mut set = BitmapSet::new("disk0".into(), DISK);
    set.add("b", 64 * KIB).unwrap();
    set.mark(0, 1);
    let bitmap = set.get_mut("b").unwrap();
    bitmap.freeze("job 'backup0'").unwrap();
    assert_eq!(bitmap.user(), Some("job 'backup0'"));
    let recorder = set.recorder();
    recorder.mark(64 * KIB, 1);
    let status = &set.statuses()[0];
    assert!(status.busy && status.recording);
    assert_eq!(status.count_bytes, 64 * KIB);
    assert!(!set.get("b").unwrap().bits().get(64 * KIB));

    let old = set.get_mut("b").unwrap().abdicate();
    assert!(old.get(0) && !old.get(64 * KIB));
    recorder.mark(128 * KIB, 1);
    let bits = set.get("b").unwrap().bits();
    assert!(!bits.get(0) && bits.get(64 * KIB) && bits.get(128 * KIB));
    assert!(!set.statuses()[0].busy);
}

#[test]
fn a_reclaimed_bitmap_has_its_own_marks_and_its_successors() {
    let mut set = BitmapSet::new("disk0".into(), DISK);
    set.add("b", 64 * KIB).unwrap();
    set.mark(0, 1);
    set.get_mut("b").unwrap().freeze("job 'backup0'").unwrap();
    set.mark(64 * KIB, 1);
    set.get_mut("b").unwrap().reclaim();
    set.recorder().mark(128 * KIB, 1);
    let bits = set.get("b").unwrap().bits();
    assert_eq!(bits.areas(0, DISK, DISK).next(), area(0, 192 * KIB));
    assert!(set.get("b").unwrap().user().is_none());
}

#[test]
fn a_disabled_bitmap_notes_nothing_frozen_or_not() {
    let mut set = BitmapSet::new("disk0".into(), DISK);
    set.add("b", 64 * KIB).unwrap().disable().unwrap();
    assert!(set.recorder().is_empty());
    set.mark(0, 1);
    set.get_mut("b").unwrap().freeze("job 'backup0'").unwrap();
    assert!(set.recorder().is_empty());
    assert!(!set.statuses()[0].recording);
    set.mark(0, 1);
    set.get_mut("b").unwrap().reclaim();
    assert!(set.get("b").unwrap().bits().is_clean(0, DISK));
    set.get_mut("b").unwrap().enable().unwrap();
    set.recorder().mark(0, 1);
    assert!(set.get("b").unwrap().bits().get(0));
}

#[test]
fn names_are_unique_and_a_removed_bitmap_can_be_put_back() {
    let mut set = BitmapSet::new("disk0".into(), DISK);
    set.add("b", 64 * KIB).unwrap();
    set.mark(0, 1);
    assert_eq!(
        refusal(set.add("b", 512)),
        (
            ErrorKind::Exists,
            "node 'disk0' has a bitmap 'b' already".into()
        )
    );
    let removed = set.remove("b").unwrap();
    assert!(set.is_empty());
    assert_eq!(
        refusal(set.remove("b")),
        (ErrorKind::NotFound, "node 'disk0' has no bitmap 'b'".into())
    );
    set.insert(removed).unwrap();
    assert!(set.get("b").unwrap().bits().get(0));
    set.get_mut("b").unwrap().hold("export 'nbd0'").unwrap();
    assert_eq!(refusal(set.remove("b")).0, ErrorKind::Busy);
    assert!(set.get("b").is_ok());
}

#[test]
fn a_resize_that_one_bitmap_refuses_changes_none() {
    let mut set = BitmapSet::new("disk0".into(), DISK);
    set.add("a", 64 * KIB).unwrap();
    set.add("b", 512).unwrap();
    set.mark(DISK - 1, 1);
    let (kind, message) = refusal(set.resize(1 << 60));
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(
        message.starts_with("cannot resize bitmap 'a' of node 'disk0'"),
        "{message}"
    );
    set.get_mut("b").unwrap().freeze("job 'backup0'").unwrap();
    assert_eq!(refusal(set.resize(2 * DISK)).0, ErrorKind::Busy);
    assert!(set.iter().all(|bitmap| bitmap.bits().length() == DISK));
    set.get_mut("b").unwrap().reclaim();
    set.resize(2 * DISK).unwrap();
    set.recorder().mark(2 * DISK - 1, 1);
    let counts: Vec<u64> = set
        .statuses()
        .iter()
        .map(|status| status.count_bytes)
        .collect();
    assert_eq!(counts, [128 * KIB, 1024]);
    set.resize(DISK).unwrap();
    let counts: Vec<u64> = set
        .statuses()
        .iter()
        .map(|status| status.count_bytes)
        .collect();
    assert_eq!(counts, [64 * KIB, 512]);
    assert!(Arc::strong_count(set.get("a").unwrap().bits()) == 1);
}

/// What an image would keep: marked at its first granule.
fn kept(name: &str, length: u64, enabled: bool, inconsistent: bool) -> KeptBitmap {
    let bits = Bits::new(length, 4096).unwrap();
    bits.set(0, 1);
    KeptBitmap {
        name: name.into(),
        bits: Arc::new(bits),
        enabled,
        inconsistent,
    }
}

#[test]
fn what_an_image_keeps_is_loaded_with_its_states() {
    let mut set = BitmapSet::new("disk".into(), 1 << 20);
    let list = vec![
        kept("on", 1 << 20, true, false),
        kept("off", 1 << 20, false, false),
        kept("useless", 1 << 20, true, true),
    ];
    set.load(list, 1 << 20, true);
    let statuses = set.statuses();
    let recording: Vec<_> = statuses.iter().map(|status| status.recording).collect();
    // By name: off, on, useless.
    assert_eq!(recording, [false, true, false]);
    assert!(statuses.iter().all(|status| status.persistent));
    assert!(set.get("useless").unwrap().is_inconsistent());
    assert!(set.get("on").unwrap().is_read_only());
    let refused = set.remove("on").map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    set.set_read_only(false);
    set.remove("on").unwrap();
    let names: Vec<_> = set.kept().into_iter().map(|kept| kept.name).collect();
    assert_eq!(names, ["off", "useless"]);
}

#[test]
fn what_is_read_anew_takes_the_place_of_what_there_was_and_leaves_other_bitmaps() {
    let mut set = BitmapSet::new("disk".into(), 1 << 20);
    set.load(
        vec![
            kept("stays", 1 << 20, true, false),
            kept("goes", 1 << 20, true, false),
        ],
        1 << 20,
        false,
    );
    set.add("volatile", 4096).unwrap();
    set.mark(8192, 1);
    set.get_mut("stays").unwrap().hold("export 'e'").unwrap();
    let list = vec![
        kept("stays", 2 << 20, false, false),
        kept("new", 2 << 20, true, false),
    ];
    set.load(list, 2 << 20, false);
    let names: Vec<_> = set
        .statuses()
        .into_iter()
        .map(|status| status.name)
        .collect();
    assert_eq!(names, ["new", "stays", "volatile"]);
    let stays = set.get("stays").unwrap();
    assert!(stays.status().busy && !stays.status().recording);
    assert!(stays.bits().get(0) && !stays.bits().get(8192));
    let volatile = set.get("volatile").unwrap();
    assert!(volatile.bits().get(8192));
    assert_eq!((volatile.bits().length(), set.length()), (2 << 20, 2 << 20));
}

#[test]
fn what_is_written_while_a_bitmap_is_frozen_is_kept_with_what_was_before() {
    let mut set = BitmapSet::new("disk".into(), 1 << 20);
    set.load(vec![kept("b", 1 << 20, true, false)], 1 << 20, false);
    set.get_mut("b").unwrap().freeze("job 'j'").unwrap();
    set.mark(65536, 1);
    let kept = set.kept().remove(0);
    assert!(kept.bits.get(0) && kept.bits.get(65536));
    assert!(!set.get("b").unwrap().bits().get(65536));
}
