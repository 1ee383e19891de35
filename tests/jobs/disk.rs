//! What a disk may hold, and the images it lies in.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use blockcore::engine::sim::Simulation;

use crate::properties;

/// Length of every disk.
pub(crate) const BYTES: u64 = 1 << 20;
/// What guests write and read: a block holds one value.
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// Blocks of one guest that lie beside each other.
const STRIPE: u64 = 6;
pub(crate) const BLOCKS: u64 = BYTES / BLOCK_BYTES;
/// Where images lie.
pub(crate) const FOLDER: &str = "/simulated";

/// Empty images, made once by QEMU's tools.
pub(crate) struct Templates {
    alone: Vec<u8>,
    folder: tempfile::TempDir,
}

impl Templates {
    pub(crate) fn make() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let alone = create(folder.path(), None);
        Self { alone, folder }
    }

    /// Puts an empty image on the host, which names its backing image or none.
    pub(crate) fn load(&self, simulation: &Simulation, name: &str, backing: Option<&str>) {
        let path = format!("{FOLDER}/{name}.qcow2");
        match backing {
            None => simulation.load_file(path, properties(), &self.alone),
            Some(below) => {
                let image = create(self.folder.path(), Some(&format!("{FOLDER}/{below}.qcow2")));
                simulation.load_file(path, properties(), &image);
            }
        }
    }
}

fn create(folder: &Path, backing: Option<&str>) -> Vec<u8> {
    let path = folder.join("image.qcow2");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=16k"]);
    if let Some(backing) = backing {
        command.args(["-u", "-b", backing, "-F", "qcow2"]);
    }
    let made = command.arg(&path).arg(BYTES.to_string()).status().unwrap();
    assert!(made.success());
    std::fs::read(&path).unwrap()
}

/// What each block may hold.
pub(crate) struct Disk {
    pub(crate) guests: u64,
    blocks: RefCell<Vec<Block>>,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// What completed last.
    now: u32,
    /// What it may hold besides: a request under way, or what a power cut may bring back.
    or: Vec<u32>,
    /// What may come back: since the last flush that was sure to cover it.
    unflushed: Vec<u32>,
}

/// What completed before a flush began.
pub(crate) struct Flushing(Vec<u32>);

impl Disk {
    pub(crate) fn new(guests: u64) -> Self {
        Self {
            guests,
            blocks: RefCell::new(vec![Block::default(); BLOCKS as usize]),
        }
    }

    /// Whether a block is this guest's.
    pub(crate) fn is_of(&self, guest: u64, block: u64) -> bool {
        block / STRIPE % self.guests == guest
    }

    pub(crate) fn begins(&self, blocks: std::ops::Range<u64>, value: u32) {
        for block in &mut self.blocks.borrow_mut()[blocks.start as usize..blocks.end as usize] {
            block.or.push(value);
            let now = block.now;
            block.unflushed.push(now);
        }
    }

    pub(crate) fn ends(&self, blocks: std::ops::Range<u64>, value: u32) {
        for block in &mut self.blocks.borrow_mut()[blocks.start as usize..blocks.end as usize] {
            block.or.clear();
            block.now = value;
        }
    }

    pub(crate) fn flush_begins(&self) -> Flushing {
        Flushing(self.blocks.borrow().iter().map(|block| block.now).collect())
    }

    /// Everything that had completed when the flush began is durable.
    pub(crate) fn flush_ends(&self, flushing: &Flushing) {
        for (block, then) in self.blocks.borrow_mut().iter_mut().zip(&flushing.0) {
            // What was there before that value cannot come back.
            if let Some(place) = block.unflushed.iter().rposition(|value| value == then) {
                block.unflushed.drain(..place);
            } else if block.now == *then {
                block.unflushed.clear();
            }
        }
    }

    /// The power was cut.
    pub(crate) fn power_cut(&self) {
        for block in self.blocks.borrow_mut().iter_mut() {
            let unflushed = std::mem::take(&mut block.unflushed);
            block.or.extend(unflushed);
        }
    }

    /// What is there after an end is what there is.
    pub(crate) fn settle(&self, index: u64, found: u32) {
        let block = &mut self.blocks.borrow_mut()[index as usize];
        block.now = found;
        block.or.clear();
        block.unflushed.clear();
    }

    /// What every block holds, nobody writing.
    pub(crate) fn values(&self) -> Vec<u32> {
        self.blocks.borrow().iter().map(|block| block.now).collect()
    }

    /// Refuses what a block cannot hold: each sector has one value that it may.
    pub(crate) fn check(&self, index: u64, bytes: &[u8]) -> Result<(), String> {
        let block = &self.blocks.borrow()[index as usize];
        for (sector, bytes) in bytes.chunks(512).enumerate() {
            let value = value_of(bytes)
                .ok_or_else(|| format!("block {index} sector {sector} is a mixture"))?;
            if value != block.now && !block.or.contains(&value) {
                return Err(format!(
                    "block {index} sector {sector} holds {value:#x}, and may hold {block:x?}"
                ));
            }
        }
        Ok(())
    }
}

/// The value that all of some bytes are.
pub(crate) fn value_of(bytes: &[u8]) -> Option<u32> {
    let mut words = bytes.chunks(4).map(|word| {
        let word: [u8; 4] = word.try_into().expect("whole words");
        u32::from_le_bytes(word)
    });
    let first = words.next()?;
    words.all(|word| word == first).then_some(first)
}

/// Bytes of one value.
pub(crate) fn bytes_of(value: u32, bytes: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(bytes as usize / 4)
}

/// A count that is shared.
pub(crate) type Shared<T> = Rc<RefCell<T>>;
