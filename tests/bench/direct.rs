//! The load without a back-end: the client does the file's I/O itself, with plain io_uring.
//!
//! It is a limit for back-ends that do all of their I/O with io_uring. It is not one for all: the
//! kernel hands buffered writes to threads of its own, which a back-end that calls `pwrite`
//! avoids; see [`syscalls`](crate::syscalls).
#![expect(unsafe_code, reason = "hands its own buffers to io_uring")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use harness::driver::Waiting;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

use crate::load::{self, Block, Job, Lane, Measurement};
use crate::machine::Placement;
use crate::row::{BLOCK_BYTES, Operation};

/// More than the deepest row has requests in flight.
const ENTRIES: u32 = 64;

/// Measures the file itself. The CPU time is that of the whole client.
pub(crate) fn measure(job: &Job<'_>, placement: &Placement) -> io::Result<Measurement> {
    let file = job.open()?;
    let mut lanes = (0..job.row.queues)
        .map(|_| Direct::new(file.try_clone()?, job))
        .collect::<io::Result<Vec<_>>>()?;
    load::verify(job, &mut lanes, u64::from(std::process::id()))?;
    load::measure(
        job,
        lanes,
        // Anywhere: a client that polls would starve the kernel's threads if they were pinned with
        // it, and served rows have as many CPUs between them.
        || Ok(()),
        placement.is_shared(job.row),
        None,
    )
}

/// A ring under load.
struct Direct {
    ring: IoUring,
    waiting: Waiting,
    buffers: Vec<Block>,
    // Held for the ring, which knows it as registered file 0.
    _file: File,
}

impl Direct {
    fn new(file: File, job: &Job<'_>) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self {
            ring,
            waiting: job.row.waiting(),
            buffers: vec![Block([0; BLOCK_BYTES]); job.row.depth],
            _file: file,
        })
    }
}

impl Lane for Direct {
    fn submit(&mut self, slot: usize, operation: Operation, block: u64) -> io::Result<()> {
        let offset = block * BLOCK_BYTES as u64;
        let buffer = self.buffers[slot].0.as_mut_ptr();
        let length = BLOCK_BYTES as u32;
        let entry = match operation {
            Operation::Read => opcode::Read::new(Fixed(0), buffer, length)
                .offset(offset)
                .build(),
            Operation::Write | Operation::First => opcode::Write::new(Fixed(0), buffer, length)
                .offset(offset)
                .build(),
        };
        // SAFETY: the buffer stays where it is, and `buffer` is not called for a slot in flight;
        // the file is kept.
        unsafe {
            self.ring
                .submission()
                .push(&entry.user_data(slot as u64))
                .map_err(io::Error::other)
        }
    }

    fn kick(&mut self) -> io::Result<()> {
        match self.waiting {
            Waiting::Polling => self.ring.submit().map(drop),
            // One system call for both: `wait` comes next.
            Waiting::Eventfd => Ok(()),
        }
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> io::Result<()> {
        for entry in self.ring.completion() {
            if entry.result() != BLOCK_BYTES as i32 {
                return Err(io::Error::other(format!(
                    "a request returned {}",
                    entry.result()
                )));
            }
            done.push(entry.user_data() as usize);
        }
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        match self.waiting {
            Waiting::Polling => {
                std::hint::spin_loop();
                Ok(())
            }
            Waiting::Eventfd => self.ring.submit_and_wait(1).map(drop),
        }
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        &mut self.buffers[slot].0
    }
}
