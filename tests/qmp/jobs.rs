//! Jobs, beside `qemu-storage-daemon`'s: the same commands get the same replies, and the same events come in
//! the same order, but for pauses that nobody asked for.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::client::{Client, Served, Which};

fn run(program: &str, folder: &Path, arguments: &[&str]) {
    let output = Command::new(program)
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}

/// base - mid - low - top, each with something of its own, and an empty image.
fn images(folder: &Path) {
    let folder_name = folder.to_str().unwrap();
    let mut below: Option<String> = None;
    for (number, name) in ["base", "mid", "low", "top"].into_iter().enumerate() {
        let image = format!("{name}.qcow2");
        let mut arguments = vec!["create", "-f", "qcow2"];
        if let Some(below) = &below {
            arguments.extend(["-b", below, "-F", "qcow2"]);
        }
        arguments.push(&image);
        if below.is_none() {
            arguments.push("8M");
        }
        run("qemu-img", folder, &arguments);
        let write = format!("write -P {} {number}M 2M", number + 1);
        run("qemu-io", folder, &["-f", "qcow2", "-c", &write, &image]);
        below = Some(format!("{folder_name}/{image}"));
    }
    for name in ["copy", "other"] {
        let image = format!("{name}.qcow2");
        run("qemu-img", folder, &["create", "-f", "qcow2", &image, "8M"]);
    }
    run(
        "qemu-img",
        folder,
        &["create", "-f", "qcow2", "short.qcow2", "4M"],
    );
}

/// A daemon with the images open, by their names.
struct Bench {
    folder: tempfile::TempDir,
    client: Client,
    served: Served,
    heard: Vec<Value>,
    /// How many of them came before what was waited for last.
    waited: usize,
}

impl Bench {
    fn start(which: Which) -> Self {
        let folder = tempfile::tempdir().unwrap();
        images(folder.path());
        let served = Served::start(which, &[]);
        let mut bench = Self {
            client: served.client(),
            folder,
            served,
            heard: Vec::new(),
            waited: 0,
        };
        let mut below = Value::Null;
        for name in ["base", "mid", "low", "top"] {
            bench.open(name, below);
            below = name.into();
        }
        for name in ["copy", "other", "short"] {
            bench.open(name, Value::Null);
        }
        bench
    }

    fn open(&mut self, name: &str, backing: Value) {
        let file = self.folder.path().join(format!("{name}.qcow2"));
        let reply = self.call(
            "blockdev-add",
            json!({
                "driver": "qcow2", "node-name": name, "backing": backing,
                "file": {"driver": "file", "filename": file.to_str().unwrap()},
            }),
        );
        assert_eq!(reply, json!({"return": {}}), "{name}");
    }

    /// The reply to a command; events that come before are kept.
    fn call(&mut self, name: &str, arguments: Value) -> Value {
        let command = json!({"execute": name, "arguments": arguments});
        self.client.send(command.to_string().as_bytes());
        loop {
            let message = self.client.next().expect("a reply");
            match message.get("event") {
                Some(_) => self.hear(message),
                None => return message,
            }
        }
    }

    fn hear(&mut self, mut message: Value) {
        message.as_object_mut().unwrap().remove("timestamp");
        self.heard.push(message);
    }

    /// Waits until a job has a status, or an event of its comes, after what was waited for before.
    fn until(&mut self, word: &str) {
        let is_it = |event: &Value| event["event"] == word || event["data"]["status"] == word;
        loop {
            let new = self.heard[self.waited..].iter().position(is_it);
            if let Some(place) = new {
                self.waited += place + 1;
                return;
            }
            self.waited = self.heard.len();
            let message = self.client.next().expect("an event");
            self.hear(message);
        }
    }

