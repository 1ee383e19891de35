//! NBD, the Network Block Device: its protocol, for both ends.
//!
//! [`codec`] is the protocol as bytes and does no I/O; [`stream`] moves them over a socket, encrypted
//! with the keys of [`tls`] where that is agreed; `client` is the
//! driver. The server that uses them is the daemon's.

mod client;
pub mod codec;
pub mod stream;
pub mod tls;

pub use self::client::NBD;
