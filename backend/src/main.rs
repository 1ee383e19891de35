//! The `stonework` command: parse, build, run, exit status.

use std::cell::RefCell;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use backend::background::{self, Background};
use backend::chardev;
use backend::cli::{
    Cli, Command, DaemonArgs, ServeArgs, TRACE_PARTS, export_config, node_options, parse_value,
};
use backend::ctl;
use backend::daemon::Daemon;
use backend::img::{self, cli::ImgArgs};
use backend::nbd::ServerOptions;
use backend::pidfile::Pidfile;
use backend::qmp::objects;
use backend::serve::{self, Probe};
use backend::signals::Signals;
use blockcore::Error;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use sd_notify::NotifyState;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> ExitCode {
    // State in memory is suspect after a panic, and a restart is transparent.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    // Asked by a shell for what could be typed next, it answers and ends.
    clap_complete::CompleteEnv::with_factory(Cli::command).complete();
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(status) => return status,
    };
    let matches = Cli::command().try_get_matches_from(&arguments);
    let matches = matches.unwrap_or_else(|error| usage(&error, &arguments));
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| usage(&error, &arguments));
    let traced = match &cli.command {
        Command::Daemon(args) => args.traced(),
        _ => Ok(Vec::new()),
    };
    let default = match cli.command {
        Command::Img(_) | Command::Ctl(_) => "warn",
        _ => "info",
    };
    log(default, traced.as_deref().unwrap_or_default());
    raise_descriptor_limit();
    let result = match cli.command {
        Command::Serve(args) => run_serve(&args),
        Command::Daemon(args) => {
            let (_, given) = matches.subcommand().expect("a command was parsed");
            if print_help(&args) {
                return ExitCode::SUCCESS;
            }
            let background = Background::enter();
            if args.daemonize && background.is_none() {
                match background::start(&arguments) {
                    Ok(status) => return status,
                    Err(error) => Err(error),
                }
            } else {
                traced.and_then(|_| run_daemon(&args, given, background))
            }
        }
        Command::Ctl(args) => return ExitCode::from(ctl::run(&args, formats::drivers())),
        Command::Img(args) => return run_img(args, &arguments),
        Command::Man { directory } => write_manual(&directory),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may read it any more: the exit status tells all the same.
            let _ = writeln!(std::io::stderr(), "stonework: {}", error.report());
            ExitCode::FAILURE
        }
    }
}

/// The command line; all that we take is text.
fn arguments() -> Result<Vec<String>, ExitCode> {
    let words = std::env::args_os().map(std::ffi::OsString::into_string);
    match words.collect::<Result<Vec<_>, _>>() {
        Ok(words) => Ok(img::cli::with_sizes_apart(words)),
        Err(word) => {
            let word = word.display();
            let _ = writeln!(std::io::stderr(), "stonework: '{word}' is not valid UTF-8");
            Err(ExitCode::from(2))
        }
    }
}

/// Says what is wrong with the command line, or what was asked of it, and ends. `img` ends as `qemu-img`
/// does.
fn usage(error: &clap::Error, arguments: &[String]) -> ! {
    let is_img = arguments.get(1).is_some_and(|word| word == "img");
    if is_img && error.exit_code() != 0 {
        let _ = error.print();
        std::process::exit(1);
    }
    error.exit()
}

/// Prints what was asked for in place of serving anything; returns whether something was.
fn print_help(args: &DaemonArgs) -> bool {
    let objects = args.object.iter().filter_map(|text| match text.as_str() {
        "help" => objects::help(None),
        text => objects::help(Some(text.strip_suffix(",help")?)),
    });
    let mut traces = args
        .trace
        .iter()
        .map(|text| text.trim_start_matches("enable="));
    let traces = traces
        .any(|text| text == "help")
        .then(|| TRACE_PARTS.join("\n") + "\n");
    let Some(text) = objects.chain(traces).next() else {
        return false;
    };
    // Nobody may read it any more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    true
}

/// Logs to the journal if that is where standard error goes, which keeps levels and fields apart, else to
/// standard error. `STONEWORK_LOG` chooses what, as in `warn` or `backend::worker=debug`. All is logged of the
/// targets in `traced`.
fn log(default: &str, traced: &[String]) {
    let mut filter =
        EnvFilter::try_from_env("STONEWORK_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    for target in traced {
        let directive = match target.as_str() {
            "" => "trace".to_owned(),
            target => format!("{target}=trace"),
        };
        // Checked when the pattern was read.
        filter = filter.add_directive(directive.parse().expect("the name of a target"));
    }
    let registry = tracing_subscriber::registry().with(filter);
    if let Some(journal) = journal() {
        return registry.with(journal).init();
    }
    let plain = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // It would complain on standard error too, and end us if nobody reads that any more.
        .log_internal_errors(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    registry.with(plain).init();
}

/// The journal, if systemd has connected standard error to it (`JOURNAL_STREAM` in systemd.exec(5)).
fn journal() -> Option<tracing_journald::Layer> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let own = rustix::fs::fstat(std::io::stderr()).ok()?;
    if stream != format!("{}:{}", own.st_dev, own.st_ino) {
        return None;
    }
    tracing_journald::layer().ok()
}

