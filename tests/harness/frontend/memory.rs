#![expect(
    unsafe_code,
    reason = "maps guest memory, which the back-end writes at the same time"
)]
//! Guest memory: regions that the front-end maps and passes to the back-end by descriptor.
//!
//! An address in a descriptor or a ring is a *guest* address. What the protocol calls a user
//! address is a third one: the harness derives it from the guest address by adding
//! [`USER_OFFSET`], so that a back-end which confuses the two cannot pass by luck.
//!
//! The back-end writes while we read. So nothing here hands out a reference to mapped memory:
//! bytes are copied in and out through raw pointers, and ring indexes are atomics.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, RwLock};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What is added to a guest address to make the user address that goes over the wire.
pub const USER_OFFSET: u64 = 0x7e00_0000_0000;

/// The name of every memory file made here, as `/proc/PID/maps` shows it in a back-end.
pub const MEMORY_NAME: &str = "stonework-test-guest";

/// How a region is described to the back-end: `VhostUserMemoryRegion`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionEntry {
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Its length.
    pub bytes: u64,
    /// Where the front-end claims to see it; ring addresses are translated with this.
    pub user_addr: u64,
    /// Where it begins in the file.
    pub mmap_offset: u64,
}

impl RegionEntry {
    /// As it goes over the wire.
    pub fn to_bytes(self) -> Vec<u8> {
        [
            self.guest_addr,
            self.bytes,
            self.user_addr,
            self.mmap_offset,
        ]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
    }
}

/// One stretch of guest memory and the file behind it.
#[derive(Debug)]
pub struct Region {
    /// What the back-end is told.
    pub entry: RegionEntry,
    file: OwnedFd,
    base: NonNull<u8>,
}

// SAFETY: the mapping belongs to the region until it is dropped, and every access goes through
// raw copies or atomics, which do not care on which thread they run.
unsafe impl Send for Region {}
// SAFETY: as above; no method gives out a reference into the mapping.
unsafe impl Sync for Region {}

impl Region {
    /// A region of zeros at `guest_addr`, in a file of its own that is exactly as long.
    pub fn new(guest_addr: u64, bytes: u64) -> Self {
        let file = memory_file(bytes);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                usize::try_from(bytes).expect("a region fits the address space"),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .expect("cannot map guest memory");
        Self {
            entry: RegionEntry {
                guest_addr,
                bytes,
                user_addr: guest_addr.wrapping_add(USER_OFFSET),
                mmap_offset: 0,
            },
            file,
            base: NonNull::new(base.cast()).expect("mmap gives no null"),
        }
    }

    /// The file behind it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Cuts the file to `bytes`, under the mapping. What lies behind must not be touched from
    /// this side any more: it would end this process.
    pub fn truncate(&self, bytes: u64) {
        ftruncate(&self.file, bytes).expect("cannot truncate a memory file");
    }

    /// The pointer to `addr`, and how many bytes follow it here; `None` outside the region.
    fn pointer(&self, addr: u64) -> Option<(*mut u8, usize)> {
        let inside = addr.checked_sub(self.entry.guest_addr)?;
        if inside >= self.entry.bytes {
            return None;
        }
        let rest = (self.entry.bytes - inside) as usize;
        // SAFETY: `inside` is less than the length of the mapping that `base` begins.
        Some((unsafe { self.base.as_ptr().add(inside as usize) }, rest))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping made in `new`, and no pointer into it
        // outlives a method call.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.entry.bytes as usize) };
    }
}

/// A memory file of `bytes` zeros.
pub fn memory_file(bytes: u64) -> OwnedFd {
    let file = memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC).expect("cannot make a memory file");
    ftruncate(&file, bytes).expect("cannot size a memory file");
    file
}

/// All regions of one guest. Clones are the same memory.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory(Arc<RwLock<Vec<Arc<Region>>>>);

impl GuestMemory {
    /// A region for each `(guest_addr, bytes)`.
    pub fn new(layout: &[(u64, u64)]) -> Self {
        let memory = Self::default();
        for &(guest_addr, bytes) in layout {
            memory.add(guest_addr, bytes);
        }
        memory
    }

