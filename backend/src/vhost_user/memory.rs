//! The guest's memory as its front-end shared it: mapped, translated, and watched for truncation.
//!
//! A front-end can cut a shared file short at any time. The kernel's transfers into such memory fail
//! with `EFAULT`, but our own loads and stores (rings, headers, status bytes, bounce copies) would be
//! killed by `SIGBUS`. So a handler replaces a region that faults with zeroed memory of our own and
//! marks it; workers see the mark and end that connection. Nothing else is touched.
//!
//! Threads: a [`GuestMap`] is immutable and shared. A worker wraps it in a [`GuestView`] of its own,
//! so that keeping memory mapped for a request costs it no shared count.

#![expect(
    unsafe_code,
    reason = "hands mapped guest memory to segment lists, and handles SIGBUS"
)]

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{
    AtomicBool, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
use std::sync::{Arc, Mutex, Once};

use blockcore::io::buffer::Segments;
use blockcore::io::{Announcement, MemoryRange, Root};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// As many regions as a front-end may have: what `GET_MAX_MEM_SLOTS` tells.
pub const MAX_REGIONS: usize = 509;

/// `HUGETLBFS_MAGIC` of the kernel's `linux/magic.h`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// `FUSE_SUPER_MAGIC` of the same.
const FUSE_MAGIC: u64 = 0x6573_5546;

/// One region as a front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Where the guest sees it.
    pub guest_address: u64,
    /// How long it is.
    pub bytes: u64,
    /// Where the front-end has it mapped: ring addresses are given so.
    pub user_address: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
}

/// Why a region or a set of regions was refused.
#[derive(Debug)]
pub struct MemoryError(String);

impl std::fmt::Display for MemoryError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for MemoryError {}

/// One mapped region.
pub struct Region {
    // Goes before the mapping does: the address may be somebody else's right after.
    watch: Watch,
    spec: RegionSpec,
    mapping: Arc<GuestRegionMmap<()>>,
    base: NonNull<u8>,
}

// SAFETY: `base` is the address of `mapping`, which may be used from any thread; what is there is
// accessed by copies and atomics only.
unsafe impl Send for Region {}
// SAFETY: as above; a region is immutable.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a region of `file`.
    ///
    /// # Errors
    ///
    /// The region is empty, wraps around, is longer than the file or is part of a huge page; an access
    /// to the file could block for ever; or the host refuses to map it.
    pub fn map(spec: RegionSpec, file: OwnedFd) -> Result<Arc<Self>, MemoryError> {
        let refuse = |why: &str| {
            Err(MemoryError(format!(
                "memory region at guest address {:#x} with {:#x} bytes: {why}",
                spec.guest_address, spec.bytes
            )))
        };
        let wraps = |from: u64| from.checked_add(spec.bytes).is_none();
        if spec.bytes == 0 {
            return refuse("it is empty");
        }
        if wraps(spec.guest_address) || wraps(spec.user_address) || wraps(spec.file_offset) {
            return refuse("it wraps around the address space");
        }
        let Ok(bytes) = usize::try_from(spec.bytes) else {
            return refuse("it is longer than this machine can address");
        };
        let file = File::from(file);
        let length = match file.metadata() {
            Ok(metadata) => metadata.len(),
            Err(error) => return refuse(&format!("its file cannot be examined: {error}")),
        };
        if length < spec.file_offset + spec.bytes {
            return refuse(&format!("its file has only {length:#x} bytes"));
        }
        let system = match rustix::fs::fstatfs(&file) {
            Ok(system) => system,
            Err(error) => return refuse(&format!("its file cannot be examined: {error}")),
        };
        let page = match system.f_type as u64 & 0xffff_ffff {
            // Such mappings are made, replaced and removed in whole pages only.
            HUGETLBFS_MAGIC => system.f_bsize as u64,
            FUSE_MAGIC => {
                return refuse("its file system is a process that may never give us the memory");
            }
            _ => 1,
        };
        if !spec.bytes.is_multiple_of(page) || !spec.file_offset.is_multiple_of(page) {
            return refuse(&format!("it is not of whole huge pages ({page:#x} bytes)"));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let source = FileOffset::new(file, spec.file_offset);
        let mapping = match MmapRegion::build(Some(source), bytes, protection, flags) {
            Ok(mapping) => mapping,
            Err(error) => return refuse(&format!("it cannot be mapped: {error}")),
        };
        Self::new(spec, mapping)
    }

    /// Zeroed memory of our own in place of a guest's, for simulations and tests.
    ///
    /// # Errors
    ///
    /// The host has no memory, or the range wraps.
    pub fn anonymous(guest_address: u64, bytes: usize) -> Result<Arc<Self>, MemoryError> {
        let mapping = MmapRegion::new(bytes).map_err(|error| MemoryError(error.to_string()))?;
        let spec = RegionSpec {
            guest_address,
            bytes: bytes as u64,
            user_address: guest_address,
            file_offset: 0,
        };
        Self::new(spec, mapping)
    }

    fn new(spec: RegionSpec, mapping: MmapRegion<()>) -> Result<Arc<Self>, MemoryError> {
        let base = NonNull::new(mapping.as_ptr()).expect("a mapping is not at zero");
        let watch = Watch::new(base.as_ptr() as usize, mapping.size())?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(spec.guest_address))
            .ok_or_else(|| MemoryError("a region wraps around the address space".into()))?;
        Ok(Arc::new(Self {
            spec,
            mapping: Arc::new(mapping),
            base,
            watch,
        }))
    }

    /// What the front-end said of it.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }
}

