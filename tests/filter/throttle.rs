//! Throttle nodes through a whole graph, on the simulated clock.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use blockcore::ErrorKind;
use blockcore::drain::Scope;
use blockcore::driver::{Mapping, WriteFlags};
use blockcore::io::Root;
use blockcore::io::buffer::Segments;
use blockcore::throttle::{Limits, Rate};

use crate::setup::{LIMIT, Machine, seeds};

const SECOND: Duration = Duration::from_secs(1);

/// When requests ended, of which node, and how long each took.
type Ended = Rc<RefCell<Vec<(Duration, usize, Duration)>>>;

fn iops(per_second: u64) -> Limits {
    Limits {
        iops_total: Rate::per_second(per_second),
        ..Limits::default()
    }
}

/// Nodes `t0` and `t1` over disks that take no time, both of group `slow`.
fn machine(seed: u64, limits: Limits) -> (Machine, [Rc<Root>; 2]) {
    let machine = Machine::new(seed);
    machine.control.add_throttle_group("slow", limits).unwrap();
    let roots = [0, 1].map(|i| {
        machine.add(&format!(
            "driver=throttle,node-name=t{i},throttle-group=slow,file.driver=null-co,discard=unmap"
        ));
        machine.root(&format!("t{i}"))
    });
    (machine, roots)
}

/// Keeps `depth` requests of 4 KiB under way at a node until `end`, every third of them a read.
fn load(machine: &Machine, root: &Rc<Root>, node: usize, depth: u64, end: Duration) -> Ended {
    let ended = Ended::default();
    for task in 0..depth {
        let (root, ended) = (Rc::clone(root), Rc::clone(&ended));
        machine.worker.context().spawn(async move {
            let engine = Rc::clone(root.context());
            let memory = Segments::allocate(4096, 4096);
            for turn in task.. {
                let begun = engine.engine().now();
                if begun >= end {
                    return;
                }
                let offset = turn % 100 * 4096;
                let result = match turn % 3 {
                    0 => root.read(offset, memory.clone()).await,
                    _ => {
                        root.write(offset, memory.clone(), WriteFlags::empty())
                            .await
                    }
                };
                result.unwrap();
                let now = engine.engine().now();
                ended.borrow_mut().push((now, node, now - begun));
            }
        });
    }
    ended
}

fn until(machine: &Machine, end: Duration) {
    let simulation = &machine.simulation;
    let time_is_over = || simulation.now() >= end;
    simulation.run_until(LIMIT, time_is_over).unwrap();
}

fn between(ended: &Ended, from: Duration, to: Duration) -> u64 {
    let ended = ended.borrow();
    let inside = ended.iter().filter(|(at, ..)| *at >= from && *at < to);
    inside.count() as u64
}

fn assert_near(count: u64, expected: u64, percent: u64, what: &str) {
    assert!(
        count.abs_diff(expected) * 100 <= expected * percent,
        "{what}: {count} instead of {expected}"
    );
}

#[test]
fn two_nodes_share_the_rate_of_their_group_in_turn_and_nobody_waits_longer_than_it_explains() {
    for seed in seeds(3) {
        let (machine, roots) = machine(seed, iops(1000));
        let begin = machine.simulation.now();
        // One asks far more often than the other.
        let ends = begin + 6 * SECOND;
        let loads = [
            load(&machine, &roots[0], 0, 40, ends),
            load(&machine, &roots[1], 1, 8, ends),
        ];
        until(&machine, ends);
        for second in 1..6 {
            let (from, to) = (begin + second * SECOND, begin + (second + 1) * SECOND);
            let counts = [0, 1].map(|i: usize| between(&loads[i], from, to));
            assert_near(
                counts[0] + counts[1],
                1000,
                2,
                &format!("seed {seed}, second {second}"),
            );
            assert_near(counts[1], 500, 5, &format!("seed {seed}, the modest one"));
        }
        // Nodes take turns, and so do reads and writes: the 40th in a queue waits for 160 turns.
        for (load, depth) in loads.iter().zip([40, 8]) {
            let longest = load.borrow().iter().map(|(_, _, time)| *time).max();
            let explained = Duration::from_millis(4 * depth + 10);
            assert!(
                longest.unwrap() <= explained,
                "seed {seed}: {longest:?} at {depth}"
            );
        }
    }
}

