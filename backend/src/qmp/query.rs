//! Commands that tell of nodes and how they hang together.

use std::collections::BTreeMap;
use std::rc::Rc;

use blockcore::graph::permission::Permissions;
use blockcore::graph::{Graph, LineEnd, NodeId};
use blockcore::io::account::{HistogramSum, Kind};

use super::Service;
use super::command::Commands;
use super::info::{self, BlockDeviceInfo};
use crate::export::Export;
use crate::qapi::{Member, Members, Object, Qapi, QmpError, Schema};
use crate::{qapi_enum, qapi_struct};

qapi_struct! {
    /// How nodes are told of.
    pub struct QueryNamedBlockNodes {
        /// Whether backing images are left out of their overlays' part; they are nodes of their own.
        flat: Option<bool> = "flat",
    }
}

qapi_struct! {
    /// What is counted for whom.
    pub struct QueryBlockstats {
        /// Whether for nodes, and not for devices.
        query_nodes: Option<bool> = "query-nodes",
    }
}

qapi_struct! {
    /// A device, of which there are none here: exports are told of by `query-block-exports`.
    pub struct BlockInfo {
        /// Its name.
        device: String = "device",
        /// What kind of device.
        kind: String = "type",
        /// Whether its medium can be changed.
        removable: bool = "removable",
        /// Whether it is locked.
        locked: bool = "locked",
        /// What is in it.
        inserted: Option<BlockDeviceInfo> = "inserted",
    }
}

