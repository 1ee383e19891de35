use super::option::*;
use super::reply::*;
use super::request::*;
use super::*;

/// SplitMix64: seeds are printed where a test fails, so a failure is had again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn text(&mut self) -> String {
        let count = match self.below(20) {
            0 => MAX_STRING_BYTES as u64,
            _ => self.below(20),
        };
        let mut text = String::new();
        while (text.len() as u64) < count {
            text.push(*b"ab:-_ ".get(self.below(6) as usize).unwrap() as char);
        }
        text
    }

    fn list<T>(&mut self, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(5)).map(|_| one(self)).collect()
    }
}

const SEEDS: u64 = 400;

fn any_option(random: &mut Random) -> ClientOption {
    let wanted = |random: &mut Random| Wanted {
        name: random.text(),
        kinds: random.list(|random| random.next() as u16),
    };
    let queries = |random: &mut Random| Queries {
        name: random.text(),
        queries: random.list(Random::text),
    };
    match random.below(12) {
        0 => ClientOption::ExportName(random.text()),
        1 => ClientOption::Abort,
        2 => ClientOption::List,
        3 => ClientOption::StartTls,
        4 => ClientOption::Info(wanted(random)),
        5 => ClientOption::Go(wanted(random)),
        6 => ClientOption::StructuredReply,
        7 => ClientOption::ListMetaContext(queries(random)),
        8 => ClientOption::SetMetaContext(queries(random)),
        9 => ClientOption::ExtendedHeaders,
        _ => ClientOption::Unknown(1000 + random.below(1000) as u32),
    }
}

fn any_reply(random: &mut Random) -> OptionReply {
    let (high, low) = (random.next() as u32, random.next() as u32);
    match random.below(9) {
        0 => OptionReply::Ack,
        1 => OptionReply::Server {
            name: random.text(),
            description: random.text(),
        },
        2 => OptionReply::Info(Info::Export {
            bytes: random.next(),
            flags: ExportFlags::from_bits_truncate(high as u16),
        }),
        3 => OptionReply::Info(Info::Name(random.text())),
        4 => OptionReply::Info(Info::Description(random.text())),
        5 => OptionReply::Info(Info::BlockSize {
            minimum: high,
            preferred: low,
            maximum: high ^ low,
        }),
        6 => OptionReply::MetaContext {
            id: high,
            name: random.text(),
        },
        7 => OptionReply::Error(Refusal::POLICY, random.text()),
        _ => OptionReply::Unknown(100 + low % 100),
    }
}

fn any_mode(random: &mut Random) -> Mode {
    [Mode::Simple, Mode::Structured, Mode::Extended][random.below(3) as usize]
}

#[test]
fn options_are_read_as_they_were_written() {
    for seed in 0..SEEDS {
        let option = any_option(&mut Random(seed));
        let bytes = option.to_bytes();
        let (header, data) = bytes.split_at(OPTION_BYTES);
        let header = OptionHeader::parse(header.try_into().unwrap()).unwrap();
        assert_eq!(header.bytes as usize, data.len(), "seed {seed}");
        let again = ClientOption::parse(header.option, data).unwrap();
        assert_eq!(again, option, "seed {seed}");
    }
}

#[test]
fn replies_to_options_are_read_as_they_were_written() {
    for seed in 0..SEEDS {
        let reply = any_reply(&mut Random(seed));
        let bytes = reply.to_bytes(seed as u32);
        let (header, data) = bytes.split_at(OPTION_REPLY_BYTES);
        let header = OptionReplyHeader::parse(header.try_into().unwrap()).unwrap();
        assert_eq!(
            (header.option, header.bytes),
            (seed as u32, data.len() as u32)
        );
        let again = OptionReply::parse(header.kind, data).unwrap();
        assert_eq!(again, reply, "seed {seed}");
    }
}

