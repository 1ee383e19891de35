//! The drivers of stonework's nodes: files and devices of the host, and what images are made of.
//!
//! Each module is a driver; [`drivers`] lists them for whoever builds a graph. What a driver must do is
//! in [`blockcore::driver`].

pub mod file;
pub mod null;
pub mod probe;
pub mod qcow2;
pub mod raw;
mod rounds;
mod sync;

use blockcore::driver::DriverType;

/// Every driver, filters too, for registration.
pub fn drivers() -> Vec<&'static DriverType> {
    let mut drivers = vec![
        &file::FILE,
        &file::HOST_DEVICE,
        &raw::RAW,
        &qcow2::QCOW2,
        &null::NULL_CO,
        &null::NULL_AIO,
    ];
    drivers.extend(blockcore::filter::drivers());
    drivers
}
