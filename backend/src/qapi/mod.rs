//! The types of control commands, in QEMU's schema language: described once, as Rust types.
//!
//! A type of [`Qapi`] parses itself from JSON with the refusals that clients of QEMU know, writes itself as
//! JSON, and describes itself to [`Schema`], so that `query-qmp-schema` cannot say anything else than
//! what is parsed. [`qapi_struct!`](crate::qapi_struct), [`qapi_enum!`](crate::qapi_enum) and
//! [`qapi_union!`](crate::qapi_union) make such types; those of block nodes follow from the drivers' tables
//! ([`node`]). Pure.
//!
//! A value comes in one of two forms ([`Form`]): JSON, in which each value has its type, and
//! `key=value`, in which all are text that stands for its type.

mod error;
pub mod export;
mod macros;
pub mod node;
mod schema;
#[cfg(test)]
mod tests;

use blockcore::driver::DriverType;
pub use blockcore::options::Form;
use blockcore::options::parse_bool;
use serde_json::{Map, Value};

pub use self::error::{ErrorClass, QmpError};
pub use self::schema::{Member, Schema};

/// Where a value stands, for messages: `options[0].cache.direct`.
#[derive(Clone, Copy)]
enum Place<'a> {
    Root,
    Member(&'a Place<'a>, &'a str),
    Element(&'a Place<'a>, usize),
}

impl Place<'_> {
    fn full(&self) -> String {
        match self {
            Place::Root => String::new(),
            Place::Member(Place::Root, name) => (*name).to_owned(),
            Place::Member(above, name) => format!("{}.{name}", above.full()),
            Place::Element(above, index) => format!("{}[{index}]", above.full()),
        }
    }

    /// The member's own name; an element of a list has none, which QEMU says as `null`.
    fn last(&self) -> &str {
        match self {
            Place::Member(_, name) => name,
            Place::Root | Place::Element(..) => "null",
        }
    }
}

/// A value to be parsed.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    value: &'a Value,
    place: Place<'a>,
    form: Form,
    drivers: &'a [&'static DriverType],
}

impl<'a> Input<'a> {
    /// A value that stands in nothing else; nodes in it are of these drivers.
    pub fn new(value: &'a Value, form: Form, drivers: &'a [&'static DriverType]) -> Self {
        Self {
            value,
            place: Place::Root,
            form,
            drivers,
        }
    }

    /// The value.
    pub fn value(&self) -> &'a Value {
        self.value
    }

    /// Parses the value as a whole.
    ///
    /// # Errors
    ///
    /// What is wrong with it first.
    pub fn parse<T: Qapi>(self) -> Result<T, QmpError> {
        T::parse(self)
    }

    /// The value is of another type than `expected`.
    pub fn wrong_type(&self, expected: &str) -> QmpError {
        let name = match self.place {
            Place::Root => "null".to_owned(),
            place => place.full(),
        };
        QmpError::generic(format!(
            "Invalid parameter type for '{name}', expected: {expected}"
        ))
    }

    /// As [`wrong_type`](Self::wrong_type), of a value that may be of several types; QEMU says the place
    /// another way then.
    pub fn wrong_alternate(&self, expected: &str) -> QmpError {
        let name = self.place.last();
        QmpError::generic(format!(
            "Invalid parameter type for '{name}', expected: {expected}"
        ))
    }

    /// The value is none of those that are possible.
    pub fn not_accepted(&self, value: &str) -> QmpError {
        let name = self.place.last();
        QmpError::generic(format!(
            "Parameter '{name}' does not accept value '{value}'"
        ))
    }

    /// The value is text that stands for something of another type.
    fn expects(&self, what: &str) -> QmpError {
        let name = self.place.full();
        QmpError::generic(format!("Parameter '{name}' expects {what}"))
    }

