//! The daemon's writes and syncs as the kernel saw them: what strace wrote down.

use std::{collections::HashMap, fmt, path::Path};

/// System calls on one disk, in the order in which they began.
#[derive(Clone, Default)]
pub struct Trace {
    calls: Vec<Call>,
}

/// One line, since it goes into assertion messages: each call with its first and last line.
impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for call in &self.calls {
            write!(f, "{}@{}", call.name, call.began)?;
            match call.ended {
                Some(ended) if ended == call.began => write!(f, " ")?,
                Some(ended) => write!(f, "-{ended} ")?,
                None => write!(f, "-? ")?,
            }
        }
        Ok(())
    }
}

/// One system call.
#[derive(Clone, Debug)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// It wrote data.
    pub writes: bool,
    /// When it returns, data is durable: all (`fdatasync`) or its own (`RWF_DSYNC`).
    pub syncs: bool,
    /// Line of the trace where it began.
    pub began: usize,
    /// Line of the trace where it returned; `None` if it has not.
    pub ended: Option<usize>,
}

impl Trace {
    /// What strace is asked for: all by which a file is written or made durable.
    pub(super) const CALLS: &str =
        "pwrite64,pwritev,pwritev2,write,writev,fdatasync,fsync,sync_file_range,syncfs,sync,msync";

    /// The calls on `disk` in the output of `strace -f -y`.
    ///
    /// A call that another thread interrupts is written as two lines, `name(args <unfinished ...>`
    /// and `<... name resumed>) = 0`, both with the thread's number in front.
    pub(super) fn parse(text: &str, disk: &Path) -> Self {
        let disk = format!("<{}>", disk.display());
        let mut calls: Vec<Call> = Vec::new();
        let mut unfinished = HashMap::new();
        for (line_number, line) in text.lines().enumerate() {
            let Some((thread, what)) = line.split_once(' ') else {
                continue;
            };
            let what = what.trim_start();
            if what.starts_with("<... ") {
                if let Some(index) = unfinished.remove(thread) {
                    let call: &mut Call = &mut calls[index];
                    call.ended = Some(line_number);
                }
                continue;
            }
            let Some((name, arguments)) = what.split_once('(') else {
                continue;
            };
            if !arguments.contains(&disk) {
                continue;
            }
            let writes = name.contains("write");
            let syncs = match name {
                // Neither waits for the device's own cache.
                "sync_file_range" | "msync" => false,
                _ if writes => arguments.contains("RWF_DSYNC") || arguments.contains("RWF_SYNC"),
                _ => true,
            };
            let interrupted = what.ends_with("<unfinished ...>");
            if interrupted {
                unfinished.insert(thread, calls.len());
            }
            calls.push(Call {
                name: name.to_owned(),
                writes,
                syncs,
                began: line_number,
                ended: (!interrupted).then_some(line_number),
            });
        }
        Self { calls }
    }

    /// All calls, in the order in which they began.
    pub fn calls(&self) -> &[Call] {
        &self.calls
    }

    /// How many calls made data durable.
    pub fn syncs(&self) -> usize {
        self.calls.iter().filter(|call| call.syncs).count()
    }

    /// How many calls wrote data.
    pub fn writes(&self) -> usize {
        self.calls.iter().filter(|call| call.writes).count()
    }

    /// The calls that are in this trace and were not yet in `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            calls: self.calls[earlier.calls.len()..].to_vec(),
        }
    }

    /// The first write that was not made durable before the next one began, if there is one.
    ///
    /// Where a guest writes one block after the other, each once the one before is complete, that is
    /// a write which completed before it was stable.
    pub fn unstable_write(&self) -> Option<&Call> {
        let writes: Vec<&Call> = self.calls.iter().filter(|call| call.writes).collect();
        writes.iter().enumerate().find_map(|(index, write)| {
            let next = writes.get(index + 1).map_or(usize::MAX, |next| next.began);
            let stable = write.syncs
                || self.calls.iter().any(|sync| {
                    sync.syncs
                        && write.ended.is_some_and(|ended| ended < sync.began)
                        && sync.ended.is_some_and(|ended| ended < next)
                });
            (!stable).then_some(*write)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(text: &str) -> Trace {
        Trace::parse(text, Path::new("/tmp/disk"))
    }

    const SYNCED: &str = "\
        10 write(1</dev/pts/0>, \"\"..., 80) = 80\n\
        11 pwrite64(7</tmp/disk>, \"\"..., 512, 0 <unfinished ...>\n\
        12 fdatasync(8</tmp/other>) = 0\n\
        11 <... pwrite64 resumed>) = 512\n\
        12 fdatasync(7</tmp/disk> <unfinished ...>\n\
        12 <... fdatasync resumed>) = 0\n\
        11 pwritev2(7</tmp/disk>, [{iov_base=\"\"..., iov_len=512}], 1, 512, RWF_DSYNC) = 512\n";

    #[test]
    fn only_calls_on_the_disk_are_counted() {
        let trace = trace(SYNCED);
        assert_eq!(
            (trace.calls().len(), trace.writes(), trace.syncs()),
            (3, 2, 2)
        );
        assert_eq!(trace.calls()[0].ended, Some(3));
    }

    #[test]
    fn a_write_with_a_sync_after_it_is_stable() {
        assert!(trace(SYNCED).unstable_write().is_none());
    }

    #[test]
    fn a_sync_that_began_before_the_write_ended_does_not_make_it_stable() {
        let trace = trace(
            "11 pwrite64(7</tmp/disk>, \"\"..., 512, 0 <unfinished ...>\n\
             12 fdatasync(7</tmp/disk> <unfinished ...>\n\
             11 <... pwrite64 resumed>) = 512\n\
             12 <... fdatasync resumed>) = 0\n",
        );
        assert_eq!(trace.unstable_write().unwrap().began, 0);
    }

    #[test]
    fn a_sync_that_ends_after_the_next_write_began_is_too_late() {
        let trace = trace(
            "11 pwrite64(7</tmp/disk>, \"\"..., 512, 0) = 512\n\
             12 fdatasync(7</tmp/disk> <unfinished ...>\n\
             11 pwrite64(7</tmp/disk>, \"\"..., 512, 512) = 512\n\
             12 <... fdatasync resumed>) = 0\n\
             12 fdatasync(7</tmp/disk>) = 0\n",
        );
        assert_eq!(trace.unstable_write().unwrap().began, 0);
    }
}
