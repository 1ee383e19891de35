//! Driver `overlay`: the simplest format that defers to a backing node, for tests of what works on
//! chains of images.
//!
//! The image is a header, a map with one byte for each cluster, and every cluster at a place of its
//! own. A file without a header becomes an empty image when it is opened for writing, so a test needs
//! no more than an empty file and options.
//!
//! A write completes with its map bytes in the file: what completed survives a kill. Data is flushed
//! before the map says that it is there: what the map of a disk without power says is true.
//!
//! Invariants:
//!
//! * Whoever changes a cluster's state has the cluster in `OverlayIo::changing`. A write into a
//!   cluster that is `DATA` changes none, and goes in place without being there: of what it may meet,
//!   every order is as good as any other.
//! * Where writing the map failed, the file may say either; the state is marked `UNSURE` then, it is
//!   read as before, and the next write puts both right.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use blockcore::driver::{
    Activation, BackingName, ChildSpec, Driver, DriverInfo, DriverIo, DriverType, Limits, Mapping,
    NewChild, OpenRequest, Opened, Place, Preallocation, Role, Status, StatusFlags, TruncateFlags,
    WriteFlags, ZeroFlags,
};
use blockcore::fault::{self, Fault};
use blockcore::io::buffer::Segments;
use blockcore::io::tracked::Tracker;
use blockcore::io::{Io, IoFuture, RequestKind, Root};
use blockcore::options::{OptionKind, OptionSpec, Options};
use blockcore::{Error, ErrorKind, IoError};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

/// Driver `overlay`, to be registered beside the others.
pub static OVERLAY: DriverType = DriverType {
    name: "overlay",
    about: "clusters of its own above a backing node, for tests",
    options: OPTIONS,
    children: &[
        ChildSpec {
            name: "file",
            role: Role::IMAGE,
            optional: false,
        },
        ChildSpec {
            name: "backing",
            role: Role::COW,
            optional: true,
        },
    ],
    backing: true,
    probe: Some(|head| match head.starts_with(MAGIC) {
        true => 100,
        false => 0,
    }),
    open: |request| open(request).boxed_local(),
    create_on: Some(|children, options| create_on(children, options).boxed_local()),
    create_options: CREATE_OPTIONS,
    ..DriverType::FORMAT
};

const CREATE_OPTIONS: &[OptionSpec] = &[
    create_option("size", OptionKind::Size, None),
    create_option("cluster-size", OptionKind::Size, Some("64K")),
    create_option("backing-file", OptionKind::Text, Some("")),
    create_option("backing-fmt", OptionKind::Text, Some("")),
];

const fn create_option(
    name: &'static str,
    kind: OptionKind,
    default: Option<&'static str>,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        reopen: false,
        changes_data: false,
        help: "as for qcow2",
    }
}

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "cluster-size",
        kind: OptionKind::Size,
        default: Some("64K"),
        reopen: false,
        changes_data: false,
        help: "cluster size of a new image in bytes, a power of two",
    },
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        default: Some("0"),
        reopen: false,
        changes_data: false,
        help: "length of a new image in bytes; 0: that of its backing node",
    },
];

/// Every driver there is, and this one.
pub fn drivers() -> Vec<&'static DriverType> {
    let mut drivers = formats::drivers();
    drivers.push(&OVERLAY);
    drivers
}

const MAGIC: &[u8; 8] = b"overlay\x01";
/// The header, with room for a backing name.
const HEADER_BYTES: u64 = 4096;
/// Where the map begins: a byte for each cluster; 0 for what the backing node decides, 1 for data.
pub const MAP_OFFSET: u64 = HEADER_BYTES;
/// Longest name of a backing image, and of its format.
const MAX_NAME_BYTES: usize = 1024;
/// Clusters that the map has room for.
const MAX_CLUSTERS: u64 = 65536;
/// Where the first cluster lies: after header and map, in an alignment that hosts like.
pub const DATA_OFFSET: u64 = 128 << 10;
/// Longest run of clusters that is allocated at once.
const RUN_BYTES: u64 = 1 << 20;

