//! `stonework img convert`: copies images to a new one, of another format if wanted.

mod bitmaps;
mod copy;

use std::rc::Rc;

use blockcore::Error;
use clap::Args;

use self::copy::{Copy, Plan, Zeroes};
use super::cli::{FormatArgs, ObjectArgs, parse_bytes, parse_cache};
use super::create::{Creation, DATA_FILE, check_backing, is_plain, take_backing, wants_help};
use super::open::{How, Image, Probing};
use super::progress::Progress;
use super::walk::SECTOR_BYTES;
use super::{Failure, Program};
use crate::cli::CacheMode;

/// Longest run of zeroes that `-S` may ask for.
const MAX_SPARSE_BYTES: u64 = 16 << 20;

/// `stonework img convert`.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Format of the images that are copied
    #[arg(
        short = 'f',
        long,
        value_name = "FORMAT",
        conflicts_with = "source_image_opts"
    )]
    pub source_format: Option<String>,
    /// The images that are copied are given as options: driver=qcow2,file.filename=disk.qcow2
    #[arg(long, alias = "image-opts")]
    pub source_image_opts: bool,
    /// Copy this snapshot in the image: its identifier or name, or snapshot.id=...,snapshot.name=...
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub source_snapshot: Option<String>,
    /// How the images are read
    #[arg(short = 'T', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub source_cache: CacheMode,
    /// Format of the new image
    #[arg(
        short = 'O',
        long,
        value_name = "FORMAT",
        default_value = "raw",
        conflicts_with = "target_image_opts"
    )]
    pub target_format: String,
    /// The new image is given as options; needs -n
    #[arg(long, requires = "no_create")]
    pub target_image_opts: bool,
    /// Options of the new image: key=value,...; 'help' lists them
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    pub target_options: Vec<String>,
    /// How the new image is written
    #[arg(short = 't', long, value_name = "MODE", value_parser = parse_cache, default_value = "unsafe")]
    pub target_cache: CacheMode,
    /// Write compressed data
    #[arg(short, long)]
    pub compress: bool,
    /// Hold only what differs from this image, which has what the source's backing image has
    #[arg(short = 'B', long, value_name = "IMAGE")]
    pub backing: Option<String>,
    /// Format of the backing image
    #[arg(short = 'F', long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    /// Copy into an image that is there
    #[arg(short = 'n', long)]
    pub no_create: bool,
    /// The image that is there reads as zeroes; needs -n
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,
    /// Leave out so many zeroes in a row, a multiple of 512; 0 to write everything
    #[arg(short = 'S', long, value_name = "BYTES", value_parser = parse_sparse)]
    pub sparse_size: Option<u64>,
    /// Copy persistent bitmaps, too
    #[arg(long)]
    pub bitmaps: bool,
    /// Leave out bitmaps that mean nothing
    #[arg(long, requires = "bitmaps")]
    pub skip_broken_bitmaps: bool,
    /// Read the images although somebody may be changing them
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Bytes per second, at most
    #[arg(short, long, value_parser = parse_bytes)]
    pub rate: Option<u64>,
    /// Requests at a time
    #[arg(short = 'm', long, value_name = "REQUESTS", default_value_t = 8,
          value_parser = clap::value_parser!(u8).range(1..=16))]
    pub parallel: u8,
    /// Have the host copy where it can
    #[arg(short = 'C', long, conflicts_with_all = ["compress", "sparse_size"])]
    pub copy_range_offloading: bool,
    /// Take what cannot be read for zeroes
    #[arg(long)]
    pub salvage: bool,
    /// Write in any order
    #[arg(short = 'W', long, conflicts_with = "compress")]
    pub oob_writes: bool,
    /// Show how far it is
    #[arg(short, long)]
    pub progress: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub objects: ObjectArgs,
    /// The images to copy, one after the other, and the new one
    #[arg(value_name = "IMAGE", required_unless_present = "target_options")]
    pub filenames: Vec<String>,
}

fn parse_sparse(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    match bytes.is_multiple_of(SECTOR_BYTES) && bytes <= MAX_SPARSE_BYTES {
        true => Ok(bytes),
        false => Err(format!(
            "a run of zeroes is a multiple of {SECTOR_BYTES} bytes, at most {MAX_SPARSE_BYTES}"
        )),
    }
}

