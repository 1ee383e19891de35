//! Images that grow.

use std::rc::Rc;
use std::time::Duration;

use blockcore::IoError;
use blockcore::driver::{Preallocation, WriteFlags};
use blockcore::engine::sim::{FileProperties, Simulation};
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::IoContext;
use blockcore::io::buffer::Segments;
use blockcore::options::Options;

use crate::setup::{Images, assert_clean, qemu};
use crate::world::{self, World};

/// Simulated time after which a test is stuck.
const LIMIT: Duration = Duration::from_secs(60);

/// The last cluster's parts behind the disk's end are not known to be zero.
#[test]
fn what_is_preallocated_up_to_the_middle_of_a_cluster_leaks_nothing() {
    let images = Images::new();
    let image = images.path("image");
    let path = image.to_str().unwrap();
    let options = "cluster_size=16k,extended_l2=on";
    qemu(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", options, path, "64k"],
    );
    let context = IoContext::new(make(EngineChoice::Auto).expect("an engine"));
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
    let options = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={path}");
    let grown = context.block_on(async move {
        control.add(Options::parse(&options, None)?).await?;
        let (bytes, how) = ((100 << 10) + 512, Preallocation::Metadata);
        control.resize("disk", bytes, how).await?;
        control.remove("disk").await
    });
    grown.unwrap_or_else(|error| panic!("{}", error.report()));
    assert_clean(&image, "after it has grown");
}

#[test]
fn a_full_image_grows_whose_refcount_blocks_are_not_all_in_memory() {
    let images = Images::new();
    let image = images.path("image");
    let options = "cluster_size=512,refcount_bits=64,preallocation=metadata";
    let path = image.to_str().unwrap();
    // Each block counts 32 KiB, and four are kept.
    qemu(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", options, path, "320k"],
    );
    let simulation = Simulation::new(1);
    let bytes = std::fs::read(image).expect("just made");
    simulation.load_file("/image", FileProperties::default(), &bytes);
    let worker = simulation.worker();
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(worker.context()));
    let grown = simulation.run(&worker, LIMIT, async move {
        let options = "driver=qcow2,node-name=disk,file.driver=file,file.filename=/image";
        control.add(Options::parse(options, None)?).await?;
        control.resize("disk", 640 << 10, Preallocation::Off).await
    });
    let grown = grown.unwrap_or_else(|stuck| panic!("{stuck}"));
    grown.unwrap_or_else(|error| panic!("{}", error.report()));
}

/// Nobody asks for a flush, and all tables fit in memory.
#[test]
fn first_writes_scattered_over_a_disk_are_not_written_back_one_table_after_the_other() {
    const CLUSTER: u64 = 4096;
    const WRITES: u64 = 400;
    let images = Images::new();
    let image = images.path("image");
    let path = image.to_str().unwrap();
    let create = ["create", "-f", "qcow2", "-o", "cluster_size=4k", path, "1G"];
    qemu("qemu-img", &create);
    let bytes = std::fs::read(image).expect("just made");
    let world = World::opened(1, &bytes);
    let written = world.run(|control| async move {
        let id = control.add_root("disk", RootSpec::writer("a guest")).await;
        let root = control
            .root_here(id.expect("it is free"))
            .expect("just made");
        // Each below a table of its own: most of the 512 tables that there are.
        for table in 0..WRITES {
            let from = Segments::allocate(512, 512);
            from.fill(7);
            let offset = table * (CLUSTER / 8) * CLUSTER;
            root.write(offset, from, WriteFlags::empty()).await?;
        }
        Ok::<_, IoError>(())
    });
    written.expect("nothing fails");
    let unsynced = world.simulation.unsynced(world::PATH);
    let data = unsynced.iter().filter(|(_, bytes)| *bytes == 512);
    assert_eq!(data.count() as u64, WRITES);
}
