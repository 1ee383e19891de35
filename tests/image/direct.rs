//! Past the page cache, where the host demands an alignment that the guest does not keep.

use std::rc::Rc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use blockcore::ErrorKind;
use blockcore::driver::{WriteFlags, ZeroFlags};
use blockcore::engine::{EngineChoice, make};
use blockcore::graph::RootId;
use blockcore::io::buffer::Segments;
use blockcore::io::{ContextHandle, IoContext, Root};
use harness::host::{LoopDevice, Mount, skip};
use harness::random::Random;

use crate::{Disk, MIB, SECTOR, engines, file_options, odd_memory, places, verify};

/// A file system that takes direct I/O in whole blocks of 4096 bytes only.
fn coarse() -> Option<Mount> {
    match Mount::ext4(64 * MIB, 4096) {
        Ok(mount) => Some(mount),
        Err(reason) => {
            skip("direct I/O in blocks of 4096 bytes", &reason);
            None
        }
    }
}

#[test]
fn requests_of_any_alignment_keep_their_data_on_a_host_with_coarse_blocks() {
    let Some(mount) = coarse() else { return };
    let mut random = Random::announced("coarse blocks");
    for engine in engines() {
        for unit in [1, 512, 4096] {
            let path = mount.sparse(&format!("{engine:?}{unit}"), 2 * MIB);
            let options = file_options(&path, ",cache.direct=on,discard=unmap");
            let disk = Disk::open(engine, &options).expect("it opens");
            assert_eq!(disk.root.limits().request_alignment, 4096);
            let mut model = vec![0; 2 * MIB as usize];
            verify(&disk, &mut model, unit, &mut random);
            disk.close();
            let data = std::fs::read(&path).expect("it is there");
            assert!(
                data == model,
                "{engine:?}: not on the disk what was written"
            );
        }
    }
}

#[test]
fn requests_of_any_alignment_keep_their_data_on_ordinary_files() {
    let mut random = Random::announced("ordinary files");
    for engine in engines() {
        for place in places() {
            for direct in ["on", "off"] {
                let path = place.sparse(direct, 2 * MIB);
                let options = file_options(&path, &format!(",cache.direct={direct},discard=unmap"));
                let disk = match Disk::open(engine, &options) {
                    Ok(disk) => disk,
                    // Older kernels have none in memory, and it is said.
                    Err(error) => {
                        assert!(direct == "on", "{}", error.report());
                        assert!(
                            error.report().contains("no direct I/O"),
                            "{}",
                            error.report()
                        );
                        continue;
                    }
                };
                let mut model = vec![0; 2 * MIB as usize];
                verify(&disk, &mut model, 1, &mut random);
                disk.close();
                assert!(std::fs::read(&path).expect("it is there") == model);
                std::fs::remove_file(&path).expect("it is ours");
            }
        }
    }
}

#[test]
fn requests_of_any_alignment_keep_their_data_on_a_device_with_coarse_blocks() {
    let mut random = Random::announced("coarse device");
    for engine in engines() {
        for direct in ["on", "off"] {
            let device = match LoopDevice::new(2 * MIB, 4096) {
                Ok(device) => device,
                Err(reason) => return skip("a device with blocks of 4096 bytes", &reason),
            };
            let options = format!(
                "host_device,filename={},cache.direct={direct},discard=unmap",
                device.path().display()
            );
            let disk = Disk::open(engine, &options).expect("it opens");
            let mut model = vec![0; 2 * MIB as usize];
            verify(&disk, &mut model, 512, &mut random);
            disk.flush().expect("a flush");
            disk.close();
            assert!(std::fs::read(device.file()).expect("it is there") == model);
        }
    }
}

/// What the guest would have seen: two queues on two workers write to neighbouring sectors, and the one
/// that reads, changes and writes back the block puts old data over what the other has completed.
#[test]
fn writes_from_two_workers_to_one_block_of_the_host_lose_nothing() {
    const BLOCKS: u64 = 2;
    const ROUNDS: u8 = 60;
    let Some(mount) = coarse() else { return };
    for engine in engines() {
        let path = mount.sparse(&format!("{engine:?}"), BLOCKS * 4096);
        let disk = Disk::open(engine, &file_options(&path, ",cache.direct=on")).expect("it opens");
        std::thread::scope(|scope| {
            let (ready, started) = std::sync::mpsc::channel();
            for worker in 0..2 {
                let (id, ready) = (disk.id, ready.clone());
                scope.spawn(move || write_sectors(engine, &ready, id, worker, ROUNDS));
            }
            disk.attach(started.iter().take(2).collect());
        });
        let data = disk.read(0, BLOCKS as usize * 4096).expect("a read");
        for (sector, data) in data.chunks(SECTOR).enumerate() {
            let last = content(sector as u64, ROUNDS - 1);
            assert!(
                data == [last; SECTOR],
                "{engine:?}: sector {sector} is lost"
            );
        }
        disk.close();
    }
}