    /// Waits until the only job has come to rest in a status.
    fn rests(&mut self, status: &str) {
        let mut seen = 0;
        // A drain in between passes.
        while seen < 3 {
            let is = self.jobs()[0]["return"][0]["status"] == status;
            seen = if is { seen + 1 } else { 0 };
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// The events so far, without pauses that nobody asked for.
    fn events(&mut self) -> Vec<Value> {
        let mut events: Vec<Value> = Vec::new();
        self.waited = 0;
        for event in self.heard.drain(..) {
            let status = |event: &Value| event["data"]["status"].as_str().map(str::to_owned);
            let passes = match status(&event).as_deref() {
                Some("running") => Some("paused"),
                Some("ready") => Some("standby"),
                _ => None,
            };
            if passes.is_some() && events.last().and_then(status).as_deref() == passes {
                events.pop();
                continue;
            }
            events.push(event);
        }
        events
    }

    fn jobs(&mut self) -> Value {
        let mut all = json!([
            self.call("query-jobs", json!({})),
            self.call("query-block-jobs", json!({}))
        ]);
        for job in all[1]["return"].as_array_mut().unwrap() {
            // Right now it does something, or does not.
            let job = job.as_object_mut().unwrap();
            job.remove("busy");
            if job["status"] == "concluded" {
                // It may have been told to give up before it was.
                job.remove("actively-synced");
            }
        }
        all
    }

    /// Each node with its driver and the backing image that its header names.
    fn nodes(&mut self) -> Value {
        let reply = self.call("query-named-block-nodes", json!({"flat": true}));
        let nodes = reply["return"].as_array().unwrap().iter();
        let folder = format!("{}/", self.folder.path().display());
        let mut nodes: Vec<_> = nodes
            .filter(|node| node["drv"] != "file")
            .map(|node| {
                let name = match node["node-name"].as_str().unwrap() {
                    name if name.starts_with('#') => "#",
                    name => name,
                };
                let [live, header] = [&node["backing_file"], &node["image"]["backing-filename"]]
                    .map(|name| name.as_str().unwrap_or("").replace(&folder, ""))
                    // JSON may have spaces.
                    .map(|name| name.replace(": ", ":").replace(", ", ","));
                json!([name, node["drv"], live, header])
            })
            .collect();
        nodes.sort_by_key(Value::to_string);
        nodes.into()
    }

    /// Ends the daemon, and reads what guests would read of each image.
    fn end(mut self) -> Vec<(String, Vec<u8>)> {
        self.call("quit", json!({}));
        drop(self.client);
        assert!(self.served.wait().success());
        let read = |name: &str| {
            let folder = self.folder.path();
            let image = format!("{name}.qcow2");
            run("qemu-img", folder, &["check", "-q", &image]);
            let arguments = ["convert", "-O", "raw", &image, "out.raw"];
            run("qemu-img", folder, &arguments);
            (
                name.to_owned(),
                std::fs::read(folder.join("out.raw")).unwrap(),
            )
        };
        ["base", "mid", "low", "top", "copy"].map(read).into()
    }
}

/// Has both daemons do the same, and compares what each says and leaves.
fn compare(script: impl Fn(&mut Bench) -> Vec<Value>) {
    let [ours, qemus] = [Which::Ours, Which::Qemus].map(|which| {
        let mut bench = Bench::start(which);
        let said = script(&mut bench);
        (said, bench.end())
    });
    for (number, (ours, qemus)) in ours.0.iter().zip(&qemus.0).enumerate() {
        assert_eq!(ours, qemus, "step {number}");
    }
    assert_eq!(ours.0.len(), qemus.0.len());
    for (ours, qemus) in ours.1.iter().zip(&qemus.1) {
        assert!(ours == qemus, "image {} is another", ours.0);
    }
}

/// What can be asked of a job called `j`.
const VERBS: [(&str, &str); 8] = [
    ("job-complete", "id"),
    ("job-dismiss", "id"),
    ("job-finalize", "id"),
    ("job-resume", "id"),
    ("block-job-complete", "device"),
    ("block-job-dismiss", "id"),
    ("block-job-finalize", "id"),
    ("block-job-resume", "device"),
];

#[test]
fn a_backup_is_paused_finalized_and_dismissed_as_qemus_is() {
    compare(|bench| {
        let mut said = Vec::new();
        let mut spec = json!({
            "job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": 65536,
            "auto-finalize": false, "auto-dismiss": false,
        });
        for verb in ["job-pause", "job-dismiss", "job-cancel"] {
            said.push(bench.call(verb, json!({"id": "j"})));
        }
        for verb in ["block-job-pause", "block-job-cancel"] {
            said.push(bench.call(verb, json!({"device": "j"})));
        }
        said.push(bench.call("blockdev-backup", spec.clone()));
        bench.rests("running");
        for (verb, name) in VERBS {
            said.push(bench.call(verb, json!({name: "j"})));
        }
        said.push(bench.call("job-pause", json!({"id": "j"})));
        bench.rests("paused");
        said.push(bench.call("job-pause", json!({"id": "j"})));
        for (verb, name) in &VERBS[..3] {
            said.push(bench.call(verb, json!({*name: "j"})));
        }
        said.push(bench.call("block-job-cancel", json!({"device": "j"})));
        said.push(bench.call("block-job-set-speed", json!({"device": "j", "speed": -1})));
        said.push(bench.call("block-job-set-speed", json!({"device": "j", "speed": 0})));
        said.push(bench.call("job-resume", json!({"id": "j"})));
        bench.until("BLOCK_JOB_PENDING");
        said.push(bench.jobs());
        for (verb, name) in VERBS {
            if !verb.ends_with("finalize") {
                said.push(bench.call(verb, json!({name: "j"})));
            }
        }
        said.push(bench.call("job-finalize", json!({"id": "j"})));
        said.push(bench.jobs());
        for (verb, name) in VERBS {
            if !verb.ends_with("dismiss") {
                said.push(bench.call(verb, json!({name: "j"})));
            }
        }
        said.push(bench.call("job-dismiss", json!({"id": "j"})));
        said.push(bench.jobs());
        // Once more, given up half way.
        spec["speed"] = 1.into();
        said.push(bench.call("blockdev-backup", spec));
        said.push(bench.call("job-cancel", json!({"id": "j"})));
        bench.rests("concluded");
        said.push(bench.call("block-job-dismiss", json!({"id": "j"})));
        said.extend(
            bench
                .events()
                .into_iter()
                .filter(|event| {
                    // Whether it had been paused for a drain in between is not alike.
                    event["data"]["status"] != "paused" && event["data"]["status"] != "running"
                })
                .filter(|event| event["event"] != "BLOCK_JOB_CANCELLED"),
        );
        said.push(bench.nodes());
        said
    });
}

#[test]
fn a_mirror_gets_ready_and_takes_its_sources_place_as_qemus_does() {
    for (sync, copy_mode) in [
        ("full", "background"),
        ("top", "background"),
        ("none", "write-blocking"),
    ] {
        compare(|bench| {
            let mut said = Vec::new();
            let mut spec = json!({
                "job-id": "j", "device": "top", "target": "copy", "sync": sync, "copy-mode": copy_mode,
                "filter-node-name": "above", "auto-dismiss": false,
            });
            for (member, value) in [
                ("granularity", json!(1000)),
                ("granularity", json!(256)),
                ("buf-size", json!(-1)),
                ("replaces", json!("none")),
                ("sync", json!("incremental")),
                ("target", json!("top")),
                ("target", json!("none")),
                ("job-id", json!("")),
            ] {
                let mut wrong = spec.clone();
                wrong[member] = value;
                said.push(bench.call("blockdev-mirror", wrong));
            }
            for cancel in ["soft", "force", "complete"] {
                said.push(bench.call("blockdev-mirror", spec.clone()));
                bench.until("BLOCK_JOB_READY");
                said.push(bench.jobs());
                said.push(bench.nodes());
                said.push(bench.call("job-finalize", json!({"id": "j"})));
                said.push(bench.call("job-pause", json!({"id": "j"})));
                bench.until("standby");
                said.push(bench.call("job-resume", json!({"id": "j"})));
                bench.until("ready");
                let mode = json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"});
                if sync == "top" {
                    said.push(bench.call("block-job-change", mode));
                }
                said.push(match cancel {
                    "soft" => bench.call("block-job-cancel", json!({"device": "j"})),
                    "force" => bench.call("job-cancel", json!({"id": "j"})),
                    _ => bench.call("job-complete", json!({"id": "j"})),
                });
                bench.until("concluded");
                said.push(bench.jobs());
                said.push(bench.call("job-dismiss", json!({"id": "j"})));
                said.push(bench.nodes());
                said.extend(bench.events());
                spec["auto-finalize"] = true.into();
            }
            said
        });
    }
}

#[test]
fn a_chain_is_committed_as_qemus_is() {
    for (top, base) in [
        (Some("low"), "base"),
        (Some("mid"), "base"),
        (None, "mid"),
        (None, "base"),
    ] {
        compare(|bench| {
            let mut said = Vec::new();
            let mut spec = json!({"job-id": "j", "device": "top", "base-node": base});
            if let Some(top) = top {
                spec["top-node"] = top.into();
            }
            for (member, value) in [
                ("device", json!("none")),
                ("device", json!("mid")),
                ("base-node", json!("none")),
                ("base-node", json!("copy")),
                ("base-node", json!(top.unwrap_or("top"))),
                ("top-node", json!("copy")),
                ("top", json!("no-image")),
                ("base", json!("no-image")),
                ("speed", json!(-1)),
            ] {
                let mut wrong = spec.clone();
                wrong[member] = value;
                said.push(bench.call("block-commit", wrong));
                bench.events();
            }
            spec["filter-node-name"] = "above".into();
            said.push(bench.call("block-commit", spec));
            if top.is_none() {
                bench.until("BLOCK_JOB_READY");
                said.push(bench.jobs());
                said.push(bench.nodes());
                let mode = json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"});
                said.push(bench.call("block-job-change", mode));
                said.push(bench.call("job-complete", json!({"id": "j"})));
            }
            bench.until("null");
            said.extend(bench.events());
            said.push(bench.nodes());
            said.push(bench.jobs());
            said
        });
    }
}

#[test]
fn an_overlay_is_streamed_to_as_qemus_is() {
    for base in [
        json!({}),
        json!({"base-node": "base"}),
        json!({"base-node": "mid", "backing-file": "mid.qcow2"}),
        json!({"bottom": "mid"}),
    ] {
        compare(|bench| {
            let mut said = Vec::new();
            let mut spec = json!({"job-id": "j", "device": "top"});
            for wrong in [
                json!({"base-node": "none"}),
                json!({"base-node": "copy"}),
                json!({"base-node": "top"}),
                json!({"base-node": "mid", "bottom": "mid"}),
                json!({"base-node": "mid", "base": "mid"}),
                json!({"bottom": "none"}),
                json!({"bottom": "copy"}),
                json!({"base": "no-image"}),
                json!({"backing-file": "x"}),
                json!({"device": "none"}),
            ] {
                let mut wrong_spec = spec.clone();
                for (member, value) in wrong.as_object().unwrap() {
                    wrong_spec[member] = value.clone();
                }
                said.push(bench.call("block-stream", wrong_spec));
            }
            for (member, value) in base.as_object().unwrap() {
                spec[member] = value.clone();
            }
            said.push(bench.call("block-stream", spec));
            bench.until("null");
            said.extend(bench.events());
            said.push(bench.nodes());
            said.push(bench.jobs());
            said
        });
    }
}

/// A disk whose reads or writes fail once, with an error that the host would have.
fn failing(bench: &mut Bench, side: &str) {
    for (name, this, kind, errno) in [("from", "source", "read", 5), ("to", "target", "write", 28)]
    {
        let path = bench.folder.path().join(format!("{name}.raw"));
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let mut file = json!({
            "driver": "blkdebug", "image": {"driver": "file", "filename": path.to_str().unwrap()},
        });
        if this == side {
            file["inject-error"] = json!([
                {"event": "none", "iotype": kind, "errno": errno, "sector": 1024, "once": true}
            ]);
        }
        let node = json!({"driver": "raw", "node-name": name, "file": file});
        let reply = bench.call("blockdev-add", node);
        assert_eq!(reply, json!({"return": {}}));
    }
}

#[test]
fn failures_end_stop_or_do_not_matter_to_a_job_as_its_policy_says() {
    for job in ["blockdev-backup", "blockdev-mirror"] {
        for side in ["source", "target"] {
            for policy in ["report", "ignore", "enospc", "stop"] {
                compare(|bench| {
                    failing(bench, side);
                    let end = match job {
                        "blockdev-mirror" => "BLOCK_JOB_READY",
                        _ => "concluded",
                    };
                    let stops = policy == "stop" || policy == "enospc" && side == "target";
                    let fails = policy == "report" || policy == "enospc" && side == "source";
                    let mut said = vec![bench.call(
                        job,
                        json!({
                            "job-id": "j", "device": "from", "target": "to", "sync": "full",
                            "auto-dismiss": false, format!("on-{side}-error"): policy,
                        }),
                    )];
                    if stops {
                        bench.until("paused");
                        // Not before its failure.
                        while bench.jobs()[1]["return"][0]["io-status"] == "ok" {
                            std::thread::sleep(std::time::Duration::from_millis(5));
                        }
                        // It says so before it has come to rest.
                        bench.rests("paused");
                        said.push(bench.jobs());
                        said.push(bench.call("job-resume", json!({"id": "j"})));
                    }
                    bench.until(if fails { "concluded" } else { end });
                    said.push(bench.jobs());
                    if end == "BLOCK_JOB_READY" && !fails {
                        said.push(bench.call("job-cancel", json!({"id": "j"})));
                        bench.until("concluded");
                        said.push(bench.jobs());
                    }
                    said.push(bench.call("job-dismiss", json!({"id": "j"})));
                    said.extend(bench.events());
                    said
                });
            }
        }
    }
}

#[test]
fn jobs_are_cancelled_when_the_daemon_ends() {
    compare(|bench| {
        let spec =
            json!({"job-id": "j", "device": "top", "target": "copy", "sync": "full", "speed": 1});
        let mut said = vec![bench.call("blockdev-backup", spec)];
        said.push(bench.call("job-pause", json!({"id": "j"})));
        bench.rests("paused");
        said.push(bench.nodes());
        said
    });
}

#[test]
fn a_snapshot_is_taken_as_qemus_is() {
    compare(|bench| {
        let mut said = Vec::new();
        for (node, overlay) in [
            ("none", "copy"),
            ("base", "copy"),
            ("top", "mid"),
            ("top", "low"),
            ("top", "copy"),
            ("top", "other"),
            ("copy", "other"),
        ] {
            let arguments = json!({"node": node, "overlay": overlay});
            said.push(bench.call("blockdev-snapshot", arguments));
        }
        said.push(bench.nodes());
        said
    });
}

#[test]
fn a_backup_of_a_part_copies_what_qemus_does() {
    for sync in ["top", "none"] {
        compare(|bench| {
            let mut said = vec![bench.call(
                "blockdev-backup",
                json!({
                    "job-id": "j", "device": "top", "target": "copy", "sync": sync,
                    "filter-node-name": "above", "auto-dismiss": false,
                }),
            )];
            if sync == "none" {
                bench.rests("running");
                said.push(bench.nodes());
                said.push(bench.call("job-cancel", json!({"id": "j"})));
            }
            bench.rests("concluded");
            let mut jobs = bench.jobs();
            // How much there is to do is not known of one that copies what changes.
            for (list, member) in [(0, "total-progress"), (1, "len")] {
                jobs[list]["return"][0]
                    .as_object_mut()
                    .unwrap()
                    .remove(member);
            }
            if sync == "none" {
                said.push(jobs);
            }
            said.push(bench.call("job-dismiss", json!({"id": "j"})));
            let mut wrong = json!({
                "job-id": "j", "device": "top", "target": "copy", "sync": "bitmap",
            });
            said.push(bench.call("blockdev-backup", wrong.clone()));
            for (member, value) in [
                ("sync", json!("incremental")),
                ("sync", json!("full")),
                ("target", json!("top")),
                ("target", json!("short")),
                ("target", json!("none")),
                ("device", json!("none")),
            ] {
                wrong[member] = value;
                if wrong["sync"] != "full" || wrong["target"] != "copy" {
                    said.push(bench.call("blockdev-backup", wrong.clone()));
                }
            }
            said
        });
    }
}

#[test]
fn bitmaps_are_added_changed_and_removed_as_qemus_are() {
    compare(|bench| {
        let mut said = Vec::new();
        let long = "a".repeat(1024);
        for bitmap in [
            json!({"node": "none", "name": "a"}),
            json!({"node": "top", "name": ""}),
            json!({"node": "top", "name": "a", "granularity": 1000}),
            json!({"node": "top", "name": "a", "granularity": 256}),
            json!({"node": "top", "name": long}),
            json!({"node": "top", "name": "a"}),
            json!({"node": "top", "name": "a"}),
            json!({"node": "top", "name": "p", "persistent": true, "granularity": 32768}),
            json!({"node": "top", "name": "d", "disabled": true}),
            json!({"node": "mid", "name": "m"}),
        ] {
            said.push(bench.call("block-dirty-bitmap-add", bitmap));
        }
        for bitmaps in [
            json!(["none"]),
            json!(["p", "d"]),
            json!([{"node": "mid", "name": "m"}]),
            json!([{"node": "none", "name": "m"}]),
            json!([{"node": "mid", "name": "none"}]),
            json!([1]),
            json!("p"),
        ] {
            let arguments = json!({"node": "top", "target": "a", "bitmaps": bitmaps});
            said.push(bench.call("block-dirty-bitmap-merge", arguments));
        }
        for verb in ["clear", "enable", "disable"] {
            for (node, name) in [("none", "a"), ("top", "none"), ("top", "a"), ("top", "p")] {
                let command = format!("block-dirty-bitmap-{verb}");
                said.push(bench.call(&command, json!({"node": node, "name": name})));
            }
            let nodes = bench.call("query-named-block-nodes", json!({"flat": true}));
            let mut nodes = nodes["return"].as_array().unwrap().iter();
            let top = nodes.find(|node| node["node-name"] == "top").unwrap();
            let mut bitmaps = top["dirty-bitmaps"].as_array().unwrap().clone();
            bitmaps.sort_by_key(Value::to_string);
            said.push(bitmaps.into());
        }
        for (node, name) in [("none", "a"), ("top", "none"), ("top", "a"), ("top", "d")] {
            let arguments = json!({"node": node, "name": name});
            said.push(bench.call("block-dirty-bitmap-remove", arguments));
        }
        said
    });
}

#[test]
fn internal_snapshots_are_taken_and_deleted_as_qemus_are() {
    compare(|bench| {
        let mut said = vec![bench.call(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n"}),
        )];
        for (device, name) in [
            ("none", "s"),
            ("n", "s"),
            ("copy", ""),
            ("copy", "s"),
            ("copy", "s"),
            ("copy", "t"),
        ] {
            let arguments = json!({"device": device, "name": name});
            said.push(bench.call("blockdev-snapshot-internal-sync", arguments));
        }
        for which in [
            json!({"device": "none", "name": "s"}),
            json!({"device": "n", "name": "s"}),
            json!({"device": "copy"}),
            json!({"device": "copy", "name": "none"}),
            json!({"device": "copy", "id": "7"}),
            json!({"device": "copy", "id": "1", "name": "t"}),
            json!({"device": "copy", "id": "1"}),
            json!({"device": "copy", "id": "2", "name": "t"}),
        ] {
            let mut reply = bench.call("blockdev-snapshot-delete-internal-sync", which);
            if let Some(info) = reply.get_mut("return") {
                // When it was taken is each one's own.
                let mut deleted = info.as_object().unwrap().clone();
                deleted
                    .retain(|member, _| ["id", "name", "vm-state-size"].contains(&member.as_str()));
                *info = deleted.into();
            }
            said.push(reply);
        }
        said
    });
}
