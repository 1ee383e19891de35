//! NBD, with the clients and servers that others use: libnbd's tools, QEMU's, fio; and with hostile ones.

mod hostile;
mod manage;
mod setup;
mod tools;