#[test]
fn new_limits_and_another_group_hold_from_the_moment_they_are_set() {
    for seed in seeds(3) {
        let (machine, roots) = machine(seed, iops(100));
        machine
            .control
            .add_throttle_group("fast", iops(2000))
            .unwrap();
        let begin = machine.simulation.now();
        let ended = load(&machine, &roots[0], 0, 8, begin + 20 * SECOND);
        let count = |name: &str, expected: u64| {
            let from = machine.simulation.now() + SECOND / 2;
            until(&machine, from + 2 * SECOND);
            let counted = between(&ended, from, from + 2 * SECOND);
            assert_near(counted, expected, 2, &format!("seed {seed}, {name}"));
        };
        count("as it was", 200);
        machine
            .control
            .set_throttle_limits("slow", iops(500))
            .unwrap();
        assert_eq!(machine.control.throttle_limits("slow").unwrap(), iops(500));
        count("changed", 1000);
        let options = "node-name=t0,throttle-group=fast";
        machine.reopen(options).unwrap();
        count("in the other group", 4000);
        let refused = machine.reopen("node-name=t0,throttle-group=nowhere");
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::NotFound);
        count("after a refusal", 4000);
    }
}

#[test]
fn a_drained_section_does_not_wait_for_the_rate_and_is_paid_for_afterwards() {
    for seed in seeds(5) {
        let (machine, roots) = machine(seed, iops(10));
        let begin = machine.simulation.now();
        let ended = load(&machine, &roots[0], 0, 30, begin + SECOND / 2);
        until(&machine, begin + SECOND / 2);
        let waited = 30 + between(&ended, begin, begin + SECOND / 2);
        let control = machine.control.clone();
        let before = machine.simulation.now();
        let drained = machine.run(async move { control.drain(Scope::All).await });
        let took = machine.simulation.now() - before;
        assert!(took < SECOND / 20, "seed {seed}: {took:?}");
        assert_eq!(ended.borrow().len() as u64, waited);
        drop(drained);
        // Thirty requests at ten a second.
        machine.write(&roots[1], 0, &[1; 512]).unwrap();
        let paid = machine.simulation.now() - before;
        assert!(paid > 2 * SECOND, "seed {seed}: {paid:?}");
    }
}

#[test]
fn whatever_changes_data_counts_as_a_write_and_a_flush_counts_as_nothing() {
    let limits = Limits {
        iops_write: Rate::per_second(10),
        ..Limits::default()
    };
    let (machine, [root, _]) = machine(1, limits);
    let time = |action: &dyn Fn()| {
        let before = machine.simulation.now();
        (0..20).for_each(|_| action());
        machine.simulation.now() - before
    };
    // The bucket is full from here on.
    time(&|| machine.write(&root, 0, &[1; 512]).unwrap());
    let slow = 2 * SECOND - SECOND / 10..2 * SECOND + SECOND / 10;
    let written = time(&|| machine.write(&root, 0, &[1; 512]).unwrap());
    let zeroed = time(&|| machine.zero(&root, 0, 512).unwrap());
    let discarded = time(&|| machine.discard(&root, 0, 512).unwrap());
    for took in [written, zeroed, discarded] {
        assert!(slow.contains(&took), "{took:?}");
    }
    let read = time(&|| drop(machine.read(&root, 0, 512).unwrap()));
    let flushed = time(&|| machine.flush(&root).unwrap());
    assert!(read + flushed < SECOND / 10, "{read:?} {flushed:?}");
}

/// What an operator would have seen: a disk with a throttle node and no limits, slower than without.
#[test]
fn while_nothing_is_limited_requests_pass_without_a_task() {
    let (machine, _) = machine(1, Limits::default());
    let map = || {
        let node = |graph: &blockcore::graph::Graph| {
            let io = graph.node("t0").unwrap().io();
            io.map(true, 4096, 512)
        };
        machine.control.read(node)
    };
    let passes = Mapping::Child {
        index: 0,
        offset: 4096,
    };
    assert_eq!(map(), passes);
    for (limits, expected) in [(iops(10), Mapping::Ask), (Limits::default(), passes)] {
        let set = machine.control.set_throttle_limits("slow", limits);
        set.unwrap();
        assert_eq!(map(), expected);
    }
}

#[test]
fn a_group_in_use_stays_and_names_its_user() {
    let (machine, [root, other]) = machine(1, iops(10));
    let refused = machine.control.remove_throttle_group("slow").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains("'t0'"), "{refused}");
    for (root, node) in [(root, "t0"), (other, "t1")] {
        machine.remove_root(root);
        machine.remove(node).unwrap();
    }
    machine.control.remove_throttle_group("slow").unwrap();
    let gone =
        machine.try_add("driver=throttle,node-name=t,throttle-group=slow,file.driver=null-co");
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
}
