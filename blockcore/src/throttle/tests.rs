//! The rate as it is seen on the simulated clock, whoever runs when.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{Either, select};

use super::bucket::Buckets;
use super::*;
use crate::ErrorKind;
use crate::engine::sim::{Random, Simulation, Worker};
use crate::engine::{EngineChoice, make};
use crate::io::IoContext;

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(4000);

/// What the simulated host may add to a wait by running somebody else.
const JITTER: Duration = Duration::from_millis(6);

/// A request that was admitted.
#[derive(Clone, Copy, Debug)]
struct Admitted {
    at: Duration,
    waited: Duration,
    who: usize,
    bytes: u64,
}

/// Workers, and what was admitted on any of them.
struct Machine {
    seed: u64,
    /// When it was made, on the engines' clock. Tests count from then.
    origin: Duration,
    simulation: Simulation,
    workers: Vec<Rc<Worker>>,
    admitted: Rc<RefCell<Vec<Admitted>>>,
    random: Random,
}

impl Machine {
    fn new(seed: u64, workers: usize) -> Self {
        let simulation = Simulation::new(seed);
        let workers = (0..workers).map(|_| simulation.worker()).collect();
        Self {
            seed,
            random: simulation.random(),
            origin: simulation.now(),
            simulation,
            workers,
            admitted: Rc::default(),
        }
    }

    fn now(&self) -> Duration {
        self.simulation.now() - self.origin
    }

    /// The engines' time.
    fn clock(&self) -> Duration {
        self.simulation.now()
    }

    /// Starts `depth` tasks, each on one of the workers, that send one request after the other until
    /// `end`; `bytes` are the least and the most that one has.
    fn load(
        &mut self,
        member: &Arc<Member>,
        (who, direction): (usize, Direction),
        depth: usize,
        bytes: (u64, u64),
        end: Duration,
    ) {
        for _ in 0..depth {
            let worker = &self.workers[self.random.below(self.workers.len() as u64) as usize];
            let context = Rc::clone(worker.context());
            let (member, admitted) = (Arc::clone(member), Rc::clone(&self.admitted));
            let mut random = self.random.fork();
            let origin = self.origin;
            worker.context().spawn(async move {
                loop {
                    let start = context.engine().now() - origin;
                    let bytes = random.between(bytes.0, bytes.1);
                    member.admit(&context, direction, bytes).await;
                    let at = context.engine().now() - origin;
                    let waited = at - start;
                    admitted.borrow_mut().push(Admitted {
                        at,
                        waited,
                        who,
                        bytes,
                    });
                    // As long as the disk takes.
                    let disk = Duration::from_micros(random.below(200));
                    context.delay(disk).await;
                    if at >= end {
                        return;
                    }
                }
            });
        }
    }

    /// Sends `count` requests of 4096 bytes at once.
    fn batch(&mut self, member: &Arc<Member>, who: usize, count: usize) {
        let (load, bytes) = ((who, Direction::Write), (4096, 4096));
        self.load(member, load, count, bytes, Duration::ZERO);
    }

    fn run_until(&self, time: Duration) {
        // Somebody must wait for the time, or nobody might be there to see it.
        let context = Rc::clone(self.workers[0].context());
        let wait = time.saturating_sub(self.now());
        self.run(async move { context.delay(wait).await });
    }

    fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        let ended = self.simulation.run(&self.workers[0], LIMIT, future);
        ended.unwrap_or_else(|stuck| panic!("{stuck}"))
    }

    /// Runs until `count` have been admitted in all.
    fn run_until_admitted(&self, count: usize) {
        let enough = || self.admitted.borrow().len() >= count;
        let ended = self.simulation.run_until(LIMIT, enough);
        ended.unwrap_or_else(|stuck| panic!("{stuck}"));
    }

    /// How many were admitted between two moments, and how many bytes they had.
    fn between(&self, from: Duration, to: Duration) -> (u64, u64) {
        let admitted = self.admitted.borrow();
        let them = admitted.iter().filter(|one| one.at >= from && one.at < to);
        them.fold((0, 0), |(count, bytes), one| (count + 1, bytes + one.bytes))
    }

    fn count_of(&self, who: usize) -> u64 {
        let admitted = self.admitted.borrow();
        admitted.iter().filter(|one| one.who == who).count() as u64
    }

    /// `seen` is `expected` within 2 %, and no more than `grain` besides.
    #[track_caller]
    fn assert_near(&self, seen: u64, expected: u64, grain: u64, what: &str) {
        let seed = self.seed;
        assert!(
            seen.abs_diff(expected) <= expected / 50 + grain,
            "seed {seed}: {seen} instead of {expected}, {what}"
        );
    }
}

