//! Options: declared by drivers as data, given by operators as text or JSON.
//!
//! A driver's table of [`OptionSpec`]s is the only place where its options are written down: parsing,
//! "unknown option" and help come from it. However they are given, options are a tree flattened to
//! dotted keys: `file.driver`, `children.0`. On the command line they are `key=value` pairs with `,,`
//! for a comma, elsewhere JSON objects, as QEMU has them. Pure.
//!
//! A value keeps the kind in which it was given. Two descriptions of one node are compared by
//! [`Options::differences`], for which `size=1M` and `"size": 1048576` are the same.

mod json;
mod text;
pub(crate) mod typed;

use std::collections::BTreeMap;

pub use self::text::{parse_bool, parse_size};
use crate::Error;

/// Longest key, dots included. QEMU's own reach some forty bytes; a chain of images described inline
/// adds `backing.` for each.
const MAX_KEY_BYTES: usize = 1024;
/// Most words of a key, and so the deepest nesting that is read. Below what serde_json itself refuses
/// (128), and above any chain of images that is worth describing in one piece.
const MAX_KEY_WORDS: usize = 100;

/// One option of a driver.
#[derive(Debug)]
pub struct OptionSpec {
    /// Its key, dotted if nested; `*` stands for the places of a list, and such an option has a default.
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

impl OptionSpec {
    /// Whether `key` is this option. A `*` in its name stands for any one word: the place in a list.
    pub fn is_key(&self, key: &str) -> bool {
        if !self.name.contains('*') {
            return self.name == key;
        }
        let (mut words, mut given) = (self.name.split('.'), key.split('.'));
        loop {
            match (words.next(), given.next()) {
                (None, None) => return true,
                (Some("*"), Some(_)) => {}
                (mine, theirs) if mine == theirs => {}
                _ => return false,
            }
        }
    }
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
    /// The same, where QEMU's schema has a plain number.
    Bytes,
    /// A whole number, perhaps negative.
    Int,
    /// One of these words.
    Choice(&'static [&'static str]),
}

impl OptionKind {
    /// Whether JSON has numbers for it.
    pub fn is_number(self) -> bool {
        matches!(self, Self::Size | Self::Bytes | Self::Int)
    }
}

/// In which of the forms of QEMU's schema options were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `key=value,key=value`: each value is text that stands for its type.
    KeyValue,
    /// JSON: each value has its type.
    Json,
}

/// What an option was given as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// Any text; what `key=value` gives.
    Text(String),
    /// JSON's `true` or `false`.
    Bool(bool),
    /// A whole number in JSON, in decimal digits.
    Number(String),
    /// JSON's `null`: a child that is explicitly not there.
    Null,
}

impl OptionValue {
    /// As `key=value` would have it; `None` for what is not there.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Number(text) => Some(text),
            Self::Bool(true) => Some("on"),
            Self::Bool(false) => Some("off"),
            Self::Null => None,
        }
    }

    /// The same value in the kind that an option has; as it is if it does not fit.
    fn of_kind(&self, kind: OptionKind) -> Self {
        let Some(text) = self.as_text() else {
            return Self::Null;
        };
        let fitting = match kind {
            OptionKind::Text | OptionKind::Choice(_) => Some(Self::Text(text.to_owned())),
            OptionKind::Bool => parse_bool(text).map(Self::Bool),
            OptionKind::Size | OptionKind::Bytes => {
                parse_size(text).map(|bytes| Self::Number(bytes.to_string()))
            }
            OptionKind::Int => {
                let number = text.parse::<i64>().ok();
                number.map(|number| Self::Number(number.to_string()))
            }
        };
        fitting.unwrap_or_else(|| self.clone())
    }
}

/// What is said of a child among its parent's options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildOption {
    /// There is to be none (`null`, or an empty name).
    Absent,
    /// A node that exists, by its name.
    Node(String),
    /// A node to be opened with these options.
    Inline(Options),
}

/// Options as given: every key with its value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    values: BTreeMap<String, OptionValue>,
}

impl Options {
    /// Sets an option to a text.
    pub fn set(&mut self, key: &str, value: impl Into<String>) {
        self.set_value(key, OptionValue::Text(value.into()));
    }

