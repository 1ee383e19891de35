//! What needs backing images, in this process, with the harness's small format `overlay`.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::PoisonError;

use backend::cli::{Cli, Command};
use backend::img;
use backend::serve::Probe;
use clap::Parser;
use harness::overlay;
use harness::random::Random;
use serde_json::Value;
use tempfile::TempDir;

use super::{FORKS, Pattern, path};

/// Clusters of the harness's format.
const CLUSTER_BYTES: u64 = 65536;

/// A directory, with the verbs in it.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("there is room for files"))
    }

    fn path(&self, name: &str) -> String {
        let path = path(&self.0, name);
        path.into_os_string()
            .into_string()
            .expect("temporary names are text")
    }

    /// Runs a verb; words that begin with `@` are names in the directory.
    fn run(&self, args: &[&str]) -> (u8, String) {
        let words: Vec<String> = args
            .iter()
            .map(|word| match word.strip_prefix('@') {
                Some(name) => self.path(name),
                None => (*word).to_owned(),
            })
            .collect();
        let line = ["stonework", "img"].into_iter().map(str::to_owned);
        let cli = Cli::try_parse_from(line.chain(words.iter().cloned()));
        let cli = cli.unwrap_or_else(|error| panic!("{args:?}: {error}"));
        let Command::Img(parsed) = cli.command else {
            unreachable!("the command line says img");
        };
        let probe = Probe {
            bytes: formats::probe::BYTES,
            seems: formats::probe::seems,
        };
        let _no_children = FORKS.read().unwrap_or_else(PoisonError::into_inner);
        let output = Rc::new(RefCell::new(Vec::new()));
        let status = img::run(parsed, words, overlay::drivers(), probe, output.clone());
        let output = String::from_utf8(output.take()).expect("what is printed is text");
        (status, output)
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> String {
        let (status, output) = self.run(args);
        assert_eq!(status, 0, "{args:?}: {output}");
        output
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let output = self.done(args);
        serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"))
    }

    fn raw(&self, name: &str, pattern: &Pattern) {
        pattern.write(Path::new(&self.path(name)));
    }

    /// What a guest would read.
    #[track_caller]
    fn content(&self, name: &str) -> Vec<u8> {
        let (image, copy) = (format!("@{name}"), format!("@{name}.content"));
        self.done(&["convert", "-f", "overlay", "-O", "raw", &image, &copy]);
        let bytes = fs::read(self.path(&format!("{name}.content")));
        bytes.expect("it was just made")
    }

    /// Writes clusters of a raw image into an overlay's own layer.
    #[track_caller]
    fn write(&self, name: &str, pattern: &Pattern) {
        let image = format!("@{name}");
        self.raw("written", pattern);
        // Rebasing from what it holds to nothing writes it, and back again only says so.
        for step in [
            &[
                "rebase", "-u", "-f", "overlay", "-F", "raw", "-b", "written", &image,
            ][..],
            &["rebase", "-f", "overlay", "-b", "", &image],
        ] {
            self.done(step);
        }
    }
}

fn data(offset: u64, bytes: u64, value: u8) -> (u64, Vec<u8>) {
    (offset, vec![value; bytes as usize])
}

fn pattern(bytes: u64, data: Vec<(u64, Vec<u8>)>) -> Pattern {
    Pattern { bytes, data }
}

/// `top` on `mid` on `base`, each with data of its own; `base` is shorter.
fn chain() -> Images {
    let images = Images::new();
    let whole = 16 * CLUSTER_BYTES;
    images.raw(
        "base.raw",
        &pattern(8 * CLUSTER_BYTES, vec![data(0, 6 * CLUSTER_BYTES, 1)]),
    );
    for (name, below, format, first, value) in [
        ("mid", "base.raw", "raw", 1, 2),
        ("top", "mid", "overlay", 3, 3),
    ] {
        let (size, image) = (whole.to_string(), format!("@{name}"));
        images.done(&["create", "-q", "-f", "overlay", &image, &size]);
        let mine = data(first * CLUSTER_BYTES, 2 * CLUSTER_BYTES, value);
        images.write(name, &pattern(whole, vec![mine]));
        images.done(&[
            "rebase", "-u", "-f", "overlay", "-b", below, "-F", format, &image,
        ]);
    }
    images
}

