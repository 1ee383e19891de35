//! Requests that race for host clusters: what one lets go of, another gets, and a third still uses.

use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use blockcore::Error;
use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::engine::sim::{FileProperties, Random, Simulation};
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::{Control, Graph, RootId, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::io::{IoContext, RequestKind, Root};
use blockcore::options::Options;
use futures_channel::oneshot;
use harness::history;

use crate::setup::{Images, assert_clean, qemu};

const CLUSTER: u64 = 4096;
/// Clusters of the disk.
const CLUSTERS: u64 = 100;
/// Simulated time after which a test is stuck.
const LIMIT: Duration = Duration::from_secs(600);

fn make_image(image: &Path) {
    let (image, bytes) = (image.to_str().unwrap(), (CLUSTERS * CLUSTER).to_string());
    let options = format!("cluster_size={CLUSTER}");
    let create = ["create", "-f", "qcow2", "-o", &options, image, &bytes];
    qemu("qemu-img", &create);
}

fn segments(bytes: &[u8]) -> Segments {
    let segments = Segments::allocate(bytes.len(), 4096);
    segments.copy_from(bytes);
    segments
}

async fn write(root: &Rc<Root>, cluster: u64, tag: u32) {
    let from = segments(&history::data(tag, 0, CLUSTER));
    let written = root.write(cluster * CLUSTER, from, WriteFlags::empty());
    written.await.expect("it can be written");
}

async fn write_compressed(root: &Rc<Root>, cluster: u64, tag: u32) {
    let from = segments(&history::data(tag | history::COMPRESSIBLE, 0, CLUSTER));
    let offset = cluster * CLUSTER;
    let request = root.enter(RequestKind::Write, offset, CLUSTER).await;
    let written = request.io().write_compressed(offset, from).await;
    written.expect("it can be compressed");
}

async fn read(root: &Rc<Root>, cluster: u64) -> Vec<u8> {
    let into = Segments::allocate(CLUSTER as usize, 4096);
    let read = root.read(cluster * CLUSTER, into.clone()).await;
    read.expect("it can be read");
    into.to_vec()
}

/// A graph with the image above a debug node, and a root on it.
async fn open(context: &Rc<IoContext>, image: &str) -> Result<(Control, Rc<Root>, RootId), Error> {
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(context));
    let options = format!(
        "driver=qcow2,node-name=disk,discard=unmap,file.driver=blkdebug,file.discard=unmap,\
         file.image.driver=file,file.image.filename={image},file.image.discard=unmap"
    );
    control.add(Options::parse(&options, None)?).await?;
    let id = control
        .add_root("disk", RootSpec::writer("a guest"))
        .await?;
    let root = control.root_here(id)?;
    Ok((control, root, id))
}

/// A write in place is held back below the format; its cluster is discarded, and everything is flushed and
/// written to; then the write goes on.
async fn write_discard_and_reuse(context: Rc<IoContext>, image: String) -> Result<(), String> {
    let opened = open(&context, &image).await;
    let (control, root, id) = opened.map_err(|error| error.report())?;
    write(&root, 0, 1).await;
    root.flush().await.expect("it can be flushed");
    control
        .suspend_at("disk", "pwritev", "held")
        .expect("there is a debug node");
    let (done, ended) = oneshot::channel();
    let writer = Rc::clone(&root);
    context.spawn(async move {
        write(&writer, 0, 2).await;
        let _ = done.send(());
    });
    while !control.is_suspended("disk", "held").expect("it is there") {
        context.delay(Duration::from_micros(100)).await;
    }
    root.discard(0, CLUSTER).await.expect("it can be discarded");
    root.flush().await.expect("it can be flushed");
    context.delay(Duration::from_millis(20)).await;
    for cluster in 1..CLUSTERS {
        write(&root, cluster, 10 + cluster as u32).await;
    }
    control.resume("disk", "held").expect("it is held");
    ended.await.expect("the write ends");
    let held = read(&root, 0).await;
    if ![0, 2]
        .iter()
        .any(|tag| held == history::data(*tag, 0, CLUSTER))
    {
        return Err("the write that was held is neither there nor gone".into());
    }
    for cluster in 1..CLUSTERS {
        if read(&root, cluster).await != history::data(10 + cluster as u32, 0, CLUSTER) {
            return Err(format!("cluster {cluster} is not what was written to it"));
        }
    }
    drop(root);
    let closed = async {
        control.remove_root(id).await?;
        control.remove("disk").await
    };
    closed.await.map_err(|error| error.report())
}

