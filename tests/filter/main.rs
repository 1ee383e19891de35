//! Filters, and the test driver below some of them, on the simulated engine.
//!
//! Random tests take their seed from `STONEWORK_SEED` and print it when they fail.

mod blkdebug;
mod compress;
mod copy_on_read;
mod length;
mod overlay;
mod preallocate;
mod setup;
mod throttle;
