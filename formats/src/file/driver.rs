//! [`FileDriver`]: the global-state half.
//!
//! A node has one way of being open at a time ([`Way`]), which follows from its modes and, with
//! `auto-read-only`, from whether somebody writes. A change that asks for another way opens the file
//! anew, by its name, and makes sure that it is the same file. Whatever prepares a change, reopening or
//! permissions or both in turn, prepares the one state that the node is to be in; the first commit
//! makes all of it a fact, the first abort drops all of it.
//!
//! Threads: control thread only.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockcore::Error;
use blockcore::driver::{
    Activation, Driver, Limits, OpenModes, OpenRequest, Opened, ReopenRequest, Reopened,
};
use blockcore::engine::{HostCall, Op};
use blockcore::filename;
use blockcore::graph::permission::Permissions;
use blockcore::io::{IoContext, Root};
use blockcore::options::Options;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::OPTIONS;
use super::io::FileIo;
use super::lock::{Locks, Users};
use super::open::{Description, Kind, Way, metadata};

/// Who has one of these writes.
const WRITES: Permissions = Permissions::WRITE
    .union(Permissions::WRITE_UNCHANGED)
    .union(Permissions::RESIZE);

/// See the module's header.
struct FileDriver {
    path: String,
    kind: Kind,
    identity: (u64, u64),
    device: bool,
    now: State,
    /// What has been prepared.
    next: Option<State>,
    /// `None` where an operator wants none.
    locks: Option<Rc<Locks>>,
}

/// What a node is, or is to be.
#[derive(Clone)]
struct State {
    io: Arc<FileIo>,
    limits: Limits,
    modes: OpenModes,
    users: Users,
    drops_cache: bool,
}

/// Opens a node.
pub(super) async fn open(request: OpenRequest, kind: Kind) -> Result<Opened, Error> {
    let path = request.options.text(OPTIONS, "filename").to_owned();
    let (modes, context) = (request.modes, request.context);
    check_aio(&request.options, modes)?;
    let drops_cache = request.options.bool(OPTIONS, "drop-cache");
    let way = match request.file {
        // Whoever opened it did so for all that the node may do.
        Some(_) => Way {
            write: !modes.read_only,
            direct: modes.direct,
        },
        None => Way::new(modes, false),
    };
    let description = Description::open(&context, &path, kind, way, request.file).await?;
    let locking = request.options.text(OPTIONS, "locking");
    let file = &description.file;
    let locks =
        (locking != "off").then(|| Locks::new(context, Arc::clone(file), locking == "auto"));
    let bytes = Arc::new(AtomicU64::new(description.metadata.bytes));
    let io = Arc::new(FileIo::new(&description, bytes));
    Ok(Opened {
        driver: Box::new(FileDriver {
            path,
            kind,
            identity: description.identity(),
            device: description.is_device(),
            now: State {
                io: Arc::clone(&io),
                limits: description.limits(),
                modes,
                users: Users::NOBODY,
                drops_cache,
            },
            next: None,
            locks,
        }),
        io,
    })
}

impl FileDriver {
    /// The state that was prepared last, or else holds.
    fn latest(&self) -> &State {
        self.next.as_ref().unwrap_or(&self.now)
    }

    /// Prepares for the node to be in `modes`, with these users. `reopening` is an operator's word that
    /// an earlier failed flush may be forgotten. On failure what was prepared before stays prepared.
    async fn prepare(
        &mut self,
        context: &Rc<IoContext>,
        modes: OpenModes,
        users: Users,
        reopening: bool,
    ) -> Result<Reopened, Error> {
        let latest = self.latest().clone();
        let way = Way::new(modes, users.needs.intersects(WRITES));
        let fits =
            |state: &&State| state.io.way() == way && !(reopening && state.io.file().flush_lost());
        let fitting = [&latest, &self.now].into_iter().find(fits);
        let (io, limits) = match fitting {
            Some(state) => (Arc::clone(&state.io), state.limits),
            None => match self.open_anew(context, &latest, way, reopening).await {
                Ok(opened) => opened,
                // Who may write to a file may go on having it open for that.
                Err(error) if !reopening && latest.io.is_writable() && !way.write => {
                    let (path, error) = (&self.path, error.report());
                    tracing::warn!(path, error, "the file stays open for writing");
                    (Arc::clone(&latest.io), latest.limits)
                }
                Err(error) => return Err(error),
            },
        };
        self.check_end(context, &io, users).await?;
        if let Some(locks) = &self.locks {
            let shares = match modes.force_share {
                true => Permissions::all(),
                false => users.shares,
            };
            let users = Users { shares, ..users };
            locks.prepare(users, io.file()).await?;
        }
        let was_prepared = self.next.is_some();
        let is_other = was_prepared || !Arc::ptr_eq(&io, &self.now.io);
        self.next = Some(State {
            io: Arc::clone(&io),
            limits,
            modes,
            users,
            drops_cache: latest.drops_cache,
        });
        Ok(Reopened {
            io: is_other.then_some(io as _),
        })
    }

