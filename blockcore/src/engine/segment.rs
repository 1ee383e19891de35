//! Shared memory that outlives the process: a file, mapped, that holds what a kill must not take with it.
//!
//! The file is meant to be on a tmpfs: what was stored there survives the process and not the host. A store
//! must not find the host without memory, which would end the process: the space of its first page is taken
//! when it is made, that of others by who uses them, before.
//!
//! What an earlier life left is untrusted: any word may hold anything, and may change while it is looked
//! at if somebody else has the file open.
//!
//! Threads: any. Words are atomics.

#![expect(
    unsafe_code,
    reason = "maps a file that others may have, too, and looks at it as words"
)]

use std::fmt;
use std::fs::{DirBuilder, File};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes in a word.
const WORD_BYTES: u64 = 8;
/// What space is taken for when a segment is made.
const PAGE_BYTES: u64 = 4096;

/// See the module's header.
pub struct Segment {
    file: File,
    mapping: Mapping,
}

impl Segment {
    /// The error of [`HostCall::OpenSegment`](super::HostCall::OpenSegment) for a file that is there and
    /// has another length: of another version, or of something else.
    pub const OTHER_LENGTH: Errno = Errno::MSGSIZE;

    /// All of it.
    pub fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }

    /// Takes the host's memory for a range of words, which keep what they have.
    ///
    /// # Errors
    ///
    /// `ENOSPC` where there is none left.
    pub fn take_space(&self, words: Range<usize>) -> Result<(), Errno> {
        let (offset, bytes) = byte_range(words);
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, bytes)
    }

    /// Gives the host its memory for a range of words back. They are zero afterwards.
    pub fn give_back(&self, words: Range<usize>) {
        let (offset, bytes) = byte_range(words.clone());
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&self.file, flags, offset, bytes).is_err() {
            for word in &self.words()[words] {
                if word.load(Ordering::Relaxed) != 0 {
                    word.store(0, Ordering::Relaxed);
                }
            }
        }
    }

    /// One that a simulated host keeps: no file has it.
    pub(super) fn simulated(bytes: u64) -> Result<Arc<Self>, Errno> {
        let words = words(bytes)?;
        let file = rustix::fs::memfd_create("segment", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, bytes)?;
        Self::map(file.into(), words)
    }

    fn map(file: File, words: usize) -> Result<Arc<Self>, Errno> {
        let mapping = Mapping::new(&file, words)?;
        Ok(Arc::new(Self { file, mapping }))
    }
}

/// Offset and length in bytes.
fn byte_range(words: Range<usize>) -> (u64, u64) {
    let offset = words.start as u64 * WORD_BYTES;
    (offset, words.len() as u64 * WORD_BYTES)
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Segment of {} words", self.words().len())
    }
}

/// How many words a segment of `bytes` bytes has.
///
/// # Errors
///
/// `EINVAL` for none, or a part of one.
pub(super) fn words(bytes: u64) -> Result<usize, Errno> {
    let words = usize::try_from(bytes / WORD_BYTES).map_err(|_| Errno::INVAL)?;
    match words > 0 && bytes.is_multiple_of(WORD_BYTES) {
        true => Ok(words),
        false => Err(Errno::INVAL),
    }
}

/// Opens the segment at `path`, made of zeroes if there is none, with its directory if there is none of
/// that. Returns whether it was there.
///
/// # Errors
///
/// [`Segment::OTHER_LENGTH`]; `EPERM` for what is no file of this user's own; `ENOSPC`.
pub(super) fn open(path: &Path, bytes: u64) -> Result<(Arc<Segment>, bool), Errno> {
    let words = words(bytes)?;
    let file = open_file(path)?;
    let found = file.metadata().map_err(|error| errno(&error))?;
    let own = found.uid() == rustix::process::geteuid().as_raw();
    if !found.is_file() || !own {
        return Err(Errno::PERM);
    }
    // One without a length was never finished.
    let existed = found.len() > 0;
    if existed && found.len() != bytes {
        return Err(Segment::OTHER_LENGTH);
    }
    if !existed {
        // In this order: one that was not finished has another length.
        let first = bytes.min(PAGE_BYTES);
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, first)?;
        rustix::fs::ftruncate(&file, bytes)?;
    }
    Ok((Segment::map(file, words)?, existed))
}

