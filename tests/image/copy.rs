//! Copying by the host, from disk to disk.

use blockcore::driver::CopyFlags;
use blockcore::engine::EngineChoice;
use blockcore::graph::{Control, RootSpec};
use blockcore::io::RequestKind;
use blockcore::options::Options;
use blockcore::{Error, IoError};
use harness::daemon::Place;
use harness::host::{Mount, skip};
use harness::random::Random;
use std::path::Path;
use std::rc::Rc;

use crate::{Disk, MIB, engines, file_options, places};

/// A second disk in the graph of the first.
struct Other {
    control: Control,
    root: Rc<blockcore::io::Root>,
}

impl Other {
    fn open(disk: &Disk, options: &str) -> Self {
        let control = disk.control.clone();
        let options = format!("{options},node-name=other");
        let options = Options::parse(&options, Some("driver")).expect("options");
        let inner = control.clone();
        let root = control.context().block_on(async move {
            inner.add(options).await?;
            let spec = RootSpec::writer("another test").in_units_of(512);
            let id = inner.add_root("other", spec).await?;
            inner.root_here(id)
        });
        Self {
            control,
            root: root.expect("it opens"),
        }
    }

    fn close(self) {
        let Self { control, root } = self;
        let context = Rc::clone(control.context());
        let closed = context.block_on(async move {
            control.remove_root(root.id()).await?;
            drop(root);
            control.remove("other").await?;
            Ok::<_, Error>(())
        });
        closed.expect("it was there");
    }

    fn copy(&self, disk: &Disk, range: (u64, u64, u64), flags: CopyFlags) -> Result<(), IoError> {
        let (from, to) = (Rc::clone(&disk.root), Rc::clone(&self.root));
        let (offset, to_offset, bytes) = range;
        disk.control.context().block_on(async move {
            let from = from.enter(RequestKind::Read, offset, bytes).await;
            let to = to.enter(RequestKind::Write, to_offset, bytes).await;
            from.copy_range(offset, &to, to_offset, bytes, flags).await
        })
    }
}

#[test]
fn the_host_copies_ranges_between_files_as_they_are() {
    let mut random = Random::announced("copies");
    for engine in engines() {
        for place in places() {
            for direct in ["off", "on"] {
                let source = random.bytes(4 * MIB as usize);
                let mut model = random.bytes(3 * MIB as usize);
                let from = place.file("from.raw", &source);
                let to = place.file("to.raw", &model);
                let more = format!(",cache.direct={direct},discard=unmap");
                let Ok(disk) = Disk::open(engine, &file_options(&from, &more)) else {
                    continue;
                };
                let raw = format!(
                    "raw,discard=unmap,cache.direct={direct},file.driver=file,file.filename={}",
                    to.display()
                );
                let other = Other::open(&disk, &raw);
                for turn in 0..50 {
                    let bytes = (1 + random.below(4096)) * 512;
                    let bytes = bytes.min(3 * MIB);
                    let offset = random.below(4 * MIB - bytes + 1) / 512 * 512;
                    let to_offset = random.below(3 * MIB - bytes + 1) / 512 * 512;
                    let zero = random.below(8) == 0;
                    let flags = if zero {
                        CopyFlags::ZERO
                    } else {
                        CopyFlags::empty()
                    };
                    let range = (offset, to_offset, bytes);
                    match other.copy(&disk, range, flags) {
                        Ok(()) => {}
                        // Zeroes that would have to be written, or a unit above 512.
                        Err(IoError::Unsupported) if zero || direct == "on" => continue,
                        Err(error) => panic!("turn {turn}: {range:?}: {error}"),
                    }
                    let into = &mut model[to_offset as usize..][..bytes as usize];
                    match zero {
                        true => into.fill(0),
                        false => into.copy_from_slice(&source[offset as usize..][..bytes as usize]),
                    }
                }
                other.close();
                disk.close();
                assert!(
                    std::fs::read(&to).expect("it is there") == model,
                    "direct {direct}"
                );
            }
        }
    }
}

#[test]
fn a_copy_that_no_host_can_do_is_refused_and_changes_nothing() {
    let place = Place::new();
    let from = place.file("from.raw", &vec![1; MIB as usize]);
    let disk = Disk::open(EngineChoice::Threads, &file_options(&from, "")).expect("it opens");
    let nothing = CopyFlags::empty();
    let other = Other::open(&disk, "null-co,size=1M");
    let refused = other.copy(&disk, (0, 0, 4096), nothing);
    assert_eq!(refused, Err(IoError::Unsupported));
    other.close();
    let to = place.sparse("to.raw", MIB);
    let other = Other::open(&disk, &file_options(&to, ""));
    for range in [(0, MIB - 512, 1024), (MIB - 512, 0, 1024)] {
        assert_eq!(other.copy(&disk, range, nothing), Err(IoError::OutOfRange));
    }
    other.close();
    match Mount::ramfs() {
        Ok(mount) => elsewhere(&disk, &mount.sparse("to.raw", MIB)),
        Err(reason) => skip("a copy to another file system", &reason),
    }
    disk.close();
}

/// From one file system to another: some kernels can, and then it is right.
fn elsewhere(disk: &Disk, to: &Path) {
    let other = Other::open(disk, &file_options(to, ""));
    let copied = other.copy(disk, (0, 4096, 8192), CopyFlags::empty());
    other.close();
    let mut expected = vec![0; MIB as usize];
    match copied {
        Ok(()) => expected[4096..12288].fill(1),
        Err(error) => assert_eq!(error, IoError::Unsupported),
    }
    assert!(std::fs::read(to).expect("it is there") == expected);
}
