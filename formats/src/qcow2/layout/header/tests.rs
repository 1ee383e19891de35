use super::*;
use crate::qcow2::layout::extension::{BitmapDirectory, FeatureName};

/// A disk of a gibibyte in clusters of 64 KiB.
/// An image of 1 GiB with clusters of 64 KiB, and nothing special about it.
pub(crate) fn plain() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        bytes: 1 << 30,
        backing: None,
        l1_offset: 0x3_0000,
        l1_entries: 2,
        refcount_table_offset: 0x1_0000,
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: 0,
        features: Features::default(),
        compression: Compression::Zlib,
        extensions: Extensions::default(),
        unknown: Vec::new(),
    }
}

fn everything() -> Header {
    Header {
        backing: Some("base image.raw".into()),
        features: Features {
            incompatible: Features::EXTENDED_L2 | Features::COMPRESSION | Features::DIRTY,
            compatible: Features::LAZY_REFCOUNTS | 1 << 40,
            autoclear: Features::BITMAPS | Features::SEGMENT | 1 << 50,
        },
        compression: Compression::Zstd,
        l1_entries: 4,
        snapshots: 2,
        snapshots_offset: 0x9_0000,
        unknown: vec![7; 16],
        extensions: Extensions {
            has_stale_bitmaps: false,
            backing_format: Some("raw".into()),
            data_file: Some("data".into()),
            bitmaps: Some(BitmapDirectory {
                bitmaps: 1,
                offset: 0x8_0000,
                bytes: 32,
            }),
            cookie: Some([0x5a; 16]),
            names: vec![FeatureName {
                kind: FeatureKind::Compatible,
                bit: 40,
                name: "something".into(),
            }],
            unknown: vec![(0x1234_5678, vec![1, 2, 3]), (0x1234_5678, Vec::new())],
        },
        ..plain()
    }
}

#[test]
fn a_header_survives_the_way_there_and_back_with_what_nobody_here_knows() {
    for header in [plain(), everything()] {
        let bytes = header.serialise().expect("there is room");
        assert_eq!(bytes.len(), 65536);
        let parsed = Header::parse(&bytes, Purpose::Use).expect("it is one of ours");
        assert_eq!(parsed, header);
        assert_eq!(parsed.serialise().expect("there is room"), bytes);
    }
    assert_eq!(everything().unknown_autoclear(), 1 << 50);
    let old = Header {
        version: 2,
        backing: Some("base".into()),
        ..plain()
    };
    let bytes = old.serialise().expect("there is room");
    assert_eq!(
        Header::parse(&bytes, Purpose::Use).expect("it is ours"),
        old
    );
    // The end mark is all that an extension-free header of version 2 has.
    assert_eq!(u64_at(&bytes, 8), 80);
}

#[test]
fn what_the_file_is_too_short_for_counts_as_zero() {
    let bytes = plain().serialise().expect("there is room");
    let names_end = 112 + 8 + 9 * 48;
    assert_eq!(
        Header::parse(&bytes[..names_end], Purpose::Use).expect("nothing is missing"),
        plain()
    );
}

/// The field's place, what is put there, and what is said of it.
type Damage = (usize, &'static [u8], ErrorKind, &'static str);

