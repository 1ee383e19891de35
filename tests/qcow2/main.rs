//! qcow2 images: what we make of them, and what QEMU's tools make of what we do.

mod amend;
mod bitmaps;
mod chain;
mod differential;
mod failing;
mod grow;
mod hostile;
mod killed;
mod power;
mod race;
mod setup;
mod snapshot;
mod states;
mod stress;
mod world;
