//! What nodes are called, which backing images are opened, and what is never guessed.

use blockcore::options::Options;
use blockcore::{ErrorKind, IoError};

use crate::Host;

#[test]
fn a_backing_image_is_opened_as_the_header_says_relative_to_its_overlay() {
    let host = Host::new();
    host.place.file("base.raw", &vec![0x42; 256 << 10]);
    host.make_overlay("top.img", "base.raw", Some("raw"));
    let node = host.add("overlay,node-name=disk,file.driver=file,file.filename=PLACE/top.img");
    assert!(host.read("disk", 4096, 4096) == [0x42; 4096]);
    // Nothing differs from what the name alone would open.
    assert_eq!(host.name_of(node), host.path("top.img"));
    let (header, full) = host.control.read(|graph| {
        let header = graph.node_by_id(node).unwrap().backing_in_header().cloned();
        (header.unwrap(), graph.full_backing_name(node).unwrap())
    });
    assert_eq!(header.name, "base.raw");
    assert_eq!(full, Some(host.path("base.raw")));
    let (depth, read_only) = host.control.read(|graph| {
        let below = graph.backing_of(node).unwrap();
        (graph.chain_depth(node), graph.modes(below).read_only)
    });
    assert_eq!((depth, read_only), (1, true));
}

#[test]
fn another_backing_node_than_the_headers_makes_the_name_say_everything() {
    let host = Host::new();
    host.place.file("base.raw", &vec![0x42; 256 << 10]);
    host.place.file("other.raw", &vec![0x43; 256 << 10]);
    host.make_overlay("top.img", "base.raw", Some("raw"));
    let top = "overlay,node-name=disk,file.driver=file,file.filename=PLACE/top.img";
    let other = "backing.driver=raw,backing.file.driver=file,backing.file.filename=PLACE/other.raw";
    let node = host.add(&format!("{top},{other}"));
    assert!(host.read("disk", 0, 512) == [0x43; 512]);
    let name = host.name_of(node);
    assert!(name.starts_with("json:{"), "{name}");
    assert!(
        name.contains("other.raw") && name.contains("top.img"),
        "{name}"
    );
    assert!(host.control.read(|graph| graph.is_backing_overridden(node)));
    host.remove("disk");
    // The name opens the same node again.
    let options = blockcore::filename::parse_json_name(&name)
        .unwrap()
        .unwrap();
    let again = host.run(move |control| async move {
        let mut options: Options = options;
        options.set("node-name", "disk");
        control.add(options).await
    });
    assert_eq!(host.name_of(again.unwrap()), name);
    assert!(host.read("disk", 0, 512) == [0x43; 512]);
    host.remove("disk");
    // Told to have none, it reads zeroes, and says so.
    let node = host.add(&format!("{top},backing="));
    assert!(host.read("disk", 0, 512) == [0; 512]);
    assert!(
        host.name_of(node).contains("\"backing\":null"),
        "{}",
        host.name_of(node)
    );
}

#[test]
fn a_backing_image_whose_format_is_not_known_is_never_guessed() {
    let host = Host::new();
    host.place.file("base.raw", &vec![0x42; 256 << 10]);
    let open = "overlay,node-name=disk,file.driver=file,file.filename=PLACE/top.img";
    for (format, kind, words) in [
        (
            None,
            ErrorKind::Invalid,
            &["base.raw", "not recorded", "backing.driver"][..],
        ),
        (
            Some("qcow9"),
            ErrorKind::NotFound,
            &["base.raw", "no driver 'qcow9'"],
        ),
    ] {
        host.make_overlay("top.img", "base.raw", format);
        let error = host.try_add(open).expect_err("it would have to be guessed");
        assert_eq!(error.kind(), kind, "{}", error.report());
        for word in words {
            assert!(error.report().contains(word), "{}", error.report());
        }
    }
    host.make_overlay("top.img", "gone:base", Some("raw"));
    let error = host.try_add(open).expect_err("there is no such protocol");
    assert!(
        error.report().contains("protocol 'gone'"),
        "{}",
        error.report()
    );
}

