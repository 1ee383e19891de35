//! The file that a daemon keeps its record in.
//!
//! A record is replaced as a whole: the new one is written beside the old one and synced, takes its
//! name, and the directory is synced. Whoever reads, after whatever end, finds one of the two.
//!
//! A lock file beside it keeps a second daemon out; the state file itself cannot be locked, since its
//! name goes from one file to the next. The lock is free only when the last system call of the daemon
//! before is over, so nothing of that can replace what this one has written.
//!
//! Threads: the control thread's context.

use std::cell::Cell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::lock::Mutex;

use super::{Record, text};
use crate::engine::{Errno, HostCall, HostReply, Op, OpResult, OpenFile, OpenOptions};
use crate::io::IoContext;
use crate::io::buffer::Segments;
use crate::{Error, ErrorKind};

/// The byte of the lock file that is locked.
const LOCK_BYTE: u64 = 0;
/// How often what the host puts off or leaves undone is tried again, a millisecond apart.
const MAX_TRIES: u32 = 1000;

/// A daemon's state file, and the lock on it. The lock ends when this and its last write are over.
pub struct StateFile(Rc<Inner>);

struct Inner {
    path: PathBuf,
    /// Holds the lock.
    _lock: Arc<OpenFile>,
    /// What the file holds, as far as is known, with its epoch; held while that changes.
    last: Mutex<Option<Last>>,
    in_doubt: Cell<bool>,
}

struct Last {
    epoch: u64,
    text: Vec<u8>,
}

impl StateFile {
    /// Takes the lock, and reads the record, if there is one. What was read is durable: a daemon that
    /// was killed may have left a record that a power cut would still take back, when guests have long
    /// relied on it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] if another daemon has the lock, or one was killed and the host is not done
    /// with its last calls; [`ErrorKind::Corrupt`] for a file that is damaged;
    /// [`ErrorKind::Unsupported`] for one of another version; else what the host says. Nothing has been
    /// changed, but that there is a lock file now.
    pub async fn open(
        context: &Rc<IoContext>,
        path: &Path,
    ) -> Result<(Self, Option<Record>), Error> {
        let file = Self::lock(context, path).await?;
        let record = file.0.read(context).await?;
        Ok((file, record))
    }

    /// Takes the lock, and removes the record, durably, whatever it is.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), but for what the file holds. The record may be gone or not.
    pub async fn open_discarding(context: &Rc<IoContext>, path: &Path) -> Result<Self, Error> {
        let file = Self::lock(context, path).await?;
        let removed = file.0.put(context, None).await;
        removed.map_err(|(_, error)| {
            let path = path.display();
            Error::host(format!("cannot discard state file '{path}'"), error)
        })?;
        Ok(file)
    }