/// Takes all the descriptors that the host allows: front-ends bring hundreds, one for each region of
/// memory and up to three for each queue.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "cannot raise the limit of descriptors");
    }
}

fn run_serve(args: &ServeArgs) -> Result<(), Error> {
    let signals = Signals::register()?;
    let probe = Probe {
        bytes: formats::probe::BYTES,
        seems: formats::probe::seems,
    };
    let daemon = serve::build(args, formats::drivers(), &probe)?;
    let _metrics = args.process.offer_metrics(&daemon)?;
    // A reader that went away does not concern the guest.
    let _ = serve::announce(args, &daemon, std::io::stdout().lock());
    let outcome = run_ready(&daemon, &signals);
    daemon.service().stop();
    outcome
}

/// Serves until it is told to stop, and tells a service manager that asked (`NOTIFY_SOCKET`) what it does.
fn run_ready(daemon: &Rc<Daemon>, signals: &Signals) -> Result<(), Error> {
    notify(NotifyState::Ready);
    let outcome = daemon.run(Some(signals));
    notify(NotifyState::Stopping);
    outcome
}

fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// Writes the manual's pages, from the same definitions as `--help`.
fn write_manual(directory: &Path) -> Result<(), Error> {
    let written = clap_mangen::generate_to(Cli::command(), directory);
    written.map_err(|error| {
        let text = format!("cannot write pages to '{}': {error}", directory.display());
        Error::new(blockcore::ErrorKind::Io, text)
    })
}

fn run_img(args: ImgArgs, arguments: &[String]) -> ExitCode {
    let probe = Probe {
        bytes: formats::probe::BYTES,
        seems: formats::probe::seems,
    };
    let output = Rc::new(RefCell::new(std::io::stdout()));
    let arguments = arguments.get(2..).unwrap_or_default().to_vec();
    let status = img::run(args, arguments, formats::drivers(), probe, output);
    ExitCode::from(status)
}

fn run_daemon(
    args: &DaemonArgs,
    given: &ArgMatches,
    background: Option<Background>,
) -> Result<(), Error> {
    let signals = Signals::register()?;
    let daemon = Daemon::new(args.process.config(), formats::drivers())?;
    let started = build_daemon(&daemon, args, given).and_then(|()| {
        let metrics = args.process.offer_metrics(&daemon)?;
        let pidfile = args.pidfile.as_deref().map(Pidfile::create).transpose()?;
        background.map_or(Ok(()), Background::ready)?;
        Ok((pidfile, metrics))
    });
    let outcome = match started {
        Ok(held) => {
            let outcome = run_ready(&daemon, &signals);
            drop(held);
            outcome
        }
        Err(error) => {
            // What was started before the mistake is stopped in order.
            if let Err(second) = daemon.stop() {
                tracing::warn!(error = %second.report(), "while stopping");
            }
            Err(error)
        }
    };
    daemon.service().stop();
    outcome
}

/// Does what the options say, in the order in which they stand.
fn build_daemon(daemon: &Rc<Daemon>, args: &DaemonArgs, given: &ArgMatches) -> Result<(), Error> {
    type Add = fn(&Rc<Daemon>, &str) -> Result<(), Error>;
    let kinds: [(&str, &[String], Add); 6] = [
        ("blockdev", &args.blockdev, |daemon, text| {
            let options = daemon.control().read(|graph| node_options(text, graph))?;
            daemon.block_on(|daemon| async move { daemon.add_node(options).await })
        }),
        ("export", &args.export, |daemon, text| {
            let config = export_config(text)?;
            daemon.block_on(|daemon| async move { daemon.add_export(config).await })
        }),
        ("nbd_server", &args.nbd_server, |daemon, text| {
            let (value, form) = parse_value(text, "addr.type")?;
            let options = daemon.service().commands().parse_option(&value, form)?;
            daemon.start_nbd_server(&ServerOptions::from_flag(options, daemon.control())?)
        }),
        ("object", &args.object, |daemon, text| {
            let (value, form) = parse_value(text, "qom-type")?;
            let service = daemon.service();
            let options = service.commands().parse_option(&value, form)?;
            Ok(service.objects().add(options)?)
        }),
        ("chardev", &args.chardev, |daemon, text| {
            let (id, backend) = chardev::parse_chardev(text)?;
            daemon.service().add_chardev(&id, &backend)?.wait(&backend)
        }),
        ("monitor", &args.monitor, |daemon, text| {
            let (value, form) = parse_value(text, "chardev")?;
            let service = daemon.service();
            let options = service.commands().parse_option(&value, form)?;
            Ok(service.add_monitor(&options)?)
        }),
    ];
    let mut all = Vec::new();
    for (name, texts, add) in &kinds {
        let places = given.indices_of(name).into_iter().flatten();
        all.extend(
            places
                .zip(*texts)
                .map(|(place, text)| (place, name, text, add)),
        );
    }
    all.sort_by_key(|(place, ..)| *place);
    for (_, name, text, add) in all {
        add(daemon, text).map_err(|error| {
            Error::new(
                error.kind(),
                format!("--{} {text}: {}", name.replace('_', "-"), error.report()),
            )
        })?;
    }
    Ok(())
}
