//! Error policies: what becomes of a request that failed. Pure.
//!
//! Whoever serves a guest or runs a job decides, as the block layer cannot tell one from the other: a
//! failure is reported, ignored, or *stopped* for, which means held until somebody decides and then tried
//! again from the start. Names and meanings are QEMU's (`rerror`, `werror`, `on-error`).
//!
//! What no policy applies to:
//!
//! * A **flush**. What it covered may be lost already, so trying again proves nothing: the failure is
//!   final, and reported ([`IoError::FlushLost`]). That goes for the flush that makes a write stable, too.
//! * An **answer** rather than a failure: nothing below can do it, or the range makes no sense. Space or
//!   a mended cable would not change it.

use super::RequestKind;
use crate::IoError;

/// What becomes of requests that fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The failure is reported to whoever asked.
    #[default]
    Report,
    /// The request counts as done. What was to be read is then anything.
    Ignore,
    /// Held if the host has no space left, else reported.
    Enospc,
    /// Held.
    Stop,
}

impl OnError {
    /// As operators write it.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("report", Self::Report),
        ("ignore", Self::Ignore),
        ("enospc", Self::Enospc),
        ("stop", Self::Stop),
    ];

    /// The policy called `name`.
    pub fn named(name: &str) -> Option<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, policy)| *policy)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let found = Self::NAMES.iter().find(|(_, known)| *known == self);
        found.map_or("", |(name, _)| name)
    }

    /// What to do about `error`, met by a read, a write, a zeroing or a discard.
    pub fn action(self, error: IoError) -> Action {
        match (self, error) {
            (_, IoError::Unsupported | IoError::OutOfRange | IoError::FlushLost)
            | (Self::Report, _) => Action::Report,
            (Self::Ignore, _) => Action::Ignore,
            (Self::Enospc, IoError::NoSpace) | (Self::Stop, _) => Action::Stop,
            (Self::Enospc, _) => Action::Report,
        }
    }

    fn may_stop(self) -> bool {
        matches!(self, Self::Enospc | Self::Stop)
    }
}

/// What to do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell whoever asked.
    Report,
    /// Say that it was done.
    Ignore,
    /// Hold the request until somebody decides, then try again.
    Stop,
}

/// The policies of one user of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorPolicy {
    /// For reads.
    pub reads: OnError,
    /// For writes, zeroes and discards.
    pub writes: OnError,
}

impl ErrorPolicy {
    /// What to do about a request that failed.
    pub fn action(&self, kind: RequestKind, error: IoError) -> Action {
        match kind {
            RequestKind::Read => self.reads.action(error),
            RequestKind::Write | RequestKind::WriteZeroes | RequestKind::Discard => {
                self.writes.action(error)
            }
            RequestKind::Flush | RequestKind::Truncate | RequestKind::Other => Action::Report,
        }
    }

    /// Whether it can stop for something, so that an [`IoStatus`] has a meaning. QEMU does not count
    /// `enospc` for reads, which cannot run out of space.
    pub fn may_stop(&self) -> bool {
        self.reads == OnError::Stop || self.writes.may_stop()
    }
}

/// Whether a disk was stopped for a failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No.
    #[default]
    Ok,
    /// Yes.
    Failed,
    /// Yes, as the host had no space left.
    NoSpace,
}

impl IoStatus {
    /// As QEMU calls them.
    pub const NAMES: [(&'static str, Self); 3] = [
        ("ok", Self::Ok),
        ("failed", Self::Failed),
        ("nospace", Self::NoSpace),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        let found = Self::NAMES.iter().find(|(_, known)| *known == self);
        found.map_or("", |(name, _)| name)
    }

    /// The status once the disk was stopped for `error`: the first one stays until all is resumed.
    #[must_use]
    pub fn after(self, error: IoError) -> Self {
        match (self, error) {
            (Self::Ok, IoError::NoSpace) => Self::NoSpace,
            (Self::Ok, _) => Self::Failed,
            (earlier, _) => earlier,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ERRORS: [IoError; 7] = [
        IoError::Failed,
        IoError::NoSpace,
        IoError::Unsupported,
        IoError::OutOfRange,
        IoError::ReadOnly,
        IoError::Busy,
        IoError::FlushLost,
    ];

    #[test]
    fn each_policy_does_what_its_name_says() {
        for error in ERRORS {
            let answer = matches!(
                error,
                IoError::Unsupported | IoError::OutOfRange | IoError::FlushLost
            );
            let unless_answer = |action| if answer { Action::Report } else { action };
            let no_space = match error {
                IoError::NoSpace => Action::Stop,
                _ => Action::Report,
            };
            for (policy, action) in [
                (OnError::Report, Action::Report),
                (OnError::Ignore, unless_answer(Action::Ignore)),
                (OnError::Enospc, no_space),
                (OnError::Stop, unless_answer(Action::Stop)),
            ] {
                assert_eq!(policy.action(error), action, "{policy:?}, {error:?}");
            }
        }
    }

    #[test]
    fn a_flush_is_neither_ignored_nor_held() {
        let ignore = OnError::Ignore;
        for policy in [ignore, OnError::Enospc, OnError::Stop] {
            let policy = ErrorPolicy {
                reads: policy,
                writes: policy,
            };
            for error in ERRORS {
                let action = policy.action(RequestKind::Flush, error);
                assert_eq!(action, Action::Report, "{policy:?}, {error:?}");
            }
        }
    }

    #[test]
    fn reads_and_changes_have_policies_of_their_own() {
        let policy = ErrorPolicy {
            reads: OnError::Ignore,
            writes: OnError::Stop,
        };
        let action = |kind| policy.action(kind, IoError::Failed);
        assert_eq!(action(RequestKind::Read), Action::Ignore);
        for kind in [
            RequestKind::Write,
            RequestKind::WriteZeroes,
            RequestKind::Discard,
        ] {
            assert_eq!(action(kind), Action::Stop);
        }
    }

    #[test]
    fn names_lead_to_what_they_name() {
        for (name, policy) in OnError::NAMES {
            assert_eq!(OnError::named(name), Some(policy));
            assert_eq!(policy.name(), name);
        }
        assert_eq!(OnError::named("auto"), None);
        assert_eq!(IoStatus::NoSpace.name(), "nospace");
    }

    #[test]
    fn the_first_failure_is_the_status_until_it_is_reset() {
        let status = IoStatus::default();
        assert_eq!(status.after(IoError::Failed), IoStatus::Failed);
        assert_eq!(status.after(IoError::NoSpace), IoStatus::NoSpace);
        let failed = status.after(IoError::Failed);
        assert_eq!(failed.after(IoError::NoSpace), IoStatus::Failed);
        let no_space = status.after(IoError::NoSpace);
        assert_eq!(no_space.after(IoError::Failed), IoStatus::NoSpace);
    }

    #[test]
    fn only_what_can_stop_has_a_status() {
        let may_stop = |reads, writes| ErrorPolicy { reads, writes }.may_stop();
        assert!(!may_stop(OnError::Report, OnError::Ignore));
        assert!(!may_stop(OnError::Enospc, OnError::Report));
        assert!(may_stop(OnError::Stop, OnError::Report));
        assert!(may_stop(OnError::Report, OnError::Enospc));
    }
}
