//! NBD over a Unix socket: our server beside `qemu-storage-daemon`'s, with `fio` as the client of both.
//!
//! Each row is one process of `fio`; both servers have one worker and serve the same file, one after the
//! other, each round in another order.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::peer::{Aio, Format, Program};
use serde_json::Value;

use crate::Arguments;
use crate::cell::Spread;
use crate::disk::Disk;

/// How long a server takes until it listens, at most.
const PATIENCE: Duration = Duration::from_secs(10);

/// Name, and what `fio` is told.
const ROWS: [(&str, &[&str]); 6] = [
    (
        "read 256k qd16 sequential",
        &["--rw=read", "--bs=256k", "--iodepth=16"],
    ),
    (
        "write 256k qd16 sequential",
        &["--rw=write", "--bs=256k", "--iodepth=16"],
    ),
    (
        "read 4k qd1 random",
        &["--rw=randread", "--bs=4k", "--iodepth=1"],
    ),
    (
        "read 4k qd32 random",
        &["--rw=randread", "--bs=4k", "--iodepth=32"],
    ),
    (
        "write 4k qd1 random",
        &["--rw=randwrite", "--bs=4k", "--iodepth=1"],
    ),
    (
        "write 4k qd32 random",
        &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    ),
];

/// A server that is killed when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(
        program: Program,
        file: &Path,
        format: Format,
        folder: &Path,
    ) -> Result<Self, Box<dyn Error>> {
        let executable = program.executable();
        let executable = executable.ok_or_else(|| format!("there is no {program} here"))?;
        let socket = folder.join("nbd");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(executable);
        if program == Program::Stonework {
            command.arg("daemon").env("STONEWORK_LOG", "error");
        }
        let (node, image) = match format {
            Format::Raw => ("disk", None),
            Format::Qcow2 => ("file", Some("qcow2,node-name=disk,file=file")),
        };
        command.args(["--object", "iothread,id=io"]);
        let mut file = format!("file,node-name={node},filename={}", file.display());
        if let Program::StorageDaemon(_) = program {
            file.push_str(",aio=io_uring");
        }
        command.args(["--blockdev", &file]);
        if let Some(image) = image {
            command.args(["--blockdev", image]);
        }
        let server = format!("addr.type=unix,addr.path={}", socket.display());
        command.args(["--nbd-server", &server]);
        command.args([
            "--export",
            "nbd,id=e,node-name=disk,writable=on,iothread=io",
        ]);
        let child = command.stdin(Stdio::null()).spawn()?;
        let mut server = Self { child, socket };
        let began = Instant::now();
        while std::os::unix::net::UnixStream::connect(&server.socket).is_err() {
            if let Some(status) = server.child.try_wait()? {
                return Err(format!("{program} ended: {status}").into());
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("{program} does not listen").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Requests per second.
    fn measure(&self, words: &[&str], seconds: f64) -> Result<f64, Box<dyn Error>> {
        let output = Command::new("fio")
            .args([
                "--name=row",
                "--ioengine=nbd",
                "--output-format=json",
                "--time_based",
            ])
            .arg(format!(
                "--uri=nbd+unix:///disk?socket={}",
                self.socket.display()
            ))
            .arg(format!("--runtime={}ms", (seconds * 1e3) as u64))
            .arg(format!("--ramp_time={}ms", (seconds * 250.0) as u64))
            .args(words)
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("fio: {}: {said}", output.status).into());
        }
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let job = &report["jobs"][0];
        let rate = |kind: &str| job[kind]["iops"].as_f64().unwrap_or(0.0);
        Ok(rate("read") + rate("write"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Measures and prints, one line for each row.
pub(crate) fn run(format: Format, arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let mut disk = Disk::create(&arguments.file, arguments.mebibytes << 20)?;
    if format == Format::Qcow2 {
        disk.make_image()?;
    }
    let folder = tempfile::tempdir()?;
    let mut programs = [Program::Stonework, Program::StorageDaemon(Aio::IoUring)];
    println!(
        "nbd, {format}, {} MiB, Unix socket, cached",
        arguments.mebibytes
    );
    for (name, words) in ROWS {
        if !arguments.rows.is_match(name) {
            continue;
        }
        let (mut ours, mut qemus) = (Vec::new(), Vec::new());
        for _ in 0..arguments.rounds {
            for program in programs {
                let server = Server::start(program, disk.file(format), format, folder.path())?;
                let rate = server.measure(words, arguments.seconds)?;
                match program {
                    Program::Stonework => ours.push(rate),
                    _ => qemus.push(rate),
                }
                drop(server);
                disk.settle()?;
            }
            programs.reverse();
        }
        let pairs = ours.iter().zip(&qemus);
        let ratio = Spread::of(pairs.map(|(ours, qemus)| ours / qemus).collect());
        let [ours, qemus] = [ours, qemus].map(Spread::of);
        println!(
            "{name}: stonework {:.1} kIOPS ({:.1}-{:.1}), qsd {:.1} ({:.1}-{:.1}); {:.2} times ({:.2}-{:.2})",
            ours.median / 1e3,
            ours.least / 1e3,
            ours.most / 1e3,
            qemus.median / 1e3,
            qemus.least / 1e3,
            qemus.most / 1e3,
            ratio.median,
            ratio.least,
            ratio.most,
        );
    }
    Ok(())
}
