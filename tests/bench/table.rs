//! The table, for people and for the README.

use std::collections::BTreeMap;

use crate::cell::{Backend, Cell, Spread};
use crate::load::Measurement;
use crate::row::Row;

type Results = BTreeMap<Row, Vec<Cell>>;

/// The back-ends that ours is compared with by a ratio.
const RIVALS: [Backend; 4] = [
    Backend::Qsd,
    Backend::Raw,
    Backend::Baseline,
    Backend::Direct,
];

/// Everything: a line per row and back-end.
pub(crate) fn print_text(heading: &[String], results: &Results) {
    for line in heading {
        println!("{line}");
    }
    println!(
        "Median of the rounds (least-most). IOPS and CPU ratios: stonework's value over that \
         line's, median of each round's ratio.\n"
    );
    println!(
        "{:<32}{:<16}{:>8} {:<17}{:>8}{:>9}{:>8}   {:<22}{:<22}",
        "row",
        "back-end",
        "kIOPS",
        "(least-most)",
        "p50 us",
        "p99 us",
        "CPU us",
        "IOPS ratio",
        "CPU ratio"
    );
    for (row, cells) in results {
        let ours = find(cells, Backend::Stonework);
        for (index, cell) in cells.iter().enumerate() {
            let name = if index == 0 {
                row.to_string()
            } else {
                String::new()
            };
            let rate = cell.spread(kiops);
            let ratio = |of: fn(&Measurement) -> f64| match ours {
                Some(ours) if cell.backend != Backend::Stonework => {
                    let ratio = ours.ratio(cell, of);
                    format!("{:.2} ({:.2}-{:.2})", ratio.median, ratio.least, ratio.most)
                }
                _ => String::new(),
            };
            let line = format!(
                "{name:<32}{:<16}{:>8} {:<17}{:>8.1}{:>9.1}{:>8.2}   {:<22}{:<22}",
                cell.label(),
                short(rate.median),
                range(rate),
                cell.spread(|round| round.median_us).median,
                cell.spread(|round| round.p99_us).median,
                cell.spread(|round| round.cpu_us).median,
                ratio(|round| round.iops),
                ratio(|round| round.cpu_us),
            );
            println!("{}", line.trim_end());
        }
    }
}

/// A line per row, for the README.
pub(crate) fn print_markdown(heading: &[String], results: &Results) {
    println!("{}\n", heading.join(" \n"));
    println!(
        "Each cell: kIOPS (least-most) · p50/p99 µs · back-end CPU µs per request. Ratios are \
         stonework's IOPS and CPU time over the other's.\n"
    );
    let mut columns: Vec<Backend> = Vec::new();
    for cell in results.values().flatten() {
        if !columns.contains(&cell.backend) {
            columns.push(cell.backend);
        }
    }
    let rivals: Vec<Backend> = RIVALS
        .into_iter()
        .filter(|rival| columns.contains(rival) && columns.contains(&Backend::Stonework))
        .collect();
    let names = columns.iter().map(Backend::to_string);
    let ratios = rivals.iter().map(|rival| format!("vs {rival}"));
    let header: Vec<String> = names.chain(ratios).collect();
    println!("| row | {} |", header.join(" | "));
    println!("|---|{}", "---|".repeat(header.len()));
    for (row, cells) in results {
        let values = columns.iter().map(|&backend| {
            find(cells, backend).map_or_else(String::new, |cell| {
                let rate = cell.spread(kiops);
                format!(
                    "{} ({}) · {:.1}/{:.1} · {:.2}",
                    short(rate.median),
                    bounds(rate),
                    cell.spread(|round| round.median_us).median,
                    cell.spread(|round| round.p99_us).median,
                    cell.spread(|round| round.cpu_us).median,
                )
            })
        });
        let ratios = rivals.iter().map(|&rival| {
            match (find(cells, Backend::Stonework), find(cells, rival)) {
                (Some(ours), Some(other)) => format!(
                    "{:.2}x, CPU {:.2}x",
                    ours.ratio(other, |round| round.iops).median,
                    ours.ratio(other, |round| round.cpu_us).median
                ),
                _ => String::new(),
            }
        });
        let line: Vec<String> = values.chain(ratios).collect();
        println!("| {row} | {} |", line.join(" | "));
    }
}

fn find(cells: &[Cell], backend: Backend) -> Option<&Cell> {
    cells.iter().find(|cell| cell.backend == backend)
}

fn kiops(round: &Measurement) -> f64 {
    round.iops / 1e3
}

/// Three digits or so.
fn short(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

fn bounds(spread: Spread) -> String {
    format!("{}-{}", short(spread.least), short(spread.most))
}

fn range(spread: Spread) -> String {
    format!("({})", bounds(spread))
}
