//! Files that are opened anew under their users, for other modes or because somebody begins to write.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockcore::engine::{EngineChoice, Errno, HostCall, HostReply, OpenOptions, make};
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::IoContext;
use blockcore::options::Options;
use blockcore::{Error, ErrorKind, IoError};
use harness::daemon::{Place, eventually};
use harness::host::{LoopDevice, Mount, skip};
use harness::random::Random;

use crate::{Disk, MIB, SECTOR, engines, file_options, locked_bytes, places};

/// How this process has a file open: for writing or not, past the page cache or not; by description.
fn ways(path: &Path) -> Vec<(bool, bool)> {
    let path = fs::canonicalize(path).expect("it is there");
    let mut ways = Vec::new();
    for entry in fs::read_dir("/proc/self/fd").expect("Linux").flatten() {
        if !fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            continue;
        }
        let info = Path::new("/proc/self/fdinfo").join(entry.file_name());
        let info = fs::read_to_string(info).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|text| i32::from_str_radix(text.trim(), 8).ok());
        // Closed meanwhile if there are none.
        ways.extend(flags.map(|flags| {
            let write = flags & libc::O_ACCMODE == libc::O_RDWR;
            (write, flags & libc::O_DIRECT != 0)
        }));
    }
    ways
}

/// The disk's worker has let the old description go, and the new one is open so.
#[track_caller]
fn is_open(disk: &Disk, path: &Path, write: bool, direct: bool) {
    eventually("the file is open this way only", || {
        disk.read(0, SECTOR).expect("a read");
        ways(path) == [(write, direct)]
    });
}

fn on_off(random: &mut Random) -> &'static str {
    match random.below(2) {
        0 => "on",
        _ => "off",
    }
}

/// Tries for as long as the disk is reopened to lock what it holds; says how often.
fn try_to_come_in(path: PathBuf, over: &AtomicBool) -> usize {
    let context = IoContext::new(make(EngineChoice::Threads).expect("there are threads"));
    let host = |call| {
        let inner = Rc::clone(&context);
        context.block_on(async move { inner.host(call).await })
    };
    let options = OpenOptions {
        write: true,
        ..OpenOptions::default()
    };
    let file = match host(HostCall::Open(path, options)) {
        Ok(HostReply::File(file)) => file,
        other => panic!("{other:?}"),
    };
    let mut tries = 0;
    while !over.load(Ordering::Relaxed) {
        for byte in [100, 101, 201] {
            let locked = host(HostCall::LockExclusive(Arc::clone(&file), byte));
            assert_eq!(locked.err(), Some(Errno::AGAIN), "byte {byte}");
        }
        tries += 1;
    }
    drop(file);
    context.abandon();
    tries
}

#[test]
fn a_disk_that_is_reopened_at_random_keeps_its_data_and_never_loses_its_locks() {
    let mut random = Random::announced("reopening");
    for engine in engines() {
        for place in places() {
            let path = place.sparse("disk.raw", MIB);
            let Ok(disk) = Disk::open(engine, &file_options(&path, ",cache.direct=on")) else {
                continue;
            };
            // By another name, which shows whose descriptor it is.
            let other = place.join("other name");
            fs::hard_link(&path, &other).expect("it is ours");
            let over = Arc::new(AtomicBool::new(false));
            let watcher = std::thread::spawn({
                let (over, path) = (Arc::clone(&over), other.clone());
                move || try_to_come_in(path, &over)
            });
            let mut model = vec![0; MIB as usize];
            for turn in 0..60 {
                for _ in 0..random.below(4) {
                    let offset = random.below(MIB / 512 - 20) as usize * 512;
                    let sectors = 1 + random.below(20) as usize;
                    let data = random.bytes(512 * sectors);
                    disk.write(offset as u64, &data).expect("a write");
                    model[offset..offset + data.len()].copy_from_slice(&data);
                }
                let direct = on_off(&mut random);
                let read_only = random.below(5) == 0;
                let mut more = format!(
                    ",cache.direct={direct},cache.no-flush={},discard={},auto-read-only={}",
                    on_off(&mut random),
                    random.pick(&["ignore", "unmap"]),
                    on_off(&mut random),
                );
                if read_only {
                    more += ",read-only=on";
                }
                let before = ways(&path);
                match disk.reopen(&file_options(&path, &more)) {
                    Ok(()) => {
                        assert!(!read_only, "turn {turn}: somebody writes");
                        is_open(&disk, &path, true, direct == "on");
                    }
                    Err(error) => {
                        assert!(read_only, "turn {turn}: {more}: {}", error.report());
                        let now = before.last().expect("one way");
                        is_open(&disk, &path, now.0, now.1);
                    }
                }
                let data = disk.read(0, MIB as usize).expect("a read");
                assert!(data == model, "turn {turn}: {more}");
            }
            over.store(true, Ordering::Relaxed);
            let tries = watcher.join().expect("the locks were always there");
            assert!(tries > 100, "only {tries} tries");
            fs::remove_file(other).expect("it is ours");
            disk.flush().expect("a flush");
            disk.close();
            assert!(fs::read(&path).expect("it is there") == model);
        }
    }
}

