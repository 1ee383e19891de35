//! Driver `throttle`: holds requests to the limits of a group that other nodes may share.
//!
//! Reads wait in one direction, whatever changes data in the other; flushes do not wait. Requests are
//! delayed and never fail. A drained section lets those that wait go at once, and the group makes up for
//! them later.
//!
//! While its group limits nothing, a node costs one look at an atomic for each request.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use crate::Error;
use crate::driver::{
    Driver, DriverIo, DriverType, Mapping, OpenRequest, Opened, ReopenRequest, Reopened,
    WriteFlags, ZeroFlags,
};
use crate::io::buffer::Segments;
use crate::io::{Io, IoFuture};
use crate::options::{OptionKind, OptionSpec};
use crate::throttle::{Direction, GroupUse, Member};

/// Driver `throttle`, as registered.
pub static THROTTLE: DriverType = DriverType {
    name: "throttle",
    about: "holds requests to the rates of a throttle group",
    options: OPTIONS,
    open: |request| async move { open(&request) }.boxed_local(),
    ..DriverType::FILTER
};

const OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "throttle-group",
    kind: OptionKind::Text,
    default: None,
    reopen: true,
    changes_data: false,
    help: "name of the group whose limits the node shares",
}];

/// The global-state half.
struct ThrottleDriver {
    group: GroupUse,
    /// What a reopen that is under way has found.
    next: Option<GroupUse>,
}

/// The I/O half.
struct ThrottleIo {
    member: Member,
}

fn open(request: &OpenRequest) -> Result<Opened, Error> {
    let name = request.options.text(OPTIONS, "throttle-group");
    let group = request.throttle_groups.hold(name, &request.node_name)?;
    let io = Arc::new(ThrottleIo::new(&group));
    let next = None;
    Ok(Opened {
        driver: Box::new(ThrottleDriver { group, next }),
        io,
    })
}

impl Driver for ThrottleDriver {
    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            let name = request.options.text(OPTIONS, "throttle-group");
            if name == self.group.group().name() {
                return Ok(Reopened::default());
            }
            let group = self.group.groups().hold(name, &request.node_name)?;
            let io = Arc::new(ThrottleIo::new(&group));
            self.next = Some(group);
            Ok(Reopened { io: Some(io) })
        }
        .boxed_local()
    }

    fn reopen_commit(&mut self) {
        if let Some(next) = self.next.take() {
            self.group = next;
        }
    }

    fn reopen_abort(&mut self) {
        self.next = None;
    }
}

impl ThrottleIo {
    fn new(group: &GroupUse) -> Self {
        let member = Member::new(Arc::clone(group.group()));
        Self { member }
    }

    async fn admit(&self, io: Io<'_>, direction: Direction, bytes: u64) {
        self.member.admit(io.context(), direction, bytes).await;
    }
}

impl DriverIo for ThrottleIo {
    fn map(&self, _write: bool, offset: u64, _bytes: u64) -> Mapping {
        match self.member.is_limited() {
            true => Mapping::Ask,
            false => Mapping::Child { index: 0, offset },
        }
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::STABLE | WriteFlags::UNCHANGED
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            self.admit(io, Direction::Read, into.bytes()).await;
            io.child(0).read(offset, into).await
        }
        .boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            self.admit(io, Direction::Write, from.bytes()).await;
            io.child(0).write(offset, from, flags).await
        }
        .boxed_local()
    }

    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        async move {
            self.admit(io, Direction::Write, from.bytes()).await;
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
            self.admit(io, Direction::Write, bytes).await;
            io.child(0).write_zeroes(offset, bytes, flags).await
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            self.admit(io, Direction::Write, bytes).await;
            io.child(0).discard(offset, bytes).await
        }
        .boxed_local()
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let stats = self.member.stats();
        let [reads_time, writes_time] = stats.delayed_time.map(|time| time.as_nanos() as u64);
        vec![
            ("waiting-reads", stats.waiting[0]),
            ("waiting-writes", stats.waiting[1]),
            ("delayed-reads", stats.delayed[0]),
            ("delayed-writes", stats.delayed[1]),
            ("delayed-reads-ns", reads_time),
            ("delayed-writes-ns", writes_time),
        ]
    }

    fn drain_begin(&self) {
        self.member.drain_begin();
    }

    fn drain_end(&self) {
        self.member.drain_end();
    }
}
