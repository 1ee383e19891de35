//! Copy-on-read: what is read once is there, and nothing that was written is undone.

use std::cell::Cell;
use std::rc::Rc;

use blockcore::ErrorKind;
use blockcore::driver::WriteFlags;
use blockcore::io::buffer::Segments;
use blockcore::io::{RequestKind, Root};
use harness::overlay::DATA_OFFSET;

use crate::setup::{LIMIT, Machine, pattern, seeds, segments};

const BYTES: u64 = 65536;

/// `top` above `mid` above `base`, each with data in 16 KiB of its own: from 32, 16 and 0 KiB on.
fn machine(seed: u64) -> (Machine, Vec<u8>) {
    let machine = Machine::new(seed);
    machine.create_file("/base", BYTES);
    machine.create_file("/mid", DATA_OFFSET);
    machine.create_file("/top", DATA_OFFSET);
    machine.add("driver=file,node-name=base,filename=/base");
    for (node, below) in [("mid", "base"), ("top", "mid")] {
        machine.add(&format!(
            "driver=overlay,node-name={node},cluster-size=4K,file.driver=file,\
             file.filename=/{node},backing={below}"
        ));
    }
    let mut model = vec![0; BYTES as usize];
    for (node, offset) in [("base", 0), ("mid", 16384), ("top", 32768)] {
        let root = machine.root(node);
        let data = pattern(offset as u8 ^ node.len() as u8, 16384);
        machine.write(&root, offset, &data).unwrap();
        model[offset as usize..][..16384].copy_from_slice(&data);
        machine.remove_root(root);
    }
    (machine, model)
}

/// Which of the first clusters of 4 KiB a node holds itself.
fn held(machine: &Machine, root: &Rc<Root>) -> Vec<bool> {
    let mut held = Vec::new();
    for cluster in 0..16 {
        let root = Rc::clone(root);
        let status = machine.serve(async move {
            let request = root.enter(RequestKind::Read, 0, 0).await;
            request.io().is_allocated(cluster * 4096, 4096).await
        });
        held.push(status.unwrap().0);
    }
    held
}

fn clusters(ranges: &[(usize, usize)]) -> Vec<bool> {
    (0..16)
        .map(|cluster| {
            ranges
                .iter()
                .any(|(from, to)| (*from..*to).contains(&cluster))
        })
        .collect()
}

#[test]
fn what_is_read_is_copied_in_whole_clusters() {
    let (machine, model) = machine(1);
    machine.add("driver=copy-on-read,node-name=cor,file=top");
    let root = machine.root("cor");
    assert_eq!(held(&machine, &root), clusters(&[(8, 12)]));
    let read = machine.read(&root, 5000, 100).unwrap();
    assert!(read == model[5000..5100]);
    assert_eq!(held(&machine, &root), clusters(&[(1, 2), (8, 12)]));
    assert!(machine.read(&root, 0, BYTES).unwrap() == model);
    assert_eq!(held(&machine, &root), clusters(&[(0, 16)]));
    assert!(machine.read(&root, 0, BYTES).unwrap() == model);
}

#[test]
fn what_lies_below_the_bottom_stays_there() {
    let (machine, model) = machine(1);
    machine.add("driver=copy-on-read,node-name=cor,file=top,bottom=mid");
    let root = machine.root("cor");
    assert!(machine.read(&root, 0, BYTES).unwrap() == model);
    assert_eq!(held(&machine, &root), clusters(&[(4, 12)]));
}

#[test]
fn with_a_bottom_the_chain_down_to_it_stays_as_it_is_until_the_filter_goes() {
    let (machine, _) = machine(1);
    machine.add("driver=copy-on-read,node-name=cor,file=top,bottom=mid");
    let past_the_bottom = "driver=overlay,node-name=top,backing=base";
    let refused = machine.reopen(past_the_bottom).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(refused.to_string().contains("node 'cor'"), "{refused}");
    // What is below the bottom is not its affair.
    machine.add("driver=null-co,node-name=other,size=64K");
    machine
        .reopen("driver=overlay,node-name=mid,backing=other")
        .unwrap();
    machine.remove("cor").unwrap();
    machine.reopen(past_the_bottom).unwrap();
}

#[test]
fn a_prefetch_copies_without_a_reader() {
    let (machine, model) = machine(1);
    machine.add("driver=copy-on-read,node-name=cor,file=top,bottom=mid");
    let root = machine.root("cor");
    let inner = Rc::clone(&root);
    let fetched = machine.serve(async move {
        let request = inner.enter(RequestKind::Other, 0, 0).await;
        request.io().prefetch(0, 20_000).await
    });
    fetched.unwrap();
    assert_eq!(held(&machine, &root), clusters(&[(4, 5), (8, 12)]));
    assert!(machine.read(&root, 0, BYTES).unwrap() == model);
}

#[test]
fn a_bottom_has_to_be_an_image_of_the_chain() {
    let (machine, _) = machine(1);
    machine.add("driver=null-co,node-name=elsewhere");
    let add = |options: &str| {
        let options = format!("driver=copy-on-read,node-name=cor,{options}");
        machine.try_add(&options).unwrap_err().kind()
    };
    assert_eq!(add("file=top,bottom=elsewhere"), ErrorKind::NotFound);
    machine.add("driver=blkdebug,node-name=filter,image=top");
    assert_eq!(add("file=filter,bottom=filter"), ErrorKind::Invalid);
}

/// What the guest would have seen: a sector that it wrote has its old contents again, since a read of
/// the cluster beside it was copied after the write.
#[test]
fn writes_beside_reads_that_copy_are_not_undone() {
    for seed in seeds(30) {
        let (machine, mut model) = machine(seed);
        machine.add("driver=copy-on-read,node-name=cor,file=top");
        let root = machine.root("cor");
        let done = Rc::new(Cell::new(0));
        for cluster in 0..16u64 {
            for reads in [true, false] {
                let (root, done) = (Rc::clone(&root), Rc::clone(&done));
                machine.worker.context().spawn(async move {
                    if reads {
                        let into = Segments::allocate(4096, 4096);
                        root.read(cluster * 4096, into).await.unwrap();
                    } else {
                        let data = segments(&pattern(cluster as u8, 512));
                        let offset = cluster * 4096 + cluster % 8 * 512;
                        let written = root.write(offset, data, WriteFlags::empty()).await;
                        written.unwrap();
                    }
                    done.set(done.get() + 1);
                });
            }
            let offset = (cluster * 4096 + cluster % 8 * 512) as usize;
            model[offset..offset + 512].copy_from_slice(&pattern(cluster as u8, 512));
        }
        let simulation = &machine.simulation;
        simulation.run_until(LIMIT, || done.get() == 32).unwrap();
        let read = machine.read(&root, 0, BYTES).unwrap();
        assert!(read == model, "seed {seed}");
    }
}