#[test]
fn modes_that_need_no_other_file_take_effect_on_the_one_there_is() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    for engine in engines() {
        let path = place.sparse("disk.raw", MIB);
        let disk = Disk::open(engine, &file_options(&path, "")).expect("it opens");
        let file = || {
            let look = |graph: &Graph| Ok(Arc::clone(&graph.node("disk")?.io().files()[0]));
            let file: Result<_, Error> = disk.control.read(look);
            file.expect("it is there")
        };
        let first = file();
        disk.write(0, &vec![1; MIB as usize]).expect("a write");
        disk.reopen(&file_options(&path, ",cache.no-flush=on,discard=unmap"))
            .expect("it is reopened");
        assert!(Arc::ptr_eq(&first, &file()));
        let syncs = first.syncs();
        disk.write(0, &[1; SECTOR]).expect("a write");
        disk.flush().expect("it does nothing");
        assert_eq!(first.syncs(), syncs);
        disk.discard(0, MIB).expect("a discard");
        assert_eq!(fs::metadata(&path).expect("it is there").blocks(), 0);
        // What is left out returns to its default.
        disk.reopen(&file_options(&path, ""))
            .expect("it is reopened");
        disk.write(0, &vec![1; MIB as usize]).expect("a write");
        disk.flush().expect("a real one");
        assert!(first.syncs() > syncs);
        disk.discard(0, MIB).expect("a discard");
        assert!(fs::metadata(&path).expect("it is there").blocks() >= MIB / 512);
        drop(first);
        disk.close();
    }
}

#[test]
fn a_reopen_that_is_refused_leaves_everything_as_it_was() {
    for engine in engines() {
        let place = Place::new();
        let path = place.sparse("disk.raw", MIB + 1);
        let disk = Disk::open(engine, &file_options(&path, "")).expect("it opens");
        let other = place.sparse("other.raw", MIB);
        for (options, kind, word) in [
            (
                file_options(&path, ",cache.direct=on"),
                ErrorKind::Invalid,
                "multiple",
            ),
            (file_options(&other, ""), ErrorKind::Invalid, "filename"),
            (
                file_options(&path, ",locking=off"),
                ErrorKind::Invalid,
                "locking",
            ),
            (
                file_options(&path, ",force-share=on"),
                ErrorKind::Invalid,
                "read-only",
            ),
            (
                file_options(&path, ",read-only=on"),
                ErrorKind::PermissionDenied,
                "read-only",
            ),
            (
                format!("raw,filename={}", path.display()),
                ErrorKind::Invalid,
                "driver",
            ),
        ] {
            let error = disk.reopen(&options).expect_err("it cannot be");
            assert_eq!(error.kind(), kind, "{options}: {}", error.report());
            assert!(
                error.report().contains(word),
                "{options}: {}",
                error.report()
            );
            disk.write(0, &[1; SECTOR]).expect("a write");
            disk.flush().expect("a flush");
            is_open(&disk, &path, true, false);
            assert_eq!(locked_bytes(&path), [100, 101, 201].into());
        }
        // Another file has taken its name.
        disk.truncate_to(&path, MIB);
        let moved = place.join("moved.raw");
        fs::rename(&path, &moved).expect("it is ours");
        fs::rename(&other, &path).expect("it is ours");
        let error = disk.reopen(&file_options(&path, ",cache.direct=on"));
        let error = error.expect_err("it is another file").report();
        assert!(error.contains("another file"), "{error}");
        is_open(&disk, &moved, true, false);
        assert_eq!(ways(&path), []);
        assert_eq!(locked_bytes(&moved), [100, 101, 201].into());
        fs::rename(&moved, &path).expect("it is ours");
        disk.reopen(&file_options(&path, ",cache.direct=on"))
            .expect("it is itself again");
        is_open(&disk, &path, true, true);
        disk.close();
    }
}