fn group(limits: Limits) -> Arc<Group> {
    Group::new("group", limits).unwrap()
}

fn member(group: &Arc<Group>) -> Arc<Member> {
    Arc::new(Member::new(Arc::clone(group)))
}

fn iops(per_second: u64) -> Limits {
    Limits {
        iops_total: Rate::per_second(per_second),
        ..Limits::default()
    }
}

fn bps(per_second: u64) -> Limits {
    Limits {
        bps_total: Rate::per_second(per_second),
        ..Limits::default()
    }
}

#[test]
fn every_second_of_load_has_the_set_rate_of_requests_also_the_first_and_one_after_a_pause() {
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let mut machine = Machine::new(seed, random.between(1, 3) as usize);
        let rate = [50, 333, 2000, 7000][random.below(4) as usize];
        let group = group(iops(rate));
        let members = [member(&group), member(&group)];
        for start in [0, 6 * SECOND.as_nanos() as u64] {
            let start = Duration::from_nanos(start);
            machine.run_until(start);
            let start = machine.now();
            for (who, direction) in [(0, Direction::Read), (1, Direction::Write)] {
                let depth = random.between(2, 24) as usize;
                let load = (who, direction);
                let end = start + 3 * SECOND;
                machine.load(&members[who], load, depth, (512, 65_536), end);
            }
            for second in 0..3 {
                let from = start + second * SECOND;
                machine.run_until(from + SECOND);
                let (count, _) = machine.between(from, from + SECOND);
                machine.assert_near(count, rate, 1, &format!("in second {second} of {start:?}"));
            }
        }
    }
}

#[test]
fn every_second_of_load_has_the_set_rate_of_bytes_whatever_the_size_of_requests() {
    for seed in 100..112 {
        let mut random = Random::new(seed);
        let mut machine = Machine::new(seed, random.between(1, 3) as usize);
        let rate = [1 << 20, 10 << 20, 1 << 30][random.below(3) as usize];
        let largest = (rate / 8).min(1 << 20);
        let member = member(&group(bps(rate)));
        let load = (0, Direction::Write);
        machine.load(&member, load, 16, (largest / 16, largest), 4 * SECOND);
        for second in 0..4 {
            machine.run_until((second + 1) * SECOND);
            let (_, bytes) = machine.between(second * SECOND, (second + 1) * SECOND);
            machine.assert_near(bytes, rate, largest, &format!("in second {second}"));
        }
    }
}

#[test]
fn reads_and_writes_have_limits_of_their_own() {
    let mut machine = Machine::new(7, 2);
    let limits = Limits {
        iops_read: Rate::per_second(1000),
        iops_write: Rate::per_second(250),
        bps_write: Rate::per_second(1 << 20),
        ..Limits::default()
    };
    let member = member(&group(limits));
    let (small, large) = ((512, 512), (8192, 8192));
    machine.load(&member, (0, Direction::Read), 8, large, 4 * SECOND);
    machine.load(&member, (1, Direction::Write), 8, small, 2 * SECOND);
    machine.run_until(2 * SECOND);
    machine.load(&member, (2, Direction::Write), 8, large, 4 * SECOND);
    machine.run_until(4 * SECOND);
    machine.assert_near(machine.count_of(0), 4000, 16, "reads");
    machine.assert_near(machine.count_of(1), 500, 9, "writes, by their number");
    machine.assert_near(machine.count_of(2), 256, 12, "writes, by their bytes");
}

