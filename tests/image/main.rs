//! Drivers `file`, `host_device`, `raw` and `null-co` against the real host, on both real engines.
//!
//! Most tests open nodes in this process, as the daemon does. Random requests on simulated hosts, which
//! fail on cue, are in `graph.rs`, reopening and copying there in `simulated`; what an operator sees of a refusal is in `serve`.

mod copy;
mod create;
mod device;
mod direct;
mod grow;
mod length;
mod lock;
mod raw;
mod reopen;
mod simulated;
mod space;
mod sparse;
mod status;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockcore::driver::{Preallocation, Status, TruncateFlags, WriteFlags, ZeroFlags};
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{ContextHandle, IoContext, RequestKind, Root};
use blockcore::options::Options;
use blockcore::{Error, IoError};
use harness::daemon::{Place, eventually};
use harness::host::skip;
use harness::random::Random;

const SECTOR: usize = 512;
const MIB: u64 = 1 << 20;

/// Every real engine that this host allows.
fn engines() -> Vec<EngineChoice> {
    let mut engines = vec![EngineChoice::Threads];
    match make(EngineChoice::Uring) {
        Ok(_) => engines.push(EngineChoice::Uring),
        Err(error) => skip("io_uring", &error.report()),
    }
    engines
}

/// A node and what it takes to use it on this thread.
struct Disk {
    control: Control,
    root: Rc<Root>,
    id: RootId,
    /// The file at the bottom, if there is one.
    file: Option<PathBuf>,
}

impl Disk {
    /// Opens a node, whose `node-name` is added, for a guest with blocks of 512 bytes.
    fn open(engine: EngineChoice, options: &str) -> Result<Self, Error> {
        let spec = match options.contains(",read-only=on") {
            true => RootSpec::reader("a test"),
            false => RootSpec::writer("a test"),
        };
        Self::open_for(engine, options, spec.in_units_of(SECTOR as u32))
    }

    /// As [`open`](Self::open), for this user.
    fn open_for(engine: EngineChoice, options: &str, spec: RootSpec) -> Result<Self, Error> {
        let file = options.split_once("filename=").map(|(_, rest)| {
            let end = rest.find(',').unwrap_or(rest.len());
            rest[..end].into()
        });
        let context = IoContext::new(make(engine)?);
        let mut drivers = formats::drivers();
        drivers.push(&grow::WINDOW);
        let control = Control::new(Graph::new(drivers), Rc::clone(&context));
        let options = Options::parse(&format!("{options},node-name=disk"), Some("driver"))?;
        let inner = control.clone();
        let id = context.block_on(async move {
            inner.add(options).await?;
            let added = inner.add_root("disk", spec).await;
            if added.is_err() {
                inner.remove("disk").await?;
            }
            added
        })?;
        Ok(Self {
            root: control.root_here(id)?,
            id,
            control,
            file,
        })
    }

    /// Attaches the disk's root to other workers, which must be running.
    fn attach(&self, workers: Vec<ContextHandle>) {
        let (control, id) = (self.control.clone(), self.id);
        let attached = self.control.context().block_on(async move {
            for worker in &workers {
                control.attach(id, worker).await?;
            }
            Ok::<_, Error>(())
        });
        attached.expect("the workers are there");
    }

    fn on_root<T, W>(&self, work: impl FnOnce(Rc<Root>) -> W) -> T
    where
        T: 'static,
        W: Future<Output = T> + 'static,
    {
        self.control.context().block_on(work(Rc::clone(&self.root)))
    }

    fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>, IoError> {
        self.read_into(offset, Segments::allocate(bytes, 1))
    }

    fn read_into(&self, offset: u64, into: Segments) -> Result<Vec<u8>, IoError> {
        let given = into.clone();
        self.on_root(move |root| async move { root.read(offset, given).await })?;
        Ok(into.to_vec())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let from = Segments::allocate(data.len(), 1);
        from.copy_from(data);
        self.write_from(offset, from)
    }

    fn write_from(&self, offset: u64, from: Segments) -> Result<(), IoError> {
        self.on_root(move |root| async move { root.write(offset, from, WriteFlags::empty()).await })
    }

    fn zero(&self, offset: u64, bytes: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.on_root(move |root| async move { root.write_zeroes(offset, bytes, flags).await })
    }

    fn discard(&self, offset: u64, bytes: u64) -> Result<(), IoError> {
        self.on_root(move |root| async move { root.discard(offset, bytes).await })
    }

    fn flush(&self) -> Result<(), IoError> {
        self.on_root(|root| async move { root.flush().await })
    }

    fn bytes(&self) -> u64 {
        self.root.bytes()
    }

    fn truncate(
        &self,
        bytes: u64,
        exact: bool,
        preallocation: Preallocation,
        flags: TruncateFlags,
    ) -> Result<(), IoError> {
        self.on_root(move |root| async move {
            let request = root.enter(RequestKind::Truncate, bytes, 0).await;
            request.truncate(bytes, exact, preallocation, flags).await
        })
    }

    fn status(&self, exact: bool, offset: u64, bytes: u64) -> Status {
        let status = self.on_root(move |root| async move {
            let request = root.enter(RequestKind::Other, offset, bytes).await;
            request.block_status(exact, offset, bytes).await
        });
        status.expect("an answer")
    }

