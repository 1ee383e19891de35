//! `stonework daemon`: what its options take and refuse.

use harness::daemon::{Daemon, Place, Refusal, eventually, run, stonework};
use harness::frontend::Frontend;
use harness::frontend::blk::feature;

use crate::{MIB, SECTOR, says, text};

/// The options of a node and an export that work, at the socket `PLACE/vm.sock`.
const NODE: &str = "null-co,node-name=d,read-zeroes=on";
const EXPORT: &str = "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=PLACE/vm.sock";

fn refused(place: &Place, args: &[&str]) -> Refusal {
    let args = args
        .iter()
        .map(|arg| arg.replace("PLACE", text(place.path())));
    run(stonework(["daemon".to_owned()].into_iter().chain(args)))
}

/// Runs it with a good node and one export that is wrong.
#[track_caller]
fn export_is_refused(export: &str, words: &[&str]) {
    let place = Place::new();
    let refusal = refused(&place, &["--blockdev", NODE, "--export", export]);
    println!("{export}: {}", refusal.errors.trim());
    says(&refusal, 1, words);
    assert!(!place.join("vm.sock").exists(), "{export}");
}

#[test]
fn what_later_versions_take_is_refused_by_name() {
    let place = Place::new();
    let later = [
        "--nbd-server",
        "addr.type=unix,addr.path=PLACE/nbd,tls-authz=t",
    ];
    // What stands beside it is stopped again.
    let all = [&later[..], &["--blockdev", NODE, "--export", EXPORT]].concat();
    says(
        &refused(&place, &all),
        1,
        &[later[0], "not in this version"],
    );
    assert!(!place.join("vm.sock").exists());
}

#[test]
fn nodes_that_cannot_be_are_refused_with_what_there_is_instead() {
    for (node, words) in [
        (
            "qcow9,node-name=d",
            &["'qcow9'", "file, host_device, raw, qcow2, null-co"][..],
        ),
        ("node-name=d", &["'driver' is missing"]),
        ("driver=,node-name=d", &["'driver'", "''", "qcow2"]),
        ("null-co", &["'node-name'"]),
        ("null-co,node-name=", &["option 'node-name'"]),
        ("null-co,node-name=1d", &["'1d'", "begins with a letter"]),
        ("null-co,node-name=d,,e", &["'d,e'", "cannot name a node"]),
        ("null-co,node-name=#d", &["'#d'", "cannot name a node"]),
        (
            "null-co,node-name=d,sise=1M",
            &["'sise' is unexpected", "'null-co'", "size"],
        ),
        (
            "null-co,node-name=d,size=1M",
            &["'size' expects integer (here 1048576), not '1M'"],
        ),
        ("null-co,node-name=d,size=lots", &["'size'", "'lots'"]),
        ("null-co,node-name=d,size=-1", &["'size'", "'-1'"]),
        ("null-co,node-name=d,size=", &["'size'"]),
        (
            "null-co,node-name=d,read-only=maybe",
            &["'read-only'", "'on' or 'off'", "'maybe'"],
        ),
        (
            "null-co,node-name=d,discard=maybe",
            &["'discard'", "ignore, unmap"],
        ),
        (
            "null-co,node-name=d,cache=none",
            &["'cache'", "expected: object"],
        ),
        (
            "null-co,node-name=d,size",
            &["Expected '=' after parameter 'size'"],
        ),
        ("null-co,node-name=d,=1", &["Invalid parameter ''"]),
        ("null-co,node-name=d,file..x=1", &["'file..x'"]),
        ("null-co,node-name=d,file=e", &["'file' is unexpected"]),
        ("file,node-name=d", &["'filename' is missing"]),
        ("file,node-name=d,filename=", &["cannot open ''"]),
        (
            "file,node-name=d,filename=PLACE/none",
            &["PLACE/none", "no such file"],
        ),
        ("file,node-name=d,filename=PLACE", &["directory"]),
        (
            "file,node-name=d,filename=PLACE/disk.raw,locking=maybe",
            &["auto, on, off"],
        ),
        (
            "host_device,node-name=d,filename=PLACE/disk.raw",
            &["driver 'file'"],
        ),
        ("raw,node-name=d", &["'file' is missing"]),
        ("raw,node-name=d,file=none", &["no node 'none'"]),
        (
            "raw,node-name=d,file=x,file.driver=null-co",
            &["'file.*' used inconsistently"],
        ),
        (
            "raw,node-name=d,file.filename=PLACE/disk.raw",
            &["'file.driver' is missing"],
        ),
        (
            "raw,node-name=d,file.driver=null-co,file.x=1",
            &["'file.x' is unexpected"],
        ),
        (
            "raw,node-name=d,file.driver=null-co,offset=2147483648",
            &["'offset'", "past the end"],
        ),
        (
            "raw,node-name=d,file.driver=null-co,size=2147483648",
            &["'size'", "2147483648"],
        ),
        (
            "raw,node-name=d,file.driver=null-co,file.node-name=d",
            &["'d'"],
        ),
    ] {
        let place = Place::new();
        place.sparse("disk.raw", MIB);
        let refusal = refused(&place, &["--blockdev", node]);
        let words: Vec<_> = words
            .iter()
            .map(|word| word.replace("PLACE", text(place.path())))
            .collect();
        println!("{node}: {}", refusal.errors.trim());
        says(
            &refusal,
            1,
            &words.iter().map(String::as_str).collect::<Vec<_>>(),
        );
    }
}

