//! What the simulated guest asks, and what it accepts as an answer.

use blockcore::io::policy::OnError;
use harness::frontend::blk::{self, IOERR, OK, UNSUPP, UNTOUCHED, kind};
use harness::history::{self, Flush, Flushed, Outcome, Read, Write};

use crate::guest::MAX_BYTES;
use crate::{SERIAL, Test};

const SECTOR: u64 = 512;

/// A request as the device sees it, and what the guest remembers of it.
pub(crate) struct Request {
    pub(crate) kind: u32,
    pub(crate) sector: u64,
    /// What the device reads after the header.
    pub(crate) output: Vec<u8>,
    /// How much the device writes before the status; there is no output then.
    pub(crate) input_bytes: u64,
    /// The last piece of its data is not in memory.
    pub(crate) outside: bool,
    what: What,
}

enum What {
    Read(Read),
    Write(Write),
    Zero(Vec<Write>),
    Discard(Vec<Write>),
    Flush { flush: Flush, lost_before: bool },
    Id,
    Refused(u8),
}

/// How a request ended.
pub(crate) struct Verdict {
    pub(crate) status: u8,
    pub(crate) length: u32,
    pub(crate) input: Vec<u8>,
}

impl Request {
    fn new(kind: u32, sector: u64, what: What) -> Self {
        Self {
            kind,
            sector,
            output: Vec::new(),
            input_bytes: 0,
            outside: false,
            what,
        }
    }

    /// A request as the seed will have it, which is about to be made.
    pub(crate) fn random(test: &Test) -> Self {
        let read_only = test.read_only.get();
        match test.below(100) {
            0..35 => Self::read(test),
            35..70 if !read_only => Self::write(test),
            70..77 if !read_only => Self::ranges(test, false),
            77..84 if !read_only => Self::ranges(test, true),
            84..94 => Self::flush(test),
            94..96 => Self {
                input_bytes: 20,
                ..Self::new(kind::GET_ID, 0, What::Id)
            },
            96.. => Self::refused(test),
            _ => Self::changes_nothing(test),
        }
    }

    fn read(test: &Test) -> Self {
        let (offset, bytes) = test.range();
        let read = test.history.borrow_mut().begin_read(offset, bytes);
        Self {
            input_bytes: bytes,
            ..Self::new(kind::IN, offset / SECTOR, What::Read(read))
        }
    }

    fn write(test: &Test) -> Self {
        let (offset, bytes) = test.range();
        let tag = test.next_tag.replace(test.next_tag.get() + 1);
        let write = test.history.borrow_mut().begin_write(tag, offset, bytes);
        Self {
            output: history::data(tag, offset, bytes),
            ..Self::new(kind::OUT, offset / SECTOR, What::Write(write))
        }
    }

    fn flush(test: &Test) -> Self {
        let flush = test.history.borrow_mut().begin_flush();
        let lost_before = test.lost.get();
        Self::new(kind::FLUSH, 0, What::Flush { flush, lost_before })
    }

    fn ranges(test: &Test, discard: bool) -> Self {
        let count = 1 + test.below(3);
        let mut history = test.history.borrow_mut();
        let mut writes = Vec::new();
        let mut output = Vec::new();
        for _ in 0..count {
            let (offset, mut bytes) = test.range();
            if test.chance(50) {
                bytes = 0;
            }
            let unmap = if discard { 0 } else { test.below(2) as u32 };
            let (sector, sectors) = (offset / SECTOR, (bytes / SECTOR) as u32);
            output.extend(blk::segment(sector, sectors, unmap));
            writes.push(history.begin_write(0, offset, bytes));
        }
        let (kind, what) = match discard {
            true => (kind::DISCARD, What::Discard(writes)),
            false => (kind::WRITE_ZEROES, What::Zero(writes)),
        };
        Self {
            output,
            ..Self::new(kind, 0, what)
        }
    }

    /// A change that a read-only disk refuses.
    fn changes_nothing(test: &Test) -> Self {
        let (offset, bytes) = test.range();
        let kinds = [kind::OUT, kind::DISCARD, kind::WRITE_ZEROES];
        let kind = kinds[test.below(3) as usize];
        let output = match kind {
            kind::OUT => vec![7; bytes as usize],
            _ => blk::segment(offset / SECTOR, (bytes / SECTOR) as u32, 0).to_vec(),
        };
        Self {
            output,
            ..Self::new(kind, offset / SECTOR, What::Refused(IOERR))
        }
    }

