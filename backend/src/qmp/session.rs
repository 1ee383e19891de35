//! `Session`: one conversation with a monitor, from the greeting on. Pure: told what was read and what
//! commands came to, it says what to write and what to run.

use std::collections::VecDeque;

use serde_json::{Map, Value, json};

use super::command::{Commands, Outcome, Work};
use crate::qapi::{ErrorClass, Form, Input, QmpError, parse_object};
use crate::{qapi_enum, qapi_struct};

/// Most commands that wait behind the one that runs; then reading stops. As many as QEMU has.
pub(super) const MAX_QUEUED: usize = 8;

qapi_enum! {
    /// What a client can ask for.
    pub enum QmpCapability {
        /// Commands that overtake others.
        Oob = "oob",
    }
}

qapi_struct! {
    /// The arguments of `qmp_capabilities`.
    pub struct QmpCapabilities {
        /// What the client wants.
        enable: Option<Vec<QmpCapability>> = "enable",
    }
}

/// See the module's header.
#[derive(Default)]
pub(super) struct Session {
    negotiated: bool,
    oob: bool,
    queue: VecDeque<Request>,
    running: Option<Option<Value>>,
}

/// What waits for its turn.
enum Request {
    /// Something that was no command.
    Refused(Option<Value>, QmpError),
    Command {
        name: String,
        arguments: Value,
        id: Option<Value>,
    },
}

/// What to do next.
pub(super) enum Next {
    /// Send this.
    Reply(Value),
    /// Run this, and say what it came to.
    Run(Work),
}

/// The version whose protocol this is; what we are ourselves is said beside.
pub(super) fn version() -> Value {
    json!({
        "qemu": {"major": 10, "minor": 0, "micro": 2},
        "package": concat!("stonework ", env!("CARGO_PKG_VERSION")),
    })
}

impl Session {
    /// What a client is sent first.
    pub(super) fn greeting() -> Value {
        json!({"QMP": {"version": version(), "capabilities": ["oob"]}})
    }

    /// Whether the client has said what it wants; before, it is told of no events.
    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// Whether more may be read.
    pub(super) fn has_room(&self) -> bool {
        self.queue.len() < MAX_QUEUED
    }

