//! What a `blkdebug` node does at which event: [`Rules`].
//!
//! An event that has rules to inject an error makes these the *active* ones, in place of those that were
//! active; they then meet requests until another event has some. Rules may ask for a state, and change
//! it: that is how "the second time" is said.
//!
//! Threads: any. The lock is held for a look; who is suspended waits without it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use event_listener::Event;

use crate::IoError;

/// The state that rules begin in. A rule with state 0 holds in every one.
const FIRST_STATE: u64 = 1;

/// What a request is, for rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl Kind {
    /// As operators write them.
    pub(super) const NAMES: [(&'static str, Self); 6] = [
        ("read", Self::Read),
        ("write", Self::Write),
        ("write-zeroes", Self::WriteZeroes),
        ("discard", Self::Discard),
        ("flush", Self::Flush),
        ("block-status", Self::BlockStatus),
    ];
}

/// A rule as it was given.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) event: String,
    /// In which state it holds; 0: in every one.
    pub(super) state: u64,
    pub(super) action: Action,
}

/// What a rule does.
#[derive(Clone, Debug)]
pub(super) enum Action {
    Inject(Inject),
    SetState(u64),
    /// Once: the rule goes with the first request that it meets.
    Suspend(String),
}

/// An error for requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inject {
    /// `None`: all but questions for block status.
    pub(super) kind: Option<Kind>,
    pub(super) error: IoError,
    /// Goes with the first request that it meets.
    pub(super) once: bool,
    /// Fails the request without letting others run before.
    pub(super) immediately: bool,
    /// Only requests that touch this byte.
    pub(super) offset: Option<u64>,
}

impl Inject {
    fn meets(&self, kind: Kind, offset: u64, bytes: u64) -> bool {
        let of_kind = match self.kind {
            Some(mine) => mine == kind,
            None => kind != Kind::BlockStatus,
        };
        let touches = |mine: u64| mine >= offset && mine - offset < bytes;
        of_kind && self.offset.is_none_or(touches)
    }
}

/// See the module's header.
pub(super) struct Rules {
    table: Mutex<Table>,
    /// Notified whenever somebody is let go.
    let_go: Event,
}

struct Table {
    state: u64,
    rules: BTreeMap<u64, Rule>,
    /// Numbers of rules.
    active: Vec<u64>,
    /// Who is suspended, under which tag.
    suspended: BTreeMap<u64, String>,
    next: u64,
}

