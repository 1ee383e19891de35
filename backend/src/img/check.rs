//! `stonework img check`: checks an image's metadata, and repairs it.

use std::rc::Rc;

use blockcore::Error;
use clap::{Args, ValueEnum};

use super::cli::{FormatArgs, OutputFormat, parse_cache};
use super::open::{How, Probing};
use super::{Failure, Program};
use crate::cli::CacheMode;

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
    let image = program.open(&args.filename, &how).await?;
    Err(Failure {
        status: UNSUPPORTED,
        error: Error::unsupported(format!(
            "images of format '{}' cannot be checked",
            image.format()
        )),
    })
}
