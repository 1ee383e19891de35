//! How it begins and ends, and the options that change how it works.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::daemon::{Daemon, Place, eventually, run, serve, stonework};
use harness::frontend::blk::{self, Request};
use harness::frontend::ring::Part;
use harness::frontend::{Frontend, LIMIT};
use rustix::process::{Pid, Signal, kill_process};

use crate::{MIB, SECTOR, serves, text};

#[test]
fn help_names_every_option_and_ends_well() {
    let help = run(stonework(["serve", "--help"]));
    assert_eq!(help.code, Some(0), "{help:?}");
    for option in [
        "--socket",
        "--format",
        "--read-only",
        "--cache",
        "--queues",
        "--workers",
        "--cpus",
        "--poll-max-us",
        "--engine",
        "--serial",
        "--block-size",
        "--create",
    ] {
        assert!(help.output.contains(option), "{option}: {}", help.output);
    }
    let help = run(stonework(["--help"]));
    assert_eq!(help.code, Some(0), "{help:?}");
    assert!(help.output.contains("serve"), "{}", help.output);
}

#[test]
fn it_says_what_it_serves_and_how_to_attach_it() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(&disk, &socket, &[]);
    eventually("it has said all", || {
        let said = daemon.output();
        said.contains(text(&disk))
            && said.contains(text(&socket))
            && said.contains("vhost-user-blk-pci")
            && said.contains("vhost_user=")
    });
    daemon.stop();
}

#[test]
fn each_signal_to_end_ends_it_well_and_takes_the_socket_away() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let place = Place::new();
        let disk = place.sparse("disk.raw", MIB);
        let socket = place.join("vm.sock");
        let mut daemon = Daemon::serve(&disk, &socket, &[]);
        serves(&socket);
        daemon.signal(signal);
        let status = daemon.wait();
        assert!(status.success(), "{signal:?}: {status}");
        assert!(!socket.exists(), "{signal:?}: the socket is still there");
    }
}

#[test]
fn ending_with_a_front_end_and_requests_in_flight_loses_nothing_completed() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", 64 * MIB);
    let socket = place.join("vm.sock");
    let mut daemon = Daemon::serve(&disk, &socket, &[]);
    let mut frontend = Frontend::connect(&socket);
    let mut ring = frontend.start_queue(0, 256);
    let data = vec![0x5e; 128 * SECTOR];
    let pending: Vec<_> = (0..64)
        .map(|number| frontend.submit(&mut ring, &Request::write(128 * number, &data)))
        .collect();
    daemon.signal(Signal::TERM);
    let status = daemon.wait();
    assert!(status.success(), "{status}");
    assert!(frontend.connection.closes_within(LIMIT));

    let bytes = fs::read(&disk).expect("the image can be read");
    while let Some(used) = ring.try_pop() {
        let number = pending
            .iter()
            .position(|pending| u32::from(pending.head) == used.head)
            .expect("it was in flight");
        assert_eq!(frontend.outcome(&pending[number], used).status, blk::OK);
        let at = number * data.len();
        assert!(bytes[at..at + data.len()] == data, "request {number}");
    }
}

#[test]
fn completed_writes_survive_the_process() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(&disk, &socket, &[]);
    {
        let mut frontend = Frontend::connect(&socket);
        let mut ring = frontend.start_queue(0, 64);
        frontend.write(&mut ring, 7, &[0x99; SECTOR]);
    }
    daemon.kill();
    assert!(fs::read(&disk).expect("the image is there")[7 * SECTOR..][..SECTOR] == [0x99; SECTOR]);
    // The socket of the killed one is in the way, and is replaced.
    assert!(socket.exists());
    let daemon = Daemon::serve(&disk, &socket, &[]);
    serves(&socket);
    daemon.stop();
}

#[test]
fn every_engine_and_number_of_workers_serves() {
    for options in [
        &["--engine", "threads"][..],
        &["--engine", "io_uring"],
        &["--engine", "auto"],
        &["--workers", "1"],
        &["--workers", "4", "--queues", "2"],
        &["--cpus", "0"],
        &["--cpus", "0-1", "--workers", "2"],
        &["--poll-max-us", "0"],
        &["--poll-max-us", "100"],
        &["--engine", "threads", "--cache", "none"],
        &["--engine", "threads", "--cache", "writethrough"],
        &[
            "--engine",
            "threads",
            "--workers",
            "2",
            "--poll-max-us",
            "0",
        ],
    ] {
        let place = Place::new();
        let disk = place.sparse("disk.raw", 16 * MIB);
        let socket = place.join("vm.sock");
        let daemon = Daemon::serve(&disk, &socket, options);
        {
            let mut frontend = Frontend::connect(&socket);
            let mut rings = [frontend.start_queue(0, 64), frontend.start_queue(1, 64)];
            for turn in 0..20_u64 {
                for ring in &mut rings {
                    let sector = 16 * turn + 8 * u64::from(ring.queue);
                    let data = [turn as u8 + 1; 8 * SECTOR];
                    frontend.write(ring, sector, &data);
                    assert!(
                        frontend.read(ring, sector, 8 * SECTOR) == data,
                        "{options:?}"
                    );
                }
            }
            let ring = &mut rings[0];
            frontend.succeed(ring, &Request::flush());
            let range = [blk::segment(0, 8, 0)];
            frontend.succeed(ring, &Request::discard(&range));
            frontend.succeed(ring, &Request::write_zeroes(&range));
            assert!(frontend.read(ring, 0, 8 * SECTOR) == [0; 8 * SECTOR]);
            let beyond = Request::read(32 << 10, SECTOR);
            assert_eq!(frontend.status(ring, &beyond), blk::IOERR, "{options:?}");
        }
        daemon.stop();
    }
}

