//! Image locks: permissions as other processes see them.
//!
//! As QEMU has them, so that both keep out of each other's images: for each permission that is used,
//! a shared lock on byte 100 + its bit; for each that is not shared with others, one on byte 200 + its
//! bit. Then both are tested the other way round. The locks are OFD locks on the very description
//! that does the I/O, so they last until the last of it has landed, even if the process dies first.
//!
//! Locks follow the permissions that the users of the node have together. They are taken while a change
//! of the graph is prepared, beside those that are held; what is not needed any more is given up
//! afterwards, in the background.
//!
//! A node whose file is opened anew has its locks twice until that change is over: what is new is taken
//! and tested on the description that has been there, and only then all of it on the other one, since
//! a test cannot tell one's own locks on another description from somebody else's.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use blockcore::engine::{Errno, HostCall, OpenFile};
use blockcore::graph::permission::Permissions;
use blockcore::io::IoContext;
use blockcore::turns::{Turn, Turns};
use blockcore::{Error, ErrorKind};

/// Byte of the first permission that is used.
const USED: u64 = 100;
/// Byte of the first permission that is not shared.
const UNSHARED: u64 = 200;

/// How long to wait for locks whose holder cannot be found.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for locks of this process: of a node that has been closed, whose last I/O lands.
const OWN_PATIENCE: Duration = Duration::from_secs(1);
/// How often to look again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What the users of a node need and share together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Users {
    pub(super) needs: Permissions,
    pub(super) shares: Permissions,
}

impl Users {
    pub(super) const NOBODY: Self = Self {
        needs: Permissions::empty(),
        shares: Permissions::all(),
    };

    /// Both at once.
    fn and(self, other: Self) -> Self {
        Self {
            needs: self.needs | other.needs,
            shares: self.shares & other.shares,
        }
    }
}

/// The locks of a node.
pub(super) struct Locks {
    context: Rc<IoContext>,
    /// Where the host has no such locks, go on without.
    optional: bool,
    committed: Cell<Users>,
    prepared: Cell<Option<Users>>,
    held: RefCell<Held>,
    /// On the description that takes the place of the other with the commit.
    copied: RefCell<Option<Held>>,
    /// To be given up altogether.
    retired: RefCell<Vec<Held>>,
    /// Taking and giving up are one at a time.
    turns: Turns,
}

/// The bytes that are locked on one open file description, or may be.
struct Held {
    file: Arc<OpenFile>,
    bytes: BTreeSet<u64>,
}

impl Locks {
    /// No locks yet.
    pub(super) fn new(context: Rc<IoContext>, file: Arc<OpenFile>, optional: bool) -> Rc<Self> {
        Rc::new(Self {
            context,
            optional,
            committed: Cell::new(Users::NOBODY),
            prepared: Cell::new(None),
            held: RefCell::new(Held {
                file,
                bytes: BTreeSet::new(),
            }),
            copied: RefCell::default(),
            retired: RefCell::default(),
            turns: Turns::default(),
        })
    }

