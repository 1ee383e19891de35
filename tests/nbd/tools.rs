//! What others' tools see of our server, beside what they see of `qemu-storage-daemon`'s.

use std::path::Path;

use serde_json::json;

use crate::setup::{Server, Which, python, run};

/// Images of many shapes: name, format. Made anew in the folder.
fn corpus(folder: &Path) -> Vec<(&'static str, &'static str)> {
    let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let create = |name: &str, more: &[&str], bytes: &str| {
        let path = at(name);
        run(&[
            &["qemu-img", "create", "-q", "-f", "qcow2"],
            more,
            &[&path, bytes],
        ]
        .concat());
    };
    let fill = |name: &str, commands: &[&str]| {
        let path = at(name);
        let mut words = vec!["qemu-io", "-f", "qcow2"];
        for command in commands {
            words.extend(["-c", command]);
        }
        words.push(&path);
        run(&words);
    };
    create("empty.qcow2", &[], "3M");
    create("base.qcow2", &[], "8M");
    let pieces = [
        "write 0 1M",
        "write -z 2M 1M",
        "write 5M 128K",
        "write 7M 64K",
    ];
    fill("base.qcow2", &pieces);
    let (base, middle) = (at("base.qcow2"), at("middle.qcow2"));
    create("middle.qcow2", &["-F", "qcow2", "-b", &base], "16M");
    fill(
        "middle.qcow2",
        &["write 512K 1M", "write 9M 64K", "write -z 5M 64K"],
    );
    create("top.qcow2", &["-F", "qcow2", "-b", &middle], "16M");
    run(&[
        "qemu-img",
        "bitmap",
        "--add",
        "-g",
        "64K",
        &at("top.qcow2"),
        "b0",
    ]);
    run(&[
        "qemu-img",
        "bitmap",
        "--add",
        "-g",
        "512",
        &at("top.qcow2"),
        "b1",
    ]);
    fill(
        "top.qcow2",
        &[
            "write 600K 3K",
            "discard 0 64K",
            "write 15M 1M",
            "write 3M 256K",
        ],
    );
    create(
        "wide.qcow2",
        &["-o", "extended_l2=on,cluster_size=128k"],
        "4M",
    );
    fill(
        "wide.qcow2",
        &["write 4K 4K", "write 16K 60K", "write -z 1M 6K"],
    );
    let packed = at("packed.qcow2");
    run(&["qemu-img", "convert", "-c", "-O", "qcow2", &middle, &packed]);
    let raw = at("sparse.raw");
    run(&["qemu-img", "create", "-q", "-f", "raw", &raw, "5M"]);
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write 1M 64K",
        "-c",
        "write 4M 128K",
        &raw,
    ]);
    vec![
        ("empty.qcow2", "qcow2"),
        ("base.qcow2", "qcow2"),
        ("middle.qcow2", "qcow2"),
        ("top.qcow2", "qcow2"),
        ("wide.qcow2", "qcow2"),
        ("packed.qcow2", "qcow2"),
        ("sparse.raw", "raw"),
    ]
}

/// Both daemons, each with all images read-only.
fn both(folder: &Path, images: &[(&str, &str)]) -> [Server; 2] {
    let mut arguments = Vec::new();
    for (place, (name, format)) in images.iter().enumerate() {
        let node = format!(
            "{format},node-name=n{place},read-only=on,file.driver=file,file.filename=FOLDER/{name}"
        );
        let bitmaps = match *name {
            "top.qcow2" => ",bitmaps.0=b0,bitmaps.1.node=n3,bitmaps.1.name=b1",
            _ => "",
        };
        let export = format!(
            "nbd,id=e{place},node-name=n{place},name={name},description=image {place},\
             allocation-depth=on{bitmaps}"
        );
        arguments.extend(["--blockdev".to_owned(), node, "--export".to_owned(), export]);
    }
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    [Which::Ours, Which::Qemus].map(|which| Server::start(which, folder, &arguments))
}

