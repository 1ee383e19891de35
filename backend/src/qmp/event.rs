//! Events: what monitors are told without having asked.
//!
//! Names and data are QEMU's; clients break on others. One that may come with every request of a guest is
//! limited to one a second for each disk: the first goes out at once, of the others in that second the last.

use std::collections::BTreeMap;
use std::time::Duration;

use blockcore::io::policy::Action;
use blockcore::job::{JobEvent, JobView};
use blockcore::node;
use serde_json::{Value, json};

use super::jobs::{JobStatus, JobType};
use crate::qapi::{Qapi, Schema};
use crate::worker::{self, HoldEvent};
use crate::{qapi_enum, qapi_struct};

/// Between two events of a kind that is limited.
pub const INTERVAL: Duration = Duration::from_secs(1);

qapi_struct! {
    /// A write has gone past the threshold of a node, which is off again.
    pub struct BlockWriteThreshold {
        /// Which node.
        node_name: String = "node-name",
        /// How far it went, in bytes.
        amount_exceeded: u64 = "amount-exceeded",
        /// The threshold, in bytes.
        write_threshold: u64 = "write-threshold",
    }
}

qapi_struct! {
    /// An image contradicts its format.
    pub struct BlockImageCorrupted {
        /// Nothing: nodes have no devices here.
        device: String = "device",
        /// Which node.
        node_name: Option<String> = "node-name",
        /// What is wrong.
        msg: String = "msg",
        /// Where, in bytes.
        offset: Option<u64> = "offset",
        /// How much, in bytes.
        size: Option<u64> = "size",
        /// Whether the node can be used no more.
        fatal: bool = "fatal",
    }
}

qapi_struct! {
    /// An export is gone, and its name free again.
    pub struct BlockExportDeleted {
        /// Which.
        id: String = "id",
    }
}

qapi_enum! {
    /// What kind of request failed.
    pub enum IoOperation {
        /// It was to read.
        Read = "read",
        /// It was to write.
        Write = "write",
    }
}

qapi_enum! {
    /// What became of a request that failed.
    pub enum IoAction {
        /// Its guest was told that it had succeeded.
        Ignore = "ignore",
        /// Its guest was told.
        Report = "report",
        /// It is held.
        Stop = "stop",
    }
}

qapi_struct! {
    /// A guest's request failed.
    pub struct BlockIoError {
        /// Nothing: exports are no objects.
        qom_path: String = "qom-path",
        /// The export's name.
        device: String = "device",
        /// The node below it.
        node_name: Option<String> = "node-name",
        /// What it was.
        operation: IoOperation = "operation",
        /// What became of it.
        action: IoAction = "action",
        /// Whether the host had no space.
        nospace: Option<bool> = "nospace",
        /// What was met, for a person.
        reason: String = "reason",
    }
}

qapi_struct! {
    /// A job is in another state.
    pub struct JobStatusChange {
        /// Which.
        id: String = "id",
        /// The state.
        status: JobStatus = "status",
    }
}

qapi_struct! {
    /// A job is over.
    pub struct BlockJobCompleted {
        /// What kind of job.
        kind: JobType = "type",
        /// Which.
        device: String = "device",
        /// How much there was to do, in bytes.
        len: i64 = "len",
        /// How much was done, in bytes.
        offset: i64 = "offset",
        /// Bytes per second, at most.
        speed: i64 = "speed",
        /// Why it failed, if it did.
        error: Option<String> = "error",
    }
}

qapi_struct! {
    /// A job can be completed, or is over as it was told to give up.
    pub struct BlockJobProgress {
        /// What kind of job.
        kind: JobType = "type",
        /// Which.
        device: String = "device",
        /// How much there is to do, in bytes.
        len: i64 = "len",
        /// How much is done, in bytes.
        offset: i64 = "offset",
        /// Bytes per second, at most.
        speed: i64 = "speed",
    }
}

qapi_struct! {
    /// A job waits to be finalized.
    pub struct BlockJobPending {
        /// What kind of job.
        kind: JobType = "type",
        /// Which.
        id: String = "id",
    }
}

qapi_struct! {
    /// A job could not read or write something.
    pub struct BlockJobError {
        /// Which.
        device: String = "device",
        /// What it was.
        operation: IoOperation = "operation",
        /// What becomes of it.
        action: IoAction = "action",
    }
}

