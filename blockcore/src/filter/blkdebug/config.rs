//! Option `config`: a file with rules, in sections as QEMU has them.
//!
//! ```text
//! # The second write fails.
//! [set-state]
//! event = "pwritev"
//! new_state = "2"
//!
//! [inject-error "with a name that means nothing"]
//! event = "pwritev"
//! state = "2"
//! errno = "28"
//! ```
//!
//! A section is an entry of the option of that name, before those that are given as options. Where QEMU takes
//! what does not look like this and makes something else of it (values without quotes, a section that is not
//! closed), it is refused.

use crate::engine::{Errno, HostCall, HostReply, Op, OpenOptions};
use crate::io::IoContext;
use crate::io::buffer::Segments;
use crate::options::Options;
use crate::{Error, ErrorKind};

/// Longest file: an operator writes it by hand.
const MAX_BYTES: usize = 64 << 10;

/// What the file says, as options.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for a file that is too long or makes no sense; else what the host said.
pub(super) async fn read(context: &IoContext, path: &str) -> Result<Options, Error> {
    let bytes = load(context, path)
        .await
        .map_err(|error| Error::host(format!("cannot read the rules in '{path}'"), error))?;
    if bytes.len() > MAX_BYTES {
        return Err(Error::invalid(format!(
            "'{path}' has more than the {MAX_BYTES} bytes that rules may have"
        )));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::invalid(format!("'{path}' is no text, and has no rules")))?;
    parse(&text).map_err(|(line, what)| {
        Error::new(
            ErrorKind::Invalid,
            format!("line {line} of '{path}', which has rules for errors: {what}"),
        )
    })
}

/// The beginning of the file, and one byte more than it may have.
async fn load(context: &IoContext, path: &str) -> Result<Vec<u8>, Errno> {
    let options = OpenOptions {
        write: false,
        direct: false,
        create: false,
    };
    let file = match context.host(HostCall::Open(path.into(), options)).await? {
        HostReply::File(file) => file,
        reply => unreachable!("an open answered with {reply:?}"),
    };
    context.engine().attach(&file);
    let into = Segments::allocate(MAX_BYTES + 1, 4096);
    let mut done = 0;
    let read = loop {
        let op = Op::Read {
            file: file.id(),
            offset: done,
            segments: into.slice(done, into.bytes() - done),
        };
        match context.op(op).await.0 {
            Ok(0) => break Ok(done),
            Ok(moved) if done + moved == into.bytes() => break Ok(into.bytes()),
            Ok(moved) => done += moved,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => break Err(error),
        }
    };
    context.engine().detach(file.id());
    Ok(into.slice(0, read?).to_vec())
}

/// The number of a line, and what is wrong with it.
type Wrong = (usize, String);

fn parse(text: &str) -> Result<Options, Wrong> {
    let mut options = Options::default();
    let mut counts = [("inject-error", 0), ("set-state", 0)];
    let mut section: Option<String> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let wrong = |what: String| (number, what);
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let name = section_name(header)
                .ok_or_else(|| wrong(format!("'{line}' does not begin a section: [NAME]")))?;
            let known = counts.iter_mut().find(|(known, _)| *known == name);
            let (name, count) = known.ok_or_else(|| {
                wrong(format!(
                    "there is no section '{name}'; there are 'inject-error' and 'set-state'"
                ))
            })?;
            section = Some(format!("{name}.{count}"));
            *count += 1;
            continue;
        }
        let (key, value) =
            entry(line).ok_or_else(|| wrong(format!("'{line}' is not KEY = \"VALUE\"")))?;
        let section = section
            .as_ref()
            .ok_or_else(|| wrong(format!("'{key}' comes before the first section")))?;
        // The last one counts.
        options.set(&format!("{section}.{key}"), value);
    }
    Ok(options)
}

/// `NAME]` or `NAME "ID"]`.
fn section_name(header: &str) -> Option<&str> {
    let inside = header.strip_suffix(']')?;
    let Some((name, id)) = inside.split_once(char::is_whitespace) else {
        return Some(inside);
    };
    let id = id.trim().strip_prefix('"')?.strip_suffix('"')?;
    (!id.contains('"')).then_some(name)
}

/// `KEY = "VALUE"`.
fn entry(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
    let key = key.trim();
    let is_one_word = !key.is_empty() && !key.contains(char::is_whitespace);
    (is_one_word && !value.contains('"')).then_some((key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_become_entries_in_their_order() {
        let text = "# rules\n\n[inject-error]\nevent = \"pwritev\"\n[set-state]\r\n  event=\"none\"\n\
                    [inject-error \"two\"]\nerrno = \"5\"\nerrno = \"28\"\nstate = \"\"";
        let options = parse(text).unwrap();
        let all: Vec<_> = options.iter().collect();
        let expected = [
            ("inject-error.0.event", "pwritev"),
            ("inject-error.1.errno", "28"),
            ("inject-error.1.state", ""),
            ("set-state.0.event", "none"),
        ];
        for (key, value) in expected {
            assert_eq!(options.get(key), Some(value), "{all:?}");
        }
        assert_eq!(all.len(), expected.len(), "{all:?}");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_line() {
        for (text, line) in [
            ("event = \"pwritev\"", 1),
            ("\n[teatime]", 2),
            ("[inject-error\n", 1),
            ("[inject-error two]", 1),
            ("[inject-error]\nevent = pwritev", 2),
            ("[inject-error]\nevent = \"pwritev", 2),
            ("[inject-error]\nevent = \"a\"b\"", 2),
            ("[inject-error]\n\n= \"pwritev\"", 3),
            ("[inject-error]\nan event = \"pwritev\"", 2),
            ("[inject-error]\nteatime", 2),
        ] {
            let (found, what) = parse(text).unwrap_err();
            assert_eq!(found, line, "{text:?}: {what}");
        }
    }
}
