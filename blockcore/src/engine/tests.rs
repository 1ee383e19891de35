//! The same behaviour of both real engines.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::*;

/// Every real engine that this host allows.
fn engines() -> Vec<Rc<dyn Engine>> {
    let mut engines = vec![make(EngineChoice::Threads).unwrap()];
    match make(EngineChoice::Uring) {
        Ok(uring) => engines.push(uring),
        Err(error) => eprintln!("io_uring not tested: {}", error.report()),
    }
    engines
}

fn run<T>(engine: &dyn Engine, future: impl Future<Output = T>) -> T {
    let executor = crate::executor::Executor::new(Arc::clone(engine.sleeper()));
    let _ = &executor;
    let mut future = std::pin::pin!(future);
    let waker = futures_util::task::noop_waker();
    let mut events = Vec::new();
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        engine.sleeper().falling_asleep();
        engine.wait(&mut events, Some(Duration::from_millis(5)));
    }
}

fn scratch(engine: &dyn Engine) -> Arc<OpenFile> {
    let file = OpenFile::from_fd(
        OwnedFd::from(tempfile::tempfile().unwrap()),
        "scratch".into(),
    );
    engine.attach(&file);
    file
}

fn text(bytes: &[u8]) -> Segments {
    let segments = Segments::allocate(bytes.len(), 1);
    segments.copy_from(bytes);
    segments
}

#[test]
fn what_was_written_is_read_back_in_pieces_of_any_shape() {
    for engine in engines() {
        let file = scratch(&*engine);
        let (id, offset) = (file.id(), 3);
        let write = Op::Write {
            file: id,
            offset,
            segments: text(b"one small step"),
        };
        let (result, _) = run(&*engine, OpFuture::start(&*engine, write));
        assert_eq!(result, Ok(14), "{}", engine.name());
        let into = Segments::allocate(32, 1);
        let read = Op::Read {
            file: id,
            offset: 0,
            segments: into.clone(),
        };
        let (result, segments) = run(&*engine, OpFuture::start(&*engine, read));
        assert_eq!(result, Ok(17));
        assert_eq!(&segments.to_vec()[..17], b"\0\0\0one small step");
        let (result, _) = run(&*engine, OpFuture::start(&*engine, Op::Sync { file: id }));
        assert_eq!(result, Ok(0));
        assert_eq!(file.syncs(), 1);
    }
}

#[test]
fn operations_of_one_turn_go_to_the_kernel_with_one_call() {
    let Ok(engine) = uring::Uring::new() else {
        return eprintln!("io_uring not tested");
    };
    let file = scratch(&engine);
    let mut events = Vec::new();
    engine.poll(&mut events);
    let mut syncs: Vec<_> = (0..5)
        .map(|_| OpFuture::start(&engine, Op::Sync { file: file.id() }))
        .collect();
    assert_eq!(engine.waiting(), 5);
    engine.poll(&mut events);
    assert_eq!(engine.waiting(), 0);
    for sync in syncs.drain(..) {
        assert_eq!(run(&engine, sync).0, Ok(0));
    }
}

#[test]
fn a_hole_reads_as_zeroes_and_the_length_stays() {
    for engine in engines() {
        let file = scratch(&*engine);
        let id = file.id();
        let write = Op::Write {
            file: id,
            offset: 0,
            segments: text(&[7; 65536]),
        };
        assert_eq!(run(&*engine, OpFuture::start(&*engine, write)).0, Ok(65536));
        let punch = Op::Allocate {
            file: id,
            offset: 4096,
            bytes: 8192,
            mode: Allocate::PunchHole,
        };
        assert_eq!(run(&*engine, OpFuture::start(&*engine, punch)).0, Ok(0));
        let read = Op::Read {
            file: id,
            offset: 4095,
            segments: Segments::allocate(8194, 1),
        };
        let (result, segments) = run(&*engine, OpFuture::start(&*engine, read));
        assert_eq!(result, Ok(8194));
        let bytes = segments.to_vec();
        assert_eq!((bytes[0], bytes[8193]), (7, 7));
        assert!(bytes[1..8193].iter().all(|byte| *byte == 0));
        let reply = run(&*engine, engine.host(HostCall::Metadata(file))).unwrap();
        let HostReply::Metadata(metadata) = reply else {
            panic!("{reply:?}")
        };
        assert_eq!(metadata.bytes, 65536);
    }
}

