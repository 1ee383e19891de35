//! [`Judge`]: what QEMU says of many images, in threads beside the test.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use tempfile::TempDir;

use super::case::Files;

/// Images that wait to be looked at.
const QUEUED: usize = 64;
const THREADS: usize = 2;

/// See the module's header.
pub(crate) struct Judge {
    images: SyncSender<Image>,
    shared: Arc<Shared>,
    seen: Mutex<BTreeSet<u64>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    settled: Condvar,
}

#[derive(Default)]
struct State {
    waiting: usize,
    wrong: Vec<String>,
    leaking: u64,
}

/// An image that is to be judged.
pub(crate) struct Image {
    /// Whose it is, for the report.
    pub(crate) what: String,
    pub(crate) files: Files,
    /// It was closed in order, and leaks no more than these, which were there before.
    pub(crate) closed: Option<Files>,
}

impl Judge {
    pub(crate) fn new() -> Self {
        let (images, queue) = sync_channel(QUEUED);
        let (shared, queue) = (Arc::<Shared>::default(), Arc::new(Mutex::new(queue)));
        for _ in 0..THREADS {
            let (shared, queue) = (Arc::clone(&shared), Arc::clone(&queue));
            thread::spawn(move || work(&shared, &queue));
        }
        Self {
            images,
            shared,
            seen: Mutex::default(),
        }
    }

    /// Whether no image with this metadata has been seen before.
    pub(crate) fn is_new(&self, files: &Files) -> bool {
        let mut seen = self.seen.lock().expect("nobody panics here");
        seen.insert(fingerprint(&files["image"]))
    }

    /// How many images with distinct metadata there were.
    pub(crate) fn distinct(&self) -> u64 {
        self.seen.lock().expect("nobody panics here").len() as u64
    }

    pub(crate) fn submit(&self, image: Image) {
        self.shared.state().waiting += 1;
        self.images.send(image).expect("the threads stay");
    }

    /// What is wrong with those that have been looked at so far.
    pub(crate) fn wrong(&self) -> Vec<String> {
        self.shared.state().wrong.clone()
    }

    /// Waits until all have been looked at. What is wrong since the last time, and how many leak in all.
    pub(crate) fn settle(&self) -> (Vec<String>, u64) {
        let state = self.shared.state();
        let settled = self.shared.settled.wait_while(state, |s| s.waiting > 0);
        let mut state = settled.expect("nobody panics here");
        (std::mem::take(&mut state.wrong), state.leaking)
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics here")
    }
}

fn work(shared: &Shared, queue: &Mutex<Receiver<Image>>) {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let directory = directory.expect("there is room for tests");
    loop {
        let next = queue.lock().expect("nobody panics here").recv();
        let Ok(image) = next else { return };
        let judged = judge(&directory, &image);
        let mut state = shared.state();
        match judged {
            Ok(leaks) => state.leaking += u64::from(leaks > 0),
            Err(wrong) => state.wrong.push(format!("{}: {wrong}", image.what)),
        }
        state.waiting -= 1;
        if state.waiting == 0 {
            shared.settled.notify_all();
        }
    }
}

/// How many clusters leak; or what else is wrong.
fn judge(directory: &TempDir, image: &Image) -> Result<u64, String> {
    let leaks = check(directory.path(), &image.files)?;
    if let Some(before) = &image.closed {
        let before = check(directory.path(), before)?;
        if leaks > before {
            let kept = keep(directory, &image.files);
            return Err(format!(
                "closed in order, and leaks {leaks} clusters, of which {before} had leaked before{kept}"
            ));
        }
    }
    Ok(leaks)
}

fn check(directory: &Path, files: &Files) -> Result<u64, String> {
    for (name, bytes) in files {
        // Only its length matters.
        let bytes = if *name == "data" { &[] } else { &bytes[..] };
        std::fs::write(directory.join(name), bytes).expect("there is room");
    }
    let mut command = Command::new("qemu-img");
    command.current_dir(directory);
    command.args(["check", "-f", "qcow2", "--output=json", "image"]);
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("QEMU's tools are installed");
    let said = String::from_utf8_lossy(&stdout).into_owned();
    let count = |what: &str| {
        let line = said.lines().find(|line| line.contains(what))?;
        let digits = line.split(':').nth(1)?.trim().trim_end_matches(',');
        digits.parse::<u64>().ok()
    };
    match status.code() {
        Some(0 | 3) => Ok(count("\"leaks\"").unwrap_or(0)),
        _ => Err(format!(
            "{said}{}{}",
            String::from_utf8_lossy(&stderr),
            keep_in(directory)
        )),
    }
}

fn keep(directory: &TempDir, files: &Files) -> String {
    for (name, bytes) in files {
        std::fs::write(directory.path().join(name), bytes).expect("there is room");
    }
    keep_in(directory.path())
}

/// Keeps the image for whoever looks into it, where `STONEWORK_KEEP` says so.
fn keep_in(directory: &Path) -> String {
    let Some(to) = std::env::var_os("STONEWORK_KEEP") else {
        return String::new();
    };
    let to = Path::new(&to).join("image");
    match std::fs::copy(directory.join("image"), &to) {
        Ok(_) => format!(" (kept as {})", to.display()),
        Err(error) => format!(" ({} cannot be written: {error})", to.display()),
    }
}

/// A sum of an image's metadata and its length: images that are equal in these are as good as each other.
pub(crate) fn fingerprint(image: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write_u64(image.len() as u64);
    for (begin, end) in metadata(image) {
        hasher.write(&image[begin..end]);
    }
    hasher.finish()
}

/// Where in an image its metadata is, as far as it lies inside: header, tables and what they name.
pub(crate) fn metadata(image: &[u8]) -> Vec<(usize, usize)> {
    let be = |at: u64, bytes: usize| {
        let field = image.get(at as usize..at as usize + bytes);
        let bytes = field.unwrap_or(&[]).iter();
        bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let cluster = 1_u64 << be(20, 4).min(21);
    let piece = |at: u64, bytes: u64| {
        let begin = (at as usize).min(image.len());
        let end = (at.saturating_add(bytes) as usize).min(image.len());
        (begin, end.max(begin))
    };
    let mut pieces = vec![piece(0, cluster)];
    let l1 = (be(40, 8), 8 * be(36, 4));
    let table = (be(48, 8), cluster * be(56, 4));
    for (place, bytes) in [l1, table] {
        pieces.push(piece(place, bytes));
        let entries = (0..bytes / 8).map(|index| be(place + 8 * index, 8));
        let below = entries.map(|entry| entry & 0x00ff_ffff_ffff_fe00);
        pieces.extend(below.filter(|at| *at != 0).map(|at| piece(at, cluster)));
    }
    pieces
}