    /// Sets an option.
    pub fn set_value(&mut self, key: &str, value: OptionValue) {
        self.values.insert(key.to_owned(), value);
    }

    /// Sets options under `prefix.`: the reverse of [`take_nested`](Self::take_nested).
    pub fn set_nested(&mut self, prefix: &str, nested: Self) {
        let nested = nested.values.into_iter();
        self.values
            .extend(nested.map(|(key, value)| (format!("{prefix}.{key}"), value)));
    }

    /// Sets every option of `others`.
    pub fn set_all(&mut self, others: Self) {
        self.values.extend(others.values);
    }

    /// Adds what was parsed.
    fn add(&mut self, key: &str, value: OptionValue) -> Result<(), Error> {
        check_key(key)?;
        if self.values.insert(key.to_owned(), value).is_some() {
            return Err(Error::invalid(format!("option '{key}' is given twice")));
        }
        Ok(())
    }

    /// The text of an option, if given: `on` or `off` for a boolean, nothing for `null`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).and_then(OptionValue::as_text)
    }

    /// An option as it was given.
    pub fn value(&self, key: &str) -> Option<&OptionValue> {
        self.values.get(key)
    }

    /// Every option, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &OptionValue)> {
        let values = self.values.iter();
        values.map(|(key, value)| (key.as_str(), value))
    }

    /// Takes an option out. A `null` stays, for [`take_child`](Self::take_child) or to be refused.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let text = self.get(key)?.to_owned();
        self.values.remove(key);
        Some(text)
    }

    /// Takes an option out as it was given.
    pub fn take_value(&mut self, key: &str) -> Option<OptionValue> {
        self.values.remove(key)
    }

    /// Takes out what is said of child `name`: its node, its options or that it is not there. `None`
    /// if nothing is said.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`] if two of these are said; both are taken out.
    pub fn take_child(&mut self, name: &str) -> Result<Option<ChildOption>, Error> {
        let reference = self.take_value(name);
        let inline = self.take_nested(name);
        match reference {
            None if inline.is_empty() => Ok(None),
            None => Ok(Some(ChildOption::Inline(inline))),
            Some(_) if !inline.is_empty() => Err(Error::invalid(format!(
                "child '{name}' has options, and is named or ruled out as well"
            ))),
            Some(value) => Ok(Some(match value.as_text() {
                None | Some("") => ChildOption::Absent,
                Some(node) => ChildOption::Node(node.to_owned()),
            })),
        }
    }

    /// Takes out everything under `prefix.`, without the prefix.
    pub fn take_nested(&mut self, prefix: &str) -> Options {
        let mut nested = Self::default();
        self.values.retain(|key, value| {
            let inner = key
                .strip_prefix(prefix)
                .and_then(|rest| rest.strip_prefix('.'));
            if let Some(inner) = inner {
                let value = std::mem::replace(value, OptionValue::Null);
                nested.values.insert(inner.to_owned(), value);
            }
            inner.is_none()
        });
        nested
    }

    /// Whether nothing is given, or everything was taken.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Checks that every option is in one of `tables` and of its kind; `whose` is for the message.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`], naming the option and what there is instead.
    pub fn check(&self, tables: &[&[OptionSpec]], whose: &str) -> Result<(), Error> {
        for (key, value) in &self.values {
            let Some(spec) = find(tables, key) else {
                let known: Vec<_> = specs(tables).map(|spec| spec.name).collect();
                let known = match known.is_empty() {
                    true => "it takes none".to_owned(),
                    false => format!("it takes {}", known.join(", ")),
                };
                return Err(Error::invalid(format!(
                    "{whose} has no option '{key}'; {known}"
                )));
            };
            if let Err(takes) = check_value(spec.kind, value) {
                let given = value.as_text().unwrap_or("null");
                return Err(Error::invalid(format!(
                    "option '{key}' of {whose} takes {takes}, not '{given}'"
                )));
            }
        }
        for spec in specs(tables) {
            if spec.default.is_none() && !self.values.contains_key(spec.name) {
                return Err(Error::invalid(format!(
                    "{whose} needs option '{}' ({})",
                    spec.name, spec.help
                )));
            }
        }
        Ok(())
    }

    /// The same options, each in the kind that its table gives it: sizes are numbers of bytes. What is
    /// in no table, or does not fit, stays as it is.
    pub fn canonical(&self, tables: &[&[OptionSpec]]) -> Self {
        let values = self.values.iter().map(|(key, value)| {
            let value = match find(tables, key) {
                Some(spec) => value.of_kind(spec.kind),
                None => value.clone(),
            };
            (key.clone(), value)
        });
        Self {
            values: values.collect(),
        }
    }

    /// The keys of options that mean something else in `other`: what is left out is its default, and
    /// values are compared in the kind that their table gives them. In order.
    pub fn differences(&self, other: &Self, tables: &[&[OptionSpec]]) -> Vec<String> {
        let mut keys: Vec<&String> = self.values.keys().chain(other.values.keys()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.retain(|key| self.effective(key, tables) != other.effective(key, tables));
        keys.into_iter().cloned().collect()
    }

    /// What an option is, given or by default; `None` if neither.
    fn effective(&self, key: &str, tables: &[&[OptionSpec]]) -> Option<OptionValue> {
        let given = self.values.get(key);
        let Some(spec) = find(tables, key) else {
            return given.cloned();
        };
        let default = || Some(OptionValue::Text(spec.default?.to_owned()));
        let value = given.cloned().or_else(default)?;
        Some(value.of_kind(spec.kind))
    }

    /// Those options that decide what a guest reads: the tables' [`OptionSpec::changes_data`], those
    /// that only say the default excepted, and what is in no table.
    pub fn strong(&self, tables: &[&[OptionSpec]]) -> Self {
        let default = Self::default();
        let is_strong = |key: &str| match find(tables, key) {
            Some(spec) => {
                let said = self.effective(key, tables);
                spec.changes_data && said != default.effective(key, tables)
            }
            None => true,
        };
        let strong = self.values.iter().filter(|(key, _)| is_strong(key));
        Self {
            values: strong
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        }
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

fn specs<'t>(tables: &'t [&[OptionSpec]]) -> impl Iterator<Item = &'t OptionSpec> {
    tables.iter().flat_map(|table| table.iter())
}

