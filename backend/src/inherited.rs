//! Descriptors that whoever started this process has left open for it, by number.

use std::os::fd::{OwnedFd, RawFd};

use blockcore::Error;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// A duplicate of descriptor `number`, which stays open.
///
/// # Errors
///
/// There is no such descriptor; a host that does not let us look (Linux before 5.6, or a sandbox).
pub fn duplicate(number: RawFd) -> Result<OwnedFd, Error> {
    let myself = pidfd_open(getpid(), PidfdFlags::empty());
    let duplicate = myself.and_then(|me| pidfd_getfd(me, number, PidfdGetfdFlags::empty()));
    duplicate.map_err(|errno| Error::host(format!("cannot take descriptor {number}"), errno))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_duplicate_is_the_same_socket_and_there_is_none_of_what_is_not_open() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut copy = UnixStream::from(duplicate(ours.as_raw_fd()).unwrap());
        drop(ours);
        theirs.write_all(b"x").unwrap();
        let mut byte = [0];
        copy.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        let error = duplicate(1 << 20).unwrap_err().to_string();
        assert!(error.contains("descriptor 1048576"), "{error}");
    }
}