/// What is read through the whole of [`chain`].
fn seen() -> Vec<u8> {
    let clusters = [1, 2, 2, 3, 3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let bytes = clusters.map(|value| vec![value; CLUSTER_BYTES as usize]);
    bytes.concat()
}

#[test]
fn an_image_on_a_backing_image_has_its_length_and_reads_what_it_has() {
    let images = Images::new();
    images.raw(
        "base.raw",
        &pattern(3 * CLUSTER_BYTES, vec![data(1000, 5000, 7)]),
    );
    let said = images.done(&[
        "create", "-f", "overlay", "-b", "base.raw", "-F", "raw", "@top",
    ]);
    assert!(
        said.contains(
            "fmt=overlay size=196608 cluster_size=65536 backing_file=base.raw backing_fmt=raw"
        ),
        "{said}"
    );
    assert!(images.content("top") == fs::read(images.path("base.raw")).unwrap());
    for refused in [
        &["create", "-f", "overlay", "-b", "base.raw", "@x"][..],
        &[
            "create",
            "-f",
            "overlay",
            "-b",
            "missing.raw",
            "-F",
            "raw",
            "@x",
        ],
        &["create", "-f", "overlay", "-F", "raw", "@x", "1M"],
        &["create", "-f", "overlay", "@x"],
    ] {
        assert_eq!(images.run(refused).0, 1, "{refused:?}");
        assert!(!Path::new(&images.path("x")).exists(), "{refused:?}");
    }
    images.done(&[
        "create",
        "-u",
        "-f",
        "overlay",
        "-b",
        "missing.raw",
        "-F",
        "raw",
        "@x",
        "1M",
    ]);
}

#[test]
fn a_creation_that_fails_leaves_no_new_file() {
    let images = Images::new();
    let too_long = "1E";
    assert_eq!(
        images.run(&["create", "-f", "overlay", "@x", too_long]).0,
        1
    );
    assert!(!Path::new(&images.path("x")).exists());
}

#[test]
fn info_walks_the_chain() {
    let images = chain();
    let info = images.json(&["info", "--output=json", "--backing-chain", "@top"]);
    let formats: Vec<_> = info
        .as_array()
        .unwrap()
        .iter()
        .map(|info| &info["format"])
        .collect();
    assert_eq!(formats, ["overlay", "overlay", "raw"]);
    assert_eq!(info[0]["backing-filename"], "mid");
    assert_eq!(info[0]["full-backing-filename"], images.path("mid"));
    assert_eq!(info[1]["backing-filename-format"], "raw");
    assert_eq!(info[0]["cluster-size"], CLUSTER_BYTES);
    assert_eq!(info[2]["virtual-size"], 8 * CLUSTER_BYTES);
    // One image alone is not looked for elsewhere.
    fs::remove_file(images.path("base.raw")).unwrap();
    let text = images.done(&["info", "@mid"]);
    assert!(
        text.contains("backing file: base.raw (actual path: /"),
        "{text}"
    );
    assert_eq!(images.run(&["info", "--backing-chain", "@mid"]).0, 1);
}

#[test]
fn map_says_which_layer_decides() {
    let images = chain();
    let map = images.json(&["map", "--output=json", "@top"]);
    let cluster = CLUSTER_BYTES;
    let entries: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            let number = |name: &str| entry[name].as_u64().unwrap() / cluster;
            (
                number("start"),
                number("length"),
                entry["depth"].as_u64().unwrap(),
                entry["data"] == true,
            )
        })
        .collect();
    assert_eq!(
        entries,
        [
            (0, 1, 2, true),
            (1, 2, 1, true),
            (3, 2, 0, true),
            (5, 1, 2, true),
            (6, 2, 2, false),
            (8, 8, 1, false),
        ]
    );
    assert_eq!(map[5]["present"], false);
    let text = images.done(&["map", "@top"]);
    for name in ["top", "mid", "base.raw"] {
        assert!(text.contains(&images.path(name)), "{text}");
    }
}

#[test]
fn a_chain_is_converted_to_one_image_and_compares_equal() {
    let images = chain();
    assert!(images.content("top") == seen());
    images.done(&["convert", "-f", "overlay", "-O", "overlay", "@top", "@flat"]);
    let info = images.json(&["info", "--output=json", "@flat"]);
    assert_eq!(info.get("backing-filename"), None);
    assert_eq!(
        images.done(&["compare", "@top", "@flat"]),
        "Images are identical.\n"
    );
    let map = images.json(&["map", "--output=json", "@flat"]);
    assert_eq!(map[0]["length"], 6 * CLUSTER_BYTES);
}

#[test]
fn a_converted_overlay_holds_only_its_own_layer() {
    let images = chain();
    images.done(&[
        "convert", "-f", "overlay", "-O", "overlay", "-B", "mid", "-F", "overlay", "@top", "@copy",
    ]);
    let map = images.json(&["map", "--output=json", "@copy"]);
    let own: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["depth"] == 0)
        .collect();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0]["start"], 3 * CLUSTER_BYTES);
    assert!(images.content("copy") == seen());
}

