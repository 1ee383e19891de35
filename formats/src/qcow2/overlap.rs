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
        self.window(host.0) < self.windows.len()
    }

    /// The clusters that the range touches hold metadata from now on.
    pub(crate) fn add(&self, host: HostOffset, bytes: u64) {
        self.each(host, bytes, |offset| {
            let window = self.window(offset);
            let bits = self.windows[window].get_or_init(|| self.bits(window));
            bits.set(offset, 1);
        });
    }

    /// They hold no metadata any more.
    pub(crate) fn remove(&self, host: HostOffset, bytes: u64) {
        let cluster = self.geometry.cluster_bytes();
        self.each(host, bytes, |offset| {
            if let Some(bits) = self.windows[self.window(offset)].get() {
                bits.clear(offset, cluster);
            }
        });
    }

    /// Whether the range touches a cluster with metadata.
    #[inline]
    pub(crate) fn overlaps(&self, host: HostOffset, bytes: u64) -> bool {
        let end = host.0 + bytes;
        let mut cluster = HostOffset(self.geometry.cluster_start(host.0));
        while cluster.0 < end {
            if self.is_in_cluster(cluster) {
                return true;
            }
            cluster.0 += self.geometry.cluster_bytes();
        }
        false
    }

    /// Whether the cluster that an offset lies in holds metadata.
    #[inline]
    pub(crate) fn is_in_cluster(&self, host: HostOffset) -> bool {
        match self.windows.get(self.window(host.0)) {
            Some(bits) => bits.get().is_some_and(|bits| bits.get(host.0)),
            // Nothing of ours is so far out, and nothing will be written there.
            None => true,
        }
    }

    /// Calls `change` with the beginning of each cluster of a range.
    fn each(&self, host: HostOffset, bytes: u64, change: impl Fn(u64)) {
        let mut offset = self.geometry.cluster_start(host.0);
        while offset < host.0 + bytes {
            change(offset);
            offset += self.geometry.cluster_bytes();
        }
    }

    /// Which window an offset lies in.
    #[inline]
    fn window(&self, offset: u64) -> usize {
        let cluster = offset >> self.geometry.cluster_bits;
        (u64::BITS - cluster.leading_zeros()) as usize
    }

    /// The bits of a window. They begin with the image, and no memory is taken for those before the window.
    fn bits(&self, window: usize) -> Bits {
        let bytes = (1_u64 << window) << self.geometry.cluster_bits;
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
