//! The block device over a virtqueue: requests, statuses, configuration space.
//!
//! Numbers and layout: virtio specification, "Block Device".

/// Feature bits, of the device and of the transport.
#[expect(missing_docs, reason = "named as the specification names them")]
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Request types.
#[expect(missing_docs, reason = "named as the specification names them")]
pub mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const GET_LIFETIME: u32 = 10;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const SECURE_ERASE: u32 = 14;
}

/// Status: done.
pub const OK: u8 = 0;
/// Status: failed.
pub const IOERR: u8 = 1;
/// Status: the device cannot do that.
pub const UNSUPP: u8 = 2;
/// What the harness puts in the status byte, to see whether it was written.
pub const UNTOUCHED: u8 = 0xa5;

/// Bytes of a request header.
pub const HEADER_BYTES: u32 = 16;
/// Bytes of the answer to `GET_ID`.
pub const ID_BYTES: usize = 20;
/// Discard and write-zeroes flag: give the space back.
pub const UNMAP: u32 = 1;

/// A request header as it lies in memory.
pub fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES as usize] {
    let mut bytes = [0; HEADER_BYTES as usize];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A range of a discard or write-zeroes request as it lies in memory.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// A request of the guest.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which, of [`kind`].
    pub kind: u32,
    /// First sector, where the request has one.
    pub sector: u64,
    /// What the device reads after the header.
    pub output: Vec<u8>,
    /// How much the device writes before the status.
    pub input_bytes: usize,
}

impl Request {
    /// Reads `bytes` from `sector` on.
    pub fn read(sector: u64, bytes: usize) -> Self {
        Self {
            kind: kind::IN,
            sector,
            output: Vec::new(),
            input_bytes: bytes,
        }
    }

    /// Writes `data` from `sector` on.
    pub fn write(sector: u64, data: &[u8]) -> Self {
        Self {
            kind: kind::OUT,
            sector,
            output: data.to_vec(),
            input_bytes: 0,
        }
    }

    /// Makes completed writes durable.
    pub fn flush() -> Self {
        Self {
            kind: kind::FLUSH,
            sector: 0,
            output: Vec::new(),
            input_bytes: 0,
        }
    }

    /// Asks for the serial number.
    pub fn get_id() -> Self {
        Self {
            kind: kind::GET_ID,
            sector: 0,
            output: Vec::new(),
            input_bytes: ID_BYTES,
        }
    }

    /// Discards ranges, each as [`segment`] makes them.
    pub fn discard(segments: &[[u8; 16]]) -> Self {
        Self {
            kind: kind::DISCARD,
            sector: 0,
            output: segments.concat(),
            input_bytes: 0,
        }
    }

    /// Zeroes ranges, each as [`segment`] makes them.
    pub fn write_zeroes(segments: &[[u8; 16]]) -> Self {
        Self {
            kind: kind::WRITE_ZEROES,
            ..Self::discard(segments)
        }
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status byte.
    pub status: u8,
    /// How many bytes the device says it wrote.
    pub used_length: u32,
    /// What it wrote before the status.
    pub data: Vec<u8>,
}

/// Bytes of the configuration space as far as write-zeroes goes.
pub const CONFIG_BYTES: u32 = 60;
/// Where `writeback` lies in it: the one field that a driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;

/// The configuration space, `virtio_blk_config`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as the specification names them")]
pub struct Config {
    pub capacity_sectors: u64,
    pub size_max: u32,
    pub seg_max: u32,
    pub blk_size: u32,
    pub physical_block_exp: u8,
    pub alignment_offset: u8,
    pub min_io_size: u16,
    pub opt_io_size: u32,
    pub writeback: u8,
    pub num_queues: u16,
    pub max_discard_sectors: u32,
    pub max_discard_seg: u32,
    pub discard_sector_alignment: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_write_zeroes_seg: u32,
    pub write_zeroes_may_unmap: u8,
}

impl Config {
    /// Parses the first [`CONFIG_BYTES`] bytes.
    #[track_caller]
    pub fn parse(bytes: &[u8]) -> Self {
        let u16_at =
            |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        let u32_at =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        Self {
            capacity_sectors: u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
            size_max: u32_at(8),
            seg_max: u32_at(12),
            blk_size: u32_at(20),
            physical_block_exp: bytes[24],
            alignment_offset: bytes[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            writeback: bytes[WRITEBACK_OFFSET as usize],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: bytes[56],
        }
    }
}
