//! Rate limits, for nodes and for jobs.
//!
//! [`Limits`] are what an operator sets, [`PROPERTIES`] their names. A [`Group`] applies them to the
//! requests of its [`Member`]s together: one member for each throttle node or root. A job that moves
//! data at a set speed has a [`RateLimit`] of its own.
//!
//! Requests are delayed, never failed. The arithmetic is the leaky bucket that operators know from
//! QEMU: a bucket fills by what is admitted and leaks at the set rate, and whoever finds it full
//! waits. The one difference is how much it holds where no burst is set; see `bucket.rs`.
//!
//! Not here: which requests are throttled. As in QEMU those are reads, writes, and, as writes, zeroes
//! and discards; a flush is not.

mod bucket;
mod group;
mod registry;
mod speed;

pub use self::group::{Group, Member, MemberStats};
pub use self::registry::{GroupUse, Groups};
pub use self::speed::RateLimit;

use crate::Error;

/// The highest rate, burst, and total of a burst, in requests or bytes: as QEMU has it.
pub const MAX_VALUE: u64 = 1_000_000_000_000_000;

/// Which way a request moves data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the node.
    Read,
    /// To the node, by whatever kind of request.
    Write,
}

/// One limit. Its unit is requests or bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units per second in the long run; 0 is no limit.
    pub average: u64,
    /// Units per second during a burst; 0 is no burst.
    pub burst: u64,
    /// How long such a burst may last, in seconds, when nothing went before it. At 1, the default, a
    /// burst is so many units at once, however fast.
    pub burst_seconds: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            average: 0,
            burst: 0,
            burst_seconds: 1,
        }
    }
}

impl Rate {
    /// So many units per second, without bursts; 0 is no limit.
    pub fn per_second(average: u64) -> Self {
        Self {
            average,
            ..Self::default()
        }
    }

    fn is_set(&self) -> bool {
        self.average > 0 || self.burst > 0
    }
}

/// The limits of a group. The default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests, reads and writes together.
    pub iops_total: Rate,
    /// Read requests.
    pub iops_read: Rate,
    /// Write requests.
    pub iops_write: Rate,
    /// Bytes, reads and writes together.
    pub bps_total: Rate,
    /// Bytes read.
    pub bps_read: Rate,
    /// Bytes written.
    pub bps_write: Rate,
    /// A request of more bytes than this counts as as many requests as it has times so many bytes,
    /// fractions too; 0 counts every request as one.
    pub iops_size_bytes: u64,
}

impl Limits {
    /// Whether these limit nothing.
    pub fn is_unlimited(&self) -> bool {
        self.rates().iter().all(|(_, rate)| rate.average == 0)
    }

    /// Checks that the limits make sense together.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`], naming the property: a total beside a limit of one direction of the
    /// same unit, a burst without or below its average, a burst length of zero or without a burst,
    /// `iops-size` without a limit of requests, and what exceeds [`MAX_VALUE`].
    pub fn check(&self) -> Result<(), Error> {
        let rates = self.rates();
        for [total, read, write] in [[0, 1, 2], [3, 4, 5]] {
            for one in [read, write] {
                if rates[total].1.is_set() && rates[one].1.is_set() {
                    return Err(Error::invalid(format!(
                        "'{}' limits reads and writes together, and excludes '{}'",
                        rates[total].0, rates[one].0
                    )));
                }
            }
        }
        if self.iops_size_bytes > 0 && !rates[..3].iter().any(|(_, rate)| rate.average > 0) {
            return Err(Error::invalid(
                "'iops-size' needs a limit of requests, such as 'iops-total'",
            ));
        }
        rates.iter().try_for_each(|(name, rate)| rate.check(name))
    }

