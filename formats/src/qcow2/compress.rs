//! Compressed clusters: raw deflate or Zstandard, packed one after the other.

use std::io::Read;

use blockcore::IoError;
use blockcore::io::Io;
use blockcore::io::buffer::Segments;
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use super::alloc::{Class, Reserved};
use super::image::{FILE, Image, write_bytes};
use super::layout::HostOffset;
use super::layout::entry::L2Entry;
use super::layout::header::Compression;
use super::limbo::{Cause, Freed};
use super::mapping::Extent;
use super::refcount::ClusterNumber;

/// QEMU reads deflated clusters with a window of this size.
const WINDOW_BITS: u8 = 12;

/// Where the next compressed cluster can follow the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    /// The first byte that is free; not the first of a cluster.
    next: u64,
}

impl Tail {
    pub(super) fn is_in(self, cluster: ClusterNumber, cluster_bits: u32) -> bool {
        self.next >> cluster_bits == cluster
    }
}

/// What is compressed in `data`, which may go on after it: exactly `bytes`, or `None` if it is not that.
fn decompress(compression: Compression, data: &[u8], bytes: usize) -> Option<Vec<u8>> {
    let mut plain = vec![0; bytes];
    match compression {
        Compression::Zlib => {
            let mut inflate = Decompress::new(false);
            let status = inflate.decompress(data, &mut plain, FlushDecompress::Finish);
            // Full is as good as ended: what is left may be the end's mark, or no room to see it.
            let is_done = match status {
                Ok(Status::StreamEnd | Status::Ok | Status::BufError) => true,
                Err(_) => false,
            };
            (is_done && inflate.total_out() == bytes as u64).then_some(plain)
        }
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(data)
                .ok()?
                .single_frame();
            decoder.read_exact(&mut plain).ok()?;
            Some(plain)
        }
    }
}

/// `plain`, compressed into less than it takes; `None` if it cannot be.
fn compress(compression: Compression, plain: &[u8]) -> Option<Vec<u8>> {
    match compression {
        Compression::Zlib => {
            let level = flate2::Compression::default();
            let mut deflate = Compress::new_with_window_bits(level, false, WINDOW_BITS);
            let mut data = vec![0; plain.len() - 1];
            let status = deflate.compress(plain, &mut data, FlushCompress::Finish);
            if !matches!(status, Ok(Status::StreamEnd)) {
                return None;
            }
            data.truncate(deflate.total_out() as usize);
            Some(data)
        }
        Compression::Zstd => {
            let data = zstd::bulk::compress(plain, 0).ok()?;
            (data.len() < plain.len()).then_some(data)
        }
    }
}

impl Image {
    pub(super) async fn read_compressed(
        &self,
        io: Io<'_>,
        offset: u64,
        extent: Extent,
        into: Segments,
    ) -> Result<(), IoError> {
        let place = extent.compressed.expect("compressed data has a place");
        let cluster_bytes = self.geometry.cluster_bytes();
        let data = Segments::allocate(place.bytes as usize, 4096);
        {
            // Before any wait: see `try_extent`.
            let _using = io.using(FILE, place.host.0, place.bytes);
            io.child(FILE).event("read_compressed").await?;
            io.child(FILE).read(place.host.0, data.clone()).await?;
        }
        let (data, compression) = (data.to_vec(), self.header().compression);
        let plain = io
            .context()
            .offload(move || decompress(compression, &data, cluster_bytes as usize))
            .await;
        let Some(plain) = plain else {
            let message = format!(
                "the compressed cluster at offset {:#x} cannot be decompressed",
                place.host.0
            );
            let what = (place.host, place.bytes);
            return Err(self.corrupt(io, message, what, false).await);
        };
        let within = self.geometry.offset_in_cluster(offset) as usize;
        into.copy_from(&plain[within..within + into.bytes() as usize]);
        Ok(())
    }

    /// Writes a whole cluster, or the last one up to the disk's end, compressed if that makes it smaller.
    pub(super) async fn write_compressed(
        &self,
        io: Io<'_>,
        offset: u64,
        from: Segments,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        if g.data_file {
            return Err(IoError::Unsupported);
        }
        let mut next = 0;
        while next < from.bytes() {
            let bytes = (from.bytes() - next).min(g.cluster_bytes());
            let (at, part) = (offset + next, from.slice(next, bytes));
            let reaches_end = at + bytes == self.bytes();
            if !g.is_aligned(at) || (bytes < g.cluster_bytes() && !reaches_end) {
                return Err(IoError::OutOfRange);
            }
            self.write_one_compressed(io, at, part).await?;
            next += bytes;
        }
        Ok(())
    }