#[test]
fn a_large_request_counts_as_several_and_fractions_count() {
    let mut limits = iops(1000);
    limits.iops_size_bytes = 4096;
    for (bytes, requests_per_second) in [(512, 1000), (4096, 1000), (6144, 667), (16_384, 250)] {
        let mut machine = Machine::new(bytes, 1);
        let member = member(&group(limits));
        let end = 2 * SECOND;
        machine.load(&member, (0, Direction::Read), 8, (bytes, bytes), end);
        machine.run_until(end);
        let (count, _) = machine.between(Duration::ZERO, end);
        machine.assert_near(count, 2 * requests_per_second, 1, "requests");
    }
}

#[test]
fn a_burst_goes_at_its_rate_until_it_is_used_up_and_the_average_follows() {
    let rate = Rate {
        average: 200,
        burst: 2000,
        burst_seconds: 3,
    };
    let limits = Limits {
        iops_total: rate,
        ..Limits::default()
    };
    for seed in 0..4 {
        let mut machine = Machine::new(seed, 2);
        let member = member(&group(limits));
        machine.load(&member, (0, Direction::Read), 24, (512, 512), 8 * SECOND);
        machine.run_until(8 * SECOND);
        for second in 0..3 {
            let (count, _) = machine.between(second * SECOND, (second + 1) * SECOND);
            machine.assert_near(count, 2000, 1, &format!("in second {second}"));
        }
        // 6000 in all, less what has leaked meanwhile: 6000 + 200 t = 2000 t.
        let (count, _) = machine.between(Duration::ZERO, 4 * SECOND);
        machine.assert_near(count, 6000 + 4 * 200, 1, "with the end of the burst");
        for second in 4..8 {
            let (count, _) = machine.between(second * SECOND, (second + 1) * SECOND);
            machine.assert_near(count, 200, 1, &format!("in second {second}"));
        }
    }
}

#[test]
fn a_burst_without_a_length_goes_at_once() {
    let mut limits = iops(100);
    limits.iops_total.burst = 500;
    let mut machine = Machine::new(3, 1);
    let member = member(&group(limits));
    machine.batch(&member, 0, 700);
    machine.run_until(Duration::from_millis(100));
    let (count, _) = machine.between(Duration::ZERO, machine.now());
    machine.assert_near(count, 510, 2, "in the first tenth of a second");
    machine.run_until(SECOND);
    let (count, _) = machine.between(Duration::ZERO, SECOND);
    machine.assert_near(count, 600, 1, "in the first second");
}

#[test]
fn nobody_waits_longer_than_those_before_it_explain() {
    for seed in 0..10 {
        let mut machine = Machine::new(seed, 2);
        let member = member(&group(iops(500)));
        for (batch, count) in [40, 1, 100].into_iter().enumerate() {
            let start = machine.now();
            machine.batch(&member, batch, count);
            let before = machine.admitted.borrow().len();
            machine.run_until_admitted(before + count);
            let admitted = machine.admitted.borrow();
            for (place, one) in admitted[before..].iter().enumerate() {
                let explained = Duration::from_millis(2) * (place as u32 + 1) + JITTER;
                let waited = one.at - start;
                assert!(
                    waited <= explained && one.waited <= waited,
                    "seed {seed}: number {place} of batch {batch} waited {waited:?}"
                );
            }
        }
        let stats = member.stats();
        assert_eq!(stats.waiting, [0, 0]);
        assert!((100..141).contains(&stats.delayed[1]), "{stats:?}");
        assert!(stats.delayed_time[1] > SECOND / 10, "{stats:?}");
    }
}

