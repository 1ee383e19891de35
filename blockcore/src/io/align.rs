//! Widening a range to an alignment, and cutting it into pieces. Pure.

/// The largest multiple of `unit` that is not above `value`. `unit` is a power of two.
pub const fn down(value: u64, unit: u64) -> u64 {
    value & !(unit - 1)
}

/// The smallest multiple of `unit` that is not below `value`. `unit` is a power of two and the result
/// fits: callers have bounded `value` by a length.
pub const fn up(value: u64, unit: u64) -> u64 {
    down(value + (unit - 1), unit)
}

/// Whether both ends of a range are multiples of `unit` (a power of two).
pub const fn is_aligned(offset: u64, bytes: u64, unit: u64) -> bool {
    (offset | bytes) & (unit - 1) == 0
}

/// Cuts a range into pieces that end at multiples of `unit` (above zero), except for the last.
pub fn pieces(offset: u64, bytes: u64, unit: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + bytes;
    let mut next = offset;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let begin = next;
        next = end.min((begin / unit + 1) * unit);
        Some((begin, next - begin))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_widens_to_the_units_it_touches() {
        assert_eq!((down(4097, 4096), up(4097, 4096)), (4096, 8192));
        assert_eq!((down(4096, 4096), up(4096, 4096)), (4096, 4096));
        assert!(is_aligned(8192, 512, 512) && !is_aligned(8192, 512, 1024));
    }

    #[test]
    fn pieces_cover_the_range_once_and_in_order() {
        let cut: Vec<_> = pieces(1000, 3000, 1024).collect();
        assert_eq!(cut, [(1000, 24), (1024, 1024), (2048, 1024), (3072, 928)]);
        assert_eq!(pieces(5, 0, 8).count(), 0);
    }
}
