//! A Linux guest on disks that stonework serves: its data is there after the next boot, and the host
//! does what the guest asked for, no less and no more.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use harness::guest::{Guest, Machine, Serve, Served, Tools, strace_is_there};

const MIB: u64 = 1 << 20;

/// As many as the issue asks for, and more than any batch that would hide one.
const SYNCED_WRITES: u64 = 20;

/// Two queues per disk, so that both of the guest's processors have one.
fn attach(tools: &'static Tools, disks: &[&Served]) -> Guest {
    disks
        .iter()
        .fold(Machine::new(tools), |machine, disk| {
            machine.disk(disk.socket())
        })
        .boot()
}

/// A disk whose every byte was written, from 1 so that none reads as zero.
fn written_disk(dir: &Path, bytes: u64) -> PathBuf {
    let path = dir.join("disk");
    let file = File::create(&path).unwrap();
    for chunk in 0..bytes / MIB {
        file.write_all_at(&vec![chunk as u8 % 255 + 1; MIB as usize], chunk * MIB)
            .unwrap();
    }
    file.sync_all().unwrap();
    path
}

/// What the host's file system has allocated to a file.
fn allocated_bytes(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

/// Asserts that exactly `zeroes` of a [`written_disk`] reads as zeroes.
fn assert_zero_only_in(path: &Path, zeroes: std::ops::Range<u64>) {
    let file = File::open(path).unwrap();
    let mut data = vec![0; MIB as usize];
    for chunk in 0..file.metadata().unwrap().len() / MIB {
        file.read_exact_at(&mut data, chunk * MIB).unwrap();
        for (block, found) in data.chunks(4096).enumerate() {
            let offset = chunk * MIB + block as u64 * 4096;
            let expected = if zeroes.contains(&offset) {
                0
            } else {
                chunk as u8 % 255 + 1
            };
            assert!(
                found.iter().all(|byte| *byte == expected),
                "the block at {offset} should hold {expected}s only and begins {:?}",
                &found[..8],
            );
        }
    }
}

#[test]
fn an_ext4_with_200_mb_written_between_fsyncs_has_equal_sums_after_a_second_boot() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let served = Serve::new(&disk).options(["--create", "1G"]).start();
    let bytes = 200 * 1_000_000;

    let mut guest = attach(tools, &[&served]);
    guest.run("mkfs /dev/vda");
    guest.run("mount /dev/vda /mnt");
    let filled = guest.run(&format!("fill /mnt/data {bytes} 42 20000000"));
    assert!(filled.number("fsyncs") >= 9, "{filled:?}");
    guest.run("umount /mnt");
    guest.power_off();

    // The second boot is from a daemon that knows of the first only what is in the file.
    served.stop();
    let served = Serve::new(&disk).start();
    let mut guest = attach(tools, &[&served]);
    guest.run("mount /dev/vda /mnt");
    let found = guest.run(&format!("verify /mnt/data {bytes} 42"));
    assert_eq!(found.get("sum"), filled.get("sum"));
    guest.run("umount /mnt");
    guest.power_off();
    served.stop();

    if let Ok(check) = Command::new("e2fsck").arg("-fn").arg(&disk).output() {
        assert!(
            check.status.success(),
            "{}",
            String::from_utf8_lossy(&check.stdout)
        );
    }
}

#[test]
fn fsynced_data_is_there_after_the_guest_lost_its_power() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let served = Serve::new(&dir.path().join("disk"))
        .options(["--create", "256M"])
        .start();

    let mut guest = attach(tools, &[&served]);
    guest.run("mkfs /dev/vda");
    guest.run("mount /dev/vda /mnt");
    let filled = guest.run("fill /mnt/data 8000000 7");
    guest.kill();

    let mut guest = attach(tools, &[&served]);
    guest.run("mount /dev/vda /mnt");
    let found = guest.run("verify /mnt/data 8000000 7");
    assert_eq!(found.get("sum"), filled.get("sum"));
    guest.run("umount /mnt");
    guest.power_off();
    served.stop();
}

