//! Commands that add, remove and tell of exports, and of their guests' requests.
//!
//! `block-export-resume` and `query-block-requests` are ours, as is what `query-block-exports` says of
//! front-ends and held requests.

use std::rc::Rc;
use std::time::Duration;

use blockcore::graph::{Graph, RootId};
use blockcore::io::account::Kind;

use super::Service;
use super::command::Commands;
use crate::daemon::Removal;
use crate::export::Export;
use crate::nbd;
use crate::qapi::QmpError;
use crate::qapi::export::ExportOptions;
use crate::virtio::blk::Request;
use crate::{qapi_enum, qapi_struct};

qapi_enum! {
    /// Whether an export is removed from under a front-end.
    pub enum BlockExportRemoveMode {
        /// Only if no front-end is connected.
        Safe = "safe",
        /// The connection is ended.
        Hard = "hard",
    }
}

qapi_struct! {
    /// An export to be removed.
    pub struct BlockExportDel {
        /// Which.
        id: String = "id",
        /// Whether from under a front-end; not by default.
        mode: Option<BlockExportRemoveMode> = "mode",
    }
}

qapi_struct! {
    /// An export.
    pub struct BlockExportInfo {
        /// Its name.
        id: String = "id",
        /// What kind of export.
        kind: String = "type",
        /// The node that its guest reads and writes.
        node_name: String = "node-name",
        /// It is being removed.
        shutting_down: bool = "shutting-down",
        /// A front-end is connected.
        connected: bool = "connected",
        /// Where front-ends connect; over NBD it is where the server listens.
        socket: Option<String> = "socket",
        /// How many of its guest's requests failed and are held.
        held_requests: u64 = "held-requests",
        /// Whether it was stopped for a failure, if it can be: `ok`, `failed`, `nospace`.
        io_status: Option<String> = "io-status",
    }
}

qapi_struct! {
    /// An export whose held requests are tried again.
    pub struct BlockExportResume {
        /// Which.
        id: String = "id",
    }
}

qapi_enum! {
    /// How far a request is.
    pub enum RequestPhase {
        /// It is on its way through the graph, or the host's.
        InFlight = "in-flight",
        /// It failed, and waits to be resumed.
        Held = "held",
    }
}

qapi_struct! {
    /// A guest's request that is not completed.
    pub struct BlockRequestInfo {
        /// Of which export.
        export: String = "export",
        /// The node that the export offers.
        node_name: String = "node-name",
        /// Its image.
        file: Option<String> = "file",
        /// What it asks for.
        kind: String = "kind",
        /// Where, in bytes.
        offset: u64 = "offset",
        /// How much, in bytes.
        bytes: u64 = "bytes",
        /// How long ago it was taken from its queue, in nanoseconds.
        age_ns: u64 = "age-ns",
        /// How far it is.
        phase: RequestPhase = "phase",
        /// The worker or the queue that has it.
        place: u64 = "place",
        /// What it met, if it is held.
        error: Option<String> = "error",
    }
}

