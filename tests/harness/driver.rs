//! A front-end on the `virtio-driver` crate, which is libblkio's: nothing in it is ours.
//!
//! A [`Queue`] has a fixed number of *slots*, each a buffer in memory shared with the back-end and
//! at most one request in flight. Queues may be used from different threads.
//!
//! The crate offers direct descriptors, EVENT_IDX and both ways to wait, and hands over blocking
//! kick descriptors. It cannot stop a queue: dropping the last queue closes the connection.
#![expect(
    unsafe_code,
    reason = "maps the memory that is shared with the back-end"
)]

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use smallvec::SmallVec;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags, iovec,
};

/// The unit of virtio-blk's addresses.
const SECTOR_BYTES: usize = 512;

/// How to connect.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Virtqueues to set up.
    pub queues: usize,
    /// Requests in flight at once in each.
    pub slots: usize,
    /// Length of each slot's buffer.
    pub slot_bytes: usize,
    /// Descriptors in each queue, a power of two. A request takes two more than its buffer has
    /// segments.
    pub descriptors: u16,
}

/// How to learn of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// By looking at the used ring: the back-end is told not to call.
    Polling,
    /// By the call descriptor.
    Eventfd,
}

/// A connected front-end, before its queues are used.
pub struct Driver {
    /// The queues, each for one thread.
    pub queues: Vec<Queue>,
    /// The device's size.
    pub capacity_bytes: u64,
}

impl Driver {
    /// Connects to `socket`, waiting up to `patience` for somebody to listen there.
    ///
    /// # Errors
    ///
    /// Whatever keeps the connection or the queues from being set up. A back-end that refuses a
    /// message, or goes away, is an error as well.
    pub fn connect(socket: &Path, layout: Layout, patience: Duration) -> io::Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | (VirtioBlkFeatureFlags::FLUSH
                | VirtioBlkFeatureFlags::MQ
                | VirtioBlkFeatureFlags::DISCARD
                | VirtioBlkFeatureFlags::WRITE_ZEROES)
                .bits();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(connect_within(socket, features, patience)?);
        let config = transport.get_config()?;
        let mut rings =
            VirtioBlkQueue::setup_queues(&mut *transport, layout.queues, layout.descriptors)?;
        let memory = SharedMemory::new(layout.queues * layout.slots * layout.slot_bytes)?;
        transport.map_mem_region(
            memory.address as usize,
            memory.bytes,
            memory.file.as_raw_fd(),
            0,
        )?;
        let connection = Arc::new((transport, memory));
        let queues = rings
            .drain(..)
            .enumerate()
            .map(|(index, ring)| Queue::new(index, ring, &connection, layout))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            queues,
            capacity_bytes: u64::from(config.capacity) * SECTOR_BYTES as u64,
        })
    }
}

/// A back-end binds its socket before it listens, and neither waits for us.
fn connect_within(
    socket: &Path,
    features: u64,
    patience: Duration,
) -> io::Result<VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>> {
    let path = socket
        .to_str()
        .ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "a socket path must be UTF-8"))?;
    let start = Instant::now();
    loop {
        match VhostUser::new(path, features) {
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) && start.elapsed() < patience =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            outcome => {
                return outcome.map_err(|error| {
                    let text = format!("cannot connect to {path}: {error}");
                    io::Error::new(error.kind(), text)
                });
            }
        }
    }
}

/// One virtqueue and the buffers of its requests.
pub struct Queue {
    ring: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completion: Arc<EventFd>,
    in_flight: Vec<bool>,
    first_byte: usize,
    slot_bytes: usize,
    // The rings live in the transport's memory, so this comes last.
    connection: Arc<(Box<VirtioBlkTransport>, SharedMemory)>,
}

// SAFETY: the ring's pointers lead to memory that belongs to this queue alone and that
// `connection` keeps mapped; the crate leaves the marker out only because it has pointers at all.
unsafe impl Send for Queue {}

impl Queue {
    fn new(
        index: usize,
        ring: VirtioBlkQueue<'static, usize>,
        connection: &Arc<(Box<VirtioBlkTransport>, SharedMemory)>,
        layout: Layout,
    ) -> io::Result<Self> {
        let completion = connection.0.get_completion_fd(index);
        // libvhost-user makes the call descriptor, which is shared, non-blocking.
        let flags = fcntl_getfl(completion.as_fd())?;
        fcntl_setfl(completion.as_fd(), flags - OFlags::NONBLOCK)?;
        let mut queue = Self {
            ring,
            notifier: connection.0.get_submission_notifier(index),
            completion,
            in_flight: vec![false; layout.slots],
            first_byte: index * layout.slots * layout.slot_bytes,
            slot_bytes: layout.slot_bytes,
            connection: Arc::clone(connection),
        };
        queue.set_waiting(Waiting::Eventfd);
        Ok(queue)
    }

    /// Chooses how this queue is going to wait.
    pub fn set_waiting(&mut self, waiting: Waiting) {
        self.ring
            .set_used_notif_enabled(waiting == Waiting::Eventfd);
    }

    /// Requests that may be in flight at once.
    pub fn slots(&self) -> usize {
        self.in_flight.len()
    }

