//! Hosts that take no more data.

use std::fs;
use std::process::Command;
use std::time::Duration;

use blockcore::IoError;
use blockcore::driver::ZeroFlags;
use harness::daemon::{Daemon, Place, stonework_path};
use harness::frontend::blk::{self, Request};
use harness::frontend::{Frontend, LIMIT};
use harness::host::{LoopDevice, Mount, skip};

use crate::{Disk, MIB, SECTOR, engines, file_options};

#[test]
fn a_full_file_system_fails_writes_until_there_is_room_again() {
    const CHUNK: usize = 256 << 10;
    for engine in engines() {
        let mount = match Mount::tmpfs(4 * MIB) {
            Ok(mount) => mount,
            Err(reason) => return skip("a full file system", &reason),
        };
        let path = mount.sparse("disk.raw", 64 * MIB);
        let other = mount.sparse("other", 0);
        let disk = Disk::open(engine, &file_options(&path, ",discard=unmap")).expect("it opens");
        let chunk = |number: u64| vec![number as u8 + 1; CHUNK];
        let write = |number: u64| disk.write(number * CHUNK as u64, &chunk(number));
        let written = (0..64).find(|number| write(*number) == Err(IoError::NoSpace));
        let written = written.expect("it gets full");
        assert!(written >= 8, "only {written} fitted");
        assert_eq!(write(written + 1), Err(IoError::NoSpace));
        // Zeroes that have to be written need room as well.
        let zeroes = disk.zero(32 * MIB, 4 * MIB, ZeroFlags::empty());
        assert_eq!(zeroes, Err(IoError::NoSpace));
        for number in 0..written {
            let data = disk.read(number * CHUNK as u64, CHUNK).expect("a read");
            assert!(data == chunk(number), "{engine:?}: chunk {number}");
        }
        disk.flush().expect("a full disk can be flushed");
        // What exists can be written over.
        disk.write(0, &chunk(0)).expect("a write in place");
        disk.discard(0, 4 * CHUNK as u64).expect("a discard");
        write(written).expect("there is room again");
        // And somebody else's file is gone.
        std::fs::remove_file(other).expect("it is ours");
        for number in 4..=written {
            let data = disk.read(number * CHUNK as u64, CHUNK).expect("a read");
            assert!(data == chunk(number), "{engine:?}: chunk {number}");
        }
        disk.close();
    }
}

/// What the guest would have seen: a write that fails, and its file system read-only, though there is room
/// again a moment later.
#[test]
fn a_guest_waits_for_room_on_the_host_and_its_flushes_with_it() {
    const CHUNK: usize = 256 << 10;
    for engine in ["threads", "auto"] {
        let mount = match Mount::tmpfs(4 * MIB) {
            Ok(mount) => mount,
            Err(reason) => return skip("a full file system", &reason),
        };
        let path = mount.sparse("disk.raw", 64 * MIB);
        let other = mount.join("other");
        fs::write(&other, vec![1; 2 << 20]).expect("there is room");
        let place = Place::new();
        let socket = place.join("vm.sock");
        let mut command = Command::new(stonework_path());
        command.arg("serve").arg(&path).arg("--socket").arg(&socket);
        command.args(["--format", "raw", "--engine", engine]);
        let mut daemon = Daemon::start_announced(command);
        let mut frontend = Frontend::connect(&socket);
        let mut rings = [0, 1].map(|queue| frontend.start_queue(queue, 64));
        let chunk = |number: usize| vec![number as u8 + 1; CHUNK];
        let sector = |number: usize| (number * CHUNK / SECTOR) as u64;
        let mut waiting = None;
        for number in 0..16 {
            let request = Request::write(sector(number), &chunk(number));
            let pending = frontend.submit(&mut rings[0], &request);
            match rings[0].wait(Duration::from_millis(700)) {
                Some(used) => assert_eq!(frontend.outcome(&pending, used).status, blk::OK),
                None => {
                    waiting = Some((number, pending));
                    break;
                }
            }
        }
        let (number, write) = waiting.expect("it gets full");
        assert!(number >= 4, "{engine}: only {number} chunks fitted");
        // Reads go on; a flush on another queue waits for the write.
        assert!(frontend.read(&mut rings[1], 0, CHUNK) == chunk(0));
        let flush = frontend.submit(&mut rings[1], &Request::flush());
        for ring in &mut rings {
            assert!(ring.wait(Duration::from_millis(200)).is_none(), "{engine}");
        }
        assert!(daemon.errors().contains("held until it is resumed"));
        fs::remove_file(&other).expect("it is ours");
        // The daemon tries again by itself.
        let used = rings[0].wait(LIMIT).expect("the write completes");
        assert_eq!(frontend.outcome(&write, used).status, blk::OK);
        let used = rings[1].wait(LIMIT).expect("the flush completes");
        assert_eq!(frontend.outcome(&flush, used).status, blk::OK);
        for number in 0..=number {
            let data = frontend.read(&mut rings[1], sector(number), CHUNK);
            assert!(data == chunk(number), "{engine}: chunk {number}");
        }
        // With the host full again, the guest's reset does not wait: its write fails.
        fs::write(&other, vec![1; 1 << 20]).expect("there is room");
        let request = Request::write(sector(100), &vec![9; 8 * CHUNK]);
        let write = frontend.submit(&mut rings[0], &request);
        assert!(rings[0].wait(Duration::from_millis(500)).is_none());
        let served = rings[0].available_index();
        assert_eq!(frontend.stop_queue(&rings[0]), served, "all is completed");
        let used = rings[0].wait(LIMIT).expect("the write ends with its queue");
        assert_eq!(frontend.outcome(&write, used).status, blk::IOERR);
        drop(frontend);
        daemon.assert_running();
        daemon.stop();
    }
}