    async fn lock(context: &Rc<IoContext>, path: &Path) -> Result<Self, Error> {
        let failed = |error| {
            let path = path.display();
            match error {
                Errno::AGAIN => Error::busy(format!(
                    "cannot use state file '{path}': another daemon is using it"
                )),
                error => Error::host(format!("cannot lock state file '{path}'"), error),
            }
        };
        let lock_path = beside(path, ".lock");
        let lock = open_or_create(context, &lock_path).await.map_err(failed)?;
        let call = HostCall::LockExclusive(Arc::clone(&lock), LOCK_BYTE);
        context.host(call).await.map_err(failed)?;
        Ok(Self(Rc::new(Inner {
            path: path.to_owned(),
            _lock: lock,
            last: Mutex::new(None),
            in_doubt: Cell::new(false),
        })))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Replaces the record, durably. Writes happen one after the other.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for a record that contradicts itself, is too large, or whose epoch does
    /// not come after the last one's; else what the host says. The record of before stands, durably,
    /// unless the file is [in doubt](Self::in_doubt) now.
    ///
    /// # Cancellation
    ///
    /// The write goes on to its end.
    pub async fn write(&self, context: &Rc<IoContext>, record: &Record) -> Result<(), Error> {
        let path = self.0.path.display();
        let text = text::encode(record).map_err(|error| {
            Error::invalid(format!("cannot write state file '{path}': {error}"))
        })?;
        let last = Last {
            epoch: record.epoch,
            text,
        };
        let (inner, own_context) = (Rc::clone(&self.0), Rc::clone(context));
        let (answer, answered) = oneshot::channel();
        // A task of its own, as half a write that is abandoned would end during the next one.
        context.spawn(async move {
            let outcome = inner.replace(&own_context, last).await;
            // Who waits no longer does not want to know.
            let _ = answer.send(outcome);
        });
        answered.await.unwrap_or_else(|_| {
            Err(Error::new(
                ErrorKind::Io,
                "the worker that wrote the state file is gone",
            ))
        })
    }

    /// Whether a write has failed so late, and so had its undoing, that a restart may find either
    /// record. The next write that succeeds ends this.
    ///
    /// Until then, what either record names must stay fit to be served.
    pub fn in_doubt(&self) -> bool {
        self.0.in_doubt.get()
    }
}

impl Inner {
    async fn read(&self, context: &IoContext) -> Result<Option<Record>, Error> {
        let mut last = self.last.lock().await;
        let path = self.path.display();
        let failed = |error| Error::host(format!("cannot read state file '{path}'"), error);
        self.sync_directory(context).await.map_err(failed)?;
        let Some(text) = self.read_all(context).await.map_err(failed)? else {
            return Ok(None);
        };
        let record = text::decode(&text).map_err(|error| {
            Error::new(
                error.kind(),
                format!(
                    "cannot use state file '{path}': {error}; option --discard-state starts without it"
                ),
            )
        })?;
        let epoch = record.epoch;
        *last = Some(Last { epoch, text });
        Ok(Some(record))
    }

    async fn replace(&self, context: &IoContext, next: Last) -> Result<(), Error> {
        let mut last = self.last.lock().await;
        let path = self.path.display();
        if let Some(last) = &*last
            && next.epoch <= last.epoch
        {
            return Err(Error::invalid(format!(
                "cannot write state file '{path}': epoch {} does not come after {}",
                next.epoch, last.epoch
            )));
        }
        let Err((step, errno)) = self.put(context, Some(&next.text)).await else {
            *last = Some(next);
            self.in_doubt.set(false);
            return Ok(());
        };
        let error = |more: &str| {
            Error::host(
                format!("cannot replace the record in state file '{path}'{more}"),
                errno,
            )
        };
        if step == Step::Before {
            return Err(error(""));
        }
        // It is there for whoever reads, and may not be after a power cut. The caller will not do what
        // it says: the old one has to be what everybody finds.
        self.in_doubt.set(true);
        let last = last.as_ref().map(|last| last.text.as_slice());
        if let Err((_, second)) = self.put(context, last).await {
            tracing::error!(%path, error = %second, "cannot put the old record back");
            return Err(error(", nor put the old one back: it may hold either"));
        }
        self.in_doubt.set(false);
        Err(error(""))
    }

    /// Makes the file hold `text`, or removes it. The error tells whether anything has changed.
    async fn put(&self, context: &IoContext, text: Option<&[u8]>) -> Result<(), (Step, Errno)> {
        let before = |error| (Step::Before, error);
        match text {
            None => match context.host(HostCall::Remove(self.path.clone())).await {
                Ok(_) | Err(Errno::NOENT) => {}
                Err(error) => return Err(before(error)),
            },
            Some(text) => {
                let new = beside(&self.path, ".new");
                let renamed = match self.write_new(context, &new, text).await {
                    Ok(()) => context
                        .host(HostCall::Rename(new.clone(), self.path.clone()))
                        .await
                        .map(|_| ()),
                    Err(error) => Err(error),
                };
                if let Err(error) = renamed {
                    // A remainder is removed before the next write at the latest.
                    let _ = context.host(HostCall::Remove(new)).await;
                    return Err(before(error));
                }
            }
        }
        let synced = self.sync_directory(context).await;
        synced.map_err(|error| (Step::After, error))
    }

