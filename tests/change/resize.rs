//! Changing a node's length under its users.

use std::cell::Cell;
use std::rc::Rc;

use blockcore::ErrorKind;
use blockcore::driver::Preallocation;
use blockcore::graph::{Operation, RootSpec, RootUser};

use crate::Host;

#[derive(Default)]
struct User(Cell<u64>);

impl RootUser for User {
    fn resized(&self, bytes: u64) {
        self.0.set(bytes);
    }
}

#[test]
fn users_and_bitmaps_follow_a_node_that_changes_its_length() {
    let host = Host::new();
    host.place.file("disk.raw", &vec![0x42; 1 << 20]);
    host.add("raw,node-name=disk,file.driver=file,file.filename=PLACE/disk.raw");
    let user = Rc::new(User::default());
    let told = Rc::clone(&user);
    host.run(move |control| async move {
        let spec = RootSpec {
            user: Some(told),
            ..RootSpec::writer("a guest").in_units_of(512)
        };
        let id = control.add_root("disk", spec).await.unwrap();
        let root = control.root_here(id).unwrap();
        let made = control.change_bitmaps("disk", |bitmaps| bitmaps.add("b", 65536)?.enable());
        made.await.unwrap();
        for bytes in [3 << 20, 1 << 19] {
            control
                .resize("disk", bytes, Preallocation::Off)
                .await
                .unwrap();
            control.take_notices();
            assert_eq!(root.bytes(), bytes);
            // What follows of it is done in tasks of control.
            while control.read(|graph| {
                let bitmaps = graph.node("disk").unwrap().bitmaps();
                bitmaps.get("b").unwrap().bits().length() != bytes
            }) {
                control
                    .context()
                    .delay(std::time::Duration::from_millis(1))
                    .await;
            }
        }
        drop(root);
        control.remove_root(id).await.unwrap();
    });
    assert_eq!(user.0.get(), 1 << 19);
    let file = std::fs::read(host.place.join("disk.raw")).unwrap();
    assert!(file == vec![0x42; 1 << 19]);
}

#[test]
fn what_grows_reads_as_zeroes_also_above_a_longer_backing_image() {
    let host = Host::new();
    host.place.file("base.raw", &vec![0x42; 1 << 20]);
    host.make_overlay("top.img", "base.raw", Some("raw"));
    host.add("overlay,node-name=disk,file.driver=file,file.filename=PLACE/top.img");
    let resized = host.run(|control| async move {
        let grown = control.resize("disk", 512 << 10, Preallocation::Off).await;
        control.take_notices();
        grown
    });
    resized.expect("it can grow");
    assert!(host.read("disk", 0, 256 << 10) == vec![0x42; 256 << 10]);
    assert!(host.read("disk", 256 << 10, 256 << 10) == vec![0; 256 << 10]);
}

#[test]
fn a_length_that_cannot_be_had_is_refused_with_the_reason_and_stays() {
    let host = Host::new();
    for file in ["disk.raw", "part.raw", "still.raw"] {
        host.place.sparse(file, 1 << 20);
    }
    host.add("raw,node-name=disk,file.driver=file,file.filename=PLACE/disk.raw");
    // Who has a part of a file has the file stay as long as it is, also while nobody uses the part.
    host.add("raw,node-name=part,size=64k,file.driver=file,file.filename=PLACE/part.raw");
    host.add("raw,node-name=still,read-only=on,file.driver=file,file.filename=PLACE/still.raw");
    let resize = |node: &'static str, bytes: u64, how: Preallocation| {
        let resized =
            host.run(move |control| async move { control.resize(node, bytes, how).await });
        resized.expect_err("it cannot be").kind()
    };
    let off = Preallocation::Off;
    assert_eq!(resize("none", 512, off), ErrorKind::NotFound);
    assert_eq!(resize("part", 512, off), ErrorKind::Unsupported);
    assert_eq!(resize("still", 512, off), ErrorKind::PermissionDenied);
    assert_eq!(resize("disk", u64::MAX, off), ErrorKind::Invalid);
    assert_eq!(resize("disk", 512, Preallocation::Full), ErrorKind::Invalid);
    let blocked = host.run(|control| async move {
        let id = control.read(|graph| graph.node("disk").unwrap().id());
        let blocker = control.block(id, &[Operation::Resize], "job 'backup0' copies it");
        let refused = control.resize("disk", 512, off).await.unwrap_err();
        control.unblock(blocker);
        control.resize("disk", 2 << 20, off).await.unwrap();
        refused
    });
    assert_eq!(blocked.kind(), ErrorKind::Busy);
    assert!(
        blocked.report().contains("job 'backup0'"),
        "{}",
        blocked.report()
    );
    let bytes = std::fs::metadata(host.place.join("disk.raw"))
        .unwrap()
        .len();
    assert_eq!(bytes, 2 << 20);
}
