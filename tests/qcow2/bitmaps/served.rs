//! A daemon serves an image with a bitmap: stopped, it has stored it; killed, it leaves it in use.

use std::time::Duration;

use harness::daemon::{Daemon, Place, eventually, stonework};
use harness::driver::{Driver, Layout, Queue};

use super::{CLUSTER, listed, marked_by_qemu, text};
use crate::setup::{assert_clean, qemu};

const BLOCK_BYTES: usize = 4096;

fn serve(place: &Place) -> (Daemon, Queue) {
    let socket = place.join("socket");
    let mut command = stonework(["serve"]);
    command.arg(place.join("image.qcow2"));
    command.args(["--format", "qcow2", "--socket"]).arg(&socket);
    command.arg("--runtime-dir").arg(place.join("run"));
    let daemon = Daemon::start_announced(command);
    let layout = Layout {
        queues: 1,
        slots: 1,
        slot_bytes: BLOCK_BYTES,
        descriptors: 16,
    };
    let mut driver = Driver::connect(&socket, layout, Duration::from_secs(20)).expect("it serves");
    (daemon, driver.queues.remove(0))
}

fn write(queue: &mut Queue, offset: u64) {
    queue.buffer(0).fill(7);
    queue
        .write(0, offset, BLOCK_BYTES, 1)
        .expect("there is room");
    queue.kick().expect("it listens");
    let mut done = false;
    eventually("the write completes", || {
        queue.completions(|_, outcome| {
            outcome.expect("it succeeds");
            done = true;
        });
        done
    });
}

#[test]
fn a_daemon_that_stops_has_stored_the_bitmap_and_one_that_is_killed_leaves_it_in_use() {
    let place = Place::new();
    let image = place.join("image.qcow2");
    qemu("qemu-img", &["create", "-f", "qcow2", text(&image), "64M"]);
    qemu("qemu-img", &["bitmap", "--add", text(&image), "b"]);
    let (daemon, mut queue) = serve(&place);
    for offset in [0, 8 * CLUSTER, 20 << 20] {
        write(&mut queue, offset);
    }
    drop(queue);
    daemon.stop();
    assert_clean(&image, "after the stop");
    let marks = [(0, CLUSTER), (8 * CLUSTER, CLUSTER), (20 << 20, CLUSTER)];
    assert_eq!(marked_by_qemu(&image, "b"), marks);
    // Nobody writes: there is nothing that a kill could make untrue.
    let (daemon, queue) = serve(&place);
    daemon.kill();
    drop(queue);
    assert_eq!(marked_by_qemu(&image, "b"), marks);
    let (daemon, mut queue) = serve(&place);
    write(&mut queue, 40 << 20);
    daemon.kill();
    drop(queue);
    assert_eq!(listed(&image)[0].2, ["in-use", "auto"]);
    // It stays so, whoever stops in order from now on.
    let (daemon, mut queue) = serve(&place);
    write(&mut queue, 50 << 20);
    drop(queue);
    daemon.stop();
    assert_eq!(listed(&image)[0].2, ["in-use", "auto"]);
}