    /// Makes a file that holds `text`, durably but for its name.
    async fn write_new(&self, context: &IoContext, path: &Path, text: &[u8]) -> Result<(), Errno> {
        // Removed and not written over: after a power cut it may be another name of the state file.
        match context.host(HostCall::Remove(path.to_owned())).await {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        let options = OpenOptions {
            write: true,
            create: true,
            ..OpenOptions::default()
        };
        let file = open(context, path, options).await?;
        let attached = Attached::new(context, &file);
        let memory = Segments::allocate(text.len(), 4096);
        memory.copy_from(text);
        let bytes = text.len() as u64;
        let written = attached
            .transfer(bytes, |offset| Op::Write {
                file: file.id(),
                offset,
                segments: memory.slice(offset, bytes - offset),
            })
            .await?;
        if written < bytes {
            return Err(Errno::IO);
        }
        // Once: an error means that some of it may be lost, whatever a second sync says.
        context.op(Op::Sync { file: file.id() }).await.0.map(|_| ())
    }

    async fn read_all(&self, context: &IoContext) -> Result<Option<Vec<u8>>, Errno> {
        let file = match open(context, &self.path, OpenOptions::default()).await {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        let call = HostCall::Metadata(Arc::clone(&file));
        let bytes = match context.host(call).await? {
            HostReply::Metadata(metadata) => metadata.bytes,
            reply => unreachable!("metadata answered with {reply:?}"),
        };
        // One byte more than may be there, for the decoder to refuse.
        let bytes = bytes.min(text::MAX_BYTES + 1);
        let attached = Attached::new(context, &file);
        let memory = Segments::allocate(bytes as usize, 4096);
        let read = attached
            .transfer(bytes, |offset| Op::Read {
                file: file.id(),
                offset,
                segments: memory.slice(offset, bytes - offset),
            })
            .await?;
        Ok(Some(memory.slice(0, read).to_vec()))
    }

    async fn sync_directory(&self, context: &IoContext) -> Result<(), Errno> {
        let directory = match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        context.host(HostCall::SyncDirectory(directory)).await?;
        Ok(())
    }
}

/// How far a replacement came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The old record has its name.
    Before,
    /// The new one has it, and a power cut may take it back.
    After,
}

/// A file attached to an engine as long as this lives.
struct Attached<'a> {
    context: &'a IoContext,
    file: &'a Arc<OpenFile>,
}

impl<'a> Attached<'a> {
    fn new(context: &'a IoContext, file: &'a Arc<OpenFile>) -> Self {
        context.engine().attach(file);
        Self { context, file }
    }

    /// Does operations from each offset that is reached until all bytes have moved or, in a read, the
    /// file ends. Returns how many have.
    async fn transfer(&self, bytes: u64, op: impl Fn(u64) -> Op) -> OpResult {
        let (mut done, mut tries) = (0, 0);
        while done < bytes {
            let op = op(done);
            let read = matches!(op, Op::Read { .. });
            match self.context.op(op).await.0 {
                Ok(0) if read => break,
                Ok(0) | Err(Errno::AGAIN) if tries < MAX_TRIES => {
                    tries += 1;
                    self.context.delay(Duration::from_millis(1)).await;
                }
                Err(Errno::INTR) => {}
                Ok(0) => break,
                Ok(moved) => done += moved,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.context.engine().detach(self.file.id());
    }
}

async fn open(
    context: &IoContext,
    path: &Path,
    options: OpenOptions,
) -> Result<Arc<OpenFile>, Errno> {
    match context
        .host(HostCall::Open(path.to_owned(), options))
        .await?
    {
        HostReply::File(file) => Ok(file),
        reply => unreachable!("an open answered with {reply:?}"),
    }
}

/// A file that nobody removes: it is there, or is made, or is there by now.
async fn open_or_create(context: &IoContext, path: &Path) -> Result<Arc<OpenFile>, Errno> {
    let options = |create| OpenOptions {
        write: true,
        create,
        ..OpenOptions::default()
    };
    match open(context, path, options(true)).await {
        Err(Errno::EXIST) => open(context, path, options(false)).await,
        outcome => outcome,
    }
}

/// The path with more at its end.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut longer = OsString::from(path);
    longer.push(end);
    PathBuf::from(longer)
}

#[cfg(test)]
mod tests;
