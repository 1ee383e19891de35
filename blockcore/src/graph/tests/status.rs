//! What ranges are, layer by layer.

use super::*;
use crate::io::RequestKind;

const DATA: StatusFlags = StatusFlags::DATA;
const ZERO: StatusFlags = StatusFlags::ZERO;
const ALLOCATED: StatusFlags = StatusFlags::ALLOCATED;
const END: StatusFlags = StatusFlags::END;
const PLACE: StatusFlags = StatusFlags::PLACE;

impl Bench {
    fn status(&self, root: &Rc<Root>, exact: bool, offset: u64, bytes: u64) -> Status {
        let root = Rc::clone(root);
        let status = self.run(async move {
            let request = root.enter(RequestKind::Other, offset, bytes).await;
            request.block_status(exact, offset, bytes).await
        });
        status.unwrap()
    }

    /// The answer of the chain down to `base`: flags, bytes, depth.
    fn above(
        &self,
        root: &Rc<Root>,
        base: Option<&'static str>,
        offset: u64,
        bytes: u64,
    ) -> (StatusFlags, u64, usize) {
        let root = Rc::clone(root);
        let status = self.run(async move {
            let request = root.enter(RequestKind::Other, offset, bytes).await;
            let is_base = |io: Io<'_>| Some(io.name()) == base;
            request
                .io()
                .status_above(is_base, true, offset, bytes)
                .await
        });
        let (status, depth) = status.unwrap();
        (status.flags, status.bytes, depth)
    }
}

/// A layer of 8 KiB that holds its second kilobyte, above one of 4 KiB that holds its first two.
fn layers() -> (Bench, Rc<Root>) {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=base,file.driver=memory,file.size=4k");
    let below = bench.root("base", writer());
    bench.write(&below, 0, 2048, 1).unwrap();
    let id = below.id();
    drop(below);
    bench.remove_root(id).unwrap();
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.size=8k,backing=base");
    let root = bench.root("disk", writer());
    bench.write(&root, 1024, 1024, 2).unwrap();
    (bench, root)
}

#[test]
fn a_layer_answers_for_itself_and_defers_without_calling_it_zero() {
    let (bench, root) = layers();
    let status = bench.status(&root, true, 0, 8192);
    assert_eq!((status.flags, status.bytes), (StatusFlags::empty(), 1024));
    let status = bench.status(&root, true, 1024, 8192);
    assert_eq!(
        (status.flags, status.bytes),
        (DATA | PLACE | ALLOCATED, 1024)
    );
    assert_eq!(
        status.place,
        Place {
            child: Some(0),
            offset: 1024
        }
    );
}

#[test]
fn what_is_past_a_short_backing_node_is_zero_and_not_allocated() {
    let (bench, root) = layers();
    let status = bench.status(&root, true, 4096, 4096);
    assert_eq!((status.flags, status.bytes), (ZERO | END, 4096));
    assert_eq!(bench.read(&root, 4096, 512).unwrap(), [0; 512]);
    // Without a wish for zeroes they are not looked for.
    let status = bench.status(&root, false, 4096, 4096);
    assert_eq!(status.flags, END);
}

#[test]
fn what_no_layer_holds_is_zero_and_not_allocated() {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=disk,file.driver=memory");
    let root = bench.root("disk", reader());
    assert_eq!(bench.status(&root, true, 0, 512).flags, ZERO);
    let whole = bench.status(&root, true, 0, 65536);
    assert_eq!((whole.flags, whole.bytes), (ZERO | END, 65536));
}

#[test]
fn inside_an_answer_has_bytes_and_past_the_end_it_has_none() {
    let (bench, root) = layers();
    for offset in (0..8192).step_by(512) {
        let status = bench.status(&root, true, offset, 1 << 40);
        assert!(
            status.bytes > 0 && offset + status.bytes <= 8192,
            "{offset}: {status:?}"
        );
        assert_eq!(status.flags.contains(END), offset + status.bytes == 8192);
    }
    for offset in [8192, 1 << 40] {
        assert_eq!(bench.status(&root, true, offset, 512), Status::new(END, 0));
    }
    assert_eq!(bench.status(&root, true, 0, 0).bytes, 0);
}

#[test]
fn a_longer_answer_than_was_asked_for_is_cut() {
    let (bench, root) = layers();
    let status = bench.status(&root, true, 1024, 512);
    assert_eq!(
        (status.flags, status.bytes),
        (DATA | PLACE | ALLOCATED, 512)
    );
}

#[test]
fn an_offset_inside_a_unit_is_answered_for_the_rest_of_it() {
    let (bench, root) = layers();
    let status = bench.status(&root, true, 1100, 100);
    assert_eq!(status.bytes, 100);
    assert_eq!(status.place.offset, 1100);
}

#[test]
fn a_filter_gives_the_answer_of_what_it_filters() {
    let (bench, root) = layers();
    let expected = bench.status(&root, true, 1024, 4096);
    bench.add("driver=pass,node-name=top,file=disk");
    let top = bench.root("top", easy_reader());
    let status = bench.status(&top, true, 1024, 4096);
    assert_eq!(
        (status.flags, status.bytes),
        (expected.flags, expected.bytes)
    );
    assert_eq!(
        status.place,
        Place {
            child: Some(0),
            offset: 1024
        }
    );
}

#[test]
fn a_protocol_that_says_nothing_is_data_where_it_is() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,size=4k");
    let root = bench.root("disk", reader());
    let status = bench.status(&root, true, 512, 8192);
    assert_eq!(
        (status.flags, status.bytes),
        (DATA | PLACE | ALLOCATED | END, 3584)
    );
    assert_eq!(
        status.place,
        Place {
            child: None,
            offset: 512
        }
    );
}

#[test]
fn a_chain_answers_with_the_layer_that_decides() {
    let (bench, root) = layers();
    assert_eq!(
        bench.above(&root, None, 1024, 1024),
        (DATA | PLACE | ALLOCATED, 1024, 0)
    );
    assert_eq!(
        bench.above(&root, None, 0, 8192),
        (DATA | PLACE | ALLOCATED, 1024, 1)
    );
    // A short layer's zeroes are its own.
    let (flags, bytes, depth) = bench.above(&root, None, 4096, 4096);
    assert!(
        flags.contains(ZERO) && bytes == 4096 && depth <= 1,
        "{flags:?} {bytes} {depth}"
    );
}

#[test]
fn a_chain_is_asked_down_to_its_base_and_not_the_base_itself() {
    let (bench, root) = layers();
    let (flags, bytes, depth) = bench.above(&root, Some("base"), 0, 8192);
    assert_eq!((flags, bytes, depth), (StatusFlags::empty(), 1024, 0));
}

#[test]
fn allocated_and_zero_are_two_things() {
    let (bench, root) = layers();
    let root = Rc::clone(&root);
    let found = bench.run(async move {
        let request = root.enter(RequestKind::Other, 0, 0).await;
        let mut found = Vec::new();
        for offset in [0, 1024, 2048, 4096] {
            found.push(request.io().is_allocated(offset, 8192).await.unwrap());
        }
        found
    });
    assert_eq!(
        found,
        [(false, 1024), (true, 1024), (false, 6144), (false, 4096)]
    );
}
