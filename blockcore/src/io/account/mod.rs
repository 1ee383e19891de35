//! Accounting: what went through one root on one worker.
//!
//! The worker has the [`Recorder`], the only one who writes; anybody may have the [`Account`] and read
//! it. A record is a few plain stores to memory that is this worker's own: no lock, no shared write,
//! no allocation. What a disk did in all is the [`AccountSum`] of its accounts.
//!
//! Reading is not a snapshot: a request that ends meanwhile may be seen in one counter and not yet in
//! another.
//!
//! Which counters there are and what counts for which is as in QEMU's `query-blockstats`. An average
//! queue depth is the time that requests took, summed, over the time that passed.

mod histogram;
mod interval;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub use self::histogram::{Histogram, HistogramSum, MAX_BOUNDARIES};
pub use self::interval::Latencies;

use self::interval::Interval;
use crate::Error;
use crate::window::increase;

/// An account has interval statistics for at most so many lengths.
pub const MAX_INTERVALS: usize = 16;

/// What kind of request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A read.
    Read,
    /// A write of data.
    Write,
    /// A flush; its bytes are zero.
    Flush,
    /// A discard, which QEMU calls unmap.
    Discard,
    /// A write of zeroes. QEMU counts these as writes.
    WriteZeroes,
}

impl Kind {
    /// Every kind, in the order of the arrays indexed by it.
    pub const ALL: [Self; 5] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Discard,
        Self::WriteZeroes,
    ];
}

/// What is fixed when an account is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountOptions {
    /// Whether failed requests count for times and latencies (`stats-account-failed`).
    pub failed: bool,
    /// Whether invalid requests count as accesses (`stats-account-invalid`).
    pub invalid: bool,
    /// Lengths of the intervals over which latencies are kept, each above zero.
    pub intervals: Vec<Duration>,
}

impl Default for AccountOptions {
    fn default() -> Self {
        Self {
            failed: true,
            invalid: true,
            intervals: Vec::new(),
        }
    }
}

/// The counters of one root on one worker. See the module's header.
///
/// Aligned so that no two workers write to one cache line, nor to two that are fetched together.
#[repr(align(128))]
pub struct Account {
    options: AccountOptions,
    kinds: [Counters; 5],
    /// In nanoseconds on the engine's clock; 0 before the first.
    last_access_ns: AtomicU64,
    intervals: Vec<[Interval; 5]>,
    /// Rises with every change of histograms.
    histograms_version: AtomicU64,
    histograms: Mutex<Histograms>,
}

type Histograms = [Option<Arc<Histogram>>; 5];

#[derive(Default)]
struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    merged: AtomicU64,
    time_ns: AtomicU64,
}

impl Account {
    /// An empty account, and the one who writes it.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`] for an interval of no length, or more than [`MAX_INTERVALS`].
    pub fn open(options: AccountOptions, now: Duration) -> Result<(Arc<Self>, Recorder), Error> {
        if options.intervals.len() > MAX_INTERVALS {
            return Err(Error::invalid(format!(
                "there may be statistics of {MAX_INTERVALS} intervals, not of {}",
                options.intervals.len()
            )));
        }
        if options.intervals.iter().any(Duration::is_zero) {
            return Err(Error::invalid("an interval must be above zero"));
        }
        let lengths = options.intervals.iter();
        let account = Arc::new(Self {
            intervals: lengths
                .map(|length| std::array::from_fn(|_| Interval::new(nanos(*length), nanos(now))))
                .collect(),
            options,
            kinds: Default::default(),
            last_access_ns: AtomicU64::new(0),
            histograms_version: AtomicU64::new(0),
            histograms: Mutex::default(),
        });
        let recorder = Recorder {
            account: Arc::clone(&account),
            version: Cell::new(0),
            histograms: RefCell::default(),
        };
        Ok((account, recorder))
    }

    /// From now on latencies of `kind` are counted in the bins of `histogram`, or in none; the worker
    /// learns of it with its next request. Another account of the same root is given a histogram
    /// [like it](Histogram::fresh).
    pub fn set_histogram(&self, kind: Kind, histogram: Option<Histogram>) {
        let mut histograms = self.lock();
        histograms[kind as usize] = histogram.map(Arc::new);
        // Under the lock, so that whoever sees it and takes the lock finds what it stands for.
        increase(&self.histograms_version, 1);
    }

    fn lock(&self) -> MutexGuard<'_, Histograms> {
        self.histograms.lock().expect("no panic while copying")
    }
}

/// Who writes an account: its worker. Times are on the engine's clock.
///
/// There is one, and it cannot be shared:
///
/// ```compile_fail
/// fn shared<T: Sync>() {}
/// shared::<blockcore::io::account::Recorder>();
/// ```
pub struct Recorder {
    account: Arc<Account>,
    version: Cell<u64>,
    histograms: RefCell<Histograms>,
}

impl Recorder {
    /// The account, to read.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// A request that began at `start` has ended well.
    pub fn done(&self, kind: Kind, bytes: u64, start: Duration, now: Duration) {
        let counters = &self.account.kinds[kind as usize];
        increase(&counters.operations, 1);
        increase(&counters.bytes, bytes);
        self.took(kind, start, now, true);
    }

    /// A request that began at `start` has failed.
    pub fn failed(&self, kind: Kind, start: Duration, now: Duration) {
        increase(&self.account.kinds[kind as usize].failed, 1);
        self.took(kind, start, now, self.account.options.failed);
    }

