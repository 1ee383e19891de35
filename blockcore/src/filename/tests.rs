//! Names as images and operators write them, and as nobody should.

use serde_json::json;

use super::*;
use crate::driver::DriverKind;
use crate::engine::sim::Random;
use crate::options::{OptionKind, OptionSpec};

const PROTOCOLS: &[Protocol] = &[
    Protocol {
        prefix: "file",
        driver: "file",
        parse: |name| strip_prefix(name, "file"),
    },
    Protocol {
        prefix: "nbd+unix",
        driver: "nbd",
        parse: |name| {
            let mut options = Options::default();
            options.set("server.path", name.trim_start_matches("nbd+unix://"));
            Ok(options)
        },
    },
];

fn options(name: &str) -> Result<Options, Error> {
    to_options(name, PROTOCOLS, "file")
}

fn as_json(name: &str) -> serde_json::Value {
    options(name).unwrap().to_json()
}

#[test]
fn a_protocol_is_what_is_before_a_colon_before_the_first_slash() {
    assert_eq!(protocol("nbd://host/disk"), Some("nbd"));
    assert_eq!(protocol("file:a:b"), Some("file"));
    assert_eq!(protocol(":a"), Some(""));
    assert_eq!(protocol("/dev/disk/by-id/usb-0:0"), None);
    assert_eq!(protocol("./a:b"), None);
    assert_eq!(protocol("disk.raw"), None);
    assert_eq!(protocol(""), None);
}

#[test]
fn a_relative_name_is_put_beside_the_other_and_never_before_its_protocol() {
    let cases = [
        ("/images/a.qcow2", "b.raw", "/images/b.raw"),
        ("/images/a.qcow2", "../b.raw", "/images/../b.raw"),
        ("/images/a.qcow2", "/b.raw", "/b.raw"),
        ("a.qcow2", "b.raw", "b.raw"),
        ("dir/", "b.raw", "dir/b.raw"),
        ("", "b.raw", "b.raw"),
        ("nbd:a", "b", "nbd:b"),
        ("nbd://host/dir/a", "b", "nbd://host/dir/b"),
        ("nbd:a", "/b", "/b"),
        ("/a:b/c", "d", "/a:b/d"),
        ("/a/b", "", "/a/"),
    ];
    for (base, name, combined) in cases {
        assert_eq!(combine(base, name).unwrap(), combined, "{base} {name}");
    }
}