#[test]
fn requests_are_read_as_they_were_written() {
    for seed in 0..SEEDS {
        let mut random = Random(seed);
        let mode = any_mode(&mut random);
        let commands = [
            Command::Read,
            Command::Write,
            Command::Disconnect,
            Command::Flush,
            Command::Trim,
            Command::Cache,
            Command::WriteZeroes,
            Command::BlockStatus,
            Command::Unknown(77),
        ];
        let most = if mode == Mode::Extended {
            u64::MAX
        } else {
            1 << 32
        };
        let request = Request {
            flags: CommandFlags::from_bits_retain(random.next() as u16),
            command: commands[random.below(9) as usize],
            cookie: random.next(),
            offset: random.next(),
            bytes: random.below(most),
        };
        let mut bytes = Vec::new();
        request.put(mode, &mut bytes);
        assert_eq!(bytes.len(), request::header_bytes(mode), "seed {seed}");
        assert_eq!(
            Request::parse(mode, &bytes).unwrap(),
            request,
            "seed {seed}"
        );
    }
}

/// A reply's header and what follows it.
fn split(mode: Mode, bytes: &[u8]) -> (ReplyHeader, &[u8]) {
    let first = bytes[..FIRST_BYTES].try_into().unwrap();
    let (header, rest) = bytes.split_at(reply::header_bytes(mode, first).unwrap());
    (ReplyHeader::parse(header).unwrap(), rest)
}

#[test]
fn chunks_are_read_as_they_were_written() {
    for seed in 0..SEEDS {
        let mut random = Random(seed);
        let mode = [Mode::Structured, Mode::Extended][random.below(2) as usize];
        let to = Replied {
            mode,
            cookie: random.next(),
            offset: random.next(),
        };
        let done = random.below(2) == 0;
        let (mut bytes, wide) = (Vec::new(), mode == Mode::Extended);
        let mut number = |end| {
            1 + if wide {
                random.next() >> 1
            } else {
                random.below(end)
            }
        };
        let expected = match seed % 4 {
            0 => {
                put_chunk(&mut bytes, to, done, chunk::NONE, 0);
                Chunk::None
            }
            1 => {
                let (offset, length) = (number(1 << 40), 4096);
                put_hole(&mut bytes, to, done, offset, length);
                Chunk::Hole {
                    offset,
                    bytes: length,
                }
            }
            2 => {
                let extents: Vec<_> = (0..=seed % 7)
                    .map(|_| Extent {
                        bytes: number(1 << 31),
                        flags: number(1 << 31),
                    })
                    .collect();
                put_status(&mut bytes, to, done, 3, &extents);
                Chunk::Status {
                    context: 3,
                    extents,
                }
            }
            _ => {
                put_error(&mut bytes, to, done, Errno::NOSPC, "no space");
                Chunk::Error(Errno::NOSPC, "no space".into())
            }
        };
        let (header, rest) = split(mode, &bytes);
        let ReplyKind::Chunk {
            done: told,
            kind,
            bytes,
        } = header.kind
        else {
            panic!("seed {seed}: a chunk");
        };
        assert_eq!((header.cookie, told), (to.cookie, done), "seed {seed}");
        assert_eq!(bytes, rest.len() as u64, "seed {seed}");
        assert_eq!(Chunk::parse(kind, rest).unwrap(), expected, "seed {seed}");
    }
}

#[test]
fn simple_replies_are_read_as_they_were_written() {
    for result in [Ok(()), Err(Errno::IO)] {
        let mut bytes = Vec::new();
        put_simple(&mut bytes, 42, result);
        let (header, rest) = split(Mode::Simple, &bytes);
        assert_eq!(
            (header.cookie, header.kind),
            (42, ReplyKind::Simple(result))
        );
        assert!(rest.is_empty());
    }
}