    /// A request was refused since it made no sense.
    pub fn invalid(&self, kind: Kind, now: Duration) {
        increase(&self.account.kinds[kind as usize].invalid, 1);
        if self.account.options.invalid {
            self.accessed(now);
        }
    }

    /// So many requests were joined with others; those are not counted as operations.
    pub fn merged(&self, kind: Kind, requests: u64) {
        increase(&self.account.kinds[kind as usize].merged, requests);
    }

    fn took(&self, kind: Kind, start: Duration, now: Duration, counts: bool) {
        let latency_ns = nanos(now.saturating_sub(start));
        self.count_latency(kind, latency_ns);
        if !counts {
            return;
        }
        increase(&self.account.kinds[kind as usize].time_ns, latency_ns);
        self.accessed(now);
        for interval in &self.account.intervals {
            interval[kind as usize].count(latency_ns, nanos(now));
        }
    }

    fn accessed(&self, now: Duration) {
        let last = &self.account.last_access_ns;
        last.store(nanos(now), Ordering::Relaxed);
    }

    fn count_latency(&self, kind: Kind, latency_ns: u64) {
        let version = self.account.histograms_version.load(Ordering::Relaxed);
        if version != self.version.get() {
            let histograms = self.account.lock();
            let version = self.account.histograms_version.load(Ordering::Relaxed);
            self.version.set(version);
            self.histograms.borrow_mut().clone_from(&histograms);
        }
        if let Some(histogram) = &self.histograms.borrow()[kind as usize] {
            histogram.count(latency_ns);
        }
    }
}

/// What several accounts hold together: what queries print.
#[derive(Clone, Debug)]
pub struct AccountSum {
    kinds: [KindSum; 5],
    last_access: Option<Duration>,
    intervals: BTreeMap<Duration, [Latencies; 5]>,
    now: Duration,
}

/// The counters of one kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindSum {
    /// Requests that ended well.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that made no sense.
    pub invalid: u64,
    /// Requests that were joined with others.
    pub merged: u64,
    /// How long all that ended took, together. Over the time between two looks, what it has risen is
    /// the average queue depth.
    pub time_ns: u64,
    /// Latencies by bins, if they are counted.
    pub histogram: Option<HistogramSum>,
}

impl AccountSum {
    /// The sum of no accounts, looked at `now`.
    pub fn new(now: Duration) -> Self {
        Self {
            kinds: Default::default(),
            last_access: None,
            intervals: BTreeMap::new(),
            now,
        }
    }

    /// Adds what an account holds.
    pub fn add(&mut self, account: &Account) {
        let last_ns = account.last_access_ns.load(Ordering::Relaxed);
        if last_ns > 0 {
            self.last_access = self.last_access.max(Some(Duration::from_nanos(last_ns)));
        }
        let histograms = account.lock().clone();
        for kind in Kind::ALL.map(|kind| kind as usize) {
            let mut counters = account.kinds[kind].read();
            counters.histogram = histograms[kind].as_ref().map(|one| one.read());
            self.kinds[kind].add(&counters);
        }
        for (length, intervals) in account.options.intervals.iter().zip(&account.intervals) {
            let sums = self.intervals.entry(*length).or_default();
            for (sum, interval) in sums.iter_mut().zip(intervals) {
                sum.add(&interval.read(nanos(self.now)));
            }
        }
    }

    /// Adds a sum of before, of accounts that are gone. What they held of intervals is over.
    pub fn add_past(&mut self, past: &Self) {
        self.last_access = self.last_access.max(past.last_access);
        for (sum, past) in self.kinds.iter_mut().zip(&past.kinds) {
            sum.add(past);
        }
    }

    /// The counters of one kind.
    pub fn kind(&self, kind: Kind) -> &KindSum {
        &self.kinds[kind as usize]
    }

    /// How long ago the last request ended; `None` if there was none.
    pub fn idle(&self) -> Option<Duration> {
        let last = self.last_access?;
        Some(self.now.saturating_sub(last))
    }

    /// The lengths of the intervals over which latencies are kept, ascending.
    pub fn intervals(&self) -> impl Iterator<Item = Duration> {
        self.intervals.keys().copied()
    }

    /// Latencies over the last interval of that length, or of its later half at least.
    pub fn latencies(&self, interval: Duration, kind: Kind) -> Option<&Latencies> {
        let kinds = self.intervals.get(&interval)?;
        Some(&kinds[kind as usize])
    }
}

impl KindSum {
    /// Adds another kind's counters, or the same kind's of another account. Histograms add up if they
    /// have the same boundaries; for the moment in which they are being changed they may not, and the
    /// first one is kept.
    pub fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.bytes = self.bytes.wrapping_add(other.bytes);
        self.failed += other.failed;
        self.invalid += other.invalid;
        self.merged += other.merged;
        self.time_ns = self.time_ns.wrapping_add(other.time_ns);
        match (&mut self.histogram, &other.histogram) {
            (Some(sum), Some(other)) => sum.add(other),
            (sum, other) => *sum = sum.take().or_else(|| other.clone()),
        }
    }
}

impl Counters {
    fn read(&self) -> KindSum {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        KindSum {
            operations: value(&self.operations),
            bytes: value(&self.bytes),
            failed: value(&self.failed),
            invalid: value(&self.invalid),
            merged: value(&self.merged),
            time_ns: value(&self.time_ns),
            histogram: None,
        }
    }
}

fn nanos(time: Duration) -> u64 {
    // Enough for 584 years. In 64 bits all the way, for the sake of each request.
    let seconds = time.as_secs().saturating_mul(1_000_000_000);
    seconds.saturating_add(u64::from(time.subsec_nanos()))
}

#[cfg(test)]
mod tests;