#[test]
fn exports_that_cannot_be_are_refused_with_what_there_is_instead() {
    let base = "vhost-user-blk,id=e,node-name=d,addr.type=unix";
    let place = "addr.path=PLACE/vm.sock";
    for (export, words) in [
        (
            format!("fuse,id=e,node-name=d,{place}"),
            &["'fuse'", "vhost-user-blk, nbd"][..],
        ),
        (
            format!("id=e,node-name=d,addr.type=unix,{place}"),
            &["'type' is missing"],
        ),
        (
            format!("vhost-user-blk,node-name=d,addr.type=unix,{place}"),
            &["'id' is missing"],
        ),
        (
            format!("vhost-user-blk,id=,node-name=d,addr.type=unix,{place}"),
            &["Invalid block export id"],
        ),
        (
            format!("vhost-user-blk,id=e,addr.type=unix,{place}"),
            &["'node-name' is missing"],
        ),
        (
            format!("vhost-user-blk,id=e,node-name=d,{place}"),
            &["'addr.type' is missing"],
        ),
        (
            format!("vhost-user-blk,id=e,node-name=d,addr.type=inet,{place}"),
            &["'inet'", "unix"],
        ),
        (base.to_owned(), &["'addr.path' is missing"]),
        (format!("{base},addr.path="), &["socket ''"]),
        (
            format!("{base},addr.path=PLACE/no/vm.sock"),
            &["/no/vm.sock", "no such file"],
        ),
        (
            format!("vhost-user-blk,id=e,node-name=x,addr.type=unix,{place}"),
            &["no node 'x'"],
        ),
        (
            format!("{base},{place},colour=red"),
            &["'colour' is unexpected", "num-queues"],
        ),
        (format!("{base},{place},num-queues=0"), &["'e'", "1 to 256"]),
        (
            format!("{base},{place},num-queues=257"),
            &["'e'", "1 to 256"],
        ),
        (
            format!("{base},{place},num-queues=70000"),
            &["'num-queues'", "'70000'"],
        ),
        (
            format!("{base},{place},num-queues=two"),
            &["'num-queues'", "'two'"],
        ),
        (
            format!("{base},{place},writable=maybe"),
            &["'writable'", "'on' or 'off'"],
        ),
        (
            format!("{base},{place},writethrough=1"),
            &["'writethrough'", "'on' or 'off'"],
        ),
        (
            format!("{base},{place},logical-block-size=513"),
            &["513", "power of two"],
        ),
        (
            format!("{base},{place},logical-block-size=128k"),
            &["131072", "power of two"],
        ),
        (
            format!("{base},{place},logical-block-size=big"),
            &["'logical-block-size'"],
        ),
        (
            format!("{base},{place},serial=123456789012345678901"),
            &["serial", "20"],
        ),
        (
            format!("{base},{place},iothread=io"),
            &["iothread \"io\" not found"],
        ),
        (
            format!("{base},{place},allow-inactive=on"),
            &["does not support inactive"],
        ),
        (
            "vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=99".to_owned(),
            &["descriptor 99"],
        ),
        (
            "vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=0".to_owned(),
            &["'0' is not a socket"],
        ),
    ] {
        export_is_refused(&export, words);
    }
}

