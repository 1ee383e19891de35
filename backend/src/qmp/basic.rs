//! Commands about the protocol itself, and the daemon's end.

use std::rc::Rc;

use serde_json::Value;

use super::Service;
use super::command::Commands;
use super::session::{QmpCapabilities, version};
use crate::qapi::{Qapi, QmpError, Schema};
use crate::qapi_struct;

qapi_struct! {
    /// A version in three numbers.
    pub struct VersionTriple {
        /// The first.
        major: i64 = "major",
        /// The second.
        minor: i64 = "minor",
        /// The third.
        micro: i64 = "micro",
    }
}

qapi_struct! {
    /// What this is.
    pub struct VersionInfo {
        /// The version of QEMU whose protocol it has.
        qemu: VersionTriple = "qemu",
        /// Our own name and version.
        package: String = "package",
    }
}

qapi_struct! {
    /// A command.
    pub struct CommandInfo {
        /// Its name.
        name: String = "name",
    }
}

/// The schema, which describes itself.
struct SchemaInfo(Value);

qapi_struct! {
    /// A part of the schema.
    pub struct SchemaEntry {
        /// Its name.
        name: String = "name",
        /// What kind of thing it is.
        meta_type: String = "meta-type",
        /// What to know of it.
        features: Option<Vec<String>> = "features",
        /// Of a type of JSON's own.
        json_type: Option<String> = "json-type",
        /// Of an enumeration: its words.
        values: Option<Vec<String>> = "values",
        /// Of objects, enumerations and alternates.
        members: Option<Vec<Value>> = "members",
        /// Of a list.
        element_type: Option<String> = "element-type",
        /// Of a union.
        tag: Option<String> = "tag",
        /// Of a union.
        variants: Option<Vec<Value>> = "variants",
        /// Of a command or an event.
        arg_type: Option<String> = "arg-type",
        /// Of a command.
        ret_type: Option<String> = "ret-type",
        /// Of a command.
        allow_oob: Option<bool> = "allow-oob",
    }
}

impl Qapi for SchemaInfo {
    fn parse(_: crate::qapi::Input<'_>) -> Result<Self, QmpError> {
        Err(QmpError::generic("a schema is never given"))
    }

    fn emit(&self) -> Option<Value> {
        Some(self.0.clone())
    }

    fn describe(schema: &mut Schema) -> String {
        Vec::<SchemaEntry>::describe(schema)
    }
}

pub(super) fn add(commands: &mut Commands) {
    // Sessions see to it before it comes here; it is in the lists all the same.
    commands.add("qmp_capabilities", |_, _: QmpCapabilities| async { Ok(()) });
    commands.add("query-version", |_, (): ()| query_version());
    commands.add("query-commands", query_commands);
    commands.add("query-qmp-schema", query_schema);
    commands.add("quit", quit);
}

async fn query_version() -> Result<VersionInfo, QmpError> {
    let version = version();
    let number = |name: &str| version["qemu"][name].as_i64().unwrap_or_default();
    Ok(VersionInfo {
        qemu: VersionTriple {
            major: number("major"),
            minor: number("minor"),
            micro: number("micro"),
        },
        package: version["package"].as_str().unwrap_or_default().to_owned(),
    })
}

async fn query_commands(service: Rc<Service>, (): ()) -> Result<Vec<CommandInfo>, QmpError> {
    let names = service.commands().names();
    let info = |name: &str| CommandInfo {
        name: name.to_owned(),
    };
    Ok(names.map(info).collect())
}

async fn query_schema(service: Rc<Service>, (): ()) -> Result<SchemaInfo, QmpError> {
    Ok(SchemaInfo(service.commands().schema()))
}

async fn quit(service: Rc<Service>, (): ()) -> Result<(), QmpError> {
    service.handle.quit();
    Ok(())
}