/// The backing node decides.
const ABSENT: u8 = 0;
/// The cluster is in the file.
const DATA: u8 = 1;
/// It reads as zeroes.
const ZERO: u8 = 2;
/// It is in the file, and counts as compressed.
const COMPRESSED: u8 = 3;
/// The file may say otherwise; never in the file.
const UNSURE: u8 = 0x80;

/// The I/O half.
struct OverlayIo {
    cluster_bytes: u64,
    bytes: AtomicU64,
    states: Box<[AtomicU8]>,
    /// Ranges of the node whose clusters change their state, by whole clusters.
    changing: Tracker,
}

/// The global-state half.
struct OverlayDriver {
    io: Arc<OverlayIo>,
    backing: RefCell<Option<BackingName>>,
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    cluster_bytes: u64,
    bytes: u64,
    backing: Option<BackingName>,
}

impl Header {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.cluster_bytes.to_le_bytes());
        bytes.extend(self.bytes.to_le_bytes());
        let none = BackingName {
            name: String::new(),
            format: None,
        };
        let backing = self.backing.as_ref().unwrap_or(&none);
        for text in [&backing.name, backing.format.as_deref().unwrap_or("")] {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        bytes.resize(HEADER_BYTES as usize, 0);
        bytes
    }

    /// `None`: there is none yet.
    fn parse(bytes: &[u8], node: &str) -> Result<Option<Self>, Error> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let corrupt = |what: &str| {
            let message = format!("the header of node '{node}' has {what}");
            Error::new(ErrorKind::Corrupt, message)
        };
        let mut rest = bytes
            .strip_prefix(&MAGIC[..])
            .ok_or_else(|| corrupt("no magic"))?;
        let number = |rest: &mut &[u8]| {
            let (first, others) = rest.split_first_chunk().expect("a header is long enough");
            *rest = others;
            u64::from_le_bytes(*first)
        };
        let (cluster_bytes, bytes) = (number(&mut rest), number(&mut rest));
        let mut texts = Vec::new();
        for _ in 0..2 {
            let length = number(&mut rest) as usize;
            if length > MAX_NAME_BYTES {
                return Err(corrupt("too long a name"));
            }
            let (text, others) = rest.split_at(length);
            let text = str::from_utf8(text).map_err(|_| corrupt("a name that is not text"))?;
            texts.push(text.to_owned());
            rest = others;
        }
        let format = texts.pop().filter(|format| !format.is_empty());
        let name = texts.pop().filter(|name| !name.is_empty());
        let header = Self {
            cluster_bytes,
            bytes,
            backing: name.map(|name| BackingName { name, format }),
        };
        if !header.is_sane() {
            return Err(corrupt("sizes that make no sense"));
        }
        Ok(Some(header))
    }

    fn is_sane(&self) -> bool {
        let fits = self.bytes.div_ceil(self.cluster_bytes.max(1)) <= MAX_CLUSTERS;
        self.cluster_bytes.is_power_of_two() && self.cluster_bytes >= 512 && fits
    }
}

fn failed(node: &str, what: &str, error: IoError) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("cannot {what} the map of node '{node}': {error}"),
    )
}

