//! Making images.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;

/// Makes an image in a new file `NAME` of the folder.
fn create(place: &Place, name: &str, more: &str) -> Result<(), Error> {
    let context = IoContext::new(make(EngineChoice::Auto)?);
    let path = place.join(name);
    let options = Options::parse(&format!("file.filename={}{more}", path.display()), None)?;
    let created = formats::qcow2::create::create(Rc::clone(&context), options);
    let created = context.block_on(created);
    context.abandon();
    created
}

/// What QEMU calls these options.
fn for_qemu(options: &str) -> String {
    let names = [
        ("version=", "compat="),
        ("cluster-size", "cluster_size"),
        ("refcount-bits", "refcount_bits"),
        ("lazy-refcounts", "lazy_refcounts"),
        ("backing-file", "backing_file"),
        ("backing-fmt", "backing_fmt"),
        ("extended-l2", "extended_l2"),
        ("compression-type", "compression_type"),
    ];
    let mut text = options.trim_start_matches(',').to_owned();
    for (ours, theirs) in names {
        text = text.replace(ours, theirs);
    }
    text
}

/// What an image says of itself, where two of the same options must agree.
fn described(place: &Place, image: &str) -> Value {
    let mut info = json(place, "info", image);
    let info = info.as_object_mut().expect("an object");
    for name in ["filename", "actual-size", "children"] {
        info.remove(name);
    }
    Value::Object(info.clone())
}

fn check_clean(place: &Place, image: &str, what: &str) -> Value {
    let output = qemu_img(place, &["check", "--output=json", "-f", "qcow2", image]);
    assert_eq!(output.status.code(), Some(0), "{what}: {output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn an_image_is_what_qemu_makes_of_the_same_options() {
    let place = Place::new();
    place.sparse("base", 3 * MIB);
    let mut all = Vec::new();
    for version in ["v2", "v3"] {
        for size in ["0", "512", "3M", "1G"] {
            for cluster in ["512", "4k", "64k", "2M"] {
                all.push(format!(
                    ",size={size},version={version},cluster-size={cluster}"
                ));
            }
        }
    }
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        all.push(format!(",size=5M,refcount-bits={bits}"));
        all.push(format!(
            ",size=5M,cluster-size=512,preallocation=metadata,refcount-bits={bits}"
        ));
    }
    for more in [
        ",size=1T",
        ",size=3M,lazy-refcounts=on",
        ",size=3M,extended-l2=on",
        ",size=3M,extended-l2=on,cluster-size=16k",
        ",size=3M,compression-type=zstd",
        ",size=3M,backing-file=base,backing-fmt=raw",
        ",size=3M,backing-file=base,backing-fmt=raw,cluster-size=512",
        ",size=3M,version=v2,backing-file=base,backing-fmt=raw",
        ",size=3M,extended-l2=on,backing-file=base,backing-fmt=raw,preallocation=metadata",
        ",size=3M,preallocation=metadata",
        ",size=3000320,preallocation=metadata",
        ",size=3M,preallocation=falloc",
        ",size=3M,preallocation=full",
        ",size=3M,preallocation=full,version=v2,cluster-size=1k",
        ",size=3M,preallocation=full,extended-l2=on",
        ",size=600M,preallocation=metadata,cluster-size=4k",
    ] {
        all.push(more.to_owned());
    }
    for more in all {
        create(&place, "ours", &more).unwrap_or_else(|error| panic!("{more}: {}", error.report()));
        let args = for_qemu(&more);
        must(
            "qemu-img",
            &place,
            &["create", "-q", "-f", "qcow2", "-o", &args, "theirs"],
        );
        assert_eq!(
            described(&place, "ours"),
            described(&place, "theirs"),
            "{more}"
        );
        let (ours, theirs) = (
            check_clean(&place, "ours", &more),
            check_clean(&place, "theirs", &more),
        );
        for name in [
            "allocated-clusters",
            "total-clusters",
            "fragmented-clusters",
        ] {
            assert_eq!(ours.get(name), theirs.get(name), "{more}: {name}");
        }
        must(
            "qemu-img",
            &place,
            &[
                "compare", "-q", "-f", "qcow2", "-F", "qcow2", "ours", "theirs",
            ],
        );
        for name in ["ours", "theirs"] {
            fs::remove_file(place.join(name)).expect("it is there");
        }
    }
}

