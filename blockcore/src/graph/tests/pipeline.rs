//! What the pipeline does around a driver, in which order, and with which error.

use super::*;
use crate::driver::{CopyFlags, DriverKind};
use crate::io::RequestKind;

impl Bench {
    fn write_with(&self, root: &Rc<Root>, bytes: u64, flags: WriteFlags) -> Result<(), IoError> {
        let (root, from) = (Rc::clone(root), Segments::allocate(bytes as usize, 512));
        from.fill(3);
        self.run(async move { root.write(0, from, flags).await })
    }

    fn zero(
        &self,
        root: &Rc<Root>,
        offset: u64,
        bytes: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        let root = Rc::clone(root);
        self.run(async move { root.write_zeroes(offset, bytes, flags).await })
    }

    fn discard(&self, root: &Rc<Root>, offset: u64, bytes: u64) -> Result<(), IoError> {
        let root = Rc::clone(root);
        self.run(async move { root.discard(offset, bytes).await })
    }

    fn flush(&self, root: &Rc<Root>) -> Result<(), IoError> {
        let root = Rc::clone(root);
        self.run(async move { root.flush().await })
    }

    fn truncate(
        &self,
        root: &Rc<Root>,
        bytes: u64,
        preallocation: Preallocation,
    ) -> Result<(), IoError> {
        let root = Rc::clone(root);
        self.run(async move {
            let request = root.enter(RequestKind::Truncate, 0, bytes).await;
            let flags = TruncateFlags::empty();
            request.truncate(bytes, true, preallocation, flags).await
        })
    }
}

#[test]
fn a_write_asks_for_the_right_before_the_range_and_a_discard_the_other_way_round() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,read-only=on,size=4k");
    let root = bench.root("disk", reader());
    assert_eq!(bench.write(&root, 8192, 512, 1), Err(IoError::ReadOnly));
    let zeroed = bench.zero(&root, 8192, 512, ZeroFlags::empty());
    assert_eq!(zeroed, Err(IoError::ReadOnly));
    assert_eq!(bench.discard(&root, 8192, 512), Err(IoError::OutOfRange));
    assert_eq!(bench.discard(&root, 0, 512), Err(IoError::ReadOnly));
    assert_eq!(bench.read(&root, 8192, 512), Err(IoError::OutOfRange));
    assert_eq!(bench.flush(&root), Ok(()));
}

#[test]
fn a_range_near_the_largest_number_is_out_of_range_and_does_not_wrap() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,discard=unmap");
    let root = bench.root("disk", writer());
    for offset in [u64::MAX, u64::MAX - 511, i64::MAX as u64, 1 << 63] {
        assert_eq!(bench.read(&root, offset, 512), Err(IoError::OutOfRange));
        assert_eq!(bench.write(&root, offset, 512, 1), Err(IoError::OutOfRange));
        assert_eq!(bench.discard(&root, offset, 512), Err(IoError::OutOfRange));
        let zeroed = bench.zero(&root, offset, 512, ZeroFlags::empty());
        assert_eq!(zeroed, Err(IoError::OutOfRange));
        let zeroed = bench.zero(&root, 512, offset, ZeroFlags::empty());
        assert_eq!(zeroed, Err(IoError::OutOfRange));
    }
}

#[test]
fn a_request_of_no_bytes_does_nothing_where_it_is_allowed() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,size=4k,discard=unmap");
    let root = bench.root("disk", writer());
    told();
    assert_eq!(bench.write(&root, 4096, 0, 1), Ok(()));
    assert_eq!(bench.zero(&root, 4096, 0, ZeroFlags::empty()), Ok(()));
    assert_eq!(bench.discard(&root, 4096, 0), Ok(()));
    assert_eq!(bench.write(&root, 4097, 0, 1), Err(IoError::OutOfRange));
    assert_eq!(told(), [""; 0]);
}

#[test]
fn a_flush_goes_to_the_host_then_to_the_disk_then_below_and_never_to_the_backing_node() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=base");
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.node-name=file,backing=base");
    let root = bench.root("disk", writer());
    bench.write(&root, 0, 512, 1).unwrap();
    told();
    bench.flush(&root).unwrap();
    assert_eq!(
        told(),
        ["disk flush host", "file flush host", "file flush disk"]
    );
    // Nothing has changed since.
    bench.flush(&root).unwrap();
    assert_eq!(told(), [""; 0]);
    bench.write(&root, 0, 512, 1).unwrap();
    bench.flush(&root).unwrap();
    assert_eq!(told_of("flush").len(), 3);
}

