//! `stonework img compare`: whether two images hold the same.

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::StatusFlags;
use blockcore::io::buffer::Segments;
use clap::Args;
use futures_util::future;

use super::cli::{FormatArgs, ObjectArgs, parse_cache};
use super::open::{How, Image, Probing};
use super::progress::Progress;
use super::walk::{self, Extent};
use super::{Failure, Program, WithStatus};
use crate::cli::CacheMode;

/// The images differ.
const DIFFERENT: u8 = 1;
/// An image cannot be opened.
const NOT_OPENED: u8 = 2;
/// What ranges are cannot be found out.
const NO_STATUS: u8 = 3;
/// Data cannot be read.
const NOT_READ: u8 = 4;

/// How much is compared at once.
const CHUNK_BYTES: u64 = 2 << 20;

/// `stonework img compare`.
#[derive(Args, Debug)]
pub struct CompareArgs {
    /// Format of the first image
    #[arg(
        short = 'f',
        long,
        value_name = "FORMAT",
        conflicts_with = "image_opts"
    )]
    pub a_format: Option<String>,
    /// Format of the second image
    #[arg(
        short = 'F',
        long,
        value_name = "FORMAT",
        conflicts_with = "image_opts"
    )]
    pub b_format: Option<String>,
    /// The images are given as options: driver=qcow2,file.filename=disk.qcow2
    #[arg(long)]
    pub image_opts: bool,
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub objects: ObjectArgs,
    /// Lengths and what is allocated have to be the same, too
    #[arg(short, long)]
    pub strict: bool,
    /// How the images are read
    #[arg(short = 'T', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub cache: CacheMode,
    /// Show how far it is
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Look at them although somebody may be changing them
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// The first image
    pub filename1: String,
    /// The second image
    pub filename2: String,
}

/// What two images turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Identical,
    Different(String),
}

pub(super) async fn run(program: Rc<Program>, args: CompareArgs) -> Result<u8, Failure> {
    let how = |format: &Option<String>| -> Result<How, Error> {
        let format = FormatArgs {
            format: format.clone(),
            image_opts: args.image_opts,
            objects: args.objects.clone(),
        };
        Ok(How {
            cache: args.cache,
            force_share: args.force_share,
            ..How::reading(&format, Probing::Allowed)?
        })
    };
    let (how_one, how_other) = (how(&args.a_format)?, how(&args.b_format)?);
    let one = program.open(&args.filename1, &how_one).await;
    let one = one.with_status(NOT_OPENED)?;
    let other = program.open(&args.filename2, &how_other).await;
    let other = other.with_status(NOT_OPENED)?;
    let say = |text: &str| match args.quiet {
        true => Ok(()),
        false => program.say(text),
    };
    if args.strict && one.bytes() != other.bytes() {
        say("Strict mode: Image size mismatch!")?;
        return Ok(DIFFERENT);
    }
    let progress = Progress::new(&program.output, args.progress && !args.quiet);
    let mut verdict = compare_common(&one, &other, args.strict, &progress).await?;
    if verdict == Verdict::Identical && one.bytes() != other.bytes() {
        say("Warning: Image size mismatch!")?;
        verdict = compare_rest(&one, &other, &progress).await?;
    }
    progress.finish();
    drop(progress);
    let status = match verdict {
        Verdict::Identical => {
            say("Images are identical.")?;
            0
        }
        Verdict::Different(how) => {
            say(&how)?;
            DIFFERENT
        }
    };
    one.close().await?;
    other.close().await?;
    Ok(status)
}

fn different(offset: u64) -> Verdict {
    Verdict::Different(format!("Content mismatch at offset {offset}!"))
}

/// Compares as far as both go.
async fn compare_common(
    one: &Image,
    other: &Image,
    strict: bool,
    progress: &Progress,
) -> Result<Verdict, Failure> {
    let common = one.bytes().min(other.bytes());
    let whole = one.bytes().max(other.bytes());
    let buffers = [0, 1].map(|_| Segments::allocate(CHUNK_BYTES as usize, 4096));
    let mut offset = 0;
    while offset < common {
        progress.at(offset, whole);
        let left = common - offset;
        let first = one.extent(offset, left).await.with_status(NO_STATUS)?;
        let second = other.extent(offset, first.bytes).await;
        let second = second.with_status(NO_STATUS)?;
        if strict && kind(&first) != kind(&second) {
            return Ok(Verdict::Different(format!(
                "Strict mode: Offset {offset} block status mismatch!"
            )));
        }
        if first.is_zero() && second.is_zero() {
            offset += second.bytes;
            continue;
        }
        let bytes = second.bytes.min(CHUNK_BYTES);
        let [of_one, of_other] = buffers.each_ref().map(|buffer| buffer.slice(0, bytes));
        let reads = [(one, &first, &of_one), (other, &second, &of_other)];
        let reads = reads.map(|(image, extent, into)| read(image, extent, offset, into));
        future::try_join_all(reads).await?;
        if let Some(at) = walk::first_difference(&of_one.to_vec(), &of_other.to_vec()) {
            return Ok(different(offset + at));
        }
        offset += bytes;
    }
    Ok(Verdict::Identical)
}

/// Looks whether what the longer one has more is nothing.
async fn compare_rest(one: &Image, other: &Image, progress: &Progress) -> Result<Verdict, Failure> {
    let (longer, mut offset) = match one.bytes() > other.bytes() {
        true => (one, other.bytes()),
        false => (other, one.bytes()),
    };
    let whole = longer.bytes();
    let buffer = Segments::allocate(CHUNK_BYTES as usize, 4096);
    while offset < whole {
        progress.at(offset, whole);
        let extent = longer.extent(offset, whole - offset).await;
        let extent = extent.with_status(NO_STATUS)?;
        if !extent.is_allocated() || extent.is_zero() {
            offset += extent.bytes;
            continue;
        }
        let bytes = extent.bytes.min(CHUNK_BYTES);
        let part = buffer.slice(0, bytes);
        read(longer, &extent, offset, &part).await?;
        let zeroes = vec![0; bytes as usize];
        if let Some(at) = walk::first_difference(&part.to_vec(), &zeroes) {
            return Ok(different(offset + at));
        }
        offset += bytes;
    }
    Ok(Verdict::Identical)
}

/// Reads what is in a range, if a look at it has not said that.
async fn read(image: &Image, extent: &Extent, offset: u64, into: &Segments) -> Result<(), Failure> {
    if extent.is_zero() {
        into.fill(0);
        return Ok(());
    }
    image.read(offset, into.clone()).await.with_status(NOT_READ)
}

/// What has to be the same in strict mode.
fn kind(extent: &Extent) -> StatusFlags {
    let kept = StatusFlags::ALLOCATED | StatusFlags::DATA | StatusFlags::ZERO;
    extent.status.flags & kept
}
