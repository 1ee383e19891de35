//! The daemon is killed under load, again and again: what it has said is written is there when it is back.
//!
//! Two queues of a front-end that is not ours write, zero and flush; it connects again after each kill. A
//! block holds what completed last, or, if a request for it was in flight at the kill, maybe that.

use std::path::Path;
use std::time::{Duration, Instant};

use harness::daemon::{Daemon, Place, eventually, stonework};
use harness::driver::{Driver, Layout, Queue};
use harness::random::Random;

use crate::setup::{Process, qemu, qemu_output};

/// Kills, unless `STONEWORK_KILLS` says otherwise.
const KILLS: u64 = 20;
const DISK_BYTES: u64 = 64 << 20;
/// What a request writes or zeroes: one of these.
const BLOCK_BYTES: u64 = 4096;
const QUEUES: usize = 2;
/// Requests of each queue.
const DEPTH: usize = 8;
const PATIENCE: Duration = Duration::from_secs(20);

/// What one block holds: a number that is in each of its words, 0 for zeroes.
type Stamp = u64;

struct Model {
    /// What each block may hold.
    blocks: Vec<Vec<Stamp>>,
    next: Stamp,
    random: Random,
}

#[derive(Clone, Copy)]
enum Busy {
    Change(usize, Stamp),
    Read(usize),
    Flush,
}

#[test]
fn what_completed_is_there_after_a_kill_and_the_image_is_whole() {
    for (number, options) in [
        "cluster_size=64k",
        "cluster_size=4k,refcount_bits=8",
        "extended_l2=on",
    ]
    .into_iter()
    .enumerate()
    {
        kill_and_look(number as u64, options);
    }
}

/// A segment tells of an image as it was: who writes to that without it makes it worthless.
#[test]
fn what_a_killed_daemon_left_is_not_put_into_an_image_that_somebody_else_has_written_to() {
    let place = Place::new();
    let (image, socket) = (place.join("image.qcow2"), place.join("socket"));
    let path = image.to_str().expect("a path of ours");
    let size = DISK_BYTES.to_string();
    qemu("qemu-img", &["create", "-f", "qcow2", path, &size]);
    let daemon = serve(&place, &image, &socket);
    let mut queues = connect(&socket);
    for slot in 0..DEPTH {
        queues[0].buffer(slot).fill(1);
        let offset = slot as u64 * (1 << 20);
        queues[0]
            .write(slot, offset, BLOCK_BYTES as usize, 1)
            .expect("there is room");
    }
    queues[0].kick().expect("it listens");
    let mut completed = 0;
    eventually("all writes complete", || {
        queues[0].completions(|_, outcome| {
            outcome.expect("it succeeds");
            completed += 1;
        });
        completed == DEPTH
    });
    daemon.kill();
    drop(queues);
    assert_whole(path, "after the kill");
    // Of ours, without a place for segments.
    let options = format!("driver=qcow2,file.driver=file,file.filename={path}");
    let disk = Process::new().open(&options).expect("it can be opened");
    let whole = [2; 64 << 10];
    disk.write(32 << 20, &whole);
    disk.close().expect("it can be closed");
    let daemon = serve(&place, &image, &socket);
    let mut queues = connect(&socket);
    for (offset, expected) in [(0, 0), (1 << 20, 0), (32 << 20, 2)] {
        queues[0]
            .read(0, offset, BLOCK_BYTES as usize, 1)
            .expect("there is room");
        queues[0].kick().expect("it listens");
        let mut done = false;
        eventually("the read completes", || {
            queues[0].completions(|_, outcome| {
                outcome.expect("it can be read");
                done = true;
            });
            done
        });
        let all = queues[0].buffer(0).iter().all(|byte| *byte == expected);
        assert!(all, "at {offset:#x}: {:?}", &queues[0].buffer(0)[..8]);
    }
    drop(queues);
    daemon.stop();
    assert_whole(path, "at the end");
}

