//! Commands that add, remove and change dirty bitmaps.

use std::rc::Rc;

use blockcore::dirty_bitmap::{DirtyBitmap, MAX_NAME_BYTES, MIN_GRANULARITY_BYTES, Operation};
use blockcore::graph::BitmapSpec;
use serde_json::Value;

use super::Service;
use super::command::Commands;
use crate::qapi::{Input, Qapi, QmpError, Schema};
use crate::qapi_struct;

qapi_struct! {
    /// A dirty bitmap to be added.
    pub struct BlockDirtyBitmapAdd {
        /// To which node.
        node: String = "node",
        /// What it is called.
        name: String = "name",
        /// Bytes of disk per bit.
        granularity: Option<u64> = "granularity",
        /// Whether the image is to keep it.
        persistent: Option<bool> = "persistent",
        /// Whether it does not record.
        disabled: Option<bool> = "disabled",
    }
}

qapi_struct! {
    /// A dirty bitmap of a node.
    pub struct BlockDirtyBitmap {
        /// Which node.
        node: String = "node",
        /// Which bitmap.
        name: String = "name",
    }
}

qapi_struct! {
    /// Bitmaps whose marks are added to another's.
    pub struct BlockDirtyBitmapMerge {
        /// The node.
        node: String = "node",
        /// Its bitmap that gets the marks.
        target: String = "target",
        /// Those that have them.
        bitmaps: Vec<BlockDirtyBitmapOrStr> = "bitmaps",
    }
}

/// A bitmap of the same node by its name, or one of another.
#[derive(Clone, Debug)]
pub enum BlockDirtyBitmapOrStr {
    /// Of the same.
    Local(String),
    /// Of any.
    External(BlockDirtyBitmap),
}

impl Qapi for BlockDirtyBitmapOrStr {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        match input.value() {
            Value::String(name) => Ok(Self::Local(name.clone())),
            Value::Object(_) => Ok(Self::External(input.parse()?)),
            _ => Err(input.wrong_alternate("BlockDirtyBitmapOrStr")),
        }
    }

    fn emit(&self) -> Option<Value> {
        match self {
            Self::Local(name) => Some(Value::String(name.clone())),
            Self::External(bitmap) => bitmap.emit(),
        }
    }

    fn describe(schema: &mut Schema) -> String {
        schema.alternate("BlockDirtyBitmapOrStr", |schema| {
            vec![String::describe(schema), BlockDirtyBitmap::describe(schema)]
        })
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("block-dirty-bitmap-add", bitmap_add);
    commands.add("block-dirty-bitmap-remove", bitmap_remove);
    commands.add("block-dirty-bitmap-clear", |service, bitmap| {
        bitmap_change(service, bitmap, |bitmap| bitmap.clear())
    });
    commands.add("block-dirty-bitmap-enable", |service, bitmap| {
        bitmap_change(service, bitmap, DirtyBitmap::enable)
    });
    commands.add("block-dirty-bitmap-disable", |service, bitmap| {
        bitmap_change(service, bitmap, DirtyBitmap::disable)
    });
    commands.add("block-dirty-bitmap-merge", bitmap_merge);
}

fn refuse<T>(sentence: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(sentence))
}

/// Refuses a bitmap that there is not, in QEMU's words.
fn check(service: &Service, node: &str, name: &str) -> Result<(), QmpError> {
    service.control().read(|graph| match graph.node(node) {
        Err(_) => refuse(format!("Node '{node}' not found")),
        Ok(node) if node.bitmaps().get(name).is_err() => {
            refuse(format!("Dirty bitmap '{name}' not found"))
        }
        Ok(_) => Ok(()),
    })
}

async fn bitmap_add(service: Rc<Service>, arguments: BlockDirtyBitmapAdd) -> Result<(), QmpError> {
    let BlockDirtyBitmapAdd { node, name, .. } = &arguments;
    if name.is_empty() {
        return refuse("Bitmap name cannot be empty");
    }
    let is_there = service.control().read(|graph| {
        let found = graph.node(node).ok()?;
        Some(found.bitmaps().get(name).is_ok())
    });
    let Some(is_there) = is_there else {
        return refuse(format!(
            "Cannot find device='{node}' nor node-name='{node}'"
        ));
    };
    if let Some(bytes) = arguments.granularity
        && (!bytes.is_power_of_two() || bytes < MIN_GRANULARITY_BYTES)
    {
        return refuse("Granularity must be power of 2 and at least 512");
    }
    if name.len() > MAX_NAME_BYTES {
        return refuse(format!("Bitmap name too long: {name}"));
    }
    if is_there {
        return refuse(format!("Bitmap already exists: {name}"));
    }
    let spec = BitmapSpec {
        name: name.clone(),
        granularity_bytes: arguments.granularity,
        persistent: arguments.persistent.unwrap_or(false),
        enabled: !arguments.disabled.unwrap_or(false),
    };
    Ok(service.control().add_bitmap(node, &spec).await?)
}

async fn bitmap_remove(service: Rc<Service>, bitmap: BlockDirtyBitmap) -> Result<(), QmpError> {
    check(&service, &bitmap.node, &bitmap.name)?;
    let control = service.control();
    Ok(control.remove_bitmap(&bitmap.node, &bitmap.name).await?)
}

async fn bitmap_change(
    service: Rc<Service>,
    bitmap: BlockDirtyBitmap,
    change: impl FnOnce(&mut DirtyBitmap) -> Result<(), blockcore::Error>,
) -> Result<(), QmpError> {
    let BlockDirtyBitmap { node, name } = &bitmap;
    check(&service, node, name)?;
    let changed = service.control().change_bitmaps(node, |bitmaps| {
        let bitmap = bitmaps.get_mut(name)?;
        change(bitmap)
    });
    Ok(changed.await?)
}

async fn bitmap_merge(
    service: Rc<Service>,
    arguments: BlockDirtyBitmapMerge,
) -> Result<(), QmpError> {
    let BlockDirtyBitmapMerge {
        node,
        target,
        bitmaps,
    } = arguments;
    check(&service, &node, &target)?;
    let mut sources = Vec::new();
    for bitmap in bitmaps {
        let (of, name) = match bitmap {
            BlockDirtyBitmapOrStr::Local(name) => (node.clone(), name),
            BlockDirtyBitmapOrStr::External(bitmap) => (bitmap.node, bitmap.name),
        };
        check(&service, &of, &name)?;
        sources.push((of, name));
    }
    let control = service.control();
    control.read(|graph| {
        let bitmaps = graph.node(&node)?.bitmaps();
        bitmaps.get(&target)?.check(Operation::MergeInto)
    })?;
    Ok(control.merge_bitmaps(&node, &target, &sources).await?)
}
