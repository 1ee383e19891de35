//! One worker's table, and who is asked. Requests that move data while others run are in the tests
//! package (`moves`).

#![expect(
    clippy::single_range_in_vec_init,
    reason = "a wait for one range is the rule"
)]

use futures_util::FutureExt;

use super::*;
use crate::engine::{EngineChoice, make};
use crate::io::IoContext;

fn node(number: u64) -> NodeId {
    NodeId(number)
}

/// What a wait that begins now would wait for: `true` if nothing.
fn is_free(uses: &Uses, node: NodeId, child: usize, ranges: &[Range<u64>]) -> bool {
    waits(uses, node, child, ranges).now_or_never().is_some()
}

fn waits(uses: &Uses, node: NodeId, child: usize, ranges: &[Range<u64>]) -> oneshot::Receiver<()> {
    let (reply, answer) = oneshot::channel();
    uses.when_unused(node, child, ranges, reply);
    answer
}

#[test]
fn a_wait_is_for_uses_of_the_same_bytes_of_the_same_child_of_the_same_node() {
    let uses = Uses::default();
    let open = uses.begin(node(1), 0, 4096, 4096);
    let bytes = |begin, end| [begin..end];
    assert!(!is_free(&uses, node(1), 0, &bytes(4096, 8192)));
    assert!(!is_free(&uses, node(1), 0, &bytes(8191, 8192)));
    assert!(!is_free(&uses, node(1), 0, &bytes(0, 4097)));
    assert!(!is_free(&uses, node(1), 0, &[0..1, 4100..4101, 9000..9001]));
    assert!(is_free(&uses, node(1), 0, &[0..4096, 8192..u64::MAX]));
    assert!(is_free(&uses, node(1), 1, &bytes(4096, 8192)));
    assert!(is_free(&uses, node(2), 0, &bytes(4096, 8192)));
    assert!(is_free(&uses, node(1), 0, &[]));
    uses.end(open);
    assert!(is_free(&uses, node(1), 0, &bytes(0, u64::MAX)));
}

#[test]
fn a_wait_ends_with_the_last_use_that_was_open_when_it_began_whatever_began_later() {
    let uses = Uses::default();
    let first = uses.begin(node(1), 0, 0, 512);
    let second = uses.begin(node(1), 0, 512, 512);
    let mut wait = waits(&uses, node(1), 0, &[0..u64::MAX]);
    uses.end(first);
    // In the place of the first one.
    let later = uses.begin(node(1), 0, 0, 512);
    assert_eq!(wait.try_recv(), Ok(None));
    uses.end(second);
    assert_eq!(wait.try_recv(), Ok(Some(())));
    assert!(!is_free(&uses, node(1), 0, &[0..512]));
    uses.end(later);
    assert!(uses.table.borrow().waits.is_empty());
}

#[test]
fn a_use_at_the_end_of_the_largest_number_does_not_wrap() {
    let uses = Uses::default();
    let open = uses.begin(node(1), 0, u64::MAX - 511, 4096);
    assert!(is_free(&uses, node(1), 0, &[0..u64::MAX - 511]));
    assert!(!is_free(&uses, node(1), 0, &[u64::MAX - 1..u64::MAX]));
    uses.end(open);
}

#[test]
fn ranges_are_taken_in_any_order_and_joined_where_they_meet() {
    let ordered = |ranges: &[Range<u64>]| in_order(ranges.into()).to_vec();
    assert_eq!(ordered(&[8..9, 0..4, 4..6, 2..3, 7..7]), [0..6, 8..9]);
    assert_eq!(ordered(&[0..4, 5..6]), [0..4, 5..6]);
    assert_eq!(ordered(&[]), []);
    assert_eq!(ordered(&[3..3]), []);
}

#[test]
fn a_worker_with_several_plans_is_asked_once_and_one_that_is_gone_uses_nothing() {
    let context = || IoContext::new(make(EngineChoice::Threads).expect("threads are there"));
    let (here, there) = (context(), context());
    let servers = Servers::default();
    for worker in [&here, &there, &here] {
        servers.register(worker.handle());
    }
    let whole = || Arc::from([0..u64::MAX]);
    let open = here.uses().begin(node(1), 0, 0, 512);
    let open_there = there.uses().begin(node(1), 0, 0, 512);
    let mut wait = Box::pin(servers.wait_unused(node(1), 0, whole()));
    for worker in [&here, &there] {
        worker.turn(&mut Vec::new());
    }
    assert_eq!(here.uses().table.borrow().waits.len(), 1);
    here.uses().end(open);
    assert!(wait.as_mut().now_or_never().is_none());
    // Killed with a request under way.
    there.abandon();
    assert!(wait.now_or_never().is_some());
    let late = servers.wait_unused(node(1), 0, whole());
    here.turn(&mut Vec::new());
    assert!(late.now_or_never().is_some());
    there.uses().end(open_there);
    servers.retire(here.handle());
    assert_eq!(servers.table().len(), 2);
}
