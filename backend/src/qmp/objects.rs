//! Objects: what nodes and exports refer to by name, under QEMU's names.
//!
//! A `throttle-group` is the block layer's. An `iothread` is a name for a worker with its wishes for polling.
//! A `secret` is kept for whoever asks by name, and so are keys (`tls-creds-x509`). A `main-loop` is what there is anyway.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use blockcore::ErrorKind;
use blockcore::graph::Control;
use blockcore::throttle::{Limits, MAX_VALUE, PROPERTIES};
use serde_json::{Map, Value, json};

use super::Service;
use super::command::Commands;
use super::keys::TlsCredsX509Properties;
use crate::config::is_identifier;
use crate::daemon::Daemon;
use crate::qapi::{
    ErrorClass, Form, Input, Member, Members, Object, Qapi, QmpError, Schema, emit_object,
    parse_object,
};
use crate::{qapi_enum, qapi_struct};

qapi_struct! {
    /// What a worker is asked for.
    pub struct IothreadProperties {
        /// Most requests that are handed to the kernel together; taken as QEMU takes it.
        aio_max_batch: Option<i64> = "aio-max-batch",
        /// Fewest threads of the pool; taken as QEMU takes it.
        thread_pool_min: Option<i64> = "thread-pool-min",
        /// Most threads of the pool; taken as QEMU takes it.
        thread_pool_max: Option<i64> = "thread-pool-max",
        /// How long to look for work before sleeping, in nanoseconds; 0 for not at all.
        poll_max_ns: Option<i64> = "poll-max-ns",
        /// By what that time grows.
        poll_grow: Option<i64> = "poll-grow",
        /// By what it shrinks.
        poll_shrink: Option<i64> = "poll-shrink",
    }
}

qapi_struct! {
    /// What the control thread is asked for; taken as QEMU takes it.
    pub struct MainLoopProperties {
        /// Most requests that are handed to the kernel together.
        aio_max_batch: Option<i64> = "aio-max-batch",
        /// Fewest threads of the pool.
        thread_pool_min: Option<i64> = "thread-pool-min",
        /// Most threads of the pool.
        thread_pool_max: Option<i64> = "thread-pool-max",
    }
}

qapi_enum! {
    /// How a secret is written.
    pub enum SecretFormat {
        /// As it is.
        Raw = "raw",
        /// In base64.
        Base64 = "base64",
    }
}

qapi_struct! {
    /// A secret.
    pub struct SecretProperties {
        /// How it is written; raw by default.
        format: Option<SecretFormat> = "format",
        /// The secret itself.
        data: Option<String> = "data",
        /// The file that it is in.
        file: Option<String> = "file",
    }
}

/// Limits of a throttle group, by the names that they have in a `limits` object.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThrottleLimits(pub Limits);

impl Qapi for ThrottleLimits {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        parse_object(input)
    }

    fn emit(&self) -> Option<Value> {
        Some(emit_object(self))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.object::<Self>("ThrottleLimits")
    }
}

impl Object for ThrottleLimits {
    fn take(members: &mut Members<'_>) -> Result<Self, QmpError> {
        let mut limits = Limits::default();
        for property in PROPERTIES {
            if let Some(value) = members.take::<Option<i64>>(property.name)? {
                property.set(&mut limits, limit(value)?);
            }
        }
        Ok(Self(limits))
    }

    fn put(&self, map: &mut Map<String, Value>) {
        for property in PROPERTIES {
            map.insert(property.name.to_owned(), property.get(&self.0).into());
        }
    }

    fn list(schema: &mut Schema) -> Vec<Member> {
        limit_members(schema, |property| property.name)
    }
}

