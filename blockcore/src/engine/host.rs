//! Blocking host calls: what the pool runs for the real engines.
//!
//! Each function is one or a few system calls, retried on `EINTR`, and gives the host's error as it
//! is. Nothing here knows of workers or tasks.
//!
//! Threads: the pool's, and before the workers exist any.

#![expect(
    unsafe_code,
    reason = "system calls on raw memory segments, lock and ioctl structures"
)]

use std::fs;
use std::net::ToSocketAddrs;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{
    Allocate, FileKind, FileType, HostCall, HostReply, Metadata, OpResult, OpenFile, OpenOptions,
    segment,
};
use crate::io::buffer::Segment;

/// Most segments that the kernel takes in one call (`IOV_MAX`).
pub(super) const MAX_SEGMENTS: usize = 1024;

/// Does a host call, however long it takes.
pub(super) fn call(call: HostCall) -> Result<HostReply, Errno> {
    let done = |()| HostReply::Done;
    match call {
        HostCall::Open(path, options) => open(&path, &options).map(HostReply::File),
        HostCall::Metadata(file) => {
            metadata(fd(&file)?).map(|metadata| HostReply::Metadata(Box::new(metadata)))
        }
        HostCall::Truncate(file, bytes) => rustix::fs::ftruncate(fd(&file)?, bytes).map(done),
        HostCall::LockShared(file, byte) => {
            lock(fd(&file)?, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map(drop_lock)
        }
        HostCall::LockExclusive(file, byte) => {
            lock(fd(&file)?, libc::F_OFD_SETLK, libc::F_WRLCK, byte).map(drop_lock)
        }
        HostCall::Unlock(file, byte) => {
            lock(fd(&file)?, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(drop_lock)
        }
        HostCall::TestLock(file, byte) => {
            let found = lock(fd(&file)?, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
            if i32::from(found.l_type) == libc::F_UNLCK {
                Ok(HostReply::Done)
            } else {
                Err(Errno::AGAIN)
            }
        }
        HostCall::DeviceDiscard(file, offset, bytes) => {
            device_range(fd(&file)?, BLKDISCARD, offset, bytes).map(done)
        }
        HostCall::DeviceZero(file, offset, bytes) => {
            device_range(fd(&file)?, BLKZEROOUT, offset, bytes).map(done)
        }
        HostCall::Reserve(file, offset, bytes) => {
            fallocate(fd(&file)?, 0, offset, bytes).map(|_| HostReply::Done)
        }
        HostCall::DropCache(file) => {
            rustix::fs::fadvise(fd(&file)?, 0, None, rustix::fs::Advice::DontNeed).map(done)
        }
        HostCall::SetNocow(file) => set_nocow(fd(&file)?).map(done),
        HostCall::SetExtentSizeHint(file, bytes) => {
            set_extent_size_hint(fd(&file)?, bytes).map(done)
        }
        HostCall::OpenSegment { path, bytes } => {
            let (segment, existed) = segment::open(&path, bytes)?;
            Ok(HostReply::Segment { segment, existed })
        }
        HostCall::Remove(path) => rustix::fs::unlink(&path).map(done),
        HostCall::Rename(from, to) => rustix::fs::rename(&from, &to).map(done),
        HostCall::SyncDirectory(path) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(&path, flags, Mode::empty())?;
            retry(|| rustix::fs::fsync(&directory)).map(done)
        }
        HostCall::Canonical(path) => match std::fs::canonicalize(&path) {
            Ok(path) => Ok(HostReply::Path(path)),
            Err(error) => Err(error
                .raw_os_error()
                .map_or(Errno::IO, Errno::from_raw_os_error)),
        },
        HostCall::Resolve(name, port) => {
            let found = (name.as_str(), port).to_socket_addrs();
            let addresses = found.map_or_else(|_| Vec::new(), Iterator::collect);
            Ok(HostReply::Addresses(addresses))
        }
        HostCall::DataExtent(file, offset) => {
            data_extent(fd(&file)?, offset).map(HostReply::Extent)
        }
        HostCall::CopyRange {
            from,
            mut offset,
            to,
            mut to_offset,
            bytes,
        } => {
            let bytes = usize::try_from(bytes)
                .unwrap_or(usize::MAX)
                .min(MAX_COPY_BYTES);
            let (from, to) = (fd(&from)?, fd(&to)?);
            let copied = rustix::fs::copy_file_range(
                from,
                Some(&mut offset),
                to,
                Some(&mut to_offset),
                bytes,
            );
            copied.map(|bytes| HostReply::Copied(bytes as u64))
        }
    }
}

/// Longest copy in one call, which cannot be interrupted.
const MAX_COPY_BYTES: usize = 1 << 30;

fn drop_lock(_: libc::flock) -> HostReply {
    HostReply::Done
}

fn fd(file: &OpenFile) -> Result<BorrowedFd<'_>, Errno> {
    file.fd().ok_or(Errno::BADF)
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

fn errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn open(path: &Path, options: &OpenOptions) -> Result<std::sync::Arc<OpenFile>, Errno> {
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY;
    flags |= if options.write {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    if options.create {
        flags |= OFlags::CREATE | OFlags::EXCL;
    }
    // A FIFO would hold the open until it has another end; nothing that we can use blocks here.
    flags |= OFlags::NONBLOCK;
    let mode = Mode::from_raw_mode(0o644);
    let fd: OwnedFd = retry(|| rustix::fs::open(path, flags, mode))?;
    let now = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, now - OFlags::NONBLOCK)?;
    Ok(OpenFile::new(FileKind::Host(fd), path.to_owned()))
}

fn metadata(fd: BorrowedFd<'_>) -> Result<Metadata, Errno> {
    let file = fs::File::from(fd.try_clone_to_owned().map_err(|_| errno())?);
    let found = file.metadata().map_err(|_| errno())?;
    let direct = rustix::fs::fcntl_getfl(fd)?.contains(OFlags::DIRECT);
    let kind = found.file_type();
    let mut metadata = Metadata {
        file_type: FileType::Regular,
        bytes: found.len(),
        allocated_bytes: found.blocks() * 512,
        device: found.dev(),
        inode: found.ino(),
        direct_alignment: 1,
        memory_alignment: 1,
        logical_block_bytes: 512,
        physical_block_bytes: found.blksize().clamp(512, 65536) as u32,
        optimal_io_bytes: 0,
        discard_granularity_bytes: found.blksize().clamp(512, 1 << 30) as u32,
        read_only: false,
    };
    if kind.is_block_device() {
        metadata.file_type = FileType::BlockDevice;
        device_limits(fd, found.rdev(), &mut metadata)?;
    } else if !kind.is_file() {
        metadata.file_type = FileType::Other(match () {
            () if kind.is_dir() => "directory",
            () if kind.is_char_device() => "character device",
            () if kind.is_socket() => "socket",
            () if kind.is_fifo() => "pipe",
            () => "special file",
        });
    }
    if direct && !matches!(metadata.file_type, FileType::Other(_)) {
        let (memory, offset) = direct_alignment(fd, &metadata);
        metadata.memory_alignment = memory;
        metadata.direct_alignment = offset;
    }
    Ok(metadata)
}

const BLKROGET: libc::Ioctl = 0x125e;
const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKIOOPT: libc::Ioctl = 0x1279;
const BLKPBSZGET: libc::Ioctl = 0x127b;
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272_u32 as libc::Ioctl;
const FS_IOC_GETFLAGS: libc::Ioctl = 0x8008_6601_u32 as libc::Ioctl;
const FS_IOC_SETFLAGS: libc::Ioctl = 0x4008_6602_u32 as libc::Ioctl;
const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820_u32 as libc::Ioctl;
/// `FS_NOCOW_FL` of the kernel's `linux/fs.h`.
const FS_NOCOW_FL: libc::c_long = 0x0080_0000;
/// `FS_XFLAG_EXTSIZE` of the kernel's `linux/fs.h`.
const FS_XFLAG_EXTSIZE: u32 = 0x0000_0800;

/// One `ioctl` that reads or writes a plain value of the size that its request code expects.
fn ioctl<T>(fd: RawFd, request: libc::Ioctl, value: &mut T) -> Result<(), Errno> {
    retry(|| {
        // SAFETY: the callers below pair each request code with the type that the kernel's headers
        // give for it, and `value` is a live exclusive reference.
        let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(value)) };
        if result < 0 { Err(errno()) } else { Ok(()) }
    })
}

