//! The guest's first process: from the kernel's hand-over to the host's last command.
//!
//! The host speaks over the second serial port, since the kernel has the first: it sends a verb and
//! its arguments as one line, and gets one line back, `ok key=value ...` or `error sentence`. The
//! line `ready` says that the disks are there.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode},
    mount::{MountFlags, UnmountFlags, mount, unmount as rustix_unmount},
    system::{RebootCommand, finit_module, reboot, uname},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use crate::{Report, obey, said};

/// Where the host put the drivers, with a list of them in the order in which they load.
const MODULES: &str = "/modules";

const HOST: &str = "/dev/ttyS1";

pub(crate) fn run() -> ! {
    if let Err(error) = serve_host() {
        // Nobody is left to tell but the kernel's own console.
        eprintln!("guest-tool: {error}");
    }
    let _ = power_off();
    // Process 1 must not end: the kernel would panic and hide what is above.
    loop {
        std::thread::park();
    }
}

fn serve_host() -> Result<(), String> {
    for (kind, dir) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        make_dir(dir)?;
        said(
            &format!("mount {dir}"),
            mount(kind, dir, kind, MountFlags::empty(), None),
        )?;
    }
    load_modules()?;

    let read = said(
        &format!("open {HOST}"),
        File::options().read(true).write(true).open(HOST),
    )?;
    // Raw: an echo would come back to the host as an answer.
    let mut mode = said("read the terminal's mode", tcgetattr(&read))?;
    mode.make_raw();
    said(
        "set the terminal's mode",
        tcsetattr(&read, OptionalActions::Now, &mode),
    )?;
    let mut write = said("duplicate the terminal", read.try_clone())?;

    let kernel = uname();
    let mut answer = format!("ready kernel={}\n", kernel.release().to_string_lossy());
    let mut lines = BufReader::new(read).lines();
    loop {
        said("answer the host", write.write_all(answer.as_bytes()))?;
        let Some(line) = lines.next() else {
            return Err("the host has closed its end".into());
        };
        let line = said("read the host's command", line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        answer = match obey(&words) {
            Ok(report) => {
                let pairs: String = report
                    .iter()
                    .map(|(key, value)| format!(" {key}={value}"))
                    .collect();
                format!("ok{pairs}\n")
            }
            Err(error) => format!("error {error}\n"),
        };
    }
}

fn load_modules() -> Result<(), String> {
    let order = format!("{MODULES}/order");
    for name in said("read the list of modules", fs::read_to_string(order))?.lines() {
        let file = said(
            &format!("open module {name}"),
            File::open(format!("{MODULES}/{name}")),
        )?;
        said(&format!("load module {name}"), finit_module(&file, c"", 0))?;
    }
    Ok(())
}

fn make_dir(dir: &str) -> Result<(), String> {
    match rustix::fs::mkdirat(CWD, dir, Mode::from_raw_mode(0o755)) {
        Err(error) if error != rustix::io::Errno::EXIST => {
            Err(format!("cannot make {dir}: {error}"))
        }
        _ => Ok(()),
    }
}

pub(crate) fn mount_ext4(device: &str, dir: &str, read_only: bool) -> Result<Report, String> {
    make_dir(dir)?;
    let flags = if read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    said(
        &format!("mount {device}"),
        mount(device, dir, "ext4", flags, None),
    )?;
    Ok(Report::new())
}

pub(crate) fn unmount(dir: &str) -> Result<Report, String> {
    said(
        &format!("unmount {dir}"),
        rustix_unmount(Path::new(dir), UnmountFlags::empty()),
    )?;
    Ok(Report::new())
}

pub(crate) fn power_off() -> Result<Report, String> {
    said("power off", reboot(RebootCommand::PowerOff))?;
    Ok(Report::new())
}
