//! Latency histograms with boundaries that an operator has chosen.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;
use crate::window::increase;

/// A histogram has at most so many boundaries.
pub const MAX_BOUNDARIES: usize = 1024;

/// How many requests took how long, by bins that an operator has chosen.
#[derive(Debug)]
pub struct Histogram {
    boundaries_ns: Arc<[u64]>,
    bins: Box<[AtomicU64]>,
}

impl Histogram {
    /// Empty bins between `boundaries_ns`: one more than there are boundaries. A latency on a boundary
    /// belongs to the bin above it.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`] for boundaries that do not ascend from above zero, or more than
    /// [`MAX_BOUNDARIES`].
    pub fn new(boundaries_ns: &[u64]) -> Result<Self, Error> {
        if boundaries_ns.len() > MAX_BOUNDARIES {
            return Err(Error::invalid(format!(
                "a latency histogram may have {MAX_BOUNDARIES} boundaries, not {}",
                boundaries_ns.len()
            )));
        }
        let mut last = 0;
        for boundary in boundaries_ns {
            if *boundary <= last {
                return Err(Error::invalid(format!(
                    "the boundaries of a latency histogram must ascend from above 0, and \
                     {boundary} follows {last}"
                )));
            }
            last = *boundary;
        }
        Ok(Self::empty(boundaries_ns.into()))
    }

    /// An empty histogram with the same boundaries, for another account.
    pub fn fresh(&self) -> Self {
        Self::empty(Arc::clone(&self.boundaries_ns))
    }

    fn empty(boundaries_ns: Arc<[u64]>) -> Self {
        let bins = (0..=boundaries_ns.len()).map(|_| AtomicU64::new(0));
        Self {
            bins: bins.collect(),
            boundaries_ns,
        }
    }

    pub(super) fn count(&self, latency_ns: u64) {
        let bin = self.boundaries_ns.partition_point(|one| *one <= latency_ns);
        increase(&self.bins[bin], 1);
    }

    pub(super) fn read(&self) -> HistogramSum {
        let bins = self.bins.iter();
        HistogramSum {
            boundaries_ns: Arc::clone(&self.boundaries_ns),
            bins: bins.map(|bin| bin.load(Ordering::Relaxed)).collect(),
        }
    }
}

/// The bins of a histogram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistogramSum {
    /// Between the bins, in nanoseconds.
    pub boundaries_ns: Arc<[u64]>,
    /// Requests in each bin: one more than there are boundaries.
    pub bins: Vec<u64>,
}

impl HistogramSum {
    /// Adds bins with the same boundaries; any other are left out.
    pub(super) fn add(&mut self, other: &Self) {
        if self.boundaries_ns != other.boundaries_ns {
            return;
        }
        for (sum, bin) in self.bins.iter_mut().zip(&other.bins) {
            *sum += bin;
        }
    }
}
