//! `stonework img commit`: writes an image's changes to its backing image.

use std::rc::Rc;
use std::time::Duration;

use blockcore::Error;
use blockcore::driver::{BackingName, Preallocation, ZeroFlags};
use blockcore::filename::full_backing_name;
use blockcore::graph::RootSpec;
use blockcore::graph::permission::Permissions;
use blockcore::io::buffer::Segments;
use clap::Args;

use super::cli::{FormatArgs, parse_bytes, parse_cache};
use super::open::{How, Image, Probing};
use super::progress::Progress;
use super::{Failure, Program};
use crate::cli::CacheMode;

/// How much is copied at once.
const CHUNK_BYTES: u64 = 2 << 20;
/// Longest range that is zeroed at once.
const MAX_ZERO_BYTES: u64 = 1 << 30;
/// Longest chain of images that is followed.
const MAX_CHAIN: usize = 200;

/// `stonework img commit`.
#[derive(Args, Debug)]
pub struct CommitArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// Show how far it is
    #[arg(short, long)]
    pub progress: bool,
    /// How the images are read and written
    #[arg(short = 't', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub cache: CacheMode,
    /// Leave the image as it is, instead of emptying it
    #[arg(short, long)]
    pub drop: bool,
    /// The image of the chain to write to, instead of the next one; those between mean nothing any more
    #[arg(short, long, value_name = "IMAGE")]
    pub base: Option<String>,
    /// Bytes per second, at most
    #[arg(short, long, value_parser = parse_bytes)]
    pub rate: Option<u64>,
    /// The image
    pub filename: String,
}

/// A layer of the chain, closed.
struct Layer {
    name: String,
    format: &'static str,
}

pub(super) async fn run(program: Rc<Program>, args: CommitArgs) -> Result<u8, Failure> {
    let how = How {
        cache: args.cache,
        ..How::writing(&args.format)?
    };
    if how.image_opts {
        return Err(Error::unsupported(
            "commit takes an image's name, not its options: its chain is opened anew for writing",
        )
        .into());
    }
    let layers = chain(&program, &args, &how).await?;
    let chain = open_chain(&program, &layers, &how).await?;
    let progress = Progress::new(&program.output, args.progress && !args.quiet);
    chain
        .commit(&program, args.rate.filter(|rate| *rate > 0), &progress)
        .await?;
    progress.finish();
    drop(progress);
    let empty = !args.drop && args.base.is_none();
    if empty {
        let top = chain.top.look(|node| node.name().to_owned());
        program.control.make_empty(&top).await?;
    }
    if !args.quiet {
        program.say("Image committed.")?;
    }
    Ok(0)
}

/// The layers from the image down to the one that is written to.
async fn chain(program: &Program, args: &CommitArgs, how: &How) -> Result<Vec<Layer>, Error> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = args.filename.clone();
    let mut look = How {
        write: false,
        backing: false,
        ..how.clone()
    };
    loop {
        let image = program.open(&next, &look).await?;
        let backing = image.look(|node| node.backing_in_header().cloned());
        layers.push(Layer {
            name: next.clone(),
            format: image.format(),
        });
        image.close().await?;
        let is_base = layers.len() > 1
            && match &args.base {
                None => true,
                Some(base) => is_same(base, &next, &layers[layers.len() - 2].name),
            };
        if is_base {
            return Ok(layers);
        }
        let Some(BackingName { name, format }) = backing else {
            return Err(match &args.base {
                Some(base) if layers.len() > 1 => Error::invalid(format!(
                    "'{base}' is not in the chain of '{}'",
                    args.filename
                )),
                _ => Error::invalid(format!("'{}' has no backing image", args.filename)),
            });
        };
        if layers.len() == MAX_CHAIN {
            return Err(Error::invalid(format!(
                "the chain of '{}' is longer than {MAX_CHAIN} images, or a loop",
                args.filename
            )));
        }
        let Some(format) = format else {
            return Err(Error::invalid(format!(
                "the format of backing image '{name}' is not recorded in '{next}', and not guessed: \
                 record it with 'stonework img rebase -u -f {} -b {name} -F FORMAT {next}'",
                layers[layers.len() - 1].format
            )));
        };
        next = full_backing_name(&next, &name)?.unwrap_or_default();
        look.format = Some(format);
        look.probing = Probing::Refused("-F");
    }
}