#[test]
fn what_no_header_can_say_is_refused_with_field_and_value() {
    const CORRUPT: ErrorKind = ErrorKind::Corrupt;
    const UNSUPPORTED: ErrorKind = ErrorKind::Unsupported;
    let damages: &[Damage] = &[
        (0, b"QFJ", ErrorKind::Invalid, "not a qcow2 image"),
        (4, &[0, 0, 0, 4], UNSUPPORTED, "version 4"),
        (4, &[0, 0, 0, 1], UNSUPPORTED, "version 1"),
        (
            8,
            &[0, 0, 0, 0, 0, 2],
            CORRUPT,
            "backing_file_offset is 0x20000",
        ),
        (
            8,
            &[0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0],
            CORRUPT,
            "backing_file_size is 1024",
        ),
        (
            8,
            &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 2],
            CORRUPT,
            "at most 1 bytes",
        ),
        (20, &[0, 0, 0, 8], CORRUPT, "cluster_bits is 8"),
        (20, &[0, 0, 0, 22], CORRUPT, "cluster_bits is 22"),
        (20, &[0xff; 4], CORRUPT, "cluster_bits is 4294967295"),
        (24, &[0x80], CORRUPT, "size is 9223372037928517632"),
        (
            24,
            &[0, 0, 0, 1],
            CORRUPT,
            "l1_size is 2, and a disk of 5368709120 bytes needs 10",
        ),
        (32, &[0, 0, 0, 1], UNSUPPORTED, "encrypted with AES"),
        (32, &[0, 0, 0, 2], UNSUPPORTED, "encrypted with LUKS"),
        (32, &[0, 0, 0, 3], CORRUPT, "crypt_method is 3"),
        (36, &[0, 0x40, 0, 1], CORRUPT, "L1 table has 33554440 bytes"),
        (
            40,
            &[0, 0, 0, 0, 0, 0, 2, 0],
            CORRUPT,
            "L1 table is at offset 0x200",
        ),
        (40, &[0x80], CORRUPT, "beyond any file"),
        (
            48,
            &[0, 0, 0, 0, 0, 0, 2, 0],
            CORRUPT,
            "refcount table is at offset 0x200",
        ),
        (
            56,
            &[0, 0, 0, 129],
            CORRUPT,
            "refcount table has 8454144 bytes",
        ),
        (56, &[0, 0, 0, 0], CORRUPT, "refcount_table_clusters is 0"),
        (60, &[0, 1, 0, 1], CORRUPT, "snapshot table has"),
        (
            64,
            &[0, 0, 0, 0, 0, 0, 0, 8],
            CORRUPT,
            "snapshot table is at offset 0x8",
        ),
        (72, &[0x80], UNSUPPORTED, "not know: bit 63"),
        (79, &[8], CORRUPT, "and it is set"),
        (96, &[0, 0, 0, 7], CORRUPT, "refcount_order is 7"),
        (100, &[0, 0, 0, 96], CORRUPT, "header_length is 96"),
        (100, &[0, 0, 0, 108], CORRUPT, "not a multiple of 8"),
        (100, &[0, 2, 0, 0], CORRUPT, "header_length is 131072"),
        (104, &[1], CORRUPT, "and it is not set"),
        (104, &[2], UNSUPPORTED, "compression_type is 2"),
        (
            112,
            &[0x68, 3, 0xf8, 0x57, 0, 1],
            CORRUPT,
            "0x6803f857 says that it has 65",
        ),
        (
            112,
            &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16],
            CORRUPT,
            "has 16 bytes",
        ),
        (112, &[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16], CORRUPT, "LUKS"),
    ];
    let good = plain().serialise().expect("there is room");
    for (at, put, kind, why) in damages {
        let mut bytes = good.clone();
        bytes[*at..*at + put.len()].copy_from_slice(put);
        let error = Header::parse(&bytes, Purpose::Use).expect_err(why);
        assert!(error.to_string().contains(why), "{why}: {error}");
        assert_eq!(error.kind(), *kind, "{error}");
    }
}

#[test]
fn an_unknown_incompatible_feature_is_refused_with_the_name_that_the_image_has_for_it() {
    let mut header = plain();
    header.features.incompatible = 1 << 17;
    header.extensions.names.push(FeatureName {
        kind: FeatureKind::Incompatible,
        bit: 17,
        name: "holograms".into(),
    });
    let bytes = header.serialise().expect("there is room");
    let error = Header::parse(&bytes, Purpose::Check).unwrap_err();
    assert!(
        error.to_string().ends_with("not know: 'holograms'"),
        "{error}"
    );
}

#[test]
fn a_check_may_look_at_what_nobody_may_use() {
    let damaged = Header {
        refcount_table_clusters: 0,
        snapshots: 70_000,
        snapshots_offset: 3,
        ..plain()
    };
    let bytes = damaged.serialise().expect("there is room");
    assert!(Header::parse(&bytes, Purpose::Use).is_err());
    assert_eq!(Header::parse(&bytes, Purpose::Check).unwrap(), damaged);
}

#[test]
fn bitmaps_that_somebody_else_did_not_keep_are_none() {
    let mut header = everything();
    header.features.autoclear = 0;
    let bytes = header.serialise().expect("there is room");
    let parsed = Header::parse(&bytes, Purpose::Use).unwrap();
    assert_eq!(parsed.extensions.bitmaps, None);
}

