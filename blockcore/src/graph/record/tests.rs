//! Records written and read back, damaged, forged, and compared with arguments.

use super::*;
use crate::engine::sim::Random;
use crate::options::{OptionKind, OptionSpec};

/// A node from its options as text and its children: `role=name`, `role~name` for one that the image
/// asks for, `role!` for none.
pub(super) fn node(options: &str, children: &[&str]) -> NodeRecord {
    let children = children.iter().map(|child| {
        let (at, child_node) = match child.find(['=', '~', '!']) {
            Some(at) if child[at..].starts_with('!') => (at, ChildRecord::Absent),
            Some(at) => {
                let name = child[at + 1..].to_owned();
                let implied = child[at..].starts_with('~');
                (at, ChildRecord::Node { name, implied })
            }
            None => panic!("no child: {child}"),
        };
        (child[..at].to_owned(), child_node)
    });
    NodeRecord {
        options: Options::parse(options, Some("driver")).unwrap(),
        children: children.collect(),
        identity: None,
    }
}

pub(super) fn tree(root: &str, nodes: &[(&str, NodeRecord)]) -> Tree {
    let nodes = nodes.iter().cloned();
    Tree {
        root: root.to_owned(),
        nodes: nodes.map(|(name, node)| (name.to_owned(), node)).collect(),
    }
}

/// `disk`, a qcow2 image in `file` without a backing image.
fn plain(file: &str) -> Tree {
    tree(
        "disk",
        &[
            ("disk", node("qcow2", &["file=#file"])),
            ("#file", node(&format!("file,filename={file}"), &[])),
        ],
    )
}

/// `snap`, an overlay of [`plain`].
fn overlay() -> Tree {
    tree(
        "snap",
        &[
            ("snap", node("qcow2", &["file=top", "backing=disk"])),
            ("top", node("file,filename=top", &[])),
            ("disk", node("qcow2", &["file=#file"])),
            ("#file", node("file,filename=base", &[])),
        ],
    )
}

fn record(current: Tree, given: Option<Tree>) -> Record {
    let export = ExportRecord { given, current };
    Record {
        epoch: 7,
        exports: BTreeMap::from([("vda".to_owned(), export)]),
    }
}

fn round_trip(record: &Record) -> Record {
    text::decode(&text::encode(record).unwrap()).unwrap()
}

/// A record in a file with the right length and checksum, however little sense it makes.
fn forged(body: &str) -> Result<Record, Error> {
    let header = serde_json::json!({
        "stonework-state": 1,
        "bytes": body.len(),
        "crc32": crc32fast::hash(body.as_bytes()),
    });
    text::decode(format!("{header}\n{body}").as_bytes())
}

#[test]
fn a_record_is_read_as_it_was_written() {
    let mut nodes = overlay();
    let identity = Identity {
        device: u64::MAX,
        inode: 1 << 60,
        cookie: Some(u128::MAX - 1),
    };
    let top = nodes.nodes.get_mut("top").unwrap();
    top.identity = Some(identity);
    let options =
        r#"{"driver": "file", "size": 18446744073709551615, "x": null, "y": {"z": true}}"#;
    top.options = Options::parse_json(options).unwrap();
    let base = nodes.nodes.get_mut("disk").unwrap();
    base.children.insert("backing".into(), ChildRecord::Absent);
    let written = record(nodes, Some(plain("base")));
    assert_eq!(round_trip(&written), written);
    assert_eq!(round_trip(&Record::default()), Record::default());
}

#[test]
fn a_chain_of_any_length_and_options_of_the_deepest_nesting_are_read_back() {
    let nodes: BTreeMap<String, NodeRecord> = (0..5000)
        .map(|number| {
            let child = format!("backing~{}", number + 1);
            let children = [child.as_str()];
            let children = if number == 4999 { &[][..] } else { &children };
            (number.to_string(), node("qcow2", children))
        })
        .collect();
    let mut chain = Tree {
        root: "0".to_owned(),
        nodes,
    };
    let deepest = vec!["a"; 100].join(".");
    chain.nodes.get_mut("0").unwrap().options.set(&deepest, "1");
    let written = record(chain.clone(), Some(chain.clone()));
    assert_eq!(round_trip(&written), written);
    assert!(chain.to_string().len() < 1000, "{chain}");
    let given = BTreeMap::from([("vda".to_owned(), chain)]);
    let verdicts = agree(&written, &given, &|_| None).unwrap();
    assert_eq!(verdicts["vda"], Verdict::AsRecorded);
}

