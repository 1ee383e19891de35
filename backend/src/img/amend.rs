//! `stonework img amend`: changes options of an image's format.

use std::rc::Rc;

use blockcore::Error;
use clap::Args;

use super::cli::{FormatArgs, parse_cache};
use super::create::wants_help;
use super::open::How;
use super::progress::Progress;
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
    /// Do what may lose data, too: a shorter disk
    #[arg(long)]
    pub force: bool,
    /// What is to be: key=value,...
    #[arg(short, long, value_name = "OPTIONS", required = true)]
    pub options: Vec<String>,
    /// The image
    pub filename: Option<String>,
}

pub(super) async fn run(program: Rc<Program>, args: AmendArgs) -> Result<u8, Failure> {
    if wants_help(&args.options) {
        let format = program.format(args.format.format.as_deref().unwrap_or("raw"))?;
        program.list_amend_options(format)?;
        return Ok(0);
    }
    let Some(filename) = &args.filename else {
        return Err(Error::invalid("the image to change is not named").into());
    };
    let how = How {
        cache: args.cache,
        // The length may change, also that of an external data file.
        resize: true,
        ..How::writing(&args.format)?
    };
    let image = program.open(filename, &how).await?;
    let (node, format) = image.look(|node| (node.name().to_owned(), node.driver_type()));
    let options = program.amend_options(format, &args.options)?;
    let progress = Progress::new(&program.output, args.progress && !args.quiet);
    program.control.amend(&node, options, args.force).await?;
    progress.finish();
    drop(progress);
    image.close().await?;
    Ok(0)
}
