//! `stonework serve`: one disk, one socket, one line; a front to the same daemon.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::{DriverKind, DriverType};
use blockcore::io::policy::{ErrorPolicy, OnError};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};

use crate::chardev;
use crate::cli::ServeArgs;
use crate::config::{ExportConfig, SocketAddress};
use crate::daemon::Daemon;
use crate::qmp::MonitorOptions;
use crate::temporary;

/// What a disk is where nothing is said.
const RAW: &str = "raw";
/// The node's and the export's name.
const NAME: &str = "disk";
/// The name of the monitor's character device.
const CONTROL: &str = "control";
/// The name of the disk's own node, where a temporary one is above it.
const BASE: &str = "disk-base";
/// After what time writes that the host had no space for are tried again: soon enough for who has just
/// made room, seldom enough for a host that has none.
const RETRY: Duration = Duration::from_secs(3);

/// What a file's beginning tells of its format; given by `main`, which knows the formats.
pub struct Probe {
    /// How much of the beginning to look at.
    pub bytes: usize,
    /// The format that it seems to have.
    pub seems: fn(&[u8]) -> Option<&'static str>,
}

/// Builds a daemon that serves one disk.
///
/// # Errors
///
/// Anything that keeps the disk from being served; a file that was made for it is left.
pub fn build(
    args: &ServeArgs,
    drivers: Vec<&'static DriverType>,
    probe: &Probe,
) -> Result<Rc<Daemon>, Error> {
    let formats: Vec<_> = drivers
        .iter()
        .filter(|driver| driver.kind == DriverKind::Format)
        .map(|driver| driver.name)
        .collect();
    if let Some(format) = args
        .format
        .as_deref()
        .filter(|name| !formats.contains(name))
    {
        let known = formats.join(", ");
        let is_driver = drivers.iter().any(|driver| driver.name == format);
        return Err(match is_driver {
            true => Error::invalid(format!(
                "'{format}' is not an image format: these are {known}"
            )),
            false => Error::unsupported(format!(
                "this version of stonework has no format '{format}': it has {known}"
            )),
        });
    }
    let mut process = args.process.config();
    if args.temporary {
        // Nothing is to be found again.
        process.runtime_directory = None;
    }
    let daemon = Daemon::new(process, drivers)?;
    if let Some(bytes) = args.create {
        create(&daemon, args, bytes)?;
    } else if args.format.is_none() {
        refuse_other_formats(args, probe, &formats)?;
    }
    let disk = node_options(args)?;
    daemon.block_on(|daemon| async move { daemon.add_node(disk).await })?;
    if args.temporary {
        temporary::add(&daemon, NAME, BASE)?;
    }
    let export = ExportConfig {
        id: NAME.into(),
        node: NAME.into(),
        socket: SocketAddress::Path(args.socket.clone()),
        iothreads: Vec::new(),
        writable: !args.read_only,
        writethrough: args.cache.writethrough(),
        queues: args.queues,
        block_bytes: args.block_size,
        serial: args.serial.clone(),
        on_error: ErrorPolicy {
            writes: OnError::Enospc,
            ..ErrorPolicy::default()
        },
        retry_held: Some(RETRY),
    };
    daemon.block_on(|daemon| async move { daemon.add_export(export).await })?;
    if let Some(path) = &args.control {
        add_monitor(&daemon, path)?;
    }
    Ok(daemon)
}

/// Where operators connect.
fn add_monitor(daemon: &Rc<Daemon>, path: &Path) -> Result<(), Error> {
    let path = text(path)?.replace(',', ",,");
    let socket = format!("socket,id={CONTROL},path={path},server=on,wait=off");
    let (id, backend) = chardev::parse_chardev(&socket)?;
    let service = daemon.service();
    service.add_chardev(&id, &backend)?;
    let monitor = MonitorOptions {
        id: None,
        mode: None,
        pretty: None,
        chardev: id,
    };
    Ok(service.add_monitor(&monitor)?)
}

/// The format that is served.
fn format(args: &ServeArgs) -> &str {
    args.format.as_deref().unwrap_or(RAW)
}

fn create(daemon: &Rc<Daemon>, args: &ServeArgs, bytes: u64) -> Result<(), Error> {
    // A raw disk is its file.
    let (driver, prefix) = match format(args) {
        RAW => ("file", ""),
        format => (format, "file."),
    };
    let kind = daemon.control().read(|graph| graph.driver_type(driver))?;
    let create = kind.create.ok_or_else(|| {
        Error::unsupported(format!(
            "driver '{driver}' cannot make disks in this version of stonework"
        ))
    })?;
    let mut options = Options::default();
    options.set(&format!("{prefix}filename"), text(&args.disk)?);
    options.set("size", bytes.to_string());
    daemon.block_on(|daemon| create(Rc::clone(daemon.control().context()), options))
}

