//! The cookie in an image's header, which tells one opening of an image from another.
//!
//! It counts openings for writing, and with the autoclear bit beside it says that nobody else has written
//! since: another program that writes clears the bit, which it does not know. A crash segment is adopted by
//! the opening whose cookie it has.
//!
//! An image that was not made here has no room for one. It is made in steps ([`room`]).

use super::layout::bytes::{u32_at, u64_at};
use super::layout::header::{Features, field};
use super::layout::room::{self, HEAD_BYTES, Step};

/// "StNW": the type of the header extension that has it.
const TYPE: u32 = 0x5374_4e57;
/// Bytes of its data: the cookie, and as much that is zero.
const DATA_BYTES: usize = 32;
/// Where in the header the autoclear features are.
const AUTOCLEAR: usize = field::AUTOCLEAR as usize;

/// The cookie that there is in a header's cluster, version 3.
pub(super) fn find(cluster: &[u8]) -> Option<u64> {
    let at = room::find(cluster, TYPE)?;
    (u32_at(cluster, at + 4) as usize == DATA_BYTES).then(|| u64_at(cluster, at + HEAD_BYTES))
}

/// Whether the bit is set that another writer clears.
pub(super) fn is_vouched_for(cluster: &[u8]) -> bool {
    u64_at(cluster, AUTOCLEAR) & Features::SEGMENT != 0
}

/// What makes `cookie` the header's, in order; `None` if the header has no room for one.
pub(super) fn steps(cluster: &[u8], cookie: u64) -> Option<Vec<Step>> {
    let mut data = cookie.to_be_bytes().to_vec();
    if let Some(at) = room::find(cluster, TYPE)
        && find(cluster).is_some()
    {
        return Some(vec![((at + HEAD_BYTES) as u64, data)]);
    }
    data.resize(DATA_BYTES, 0);
    room::add(cluster, TYPE, &data)
}

#[cfg(test)]
mod tests {
    use super::super::layout::header::{Header, Purpose};
    use super::*;

    const HEADER_BYTES: usize = 100;

    fn header(backing: Option<&str>, unknown_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let fields: [(usize, u64); 5] = [
            (0, 0x5146_49fb_0000_0003),
            (24, 1 << 20),
            (40, 4096),
            (48, 8192),
            (AUTOCLEAR, 0),
        ];
        for (at, value) in fields {
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        let words: [(usize, u32); 5] = [(20, 12), (36, 1), (56, 1), (96, 4), (HEADER_BYTES, 112)];
        for (at, value) in words {
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        bytes[112..116].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
        bytes[116..120].copy_from_slice(&(unknown_bytes as u32).to_be_bytes());
        let end = 120 + unknown_bytes.next_multiple_of(8) + 8;
        if let Some(name) = backing {
            bytes[8..16].copy_from_slice(&(end as u64).to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes[end..end + name.len()].copy_from_slice(name.as_bytes());
        }
        bytes
    }

    #[test]
    fn a_cookie_is_made_in_steps_that_leave_everything_else_as_it_was() {
        let long = "x".repeat(900);
        for (backing, unknown) in [(None, 0), (Some("base.qcow2"), 3), (Some(&*long), 400)] {
            let mut cluster = header(backing, unknown);
            let before = Header::parse(&cluster, Purpose::Use).unwrap();
            assert_eq!(find(&cluster), None);
            for (offset, bytes) in steps(&cluster, 7).unwrap() {
                let at = offset as usize;
                cluster[at..at + bytes.len()].copy_from_slice(&bytes);
                let mut after = Header::parse(&cluster, Purpose::Use).unwrap();
                after.extensions.cookie = None;
                assert_eq!(after, before);
            }
            assert_eq!(find(&cluster), Some(7));
            let next = steps(&cluster, 8).unwrap();
            assert_eq!(next.len(), 1);
            let at = next[0].0 as usize;
            cluster[at..at + 8].copy_from_slice(&next[0].1);
            assert_eq!(find(&cluster), Some(8));
        }
    }

    #[test]
    fn a_header_without_room_gets_none() {
        assert_eq!(steps(&header(None, 4096 - 140), 1), None);
        let backing = "y".repeat(1000);
        assert_eq!(steps(&header(Some(&backing), 2500), 1), None);
    }
}
