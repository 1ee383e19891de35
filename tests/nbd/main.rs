//! NBD, with the clients and servers that others use: libnbd's tools, QEMU's, fio; and with hostile ones.

mod client;
mod hostile;
mod liar;
mod manage;
mod setup;
mod tools;