async fn open(request: OpenRequest) -> Result<Opened, Error> {
    let (node, modes) = (&request.node_name, request.modes);
    let file = request.children[0].as_ref().expect("not optional");
    let (header, states) = load(&file.root, node).await?;
    let header = match header {
        Some(header) => header,
        None => {
            let backing = request.children[1].as_ref();
            let header = Header {
                cluster_bytes: request.options.size(OPTIONS, "cluster-size"),
                bytes: match request.options.size(OPTIONS, "size") {
                    0 => backing.map_or(0, |backing| backing.bytes()),
                    bytes => bytes,
                },
                backing: None,
            };
            if !header.is_sane() {
                return Err(Error::invalid(format!(
                    "node '{node}' cannot have {} bytes in clusters of {}",
                    header.bytes, header.cluster_bytes
                )));
            }
            if !modes.read_only && !modes.inactive {
                let made = make(&file.root, &header).await;
                made.map_err(|error| failed(node, "make", error))?;
            }
            header
        }
    };
    let io = Arc::new(OverlayIo {
        cluster_bytes: header.cluster_bytes,
        bytes: AtomicU64::new(header.bytes),
        states: states.into_iter().map(AtomicU8::new).collect(),
        changing: Tracker::default(),
    });
    Ok(Opened {
        driver: Box::new(OverlayDriver {
            io: Arc::clone(&io),
            backing: RefCell::new(header.backing),
        }),
        io,
    })
}

/// Makes an image on a node.
async fn create_on(children: Vec<Option<NewChild>>, options: Options) -> Result<(), Error> {
    const TABLE: &[OptionSpec] = CREATE_OPTIONS;
    options.check(&[TABLE], "creation of an overlay")?;
    let name = options.text(TABLE, "backing-file").to_owned();
    let format = options.text(TABLE, "backing-fmt").to_owned();
    let header = Header {
        cluster_bytes: options.size(TABLE, "cluster-size"),
        bytes: options.size(TABLE, "size"),
        backing: (!name.is_empty()).then(|| BackingName {
            name,
            format: Some(format).filter(|format| !format.is_empty()),
        }),
    };
    if !header.is_sane() {
        return Err(Error::invalid("an overlay cannot have such sizes"));
    }
    let file = children.into_iter().next().flatten();
    let file = file.ok_or_else(|| Error::invalid("an overlay needs a file"))?;
    let made = make(&file.root, &header).await;
    made.map_err(|error| failed(&file.name, "make", error))
}

/// Makes an empty image of a file that has no header.
async fn make(file: &Rc<Root>, header: &Header) -> Result<(), IoError> {
    if file.bytes() < DATA_OFFSET {
        // Nobody writes past the end of what is not a child yet.
        let request = file.enter(RequestKind::Truncate, 0, 0).await;
        let (off, flags) = (Preallocation::Off, TruncateFlags::empty());
        request.truncate(DATA_OFFSET, true, off, flags).await?;
    }
    let bytes = segments(&header.to_bytes());
    file.write(0, bytes, WriteFlags::empty()).await
}

