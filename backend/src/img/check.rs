//! `stonework img check`: checks an image's metadata, and repairs it.

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::{CheckReport, Fix};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::cli::{FormatArgs, OutputFormat, parse_cache};
use super::create::is_plain;
use super::open::{How, Probing};
use super::{Failure, Program, output};
use crate::cli::CacheMode;

/// Something could not be looked at.
const INCOMPLETE: u8 = 1;
/// The image contradicts itself.
const CORRUPT: u8 = 2;
/// Space is in use by nobody.
const LEAKS: u8 = 3;
/// Images of the format cannot be checked.
const UNSUPPORTED: u8 = 63;

/// `stonework img check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Say only what is wrong
    #[arg(short, long)]
    pub quiet: bool,
    /// How the image is read
    #[arg(short = 'T', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub cache: CacheMode,
    /// How to print it
    #[arg(long, value_enum, default_value_t)]
    pub output: OutputFormat,
    /// Repair it: what is wrongly in use, or everything
    #[arg(short, long, value_enum)]
    pub repair: Option<Repair>,
    /// Look at it although somebody may be changing it
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
    /// The image
    pub filename: String,
}

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Repair {
    /// Space that is in use by nobody
    Leaks,
    /// Everything, guessing where need be
    All,
}

impl Repair {
    fn fix(repair: Option<Self>) -> Fix {
        match repair {
            None => Fix::None,
            Some(Self::Leaks) => Fix::Leaks,
            Some(Self::All) => Fix::All,
        }
    }
}

pub(super) async fn run(program: Rc<Program>, args: CheckArgs) -> Result<u8, Failure> {
    let probing = match args.repair {
        Some(_) => Probing::Refused("-f"),
        None => Probing::Allowed,
    };
    let how = How {
        write: args.repair.is_some(),
        cache: args.cache,
        force_share: args.force_share,
        backing: false,
        ..How::reading(&args.format, probing)?
    };
    let options = program.node_options(&args.filename, &how).await?;
    let format = program.kind(options.get("driver").unwrap_or(""))?;
    if is_plain(format) {
        // That it is there has to be known all the same.
        program.open_options(&args.filename, options, &how).await?;
        return Err(Failure {
            status: UNSUPPORTED,
            error: Error::unsupported(format!(
                "images of format '{}' cannot be checked",
                format.name
            )),
        });
    }
    let fix = Repair::fix(args.repair);
    let mut report = program.control.check_image(options.clone(), fix).await?;
    let json = args.output == OutputFormat::Json;
    let (corruptions, leaks) = (report.corruptions_fixed, report.leaks_fixed);
    if corruptions > 0 || leaks > 0 {
        if !json && !args.quiet {
            program.say(format!(
                "The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    \
                 {corruptions} corruptions\n\nDouble checking the fixed image now..."
            ))?;
        }
        report = program.control.check_image(options, Fix::None).await?;
        (report.corruptions_fixed, report.leaks_fixed) = (corruptions, leaks);
    }
    if json {
        let value = to_json(&report, &args.filename, format.name);
        program.say(output::json(&value))?;
    } else if !args.quiet {
        program.say(to_text(&report))?;
    }
    Ok(status(&report))
}

/// The exit status that says what was found.
fn status(report: &CheckReport) -> u8 {
    match report {
        CheckReport { check_errors, .. } if *check_errors > 0 => INCOMPLETE,
        CheckReport { corruptions, .. } if *corruptions > 0 => CORRUPT,
        CheckReport { leaks, .. } if *leaks > 0 => LEAKS,
        _ => 0,
    }
}

fn to_json(report: &CheckReport, filename: &str, format: &str) -> Value {
    let mut value = json!({
        "filename": filename,
        "format": format,
        "check-errors": report.check_errors,
    });
    for (name, number) in [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if number > 0 {
            value[name] = json!(number);
        }
    }
    value
}

fn to_text(report: &CheckReport) -> String {
    let mut lines = Vec::new();
    if report.is_clean() {
        lines.push("No errors were found on the image.".to_owned());
    }
    if report.corruptions > 0 {
        lines.push(format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        lines.push(format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.",
            report.leaks
        ));
    }
    if report.check_errors > 0 {
        lines.push(format!(
            "\n{} internal errors have occurred during the check.",
            report.check_errors
        ));
    }
    let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        lines.push(format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        ));
    }
    if report.image_end_offset > 0 {
        lines.push(format!("Image end offset: {}", report.image_end_offset));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worst_decides_the_exit_status() {
        let report = |check_errors, corruptions, leaks| CheckReport {
            check_errors,
            corruptions,
            leaks,
            ..CheckReport::default()
        };
        for ((errors, corruptions, leaks), expected) in [
            ((0, 0, 0), 0),
            ((1, 1, 1), 1),
            ((0, 1, 1), 2),
            ((0, 0, 1), 3),
        ] {
            assert_eq!(status(&report(errors, corruptions, leaks)), expected);
        }
    }

    #[test]
    fn shares_of_clusters_are_of_those_that_are_allocated() {
        let report = CheckReport {
            total_clusters: 16,
            allocated_clusters: 4,
            fragmented_clusters: 1,
            image_end_offset: 393_216,
            ..CheckReport::default()
        };
        assert_eq!(
            to_text(&report),
            "No errors were found on the image.\n\
             4/16 = 25.00% allocated, 25.00% fragmented, 0.00% compressed clusters\n\
             Image end offset: 393216"
        );
        let value = to_json(&report, "a", "qcow2");
        assert_eq!(value.get("leaks"), None);
        assert_eq!(value["allocated-clusters"], 4);
    }
}
