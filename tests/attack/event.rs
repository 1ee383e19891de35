//! Kick, call and error descriptors that are not what they should be.
//!
//! The daemon reads and writes whatever it was given. It must never block on it.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use harness::daemon::eventually;
use harness::frontend::Frontend;
use harness::frontend::blk::{self, Request};
use harness::frontend::connection::{VERSION, code};
use harness::frontend::event::Event;
use harness::frontend::ring::Ring;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::{A_WHILE, Arena, SECTOR, breaks, content, works};

/// A pipe that can take no more, whose writer blocks.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().expect("no pipe");
    let flags = fcntl_getfl(&writer).expect("a pipe has flags");
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).expect("flags can be set");
    while writer.write(&[0; 4096]).is_ok() {}
    while writer.write(&[0]).is_ok() {}
    fcntl_setfl(&writer, flags).expect("flags can be set");
    (reader, writer)
}

/// An eventfd that can count no further, whose writer blocks.
fn full_event() -> OwnedFd {
    let event = Event::blocking();
    event.add(u64::MAX - 1);
    event.as_fd().try_clone_to_owned().expect("no descriptor")
}

/// Replaces an event of a running ring by another descriptor.
fn replace(frontend: &Frontend, code: u32, ring: &Ring, with: BorrowedFd<'_>) {
    let queue = u64::from(ring.queue).to_le_bytes();
    // It may be refused.
    let _ = frontend.connection.try_tell(code, &queue, &[with]);
}

/// Gives the daemon this as a ring's kick and goes on with the other disk and a new connection.
#[track_caller]
fn a_kick_like_this_does_no_harm(kick: BorrowedFd<'_>) {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        replace(&frontend, code::SET_VRING_KICK, &ring, kick);
        let (parts, _) = frontend.place(&Request::read(8, SECTOR));
        ring.submit(&parts);
        std::thread::sleep(A_WHILE);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn a_pipe_with_three_bytes_for_a_kick_does_no_harm() {
    let (reader, mut writer) = pipe().expect("no pipe");
    writer
        .write_all(&[1, 2, 3])
        .expect("a pipe takes three bytes");
    a_kick_like_this_does_no_harm(reader.as_fd());
}

#[test]
fn an_empty_pipe_for_a_kick_does_no_harm() {
    let (reader, _writer) = pipe().expect("no pipe");
    a_kick_like_this_does_no_harm(reader.as_fd());
}

#[test]
fn a_closed_pipe_for_a_kick_does_no_harm() {
    let (reader, writer) = pipe().expect("no pipe");
    drop(writer);
    a_kick_like_this_does_no_harm(reader.as_fd());
}

#[test]
fn a_file_for_a_kick_does_no_harm() {
    let file = tempfile::tempfile().expect("no file");
    a_kick_like_this_does_no_harm(file.as_fd());
    file.set_len(1 << 20).expect("a file can grow");
    a_kick_like_this_does_no_harm(file.as_fd());
}

#[test]
fn a_directory_or_a_device_for_a_kick_does_no_harm() {
    for path in ["/", "/dev/null", "/dev/zero"] {
        let file = File::open(path).expect("it is there");
        a_kick_like_this_does_no_harm(file.as_fd());
    }
}

#[test]
fn a_kick_that_never_runs_dry_does_no_harm() {
    // Each read takes one of many.
    let endless = eventfd(0, EventfdFlags::SEMAPHORE).expect("no eventfd");
    rustix::io::write(&endless, &(1_u64 << 60).to_ne_bytes()).expect("it takes that much");
    a_kick_like_this_does_no_harm(endless.as_fd());
}

#[test]
fn a_full_event_for_a_kick_does_no_harm() {
    a_kick_like_this_does_no_harm(full_event().as_fd());
}

/// Gives the daemon this as a ring's call. The ring must be served, as far as it can be seen
/// without being called.
#[track_caller]
fn a_call_like_this_blocks_nobody(call: BorrowedFd<'_>) {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let mut other = frontend.start_queue(1, 64);
        replace(&frontend, code::SET_VRING_CALL, &ring, call);
        for sector in 0..20 {
            ring.ask_for_call(ring.used_index());
            let mark = frontend.heap.mark();
            let pending = frontend.submit(&mut ring, &Request::read(sector, SECTOR));
            let mut used = None;
            eventually(
                "the request is completed although nobody can be called",
                || {
                    used = ring.try_pop();
                    used.is_some()
                },
            );
            let outcome = frontend.outcome(&pending, used.expect("it was completed"));
            assert_eq!(outcome.status, blk::OK);
            assert_eq!(outcome.data, content(sector, 1));
            works(&mut frontend, &mut other);
            frontend.heap.release(mark);
        }
        arena.load.goes_on();
        assert_eq!(frontend.stop_queue(&ring), ring.used_index());
    }
    arena.verdict();
}

