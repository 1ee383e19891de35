//! Memory that a transfer moves bytes from or to: a list of segments and what keeps them mapped.
//!
//! The memory is never referenced, only copied from and to: it may be a guest's, which changes it
//! whenever it likes, and the kernel may be writing to it. What must not change while it is looked
//! at (checked, compressed, compared) is copied to memory of our own first.
//!
//! Threads: [`Segments`] stays on its worker. What it points to stays mapped as long as it lives.

#![expect(
    unsafe_code,
    reason = "lists of raw memory segments for the kernel, and copies from and to them"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use smallvec::SmallVec;

/// Segments that fit without an allocation: a request of a few pages, as most are.
const INLINE_SEGMENTS: usize = 4;

/// One piece of memory, laid out as the kernel's `struct iovec`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Segment {
    base: NonNull<u8>,
    bytes: usize,
}

impl Segment {
    /// The first byte.
    pub fn as_ptr(self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// How many bytes.
    pub fn bytes(self) -> usize {
        self.bytes
    }
}

/// An ordered list of memory segments, with whatever keeps them mapped.
#[derive(Clone, Default)]
pub struct Segments {
    list: SmallVec<[Segment; INLINE_SEGMENTS]>,
    bytes: u64,
    owner: Option<Rc<dyn Any>>,
}

impl Segments {
    /// Fresh zeroed memory of `bytes` bytes at a multiple of `alignment`.
    ///
    /// # Panics
    ///
    /// If `alignment` is not a power of two, or `bytes` is above what a machine can address. Callers
    /// bound `bytes` before.
    pub fn allocate(bytes: usize, alignment: usize) -> Self {
        let memory = Rc::new(Allocation::new(bytes, alignment));
        let mut segments = Self::default();
        if bytes > 0 {
            segments.list.push(Segment {
                base: memory.base,
                bytes,
            });
        }
        segments.bytes = bytes as u64;
        segments.owner = Some(memory);
        segments
    }

    /// The memory of all `parts`, one after the other.
    pub fn join(parts: Vec<Self>) -> Self {
        let mut joined = Self::default();
        for part in &parts {
            joined.list.extend_from_slice(&part.list);
            joined.bytes += part.bytes;
        }
        joined.owner = Some(Rc::new(parts));
        joined
    }

    /// Whether nothing else keeps this memory.
    pub(crate) fn is_sole_owner(&self) -> bool {
        let owner = self.owner.as_ref();
        owner.is_some_and(|owner| Rc::strong_count(owner) == 1)
    }

    /// Adds the `bytes` bytes at `base` to the end. Zero bytes add nothing.
    ///
    /// # Safety
    ///
    /// The memory must stay mapped, readable and writable, as long as the owner given to
    /// [`set_owner`](Self::set_owner) lives, and that owner must be set before the list is used.
    pub unsafe fn push_raw(&mut self, base: NonNull<u8>, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.bytes += bytes as u64;
        self.list.push(Segment { base, bytes });
    }

    /// Says what keeps the memory mapped.
    pub fn set_owner(&mut self, owner: Rc<dyn Any>) {
        self.owner = Some(owner);
    }

    /// Empties the list, keeping its allocation for the next request.
    pub fn clear(&mut self) {
        self.list.clear();
        self.bytes = 0;
        self.owner = None;
    }

    /// The sum of all segments' bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether there is nothing to transfer.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The segments, in order.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// Whether every segment begins and ends at a multiple of `alignment` (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.list
            .iter()
            .all(|s| (s.base.as_ptr() as usize | s.bytes) & mask == 0)
    }

    /// The `bytes` bytes from `offset` on, keeping the same memory mapped.
    ///
    /// # Panics
    ///
    /// If the range is not inside the list.
    pub fn slice(&self, offset: u64, bytes: u64) -> Self {
        assert!(offset <= self.bytes && bytes <= self.bytes - offset);
        let mut slice = Self {
            owner: self.owner.clone(),
            bytes,
            ..Self::default()
        };
        let (mut skip, mut left) = (offset as usize, bytes as usize);
        for segment in &self.list {
            if left == 0 {
                break;
            }
            if skip >= segment.bytes {
                skip -= segment.bytes;
                continue;
            }
            let take = left.min(segment.bytes - skip);
            // SAFETY: skip < segment.bytes, so the result is inside the same segment.
            let base = unsafe { segment.base.add(skip) };
            slice.list.push(Segment { base, bytes: take });
            left -= take;
            skip = 0;
        }
        slice
    }