impl Disk {
    /// Gives its file another length behind its back.
    fn truncate_to(&self, path: &Path, bytes: u64) {
        let file = fs::File::options().write(true).open(path);
        file.and_then(|file| file.set_len(bytes))
            .expect("it is ours");
    }
}

#[test]
fn of_nodes_that_are_reopened_together_all_are_or_none() {
    let place = Place::new();
    let (one, two) = (place.sparse("one.raw", MIB), place.sparse("two.raw", MIB));
    let disk = Disk::open(EngineChoice::Threads, &file_options(&one, "")).expect("it opens");
    let control = disk.control.clone();
    let options = |path: &Path, name: &str, more: &str| {
        let options = file_options(path, &format!(",node-name={name}{more}"));
        Options::parse(&options, Some("driver")).expect("options")
    };
    let (add, entries) = (
        options(&two, "two", ""),
        vec![
            options(&one, "disk", ",cache.direct=on"),
            options(&two, "two", ",cache.direct=on,locking=off"),
        ],
    );
    let refused = Rc::clone(control.context()).block_on(async move {
        control.add(add).await?;
        let refused = control.reopen(entries).await;
        control.remove("two").await?;
        Ok::<_, Error>(refused)
    });
    let error = refused.expect("it was added").expect_err("locks stay");
    assert!(error.report().contains("locking"), "{}", error.report());
    is_open(&disk, &one, true, false);
    disk.close();
}

/// What the guest would have seen: its disk refuses to flush for ever, and only a restart of the daemon
/// helps.
#[test]
fn an_operator_who_reopens_a_node_whose_flush_failed_makes_a_new_beginning() {
    for engine in engines() {
        let mount = match Mount::tmpfs(4 * MIB) {
            Ok(mount) => mount,
            Err(reason) => return skip("a flush that fails", &reason),
        };
        let file = mount.sparse("device", 64 * MIB);
        let device = match LoopDevice::on(&file, 512) {
            Ok(device) => device,
            Err(reason) => return skip("a flush that fails", &reason),
        };
        let options = format!("host_device,filename={}", device.path().display());
        let disk = Disk::open(engine, &options).expect("it opens");
        for number in 0..8 {
            disk.write(MIB * number, &vec![2; MIB as usize])
                .expect("the page cache takes it");
        }
        assert_eq!(disk.flush(), Err(IoError::FlushLost), "{engine:?}");
        // Somebody who comes and goes decides nothing.
        let control = disk.control.clone();
        let came = Rc::clone(control.context()).block_on(async move {
            let mut spec = RootSpec::reader("another");
            spec.shares = blockcore::graph::permission::Permissions::all();
            let root = control.add_root("disk", spec).await;
            match root {
                Ok(root) => control.remove_root(root).await,
                Err(error) => Err(error),
            }
        });
        came.expect("it only reads");
        assert_eq!(disk.flush(), Err(IoError::FlushLost), "{engine:?}");
        disk.reopen(&options).expect("it is reopened");
        disk.write(0, &[3; SECTOR]).expect("a write");
        disk.flush().expect("a new beginning");
        disk.close();
    }
}

/// A node that nobody uses yet.
struct Unused {
    control: Control,
}

impl Unused {
    fn open(engine: EngineChoice, options: &str) -> Result<Self, Error> {
        let context = IoContext::new(make(engine)?);
        let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
        let options = Options::parse(&format!("{options},node-name=disk"), Some("driver"))?;
        let inner = control.clone();
        context.block_on(async move { inner.add(options).await })?;
        Ok(Self { control })
    }

    fn use_it(&self, spec: RootSpec) -> Result<RootId, Error> {
        let control = self.control.clone();
        let context = Rc::clone(control.context());
        context.block_on(async move { control.add_root("disk", spec).await })
    }

    fn leave(&self, root: RootId) {
        let control = self.control.clone();
        let context = Rc::clone(control.context());
        let left = context.block_on(async move { control.remove_root(root).await });
        left.expect("it was there");
    }

