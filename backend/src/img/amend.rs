//! `stonework img amend`: changes options of an image's format.

use std::rc::Rc;

use blockcore::Error;
use clap::Args;

use super::cli::{FormatArgs, parse_cache};
use super::open::How;
use super::{Failure, Program};
use crate::cli::CacheMode;

/// `stonework img amend`.
#[derive(Args, Debug)]
pub struct AmendArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Show how far it is
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// How the image is written
    #[arg(short = 't', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub cache: CacheMode,
    /// Do what may lose data, too
    #[arg(long)]
    pub force: bool,
    /// What is to be: key=value,...
    #[arg(short, long, value_name = "OPTIONS", required = true)]
    pub options: Vec<String>,
    /// The image
    pub filename: String,
}

pub(super) async fn run(program: Rc<Program>, args: AmendArgs) -> Result<u8, Failure> {
    let how = How {
        cache: args.cache,
        ..How::writing(&args.format)?
    };
    let image = program.open(&args.filename, &how).await?;
    Err(Error::unsupported(format!(
        "options of images of format '{}' cannot be changed",
        image.format()
    ))
    .into())
}
