//! Messages that are none, come at the wrong time, or ask for what is not there.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use harness::frontend::blk::{self, feature};
use harness::frontend::connection::{
    Connection, End, NEED_REPLY, REPLY, VERSION, Verdict, code, config_access, header,
    memory_region, memory_table, protocol, ring_addresses, ring_state,
};
use harness::frontend::event::Event;
use harness::frontend::memory::{Region, memory_file};
use harness::frontend::{LIMIT, Wanted};

use crate::{A_WHILE, Arena, works};

/// All messages there are, with bodies of the right size.
fn all_messages() -> Vec<(u32, Vec<u8>)> {
    let number = 0_u64.to_le_bytes().to_vec();
    let region = Region::new(1 << 33, 4096).entry;
    vec![
        (code::GET_FEATURES, vec![]),
        (code::SET_FEATURES, number.clone()),
        (code::SET_OWNER, vec![]),
        (code::RESET_OWNER, vec![]),
        (code::SET_MEM_TABLE, memory_table(1, &[region])),
        (
            code::SET_LOG_BASE,
            [number.clone(), number.clone()].concat(),
        ),
        (code::SET_LOG_FD, vec![]),
        (code::SET_VRING_NUM, ring_state(0, 64)),
        (code::SET_VRING_ADDR, ring_addresses(0, 0, 0, 0, 0)),
        (code::SET_VRING_BASE, ring_state(0, 0)),
        (code::GET_VRING_BASE, ring_state(0, 0)),
        (code::SET_VRING_KICK, number.clone()),
        (code::SET_VRING_CALL, number.clone()),
        (code::SET_VRING_ERR, number.clone()),
        (code::GET_PROTOCOL_FEATURES, vec![]),
        (code::SET_PROTOCOL_FEATURES, number.clone()),
        (code::GET_QUEUE_NUM, vec![]),
        (code::SET_VRING_ENABLE, ring_state(0, 1)),
        (code::SET_BACKEND_REQ_FD, vec![]),
        (code::GET_CONFIG, config_access(0, 8, 0, &[0; 8])),
        (code::SET_CONFIG, config_access(32, 1, 0, &[1])),
        (code::GET_INFLIGHT_FD, vec![0; 24]),
        (code::SET_INFLIGHT_FD, vec![0; 24]),
        (code::RESET_DEVICE, vec![]),
        (code::GET_MAX_MEM_SLOTS, vec![]),
        (code::ADD_MEM_REG, memory_region(region)),
        (code::REM_MEM_REG, memory_region(region)),
    ]
}

/// Reads whatever comes until the connection ends or nothing more comes for a moment.
fn drain(connection: &Connection) -> Option<End> {
    for _ in 0..1000 {
        if let Err(end) = connection.receive(A_WHILE / 2) {
            return Some(end);
        }
    }
    None
}

// --- messages that are none --------------------------------------------------------------------

#[test]
fn unknown_messages_end_the_connection_at_most() {
    let arena = Arena::new();
    for code in (0..=64).chain([0x7fff_ffff, u32::MAX]) {
        let connection = Connection::open(&arena.socket);
        let _ = connection.send(code, VERSION, &[], &[]);
        // A known code may have an answer; then the next message has one, too.
        let _ = connection.send(code::GET_FEATURES, VERSION, &[], &[]);
        match connection.receive(LIMIT) {
            Ok(answer) => assert!(
                answer.code == code || answer.code == code::GET_FEATURES,
                "message {code} was answered as {}",
                answer.code
            ),
            Err(End::Closed) => {}
            Err(End::Silent) => panic!("message {code} silenced the connection"),
        }
    }
    arena.verdict();
}

#[test]
fn unknown_messages_that_want_an_acknowledgement_are_not_acknowledged_with_success() {
    let arena = Arena::new();
    for code in [0, 19, 20, 22, 23, 26, 33, 39, 60, 1000, u32::MAX] {
        let frontend = arena.attacker();
        let verdict = frontend.connection.try_tell(code, &[0; 8], &[]);
        assert!(verdict.is_refusal(), "message {code} was accepted");
    }
    arena.verdict();
}