fn limit_members(
    schema: &mut Schema,
    name: impl Fn(&'static blockcore::throttle::Property) -> &'static str,
) -> Vec<Member> {
    let member = |property| Member {
        name: name(property).to_owned(),
        kind: i64::describe(schema),
        optional: true,
    };
    PROPERTIES.iter().map(member).collect()
}

fn limit(value: i64) -> Result<u64, QmpError> {
    let value = u64::try_from(value)
        .ok()
        .filter(|value| *value <= MAX_VALUE);
    value.ok_or_else(|| {
        QmpError::generic(format!(
            "bps/iops/max values must be within [0, {MAX_VALUE}]"
        ))
    })
}

/// The limits of a new throttle group, in either spelling.
#[derive(Clone, Copy, Debug)]
pub struct ThrottleGroupProperties(Limits);

impl Qapi for ThrottleGroupProperties {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        parse_object(input)
    }

    fn emit(&self) -> Option<Value> {
        Some(emit_object(self))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.object::<Self>("ThrottleGroupProperties")
    }
}

impl Object for ThrottleGroupProperties {
    fn take(members: &mut Members<'_>) -> Result<Self, QmpError> {
        let given: Option<ThrottleLimits> = members.take("limits")?;
        let mut limits = given.unwrap_or_default().0;
        for property in PROPERTIES {
            if let Some(value) = members.take::<Option<i64>>(property.x_name)? {
                property.set(&mut limits, limit(value)?);
            }
        }
        Ok(Self(limits))
    }

    fn put(&self, map: &mut Map<String, Value>) {
        map.extend(
            ThrottleLimits(self.0)
                .emit()
                .map(|limits| ("limits".to_owned(), limits)),
        );
    }

    fn list(schema: &mut Schema) -> Vec<Member> {
        let mut members = vec![Member {
            name: "limits".into(),
            kind: ThrottleLimits::describe(schema),
            optional: true,
        }];
        members.extend(limit_members(schema, |property| property.x_name));
        members
    }
}

crate::qapi_union! {
    /// What kinds of objects there are.
    pub enum ObjectKind by "qom-type" {
        /// A worker's name.
        Iothread(IothreadProperties) = "iothread",
        /// What the control thread is asked for.
        MainLoop(MainLoopProperties) = "main-loop",
        /// A secret.
        Secret(SecretProperties) = "secret",
        /// Limits that nodes share.
        ThrottleGroup(ThrottleGroupProperties) = "throttle-group",
        /// Keys for encrypted connections.
        TlsCredsX509(TlsCredsX509Properties) = "tls-creds-x509",
    }
}

/// An object to be made: its kind, its name and its properties.
#[derive(Clone, Debug)]
pub struct ObjectOptions {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: ObjectKind,
}

impl Qapi for ObjectOptions {
    fn parse(input: Input<'_>) -> Result<Self, QmpError> {
        parse_object(input)
    }

    fn emit(&self) -> Option<Value> {
        Some(emit_object(self))
    }

    fn describe(schema: &mut Schema) -> String {
        schema.union("ObjectOptions", "qom-type", |schema| {
            let member = |name: &str, kind| Member {
                name: name.to_owned(),
                kind,
                optional: false,
            };
            let words = KINDS.map(|kind| kind.name);
            let tag = schema.choice("ObjectType", &words);
            let text = String::describe(schema);
            let cases = [
                IothreadProperties::describe(schema),
                MainLoopProperties::describe(schema),
                SecretProperties::describe(schema),
                ThrottleGroupProperties::describe(schema),
                TlsCredsX509Properties::describe(schema),
            ];
            let cases = words
                .iter()
                .map(|word| (*word).to_owned())
                .zip(cases)
                .collect();
            (vec![member("qom-type", tag), member("id", text)], cases)
        })
    }
}

impl Object for ObjectOptions {
    fn take(members: &mut Members<'_>) -> Result<Self, QmpError> {
        // In QEMU's order, for its refusals: the kind, the name, the rest.
        let kind: String = members.take("qom-type")?;
        if !KINDS.iter().any(|known| known.name == kind) {
            let sentence = format!("Parameter 'qom-type' does not accept value '{kind}'");
            return Err(QmpError::generic(sentence));
        }
        let id = members.take("id")?;
        let kind = ObjectKind::take(members)?;
        Ok(Self { id, kind })
    }

