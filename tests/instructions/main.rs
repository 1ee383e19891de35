//! `instructions`: what the graph costs each request that goes the fast way, counted.
//!
//! The program makes 4 KiB requests to a raw disk in a file, through a root and straight to the engine
//! below, under callgrind; the difference is what the graph adds. Setting up drops out: each way is run
//! with so many requests and with twice as many. Besides it looks at what ran once per request or so:
//!
//! * nothing was allocated (a counting allocator, and no function of the C library but those that move
//!   bytes);
//! * no instruction locked memory: no lock was taken and no counter that workers share was changed. What
//!   is counted per request (`Root::in_flight`, the changes that a flush covers) has one writer.
//!
//! It fails above [`MOST`], or [`MOST_QCOW2`], and where a count has grown by a tenth over the one that is kept in
//! `tests/instructions/kept`. A change that is meant is kept with `--keep`; counts depend on the
//! compiler, so a new one may need that too.

mod profile;
mod work;

use std::collections::BTreeMap;
use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use profile::{Atomics, Profile};
use work::{Operation, Way};

/// What the graph may add to a request, in instructions.
const MOST: u64 = 400;
/// What a qcow2 image may add with it.
const MOST_QCOW2: u64 = 700;

/// Requests of the shorter run.
const REQUESTS: u64 = 2000;

/// The counts that are kept: a name and a number per line.
const KEPT: &str = include_str!("kept");

/// What the C library may do for a request.
const MOVES: [&str; 3] = ["memcpy", "memmove", "memset"];

/// Count the instructions that the graph adds to a request.
#[derive(Parser)]
struct Arguments {
    /// Print the lines for the file of kept counts
    #[arg(long)]
    keep: bool,
    /// What is counted: WAY-OPERATION-REQUESTS (this program runs itself so)
    #[arg(long, hide = true)]
    run: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.run {
        Some(what) => run(what),
        None => judge(arguments.keep),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: &str) -> Result<bool, Box<dyn Error>> {
    let words: Vec<_> = what.split('-').collect();
    let [way, operation, requests] = words[..] else {
        return Err("--run takes WAY-OPERATION-REQUESTS".into());
    };
    let way = Way::from_str(way, false)?;
    let operation = Operation::from_str(operation, false)?;
    println!("{}", work::run(way, operation, requests.parse()?)?);
    Ok(true)
}

fn judge(keep: bool) -> Result<bool, Box<dyn Error>> {
    let atomics = Atomics::of_this_program()?;
    let mut report = Report {
        kept: kept()?,
        wrong: Vec::new(),
        lines: String::new(),
    };
    for operation in [Operation::Read, Operation::Write] {
        let name = format!("{operation:?}").to_lowercase();
        let direct = Counted::of(Way::Direct, operation, &atomics)?;
        let graph = Counted::of(Way::Graph, operation, &atomics)?;
        let qcow2 = Counted::of(Way::Qcow2, operation, &atomics)?;
        let turn = Counted::of(Way::Turn, operation, &atomics)?;
        report.row(&name, "the engine alone", &direct, &graph, MOST);
        let qcow2_name = format!("{name}-qcow2");
        report.row(&qcow2_name, "the engine alone", &direct, &qcow2, MOST_QCOW2);
        // The worker's loop, which requests that come together share.
        let name = format!("{name}-turn");
        report.row(&name, "the graph", &graph, &turn, u64::MAX);
    }
    if keep {
        print!("{}", report.lines);
        return Ok(true);
    }
    for what in &report.wrong {
        eprintln!("instructions: {what}");
    }
    Ok(report.wrong.is_empty())
}

/// What was found, row by row.
struct Report {
    kept: BTreeMap<&'static str, u64>,
    wrong: Vec<String>,
    /// For the file of kept counts.
    lines: String,
}

impl Report {
    /// Judges what `more` adds to `base`.
    fn row(&mut self, name: &str, what: &str, base: &Counted, more: &Counted, most: u64) {
        let added = more.instructions.saturating_sub(base.instructions);
        println!(
            "{name}: {added} instructions per request, on top of {} for {what}",
            base.instructions
        );
        self.lines += &format!("{name} {added}\n");
        let mut wrong = Vec::new();
        if added > most {
            wrong.push(format!("{added} instructions are more than {most}"));
        }
        match self.kept.get(name) {
            Some(before) if added * 10 > before * 11 => {
                wrong.push(format!(
                    "{added} instructions, a tenth above the {before} that are kept"
                ));
            }
            Some(before) if added * 11 < before * 10 => {
                println!("{name}: better than the {before} that are kept: see --keep");
            }
            Some(_) => {}
            None => wrong.push("no count is kept: see --keep".to_owned()),
        }
        if more.allocations > 0 {
            wrong.push(format!("{} allocations", more.allocations));
        }
        wrong.extend(more.found.iter().cloned());
        let wrong = wrong.into_iter().map(|what| format!("{name}: {what}"));
        self.wrong.extend(wrong);
    }
}

/// The counts of the last change that was meant.
fn kept() -> Result<BTreeMap<&'static str, u64>, Box<dyn Error>> {
    let lines = KEPT.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, count) = line.split_once(' ').ok_or("a kept line has two words")?;
            Ok((name, count.parse()?))
        })
        .collect()
}

/// What requests of a kind cost.
struct Counted {
    /// Per request.
    instructions: u64,
    /// In all requests of the longer run.
    allocations: u64,
    /// What a request should not do, and did.
    found: Vec<String>,
}

impl Counted {
    fn of(way: Way, operation: Operation, atomics: &Atomics) -> Result<Self, Box<dyn Error>> {
        let fewer = Profile::of(way, operation, REQUESTS)?;
        let more = Profile::of(way, operation, 2 * REQUESTS)?;
        let mut found = Vec::new();
        for (object, address, function) in more.repeated(&fewer, REQUESTS) {
            if atomics.has(object, address) {
                found.push(format!("{function} locks memory at {address:#x}"));
            }
            let library = object.file_name().unwrap_or_default().to_string_lossy();
            let moves = MOVES.iter().any(|name| function.contains(name));
            if library.starts_with("libc.") && !moves {
                found.push(format!("{function} of the C library runs"));
            }
        }
        found.dedup();
        Ok(Self {
            instructions: more.per_request(&fewer, REQUESTS),
            allocations: more.allocations,
            found,
        })
    }
}
