//! [`NodeState`]: what all plans that reach a node share of it.
//!
//! Threads: any. Everything here is an atomic, or behind a lock that is held for a look. On the path of
//! a request whose plan asks for nothing it is read, and written only when something is exceeded.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::IoError;
use crate::graph::NodeId;
use crate::io::flush::Generation;
use crate::io::status::StatusCache;
use crate::io::tracked::Tracker;
use crate::io::uses::Servers;
use crate::mailbox::Mailbox;

/// Something that a worker tells the control thread, without waiting for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A write went past the threshold of a node, which is off again.
    WriteThreshold {
        /// Which node.
        node: Arc<str>,
        /// What it was, in bytes.
        threshold: u64,
        /// How far the write went beyond it.
        exceeded_bytes: u64,
    },
    /// The length of a node has changed.
    Resized {
        /// Which node.
        node: NodeId,
    },
    /// What a node kept of a moment is lost: something could not be copied before it changed.
    SnapshotLost {
        /// Which node.
        node: Arc<str>,
        /// Why not.
        error: IoError,
    },
    /// An image contradicts its format.
    Corrupt {
        /// Which node.
        node: Arc<str>,
        /// What is wrong.
        message: String,
        /// Where, in bytes.
        offset: Option<u64>,
        /// How much of it.
        bytes: Option<u64>,
        /// The node can be used no more.
        fatal: bool,
    },
}

/// See the module's header.
pub struct NodeState {
    id: NodeId,
    name: Arc<str>,
    bytes: AtomicU64,
    /// What the driver said last.
    said_bytes: AtomicU64,
    /// The smaller of the highest byte written so far and the threshold: writes below it concern
    /// nobody.
    watermark: AtomicU64,
    watched: Mutex<Watched>,
    /// What has been told of corruption: one of the values below.
    told_corruption: AtomicU8,
    notices: Arc<Mailbox<Notice>>,
    pub(crate) tracker: Tracker,
    pub(crate) generation: Generation,
    pub(crate) servers: Servers,
    pub(crate) status_cache: StatusCache,
}

const TOLD_NOTHING: u8 = 0;
const TOLD_CORRUPT: u8 = 1;
const TOLD_FATAL: u8 = 2;

#[derive(Default)]
struct Watched {
    highest: u64,
    threshold: Option<u64>,
}

impl NodeState {
    /// The state of a node that is being opened; `notices` is the control thread's.
    pub fn new(id: NodeId, name: Arc<str>, notices: Arc<Mailbox<Notice>>) -> Arc<Self> {
        Arc::new(Self {
            id,
            name,
            bytes: AtomicU64::new(0),
            said_bytes: AtomicU64::new(0),
            watermark: AtomicU64::new(0),
            watched: Mutex::default(),
            told_corruption: AtomicU8::new(TOLD_NOTHING),
            notices,
            tracker: Tracker::default(),
            generation: Generation::default(),
            servers: Servers::default(),
            status_cache: StatusCache::default(),
        })
    }

    /// Which node this is.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Its length in bytes, now.
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Sets what the length is known to be; returns whether that is another one.
    pub(crate) fn set_bytes(&self, bytes: u64) -> bool {
        self.said_bytes.store(bytes, Ordering::Release);
        self.bytes.swap(bytes, Ordering::AcqRel) != bytes
    }

    /// As [`set_bytes`](Self::set_bytes), but only if the driver says something new: it need not know of
    /// writes that have made the node longer since.
    pub(crate) fn follow_bytes(&self, bytes: u64) -> bool {
        self.said_bytes.load(Ordering::Acquire) != bytes && self.set_bytes(bytes)
    }

    /// A write at the end has made the node at least so long.
    pub(crate) fn grow_to(&self, bytes: u64) -> bool {
        self.bytes.fetch_max(bytes, Ordering::AcqRel) < bytes
    }

    /// A write ends at `end`.
    #[inline]
    pub(crate) fn wrote_to(&self, end: u64) {
        if end > self.watermark.load(Ordering::Relaxed) {
            self.wrote_further(end);
        }
    }

    #[cold]
    fn wrote_further(&self, end: u64) {
        let mut watched = self.watched();
        watched.highest = watched.highest.max(end);
        let crossed = watched.threshold.filter(|threshold| end > *threshold);
        if let Some(threshold) = crossed {
            watched.threshold = None;
            self.notices.post(Notice::WriteThreshold {
                node: Arc::clone(&self.name),
                threshold,
                exceeded_bytes: end - threshold,
            });
        }
        self.set_watermark(&watched);
    }