/// Reads header and map; what the file is too short for is zero.
async fn load(file: &Rc<Root>, node: &str) -> Result<(Option<Header>, Vec<u8>), Error> {
    let mut bytes = vec![0; (HEADER_BYTES + MAX_CLUSTERS) as usize];
    let there = file.bytes().min(bytes.len() as u64);
    let into = Segments::allocate(there as usize, 4096);
    let read = file.read(0, into.clone()).await;
    read.map_err(|error| failed(node, "read", error))?;
    into.copy_to(&mut bytes);
    let states = bytes.split_off(HEADER_BYTES as usize);
    if let Some(state) = states.iter().find(|state| **state > COMPRESSED) {
        let message = format!("the map of node '{node}' has a state {state}");
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok((Header::parse(&bytes, node)?, states))
}

fn segments(bytes: &[u8]) -> Segments {
    let segments = Segments::allocate(bytes.len(), 4096);
    segments.copy_from(bytes);
    segments
}

impl Driver for OverlayDriver {
    fn limits(&self, children: &[Option<Limits>]) -> Limits {
        let cluster = self.io.cluster_bytes as u32;
        Limits {
            zero_alignment: cluster,
            discard_alignment: cluster,
            discard_granularity_bytes: cluster,
            cluster_bytes: cluster,
            ..children[0].map_or_else(Limits::default, Limits::above)
        }
    }

    fn backing(&self) -> Option<BackingName> {
        self.backing.borrow().clone()
    }

    fn change_backing(
        &mut self,
        root: Rc<Root>,
        backing: Option<BackingName>,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Write, 0, 0).await;
            let (io, name) = (request.io(), request.io().name());
            let long = |text: &str| text.len() > MAX_NAME_BYTES;
            if let Some(new) = &backing
                && (long(&new.name) || new.format.as_deref().is_some_and(long))
            {
                let message = format!("node '{name}' has no room for '{}'", new.name);
                return Err(Error::new(ErrorKind::NoSpace, message));
            }
            let header = self.io.header(backing.clone());
            let written = io
                .child(0)
                .write(0, segments(&header.to_bytes()), WriteFlags::STABLE);
            let written = written.await;
            written.map_err(|error| failed(name, "write the header before", error))?;
            *self.backing.borrow_mut() = backing;
            Ok(())
        }
        .boxed_local()
    }

    fn activate(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Activation> {
        async move {
            let request = root.enter(RequestKind::Read, 0, 0).await;
            let (io, name) = (request.io(), request.io().name());
            let mut bytes = vec![0; (HEADER_BYTES + MAX_CLUSTERS) as usize];
            let there = io.child(0).bytes().min(bytes.len() as u64);
            let into = Segments::allocate(there as usize, 4096);
            let read = io.child(0).read(0, into.clone()).await;
            read.map_err(|error| failed(name, "read", error))?;
            into.copy_to(&mut bytes);
            let states = bytes.split_off(HEADER_BYTES as usize);
            if let Some(header) = Header::parse(&bytes, name)? {
                self.io.bytes.store(header.bytes, Ordering::Release);
                *self.backing.borrow_mut() = header.backing;
            }
            for (state, now) in self.io.states.iter().zip(states) {
                state.store(now, Ordering::Release);
            }
            Ok(None)
        }
        .boxed_local()
    }

    fn has_zero_init(&self) -> bool {
        true
    }

    fn make_empty(&mut self, root: Rc<Root>) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            let request = root.enter(RequestKind::Discard, 0, 0).await;
            let (io, name) = (request.io(), request.io().name());
            let clusters = self.io.clusters(0, io.bytes());
            let emptied = self.io.set_states(io, clusters, ABSENT).await;
            emptied.map_err(|error| failed(name, "empty", error))?;
            // A cluster that is written to again must not come back with what it had.
            let flushed = io.child(0).flush().await;
            flushed.map_err(|error| failed(name, "empty", error))?;
            // Space that cannot be given back is no reason to fail.
            let bytes = io.child(0).bytes().saturating_sub(DATA_OFFSET);
            let _ = io.child(0).discard(DATA_OFFSET, bytes).await;
            Ok(())
        }
        .boxed_local()
    }
}

impl OverlayIo {
    fn header(&self, backing: Option<BackingName>) -> Header {
        Header {
            cluster_bytes: self.cluster_bytes,
            bytes: self.bytes.load(Ordering::Acquire),
            backing,
        }
    }

    /// The clusters that a range touches.
    fn clusters(&self, offset: u64, bytes: u64) -> std::ops::Range<u64> {
        offset / self.cluster_bytes..(offset + bytes).div_ceil(self.cluster_bytes)
    }

    fn state(&self, cluster: u64) -> u8 {
        self.states[cluster as usize].load(Ordering::Acquire)
    }

    /// How many bytes from `offset` on, at most `bytes`, lie in clusters for which `like` says the same
    /// as for the first one.
    fn run<T: PartialEq>(&self, offset: u64, bytes: u64, like: impl Fn(u8) -> T) -> (T, u64) {
        let clusters = self.clusters(offset, bytes);
        let first = like(self.state(clusters.start));
        let end = clusters
            .skip(1)
            .find(|cluster| like(self.state(*cluster)) != first)
            .map_or(offset + bytes, |cluster| cluster * self.cluster_bytes);
        (first, (end - offset).min(bytes))
    }