/// All of a guest's memory, at one moment.
pub struct GuestMap {
    memory: GuestMemoryMmap<()>,
    regions: Vec<Arc<Region>>,
}

impl GuestMap {
    /// A map of `regions`, in any order.
    ///
    /// # Errors
    ///
    /// There are too many, or two overlap.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Arc<Self>, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError(format!(
                "{} memory regions, more than {MAX_REGIONS}",
                regions.len()
            )));
        }
        regions.sort_by_key(|region| region.spec.guest_address);
        let overlap = regions.windows(2).find(|pair| {
            pair[0].spec.guest_address + pair[0].spec.bytes > pair[1].spec.guest_address
        });
        if let Some(pair) = overlap {
            return Err(MemoryError(format!(
                "memory regions at guest addresses {:#x} and {:#x} overlap",
                pair[0].spec.guest_address, pair[1].spec.guest_address
            )));
        }
        let mappings = regions.iter().map(|region| Arc::clone(&region.mapping));
        let memory = match regions.is_empty() {
            true => GuestMemoryMmap::new(),
            false => GuestMemoryMmap::from_arc_regions(mappings.collect())
                .map_err(|error| MemoryError(error.to_string()))?,
        };
        Ok(Arc::new(Self { memory, regions }))
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The memory as the rust-vmm crates know it.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// The guest's address for one of the front-end's, if `bytes` bytes from there are in one region.
    pub fn guest_address(&self, user_address: u64, bytes: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user_address.checked_sub(region.spec.user_address)?;
            let room = region.spec.bytes.checked_sub(offset)?;
            (bytes <= room).then_some(region.spec.guest_address + offset)
        })
    }

    /// Whether `bytes` bytes at a guest address are in one region.
    pub fn contains(&self, address: u64, bytes: u64) -> bool {
        self.regions.iter().any(|region| {
            let offset = address.checked_sub(region.spec.guest_address);
            let room = offset.and_then(|offset| region.spec.bytes.checked_sub(offset));
            room.is_some_and(|room| bytes <= room)
        })
    }

    /// Whether a region was cut short under us.
    pub fn faulted(&self) -> bool {
        self.regions.iter().any(|region| region.watch.faulted())
    }
}

/// One worker's hold on a guest's memory. Segments of requests have it, so it is dropped after the last that
/// uses the memory.
pub struct GuestView {
    // Withdrawn before the memory may be unmapped.
    announced: RefCell<Vec<Announcement>>,
    map: Arc<GuestMap>,
    last: Cell<usize>,
}