pub(super) async fn run(program: Rc<Program>, mut args: ConvertArgs) -> Result<u8, Failure> {
    args.objects.check()?;
    let target_name = args.filenames.pop().unwrap_or_default();
    let format = program.creatable(&args.target_format)?;
    if wants_help(&args.target_options) {
        program.list_options(format)?;
        return Ok(0);
    }
    if args.filenames.is_empty() {
        return Err(Error::invalid("convert needs an image to copy and a new one").into());
    }
    if args.compress && is_plain(format) && !args.no_create {
        return Err(not_compressible(format.name).into());
    }
    let sources = open_sources(&program, &args).await?;
    let bitmaps = match args.bitmaps {
        true => bitmaps::to_copy(&program, &sources, args.skip_broken_bitmaps)?,
        false => Vec::new(),
    };
    let bytes: u64 = sources.iter().map(Image::bytes).sum();

    let mut options = program.creation_options(format, &args.target_options)?;
    // Said or not, it is as long as what is copied.
    options.take("size");
    let data_file = options.take(DATA_FILE);
    let backing = take_backing(
        &mut options,
        args.backing.take(),
        args.backing_format.take(),
    )?;
    let has_backing = backing.is_some();
    if let Some(backing) = &backing {
        check_backing(format, &target_name, backing)?;
        if args.target_is_zero {
            return Err(Error::invalid(
                "an image with a backing image does not read as zeroes (--target-is-zero)",
            )
            .into());
        }
        if sources.len() > 1 {
            return Err(Error::invalid(
                "several images cannot be copied to one with a backing image",
            )
            .into());
        }
    }
    if !args.no_create {
        let creation = Creation {
            name: target_name.clone(),
            format,
            options,
            bytes,
            backing,
            data_file,
        };
        program.create(&creation).await?;
    }
    let how = How {
        format: (!args.target_image_opts).then(|| args.target_format.clone()),
        image_opts: args.target_image_opts,
        probing: Probing::Refused("-O"),
        write: true,
        resize: false,
        cache: args.target_cache,
        force_share: false,
        backing: true,
    };
    let target = program.open(&target_name, &how).await?;
    if target.bytes() < bytes {
        return Err(Error::new(
            blockcore::ErrorKind::NoSpace,
            format!(
                "'{target_name}' has {} bytes, which is less than the {bytes} that are copied",
                target.bytes()
            ),
        )
        .into());
    }
    let plan = args.plan(&program, &target, has_backing)?;
    let progress = Progress::new(&program.output, args.progress && !args.quiet);
    let copy = Copy::new(&program, sources, target, plan);
    copy.run(&progress).await?;
    progress.finish();
    drop(progress);
    let (sources, target) = copy.into_images();
    if args.bitmaps {
        bitmaps::copy(&program, &sources[0], &target, bitmaps).await?;
    }
    target.flush().await?;
    target.close().await?;
    for source in sources {
        source.close().await?;
    }
    Ok(0)
}

fn not_compressible(format: &str) -> Error {
    Error::unsupported(format!("images of format '{format}' cannot be compressed"))
}

async fn open_sources(program: &Program, args: &ConvertArgs) -> Result<Vec<Image>, Error> {
    let format = FormatArgs {
        format: args.source_format.clone(),
        image_opts: args.source_image_opts,
        objects: args.objects.clone(),
    };
    let how = How {
        cache: args.source_cache,
        force_share: args.force_share,
        ..How::reading(&format, Probing::Refused("-f"))?
    };
    let mut sources = Vec::new();
    if let Some(snapshot) = &args.source_snapshot {
        let [name] = &args.filenames[..] else {
            return Err(Error::invalid(
                "a snapshot (-l) is copied from one image, and not from several",
            ));
        };
        sources.push(program.open_snapshot(name, &how, snapshot).await?);
        return Ok(sources);
    }
    for name in &args.filenames {
        sources.push(program.open(name, &how).await?);
    }
    Ok(sources)
}

impl ConvertArgs {
    /// How to copy to a target that is open.
    fn plan(&self, program: &Program, target: &Image, has_backing: bool) -> Result<Plan, Error> {
        let cluster_bytes = target.cluster_bytes();
        if self.compress {
            let can = target.can_compress();
            if !can || cluster_bytes == 0 {
                return Err(not_compressible(target.format()));
            }
        }
        let node = target.node;
        let reads_as_zeroes = program.control.read(|graph| graph.has_zero_init(node));
        let is_zero = self.target_is_zero || (!self.no_create && reads_as_zeroes);
        let zeroes = match (is_zero, has_backing) {
            (true, false) => Zeroes::Leave,
            _ => Zeroes::Write,
        };
        let backing_bytes = has_backing.then(|| {
            program.control.read(|graph| {
                let below = graph.backing_chain_next(node);
                let below = below.and_then(|id| graph.node_by_id(id));
                below.map_or(0, |node| node.bytes())
            })
        });
        Ok(Plan {
            zeroes,
            sparse_bytes: self.sparse_size.unwrap_or(copy::DEFAULT_SPARSE_BYTES),
            cluster_bytes: self.compress.then_some(cluster_bytes),
            backing_bytes,
            in_order: !self.oob_writes,
            parallel: usize::from(self.parallel),
            rate: self.rate.filter(|rate| *rate > 0),
            by_host: self.copy_range_offloading,
            salvage: self.salvage,
            quiet: self.quiet,
        })
    }
}
