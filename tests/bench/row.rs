//! A row of the table: one way to load a disk.

use std::fmt;

use harness::driver::Waiting;
use harness::peer::Format;

/// Bytes of each request.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// One combination of everything that is varied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Row {
    // In the order in which rows are run: the page cache is filled and emptied once.
    cache: Cache,
    pub(crate) operation: Operation,
    /// Requests in flight in each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    client: Client,
}

/// Whether the back-end uses the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cache {
    Cached,
    Direct,
}

/// What the requests are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    Read,
    Write,
    /// A write to a cluster of a new image that has none yet.
    First,
}

/// How the client learns of completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Client {
    Eventfd,
    Polling,
}

impl Row {
    /// Every row for disks in `format`, in the order in which they are run.
    pub(crate) fn all(format: Format) -> impl Iterator<Item = Self> {
        let mut rows = Vec::new();
        let operations: &[Operation] = match format {
            Format::Raw => &[Operation::Read, Operation::Write],
            Format::Qcow2 => &[Operation::Read, Operation::Write, Operation::First],
        };
        for cache in [Cache::Cached, Cache::Direct] {
            for &operation in operations {
                for depth in [1, 32] {
                    for queues in [1, 2] {
                        for client in [Client::Eventfd, Client::Polling] {
                            rows.push(Self {
                                cache,
                                operation,
                                depth,
                                queues,
                                client,
                            });
                        }
                    }
                }
            }
        }
        rows.into_iter()
    }

    /// Whether a short run shows this row.
    pub(crate) fn is_typical(self) -> bool {
        let cached = self.cache == Cache::Cached;
        match self.client {
            Client::Eventfd => self.depth == 32 && self.queues == if cached { 1 } else { 2 },
            Client::Polling => cached && self.depth == 1 && self.queues == 1,
        }
    }

    pub(crate) fn is_direct(self) -> bool {
        self.cache == Cache::Direct
    }

    pub(crate) fn waiting(self) -> Waiting {
        match self.client {
            Client::Eventfd => Waiting::Eventfd,
            Client::Polling => Waiting::Polling,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = match self.operation {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::First => "first write",
        };
        let client = match self.client {
            Client::Eventfd => "eventfd",
            Client::Polling => "polling",
        };
        let cache = match self.cache {
            Cache::Cached => "cached",
            Cache::Direct => "O_DIRECT",
        };
        write!(
            formatter,
            "{operation} qd{} {}q {client} {cache}",
            self.depth, self.queues
        )
    }
}
