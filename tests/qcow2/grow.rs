//! Images that grow.

use std::rc::Rc;
use std::time::Duration;

use blockcore::driver::Preallocation;
use blockcore::engine::sim::{FileProperties, Simulation};
use blockcore::graph::{Control, Graph};
use blockcore::options::Options;

use crate::setup::{Images, qemu};

/// Simulated time after which a test is stuck.
const LIMIT: Duration = Duration::from_secs(60);

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
