//! `stonework ctl`: looks at and steers a running daemon through its control socket.
//!
//! Noun first, then what is done to it. Each verb is one command of QMP, which `--dry-run` shows; `--json`
//! prints the daemon's answer as it is. Exit statuses: 0 done, 1 refused by the daemon, 2 a mistake in the
//! command line, 3 no connection, 4 no answer in time.

pub mod cli;
mod client;
mod complete;
mod events;
mod graph;
mod job;
mod node;
mod stats;
mod table;

use std::io::{self, Write};

use blockcore::driver::DriverType;
use blockcore::graph::Graph;
use serde_json::{Value, json};

use self::cli::{CtlArgs, ExportVerb, How, Noun, ObjectVerb};
use self::client::{Client, request};
use self::table::Table;
use crate::cli::{export_options, node_options};

/// Why nothing, or not all, was done.
#[derive(Debug)]
enum Failure {
    /// The daemon refused, with the class of its error.
    Refused { class: String, text: String },
    /// A mistake in the command line.
    Usage(String),
    /// There is no connection, or no more.
    Connect(String),
    /// No answer in time.
    Timeout(String),
    /// Nobody reads what is printed any more.
    Output,
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Output => 0,
            Self::Refused { .. } => 1,
            Self::Usage(_) => 2,
            Self::Connect(_) => 3,
            Self::Timeout(_) => 4,
        }
    }
}

