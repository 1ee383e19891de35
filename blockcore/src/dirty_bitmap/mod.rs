//! Dirty bitmaps: which parts of a node were written since somebody last looked.
//!
//! A bitmap has two sides. [`DirtyBitmap`] is what an operator sees: a name, whether it records, who
//! uses it. It belongs to the control thread, as does a node's [`BitmapSet`]. [`Bits`] are what workers
//! set, behind an `Arc`; they know no state. Which bits a write must be noted in is part of a worker's
//! plan, a [`Recorder`] made by [`BitmapSet::recorder`]; so a write looks at no flag, and a node without
//! bitmaps pays nothing.
//!
//! **Whatever changes which bits record must be followed by a new recorder, within one drained
//! section**: adding, removing, putting back, enabling, disabling, freezing, reclaiming, resizing. What
//! changes content only (clearing, merging, undoing a clear, loading) may happen while workers write.
//!
//! A write is noted after its I/O has ended and before it completes to the caller, whether it succeeded
//! or failed. Why nothing is lost then is told in [`bits`].
//!
//! Persistent bitmaps are a driver's to keep in its image ([`Driver::store_bitmaps`](crate::driver::Driver::store_bitmaps));
//! as [`KeptBitmap`]s they go there and come back.
//!
//! Not here: how an image keeps them, and copying of what is dirty.

#[cfg(not(loom))]
mod bitmap;
pub mod bits;
mod chunk;
#[cfg(not(loom))]
mod serial;
#[cfg(not(loom))]
mod set;

#[cfg(not(loom))]
pub use self::bitmap::{
    Backup, DirtyBitmap, KeptBitmap, MAX_GRANULARITY_BYTES, MAX_NAME_BYTES, MIN_GRANULARITY_BYTES,
    Operation, Status, default_granularity_bytes,
};
pub use self::bits::{Area, Bits};
#[cfg(not(loom))]
pub use self::set::{BitmapSet, MAX_BITMAPS, Recorder};

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
