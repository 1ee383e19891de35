//! `stonework ctl stats`, `requests` and `top`: counters, and what is under way.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::table::{Table, list, text, time};
use super::{Ctl, Failure};

/// The command that counts.
const STATS: &str = "query-blockstats";
/// The command of ours that lists requests under way.
const REQUESTS: &str = "query-block-requests";

/// Kinds of requests, with the part of their counters' names.
const KINDS: [(&str, &str); 4] = [
    ("read", "rd"),
    ("write", "wr"),
    ("flush", "flush"),
    ("discard", "unmap"),
];

/// What the counters say of one export or node.
#[derive(Clone, Default)]
struct Counted {
    operations: [u64; 4],
    bytes: [u64; 4],
    time_ns: [u64; 4],
    failed: [u64; 4],
}

impl Counted {
    fn new(stats: &Value) -> Self {
        let number = |key: String| stats[key].as_u64().unwrap_or(0);
        let each = |shape: &dyn Fn(&str) -> String| KINDS.map(|(_, part)| number(shape(part)));
        Self {
            operations: each(&|part| format!("{part}_operations")),
            bytes: each(&|part| format!("{part}_bytes")),
            time_ns: each(&|part| format!("{part}_total_time_ns")),
            failed: each(&|part| format!("failed_{part}_operations")),
        }
    }

    /// What was counted since `before`.
    fn since(&self, before: &Self) -> Self {
        let minus = |now: &[u64; 4], then: &[u64; 4]| {
            std::array::from_fn(|kind| now[kind].saturating_sub(then[kind]))
        };
        Self {
            operations: minus(&self.operations, &before.operations),
            bytes: minus(&self.bytes, &before.bytes),
            time_ns: minus(&self.time_ns, &before.time_ns),
            failed: minus(&self.failed, &before.failed),
        }
    }

    fn average(&self, kind: usize) -> String {
        let average = self.time_ns[kind].checked_div(self.operations[kind] + self.failed[kind]);
        average.map_or_else(|| "-".to_owned(), time)
    }
}

/// What an entry is of: a device, an export or a node.
fn name(entry: &Value) -> String {
    let named = ["export", "device", "node-name"].map(|key| entry[key].as_str());
    let named = named.into_iter().flatten().find(|name| !name.is_empty());
    named.unwrap_or("-").to_owned()
}

impl Ctl {
    pub(super) fn stats(&mut self, nodes: bool) -> Result<(), Failure> {
        self.show(STATS, json!({"query-nodes": nodes}), |ctl, entries| {
            let headings = ["OF", "KIND", "REQUESTS", "BYTES", "AVERAGE", "FAILED"];
            let mut table = Table::new(&headings);
            for entry in list(entries) {
                let counted = Counted::new(&entry["stats"]);
                for (kind, (word, _)) in KINDS.iter().enumerate() {
                    table.row(vec![
                        name(entry),
                        (*word).to_owned(),
                        counted.operations[kind].to_string(),
                        ctl.bytes(Some(counted.bytes[kind])),
                        counted.average(kind),
                        counted.failed[kind].to_string(),
                    ]);
                }
            }
            ctl.print_table(&table)
        })
    }

    pub(super) fn requests(&mut self) -> Result<(), Failure> {
        self.show(REQUESTS, json!({}), |ctl, requests| {
            ctl.print_table(&requests_table(ctl, requests))
        })
    }

    pub(super) fn top(&mut self, interval: Duration, count: Option<u64>) -> Result<(), Failure> {
        if self.how.dry_run {
            self.ask(STATS, json!({}))?;
            return self.ask(REQUESTS, json!({})).map(drop);
        }
        let is_terminal = std::io::stdout().is_terminal() && !self.how.json;
        let mut before: Option<(BTreeMap<String, Counted>, Instant)> = None;
        let mut looks = 0;
        while count != Some(looks) {
            if looks > 0 {
                pause(interval);
            }
            looks += 1;
            let entries = self.ask(STATS, json!({}))?.unwrap_or_default();
            let requests = self.ask(REQUESTS, json!({}))?.unwrap_or_default();
            if self.how.json {
                self.print(&json!({"stats": entries, "requests": requests}).to_string())?;
                continue;
            }
            let now = look();
            let counted: BTreeMap<_, _> = list(&entries)
                .iter()
                .map(|entry| (name(entry), Counted::new(&entry["stats"])))
                .collect();
            let nothing = (BTreeMap::new(), now);
            let (earlier, then) = before.as_ref().unwrap_or(&nothing);
            let table = self.rates(&counted, earlier, now - *then);
            if is_terminal {
                // Home, and away with what was there.
                let cleared = write!(std::io::stdout(), "\x1b[H\x1b[2J");
                cleared.map_err(|_| Failure::Output)?;
            }
            self.print_table(&table)?;
            if !list(&requests).is_empty() {
                self.print("")?;
                self.print_table(&requests_table(self, &requests))?;
            }
            before = Some((counted, now));
        }
        Ok(())
    }

    /// What went on in a time: all until now, if that is zero.
    fn rates(
        &self,
        now: &BTreeMap<String, Counted>,
        before: &BTreeMap<String, Counted>,
        time: Duration,
    ) -> Table {
        let mut table = Table::new(&[
            "EXPORT", "READ/s", "READ", "AVERAGE", "WRITE/s", "WRITE", "AVERAGE", "FLUSH/s",
            "AVERAGE", "FAILED",
        ]);
        let nothing = Counted::default();
        for (name, counted) in now {
            let part = counted.since(before.get(name).unwrap_or(&nothing));
            let seconds = time.as_secs_f64();
            let rate = |count: u64| match seconds > 0.0 {
                true => format!("{:.0}", count as f64 / seconds),
                false => "-".to_owned(),
            };
            let bytes = |count: u64| match seconds > 0.0 {
                true => format!("{}/s", self.bytes(Some((count as f64 / seconds) as u64))),
                false => "-".to_owned(),
            };
            table.row(vec![
                name.clone(),
                rate(part.operations[0]),
                bytes(part.bytes[0]),
                part.average(0),
                rate(part.operations[1]),
                bytes(part.bytes[1]),
                part.average(1),
                rate(part.operations[2]),
                part.average(2),
                counted.failed.iter().sum::<u64>().to_string(),
            ]);
        }
        table
    }
}

fn requests_table(ctl: &Ctl, requests: &Value) -> Table {
    let headings = ["AGE", "OF", "KIND", "OFFSET", "BYTES", "PHASE", "FILE"];
    let mut table = Table::new(&headings);
    let mut requests: Vec<_> = list(requests).iter().collect();
    requests.sort_by_key(|request| std::cmp::Reverse(request["age-ns"].as_u64()));
    for request in requests {
        table.row(vec![
            time(request["age-ns"].as_u64().unwrap_or(0)),
            name(request),
            text(&request["kind"]),
            text(&request["offset"]),
            ctl.bytes(request["bytes"].as_u64()),
            text(&request["phase"]),
            text(&request["file"]),
        ]);
    }
    table
}

fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[expect(
    clippy::disallowed_methods,
    reason = "a person waits, and nothing is simulated"
)]
fn look() -> Instant {
    Instant::now()
}
