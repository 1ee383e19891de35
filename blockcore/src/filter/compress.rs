//! Driver `compress`: has what is written through it compressed by the format below.
//!
//! A format compresses whole clusters, so requests come in clusters here: the pipeline reads the rest of
//! a cluster that is written in part.

use std::sync::Arc;

use futures_util::FutureExt;

use crate::Error;
use crate::driver::{
    Driver, DriverIo, DriverType, Limits, Mapping, OpenRequest, Opened, WriteFlags,
};
use crate::io::buffer::Segments;
use crate::io::{Io, IoFuture, RequestKind, align};

/// Driver `compress`, as registered.
pub static COMPRESS: DriverType = DriverType {
    name: "compress",
    about: "has what is written compressed by the format below",
    open: |request| open(request).boxed_local(),
    ..DriverType::FILTER
};

struct CompressDriver;

struct CompressIo;

async fn open(request: OpenRequest) -> Result<Opened, Error> {
    let child = request.children[0].as_ref().expect("not optional");
    let entered = child.root.enter(RequestKind::Other, 0, 0).await;
    if !entered.io().can_compress() {
        return Err(Error::unsupported(format!(
            "node '{}' cannot compress what is written: the format of node '{}' has no compression",
            request.node_name, child.name
        )));
    }
    Ok(Opened {
        driver: Box::new(CompressDriver),
        io: Arc::new(CompressIo),
    })
}

impl Driver for CompressDriver {
    fn limits(&self, children: &[Option<Limits>]) -> Limits {
        let child = children[0].map_or_else(Limits::default, Limits::above);
        Limits {
            request_alignment: child.cluster_bytes.max(1),
            ..child
        }
    }
}

impl DriverIo for CompressIo {
    fn map(&self, write: bool, offset: u64, _bytes: u64) -> Mapping {
        match write {
            true => Mapping::Ask,
            false => Mapping::Child { index: 0, offset },
        }
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            // The last cluster goes on past the end of an image that ends inside of it.
            let bytes = into.bytes();
            let inside = io.bytes().saturating_sub(offset).min(bytes);
            into.slice(inside, bytes - inside).fill(0);
            match inside {
                0 => Ok(()),
                inside => io.child(0).read(offset, into.slice(0, inside)).await,
            }
        }
        .boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        _flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            let inside = io.bytes().saturating_sub(offset).min(from.bytes());
            let cluster = match u64::from(io.limits().cluster_bytes) {
                0 => inside.max(1),
                cluster => cluster,
            };
            for (piece, bytes) in align::pieces(offset, inside, cluster) {
                let part = from.slice(piece - offset, bytes);
                io.child(0).write_compressed(piece, part).await?;
            }
            Ok(())
        }
        .boxed_local()
    }
}
