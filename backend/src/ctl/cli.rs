//! The command line of `stonework ctl`, as typed.

use std::path::PathBuf;
use std::time::Duration;

use blockcore::options::parse_size;
use clap::{Args, Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCandidates;

use super::complete;

/// `stonework ctl`.
#[derive(Args, Debug)]
pub struct CtlArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub how: How,
    /// What to do.
    #[command(subcommand)]
    pub command: Noun,
}

/// How a daemon is reached, and how its answers are shown.
#[derive(Args, Clone, Debug)]
pub struct How {
    /// The daemon's control socket: its QMP monitor
    #[arg(
        long,
        short,
        value_name = "PATH",
        env = "STONEWORK_SOCKET",
        global = true
    )]
    pub socket: Option<PathBuf>,
    /// Print the daemon's answer as it is, in JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Print what would be sent, and send nothing
    #[arg(long, global = true)]
    pub dry_run: bool,
    /// Print what is sent and what comes back on standard error
    #[arg(long, short, global = true)]
    pub verbose: bool,
    /// Longest time to wait for an answer
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds, global = true)]
    pub timeout: Duration,
    /// No heading above a table, and tabs between its columns: for scripts
    #[arg(long, short = 'H', global = true)]
    pub no_header: bool,
    /// Exact numbers of bytes
    #[arg(long, short = 'p', global = true)]
    pub exact: bool,
}

/// What something is done to.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Nodes of the block graph
    #[command(subcommand)]
    Node(NodeVerb),
    /// The whole block graph: who uses which node
    Graph {
        /// How it is drawn
        #[arg(long, value_enum, default_value_t = Drawing::Tree)]
        format: Drawing,
    },
    /// Exports: nodes that are offered to guests
    #[command(subcommand)]
    Export(ExportVerb),
    /// Jobs: long operations on nodes, such as copies
    #[command(subcommand)]
    Job(JobVerb),
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    Start(Start),
    /// Objects: named workers (iothread), throttle groups, secrets
    #[command(subcommand)]
    Object(ObjectVerb),
    /// What was read and written, how fast, and what failed
    Stats {
        /// Of nodes, besides exports
        #[arg(long)]
        nodes: bool,
    },
    /// Requests that the host has not answered yet: which image, where, in which phase, since when
    Requests,
    /// What goes on, again and again
    Top {
        /// Seconds between two looks
        #[arg(long, short, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
        interval: Duration,
        /// How many looks; for ever by default
        #[arg(long, short = 'n', value_name = "N")]
        count: Option<u64>,
    },
    /// What happens from now on
    Events {
        /// Only so many
        #[arg(long, short = 'n', value_name = "N")]
        count: Option<u64>,
        /// Only these, such as BLOCK_IO_ERROR
        #[arg(value_name = "EVENT")]
        names: Vec<String>,
    },
    /// Send a command as it is: JSON, or a command's name
    Qmp {
        /// {"execute": …}, or a command's name
        command: String,
        /// Its arguments, a JSON object
        arguments: Option<String>,
    },
    /// Which version runs there
    Version,
    /// Stop the daemon in order
    Quit,
}

/// What is done to nodes.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// List them
    #[command(alias = "list")]
    Ls {
        /// Those, too, that nobody gave a name
        #[arg(long, short)]
        all: bool,
    },
    /// Say all that is known of one
    Show {
        /// The node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
    },
    /// Open one: [driver=]DRIVER,node-name=NAME,key=value,... or JSON, as --blockdev takes it
    Add {
        /// Its options
        options: String,
    },
    /// Close one that nobody uses
    #[command(alias = "del")]
    Rm {
        /// The node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
    },
    /// Change its length; its guests are told
    Resize {
        /// The node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
        /// How long: 20G, or +5G for longer by so much; suffixes are powers of 1024
        size: NewSize,
    },
    /// Open nodes anew with other options; what is left out returns to its default
    Reopen {
        /// Options of each, as --blockdev takes them
        #[arg(required = true)]
        options: Vec<String>,
    },
    /// Take images back that another process had
    Activate {
        /// The node; all by default
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: Option<String>,
    },
    /// Hand images over to another process: nothing is written to them any more
    Deactivate {
        /// The node; all by default
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: Option<String>,
    },
    /// Have an event sent, once, when something is written past an offset
    Threshold {
        /// The node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
        /// The offset in bytes; 0 for none
        #[arg(value_parser = bytes)]
        offset: u64,
    },
}

/// What is done to exports.
#[derive(Debug, Subcommand)]
pub enum ExportVerb {
    /// List them
    #[command(alias = "list")]
    Ls,
    /// Offer a node: [type=]vhost-user-blk,id=ID,node-name=NAME,... or JSON, as --export takes it
    Add {
        /// Its options
        options: String,
    },
    /// Offer it no more
    #[command(alias = "del")]
    Rm {
        /// The export
        #[arg(add = ArgValueCandidates::new(complete::exports))]
        id: String,
        /// Also while a front-end is connected, whose connection is ended
        #[arg(long)]
        hard: bool,
    },
    /// Try requests again that failed and are held
    Resume {
        /// The export
        #[arg(add = ArgValueCandidates::new(complete::exports))]
        id: String,
    },
}

