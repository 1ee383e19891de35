//! Options as `key=value,key=value`, read and written.

use super::{OptionValue, Options};
use crate::Error;

impl Options {
    /// Parses `key=value,key=value`. A first part without `=` is the value of `implied`.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`] for a part without a key or a key given twice.
    pub fn parse(text: &str, implied: Option<&str>) -> Result<Self, Error> {
        let mut options = Self::default();
        for (index, part) in split_commas(text).into_iter().enumerate() {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => match implied {
                    Some(key) if index == 0 => (key.to_owned(), part),
                    _ => {
                        return Err(Error::invalid(format!(
                            "'{part}' is not of the form key=value"
                        )));
                    }
                },
            };
            options.add(&key, OptionValue::Text(value))?;
        }
        Ok(options)
    }

    /// Parses `key=value,key=value` as QEMU's options are that are in its schema: of a key that is given
    /// twice the last value holds, and a comma may stand at the end. A first part without `=` is the
    /// value of `implied`.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`] for a part without a key or value, what cannot be a key, and a key that
    /// has both a value and keys below it.
    pub fn parse_schema(text: &str, implied: Option<&str>) -> Result<Self, Error> {
        let mut options = Self::default();
        let mut rest = text;
        while !rest.is_empty() {
            let is_first = rest.len() == text.len();
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            let has_value = rest[end..].starts_with('=');
            let (key, value) = match implied {
                Some(implied) if is_first && !has_value => {
                    let value = &rest[..end];
                    if value.is_empty() {
                        return Err(Error::invalid("Invalid parameter ''"));
                    }
                    // Past its comma, which stands for itself here.
                    rest = rest.get(end + 1..).unwrap_or_default();
                    (implied, value.to_owned())
                }
                _ => {
                    let key = &rest[..end];
                    check_schema_key(key)?;
                    if !has_value {
                        return Err(Error::invalid(format!(
                            "Expected '=' after parameter '{key}'"
                        )));
                    }
                    let value;
                    (value, rest) = take_value(&rest[end + 1..]);
                    (key, value)
                }
            };
            options.set(key, value);
        }
        for (key, _) in options.iter() {
            let mut above = key.rmatch_indices('.').map(|(at, _)| &key[..at]);
            if let Some(above) = above.find(|above| options.value(above).is_some()) {
                return Err(Error::invalid(format!(
                    "Parameters '{above}.*' used inconsistently"
                )));
            }
        }
        Ok(options)
    }

    /// The options as `key=value,key=value`, the driver first: [`parse`](Self::parse) gives them back,
    /// but for their kinds. A child that is to be absent has an empty value, as QEMU reads it.
    pub fn to_text(&self) -> String {
        let (driver, others): (Vec<_>, Vec<_>) = self.iter().partition(|(key, _)| *key == "driver");
        let parts = driver.into_iter().chain(others).map(|(key, value)| {
            let value = value.as_text().unwrap_or("");
            format!("{key}={}", value.replace(',', ",,"))
        });
        parts.collect::<Vec<_>>().join(",")
    }
}

/// A value up to a single comma, and what follows it.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(at) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

/// Whether a key is names with dots between, of which all but the first may be places in a list.
fn check_schema_key(key: &str) -> Result<(), Error> {
    let is_place = |word: &str| word.bytes().all(|byte| byte.is_ascii_digit());
    let is_name = |word: &str| word.starts_with(|letter: char| letter.is_ascii_alphabetic());
    let mut words = key.split('.').enumerate();
    let fits = words.all(|(place, word)| is_name(word) || place > 0 && is_place(word));
    match super::check_key(key) {
        Ok(()) if fits => Ok(()),
        _ => {
            let shown: String = key.chars().take(80).collect();
            Err(Error::invalid(format!(
                "Invalid parameter '{}'",
                shown.escape_debug()
            )))
        }
    }
}

/// Splits at single commas; a doubled comma stands for one.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(letter) = rest.next() {
        let last = parts.last_mut().expect("never empty");
        match letter {
            ',' if rest.peek() == Some(&',') => {
                rest.next();
                last.push(',');
            }
            ',' => parts.push(String::new()),
            letter => last.push(letter),
        }
    }
    parts
}

/// `on` or `off`, in QEMU's spellings.
pub fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// Bytes: a decimal or `0x` number, whole or with a fraction, and a suffix of 1024 powers.
pub fn parse_size(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        "e" | "eib" => 60,
        _ => return None,
    };
    let (whole, fraction) = match digits.split_once('.') {
        Some((whole, fraction)) => (whole, fraction),
        None => (digits, ""),
    };
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let scale = 1_u128 << shift;
    let mut bytes = whole.parse::<u128>().ok()?.checked_mul(scale)?;
    if !fraction.is_empty() {
        let part = fraction.parse::<u128>().ok()? * scale;
        bytes += part / 10_u128.pow(fraction.len() as u32);
    }
    u64::try_from(bytes).ok()
}
