//! Reopening and copying on hosts whose calls fail on cue.

use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::{CopyFlags, WriteFlags};
use blockcore::engine::sim::{Faults, FileProperties, Random, Simulation, Worker};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::RequestKind;
use blockcore::io::buffer::Segments;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind, IoError};

const LIMIT: Duration = Duration::from_secs(3600);
const PATH: &str = "/simulated/disk";
const BYTES: u64 = 256 << 10;

/// A simulated host with one worker, which is the control thread too.
struct World {
    simulation: Simulation,
    worker: Rc<Worker>,
    control: Control,
}

impl World {
    fn new(seed: u64) -> Self {
        let simulation = Simulation::new(seed);
        let worker = simulation.worker();
        let graph = Graph::new(formats::drivers());
        let control = Control::new(graph, Rc::clone(worker.context()));
        Self {
            simulation,
            worker,
            control,
        }
    }

    fn run<T: 'static, W>(&self, work: impl FnOnce(Control) -> W) -> T
    where
        W: Future<Output = T> + 'static,
    {
        let work = work(self.control.clone());
        let done = self.simulation.run(&self.worker, LIMIT, work);
        done.expect("it ends")
    }

    /// Lets so many host calls fail, of a thousand.
    fn fail(&self, call_error_permille: u32) {
        self.simulation.set_faults(Faults {
            call_error_permille,
            ..Faults::default()
        });
    }

    fn add(&self, options: &str) -> Result<(), Error> {
        let options = Options::parse(options, Some("driver")).expect("options");
        self.run(|control| async move { control.add(options).await.map(drop) })
    }

    fn reopen(&self, options: &str) -> Result<(), Error> {
        let options = Options::parse(options, Some("driver")).expect("options");
        self.run(|control| async move { control.reopen(vec![options]).await })
    }

    fn use_it(&self, node: &'static str, spec: RootSpec) -> Result<RootId, Error> {
        self.run(move |control| async move { control.add_root(node, spec).await })
    }

    fn write(&self, id: RootId, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let from = Segments::allocate(data.len(), 4096);
        from.copy_from(data);
        self.run(move |control| async move {
            let root = control.root_here(id).expect("it is there");
            root.write(offset, from, WriteFlags::empty()).await
        })
    }

    fn read(&self, id: RootId, bytes: u64) -> Vec<u8> {
        let into = Segments::allocate(bytes as usize, 4096);
        let given = into.clone();
        let done = self.run(move |control| async move {
            let root = control.root_here(id).expect("it is there");
            root.read(0, given).await
        });
        done.expect("nothing fails now");
        into.to_vec()
    }
}

fn sharing(spec: RootSpec) -> RootSpec {
    RootSpec {
        shares: Permissions::all(),
        ..spec.in_units_of(512)
    }
}

#[test]
fn a_reopen_that_fails_anywhere_leaves_a_disk_that_works_and_keeps_others_out() {
    let (mut failed, mut done) = (0, 0);
    for seed in 0..100 {
        let world = World::new(seed);
        let mut random = world.simulation.random();
        let properties = FileProperties::default();
        world.simulation.create_file(PATH, properties, BYTES);
        let node = format!("file,node-name=disk,filename={PATH}");
        world
            .add(&format!("{node},auto-read-only=on"))
            .expect("nothing fails yet");
        let reader = RootSpec::reader("a reader").in_units_of(512);
        let reader = RootSpec {
            shares: Permissions::all() - Permissions::RESIZE,
            ..reader
        };
        let reader = world.use_it("disk", reader).expect("nothing fails yet");
        let mut model = vec![0; BYTES as usize];
        let mut writer = None;
        for turn in 0..20 {
            world.fail(random.between(0, 150) as u32);
            let result = match (random.between(0, 3), writer) {
                (0, None) => {
                    let spec = sharing(RootSpec::writer("a writer"));
                    let added = world.use_it("disk", spec);
                    added.map(|id| writer = Some(id))
                }
                (0, Some(id)) => {
                    let left =
                        world.run(move |control| async move { control.remove_root(id).await });
                    if left.is_ok() {
                        writer = None;
                    }
                    left
                }
                _ => world.reopen(&modes(&node, &mut random)),
            };
            match result {
                Ok(()) => done += 1,
                Err(_) => failed += 1,
            }
            world.fail(0);
            if let Some(id) = writer.filter(|id| world.control.node_of(*id).is_some()) {
                let offset = random.between(0, BYTES / 512 - 1) * 512;
                let data = [random.between(1, 255) as u8; 512];
                world.write(id, offset, &data).unwrap_or_else(|error| {
                    panic!("seed {seed}, turn {turn}: {error}");
                });
                model[offset as usize..][..512].copy_from_slice(&data);
            }
            assert!(
                world.read(reader, BYTES) == model,
                "seed {seed}, turn {turn}"
            );
        }
        // Nobody else may change the length of what the reader has, whatever failed.
        let other = format!("file,node-name=other,filename={PATH}");
        world.add(&other).expect("nobody uses it yet");
        let resizer = || {
            let spec = sharing(RootSpec::writer("somebody"));
            let needs = spec.needs | Permissions::RESIZE;
            RootSpec { needs, ..spec }
        };
        // The real host's processes are looked through many times before that is given up.
        if seed % 20 == 0 {
            let refused = world.use_it("other", resizer()).expect_err("it is in use");
            assert_eq!(refused.kind(), ErrorKind::Busy, "seed {seed}");
        }
        let closed = world.run(move |control| async move {
            for id in [Some(reader), writer].into_iter().flatten() {
                control.remove_root(id).await?;
            }
            control.remove("disk").await
        });
        closed.expect("nothing fails now");
        world.use_it("other", resizer()).unwrap_or_else(|error| {
            panic!("seed {seed}: a lock is left: {}", error.report());
        });
    }
    assert!(failed > 100 && done > 300, "{failed} failed, {done} done");
}