#[test]
fn messages_of_the_wrong_size_are_refused() {
    let arena = Arena::new();
    for (code, body) in all_messages() {
        for bytes in [body.len() + 1, body.len() + 8, body.len().saturating_sub(1)] {
            if bytes == body.len() {
                continue;
            }
            let frontend = arena.attacker();
            let mut wrong = body.clone();
            wrong.resize(bytes, 0);
            frontend
                .connection
                .send(code, VERSION | NEED_REPLY, &wrong, &[])
                .expect("it is sent whole");
            // An error, an end, or an answer; but the daemon must not wait for more.
            match frontend.connection.receive(LIMIT) {
                Ok(_) | Err(End::Closed) => {}
                Err(End::Silent) => {
                    panic!("message {code} of {bytes} bytes silenced the connection")
                }
            }
        }
    }
    arena.verdict();
}

#[test]
fn a_message_of_enormous_size_ends_the_connection_at_once() {
    let arena = Arena::new();
    let before = arena.daemon.resident_bytes();
    for bytes in [0x1001, 65536, 1 << 24, 1 << 31, u32::MAX - 11, u32::MAX] {
        for code in [code::GET_FEATURES, code::SET_MEM_TABLE, code::SET_CONFIG] {
            let frontend = arena.attacker();
            let mut message = header(code, VERSION, bytes);
            message.extend([0; 64]);
            frontend
                .connection
                .send_raw(&message, &[])
                .expect("it is sent");
            assert!(
                frontend.connection.closes_within(LIMIT),
                "message {code} of {bytes} bytes is waited for"
            );
        }
    }
    let grown = arena.daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more");
    arena.verdict();
}

