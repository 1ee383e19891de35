//! Event counters: how a ring's two ends wake each other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// An eventfd.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// One whose reads and writes do not block, as QEMU makes them.
    pub fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("no eventfd"))
    }

    /// One whose reads and writes block, as libblkio makes them.
    pub fn blocking() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC).expect("no eventfd"))
    }

    /// Adds one to the counter.
    pub fn signal(&self) {
        self.add(1);
    }

    /// Adds `count` to the counter.
    pub fn add(&self, count: u64) {
        rustix::io::write(&self.0, &count.to_ne_bytes()).expect("cannot signal an eventfd");
    }

    /// Waits until the counter is not zero; false if `limit` passes first. The counter stays.
    pub fn wait(&self, limit: Duration) -> bool {
        readable(self.0.as_fd(), limit)
    }

    /// The counter, which becomes zero.
    pub fn take(&self) -> u64 {
        if !self.wait(Duration::ZERO) {
            return 0;
        }
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(Errno::AGAIN) => 0,
            Err(error) => panic!("cannot read an eventfd: {error}"),
        }
    }
}

impl Default for Event {
    fn default() -> Self {
        Self::new()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until `fd` has something to read, or its other end is gone; false after `limit`.
pub fn readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("limits are short");
        match poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&left),
        ) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            Err(error) => panic!("cannot poll: {error}"),
        }
    }
}
