//! Driver `preallocate`: makes the file below longer ahead of those who write past its end.
//!
//! A file system is slow at making a file longer bit by bit. So the first write past the end makes it
//! longer by much more, in one piece of zeroes, and those that follow find it long enough. Whoever looks
//! at the node's length sees where its data ends. What is left over is cut off when the node closes, is
//! to be read only, or is handed to another process; after a kill it stays.
//!
//! Where the file below cannot do that, or there is no space, nothing is made ahead.
//!
//! Invariant: while something was made ahead, `data_end` is where the data ends; it is noted before the
//! file grows and forgotten after it was cut.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use crate::driver::{
    ChildPermissions, ChildQuery, Driver, DriverIo, DriverType, Mapping, OpenRequest, Opened,
    Preallocation, TruncateFlags, WriteFlags, ZeroFlags,
};
use crate::graph::permission::{self, Permissions};
use crate::io::buffer::Segments;
use crate::io::tracked::Tracker;
use crate::io::{Io, IoFuture, RequestKind, Root};
use crate::options::{OptionKind, OptionSpec};
use crate::{Error, ErrorKind, IoError};

/// Driver `preallocate`, as registered.
pub static PREALLOCATE: DriverType = DriverType {
    name: "preallocate",
    about: "makes a file longer ahead of writes past its end",
    options: OPTIONS,
    open: |request| async move { open(&request) }.boxed_local(),
    ..DriverType::FILTER
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "prealloc-align",
        kind: OptionKind::Bytes,
        default: Some("1M"),
        reopen: false,
        changes_data: false,
        help: "the file's length becomes a multiple of so many bytes",
    },
    OptionSpec {
        name: "prealloc-size",
        kind: OptionKind::Bytes,
        default: Some("128M"),
        reopen: false,
        changes_data: false,
        help: "how far ahead of the data the file is made longer, in bytes",
    },
];

/// Nothing has been made ahead: the data ends where the file does.
const NOTHING_AHEAD: u64 = u64::MAX;

/// The global-state half.
struct PreallocateDriver {
    io: Arc<PreallocateIo>,
}

/// The I/O half.
struct PreallocateIo {
    align: u64,
    ahead_bytes: u64,
    data_end: AtomicU64,
    /// Who makes the file longer registers here: one at a time.
    growing: Tracker,
}

fn open(request: &OpenRequest) -> Result<Opened, Error> {
    let align = request.options.size(OPTIONS, "prealloc-align");
    if align == 0 || !align.is_multiple_of(512) {
        return Err(Error::invalid(format!(
            "option 'prealloc-align' of node '{}' must be a multiple of 512, not {align}",
            request.node_name
        )));
    }
    let io = Arc::new(PreallocateIo {
        align,
        ahead_bytes: request.options.size(OPTIONS, "prealloc-size"),
        data_end: AtomicU64::new(NOTHING_AHEAD),
        growing: Tracker::default(),
    });
    Ok(Opened {
        driver: Box::new(PreallocateDriver {
            io: Arc::clone(&io),
        }),
        io,
    })
}

impl PreallocateDriver {
    async fn cut(&self, root: Rc<Root>) -> Result<(), Error> {
        let request = root.enter(RequestKind::Truncate, 0, 0).await;
        let io = request.io();
        self.io.cut(io).await.map_err(|error| {
            let message = format!(
                "cannot cut off what was made ahead of the data of node '{}': {error}",
                io.name()
            );
            Error::new(ErrorKind::Io, message)
        })
    }
}

impl Driver for PreallocateDriver {
    fn close(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        self.cut(root).boxed_local()
    }

    fn stop_writing(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        self.cut(root).boxed_local()
    }

    fn inactivate(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        self.cut(root).boxed_local()
    }

    fn child_permissions(&self, query: &ChildQuery) -> ChildPermissions {
        let mut rule = permission::default_rule(query);
        if !query.read_only && !query.inactive {
            // Kept while nobody writes: what was made ahead is cut off after the last writer has gone.
            let writes = Permissions::WRITE | Permissions::RESIZE;
            rule.needs |= writes;
            rule.shares -= writes;
        }
        rule
    }
}

impl PreallocateIo {
    /// Sees to it that a write that ends at `end` finds the file long enough.
    async fn before_write(&self, io: Io<'_>, end: u64) {
        let file = io.child(0);
        if end > file.bytes() {
            let _turn = self.growing.begin(0, 1, true).await;
            let bytes = file.bytes();
            if end > bytes {
                self.make_ahead(io, bytes, end).await;
            }
        }
        if self.data_end.load(Ordering::Acquire) != NOTHING_AHEAD {
            // Before the write: a failed one may have written to there.
            self.data_end.fetch_max(end, Ordering::AcqRel);
        }
    }

    async fn make_ahead(&self, io: Io<'_>, bytes: u64, end: u64) {
        let target = end.saturating_add(self.ahead_bytes);
        let Some(target) = target.checked_next_multiple_of(self.align) else {
            return;
        };
        let known = self.data_end.compare_exchange(
            NOTHING_AHEAD,
            bytes,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        let flags = ZeroFlags::NO_FALLBACK;
        let made = io.child(0).write_zeroes(bytes, target - bytes, flags).await;
        if made.is_err() && known.is_ok() && io.child(0).bytes() == bytes {
            self.data_end.store(NOTHING_AHEAD, Ordering::Release);
        }
    }

    /// Cuts off what was made ahead.
    async fn cut(&self, io: Io<'_>) -> Result<(), IoError> {
        let _turn = self.growing.begin(0, 1, true).await;
        let end = self.data_end.load(Ordering::Acquire);
        if end == NOTHING_AHEAD {
            return Ok(());
        }
        if end < io.child(0).bytes() {
            let (off, flags) = (Preallocation::Off, TruncateFlags::empty());
            io.child(0).truncate(end, true, off, flags).await?;
        }
        self.data_end.store(NOTHING_AHEAD, Ordering::Release);
        Ok(())
    }
}

impl DriverIo for PreallocateIo {
    fn bytes(&self, children: &[u64]) -> u64 {
        children[0].min(self.data_end.load(Ordering::Acquire))
    }

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
            self.before_write(io, offset + from.bytes()).await;
            io.child(0).write(offset, from, flags).await
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
            self.before_write(io, offset + bytes).await;
            io.child(0).write_zeroes(offset, bytes, flags).await
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
            let _turn = self.growing.begin(0, 1, true).await;
            let (file, end) = (io.child(0), self.data_end.load(Ordering::Acquire));
            let is_ahead = end != NOTHING_AHEAD && (end..=file.bytes()).contains(&bytes);
            if is_ahead && preallocation != Preallocation::Metadata {
                // There, and zero, whatever was asked for.
                self.data_end.fetch_max(bytes, Ordering::AcqRel);
                return Ok(());
            }
            file.truncate(bytes, exact, preallocation, flags).await?;
            self.data_end.store(NOTHING_AHEAD, Ordering::Release);
            Ok(())
        }
        .boxed_local()
    }
}
