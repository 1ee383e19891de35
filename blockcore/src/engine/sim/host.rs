//! The simulated host: its files, the page cache over them, who has what open, and locks.
//!
//! Each file is two contents: what reads see (the page cache), and what a power cut is sure to leave.
//! Between them lies a log of changes that are not yet durable. A sync moves a beginning of the log
//! below; a power cut keeps any part of it.
//!
//! Nothing here knows of engines, time or wake-ups.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::contents::{BLOCK_BYTES, Change, Contents};
use super::random::Random;
use crate::engine::{
    Allocate, Errno, FileKind, FileType, HostCall, HostReply, Metadata, OpenFile, OpenOptions,
    Segment,
};

/// Most that one copy by the host moves.
const MAX_COPY_BYTES: u64 = 1 << 20;

/// Unsynced changes per file beyond which the older half is written back, as a kernel does in time.
const LOG_LIMIT: usize = 4096;
/// The device number of every simulated file.
const DEVICE: u64 = 0x51;

/// What kind of file the simulated host has, and what it can do with it.
#[derive(Clone, Debug)]
pub struct FileProperties {
    /// A regular file, or a block device: one that has all of its space and keeps its length.
    pub file_type: FileType,
    /// What offset and length of direct I/O must be multiples of.
    pub direct_alignment: u32,
    /// What each segment of direct I/O must begin and end at a multiple of.
    pub memory_alignment: u32,
    /// As in [`Metadata`].
    pub physical_block_bytes: u32,
    /// As in [`Metadata`].
    pub optimal_io_bytes: u32,
    /// As in [`Metadata`].
    pub discard_granularity_bytes: u32,
    /// Opening for writing is refused.
    pub read_only: bool,
    /// Whether [`Allocate::PunchHole`] and [`HostCall::DeviceDiscard`] work.
    pub punches: bool,
    /// Whether [`Allocate::ZeroRange`] and [`HostCall::DeviceZero`] work.
    pub zeroes: bool,
}

impl Default for FileProperties {
    fn default() -> Self {
        Self {
            file_type: FileType::Regular,
            direct_alignment: 512,
            memory_alignment: 512,
            physical_block_bytes: 4096,
            optimal_io_bytes: 0,
            discard_granularity_bytes: 4096,
            read_only: false,
            punches: true,
            zeroes: true,
        }
    }
}

/// What an [`OpenFile`] of the simulation holds: a name for the description, and a sign of life.
#[derive(Debug)]
pub(crate) struct Token {
    description: u64,
    _open: Arc<()>,
}

/// See the module's header.
#[derive(Default)]
pub(super) struct Host {
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    files: BTreeMap<u64, File>,
    descriptions: BTreeMap<u64, Description>,
    /// Shared memory that outlives processes, and not the host.
    segments: BTreeMap<PathBuf, Arc<Segment>>,
    /// By inode, byte and description: whether it is exclusive.
    locks: BTreeMap<(u64, u64, u64), bool>,
    /// How much space all regular files have together, in blocks; none for as much as they like.
    pub(super) capacity_blocks: Option<u64>,
    last_inode: u64,
    last_description: u64,
    last_change: u64,
}

struct File {
    properties: FileProperties,
    cache: Contents,
    durable: Contents,
    log: Vec<Logged>,
    /// How many syncs have failed; a description reports each failure once.
    lost_syncs: u64,
}

/// A change that is in the page cache and not known to be durable.
struct Logged {
    number: u64,
    /// The operation that made it; while that is under way, no sync need cover it.
    operation: u64,
    change: Change,
}

struct Description {
    inode: u64,
    write: bool,
    direct: bool,
    /// The process's end of it lives as long as its [`Token`].
    open: Arc<()>,
    /// The process that had it was killed, whatever tokens are still about.
    orphaned: bool,
    in_flight: usize,
    reported_syncs: u64,
}

impl Host {
    /// Puts a file there, durable at once.
    pub(super) fn create(&mut self, path: &Path, properties: FileProperties, bytes: u64) {
        let inode = self.new_file(properties, bytes);
        self.names.insert(path.to_owned(), inode);
        self.durable_names.insert(path.to_owned(), inode);
    }