/// `serve` under a limit that the shell sets.
fn limited(limit: &str, disk: &Path, socket: &Path, options: &[&str]) -> Command {
    let serve = serve(disk, socket, options);
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(format!("{limit} && exec \"$@\""))
        .arg("sh")
        .arg(serve.get_program())
        .args(serve.get_args());
    shell
}

#[test]
fn every_queue_can_be_used_whatever_the_soft_limit_of_descriptors() {
    const QUEUES: u32 = 96;
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let command = limited("ulimit -Sn 256", &disk, &socket, &["--queues", "96"]);
    let daemon = Daemon::start_announced(command);
    {
        let mut frontend = Frontend::connect(&socket);
        let mut rings: Vec<_> = (0..QUEUES)
            .map(|queue| frontend.start_queue(queue, 8))
            .collect();
        for ring in &mut rings {
            ring.ask_for_call(ring.used_index());
            let mark = frontend.heap.mark();
            frontend.submit(ring, &Request::read(0, SECTOR));
            let called = ring.call.wait(LIMIT);
            assert!(called, "queue {} is never called", ring.queue);
            ring.pop();
            frontend.heap.release(mark);
        }
    }
    daemon.stop();
}

#[test]
fn a_limit_of_file_lengths_makes_writes_fail_and_nothing_else() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    for engine in ["threads", "auto"] {
        let command = limited("ulimit -f 64", &disk, &socket, &["--engine", engine]);
        let mut daemon = Daemon::start_announced(command);
        {
            let mut frontend = Frontend::connect(&socket);
            let mut ring = frontend.start_queue(0, 64);
            frontend.write(&mut ring, 0, &[1; SECTOR]);
            for bytes in [SECTOR, 128 << 10] {
                let beyond = Request::write(1024, &vec![1; bytes]);
                assert_eq!(frontend.status(&mut ring, &beyond), blk::IOERR, "{engine}");
            }
            assert!(frontend.read(&mut ring, 0, SECTOR) == [1; SECTOR]);
        }
        daemon.assert_running();
        daemon.stop();
    }
}

#[test]
fn nobody_to_read_what_it_says_is_no_reason_to_end() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let socket = place.join("vm.sock");
    let mut command = serve(&disk, &socket, &[]);
    let (reader, writer) = std::io::pipe().expect("no pipe");
    drop(reader);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().expect("no descriptor"))
        .stderr(writer)
        .spawn()
        .expect("it can be started");
    eventually("it listens", || socket.exists());
    serves(&socket);
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::USR1).expect("it runs");
    serves(&socket);
    kill_process(pid, Signal::TERM).expect("it still runs");
    let status = child.wait().expect("it was started");
    assert!(status.success(), "{status}");
}

#[test]
fn requests_that_need_a_copy_of_their_data_take_bounded_memory() {
    const REQUESTS: usize = 1024;
    for engine in ["threads", "auto"] {
        let place = Place::new();
        let disk = place.file("disk.raw", &vec![0x61; 16 * MIB as usize]);
        let socket = place.join("vm.sock");
        let options = ["--cache", "none", "--engine", engine, "--workers", "1"];
        let daemon = Daemon::serve(&disk, &socket, &options);
        let mut frontend = Frontend::connect(&socket);
        let mut ring = frontend.start_queue(0, 4096);
        let addr = frontend.heap.take(MIB + 8192, 4096);
        frontend.memory.write(addr, &blk::header(blk::kind::IN, 0));
        let before = daemon.resident_bytes();
        for _ in 0..REQUESTS {
            // An odd address, where no direct I/O can go.
            let head = ring.lay_out(&[
                Part::readable(addr, 16),
                Part::writable(addr + 17, MIB as u32),
                Part::writable(addr + MIB + 4096, 1),
            ]);
            ring.offer(head);
        }
        ring.publish();
        ring.kick_if_wanted();
        let mut most = before;
        for _ in 0..REQUESTS {
            eventually("all requests are completed", || {
                most = most.max(daemon.resident_bytes());
                ring.try_pop().is_some()
            });
        }
        assert!(frontend.memory.read(addr + 17, MIB as usize) == vec![0x61; MIB as usize]);
        let more = most - before;
        assert!(more < 256 * MIB, "{engine}: {} MiB for copies", more / MIB);
        daemon.stop();
    }
}