#[test]
fn bytes_of_hostile_peers_are_refused_or_read_and_never_more() {
    for seed in 0..SEEDS * 20 {
        let mut random = Random(seed);
        let mut bytes: Vec<u8> = match random.below(4) {
            0 => (0..random.below(80)).map(|_| random.next() as u8).collect(),
            1 => any_option(&mut random).to_bytes(),
            2 => any_reply(&mut random).to_bytes(7),
            _ => {
                let mut bytes = Vec::new();
                let to = Replied {
                    mode: any_mode(&mut random),
                    cookie: 0,
                    offset: 0,
                };
                let extents = [Extent { bytes: 1, flags: 0 }; 3];
                put_status(&mut bytes, to, true, 0, &extents);
                bytes
            }
        };
        for _ in 0..random.below(4) {
            if let Some(byte) = {
                let count = bytes.len().max(1) as u64;
                bytes.get_mut(random.below(count) as usize)
            } {
                *byte = random.next() as u8;
            }
        }
        bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
        // None of it may panic, whatever it says.
        for at in [0, OPTION_BYTES, OPTION_REPLY_BYTES, reply::EXTENDED_BYTES] {
            let rest = bytes.get(at..).unwrap_or_default();
            for number in 0..12 {
                let _ = ClientOption::parse(number, rest);
                let _ = OptionReply::parse(number, rest);
                let _ = OptionReply::parse(number | 1 << 31, rest);
                let _ = Chunk::parse(number as u16, rest);
                let _ = Chunk::parse(number as u16 | 1 << 15, rest);
            }
            let _ = StatusQuery::parse(rest);
            let _ = ReplyHeader::parse(rest);
            for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
                if let Ok(request) = Request::parse(mode, rest) {
                    let payload = request.payload_bytes(mode);
                    assert!(payload.is_err() || payload.unwrap() <= MAX_PAYLOAD_BYTES);
                }
            }
        }
    }
}

#[test]
fn a_count_that_is_longer_than_its_message_takes_no_memory() {
    // 65535 kinds of information, in a message that has none.
    let mut data = 0_u32.to_be_bytes().to_vec();
    data.extend(u16::MAX.to_be_bytes());
    assert!(ClientOption::parse(number::GO, &data).is_err());
    let mut data = 0_u32.to_be_bytes().to_vec();
    data.extend(u32::MAX.to_be_bytes());
    assert!(ClientOption::parse(number::SET_META_CONTEXT, &data).is_err());
    let mut data = u32::MAX.to_be_bytes().to_vec();
    data.extend(b"name");
    assert!(ClientOption::parse(number::INFO, &data).is_err());
}

#[test]
fn a_server_of_before_options_is_told_from_one_that_speaks_something_else() {
    let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    let mut bytes = greeting(flags);
    assert_eq!(parse_greeting(&bytes).unwrap(), flags);
    bytes[8..16].copy_from_slice(&0x0000_4202_8186_1253_u64.to_be_bytes());
    let error = parse_greeting(&bytes).unwrap_err();
    assert_eq!(error.kind(), blockcore::ErrorKind::Unsupported);
    bytes[0] = 0;
    let error = parse_greeting(&bytes).unwrap_err();
    assert_eq!(error.kind(), blockcore::ErrorKind::Invalid);
}

#[test]
fn payloads_follow_writes_and_what_says_so_and_are_bounded() {
    let request = |command, flags, bytes| Request {
        flags,
        command,
        cookie: 0,
        offset: 0,
        bytes,
    };
    let none = CommandFlags::empty();
    let write = request(Command::Write, none, 4096);
    assert_eq!(write.payload_bytes(Mode::Simple).unwrap(), 4096);
    let read = request(Command::Read, CommandFlags::PAYLOAD_LEN, 4096);
    assert_eq!(read.payload_bytes(Mode::Structured).unwrap(), 0);
    assert_eq!(read.payload_bytes(Mode::Extended).unwrap(), 4096);
    let long = request(Command::Write, none, u64::from(MAX_PAYLOAD_BYTES) + 1);
    assert!(long.payload_bytes(Mode::Simple).is_err());
    let long = request(Command::Write, none, u64::MAX);
    assert!(long.payload_bytes(Mode::Extended).is_err());
}
