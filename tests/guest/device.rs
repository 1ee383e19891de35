#![expect(unsafe_code, reason = "an ioctl that no crate wraps")]
//! A block device as a guest's programs use it, and what the guest's kernel says of it.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
};

use rustix::{
    fs::{FallocateFlags, OFlags, fallocate, ioctl_blksszget},
    ioctl,
};

use crate::{Report, said};

/// `BLKDISCARD` of `linux/fs.h`: no size is encoded in it, though it takes two words.
const BLKDISCARD: ioctl::Opcode = ioctl::opcode::none(0x12, 119);

fn open(device: &str) -> Result<File, String> {
    said(
        &format!("open '{device}'"),
        File::options().read(true).write(true).open(device),
    )
}

/// Tells the disk that a range is not needed any more.
pub(crate) fn discard(device: &str, offset: u64, bytes: u64) -> Result<Report, String> {
    let file = open(device)?;
    // SAFETY: BLKDISCARD reads two words, offset and length, and the setter passes their address.
    let outcome = unsafe {
        ioctl::ioctl(
            &file,
            ioctl::Setter::<BLKDISCARD, [u64; 2]>::new([offset, bytes]),
        )
    };
    said(
        &format!("discard {bytes} at {offset} of '{device}'"),
        outcome,
    )?;
    Ok(Report::new())
}

/// Makes a range read as zeroes; with `unmap` the disk may give up its space.
///
/// The kernel turns both into VIRTIO_BLK_T_WRITE_ZEROES, and falls back to writing zeroes only
/// without `unmap`.
pub(crate) fn write_zeroes(
    device: &str,
    offset: u64,
    bytes: u64,
    unmap: bool,
) -> Result<Report, String> {
    let flags = if unmap {
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
    } else {
        FallocateFlags::ZERO_RANGE
    };
    said(
        &format!("write zeroes to {bytes} at {offset} of '{device}'"),
        fallocate(&open(device)?, flags, offset, bytes),
    )?;
    Ok(Report::new())
}

/// Memory that direct I/O accepts for any block size.
#[repr(align(4096))]
struct Block([u8; 4096]);

/// Writes one block after the other, each as one request, with an fsync after each if `fsync`.
pub(crate) fn sync_writes(device: &str, count: u64, fsync: bool) -> Result<Report, String> {
    let file = said(
        &format!("open '{device}'"),
        File::options()
            .write(true)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(device),
    )?;
    let bytes = said("ask for the block size", ioctl_blksszget(&file))?;
    let mut block = Block([0; 4096]);
    for index in 0..count {
        let data = &mut block.0[..bytes as usize];
        data.fill(index as u8 + 1);
        said(
            "write a block",
            file.write_all_at(data, index * u64::from(bytes)),
        )?;
        if fsync {
            said("sync a block", file.sync_all())?;
        }
    }
    Ok(vec![
        ("writes", count.to_string()),
        ("block", bytes.to_string()),
    ])
}

fn sysfs(device: &str) -> String {
    format!(
        "/sys/class/block/{}",
        device.rsplit('/').next().unwrap_or(device)
    )
}

/// Shows whether the kernel takes the disk's cache to be "write back" or "write through", and with
/// a `mode` sets VIRTIO_BLK_F_CONFIG_WCE's `writeback` before.
pub(crate) fn wce(device: &str, mode: Option<&str>) -> Result<Report, String> {
    let attribute = format!("{}/cache_type", sysfs(device));
    if let Some(mode) = mode {
        said(
            &format!("set the cache mode of '{device}'"),
            fs::write(&attribute, format!("write {mode}")),
        )?;
    }
    let shown = said("read the cache mode", fs::read_to_string(&attribute))?;
    Ok(vec![("wce", shown.trim().replace("write ", ""))])
}

/// What the kernel says of a disk. What it does not say is left out.
pub(crate) fn info(device: &str) -> Result<Report, String> {
    let base = sysfs(device);
    let mut report = Report::new();
    let sectors = said(
        &format!("find '{device}'"),
        fs::read_to_string(format!("{base}/size")),
    )?;
    let sectors: u64 = said("read the size", sectors.trim().parse())?;
    report.push(("bytes", (sectors * 512).to_string()));
    for (key, attribute) in [
        ("serial", "serial"),
        ("read_only", "ro"),
        ("cache_type", "cache_type"),
        ("logical_block", "queue/logical_block_size"),
        ("physical_block", "queue/physical_block_size"),
        ("minimum_io", "queue/minimum_io_size"),
        ("optimal_io", "queue/optimal_io_size"),
        ("write_cache", "queue/write_cache"),
        ("max_sectors_kb", "queue/max_hw_sectors_kb"),
        ("max_segments", "queue/max_segments"),
        ("max_segment", "queue/max_segment_size"),
        ("discard_granularity", "queue/discard_granularity"),
        ("discard_max", "queue/discard_max_hw_bytes"),
        ("discard_segments", "queue/max_discard_segments"),
        ("write_zeroes_max", "queue/write_zeroes_max_bytes"),
        ("rotational", "queue/rotational"),
    ] {
        if let Ok(value) = fs::read_to_string(format!("{base}/{attribute}")) {
            // The host splits the line at blanks.
            report.push((key, value.trim().replace(' ', "_")));
        }
    }
    if let Ok(queues) = fs::read_dir(format!("{base}/mq")) {
        report.push(("queues", queues.count().to_string()));
    }
    Ok(report)
}