    /// Takes what these users need beside what is held. `file` is the description that the node has from
    /// the commit on: the one it has, or another, which gets all of its locks.
    ///
    /// # Errors
    ///
    /// As [`take`]; nothing more is held than before.
    pub(super) async fn prepare(
        self: &Rc<Self>,
        users: Users,
        file: &Arc<OpenFile>,
    ) -> Result<(), Error> {
        let turn = self.turns.next().await;
        self.retire_copies();
        self.release_retired().await;
        self.prepared.set(Some(users));
        let taken = match self.extend(users).await {
            Ok(()) => self.copy_to(file).await,
            Err(error) => Err(error),
        };
        match taken {
            Err(error) if self.optional && error.kind() == ErrorKind::Unsupported => {
                tracing::warn!(
                    error = %error.report(),
                    "other processes are not kept out of the image"
                );
                Ok(())
            }
            Err(error) => {
                self.prepared.set(None);
                self.retire_copies();
                self.trim(turn).await;
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    /// Takes and tests what is held and what `users` need.
    async fn extend(&self, users: Users) -> Result<(), Error> {
        let both = self.committed.get().and(users);
        if both == self.committed.get() {
            // Nothing to ask for: what is held is enough, and need not be tested again.
            return Ok(());
        }
        let file = {
            // Noted before they are had: what a failure leaves behind is given up, too.
            let mut held = self.held.borrow_mut();
            held.bytes.extend(mine(both.needs, both.shares));
            Arc::clone(&held.file)
        };
        take(&self.context, &file, both.needs, both.shares).await
    }

    /// Takes all that is held on another description as well. Nobody can have come in between, so there
    /// is nothing to test.
    async fn copy_to(&self, file: &Arc<OpenFile>) -> Result<(), Error> {
        let bytes = {
            let held = self.held.borrow();
            if Arc::ptr_eq(&held.file, file) {
                return Ok(());
            }
            held.bytes.clone()
        };
        self.copied.replace(Some(Held {
            file: Arc::clone(file),
            bytes: bytes.clone(),
        }));
        for byte in bytes {
            let call = HostCall::LockShared(Arc::clone(file), byte);
            let locked = self.context.host(call).await;
            locked.map_err(|error| refused(file.path(), error))?;
        }
        Ok(())
    }

    /// What was prepared holds.
    pub(super) fn commit(self: &Rc<Self>) {
        let Some(users) = self.prepared.take() else {
            return;
        };
        self.committed.set(users);
        if let Some(copied) = self.copied.take() {
            let old = self.held.replace(copied);
            self.retired.borrow_mut().push(old);
        }
        self.trim_later();
    }

    /// What was prepared does not.
    pub(super) fn abort(self: &Rc<Self>) {
        if self.prepared.take().is_some() {
            self.retire_copies();
            self.trim_later();
        }
    }

    fn retire_copies(&self) {
        let copied = self.copied.take();
        self.retired.borrow_mut().extend(copied);
    }

    fn trim_later(self: &Rc<Self>) {
        let (this, turn) = (Rc::clone(self), self.turns.next());
        self.context
            .spawn(async move { this.trim(turn.await).await });
    }

    /// Waits until what was to be given up is.
    pub(super) async fn settle(&self) {
        self.turns.next().await;
    }

    /// Gives up what nobody needs, as it is when its turn has come.
    async fn trim(&self, _turn: Turn) {
        self.release_retired().await;
        let mut users = self.committed.get();
        if let Some(prepared) = self.prepared.get() {
            users = users.and(prepared);
        }
        let keep: BTreeSet<_> = mine(users.needs, users.shares).collect();
        let (file, excess) = {
            let held = self.held.borrow();
            let excess: Vec<_> = held.bytes.difference(&keep).copied().collect();
            (Arc::clone(&held.file), excess)
        };
        for byte in excess {
            if self.unlock(&file, byte).await {
                self.held.borrow_mut().bytes.remove(&byte);
            }
        }
    }

    /// Gives up the locks of descriptions that have gone out of use: a test would find them as long as
    /// some engine has these attached.
    async fn release_retired(&self) {
        for held in self.retired.take() {
            for byte in held.bytes {
                self.unlock(&held.file, byte).await;
            }
        }
    }

    async fn unlock(&self, file: &Arc<OpenFile>, byte: u64) -> bool {
        let call = HostCall::Unlock(Arc::clone(file), byte);
        let unlocked = self.context.host(call).await;
        if let Err(error) = &unlocked {
            let path = file.path().display();
            tracing::warn!(%path, %error, "cannot give up a lock of an image");
        }
        unlocked.is_ok()
    }
}

/// Takes the locks for `needs` and `shares`; on failure some may be held.
///
/// A process that was killed keeps its locks until the last of its I/O has landed. So a lock that no
/// living process holds is waited for.
///
/// # Errors
///
/// [`ErrorKind::Busy`] that names the permission and, where the host tells, the process;
/// [`ErrorKind::Unsupported`] where the file system has no such locks.
async fn take(
    context: &IoContext,
    file: &Arc<OpenFile>,
    needs: Permissions,
    shares: Permissions,
) -> Result<(), Error> {
    let began = context.engine().now();
    let mut reported = false;
    loop {
        let byte = match try_take(context, file, needs, shares).await {
            Ok(()) => return Ok(()),
            Err((Errno::AGAIN, byte)) => byte,
            Err((error, _)) => return Err(refused(file.path(), error)),
        };
        let mut holders = holders(file.path(), byte);
        let ours =
            own_locks(file.path(), byte) > usize::from(mine(needs, shares).any(|b| b == byte));
        if ours {
            holders.push("this process".into());
        }
        let patience = match (ours, holders.len()) {
            (_, 0) => PATIENCE,
            (true, 1) => OWN_PATIENCE,
            _ => Duration::ZERO,
        };
        if context.engine().now() >= began + patience {
            return Err(held(file.path(), byte, &holders));
        }
        if !std::mem::replace(&mut reported, true) {
            let path = file.path().display();
            tracing::info!(%path, "waiting for the image's lock: no other living process holds it");
        }
        context.delay(LOOK_AGAIN).await;
    }
}

/// One try; the error says which byte was not to be had.
async fn try_take(
    context: &IoContext,
    file: &Arc<OpenFile>,
    needs: Permissions,
    shares: Permissions,
) -> Result<(), (Errno, u64)> {
    for byte in mine(needs, shares) {
        let call = HostCall::LockShared(Arc::clone(file), byte);
        context.host(call).await.map_err(|error| (error, byte))?;
    }
    let others = bits(needs)
        .map(|bit| UNSHARED + bit)
        .chain(bits(Permissions::all() - shares).map(|bit| USED + bit));
    for byte in others {
        let call = HostCall::TestLock(Arc::clone(file), byte);
        context.host(call).await.map_err(|error| (error, byte))?;
    }
    Ok(())
}

fn bits(set: Permissions) -> impl Iterator<Item = u64> {
    (0..8).filter(move |bit| set.bits() & (1 << bit) != 0)
}

/// The bytes to lock.
fn mine(needs: Permissions, shares: Permissions) -> impl Iterator<Item = u64> {
    let unshared = bits(Permissions::all() - shares);
    bits(needs)
        .map(|bit| USED + bit)
        .chain(unshared.map(|bit| UNSHARED + bit))
}

fn refused(path: &Path, error: Errno) -> Error {
    Error::host(
        format!(
            "cannot lock '{}' (option 'locking=off' opens it without, if nobody else uses it)",
            path.display()
        ),
        error,
    )
}

fn held(path: &Path, byte: u64, holders: &[String]) -> Error {
    let (bit, what) = match byte.checked_sub(UNSHARED) {
        Some(bit) => (bit, "does not share"),
        None => (byte - USED, "uses"),
    };
    let permission = Permissions::from_bits_truncate(1 << bit).names();
    let who = match holders {
        [] => "somebody else, whom this host does not show,".to_owned(),
        holders => holders.join(" and "),
    };
    Error::new(
        ErrorKind::Busy,
        format!(
            "cannot lock '{}', which is in use: {who} {what} permission {permission}",
            path.display()
        ),
    )
}

/// Other processes whose descriptors hold a lock on this byte of the file, as far as `/proc` shows them.
fn holders(path: &Path, byte: u64) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid != std::process::id() && locks(&process.path(), path, byte) > 0 {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("process {pid} ({})", command.trim()));
        }
    }
    found
}

