//! Groups: members whose requests are held to one set of limits together.
//!
//! A request that may not go at once waits in its member's queue for its direction, first come first
//! served. When the buckets let one more go, the members that have waiters take turns, for each
//! direction, and so do the directions, where both are held up.
//!
//! Whoever holds the lock admits everybody whose turn it is, on whatever worker they wait, and wakes
//! them. For each direction the waiter who is next is *appointed*: it has a timer in its own worker's
//! context and looks again when that fires. Nobody else has one.
//!
//! Threads: any worker, and control. The lock is held over memory operations, never over a wait, and
//! wakers are called after it. While nothing is limited nobody takes it.
//!
//! Invariants: after every change nobody waits who could be admitted at that moment; if anybody waits
//! in a direction, one of them is appointed; what was charged for a request that is given up before
//! it was admitted is taken back.
//!
//! Bounded by whoever makes the requests: as many wait as are sent.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use futures_util::future::select;
use smallvec::SmallVec;

use super::bucket::Buckets;
use super::{Direction, Limits};
use crate::Error;
use crate::engine::preempt;
use crate::io::IoContext;

/// Timers are not set for less: what may go within that time goes in one batch. Far below what a
/// bucket holds, so that the rate does not suffer.
const SHORTEST_TIMER: Duration = Duration::from_micros(200);

const DIRECTIONS: [Direction; 2] = [Direction::Read, Direction::Write];

/// Limits and the members that share them.
pub struct Group {
    name: Arc<str>,
    /// Changed under the lock, read without.
    limited: AtomicBool,
    state: Mutex<State>,
}

struct State {
    limits: Limits,
    buckets: Buckets,
    members: BTreeMap<u64, Queues>,
    /// Members that have waiters, for each direction.
    waiting: [BTreeSet<u64>; 2],
    /// The member whose waiter was admitted last.
    last_member: [u64; 2],
    last_direction: Direction,
    /// Whose timer runs.
    appointed: [Option<u64>; 2],
    /// Tickets that were admitted and have not been seen by their owners.
    admitted: BTreeMap<u64, Waiter>,
    /// For members and tickets.
    next: u64,
}

/// One member's waiters and counters.
#[derive(Default)]
struct Queues {
    /// By ticket, so by arrival.
    waiters: [BTreeMap<u64, Waiter>; 2],
    drains: u32,
    delayed: [u64; 2],
    delayed_time: [Duration; 2],
}

struct Waiter {
    bytes: u64,
    since: Duration,
    /// Whether there is something to see for the owner.
    notified: bool,
    waker: Option<Waker>,
}

/// Called when the lock is free again.
type Wakers = SmallVec<[Waker; 4]>;

/// What a waiter sees.
enum Look {
    Admitted,
    /// It is appointed, and nobody may go before this is over.
    Next(Duration),
    Behind,
}