#[test]
fn requests_of_one_member_go_in_the_order_of_their_arrival() {
    for seed in 0..10 {
        let machine = Machine::new(seed, 1);
        let member = member(&group(iops(1000)));
        let order = Rc::new(RefCell::new(Vec::new()));
        for number in 0..50 {
            let context = Rc::clone(machine.workers[0].context());
            let (member, order) = (Arc::clone(&member), Rc::clone(&order));
            context.clone().spawn(async move {
                context.delay(Duration::from_micros(number * 700)).await;
                member.admit(&context, Direction::Read, 512).await;
                order.borrow_mut().push(number);
            });
        }
        machine.run_until(SECOND);
        let order = order.borrow();
        assert!(
            order.len() == 50 && order.is_sorted(),
            "seed {seed}: {order:?}"
        );
    }
}

#[test]
fn members_of_a_group_share_fairly_however_many_requests_they_have() {
    for seed in 0..6 {
        let mut machine = Machine::new(seed, 3);
        let group = group(iops(900));
        for (who, depth) in [1, 6, 40].into_iter().enumerate() {
            let member = member(&group);
            let load = (who, Direction::Write);
            machine.load(&member, load, depth, (512, 512), 4 * SECOND);
        }
        machine.run_until(4 * SECOND);
        for who in 0..3 {
            machine.assert_near(machine.count_of(who), 1200, 15, &format!("of member {who}"));
        }
    }
}

#[test]
fn neither_direction_starves_the_other_of_a_limit_for_both() {
    for seed in 0..6 {
        let mut machine = Machine::new(seed, 2);
        let member = member(&group(iops(800)));
        for (who, direction, depth) in [(0, Direction::Read, 1), (1, Direction::Write, 40)] {
            machine.load(&member, (who, direction), depth, (512, 512), 4 * SECOND);
        }
        machine.run_until(4 * SECOND);
        for who in 0..2 {
            machine.assert_near(
                machine.count_of(who),
                1600,
                15,
                &format!("of direction {who}"),
            );
        }
    }
}

#[test]
fn changed_limits_hold_at_once_for_those_who_wait_too() {
    for seed in 0..6 {
        let mut machine = Machine::new(seed, 2);
        let group = group(bps(1 << 30));
        let member = member(&group);
        machine.load(
            &member,
            (0, Direction::Write),
            16,
            (4096, 4096),
            16 * SECOND,
        );
        for (index, rate) in [1 << 20, 4 << 20, 1 << 16, 8 << 20].into_iter().enumerate() {
            machine.run_until((2 * index as u32 + 1) * SECOND);
            group.set_limits(machine.clock(), bps(rate)).unwrap();
            assert_eq!(group.limits(), bps(rate));
            for _ in 0..2 {
                let from = machine.now();
                machine.run_until(from + SECOND);
                let (_, bytes) = machine.between(from, from + SECOND);
                machine.assert_near(bytes, rate, 8192, &format!("at rate {rate}"));
            }
        }
    }
}

#[test]
fn who_waits_for_hours_goes_at_the_new_rate_when_limits_are_raised_or_removed() {
    for limits in [iops(1_000_000), iops(10), Limits::default()] {
        let mut machine = Machine::new(5, 2);
        let group = group(bps(1));
        let member = member(&group);
        let (read, bytes) = ((1, Direction::Read), (4096, 4096));
        machine.batch(&member, 0, 20);
        machine.run_until(5 * SECOND);
        machine.load(&member, read, 1, bytes, Duration::ZERO);
        machine.run_until(10 * SECOND);
        assert_eq!(machine.admitted.borrow().len(), 1);
        assert_eq!(group.waiting(), [1, 19]);
        group.set_limits(machine.clock(), limits).unwrap();
        machine.run_until_admitted(21);
        let rate = limits.iops_total.average;
        let explained = match rate {
            0 => Duration::ZERO,
            rate => SECOND * 20 / rate as u32,
        };
        let waited = machine.now() - 10 * SECOND;
        assert!(waited <= explained + JITTER, "{waited:?} at {rate}");
        assert_eq!(group.waiting(), [0, 0]);
    }
}

