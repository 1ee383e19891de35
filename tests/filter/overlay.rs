//! The test driver keeps its own promises, or what is tested on it proves nothing.

use std::rc::Rc;

use blockcore::driver::{Preallocation, StatusFlags, TruncateFlags};
use blockcore::engine::sim::Faults;
use blockcore::graph::RootSpec;
use blockcore::graph::permission::Permissions;
use blockcore::io::{RequestKind, Root};

use crate::setup::{Machine, pattern, range, seeds};

const BASE: &str = "driver=file,node-name=base,filename=/base";
const TOP: &str = "driver=overlay,node-name=top,discard=unmap,file.driver=file,file.filename=/top,\
                   cluster-size=4K,backing=base";
const BASE_BYTES: u64 = 70_000;
const TOP_BYTES: u64 = 100_001;

/// A base full of data below an empty overlay that is longer.
fn machine(seed: u64) -> (Machine, Vec<u8>) {
    let machine = Machine::new(seed);
    machine.create_file("/base", BASE_BYTES);
    machine.create_file("/top", harness::overlay::DATA_OFFSET);
    machine.add(BASE);
    let base = machine.root("base");
    let data = pattern(0x55, BASE_BYTES);
    machine.write(&base, 0, &data).unwrap();
    machine.flush(&base).unwrap();
    machine.remove_root(base);
    machine.add(&format!("{TOP},size={TOP_BYTES}"));
    let mut model = data;
    model.resize(TOP_BYTES as usize, 0);
    (machine, model)
}

fn owner(machine: &Machine, node: &str) -> Rc<Root> {
    let spec = RootSpec {
        needs: Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE,
        ..RootSpec::writer("a guest")
    };
    machine.try_root(node, spec).unwrap()
}

fn truncate(machine: &Machine, root: &Rc<Root>, bytes: u64) {
    let root = Rc::clone(root);
    let truncated = machine.serve(async move {
        let request = root.enter(RequestKind::Truncate, 0, 0).await;
        let off = Preallocation::Off;
        request
            .truncate(bytes, true, off, TruncateFlags::ZERO)
            .await
    });
    truncated.unwrap();
}

#[test]
fn random_requests_to_an_overlay_leave_what_a_plain_disk_would_have() {
    for seed in seeds(40) {
        eprintln!("seed {seed}");
        let (mut machine, mut model) = machine(seed);
        let mut random = machine.simulation.random();
        let mut root = owner(&machine, "top");
        for step in 0..120 {
            let (offset, bytes) = range(&mut random, model.len() as u64);
            let place = offset as usize..(offset + bytes) as usize;
            match random.below(12) {
                0..5 => {
                    let data = pattern(step as u8, bytes);
                    machine.write(&root, offset, &data).unwrap();
                    model[place].copy_from_slice(&data);
                }
                5 => {
                    machine.zero(&root, offset, bytes).unwrap();
                    model[place].fill(0);
                }
                6 => {
                    machine.discard(&root, offset, bytes).unwrap();
                    // Whole clusters read as zeroes; the rest is as it was.
                    let begin = offset.next_multiple_of(4096) as usize;
                    let end = (offset + bytes) as usize / 4096 * 4096;
                    if begin < end {
                        model[begin..end].fill(0);
                    }
                }
                7 => {
                    let bytes = 1 + random.below(2 * TOP_BYTES);
                    truncate(&machine, &root, bytes);
                    model.resize(bytes as usize, 0);
                }
                8 if random.chance(300) => {
                    if random.chance(500) {
                        machine.remove_root(root);
                        machine.remove("top").unwrap();
                    } else {
                        machine = machine.killed();
                        machine.add(BASE);
                    }
                    machine.add(TOP);
                    root = owner(&machine, "top");
                    assert_eq!(root.bytes(), model.len() as u64);
                }
                _ => {
                    let read = machine.read(&root, offset, bytes).unwrap();
                    assert!(read == model[place], "seed {seed}, step {step}");
                }
            }
        }
        let read = machine.read(&root, 0, model.len() as u64).unwrap();
        assert!(read == model, "seed {seed}");
    }
}