#[test]
fn a_size_that_is_no_number_of_blocks_is_refused_with_one_that_is() {
    for (size, block, next) in [("513", "512", "1024"), ("1049088", "4096", "1052672")] {
        let place = Place::new();
        let node = format!("null-co,node-name=d,size={size}");
        let export = format!("{EXPORT},logical-block-size={block}");
        let refusal = refused(&place, &["--blockdev", &node, "--export", &export]);
        says(&refusal, 1, &[size, block, next]);
    }
}

#[test]
fn options_count_in_the_order_in_which_they_stand() {
    let place = Place::new();
    let refusal = refused(&place, &["--export", EXPORT, "--blockdev", NODE]);
    says(&refusal, 1, &["no node 'd'"]);
    let above = "raw,node-name=r,file=d";
    let refusal = refused(&place, &["--blockdev", above, "--blockdev", NODE]);
    says(&refusal, 1, &["no node 'd'"]);
    // What was begun before the mistake is taken down again.
    let bad = [
        "--blockdev",
        NODE,
        "--export",
        EXPORT,
        "--blockdev",
        "none,node-name=x",
    ];
    says(&refused(&place, &bad), 1, &["'none'"]);
    assert!(!place.join("vm.sock").exists());
}

#[test]
fn names_are_given_once() {
    let place = Place::new();
    let refusal = refused(&place, &["--blockdev", NODE, "--blockdev", NODE]);
    says(&refusal, 1, &["node 'd' already"]);
    let other = EXPORT.replace("vm.sock", "other.sock");
    let nodes = ["--blockdev", NODE, "--blockdev", "null-co,node-name=d2"];
    let both = ["--export", EXPORT, "--export", &other];
    let refusal = refused(&place, &[&nodes[..], &both[..]].concat());
    says(&refusal, 1, &["'e' is already in use"]);
    let same_socket = EXPORT.replace("id=e", "id=f");
    let both = ["--export", EXPORT, "--export", &same_socket];
    let refusal = refused(&place, &[&nodes[..2], &both[..]].concat());
    says(&refusal, 1, &["vm.sock", "in use"]);
    assert!(!place.join("vm.sock").exists());
    assert!(!place.join("other.sock").exists());
}

#[test]
fn a_node_is_written_by_one_and_only_if_it_may_be() {
    let place = Place::new();
    let writable = format!("{EXPORT},writable=on");
    let read_only = format!("{NODE},read-only=on");
    let refusal = refused(&place, &["--blockdev", &read_only, "--export", &writable]);
    says(&refusal, 1, &["export 'e'", "node 'd'", "read-only"]);
    let second = writable
        .replace("id=e", "id=f")
        .replace("vm.sock", "2.sock");
    let both = ["--export", &writable, "--export", &second];
    let refusal = refused(&place, &[&["--blockdev", NODE][..], &both[..]].concat());
    says(&refusal, 1, &["export 'f'", "'write'", "export 'e'"]);
    // Nor is a node written by one export and read, below a format, by another.
    let above = ["--blockdev", "raw,node-name=r,file=d"];
    let reader = second.replace("node-name=d", "node-name=r");
    let reader = reader.replace(",writable=on", "");
    let all = [&["--blockdev", NODE][..], &above, &["--export", &writable]].concat();
    says(
        &refused(&place, &[&all[..], &["--export", &reader]].concat()),
        1,
        &["export 'e'", "'write'", "node 'r'"],
    );
    // A node that writes cannot stand on one that must not.
    let over = writable.replace("node-name=d", "node-name=r");
    let all = [
        &["--blockdev", &read_only][..],
        &above,
        &["--export", &over],
    ]
    .concat();
    says(
        &refused(&place, &all),
        1,
        &["node 'r'", "node 'd'", "read-only"],
    );
    let inline = "raw,node-name=r,file.driver=null-co,file.node-name=d,file.read-only=on";
    let refusal = refused(&place, &["--blockdev", inline, "--export", &over]);
    says(&refusal, 1, &["node 'r'", "node 'd'", "read-only"]);
    let inherited = "raw,node-name=d,read-only=on,file.driver=null-co";
    let refusal = refused(&place, &["--blockdev", inherited, "--export", &writable]);
    says(&refusal, 1, &["export 'e'", "node 'd'", "read-only"]);
}

