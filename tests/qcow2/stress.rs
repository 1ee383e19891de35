//! Several threads serve one image with small clusters and little memory for its tables, while an operator
//! takes and deletes snapshots and changes the disk's length: everybody finds what they wrote, every snapshot
//! holds what its disk may have held, and the image is clean.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use blockcore::driver::{Preallocation, SnapshotRef, SnapshotSpec, WriteFlags, ZeroFlags};
use blockcore::engine::sim::Random;
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, RequestKind, Root};
use blockcore::options::Options;
use futures_util::future::join_all;
use harness::history;

use crate::setup::{Images, assert_clean, qemu};

const SECTOR: u64 = 512;
const CLUSTER: u64 = 1024;
/// Those that the workers use: under eight L2 tables. There is one more behind them.
const CLUSTERS: u64 = 1024;
const TABLE_BYTES: u64 = CLUSTER / 8 * CLUSTER;
const WORKERS: u64 = 3;
/// Requests of each worker at a time, to clusters that nobody else asks for.
const DEPTH: u64 = 4;
/// What each of these does, unless `STONEWORK_SECONDS` says how long.
const REQUESTS: u32 = 400;
/// The tag of what the backing image holds.
const BASE: u32 = 1;

/// All tags that each sector was ever written with.
type Written = Arc<Mutex<Vec<Vec<u32>>>>;

#[test]
fn workers_and_an_operator_leave_a_clean_image_in_which_everybody_finds_what_they_wrote() {
    let seconds = std::env::var("STONEWORK_SECONDS").map(|text| text.parse().expect("a number"));
    let begin = std::time::Instant::now();
    for seed in 1.. {
        for options in [
            "",
            "refcount_bits=8",
            "compat=0.10",
            "compression_type=zstd,lazy_refcounts=on",
        ] {
            eprintln!("seed {seed}, {options}");
            stress(seed, options);
        }
        match &seconds {
            Ok(seconds) if begin.elapsed() < Duration::from_secs(*seconds) => {}
            _ => return,
        }
    }
}