/// A simulated host with an image, called `/image`.
fn simulation(seed: u64) -> Simulation {
    let images = Images::new();
    let image = images.path("image");
    make_image(&image);
    let simulation = Simulation::new(seed);
    let bytes = std::fs::read(image).expect("just made");
    simulation.load_file("/image", FileProperties::default(), &bytes);
    simulation
}

fn write_discard_and_reuse_simulated(seed: u64) -> Result<(), String> {
    let simulation = simulation(seed);
    let worker = simulation.worker();
    let race = write_discard_and_reuse(Rc::clone(worker.context()), "/image".into());
    let run = simulation.run(&worker, LIMIT, race);
    run.map_err(|stuck| stuck.to_string())?
}

#[test]
fn a_write_that_is_under_way_reaches_nobody_elses_cluster() {
    for seed in 1..=20 {
        let raced = write_discard_and_reuse_simulated(seed);
        assert_eq!(raced, Ok(()), "seed {seed}");
    }
}

#[cfg(feature = "planted-faults")]
#[test]
fn a_write_that_is_under_way_reaches_somebody_elses_cluster_where_nobody_waits_for_it() {
    use blockcore::fault::{Fault, plant};

    plant(Some(Fault::NoWaitForUsers));
    let raced = write_discard_and_reuse_simulated(1);
    plant(None);
    assert!(raced.is_err_and(|why| why.contains("is not what was written to it")));
}

#[test]
fn a_write_that_is_under_way_reaches_nobody_elses_cluster_on_this_host() {
    for engine in [EngineChoice::Auto, EngineChoice::Threads] {
        let images = Images::new();
        let image = images.path("image");
        make_image(&image);
        let context = IoContext::new(make(engine).expect("an engine"));
        let inner = Rc::clone(&context);
        let filename = image.to_str().unwrap().to_owned();
        let raced = context.block_on(async move { write_discard_and_reuse(inner, filename).await });
        assert_eq!(raced, Ok(()), "{engine:?}");
        assert_clean(&image, "after the race");
    }
}

/// A compressed cluster has been let go of; while what is left of its host cluster is given back to the
/// host, nothing may be packed behind it.
#[test]
fn compressed_data_is_not_given_back_with_what_it_was_put_behind() {
    for seed in 1..=60 {
        let simulation = simulation(seed);
        let worker = simulation.worker();
        let context = Rc::clone(worker.context());
        let mut random = Random::new(seed);
        let race = async move {
            let (_control, root, _) = open(&context, "/image").await.expect("an image");
            for round in 0..10 {
                write_compressed(&root, 0, 1).await;
                root.discard(0, CLUSTER).await.expect("it can be discarded");
                let flusher = Rc::clone(&root);
                context.spawn(async move { flusher.flush().await.expect("it can be flushed") });
                let wait = Duration::from_micros(random.below(2000));
                context.delay(wait).await;
                write_compressed(&root, 1, 2 + round).await;
                context.delay(Duration::from_millis(50)).await;
                let expected = history::data((2 + round) | history::COMPRESSIBLE, 0, CLUSTER);
                if read(&root, 1).await != expected {
                    return Err(format!("in round {round}"));
                }
            }
            Ok(())
        };
        let raced = simulation.run(&worker, LIMIT, race);
        let raced = raced.unwrap_or_else(|stuck| panic!("{stuck}"));
        assert_eq!(raced, Ok(()), "seed {seed}");
    }
}

