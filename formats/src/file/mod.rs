//! Drivers `file` and `host_device`: a regular file or a block device of the host.
//!
//! The leaf of almost every chain. How a file is open (for writing or not, past the page cache or not)
//! follows from the node's modes and from who uses it; another way means another open file description
//! and another I/O half (`driver`). Image locks (`lock`) go over to the new description before the
//! old one is given up.
//!
//! A failed flush is final for a description whose data goes through the page cache: Linux may have
//! marked pages clean that never reached the disk, so from then on every flush fails until the node
//! is reopened, which is an operator's verdict.

mod create;
mod driver;
mod io;
mod length;
mod lock;
mod open;
mod status;

use blockcore::driver::DriverType;
use blockcore::filename::strip_prefix;
use blockcore::options::{OptionKind, OptionSpec};
use futures_util::FutureExt;

pub use self::create::CREATE_OPTIONS;
pub(crate) use self::length::prepare_space;
use self::open::Kind;

/// Driver `file`, as registered.
pub static FILE: DriverType = DriverType {
    name: "file",
    about: "a regular file of the host",
    options: OPTIONS,
    prefixes: &[("file", |name| strip_prefix(name, "file"))],
    open: |request| driver::open(request, Kind::File).boxed_local(),
    create: Some(|context, options| create::create(context, options).boxed_local()),
    create_options: CREATE_OPTIONS,
    ..DriverType::PROTOCOL
};

/// Driver `host_device`, as registered.
pub static HOST_DEVICE: DriverType = DriverType {
    name: "host_device",
    about: "a block device of the host",
    options: OPTIONS,
    prefixes: &[("host_device", |name| strip_prefix(name, "host_device"))],
    open: |request| driver::open(request, Kind::Device).boxed_local(),
    ..DriverType::PROTOCOL
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "filename",
        kind: OptionKind::Text,
        default: None,
        reopen: false,
        changes_data: true,
        help: "path of the file or device",
    },
    OptionSpec {
        name: "locking",
        kind: OptionKind::Choice(&["auto", "on", "off"]),
        default: Some("auto"),
        reopen: false,
        changes_data: false,
        help: "whether to keep other processes out (auto: where the file system can)",
    },
    OptionSpec {
        name: "aio",
        kind: OptionKind::Choice(&["threads", "native", "io_uring"]),
        default: Some("threads"),
        reopen: false,
        changes_data: false,
        help: "taken as QEMU has it, native with cache.direct only; workers do all I/O as --engine says",
    },
    OptionSpec {
        name: "aio-max-batch",
        kind: OptionKind::Int,
        default: Some("0"),
        reopen: false,
        changes_data: false,
        help: "taken as QEMU has it; workers choose for themselves how much they give to the host at once",
    },
    OptionSpec {
        name: "drop-cache",
        kind: OptionKind::Bool,
        default: Some("on"),
        reopen: true,
        changes_data: false,
        help: "whether the host's page cache is dropped when the node is made active: another host may have \
               changed the file",
    },
];
