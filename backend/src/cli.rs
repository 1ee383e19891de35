//! The command line, as typed.

use std::path::PathBuf;
use std::time::Duration;

use blockcore::Error;
use blockcore::engine::EngineChoice;
use blockcore::graph::Graph;
use blockcore::options::{Form, Options, parse_size};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;

use crate::config::{
    AnyExportConfig, DEFAULT_POLL, MAX_QUEUES, ProcessConfig, default_runtime_directory, parse_cpus,
};
use crate::ctl::cli::CtlArgs;
use crate::daemon::Daemon;
use crate::img::cli::ImgArgs;
use crate::metrics::{Metrics, MetricsAddress};
use crate::qmp::json::Reader;

/// Serves virtual disks to virtual machines over vhost-user-blk.
#[derive(Debug, Parser)]
#[command(name = "stonework", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve one disk at a socket, with sane defaults
    Serve(ServeArgs),
    /// Serve disks described by options, as qemu-storage-daemon does
    Daemon(DaemonArgs),
    /// Look at and steer a running daemon
    Ctl(CtlArgs),
    /// Make, look at, copy and change images that nobody serves, as qemu-img does
    Img(ImgArgs),
    /// Write the manual's pages, one for each command
    Man {
        /// Where to
        directory: PathBuf,
    },
}

/// How the process does its work.
#[derive(Args, Debug)]
pub struct ProcessArgs {
    /// Worker threads [default: as many as the largest export has queues, at most one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,
    /// Cores to pin workers to, in turn: 0-3,6
    #[arg(long, value_name = "LIST", value_parser = Cpus::parse)]
    pub cpus: Option<Cpus>,
    /// Microseconds that a worker looks for work by itself before it sleeps, at most; 0 for never
    #[arg(long, value_name = "N", default_value_t = DEFAULT_POLL.as_micros() as u32)]
    pub poll_max_us: u32,
    /// How I/O is done: io_uring where the host allows it (auto), or a thread pool
    #[arg(long, value_enum, default_value_t = EngineArg::Auto)]
    pub engine: EngineArg,
    /// Throw away what was recorded of the graph (SOCKET.state): serve what the arguments describe
    #[arg(long)]
    pub discard_state: bool,
    /// Where Prometheus reads what exports do: 127.0.0.1:PORT, or the path of a Unix socket
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<MetricsAddress>,
    /// Milliseconds after which a request that the host has not answered is named in the log; 0 for never
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub slow_request_ms: u32,
    /// Where memory that outlives this process is kept, on a file system in memory; made if it is not
    /// there [default: $XDG_RUNTIME_DIR/stonework, or /run/stonework for root]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
}

/// A list of cores.
#[derive(Clone, Debug)]
pub struct Cpus(Vec<usize>);

impl Cpus {
    fn parse(text: &str) -> Result<Self, String> {
        parse_cpus(text).map(Self)
    }
}

/// `--engine`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum EngineArg {
    /// io_uring where the host allows it, else threads
    Auto,
    /// io_uring, or an error
    #[value(name = "io_uring")]
    Uring,
    /// A thread pool
    Threads,
}

impl ProcessArgs {
    /// Offers metrics, where it is asked for.
    ///
    /// # Errors
    ///
    /// As [`Metrics::start`].
    pub fn offer_metrics(&self, daemon: &Daemon) -> Result<Option<Metrics>, Error> {
        let address = self.metrics.as_ref();
        let started = address.map(|address| Metrics::start(address, daemon.handle()));
        started.transpose()
    }

    /// As configuration.
    pub fn config(&self) -> ProcessConfig {
        ProcessConfig {
            workers: self.workers.map(usize::from),
            cpus: self.cpus.clone().map_or_else(Vec::new, |cpus| cpus.0),
            poll_max: Duration::from_micros(u64::from(self.poll_max_us)),
            engine: match self.engine {
                EngineArg::Auto => EngineChoice::Auto,
                EngineArg::Uring => EngineChoice::Uring,
                EngineArg::Threads => EngineChoice::Threads,
            },
            discard_state: self.discard_state,
            slow_request: (self.slow_request_ms > 0)
                .then(|| Duration::from_millis(u64::from(self.slow_request_ms))),
            runtime_directory: self.runtime_dir.clone().or_else(|| {
                let session = std::env::var_os("XDG_RUNTIME_DIR");
                default_runtime_directory(session.map(PathBuf::from))
            }),
        }
    }
}

