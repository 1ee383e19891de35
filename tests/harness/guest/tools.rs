//! What a guest needs from outside: QEMU, a kernel with its modules, and our program for it.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use super::{Machine, initramfs::Archive};

/// What the guest's program is built for; `scripts/deps` prepares no other guest.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Everything found and built; see `scripts/deps`.
pub struct Tools {
    pub(super) qemu: PathBuf,
    pub(super) kernel: PathBuf,
    /// QEMU's version, major and minor.
    version: (u32, u32),
    folder: PathBuf,
    initramfs: Vec<u8>,
    accelerator: OnceLock<Accelerator>,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's processors.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl Accelerator {
    pub(super) fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg", "-cpu", "qemu64"],
        }
    }
}

impl Tools {
    /// The tools, or `None` where they are missing, after saying so past the test's captured output.
    ///
    /// # Panics
    ///
    /// If they are missing under continuous integration (`CI` is set), where a test that does not run
    /// is a failure, or if the guest's program cannot be built.
    pub fn find() -> Option<&'static Self> {
        static TOOLS: OnceLock<Result<Tools, String>> = OnceLock::new();
        match TOOLS.get_or_init(Self::prepare) {
            Ok(tools) => Some(tools),
            Err(missing) => {
                skip(missing);
                None
            }
        }
    }

    fn prepare() -> Result<Self, String> {
        let target = target_dir();
        let folder = target.join("testdeps");
        let kernel = folder.join("kernel/vmlinuz");
        if !kernel.exists() {
            return Err(format!(
                "{} does not exist; `scripts/deps guest` prepares it",
                kernel.display()
            ));
        }
        let private = folder.join("qemu/bin/qemu-system-x86_64");
        let qemu = on_path("qemu-system-x86_64")
            .or_else(|| private.exists().then_some(private))
            .ok_or("there is no qemu-system-x86_64; `scripts/deps guest` prepares one")?;
        Ok(Self {
            version: version_of(&qemu)?,
            qemu,
            initramfs: initramfs(&folder.join("kernel/modules"), &build_program(&target)),
            kernel,
            folder,
            accelerator: OnceLock::new(),
        })
    }

    pub(super) fn initramfs(&self) -> &[u8] {
        &self.initramfs
    }

    /// What makes a socket wait for its back-end to come back, soon; it changed its name in 9.2.
    pub(super) fn reconnect_option(&self) -> &'static str {
        if self.version >= (9, 2) {
            return ",reconnect-ms=100";
        }
        ",reconnect=1"
    }

    /// QEMU's version, as it prints it.
    pub fn qemu_version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// KVM if a guest boots with it, which is asked once after each start of the host: the device
    /// may be there and guests hang all the same (nested virtualisation).
    pub fn accelerator(&self) -> Accelerator {
        *self.accelerator.get_or_init(|| {
            if fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_err()
            {
                return Accelerator::Tcg;
            }
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            let note = self.folder.join("accelerator");
            let known = fs::read_to_string(&note).unwrap_or_default();
            if let Some(accelerator) = known.strip_prefix(&boot) {
                return if accelerator == "kvm" {
                    Accelerator::Kvm
                } else {
                    Accelerator::Tcg
                };
            }
            // With working KVM this takes a second.
            let booted = Machine::new(self)
                .accelerated_by(Accelerator::Kvm)
                .time_limit(Duration::from_secs(8))
                .try_boot();
            let (accelerator, name) = match booted {
                Ok(_) => (Accelerator::Kvm, "kvm"),
                Err(_) => (Accelerator::Tcg, "tcg"),
            };
            // Asking again next time is all that a failure costs.
            let _ = fs::write(&note, format!("{boot}{name}"));
            accelerator
        })
    }
}

/// Says that a test does not run, even if it is captured; under CI that is a failure.
pub(super) fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "{reason}");
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// Cargo's folder for all that is built, from where this program is in it.
fn target_dir() -> PathBuf {
    let own = std::env::current_exe().expect("a program knows its own path");
    // target/debug/deps/test-hash, target/release/demo, with --target a folder deeper: a folder with
    // prepared tools is surely the one.
    let prepared = own
        .ancestors()
        .skip(1)
        .find(|dir| dir.join("testdeps").is_dir());
    let usual = own
        .ancestors()
        .skip(1)
        .find(|dir| dir.file_name().is_some_and(|name| name == "target"));
    prepared
        .or(usual)
        .expect("a test is in cargo's target folder")
        .to_owned()
}

pub(super) fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        // Where a plain user's PATH does not look.
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn version_of(qemu: &Path) -> Result<(u32, u32), String> {
    let output = Command::new(qemu)
        .arg("--version")
        .output()
        .map_err(|error| format!("{} does not start: {error}", qemu.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut numbers = text
        .split_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1)
        .unwrap_or_default()
        .split('.')
        .map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => Err(format!(
            "{} does not tell its version: {text}",
            qemu.display()
        )),
    }
}

/// Builds the guest's program and returns it.
///
/// By a cargo of its own, into a folder of its own: static linking is a flag for all of a build, and
/// the build that made this test is not linked so.
fn build_program(target: &Path) -> Vec<u8> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let folder = target.join("guest");
    let output = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--package", "guest-tool"])
        // Without it the flags would also be those of build scripts.
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(&folder)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static -Cstrip=symbols")
        .output()
        .expect("cargo starts");
    assert!(
        output.status.success(),
        "the guest's program is not built:\n{}",
        String::from_utf8_lossy(&output.stderr),
    );
    fs::read(folder.join(TRIPLE).join("release/guest-tool")).expect("cargo has built it")
}

fn initramfs(modules: &Path, program: &[u8]) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.file("init", program);
    archive.directory("modules");
    let order = fs::read_to_string(modules.join("order")).expect("a list of modules");
    for name in order.lines() {
        let module = fs::read(modules.join(name)).expect("a module that is listed");
        archive.file(&format!("modules/{name}"), &module);
    }
    archive.file("modules/order", order.as_bytes());
    archive.finish()
}
