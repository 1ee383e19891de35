//! What format a file seems to have. Pure.
//!
//! Never used to choose a driver: a guest that owns a raw disk could write a header that names any
//! file of the host as its backing file. It tells an operator what was probably meant, and it tells
//! what such a guest must not write where somebody may guess later ([`is_other_format`]).

/// The bytes from the beginning of a file that [`seems`] wants to see.
pub const BYTES: usize = 4096;

/// A signature at a fixed place.
struct Signature {
    format: &'static str,
    offset: usize,
    magic: &'static [u8],
}

const SIGNATURES: &[Signature] = &[
    at(0, "qcow2", b"QFI\xfb\0\0\0\x02"),
    at(0, "qcow2", b"QFI\xfb\0\0\0\x03"),
    at(0, "qcow", b"QFI\xfb"),
    at(0, "qed", b"QED\0"),
    at(0, "luks", b"LUKS\xba\xbe"),
    at(0, "vmdk", b"KDMV"),
    at(0, "vmdk", b"COWD"),
    at(0, "vmdk", b"# Disk DescriptorFile"),
    at(0, "vhdx", b"vhdxfile"),
    at(0, "vpc", b"conectix"),
    at(0x40, "vdi", b"\x7f\x10\xda\xbe"),
    at(0, "parallels", b"WithoutFreeSpace"),
    at(0, "parallels", b"WithouFreSpacExt"),
    at(0, "bochs", b"Bochs Virtual HD Image"),
    at(0, "cloop", b"#!/bin/sh\n#V2.0 Format\n"),
];

const fn at(offset: usize, format: &'static str, magic: &'static [u8]) -> Signature {
    Signature {
        format,
        offset,
        magic,
    }
}

/// The format whose signature `head`, the beginning of a file, has; or `None`.
pub fn seems(head: &[u8]) -> Option<&'static str> {
    let found = SIGNATURES.iter().find(|signature| {
        let end = signature.offset + signature.magic.len();
        head.get(signature.offset..end) == Some(signature.magic)
    });
    found.map(|signature| signature.format)
}

/// The format that somebody who guesses could take a raw disk for whose first
/// [`PROBE_BYTES`](blockcore::driver::PROBE_BYTES) bytes (fewer if it is shorter) are `head`; `None` if
/// it can only be raw. Says yes to more than [`seems`]: to whatever a program that probes may look for.
pub fn is_other_format(head: &[u8]) -> Option<&'static str> {
    seems(head).or_else(|| is_vmdk_text(head).then_some("vmdk"))
}

/// Whether there is a VMDK description: comments and empty lines, and then a version.
fn is_vmdk_text(head: &[u8]) -> bool {
    let mut lines = head.split(|byte| *byte == b'\n');
    let first = lines.find(|line| {
        let blank = line.iter().all(|byte| matches!(byte, b' ' | b'\r'));
        !blank && !line.starts_with(b"#")
    });
    first.is_some_and(|line| line.starts_with(b"version="))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_in_words_is_another_format_and_a_text_is_not() {
        for (head, format) in [
            (&b"# Disk DescriptorFile\nversion=1\n"[..], Some("vmdk")),
            (b"# what I like\n  \n\r\nversion=3\r\n", Some("vmdk")),
            (b"version=1\n", Some("vmdk")),
            (b"# what I like\nin version=1\n", None),
            (b"QFI\xfb\0\0\0\x09", Some("qcow")),
            (&[0; 512], None),
            (b"", None),
        ] {
            assert_eq!(is_other_format(head), format, "{head:?}");
        }
    }

    #[test]
    fn a_signature_counts_only_in_its_place() {
        assert_eq!(seems(b"QFI\xfb\0\0\0\x03rest"), Some("qcow2"));
        assert_eq!(seems(b"QFI\xfb\0\0\0\x01rest"), Some("qcow"));
        assert_eq!(seems(b" QFI\xfb\0\0\0\x03"), None);
        let mut vdi = vec![0; 80];
        vdi[0x40..0x44].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(seems(&vdi), Some("vdi"));
        assert_eq!(seems(&vdi[..0x42]), None);
        assert_eq!(seems(&[]), None);
    }
}