#[test]
fn a_new_image_can_be_written_by_qemu_and_stays_clean() {
    let place = Place::new();
    for more in [
        "",
        ",version=v2",
        ",cluster-size=512",
        ",cluster-size=512,refcount-bits=64",
        ",refcount-bits=1",
        ",extended-l2=on",
        ",preallocation=metadata",
        ",preallocation=metadata,extended-l2=on",
        ",preallocation=falloc,cluster-size=1k",
        ",lazy-refcounts=on",
        ",compression-type=zstd",
    ] {
        create(&place, "disk", &format!(",size=8M{more}")).expect("there is room");
        let writes = [
            "write -P 1 0 1M",
            "write -P 2 3000000 70000",
            "write -P 3 8257536 128k",
        ];
        let reads = [
            "read -P 1 0 1M",
            "read -P 2 3000000 70000",
            "read -P 0 4M 1M",
            "read -P 3 8257536 128k",
        ];
        for command in writes.iter().chain(&reads) {
            let output = must("qemu-io", &place, &["-f", "qcow2", "-c", command, "disk"]);
            assert!(!output.contains("failed"), "{more}: {command}: {output}");
        }
        check_clean(&place, "disk", more);
        fs::remove_file(place.join("disk")).expect("it is there");
    }
}

#[test]
fn preallocation_decides_what_a_new_image_occupies() {
    let place = Place::new();
    for (preallocation, least, most) in [
        ("off", 0, MIB),
        ("metadata", 0, MIB),
        ("falloc", 32 * MIB, 34 * MIB),
        ("full", 32 * MIB, 34 * MIB),
    ] {
        let options = format!(",size=32M,preallocation={preallocation}");
        create(&place, "disk", &options).expect("there is room");
        let metadata = fs::metadata(place.join("disk")).expect("it is there");
        let occupied = metadata.blocks() * 512;
        assert!(
            (least..=most).contains(&occupied),
            "{preallocation}: {occupied}"
        );
        fs::remove_file(place.join("disk")).expect("it is there");
    }
}

#[test]
fn an_external_data_file_is_made_too_and_found_by_its_name() {
    let place = Place::new();
    for (more, raw) in [
        ("", false),
        (",data-file-raw=on", true),
        (",data-file-raw=on,extended-l2=on", true),
        (",preallocation=full", false),
        (",cluster-size=512,data-file-raw=on", true),
    ] {
        let data = place.join("data");
        let options = format!(",size=4M,data-file.filename={}{more}", data.display());
        create(&place, "disk", &options).unwrap_or_else(|e| panic!("{more}: {}", e.report()));
        assert_eq!(fs::metadata(&data).expect("it was made").len(), 4 * MIB);
        let info = json(&place, "info", "disk");
        let specific = &info["format-specific"]["data"];
        assert_eq!(
            specific["data-file"],
            data.to_str().expect("text"),
            "{info}"
        );
        assert_eq!(specific["data-file-raw"], raw, "{info}");
        check_clean(&place, "disk", more);
        if raw {
            // What is in it is on the disk, though nobody has written that through the image.
            let mut bytes = vec![0; 4 << 20];
            bytes[5000] = 7;
            fs::write(&data, &bytes).expect("it is ours");
            let args = ["-f", "qcow2", "-c", "read -P 7 5000 1", "disk"];
            let output = must("qemu-io", &place, &args);
            assert!(!output.contains("failed"), "{more}: {output}");
        }
        for path in [data, place.join("disk")] {
            fs::remove_file(path).expect("it is there");
        }
    }
}