    /// Adds a region. Telling the back-end is the caller's business.
    pub fn add(&self, guest_addr: u64, bytes: u64) -> Arc<Region> {
        let region = Arc::new(Region::new(guest_addr, bytes));
        self.0.write().unwrap().push(Arc::clone(&region));
        region
    }

    /// Forgets the region that begins at `guest_addr` and returns it.
    pub fn remove(&self, guest_addr: u64) -> Arc<Region> {
        let mut regions = self.0.write().unwrap();
        let position = regions
            .iter()
            .position(|region| region.entry.guest_addr == guest_addr)
            .expect("no region begins there");
        regions.remove(position)
    }

    /// All regions, in the order in which they were added.
    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.0.read().unwrap().clone()
    }

    /// Copies `bytes` to `addr`, over adjacent regions if need be.
    ///
    /// # Panics
    ///
    /// If any of it is outside memory.
    #[track_caller]
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.pieces(addr, bytes.len(), |pointer, range| {
            // SAFETY: `pieces` gives a pointer to as many mapped bytes as the range is long, and
            // the slice is memory of this process that no mapping overlaps.
            unsafe { ptr::copy_nonoverlapping(bytes[range.clone()].as_ptr(), pointer, range.len()) }
        });
    }

    /// Copies `bytes` bytes from `addr`, over adjacent regions if need be.
    ///
    /// # Panics
    ///
    /// If any of it is outside memory.
    #[track_caller]
    pub fn read(&self, addr: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        self.pieces(addr, bytes, |pointer, range| {
            // SAFETY: as in `write`, the other way.
            unsafe {
                ptr::copy_nonoverlapping(pointer, out[range.clone()].as_mut_ptr(), range.len());
            }
        });
        out
    }

    /// Reads a ring index; what the back-end wrote before it is seen by what follows.
    #[track_caller]
    pub fn load_u16(&self, addr: u64) -> u16 {
        self.with_u16(addr, |value| u16::from_le(value.load(Ordering::Acquire)))
    }

    /// Writes a ring index; the back-end that sees it sees all that was written before.
    #[track_caller]
    pub fn store_u16(&self, addr: u64, value: u16) {
        self.with_u16(addr, |place| place.store(value.to_le(), Ordering::Release));
    }

    #[track_caller]
    fn with_u16<T>(&self, addr: u64, act: impl FnOnce(&AtomicU16) -> T) -> T {
        assert!(
            addr.is_multiple_of(2),
            "{addr:#x} is no address of an index"
        );
        let regions = self.0.read().unwrap();
        let (pointer, _) = regions
            .iter()
            .find_map(|region| region.pointer(addr))
            .unwrap_or_else(|| panic!("{addr:#x} is outside guest memory"));
        // SAFETY: the address is even and regions begin and end on pages, so both bytes are
        // mapped; the lock held keeps the mapping; other accesses of ours to indexes are atomic.
        act(unsafe { AtomicU16::from_ptr(pointer.cast()) })
    }

    #[track_caller]
    fn pieces(
        &self,
        addr: u64,
        bytes: usize,
        mut act: impl FnMut(*mut u8, std::ops::Range<usize>),
    ) {
        let regions = self.0.read().unwrap();
        let mut done = 0;
        while done < bytes {
            let at = addr + done as u64;
            let (pointer, rest) = regions
                .iter()
                .find_map(|region| region.pointer(at))
                .unwrap_or_else(|| panic!("{at:#x} is outside guest memory"));
            let here = rest.min(bytes - done);
            act(pointer, done..done + here);
            done += here;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_cross_from_one_region_into_the_next() {
        let memory = GuestMemory::new(&[(0x1000, 0x1000), (0x2000, 0x1000)]);
        let bytes: Vec<u8> = (0..=255).collect();
        memory.write(0x1f80, &bytes);
        assert_eq!(memory.read(0x1f80, 256), bytes);
        assert_eq!(memory.read(0x2000, 128), bytes[128..]);
    }

    #[test]
    #[should_panic(expected = "0x3000 is outside guest memory")]
    fn bytes_behind_the_last_region_are_refused() {
        GuestMemory::new(&[(0x1000, 0x2000)]).write(0x2fff, &[0, 0]);
    }
}