    /// Something that is wrong in itself, and must change nothing.
    fn refused(test: &Test) -> Self {
        let (offset, bytes) = test.range();
        let sectors = test.case.bytes / SECTOR;
        let (begin, count) = (offset / SECTOR, (bytes / SECTOR) as u32);
        let new = |kind, sector, status| Self::new(kind, sector, What::Refused(status));
        let with = |request: Self, output: Vec<u8>| Self { output, ..request };
        let good = blk::segment(begin, count, 0);
        // A read-only disk refuses changes before it looks at them.
        let status = |status: u8| if test.read_only.get() { IOERR } else { status };
        match test.below(12) {
            0 => Self {
                input_bytes: bytes,
                ..new([2, 5, 14, 0x8000_0000][test.below(4) as usize], 0, UNSUPP)
            },
            1 => Self {
                input_bytes: bytes,
                ..new(kind::IN, sectors + 1 - u64::from(count), IOERR)
            },
            2 => Self {
                input_bytes: bytes,
                ..new(kind::IN, u64::MAX - test.below(2), IOERR)
            },
            3 => with(new(kind::OUT, sectors, IOERR), vec![7; bytes as usize]),
            4 => with(new(kind::OUT, begin, IOERR), vec![7; bytes as usize - 1]),
            5 => Self {
                input_bytes: bytes + 1,
                ..new(kind::IN, begin, IOERR)
            },
            6 => with(
                new(kind::DISCARD, 0, status(UNSUPP)),
                [good, blk::segment(begin, count, blk::UNMAP)].concat(),
            ),
            7 => with(
                new(kind::WRITE_ZEROES, 0, status(UNSUPP)),
                [good, blk::segment(begin, count, 2)].concat(),
            ),
            8 => with(
                new(kind::WRITE_ZEROES, 0, IOERR),
                [good, blk::segment(sectors, 8, 0)].concat(),
            ),
            9 => with(
                new(kind::DISCARD, 0, IOERR),
                [vec![good; 17].concat(), good[..8].to_vec()][test.below(2) as usize].clone(),
            ),
            10 => new(kind::GET_ID, 0, IOERR),
            _ => match test.below(2) {
                0 => Self {
                    input_bytes: bytes,
                    outside: true,
                    ..new(kind::IN, begin, IOERR)
                },
                _ => Self {
                    outside: true,
                    ..with(new(kind::OUT, begin, IOERR), vec![7; bytes as usize])
                },
            },
        }
    }

    /// It could not be made after all.
    pub(crate) fn forget(self, test: &Test) {
        let mut history = test.history.borrow_mut();
        match self.what {
            What::Read(read) => {
                let _ = history.end_read(read, None);
            }
            What::Write(write) => history.end_write(write, Outcome::Failed),
            What::Zero(writes) | What::Discard(writes) => {
                for write in writes {
                    history.end_write(write, Outcome::Failed);
                }
            }
            What::Flush { flush, .. } => history.end_flush(flush, Flushed::Nothing),
            What::Id | What::Refused(_) => {}
        }
    }

