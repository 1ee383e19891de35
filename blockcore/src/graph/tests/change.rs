//! Transactions: adding, moving and removing nodes.

use super::*;
use crate::ErrorKind;
use crate::graph::{Change, Operation};

/// Makes a change and commits it.
fn commit(
    bench: &Bench,
    make: impl AsyncFnOnce(&mut Change) -> Result<(), Error> + 'static,
) -> Result<(), Error> {
    let control = bench.control.clone();
    bench.run(async move {
        let mut change = control.begin().await;
        make(&mut change).await?;
        change.prepare().await?.commit().finish().await
    })
}

#[test]
fn a_node_cannot_come_to_be_below_itself() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    bench.add("driver=pass,node-name=low,file=disk");
    bench.add("driver=pass,node-name=high,file=low");
    let looped = commit(&bench, async |change| {
        let (low, high) = (change.find("low")?, change.find("high")?);
        change.set_child(low, "file", Some(high))
    });
    assert_eq!(looped.unwrap_err().kind(), ErrorKind::Invalid);
    let itself = commit(&bench, async |change| {
        let low = change.find("low")?;
        change.set_child(low, "file", Some(low))
    });
    assert_eq!(itself.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(bench.child("low", "file").as_deref(), Some("disk"));
}

#[test]
fn a_child_that_is_needed_stays_and_one_that_is_unknown_is_refused() {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory");
    for (name, child) in [("file", None), ("mirror", Some("disk"))] {
        let refused = commit(&bench, async move |change| {
            let disk = change.find("disk")?;
            let child = child.map(|name| change.find(name)).transpose()?;
            change.set_child(disk, name, child)
        });
        let refused = refused.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        assert!(refused.to_string().contains(name), "{refused}");
    }
}

#[test]
fn a_filter_put_on_top_takes_over_the_users_and_keeps_its_child() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    let staying = RootSpec {
        stays: true,
        ..RootSpec::reader("a job")
    };
    let staying = RootSpec {
        shares: Permissions::all(),
        ..staying
    };
    let staying = bench.try_root("disk", staying).unwrap();
    bench.write(&root, 0, 512, 7).unwrap();
    commit(&bench, async |change| {
        let disk = change.find("disk")?;
        let filter = change
            .add(options("driver=pass,node-name=filter,file=disk"), None)
            .await?;
        change.replace_node(disk, filter)
    })
    .unwrap();
    let node = |id| bench.control.node_of(id).unwrap();
    assert_eq!(node(root.id()), bench.id("filter"));
    assert_eq!(node(staying), bench.id("disk"));
    assert_eq!(bench.child("filter", "file").as_deref(), Some("disk"));
    bench.settle();
    assert_eq!(bench.read(&root, 0, 512).unwrap(), [7; 512]);
    assert_eq!(root.plan().limits().request_alignment, 1);
}

