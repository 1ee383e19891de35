//! Drivers `copy-before-write` and `snapshot-access`: a disk as it was at one moment, readable while the
//! guest goes on writing ("image fleecing").
//!
//! `copy-before-write` is put above a node in use. Before a guest changes a cluster for the first time, it
//! copies what is there to its child `target`; what is read through it is the guest's disk. What is to be
//! kept, and everything that may wait, is in `snapshot`; `snapshot-access`, through which the old disk
//! is read, in `access`.
//!
//! Flushes go to the guest's disk only: the target is worth nothing after a crash.

mod access;
mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;

pub use self::access::SNAPSHOT_ACCESS;
pub(crate) use self::snapshot::{OnError, Snapshot};
use crate::Error;
use crate::driver::{
    ChildPermissions, ChildQuery, ChildSpec, Driver, DriverIo, DriverType, Mapping, OpenRequest,
    Opened, Preallocation, Role, SnapshotIo, TruncateFlags, WriteFlags, ZeroFlags,
};
use crate::graph::permission::{self, Permissions};
use crate::io::buffer::Segments;
use crate::io::{Io, IoFuture};
use crate::options::{OptionKind, OptionSpec};

/// Driver `copy-before-write`, as registered.
pub static COPY_BEFORE_WRITE: DriverType = DriverType {
    name: "copy-before-write",
    about: "keeps what a disk was, by copying it away before it is overwritten",
    options: OPTIONS,
    children: &[
        ChildSpec {
            name: "file",
            role: Role::FILTERED.union(Role::PRIMARY),
            optional: false,
        },
        ChildSpec {
            name: "target",
            role: Role::DATA,
            optional: false,
        },
    ],
    open: |request| async move { open(&request) }.boxed_local(),
    ..DriverType::FILTER
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "bitmap.node",
        kind: OptionKind::Text,
        default: Some(""),
        reopen: false,
        changes_data: false,
        help: "node of the dirty bitmap that says what is to be kept (none: everything)",
    },
    OptionSpec {
        name: "bitmap.name",
        kind: OptionKind::Text,
        default: Some(""),
        reopen: false,
        changes_data: false,
        help: "name of that bitmap; what is marked when the node is opened counts",
    },
    OptionSpec {
        name: "on-cbw-error",
        kind: OptionKind::Choice(&["break-guest-write", "break-snapshot"]),
        default: Some("break-guest-write"),
        reopen: false,
        changes_data: false,
        help: "what becomes of it when something cannot be copied",
    },
    OptionSpec {
        name: "cbw-timeout",
        kind: OptionKind::Bytes,
        default: Some("0"),
        reopen: false,
        changes_data: false,
        help: "seconds that a guest's request may wait for copying before that has failed (0: no limit)",
    },
    OptionSpec {
        name: "min-cluster-size",
        kind: OptionKind::Bytes,
        default: Some("0"),
        reopen: false,
        changes_data: false,
        help: "smallest unit of copying in bytes, a power of two (0: what suits the target)",
    },
];

/// Smallest unit of copying: one bit of memory for as much of the disk.
const MIN_CLUSTER_BYTES: u64 = 64 << 10;
/// Largest: a guest's first write to a place waits for as much.
const MAX_CLUSTER_BYTES: u64 = 64 << 20;

struct CopyBeforeWrite;

struct CopyBeforeWriteIo {
    snapshot: Arc<Snapshot>,
}

fn open(request: &OpenRequest) -> Result<Opened, Error> {
    let (name, options) = (&request.node_name, &request.options);
    let [Some(source), Some(target)] = &request.children[..] else {
        unreachable!("both children are needed");
    };
    let bytes = source.bytes();
    if target.bytes() != bytes {
        return Err(Error::invalid(format!(
            "node '{}' has {} bytes and cannot keep what node '{}' was, which has {bytes}",
            target.name,
            target.bytes(),
            source.name,
        )));
    }
    let least = options.size(OPTIONS, "min-cluster-size");
    if least > 0 && (!least.is_power_of_two() || least > MAX_CLUSTER_BYTES) {
        return Err(Error::invalid(format!(
            "'min-cluster-size' of node '{name}' is {least}; it is a power of two up to \
             {MAX_CLUSTER_BYTES}"
        )));
    }
    let cluster = cluster_bytes(target.limits.cluster_bytes, least);
    let on_error = match options.text(OPTIONS, "on-cbw-error") {
        "break-snapshot" => OnError::BreakSnapshot,
        _ => OnError::BreakGuestWrite,
    };
    let timeout = match options.size(OPTIONS, "cbw-timeout") {
        0 => None,
        seconds => Some(Duration::from_secs(seconds)),
    };
    let (node, bitmap) = (
        options.text(OPTIONS, "bitmap.node"),
        options.text(OPTIONS, "bitmap.name"),
    );
    if node.is_empty() != bitmap.is_empty() {
        return Err(Error::invalid(format!(
            "node '{name}' needs both 'bitmap.node' and 'bitmap.name', or neither"
        )));
    }
    let only = match bitmap {
        "" => None,
        bitmap => Some((request.find_bitmap)(node, bitmap)?),
    };
    if let Some(only) = &only
        && only.length() != bytes
    {
        return Err(Error::invalid(format!(
            "bitmap '{bitmap}' of node '{node}' is about {} bytes, and node '{}' has {bytes}",
            only.length(),
            source.name
        )));
    }
    let snapshot = Snapshot::new(bytes, cluster, only.as_deref(), on_error, timeout);
    let snapshot = snapshot.map_err(|_| {
        Error::unsupported(format!(
            "node '{}' is too long to keep in clusters of {cluster} bytes: set 'min-cluster-size'",
            source.name
        ))
    })?;
    Ok(opened(&Arc::new(snapshot)))
}

