//! The state file on the real engines, and through every end in the simulation.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;

use futures_util::FutureExt;

use super::super::tests::{node, tree};
use super::super::{ExportRecord, Record};
use super::*;
use crate::engine::sim::{Faults, FileProperties, Simulation, Worker};
use crate::engine::{EngineChoice, make};

const LIMIT: Duration = Duration::from_secs(600);
const PATH: &str = "/run/state";
/// How often each way to end is tried at each step.
const SEEDS: u64 = 8;

/// A record of several blocks, told apart by its epoch.
fn record(epoch: u64) -> Record {
    let nodes: Vec<(String, _)> = (0..40)
        .map(|number| {
            let options = format!("file,filename=/images/{epoch}-{number}-{}", "x".repeat(200));
            let child = format!("file=n{}", number + 1);
            let children = [child.as_str()];
            let children = if number == 39 { &[][..] } else { &children };
            (format!("n{number}"), node(&options, children))
        })
        .collect();
    let nodes: Vec<_> = nodes
        .iter()
        .map(|(name, node)| (name.as_str(), node.clone()))
        .collect();
    let export = ExportRecord {
        given: None,
        current: tree("n0", &nodes),
    };
    Record {
        epoch,
        exports: BTreeMap::from([("vda".to_owned(), export)]),
    }
}

fn run<T: 'static>(
    simulation: &Simulation,
    worker: &Worker,
    future: impl Future<Output = T> + 'static,
) -> T {
    simulation
        .run(worker, LIMIT, future)
        .unwrap_or_else(|stuck| panic!("{stuck}"))
}

/// Opens the state file as a new daemon does, once the one before is quite gone.
fn open(simulation: &Simulation, worker: &Worker) -> (StateFile, Option<Record>) {
    for _ in 0..10_000 {
        let context = Rc::clone(worker.context());
        let opened = run(simulation, worker, async move {
            let opened = StateFile::open(&context, Path::new(PATH)).await;
            context.delay(Duration::from_millis(1)).await;
            opened
        });
        match opened {
            Err(error) if error.kind() == ErrorKind::Busy => {}
            opened => return opened.unwrap(),
        }
    }
    panic!("the lock is never free");
}

fn write(
    simulation: &Simulation,
    worker: &Worker,
    file: &StateFile,
    epoch: u64,
) -> Result<(), Error> {
    let (context, file) = (Rc::clone(worker.context()), StateFile(Rc::clone(&file.0)));
    run(simulation, worker, async move {
        file.write(&context, &record(epoch)).await
    })
}

/// A machine whose state file has record 1, durably, unless `fresh`.
fn machine(seed: u64, fresh: bool) -> (Simulation, Rc<Worker>, StateFile) {
    let simulation = Simulation::new(seed);
    simulation.set_faults(Faults {
        short_permille: 200,
        interrupted_permille: 100,
        again_permille: 50,
        // Calls of a killed daemon that land when the next has long begun.
        slow_permille: 300,
        ..Faults::default()
    });
    let worker = simulation.worker();
    let (file, found) = open(&simulation, &worker);
    assert_eq!(found, None);
    if !fresh {
        write(&simulation, &worker, &file, 1).unwrap();
    }
    (simulation, worker, file)
}

/// How a daemon ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Kill,
    PowerCut,
    /// A kill, and the power goes while the daemon's last calls still land.
    KillAndPowerCut,
}

const ENDS: [End; 3] = [End::Kill, End::PowerCut, End::KillAndPowerCut];

impl End {
    fn happen(self, simulation: &Simulation) {
        match self {
            Self::Kill => simulation.kill(),
            Self::PowerCut => simulation.power_cut(),
            Self::KillAndPowerCut => {
                simulation.kill();
                let steps = simulation.random().below(10);
                for _ in 0..steps {
                    simulation.step();
                }
                simulation.power_cut();
            }
        }
    }
}

