//! Block devices of the host.

use blockcore::ErrorKind;
use blockcore::engine::EngineChoice;
use harness::daemon::{Daemon, Place, run, serve, stonework};
use harness::frontend::Frontend;
use harness::frontend::blk::{self, Request};
use harness::host::{LoopDevice, skip};

use crate::{Disk, MIB, SECTOR, engines};

fn device(block: u32) -> Option<LoopDevice> {
    LoopDevice::new(8 * MIB, block)
        .map_err(|reason| skip("a device of the host", &reason))
        .ok()
}

#[test]
fn a_device_has_its_own_size_and_limits() {
    for block in [512, 4096] {
        let Some(device) = device(block) else { return };
        for engine in engines() {
            for driver in ["host_device", "file"] {
                for direct in ["on", "off"] {
                    let options = format!(
                        "{driver},filename={},cache.direct={direct}",
                        device.path().display()
                    );
                    let disk = Disk::open(engine, &options).expect("it opens");
                    assert_eq!(disk.bytes(), 8 * MIB);
                    let limits = disk.root.limits();
                    assert_eq!(limits.logical_block_bytes, block);
                    assert!(limits.physical_block_bytes >= block);
                    assert!(limits.discard_granularity_bytes >= block);
                    let alignment = if direct == "on" { block } else { 1 };
                    assert_eq!(limits.request_alignment, alignment, "direct {direct}");
                    disk.close();
                }
            }
        }
    }
}

#[test]
fn the_guest_is_told_of_the_blocks_of_the_device() {
    let Some(device) = device(4096) else { return };
    let place = Place::new();
    let socket = place.join("vm.sock");
    for cache in ["writeback", "none"] {
        let daemon = Daemon::serve(device.path(), &socket, &["--cache", cache]);
        let mut frontend = Frontend::connect(&socket);
        let config = frontend.config();
        assert_eq!(config.capacity_sectors, 8 * MIB / 512);
        assert_eq!(config.blk_size, 4096);
        assert_eq!(config.physical_block_exp, 0);
        assert!(config.discard_sector_alignment >= 8);
        let mut ring = frontend.start_queue(0, 64);
        let data = vec![0x91; 8 * SECTOR];
        frontend.write(&mut ring, 16, &data);
        assert!(frontend.read(&mut ring, 16, 8 * SECTOR) == data);
        let range = [blk::segment(16, 8, 0)];
        frontend.succeed(&mut ring, &Request::discard(&range));
        frontend.succeed(&mut ring, &Request::write_zeroes(&range));
        assert!(frontend.read(&mut ring, 16, 8 * SECTOR) == [0; 8 * SECTOR]);
        drop(frontend);
        daemon.stop();
    }
    // Smaller blocks than the device's would be a lie.
    let refusal = run(serve(device.path(), &socket, &["--block-size", "512"]));
    assert_eq!(refusal.code, Some(1), "{refusal:?}");
    assert!(refusal.errors.contains("4096"), "{refusal:?}");
}

#[test]
fn a_read_only_device_is_for_reading() {
    let device = match LoopDevice::read_only(8 * MIB, 512) {
        Ok(device) => device,
        Err(reason) => return skip("a read-only device", &reason),
    };
    let path = device.path().display();
    for engine in engines() {
        let error = Disk::open(engine, &format!("host_device,filename={path}"));
        let error = error.err().expect("it is refused");
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        assert!(error.report().contains("read-only"), "{}", error.report());
        let options = format!("host_device,filename={path},read-only=on");
        let disk = Disk::open(engine, &options).expect("it opens");
        assert!(disk.read(0, SECTOR).expect("a read") == [0; SECTOR]);
        disk.write(0, &[1; SECTOR]).expect_err("no write");
        disk.close();
    }
    let place = Place::new();
    let socket = place.join("vm.sock");
    let refusal = run(serve(device.path(), &socket, &[]));
    assert_eq!(refusal.code, Some(1), "{refusal:?}");
    assert!(refusal.errors.contains("read-only"), "{refusal:?}");
    let daemon = Daemon::serve(device.path(), &socket, &["--read-only"]);
    assert!(Frontend::connect(&socket).has(blk::feature::RO));
    daemon.stop();
}

#[test]
fn driver_host_device_takes_devices_only() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    let options = format!("host_device,filename={}", path.display());
    let error = Disk::open(EngineChoice::Threads, &options).err();
    let error = error.expect("it is refused").report();
    assert!(error.contains("driver 'file'"), "{error}");
    for driver in ["host_device", "file"] {
        let error = Disk::open(
            EngineChoice::Threads,
            &format!("{driver},filename=/dev/null"),
        );
        let error = error.err().expect("it is refused").report();
        assert!(error.contains("character device"), "{error}");
    }
}

#[test]
fn a_device_is_locked_like_a_file() {
    let Some(device) = device(512) else { return };
    let place = Place::new();
    let socket = place.join("vm.sock");
    let daemon = Daemon::serve(device.path(), &socket, &[]);
    let refusal = run(serve(device.path(), &place.join("other.sock"), &[]));
    assert_eq!(refusal.code, Some(1), "{refusal:?}");
    assert!(refusal.errors.contains("in use"), "{refusal:?}");
    assert!(
        refusal.errors.contains(&daemon.pid().to_string()),
        "{refusal:?}"
    );
    daemon.stop();
    let daemon = Daemon::start_announced({
        let mut command = stonework(["serve"]);
        command.arg(device.path()).arg("--socket").arg(&socket);
        command
    });
    daemon.stop();
}
