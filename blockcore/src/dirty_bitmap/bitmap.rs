//! A dirty bitmap as an operator knows it: a name, states, and what each state refuses.
//!
//! Threads: control thread only. A job that uses a bitmap is given its [`Bits`] and works with those.

use std::sync::Arc;

use super::bits::{Bits, TooManyBits};
use crate::{Error, ErrorKind};

/// The smallest granularity.
pub const MIN_GRANULARITY_BYTES: u64 = 512;

/// The largest granularity; the qcow2 format has no larger one.
pub const MAX_GRANULARITY_BYTES: u64 = 1 << 31;

/// The longest name, in bytes; the qcow2 format keeps no longer one.
pub const MAX_NAME_BYTES: usize = 1023;

/// What an operator, a job or an export wants with a bitmap; what a state may refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// To remove it.
    Remove,
    /// To clear it.
    Clear,
    /// To begin recording.
    Enable,
    /// To stop recording.
    Disable,
    /// To add what other bitmaps have marked.
    MergeInto,
    /// To add what it has marked to another.
    MergeFrom,
    /// To read it for some time, as an export does.
    Use,
    /// To use it for some time and replace its content in the end, as a job does.
    Freeze,
    /// To give it another size.
    Resize,
}

/// What may keep a bitmap from being used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Busy,
    Inconsistent,
    ReadOnly,
}

/// What a query tells of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// How much is marked, in bytes: whole granules, so it may be more than the disk has.
    pub count_bytes: u64,
    /// Bytes of disk per bit.
    pub granularity_bytes: u64,
    /// Whether writes are noted, in it or in its successor.
    pub recording: bool,
    /// Whether a job or an export uses it.
    pub busy: bool,
    /// Whether it is to be kept in the image.
    pub persistent: bool,
    /// Whether it was found to be useless: it was not stored when its image was last written to.
    pub inconsistent: bool,
}

/// A persistent bitmap as an image keeps it: what a driver has read of it, or is to store.
#[derive(Clone)]
pub struct KeptBitmap {
    /// Its name, unique in the image.
    pub name: String,
    /// What it has marked, at its granularity; nothing of meaning if it is inconsistent.
    pub bits: Arc<Bits>,
    /// Whether it records.
    pub enabled: bool,
    /// Whether it was not stored when its image was last written to.
    pub inconsistent: bool,
}

/// What a bitmap had marked before it was changed: gives the change back with
/// [`DirtyBitmap::restore`], or forgets it when dropped.
#[must_use = "dropping it gives up the way back"]
pub struct Backup {
    bits: Bits,
    undoes: Undoes,
}

enum Undoes {
    Clear,
    Merge,
}

/// A named dirty bitmap of a node.
pub struct DirtyBitmap {
    node: Arc<str>,
    name: String,
    bits: Arc<Bits>,
    /// Records in place of `bits` while those are frozen.
    successor: Option<Arc<Bits>>,
    enabled: bool,
    persistent: bool,
    read_only: bool,
    inconsistent: bool,
    /// Who uses it, as messages name it: "job 'backup0'".
    user: Option<String>,
}

impl DirtyBitmap {
    /// A clean bitmap over `length` bytes of `node` that records, is not persistent and may be changed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the name has not 1 to [`MAX_NAME_BYTES`] bytes, or the granularity is
    /// no power of two from [`MIN_GRANULARITY_BYTES`] to [`MAX_GRANULARITY_BYTES`];
    /// [`ErrorKind::Unsupported`] if there would be too many bits.
    pub fn new(
        node: Arc<str>,
        name: &str,
        length: u64,
        granularity_bytes: u64,
    ) -> Result<Self, Error> {
        let refuse = |why: String| {
            Error::invalid(format!(
                "cannot add bitmap '{}' to node '{node}': {why}",
                shortened(name)
            ))
        };
        if name.is_empty() {
            return Err(refuse("a bitmap must have a name".into()));
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(refuse(format!(
                "its name has {} bytes and may have {MAX_NAME_BYTES}",
                name.len()
            )));
        }
        let granularities = MIN_GRANULARITY_BYTES..=MAX_GRANULARITY_BYTES;
        if !granularity_bytes.is_power_of_two() || !granularities.contains(&granularity_bytes) {
            return Err(refuse(format!(
                "the granularity must be a power of two from {MIN_GRANULARITY_BYTES} to \
                 {MAX_GRANULARITY_BYTES} bytes, not {granularity_bytes}"
            )));
        }
        let bits = Bits::new(length, granularity_bytes).map_err(|too_many| {
            Error::unsupported(format!(
                "cannot add bitmap '{name}' to node '{node}': {too_many}"
            ))
        })?;
        Ok(Self {
            node,
            name: name.into(),
            bits: Arc::new(bits),
            successor: None,
            enabled: true,
            persistent: false,
            read_only: false,
            inconsistent: false,
            user: None,
        })
    }

