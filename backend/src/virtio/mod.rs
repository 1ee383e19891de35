//! Virtio as a device sees it: virtqueues, and the block device's requests on them.

pub mod blk;
pub mod queue;
