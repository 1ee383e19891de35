//! The two kinds of failure: [`Error`] for people and control, [`IoError`] for a guest.
//!
//! Global-state calls return [`Error`]: code matches on its [`ErrorKind`], people read its sentence.
//! I/O calls return [`IoError`], which is small, `Copy`, and becomes a status in the guest's request.

use std::fmt;

use rustix::io::Errno;

/// What kind of thing went wrong; what code may match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The named thing does not exist.
    NotFound,
    /// The named thing exists already.
    Exists,
    /// The host refused access.
    PermissionDenied,
    /// Somebody else holds what was asked for.
    Busy,
    /// The request makes no sense as it stands.
    Invalid,
    /// The request makes sense, and this version or this host cannot do it.
    Unsupported,
    /// An image contradicts its format.
    Corrupt,
    /// The host has no space left.
    NoSpace,
    /// The host failed to read, write or flush.
    Io,
}

/// A refusal or failure with a sentence for a person: lower case, no full stop.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// [`ErrorKind::Invalid`] with `message`.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// [`ErrorKind::Unsupported`] with `message`.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// [`ErrorKind::Busy`] with `message`.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Busy, message)
    }

    /// What the host answered, with what was tried; `errno` becomes the source.
    pub fn host(message: impl Into<String>, errno: Errno) -> Self {
        let kind = match errno {
            Errno::NOENT | Errno::NOTDIR => ErrorKind::NotFound,
            Errno::EXIST => ErrorKind::Exists,
            Errno::ACCESS | Errno::PERM | Errno::ROFS => ErrorKind::PermissionDenied,
            Errno::BUSY | Errno::TXTBSY => ErrorKind::Busy,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => ErrorKind::NoSpace,
            Errno::INVAL | Errno::ISDIR | Errno::NAMETOOLONG | Errno::LOOP => ErrorKind::Invalid,
            Errno::OPNOTSUPP | Errno::NOSYS => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        Self {
            kind,
            message: message.into(),
            source: Some(Box::new(std::io::Error::from(errno))),
        }
    }

    /// The kind, for code to match on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The sentence followed by those of its sources, for a log line or a terminal.
    pub fn report(&self) -> String {
        let mut text = self.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(source) = next {
            text.push_str(": ");
            text.push_str(&source.to_string());
            next = source.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

/// How a request failed, as far as a guest can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoError {
    /// The host failed to read or write (`EIO` and everything without a word of its own).
    Failed,
    /// The host has no space left (`ENOSPC`).
    NoSpace,
    /// Nothing below can do it, and no fall-back was wanted (`ENOTSUP`).
    Unsupported,
    /// The range is outside the node, or not aligned as the node demands (`EINVAL`).
    OutOfRange,
    /// The node is read-only (`EPERM`).
    ReadOnly,
    /// It would have had to wait, and was asked not to (`EBUSY`).
    Busy,
    /// An earlier flush of this file failed: what it covered may be lost, so no later flush can
    /// succeed until the node is opened again.
    FlushLost,
}

impl From<Errno> for IoError {
    fn from(errno: Errno) -> Self {
        match errno {
            // Not a file that may not get longer: room on the host does not help that.
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace,
            Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY => Self::Unsupported,
            Errno::ROFS | Errno::PERM => Self::ReadOnly,
            _ => Self::Failed,
        }
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed => "input/output error",
            Self::NoSpace => "no space left on the host",
            Self::Unsupported => "operation not supported",
            Self::OutOfRange => "range outside the node or not aligned",
            Self::ReadOnly => "node is read-only",
            Self::Busy => "another request is in the way",
            Self::FlushLost => "an earlier flush failed; the node must be opened again",
        })
    }
}

impl std::error::Error for IoError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_error_is_reported_with_what_was_tried_and_what_the_host_said() {
        let error = Error::host("cannot open 'disk.raw'", Errno::NOENT);
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(
            error.report(),
            "cannot open 'disk.raw': No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_full_disk_has_a_word_of_its_own() {
        assert_eq!(IoError::from(Errno::NOSPC), IoError::NoSpace);
        assert_eq!(IoError::from(Errno::IO), IoError::Failed);
        assert_eq!(IoError::from(Errno::FBIG), IoError::Failed);
    }
}
