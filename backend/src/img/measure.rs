//! `stonework img measure`: how much space an image would need.

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::{DriverType, Measured};
use blockcore::options::Options;
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
    /// The copy of this snapshot in the image: its identifier or name, or snapshot.id=...,snapshot.name=...
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

pub(super) async fn run(program: Rc<Program>, args: MeasureArgs) -> Result<u8, Failure> {
    let format = program.format(&args.target_format)?;
    if wants_help(&args.options) {
        program.list_options(format)?;
        return Ok(0);
    }
    let mut options = program.creation_options(format, &args.options)?;
    if args.snapshot.is_some() && args.filename.is_none() {
        return Err(Error::invalid("a snapshot (-l) is in an image, and none is named").into());
    }
    let measured = match (&args.filename, args.size) {
        (None, Some(bytes)) => {
            let bytes = bytes.next_multiple_of(SECTOR_BYTES);
            options.set("size", bytes.to_string());
            program.measure(format, options, None, bytes).await?
        }
        (Some(filename), None) => {
            let how = How {
                force_share: args.force_share,
                ..How::reading(&args.format, Probing::Allowed)?
            };
            let image = match &args.snapshot {
                None => program.open(filename, &how).await?,
                Some(snapshot) => program.open_snapshot(filename, &how, snapshot).await?,
            };
            let bytes = image.bytes().next_multiple_of(SECTOR_BYTES);
            options.set("size", bytes.to_string());
            let node = image.look(|node| node.name().to_owned());
            let measured = program.measure(format, options, Some(&node), bytes).await?;
            image.close().await?;
            measured
        }
        (None, None) => return Err(Error::invalid("either --size or an image is needed").into()),
        (Some(_), Some(_)) => {
            return Err(Error::invalid("--size and an image cannot be given together").into());
        }
    };
    print(&program, args.output, &measured)?;
    Ok(0)
}

impl Program {
    /// How large an image of a disk of so many bytes becomes.
    async fn measure(
        &self,
        format: &DriverType,
        options: Options,
        node: Option<&str>,
        bytes: u64,
    ) -> Result<Measured, Error> {
        if format.measure.is_none() && is_plain(format) {
            return Ok(Measured {
                required_bytes: bytes,
                fully_allocated_bytes: bytes,
                bitmaps_bytes: None,
            });
        }
        self.control.measure(format.name, options, node).await
    }
}

fn print(program: &Program, format: OutputFormat, measured: &Measured) -> Result<(), Error> {
    let (required, full) = (measured.required_bytes, measured.fully_allocated_bytes);
    if format == OutputFormat::Human {
        program.say(format!("required size: {required}"))?;
        program.say(format!("fully allocated size: {full}"))?;
        return match measured.bitmaps_bytes {
            Some(bytes) => program.say(format!("bitmaps size: {bytes}")),
            None => Ok(()),
        };
    }
    let mut value = json!({"required": required, "fully-allocated": full});
    if let Some(bytes) = measured.bitmaps_bytes {
        value["bitmaps"] = json!(bytes);
    }
    program.say(output::json(&value))
}
