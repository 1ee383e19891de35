//! NBD, the Network Block Device: its protocol, for both ends.
//!
//! [`codec`] is the protocol as bytes and does no I/O; [`stream`] moves them over a socket. The server that uses
//! them is the daemon's.

pub mod codec;
pub mod stream;