/// Ends a daemon `steps` steps into the write of record 2. Returns whether the write was over, and the
/// epoch that the next daemon finds.
fn interrupted(seed: u64, steps: usize, end: End, fresh: bool) -> (bool, Option<u64>) {
    let what = format!("seed {seed:#x}, {end:?} after {steps} steps, fresh: {fresh}");
    let (simulation, worker, file) = machine(seed, fresh);
    let outcome = Rc::new(RefCell::new(None));
    let (context, place) = (Rc::clone(worker.context()), Rc::clone(&outcome));
    worker.context().spawn(async move {
        let written = file.write(&context, &record(2)).await;
        place.replace(Some(written));
    });
    for _ in 0..steps {
        simulation.step();
    }
    let written = match outcome.take() {
        Some(Ok(())) => true,
        None => false,
        Some(Err(error)) => panic!("{what}: {}", error.report()),
    };
    end.happen(&simulation);
    drop(worker);

    let worker = simulation.worker();
    let (file, found) = open(&simulation, &worker);
    let epoch = found.as_ref().map(|found| found.epoch);
    let before = if fresh { None } else { Some(1) };
    let valid = epoch == Some(2) || (epoch == before && !written);
    assert!(valid, "{what}: written: {written}, found {epoch:?}");
    if let Some(found) = &found {
        assert_eq!(*found, record(found.epoch), "{what}");
    }

    // It is what this daemon serves, so it is what every later one must find, whatever the host was
    // still to do for the one before.
    let context = Rc::clone(worker.context());
    run(&simulation, &worker, async move {
        context.delay(Duration::from_millis(50)).await;
    });
    simulation.power_cut();
    drop((file, worker));
    let worker = simulation.worker();
    let (file, again) = open(&simulation, &worker);
    assert!(again == found, "{what}: found {epoch:?}, then another");

    // What the interrupted write has left behind does not keep the next from its work.
    write(&simulation, &worker, &file, 3).unwrap();
    simulation.power_cut();
    drop((file, worker));
    let worker = simulation.worker();
    let (_, last) = open(&simulation, &worker);
    assert_eq!(last.map(|last| last.epoch), Some(3), "{what}");
    (written, epoch)
}

#[test]
fn whatever_ends_a_write_at_whatever_step_leaves_the_old_record_or_the_new_one_for_good() {
    let (mut old, mut new) = (0, 0);
    for seed in 0..SEEDS {
        for end in ENDS {
            for fresh in [false, true] {
                for steps in 0.. {
                    match interrupted(seed, steps, end, fresh) {
                        (true, _) => break,
                        (false, Some(2)) => new += 1,
                        (false, _) => old += 1,
                    }
                }
            }
        }
    }
    let runs = (old, new);
    assert!(
        old > 50 * SEEDS && new > 10 * SEEDS,
        "old and new: {runs:?}"
    );
}

#[test]
fn a_write_that_fails_leaves_the_old_record_unless_the_file_says_that_it_is_in_doubt() {
    let (mut kept, mut doubted, mut written) = (0, 0, 0);
    for seed in 0..400 {
        let (simulation, worker, file) = machine(seed, seed % 4 == 0);
        let mut last = (seed % 4 != 0).then_some(1);
        let mut possible = vec![last];
        for epoch in 2..6 {
            simulation.set_faults(Faults {
                call_error_permille: 120,
                write_error_permille: 50,
                no_space_permille: 50,
                sync_error_permille: 80,
                short_permille: 100,
                ..Faults::default()
            });
            let outcome = write(&simulation, &worker, &file, epoch);
            match (&outcome, file.in_doubt()) {
                (Ok(()), false) => {
                    written += 1;
                    last = Some(epoch);
                    possible = vec![last];
                }
                (Err(_), false) => {
                    kept += 1;
                    // One that was written back after a doubt is certain again.
                    possible = vec![last];
                }
                (Err(error), true) => {
                    doubted += 1;
                    assert!(error.to_string().contains("may hold either"), "{error}");
                    possible.push(Some(epoch));
                }
                (Ok(()), true) => panic!("seed {seed}: written and in doubt"),
            }
            if file.in_doubt() {
                break;
            }
        }
        let in_doubt = file.in_doubt();
        simulation.set_faults(Faults::default());
        let end = ENDS[(seed % 3) as usize];
        end.happen(&simulation);
        drop((file, worker));
        let worker = simulation.worker();
        let (file, found) = open(&simulation, &worker);
        let epoch = found.map(|found| found.epoch);
        assert!(
            possible.contains(&epoch),
            "seed {seed}, in doubt: {in_doubt}: found {epoch:?}, of {possible:?}"
        );
        write(&simulation, &worker, &file, 100).unwrap();
        assert!(!file.in_doubt());
    }
    let counts = format!("{kept} kept, {doubted} doubted, {written} written");
    assert!(kept > 100 && doubted > 5 && written > 100, "{counts}");
}