/// What the guest had in flight is lost with the daemon, and with the guest's page cache.
#[test]
fn what_a_guest_synced_to_qcow2_is_there_after_its_daemon_was_killed_under_load_three_times() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (disk, runtime) = (dir.path().join("disk"), dir.path().join("run"));
    let image = disk.to_str().unwrap();
    let qemu_img = |arguments: &[&str]| Command::new("qemu-img").args(arguments).output().unwrap();
    let made = qemu_img(&["create", "-f", "qcow2", image, "1G"]);
    assert!(made.status.success(), "{made:?}");
    let serve = || {
        let options = [
            "--format",
            "qcow2",
            "--runtime-dir",
            runtime.to_str().unwrap(),
        ];
        Serve::new(&disk).options(options).start()
    };
    let mut sums = Vec::new();
    let verify = |guest: &mut Guest, sums: &[String]| {
        for (round, sum) in sums.iter().enumerate() {
            let found = guest.run(&format!("verify /mnt/synced{round} 8000000 {round}"));
            assert_eq!(found.get("sum"), sum);
        }
    };
    for round in 0..3 {
        let served = serve();
        let mut guest = attach(tools, &[&served]);
        if round == 0 {
            guest.run("mkfs /dev/vda");
        }
        guest.run("mount /dev/vda /mnt");
        verify(&mut guest, &sums);
        let filled = guest.run(&format!("fill /mnt/synced{round} 8000000 {round}"));
        sums.push(filled.get("sum").to_owned());
        guest.begin(&format!("fill /mnt/lost{round} 500000000 9 2000000"));
        std::thread::sleep(std::time::Duration::from_millis(150 + 170 * round));
        served.kill();
        guest.kill();
        // The kernel may still be ending what the daemon had begun, and hold its locks until then.
        let mut checked = qemu_img(&["check", "-f", "qcow2", image]);
        for _ in 0..200 {
            if !String::from_utf8_lossy(&checked.stderr).contains("lock") {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
            checked = qemu_img(&["check", "-f", "qcow2", image]);
        }
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
    }
    let served = serve();
    let mut guest = attach(tools, &[&served]);
    guest.run("mount /dev/vda /mnt");
    verify(&mut guest, &sums);
    guest.run("umount /mnt");
    guest.power_off();
    served.stop();
    let checked = qemu_img(&["check", "-f", "qcow2", image]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
    assert_eq!(std::fs::read_dir(&runtime).unwrap().count(), 0);
}

#[test]
fn an_idle_guest_goes_on_when_its_daemon_is_stopped_and_started_again() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (disk, socket) = (dir.path().join("disk"), dir.path().join("socket"));
    let served = Serve::new(&disk)
        .at(&socket)
        .options(["--create", "64M"])
        .start();
    let mut guest = Machine::new(tools).disk_with(&socket, 2, true).boot();
    guest.run("mkfs /dev/vda");
    guest.run("mount /dev/vda /mnt");
    let filled = guest.run("fill /mnt/before 4000000 1");
    served.stop();

    let served = Serve::new(&disk).at(&socket).start();
    guest.run("fill /mnt/after 4000000 2");
    guest.run("umount /mnt");
    guest.run("mount /dev/vda /mnt");
    let found = guest.run("verify /mnt/before 4000000 1");
    assert_eq!(found.get("sum"), filled.get("sum"));
    guest.run("verify /mnt/after 4000000 2");
    guest.run("umount /mnt");
    guest.power_off();
    served.stop();
}

