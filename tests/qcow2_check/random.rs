//! Images damaged at random places.

use std::fs;

use blockcore::driver::Fix;
use harness::random::Random;

use super::check::{exit, ours, theirs};
use super::corpus::Base;
use super::*;

const BASES: &[Base] = &[
    Base::Plain,
    Base::SmallClusters,
    Base::OneBitCounts,
    Base::Snapshots,
    Base::Compressed,
    Base::Extended,
    Base::Version2,
    Base::Bitmaps,
    Base::DataFile,
    Base::Wide,
];

/// Changes some bytes where metadata is.
fn damage(bytes: &mut [u8], random: &mut Random) {
    let cluster = 1 << bytes[23];
    // Data looks alike all over its cluster.
    let is_metadata = |cluster: &[u8]| cluster.windows(9).any(|bytes| bytes[0] != bytes[8]);
    let places: Vec<_> = bytes
        .chunks(cluster)
        .enumerate()
        .filter(|(_, cluster)| is_metadata(cluster))
        .map(|(index, _)| index * cluster)
        .collect();
    for _ in 0..=random.below(3) {
        let place = *random.pick(&places);
        let length = cluster.min(bytes.len() - place).min(512) as u64;
        let most = *random.pick(&[length, length.min(112)]);
        let at = match place {
            // Without magic and version, with which nothing can be done.
            0 => 8 + random.below(most - 8) as usize,
            place => place + random.below(most) as usize,
        };
        bytes[at] = match random.below(4) {
            0 => 0,
            1 => random.below(256) as u8,
            _ => bytes[at] ^ 1 << random.below(8),
        };
    }
}

#[test]
fn randomly_damaged_images_are_counted_as_qemu_does_and_repaired_to_its_content() {
    let place = Place::new();
    let bases: Vec<_> = BASES.iter().map(|base| base.make(&place)).collect();
    let seed = Random::seed("STONEWORK_SEED");
    let turns = match std::env::var("STONEWORK_SEEDS") {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => 60,
    };
    let (mut all, mut compared, mut repaired) = (Vec::new(), 0, 0);
    for turn in 0..turns {
        let seed = seed.wrapping_add(turn);
        let mut random = Random::new(seed);
        let mut bytes = random.pick(&bases).clone();
        damage(&mut bytes, &mut random);
        fs::write(place.join("image"), &bytes).expect("there is room");
        let (code, report) = theirs(&place, "image", Fix::None);
        let mine = ours(&place, "image", Fix::None);
        let mut differ = |what: &str| {
            all.push(format!(
                "seed {seed}: {what}\n  {code} {report:?}\n  {mine:?}"
            ));
        };
        if let (Some(report), Ok(mine)) = (&report, &mine)
            && report != mine
        {
            differ("another report");
        } else if code != 1
            && let Err(error) = &mine
            // QEMU takes any, against the specification.
            && !error.to_string().contains("header_length")
        {
            differ("refused");
        }
        compared += u32::from(report.is_some());
        let Ok(mended) = ours(&place, "image", Fix::All) else {
            continue;
        };
        let after = ours(&place, "image", Fix::None);
        let code = theirs(&place, "image", Fix::None).0;
        if code != exit(&after) && code != 1 {
            differ(&format!("repaired to {after:?}, and QEMU says {code}"));
        }
        let is_mended = after.is_ok_and(|after| after.leaks + after.corruptions == 0);
        repaired += u32::from(is_mended && mended.corruptions_fixed + mended.leaks_fixed > 0);
    }
    assert!(
        all.is_empty(),
        "{} differences, STONEWORK_SEED={seed}:\n{}",
        all.len(),
        all.join("\n")
    );
    // It tests something.
    assert!(
        turns < 60 || (compared > turns as u32 / 3 && repaired > turns as u32 / 20),
        "{compared}, {repaired}"
    );
}
