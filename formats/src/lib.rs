//! The drivers of stonework's nodes: files and devices of the host, and what images are made of.
//!
//! Each module is a driver; [`drivers`] lists them for whoever builds a graph. What a driver must do is
//! in [`blockcore::driver`].
//!
//! Under `--cfg loom` only the modelled file is built.

#[cfg(not(loom))]
pub mod file;
#[cfg(not(loom))]
pub mod nbd;
#[cfg(not(loom))]
pub mod null;
#[cfg(not(loom))]
pub mod probe;
#[cfg(not(loom))]
pub mod qcow2;
#[cfg(not(loom))]
pub mod raw;
#[cfg(not(loom))]
mod rounds;
mod sync;

#[cfg(loom)]
#[path = "qcow2/cache.rs"]
#[expect(dead_code, reason = "its users are not built there")]
mod cache;

#[cfg(not(loom))]
use blockcore::driver::DriverType;

/// Every driver, filters too, for registration.
#[cfg(not(loom))]
pub fn drivers() -> Vec<&'static DriverType> {
    let mut drivers = vec![
        &file::FILE,
        &file::HOST_DEVICE,
        &raw::RAW,
        &qcow2::QCOW2,
        &null::NULL_CO,
        &null::NULL_AIO,
        &nbd::NBD,
    ];
    drivers.extend(blockcore::filter::drivers());
    drivers
}
