//! Walking down a chain: layers, filters between them, and what is what.

use super::*;

/// top (filter) - disk - hidden (implicit filter) - mid - base.
fn chain() -> Bench {
    let bench = Bench::new();
    bench.add("driver=layer,node-name=base,read-only=on,file.driver=memory");
    bench.add("driver=layer,node-name=mid,read-only=on,file.driver=memory,backing=base");
    bench.add("driver=pass,node-name=hidden,read-only=on,file=mid");
    bench.add("driver=layer,node-name=disk,file.driver=memory,file.node-name=file,backing=hidden");
    bench.add("driver=pass,node-name=top,file=disk");
    let control = bench.control.clone();
    bench
        .run(async move {
            let mut change = control.begin().await;
            let hidden = change.find("hidden")?;
            change.set_implicit(hidden);
            change.prepare().await?.commit().finish().await
        })
        .unwrap();
    bench
}

impl Bench {
    fn ids<const N: usize>(&self, names: [&str; N]) -> [NodeId; N] {
        names.map(|name| self.id(name))
    }
}

#[test]
fn a_filter_has_a_filtered_child_and_a_layer_a_backing_one_and_neither_both() {
    let bench = chain();
    let [top, disk, hidden, base] = bench.ids(["top", "disk", "hidden", "base"]);
    bench.control.read(|graph| {
        assert_eq!(
            (graph.filtered_by(top), graph.backing_of(top)),
            (Some(disk), None)
        );
        assert_eq!(
            (graph.filtered_by(disk), graph.backing_of(disk)),
            (None, Some(hidden))
        );
        assert_eq!(
            (graph.filtered_by(base), graph.backing_of(base)),
            (None, None)
        );
        assert_eq!(graph.next_in_chain(top), Some(disk));
        assert_eq!(graph.next_in_chain(disk), Some(hidden));
        assert_eq!(graph.next_in_chain(base), None);
    });
}

#[test]
fn the_primary_child_is_what_a_filter_passes_and_where_a_format_lies() {
    let bench = chain();
    let [top, disk, file] = bench.ids(["top", "disk", "file"]);
    bench.control.read(|graph| {
        assert_eq!(graph.primary_child(top), Some(disk));
        assert_eq!(graph.primary_child(disk), Some(file));
        assert_eq!(graph.primary_child(file), None);
    });
}

#[test]
fn filters_are_skipped_all_or_only_those_the_core_put_in() {
    let bench = chain();
    let [top, disk, hidden, mid] = bench.ids(["top", "disk", "hidden", "mid"]);
    bench.control.read(|graph| {
        assert_eq!(graph.skip_filters(top), disk);
        assert_eq!(graph.skip_filters(disk), disk);
        assert_eq!(graph.skip_filters(hidden), mid);
        assert_eq!(graph.skip_implicit(top), top);
        assert_eq!(graph.skip_implicit(hidden), mid);
    });
}

#[test]
fn layers_follow_each_other_whatever_filters_are_between() {
    let bench = chain();
    let [top, disk, hidden, mid, base] = bench.ids(["top", "disk", "hidden", "mid", "base"]);
    bench.control.read(|graph| {
        assert_eq!(graph.backing_chain_next(top), Some(mid));
        assert_eq!(graph.backing_chain_next(disk), Some(mid));
        assert_eq!(graph.backing_chain_next(hidden), Some(base));
        assert_eq!(graph.backing_chain_next(base), None);
        assert_eq!(
            graph.chain(top).collect::<Vec<_>>(),
            [top, disk, hidden, mid, base]
        );
        assert_eq!(graph.base_of(top), base);
        assert_eq!(graph.base_of(base), base);
        assert_eq!(
            [top, disk, mid, base].map(|id| graph.chain_depth(id)),
            [2, 2, 1, 0]
        );
    });
}

#[test]
fn an_overlay_is_the_layer_above_in_this_very_chain() {
    let bench = chain();
    bench.add("driver=memory,node-name=stranger");
    let [top, disk, hidden, mid, base] = bench.ids(["top", "disk", "hidden", "mid", "base"]);
    let stranger = bench.id("stranger");
    bench.control.read(|graph| {
        assert_eq!(graph.overlay_of(top, mid), Some(disk));
        assert_eq!(graph.overlay_of(top, hidden), Some(disk));
        assert_eq!(graph.overlay_of(top, base), Some(mid));
        assert_eq!(graph.overlay_of(disk, disk), None);
        assert_eq!(graph.overlay_of(mid, disk), None);
        assert_eq!(graph.overlay_of(top, stranger), None);
    });
}

#[test]
fn a_chain_contains_its_filters_and_not_what_holds_its_layers() {
    let bench = chain();
    let [top, hidden, base, file] = bench.ids(["top", "hidden", "base", "file"]);
    bench.control.read(|graph| {
        assert!(graph.chain_contains(top, top));
        assert!(graph.chain_contains(top, hidden));
        assert!(graph.chain_contains(top, base));
        assert!(!graph.chain_contains(top, file));
        assert!(!graph.chain_contains(base, top));
    });
}
