//! The dirty bitmaps of one node, and what its writers need of them.
//!
//! Threads: [`BitmapSet`] is the control thread's; a [`Recorder`] is what workers get.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::bitmap::{DirtyBitmap, KeptBitmap, Operation, Status};
use super::bits::Bits;
use crate::{Error, ErrorKind};

/// The most bitmaps that a node may have; the qcow2 format keeps no more.
pub const MAX_BITMAPS: usize = 65535;

/// The dirty bitmaps of one node, by name.
pub struct BitmapSet {
    node: Arc<str>,
    length: u64,
    bitmaps: BTreeMap<String, DirtyBitmap>,
}

/// The bits in which a node's writers note what they wrote.
#[derive(Clone, Default)]
pub struct Recorder {
    recording: Box<[Arc<Bits>]>,
}

impl BitmapSet {
    /// No bitmaps yet, of a node of `length` bytes.
    pub fn new(node: Arc<str>, length: u64) -> Self {
        Self {
            node,
            length,
            bitmaps: BTreeMap::new(),
        }
    }

    /// Adds a clean bitmap that records. A new recorder must follow.
    ///
    /// # Errors
    ///
    /// Those of [`DirtyBitmap::new`] and of [`insert`](Self::insert).
    pub fn add(&mut self, name: &str, granularity_bytes: u64) -> Result<&mut DirtyBitmap, Error> {
        let node = Arc::clone(&self.node);
        self.insert(DirtyBitmap::new(
            node,
            name,
            self.length,
            granularity_bytes,
        )?)
    }

