//! Internal snapshots, checks, amendments: who may ask for them, what comes before, and what is said.

use super::*;
use crate::driver::{
    BackingName, CheckReport, Fix, Measured, SnapshotInfo, SnapshotRef, SnapshotSpec,
};
use crate::{Error, ErrorKind};

/// A format with snapshots, which it keeps in memory and makes nothing of.
static ALBUM: DriverType = DriverType {
    name: "album",
    options: ALBUM_OPTIONS,
    children: &[
        ChildSpec {
            name: "file",
            role: Role::IMAGE,
            optional: false,
        },
        ChildSpec {
            name: "backing",
            role: Role::COW,
            optional: true,
        },
    ],
    backing: true,
    open: |request| open(request).boxed_local(),
    measure: Some(|options, source| {
        async move {
            let extra = options.get("extra").map_or(0, |text| text.parse().unwrap());
            let bytes = source.map_or(0, |source| source.root.bytes());
            Ok(Measured {
                required_bytes: bytes + extra,
                fully_allocated_bytes: 2 * bytes + extra,
                bitmaps_bytes: None,
            })
        }
        .boxed_local()
    }),
    ..DriverType::FORMAT
};

const ALBUM_OPTIONS: &[OptionSpec] = &[
    // What its image would say.
    option("damaged", OptionKind::Bool, "off", false),
    option("refuse", OptionKind::Text, "", false),
];

async fn open(request: OpenRequest) -> Result<Opened, Error> {
    let damaged = request.options.bool(ALBUM_OPTIONS, "damaged");
    if damaged && !request.modes.check {
        return Err(Error::new(ErrorKind::Corrupt, "it is damaged"));
    }
    let refuse = request.options.text(ALBUM_OPTIONS, "refuse").to_owned();
    Ok(Opened {
        driver: Box::new(Album {
            damaged,
            refuse,
            snapshots: Vec::new(),
            vm_state: vec![0; 64],
        }),
        io: Arc::new(AlbumIo),
    })
}

struct AlbumIo;

impl DriverIo for AlbumIo {
    fn write<'a>(
        &'a self,
        io: Io<'a>,
        offset: u64,
        from: Segments,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        io.child(0).write(offset, from, flags).boxed_local()
    }
}

struct Album {
    damaged: bool,
    refuse: String,
    snapshots: Vec<SnapshotInfo>,
    vm_state: Vec<u8>,
}

impl Album {
    fn done(&self, what: &str) -> Result<(), Error> {
        log(what.to_owned());
        match self.refuse == what {
            true => Err(Error::new(ErrorKind::NoSpace, "the host has no space left")),
            false => Ok(()),
        }
    }
}

impl Driver for Album {
    fn backing(&self) -> Option<BackingName> {
        self.damaged.then(|| BackingName {
            name: "missing".into(),
            format: None,
        })
    }

    fn has_snapshots(&self) -> bool {
        true
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.snapshots.clone()
    }

    fn snapshot_create(
        &mut self,
        _root: Rc<Root>,
        spec: SnapshotSpec,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            self.done("create")?;
            let next = self.snapshots.len() + 1;
            self.snapshots.push(SnapshotInfo {
                id: spec.id.unwrap_or_else(|| next.to_string()),
                name: spec.name,
                vm_state_bytes: spec.vm_state_bytes,
                ..SnapshotInfo::default()
            });
            Ok(())
        }
        .boxed_local()
    }

    fn snapshot_apply<'a>(
        &'a mut self,
        _root: Rc<Root>,
        snapshot: &'a SnapshotRef,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        async move { self.done(&format!("apply {snapshot}")) }.boxed_local()
    }

    fn snapshot_delete<'a>(
        &'a mut self,
        _root: Rc<Root>,
        snapshot: &'a SnapshotRef,
    ) -> LocalBoxFuture<'a, Result<(), Error>> {
        async move {
            self.done("delete")?;
            let index = snapshot.find(&self.snapshots).expect("it is there");
            self.snapshots.remove(index);
            Ok(())
        }
        .boxed_local()
    }

    fn save_vm_state(
        &mut self,
        _root: Rc<Root>,
        offset: u64,
        from: Segments,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            from.copy_to(&mut self.vm_state[offset as usize..]);
            Ok(())
        }
        .boxed_local()
    }

    fn load_vm_state(
        &mut self,
        _root: Rc<Root>,
        offset: u64,
        into: Segments,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move {
            into.copy_from(&self.vm_state[offset as usize..]);
            Ok(())
        }
        .boxed_local()
    }

    fn check(
        &mut self,
        _root: Rc<Root>,
        fix: Fix,
    ) -> LocalBoxFuture<'_, Result<CheckReport, Error>> {
        async move {
            self.done("check")?;
            let wrong = u64::from(self.damaged);
            Ok(match fix {
                Fix::All => CheckReport {
                    corruptions_fixed: wrong,
                    ..CheckReport::default()
                },
                _ => CheckReport {
                    corruptions: wrong,
                    ..CheckReport::default()
                },
            })
        }
        .boxed_local()
    }

    fn amend_begin(&mut self, _options: &Options) -> Result<(), Error> {
        self.done("amend begin")
    }

    fn amend(
        &mut self,
        _root: Rc<Root>,
        _options: Options,
        force: bool,
    ) -> LocalBoxFuture<'_, Result<(), Error>> {
        async move { self.done(&format!("amend {force}")) }.boxed_local()
    }

    fn amend_end(&mut self) {
        log("amend end".into());
    }
}

