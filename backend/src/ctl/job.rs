//! `stonework ctl job`, and what starts jobs.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde_json::{Value, json};

use super::cli::{CopyMode, JobFlags, JobVerb, Start, Sync};
use super::table::{self, Table, list, text};
use super::{Ctl, Failure};

/// Between two looks at a job that is waited for.
const LOOK: Duration = Duration::from_millis(200);

impl Ctl {
    pub(super) fn job(&mut self, verb: &JobVerb) -> Result<(), Failure> {
        match verb {
            JobVerb::Ls => self.show("query-block-jobs", json!({}), |ctl, jobs| {
                let mut table =
                    Table::new(&["JOB", "TYPE", "STATUS", "DONE", "OF", "SPEED", "ERROR"]);
                for job in list(jobs) {
                    let speed = match job["speed"].as_u64() {
                        Some(0) | None => "-".to_owned(),
                        Some(speed) => format!("{}/s", ctl.bytes(Some(speed))),
                    };
                    table.row(vec![
                        text(&job["device"]),
                        text(&job["type"]),
                        text(&job["status"]),
                        ctl.bytes(job["offset"].as_u64()),
                        ctl.bytes(job["len"].as_u64()),
                        speed,
                        text(&job["error"]),
                    ]);
                }
                ctl.print_table(&table)
            }),
            JobVerb::Pause { id } => self.change("job-pause", json!({"id": id})),
            JobVerb::Resume { id } => self.change("job-resume", json!({"id": id})),
            JobVerb::Cancel { id, force } => {
                self.change("block-job-cancel", json!({"device": id, "force": force}))
            }
            JobVerb::Complete { id, wait } => {
                self.change("job-complete", json!({"id": id}))?;
                match wait {
                    true => self.wait_for(id, Until::Gone),
                    false => Ok(()),
                }
            }
            JobVerb::Finalize { id } => self.change("job-finalize", json!({"id": id})),
            JobVerb::Dismiss { id } => self.change("job-dismiss", json!({"id": id})),
            JobVerb::Speed { id, speed } => {
                let what = json!({"device": id, "speed": speed});
                self.change("block-job-set-speed", what)
            }
            JobVerb::Wait { id } => self.wait_for(id, Until::Over),
        }
    }

    pub(super) fn start(&mut self, start: &Start) -> Result<(), Failure> {
        match start {
            Start::Backup {
                node,
                target,
                sync,
                flags,
            } => {
                let what = json!({"device": node, "target": target, "sync": sync.word()});
                self.begin("blockdev-backup", what, "backup", flags, false)
            }
            Start::Mirror {
                node,
                target,
                sync,
                copy_mode,
                complete,
                flags,
            } => {
                let what = json!({
                    "device": node, "target": target, "sync": sync.word(), "copy-mode": copy_mode.word(),
                });
                self.begin("blockdev-mirror", what, "mirror", flags, *complete)
            }
            Start::Commit {
                node,
                top,
                base,
                complete,
                flags,
            } => {
                let mut what = json!({"device": node});
                for (name, node) in [("top-node", top), ("base-node", base)] {
                    if let Some(node) = node {
                        what[name] = json!(node);
                    }
                }
                self.begin("block-commit", what, "commit", flags, *complete)
            }
            Start::Stream { node, base, flags } => {
                let mut what = json!({"device": node});
                if let Some(base) = base {
                    what["base-node"] = json!(base);
                }
                self.begin("block-stream", what, "stream", flags, false)
            }
            Start::Snapshot { node, overlay } => {
                let what = json!({"node": node, "overlay": overlay});
                self.change("blockdev-snapshot", what)
            }
        }
    }

    fn begin(
        &mut self,
        command: &str,
        mut what: Value,
        kind: &str,
        flags: &JobFlags,
        complete: bool,
    ) -> Result<(), Failure> {
        let node = text(&what["device"]);
        let id = flags
            .job
            .clone()
            .unwrap_or_else(|| format!("{kind}-{node}"));
        what["job-id"] = json!(id);
        what["speed"] = json!(flags.speed);
        let waits = flags.wait || complete;
        // Else nobody could be told how it ended.
        what["auto-dismiss"] = json!(!waits);
        self.change(command, what)?;
        match (waits && !self.how.dry_run, complete) {
            (false, _) => Ok(()),
            (true, false) => self.wait_for(&id, Until::Ready),
            (true, true) => self.wait_for(&id, Until::Completed),
        }
    }

    /// Waits until a job is over or, with [`Until::Ready`], can be completed. One that somebody else looks
    /// after is left as it is when it is over; else it is dismissed.
    fn wait_for(&mut self, id: &str, until: Until) -> Result<(), Failure> {
        let mut shown = Shown::default();
        let mut is_told = false;
        loop {
            let Some(jobs) = self.ask("query-jobs", json!({}))? else {
                return Ok(());
            };
            let job = list(&jobs).iter().find(|job| job["id"] == id);
            let Some(job) = job else {
                shown.end();
                return Ok(());
            };
            shown.at(id, job);
            match job["status"].as_str() {
                Some("ready") if until == Until::Completed && !is_told => {
                    self.change("job-complete", json!({"id": id}))?;
                    is_told = true;
                }
                Some("ready") if until == Until::Ready => {
                    shown.end();
                    return Ok(());
                }
                Some("pending") if until == Until::Over => {
                    shown.end();
                    return Ok(());
                }
                Some("concluded") => {
                    shown.end();
                    let error = job["error"].as_str().map(str::to_owned);
                    if until != Until::Over {
                        self.change("job-dismiss", json!({"id": id}))?;
                    }
                    return match error {
                        None => Ok(()),
                        Some(error) => Err(Failure::Refused {
                            class: "GenericError".to_owned(),
                            text: format!("job '{id}' failed: {error}"),
                        }),
                    };
                }
                _ => {}
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// What a job is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// It can be completed, or is over.
    Ready,
    /// As that, and then it is completed and over.
    Completed,
    /// It is over.
    Gone,
    /// It is over, or waits to be finalized; somebody else looks after it.
    Over,
}

/// How far a job is, on a terminal.
#[derive(Default)]
struct Shown {
    is_open: bool,
    looks: u32,
    first: u64,
}

impl Shown {
    fn at(&mut self, id: &str, job: &Value) {
        if !io::stderr().is_terminal() {
            return;
        }
        let number = |name: &str| job[name].as_u64().unwrap_or(0);
        let (done, total) = (number("current-progress"), number("total-progress"));
        if self.looks == 0 {
            self.first = done;
        }
        let passed = LOOK * self.looks;
        self.looks += 1;
        let moved = done.saturating_sub(self.first);
        let left = match moved {
            0 => String::new(),
            moved => {
                let seconds =
                    passed.as_secs_f64() * total.saturating_sub(done) as f64 / moved as f64;
                format!(", {} s left", seconds.ceil())
            }
        };
        let percent = done as f64 * 100.0 / total.max(1) as f64;
        let line = format!(
            "\r{id}: {} {percent:.1} % of {}{left}\u{1b}[K",
            text(&job["status"]),
            table::bytes(total)
        );
        // Nobody may look.
        let _ = io::stderr().write_all(line.as_bytes());
        self.is_open = true;
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.is_open) {
            let _ = io::stderr().write_all(b"\n");
        }
    }
}

impl Sync {
    fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Top => "top",
            Self::None => "none",
        }
    }
}

impl CopyMode {
    fn word(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        }
    }
}
