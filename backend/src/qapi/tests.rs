//! Tests of parsing, writing and describing; texts are those of `qemu-storage-daemon` 10.0.2.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::node::NodeOptions;
use super::*;
use crate::{qapi_enum, qapi_struct, qapi_union};

qapi_enum! {
    /// Two colours.
    enum Colour {
        /// One.
        Red = "red",
        /// The other.
        Blue = "blue",
    }
}

qapi_struct! {
    /// What a box is like.
    struct BoxOptions {
        /// Its size.
        size: i64 = "size",
        /// Whether it is open.
        open: Option<bool> = "open",
        /// Its colours.
        colours: Option<Vec<Colour>> = "colours",
    }
}

qapi_union! {
    /// One of two things.
    enum Thing by "type" {
        /// A box.
        Box(BoxOptions) = "box",
        /// Nothing.
        Nothing(()) = "nothing",
    }
}

fn parse<T: Qapi>(value: &Value, form: Form) -> Result<T, String> {
    let drivers = formats::drivers();
    Input::new(value, form, &drivers)
        .parse()
        .map_err(|error| error.desc)
}

fn refusal<T: Qapi>(value: &Value) -> String {
    match parse::<T>(value, Form::Json) {
        Ok(_) => panic!("{value} is taken"),
        Err(text) => text,
    }
}

#[test]
fn an_object_is_parsed_strictly_and_refused_in_qemus_words() {
    let value = json!({"size": 3, "colours": ["red", "blue"]});
    let taken: BoxOptions = parse(&value, Form::Json).unwrap();
    assert_eq!((taken.size, taken.open), (3, None));
    assert_eq!(taken.emit(), Some(value));
    for (value, text) in [
        (json!({}), "Parameter 'size' is missing"),
        (
            json!({"size": "3"}),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            json!({"size": 1.5}),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            json!({"size": 3, "open": "on"}),
            "Invalid parameter type for 'open', expected: boolean",
        ),
        (
            json!({"size": 3, "colour": 1}),
            "Parameter 'colour' is unexpected",
        ),
        (
            json!({"size": 3, "colours": "red"}),
            "Invalid parameter type for 'colours', expected: array",
        ),
        (
            json!({"size": 3, "colours": [1]}),
            "Invalid parameter type for 'colours[0]', expected: string",
        ),
        (
            json!({"size": 3, "colours": ["x"]}),
            "Parameter 'null' does not accept value 'x'",
        ),
        (
            json!(3),
            "Invalid parameter type for 'null', expected: object",
        ),
    ] {
        assert_eq!(refusal::<BoxOptions>(&value), text, "{value}");
    }
}

#[test]
fn a_union_has_the_members_of_its_case_only() {
    let value = json!({"type": "box", "size": 1, "open": true});
    let thing: Thing = parse(&value, Form::Json).unwrap();
    assert_eq!(thing.emit(), Some(value));
    assert!(matches!(
        parse(&json!({"type": "nothing"}), Form::Json),
        Ok(Thing::Nothing(()))
    ));
    let text = refusal::<Thing>(&json!({"type": "nothing", "size": 1}));
    assert_eq!(text, "Parameter 'size' is unexpected");
    assert_eq!(
        refusal::<Thing>(&json!({"size": 1})),
        "Parameter 'type' is missing"
    );
    let text = refusal::<Thing>(&json!({"type": "zz"}));
    assert_eq!(text, "Parameter 'type' does not accept value 'zz'");
}

#[test]
fn text_stands_for_other_types_in_key_value_form_only() {
    let value = json!({"size": "3", "open": "on"});
    let taken: BoxOptions = parse(&value, Form::KeyValue).unwrap();
    assert_eq!((taken.size, taken.open), (3, Some(true)));
    let text = parse::<BoxOptions>(&json!({"size": "3", "open": "x"}), Form::KeyValue).unwrap_err();
    assert_eq!(text, "Parameter 'open' expects 'on' or 'off'");
}

