//! [`Reader`]: values out of a stream of JSON, as QEMU's monitor reads them. Pure.
//!
//! A value ends where its brackets do; no line's end is needed. Strings may stand in single quotes. What
//! cannot be read is refused once, and reading goes on behind it: after a stray character at the next
//! bracket, comma, colon or control character, after a wrong order of tokens where the brackets end.
//!
//! Bounds, as QEMU has them: [`MAX_TOKENS_BYTES`], [`MAX_TOKENS`] and [`MAX_DEPTH`] of one value.

use std::mem;

use serde_json::{Map, Number, Value};

/// The tokens of one value have at most so many bytes.
pub const MAX_TOKENS_BYTES: usize = 64 << 20;
/// One value has at most so many tokens.
pub const MAX_TOKENS: usize = 2 << 20;
/// Brackets are at most so deep.
pub const MAX_DEPTH: usize = 1024;

/// What was read: a value, or why it is none.
pub type Read = Result<Value, String>;

/// See the module's header.
#[derive(Default)]
pub struct Reader {
    state: State,
    /// The token that is being read.
    text: Vec<u8>,
    tokens: Vec<Token>,
    tokens_bytes: usize,
    braces: i64,
    brackets: i64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Between tokens.
    #[default]
    Start,
    /// In a string that this quote ends.
    String(u8),
    /// Behind a backslash in such a string.
    Escape(u8),
    /// Behind a minus.
    Minus,
    /// Behind a first zero.
    Zero,
    /// In a number's whole part.
    Digits,
    /// Behind its point.
    Point,
    /// In its fraction.
    Fraction,
    /// Behind its `e`.
    Exponent,
    /// Behind the exponent's sign.
    Sign,
    /// In its exponent.
    Power,
    Word,
    /// Behind what cannot be read, up to where it is worth trying again.
    Lost,
}

#[derive(Debug)]
enum Token {
    Mark(u8),
    /// With its quotes.
    String(Vec<u8>),
    Number(Vec<u8>, bool),
    Word(Vec<u8>),
}

/// What a byte does to the token that is being read.
enum Step {
    /// It belongs to it.
    Keep(State),
    /// It belongs to it and ends it.
    Last,
    /// It belongs to the next one.
    Before,
    /// It is of no token.
    Skip(State),
    /// It fits nowhere.
    Stray,
}