#[test]
fn where_flushes_are_ignored_caches_still_go_to_the_host() {
    let bench = Bench::new();
    bench.add(
        "driver=layer,node-name=disk,cache.no-flush=on,file.driver=memory,file.node-name=file",
    );
    let root = bench.root("disk", writer());
    bench.write(&root, 0, 512, 1).unwrap();
    told();
    bench.flush(&root).unwrap();
    assert_eq!(told(), ["disk flush host", "file flush host"]);
}

#[test]
fn a_stable_write_is_flushed_by_the_core_unless_the_driver_makes_it_so() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=plain");
    bench.add("driver=memory,node-name=able,can=flags");
    let (plain, able) = (bench.root("plain", writer()), bench.root("able", writer()));
    told();
    bench.write_with(&plain, 512, WriteFlags::STABLE).unwrap();
    assert_eq!(
        told(),
        [
            "plain write 0 512 0x0",
            "plain flush host",
            "plain flush disk"
        ]
    );
    bench.write_with(&able, 512, WriteFlags::STABLE).unwrap();
    assert_eq!(told(), ["able write 0 512 0x1"]);
    bench.zero(&plain, 0, 512, ZeroFlags::STABLE).unwrap();
    assert_eq!(told_of("flush"), ["plain flush host", "plain flush disk"]);
}

#[test]
fn a_stable_write_whose_flush_fails_has_failed() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,can=badflush");
    let root = bench.root("disk", writer());
    let written = bench.write_with(&root, 512, WriteFlags::STABLE);
    assert_eq!(written, Err(IoError::FlushLost));
    assert_eq!(bench.write_with(&root, 512, WriteFlags::empty()), Ok(()));
}

#[test]
fn flags_that_a_driver_does_not_know_do_not_reach_it() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=plain");
    bench.add("driver=memory,node-name=able,can=flags");
    let (plain, able) = (bench.root("plain", writer()), bench.root("able", writer()));
    told();
    bench
        .write_with(&plain, 512, WriteFlags::UNCHANGED)
        .unwrap();
    bench.write_with(&able, 512, WriteFlags::UNCHANGED).unwrap();
    assert_eq!(told(), ["plain write 0 512 0x0", "able write 0 512 0x2"]);
}

#[test]
fn zeroes_that_a_driver_cannot_make_are_written_unless_that_is_forbidden() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,size=4M");
    let root = bench.root("disk", writer());
    bench.write(&root, 0, 4096, 7).unwrap();
    told();
    let refused = bench.zero(&root, 0, 4096, ZeroFlags::NO_FALLBACK);
    assert_eq!(refused, Err(IoError::Unsupported));
    assert_eq!(bench.read(&root, 0, 4096).unwrap(), [7; 4096]);
    bench.zero(&root, 512, 3 << 20, ZeroFlags::empty()).unwrap();
    let written = told_of("write");
    // In pieces, whose memory is bounded.
    assert_eq!(written[1], "disk write 1048576 1048576 0x0");
    assert_eq!(written.len(), 4, "{written:?}");
    let mut expected = vec![0; 4096];
    expected[..512].fill(7);
    assert_eq!(bench.read(&root, 0, 4096).unwrap(), expected);
}

#[test]
fn space_is_given_back_only_where_discards_are_honoured() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=keep,can=zero discard");
    bench.add("driver=memory,node-name=give,can=zero discard,discard=unmap");
    let (keep, give) = (bench.root("keep", writer()), bench.root("give", writer()));
    told();
    for root in [&keep, &give] {
        bench.zero(root, 0, 512, ZeroFlags::MAY_UNMAP).unwrap();
        bench.discard(root, 0, 512).unwrap();
    }
    assert_eq!(
        told(),
        [
            "keep zero 0 512 0x0",
            "give zero 0 512 0x1",
            "give discard 0 512"
        ]
    );
}