    /// A persistent bitmap that was kept in an image, which may be written to or not.
    pub(super) fn from_kept(node: Arc<str>, kept: KeptBitmap, read_only: bool) -> Self {
        Self {
            node,
            name: kept.name,
            bits: kept.bits,
            successor: None,
            enabled: kept.enabled && !kept.inconsistent,
            persistent: true,
            read_only,
            inconsistent: kept.inconsistent,
            user: None,
        }
    }

    /// What is to be kept of it. What was written while somebody has it frozen belongs to that.
    pub(crate) fn kept(&self) -> KeptBitmap {
        let bits = match &self.successor {
            None => Arc::clone(&self.bits),
            Some(successor) => {
                let all = self.bits.copy();
                all.merge(successor);
                Arc::new(all)
            }
        };
        KeptBitmap {
            name: self.name.clone(),
            bits,
            enabled: self.enabled,
            inconsistent: self.inconsistent,
        }
    }

    /// Takes over what the image keeps by now. Who uses the bitmap goes on to use it.
    pub(super) fn reload(&mut self, kept: KeptBitmap, read_only: bool) {
        self.bits = kept.bits;
        self.enabled = kept.enabled && !kept.inconsistent;
        self.inconsistent = kept.inconsistent;
        self.read_only = read_only;
    }

    /// Its name, unique on its node.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its content. While it is frozen, nothing is added to it.
    pub fn bits(&self) -> &Arc<Bits> {
        &self.bits
    }

    /// The bits in which writes are to be noted now, if any: its own, or its successor's.
    pub fn recording_bits(&self) -> Option<&Arc<Bits>> {
        self.enabled
            .then(|| self.successor.as_ref().unwrap_or(&self.bits))
    }

    /// What a query tells.
    pub fn status(&self) -> Status {
        let granularity_bytes = self.bits.granularity_bytes();
        Status {
            name: self.name.clone(),
            count_bytes: self.bits.count().saturating_mul(granularity_bytes),
            granularity_bytes,
            recording: self.enabled,
            busy: self.user.is_some(),
            persistent: self.persistent,
            inconsistent: self.inconsistent,
        }
    }

    /// Whether it is to be kept in the image.
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    /// Sets whether it is to be kept in the image. Whether the image can is the caller's to know.
    pub fn set_persistent(&mut self, persistent: bool) {
        self.persistent = persistent;
    }

    /// Whether it was stored in an image that may not be written to.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Sets whether its image may not be written to.
    pub fn set_read_only(&mut self, read_only: bool) {
        self.read_only = read_only;
    }

