//! How numbers and JSON are printed: as `qemu-img` prints them. Pure.

use serde_json::Value;
use serde_json::ser::PrettyFormatter;

/// JSON on several lines, four spaces a level.
pub(super) fn json(value: &Value) -> String {
    let mut text = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    serde::Serialize::serialize(value, &mut serializer).expect("a value can be written");
    String::from_utf8(text).expect("JSON is text")
}

/// Bytes with three digits, in the unit that leaves less than a thousand: `1.5 MiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut scaled = bytes as f64;
    while scaled >= 1000.0 {
        scaled /= 1024.0;
        unit += 1;
    }
    let decimals = match scaled {
        at_least if at_least >= 100.0 => 0,
        at_least if at_least >= 10.0 => 1,
        at_least if at_least >= 1.0 => 2,
        _ => 3,
    };
    let mut digits = format!("{scaled:.decimals$}");
    if digits.contains('.') {
        digits.truncate(digits.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{digits} {}B", UNITS[unit])
}

/// Rows of text: name and value, indented.
pub(super) fn indented(indent: usize, text: &str) -> String {
    format!("{:indent$}{text}", "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_have_three_digits_and_the_unit_below_a_thousand() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (208_896, "204 KiB"),
            (1 << 20, "1 MiB"),
            (3 << 19, "1.5 MiB"),
            (12_345_678, "11.8 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn json_is_indented_by_four() {
        assert_eq!(
            json(&json!({"a": [1]})),
            "{\n    \"a\": [\n        1\n    ]\n}"
        );
    }
}
