//! Persistent bitmaps: the same command lines leave the same bitmaps with the same marks.

use std::fs;
use std::process::Command;

use serde_json::Value;

use super::qcow2::{is_sound, prepare};
use super::{Outcome, Pair};

/// A disk of 10 MiB with two bitmaps, of which one marks.
fn pair() -> Pair {
    let pair = Pair::new();
    for name in ["a.qcow2", "other.qcow2"] {
        prepare(
            &pair,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", name, "10M"],
        );
    }
    for args in [
        &["bitmap", "--add", "a.qcow2", "b0"][..],
        &["bitmap", "--add", "-g", "4k", "other.qcow2", "b0"],
        &[
            "bitmap",
            "--add",
            "--disable",
            "-g",
            "512",
            "other.qcow2",
            "b1",
        ],
    ] {
        prepare(&pair, "qemu-img", args);
    }
    let write = ["-f", "qcow2", "-c", "write 1M 100k", "-c", "write 5M 4k"];
    prepare(&pair, "qemu-io", &[&write[..], &["a.qcow2"]].concat());
    let write = ["-f", "qcow2", "-c", "write 3M 10k", "other.qcow2"];
    prepare(&pair, "qemu-io", &write);
    pair
}

/// The bitmaps of an image, by QEMU's judgement: as it lists them, and what is marked in each that means
/// something.
fn bitmaps(pair: &Pair, index: usize, name: &str) -> Vec<(Value, Vec<u8>)> {
    let directory = pair.directories()[index];
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args);
        Outcome::of(command, directory)
    };
    let info = run("qemu-img", &["info", "--output=json", name]).json();
    let list = info["format-specific"]["data"]["bitmaps"].as_array();
    let list = list.cloned().unwrap_or_default();
    let marks = |bitmap: &Value| {
        let flags = bitmap["flags"].as_array().expect("a list");
        if flags.iter().any(|flag| flag == "in-use") {
            return Vec::new();
        }
        // Merged into one of the finest granularity, its bits can be compared byte by byte.
        fs::copy(directory.join(name), directory.join("look.qcow2")).expect("there is room");
        let source = bitmap["name"].as_str().expect("a text");
        let merge = [
            "bitmap",
            "--add",
            "--merge",
            source,
            "-g",
            "512",
            "look.qcow2",
            "look",
        ];
        run("qemu-img", &merge).expect_success();
        let file = fs::read(directory.join("look.qcow2")).expect("just made");
        bits(&file, "look")
    };
    list.iter()
        .map(|bitmap| (bitmap.clone(), marks(bitmap)))
        .collect()
}

/// A bitmap's bits as they lie in the image.
fn bits(file: &[u8], wanted: &str) -> Vec<u8> {
    let number = |at: usize, bytes: usize| {
        let field = file[at..at + bytes].iter();
        field.fold(0, |number, byte| number << 8 | usize::from(*byte))
    };
    let mut at = number(100, 4);
    while number(at, 4) != 0x2385_2875 {
        at += 8 + number(at + 4, 4).next_multiple_of(8);
    }
    let mut entry = number(at + 24, 8);
    loop {
        let (name_bytes, extra) = (number(entry + 18, 2), number(entry + 20, 4));
        let name = &file[entry + 24 + extra..][..name_bytes];
        if name == wanted.as_bytes() {
            break;
        }
        entry += (24 + extra + name_bytes).next_multiple_of(8);
    }
    let (table, entries) = (number(entry, 8), number(entry + 8, 4));
    let clusters = (0..entries).map(|index| match number(table + 8 * index, 8) {
        0 => vec![0; 65536],
        1 => vec![0xff; 65536],
        place => file[place..place + 65536].to_vec(),
    });
    clusters.flatten().collect()
}