/// Several threads serve one image, each with clusters of its own, which lie between the others'.
#[test]
fn workers_on_threads_of_their_own_find_what_they_wrote_and_leave_a_clean_image() {
    const WORKERS: u64 = 3;
    let images = Images::new();
    let image = images.path("image");
    make_image(&image);
    let context = IoContext::new(make(EngineChoice::Auto).expect("an engine"));
    let filename = image.to_str().unwrap().to_owned();
    let inner = Rc::clone(&context);
    let (control, root, id) = context
        .block_on(async move { open(&inner, &filename).await })
        .unwrap_or_else(|error| panic!("{}", error.report()));
    drop(root);
    let (ready, handles) = mpsc::channel();
    let (over, ends) = mpsc::channel();
    let (leave, _) = &*Box::leak(Box::new((std::sync::atomic::AtomicBool::new(false), ())));
    let threads = (0..WORKERS).map(|number| {
        let (ready, over) = (ready.clone(), over.clone());
        thread::spawn(move || {
            let context = IoContext::new(make(EngineChoice::Auto).expect("an engine"));
            ready
                .send(context.handle().clone())
                .expect("it is waited for");
            let inner = Rc::clone(&context);
            context.block_on(async move {
                let root = loop {
                    match inner.root(id) {
                        Some(root) => break root,
                        None => inner.delay(Duration::from_millis(1)).await,
                    }
                };
                write_and_read(&root, number, WORKERS).await;
                drop(root);
                over.send(()).expect("it is waited for");
                while !leave.load(std::sync::atomic::Ordering::Acquire) {
                    inner.delay(Duration::from_millis(1)).await;
                }
            });
        })
    });
    let threads: Vec<_> = threads.collect();
    let inner = Rc::clone(&context);
    context.block_on(async move {
        for _ in 0..WORKERS {
            let handle = handles.recv().expect("it comes");
            let attached = control.attach(id, &handle).await;
            attached.unwrap_or_else(|error| panic!("{}", error.report()));
        }
        for _ in 0..WORKERS {
            while ends.try_recv().is_err() {
                inner.delay(Duration::from_millis(1)).await;
            }
        }
        control.remove_root(id).await.expect("nobody objects");
        control.remove("disk").await.expect("it can be closed");
    });
    leave.store(true, std::sync::atomic::Ordering::Release);
    for thread in threads {
        thread.join().expect("nobody panics");
    }
    assert_clean(&image, "after all");
}

/// Requests to every `step`th cluster from `first` on, which nobody else asks for.
async fn write_and_read(root: &Rc<Root>, first: u64, step: u64) {
    let mut random = Random::new(first + 1);
    let mut tags = vec![0; CLUSTERS as usize];
    for tag in 1..1500 {
        let cluster = first + random.below((CLUSTERS - first).div_ceil(step)) * step;
        let (offset, tags) = (cluster * CLUSTER, &mut tags[cluster as usize]);
        match random.below(16) {
            0..6 => {
                write(root, cluster, tag).await;
                *tags = tag;
            }
            6 => {
                write_compressed(root, cluster, tag).await;
                *tags = tag | history::COMPRESSIBLE;
            }
            7..9 => {
                let zeroed = root.write_zeroes(offset, CLUSTER, ZeroFlags::MAY_UNMAP);
                zeroed.await.expect("it can be zeroed");
                *tags = 0;
            }
            9..12 => {
                root.discard(offset, CLUSTER)
                    .await
                    .expect("it can be discarded");
                *tags = 0;
            }
            12 => root.flush().await.expect("it can be flushed"),
            _ => {
                let expected = history::data(*tags, 0, CLUSTER);
                assert!(read(root, cluster).await == expected, "cluster {cluster}");
            }
        }
    }
}