impl Group {
    /// A group without members.
    ///
    /// # Errors
    ///
    /// As [`Limits::check`].
    pub fn new(name: &str, limits: Limits) -> Result<Arc<Self>, Error> {
        limits.check()?;
        Ok(Arc::new(Self {
            name: name.into(),
            limited: AtomicBool::new(!limits.is_unlimited()),
            state: Mutex::new(State {
                limits,
                buckets: Buckets::new(&limits),
                members: BTreeMap::new(),
                waiting: Default::default(),
                last_member: [0; 2],
                last_direction: Direction::Write,
                appointed: [None; 2],
                admitted: BTreeMap::new(),
                next: 1,
            }),
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.with(|state, _| state.limits)
    }

    /// Changes the limits; those who wait do so at the new rate. `now` is the engines' clock, as in
    /// all that follows.
    ///
    /// # Errors
    ///
    /// As [`Limits::check`]; nothing has changed then.
    pub fn set_limits(&self, now: Duration, limits: Limits) -> Result<(), Error> {
        limits.check()?;
        self.with(|state, wakers| {
            state.buckets.advance(now);
            state.buckets.set_limits(&limits);
            state.limits = limits;
            // Who was told how long to wait must ask again.
            state.appointed = [None; 2];
            state.admit_next(now, wakers);
            let limited = !limits.is_unlimited();
            self.limited.store(limited, Ordering::Relaxed);
        });
        Ok(())
    }

    /// How many requests wait now, reads and writes.
    pub fn waiting(&self) -> [u64; 2] {
        self.with(|state, _| {
            DIRECTIONS.map(|direction| {
                let members = state.members.values();
                members
                    .map(|queues| queues.waiters[direction as usize].len() as u64)
                    .sum()
            })
        })
    }

    fn with<T>(&self, action: impl FnOnce(&mut State, &mut Wakers) -> T) -> T {
        let mut wakers = Wakers::new();
        let result = {
            let mut state = self.state.lock().expect("no panic while counting");
            action(&mut state, &mut wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
        result
    }
}

/// One of those who share a group's limits: a throttle node, or a root. Leaves the group when dropped.
pub struct Member {
    group: Arc<Group>,
    number: u64,
}

/// What a member's requests went through so far; of reads and of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemberStats {
    /// Requests that wait now.
    pub waiting: [u64; 2],
    /// Requests that have waited.
    pub delayed: [u64; 2],
    /// How long those have waited, all together.
    pub delayed_time: [Duration; 2],
}

impl Member {
    /// A new member of `group`.
    pub fn new(group: Arc<Group>) -> Self {
        let number = group.with(|state, _| {
            let number = state.number();
            state.members.insert(number, Queues::default());
            number
        });
        Self { group, number }
    }

    /// Its group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Whether the group limits anything now: who finds that it does not need not ask to be admitted.
    #[inline]
    pub fn is_limited(&self) -> bool {
        self.group.limited.load(Ordering::Relaxed)
    }

    /// Admits a request of `bytes` bytes if that can be done without a wait; returns whether it is.
    pub fn try_admit(&self, now: Duration, direction: Direction, bytes: u64) -> bool {
        if !self.is_limited() {
            return true;
        }
        self.group.with(|state, _| {
            state.buckets.advance(now);
            let goes = state.is_draining(self.number)
                || state.waiting.iter().all(BTreeSet::is_empty)
                    && state.buckets.wait(direction).is_zero();
            if goes {
                state.buckets.charge(direction, bytes);
            }
            goes
        })
    }

    /// Waits until a request of `bytes` bytes may go.
    ///
    /// # Cancellation
    ///
    /// Nothing is charged for a request that stops waiting, and the next in turn goes in its place.
    pub async fn admit(&self, context: &IoContext, direction: Direction, bytes: u64) {
        if self.try_admit(context.engine().now(), direction, bytes) {
            return;
        }
        preempt(context.engine()).await;
        let mut ticket = Ticket::new(self, context, direction, bytes);
        loop {
            let next = match ticket.look() {
                Look::Admitted => return,
                Look::Next(wait) => Some(wait.max(SHORTEST_TIMER)),
                Look::Behind => None,
            };
            let notified = poll_fn(|cx| ticket.poll_notified(cx.waker()));
            match next {
                Some(wait) => {
                    let _ = select(pin!(context.delay(wait)), pin!(notified)).await;
                }
                None => notified.await,
            }
            preempt(context.engine()).await;
        }
    }

    /// From now on until [`drain_end`](Self::drain_end) nothing waits here: what does goes at once.
    /// All of it is charged, so the group's other requests, and later ones, make up for it. Nests.
    ///
    /// Whoever drains has no clock: the group's is where its last request left it, which is earlier. Who
    /// goes is charged as of then.
    pub fn drain_begin(&self) {
        self.group.with(|state, wakers| {
            let now = state.buckets.now();
            state.queues(self.number).drains += 1;
            for direction in DIRECTIONS {
                while let Some(ticket) = state.first(self.number, direction) {
                    state.admit(self.number, direction, ticket, now, wakers);
                }
            }
            state.admit_next(now, wakers);
        });
    }

    /// Ends one [`drain_begin`](Self::drain_begin).
    pub fn drain_end(&self) {
        self.group.with(|state, _| {
            let drains = &mut state.queues(self.number).drains;
            *drains = drains.checked_sub(1).expect("a drain ends once");
        });
    }

    /// What its requests went through so far.
    pub fn stats(&self) -> MemberStats {
        self.group.with(|state, _| {
            let queues = state.queues(self.number);
            MemberStats {
                waiting: [0, 1].map(|index| queues.waiters[index].len() as u64),
                delayed: queues.delayed,
                delayed_time: queues.delayed_time,
            }
        })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Nobody waits: a waiter borrows its member.
        self.group
            .with(|state, _| state.members.remove(&self.number));
    }
}

/// A waiter's place.
struct Ticket<'a> {
    member: &'a Member,
    context: &'a IoContext,
    direction: Direction,
    number: u64,
    admitted: bool,
}

impl<'a> Ticket<'a> {
    /// Takes a place at the end of the member's queue.
    fn new(member: &'a Member, context: &'a IoContext, direction: Direction, bytes: u64) -> Self {
        let now = context.engine().now();
        let number = member.group.with(|state, wakers| {
            let number = state.number();
            let waiter = Waiter {
                bytes,
                since: now,
                notified: false,
                waker: None,
            };
            let queues = state.queues(member.number);
            queues.waiters[direction as usize].insert(number, waiter);
            state.waiting[direction as usize].insert(member.number);
            state.buckets.advance(now);
            if state.is_draining(member.number) {
                state.admit(member.number, direction, number, now, wakers);
            }
            state.admit_next(now, wakers);
            number
        });
        Self {
            member,
            context,
            direction,
            number,
            admitted: false,
        }
    }

    fn look(&mut self) -> Look {
        let now = self.context.engine().now();
        let look = self.member.group.with(|state, wakers| {
            state.buckets.advance(now);
            state.admit_next(now, wakers);
            if state.admitted.remove(&self.number).is_some() {
                return Look::Admitted;
            }
            state
                .waiter(self.member.number, self.direction, self.number)
                .notified = false;
            match state.appointed[self.direction as usize] == Some(self.number) {
                true => Look::Next(state.buckets.wait(self.direction)),
                false => Look::Behind,
            }
        });
        self.admitted = matches!(look, Look::Admitted);
        look
    }

    /// Ready when there is something to see since the last look.
    fn poll_notified(&self, waker: &Waker) -> Poll<()> {
        let waker = waker.clone();
        // The one of before is dropped when the lock is free.
        let (poll, _before) = self.member.group.with(|state, _| {
            if state.admitted.contains_key(&self.number) {
                return (Poll::Ready(()), None);
            }
            let waiter = state.waiter(self.member.number, self.direction, self.number);
            if waiter.notified {
                return (Poll::Ready(()), None);
            }
            (Poll::Pending, waiter.waker.replace(waker))
        });
        poll
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if self.admitted {
            return;
        }
        let now = self.context.engine().now();
        let member = self.member.number;
        // Its waker is dropped when the lock is free.
        let _waiter = self.member.group.with(|state, wakers| {
            state.buckets.advance(now);
            let waiter = match state.admitted.remove(&self.number) {
                Some(waiter) => {
                    state.buckets.refund(self.direction, waiter.bytes);
                    // The next may go sooner than they were told.
                    state.appointed = [None; 2];
                    waiter
                }
                None => state.remove(member, self.direction, self.number),
            };
            state.admit_next(now, wakers);
            waiter
        });
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn queues(&mut self, member: u64) -> &mut Queues {
        self.members.get_mut(&member).expect("until it is dropped")
    }

    fn waiter(&mut self, member: u64, direction: Direction, ticket: u64) -> &mut Waiter {
        let waiters = &mut self.queues(member).waiters[direction as usize];
        waiters.get_mut(&ticket).expect("until it is admitted")
    }

    fn is_draining(&self, member: u64) -> bool {
        self.members[&member].drains > 0
    }

    /// A member's first waiter.
    fn first(&self, member: u64, direction: Direction) -> Option<u64> {
        let waiters = &self.members[&member].waiters[direction as usize];
        waiters.keys().next().copied()
    }

    /// The member whose turn it is, and its first waiter.
    fn head(&self, direction: Direction) -> Option<(u64, u64)> {
        let waiting = &self.waiting[direction as usize];
        let after = self.last_member[direction as usize] + 1;
        let member = waiting.range(after..).next().or_else(|| waiting.first())?;
        let ticket = self.first(*member, direction);
        Some((*member, ticket.expect("it has waiters")))
    }

    /// Admits everybody who may go now, in turn, and appoints those who are next.
    fn admit_next(&mut self, now: Duration, wakers: &mut Wakers) {
        while let Some((member, direction, ticket)) = self.next_to_go() {
            self.admit(member, direction, ticket, now, wakers);
            self.last_member[direction as usize] = member;
            self.last_direction = direction;
        }
        for direction in DIRECTIONS {
            let head = self.head(direction);
            let appointed = &mut self.appointed[direction as usize];
            let before = std::mem::replace(appointed, head.map(|(_, ticket)| ticket));
            if let Some((member, ticket)) = head
                && before != Some(ticket)
            {
                self.waiter(member, direction, ticket).notify(wakers);
            }
        }
    }

    fn next_to_go(&self) -> Option<(u64, Direction, u64)> {
        let order = match self.last_direction {
            Direction::Read => [Direction::Write, Direction::Read],
            Direction::Write => DIRECTIONS,
        };
        order.into_iter().find_map(|direction| {
            let (member, ticket) = self.head(direction)?;
            let goes = self.buckets.wait(direction).is_zero();
            goes.then_some((member, direction, ticket))
        })
    }

    /// Admits a waiter, whether or not the buckets let it go.
    fn admit(
        &mut self,
        member: u64,
        direction: Direction,
        ticket: u64,
        now: Duration,
        wakers: &mut Wakers,
    ) {
        let mut waiter = self.remove(member, direction, ticket);
        self.buckets.charge(direction, waiter.bytes);
        waiter.notify(wakers);
        let queues = self.queues(member);
        queues.delayed[direction as usize] += 1;
        queues.delayed_time[direction as usize] += now.saturating_sub(waiter.since);
        self.admitted.insert(ticket, waiter);
    }

    fn remove(&mut self, member: u64, direction: Direction, ticket: u64) -> Waiter {
        let waiters = &mut self.queues(member).waiters[direction as usize];
        let waiter = waiters.remove(&ticket).expect("it waits");
        if waiters.is_empty() {
            self.waiting[direction as usize].remove(&member);
        }
        waiter
    }
}

impl Waiter {
    fn notify(&mut self, wakers: &mut Wakers) {
        self.notified = true;
        wakers.extend(self.waker.take());
    }
}