/// What is done to jobs.
#[derive(Debug, Subcommand)]
pub enum JobVerb {
    /// List them
    #[command(alias = "list")]
    Ls,
    /// Have one hold still
    Pause {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
    },
    /// Have one go on that was paused, or stopped for a failure
    Resume {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
    },
    /// Have one give up; one that is ready ends well, and changes nothing
    Cancel {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
        /// At once, also if it is ready or paused
        #[arg(long)]
        force: bool,
    },
    /// Have one that is ready end, and its result take its place
    Complete {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
        /// Wait until it is over
        #[arg(long)]
        wait: bool,
    },
    /// Have one that is pending make its result a fact
    Finalize {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
    },
    /// Forget one that is over
    Dismiss {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
    },
    /// Change how fast one may be
    Speed {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
        /// Bytes per second; 0 for no limit
        #[arg(value_parser = bytes)]
        speed: u64,
    },
    /// Wait until one is over, or waits to be finalized
    Wait {
        /// The job
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: String,
    },
}

/// What all that start jobs take.
#[derive(Args, Clone, Debug)]
pub struct JobFlags {
    /// The job's name; what it does and to which node by default
    #[arg(long, value_name = "ID")]
    pub job: Option<String>,
    /// Bytes per second, at most; 0 for no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = bytes)]
    pub speed: u64,
    /// Wait until it is over, or can be completed
    #[arg(long)]
    pub wait: bool,
}

/// What is started.
#[derive(Debug, Subcommand)]
pub enum Start {
    /// Copy a disk as it is now, while its guest goes on
    Backup {
        /// The disk's node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
        /// The node that gets the copy
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        target: String,
        /// What is copied
        #[arg(long, value_enum, default_value_t = Sync::Full)]
        sync: Sync,
        #[expect(missing_docs, reason = "documented at its type")]
        #[command(flatten)]
        flags: JobFlags,
    },
    /// Copy a disk, and follow what its guest changes
    Mirror {
        /// The disk's node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
        /// The node that gets the copy
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        target: String,
        /// What is copied at first
        #[arg(long, value_enum, default_value_t = Sync::Full)]
        sync: Sync,
        /// Whether guests wait for the target
        #[arg(long, value_enum, default_value_t = CopyMode::Background)]
        copy_mode: CopyMode,
        /// Have the copy take the disk's place, and wait for that
        #[arg(long)]
        complete: bool,
        #[expect(missing_docs, reason = "documented at its type")]
        #[command(flatten)]
        flags: JobFlags,
    },
    /// Write what overlays hold to an image below them
    Commit {
        /// The node at which guests are
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
        /// The topmost node that is committed; the active one by default
        #[arg(long, value_name = "NODE", add = ArgValueCandidates::new(complete::nodes))]
        top: Option<String>,
        /// The node that gets the data; the last of the chain by default
        #[arg(long, value_name = "NODE", add = ArgValueCandidates::new(complete::nodes))]
        base: Option<String>,
        /// Of the active node: have the base take its place, and wait for that
        #[arg(long)]
        complete: bool,
        #[expect(missing_docs, reason = "documented at its type")]
        #[command(flatten)]
        flags: JobFlags,
    },
    /// Write into an overlay what images below it hold
    Stream {
        /// The overlay's node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
        /// The node that stays below; none by default
        #[arg(long, value_name = "NODE", add = ArgValueCandidates::new(complete::nodes))]
        base: Option<String>,
        #[expect(missing_docs, reason = "documented at its type")]
        #[command(flatten)]
        flags: JobFlags,
    },
    /// Put an overlay above a disk, which from then on stays as it is
    Snapshot {
        /// The disk's node
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        node: String,
        /// The overlay's node, opened with 'backing' null
        #[arg(add = ArgValueCandidates::new(complete::nodes))]
        overlay: String,
    },
}

/// Which part of a disk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sync {
    /// All of it
    Full,
    /// What its topmost image has itself
    Top,
    /// What changes from now on
    None,
}

/// Whether guests wait for a mirror's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CopyMode {
    /// They do not
    Background,
    /// They do
    WriteBlocking,
}

/// What is done to objects.
#[derive(Debug, Subcommand)]
pub enum ObjectVerb {
    /// List them
    #[command(alias = "list")]
    Ls,
    /// Make one: a JSON object with qom-type and id
    Add {
        /// Its properties
        object: String,
    },
    /// Remove one that nobody uses
    #[command(alias = "del")]
    Rm {
        /// The object
        #[arg(add = ArgValueCandidates::new(complete::objects))]
        id: String,
    },
    /// Read a property
    Get {
        /// The object
        #[arg(add = ArgValueCandidates::new(complete::objects))]
        id: String,
        /// Which
        property: String,
    },
    /// Change a property, such as a throttle group's limits
    Set {
        /// The object
        #[arg(add = ArgValueCandidates::new(complete::objects))]
        id: String,
        /// Which
        property: String,
        /// JSON, or plain text
        value: String,
    },
}

/// How a graph is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Drawing {
    /// For people
    Tree,
    /// For Graphviz
    Dot,
    /// As the daemon has it
    Json,
}

/// A length, or a change of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    Bytes(u64),
    /// So many more.
    More(u64),
}

impl std::str::FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix('+') {
            Some(more) => bytes(more).map(Self::More),
            None => bytes(text).map(Self::Bytes),
        }
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).filter(|bytes| i64::try_from(*bytes).is_ok());
    bytes.ok_or_else(|| "a number of bytes is expected, such as 10G".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    let seconds = seconds.filter(|seconds| *seconds > 0.0 && *seconds < 1e9);
    let seconds = seconds.ok_or_else(|| "a number of seconds above zero is expected".to_owned());
    seconds.map(Duration::from_secs_f64)
}