    /// Puts clusters into a state, in the file first. The caller has them in `changing`.
    async fn set_states(
        &self,
        io: Io<'_>,
        clusters: std::ops::Range<u64>,
        state: u8,
    ) -> Result<(), IoError> {
        if clusters.is_empty() {
            return Ok(());
        }
        let states = &self.states[clusters.start as usize..clusters.end as usize];
        let bytes = vec![state; states.len()];
        let place = HEADER_BYTES + clusters.start;
        io.child(0).event("l2_update").await?;
        let written = io
            .child(0)
            .write(place, segments(&bytes), WriteFlags::empty())
            .await;
        for old in states {
            match written {
                Ok(()) => old.store(state, Ordering::Release),
                Err(_) => {
                    old.fetch_or(UNSURE, Ordering::AcqRel);
                }
            }
        }
        written
    }

    /// Reads what clusters hold in their states of now; zeroes past the end.
    async fn read_here(&self, io: Io<'_>, offset: u64, into: Segments) -> Result<(), IoError> {
        let end = offset + into.bytes();
        let inside = end.min(io.bytes().max(offset));
        into.slice(inside - offset, end - inside).fill(0);
        let mut next = offset;
        while next < inside {
            let (state, bytes) = self.run(next, inside - next, |state| state & !UNSURE);
            let part = into.slice(next - offset, bytes);
            match state {
                DATA | COMPRESSED => io.child(0).read(DATA_OFFSET + next, part).await?,
                ABSENT => read_backing(io, next, part).await?,
                _ => part.fill(0),
            }
            next += bytes;
        }
        Ok(())
    }

    /// Writes into clusters that are not there yet: with what they held around what is written.
    async fn allocate(
        &self,
        io: Io<'_>,
        offset: u64,
        from: Segments,
        state: u8,
    ) -> Result<(), IoError> {
        let (clusters, bytes) = (self.clusters(offset, from.bytes()), from.bytes());
        let begin = clusters.start * self.cluster_bytes;
        let end = clusters.end * self.cluster_bytes;
        let whole = Segments::allocate((end - begin) as usize, 4096);
        let (head, tail) = (offset - begin, end - (offset + bytes));
        if head > 0 || tail > 0 {
            io.child(0).event("cow_read").await?;
            self.read_here(io, begin, whole.slice(0, head)).await?;
            let after = whole.slice(head + bytes, tail);
            self.read_here(io, offset + bytes, after).await?;
            io.child(0).event("cow_write").await?;
        }
        // A copy: a guest may change its memory between this write and a failed one's repetition.
        whole.slice(head, bytes).copy_from_segments(&from);
        io.child(0).event("cluster_alloc").await?;
        let written = io
            .child(0)
            .write(DATA_OFFSET + begin, whole, WriteFlags::empty());
        written.await?;
        io.child(0).flush().await?;
        self.set_states(io, clusters, state).await
    }

    /// A write of data, of which a part may lie in clusters that are not there yet.
    async fn write_some(&self, io: Io<'_>, offset: u64, from: Segments) -> Result<u64, IoError> {
        let (in_place, bytes) = self.run(offset, from.bytes(), |state| state == DATA);
        if in_place {
            io.child(0).event("write_aio").await?;
            let part = from.slice(0, bytes);
            let written = io
                .child(0)
                .write(DATA_OFFSET + offset, part, WriteFlags::empty());
            written.await?;
            return Ok(bytes);
        }
        let clusters = self.clusters(offset, bytes.min(RUN_BYTES));
        let end = clusters.end * self.cluster_bytes;
        let begin = clusters.start * self.cluster_bytes;
        let _turn = self.changing.begin(begin, end, true).await;
        // Others may have been there first.
        let (in_place, bytes) = self.run(offset, bytes.min(end - offset), |state| state == DATA);
        if in_place && !fault::is_planted(Fault::SecondResolve) {
            return Ok(0);
        }
        let part = from.slice(0, bytes);
        self.allocate(io, offset, part, DATA).await?;
        Ok(bytes)
    }

