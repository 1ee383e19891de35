//! NBD: nodes offered to clients that connect over a socket.
//!
//! There is one [`server`] for all exports. It listens and holds the first conversation with each client
//! (`handshake`) on the control thread, where the exports are; that is a few small messages, and it waits for
//! none of them. The client chooses an export there, and its `connection` goes to one of the export's
//! workers, with requests through the I/O API like those of any guest.
//!
//! A client may be hostile: what it can make us keep is bounded for each connection (see `connection`), the
//! server bounds how many there are, and how long a client may take to choose.

pub mod config;
mod connection;
pub mod export;
mod handshake;
pub mod server;

pub use formats::nbd::tls::{Credentials, Endpoint};

pub use self::config::NbdExportConfig;
pub use self::export::NbdExport;
pub use self::server::{NbdServer, ServerOptions};
