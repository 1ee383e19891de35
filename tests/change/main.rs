//! Changes of the graph as an operator asks for them: names and chains of images, lengths, handing over.
//! On real files, on this thread.

mod handover;
mod names;
mod requests;
mod resize;

use std::rc::Rc;

use blockcore::Error;
use blockcore::driver::WriteFlags;
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::{Control, Graph, NodeId, RootSpec};
use blockcore::io::IoContext;
use blockcore::io::buffer::Segments;
use blockcore::options::Options;
use harness::daemon::Place;
use harness::overlay;

/// A graph, and a folder for its images.
struct Host {
    place: Place,
    control: Control,
}

impl Host {
    fn new() -> Self {
        let engine = make(EngineChoice::Threads).expect("every host has threads");
        let context = IoContext::new(engine);
        Self {
            place: Place::new(),
            control: Control::new(Graph::new(overlay::drivers()), context),
        }
    }

    fn run<T: 'static, W: Future<Output = T> + 'static>(
        &self,
        work: impl FnOnce(Control) -> W,
    ) -> T {
        self.control.context().block_on(work(self.control.clone()))
    }

    /// Options as an operator writes them; `PLACE` stands for the folder.
    fn options(&self, text: &str) -> Options {
        let text = text.replace("PLACE", &self.path(""));
        Options::parse(&text, Some("driver")).expect("well-formed")
    }

    fn path(&self, name: &str) -> String {
        let path = self.place.join(name);
        let path = path.to_str().expect("text");
        path.trim_end_matches('/').to_owned()
    }

    fn try_add(&self, text: &str) -> Result<NodeId, Error> {
        let options = self.options(text);
        self.run(|control| async move { control.add(options).await })
    }

    fn add(&self, text: &str) -> NodeId {
        self.try_add(text)
            .unwrap_or_else(|error| panic!("{text}: {}", error.report()))
    }

    fn remove(&self, name: &'static str) {
        let removed = self.run(move |control| async move { control.remove(name).await });
        removed.expect("nobody uses it");
    }

    /// Makes an overlay image of 256 KiB above another, whose name its header records.
    fn make_overlay(&self, file: &str, backing: &str, format: Option<&str>) {
        self.place.sparse(file, 0);
        let options =
            format!("overlay,node-name=new,file.driver=file,file.filename=PLACE/{file},size=256k");
        let node = self.add(&options);
        let name = blockcore::driver::BackingName {
            name: backing.to_owned(),
            format: format.map(str::to_owned),
        };
        let changed = self
            .run(move |control| async move { control.change_backing_name(node, Some(name)).await });
        changed.expect("the header has room");
        self.remove("new");
    }

    fn name_of(&self, node: NodeId) -> String {
        self.control.read(|graph| graph.described(node).name())
    }

    fn write(
        &self,
        node: &'static str,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), blockcore::IoError> {
        let from = Segments::allocate(bytes.len(), 512);
        from.copy_from(bytes);
        self.run(move |control| async move {
            let id = control.add_root(node, RootSpec::writer("a test")).await;
            let id = id.expect("nobody else uses it");
            let root = control.root_here(id).expect("just added");
            let written = root.write(offset, from, WriteFlags::empty()).await;
            drop(root);
            control.remove_root(id).await.expect("it is there");
            written
        })
    }

    fn read(&self, node: &'static str, offset: u64, bytes: usize) -> Vec<u8> {
        let into = Segments::allocate(bytes, 512);
        let given = into.clone();
        self.run(move |control| async move {
            let id = control.add_root(node, RootSpec::reader("a test")).await;
            let id = id.expect("nobody writes to it");
            let root = control.root_here(id).expect("just added");
            root.read(offset, given).await.expect("it can be read");
            drop(root);
            control.remove_root(id).await.expect("it is there");
        });
        into.to_vec()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let context = Rc::clone(self.control.context());
        let control = self.control.clone();
        let closed = context.block_on(async move { control.close_all().await });
        context.abandon();
        if !std::thread::panicking() {
            closed.expect("everything can be closed");
        }
    }
}
