//! Options as strictly typed as in QEMU's schema: what the command line and QMP take.
//!
//! Elsewhere, as in `json:` file names, options are taken as they are meant (`"5"` for a number, `1M` for any
//! number of bytes): see [`Options::check`]. Messages begin as QEMU's do, for those who look for them, and
//! say what there is instead.

use std::collections::BTreeMap;

use super::{Form, OptionKind, OptionSpec, OptionValue, Options, parse_bool, parse_size};
use crate::Error;

impl Options {
    /// The options, each value in the kind that its table gives it. `prefix` is what stands before their keys
    /// in messages; `children` are names of others that `whose` takes.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`]: the first thing that is missing, unknown or of another type.
    pub fn typed(
        &self,
        tables: &[&[OptionSpec]],
        form: Form,
        prefix: &str,
        whose: &str,
        children: &[&str],
    ) -> Result<Self, Error> {
        let mut typed = Self::default();
        for (key, given) in self.iter() {
            let (key, path) = (plain_places(key), format!("{prefix}{key}"));
            let Some(spec) = super::find(tables, &key) else {
                return Err(unexpected(&key, tables, prefix, whose, children));
            };
            typed.set_value(&key, value(spec, given, form, &path)?);
        }
        check_lists(&typed, prefix)?;
        let left_out = |spec: &&OptionSpec| typed.value(spec.name).is_none();
        let mut left_out = super::specs(tables).filter(left_out);
        match left_out.find(|spec| spec.default.is_none()) {
            Some(spec) => {
                // All of what is around it, if none of that is there.
                let around = spec
                    .name
                    .split_once('.')
                    .map_or(spec.name, |(word, _)| word);
                let inside = format!("{around}.");
                let is_begun = typed.iter().any(|(key, _)| key.starts_with(&inside));
                let name = if is_begun { spec.name } else { around };
                Err(missing(&format!("{prefix}{name}")))
            }
            None => Ok(typed),
        }
    }
}

/// A value in the kind of its option.
fn value(
    spec: &OptionSpec,
    value: &OptionValue,
    form: Form,
    path: &str,
) -> Result<OptionValue, Error> {
    let text = match (value, form) {
        (OptionValue::Text(text), _) => text,
        (OptionValue::Bool(_), Form::Json) if spec.kind == OptionKind::Bool => {
            return Ok(value.clone());
        }
        (OptionValue::Number(digits), Form::Json) if spec.kind.is_number() => {
            return number(digits, spec.kind, path);
        }
        _ => return Err(wrong_type(path, type_name(spec.kind))),
    };
    let expects =
        |what: &str| Error::invalid(format!("Parameter '{path}' expects {what}, not '{text}'"));
    match spec.kind {
        OptionKind::Text => Ok(value.clone()),
        OptionKind::Choice(words) if words.contains(&text.as_str()) => Ok(value.clone()),
        OptionKind::Choice(words) => Err(refused(path, text, words.iter().copied())),
        kind if form == Form::Json => Err(wrong_type(path, type_name(kind))),
        OptionKind::Bool => {
            let flag = parse_bool(text).map(OptionValue::Bool);
            flag.ok_or_else(|| expects("'on' or 'off'"))
        }
        OptionKind::Size => {
            let bytes = parse_size(text).ok_or_else(|| expects("a size"))?;
            Ok(OptionValue::Number(bytes.to_string()))
        }
        kind => {
            let whole = parse_integer(text).ok_or_else(|| match parse_size(text) {
                Some(bytes) => expects(&format!("integer (here {bytes})")),
                None => expects("integer"),
            })?;
            number(&whole.to_string(), kind, path)
        }
    }
}

/// A key whose places in lists are plain numbers: `a.00.b` is `a.0.b`.
fn plain_places(key: &str) -> String {
    let words = key.split('.').enumerate().map(|(place, word)| {
        let is_number = place > 0 && word.bytes().all(|byte| byte.is_ascii_digit());
        match word.trim_start_matches('0') {
            plain if !is_number || plain.len() == word.len() => word,
            "" => "0",
            plain => plain,
        }
    });
    words.collect::<Vec<_>>().join(".")
}

/// Lists begin at 0 and leave nothing out.
fn check_lists(options: &Options, prefix: &str) -> Result<(), Error> {
    let mut lists: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for (key, _) in options.iter() {
        let mut list = String::new();
        for word in key.split('.') {
            if let Ok(place) = word.parse()
                && !list.is_empty()
            {
                lists.entry(list.clone()).or_default().push(place);
            }
            if !list.is_empty() {
                list.push('.');
            }
            list.push_str(word);
        }
    }
    for (list, mut places) in lists {
        places.sort_unstable();
        places.dedup();
        let gap = (0..).zip(&places).find(|(wanted, place)| wanted != *place);
        if let Some((wanted, _)) = gap {
            return Err(Error::invalid(format!(
                "Parameter '{prefix}{list}.{wanted}' missing"
            )));
        }
    }
    Ok(())
}

