//! The stream of JSON: pieces, garbage, and what is too much.

use serde_json::json;

use crate::client::{Served, Which};

/// What is sent, each with a line's end behind it.
const INPUTS: [&[u8]; 43] = [
    b"1",
    b"\"a\"",
    b"[1]",
    b"{}",
    b"foo",
    b"}",
    b"]",
    b"{]",
    b"[,]",
    b":",
    b",",
    b"-",
    b"-a ",
    b"01 ",
    b"1.x",
    b"1e{",
    b"TRUE",
    b"'\\x'",
    b"\"\\ud83d\"",
    b"\"\\ud83d\\u0041\"",
    b"\"\xff\"",
    b"\"\x80\"",
    b"\xff",
    b"@,",
    b"{\"a\"}",
    b"{1:2}",
    b"[1 2]",
    b"{\"a\":1 \"b\":2}",
    b"{\"a\":1,\"a\":2}",
    b"{\"exec\":1}",
    b"{\"id\":1}",
    b"{\"execute\":1}",
    b"{\"execute\":\"nope\",\"id\":[1,{\"a\":null}]}",
    b"{\"execute\":\"query-version\",\"arguments\":1}",
    b"{\"execute\":\"query-version\",\"arguments\":{\"a\":1}}",
    b"{\"execute\":\"query-version\",\"foo\":1}",
    b"{\"execute\":\"query-version\",}",
    b"{\"execute\":\"query-version\" \"id\":1}",
    b"{'execute':'query-block','id':'it\\'s \"x\"'}",
    b"{\"execute\":\"query-block\",\"id\":\"\\ud83d\\ude00\\u00e9\\u0000\\/\xc3\xa9\"}",
    b"{\"execute\":\"query-block\",\"id\":18446744073709551615}",
    b"{\"execute\":\"query-block\"}{\"execute\":\"query-block\",\"id\":2}",
    b"{\"execute\":\"qmp_capabilities\"}",
];

/// All messages up to the reply to a command that is sent last.
fn answers(which: Which, input: &[u8]) -> Vec<String> {
    let served = Served::start(which, &[]);
    let mut client = served.client();
    client.send(input);
    client.send(b"\n{\"execute\":\"query-block\",\"id\":\"the last\"}");
    let mut all = Vec::new();
    loop {
        let message = client.next().expect("an answer");
        if message["id"] == "the last" {
            return all;
        }
        all.push(message.to_string());
    }
}

#[test]
fn whatever_is_sent_is_answered_as_qemu_does() {
    let mut input = Vec::new();
    for part in INPUTS {
        input.extend(part);
        input.push(b'\n');
    }
    let (ours, qemus) = (answers(Which::Ours, &input), answers(Which::Qemus, &input));
    for (ours, qemus) in ours.iter().zip(&qemus) {
        assert_eq!(ours, qemus);
    }
    assert_eq!(ours.len(), qemus.len());
    assert!(ours.len() > INPUTS.len());
}

/// These overtake others, so they are sent alone.
#[test]
fn what_is_to_overtake_others_is_refused_as_qemu_does() {
    let answers = [Which::Ours, Which::Qemus].map(|which| {
        let served = Served::start(which, &[]);
        let mut client = served.client();
        [
            json!({"exec-oob": "query-version", "id": 2}),
            json!({"exec-oob": "nope"}),
            json!({"exec-oob": "query-version", "execute": "query-version"}),
        ]
        .map(|message| client.ask(&message))
    });
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn a_command_is_understood_in_whatever_pieces_it_comes_and_needs_no_line_end() {
    let served = Served::start(Which::Ours, &[]);
    let mut client = served.client();
    let command = b"{ 'execute' :\r\n\"query-block\", \"id\": {\"a\": [1.5, \"}\"]}}";
    for byte in command {
        client.send(&[*byte]);
    }
    let reply = client.next().unwrap();
    assert_eq!(reply, json!({"return": [], "id": {"a": [1.5, "}"]}}));
}

#[test]
fn what_is_too_much_is_refused_and_the_next_command_is_understood() {
    let served = Served::start(Which::Ours, &[]);
    let mut client = served.client();
    client.send(&b"[".repeat(1025));
    let refused = client.next().unwrap();
    assert_eq!(
        refused["error"]["desc"],
        "JSON nesting depth limit exceeded"
    );
    client.send(b"\"");
    for _ in 0..65 {
        client.send(&vec![b'a'; 1 << 20]);
    }
    let refused = client.next().unwrap();
    assert_eq!(refused["error"]["desc"], "JSON token size limit exceeded");
    client.send(b"\n{\"execute\":\"query-block\"}");
    assert_eq!(client.next().unwrap(), json!({"return": []}));
}

#[test]
fn nothing_is_answered_before_capabilities_are() {
    for which in [Which::Ours, Which::Qemus] {
        let served = Served::start(which, &[]);
        let mut client = crate::client::Client::connect(served.socket());
        let early = client.call("query-block", json!({}));
        assert_eq!(early["error"]["class"], "CommandNotFound", "{which:?}");
        let wrong = client.call("qmp_capabilities", json!({"enable": ["foo"]}));
        assert_eq!(wrong["error"]["class"], "GenericError", "{which:?}");
        let right = client.call("qmp_capabilities", json!({}));
        assert_eq!(right, json!({"return": {}}), "{which:?}");
        // Not enabled, so not known.
        let oob = client.ask(&json!({"exec-oob": "query-block"}));
        let text = "QMP input member 'exec-oob' is unexpected";
        assert_eq!(oob["error"]["desc"], text, "{which:?}");
        let again = client.call("qmp_capabilities", json!({}));
        assert_eq!(again["error"]["class"], "CommandNotFound", "{which:?}");
    }
}