#[test]
fn a_driver_that_cannot_discard_is_no_error() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,discard=unmap");
    let root = bench.root("disk", writer());
    told();
    assert_eq!(bench.discard(&root, 0, 512), Ok(()));
    assert_eq!(told(), ["disk discard 0 512"]);
}

#[test]
fn written_zeroes_are_zeroed_as_the_node_says() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=off,can=zero");
    bench.add("driver=memory,node-name=on,can=zero,detect-zeroes=on,discard=unmap");
    bench.add("driver=memory,node-name=unmap,can=zero,detect-zeroes=unmap,discard=unmap");
    assert!(
        bench
            .try_add("driver=memory,node-name=bad,detect-zeroes=unmap")
            .is_err()
    );
    let roots = ["off", "on", "unmap"].map(|name| bench.root(name, writer()));
    told();
    for root in &roots {
        bench.write(root, 0, 512, 0).unwrap();
        bench.write(root, 0, 512, 1).unwrap();
    }
    assert_eq!(
        told(),
        [
            "off write 0 512 0x0",
            "off write 0 512 0x0",
            "on zero 0 512 0x0",
            "on write 0 512 0x0",
            "unmap zero 0 512 0x1",
            "unmap write 0 512 0x0",
        ]
    );
}

#[test]
fn bitmaps_are_marked_by_every_change_failed_ones_too_and_by_no_read() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,discard=unmap");
    bench.add("driver=memory,node-name=bad,can=fail");
    for (name, expected) in [("disk", true), ("bad", false)] {
        let control = bench.control.clone();
        bench
            .run(async move {
                let add =
                    |set: &mut crate::dirty_bitmap::BitmapSet| set.add("marks", 4096).map(|_| ());
                control.change_bitmaps(name, add).await
            })
            .unwrap();
        let root = bench.root(name, writer());
        let marked = || {
            bench.control.read(|graph| {
                let bitmaps = graph.node(name).unwrap().bitmaps();
                bitmaps.get("marks").unwrap().status().count_bytes
            })
        };
        bench.read(&root, 0, 4096).unwrap();
        assert_eq!(marked(), 0, "{name}");
        assert_eq!(bench.write(&root, 0, 512, 1).is_ok(), expected);
        assert_eq!(marked(), 4096, "{name}");
        bench.discard(&root, 8192, 4096).unwrap();
        let discarded = if expected { 4096 } else { 0 };
        assert_eq!(marked(), 4096 + discarded, "{name}");
        let _ = bench.zero(&root, 16384, 1, ZeroFlags::empty());
        assert_eq!(marked(), 8192 + discarded, "{name}");
    }
}

#[test]
fn a_filter_forwards_what_it_leaves_out_and_a_format_refuses() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=filter,file.driver=memory,file.node-name=below,file.can=zero");
    bench.add("driver=layer,node-name=format,file.driver=memory,file.can=zero");
    let (filter, format) = (
        bench.root("filter", resizer()),
        bench.root("format", resizer()),
    );
    told();
    let flags = ZeroFlags::NO_FALLBACK;
    bench.zero(&filter, 0, 512, flags).unwrap();
    assert_eq!(told_of("zero"), ["below zero 0 512 0x2"]);
    assert_eq!(
        bench.zero(&format, 0, 512, flags),
        Err(IoError::Unsupported)
    );
    bench.truncate(&filter, 4096, Preallocation::Off).unwrap();
    assert_eq!(filter.bytes(), 4096);
    let kinds = bench.control.read(|graph| {
        ["filter", "format"].map(|name| graph.node(name).unwrap().driver_type().kind)
    });
    assert_eq!(kinds, [DriverKind::Filter, DriverKind::Format]);
}

#[test]
fn lengths_that_cannot_be_are_refused_before_the_driver_is_asked() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,size=8k");
    let root = bench.root("disk", resizer());
    told();
    let refused = bench.truncate(&root, crate::io::MAX_BYTES + 1, Preallocation::Off);
    assert_eq!(refused, Err(IoError::OutOfRange));
    for bytes in [4096, 8192] {
        let refused = bench.truncate(&root, bytes, Preallocation::Full);
        assert_eq!(refused, Err(IoError::OutOfRange));
    }
    assert_eq!(told(), [""; 0]);
    bench.truncate(&root, 16384, Preallocation::Full).unwrap();
    assert_eq!(root.bytes(), 16384);
}

