//! vhost-user: front-ends connect to an export's socket and drive its virtqueues.
//!
//! One thread per export accepts front-ends in turn and serves each to its end: it takes a whole
//! message from the front-end, lets the `vhost` crate parse it through a socketpair, does what it
//! asks (`session`) and sends the answer back. The thread asks the control thread and waits for it,
//! which asks the workers: so a message is answered after the workers have acted on it, and a queue
//! that stops has nothing in flight.
//!
//! Threads: the connection thread may wait for the control thread and for its front-end. Nobody waits
//! for it but whoever stops the daemon, which ends all of its waits first.

pub mod listener;
pub mod memory;
pub(crate) mod session;
mod socket;
