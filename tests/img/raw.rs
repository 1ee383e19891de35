//! Raw images, on both programs.

use std::fs;
use std::sync::PoisonError;

use harness::random::Random;

use super::{FORKS, Pair, Pattern, allocated, path};

/// Data, a hole, and a few bytes at the end.
fn sparse() -> Pattern {
    Pattern {
        bytes: 1 << 20,
        data: vec![
            (0, vec![1; 8192]),
            (65536, vec![2; 65536]),
            (262_144, vec![0; 65536]),
            ((1 << 20) - 100, vec![3; 100]),
        ],
    }
}

#[test]
fn create_makes_files_of_the_same_length_and_says_the_same() {
    let pair = Pair::new();
    for args in [
        &["create", "a.raw", "1000"][..],
        &["create", "-f", "raw", "b.raw", "1M"],
        &[
            "create",
            "-f",
            "raw",
            "-o",
            "preallocation=full",
            "c.raw",
            "64k",
        ],
        &[
            "create",
            "-f",
            "raw",
            "-o",
            "preallocation=falloc,size=96k",
            "d.raw",
        ],
        &["create", "-q", "e.raw", "1.5M"],
        // Over what is there.
        &["create", "b.raw", "4k"],
    ] {
        pair.same(args);
    }
    for name in ["a.raw", "b.raw", "c.raw", "d.raw", "e.raw"] {
        pair.same_bytes(name);
    }
    for name in ["c.raw", "d.raw"] {
        let [ours, theirs] = [&pair.ours, &pair.theirs].map(|dir| allocated(&path(dir, name)));
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn info_prints_the_same() {
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    pair.same(&["info", "a.raw"]);
    pair.same(&["info", "-f", "raw", "-U", "a.raw"]);
    pair.same(&["info", "--backing-chain", "a.raw"]);
    let info = pair.same_json(&["info", "--output=json", "a.raw"]);
    assert_eq!(info["virtual-size"], 1 << 20);
    assert_eq!(info["children"][0]["name"], "file");
    pair.same_json(&["info", "--output", "json", "--backing-chain", "a.raw"]);
    pair.same_json(&[
        "info",
        "--output=json",
        "--image-opts",
        "driver=raw,file.driver=file,file.filename=a.raw",
    ]);
    pair.same_json(&["info", "--output=json", "-f", "file", "a.raw"]);
}

#[test]
fn map_prints_the_same() {
    let mut random = Random::announced("map_prints_the_same");
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    pair.file(
        "empty.raw",
        &Pattern {
            bytes: 0,
            data: Vec::new(),
        },
    );
    pair.same(&["map", "a.raw"]);
    pair.same(&["map", "--output=json", "a.raw"]);
    pair.same_json(&["map", "--output=json", "empty.raw"]);
    pair.same(&[
        "map",
        "--output=json",
        "-s",
        "100000",
        "-l",
        "70000",
        "a.raw",
    ]);
    pair.same(&["map", "--output=json", "--start-offset=4096", "a.raw"]);
    for number in 0..8 {
        let name = format!("{number}.raw");
        let bytes = random.below(1 << 20) + 1;
        pair.file(&name, &Pattern::random(&mut random, bytes));
        pair.same(&["map", "--output=json", &name]);
        pair.same(&["map", "-f", "raw", &name]);
    }
}

#[test]
fn compare_ends_alike_and_finds_the_same_place() {
    let mut random = Random::announced("compare_ends_alike");
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    let mut other = sparse();
    other.data.push((131_072 - 5, vec![9]));
    pair.file("b.raw", &other);
    let mut longer = sparse();
    longer.bytes += 65536;
    pair.file("longer.raw", &longer);
    longer.data.push(((1 << 20) + 5000, vec![1]));
    pair.file("more.raw", &longer);
    let mut written = sparse();
    written.data.push((524_288, vec![0; 4096]));
    pair.file("written.raw", &written);
    for other in ["a.raw", "b.raw", "longer.raw", "more.raw", "written.raw"] {
        pair.same(&["compare", "a.raw", other]);
        pair.same(&["compare", other, "a.raw"]);
        pair.same(&["compare", "-s", "a.raw", other]);
        assert_eq!(pair.same(&["compare", "-q", "a.raw", other]), "");
    }
    for _ in 0..8 {
        let bytes = random.below(1 << 19) + 1;
        let first = Pattern::random(&mut random, bytes);
        let mut second = first.clone();
        second.bytes += random.below(4) * 512;
        if random.below(2) == 0 {
            second.data.push((random.below(second.bytes), vec![7]));
        }
        pair.file("one", &first);
        pair.file("two", &second);
        pair.same(&["compare", "-f", "raw", "-F", "raw", "one", "two"]);
    }
}

#[test]
fn converted_images_hold_the_same_bytes() {
    let mut random = Random::announced("converted_images_hold_the_same_bytes");
    let pair = Pair::new();
    let sets: &[&[&str]] = &[
        &[],
        &["-S", "0"],
        &["-S", "512"],
        &["-S", "64k"],
        &["-m", "1"],
        &["-m", "16", "-W"],
        &["-C"],
        &["-t", "none"],
        &["-T", "none", "-t", "writeback"],
        &["-t", "writethrough", "-m", "3"],
        &["--salvage"],
    ];
    for round in 0..3 {
        let bytes = (random.below(1 << 22) + 1).next_multiple_of(512);
        pair.file("a.raw", &Pattern::random(&mut random, bytes));
        pair.file("b.raw", &Pattern::random(&mut random, 1 << 16));
        for options in sets {
            let mut args = vec!["convert", "-q"];
            args.extend(*options);
            args.extend(["-f", "raw", "-O", "raw", "a.raw", "out.raw"]);
            pair.same(&args);
            pair.same_bytes("out.raw");
            let whole = fs::read(path(&pair.ours, "a.raw")).unwrap();
            assert!(
                whole == fs::read(path(&pair.ours, "out.raw")).unwrap(),
                "{round} {options:?}"
            );
        }
        pair.same(&[
            "convert", "-f", "raw", "b.raw", "a.raw", "b.raw", "both.raw",
        ]);
        pair.same_bytes("both.raw");
    }
}

#[test]
fn a_converted_image_is_as_sparse_as_it_can_be_or_not_at_all() {
    let pair = Pair::new();
    let pattern = Pattern {
        bytes: 4 << 20,
        data: vec![(0, vec![1; 4096]), (1 << 20, vec![0; 1 << 20])],
    };
    pair.file("a.raw", &pattern);
    pair.same(&["convert", "-f", "raw", "a.raw", "sparse.raw"]);
    assert_eq!(allocated(&path(&pair.ours, "sparse.raw")), 4096);
    pair.same(&["convert", "-S", "0", "-f", "raw", "a.raw", "full.raw"]);
    assert_eq!(allocated(&path(&pair.ours, "full.raw")), 4 << 20);
}

#[test]
fn convert_writes_zeroes_over_what_is_there_unless_told_that_there_is_nothing() {
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    let full = Pattern {
        bytes: 2 << 20,
        data: vec![(0, vec![0xff; 2 << 20])],
    };
    pair.file("there.raw", &full);
    pair.same(&[
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        "a.raw",
        "there.raw",
    ]);
    pair.same_bytes("there.raw");
    let there = fs::read(path(&pair.ours, "there.raw")).unwrap();
    assert!(there[8192..65536].iter().all(|byte| *byte == 0));
    assert!(there[1 << 20..].iter().all(|byte| *byte == 0xff));
    pair.file("there.raw", &full);
    pair.same(&[
        "convert",
        "-n",
        "--target-is-zero",
        "-f",
        "raw",
        "-O",
        "raw",
        "a.raw",
        "there.raw",
    ]);
    pair.same_bytes("there.raw");
    pair.file("there.raw", &full);
    let target = "driver=raw,file.driver=file,file.filename=there.raw";
    pair.same(&[
        "convert",
        "-n",
        "--target-image-opts",
        "-f",
        "raw",
        "a.raw",
        target,
    ]);
    pair.same_bytes("there.raw");
    pair.file(
        "short.raw",
        &Pattern {
            bytes: 4096,
            data: Vec::new(),
        },
    );
    assert_eq!(
        pair.same_status(&["convert", "-n", "-f", "raw", "a.raw", "short.raw"]),
        Some(1)
    );
}

#[test]
fn resized_images_have_the_same_length_and_content() {
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    for (args, status) in [
        (&["resize", "-f", "raw", "a.raw", "2M"][..], 0),
        (&["resize", "-f", "raw", "a.raw", "+1000"], 0),
        (&["resize", "-f", "raw", "a.raw", "1M"], 1),
        (&["resize", "-f", "raw", "--shrink", "a.raw", "100000"], 0),
        (&["resize", "-f", "raw", "--shrink", "a.raw", "-512"], 0),
        (
            &[
                "resize",
                "-q",
                "-f",
                "raw",
                "--preallocation=full",
                "a.raw",
                "+64k",
            ],
            0,
        ),
        (
            &[
                "resize",
                "-f",
                "raw",
                "--preallocation=falloc",
                "a.raw",
                "+64k",
            ],
            0,
        ),
        (
            &[
                "resize",
                "-f",
                "raw",
                "--shrink",
                "--preallocation=full",
                "a.raw",
                "4k",
            ],
            1,
        ),
        (&["resize", "-f", "raw", "--shrink", "a.raw", "-10G"], 1),
        (&["resize", "-f", "raw", "a.raw", "huge"], 1),
        (&["resize", "-f", "raw", "a.raw"], 1),
        (&["resize", "-f", "raw", "missing.raw", "1M"], 1),
    ] {
        assert_eq!(pair.same_status(args), Some(status), "{args:?}");
        pair.same_bytes("a.raw");
    }
}

#[test]
fn dd_copies_the_same_blocks() {
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    for args in [
        &["dd", "-f", "raw", "if=a.raw", "of=b.raw"][..],
        &[
            "dd", "-f", "raw", "-O", "raw", "bs=4k", "skip=15", "if=a.raw", "of=b.raw",
        ],
        &[
            "dd",
            "-f",
            "raw",
            "bs=1000",
            "skip=1048",
            "if=a.raw",
            "of=b.raw",
        ],
        &[
            "dd",
            "-f",
            "raw",
            "bs=1M",
            "count=100",
            "if=a.raw",
            "of=b.raw",
        ],
        &[
            "dd",
            "-f",
            "raw",
            "bs=1",
            "count=513",
            "if=a.raw",
            "of=b.raw",
        ],
        &["dd", "-f", "raw", "bs=1M", "skip=2", "if=a.raw", "of=b.raw"],
    ] {
        pair.same(args);
        pair.same_bytes("b.raw");
    }
    // Here `qemu-img` 10.0 takes the skipped blocks off those that it is to copy.
    let operands = ["bs=4k", "count=3", "skip=15", "if=a.raw", "of=b.raw"];
    let (ours, _) = pair.run(&[&["dd", "-f", "raw"], &operands[..]].concat());
    ours.expect_success();
    let [source, copy] = ["a.raw", "b.raw"].map(|name| fs::read(path(&pair.ours, name)).unwrap());
    assert!(copy == source[15 * 4096..18 * 4096]);
}

#[test]
fn measure_prints_the_same() {
    let pair = Pair::new();
    pair.file(
        "a.raw",
        &Pattern {
            bytes: 70_001,
            data: vec![(70_000, vec![1])],
        },
    );
    pair.same(&["measure", "--size", "1000"]);
    pair.same(&["measure", "-O", "raw", "-f", "raw", "a.raw"]);
    pair.same_json(&["measure", "--output=json", "--size=3G"]);
    pair.same_status(&["measure"]);
    pair.same_status(&["measure", "--size", "1M", "a.raw"]);
    pair.same_status(&["measure", "--size", "much"]);
}

#[test]
fn bench_takes_the_same_options() {
    let pair = Pair::new();
    let full = Pattern {
        bytes: 1 << 20,
        data: vec![(0, vec![5; 1 << 20])],
    };
    pair.file("a.raw", &full);
    for args in [
        &["bench", "-f", "raw", "-c", "100", "a.raw"][..],
        &[
            "bench", "-f", "raw", "-c", "100", "-d", "1", "-i", "threads", "a.raw",
        ],
        &[
            "bench", "-f", "raw", "-c", "64", "-s", "8192", "-S", "16384", "-o", "4096", "a.raw",
        ],
        &[
            "bench",
            "-f",
            "raw",
            "-q",
            "-w",
            "-c",
            "256",
            "--pattern",
            "65",
            "a.raw",
        ],
        &[
            "bench",
            "-f",
            "raw",
            "-w",
            "-c",
            "64",
            "-d",
            "4",
            "--flush-interval",
            "8",
            "a.raw",
        ],
        &[
            "bench",
            "-f",
            "raw",
            "-w",
            "-c",
            "64",
            "-d",
            "4",
            "--flush-interval",
            "8",
            "--no-drain",
            "a.raw",
        ],
    ] {
        assert_eq!(pair.same_status(args), Some(0), "{args:?}");
        pair.same_bytes("a.raw");
    }
    for args in [
        &["bench", "-f", "raw", "-w", "--flush-interval", "8", "a.raw"][..],
        &["bench", "-f", "raw", "--flush-interval", "80", "a.raw"],
        &["bench", "-f", "raw", "-c", "0", "a.raw"],
        &["bench", "-f", "raw", "-d", "0", "a.raw"],
    ] {
        assert_eq!(pair.same_status(args), Some(1), "{args:?}");
    }
}

#[test]
fn what_is_wrong_ends_both_programs_alike() {
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    for args in [
        &["info"][..],
        &["info", "missing.raw"],
        &["info", "a.raw", "a.raw"],
        &["info", "-f", "nosuch", "a.raw"],
        &["info", "-f", "raw", "--image-opts", "a.raw"],
        &["info", "--output=xml", "a.raw"],
        &["nosuch"],
        &["map", "missing.raw"],
        &["map", "--nosuch", "a.raw"],
        &["compare", "a.raw"],
        &["compare", "a.raw", "missing.raw"],
        &["compare", "missing.raw", "a.raw"],
        &["check", "a.raw"],
        &["check", "missing.raw"],
        &["check", "-r", "some", "a.raw"],
        &["create", "x.raw"],
        &["create", "-f", "nosuch", "x.raw", "1M"],
        &["create", "-o", "nosuch=1", "x.raw", "1M"],
        &["create", "x.raw", "1Q"],
        &["create", "-b", "a.raw", "-F", "raw", "x.raw"],
        &["create", "no/such/directory/x.raw", "1M"],
        &["convert", "a.raw"],
        &["convert", "missing.raw", "x.raw"],
        &["convert", "-O", "nosuch", "a.raw", "x.raw"],
        &["convert", "-c", "a.raw", "x.raw"],
        &["convert", "-c", "-C", "a.raw", "x.raw"],
        &["convert", "-S", "1", "a.raw", "x.raw"],
        &["convert", "-S", "4k", "-C", "a.raw", "x.raw"],
        &["convert", "-m", "17", "a.raw", "x.raw"],
        &["convert", "-m", "0", "a.raw", "x.raw"],
        &["convert", "-c", "-W", "a.raw", "x.raw"],
        &["convert", "-t", "fast", "a.raw", "x.raw"],
        &["convert", "--target-is-zero", "a.raw", "x.raw"],
        &["convert", "--target-image-opts", "a.raw", "driver=raw"],
        &["convert", "-n", "a.raw", "missing.raw"],
        &["convert", "-B", "a.raw", "-F", "raw", "a.raw", "x.raw"],
        &["dd", "if=a.raw"],
        &["dd", "if=missing.raw", "of=x.raw"],
        &["dd", "if=a.raw", "of=x.raw", "bs=0"],
        &["dd", "if=a.raw", "of=x.raw", "nosuch=1"],
        &["snapshot", "-c", "one", "a.raw"],
        &["snapshot", "-l", "missing.raw"],
        &["snapshot", "-c", "one", "-d", "one", "a.raw"],
        &["rebase", "-f", "raw", "-b", "", "a.raw"],
        &[
            "rebase", "-u", "-f", "raw", "-F", "raw", "-b", "x.raw", "a.raw",
        ],
        &["commit", "-f", "raw", "a.raw"],
        &["amend", "-f", "raw", "-o", "size=1M", "a.raw"],
        &["amend", "-f", "raw", "a.raw"],
        &["bitmap", "--add", "-f", "raw", "a.raw", "b0"],
        &["bitmap", "-f", "raw", "a.raw", "b0"],
        &["measure", "-O", "nosuch", "--size", "1M"],
    ] {
        let status = pair.same_status(args);
        assert!(
            status.is_some_and(|status| status > 0),
            "{args:?} is refused"
        );
        assert!(
            !path(&pair.ours, "x.raw").exists(),
            "{args:?} leaves nothing"
        );
        pair.same_bytes("a.raw");
    }
    assert_eq!(pair.same(&["snapshot", "-l", "a.raw"]), "");
}

#[test]
fn help_is_no_failure() {
    let pair = Pair::new();
    for verb in [
        "amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd",
        "info", "map", "measure", "rebase", "resize", "snapshot",
    ] {
        assert_eq!(pair.same_status(&[verb, "--help"]), Some(0), "{verb}");
    }
    assert_eq!(pair.same_status(&["create", "-o", "help"]), Some(0));
    assert_eq!(
        pair.same_status(&["convert", "-O", "raw", "-o", "?"]),
        Some(0)
    );
}

#[test]
fn options_may_be_cut_short() {
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    pair.same(&["info", "--form=raw", "--back", "a.raw"]);
    pair.same(&["map", "--out=json", "--start=4096", "a.raw"]);
}

#[test]
fn progress_is_told_in_lines_that_programs_know() {
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    let (ours, theirs) = pair.run(&["convert", "-p", "-f", "raw", "a.raw", "b.raw"]);
    for output in [ours, theirs].map(super::Outcome::expect_success) {
        assert!(output.starts_with("    (0.00/100%)\r"), "{output:?}");
        assert!(output.ends_with("    (100.00/100%)\r\n"), "{output:?}");
    }
}

#[test]
fn a_format_is_never_guessed_for_writing_and_the_command_is_proposed() {
    let pair = Pair::new();
    let mut head = b"KDMV".to_vec();
    head.resize(4096, 0);
    pair.file(
        "a.vmdk",
        &Pattern {
            bytes: 65536,
            data: vec![(0, head)],
        },
    );
    for (args, proposed) in [
        (
            &["resize", "a.vmdk", "128k"][..],
            "stonework img resize -f raw a.vmdk 128k",
        ),
        (
            &["convert", "a.vmdk", "my copy"],
            "stonework img convert -f raw a.vmdk 'my copy'",
        ),
        (
            &["bench", "-w", "a.vmdk"],
            "stonework img bench -f raw -w a.vmdk",
        ),
        (&["info", "a.vmdk"], "stonework img info -f raw a.vmdk"),
    ] {
        let (ours, _) = pair.run(args);
        assert_eq!(ours.status, Some(1), "{args:?}");
        assert!(
            ours.errors.contains("begins like a vmdk image"),
            "{}",
            ours.errors
        );
        assert!(ours.errors.contains(proposed), "{}", ours.errors);
    }
    let (ours, _) = pair.run(&["resize", "-f", "raw", "a.vmdk", "128k"]);
    assert_eq!(ours.expect_success(), "Image resized.\n");
}

#[test]
fn an_image_that_somebody_writes_is_looked_at_only_by_force() {
    use harness::daemon::Daemon;
    let pair = Pair::new();
    pair.file("a.raw", &sparse());
    let disk = path(&pair.ours, "a.raw");
    let alone = FORKS.write().unwrap_or_else(PoisonError::into_inner);
    let _daemon = Daemon::serve(&disk, &path(&pair.ours, "socket"), &[]);
    drop(alone);
    for args in [
        &["map", "a.raw"][..],
        &["resize", "-f", "raw", "a.raw", "2M"],
        &["create", "a.raw", "2M"],
        &["convert", "-f", "raw", "a.raw", "b.raw"],
    ] {
        let (ours, _) = pair.run(args);
        assert_eq!(ours.status, Some(1), "{args:?}");
        assert!(ours.errors.contains("a.raw"), "{}", ours.errors);
    }
    let (ours, _) = pair.run(&["map", "-U", "a.raw"]);
    ours.expect_success();
    assert_eq!(fs::metadata(&disk).unwrap().len(), 1 << 20);
}
