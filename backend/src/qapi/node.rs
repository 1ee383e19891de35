//! [`NodeOptions`]: how a block node is described, from the drivers' own tables.
//!
//! Dotted names of a table are members of objects inside (`cache.direct`), `*` is an element of a list,
//! and children are either the name of a node or its options.

use blockcore::driver::DriverType;
use blockcore::graph::NODE_OPTIONS;
use blockcore::options::{OptionKind, OptionSpec, Options};
use serde_json::Value;

use super::{Input, Member, Members, Place, Qapi, QmpError, Schema};

/// A node's options, each of the type that the driver's table gives it.
#[derive(Clone, Debug)]
pub struct NodeOptions(pub Options);

/// The name of the union of all drivers' options.
const KEY: &str = "BlockdevOptions";
/// A child: a node's name, or its options.
const REFERENCE: &str = "BlockdevRef";
/// As that, or none.
const REFERENCE_OR_NULL: &str = "BlockdevRefOrNull";

impl Qapi for NodeOptions {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        check_node(&input)?;
        let options = Options::from_json(input.value)?;
        Ok(Self(options))
    }

    fn emit(&self) -> Option<Value> {
        None
    }

    fn describe(schema: &mut Schema) -> String {
        schema.union(KEY, "driver", |schema| {
            let drivers = schema.drivers();
            let words: Vec<_> = drivers.iter().map(|kind| kind.name).collect();
            let tag = Member {
                name: "driver".to_owned(),
                kind: schema.choice("BlockdevDriver", &words),
                optional: false,
            };
            let common = Part::of_table(NODE_OPTIONS.iter().skip(1));
            let mut base = vec![tag];
            base.extend(common.members(schema, "BlockdevOptions"));
            let cases = drivers
                .iter()
                .map(|kind| (kind.name.to_owned(), describe_driver(schema, kind)))
                .collect();
            (base, cases)
        })
    }
}

/// What a driver takes besides what all nodes do.
fn describe_driver(schema: &mut Schema, kind: &DriverType) -> String {
    let key = format!("BlockdevOptions:{}", kind.name);
    schema.object_of(&key, |schema| {
        let children = kind.children.iter().map(|child| {
            let key = match is_detachable(child.name) {
                true => REFERENCE_OR_NULL,
                false => REFERENCE,
            };
            Member {
                name: child.name.to_owned(),
                kind: describe_reference(schema, key),
                optional: child.optional,
            }
        });
        let mut members: Vec<_> = children.collect();
        members.extend(Part::of_table(kind.options).members(schema, &key));
        members
    })
}

fn describe_reference(schema: &mut Schema, key: &str) -> String {
    schema.alternate(key, |schema| {
        let mut types = vec![NodeOptions::describe(schema), String::describe(schema)];
        if key == REFERENCE_OR_NULL {
            types.push(schema.builtin("null", "null"));
        }
        types
    })
}

/// Whether a child can be ruled out by `null`: only backing nodes, which images ask for by themselves.
fn is_detachable(child: &str) -> bool {
    child == "backing"
}

fn check_node(input: &Input<'_>) -> Result<(), QmpError> {
    let mut members = input.members()?;
    let driver: String = members.take("driver")?;
    let kind = input.drivers.iter().find(|kind| kind.name == driver);
    let Some(kind) = kind else {
        let sentence = format!("Parameter 'driver' does not accept value '{driver}'");
        return Err(QmpError::generic(sentence));
    };
    Part::of_table(NODE_OPTIONS.iter().skip(1)).check_members(&mut members)?;
    for child in kind.children {
        let place = Place::Member(&input.place, child.name);
        match members.raw(child.name) {
            Some(value) => check_child(
                &Input {
                    value,
                    place,
                    ..*input
                },
                is_detachable(child.name),
            )?,
            None if child.optional => {}
            None => {
                let sentence = format!("Parameter '{}' is missing", place.full());
                return Err(QmpError::generic(sentence));
            }
        }
    }
    Part::of_table(kind.options).check_members(&mut members)?;
    members.end()
}

fn check_child(input: &Input<'_>, detachable: bool) -> Result<(), QmpError> {
    match input.value {
        Value::String(_) => Ok(()),
        Value::Null if detachable => Ok(()),
        Value::Object(_) => check_node(input),
        _ => Err(input.wrong_type(match detachable {
            true => REFERENCE_OR_NULL,
            false => REFERENCE,
        })),
    }
}

