//! [`NodeOptions`]: how a block node is described, from the drivers' own tables.
//!
//! Dotted names of a table are members of objects inside (`cache.direct`), `*` is an element of a list,
//! and children are either the name of a node or its options.

use blockcore::driver::DriverType;
use blockcore::graph::{NODE_OPTIONS, typed_options};
use blockcore::options::{OptionKind, OptionSpec, Options};
use serde_json::Value;

use super::{Input, Member, Place, Qapi, QmpError, Schema};

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
        let options = Options::from_schema_json(input.value)?;
        let prefix = match input.place {
            Place::Root => String::new(),
            place => format!("{}.", place.full()),
        };
        let typed = typed_options(input.drivers, options, input.form, &prefix)?;
        Ok(Self(typed))
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

/// A part of what options are like.
#[derive(Default)]
pub(super) struct Part {
    /// What a value there is, if there can be one.
    value: Option<&'static OptionSpec>,
    /// What is inside, by name; `*` for the elements of a list. In the table's order.
    inner: Vec<(&'static str, Part)>,
}

impl Part {
    pub(super) fn of_table(table: impl IntoIterator<Item = &'static OptionSpec>) -> Self {
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

    pub(super) fn members(&self, schema: &mut Schema, key: &str) -> Vec<Member> {
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
            (Some(spec), Some(element)) => schema.alternate(key, |schema| {
                let element = element.describe(schema, &format!("{key}.*"));
                vec![schema.array(&element), value(schema, spec)]
            }),
            (Some(spec), None) => schema.alternate(key, |schema| {
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

fn describe_value(schema: &mut Schema, kind: OptionKind) -> String {
    match kind {
        OptionKind::Text => String::describe(schema),
        OptionKind::Bool => bool::describe(schema),
        OptionKind::Size => u64::describe(schema),
        OptionKind::Choice(words) => schema.choice(&format!("one of {}", words.join(" ")), words),
        _ => i64::describe(schema),
    }
}