    /// Whether its content means nothing, because it was not stored when its image was last written to.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent
    }

    /// Notes that its content means nothing. It stops recording, and can only be removed.
    pub fn set_inconsistent(&mut self) {
        self.inconsistent = true;
        self.enabled = false;
    }

    /// Who uses it, as messages name it.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// Whether the bitmap's state lets `operation` begin.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Busy`] naming the user, [`ErrorKind::PermissionDenied`] for a read-only bitmap,
    /// [`ErrorKind::Corrupt`] for an inconsistent one.
    pub fn check(&self, operation: Operation) -> Result<(), Error> {
        if let Some(user) = &self.user
            && operation.is_refused_by(State::Busy)
        {
            return Err(self.refusal(operation, ErrorKind::Busy, &format!("{user} uses it")));
        }
        if self.inconsistent && operation.is_refused_by(State::Inconsistent) {
            return Err(self.refusal(
                operation,
                ErrorKind::Corrupt,
                "it is inconsistent, since it was not stored when its image was last written to; it \
                 can only be removed",
            ));
        }
        if self.read_only && operation.is_refused_by(State::ReadOnly) {
            return Err(self.refusal(
                operation,
                ErrorKind::PermissionDenied,
                "it is stored in an image that is open read-only",
            ));
        }
        Ok(())
    }

    /// Unmarks everything.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check) of [`Operation::Clear`].
    pub fn clear(&self) -> Result<(), Error> {
        self.check(Operation::Clear)?;
        self.bits.clear_all();
        Ok(())
    }

    /// Unmarks everything and gives out what was marked.
    ///
    /// # Errors
    ///
    /// As [`clear`](Self::clear).
    pub fn clear_with_backup(&self) -> Result<Backup, Error> {
        self.check(Operation::Clear)?;
        Ok(Backup {
            bits: self.bits.take(),
            undoes: Undoes::Clear,
        })
    }

    /// Marks what any of `sources` has marked; in all of them or, on an error, in none. Granularities
    /// may differ, nodes too.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the sizes differ, and those of [`check`](Self::check) for
    /// [`Operation::MergeInto`] here and [`Operation::MergeFrom`] there.
    pub fn merge(&self, sources: &[&Self]) -> Result<(), Error> {
        self.check_merge(sources)?;
        for source in sources {
            self.bits.merge(&source.bits);
        }
        Ok(())
    }

    /// As [`merge`](Self::merge), and gives out what was marked before.
    ///
    /// # Errors
    ///
    /// As [`merge`](Self::merge).
    pub fn merge_with_backup(&self, sources: &[&Self]) -> Result<Backup, Error> {
        self.check_merge(sources)?;
        let backup = Backup {
            bits: self.bits.copy(),
            undoes: Undoes::Merge,
        };
        self.merge(sources)?;
        Ok(backup)
    }

    /// Takes back what gave out `backup`. Several are taken back in reverse order.
    ///
    /// What was written since a clear stays marked. What was written since a merge may not: there, both
    /// happen within one drained section.
    ///
    /// # Panics
    ///
    /// If the bitmap was resized since.
    pub fn restore(&self, backup: Backup) {
        assert_eq!(
            backup.bits.length(),
            self.bits.length(),
            "not resized since"
        );
        match backup.undoes {
            Undoes::Clear => {}
            Undoes::Merge => self.bits.clear_all(),
        }
        self.bits.merge(&backup.bits);
    }

    /// Begins to record. A new recorder must follow.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check) of [`Operation::Enable`].
    pub fn enable(&mut self) -> Result<(), Error> {
        self.check(Operation::Enable)?;
        self.enabled = true;
        Ok(())
    }

    /// Stops recording. A new recorder must follow.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check) of [`Operation::Disable`].
    pub fn disable(&mut self) -> Result<(), Error> {
        self.check(Operation::Disable)?;
        self.enabled = false;
        Ok(())
    }

    /// Takes the bitmap for `user` ("export 'nbd0'"), who reads it. It goes on recording.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check) of [`Operation::Use`].
    pub fn hold(&mut self, user: &str) -> Result<(), Error> {
        self.check(Operation::Use)?;
        self.user = Some(user.into());
        Ok(())
    }

    /// The user has no use for it any more.
    ///
    /// # Panics
    ///
    /// If nobody held it, or it is frozen: that ends by [`abdicate`](Self::abdicate) or
    /// [`reclaim`](Self::reclaim).
    pub fn release(&mut self) {
        assert!(self.successor.is_none(), "a frozen bitmap has a successor");
        self.user.take().expect("held");
    }

    /// Takes the bitmap for `user` ("job 'backup0'"): what is written from now on is noted in a clean
    /// successor, if the bitmap recorded. A new recorder must follow.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check) of [`Operation::Freeze`].
    pub fn freeze(&mut self, user: &str) -> Result<(), Error> {
        self.check(Operation::Freeze)?;
        let successor = Bits::new(self.bits.length(), self.bits.granularity_bytes());
        self.successor = Some(Arc::new(successor.expect("the same shape as this one")));
        self.user = Some(user.into());
        Ok(())
    }

    /// The user is done: what was written meanwhile is the content from now on. Gives out the content
    /// until now. A new recorder need not follow.
    ///
    /// # Panics
    ///
    /// If the bitmap is not frozen.
    pub fn abdicate(&mut self) -> Arc<Bits> {
        let successor = self.successor.take().expect("frozen");
        self.user = None;
        std::mem::replace(&mut self.bits, successor)
    }

    /// The user has failed: what was written meanwhile is added to the content. In a drained section,
    /// and a new recorder must follow.
    ///
    /// # Panics
    ///
    /// If the bitmap is not frozen.
    pub fn reclaim(&mut self) {
        let successor = self.successor.take().expect("frozen");
        self.user = None;
        self.bits.merge(&successor);
    }

    /// The content as it would be with another length, to be handed to [`resized`](Self::resized).
    pub(super) fn prepare_resize(&self, length: u64) -> Result<Bits, Error> {
        self.check(Operation::Resize)?;
        self.bits.resized(length).map_err(|too_many: TooManyBits| {
            self.refusal(
                Operation::Resize,
                ErrorKind::Unsupported,
                &too_many.to_string(),
            )
        })
    }

    pub(super) fn resized(&mut self, bits: Bits) {
        self.bits = Arc::new(bits);
    }

    fn check_merge(&self, sources: &[&Self]) -> Result<(), Error> {
        self.check(Operation::MergeInto)?;
        for source in sources {
            source.check(Operation::MergeFrom)?;
            let (there, here) = (source.bits.length(), self.bits.length());
            if there != here {
                return Err(Error::invalid(format!(
                    "cannot merge bitmap '{}' of node '{}' into bitmap '{}' of node '{}': one is over \
                     {there} bytes and the other over {here}",
                    source.name, source.node, self.name, self.node
                )));
            }
        }
        Ok(())
    }

    fn refusal(&self, operation: Operation, kind: ErrorKind, why: &str) -> Error {
        let Self { name, node, .. } = self;
        let verb = operation.verb();
        Error::new(
            kind,
            format!("cannot {verb} bitmap '{name}' of node '{node}': {why}"),
        )
    }
}