/// A guest address range that is not (all) in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutsideMemory;

impl GuestView {
    /// A view of `map` for one worker.
    pub fn new(map: Arc<GuestMap>) -> Rc<Self> {
        Rc::new(Self {
            announced: RefCell::default(),
            map,
            last: Cell::new(0),
        })
    }

    /// Tells the drivers below a root on this worker that its requests are going to use this memory.
    pub fn announce_to(&self, root: &Rc<Root>) {
        let announced = self.map.regions.iter().map(|region| {
            root.announce(MemoryRange {
                address: region.base.as_ptr() as usize,
                bytes: region.spec.bytes as usize,
            })
        });
        self.announced.borrow_mut().extend(announced);
    }

    /// The map.
    pub fn map(&self) -> &GuestMap {
        &self.map
    }

    /// Adds the guest's memory from `address` on to the end of `segments`. It may lie in several
    /// regions if these adjoin.
    ///
    /// # Errors
    ///
    /// Some of it is outside memory; nothing, or a part, has been added.
    pub fn append(
        self: &Rc<Self>,
        segments: &mut Segments,
        mut address: u64,
        bytes: u32,
    ) -> Result<(), OutsideMemory> {
        let mut left = u64::from(bytes);
        while left > 0 {
            let (region, offset) = self.find(address).ok_or(OutsideMemory)?;
            let take = left.min(region.spec.bytes - offset);
            // SAFETY: `offset` is inside the region's mapping, and so is `offset + take`.
            unsafe {
                let base = region.base.add(offset as usize);
                segments.push_raw(base, take as usize);
            }
            left -= take;
            address = address.wrapping_add(take);
        }
        Ok(())
    }

    /// A list whose memory this view keeps mapped; for [`append`](Self::append).
    pub fn segments(self: &Rc<Self>) -> Segments {
        let mut segments = Segments::default();
        segments.set_owner(Rc::clone(self) as Rc<dyn std::any::Any>);
        segments
    }

    /// Empties a list and has this view keep its memory mapped.
    pub fn reset(self: &Rc<Self>, segments: &mut Segments) {
        segments.clear();
        segments.set_owner(Rc::clone(self) as Rc<dyn std::any::Any>);
    }

    fn find(&self, address: u64) -> Option<(&Region, u64)> {
        let regions = &self.map.regions;
        let inside = |region: &Region| {
            let offset = address.checked_sub(region.spec.guest_address)?;
            (offset < region.spec.bytes).then_some(offset)
        };
        if let Some(region) = regions.get(self.last.get())
            && let Some(offset) = inside(region)
        {
            return Some((region, offset));
        }
        let after = regions.partition_point(|region| region.spec.guest_address <= address);
        let index = after.checked_sub(1)?;
        let offset = inside(&regions[index])?;
        self.last.set(index);
        Some((&regions[index], offset))
    }
}

/// A piece of the guest's memory that is used in place: part of a ring.
///
/// The guest may change it at any time, so it is only ever loaded and stored as atomics.
pub struct Area {
    base: NonNull<u8>,
    bytes: usize,
    _view: Rc<GuestView>,
}

impl GuestView {
    /// The `bytes` bytes at `address` for use in place; `None` if they are not in one region, or not
    /// aligned to `alignment` in our memory.
    pub fn area(self: &Rc<Self>, address: u64, bytes: u64, alignment: usize) -> Option<Area> {
        let (region, offset) = self.find(address)?;
        if bytes > region.spec.bytes - offset {
            return None;
        }
        // SAFETY: `offset` is inside the region's mapping.
        let base = unsafe { region.base.add(offset as usize) };
        (base.as_ptr() as usize)
            .is_multiple_of(alignment)
            .then(|| Area {
                base,
                bytes: bytes as usize,
                _view: Rc::clone(self),
            })
    }
}

