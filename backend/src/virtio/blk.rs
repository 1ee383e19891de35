//! The block device: its configuration and what a request asks for. Pure.
//!
//! Virtio 1.x, "Block Device". Sectors are 512 bytes and exist in this file only.

use blockcore::io::account::Kind;
use virtio_bindings::virtio_blk as spec;

/// Bytes of a sector, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a request's header.
pub const HEADER_BYTES: u64 = 16;
/// Bytes of one discard or write-zeroes segment.
pub const RANGE_BYTES: u64 = 16;
/// Bytes of a device's identification.
pub const ID_BYTES: usize = 20;
/// Data segments that a request may have; with header and status it fits a ring of 128.
pub const SEG_MAX: u32 = 126;
/// Longest data segment that the guest is told to use.
pub const SIZE_MAX: u32 = 1 << 22;
/// Discard segments that one request may have.
pub const MAX_RANGES: u32 = 16;
/// Longest discard segment: 2 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Longest write-zeroes segment: 16 MiB, as the host may have to write the zeroes.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 15;

/// How a request ended, as the guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = spec::VIRTIO_BLK_S_OK as u8,
    /// It failed, or was wrong.
    IoError = spec::VIRTIO_BLK_S_IOERR as u8,
    /// The device has no such request.
    Unsupported = spec::VIRTIO_BLK_S_UNSUPP as u8,
}

/// What a request asks for; offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the writable memory.
    Read {
        /// From where.
        offset: u64,
        /// How much.
        bytes: u64,
    },
    /// Store the readable memory.
    Write {
        /// Where to.
        offset: u64,
        /// How much.
        bytes: u64,
    },
    /// Make completed writes durable.
    Flush,
    /// Fill in the identification.
    GetId,
    /// Discard the ranges in the readable memory.
    Discard {
        /// How many.
        ranges: u32,
    },
    /// Zero the ranges in the readable memory.
    WriteZeroes {
        /// How many.
        ranges: u32,
    },
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Length of the disk.
    pub bytes: u64,
    /// Requests begin and end at multiples of this.
    pub block_bytes: u32,
    /// Nothing may be changed.
    pub read_only: bool,
}

/// Reads a header, for a request with so much memory besides it.
///
/// # Errors
///
/// The status to end the request with.
pub fn parse(
    header: [u8; HEADER_BYTES as usize],
    readable_bytes: u64,
    writable_bytes: u64,
    geometry: Geometry,
) -> Result<Request, Status> {
    let kind = u32::from_le_bytes(header[0..4].try_into().expect("four bytes"));
    let sector = u64::from_le_bytes(header[8..16].try_into().expect("eight bytes"));
    let changes = matches!(
        kind,
        spec::VIRTIO_BLK_T_OUT | spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES
    );
    if changes && geometry.read_only {
        return Err(Status::IoError);
    }
    match kind {
        spec::VIRTIO_BLK_T_IN => {
            let offset = transfer(sector, writable_bytes, geometry)?;
            Ok(Request::Read {
                offset,
                bytes: writable_bytes,
            })
        }
        spec::VIRTIO_BLK_T_OUT => {
            let offset = transfer(sector, readable_bytes, geometry)?;
            Ok(Request::Write {
                offset,
                bytes: readable_bytes,
            })
        }
        spec::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        spec::VIRTIO_BLK_T_GET_ID if writable_bytes > 0 => Ok(Request::GetId),
        spec::VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
        spec::VIRTIO_BLK_T_DISCARD => {
            let ranges = ranges(readable_bytes)?;
            Ok(Request::Discard { ranges })
        }
        spec::VIRTIO_BLK_T_WRITE_ZEROES => {
            let ranges = ranges(readable_bytes)?;
            Ok(Request::WriteZeroes { ranges })
        }
        _ => Err(Status::Unsupported),
    }
}

/// What a request counts as by its header, be it valid or not; `None` for identification and for what the
/// device does not have.
pub fn kind(header: [u8; HEADER_BYTES as usize]) -> Option<Kind> {
    match u32::from_le_bytes(header[0..4].try_into().expect("four bytes")) {
        spec::VIRTIO_BLK_T_IN => Some(Kind::Read),
        spec::VIRTIO_BLK_T_OUT => Some(Kind::Write),
        spec::VIRTIO_BLK_T_FLUSH => Some(Kind::Flush),
        spec::VIRTIO_BLK_T_DISCARD => Some(Kind::Discard),
        spec::VIRTIO_BLK_T_WRITE_ZEROES => Some(Kind::WriteZeroes),
        _ => None,
    }
}

/// Where a transfer begins, if it is whole blocks inside the disk.
fn transfer(sector: u64, bytes: u64, geometry: Geometry) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let block = u64::from(geometry.block_bytes);
    let whole = offset.is_multiple_of(block) && bytes.is_multiple_of(block);
    let inside = offset <= geometry.bytes && bytes <= geometry.bytes - offset;
    if !whole || !inside {
        return Err(Status::IoError);
    }
    Ok(offset)
}

