//! Replacing the header's cluster, so that a power cut leaves the old header or the new one.
//!
//! A disk writes a sector whole or not at all, and all of a header's fields lie in the first one. What does
//! not fit into it, the table of feature names and a long name of a backing image, is written while nothing in
//! the first sector says that it is there, or stays as it is; the first sector makes it a fact. Where both the
//! old header and the new one reach further than that, two steps lie between them, without the table of
//! feature names: only people look at it, and only in a program that does not know a feature.
//!
//! Where not even that fits into one sector (a name of some hundred bytes, or extensions of other programs)
//! all is written at once, as every other program does.

use blockcore::Error;
use blockcore::io::Io;

use super::image::read_bytes;
use super::layout::HostOffset;
use super::layout::header::Header;
use super::layout::room::Step;

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// What makes `new` an image's header, in order. All that the new header names is durable before it is done.
///
/// # Errors
///
/// [`blockcore::ErrorKind::NoSpace`] if the new header does not fit into its cluster; what could not be
/// read.
pub(super) async fn steps(io: Io<'_>, old: &Header, new: &Header) -> Result<Vec<Step>, Error> {
    let whole = new.serialise()?;
    let route = [old.serialise_bare()?, new.serialise_bare()?];
    let there = read_bytes(io, HostOffset(0), whole.len() as u64).await;
    let there = there.map_err(|error| {
        let text = format!("the header cannot be read: {error}");
        Error::new(blockcore::ErrorKind::Io, text)
    })?;
    Ok(steps_between(&there, route, &whole))
}

/// Bytes up to the last that is not zero.
fn used(cluster: &[u8]) -> usize {
    let last = cluster.iter().rposition(|byte| *byte != 0);
    last.map_or(0, |last| last + 1)
}

fn steps_between(old: &[u8], route: [Vec<u8>; 2], new: &[u8]) -> Vec<Step> {
    if let Some(steps) = direct(old, new) {
        return steps;
    }
    let [first, second] = &route;
    let parts = [
        direct(old, first),
        direct(first, second),
        direct(second, new),
    ];
    let parts: Option<Vec<_>> = parts.into_iter().collect();
    match parts {
        Some(parts) => parts.concat(),
        None => vec![(0, new[..used(old).max(used(new))].to_vec())],
    }
}

/// Steps between which a header is one or the other; `None` if there are none.
fn direct(old: &[u8], new: &[u8]) -> Option<Vec<Step>> {
    let sector = SECTOR_BYTES.min(new.len());
    let first = (0, new[..sector].to_vec());
    let (before, after) = (used(old), used(new));
    if old[sector..] == new[sector..] {
        return Some(vec![first]);
    }
    if after <= sector {
        // Nothing says any more that it is there.
        let rest = (sector as u64, vec![0; before - sector]);
        return Some(vec![first, rest]);
    }
    if before <= sector {
        let rest = (sector as u64, new[sector..after].to_vec());
        return Some(vec![rest, first]);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::layout::extension::Extensions;
    use super::super::layout::header::tests::plain;
    use super::super::layout::header::{Features, Purpose};
    use super::*;

    fn header(version: u32, backing: Option<&str>, data_file: Option<&str>) -> Header {
        let incompatible = data_file.map_or(0, |_| Features::DATA_FILE);
        Header {
            version,
            backing: backing.map(str::to_owned),
            features: Features {
                incompatible,
                ..Features::default()
            },
            extensions: Extensions {
                data_file: data_file.map(str::to_owned),
                ..Extensions::default()
            },
            ..plain()
        }
    }

    /// Goes from one to the other, and tries every state that a power cut may leave in between.
    fn switch(old: &Header, new: &Header) {
        let mut cluster = old.serialise().unwrap();
        let route = [old.serialise_bare().unwrap(), new.serialise_bare().unwrap()];
        let said = |cluster: &[u8]| {
            let mut header = Header::parse(cluster, Purpose::Use).unwrap();
            header.extensions.names.clear();
            header
        };
        for (offset, bytes) in steps_between(&cluster, route, &new.serialise().unwrap()) {
            // Any of the sectors may be there already.
            let at = offset as usize;
            for sectors in [0_u128, 0b01, 0b10, 0b101, 0b1010, u128::MAX] {
                let mut cut = cluster.clone();
                for (index, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                    let at = at + index * SECTOR_BYTES;
                    if index >= 128 || sectors >> index & 1 != 0 {
                        cut[at..at + sector.len()].copy_from_slice(sector);
                    }
                }
                let found = said(&cut);
                assert!(found == *old || found == *new, "{found:?}");
            }
            cluster[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        assert_eq!(cluster, new.serialise().unwrap());
    }

    #[test]
    fn a_power_cut_leaves_the_old_header_or_the_new_one() {
        let headers = [
            header(2, None, None),
            header(3, None, None),
            header(2, Some("base.qcow2"), None),
            header(3, Some("base.qcow2"), None),
            header(3, None, Some("data.raw")),
            header(3, None, Some("elsewhere/another.raw")),
            header(3, Some("a/rather/long/name/of/an/image.qcow2"), None),
        ];
        for old in &headers {
            for new in &headers {
                switch(old, new);
            }
        }
    }

    #[test]
    fn a_header_that_only_fits_into_several_sectors_is_written_at_once() {
        let long = "x".repeat(1000);
        let (old, new) = (header(3, Some(&long), None), header(2, Some(&long), None));
        let bare = [old.serialise_bare().unwrap(), new.serialise_bare().unwrap()];
        let whole = new.serialise().unwrap();
        let steps = steps_between(&old.serialise().unwrap(), bare, &whole);
        assert_eq!(steps.len(), 1);
        assert_eq!(steps[0].0, 0);
    }
}