#[test]
fn a_frozen_link_is_neither_replaced_nor_cut_until_it_is_thawed() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=base");
    bench.add("driver=memory,node-name=other");
    bench.add("driver=layer,node-name=disk,file.driver=memory,backing=base");
    let freeze = |on: bool| {
        commit(&bench, async move |change| {
            let disk = change.find("disk")?;
            match on {
                true => change.freeze_chain(disk, None),
                false => {
                    change.thaw_chain(disk, None);
                    Ok(())
                }
            }
        })
    };
    let set = |name: Option<&'static str>| {
        commit(&bench, async move |change| {
            let disk = change.find("disk")?;
            let child = name.map(|name| change.find(name)).transpose()?;
            change.set_child(disk, "backing", child)
        })
    };
    freeze(true).unwrap();
    assert_eq!(set(Some("other")).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(set(None).unwrap_err().kind(), ErrorKind::Busy);
    let replaced = commit(&bench, async |change| {
        let (base, other) = (change.find("base")?, change.find("other")?);
        change.replace_node(base, other)
    });
    assert_eq!(replaced.unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(bench.child("disk", "backing").as_deref(), Some("base"));
    freeze(false).unwrap();
    set(Some("other")).unwrap();
    set(None).unwrap();
    assert_eq!(bench.child("disk", "backing"), None);
}

#[test]
fn a_chain_is_frozen_whole_or_not_at_all() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=base");
    bench.add("driver=layer,node-name=mid,file.driver=memory,backing=base");
    bench.add("driver=layer,node-name=top,file.driver=memory,backing=mid");
    let freeze = |from: &'static str, to: &'static str| {
        commit(&bench, async move |change| {
            let (from, to) = (change.find(from)?, change.find(to)?);
            change.freeze_chain(from, Some(to))
        })
    };
    freeze("mid", "base").unwrap();
    assert_eq!(freeze("top", "base").unwrap_err().kind(), ErrorKind::Busy);
    // The link that the refused one came to first is free.
    freeze("top", "mid").unwrap();
    assert_eq!(
        freeze("base", "top").unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn a_node_that_is_used_is_not_removed_and_its_user_is_named() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    bench.add("driver=pass,node-name=top,file=disk");
    let refused = bench.remove("disk").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains("node 'top'"), "{refused}");
    let root = bench.try_root("top", reader()).unwrap();
    let refused = bench.remove("top").unwrap_err();
    assert!(refused.to_string().contains("export 'ro'"), "{refused}");
    bench.remove_root(root).unwrap();
    bench.remove("top").unwrap();
    assert!(bench.has("disk"), "it was added by itself");
    bench.remove("disk").unwrap();
}

#[test]
fn what_came_with_a_node_goes_with_it_parents_first() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=below");
    let refused = bench.remove("below").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    told();
    bench.remove("top").unwrap();
    assert!(!bench.has("below"));
    assert_eq!(told_of("close"), ["top close", "below close"]);
}

#[test]
fn a_node_is_flushed_before_it_is_closed() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    told();
    bench.remove("disk").unwrap();
    assert_eq!(told(), ["disk flush host", "disk flush disk", "disk close"]);
    bench.add("driver=memory,node-name=disk,can=badflush");
    let lost = bench.remove("disk").unwrap_err();
    assert_eq!(lost.kind(), ErrorKind::Io);
    assert!(!bench.has("disk"), "it is gone in any case");
}

#[test]
fn a_change_that_is_given_up_closes_what_it_opened_and_nothing_else() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=old");
    told();
    let control = bench.control.clone();
    bench.run(async move {
        let mut change = control.begin().await;
        let new = options("driver=pass,node-name=new,file.driver=memory,file.node-name=low");
        change.add(new, None).await.unwrap();
        let old = change.find("old").unwrap();
        let new = change.find("new").unwrap();
        change.replace_node(old, new).unwrap();
    });
    bench.settle();
    assert_eq!(told_of("close"), ["new close", "low close"]);
    assert!(bench.has("old") && !bench.has("new") && !bench.has("low"));
    // The names are free.
    bench.add("driver=memory,node-name=new");
}

#[test]
fn a_node_that_does_not_open_leaves_nothing_of_those_below_it() {
    let bench = Bench::new();
    let tree = "driver=layer,node-name=disk,file.driver=memory,file.node-name=file,\
                backing.driver=memory,backing.refuse=open";
    assert!(bench.try_add(tree).is_err());
    bench.settle();
    assert_eq!(told_of("close"), ["file close"]);
    assert_eq!(bench.control.read(|graph| graph.nodes().count()), 0);
}

