//! Replies and events as text: JSON in ASCII, spaced as QEMU does, each ended by CR and LF. Pure.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{CharEscape, Formatter, PrettyFormatter};

/// Adds `value` to `out`: on one line, or with `pretty` on several.
pub(super) fn write(value: &Value, pretty: bool, out: &mut Vec<u8>) {
    let layout = match pretty {
        true => Layout::Pretty(PrettyFormatter::with_indent(b"    ")),
        false => Layout::Line,
    };
    let mut serializer = serde_json::Serializer::with_formatter(&mut *out, Ascii { layout });
    value
        .serialize(&mut serializer)
        .expect("memory takes what is written");
    out.extend(b"\r\n");
}

enum Layout {
    Line,
    Pretty(PrettyFormatter<'static>),
}

/// Escapes what is not ASCII; a terminal in any encoding can show it.
struct Ascii {
    layout: Layout,
}

macro_rules! laid_out {
    ($($name:ident($($argument:ident: $type:ty),*) = $line:literal;)*) => {$(
        fn $name<W: ?Sized + Write>(&mut self, out: &mut W $(, $argument: $type)*) -> io::Result<()> {
            match &mut self.layout {
                Layout::Pretty(pretty) => pretty.$name(out $(, $argument)*),
                Layout::Line => {
                    $(let _ = $argument;)*
                    out.write_all($line)
                }
            }
        }
    )*};
}

impl Formatter for Ascii {
    laid_out! {
        begin_array() = b"[";
        end_array() = b"]";
        end_array_value() = b"";
        begin_object() = b"{";
        end_object() = b"}";
        end_object_value() = b"";
        begin_object_value() = b": ";
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        match &mut self.layout {
            Layout::Pretty(pretty) => pretty.begin_array_value(out, first),
            Layout::Line if first => Ok(()),
            Layout::Line => out.write_all(b", "),
        }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        match &mut self.layout {
            Layout::Pretty(pretty) => pretty.begin_object_key(out, first),
            Layout::Line if first => Ok(()),
            Layout::Line => out.write_all(b", "),
        }
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        for letter in fragment.chars() {
            match letter {
                ' '..='~' => out.write_all(&[letter as u8])?,
                letter => {
                    let mut units = [0; 2];
                    for unit in letter.encode_utf16(&mut units) {
                        write!(out, "\\u{unit:04X}")?;
                    }
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::AsciiControl(byte) => write!(out, "\\u{byte:04X}"),
            CharEscape::Quote => out.write_all(b"\\\""),
            CharEscape::ReverseSolidus => out.write_all(b"\\\\"),
            CharEscape::Solidus => out.write_all(b"/"),
            CharEscape::Backspace => out.write_all(b"\\b"),
            CharEscape::FormFeed => out.write_all(b"\\f"),
            CharEscape::LineFeed => out.write_all(b"\\n"),
            CharEscape::CarriageReturn => out.write_all(b"\\r"),
            CharEscape::Tab => out.write_all(b"\\t"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(value: &Value, pretty: bool) -> String {
        let mut out = Vec::new();
        write(value, pretty, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_reply_is_one_line_of_ascii_with_spaces_as_qemu_has_them() {
        let value = json!({"id": [1, {}, []], "return": "é\u{1F600}\n\"\u{7f}\u{0}"});
        let expected =
            "{\"id\": [1, {}, []], \"return\": \"\\u00E9\\uD83D\\uDE00\\n\\\"\\u007F\\u0000\"}\r\n";
        assert_eq!(text(&value, false), expected);
    }

    #[test]
    fn a_pretty_reply_is_indented_by_four() {
        let value = json!({"a": [1, {}]});
        let expected = "{\n    \"a\": [\n        1,\n        {}\n    ]\n}\r\n";
        assert_eq!(text(&value, true), expected);
    }
}
