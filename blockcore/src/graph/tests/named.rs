//! Children that an image names itself, and what children are to it.

use super::*;
use crate::driver::BackingName;
use crate::{Error, ErrorKind};

/// A protocol of named files in memory, as the driver of plain names.
static FILE: DriverType = DriverType {
    name: "file",
    options: FILE_OPTIONS,
    open: |request| {
        async move {
            let path = request.options.text(FILE_OPTIONS, "filename").to_owned();
            if path.contains("missing") {
                let message = format!("there is no '{path}'");
                return Err(Error::new(ErrorKind::NotFound, message));
            }
            Ok(Opened {
                driver: Box::new(FileDriver(path)),
                io: Arc::new(Memory {
                    name: request.node_name,
                    bytes: Mutex::new(vec![0; 4096]),
                    can: String::new(),
                    busy: AtomicBool::new(false),
                }),
            })
        }
        .boxed_local()
    },
    ..DriverType::PROTOCOL
};

const FILE_OPTIONS: &[OptionSpec] = &[option("filename", OptionKind::Text, "", false)];

struct FileDriver(String);

impl Driver for FileDriver {
    fn exact_name(&self) -> Option<String> {
        Some(self.0.clone())
    }
}

/// A format whose data may be in another file; its options say what its image would.
static SPLIT: DriverType = DriverType {
    name: "split",
    options: SPLIT_OPTIONS,
    children: &[
        ChildSpec {
            name: "file",
            role: Role::IMAGE,
            optional: false,
        },
        ChildSpec {
            name: "data-file",
            role: Role::DATA,
            optional: true,
        },
    ],
    open: |request| {
        async move {
            let text = |name| request.options.text(SPLIT_OPTIONS, name).to_owned();
            let (name, format) = (text("image-names"), text("format"));
            let named = (!name.is_empty()).then(|| BackingName {
                name,
                format: (!format.is_empty()).then_some(format),
            });
            // Its own part is there, the other one only if the options give it.
            assert!(request.children[0].is_some());
            log(format!("open with data: {}", request.children[1].is_some()));
            Ok(Opened {
                driver: Box::new(SplitDriver(named)),
                io: Arc::new(Pass),
            })
        }
        .boxed_local()
    },
    ..DriverType::FORMAT
};

const SPLIT_OPTIONS: &[OptionSpec] = &[
    option("image-names", OptionKind::Text, "", false),
    option("format", OptionKind::Text, "", false),
];

struct SplitDriver(Option<BackingName>);

impl Driver for SplitDriver {
    fn named_children(&self) -> Vec<(usize, BackingName)> {
        self.0.iter().map(|named| (1, named.clone())).collect()
    }

    fn child_role(&self, index: usize) -> Option<Role> {
        let split = self.0.is_some() && index == 0;
        split.then_some(Role::METADATA | Role::PRIMARY)
    }
}

fn bench() -> Bench {
    Bench::with(vec![&FILE, &SPLIT, &MEMORY])
}

/// A `split` node called `disk` on `/images/disk`, with `more` options.
fn split(more: &str) -> String {
    format!("driver=split,node-name=disk,file.driver=file,file.filename=/images/disk{more}")
}

impl Bench {
    /// What the data file of `disk` is, and the two children's roles.
    fn data(&self) -> (Option<String>, Vec<Role>) {
        self.control.read(|graph| {
            let disk = graph.node("disk").unwrap().id();
            let data = graph.children(disk).find(|(name, _)| *name == "data-file");
            let data = data.map(|(_, node)| node.exact_name().unwrap_or("nameless").to_owned());
            let roles = graph.shape.children(disk).map(|(_, edge)| edge.role);
            (data, roles.collect())
        })
    }
}

#[test]
fn what_the_image_names_is_opened_beside_it_when_its_driver_has_opened() {
    let bench = bench();
    bench.add(&split(",image-names=disk.data"));
    assert_eq!(told_of("open"), ["open with data: false"]);
    let roles = vec![Role::METADATA | Role::PRIMARY, Role::DATA];
    assert_eq!(bench.data(), (Some("/images/disk.data".to_owned()), roles));
    // Opening the image finds it again, so its name says it all.
    let disk = bench.id("disk");
    let named = bench.control.read(|graph| graph.described(disk));
    let options = named.full.to_json().to_string();
    assert!(!options.contains("data-file"), "{options}");
    bench.remove("disk").unwrap();
    assert_eq!(bench.control.read(|graph| graph.nodes().count()), 0);
}

#[test]
fn a_name_in_an_image_is_a_path_whatever_it_looks_like() {
    for (named, path) in [
        ("/elsewhere/data", "/elsewhere/data"),
        ("file:data", "/images/file:data"),
        ("json:{}", "/images/json:{}"),
    ] {
        let bench = bench();
        bench.add(&split(&format!(",image-names={named}")));
        assert_eq!(bench.data().0.as_deref(), Some(path));
    }
}

#[test]
fn raw_is_the_file_itself_and_another_format_is_opened_on_it() {
    let bench = bench();
    bench.add(&split(",image-names=data,format=raw"));
    assert_eq!(bench.data().0.as_deref(), Some("/images/data"));
    let bench = super::named::bench();
    bench.add(&split(",image-names=data,format=split"));
    let data = bench.child("disk", "data-file").unwrap();
    assert!(bench.child(&data, "file").is_some());
    let error = bench.try_add(
        "driver=split,node-name=other,image-names=x,format=nothing,file.driver=file,\
         file.filename=/images/other",
    );
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!bench.has("other"));
}

#[test]
fn what_the_options_give_is_taken_instead_and_what_they_refuse_is_missed() {
    let bench = bench();
    bench.add(&split(
        ",image-names=missing,data-file.driver=file,data-file.filename=/given",
    ));
    assert_eq!(told_of("open"), ["open with data: true"]);
    assert_eq!(bench.data().0.as_deref(), Some("/given"));
    let described = bench
        .control
        .read(|graph| graph.described(graph.node("disk").unwrap().id()));
    assert!(described.exact.is_none());

    let bench = super::named::bench();
    let mut refused = options(&split(",image-names=data"));
    refused.set_value("data-file", crate::options::OptionValue::Null);
    let control = bench.control.clone();
    let error = bench.run(async move { control.add(refused).await });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("'data-file'"), "{error}");
}

#[test]
fn a_named_child_that_is_not_there_fails_the_opening_and_says_who_named_it() {
    let bench = bench();
    let error = bench.try_add(&split(",image-names=missing")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    assert!(
        text.contains("'missing'") && text.contains("node 'disk'"),
        "{text}"
    );
    assert_eq!(bench.control.read(|graph| graph.nodes().count()), 0);
}

#[test]
fn without_a_named_child_the_roles_are_those_of_the_type() {
    let bench = bench();
    bench.add(&split(""));
    assert_eq!(bench.data(), (None, vec![Role::IMAGE]));
}
