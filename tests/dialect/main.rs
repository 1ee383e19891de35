//! QEMU's dialect of options: what is opened, and what is refused, is the same as by `qemu-storage-daemon`.
//!
//! `cases.txt` has values of `--blockdev` that somebody thought of; [`made`] makes others from a seed, half of
//! them with a mistake. What both open is compared node by node.

mod made;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use backend::cli::node_options;
use backend::config::ProcessConfig;
use backend::daemon::Daemon;
use blockcore::driver::DetectZeroes;
use blockcore::engine::EngineChoice;
use harness::seeds;
use serde_json::Value;

/// Cases made when nothing is said.
const DEFAULT_SEEDS: u64 = 200;

/// A node, as both can describe it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct NodeView {
    /// `#` for a name that nobody gave.
    name: String,
    driver: String,
    read_only: bool,
    detect_zeroes: String,
    direct: bool,
    no_flush: bool,
    bytes: u64,
}

/// The nodes that there are then, or what was said instead.
type Outcome = Result<BTreeSet<NodeView>, String>;

fn shown(name: &str) -> String {
    match name.starts_with('#') {
        true => "#".to_owned(),
        false => name.to_owned(),
    }
}

fn ours(value: &str) -> Outcome {
    let process = ProcessConfig {
        engine: EngineChoice::Threads,
        ..ProcessConfig::default()
    };
    let daemon = Daemon::new(process, formats::drivers()).expect("the engine is there");
    let opened = daemon
        .control()
        .read(|graph| node_options(value, graph))
        .and_then(|options| {
            daemon.block_on(|daemon| async move { daemon.add_node(options).await })
        });
    let nodes = daemon.control().read(|graph| {
        let views = graph.nodes().map(|node| {
            let modes = graph.modes(node.id());
            NodeView {
                name: shown(node.name()),
                driver: node.driver_type().name.to_owned(),
                read_only: modes.read_only,
                detect_zeroes: match modes.detect_zeroes {
                    DetectZeroes::Off => "off",
                    DetectZeroes::On => "on",
                    DetectZeroes::Unmap => "unmap",
                }
                .to_owned(),
                direct: modes.direct,
                no_flush: modes.no_flush,
                // QEMU counts sectors.
                bytes: node.bytes().next_multiple_of(512),
            }
        });
        views.collect::<BTreeSet<_>>()
    });
    // A rule of blkdebug may have it fail.
    drop(daemon.stop());
    match opened {
        Ok(()) => Ok(nodes),
        Err(error) => {
            assert!(nodes.is_empty(), "{value}: {error}, and {nodes:?} are left");
            Err(error.report())
        }
    }
}

fn of_qemu(value: &str) -> Outcome {
    let mut child = Command::new("qemu-storage-daemon")
        .args(["--blockdev", value])
        .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-storage-daemon is installed");
    let mut input = child.stdin.take().expect("it is a pipe");
    // It may have ended already.
    let _ = input.write_all(
        br#"{"execute":"qmp_capabilities"}{"execute":"query-named-block-nodes"}{"execute":"quit"}"#,
    );
    let output = child.wait_with_output().expect("it ends");
    drop(input);
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    let lines = String::from_utf8(output.stdout).expect("it prints UTF-8");
    let replies = lines.lines().map(serde_json::from_str::<Value>);
    let replies: Vec<_> = replies.collect::<Result<_, _>>().expect("each is JSON");
    let mut lists = replies
        .iter()
        .filter_map(|reply| reply["return"].as_array());
    let list = lists.next().expect("it lists its nodes");
    let views = list.iter().map(|node| NodeView {
        name: shown(node["node-name"].as_str().expect("a name")),
        driver: node["drv"].as_str().expect("a driver").to_owned(),
        read_only: node["ro"].as_bool().expect("a flag"),
        detect_zeroes: node["detect_zeroes"].as_str().expect("a word").to_owned(),
        direct: node["cache"]["direct"].as_bool().expect("a flag"),
        no_flush: node["cache"]["no-flush"].as_bool().expect("a flag"),
        bytes: node["image"]["virtual-size"].as_u64().expect("a number"),
    });
    Ok(views.collect())
}

/// A directory with the images that cases name.
fn images() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("there is room for tests");
    let path = directory.path();
    fs::write(path.join("a.raw"), vec![0; 1 << 20]).expect("there is room for tests");
    let create = |arguments: &[&str]| {
        let created = Command::new("qemu-img")
            .current_dir(path)
            .args(["create", "-q", "-f", "qcow2"])
            .args(arguments)
            .status();
        assert!(created.expect("qemu-img is installed").success());
    };
    create(&["a.qcow2", "1M"]);
    create(&["-b", "a.qcow2", "-F", "qcow2", "b.qcow2"]);
    directory
}

/// Whether both do the same with a value: what differs, if not.
fn compare(directory: &Path, case: &str) -> Result<bool, String> {
    let value = case.replace("DIR", directory.to_str().expect("a path of ours"));
    let (ours, theirs) = (ours(&value), of_qemu(&value));
    match (&ours, &theirs) {
        (Ok(ours), Ok(theirs)) if ours == theirs => Ok(true),
        (Err(_), Err(_)) => Ok(false),
        _ => Err(format!("{value}\n  ours: {ours:?}\n  QEMU: {theirs:?}")),
    }
}

#[test]
fn values_of_blockdev_open_and_are_refused_as_by_qemu() {
    let images = images();
    let cases = include_str!("cases.txt").lines();
    let cases: Vec<_> = cases
        .filter(|case| !case.is_empty() && !case.starts_with('#'))
        .collect();
    let compared: Vec<_> = cases
        .iter()
        .map(|case| compare(images.path(), case))
        .collect();
    let differing: Vec<_> = compared
        .iter()
        .filter_map(|one| one.as_ref().err())
        .collect();
    for difference in &differing {
        eprintln!("{difference}");
    }
    assert!(
        differing.is_empty(),
        "{} of {} differ",
        differing.len(),
        cases.len()
    );
    let opened = compared.iter().filter(|one| **one == Ok(true)).count();
    assert!(
        opened > 100 && cases.len() - opened > 200,
        "{opened} of {}",
        cases.len()
    );
}

#[derive(Debug, Default)]
struct Totals {
    opened: u64,
    refused: u64,
}

#[test]
fn values_that_are_made_open_and_are_refused_as_by_qemu() {
    let images = images();
    let totals = seeds::try_all(DEFAULT_SEEDS, |seed, totals: &mut Totals| {
        let case = made::case(seed);
        seeds::replayable(seed, &case, |case| {
            match compare(images.path(), case)? {
                true => totals.opened += 1,
                false => totals.refused += 1,
            }
            Ok(())
        });
    });
    if let Some(totals) = totals {
        let least = totals.opened.min(totals.refused);
        assert!(least > DEFAULT_SEEDS / 5, "{totals:?}");
    }
}
