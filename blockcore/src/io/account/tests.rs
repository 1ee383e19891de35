use super::*;
use crate::ErrorKind;

const fn us(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn open(options: AccountOptions) -> (Arc<Account>, Recorder) {
    Account::open(options, ms(1000)).unwrap()
}

fn sum(accounts: &[&Arc<Account>], now: Duration) -> AccountSum {
    let mut sum = AccountSum::new(now);
    accounts.iter().for_each(|account| sum.add(account));
    sum
}

/// The bins of reads.
fn bins(account: &Arc<Account>) -> Option<Vec<u64>> {
    let sum = sum(&[account], ms(0));
    sum.kind(Kind::Read)
        .histogram
        .as_ref()
        .map(|one| one.bins.clone())
}

#[test]
fn each_outcome_has_its_counter_and_each_kind_its_own() {
    let (account, recorder) = open(AccountOptions::default());
    recorder.done(Kind::Read, 4096, ms(2000), ms(2003));
    recorder.done(Kind::Read, 512, ms(2001), ms(2003));
    recorder.failed(Kind::Read, ms(2000), ms(2010));
    recorder.invalid(Kind::Write, ms(2020));
    recorder.merged(Kind::Write, 3);
    recorder.done(Kind::Flush, 0, ms(2019), ms(2020));
    let sum = sum(&[&account], ms(2050));
    let read = KindSum {
        operations: 2,
        bytes: 4608,
        failed: 1,
        time_ns: 15_000_000,
        ..KindSum::default()
    };
    let write = KindSum {
        invalid: 1,
        merged: 3,
        ..KindSum::default()
    };
    assert_eq!(*sum.kind(Kind::Read), read);
    assert_eq!(*sum.kind(Kind::Write), write);
    assert_eq!(sum.kind(Kind::Flush).operations, 1);
    for kind in [Kind::Discard, Kind::WriteZeroes] {
        assert_eq!(*sum.kind(kind), KindSum::default());
    }
    assert_eq!(sum.idle(), Some(ms(30)));
}

#[test]
fn what_was_never_used_has_not_been_idle_for_any_time() {
    let (account, recorder) = open(AccountOptions::default());
    assert_eq!(sum(&[&account], ms(5000)).idle(), None);
    recorder.merged(Kind::Read, 1);
    assert_eq!(sum(&[&account], ms(5000)).idle(), None);
}

#[test]
fn failed_and_invalid_requests_are_no_accesses_where_they_are_not_to_count() {
    let (account, recorder) = open(AccountOptions {
        failed: false,
        invalid: false,
        intervals: vec![ms(1000)],
    });
    let histogram = Histogram::new(&[1]).unwrap();
    account.set_histogram(Kind::Read, Some(histogram));
    recorder.done(Kind::Read, 512, ms(1100), ms(1101));
    recorder.failed(Kind::Read, ms(1100), ms(1200));
    recorder.invalid(Kind::Read, ms(1300));
    let sum = sum(&[&account], ms(1401));
    let read = sum.kind(Kind::Read);
    assert_eq!((read.failed, read.invalid), (1, 1));
    assert_eq!((read.time_ns, sum.idle()), (1_000_000, Some(ms(300))));
    assert_eq!(sum.latencies(ms(1000), Kind::Read).unwrap().requests(), 1);
    // As in QEMU, a histogram has them all.
    assert_eq!(bins(&account), Some(vec![0, 2]));
}

#[test]
fn a_latency_on_a_boundary_belongs_to_the_bin_above_it() {
    let (account, recorder) = open(AccountOptions::default());
    let histogram = Histogram::new(&[10_000, 50_000, 100_000]).unwrap();
    account.set_histogram(Kind::Read, Some(histogram));
    for latency in [0, 9, 10, 49, 50, 99, 100, 5_000_000] {
        recorder.done(Kind::Read, 512, ms(2000), ms(2000) + us(latency));
        recorder.done(Kind::Write, 512, ms(2000), ms(2000) + us(latency));
    }
    assert_eq!(bins(&account), Some(vec![2, 2, 2, 2]));
    assert_eq!(sum(&[&account], ms(0)).kind(Kind::Write).histogram, None);
}

#[test]
fn a_histogram_is_replaced_by_an_empty_one_and_removed() {
    let (account, recorder) = open(AccountOptions::default());
    let done = || recorder.done(Kind::Read, 512, ms(2000), ms(2001));
    done();
    assert_eq!(bins(&account), None);
    let first = Histogram::new(&[1000, 2000]).unwrap();
    let fresh = first.fresh();
    account.set_histogram(Kind::Read, Some(first));
    done();
    done();
    assert_eq!(bins(&account), Some(vec![0, 0, 2]));
    account.set_histogram(Kind::Read, Some(fresh));
    assert_eq!(bins(&account), Some(vec![0, 0, 0]));
    done();
    assert_eq!(bins(&account), Some(vec![0, 0, 1]));
    let none = Histogram::new(&[]).unwrap();
    account.set_histogram(Kind::Read, Some(none));
    done();
    assert_eq!(bins(&account), Some(vec![1]));
    account.set_histogram(Kind::Read, None);
    done();
    assert_eq!(bins(&account), None);
}

#[test]
fn boundaries_that_do_not_ascend_from_above_zero_are_refused() {
    let many: Vec<u64> = (1..=MAX_BOUNDARIES as u64 + 1).collect();
    for bad in [&[0, 1][..], &[5, 5], &[5, 4], &many] {
        let error = Histogram::new(bad).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    assert!(Histogram::new(&many[1..]).is_ok());
}

#[test]
fn accounts_add_up_and_bins_do_where_their_boundaries_are_the_same() {
    let options = || AccountOptions {
        intervals: vec![ms(500)],
        ..AccountOptions::default()
    };
    let ((one, first), (two, second)) = (open(options()), open(options()));
    let histogram = Histogram::new(&[1_500_000]).unwrap();
    two.set_histogram(Kind::Read, Some(histogram.fresh()));
    one.set_histogram(Kind::Read, Some(histogram));
    first.done(Kind::Read, 512, ms(1100), ms(1101));
    first.done(Kind::WriteZeroes, 4096, ms(1100), ms(1103));
    second.done(Kind::Read, 1024, ms(1100), ms(1102));
    second.done(Kind::Write, 8192, ms(1100), ms(1101));
    let both = sum(&[&one, &two], ms(1110));
    let read = both.kind(Kind::Read);
    assert_eq!((read.operations, read.bytes), (2, 1536));
    assert_eq!(read.histogram.as_ref().unwrap().bins, [1, 1]);
    assert_eq!(both.idle(), Some(ms(7)));
    let latencies = both.latencies(ms(500), Kind::Read).unwrap();
    let (min, average, max) = (
        latencies.min_ns(),
        latencies.average_ns(),
        latencies.max_ns(),
    );
    assert_eq!((min, average, max), (1_000_000, 1_500_000, 2_000_000));

    let mut written = both.kind(Kind::Write).clone();
    written.add(both.kind(Kind::WriteZeroes));
    assert_eq!((written.operations, written.bytes), (2, 12_288));

    let other = Histogram::new(&[7]).unwrap();
    two.set_histogram(Kind::Read, Some(other));
    let both = sum(&[&one, &two], ms(1110));
    let histogram = both.kind(Kind::Read).histogram.as_ref().unwrap();
    assert_eq!(
        (&*histogram.boundaries_ns, &histogram.bins[..]),
        (&[1_500_000][..], &[1, 0][..])
    );
}

#[test]
fn what_an_account_held_is_kept_when_it_is_gone() {
    let (account, recorder) = open(AccountOptions::default());
    let histogram = Histogram::new(&[9]).unwrap();
    account.set_histogram(Kind::Write, Some(histogram));
    recorder.done(Kind::Write, 512, ms(2000), ms(2001));
    let past = sum(&[&account], ms(2002));
    drop((account, recorder));
    let mut sum = AccountSum::new(ms(3001));
    sum.add_past(&past);
    assert_eq!(sum.kind(Kind::Write), past.kind(Kind::Write));
    assert_eq!(sum.kind(Kind::Write).operations, 1);
    assert_eq!(sum.idle(), Some(ms(1000)));
}

#[test]
fn an_interval_has_its_later_half_at_least_and_nothing_from_before_it() {
    let (account, recorder) = open(AccountOptions {
        intervals: vec![ms(1000), ms(60_000)],
        ..AccountOptions::default()
    });
    // One request every 10 ms, each slower than the one before it by a microsecond.
    for index in 0..1000_u64 {
        let now = ms(1000 + 10 * index);
        recorder.done(Kind::Read, 512, now - us(index), now);
        let sum = sum(&[&account], now);
        let latencies = sum.latencies(ms(1000), Kind::Read).unwrap();
        let covered = index - latencies.min_ns() / 1000 + 1;
        assert_eq!(latencies.requests(), covered, "at {now:?}");
        assert!(covered <= 100, "{covered} at {now:?}");
        assert!(covered > 50 || covered == index + 1, "{covered} at {now:?}");
        assert_eq!(latencies.max_ns(), index * 1000);
        let average = (latencies.min_ns() + latencies.max_ns()) / 2;
        assert_eq!(latencies.average_ns(), average);
    }
    let sum = sum(&[&account], ms(10_990));
    assert_eq!(sum.intervals().collect::<Vec<_>>(), [ms(1000), ms(60_000)]);
    let all = sum.latencies(ms(60_000), Kind::Read).unwrap();
    assert_eq!((all.requests(), all.min_ns()), (1000, 0));
    assert!(sum.latencies(ms(1), Kind::Read).is_none());
}

#[test]
fn an_interval_without_requests_is_empty_though_nobody_writes_it() {
    let (account, recorder) = open(AccountOptions {
        intervals: vec![ms(100)],
        ..AccountOptions::default()
    });
    recorder.done(Kind::Read, 512, ms(1010), ms(1020));
    let requests = |now| {
        let sum = sum(&[&account], now);
        sum.latencies(ms(100), Kind::Read).unwrap().requests()
    };
    assert_eq!(requests(ms(1049)), 1);
    for now in [1100, 1149, 1150, 1200, 7777] {
        assert_eq!(requests(ms(now)), 0, "at {now}");
    }
    recorder.done(Kind::Read, 512, ms(9000), ms(9001));
    assert_eq!(requests(ms(9002)), 1);
    let sum = sum(&[&account], ms(9500));
    let empty = sum.latencies(ms(100), Kind::Read).unwrap();
    assert_eq!(
        (empty.min_ns(), empty.average_ns(), empty.max_ns()),
        (0, 0, 0)
    );
}

#[test]
fn the_average_queue_depth_is_how_many_were_under_way() {
    let (account, recorder) = open(AccountOptions {
        intervals: vec![ms(1000)],
        ..AccountOptions::default()
    });
    // Eight at a time, each of 4 ms.
    for step in 0..500 {
        for _ in 0..8 {
            let start = ms(1000 + 4 * step);
            recorder.done(Kind::Write, 512, start, start + ms(4));
        }
    }
    let sum = sum(&[&account], ms(3000));
    let depth = sum.latencies(ms(1000), Kind::Write).unwrap();
    let depth = depth.average_queue_depth();
    assert!((depth - 8.0).abs() < 0.1, "{depth}");
}

#[test]
fn intervals_that_make_no_sense_are_refused_and_long_ones_do_not_overflow() {
    let opened = |intervals: Vec<Duration>| {
        let options = AccountOptions {
            intervals,
            ..AccountOptions::default()
        };
        Account::open(options, ms(1000))
    };
    assert!(opened(vec![Duration::ZERO]).is_err());
    assert!(opened(vec![ms(1); MAX_INTERVALS + 1]).is_err());
    let (account, recorder) = opened(vec![Duration::MAX, Duration::from_nanos(1)]).unwrap();
    recorder.done(Kind::Read, 512, ms(0), Duration::MAX);
    let sum = sum(&[&account], Duration::MAX);
    assert_eq!(sum.kind(Kind::Read).operations, 1);
}

#[test]
fn a_reader_beside_the_worker_sees_counters_that_only_rise() {
    const REQUESTS: u64 = 400_000;
    let (account, recorder) = open(AccountOptions {
        intervals: vec![us(20)],
        ..AccountOptions::default()
    });
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let recorder = recorder;
            for step in 1..=REQUESTS {
                let now = ms(1000) + us(step);
                recorder.done(Kind::Read, 512, now - us(5), now);
            }
        });
        let mut last = 0;
        while last < REQUESTS {
            // Before the worker, so that no window is over for the reader.
            let sum = sum(&[&account], ms(1000));
            let latencies = sum.latencies(us(20), Kind::Read).unwrap();
            assert!(latencies.requests() <= 20, "{}", latencies.requests());
            let operations = sum.kind(Kind::Read).operations;
            assert!(operations >= last, "{operations} after {last}");
            last = operations;
        }
    });
}