impl Reader {
    /// Reads on. Takes bytes from the front of `input`, up to and including those of the next value, and
    /// returns that; `None` when all was taken and none has ended.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Read> {
        while let Some((&byte, rest)) = input.split_first() {
            match self.step(byte) {
                Step::Keep(state) => {
                    self.text.push(byte);
                    self.state = state;
                    *input = rest;
                    if self.tokens_bytes + self.text.len() > MAX_TOKENS_BYTES {
                        self.state = State::Lost;
                        return Some(self.give_up("JSON token size limit exceeded"));
                    }
                }
                Step::Last => {
                    self.text.push(byte);
                    *input = rest;
                    if let Some(read) = self.end_token() {
                        return Some(read);
                    }
                }
                Step::Before => {
                    if let Some(read) = self.end_token() {
                        return Some(read);
                    }
                }
                Step::Skip(state) => {
                    self.state = state;
                    *input = rest;
                }
                Step::Stray => {
                    self.text.push(byte);
                    *input = rest;
                    let text = mem::take(&mut self.text);
                    let text = String::from_utf8_lossy(&text).into_owned();
                    self.state = State::Lost;
                    return Some(self.give_up(&format!("JSON parse error, stray '{text}'")));
                }
            }
        }
        None
    }

    fn step(&self, byte: u8) -> Step {
        let is_mark = b"{}[],:".contains(&byte);
        match (self.state, byte) {
            (State::Start, b'"' | b'\'') => Step::Keep(State::String(byte)),
            (State::Start, b'-') => Step::Keep(State::Minus),
            (State::Start | State::Minus, b'0') => Step::Keep(State::Zero),
            (State::Start | State::Minus, b'1'..=b'9') => Step::Keep(State::Digits),
            (State::Start, b'a'..=b'z') => Step::Keep(State::Word),
            (State::Start, b' ' | b'\t' | b'\r' | b'\n') => Step::Skip(State::Start),
            (State::Start, _) if is_mark => Step::Last,

            (State::String(quote), _) if byte == quote => Step::Last,
            (State::String(quote), b'\\') => Step::Keep(State::Escape(quote)),
            // No UTF-8 has these, and no string a control character.
            (State::String(_) | State::Escape(_), 0..=0x1f | 0xc0 | 0xc1 | 0xf5..=0xff) => {
                Step::Stray
            }
            (State::String(quote) | State::Escape(quote), _) => Step::Keep(State::String(quote)),

            (State::Zero, b'0'..=b'9') => Step::Stray,
            (State::Digits, b'0'..=b'9') => Step::Keep(State::Digits),
            (State::Zero | State::Digits, b'.') => Step::Keep(State::Point),
            (State::Point | State::Fraction, b'0'..=b'9') => Step::Keep(State::Fraction),
            (State::Zero | State::Digits | State::Fraction, b'e' | b'E') => {
                Step::Keep(State::Exponent)
            }
            (State::Exponent, b'+' | b'-') => Step::Keep(State::Sign),
            (State::Exponent | State::Sign | State::Power, b'0'..=b'9') => Step::Keep(State::Power),
            (State::Zero | State::Digits | State::Fraction | State::Power, _) => Step::Before,

            (State::Word, b'a'..=b'z') => Step::Keep(State::Word),
            (State::Word, _) => Step::Before,

            (State::Lost, 0..=0x1f) => Step::Skip(State::Start),
            (State::Lost, _) if is_mark => Step::Last,
            (State::Lost, _) => Step::Skip(State::Lost),

            (State::Start | State::Minus | State::Point | State::Exponent | State::Sign, _) => {
                Step::Stray
            }
        }
    }

    /// The token that was read is whole.
    fn end_token(&mut self) -> Option<Read> {
        let text = mem::take(&mut self.text);
        let state = mem::replace(&mut self.state, State::Start);
        self.tokens_bytes += text.len();
        let token = match state {
            State::Start | State::Lost => {
                match text[0] {
                    b'{' => self.braces += 1,
                    b'}' => self.braces -= 1,
                    b'[' => self.brackets += 1,
                    b']' => self.brackets -= 1,
                    _ => {}
                }
                Token::Mark(text[0])
            }
            State::String(_) => Token::String(text),
            State::Word => Token::Word(text),
            state => Token::Number(text, matches!(state, State::Zero | State::Digits)),
        };
        self.tokens.push(token);
        if self.tokens.len() > MAX_TOKENS {
            return Some(self.give_up("JSON token count limit exceeded"));
        }
        if self.braces + self.brackets > MAX_DEPTH as i64 {
            return Some(self.give_up("JSON nesting depth limit exceeded"));
        }
        let open = (self.braces > 0 || self.brackets > 0) && self.braces >= 0 && self.brackets >= 0;
        if open {
            return None;
        }
        let tokens = mem::take(&mut self.tokens);
        self.forget();
        Some(parse(tokens).map_err(|error| format!("JSON parse error, {error}")))
    }

    fn give_up(&mut self, why: &str) -> Read {
        self.forget();
        Err(why.to_owned())
    }

    fn forget(&mut self) {
        self.tokens = Vec::new();
        self.text = Vec::new();
        self.tokens_bytes = 0;
        self.braces = 0;
        self.brackets = 0;
    }
}

/// What is built: objects with the key that waits for its value.
enum Open {
    List(Vec<Value>),
    Object(Map<String, Value>, String),
}