/// What the guest would have seen: it wrote some bytes of a cluster, power went, and other bytes of the
/// cluster, which nobody had touched, are not what the backing image has.
#[test]
fn after_a_power_cut_what_was_flushed_is_there_and_what_was_not_touched_is_as_it_was() {
    let mut lost = 0;
    for seed in seeds(60) {
        eprintln!("seed {seed}");
        let (machine, mut model) = machine(seed);
        let root = machine.root("top");
        for offset in [5000, 20_000, 90_000] {
            let data = pattern(1, 3000);
            machine.write(&root, offset, &data).unwrap();
            model[offset as usize..][..3000].copy_from_slice(&data);
        }
        machine.flush(&root).unwrap();
        machine.write(&root, 40_000, &[9; 1000]).unwrap();
        machine.simulation.power_cut();
        drop(root);
        let Machine { simulation, .. } = machine;
        let machine = Machine::on(simulation);
        machine.add(BASE);
        machine.add(TOP);
        let root = machine.root("top");
        let read = machine.read(&root, 0, TOP_BYTES).unwrap();
        for (i, (is, was)) in read.iter().zip(&model).enumerate() {
            let unflushed = (40_000..41_000).contains(&i);
            assert!(is == was || unflushed && *is == 9, "seed {seed}, byte {i}");
        }
        lost += u32::from(read[40_000..41_000] != [9; 1000]);
    }
    assert!(lost > 5 || seeds(60).count() == 1, "{lost}");
}

#[test]
fn failed_requests_can_be_repeated_and_lose_nothing() {
    for seed in seeds(30) {
        eprintln!("seed {seed}");
        let (machine, mut model) = machine(seed);
        let mut random = machine.simulation.random();
        let root = machine.root("top");
        let mut failures = 0;
        for step in 0..40 {
            let (offset, bytes) = range(&mut random, TOP_BYTES);
            let place = offset as usize..(offset + bytes) as usize;
            let data = pattern(step, bytes);
            let trouble = Faults {
                write_error_permille: 200,
                no_space_permille: 100,
                ..Faults::default()
            };
            loop {
                machine.simulation.set_faults(trouble.clone());
                let written = match step % 4 {
                    0 => machine.zero(&root, offset, bytes),
                    _ => machine.write(&root, offset, &data),
                };
                machine.simulation.set_faults(Faults::default());
                if written.is_ok() {
                    break;
                }
                failures += 1;
            }
            match step % 4 {
                0 => model[place].fill(0),
                _ => model[place].copy_from_slice(&data),
            }
        }
        assert!(failures > 0);
        let read = machine.read(&root, 0, TOP_BYTES).unwrap();
        assert!(read == model, "seed {seed}");
        let machine = machine.killed();
        machine.add(BASE);
        machine.add(TOP);
        let root = machine.root("top");
        let read = machine.read(&root, 0, TOP_BYTES).unwrap();
        assert!(read == model, "seed {seed}, after a kill");
    }
}

#[test]
fn an_overlay_says_which_clusters_it_holds() {
    let (machine, _) = machine(1);
    let root = machine.root("top");
    machine.write(&root, 5000, &[1; 10]).unwrap();
    machine.zero(&root, 8192, 4096).unwrap();
    let mut found = Vec::new();
    let mut offset = 0;
    while offset < TOP_BYTES {
        let inner = Rc::clone(&root);
        let status = machine.serve(async move {
            let request = inner.enter(RequestKind::Read, 0, 0).await;
            let status = request.block_status(true, offset, TOP_BYTES).await;
            status.unwrap()
        });
        let flags = status.flags - StatusFlags::PLACE - StatusFlags::END;
        found.push((offset, flags));
        offset += status.bytes;
    }
    let (here, none) = (StatusFlags::ALLOCATED, StatusFlags::empty());
    let expected = [
        (0, none),
        (4096, here | StatusFlags::DATA),
        (8192, here | StatusFlags::ZERO),
        (12288, none),
    ];
    assert_eq!(found, expected);
}
