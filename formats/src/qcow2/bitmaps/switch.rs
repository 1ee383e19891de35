//! What makes a header name another bitmap directory, or none, in steps.
//!
//! Pure. Each step is durable before the next is written. What a power cut leaves in between: the header
//! names the old directory, or the new one; or, where the place of the directory crosses the end of a
//! sector, and while the first bitmap is added, one that it says is out of date. Then the bitmaps are lost,
//! and nobody believes them.

use crate::qcow2::layout::extension::{BITMAPS, BitmapDirectory};
use crate::qcow2::layout::header::{Features, field};
use crate::qcow2::layout::room::{self, HEAD_BYTES, Step};

/// What a host writes whole.
const SECTOR_BYTES: usize = 512;

/// The steps for a header of version 3 in its cluster, with the autoclear features that it has; `None` if it
/// has no room.
pub(super) fn steps(
    cluster: &[u8],
    autoclear: u64,
    directory: Option<&BitmapDirectory>,
) -> Option<Vec<Step>> {
    let is_valid = autoclear & Features::BITMAPS != 0;
    let set = |valid: bool| {
        let features = match valid {
            true => autoclear | Features::BITMAPS,
            false => autoclear & !Features::BITMAPS,
        };
        (field::AUTOCLEAR, features.to_be_bytes().to_vec())
    };
    let found = room::find(cluster, BITMAPS);
    let mut steps = Vec::new();
    let Some(directory) = directory else {
        if is_valid {
            steps.push(set(false));
        }
        steps.extend(room::remove(cluster, BITMAPS));
        return Some(steps);
    };
    let data = directory.serialise();
    let Some(at) = found else {
        if is_valid {
            steps.push(set(false));
        }
        steps.extend(room::add(cluster, BITMAPS, &data)?);
        steps.push(set(true));
        return Some(steps);
    };
    let begin = at + HEAD_BYTES;
    let is_whole = begin / SECTOR_BYTES == (begin + data.len() - 1) / SECTOR_BYTES;
    let change = (begin as u64, data);
    Some(match (is_valid, is_whole) {
        (true, true) => vec![change],
        (true, false) => vec![set(false), change, set(true)],
        (false, _) => vec![change, set(true)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::layout::extension::Extensions;
    use crate::qcow2::layout::header::{Header, Purpose};

    fn header(unknown: Vec<(u32, Vec<u8>)>, backing: Option<&str>) -> Header {
        let mut bytes = vec![0; 4096];
        let fields: [(usize, u64); 4] = [
            (0, 0x5146_49fb_0000_0003),
            (24, 1 << 20),
            (40, 4096),
            (48, 8192),
        ];
        for (at, value) in fields {
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        let words: [(usize, u32); 5] = [(20, 12), (36, 1), (56, 1), (96, 4), (100, 112)];
        for (at, value) in words {
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        let mut header = Header::parse(&bytes, Purpose::Use).unwrap();
        header.backing = backing.map(str::to_owned);
        header.extensions = Extensions {
            unknown,
            ..Extensions::default()
        };
        header
    }

    fn directory(offset: u64) -> BitmapDirectory {
        BitmapDirectory {
            bitmaps: 2,
            offset,
            bytes: 64,
        }
    }

    /// Does the steps; the header says what it did, names `before`, `after` or nothing after each.
    fn switch(
        cluster: &mut [u8],
        before: Option<BitmapDirectory>,
        after: Option<BitmapDirectory>,
    ) -> usize {
        let parse = |cluster: &[u8]| Header::parse(cluster, Purpose::Use).unwrap();
        let autoclear = parse(cluster).features.autoclear;
        let rest = |mut header: Header| {
            header.extensions.bitmaps = None;
            header.extensions.has_stale_bitmaps = false;
            header.features.autoclear &= !Features::BITMAPS;
            header
        };
        let expected = rest(parse(cluster));
        let steps = steps(cluster, autoclear, after.as_ref()).unwrap();
        for (offset, bytes) in &steps {
            let at = *offset as usize;
            // A host that loses power writes whole sectors.
            assert!(bytes.len() <= 8 || after.is_some());
            cluster[at..at + bytes.len()].copy_from_slice(bytes);
            let now = parse(cluster);
            let named = now.extensions.bitmaps;
            assert!(named.is_none() || named == before || named == after);
            assert_eq!(rest(now), expected);
        }
        let now = parse(cluster);
        assert_eq!(now.extensions.bitmaps, after);
        assert!(!now.extensions.has_stale_bitmaps);
        assert_eq!(
            now.features.autoclear & Features::BITMAPS != 0,
            after.is_some()
        );
        steps.len()
    }

    #[test]
    fn directories_come_and_go_and_everything_else_stays() {
        let other = (0x1234_5678, vec![7; 40]);
        for unknown in [Vec::new(), vec![other]] {
            for backing in [None, Some("base.qcow2")] {
                let mut cluster = header(unknown.clone(), backing).serialise().unwrap();
                let (a, b) = (directory(0x3000), directory(0x5000));
                switch(&mut cluster, None, Some(a));
                assert_eq!(switch(&mut cluster, Some(a), Some(b)), 1);
                switch(&mut cluster, Some(b), None);
                switch(&mut cluster, None, Some(a));
                // Something is added behind it: what it leaves is used again.
                for (offset, bytes) in room::add(&cluster, 0x7777_7777, &[1; 16]).unwrap() {
                    let at = offset as usize;
                    cluster[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                let end = room::find(&cluster, 0);
                switch(&mut cluster, Some(a), None);
                switch(&mut cluster, None, Some(b));
                assert_eq!(room::find(&cluster, 0), end);
            }
        }
    }

    #[test]
    fn a_directory_whose_place_crosses_a_sector_is_out_of_date_meanwhile() {
        let filler = (0x1234_5678, vec![7; 376]);
        let mut cluster = header(vec![filler], None).serialise().unwrap();
        let (a, b) = (directory(0x3000), directory(0x5000));
        switch(&mut cluster, None, Some(a));
        let begin = room::find(&cluster, BITMAPS).unwrap() + HEAD_BYTES;
        assert!(begin < 512 && begin + 24 > 512, "{begin}");
        assert_eq!(switch(&mut cluster, Some(a), Some(b)), 3);
    }

    #[test]
    fn a_header_without_room_gets_no_directory() {
        let filler = (0x1234_5678, vec![7; 4096 - 112 - 8 - 24]);
        let cluster = header(vec![filler], None).serialise().unwrap();
        assert_eq!(steps(&cluster, 0, Some(&directory(0x3000))), None);
        assert_eq!(steps(&cluster, 0, None), Some(Vec::new()));
    }
}
