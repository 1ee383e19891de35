//! [`Limits`]: what requests to a node must keep to. Pure.

/// What requests to a node must keep to, and what its users should know. Bytes. `request_alignment`
/// and `memory_alignment` are powers of two; the other alignments and the maxima need not be. 0 is
/// "no limit" for a maximum and "no preference" for the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offset and length must be multiples; the pipeline widens what is not.
    pub request_alignment: u32,
    /// Memory must be aligned so; the pipeline bounces what is not.
    pub memory_alignment: u32,
    /// Zeroing works on whole units; a multiple of `request_alignment`, or less and then that counts.
    pub zero_alignment: u32,
    /// Discarding works on whole units; what lies in others is left as it is. As `zero_alignment`.
    pub discard_alignment: u32,
    /// Longest zeroing at once; a multiple of `zero_alignment`.
    pub max_zero_bytes: u64,
    /// Longest discard at once; a multiple of `discard_alignment`.
    pub max_discard_bytes: u64,
    /// Longest read or write at once; a multiple of `request_alignment`.
    pub max_transfer_bytes: u64,
    /// Unit in which discarding is worth while.
    pub discard_granularity_bytes: u32,
    /// Smallest unit that the medium writes without reading first.
    pub physical_block_bytes: u32,
    /// Smallest block that the medium knows.
    pub logical_block_bytes: u32,
    /// Preferred unit of large transfers.
    pub optimal_io_bytes: u32,
    /// Unit in which the node allocates: what copy-on-read and jobs copy in.
    pub cluster_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            memory_alignment: 1,
            zero_alignment: 1,
            discard_alignment: 1,
            max_zero_bytes: 0,
            max_discard_bytes: 0,
            max_transfer_bytes: 0,
            discard_granularity_bytes: 0,
            physical_block_bytes: 512,
            logical_block_bytes: 512,
            optimal_io_bytes: 0,
            cluster_bytes: 0,
        }
    }
}

impl Limits {
    /// The limits of a node that hands its requests on to a child with these: what that demands of
    /// requests its own pipeline sees to, and what users should know stays.
    #[must_use]
    pub fn above(self) -> Self {
        Self {
            discard_granularity_bytes: self.discard_granularity_bytes,
            physical_block_bytes: self.physical_block_bytes,
            logical_block_bytes: self.logical_block_bytes,
            optimal_io_bytes: self.optimal_io_bytes,
            cluster_bytes: self.cluster_bytes,
            ..Self::default()
        }
    }

    /// Unit of zeroing.
    pub fn zero_unit(&self) -> u64 {
        u64::from(self.zero_alignment.max(self.request_alignment))
    }

    /// Unit of discarding.
    pub fn discard_unit(&self) -> u64 {
        u64::from(self.discard_alignment.max(self.request_alignment))
    }
}
