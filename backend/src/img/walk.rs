//! What ranges of an image are, through its chain, and what is in them.

use blockcore::driver::{Status, StatusFlags, WriteFlags, ZeroFlags};
use blockcore::io::RequestKind;
use blockcore::io::buffer::Segments;
use blockcore::{Error, IoError};

use super::open::Image;

/// Unit in which contents are compared and looked at for zeroes: the smallest that a disk has.
pub(super) const SECTOR_BYTES: u64 = 512;

/// A range that is alike throughout.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Above zero.
    pub(super) bytes: u64,
    pub(super) status: Status,
    /// Layers of the chain above the one that decides.
    pub(super) depth: usize,
}

impl Extent {
    /// Reads as zeroes without a look.
    pub(super) fn is_zero(&self) -> bool {
        self.status.flags.contains(StatusFlags::ZERO)
    }

    /// Some layer holds something there.
    pub(super) fn is_allocated(&self) -> bool {
        self.status.flags.contains(StatusFlags::ALLOCATED)
    }

    pub(super) fn is_data(&self) -> bool {
        self.status.flags.contains(StatusFlags::DATA)
    }
}

impl Image {
    /// What its bytes from `offset` on are, through the whole chain; for at most `bytes`, which are
    /// inside the image and not none.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn extent(&self, offset: u64, bytes: u64) -> Result<Extent, Error> {
        if offset >= self.root.bytes() {
            return self.past_end(offset, bytes).await;
        }
        let request = self.request().await;
        let status = request.io().status_above(|_| false, true, offset, bytes);
        self.to_extent(status.await, offset, bytes)
    }

    /// What its own layer has, whatever is below.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn top_extent(&self, offset: u64, bytes: u64) -> Result<Extent, Error> {
        if offset >= self.root.bytes() {
            return self.past_end(offset, bytes).await;
        }
        let request = self.request().await;
        let status = request.io().block_status(true, offset, bytes).await;
        self.to_extent(status.map(|status| (status, 0)), offset, bytes)
    }

    /// As [`extent`](Self::extent), but of the first layer that knows what is read: a layer above one that
    /// is too short knows of zeroes that it does not hold.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn known_extent(&self, offset: u64, bytes: u64) -> Result<Extent, Error> {
        if offset >= self.root.bytes() {
            return self.past_end(offset, bytes).await;
        }
        let request = self.request().await;
        let (mut layer, mut depth, mut left) = (request.io(), 0, bytes);
        loop {
            let status = layer.block_status(true, offset, left).await;
            let mut status = status.map_err(|error| self.failed("look at", offset, error))?;
            let is_known = status
                .flags
                .intersects(StatusFlags::DATA | StatusFlags::ZERO);
            let next = layer
                .next_in_chain()
                .filter(|_| !is_known && status.bytes > 0);
            let Some(next) = next else {
                // Where nobody has anything there is no place to tell of.
                status.flags.set(
                    StatusFlags::PLACE,
                    is_known && status.flags.contains(StatusFlags::PLACE),
                );
                return self.to_extent(Ok((status, depth)), offset, bytes);
            };
            (layer, depth, left) = (next, depth + 1, status.bytes);
        }
    }

    /// What a file lacks of its image's last sector: zeroes, in the place where it would go on.
    async fn past_end(&self, offset: u64, bytes: u64) -> Result<Extent, Error> {
        let last = self.root.bytes().saturating_sub(1);
        let request = self.request().await;
        let answer = request.io().status_above(|_| false, true, last, 1).await;
        let mut extent = self.to_extent(answer, last, 1)?;
        extent.bytes = bytes;
        let place = extent.status.flags & StatusFlags::PLACE;
        extent.status.flags = place | StatusFlags::ZERO | StatusFlags::ALLOCATED;
        extent.status.place.offset += offset - last;
        Ok(extent)
    }

    /// An answer of the core.
    pub(super) fn to_extent(
        &self,
        answer: Result<(Status, usize), IoError>,
        offset: u64,
        bytes: u64,
    ) -> Result<Extent, Error> {
        let failed = |error| self.failed("look at", offset, error);
        let (status, depth) = answer.map_err(failed)?;
        if status.bytes == 0 {
            // It has shrunk under us.
            return Err(failed(IoError::OutOfRange));
        }
        Ok(Extent {
            bytes: status.bytes.min(bytes),
            status,
            depth,
        })
    }

    /// Reads; what lies past its end is zero.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn read(&self, offset: u64, into: Segments) -> Result<(), Error> {
        let bytes = into.bytes();
        let inside = self.root.bytes().saturating_sub(offset).min(bytes);
        if inside < bytes {
            into.slice(inside, bytes - inside).fill(0);
        }
        if inside == 0 {
            return Ok(());
        }
        let read = self.root.read(offset, into.slice(0, inside)).await;
        read.map_err(|error| self.failed("read", offset, error))
    }

    /// Writes, as its cache mode says.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn write(&self, offset: u64, from: Segments) -> Result<(), Error> {
        let written = self.root.write(offset, from, self.write_flags()).await;
        written.map_err(|error| self.failed("write", offset, error))
    }
}

