//! Reading an image that nobody has open, on a host of its own.

use blockcore::Error;
use blockcore::engine::sim::{Faults, FileProperties, Simulation};
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::buffer::Segments;
use blockcore::options::Options;
use std::rc::Rc;

use super::case::{Case, Files};
use super::{LIMIT, path};

/// All that the disk holds.
pub(crate) fn whole(case: &Case, files: &Files) -> Result<Vec<u8>, String> {
    let simulation = Simulation::new(1);
    simulation.set_faults(Faults {
        split_permille: 0,
        preempt_permille: 0,
        latency_us: (0, 0),
        slow_permille: 0,
        ..Faults::default()
    });
    for (name, bytes) in files {
        simulation.load_file(path(name), FileProperties::default(), bytes);
    }
    let worker = simulation.worker();
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(worker.context()));
    let options = case.options("read-only=on");
    let asking = control.clone();
    let read = simulation.run(&worker, LIMIT, async move {
        let control = asking;
        control.add(Options::parse(&options, None)?).await?;
        let id = control.add_root("disk", RootSpec::reader("a look")).await?;
        let root = control.root_here(id)?;
        let into = Segments::allocate(root.bytes() as usize, 4096);
        let read = root.read(0, into.clone()).await;
        Ok::<_, Error>((read, into.to_vec()))
    });
    let read = read.map_err(|stuck| stuck.to_string())?;
    let (read, contents) =
        read.map_err(|error| format!("an image cannot be opened: {}", error.report()))?;
    read.map_err(|error| {
        let notices = control.take_notices();
        format!("an image cannot be read: {error}; {notices:?}")
    })?;
    Ok(contents)
}