#[test]
fn two_writes_at_once_happen_one_after_the_other_and_one_that_nobody_waits_for_to_its_end() {
    for seed in 0..50 {
        let (simulation, worker, file) = machine(seed, false);
        let file = Rc::new(file);
        let (context, both) = (Rc::clone(worker.context()), Rc::clone(&file));
        let outcome = run(&simulation, &worker, async move {
            let (two, three, four) = (record(2), record(3), record(4));
            {
                let abandoned = both.write(&context, &two).now_or_never();
                assert!(abandoned.is_none());
            }
            let writes = [both.write(&context, &three), both.write(&context, &four)];
            futures_util::future::join_all(writes).await
        });
        assert!(
            outcome.iter().all(Result::is_ok),
            "seed {seed}: {outcome:?}"
        );
        simulation.power_cut();
        drop((file, worker));
        let worker = simulation.worker();
        let (_, found) = open(&simulation, &worker);
        assert_eq!(found, Some(record(4)), "seed {seed}");
    }
}

#[test]
fn an_epoch_that_does_not_come_after_the_last_is_refused() {
    let (simulation, worker, file) = machine(1, false);
    let error = write(&simulation, &worker, &file, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let said = "cannot write state file '/run/state': epoch 1 does not come after 1";
    assert_eq!(error.to_string(), said);
    write(&simulation, &worker, &file, 2).unwrap();
}

#[test]
fn a_file_of_any_length_is_refused_without_reading_all_of_it() {
    let simulation = Simulation::new(1);
    simulation.create_file(PATH, FileProperties::default(), 1 << 50);
    let worker = simulation.worker();
    let context = Rc::clone(worker.context());
    let opened = run(&simulation, &worker, async move {
        let opened = StateFile::open(&context, Path::new(PATH)).await;
        opened.map(|_| ())
    });
    let error = opened.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("--discard-state"), "{error}");
}

#[test]
fn on_a_real_host_a_record_is_kept_locked_refused_and_discarded() {
    for choice in [EngineChoice::Threads, EngineChoice::Auto] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let context = IoContext::new(make(choice).unwrap());
        let (inner, own_path) = (Rc::clone(&context), path.clone());
        context.block_on(async move {
            let (file, found) = StateFile::open(&inner, &own_path).await.unwrap();
            assert_eq!((found, file.path()), (None, own_path.as_path()));
            file.write(&inner, &record(1)).await.unwrap();
            file.write(&inner, &record(2)).await.unwrap();
            let busy = StateFile::open(&inner, &own_path).await;
            assert_eq!(busy.map(|_| ()).unwrap_err().kind(), ErrorKind::Busy);
            drop(file);
            let (file, found) = StateFile::open(&inner, &own_path).await.unwrap();
            assert_eq!(found, Some(record(2)));
            drop(file);

            std::fs::write(&own_path, "{\"stonework-state\": 9}\n").unwrap();
            let error = StateFile::open(&inner, &own_path).await;
            let error = error.map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            let said = format!(
                "cannot use state file '{}': it has version 9, and this stonework reads version 1; \
                 option --discard-state starts without it",
                own_path.display()
            );
            assert_eq!(error.to_string(), said);

            let file = StateFile::open_discarding(&inner, &own_path).await.unwrap();
            assert!(!own_path.exists());
            file.write(&inner, &record(1)).await.unwrap();
            drop(file);
            let (_, found) = StateFile::open(&inner, &own_path).await.unwrap();
            assert_eq!(found, Some(record(1)));
        });
        let mut names: Vec<_> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["state", "state.lock"]);
    }
}