#[test]
fn two_nodes_on_one_file_are_refused_unless_they_read() {
    let place = Place::new();
    place.sparse("disk.raw", MIB);
    let node =
        |name: &str, more: &str| format!("file,node-name={name},filename=PLACE/disk.raw{more}");
    let (one, two) = (node("one", ""), node("two", ""));
    let export = |node: &str| {
        EXPORT
            .replace("id=e", &format!("id={node}"))
            .replace("node-name=d", &format!("node-name={node},writable=on"))
            .replace("vm.sock", &format!("{node}.sock"))
    };
    let nodes = ["--blockdev", &one, "--blockdev", &two];
    let exports = ["--export", &export("one"), "--export", &export("two")];
    let refusal = refused(&place, &[&nodes[..], &exports[..]].concat());
    assert_eq!(refusal.code, Some(1), "{refusal:?}");
    let last = refusal.errors.lines().last().unwrap_or_default();
    assert!(
        last.contains("disk.raw") && last.contains("this process"),
        "{refusal:?}"
    );
}

#[test]
fn values_with_commas_and_nodes_of_both_kinds_are_served() {
    let place = Place::new();
    let disk = place.file("a,b.raw", &[0x19; 1 << 20]);
    let nodes = [
        format!(
            "file,node-name=f,filename={}",
            text(&disk).replace(',', ",,")
        ),
        "driver=raw,node-name=r,file=f,offset=1024,size=0x10000".to_owned(),
        "raw,node-name=n,file.driver=null-co,file.read-zeroes=yes,file.size=1572864".to_owned(),
    ];
    let export = |id: &str, more: &str| {
        let socket = place.join(&format!("{id}.sock"));
        let id = format!("id={id},node-name={id}");
        format!(
            "vhost-user-blk,{id},addr.type=unix,addr.path={}{more}",
            text(&socket)
        )
    };
    let mut command = stonework(["daemon"]);
    for node in &nodes {
        command.args(["--blockdev", node]);
    }
    command.args([
        "--export",
        &export("r", ",writable=on,num-queues=3,serial=x,,y"),
    ]);
    command.args(["--export", &export("n", ",logical-block-size=4k")]);
    let mut daemon = Daemon::spawn(command);
    eventually("both sockets are there", || {
        daemon.assert_running();
        place.join("r.sock").exists() && place.join("n.sock").exists()
    });
    let mut frontend = Frontend::connect(&place.join("r.sock"));
    let config = frontend.config();
    assert_eq!((config.capacity_sectors, config.num_queues), (128, 3));
    assert!(!frontend.has(feature::RO));
    let mut ring = frontend.start_queue(0, 64);
    frontend.write(&mut ring, 127, &[0x20; SECTOR]);
    let id = frontend.request(&mut ring, &harness::frontend::blk::Request::get_id());
    assert_eq!(id.data[..4], *b"x,y\0");
    drop(frontend);
    let mut frontend = Frontend::connect(&place.join("n.sock"));
    let config = frontend.config();
    assert_eq!((config.capacity_sectors, config.blk_size), (3072, 4096));
    assert!(frontend.has(feature::RO), "not writable unless it is said");
    let mut ring = frontend.start_queue(0, 64);
    assert!(frontend.read(&mut ring, 8, 8 * SECTOR) == [0; 8 * SECTOR]);
    drop(frontend);
    daemon.stop();
    let now = std::fs::read(&disk).expect("it is there");
    let at = 1024 + 127 * SECTOR;
    assert!(now[at..at + SECTOR] == [0x20; SECTOR]);
    assert!(
        now[..at]
            .iter()
            .chain(&now[at + SECTOR..])
            .all(|byte| *byte == 0x19)
    );
}
