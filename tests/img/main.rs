//! `stonework img` against `qemu-img`: the same command lines on copies of the same files have the same
//! exit status, say the same and leave the same bytes.
//!
//! `raw`: images without a format of their own. `qcow2`: those of QEMU's, `bitmap`: with persistent bitmaps. `chain`: what needs backing
//! images, in this process with a small format of the harness.

mod bitmap;
mod chain;
mod qcow2;
mod raw;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{PoisonError, RwLock};

use harness::daemon::stonework;
use harness::random::Random;
use serde_json::Value;
use tempfile::TempDir;

/// A child has this process's open files, and with them the locks of images, until it runs its program:
/// none is started while a verb runs in this process, whose next one would find its images in use.
static FORKS: RwLock<()> = RwLock::new(());

/// What a program did.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    status: Option<i32>,
    output: String,
    errors: String,
}

impl Outcome {
    fn of(mut command: Command, directory: &Path) -> Self {
        command.current_dir(directory).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = {
            let _alone = FORKS.write().unwrap_or_else(PoisonError::into_inner);
            command.spawn()
        };
        let child = child.expect("qemu-img and stonework are there");
        let output = child.wait_with_output().expect("it is our child");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("both print text");
        Self {
            status: output.status.code(),
            output: text(output.stdout),
            errors: text(output.stderr),
        }
    }

    #[track_caller]
    fn expect_success(self) -> String {
        assert_eq!(self.status, Some(0), "{}{}", self.output, self.errors);
        self.output
    }

    #[track_caller]
    fn json(self) -> Value {
        let text = self.expect_success();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

/// Two directories with the same files: ours and theirs.
struct Pair {
    ours: TempDir,
    theirs: TempDir,
}

impl Pair {
    fn new() -> Self {
        let directory = || tempfile::tempdir().expect("there is room for files");
        Self {
            ours: directory(),
            theirs: directory(),
        }
    }

    fn directories(&self) -> [&Path; 2] {
        [self.ours.path(), self.theirs.path()]
    }

    /// Makes a file in both.
    fn file(&self, name: &str, pattern: &Pattern) {
        for directory in self.directories() {
            pattern.write(&directory.join(name));
        }
    }

    /// What both programs do with a command line.
    fn run(&self, args: &[&str]) -> (Outcome, Outcome) {
        if args.contains(&"info") {
            self.settle();
        }
        let mut ours = stonework(["img"]);
        ours.args(args);
        let mut theirs = Command::new("qemu-img");
        theirs.args(args);
        (
            Outcome::of(ours, self.ours.path()),
            Outcome::of(theirs, self.theirs.path()),
        )
    }

    /// Writes everything to the host's disk: until then a file system may take more or less space for it.
    fn settle(&self) {
        for directory in self.directories() {
            for entry in fs::read_dir(directory).expect("the directory is there") {
                let path = entry.expect("the directory can be read").path();
                if path.is_file() {
                    let file = fs::File::open(&path).expect("the file is there");
                    file.sync_all().expect("the file can be synced");
                }
            }
        }
    }

    /// Both programs end alike, and say the same.
    #[track_caller]
    fn same(&self, args: &[&str]) -> String {
        let (ours, theirs) = self.run(args);
        assert_eq!(ours.status, theirs.status, "{args:?}: {ours:?} {theirs:?}");
        assert_eq!(ours.output, theirs.output, "{args:?}");
        ours.output
    }

    /// Both programs end alike.
    #[track_caller]
    fn same_status(&self, args: &[&str]) -> Option<i32> {
        let (ours, theirs) = self.run(args);
        assert_eq!(ours.status, theirs.status, "{args:?}: {ours:?} {theirs:?}");
        if ours.status != Some(0) {
            let says_why = !ours.errors.is_empty() || !ours.output.is_empty();
            assert!(says_why, "{args:?}: failed without a word");
        }
        ours.status
    }

    /// Both programs print the same values.
    #[track_caller]
    fn same_json(&self, args: &[&str]) -> Value {
        let (ours, theirs) = self.run(args);
        let (ours, theirs) = (ours.json(), theirs.json());
        assert_eq!(ours, theirs, "{args:?}");
        ours
    }

    /// Both directories have the same bytes under a name.
    #[track_caller]
    fn same_bytes(&self, name: &str) {
        let [ours, theirs] = self.directories().map(|directory| {
            let path = directory.join(name);
            fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        });
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let different = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!(different, None, "{name}: bytes differ there");
    }
}

/// A file's length, and data in it: all else is holes.
#[derive(Clone, Debug)]
struct Pattern {
    bytes: u64,
    data: Vec<(u64, Vec<u8>)>,
}

impl Pattern {
    /// Some data, some of it zero, between holes.
    fn random(random: &mut Random, bytes: u64) -> Self {
        let count = random.below(12);
        let data = (0..count).map(|_| {
            let offset = random.below(bytes);
            let length = (1 << random.below(18)).min(bytes - offset);
            let mut data = match random.below(4) {
                0 => vec![0; length as usize],
                _ => random.bytes(length as usize),
            };
            if length > 8192 && random.below(2) == 0 {
                data[4096..8192].fill(0);
            }
            (offset, data)
        });
        Self {
            bytes,
            data: data.collect(),
        }
    }

    fn write(&self, path: &Path) {
        let file = File::create(path).expect("the directory is ours");
        file.set_len(self.bytes).expect("holes need no room");
        for (offset, data) in &self.data {
            file.write_all_at(data, *offset).expect("there is room");
        }
    }
}

/// Host space that a file takes, in bytes.
fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).expect("it is there").blocks() * 512
}

fn path(directory: &TempDir, name: &str) -> PathBuf {
    directory.path().join(name)
}
