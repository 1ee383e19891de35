//! What ranges of a file are, and what `qemu-img map` says of them.

use std::path::Path;
use std::process::Command;

use blockcore::driver::{Status, StatusFlags, ZeroFlags};
use blockcore::engine::EngineChoice;
use harness::daemon::Place;
use harness::host::{LoopDevice, Mount, skip};
use harness::random::Random;
use regex::Regex;

use crate::{Disk, MIB, SECTOR, engines, file_options, places};

/// A range and whether it reads as zeroes by the map alone.
type Extent = (u64, u64, bool);

/// All of the disk, in as few ranges as there are.
fn map(disk: &Disk) -> Vec<Extent> {
    let (mut map, mut offset) = (Vec::<Extent>::new(), 0);
    while offset < disk.bytes() {
        let status = disk.status(true, offset, disk.bytes() - offset);
        assert!(status.bytes > 0, "no answer at {offset}");
        assert!(status.flags.contains(StatusFlags::PLACE), "{status:?}");
        assert_eq!(status.place.offset, offset, "{status:?}");
        let zero = status.flags.contains(StatusFlags::ZERO);
        assert_ne!(zero, status.flags.contains(StatusFlags::DATA), "{status:?}");
        let end = offset + status.bytes;
        assert_eq!(status.flags.contains(StatusFlags::END), end == disk.bytes());
        match map.last_mut() {
            Some(last) if last.2 == zero => last.1 = end,
            _ => map.push((offset, end, zero)),
        }
        offset = end;
    }
    map
}

fn qemu_map(path: &Path, bytes: u64, direct: bool) -> Option<Vec<Extent>> {
    let cache = if direct { "on" } else { "off" };
    let image = format!(
        "driver=file,filename={},cache.direct={cache},read-only=on,force-share=on",
        path.display()
    );
    let output = Command::new("qemu-img")
        .args(["map", "--output=json", "-U", "--image-opts", &image])
        .output()
        .ok()?;
    assert!(output.status.success(), "{output:?}");
    let entry = Regex::new(
        r#""start": ([0-9]+), "length": ([0-9]+), .*"zero": (true|false), "data": (true|false)"#,
    );
    let text = String::from_utf8(output.stdout).expect("JSON");
    let entries = text.lines().map(|line| {
        let found = entry.as_ref().expect("a pattern").captures(line);
        let found = found.unwrap_or_else(|| panic!("not an entry: {line}"));
        let number = |index: usize| found[index].parse::<u64>().expect("a number");
        assert_ne!(&found[3], &found[4], "{line}");
        // A length that is no multiple of 512 is rounded up there.
        let end = (number(1) + number(2)).min(bytes);
        (number(1), end, &found[3] == "true")
    });
    Some(entries.collect())
}

#[test]
fn the_map_of_a_file_is_that_of_qemu_img() {
    let mut random = Random::announced("maps of files");
    for engine in engines() {
        for place in places() {
            for direct in [false, true] {
                let bytes = if direct { 8 * MIB } else { 8 * MIB - 777 };
                let path = place.sparse("disk.raw", bytes);
                let cache = if direct { "on" } else { "off" };
                let more = format!(",discard=unmap,cache.direct={cache}");
                let Ok(disk) = Disk::open(engine, &file_options(&path, &more)) else {
                    continue;
                };
                for turn in 0..12 {
                    for _ in 0..random.below(6) {
                        let offset = random.below(bytes - 700_000) / 512 * 512;
                        let length = 512 + random.below(600_000) / 512 * 512;
                        match random.below(4) {
                            0 | 1 => disk.write(offset, &vec![7; length as usize]),
                            2 => disk.discard(offset, length),
                            _ => disk.zero(offset, length, ZeroFlags::MAY_UNMAP),
                        }
                        .expect("it works");
                        // Asked of a known range, that is what the next answer comes from.
                        disk.status(random.below(2) == 0, offset, length);
                    }
                    let ours = map(&disk);
                    let Some(theirs) = qemu_map(&path, bytes, direct) else {
                        return skip("the map of a file", "there is no qemu-img");
                    };
                    assert_eq!(ours, theirs, "{engine:?}, turn {turn}, direct {direct}");
                    let data = disk.read(0, bytes as usize / 512 * 512).expect("a read");
                    for (begin, end, _) in ours.iter().filter(|extent| extent.2) {
                        let end = (*end).min(data.len() as u64);
                        let part = &data[*begin as usize..end.max(*begin) as usize];
                        assert!(part.iter().all(|byte| *byte == 0), "turn {turn}: {begin}");
                    }
                }
                disk.close();
            }
        }
    }
}

fn has(status: Status, flags: StatusFlags, bytes: u64) {
    let all = flags | StatusFlags::PLACE | StatusFlags::ALLOCATED;
    assert_eq!(
        (status.flags - StatusFlags::END, status.bytes),
        (all, bytes)
    );
}