impl Operation {
    /// Whether a bitmap in `state` refuses this.
    fn is_refused_by(self, state: State) -> bool {
        match (state, self) {
            // There is no second user, and nothing changes under the first.
            (State::Busy, _) => true,
            (State::Inconsistent, Self::Remove) => false,
            (State::Inconsistent, _) => true,
            // What is stored would have to change.
            (
                State::ReadOnly,
                Self::Remove | Self::Clear | Self::MergeInto | Self::Freeze | Self::Resize,
            ) => true,
            (State::ReadOnly, Self::Enable | Self::Disable | Self::MergeFrom | Self::Use) => false,
        }
    }

    fn verb(self) -> &'static str {
        match self {
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::MergeInto => "merge into",
            Self::MergeFrom => "merge",
            Self::Use | Self::Freeze => "use",
            Self::Resize => "resize",
        }
    }
}

/// The granularity of a bitmap for which none was asked: the image's cluster size within 4 KiB and
/// 64 KiB, or 64 KiB if the image has no clusters.
pub fn default_granularity_bytes(cluster_bytes: Option<u64>) -> u64 {
    let bytes = cluster_bytes.map_or(65536, |bytes| bytes.clamp(4096, 65536));
    1 << bytes.ilog2()
}

/// As much of a name as a message can show.
fn shortened(name: &str) -> &str {
    match name.char_indices().nth(64) {
        Some((end, _)) => &name[..end],
        None => name,
    }
}
