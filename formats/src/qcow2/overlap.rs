//! [`Metadata`]: which host clusters hold metadata, so that nothing else is ever written there.
//!
//! Every host range of a guest's write, and every cluster that is handed out, is looked up here, whatever
//! the image's tables say. One load for a cluster.
//!
//! Clusters are divided into windows by the binary logarithm of their number, each with a bitmap that
//! exists from the first metadata cluster in it: what is kept depends on where there is metadata, and not
//! on how large an image claims to be.
//!
//! Threads: any worker, without a lock.

use std::sync::OnceLock;

use blockcore::dirty_bitmap::Bits;

use super::layout::{Geometry, HostOffset};

/// The most clusters that a window's bitmap can have bits for.
const MAX_WINDOW_BITS: u32 = 33;

/// See the module's header.
pub(crate) struct Metadata {
    geometry: Geometry,
    windows: Box<[OnceLock<Bits>]>,
}

impl Metadata {
    /// No metadata yet.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            windows: (0..=MAX_WINDOW_BITS + 1).map(|_| OnceLock::new()).collect(),
        }
    }

    pub(crate) fn cluster_bytes(&self) -> u64 {
        self.geometry.cluster_bytes()
    }

    /// Whether there can be metadata at an offset: not further out than this table reaches.
    pub(crate) fn reaches(&self, host: HostOffset) -> bool {
        self.window(host.0).0 < self.windows.len()
    }

    /// The clusters that the range touches hold metadata from now on.
    pub(crate) fn add(&self, host: HostOffset, bytes: u64) {
        self.each(host, bytes, |window, within| {
            let bits = self.windows[window].get_or_init(|| self.bits(window));
            bits.set(within, 1);
            false
        });
    }

    /// They hold no metadata any more.
    pub(crate) fn remove(&self, host: HostOffset, bytes: u64) {
        let cluster = self.geometry.cluster_bytes();
        self.each(host, bytes, |window, within| {
            if let Some(bits) = self.windows[window].get() {
                bits.clear(self.geometry.cluster_start(within), cluster);
            }
            false
        });
    }

    /// Whether the range touches a cluster with metadata.
    #[inline]
    pub(crate) fn overlaps(&self, host: HostOffset, bytes: u64) -> bool {
        self.each(host, bytes, |window, within| {
            match self.windows.get(window) {
                Some(bits) => bits.get().is_some_and(|bits| bits.get(within)),
                // Nothing of ours is so far out, and nothing will be written there.
                None => true,
            }
        })
    }

    /// Calls `look` for each cluster of a range until it says yes, and returns whether it did.
    #[inline]
    fn each(&self, host: HostOffset, bytes: u64, look: impl Fn(usize, u64) -> bool) -> bool {
        let mut offset = self.geometry.cluster_start(host.0);
        while offset < host.0 + bytes {
            let (window, within) = self.window(offset);
            if look(window, within) {
                return true;
            }
            offset += self.geometry.cluster_bytes();
        }
        false
    }

    /// Which window an offset lies in, and where there.
    #[inline]
    fn window(&self, offset: u64) -> (usize, u64) {
        let cluster = offset >> self.geometry.cluster_bits;
        let bits = u64::BITS - cluster.leading_zeros();
        let begin = (1_u64 << bits) >> 1;
        (
            bits as usize,
            offset - (begin << self.geometry.cluster_bits),
        )
    }

    fn bits(&self, window: usize) -> Bits {
        let clusters = (1_u64 << window) >> 1;
        let bytes = clusters.max(1) << self.geometry.cluster_bits;
        Bits::new(bytes, self.geometry.cluster_bytes()).expect("windows are small enough")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_found_wherever_it_is_and_nowhere_else() {
        for cluster_bits in [9, 16, 21] {
            let geometry = Geometry {
                cluster_bits,
                refcount_order: 4,
                extended: false,
                zero_flag: true,
                data_file: false,
            };
            let metadata = Metadata::new(geometry);
            let cluster = geometry.cluster_bytes();
            for number in [0, 1, 2, 3, 1000, 1 << 32, (1 << 33) - 1] {
                let host = HostOffset(number * cluster);
                assert!(!metadata.overlaps(host, cluster), "{number}");
                metadata.add(host, cluster);
                assert!(metadata.overlaps(HostOffset(host.0 + 5), 1));
            }
            assert!(metadata.overlaps(HostOffset(3 * cluster + 1), 2 * cluster));
            assert!(!metadata.overlaps(HostOffset(4 * cluster), 100 * cluster));
            metadata.remove(HostOffset(2 * cluster), 2 * cluster);
            assert!(!metadata.overlaps(HostOffset(2 * cluster), 2 * cluster));
            assert!(metadata.overlaps(HostOffset(cluster), 1));
            let far = HostOffset(cluster << 34);
            assert!(metadata.overlaps(far, 1) && !metadata.reaches(far));
        }
    }
}