fn device_limits(fd: BorrowedFd<'_>, rdev: u64, metadata: &mut Metadata) -> Result<(), Errno> {
    let raw = fd.as_raw_fd();
    let mut bytes = 0_u64;
    ioctl(raw, BLKGETSIZE64, &mut bytes)?;
    metadata.bytes = bytes;
    let mut logical: libc::c_int = 512;
    ioctl(raw, BLKSSZGET, &mut logical)?;
    metadata.logical_block_bytes = logical.unsigned_abs();
    let mut physical: libc::c_uint = 0;
    metadata.physical_block_bytes = match ioctl(raw, BLKPBSZGET, &mut physical) {
        Ok(()) => physical.max(metadata.logical_block_bytes),
        Err(_) => metadata.logical_block_bytes,
    };
    let mut optimal: libc::c_uint = 0;
    if ioctl(raw, BLKIOOPT, &mut optimal).is_ok() {
        metadata.optimal_io_bytes = optimal;
    }
    let mut read_only: libc::c_int = 0;
    if ioctl(raw, BLKROGET, &mut read_only).is_ok() {
        metadata.read_only = read_only != 0;
    }
    let queue = format!(
        "/sys/dev/block/{}:{}/queue/discard_granularity",
        libc::major(rdev),
        libc::minor(rdev)
    );
    metadata.discard_granularity_bytes = fs::read_to_string(queue)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    Ok(())
}

