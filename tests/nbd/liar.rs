//! Servers that do not keep to the protocol, or keep the client waiting: an error soon, and nothing of what
//! was in memory before.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::client::img;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Length of what is offered.
const BYTES: u64 = 1 << 20;

/// What one connection is told.
type Talk = fn(&mut Far) -> std::io::Result<()>;

/// The server's end of a connection.
struct Far(UnixStream);

impl Far {
    fn say(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes)
    }

    fn take<const N: usize>(&mut self) -> std::io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn greet(&mut self) -> std::io::Result<()> {
        self.say(b"NBDMAGICIHAVEOPT\0\x03")?;
        self.take::<4>().map(drop)
    }

    /// The next option.
    fn option(&mut self) -> std::io::Result<u32> {
        let header: [u8; 16] = self.take()?;
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let mut data = vec![0; number(12) as usize];
        self.0.read_exact(&mut data)?;
        Ok(number(8))
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) -> std::io::Result<()> {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.say(&bytes)
    }

    /// A good handshake with structured replies, for an export of so many bytes.
    fn agree(&mut self, bytes: u64) -> std::io::Result<()> {
        self.greet()?;
        loop {
            let option = self.option()?;
            match option {
                8 | 10 => self.answer(option, 1, b"")?,
                7 => {
                    let mut info = vec![0, 0];
                    info.extend(bytes.to_be_bytes());
                    info.extend([0, 5]);
                    self.answer(option, 3, &info)?;
                    return self.answer(option, 1, b"");
                }
                _ => self.answer(option, 0x8000_0001, b"")?,
            }
        }
    }

    /// The next read: its cookie, offset and length.
    fn read(&mut self) -> std::io::Result<(u64, u64, u32)> {
        let header: [u8; 28] = self.take()?;
        let command = u16::from_be_bytes(header[6..8].try_into().unwrap());
        if command != 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let number = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
        let bytes = u32::from_be_bytes(header[24..].try_into().unwrap());
        Ok((number(8), number(16), bytes))
    }

    fn chunk(&mut self, done: bool, kind: u16, cookie: u64, data: &[u8]) -> std::io::Result<()> {
        self.chunk_of(done, kind, cookie, data.len() as u32)?;
        self.say(data)
    }

    fn chunk_of(&mut self, done: bool, kind: u16, cookie: u64, bytes: u32) -> std::io::Result<()> {
        let mut header = 0x668e_33ef_u32.to_be_bytes().to_vec();
        header.extend([0, u8::from(done)]);
        header.extend(kind.to_be_bytes());
        header.extend(cookie.to_be_bytes());
        header.extend(bytes.to_be_bytes());
        self.say(&header)
    }
}

/// Data for a range.
fn data(offset: u64, bytes: usize) -> Vec<u8> {
    let mut data = offset.to_be_bytes().to_vec();
    data.resize(8 + bytes, 0x77);
    data
}

/// Has `img` copy what such a server offers; what it says, and after what time.
fn copied(folder: &Path, talk: Talk) -> (bool, String, Duration) {
    let socket: PathBuf = folder.join("far");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || talk(&mut Far(stream.unwrap())));
        }
    });
    let uri = format!("nbd+unix:///x?socket={}", socket.display());
    let copy = folder.join("copy");
    let began = Instant::now();
    let words = [
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        &uri,
        copy.to_str().unwrap(),
    ];
    let (done, said) = img(&words);
    (done, said, began.elapsed())
}

#[track_caller]
fn fails(talk: Talk, part: &str) {
    let folder = tempfile::tempdir().unwrap();
    let (done, said, took) = copied(folder.path(), talk);
    assert!(!done && said.contains(part), "{part}: {said}");
    assert!(took < LIMIT, "{part}: {took:?}");
}

#[test]
fn a_server_that_keeps_to_the_protocol_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let (done, said, _) = copied(folder.path(), |far| {
        far.agree(BYTES)?;
        loop {
            // In three pieces, the last one first; a hole in the middle.
            let (cookie, offset, bytes) = far.read()?;
            let third = u64::from(bytes / 3);
            let rest = data(offset + 2 * third, bytes as usize - 2 * third as usize);
            far.chunk(false, 1, cookie, &rest)?;
            let mut hole = (offset + third).to_be_bytes().to_vec();
            hole.extend((third as u32).to_be_bytes());
            far.chunk(false, 2, cookie, &hole)?;
            far.chunk(true, 1, cookie, &data(offset, third as usize))?;
        }
    });
    assert!(done, "{said}");
    let bytes = std::fs::read(folder.path().join("copy")).unwrap();
    assert_eq!(bytes.len() as u64, BYTES);
    assert!(bytes.contains(&0) && bytes.contains(&0x77));
    assert!(bytes.iter().all(|byte| [0, 0x77].contains(byte)));
}