/// Whether an operator's name is that of a backing image: as it is written, relative to the image above,
/// or of the same file.
fn is_same(wanted: &str, name: &str, overlay: &str) -> bool {
    let full = full_backing_name(overlay, wanted).ok().flatten();
    let canonical = |path: &str| std::fs::canonicalize(path).ok();
    let same_file = |path: &str| canonical(path).is_some_and(|path| Some(path) == canonical(name));
    wanted == name
        || full
            .as_deref()
            .is_some_and(|full| full == name || same_file(full))
}

/// A chain with its lowest layer open for writing.
struct Chain {
    top: Image,
    base: Image,
}

/// Opens the layers from below, each above the one before.
async fn open_chain(program: &Program, layers: &[Layer], how: &How) -> Result<Chain, Error> {
    let (base, above) = layers.split_last().expect("a chain has a top and a base");
    let how_base = How {
        format: Some(base.format.to_owned()),
        ..how.clone()
    };
    let options = program.node_options(&base.name, &how_base).await?;
    let mut node_name = options.get("node-name").unwrap_or("").to_owned();
    program.control.add(options).await?;
    let mut node = program
        .control
        .read(|graph| graph.node(&node_name).map(|node| node.id()))?;
    let base_node = node;
    // Nobody but we use either, and we know what we do.
    let spec = |needs| RootSpec {
        needs,
        shares: Permissions::all(),
        ..RootSpec::reader("stonework img commit")
    };
    let writer = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let base_root = program.use_node(&node_name, spec(writer)).await?;
    for (place, layer) in above.iter().enumerate().rev() {
        let how_layer = How {
            format: Some(layer.format.to_owned()),
            write: place == 0,
            ..how.clone()
        };
        let mut options = program.node_options(&layer.name, &how_layer).await?;
        options.set("backing", &*node_name);
        node_name = options.get("node-name").unwrap_or("").to_owned();
        node = program.control.add(options).await?;
    }
    let top_root = program
        .use_node(&node_name, spec(Permissions::CONSISTENT_READ))
        .await?;
    let image = |name: &str, node, root| Image::of_root(&program.control, name, node, root, how);
    Ok(Chain {
        top: image(&above[0].name, node, top_root),
        base: image(&base.name, base_node, base_root),
    })
}

impl Chain {
    /// Writes to the base what the layers above it hold.
    async fn commit(
        &self,
        program: &Program,
        rate: Option<u64>,
        progress: &Progress,
    ) -> Result<(), Error> {
        let context = program.control.context();
        let (base_name, base_bytes) = self
            .base
            .look(|node| (node.name().to_owned(), node.bytes()));
        let bytes = self.top.bytes();
        if base_bytes < bytes {
            program
                .control
                .resize(&base_name, bytes, Preallocation::Off)
                .await?;
        }
        let buffer = Segments::allocate(CHUNK_BYTES as usize, 4096);
        let mut paid = context.engine().now();
        let mut offset = 0;
        while offset < bytes {
            progress.at(offset, bytes);
            let request = self.top.request().await;
            let is_base = |io: blockcore::io::Io<'_>| io.name() == base_name;
            let left = bytes - offset;
            let status = request.io().status_above(is_base, true, offset, left).await;
            let extent = self.top.to_extent(status, offset, left)?;
            drop(request);
            let mut length = extent.bytes;
            if extent.is_allocated() && extent.is_zero() {
                length = length.min(MAX_ZERO_BYTES);
                self.base
                    .write_zeroes(offset, length, ZeroFlags::MAY_UNMAP)
                    .await?;
            } else if extent.is_allocated() {
                length = length.min(CHUNK_BYTES);
                let part = buffer.slice(0, length);
                self.top.read(offset, part.clone()).await?;
                self.base.write(offset, part).await?;
                if let Some(rate) = rate {
                    paid = paid.max(context.engine().now())
                        + Duration::from_secs_f64(length as f64 / rate as f64);
                    context.delay(paid - context.engine().now()).await;
                }
            }
            offset += length;
        }
        self.base.flush().await
    }
}