    /// A write to a part of the last unit would make the file longer.
    async fn check_end(
        &self,
        context: &Rc<IoContext>,
        io: &FileIo,
        users: Users,
    ) -> Result<(), Error> {
        let unit = io.request_alignment();
        let may_grow = users.needs.contains(Permissions::RESIZE);
        if unit == 1 || !users.needs.contains(Permissions::WRITE) || may_grow {
            return Ok(());
        }
        // As long as it is now, whatever it was when somebody looked last.
        let bytes = metadata(context, io.file()).await?.bytes;
        if bytes.is_multiple_of(unit) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "'{}' has {bytes} bytes, not a multiple of the {unit} that direct I/O needs to write there: use the \
             page cache (cache mode writeback or writethrough) or extend it",
            self.path
        )))
    }

    async fn open_anew(
        &self,
        context: &Rc<IoContext>,
        latest: &State,
        way: Way,
        reopening: bool,
    ) -> Result<(Arc<FileIo>, Limits), Error> {
        let old = latest.io.file();
        if !reopening && latest.io.is_writable() && !latest.modes.no_flush {
            // A description that is given up would take the news of a failed write with it.
            sync(context, &latest.io).await?;
        }
        let description = Description::open(context, &self.path, self.kind, way, None).await?;
        if description.identity() != self.identity {
            return Err(Error::invalid(format!(
                "'{}' is another file now than the one that this node has open: close the node and \
                 add it again if that is meant",
                self.path
            )));
        }
        if !reopening && old.flush_lost() {
            description.file.set_flush_lost();
        }
        let bytes = Arc::clone(latest.io.bytes());
        let io = Arc::new(FileIo::new(&description, bytes));
        Ok((io, description.limits()))
    }

    fn commit(&mut self) {
        if let Some(next) = self.next.take() {
            self.now = next;
            if let Some(locks) = &self.locks {
                locks.commit();
            }
        }
    }

    fn abort(&mut self) {
        self.next = None;
        if let Some(locks) = &self.locks {
            locks.abort();
        }
    }
}

/// QEMU's `native` is Linux AIO, which waits in the page cache.
fn check_aio(options: &Options, modes: OpenModes) -> Result<(), Error> {
    match options.text(OPTIONS, "aio") {
        "native" if !modes.direct => Err(Error::invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        )),
        _ => Ok(()),
    }
}

/// Has the host write back what it keeps.
async fn sync(context: &Rc<IoContext>, io: &FileIo) -> Result<(), Error> {
    let file = io.file();
    context.engine().attach(file);
    let synced = context.op(Op::Sync { file: file.id() }).await.0;
    context.engine().detach(file.id());
    synced.map(drop).map_err(|error| {
        if !io.way().direct {
            file.set_flush_lost();
        }
        Error::host(format!("cannot flush '{}'", file.path().display()), error)
    })
}

impl Driver for FileDriver {
    fn close(&mut self, _root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            // The description closes, and its locks go, with the last engine that has it attached.
            if let Some(locks) = &self.locks {
                locks.settle().await;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn activate(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Activation> {
        async move {
            let State {
                io, drops_cache, ..
            } = self.latest();
            if *drops_cache && !io.way().direct {
                let file = Arc::clone(io.file());
                let dropped = root.context().host(HostCall::DropCache(file)).await;
                dropped.map_err(|error| {
                    let text = format!("cannot drop what the host has cached of '{}'", self.path);
                    Error::host(text, error)
                })?;
            }
            Ok(None)
        }
        .boxed_local()
    }

    fn limits(&self, _children: &[Option<Limits>]) -> Limits {
        self.latest().limits
    }

    fn exact_name(&self) -> Option<String> {
        filename::of_path(&self.path)
    }

    fn directory(&self) -> Option<String> {
        let name = filename::of_path(&self.path)?;
        filename::base_directory(&name).ok().map(str::to_owned)
    }

    fn has_zero_init(&self) -> bool {
        !self.device
    }

    fn reopen_prepare(
        &mut self,
        request: ReopenRequest,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            let mut changed = request.changed();
            changed.retain(|name| name != "drop-cache");
            if !changed.is_empty() {
                return request.generic();
            }
            check_aio(&request.options, request.modes)?;
            let users = self.latest().users;
            let prepared = self
                .prepare(&request.context, request.modes, users, true)
                .await?;
            if let Some(next) = &mut self.next {
                next.drops_cache = request.options.bool(OPTIONS, "drop-cache");
            }
            Ok(prepared)
        }
        .boxed_local()
    }

    fn reopen_commit(&mut self) {
        self.commit();
    }

    fn reopen_abort(&mut self) {
        self.abort();
    }

    fn prepare_permissions(
        &mut self,
        context: Rc<IoContext>,
        needs: Permissions,
        shares: Permissions,
    ) -> LocalBoxFuture<'_, Result<Reopened, Error>> {
        async move {
            let modes = self.latest().modes;
            self.prepare(&context, modes, Users { needs, shares }, false)
                .await
        }
        .boxed_local()
    }

    fn commit_permissions(&mut self) {
        self.commit();
    }

    fn abort_permissions(&mut self) {
        self.abort();
    }

    fn settle_permissions(&mut self) -> LocalBoxFuture<'_, ()> {
        async move {
            if let Some(locks) = &self.locks {
                locks.settle().await;
            }
        }
        .boxed_local()
    }
}
