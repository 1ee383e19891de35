//! A range of a file as a disk, and a disk that is nothing.

use blockcore::driver::ZeroFlags;
use blockcore::engine::EngineChoice;
use blockcore::{ErrorKind, IoError};
use harness::daemon::Place;
use harness::host::{LoopDevice, Mount, skip};
use harness::random::Random;

use crate::{Disk, MIB, SECTOR, engines, verify};

const FILE: usize = 3 << 20;

#[test]
fn a_range_of_a_file_is_a_disk_and_the_rest_stays_as_it_is() {
    let place = Place::new();
    let coarse = Mount::ext4(64 * MIB, 4096);
    if let Err(reason) = &coarse {
        skip("ranges of a file on coarse blocks", reason);
    }
    let mut random = Random::announced("ranges of a file");
    for engine in engines() {
        for direct in ["off", "on"] {
            for (offset, bytes) in [
                (0_usize, 1 << 20),
                (4096, 1 << 20),
                (512, 1 << 20),
                (1537, 999_936),
            ] {
                let path = match &coarse {
                    Ok(mount) => mount.join("disk.raw"),
                    Err(_) => place.join("disk.raw"),
                };
                let content = random.bytes(FILE);
                std::fs::write(&path, &content).expect("there is room");
                let options = format!(
                    "raw,offset={offset},size={bytes},discard=unmap,cache.direct={direct},\
                     file.driver=file,file.filename={}",
                    path.display()
                );
                let disk = Disk::open(engine, &options).expect("it opens");
                let mut model = content[offset..offset + bytes].to_vec();
                verify(&disk, &mut model, 1, &mut random);
                disk.close();
                let now = std::fs::read(&path).expect("it is there");
                assert!(now[..offset] == content[..offset], "{options}");
                assert!(now[offset..offset + bytes] == model, "{options}");
                assert!(
                    now[offset + bytes..] == content[offset + bytes..],
                    "{options}"
                );
            }
        }
    }
}

/// What the guest would have seen: errors for discards and zeroes, since the range was not shifted by
/// whole blocks of the device.
#[test]
fn a_range_off_the_blocks_of_a_device_is_a_disk_too() {
    let mut random = Random::announced("ranges of a device");
    for engine in engines() {
        for direct in ["off", "on"] {
            let device = match LoopDevice::new(FILE as u64, 4096) {
                Ok(device) => device,
                Err(reason) => return skip("ranges of a device", &reason),
            };
            let content = random.bytes(FILE);
            let options = format!(
                "raw,offset=1536,size=1M,discard=unmap,cache.direct={direct},\
                 file.driver=host_device,file.filename={}",
                device.path().display()
            );
            let disk = Disk::open(engine, &options.replace("offset=1536,size=1M", "offset=0"));
            let disk = disk.expect("it opens");
            disk.write(0, &content).expect("a write");
            disk.close();
            let disk = Disk::open(engine, &options).expect("it opens");
            let mut model = content[1536..][..1 << 20].to_vec();
            verify(&disk, &mut model, 512, &mut random);
            disk.flush().expect("a flush");
            disk.close();
            let now = std::fs::read(device.file()).expect("it is there");
            assert!(now[..1536] == content[..1536], "direct {direct}");
            assert!(now[1536 + (1 << 20)..] == content[1536 + (1 << 20)..]);
        }
    }
}

#[test]
fn a_range_ends_with_the_file_unless_it_is_said() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    let open = |range: &str| {
        let options = format!(
            "raw{range},file.driver=file,file.filename={}",
            path.display()
        );
        Disk::open(EngineChoice::Threads, &options)
    };
    for (range, bytes) in [
        ("", MIB),
        (",offset=1k", MIB - 1024),
        (",offset=1M", 0),
        (",size=0", 0),
        (",size=1M", MIB),
        (",offset=1k,size=512", 512),
    ] {
        let disk = open(range).expect("it fits");
        assert_eq!(disk.bytes(), bytes, "'{range}'");
        assert_eq!(disk.read(bytes, SECTOR), Err(IoError::OutOfRange));
        disk.close();
    }
    for (range, word) in [
        (",offset=1048577", "past the end"),
        (",offset=15E", "past the end"),
        (",size=1049088", "1048576"),
        (",offset=512,size=1M", "1048064"),
        (",offset=512,size=15E", "1048064"),
    ] {
        let error = open(range).err().expect("it does not fit");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.report().contains(word), "{}", error.report());
    }
}

#[test]
fn a_null_disk_takes_everything_and_keeps_nothing() {
    for engine in engines() {
        let disk = Disk::open(engine, "null-co,size=64M,read-zeroes=on").expect("it opens");
        assert_eq!(disk.bytes(), 64 * MIB);
        disk.write(MIB, &[1; SECTOR]).expect("a write");
        assert!(disk.read(MIB, SECTOR).expect("a read") == [0; SECTOR]);
        disk.zero(0, 64 * MIB, ZeroFlags::MAY_UNMAP)
            .expect("zeroes");
        disk.discard(0, 64 * MIB).expect("a discard");
        disk.flush().expect("a flush");
        assert_eq!(disk.read(64 * MIB, 1), Err(IoError::OutOfRange));
        disk.close();

        let disk = Disk::open(engine, "null-co").expect("it opens");
        assert_eq!(disk.bytes(), 1 << 30);
        let memory = blockcore::io::buffer::Segments::allocate(SECTOR, 1);
        memory.fill(0x5a);
        let data = disk.read_into(0, memory).expect("a read");
        assert!(data == [0x5a; SECTOR], "it did not touch the memory");
        disk.close();
    }
}

#[test]
fn a_null_disk_takes_its_time_if_told_to() {
    let disk = Disk::open(EngineChoice::Threads, "null-co,latency-ns=20000000").expect("it opens");
    let began = std::time::Instant::now();
    disk.read(0, SECTOR).expect("a read");
    assert!(began.elapsed() >= std::time::Duration::from_millis(20));
    disk.close();
}