impl Area {
    fn place<T>(&self, at: usize) -> *mut T {
        let size = size_of::<T>();
        assert!(
            at <= self.bytes && size <= self.bytes - at,
            "inside the area, as its owner computed"
        );
        // SAFETY: `at` is inside the area, which the view keeps mapped.
        let place = unsafe { self.base.as_ptr().add(at) };
        assert!(
            (place as usize).is_multiple_of(align_of::<T>()),
            "aligned, as the area is"
        );
        place.cast()
    }

    /// Loads two bytes, little-endian.
    pub fn load_u16(&self, at: usize, order: Ordering) -> u16 {
        // SAFETY: `place` is mapped and aligned; memory shared with a guest is accessed atomically.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.place(at)) }.load(order))
    }

    /// Stores two bytes, little-endian.
    pub fn store_u16(&self, at: usize, value: u16, order: Ordering) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(self.place(at)) }.store(value.to_le(), order);
    }

    /// Stores four bytes, little-endian.
    pub fn store_u32(&self, at: usize, value: u32) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU32::from_ptr(self.place(at)) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// Loads eight bytes, little-endian.
    pub fn load_u64(&self, at: usize) -> u64 {
        // SAFETY: as in `load_u16`.
        u64::from_le(unsafe { AtomicU64::from_ptr(self.place(at)) }.load(Ordering::Relaxed))
    }
}

/// As many regions as this process can watch, of all guests together.
const WATCHES: usize = 16384;

/// A mapping as the signal handler knows it. `begin` is zero while the entry is free.
struct Entry {
    /// Odd while the entry changes, and never the same twice.
    version: AtomicUsize,
    begin: AtomicUsize,
    bytes: AtomicUsize,
    faulted: AtomicBool,
}

impl Entry {
    /// Under the lock of the free list.
    fn set(&self, begin: usize, bytes: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.begin.store(begin, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// Where the mapping is, if `address` is in it. One that goes or comes meanwhile is not the one
    /// that is being accessed.
    fn mapping_of(&self, address: usize) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let begin = self.begin.load(Ordering::Relaxed);
        let bytes = self.bytes.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let steady = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        let inside = begin != 0 && address.checked_sub(begin).is_some_and(|at| at < bytes);
        (steady && inside).then_some((begin, bytes))
    }
}

static ENTRIES: [Entry; WATCHES] = [const {
    Entry {
        version: AtomicUsize::new(0),
        begin: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        faulted: AtomicBool::new(false),
    }
}; WATCHES];

/// How many entries were ever used: the handler looks no further.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Entries free to use again.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// How many faults there were, for workers to notice cheaply.
static FAULTS: AtomicU32 = AtomicU32::new(0);
static INSTALL: Once = Once::new();

/// How often memory of any guest was cut short; a worker that sees it grow looks at its maps.
pub fn faults() -> u32 {
    FAULTS.load(Ordering::Acquire)
}

/// A mapping's entry in the table.
struct Watch(usize);

impl Watch {
    fn new(begin: usize, bytes: usize) -> Result<Self, MemoryError> {
        INSTALL.call_once(install_handler);
        let mut free = FREE.lock().expect("no panic while counting");
        let index = match free.pop() {
            Some(index) => index,
            None => {
                let index = USED.load(Ordering::Relaxed);
                if index == WATCHES {
                    return Err(MemoryError(format!("more than {WATCHES} memory regions")));
                }
                USED.store(index + 1, Ordering::Release);
                index
            }
        };
        let entry = &ENTRIES[index];
        entry.faulted.store(false, Ordering::Relaxed);
        entry.set(begin, bytes);
        Ok(Self(index))
    }

    fn faulted(&self) -> bool {
        ENTRIES[self.0].faulted.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut free = FREE.lock().expect("no panic while counting");
        ENTRIES[self.0].set(0, 0);
        free.push(self.0);
    }
}

fn install_handler() {
    // SAFETY: a zeroed `sigaction` is a valid one; the handler keeps to what signal handlers may do.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
    };
    assert_eq!(result, 0, "SIGBUS can be handled");
}