#[test]
fn who_is_next_goes_in_time_when_the_one_before_it_gives_up() {
    let machine = Machine::new(1, 2);
    let member = member(&group(iops(1)));
    assert!(member.try_admit(machine.clock(), Direction::Read, 512));
    let [impatient, patient] =
        [0, 1].map(|index: usize| Rc::clone(machine.workers[index].context()));
    let first = Arc::clone(&member);
    impatient.clone().spawn(async move {
        let admit = pin!(first.admit(&impatient, Direction::Read, 512));
        let gives_up = pin!(impatient.delay(SECOND / 2));
        assert!(matches!(select(admit, gives_up).await, Either::Right(_)));
    });
    machine.run_until(SECOND / 4);
    let admitted = Rc::new(Cell::new(false));
    let seen = Rc::clone(&admitted);
    patient.clone().spawn(async move {
        member.admit(&patient, Direction::Read, 512).await;
        seen.set(true);
    });
    machine.run_until(SECOND * 9 / 10);
    assert!(!admitted.get());
    machine.run_until(SECOND + JITTER);
    assert!(admitted.get());
}

#[test]
fn nobody_overtakes_one_who_waits_though_the_bucket_has_room_again() {
    let (machine, member) = (Machine::new(1, 1), member(&group(iops(10))));
    let context = machine.workers[0].context();
    assert!(member.try_admit(machine.clock(), Direction::Read, 512));
    let later = machine.clock() + SECOND;
    assert!(member.try_admit(later, Direction::Read, 512));
    let later = later + SECOND;
    let mut waits = Box::pin(member.admit(context, Direction::Read, 512));
    poll(&mut waits);
    for direction in [Direction::Read, Direction::Write] {
        assert!(!member.try_admit(later, direction, 512));
    }
    drop(waits);
    assert!(member.try_admit(later, Direction::Read, 512));
}

#[test]
fn one_who_gives_up_after_it_was_admitted_is_not_charged() {
    let machine = Machine::new(1, 1);
    let group = group(bps(1000));
    let (one, other) = (member(&group), member(&group));
    let context = machine.workers[0].context();
    assert!(one.try_admit(machine.clock(), Direction::Write, 1 << 20));
    let mut first = Box::pin(one.admit(context, Direction::Write, 1 << 30));
    let mut second = Box::pin(other.admit(context, Direction::Write, 512));
    assert!(!poll(&mut first) && !poll(&mut second));
    // Lets one go: the bucket is no more than full at the new rate.
    group.set_limits(machine.clock(), bps(2000)).unwrap();
    assert_eq!(group.waiting(), [0, 1]);
    assert!(!poll(&mut second));
    drop(first);
    assert!(poll(&mut second));
}

/// Polls a future for as often as it wants to be polled for nothing; returns whether it is ready.
fn poll(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    (0..20).any(|_| future.now_or_never().is_some())
}

#[test]
fn a_drain_lets_the_queue_go_and_the_others_make_up_for_it() {
    for seed in 0..6 {
        let mut machine = Machine::new(seed, 2);
        let group = group(iops(100));
        let (drained, other) = (member(&group), member(&group));
        machine.batch(&drained, 0, 150);
        machine.run_until(SECOND / 2);
        machine.load(&other, (1, Direction::Write), 8, (512, 512), 8 * SECOND);
        let start = machine.now();
        drained.drain_begin();
        drained.drain_begin();
        let enough = || machine.count_of(0) == 150;
        machine.simulation.run_until(LIMIT, enough).unwrap();
        assert!(machine.now() <= start + JITTER, "seed {seed}");
        assert_eq!(drained.stats().waiting, [0, 0]);
        drained.drain_end();
        assert!(
            drained.try_admit(machine.clock(), Direction::Write, 512),
            "still drained"
        );
        drained.drain_end();
        assert!(
            !drained.try_admit(machine.clock(), Direction::Write, 512),
            "seed {seed}"
        );
        // 152 went by then, 50 of them paid for. The other goes on when the rest is.
        machine.run_until(start + SECOND);
        assert!(
            machine.count_of(1) <= 1,
            "seed {seed}: nobody paid for the drain"
        );
        machine.run_until(8 * SECOND);
        let (count, _) = machine.between(Duration::ZERO, 8 * SECOND);
        machine.assert_near(count + 1, 800, 2, "with the drain");
    }
}

