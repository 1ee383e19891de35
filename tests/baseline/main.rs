//! `baseline`: a plain disk on the `vhost-user-backend` crate, to compare with.
//!
//! It serves one raw file the way users of that crate do: the crate's threads, event loop and
//! queues, data through io_uring whose completions arrive as one more descriptor in the crate's
//! epoll set. What the crate allows at no cost in complexity is done well (one lock per batch of
//! requests, one submission per batch, EVENT_IDX, guest memory used in place), so that a benchmark
//! against it says something about the crate's design and not about a careless user of it.
//!
//! It is for benchmarks and for comparing behaviour. It has neither image locks nor orderly stop.

mod disk;
mod queue;

use std::error::Error;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use disk::Disk;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

/// Serve a raw file on vhost-user-backend, for comparison.
#[derive(Parser)]
struct Arguments {
    /// The raw file to serve
    file: PathBuf,
    /// The Unix socket to listen on; whatever is there is replaced
    #[arg(long)]
    socket: PathBuf,
    /// Virtqueues, each with a thread of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=32))]
    queues: u16,
    /// Open the file with O_DIRECT
    #[arg(long)]
    direct: bool,
}

fn main() -> ExitCode {
    match serve(&Arguments::parse()) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("baseline: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves one front-end after the other.
///
/// The crate's daemon can be used for one connection only, so each front-end gets a new one,
/// threads and all.
fn serve(arguments: &Arguments) -> Result<std::convert::Infallible, Box<dyn Error>> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if arguments.direct { libc::O_DIRECT } else { 0 })
        .open(&arguments.file)?;
    let mut listener = Listener::new(&arguments.socket, true)?;
    println!(
        "serving {} on {}",
        arguments.file.display(),
        arguments.socket.display()
    );
    loop {
        let disk = Arc::new(Disk::new(file.try_clone()?, usize::from(arguments.queues))?);
        let mut daemon =
            VhostUserDaemon::new("baseline".to_owned(), Arc::clone(&disk), disk.memory())
                .map_err(|error| error.to_string())?;
        disk.listen_for_completions(&daemon.get_epoll_handlers())?;
        daemon
            .start(&mut listener)
            .map_err(|error| error.to_string())?;
        // A front-end that goes away ends its connection with one of several errors, none of
        // which is of interest: the next one is served all the same.
        let _ = daemon.wait();
    }
}