#[test]
fn exports_are_told_of_and_mapped_as_qemu_does() {
    let folder = tempfile::tempdir().unwrap();
    let images = corpus(folder.path());
    let servers = both(folder.path(), &images);
    let plain =
        |server: &Server, text: String| text.replace(server.socket().to_str().unwrap(), "SOCKET");
    let list = servers.each_ref().map(|server| {
        let text = run(&["nbdinfo", "--list", "--json", &server.uri("")]);
        // In the order of names, or of adding.
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut exports = value["exports"].as_array().unwrap().clone();
        exports.sort_by_key(|export| export["export-name"].to_string());
        plain(server, json!(exports).to_string())
    });
    assert_eq!(list[0], list[1]);
    for (name, _) in images {
        let mut maps = vec!["--map", "--map=qemu:allocation-depth"];
        if name == "top.qcow2" {
            maps.extend(["--map=qemu:dirty-bitmap:b0", "--map=qemu:dirty-bitmap:b1"]);
        }
        for how in maps {
            let [ours, qemus] = servers
                .each_ref()
                .map(|server| run(&["nbdinfo", how, &server.uri(name)]));
            assert_eq!(ours, qemus, "{name} {how}");
            assert!(!ours.is_empty());
        }
        let [ours, qemus] = servers.each_ref().map(|server| {
            // With extended headers, which libnbd's tools here do not have.
            run(&[
                "qemu-img",
                "map",
                "-f",
                "raw",
                "--output=json",
                &server.uri(name),
            ])
        });
        assert_eq!(ours, qemus, "{name}");
    }
}

#[test]
fn contents_are_copied_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let images = corpus(folder.path());
    let [ours, _] = both(folder.path(), &images);
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (name, format) in images {
        let (plain, copy) = (path("plain"), path("copy"));
        run(&[
            "qemu-img",
            "convert",
            "-U",
            "-f",
            format,
            "-O",
            "raw",
            &path(name),
            &plain,
        ]);
        let expected = std::fs::read(&plain).unwrap();
        run(&["nbdcopy", &ours.uri(name), &copy]);
        assert!(std::fs::read(&copy).unwrap() == expected, "{name}: nbdcopy");
        run(&[
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &ours.uri(name),
            &copy,
        ]);
        assert!(
            std::fs::read(&copy).unwrap() == expected,
            "{name}: qemu-img"
        );
        // Holes in chunks, whole replies and simple ones.
        let program = format!(
            "def all(h):\n    size = h.get_size()\n    parts = []\n    at = 0\n    \
             while at < size:\n        n = min(1 << 21, size - at)\n        \
             parts.append(bytes(h.pread(n, at))); at += n\n    return b''.join(parts)\n\
             expected = open('{plain}', 'rb').read()\n\
             h.connect_uri(uri)\nassert all(h) == expected\n\
             whole = h.pread_structured(min(1 << 21, h.get_size()), 0, lambda *a: 0, nbd.CMD_FLAG_DF)\n\
             assert bytes(whole) == expected[:1 << 21]\n\
             kinds = set()\n\
             def chunk(buf, offset, kind, error):\n    kinds.add(kind)\n\
             h.pread_structured(min(1 << 21, h.get_size()), 0, chunk)\nprint(sorted(kinds))\n\
             s = nbd.NBD(); s.set_request_structured_replies(False); s.connect_uri(uri)\n\
             assert not s.get_structured_replies_negotiated() and all(s) == expected\n\
             o = nbd.NBD(); o.set_handshake_flags(0); o.connect_uri(uri)\nassert all(o) == expected\n"
        );
        let kinds = python(&ours.uri(name), &program);
        // READ_HOLE is 3, READ_DATA is 1.
        let has_hole = kinds.contains("[2]") || kinds.contains("[1, 2]");
        assert!(has_hole || name == "wide.qcow2", "{name}: {kinds}");
        let dumped = run(&["nbddump", &ours.uri(name)]);
        assert!(dumped.contains("0000000000"), "{name}: {dumped}");
    }
}

