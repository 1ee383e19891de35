//! The machine that the numbers are from, and who runs where on it.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::peer::{Aio, Program};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cell::Backend;
use crate::row::Row;

/// Our dependencies' versions are in here.
const LOCK_FILE: &str = include_str!("../../Cargo.lock");

/// The unit of /proc/stat: USER_HZ, which is 100 on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Which CPUs back-ends and clients have.
#[derive(Debug)]
pub(crate) struct Placement {
    cpus: Vec<usize>,
}

impl Placement {
    /// All CPUs that we may use.
    pub(crate) fn detect() -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let cpus = (0..CpuSet::MAX_CPU)
            .filter(|&cpu| allowed.is_set(cpu))
            .collect();
        Ok(Self { cpus })
    }

    /// The CPUs of back-end and client: apart if there is one for each thread, else all for both.
    fn split(&self, row: Row) -> (&[usize], &[usize]) {
        if self.cpus.len() < 2 * row.queues {
            return (&self.cpus, &self.cpus);
        }
        (
            &self.cpus[..row.queues],
            &self.cpus[row.queues..2 * row.queues],
        )
    }

    /// Whether a client thread that polls keeps a back-end from running.
    pub(crate) fn is_shared(&self, row: Row) -> bool {
        self.cpus.len() < 2 * row.queues
    }

    /// Pins the calling thread to the clients' CPUs.
    pub(crate) fn pin_client(&self, row: Row) -> io::Result<()> {
        Ok(sched_setaffinity(None, &set(self.split(row).1))?)
    }

    /// Calls `start` with this thread on the back-ends' CPUs, which a new process inherits.
    pub(crate) fn with_server_cpus<T>(
        &self,
        row: Row,
        start: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        sched_setaffinity(None, &set(self.split(row).0))?;
        let outcome = start();
        sched_setaffinity(None, &set(&self.cpus))?;
        outcome
    }

    /// A sentence on who runs where.
    fn describe(&self) -> String {
        let shared = |queues: usize| {
            if self.cpus.len() < 2 * queues {
                "back-end and client share all CPUs, and a polling client yields".to_owned()
            } else {
                format!("back-end and client have {queues} CPU(s) each")
            }
        };
        format!("One queue: {}. Two queues: {}.", shared(1), shared(2))
    }
}

fn set(cpus: &[usize]) -> CpuSet {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu);
    }
    set
}

/// CPU time of the machine up to some moment, in ticks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Activity {
    all: u64,
    busy: u64,
    stolen: u64,
}

impl Activity {
    /// Up to now.
    pub(crate) fn now() -> io::Result<Self> {
        Self::parse(&fs::read_to_string("/proc/stat")?)
            .ok_or_else(|| io::Error::other("/proc/stat is not as expected"))
    }

    fn parse(stat: &str) -> Option<Self> {
        // user nice system idle iowait irq softirq steal; guest time is in user already.
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .collect();
        let [user, nice, system, idle, iowait, irq, softirq, stolen, ..] = ticks[..] else {
            return None;
        };
        let busy = user + nice + system + irq + softirq;
        Some(Self {
            all: busy + idle + iowait + stolen,
            busy,
            stolen,
        })
    }

    /// What part of the time since `start` went to others, or was stolen, if `ours` went to us.
    pub(crate) fn others_since(self, start: Self, ours: Duration) -> f64 {
        let ours = ours.as_secs_f64() * TICKS_PER_SECOND;
        let busy = (self.busy + self.stolen - start.busy - start.stolen) as f64;
        (busy - ours).max(0.0) / (self.all - start.all).max(1) as f64
    }
}

/// What to print above the table, a line each.
pub(crate) fn heading(
    file: &Path,
    mebibytes: u64,
    placement: &Placement,
    backends: &[Backend],
) -> io::Result<Vec<String>> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut lines = vec![
        format!(
            "{}; {model}, {} CPU(s){}; Linux {}; {}, {mebibytes} MiB file",
            today(),
            placement.cpus.len(),
            if cpus.contains(" hypervisor") {
                " of a virtual machine"
            } else {
                ""
            },
            kernel.trim(),
            file_system(file)?,
        ),
        backends
            .iter()
            .map(|&backend| version(backend))
            .collect::<Vec<_>>()
            .join("; "),
        format!(
            "Random 4 KiB requests; depth is per queue. {}",
            placement.describe()
        ),
    ];
    if backends.contains(&Backend::Qsd) {
        lines
            .push("qsd runs with an iothread and, in each row, the aio that suits it best.".into());
    }
    Ok(lines)
}

/// A back-end's name and version.
fn version(backend: Backend) -> String {
    match backend {
        Backend::Stonework => says(Program::Stonework, "stonework"),
        Backend::Qsd => says(Program::StorageDaemon(Aio::Threads), "qsd"),
        Backend::Baseline => format!(
            "baseline: vhost-user-backend {}",
            locked("vhost-user-backend")
        ),
        Backend::Raw => "raw: stonework on the raw file".to_owned(),
        Backend::Direct => "direct: io_uring in the client".to_owned(),
        Backend::Syscalls => "syscalls: pread and pwrite in the client".to_owned(),
    }
}

/// The first line of what `program --version` prints.
fn says(program: Program, name: &str) -> String {
    let output = program
        .executable()
        .and_then(|executable| Command::new(executable).arg("--version").output().ok());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let line = text.as_deref().and_then(|text| text.lines().next());
    format!("{name}: {}", line.unwrap_or("unknown version"))
}

/// The version of a crate that we were built with.
fn locked(name: &str) -> &'static str {
    LOCK_FILE
        .split("[[package]]")
        .find(|package| package.contains(&format!("name = \"{name}\"\n")))
        .and_then(|package| package.split("version = \"").nth(1))
        .and_then(|rest| rest.split('"').next())
        .unwrap_or("of unknown version")
}

/// The type of the file system that `file` is on.
fn file_system(file: &Path) -> io::Result<String> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut best = (0, "unknown file system");
    for line in mounts.lines() {
        let mut words = line.split(' ').skip(1);
        let (Some(point), Some(kind)) = (words.next(), words.next()) else {
            continue;
        };
        // The last of equal ones is mounted over the others.
        if file.starts_with(point) && point.len() >= best.0 {
            best = (point.len(), kind);
        }
    }
    Ok(best.1.to_owned())
}

/// Today's date, in UTC.
fn today() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year}-{month:02}-{day:02}")
}

/// Year, month and day of a day since 1970-01-01.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let mut year = 1970;
    loop {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        if days < 365 + u64::from(leap) {
            let february = 28 + u64::from(leap);
            let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            let mut month = 0;
            while days >= lengths[month] {
                days -= lengths[month];
                month += 1;
            }
            return (year, month as u64 + 1, days + 1);
        }
        days -= 365 + u64::from(leap);
        year += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_through_leap_years() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(20_453), (2025, 12, 31));
    }

    #[test]
    fn what_others_used_is_what_is_left_of_the_busy_time() {
        let start = Activity::parse("cpu  10 0 10 100 0 0 0 5 0 0\ncpu0 ...").unwrap();
        let end = Activity::parse("cpu  40 0 20 140 0 0 0 25 0 0\n").unwrap();
        let others = end.others_since(start, Duration::from_millis(300));
        assert!((others - 0.3).abs() < 1e-9, "{others}");
    }

    #[test]
    fn the_baselines_version_is_that_of_the_lock_file() {
        assert!(locked("vhost-user-backend").starts_with("0."));
        assert_eq!(locked("no-such-crate"), "of unknown version");
    }
}
