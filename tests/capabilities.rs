//! Looks that the table of capabilities and that of hazards are complete, and that what they say to show one
//! exists.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The sections of the table, with how many rows each has.
const SECTIONS: [(&str, usize); 50] = [
    ("1", 11),
    ("2", 15),
    ("3", 20),
    ("4", 12),
    ("5", 13),
    ("6", 6),
    ("7", 19),
    ("8", 13),
    ("9", 8),
    ("10", 10),
    ("11", 18),
    ("12", 12),
    ("13", 12),
    ("14", 31),
    ("15", 26),
    ("16", 8),
    ("17", 13),
    ("18", 14),
    ("19", 10),
    ("20", 23),
    ("22", 13),
    ("23", 11),
    ("24", 10),
    ("25", 12),
    ("27", 25),
    ("R", 17),
    ("D", 13),
    ("V", 21),
    ("B1", 7),
    ("B2", 7),
    ("B3", 15),
    ("B4", 8),
    ("B5", 10),
    ("B6", 4),
    ("B7", 7),
    ("B8", 7),
    ("B9", 6),
    ("B10", 4),
    ("B11", 8),
    ("B12", 5),
    ("B13", 7),
    ("B14", 9),
    ("B15", 1),
    ("B16", 8),
    ("B17", 9),
    ("B18", 4),
    ("B19", 5),
    ("B20", 14),
    ("X", 23),
    ("C", 30),
];

/// Why something may be absent; `ARCHITECTURE.md` explains each.
const REASONS: [&str; 10] = [
    "medium",
    "scsi",
    "geometry",
    "windows",
    "replay",
    "whitelist",
    "old-forms",
    "other-formats",
    "dynamic-children",
    "other-issue",
];

const TABLE: &str = include_str!("capabilities.md");
const HAZARDS: &str = include_str!("hazards.md");
const ARCHITECTURE: &str = include_str!("../ARCHITECTURE.md");

/// A row of the table.
struct Row {
    numbers: Vec<&'static str>,
    shown_by: &'static str,
}

fn rows() -> Vec<Row> {
    let lines = TABLE.lines().filter(|line| line.starts_with('|'));
    let rows = lines.skip(2).map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [numbers, what, place, shown_by] = cells[..] else {
            panic!("four cells: {line}");
        };
        assert!(!what.is_empty() && !place.is_empty(), "{line}");
        Row {
            numbers: numbers.split_whitespace().collect(),
            shown_by,
        }
    });
    rows.collect()
}

/// The names of all tests of the workspace.
fn tests() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for package in ["backend", "blockcore", "formats", "tests"] {
        tests_below(&top.join(package), &mut found);
    }
    found
}

fn tests_below(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                match line.strip_prefix("fn ") {
                    Some(rest) if is_test => {
                        found.extend(rest.split('(').next().map(str::to_owned));
                        is_test = false;
                    }
                    // Other attributes, and comments, may be between.
                    _ => is_test = line == "#[test]" || (is_test && line.starts_with(['#', '/'])),
                }
            }
        }
    }
}

#[test]
fn every_capability_has_its_row() {
    let mut missing: BTreeSet<String> = SECTIONS
        .iter()
        .flat_map(|(section, rows)| (1..=*rows).map(move |row| format!("{section}.{row}")))
        .collect();
    let all = missing.clone();
    for row in rows() {
        for number in row.numbers {
            assert!(all.contains(number), "there is no {number}");
            missing.remove(number);
        }
    }
    assert!(missing.is_empty(), "without a row: {missing:?}");
}

#[test]
fn every_capability_is_shown_by_a_test_that_exists_or_is_absent_for_a_known_reason() {
    let tests = tests();
    let mut wrong = Vec::new();
    let mut open = BTreeMap::new();
    for row in rows() {
        for shown in row.shown_by.split(", ") {
            if let Some(reason) = shown.strip_prefix("absent: ") {
                if !REASONS.contains(&reason) {
                    wrong.push(format!(
                        "{:?}: no reason to be absent: {reason}",
                        row.numbers
                    ));
                }
            } else if let Some(reason) = shown.strip_prefix("open: ") {
                open.insert(row.numbers.join(" "), reason);
            } else if let Some(file) = shown.strip_prefix("doc ") {
                let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
                if !top.join(file).is_file() {
                    wrong.push(format!("there is no {file}"));
                }
            } else if !tests.contains(shown) {
                wrong.push(format!("{:?}: there is no test {shown}", row.numbers));
            }
        }
    }
    for (numbers, reason) in &open {
        eprintln!("open: {numbers}: {reason}");
    }
    eprintln!("{} rows are open", open.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_is_absent_is_explained() {
    for reason in REASONS {
        let entry = format!("- `{reason}`:");
        assert!(ARCHITECTURE.contains(&entry), "{reason}");
    }
}

#[test]
fn every_hazard_has_a_row_with_a_test_that_exists() {
    let tests = tests();
    let mut numbers = Vec::new();
    for line in HAZARDS.lines().filter(|line| line.starts_with('|')).skip(2) {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [number, _, shown_by] = cells[..] else {
            panic!("three cells: {line}");
        };
        numbers.push(number);
        // Why it could not happen may come first.
        let shown_by = match shown_by.strip_prefix("never: ") {
            Some(why) => why.split_once("; ").expect("why, and a test").1,
            None => shown_by,
        };
        for test in shown_by.split(", ") {
            assert!(tests.contains(test), "{number}: there is no test {test}");
        }
    }
    let states = (1..=14).map(|number| format!("T{number}"));
    let mistakes = (1..=27).map(|number| format!("H{number}"));
    assert!(numbers.iter().copied().eq(states.chain(mistakes)));
}