    fn put(&self, map: &mut Map<String, Value>) {
        map.insert("id".into(), self.id.clone().into());
        self.kind.put(map);
    }

    fn list(_: &mut Schema) -> Vec<Member> {
        unreachable!("a union describes itself as a whole")
    }
}

/// A kind of objects, for those who ask what there is.
struct Kind {
    name: &'static str,
    parent: &'static str,
    /// Each property with its type; those of throttle groups are the block layer's.
    properties: &'static [(&'static str, &'static str)],
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "iothread",
        parent: "event-loop-base",
        properties: &[
            ("aio-max-batch", "int"),
            ("thread-pool-min", "int"),
            ("thread-pool-max", "int"),
            ("poll-max-ns", "int"),
            ("poll-grow", "int"),
            ("poll-shrink", "int"),
        ],
    },
    Kind {
        name: "main-loop",
        parent: "event-loop-base",
        properties: &[
            ("aio-max-batch", "int"),
            ("thread-pool-min", "int"),
            ("thread-pool-max", "int"),
        ],
    },
    Kind {
        name: "secret",
        parent: "secret_common",
        properties: &[
            ("data", "string"),
            ("file", "string"),
            ("format", "QCryptoSecretFormat"),
        ],
    },
    Kind {
        name: "throttle-group",
        parent: "object",
        properties: &[("limits", "ThrottleLimits")],
    },
    Kind {
        name: "tls-creds-x509",
        parent: "tls-creds",
        properties: &[
            ("dir", "string"),
            ("endpoint", "QCryptoTLSCredsEndpoint"),
            ("passwordid", "string"),
            ("priority", "string"),
            ("sanity-check", "bool"),
            ("verify-peer", "bool"),
        ],
    },
];

impl Kind {
    fn all_properties(&self) -> Vec<ObjectPropertyInfo> {
        let info = |(name, kind): (&str, &str)| ObjectPropertyInfo {
            name: name.to_owned(),
            kind: kind.to_owned(),
        };
        let mut all = vec![info(("type", "string"))];
        all.extend(self.properties.iter().copied().map(info));
        if self.name == "throttle-group" {
            all.extend(
                PROPERTIES
                    .iter()
                    .map(|property| info((property.x_name, "int"))),
            );
        }
        all
    }
}

/// What QEMU has where nothing is said.
const DEFAULT_POLL_MAX_NS: i64 = 32768;
const DEFAULT_POOL_MAX: i64 = 64;

/// The objects that were made, by name.
pub struct Objects {
    daemon: Weak<Daemon>,
    control: Control,
    made: RefCell<BTreeMap<String, Made>>,
}

/// An object: its kind and its properties, but for those that are kept elsewhere.
struct Made {
    kind: &'static str,
    properties: BTreeMap<&'static str, Value>,
    /// What a secret is.
    secret: Option<Vec<u8>>,
}

impl Objects {
    pub(super) fn new(daemon: &Rc<Daemon>) -> Self {
        Self {
            daemon: Rc::downgrade(daemon),
            control: daemon.control().clone(),
            made: RefCell::default(),
        }
    }

