//! Options as JSON, read and written.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserializer;
use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{MAX_KEY_WORDS, OptionValue, Options};
use crate::Error;

impl Options {
    /// Flattens a JSON object: nested objects give dotted keys, arrays `.0`, `.1` and so on.
    ///
    /// # Errors
    ///
    /// [`crate::ErrorKind::Invalid`] for anything but an object, a key that is none or is said twice,
    /// a number with a fraction, an empty object or array, and too deep nesting.
    pub fn from_json(value: &Value) -> Result<Self, Error> {
        let mut options = Self::default();
        flatten(value, Keys::Paths, &mut options).map_err(unreadable)?;
        Ok(options)
    }

    /// As [`from_json`](Self::from_json), as options in QEMU's schema are: each key is one name, and stands for
    /// itself.
    ///
    /// # Errors
    ///
    /// As there, and for a key with a dot or one that begins with a digit.
    pub fn from_schema_json(value: &Value) -> Result<Self, Error> {
        let mut options = Self::default();
        flatten(value, Keys::Names, &mut options).map_err(unreadable)?;
        Ok(options)
    }

    /// As [`from_json`](Self::from_json), from text.
    ///
    /// # Errors
    ///
    /// Also what is wrong with the text, and where.
    pub fn parse_json(text: &str) -> Result<Self, Error> {
        let mut options = Self::default();
        let mut reader = serde_json::Deserializer::from_str(text);
        flatten(&mut reader, Keys::Paths, &mut options)
            .and_then(|()| reader.end())
            .map_err(unreadable)?;
        Ok(options)
    }

    /// The options as a JSON object: [`from_json`](Self::from_json) gives them back. Keys that count
    /// from 0 make an array. Each value has the kind that it was given in: see
    /// [`canonical`](Self::canonical).
    pub fn to_json(&self) -> Value {
        let values = self.iter().map(|(key, value)| {
            let value = match value {
                OptionValue::Text(text) => Value::String(text.clone()),
                OptionValue::Bool(on) => Value::Bool(*on),
                OptionValue::Number(digits) => match digits.parse() {
                    Ok(number) => Value::Number(number),
                    Err(_) => Value::String(digits.clone()),
                },
                OptionValue::Null => Value::Null,
            };
            (key, value)
        });
        Value::Object(nest(values.collect()))
    }
}

/// What a key of an object is.
#[derive(Clone, Copy)]
enum Keys {
    /// Perhaps several, with dots between, or a place in a list.
    Paths,
    /// A name that stands for itself.
    Names,
}

impl Keys {
    fn check(self, word: &str) -> Result<(), Error> {
        let is_name = || !word.contains('.') && !word.starts_with(|l: char| l.is_ascii_digit());
        match self {
            Self::Names if !is_name() => {
                let shown: String = word.chars().take(80).collect();
                let text = format!("Parameter '{}' is unexpected", shown.escape_debug());
                Err(Error::invalid(text))
            }
            _ => super::check_key(word),
        }
    }
}

fn unreadable(error: serde_json::Error) -> Error {
    Error::invalid(format!("options in JSON cannot be read: {error}"))
}

fn flatten<'de, D: Deserializer<'de>>(
    from: D,
    keys: Keys,
    options: &mut Options,
) -> Result<(), D::Error> {
    let root = Flat {
        key: String::new(),
        depth: 0,
        keys,
        options,
    };
    root.deserialize(from)
}

/// Reads a value straight into options, so that a key which is said twice is seen: a map of JSON's
/// would keep the last.
struct Flat<'a> {
    /// Of the value, empty for the object as a whole.
    key: String,
    depth: usize,
    keys: Keys,
    options: &'a mut Options,
}

impl Flat<'_> {
    /// A value below this one.
    fn inner(&mut self, word: &str) -> Flat<'_> {
        let key = match self.key.as_str() {
            "" => word.to_owned(),
            key => format!("{key}.{word}"),
        };
        Flat {
            key,
            depth: self.depth + 1,
            keys: self.keys,
            options: self.options,
        }
    }

    fn add<E: de::Error>(self, value: OptionValue) -> Result<(), E> {
        if self.depth == 0 {
            return Err(E::custom("options are an object, in braces"));
        }
        self.options.add(&self.key, value).map_err(E::custom)
    }

    /// Before and after the values below this one: whether there may be any, and were.
    fn check_depth<E: de::Error>(&self) -> Result<(), E> {
        if self.depth >= MAX_KEY_WORDS {
            return Err(E::custom(format!("more than {MAX_KEY_WORDS} levels")));
        }
        Ok(())
    }

    fn check_members<E: de::Error>(&self, count: usize) -> Result<(), E> {
        if count == 0 && self.depth > 0 {
            return Err(E::custom(format!("option '{}' is empty", self.key)));
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Flat<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Flat<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("options")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        self.add(OptionValue::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        self.add(OptionValue::Number(value.to_string()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        self.add(OptionValue::Number(value.to_string()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        if matches!(self.keys, Keys::Names) {
            // No option takes it: whoever looks for its type says so, and where it stands.
            return self.add(OptionValue::Number(format!("{value:?}")));
        }
        Err(E::custom(format!(
            "option '{}' is {value}, and no option takes a fraction or a number beyond 64 bits",
            self.key
        )))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        self.add(OptionValue::Text(value.to_owned()))
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.add(OptionValue::Null)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        self.check_depth()?;
        let mut count = 0;
        while let Some(word) = map.next_key::<String>()? {
            self.keys.check(&word).map_err(de::Error::custom)?;
            map.next_value_seed(self.inner(&word))?;
            count += 1;
        }
        self.check_members(count)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        if self.depth == 0 {
            return self.add(OptionValue::Null);
        }
        self.check_depth()?;
        let mut count = 0;
        while list
            .next_element_seed(self.inner(&count.to_string()))?
            .is_some()
        {
            count += 1;
        }
        self.check_members(count)
    }
}

/// The reverse of flattening.
fn nest(values: Vec<(&str, Value)>) -> Map<String, Value> {
    let mut groups: BTreeMap<&str, Vec<(&str, Value)>> = BTreeMap::new();
    for (key, value) in values {
        let (word, rest) = key.split_once('.').unwrap_or((key, ""));
        groups.entry(word).or_default().push((rest, value));
    }
    let mut map = Map::new();
    for (word, group) in groups {
        if group.iter().all(|(rest, _)| !rest.is_empty()) {
            map.insert(word.to_owned(), list_or_object(nest(group)));
            continue;
        }
        // A value, and perhaps others under its key, for which only a dotted key is left.
        for (rest, value) in group {
            let key = match rest {
                "" => word.to_owned(),
                rest => format!("{word}.{rest}"),
            };
            map.insert(key, value);
        }
    }
    map
}

fn list_or_object(mut map: Map<String, Value>) -> Value {
    let numbers = || (0..map.len()).map(|number| number.to_string());
    if !numbers().all(|number| map.contains_key(&number)) {
        return Value::Object(map);
    }
    let numbers: Vec<_> = numbers().collect();
    let values = numbers.iter().filter_map(|number| map.remove(number));
    Value::Array(values.collect())
}
