//! [`Commands`]: every command by its name, with the types of its arguments and its reply.
//!
//! Arguments are read on the monitor's thread; what they ask for runs on the control thread.

use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;

use blockcore::driver::DriverType;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use serde_json::{Map, Value};

use super::Service;
use super::event::Event;
use crate::qapi::{self, Form, Input, Object, Qapi, QmpError, Schema};

/// What a command came to.
pub(super) type Outcome = Result<Value, QmpError>;

/// A command with its arguments, ready to run on the control thread.
pub(super) type Work = Box<dyn FnOnce(Rc<Service>) -> LocalBoxFuture<'static, Outcome> + Send>;

type Prepare = Box<dyn Fn(Input<'_>) -> Result<Work, QmpError> + Send + Sync>;
type Describe = Box<dyn Fn(&mut Schema) -> (String, String) + Send + Sync>;

struct Command {
    prepare: Prepare,
    describe: Describe,
}

/// See the module's header.
pub struct Commands {
    drivers: Vec<&'static DriverType>,
    commands: BTreeMap<&'static str, Command>,
}

impl Commands {
    /// No commands yet; nodes are of these drivers.
    pub fn new(drivers: Vec<&'static DriverType>) -> Self {
        Self {
            drivers,
            commands: BTreeMap::new(),
        }
    }

    /// Adds a command.
    ///
    /// # Panics
    ///
    /// If there is one of that name.
    pub fn add<A, R, F, W>(&mut self, name: &'static str, run: F)
    where
        A: Qapi + Send + 'static,
        R: Qapi + 'static,
        F: Fn(Rc<Service>, A) -> W + Copy + Send + Sync + 'static,
        W: Future<Output = Result<R, QmpError>> + 'static,
    {
        let prepare: Prepare = Box::new(move |input| {
            let arguments: A = input.parse()?;
            let work: Work = Box::new(move |service| {
                async move {
                    let reply = run(service, arguments).await?;
                    Ok(reply.emit().unwrap_or_else(|| Value::Object(Map::new())))
                }
                .boxed_local()
            });
            Ok(work)
        });
        let describe: Describe = Box::new(|schema| (A::describe(schema), R::describe(schema)));
        let earlier = self.commands.insert(name, Command { prepare, describe });
        assert!(earlier.is_none(), "two commands '{name}'");
    }

    /// The drivers that nodes can have.
    pub fn drivers(&self) -> &[&'static DriverType] {
        &self.drivers
    }

    /// Every command's name, in order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.commands.keys().copied()
    }

    /// Reads a command's arguments; `None` if there is no such command.
    pub(super) fn prepare(&self, name: &str, arguments: &Value) -> Option<Result<Work, QmpError>> {
        let command = self.commands.get(name)?;
        let input = Input::new(arguments, Form::Json, &self.drivers);
        Some((command.prepare)(input))
    }

    /// All commands and events, with their types.
    pub fn schema(&self) -> Value {
        let mut schema = Schema::new(self.drivers.clone());
        for (name, command) in &self.commands {
            let (arguments, reply) = (command.describe)(&mut schema);
            schema.command(name, &arguments, &reply);
        }
        Event::describe_all(&mut schema);
        schema.into_value()
    }

    /// Reads what an option says as a command's arguments.
    ///
    /// # Errors
    ///
    /// What is wrong with it first.
    pub fn parse_option<A: Object>(&self, value: &Value, form: Form) -> Result<A, QmpError> {
        qapi::parse_object(Input::new(value, form, &self.drivers))
    }
}
