//! Random messages and random descriptors. Each prints its seed.

use std::fs::File;
use std::io::pipe;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use harness::frontend::blk::{self, kind};
use harness::frontend::connection::{Connection, NEED_REPLY, VERSION, code, header};
use harness::frontend::event::Event;
use harness::frontend::memory::{Region, memory_file};
use harness::frontend::ring::{Descriptor, INDIRECT, NEXT, WRITE};
use harness::frontend::{MEMORY_BYTES, MEMORY_START, Wanted};
use harness::random::Random;

use crate::Arena;

const FOR: Duration = Duration::from_millis(2500);

#[test]
fn random_bytes_do_no_harm() {
    let arena = Arena::new();
    let mut random = Random::announced("random bytes");
    let end = Instant::now() + FOR / 2;
    while Instant::now() < end {
        let connection = Connection::open(&arena.socket);
        for _ in 0..random.below(4) {
            let count = random.below(200) as usize;
            let bytes = random.bytes(count);
            if connection.send_raw(&bytes, &[]).is_err() {
                break;
            }
        }
    }
    arena.verdict_but_for_content();
}

/// A number that somebody may have forgotten to think of.
fn odd_number(random: &mut Random) -> u64 {
    let edge = *random.pick(&[
        0,
        1,
        64,
        255,
        4096,
        MEMORY_START,
        MEMORY_BYTES,
        1 << 31,
        u64::from(u32::MAX),
        1 << 47,
        1 << 63,
        u64::MAX,
    ]);
    match random.below(4) {
        0 => random.next_u64(),
        1 => random.below(8),
        2 => edge.wrapping_sub(random.below(4)),
        _ => edge,
    }
}

#[test]
fn random_messages_do_no_harm() {
    let arena = Arena::new();
    let mut random = Random::announced("random messages");
    let (reader, writer) = pipe().expect("no pipe");
    let event = Event::new();
    let memory = memory_file(1 << 20);
    let region = Region::new(1 << 33, 1 << 20);
    let null = File::open("/dev/null").expect("it is there");
    let files: [BorrowedFd<'_>; 6] = [
        event.as_fd(),
        memory.as_fd(),
        region.file(),
        reader.as_fd(),
        writer.as_fd(),
        null.as_fd(),
    ];
    let sizes = [0, 8, 8, 16, 20, 24, 40, 40, 40, 72];
    let end = Instant::now() + FOR;
    while Instant::now() < end {
        let frontend = if random.below(2) == 0 {
            arena.attacker()
        } else {
            harness::frontend::Frontend::unshared(&arena.socket, &Wanted::default())
        };
        for _ in 0..random.below(30) {
            // Mostly messages that exist, mostly of a size that exists.
            let code = if random.below(20) == 0 {
                random.next_u64() as u32
            } else {
                random.below(42) as u32
            };
            let bytes = if random.below(20) == 0 {
                random.below(300) as usize
            } else {
                *random.pick(&sizes)
            };
            let mut body: Vec<u8> = (0..bytes.div_ceil(8))
                .flat_map(|_| odd_number(&mut random).to_le_bytes())
                .collect();
            body.truncate(bytes);
            if code == code::SET_MEM_TABLE && bytes >= 8 {
                body[0] = random.below(3) as u8;
            }
            let fds: Vec<_> = (0..random.below(3)).map(|_| *random.pick(&files)).collect();
            let flags = VERSION | (random.below(2) as u32 * NEED_REPLY);
            event.signal();
            if frontend.connection.send(code, flags, &body, &fds).is_err() {
                break;
            }
            // Answers are read now and then, so that the daemon does not wait for us.
            let _ = frontend.connection.receive(Duration::from_millis(1));
        }
        event.take();
        if random.below(4) == 0 {
            let _ = frontend
                .connection
                .send_raw(&header(code::SET_FEATURES, VERSION, 8)[..7], &[]);
        }
    }
    arena.verdict_but_for_content();
}

#[test]
fn random_descriptors_do_no_harm() {
    let arena = Arena::new();
    let mut random = Random::announced("random descriptors");
    let end = Instant::now() + FOR;
    while Instant::now() < end {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        // Headers that make sense, tables of descriptors, and room for data.
        let headers = frontend.heap.take(64 * 16, 16);
        for slot in 0..64 {
            let kind = *random.pick(&[
                kind::IN,
                kind::OUT,
                kind::FLUSH,
                kind::GET_ID,
                kind::DISCARD,
                kind::WRITE_ZEROES,
                99,
            ]);
            let header = blk::header(kind, random.below(5000));
            frontend.memory.write(headers + 16 * slot, &header);
        }
        let tables = frontend.heap.take(64 * 256, 16);
        let data = frontend.heap.take(1 << 20, 4096);
        let descriptor = |random: &mut Random, first: bool| {
            let (addr, len) = match random.below(if first { 2 } else { 8 }) {
                0 | 1 if first => (headers + 16 * random.below(64), 16),
                2 => (odd_number(random), odd_number(random) as u32),
                3 => (tables + 256 * random.below(64), 256),
                4 => (data + random.below(1 << 19), random.below(2000) as u32),
                5 => (data, 1),
                _ => (
                    data + 512 * random.below(1024),
                    512 * (1 + random.below(8)) as u32,
                ),
            };
            Descriptor {
                addr,
                len,
                flags: match random.below(8) {
                    0 => random.next_u64() as u16,
                    1 if !first => INDIRECT,
                    2 | 3 => WRITE,
                    4..=6 if !first => NEXT | WRITE,
                    _ => NEXT,
                },
                next: if random.below(16) == 0 {
                    random.next_u64() as u16
                } else {
                    random.below(64) as u16
                },
            }
        };
        for entry in 0..64 * 16 {
            let descriptor = descriptor(&mut random, entry % 16 == 0);
            frontend
                .memory
                .write(tables + 16 * entry, &descriptor.to_bytes());
        }
        for _ in 0..20 {
            for index in 0..64 {
                let descriptor = descriptor(&mut random, index % 4 == 0);
                ring.set_descriptor(index, descriptor);
            }
            for _ in 0..random.below(16) {
                ring.offer(random.below(64) as u16);
            }
            ring.publish();
            ring.kick.signal();
            std::thread::sleep(Duration::from_micros(500));
            if ring.error.wait(Duration::ZERO) {
                break;
            }
        }
    }
    arena.load.goes_on();
    arena.verdict_but_for_content();
}
