//! `stonework img measure`: how much space an image would need.

use std::rc::Rc;

use blockcore::Error;
use clap::Args;
use serde_json::json;

use super::cli::{FormatArgs, OutputFormat, parse_bytes};
use super::create::{is_plain, wants_help};
use super::open::{How, Probing};
use super::walk::SECTOR_BYTES;
use super::{Failure, Program, output};

/// `stonework img measure`.
#[derive(Args, Debug)]
pub struct MeasureArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Format of the image that would be made
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    pub target_format: String,
    /// Options of that format
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// A new image of this length in bytes
    #[arg(short, long, value_parser = parse_bytes)]
    pub size: Option<u64>,
    /// The copy of this snapshot in the image
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// How to print it
    #[arg(long, value_enum, default_value_t)]
    pub output: OutputFormat,
    /// Look at it although somebody may be changing it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// The copy of this image
    pub filename: Option<String>,
}

/// What an image needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Measure {
    /// Bytes at first.
    required: u64,
    /// Bytes when all of it has been written.
    fully_allocated: u64,
}

pub(super) async fn run(program: Rc<Program>, args: MeasureArgs) -> Result<u8, Failure> {
    let format = program.creatable(&args.target_format)?;
    if wants_help(&args.options) {
        program.list_options(format)?;
        return Ok(0);
    }
    program.creation_options(format, &args.options)?;
    if !is_plain(format) {
        return Err(Error::unsupported(format!(
            "this version of stonework cannot measure images of format '{}'",
            format.name
        ))
        .into());
    }
    if args.snapshot.is_some() {
        return Err(Error::unsupported(
            "this version of stonework cannot measure snapshots inside images",
        )
        .into());
    }
    let bytes = match (&args.filename, args.size) {
        (None, Some(bytes)) => bytes,
        (Some(filename), None) => {
            let how = How {
                force_share: args.force_share,
                ..How::reading(&args.format, Probing::Allowed)?
            };
            let image = program.open(filename, &how).await?;
            let bytes = image.bytes();
            image.close().await?;
            bytes
        }
        (None, None) => return Err(Error::invalid("either --size or an image is needed").into()),
        (Some(_), Some(_)) => {
            return Err(Error::invalid("--size and an image cannot be given together").into());
        }
    };
    let bytes = bytes.next_multiple_of(SECTOR_BYTES);
    let measure = Measure {
        required: bytes,
        fully_allocated: bytes,
    };
    print(&program, args.output, measure)?;
    Ok(0)
}

fn print(program: &Program, format: OutputFormat, measure: Measure) -> Result<(), Error> {
    match format {
        OutputFormat::Human => {
            program.say(format!("required size: {}", measure.required))?;
            program.say(format!("fully allocated size: {}", measure.fully_allocated))
        }
        OutputFormat::Json => program.say(output::json(&json!({
            "required": measure.required,
            "fully-allocated": measure.fully_allocated,
        }))),
    }
}