#[test]
fn a_file_is_nothing_to_be_called_by() {
    // Writing to one can block for ever: its file system may be the attacker's own.
    let arena = Arena::new();
    let file = tempfile::tempfile().expect("no file");
    for what in [
        code::SET_VRING_KICK,
        code::SET_VRING_CALL,
        code::SET_VRING_ERR,
    ] {
        let frontend = arena.attacker();
        let verdict = frontend
            .connection
            .try_tell(what, &0_u64.to_le_bytes(), &[file.as_fd()]);
        assert!(verdict.is_refusal(), "message {what} was accepted");
    }
    arena.verdict();
}

#[test]
fn a_full_pipe_for_a_call_blocks_nobody() {
    let (_reader, writer) = full_pipe();
    a_call_like_this_blocks_nobody(writer.as_fd());
}

#[test]
fn a_full_event_for_a_call_blocks_nobody() {
    a_call_like_this_blocks_nobody(full_event().as_fd());
}

#[test]
fn a_pipe_that_nobody_reads_for_a_call_kills_nobody() {
    let (reader, writer) = pipe().expect("no pipe");
    drop(reader);
    a_call_like_this_blocks_nobody(writer.as_fd());
}

#[test]
fn a_read_only_file_for_a_call_kills_nobody() {
    let file = File::open("/dev/null").expect("it is there");
    a_call_like_this_blocks_nobody(file.as_fd());
}

#[test]
fn a_full_pipe_for_the_error_event_blocks_nobody() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let mut other = frontend.start_queue(1, 64);
        let (_reader, writer) = full_pipe();
        replace(&frontend, code::SET_VRING_ERR, &ring, writer.as_fd());
        ring.offer(1000);
        ring.publish();
        ring.kick.signal();
        std::thread::sleep(A_WHILE);
        arena.load.goes_on();
        if !frontend.connection.closes_within(A_WHILE) {
            works(&mut frontend, &mut other);
        }
    }
    arena.verdict();
}

#[test]
fn one_descriptor_for_every_event_does_no_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        // Each call is a kick, which may never end but must not matter to others.
        for code in [
            code::SET_VRING_KICK,
            code::SET_VRING_CALL,
            code::SET_VRING_ERR,
        ] {
            replace(&frontend, code, &ring, ring.call.as_fd());
        }
        let (parts, _) = frontend.place(&Request::read(8, SECTOR));
        ring.submit(&parts);
        ring.call.signal();
        std::thread::sleep(A_WHILE);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn the_connection_itself_for_a_kick_does_no_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let ring = frontend.start_queue(0, 64);
        // Whoever reads it as a kick takes messages away, so no acknowledgement is waited for.
        let queue = u64::from(ring.queue).to_le_bytes();
        let _ = frontend.connection.send(
            code::SET_VRING_KICK,
            VERSION,
            &queue,
            &[frontend.connection.as_fd()],
        );
        let _ = frontend
            .connection
            .send(code::GET_FEATURES, VERSION, &[], &[]);
        std::thread::sleep(A_WHILE);
    }
    arena.verdict();
}

#[test]
fn a_broken_ring_without_an_error_event_does_no_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let body = 0x100_u64.to_le_bytes();
        frontend.connection.tell(code::SET_VRING_ERR, &body, &[]);
        ring.offer(1000);
        ring.publish();
        ring.kick.signal();
        std::thread::sleep(A_WHILE);
        // Still there for messages, or gone.
        let mut second = frontend.new_ring(1, 64);
        if !frontend.try_set_up(&second, 0).is_refusal() {
            frontend.enable(1, true);
            works(&mut frontend, &mut second);
        }
    }
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        ring.offer(1000);
        ring.publish();
        ring.kick.signal();
        breaks(&frontend, &ring);
    }
    arena.verdict();
}
