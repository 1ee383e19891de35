//! The virtio-blk device as `vhost-user-backend` wants it: features, configuration, events.
//!
//! Each queue has a thread of the crate's for itself, so a queue's lock is contended only when the
//! control thread stops the queue.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringEpollHandler, VringMutex};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::queue::{Queue, SECTOR_BYTES, SLOTS};

/// Guest memory as the crate keeps it: replaced as a whole when the front-end changes it.
type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Data segments of one request. Two descriptors fewer than a queue has, for header and status.
const MAX_SEGMENTS: u32 = SLOTS as u32 - 2;

/// The most that one discard or write-zeroes request may cover: 1 GiB, so that it ends in time.
const MAX_ZERO_SECTORS: u32 = 1 << 21;

/// A disk as one front-end sees it.
pub(crate) struct Disk {
    capacity_sectors: u64,
    memory: Memory,
    queues: Vec<(Mutex<Queue>, Condvar)>,
}

impl Disk {
    /// A disk of `queues` queues on `file`, with no front-end yet.
    pub(crate) fn new(file: File, queues: usize) -> io::Result<Self> {
        let capacity_sectors = file.metadata()?.len() / SECTOR_BYTES;
        let queues = (0..queues)
            .map(|_| {
                let queue = Queue::new(file.try_clone()?, capacity_sectors)?;
                Ok((Mutex::new(queue), Condvar::new()))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            capacity_sectors,
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            queues,
        })
    }

    /// The guest's memory, shared with the crate.
    pub(crate) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Adds each queue's completion descriptor to its thread's epoll set.
    pub(crate) fn listen_for_completions(
        &self,
        handlers: &[Arc<VringEpollHandler<Arc<Self>>>],
    ) -> io::Result<()> {
        for (thread, handler) in handlers.iter().enumerate() {
            let fd = self.queue(thread).completion().as_raw_fd();
            handler.register_listener(fd, EventSet::IN, self.completion_event())?;
        }
        Ok(())
    }

    /// The number of the completion event. The crate has its own uses for all up to the number of
    /// queues.
    fn completion_event(&self) -> u64 {
        self.queues.len() as u64 + 1
    }

    fn queue(&self, index: usize) -> MutexGuard<'_, Queue> {
        self.queues[index]
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space: `struct virtio_blk_config` of virtio 1.x, "Device configuration
    /// layout" of the block device.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        config[0..8].copy_from_slice(&self.capacity_sectors.to_le_bytes());
        config[12..16].copy_from_slice(&MAX_SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        config[34..36].copy_from_slice(&(self.queues.len() as u16).to_le_bytes());
        // Discard, then write zeroes: the most sectors, the most ranges, then alignment for the
        // one and "may unmap" for the other.
        config[36..40].copy_from_slice(&MAX_ZERO_SECTORS.to_le_bytes());
        config[40..44].copy_from_slice(&1u32.to_le_bytes());
        config[44..48].copy_from_slice(&1u32.to_le_bytes());
        config[48..52].copy_from_slice(&MAX_ZERO_SECTORS.to_le_bytes());
        config[52..56].copy_from_slice(&1u32.to_le_bytes());
        config[56] = 1;
        config
    }
}

impl VhostUserBackend for Disk {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.queues.len()
    }

    fn max_queue_size(&self) -> usize {
        SLOTS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_MQ
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The crate's queues know, and nobody else needs to.
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // The crate replaces the content of the handle that `memory` gave it.
        Ok(())
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // Front-ends ask for as many fields as they know; those that we do not know read as zero.
        let mut config = self.config().to_vec();
        let (offset, size) = (offset as usize, size as usize);
        config.resize(config.len().max(offset + size), 0);
        config[offset..offset + size].to_vec()
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues.len()).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK).ok()
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let idle = &self.queues[index as usize].1;
        let queue = self.queue(index as usize);
        drop(
            idle.wait_while(queue, |queue| queue.in_flight() > 0)
                .unwrap_or_else(PoisonError::into_inner),
        );
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        thread: usize,
    ) -> io::Result<()> {
        let mut queue = self.queue(thread);
        if u64::from(event) == self.completion_event() {
            // Level-triggered: it must be cleared before the completions are looked at.
            queue.clear_completion_event();
        }
        // An error returned from here would end the thread and hang the guest.
        queue.run(&vrings[0], &self.memory);
        if queue.in_flight() == 0 {
            self.queues[thread].1.notify_all();
        }
        Ok(())
    }
}