    fn text(&self) -> Option<&'a str> {
        self.value.as_str()
    }

    /// The members of the value.
    ///
    /// # Errors
    ///
    /// It is no object.
    pub fn members(&'a self) -> Result<Members<'a>, QmpError> {
        match self.value {
            Value::Object(map) => Ok(Members {
                input: self,
                map,
                used: Vec::new(),
            }),
            _ => Err(self.wrong_type("object")),
        }
    }
}

/// The members of an object that is parsed: each is taken once, and none may be left.
pub struct Members<'a> {
    input: &'a Input<'a>,
    map: &'a Map<String, Value>,
    used: Vec<&'a str>,
}

impl<'a> Members<'a> {
    /// Takes a member.
    ///
    /// # Errors
    ///
    /// It is missing and has to be there, or cannot be what it is.
    pub fn take<T: Qapi>(&mut self, name: &'a str) -> Result<T, QmpError> {
        let place = Place::Member(&self.input.place, name);
        match self.raw(name) {
            Some(value) => T::parse(Input {
                value,
                place,
                ..*self.input
            }),
            None => T::absent().ok_or_else(|| {
                let name = place.full();
                QmpError::generic(format!("Parameter '{name}' is missing"))
            }),
        }
    }

    /// Takes a member as it is.
    fn raw(&mut self, name: &'a str) -> Option<&'a Value> {
        let value = self.map.get(name)?;
        self.used.push(name);
        Some(value)
    }

    /// Refuses what was not taken.
    ///
    /// # Errors
    ///
    /// The first member that was not taken.
    pub fn end(self) -> Result<(), QmpError> {
        let unknown = self
            .map
            .keys()
            .find(|key| !self.used.contains(&key.as_str()));
        match unknown {
            Some(name) => {
                let name = Place::Member(&self.input.place, name).full();
                Err(QmpError::generic(format!(
                    "Parameter '{name}' is unexpected"
                )))
            }
            None => Ok(()),
        }
    }
}

/// A type of the schema.
pub trait Qapi: Sized {
    /// Reads a value.
    ///
    /// # Errors
    ///
    /// What is wrong with it first.
    fn parse(input: Input<'_>) -> Result<Self, QmpError>;

    /// What a member that is not there stands for; `None` if it has to be.
    fn absent() -> Option<Self> {
        None
    }

    /// Writes it; `None` for a member that is left out.
    fn emit(&self) -> Option<Value>;

    /// Describes the type; returns its name there.
    fn describe(schema: &mut Schema) -> String;
}

/// A type that is an object, whose members may also stand in another.
pub trait Object: Qapi {
    /// Takes its members.
    ///
    /// # Errors
    ///
    /// The first that is missing or wrong.
    fn take(members: &mut Members<'_>) -> Result<Self, QmpError>;

    /// Adds its members.
    fn put(&self, map: &mut Map<String, Value>);

    /// Its members.
    fn list(schema: &mut Schema) -> Vec<Member>;
}

/// Reads an object and refuses what is left of it.
///
/// # Errors
///
/// As [`Object::take`] and [`Members::end`].
pub fn parse_object<T: Object>(input: Input<'_>) -> Result<T, QmpError> {
    let mut members = input.members()?;
    let value = T::take(&mut members)?;
    members.end()?;
    Ok(value)
}

/// Writes an object.
pub fn emit_object<T: Object>(object: &T) -> Value {
    let mut map = Map::new();
    object.put(&mut map);
    Value::Object(map)
}

impl Qapi for String {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        let text = input.text().ok_or_else(|| input.wrong_type("string"))?;
        Ok(text.to_owned())
    }

    fn emit(&self) -> Option<Value> {
        Some(Value::String(self.clone()))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.builtin("str", "string")
    }
}

/// A string, or `null` for none.
#[derive(Clone, Debug)]
pub struct StrOrNull(pub Option<String>);

impl Qapi for StrOrNull {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        match (input.value, input.text()) {
            (Value::Null, _) => Ok(Self(None)),
            (_, Some(text)) => Ok(Self(Some(text.to_owned()))),
            (_, None) => Err(input.wrong_type("StrOrNull")),
        }
    }

