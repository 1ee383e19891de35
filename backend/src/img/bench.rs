//! `stonework img bench`: how fast requests to an image are.

use std::cell::Cell;
use std::rc::Rc;

use blockcore::Error;
use blockcore::engine::EngineChoice;
use blockcore::io::buffer::Segments;
use clap::{Args, ValueEnum};
use futures_util::future;

use super::cli::{FormatArgs, parse_bytes, parse_cache};
use super::open::{How, Image, Probing};
use super::{Failure, Program};
use crate::cli::CacheMode;

/// Longest request.
const MAX_REQUEST_BYTES: u64 = i32::MAX as u64;

/// `stonework img bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// How the image is read and written
    #[arg(short = 't', long, value_name = "MODE", value_parser = parse_cache, default_value = "writeback")]
    pub cache: CacheMode,
    /// Requests
    #[arg(short, long, default_value_t = 75_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub count: u64,
    /// Requests at a time
    #[arg(short, long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub depth: u16,
    /// Where the first request begins, in bytes
    #[arg(short, long, default_value = "0", value_parser = parse_bytes)]
    pub offset: u64,
    /// Bytes of each request
    #[arg(short = 's', long, default_value = "4096", value_parser = parse_bytes)]
    pub buffer_size: u64,
    /// Bytes from the beginning of one request to that of the next [default: the buffer size]
    #[arg(short = 'S', long, value_parser = parse_bytes)]
    pub step_size: Option<u64>,
    /// How I/O is done
    #[arg(short = 'i', long, value_enum)]
    pub aio: Option<Aio>,
    /// The same as -i native
    #[arg(short, long, conflicts_with = "aio")]
    pub native: bool,
    /// Write; what was there is lost
    #[arg(short, long)]
    pub write: bool,
    /// The byte that is written
    #[arg(long, default_value_t = 0, requires = "write")]
    pub pattern: u8,
    /// Flush each time so many requests have been made
    #[arg(long, value_name = "REQUESTS", requires = "write")]
    pub flush_interval: Option<u64>,
    /// Flush without waiting for the requests that are under way
    #[arg(long)]
    pub no_drain: bool,
    /// Read it although somebody may be changing it
    #[arg(short = 'U', long, conflicts_with = "write")]
    pub force_share: bool,
    /// The image
    pub filename: String,
}

/// How I/O is done, under `qemu-img`'s names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Aio {
    /// A pool of threads
    Threads,
    /// The best that there is
    Native,
    /// io_uring
    #[value(name = "io_uring")]
    Uring,
}

impl BenchArgs {
    /// The engine that was asked for.
    pub(super) fn engine(&self) -> EngineChoice {
        match self.aio {
            Some(Aio::Threads) => EngineChoice::Threads,
            Some(Aio::Uring) => EngineChoice::Uring,
            Some(Aio::Native) => EngineChoice::Auto,
            None if self.native => EngineChoice::Auto,
            None => EngineChoice::Threads,
        }
    }
}

/// A run under way.
struct Bench {
    image: Image,
    write: bool,
    request_bytes: u64,
    step_bytes: u64,
    pattern: u8,
    next: Cell<u64>,
}

pub(super) async fn run(program: Rc<Program>, args: BenchArgs) -> Result<u8, Failure> {
    let depth = u64::from(args.depth);
    if let Some(interval) = args
        .flush_interval
        .filter(|interval| (1..depth).contains(interval))
    {
        return Err(Error::invalid(format!(
            "{depth} requests at a time (-d) are more than the {interval} after which to flush"
        ))
        .into());
    }
    if !(1..=MAX_REQUEST_BYTES).contains(&args.buffer_size) {
        return Err(
            Error::invalid(format!("a request has from 1 to {MAX_REQUEST_BYTES} bytes")).into(),
        );
    }
    let probing = match args.write {
        true => Probing::Refused("-f"),
        false => Probing::Allowed,
    };
    let how = How {
        write: args.write,
        cache: args.cache,
        force_share: args.force_share,
        ..How::reading(&args.format, probing)?
    };
    let image = program.open(&args.filename, &how).await?;
    if image.bytes() < args.buffer_size {
        return Err(Error::invalid(format!(
            "'{}' has {} bytes, which is less than one request",
            args.filename,
            image.bytes()
        ))
        .into());
    }
    let bench = Bench {
        image,
        write: args.write,
        request_bytes: args.buffer_size,
        step_bytes: args.step_size.unwrap_or(args.buffer_size),
        pattern: args.pattern,
        next: Cell::new(args.offset),
    };
    if !args.quiet {
        program.say(format!(
            "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
            args.count,
            if args.write { "write" } else { "read" },
            args.buffer_size,
            args.depth,
            args.offset,
            bench.step_bytes,
        ))?;
        if let Some(interval) = args.flush_interval.filter(|interval| *interval > 0) {
            let how = if args.no_drain { "enqueued " } else { "" };
            program.say(format!("Sending {how}flush every {interval} requests"))?;
        }
    }
    let context = Rc::clone(program.control.context());
    let begin = context.engine().now();
    bench
        .run(
            args.count,
            depth,
            args.flush_interval.unwrap_or(0),
            args.no_drain,
        )
        .await?;
    let taken = context.engine().now() - begin;
    if !args.quiet {
        program.say(format!(
            "Run completed in {:.3} seconds.",
            taken.as_secs_f64()
        ))?;
    }
    bench.image.close().await?;
    Ok(0)
}

impl Bench {
    /// Makes `count` requests, `depth` at a time. Every `interval` of them (0: never) is followed by a
    /// flush, which waits for those before it unless there is no need to `drain`.
    async fn run(
        &self,
        count: u64,
        depth: u64,
        interval: u64,
        no_drain: bool,
    ) -> Result<(), Error> {
        let round = match (interval, no_drain) {
            (0, _) | (_, true) => count,
            (interval, false) => interval,
        };
        let mut left = count;
        while left > 0 {
            let left_in_round = Cell::new(round.min(left));
            left -= left_in_round.get();
            let streams = (0..depth).map(|_| self.stream(&left_in_round, interval, no_drain));
            future::try_join_all(streams).await?;
            if round < count {
                self.image.flush().await?;
            }
        }
        Ok(())
    }

    /// One request after the other, until none is left.
    async fn stream(&self, left: &Cell<u64>, interval: u64, no_drain: bool) -> Result<(), Error> {
        let buffer = Segments::allocate(self.request_bytes as usize, 4096);
        buffer.fill(self.pattern);
        while left.get() > 0 {
            left.set(left.get() - 1);
            let offset = self.place();
            match self.write {
                true => self.image.write(offset, buffer.clone()).await?,
                false => self.image.read(offset, buffer.clone()).await?,
            }
            if no_drain && interval > 0 && left.get().is_multiple_of(interval) {
                self.image.flush().await?;
            }
        }
        Ok(())
    }

    /// Where the next request goes: back to the beginning past the end.
    fn place(&self) -> u64 {
        let last = self.image.bytes() - self.request_bytes;
        let offset = match self.next.get() {
            offset if offset <= last => offset,
            _ => 0,
        };
        self.next.set(offset.saturating_add(self.step_bytes));
        offset
    }
}
