//! Images of format `qcow2` as files: made, and checked and repaired, compared with what QEMU's tools say
//! of them.

mod check;
mod corpus;
mod crash;
mod create;
mod hostile;
mod random;

use std::path::Path;
use std::process::{Command, Output};
use std::rc::Rc;

use blockcore::engine::{EngineChoice, make};
use blockcore::graph::permission::Permissions;
use blockcore::graph::{Control, Graph, RootSpec};
use blockcore::io::{IoContext, Root};
use blockcore::options::Options;
use blockcore::{Error, ErrorKind};
use harness::daemon::Place;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Runs `qemu-img` in a folder.
fn qemu_img(place: &Place, args: &[&str]) -> Output {
    tool("qemu-img", place, args)
}

fn tool(name: &str, place: &Place, args: &[&str]) -> Output {
    let mut command = Command::new(name);
    command.args(args).current_dir(place.path());
    let output = command.output();
    output.unwrap_or_else(|error| panic!("{name} does not start: {error}"))
}

/// As [`tool`], for what must succeed; its standard output.
fn must(name: &str, place: &Place, args: &[&str]) -> String {
    let output = tool(name, place, args);
    assert!(output.status.success(), "{name} {args:?}: {output:?}");
    String::from_utf8(output.stdout).expect("it prints text")
}

/// What `qemu-img VERB --output=json` says of an image.
fn json(place: &Place, verb: &str, image: &str) -> Value {
    let output = qemu_img(place, &[verb, "--output=json", "-f", "qcow2", image]);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{verb} {image}: {error}: {output:?}"))
}

/// Does something to a file of a folder through a node that may write and resize.
fn on_file<T, W>(path: &Path, work: impl FnOnce(Rc<Root>) -> W) -> T
where
    T: 'static,
    W: Future<Output = T> + 'static,
{
    let file = format!("driver=file,filename={},locking=off", path.display());
    on_node(&file, work)
}

/// As [`on_file`], with any node.
fn on_node<T, W>(options: &str, work: impl FnOnce(Rc<Root>) -> W) -> T
where
    T: 'static,
    W: Future<Output = T> + 'static,
{
    let context = IoContext::new(make(EngineChoice::Threads).expect("threads are everywhere"));
    let control = Control::new(Graph::new(formats::drivers()), Rc::clone(&context));
    let options = Options::parse(&format!("{options},node-name=file"), None);
    let options = options.expect("they are options");
    let inner = control.clone();
    let id = context.block_on(async move {
        inner.add(options).await.expect("the file is there");
        let spec = RootSpec {
            needs: Permissions::all(),
            ..RootSpec::writer("a test")
        };
        inner.add_root("file", spec).await.expect("nobody else is")
    });
    let root = control.root_here(id).expect("it was just made");
    let done = context.block_on(work(Rc::clone(&root)));
    drop(root);
    context.block_on(async move {
        control.remove_root(id).await.expect("it is there");
        control.remove("file").await.expect("it is there");
    });
    context.abandon();
    done
}