/// Says something beside the output.
fn note(text: &str) {
    // Nobody may read it any more; the exit status tells the rest.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Does what `args` say; returns the exit status.
pub fn run(args: &CtlArgs, drivers: Vec<&'static DriverType>) -> u8 {
    let mut ctl = Ctl {
        how: args.how.clone(),
        graph: Graph::new(drivers),
        client: None,
    };
    let Err(failure) = ctl.run(&args.command) else {
        return 0;
    };
    match &failure {
        Failure::Output => {}
        Failure::Refused { class, text } if class == "GenericError" => {
            note(&format!("stonework ctl: {text}"));
        }
        Failure::Refused { class, text } => note(&format!("stonework ctl: {text} ({class})")),
        Failure::Usage(text) | Failure::Connect(text) | Failure::Timeout(text) => {
            note(&format!("stonework ctl: {text}"));
        }
    }
    failure.status()
}

/// A run of one command.
struct Ctl {
    how: How,
    /// Knows the drivers' options; has no nodes.
    graph: Graph,
    client: Option<Client>,
}

impl Ctl {
    fn run(&mut self, command: &Noun) -> Result<(), Failure> {
        match command {
            Noun::Node(verb) => self.node(verb),
            Noun::Graph { format } => self.draw(*format),
            Noun::Export(verb) => self.export(verb),
            Noun::Job(verb) => self.job(verb),
            Noun::Start(start) => self.start(start),
            Noun::Object(verb) => self.object(verb),
            Noun::Stats { nodes } => self.stats(*nodes),
            Noun::Requests => self.requests(),
            Noun::Top { interval, count } => self.top(*interval, *count),
            Noun::Events { count, names } => self.events(*count, names),
            Noun::Qmp { command, arguments } => self.qmp(command, arguments.as_deref()),
            Noun::Version => self.version(),
            Noun::Quit => self.change("quit", json!({})),
        }
    }

    fn client(&mut self) -> Result<&mut Client, Failure> {
        if self.client.is_none() {
            let Some(path) = &self.how.socket else {
                return Err(Failure::Usage(
                    "which daemon? Name its control socket with --socket PATH, or in STONEWORK_SOCKET"
                        .to_owned(),
                ));
            };
            let client = Client::connect(path, self.how.timeout, self.how.verbose)?;
            self.client = Some(client);
        }
        Ok(self.client.as_mut().expect("just connected"))
    }

    /// Asks for something; nothing is asked, and `None` given, on a dry run.
    fn ask(&mut self, command: &str, arguments: Value) -> Result<Option<Value>, Failure> {
        if self.how.dry_run {
            self.print(&request(command, arguments).to_string())?;
            return Ok(None);
        }
        self.client()?.execute(command, arguments).map(Some)
    }

    /// Asks for something to be shown: as it is with `--json`, else by `show`.
    fn show(
        &mut self,
        command: &str,
        arguments: Value,
        show: impl FnOnce(&mut Self, &Value) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        match self.ask(command, arguments)? {
            Some(answer) if self.how.json => self.print_json(&answer),
            Some(answer) => show(self, &answer),
            None => Ok(()),
        }
    }

    /// Has something changed: nothing is printed, but with `--json` what came back.
    fn change(&mut self, command: &str, arguments: Value) -> Result<(), Failure> {
        self.show(command, arguments, |_, _| Ok(()))
    }

    fn print(&self, text: &str) -> Result<(), Failure> {
        let printed = writeln!(io::stdout(), "{text}");
        printed.map_err(|_| Failure::Output)
    }

    fn print_json(&self, value: &Value) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(value).expect("a value can be written");
        self.print(&text)
    }

    fn print_table(&self, table: &Table) -> Result<(), Failure> {
        let text = table.render(self.how.no_header);
        match text.is_empty() {
            true => Ok(()),
            false => self.print(text.trim_end_matches('\n')),
        }
    }

    /// A number of bytes, for people unless they want it exact.
    fn bytes(&self, bytes: Option<u64>) -> String {
        match bytes {
            None => "-".to_owned(),
            Some(bytes) if self.how.exact => bytes.to_string(),
            Some(bytes) => table::bytes(bytes),
        }
    }

    fn export(&mut self, verb: &ExportVerb) -> Result<(), Failure> {
        match verb {
            ExportVerb::Ls => self.show("query-block-exports", json!({}), |ctl, exports| {
                let mut table = Table::new(&["ID", "TYPE", "NODE", "STATE", "SOCKET", "HELD"]);
                for export in table::list(exports) {
                    let is_going = export["shutting-down"] == true;
                    let connected = export["connected"].as_bool();
                    let state = match (is_going, connected) {
                        (true, _) => "shutting down",
                        (false, Some(true)) => "connected",
                        (false, Some(false)) => "waiting",
                        (false, None) => "-",
                    };
                    table.row(vec![
                        table::text(&export["id"]),
                        table::text(&export["type"]),
                        table::text(&export["node-name"]),
                        state.to_owned(),
                        table::text(&export["socket"]),
                        table::text(&export["held-requests"]),
                    ]);
                }
                ctl.print_table(&table)
            }),
            ExportVerb::Add { options } => {
                let options = export_options(options).map_err(|e| Failure::Usage(e.report()))?;
                self.change("block-export-add", options.to_json())
            }
            ExportVerb::Rm { id, hard } => {
                let mode = if *hard { "hard" } else { "safe" };
                self.change("block-export-del", json!({"id": id, "mode": mode}))
            }
            ExportVerb::Resume { id } => self.change("block-export-resume", json!({"id": id})),
        }
    }

    fn object(&mut self, verb: &ObjectVerb) -> Result<(), Failure> {
        let path = |id: &str| json!(format!("/objects/{id}"));
        match verb {
            ObjectVerb::Ls => self.show("qom-list", json!({"path": "/objects"}), |ctl, objects| {
                let mut table = Table::new(&["ID", "TYPE"]);
                for object in table::list(objects) {
                    let kind = table::text(&object["type"]);
                    let inner = kind
                        .strip_prefix("child<")
                        .and_then(|k| k.strip_suffix('>'));
                    // The list's own type is among them.
                    if let Some(kind) = inner {
                        table.row(vec![table::text(&object["name"]), kind.to_owned()]);
                    }
                }
                ctl.print_table(&table)
            }),
            ObjectVerb::Add { object } => {
                let object = serde_json::from_str(object).map_err(|error| {
                    Failure::Usage(format!(
                        "an object is described in JSON, such as {{\"qom-type\": \"iothread\", \"id\": \"io0\"}}: \
                         {error}"
                    ))
                })?;
                self.change("object-add", object)
            }
            ObjectVerb::Rm { id } => self.change("object-del", json!({"id": id})),
            ObjectVerb::Get { id, property } => {
                let which = json!({"path": path(id), "property": property});
                self.show("qom-get", which, |ctl, value| match value {
                    Value::String(text) => ctl.print(text),
                    value => ctl.print_json(value),
                })
            }
            ObjectVerb::Set {
                id,
                property,
                value,
            } => {
                let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
                let which = json!({"path": path(id), "property": property, "value": value});
                self.change("qom-set", which)
            }
        }
    }

    fn qmp(&mut self, command: &str, arguments: Option<&str>) -> Result<(), Failure> {
        let unreadable = |what: &str, error: serde_json::Error| {
            Failure::Usage(format!("{what} cannot be read as JSON: {error}"))
        };
        let mut message = match command.trim_start().starts_with('{') {
            true => serde_json::from_str(command).map_err(|e| unreadable("the command", e))?,
            false => request(command, json!({})),
        };
        if let Some(arguments) = arguments {
            let arguments = serde_json::from_str::<Value>(arguments);
            message["arguments"] = arguments.map_err(|e| unreadable("the arguments", e))?;
        }
        if self.how.dry_run {
            return self.print(&message.to_string());
        }
        let answer = self.client()?.send(&message)?;
        self.print_json(&answer)
    }

    fn version(&mut self) -> Result<(), Failure> {
        self.show("query-version", json!({}), |ctl, version| {
            let qemu = &version["qemu"];
            let part = |key: &str| table::text(&qemu[key]);
            ctl.print(&format!(
                "{} (speaks as QEMU {}.{}.{})",
                table::text(&version["package"]),
                part("major"),
                part("minor"),
                part("micro")
            ))
        })
    }
}