/// What direct I/O on this description must be aligned to: memory, then offset and length.
///
/// Newer kernels say so (`STATX_DIOALIGN`). Otherwise reads are tried, smallest unit first, as a
/// file system may demand more than its device's logical block.
fn direct_alignment(fd: BorrowedFd<'_>, metadata: &Metadata) -> (u32, u32) {
    if let Ok(found) = rustix::fs::statx(
        fd,
        c"",
        rustix::fs::AtFlags::EMPTY_PATH,
        rustix::fs::StatxFlags::from_bits_retain(libc::STATX_DIOALIGN),
    ) && found.stx_mask & libc::STATX_DIOALIGN != 0
        && found.stx_dio_offset_align != 0
    {
        return (
            found.stx_dio_mem_align.max(1),
            found.stx_dio_offset_align.max(metadata.logical_block_bytes),
        );
    }
    let memory = crate::io::buffer::Segments::allocate(65536, 65536);
    for unit in [512_u32, 1024, 2048, 4096] {
        let probe = memory.slice(0, u64::from(unit));
        if unit >= metadata.logical_block_bytes && read(fd, 0, probe.list()).is_ok() {
            return (unit.max(512), unit);
        }
    }
    (4096, 4096)
}

fn segments_for_kernel(segments: &[Segment]) -> (*const libc::iovec, libc::c_int) {
    let count = segments.len().min(MAX_SEGMENTS);
    (segments.as_ptr().cast(), count as libc::c_int)
}

/// Reads into `segments`, at most the kernel's limit of them.
pub(super) fn read(fd: BorrowedFd<'_>, offset: u64, segments: &[Segment]) -> OpResult {
    retry(|| {
        let (list, count) = segments_for_kernel(segments);
        // SAFETY: `Segment` has the layout of `iovec`, and `Segments` keeps its memory mapped.
        let result = unsafe { libc::preadv(fd.as_raw_fd(), list, count, offset as libc::off_t) };
        u64::try_from(result).map_err(|_| errno())
    })
}

/// As [`read`], but gives `EAGAIN` instead of waiting for the disk.
pub(super) fn read_cached(fd: BorrowedFd<'_>, offset: u64, segments: &[Segment]) -> OpResult {
    let (list, count) = segments_for_kernel(segments);
    // SAFETY: as in `read`.
    let result = unsafe {
        libc::preadv2(
            fd.as_raw_fd(),
            list,
            count,
            offset as libc::off_t,
            libc::RWF_NOWAIT,
        )
    };
    u64::try_from(result).map_err(|_| errno())
}

/// Writes from `segments`, at most the kernel's limit of them.
pub(super) fn write(fd: BorrowedFd<'_>, offset: u64, segments: &[Segment]) -> OpResult {
    retry(|| {
        let (list, count) = segments_for_kernel(segments);
        // SAFETY: as in `read`.
        let result = unsafe { libc::pwritev(fd.as_raw_fd(), list, count, offset as libc::off_t) };
        u64::try_from(result).map_err(|_| errno())
    })
}

/// As [`write`], but gives `EAGAIN` instead of waiting, and `EOPNOTSUPP` where the file system cannot
/// tell.
pub(super) fn write_cached(fd: BorrowedFd<'_>, offset: u64, segments: &[Segment]) -> OpResult {
    let (list, count) = segments_for_kernel(segments);
    // SAFETY: as in `read`.
    let result = unsafe {
        libc::pwritev2(
            fd.as_raw_fd(),
            list,
            count,
            offset as libc::off_t,
            libc::RWF_NOWAIT,
        )
    };
    u64::try_from(result).map_err(|_| errno())
}

