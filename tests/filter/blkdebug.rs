//! Debug nodes: what goes wrong, and when.

use std::cell::Cell;
use std::rc::Rc;

use blockcore::driver::WriteFlags;
use blockcore::engine::sim::FileProperties;
use blockcore::graph::RootSpec;
use blockcore::graph::permission::Permissions;
use blockcore::{ErrorKind, IoError};
use harness::overlay::DATA_OFFSET;

use crate::setup::{LIMIT, Machine, pattern, segments};

#[test]
fn a_request_fails_at_its_event_with_the_error_that_was_asked_for_and_once() {
    let machine = Machine::new(1);
    machine.add(
        "driver=blkdebug,node-name=d,image.driver=null-co,inject-error.0.event=pwritev,\
         inject-error.0.errno=28,inject-error.0.once=on,inject-error.1.event=flush_to_os,\
         inject-error.1.iotype=flush,set-state.0.event=flush_to_os,set-state.0.new_state=2",
    );
    let root = machine.root("d");
    machine.read(&root, 0, 512).unwrap();
    assert_eq!(machine.write(&root, 0, &[1; 512]), Err(IoError::NoSpace));
    machine.write(&root, 0, &[1; 512]).unwrap();
    assert_eq!(machine.flush(&root), Err(IoError::Failed));
    machine.write(&root, 0, &[1; 512]).unwrap();
    assert_eq!(machine.flush(&root), Err(IoError::Failed));
}

#[test]
fn a_request_inside_a_format_waits_until_its_tag_is_resumed_and_others_pass() {
    let machine = Machine::new(1);
    machine.create_file("/base", 65536);
    machine.create_file("/top", DATA_OFFSET);
    machine.add(
        "driver=overlay,node-name=top,cluster-size=4K,size=64K,file.driver=blkdebug,\
         file.image.driver=file,file.image.filename=/top,backing.driver=file,\
         backing.filename=/base",
    );
    let root = machine.root("top");
    let control = &machine.control;
    control.suspend_at("top", "cow_read", "a").unwrap();
    let done = Rc::new(Cell::new(false));
    let (inner, ended) = (Rc::clone(&root), Rc::clone(&done));
    machine.worker.context().spawn(async move {
        let from = segments(&[7; 512]);
        inner.write(512, from, WriteFlags::empty()).await.unwrap();
        ended.set(true);
    });
    let is_suspended = || control.is_suspended("top", "a").unwrap();
    machine.simulation.run_until(LIMIT, is_suspended).unwrap();
    assert_eq!(machine.read(&root, 512, 512).unwrap(), [0; 512]);
    machine.write(&root, 8192 + 512, &[8; 512]).unwrap();
    assert!(!done.get());
    control.resume("top", "a").unwrap();
    machine.simulation.run_until(LIMIT, || done.get()).unwrap();
    assert!(!is_suspended());
    assert_eq!(machine.read(&root, 512, 512).unwrap(), [7; 512]);

    let kind = |result: Result<(), blockcore::Error>| result.unwrap_err().kind();
    assert_eq!(kind(control.resume("top", "a")), ErrorKind::NotFound);
    let event = control.suspend_at("top", "teatime", "a");
    assert_eq!(kind(event), ErrorKind::Invalid);
    machine.add("driver=null-co,node-name=null");
    let nobody = control.suspend_at("null", "pwritev", "a");
    assert_eq!(kind(nobody), ErrorKind::Unsupported);
}