/// What a guest would have seen: data that it had flushed, well, is not there after a power cut.
#[test]
fn a_reopen_that_finds_out_that_data_is_lost_is_refused_and_one_that_knows_is_a_new_beginning() {
    let world = World::new(1);
    world
        .simulation
        .create_file(PATH, FileProperties::default(), BYTES);
    let node = format!("file,node-name=disk,filename={PATH}");
    world.add(&node).expect("nothing fails yet");
    let writer = RootSpec::writer("a guest").in_units_of(512);
    let writer = world.use_it("disk", writer).expect("nobody else does");
    world
        .write(writer, 0, &[1; 4096])
        .expect("nothing fails yet");
    world.simulation.set_faults(Faults {
        sync_error_permille: 1000,
        ..Faults::default()
    });
    let reopened = world.reopen(&format!("{node},cache.direct=on"));
    assert_eq!(reopened.expect_err("a flush fails").kind(), ErrorKind::Io);
    world.fail(0);
    let flush = || {
        world.run(move |control| async move {
            let root = control.root_here(writer).expect("it is there");
            root.flush().await
        })
    };
    assert_eq!(
        flush(),
        Err(IoError::FlushLost),
        "and nobody says it is well"
    );
    let reopened = world.reopen(&format!("{node},cache.direct=on"));
    reopened.expect("the operator has been told");
    assert_eq!(flush(), Ok(()));
}

fn modes(node: &str, random: &mut Random) -> String {
    let mut on_off = || if random.chance(500) { "on" } else { "off" };
    format!(
        "{node},cache.direct={},cache.no-flush={},auto-read-only={}",
        on_off(),
        on_off(),
        on_off()
    )
}

#[test]
fn a_copy_by_a_host_that_copies_in_pieces_is_whole_or_fails() {
    let (mut failed, mut done) = (0, 0);
    for seed in 0..100 {
        let world = World::new(seed);
        let mut random = world.simulation.random();
        for (name, path) in [("disk", PATH), ("other", "/simulated/other")] {
            let properties = FileProperties::default();
            world.simulation.create_file(path, properties, BYTES);
            world
                .add(&format!("file,node-name={name},filename={path}"))
                .expect("nothing fails yet");
        }
        let writer = || sharing(RootSpec::writer("a guest"));
        let from = world.use_it("disk", writer()).expect("nothing fails yet");
        let to = world.use_it("other", writer()).expect("nothing fails yet");
        let source: Vec<_> = (0..BYTES / 512)
            .flat_map(|sector| [sector as u8 ^ seed as u8; 512])
            .collect();
        world.write(from, 0, &source).expect("nothing fails yet");
        let mut model = vec![0; BYTES as usize];
        for turn in 0..10 {
            let bytes = random.between(1, BYTES / 512) * 512;
            let offset = random.between(0, (BYTES - bytes) / 512) * 512;
            let to_offset = random.between(0, (BYTES - bytes) / 512) * 512;
            world.fail(random.between(0, 50) as u32);
            let copied = world.run(move |control| async move {
                let (from, to) = (control.root_here(from), control.root_here(to));
                let (from, to) = (from.expect("it is there"), to.expect("it is there"));
                let from = from.enter(RequestKind::Read, offset, bytes).await;
                let to = to.enter(RequestKind::Write, to_offset, bytes).await;
                from.copy_range(offset, &to, to_offset, bytes, CopyFlags::empty())
                    .await
            });
            world.fail(0);
            let now = world.read(to, BYTES);
            let part = source[offset as usize..][..bytes as usize].iter();
            let into = to_offset as usize..(to_offset + bytes) as usize;
            match copied {
                Ok(()) => {
                    done += 1;
                    for (old, new) in model[into].iter_mut().zip(part) {
                        *old = *new;
                    }
                    assert!(now == model, "seed {seed}, turn {turn}");
                }
                Err(_) => {
                    failed += 1;
                    // A part may be there, and nothing else.
                    for ((old, new), is) in model[into.clone()].iter().zip(part).zip(&now[into]) {
                        assert!(is == old || is == new, "seed {seed}, turn {turn}");
                    }
                    model = now;
                }
            }
        }
    }
    assert!(failed > 20 && done > 200, "{failed} failed, {done} done");
}
