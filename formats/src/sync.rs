//! Atomics and locks, real or modelled, for the pieces that workers share without waiting.
//!
//! `--cfg loom` swaps in the model checker's. A lock from here is held over memory operations only,
//! never over an await.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard, OnceLock,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

/// What loom lacks; a model makes its values before its threads begin.
#[cfg(loom)]
pub(crate) use std::sync::OnceLock;