    /// Removes the first `bytes` bytes.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub fn skip(&mut self, bytes: u64) {
        assert!(bytes <= self.bytes);
        self.bytes -= bytes;
        let mut left = bytes as usize;
        let mut whole = 0;
        for segment in &mut self.list {
            if left < segment.bytes {
                // SAFETY: left < segment.bytes, so the result is inside the same segment.
                segment.base = unsafe { segment.base.add(left) };
                segment.bytes -= left;
                break;
            }
            left -= segment.bytes;
            whole += 1;
        }
        self.list.drain(..whole);
    }

    /// Removes the last byte and gives it out on its own; `None` if there is none.
    pub fn take_last_byte(&mut self) -> Option<Byte> {
        let last = self.list.last_mut()?;
        last.bytes -= 1;
        self.bytes -= 1;
        // SAFETY: the index of the segment's last byte.
        let place = unsafe { last.base.add(last.bytes) };
        if last.bytes == 0 {
            self.list.pop();
        }
        Some(Byte {
            place,
            _owner: self.owner.clone(),
        })
    }

    /// Copies from the beginning of the list to `to`; returns how many bytes there were.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in &self.list {
            let bytes = segment.bytes.min(to.len() - done);
            // SAFETY: the segment is mapped (see `push_raw`), `bytes` is within it and within the
            // rest of `to`, and a Rust slice never overlaps memory that only segments name.
            unsafe {
                segment
                    .base
                    .as_ptr()
                    .copy_to_nonoverlapping(to[done..].as_mut_ptr(), bytes);
            }
            done += bytes;
            if done == to.len() {
                break;
            }
        }
        done
    }

    /// Copies `from` to the beginning of the list; returns how many bytes fitted.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for segment in &self.list {
            let bytes = segment.bytes.min(from.len() - done);
            // SAFETY: as in `copy_to`, with the roles exchanged.
            unsafe {
                segment
                    .base
                    .as_ptr()
                    .copy_from_nonoverlapping(from[done..].as_ptr(), bytes);
            }
            done += bytes;
            if done == from.len() {
                break;
            }
        }
        done
    }

    /// Copies as many bytes from `from` as both lists have.
    pub fn copy_from_segments(&self, from: &Segments) {
        let (mut to_index, mut to_skip) = (0, 0);
        for source in &from.list {
            let mut source_skip = 0;
            while source_skip < source.bytes {
                let Some(target) = self.list.get(to_index) else {
                    return;
                };
                let bytes = (source.bytes - source_skip).min(target.bytes - to_skip);
                // SAFETY: both ranges are inside their segments, which are mapped. They may be the
                // same guest memory twice, so the copy allows an overlap.
                unsafe {
                    target
                        .base
                        .as_ptr()
                        .add(to_skip)
                        .copy_from(source.base.as_ptr().add(source_skip), bytes);
                }
                source_skip += bytes;
                to_skip += bytes;
                if to_skip == target.bytes {
                    to_index += 1;
                    to_skip = 0;
                }
            }
        }
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        for segment in &self.list {
            // SAFETY: the segment is mapped (see `push_raw`).
            unsafe { segment.base.as_ptr().write_bytes(value, segment.bytes) };
        }
    }

    /// Whether every byte is zero, each looked at once.
    pub fn is_zero(&self) -> bool {
        let mut block = [0; 4096];
        for segment in &self.list {
            let mut done = 0;
            while done < segment.bytes {
                let bytes = (segment.bytes - done).min(block.len());
                // SAFETY: as in `copy_to`: a part of the segment, and no more than the block has.
                unsafe {
                    segment
                        .base
                        .as_ptr()
                        .add(done)
                        .copy_to_nonoverlapping(block.as_mut_ptr(), bytes);
                }
                if block[..bytes].iter().any(|byte| *byte != 0) {
                    return false;
                }
                done += bytes;
            }
        }
        true
    }

    /// The bytes, copied to a vector of our own.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes as usize];
        self.copy_to(&mut bytes);
        bytes
    }
}