#[test]
fn a_child_that_nobody_has_drained_gets_longer_and_not_shorter_by_a_request() {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.size=8k");
    let below = |root: &Rc<Root>, bytes: u64| {
        let root = Rc::clone(root);
        bench.run(async move {
            let request = root.enter(RequestKind::Other, 0, 0).await;
            let (off, flags) = (Preallocation::Off, TruncateFlags::empty());
            request
                .io()
                .child(0)
                .truncate(bytes, true, off, flags)
                .await
        })
    };
    let user = bench.root("disk", writer().in_units_of(512));
    told();
    assert_eq!(below(&user, 4096), Err(IoError::Unsupported));
    assert_eq!(told(), [""; 0]);
    below(&user, 16384).unwrap();
    bench.control.take_notices();
    assert_eq!(user.bytes(), 16384);
    drop(user);
    // Whoever may change the length is waited for and waits.
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.size=8k");
    let resizer = bench.root("disk", resizer().in_units_of(512));
    bench.truncate(&resizer, 4096, Preallocation::Off).unwrap();
    assert_eq!(resizer.bytes(), 4096);
}

#[test]
fn what_is_added_above_a_longer_backing_node_is_asked_to_be_zero() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=base,size=64k");
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.size=4k,backing=base");
    let root = bench.root("disk", resizer());
    told();
    bench.truncate(&root, 8192, Preallocation::Off).unwrap();
    assert_eq!(told_of("disk truncate"), ["disk truncate 8192 0x1"]);
    bench.truncate(&root, 65536, Preallocation::Off).unwrap();
    assert_eq!(told_of("disk truncate"), ["disk truncate 65536 0x1"]);
    bench.truncate(&root, 1 << 20, Preallocation::Off).unwrap();
    assert_eq!(told_of("disk truncate"), ["disk truncate 1048576 0x0"]);
}

#[test]
fn users_are_told_of_another_length_and_bitmaps_follow_it() {
    struct User(RefCell<Vec<u64>>);
    impl crate::graph::RootUser for User {
        fn resized(&self, bytes: u64) {
            self.0.borrow_mut().push(bytes);
        }
    }
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=disk,file.size=8k");
    let control = bench.control.clone();
    bench
        .run(async move {
            let add = |set: &mut crate::dirty_bitmap::BitmapSet| set.add("marks", 4096).map(|_| ());
            control.change_bitmaps("top", add).await
        })
        .unwrap();
    let user = Rc::new(User(RefCell::default()));
    let spec = RootSpec {
        user: Some(Rc::clone(&user) as Rc<_>),
        ..resizer()
    };
    let root = bench.root("top", spec);
    bench.truncate(&root, 32768, Preallocation::Off).unwrap();
    bench.control.take_notices();
    bench.settle();
    assert_eq!(*user.0.borrow(), [32768]);
    let marked = || {
        bench.control.read(|graph| {
            let bitmaps = graph.node("top").unwrap().bitmaps();
            bitmaps.get("marks").unwrap().status().count_bytes
        })
    };
    // What was added: writes may have gone there before the bitmap covered it.
    assert_eq!(marked(), 24576);
    bench.write(&root, 0, 512, 1).unwrap();
    bench.write(&root, 28672, 512, 1).unwrap();
    assert_eq!(marked(), 28672);
}

/// What would have been seen: an incremental backup without what was written between two changes of a length.
#[test]
fn what_is_written_before_anybody_hears_of_a_length_is_marked_when_an_operator_changes_it_again() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,size=8k");
    let control = bench.control.clone();
    bench
        .run(async move {
            let add = |set: &mut crate::dirty_bitmap::BitmapSet| set.add("marks", 4096).map(|_| ());
            control.change_bitmaps("disk", add).await
        })
        .unwrap();
    let root = bench.root("disk", resizer());
    bench.truncate(&root, 32768, Preallocation::Off).unwrap();
    bench.write(&root, 28672, 512, 1).unwrap();
    let control = bench.control.clone();
    bench
        .run(async move { control.resize("disk", 65536, Preallocation::Off).await })
        .unwrap();
    let bits = bench.control.read(|graph| {
        let bitmaps = graph.node("disk").unwrap().bitmaps();
        Arc::clone(bitmaps.get("marks").unwrap().bits())
    });
    assert_eq!(bits.length(), 65536);
    assert!(bits.get(28672), "written before the operator came");
    assert!(!bits.get(0) && !bits.get(32768), "written by nobody");
}

