//! Handing an image to another process, and taking it back.

use std::process::Command;

use blockcore::ErrorKind;
use blockcore::graph::RootSpec;

use crate::Host;

fn qemu_io(path: &str, command: &str) -> bool {
    let status = Command::new("qemu-io")
        .args(["-f", "raw", "-c", command, path])
        .output()
        .expect("qemu-io is installed");
    status.status.success()
}

#[test]
fn an_inactive_image_is_another_processes_and_comes_back_with_what_that_wrote() {
    let host = Host::new();
    host.place.file("base.raw", &vec![0x42; 256 << 10]);
    host.make_overlay("top.img", "base.raw", Some("raw"));
    host.add("overlay,node-name=disk,file.driver=file,file.filename=PLACE/top.img");
    host.write("disk", 0, &[1; 65536]).expect("it is ours");
    let path = host.path("top.img");
    let set = |active: bool| {
        host.run(move |control| async move { control.set_active("disk", active).await })
    };
    // A format keeps others out even while nobody uses it.
    assert!(!qemu_io(&path, "write -P 9 200k 4k"));
    set(false).expect("nobody writes");
    assert!(qemu_io(&path, "write -P 9 128k 4k"), "the image is free");
    let refused = host.run(|control| async move {
        control
            .add_root("disk", RootSpec::writer("export 'vda'"))
            .await
    });
    let error = refused.expect_err("it is another's");
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(error.report().contains("inactive"), "{}", error.report());
    set(true).expect("the other is gone");
    // The first cluster's data lies at 128 KiB of the image.
    assert!(host.read("disk", 0, 4096) == [9; 4096]);
    assert!(!qemu_io(&path, "write -P 9 200k 4k"));
}

#[test]
fn an_image_that_somebody_writes_to_is_not_handed_over() {
    let host = Host::new();
    host.place.sparse("disk.raw", 1 << 20);
    host.add("raw,node-name=disk,file.driver=file,file.filename=PLACE/disk.raw");
    host.run(|control| async move {
        let spec = RootSpec::writer("export 'vda'");
        let id = control.add_root("disk", spec).await.unwrap();
        let error = control.set_active("disk", false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(
            error.report().contains("export 'vda'"),
            "{}",
            error.report()
        );
        // Nothing of it stays.
        assert!(control.read(|graph| !graph.modes(graph.node("disk").unwrap().id()).inactive));
        let root = control.root_here(id).unwrap();
        let from = blockcore::io::buffer::Segments::allocate(512, 512);
        let flags = blockcore::driver::WriteFlags::empty();
        root.write(0, from, flags).await.expect("it is still ours");
        drop(root);
        control.remove_root(id).await.unwrap();
    });
}