    /// Whether nothing waits or runs.
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_none()
    }

    /// Takes what was read. What overtakes others is answered at once.
    pub(super) fn accept(
        &mut self,
        read: Result<Value, String>,
        commands: &Commands,
    ) -> Option<Value> {
        let value = match read {
            Ok(value) => value,
            Err(why) => {
                self.queue
                    .push_back(Request::Refused(None, QmpError::generic(why)));
                return None;
            }
        };
        let id = value.get("id").cloned();
        match self.check(value) {
            Err(error) => {
                self.queue.push_back(Request::Refused(id, error));
                None
            }
            Ok((name, arguments, false)) => {
                self.queue.push_back(Request::Command {
                    name,
                    arguments,
                    id,
                });
                None
            }
            // There are no commands that overtake others, yet a client may try.
            Ok((name, _, true)) => {
                let known = commands.names().any(|known| known == name);
                let error = match known {
                    true => QmpError::generic(format!("The command {name} does not support OOB")),
                    false => not_found(&name),
                };
                Some(reply(id, Err(error)))
            }
        }
    }

    /// The command's name, its arguments and whether it is to overtake others.
    fn check(&self, value: Value) -> Result<(String, Value, bool), QmpError> {
        let Value::Object(members) = value else {
            return Err(QmpError::generic("QMP input must be a JSON object"));
        };
        let mut name = None;
        let mut oob = false;
        let mut arguments = Value::Object(Map::new());
        for (member, value) in members {
            match (member.as_str(), value) {
                ("id", _) => {}
                ("arguments", value @ Value::Object(_)) => arguments = value,
                ("arguments", _) => {
                    return Err(QmpError::generic(
                        "QMP input member 'arguments' must be an object",
                    ));
                }
                ("exec-oob", _) if !self.oob => return Err(unexpected("exec-oob")),
                ("execute" | "exec-oob", Value::String(word)) => {
                    if name.replace(word).is_some() {
                        return Err(QmpError::generic(
                            "QMP input member 'execute' clashes with 'exec-oob'",
                        ));
                    }
                    oob = member == "exec-oob";
                }
                ("execute" | "exec-oob", _) => {
                    let sentence = format!("QMP input member '{member}' must be a string");
                    return Err(QmpError::generic(sentence));
                }
                _ => return Err(unexpected(&member)),
            }
        }
        let name = name.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
        Ok((name, arguments, oob))
    }

    /// What is to be done, if anything is: one command runs at a time.
    pub(super) fn next(&mut self, commands: &Commands) -> Option<Next> {
        if self.running.is_some() {
            return None;
        }
        let (name, arguments, id) = match self.queue.pop_front()? {
            Request::Refused(id, error) => return Some(Next::Reply(reply(id, Err(error)))),
            Request::Command {
                name,
                arguments,
                id,
            } => (name, arguments, id),
        };
        if !self.negotiated || name == "qmp_capabilities" {
            let outcome = self.negotiate(&name, &arguments, commands);
            return Some(Next::Reply(reply(id, outcome)));
        }
        let prepared = commands.prepare(&name, &arguments);
        match prepared.unwrap_or_else(|| Err(not_found(&name))) {
            Ok(work) => {
                self.running = Some(id);
                Some(Next::Run(work))
            }
            Err(error) => Some(Next::Reply(reply(id, Err(error)))),
        }
    }

    /// What the command that runs came to; the reply.
    pub(super) fn done(&mut self, outcome: Outcome) -> Option<Value> {
        let id = self.running.take()?;
        Some(reply(id, outcome))
    }

    fn negotiate(&mut self, name: &str, arguments: &Value, commands: &Commands) -> Outcome {
        let refuse = |sentence: &str| Err(QmpError::new(ErrorClass::CommandNotFound, sentence));
        if self.negotiated {
            return refuse("Capabilities negotiation is already complete, command ignored");
        }
        if name != "qmp_capabilities" {
            return refuse("Expecting capabilities negotiation with 'qmp_capabilities'");
        }
        let input = Input::new(arguments, Form::Json, commands.drivers());
        let wanted: QmpCapabilities = parse_object(input)?;
        self.oob = wanted.enable.is_some_and(|wanted| !wanted.is_empty());
        self.negotiated = true;
        Ok(Value::Object(Map::new()))
    }
}

fn unexpected(member: &str) -> QmpError {
    QmpError::generic(format!("QMP input member '{member}' is unexpected"))
}

fn not_found(name: &str) -> QmpError {
    let sentence = format!("The command {name} has not been found");
    QmpError::new(ErrorClass::CommandNotFound, sentence)
}

