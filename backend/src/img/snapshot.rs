//! `stonework img snapshot`: snapshots inside an image.

use std::rc::Rc;

use blockcore::driver::{SnapshotInfo, SnapshotRef, SnapshotSpec};
use blockcore::graph::Control;
use blockcore::{Error, ErrorKind};
use clap::Args;
use serde_json::{Value, json};

use super::cli::FormatArgs;
use super::open::{How, Probing};
use super::{Failure, Program};

/// `stonework img snapshot`.
#[derive(Args, Debug)]
pub struct SnapshotArgs {
    #[expect(missing_docs, reason = "documented at its type")]
    #[command(flatten)]
    pub format: FormatArgs,
    /// List the snapshots (the default)
    #[arg(short, long, conflicts_with_all = ["apply", "create", "delete"])]
    pub list: bool,
    /// Go back to this snapshot: what was written since is lost
    #[arg(short, long, value_name = "SNAPSHOT", conflicts_with_all = ["create", "delete"])]
    pub apply: Option<String>,
    /// Make a snapshot of this name
    #[arg(short, long, value_name = "SNAPSHOT", conflicts_with = "delete")]
    pub create: Option<String>,
    /// Delete this snapshot
    #[arg(short, long, value_name = "SNAPSHOT")]
    pub delete: Option<String>,
    /// List them although somebody may be changing the image
    #[arg(short = 'U', long, conflicts_with_all = ["apply", "create", "delete"])]
    pub force_share: bool,
    /// Say nothing
    #[arg(short, long)]
    pub quiet: bool,
    /// The image
    pub filename: String,
}

pub(super) async fn run(program: Rc<Program>, args: SnapshotArgs) -> Result<u8, Failure> {
    let changes = args.apply.is_some() || args.create.is_some() || args.delete.is_some();
    let how = match changes {
        true => How::writing(&args.format)?,
        false => How {
            force_share: args.force_share,
            backing: false,
            ..How::reading(&args.format, Probing::Allowed)?
        },
    };
    let node = program.open_node(&args.filename, &how).await?;
    let control = &program.control;
    let named = async |text: &str| {
        let snapshots = control.snapshots(&node).await?;
        Ok::<_, Error>(SnapshotRef::id_or_name(text, &snapshots))
    };
    if let Some(name) = args.create {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let spec = SnapshotSpec {
            name,
            seconds: u64::try_from(now.tv_sec).unwrap_or(0),
            nanoseconds: u32::try_from(now.tv_nsec).unwrap_or(0),
            ..SnapshotSpec::default()
        };
        control.take_snapshot(&node, spec).await?;
    } else if let Some(text) = args.apply {
        control.apply_snapshot(&node, &named(&text).await?).await?;
    } else if let Some(text) = args.delete {
        control.delete_snapshot(&node, &named(&text).await?).await?;
    } else {
        let snapshots = list(control, &node).await?;
        if !snapshots.is_empty() {
            program.say(table(&snapshots))?;
        }
    }
    control.remove(&node).await?;
    Ok(0)
}

/// The snapshots in an image; none in one that cannot have any.
pub(super) async fn list(control: &Control, node: &str) -> Result<Vec<SnapshotInfo>, Error> {
    match control.snapshots(node).await {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(Vec::new()),
        listed => listed,
    }
}

/// Snapshots as `qemu-img` lists them, without the last line's end.
pub(super) fn table(snapshots: &[SnapshotInfo]) -> String {
    let row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, instructions] = cells;
        format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {instructions:>10}")
    };
    let mut lines = vec![
        "Snapshot list:".to_owned(),
        row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]),
    ];
    for snapshot in snapshots {
        let size = super::output::size(snapshot.vm_state_bytes);
        let instructions = snapshot
            .instructions
            .map_or("--".into(), |count| count.to_string());
        lines.push(row([
            &snapshot.id,
            &snapshot.name,
            &size,
            &date(snapshot.seconds),
            &clock(snapshot.vm_clock_ns),
            &instructions,
        ]));
    }
    lines.join("\n")
}

/// Hours, minutes, seconds and milliseconds.
fn clock(nsec: u64) -> String {
    let (sec, milli) = (nsec / 1_000_000_000, nsec / 1_000_000 % 1000);
    let (hours, minutes) = (sec / 3600, sec / 60 % 60);
    format!("{hours:04}:{minutes:02}:{:02}.{milli:03}", sec % 60)
}

/// Seconds since 1970 as a date, in universal time.
fn date(sec: u64) -> String {
    // Days since the first of March of the year 0, from which leap days come at the end of a year.
    let days = (sec / 86400 + 719_468) as i64;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (sec / 3600 % 24, sec / 60 % 60, sec % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// A snapshot as QMP's `SnapshotInfo`.
pub(super) fn to_json(snapshot: &SnapshotInfo) -> Value {
    let mut value = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_bytes,
        "date-sec": snapshot.seconds,
        "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": snapshot.vm_clock_ns / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_ns % 1_000_000_000,
    });
    if let Some(count) = snapshot.instructions {
        value["icount"] = json!(count);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (sec, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (951_868_800, "2000-03-01 00:00:00"),
            (1_795_179_737, "2026-11-20 13:02:17"),
            (4_102_444_799, "2099-12-31 23:59:59"),
        ] {
            assert_eq!(date(sec), text);
        }
    }

    #[test]
    fn the_table_is_as_wide_as_qemus() {
        let snapshot = SnapshotInfo {
            id: "1".into(),
            name: "s1".into(),
            seconds: 1_795_179_737,
            vm_clock_ns: 3_723_004_000_000,
            instructions: Some(0),
            ..SnapshotInfo::default()
        };
        assert_eq!(
            table(&[snapshot]),
            "Snapshot list:\n\
             ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n\
             1       s1                    0 B 2026-11-20 13:02:17  0001:02:03.004          0"
        );
    }
}
