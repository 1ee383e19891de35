//! A cell of the table: one back-end in one row, all rounds.

use std::fmt;

use clap::ValueEnum;
use harness::peer::{Aio, Program};

use crate::load::Measurement;

/// Who serves the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// Ours
    Stonework,
    /// qemu-storage-daemon, with the way to do I/O that suits it best in the row
    Qsd,
    /// A plain disk on vhost-user-backend
    Baseline,
    /// Ours, on the raw file whatever the others serve
    Raw,
    /// Nobody: the client does the same I/O itself with io_uring, which is a limit of a kind
    Direct,
    /// Nobody: the client calls pread and pwrite, one request after the other
    Syscalls,
}

impl Backend {
    /// What to start, or `None` if the client is on its own.
    pub(crate) fn program(self, aio: Aio) -> Option<Program> {
        match self {
            Backend::Stonework | Backend::Raw => Some(Program::Stonework),
            Backend::Qsd => Some(Program::StorageDaemon(aio)),
            Backend::Baseline => Some(Program::Baseline),
            Backend::Direct | Backend::Syscalls => None,
        }
    }

    pub(crate) fn is_present(self) -> bool {
        self.program(Aio::Threads)
            .is_none_or(|program| program.executable().is_some())
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Backend::Stonework => "stonework",
            Backend::Qsd => "qsd",
            Backend::Baseline => "baseline",
            Backend::Raw => "raw",
            Backend::Direct => "direct",
            Backend::Syscalls => "syscalls",
        })
    }
}

/// Everything measured of one back-end in one row.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) backend: Backend,
    /// Meaningful for `qemu-storage-daemon` only.
    pub(crate) aio: Aio,
    pub(crate) rounds: Vec<Measurement>,
}

/// A median, and between what it lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) most: f64,
}

impl Cell {
    pub(crate) fn new(backend: Backend, aio: Aio) -> Self {
        Self {
            backend,
            aio,
            rounds: Vec::new(),
        }
    }

    /// The back-end's name, with what was chosen for it.
    pub(crate) fn label(&self) -> String {
        match self.backend {
            Backend::Qsd => format!("qsd ({})", self.aio),
            backend => backend.to_string(),
        }
    }

    pub(crate) fn spread(&self, of: impl Fn(&Measurement) -> f64) -> Spread {
        Spread::of(self.rounds.iter().map(of).collect())
    }

    /// How many times `other`'s value ours is, round by round.
    pub(crate) fn ratio(&self, other: &Cell, of: impl Fn(&Measurement) -> f64) -> Spread {
        let rounds = self.rounds.iter().zip(&other.rounds);
        Spread::of(rounds.map(|(one, other)| of(one) / of(other)).collect())
    }
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let Some((&least, &most)) = values.first().zip(values.last()) else {
            return Self {
                least: f64::NAN,
                median: f64::NAN,
                most: f64::NAN,
            };
        };
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Self {
            least,
            median,
            most,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_rounds_is_between_the_middle_two() {
        let spread = Spread::of(vec![4.0, 1.0, 10.0, 2.0]);
        assert_eq!(
            spread,
            Spread {
                least: 1.0,
                median: 3.0,
                most: 10.0
            }
        );
    }

    #[test]
    fn the_median_of_an_odd_number_of_rounds_is_one_of_them() {
        assert_eq!(Spread::of(vec![9.0, 1.0, 4.0]).median, 4.0);
    }
}
