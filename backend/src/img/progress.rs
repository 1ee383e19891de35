//! [`Progress`]: how far a long verb is, for whoever waits.
//!
//! With `-p` a bar on a terminal, and `qemu-img`'s line `(12.50/100%)` anywhere else, which programs
//! read. Without it a line on standard error each time the process gets `SIGUSR1`.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::SIGUSR1;

use super::Output;

/// Units of a bar: hundredths of a percent.
const WHOLE: u64 = 10_000;
/// Percent between two of the lines that programs read.
const STEP: f64 = 1.0;

enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines(Output),
}

/// See the module's header.
pub(super) struct Progress {
    shown: Shown,
    asked: Arc<AtomicBool>,
    /// Percent that was shown last; below zero for nothing yet.
    last: Cell<f64>,
}

impl Progress {
    /// Shown if `wanted`, else only when a signal asks for it.
    pub(super) fn new(output: &Output, wanted: bool) -> Self {
        let asked = Arc::new(AtomicBool::new(false));
        // Without the handler the signal ends us, as it always did.
        if let Err(error) = signal_hook::flag::register(SIGUSR1, Arc::clone(&asked)) {
            tracing::debug!(%error, "cannot handle SIGUSR1");
        }
        let shown = match (wanted, std::io::stdout().is_terminal()) {
            (false, _) => Shown::Nothing,
            (true, true) => Shown::Bar(bar()),
            (true, false) => Shown::Lines(Output::clone(output)),
        };
        let progress = Self {
            shown,
            asked,
            last: Cell::new(-STEP),
        };
        progress.at(0, 1);
        progress
    }

    /// So much of the whole is done.
    pub(super) fn at(&self, done: u64, whole: u64) {
        let percent = match whole {
            0 => 100.0,
            whole => (done.min(whole) as f64) * 100.0 / (whole as f64),
        };
        if self.asked.swap(false, Ordering::Relaxed) {
            let _ = writeln!(std::io::stderr(), "    ({percent:.2}/100%)");
        }
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.set_position((percent * WHOLE as f64 / 100.0) as u64),
            Shown::Lines(output) if percent >= self.last.get() + STEP || percent >= 100.0 => {
                self.last.set(percent);
                let mut output = output.borrow_mut();
                // Who does not read it does not want to know.
                let _ = write!(output, "    ({percent:.2}/100%)\r");
                let _ = output.flush();
            }
            Shown::Lines(_) => {}
        }
    }

    /// All is done.
    pub(super) fn finish(&self) {
        self.at(1, 1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.abandon(),
            Shown::Lines(output) => {
                let _ = writeln!(output.borrow_mut());
            }
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(WHOLE), ProgressDrawTarget::stdout());
    let style =
        ProgressStyle::with_template("{wide_bar} {percent_precise}%  {elapsed} (left {eta})");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
