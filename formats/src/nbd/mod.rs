//! NBD, the Network Block Device: its protocol, for both ends.
//!
//! [`codec`] is the protocol as bytes and does no I/O; [`stream`] moves them over a socket; `client` is the
//! driver. The server that uses them is the daemon's.

mod client;
pub mod codec;
pub mod stream;

pub use self::client::NBD;
