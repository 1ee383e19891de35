//! A front-end on libblkio (crate `blkio`), as its applications use it.
//!
//! It sits on the crate that [`driver`](crate::driver) uses too, but decides for itself when to
//! kick and how to wait, and derives limits from the configuration space. One queue waits by its
//! call descriptor, the other one polls.
#![expect(
    unsafe_code,
    reason = "libblkio takes raw buffers and fills uninitialised completions"
)]

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

/// What is sent in one go, at most: with libblkio's default of 256 descriptors in a queue.
pub const MAX_BATCH: usize = 32;

/// A request whose data is in the slot of its place in the batch.
#[derive(Debug, Clone, Copy)]
pub enum Request {
    /// Read to the slot.
    Read {
        /// In bytes, as are all offsets and lengths.
        offset: u64,
        /// At most a slot.
        bytes: usize,
    },
    /// Write from the slot.
    Write {
        /// Where to.
        offset: u64,
        /// At most a slot.
        bytes: usize,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Where to.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Whether the range may be deallocated.
        unmap: bool,
    },
    /// Discard.
    Discard {
        /// From where.
        offset: u64,
        /// How much.
        bytes: u64,
    },
    /// Make completed writes durable.
    Flush,
}

/// A started libblkio.
pub struct Libblkio {
    queues: Vec<Blkioq>,
    blkio: Blkio,
    region: MemoryRegion,
    slot_bytes: usize,
}

impl Libblkio {
    /// Connects to `socket`, where somebody has to listen already, with buffers of `slot_bytes`.
    ///
    /// # Errors
    ///
    /// What libblkio says.
    pub fn connect(socket: &Path, slot_bytes: usize) -> Result<Self, blkio::Error> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
        blkio.set_str("path", &socket.to_string_lossy())?;
        blkio.connect()?;
        blkio.set_i32("num-queues", 1)?;
        blkio.set_i32("num-poll-queues", 1)?;
        let started = blkio.start()?;
        let region = blkio.alloc_mem_region(MAX_BATCH * slot_bytes)?;
        blkio.map_mem_region(&region)?;
        let mut queues = started.queues;
        queues.extend(started.poll_queues);
        Ok(Self {
            queues,
            blkio,
            region,
            slot_bytes,
        })
    }

    /// A property that libblkio has from the device.
    ///
    /// # Errors
    ///
    /// There is no such property, or it is of another type.
    pub fn property(&self, name: &str) -> Result<u64, blkio::Error> {
        match self.blkio.get_u64(name) {
            Ok(value) => Ok(value),
            Err(_) => self.blkio.get_i32(name).map(|value| value as u64),
        }
    }

    /// The queues: one that sleeps, one that polls.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// The buffer of the request at `slot` in the next batch.
    pub fn buffer(&mut self, slot: usize) -> &mut [u8] {
        assert!(slot < MAX_BATCH);
        let address = (self.region.addr + slot * self.slot_bytes) as *mut u8;
        // SAFETY: in the region, which is ours until `self` is dropped; no request is in flight
        // outside of `perform`.
        unsafe { std::slice::from_raw_parts_mut(address, self.slot_bytes) }
    }

    /// Sends `batch` to a queue and waits until all of it has completed with success.
    ///
    /// # Errors
    ///
    /// A sentence on what failed, or that it took longer than `limit`. In both cases requests may
    /// be in flight still, so the connection is of no more use.
    pub fn perform(
        &mut self,
        queue: usize,
        batch: &[Request],
        limit: Duration,
    ) -> Result<(), String> {
        assert!(batch.len() <= MAX_BATCH);
        for (slot, &request) in batch.iter().enumerate() {
            let buffer = self.buffer(slot).as_mut_ptr();
            let queue = &mut self.queues[queue];
            let none = ReqFlags::empty();
            match request {
                Request::Read { offset, bytes } => {
                    assert!(bytes <= self.slot_bytes);
                    queue.read(offset, buffer, bytes, slot, none);
                }
                Request::Write { offset, bytes } => {
                    assert!(bytes <= self.slot_bytes);
                    queue.write(offset, buffer, bytes, slot, none);
                }
                Request::WriteZeroes {
                    offset,
                    bytes,
                    unmap,
                } => {
                    let flags = if unmap { none } else { ReqFlags::NO_UNMAP };
                    queue.write_zeroes(offset, bytes, slot, flags);
                }
                Request::Discard { offset, bytes } => queue.discard(offset, bytes, slot, none),
                Request::Flush => queue.flush(slot, none),
            }
        }
        let mut completions: [MaybeUninit<Completion>; MAX_BATCH] =
            [const { MaybeUninit::uninit() }; MAX_BATCH];
        let mut limit = limit;
        let count = self.queues[queue]
            .do_io(&mut completions, batch.len(), Some(&mut limit), None)
            .map_err(|error| error.to_string())?;
        let mut seen = [false; MAX_BATCH];
        for completion in &completions[..count] {
            // SAFETY: `do_io` has filled as many as it said.
            let completion = unsafe { completion.assume_init_ref() };
            if completion.ret != 0 {
                return Err(format!(
                    "{:?} failed with {}",
                    batch[completion.user_data], completion.ret
                ));
            }
            if std::mem::replace(&mut seen[completion.user_data], true) {
                return Err(format!("{:?} completed twice", batch[completion.user_data]));
            }
        }
        if count != batch.len() {
            return Err(format!("{count} of {} requests completed", batch.len()));
        }
        Ok(())
    }
}
