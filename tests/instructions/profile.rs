//! A run under callgrind: how often each instruction ran.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::work::{Operation, Way};

/// An instruction: the file that it is in, and its address there.
type Place = (String, u64);

/// What ran.
pub(crate) struct Profile {
    /// Instructions run, all together.
    total: u64,
    /// How often each one ran, and in which function.
    places: BTreeMap<Place, (u64, String)>,
    /// Allocations made while requests were made.
    pub(crate) allocations: u64,
}

impl Profile {
    /// Runs this program under callgrind, to make `requests` requests.
    pub(crate) fn of(
        way: Way,
        operation: Operation,
        requests: u64,
    ) -> Result<Self, Box<dyn Error>> {
        let out = tempfile::NamedTempFile::new()?;
        let mut file = std::ffi::OsString::from("--callgrind-out-file=");
        file.push(out.path());
        let ran = Command::new("valgrind")
            .args(["--tool=callgrind", "--quiet"])
            .args(["--dump-instr=yes", "--dump-line=no"])
            .args(["--compress-strings=no", "--compress-pos=no"])
            .arg(file)
            .arg(std::env::current_exe()?)
            .arg("--run")
            .arg(format!("{way:?}-{operation:?}-{requests}").to_lowercase())
            .output()
            .map_err(|error| format!("cannot run valgrind ({error}): see scripts/deps tools"))?;
        if !ran.status.success() {
            let said = String::from_utf8_lossy(&ran.stderr);
            return Err(format!("a run under valgrind failed: {}\n{said}", ran.status).into());
        }
        let allocations = String::from_utf8(ran.stdout)?.trim().parse()?;
        let text = std::fs::read_to_string(out.path())?;
        Self::parse(&text, allocations).ok_or_else(|| "callgrind wrote something else".into())
    }

    /// Reads callgrind's output, "positions: instr", nothing compressed.
    fn parse(text: &str, allocations: u64) -> Option<Self> {
        let mut profile = Self {
            total: 0,
            places: BTreeMap::new(),
            allocations,
        };
        let (mut object, mut function) = ("", "");
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if let Some(name) = line.strip_prefix("ob=") {
                object = name;
            } else if let Some(name) = line.strip_prefix("fn=") {
                function = name;
            } else if line.starts_with("calls=") {
                // What the callee cost is on the next line, and counted where it ran.
                lines.next();
            } else if let Some(cost) = line.strip_prefix("totals: ") {
                profile.total = cost.trim().parse().ok()?;
            } else if let Some(cost) = line.strip_prefix("0x") {
                let (address, count) = cost.split_once(' ')?;
                let place = (object.to_owned(), u64::from_str_radix(address, 16).ok()?);
                let known = profile.places.entry(place);
                known.or_insert((0, function.to_owned())).0 += count.parse::<u64>().ok()?;
            }
        }
        (profile.total > 0).then_some(profile)
    }

    /// Instructions that each of the `more` requests cost that `self` has made beyond `fewer`.
    pub(crate) fn per_request(&self, fewer: &Self, more: u64) -> u64 {
        let added = self.total.saturating_sub(fewer.total);
        (added + more / 2) / more
    }

    /// What at least every second one of those requests ran: object, address and function.
    pub(crate) fn repeated<'a>(
        &'a self,
        fewer: &'a Self,
        more: u64,
    ) -> impl Iterator<Item = (&'a Path, u64, &'a str)> {
        let places = self.places.iter().filter(move |(place, (count, _))| {
            let before = fewer.places.get(*place).map_or(0, |(count, _)| *count);
            count.saturating_sub(before) >= more / 2
        });
        places.map(|((object, address), (_, function))| {
            (Path::new(object), *address, function.as_str())
        })
    }
}

/// The instructions of this program that lock memory against other cores.
pub(crate) struct Atomics {
    program: PathBuf,
    addresses: BTreeSet<u64>,
}

impl Atomics {
    pub(crate) fn of_this_program() -> Result<Self, Box<dyn Error>> {
        let program = std::env::current_exe()?.canonicalize()?;
        let listed = Command::new("objdump")
            .args(["--disassemble", "--no-show-raw-insn", "--wide"])
            .arg(&program)
            .output()
            .map_err(|error| format!("cannot run objdump ({error}): see scripts/deps tools"))?;
        let addresses = String::from_utf8_lossy(&listed.stdout)
            .lines()
            .filter_map(|line| {
                let (address, instruction) = line.trim_start().split_once(":\t")?;
                locks(instruction).then(|| u64::from_str_radix(address, 16).ok())?
            })
            .collect::<BTreeSet<_>>();
        // A program with threads has some: with none, the list was not understood.
        if addresses.is_empty() {
            return Err("objdump shows no atomic instruction in this program".into());
        }
        Ok(Self { program, addresses })
    }

    /// Whether the instruction at `address` of `object` is one of them.
    pub(crate) fn has(&self, object: &Path, address: u64) -> bool {
        object == self.program && self.addresses.contains(&address)
    }
}

/// Whether an x86-64 instruction locks memory: it says so, or exchanges with memory.
fn locks(instruction: &str) -> bool {
    let mut words = instruction.split_whitespace();
    match words.next() {
        Some("lock") => true,
        Some(name) if name.starts_with("xchg") => instruction.contains('('),
        _ => false,
    }
}