/// One byte of a list, which it keeps mapped.
pub struct Byte {
    place: NonNull<u8>,
    _owner: Option<Rc<dyn Any>>,
}

impl Byte {
    /// Sets the byte.
    pub fn set(&self, value: u8) {
        // SAFETY: a byte of a segment, kept mapped by the owner (see `Segments::push_raw`).
        unsafe { self.place.as_ptr().write_volatile(value) };
    }
}

impl fmt::Debug for Segments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, count) = (self.bytes, self.list.len());
        write!(f, "{bytes} bytes in {count} segments")
    }
}

/// Zeroed memory at an alignment that `Vec` cannot give.
struct Allocation {
    base: NonNull<u8>,
    layout: Layout,
}

impl Allocation {
    fn new(bytes: usize, alignment: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1), alignment).expect("a bounded size");
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(memory) else {
            handle_alloc_error(layout)
        };
        Self { base, layout }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc_zeroed` with this layout, and is freed once, here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three_pieces() -> Segments {
        let whole = Segments::allocate(64, 16);
        whole.copy_from(&(0..64).collect::<Vec<u8>>());
        let mut pieces = Segments::default();
        for (offset, bytes) in [(0, 7), (20, 1), (40, 9)] {
            let piece = whole.slice(offset, bytes).list[0];
            // SAFETY: a part of `whole`, which the owner set below keeps alive.
            unsafe { pieces.push_raw(piece.base, piece.bytes) };
        }
        pieces.set_owner(Rc::new(whole));
        pieces
    }

    #[test]
    fn a_slice_crosses_segments_and_keeps_their_order() {
        let pieces = three_pieces();
        assert_eq!(pieces.bytes(), 17);
        assert_eq!(pieces.slice(5, 5).to_vec(), [5, 6, 20, 40, 41]);
        assert_eq!(pieces.slice(17, 0).to_vec(), Vec::<u8>::new());
        assert_eq!(pieces.slice(16, 1).to_vec(), [48]);
    }

    #[test]
    fn a_copy_between_lists_of_different_shapes_moves_every_byte() {
        let pieces = three_pieces();
        let target = Segments::allocate(17, 1);
        target.copy_from_segments(&pieces);
        assert_eq!(target.to_vec(), pieces.to_vec());
        pieces.fill(0xee);
        pieces.copy_from_segments(&target.slice(0, 8));
        assert_eq!(pieces.slice(7, 2).to_vec(), [20, 0xee]);
    }

    #[test]
    fn alignment_looks_at_both_ends_of_every_segment() {
        let memory = Segments::allocate(8192, 4096);
        assert!(memory.is_aligned(4096));
        assert!(!memory.slice(0, 100).is_aligned(512));
        assert!(memory.slice(512, 1024).is_aligned(512));
    }

    #[test]
    fn joined_parts_are_one_list_that_keeps_their_memory() {
        let parts = [(0, 5), (100, 3)];
        let whole = Segments::allocate(128, 1);
        let joined = Segments::join(parts.map(|(at, bytes)| whole.slice(at, bytes)).to_vec());
        drop(whole);
        joined.copy_from(b"together");
        assert_eq!((joined.bytes(), joined.list().len()), (8, 2));
        assert_eq!(joined.to_vec(), b"together");
    }

    #[test]
    fn a_list_gives_up_bytes_at_both_ends() {
        let mut pieces = three_pieces();
        pieces.skip(7);
        assert_eq!(pieces.list().len(), 2);
        pieces.skip(2);
        let last = pieces.take_last_byte().unwrap();
        assert_eq!(pieces.to_vec(), (41..48).collect::<Vec<u8>>());
        last.set(99);
        pieces.skip(7);
        assert!(pieces.take_last_byte().is_none());
        assert!(pieces.is_empty() && pieces.list().is_empty());
    }

    #[test]
    fn memory_outlives_the_list_it_was_sliced_from() {
        let slice = Segments::allocate(4096, 512).slice(1024, 8);
        slice.copy_from(b"still up");
        assert_eq!(slice.to_vec(), b"still up");
    }
}