#[test]
fn who_does_not_ask_for_zeroes_gets_a_long_answer_that_hides_none_from_others() {
    let place = Place::new();
    for engine in engines() {
        let path = place.sparse("disk.raw", MIB);
        let disk = Disk::open(engine, &file_options(&path, "")).expect("it opens");
        disk.write(0, &[1; 4096]).expect("a write");
        has(disk.status(false, 0, MIB), StatusFlags::DATA, MIB);
        has(disk.status(true, 0, MIB), StatusFlags::DATA, 4096);
        has(disk.status(true, 4096, MIB), StatusFlags::ZERO, MIB - 4096);
        // No more than was asked for, wherever that begins and ends.
        has(disk.status(true, 1000, 7), StatusFlags::DATA, 7);
        has(disk.status(true, 5000, 7), StatusFlags::ZERO, 7);
        assert_eq!(disk.status(true, MIB, 1).bytes, 0);
        disk.close();
    }
}

#[test]
fn a_file_cut_short_or_made_longer_has_a_map_of_its_disk() {
    let place = Place::new();
    for engine in engines() {
        let path = place.file("disk.raw", &vec![1; MIB as usize]);
        let file = std::fs::File::options().write(true).open(&path);
        let file = file.expect("it is ours");
        let disk = Disk::open(engine, &file_options(&path, ",cache.direct=on"));
        let disk = disk.expect("it opens");
        file.set_len(MIB / 2 + 1).expect("it is ours");
        let data_end = disk.status(true, 0, MIB).bytes;
        assert!(
            (MIB / 2 + 1..=MIB / 2 + 4096).contains(&data_end),
            "{data_end}"
        );
        has(
            disk.status(true, data_end, MIB),
            StatusFlags::ZERO,
            MIB - data_end,
        );
        file.set_len(2 * MIB).expect("it is ours");
        // The rest of the last block is there now.
        let data_end = MIB / 2 + 4096;
        has(
            disk.status(true, data_end, MIB),
            StatusFlags::ZERO,
            MIB - data_end,
        );
        disk.close();
    }
}

#[test]
fn a_device_is_all_data_and_a_null_disk_has_none() {
    let data = StatusFlags::DATA;
    match LoopDevice::new(MIB, 512) {
        Ok(device) => {
            let options = format!("host_device,filename={}", device.path().display());
            let disk = Disk::open(EngineChoice::Threads, &options).expect("it opens");
            has(disk.status(true, 0, MIB), data, MIB);
            disk.close();
        }
        Err(reason) => skip("the map of a device", &reason),
    }
    for driver in ["null-co", "null-aio"] {
        let options = format!("{driver},size=1M");
        let disk = Disk::open(EngineChoice::Threads, &options).expect("it opens");
        // As `qemu-img map` has it: not present, neither data nor zero.
        let status = disk.status(true, 512, MIB);
        let expected = StatusFlags::PLACE | StatusFlags::END;
        assert_eq!((status.flags, status.bytes), (expected, MIB - 512));
        disk.reopen(&format!("{driver},size=2M,read-zeroes=on"))
            .expect("its options may change");
        assert_eq!(disk.bytes(), 2 * MIB);
        has(
            disk.status(true, 512, 4 * MIB),
            StatusFlags::ZERO,
            2 * MIB - 512,
        );
        assert_eq!(disk.allocated_bytes(), Some(0));
        disk.close();
    }
}

#[test]
fn a_range_of_a_file_has_its_part_of_the_map_and_all_of_what_is_allocated() {
    let place = Place::new();
    let path = place.sparse("disk.raw", MIB);
    let options = format!(
        "raw,offset=4096,size=64k,file.driver=file,file.filename={}",
        path.display()
    );
    let disk = Disk::open(EngineChoice::Threads, &options).expect("it opens");
    disk.write(8192, &[1; SECTOR]).expect("a write");
    has(disk.status(true, 0, MIB), StatusFlags::ZERO, 8192);
    let status = disk.status(true, 8192, MIB);
    has(status, StatusFlags::DATA, 4096);
    assert_eq!((status.place.child, status.place.offset), (Some(0), 12288));
    disk.flush().expect("a flush");
    assert_eq!(disk.allocated_bytes(), Some(4096));
    disk.close();
}

#[test]
fn a_file_system_without_holes_has_files_that_are_all_data() {
    let mount = match Mount::ramfs() {
        Ok(mount) => mount,
        Err(reason) => return skip("files without holes", &reason),
    };
    let path = mount.sparse("disk.raw", MIB);
    let disk = Disk::open(EngineChoice::Threads, &file_options(&path, "")).expect("it opens");
    has(disk.status(true, 0, MIB), StatusFlags::DATA, MIB);
    disk.close();
}