fn text(path: &Path) -> Result<&str, Error> {
    path.to_str()
        .ok_or_else(|| Error::invalid(format!("path '{}' is not valid UTF-8", path.display())))
}

/// A file that begins like an image is probably not meant as raw bytes.
fn refuse_other_formats(args: &ServeArgs, probe: &Probe, formats: &[&str]) -> Result<(), Error> {
    let Ok(file) = File::open(&args.disk) else {
        // Opening the node says what is wrong, with what to do about it.
        return Ok(());
    };
    let regular = file
        .metadata()
        .is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device());
    if !regular {
        return Ok(());
    }
    let mut head = Vec::new();
    let read = file.take(probe.bytes as u64).read_to_end(&mut head);
    if let Err(error) = read {
        return Err(Error::new(
            ErrorKind::Io,
            format!("cannot read '{}': {error}", args.disk.display()),
        ));
    }
    let Some(format) = (probe.seems)(&head) else {
        return Ok(());
    };
    let command = |format: &str| {
        format!(
            "stonework serve {} --socket {} --format {format}",
            args.disk.display(),
            args.socket.display()
        )
    };
    let missing = match formats.contains(&format) {
        true => String::new(),
        false => format!(" (this version of stonework has no {format})"),
    };
    Err(Error::invalid(format!(
        "'{}' begins like a {format} image, and the format is never guessed: to serve the disk in \
         it, run '{}'{missing}; to serve its bytes as they are, run '{}'",
        args.disk.display(),
        command(format),
        command("raw")
    )))
}

fn node_options(args: &ServeArgs) -> Result<Options, Error> {
    let on_off = |on: bool| if on { "on" } else { "off" };
    let device =
        std::fs::metadata(&args.disk).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let mut options = Options::default();
    options.set("driver", format(args));
    options.set("node-name", if args.temporary { BASE } else { NAME });
    options.set("read-only", on_off(args.read_only || args.temporary));
    options.set("discard", "unmap");
    options.set("cache.direct", on_off(args.cache.direct()));
    options.set("cache.no-flush", on_off(args.cache.no_flush()));
    options.set("file.driver", if device { "host_device" } else { "file" });
    options.set("file.filename", text(&args.disk)?);
    Ok(options)
}

/// Prints what is served and how front-ends attach it.
///
/// # Errors
///
/// Standard output cannot be written.
pub fn announce(args: &ServeArgs, daemon: &Daemon, mut out: impl io::Write) -> io::Result<()> {
    let Some(export) = daemon.export(NAME) else {
        return Ok(());
    };
    let info = export.info();
    let socket = args.socket.display();
    let access = match (info.read_only, args.temporary) {
        (true, _) => "read-only",
        (false, false) => "read-write",
        (false, true) => "temporary: what is written goes with this process",
    };
    writeln!(
        out,
        "serving {} ({}, {}, {access}, cache {}) at {socket}",
        args.disk.display(),
        format(args),
        human_bytes(info.bytes),
        args.cache.name()
    )?;
    writeln!(
        out,
        "{} queues on {} workers, engine {}; stop with Ctrl-C or SIGTERM",
        info.queues,
        daemon.workers(),
        daemon.engine_name()
    )?;
    writeln!(
        out,
        "\nattach with QEMU:\n  \
         -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem -m 1G \\\n  \
         -chardev socket,id=disk,path={socket} -device vhost-user-blk-pci,chardev=disk"
    )?;
    writeln!(
        out,
        "attach with cloud-hypervisor:\n  \
         --memory size=1G,shared=on --disk vhost_user=true,socket={socket},num_queues=1"
    )?;
    out.flush()
}

/// Bytes in the largest binary unit that leaves at least one.
fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    let whole = 1_u64 << (unit * 10);
    match bytes % whole {
        0 => format!("{} {}", bytes / whole, UNITS[unit]),
        _ => format!("{:.2} {}", bytes as f64 / whole as f64, UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        assert_eq!(human_bytes(512), "512 bytes");
        assert_eq!(human_bytes(1 << 30), "1 GiB");
        assert_eq!(human_bytes(3 << 29), "1.50 GiB");
        assert_eq!(human_bytes(0), "0 bytes");
    }
}