#[test]
fn waiters_that_give_up_cost_nothing_and_hand_their_turn_on() {
    for seed in 0..12 {
        let mut machine = Machine::new(seed, 3);
        let group = group(iops(1000));
        let members = [member(&group), member(&group)];
        let given_up = Rc::new(Cell::new(0));
        for index in 0..30 {
            let worker = &machine.workers[index % 3];
            let context = Rc::clone(worker.context());
            let member = Arc::clone(&members[index % 2]);
            let admitted = Rc::clone(&machine.admitted);
            let given_up = Rc::clone(&given_up);
            let mut random = machine.random.fork();
            let origin = machine.origin;
            let direction = [Direction::Read, Direction::Write][index / 2 % 2];
            worker.context().spawn(async move {
                while context.engine().now() - origin < 3 * SECOND {
                    // About as long as the wait: some are dropped just when they were admitted.
                    let patience = Duration::from_micros(random.below(60_000));
                    let admit = pin!(member.admit(&context, direction, 512));
                    match select(admit, pin!(context.delay(patience))).await {
                        Either::Left(_) => admitted.borrow_mut().push(Admitted {
                            at: context.engine().now() - origin,
                            waited: Duration::ZERO,
                            who: 0,
                            bytes: 512,
                        }),
                        Either::Right(_) => given_up.set(given_up.get() + 1),
                    }
                }
            });
        }
        for second in 0..3 {
            machine.run_until((second + 1) * SECOND);
            let (count, _) = machine.between(second * SECOND, (second + 1) * SECOND);
            machine.assert_near(count, 1000, 1, &format!("in second {second}"));
        }
        machine.run_until(5 * SECOND);
        assert!(given_up.get() > 500, "seed {seed}: {}", given_up.get());
        assert_eq!(group.waiting(), [0, 0]);
    }
}

#[test]
fn workers_in_threads_of_their_own_wake_each_other() {
    const EACH: u64 = 3000;
    let group = group(iops(20_000));
    let members = [member(&group), member(&group)];
    let admitted = AtomicU64::new(0);
    let elapsed = std::thread::scope(|scope| {
        let threads = [0, 1, 2].map(|index: usize| {
            let member = &members[index % 2];
            let admitted = &admitted;
            scope.spawn(move || {
                let context = IoContext::new(make(EngineChoice::Auto).unwrap());
                let start = context.engine().now();
                let (left, count) = (Rc::new(Cell::new(EACH)), Rc::new(Cell::new(0)));
                for _ in 0..8 {
                    let (cx, member) = (Rc::clone(&context), Arc::clone(member));
                    let (left, count) = (Rc::clone(&left), Rc::clone(&count));
                    context.spawn(async move {
                        while left.get() > 0 {
                            left.set(left.get() - 1);
                            member.admit(&cx, Direction::Read, 512).await;
                            count.set(count.get() + 1);
                        }
                    });
                }
                let mut events = Vec::new();
                while context.tasks() > 0 {
                    if !context.turn(&mut events) {
                        context.sleep(&mut events, None, || true);
                    }
                }
                admitted.fetch_add(count.get(), Ordering::Relaxed);
                (start, context.engine().now())
            })
        });
        let times = threads.map(|thread| thread.join().unwrap());
        let start = times.iter().map(|(start, _)| *start).min().unwrap();
        let end = times.iter().map(|(_, end)| *end).max().unwrap();
        end - start
    });
    assert_eq!(admitted.load(Ordering::Relaxed), 3 * EACH);
    // 9000 at 20 000 per second, less what the bucket holds; how much later depends on the machine.
    assert!(elapsed >= Duration::from_millis(430), "{elapsed:?}");
}

#[test]
fn a_group_without_limits_admits_everybody() {
    let group = group(Limits::default());
    let member = member(&group);
    for _ in 0..1000 {
        assert!(member.try_admit(SECOND, Direction::Write, u64::MAX));
    }
    assert_eq!(group.name(), "group");
}

