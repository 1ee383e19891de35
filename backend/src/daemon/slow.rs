//! Says in the log which requests take too long: of which export, where, in which image.
//!
//! Exports with a front-end are looked at every half of the limit. Each request is named once while it is under
//! way; requests that are held have been named when they failed.
//!
//! Threads: the control thread.

use std::collections::BTreeSet;
use std::rc::{Rc, Weak};
use std::time::Duration;

use super::Daemon;

/// Between two looks at least: a look wakes the workers.
const LEAST: Duration = Duration::from_millis(100);

/// Looks until the daemon stops. Requests that are under way for `limit` take too long.
pub(super) async fn watch(daemon: Weak<Daemon>, limit: Duration) {
    let mut named = BTreeSet::new();
    loop {
        let Some(context) = daemon.upgrade().map(|d| Rc::clone(d.control.context())) else {
            return;
        };
        context.delay((limit / 2).max(LEAST)).await;
        let Some(daemon) = daemon.upgrade().filter(|daemon| !daemon.is_quitting()) else {
            return;
        };
        named = look(&daemon, limit, &named).await;
    }
}

/// What names a request for as long as it is under way.
type Key = (String, usize, Duration, u64);

/// Names what takes too long and was not named before; gives all that takes too long.
async fn look(daemon: &Daemon, limit: Duration, named: &BTreeSet<Key>) -> BTreeSet<Key> {
    let mut slow = BTreeSet::new();
    let requests = daemon.under_way().await;
    let now = daemon.control.context().engine().now();
    for (export, root, worker, request) in requests {
        let age = now.saturating_sub(request.since);
        if age < limit {
            continue;
        }
        let key = (export, worker, request.since, request.offset);
        if !named.contains(&key) {
            let image = daemon.image_of(root);
            let seconds = age.as_secs_f64();
            tracing::warn!(
                export = %key.0, image, worker, kind = ?request.kind, offset = request.offset,
                bytes = request.bytes, seconds, phase = "in flight",
                "a request takes long"
            );
        }
        slow.insert(key);
    }
    slow
}