    /// Adds a bitmap that was made elsewhere, or puts back one that was removed. A new recorder must
    /// follow.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Exists`] if there is one of this name, [`ErrorKind::Unsupported`] if there are too
    /// many.
    ///
    /// # Panics
    ///
    /// If it is another node's, or has another length than this one.
    pub fn insert(&mut self, bitmap: DirtyBitmap) -> Result<&mut DirtyBitmap, Error> {
        assert_eq!(bitmap.node(), &*self.node, "a bitmap stays on its node");
        assert_eq!(bitmap.bits().length(), self.length, "and is as long");
        let name = bitmap.name();
        if self.bitmaps.contains_key(name) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("node '{}' has a bitmap '{name}' already", self.node),
            ));
        }
        if self.bitmaps.len() == MAX_BITMAPS {
            return Err(Error::unsupported(format!(
                "cannot add bitmap '{name}' to node '{}': it has {MAX_BITMAPS}, and there can be no \
                 more",
                self.node
            )));
        }
        let name = name.to_owned();
        Ok(self.bitmaps.entry(name).or_insert(bitmap))
    }

    /// Takes a bitmap out; [`insert`](Self::insert) puts it back. A new recorder must follow.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], and those of [`DirtyBitmap::check`] for [`Operation::Remove`].
    pub fn remove(&mut self, name: &str) -> Result<DirtyBitmap, Error> {
        self.get(name)?.check(Operation::Remove)?;
        Ok(self.bitmaps.remove(name).expect("found just now"))
    }

    /// Makes the persistent ones those that the image keeps, over `length` bytes; a new recorder must
    /// follow. What is in use stays, with what the image keeps of it. Other bitmaps get the length, too,
    /// or, where they cannot, go.
    ///
    /// # Panics
    ///
    /// If one of the kept has another length.
    pub(crate) fn load(&mut self, kept: Vec<KeptBitmap>, length: u64, read_only: bool) {
        let mut kept: BTreeMap<_, _> = kept
            .into_iter()
            .map(|bitmap| (bitmap.name.clone(), bitmap))
            .collect();
        let lengths = |bitmap: &KeptBitmap| bitmap.bits.length() == length;
        assert!(
            kept.values().all(lengths),
            "a kept bitmap is as long as its node"
        );
        self.length = length;
        self.bitmaps.retain(|name, bitmap| match kept.remove(name) {
            Some(kept) if bitmap.is_persistent() => {
                bitmap.reload(kept, read_only);
                true
            }
            Some(_) | None if bitmap.is_persistent() => false,
            _ if bitmap.bits().length() == length => true,
            _ => match bitmap.prepare_resize(length) {
                Ok(bits) => {
                    bitmap.resized(bits);
                    true
                }
                Err(_) => false,
            },
        });
        for (name, kept) in kept {
            let bitmap = DirtyBitmap::from_kept(Arc::clone(&self.node), kept, read_only);
            self.bitmaps.insert(name, bitmap);
        }
    }

    /// The persistent ones, for the driver to store.
    pub(crate) fn kept(&self) -> Vec<KeptBitmap> {
        let persistent = self.iter().filter(|bitmap| bitmap.is_persistent());
        persistent.map(DirtyBitmap::kept).collect()
    }

    /// Whether one is persistent.
    pub fn has_persistent(&self) -> bool {
        self.iter().any(DirtyBitmap::is_persistent)
    }

    /// Sets whether the image of the persistent ones may not be written to.
    pub(crate) fn set_read_only(&mut self, read_only: bool) {
        let bitmaps = self.bitmaps.values_mut();
        for bitmap in bitmaps.filter(|bitmap| bitmap.is_persistent()) {
            bitmap.set_read_only(read_only);
        }
    }

    /// The bitmap called `name`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn get(&self, name: &str) -> Result<&DirtyBitmap, Error> {
        let missing = || not_found(&self.node, name);
        self.bitmaps.get(name).ok_or_else(missing)
    }

    /// The bitmap called `name`, to be changed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn get_mut(&mut self, name: &str) -> Result<&mut DirtyBitmap, Error> {
        let missing = || not_found(&self.node, name);
        self.bitmaps.get_mut(name).ok_or_else(missing)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &DirtyBitmap> {
        self.bitmaps.values()
    }

    /// All of them, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut DirtyBitmap> {
        self.bitmaps.values_mut()
    }

    /// How many bytes of disk each is about.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bitmaps.is_empty()
    }

    /// What a query tells of each.
    pub fn statuses(&self) -> Vec<Status> {
        self.iter().map(DirtyBitmap::status).collect()
    }

    /// What the node's writers need from now on.
    pub fn recorder(&self) -> Recorder {
        let recording = self.iter().filter_map(DirtyBitmap::recording_bits);
        Recorder {
            recording: recording.map(Arc::clone).collect(),
        }
    }

    /// Marks a range in every bitmap that records: for the control thread; writers have a [`Recorder`].
    pub fn mark(&self, offset: u64, bytes: u64) {
        for bits in self.iter().filter_map(DirtyBitmap::recording_bits) {
            bits.set(offset, bytes);
        }
    }

    /// Gives all bitmaps another length: what was added is clean, what was cut off is gone. In a
    /// drained section, and a new recorder must follow.
    ///
    /// # Errors
    ///
    /// Those of [`DirtyBitmap::check`] for [`Operation::Resize`], and [`ErrorKind::Unsupported`] if one
    /// would have too many bits. Nothing has changed.
    pub fn resize(&mut self, length: u64) -> Result<(), Error> {
        let resized: Vec<Bits> = self
            .iter()
            .map(|bitmap| bitmap.prepare_resize(length))
            .collect::<Result<_, _>>()?;
        for (bitmap, bits) in self.bitmaps.values_mut().zip(resized) {
            bitmap.resized(bits);
        }
        self.length = length;
        Ok(())
    }
}

impl Recorder {
    /// Notes a write whose I/O has ended, well or not.
    pub fn mark(&self, offset: u64, bytes: u64) {
        for bits in &self.recording {
            bits.set(offset, bytes);
        }
    }

    /// Whether nothing records: the plan need not have it.
    pub fn is_empty(&self) -> bool {
        self.recording.is_empty()
    }
}

fn not_found(node: &str, name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("node '{node}' has no bitmap '{name}'"),
    )
}
