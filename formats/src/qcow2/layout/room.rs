//! Changing one extension of a header where it is: in steps, each of which leaves a header that says the
//! same of everything else, whenever the power goes.
//!
//! Pure. Steps are written in their order, each durable before the next. Headers are of version 3.
//!
//! An extension that goes leaves its room behind, unless it was the last: as an extension of our own, which
//! others take for one that they do not know and we forget when the header is written anew.

use super::bytes::{u32_at, u64_at};
use super::header::field;

/// Bytes of an extension's type and length, and of the mark at the end of them all.
pub(crate) const HEAD_BYTES: usize = 8;
/// The end of all extensions.
const END: u32 = 0;
/// "StFr": room that an extension has left.
pub(crate) const FREE: u32 = 0x5374_4672;
/// Fields of the header.
const BACKING_OFFSET: usize = 8;
const BACKING_BYTES: usize = 16;
const HEADER_BYTES: usize = field::HEADER_BYTES as usize;

/// Bytes to write at an offset of the image, durably, before the next.
pub(crate) type Step = (u64, Vec<u8>);

/// Where in a header's cluster an extension begins, with its type and length.
pub(crate) fn find(cluster: &[u8], wanted: u32) -> Option<usize> {
    find_that(cluster, |kind, _| kind == wanted)
}

fn find_that(cluster: &[u8], is_wanted: impl Fn(u32, usize) -> bool) -> Option<usize> {
    let mut at = u32_at(cluster, HEADER_BYTES) as usize;
    let limit = match u64_at(cluster, BACKING_OFFSET) as usize {
        0 => cluster.len(),
        offset => offset.min(cluster.len()),
    };
    while at + HEAD_BYTES <= limit {
        let kind = u32_at(cluster, at);
        let bytes = u32_at(cluster, at + 4) as usize;
        if is_wanted(kind, bytes) {
            return Some(at);
        }
        if kind == END {
            return None;
        }
        at += HEAD_BYTES + bytes.next_multiple_of(8);
    }
    None
}

/// What adds an extension that is not there, with so many bytes of data, a multiple of 8; `None` if the
/// header has no room for it.
pub(crate) fn add(cluster: &[u8], kind: u32, data: &[u8]) -> Option<Vec<Step>> {
    let is_room = |found: u32, bytes: usize| found == FREE && bytes == data.len();
    if let Some(at) = find_that(cluster, is_room) {
        let head = kind.to_be_bytes().to_vec();
        return Some(vec![
            ((at + HEAD_BYTES) as u64, data.to_vec()),
            (at as u64, head),
        ]);
    }
    let mut steps = Vec::new();
    let end = find(cluster, END)?;
    let needed = end + HEAD_BYTES + data.len() + HEAD_BYTES;
    let backing = u64_at(cluster, BACKING_OFFSET) as usize;
    let bytes = u32_at(cluster, BACKING_BYTES) as usize;
    let limit = match backing {
        0 => cluster.len(),
        offset => offset,
    };
    if needed > limit {
        if backing == 0 {
            return None;
        }
        // The name moves behind itself, so that it can be read at both places in between.
        let place = needed.max(backing + bytes).next_multiple_of(8);
        let name = cluster.get(backing..backing + bytes)?;
        if place + bytes > cluster.len() {
            return None;
        }
        steps.push((place as u64, name.to_vec()));
        let offset = (place as u64).to_be_bytes();
        steps.push((BACKING_OFFSET as u64, offset.to_vec()));
    }
    // Behind the end's mark nobody looks.
    let mut data = data.to_vec();
    let data_bytes = data.len() as u32;
    data.resize(data.len() + HEAD_BYTES, 0);
    steps.push(((end + HEAD_BYTES) as u64, data));
    let mut head = kind.to_be_bytes().to_vec();
    head.extend(data_bytes.to_be_bytes());
    steps.push((end as u64, head));
    Some(steps)
}

/// What removes the first extension of this type; `None` if there is none.
pub(crate) fn remove(cluster: &[u8], kind: u32) -> Option<Step> {
    let at = find(cluster, kind)?;
    let bytes = u32_at(cluster, at + 4) as usize;
    let next = at + HEAD_BYTES + bytes.next_multiple_of(8);
    let is_last = find(cluster, END) == Some(next);
    let head = match is_last {
        true => vec![0; HEAD_BYTES],
        false => FREE.to_be_bytes().to_vec(),
    };
    Some((at as u64, head))
}