    /// The buffer of `slot`.
    ///
    /// # Panics
    ///
    /// If a request of that slot is in flight: the buffer is the back-end's until it completes.
    pub fn buffer(&mut self, slot: usize) -> &mut [u8] {
        assert!(!self.in_flight[slot], "slot {slot} is in flight");
        // SAFETY: within the mapping by construction, this queue's alone, and not the back-end's
        // by the assertion.
        unsafe { std::slice::from_raw_parts_mut(self.address(slot), self.slot_bytes) }
    }

    /// Reads `bytes` bytes at `offset` to the slot's buffer, in `segments` descriptors.
    ///
    /// # Errors
    ///
    /// The ring is full, or `offset` is not a multiple of 512. So for all requests.
    pub fn read(
        &mut self,
        slot: usize,
        offset: u64,
        bytes: usize,
        segments: usize,
    ) -> io::Result<()> {
        let segments = self.segments(slot, bytes, segments);
        // SAFETY: the segments are in the slot's buffer, which is not touched until completion.
        unsafe {
            self.ring
                .readv(offset, segments.as_ptr(), segments.len(), slot)?;
        }
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Writes the first `bytes` bytes of the slot's buffer to `offset`, in `segments` descriptors.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn write(
        &mut self,
        slot: usize,
        offset: u64,
        bytes: usize,
        segments: usize,
    ) -> io::Result<()> {
        let segments = self.segments(slot, bytes, segments);
        // SAFETY: as in `read`.
        unsafe {
            self.ring
                .writev(offset, segments.as_ptr(), segments.len(), slot)?;
        }
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Makes completed writes durable.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn flush(&mut self, slot: usize) -> io::Result<()> {
        self.ring.flush(slot)?;
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Discards `bytes` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn discard(&mut self, slot: usize, offset: u64, bytes: u64) -> io::Result<()> {
        self.ring.discard(offset, bytes, slot)?;
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Writes zeroes to `bytes` bytes at `offset`, which may be deallocated if `unmap`.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn write_zeroes(
        &mut self,
        slot: usize,
        offset: u64,
        bytes: u64,
        unmap: bool,
    ) -> io::Result<()> {
        self.ring.write_zeroes(offset, bytes, unmap, slot)?;
        self.in_flight[slot] = true;
        Ok(())
    }

    /// Tells the back-end of the requests since the last kick, if it wants to be told.
    ///
    /// # Errors
    ///
    /// Those of writing to an eventfd.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() {
            self.notifier.notify()?;
        }
        Ok(())
    }

    /// Calls `each` with the slot and the outcome of every request that has completed.
    pub fn completions(&mut self, mut each: impl FnMut(usize, io::Result<()>)) {
        for completion in self.ring.completions() {
            self.in_flight[completion.context] = false;
            let outcome = match completion.ret {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(-error)),
            };
            each(completion.context, outcome);
        }
    }

    /// Sleeps until the back-end calls.
    ///
    /// # Errors
    ///
    /// Those of reading an eventfd.
    pub fn wait(&self) -> io::Result<()> {
        match self.completion.read() {
            // The back-end has made it non-blocking again.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.wait_at_most(Duration::from_secs(1)).map(drop)
            }
            outcome => outcome.map(drop),
        }
    }

    /// Sleeps until the back-end calls, but not for more than `limit`. Returns whether it called.
    ///
    /// # Errors
    ///
    /// Those of polling and reading an eventfd.
    pub fn wait_at_most(&self, limit: Duration) -> io::Result<bool> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&*self.completion, PollFlags::IN)];
        if poll(&mut fds, Some(&limit))? == 0 {
            return Ok(false);
        }
        self.completion.read()?;
        Ok(true)
    }

    fn address(&self, slot: usize) -> *mut u8 {
        let first = self.first_byte + slot * self.slot_bytes;
        // SAFETY: the mapping has that many bytes for each slot of each queue.
        unsafe { self.connection.1.address.add(first) }
    }

    /// The start of a slot's buffer, cut into about equal pieces of whole sectors.
    fn segments(&self, slot: usize, bytes: usize, segments: usize) -> SmallVec<[iovec; 8]> {
        assert!(bytes <= self.slot_bytes, "a request longer than its buffer");
        assert!(!self.in_flight[slot], "slot {slot} is in flight");
        let sectors = bytes / SECTOR_BYTES;
        let cut = |index: usize| sectors * index / segments * SECTOR_BYTES;
        (0..segments)
            .map(|index| (cut(index), cut(index + 1)))
            .filter(|(start, end)| start < end)
            .map(|(start, end)| iovec {
                iov_base: self.address(slot).wrapping_add(start).cast(),
                iov_len: end - start,
            })
            .collect()
    }
}

/// A mapped memfd.
struct SharedMemory {
    address: *mut u8,
    bytes: usize,
    file: File,
}

// SAFETY: a mapping may be used from any thread; who uses which part is the queues' concern.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    fn new(bytes: usize) -> io::Result<Self> {
        let file = File::from(memfd_create("driver-buffers", MemfdFlags::CLOEXEC)?);
        file.set_len(bytes as u64)?;
        // SAFETY: a new mapping, placed by the kernel, of a file that nobody truncates.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                &file,
                0,
            )?
        };
        Ok(Self {
            address: address.cast(),
            bytes,
            file,
        })
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the last queue that pointed to it is gone.
        unsafe {
            let _ = munmap(self.address.cast(), self.bytes);
        }
    }
}