#[track_caller]
fn same_bitmaps(pair: &Pair, name: &str, after: &[&str]) {
    let [ours, theirs] = [0, 1].map(|index| bitmaps(pair, index, name));
    assert_eq!(ours.len(), theirs.len(), "{after:?}: {ours:?} {theirs:?}");
    for (ours, theirs) in ours.into_iter().zip(theirs) {
        assert_eq!(ours.0, theirs.0, "{after:?}");
        assert!(ours.1 == theirs.1, "{after:?}: marks of {} differ", ours.0);
    }
}

#[test]
fn what_is_done_to_bitmaps_is_done_alike() {
    let pair = pair();
    for args in [
        &["bitmap", "--add", "a.qcow2", "b1"][..],
        &["bitmap", "--add", "-g", "512", "--disable", "a.qcow2", "b2"],
        &["bitmap", "--merge", "b0", "a.qcow2", "b2"],
        &[
            "bitmap",
            "--merge",
            "b0",
            "-b",
            "other.qcow2",
            "-F",
            "qcow2",
            "a.qcow2",
            "b1",
        ],
        &["bitmap", "--merge", "b0", "--merge", "b1", "a.qcow2", "b1"],
        &[
            "bitmap",
            "--clear",
            "--merge",
            "b1",
            "--disable",
            "a.qcow2",
            "b0",
        ],
        &["bitmap", "--merge", "b1", "--clear", "a.qcow2", "b2"],
        &[
            "bitmap",
            "--add",
            "--enable",
            "--disable",
            "--merge",
            "b1",
            "a.qcow2",
            "b3",
        ],
        &["bitmap", "--enable", "a.qcow2", "b3"],
        &["bitmap", "--remove", "a.qcow2", "b1"],
        &["bitmap", "--clear", "--remove", "a.qcow2", "b0"],
        &["bitmap", "--remove", "--add", "a.qcow2", "b3"],
        &["bitmap", "--remove", "a.qcow2", "b3"],
        &["bitmap", "--remove", "a.qcow2", "b2"],
        &["bitmap", "--add", "a.qcow2", "last"],
    ] {
        let (verb, rest) = args.split_first().expect("a verb");
        let args = [&[*verb, "-f", "qcow2"], rest].concat();
        assert_eq!(pair.same_status(&args), Some(0), "{args:?}");
        is_sound(&pair, "a.qcow2");
        same_bitmaps(&pair, "a.qcow2", &args);
        pair.same_json(&["info", "--output=json", "-f", "qcow2", "other.qcow2"]);
    }
}

