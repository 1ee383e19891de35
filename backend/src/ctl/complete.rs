//! Names for a shell to complete, asked of the daemon that `STONEWORK_SOCKET` names. Whatever goes wrong, there
//! are none: a person is typing.

use std::path::PathBuf;
use std::time::Duration;

use clap_complete::engine::CompletionCandidate;
use serde_json::{Value, json};

use super::client::Client;
use super::node::NODES;
use super::table::{list, text};

/// Longer than a daemon takes, and not so long that a person notices.
const PATIENCE: Duration = Duration::from_millis(300);

pub(super) fn nodes() -> Vec<CompletionCandidate> {
    let named = |node: &Value| {
        let name = text(&node["node-name"]);
        (!name.starts_with('#')).then(|| (name, text(&node["drv"])))
    };
    candidates(NODES, json!({"flat": true}), named)
}

pub(super) fn exports() -> Vec<CompletionCandidate> {
    candidates("query-block-exports", json!({}), |export| {
        Some((text(&export["id"]), text(&export["node-name"])))
    })
}

pub(super) fn jobs() -> Vec<CompletionCandidate> {
    candidates("query-jobs", json!({}), |job| {
        Some((text(&job["id"]), text(&job["type"])))
    })
}

pub(super) fn objects() -> Vec<CompletionCandidate> {
    candidates("qom-list", json!({"path": "/objects"}), |object| {
        let kind = text(&object["type"]);
        let kind = kind.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
        Some((text(&object["name"]), kind))
    })
}

/// What `command` lists, each by its name and a word of help.
fn candidates(
    command: &str,
    arguments: Value,
    named: impl Fn(&Value) -> Option<(String, String)>,
) -> Vec<CompletionCandidate> {
    let Some(socket) = std::env::var_os("STONEWORK_SOCKET").map(PathBuf::from) else {
        return Vec::new();
    };
    let asked = Client::connect(&socket, PATIENCE, false)
        .and_then(|mut client| client.execute(command, arguments));
    let Ok(found) = asked else {
        return Vec::new();
    };
    let candidate =
        |(name, help): (String, String)| CompletionCandidate::new(name).help(Some(help.into()));
    list(&found)
        .iter()
        .filter_map(named)
        .map(candidate)
        .collect()
}
