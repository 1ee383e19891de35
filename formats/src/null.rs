//! Drivers `null-co` and `null-aio`: a disk that forgets everything at once, to measure what is above it.
//!
//! QEMU has two, which do the same in two ways. Here they differ in their names.

use std::sync::Arc;
use std::time::Duration;

use blockcore::Error;
use blockcore::driver::{
    Driver, DriverIo, DriverType, OpenRequest, Opened, Place, ReopenRequest, Reopened, Status,
    StatusFlags, WriteFlags, ZeroFlags,
};
use blockcore::io::buffer::Segments;
use blockcore::io::{Io, IoFuture};
use blockcore::options::{OptionKind, OptionSpec, Options};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

/// Driver `null-co`, as registered.
pub static NULL_CO: DriverType = DriverType {
    name: "null-co",
    about: "a disk that stores nothing, for measurements",
    options: OPTIONS,
    prefixes: &[("null-co", |name| parse_name(name, "null-co://"))],
    open: |request| async move { Ok(open(&request, "null-co://")) }.boxed_local(),
    ..DriverType::PROTOCOL
};

/// Driver `null-aio`, as registered.
pub static NULL_AIO: DriverType = DriverType {
    name: "null-aio",
    about: "null-co by another name",
    prefixes: &[("null-aio", |name| parse_name(name, "null-aio://"))],
    open: |request| async move { Ok(open(&request, "null-aio://")) }.boxed_local(),
    ..NULL_CO
};

/// There is one name, which says nothing but the driver.
fn parse_name(name: &str, only: &str) -> Result<Options, Error> {
    if name != only {
        return Err(Error::invalid(format!(
            "the only name of such a disk is '{only}': what it is like is for its options to say"
        )));
    }
    Ok(Options::default())
}

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "size",
        kind: OptionKind::Bytes,
        default: Some("1G"),
        reopen: true,
        changes_data: true,
        help: "length in bytes",
    },
    OptionSpec {
        name: "latency-ns",
        kind: OptionKind::Bytes,
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

/// The global-state half.
struct NullDriver {
    name: &'static str,
}

impl Driver for NullDriver {
    fn exact_name(&self) -> Option<String> {
        Some(self.name.to_owned())
    }

    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            if request.changed().is_empty() {
                return Ok(Reopened::default());
            }
            Ok(Reopened {
                io: Some(Arc::new(Null::new(&request.options))),
            })
        }
        .boxed_local()
    }
}

fn open(request: &OpenRequest, name: &'static str) -> Opened {
    Opened {
        driver: Box::new(NullDriver { name }),
        io: Arc::new(Null::new(&request.options)),
    }
}

impl Null {
    fn new(options: &Options) -> Self {
        Self {
            bytes: options.size(OPTIONS, "size"),
            latency: Duration::from_nanos(options.size(OPTIONS, "latency-ns")),
            read_zeroes: options.bool(OPTIONS, "read-zeroes"),
        }
    }

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

    /// Zeroes if that is what is read, and nothing that anybody has put there if it is not.
    fn block_status<'a>(
        &'a self,
        _io: Io<'a>,
        _exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        let mut flags = StatusFlags::PLACE;
        flags.set(StatusFlags::ZERO, self.read_zeroes);
        let status = Status {
            flags,
            bytes,
            place: Place {
                child: None,
                offset,
            },
        };
        async move { Ok(status) }.boxed_local()
    }

    fn allocated_bytes<'a>(&'a self, _io: Io<'a>) -> IoFuture<'a, Option<u64>> {
        async { Ok(Some(0)) }.boxed_local()
    }
}
