//! Power that goes while an image is made or repaired, on simulated hosts.

use std::cell::Cell;
use std::fs;
use std::time::Duration;

use blockcore::driver::Fix;
use blockcore::driver::WriteFlags;
use blockcore::engine::sim::{FileProperties, Simulation, Worker};
use blockcore::io::RequestKind;
use blockcore::io::buffer::Segments;
use formats::qcow2::check::check;
use formats::qcow2::create;

use super::check::{REPAIRED, exit, ours_as_qemu, theirs};
use super::corpus::KINDS;
use super::*;

const LIMIT: Duration = Duration::from_secs(3600);
const PATH: &str = "/simulated/disk";

/// Runs `work` until the power goes after `time`, or to its end; says how long it took if it came there.
fn until_cut<W>(world: &Simulation, worker: &Worker, work: W, time: Duration) -> Option<Duration>
where
    W: Future<Output = ()> + 'static,
{
    let done = Rc::new(Cell::new(false));
    let ended = Rc::clone(&done);
    worker.context().spawn(async move {
        work.await;
        ended.set(true);
    });
    let begin = world.now();
    let outcome = world.run_until(time, || done.get());
    let took = world.now() - begin;
    world.power_cut();
    outcome.is_ok().then_some(took)
}

/// Makes an image in a simulation whose power goes after `time`; what is on the disk then.
fn make_until(seed: u64, options: &str, time: Duration) -> (Option<Vec<u8>>, Option<Duration>) {
    let world = Simulation::new(seed);
    let worker = world.worker();
    let context = Rc::clone(worker.context());
    let options = Options::parse(&format!("file.filename={PATH},{options}"), None);
    let options = options.expect("options");
    let work = async move {
        let made = create::create(context, options).await;
        made.expect("nothing fails");
    };
    let took = until_cut(&world, &worker, work, time);
    (world.contents(PATH), took)
}

#[test]
fn power_that_goes_while_an_image_is_made_leaves_none_or_a_whole_one() {
    let place = Place::new();
    let (mut none, mut whole) = (0, 0);
    for seed in 0..120 {
        let options = match seed % 3 {
            0 => "size=1M,backing-file=base,backing-fmt=raw",
            1 => "size=1M,preallocation=metadata,cluster-size=512",
            _ => "size=300M,cluster-size=4k",
        };
        place.sparse("base", MIB);
        let (_, took) = make_until(seed, options, LIMIT);
        let took = took.expect("there was time");
        // Late, too: an hour's end is what comes last.
        let mut random = harness::random::Random::new(seed);
        let part = random.below(1200) as u32;
        let (disk, _) = make_until(seed, options, took * part / 1000);
        let Some(disk) = disk.filter(|disk| disk.starts_with(b"QFI\xfb")) else {
            none += 1;
            continue;
        };
        whole += 1;
        fs::write(place.join("disk"), disk).expect("there is room");
        let (code, report) = theirs(&place, "disk", Fix::None);
        assert_eq!(code, 0, "seed {seed}: {report:?}");
        let info = json(&place, "info", "disk");
        let backing = info.get("backing-filename").and_then(Value::as_str);
        assert_eq!(backing.is_some(), seed % 3 == 0, "seed {seed}: {info}");
    }
    assert!(none > 20 && whole > 10, "{none}, {whole}");
}

/// Repairs an image in a simulation whose power goes after `time`; what is on the disk then.
fn repair_until(seed: u64, image: &[u8], time: Duration) -> (Vec<u8>, Option<Duration>) {
    let world = Simulation::new(seed);
    let length = image.len() as u64;
    world.create_file(PATH, FileProperties::default(), length);
    let worker = world.worker();
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(worker.context()));
    let data = Segments::allocate(image.len(), 4096);
    data.copy_from(image);
    let inner = control.clone();
    let root = world.run(&worker, LIMIT, async move {
        let options = format!("driver=file,node-name=file,filename={PATH}");
        let options = Options::parse(&options, None).expect("options");
        inner.add(options).await.expect("it is there");
        let spec = RootSpec {
            needs: Permissions::all(),
            ..RootSpec::writer("a test")
        };
        let id = inner.add_root("file", spec).await.expect("nobody else");
        let root = inner.root_here(id).expect("it was just made");
        let written = root.write(0, data, WriteFlags::empty()).await;
        written.expect("nothing fails");
        root.flush().await.expect("nothing fails");
        root
    });
    let root = root.expect("it ends");
    let work = async move {
        let request = root.enter(RequestKind::Other, 0, 0).await;
        let report = check(request.io(), Fix::All, &mut |_| ()).await;
        report.expect("it can be repaired");
    };
    let took = until_cut(&world, &worker, work, time);
    (world.contents(PATH).expect("it is there"), took)
}

#[test]
fn power_that_goes_during_a_repair_leaves_an_image_that_can_be_repaired() {
    let place = Place::new();
    let mut unfinished = 0;
    for kind in KINDS.iter().filter(|kind| REPAIRED.contains(&kind.name)) {
        let base = kind.base.make(&place);
        let image = kind.bytes(&base);
        let (whole, took) = repair_until(0, &image, LIMIT);
        let took = took.expect("there was time");
        fs::write(place.join("whole"), whole).expect("there is room");
        // What it says is fixed is durable.
        assert_eq!(
            exit(&ours_as_qemu(&place, "whole", Fix::None)),
            0,
            "{}",
            kind.name
        );
        for seed in 0..8 {
            let (part, end) = repair_until(seed, &image, took * (seed as u32 + 1) / 8);
            unfinished += u32::from(end.is_none());
            fs::write(place.join("part"), part).expect("there is room");
            let again = ours_as_qemu(&place, "part", Fix::All);
            assert_eq!(exit(&again), 0, "{}, seed {seed}: {again:?}", kind.name);
            let args = [
                "compare", "-q", "-f", "qcow2", "-F", "qcow2", "part", "whole",
            ];
            let output = qemu_img(&place, &args);
            assert!(
                output.status.success(),
                "{}, seed {seed}: {output:?}",
                kind.name
            );
        }
    }
    assert!(unfinished > 20, "{unfinished}");
}