#[test]
fn a_bitmaps_extension_that_cannot_be_is_corrupt() {
    let good = BitmapDirectory {
        bitmaps: 1,
        offset: 0x8_0000,
        bytes: 32,
    };
    for (wrong, why) in [
        (BitmapDirectory { bitmaps: 0, ..good }, "no bitmaps"),
        (
            BitmapDirectory {
                bitmaps: 65536,
                ..good
            },
            "65536 bitmaps",
        ),
        (
            BitmapDirectory {
                offset: 512,
                ..good
            },
            "directory offset 0x200",
        ),
        (
            BitmapDirectory {
                bytes: 65 << 20,
                ..good
            },
            "68157440 bytes",
        ),
        (
            BitmapDirectory {
                offset: 1 << 63,
                ..good
            },
            "beyond any file",
        ),
    ] {
        let mut header = everything();
        header.extensions.bitmaps = Some(wrong);
        let bytes = header.serialise().expect("there is room");
        let error = Header::parse(&bytes, Purpose::Use).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn a_header_that_does_not_fit_into_its_cluster_is_not_written() {
    let small = Header {
        cluster_bits: 9,
        bytes: 1 << 20,
        l1_entries: 32,
        refcount_table_offset: 512,
        l1_offset: 1024,
        backing: Some("b".repeat(392)),
        ..plain()
    };
    let bytes = small.serialise().expect("112, an end mark of 8, and 392");
    assert_eq!(bytes.len(), 512);
    assert_eq!(Header::parse(&bytes, Purpose::Use).unwrap(), small);
    let longer = Header {
        backing: Some("b".repeat(393)),
        ..small
    };
    let error = longer.serialise().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn extended_entries_need_clusters_of_sixteen_kilobytes() {
    for (bits, fits) in [(13, false), (14, true)] {
        let mut header = Header {
            cluster_bits: bits,
            bytes: 1 << 20,
            ..plain()
        };
        header.features.incompatible = Features::EXTENDED_L2;
        let bytes = header.serialise().expect("there is room");
        assert_eq!(Header::parse(&bytes, Purpose::Use).is_ok(), fits, "{bits}");
    }
}

#[test]
fn a_raw_data_file_and_a_backing_image_exclude_each_other() {
    let mut header = Header {
        backing: Some("base".into()),
        ..plain()
    };
    header.features.incompatible = Features::DATA_FILE;
    header.features.autoclear = Features::RAW_DATA_FILE;
    let bytes = header.serialise().expect("there is room");
    let error = Header::parse(&bytes, Purpose::Use).unwrap_err();
    assert!(error.to_string().contains("as raw"), "{error}");
}

/// Whatever is in a header, looking at it ends in a value or a sentence, and a value survives being
/// written.
#[test]
fn damaged_headers_never_do_worse_than_being_refused() {
    // SplitMix64; the seed is fixed, so a failure is had again.
    let mut state = 20_u64;
    let mut random = move |limit: u64| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    };
    let small = Header {
        cluster_bits: 9,
        bytes: 1 << 20,
        l1_entries: 32,
        ..plain()
    };
    let goods = [plain(), everything(), small].map(|header| header.serialise().expect("fits"));
    let (mut accepted, mut refused) = (0, 0);
    for turn in 0..20_000 {
        let mut bytes = goods[turn % 3].clone();
        for _ in 0..=random(3) {
            let at = match random(4) {
                0 => random(600.min(bytes.len() as u64)),
                _ => random(128),
            };
            bytes[at as usize] = match random(3) {
                0 => 0,
                1 => 1 << random(8),
                _ => random(256) as u8,
            };
        }
        bytes.truncate(24 + random(bytes.len() as u64) as usize);
        let Ok(mut header) = Header::parse(&bytes, Purpose::Check) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        // They are not written again.
        header.extensions.has_stale_bitmaps = false;
        if let Ok(again) = header.serialise() {
            let again = Header::parse(&again, Purpose::Check);
            assert_eq!(again.expect("it was accepted"), header, "turn {turn}");
        }
    }
    assert!(accepted > 1000 && refused > 1000, "{accepted}, {refused}");
}
