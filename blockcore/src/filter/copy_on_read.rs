//! Driver `copy-on-read`: what a chain of images below holds is written into its topmost one when it is
//! read.
//!
//! With option `bottom` only what is held by that image or one above it is copied; what lies further
//! down stays there. The copying itself, and what keeps it from undoing a write, is the pipeline's
//! ([`Io::read_copying`]).
//!
//! Whoever only wants the copy, as a job does that streams, calls [`Io::prefetch`].

use std::cell::Cell;
use std::iter::successors;
use std::sync::Arc;

use futures_util::FutureExt;

use crate::driver::{
    ChildPermissions, ChildQuery, Driver, DriverIo, DriverKind, DriverType, Mapping, OpenRequest,
    Opened, StatusFlags, WriteFlags,
};
use crate::graph::NodeId;
use crate::graph::permission::{self, Permissions};
use crate::io::buffer::Segments;
use crate::io::{Io, IoFuture, RequestKind};
use crate::options::{OptionKind, OptionSpec};
use crate::{Error, ErrorKind, IoError};

/// Driver `copy-on-read`, as registered.
pub static COPY_ON_READ: DriverType = DriverType {
    name: "copy-on-read",
    about: "writes into an image what is read from the images below it",
    options: OPTIONS,
    open: |request| open(request).boxed_local(),
    ..DriverType::FILTER
};

const OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "bottom",
    kind: OptionKind::Text,
    default: Some(""),
    reopen: false,
    changes_data: false,
    help: "name of the lowest image that is copied from; the whole chain by default",
}];

struct CopyOnReadDriver {
    bottom: Option<NodeId>,
}

struct CopyOnReadIo {
    bottom: Option<NodeId>,
}

async fn open(request: OpenRequest) -> Result<Opened, Error> {
    let name = request.options.text(OPTIONS, "bottom");
    let bottom = match name {
        "" => None,
        name => Some(find_bottom(&request, name).await?),
    };
    Ok(Opened {
        driver: Box::new(CopyOnReadDriver { bottom }),
        io: Arc::new(CopyOnReadIo { bottom }),
    })
}

/// The halves of a node that copies from no deeper than `bottom`.
pub(crate) fn opened(bottom: NodeId) -> Opened {
    let bottom = Some(bottom);
    Opened {
        driver: Box::new(CopyOnReadDriver { bottom }),
        io: Arc::new(CopyOnReadIo { bottom }),
    }
}

async fn find_bottom(request: &OpenRequest, name: &str) -> Result<NodeId, Error> {
    let child = request.children[0].as_ref().expect("not optional");
    let entered = child.root.enter(RequestKind::Other, 0, 0).await;
    let Some(bottom) = chain(entered.io()).find(|layer| layer.name() == name) else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "option 'bottom' of node '{}' names '{name}', which is not in the chain below it",
                request.node_name
            ),
        ));
    };
    if bottom.node().kind == DriverKind::Filter {
        return Err(Error::invalid(format!(
            "option 'bottom' of node '{}' names '{name}', which is a filter and holds nothing",
            request.node_name
        )));
    }
    Ok(bottom.state().id())
}

/// A node and those below it along the chain.
fn chain(top: Io<'_>) -> impl Iterator<Item = Io<'_>> {
    successors(Some(top), |layer| layer.next_in_chain())
}

impl Driver for CopyOnReadDriver {
    fn keeps_chain_to(&self) -> Option<NodeId> {
        self.bottom
    }

    fn child_permissions(&self, query: &ChildQuery) -> ChildPermissions {
        let mut rule = permission::default_rule(query);
        if !query.inactive {
            rule.needs |= Permissions::WRITE_UNCHANGED;
        }
        rule.shares |= Permissions::WRITE_UNCHANGED;
        rule
    }
}

impl CopyOnReadIo {
    /// Reads a range; without `into` only copies what is to be copied of it.
    async fn read_range(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        into: Option<Segments>,
    ) -> Result<(), IoError> {
        let child = io.child(0);
        let Some(bottom) = self.bottom else {
            return child.read_copying(offset, bytes, into).await;
        };
        let mut done = 0;
        while done < bytes {
            let next = offset + done;
            let (copied, piece) = is_above(child, bottom, next, bytes - done).await?;
            let part = into.as_ref().map(|into| into.slice(done, piece));
            match part {
                part if copied => child.read_copying(next, piece, part).await?,
                Some(part) => child.read(next, part).await?,
                None => {}
            }
            done += piece;
        }
        Ok(())
    }
}

/// Whether what is read at `offset` comes from below `top` and from no deeper than `bottom`, and for how
/// many of `bytes` that holds. A bottom that has left the chain has taken what was to be copied with it.
async fn is_above(
    top: Io<'_>,
    bottom: NodeId,
    offset: u64,
    bytes: u64,
) -> Result<(bool, u64), IoError> {
    let is_bottom = |layer: Io<'_>| layer.state().id() == bottom;
    if !chain(top).any(is_bottom) {
        return Ok((false, bytes));
    }
    let (held, alike) = top.is_allocated(offset, bytes).await?;
    if held || alike == 0 {
        return Ok((false, if alike == 0 { bytes } else { alike }));
    }
    // The base is the first node after the bottom.
    let passed = Cell::new(is_bottom(top));
    let is_base = |layer: Io<'_>| passed.replace(passed.get() || is_bottom(layer));
    let (status, _) = top.status_above(is_base, false, offset, alike).await?;
    Ok((
        status.flags.contains(StatusFlags::ALLOCATED),
        status.bytes.max(1),
    ))
}

impl DriverIo for CopyOnReadIo {
    fn map(&self, write: bool, offset: u64, _bytes: u64) -> Mapping {
        match write {
            true => Mapping::Child { index: 0, offset },
            false => Mapping::Ask,
        }
    }

    fn copies_child(&self) -> Option<usize> {
        Some(0)
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::STABLE | WriteFlags::UNCHANGED
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        let bytes = into.bytes();
        self.read_range(io, offset, bytes, Some(into)).boxed_local()
    }

    fn prefetch<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        self.read_range(io, offset, bytes, None).boxed_local()
    }
}