macro_rules! events {
    ($($variant:ident($type:ty) = $name:literal,)*) => {
        /// What happened.
        #[derive(Clone, Debug)]
        pub enum Event {
            $(#[doc = concat!("`", $name, "`")] $variant($type),)*
        }

        impl Event {
            /// QEMU's word for it.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name,)* }
            }

            fn data(&self) -> Value {
                match self { $(Self::$variant(data) => crate::qapi::emit_object(data),)* }
            }

            /// Describes all events.
            pub(super) fn describe_all(schema: &mut Schema) {
                $(
                    let data = <$type as Qapi>::describe(schema);
                    schema.event($name, &data);
                )*
            }

            /// The names of all events.
            pub const NAMES: &[&str] = &[$($name),*];
        }
    };
}

events! {
    BlockImageCorrupted(BlockImageCorrupted) = "BLOCK_IMAGE_CORRUPTED",
    BlockIoError(BlockIoError) = "BLOCK_IO_ERROR",
    BlockWriteThreshold(BlockWriteThreshold) = "BLOCK_WRITE_THRESHOLD",
    BlockExportDeleted(BlockExportDeleted) = "BLOCK_EXPORT_DELETED",
    JobStatusChange(JobStatusChange) = "JOB_STATUS_CHANGE",
    BlockJobReady(BlockJobProgress) = "BLOCK_JOB_READY",
    BlockJobPending(BlockJobPending) = "BLOCK_JOB_PENDING",
    BlockJobCompleted(BlockJobCompleted) = "BLOCK_JOB_COMPLETED",
    BlockJobCancelled(BlockJobProgress) = "BLOCK_JOB_CANCELLED",
    BlockJobError(BlockJobError) = "BLOCK_JOB_ERROR",
}

/// A number of bytes as clients have them.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl BlockJobProgress {
    fn new(job: &JobView) -> Self {
        Self {
            kind: JobType::of(job.kind),
            device: job.id.clone(),
            len: signed(job.total),
            offset: signed(job.done),
            speed: signed(job.speed),
        }
    }
}

impl Event {
    /// What happens to a node, if it is something that clients are told.
    pub(super) fn of_node(notice: &node::Notice) -> Option<Self> {
        match notice {
            node::Notice::WriteThreshold {
                node,
                threshold,
                exceeded_bytes,
            } => Some(Self::BlockWriteThreshold(BlockWriteThreshold {
                node_name: node.to_string(),
                amount_exceeded: *exceeded_bytes,
                write_threshold: *threshold,
            })),
            node::Notice::Corrupt {
                node,
                message,
                offset,
                bytes,
                fatal,
            } => Some(Self::BlockImageCorrupted(BlockImageCorrupted {
                device: String::new(),
                node_name: Some(node.to_string()),
                msg: message.clone(),
                offset: *offset,
                size: *bytes,
                fatal: *fatal,
            })),
            node::Notice::Resized { .. } | node::Notice::SnapshotLost { .. } => None,
        }
    }

    /// What happens to a request that failed, if it is something that clients are told.
    pub(super) fn of_request(notice: &worker::Notice, node_name: Option<String>) -> Option<Self> {
        let action = match notice.event {
            HoldEvent::Held => IoAction::Stop,
            HoldEvent::Ignored => IoAction::Ignore,
            HoldEvent::Reported => IoAction::Report,
            // It was told of when it was held.
            HoldEvent::GivenUp => return None,
        };
        Some(Self::BlockIoError(BlockIoError {
            qom_path: String::new(),
            device: notice.export.to_string(),
            node_name,
            operation: match notice.operation {
                worker::Operation::Read => IoOperation::Read,
                _ => IoOperation::Write,
            },
            action,
            nospace: Some(notice.no_space),
            reason: notice.message.clone(),
        }))
    }

    /// What happens to a job.
    pub(super) fn of_job(event: &JobEvent) -> Self {
        match event {
            JobEvent::StatusChange { id, state } => Self::JobStatusChange(JobStatusChange {
                id: id.clone(),
                status: JobStatus::of(*state),
            }),
            JobEvent::Ready(job) => Self::BlockJobReady(BlockJobProgress::new(job)),
            JobEvent::Cancelled(job) => Self::BlockJobCancelled(BlockJobProgress::new(job)),
            JobEvent::Pending(job) => Self::BlockJobPending(BlockJobPending {
                kind: JobType::of(job.kind),
                id: job.id.clone(),
            }),
            JobEvent::Completed(job) => Self::BlockJobCompleted(BlockJobCompleted {
                kind: JobType::of(job.kind),
                device: job.id.clone(),
                len: signed(job.total),
                offset: signed(job.done),
                speed: signed(job.speed),
                error: job.error.clone(),
            }),
            JobEvent::Error {
                id,
                is_read,
                action,
            } => Self::BlockJobError(BlockJobError {
                device: id.clone(),
                operation: match is_read {
                    true => IoOperation::Read,
                    false => IoOperation::Write,
                },
                action: match action {
                    Action::Report => IoAction::Report,
                    Action::Ignore => IoAction::Ignore,
                    Action::Stop => IoAction::Stop,
                },
            }),
        }
    }