#[test]
fn requests_are_widened_and_cut_to_the_limits_that_were_asked_for() {
    let machine = Machine::new(1);
    machine.create_file("/disk", 65536);
    machine.add(
        "driver=blkdebug,node-name=d,image.driver=file,image.filename=/disk,align=4K,\
         max-transfer=8K,opt-write-zero=16K,max-write-zero=16K,discard=unmap",
    );
    let root = machine.root("d");
    let mut model = pattern(3, 65536);
    machine.write(&root, 0, &model).unwrap();
    machine.write(&root, 5000, &[9; 100]).unwrap();
    machine.zero(&root, 10_000, 40_000).unwrap();
    model[5000..5100].fill(9);
    model[10_000..50_000].fill(0);
    assert!(machine.read(&root, 0, 65536).unwrap() == model);
    let limits = root.limits();
    assert_eq!(limits.request_alignment, 4096);
    assert_eq!(
        (limits.max_transfer_bytes, limits.zero_alignment),
        (8192, 16384)
    );
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let machine = Machine::new(1);
    for options in [
        "align=3000",
        "align=4K,max-transfer=6000",
        "inject-error.1.event=pwritev",
        "inject-error.0.errno=5",
        "inject-error.0.event=teatime",
        "inject-error.0.event=pwritev,inject-error.0.errno=0",
        "inject-error.0.event=pwritev,inject-error.0.sector=x",
        "set-state.0.event=pwritev",
        "take-child-perms.0=everything",
        "inject-error.0.colour=red",
    ] {
        let all = format!("driver=blkdebug,node-name=d,image.driver=null-co,{options}");
        let refused = machine.try_add(&all).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{options}: {refused}");
    }
}

#[test]
fn rules_in_a_file_are_those_of_the_options_and_come_before_them() {
    let machine = Machine::new(1);
    let rules = "# as above\n[inject-error]\nevent = \"pwritev\"\nerrno = \"28\"\nonce = \"on\"\n\n\
                 [inject-error \"flush\"]\nevent = \"flush_to_os\"\niotype = \"flush\"\n\n\
                 [set-state]\nevent = \"flush_to_os\"\nnew_state = \"2\"\n";
    let load = |path: &str, text: &str| {
        let properties = FileProperties::default();
        machine
            .simulation
            .load_file(path, properties, text.as_bytes());
    };
    load("/rules", rules);
    let try_add = |rules: &str, more: &str| {
        let text = format!("driver=blkdebug,node-name=d,image.driver=null-co,config={rules}{more}");
        machine.try_add(&text)
    };
    // The last one that meets a request counts: the option's is after the file's.
    let more = ",inject-error.0.event=flush_to_os,inject-error.0.errno=28,inject-error.0.state=2";
    try_add("/rules", more).unwrap();
    let root = machine.root("d");
    assert_eq!(machine.write(&root, 0, &[1; 512]), Err(IoError::NoSpace));
    machine.write(&root, 0, &[1; 512]).unwrap();
    assert_eq!(machine.flush(&root), Err(IoError::Failed));
    machine.write(&root, 0, &[1; 512]).unwrap();
    assert_eq!(machine.flush(&root), Err(IoError::NoSpace));
    machine.remove_root(root);
    // It is flushed before, which fails again.
    assert_eq!(machine.remove("d").unwrap_err().kind(), ErrorKind::Io);

    load("/long", &"#".repeat((64 << 10) + 1));
    load("/short", &"#".repeat(64 << 10));
    load("/unknown", "[inject-error]\nevent = \"teatime\"\n");
    load(
        "/colour",
        "[inject-error]\nevent = \"pwritev\"\ncolour = \"red\"\n",
    );
    load("/missing", "[inject-error]\nerrno = \"5\"\n");
    load("/nonsense", "[inject-error]\nevent = pwritev\n");
    for rules in ["/long", "/unknown", "/colour", "/missing", "/nonsense"] {
        let refused = try_add(rules, "").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{rules}: {refused}");
    }
    let refused = try_add("/nowhere", "").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
    try_add("/short", "").unwrap();
}

#[test]
fn permissions_are_taken_and_withheld_as_asked_for() {
    let machine = Machine::new(1);
    machine.add("driver=null-co,node-name=null");
    machine.add("driver=blkdebug,node-name=d,image=null,unshare-child-perms.0=write");
    let refused = machine.try_root("null", RootSpec::writer("a guest"));
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::Busy);
    machine.remove("d").unwrap();
    machine.add("driver=blkdebug,node-name=d,image=null,take-child-perms.0=resize");
    let taken = machine.control.read(|graph| {
        let null = graph.node("null").unwrap().id();
        graph.cumulative_permissions(null).0
    });
    assert_eq!(taken, Permissions::RESIZE);
}
