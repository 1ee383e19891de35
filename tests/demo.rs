//! What `scripts/demo` shows: a Linux guest on a disk that stonework serves, over two boots.

use std::{
    fmt::Display, fs, os::unix::fs::MetadataExt, path::Path, process::ExitCode, time::Instant,
};

use harness::guest::{Accelerator, Guest, Machine, Serve, Served, Tools};

const SEED: u64 = 2;
const BYTES: u64 = 200_000_000;
const FSYNC_EVERY: u64 = 20_000_000;

fn main() -> ExitCode {
    // The harness tells its failures by panics, whose place in the source is of no interest here.
    std::panic::set_hook(Box::new(|panic| {
        let said = panic.payload_as_str().unwrap_or("something went wrong");
        eprintln!("\ndemo: FAILED: {said}");
        // QEMU and the daemon die with this process, and what it leaves in files `scripts/demo` removes.
        std::process::exit(1);
    }));
    let Some(tools) = Tools::find() else {
        return ExitCode::FAILURE;
    };
    let demo = Demo {
        tools,
        started: Instant::now(),
    };
    demo.run();
    ExitCode::SUCCESS
}

struct Demo {
    tools: &'static Tools,
    started: Instant,
}

impl Demo {
    fn run(&self) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let disk = dir.path().join("disk");
        println!("\nA Linux guest on a disk that stonework serves\n");

        let served = self.serve(&disk, &["--create", "1G"]);
        let mut guest = self.boot(&served, "first");
        guest.run("mkfs /dev/vda");
        guest.run("mount /dev/vda /mnt");
        self.tell(
            "guest",
            "made an ext4 with a journal on /dev/vda and mounted it",
        );
        let filled = guest.run(&format!("fill /mnt/data {BYTES} {SEED} {FSYNC_EVERY}"));
        self.tell(
            "guest",
            format_args!(
                "wrote {} of pseudo-random data with {} fsyncs; its sum is {}",
                size(BYTES),
                filled.get("fsyncs"),
                filled.get("sum"),
            ),
        );
        self.finish(guest);
        self.tell(
            "host",
            format_args!(
                "the disk is a file of {}, of which {} are allocated",
                size(fs::metadata(&disk).expect("the disk is a file").len()),
                size(allocated_bytes(&disk)),
            ),
        );
        self.stop(served);

        println!();
        let served = self.serve(&disk, &[]);
        let mut guest = self.boot(&served, "second");
        guest.run("mount /dev/vda /mnt");
        let found = guest.run(&format!("verify /mnt/data {BYTES} {SEED}"));
        assert_eq!(
            found.get("sum"),
            filled.get("sum"),
            "the sums of the two boots differ"
        );
        self.tell(
            "guest",
            format_args!(
                "read {} back and compared each byte; the sum is {} again",
                size(BYTES),
                found.get("sum"),
            ),
        );
        guest.run("remove /mnt/data");
        guest.run("umount /mnt");
        let before = allocated_bytes(&disk);
        let capacity = guest.run("info /dev/vda").number("bytes");
        guest.run(&format!("discard /dev/vda 0 {capacity}"));
        let after = allocated_bytes(&disk);
        assert!(
            after < before / 10,
            "{before} bytes allocated, {after} after the discard"
        );
        self.tell(
            "guest",
            format_args!(
                "discarded the whole disk: the host's file takes {} now, and took {} before",
                size(after),
                size(before),
            ),
        );
        self.power_off(guest);
        self.stop(served);

        println!(
            "\nWhat the first boot wrote and synced, the second boot read. All of it took {:.0} s.",
            self.started.elapsed().as_secs_f64(),
        );
    }

    fn tell(&self, who: &str, what: impl Display) {
        println!(
            "{:6.1} s  {who:<6} {what}",
            self.started.elapsed().as_secs_f64()
        );
    }

    fn serve(&self, disk: &Path, options: &[&str]) -> Served {
        let shown: String = options.iter().map(|option| format!(" {option}")).collect();
        self.tell(
            "host",
            format_args!("stonework serve {}{shown} --socket ...", disk.display()),
        );
        let mut served = Serve::new(disk).options(options).start();
        for line in served.said() {
            println!("                   | {line}");
        }
        served
    }

    fn boot(&self, served: &Served, which: &str) -> Guest {
        let how = match self.tools.accelerator() {
            Accelerator::Kvm => "with KVM",
            Accelerator::Tcg => "emulated, since KVM does not work here",
        };
        let qemu = self.tools.qemu_version();
        self.tell(
            "host",
            format_args!("QEMU {qemu} starts the {which} boot, {how}"),
        );
        let mut guest = Machine::new(self.tools).disk(served.socket()).boot();
        let info = guest.run("info /dev/vda");
        self.tell(
            "guest",
            format_args!(
                "Linux {} is up: a disk of {} with {} queues, its cache is write-{}",
                guest.kernel(),
                size(info.number("bytes")),
                info.get("queues"),
                info.get("cache_type").trim_start_matches("write_"),
            ),
        );
        guest
    }

    fn finish(&self, mut guest: Guest) {
        guest.run("umount /mnt");
        self.power_off(guest);
    }

    fn power_off(&self, guest: Guest) {
        guest.power_off();
        self.tell("guest", "powered off");
    }

    fn stop(&self, served: Served) {
        served.stop();
        self.tell("host", "stonework stopped on SIGTERM, with status 0");
    }
}

fn allocated_bytes(path: &Path) -> u64 {
    path.metadata().expect("the disk is a file").blocks() * 512
}

fn size(bytes: u64) -> String {
    if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) {
        return format!("{} GiB", bytes >> 30);
    }
    if bytes >= 1_000_000 {
        return format!("{} MB", bytes / 1_000_000);
    }
    format!("{} kB", bytes.div_ceil(1000))
}