/// `stonework serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// File or block device to serve
    pub disk: PathBuf,
    /// Where front-ends connect
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Where operators connect: a QMP monitor, for 'stonework ctl' and QEMU's tools
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Format of the disk; without it, a file that looks like a known format is refused
    #[arg(long)]
    pub format: Option<String>,
    /// Refuse the guest's writes
    #[arg(long, conflicts_with = "create")]
    pub read_only: bool,
    /// Leave the disk as it is: what the guest writes goes to a nameless file in $TMPDIR, else /var/tmp, and
    /// is gone when this ends
    #[arg(long, conflicts_with_all = ["create", "read_only"])]
    pub temporary: bool,
    /// How writes are kept
    #[arg(long, value_enum, default_value_t = CacheMode::Writeback)]
    pub cache: CacheMode,
    /// Virtqueues; QEMU refuses fewer than the guest has CPUs, unused ones cost nothing
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub queues: u16,
    /// Serial number that the guest sees, at most 20 bytes
    #[arg(long, default_value = "", hide_default_value = true)]
    pub serial: String,
    /// Smallest unit of a request in bytes, a power of two from 512 to 65536 [default: the device's]
    #[arg(long, value_name = "BYTES", value_parser = parse_block)]
    pub block_size: Option<u32>,
    /// Make the file first, with so many bytes; suffixes k, M, G, T are powers of 1024
    #[arg(long, value_name = "SIZE", value_parser = parse_create_size)]
    pub create: Option<u64>,
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub process: ProcessArgs,
}

fn parse_block(text: &str) -> Result<u32, String> {
    let block = parse_size(text).and_then(|bytes| u32::try_from(bytes).ok());
    let possible = |block: &u32| block.is_power_of_two() && (512..=65536).contains(block);
    block
        .filter(possible)
        .ok_or_else(|| "a block size is a power of two from 512 to 65536".into())
}

fn parse_create_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).ok_or("a size is a number of bytes, such as 10G")?;
    if bytes == 0 || !bytes.is_multiple_of(512) || i64::try_from(bytes).is_err() {
        return Err("a disk's size is a multiple of 512 bytes, above zero and below 8E".into());
    }
    Ok(bytes)
}

/// QEMU's names for how writes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// In the host's page cache; stable when the guest flushes
    Writeback,
    /// In the host's page cache; each write is stable when it completes
    Writethrough,
    /// Past the page cache; stable when the guest flushes
    None,
    /// Past the page cache; each write is stable when it completes
    Directsync,
    /// In the page cache; flushes are ignored, so the host's crash loses data
    Unsafe,
}

impl CacheMode {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::None => "none",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// `cache.direct`.
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// `cache.no-flush`.
    pub fn no_flush(self) -> bool {
        self == Self::Unsafe
    }

    /// Whether each write is stable when it completes.
    pub fn writethrough(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }
}

/// `stonework daemon`.
#[derive(Args, Debug)]
pub struct DaemonArgs {
    /// Open a node: [driver=]DRIVER,node-name=NAME,key=value,...; ',,' is a comma
    #[arg(long, value_name = "OPTIONS")]
    pub blockdev: Vec<String>,
    /// Offer a node: [type=]vhost-user-blk,id=ID,node-name=NAME,addr.type=unix,addr.path=PATH,... or
    /// [type=]nbd,id=ID,node-name=NAME[,name=NAME,writable=on],...
    #[arg(long, value_name = "OPTIONS")]
    pub export: Vec<String>,
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Make a character device: socket,id=ID,path=PATH[,server=on[,wait=off]]; stdio,id=ID;
    /// file,id=ID,path=PATH; null,id=ID
    #[arg(long, value_name = "OPTIONS")]
    pub chardev: Vec<String>,
    /// Answer QMP on a character device: [chardev=]ID[,pretty=on]
    #[arg(long, value_name = "OPTIONS")]
    pub monitor: Vec<String>,
    /// Make an object: [qom-type=]TYPE,id=ID,key=value,...; 'help' lists the types, 'TYPE,help' what one takes
    #[arg(long, value_name = "OPTIONS")]
    pub object: Vec<String>,
    /// Listen for NBD clients: addr.type=unix,addr.path=PATH or addr.type=inet,addr.host=HOST,addr.port=PORT
    /// or addr.type=fd,addr.str=NUMBER[,max-connections=100,handshake-max-seconds=10]
    #[arg(long, value_name = "OPTIONS")]
    pub nbd_server: Vec<String>,
    /// Write the process's number to a file when all is started; it is locked, and removed at the end
    #[arg(long, value_name = "PATH")]
    pub pidfile: Option<PathBuf>,
    /// Log more of these parts of the program: [enable=]PATTERN, such as 'backend::worker*'; 'help' lists them
    #[arg(short = 'T', long, value_name = "PATTERN")]
    pub trace: Vec<String>,
    /// Go on in the background when all is started; a failure before is told by the exit status
    #[arg(long)]
    pub daemonize: bool,
}