/// What the guest would have seen: its disk gone for good. A write past the longest file that the process
/// may have brings a signal that ends it by default.
#[test]
fn a_limit_on_file_length_fails_writes_and_does_not_end_the_daemon() {
    for options in [
        &["--engine", "threads"][..],
        &["--engine", "threads", "--cache", "none"],
        &["--engine", "auto"],
        &["--engine", "auto", "--cache", "none"],
        &["--engine", "auto", "--cache", "writethrough"],
    ] {
        let place = Place::new();
        let disk = place.sparse("disk.raw", 4 * MIB);
        let socket = place.join("vm.sock");
        let mut command = Command::new("sh");
        // In units of 512 bytes.
        command
            .args(["-c", "ulimit -f 2048; exec \"$@\"", "sh"])
            .arg(stonework_path())
            .arg("serve")
            .arg(&disk)
            .arg("--socket")
            .arg(&socket)
            .args(["--format", "raw"])
            .args(options);
        let mut daemon = Daemon::start_announced(command);
        let mut frontend = Frontend::connect(&socket);
        let mut ring = frontend.start_queue(0, 64);
        let data = vec![0x6d; 256 * SECTOR];
        frontend.write(&mut ring, 0, &data);
        // Over the limit, behind it, and in small and large pieces.
        for (sector, sectors) in [(2040, 16), (2048, 1), (4096, 256), (1920, 256)] {
            let request = Request::write(sector, &data[..sectors * SECTOR]);
            let status = frontend.status(&mut ring, &request);
            assert_eq!(status, blk::IOERR, "{options:?}: sector {sector}");
        }
        frontend.write(&mut ring, 1024, &data);
        frontend.succeed(&mut ring, &Request::flush());
        assert!(
            frontend.read(&mut ring, 0, data.len()) == data,
            "{options:?}"
        );
        assert!(
            frontend.read(&mut ring, 1024, data.len()) == data,
            "{options:?}"
        );
        assert!(frontend.read(&mut ring, 4096, SECTOR) == [0; SECTOR]);
        drop(frontend);
        daemon.assert_running();
        daemon.stop();
    }
}

/// What the guest would have seen: its second flush succeeds, although what the first one could not write
/// is gone. The page cache of a device takes more than the file below it has room for.
#[test]
fn after_a_flush_that_failed_none_succeeds_until_the_node_is_opened_again() {
    for engine in engines() {
        let mount = match Mount::tmpfs(4 * MIB) {
            Ok(mount) => mount,
            Err(reason) => return skip("a flush that fails", &reason),
        };
        let file = mount.sparse("device", 64 * MIB);
        let device = match LoopDevice::on(&file, 512) {
            Ok(device) => device,
            Err(reason) => return skip("a flush that fails", &reason),
        };
        let options = format!("host_device,filename={}", device.path().display());
        let disk = Disk::open(engine, &options).expect("it opens");
        disk.write(0, &[1; SECTOR]).expect("a write");
        disk.flush().expect("there is room");
        for number in 0..8 {
            let data = vec![2; MIB as usize];
            disk.write(MIB * (number + 1), &data)
                .expect("the page cache takes it");
        }
        let flush = disk.flush();
        assert_eq!(flush, Err(IoError::FlushLost), "{engine:?}");
        for _ in 0..3 {
            // Nothing is dirty any more, so the host itself has no complaint.
            assert_eq!(disk.flush(), Err(IoError::FlushLost), "{engine:?}");
        }
        assert!(disk.read(0, SECTOR).expect("a read") == [1; SECTOR]);
        disk.close();
        let disk = Disk::open(engine, &options).expect("it opens again");
        disk.write(0, &[3; SECTOR]).expect("a write");
        disk.flush().expect("a new beginning");
        disk.close();
    }
}
