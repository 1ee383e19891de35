//! Nodes that get shorter by a request, beside others.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use blockcore::IoError;
use blockcore::driver::{Preallocation, TruncateFlags, WriteFlags};
use blockcore::graph::RootSpec;
use blockcore::graph::permission::Permissions;
use blockcore::io::{RequestKind, Root};
use harness::overlay::DATA_OFFSET;

use crate::setup::{LIMIT, Machine, pattern, segments};

/// How a request ended, once it has.
type Ended = Rc<Cell<Option<Result<(), IoError>>>>;

/// Starts a task, and says how it ended.
fn start(machine: &Machine, task: impl Future<Output = Result<(), IoError>> + 'static) -> Ended {
    let ended = Ended::default();
    let tell = Rc::clone(&ended);
    let context = machine.worker.context();
    context.spawn(async move { tell.set(Some(task.await)) });
    ended
}

async fn truncate(root: Rc<Root>, bytes: u64) -> Result<(), IoError> {
    let request = root.enter(RequestKind::Truncate, 0, bytes).await;
    let (off, flags) = (Preallocation::Off, TruncateFlags::empty());
    request.truncate(bytes, true, off, flags).await
}

/// What would have been seen: a file that is longer again than it was just made, or another file's blocks
/// overwritten on a host that gives space away at once.
#[test]
fn a_node_gets_shorter_after_the_writes_past_its_new_end_and_those_that_come_later_are_out_of_range()
 {
    let machine = Machine::new(1);
    machine.create_file("/disk", 65536);
    machine.add("driver=blkdebug,node-name=debug,image.driver=file,image.filename=/disk");
    let spec = RootSpec {
        shares: Permissions::all(),
        ..RootSpec::writer("a guest").in_units_of(512)
    };
    let resizer = RootSpec {
        needs: spec.needs | Permissions::RESIZE,
        ..spec.clone()
    };
    let writer = machine.try_root("debug", spec).expect("nobody is there");
    let resizer = machine.try_root("debug", resizer).expect("all is shared");
    machine.control.suspend_at("debug", "pwritev", "a").unwrap();
    let write = |root: &Rc<Root>, offset: u64| {
        let root = Rc::clone(root);
        async move {
            let from = segments(&pattern(1, 4096));
            root.write(offset, from, WriteFlags::empty()).await
        }
    };
    let early = start(&machine, write(&writer, 32768));
    let is_suspended = || machine.control.is_suspended("debug", "a").unwrap();
    machine.simulation.run_until(LIMIT, is_suspended).unwrap();
    let cut = start(&machine, truncate(Rc::clone(&resizer), 16384));
    let late = start(&machine, write(&writer, 32768));
    let read = {
        let (root, into) = (Rc::clone(&writer), segments(&[0; 512]));
        start(&machine, async move { root.read(40960, into).await })
    };
    let inside = start(&machine, write(&writer, 0));
    let context = Rc::clone(machine.worker.context());
    machine.serve(async move { context.delay(Duration::from_secs(1)).await });
    let ended = |these: [&Ended; 4]| these.map(|ended| ended.get());
    let waiting = [&early, &cut, &late, &read];
    assert_eq!(
        ended(waiting),
        [None; 4],
        "a write past the new end is under way"
    );
    assert_eq!(
        inside.get(),
        Some(Ok(())),
        "what stays is nobody's business"
    );

    machine.control.resume("debug", "a").unwrap();
    let over = || ended(waiting).iter().all(Option::is_some);
    machine.simulation.run_until(LIMIT, over).unwrap();
    assert_eq!(
        ended(waiting),
        [
            Ok(()),
            Ok(()),
            Err(IoError::OutOfRange),
            Err(IoError::OutOfRange)
        ]
        .map(Some)
    );
    let file = machine.simulation.contents("/disk").unwrap();
    assert_eq!((file.len(), writer.bytes()), (16384, 16384));
    assert!(file[..4096] == pattern(1, 4096));
}

#[test]
fn a_length_below_a_filter_that_makes_room_ahead_grows_without_being_cut_first() {
    let machine = Machine::new(1);
    machine.create_file("/disk", DATA_OFFSET);
    machine.add(
        "driver=preallocate,node-name=ahead,prealloc-align=64K,prealloc-size=256K,\
         file.driver=file,file.filename=/disk",
    );
    machine.add("driver=overlay,node-name=disk,file=ahead,cluster-size=4K,size=64K");
    let root = machine.root("disk");
    let below = |bytes: u64| {
        let root = Rc::clone(&root);
        machine.serve(async move {
            let request = root.enter(RequestKind::Other, 0, 0).await;
            let (off, flags) = (Preallocation::Off, TruncateFlags::ZERO);
            request
                .io()
                .child(0)
                .truncate(bytes, true, off, flags)
                .await
        })
    };
    let from = segments(&pattern(2, 4096));
    let past_end = Rc::clone(&root);
    let written = machine.serve(async move {
        let request = past_end.enter(RequestKind::Other, 0, 0).await;
        request
            .io()
            .child(0)
            .write(DATA_OFFSET, from, WriteFlags::empty())
            .await
    });
    written.unwrap();
    let lengths = || {
        let node = |graph: &blockcore::graph::Graph| graph.node("ahead").unwrap().bytes();
        let file = machine.simulation.contents("/disk").unwrap();
        (machine.control.read(node), file.len())
    };
    let end = DATA_OFFSET + 4096;
    let made = (end + (256 << 10)).next_multiple_of(64 << 10) as usize;
    assert_eq!(lengths(), (end, made));
    below(end + 8192).unwrap();
    assert_eq!(lengths(), (end + 8192, made));
    below(1 << 20).unwrap();
    assert_eq!(lengths(), (1 << 20, 1 << 20));
    // Nobody has drained it, and requests do not register.
    assert_eq!(below(8192), Err(IoError::Unsupported));
    assert_eq!(lengths(), (1 << 20, 1 << 20));
    let file = machine.simulation.contents("/disk").unwrap();
    assert!(file[DATA_OFFSET as usize..end as usize] == pattern(2, 4096));
    assert!(file[end as usize..].iter().all(|byte| *byte == 0));
}