    fn allocated_bytes(&self) -> Option<u64> {
        let bytes = self.on_root(|root| async move {
            let request = root.enter(RequestKind::Other, 0, 0).await;
            request.io().allocated_bytes().await
        });
        bytes.expect("an answer")
    }

    /// Reopens the node, all of whose options these are but its name.
    fn reopen(&self, options: &str) -> Result<(), Error> {
        let options = Options::parse(&format!("{options},node-name=disk"), Some("driver"))?;
        let control = self.control.clone();
        let context = Rc::clone(control.context());
        context.block_on(async move { control.reopen(vec![options]).await })
    }

    /// Closes the node, of whose file nobody else has a lock, and waits until its own are gone. A process
    /// that a test beside this one starts shares them for a moment.
    fn close(mut self) {
        let file = self.file.take();
        self.release();
        if let Some(file) = file {
            eventually("the locks are gone", || locked_bytes(&file).is_empty());
        }
    }

    /// Closes the node.
    fn release(self) {
        let Self {
            control, root, id, ..
        } = self;
        drop(root);
        let context = Rc::clone(control.context());
        context.block_on(async move {
            control.remove_root(id).await.expect("it is there");
            // A flush that failed before has been told of.
            let _ = control.remove("disk").await;
        });
        context.abandon();
    }
}

/// The bytes of a file that are locked by descriptions, all of them shared.
fn locked_bytes(path: &Path) -> BTreeSet<u64> {
    let inode = fs::metadata(path).expect("it is there").ino();
    let locks = fs::read_to_string("/proc/locks").expect("Linux shows its locks");
    let mut bytes = BTreeSet::new();
    for line in locks.lines() {
        // 1: OFDLCK ADVISORY  READ -1 fd:01:1234 100 101
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, kind, _, access, _, file, first, last] = words[..] else {
            continue;
        };
        if file.rsplit(':').next() != Some(&inode.to_string()) {
            continue;
        }
        assert_eq!((kind, access), ("OFDLCK", "READ"), "{line}");
        let number = |text: &str| text.parse::<u64>().expect("a byte");
        bytes.extend(number(first)..=number(last));
    }
    bytes
}

/// Memory for `bytes` bytes that is not aligned to anything, in two pieces.
fn odd_memory(bytes: usize, random: &mut Random) -> Segments {
    let shift = 1 + random.below(63);
    let cut = random.below(bytes as u64 + 1);
    let piece = |bytes: u64| {
        let whole = Segments::allocate(bytes as usize + 64, 4096);
        whole.slice(shift, bytes)
    };
    Segments::join(vec![piece(cut), piece(bytes as u64 - cut)])
}

/// A thousand random requests in multiples of `unit`, compared with a model in memory that begins as
/// `model`; at the end, the whole disk.
fn verify(disk: &Disk, model: &mut [u8], unit: u64, random: &mut Random) {
    let all = model.len() as u64;
    assert_eq!(disk.bytes(), all);
    for turn in 0..1000 {
        let longest = *random.pick(&[unit, 4096, 16384, 300 << 10]);
        let bytes = (random.below(longest) / unit * unit + unit).min(all);
        let offset = random.below((all - bytes) / unit + 1) * unit;
        let range = offset as usize..(offset + bytes) as usize;
        let memory = match random.below(2) {
            0 => odd_memory(bytes as usize, random),
            _ => Segments::allocate(bytes as usize, 4096),
        };
        match random.below(16) {
            0..6 => {
                let data = random.bytes(bytes as usize);
                memory.copy_from(&data);
                disk.write_from(offset, memory).expect("a write");
                model[range].copy_from_slice(&data);
            }
            6 | 7 => {
                let flags = *random.pick(&[ZeroFlags::empty(), ZeroFlags::MAY_UNMAP]);
                disk.zero(offset, bytes, flags).expect("zeroes");
                model[range].fill(0);
            }
            8 => {
                disk.discard(offset, bytes).expect("a discard");
                // What is not given back stays, on the edges as a whole.
                let now = disk.read(offset, bytes as usize).expect("a read");
                for (new, old) in now.iter().zip(&model[range.clone()]) {
                    assert!(*new == 0 || new == old, "turn {turn}: not what it was");
                }
                model[range].copy_from_slice(&now);
            }
            9 => disk.flush().expect("a flush"),
            _ => {
                memory.fill(0xa5);
                let data = disk.read_into(offset, memory).expect("a read");
                assert!(
                    data == model[range],
                    "turn {turn}: {offset}+{bytes} differs"
                );
            }
        }
    }
    let data = disk.read(0, model.len()).expect("a read");
    let wrong = data
        .iter()
        .zip(&*model)
        .position(|(is, should)| is != should);
    assert_eq!(wrong, None, "the first byte that differs");
}

/// Where ordinary files are tried: the disk, and memory.
fn places() -> Vec<Place> {
    let mut places = vec![Place::new()];
    match Place::within(Path::new("/dev/shm")) {
        Ok(place) => places.push(place),
        Err(error) => skip("files in memory", &error.to_string()),
    }
    places
}

fn file_options(path: &Path, more: &str) -> String {
    let path: PathBuf = path.into();
    format!("file,filename={}{more}", path.display())
}