fn content(sector: u64, round: u8) -> u8 {
    (sector as u8).wrapping_mul(61).wrapping_add(round)
}

/// Writes every second sector, again and again, all at once, and reads each back.
fn write_sectors(
    engine: EngineChoice,
    ready: &Sender<ContextHandle>,
    id: RootId,
    worker: u64,
    rounds: u8,
) {
    let context = IoContext::new(make(engine).expect("it worked before"));
    ready.send(context.handle().clone()).expect("it waits");
    let inner = Rc::clone(&context);
    let root = context.block_on(async move {
        loop {
            if let Some(root) = inner.root(id) {
                break root;
            }
            inner.delay(Duration::from_micros(100)).await;
        }
    });
    let sectors = root.bytes() / SECTOR as u64;
    let tasks: Vec<_> = (worker..sectors)
        .step_by(2)
        .map(|sector| one_sector(Rc::clone(&root), sector, rounds))
        .collect();
    let (done, ended) = futures_channel::oneshot::channel();
    let left = Rc::new(std::cell::Cell::new(tasks.len()));
    let done = Rc::new(std::cell::Cell::new(Some(done)));
    for task in tasks {
        let (left, done) = (Rc::clone(&left), Rc::clone(&done));
        context.spawn(async move {
            task.await;
            left.set(left.get() - 1);
            if left.get() == 0 {
                done.take().map(|done| done.send(()));
            }
        });
    }
    drop(root);
    context.block_on(ended).expect("every task ended");
    context.abandon();
}

async fn one_sector(root: Rc<Root>, sector: u64, rounds: u8) {
    let offset = sector * SECTOR as u64;
    for round in 0..rounds {
        let value = content(sector, round);
        if round % 4 == 1 {
            let all = root.write_zeroes(offset, 512, ZeroFlags::empty());
            all.await.expect("zeroes");
        }
        let from = Segments::allocate(SECTOR, 1);
        from.fill(value);
        let written = root.write(offset, from, WriteFlags::empty());
        written.await.expect("a write");
        let into = Segments::allocate(SECTOR, 1);
        root.read(offset, into.clone()).await.expect("a read");
        assert!(
            into.to_vec() == [value; SECTOR],
            "sector {sector}, round {round}"
        );
    }
}

#[test]
fn a_file_that_direct_requests_cannot_end_in_is_not_written_to_and_works_buffered() {
    let Some(mount) = coarse() else { return };
    let path = mount.sparse("disk.raw", MIB + 512);
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options()
            .write(true)
            .open(&path)
            .expect("it is there"),
        &[0x34; SECTOR],
        MIB,
    )
    .expect("a write");
    let only_read = file_options(&path, ",cache.direct=on,read-only=on");
    let disk = Disk::open(EngineChoice::Threads, &only_read).expect("it opens");
    assert!(disk.read(MIB, SECTOR).expect("a read") == [0x34; SECTOR]);
    disk.close();
    let error = Disk::open(
        EngineChoice::Threads,
        &file_options(&path, ",cache.direct=on"),
    );
    let error = error.err().expect("it is refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    for word in ["disk.raw", "4096", "1049088"] {
        assert!(error.report().contains(word), "{}", error.report());
    }
    let disk = Disk::open(EngineChoice::Threads, &file_options(&path, "")).expect("it opens");
    disk.write(MIB, &[0x12; SECTOR]).expect("a write");
    assert!(disk.read(MIB, SECTOR).expect("a read") == [0x12; SECTOR]);
    disk.close();
}

#[test]
fn a_file_system_without_direct_requests_says_so() {
    let mount = match Mount::ramfs() {
        Ok(mount) => mount,
        Err(reason) => return skip("a file system without direct I/O", &reason),
    };
    let path = mount.sparse("disk.raw", MIB);
    let options = file_options(&path, ",cache.direct=on");
    let error = Disk::open(EngineChoice::Threads, &options);
    let error = error.err().expect("it is refused").report();
    assert!(error.contains("no direct I/O"), "{error}");
}

#[test]
fn memory_of_any_shape_is_read_into_whole() {
    let Some(mount) = coarse() else { return };
    let path = mount.join("disk.raw");
    let mut random = Random::announced("memory");
    let content = random.bytes(MIB as usize);
    std::fs::write(&path, &content).expect("there is room");
    for engine in engines() {
        let disk = Disk::open(engine, &file_options(&path, ",cache.direct=on")).expect("it opens");
        for bytes in [1, 511, 512, 4095, 4096, 4097, 65536, MIB as usize] {
            let memory = odd_memory(bytes, &mut random);
            let offset = MIB - bytes as u64;
            let data = disk.read_into(offset, memory).expect("a read");
            assert!(data == content[offset as usize..], "{bytes}");
        }
        disk.close();
    }
}