#[test]
fn half_a_message_and_silence_hold_up_nobody_else() {
    let arena = Arena::new();
    let message = [header(code::SET_FEATURES, VERSION, 8), vec![0; 8]].concat();
    for sent in [1, 4, 11, 12, 13, 19] {
        let connection = Connection::open(&arena.socket);
        connection
            .send_raw(&message[..sent], &[])
            .expect("it is sent");
        std::thread::sleep(A_WHILE / 2);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn a_message_in_many_pieces_is_taken_or_ends_the_connection() {
    let arena = Arena::new();
    {
        let connection = Connection::open(&arena.socket);
        for byte in header(code::GET_FEATURES, VERSION, 0) {
            if connection.send_raw(&[byte], &[]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        match connection.receive(LIMIT) {
            Ok(answer) => assert_eq!(answer.code, code::GET_FEATURES),
            Err(end) => assert_eq!(end, End::Closed, "the connection is silent"),
        }
    }
    arena.verdict();
}

#[test]
fn many_messages_at_once_are_all_answered() {
    let arena = Arena::new();
    {
        let connection = Connection::open(&arena.socket);
        let one = header(code::GET_FEATURES, VERSION, 0);
        connection
            .send_raw(&one.repeat(100), &[])
            .expect("they are sent");
        for number in 0..100 {
            let answer = connection.receive(LIMIT);
            assert_eq!(
                answer.map(|answer| answer.code),
                Ok(code::GET_FEATURES),
                "answer {number}"
            );
        }
    }
    arena.verdict();
}

#[test]
fn a_front_end_that_reads_no_answers_holds_up_nobody_else() {
    let arena = Arena::new();
    {
        let connection = Connection::open(&arena.socket);
        connection
            .socket()
            .set_nonblocking(true)
            .expect("a socket can be made so");
        let many = header(code::GET_FEATURES, VERSION, 0).repeat(1000);
        for _ in 0..100 {
            if connection.send_raw(&many, &[]).is_err() {
                break;
            }
        }
        std::thread::sleep(A_WHILE);
        arena.load.goes_on();
    }
    arena.verdict();
}

#[test]
fn a_silent_front_end_does_not_keep_the_daemon_from_ending() {
    let arena = Arena::new();
    let connection = Connection::open(&arena.socket);
    connection
        .send_raw(&header(code::SET_FEATURES, VERSION, 8)[..5], &[])
        .expect("it is sent");
    std::thread::sleep(A_WHILE);
    let Arena { load, daemon, .. } = arena;
    load.finish();
    daemon.stop();
    assert!(connection.closes_within(LIMIT));
}

#[test]
fn connections_that_say_nothing_and_go_leave_nothing_behind() {
    let arena = Arena::new();
    for _ in 0..100 {
        Connection::open(&arena.socket);
    }
    arena.verdict();
}

// --- header flags ------------------------------------------------------------------------------

#[test]
fn header_flags_that_make_no_sense_do_not_confuse_what_follows() {
    let arena = Arena::new();
    for flags in [
        0,
        2,
        3,
        VERSION | REPLY,
        VERSION | REPLY | NEED_REPLY,
        VERSION | 0x10,
        VERSION | 0xffff_fff0,
        u32::MAX,
    ] {
        for (code, body) in [
            (code::GET_FEATURES, vec![]),
            (code::SET_OWNER, vec![]),
            (code::SET_VRING_NUM, ring_state(0, 64)),
        ] {
            let frontend = arena.attacker();
            let _ = frontend.connection.send(code, flags, &body, &[]);
            let _ = frontend
                .connection
                .send(code::GET_QUEUE_NUM, VERSION, &[], &[]);
            // Either the first is answered or not, but the second comes right behind.
            let mut answer = frontend.connection.receive(LIMIT);
            if matches!(&answer, Ok(first) if first.code == code) {
                answer = frontend.connection.receive(LIMIT);
            }
            match answer {
                Ok(answer) => {
                    assert_eq!(answer.code, code::GET_QUEUE_NUM, "flags {flags:#x}");
                    assert_eq!(answer.number(), 2);
                }
                Err(end) => assert_eq!(end, End::Closed, "flags {flags:#x}: no answer"),
            }
        }
    }
    arena.verdict();
}

#[test]
fn a_question_that_wants_an_acknowledgement_is_answered_once() {
    let arena = Arena::new();
    {
        let frontend = arena.attacker();
        frontend
            .connection
            .send(code::GET_QUEUE_NUM, VERSION | NEED_REPLY, &[], &[])
            .expect("it is sent");
        let answer = frontend.connection.receive(LIMIT).expect("an answer");
        assert_eq!((answer.code, answer.number()), (code::GET_QUEUE_NUM, 2));
        let answer = frontend.connection.ask(code::GET_FEATURES, &[]);
        assert_eq!(answer.number() & feature::VERSION_1, feature::VERSION_1);
    }
    arena.verdict();
}

#[test]
fn an_acknowledgement_that_was_not_negotiated_does_not_come() {
    let arena = Arena::new();
    {
        let wanted = Wanted::default().without_protocol(protocol::REPLY_ACK);
        let frontend = arena.attacker_with(&wanted);
        frontend
            .connection
            .send(
                code::SET_VRING_NUM,
                VERSION | NEED_REPLY,
                &ring_state(0, 64),
                &[],
            )
            .expect("it is sent");
        let answer = frontend.connection.ask(code::GET_QUEUE_NUM, &[]);
        assert_eq!(answer.number(), 2);
    }
    arena.verdict();
}

// --- descriptors -------------------------------------------------------------------------------

#[test]
fn messages_with_the_wrong_number_of_descriptors_are_refused() {
    let arena = Arena::new();
    let event = Event::new();
    let region = Region::new(1 << 33, 4096);
    let kick = 0_u64.to_le_bytes().to_vec();
    let table = memory_table(1, &[region.entry]);
    let add = memory_region(region.entry);
    for (code, body, file, counts) in [
        (code::SET_MEM_TABLE, &table, region.file(), &[0, 2, 32][..]),
        (code::ADD_MEM_REG, &add, region.file(), &[0, 2]),
        (code::SET_VRING_KICK, &kick, event.as_fd(), &[0, 2, 5]),
        (code::SET_VRING_CALL, &kick, event.as_fd(), &[0, 2]),
        (code::SET_VRING_ERR, &kick, event.as_fd(), &[0, 2]),
        (code::SET_BACKEND_REQ_FD, &vec![], event.as_fd(), &[0, 2]),
    ] {
        for &count in counts {
            let frontend = arena.attacker();
            let fds = vec![file; count];
            let verdict = frontend.connection.try_tell(code, body, &fds);
            assert!(
                verdict.is_refusal(),
                "message {code} with {count} descriptors was accepted"
            );
        }
    }
    arena.verdict();
}

#[test]
fn descriptors_with_messages_that_take_none_are_closed() {
    let arena = Arena::new();
    let event = Event::new();
    for count in [1, 8, 32, 253] {
        for (code, body) in [
            (code::GET_FEATURES, vec![]),
            (code::SET_OWNER, vec![]),
            (code::SET_VRING_NUM, ring_state(0, 64)),
            (code::SET_VRING_KICK, 0x100_u64.to_le_bytes().to_vec()),
        ] {
            let frontend = arena.attacker();
            let fds: Vec<BorrowedFd<'_>> = vec![event.as_fd(); count];
            let _ = frontend.connection.send(code, VERSION, &body, &fds);
            drain(&frontend.connection);
        }
    }
    // The footprint shows whether they were closed.
    arena.verdict();
}

#[test]
fn descriptors_with_half_a_message_are_closed() {
    let arena = Arena::new();
    let event = Event::new();
    for sent in [1, 12, 16] {
        let frontend = arena.attacker();
        let mut message = header(code::SET_VRING_KICK, VERSION, 8);
        message.extend(0_u64.to_le_bytes());
        frontend
            .connection
            .send_raw(&message[..sent], &[event.as_fd(); 8])
            .expect("it is sent");
        std::thread::sleep(A_WHILE / 4);
    }
    arena.verdict();
}

#[test]
fn a_backend_channel_that_is_no_socket_does_no_harm() {
    let arena = Arena::new();
    for file in [Event::new().as_fd(), memory_file(4096).as_fd()] {
        let mut frontend = arena.attacker();
        let verdict = frontend
            .connection
            .try_tell(code::SET_BACKEND_REQ_FD, &[], &[file]);
        if verdict == Verdict::Accepted {
            let mut ring = frontend.start_queue(0, 64);
            works(&mut frontend, &mut ring);
            frontend.set_writeback(0);
        }
    }
    arena.verdict();
}

// --- what is not there, or not yet -------------------------------------------------------------

#[test]
fn queues_that_do_not_exist_are_refused() {
    let arena = Arena::new();
    let event = Event::new();
    for queue in [2, 3, 255] {
        let kick = u64::from(queue).to_le_bytes().to_vec();
        for (code, body, takes_fd) in [
            (code::SET_VRING_NUM, ring_state(queue, 64), false),
            (code::SET_VRING_BASE, ring_state(queue, 0), false),
            (
                code::SET_VRING_ADDR,
                ring_addresses(queue, 0, 0, 0, 0),
                false,
            ),
            (code::SET_VRING_ENABLE, ring_state(queue, 1), false),
            (code::SET_VRING_KICK, kick.clone(), true),
            (code::SET_VRING_CALL, kick.clone(), true),
            (code::SET_VRING_ERR, kick.clone(), true),
        ] {
            let frontend = arena.attacker();
            let fds = if takes_fd {
                vec![event.as_fd()]
            } else {
                vec![]
            };
            let verdict = frontend.connection.try_tell(code, &body, &fds);
            assert!(
                verdict.is_refusal(),
                "message {code} for queue {queue} was accepted"
            );
        }
    }
    for queue in [2, 256, 0x7fff_ffff, u32::MAX] {
        let frontend = arena.attacker();
        let answer = frontend
            .connection
            .try_ask(code::GET_VRING_BASE, &ring_state(queue, 0));
        // Sent away, or an answer that is none.
        if let Ok(answer) = answer {
            assert_ne!(answer.body.len(), 8, "queue {queue} has a base");
        }
    }
    arena.verdict();
}

#[test]
fn messages_before_anything_was_negotiated_do_no_harm() {
    let arena = Arena::new();
    let event = Event::new();
    let region = Region::new(1 << 33, 4096);
    for (code, body) in all_messages() {
        let fds = match code {
            code::SET_MEM_TABLE | code::ADD_MEM_REG => vec![region.file()],
            code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
                vec![event.as_fd()]
            }
            _ => vec![],
        };
        let connection = Connection::open(&arena.socket);
        let _ = connection.send(code, VERSION, &body, &fds);
        event.signal();
        let _ = connection.send(code::GET_FEATURES, VERSION, &[], &[]);
        let mut answer = connection.receive(LIMIT);
        if matches!(&answer, Ok(first) if first.code == code && code != code::GET_FEATURES) {
            answer = connection.receive(LIMIT);
        }
        match answer {
            Ok(answer) => assert_eq!(answer.code, code::GET_FEATURES, "after message {code}"),
            Err(end) => assert_eq!(end, End::Closed, "message {code} silenced the connection"),
        }
    }
    arena.verdict();
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let arena = Arena::new();
    for bit in [5, 7, 26, 31, 33, 34, 35, 40, 63] {
        let frontend = arena.attacker();
        let features = frontend.features | 1 << bit;
        let verdict =
            frontend
                .connection
                .try_tell(code::SET_FEATURES, &features.to_le_bytes(), &[]);
        assert!(verdict.is_refusal(), "feature {bit} was accepted");
    }
    arena.verdict();
}

#[test]
fn what_belongs_to_protocol_features_not_offered_is_refused() {
    let arena = Arena::new();
    for (code, bytes) in [
        (code::GET_INFLIGHT_FD, 24),
        (code::SET_INFLIGHT_FD, 24),
        (code::SET_LOG_BASE, 16),
    ] {
        let frontend = arena.attacker();
        let everything = u64::MAX.to_le_bytes();
        let _ = frontend
            .connection
            .send(code::SET_PROTOCOL_FEATURES, VERSION, &everything, &[]);
        let file = memory_file(4096);
        let _ =
            frontend
                .connection
                .send(code, VERSION | NEED_REPLY, &vec![0; bytes], &[file.as_fd()]);
        match frontend.connection.receive(LIMIT) {
            Ok(answer) => {
                assert_eq!(answer.code, code);
                assert!(
                    answer.body.len() != 8 || answer.number() != 0,
                    "message {code} was accepted"
                );
            }
            Err(end) => assert_eq!(end, End::Closed, "message {code} was not answered"),
        }
    }
    arena.verdict();
}

#[test]
fn the_configuration_space_is_not_written_but_for_the_cache_mode() {
    let arena = Arena::new();
    let before = arena.attacker().config();
    let cases = [
        (0, 8, 8),
        (0, 60, 60),
        (8, 4, 4),
        (31, 1, 1),
        (31, 2, 2),
        (32, 2, 2),
        (33, 1, 1),
        (34, 2, 2),
        (56, 1, 1),
        (60, 1, 1),
        (255, 1, 1),
        (256, 1, 1),
        (4096, 8, 8),
        (u32::MAX, 1, 1),
        (u32::MAX - 3, 8, 8),
        (32, 0, 0),
        (32, 1, 0),
        (32, 1, 9),
        (32, 9, 1),
        (32, u32::MAX, 1),
        (0, 256, 256),
        (0, 257, 257),
    ];
    for (offset, claimed, sent) in cases {
        let frontend = arena.attacker();
        let payload = vec![0xff; sent];
        let body = config_access(offset, claimed, 0, &payload);
        // It may be ignored or refused.
        let _ = frontend.connection.try_tell(code::SET_CONFIG, &body, &[]);
        drop(frontend);
        let mut after = arena.attacker().config();
        assert!(after.writeback <= 1, "{after:?}");
        after.writeback = before.writeback;
        assert_eq!(after, before, "{claimed} bytes at {offset}");
    }
    arena.verdict();
}

#[test]
fn the_configuration_space_is_not_read_beyond_its_end() {
    let arena = Arena::new();
    for (offset, bytes) in [
        (0, 0),
        (0, 256),
        (0, 257),
        (0, 4096),
        (60, 4),
        (96, 8),
        (255, 1),
        (256, 1),
        (256, 8),
        (u32::MAX, 1),
        (u32::MAX - 3, 8),
        (8, u32::MAX),
    ] {
        let frontend = arena.attacker();
        let sent = bytes.min(4096) as usize;
        let body = config_access(offset, bytes, 0, &vec![0; sent]);
        let Ok(answer) = frontend.connection.try_ask(code::GET_CONFIG, &body) else {
            continue;
        };
        // Refused with nothing, or filled up with zeros.
        let payload = answer.body.get(12..).unwrap_or_default();
        let real = frontend.config_bytes(0, blk::CONFIG_BYTES);
        for (position, &byte) in payload.iter().enumerate() {
            let expected = (offset as usize)
                .checked_add(position)
                .and_then(|at| real.get(at).copied());
            // What a device has behind the fields that it offers is its own business up to 96.
            if expected.is_some() || offset as usize + position >= 96 {
                assert_eq!(byte, expected.unwrap_or(0), "{bytes} bytes at {offset}");
            }
        }
    }
    arena.verdict();
}

#[test]
fn negotiating_again_and_again_does_no_harm() {
    let arena = Arena::new();
    {
        let mut frontend = arena.attacker();
        let mut ring = frontend.start_queue(0, 64);
        let features = frontend.features.to_le_bytes();
        let protocol_features = frontend.protocol_features.to_le_bytes();
        for _ in 0..50 {
            // An owner there already may be refused, the rest is said again by some.
            let closed = [
                (code::SET_PROTOCOL_FEATURES, &protocol_features[..]),
                (code::SET_FEATURES, &features),
                (code::SET_OWNER, &[]),
            ]
            .iter()
            .any(|(code, body)| frontend.connection.try_tell(*code, body, &[]) == Verdict::Closed);
            if closed || frontend.connection.closes_within(Duration::from_millis(2)) {
                break;
            }
            works(&mut frontend, &mut ring);
        }
    }
    arena.verdict();
}
