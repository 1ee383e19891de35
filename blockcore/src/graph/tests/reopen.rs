//! Reopening: another state of options, modes and children, for several nodes at once.

use super::*;
use crate::ErrorKind;

#[test]
fn an_option_that_is_left_out_returns_to_its_default() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,label=here,read-only=on,discard=unmap");
    told();
    bench.reopen(&["driver=memory,node-name=disk"]).unwrap();
    assert_eq!(told_of("prepare ''"), ["disk reopen prepare ''"]);
    let modes = bench
        .control
        .read(|graph| graph.modes(graph.node("disk").unwrap().id()));
    assert!(!modes.read_only && !modes.unmap);
}

#[test]
fn what_cannot_change_may_be_left_out_and_not_be_changed() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,size=4k");
    bench.reopen(&["driver=memory,node-name=disk"]).unwrap();
    bench
        .reopen(&["driver=memory,node-name=disk,size=4096"])
        .unwrap();
    for (text, word) in [
        ("driver=memory,node-name=disk,size=8k", "size"),
        ("driver=pass,node-name=disk", "driver"),
        ("driver=memory,node-name=disk,lable=x", "lable"),
    ] {
        let refused = bench.reopen(&[text]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{text}");
        assert!(refused.to_string().contains(word), "{refused}");
    }
    let bytes = bench
        .control
        .read(|graph| graph.node("disk").unwrap().bytes());
    assert_eq!(bytes, 4096);
}

#[test]
fn a_node_that_refuses_leaves_all_of_them_as_they_were() {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        bench.add(&format!("driver=memory,node-name={name},label=old"));
    }
    told();
    let refused = bench.reopen(&[
        "driver=memory,node-name=a,label=new,refuse=reopen",
        "driver=memory,node-name=b,label=new",
        "driver=memory,node-name=c,label=new,read-only=on",
    ]);
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains("it does not reopen")
    );
    bench.settle();
    let told = told_of("reopen");
    // Those that had prepared undo it; the one that refused has done so itself.
    assert_eq!(
        told,
        [
            "c reopen prepare 'new'",
            "b reopen prepare 'new'",
            "a reopen prepare 'new'",
            "b reopen abort",
            "c reopen abort",
        ]
    );
    let (label, read_only) = bench.control.read(|graph| {
        let node = graph.node("c").unwrap();
        let label = node.options().get("label").map(str::to_owned);
        (label, graph.modes(node.id()).read_only)
    });
    assert_eq!((label.as_deref(), read_only), (Some("old"), false));
}

#[test]
fn every_node_is_committed_before_one_is_told_that_all_are() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=a");
    bench.add("driver=memory,node-name=b");
    told();
    bench
        .reopen(&[
            "driver=memory,node-name=a,label=x",
            "driver=memory,node-name=b,label=x",
        ])
        .unwrap();
    assert_eq!(
        told_of("reopen"),
        [
            "b reopen prepare 'x'",
            "a reopen prepare 'x'",
            "b reopen commit",
            "a reopen commit",
            "b reopen after",
            "a reopen after",
        ]
    );
}

#[test]
fn a_child_is_reopened_with_its_parent_and_before_it() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=disk");
    told();
    bench
        .reopen(&["driver=pass,node-name=top,file.driver=memory,file.label=x"])
        .unwrap();
    let told = told_of("commit");
    assert_eq!(told, ["disk reopen commit", "top reopen commit"]);
}

#[test]
fn a_backing_node_has_to_be_named_and_may_be_kept_replaced_or_cut() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=one,read-only=on");
    bench.add("driver=memory,node-name=two,read-only=on");
    bench.add("driver=layer,node-name=disk,file.driver=memory,backing=one");
    let missing = bench.reopen(&["driver=layer,node-name=disk"]).unwrap_err();
    assert!(
        missing
            .to_string()
            .contains("backing is missing for 'disk'"),
        "{missing}"
    );
    let backing = || bench.child("disk", "backing");
    bench
        .reopen(&["driver=layer,node-name=disk,backing=one"])
        .unwrap();
    assert_eq!(backing().as_deref(), Some("one"));
    bench
        .reopen(&["driver=layer,node-name=disk,backing=two"])
        .unwrap();
    assert_eq!(backing().as_deref(), Some("two"));
    assert!(bench.has("one"), "it was added by itself");
    bench
        .reopen(&["driver=layer,node-name=disk,backing="])
        .unwrap();
    assert_eq!(backing(), None);
    bench.reopen(&["driver=layer,node-name=disk"]).unwrap();
}