fn kill_and_look(number: u64, options: &str) {
    let kills = match std::env::var("STONEWORK_KILLS") {
        Ok(kills) => kills.parse().expect("STONEWORK_KILLS is a number"),
        Err(_) => KILLS,
    } / 3
        + 1;
    let place = Place::new();
    let (image, socket) = (place.join("image.qcow2"), place.join("socket"));
    let path = image.to_str().expect("a path of ours");
    let size = DISK_BYTES.to_string();
    qemu(
        "qemu-img",
        &["create", "-f", "qcow2", "-o", options, path, &size],
    );
    let seed = std::env::var("STONEWORK_SEED").map_or(number + 1, |seed| seed.parse().unwrap());
    eprintln!("{options}: STONEWORK_SEED={seed}");
    let mut model = Model {
        blocks: vec![vec![0]; (DISK_BYTES / BLOCK_BYTES) as usize],
        next: 1,
        random: Random::new(seed),
    };
    let mut completed = 0;
    for kill in 0..kills {
        let daemon = serve(&place, &image, &socket);
        let mut queues = connect(&socket);
        model.check_all(&mut queues[0], &format!("{options}: after kill {kill}"));
        let time = Duration::from_millis(model.random.below(250) + 5);
        completed += model.load(&mut queues, time);
        daemon.kill();
        drop(queues);
        assert_whole(path, &format!("after kill {kill}"));
    }
    let daemon = serve(&place, &image, &socket);
    let mut queues = connect(&socket);
    model.check_all(&mut queues[0], "at the end");
    drop(queues);
    daemon.stop();
    assert!(completed > 1000 * kills, "{completed} requests are too few");
    // What an orderly end leaves needs no segment.
    let left: Vec<_> = std::fs::read_dir(place.join("run")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert_whole(path, "at the end");
}

/// Leaks are what a kill may leave, and nothing else.
fn assert_whole(image: &str, when: &str) {
    let mut output = None;
    // The kernel may still be ending what the daemon had begun, and hold its locks until then.
    eventually("the image can be locked", || {
        let tried = qemu_output("qemu-img", &["check", "-f", "qcow2", image]);
        let is_locked = String::from_utf8_lossy(&tried.stderr).contains("lock");
        output = Some(tried);
        !is_locked
    });
    let output = output.expect("it was tried");
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "{when}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn serve(place: &Place, image: &Path, socket: &Path) -> Daemon {
    let mut command = stonework(["serve"]);
    command
        .arg(image)
        .args([
            "--format",
            "qcow2",
            "--queues",
            "2",
            "--workers",
            "2",
            "--socket",
        ])
        .arg(socket)
        .arg("--runtime-dir")
        .arg(place.join("run"));
    Daemon::start_announced(command)
}

fn connect(socket: &Path) -> Vec<Queue> {
    let layout = Layout {
        queues: QUEUES,
        slots: DEPTH,
        slot_bytes: BLOCK_BYTES as usize,
        descriptors: 128,
    };
    let driver = Driver::connect(socket, layout, PATIENCE).expect("it serves");
    assert_eq!(driver.capacity_bytes, DISK_BYTES);
    driver.queues
}

impl Model {
    /// Requests for so long; those that completed were right. Those in flight at the end stay in doubt.
    fn load(&mut self, queues: &mut [Queue], time: Duration) -> u64 {
        let begin = Instant::now();
        let mut busy: Vec<Vec<Option<Busy>>> = vec![vec![None; DEPTH]; queues.len()];
        let mut completed = 0;
        while begin.elapsed() < time {
            for (queue, busy) in queues.iter_mut().zip(&mut busy) {
                for (slot, busy) in busy.iter_mut().enumerate() {
                    if busy.is_none() {
                        *busy = self.start(queue, slot);
                    }
                }
                queue.kick().expect("it listens");
                let mut done = Vec::new();
                queue.completions(|slot, outcome| {
                    outcome.expect("it succeeds");
                    done.push(slot);
                });
                for slot in done {
                    completed += 1;
                    let ended = busy[slot].take().expect("it was in flight");
                    self.ended(queue, slot, ended);
                }
            }
        }
        completed
    }

    fn start(&mut self, queue: &mut Queue, slot: usize) -> Option<Busy> {
        // Half of the disk is written again and again, half of it seldom twice.
        let blocks = self.blocks.len() as u64;
        let block = match self.random.below(2) {
            0 => self.random.below(blocks / 32),
            _ => self.random.below(blocks),
        } as usize;
        let offset = block as u64 * BLOCK_BYTES;
        if self.random.below(50) == 0 {
            queue.flush(slot).expect("there is room");
            return Some(Busy::Flush);
        }
        if self.blocks[block].len() > 1 {
            // In flight.
            return None;
        }
        if self.random.below(4) == 0 {
            queue.buffer(slot).fill(0x5a);
            queue
                .read(slot, offset, BLOCK_BYTES as usize, 1)
                .expect("there is room");
            // Nobody changes it meanwhile.
            let now = self.blocks[block][0];
            self.blocks[block].push(now);
            return Some(Busy::Read(block));
        }
        if self.random.below(8) == 0 {
            self.blocks[block].push(0);
            let unmap = self.random.below(2) == 0;
            queue
                .write_zeroes(slot, offset, BLOCK_BYTES, unmap)
                .expect("there is room");
            return Some(Busy::Change(block, 0));
        }
        let stamp = self.next;
        self.next += 1;
        self.blocks[block].push(stamp);
        for word in queue.buffer(slot).chunks_exact_mut(8) {
            word.copy_from_slice(&stamp.to_le_bytes());
        }
        queue
            .write(slot, offset, BLOCK_BYTES as usize, 1)
            .expect("there is room");
        Some(Busy::Change(block, stamp))
    }

    fn ended(&mut self, queue: &mut Queue, slot: usize, ended: Busy) {
        match ended {
            Busy::Change(block, stamp) => self.blocks[block] = vec![stamp],
            Busy::Read(block) => {
                self.blocks[block].pop();
                self.look(block, queue.buffer(slot), "under load");
            }
            Busy::Flush => {}
        }
    }

    /// A block as it was read is one of those that it may be, and is that from now on.
    fn look(&mut self, block: usize, data: &[u8], when: &str) {
        let stamp = u64::from_le_bytes(*data.first_chunk().expect("a block has words"));
        let is_whole = data.chunks_exact(8).all(|word| word == &data[..8]);
        let possible = &mut self.blocks[block];
        assert!(
            is_whole && possible.contains(&stamp),
            "{when}: block {block} begins with {stamp} (whole: {is_whole}) and may be {possible:?}"
        );
        *possible = vec![stamp];
    }

    fn check_all(&mut self, queue: &mut Queue, when: &str) {
        let mut next = 0;
        let mut in_flight = [None; DEPTH];
        let mut left = self.blocks.len();
        while left > 0 {
            for (slot, flying) in in_flight.iter_mut().enumerate() {
                if flying.is_none() && next < self.blocks.len() {
                    let offset = next as u64 * BLOCK_BYTES;
                    queue
                        .read(slot, offset, BLOCK_BYTES as usize, 1)
                        .expect("there is room");
                    *flying = Some(next);
                    next += 1;
                }
            }
            queue.kick().expect("it listens");
            let mut done = Vec::new();
            queue.completions(|slot, outcome| {
                outcome.expect("it can be read");
                done.push(slot);
            });
            for slot in done {
                let block = in_flight[slot].take().expect("it was in flight");
                self.look(block, queue.buffer(slot), when);
                left -= 1;
            }
        }
    }
}