#[test]
fn lies_before_an_export_is_chosen_end_in_an_error() {
    fails(
        |far| far.say(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        "does not speak NBD",
    );
    fails(
        |far| far.say(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"),
        "oldstyle",
    );
    fails(
        |far| {
            far.greet()?;
            far.option()?;
            far.say(&[0x11; 20])
        },
        "begins with something else",
    );
    fails(
        |far| {
            far.greet()?;
            let option = far.option()?;
            far.answer(option + 1, 1, b"")
        },
        "it answers option",
    );
    fails(
        |far| {
            far.greet()?;
            far.option()?;
            far.say(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\x80\0\0\x01\xff\xff\xff\xff")
        },
        "4294967295 bytes",
    );
    fails(|far| far.agree(u64::MAX), "more than there can be");
    fails(
        |far| {
            far.greet()?;
            loop {
                let option = far.option()?;
                match option {
                    7 => far.answer(option, 3, &[0, 3, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 3])?,
                    _ => far.answer(option, 0x8000_0001, b"")?,
                }
                if option == 7 {
                    far.answer(option, 3, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 5])?;
                    far.answer(option, 1, b"")?;
                }
            }
        },
        "which cannot be",
    );
    fails(
        |far| {
            far.greet()?;
            far.option()?;
            far.answer(11, 0x8000_0005, b"")
        },
        "encrypted connections only",
    );
}

#[test]
fn a_server_that_never_comes_to_an_end_is_given_up() {
    let silent: Talk = |far| far.take::<4>().map(drop);
    let endless: Talk = |far| {
        far.greet()?;
        loop {
            let option = far.option()?;
            if option == 7 {
                loop {
                    far.answer(7, 3, &[0, 1, b'x'])?;
                }
            }
            far.answer(option, 0x8000_0001, b"")?;
        }
    };
    std::thread::scope(|scope| {
        for talk in [silent, endless] {
            scope.spawn(move || fails(talk, "does not answer"));
        }
    });
}

#[test]
fn lies_in_place_of_replies_end_in_an_error() {
    const FAILED: &str = "input/output error";
    let lies: [Talk; 9] = [
        // It is something else.
        |far| {
            far.agree(BYTES)?;
            far.read()?;
            far.say(&[0x22; 64])
        },
        // Of a request that there is not.
        |far| {
            far.agree(BYTES)?;
            let (cookie, offset, bytes) = far.read()?;
            far.chunk(true, 1, cookie + 1000, &data(offset, bytes as usize))
        },
        // Data from elsewhere.
        |far| {
            far.agree(BYTES)?;
            let (cookie, offset, bytes) = far.read()?;
            far.chunk(true, 1, cookie, &data(offset + 1, bytes as usize))
        },
        // More than anybody sends.
        |far| {
            far.agree(BYTES)?;
            let (cookie, ..) = far.read()?;
            far.chunk_of(true, 1, cookie, u32::MAX)
        },
        // Nothing at all: what is in memory must not be taken for it.
        |far| {
            far.agree(BYTES)?;
            loop {
                let (cookie, ..) = far.read()?;
                far.chunk(true, 0, cookie, b"")?;
            }
        },
        // One half twice.
        |far| {
            far.agree(BYTES)?;
            loop {
                let (cookie, offset, bytes) = far.read()?;
                let half = data(offset, bytes as usize / 2);
                far.chunk(false, 1, cookie, &half)?;
                far.chunk(true, 1, cookie, &half)?;
            }
        },
        // An error without its end.
        |far| {
            far.agree(BYTES)?;
            let (cookie, ..) = far.read()?;
            far.chunk(true, 32769, cookie, &[0, 0, 0, 5, 0xff, 0xff])
        },
        // Block status that nobody asked for.
        |far| {
            far.agree(BYTES)?;
            let (cookie, ..) = far.read()?;
            far.chunk(true, 5, cookie, &[0; 12])
        },
        // An end in the middle.
        |far| {
            far.agree(BYTES)?;
            let (cookie, offset, bytes) = far.read()?;
            far.chunk_of(true, 1, cookie, bytes + 8)?;
            far.say(&data(offset, bytes as usize / 2))
        },
    ];
    for talk in lies {
        fails(talk, FAILED);
    }
}