fn ranges(readable_bytes: u64) -> Result<u32, Status> {
    let ranges = readable_bytes / RANGE_BYTES;
    let whole = readable_bytes.is_multiple_of(RANGE_BYTES);
    if !whole || ranges == 0 || ranges > u64::from(MAX_RANGES) {
        return Err(Status::IoError);
    }
    Ok(ranges as u32)
}

/// One range of a discard or write-zeroes request, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is; zero is legal and means nothing.
    pub bytes: u64,
    /// The space may be given back (write zeroes only).
    pub unmap: bool,
}

/// Reads one range.
///
/// # Errors
///
/// `Unsupported` for flags that the request does not have, `IoError` for a range that is too long,
/// outside the disk or not of whole blocks.
pub fn parse_range(
    raw: [u8; RANGE_BYTES as usize],
    discard: bool,
    geometry: Geometry,
) -> Result<Range, Status> {
    let sector = u64::from_le_bytes(raw[0..8].try_into().expect("eight bytes"));
    let sectors = u32::from_le_bytes(raw[8..12].try_into().expect("four bytes"));
    let flags = u32::from_le_bytes(raw[12..16].try_into().expect("four bytes"));
    let unmap = flags & spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    if flags & !spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
        return Err(Status::Unsupported);
    }
    let limit = if discard {
        MAX_DISCARD_SECTORS
    } else {
        MAX_ZEROES_SECTORS
    };
    if sectors > limit {
        return Err(Status::IoError);
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    let offset = transfer(sector, bytes, geometry)?;
    Ok(Range {
        offset,
        bytes,
        unmap,
    })
}

/// The identification as the guest gets it: the serial's bytes, filled up with zeroes; a serial of 20
/// bytes or more has no terminator.
pub fn id(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    let bytes = serial.len().min(ID_BYTES);
    id[..bytes].copy_from_slice(&serial.as_bytes()[..bytes]);
    id
}

/// What a disk looks like to its guest.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Length in bytes.
    pub bytes: u64,
    /// Smallest unit of a request.
    pub block_bytes: u32,
    /// Smallest unit that the medium writes without reading first.
    pub physical_block_bytes: u32,
    /// Preferred unit of large transfers, 0 for none.
    pub optimal_io_bytes: u32,
    /// Unit in which discarding is worth while, 0 for any.
    pub discard_granularity_bytes: u32,
    /// How many virtqueues there are.
    pub queues: u16,
    /// Nothing may be changed.
    pub read_only: bool,
    /// Zeroed or discarded space can be given back.
    pub unmap: bool,
    /// Completed writes may be lost by the host until they are flushed.
    pub writeback: bool,
}

/// Bytes of the configuration space up to the write-zeroes fields and their padding.
pub const CONFIG_BYTES: usize = 60;
/// Where the `writeback` byte is in the configuration space.
pub const CONFIG_WRITEBACK: usize = 32;

