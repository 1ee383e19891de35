//! Signals, as descriptors that the control thread watches.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockcore::engine::{Engine, WatchId};
use blockcore::{Error, ErrorKind};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::low_level::pipe;

/// The process's signals: those that stop it, and `SIGUSR1`, which prints counters.
pub struct Signals {
    stop: Arc<OwnedFd>,
    stop_requested: Arc<AtomicBool>,
    report: Arc<OwnedFd>,
}

impl Signals {
    /// Takes the signals over, for the whole process.
    ///
    /// # Errors
    ///
    /// The host's refusal.
    pub fn register() -> Result<Self, Error> {
        let failed = |error: std::io::Error| {
            Error::new(ErrorKind::Io, format!("cannot handle signals: {error}"))
        };
        let (stop, stop_end) = UnixStream::pair().map_err(failed)?;
        let stop_requested = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&stop_requested)).map_err(failed)?;
            pipe::register(signal, stop_end.try_clone().map_err(failed)?).map_err(failed)?;
        }
        // A write past the longest file that this process may have is an error to its guest. Without a
        // handler it would end the process.
        let written_too_far = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGXFSZ, written_too_far).map_err(failed)?;
        let (report, report_end) = UnixStream::pair().map_err(failed)?;
        pipe::register(SIGUSR1, report_end).map_err(failed)?;
        Ok(Self {
            stop: Arc::new(stop.into()),
            stop_requested,
            report: Arc::new(report.into()),
        })
    }

    /// Whether a signal has asked the process to stop.
    pub fn stop_requested(&self) -> bool {
        self.stop_requested.load(Ordering::Relaxed)
    }

    /// Watches: the first for signals that stop the process, the second for `SIGUSR1`.
    pub fn watch(&self, engine: &dyn Engine) -> [WatchId; 2] {
        [
            engine.watch(Arc::clone(&self.stop)),
            engine.watch(Arc::clone(&self.report)),
        ]
    }
}
