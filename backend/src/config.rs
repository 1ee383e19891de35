//! What the daemon is to do, checked: command-line flags and control commands become these types.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockcore::Error;
use blockcore::engine::EngineChoice;
use blockcore::io::policy::{ErrorPolicy, OnError};
use blockcore::options::{Form, OptionKind, OptionSpec, Options};

use crate::nbd::config::NBD_EXPORT_OPTIONS;
use crate::nbd::{self, NbdExportConfig};

/// Everything that holds for the whole process.
#[derive(Clone, Debug)]
pub struct ProcessConfig {
    /// Worker threads; `None` for as many as the exports have queues, at most one per core.
    pub workers: Option<usize>,
    /// Cores that workers are pinned to, in turn; empty for none.
    pub cpus: Vec<usize>,
    /// How long workers look for work by themselves before they sleep, at most.
    pub poll_max: Duration,
    /// How I/O is done.
    pub engine: EngineChoice,
    /// What earlier lives recorded of their exports is thrown away: they serve what the arguments
    /// describe.
    pub discard_state: bool,
    /// After what time requests that are under way are named in the log; `None` for never.
    pub slow_request: Option<Duration>,
    /// Where memory that is to outlive the process is kept; `None`: nowhere.
    pub runtime_directory: Option<PathBuf>,
}

impl Default for ProcessConfig {
    fn default() -> Self {
        Self {
            workers: None,
            cpus: Vec::new(),
            poll_max: DEFAULT_POLL,
            engine: EngineChoice::Auto,
            discard_state: false,
            slow_request: None,
            runtime_directory: None,
        }
    }
}

/// Where memory that is to outlive the process is kept if nobody says: `stonework` in what the session
/// has for such things (`XDG_RUNTIME_DIR`), given as `session`, else in `/run`, where that is the
/// caller's to write to.
pub fn default_runtime_directory(session: Option<PathBuf>) -> Option<PathBuf> {
    const HOST: &str = "/run";
    if let Some(session) = session.filter(|path| path.is_absolute()) {
        return Some(session.join("stonework"));
    }
    let access = rustix::fs::access(HOST, rustix::fs::Access::WRITE_OK);
    let own = rustix::process::geteuid().is_root() && access.is_ok();
    own.then(|| Path::new(HOST).join("stonework"))
}

/// The default for [`ProcessConfig::poll_max`]: a little more than a request to a fast disk takes.
pub const DEFAULT_POLL: Duration = Duration::from_micros(64);

/// Most virtqueues that an export may have.
pub const MAX_QUEUES: u16 = 256;
/// Longest serial number that a guest can be told.
pub const MAX_SERIAL_BYTES: usize = 20;

/// Where front-ends connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketAddress {
    /// A socket that is made there.
    Path(PathBuf),
    /// A listening socket that whoever started this process has left open for it, by number.
    Descriptor(i32),
}

impl SocketAddress {
    /// The path, or `descriptor` with its number.
    pub fn name(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Descriptor(_) => self.to_string(),
        }
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "'{}'", path.display()),
            Self::Descriptor(number) => write!(f, "descriptor {number}"),
        }
    }
}

/// An export of a node over vhost-user-blk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    /// Its name in this process.
    pub id: String,
    /// What it offers.
    pub node: String,
    /// Where front-ends connect.
    pub socket: SocketAddress,
    /// The named workers that serve it, its queues in turn; empty for those that all exports share.
    pub iothreads: Vec<String>,
    /// Whether guests may write.
    pub writable: bool,
    /// Whether each write is stable before it completes, until the guest says otherwise.
    pub writethrough: bool,
    /// Virtqueues.
    pub queues: u16,
    /// Smallest unit of a request in bytes; `None` for what suits the node.
    pub block_bytes: Option<u32>,
    /// What the guest is told as serial number.
    pub serial: String,
    /// What becomes of requests that fail.
    pub on_error: ErrorPolicy,
    /// After what time held requests are tried again by themselves; `None` for never.
    pub retry_held: Option<Duration>,
}

/// An export of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnyExportConfig {
    /// Over vhost-user-blk.
    VhostUser(ExportConfig),
    /// Over NBD.
    Nbd(NbdExportConfig),
}

impl AnyExportConfig {
    /// Reads the options of `--export`, given in this form.
    ///
    /// # Errors
    ///
    /// The first option that is missing, unknown or out of range.
    pub fn from_options(options: &Options, form: Form) -> Result<Self, Error> {
        match options.get("type") {
            Some(nbd::config::TYPE) => NbdExportConfig::from_options(options, form).map(Self::Nbd),
            _ => ExportConfig::from_options(options, form).map(Self::VhostUser),
        }
    }

    /// The table of an export's options, by the kind that they say it is.
    pub fn table(options: &Options) -> &'static [OptionSpec] {
        match options.get("type") {
            Some(nbd::config::TYPE) => NBD_EXPORT_OPTIONS,
            _ => EXPORT_OPTIONS,
        }
    }

    /// Its name in this process.
    pub fn id(&self) -> &str {
        match self {
            Self::VhostUser(config) => &config.id,
            Self::Nbd(config) => &config.id,
        }
    }
}

