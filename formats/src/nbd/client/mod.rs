//! Driver `nbd`: a disk that another process serves, here or on another host.
//!
//! There is one connection ([`link`]), which all workers share, made when the node is opened
//! ([`connect`]). One that is lost is made anew by whoever has a request for it; requests that were under
//! way are sent again. How long they wait for that is `reconnect-delay`: after it they fail, and so do
//! later ones until a connection is to be had. A drained section ends such waits at once, as an error: it
//! must not last as long as a remote host likes.
//!
//! A server may be hostile: what it sends is bounded by what was asked for, and a reply that is not as it
//! was agreed ends the connection. One that never answers holds requests for as long, as a disk would.

mod connect;
mod driver;
mod io;
mod link;
mod name;

use blockcore::driver::DriverType;
use blockcore::options::{OptionKind, OptionSpec};
use futures_util::FutureExt;

/// Driver `nbd`, as registered.
pub static NBD: DriverType = DriverType {
    name: "nbd",
    about: "a disk that an NBD server offers",
    options: OPTIONS,
    prefixes: &[
        ("nbd", name::parse),
        ("nbd+tcp", name::parse),
        ("nbd+unix", name::parse),
        ("nbds", name::parse),
        ("nbds+tcp", name::parse),
        ("nbds+unix", name::parse),
    ],
    open: |request| driver::open(request).boxed_local(),
    ..DriverType::PROTOCOL
};

const OPTIONS: &[OptionSpec] = &[
    option(
        "server.type",
        OptionKind::Choice(&["inet", "unix"]),
        None,
        "kind of socket",
    ),
    option(
        "server.path",
        OptionKind::Text,
        Some(""),
        "path of the server's socket (unix)",
    ),
    option(
        "server.host",
        OptionKind::Text,
        Some(""),
        "name or number of the server's host (inet)",
    ),
    option(
        "server.port",
        OptionKind::Text,
        Some("10809"),
        "number of its port (inet)",
    ),
    option(
        "export",
        OptionKind::Text,
        Some(""),
        "name of the export; the server's default one is called so",
    ),
    option(
        "tls-creds",
        OptionKind::Text,
        Some(""),
        "keys for encryption: an object tls-creds-x509 of a client",
    ),
    option(
        "tls-hostname",
        OptionKind::Text,
        Some(""),
        "the name that the server proves to have; by default its host's",
    ),
    option(
        "x-dirty-bitmap",
        OptionKind::Text,
        Some(""),
        "context whose status is told in place of base:allocation",
    ),
    option(
        "reconnect-delay",
        OptionKind::Bytes,
        Some("0"),
        "how many seconds requests wait for a connection that was lost",
    ),
    option(
        "open-timeout",
        OptionKind::Bytes,
        Some("0"),
        "for how many seconds connecting is tried again while the node is opened",
    ),
];

const fn option(
    name: &'static str,
    kind: OptionKind,
    default: Option<&'static str>,
    help: &'static str,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        reopen: false,
        changes_data: true,
        help,
    }
}