    /// As it is sent, with the time since 1970 at which it happened.
    pub(super) fn message(&self, at: Duration) -> Value {
        json!({
            "event": self.name(),
            "data": self.data(),
            "timestamp": {"seconds": at.as_secs(), "microseconds": at.subsec_micros()},
        })
    }

    /// Of which one a second is sent; `None` if all are.
    fn limited_by(&self) -> Option<String> {
        match self {
            Self::BlockIoError(error) => Some(error.device.clone()),
            _ => None,
        }
    }
}

/// What is to be done with an event.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes out now.
    Send,
    /// It waits, and [`Limiter::due`] is to be asked at this time, unless that was said before.
    Wait(Option<Duration>),
}

/// Holds back what comes too often. Pure: told the time.
#[derive(Default)]
pub(super) struct Limiter {
    kinds: BTreeMap<String, Limited>,
}

struct Limited {
    next: Duration,
    waiting: Option<Value>,
}

impl Limiter {
    /// An event, as it would be sent, happens at `now`.
    pub(super) fn judge(&mut self, event: &Event, message: &Value, now: Duration) -> Verdict {
        let Some(key) = event.limited_by() else {
            return Verdict::Send;
        };
        // What is long over need not be remembered.
        self.kinds
            .retain(|_, kind| kind.waiting.is_some() || kind.next > now);
        match self.kinds.get_mut(&key) {
            Some(kind) => {
                let is_first = kind.waiting.is_none();
                kind.waiting = Some(message.clone());
                Verdict::Wait(is_first.then_some(kind.next))
            }
            None => {
                let next = now + INTERVAL;
                let waiting = None;
                self.kinds.insert(key, Limited { next, waiting });
                Verdict::Send
            }
        }
    }

    /// What has waited long enough at `now`, and goes out.
    pub(super) fn due(&mut self, now: Duration) -> Vec<Value> {
        let mut due = Vec::new();
        for kind in self.kinds.values_mut().filter(|kind| kind.next <= now) {
            if let Some(message) = kind.waiting.take() {
                kind.next = now + INTERVAL;
                due.push(message);
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(device: &str, reason: &str) -> Event {
        Event::BlockIoError(BlockIoError {
            qom_path: String::new(),
            device: device.into(),
            node_name: None,
            operation: IoOperation::Read,
            action: IoAction::Report,
            nospace: Some(false),
            reason: reason.into(),
        })
    }

    #[test]
    fn of_a_disks_errors_the_first_goes_out_and_then_the_last_of_each_second() {
        let mut limiter = Limiter::default();
        let mut told = |event: &Event, at: u64| {
            let message = event.message(Duration::ZERO);
            limiter.judge(event, &message, Duration::from_millis(at))
        };
        let second = Duration::from_millis(1100);
        assert_eq!(told(&error("a", "1"), 100), Verdict::Send);
        assert_eq!(told(&error("a", "2"), 200), Verdict::Wait(Some(second)));
        assert_eq!(told(&error("a", "3"), 300), Verdict::Wait(None));
        assert_eq!(told(&error("b", "1"), 300), Verdict::Send);
        let deleted = Event::BlockExportDeleted(BlockExportDeleted { id: "a".into() });
        assert_eq!(told(&deleted, 300), Verdict::Send);
        assert!(limiter.due(Duration::from_millis(1099)).is_empty());
        let due = limiter.due(second);
        assert_eq!(due.len(), 1);
        assert_eq!(due[0]["data"]["reason"], "3");
        // That one began a second of its own.
        let event = error("a", "4");
        let message = event.message(Duration::ZERO);
        let at = Duration::from_millis(1200);
        let verdict = limiter.judge(&event, &message, at);
        assert_eq!(verdict, Verdict::Wait(Some(Duration::from_millis(2100))));
    }
}
