//! Files of pseudo-random data that can be checked without a copy of them.
//!
//! A word is a function of seed and position alone, so that data in the wrong place is as wrong as
//! data from another file.

use std::{
    fs::File,
    io::{Read, Write},
};

use crate::{Report, said};

const CHUNK_BYTES: usize = 1 << 20;

/// Writes `bytes` to a new file, with an fsync after each `fsync_every` of them and at the end.
pub(crate) fn fill(
    path: &str,
    bytes: u64,
    seed: u64,
    fsync_every: Option<u64>,
) -> Result<Report, String> {
    let mut file = said(&format!("create '{path}'"), File::create(path))?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut sum = Sum::default();
    let (mut written, mut synced, mut fsyncs) = (0, 0, 0);
    while written < bytes {
        let piece = &mut chunk[..piece_bytes(bytes - written)];
        generate(seed, written, piece);
        sum.add(piece);
        said(
            &format!("write '{path}' at {written}"),
            file.write_all(piece),
        )?;
        written += piece.len() as u64;
        if written == bytes || fsync_every.is_some_and(|every| written - synced >= every) {
            said(&format!("sync '{path}' at {written}"), file.sync_all())?;
            synced = written;
            fsyncs += 1;
        }
    }
    Ok(vec![
        ("bytes", written.to_string()),
        ("fsyncs", fsyncs.to_string()),
        sum.report(),
    ])
}

/// Compares the first `bytes` of a file with what [`fill`] wrote.
///
/// # Errors
///
/// The place of the first byte that differs, what it is, and what it should be.
pub(crate) fn verify(path: &str, bytes: u64, seed: u64) -> Result<Report, String> {
    let mut expected = vec![0; CHUNK_BYTES];
    let sum = read_all(path, bytes, |offset, found| {
        let expected = &mut expected[..found.len()];
        generate(seed, offset, expected);
        let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) else {
            return Ok(());
        };
        Err(format!(
            "'{path}' differs at byte {}: {:#04x} instead of {:#04x}",
            offset + at as u64,
            found[at],
            expected[at],
        ))
    })?;
    Ok(vec![("bytes", bytes.to_string()), sum.report()])
}

/// The sum that [`fill`] reported, of what the file holds now.
pub(crate) fn sum(path: &str, bytes: u64) -> Result<Report, String> {
    let sum = read_all(path, bytes, |_, _| Ok(()))?;
    Ok(vec![("bytes", bytes.to_string()), sum.report()])
}

fn read_all(
    path: &str,
    bytes: u64,
    mut see: impl FnMut(u64, &[u8]) -> Result<(), String>,
) -> Result<Sum, String> {
    let mut file = said(&format!("open '{path}'"), File::open(path))?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut sum = Sum::default();
    let mut read = 0;
    while read < bytes {
        let piece = &mut chunk[..piece_bytes(bytes - read)];
        said(&format!("read '{path}' at {read}"), file.read_exact(piece))?;
        see(read, piece)?;
        sum.add(piece);
        read += piece.len() as u64;
    }
    Ok(sum)
}

fn piece_bytes(left: u64) -> usize {
    usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES))
}

/// The bytes from `offset`, which is a multiple of 8.
fn generate(seed: u64, offset: u64, out: &mut [u8]) {
    debug_assert!(offset.is_multiple_of(8), "pieces begin at a word");
    let first_word = offset / 8;
    for (word, out) in (first_word..).zip(out.chunks_mut(8)) {
        let bytes = mix(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ word).to_le_bytes();
        out.copy_from_slice(&bytes[..out.len()]);
    }
}

/// The output step of SplitMix64: neighbours in, unrelated words out.
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A 64-bit sum over bytes in their order (FNV-1a over words, since the guest may be emulated).
struct Sum(u64);

impl Default for Sum {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            // Rotated, since a product alone never carries a high bit down.
            self.0 = (self.0 ^ u64::from_le_bytes(padded))
                .wrapping_mul(0x0000_0100_0000_01b3)
                .rotate_left(29);
        }
    }

    fn report(self) -> (&'static str, String) {
        ("sum", format!("{:016x}", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const BYTES: u64 = 3 * CHUNK_BYTES as u64 + 4321;

    fn filled() -> (tempfile::NamedTempFile, String, Report) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let report = fill(&path, BYTES, 7, Some(1 << 20)).unwrap();
        (file, path, report)
    }

    #[test]
    fn what_was_filled_verifies_and_has_the_same_sum() {
        let (_file, path, report) = filled();
        let sum_of = |report: &Report| report.iter().find(|(key, _)| *key == "sum").cloned();
        assert_eq!(sum_of(&verify(&path, BYTES, 7).unwrap()), sum_of(&report));
        assert_eq!(sum_of(&sum(&path, BYTES).unwrap()), sum_of(&report));
        assert_eq!(report[1], ("fsyncs", "4".to_owned()));
    }

    #[test]
    fn one_wrong_byte_is_found_and_named() {
        let (file, path, report) = filled();
        let offset = 2 * CHUNK_BYTES as u64 + 77;
        let mut byte = [0];
        file.as_file().read_exact_at(&mut byte, offset).unwrap();
        file.as_file().write_all_at(&[byte[0] ^ 1], offset).unwrap();
        let error = verify(&path, BYTES, 7).unwrap_err();
        assert!(
            error.contains(&format!("differs at byte {offset}:")),
            "{error}"
        );
        assert_ne!(sum(&path, BYTES).unwrap()[1], report[2]);
    }

    #[test]
    fn two_swapped_words_change_the_sum() {
        let (file, path, report) = filled();
        let mut words = [0; 16];
        file.as_file().read_exact_at(&mut words, 4096).unwrap();
        words.rotate_left(8);
        file.as_file().write_all_at(&words, 4096).unwrap();
        assert_ne!(sum(&path, BYTES).unwrap()[1], report[2]);
    }

    #[test]
    fn another_seed_gives_other_data() {
        let (_file, path, _) = filled();
        let error = verify(&path, BYTES, 8).unwrap_err();
        assert!(error.contains("differs at byte"), "{error}");
    }
}
