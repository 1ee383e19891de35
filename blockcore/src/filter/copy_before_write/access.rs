//! Driver `snapshot-access`: the disk as the copy-before-write node below keeps it.
//!
//! It is read only; a discard says that a range has been read and need not be kept any more, and takes
//! `discard=unmap` on this node, as any other.

use std::sync::Arc;

use futures_util::FutureExt;

use crate::driver::{
    ChildPermissions, ChildQuery, ChildSpec, Driver, DriverIo, DriverType, OpenRequest, Opened,
    Role, SnapshotIo, Status,
};
use crate::graph::permission::Permissions;
use crate::io::buffer::Segments;
use crate::io::{Io, IoFuture};
use crate::{Error, IoError};

/// Driver `snapshot-access`, as registered.
pub static SNAPSHOT_ACCESS: DriverType = DriverType {
    name: "snapshot-access",
    about: "a disk as a copy-before-write node keeps it",
    children: &[ChildSpec {
        name: "file",
        role: Role::DATA.union(Role::PRIMARY),
        optional: false,
    }],
    open: |request| async move { open(&request) }.boxed_local(),
    ..DriverType::FORMAT
};

struct SnapshotAccess;

struct SnapshotAccessIo {
    bytes: u64,
}

fn open(request: &OpenRequest) -> Result<Opened, Error> {
    let child = request.children[0].as_ref().expect("it is needed");
    let plan = child.root.plan();
    let Some(snapshot) = plan.snapshot() else {
        return Err(Error::invalid(format!(
            "node '{}' cannot be the child of snapshot-access node '{}': it keeps no snapshot, as a \
             copy-before-write node does",
            child.name, request.node_name
        )));
    };
    Ok(Opened {
        driver: Box::new(SnapshotAccess),
        io: Arc::new(SnapshotAccessIo {
            bytes: snapshot.bytes(),
        }),
    })
}

impl Driver for SnapshotAccess {
    /// Whatever guests do to the disk now does not concern the snapshot, as long as they do it through
    /// the copy-before-write node: that needs to know that somebody reads.
    fn child_permissions(&self, _query: &ChildQuery) -> ChildPermissions {
        ChildPermissions {
            needs: Permissions::CONSISTENT_READ,
            shares: Permissions::all(),
        }
    }
}

impl SnapshotAccessIo {
    fn below<'a>(io: Io<'a>) -> Result<(&'a dyn SnapshotIo, Io<'a>), IoError> {
        let child = io.child(0);
        let snapshot = child.snapshot().ok_or(IoError::Unsupported)?;
        Ok((snapshot, child))
    }
}

impl DriverIo for SnapshotAccessIo {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.bytes
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            let (snapshot, below) = Self::below(io)?;
            snapshot.read(below, offset, into).await
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            let (snapshot, below) = Self::below(io)?;
            snapshot.discard(below, offset, bytes).await
        }
        .boxed_local()
    }

    /// There is nothing to write back: what was copied is of use only while this process lives.
    fn flush_all<'a>(&'a self, _io: Io<'a>) -> Option<IoFuture<'a>> {
        Some(async { Ok(()) }.boxed_local())
    }

    fn block_status<'a>(
        &'a self,
        io: Io<'a>,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        async move {
            let (snapshot, below) = Self::below(io)?;
            snapshot.block_status(below, exact, offset, bytes).await
        }
        .boxed_local()
    }

    fn allocated_bytes<'a>(&'a self, _io: Io<'a>) -> IoFuture<'a, Option<u64>> {
        async { Ok(None) }.boxed_local()
    }
}