#[test]
fn options_that_exclude_each_other_are_refused_and_leave_no_file() {
    let place = Place::new();
    let data = format!("data-file.filename={}", place.join("data").display());
    for (more, why) in [
        ("version=v3", "size"),
        ("size=1000", "a multiple of 512"),
        ("size=1M,cluster-size=513", "power of two from 512 to 2M"),
        ("size=1M,cluster-size=256", "power of two from 512 to 2M"),
        ("size=1M,cluster-size=4M", "power of two from 512 to 2M"),
        ("size=1M,refcount-bits=3", "power of two up to 64"),
        ("size=1M,refcount-bits=128", "power of two up to 64"),
        ("size=1M,refcount-bits=0", "power of two up to 64"),
        ("size=1M,version=v2,refcount-bits=8", "needs 'version=v3'"),
        ("size=1M,version=v2,lazy-refcounts=on", "needs 'version=v3'"),
        ("size=1M,version=v2,extended-l2=on", "needs 'version=v3'"),
        (
            "size=1M,version=v2,compression-type=zstd",
            "needs 'version=v3'",
        ),
        ("size=1M,version=v2,DATA", "needs 'version=v3'"),
        ("size=1M,version=v4", "v2, v3"),
        (
            "size=1M,extended-l2=on,cluster-size=8k",
            "at least 16384 bytes",
        ),
        ("size=1M,backing-file=base", "needs 'backing-fmt'"),
        ("size=1M,backing-fmt=raw", "needs 'backing-file'"),
        (
            "size=1M,backing-file=b,backing-fmt=raw,preallocation=metadata",
            "extended-l2=on",
        ),
        ("size=1M,data-file-raw=on", "needs 'data-file'"),
        (
            "size=1M,DATA,data-file-raw=on,backing-file=b,backing-fmt=raw",
            "as raw",
        ),
        ("size=1T,cluster-size=512", "longer L1 table"),
        ("size=8E", "2^63"),
        ("size=1M,colour=red", "colour"),
        ("size=1M,file.colour=red", "colour"),
        ("size=1M,data-file.colour=red", "colour"),
        ("size=1M,file.driver=null-co", "null-co"),
    ] {
        let error = create(&place, "disk", &format!(",{}", more.replace("DATA", &data)));
        let error = error.expect_err(more);
        assert!(error.report().contains(why), "{more}: {}", error.report());
        let left = fs::read_dir(place.path()).expect("it is there").count();
        assert_eq!(left, 0, "{more} leaves a file");
    }
}

#[test]
fn a_name_that_does_not_fit_into_the_header_is_refused_and_leaves_no_file() {
    let place = Place::new();
    for (cluster, bytes, fits) in [(512, 376, true), (512, 377, false), (65536, 1023, true)] {
        let name = "b".repeat(bytes);
        let options =
            format!(",size=1M,cluster-size={cluster},backing-file={name},backing-fmt=raw");
        let created = create(&place, "disk", &options);
        assert_eq!(created.is_ok(), fits, "{cluster}, {bytes}: {created:?}");
        let path = place.join("disk");
        assert_eq!(path.exists(), fits);
        if fits {
            fs::remove_file(path).expect("it is there");
        }
    }
}

#[test]
fn a_file_that_exists_is_left_as_it_is() {
    let place = Place::new();
    place.file("disk", b"precious");
    let error = create(&place, "disk", ",size=1M").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    // Nor is what was made before that was found out kept.
    let data = place.file("data", b"precious too");
    let options = format!(",size=1M,data-file.filename={}", data.display());
    let error = create(&place, "other", &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    assert!(!place.join("other").exists());
    for (name, contents) in [("disk", &b"precious"[..]), ("data", b"precious too")] {
        assert_eq!(fs::read(place.join(name)).expect("it is there"), contents);
    }
}

#[test]
fn an_image_made_on_a_node_takes_the_place_of_what_was_there() {
    let place = Place::new();
    for (more, before) in [
        ("", 0),
        ("", 9 << 20),
        (",preallocation=metadata", 9 << 20),
        (",preallocation=full", 100),
    ] {
        let path = place.file("disk", &vec![0xee; before]);
        let options = Options::parse(&format!("size=4M{more}"), None).expect("options");
        let created = on_file(&path, |root| async move {
            formats::qcow2::create::create_on(&root, None, &options).await
        });
        created.unwrap_or_else(|error| panic!("{more}: {}", error.report()));
        check_clean(&place, "disk", more);
        let args = ["-f", "qcow2", "-c", "read -P 0 0 4M", "disk"];
        let output = must("qemu-io", &place, &args);
        assert!(!output.contains("failed"), "{more}: {output}");
    }
}