    fn new_file(&mut self, properties: FileProperties, bytes: u64) -> u64 {
        self.last_inode += 1;
        let file = File {
            properties,
            cache: Contents::new(bytes),
            durable: Contents::new(bytes),
            log: Vec::new(),
            lost_syncs: 0,
        };
        self.files.insert(self.last_inode, file);
        self.last_inode
    }

    /// What a read through the page cache sees, and the length; `None` if there is no such file.
    pub(super) fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        let file = &self.files[self.names.get(path)?];
        let mut bytes = vec![0; file.cache.bytes() as usize];
        file.cache.read(0, &mut bytes);
        Some(bytes)
    }

    /// Gives a file that was just made its bytes, durable at once.
    pub(super) fn fill(&mut self, path: &Path, bytes: &[u8]) {
        let file = self
            .names
            .get(path)
            .and_then(|inode| self.files.get_mut(inode));
        let file = file.expect("just made");
        file.cache.apply(&Change::Write {
            offset: 0,
            data: bytes.to_vec(),
        });
        file.durable = file.cache.clone();
    }

    /// What a power cut could leave of a file, with changes that are landing, by description.
    pub(super) fn possible_contents(
        &self,
        path: &Path,
        landing: &[(u64, Change)],
        random: &mut Random,
    ) -> Option<Vec<u8>> {
        let inode = self.names.get(path)?;
        let file = &self.files[inode];
        let mut left = file.durable.clone();
        for logged in &file.log {
            left.apply_torn(&logged.change, random);
        }
        for (description, change) in landing {
            if self.get(*description).inode == *inode {
                left.apply_torn(change, random);
            }
        }
        let mut bytes = vec![0; left.bytes() as usize];
        left.read(0, &mut bytes);
        Some(bytes)
    }

    /// Offset and bytes of each change of a file that is in the log.
    pub(super) fn unsynced(&self, path: &Path) -> Vec<(u64, u64)> {
        let Some(inode) = self.names.get(path) else {
            return Vec::new();
        };
        let changes = self.files[inode].log.iter().map(|logged| &logged.change);
        let ranges = changes.filter_map(|change| match change {
            Change::Write { offset, data } => Some((*offset, data.len() as u64)),
            Change::Zero { offset, bytes, .. } => Some((*offset, *bytes)),
            Change::Reserve { .. } | Change::Length(_) => None,
        });
        ranges.collect()
    }

    /// Byte and kind of every lock on a file.
    pub(super) fn locks(&mut self, path: &Path) -> Vec<(u64, bool)> {
        self.close_unused();
        let Some(inode) = self.names.get(path) else {
            return Vec::new();
        };
        let all = (*inode, 0, 0)..=(*inode, u64::MAX, u64::MAX);
        let locks = self.locks.range(all);
        locks
            .map(|((_, byte, _), exclusive)| (*byte, *exclusive))
            .collect()
    }

    /// How many syncs of a file have failed.
    pub(super) fn lost_syncs(&self, path: &Path) -> u64 {
        let inode = self.names.get(path);
        inode.map_or(0, |inode| self.files[inode].lost_syncs)
    }

    /// The description behind an open file of this simulation.
    pub(super) fn description(&self, file: &OpenFile) -> Result<u64, Errno> {
        match &file.kind {
            FileKind::Simulated(token) if self.descriptions.contains_key(&token.description) => {
                Ok(token.description)
            }
            _ => Err(Errno::BADF),
        }
    }

    /// The operation or call that is about to use the description keeps it open.
    pub(super) fn begin(&mut self, description: u64) {
        self.get_mut(description).in_flight += 1;
    }

    /// The operation or call has landed.
    pub(super) fn end(&mut self, description: u64) {
        self.get_mut(description).in_flight -= 1;
        self.close_unused();
    }

    /// As [`begin`](Self::begin), for every description that a process has open; which they are.
    pub(super) fn begin_all(&mut self) -> Vec<u64> {
        self.close_unused();
        let of_process = self.descriptions.iter_mut().filter(|(_, d)| !d.orphaned);
        let held = of_process.map(|(number, description)| {
            description.in_flight += 1;
            *number
        });
        held.collect()
    }

    /// The processes that had descriptions open are gone; what is in flight holds them a little longer.
    pub(super) fn orphan_all(&mut self) {
        for description in self.descriptions.values_mut() {
            description.orphaned = true;
        }
        self.close_unused();
    }

    /// Whether the description may be written to.
    pub(super) fn is_writable(&self, description: u64) -> bool {
        self.get(description).write
    }

    /// What direct I/O on the description must be aligned to: memory, then offset and length.
    pub(super) fn alignment(&self, description: u64) -> (u64, u64) {
        let description = self.get(description);
        let properties = &self.files[&description.inode].properties;
        if description.direct {
            let memory = u64::from(properties.memory_alignment);
            return (memory, u64::from(properties.direct_alignment));
        }
        (1, 1)
    }

    /// The file's length, and whether writes may make it longer.
    pub(super) fn length(&self, description: u64) -> (u64, bool) {
        let file = self.file(description);
        let grows = file.properties.file_type != FileType::BlockDevice;
        (file.cache.bytes(), grows)
    }

    /// Fills `into` from the page cache.
    pub(super) fn read(&self, description: u64, offset: u64, into: &mut [u8]) {
        self.file(description).cache.read(offset, into);
    }

    /// Takes space for a write; returns for how many of its bytes, from the first, there was some.
    pub(super) fn reserve(
        &mut self,
        description: u64,
        operation: u64,
        offset: u64,
        bytes: u64,
    ) -> u64 {
        let mut fits = bytes;
        if !self.has_space(description, offset, bytes) {
            let mut end = (offset + 1).next_multiple_of(BLOCK_BYTES);
            while self.has_space(description, offset, end - offset) {
                end += BLOCK_BYTES;
            }
            // The block that ended at `end` did not fit.
            fits = (end - BLOCK_BYTES).saturating_sub(offset);
        }
        if fits > 0 && self.file(description).cache.missing_blocks(offset, fits) > 0 {
            let change = Change::Reserve {
                offset,
                bytes: fits,
            };
            self.change(description, operation, change);
        }
        fits
    }

    /// Changes the file for everybody who reads it; durable only later.
    pub(super) fn change(&mut self, description: u64, operation: u64, change: Change) {
        self.last_change += 1;
        let number = self.last_change;
        let file = self.file_mut(description);
        file.cache.apply(&change);
        file.log.push(Logged {
            number,
            operation,
            change,
        });
        if file.log.len() > LOG_LIMIT {
            let written_back = file.log.drain(..LOG_LIMIT / 2);
            for logged in written_back {
                file.durable.apply(&logged.change);
            }
        }
    }

    /// Changes how a range is allocated.
    pub(super) fn allocate(
        &mut self,
        description: u64,
        operation: u64,
        (offset, bytes): (u64, u64),
        mode: Allocate,
    ) -> Result<(), Errno> {
        let properties = &self.file(description).properties;
        let (supported, keep_space) = match mode {
            Allocate::PunchHole => (properties.punches, false),
            Allocate::ZeroRange => (properties.zeroes, true),
            Allocate::Reserve => (true, true),
        };
        if !supported {
            return Err(Errno::OPNOTSUPP);
        }
        let (length, grows) = self.length(description);
        if !grows && offset + bytes > length {
            return Err(Errno::INVAL);
        }
        if keep_space && !self.has_space(description, offset, bytes) {
            return Err(Errno::NOSPC);
        }
        let change = if mode == Allocate::Reserve {
            Change::Reserve { offset, bytes }
        } else {
            Change::Zero {
                offset,
                bytes,
                keep_space,
            }
        };
        self.change(description, operation, change);
        Ok(())
    }

    /// Up to which change a sync that starts now reaches: all of completed operations, and as many
    /// after them as the seed likes.
    pub(super) fn sync_begins(
        &self,
        description: u64,
        under_way: impl Fn(u64) -> bool,
        random: &mut Random,
    ) -> u64 {
        let log = &self.file(description).log;
        let completed = log
            .iter()
            .rposition(|logged| !under_way(logged.operation))
            .map_or(0, |index| index + 1);
        let covered = random.between(completed as u64, log.len() as u64) as usize;
        covered.checked_sub(1).map_or(0, |index| log[index].number)
    }

    /// Makes every change up to number `covered` durable.
    pub(super) fn sync(&mut self, description: u64, covered: u64) -> Result<(), Errno> {
        let file = self.file_mut(description);
        let end = file.log.partition_point(|logged| logged.number <= covered);
        for logged in file.log.drain(..end) {
            file.durable.apply(&logged.change);
        }
        let lost = file.lost_syncs;
        let description = self.get_mut(description);
        if description.reported_syncs < lost {
            description.reported_syncs = lost;
            return Err(Errno::IO);
        }
        Ok(())
    }

    /// As Linux: what could not be written is marked clean all the same, so that no later sync tries
    /// again, and each description hears of it once. Past the page cache nothing is marked: what direct
    /// writes left with the device is still there.
    pub(super) fn sync_fails(&mut self, description: u64, covered: u64, random: &mut Random) {
        if self.get(description).direct {
            return;
        }
        let file = self.file_mut(description);
        let end = file.log.partition_point(|logged| logged.number <= covered);
        for logged in file.log.drain(..end) {
            file.durable.apply_torn(&logged.change, random);
        }
        file.lost_syncs += 1;
        let lost = file.lost_syncs;
        self.get_mut(description).reported_syncs = lost;
    }

    /// Does a host call. The caller holds the descriptions that it names open.
    pub(super) fn call(
        &mut self,
        call: &HostCall,
        operation: u64,
        random: &mut Random,
    ) -> Result<HostReply, Errno> {
        match call {
            HostCall::Open(path, options) => self.open(path, options).map(HostReply::File),
            HostCall::Metadata(file) => {
                let description = self.description(file)?;
                Ok(HostReply::Metadata(Box::new(self.metadata(description))))
            }
            HostCall::Truncate(file, bytes) => {
                let description = self.writable(file)?;
                if !self.length(description).1 {
                    return Err(Errno::INVAL);
                }
                self.change(description, operation, Change::Length(*bytes));
                Ok(HostReply::Done)
            }
            HostCall::LockShared(file, byte) => {
                let description = self.description(file)?;
                self.lock(description, *byte, false)
            }
            HostCall::LockExclusive(file, byte) => {
                let description = self.writable(file)?;
                self.lock(description, *byte, true)
            }
            HostCall::Unlock(file, byte) => {
                let description = self.description(file)?;
                let inode = self.get(description).inode;
                self.locks.remove(&(inode, *byte, description));
                Ok(HostReply::Done)
            }
            HostCall::TestLock(file, byte) => {
                let own = self.description(file)?;
                match self.is_locked(own, *byte, false) {
                    true => Err(Errno::AGAIN),
                    false => Ok(HostReply::Done),
                }
            }
            HostCall::DeviceDiscard(file, offset, bytes) => {
                let description = self.device(file)?;
                if !self.file(description).properties.punches {
                    return Err(Errno::OPNOTSUPP);
                }
                // A discarded range may read as anything it ever held, or as zeroes.
                let mut kept = *offset;
                while kept < offset + bytes {
                    let piece = random.between(1, 64) * 512;
                    let piece = piece.min(offset + bytes - kept);
                    if random.chance(500) {
                        let change = Change::Zero {
                            offset: kept,
                            bytes: piece,
                            keep_space: false,
                        };
                        self.change(description, operation, change);
                    }
                    kept += piece;
                }
                Ok(HostReply::Done)
            }
            HostCall::DeviceZero(file, offset, bytes) => {
                let description = self.device(file)?;
                let range = (*offset, *bytes);
                self.allocate(description, operation, range, Allocate::ZeroRange)?;
                Ok(HostReply::Done)
            }
            HostCall::Reserve(file, offset, bytes) => {
                let description = self.writable(file)?;
                let range = (*offset, *bytes);
                self.allocate(description, operation, range, Allocate::Reserve)?;
                let end = offset + bytes;
                if end > self.length(description).0 {
                    self.change(description, operation, Change::Length(end));
                }
                Ok(HostReply::Done)
            }
            HostCall::DropCache(file) => {
                self.description(file)?;
                Ok(HostReply::Done)
            }
            HostCall::SetNocow(file) | HostCall::SetExtentSizeHint(file, _) => {
                self.description(file)?;
                Err(Errno::OPNOTSUPP)
            }
            HostCall::OpenSegment { path, bytes } => self.open_segment(path, *bytes),
            HostCall::Remove(path) if self.segments.contains_key(path) => {
                self.segments.remove(path);
                Ok(HostReply::Done)
            }
            HostCall::Remove(path) => {
                self.names.remove(path).ok_or(Errno::NOENT)?;
                self.forget_unreachable();
                Ok(HostReply::Done)
            }
            HostCall::Rename(from, to) => {
                let inode = self.names.remove(from).ok_or(Errno::NOENT)?;
                self.names.insert(to.clone(), inode);
                self.forget_unreachable();
                Ok(HostReply::Done)
            }
            HostCall::SyncDirectory(path) => {
                self.sync_directory(path);
                Ok(HostReply::Done)
            }
            HostCall::Canonical(path) => match self.names.contains_key(path) {
                true => Ok(HostReply::Path(path.clone())),
                false => Err(Errno::NOENT),
            },
            // There is no network.
            HostCall::Resolve(..) => Ok(HostReply::Addresses(Vec::new())),
            HostCall::DataExtent(file, offset) => {
                let description = self.description(file)?;
                let cache = &self.file(description).cache;
                Ok(HostReply::Extent(cache.data_extent(*offset)))
            }
            HostCall::CopyRange {
                from,
                offset,
                to,
                to_offset,
                bytes,
            } => {
                let (from, to) = (self.description(from)?, self.writable(to)?);
                let left = self.length(from).0.saturating_sub(*offset).min(*bytes);
                let most = left.min(MAX_COPY_BYTES);
                if most == 0 {
                    return Ok(HostReply::Copied(0));
                }
                let copied = random.between(1, most.div_ceil(512)) * 512;
                let mut data = vec![0; copied.min(most) as usize];
                self.file(from).cache.read(*offset, &mut data);
                let copied = data.len() as u64;
                let change = Change::Write {
                    offset: *to_offset,
                    data,
                };
                self.change(to, operation, change);
                Ok(HostReply::Copied(copied))
            }
        }
    }

    /// What a power cut leaves: all that was synced, and of the rest whatever the seed likes.
    pub(super) fn power_cut(&mut self, random: &mut Random) {
        self.descriptions.clear();
        self.locks.clear();
        self.segments.clear();
        for file in self.files.values_mut() {
            for logged in file.log.drain(..) {
                file.durable.apply_torn(&logged.change, random);
            }
            file.cache = file.durable.clone();
        }
        let paths: BTreeSet<PathBuf> = self
            .names
            .keys()
            .chain(self.durable_names.keys())
            .cloned()
            .collect();
        for path in paths {
            let entry = if random.chance(500) {
                self.names.get(&path)
            } else {
                self.durable_names.get(&path)
            };
            match entry.copied() {
                Some(inode) => self.durable_names.insert(path, inode),
                None => self.durable_names.remove(&path),
            };
        }
        self.names = self.durable_names.clone();
        self.forget_unreachable();
    }

    fn open_segment(&mut self, path: &Path, bytes: u64) -> Result<HostReply, Errno> {
        let existed = self.segments.contains_key(path);
        if !existed {
            let made = Segment::simulated(bytes)?;
            self.segments.insert(path.to_owned(), made);
        }
        let segment = Arc::clone(&self.segments[path]);
        if segment.words().len() as u64 * 8 != bytes {
            return Err(Segment::OTHER_LENGTH);
        }
        Ok(HostReply::Segment { segment, existed })
    }

    /// The shared memory at a path.
    pub(super) fn segment(&self, path: &Path) -> Option<Arc<Segment>> {
        self.segments.get(path).cloned()
    }

    fn open(&mut self, path: &Path, options: &OpenOptions) -> Result<Arc<OpenFile>, Errno> {
        let inode = match (self.names.get(path), options.create) {
            (Some(_), true) => return Err(Errno::EXIST),
            (Some(inode), false) => *inode,
            (None, false) => return Err(Errno::NOENT),
            (None, true) => {
                let inode = self.new_file(FileProperties::default(), 0);
                self.names.insert(path.to_owned(), inode);
                inode
            }
        };
        let file = &self.files[&inode];
        if options.write && file.properties.read_only {
            return Err(Errno::ACCESS);
        }
        let open = Arc::new(());
        let description = Description {
            inode,
            write: options.write,
            direct: options.direct,
            open: Arc::clone(&open),
            orphaned: false,
            in_flight: 0,
            reported_syncs: file.lost_syncs,
        };
        self.last_description += 1;
        self.descriptions.insert(self.last_description, description);
        let token = Token {
            description: self.last_description,
            _open: open,
        };
        Ok(OpenFile::new(FileKind::Simulated(token), path.to_owned()))
    }

    fn lock(&mut self, own: u64, byte: u64, exclusive: bool) -> Result<HostReply, Errno> {
        if self.is_locked(own, byte, !exclusive) {
            return Err(Errno::AGAIN);
        }
        let inode = self.get(own).inode;
        self.locks.insert((inode, byte, own), exclusive);
        Ok(HostReply::Done)
    }

    /// Whether another description holds a lock on the byte, of those that exclude others if asked.
    fn is_locked(&mut self, own: u64, byte: u64, only_exclusive: bool) -> bool {
        self.close_unused();
        let inode = self.get(own).inode;
        let mut holders = self.locks.range((inode, byte, 0)..=(inode, byte, u64::MAX));
        holders.any(|((_, _, other), exclusive)| *other != own && (*exclusive || !only_exclusive))
    }

    fn metadata(&self, description: u64) -> Metadata {
        let (memory_alignment, direct_alignment) = self.alignment(description);
        let inode = self.get(description).inode;
        let file = &self.files[&inode];
        let properties = &file.properties;
        let device = properties.file_type == FileType::BlockDevice;
        Metadata {
            file_type: properties.file_type,
            bytes: file.cache.bytes(),
            allocated_bytes: file.cache.allocated_blocks() * BLOCK_BYTES,
            device: DEVICE,
            inode,
            direct_alignment: direct_alignment as u32,
            memory_alignment: memory_alignment as u32,
            logical_block_bytes: if device {
                properties.direct_alignment
            } else {
                512
            },
            physical_block_bytes: properties.physical_block_bytes,
            optimal_io_bytes: properties.optimal_io_bytes,
            discard_granularity_bytes: properties.discard_granularity_bytes,
            read_only: device && properties.read_only,
        }
    }

    fn sync_directory(&mut self, directory: &Path) {
        let inside = |path: &PathBuf| path.parent() == Some(directory);
        self.durable_names.retain(|path, _| !inside(path));
        let now = self.names.iter().filter(|(path, _)| inside(path));
        self.durable_names
            .extend(now.map(|(path, inode)| (path.clone(), *inode)));
        self.forget_unreachable();
    }

    fn has_space(&self, description: u64, offset: u64, bytes: u64) -> bool {
        let file = self.file(description);
        let Some(capacity) = self.capacity_blocks else {
            return true;
        };
        if file.properties.file_type == FileType::BlockDevice {
            return true;
        }
        let regular = |file: &&File| file.properties.file_type != FileType::BlockDevice;
        let files = self.files.values().filter(regular);
        let taken: u64 = files.map(|file| file.cache.allocated_blocks()).sum();
        let missing = file.cache.missing_blocks(offset, bytes);
        missing == 0 || taken + missing <= capacity
    }

    fn writable(&self, file: &OpenFile) -> Result<u64, Errno> {
        let description = self.description(file)?;
        if !self.is_writable(description) {
            return Err(Errno::BADF);
        }
        Ok(description)
    }

    fn device(&self, file: &OpenFile) -> Result<u64, Errno> {
        let description = self.writable(file)?;
        if self.file(description).properties.file_type != FileType::BlockDevice {
            return Err(Errno::NOTTY);
        }
        Ok(description)
    }

    /// Closes descriptions that no process and no operation has open, and so their locks.
    fn close_unused(&mut self) {
        self.descriptions.retain(|_, description| {
            let open = Arc::strong_count(&description.open) > 1 && !description.orphaned;
            open || description.in_flight > 0
        });
        let descriptions = &self.descriptions;
        self.locks
            .retain(|(_, _, description), _| descriptions.contains_key(description));
    }

    fn forget_unreachable(&mut self) {
        let mut reachable: BTreeSet<u64> = self.names.values().copied().collect();
        reachable.extend(self.durable_names.values());
        reachable.extend(self.descriptions.values().map(|open| open.inode));
        self.files.retain(|inode, _| reachable.contains(inode));
    }

    fn get(&self, description: u64) -> &Description {
        &self.descriptions[&description]
    }

    fn get_mut(&mut self, description: u64) -> &mut Description {
        let found = self.descriptions.get_mut(&description);
        found.expect("operations hold their descriptions open")
    }

    fn file(&self, description: u64) -> &File {
        &self.files[&self.get(description).inode]
    }

    fn file_mut(&mut self, description: u64) -> &mut File {
        let inode = self.get(description).inode;
        let found = self.files.get_mut(&inode);
        found.expect("descriptions keep their files")
    }
}
