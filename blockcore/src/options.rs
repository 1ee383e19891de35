//! Options: declared by drivers as data, given by operators as text.
//!
//! A driver's table of [`OptionSpec`]s is the only place where its options are written down: parsing,
//! "unknown option" and help come from it. On the command line options are `key=value` pairs with
//! dotted keys for nesting, `,,` for a comma, and on/off for booleans, as QEMU has them. Pure.

use std::collections::BTreeMap;

use crate::Error;

/// One option of a driver.
#[derive(Debug)]
pub struct OptionSpec {
    /// Its key, dotted if nested.
    pub name: &'static str,
    /// What it takes.
    pub kind: OptionKind,
    /// What it is when left out; `None` if it must be given.
    pub default: Option<&'static str>,
    /// Whether reopening may change it.
    pub reopen: bool,
    /// Whether it changes what a guest reads.
    pub changes_data: bool,
    /// One line of help, with the unit.
    pub help: &'static str,
}

/// What an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Bool,
    /// Bytes; `k`, `M`, `G`, `T` are powers of 1024.
    Size,
    /// One of these words.
    Choice(&'static [&'static str]),
}

/// Options as given: every key with its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    values: BTreeMap<String, String>,
}

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
            let well_formed = !key.is_empty() && key.split('.').all(|word| !word.is_empty());
            if !well_formed {
                return Err(Error::invalid(format!("'{key}' is not an option's name")));
            }
            if options.values.insert(key.clone(), value).is_some() {
                return Err(Error::invalid(format!("option '{key}' is given twice")));
            }
        }
        Ok(options)
    }

    /// Sets an option.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.values.insert(key.to_owned(), value.into());
    }

    /// The text of an option, if given.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// Takes an option out.
    pub fn take(&mut self, key: &str) -> Option<String> {
        self.values.remove(key)
    }

    /// Takes out everything under `prefix.`, without the prefix.
    pub fn take_nested(&mut self, prefix: &str) -> Options {
        let mut nested = Self::default();
        self.values.retain(|key, value| {
            let inner = key
                .strip_prefix(prefix)
                .and_then(|rest| rest.strip_prefix('.'));
            if let Some(inner) = inner {
                nested
                    .values
                    .insert(inner.to_owned(), std::mem::take(value));
            }
            inner.is_none()
        });
        nested
    }

    /// Whether nothing is given, or everything was taken.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The first option, by name, that is not the same in both.
    pub fn first_difference(&self, other: &Self) -> Option<String> {
        let names = self.values.keys().chain(other.values.keys());
        let mut differ = names.filter(|name| self.get(name) != other.get(name));
        differ.next().cloned()
    }

    /// The options of `table` as given, with defaults where nothing was.
    #[must_use]
    pub fn with_defaults(&self, table: &'static [OptionSpec]) -> Self {
        let mut whole = Self::default();
        for spec in table {
            if let Some(value) = self.get(spec.name).or(spec.default) {
                whole.set(spec.name, value);
            }
        }
        whole
    }

    /// Checks that every option is in one of `tables` and of its kind; `whose` is for the message.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`], naming the option and what there is instead.
    pub fn check(&self, tables: &[&[OptionSpec]], whose: &str) -> Result<(), Error> {
        let specs = || tables.iter().flat_map(|table| table.iter());
        for (key, value) in &self.values {
            let Some(spec) = specs().find(|spec| spec.name == key) else {
                let known: Vec<_> = specs().map(|spec| spec.name).collect();
                let known = match known.is_empty() {
                    true => "it takes none".to_owned(),
                    false => format!("it takes {}", known.join(", ")),
                };
                return Err(Error::invalid(format!(
                    "{whose} has no option '{key}'; {known}"
                )));
            };
            let refused = |what: &str| {
                Error::invalid(format!(
                    "option '{key}' of {whose} takes {what}, not '{value}'"
                ))
            };
            match spec.kind {
                OptionKind::Text => {}
                OptionKind::Bool => {
                    parse_bool(value).ok_or_else(|| refused("on or off"))?;
                }
                OptionKind::Size => {
                    parse_size(value).ok_or_else(|| refused("a size in bytes, such as 10G"))?;
                }
                OptionKind::Choice(words) => {
                    if !words.contains(&value.as_str()) {
                        return Err(refused(&format!("one of {}", words.join(", "))));
                    }
                }
            }
        }
        for spec in specs() {
            if spec.default.is_none() && !self.values.contains_key(spec.name) {
                return Err(Error::invalid(format!(
                    "{whose} needs option '{}' ({})",
                    spec.name, spec.help
                )));
            }
        }
        Ok(())
    }

    /// The text of an option of `table`, or its default.
    ///
    /// # Panics
    ///
    /// If the table has no such option, or it must be given and [`check`](Self::check) was left out.
    pub fn text<'a>(&'a self, table: &'static [OptionSpec], name: &str) -> &'a str {
        let spec = table.iter().find(|spec| spec.name == name);
        let spec = spec.unwrap_or_else(|| panic!("no option '{name}' in its driver's table"));
        self.get(name)
            .or(spec.default)
            .expect("checked before it is read")
    }

    /// A checked boolean.
    ///
    /// # Panics
    ///
    /// As [`text`](Self::text).
    pub fn bool(&self, table: &'static [OptionSpec], name: &str) -> bool {
        parse_bool(self.text(table, name)).expect("checked before it is read")
    }

    /// A checked size in bytes.
    ///
    /// # Panics
    ///
    /// As [`text`](Self::text).
    pub fn size(&self, table: &'static [OptionSpec], name: &str) -> u64 {
        parse_size(self.text(table, name)).expect("checked before it is read")
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

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[OptionSpec] = &[
        OptionSpec {
            name: "filename",
            kind: OptionKind::Text,
            default: None,
            reopen: false,
            changes_data: true,
            help: "path of the image",
        },
        OptionSpec {
            name: "size",
            kind: OptionKind::Size,
            default: Some("0"),
            reopen: false,
            changes_data: true,
            help: "bytes",
        },
    ];

    #[test]
    fn a_doubled_comma_is_part_of_the_value() {
        let options = Options::parse("file,filename=a,,b,size=1M", Some("driver")).unwrap();
        assert_eq!(options.get("driver"), Some("file"));
        assert_eq!(options.get("filename"), Some("a,b"));
    }

    #[test]
    fn dotted_keys_nest() {
        let mut options =
            Options::parse("file.driver=file,file.cache.direct=on,x=1", None).unwrap();
        let nested = options.take_nested("file");
        assert_eq!(nested.get("cache.direct"), Some("on"));
        assert_eq!(options, Options::parse("x=1", None).unwrap());
    }

    #[test]
    fn bad_options_are_named() {
        let message = |text: &str| {
            let options = Options::parse(text, None);
            let checked = options.and_then(|o| o.check(&[TABLE], "driver 'test'"));
            checked.unwrap_err().to_string()
        };
        assert!(message("filename=a,sise=3").contains("has no option 'sise'"));
        assert!(message("filename=a,size=lots").contains("takes a size in bytes"));
        assert!(message("size=3").contains("needs option 'filename'"));
        assert!(message("filename=a,filename=b").contains("given twice"));
        assert!(message("filename=a,b").contains("key=value"));
        assert!(message("file..x=a").contains("not an option's name"));
    }

    #[test]
    fn sizes_have_suffixes_and_never_overflow() {
        assert_eq!(parse_size("1.5G"), Some(3 << 29));
        assert_eq!(parse_size("0x200"), Some(512));
        assert_eq!(parse_size("16E"), None);
        assert_eq!(parse_size("-1"), None);
        assert_eq!(parse_size("1Q"), None);
        assert_eq!(parse_size(""), None);
    }
}