#[test]
fn a_chain_that_is_a_loop_is_refused_and_nothing_stays_open() {
    let host = Host::new();
    for (file, backing) in [("a.img", "b.img"), ("b.img", "a.img")] {
        host.make_overlay(file, backing, Some("overlay"));
    }
    let error = host
        .try_add("overlay,node-name=disk,read-only=on,file.driver=file,file.filename=PLACE/a.img")
        .expect_err("it has no end");
    assert!(error.report().contains("loop"), "{}", error.report());
    assert_eq!(host.control.read(|graph| graph.nodes().count()), 0);
}

#[test]
fn an_image_in_a_chain_is_found_by_any_of_its_names() {
    let host = Host::new();
    host.place.file("base.raw", &vec![0x42; 256 << 10]);
    std::fs::create_dir(host.place.join("dir")).unwrap();
    std::os::unix::fs::symlink("../base.raw", host.place.join("dir/link")).unwrap();
    host.make_overlay("mid.img", "base.raw", Some("raw"));
    host.make_overlay("top.img", "mid.img", Some("overlay"));
    let top = host.add("overlay,node-name=disk,file.driver=file,file.filename=PLACE/top.img");
    let find = |name: String| {
        host.run(move |control| async move {
            let found = control.find_in_chain(top, &name).await;
            found.map(|id| control.read(|graph| graph.node_by_id(id).unwrap().driver_name()))
        })
    };
    for name in ["base.raw", "./base.raw", "dir/../base.raw", "dir/link"] {
        assert_eq!(find(name.to_owned()), Some("raw"), "{name}");
    }
    assert_eq!(find(host.path("base.raw")), Some("raw"));
    assert_eq!(find("mid.img".to_owned()), Some("overlay"));
    for name in ["", "top.img", "none.img", "nbd:base.raw"] {
        assert_eq!(find(name.to_owned()), None, "'{name}'");
    }
}

#[test]
fn a_disk_whose_format_was_guessed_cannot_be_made_to_look_like_another() {
    let host = Host::new();
    host.place.file("disk.raw", &vec![0x42; 256 << 10]);
    let name = host.path("disk.raw");
    let options = host.options("node-name=disk");
    let refused = {
        let (name, options) = (name.clone(), options.clone());
        host.run(move |control| async move {
            let mut change = control.begin().await;
            let added = change.add_image(&name, options, false).await;
            change.abort().await;
            added
        })
    };
    let error = refused.expect_err("nobody asked to guess").report();
    assert!(error.contains("not guessed"), "{error}");
    host.run(move |control| async move {
        let mut change = control.begin().await;
        change
            .add_image(&name, options, true)
            .await
            .expect("it is raw");
        let prepared = change.prepare().await.expect("nobody uses it");
        prepared.commit().finish().await.expect("nothing to close");
    });
    let mut header = vec![0; 4096];
    header[..8].copy_from_slice(b"overlay\x01");
    assert_eq!(host.write("disk", 0, &header), Err(IoError::ReadOnly));
    // Nor in pieces.
    host.write("disk", 0, b"over")
        .expect("that is no header yet");
    assert_eq!(host.write("disk", 4, b"lay\x01"), Err(IoError::ReadOnly));
    host.write("disk", 512, &header)
        .expect("elsewhere it is only data");
    host.write("disk", 0, &[7; 4096])
        .expect("anything else may be written");
    assert!(host.read("disk", 0, 512) == [7; 512]);
}

#[test]
fn only_what_defers_to_nothing_is_sure_to_be_zero_when_it_is_new() {
    let host = Host::new();
    host.place.sparse("base.raw", 256 << 10);
    host.make_overlay("top.img", "base.raw", Some("raw"));
    host.place.sparse("new.img", 0);
    for (options, zero) in [
        ("file,node-name=disk,filename=PLACE/base.raw", true),
        (
            "throttle,node-name=disk,throttle-group=g,file.driver=file,file.filename=PLACE/base.raw",
            true,
        ),
        ("null-co,node-name=disk", false),
        (
            "overlay,node-name=disk,file.driver=file,file.filename=PLACE/top.img",
            false,
        ),
    ] {
        let group = host.control.add_throttle_group("g", Default::default());
        let node = host.add(options);
        let known = host.control.read(|graph| graph.has_zero_init(node));
        assert_eq!(known, zero, "{options}");
        host.remove("disk");
        if group.is_ok() {
            host.control
                .remove_throttle_group("g")
                .expect("nobody uses it");
        }
    }
}