    /// Makes an object.
    ///
    /// # Errors
    ///
    /// What is wrong with its name or properties.
    pub fn add(&self, options: ObjectOptions) -> Result<(), QmpError> {
        let ObjectOptions { id, kind } = options;
        if !is_identifier(&id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        if self.made.borrow().contains_key(&id) {
            return Err(QmpError::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let mut secret = None;
        let (name, properties) = match kind {
            ObjectKind::Iothread(mut iothread) => {
                iothread.poll_max_ns.get_or_insert(DEFAULT_POLL_MAX_NS);
                iothread.poll_grow.get_or_insert(0);
                iothread.poll_shrink.get_or_insert(0);
                iothread.aio_max_batch.get_or_insert(0);
                iothread.thread_pool_min.get_or_insert(0);
                iothread.thread_pool_max.get_or_insert(DEFAULT_POOL_MAX);
                let properties = emit_object(&iothread);
                check_numbers(&properties)?;
                let poll_max = iothread.poll_max_ns.unwrap_or_default();
                let poll_max = Duration::from_nanos(u64::try_from(poll_max).unwrap_or(0));
                self.daemon()?.add_iothread(&id, poll_max)?;
                ("iothread", properties)
            }
            ObjectKind::MainLoop(mut main) => {
                let made = self.made.borrow();
                if made.values().any(|made| made.kind == "main-loop") {
                    return Err(QmpError::generic("only one main-loop instance allowed"));
                }
                main.aio_max_batch.get_or_insert(0);
                main.thread_pool_min.get_or_insert(0);
                main.thread_pool_max.get_or_insert(DEFAULT_POOL_MAX);
                let properties = emit_object(&main);
                check_numbers(&properties)?;
                ("main-loop", properties)
            }
            ObjectKind::Secret(mut properties) => {
                secret = Some(load_secret(&properties)?);
                properties.format.get_or_insert(SecretFormat::Raw);
                ("secret", emit_object(&properties))
            }
            ObjectKind::TlsCredsX509(properties) => {
                let loaded = properties.load()?;
                self.control.credentials().add(&id, Arc::new(loaded))?;
                ("tls-creds-x509", emit_object(&properties))
            }
            ObjectKind::ThrottleGroup(ThrottleGroupProperties(limits)) => {
                self.control.add_throttle_group(&id, limits)?;
                ("throttle-group", json!({}))
            }
        };
        let kind = KINDS
            .iter()
            .find(|kind| kind.name == name)
            .expect("a kind that there is");
        let mut made = Made {
            kind: kind.name,
            properties: BTreeMap::new(),
            secret,
        };
        for (property, _) in kind.properties {
            let Some(value) = properties.get(property) else {
                continue;
            };
            made.properties.insert(property, value.clone());
        }
        self.made.borrow_mut().insert(id, made);
        Ok(())
    }

    /// Removes an object.
    ///
    /// # Errors
    ///
    /// There is none of that name, or somebody uses it.
    pub fn remove(&self, id: &str) -> Result<(), QmpError> {
        let kind = self.made.borrow().get(id).map(|made| made.kind);
        let in_use = || {
            let sentence = format!("object '{id}' is in use, can not be deleted");
            Err(QmpError::generic(sentence))
        };
        match kind {
            None => return Err(QmpError::generic(format!("object '{id}' not found"))),
            Some("main-loop") => return in_use(),
            Some("iothread") => self.daemon()?.remove_iothread(id)?,
            Some("throttle-group") => match self.control.remove_throttle_group(id) {
                Err(error) if error.kind() == ErrorKind::Busy => return in_use(),
                result => result?,
            },
            Some("tls-creds-x509") => match self.control.credentials().remove(id) {
                Err(error) if error.kind() == ErrorKind::Busy => return in_use(),
                result => result?,
            },
            Some(_) => {}
        }
        self.made.borrow_mut().remove(id);
        Ok(())
    }

    /// What a secret is; `None` if there is none of that name.
    pub fn secret(&self, id: &str) -> Option<Vec<u8>> {
        self.made.borrow().get(id)?.secret.clone()
    }

    fn get(&self, id: &str, property: &str) -> Result<Value, QmpError> {
        let made = self.made.borrow();
        let made = made.get(id).ok_or_else(|| missing(id))?;
        if property == "type" {
            return Ok(made.kind.into());
        }
        if made.kind == "throttle-group" {
            let limits = self.control.throttle_limits(id)?;
            if property == "limits" {
                return Ok(emit_object(&ThrottleLimits(limits)));
            }
            let known = PROPERTIES.iter().find(|known| known.x_name == property);
            let known = known.ok_or_else(|| unknown(made.kind, property))?;
            return Ok(known.get(&limits).into());
        }
        if let Some(value) = made.properties.get(property) {
            return Ok(value.clone());
        }
        // Of a secret, what was not given.
        let kind = KINDS.iter().find(|kind| kind.name == made.kind);
        let known =
            kind.is_some_and(|kind| kind.properties.iter().any(|(name, _)| *name == property));
        match known {
            true => Ok(Value::String(String::new())),
            false => Err(unknown(made.kind, property)),
        }
    }

    fn set(&self, id: &str, property: &str, value: &Value) -> Result<(), QmpError> {
        let mut made = self.made.borrow_mut();
        let made = made.get_mut(id).ok_or_else(|| missing(id))?;
        let kind = KINDS
            .iter()
            .find(|kind| kind.name == made.kind)
            .expect("made of a kind");
        if made.kind == "throttle-group" {
            if property == "limits" {
                let wrapped = json!({ "limits": value });
                let input = Input::new(&wrapped, Form::Json, &[]);
                let given: ThrottleLimits = input.members()?.take("limits")?;
                // What is not said stays as it is.
                let mut limits = self.control.throttle_limits(id)?;
                for property in PROPERTIES
                    .iter()
                    .filter(|known| value.get(known.name).is_some())
                {
                    property.set(&mut limits, property.get(&given.0));
                }
                return Ok(self.control.set_throttle_limits(id, limits)?);
            }
            return Err(
                match PROPERTIES.iter().any(|known| known.x_name == property) {
                    true => QmpError::generic("Property cannot be set after initialization"),
                    false => unknown(kind.name, property),
                },
            );
        }
        let known = kind.properties.iter().find(|(name, _)| *name == property);
        let Some((property, type_name)) = known else {
            return Err(unknown(kind.name, property));
        };
        let wrapped = json!({ *property: value });
        let input = Input::new(&wrapped, Form::Json, &[]);
        let mut members = input.members()?;
        match *type_name {
            "int" => drop(members.take::<i64>(property)?),
            "bool" => drop(members.take::<bool>(property)?),
            _ => drop(members.take::<String>(property)?),
        }
        check_number(property, value)?;
        if let (true, Some(poll_max)) = (*property == "poll-max-ns", value.as_u64()) {
            let poll_max = Some(Duration::from_nanos(poll_max));
            self.daemon()?.iothread_poll(id, poll_max)?;
        }
        made.properties.insert(property, value.clone());
        Ok(())
    }

    fn daemon(&self) -> Result<Rc<Daemon>, QmpError> {
        let gone = || QmpError::generic("the daemon is stopping");
        self.daemon.upgrade().ok_or_else(gone)
    }
}

fn check_numbers(properties: &Value) -> Result<(), QmpError> {
    let mut all = properties.as_object().into_iter().flatten();
    all.try_for_each(|(property, value)| check_number(property, value))
}

fn check_number(property: &str, value: &Value) -> Result<(), QmpError> {
    match value.as_i64() {
        Some(number) if number < 0 => Err(QmpError::generic(format!(
            "{property} value must be in range [0, {}]",
            i64::MAX
        ))),
        _ => Ok(()),
    }
}

fn missing(id: &str) -> QmpError {
    QmpError::new(
        ErrorClass::DeviceNotFound,
        format!("Device '{id}' not found"),
    )
}

fn unknown(kind: &str, property: &str) -> QmpError {
    QmpError::generic(format!("Property '{kind}.{property}' not found"))
}

fn load_secret(properties: &SecretProperties) -> Result<Vec<u8>, QmpError> {
    let bytes = match (&properties.data, &properties.file) {
        (Some(_), Some(_)) => {
            return Err(QmpError::generic(
                "'file' and 'data' are mutually exclusive",
            ));
        }
        (None, None) => {
            return Err(QmpError::generic(
                "Either 'file' or 'data' must be provided",
            ));
        }
        (Some(data), None) => data.clone().into_bytes(),
        (None, Some(file)) => std::fs::read(file).map_err(|error| {
            let sentence = format!("Unable to read {file}: {error}");
            QmpError::generic(sentence)
        })?,
    };
    match properties.format {
        None | Some(SecretFormat::Raw) => match std::str::from_utf8(&bytes) {
            Ok(_) => Ok(bytes),
            Err(_) => Err(QmpError::generic("Data from secret is not valid UTF-8")),
        },
        Some(SecretFormat::Base64) => from_base64(&bytes),
    }
}

/// RFC 4648, "Base 64 Encoding"; white space between is passed over.
fn from_base64(text: &[u8]) -> Result<Vec<u8>, QmpError> {
    let wrong = || QmpError::generic("Base64 data contains invalid characters");
    let text: Vec<u8> = text
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let padding = text.iter().rev().take_while(|byte| **byte == b'=').count();
    let digits = &text[..text.len() - padding];
    if padding > 2 || !text.len().is_multiple_of(4) || digits.len() % 4 == 1 {
        return Err(wrong());
    }
    let mut out = Vec::with_capacity(digits.len() * 3 / 4);
    let (mut bits, mut count) = (0_u32, 0);
    for digit in digits {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return Err(wrong()),
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Ok(out)
}

qapi_struct! {
    /// An object's name.
    pub struct ObjectDel {
        /// The name.
        id: String = "id",
    }
}

qapi_struct! {
    /// A place in the tree of objects.
    pub struct QomList {
        /// The path.
        path: String = "path",
    }
}

qapi_struct! {
    /// A property of an object.
    pub struct QomGet {
        /// The object's path or name.
        path: String = "path",
        /// The property.
        property: String = "property",
    }
}

qapi_struct! {
    /// A property of an object, and what it is to be.
    pub struct QomSet {
        /// The object's path or name.
        path: String = "path",
        /// The property.
        property: String = "property",
        /// What it is to be.
        value: Value = "value",
    }
}

qapi_struct! {
    /// Which types are asked for.
    pub struct QomListTypes {
        /// Only those that are also this.
        implements: Option<String> = "implements",
        /// Also those of which there are no objects.
        is_abstract: Option<bool> = "abstract",
    }
}

qapi_struct! {
    /// A type's name.
    pub struct QomListProperties {
        /// The name.
        typename: String = "typename",
    }
}

qapi_struct! {
    /// A type.
    pub struct ObjectTypeInfo {
        /// Its name.
        name: String = "name",
        /// Whether there are no objects of it.
        is_abstract: Option<bool> = "abstract",
        /// What it is, too.
        parent: Option<String> = "parent",
    }
}

qapi_struct! {
    /// A property.
    pub struct ObjectPropertyInfo {
        /// Its name.
        name: String = "name",
        /// Its type.
        kind: String = "type",
    }
}

pub(super) fn add(commands: &mut Commands) {
    commands.add("object-add", object_add);
    commands.add("object-del", object_del);
    commands.add("qom-list", qom_list);
    commands.add("qom-get", qom_get);
    commands.add("qom-set", qom_set);
    commands.add("qom-list-types", qom_list_types);
    commands.add("qom-list-properties", qom_list_properties);
}

async fn object_add(service: Rc<Service>, options: ObjectOptions) -> Result<(), QmpError> {
    service.objects().add(options)
}

async fn object_del(service: Rc<Service>, arguments: ObjectDel) -> Result<(), QmpError> {
    service.objects().remove(&arguments.id)
}

/// The name at the end of a path to an object.
fn name_of(path: &str) -> &str {
    path.strip_prefix("/objects/").unwrap_or(path)
}

async fn qom_list(
    service: Rc<Service>,
    arguments: QomList,
) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    let info = |name: &str, kind: String| ObjectPropertyInfo {
        name: name.to_owned(),
        kind,
    };
    let mut all = vec![info("type", "string".into())];
    match arguments.path.as_str() {
        "/" => {
            all.extend(["objects", "chardevs"].map(|name| info(name, "child<container>".into())))
        }
        "/objects" | "objects" => {
            let made = service.objects().made.borrow();
            let made = made.iter();
            all.extend(made.map(|(name, made)| info(name, format!("child<{}>", made.kind))));
        }
        "/chardevs" | "chardevs" => {
            let chardevs = service.chardevs.borrow();
            all.extend(
                chardevs
                    .keys()
                    .map(|name| info(name, "child<chardev>".into())),
            );
        }
        path => {
            let kind = service.objects().get(name_of(path), "type")?;
            let kind = KINDS.iter().find(|known| kind == known.name);
            all = kind.map_or_else(Vec::new, Kind::all_properties);
        }
    }
    Ok(all)
}

async fn qom_get(service: Rc<Service>, arguments: QomGet) -> Result<Value, QmpError> {
    service
        .objects()
        .get(name_of(&arguments.path), &arguments.property)
}

async fn qom_set(service: Rc<Service>, arguments: QomSet) -> Result<(), QmpError> {
    let name = name_of(&arguments.path);
    service
        .objects()
        .set(name, &arguments.property, &arguments.value)
}

async fn qom_list_types(
    _: Rc<Service>,
    arguments: QomListTypes,
) -> Result<Vec<ObjectTypeInfo>, QmpError> {
    let implements = arguments.implements;
    let wanted = |kind: &&Kind| match implements.as_deref() {
        None | Some("object" | "user-creatable") => true,
        Some(parent) => parent == kind.parent || parent == kind.name,
    };
    let info = |kind: &Kind| ObjectTypeInfo {
        name: kind.name.to_owned(),
        is_abstract: None,
        parent: Some(kind.parent.to_owned()),
    };
    Ok(KINDS.iter().filter(wanted).map(info).collect())
}

async fn qom_list_properties(
    _: Rc<Service>,
    arguments: QomListProperties,
) -> Result<Vec<ObjectPropertyInfo>, QmpError> {
    let kind = KINDS.iter().find(|kind| kind.name == arguments.typename);
    let kind = kind.ok_or_else(|| {
        let sentence = format!("Class '{}' not found", arguments.typename);
        QmpError::new(ErrorClass::DeviceNotFound, sentence)
    })?;
    Ok(kind.all_properties())
}

/// What `--object help` prints: the kinds, or with one of them its properties.
pub fn help(kind: Option<&str>) -> Option<String> {
    let Some(kind) = kind else {
        let names = KINDS.iter().map(|kind| format!("  {}\n", kind.name));
        return Some(format!(
            "List of user creatable objects:\n{}",
            names.collect::<String>()
        ));
    };
    let found = KINDS.iter().find(|known| known.name == kind)?;
    let mut lines: Vec<_> = found
        .all_properties()
        .into_iter()
        .filter(|property| property.name != "type")
        .map(|property| format!("  {}=<{}>\n", property.name, property.kind))
        .collect();
    lines.sort();
    Some(format!("{kind} options:\n{}", lines.concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_and_what_is_none_is_refused() {
        for (text, bytes) in [
            ("", ""),
            ("YQ==", "a"),
            ("YWI=", "ab"),
            ("YW\nJj", "abc"),
            ("+/+/", ""),
        ] {
            let read = from_base64(text.as_bytes()).unwrap();
            match text {
                "+/+/" => assert_eq!(read, [0xfb, 0xff, 0xbf]),
                _ => assert_eq!(read, bytes.as_bytes()),
            }
        }
        for bad in ["!!", "YQ", "YQ=", "Y===", "YQ==YQ==", "=YQ="] {
            assert!(from_base64(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn help_lists_what_there_is() {
        assert!(help(None).unwrap().contains("  throttle-group\n"));
        assert!(
            help(Some("iothread"))
                .unwrap()
                .contains("  poll-max-ns=<int>\n")
        );
        assert_eq!(help(Some("zz")), None);
    }
}