#[test]
fn a_backing_name_is_relative_to_its_overlay_unless_it_says_where_it_is() {
    let full = |overlay, backing| full_backing_name(overlay, backing).unwrap();
    assert_eq!(full("/images/a", "b").as_deref(), Some("/images/b"));
    assert_eq!(full("/images/a", "").as_deref(), None);
    assert_eq!(full("", "/b").as_deref(), Some("/b"));
    assert_eq!(full("json:{}", "nbd:b").as_deref(), Some("nbd:b"));
    assert_eq!(full("json:{}", "json:{}").as_deref(), Some("json:{}"));
    for overlay in ["", "json:{\"driver\": \"raw\", \"a\": \"/x/\"}"] {
        let error = full_backing_name(overlay, "b").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}

#[test]
fn a_name_becomes_its_drivers_options() {
    let file = |filename| json!({"driver": "file", "filename": filename});
    assert_eq!(as_json("disk.raw"), file("disk.raw"));
    assert_eq!(as_json("/dev/a:b"), file("/dev/a:b"));
    assert_eq!(as_json("file:a:b"), file("a:b"));
    let nbd = json!({"driver": "nbd", "server": {"path": "/run/a"}});
    assert_eq!(as_json("nbd+unix:///run/a"), nbd);
    let raw = json!({"driver": "raw", "file": {"driver": "file", "filename": "a"}, "offset": 512});
    assert_eq!(as_json(&format!("json:{raw}")), raw);

    let refused = |name: &str| options(name).unwrap_err();
    let unknown = refused("a:b");
    assert_eq!(unknown.kind(), ErrorKind::NotFound);
    let said = "'a:b' begins with protocol 'a', and there are file, nbd+unix; a file of that name is \
                './a:b'";
    assert_eq!(unknown.to_string(), said);
    for name in [
        "",
        "file:",
        "json:",
        "json:[]",
        "json:{\"a\": 1, \"a\": 2}",
        "a\0b",
    ] {
        assert_eq!(refused(name).kind(), ErrorKind::Invalid, "{name:?}");
    }
}

#[test]
fn a_files_path_is_a_name_that_is_read_as_this_path() {
    assert_eq!(of_path("/images/a").as_deref(), Some("/images/a"));
    assert_eq!(of_path("a:b").as_deref(), Some("./a:b"));
    assert_eq!(of_path("json:{}").as_deref(), Some("./json:{}"));
    assert_eq!(of_path(""), None);
    assert_eq!(of_path("a\0b"), None);
}

#[test]
fn a_name_of_any_length_is_refused_in_few_words() {
    let long = "a".repeat(MAX_NAME_BYTES);
    assert!(options(&long).is_ok());
    let overlay = format!("/{}", "d/".repeat(2000));
    assert!(combine(&overlay, "b").is_ok());
    let json = format!("json:{{\"a\": \"{}\"}}", "x".repeat(MAX_JSON_NAME_BYTES));
    let refused = [
        options(&format!("{long}a")).unwrap_err(),
        options(&format!("{}:", "p".repeat(100_000))).unwrap_err(),
        options(&json).unwrap_err(),
        combine(&overlay, &"b".repeat(100)).unwrap_err(),
        full_backing_name("a", &"\0".repeat(10_000)).unwrap_err(),
        options(&format!("json:{}", "{\"a\":".repeat(10_000))).unwrap_err(),
    ];
    for error in refused {
        assert!(error.report().len() < 600, "{}", error.report());
        assert!(!error.report().contains('\0'));
    }
}

#[test]
fn whether_a_name_is_the_backing_image_is_a_matter_of_paths_or_of_texts() {
    let if_canonical = |one: &str, other: &str| Sameness::IfCanonical {
        one: one.to_owned(),
        other: other.to_owned(),
    };
    let same = |wanted| same_backing(wanted, "/images/top", "base");
    assert_eq!(same("base"), Sameness::Same);
    assert_eq!(same("/images/base"), Sameness::Same);
    assert_eq!(
        same("./base"),
        if_canonical("/images/./base", "/images/base")
    );
    assert_eq!(same("/x/base"), if_canonical("/x/base", "/images/base"));
    assert_eq!(same("nbd:base"), Sameness::Different);
    assert_eq!(same(""), Sameness::Different);
    assert_eq!(same_backing("nbd:a", "/top", "nbd:a"), Sameness::Same);
    assert_eq!(same_backing("a", "nbd:top", "b"), Sameness::Different);
    assert_eq!(same_backing("nbd:b", "nbd:top", "b"), Sameness::Same);
    assert_eq!(same_backing("a", "json:{}", "a"), Sameness::Same);
    assert_eq!(same_backing("./a", "json:{}", "a"), Sameness::Different);
    assert_eq!(same_backing("/a", "json:{}", "/a"), Sameness::Same);
    assert_eq!(same_backing("/top", "/top", ""), Sameness::Different);
}

const FILE_TABLE: &[OptionSpec] = &[
    option("driver", OptionKind::Text, None, true),
    option("node-name", OptionKind::Text, Some(""), false),
    option("read-only", OptionKind::Bool, Some("off"), false),
    option("filename", OptionKind::Text, None, true),
];
const RAW_TABLE: &[OptionSpec] = &[
    option("driver", OptionKind::Text, None, true),
    option("node-name", OptionKind::Text, Some(""), false),
    option("read-only", OptionKind::Bool, Some("off"), false),
    option("offset", OptionKind::Size, Some("0"), true),
];

const fn option(
    name: &'static str,
    kind: OptionKind,
    default: Option<&'static str>,
    changes_data: bool,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        reopen: false,
        changes_data,
        help: "",
    }
}

fn file(path: &str) -> Described {
    let text = format!("driver=file,node-name=f,read-only=on,filename={path}");
    describe(&NodeParts {
        driver: "file",
        kind: DriverKind::Protocol,
        options: &Options::parse(&text, None).unwrap(),
        tables: &[FILE_TABLE],
        source: NameSource::Driver(of_path(path)),
        children: &[],
    })
}

