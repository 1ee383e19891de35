//! Bits as bytes, in parts: how a bitmap goes into an image or to another process.
//!
//! Bit 0 of byte 0 is the first granule, bit 7 of byte 0 the eighth. A part begins at a multiple of
//! [`Bits::serialised_align`] and ends at one or at the end of the disk, so that it is whole words; the
//! last word is padded with zeroes, and what is set there is ignored when it is read.
//!
//! Counts and summaries are right after each part: there is nothing to finish after the last.
//!
//! Layout: qcow2 specification, "Bitmap data".

use super::bits::Bits;

const WORD_BYTES: u64 = 8;

impl Bits {
    /// How many bytes of disk a serialised word tells of: parts begin at multiples of this.
    pub fn serialised_align(&self) -> u64 {
        64 * self.granularity_bytes()
    }

    /// How many bytes the part of `bytes` from `offset` takes when serialised.
    ///
    /// # Panics
    ///
    /// If the part does not begin and end as the module says.
    pub fn serialised_bytes(&self, offset: u64, bytes: u64) -> u64 {
        let words = self.words(offset, bytes);
        (words.end - words.start) * WORD_BYTES
    }

    /// How many bytes of disk `serialised_bytes` tell of. May be more than the disk has.
    ///
    /// # Panics
    ///
    /// If it is not a multiple of 8.
    pub fn serialised_coverage(&self, serialised_bytes: u64) -> u64 {
        assert!(serialised_bytes.is_multiple_of(WORD_BYTES), "whole words");
        (serialised_bytes / WORD_BYTES).saturating_mul(self.serialised_align())
    }

    /// Writes the part into `into`.
    ///
    /// # Panics
    ///
    /// If the part does not begin and end as the module says, or `into` is not as long as
    /// [`serialised_bytes`](Self::serialised_bytes).
    pub fn serialise(&self, offset: u64, bytes: u64, into: &mut [u8]) {
        let words = self.words_in(offset, bytes, into.len());
        for (index, bytes) in words.zip(into.as_chunks_mut().0) {
            *bytes = self.word(index).to_le_bytes();
        }
    }

    /// Replaces the part by what `from` says.
    ///
    /// # Panics
    ///
    /// As [`serialise`](Self::serialise).
    pub fn deserialise(&self, offset: u64, bytes: u64, from: &[u8]) {
        let words = self.words_in(offset, bytes, from.len());
        for (index, bytes) in words.zip(from.as_chunks().0) {
            self.put_word(index, u64::from_le_bytes(*bytes));
        }
    }

    /// As [`deserialise`](Self::deserialise) of zeroes.
    ///
    /// # Panics
    ///
    /// If the part does not begin and end as the module says.
    pub fn deserialise_zeroes(&self, offset: u64, bytes: u64) {
        self.words(offset, bytes);
        self.clear(offset, bytes);
    }

    /// As [`deserialise`](Self::deserialise) of ones.
    ///
    /// # Panics
    ///
    /// If the part does not begin and end as the module says.
    pub fn deserialise_ones(&self, offset: u64, bytes: u64) {
        self.words(offset, bytes);
        self.set(offset, bytes);
    }

    fn words_in(&self, offset: u64, bytes: u64, buffer_bytes: usize) -> std::ops::Range<u64> {
        let words = self.words(offset, bytes);
        assert_eq!(
            (words.end - words.start) * WORD_BYTES,
            buffer_bytes as u64,
            "the buffer is as long as the part"
        );
        words
    }

    /// The leaf words of a part.
    fn words(&self, offset: u64, bytes: u64) -> std::ops::Range<u64> {
        let align = self.serialised_align();
        let end = offset.checked_add(bytes).expect("a part of the disk");
        assert!(end <= self.length(), "a part of the disk");
        assert!(
            offset.is_multiple_of(align) && (end.is_multiple_of(align) || end == self.length()),
            "a part is whole words"
        );
        offset / align..end.div_ceil(align)
    }
}