impl From<ExportConfig> for AnyExportConfig {
    fn from(config: ExportConfig) -> Self {
        Self::VhostUser(config)
    }
}

impl From<NbdExportConfig> for AnyExportConfig {
    fn from(config: NbdExportConfig) -> Self {
        Self::Nbd(config)
    }
}

/// Kinds of exports.
pub const EXPORT_TYPES: &[&str] = &["vhost-user-blk", "nbd"];

/// The options of `--export`.
pub const EXPORT_OPTIONS: &[OptionSpec] = &[
    option(
        "type",
        OptionKind::Choice(EXPORT_TYPES),
        None,
        "kind of export",
    ),
    option("id", OptionKind::Text, None, "name of the export"),
    option("node-name", OptionKind::Text, None, "node to offer"),
    option(
        "writable",
        OptionKind::Bool,
        Some("off"),
        "whether guests may write",
    ),
    option(
        "writethrough",
        OptionKind::Bool,
        Some("off"),
        "whether writes are stable before they complete",
    ),
    option(
        "iothread",
        OptionKind::Text,
        Some(""),
        "the worker that serves all queues; by default those that all exports share",
    ),
    option(
        "iothread.*",
        OptionKind::Text,
        Some(""),
        "workers that serve the queues in turn",
    ),
    option(
        "fixed-iothread",
        OptionKind::Bool,
        Some("off"),
        "taken as QEMU has it: an export always stays where it is",
    ),
    option(
        "allow-inactive",
        OptionKind::Bool,
        Some("off"),
        "not possible for vhost-user-blk",
    ),
    option(
        "addr.type",
        OptionKind::Choice(&["unix", "fd"]),
        None,
        "kind of socket",
    ),
    option(
        "addr.path",
        OptionKind::Text,
        Some(""),
        "path of the socket (unix)",
    ),
    option(
        "addr.str",
        OptionKind::Text,
        Some(""),
        "number of a descriptor that is a listening socket (fd)",
    ),
    option(
        "num-queues",
        OptionKind::Int,
        Some("1"),
        "virtqueues, 1 to 256",
    ),
    option(
        "logical-block-size",
        OptionKind::Size,
        Some("512"),
        "smallest unit of a request in bytes, a power of two from 512 to 65536",
    ),
    option(
        "serial",
        OptionKind::Text,
        Some(""),
        "serial number, at most 20 bytes",
    ),
    option(
        "on-read-error",
        OptionKind::Choice(&["report", "ignore", "enospc", "stop"]),
        Some("report"),
        "what becomes of reads that fail; with 'stop' they are held until they are resumed",
    ),
    option(
        "on-write-error",
        OptionKind::Choice(&["report", "ignore", "enospc", "stop"]),
        Some("report"),
        "what becomes of writes, zeroes and discards that fail; 'enospc' holds those that the host \
         has no space for",
    ),
];

pub(crate) const fn option(
    name: &'static str,
    kind: OptionKind,
    default: Option<&'static str>,
    help: &'static str,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        reopen: false,
        changes_data: false,
        help,
    }
}

impl ExportConfig {
    /// Reads the options of `--export`, given in this form.
    ///
    /// # Errors
    ///
    /// The first option that is missing, unknown or out of range.
    pub fn from_options(options: &Options, form: Form) -> Result<Self, Error> {
        let options = options.typed(&[EXPORT_OPTIONS], form, "", "an export", &[])?;
        let text = |name| options.text(EXPORT_OPTIONS, name).to_owned();
        let queues = text("num-queues");
        let queues = queues.parse().map_err(|_| {
            let text = format!("Parameter 'num-queues' expects uint16_t, not '{queues}'");
            Error::invalid(text)
        })?;
        if options.bool(EXPORT_OPTIONS, "allow-inactive") {
            return Err(Error::unsupported(
                "Export type does not support inactive exports",
            ));
        }
        let block = options.size(EXPORT_OPTIONS, "logical-block-size");
        let policy = |name| OnError::named(&text(name)).unwrap_or_default();
        let places = options
            .iter()
            .filter(|(key, _)| key.starts_with("iothread"));
        let iothreads = places.filter_map(|(_, value)| value.as_text());
        let config = Self {
            id: text("id"),
            node: text("node-name"),
            socket: socket(&options)?,
            iothreads: iothreads.map(str::to_owned).collect(),
            writable: options.bool(EXPORT_OPTIONS, "writable"),
            writethrough: options.bool(EXPORT_OPTIONS, "writethrough"),
            queues,
            block_bytes: options
                .get("logical-block-size")
                .map(|_| u32::try_from(block).unwrap_or(u32::MAX)),
            serial: text("serial"),
            on_error: ErrorPolicy {
                reads: policy("on-read-error"),
                writes: policy("on-write-error"),
            },
            retry_held: None,
        };
        config.check()?;
        Ok(config)
    }

