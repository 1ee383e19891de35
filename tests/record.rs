//! The graph recorded ahead: after a crash at any moment of a change, a start with the same arguments
//! serves what the guest was reading, before or after it.
//!
//! `STONEWORK_SEED=n` replays one seed.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use blockcore::engine::sim::{FileProperties, Simulation, Worker};
use blockcore::graph::{Control, ExportState, Graph, RootSpec};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};

const LIMIT: Duration = Duration::from_secs(3600);
const STATE: &str = "/simulated/vm.sock.state";
const SEEDS: u64 = 150;

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("STONEWORK_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("a number");
            seed..seed + 1
        }
        Err(_) => 1..1 + SEEDS,
    }
}

/// A daemon's control thread, as far as this test needs one.
struct Daemon {
    worker: Rc<Worker>,
    control: Control,
}

impl Daemon {
    fn start(simulation: &Simulation) -> Self {
        let worker = simulation.worker();
        let context = Rc::clone(worker.context());
        Self {
            worker,
            control: Control::new(Graph::new(formats::drivers()), context),
        }
    }

    fn run<T: 'static>(
        &self,
        simulation: &Simulation,
        work: impl Future<Output = T> + 'static,
    ) -> T {
        let done = simulation.run(&self.worker, LIMIT, work);
        done.unwrap_or_else(|stuck| panic!("{stuck}"))
    }
}

fn raw(node: &str, file: &str) -> Options {
    let text = format!("raw,node-name={node},file.driver=file,file.filename=/simulated/{file}");
    Options::parse(&text, Some("driver")).expect("well-formed")
}

/// Starts with the arguments of the first day; returns the node that the guest is given.
async fn serve(control: &Control) -> Result<String, Error> {
    control.add(raw("disk", "first")).await?;
    let state = loop {
        match ExportState::open(control, Path::new(STATE), "vda", false).await {
            // The last calls of a killed daemon still land.
            Err(error) if error.kind() == ErrorKind::Busy => {
                control.context().delay(Duration::from_millis(1)).await;
            }
            opened => break opened?,
        }
    };
    let node = control.recorded_node(&state, "disk").await?;
    let spec = RootSpec {
        state: Some(state),
        ..RootSpec::writer("export 'vda'").in_units_of(512)
    };
    control.add_root(&node, spec).await?;
    Ok(node)
}

/// Puts another disk in the place of the one that is served, as a mirror does when it completes.
async fn pivot(control: &Control, commit: bool) -> Result<(), Error> {
    let mut change = control.begin().await;
    let from = change.find("disk")?;
    let to = change.add(raw("copy", "second"), None).await?;
    change.replace_node(from, to)?;
    let prepared = change.prepare().await?;
    if commit {
        prepared.commit().finish().await
    } else {
        prepared.abort().await;
        Ok(())
    }
}

#[test]
fn a_crash_at_any_moment_of_a_pivot_leaves_one_tree_to_serve_and_after_it_the_new_one() {
    let (mut before, mut after, mut in_between) = (0, 0, 0);
    for seed in seeds() {
        eprintln!("STONEWORK_SEED={seed}");
        let simulation = Simulation::new(seed);
        for file in ["first", "second"] {
            let path = format!("/simulated/{file}");
            simulation.create_file(path, FileProperties::default(), 65536);
        }
        let mut random = simulation.random();
        let daemon = Daemon::start(&simulation);
        let control = daemon.control.clone();
        let served = daemon.run(&simulation, async move { serve(&control).await });
        assert_eq!(
            served.expect("it starts"),
            "disk",
            "nothing is recorded yet"
        );

        let commit = random.chance(800);
        let over = Rc::new(Cell::new(false));
        let (control, told) = (daemon.control.clone(), Rc::clone(&over));
        daemon.worker.context().spawn(async move {
            pivot(&control, commit)
                .await
                .expect("nothing is in the way");
            told.set(true);
        });
        for _ in 0..random.below(120) {
            simulation.step();
        }
        let was_over = over.get();
        drop(daemon);
        match random.below(3) {
            0 => simulation.kill(),
            1 => simulation.power_cut(),
            _ => {
                simulation.kill();
                simulation.power_cut();
            }
        }
        let daemon = Daemon::start(&simulation);
        let control = daemon.control.clone();
        let served = daemon.run(&simulation, async move { serve(&control).await });
        let served = served.unwrap_or_else(|error| panic!("seed {seed}: {}", error.report()));
        match (was_over, commit) {
            (true, true) => assert_eq!(served, "copy", "seed {seed}: an old disk is served"),
            (true, false) => assert_eq!(served, "disk", "seed {seed}: nothing was changed"),
            (false, _) => in_between += 1,
        }
        if served == "copy" {
            after += 1;
        } else {
            before += 1;
        }
    }
    eprintln!("{before} before, {after} after, {in_between} in between");
    if seeds().end - seeds().start == SEEDS {
        assert!(before > 20 && after > 20 && in_between > 20);
    }
}

#[test]
fn arguments_that_contradict_the_record_are_refused_naming_both() {
    let simulation = Simulation::new(7);
    for file in ["first", "second", "third"] {
        let path = format!("/simulated/{file}");
        simulation.create_file(path, FileProperties::default(), 65536);
    }
    let daemon = Daemon::start(&simulation);
    let control = daemon.control.clone();
    daemon.run(&simulation, async move {
        serve(&control).await.expect("it starts");
        pivot(&control, true).await.expect("nothing is in the way");
    });
    drop(daemon);
    simulation.kill();
    let daemon = Daemon::start(&simulation);
    let control = daemon.control.clone();
    let refused = daemon.run(&simulation, async move {
        control.add(raw("disk", "third")).await?;
        let state = ExportState::open(&control, Path::new(STATE), "vda", false).await?;
        control.recorded_node(&state, "disk").await
    });
    let message = refused
        .expect_err("the guest would get an old disk")
        .report();
    for part in ["third", "second", "--discard-state"] {
        assert!(message.contains(part), "{message}");
    }
    let control = daemon.control.clone();
    let node = daemon.run(&simulation, async move {
        let state = ExportState::open(&control, Path::new(STATE), "vda", true).await?;
        control.recorded_node(&state, "disk").await
    });
    assert_eq!(node.expect("as the operator wants"), "disk");
}
