//! [`Gate`]: how long the disk is, and how far into it requests may go without another look.
//!
//! A request for plain data of one cluster asks for one limit and nothing else. It is the disk's length; or
//! 0, which sends every request to where all is looked at:
//!
//! * for all requests, where entries are extended, and once the image is broken;
//! * for writes, while a bitmap in the image claims to be up to date (`bitmaps`);
//! * for writes, while what maps a cluster may be in this process's memory only although what completes is
//!   to outlive it. The limit is 0 before such an entry can be seen, and so is asked for after the entry.
//!
//! Threads: any worker, without a lock. A broken image stays broken, whoever changes something else
//! meanwhile: every change looks again after it was made.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// See the module's header.
pub(super) struct Gate {
    bytes: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    broken: AtomicBool,
    /// Entries say nothing but where a cluster is.
    is_plain: bool,
}

impl Gate {
    /// A disk of `bytes`. `keeps` says whether what maps a cluster is where it has to be.
    pub(super) fn new(bytes: u64, is_plain: bool, keeps: bool) -> Self {
        let gate = Self {
            bytes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            is_plain,
        };
        gate.set_bytes(bytes, || keeps);
        gate
    }

    /// Length of the disk.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// How far plain requests may go.
    #[inline]
    pub(super) fn limit(&self, write: bool) -> u64 {
        let limit = match write {
            true => &self.writes,
            false => &self.reads,
        };
        limit.load(Ordering::Acquire)
    }

    /// The disk has another length.
    pub(super) fn set_bytes(&self, bytes: u64, keeps: impl Fn() -> bool) {
        self.bytes.store(bytes, Ordering::SeqCst);
        if self.is_plain {
            self.reads.store(bytes, Ordering::SeqCst);
        }
        self.allow_writes(keeps);
    }

    /// Writes may go without another look, if `keeps` says so.
    pub(super) fn allow_writes(&self, keeps: impl Fn() -> bool) {
        if keeps() {
            let bytes = self.reads.load(Ordering::SeqCst);
            self.writes.store(bytes, Ordering::SeqCst);
        }
        // It may have become otherwise since the look.
        if !keeps() {
            self.hold_writes();
        }
        if self.is_broken() {
            self.close();
        }
    }

    /// No write goes without another look.
    pub(super) fn hold_writes(&self) {
        self.writes.store(0, Ordering::SeqCst);
    }

    /// Whether nothing more is to be done with the image.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Nothing more is done with the image. Returns whether that was so already.
    pub(super) fn break_off(&self) -> bool {
        let was_broken = self.broken.swap(true, Ordering::SeqCst);
        self.close();
        was_broken
    }

    fn close(&self) {
        self.reads.store(0, Ordering::SeqCst);
        self.hold_writes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(gate: &Gate) -> (u64, u64) {
        (gate.limit(false), gate.limit(true))
    }

    #[test]
    fn nothing_goes_without_a_look_once_the_image_is_broken() {
        let gate = Gate::new(100, true, true);
        assert_eq!(limits(&gate), (100, 100));
        assert!(!gate.break_off());
        assert_eq!(limits(&gate), (0, 0));
        gate.set_bytes(200, || true);
        gate.allow_writes(|| true);
        assert_eq!((gate.bytes(), limits(&gate)), (200, (0, 0)));
        assert!(gate.is_broken() && gate.break_off());
    }

    #[test]
    fn writes_are_held_while_entries_are_not_kept() {
        let gate = Gate::new(100, true, false);
        assert_eq!(limits(&gate), (100, 0));
        gate.allow_writes(|| true);
        assert_eq!(limits(&gate), (100, 100));
        gate.hold_writes();
        gate.set_bytes(50, || false);
        assert_eq!(limits(&gate), (50, 0));
    }

    #[test]
    fn writes_are_held_where_entries_cease_to_be_kept_since_the_look() {
        let gate = Gate::new(100, true, true);
        let looks = std::cell::Cell::new(0);
        gate.allow_writes(|| {
            looks.set(looks.get() + 1);
            looks.get() == 1
        });
        assert_eq!(limits(&gate), (100, 0));
    }

    #[test]
    fn extended_entries_are_always_looked_at() {
        let gate = Gate::new(100, false, true);
        gate.set_bytes(200, || true);
        assert_eq!((gate.bytes(), limits(&gate)), (200, (0, 0)));
    }
}
