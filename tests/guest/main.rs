//! The one program that runs inside a test guest.
//!
//! As process 1 it is the guest's whole user space: it loads the drivers of the disks, then obeys
//! the host line by line ([`init`]). Run from a shell it does one of the same verbs, so that each
//! can be tried on a file or a disk of any machine.
//!
//! It is a package of its own, since it is linked statically and must not wait for all that the
//! harness is made of to be compiled a second time.

mod device;
mod ext4;
mod init;
mod pattern;

use std::{
    fmt::Display,
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

const USAGE: &str = "\
usage: guest-tool VERB

  info DEV                              what the kernel says of a disk
  mkfs DEV                              make an empty ext4 with a journal
  mount DEV DIR [ro]                    mount an ext4
  umount DIR
  fill FILE BYTES SEED [FSYNC_EVERY]    write pseudo-random data, with an fsync each so many bytes
  verify FILE BYTES SEED                read it back and compare each byte
  sum FILE BYTES                        sum of what is there
  remove FILE
  grow DEV BYTES FILE SEED              fill and verify FILE again and again until DEV has so many bytes
  discard DEV OFFSET BYTES
  write-zeroes DEV OFFSET BYTES [unmap]
  sync-writes DEV COUNT [no-fsync]      so many direct writes of one block, an fsync after each
  wce DEV [back|through]                show or set the disk's cache mode
  poweroff
";

/// What a verb found out, in the order in which it is shown.
type Report = Vec<(&'static str, String)>;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if words.is_empty() {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    }
    match obey(&words) {
        Ok(report) => {
            for (key, value) in report {
                println!("{key}={value}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("guest-tool: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Does one verb; an error is a sentence.
fn obey(words: &[&str]) -> Result<Report, String> {
    match *words {
        ["info", device] => device::info(device),
        ["mkfs", device] => ext4::make(device),
        ["mount", device, dir] => init::mount_ext4(device, dir, false),
        ["mount", device, dir, "ro"] => init::mount_ext4(device, dir, true),
        ["umount", dir] => init::unmount(dir),
        ["fill", file, bytes, seed] => pattern::fill(file, number(bytes)?, number(seed)?, None),
        ["fill", file, bytes, seed, every] => {
            pattern::fill(file, number(bytes)?, number(seed)?, Some(number(every)?))
        }
        ["verify", file, bytes, seed] => pattern::verify(file, number(bytes)?, number(seed)?),
        ["sum", file, bytes] => pattern::sum(file, number(bytes)?),
        ["remove", file] => said(
            &format!("remove '{file}'"),
            fs::remove_file(Path::new(file)),
        )
        .map(|()| Report::new()),
        ["grow", device, bytes, file, seed] => grow(device, number(bytes)?, file, number(seed)?),
        ["discard", device, offset, bytes] => {
            device::discard(device, number(offset)?, number(bytes)?)
        }
        ["write-zeroes", device, offset, bytes] => {
            device::write_zeroes(device, number(offset)?, number(bytes)?, false)
        }
        ["write-zeroes", device, offset, bytes, "unmap"] => {
            device::write_zeroes(device, number(offset)?, number(bytes)?, true)
        }
        ["sync-writes", device, count] => device::sync_writes(device, number(count)?, true),
        ["sync-writes", device, count, "no-fsync"] => {
            device::sync_writes(device, number(count)?, false)
        }
        ["wce", device] => device::wce(device, None),
        ["wce", device, mode @ ("back" | "through")] => device::wce(device, Some(mode)),
        ["poweroff"] => init::power_off(),
        _ => Err(format!("not understood: '{}'", words.join(" "))),
    }
}

/// Loads a disk by its file system until it is as long as it is going to be.
fn grow(device: &str, bytes: u64, file: &str, seed: u64) -> Result<Report, String> {
    const FILE_BYTES: u64 = 1 << 20;
    let mut rounds = 0;
    let mut longest = Duration::ZERO;
    loop {
        let begin = Instant::now();
        pattern::fill(file, FILE_BYTES, seed + rounds, None)?;
        pattern::verify(file, FILE_BYTES, seed + rounds)?;
        rounds += 1;
        longest = longest.max(begin.elapsed());
        let info = device::info(device)?;
        let length = info.iter().find(|(key, _)| *key == "bytes");
        if length.is_some_and(|(_, length)| *length == bytes.to_string()) {
            return Ok(vec![
                ("rounds", rounds.to_string()),
                ("longest_ms", longest.as_millis().to_string()),
            ]);
        }
    }
}

fn number(word: &str) -> Result<u64, String> {
    word.parse()
        .map_err(|error| format!("'{word}' is no number: {error}"))
}

/// `outcome`, with what was attempted in front of its error.
fn said<T, E: Display>(attempt: &str, outcome: Result<T, E>) -> Result<T, String> {
    outcome.map_err(|error| format!("cannot {attempt}: {error}"))
}
