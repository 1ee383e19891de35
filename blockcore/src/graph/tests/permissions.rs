//! Who may do what to which node.

use super::*;
use crate::ErrorKind;

const WRITE: Permissions = Permissions::WRITE;

#[test]
fn a_second_writer_is_refused_and_told_who_holds_what() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    bench.try_root("disk", writer()).unwrap();
    let refused = bench.try_root("disk", RootSpec::writer("export 'other'"));
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    let said = refused.to_string();
    for word in ["export 'other'", "'disk'", "'write'", "export 'rw'"] {
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_writer_that_shares_nothing_is_refused_while_others_read() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    bench.try_root("disk", reader()).unwrap();
    let jealous = RootSpec {
        shares: Permissions::empty(),
        ..RootSpec::reader("a job")
    };
    let refused = bench.try_root("disk", jealous).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(
        refused
            .to_string()
            .contains("does not share 'consistent-read'")
    );
}

#[test]
fn a_refused_user_leaves_everything_as_it_was() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=disk");
    bench.try_root("top", writer()).unwrap();
    let before = ["top", "disk"].map(|name| {
        let id = bench.id(name);
        bench.control.read(|graph| graph.cumulative_permissions(id))
    });
    bench
        .try_root("top", RootSpec::writer("another"))
        .unwrap_err();
    let after = ["top", "disk"].map(|name| {
        let id = bench.id(name);
        bench.control.read(|graph| graph.cumulative_permissions(id))
    });
    assert_eq!(before, after);
    assert_eq!(before[1].0, WRITE | Permissions::CONSISTENT_READ);
    assert_eq!(
        bench.control.read(|graph| graph.users(bench.id("top"))),
        ["export 'rw'"]
    );
}

#[test]
fn all_users_needs_are_joined_and_what_all_share_is_left() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let id = bench.id("disk");
    let all = || bench.control.read(|graph| graph.cumulative_permissions(id));
    assert_eq!(all(), (Permissions::empty(), Permissions::all()));
    bench.try_root("disk", reader()).unwrap();
    let resizer = RootSpec {
        needs: Permissions::RESIZE,
        shares: Permissions::CONSISTENT_READ | Permissions::RESIZE,
        ..RootSpec::reader("a tool")
    };
    bench.try_root("disk", resizer).unwrap();
    assert_eq!(
        all(),
        (
            Permissions::CONSISTENT_READ | Permissions::RESIZE,
            Permissions::CONSISTENT_READ | Permissions::RESIZE,
        )
    );
}

#[test]
fn what_a_user_held_is_free_when_it_has_gone() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let first = bench.try_root("disk", writer()).unwrap();
    bench.remove_root(first).unwrap();
    bench.try_root("disk", RootSpec::writer("another")).unwrap();
}

#[test]
fn a_read_only_node_gets_no_writer_and_its_name_is_said() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,read-only=on");
    let refused = bench.try_root("disk", writer()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
    assert!(refused.to_string().contains("'disk'"));
    bench.try_root("disk", reader()).unwrap();
}

#[test]
fn a_driver_that_refuses_has_the_others_give_up_what_they_took() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=disk,file.refuse=write");
    bench.try_root("top", easy_reader()).unwrap();
    told();
    let refused = bench.try_root("top", writer()).unwrap_err();
    assert!(refused.to_string().contains("another process"));
    bench.settle();
    let told = told_of("permissions");
    // The filter was asked before; nobody is told that it holds.
    assert!(
        told.contains(&"top permissions abort".to_owned()),
        "{told:?}"
    );
    assert!(!told.iter().any(|line| line.contains("commit")), "{told:?}");
    let disk = bench.id("disk");
    let (needs, _) = bench
        .control
        .read(|graph| graph.cumulative_permissions(disk));
    assert_eq!(needs, Permissions::CONSISTENT_READ);
}

#[test]
fn permissions_are_prepared_for_all_nodes_before_one_is_committed() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=disk");
    told();
    bench.try_root("top", writer()).unwrap();
    let told = told_of("permissions");
    assert_eq!(told[0], "disk permissions prepare");
    assert!(told.contains(&"top permissions commit".to_owned()));
    assert!(told.contains(&"disk permissions commit".to_owned()));
    assert!(!told.iter().any(|line| line.contains("abort")));
}

#[test]
fn a_forced_share_reads_what_another_writes_and_never_writes() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    bench.try_root("disk", writer()).unwrap();
    let plain = "driver=layer,node-name=look,read-only=on,file=disk";
    assert_eq!(bench.try_add(plain).unwrap_err().kind(), ErrorKind::Busy);
    bench.add(&format!("{plain},force-share=on"));
    let writes = bench.try_add("driver=pass,node-name=force,file=disk,force-share=on");
    assert_eq!(writes.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_change_gives_a_root_other_permissions() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let first = bench.try_root("disk", writer()).unwrap();
    let control = bench.control.clone();
    bench
        .run(async move {
            let mut change = control.begin().await;
            change.set_root_permissions(first, Permissions::CONSISTENT_READ, Permissions::all())?;
            change.prepare().await?.commit().finish().await
        })
        .unwrap();
    bench
        .try_root(
            "disk",
            RootSpec {
                shares: Permissions::all(),
                ..writer()
            },
        )
        .unwrap();
}

#[test]
fn a_format_keeps_writers_off_its_file_that_a_filter_would_let_in() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=one");
    bench.add("driver=memory,node-name=two");
    bench.add("driver=layer,node-name=format,file=one");
    bench.add("driver=pass,node-name=filter,file=two");
    let easy = RootSpec {
        shares: Permissions::all(),
        ..writer()
    };
    assert_eq!(
        bench.try_root("one", easy.clone()).unwrap_err().kind(),
        ErrorKind::Busy
    );
    bench.try_root("two", easy).unwrap();
}

#[test]
fn a_write_without_the_right_to_resize_does_not_make_the_node_longer() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,size=4k");
    let root = bench.root("disk", writer());
    let shrunk = Rc::clone(&root);
    let refused = bench.run(async move {
        let request = shrunk.enter(crate::io::RequestKind::Truncate, 0, 0).await;
        let flags = TruncateFlags::empty();
        request
            .truncate(8192, true, Preallocation::Off, flags)
            .await
    });
    assert_eq!(refused, Err(IoError::ReadOnly));
    assert_eq!(bench.write(&root, 4096, 512, 1), Err(IoError::OutOfRange));
    assert_eq!(root.bytes(), 4096);
}

#[test]
fn with_auto_read_only_a_format_in_what_nobody_may_write_is_there_for_reading() {
    let bench = Bench::new();
    let text = |more: &str| {
        format!("driver=layer,node-name=disk{more},file.driver=memory,file.refuse=deny")
    };
    let denied = bench.try_add(&text("")).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
    bench.add(&text(",auto-read-only=on"));
    let modes = bench.control.read(|graph| graph.modes(bench.id("disk")));
    assert!(modes.read_only && modes.auto_read_only);
    let root = bench.root("disk", reader());
    assert!(bench.read(&root, 0, 512).is_ok());
    let denied = bench.try_root("disk", writer()).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied);

    // Somebody else has it: that may pass, and reading is not what was asked for.
    let bench = Bench::new();
    let busy = bench.try_add(
        "driver=layer,node-name=disk,auto-read-only=on,file.driver=memory,file.refuse=write",
    );
    assert_eq!(busy.unwrap_err().kind(), ErrorKind::Busy);
}