#[test]
fn discard_gives_space_back_to_the_host_and_spares_what_is_around_it() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = written_disk(dir.path(), 64 * MIB);
    let full = allocated_bytes(&disk);
    let served = Serve::new(&disk).start();

    let mut guest = attach(tools, &[&served]);
    guest.run(&format!("discard /dev/vda {} {}", 8 * MIB, 32 * MIB));
    assert!(
        allocated_bytes(&disk) <= full - 31 * MIB,
        "32 MiB discarded, but {} of {full} bytes are still allocated",
        allocated_bytes(&disk),
    );
    assert_zero_only_in(&disk, 8 * MIB..40 * MIB);
    guest.power_off();
    served.stop();
    assert_eq!(disk.metadata().unwrap().len(), 64 * MIB);
}

#[test]
fn write_zeroes_gives_space_back_with_unmap_and_keeps_it_without() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = written_disk(dir.path(), 64 * MIB);
    let full = allocated_bytes(&disk);
    let served = Serve::new(&disk).start();

    let mut guest = attach(tools, &[&served]);
    guest.run(&format!("write-zeroes /dev/vda {} {}", 4 * MIB, 20 * MIB));
    assert!(
        allocated_bytes(&disk) >= full,
        "space was given up that the guest wants to keep",
    );
    assert_zero_only_in(&disk, 4 * MIB..24 * MIB);
    guest.run(&format!(
        "write-zeroes /dev/vda {} {} unmap",
        24 * MIB,
        20 * MIB
    ));
    assert!(
        allocated_bytes(&disk) <= full - 19 * MIB,
        "20 MiB unmapped, but {} of {full} bytes are still allocated",
        allocated_bytes(&disk),
    );
    assert_zero_only_in(&disk, 4 * MIB..44 * MIB);
    guest.power_off();
    served.stop();
}

/// What a cache mode promises: whether the guest is told of a write-back cache, and how many host
/// syncs [`SYNCED_WRITES`] direct writes cost with an fsync each and without.
struct Promise {
    mode: &'static str,
    wce: &'static str,
    with_fsync: u64,
    without_fsync: u64,
}

const PROMISES: [Promise; 5] = [
    Promise {
        mode: "writeback",
        wce: "back",
        with_fsync: SYNCED_WRITES,
        without_fsync: 0,
    },
    Promise {
        mode: "none",
        wce: "back",
        with_fsync: SYNCED_WRITES,
        without_fsync: 0,
    },
    Promise {
        mode: "writethrough",
        wce: "through",
        with_fsync: SYNCED_WRITES,
        without_fsync: SYNCED_WRITES,
    },
    Promise {
        mode: "directsync",
        wce: "through",
        with_fsync: SYNCED_WRITES,
        without_fsync: SYNCED_WRITES,
    },
    Promise {
        mode: "unsafe",
        wce: "back",
        with_fsync: 0,
        without_fsync: 0,
    },
];

/// One disk for each of [`PROMISES`], as the guest's vda, vdb and so on.
fn serve_all_modes(dir: &Path, start: impl Fn(Serve) -> Served) -> Vec<Served> {
    PROMISES
        .iter()
        .map(|promise| {
            let options = ["--create", "16M", "--cache", promise.mode];
            start(Serve::new(&dir.join(promise.mode)).options(options))
        })
        .collect()
}

const DEVICES: [&str; 5] = ["/dev/vda", "/dev/vdb", "/dev/vdc", "/dev/vdd", "/dev/vde"];

