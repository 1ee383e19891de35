//! Driver `blkdebug`: fails requests on cue, suspends them, and has whatever limits a test wants.
//!
//! Rules wait for *events*: points that requests come to in this node's pipeline, and in a format that
//! has this node as its file ([`Io::event`]). Their names are those of QEMU, and any of them may be
//! asked for whether or not something here raises it.
//!
//! Lists are given as `inject-error.0.event=pwritev,inject-error.0.errno=28` and so on, from 0, or in the file that
//! `config` names.

mod config;
mod rules;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use futures_util::FutureExt;

use self::rules::{Action, Inject, Kind, Rule, Rules};
use crate::driver::{
    ChildPermissions, ChildQuery, ChildSpec, Driver, DriverIo, DriverType, Limits, OpenRequest,
    Opened, Place, Role, Status, StatusFlags, WriteFlags, ZeroFlags,
};
use crate::graph::permission::{self, Permissions};
use crate::io::buffer::Segments;
use crate::io::{Io, IoFuture};
use crate::options::{OptionKind, OptionSpec, Options, parse_bool};
use crate::{Error, ErrorKind, IoError};

/// Driver `blkdebug`, as registered.
pub static BLKDEBUG: DriverType = DriverType {
    name: "blkdebug",
    about: "fails or suspends requests on cue, for tests",
    options: OPTIONS,
    children: &[ChildSpec {
        name: "image",
        role: Role::FILTERED.union(Role::PRIMARY),
        optional: false,
    }],
    open: |request| async move { open(&request).await }.boxed_local(),
    ..DriverType::FILTER
};

/// Every event that rules may wait for.
const EVENTS: &[&str] = &[
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "cor_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_alloc_space",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "none",
];

const KINDS: &[&str] = &[
    "read",
    "write",
    "write-zeroes",
    "discard",
    "flush",
    "block-status",
];
const PERMISSIONS: &[&str] = &["consistent-read", "write", "write-unchanged", "resize"];

const fn option(name: &'static str, kind: OptionKind, help: &'static str) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        // Left out; numbers are read by `Given::number`.
        default: Some(match kind {
            OptionKind::Bytes => "0",
            _ => "",
        }),
        reopen: false,
        changes_data: false,
        help,
    }
}

const OPTIONS: &[OptionSpec] = &[
    option(
        "config",
        OptionKind::Text,
        "file with more of the rules, which come before these",
    ),
    option(
        "inject-error.*.event",
        OptionKind::Choice(EVENTS),
        "event after which requests fail",
    ),
    option(
        "inject-error.*.state",
        OptionKind::Int,
        "only in this state; in every one by default",
    ),
    option(
        "inject-error.*.iotype",
        OptionKind::Choice(KINDS),
        "only requests of this kind; all but block-status by default",
    ),
    option(
        "inject-error.*.errno",
        OptionKind::Int,
        "number of the error; 5 (EIO) by default",
    ),
    option(
        "inject-error.*.sector",
        OptionKind::Int,
        "only requests that touch the beginning of this sector of 512 bytes",
    ),
    option(
        "inject-error.*.once",
        OptionKind::Bool,
        "whether only one request fails",
    ),
    option(
        "inject-error.*.immediately",
        OptionKind::Bool,
        "whether it fails before anything else runs",
    ),
    option(
        "set-state.*.event",
        OptionKind::Choice(EVENTS),
        "event that changes the state",
    ),
    option(
        "set-state.*.state",
        OptionKind::Int,
        "only in this state; in every one by default",
    ),
    option(
        "set-state.*.new_state",
        OptionKind::Int,
        "state afterwards; the first one is 1",
    ),
    option(
        "align",
        OptionKind::Bytes,
        "alignment that requests need, in bytes",
    ),
    option(
        "max-transfer",
        OptionKind::Bytes,
        "longest transfer in bytes",
    ),
    option(
        "opt-write-zero",
        OptionKind::Bytes,
        "unit of zeroing in bytes",
    ),
    option(
        "max-write-zero",
        OptionKind::Bytes,
        "longest zeroing in bytes",
    ),
    option(
        "opt-discard",
        OptionKind::Bytes,
        "unit of discards in bytes",
    ),
    option("max-discard", OptionKind::Bytes, "longest discard in bytes"),
    option(
        "take-child-perms.*",
        OptionKind::Choice(PERMISSIONS),
        "permission that is needed besides those of the users",
    ),
    option(
        "unshare-child-perms.*",
        OptionKind::Choice(PERMISSIONS),
        "permission that is not shared, whatever the users share",
    ),
];

/// The global-state half.
struct BlkdebugDriver {
    rules: Arc<Rules>,
    limits: Limits,
    takes: Permissions,
    unshares: Permissions,
}