    fn emit(&self) -> Option<Value> {
        Some(self.0.clone().map_or(Value::Null, Value::String))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.alternate("StrOrNull", |schema| {
            vec![String::describe(schema), schema.builtin("null", "null")]
        })
    }
}

impl Qapi for bool {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        match (input.form, input.value) {
            (Form::Json, Value::Bool(value)) => Ok(*value),
            (Form::KeyValue, Value::String(text)) => {
                parse_bool(text).ok_or_else(|| input.expects("'on' or 'off'"))
            }
            _ => Err(input.wrong_type("boolean")),
        }
    }

    fn emit(&self) -> Option<Value> {
        Some(Value::Bool(*self))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.builtin("bool", "boolean")
    }
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Qapi for $type {
            fn parse(input: Input<'_>) -> Result<Self, QmpError> {
                let number = match (input.form, input.value) {
                    (Form::Json, Value::Number(number)) => {
                        let small = number.as_i64().and_then(|n| Self::try_from(n).ok());
                        small.or_else(|| number.as_u64().and_then(|n| Self::try_from(n).ok()))
                    }
                    (Form::KeyValue, Value::String(text)) => {
                        let number = text.parse().ok();
                        return number.ok_or_else(|| input.expects("integer"));
                    }
                    _ => None,
                };
                number.ok_or_else(|| input.wrong_type("integer"))
            }

            fn emit(&self) -> Option<Value> {
                Some(Value::from(*self))
            }

            fn describe(schema: &mut Schema) -> String {
                schema.builtin("int", "int")
            }
        }
    )*};
}

integers!(i64, u64);

impl Qapi for f64 {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        let number = match (input.form, input.value) {
            (Form::Json, value) => value.as_f64(),
            (Form::KeyValue, value) => value.as_str().and_then(|text| text.parse().ok()),
        };
        number.ok_or_else(|| input.wrong_type("number"))
    }

    fn emit(&self) -> Option<Value> {
        Some(Value::from(*self))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.builtin("number", "number")
    }
}

/// Anything.
impl Qapi for Value {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        Ok(input.value.clone())
    }

    fn emit(&self) -> Option<Value> {
        Some(self.clone())
    }

    fn describe(schema: &mut Schema) -> String {
        schema.builtin("any", "value")
    }
}

/// An object without members.
impl Qapi for () {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        parse_object(input)
    }

    fn emit(&self) -> Option<Value> {
        Some(emit_object(self))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.object::<Self>("()")
    }
}

impl Object for () {
    fn take(_: &mut Members<'_>) -> Result<Self, QmpError> {
        Ok(())
    }

    fn put(&self, _: &mut Map<String, Value>) {}

    fn list(_: &mut Schema) -> Vec<Member> {
        Vec::new()
    }
}

impl<T: Qapi> Qapi for Option<T> {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        T::parse(input).map(Some)
    }

    fn absent() -> Option<Self> {
        Some(None)
    }

    fn emit(&self) -> Option<Value> {
        self.as_ref().and_then(T::emit)
    }

    fn describe(schema: &mut Schema) -> String {
        T::describe(schema)
    }
}

impl<T: Qapi> Qapi for Box<T> {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        T::parse(input).map(Self::new)
    }

    fn emit(&self) -> Option<Value> {
        T::emit(self)
    }

    fn describe(schema: &mut Schema) -> String {
        T::describe(schema)
    }
}

impl<T: Qapi> Qapi for Vec<T> {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        let Value::Array(list) = input.value else {
            return Err(input.wrong_type("array"));
        };
        let parse = |(index, value)| {
            T::parse(Input {
                value,
                place: Place::Element(&input.place, index),
                ..input
            })
        };
        list.iter().enumerate().map(parse).collect()
    }

    fn emit(&self) -> Option<Value> {
        Some(Value::Array(self.iter().filter_map(T::emit).collect()))
    }

    fn describe(schema: &mut Schema) -> String {
        let element = T::describe(schema);
        schema.array(&element)
    }
}