#[test]
fn a_system_call_trace_shows_a_sync_wherever_a_cache_mode_promises_one() {
    let Some(tools) = Tools::find() else { return };
    if !strace_is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = serve_all_modes(dir.path(), |serve| {
        serve.options(["--engine", "threads"]).traced().start()
    });
    let mut guest = attach(tools, &disks.iter().collect::<Vec<_>>());
    for ((promise, served), device) in PROMISES.iter().zip(&disks).zip(DEVICES) {
        let mode = promise.mode;
        assert_eq!(
            guest.run(&format!("wce {device}")).get("wce"),
            promise.wce,
            "{mode}"
        );

        let before = served.trace();
        guest.run(&format!("sync-writes {device} {SYNCED_WRITES}"));
        let trace = served.trace().since(&before);
        assert_eq!(trace.writes() as u64, SYNCED_WRITES, "{mode}: {trace:?}");
        assert_eq!(
            trace.syncs() as u64,
            promise.with_fsync,
            "{mode}: {trace:?}"
        );
        // In write-back it is the guest's fsync that comes before its next write.
        if promise.with_fsync > 0 {
            assert!(trace.unstable_write().is_none(), "{mode}: {trace:?}");
        }

        let before = served.trace();
        guest.run(&format!("sync-writes {device} {SYNCED_WRITES} no-fsync"));
        let trace = served.trace().since(&before);
        assert_eq!(trace.writes() as u64, SYNCED_WRITES, "{mode}: {trace:?}");
        assert_eq!(
            trace.syncs() as u64,
            promise.without_fsync,
            "{mode}: {trace:?}"
        );
        if promise.without_fsync > 0 {
            assert!(trace.unstable_write().is_none(), "{mode}: {trace:?}");
        }
    }
    guest.power_off();
    for served in disks {
        served.stop();
    }
}

#[test]
fn each_engine_submits_a_sync_wherever_a_cache_mode_promises_one() {
    let Some(tools) = Tools::find() else { return };
    for engine in ["auto", "threads"] {
        let dir = tempfile::tempdir().unwrap();
        let disks = serve_all_modes(dir.path(), |serve| {
            serve.options(["--engine", engine]).start()
        });
        let mut guest = attach(tools, &disks.iter().collect::<Vec<_>>());
        for ((promise, served), device) in PROMISES.iter().zip(&disks).zip(DEVICES) {
            for (arguments, promised) in [
                ("", promise.with_fsync),
                (" no-fsync", promise.without_fsync),
            ] {
                let before = served.count("host_syncs");
                guest.run(&format!("sync-writes {device} {SYNCED_WRITES}{arguments}"));
                assert_eq!(
                    served.count("host_syncs") - before,
                    promised,
                    "engine {engine}, mode {}, sync-writes{arguments}",
                    promise.mode,
                );
            }
        }
        guest.power_off();
        for served in disks {
            served.stop();
        }
    }
}

#[test]
fn as_often_as_the_guest_toggles_its_write_cache_the_syncs_follow() {
    let Some(tools) = Tools::find() else { return };
    if !strace_is_there() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let served = Serve::new(&dir.path().join("disk"))
        .options(["--create", "16M", "--engine", "threads"])
        .traced()
        .start();
    let mut guest = attach(tools, &[&served]);
    for round in 0..3 {
        for (wce, arguments, promised) in [
            ("back", "", SYNCED_WRITES),
            ("back", " no-fsync", 0),
            ("through", " no-fsync", SYNCED_WRITES),
            ("through", "", SYNCED_WRITES),
        ] {
            let shown = guest.run(&format!("wce /dev/vda {wce}"));
            assert_eq!(shown.get("wce"), wce, "round {round}");
            let before = served.trace();
            guest.run(&format!("sync-writes /dev/vda {SYNCED_WRITES}{arguments}"));
            let trace = served.trace().since(&before);
            let case = format!("round {round}, {wce}, sync-writes{arguments}: {trace:?}");
            assert_eq!(trace.syncs() as u64, promised, "{case}");
            if promised > 0 {
                assert!(trace.unstable_write().is_none(), "{case}");
            }
        }
    }
    guest.power_off();
    served.stop();
}

