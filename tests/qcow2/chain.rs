//! Chains of images as long as they may be.

use std::fs;
use std::path::Path;
use std::thread;

use crate::setup::{Process, qemu};

/// The longest chain that is opened: so many backing images below an image.
const LONGEST: usize = 200;
/// Stack enough for a few layers and not for a chain of them.
const STACK_BYTES: usize = 512 << 10;

/// Makes images `000.qcow2` to `NNN.qcow2`, each the backing image of the one before, but for the last.
fn make(directory: &Path, images: usize) {
    let path = |number: usize| directory.join(format!("{number:03}.qcow2"));
    let create = ["create", "-q", "-u", "-f", "qcow2"];
    let name = |path: &Path| path.to_str().expect("a path of ours").to_owned();
    let (first, last) = (name(&path(0)), name(&path(images - 1)));
    let backing = ["-b", "001.qcow2", "-F", "qcow2"];
    qemu(
        "qemu-img",
        &[&create[..], &backing, &[&first, "1M"]].concat(),
    );
    qemu("qemu-img", &[&create[..], &[&last, "1M"]].concat());
    let pattern = fs::read(&first).expect("just made");
    let wanted = b"001.qcow2";
    let places = pattern.windows(wanted.len());
    let at = places.clone().position(|place| place == wanted);
    let at = at.expect("its header names it");
    for number in 1..images - 1 {
        let mut image = pattern.clone();
        let backing = format!("{:03}.qcow2", number + 1);
        image[at..at + wanted.len()].copy_from_slice(backing.as_bytes());
        fs::write(path(number), image).expect("there is room");
    }
}

#[test]
fn a_chain_of_the_greatest_length_opens_on_a_small_stack_and_a_longer_one_is_refused() {
    let directory = tempfile::tempdir().expect("there is room for tests");
    make(directory.path(), LONGEST + 2);
    let open = |number: usize| {
        let path = directory.path().join(format!("{number:03}.qcow2"));
        let options = format!(
            "driver=qcow2,file.driver=file,file.filename={}",
            path.display()
        );
        let opened = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let disk = Process::new()
                    .open(&options)
                    .map_err(|error| error.report())?;
                let described = disk.look(|graph| {
                    let node = graph.node("disk").expect("just opened").id();
                    (graph.nodes().count(), graph.described(node).name())
                });
                disk.close().map_err(|error| error.report())?;
                Ok::<_, String>(described)
            });
        opened.expect("a thread").join().expect("no panic")
    };
    let (nodes, name) = open(1).expect("it is as long as it may be");
    assert_eq!(nodes, 2 * (LONGEST + 1));
    assert!(name.ends_with("001.qcow2"), "{name}");
    let refused = open(0).expect_err("it is longer");
    assert!(
        refused.contains("cannot open backing image '002.qcow2' of node")
            && refused.contains("the chain is longer than 200 images, or a loop"),
        "{refused}"
    );
}