#[test]
fn a_torn_or_changed_file_is_never_taken_for_a_record() {
    let written = text::encode(&record(overlay(), Some(plain("base")))).unwrap();
    for length in 0..written.len() {
        let error = text::decode(&written[..length]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{length} bytes");
    }
    for index in 0..written.len() {
        for bit in 0..8 {
            let mut damaged = written.clone();
            damaged[index] ^= 1 << bit;
            let error = text::decode(&damaged).unwrap_err();
            let version = error.kind() == ErrorKind::Unsupported;
            assert!(
                error.kind() == ErrorKind::Corrupt || version,
                "bit {bit} of byte {index}: {error:?}"
            );
        }
    }
    let mut longer = written.clone();
    longer.push(b'\n');
    assert!(text::decode(&longer).is_err());
    let mut zeroed = written;
    zeroed[512..].fill(0);
    assert!(text::decode(&zeroed).is_err());
}

#[test]
fn another_version_is_refused_by_its_number_whatever_else_it_holds() {
    let file = b"{\"stonework-state\": 2, \"sha256\": \"...\"}\nanything";
    let error = text::decode(file).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let said = "it has version 2, and this stonework reads version 1";
    assert_eq!(error.to_string(), said);
}

#[test]
fn a_forged_record_is_refused_for_what_is_wrong_with_it() {
    let export = |current: &str| {
        let body = format!(r#"{{"epoch":1,"exports":{{"vda":{{"current":{current}}}}}}}"#);
        let error = forged(&body).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        error.to_string()
    };
    let nodes = |nodes: &str| export(&format!(r#"{{"root":"a","nodes":{{{nodes}}}}}"#));
    let child = |of: &str, to: &str| {
        format!(
            r#""{of}":{{"options":{{"driver":"raw"}},"children":{{"file":{{"node":"{to}"}}}}}}"#
        )
    };
    let leaf = |name: &str| format!(r#""{name}":{{"options":{{"driver":"file"}}}}"#);
    let cases = [
        (nodes(""), "node 'a' is not there"),
        (nodes(&child("a", "b")), "child 'b', which is not there"),
        (nodes(&child("a", "a")), "below itself"),
        (
            nodes(&[child("a", "b"), child("b", "c"), child("c", "b")].join(",")),
            "below itself",
        ),
        (
            nodes(&[child("a", "b"), child("b", "a")].join(",")),
            "below itself",
        ),
        (
            nodes(&[leaf("a"), leaf("b")].join(",")),
            "not below node 'a'",
        ),
        (nodes(r#""a":{"options":{}}"#), "has no driver"),
        (nodes(r#""a":{"options":{"driver":null}}"#), "has no driver"),
        (nodes(r#""a":{"options":[]}"#), "options are an object"),
        (
            nodes(r#""a":{"options":{"driver":"x"},"y":1}"#),
            "unknown field",
        ),
        (nodes(&leaf(&"n".repeat(256))), "cannot be a name"),
        (
            nodes(&[leaf("a"), leaf("\\u001b")].join(",")),
            "cannot be a name",
        ),
        (
            nodes(
                r#""a":{"options":{"driver":"x"},"identity":{"device":1,"inode":1,"cookie":"x"}}"#,
            ),
            "a cookie is no number",
        ),
        (export(r#"{"root":"a"}"#), "missing field"),
        (
            nodes(&format!(r#""a":{{"options":{}"#, "[".repeat(100_000))),
            "recursion",
        ),
    ];
    for (said, expected) in cases {
        assert!(said.contains(expected), "{said}, not {expected}");
        assert!(said.len() < 400, "{said}");
    }
    assert!(forged(r#"{"epoch":-1,"exports":{}}"#).is_err());
    assert!(forged("").is_err());
    assert!(forged(r#"{"epoch":1,"exports":{}}"#).is_ok());
}

#[test]
fn a_graph_of_many_ways_down_is_looked_at_once() {
    // Two children each: more ways from top to bottom than anybody could walk.
    let name = |number: u32| format!("n{number}");
    let nodes = (0..200).map(|number| {
        let children = match number {
            199 => Vec::new(),
            _ => vec![
                format!("file={}", name(number + 1)),
                format!("backing={}", name(number + 1)),
            ],
        };
        let children: Vec<&str> = children.iter().map(String::as_str).collect();
        (name(number), node("raw", &children))
    });
    let diamond = Tree {
        root: name(0),
        nodes: nodes.collect(),
    };
    assert!(diamond.to_string().len() < 1000);
    let written = record(diamond.clone(), None);
    assert_eq!(round_trip(&written), written);
    let given = BTreeMap::from([("vda".to_owned(), diamond)]);
    let verdicts = agree(&written, &given, &|_| None).unwrap();
    assert_eq!(verdicts["vda"], Verdict::AsGiven);
}

#[test]
fn one_name_is_one_node_in_all_that_is_served() {
    let mut record = record(overlay(), Some(plain("other")));
    let export = |file| ExportRecord {
        given: None,
        current: plain(file),
    };
    record.exports.insert("vdb".into(), export("base"));
    record.check().unwrap();
    record.exports.insert("vdb".into(), export("other"));
    let error = text::encode(&record).unwrap_err();
    let said = "export 'vdb': node '#file' is another than in a former export";
    assert_eq!(error.to_string(), said);
}

#[test]
fn any_record_is_read_as_it_was_written() {
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut record = Record {
            epoch: random.bits(),
            exports: BTreeMap::new(),
        };
        for id in 0..random.below(4) {
            let count = random.between(1, 8);
            let nodes = (0..count).map(|number| {
                let mut node = node(&format!("raw,x={}", random.bits()), &[]);
                // Each below the one before, so that all can be reached.
                for (role, role_child) in ["file", "backing", "x"].iter().zip(number + 1..count) {
                    let child = match random.below(5) {
                        0 if role_child > number + 1 => ChildRecord::Absent,
                        choice => ChildRecord::Node {
                            name: format!("{id}n{role_child}"),
                            implied: choice == 1,
                        },
                    };
                    node.children.insert((*role).to_owned(), child);
                }
                node.identity = random.chance(500).then(|| Identity {
                    device: random.bits(),
                    inode: random.bits(),
                    cookie: random.chance(500).then(|| u128::from(random.bits()) << 7),
                });
                (format!("{id}n{number}"), node)
            });
            let current = Tree {
                root: format!("{id}n0"),
                nodes: nodes.collect(),
            };
            let given = random.chance(500).then(|| current.clone());
            let export = ExportRecord { given, current };
            record.exports.insert(format!("export {id}"), export);
        }
        assert_eq!(round_trip(&record), record, "seed {seed}");
    }
}

const QCOW2: &[OptionSpec] = &[option("lazy", OptionKind::Bool, Some("off"), false)];
const FILE: &[OptionSpec] = &[
    option("driver", OptionKind::Text, None, true),
    option("filename", OptionKind::Text, None, true),
    option("offset", OptionKind::Size, Some("0"), true),
    option("locking", OptionKind::Text, Some("auto"), false),
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
        reopen: true,
        changes_data,
        help: "",
    }
}

fn verdict(record: &Record, given: Tree) -> Result<Verdict, Error> {
    let tables = |driver: &str| match driver {
        "qcow2" => Some(vec![QCOW2]),
        "file" => Some(vec![FILE]),
        _ => None,
    };
    let given = BTreeMap::from([("vda".to_owned(), given)]);
    agree(record, &given, &tables).map(|verdicts| verdicts["vda"])
}

#[test]
fn after_a_snapshot_the_first_arguments_give_the_overlay_and_never_the_base_alone() {
    let snapshot = record(overlay(), Some(plain("base")));
    assert_eq!(
        verdict(&snapshot, plain("base")).unwrap(),
        Verdict::AsRecorded
    );
    assert_eq!(verdict(&snapshot, overlay()).unwrap(), Verdict::AsGiven);
    // Not the arguments of before, and not what is served: the operator has to say.
    let mut cached = plain("base");
    let file = cached.nodes.get_mut("#file").unwrap();
    file.options.set("locking", "off");
    let error = verdict(&snapshot, cached).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let said = "cannot serve export 'vda' from node-name=disk,driver=qcow2 [file: \
                driver=file,filename=base,locking=off], as the arguments describe it: it was last \
                served from node-name=snap,driver=qcow2 [backing: node-name=disk,driver=qcow2 [file: \
                driver=file,filename=base]] [file: node-name=top,driver=file,filename=top]. Describe \
                that instead; option --discard-state discards the record, and the guest gets whatever \
                the images in the arguments hold";
    assert_eq!(error.to_string(), said);
}

#[test]
fn new_options_that_change_no_data_are_taken_from_the_arguments() {
    let unchanged = record(plain("base"), Some(plain("base")));
    assert_eq!(
        verdict(&unchanged, plain("base")).unwrap(),
        Verdict::AsRecorded
    );
    let with = |text: &str| {
        let mut given = plain("base");
        let file = given.nodes.get_mut("#file").unwrap();
        file.options =
            Options::parse(&format!("file,filename=base,{text}"), Some("driver")).unwrap();
        verdict(&unchanged, given)
    };
    assert_eq!(with("locking=off").unwrap(), Verdict::AsGiven);
    assert_eq!(with("locking=auto,offset=0k").unwrap(), Verdict::AsRecorded);
    assert!(with("offset=1k").is_err());
    assert!(with("unheard-of=1").is_err());
    assert!(verdict(&unchanged, plain("other")).is_err());
    let mut named = plain("base");
    let disk = named.nodes.remove("disk").unwrap();
    named.nodes.insert("vda-disk".into(), disk);
    named.root = "vda-disk".into();
    assert_eq!(verdict(&unchanged, named).unwrap(), Verdict::AsGiven);
}

#[test]
fn a_backing_image_that_its_overlay_asks_for_need_not_be_in_the_arguments() {
    let with = |backing: &[&str]| {
        let children = [&["file=#file"], backing].concat();
        let mut nodes = vec![
            ("disk", node("qcow2", &children)),
            ("#file", node("file,filename=a", &[])),
        ];
        if backing.iter().any(|child| child.ends_with('b')) {
            nodes.push(("b", node("file,filename=b", &[])));
        }
        tree("disk", &nodes)
    };
    let implied = record(with(&["backing~b"]), None);
    assert_eq!(verdict(&implied, with(&[])).unwrap(), Verdict::AsGiven);
    assert_eq!(
        verdict(&implied, with(&["backing=b"])).unwrap(),
        Verdict::AsGiven
    );
    assert!(verdict(&implied, with(&["backing!"])).is_err());
    let named = record(with(&["backing=b"]), None);
    assert!(verdict(&named, with(&[])).is_err());
    let absent = record(with(&["backing!"]), None);
    assert!(verdict(&absent, with(&[])).is_err());
    assert_eq!(
        verdict(&absent, with(&["backing!"])).unwrap(),
        Verdict::AsGiven
    );
}

#[test]
fn exports_that_only_one_side_has_are_told_apart() {
    let mut record = record(plain("base"), Some(plain("base")));
    let by_command = ExportRecord {
        given: None,
        current: plain("base"),
    };
    record.exports.insert("added".into(), by_command);
    let given = BTreeMap::from([("new".to_owned(), plain("new"))]);
    let verdicts = agree(&record, &given, &|_| None).unwrap();
    let expected = [
        ("added", Verdict::AsRecorded),
        ("new", Verdict::AsGiven),
        ("vda", Verdict::NotGiven),
    ];
    let expected = expected.map(|(id, verdict)| (id.to_owned(), verdict));
    assert_eq!(verdicts, BTreeMap::from(expected));
}

#[test]
fn an_image_is_told_by_its_place_and_by_its_cookie_where_both_have_one() {
    let identity = |inode, cookie| Identity {
        device: 1,
        inode,
        cookie,
    };
    assert!(identity(2, Some(3)).matches(&identity(2, Some(3))));
    assert!(identity(2, Some(3)).matches(&identity(2, None)));
    assert!(!identity(2, Some(3)).matches(&identity(2, Some(4))));
    assert!(!identity(2, Some(3)).matches(&identity(3, Some(3))));
}
