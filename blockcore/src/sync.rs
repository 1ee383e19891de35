//! Atomics and locks, real or modelled.
//!
//! The lock-free pieces take theirs from here, so that `--cfg loom` swaps in the model checker's.
//! A lock from here is held over memory operations only, never over an await.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

#[cfg(loom)]
pub(crate) use self::modelled::OnceLock;
#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

#[cfg(loom)]
mod modelled {
    use super::{AtomicBool, Mutex, Ordering};

    /// What loom lacks: as the real one, a look may miss a value that another thread has just made.
    pub(crate) struct OnceLock<T> {
        value: std::sync::OnceLock<T>,
        made: AtomicBool,
        making: Mutex<()>,
    }

    impl<T> OnceLock<T> {
        pub(crate) fn new() -> Self {
            Self {
                value: std::sync::OnceLock::new(),
                made: AtomicBool::new(false),
                making: Mutex::new(()),
            }
        }

        pub(crate) fn get(&self) -> Option<&T> {
            if !self.made.load(Ordering::Acquire) {
                return None;
            }
            self.value.get()
        }

        pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
            if !self.made.load(Ordering::Acquire) {
                let _making = self.making.lock().expect("no panic in a model");
                self.value.get_or_init(make);
                self.made.store(true, Ordering::Release);
            }
            self.value.get().expect("made just now or before")
        }
    }
}
