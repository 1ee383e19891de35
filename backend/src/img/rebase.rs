//! `stonework img rebase`: gives an image another backing image.

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::BackingName;
use blockcore::filename::full_backing_name;
use blockcore::io::buffer::Segments;
use clap::Args;

use super::cli::{FormatArgs, parse_cache};
use super::open::{How, Image, Probing};
use super::progress::Progress;
use super::walk::SECTOR_BYTES;
use super::{Failure, Program};
use crate::cli::CacheMode;

/// How much is compared at once, unless clusters are longer.
const CHUNK_BYTES: u64 = 1 << 20;

/// `stonework img rebase`.
#[derive(Args, Debug)]
pub struct RebaseArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// How the image is read and written
    #[arg(short = 't', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub cache: CacheMode,
    /// How the backing images are read
    #[arg(short = 'T', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub backing_cache: CacheMode,
    /// The new backing image, relative to the image; empty for none
    #[arg(short, long, value_name = "IMAGE")]
    pub backing: String,
    /// Format of the new backing image
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Change only what the image says: what it holds is not looked at
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    /// Write compressed what has to be written
    #[arg(short, long)]
    pub compress: bool,
    /// Look at the backing images although somebody may be changing them
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Show how far it is
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    pub filename: String,
}

pub(super) async fn run(program: Rc<Program>, args: RebaseArgs) -> Result<u8, Failure> {
    let new = args.new_backing(&program)?;
    let how = How {
        cache: args.cache,
        backing: !args.backing_unsafe,
        ..How::writing(&args.format)?
    };
    let image = program.open(&args.filename, &how).await?;
    if !image.look(|node| node.driver_type().backing) {
        return Err(Error::invalid(format!(
            "images of format '{}' have no backing image",
            image.format()
        ))
        .into());
    }
    if !args.backing_unsafe {
        let below = open_backing(&program, &args, new.as_ref()).await?;
        let progress = Progress::new(&program.output, args.progress && !args.quiet);
        keep_content(&image, below.as_ref(), args.compress, &progress).await?;
        progress.finish();
        drop(progress);
        // What the image needs of the old one has to be in it before it forgets that.
        image.flush().await?;
        if let Some(below) = below {
            below.close().await?;
        }
    }
    image.control.change_backing_name(image.node, new).await?;
    image.close().await?;
    Ok(0)
}

impl RebaseArgs {
    fn new_backing(&self, program: &Program) -> Result<Option<BackingName>, Error> {
        if self.backing.is_empty() {
            return Ok(None);
        }
        let Some(format) = &self.backing_format else {
            return Err(Error::invalid(format!(
                "the format of backing image '{}' is not said, and not guessed: say it with -F, such as \
                 {}",
                self.backing,
                program.command_with("-F", "raw")
            )));
        };
        program.format(format)?;
        Ok(Some(BackingName {
            name: self.backing.clone(),
            format: Some(format.clone()),
        }))
    }
}

async fn open_backing(
    program: &Program,
    args: &RebaseArgs,
    new: Option<&BackingName>,
) -> Result<Option<Image>, Error> {
    let Some(new) = new else { return Ok(None) };
    let full = full_backing_name(&args.filename, &new.name)?.unwrap_or_default();
    let how = How {
        format: new.format.clone(),
        image_opts: false,
        probing: Probing::Refused("-F"),
        write: false,
        resize: false,
        cache: args.backing_cache,
        force_share: args.force_share,
        backing: true,
    };
    program.open(&full, &how).await.map(Some)
}

/// Writes to the image what it would otherwise get differently from its new backing image.
async fn keep_content(
    image: &Image,
    below: Option<&Image>,
    compress: bool,
    progress: &Progress,
) -> Result<(), Error> {
    let unit = image.cluster_bytes().max(SECTOR_BYTES);
    let compress = match compress {
        false => false,
        true if image.can_compress() && image.cluster_bytes() > 0 => true,
        true => {
            return Err(Error::unsupported(format!(
                "images of format '{}' cannot be compressed",
                image.format()
            )));
        }
    };
    let most = CHUNK_BYTES.next_multiple_of(unit);
    let [old, new] = [0, 1].map(|_| Segments::allocate(most as usize, 4096));
    let bytes = image.bytes();
    let mut offset = 0;
    while offset < bytes {
        progress.at(offset, bytes);
        let extent = image.top_extent(offset, bytes - offset).await?;
        let mut length = extent.bytes;
        if !extent.is_allocated() {
            // Whole clusters, so that what is written decides all of each.
            length = length.min(most);
            let [old, new] = [&old, &new].map(|buffer| buffer.slice(0, length));
            image.read(offset, old.clone()).await?;
            match below {
                Some(below) => below.read(offset, new.clone()).await?,
                None => new.fill(0),
            }
            write_differences(image, offset, (&old, &new), unit, compress).await?;
        }
        offset += length;
    }
    Ok(())
}

/// Writes the units of `old` that are not the same in `new`.
async fn write_differences(
    image: &Image,
    offset: u64,
    (old, new): (&Segments, &Segments),
    unit: u64,
    compress: bool,
) -> Result<(), Error> {
    let (old_bytes, new_bytes) = (old.to_vec(), new.to_vec());
    let units = old_bytes
        .chunks(unit as usize)
        .zip(new_bytes.chunks(unit as usize));
    // Neighbours go together, unless each is compressed.
    let mut pending: Option<(u64, u64)> = None;
    let mut at = 0;
    for (one, other) in units {
        let bytes = one.len() as u64;
        if one != other {
            match &mut pending {
                Some((_, length)) if !compress => *length += bytes,
                pending => {
                    if let Some(range) = pending.replace((at, bytes)) {
                        write_part(image, offset, old, range, compress).await?;
                    }
                }
            }
        } else if let Some(range) = pending.take() {
            write_part(image, offset, old, range, compress).await?;
        }
        at += bytes;
    }
    match pending {
        Some(range) => write_part(image, offset, old, range, compress).await,
        None => Ok(()),
    }
}

async fn write_part(
    image: &Image,
    offset: u64,
    from: &Segments,
    (begin, bytes): (u64, u64),
    compress: bool,
) -> Result<(), Error> {
    let part = from.slice(begin, bytes);
    match compress {
        true => image.write_compressed(offset + begin, part).await,
        false => image.write(offset + begin, part).await,
    }
}
