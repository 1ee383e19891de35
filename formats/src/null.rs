//! Driver `null-co`: a disk that forgets everything at once, to measure what is above it.

use std::sync::Arc;
use std::time::Duration;

use blockcore::driver::{Driver, DriverIo, DriverType, OpenRequest, Opened, WriteFlags, ZeroFlags};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture};
use blockcore::options::{OptionKind, OptionSpec};
use futures_util::FutureExt;

/// Driver `null-co`, as registered.
pub static NULL_CO: DriverType = DriverType {
    name: "null-co",
    about: "a disk that stores nothing, for measurements",
    options: OPTIONS,
    open: |request| async move { Ok(open(&request)) }.boxed_local(),
    ..DriverType::PROTOCOL
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: Some("1G"),
        reopen: true,
        changes_data: true,
        help: "length in bytes",
    },
    OptionSpec {
        name: "latency-ns",
        kind: OptionKind::Size,
        default: Some("0"),
        reopen: true,
        changes_data: false,
        help: "how long each request takes, in nanoseconds",
    },
    OptionSpec {
        name: "read-zeroes",
        kind: OptionKind::Bool,
        default: Some("off"),
        reopen: true,
        changes_data: true,
        help: "whether reads give zeroes; else they leave the memory as it was",
    },
];

struct Null {
    bytes: u64,
    latency: Duration,
    read_zeroes: bool,
}

struct Unit;

impl Driver for Unit {}

fn open(request: &OpenRequest) -> Opened {
    let options = &request.options;
    Opened {
        driver: Box::new(Unit),
        io: Arc::new(Null {
            bytes: options.size(OPTIONS, "size"),
            latency: Duration::from_nanos(options.size(OPTIONS, "latency-ns")),
            read_zeroes: options.bool(OPTIONS, "read-zeroes"),
        }),
    }
}

impl Null {
    fn done<'a>(&self, io: Io<'a>) -> IoFuture<'a> {
        let latency = self.latency;
        async move {
            if !latency.is_zero() {
                io.context().delay(latency).await;
            }
            Ok(())
        }
        .boxed_local()
    }
}

impl DriverIo for Null {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.bytes
    }

    fn read<'a>(&'a self, io: Io<'a>, _offset: u64, into: Segments) -> IoFuture<'a> {
        if self.read_zeroes {
            into.fill(0);
        }
        self.done(io)
    }

    fn write<'a>(&'a self, io: Io<'a>, _: u64, _: Segments, _: WriteFlags) -> IoFuture<'a> {
        self.done(io)
    }

    fn write_zeroes<'a>(&'a self, io: Io<'a>, _: u64, _: u64, _: ZeroFlags) -> IoFuture<'a> {
        self.done(io)
    }

    fn discard<'a>(&'a self, io: Io<'a>, _: u64, _: u64) -> IoFuture<'a> {
        self.done(io)
    }

    fn flush_to_disk<'a>(&'a self, io: Io<'a>) -> IoFuture<'a> {
        self.done(io)
    }
}