/// The I/O half.
struct BlkdebugIo {
    rules: Arc<Rules>,
}

async fn open(request: &OpenRequest) -> Result<Opened, Error> {
    let file = match request.options.text(OPTIONS, "config") {
        "" => Options::default(),
        path => {
            let file = config::read(&request.context, path).await?;
            file.check(&[OPTIONS], &format!("a rule in '{path}'"))?;
            file
        }
    };
    let given = Given {
        node: &request.node_name,
        options: &request.options,
        file: &file,
    };
    let rules = Arc::new(Rules::new(given.rules()?));
    let driver = BlkdebugDriver {
        limits: given.limits()?,
        takes: given.permissions("take-child-perms")?,
        unshares: given.permissions("unshare-child-perms")?,
        rules: Arc::clone(&rules),
    };
    Ok(Opened {
        driver: Box::new(driver),
        io: Arc::new(BlkdebugIo { rules }),
    })
}

/// Options as they were given, on their way to rules and limits.
struct Given<'a> {
    node: &'a str,
    options: &'a Options,
    /// Rules from a file.
    file: &'a Options,
}

impl Given<'_> {
    fn invalid(&self, what: String) -> Error {
        Error::invalid(format!("option {what} of node '{}'", self.node))
    }

    /// The entries of a list, in order.
    fn list(&self, name: &str) -> Result<Vec<Options>, Error> {
        let mut list = self.list_of(self.file, name)?;
        list.extend(self.list_of(self.options, name)?);
        Ok(list)
    }

    fn list_of(&self, options: &Options, name: &str) -> Result<Vec<Options>, Error> {
        let mut entries = options.clone().take_nested(name);
        let mut list = Vec::new();
        while !entries.is_empty() {
            let place = list.len().to_string();
            let mut entry = entries.take_nested(&place);
            if let Some(value) = entries.take(&place) {
                entry.set("", value);
            }
            if entry.is_empty() {
                return Err(self.invalid(format!("'{name}.{place}' is missing in the list")));
            }
            list.push(entry);
        }
        Ok(list)
    }

    fn number(&self, entry: &Options, name: &str) -> Result<Option<u64>, Error> {
        let Some(text) = entry.get(name).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(self.invalid(format!("'{name}' takes a number, not '{text}':"))),
        }
    }

    fn rules(&self) -> Result<Vec<Rule>, Error> {
        let mut rules = Vec::new();
        for entry in self.list("inject-error")? {
            let action = Action::Inject(self.inject(&entry)?);
            rules.push(self.rule(&entry, action)?);
        }
        for entry in self.list("set-state")? {
            let state = self.number(&entry, "new_state")?;
            let state = state.ok_or_else(|| self.invalid("'new_state' is missing:".into()))?;
            rules.push(self.rule(&entry, Action::SetState(state))?);
        }
        Ok(rules)
    }

    fn rule(&self, entry: &Options, action: Action) -> Result<Rule, Error> {
        let event = entry.get("event").filter(|event| !event.is_empty());
        let event = event.ok_or_else(|| self.invalid("'event' is missing:".into()))?;
        Ok(Rule {
            event: event.to_owned(),
            state: self.number(entry, "state")?.unwrap_or(0),
            action,
        })
    }

    fn inject(&self, entry: &Options) -> Result<Inject, Error> {
        let flag = |name: &str| entry.get(name).and_then(parse_bool).unwrap_or(false);
        let errno = self.number(entry, "errno")?;
        let errno = errno.unwrap_or(rustix::io::Errno::IO.raw_os_error() as u64);
        if errno == 0 || errno > 4095 {
            return Err(self.invalid(format!("'errno' takes an error's number, not {errno}:")));
        }
        let sector = self.number(entry, "sector")?;
        let offset = sector.map(|sector| sector.saturating_mul(512));
        let kind = entry.get("iotype").and_then(|given| {
            let mut kinds = Kind::NAMES.iter();
            kinds.find(|(name, _)| *name == given)
        });
        Ok(Inject {
            kind: kind.map(|(_, kind)| *kind),
            error: IoError::from(rustix::io::Errno::from_raw_os_error(errno as i32)),
            once: flag("once"),
            immediately: flag("immediately"),
            offset,
        })
    }

    fn permissions(&self, name: &str) -> Result<Permissions, Error> {
        let mut permissions = Permissions::empty();
        for entry in self.list(name)? {
            let named = entry.get("").unwrap_or("");
            let mut names = Permissions::NAMES.iter();
            let known = names.find(|(name, _)| *name == named);
            permissions |= known.map_or(Permissions::empty(), |(_, permission)| *permission);
        }
        Ok(permissions)
    }

    /// The limits that were asked for, 0 where none was.
    fn limits(&self) -> Result<Limits, Error> {
        let size = |name: &'static str, unit: u64| {
            let bytes = self.options.size(OPTIONS, name);
            match bytes.is_multiple_of(unit.max(1)) && bytes < i32::MAX as u64 {
                true => Ok(bytes),
                false => Err(self.invalid(format!(
                    "'{name}' must be a multiple of {} and below 2 GiB, and not {bytes}, for sizes",
                    unit.max(1)
                ))),
            }
        };
        let align = size("align", 1)?;
        if align > 0 && !align.is_power_of_two() {
            return Err(self.invalid(format!("'align' must be a power of two, not {align}:")));
        }
        let (zero, discard) = (size("opt-write-zero", align)?, size("opt-discard", align)?);
        Ok(Limits {
            request_alignment: align.max(1) as u32,
            max_transfer_bytes: size("max-transfer", align)?,
            zero_alignment: zero as u32,
            max_zero_bytes: size("max-write-zero", zero.max(align))?,
            discard_alignment: discard as u32,
            max_discard_bytes: size("max-discard", discard.max(align))?,
            ..Limits::default()
        })
    }
}