/// A part of what options are like.
#[derive(Default)]
struct Part {
    /// What a value there is, if there can be one.
    value: Option<&'static OptionSpec>,
    /// What is inside, by name; `*` for the elements of a list. In the table's order.
    inner: Vec<(&'static str, Part)>,
}

impl Part {
    fn of_table(table: impl IntoIterator<Item = &'static OptionSpec>) -> Self {
        let mut root = Self::default();
        for spec in table {
            let mut part = &mut root;
            for word in spec.name.split('.') {
                let at = part.inner.iter().position(|(name, _)| *name == word);
                let at = at.unwrap_or_else(|| {
                    part.inner.push((word, Self::default()));
                    part.inner.len() - 1
                });
                part = &mut part.inner[at].1;
            }
            part.value = Some(spec);
        }
        root
    }

    fn element(&self) -> Option<&Self> {
        let first = self.inner.first();
        first.filter(|(name, _)| *name == "*").map(|(_, part)| part)
    }

    /// Whether nothing has to be given.
    fn is_optional(&self) -> bool {
        match self.value {
            Some(spec) => spec.default.is_some(),
            None => self.inner.iter().all(|(_, part)| part.is_optional()),
        }
    }

    fn check_members(&self, members: &mut Members<'_>) -> Result<(), QmpError> {
        for &(name, ref part) in &self.inner {
            let place = Place::Member(&members.input.place, name);
            let input = *members.input;
            match members.raw(name) {
                Some(value) => part.check(&Input {
                    value,
                    place,
                    ..input
                })?,
                None if part.is_optional() => {}
                None => {
                    let sentence = format!("Parameter '{}' is missing", place.full());
                    return Err(QmpError::generic(sentence));
                }
            }
        }
        Ok(())
    }

    fn check(&self, input: &Input<'_>) -> Result<(), QmpError> {
        if let Some(spec) = self.value
            && (self.inner.is_empty() || !input.value.is_object())
        {
            return check_value(spec.kind, input);
        }
        if let Some(element) = self.element() {
            let Value::Array(list) = input.value else {
                return Err(input.wrong_type("array"));
            };
            for (index, value) in list.iter().enumerate() {
                element.check(&Input {
                    value,
                    place: Place::Element(&input.place, index),
                    ..*input
                })?;
            }
            return Ok(());
        }
        let mut members = input.members()?;
        self.check_members(&mut members)?;
        members.end()
    }

    fn members(&self, schema: &mut Schema, key: &str) -> Vec<Member> {
        let inner = self.inner.iter();
        inner
            .map(|(name, part)| Member {
                name: (*name).to_owned(),
                kind: part.describe(schema, &format!("{key}.{name}")),
                optional: part.is_optional(),
            })
            .collect()
    }

    fn describe(&self, schema: &mut Schema, key: &str) -> String {
        let value = |schema: &mut Schema, spec: &OptionSpec| describe_value(schema, spec.kind);
        match (self.value, self.element()) {
            (Some(spec), _) if self.inner.is_empty() => value(schema, spec),
            (Some(spec), _) => schema.alternate(key, |schema| {
                let inside =
                    schema.object_of(&format!("{key}:object"), |schema| self.members(schema, key));
                vec![inside, value(schema, spec)]
            }),
            (None, Some(element)) => {
                let element = element.describe(schema, &format!("{key}.*"));
                schema.array(&element)
            }
            (None, None) => schema.object_of(key, |schema| self.members(schema, key)),
        }
    }
}

fn check_value(kind: OptionKind, input: &Input<'_>) -> Result<(), QmpError> {
    match kind {
        OptionKind::Text => String::parse(*input).map(drop),
        OptionKind::Bool => bool::parse(*input).map(drop),
        OptionKind::Choice(words) => {
            let word = String::parse(*input)?;
            match words.contains(&word.as_str()) {
                true => Ok(()),
                false => Err(input.not_accepted(&word)),
            }
        }
        // Of whatever unit: a whole number, whose bounds the driver knows.
        _ => match i64::parse(*input) {
            Ok(_) => Ok(()),
            Err(_) => u64::parse(*input).map(drop),
        },
    }
}

fn describe_value(schema: &mut Schema, kind: OptionKind) -> String {
    match kind {
        OptionKind::Text => String::describe(schema),
        OptionKind::Bool => bool::describe(schema),
        OptionKind::Choice(words) => schema.choice(&format!("one of {}", words.join(" ")), words),
        _ => i64::describe(schema),
    }
}
