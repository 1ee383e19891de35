//! `bench`: what a virtual disk costs, back-end against back-end.
//!
//! For each row (operation, depth, queues, way to wait, cache mode) every back-end serves the same
//! file in turn, several rounds over and each time in another order, to the same client. Medians
//! and their spread are shown, and ratios that are medians of each round's ratio: the machine's
//! moods, which last longer than a round, drop out of those.
//!
//! Before anything is timed the client writes blocks, reads them back through the back-end and,
//! past it, from the file, and looks whether the back-end has the file open as the row says.

mod cell;
mod direct;
mod disk;
mod inside;
mod load;
mod machine;
mod nbd;
mod row;
mod served;
mod syscalls;
mod table;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use cell::{Backend, Cell};
use clap::Parser;
use disk::{Disk, Empty};
use harness::peer::{Aio, Format};
use load::Measurement;
use machine::Placement;
use regex::Regex;
use row::{Operation, Row};

/// The part of the machine's CPU time that others may use during a measurement that counts. The
/// kernel's own threads, which write back and complete I/O, are others too.
const QUIET: f64 = 0.1;

/// How long measurements that were disturbed are repeated, in all.
const REPEAT_LIMIT: Duration = Duration::from_secs(180);

/// Compare back-ends on the same file: IOPS, latency and CPU time.
#[derive(Parser)]
struct Arguments {
    /// Rows to run, as a regular expression on their names, for example '^read qd32 1q .* cached'
    #[arg(long, default_value = "")]
    rows: Regex,
    /// Back-ends to run; by default stonework,qsd,baseline,direct, and stonework,qsd,raw for qcow2
    #[arg(long, value_delimiter = ',')]
    backends: Vec<Backend>,
    /// What stonework and qsd serve: the raw file, or a qcow2 image of it with every cluster allocated (and, for
    /// first writes, a new image)
    #[arg(long, default_value = "raw", value_parser = ["raw", "qcow2"])]
    format: String,
    /// Times that each row is measured on each back-end
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds that each measurement takes, after a warm-up of a quarter of that
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// A file to make and to remove again; its file system is the one that is measured
    #[arg(long, default_value = "bench.raw")]
    file: PathBuf,
    /// Size of that file
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    mebibytes: u64,
    /// Print the table as Markdown
    #[arg(long)]
    markdown: bool,
    /// Measure one and two workers in this process, each with its own ring and no client beside it, instead
    #[arg(long)]
    inside: bool,
    /// Measure NBD servers with fio, ours beside qsd, instead; --rows chooses among its own rows
    #[arg(long)]
    nbd: bool,
    /// Only show that it works: a few rows, one short round
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        arguments.rounds = 1;
        arguments.seconds = 0.1;
        arguments.mebibytes = 16;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let format = match arguments.format.as_str() {
        "qcow2" => Format::Qcow2,
        _ => Format::Raw,
    };
    if arguments.inside {
        return inside::run(format, arguments);
    }
    if arguments.nbd {
        return nbd::run(format, arguments);
    }
    let mut rows: Vec<Row> = Row::all(format)
        .filter(|row| arguments.rows.is_match(&row.to_string()))
        .collect();
    if arguments.quick {
        rows.retain(|row| row.is_typical());
    }
    if rows.is_empty() {
        return Err(format!(
            "no row is called '{}'; the rows are:\n{}",
            arguments.rows,
            Row::all(format)
                .map(|row| format!("  {row}\n"))
                .collect::<String>()
        )
        .into());
    }
    let mut backends = match (&*arguments.backends, format) {
        ([], Format::Raw) => vec![
            Backend::Stonework,
            Backend::Qsd,
            Backend::Baseline,
            Backend::Direct,
        ],
        ([], Format::Qcow2) => vec![Backend::Stonework, Backend::Qsd, Backend::Raw],
        (chosen, _) => chosen.to_vec(),
    };
    backends.retain(|backend| {
        let present = backend.is_present();
        if !present {
            eprintln!("bench: {backend} is not there; its rows are left out");
        }
        present
    });
    let mut disk = Disk::create(&arguments.file, arguments.mebibytes << 20)?;
    if format == Format::Qcow2 {
        disk.make_image()?;
    }
    let placement = Placement::detect()?;
    let mut results = BTreeMap::new();
    let mut outcome = Ok(());
    let start = Instant::now();
    let mut spare = REPEAT_LIMIT;
    for (index, &row) in rows.iter().enumerate() {
        eprintln!(
            "[{}/{}] {row} ({:.0} s so far)",
            index + 1,
            rows.len(),
            start.elapsed().as_secs_f64()
        );
        if !disk.prepare(row)? {
            eprintln!("bench: no O_DIRECT on this file system; {row} is left out");
            continue;
        }
        let seconds = Duration::from_secs_f64(arguments.seconds);
        let mut bench = Bench {
            disk: &disk,
            format,
            placement: &placement,
            row,
            seconds,
            spare: &mut spare,
        };
        match bench.measure(&backends, arguments.rounds) {
            Ok(cells) => drop(results.insert(row, cells)),
            Err(error) => {
                // Minutes of measurements are worth showing.
                outcome = Err(error);
                break;
            }
        }
    }
    let heading = machine::heading(disk.path(), arguments.mebibytes, &placement, &backends)?;
    if arguments.markdown {
        table::print_markdown(&heading, &results);
    } else {
        table::print_text(&heading, &results);
    }
    let rounds = results.values().flatten().flat_map(|cell| &cell.rounds);
    let others: Vec<f64> = rounds.map(|round| round.others).collect();
    let disturbed = others.iter().filter(|&&others| others > QUIET).count();
    println!(
        "\n{} rounds of {} s each; {:.0} s in all. In {disturbed} of {} measurements others used \
         more than {:.0} % of the machine's CPU time.",
        arguments.rounds,
        arguments.seconds,
        start.elapsed().as_secs_f64(),
        others.len(),
        QUIET * 100.0
    );
    outcome
}