    /// Changes the state of whole clusters, and gives their space back with `discard`.
    async fn drop_clusters(
        &self,
        io: Io<'_>,
        offset: u64,
        bytes: u64,
        state: u8,
        discard: bool,
    ) -> Result<(), IoError> {
        let _turn = self.changing.begin(offset, offset + bytes, true).await;
        self.set_states(io, self.clusters(offset, bytes), state)
            .await?;
        if discard {
            let end = io.child(0).bytes().min(DATA_OFFSET + offset + bytes);
            let there = end.saturating_sub(DATA_OFFSET + offset);
            if there > 0 {
                // Space that cannot be given back is no reason to fail.
                let _ = io.child(0).discard(DATA_OFFSET + offset, there).await;
            }
        }
        Ok(())
    }

    async fn shrink(&self, io: Io<'_>, before: u64, bytes: u64) -> Result<(), IoError> {
        let cut = bytes.next_multiple_of(self.cluster_bytes);
        let last = || self.state(bytes / self.cluster_bytes) & !UNSURE;
        if cut > bytes && matches!(last(), DATA | COMPRESSED) {
            // What grows there again is zero.
            let place = DATA_OFFSET + bytes;
            let zeroes = io
                .child(0)
                .write_zeroes(place, cut - bytes, ZeroFlags::empty());
            zeroes.await?;
        }
        let gone = cut / self.cluster_bytes..before.div_ceil(self.cluster_bytes);
        if gone.start < gone.end {
            self.set_states(io, gone, ABSENT).await?;
        }
        Ok(())
    }

    /// Covers with zeroes what a longer backing node has where this one grows.
    async fn cover(&self, io: Io<'_>, before: u64, bytes: u64) -> Result<(), IoError> {
        let whole = before.next_multiple_of(self.cluster_bytes);
        if whole > before && self.state(before / self.cluster_bytes) & !UNSURE == ABSENT {
            let zeroes = Segments::allocate((whole - before) as usize, 512);
            zeroes.fill(0);
            self.allocate(io, before, zeroes, DATA).await?;
        }
        let grown = whole / self.cluster_bytes..bytes.div_ceil(self.cluster_bytes);
        if grown.start < grown.end {
            self.set_states(io, grown, ZERO).await?;
        }
        Ok(())
    }
}

/// Reads what the backing node has; zeroes past its end, or without one.
async fn read_backing(io: Io<'_>, offset: u64, into: Segments) -> Result<(), IoError> {
    let Some(backing) = io.backing() else {
        into.fill(0);
        return Ok(());
    };
    let bytes = into.bytes();
    let there = backing.bytes().saturating_sub(offset).min(bytes);
    into.slice(there, bytes - there).fill(0);
    if there == 0 {
        return Ok(());
    }
    io.child(0).event("read_backing_aio").await?;
    backing.read(offset, into.slice(0, there)).await
}

impl DriverIo for OverlayIo {
    fn bytes(&self, _children: &[u64]) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    fn map(&self, _write: bool, offset: u64, bytes: u64) -> Mapping {
        let (is_data, run) = self.run(offset, bytes, |state| state == DATA);
        match is_data && run == bytes {
            true => Mapping::Child {
                index: 0,
                offset: DATA_OFFSET + offset,
            },
            false => Mapping::Ask,
        }
    }

    fn child_unit(&self, _unit: u32) -> u32 {
        // Map bytes are written one by one.
        1
    }