/// An album called `disk`, with `more` options.
fn bench_with(more: &str) -> Bench {
    let bench = Bench::with(vec![&ALBUM, &MEMORY, &PASS]);
    bench.add(&format!(
        "driver=album,node-name=disk,file.driver=memory,file.node-name=file{more}"
    ));
    bench
}

impl Bench {
    fn with_control<T: 'static, F>(&self, work: impl FnOnce(Control) -> F) -> T
    where
        F: Future<Output = T> + 'static,
    {
        self.run(work(self.control.clone()))
    }

    fn take(&self, node: &'static str, name: &str, id: Option<&str>) -> Result<(), Error> {
        let spec = SnapshotSpec {
            name: name.into(),
            id: id.map(str::to_owned),
            ..SnapshotSpec::default()
        };
        self.with_control(|control| async move { control.take_snapshot(node, spec).await })
    }

    fn apply(&self, snapshot: SnapshotRef) -> Result<(), Error> {
        self.with_control(|control| async move { control.apply_snapshot("disk", &snapshot).await })
    }

    fn delete(&self, snapshot: SnapshotRef) -> Result<SnapshotInfo, Error> {
        self.with_control(|control| async move { control.delete_snapshot("disk", &snapshot).await })
    }

    fn names(&self) -> Vec<String> {
        let listed = self.with_control(|control| async move { control.snapshots("disk").await });
        listed.unwrap().into_iter().map(|one| one.name).collect()
    }

    fn check(&self, node: &'static str, fix: Fix) -> Result<CheckReport, Error> {
        self.with_control(|control| async move { control.check(node, fix).await })
    }