/// Receives into `segments` what is there, at most the kernel's limit of them; never waits. Zero is the end.
pub(super) fn receive(fd: BorrowedFd<'_>, segments: &[Segment]) -> OpResult {
    retry(|| {
        let mut message = message(segments);
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: as in `read`; the header lives until the call returns.
        let result = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
        u64::try_from(result).map_err(|_| errno())
    })
}

/// Sends from `segments` what there is room for, at most the kernel's limit of them; never waits.
pub(super) fn send(fd: BorrowedFd<'_>, segments: &[Segment]) -> OpResult {
    retry(|| {
        let message = message(segments);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as in `receive`.
        let result = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) };
        u64::try_from(result).map_err(|_| errno())
    })
}

fn message(segments: &[Segment]) -> libc::msghdr {
    let (list, count) = segments_for_kernel(segments);
    // SAFETY: all zeroes is a header of nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.cast_mut();
    message.msg_iovlen = count as _;
    message
}

/// Involuntary context switches of the calling thread.
pub(super) fn preemptions() -> u64 {
    // SAFETY: a zeroed `rusage` is a valid one, and lives until the call returns.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage
    };
    usage.ru_nivcsw as u64
}

/// Makes completed writes durable.
pub(super) fn sync(fd: BorrowedFd<'_>) -> OpResult {
    // Never retried by itself: an interrupted sync tells nothing of what it covered.
    rustix::fs::fdatasync(fd).map(|()| 0)
}

/// The `fallocate` mode for an [`Allocate`].
pub(super) fn allocate_mode(mode: Allocate) -> i32 {
    match mode {
        Allocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        Allocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        Allocate::Reserve => libc::FALLOC_FL_KEEP_SIZE,
    }
}

/// Changes the allocation of a range; see [`allocate_mode`].
pub(super) fn fallocate(fd: BorrowedFd<'_>, mode: i32, offset: u64, bytes: u64) -> OpResult {
    retry(|| {
        // SAFETY: plain integers.
        let result = unsafe {
            libc::fallocate(
                fd.as_raw_fd(),
                mode,
                offset as libc::off_t,
                bytes as libc::off_t,
            )
        };
        if result < 0 { Err(errno()) } else { Ok(0) }
    })
}

fn device_range(
    fd: BorrowedFd<'_>,
    request: libc::Ioctl,
    offset: u64,
    bytes: u64,
) -> Result<(), Errno> {
    ioctl(fd.as_raw_fd(), request, &mut [offset, bytes])
}

fn lock(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    byte: u64,
) -> Result<libc::flock, Errno> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte as libc::off_t,
        l_len: 1,
        l_pid: 0,
    };
    retry(|| {
        // SAFETY: the lock commands take a `struct flock`, which lives until the call returns.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(&mut lock)) };
        if result < 0 { Err(errno()) } else { Ok(()) }
    })
    .map_err(|error| match error {
        Errno::ACCESS => Errno::AGAIN,
        error => error,
    })?;
    Ok(lock)
}

fn set_nocow(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut flags: libc::c_long = 0;
    ioctl(fd.as_raw_fd(), FS_IOC_GETFLAGS, &mut flags)?;
    flags |= FS_NOCOW_FL;
    ioctl(fd.as_raw_fd(), FS_IOC_SETFLAGS, &mut flags)
}

/// The kernel's `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    xflags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

fn set_extent_size_hint(fd: BorrowedFd<'_>, bytes: u32) -> Result<(), Errno> {
    let mut attributes = FsXattr::default();
    ioctl(fd.as_raw_fd(), FS_IOC_FSGETXATTR, &mut attributes)?;
    attributes.xflags |= FS_XFLAG_EXTSIZE;
    attributes.extent_size = bytes;
    ioctl(fd.as_raw_fd(), FS_IOC_FSSETXATTR, &mut attributes)
}

fn data_extent(fd: BorrowedFd<'_>, offset: u64) -> Result<Option<(u64, u64)>, Errno> {
    use rustix::fs::SeekFrom;
    let begin = match rustix::fs::seek(fd, SeekFrom::Data(offset)) {
        Ok(begin) => begin,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error),
    };
    let end = rustix::fs::seek(fd, SeekFrom::Hole(begin))?;
    Ok(Some((begin, end)))
}
