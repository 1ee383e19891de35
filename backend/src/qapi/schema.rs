//! [`Schema`]: what `query-qmp-schema` answers, built by the types themselves.

use std::collections::BTreeMap;

use blockcore::driver::DriverType;
use serde_json::{Map, Value, json};

use super::Object;

/// A member of an object type.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// The name of its type.
    pub kind: String,
    /// Whether it may be left out.
    pub optional: bool,
}

/// The types, commands and events that were described so far. Names of types mean nothing: numbers, as
/// QEMU has them, so that nobody depends on them.
pub struct Schema {
    drivers: Vec<&'static DriverType>,
    names: BTreeMap<String, String>,
    entries: Vec<Map<String, Value>>,
    next: usize,
}

impl Schema {
    /// An empty schema, of nodes of these drivers.
    pub fn new(drivers: Vec<&'static DriverType>) -> Self {
        Self {
            drivers,
            names: BTreeMap::new(),
            entries: Vec::new(),
            next: 0,
        }
    }

    /// The drivers that nodes can have.
    pub fn drivers(&self) -> Vec<&'static DriverType> {
        self.drivers.clone()
    }

    /// A type of JSON's own, called `name`.
    pub fn builtin(&mut self, name: &str, json_type: &str) -> String {
        if self
            .names
            .insert(name.to_owned(), name.to_owned())
            .is_none()
        {
            self.add(name, "builtin", json!({"json-type": json_type}));
        }
        name.to_owned()
    }

    /// Lists of `element`.
    pub fn array(&mut self, element: &str) -> String {
        let name = format!("[{element}]");
        if self.names.insert(name.clone(), name.clone()).is_none() {
            self.add(&name, "array", json!({"element-type": element}));
        }
        name
    }

    /// One of these words, in their order. `key` is a name that no other type has.
    pub fn choice(&mut self, key: &str, words: &[&str]) -> String {
        let members: Vec<_> = words.iter().map(|word| json!({"name": word})).collect();
        let of_enum = json!({"members": members, "values": words});
        self.define(key, "enum", |_| of_enum)
    }

    /// An object type. `key` is a name that no other type has.
    pub fn object<T: Object>(&mut self, key: &str) -> String {
        self.define(
            key,
            "object",
            |schema| json!({"members": members(&T::list(schema))}),
        )
    }

    /// An object with these members.
    pub fn object_of(&mut self, key: &str, list: impl FnOnce(&mut Self) -> Vec<Member>) -> String {
        self.define(
            key,
            "object",
            |schema| json!({"members": members(&list(schema))}),
        )
    }

    /// An object whose member `tag` says which further members there are. `parts` gives the members that
    /// there always are, and for each word of the tag the type that has the others.
    pub fn union(
        &mut self,
        key: &str,
        tag: &str,
        parts: impl FnOnce(&mut Self) -> (Vec<Member>, Vec<(String, String)>),
    ) -> String {
        self.define(key, "object", |schema| {
            let (base, variants) = parts(schema);
            let variants: Vec<_> = variants
                .iter()
                .map(|(case, kind)| json!({"case": case, "type": kind}))
                .collect();
            json!({"tag": tag, "members": members(&base), "variants": variants})
        })
    }

    /// A value of one of several types, told apart by what JSON has there.
    pub fn alternate(&mut self, key: &str, types: impl FnOnce(&mut Self) -> Vec<String>) -> String {
        self.define(key, "alternate", |schema| {
            let types = types(schema);
            let members: Vec<_> = types.iter().map(|kind| json!({"type": kind})).collect();
            json!({"members": members})
        })
    }

    /// A command, with the names of the types of its arguments and its reply.
    pub fn command(&mut self, name: &str, arguments: &str, reply: &str) {
        self.add(
            name,
            "command",
            json!({"arg-type": arguments, "ret-type": reply}),
        );
        self.mark_unstable(name);
    }

    /// An event, with the name of the type of its data.
    pub fn event(&mut self, name: &str, data: &str) {
        self.add(name, "event", json!({"arg-type": data}));
    }

    /// All of it.
    pub fn into_value(self) -> Value {
        Value::Array(self.entries.into_iter().map(Value::Object).collect())
    }

    fn define(&mut self, key: &str, meta: &str, make: impl FnOnce(&mut Self) -> Value) -> String {
        if let Some(name) = self.names.get(key) {
            return name.clone();
        }
        let name = self.next.to_string();
        self.next += 1;
        // Before it is made: it may contain itself.
        self.names.insert(key.to_owned(), name.clone());
        let entry = make(self);
        self.add(&name, meta, entry);
        name
    }

    fn add(&mut self, name: &str, meta: &str, entry: Value) {
        let Value::Object(mut entry) = entry else {
            unreachable!("an entry is an object");
        };
        entry.insert("name".into(), name.into());
        entry.insert("meta-type".into(), meta.into());
        self.entries.push(entry);
    }

    /// What begins with `x-` may change, by a rule of QEMU's names.
    fn mark_unstable(&mut self, name: &str) {
        if let Some(entry) = self.entries.last_mut().filter(|_| is_unstable(name)) {
            entry.insert("features".into(), json!(["unstable"]));
        }
    }
}

fn is_unstable(name: &str) -> bool {
    name.starts_with("x-")
}

fn members(list: &[Member]) -> Vec<Value> {
    let member = |member: &Member| {
        let mut entry = json!({"name": member.name, "type": member.kind});
        if member.optional {
            entry["default"] = Value::Null;
        }
        if is_unstable(&member.name) {
            entry["features"] = json!(["unstable"]);
        }
        entry
    };
    list.iter().map(member).collect()
}