#[test]
fn a_parent_reads_zeroes_past_the_end_of_a_protocol_and_a_user_does_not() {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.node-name=file,file.size=700");
    let root = bench.root("disk", reader());
    let read = Rc::clone(&root);
    let bytes = bench.run(async move {
        let request = read.enter(RequestKind::Read, 0, 0).await;
        let into = Segments::allocate(1024, 512);
        into.fill(0xa5);
        request.io().child(0).read(512, into.clone()).await?;
        Ok::<_, IoError>(into.to_vec())
    });
    assert_eq!(bytes.unwrap(), [0; 1024]);
    assert_eq!(bench.read(&root, 1024, 512), Err(IoError::OutOfRange));
}

#[test]
fn a_copy_is_never_done_any_other_way_than_by_the_host() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=from");
    bench.add("driver=memory,node-name=to,can=zero");
    let (from, to) = (bench.root("from", reader()), bench.root("to", writer()));
    told();
    let copied = |flags: CopyFlags| {
        let (from, to) = (Rc::clone(&from), Rc::clone(&to));
        bench.run(async move {
            let from = from.enter(RequestKind::Read, 0, 512).await;
            let to = to.enter(RequestKind::Write, 0, 512).await;
            from.copy_range(0, &to, 0, 512, flags).await
        })
    };
    assert_eq!(copied(CopyFlags::empty()), Err(IoError::Unsupported));
    assert_eq!(told(), [""; 0]);
    assert_eq!(copied(CopyFlags::ZERO), Ok(()));
    assert_eq!(told(), ["to zero 0 512 0x2"]);
}

#[test]
fn a_serialising_write_that_may_not_wait_says_that_it_would_have_to() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,can=serialise slow");
    let root = bench.root("disk", writer());
    let slow = Rc::clone(&root);
    bench.worker.context().spawn(async move {
        let from = Segments::allocate(4096, 512);
        slow.write(0, from, WriteFlags::empty()).await.unwrap();
    });
    let entered = || root.in_flight() == 1;
    bench.simulation.run_until(LIMIT, entered).unwrap();
    let flags = WriteFlags::SERIALISING | WriteFlags::NO_WAIT;
    let root_of = Rc::clone(&root);
    let tried = bench.run(async move {
        let from = Segments::allocate(512, 512);
        root_of.write(512, from, flags).await
    });
    assert_eq!(tried, Err(IoError::Busy));
    bench.settle();
    assert_eq!(bench.write_with(&root, 512, flags), Ok(()));
}

#[test]
fn an_unaligned_write_leaves_the_bytes_around_it_as_they_were() {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.node-name=file");
    let id = bench.try_root("disk", writer()).unwrap();
    let root = bench.control.root_here(id).unwrap();
    bench.write(&root, 0, 2048, 1).unwrap();
    told();
    // Head and tail in two units, then in one.
    bench.write(&root, 700, 700, 2).unwrap();
    bench.write(&root, 100, 10, 3).unwrap();
    assert_eq!(
        told_of("write"),
        ["file write 512 1024 0x0", "file write 0 512 0x0"]
    );
    let mut expected = vec![1; 2048];
    expected[700..1400].fill(2);
    expected[100..110].fill(3);
    assert_eq!(bench.read(&root, 0, 2048).unwrap(), expected);
    assert_eq!(bench.read(&root, 99, 12).unwrap(), &expected[99..111]);
}

#[test]
fn a_write_threshold_is_told_of_once_at_the_node_it_was_set_at() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=disk");
    let root = bench.root("top", writer());
    let state = bench
        .control
        .read(|graph| Arc::clone(graph.node("disk").unwrap().state()));
    state.set_write_threshold(Some(8192));
    bench.write(&root, 0, 8192, 1).unwrap();
    assert_eq!(bench.control.take_notices(), []);
    bench.write(&root, 8192, 512, 1).unwrap();
    bench.write(&root, 8192, 4096, 1).unwrap();
    assert_eq!(bench.control.take_notices().len(), 1);
    assert_eq!(state.highest_write(), 12288);
}
