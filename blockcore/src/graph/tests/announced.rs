//! Memory that is announced: who hears of it, and when of its end.

use super::*;
use crate::graph::Change;

const ONE: MemoryRange = MemoryRange {
    address: 0x1000,
    bytes: 4096,
};
const TWO: MemoryRange = MemoryRange {
    address: 0x9000,
    bytes: 8192,
};

fn disk() -> (Bench, Rc<Root>) {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.node-name=file");
    let root = bench.root("disk", writer());
    told();
    (bench, root)
}

fn commit(bench: &Bench, build: impl AsyncFnOnce(&mut Change) -> Result<(), Error> + 'static) {
    let control = bench.control.clone();
    let done = bench.run(async move {
        let mut change = control.begin().await;
        build(&mut change).await?;
        change.prepare().await?.commit().finish().await
    });
    done.unwrap();
    bench.settle();
}

#[test]
fn every_layer_hears_of_announced_memory_once_and_of_its_end_when_nobody_has_it() {
    let (_bench, root) = disk();
    let first = root.announce(ONE);
    assert_eq!(told(), ["disk hears of 0x1000", "file hears of 0x1000"]);
    let again = root.announce(ONE);
    let other = root.announce(TWO);
    assert_eq!(told(), ["disk hears of 0x9000", "file hears of 0x9000"]);
    drop(first);
    assert_eq!(told(), [""; 0]);
    assert_eq!(root.announced(), [ONE, TWO]);
    drop(again);
    assert_eq!(
        told(),
        [
            "disk hears the end of 0x1000",
            "file hears the end of 0x1000"
        ]
    );
    assert_eq!(root.announced(), [TWO]);
    drop(other);
}

#[test]
fn layers_that_come_hear_of_all_that_is_announced_and_those_that_go_of_its_end() {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.node-name=file");
    bench.add("driver=layer,node-name=other,file.driver=memory,file.node-name=low");
    bench.add("driver=pass,node-name=top,file=disk");
    let root = bench.root("top", writer());
    told();
    let _one = root.announce(ONE);
    let two = root.announce(TWO);
    told();
    commit(&bench, async |change| {
        let (top, other) = (change.find("top")?, change.find("other")?);
        change.set_child(top, "file", Some(other))
    });
    assert_eq!(
        told_of("hears"),
        [
            "other hears of 0x1000",
            "other hears of 0x9000",
            "low hears of 0x1000",
            "low hears of 0x9000",
            "disk hears the end of 0x1000",
            "disk hears the end of 0x9000",
            "file hears the end of 0x1000",
            "file hears the end of 0x9000",
        ]
    );
    // A filter that says nothing; the others stay.
    commit(&bench, async |change| {
        let other = change.find("other")?;
        let filter = options("driver=pass,node-name=filter,file=other");
        let filter = change.add(filter, None).await?;
        change.replace_node(other, filter)
    });
    assert_eq!(told_of("hears"), [""; 0]);
    drop(two);
    assert_eq!(
        told_of("hears"),
        [
            "other hears the end of 0x9000",
            "low hears the end of 0x9000"
        ]
    );
}

#[test]
fn each_worker_tells_for_itself_and_a_root_that_ends_tells_of_the_end() {
    let (bench, root) = disk();
    let _here = root.announce(ONE);
    let worker = bench.simulation.worker();
    let (control, id, handle) = (
        bench.control.clone(),
        root.id(),
        worker.context().handle().clone(),
    );
    bench.run(async move { control.attach(id, &handle).await.unwrap() });
    told();
    let there = worker.context().root(id).unwrap().announce(ONE);
    assert_eq!(told(), ["disk hears of 0x1000", "file hears of 0x1000"]);
    drop(root);
    bench.remove_root(id).unwrap();
    bench.settle();
    let ends = told_of("hears the end of 0x1000");
    assert_eq!(ends.len(), 4, "two layers on two workers: {ends:?}");
    // Nobody is left to be told.
    drop(there);
    assert_eq!(told_of("hears"), [""; 0]);
}