impl DaemonArgs {
    /// What is to be logged besides what is anyway: targets, `tracing`'s word for parts of a program.
    ///
    /// # Errors
    ///
    /// What is no pattern of their names, or is not in this version.
    pub fn traced(&self) -> Result<Vec<String>, Error> {
        let mut targets = Vec::new();
        for text in &self.trace {
            let mut options = Options::parse(text, Some("enable"))?;
            targets.extend(options.take("enable"));
            if let Some((key, _)) = options.iter().next() {
                return Err(Error::unsupported(format!(
                    "option '{key}' of --trace is not in this version of stonework"
                )));
            }
        }
        targets.iter().map(|pattern| target(pattern)).collect()
    }
}

/// The parts that `--trace` begins from.
pub const TRACE_PARTS: [&str; 3] = ["backend", "blockcore", "formats"];

/// A pattern as a target: a name, or the beginning of several names before a `*`.
fn target(pattern: &str) -> Result<String, Error> {
    let name = pattern.strip_suffix('*').unwrap_or(pattern);
    let name = name.strip_suffix("::").unwrap_or(name);
    let well_formed = |letter: char| letter.is_ascii_alphanumeric() || "_:".contains(letter);
    if !name.chars().all(well_formed) {
        return Err(Error::invalid(format!(
            "--trace {pattern}: a pattern is the name of a part, or its beginning before a '*'"
        )));
    }
    Ok(name.to_owned())
}

/// Reads what an option says that is either a JSON object or `key=value,...`, of which the first may be the
/// value of `implied`.
///
/// # Errors
///
/// What is wrong with its form.
pub fn parse_value(text: &str, implied: &str) -> Result<(Value, Form), Error> {
    if !text.starts_with('{') {
        let options = Options::parse_schema(text, Some(implied))?;
        return Ok((options.to_json(), Form::KeyValue));
    }
    Ok((parse_json(text)?, Form::Json))
}

/// Reads the value of `--blockdev`, for a graph with these drivers.
///
/// # Errors
///
/// What is wrong with its form, or what is missing, unknown or of another type.
pub fn node_options(text: &str, graph: &Graph) -> Result<Options, Error> {
    let (options, form) = schema_options(text, "driver")?;
    let options = graph.typed_options(&options, form)?;
    if options.get("node-name").is_none() {
        return Err(Error::invalid(
            "'node-name' must be specified for the root node",
        ));
    }
    Ok(options)
}

/// Reads the value of `--export`.
///
/// # Errors
///
/// As [`node_options`].
pub fn export_config(text: &str) -> Result<AnyExportConfig, Error> {
    let (options, form) = schema_options(text, "type")?;
    AnyExportConfig::from_options(&options, form)
}

/// Reads what `--export` takes, each value in its type.
///
/// # Errors
///
/// As [`node_options`].
pub fn export_options(text: &str) -> Result<Options, Error> {
    let (options, form) = schema_options(text, "type")?;
    AnyExportConfig::from_options(&options, form)?;
    let table = AnyExportConfig::table(&options);
    options.typed(&[table], form, "", "an export", &[])
}

/// Options as `key=value` or, where they begin with a brace, as JSON.
fn schema_options(text: &str, implied: &str) -> Result<(Options, Form), Error> {
    if !text.starts_with('{') {
        let options = Options::parse_schema(text, Some(implied))?;
        return Ok((options, Form::KeyValue));
    }
    Ok((Options::from_schema_json(&parse_json(text)?)?, Form::Json))
}

fn parse_json(text: &str) -> Result<Value, Error> {
    let mut rest = text.as_bytes();
    let mut reader = Reader::default();
    match (reader.next(&mut rest), rest.trim_ascii()) {
        (Some(Ok(value)), []) => Ok(value),
        (Some(Err(error)), _) => Err(Error::invalid(error)),
        (Some(Ok(_)), _) => Err(Error::invalid("JSON parse error, expecting end of input")),
        (None, _) => Err(Error::invalid("JSON parse error, premature EOI")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_has_the_defaults_that_its_help_says() {
        let cli = Cli::try_parse_from(["stonework", "serve", "d.raw", "--socket", "s"]).unwrap();
        let Command::Serve(args) = cli.command else {
            panic!()
        };
        assert_eq!(
            (args.queues, args.cache, args.read_only),
            (16, CacheMode::Writeback, false)
        );
        assert_eq!(args.process.config().poll_max, DEFAULT_POLL);
    }

    #[test]
    fn sizes_and_blocks_out_of_range_are_usage_errors() {
        for bad in [
            ["--create", "1000"],
            ["--create", "0"],
            ["--block-size", "513"],
            ["--block-size", "131072"],
            ["--queues", "0"],
            ["--queues", "257"],
            ["--workers", "0"],
            ["--cpus", "x"],
            ["--cache", "fast"],
            ["--engine", "epoll"],
        ] {
            let base = ["stonework", "serve", "d.raw", "--socket", "s"];
            let error = Cli::try_parse_from(base.iter().chain(&bad)).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
    }
}
