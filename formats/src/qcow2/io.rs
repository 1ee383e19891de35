//! [`Qcow2Io`]: the I/O half.

use std::sync::Arc;

use blockcore::IoError;
use blockcore::driver::{
    DriverInfo, DriverIo, Mapping, Preallocation, Status, TruncateFlags, WriteFlags, ZeroFlags,
};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture};
use futures_util::FutureExt;

use super::image::Image;
use super::layout::header::{Compression, Features};

/// See the module's header.
pub(super) struct Qcow2Io(pub(super) Arc<Image>);

impl DriverIo for Qcow2Io {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.0.bytes()
    }

    fn moves_data(&self) -> bool {
        true
    }

    fn map(&self, write: bool, offset: u64, bytes: u64) -> Mapping {
        self.0.map_fast(write, offset, bytes)
    }

    fn child_unit(&self, unit: u32) -> u32 {
        // Metadata comes in words, and clusters are filled around what is written.
        unit.min(8)
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        self.0.read(io, offset, into).boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        _flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            self.0.use_bitmaps(io).await?;
            self.0.write(io, offset, from).await
        }
        .boxed_local()
    }

    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        async move {
            self.0.use_bitmaps(io).await?;
            self.0.write_compressed(io, offset, from).await
        }
        .boxed_local()
    }

    fn can_compress(&self) -> bool {
        !self.0.geometry.data_file
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        async move {
            self.0.use_bitmaps(io).await?;
            self.0.write_zeroes(io, offset, bytes, flags).await
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            self.0.use_bitmaps(io).await?;
            self.0.discard(io, offset, bytes).await
        }
        .boxed_local()
    }

    fn flush_all<'a>(&'a self, io: Io<'a>) -> Option<IoFuture<'a>> {
        Some(self.0.commit(io).boxed_local())
    }

    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        _exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        self.0.block_status(io, offset, bytes).boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        io: Io<'a>,
        bytes: u64,
        _exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        async move {
            if !bytes.is_multiple_of(512) {
                return Err(IoError::OutOfRange);
            }
            self.0.resize_bitmaps(io).await?;
            self.0.resize(io, bytes, preallocation, flags).await
        }
        .boxed_local()
    }

    fn info(&self) -> DriverInfo {
        let header = self.0.header();
        let set = |features: u64, bit: u64| (features & bit != 0).to_string();
        let features = header.features;
        let mut specific = vec![(
            "compat",
            match header.version {
                2 => "0.10".to_owned(),
                _ => "1.1".to_owned(),
            },
        )];
        let compression = match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        specific.push(("compression-type", compression.to_owned()));
        if header.version >= 3 {
            let lazy = set(features.compatible, Features::LAZY_REFCOUNTS);
            specific.push(("lazy-refcounts", lazy));
        }
        if let Some(bitmaps) = self.0.bitmaps.describe() {
            specific.push(("bitmaps", bitmaps));
        }
        specific.push(("refcount-bits", (1 << header.refcount_order).to_string()));
        if header.version >= 3 {
            let corrupt = set(features.incompatible, Features::CORRUPT);
            specific.push(("corrupt", corrupt));
            let extended = set(features.incompatible, Features::EXTENDED_L2);
            specific.push(("extended-l2", extended));
        }
        if let Some(name) = &header.extensions.data_file {
            specific.push(("data-file", name.clone()));
            let raw = set(features.autoclear, Features::RAW_DATA_FILE);
            specific.push(("data-file-raw", raw));
        }
        DriverInfo {
            cluster_bytes: self.0.geometry.cluster_bytes(),
            is_dirty: features.incompatible & Features::DIRTY != 0,
            needs_compressed_writes: false,
            specific,
        }
    }
}