qapi_struct! {
    /// Bins in which latencies are to be counted.
    pub struct BlockLatencyHistogramSet {
        /// Of which export.
        id: String = "id",
        /// Boundaries between bins in nanoseconds, for all kinds that are not named below; without any,
        /// nothing is counted any more.
        boundaries: Option<Vec<u64>> = "boundaries",
        /// Of reads.
        boundaries_read: Option<Vec<u64>> = "boundaries-read",
        /// Of writes.
        boundaries_write: Option<Vec<u64>> = "boundaries-write",
        /// Of flushes.
        boundaries_flush: Option<Vec<u64>> = "boundaries-flush",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("block-export-add", block_export_add);
    commands.add("block-export-del", block_export_del);
    commands.add("block-export-resume", block_export_resume);
    commands.add("query-block-exports", query_block_exports);
    commands.add("query-block-requests", query_block_requests);
    commands.add("block-latency-histogram-set", block_latency_histogram_set);
}

async fn block_export_add(
    service: Rc<Service>,
    ExportOptions(config): ExportOptions,
) -> Result<(), QmpError> {
    service.daemon()?.add_export(config).await?;
    Ok(())
}

async fn block_export_del(service: Rc<Service>, arguments: BlockExportDel) -> Result<(), QmpError> {
    let removal = match arguments.mode {
        Some(BlockExportRemoveMode::Hard) => Removal::Hard,
        Some(BlockExportRemoveMode::Safe) | None => Removal::Safe,
    };
    let removing = service.daemon()?.remove_export(&arguments.id, removal)?;
    if !removing.had_front_end {
        // As soon done as said: clients of QEMU go on to remove the node.
        removing.gone().await;
    }
    Ok(())
}

fn find(service: &Service, id: &str) -> Result<Rc<Export>, QmpError> {
    let export = service.daemon()?.export(id);
    export.ok_or_else(|| QmpError::generic(format!("Export '{id}' is not found")))
}

async fn block_export_resume(
    service: Rc<Service>,
    arguments: BlockExportResume,
) -> Result<(), QmpError> {
    find(&service, &arguments.id)?.resume().await;
    Ok(())
}

async fn query_block_exports(
    service: Rc<Service>,
    (): (),
) -> Result<Vec<BlockExportInfo>, QmpError> {
    let mut all = Vec::new();
    for view in service.daemon()?.exports() {
        let (export, config) = (&view.export, view.export.config());
        let held = export.held().await;
        all.push(BlockExportInfo {
            id: config.id.clone(),
            kind: "vhost-user-blk".to_owned(),
            node_name: service.node_of(&config.id).unwrap_or_default(),
            shutting_down: view.is_going,
            connected: view.is_connected,
            socket: Some(config.socket.name()),
            held_requests: held.len() as u64,
            io_status: export.io_status().map(|status| status.name().to_owned()),
        });
    }
    for export in service.daemon()?.nbd_exports() {
        let config = export.config();
        all.push(BlockExportInfo {
            id: config.id.clone(),
            kind: nbd::config::TYPE.to_owned(),
            node_name: node_name(&service, export.root()),
            shutting_down: export.is_going(),
            connected: export.connections() > 0,
            socket: None,
            held_requests: 0,
            io_status: None,
        });
    }
    Ok(all)
}

async fn query_block_requests(
    service: Rc<Service>,
    (): (),
) -> Result<Vec<BlockRequestInfo>, QmpError> {
    let daemon = service.daemon()?;
    let mut all = Vec::new();
    // Requests that somebody's disk is working on; the rest is filled in for each.
    let of = |export: String, root: RootId, kind: &str, place: u64| BlockRequestInfo {
        export,
        node_name: node_name(&service, root),
        file: daemon.image_of(root),
        kind: kind.to_owned(),
        offset: 0,
        bytes: 0,
        age_ns: 0,
        phase: RequestPhase::InFlight,
        place,
        error: None,
    };
    let nanoseconds = |age: Duration| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
    for (export, root, worker, request) in daemon.under_way().await {
        let now = service.control().context().engine().now();
        let kind = format!("{:?}", request.kind).to_lowercase();
        all.push(BlockRequestInfo {
            offset: request.offset,
            bytes: request.bytes,
            age_ns: nanoseconds(now.saturating_sub(request.since)),
            ..of(export, root, &kind, worker as u64)
        });
    }
    for view in daemon.exports() {
        let (id, root) = (&view.export.config().id, view.export.root());
        for held in view.export.held().await {
            let (kind, offset, bytes) = described(&held.request);
            all.push(BlockRequestInfo {
                offset,
                bytes,
                age_ns: nanoseconds(held.age),
                phase: RequestPhase::Held,
                error: held.error.map(|error| error.to_string()),
                ..of(id.clone(), root, kind, u64::from(held.queue))
            });
        }
    }
    Ok(all)
}

/// The node that a root uses, now.
fn node_name(service: &Service, root: RootId) -> String {
    let node = service.control().node_of(root);
    let name = |graph: &Graph| Some(graph.node_by_id(node?)?.name().to_owned());
    service.control().read(name).unwrap_or_default()
}

async fn block_latency_histogram_set(
    service: Rc<Service>,
    arguments: BlockLatencyHistogramSet,
) -> Result<(), QmpError> {
    let export = find(&service, &arguments.id)?;
    let all = arguments.boundaries;
    let kinds = [
        (arguments.boundaries_read, &[Kind::Read][..]),
        (
            arguments.boundaries_write,
            &[Kind::Write, Kind::WriteZeroes],
        ),
        (arguments.boundaries_flush, &[Kind::Flush]),
    ];
    let named = kinds.iter().any(|(boundaries, _)| boundaries.is_some());
    for (boundaries, kinds) in kinds {
        let boundaries = boundaries.as_ref().or(all.as_ref());
        if boundaries.is_none() && named {
            // Not spoken of.
            continue;
        }
        for kind in kinds {
            export.set_histogram(*kind, boundaries.map(Vec::as_slice))?;
        }
    }
    Ok(())
}

/// What a guest's request asks for, where and how much.
fn described(request: &Request) -> (&'static str, u64, u64) {
    match *request {
        Request::Read { offset, bytes } => ("read", offset, bytes),
        Request::Write { offset, bytes } => ("write", offset, bytes),
        Request::Flush => ("flush", 0, 0),
        Request::Discard { .. } => ("discard", 0, 0),
        Request::WriteZeroes { .. } => ("writezeroes", 0, 0),
        Request::GetId => ("get-id", 0, 0),
    }
}
