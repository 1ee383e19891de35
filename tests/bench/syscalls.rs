//! The load without a back-end and without io_uring: `pread` and `pwrite`, one at a time.
//!
//! For the page cache it is the limit. Depth means nothing here, so latencies of the deeper rows
//! do not either.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::load::{self, Block, Job, Lane, Measurement};
use crate::machine::Placement;
use crate::row::{BLOCK_BYTES, Operation};

/// Measures the file itself. The CPU time is that of the whole client.
pub(crate) fn measure(job: &Job<'_>, placement: &Placement) -> io::Result<Measurement> {
    let file = job.open()?;
    let mut lanes = (0..job.row.queues)
        .map(|_| {
            Ok(Syscalls {
                file: file.try_clone()?,
                buffers: vec![Block([0; BLOCK_BYTES]); job.row.depth],
                done: Vec::new(),
            })
        })
        .collect::<io::Result<Vec<_>>>()?;
    load::verify(job, &mut lanes, u64::from(std::process::id()))?;
    load::measure(
        job,
        lanes,
        || placement.pin_client(job.row),
        placement.is_shared(job.row),
        None,
    )
}

/// A file under load.
struct Syscalls {
    file: File,
    buffers: Vec<Block>,
    done: Vec<usize>,
}

impl Lane for Syscalls {
    fn submit(&mut self, slot: usize, operation: Operation, block: u64) -> io::Result<()> {
        let offset = block * BLOCK_BYTES as u64;
        let buffer = &mut self.buffers[slot].0;
        match operation {
            Operation::Read => self.file.read_exact_at(buffer, offset)?,
            Operation::Write | Operation::First => self.file.write_all_at(buffer, offset)?,
        }
        self.done.push(slot);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> io::Result<()> {
        done.append(&mut self.done);
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        &mut self.buffers[slot].0
    }
}