    /// Checks what does not depend on the node.
    ///
    /// # Errors
    ///
    /// The first value that is out of range.
    pub fn check(&self) -> Result<(), Error> {
        let refuse = |what: String| Err(Error::invalid(format!("export '{}': {what}", self.id)));
        if !is_identifier(&self.id) {
            return Err(Error::invalid(format!(
                "Invalid block export id '{}': it is a letter, and after that letters, digits, '-', '.' and '_'",
                self.id
            )));
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return refuse(format!(
                "it cannot have {} queues; 1 to {MAX_QUEUES} are possible",
                self.queues
            ));
        }
        if let Some(block) = self.block_bytes {
            check_block(block).or_else(refuse)?;
        }
        if self.serial.len() > MAX_SERIAL_BYTES {
            return refuse(format!(
                "serial '{}' has {} bytes, more than the {MAX_SERIAL_BYTES} that a guest is told",
                self.serial,
                self.serial.len()
            ));
        }
        Ok(())
    }
}

/// Whether something of an operator's may be called so, as QEMU has it: a letter, and after that letters,
/// digits, `-`, `.` and `_`.
pub fn is_identifier(name: &str) -> bool {
    let mut letters = name.bytes();
    let first = letters.next();
    first.is_some_and(|letter| letter.is_ascii_alphabetic())
        && letters.all(|letter| letter.is_ascii_alphanumeric() || b"-._".contains(&letter))
}

fn socket(options: &Options) -> Result<SocketAddress, Error> {
    let (name, other) = match options.get("addr.type") {
        Some("fd") => ("addr.str", "addr.path"),
        _ => ("addr.path", "addr.str"),
    };
    if options.get(other).is_some() {
        return Err(Error::invalid(format!("Parameter '{other}' is unexpected")));
    }
    let Some(value) = options.get(name) else {
        return Err(Error::invalid(format!("Parameter '{name}' is missing")));
    };
    if name == "addr.path" {
        return Ok(SocketAddress::Path(value.into()));
    }
    let number = value.parse().ok().filter(|number| *number >= 0);
    let number = number
        .ok_or_else(|| Error::invalid(format!("'{value}' is not the number of a descriptor")))?;
    Ok(SocketAddress::Descriptor(number))
}

fn check_block(block: u32) -> Result<(), String> {
    if block.is_power_of_two() && (512..=65536).contains(&block) {
        return Ok(());
    }
    Err(format!(
        "block size {block}: it must be a power of two from 512 to 65536"
    ))
}

/// A list of cores: `0-3,6`.
///
/// # Errors
///
/// What part of it is no core or range of cores.
pub fn parse_cpus(text: &str) -> Result<Vec<usize>, String> {
    /// As many as `cpu_set_t` has.
    const MAX_CPU: usize = 1023;
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            text.trim()
                .parse::<usize>()
                .ok()
                .filter(|cpu| *cpu <= MAX_CPU)
        };
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => cpus.extend(first..=last),
            _ => return Err(format!("'{part}' is not a core or a range of cores")),
        }
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(text: &str) -> Result<ExportConfig, Error> {
        let options = Options::parse_schema(text, Some("type"))?;
        ExportConfig::from_options(&options, Form::KeyValue)
    }

    #[test]
    fn an_export_is_read_as_qemu_writes_it() {
        let text = "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=/run/a.sock,\
                    writable=on,num-queues=4";
        let config = export(text).unwrap();
        assert_eq!(
            (config.queues, config.writable, config.writethrough),
            (4, true, false)
        );
        assert_eq!(config.socket, SocketAddress::Path("/run/a.sock".into()));
        assert_eq!(config.on_error, ErrorPolicy::default());
        let text = format!("{text},on-read-error=stop,on-write-error=enospc");
        let policy = export(&text).unwrap().on_error;
        assert_eq!(
            (policy.reads, policy.writes),
            (OnError::Stop, OnError::Enospc)
        );
    }

    #[test]
    fn impossible_exports_say_what_is_wrong() {
        let base = "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=s";
        let message = |more: &str| export(&format!("{base}{more}")).unwrap_err().to_string();
        assert!(message(",num-queues=0").contains("1 to 256"));
        assert!(message(",num-queues=x").contains("expects integer"));
        assert!(message(",logical-block-size=513").contains("power of two"));
        assert!(message(",serial=123456789012345678901").contains("more than the 20"));
        assert!(message(",colour=red").contains("'colour' is unexpected"));
        assert!(message(",on-write-error=auto").contains("'on-write-error'"));
    }

    #[test]
    fn the_runtime_directory_is_the_sessions_and_never_a_relative_one() {
        let session = |path: &str| default_runtime_directory(Some(path.into()));
        let of_user = Some(PathBuf::from("/run/user/1000/stonework"));
        assert_eq!(session("/run/user/1000"), of_user);
        let host = default_runtime_directory(None);
        assert_eq!(session("here"), host);
        assert!(host.is_none_or(|path| path == Path::new("/run/stonework")));
    }

    #[test]
    fn cores_are_listed_singly_or_by_range() {
        assert_eq!(parse_cpus("0-2,5"), Ok(vec![0, 1, 2, 5]));
        for text in ["", "a", "3-1", "0-99999999", "1,,2"] {
            assert!(parse_cpus(text).is_err(), "{text}");
        }
    }
}