/// Replaces a guest's region that lost its file by zeroed memory, so that the access goes on. Only
/// atomics and system calls: the interrupted thread may be anywhere.
extern "C" fn on_bus_error(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid `siginfo_t` to a handler with `SA_SIGINFO`.
    let address = unsafe { (*info).si_addr() } as usize;
    for entry in &ENTRIES[..USED.load(Ordering::Acquire)] {
        let Some((begin, bytes)) = entry.mapping_of(address) else {
            continue;
        };
        // SAFETY: the range is a mapping of this process that a `Region` owns; replacing it in place
        // leaves every pointer into it valid. The region unmaps whatever is there when it goes.
        let replaced = unsafe {
            libc::mmap(
                begin as *mut libc::c_void,
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if replaced != libc::MAP_FAILED {
            entry.faulted.store(true, Ordering::Release);
            // After the mark, which whoever sees the new count must see too.
            FAULTS.fetch_add(1, Ordering::Release);
            return;
        }
        break;
    }
    // Not a guest's memory: die of it, as without a handler.
    // SAFETY: restoring the default action; the access is repeated and kills the process.
    unsafe {
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memfd(bytes: u64) -> OwnedFd {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    }

    fn spec(guest_address: u64, bytes: u64) -> RegionSpec {
        RegionSpec {
            guest_address,
            bytes,
            user_address: guest_address.wrapping_add(0x7000_0000),
            file_offset: 0,
        }
    }

    #[test]
    fn a_buffer_may_cross_regions_that_adjoin_and_no_gap() {
        let regions = [(0x1000, 0x1000), (0x2000, 0x1000), (0x4000, 0x1000)];
        let regions =
            regions.map(|(at, bytes)| Region::map(spec(at, bytes), memfd(bytes)).unwrap());
        let view = GuestView::new(GuestMap::new(regions.into()).unwrap());
        let mut segments = view.segments();
        view.append(&mut segments, 0x1f00, 0x200).unwrap();
        assert_eq!(segments.list().len(), 2);
        segments.copy_from(&[5; 0x200]);
        assert_eq!(segments.to_vec(), [5; 0x200]);
        let mut segments = view.segments();
        assert_eq!(
            view.append(&mut segments, 0x2f00, 0x200),
            Err(OutsideMemory)
        );
        assert_eq!(view.append(&mut segments, 0xfff, 1), Err(OutsideMemory));
        assert_eq!(
            view.append(&mut segments, 0x4fff, u32::MAX),
            Err(OutsideMemory)
        );
    }

    #[test]
    fn impossible_regions_are_refused() {
        let map = |spec, file_bytes| Region::map(spec, memfd(file_bytes)).map(|_| ());
        assert!(map(spec(0, 0), 0x1000).is_err());
        assert!(map(spec(0, 0x2000), 0x1000).is_err());
        assert!(map(spec(u64::MAX - 0xfff, 0x2000), 0x2000).is_err());
        let shifted = RegionSpec {
            file_offset: u64::MAX - 10,
            ..spec(0, 0x1000)
        };
        assert!(map(shifted, 0x1000).is_err());
        let region = |at| Region::anonymous(at, 0x2000).unwrap();
        assert!(GuestMap::new(vec![region(0x3000), region(0x1000)]).is_ok());
        assert!(GuestMap::new(vec![region(0x2000), region(0x1000)]).is_err());
    }

    #[test]
    fn memory_that_was_cut_short_reads_as_zeroes_and_is_marked() {
        let file = memfd(0x4000);
        let region = Region::map(spec(0, 0x4000), file.try_clone().unwrap()).unwrap();
        let other = Region::map(spec(0x4000, 0x4000), memfd(0x4000)).unwrap();
        let map = GuestMap::new(vec![region, other]).unwrap();
        let view = GuestView::new(Arc::clone(&map));
        let mut segments = view.segments();
        view.append(&mut segments, 0, 0x8000).unwrap();
        segments.fill(7);
        let before = faults();
        ftruncate(&file, 0x1000).unwrap();
        let bytes = segments.to_vec();
        assert!(map.faulted() && faults() > before);
        assert_eq!(bytes[0x3000], 0);
        assert_eq!(bytes[0x4000], 7, "another region is untouched");
    }
}