impl DiskInfo {
    /// The feature bits of the block device that are offered.
    pub fn features(&self) -> u64 {
        let mut bits = vec![
            spec::VIRTIO_BLK_F_SIZE_MAX,
            spec::VIRTIO_BLK_F_SEG_MAX,
            spec::VIRTIO_BLK_F_BLK_SIZE,
            spec::VIRTIO_BLK_F_FLUSH,
            spec::VIRTIO_BLK_F_TOPOLOGY,
            spec::VIRTIO_BLK_F_CONFIG_WCE,
            spec::VIRTIO_BLK_F_MQ,
            spec::VIRTIO_BLK_F_DISCARD,
            spec::VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        if self.read_only {
            bits.push(spec::VIRTIO_BLK_F_RO);
        }
        bits.into_iter()
            .fold(0, |features, bit| features | 1 << bit)
    }

    /// The configuration space (virtio, "Block Device: Device configuration layout").
    pub fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let block = self.block_bytes;
        let blocks = |bytes: u32| (bytes / block).max(1);
        put(0, &(self.bytes / SECTOR_BYTES).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &block.to_le_bytes());
        // Topology: physical block exponent, alignment offset, minimum and optimum in blocks.
        let physical = blocks(self.physical_block_bytes);
        put(24, &[physical.ilog2() as u8, 0]);
        let minimum = u16::try_from(physical).unwrap_or(u16::MAX);
        put(26, &minimum.to_le_bytes());
        put(28, &(self.optimal_io_bytes / block).to_le_bytes());
        put(CONFIG_WRITEBACK, &[u8::from(self.writeback)]);
        put(34, &self.queues.to_le_bytes());
        let granularity = self.discard_granularity_bytes.max(block);
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(granularity / SECTOR_BYTES as u32).to_le_bytes());
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[u8::from(self.unmap)]);
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Geometry = Geometry {
        bytes: 1 << 20,
        block_bytes: 512,
        read_only: false,
    };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
        let mut raw = [0; 16];
        raw[0..8].copy_from_slice(&sector.to_le_bytes());
        raw[8..12].copy_from_slice(&sectors.to_le_bytes());
        raw[12..16].copy_from_slice(&flags.to_le_bytes());
        raw
    }

    #[test]
    fn transfers_are_whole_blocks_inside_the_disk() {
        let read = |sector, bytes| parse(header(0, sector), 0, bytes, DISK);
        assert_eq!(
            read(3, 1024),
            Ok(Request::Read {
                offset: 1536,
                bytes: 1024
            })
        );
        assert_eq!(
            read(2047, 512),
            Ok(Request::Read {
                offset: 2047 * 512,
                bytes: 512
            })
        );
        for (sector, bytes) in [
            (2047, 1024),
            (2048, 512),
            (0, 511),
            (u64::MAX, 512),
            (1 << 55, 512),
        ] {
            assert_eq!(
                read(sector, bytes),
                Err(Status::IoError),
                "{sector} {bytes}"
            );
        }
        let large = Geometry {
            block_bytes: 4096,
            ..DISK
        };
        assert_eq!(parse(header(1, 1), 4096, 0, large), Err(Status::IoError));
        assert_eq!(parse(header(1, 8), 512, 0, large), Err(Status::IoError));
    }

    #[test]
    fn a_read_only_disk_refuses_every_change_and_nothing_else() {
        let disk = Geometry {
            read_only: true,
            ..DISK
        };
        for kind in [1, 11, 13] {
            assert_eq!(parse(header(kind, 0), 512, 0, disk), Err(Status::IoError));
        }
        assert_eq!(parse(header(4, 0), 0, 0, disk), Ok(Request::Flush));
        assert_eq!(parse(header(8, 0), 0, 20, disk), Ok(Request::GetId));
    }

    #[test]
    fn unknown_requests_are_unsupported() {
        for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 24, 0x8000_0000, u32::MAX] {
            assert_eq!(
                parse(header(kind, 0), 0, 512, DISK),
                Err(Status::Unsupported),
                "{kind}"
            );
        }
    }

    #[test]
    fn ranges_keep_to_their_flags_and_limits() {
        let discard = |raw| parse_range(raw, true, DISK);
        assert_eq!(discard(range(8, 8, 0)).unwrap().offset, 4096);
        assert_eq!(discard(range(8, 8, 1)), Err(Status::Unsupported));
        assert_eq!(discard(range(8, 8, 2)), Err(Status::Unsupported));
        assert_eq!(discard(range(2040, 9, 0)), Err(Status::IoError));
        let zero = |raw| parse_range(raw, false, DISK);
        assert!(zero(range(0, 8, 1)).unwrap().unmap);
        assert_eq!(
            zero(range(0, MAX_ZEROES_SECTORS + 1, 0)),
            Err(Status::IoError)
        );
        assert_eq!(parse(header(11, 0), 16 * 17, 0, DISK), Err(Status::IoError));
        assert_eq!(parse(header(11, 0), 0, 0, DISK), Err(Status::IoError));
        assert_eq!(parse(header(13, 0), 24, 0, DISK), Err(Status::IoError));
        assert_eq!(
            parse(header(13, 0), 32, 0, DISK),
            Ok(Request::WriteZeroes { ranges: 2 })
        );
    }

    #[test]
    fn a_serial_is_cut_or_filled_to_twenty_bytes() {
        assert_eq!(&id("disk-1")[..7], b"disk-1\0");
        assert_eq!(&id("0123456789abcdefghijk"), b"0123456789abcdefghij");
    }

    #[test]
    fn the_configuration_has_its_fields_where_the_specification_says() {
        let info = DiskInfo {
            bytes: 1 << 30,
            block_bytes: 512,
            physical_block_bytes: 4096,
            optimal_io_bytes: 65536,
            discard_granularity_bytes: 4096,
            queues: 16,
            read_only: false,
            unmap: true,
            writeback: true,
        };
        let (config, info_features) = (info.config(), info.features());
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(config[at..at + 2].try_into().unwrap());
        assert_eq!(u32_at(0), 1 << 21);
        assert_eq!(
            (u32_at(8), u32_at(12), u32_at(20)),
            (SIZE_MAX, SEG_MAX, 512)
        );
        assert_eq!(
            (config[24], config[25], u16_at(26), u32_at(28)),
            (3, 0, 8, 128)
        );
        assert_eq!(
            (config[32], u16_at(34), u32_at(44), config[56]),
            (1, 16, 8, 1)
        );
        let read_only = DiskInfo {
            read_only: true,
            ..info
        };
        assert_eq!(read_only.features() ^ info_features, 1 << 5);
    }
}
