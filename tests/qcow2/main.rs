//! qcow2 images: what we make of them, and what QEMU's tools make of what we do.

mod differential;
mod killed;
mod setup;
mod snapshot;