fn stress(seed: u64, options: &str) {
    let images = Images::new();
    let (image, base) = (images.path("image"), images.path("base"));
    let bytes = CLUSTERS * CLUSTER;
    std::fs::write(&base, history::data(BASE, 0, bytes)).expect("there is room");
    let create = format!("cluster_size={CLUSTER},{options}");
    let name = image.to_str().unwrap();
    let base_name = base.to_str().unwrap();
    let size = (bytes + TABLE_BYTES).to_string();
    qemu(
        "qemu-img",
        &[
            "create",
            "-f",
            "qcow2",
            "-b",
            base_name,
            "-F",
            "raw",
            "-o",
            create.trim_end_matches(','),
            name,
            &size,
        ],
    );
    let written: Written = Arc::new(Mutex::new(vec![vec![0, BASE]; (bytes / SECTOR) as usize]));
    let context = IoContext::new(make(EngineChoice::Auto).expect("an engine"));
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
    let inner = control.clone();
    let description = format!(
        "driver=qcow2,node-name=disk,discard=unmap,pass-discard-other=on,l2-cache-size=4096,\
         l2-cache-entry-size=512,refcount-cache-size=4096,file.driver=file,file.filename={name},\
         file.discard=unmap,backing.driver=raw,backing.file.driver=file,backing.file.filename={base_name}"
    );
    let id = context.block_on(async move {
        let options = Options::parse(&description, None).expect("well-formed");
        inner.add(options).await.expect("it can be opened");
        let spec = RootSpec {
            shares: Permissions::all(),
            ..RootSpec::writer("guests")
        };
        inner.add_root("disk", spec).await.expect("it is free")
    });
    let (busy, over) = (
        Arc::new(AtomicU64::new(WORKERS)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut threads = Vec::new();
    let mut handles = Vec::new();
    for number in 0..WORKERS {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (busy, over, written) = (Arc::clone(&busy), Arc::clone(&over), Arc::clone(&written));
        threads.push(thread::spawn(move || {
            let context = IoContext::new(make(EngineChoice::Auto).expect("an engine"));
            sender
                .send(context.handle().clone())
                .expect("it is waited for");
            let inner = Rc::clone(&context);
            context.block_on(serve(inner, id, (seed, number), written, (busy, over)));
        }));
        handles.push(receiver.recv().expect("it comes"));
    }
    let inner = Rc::clone(&context);
    let finished = Arc::clone(&busy);
    context.block_on(async move {
        for handle in handles {
            control.attach(id, &handle).await.expect("it can be served");
        }
        operate(&inner, &control, seed, &finished).await;
        control.remove_root(id).await.expect("nobody objects");
        control.remove("disk").await.expect("it can be closed");
    });
    over.store(true, Ordering::Release);
    for thread in threads {
        thread.join().expect("nobody panics");
    }
    assert_clean(&image, &format!("seed {seed}, {options}"));
    check_snapshots(
        &image,
        &written.lock().unwrap(),
        &format!("seed {seed}, {options}"),
    );
}

/// What an operator does, until no worker is busy.
async fn operate(context: &IoContext, control: &Control, seed: u64, busy: &AtomicU64) {
    let mut random = Random::new(seed);
    let mut names = Vec::new();
    for number in 0.. {
        context
            .delay(Duration::from_micros(random.below(20_000)))
            .await;
        if busy.load(Ordering::Acquire) == 0 {
            return;
        }
        match random.below(3) {
            0 if names.len() < 4 => {
                let name = format!("s{number}");
                let spec = SnapshotSpec {
                    name: name.clone(),
                    ..SnapshotSpec::default()
                };
                control
                    .take_snapshot("disk", spec)
                    .await
                    .expect("it can be taken");
                names.push(name);
            }
            1 if !names.is_empty() => {
                let name = names.remove(random.below(names.len() as u64) as usize);
                let which = SnapshotRef {
                    id: None,
                    name: Some(name),
                };
                control
                    .delete_snapshot("disk", &which)
                    .await
                    .expect("it is there");
            }
            _ => {
                let bytes = CLUSTERS * CLUSTER + random.below(TABLE_BYTES / SECTOR) * SECTOR;
                // Version 2 cannot with snapshots.
                let _ = control.resize("disk", bytes, Preallocation::Off).await;
            }
        }
    }
}

async fn serve(
    context: Rc<IoContext>,
    id: RootId,
    (seed, number): (u64, u64),
    written: Written,
    (busy, over): (Arc<AtomicU64>, Arc<AtomicBool>),
) {
    let root = loop {
        match context.root(id) {
            Some(root) => break root,
            None => context.delay(Duration::from_millis(1)).await,
        }
    };
    let users = (0..DEPTH).map(|user| {
        let first = number * DEPTH + user;
        use_disk(&root, seed * 1000 + first, first, &written)
    });
    join_all(users).await;
    drop(root);
    busy.fetch_sub(1, Ordering::AcqRel);
    while !over.load(Ordering::Acquire) {
        context.delay(Duration::from_millis(1)).await;
    }
}

/// Requests to every so many-th cluster from `first` on.
async fn use_disk(root: &Rc<Root>, seed: u64, first: u64, written: &Written) {
    const STEP: u64 = WORKERS * DEPTH;
    let mut random = Random::new(seed);
    let mut tags = vec![BASE; (CLUSTERS * CLUSTER / SECTOR) as usize];
    for number in 0..REQUESTS {
        let cluster = first + random.below((CLUSTERS - first).div_ceil(STEP)) * STEP;
        let (mut offset, mut bytes) = (cluster * CLUSTER, CLUSTER);
        let mut tag = 2 + number * STEP as u32 + first as u32;
        let kind = random.below(16);
        if kind == 6 {
            tag |= history::COMPRESSIBLE;
        }
        if matches!(kind, 0..3 | 7..=8) && random.chance(500) {
            // A part of it.
            bytes = SECTOR;
            offset += random.below(CLUSTER / SECTOR) * SECTOR;
        }
        let sectors = (offset / SECTOR) as usize..((offset + bytes) / SECTOR) as usize;
        let new = match kind {
            0..=6 => Some(tag),
            7..12 => Some(0),
            _ => None,
        };
        if let Some(new) = new {
            let mut written = written.lock().unwrap();
            written[sectors.clone()]
                .iter_mut()
                .for_each(|all| all.push(new));
            tags[sectors.clone()].fill(new);
        }
        let memory = Segments::allocate(bytes as usize, 4096);
        memory.copy_from(&history::data(tag, offset, bytes));
        match kind {
            0..=5 => root.write(offset, memory, WriteFlags::empty()).await,
            6 => {
                let request = root.enter(RequestKind::Write, offset, bytes).await;
                request.io().write_compressed(offset, memory).await
            }
            7..=8 => {
                let flags = match random.chance(500) {
                    true => ZeroFlags::MAY_UNMAP,
                    false => ZeroFlags::empty(),
                };
                root.write_zeroes(offset, bytes, flags).await
            }
            9..12 => {
                // Where a discard is not possible it says so, or does nothing.
                let flags = ZeroFlags::MAY_UNMAP;
                root.write_zeroes(offset, bytes, flags)
                    .await
                    .expect("it can be zeroed");
                root.discard(offset, bytes).await
            }
            12 => root.flush().await,
            _ => {
                root.read(offset, memory.clone())
                    .await
                    .expect("it can be read");
                let found = memory.to_vec();
                for (index, sector) in sectors.enumerate() {
                    let at = sector as u64 * SECTOR;
                    let expected = history::data(tags[sector], at, SECTOR);
                    let part = &found[index * SECTOR as usize..][..SECTOR as usize];
                    assert!(part == expected, "sector {sector}, tag {}", tags[sector]);
                }
                Ok(())
            }
        }
        .expect("it can be done");
    }
}

/// Each sector of each snapshot holds something that was written to it.
fn check_snapshots(image: &Path, written: &[Vec<u32>], when: &str) {
    let name = image.to_str().unwrap();
    let info = qemu("qemu-img", &["info", "--output=json", "-f", "qcow2", name]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("it is JSON");
    let snapshots = info
        .get("snapshots")
        .and_then(|list| list.as_array().cloned());
    for snapshot in snapshots.unwrap_or_default() {
        let which = format!("snapshot.id={}", snapshot["id"].as_str().unwrap());
        let raw = image.with_extension("raw");
        let arguments = ["convert", "-l", &which, "-f", "qcow2", "-O", "raw", name];
        qemu(
            "qemu-img",
            &[&arguments[..], &[raw.to_str().unwrap()]].concat(),
        );
        let bytes = std::fs::read(&raw).expect("just made");
        for (sector, tags) in written.iter().enumerate() {
            let at = sector as u64 * SECTOR;
            let found = &bytes[at as usize..][..SECTOR as usize];
            let is_one = |tag: &u32| found == history::data(*tag, at, SECTOR);
            assert!(
                tags.iter().rev().any(is_one),
                "{when}: {which}: sector {sector}"
            );
        }
    }
}
