//! Opening an image's crash segment: what an earlier process left is put into the image, and a segment of
//! this opening's own begins.

use std::path::PathBuf;
use std::sync::Arc;

use blockcore::engine::{HostCall, HostReply, Segment};
use blockcore::{Error, ErrorKind};

use super::cookie;
use super::layout::HostOffset;
use super::layout::entry::L1Entry;
use super::layout::header::{Features, Header, field};
use super::open::{Source, mark_active, mark_inactive};
use super::overlap::Metadata;
use super::replay::{Replay, Tables};
use super::segment::{self, CrashSegment, Owner};
use super::snapshot::Snapshots;

/// Puts what an earlier process left into the image, whose tables are changed accordingly, and begins a
/// segment. `None` where there can be none, or nothing asks for one.
///
/// # Errors
///
/// What could not be read or written; [`ErrorKind::Corrupt`] for a segment of this image's that makes no
/// sense: what completed would be lost.
pub(super) async fn adopt(
    source: &Source,
    header: &mut Header,
    snapshots: &Snapshots,
    l1: &mut Vec<L1Entry>,
    table: &mut Vec<u64>,
) -> Result<Option<Arc<CrashSegment>>, Error> {
    // With an external data file, that would have to be made durable first.
    if source.runtime_directory.is_none() || header.version < 3 || header.geometry().data_file {
        return Ok(None);
    }
    let cluster = source
        .read(
            "header",
            0,
            header.geometry().cluster_bytes().min(source.root.bytes()),
        )
        .await?;
    let Some(place) = place(source).await? else {
        return Ok(None);
    };
    let was_vouched_for = cookie::is_vouched_for(&cluster);
    let before = cookie::find(&cluster);
    let opened = open(source, &place.path).await?;
    if let Some(cookie) = before.filter(|_| was_vouched_for) {
        let owner = Owner {
            cookie,
            ..place.owner
        };
        match segment::read(&opened, owner) {
            Some(left) => {
                let left = left.map_err(|what| damaged(source, &place.path, &what))?;
                let geometry = header.geometry();
                let mut tables = Tables {
                    geometry,
                    l1_place: HostOffset(header.l1_offset),
                    l1,
                    table_place: HostOffset(header.refcount_table_offset),
                    table,
                };
                let replay = Replay::new(left, &mut tables, source.root.bytes())
                    .map_err(|what| damaged(source, &place.path, &what))?;
                if !replay.is_empty() {
                    let (metadata, inactive) = (Metadata::new(geometry), Metadata::new(geometry));
                    mark_active(&metadata, header, tables.l1, tables.table)
                        .map_err(|what| damaged(source, &place.path, &what))?;
                    mark_inactive(source, &inactive, header, snapshots).await?;
                    replay
                        .check_metadata(geometry, &metadata, &inactive)
                        .map_err(|what| damaged(source, &place.path, &what))?;
                    tracing::info!(
                        "image of node '{}' was not closed in order: {} changes are taken from '{}'",
                        source.node,
                        replay.changes(),
                        place.path.display()
                    );
                    let replayed = replay.run(&source.root, tables).await;
                    replayed.map_err(|error| source.failed("recover", error))?;
                }
            }
            None => tracing::warn!(
                "image of node '{}' was not closed in order, and what was kept of it in '{}' is not there: \
                 writes that had completed and were not flushed may be lost",
                source.node,
                place.path.display()
            ),
        }
    }
    // It is what the image says it is, and need not count.
    let next = before.unwrap_or(0).wrapping_add(1);
    let Some(steps) = cookie::steps(&cluster, next) else {
        return Ok(None);
    };
    for (offset, bytes) in steps {
        source.write_header(offset, &bytes).await?;
    }
    let mut bytes = next.to_be_bytes().to_vec();
    bytes.resize(16, 0);
    header.extensions.cookie = bytes.first_chunk().copied();
    let owner = Owner {
        cookie: next,
        ..place.owner
    };
    let segment = CrashSegment::new(opened, place.path, owner);
    header.features.autoclear |= Features::SEGMENT;
    header.features.autoclear &= !header.unknown_autoclear();
    let autoclear = header.features.autoclear.to_be_bytes();
    source.write_header(field::AUTOCLEAR, &autoclear).await?;
    Ok(Some(Arc::new(segment)))
}

fn damaged(source: &Source, path: &std::path::Path, what: &str) -> Error {
    let text = format!(
        "the image of node '{}' was not closed in order, and what was kept of it in '{}' is damaged ({what}): \
         without it writes that had completed and were not flushed are lost; remove the file to go on with \
         what was flushed",
        source.node,
        path.display()
    );
    Error::new(ErrorKind::Corrupt, text)
}

/// Where an image's segment is, and whose it is.
struct SegmentPlace {
    path: PathBuf,
    owner: Owner,
}

/// `None` where the image is in no file of the host.
async fn place(source: &Source) -> Result<Option<SegmentPlace>, Error> {
    let Some(directory) = &source.runtime_directory else {
        return Ok(None);
    };
    let plan = source.root.plan();
    let Some(file) = plan.files().next() else {
        return Ok(None);
    };
    let call = HostCall::Metadata(Arc::clone(file));
    let found = match source.root.context().host(call).await {
        Ok(HostReply::Metadata(found)) => found,
        Ok(reply) => unreachable!("a stat answered with {reply:?}"),
        Err(error) => {
            let text = format!("cannot examine '{}'", file.path().display());
            return Err(Error::host(text, error));
        }
    };
    let owner = Owner {
        cookie: 0,
        device: found.device,
        inode: found.inode,
    };
    let name = format!("qcow2-{:x}-{:x}.segment", owner.device, owner.inode);
    Ok(Some(SegmentPlace {
        path: directory.join(name),
        owner,
    }))
}

async fn open(source: &Source, path: &std::path::Path) -> Result<Arc<Segment>, Error> {
    let context = source.root.context();
    let call = || HostCall::OpenSegment {
        path: path.to_owned(),
        bytes: segment::BYTES,
    };
    let mut reply = context.host(call()).await;
    if matches!(&reply, Err(error) if *error == Segment::OTHER_LENGTH) {
        // Another version's, or nobody's.
        let _ = context.host(HostCall::Remove(path.to_owned())).await;
        reply = context.host(call()).await;
    }
    match reply {
        Ok(HostReply::Segment { segment, .. }) => Ok(segment),
        Ok(reply) => unreachable!("a segment was asked for, and it answered {reply:?}"),
        Err(error) => {
            let text = format!(
                "cannot keep what node '{}' completes in '{}', where it would survive this process",
                source.node,
                path.display()
            );
            Err(Error::host(text, error))
        }
    }
}