    fn amend(&self, node: &'static str) -> Result<(), Error> {
        let nothing = Options::default();
        self.with_control(|control| async move { control.amend(node, nothing, true).await })
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>, kind: ErrorKind, says: &[&str]) {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for part in says {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

#[test]
fn snapshots_are_taken_listed_and_deleted_by_what_is_given_of_them() {
    let bench = bench_with("");
    bench.take("disk", "one", None).unwrap();
    bench.take("disk", "two", Some("seven")).unwrap();
    assert_eq!(bench.names(), ["one", "two"]);
    refused(
        bench.take("disk", "one", None),
        ErrorKind::Exists,
        &["'one'"],
    );
    let same_id = bench.take("disk", "three", Some("seven"));
    refused(same_id, ErrorKind::Exists, &["'seven'"]);
    refused(bench.take("disk", "", None), ErrorKind::Invalid, &["name"]);

    let both = |id: &str, name: &str| SnapshotRef {
        id: Some(id.into()),
        name: Some(name.into()),
    };
    let missing = bench.delete(both("seven", "one"));
    refused(
        missing,
        ErrorKind::NotFound,
        &["'one'", "'seven'", "node 'disk'"],
    );
    assert_eq!(bench.delete(both("seven", "two")).unwrap().id, "seven");
    bench.apply(SnapshotRef::name("one")).unwrap();
    refused(
        bench.apply(SnapshotRef::id("9")),
        ErrorKind::NotFound,
        &["'9'"],
    );
    assert_eq!(bench.names(), ["one"]);
}

#[test]
fn a_driver_without_snapshots_is_named_and_a_filter_passes_them_on() {
    let bench = bench_with("");
    bench.add("driver=pass,node-name=top,file=disk");
    let says = ["node 'file'", "driver 'memory'", "no internal snapshots"];
    refused(
        bench.take("file", "one", None),
        ErrorKind::Unsupported,
        &says,
    );
    let listed = bench.with_control(|control| async move { control.snapshots("file").await });
    refused(listed, ErrorKind::Unsupported, &says);
    bench.take("top", "one", None).unwrap();
    assert_eq!(bench.names(), ["one"]);
    refused(bench.take("gone", "one", None), ErrorKind::NotFound, &[]);
}

#[test]
fn what_was_written_is_flushed_before_a_snapshot_and_so_is_the_snapshot() {
    let bench = Bench::with(vec![&ALBUM, &MEMORY, &PASS]);
    bench.add("driver=album,node-name=disk,file.driver=memory,file.node-name=file,file.can=slow");
    let root = bench.root("disk", writer());
    told();
    // Under way when it is asked for.
    let from = Segments::allocate(512, 512);
    let writing = Rc::clone(&root);
    bench.worker.context().spawn(async move {
        let written = writing.write(0, from, WriteFlags::empty()).await;
        log(format!("written {written:?}"));
    });
    bench.take("disk", "one", None).unwrap();
    let told = told();
    let place = |what: &str| told.iter().position(|line| line.starts_with(what));
    assert!(place("written Ok") < place("file flush disk"), "{told:?}");
    assert!(place("file flush disk") < place("create"), "{told:?}");
    assert!(place("written").is_some() && place("create").is_some());
    // Let go again.
    bench.write(&root, 0, 512, 1).unwrap();
}

#[test]
fn a_snapshot_is_applied_to_what_nobody_uses_and_taken_of_what_is_used() {
    let bench = bench_with("");
    let root = bench.root("disk", writer());
    bench.take("disk", "one", None).unwrap();
    let busy = bench.apply(SnapshotRef::name("one"));
    refused(
        busy,
        ErrorKind::Busy,
        &["export 'rw'", "apply a snapshot to"],
    );
    let id = root.id();
    drop(root);
    bench.remove_root(id).unwrap();
    bench.with_control(|control| async move {
        let made = control.change_bitmaps("disk", |bitmaps| bitmaps.add("marks", 512).map(drop));
        made.await.unwrap();
    });
    let busy = bench.apply(SnapshotRef::name("one"));
    refused(busy, ErrorKind::Busy, &["dirty bitmaps"]);
    bench.with_control(|control| async move {
        let removed = control.change_bitmaps("disk", |bitmaps| bitmaps.remove("marks").map(drop));
        removed.await.unwrap();
    });
    told();
    bench.apply(SnapshotRef::name("one")).unwrap();
    assert_eq!(told_of("apply"), ["apply snapshot 'one'"]);
}

#[test]
fn a_read_only_node_keeps_its_snapshots() {
    let bench = bench_with(",read-only=on");
    let denied = bench.take("disk", "one", None);
    refused(denied, ErrorKind::PermissionDenied, &["read-only"]);
    assert!(bench.names().is_empty());
    assert!(bench.check("disk", Fix::None).unwrap().is_clean());
    let denied = bench.check("disk", Fix::Leaks);
    refused(denied, ErrorKind::PermissionDenied, &["read-only"]);
}

#[test]
fn whoever_blocks_snapshots_is_named() {
    let bench = bench_with("");
    let disk = bench.id("disk");
    let operations = [super::super::Operation::InternalSnapshot];
    let blocker = bench.control.block(disk, &operations, "job 'one' is at it");
    refused(
        bench.take("disk", "one", None),
        ErrorKind::Busy,
        &["job 'one'"],
    );
    bench.control.unblock(blocker);
    bench.take("disk", "one", None).unwrap();
}

#[test]
fn a_failure_names_what_was_tried_and_leaves_the_node_in_use() {
    let bench = bench_with(",refuse=create");
    let failed = bench.take("disk", "one", None);
    let says = ["take a snapshot of", "node 'disk'", "'album'", "no space"];
    refused(failed, ErrorKind::NoSpace, &says);
    let root = bench.root("disk", writer());
    bench.write(&root, 0, 512, 1).unwrap();
}

#[test]
fn a_machines_state_is_saved_and_loaded_in_parts() {
    let bench = bench_with("");
    let part = Segments::allocate(8, 1);
    part.fill(7);
    let saved = bench.with_control(|control| {
        let part = part.clone();
        async move { control.save_vm_state("disk", 8, part).await }
    });
    saved.unwrap();
    let into = Segments::allocate(16, 1);
    let loaded = bench.with_control(|control| {
        let into = into.clone();
        async move { control.load_vm_state("disk", 4, into).await }
    });
    loaded.unwrap();
    let bytes = into.to_vec();
    assert_eq!(bytes, [[0; 4], [7; 4], [7; 4], [0; 4]].concat());
}

#[test]
fn a_check_bears_writers_and_a_repair_does_not() {
    let bench = bench_with("");
    refused(
        bench.check("file", Fix::None),
        ErrorKind::Unsupported,
        &["node 'file'", "'memory'", "be checked"],
    );
    let root = bench.root("disk", writer());
    assert!(bench.check("disk", Fix::None).unwrap().is_clean());
    let busy = bench.check("disk", Fix::All);
    refused(busy, ErrorKind::Busy, &["export 'rw'", "repair"]);
    let id = root.id();
    drop(root);
    bench.remove_root(id).unwrap();
    let report = |bench: &Bench| {
        let state = bench.control.read(|graph| {
            let node = graph.node("disk").unwrap();
            Arc::clone(node.state())
        });
        state.report_corruption("it is wrong", None, None, false)
    };
    assert!(report(&bench) && !report(&bench));
    bench.check("disk", Fix::All).unwrap();
    assert!(report(&bench), "after a repair it is news again");
}

#[test]
fn an_image_that_is_too_damaged_for_use_is_opened_to_be_checked_and_closed() {
    let bench = Bench::with(vec![&ALBUM, &MEMORY, &PASS]);
    let text = "driver=album,node-name=disk,damaged=on,file.driver=memory,file.node-name=file";
    refused(bench.try_add(text), ErrorKind::Corrupt, &["damaged"]);
    let check = |fix| {
        let options = options(text);
        bench.with_control(|control| async move { control.check_image(options, fix).await })
    };
    told();
    // Its backing image is missing, and not missed.
    assert_eq!(check(Fix::None).unwrap().corruptions, 1);
    assert_eq!(check(Fix::All).unwrap().corruptions_fixed, 1);
    assert_eq!(bench.control.read(|graph| graph.nodes().count()), 0);
    assert_eq!(told_of("close"), ["file close", "file close"]);
}

#[test]
fn an_amendment_begins_and_ends_whether_or_not_it_succeeds() {
    let bench = bench_with("");
    told();
    bench.amend("disk").unwrap();
    assert_eq!(told_of("amend"), ["amend begin", "amend true", "amend end"]);
    let says = ["amend node 'file'", "'memory'"];
    refused(bench.amend("file"), ErrorKind::Unsupported, &says);

    let bench = bench_with(",refuse=amend true");
    refused(bench.amend("disk"), ErrorKind::NoSpace, &["amend"]);
    assert_eq!(told_of("amend"), ["amend begin", "amend true", "amend end"]);
    let bench = bench_with(",refuse=amend begin");
    refused(bench.amend("disk"), ErrorKind::NoSpace, &["amend"]);
    assert_eq!(told_of("amend"), ["amend begin"]);
    bench.check("disk", Fix::None).unwrap();
}

#[test]
fn a_driver_says_how_large_its_images_become_empty_or_with_what_a_node_has() {
    let bench = bench_with("");
    let measure = |driver: &'static str, node: Option<&'static str>| {
        let mut options = Options::default();
        options.set("extra", "100");
        bench.with_control(|control| async move { control.measure(driver, options, node).await })
    };
    let empty = measure("album", None).unwrap();
    assert_eq!(
        (empty.required_bytes, empty.fully_allocated_bytes),
        (100, 100)
    );
    let full = measure("album", Some("file")).unwrap();
    let expected = (65_536 + 100, 2 * 65_536 + 100);
    assert_eq!((full.required_bytes, full.fully_allocated_bytes), expected);
    refused(
        measure("memory", None),
        ErrorKind::Unsupported,
        &["'memory'"],
    );
    refused(
        measure("album", Some("gone")),
        ErrorKind::NotFound,
        &["'gone'"],
    );
    // The claim of the measurement is gone.
    bench.apply(SnapshotRef::name("one")).unwrap_err();
    bench.remove("disk").unwrap();
}
