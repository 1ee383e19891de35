use super::*;
use crate::qcow2::layout::extension::BitmapDirectory;
use crate::qcow2::layout::header::tests::plain;

fn header() -> Header {
    Header {
        bytes: 1 << 20,
        l1_entries: 1,
        ..plain()
    }
}

fn snapshot(disk_bytes: u64, vm_state_bytes: u64) -> Snapshot {
    Snapshot {
        l1_offset: 0,
        l1_entries: 0,
        id: "1".into(),
        name: "a".into(),
        date_seconds: 0,
        date_nanoseconds: 0,
        vm_clock_nanoseconds: 0,
        vm_state_bytes,
        disk_bytes: Some(disk_bytes),
        icount: None,
        extra: Vec::new(),
        extra_bytes: 24,
    }
}

fn parse(text: &str, header: &Header, snapshots: &[Snapshot]) -> Result<Amendment, Error> {
    let present = Present {
        header,
        snapshots,
        discard_no_unref: false,
    };
    Amendment::parse(&Options::parse(text, None).unwrap(), &present, false)
}

#[track_caller]
fn refused(text: &str, header: &Header, says: &str) {
    let error = parse(text, header, &[]).unwrap_err();
    assert!(error.to_string().contains(says), "{text}: {error}");
}

#[test]
fn what_version_2_cannot_say_is_refused_and_named() {
    let with = |change: fn(&mut Header)| {
        let mut header = header();
        change(&mut header);
        header
    };
    let cases: [(Header, &str); 5] = [
        (
            with(|header| header.features.incompatible = Features::EXTENDED_L2),
            "extended",
        ),
        (
            with(|header| header.features.incompatible = Features::COMPRESSION),
            "zstd",
        ),
        (
            with(|header| header.features.incompatible = Features::DATA_FILE),
            "data file",
        ),
        (
            with(|header| {
                header.extensions.bitmaps = Some(BitmapDirectory {
                    bitmaps: 1,
                    offset: 0x5_0000,
                    bytes: 32,
                });
            }),
            "bitmaps",
        ),
        (with(|header| header.refcount_order = 3), "refcount_bits=16"),
    ];
    for (header, says) in &cases {
        refused("version=v2", header, says);
    }
    let wide = parse("version=v2,refcount-bits=16", &cases[4].0, &[]).unwrap();
    assert_eq!((wide.version, wide.refcount_order), (2, 4));
    refused("version=v2,lazy-refcounts=on", &header(), "lazy");
    refused("version=v2,refcount-bits=8", &header(), "refcount_bits=16");
    let lengths = [
        (1 << 20, 0, true),
        (2 << 20, 0, false),
        (1 << 20, 1 << 32, false),
    ];
    for (disk, state, is_fine) in lengths {
        let parsed = parse("version=0.10", &header(), &[snapshot(disk, state)]);
        assert_eq!(parsed.is_ok(), is_fine, "{disk} {state}");
    }
}

#[test]
fn lazy_counts_go_with_the_version_that_has_them() {
    let mut lazy = header();
    lazy.features.compatible = Features::LAZY_REFCOUNTS;
    let amendment = parse("version=v2", &lazy, &[]).unwrap();
    amendment.apply(&mut lazy);
    assert_eq!((lazy.version, lazy.features), (2, Features::default()));
}

#[test]
fn what_cannot_be_amended_is_refused_unless_it_is_so_already() {
    let mut overlay = header();
    overlay.backing = Some("base".into());
    overlay.extensions.backing_format = Some("raw".into());
    refused("backing-file=other", &overlay, "rebase");
    refused("backing-fmt=qcow2", &overlay, "rebase");
    refused("backing-file=", &header(), "rebase");
    assert!(parse("backing-file=base,backing-fmt=raw", &overlay, &[]).is_ok());
    refused("data-file=x", &header(), "external data file");
    refused("data-file-raw=on", &header(), "exists");
    assert!(parse("data-file-raw=off", &header(), &[]).is_ok());
    for text in [
        "cluster-size=4096",
        "compression-type=zstd",
        "preallocation=off",
    ] {
        assert!(parse(text, &header(), &[]).is_err(), "{text}");
    }
    for bits in [0, 3, 128] {
        let text = format!("refcount-bits={bits}");
        assert!(parse(&text, &header(), &[]).is_err(), "{bits}");
    }
}

#[test]
fn a_disk_gets_shorter_only_by_force() {
    let header = header();
    refused("size=512k", &header, "--force");
    refused("size=1000", &header, "512");
    assert!(parse("size=2M", &header, &[]).is_ok());
    let present = Present {
        header: &header,
        snapshots: &[],
        discard_no_unref: false,
    };
    let options = Options::parse("size=512k", None).unwrap();
    assert!(Amendment::parse(&options, &present, true).is_ok());
}