#[test]
fn an_operation_on_a_file_that_is_not_attached_fails() {
    for engine in engines() {
        let file = scratch(&*engine);
        engine.detach(file.id());
        let (result, _) = run(
            &*engine,
            OpFuture::start(&*engine, Op::Sync { file: file.id() }),
        );
        assert_eq!(result, Err(Errno::BADF));
    }
}

#[test]
fn a_dropped_future_leaves_its_buffers_with_the_engine() {
    for engine in engines() {
        let file = scratch(&*engine);
        for round in 0..64_u64 {
            let offset = round * 4096;
            let write = Op::Write {
                file: file.id(),
                offset,
                segments: text(&[9; 4096]),
            };
            drop(OpFuture::start(&*engine, write));
        }
        let mut events = Vec::new();
        while engine.in_flight() > 0 {
            engine.sleeper().falling_asleep();
            engine.wait(&mut events, Some(Duration::from_millis(100)));
        }
        let reply = run(&*engine, engine.host(HostCall::Metadata(file))).unwrap();
        let HostReply::Metadata(metadata) = reply else {
            panic!("{reply:?}")
        };
        assert_eq!(metadata.bytes, 64 * 4096);
    }
}

#[test]
fn every_kick_ends_a_wait_though_nobody_reads_the_eventfd() {
    for engine in engines() {
        let kick =
            Arc::new(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap());
        let watch = engine.watch(Arc::clone(&kick));
        for _ in 0..100 {
            rustix::io::write(kick.as_fd(), &1_u64.to_ne_bytes()).unwrap();
            let mut events = Vec::new();
            while !events
                .iter()
                .any(|event| matches!(event, Event::Ready(id) if *id == watch))
            {
                engine.sleeper().falling_asleep();
                engine.wait(&mut events, Some(Duration::from_secs(10)));
                assert!(!events.is_empty(), "a kick was missed by {}", engine.name());
            }
        }
        engine.unwatch(watch);
        let mut events = Vec::new();
        engine.poll(&mut events);
        rustix::io::write(kick.as_fd(), &1_u64.to_ne_bytes()).unwrap();
        events.clear();
        engine.poll(&mut events);
        assert!(events.is_empty(), "{events:?}");
    }
}

#[test]
fn a_lock_on_one_description_is_seen_from_another() {
    let engine = make(EngineChoice::Auto).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, "x").unwrap();
    let open = || {
        let options = OpenOptions {
            write: true,
            ..OpenOptions::default()
        };
        match run(&*engine, engine.host(HostCall::Open(path.clone(), options))).unwrap() {
            HostReply::File(file) => file,
            reply => panic!("{reply:?}"),
        }
    };
    let (one, two) = (open(), open());
    run(
        &*engine,
        engine.host(HostCall::LockShared(Arc::clone(&one), 101)),
    )
    .unwrap();
    let test = |file: &Arc<OpenFile>, byte| {
        run(
            &*engine,
            engine.host(HostCall::TestLock(Arc::clone(file), byte)),
        )
    };
    assert_eq!(test(&two, 101).unwrap_err(), Errno::AGAIN);
    assert!(test(&two, 100).is_ok());
    assert!(test(&one, 101).is_ok(), "a lock of our own is no conflict");
    drop(one);
    assert!(test(&two, 101).is_ok());
}