    fn read<'a>(&'a self, io: Io<'a>, offset: u64, into: Segments) -> IoFuture<'a> {
        async move {
            io.child(0).event("read_aio").await?;
            self.read_here(io, offset, into).await
        }
        .boxed_local()
    }

    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        _flags: WriteFlags,
    ) -> IoFuture<'a> {
        async move {
            let mut done = 0;
            while done < from.bytes() {
                let rest = from.slice(done, from.bytes() - done);
                done += self.write_some(io, offset + done, rest).await?;
            }
            Ok(())
        }
        .boxed_local()
    }

    fn write_compressed<'a>(&'a self, io: Io<'a>, offset: u64, from: Segments) -> IoFuture<'a> {
        async move {
            let end = offset + from.bytes();
            let whole = end == io.bytes() || end.is_multiple_of(self.cluster_bytes);
            let one = from.bytes() <= self.cluster_bytes;
            if !offset.is_multiple_of(self.cluster_bytes) || !whole || !one {
                return Err(IoError::OutOfRange);
            }
            let cluster_end = offset + self.cluster_bytes;
            let _turn = self.changing.begin(offset, cluster_end, true).await;
            io.child(0).event("write_compressed").await?;
            // Where others may be writing in place, it stays so.
            let state = match self.state(offset / self.cluster_bytes) {
                DATA => DATA,
                _ => COMPRESSED,
            };
            self.allocate(io, offset, from, state).await
        }
        .boxed_local()
    }

    fn can_compress(&self) -> bool {
        true
    }

    fn write_zeroes<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        self.drop_clusters(io, offset, bytes, ZERO, unmap)
            .boxed_local()
    }

    fn discard<'a>(&'a self, io: Io<'a>, offset: u64, bytes: u64) -> IoFuture<'a> {
        // What the backing node has must not come back.
        let state = match io.backing() {
            Some(_) => ZERO,
            None => ABSENT,
        };
        self.drop_clusters(io, offset, bytes, state, true)
            .boxed_local()
    }

    fn block_status<'a>(
        &'a self,
        _io: Io<'a>,
        _exact: bool,
        offset: u64,
        bytes: u64,
    ) -> IoFuture<'a, Status> {
        async move {
            let (state, bytes) = self.run(offset, bytes, |state| state & !UNSURE);
            Ok(match state {
                ABSENT => Status::new(StatusFlags::empty(), bytes),
                ZERO => Status::new(StatusFlags::ZERO, bytes),
                COMPRESSED => Status::new(StatusFlags::DATA | StatusFlags::COMPRESSED, bytes),
                _ => Status {
                    flags: StatusFlags::DATA | StatusFlags::PLACE,
                    bytes,
                    place: Place {
                        child: Some(0),
                        offset: DATA_OFFSET + offset,
                    },
                },
            })
        }
        .boxed_local()
    }

    fn truncate<'a>(
        &'a self,
        io: Io<'a>,
        bytes: u64,
        _exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> IoFuture<'a> {
        async move {
            if preallocation != Preallocation::Off {
                return Err(IoError::Unsupported);
            }
            if bytes.div_ceil(self.cluster_bytes) > MAX_CLUSTERS {
                return Err(IoError::NoSpace);
            }
            let before = self.bytes.load(Ordering::Acquire);
            let least = before.min(bytes) / self.cluster_bytes * self.cluster_bytes;
            let _turn = self.changing.begin(least, u64::MAX, true).await;
            if bytes < before {
                self.shrink(io, before, bytes).await?;
            } else if flags.contains(TruncateFlags::ZERO) {
                self.cover(io, before, bytes).await?;
            }
            let length = segments(&bytes.to_le_bytes());
            // After the magic and the cluster size.
            io.child(0).write(16, length, WriteFlags::empty()).await?;
            self.bytes.store(bytes, Ordering::Release);
            Ok(())
        }
        .boxed_local()
    }

    fn info(&self) -> DriverInfo {
        DriverInfo {
            cluster_bytes: self.cluster_bytes,
            ..DriverInfo::default()
        }
    }
}
