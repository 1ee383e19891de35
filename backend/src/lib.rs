//! The daemon of stonework: what stands between front-ends and operators on one side and the block
//! layer ([`blockcore`]) on the other.
//!
//! The binary `stonework` is a thin shell around this library, so that a test can start a daemon in
//! its own process. Start at [`daemon`] for what owns what, at [`worker`] for where requests run.

pub mod background;
pub mod chardev;
pub mod cli;
pub mod config;
pub mod ctl;
pub mod daemon;
pub mod export;
pub mod img;
pub mod inherited;
pub mod metrics;
pub mod nbd;
pub mod pidfile;
pub mod polling;
pub mod qapi;
pub mod qmp;
pub mod serve;
pub mod signals;
mod temporary;
pub mod vhost_user;
pub mod virtio;
pub mod worker;