/// A whole number with its sign: decimal, `0x` or, as in C, octal after a 0; blanks may stand before it.
fn parse_integer(text: &str) -> Option<i128> {
    let text = text.trim_start_matches(|letter: char| " \t\n\r\x0b\x0c".contains(letter));
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let hex = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"));
    let (digits, radix) = match (hex, digits.strip_prefix('0')) {
        (Some(hex), _) => (hex, 16),
        (None, Some(octal)) if !octal.is_empty() => (octal, 8),
        _ => (digits, 10),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        // `from_str_radix` would take another sign.
        return None;
    }
    let value = i128::from(u64::from_str_radix(digits, radix).ok()?);
    Some(sign * value).filter(|value| i64::try_from(*value).is_ok())
}

fn number(digits: &str, kind: OptionKind, path: &str) -> Result<OptionValue, Error> {
    match digits.parse::<i64>() {
        Err(_) => Err(wrong_type(path, type_name(kind))),
        Ok(value) if value < 0 && kind != OptionKind::Int => Err(Error::invalid(format!(
            "Value '{value}' is out of range for parameter '{path}'"
        ))),
        Ok(value) => Ok(OptionValue::Number(value.to_string())),
    }
}

/// What QEMU calls a kind.
fn type_name(kind: OptionKind) -> &'static str {
    match kind {
        OptionKind::Text | OptionKind::Choice(_) => "string",
        OptionKind::Bool => "boolean",
        OptionKind::Size | OptionKind::Bytes | OptionKind::Int => "integer",
    }
}

/// What QEMU says of what is not there.
pub(crate) fn missing(path: &str) -> Error {
    Error::invalid(format!("Parameter '{path}' is missing"))
}

/// What QEMU says of a value of another type.
pub(crate) fn wrong_type(path: &str, expected: &str) -> Error {
    Error::invalid(format!(
        "Invalid parameter type for '{path}', expected: {expected}"
    ))
}

/// What QEMU says of a word that is none of those that are known.
pub(crate) fn refused<'w>(path: &str, value: &str, known: impl Iterator<Item = &'w str>) -> Error {
    let known = known.collect::<Vec<_>>().join(", ");
    Error::invalid(format!(
        "Parameter '{path}' does not accept value '{value}': it takes {known}"
    ))
}

fn unexpected(
    key: &str,
    tables: &[&[OptionSpec]],
    prefix: &str,
    whose: &str,
    children: &[&str],
) -> Error {
    let names = || super::specs(tables).map(|spec| spec.name);
    let nested = format!("{key}.");
    if names().any(|name| name.starts_with(&format!("{nested}*"))) {
        return wrong_type(&format!("{prefix}{key}"), "array");
    }
    if names().any(|name| name.starts_with(&nested)) {
        return wrong_type(&format!("{prefix}{key}"), "object");
    }
    let is_within = |name: &str| {
        let rest = key.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with('.'))
    };
    if let Some(name) = names().find(|name| is_within(name)) {
        return Error::invalid(format!("Parameters '{prefix}{name}.*' are unexpected"));
    }
    // The outermost member that is not known; what is inside of it does not matter.
    let word = key.split('.').next().unwrap_or(key);
    let is_part_of_key = names().any(|name| name.split('.').next() == Some(word));
    let key = if is_part_of_key { key } else { word };
    let known = names().chain(children.iter().copied());
    Error::invalid(format!(
        "Parameter '{prefix}{key}' is unexpected: {whose} takes {}",
        known.collect::<Vec<_>>().join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_as_c_reads_them() {
        for (text, value) in [
            ("0", 0),
            ("010", 8),
            ("0x10", 16),
            ("0X1f", 31),
            (" 5", 5),
            ("+5", 5),
            ("-5", -5),
            ("9223372036854775807", i128::from(i64::MAX)),
        ] {
            assert_eq!(parse_integer(text), Some(value), "{text}");
        }
        for text in [
            "",
            "5 ",
            "08",
            "1M",
            "5.0",
            "--5",
            "+-5",
            "0x",
            "9223372036854775808",
        ] {
            assert_eq!(parse_integer(text), None, "{text}");
        }
    }

    #[test]
    fn places_in_lists_are_plain_numbers() {
        assert_eq!(plain_places("a.00.b"), "a.0.b");
        assert_eq!(plain_places("a.010"), "a.10");
        assert_eq!(plain_places("00.a"), "00.a");
        assert_eq!(plain_places("a.b0"), "a.b0");
    }
}