impl Driver for BlkdebugDriver {
    fn limits(&self, children: &[Option<Limits>]) -> Limits {
        let child = children[0].map_or_else(Limits::default, Limits::above);
        Limits {
            request_alignment: self.limits.request_alignment,
            max_transfer_bytes: self.limits.max_transfer_bytes,
            zero_alignment: self.limits.zero_alignment.max(1),
            max_zero_bytes: self.limits.max_zero_bytes,
            discard_alignment: self.limits.discard_alignment.max(1),
            max_discard_bytes: self.limits.max_discard_bytes,
            ..child
        }
    }

    fn child_permissions(&self, query: &ChildQuery) -> ChildPermissions {
        let rule = permission::default_rule(query);
        ChildPermissions {
            needs: rule.needs | self.takes,
            shares: rule.shares - self.unshares,
        }
    }

    fn suspend_at(&mut self, event: &str, tag: &str) -> Result<(), Error> {
        if !EVENTS.contains(&event) {
            return Err(Error::invalid(format!("there is no event '{event}'")));
        }
        self.rules.suspend_at(event, tag);
        Ok(())
    }

    fn resume(&mut self, tag: &str) -> Result<(), Error> {
        match self.rules.resume(tag) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::NotFound,
                format!("no request is suspended, or to be, under '{tag}'"),
            )),
        }
    }

    fn is_suspended(&self, tag: &str) -> bool {
        self.rules.is_suspended(tag)
    }
}

impl BlkdebugIo {
    /// Fails a request that a rule meets.
    async fn check(&self, kind: Kind, offset: u64, bytes: u64) -> Result<(), IoError> {
        let Some((error, immediately)) = self.rules.check(kind, offset, bytes) else {
            return Ok(());
        };
        if !immediately {
            yield_once().await;
        }
        Err(error)
    }
}

/// Lets others run.
async fn yield_once() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl DriverIo for BlkdebugIo {
    fn write_flags(&self) -> WriteFlags {
        WriteFlags::STABLE | WriteFlags::UNCHANGED
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            self.check(Kind::Read, offset, into.bytes()).await?;
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
            self.check(Kind::Write, offset, from.bytes()).await?;
            io.child(0).write(offset, from, flags).await
        }
        .boxed_local()
    }

    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        async move {
            self.check(Kind::Write, offset, from.bytes()).await?;
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
            self.check(Kind::WriteZeroes, offset, bytes).await?;
            io.child(0).write_zeroes(offset, bytes, flags).await
        }
        .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        async move {
            self.check(Kind::Discard, offset, bytes).await?;
            io.child(0).discard(offset, bytes).await
        }
        .boxed_local()
    }

    fn flush_all<'a>(&'a self, io: Io<'a>) -> Option<IoFuture<'a>> {
        let flush = async move {
            self.check(Kind::Flush, 0, 0).await?;
            io.flush_children().await
        };
        Some(flush.boxed_local())
    }

    fn block_status<'a>(
        &'a self,
        _io: Io<'a>,
        _exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        async move {
            self.check(Kind::BlockStatus, offset, bytes).await?;
            Ok(Status {
                flags: StatusFlags::PLACE | StatusFlags::RAW,
                bytes,
                place: Place {
                    child: Some(0),
                    offset,
                },
            })
        }
        .boxed_local()
    }

    fn event<'a>(&'a self, _io: Io<'a>, event: &'static str) -> Option<IoFuture<'a>> {
        let happens = async move {
            self.rules.event(event).await;
            Ok(())
        };
        Some(happens.boxed_local())
    }
}
