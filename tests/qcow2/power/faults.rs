//! Planted faults: each is found, within a number of seeds that is stated here.

use std::panic::{AssertUnwindSafe, catch_unwind};

use blockcore::fault::{self, Fault};

use super::case::Case;
use super::judge::Judge;
use super::{Test, Totals};

/// Within how many seeds each is found.
const WITHIN: u64 = 100;

/// Why a seed fails with a fault, if it does.
fn failure(seed: u64, fault: Option<Fault>) -> Option<String> {
    let case = Case::new(seed);
    let judge = Judge::new();
    fault::plant(fault);
    let run = AssertUnwindSafe(|| Test::run(&case, &judge, &mut Totals::default()));
    let outcome = catch_unwind(run);
    fault::plant(None);
    let (wrong, _) = judge.settle();
    match outcome {
        Ok(Ok(_)) => wrong.into_iter().next(),
        Ok(Err(why)) => Some(why),
        Err(_) => Some("an assertion".into()),
    }
}

#[test]
fn every_planted_fault_of_the_format_is_found_and_its_seed_passes_without_it() {
    let mut missed = Vec::new();
    // A write must be under way for long to meet that one: `race` holds one back.
    let others = Fault::QCOW2.into_iter();
    for (name, fault) in others.filter(|(_, fault)| *fault != Fault::NoWaitForUsers) {
        let found = (1..=WITHIN).find_map(|seed| Some((seed, failure(seed, Some(fault))?)));
        let Some((seed, why)) = found else {
            eprintln!("{name}: not found within {WITHIN} seeds");
            missed.push(name);
            continue;
        };
        eprintln!("{name}: seed {seed} of {WITHIN}: {why}");
        assert_eq!(failure(seed, None), None, "seed {seed} fails by itself");
    }
    assert_eq!(missed, Vec::<&str>::new());
}
