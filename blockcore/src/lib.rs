//! The block layer.

pub mod engine;
pub mod error;
pub mod executor;
pub mod io;
pub mod mailbox;
pub(crate) mod sync;

pub use error::{Error, ErrorKind, IoError};
