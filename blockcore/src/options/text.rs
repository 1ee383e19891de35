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
