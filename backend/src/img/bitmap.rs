//! `stonework img bitmap`: changes persistent bitmaps in an image.

use std::rc::Rc;

use blockcore::Error;
use clap::Args;

use super::cli::{FormatArgs, parse_bytes};
use super::open::How;
use super::{Failure, Program};

/// `stonework img bitmap`.
#[derive(Args, Debug)]
#[group(id = "action", multiple = true, required = true)]
pub struct BitmapArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Make the bitmap
    #[arg(long)]
    pub add: bool,
    /// Remove it
    #[arg(long)]
    pub remove: bool,
    /// Forget what it has marked
    #[arg(long)]
    pub clear: bool,
    /// Have it mark what is written
    #[arg(long, conflicts_with = "disable")]
    pub enable: bool,
    /// Have it mark no more
    #[arg(long)]
    pub disable: bool,
    /// Mark what this bitmap has marked, too
    #[arg(long, value_name = "BITMAP")]
    pub merge: Vec<String>,
    /// Bytes that one mark stands for
    #[arg(short, long, value_parser = parse_bytes, requires = "add")]
    pub granularity: Option<u64>,
    /// The image in which the bitmaps to merge are
    #[arg(short = 'b', long, value_name = "IMAGE", requires = "merge")]
    pub source_file: Option<String>,
    /// Format of that image
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "source_file")]
    pub source_format: Option<String>,
    /// The image
    pub filename: String,
    /// The bitmap
    pub bitmap: String,
}

pub(super) async fn run(program: Rc<Program>, args: BitmapArgs) -> Result<u8, Failure> {
    let image = program
        .open(&args.filename, &How::writing(&args.format)?)
        .await?;
    Err(Error::unsupported(format!(
        "images of format '{}' hold no bitmaps in this version of stonework",
        image.format()
    ))
    .into())
}
