//! Small writes to the page cache, done in place instead of on a kernel thread.
//!
//! On file systems that cannot tell whether a buffered write would wait (ext4, tmpfs), io_uring gives
//! every such write to a kernel thread. The hand-over costs more than ten times what the write does.
//! So small writes are tried here first: without waiting where the file system can do that, and
//! otherwise as plain writes under a guard. A plain write waits when the host throttles writers; one
//! that took long sends those after it through the ring for a while, longer each time, so that a
//! worker loses at most a small share of its time to waiting.
//!
//! Threads: one engine's.

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use super::{Errno, OpResult, clock, host};
use crate::io::buffer::Segments;

/// Longer writes are worth a kernel thread, which copies them beside the worker.
const MAX_BYTES: u64 = 64 << 10;
/// A write that takes longer has waited: copying takes a few microseconds.
const LONG: Duration = Duration::from_micros(500);
/// For how many times as long as a write waited the next are sent through the ring, at first.
const FACTOR: u32 = 16;
/// A wait that others notice: the factor doubles with each of these in a row, up to [`MAX_FACTOR`]. After a
/// shorter one [`FACTOR`] bounds the share of time that is lost, which is all that is asked for.
const BAD: Duration = Duration::from_millis(5);
const MAX_FACTOR: u32 = 1024;
/// So many quick writes in a row make a new start.
const FORGIVE: u32 = 10_000;

/// What is known of how a file takes buffered writes; shared by the engines that have it attached.
#[derive(Debug)]
pub(super) struct WriteWays(AtomicU8);

/// Not through the page cache at all.
const NEVER: u8 = 0;
/// Whether it can say that it would wait is not known yet.
const UNKNOWN: u8 = 1;
/// It says when it would wait.
const TELLS: u8 = 2;
/// It cannot say.
const CANNOT_TELL: u8 = 3;

impl WriteWays {
    pub(super) fn new(buffered: bool) -> Self {
        Self(AtomicU8::new(if buffered { UNKNOWN } else { NEVER }))
    }
}

/// How one engine's plain writes went lately.
pub(super) struct Guard {
    /// Plain writes are tried again from then on.
    resume: Cell<Duration>,
    factor: Cell<u32>,
    quick: Cell<u32>,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            resume: Cell::new(Duration::ZERO),
            factor: Cell::new(FACTOR),
            quick: Cell::new(0),
        }
    }
}

impl Guard {
    /// Does a write in place if that promises not to wait; `None` if the ring should have it.
    pub(super) fn write(
        &self,
        ways: &WriteWays,
        fd: BorrowedFd<'_>,
        offset: u64,
        segments: &Segments,
    ) -> Option<OpResult> {
        let way = ways.0.load(Ordering::Relaxed);
        if way == NEVER || segments.bytes() > MAX_BYTES {
            return None;
        }
        if way != CANNOT_TELL {
            match host::write_cached(fd, offset, segments.list()) {
                Err(Errno::OPNOTSUPP) => ways.0.store(CANNOT_TELL, Ordering::Relaxed),
                Err(Errno::AGAIN | Errno::INTR) => return None,
                result => {
                    ways.0.store(TELLS, Ordering::Relaxed);
                    return Some(result);
                }
            }
        }
        let began = clock::now();
        if began < self.resume.get() {
            return None;
        }
        let result = host::write(fd, offset, segments.list());
        let ended = clock::now();
        self.took(ended - began, ended);
        Some(result)
    }

    fn took(&self, time: Duration, now: Duration) {
        if time < LONG {
            self.quick.set(self.quick.get().saturating_add(1));
            if self.quick.get() == FORGIVE {
                self.factor.set(FACTOR);
            }
            return;
        }
        self.quick.set(0);
        self.resume.set(now + time * self.factor.get());
        if time >= BAD {
            self.factor.set((self.factor.get() * 2).min(MAX_FACTOR));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_waited_keeps_the_next_away_longer_each_time() {
        let guard = Guard::default();
        let millis = Duration::from_millis;
        guard.took(millis(10), millis(1000));
        assert_eq!(guard.resume.get(), millis(1160));
        guard.took(millis(10), millis(2000));
        assert_eq!(guard.resume.get(), millis(2320));
        for _ in 0..FORGIVE {
            guard.took(Duration::from_micros(2), millis(3000));
        }
        guard.took(millis(10), millis(4000));
        assert_eq!(guard.resume.get(), millis(4160));
    }

    #[test]
    fn short_waits_keep_the_next_writes_away_for_the_same_share_of_time() {
        let guard = Guard::default();
        for _ in 0..10 {
            guard.took(Duration::from_millis(1), Duration::from_millis(100));
            assert_eq!(guard.resume.get(), Duration::from_millis(116));
        }
    }

    #[test]
    fn only_buffered_writes_of_moderate_length_are_done_in_place() {
        use std::os::fd::AsFd;
        let file = tempfile::tempfile().unwrap();
        let (guard, small) = (Guard::default(), Segments::allocate(4096, 1));
        small.fill(7);
        let write =
            |ways: &WriteWays, segments: &Segments| guard.write(ways, file.as_fd(), 512, segments);
        assert!(write(&WriteWays::new(false), &small).is_none());
        let ways = WriteWays::new(true);
        assert_eq!(write(&ways, &small), Some(Ok(4096)));
        let large = Segments::allocate(MAX_BYTES as usize + 1, 1);
        assert!(write(&ways, &large).is_none());
        assert_eq!(file.metadata().unwrap().len(), 4608);
    }
}
