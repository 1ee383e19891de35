//! Files whose length somebody else changes while they are served.

use std::fs;
use std::path::Path;

use blockcore::IoError;
use harness::daemon::{Daemon, Place};
use harness::frontend::Frontend;
use harness::frontend::blk::Request;

use crate::{Disk, MIB, SECTOR, engines, file_options, places};

fn set_length(path: &Path, bytes: u64) {
    fs::File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(bytes))
        .expect("it is ours");
}

#[test]
fn a_file_cut_short_reads_as_zeroes_from_its_end_on() {
    for engine in engines() {
        for place in places() {
            for direct in ["off", "on"] {
                let path = place.file("disk.raw", &vec![0x42; MIB as usize]);
                let options = file_options(&path, &format!(",cache.direct={direct}"));
                let Ok(disk) = Disk::open(engine, &options) else {
                    continue;
                };
                for end in [MIB / 2, MIB / 2 - 1000, 100, 0] {
                    set_length(&path, end);
                    assert_eq!(disk.bytes(), MIB, "the guest's disk keeps its size");
                    // In one read over the end, and in one behind it.
                    let data = disk.read(0, MIB as usize).expect("a read");
                    let (before, after) = data.split_at(end as usize);
                    assert!(before.iter().all(|byte| *byte == 0x42), "{end}, {direct}");
                    assert!(after.iter().all(|byte| *byte == 0), "{end}, {direct}");
                    let data = disk.read(MIB - 4096, 4096).expect("a read");
                    assert!(data == [0; 4096], "{end}, {direct}");
                }
                // A write makes it long again.
                disk.write(MIB - 4096, &[7; 4096]).expect("a write");
                assert!(disk.read(MIB - 4096, 4096).expect("a read") == [7; 4096]);
                assert_eq!(fs::metadata(&path).expect("it is there").len(), MIB);
                disk.flush().expect("a flush");
                disk.close();
            }
        }
    }
}

#[test]
fn a_file_that_grows_shows_no_more_than_it_had() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    for engine in engines() {
        set_length(&path, MIB);
        let disk = Disk::open(engine, &file_options(&path, "")).expect("it opens");
        set_length(&path, 2 * MIB);
        assert_eq!(disk.bytes(), MIB);
        assert_eq!(disk.read(MIB, SECTOR), Err(IoError::OutOfRange));
        assert_eq!(disk.write(MIB, &[1; SECTOR]), Err(IoError::OutOfRange));
        assert_eq!(disk.read(MIB - 512, 2 * SECTOR), Err(IoError::OutOfRange));
        disk.write(MIB - 512, &[1; SECTOR]).expect("a write");
        disk.close();
        let disk = Disk::open(engine, &file_options(&path, "")).expect("it opens");
        assert_eq!(disk.bytes(), 2 * MIB);
        disk.close();
    }
}

#[test]
fn the_daemon_goes_on_when_its_file_is_cut_short() {
    let place = Place::new();
    for options in [
        &["--engine", "threads"][..],
        &["--engine", "threads", "--cache", "none"],
        &["--engine", "auto"],
        &["--engine", "auto", "--cache", "none"],
    ] {
        let disk = place.file("disk.raw", &vec![0x42; MIB as usize]);
        let socket = place.join("vm.sock");
        let mut daemon = Daemon::serve(&disk, &socket, options);
        let mut frontend = Frontend::connect(&socket);
        let mut ring = frontend.start_queue(0, 64);
        set_length(&disk, 1000);
        let data = frontend.read(&mut ring, 0, 16 * SECTOR);
        assert!(data[..1000] == [0x42; 1000], "{options:?}");
        assert!(data[1000..].iter().all(|byte| *byte == 0), "{options:?}");
        assert!(frontend.read(&mut ring, 1024, SECTOR) == [0; SECTOR]);
        frontend.write(&mut ring, 1024, &[9; SECTOR]);
        assert!(frontend.read(&mut ring, 1024, SECTOR) == [9; SECTOR]);
        frontend.succeed(&mut ring, &Request::flush());
        drop(frontend);
        daemon.assert_running();
        daemon.stop();
    }
}