/// Reads one value from the tokens of one. Without recursion, as nesting is the sender's to choose.
fn parse(tokens: Vec<Token>) -> Result<Value, String> {
    let mut tokens = tokens.into_iter().peekable();
    let mut open: Vec<Open> = Vec::new();
    loop {
        let mut value = match tokens.next() {
            Some(Token::Mark(b'{')) => {
                if let Some(Token::Mark(b'}')) = tokens.peek() {
                    tokens.next();
                    Value::Object(Map::new())
                } else {
                    let key = parse_key(&mut tokens, &Map::new())?;
                    open.push(Open::Object(Map::new(), key));
                    continue;
                }
            }
            Some(Token::Mark(b'[')) => {
                if let Some(Token::Mark(b']')) = tokens.peek() {
                    tokens.next();
                    Value::Array(Vec::new())
                } else {
                    open.push(Open::List(Vec::new()));
                    continue;
                }
            }
            Some(Token::Mark(_)) | None => return Err("expecting value".into()),
            Some(token) => parse_scalar(token)?,
        };
        // Put it where it belongs, and end what ends with it.
        loop {
            match open.pop() {
                None => return Ok(value),
                Some(Open::List(mut list)) => {
                    list.push(value);
                    match tokens.next() {
                        Some(Token::Mark(b',')) => {
                            open.push(Open::List(list));
                            break;
                        }
                        Some(Token::Mark(b']')) => value = Value::Array(list),
                        _ => return Err("expected separator in list".into()),
                    }
                }
                Some(Open::Object(mut map, key)) => {
                    map.insert(key, value);
                    match tokens.next() {
                        Some(Token::Mark(b',')) => {
                            let key = parse_key(&mut tokens, &map)?;
                            open.push(Open::Object(map, key));
                            break;
                        }
                        Some(Token::Mark(b'}')) => value = Value::Object(map),
                        _ => return Err("expected separator in dict".into()),
                    }
                }
            }
        }
    }
}

fn parse_key(
    tokens: &mut impl Iterator<Item = Token>,
    map: &Map<String, Value>,
) -> Result<String, String> {
    let key = match tokens.next() {
        Some(Token::Mark(_)) | None => return Err("expecting value".into()),
        Some(token) => parse_scalar(token)?,
    };
    let Value::String(key) = key else {
        return Err("key is not a string in object".into());
    };
    if !matches!(tokens.next(), Some(Token::Mark(b':'))) {
        return Err("missing : in object pair".into());
    }
    if map.contains_key(&key) {
        return Err("duplicate key".into());
    }
    Ok(key)
}

fn parse_scalar(token: Token) -> Result<Value, String> {
    match token {
        Token::Mark(_) => unreachable!("a mark is no value"),
        Token::String(text) => parse_string(&text[1..text.len() - 1]).map(Value::String),
        Token::Word(word) => match &word[..] {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            word => Err(format!(
                "invalid keyword '{}'",
                String::from_utf8_lossy(word)
            )),
        },
        Token::Number(text, is_whole) => {
            let text = String::from_utf8(text).expect("digits are ASCII");
            let number = match is_whole {
                true => {
                    let signed = text.parse::<i64>().map(Number::from);
                    signed
                        .or_else(|_| text.parse::<u64>().map(Number::from))
                        .ok()
                }
                false => None,
            };
            // What is too large for a whole number is a rough one.
            let rough = || {
                let value = text.parse::<f64>().unwrap_or(f64::MAX);
                Number::from_f64(value.clamp(f64::MIN, f64::MAX))
            };
            number
                .or_else(rough)
                .map(Value::Number)
                .ok_or_else(|| format!("invalid number '{text}'"))
        }
    }
}