/// The halves of a node that keeps this snapshot.
pub(crate) fn opened(snapshot: &Arc<Snapshot>) -> Opened {
    Opened {
        driver: Box::new(CopyBeforeWrite),
        io: Arc::new(CopyBeforeWriteIo {
            snapshot: Arc::clone(snapshot),
        }),
    }
}

/// The unit in which what a disk was is kept on a target whose clusters have so many bytes.
pub(crate) fn cluster_bytes(target_cluster_bytes: u32, least_bytes: u64) -> u64 {
    let whole = u64::from(target_cluster_bytes).next_power_of_two();
    MIN_CLUSTER_BYTES.max(least_bytes).max(whole)
}

impl Driver for CopyBeforeWrite {
    /// The target is written to, and by nobody else. The guest's disk is read for copying; once somebody
    /// uses this node, nobody may write past it or change the length.
    fn child_permissions(&self, query: &ChildQuery) -> ChildPermissions {
        let alone = Permissions::WRITE | Permissions::RESIZE;
        if query.role.contains(Role::FILTERED) {
            let mut answer = permission::default_rule(query);
            if !query.needs.is_empty() {
                answer.needs |= Permissions::CONSISTENT_READ;
                answer.shares -= alone;
            }
            return answer;
        }
        let needs = match query.read_only {
            true => Permissions::empty(),
            false => Permissions::WRITE,
        };
        ChildPermissions {
            needs,
            shares: Permissions::all() - alone,
        }
    }
}

impl DriverIo for CopyBeforeWriteIo {
    fn map(&self, write: bool, offset: u64, _bytes: u64) -> Mapping {
        match write {
            true => Mapping::Ask,
            false => Mapping::Child { index: 0, offset },
        }
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::STABLE | WriteFlags::UNCHANGED
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            if !flags.contains(WriteFlags::UNCHANGED) {
                self.before(io, offset, from.bytes()).await?;
            }
            io.child(0).write(offset, from, flags).await
        }
        .boxed_local()
    }

    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        async move {
            self.before(io, offset, from.bytes()).await?;
            io.child(0).write_compressed(offset, from).await
        }
        .boxed_local()
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        async move {
            if !flags.contains(ZeroFlags::UNCHANGED) {
                self.before(io, offset, bytes).await?;
            }
            io.child(0).write_zeroes(offset, bytes, flags).await
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            self.before(io, offset, bytes).await?;
            io.child(0).discard(offset, bytes).await
        }
        .boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        io: Io<'a>,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        async move {
            let cut = io.bytes().saturating_sub(bytes);
            self.before(io, bytes, cut).await?;
            let child = io.child(0);
            child.truncate(bytes, exact, preallocation, flags).await
        }
        .boxed_local()
    }

    fn flush_all<'a>(&'a self, io: Io<'a>) -> Option<IoFuture<'a>> {
        Some(io.child(0).flush().boxed_local())
    }

    fn allocated_bytes<'a>(&'a self, io: Io<'a>) -> IoFuture<'a, Option<u64>> {
        io.child(0).allocated_bytes().boxed_local()
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        vec![("copied-bytes", self.snapshot.copied_bytes())]
    }

    fn snapshot(&self) -> Option<&dyn SnapshotIo> {
        Some(&*self.snapshot)
    }
}

impl CopyBeforeWriteIo {
    /// A guest is going to change a range.
    fn before<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        self.snapshot.before_change(io, offset, bytes).boxed_local()
    }
}

#[cfg(test)]
mod tests;