/// The measurements of one row.
struct Bench<'a> {
    disk: &'a Disk,
    format: Format,
    placement: &'a Placement,
    row: Row,
    seconds: Duration,
    /// Time left to repeat measurements.
    spare: &'a mut Duration,
}

impl Bench<'_> {
    /// Measures all `backends`, in another order each round.
    fn measure(&mut self, backends: &[Backend], rounds: u32) -> Result<Vec<Cell>, Box<dyn Error>> {
        let mut cells = Vec::new();
        for &backend in backends {
            let aio = if backend == Backend::Qsd {
                self.best_aio()?
            } else {
                Aio::Threads
            };
            cells.push(Cell::new(backend, aio));
        }
        for round in 0..rounds as usize {
            for turn in 0..cells.len() {
                let index = (round + turn) % cells.len();
                let cell = &cells[index];
                let (backend, aio) = (cell.backend, cell.aio);
                let measured = self.undisturbed(backend, aio)?;
                cells[index].rounds.push(measured);
            }
        }
        Ok(cells)
    }

    /// Which of its ways to do I/O suits `qemu-storage-daemon` best in this row.
    ///
    /// Two short measurements of each, in turn, of which the better one counts.
    fn best_aio(&self) -> Result<Aio, Box<dyn Error>> {
        let mut candidates = vec![(Aio::Threads, 0.0), (Aio::IoUring, 0.0)];
        if self.row.is_direct() {
            candidates.push((Aio::Native, 0.0));
        }
        for _ in 0..2 {
            for (aio, best) in &mut candidates {
                let measured = self.once(Backend::Qsd, *aio, self.seconds / 2)?;
                *best = measured.iops.max(*best);
            }
        }
        candidates.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        Ok(candidates[0].0)
    }

    /// Measures until others leave the machine alone, or the time for that is used up, and takes
    /// the quietest.
    fn undisturbed(&mut self, backend: Backend, aio: Aio) -> Result<Measurement, Box<dyn Error>> {
        let mut best = self.once(backend, aio, self.seconds)?;
        while best.others > QUIET && !self.spare.is_zero() {
            let start = Instant::now();
            let again = self.once(backend, aio, self.seconds)?;
            *self.spare = self.spare.saturating_sub(start.elapsed());
            if again.others < best.others {
                best = again;
            }
        }
        Ok(best)
    }

    fn once(
        &self,
        backend: Backend,
        aio: Aio,
        seconds: Duration,
    ) -> Result<Measurement, Box<dyn Error>> {
        let format = match backend {
            Backend::Stonework | Backend::Qsd => self.format,
            _ => Format::Raw,
        };
        let empty = match self.row.operation {
            Operation::First => Some(self.disk.make_empty(format)?),
            Operation::Read | Operation::Write => None,
        };
        let job = load::Job {
            row: self.row,
            file: empty.as_ref().map_or(self.disk.file(format), Empty::path),
            format,
            blocks: empty.as_ref().map_or(self.disk.blocks(), Empty::blocks),
            seconds,
        };
        let measured = match backend.program(aio) {
            Some(program) => served::measure(program, &job, self.placement),
            None if backend == Backend::Direct => direct::measure(&job, self.placement),
            None => syscalls::measure(&job, self.placement),
        };
        let measured = measured.map_err(|error| format!("{backend}, {}: {error}", self.row))?;
        // What has been written is written back now and not while the next one is measured.
        self.disk.settle()?;
        Ok(measured)
    }
}

/// Where the bench's own file is, for messages.
fn shown(path: &Path) -> String {
    format!("'{}'", path.display())
}