    /// Looks at the answer.
    pub(crate) fn judge(self, test: &Test, queue: usize, verdict: &Verdict) {
        test.see(u64::from(verdict.status) << 32 | u64::from(verdict.length));
        let asked = format!(
            "queue {queue}, kind {}, sector {}, {} bytes out, {} in",
            self.kind,
            self.sector,
            self.output.len(),
            self.input_bytes
        );
        let fail = |why: String| test.fail(format!("{asked}: {why}"));
        let ok = verdict.status == OK;
        let right = match ok && self.output.is_empty() {
            true => self.input_bytes as u32 + 1,
            false => 1,
        };
        if verdict.length != right {
            fail(format!(
                "used length {} with status {:#x}, not {right}",
                verdict.length, verdict.status
            ));
        }
        test.count_answer(self.kind, &self.what, ok);
        let untouched = || verdict.input.iter().all(|byte| *byte == UNTOUCHED);
        let expected = match &self.what {
            What::Refused(status) => verdict.status == *status && untouched(),
            What::Id => ok,
            What::Read(_) => ok || (verdict.status == IOERR && test.reads_may_fail()),
            // One that waits for held changes fails with them.
            What::Flush { .. } => {
                let may_fail = test.syncs_may_fail() || test.case.holds();
                ok || (verdict.status == IOERR && may_fail)
            }
            What::Write(_) | What::Zero(_) | What::Discard(_) => {
                ok || (verdict.status == IOERR && test.writes_may_fail())
            }
        };
        if !expected {
            fail(format!("status {:#x}", verdict.status));
        }
        let mut history = test.history.borrow_mut();
        match self.what {
            What::Read(read) => {
                // One that failed and was ignored has anything for data.
                let ignored = test.case.on_error.reads == OnError::Ignore && test.reads_may_fail();
                let data = (ok && !ignored).then_some(verdict.input.as_slice());
                if let Err(wrong) = history.end_read(read, data) {
                    fail(wrong.to_string());
                }
            }
            What::Write(write) => history.end_write(write, test.outcome(ok)),
            What::Zero(writes) => {
                for write in writes {
                    history.end_write(write, test.outcome(ok));
                }
            }
            What::Discard(writes) => {
                for write in writes {
                    history.end_discard(write);
                }
            }
            What::Flush { flush, lost_before } => {
                let flushed = match ok {
                    // A read-only node has nothing to flush; an earlier life's writes are not its.
                    true if test.case.no_flush || test.read_only.get() => Flushed::Nothing,
                    true => Flushed::Done,
                    false if test.case.direct => Flushed::Nothing,
                    false => Flushed::Lost,
                };
                if lost_before && flushed == Flushed::Done {
                    fail("a flush succeeds after one was lost".into());
                }
                if flushed == Flushed::Lost && !test.case.holds() {
                    test.lost.set(true);
                }
                history.end_flush(flush, flushed);
            }
            What::Id => {
                let mut serial = SERIAL.as_bytes().to_vec();
                serial.resize(20, 0);
                if verdict.input != serial {
                    fail(format!("identification {:?}", verdict.input));
                }
            }
            What::Refused(_) => {}
        }
        drop(history);
        if !ok && test.flushes_can_be_lost() {
            // It may have been a failed sync of a write that had to be stable.
            let mut history = test.history.borrow_mut();
            let flush = history.begin_flush();
            history.end_flush(flush, Flushed::Lost);
        }
    }
}

impl Test {
    fn count_answer(&self, kind: u32, what: &What, ok: bool) {
        let mut seen = self.seen.borrow_mut();
        let refused = matches!(what, What::Refused(_));
        {
            let mut totals = self.totals.borrow_mut();
            totals.requests += 1;
            totals.refused += u64::from(refused);
            totals.failed += u64::from(!ok && !refused);
        }
        seen.errors += u64::from(!ok);
        match what {
            What::Refused(_) | What::Id => {}
            What::Read(_) => seen.reads += 1,
            What::Write(_) => seen.writes += 1,
            What::Flush { .. } => seen.flushes += 1,
            What::Zero(_) | What::Discard(_) => seen.ranges += 1,
        }
        // Ranges are refused one by one, after the request was counted as one of its kind.
        if refused && matches!(kind, kind::DISCARD | kind::WRITE_ZEROES) {
            seen.refused_ranges += 1;
        }
    }

    /// A range of the disk in whole blocks, mostly small.
    fn range(&self) -> (u64, u64) {
        let block = u64::from(self.case.block_bytes);
        let blocks = self.case.bytes / block;
        let most = match self.below(100) {
            0..5 => (MAX_BYTES / block).min(blocks),
            _ => (8192 / block).clamp(1, blocks),
        };
        let (mut begin, mut count) = (0, 1 + self.below(most));
        begin += self.below(blocks - count + 1);
        if self.chance(500) {
            // Where the path without a task is.
            let unit = 4096 / block;
            begin -= begin % unit;
            count = count.next_multiple_of(unit).min(blocks - begin);
        }
        (begin * block, count * block)
    }

    fn outcome(&self, ok: bool) -> Outcome {
        let ignored = self.case.on_error.writes == OnError::Ignore && self.writes_may_fail();
        match ok && !ignored {
            true if self.stable.get() && !self.case.no_flush => Outcome::Stable,
            true => Outcome::Done,
            false => Outcome::Failed,
        }
    }

    fn reads_may_fail(&self) -> bool {
        let faults = &self.case.faults;
        faults.read_error_permille > 0 || faults.call_error_permille > 0
    }

    fn writes_may_fail(&self) -> bool {
        let faults = &self.case.faults;
        self.reads_may_fail()
            || self.syncs_may_fail()
            || faults.write_error_permille > 0
            || faults.allocate_error_permille > 0
            || faults.no_space_permille > 0
            || faults.stalled_permille > 0
            || self.case.capacity.is_some()
    }

    fn syncs_may_fail(&self) -> bool {
        self.case.faults.sync_error_permille > 0
    }
}