#[test]
fn a_read_only_disk_can_be_read_and_not_written() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let served = Serve::new(&disk).options(["--create", "64M"]).start();
    let mut guest = attach(tools, &[&served]);
    guest.run("mkfs /dev/vda");
    guest.run("mount /dev/vda /mnt");
    guest.run("fill /mnt/data 1000000 3");
    guest.run("umount /mnt");
    guest.power_off();
    served.stop();
    let before = std::fs::read(&disk).unwrap();

    let served = Serve::new(&disk).options(["--read-only"]).start();
    let mut guest = attach(tools, &[&served]);
    assert_eq!(guest.run("info /dev/vda").get("read_only"), "1");
    guest.run("mount /dev/vda /mnt ro");
    guest.run("verify /mnt/data 1000000 3");
    guest.run("umount /mnt");
    for verb in [
        "sync-writes /dev/vda 1",
        "discard /dev/vda 0 1048576",
        "write-zeroes /dev/vda 0 1048576",
    ] {
        let error = guest.try_run(verb).expect_err(verb);
        assert!(
            error.contains("Operation not permitted") || error.contains("Read-only"),
            "{verb}: {error}"
        );
    }
    guest.power_off();
    served.stop();
    assert!(
        std::fs::read(&disk).unwrap() == before,
        "a read-only disk has changed"
    );
}

#[test]
fn two_disks_show_their_own_serial_size_and_limits() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let serve = |serial: &str, size: &str| {
        Serve::new(&dir.path().join(serial))
            .options(["--create", size, "--serial", serial])
            .start()
    };
    let first = serve("the-first-disk", "64M");
    let second = serve("twenty-chars-serial!", "96M");
    let mut guest = attach(tools, &[&first, &second]);
    for (device, serial, bytes) in [
        ("/dev/vda", "the-first-disk", 64 * MIB),
        ("/dev/vdb", "twenty-chars-serial!", 96 * MIB),
    ] {
        let info = guest.run(&format!("info {device}"));
        assert_eq!(info.get("serial"), serial);
        assert_eq!(info.number("bytes"), bytes);
        assert_eq!(info.number("read_only"), 0);
        assert_eq!(info.number("queues"), 2);
        assert_eq!(info.number("logical_block"), 512);
        assert!(info.number("discard_max") >= MIB, "{info:?}");
        assert!(info.number("write_zeroes_max") >= MIB, "{info:?}");
    }
    guest.power_off();
    first.stop();
    second.stop();
}

#[test]
fn a_guest_sees_its_disk_grow_while_it_writes() {
    let Some(tools) = Tools::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (disk, control) = (dir.path().join("disk.qcow2"), dir.path().join("control"));
    let image = disk.to_str().unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", image, "256M"])
        .status();
    assert!(made.unwrap().success());
    let served = Serve::new(&disk)
        .options(["--format", "qcow2", "--control", control.to_str().unwrap()])
        .start();
    let mut guest = attach(tools, &[&served]);
    guest.run("mkfs /dev/vda");
    guest.run("mount /dev/vda /mnt");
    let operator = std::thread::spawn(move || {
        // The guest is at it by then.
        std::thread::sleep(Duration::from_secs(1));
        let begin = Instant::now();
        let nodes = ctl(&control, &["-H", "node", "ls"]);
        let node = nodes.split_whitespace().next().expect("a node").to_owned();
        ctl(&control, &["node", "resize", &node, "384M"]);
        begin
    });
    let grown = guest.run(&format!("grow /dev/vda {} /mnt/data 42", 384 * MIB));
    let begin = operator.join().unwrap();
    println!(
        "seen within {} ms of the command, during {} rounds of which the longest took {} ms",
        begin.elapsed().as_millis(),
        grown.number("rounds"),
        grown.number("longest_ms"),
    );
    assert!(grown.number("rounds") > 1, "{grown:?}");
    // What is new is there to be used.
    guest.run("write-zeroes /dev/vda 268435456 134217728");
    guest.run("umount /mnt");
    guest.power_off();
    served.stop();
}

/// What `stonework ctl` prints.
fn ctl(control: &Path, words: &[&str]) -> String {
    let output = Command::new(harness::guest::stonework())
        .args(["ctl", "--socket"])
        .arg(control)
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
