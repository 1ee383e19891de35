//! One virtqueue and the io_uring that does its I/O.
//!
//! A round takes all available requests under one lock of the ring, submits them with one system
//! call, and publishes whatever has completed under one more lock and with at most one call to the
//! guest. Requests in flight hold the memory map they were resolved in, because the front-end may
//! replace the map at any time.
#![expect(
    unsafe_code,
    reason = "hands guest memory that vm-memory has checked to io_uring"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use smallvec::SmallVec;
use vhost_user_backend::{VringMutex, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::QueueOwnedT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The unit of virtio-blk's addresses.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Requests in flight at once, which is also the largest queue that a front-end may set up.
pub(crate) const SLOTS: usize = 256;

/// Length of a request's header: type, reserved, sector.
const HEADER_BYTES: u32 = 16;

/// Length of the identification that GET_ID returns.
const ID_BYTES: usize = 20;

/// The unmap flag of a write-zeroes range.
const FLAG_UNMAP: u32 = 1;

/// A queue of the disk.
pub(crate) struct Queue {
    ring: IoUring,
    completion: EventFd,
    capacity_bytes: u64,
    slots: Vec<Slot>,
    free: Vec<u16>,
    done: Vec<(u16, u32)>,
    // Held for the ring, which knows it as registered file 0.
    _file: File,
}

/// A request in flight.
#[derive(Default)]
struct Slot {
    head: u16,
    operation: Operation,
    status: GuestAddress,
    memory: Option<Arc<GuestMemoryMmap>>,
    /// What is left to do, as host memory; a short read or write takes some off the front.
    iovecs: SmallVec<[Iovec; 4]>,
    offset: u64,
    bytes: u64,
    /// Bytes of data that the device will have written once the request has succeeded.
    used_bytes: u32,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Operation {
    #[default]
    Read,
    Write,
    Flush,
    Fallocate {
        mode: i32,
    },
}

/// An `iovec` that may move between threads with its slot.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Iovec(libc::iovec);

// SAFETY: the pointer is into guest memory that the slot's `memory` keeps mapped, and only the
// kernel follows it.
unsafe impl Send for Iovec {}

/// Why a request is answered without I/O.
type Status = u32;

impl Queue {
    /// An idle queue for `file`.
    pub(crate) fn new(file: File, capacity_sectors: u64) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .build(SLOTS as u32)?;
        let completion = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        ring.submitter().register_eventfd(completion.as_raw_fd())?;
        Ok(Self {
            ring,
            completion,
            capacity_bytes: capacity_sectors * SECTOR_BYTES,
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            free: (0..SLOTS as u16).rev().collect(),
            done: Vec::with_capacity(SLOTS),
            _file: file,
        })
    }

    /// Becomes readable when I/O has completed.
    pub(crate) fn completion(&self) -> &EventFd {
        &self.completion
    }

    /// Makes the completion descriptor unreadable until the next completion.
    pub(crate) fn clear_completion_event(&self) {
        // The only error is that there was nothing to clear.
        let _ = self.completion.read();
    }

    /// Requests taken from the ring and not yet published.
    pub(crate) fn in_flight(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// Takes, submits, reaps and publishes until there is nothing to do but wait.
    pub(crate) fn run(&mut self, vring: &VringMutex, memory: &GuestMemoryAtomic<GuestMemoryMmap>) {
        loop {
            let taken = self.take(vring, memory);
            self.submit();
            if taken > 0 && !self.ring.completion().is_empty() {
                // Done at once, from the page cache. Cleared before reaping, so that no completion
                // goes unnoticed, and so that epoll does not report what is reaped here.
                self.clear_completion_event();
            }
            self.reap();
            let published = self.publish(vring);
            if taken == 0 && published == 0 {
                return;
            }
        }
    }

    /// Takes every available request. Returns how many there were.
    fn take(&mut self, vring: &VringMutex, memory: &GuestMemoryAtomic<GuestMemoryMmap>) -> usize {
        let memory = memory.memory().into_inner();
        let mut state = vring.get_mut();
        let mut taken = 0;
        loop {
            if state.disable_notification().is_err() {
                return taken;
            }
            // Not ready, or an index out of range: there is nothing that could be done.
            let Ok(mut chains) = state.get_queue_mut().iter(&*memory) else {
                return taken;
            };
            while !self.free.is_empty() {
                let Some(chain) = chains.next() else { break };
                taken += 1;
                let head = chain.head_index();
                let descriptors: SmallVec<[Descriptor; 8]> = chain.collect();
                self.start(head, &descriptors, &memory);
            }
            let more = state.enable_notification().unwrap_or(false);
            if !more || self.free.is_empty() {
                return taken;
            }
        }
    }

    /// Begins one request, or answers it.
    fn start(&mut self, head: u16, descriptors: &[Descriptor], memory: &Arc<GuestMemoryMmap>) {
        let Some(status) = status_address(descriptors) else {
            self.done.push((head, 0));
            return;
        };
        // Not empty: the caller looked. A request that needs no I/O does not keep its slot.
        let Some(&index) = self.free.last() else {
            return;
        };
        let slot = &mut self.slots[usize::from(index)];
        slot.head = head;
        slot.status = status;
        slot.iovecs.clear();
        let answer = match parse(slot, descriptors, memory, self.capacity_bytes) {
            Ok(Some(written)) => (VIRTIO_BLK_S_OK, written),
            Ok(None) => {
                self.free.pop();
                slot.memory = Some(Arc::clone(memory));
                self.push(index);
                return;
            }
            Err(status) => (status, 0),
        };
        let _ = memory.write_obj(answer.0 as u8, status);
        self.done.push((head, answer.1 + 1));
    }

    /// Queues the rest of a slot's I/O for the next [`submit`](Self::submit).
    fn push(&mut self, index: u16) {
        let entry = self.slots[usize::from(index)]
            .entry()
            .user_data(index.into());
        // SAFETY: the memory and the iovecs that the entry names belong to the slot, which stays
        // as it is until the completion.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(
            pushed.is_ok(),
            "the ring has as many entries as there are slots"
        );
    }

    /// Hands all queued entries to the kernel.
    fn submit(&self) {
        while let Err(error) = self.ring.submit() {
            let kind = error.kind();
            assert!(
                kind == io::ErrorKind::Interrupted || kind == io::ErrorKind::ResourceBusy,
                "cannot submit: {error}"
            );
        }
    }

    /// Takes completions from the ring and finishes or continues their requests.
    fn reap(&mut self) {
        let mut again = false;
        loop {
            let Some(entry) = self.ring.completion().next() else {
                break;
            };
            let index = entry.user_data() as u16;
            let slot = &mut self.slots[usize::from(index)];
            let status = match slot.advance(entry.result()) {
                Progress::Again => {
                    self.push(index);
                    again = true;
                    continue;
                }
                Progress::Done(status) => status,
            };
            let memory = slot.memory.take();
            if let Some(memory) = memory {
                let _ = memory.write_obj(status as u8, slot.status);
            }
            let written = if status == VIRTIO_BLK_S_OK {
                slot.used_bytes
            } else {
                0
            };
            self.done.push((slot.head, written + 1));
            self.free.push(index);
        }
        if again {
            self.submit();
        }
    }

    /// Puts all finished requests on the used ring, and calls the guest if it asked for that.
    fn publish(&mut self, vring: &VringMutex) -> usize {
        let published = self.done.len();
        if published == 0 {
            return 0;
        }
        let mut state = vring.get_mut();
        for (head, written) in self.done.drain(..) {
            // It fails only if the guest's ring is not in its memory any more.
            let _ = state.add_used(head, written);
        }
        if state.needs_notification().unwrap_or(true) {
            let _ = state.signal_used_queue();
        }
        published
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // The kernel may still write to the guest's memory, which goes away with the slots.
        while self.in_flight() > 0 && self.ring.submit_and_wait(1).is_ok() {
            while let Some(entry) = self.ring.completion().next() {
                self.free.push(entry.user_data() as u16);
            }
        }
    }
}

/// What to do after a completion.
enum Progress {
    Again,
    Done(Status),
}

impl Slot {
    fn entry(&self) -> Entry {
        let file = Fixed(0);
        let iovecs = self.iovecs.as_ptr().cast::<libc::iovec>();
        let count = self.iovecs.len() as u32;
        match (self.operation, &self.iovecs[..]) {
            (Operation::Read, [one]) => {
                opcode::Read::new(file, one.0.iov_base.cast(), one.0.iov_len as u32)
                    .offset(self.offset)
                    .build()
            }
            (Operation::Write, [one]) => {
                opcode::Write::new(file, one.0.iov_base.cast(), one.0.iov_len as u32)
                    .offset(self.offset)
                    .build()
            }
            (Operation::Read, _) => opcode::Readv::new(file, iovecs, count)
                .offset(self.offset)
                .build(),
            (Operation::Write, _) => opcode::Writev::new(file, iovecs, count)
                .offset(self.offset)
                .build(),
            (Operation::Flush, _) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            (Operation::Fallocate { mode }, _) => opcode::Fallocate::new(file, self.bytes)
                .offset(self.offset)
                .mode(mode)
                .build(),
        }
    }

    /// Accounts for a completion with `result`.
    fn advance(&mut self, result: i32) -> Progress {
        match (-result, self.operation) {
            (libc::EAGAIN | libc::EINTR, _) => return Progress::Again,
            (libc::EOPNOTSUPP, Operation::Fallocate { .. }) => {
                return Progress::Done(VIRTIO_BLK_S_UNSUPP);
            }
            (1.., _) => return Progress::Done(VIRTIO_BLK_S_IOERR),
            (_, Operation::Flush | Operation::Fallocate { .. }) => {
                return Progress::Done(VIRTIO_BLK_S_OK);
            }
            (_, Operation::Read | Operation::Write) => {}
        }
        let moved = result as u64;
        if moved >= self.bytes {
            return Progress::Done(VIRTIO_BLK_S_OK);
        }
        if moved == 0 {
            // The file has become shorter than the disk.
            return Progress::Done(VIRTIO_BLK_S_IOERR);
        }
        self.offset += moved;
        self.bytes -= moved;
        let mut skip = moved as usize;
        while let Some(first) = self.iovecs.first_mut() {
            if skip < first.0.iov_len {
                // SAFETY: still within the buffer, by the comparison.
                first.0.iov_base = unsafe { first.0.iov_base.byte_add(skip) };
                first.0.iov_len -= skip;
                break;
            }
            skip -= first.0.iov_len;
            self.iovecs.remove(0);
        }
        Progress::Again
    }
}

/// Where a chain wants its status: the last byte of its last descriptor.
fn status_address(descriptors: &[Descriptor]) -> Option<GuestAddress> {
    let last = descriptors.last()?;
    if !last.is_write_only() || last.len() == 0 {
        return None;
    }
    let address = last.addr().0.checked_add(u64::from(last.len()) - 1)?;
    Some(GuestAddress(address))
}

/// Fills `slot` with what `descriptors` ask for.
///
/// `Ok(Some(n))` is a request that is complete and wrote `n` bytes of data, `Ok(None)` one that
/// needs the slot's I/O. Headers are expected in one descriptor of their own, as every driver has
/// them.
fn parse(
    slot: &mut Slot,
    descriptors: &[Descriptor],
    memory: &GuestMemoryMmap,
    capacity_bytes: u64,
) -> Result<Option<u32>, Status> {
    let [header, data @ .., last] = descriptors else {
        return Err(VIRTIO_BLK_S_IOERR);
    };
    if header.is_write_only() || header.len() != HEADER_BYTES || last.len() != 1 {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let header: [u8; HEADER_BYTES as usize] = read(memory, header.addr())?;
    let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
    let request = u32::from_le_bytes(header[0..4].try_into().unwrap_or_default());
    slot.offset = sector.checked_mul(SECTOR_BYTES).ok_or(VIRTIO_BLK_S_IOERR)?;
    slot.used_bytes = 0;
    match request {
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
            let is_read = request == VIRTIO_BLK_T_IN;
            slot.bytes = 0;
            for descriptor in data {
                if descriptor.is_write_only() != is_read {
                    return Err(VIRTIO_BLK_S_IOERR);
                }
                slot.bytes += u64::from(descriptor.len());
                gather(&mut slot.iovecs, memory, descriptor)?;
            }
            check_range(slot.offset, slot.bytes, capacity_bytes)?;
            if is_read {
                slot.operation = Operation::Read;
                slot.used_bytes = u32::try_from(slot.bytes).map_err(|_| VIRTIO_BLK_S_IOERR)?;
            } else {
                slot.operation = Operation::Write;
            }
        }
        VIRTIO_BLK_T_FLUSH => slot.operation = Operation::Flush,
        VIRTIO_BLK_T_GET_ID => {
            let Some(buffer) = data.first().filter(|buffer| buffer.is_write_only()) else {
                return Err(VIRTIO_BLK_S_IOERR);
            };
            let mut id = [0; ID_BYTES];
            id[..8].copy_from_slice(b"baseline");
            let bytes = ID_BYTES.min(buffer.len() as usize);
            memory
                .write_slice(&id[..bytes], buffer.addr())
                .map_err(|_| VIRTIO_BLK_S_IOERR)?;
            return Ok(Some(bytes as u32));
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let [range] = data else {
                return Err(VIRTIO_BLK_S_IOERR);
            };
            if range.is_write_only() || range.len() != 16 {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            let range: [u8; 16] = read(memory, range.addr())?;
            let sector = u64::from_le_bytes(range[0..8].try_into().unwrap_or_default());
            let sectors = u32::from_le_bytes(range[8..12].try_into().unwrap_or_default());
            let flags = u32::from_le_bytes(range[12..16].try_into().unwrap_or_default());
            let is_discard = request == VIRTIO_BLK_T_DISCARD;
            if flags & !FLAG_UNMAP != 0 || (is_discard && flags != 0) {
                return Err(VIRTIO_BLK_S_UNSUPP);
            }
            slot.offset = sector.checked_mul(SECTOR_BYTES).ok_or(VIRTIO_BLK_S_IOERR)?;
            slot.bytes = u64::from(sectors) * SECTOR_BYTES;
            check_range(slot.offset, slot.bytes, capacity_bytes)?;
            if slot.bytes == 0 {
                return Ok(Some(0));
            }
            let how = if is_discard || flags & FLAG_UNMAP != 0 {
                libc::FALLOC_FL_PUNCH_HOLE
            } else {
                libc::FALLOC_FL_ZERO_RANGE
            };
            let mode = how | libc::FALLOC_FL_KEEP_SIZE;
            slot.operation = Operation::Fallocate { mode };
        }
        _ => return Err(VIRTIO_BLK_S_UNSUPP),
    }
    Ok(None)
}

/// Copies `N` bytes out of the guest's memory.
fn read<const N: usize>(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
) -> Result<[u8; N], Status> {
    let mut bytes = [0; N];
    memory
        .read_slice(&mut bytes, address)
        .map_err(|_| VIRTIO_BLK_S_IOERR)?;
    Ok(bytes)
}

/// Adds a descriptor's buffer, which may lie across regions, to `iovecs`.
fn gather(
    iovecs: &mut SmallVec<[Iovec; 4]>,
    memory: &GuestMemoryMmap,
    descriptor: &Descriptor,
) -> Result<(), Status> {
    let slices =
        GuestMemoryBackend::get_slices(memory, descriptor.addr(), descriptor.len() as usize);
    for slice in slices {
        let slice = slice.map_err(|_| VIRTIO_BLK_S_IOERR)?;
        iovecs.push(Iovec(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        }));
    }
    Ok(())
}

fn check_range(offset: u64, bytes: u64, capacity_bytes: u64) -> Result<(), Status> {
    let inside = offset
        .checked_add(bytes)
        .is_some_and(|end| end <= capacity_bytes);
    if !inside || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    Ok(())
}