macro_rules! counters {
    ($($(#[$about:meta])* $field:ident,)*) => {
        /// What is counted.
        #[derive(Clone, Debug, Default)]
        pub struct BlockDeviceStats {
            $($(#[$about])* pub $field: u64,)*
            /// Whether requests that made no sense are counted.
            pub account_invalid: bool,
            /// Whether requests that failed are counted.
            pub account_failed: bool,
            /// How long nothing has been asked for, in nanoseconds.
            pub idle_time_ns: Option<u64>,
            /// How long reads took, if that is counted.
            pub rd_latency_histogram: Option<LatencyHistogram>,
            /// How long writes took, if that is counted.
            pub wr_latency_histogram: Option<LatencyHistogram>,
            /// How long flushes took, if that is counted.
            pub flush_latency_histogram: Option<LatencyHistogram>,
        }

        impl Object for BlockDeviceStats {
            fn take(members: &mut Members<'_>) -> Result<Self, QmpError> {
                let _: Vec<TimedStats> = members.take("timed_stats")?;
                Ok(Self {
                    $($field: members.take(stringify!($field))?,)*
                    account_invalid: members.take("account_invalid")?,
                    account_failed: members.take("account_failed")?,
                    idle_time_ns: members.take("idle_time_ns")?,
                    rd_latency_histogram: members.take("rd_latency_histogram")?,
                    wr_latency_histogram: members.take("wr_latency_histogram")?,
                    flush_latency_histogram: members.take("flush_latency_histogram")?,
                })
            }

            fn put(&self, map: &mut serde_json::Map<String, serde_json::Value>) {
                $(map.insert(stringify!($field).into(), self.$field.into());)*
                map.insert("account_invalid".into(), self.account_invalid.into());
                map.insert("account_failed".into(), self.account_failed.into());
                map.insert("timed_stats".into(), serde_json::Value::Array(Vec::new()));
                let idle = self.idle_time_ns.map(|time| ("idle_time_ns".to_owned(), time.into()));
                map.extend(idle);
                for (name, histogram) in [
                    ("rd_latency_histogram", &self.rd_latency_histogram),
                    ("wr_latency_histogram", &self.wr_latency_histogram),
                    ("flush_latency_histogram", &self.flush_latency_histogram),
                ] {
                    map.extend(histogram.emit().map(|bins| (name.to_owned(), bins)));
                }
            }

            fn list(schema: &mut Schema) -> Vec<Member> {
                let number = u64::describe(schema);
                let flag = bool::describe(schema);
                let timed = Vec::<TimedStats>::describe(schema);
                let histogram = LatencyHistogram::describe(schema);
                let member = |name: &str, kind: &str, optional| Member {
                    name: name.to_owned(),
                    kind: kind.to_owned(),
                    optional,
                };
                let mut all = vec![
                    member("account_invalid", &flag, false),
                    member("account_failed", &flag, false),
                    member("timed_stats", &timed, false),
                    member("idle_time_ns", &number, true),
                    member("rd_latency_histogram", &histogram, true),
                    member("wr_latency_histogram", &histogram, true),
                    member("flush_latency_histogram", &histogram, true),
                ];
                all.extend([$(stringify!($field)),*].map(|name| member(name, &number, false)));
                all
            }
        }
    };
}

counters! {
    /// Bytes read.
    rd_bytes,
    /// Bytes written.
    wr_bytes,
    /// Bytes appended to zones.
    zone_append_bytes,
    /// Bytes discarded.
    unmap_bytes,
    /// Reads.
    rd_operations,
    /// Writes.
    wr_operations,
    /// Appends to zones.
    zone_append_operations,
    /// Flushes.
    flush_operations,
    /// Discards.
    unmap_operations,
    /// How long reads took, in nanoseconds.
    rd_total_time_ns,
    /// How long writes took.
    wr_total_time_ns,
    /// How long appends took.
    zone_append_total_time_ns,
    /// How long flushes took.
    flush_total_time_ns,
    /// How long discards took.
    unmap_total_time_ns,
    /// The end of the furthest write, in bytes.
    wr_highest_offset,
    /// Reads that were joined with others.
    rd_merged,
    /// Writes that were joined with others.
    wr_merged,
    /// Appends that were joined with others.
    zone_append_merged,
    /// Discards that were joined with others.
    unmap_merged,
    /// Reads that failed.
    failed_rd_operations,
    /// Writes that failed.
    failed_wr_operations,
    /// Appends that failed.
    failed_zone_append_operations,
    /// Flushes that failed.
    failed_flush_operations,
    /// Discards that failed.
    failed_unmap_operations,
    /// Reads that made no sense.
    invalid_rd_operations,
    /// Writes that made no sense.
    invalid_wr_operations,
    /// Appends that made no sense.
    invalid_zone_append_operations,
    /// Flushes that made no sense.
    invalid_flush_operations,
    /// Discards that made no sense.
    invalid_unmap_operations,
}

impl Qapi for BlockDeviceStats {
    fn parse(input: crate::qapi::Input<'_>) -> Result<Self, QmpError> {
        crate::qapi::parse_object(input)
    }

    fn emit(&self) -> Option<serde_json::Value> {
        Some(crate::qapi::emit_object(self))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.object::<Self>("BlockDeviceStats")
    }
}

qapi_struct! {
    /// How many requests took how long.
    pub struct LatencyHistogram {
        /// Between the bins, in nanoseconds.
        boundaries: Vec<u64> = "boundaries",
        /// Requests in each bin: one more than there are boundaries.
        bins: Vec<u64> = "bins",
    }
}

impl From<&HistogramSum> for LatencyHistogram {
    fn from(sum: &HistogramSum) -> Self {
        Self {
            boundaries: sum.boundaries_ns.to_vec(),
            bins: sum.bins.clone(),
        }
    }
}

qapi_struct! {
    /// Counters of the last while, of which there are none yet.
    pub struct TimedStats {
        /// How long that while is, in seconds.
        interval_length: i64 = "interval_length",
    }
}

qapi_struct! {
    /// What a file's driver counts.
    pub struct FileStats {
        /// The driver.
        driver: String = "driver",
        /// Discards that were done.
        discard_nb_ok: u64 = "discard-nb-ok",
        /// Discards that failed.
        discard_nb_failed: u64 = "discard-nb-failed",
        /// Bytes that were discarded.
        discard_bytes_ok: u64 = "discard-bytes-ok",
    }
}

qapi_struct! {
    /// What is counted of a node.
    pub struct BlockStats {
        /// A device's name.
        device: Option<String> = "device",
        /// The node's name.
        node_name: Option<String> = "node-name",
        /// The counters.
        stats: BlockDeviceStats = "stats",
        /// What only its driver counts.
        driver_specific: Option<FileStats> = "driver-specific",
        /// The same of the node below.
        parent: Option<Box<BlockStats>> = "parent",
        /// Of a device, the same of the backing node.
        backing: Option<Box<BlockStats>> = "backing",
    }
}

qapi_enum! {
    /// What is drawn.
    pub enum XDbgBlockGraphNodeType {
        /// A user from outside, such as an export.
        BlockBackend = "block-backend",
        /// A job.
        BlockJob = "block-job",
        /// A node.
        BlockDriver = "block-driver",
    }
}

qapi_struct! {
    /// Something that is drawn.
    pub struct XDbgBlockGraphNode {
        /// Its number in this drawing.
        id: u64 = "id",
        /// What it is.
        kind: XDbgBlockGraphNodeType = "type",
        /// Its name.
        name: String = "name",
    }
}

qapi_enum! {
    /// A permission.
    pub enum BlockPermission {
        /// To read what is complete and of one moment.
        ConsistentRead = "consistent-read",
        /// To write.
        Write = "write",
        /// To write what is there already.
        WriteUnchanged = "write-unchanged",
        /// To change the length.
        Resize = "resize",
    }
}

qapi_struct! {
    /// An edge.
    pub struct XDbgBlockGraphEdge {
        /// From.
        parent: u64 = "parent",
        /// To.
        child: u64 = "child",
        /// What the one calls the other.
        name: String = "name",
        /// What the parent needs.
        perm: Vec<BlockPermission> = "perm",
        /// What it lets others have.
        shared_perm: Vec<BlockPermission> = "shared-perm",
    }
}

qapi_struct! {
    /// Nodes, their users and how they hang together.
    pub struct XDbgBlockGraph {
        /// The nodes and users.
        nodes: Vec<XDbgBlockGraphNode> = "nodes",
        /// The edges.
        edges: Vec<XDbgBlockGraphEdge> = "edges",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("query-named-block-nodes", query_nodes);
    commands.add("query-block", |_, (): ()| async {
        Ok(Vec::<BlockInfo>::new())
    });
    commands.add("query-blockstats", query_stats);
    commands.add("x-debug-query-block-graph", query_graph);
}

async fn query_nodes(
    service: Rc<Service>,
    arguments: QueryNamedBlockNodes,
) -> Result<Vec<BlockDeviceInfo>, QmpError> {
    let control = service.control();
    let ids: Vec<_> = control.read(|graph| graph.nodes().map(|node| node.id()).collect());
    let chain = !arguments.flat.unwrap_or(false);
    let mut all = Vec::new();
    for id in ids {
        all.extend(info::device(control, id, chain).await);
    }
    Ok(all)
}

async fn query_stats(
    service: Rc<Service>,
    arguments: QueryBlockstats,
) -> Result<Vec<BlockStats>, QmpError> {
    if !arguments.query_nodes.unwrap_or(false) {
        let exports = service.daemon()?.exports();
        let exports = exports
            .iter()
            .map(|view| export_stats(&service, &view.export));
        return Ok(exports.collect());
    }
    let all = service.control().read(|graph| {
        let nodes = graph.nodes();
        nodes
            .map(|node| stats(graph, node.id()))
            .collect::<Option<_>>()
    });
    Ok(all.unwrap_or_default())
}

/// What was counted of an export's requests, and below its node.
fn export_stats(service: &Service, export: &Export) -> BlockStats {
    let id = &export.config().id;
    let name = service.node_of(id);
    let node = service.control().read(|graph| {
        let node = graph.node(name.as_deref()?).ok()?;
        stats(graph, node.id())
    });
    let sum = export.account();
    let kind = |kind| sum.kind(kind);
    let (read, write, zero) = (kind(Kind::Read), kind(Kind::Write), kind(Kind::WriteZeroes));
    let (flush, unmap) = (kind(Kind::Flush), kind(Kind::Discard));
    let histogram = |kind: Kind| {
        sum.kind(kind)
            .histogram
            .as_ref()
            .map(LatencyHistogram::from)
    };
    BlockStats {
        device: Some(id.clone()),
        node_name: name,
        stats: BlockDeviceStats {
            rd_bytes: read.bytes,
            rd_operations: read.operations,
            rd_total_time_ns: read.time_ns,
            rd_merged: read.merged,
            failed_rd_operations: read.failed,
            invalid_rd_operations: read.invalid,
            wr_bytes: write.bytes + zero.bytes,
            wr_operations: write.operations + zero.operations,
            wr_total_time_ns: write.time_ns + zero.time_ns,
            wr_merged: write.merged + zero.merged,
            failed_wr_operations: write.failed + zero.failed,
            invalid_wr_operations: write.invalid + zero.invalid,
            flush_operations: flush.operations,
            flush_total_time_ns: flush.time_ns,
            failed_flush_operations: flush.failed,
            invalid_flush_operations: flush.invalid,
            unmap_bytes: unmap.bytes,
            unmap_operations: unmap.operations,
            unmap_total_time_ns: unmap.time_ns,
            unmap_merged: unmap.merged,
            failed_unmap_operations: unmap.failed,
            invalid_unmap_operations: unmap.invalid,
            wr_highest_offset: node.as_ref().map_or(0, |node| node.stats.wr_highest_offset),
            account_invalid: true,
            account_failed: true,
            idle_time_ns: sum.idle().map(|idle| idle.as_nanos() as u64),
            rd_latency_histogram: histogram(Kind::Read),
            wr_latency_histogram: histogram(Kind::Write),
            flush_latency_histogram: histogram(Kind::Flush),
            ..BlockDeviceStats::default()
        },
        driver_specific: None,
        parent: node.map(Box::new),
        backing: None,
    }
}

fn stats(graph: &Graph, id: NodeId) -> Option<BlockStats> {
    let node = graph.node_by_id(id)?;
    let counted: BTreeMap<_, _> = node.io().statistics().into_iter().collect();
    let count = |name: &str| counted.get(name).copied().unwrap_or(0);
    let is_file = matches!(node.driver_name(), "file" | "host_device");
    let below = graph
        .primary_child(id)
        .and_then(|below| stats(graph, below));
    Some(BlockStats {
        device: None,
        node_name: Some(node.name().to_owned()),
        stats: BlockDeviceStats {
            wr_highest_offset: node.state().highest_write(),
            ..BlockDeviceStats::default()
        },
        driver_specific: is_file.then(|| FileStats {
            driver: node.driver_name().to_owned(),
            discard_nb_ok: count("discard-nb-ok"),
            discard_nb_failed: count("discard-nb-failed"),
            discard_bytes_ok: count("discard-bytes-ok"),
        }),
        parent: below.map(Box::new),
        backing: None,
    })
}

async fn query_graph(service: Rc<Service>, (): ()) -> Result<XDbgBlockGraph, QmpError> {
    Ok(service.control().read(drawing))
}

fn drawing(graph: &Graph) -> XDbgBlockGraph {
    let lines = graph.lines();
    let mut numbers = BTreeMap::new();
    let mut nodes = Vec::new();
    let ids = graph
        .nodes()
        .map(|node| (LineEnd::Node(node.id()), node.name().to_owned()));
    let users = lines.iter().map(|line| line.from);
    let users = users.filter(|end| matches!(end, LineEnd::Root(_)));
    for (end, name) in ids.chain(users.map(|end| (end, String::new()))) {
        let id = numbers.len() as u64 + 1;
        if numbers.contains_key(&end) {
            continue;
        }
        numbers.insert(end, id);
        let kind = match end {
            LineEnd::Node(_) => XDbgBlockGraphNodeType::BlockDriver,
            LineEnd::Root(_) => XDbgBlockGraphNodeType::BlockBackend,
        };
        nodes.push(XDbgBlockGraphNode { id, kind, name });
    }
    let edge = |line: &blockcore::graph::Line| XDbgBlockGraphEdge {
        parent: numbers[&line.from],
        child: numbers[&LineEnd::Node(line.to)],
        name: line.name.to_owned(),
        perm: permissions(line.needs),
        shared_perm: permissions(line.shares),
    };
    let edges = lines.iter().map(edge).collect();
    XDbgBlockGraph { nodes, edges }
}

fn permissions(set: Permissions) -> Vec<BlockPermission> {
    let words = [
        (
            Permissions::CONSISTENT_READ,
            BlockPermission::ConsistentRead,
        ),
        (Permissions::WRITE, BlockPermission::Write),
        (
            Permissions::WRITE_UNCHANGED,
            BlockPermission::WriteUnchanged,
        ),
        (Permissions::RESIZE, BlockPermission::Resize),
    ];
    let mine = words.into_iter().filter(|(bit, _)| set.contains(*bit));
    mine.map(|(_, word)| word).collect()
}
