//! Planted faults: each is found, within a number of seeds that is stated here.

use std::panic::{AssertUnwindSafe, catch_unwind};

use blockcore::fault::{self, Fault};

use crate::case::Case;
use crate::{Test, Totals};

/// Within how many seeds each is found. Most take a few; when this was written a mark too early took 110, a stale
/// resolution 188 and an elided flush 216.
const WITHIN: u64 = 300;

/// Why a seed fails with a fault, if it does.
fn failure(seed: u64, fault: Option<Fault>) -> Option<String> {
    let case = Case::new(seed);
    fault::plant(fault);
    let run = AssertUnwindSafe(|| Test::run(&case, &mut Totals::default()));
    let outcome = catch_unwind(run);
    fault::plant(None);
    match outcome {
        Ok(Ok(_)) => None,
        Ok(Err(why)) => Some(why),
        Err(_) => Some("an assertion of the core".into()),
    }
}

#[test]
fn every_planted_fault_is_found_and_its_seed_passes_without_it() {
    let mut missed = Vec::new();
    for (name, fault) in Fault::CORE {
        let found = (1..=WITHIN).find_map(|seed| Some((seed, failure(seed, Some(fault))?)));
        let Some((seed, why)) = found else {
            eprintln!("{name}: not found within {WITHIN} seeds");
            missed.push(name);
            continue;
        };
        eprintln!("{name}: seed {seed} of {WITHIN}: {why}");
        for seed in 1..=seed {
            assert_eq!(failure(seed, None), None, "seed {seed} fails by itself");
        }
    }
    assert_eq!(missed, Vec::<&str>::new());
}