#[test]
fn an_exclusive_lock_and_a_rename_do_what_the_simulation_says() {
    let engine = make(EngineChoice::Auto).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name);
    std::fs::write(path("old"), "old").unwrap();
    std::fs::write(path("new"), "new").unwrap();
    let open = |name| {
        let options = OpenOptions {
            write: true,
            ..OpenOptions::default()
        };
        match run(&*engine, engine.host(HostCall::Open(path(name), options))).unwrap() {
            HostReply::File(file) => file,
            reply => panic!("{reply:?}"),
        }
    };
    let call = |call| run(&*engine, engine.host(call)).map(|_| ());
    let (one, two) = (open("old"), open("old"));
    let exclusive = |file: &Arc<OpenFile>| HostCall::LockExclusive(Arc::clone(file), 0);
    let shared = |file: &Arc<OpenFile>| HostCall::LockShared(Arc::clone(file), 0);
    assert_eq!(call(shared(&one)), Ok(()));
    assert_eq!(call(exclusive(&two)), Err(Errno::AGAIN));
    assert_eq!(call(exclusive(&one)), Ok(()));
    assert_eq!(call(shared(&two)), Err(Errno::AGAIN));
    drop(one);
    assert_eq!(call(exclusive(&two)), Ok(()));

    let rename = || HostCall::Rename(path("new"), path("old"));
    assert_eq!(call(rename()), Ok(()));
    assert_eq!(call(rename()), Err(Errno::NOENT));
    assert_eq!(std::fs::read_to_string(path("old")).unwrap(), "new");
}

#[test]
fn a_watched_pipe_whose_writer_is_gone_does_not_keep_the_worker_busy() {
    for engine in engines() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let watch = engine.watch(Arc::new(read));
        drop(write);
        let mut events = Vec::new();
        for _ in 0..20 {
            engine.sleeper().falling_asleep();
            engine.wait(&mut events, Some(Duration::from_millis(1)));
        }
        assert!(
            events.len() <= 3,
            "{} events from {}",
            events.len(),
            engine.name()
        );
        engine.unwatch(watch);
    }
}

#[test]
fn an_engine_that_is_dropped_has_let_go_of_every_segment() {
    const BYTES: usize = 64 << 20;
    for engine in engines() {
        let file = scratch(&*engine);
        let write = Op::Write {
            file: file.id(),
            offset: 0,
            segments: Segments::allocate(BYTES, 4096),
        };
        drop(OpFuture::start(&*engine, write));
        let name = engine.name();
        drop(engine);
        let written = rustix::fs::fstat(file.fd().unwrap()).unwrap().st_size;
        assert_eq!(written, BYTES as i64, "{name} may still be reading them");
    }
}

#[test]
fn a_detached_file_closes_when_its_own_operations_are_over() {
    for engine in engines() {
        let (one, other) = (scratch(&*engine), scratch(&*engine));
        let id = one.id();
        let write = Op::Write {
            file: id,
            offset: 0,
            // Long enough not to be done in place.
            segments: Segments::allocate(1 << 20, 1),
        };
        let ended = OpFuture::start(&*engine, write);
        engine.detach(id);
        let open = Arc::downgrade(&one);
        drop(one);
        assert_eq!(run(&*engine, ended).0, Ok(1 << 20));
        // Another file's operations have nothing to do with it.
        let sync = OpFuture::start(&*engine, Op::Sync { file: other.id() });
        assert!(open.upgrade().is_none(), "still open in {}", engine.name());
        assert_eq!(run(&*engine, sync).0, Ok(0));
    }
}

#[test]
fn offloaded_work_runs_on_other_threads_and_no_more_at_once_than_there_are_processors() {
    use std::sync::atomic::AtomicUsize;

    let most = std::thread::available_parallelism().map_or(1, usize::from);
    for engine in engines() {
        let context = crate::io::IoContext::new(engine);
        let here = std::thread::current().id();
        let (running, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let works: Vec<_> = (0..3 * most + 1)
            .map(|number| {
                let (running, peak) = (Arc::clone(&running), Arc::clone(&peak));
                context.offload(move || {
                    let now = running.fetch_add(1, Ordering::SeqCst) + 1;
                    peak.fetch_max(now, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(5));
                    running.fetch_sub(1, Ordering::SeqCst);
                    (number, std::thread::current().id())
                })
            })
            .collect();
        let results = context.block_on(futures_util::future::join_all(works));
        assert!(
            results
                .iter()
                .enumerate()
                .all(|(index, (number, _))| *number == index)
        );
        assert!(results.iter().all(|(_, thread)| *thread != here));
        assert!(peak.load(Ordering::SeqCst) <= most, "{peak:?} of {most}");
    }
}
