//! The command line of `stonework serve`: what it says, what it refuses, how it ends.
//!
//! Every refusal is one line on stderr that names what was refused and why, and a status: 1 for
//! what is wrong with the world, 2 for what is wrong with the command line. None costs data.

mod create;
mod daemon;
mod image;
mod lock;
mod process;
mod service;
mod socket;
mod temporary;
mod usage;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use harness::daemon::{Place, Refusal, stonework, stonework_path};
use harness::frontend::Frontend;

const SECTOR: usize = 512;
const MIB: u64 = 1 << 20;

/// Checks a refusal's form and that it says each of these words.
#[track_caller]
fn says(refusal: &Refusal, status: i32, words: &[&str]) {
    assert_eq!(refusal.code, Some(status), "{refusal:?}");
    let lines: Vec<&str> = refusal.errors.lines().collect();
    assert_eq!(lines.len(), 1, "not one line: {refusal:?}");
    assert!(lines[0].starts_with("stonework: "), "{refusal:?}");
    let line = lines[0].to_lowercase();
    for word in words {
        assert!(
            line.contains(&word.to_lowercase()),
            "does not say '{word}': {refusal:?}"
        );
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are text")
}

/// Reads and writes a sector of a served disk.
#[track_caller]
fn serves(socket: &Path) {
    let mut frontend = Frontend::connect(socket);
    let mut ring = frontend.start_queue(0, 64);
    let data = frontend.read(&mut ring, 0, SECTOR);
    frontend.write(&mut ring, 0, &data);
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The same command as somebody without rights; the executable is where they can reach it.
fn without_rights(place: &Place, args: &[&str]) -> Command {
    if !is_root() {
        return stonework(args);
    }
    let binary = place.join("stonework");
    // By another process: a file that this one has open for writing may be inherited by the
    // child of a test beside this one, and cannot be executed then.
    let copied = Command::new("cp")
        .arg(stonework_path())
        .arg(&binary)
        .status()
        .expect("cp is installed");
    assert!(copied.success(), "the executable cannot be copied");
    for path in [place.path(), &binary] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(binary)
        .args(args);
    command
}
