//! Filters: nodes that pass data through unchanged, and do something about it.
//!
//! Each module is a driver; [`drivers`] lists them for whoever builds a graph.

pub mod copy_before_write;
pub mod throttle;

use crate::driver::DriverType;

/// Every filter, for registration.
pub fn drivers() -> Vec<&'static DriverType> {
    vec![
        &copy_before_write::COPY_BEFORE_WRITE,
        &copy_before_write::SNAPSHOT_ACCESS,
        &throttle::THROTTLE,
    ]
}