    #[track_caller]
    fn is_open(&self, path: &Path, write: bool) {
        eventually("the file is open this way only", || {
            let context = self.control.context();
            let inner = Rc::clone(context);
            let pause = std::time::Duration::from_millis(1);
            context.block_on(async move { inner.delay(pause).await });
            ways(path) == [(write, false)]
        });
    }

    fn close(self) {
        let control = self.control.clone();
        let context = Rc::clone(control.context());
        let closed = context.block_on(async move { control.remove("disk").await });
        closed.expect("it was there");
        context.abandon();
    }
}

#[test]
fn with_auto_read_only_a_file_is_open_for_writing_while_somebody_writes() {
    use blockcore::graph::permission::Permissions;
    let sharing = |spec: RootSpec| RootSpec {
        shares: Permissions::all(),
        ..spec
    };
    for engine in engines() {
        let place = Place::new();
        let path = place.sparse("disk.raw", MIB);
        let options = file_options(&path, ",auto-read-only=on");
        let node = Unused::open(engine, &options).expect("it opens");
        node.is_open(&path, false);
        let reader = node.use_it(sharing(RootSpec::reader("a reader")));
        let reader = reader.expect("it may read");
        node.is_open(&path, false);
        let writers = [1, 2].map(|number| {
            let spec = sharing(RootSpec::writer(format!("writer {number}")));
            node.use_it(spec).expect("it may write")
        });
        node.is_open(&path, true);
        assert_eq!(locked_bytes(&path), [100, 101].into());
        let root = node.control.root_here(writers[0]).expect("it is there");
        let context = Rc::clone(node.control.context());
        let written = context.block_on(async move {
            let from = blockcore::io::buffer::Segments::allocate(SECTOR, 1);
            from.fill(5);
            root.write(512, from, blockcore::driver::WriteFlags::STABLE)
                .await
        });
        written.expect("a write");
        node.leave(writers[0]);
        node.is_open(&path, true);
        node.leave(writers[1]);
        node.is_open(&path, false);
        eventually("only the reader's lock is there", || {
            locked_bytes(&path) == [100].into()
        });
        assert!(fs::read(&path).expect("it is there")[512..1024] == [5; SECTOR]);
        node.leave(reader);
        node.close();
    }
}

#[test]
fn with_auto_read_only_a_file_that_nobody_may_write_is_there_for_reading() {
    let device = match LoopDevice::read_only(MIB, 512) {
        Ok(device) => device,
        Err(reason) => return skip("a read-only device", &reason),
    };
    for engine in engines() {
        let options = format!(
            "host_device,filename={},auto-read-only=on",
            device.path().display()
        );
        let node = Unused::open(engine, &options).expect("it opens");
        for _ in 0..2 {
            let error = node.use_it(RootSpec::writer("a writer"));
            let error = error.expect_err("nobody may write");
            assert_eq!(
                error.kind(),
                ErrorKind::PermissionDenied,
                "{}",
                error.report()
            );
            let reader = node.use_it(RootSpec::reader("a reader"));
            node.leave(reader.expect("it may read"));
        }
        node.close();
        eventually("the locks are gone", || {
            locked_bytes(device.path()).is_empty()
        });
    }
}

#[test]
fn a_disk_for_reading_becomes_one_for_writing_and_is_one_for_reading_again() {
    for engine in engines() {
        for place in places() {
            let path = place.sparse("disk.raw", MIB);
            let reader = file_options(&path, ",read-only=on");
            let disk = Disk::open(engine, &reader).expect("it opens");
            is_open(&disk, &path, false, false);
            assert_eq!(disk.write(0, &[1; SECTOR]), Err(IoError::ReadOnly));
            disk.reopen(&file_options(&path, ""))
                .expect("it may be written");
            is_open(&disk, &path, true, false);
            assert_eq!(locked_bytes(&path), [100, 201].into());
            disk.reopen(&file_options(&path, ",read-only=on,force-share=on"))
                .expect("nobody writes");
            is_open(&disk, &path, false, false);
            eventually("no claim is left", || {
                disk.read(0, SECTOR).expect("a read");
                locked_bytes(&path) == [100].into()
            });
            disk.reopen(&reader).expect("nobody writes");
            assert_eq!(locked_bytes(&path), [100, 201].into());
            disk.close();
        }
    }
}
