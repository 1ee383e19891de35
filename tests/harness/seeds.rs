//! Seeds of simulated tests: which are tried, and how a failing one is had again.
//!
//! `STONEWORK_SEED=n` replays one seed. `STONEWORK_SEEDS=n` tries so many, `STONEWORK_SECONDS=n` as many
//! as fit in that time; both begin at `STONEWORK_SEED` if it is given.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

/// Every so many seeds one is run twice, and both must give the same hash.
const REPEAT_EVERY: u64 = 10;

/// Runs seeds from 1 on, `default` of them unless the environment says otherwise. `run` adds what a
/// seed reached to the totals, and returns the simulation's hash.
///
/// Returns the totals if they are those of at least `default` seeds, so that the caller can see whether
/// its test tests anything.
///
/// # Panics
///
/// If a seed does not replay; if the environment makes no sense.
pub fn try_all<T, H>(default: u64, run: impl Fn(u64, &mut T) -> H) -> Option<T>
where
    T: Default + Debug,
    H: PartialEq + Debug,
{
    let first = number("STONEWORK_SEED");
    let budget = number("STONEWORK_SECONDS").map(Duration::from_secs);
    let seeds = match (number("STONEWORK_SEEDS"), budget, first) {
        (Some(seeds), _, _) => seeds,
        (None, Some(_), _) => u64::MAX,
        (None, None, Some(_)) => 1,
        (None, None, None) => default,
    };
    let begin = Instant::now();
    let (mut totals, mut tried) = (T::default(), 0);
    for index in 0..seeds {
        if budget.is_some_and(|budget| begin.elapsed() > budget) {
            break;
        }
        let seed = first.unwrap_or(1).wrapping_add(index);
        let hash = run(seed, &mut totals);
        tried += 1;
        if seed.is_multiple_of(REPEAT_EVERY) || seeds == 1 {
            let again = run(seed, &mut T::default());
            assert_eq!(hash, again, "seed {seed} does not replay");
        }
    }
    eprintln!("{tried} seeds: {totals:?} in {:?}", begin.elapsed());
    (tried >= default).then_some(totals)
}

/// As [`try_all`], for what has no hash: a case is made of each seed, and `run` panics where one fails.
///
/// # Panics
///
/// As `run`; if the environment makes no sense.
pub fn try_cases<C: Debug, T: Default + Debug>(
    default: u64,
    new: impl Fn(u64) -> C,
    run: impl Fn(&C, &mut T),
) -> Option<T> {
    try_all(default, |seed, totals: &mut T| {
        replayable(seed, &new(seed), |case| {
            run(case, totals);
            Ok(())
        });
    })
}

/// Runs what a seed decided; a failure or a panic says what that was and how to have it again.
///
/// # Panics
///
/// If `run` fails.
pub fn replayable<C: Debug, T>(
    seed: u64,
    case: &C,
    run: impl FnOnce(&C) -> Result<T, String>,
) -> T {
    match catch_unwind(AssertUnwindSafe(|| run(case))) {
        Ok(Ok(value)) => value,
        Ok(Err(failure)) => panic!("{failure}\n{case:#?}\nreplay: STONEWORK_SEED={seed}"),
        Err(panic) => {
            eprintln!("{case:#?}\nreplay: STONEWORK_SEED={seed}");
            resume_unwind(panic)
        }
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|_| panic!("{name} is not a number: '{text}'")))
}