fn find<'t>(tables: &'t [&[OptionSpec]], key: &str) -> Option<&'t OptionSpec> {
    specs(tables).find(|spec| spec.is_key(key))
}

/// Whether a value is one that an option of this kind takes; the error says what it takes.
fn check_value(kind: OptionKind, value: &OptionValue) -> Result<(), String> {
    let text = value.as_text();
    let (fits, takes) = match kind {
        // A flag where a name belongs is a mistake; a number may be meant as a name.
        OptionKind::Text => {
            let fits = text.is_some() && !matches!(value, OptionValue::Bool(_));
            (fits, "text".to_owned())
        }
        OptionKind::Bool => {
            let fits = text.and_then(parse_bool).is_some();
            (fits, "on or off".to_owned())
        }
        OptionKind::Size | OptionKind::Bytes => {
            let fits = text.and_then(parse_size).is_some();
            (fits, "a size in bytes, such as 10G".to_owned())
        }
        OptionKind::Int => {
            let fits = text.is_some_and(|text| text.parse::<i64>().is_ok());
            (fits, "a whole number".to_owned())
        }
        OptionKind::Choice(words) => {
            let fits = text.is_some_and(|text| words.contains(&text));
            (fits, format!("one of {}", words.join(", ")))
        }
    };
    if fits { Ok(()) } else { Err(takes) }
}

/// Whether a key is words of letters, digits, `-` and `_` with dots between.
fn check_key(key: &str) -> Result<(), Error> {
    let of_key = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let well_formed = |word: &str| !word.is_empty() && word.bytes().all(of_key);
    let short = key.len() <= MAX_KEY_BYTES && key.split('.').count() <= MAX_KEY_WORDS;
    if short && key.split('.').all(well_formed) {
        return Ok(());
    }
    let shown: String = key.chars().take(80).collect();
    Err(Error::invalid(format!(
        "'{}' is not an option's name",
        shown.escape_debug()
    )))
}

#[cfg(test)]
mod tests;
