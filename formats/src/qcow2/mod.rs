//! Driver `qcow2`: a disk in clusters of an image file, with what that allows: it grows as it is
//! written, keeps only what differs from its backing image, has snapshots, and can be compressed.
//!
//! | what | where |
//! |---|---|
//! | what lies where in an image (pure) | `layout/` |
//! | opening, reopening, closing | `open`, `driver` |
//! | what all workers share | `image`, `gate` |
//! | requests | `io`, `read`, `write`, `zero`, `compress`, `resize` |
//! | where bytes of the disk live; slices of L2 tables in memory | `mapping`, `cache` |
//! | host clusters: finding, counting, letting go of | `alloc`, `refcount`, `limbo` |
//! | metadata that nothing may be written over | `overlap` |
//! | writing metadata back | `committer` |
//! | what completed survives a kill | `segment`, `replay`, `adopt`, `cookie` |
//! | making images | `create/` |
//! | making them others: version, width of counts, features | `amend/`, `head` |
//! | checking and repairing them | `check/` |
//! | dirty bitmaps that are kept in them | `bitmaps/` |
//! | snapshots inside of them, and a machine's state | `snapshot/`, `vm_state` |

mod adopt;
mod alloc;
mod amend;
mod bitmaps;
mod cache;
pub mod check;
mod committer;
mod compress;
mod cookie;
pub mod create;
mod driver;
mod gate;
mod head;
mod image;
mod io;
mod layout;
mod limbo;
mod mapping;
mod open;
mod overlap;
mod read;
mod refcount;
mod replay;
mod resize;
mod segment;
mod snapshot;
mod vm_state;
mod write;
mod zero;

use blockcore::Error;
use blockcore::driver::{ChildSpec, DriverType, NewChild, Role};
use blockcore::options::{OptionKind, OptionSpec, Options};
use futures_util::FutureExt;

/// Driver `qcow2`, as registered.
pub static QCOW2: DriverType = DriverType {
    name: "qcow2",
    about: "an image in QEMU's format, which grows as it is written",
    options: OPTIONS,
    children: &[
        ChildSpec {
            name: "file",
            role: Role::IMAGE,
            optional: false,
        },
        ChildSpec {
            name: "data-file",
            role: Role::DATA,
            optional: true,
        },
        ChildSpec {
            name: "backing",
            role: Role::COW,
            optional: true,
        },
    ],
    backing: true,
    probe: Some(|head| match head {
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2 | 3, ..] => 100,
        _ => 0,
    }),
    open: |request| open::open(request).boxed_local(),
    create: Some(|context, options| create::create(context, options).boxed_local()),
    create_on: Some(|children, options| make(children, options).boxed_local()),
    create_options: create::CREATE_OPTIONS,
    amend_options: amend::AMEND_OPTIONS,
    measure: Some(|options, source| create::measure(options, source).boxed_local()),
    ..DriverType::FORMAT
};

/// Makes an image on its children.
async fn make(children: Vec<Option<NewChild>>, options: Options) -> Result<(), Error> {
    let child = |index: usize| children.get(index).and_then(Option::as_ref);
    let file = child(image::FILE).ok_or_else(|| Error::invalid("an image needs a file"))?;
    let data_file = child(image::DATA_FILE).map(|data| (&data.root, data.name.as_str()));
    create::create_on(&file.root, data_file, &options).await
}

const fn size(name: &'static str, default: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        kind: OptionKind::Bytes,
        default: Some(default),
        reopen: true,
        changes_data: false,
        help,
    }
}

const fn switch(name: &'static str, default: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        kind: OptionKind::Bool,
        default: Some(default),
        reopen: true,
        changes_data: false,
        help,
    }
}

/// How much is checked before metadata is written.
const OVERLAP_CHECKS: OptionKind = OptionKind::Choice(&["none", "constant", "cached", "all"]);

const fn overlap_template(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec {
        kind: OVERLAP_CHECKS,
        ..switch(name, "", help)
    }
}

const fn overlap_check(name: &'static str) -> OptionSpec {
    switch(
        name,
        "",
        "taken as QEMU has it; such clusters are never written over, whatever it says",
    )
}

const fn text(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        kind: OptionKind::Text,
        default: Some(""),
        reopen: true,
        changes_data: true,
        help,
    }
}

pub(crate) const OPTIONS: &[OptionSpec] = &[
    text(
        "snapshot.id",
        "the identifier of a snapshot inside of the image: the disk as it was then, for reading only",
    ),
    text(
        "snapshot.name",
        "the name of a snapshot inside of the image; with 'snapshot.id' both must be its",
    ),
    size(
        "cache-size",
        "",
        "memory for L2 tables and refcount blocks in bytes; by default as the two options below say",
    ),
    size(
        "l2-cache-size",
        "",
        "memory for L2 tables in bytes; by default what the disk needs, at most 32M",
    ),
    size(
        "l2-cache-entry-size",
        "",
        "part of an L2 table that is loaded at once, in bytes, a power of two from 512 to the cluster size",
    ),
    size(
        "refcount-cache-size",
        "",
        "memory for refcount blocks in bytes; by default that of 4 clusters",
    ),
    size(
        "cache-clean-interval",
        "600",
        "taken as QEMU has it; what is kept stays within the sizes above, and is not dropped earlier",
    ),
    switch(
        "lazy-refcounts",
        "",
        "refcounts may be written later; they are written with the entries that need them all the same",
    ),
    overlap_template(
        "overlap-check",
        "what is checked before metadata is written: none, constant, cached or all; all is, whatever it says",
    ),
    overlap_template(
        "overlap-check.template",
        "the same, to begin with, for the options below",
    ),
    overlap_check("overlap-check.main-header"),
    overlap_check("overlap-check.active-l1"),
    overlap_check("overlap-check.active-l2"),
    overlap_check("overlap-check.refcount-table"),
    overlap_check("overlap-check.refcount-block"),
    overlap_check("overlap-check.snapshot-table"),
    overlap_check("overlap-check.inactive-l1"),
    overlap_check("overlap-check.inactive-l2"),
    overlap_check("overlap-check.bitmap-directory"),
    switch(
        "pass-discard-request",
        "",
        "whether discards of the guest are passed on to the image's file; by default as 'discard' says",
    ),
    switch(
        "pass-discard-snapshot",
        "on",
        "whether what a deleted snapshot leaves is discarded in the image's file",
    ),
    switch(
        "pass-discard-other",
        "off",
        "whether what is freed otherwise is discarded in the image's file",
    ),
    switch(
        "discard-no-unref",
        "off",
        "whether discarded clusters keep their place in the image's file",
    ),
];