#[test]
fn a_reopen_changes_what_the_guest_reads_below() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=one");
    bench.add("driver=memory,node-name=two");
    for (name, value) in [("one", 1), ("two", 2)] {
        let root = bench.root(name, writer());
        bench.write(&root, 0, 512, value).unwrap();
        let id = root.id();
        drop(root);
        bench.remove_root(id).unwrap();
    }
    bench.add("driver=layer,node-name=disk,file.driver=memory,backing=one");
    let root = bench.root("disk", writer());
    assert_eq!(bench.read(&root, 0, 512).unwrap(), [1; 512]);
    bench
        .reopen(&["driver=layer,node-name=disk,backing=two"])
        .unwrap();
    bench.settle();
    assert_eq!(bench.read(&root, 0, 512).unwrap(), [2; 512]);
}

#[test]
fn a_reopen_cannot_make_a_loop_or_take_a_needed_child() {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=low,file.driver=memory");
    bench.add("driver=layer,node-name=high,file.driver=memory,backing=low");
    for text in [
        "driver=layer,node-name=low,backing=high",
        "driver=layer,node-name=low,file=",
        "driver=layer,node-name=low,backing=nobody",
    ] {
        assert!(bench.reopen(&[text]).is_err(), "{text}");
    }
    assert_eq!(bench.child("low", "backing"), None);
}

#[test]
fn a_node_is_named_once_in_a_reopen() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let twice = bench.reopen(&["node-name=disk,label=a", "node-name=disk,label=b"]);
    assert_eq!(twice.unwrap_err().kind(), ErrorKind::Invalid);
    assert!(bench.reopen(&["label=a"]).is_err());
    assert_eq!(
        bench.reopen(&["node-name=none"]).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn a_node_that_is_written_to_does_not_become_read_only() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    let refused = bench.reopen(&["node-name=disk,read-only=on"]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    bench.settle();
    bench.write(&root, 0, 512, 1).unwrap();
    let id = root.id();
    drop(root);
    bench.remove_root(id).unwrap();
    bench.reopen(&["node-name=disk,read-only=on"]).unwrap();
    assert!(bench.try_root("disk", writer()).is_err());
}

#[test]
fn the_nodes_stay_drained_from_the_first_look_to_the_commit() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    let control = bench.control.clone();
    let change = bench.run(async move {
        let mut change = control.begin().await;
        change
            .reopen(vec![options("node-name=disk,label=x")])
            .await
            .unwrap();
        change
    });
    bench.settle();
    assert!(root.is_held());
    let prepared = bench.run(async move { change.prepare().await.unwrap() });
    assert!(root.is_held());
    let closing = prepared.commit();
    bench.settle();
    assert!(!root.is_held());
    bench.run(closing.finish()).unwrap();
}

#[test]
fn a_reopen_flushes_what_was_writable() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    told();
    bench.reopen(&["node-name=disk,read-only=on"]).unwrap();
    assert_eq!(told_of("flush"), ["disk flush host", "disk flush disk"]);
    bench.reopen(&["node-name=disk"]).unwrap();
    assert_eq!(told_of("flush"), [""; 0]);
}

#[test]
fn a_child_that_was_frozen_is_not_replaced_by_a_reopen() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=one,read-only=on");
    bench.add("driver=memory,node-name=two,read-only=on");
    bench.add("driver=layer,node-name=disk,file.driver=memory,backing=one");
    let control = bench.control.clone();
    bench
        .run(async move {
            let mut change = control.begin().await;
            let disk = change.find("disk")?;
            change.freeze_chain(disk, None)?;
            change.prepare().await?.commit().finish().await
        })
        .unwrap();
    let refused = bench
        .reopen(&["driver=layer,node-name=disk,backing=two"])
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    bench
        .reopen(&["driver=layer,node-name=disk,backing=one"])
        .unwrap();
}