#[test]
fn a_node_needs_a_name_that_is_well_formed_and_its_own() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let kind = |text: &str| bench.try_add(text).unwrap_err().kind();
    assert_eq!(kind("driver=memory,node-name=disk"), ErrorKind::Exists);
    assert_eq!(kind("driver=memory"), ErrorKind::Invalid);
    assert_eq!(kind("driver=memory,node-name=1disk"), ErrorKind::Invalid);
    assert_eq!(
        kind("driver=memory,node-name=#block000"),
        ErrorKind::Invalid
    );
    let long = "x".repeat(32);
    assert_eq!(
        kind(&format!("driver=memory,node-name={long}")),
        ErrorKind::Invalid
    );
    bench.add(&format!("driver=memory,node-name={}", &long[1..]));
}

#[test]
fn an_unknown_driver_option_or_reference_is_refused_by_its_name() {
    let bench = Bench::new();
    let cases = [
        ("driver=memories,node-name=a", "memories"),
        ("driver=memory,node-name=a,sise=4k", "sise"),
        ("driver=pass,node-name=a,file=elsewhere", "elsewhere"),
        ("driver=pass,node-name=a", "file"),
        ("node-name=a", "driver"),
    ];
    for (text, word) in cases {
        let refused = bench.try_add(text).unwrap_err();
        assert!(refused.to_string().contains(word), "{text}: {refused}");
        assert!(!bench.has("a"));
    }
}

#[test]
fn a_node_that_two_use_is_opened_once_and_goes_with_the_last() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=base,read-only=on");
    for name in ["one", "two"] {
        bench.add(&format!(
            "driver=layer,node-name={name},file.driver=memory,backing=base"
        ));
    }
    let id = bench.id("base");
    assert_eq!(
        bench.control.read(|graph| graph.users(id)),
        ["node 'one'", "node 'two'"]
    );
    bench.remove("one").unwrap();
    assert_eq!(bench.remove("base").unwrap_err().kind(), ErrorKind::Busy);
    bench.remove("two").unwrap();
    bench.remove("base").unwrap();
}

#[test]
fn changes_happen_one_after_the_other_and_looks_wait_for_none() {
    let bench = Bench::new();
    let control = bench.control.clone();
    let first = bench.run(async move { control.begin().await });
    let added = Rc::new(RefCell::new(false));
    let (control, seen) = (bench.control.clone(), Rc::clone(&added));
    bench.worker.context().spawn(async move {
        let disk = options("driver=memory,node-name=disk");
        control.add(disk).await.unwrap();
        seen.replace(true);
    });
    bench.settle();
    assert!(!*added.borrow());
    assert_eq!(bench.control.read(|graph| graph.nodes().count()), 0);
    drop(first);
    bench.settle();
    assert!(*added.borrow() && bench.has("disk"));
}

#[test]
fn an_operation_is_refused_with_the_first_reason_until_all_are_gone() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let id = bench.id("disk");
    let check = |operation| {
        let checked = bench
            .control
            .read(|graph| graph.check_operation(id, operation));
        checked.map_err(|error| error.to_string())
    };
    let one = bench.control.block(
        id,
        &[Operation::Resize, Operation::Stream],
        "job 'one' is at it",
    );
    let two = bench
        .control
        .block(id, &[Operation::Resize], "job 'two' is at it");
    assert!(check(Operation::Resize).unwrap_err().contains("job 'one'"));
    assert!(check(Operation::Stream).is_err());
    check(Operation::MirrorSource).unwrap();
    bench.control.unblock(one);
    assert!(check(Operation::Resize).unwrap_err().contains("job 'two'"));
    check(Operation::Stream).unwrap();
    let refused = bench.remove("disk").unwrap_err();
    assert!(refused.to_string().contains("job 'two'"), "{refused}");
    bench.control.unblock(two);
    bench.remove("disk").unwrap();
}

#[test]
fn several_changes_in_one_are_all_made_or_none() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    bench.try_root("disk", writer()).unwrap();
    let refused = commit(&bench, async |change| {
        change
            .add(options("driver=memory,node-name=new"), None)
            .await?;
        let disk = change.find("disk")?;
        change.add_root(disk, RootSpec::writer("another"))?;
        Ok(())
    });
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
    bench.settle();
    assert!(!bench.has("new"));
}