fn open_file(path: &Path) -> Result<File, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    // A FIFO would hold the open until it has another end.
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let open = || rustix::fs::open(path, flags, Mode::from_raw_mode(0o600));
    let opened = match (open(), path.parent()) {
        (Err(Errno::NOENT), Some(directory)) => {
            let made = DirBuilder::new().mode(0o700).create(directory);
            match made {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(errno(&error));
                }
                _ => open(),
            }
        }
        (opened, _) => opened,
    };
    opened.map(File::from)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// A file in this process's memory, unmapped when dropped.
struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is mapped until this is dropped, belongs to no thread, and is looked at as atomics
// only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, words: usize) -> Result<Self, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing is mapped over.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                words * WORD_BYTES as usize,
                protection,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(Errno::FAULT)?;
        Ok(Self { start, words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `new` mapped so many words for reading and writing, page-aligned, and they stay mapped
        // while `self` is borrowed; whoever else has the file changes them as atomics may be changed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, and nobody borrows it any more.
        let unmapped = unsafe {
            rustix::mm::munmap(self.start.as_ptr().cast(), self.words * WORD_BYTES as usize)
        };
        debug_assert!(unmapped.is_ok(), "it was mapped so");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_was_stored_is_there_when_it_is_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run").join("disk");
        let (segment, existed) = open(&path, 8192).unwrap();
        assert!(!existed);
        assert_eq!(segment.words().len(), 1024);
        assert!(
            segment
                .words()
                .iter()
                .all(|word| word.load(Ordering::Relaxed) == 0)
        );
        segment.words()[1023].store(7, Ordering::Relaxed);
        // Two at once see the same.
        let (other, existed) = open(&path, 8192).unwrap();
        assert!(existed);
        assert_eq!(other.words()[1023].load(Ordering::Relaxed), 7);
        drop((segment, other));
        let (again, existed) = open(&path, 8192).unwrap();
        assert!(existed);
        assert_eq!(again.words()[1023].load(Ordering::Relaxed), 7);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        // The space of its first page is taken.
        assert_eq!(path.metadata().unwrap().blocks() * 512, 8192);
    }

    #[test]
    fn space_is_taken_and_given_back_by_range() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let (segment, _) = open(&path, 16 << 12).unwrap();
        let space = || path.metadata().unwrap().blocks() * 512;
        assert_eq!(space(), 1 << 12);
        segment.take_space(512..4 * 512).unwrap();
        assert_eq!(space(), 4 << 12);
        segment.words()[512].store(7, Ordering::Relaxed);
        segment.words()[3 * 512].store(8, Ordering::Relaxed);
        segment.give_back(512..3 * 512);
        assert_eq!(space(), 2 << 12);
        let word = |index: usize| segment.words()[index].load(Ordering::Relaxed);
        assert_eq!((word(512), word(3 * 512)), (0, 8));
        assert_eq!(path.metadata().unwrap().len(), 16 << 12);
    }

    #[test]
    fn another_length_a_link_and_what_is_no_file_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        drop(open(&path, 4096).unwrap());
        assert_eq!(open(&path, 8192).unwrap_err(), Segment::OTHER_LENGTH);
        assert_eq!(path.metadata().unwrap().len(), 4096);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(open(&link, 4096).unwrap_err(), Errno::LOOP);
        assert_eq!(open(Path::new("/dev/null"), 4096).unwrap_err(), Errno::PERM);
        assert_eq!(
            open(&directory.path().join("odd"), 12).unwrap_err(),
            Errno::INVAL
        );
        assert_eq!(
            open(&directory.path().join("none"), 0).unwrap_err(),
            Errno::INVAL
        );
        let deep = directory.path().join("not").join("there").join("disk");
        assert_eq!(open(&deep, 4096).unwrap_err(), Errno::NOENT);
    }

    #[test]
    fn one_that_was_never_finished_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        File::create(&path).unwrap();
        let (segment, existed) = open(&path, 4096).unwrap();
        assert!(!existed);
        assert_eq!(segment.words().len(), 512);
    }
}
