//! Planted faults: mistakes that a test can make this crate make, to see that the simulation finds
//! them.
//!
//! One build holds them all behind the feature `planted-faults`, which nothing but the tests enables;
//! which one is active is chosen at run time. Without the feature [`is_planted`] is `false` for the
//! compiler too, and nothing of this is left.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Fault {
    /// Requests do not wait for a serialising one that overlaps.
    SerialisingWait = 1,
    /// The status cache survives zeroing and discarding.
    StatusCache,
    /// A drained section begins without waiting for requests in flight.
    DrainWait,
    /// A parent is granted what another does not share.
    PermissionCheck,
    /// The rest of a widened write's units is not read before.
    EdgeRead,
    /// A flush does not reach the host.
    Flush,
    /// Changes are not marked in dirty bitmaps.
    DirtyMark,
    /// Changes are marked in dirty bitmaps when they begin, and not when they end.
    DirtyMarkEarly,
    /// A reopen that is given up leaves what it had prepared.
    ReopenAbort,
    /// What was resolved before a wait is used after it.
    SecondResolve,
    /// A plan is changed with requests in flight.
    PlanWithoutDrain,
    /// The first flush of a life finds nothing to do.
    FlushElidedAfterRestart,
    /// qcow2: entries are copied for the image after the flush of what they point to.
    EntriesCopiedLate,
    /// qcow2: entries are written before the counts of what they point to.
    EntriesBeforeCounts,
    /// A flush joins the round that runs.
    JoinRunningRound,
    /// qcow2: a cluster that was let go of is used again before that is durable.
    NoLimbo,
    /// qcow2: a cluster that was let go of is used again while somebody uses it still.
    NoWaitForUsers,
    /// qcow2: a new table keeps what its cluster held.
    TableNotCleared,
    /// qcow2: an image does not say that its bitmaps are out of date before it is written to.
    BitmapsNotInUse,
    /// qcow2: bitmaps that were stored are named before they are durable.
    BitmapsNamedEarly,
    /// Jobs: a mark falls after what it stands for has been copied, and not before.
    MarkFallsLate,
    /// Jobs: what guests write is not marked for the mirror above it.
    MirrorMark,
    /// Jobs: a mirror takes its source's place with something left to copy.
    PivotWithRest,
    /// Jobs: a write that goes to both ends may be overtaken by a copy.
    MirrorTurn,
    /// Jobs: what guests overwrite is not kept for a backup.
    BackupTurn,
}

impl Fault {
    /// Those of the qcow2 driver, with their names.
    pub const QCOW2: [(&'static str, Self); 6] = [
        ("entries-copied-late", Self::EntriesCopiedLate),
        ("entries-before-counts", Self::EntriesBeforeCounts),
        ("join-running-round", Self::JoinRunningRound),
        ("no-limbo", Self::NoLimbo),
        ("no-wait-for-users", Self::NoWaitForUsers),
        ("table-not-cleared", Self::TableNotCleared),
    ];

    /// Those of the qcow2 driver that concern bitmaps, with their names.
    pub const BITMAPS: [(&'static str, Self); 2] = [
        ("bitmaps-not-in-use", Self::BitmapsNotInUse),
        ("bitmaps-named-early", Self::BitmapsNamedEarly),
    ];

    /// Those of jobs, with their names.
    pub const JOBS: [(&'static str, Self); 5] = [
        ("mark-falls-late", Self::MarkFallsLate),
        ("mirror-mark", Self::MirrorMark),
        ("pivot-with-rest", Self::PivotWithRest),
        ("mirror-turn", Self::MirrorTurn),
        ("backup-turn", Self::BackupTurn),
    ];

    /// Those of the block layer itself, with their names.
    pub const CORE: [(&'static str, Self); 12] = [
        ("serialising-wait", Self::SerialisingWait),
        ("status-cache", Self::StatusCache),
        ("drain-wait", Self::DrainWait),
        ("permission-check", Self::PermissionCheck),
        ("edge-read", Self::EdgeRead),
        ("flush", Self::Flush),
        ("dirty-mark", Self::DirtyMark),
        ("dirty-mark-early", Self::DirtyMarkEarly),
        ("reopen-abort", Self::ReopenAbort),
        ("second-resolve", Self::SecondResolve),
        ("plan-without-drain", Self::PlanWithoutDrain),
        ("flush-elided-after-restart", Self::FlushElidedAfterRestart),
    ];
}

#[cfg(feature = "planted-faults")]
mod planted {
    use std::cell::Cell;

    thread_local! {
        // A simulation is one thread; tests beside it are others.
        static ACTIVE: Cell<u8> = const { Cell::new(0) };
    }

    /// Makes `fault`, or none, on this thread from now on.
    pub fn plant(fault: Option<super::Fault>) {
        ACTIVE.set(fault.map_or(0, |fault| fault as u8));
    }

    /// Whether `fault` is to be made.
    pub fn is_planted(fault: super::Fault) -> bool {
        ACTIVE.get() == fault as u8
    }
}

#[cfg(feature = "planted-faults")]
pub use planted::{is_planted, plant};

/// Whether `fault` is to be made.
#[cfg(not(feature = "planted-faults"))]
#[inline(always)]
pub const fn is_planted(fault: Fault) -> bool {
    let _ = fault;
    false
}