fn parse_string(text: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(text).map_err(|_| "invalid UTF-8 sequence in string")?;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = &rest[at..];
        // The reader ends no string behind a backslash.
        let letter = escape
            .chars()
            .nth(1)
            .ok_or("invalid escape sequence in string")?;
        rest = &escape[1 + letter.len_utf8()..];
        match letter {
            '"' | '\'' | '\\' | '/' => out.push(letter),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'u' => {
                let (letter, bytes) = parse_unicode(escape)?;
                out.push(letter);
                rest = &escape[bytes..];
            }
            _ => return Err("invalid escape sequence in string".into()),
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// What the `\uXXXX` is, or two of them, that `escape` begins with, and their length in bytes.
fn parse_unicode(escape: &str) -> Result<(char, usize), String> {
    let unit = |text: &str| -> Option<u16> {
        let digits = text.strip_prefix("\\u")?.get(..4)?;
        let all_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        all_hex
            .then(|| u16::from_str_radix(digits, 16).ok())
            .flatten()
    };
    let wrong = || {
        let shown: String = escape.chars().take(6).collect();
        format!("{shown} is not a valid Unicode character")
    };
    let first = unit(escape).ok_or_else(wrong)?;
    if let Some(letter) = char::from_u32(u32::from(first)) {
        return Ok((letter, 6));
    }
    let second = escape.get(6..).and_then(unit).ok_or_else(wrong)?;
    let mut both = char::decode_utf16([first, second]);
    match both.next() {
        Some(Ok(letter)) => Ok((letter, 12)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_all(reader: &mut Reader, mut input: &[u8]) -> Vec<Read> {
        std::iter::from_fn(|| reader.next(&mut input)).collect()
    }

    fn texts(input: &[u8]) -> Vec<String> {
        let read = read_all(&mut Reader::default(), input);
        let text = |read: Read| match read {
            Ok(value) => value.to_string(),
            Err(text) => text.trim_start_matches("JSON parse error, ").to_owned(),
        };
        read.into_iter().map(text).collect()
    }

    #[test]
    fn values_follow_each_other_with_nothing_between() {
        assert_eq!(
            texts(b"{\"a\":[1,true,null]}{'b':'it\\'s \"c\"'}"),
            ["{\"a\":[1,true,null]}", "{\"b\":\"it's \\\"c\\\"\"}"]
        );
        // A number may go on.
        assert_eq!(texts(b"12"), [""; 0]);
        assert_eq!(texts(b"12 -0.5e3,"), ["12", "-500.0", "expecting value"]);
    }

    /// What `qemu-storage-daemon` 10.0.2 answers to each.
    #[test]
    fn what_cannot_be_read_is_refused_as_qemu_does_and_reading_goes_on() {
        for (input, expected) in [
            ("foo\n", &["invalid keyword 'foo'"][..]),
            ("{\"a\":1,}\n", &["expecting value"]),
            ("}\n", &["expecting value"]),
            ("{]\n", &["expecting value"]),
            ("{}}\n", &["{}", "expecting value"]),
            ("'\\x'\n", &["invalid escape sequence in string"]),
            ("{\"a\":1 \"b\":1}", &["expected separator in dict"]),
            ("[1 2]", &["expected separator in list"]),
            ("\"abc\u{1}def\"\n", &["stray '\"abc\u{1}'"]),
            (
                "{\"id\":\"\\ud83d\"}",
                &["\\ud83d is not a valid Unicode character"],
            ),
            (
                "\"\\ud83d\\u0041\"",
                &["\\ud83d is not a valid Unicode character"],
            ),
            (
                "\"a\\u12g\" {}",
                &["\\u12g is not a valid Unicode character", "{}"],
            ),
            ("{\"id\":01}", &["stray '01'", "expecting value"]),
            ("{\"id\":%p}", &["stray '%'", "expecting value"]),
            ("{\"a\":1,\"a\":2}", &["duplicate key"]),
            ("{1:2}", &["key is not a string in object"]),
            ("{\"a\"}", &["missing : in object pair"]),
            ("{,}", &["expecting value"]),
            ("-\n", &["stray '-\n'"]),
            ("@a\"b\" {}", &["stray '@'", "{}"]),
            ("@,{}", &["stray '@'", "expecting value", "{}"]),
            ("1e{}\n", &["stray '1e{'", "expecting value"]),
            ("truex{}", &["invalid keyword 'truex'", "{}"]),
            ("true1{}", &["true", "1", "{}"]),
            ("12a{}", &["12", "invalid keyword 'a'", "{}"]),
            ("TRUE\n", &["stray 'T'"]),
        ] {
            assert_eq!(texts(input.as_bytes()), expected, "{input}");
        }
        assert_eq!(texts(b"\"\x80\""), ["invalid UTF-8 sequence in string"]);
        assert_eq!(texts(b"\xff{}"), ["stray '\u{fffd}'", "{}"]);
    }

    #[test]
    fn numbers_keep_their_digits_as_far_as_64_bits_go() {
        for (text, value) in [
            ("18446744073709551615 ", json!(u64::MAX)),
            ("-9223372036854775808 ", json!(i64::MIN)),
            ("99999999999999999999 ", json!(1e20)),
            ("1e999 ", json!(f64::MAX)),
            ("-0 ", json!(0)),
        ] {
            let read = read_all(&mut Reader::default(), text.as_bytes());
            assert_eq!(read, [Ok(value)], "{text}");
        }
    }

    #[test]
    fn depth_size_and_count_are_bounded_and_reading_goes_on() {
        let deep = "[".repeat(MAX_DEPTH) + &"]".repeat(MAX_DEPTH);
        assert!(read_all(&mut Reader::default(), deep.as_bytes())[0].is_ok());
        let mut reader = Reader::default();
        let read = read_all(&mut reader, "[".repeat(MAX_DEPTH + 1).as_bytes());
        assert_eq!(read, [Err("JSON nesting depth limit exceeded".to_owned())]);
        assert_eq!(read_all(&mut reader, b"{}"), [Ok(json!({}))]);

        let read = read_all(&mut reader, b"[");
        assert_eq!(read, []);
        let mut many = b"1,".repeat(MAX_TOKENS / 2);
        many.push(b'\n');
        let read = read_all(&mut reader, &many);
        assert_eq!(read[0], Err("JSON token count limit exceeded".to_owned()));

        let mut reader = Reader::default();
        let mut long = vec![b'"'];
        long.resize(MAX_TOKENS_BYTES + 1, b'a');
        let read = read_all(&mut reader, &long);
        assert_eq!(read, [Err("JSON token size limit exceeded".to_owned())]);
        assert_eq!(read_all(&mut reader, b"\"\n{}"), [Ok(json!({}))]);
        assert_eq!(reader.text.capacity(), 0);
    }

    /// Whatever comes, in whatever pieces: the same is read, values come back from their own text, and
    /// behind a line's end a command is understood again.
    #[test]
    fn any_bytes_in_any_pieces_are_read_alike_and_never_stop_the_reading() {
        let seed = std::process::id();
        eprintln!("seed {seed}");
        let mut state = u64::from(seed) | 1;
        let mut random = move |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as usize % below
        };
        let parts: [&[u8]; 24] = [
            b"{",
            b"}",
            b"[",
            b"]",
            b",",
            b":",
            b"\"a\"",
            b"'b'",
            b"1",
            b"-2.5e1",
            b"true",
            b"nul",
            b"\\",
            b"\"",
            b"'",
            b" ",
            b"\n",
            b"\x00",
            b"\xff",
            b"\xc3\xa9",
            b"\\u00e9",
            b"{\"a\":1}",
            b"%",
            b"0",
        ];
        for _ in 0..3000 {
            let count = random(30);
            let input: Vec<u8> = (0..count)
                .flat_map(|_| parts[random(parts.len())])
                .copied()
                .collect();
            let whole = read_all(&mut Reader::default(), &input);
            let mut reader = Reader::default();
            let mut pieces = Vec::new();
            let mut rest = &input[..];
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(1 + random(rest.len()));
                pieces.extend(read_all(&mut reader, piece));
                rest = more;
            }
            assert_eq!(whole, pieces, "{input:?}");
            for value in whole.into_iter().flatten() {
                let again = read_all(&mut Reader::default(), format!("{value}\n").as_bytes());
                assert_eq!(again, [Ok(value)]);
            }
            // A stray character ends whatever was open.
            let after = read_all(&mut reader, b"\x01\x01\n{\"b\":2}");
            assert_eq!(after.last(), Some(&Ok(json!({"b": 2}))), "{input:?}");
        }
    }
}
