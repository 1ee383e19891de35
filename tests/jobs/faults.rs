//! Planted faults: each is found, within a number of seeds that is stated here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use blockcore::fault::{self, Fault};

use crate::disk::Templates;
use crate::{Case, Totals, try_case};

/// Within how many seeds each is found.
const WITHIN: u64 = 200;

/// Why a seed fails with a fault, if it does.
fn failure(templates: &Rc<Templates>, seed: u64, fault: Option<Fault>) -> Option<String> {
    let case = Case::new(seed);
    fault::plant(fault);
    let run = AssertUnwindSafe(|| try_case(templates, &case, &mut Totals::default()));
    let outcome = catch_unwind(run);
    fault::plant(None);
    match outcome {
        Ok(Ok(_)) => None,
        Ok(Err(why)) => Some(why),
        Err(_) => Some("an assertion of the core".into()),
    }
}

#[test]
fn every_mistake_of_a_job_is_found_and_its_seed_passes_without_it() {
    let templates = Rc::new(Templates::make());
    let mut missed = Vec::new();
    for (name, fault) in Fault::JOBS {
        let found =
            (1..=WITHIN).find_map(|seed| Some((seed, failure(&templates, seed, Some(fault))?)));
        let Some((seed, why)) = found else {
            eprintln!("{name}: not found within {WITHIN} seeds");
            missed.push(name);
            continue;
        };
        let first = why.lines().next().unwrap_or_default();
        eprintln!("{name}: seed {seed} of {WITHIN}: {first}");
        assert_eq!(
            failure(&templates, seed, None),
            None,
            "seed {seed} fails by itself"
        );
    }
    assert_eq!(missed, Vec::<&str>::new());
}
