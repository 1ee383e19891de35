//! The simulation as the host that it claims to be.

use std::cell::Cell;
use std::future::Future;

use super::*;
use crate::engine::{
    Allocate, Engine, Errno, Event, FileType, HostCall, HostReply, Op, OpFuture, OpResult,
    OpenFile, OpenOptions, preempt,
};
use crate::io::buffer::Segments;

const LIMIT: Duration = Duration::from_secs(60);
const PATH: &str = "/images/disk";

/// A simulation with one worker and one file of `bytes` bytes.
fn machine(seed: u64, bytes: u64) -> (Simulation, Rc<Worker>) {
    let simulation = Simulation::new(seed);
    simulation.create_file(PATH, FileProperties::default(), bytes);
    let worker = simulation.worker();
    (simulation, worker)
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

fn call(simulation: &Simulation, worker: &Worker, call: HostCall) -> Result<HostReply, Errno> {
    run(simulation, worker, worker.engine().host(call))
}

fn open(simulation: &Simulation, worker: &Worker, direct: bool) -> Arc<OpenFile> {
    let options = OpenOptions {
        write: true,
        direct,
        create: false,
    };
    match call(simulation, worker, HostCall::Open(PATH.into(), options)).unwrap() {
        HostReply::File(file) => {
            worker.engine().attach(&file);
            file
        }
        reply => panic!("{reply:?}"),
    }
}

fn metadata(
    simulation: &Simulation,
    worker: &Worker,
    file: &Arc<OpenFile>,
) -> crate::engine::Metadata {
    match call(simulation, worker, HostCall::Metadata(Arc::clone(file))).unwrap() {
        HostReply::Metadata(metadata) => *metadata,
        reply => panic!("{reply:?}"),
    }
}

fn write_op(file: &OpenFile, offset: u64, bytes: usize, value: u8) -> Op {
    let segments = Segments::allocate(bytes, 4096);
    segments.fill(value);
    Op::Write {
        file: file.id(),
        offset,
        segments,
    }
}

fn read_op(file: &OpenFile, offset: u64, bytes: usize) -> Op {
    Op::Read {
        file: file.id(),
        offset,
        segments: Segments::allocate(bytes, 4096),
    }
}

fn start(worker: &Worker, op: Op) -> OpFuture {
    OpFuture::start(&**worker.engine(), op)
}

fn run_op(simulation: &Simulation, worker: &Worker, op: Op) -> (OpResult, Segments) {
    run(simulation, worker, start(worker, op))
}

fn sync(simulation: &Simulation, worker: &Worker, file: &OpenFile) -> OpResult {
    run_op(simulation, worker, Op::Sync { file: file.id() }).0
}

/// A few hundred operations of two workers on one file, everything that can go wrong going wrong.
fn mixed_run(seed: u64) -> u64 {
    let (simulation, worker) = machine(seed, 1 << 20);
    let other = simulation.worker();
    let file = open(&simulation, &worker, false);
    other.engine().attach(&file);
    simulation.set_faults(Faults {
        read_error_permille: 50,
        write_error_permille: 50,
        sync_error_permille: 50,
        short_permille: 100,
        ..Faults::default()
    });
    let mut random = simulation.random();
    let ended = Rc::new(Cell::new(0));
    for index in 0..200_u64 {
        let worker = if random.chance(500) { &worker } else { &other };
        let offset = random.below(1 << 20);
        let bytes = random.between(1, 20_000) as usize;
        let op = match random.below(10) {
            0 => Op::Sync { file: file.id() },
            1..5 => read_op(&file, offset, bytes),
            _ => write_op(&file, offset, bytes, index as u8),
        };
        let (engine, ended) = (Rc::clone(worker.engine()), Rc::clone(&ended));
        worker.context().spawn(async move {
            preempt(&*engine).await;
            let _ = OpFuture::start(&*engine, op).await;
            ended.set(ended.get() + 1);
        });
    }
    simulation.run_until(LIMIT, || ended.get() == 200).unwrap();
    simulation.hash()
}

#[test]
fn two_runs_of_one_seed_have_one_hash_and_two_seeds_have_two() {
    assert_eq!(mixed_run(1), mixed_run(1));
    assert_ne!(mixed_run(1), mixed_run(2));
}

#[test]
fn what_was_written_is_read_back_and_the_end_of_the_file_is_a_short_read() {
    let (simulation, worker) = machine(1, 0);
    let file = open(&simulation, &worker, false);
    let (result, _) = run_op(&simulation, &worker, write_op(&file, 100, 5000, 7));
    assert_eq!(result, Ok(5000));
    let (result, segments) = run_op(&simulation, &worker, read_op(&file, 0, 10_000));
    assert_eq!(result, Ok(5100));
    let bytes = segments.to_vec();
    assert!(bytes[..100].iter().all(|byte| *byte == 0));
    assert!(bytes[100..5100].iter().all(|byte| *byte == 7));
    let (result, _) = run_op(&simulation, &worker, read_op(&file, 5100, 512));
    assert_eq!(result, Ok(0));
    let metadata = metadata(&simulation, &worker, &file);
    assert_eq!((metadata.bytes, metadata.allocated_bytes), (5100, 8192));
}

#[test]
fn a_power_cut_keeps_what_was_synced_loses_some_of_the_rest_and_invents_nothing() {
    let (mut kept, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..60 {
        let (simulation, worker) = machine(seed, 65536);
        let file = open(&simulation, &worker, false);
        run_op(&simulation, &worker, write_op(&file, 0, 16384, 1))
            .0
            .unwrap();
        sync(&simulation, &worker, &file).unwrap();
        run_op(&simulation, &worker, write_op(&file, 4096, 8192, 2))
            .0
            .unwrap();
        simulation.power_cut();
        let bytes = simulation.contents(PATH).unwrap();
        assert!(bytes[..4096].iter().all(|byte| *byte == 1), "seed {seed}");
        assert!(
            bytes[12288..16384].iter().all(|byte| *byte == 1),
            "seed {seed}"
        );
        assert!(bytes[16384..].iter().all(|byte| *byte == 0), "seed {seed}");
        let new = bytes[4096..12288]
            .chunks(512)
            .filter(|sector| {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "seed {seed}");
                assert!([1, 2].contains(&sector[0]), "seed {seed}");
                sector[0] == 2
            })
            .count();
        match new {
            0 => lost += 1,
            16 => kept += 1,
            _ => torn += 1,
        }
    }
    assert!(kept > 5 && lost > 5 && torn > 5, "{kept} {lost} {torn}");
}

#[test]
fn what_a_power_cut_could_leave_has_what_was_synced_and_any_part_of_the_rest() {
    let (simulation, worker) = machine(1, 0);
    simulation.load_file(PATH, FileProperties::default(), &[1; 16384]);
    let file = open(&simulation, &worker, false);
    let write = write_op(&file, 4096, 4096, 2);
    run_op(&simulation, &worker, write).0.unwrap();
    let _landing = start(&worker, write_op(&file, 8192, 4096, 3));
    simulation.step();
    // In pieces, one after the other.
    let end = simulation
        .unsynced(PATH)
        .iter()
        .fold(4096, |end, (offset, bytes)| {
            assert_eq!(*offset, end);
            offset + bytes
        });
    assert_eq!(end, 8192);
    let (hash, mut random) = (simulation.hash(), Random::new(5));
    let (mut kept, mut landed, mut torn) = (0, 0, 0);
    for _ in 0..100 {
        let bytes = simulation.possible_contents(PATH, &mut random).unwrap();
        assert_eq!(bytes.len(), 16384);
        assert!(bytes[..4096].iter().all(|byte| *byte == 1));
        assert!(bytes[12288..].iter().all(|byte| *byte == 1));
        kept += usize::from(bytes[4096..8192] == [2; 4096]);
        landed += usize::from(bytes[8192..12288].contains(&3));
        let (first, last) = (bytes[4096], bytes[8191]);
        torn += usize::from(first != last);
    }
    assert!(kept > 3 && kept < 90, "{kept}");
    assert!(landed > 10 && landed < 90 && torn > 5, "{landed} {torn}");
    assert_eq!(simulation.hash(), hash);
    let now = simulation.contents(PATH).unwrap();
    assert_eq!(now[4096..8192], [2; 4096]);
}

#[test]
fn a_sync_does_not_wait_for_writes_that_have_not_completed() {
    let lost = (0..60)
        .filter(|seed| {
            let (simulation, worker) = machine(*seed, 65536);
            let file = open(&simulation, &worker, false);
            let write = start(&worker, write_op(&file, 0, 4096, 1));
            let (result, _) = run_op(&simulation, &worker, Op::Sync { file: file.id() });
            result.unwrap();
            drop(write);
            simulation.power_cut();
            simulation.contents(PATH).unwrap()[..4096] != [1; 4096]
        })
        .count();
    assert!(lost > 10, "{lost}");
}

#[test]
fn a_kill_keeps_completed_writes_and_lets_some_of_the_others_land_later() {
    let (mut landed, mut at_once) = (0, 0);
    for seed in 0..60 {
        let (simulation, worker) = machine(seed, 65536);
        let file = open(&simulation, &worker, false);
        run_op(&simulation, &worker, write_op(&file, 0, 8192, 1))
            .0
            .unwrap();
        drop(start(&worker, write_op(&file, 16384, 8192, 2)));
        simulation.step();
        simulation.kill();
        let before = simulation.contents(PATH).unwrap();
        assert_eq!(before[..8192], [1; 8192]);
        simulation
            .run_until(LIMIT, || simulation.in_flight() == 0)
            .unwrap();
        let after = simulation.contents(PATH).unwrap();
        assert_eq!(after[..8192], [1; 8192]);
        at_once += usize::from(before[16384..24576] == [2; 8192]);
        landed += usize::from(before != after);
    }
    assert!(landed > 20 && at_once < 20, "{landed} {at_once}");
}

#[test]
fn an_operation_that_the_host_has_not_got_dies_with_its_process() {
    let (simulation, worker) = machine(1, 65536);
    let file = open(&simulation, &worker, false);
    drop(start(&worker, write_op(&file, 0, 4096, 1)));
    simulation.kill();
    assert_eq!(simulation.in_flight(), 0);
    assert_eq!(simulation.contents(PATH).unwrap()[..4096], [0; 4096]);
}

#[test]
fn a_killed_process_holds_its_locks_until_its_last_operation_has_landed() {
    let (simulation, worker) = machine(5, 1 << 20);
    simulation.set_faults(Faults {
        latency_us: (100_000, 200_000),
        ..Faults::default()
    });
    let file = open(&simulation, &worker, false);
    call(
        &simulation,
        &worker,
        HostCall::LockShared(Arc::clone(&file), 101),
    )
    .unwrap();
    let write = start(&worker, write_op(&file, 0, 65536, 1));
    simulation.step();
    assert_eq!(simulation.in_flight(), 1);
    simulation.kill();
    drop((write, file, worker));

    simulation.set_faults(Faults {
        latency_us: (1, 2),
        slow_permille: 0,
        ..Faults::default()
    });
    let worker = simulation.worker();
    let file = open(&simulation, &worker, false);
    let test = || {
        call(
            &simulation,
            &worker,
            HostCall::TestLock(Arc::clone(&file), 101),
        )
    };
    assert_eq!(test().unwrap_err(), Errno::AGAIN);
    simulation
        .run_until(LIMIT, || simulation.in_flight() == 0)
        .unwrap();
    assert!(test().is_ok());
}

#[test]
fn a_lock_is_seen_by_others_only_and_ends_with_its_description() {
    let (simulation, worker) = machine(1, 0);
    let (one, two) = (
        open(&simulation, &worker, false),
        open(&simulation, &worker, false),
    );
    let test = |file: &Arc<OpenFile>| {
        call(
            &simulation,
            &worker,
            HostCall::TestLock(Arc::clone(file), 100),
        )
    };
    call(
        &simulation,
        &worker,
        HostCall::LockShared(Arc::clone(&one), 100),
    )
    .unwrap();
    assert!(test(&one).is_ok());
    assert_eq!(test(&two).unwrap_err(), Errno::AGAIN);
    worker.engine().detach(one.id());
    drop(one);
    assert!(test(&two).is_ok());
}

#[test]
fn an_exclusive_lock_keeps_everybody_else_out_and_waits_for_nobody() {
    let (simulation, worker) = machine(1, 0);
    let (one, two) = (
        open(&simulation, &worker, false),
        open(&simulation, &worker, false),
    );
    let exclusive = |file: &Arc<OpenFile>| HostCall::LockExclusive(Arc::clone(file), 100);
    let shared = |file: &Arc<OpenFile>| HostCall::LockShared(Arc::clone(file), 100);
    let take = |lock| call(&simulation, &worker, lock).map(|_| ());
    assert_eq!(take(shared(&one)), Ok(()));
    assert_eq!(take(exclusive(&two)), Err(Errno::AGAIN));
    assert_eq!(take(exclusive(&one)), Ok(()), "a lock of our own is raised");
    assert_eq!(take(shared(&two)), Err(Errno::AGAIN));
    assert_eq!(take(HostCall::Unlock(Arc::clone(&one), 100)), Ok(()));
    assert_eq!(take(exclusive(&two)), Ok(()));
}

#[test]
fn a_renamed_file_has_its_new_name_at_once_and_after_a_power_cut_once_the_directory_was_synced() {
    let (mut old, mut new) = (0, 0);
    for seed in 0..40 {
        let (simulation, worker) = machine(seed, 1000);
        let other = "/images/other";
        simulation.create_file(other, FileProperties::default(), 2000);
        let rename = || HostCall::Rename(other.into(), PATH.into());
        call(&simulation, &worker, rename()).unwrap();
        let missing = call(&simulation, &worker, rename()).unwrap_err();
        assert_eq!(missing, Errno::NOENT);
        assert_eq!(simulation.contents(PATH).unwrap().len(), 2000);
        assert!(simulation.contents(other).is_none());
        let synced = seed % 2 == 0;
        if synced {
            let sync = HostCall::SyncDirectory("/images".into());
            call(&simulation, &worker, sync).unwrap();
        }
        simulation.power_cut();
        match simulation.contents(PATH).unwrap().len() {
            2000 => new += usize::from(!synced),
            1000 if !synced => old += 1,
            bytes => panic!("seed {seed}: {bytes} bytes"),
        }
    }
    assert!(old > 2 && new > 2, "{old} {new}");
}

#[test]
fn a_killed_process_keeps_its_locks_until_its_last_call_has_landed() {
    let mut landed_late = 0;
    for seed in 0..40 {
        let (simulation, worker) = machine(seed, 0);
        let file = open(&simulation, &worker, false);
        let lock = |file: &Arc<OpenFile>| HostCall::LockExclusive(Arc::clone(file), 100);
        call(&simulation, &worker, lock(&file)).unwrap();
        simulation.create_file("/images/other", FileProperties::default(), 0);
        let rename = HostCall::Rename("/images/other".into(), "/images/renamed".into());
        drop(worker.engine().host(rename));
        simulation.kill();
        let under_way = simulation.in_flight() > 0;
        drop((file, worker));

        let worker = simulation.worker();
        let again = open(&simulation, &worker, false);
        let taken = call(&simulation, &worker, lock(&again)).is_ok();
        let under_way = under_way && simulation.in_flight() > 0;
        assert!(!(taken && under_way), "seed {seed}");
        landed_late += usize::from(!taken);
        simulation
            .run_until(LIMIT, || simulation.in_flight() == 0)
            .unwrap();
        call(&simulation, &worker, lock(&again)).unwrap();
    }
    assert!(landed_late > 2, "{landed_late}");
}

#[test]
fn a_failed_sync_is_reported_once_to_each_description_and_what_it_covered_may_be_lost() {
    let mut lost = 0;
    for seed in 0..40 {
        let (simulation, worker) = machine(seed, 65536);
        let one = open(&simulation, &worker, false);
        let two = open(&simulation, &worker, false);
        run_op(&simulation, &worker, write_op(&one, 0, 4096, 1))
            .0
            .unwrap();
        simulation.set_faults(Faults {
            sync_error_permille: 1000,
            ..Faults::default()
        });
        assert_eq!(sync(&simulation, &worker, &one), Err(Errno::IO));
        simulation.set_faults(Faults::default());
        assert_eq!(sync(&simulation, &worker, &one), Ok(0));
        assert_eq!(sync(&simulation, &worker, &two), Err(Errno::IO));
        assert_eq!(sync(&simulation, &worker, &two), Ok(0));
        assert_eq!(simulation.contents(PATH).unwrap()[..4096], [1; 4096]);
        simulation.power_cut();
        lost += usize::from(simulation.contents(PATH).unwrap()[..4096] != [1; 4096]);
    }
    assert!(lost > 10, "{lost}");
}

#[test]
fn faults_happen_as_often_as_they_are_asked_for() {
    let (simulation, worker) = machine(9, 1 << 20);
    let file = open(&simulation, &worker, false);
    simulation.set_faults(Faults {
        read_error_permille: 100,
        write_error_permille: 100,
        short_permille: 200,
        interrupted_permille: 50,
        again_permille: 50,
        ..Faults::default()
    });
    let mut counts = BTreeMap::<&str, u32>::new();
    for index in 0..2000 {
        let op = if index % 2 == 0 {
            read_op(&file, 0, 4096)
        } else {
            write_op(&file, 0, 4096, 1)
        };
        let seen = match run_op(&simulation, &worker, op).0 {
            Ok(4096) => "whole",
            Ok(_) => "short",
            Err(Errno::IO) => "failed",
            Err(Errno::INTR) => "interrupted",
            Err(Errno::AGAIN) => "again",
            Err(error) => panic!("{error}"),
        };
        *counts.entry(seen).or_default() += 1;
    }
    assert!((120..260).contains(&counts["failed"]), "{counts:?}");
    assert!((250..420).contains(&counts["short"]), "{counts:?}");
    assert!((60..140).contains(&counts["interrupted"]), "{counts:?}");
    assert!((60..140).contains(&counts["again"]), "{counts:?}");
}

#[test]
fn a_read_may_see_half_of_a_write() {
    let torn = (0..200)
        .filter(|seed| {
            let (simulation, worker) = machine(*seed, 65536);
            let file = open(&simulation, &worker, false);
            drop(start(&worker, write_op(&file, 0, 65536, 1)));
            let (result, segments) = run_op(&simulation, &worker, read_op(&file, 0, 65536));
            assert_eq!(result, Ok(65536));
            let bytes = segments.to_vec();
            bytes.contains(&0) && bytes.contains(&1)
        })
        .count();
    assert!(torn > 10, "{torn}");
}

#[test]
fn a_full_disk_takes_what_fits_and_then_nothing_until_a_hole_is_punched() {
    let (simulation, worker) = machine(1, 1 << 20);
    simulation.set_capacity(Some(10 * 4096 + 100));
    let file = open(&simulation, &worker, false);
    let write = |offset, bytes| run_op(&simulation, &worker, write_op(&file, offset, bytes, 1)).0;
    assert_eq!(write(0, 8 * 4096), Ok(8 * 4096));
    assert_eq!(write(10 * 4096 + 7, 4 * 4096), Ok(2 * 4096 - 7));
    assert_eq!(write(20 * 4096, 4096), Err(Errno::NOSPC));
    assert_eq!(write(0, 4096), Ok(4096), "space of its own is no new space");
    let punch = Op::Allocate {
        file: file.id(),
        offset: 0,
        bytes: 4096,
        mode: Allocate::PunchHole,
    };
    assert_eq!(run_op(&simulation, &worker, punch).0, Ok(0));
    assert_eq!(write(20 * 4096, 4096), Ok(4096));
    let metadata = metadata(&simulation, &worker, &file);
    assert_eq!(metadata.allocated_bytes, 10 * 4096);
}

#[test]
fn direct_io_that_is_not_aligned_is_refused() {
    let (simulation, worker) = machine(1, 65536);
    let file = open(&simulation, &worker, true);
    let metadata = metadata(&simulation, &worker, &file);
    assert_eq!(metadata.direct_alignment, 512);
    let read = |offset, segments| {
        let op = Op::Read {
            file: file.id(),
            offset,
            segments,
        };
        run_op(&simulation, &worker, op).0
    };
    let memory = Segments::allocate(8192, 4096);
    assert_eq!(read(512, memory.slice(0, 1024)), Ok(1024));
    assert_eq!(read(100, memory.slice(0, 1024)), Err(Errno::INVAL));
    assert_eq!(read(512, memory.slice(0, 1000)), Err(Errno::INVAL));
    assert_eq!(read(512, memory.slice(8, 1024)), Err(Errno::INVAL));
}

#[test]
fn a_device_keeps_its_length_and_a_discard_leaves_old_bytes_or_zeroes() {
    let simulation = Simulation::new(4);
    let properties = FileProperties {
        file_type: FileType::BlockDevice,
        direct_alignment: 4096,
        ..FileProperties::default()
    };
    simulation.create_file(PATH, properties, 1 << 20);
    let worker = simulation.worker();
    let file = open(&simulation, &worker, false);
    let write = |offset, bytes| run_op(&simulation, &worker, write_op(&file, offset, bytes, 1)).0;
    assert_eq!(write((1 << 20) - 4096, 8192), Ok(4096));
    assert_eq!(write(1 << 20, 4096), Err(Errno::NOSPC));
    assert_eq!(write(0, 1 << 19), Ok(1 << 19));
    let refused = call(
        &simulation,
        &worker,
        HostCall::Truncate(Arc::clone(&file), 0),
    );
    assert_eq!(refused.unwrap_err(), Errno::INVAL);
    let discard = HostCall::DeviceDiscard(Arc::clone(&file), 0, 1 << 19);
    call(&simulation, &worker, discard).unwrap();
    let bytes = simulation.contents(PATH).unwrap();
    assert_eq!(bytes.len(), 1 << 20);
    let discarded = &bytes[..1 << 19];
    assert!(discarded.contains(&0) && discarded.contains(&1));
}

#[test]
fn a_new_file_survives_a_power_cut_once_its_directory_was_synced() {
    let mut lost = 0;
    for seed in 0..40 {
        let (simulation, worker) = machine(seed, 0);
        for name in ["synced", "not"] {
            let options = OpenOptions {
                create: true,
                ..OpenOptions::default()
            };
            let create = HostCall::Open(format!("/images/{name}").into(), options);
            call(&simulation, &worker, create).unwrap();
            if name == "synced" {
                let sync = HostCall::SyncDirectory("/images".into());
                call(&simulation, &worker, sync).unwrap();
            }
        }
        simulation.power_cut();
        assert!(simulation.contents("/images/synced").is_some());
        lost += usize::from(simulation.contents("/images/not").is_none());
    }
    assert!((5..35).contains(&lost), "{lost}");
}

#[test]
fn a_run_in_which_nothing_can_happen_any_more_says_who_waits() {
    let (simulation, worker) = machine(0x2a, 0);
    let stuck = simulation
        .run(&worker, LIMIT, std::future::pending::<()>())
        .unwrap_err();
    let report = stuck.to_string();
    assert!(report.contains("seed 0x2a is stuck"), "{report}");
    assert!(report.contains("actor 0: 1 tasks"), "{report}");
    assert!(report.contains("engine 0: asleep"), "{report}");
}

/// Sleeps for a second at a time, and notes when it ran.
struct Sleepy {
    engine: Rc<SimEngine>,
    turns: Rc<RefCell<Vec<(Duration, usize)>>>,
}

impl Turn for Sleepy {
    fn turn(&mut self) -> bool {
        let mut events = Vec::new();
        self.engine.poll(&mut events);
        let ready = events
            .iter()
            .filter(|event| matches!(event, Event::Ready(_)));
        let turn = (self.engine.now(), ready.count());
        self.turns.borrow_mut().push(turn);
        self.engine.sleeper().falling_asleep();
        self.engine.wait(&mut events, Some(Duration::from_secs(1)));
        false
    }

    fn pending(&self) -> String {
        "sleepy".into()
    }
}

#[test]
fn a_sleeping_worker_runs_at_its_timer_when_it_is_woken_and_when_it_is_kicked() {
    let simulation = Simulation::new(1);
    let engine = simulation.engine();
    let turns = Rc::<RefCell<Vec<_>>>::default();
    let sleepy = Sleepy {
        engine: Rc::clone(&engine),
        turns: Rc::clone(&turns),
    };
    simulation.add(Some(Rc::clone(&engine)), Box::new(sleepy));
    let run_turn = || {
        let before = turns.borrow().len();
        simulation
            .run_until(LIMIT, || turns.borrow().len() > before)
            .unwrap();
        let turns = turns.borrow();
        let slept = before
            .checked_sub(1)
            .map(|last| turns[before].0 - turns[last].0);
        (slept.unwrap_or_default(), turns[before].1)
    };
    let second = Duration::from_secs(1);
    run_turn();
    for _ in 0..2 {
        let (slept, ready) = run_turn();
        assert!(
            slept >= second && slept < second + second / 100,
            "{slept:?}"
        );
        assert_eq!(ready, 0);
    }

    engine.sleeper().notify();
    let (slept, _) = run_turn();
    assert!(slept < second / 100, "{slept:?}");

    let kick = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let kick = Arc::new(kick);
    engine.watch(Arc::clone(&kick));
    simulation.kick(&kick);
    let (slept, ready) = run_turn();
    assert!(slept < second / 100, "{slept:?}");
    assert_eq!(ready, 1);
}

#[test]
fn at_a_preemption_point_others_run_first_as_often_as_was_asked() {
    let first = |permille| {
        let (simulation, worker) = machine(3, 0);
        simulation.set_faults(Faults {
            preempt_permille: permille,
            ..Faults::default()
        });
        let order = Rc::<RefCell<Vec<u32>>>::default();
        for index in 0..2 {
            let (engine, order) = (Rc::clone(worker.engine()), Rc::clone(&order));
            worker.context().spawn(async move {
                for _ in 0..3 {
                    preempt(&*engine).await;
                    order.borrow_mut().push(index);
                }
            });
        }
        simulation
            .run_until(LIMIT, || order.borrow().len() == 6)
            .unwrap();
        order.take()
    };
    assert_eq!(first(0), [0, 0, 0, 1, 1, 1]);
    assert_eq!(first(1000), [0, 1, 0, 1, 0, 1]);
}

#[test]
fn offloaded_work_is_done_in_place_after_a_while_and_not_by_a_process_that_was_killed() {
    let (simulation, worker) = machine(5, 0);
    let began = simulation.now();
    let context = Rc::clone(worker.context());
    let sum = run(&simulation, &worker, async move {
        let works = (0..20_u64).map(|number| context.offload(move || number * number));
        let works: Vec<_> = works.collect();
        let mut sum = 0;
        for work in works {
            sum += work.await;
        }
        sum
    });
    assert_eq!(sum, 2470);
    assert!(simulation.now() > began);

    let done = Arc::new(AtomicBool::new(false));
    let (context, seen) = (Rc::clone(worker.context()), Arc::clone(&done));
    drop(context.offload(move || seen.store(true, std::sync::atomic::Ordering::Relaxed)));
    simulation.kill();
    while simulation.step() {}
    assert!(!done.load(std::sync::atomic::Ordering::Relaxed));
    assert_eq!(Arc::strong_count(&done), 1);
}

#[test]
fn shared_memory_survives_a_kill_and_no_power_cut() {
    use std::sync::atomic::Ordering;

    const SEGMENT: &str = "/run/disk";
    let open_segment = |bytes| HostCall::OpenSegment {
        path: SEGMENT.into(),
        bytes,
    };
    let (simulation, worker) = machine(6, 0);
    let open = |worker: &Worker| match call(&simulation, worker, open_segment(4096)) {
        Ok(HostReply::Segment { segment, existed }) => (segment, existed),
        other => panic!("{other:?}"),
    };
    let (segment, existed) = open(&worker);
    assert_eq!((segment.words().len(), existed), (512, false));
    segment.words()[511].store(7, Ordering::Relaxed);
    let refused = call(&simulation, &worker, open_segment(8192));
    assert_eq!(refused.unwrap_err(), Segment::OTHER_LENGTH);

    simulation.kill();
    let worker = simulation.worker();
    let (segment, existed) = open(&worker);
    assert!(existed);
    assert_eq!(segment.words()[511].load(Ordering::Relaxed), 7);
    assert!(simulation.segment(SEGMENT).is_some());

    simulation.power_cut();
    assert!(simulation.segment(SEGMENT).is_none());
    let worker = simulation.worker();
    let (segment, existed) = open(&worker);
    assert!(!existed);
    assert_eq!(segment.words()[511].load(Ordering::Relaxed), 0);
    call(&simulation, &worker, HostCall::Remove(SEGMENT.into())).unwrap();
    assert!(simulation.segment(SEGMENT).is_none());
}