#[test]
fn nodes_are_refused_in_qemus_words() {
    let null = |more: Value| {
        let mut value = json!({"driver": "null-co", "node-name": "n"});
        value
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        value
    };
    for (value, text) in [
        (json!({}), "Parameter 'driver' is missing"),
        (
            json!({"driver": "foo"}),
            "Parameter 'driver' does not accept value 'foo'",
        ),
        (
            json!({"driver": 1}),
            "Invalid parameter type for 'driver', expected: string",
        ),
        (json!({"driver": "file"}), "Parameter 'filename' is missing"),
        (
            json!({"driver": "file", "filename": 1}),
            "Invalid parameter type for 'filename', expected: string",
        ),
        (
            null(json!({"size": "1"})),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            null(json!({"size": 1.5})),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            null(json!({"read-only": "on"})),
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (null(json!({"foo": "on"})), "Parameter 'foo' is unexpected"),
        (
            null(json!({"cache": {"direct": 1}})),
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (
            null(json!({"cache": {"directx": true}})),
            "Parameter 'cache.directx' is unexpected",
        ),
        (
            null(json!({"cache": 7})),
            "Invalid parameter type for 'cache', expected: object",
        ),
        (
            null(json!({"discard": "foo"})),
            "Parameter 'discard' does not accept value 'foo'",
        ),
        (
            json!({"driver": "raw", "file": 5}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            json!({"driver": "raw", "file": null}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (json!({"driver": "raw"}), "Parameter 'file' is missing"),
        (
            json!({"driver": "raw", "file": {"driver": "file"}}),
            "Parameter 'file.filename' is missing",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "null-co", "foo": {"bar": 1}}}),
            "Parameter 'file.foo' is unexpected",
        ),
    ] {
        // It may say more: what there is instead.
        let said = refusal::<NodeOptions>(&value);
        assert!(said.starts_with(text), "{value}: {said}");
    }
    let listed = refusal::<Vec<NodeOptions>>(&json!([{"driver": "raw", "x": 1}]));
    assert_eq!(listed, "Parameter '[0].file' is missing");
}

#[test]
fn a_node_becomes_the_options_that_it_was_described_by() {
    let value = json!({"driver": "qcow2", "node-name": "n", "backing": null, "overlap-check": "all",
        "cache": {"direct": true}, "l2-cache-size": 65536,
        "file": {"driver": "blkdebug", "image": "below", "align": 4096,
            "take-child-perms": ["write"], "inject-error": [{"event": "read_aio", "once": true}]}});
    let mut value = value;
    // Until its child is called so everywhere.
    let file = value["file"].as_object_mut().unwrap();
    let below = file.remove("image").unwrap();
    let drivers = formats::drivers();
    let blkdebug = drivers.iter().find(|kind| kind.name == "blkdebug").unwrap();
    file.insert(blkdebug.children[0].name.into(), below);
    let taken: NodeOptions = parse(&value, Form::Json).unwrap();
    assert_eq!(taken.0.get("file.inject-error.0.event"), Some("read_aio"));
    assert_eq!(taken.0.get("cache.direct"), Some("on"));
    let template = json!({"driver": "qcow2", "file": "f", "overlap-check": {"template": "none", "main-header": true}});
    assert!(parse::<NodeOptions>(&template, Form::Json).is_ok());
    let text = refusal::<NodeOptions>(&json!({"driver": "qcow2", "file": "f", "backing": 1}));
    assert!(text.starts_with("Invalid parameter type for 'backing', expected: BlockdevRef"));
}

#[test]
fn every_type_that_the_schema_names_is_in_it_once() {
    let mut schema = Schema::new(formats::drivers());
    let (node, thing) = (
        NodeOptions::describe(&mut schema),
        Thing::describe(&mut schema),
    );
    assert_eq!(NodeOptions::describe(&mut schema), node);
    schema.command("blockdev-add", &node, &thing);
    let Value::Array(entries) = schema.into_value() else {
        panic!("a list");
    };
    let mut names = BTreeSet::new();
    for entry in &entries {
        assert!(
            names.insert(entry["name"].as_str().unwrap()),
            "twice: {entry}"
        );
    }
    for entry in &entries {
        let lists = ["members", "variants"].map(|list| entry[list].as_array());
        let named = lists
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|part| part["type"].as_str());
        let own = ["element-type", "arg-type", "ret-type"].map(|name| entry[name].as_str());
        for name in named.chain(own.into_iter().flatten()) {
            assert!(names.contains(name), "{name} of {entry}");
        }
    }
    let tag = entries
        .iter()
        .find(|entry| entry["name"] == node.as_str())
        .unwrap();
    assert_eq!(tag["tag"], "driver");
    assert_eq!(
        tag["variants"].as_array().unwrap().len(),
        formats::drivers().len()
    );
}
