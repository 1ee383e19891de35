//! Images that claim more than there is.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use blockcore::driver::Fix;

use super::check::ours;
use super::*;

/// Places in a header, and what is put there.
type Claims = &'static [(u64, &'static [u8])];

#[test]
fn a_check_takes_memory_for_what_there_is_and_not_for_what_is_claimed() {
    let place = Place::new();
    must(
        "qemu-img",
        &place,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            "base",
            "1M",
        ],
    );
    let claims: &[(&str, Claims)] = &[
        ("an L1 table of 32 MiB", &[(36, &[0, 0x40, 0, 0])]),
        ("a refcount table of 8 MiB", &[(56, &[0, 0, 0x40, 0])]),
        ("65536 snapshots", &[(60, &[0, 1, 0, 0])]),
        (
            "all of them",
            &[
                (36, &[0, 0x40, 0, 0]),
                (56, &[0, 0, 0x40, 0]),
                (60, &[0, 1, 0, 0]),
            ],
        ),
    ];
    for (what, claims) in claims {
        // As it is, and as a file with a hole of a tebibyte.
        for (length, most_bytes) in [(None, 32 << 20), (Some(1 << 40), 160 << 20)] {
            std::fs::copy(place.join("base"), place.join("disk")).expect("there is room");
            let file = OpenOptions::new().write(true).open(place.join("disk"));
            let file = file.expect("it is ours");
            for (at, bytes) in *claims {
                file.write_all_at(bytes, *at).expect("there is room");
            }
            if let Some(length) = length {
                file.set_len(length).expect("a file may have holes");
            }
            let begin = Instant::now();
            for repair in [Fix::None, Fix::All] {
                let taken = allocation_counter::measure(|| {
                    let _ = ours(&place, "disk", repair);
                });
                assert!(
                    taken.bytes_max < most_bytes,
                    "{what}, {length:?}, {repair:?}: {} bytes",
                    taken.bytes_max
                );
            }
            let took = begin.elapsed();
            assert!(
                took < Duration::from_secs(60),
                "{what}, {length:?}: {took:?}"
            );
        }
    }
}