#[test]
fn what_cannot_be_done_to_bitmaps_is_refused_alike() {
    let pair = pair();
    for (file, args) in [
        ("raw.raw", &["create", "-q", "-f", "raw"][..]),
        ("short.qcow2", &["create", "-q", "-f", "qcow2"]),
        (
            "v2.qcow2",
            &["create", "-q", "-f", "qcow2", "-o", "compat=0.10"],
        ),
    ] {
        prepare(&pair, "qemu-img", &[args, &[file, "5M"]].concat());
    }
    prepare(&pair, "qemu-img", &["bitmap", "--add", "short.qcow2", "b0"]);
    let long = "n".repeat(1024);
    for args in [
        &["bitmap", "-f", "qcow2", "--add", "a.qcow2", "b0"][..],
        &["bitmap", "-f", "qcow2", "--add", "a.qcow2", &long],
        &["bitmap", "-f", "qcow2", "--add", "a.qcow2", ""],
        &["bitmap", "-f", "qcow2", "--add", "a.qcow2"],
        &["bitmap", "-f", "qcow2", "a.qcow2", "b0"],
        &[
            "bitmap", "-f", "qcow2", "--add", "-g", "100", "a.qcow2", "b1",
        ],
        &[
            "bitmap", "-f", "qcow2", "--add", "-g", "768", "a.qcow2", "b1",
        ],
        &[
            "bitmap", "-f", "qcow2", "-g", "4k", "--enable", "a.qcow2", "b0",
        ],
        &[
            "bitmap",
            "-f",
            "qcow2",
            "-b",
            "other.qcow2",
            "--enable",
            "a.qcow2",
            "b0",
        ],
        &["bitmap", "-f", "qcow2", "--remove", "a.qcow2", "nosuch"],
        &["bitmap", "-f", "qcow2", "--clear", "a.qcow2", "nosuch"],
        &[
            "bitmap", "-f", "qcow2", "--merge", "nosuch", "a.qcow2", "b0",
        ],
        &[
            "bitmap", "-f", "qcow2", "--merge", "b0", "a.qcow2", "nosuch",
        ],
        &[
            "bitmap",
            "-f",
            "qcow2",
            "--merge",
            "b0",
            "-b",
            "short.qcow2",
            "-F",
            "qcow2",
            "a.qcow2",
            "b0",
        ],
        &[
            "bitmap", "-f", "qcow2", "--merge", "b0", "-b", "missing", "-F", "qcow2", "a.qcow2",
            "b0",
        ],
        &["bitmap", "-f", "qcow2", "--add", "missing.qcow2", "b0"],
        &["bitmap", "-f", "qcow2", "--add", "v2.qcow2", "b0"],
        &["bitmap", "-f", "raw", "--add", "raw.raw", "b0"],
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "--bitmaps",
            "a.qcow2",
            "new.raw",
        ],
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "--bitmaps",
            "raw.raw",
            "new.qcow2",
        ],
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "--skip-broken-bitmaps",
            "a.qcow2",
            "new.qcow2",
        ],
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "--bitmaps",
            "a.qcow2",
            "short.qcow2",
            "new.qcow2",
        ],
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "-o",
            "compat=0.10",
            "--bitmaps",
            "a.qcow2",
            "n.qcow2",
        ],
    ] {
        let status = pair.same_status(args);
        assert_eq!(status, Some(1), "{args:?} is refused");
    }
    is_sound(&pair, "a.qcow2");
    same_bitmaps(&pair, "a.qcow2", &["the refusals"]);
}

#[test]
fn a_copy_has_the_bitmaps_of_its_source_and_leaves_out_those_that_mean_nothing() {
    let pair = pair();
    let convert = ["convert", "-f", "qcow2", "-O", "qcow2", "--bitmaps"];
    let copy = |rest: &[&str]| pair.same_status(&[&convert[..], rest].concat());
    assert_eq!(copy(&["other.qcow2", "copy.qcow2"]), Some(0));
    is_sound(&pair, "copy.qcow2");
    same_bitmaps(&pair, "copy.qcow2", &["convert"]);
    assert_eq!(bitmaps(&pair, 0, "copy.qcow2").len(), 2);
    // The names are there already.
    assert_eq!(copy(&["-n", "other.qcow2", "copy.qcow2"]), Some(1));
    for directory in pair.directories() {
        let path = directory.join("other.qcow2");
        let mut file = fs::read(&path).expect("it is there");
        let number = |at: usize, bytes: usize| {
            let field = file[at..at + bytes].iter();
            field.fold(0, |number, byte| number << 8 | usize::from(*byte))
        };
        let mut at = number(100, 4);
        while number(at, 4) != 0x2385_2875 {
            at += 8 + number(at + 4, 4).next_multiple_of(8);
        }
        let flags = number(at + 24, 8) + 15;
        file[flags] |= 1;
        fs::write(&path, file).expect("it is there");
    }
    assert_eq!(copy(&["other.qcow2", "broken.qcow2"]), Some(1));
    assert_eq!(
        copy(&["--skip-broken-bitmaps", "other.qcow2", "some.qcow2"]),
        Some(0)
    );
    same_bitmaps(&pair, "some.qcow2", &["convert"]);
    assert_eq!(bitmaps(&pair, 0, "some.qcow2").len(), 1);
    // Of such a bitmap nothing can be had but its end.
    for (action, status) in [("--clear", 1), ("--enable", 1), ("--remove", 0)] {
        let args = ["bitmap", "-f", "qcow2", action, "other.qcow2", "b0"];
        assert_eq!(pair.same_status(&args), Some(status), "{action}");
    }
    is_sound(&pair, "other.qcow2");
    same_bitmaps(&pair, "other.qcow2", &["--remove"]);
}

