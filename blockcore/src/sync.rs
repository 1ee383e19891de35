//! Atomics and locks, real or modelled.
//!
//! The lock-free pieces take theirs from here, so that `--cfg loom` swaps in the model checker's.
//! A lock from here is held over memory operations only, never over an await.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};