fn reply(id: Option<Value>, outcome: Outcome) -> Value {
    let mut members = Map::new();
    match outcome {
        Ok(value) => members.insert("return".into(), value),
        Err(error) => {
            let error = json!({"class": error.class.name(), "desc": error.desc});
            members.insert("error".into(), error)
        }
    };
    members.extend(id.map(|id| ("id".to_owned(), id)));
    Value::Object(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands() -> Commands {
        let mut commands = Commands::new(Vec::new());
        commands.add("qmp_capabilities", |_, _: QmpCapabilities| async { Ok(()) });
        commands.add("query-version", |_, (): ()| async { Ok(()) });
        commands
    }

    /// What each message is answered with; what would run is `"run"`.
    fn answers(messages: &[Value]) -> Vec<Value> {
        let (commands, mut session, mut all) = (commands(), Session::default(), Vec::new());
        for message in messages {
            all.extend(session.accept(Ok(message.clone()), &commands));
            while let Some(next) = session.next(&commands) {
                match next {
                    Next::Reply(value) => all.push(value),
                    Next::Run(_) => {
                        let done = session.done(Ok(json!("run")));
                        all.extend(done);
                    }
                }
            }
        }
        all
    }

    fn desc(answer: &Value) -> &str {
        answer["error"]["desc"].as_str().unwrap_or_default()
    }

    #[test]
    fn nothing_but_capabilities_comes_first_and_they_come_once() {
        let hello = json!({"execute": "qmp_capabilities", "id": 7});
        let version = json!({"execute": "query-version"});
        let bad = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["foo"]}});
        let all = answers(&[version.clone(), bad, hello.clone(), hello, version]);
        assert_eq!(
            desc(&all[0]),
            "Expecting capabilities negotiation with 'qmp_capabilities'"
        );
        assert_eq!(all[0]["error"]["class"], "CommandNotFound");
        assert_eq!(
            desc(&all[1]),
            "Parameter 'null' does not accept value 'foo'"
        );
        assert_eq!(all[2], json!({"return": {}, "id": 7}));
        let late = "Capabilities negotiation is already complete, command ignored";
        assert_eq!(desc(&all[3]), late);
        assert_eq!(all[4], json!({"return": "run"}));
    }

    /// What `qemu-storage-daemon` 10.0.2 answers to each.
    #[test]
    fn what_is_no_command_is_refused_in_qemus_words() {
        let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
        for (message, expected) in [
            (json!([1]), "QMP input must be a JSON object"),
            (json!({"exec": 1}), "QMP input member 'exec' is unexpected"),
            (json!({"id": 1}), "QMP input lacks member 'execute'"),
            (
                json!({"execute": 1}),
                "QMP input member 'execute' must be a string",
            ),
            (
                json!({"execute": "query-version", "arguments": 1}),
                "QMP input member 'arguments' must be an object",
            ),
            (
                json!({"execute": "query-version", "arguments": {"a": 1}}),
                "Parameter 'a' is unexpected",
            ),
            (
                json!({"execute": "query-version", "foo": 1}),
                "QMP input member 'foo' is unexpected",
            ),
            (
                json!({"exec-oob": "query-version"}),
                "The command query-version does not support OOB",
            ),
            (
                json!({"exec-oob": "query-version", "execute": "query-version"}),
                "QMP input member 'execute' clashes with 'exec-oob'",
            ),
            (
                json!({"exec-oob": "nope"}),
                "The command nope has not been found",
            ),
            (
                json!({"execute": "nope"}),
                "The command nope has not been found",
            ),
        ] {
            let all = answers(&[enable.clone(), message.clone()]);
            assert_eq!(desc(&all[1]), expected, "{message}");
            assert_eq!(all[1].get("id"), message.get("id"));
        }
        let plain = json!({"execute": "qmp_capabilities"});
        let all = answers(&[plain, json!({"exec-oob": "query-version"})]);
        assert_eq!(desc(&all[1]), "QMP input member 'exec-oob' is unexpected");
    }

    #[test]
    fn commands_run_one_after_another_and_reading_stops_behind_eight() {
        let (commands, mut session) = (commands(), Session::default());
        let _ = session.accept(Ok(json!({"execute": "qmp_capabilities"})), &commands);
        assert!(matches!(session.next(&commands), Some(Next::Reply(_))));
        for id in 0..=MAX_QUEUED {
            assert!(session.has_room());
            let _ = session.accept(Ok(json!({"execute": "query-version", "id": id})), &commands);
            if id == 0 {
                assert!(matches!(session.next(&commands), Some(Next::Run(_))));
            }
        }
        assert!(!session.has_room());
        assert!(session.next(&commands).is_none());
        assert_eq!(session.done(Ok(json!({}))).unwrap()["id"], 0);
        assert!(matches!(session.next(&commands), Some(Next::Run(_))));
        assert!(session.has_room());
        assert_eq!(session.done(Ok(json!({}))).unwrap()["id"], 1);
    }
}
