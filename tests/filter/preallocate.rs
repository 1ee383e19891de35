//! The filter that makes a file longer ahead of its data.

use std::rc::Rc;

use blockcore::Error;
use blockcore::io::Root;
use blockcore::options::Options;
use harness::overlay::DATA_OFFSET;

use crate::setup::{Machine, pattern};

const OPTIONS: &str = "driver=overlay,node-name=top,cluster-size=4K,size=1M,\
                       file.driver=preallocate,file.node-name=ahead,file.prealloc-align=64K,\
                       file.prealloc-size=256K,file.file.driver=file,file.file.filename=/disk";

fn machine() -> (Machine, Rc<Root>) {
    let machine = Machine::new(1);
    machine.create_file("/disk", DATA_OFFSET);
    machine.add(OPTIONS);
    let root = machine.root("top");
    (machine, root)
}

fn host_bytes(machine: &Machine) -> u64 {
    let contents = machine.simulation.contents("/disk");
    contents.unwrap().len() as u64
}

fn seen_above(machine: &Machine) -> u64 {
    let node = |graph: &blockcore::graph::Graph| graph.node("ahead").unwrap().bytes();
    machine.control.read(node)
}

#[test]
fn a_write_past_the_end_makes_room_for_those_after_it_and_the_length_is_the_datas() {
    let (machine, root) = machine();
    machine.write(&root, 0, &pattern(1, 4096)).unwrap();
    let made = (DATA_OFFSET + 4096 + (256 << 10)).next_multiple_of(64 << 10);
    assert_eq!(host_bytes(&machine), made);
    assert_eq!(seen_above(&machine), DATA_OFFSET + 4096);
    machine.write(&root, 8192, &pattern(2, 4096)).unwrap();
    assert_eq!(host_bytes(&machine), made);
    assert_eq!(seen_above(&machine), DATA_OFFSET + 12288);
    assert!(machine.read(&root, 0, 4096).unwrap() == pattern(1, 4096));
    assert!(machine.read(&root, 4096, 4096).unwrap() == [0; 4096]);
    assert!(machine.read(&root, 8192, 4096).unwrap() == pattern(2, 4096));
}

#[test]
fn what_was_made_ahead_is_cut_off_when_the_node_closes() {
    let (machine, root) = machine();
    machine.write(&root, 8192, &pattern(2, 4096)).unwrap();
    machine.remove_root(root);
    machine.remove("top").unwrap();
    assert_eq!(host_bytes(&machine), DATA_OFFSET + 12288);
    machine.add(OPTIONS);
    let root = machine.root("top");
    assert!(machine.read(&root, 8192, 4096).unwrap() == pattern(2, 4096));
}

#[test]
fn what_was_made_ahead_is_cut_off_when_the_node_becomes_read_only() {
    let (machine, root) = machine();
    machine.write(&root, 8192, &pattern(2, 4096)).unwrap();
    machine.remove_root(root);
    let reopened = machine.reopen(
        "node-name=top,driver=overlay,read-only=on,file.driver=preallocate,file.file.driver=file,\
         file.file.filename=/disk",
    );
    reopened.unwrap();
    assert_eq!(host_bytes(&machine), DATA_OFFSET + 12288);
    assert_eq!(seen_above(&machine), DATA_OFFSET + 12288);
}

/// From then on whoever is above writes to the file itself, past where the data ended.
#[test]
fn what_was_made_ahead_is_cut_off_before_the_node_is_taken_out_of_a_chain() {
    let machine = Machine::new(1);
    machine.create_file("/disk", DATA_OFFSET);
    machine.add("driver=file,node-name=file,filename=/disk");
    machine.add(
        "driver=overlay,node-name=top,cluster-size=4K,size=1M,file.driver=preallocate,\
         file.prealloc-align=64K,file.prealloc-size=256K,file.file=file",
    );
    let root = machine.root("top");
    machine.write(&root, 0, &pattern(1, 4096)).unwrap();
    assert!(host_bytes(&machine) > DATA_OFFSET + 4096);
    let options = Options::parse("driver=overlay,node-name=top,file=file", None).unwrap();
    let control = machine.control.clone();
    let closing = machine.run(async move {
        let mut change = control.begin().await;
        change.reopen(vec![options]).await?;
        Ok::<_, Error>(change.prepare().await?.commit())
    });
    let closing = closing.unwrap();
    // The filter is not closed yet.
    assert_eq!(host_bytes(&machine), DATA_OFFSET + 4096);
    machine.write(&root, 8192, &pattern(2, 4096)).unwrap();
    machine.run(closing.finish()).unwrap();
    assert!(machine.read(&root, 0, 4096).unwrap() == pattern(1, 4096));
    assert!(machine.read(&root, 8192, 4096).unwrap() == pattern(2, 4096));
}

#[test]
fn what_was_made_ahead_is_cut_off_of_a_file_that_is_written_only_while_somebody_does() {
    let machine = Machine::new(1);
    machine.create_file("/disk", DATA_OFFSET);
    machine.add("driver=file,node-name=file,filename=/disk,auto-read-only=on");
    machine.add("driver=preallocate,node-name=ahead,file=file");
    machine.add("driver=overlay,node-name=top,cluster-size=4K,size=1M,file=ahead");
    let root = machine.root("top");
    machine.write(&root, 0, &pattern(1, 4096)).unwrap();
    machine.remove_root(root);
    machine.remove("top").unwrap();
    machine.remove("ahead").unwrap();
    assert_eq!(host_bytes(&machine), DATA_OFFSET + 4096);
}
