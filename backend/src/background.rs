//! `--daemonize`: going on in the background once all is started.
//!
//! Whoever asked waits for that, and learns how it went. A fork keeps one thread of many, so it would have
//! to come before any thread and library has begun; we start our own program anew instead, with the same
//! arguments, whose standard output is a pipe on which it says that it is ready. No unsafe code is needed
//! for it, and nothing of the parent is left in the child.
//!
//! The working directory stays, as sockets and files may be named relative to it.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};

use blockcore::{Error, ErrorKind};

/// Tells the child what it is.
const VARIABLE: &str = "STONEWORK_IN_BACKGROUND";
/// What it says when it is ready.
const READY: u8 = b'0';

/// The end of starting in the background.
pub struct Background(());

impl Background {
    /// Whether this process is the one in the background; it leaves its terminal.
    pub fn enter() -> Option<Self> {
        std::env::var_os(VARIABLE)?;
        // It leads a session already if it was started as one; that is as good.
        let _ = rustix::process::setsid();
        Some(Self(()))
    }

    /// Says that all is started, and lets go of the terminal's output.
    ///
    /// # Errors
    ///
    /// The host's refusal.
    pub fn ready(self) -> Result<(), Error> {
        let failed = |error: std::io::Error| {
            let message = format!("cannot go to the background: {error}");
            Error::new(ErrorKind::Io, message)
        };
        let mut out = std::io::stdout();
        out.write_all(&[READY])
            .and_then(|()| out.flush())
            .map_err(failed)?;
        let mut options = OpenOptions::new();
        let null = options
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(failed)?;
        let quiet =
            rustix::stdio::dup2_stdout(&null).and_then(|()| rustix::stdio::dup2_stderr(&null));
        quiet.map_err(|errno| Error::host("cannot go to the background", errno))
    }
}

/// Starts this program with these arguments in the background, and waits until it is ready or has failed,
/// having said why.
///
/// # Errors
///
/// The host's refusal to start it.
pub fn start(arguments: &[String]) -> Result<ExitCode, Error> {
    let failed = |error: std::io::Error| {
        let message = format!("cannot start in the background: {error}");
        Error::new(ErrorKind::Io, message)
    };
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(program)
        .args(arguments.get(1..).unwrap_or_default())
        .env(VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = [0];
    let mut pipe = child.stdout.take().expect("it was asked for");
    if pipe.read_exact(&mut said).is_ok() && said == [READY] {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait().map_err(failed)?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    // One that ends without having been ready has failed, whatever it says.
    Ok(ExitCode::from(code.filter(|code| *code != 0).unwrap_or(1)))
}