#[test]
fn what_clients_write_by_any_command_is_in_the_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        &path("d.qcow2"),
        "64M",
    ]);
    let server = Server::start(
        Which::Ours,
        folder.path(),
        &[
            "--blockdev",
            "qcow2,node-name=d,discard=unmap,file.driver=file,file.filename=FOLDER/d.qcow2,file.discard=unmap",
            "--export",
            "nbd,id=e,node-name=d,writable=on",
        ],
    );
    let uri = server.uri("d");
    let commands = [
        "write -P 1 0 32M",
        "write -P 2 1000 77",
        "write -f -P 3 4M 1M",
        "write -z 5M 1M",
        "write -z -u 6M 1M",
        "discard 7M 1M",
        "aio_write -P 4 8M 1M",
        "aio_write -P 5 9M 1M",
        "aio_flush",
        "flush",
    ];
    let mut words = vec!["qemu-io", "-f", "raw", "-t", "none"];
    for command in commands {
        words.extend(["-c", command]);
    }
    words.push(&uri);
    run(&words);
    let program = "h.set_strict_mode(0); h.connect_uri(uri)\n\
         for n in ('can_multi_conn', 'can_df', 'can_fua', 'can_cache', 'can_fast_zero', 'can_trim', 'can_zero'):\n    \
         assert getattr(h, n)(), n\n\
         h.pwrite(b'six' * 100, 33 << 20, nbd.CMD_FLAG_FUA)\n\
         h.zero(65536, 10 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)\n\
         h.zero(65536, 11 << 20, nbd.CMD_FLAG_FAST_ZERO)\n\
         h.trim(65536, 12 << 20, nbd.CMD_FLAG_FUA)\n\
         h.cache(1 << 20, 0)\nh.flush()\nh.shutdown()";
    python(&uri, program);
    server.quit();
    run(&["qemu-img", "check", "-q", &path("d.qcow2")]);
    run(&[
        "qemu-img",
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        &path("d.qcow2"),
        &path("d.raw"),
    ]);
    let bytes = std::fs::read(path("d.raw")).unwrap();
    let mut expected = vec![0; 64 << 20];
    let mut set = |value: u8, begin: usize, count: usize| {
        expected[begin..begin + count].fill(value);
    };
    const M: usize = 1 << 20;
    set(1, 0, 32 * M);
    set(2, 1000, 77);
    set(3, 4 * M, M);
    set(0, 5 * M, 3 * M);
    set(4, 8 * M, M);
    set(5, 9 * M, M);
    set(0, 10 * M, 65536);
    set(0, 11 * M, 65536);
    set(0, 12 * M, 65536);
    expected[33 * M..33 * M + 300].copy_from_slice(&b"six".repeat(100));
    let differs = bytes.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None);
}

#[test]
fn fio_finds_what_it_wrote_over_many_connections() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.qcow2");
    run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        path.to_str().unwrap(),
        "256M",
    ]);
    let server = Server::start(
        Which::Ours,
        folder.path(),
        &[
            "--object",
            "iothread,id=t0",
            "--object",
            "iothread,id=t1",
            "--blockdev",
            "qcow2,node-name=d,file.driver=file,file.filename=FOLDER/d.qcow2",
            "--export",
            "nbd,id=e,node-name=d,writable=on,iothread.0=t0,iothread.1=t1",
        ],
    );
    let uri = format!("--uri={}", server.uri("d"));
    run(&[
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned=1",
        "--iodepth=32",
        "--numjobs=3",
        "--size=48M",
        "--offset_increment=64M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--trim_percentage=0",
        "--group_reporting",
    ]);
    server.quit();
    run(&["qemu-img", "check", "-q", path.to_str().unwrap()]);
}