impl Image {
    /// Zeroes a range.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn write_zeroes(
        &self,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), Error> {
        let flags = match self.write_flags().contains(WriteFlags::STABLE) {
            true => flags | ZeroFlags::STABLE,
            false => flags,
        };
        let zeroed = self.root.write_zeroes(offset, bytes, flags).await;
        zeroed.map_err(|error| self.failed("zero", offset, error))
    }

    /// Writes a whole cluster compressed, or what the end leaves of one.
    ///
    /// # Errors
    ///
    /// What the host said.
    pub(super) async fn write_compressed(&self, offset: u64, from: Segments) -> Result<(), Error> {
        let bytes = from.bytes();
        let request = self.root.enter(RequestKind::Write, offset, bytes).await;
        let written = request.io().write_compressed(offset, from).await;
        written.map_err(|error| self.failed("write", offset, error))
    }

    /// Whether its format compresses.
    pub(super) fn can_compress(&self) -> bool {
        let request = self.root.try_enter(RequestKind::Other, 0, 0);
        request.is_some_and(|request| request.io().can_compress())
    }
}

/// Ranges that are all zero, or are not, in the order in which they come; alike neighbours are one. Runs
/// of zeroes of less than `least_zeroes` bytes count as data. Ranges begin and end at multiples of `unit`,
/// but for the end.
pub(super) fn runs(bytes: &[u8], unit: u64, least_zeroes: u64) -> Vec<(bool, u64)> {
    let mut runs: Vec<(bool, u64)> = Vec::new();
    for part in bytes.chunks(unit as usize) {
        add(&mut runs, (is_zero(part), part.len() as u64));
    }
    let mut merged = Vec::new();
    for (zero, bytes) in runs {
        add(&mut merged, (zero && bytes >= least_zeroes, bytes));
    }
    merged
}

fn add(runs: &mut Vec<(bool, u64)>, (zero, bytes): (bool, u64)) {
    match runs.last_mut() {
        Some(last) if last.0 == zero => last.1 += bytes,
        _ => runs.push((zero, bytes)),
    }
}

/// Whether every byte is zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Eight at a time, which the compiler makes more of.
    let (words, tail) = bytes.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && tail.iter().all(|byte| *byte == 0)
}

/// Where the first sector begins that differs; `None` if all are alike. Both have the same length.
pub(super) fn first_difference(one: &[u8], other: &[u8]) -> Option<u64> {
    // Nearly always, and found out at once.
    if one == other {
        return None;
    }
    let sectors = one
        .chunks(SECTOR_BYTES as usize)
        .zip(other.chunks(SECTOR_BYTES as usize));
    let mut different = sectors.enumerate().filter(|(_, (one, other))| one != other);
    different.next().map(|(at, _)| at as u64 * SECTOR_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_runs_of_zeroes_are_data_and_runs_add_up() {
        let mut bytes = vec![0; 5 * 512 + 100];
        bytes[600] = 1;
        assert_eq!(
            runs(&bytes, 512, 512),
            [(true, 512), (false, 512), (true, 3 * 512 + 100)]
        );
        assert_eq!(
            runs(&bytes, 512, 1024),
            [(false, 1024), (true, 3 * 512 + 100)]
        );
        assert_eq!(
            runs(&bytes, 1024, 512),
            [(false, 1024), (true, 3 * 512 + 100)]
        );
        assert_eq!(runs(&[], 512, 512), []);
    }

    #[test]
    fn a_byte_that_differs_is_found_by_its_sector() {
        let one = vec![7; 2000];
        let mut other = one.clone();
        assert_eq!(first_difference(&one, &other), None);
        other[1999] = 8;
        assert_eq!(first_difference(&one, &other), Some(1536));
    }

    #[test]
    fn one_bit_is_enough_not_to_be_zero() {
        for length in [0, 1, 7, 8, 9, 513] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            if let Some(last) = bytes.last_mut() {
                *last = 0x80;
                assert!(!is_zero(&bytes), "{length}");
            }
        }
    }
}