fn format(text: &str, kind: DriverKind, children: &[ChildPart<'_>]) -> Described {
    let options = Options::parse(text, Some("driver")).unwrap();
    describe(&NodeParts {
        driver: options.get("driver").unwrap(),
        kind,
        options: &options,
        tables: &[RAW_TABLE],
        source: NameSource::File,
        children,
    })
}

fn child<'a>(name: &'a str, node: Option<&'a Described>, from_image: bool) -> ChildPart<'a> {
    ChildPart {
        name,
        node,
        from_image,
    }
}

#[test]
fn a_plain_name_describes_a_format_that_nobody_changed() {
    let file = file("/images/a");
    assert_eq!(file.name(), "/images/a");
    let children = [child("file", Some(&file), false)];
    for text in ["raw", "raw,offset=0", "raw,node-name=x,read-only=on"] {
        let raw = format(text, DriverKind::Format, &children);
        assert_eq!(raw.exact.as_deref(), Some("/images/a"), "{text}");
        let full = json!({"driver": "raw", "file": {"driver": "file", "filename": "/images/a"}});
        assert_eq!(raw.full.to_json(), full, "{text}");
    }
}

#[test]
fn what_changes_the_data_is_in_the_name() {
    let file = file("a");
    let children = [child("file", Some(&file), false)];
    let raw = format("raw,offset=1k", DriverKind::Format, &children);
    let full = json!({
        "driver": "raw",
        "file": {"driver": "file", "filename": "a"},
        "offset": 1024
    });
    assert_eq!(raw.exact, None);
    assert_eq!(raw.name(), format!("json:{full}"));
    assert_eq!(options(&raw.name()).unwrap(), raw.full);
    let filter = format("throttle", DriverKind::Filter, &children);
    assert_eq!(filter.exact, None);
    // The name of a format's file would open the format below with no format above.
    let inner = format("raw", DriverKind::Format, &children);
    let outer = format(
        "raw",
        DriverKind::Format,
        &[child("file", Some(&inner), false)],
    );
    assert_eq!((inner.exact.as_deref(), outer.exact), (Some("a"), None));
}

#[test]
fn a_backing_node_is_in_the_name_only_if_the_image_does_not_ask_for_it() {
    let (top, base) = (file("top"), file("base"));
    let with = |node, from_image| {
        let children = [
            child("file", Some(&top), false),
            child("backing", node, from_image),
        ];
        format("qcow2", DriverKind::Format, &children)
    };
    let asked = with(Some(&base), true);
    assert_eq!(asked.exact.as_deref(), Some("top"));
    assert_eq!(asked.full.get("backing.filename"), None);
    let overridden = with(Some(&base), false);
    assert_eq!(overridden.exact, None);
    assert_eq!(overridden.full.get("backing.filename"), Some("base"));
    let without = with(None, false);
    assert_eq!(without.exact, None);
    assert_eq!(without.full.to_json()["backing"], json!(null));
    assert!(backing_overridden("base", None) && backing_overridden("", Some("base")));
    assert!(!backing_overridden("", None) && !backing_overridden("base", Some("base")));
}

/// A name as hostile as it may come: short words of what names are made of.
fn any_name(random: &mut Random) -> String {
    const PIECES: [&str; 12] = [
        "/",
        ":",
        "..",
        ".",
        "a",
        "file:",
        "json:",
        "nbd+unix:",
        "{\"a\":1}",
        "\0",
        "é",
        "//",
    ];
    (0..random.below(6))
        .map(|_| PIECES[random.below(PIECES.len() as u64) as usize])
        .collect()
}

#[test]
fn any_two_names_combine_by_the_rules_or_are_refused() {
    let mut combined_names = 0;
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let (base, name) = (any_name(&mut random), any_name(&mut random));
        let what = format!("seed {seed}: {base:?} {name:?}");
        let _ = (options(&name), same_backing(&name, &base, &name));
        let Ok(combined) = combine(&base, &name) else {
            let absolute = is_absolute(&name);
            let refusable = name.contains('\0') || (!absolute && base.contains(['\0', ':']));
            assert!(refusable, "{what}");
            continue;
        };
        combined_names += 1;
        assert!(combined.ends_with(&name), "{what}");
        if is_absolute(&name) {
            assert_eq!(combined, name, "{what}");
            continue;
        }
        let place = &combined[..combined.len() - name.len()];
        assert!(base.starts_with(place), "{what}");
        assert!(!base[place.len()..].contains('/'), "{what}");
        if let Some(prefix) = protocol(&base) {
            assert_eq!(protocol(&combined), Some(prefix), "{what}");
        }
        assert_eq!(combine(place, &name).unwrap(), combined, "{what}");
        if let Some(path) = of_path(&name) {
            assert!(!has_protocol(&path), "{what}");
        }
    }
    assert!(combined_names > 5000, "{combined_names}");
}