    fn rates(&self) -> [(&'static str, Rate); 6] {
        [
            ("iops-total", self.iops_total),
            ("iops-read", self.iops_read),
            ("iops-write", self.iops_write),
            ("bps-total", self.bps_total),
            ("bps-read", self.bps_read),
            ("bps-write", self.bps_write),
        ]
    }
}

impl Rate {
    fn check(&self, name: &str) -> Result<(), Error> {
        let refused = |sentence: String| Err(Error::invalid(sentence));
        for (suffix, value) in [("", self.average), ("-max", self.burst)] {
            if value > MAX_VALUE {
                return refused(format!("'{name}{suffix}' must be at most {MAX_VALUE}"));
            }
        }
        if self.burst_seconds == 0 {
            return refused(format!("'{name}-max-length' must be at least 1 second"));
        }
        if self.burst == 0 && self.burst_seconds > 1 {
            return refused(format!("'{name}-max-length' needs '{name}-max'"));
        }
        if self.burst > 0 && self.average == 0 {
            return refused(format!("'{name}-max' needs '{name}'"));
        }
        if self.burst > 0 && self.burst < self.average {
            return refused(format!("'{name}-max' must not be below '{name}'"));
        }
        if self.burst > 0 && self.burst_seconds > MAX_VALUE / self.burst {
            return refused(format!(
                "'{name}-max-length' is too long: a burst may have {MAX_VALUE} units in all"
            ));
        }
        Ok(())
    }
}

/// One property of [`Limits`] by name: what options and control commands are parsed by, and what
/// queries and help are printed from.
#[derive(Debug)]
pub struct Property {
    /// Its name in a `limits` object, such as `iops-total-max`.
    pub name: &'static str,
    /// Its name as a property of the group itself, such as `x-iops-total-max`.
    pub x_name: &'static str,
    /// One line of help, with the unit.
    pub help: &'static str,
    place: fn(&mut Limits) -> &mut u64,
}

impl Property {
    /// The property of that name, in one of its spellings: `iops-total`, `limits.iops-total` or
    /// `x-iops-total`.
    pub fn find(name: &str) -> Option<&'static Self> {
        let inner = name.strip_prefix("limits.").unwrap_or(name);
        PROPERTIES
            .iter()
            .find(|property| property.name == inner || property.x_name == name)
    }

    /// Its value in `limits`.
    pub fn get(&self, limits: &Limits) -> u64 {
        let mut limits = *limits;
        *(self.place)(&mut limits)
    }

    /// Sets it. Whether it makes sense is seen when all are set: [`Limits::check`].
    pub fn set(&self, limits: &mut Limits, value: u64) {
        *(self.place)(limits) = value;
    }
}

/// The three properties of each rate, and `iops-size`.
macro_rules! properties {
    ($($name:literal $field:ident $what:literal,)*) => {
        &[
            $(
                Property {
                    name: $name,
                    x_name: concat!("x-", $name),
                    help: concat!($what, " per second in the long run; 0: no limit"),
                    place: |limits| &mut limits.$field.average,
                },
                Property {
                    name: concat!($name, "-max"),
                    x_name: concat!("x-", $name, "-max"),
                    help: concat!($what, " per second during a burst; 0: no burst"),
                    place: |limits| &mut limits.$field.burst,
                },
                Property {
                    name: concat!($name, "-max-length"),
                    x_name: concat!("x-", $name, "-max-length"),
                    help: concat!("seconds that a burst of ", $what, " may last"),
                    place: |limits| &mut limits.$field.burst_seconds,
                },
            )*
            Property {
                name: "iops-size",
                x_name: "x-iops-size",
                help: "bytes above which a request counts as several; 0: never",
                place: |limits| &mut limits.iops_size_bytes,
            },
        ]
    };
}

/// Every property, in the order in which they are listed.
pub static PROPERTIES: &[Property] = properties! {
    "iops-total" iops_total "requests",
    "iops-read" iops_read "reads",
    "iops-write" iops_write "writes",
    "bps-total" bps_total "bytes",
    "bps-read" bps_read "bytes read",
    "bps-write" bps_write "bytes written",
};

#[cfg(test)]
mod tests;