impl Rules {
    /// These rules; those of event `none` have met it.
    pub(super) fn new(rules: Vec<Rule>) -> Self {
        let rules: BTreeMap<u64, Rule> = (1..).zip(rules).collect();
        let mut table = Table {
            state: FIRST_STATE,
            active: Vec::new(),
            suspended: BTreeMap::new(),
            next: rules.len() as u64 + 1,
            rules,
        };
        table.happens("none");
        Self {
            table: Mutex::new(table),
            let_go: Event::new(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no panic while looking")
    }

    /// A request comes to `event`, and goes on when nobody wants it suspended.
    pub(super) async fn event(&self, event: &str) {
        let tickets = self.table().happens(event);
        if tickets.is_empty() {
            return;
        }
        let suspended = Suspended {
            rules: self,
            tickets,
        };
        loop {
            // Before the look: who is let go after it wakes this task.
            let let_go = self.let_go.listen();
            let held = {
                let table = self.table();
                let mut tickets = suspended.tickets.iter();
                tickets.any(|ticket| table.suspended.contains_key(ticket))
            };
            if !held {
                return;
            }
            let_go.await;
        }
    }

    /// The error for a request, and whether it comes at once.
    pub(super) fn check(&self, kind: Kind, offset: u64, bytes: u64) -> Option<(IoError, bool)> {
        let mut table = self.table();
        // The one that was given last counts.
        let met = table.active.iter().rev().find_map(|number| {
            let Action::Inject(inject) = &table.rules.get(number)?.action else {
                return None;
            };
            let meets = inject.meets(kind, offset, bytes);
            meets.then_some((*number, *inject))
        });
        let (number, inject) = met?;
        if inject.once {
            table.rules.remove(&number);
            table.active.retain(|active| *active != number);
        }
        Some((inject.error, inject.immediately))
    }

    /// Suspends the next request that comes to `event`.
    pub(super) fn suspend_at(&self, event: &str, tag: &str) {
        let mut table = self.table();
        let number = table.number();
        let rule = Rule {
            event: event.to_owned(),
            state: 0,
            action: Action::Suspend(tag.to_owned()),
        };
        table.rules.insert(number, rule);
    }

    /// Lets go who is suspended under `tag`, and forgets it; returns whether there was such a tag.
    pub(super) fn resume(&self, tag: &str) -> bool {
        let mut table = self.table();
        let before = (table.rules.len(), table.suspended.len());
        let is_tag =
            |rule: &Rule| matches!(&rule.action, Action::Suspend(suspends) if suspends == tag);
        table.rules.retain(|_, rule| !is_tag(rule));
        table.suspended.retain(|_, suspended| suspended != tag);
        let known = before != (table.rules.len(), table.suspended.len());
        drop(table);
        self.let_go.notify(usize::MAX);
        known
    }

    /// Whether somebody is suspended under `tag`.
    pub(super) fn is_suspended(&self, tag: &str) -> bool {
        let table = self.table();
        table.suspended.values().any(|suspended| suspended == tag)
    }
}

impl Table {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// An event: returns the tickets under which whoever came to it is suspended.
    fn happens(&mut self, event: &str) -> Vec<u64> {
        let rules = self.rules.iter();
        let holding = rules.filter(|(_, rule)| {
            rule.event == event && (rule.state == 0 || rule.state == self.state)
        });
        let holding: Vec<(u64, Action)> = holding
            .map(|(number, rule)| (*number, rule.action.clone()))
            .collect();
        let (mut injected, mut tickets) = (Vec::new(), Vec::new());
        for (number, action) in holding {
            match action {
                Action::Inject(_) => injected.push(number),
                Action::SetState(state) => self.state = state,
                Action::Suspend(tag) => {
                    self.rules.remove(&number);
                    let ticket = self.number();
                    self.suspended.insert(ticket, tag);
                    tickets.push(ticket);
                }
            }
        }
        if !injected.is_empty() {
            self.active = injected;
        }
        tickets
    }
}

/// A request while it is suspended.
struct Suspended<'a> {
    rules: &'a Rules,
    tickets: Vec<u64>,
}

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        let mut table = self.rules.table();
        for ticket in &self.tickets {
            table.suspended.remove(ticket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const FAILS: Inject = Inject {
        kind: None,
        error: IoError::Failed,
        once: false,
        immediately: true,
        offset: None,
    };

    fn rule(event: &str, state: u64, action: Action) -> Rule {
        Rule {
            event: event.into(),
            state,
            action,
        }
    }

    fn fails(rules: &Rules, kind: Kind, offset: u64) -> bool {
        rules.check(kind, offset, 512).is_some()
    }

    #[test]
    fn an_error_comes_after_its_event_and_in_its_state_only() {
        let rules = Rules::new(vec![
            rule("pwritev", 1, Action::SetState(2)),
            rule("pwritev", 2, Action::Inject(FAILS)),
        ]);
        let event = |name: &str| rules.event(name).now_or_never().unwrap();
        assert!(!fails(&rules, Kind::Write, 0));
        event("pwritev");
        assert!(!fails(&rules, Kind::Write, 0), "in the first state");
        event("read_aio");
        assert!(!fails(&rules, Kind::Write, 0), "at another event");
        event("pwritev");
        assert!(fails(&rules, Kind::Write, 0));
        assert!(fails(&rules, Kind::Read, 0));
        assert!(!fails(&rules, Kind::BlockStatus, 0));
    }

    #[test]
    fn an_error_meets_requests_of_its_kind_that_touch_its_place_and_once_if_it_says_so() {
        let inject = Inject {
            kind: Some(Kind::Read),
            once: true,
            offset: Some(1024),
            ..FAILS
        };
        let rules = Rules::new(vec![rule("none", 0, Action::Inject(inject))]);
        assert!(!fails(&rules, Kind::Write, 1024));
        assert!(!fails(&rules, Kind::Read, 512) && !fails(&rules, Kind::Read, 1025));
        assert!(fails(&rules, Kind::Read, 1024));
        assert!(!fails(&rules, Kind::Read, 1024));
    }

    #[test]
    fn an_event_with_errors_takes_the_place_of_those_before_and_the_last_one_counts() {
        let other = Inject {
            error: IoError::NoSpace,
            ..FAILS
        };
        let rules = Rules::new(vec![
            rule("none", 0, Action::Inject(FAILS)),
            rule("pwritev", 0, Action::Inject(FAILS)),
            rule("pwritev", 0, Action::Inject(other)),
        ]);
        let error = || rules.check(Kind::Write, 0, 1).map(|(error, _)| error);
        assert_eq!(error(), Some(IoError::Failed));
        rules.event("pwritev").now_or_never().unwrap();
        assert_eq!(error(), Some(IoError::NoSpace));
    }

    #[test]
    fn who_is_suspended_goes_on_when_its_tag_is_resumed_and_the_next_is_not_suspended() {
        let rules = Rules::new(Vec::new());
        rules.suspend_at("cow_write", "a");
        let mut first = Box::pin(rules.event("cow_write"));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(rules.is_suspended("a") && !rules.is_suspended("b"));
        assert!(rules.event("cow_write").now_or_never().is_some());
        assert!(!rules.resume("b"));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(rules.resume("a"));
        assert!(first.now_or_never().is_some());
        assert!(!rules.is_suspended("a") && !rules.resume("a"));
        // One that gives up leaves nothing behind.
        rules.suspend_at("cow_write", "c");
        let mut third = Box::pin(rules.event("cow_write"));
        assert!(third.as_mut().now_or_never().is_none());
        drop(third);
        assert!(!rules.is_suspended("c"));
    }
}