    async fn write_one_compressed(
        &self,
        io: Io<'_>,
        offset: u64,
        from: Segments,
    ) -> Result<(), IoError> {
        let g = self.geometry;
        let mut plain = from.to_vec();
        plain.resize(g.cluster_bytes() as usize, 0);
        let compression = self.header().compression;
        let data = io
            .context()
            .offload(move || compress(compression, &plain))
            .await;
        let Some(data) = data else {
            return self.write(io, offset, from).await;
        };
        let cluster = offset >> g.cluster_bits;
        let _turn = self
            .turns
            .begin(offset, offset + g.cluster_bytes(), true)
            .await;
        self.own_table(io, self.l1_index(offset)).await?;
        self.entry(io, cluster).await?;
        let bytes = data.len() as u64;
        let host = self.place_for_compressed(io, bytes).await?;
        if let Err(error) = self.write_packed(io, host, &data).await {
            // Others may follow it already, and count their clusters for themselves.
            let begin = g.cluster_start(host.0);
            let freed = Freed {
                host: HostOffset(begin),
                clusters: g.clusters(host.0 + bytes - begin),
                cause: Cause::Other,
            };
            self.free(io, freed);
            return Err(error);
        }
        self.publish(io, cluster, 1, |_, _| L2Entry::compressed(host, bytes, g))
            .await
    }

    async fn write_packed(&self, io: Io<'_>, host: HostOffset, data: &[u8]) -> Result<(), IoError> {
        io.child(FILE).event("write_compressed").await?;
        write_bytes(io, host, data).await
    }

    /// Room for a compressed cluster: after the last one if there is some, also across the end of its host
    /// cluster if the next one is to be had. Every host cluster that is touched counts it.
    async fn place_for_compressed(&self, io: Io<'_>, bytes: u64) -> Result<HostOffset, IoError> {
        let bits = self.geometry.cluster_bits;
        let cluster_bytes = self.geometry.cluster_bytes();
        // One at a time, so that the tail is one.
        let _turn = self.packing.begin(0, 1, true).await;
        let tail = self.tail().take();
        let tail = match tail {
            Some(tail) if self.join_tail(io, tail).await? => Some(tail.next),
            _ => None,
        };
        if let Some(begin) = tail
            && self.geometry.offset_in_cluster(begin) + bytes <= cluster_bytes
        {
            self.set_tail(begin + bytes);
            return Ok(HostOffset(begin));
        }
        let next: Reserved = match self.allocate(io, Class::Data, 1).await {
            Ok(next) => next,
            Err(error) => {
                if let Some(begin) = tail {
                    self.add_count(io, begin >> bits, -1).await?;
                    self.set_tail(begin);
                }
                return Err(error);
            }
        };
        let start = next.start << bits;
        let begin = match tail {
            Some(begin) if begin.next_multiple_of(cluster_bytes) == start => begin,
            Some(begin) => {
                // It is not written to after all.
                self.add_count(io, begin >> bits, -1).await?;
                start
            }
            None => start,
        };
        // Where an entry can point to is bounded by what it has bits for.
        if start + cluster_bytes > 1 << (62 - (bits - 8)) {
            return Err(IoError::NoSpace);
        }
        self.set_tail(begin + bytes);
        Ok(HostOffset(begin))
    }

    /// Counts one more for the cluster that the tail is in; false if it has gone or can count no further.
    async fn join_tail(&self, io: Io<'_>, tail: Tail) -> Result<bool, IoError> {
        let cluster = tail.next >> self.geometry.cluster_bits;
        let count = self.count(io, cluster).await?;
        if count == 0 || count == self.geometry.max_refcount() {
            return Ok(false);
        }
        if self.add_count(io, cluster, 1).await? > 1 {
            return Ok(true);
        }
        self.add_count(io, cluster, -1).await?;
        Ok(false)
    }

    fn set_tail(&self, next: u64) {
        let is_full = self.geometry.is_aligned(next);
        *self.tail() = (!is_full).then_some(Tail { next });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_compressed_comes_back_with_garbage_behind_it() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            let plain: Vec<u8> = (0..65536_u32).map(|n| (n / 100) as u8).collect();
            let mut data = compress(compression, &plain).unwrap();
            data.resize(data.len().next_multiple_of(512), 0xa5);
            assert_eq!(decompress(compression, &data, 65536).unwrap(), plain);
            // More than there is, or not what it says, is no cluster.
            assert_eq!(decompress(compression, &data, 65537), None);
            assert_eq!(decompress(compression, &[0xff; 512], 65536), None);
        }
    }

    #[test]
    fn what_does_not_become_smaller_is_not_compressed() {
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 33) as u8
        })
        .take(65536)
        .collect();
        for compression in [Compression::Zlib, Compression::Zstd] {
            assert_eq!(compress(compression, &noise), None);
        }
    }
}
