//! A disk that keeps nothing.

use std::fs;
use std::path::Path;

use harness::daemon::{Daemon, Place, run, serve};
use harness::frontend::Frontend;

use crate::{MIB, SECTOR, says, text};

fn temporary(disk: &Path, socket: &Path, directory: &Path, options: &[&str]) -> Daemon {
    let mut command = serve(disk, socket, &[&["--temporary"], options].concat());
    command.env("TMPDIR", directory);
    Daemon::start_announced(command)
}

#[test]
fn what_is_written_to_a_temporary_disk_is_gone_with_it() {
    let place = Place::new();
    let old = vec![0x66; MIB as usize];
    for (format, options) in [("raw", &[][..]), ("qcow2", &["--format", "qcow2"])] {
        let disk = place.file("disk.raw", &old);
        let disk = match format {
            "raw" => disk,
            _ => {
                let image = place.join("disk.qcow2");
                let made = std::process::Command::new("qemu-img")
                    .args(["convert", "-f", "raw", "-O", "qcow2"])
                    .args([&disk, &image])
                    .status();
                assert!(made.expect("qemu-img is installed").success());
                image
            }
        };
        let before = fs::read(&disk).unwrap();
        let directory = place.join(format);
        fs::create_dir(&directory).unwrap();
        let sockets = ["a.sock", "b.sock"].map(|name| place.join(&format!("{format}-{name}")));
        // Two have it at a time: none of them writes to it.
        let daemons = sockets
            .each_ref()
            .map(|socket| temporary(&disk, socket, &directory, options));
        for (socket, byte) in sockets.iter().zip([1, 2]) {
            let mut frontend = Frontend::connect(socket);
            assert_eq!(frontend.config().capacity_sectors, MIB / 512);
            let mut ring = frontend.start_queue(0, 64);
            assert_eq!(frontend.read(&mut ring, 3, SECTOR), [0x66; SECTOR]);
            frontend.write(&mut ring, 3, &[byte; SECTOR]);
            assert_eq!(frontend.read(&mut ring, 3, SECTOR), [byte; SECTOR]);
            assert_eq!(frontend.read(&mut ring, 4, SECTOR), [0x66; SECTOR]);
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        for daemon in daemons {
            daemon.stop();
        }
        assert!(fs::read(&disk).unwrap() == before, "{format}");
        let again = temporary(&disk, &sockets[0], &directory, options);
        let mut frontend = Frontend::connect(&sockets[0]);
        let mut ring = frontend.start_queue(0, 64);
        assert_eq!(frontend.read(&mut ring, 3, SECTOR), [0x66; SECTOR]);
        drop(frontend);
        again.stop();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }
}

#[test]
fn a_temporary_disk_needs_a_place_for_what_is_written() {
    let place = Place::new();
    let disk = place.sparse("disk.raw", MIB);
    let missing = place.join("missing");
    let mut command = serve(&disk, &place.join("vm.sock"), &["--temporary"]);
    command.env("TMPDIR", &missing);
    says(&run(command), 1, &[text(&missing), "TMPDIR"]);
    for other in ["--read-only", "--create=1M"] {
        let refusal = run(serve(
            &disk,
            &place.join("vm.sock"),
            &["--temporary", other],
        ));
        assert_eq!(refusal.code, Some(2), "{refusal:?}");
    }
}