/// How many descriptors of this process hold a lock on this byte of the file.
fn own_locks(path: &Path, byte: u64) -> usize {
    locks(Path::new("/proc/self"), path, byte)
}

/// How many descriptors of a process (given by its place in `/proc`) hold a lock on this byte.
fn locks(process: &Path, path: &Path, byte: u64) -> usize {
    let Ok(image) = fs::metadata(path) else {
        return 0;
    };
    let infos = fs::read_dir(process.join("fdinfo"));
    let holds = |info: &fs::DirEntry| {
        fs::read_to_string(info.path())
            .is_ok_and(|text| text.lines().any(|line| is_lock(line, image.ino(), byte)))
    };
    infos.into_iter().flatten().flatten().filter(holds).count()
}

/// Whether a line of `fdinfo` is a lock on this byte of this inode:
/// `lock: 1: OFDLCK ADVISORY READ -1 fd:01:1234 100 100`.
fn is_lock(line: &str, inode: u64, byte: u64) -> bool {
    let mut words = line.split_whitespace();
    if words.next() != Some("lock:") {
        return false;
    }
    let words: Vec<_> = words.collect();
    let [.., file, begin, end] = words.as_slice() else {
        return false;
    };
    let same_file = file.rsplit(':').next().and_then(|text| text.parse().ok()) == Some(inode);
    let begins = begin.parse::<u64>().is_ok_and(|begin| begin <= byte);
    let ends = *end == "EOF" || end.parse::<u64>().is_ok_and(|end| end >= byte);
    same_file && begins && ends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_line_is_recognised_by_inode_and_byte() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fd:01:1234 100 101";
        assert!(is_lock(line, 1234, 101));
        assert!(!is_lock(line, 1234, 102));
        assert!(!is_lock(line, 234, 101));
        assert!(!is_lock("flags:\t02", 1234, 101));
        assert!(is_lock(
            "lock: 1: POSIX ADVISORY WRITE 7 00:01:9 0 EOF",
            9,
            200
        ));
    }
}