#[test]
fn a_write_that_is_to_be_stable_fails_with_the_flush_that_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("d.raw"), vec![0; 1 << 20]).unwrap();
    // What is written are zeroes, which are recognised: stable data goes down as it is, to where the host
    // sees to it, and a stable zero takes a flush.
    let server = Server::start(
        Which::Ours,
        folder.path(),
        &[
            "--blockdev",
            "raw,node-name=d,detect-zeroes=on,file.driver=blkdebug,file.image.driver=file,\
             file.image.filename=FOLDER/d.raw,file.inject-error.0.event=none,\
             file.inject-error.0.iotype=flush,file.inject-error.0.errno=5",
            "--export",
            "nbd,id=e,node-name=d,writable=on",
            "--export",
            "nbd,id=w,node-name=d,name=through,writable=on,writethrough=on",
        ],
    );
    let program = "h.connect_uri(uri)\n\
         attempt('write', lambda: h.pwrite(bytes(512), 0))\n\
         attempt('stable', lambda: h.pwrite(bytes(512), 0, nbd.CMD_FLAG_FUA))\n\
         attempt('zero', lambda: h.zero(512, 0))\n\
         attempt('stable zero', lambda: h.zero(512, 0, nbd.CMD_FLAG_FUA))\n\
         attempt('trim', lambda: h.trim(512, 0))\n\
         attempt('stable trim', lambda: h.trim(512, 0, nbd.CMD_FLAG_FUA))\n\
         attempt('flush', lambda: h.flush())";
    let said = python(&server.uri("d"), program);
    let expected = "write done\nstable EIO\nzero done\nstable zero EIO\ntrim done\nstable trim EIO\nflush EIO\n";
    assert_eq!(said, expected);
    let program = "h.connect_uri(uri)\nattempt('write', lambda: h.pwrite(bytes(512), 0))";
    assert_eq!(python(&server.uri("through"), program), "write EIO\n");
}

#[test]
fn requests_that_cannot_be_are_answered_and_disturb_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(
        Which::Ours,
        folder.path(),
        &[
            "--blockdev",
            "null-co,node-name=d,size=67108864,read-zeroes=on",
            "--export",
            "nbd,id=e,node-name=d,writable=on",
            "--export",
            "nbd,id=r,node-name=d,name=readonly",
        ],
    );
    let program = "h.set_strict_mode(0); h.connect_uri(uri)\nsize = h.get_size()\n\
         none = lambda *a: 0\n\
         attempt('read past', lambda: h.pread(512, size))\n\
         attempt('read across', lambda: h.pread(1024, size - 512))\n\
         attempt('write past', lambda: h.pwrite(b'x' * 512, size))\n\
         attempt('zero past', lambda: h.zero(512, size))\n\
         attempt('trim past', lambda: h.trim(512, size))\n\
         attempt('wrap', lambda: h.trim(512, (1 << 63) - 256))\n\
         attempt('cache past', lambda: h.cache(512, size))\n\
         attempt('status past', lambda: h.block_status(512, size, none))\n\
         attempt('long read', lambda: h.pread(33 << 20, 0))\n\
         attempt('longest read', lambda: h.pread(32 << 20, 0))\n\
         attempt('odd', lambda: h.pread(3, 5))\n\
         attempt('none', lambda: h.pread(0, 0))\n\
         attempt('none written', lambda: h.pwrite(b'', 0))\n\
         attempt('read flags', lambda: h.pread(512, 0, 2))\n\
         attempt('write flags', lambda: h.pwrite(b'x' * 512, 0, 16))\n\
         attempt('flush flags', lambda: h.flush(4))\n\
         attempt('trim flags', lambda: h.trim(512, 0, 2))\n\
         attempt('no contexts', lambda: h.block_status(512, 0, none))\n\
         attempt('still there', lambda: h.flush())";
    let said = python(&server.uri("d"), program);
    let expected = "read past EINVAL\nread across EINVAL\nwrite past ENOSPC\nzero past ENOSPC\n\
         trim past EINVAL\nwrap EINVAL\ncache past EINVAL\nstatus past EINVAL\nlong read EINVAL\n\
         longest read done\nodd done\nnone done\nnone written done\nread flags EINVAL\n\
         write flags EINVAL\nflush flags EINVAL\ntrim flags EINVAL\nno contexts EINVAL\n\
         still there done\n";
    assert_eq!(said, expected);
    let program = "h.set_strict_mode(0); h.connect_uri(uri)\nassert h.is_read_only()\n\
         attempt('write', lambda: h.pwrite(b'x' * 512, 0))\n\
         attempt('zero', lambda: h.zero(512, 0))\n\
         attempt('trim', lambda: h.trim(512, 0))\n\
         attempt('read', lambda: h.pread(512, 0))";
    let said = python(&server.uri("readonly"), program);
    assert_eq!(said, "write EPERM\nzero EPERM\ntrim EPERM\nread done\n");
    server.quit();
}