#[test]
fn compressed_clusters_hold_what_was_copied() {
    let mut random = Random::announced("compressed_clusters_hold_what_was_copied");
    let images = Images::new();
    let bytes = 20 * CLUSTER_BYTES - 512;
    images.raw("a.raw", &Pattern::random(&mut random, bytes));
    images.done(&[
        "convert", "-c", "-f", "raw", "-O", "overlay", "@a.raw", "@small",
    ]);
    assert!(images.content("small") == fs::read(images.path("a.raw")).unwrap());
    let map = images.json(&["map", "--output=json", "@small"]);
    let data = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["data"] == true);
    for entry in data {
        assert_eq!(entry["compressed"], true);
    }
}

#[test]
fn what_a_guest_reads_survives_being_rebased_to_anything() {
    let mut random = Random::announced("rebased_to_anything");
    for round in 0..4 {
        let images = chain();
        let clusters = 1 + random.below(20);
        let other = Pattern::random(&mut random, clusters * CLUSTER_BYTES);
        images.raw("other.raw", &other);
        images.done(&[
            "rebase",
            "-f",
            "overlay",
            "-b",
            "other.raw",
            "-F",
            "raw",
            "@top",
        ]);
        assert!(images.content("top") == seen(), "{round} {other:?}");
        images.done(&[
            "rebase", "-c", "-f", "overlay", "-b", "base.raw", "-F", "raw", "@top",
        ]);
        assert!(images.content("top") == seen(), "{round}");
        images.done(&["rebase", "-f", "overlay", "-b", "", "@top"]);
        for name in ["other.raw", "base.raw", "mid"] {
            fs::remove_file(images.path(name)).unwrap();
        }
        assert!(images.content("top") == seen(), "{round}");
    }
}

#[test]
fn a_rebase_takes_only_what_the_new_backing_image_has_not() {
    let images = chain();
    images.done(&["convert", "-f", "overlay", "-O", "raw", "@mid", "@mid.raw"]);
    images.done(&[
        "rebase", "-f", "overlay", "-b", "mid.raw", "-F", "raw", "@top",
    ]);
    let map = images.json(&["map", "--output=json", "@top"]);
    let own: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["depth"] == 0)
        .collect();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0]["length"], 2 * CLUSTER_BYTES);
}

#[test]
fn an_unsafe_rebase_needs_no_images_and_changes_what_is_read() {
    let images = chain();
    for name in ["mid", "base.raw"] {
        fs::remove_file(images.path(name)).unwrap();
    }
    images.done(&["rebase", "-u", "-f", "overlay", "-b", "", "@top"]);
    let content = images.content("top");
    assert!(
        content[..3 * CLUSTER_BYTES as usize]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(
        images
            .run(&["rebase", "-u", "-f", "overlay", "-b", "x", "@top"])
            .0,
        1
    );
}

#[test]
fn a_committed_image_is_empty_and_its_backing_image_has_its_data() {
    let images = chain();
    let said = images.done(&["commit", "-f", "overlay", "@top"]);
    assert_eq!(said, "Image committed.\n");
    assert!(images.content("mid") == seen());
    assert!(images.content("top") == seen());
    let map = images.json(&["map", "--output=json", "@top"]);
    assert!(
        map.as_array()
            .unwrap()
            .iter()
            .all(|entry| entry["depth"] != 0)
    );
    // Once more, into an image that is too short.
    images.done(&["commit", "-q", "-d", "-f", "overlay", "@mid"]);
    assert!(fs::read(images.path("base.raw")).unwrap() == seen());
    assert!(images.content("mid") == seen());
}

#[test]
fn a_commit_to_a_lower_image_leaves_the_top_as_it_is() {
    let images = chain();
    let before = images.json(&["map", "--output=json", "@top"]);
    assert_eq!(
        images
            .run(&["commit", "-f", "overlay", "-b", "other.raw", "@top"])
            .0,
        1
    );
    images.done(&["commit", "-f", "overlay", "-b", "base.raw", "@top"]);
    assert!(fs::read(images.path("base.raw")).unwrap() == seen());
    assert!(images.content("top") == seen());
    let after = images.json(&["map", "--output=json", "@top"]);
    assert_eq!(before[1], after[1]);
    assert_eq!(images.run(&["commit", "-f", "raw", "@base.raw"]).0, 1);
}

#[test]
fn a_format_is_found_out_for_looking_and_not_for_writing() {
    let images = chain();
    let info = images.json(&["info", "--output=json", "@top"]);
    assert_eq!(info["format"], "overlay");
    for refused in [
        &["resize", "@top", "2M"][..],
        &["convert", "@top", "@x"],
        &["commit", "@top"],
        &["rebase", "-u", "-b", "", "@top"],
    ] {
        assert_eq!(images.run(refused).0, 1, "{refused:?}");
    }
}
