//! [`HeaderGuard`]: keeps a guest from turning a disk whose format was guessed into an image of another
//! format.
//!
//! A guest that owns a raw disk could write a header that names any file of the host as its backing
//! image, and read that file after the next start, where the format is guessed again. So while the
//! format is a guess, no write may make another driver's probe score higher.

use super::buffer::Segments;
use crate::IoError;
use crate::driver::{DriverType, PROBE_BYTES};

/// See the module's header.
pub(crate) struct HeaderGuard {
    own: fn(&[u8]) -> u32,
    others: Vec<fn(&[u8]) -> u32>,
}

impl HeaderGuard {
    /// A guard of a node whose driver is `kind`.
    pub(crate) fn new(kind: &'static DriverType, types: &[&'static DriverType]) -> Self {
        let others = types.iter().filter(|other| other.name != kind.name);
        Self {
            own: kind.probe.unwrap_or(|_| 1),
            others: others.filter_map(|other| other.probe).collect(),
        }
    }

    /// Gives back what may be written at `offset`: the part that is looked at is in memory that the guest
    /// cannot change any more. Requests come in whole units of [`PROBE_BYTES`].
    ///
    /// # Errors
    ///
    /// [`IoError::ReadOnly`] for bytes that would look like another format.
    pub(crate) fn check(&self, offset: u64, from: Segments) -> Result<Segments, IoError> {
        if offset != 0 || from.is_empty() {
            return Ok(from);
        }
        let bytes = from.bytes().min(PROBE_BYTES as u64);
        let head = Segments::allocate(bytes as usize, PROBE_BYTES);
        head.copy_from_segments(&from.slice(0, bytes));
        let copied = head.to_vec();
        let own = (self.own)(&copied);
        if self.others.iter().any(|probe| probe(&copied) > own) {
            return Err(IoError::ReadOnly);
        }
        let rest = from.slice(bytes, from.bytes() - bytes);
        Ok(Segments::join(vec![head, rest]))
    }
}
