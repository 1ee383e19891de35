//! Commands for tests, and those that do nothing here but to be asked.
//!
//! `blkdebug-suspend` and `blkdebug-resume` are ours: QEMU has them for its test tools only.

use std::rc::Rc;

use blockcore::graph::LineEnd;

use super::Service;
use super::command::Commands;
use crate::qapi::{QmpError, StrOrNull};
use crate::qapi_struct;

qapi_struct! {
    /// Which worker is to do a node's work.
    pub struct BlockdevSetIothread {
        /// The node.
        node_name: String = "node-name",
        /// The worker; `null` for the control thread.
        iothread: StrOrNull = "iothread",
        /// Though something uses the node.
        force: Option<bool> = "force",
    }
}

qapi_struct! {
    /// Requests that are to be suspended.
    pub struct BlkdebugSuspend {
        /// The `blkdebug` node, or one above it.
        node_name: String = "node-name",
        /// At which event, by its name in `blkdebug`'s rules.
        event: String = "event",
        /// What the suspended request is called.
        tag: String = "tag",
    }
}

qapi_struct! {
    /// A suspended request that is to go on.
    pub struct BlkdebugResume {
        /// The `blkdebug` node, or one above it.
        node_name: String = "node-name",
        /// What it is called.
        tag: String = "tag",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("x-blockdev-set-iothread", set_iothread);
    commands.add("blkdebug-suspend", blkdebug_suspend);
    commands.add("blkdebug-resume", blkdebug_resume);
}

/// A hint that is not needed: each export says which workers serve it, and a node is worked on by all of
/// its users' workers.
async fn set_iothread(
    service: Rc<Service>,
    arguments: BlockdevSetIothread,
) -> Result<(), QmpError> {
    let name = &arguments.node_name;
    let is_used = service.control().read(|graph| {
        let node = graph.node(name).ok()?.id();
        let is_use = |from: &LineEnd| matches!(from, LineEnd::Root(_));
        let mut lines = graph.lines().into_iter();
        Some(lines.any(|line| line.to == node && is_use(&line.from)))
    });
    let Some(is_used) = is_used else {
        let text = format!("Failed to find node with node-name='{name}'");
        return Err(QmpError::generic(text));
    };
    if is_used && arguments.force != Some(true) {
        return Err(QmpError::generic(format!(
            "Node {name} is associated with a BlockBackend and could be in use (use force=true to \
             override this check)"
        )));
    }
    let StrOrNull(iothread) = arguments.iothread;
    if let Some(iothread) = iothread.filter(|name| !name.is_empty())
        && service.daemon()?.iothread_poll(&iothread, None).is_err()
    {
        let text = format!("Cannot find iothread {iothread}");
        return Err(QmpError::generic(text));
    }
    Ok(())
}

async fn blkdebug_suspend(
    service: Rc<Service>,
    arguments: BlkdebugSuspend,
) -> Result<(), QmpError> {
    let BlkdebugSuspend {
        node_name,
        event,
        tag,
    } = arguments;
    Ok(service.control().suspend_at(&node_name, &event, &tag)?)
}

async fn blkdebug_resume(service: Rc<Service>, arguments: BlkdebugResume) -> Result<(), QmpError> {
    let BlkdebugResume { node_name, tag } = arguments;
    Ok(service.control().resume(&node_name, &tag)?)
}