#[test]
fn bitmaps_are_measured_alike() {
    let pair = pair();
    let add = ["bitmap", "--add", "-g", "512", "a.qcow2", &"n".repeat(1000)];
    prepare(&pair, "qemu-img", &add);
    let bitmaps = |outcome: Outcome| outcome.json().get("bitmaps").cloned();
    for format in ["qcow2", "raw"] {
        let of_format = match format {
            "qcow2" => &[
                "compat=1.1",
                "compat=0.10",
                "cluster_size=512",
                "cluster_size=2M",
            ][..],
            _ => &[""],
        };
        for options in of_format {
            for name in ["a.qcow2", "other.qcow2"] {
                let args = [
                    "measure",
                    "--output=json",
                    "-f",
                    "qcow2",
                    "-O",
                    format,
                    name,
                ];
                let args = match *options {
                    "" => args.to_vec(),
                    options => [&args[..], &["-o", options]].concat(),
                };
                let (ours, theirs) = pair.run(&args);
                assert_eq!(bitmaps(ours), bitmaps(theirs), "{args:?}");
            }
        }
    }
}

#[test]
fn bitmaps_go_with_their_image_through_every_other_verb() {
    let pair = pair();
    let overlay = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "a.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ];
    prepare(&pair, "qemu-img", &overlay);
    prepare(&pair, "qemu-img", &["bitmap", "--add", "top.qcow2", "t"]);
    let write = [
        "-f",
        "qcow2",
        "-c",
        "write 7M 64k",
        "-c",
        "write 8M 128k",
        "top.qcow2",
    ];
    prepare(&pair, "qemu-io", &write);
    for (args, status) in [
        (&["snapshot", "-c", "one", "a.qcow2"][..], 0),
        // What bitmaps say would be untrue then.
        (&["snapshot", "-a", "one", "a.qcow2"], 1),
        (&["snapshot", "-d", "one", "a.qcow2"], 0),
        (
            &["amend", "-f", "qcow2", "-o", "lazy_refcounts=on", "a.qcow2"],
            0,
        ),
        (
            &["amend", "-f", "qcow2", "-o", "refcount_bits=8", "a.qcow2"],
            0,
        ),
        (&["amend", "-f", "qcow2", "-o", "compat=0.10", "a.qcow2"], 1),
        (&["commit", "-f", "qcow2", "top.qcow2"], 0),
        (
            &[
                "rebase",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                "other.qcow2",
                "top.qcow2",
            ],
            0,
        ),
        (&["rebase", "-f", "qcow2", "-b", "", "top.qcow2"], 0),
        (&["resize", "-f", "qcow2", "a.qcow2", "+5M"], 0),
        (&["resize", "-f", "qcow2", "--shrink", "a.qcow2", "4M"], 0),
        (&["check", "-f", "qcow2", "-r", "all", "a.qcow2"], 0),
    ] {
        let args = match args {
            ["snapshot", rest @ ..] if rest[0] != "-f" => {
                [&["snapshot", "-f", "qcow2"], rest].concat()
            }
            args => args.to_vec(),
        };
        // `qemu-img snapshot` has no -f.
        let (ours, theirs) = match args[0] {
            "snapshot" => {
                let without = [&args[..1], &args[3..]].concat();
                (
                    pair.run(&args).0,
                    super::Outcome::of(qemu_img(&without), pair.theirs.path()),
                )
            }
            _ => pair.run(&args),
        };
        assert_eq!(ours.status, Some(status), "{args:?}: {ours:?}");
        assert_eq!(theirs.status, Some(status), "{args:?}: {theirs:?}");
        for name in ["a.qcow2", "top.qcow2"] {
            is_sound(&pair, name);
            same_bitmaps(&pair, name, &args);
        }
    }
}

fn qemu_img(args: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(args);
    command
}