    /// Has the first write that ends beyond `threshold` bytes told, once; `None`: none.
    pub fn set_write_threshold(&self, threshold: Option<u64>) {
        let mut watched = self.watched();
        watched.threshold = threshold;
        self.set_watermark(&watched);
    }

    /// The threshold that waits to be crossed.
    pub fn write_threshold(&self) -> Option<u64> {
        self.watched().threshold
    }

    /// The end of the furthest write so far, in bytes.
    pub fn highest_write(&self) -> u64 {
        self.watched().highest
    }

    /// Tells the control thread something, without waiting.
    pub fn notify(&self, notice: Notice) {
        self.notices.post(notice);
    }

    /// Has the control thread told that the image contradicts its format, at `offset` and for `bytes` bytes
    /// where that is known. Of a node that is told once, and once more if the node can be used no more
    /// (`fatal`): a broken image is found broken by every request.
    ///
    /// Returns whether it is told.
    pub fn report_corruption(
        &self,
        message: impl Into<String>,
        offset: Option<u64>,
        bytes: Option<u64>,
        fatal: bool,
    ) -> bool {
        let news = if fatal { TOLD_FATAL } else { TOLD_CORRUPT };
        if self.told_corruption.fetch_max(news, Ordering::Relaxed) >= news {
            return false;
        }
        self.notify(Notice::Corrupt {
            node: Arc::clone(&self.name),
            message: message.into(),
            offset,
            bytes,
            fatal,
        });
        true
    }

    /// The image has been repaired: what is found from now on is told anew.
    pub fn forget_corruption(&self) {
        self.told_corruption.store(TOLD_NOTHING, Ordering::Relaxed);
    }

    fn set_watermark(&self, watched: &Watched) {
        let threshold = watched.threshold.unwrap_or(u64::MAX);
        let mark = watched.highest.min(threshold);
        self.watermark.store(mark, Ordering::Relaxed);
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().expect("no panic while looking")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mailbox::{Sleeper, Wake};

    struct Nobody;

    impl Wake for Nobody {
        fn wake(&self) {}
    }

    #[test]
    fn a_threshold_is_told_once_and_only_of_writes_beyond_it() {
        let notices = Mailbox::new(Sleeper::new(Box::new(Nobody)));
        let state = NodeState::new(NodeId::default(), "disk".into(), Arc::clone(&notices));
        let told = || {
            let mut told = Vec::new();
            notices.take(&mut told);
            told.len()
        };
        state.wrote_to(4096);
        state.set_write_threshold(Some(4096));
        state.wrote_to(4096);
        assert_eq!((told(), state.highest_write()), (0, 4096));
        state.wrote_to(1024);
        state.wrote_to(8192);
        state.wrote_to(12288);
        assert_eq!((told(), state.highest_write()), (1, 12288));
        assert_eq!(state.write_threshold(), None);
        // Set below what has been written: the next write beyond it counts, far from the end or not.
        state.set_write_threshold(Some(512));
        state.wrote_to(1024);
        assert_eq!((told(), state.highest_write()), (1, 12288));
    }

    #[test]
    fn corruption_is_told_once_and_once_more_when_it_becomes_fatal() {
        let notices = Mailbox::new(Sleeper::new(Box::new(Nobody)));
        let state = NodeState::new(NodeId::default(), "disk".into(), Arc::clone(&notices));
        let told = || {
            let mut told = Vec::new();
            notices.take(&mut told);
            told
        };
        let notice = |message: &str, offset, bytes, fatal| Notice::Corrupt {
            node: "disk".into(),
            message: message.into(),
            offset,
            bytes,
            fatal,
        };
        assert!(state.report_corruption("a table is not aligned", Some(512), None, false));
        assert!(!state.report_corruption("another one", Some(1024), None, false));
        let first = notice("a table is not aligned", Some(512), None, false);
        assert_eq!(told(), [first]);
        assert!(state.report_corruption("data over metadata", Some(0), Some(4096), true));
        assert!(!state.report_corruption("data over metadata", Some(0), Some(4096), true));
        assert!(!state.report_corruption("a third one", None, None, false));
        let second = notice("data over metadata", Some(0), Some(4096), true);
        assert_eq!(told(), [second]);
        state.forget_corruption();
        assert!(state.report_corruption("a table is not aligned", None, None, false));
        assert_eq!(told().len(), 1);
    }
}
