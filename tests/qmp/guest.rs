//! Jobs under a guest that checks all that it reads: an independent front-end on the export's socket.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use harness::load::Load;
use serde_json::{Value, json};

use crate::client::{Client, Served, Which};

const SIZE: &str = "64M";

fn qemu_img(folder: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img")
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap();
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(output.status.success(), "qemu-img {arguments:?}: {said:?}");
}

/// A daemon that offers node `disk0` to a guest.
struct Disk {
    folder: tempfile::TempDir,
    served: Served,
    client: Client,
    images: Vec<String>,
}

impl Disk {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let served = Served::start(Which::Ours, &[]);
        let client = served.client();
        let mut disk = Self {
            folder,
            served,
            client,
            images: Vec::new(),
        };
        disk.image("disk0", None);
        disk.done(
            "block-export-add",
            json!({
                "type": "vhost-user-blk", "id": "vda", "node-name": "disk0", "writable": true,
                "num-queues": 2, "addr": {"type": "unix", "path": disk.socket().to_str().unwrap()},
            }),
        );
        disk
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("vda.sock")
    }

    /// Makes an image, which names its backing image, and opens it without.
    fn image(&mut self, name: &str, backing: Option<&str>) {
        let image = format!("{name}.qcow2");
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        let below = backing.map(|below| self.folder.path().join(format!("{below}.qcow2")));
        if let Some(below) = &below {
            arguments.extend(["-b", below.to_str().unwrap(), "-F", "qcow2"]);
        }
        arguments.extend([&image, SIZE]);
        qemu_img(self.folder.path(), &arguments);
        let file = self.folder.path().join(&image);
        let node = json!({
            "driver": "qcow2", "node-name": name, "backing": null,
            "file": {"driver": "file", "filename": file.to_str().unwrap()},
        });
        self.done("blockdev-add", node);
        self.images.push(name.to_owned());
    }

    fn done(&mut self, command: &str, arguments: Value) -> Value {
        let reply = self.client.call(command, arguments.clone());
        assert!(
            reply.get("error").is_none(),
            "{command} {arguments}: {reply}"
        );
        reply["return"].clone()
    }

    fn job(&mut self) -> Option<Value> {
        let jobs = self.done("query-jobs", json!({}));
        jobs.as_array().unwrap().first().cloned()
    }

    /// Waits until the only job has a status, or is gone.
    #[track_caller]
    fn until(&mut self, status: &str) {
        let begin = std::time::Instant::now();
        loop {
            match self.job() {
                None if status == "null" => return,
                None => panic!("the job is gone before it is {status}"),
                Some(job) => {
                    assert_eq!(job.get("error"), None, "{job}");
                    if job["status"] == status {
                        return;
                    }
                }
            }
            assert!(
                begin.elapsed() < Duration::from_secs(60),
                "{status} does not come"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Pauses and resumes the job, and changes its speed, while the guest goes on.
    fn disturb(&mut self, load: &Load) {
        let job = json!({"id": "j"});
        let speed = |speed: u64| json!({"device": "j", "speed": speed});
        self.done("block-job-set-speed", speed(1 << 20));
        self.done("job-pause", job.clone());
        load.goes_on();
        self.done("job-resume", job);
        self.done("block-job-set-speed", speed(0));
        load.goes_on();
    }

    /// Ends it; every image is whole.
    fn stop(mut self) -> tempfile::TempDir {
        self.done("quit", json!({}));
        drop(self.client);
        assert!(self.served.wait().success());
        for image in &self.images {
            let image = format!("{image}.qcow2");
            qemu_img(self.folder.path(), &["check", "-q", &image]);
        }
        self.folder
    }
}

#[test]
fn guests_go_on_through_jobs_of_every_kind_and_find_what_they_wrote() {
    let mut disk = Disk::start();
    let load = Load::start(&disk.socket());
    let mut top = "disk0".to_owned();
    for (round, copy_mode) in ["background", "write-blocking", "background"]
        .into_iter()
        .enumerate()
    {
        // A backup, disturbed.
        let target = format!("backup{round}");
        disk.image(&target, None);
        disk.done(
            "blockdev-backup",
            json!({"job-id": "j", "device": top, "target": target, "sync": "full", "speed": 1 << 20}),
        );
        disk.disturb(&load);
        disk.until("null");
        load.goes_on();
        // A mirror that is given up, and one that takes the disk's place.
        let target = format!("mirror{round}");
        disk.image(&target, None);
        let mirror = json!({
            "job-id": "j", "device": top, "target": target, "sync": "full", "copy-mode": copy_mode,
        });
        disk.done("blockdev-mirror", mirror.clone());
        disk.until("ready");
        load.goes_on();
        disk.done("block-job-cancel", json!({"device": "j"}));
        disk.until("null");
        disk.done("blockdev-mirror", mirror);
        disk.disturb(&load);
        disk.until("ready");
        load.goes_on();
        disk.done("job-complete", json!({"id": "j"}));
        disk.until("null");
        load.goes_on();
        // An overlay above it, and another; then the middle is committed, and the rest.
        for (overlay, below) in [
            (format!("low{round}"), target.clone()),
            (format!("top{round}"), format!("low{round}")),
        ] {
            disk.image(&overlay, Some(&below));
            let snapshot = json!({"node": below, "overlay": overlay});
            disk.done("blockdev-snapshot", snapshot);
            load.goes_on();
        }
        let (low, active) = (format!("low{round}"), format!("top{round}"));
        disk.done(
            "block-commit",
            json!({"job-id": "j", "device": active, "top-node": low, "base-node": target, "speed": 1 << 20}),
        );
        disk.disturb(&load);
        disk.until("null");
        load.goes_on();
        match round {
            0 | 2 => {
                disk.done("block-commit", json!({"job-id": "j", "device": active}));
                disk.until("ready");
                load.goes_on();
                disk.done("job-complete", json!({"id": "j"}));
                disk.until("null");
                for name in [active, low] {
                    disk.done("blockdev-del", json!({"node-name": name}));
                }
                top = target;
            }
            _ => {
                disk.done(
                    "block-stream",
                    json!({"job-id": "j", "device": active, "speed": 1 << 20}),
                );
                disk.disturb(&load);
                disk.until("null");
                disk.done("blockdev-del", json!({"node-name": low}));
                top = active;
            }
        }
        load.goes_on();
    }
    load.finish();
    // Nobody writes any more: a copy is the same.
    disk.image("last", None);
    disk.done(
        "blockdev-mirror",
        json!({"job-id": "j", "device": top, "target": "last", "sync": "full"}),
    );
    disk.until("ready");
    disk.done("block-job-cancel", json!({"device": "j"}));
    disk.until("null");
    let folder = disk.stop();
    let top = format!("{top}.qcow2");
    qemu_img(folder.path(), &["compare", "-q", &top, "last.qcow2"]);
}
