//! Clients that do not keep to the protocol, or keep others waiting: bounded memory and time, and nobody
//! else is disturbed.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::setup::{Server, Which, run};

/// As long as anything may take.
const LIMIT: Duration = Duration::from_secs(30);

fn started(folder: &std::path::Path, more: &str) -> Server {
    let arguments = [
        "--blockdev",
        "null-co,node-name=d,size=1073741824,read-zeroes=on",
        "--blockdev",
        "null-co,node-name=other,size=1048576",
        "--export",
        "nbd,id=e,node-name=d,writable=on",
        "--export",
        "nbd,id=o,node-name=other,writable=on",
    ];
    Server::with(Which::Ours, folder, more, &arguments)
}

/// A client of raw bytes.
pub(crate) struct Client(pub(crate) UnixStream);

impl Client {
    pub(crate) fn connect(server: &Server) -> Self {
        let stream = UnixStream::connect(server.socket()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    /// Connects and exchanges flags.
    pub(crate) fn greeted(server: &Server) -> Self {
        let mut client = Self::connect(server);
        let greeting: [u8; 18] = client.take();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        client.say(&[0, 0, 0, 3]);
        client
    }

    /// Has chosen an export, with simple replies.
    fn chosen(server: &Server) -> Self {
        let mut client = Self::greeted(server);
        client.option(1, b"d");
        let _export: [u8; 10] = client.take();
        client
    }

    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.say(&bytes);
    }

    /// The kind of the next reply to an option.
    pub(crate) fn answered(&mut self) -> u32 {
        let header: [u8; 20] = self.take();
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let mut data = vec![0; number(16) as usize];
        self.0.read_exact(&mut data).unwrap();
        number(12)
    }

    fn request(&mut self, command: u16, offset: u64, bytes: u32) {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(command.to_be_bytes());
        request.extend(7_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(bytes.to_be_bytes());
        self.say(&request);
    }

    /// The error of a simple reply.
    fn error(&mut self) -> u32 {
        let reply: [u8; 16] = self.take();
        assert_eq!(&reply[8..], &7_u64.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    /// Waits for the server to end the connection.
    #[track_caller]
    pub(crate) fn is_ended(&mut self) {
        let mut byte = [0; 256];
        loop {
            match self.0.read(&mut byte) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn resident_bytes(server: &Server) -> u64 {
    let path = format!("/proc/{}/statm", server.id());
    let text = std::fs::read_to_string(path).unwrap();
    let pages: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Somebody else is served, and soon.
#[track_caller]
fn others_are_served(server: &Server) {
    let began = Instant::now();
    let uri = server.uri("other");
    run(&[
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write 0 64K",
        "-c",
        "flush",
        &uri,
    ]);
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn nonsense_before_an_export_is_chosen_is_answered_or_ends_the_connection() {
    const UNSUPPORTED: u32 = 0x8000_0001;
    const INVALID: u32 = 0x8000_0003;
    const UNKNOWN: u32 = 0x8000_0006;
    const TOO_BIG: u32 = 0x8000_0009;
    let folder = tempfile::tempdir().unwrap();
    let server = started(folder.path(), "");
    let mut client = Client::greeted(&server);
    for (option, data, answer) in [
        (4, &b""[..], UNSUPPORTED),
        (99, b"whatever", UNSUPPORTED),
        (3, b"a list takes nothing", INVALID),
        (5, b"", 0x8000_0002),
        (6, b"", INVALID),
        (6, b"\0\0\0\x09short", INVALID),
        (6, b"\0\0\0\x04none\0\0", UNKNOWN),
        (6, b"\0\0\0\x01d\xff\xff", INVALID),
        (7, b"\0\0\0\x04none\0\0", UNKNOWN),
        (7, b"\0\0\0\x02\xff\xfe\0\0", INVALID),
        (8, b"x", INVALID),
        // Contexts go with structured replies.
        (10, b"\0\0\0\x01d\0\0\0\0", INVALID),
        (8, b"", 1),
        (8, b"", INVALID),
        (10, b"\0\0\0\x04none\0\0\0\0", UNKNOWN),
        (10, b"\0\0\0\x01d\xff\xff\xff\xff", INVALID),
        (10, b"\0\0\0\x01d\0\0\0\x01\0\0\0\x04none", 1),
        (11, b"", 1),
        (8, b"", 0x8000_000a),
    ] {
        client.option(option, data);
        assert_eq!(client.answered(), answer, "option {option} {data:?}");
    }
    client.option(6, &vec![0; 100_000]);
    assert_eq!(client.answered(), TOO_BIG);
    client.option(2, b"");
    assert_eq!(client.answered(), 1);
    client.is_ended();
    // Those that there is no answer to.
    let mut client = Client::connect(&server);
    client.say(&[0xff; 4]);
    client.is_ended();
    let mut client = Client::greeted(&server);
    client.say(b"GET / HTTP/1.1\r\n\r\n");
    client.is_ended();
    let mut client = Client::greeted(&server);
    client.option(1, b"none");
    client.is_ended();
    let mut client = Client::greeted(&server);
    client.say(b"IHAVEOPT\0\0\0\x06\xff\xff\xff\xff");
    client.is_ended();
    let mut client = Client::connect(&server);
    // Without fixed newstyle nothing but a name can be said.
    client.say(&[0; 4]);
    client.option(3, b"");
    client.is_ended();
    others_are_served(&server);
    server.quit();
}

#[test]
fn nonsense_in_place_of_requests_is_answered_or_ends_the_connection() {
    const INVAL: u32 = 22;
    let folder = tempfile::tempdir().unwrap();
    let server = started(folder.path(), "");
    let mut client = Client::chosen(&server);
    client.request(99, 0, 512);
    assert_eq!(client.error(), INVAL);
    client.request(7, 0, 512);
    assert_eq!(client.error(), INVAL);
    client.request(0, u64::MAX, 512);
    assert_eq!(client.error(), INVAL);
    client.request(4, u64::MAX - 10, 512);
    assert_eq!(client.error(), INVAL);
    client.request(0, 0, u32::MAX);
    assert_eq!(client.error(), INVAL);
    client.request(3, 0, 0);
    assert_eq!(client.error(), 0);
    // Half a request, and no more.
    let mut half = Client::chosen(&server);
    half.say(&0x2560_9513_u32.to_be_bytes());
    drop(half);
    // Half a write.
    let mut half = Client::chosen(&server);
    half.request(1, 0, 65536);
    half.say(&[1; 1000]);
    drop(half);
    // What follows a write that is too long cannot be told from requests.
    let mut long = Client::chosen(&server);
    long.request(1, 0, (32 << 20) + 1);
    long.is_ended();
    let mut other = Client::chosen(&server);
    other.say(&[0xee; 28]);
    other.is_ended();
    others_are_served(&server);
    client.request(2, 0, 0);
    client.is_ended();
    server.quit();
}

#[test]
fn who_takes_too_long_to_choose_is_disconnected() {
    let folder = tempfile::tempdir().unwrap();
    let server = started(folder.path(), ",handshake-max-seconds=1");
    let began = Instant::now();
    let mut silent = Client::connect(&server);
    let mut slow = Client::greeted(&server);
    // One letter after the other.
    slow.say(b"IHAV");
    others_are_served(&server);
    silent.is_ended();
    slow.is_ended();
    let took = began.elapsed();
    assert!(
        took >= Duration::from_millis(900) && took < LIMIT,
        "{took:?}"
    );
    // Who has chosen may take as long as it likes.
    let mut client = Client::chosen(&server);
    std::thread::sleep(Duration::from_millis(1500));
    client.request(3, 0, 0);
    assert_eq!(client.error(), 0);
    server.quit();
}

#[test]
fn clients_that_do_not_read_take_a_bounded_share_of_memory_and_of_nobodys_time() {
    const CLIENTS: usize = 4;
    let folder = tempfile::tempdir().unwrap();
    let server = started(folder.path(), "");
    others_are_served(&server);
    let before = resident_bytes(&server);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = Client::chosen(&server);
        client.0.set_nonblocking(true).unwrap();
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0; 20]);
        request.extend((4_u32 << 20).to_be_bytes());
        // A gigabyte of answers that nobody takes.
        for _ in 0..256 {
            if client.0.write_all(&request).is_err() {
                break;
            }
        }
        clients.push(client);
    }
    std::thread::sleep(Duration::from_millis(500));
    others_are_served(&server);
    let grown = resident_bytes(&server).saturating_sub(before);
    // 32 MiB each, and what memory costs to manage.
    assert!(grown < CLIENTS as u64 * (48 << 20), "{grown} bytes");
    drop(clients);
    others_are_served(&server);
    server.quit();
}

#[test]
fn more_clients_than_there_may_be_wait_until_others_leave() {
    let folder = tempfile::tempdir().unwrap();
    let server = started(folder.path(), ",max-connections=3,handshake-max-seconds=0");
    let mut three: Vec<_> = (0..3).map(|_| Client::chosen(&server)).collect();
    let mut many: Vec<_> = (0..1000)
        .filter_map(|_| UnixStream::connect(server.socket()).ok())
        .take(50)
        .collect();
    let mut fourth = Client(many.remove(0));
    fourth
        .0
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut byte = [0];
    assert!(fourth.0.read(&mut byte).is_err(), "nobody greets it");
    // Those who are there are served.
    three[0].request(3, 0, 0);
    assert_eq!(three[0].error(), 0);
    drop(three.pop());
    fourth.0.set_read_timeout(Some(LIMIT)).unwrap();
    let greeting: [u8; 18] = fourth.take();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    drop((three, many, fourth));
    others_are_served(&server);
    server.quit();
}

#[test]
fn a_thousand_clients_that_say_nothing_leave_room_for_one_that_does() {
    let folder = tempfile::tempdir().unwrap();
    let more = ",max-connections=0,handshake-max-seconds=0";
    let server = started(folder.path(), more);
    let before = resident_bytes(&server);
    let silent: Vec<_> = (0..1000)
        .map(|_| UnixStream::connect(server.socket()).unwrap())
        .collect();
    others_are_served(&server);
    let grown = resident_bytes(&server).saturating_sub(before);
    assert!(
        grown < 128 << 20,
        "{grown} bytes for {} clients",
        silent.len()
    );
    server.quit();
    drop(silent);
}