#[test]
fn the_largest_values_do_not_overflow() {
    let rate = Rate {
        average: MAX_VALUE,
        burst: MAX_VALUE,
        burst_seconds: 1,
    };
    let mut limits = Limits {
        bps_total: rate,
        iops_total: Rate::per_second(1),
        iops_size_bytes: 1,
        ..Limits::default()
    };
    limits.check().unwrap();
    let mut buckets = Buckets::new(&limits);
    for _ in 0..3 {
        buckets.advance(Duration::from_nanos(u64::MAX));
        buckets.charge(Direction::Write, u64::MAX);
        assert!(buckets.wait(Direction::Read) > SECOND);
    }
    limits.bps_total.burst_seconds = 2;
    assert_eq!(limits.check().unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn limits_that_make_no_sense_together_are_refused_by_name() {
    let refusal = |settings: &[(&str, u64)]| {
        let mut limits = Limits::default();
        for (name, value) in settings {
            Property::find(name).unwrap().set(&mut limits, *value);
        }
        let error = limits.check().err()?;
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(Group::new("group", limits).is_err());
        Some(error.to_string())
    };
    let refused = |settings: &[(&str, u64)], word: &str| {
        let sentence = refusal(settings).unwrap_or_else(|| panic!("{settings:?} passes"));
        assert!(sentence.contains(word), "{settings:?}: {sentence}");
    };
    refused(
        &[("iops-total", 1), ("iops-write", 1)],
        "excludes 'iops-write'",
    );
    refused(&[("bps-total", 1), ("bps-read", 1)], "excludes 'bps-read'");
    refused(&[("bps-total-max", 1), ("bps-read-max", 1)], "excludes");
    refused(&[("bps-read-max", 1)], "'bps-read-max' needs 'bps-read'");
    refused(&[("bps-read", 5), ("bps-read-max", 4)], "not be below");
    refused(
        &[("bps-read", 5), ("bps-read-max-length", 2)],
        "needs 'bps-read-max'",
    );
    refused(&[("bps-read", 5), ("bps-read-max-length", 0)], "at least 1");
    refused(&[("bps-write", MAX_VALUE + 1)], "at most");
    refused(
        &[("iops-size", 4096), ("bps-total", 1)],
        "needs a limit of requests",
    );
    let long = [("bps-read", 1), ("bps-read-max", MAX_VALUE / 2)];
    refused(&[long[0], long[1], ("bps-read-max-length", 3)], "too long");
    assert_eq!(
        refusal(&[long[0], long[1], ("bps-read-max-length", 2)]),
        None
    );
    let apart = [("iops-total", 1), ("bps-read", 1), ("bps-write", 1)];
    assert_eq!(refusal(&apart), None);
    assert_eq!(refusal(&[("iops-write", 9), ("iops-size", 4096)]), None);
}

#[test]
fn refused_limits_change_nothing() {
    let group = group(iops(5));
    let mut limits = iops(7);
    limits.iops_read.average = 1;
    assert!(group.set_limits(SECOND, limits).is_err());
    assert_eq!(group.limits(), iops(5));
}

#[test]
fn every_property_is_found_by_each_of_its_names_and_has_a_place_of_its_own() {
    assert_eq!(PROPERTIES.len(), 19);
    let mut limits = Limits::default();
    for (value, property) in (1..).zip(PROPERTIES) {
        property.set(&mut limits, value);
    }
    for (value, property) in (1..).zip(PROPERTIES) {
        let dotted = format!("limits.{}", property.name);
        for name in [property.name, property.x_name, &dotted] {
            let found = Property::find(name).unwrap();
            assert_eq!(found.get(&limits), value, "{name}");
        }
    }
    assert_eq!(limits.bps_write.burst_seconds, 18);
    assert!(Property::find("limits.x-iops-total").is_none());
    let length = Property::find("x-bps-read-max-length").unwrap();
    assert_eq!(length.get(&Limits::default()), 1);
}
