//! Filters: nodes that pass data through unchanged, and do something about it.
//!
//! Each module is a driver; [`drivers`] lists them for whoever builds a graph.

pub mod blkdebug;
pub mod compress;
pub mod copy_before_write;
pub mod copy_on_read;
pub(crate) mod link;
pub mod preallocate;
pub mod throttle;

use crate::driver::DriverType;

/// Every filter, for registration.
pub fn drivers() -> Vec<&'static DriverType> {
    vec![
        &blkdebug::BLKDEBUG,
        &compress::COMPRESS,
        &copy_on_read::COPY_ON_READ,
        &preallocate::PREALLOCATE,
        &copy_before_write::COPY_BEFORE_WRITE,
        &copy_before_write::SNAPSHOT_ACCESS,
        &throttle::THROTTLE,
    ]
}
