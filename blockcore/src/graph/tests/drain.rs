//! Drained sections: who is held, who is waited for, and until when.

use super::*;
use crate::drain::{Drained, Scope};
use crate::io::{Request, RequestKind};

impl Bench {
    /// Begins a section and gives it out once it has begun.
    fn draining(&self, scope: Scope) -> Rc<RefCell<Option<Drained>>> {
        let begun = Rc::<RefCell<Option<Drained>>>::default();
        let (control, place) = (self.control.clone(), Rc::clone(&begun));
        self.worker.context().spawn(async move {
            let drained = control.drain(scope).await;
            place.replace(Some(drained));
        });
        self.settle();
        begun
    }

    fn drained(&self, scope: Scope) -> Drained {
        let begun = self.draining(scope);
        begun.take().expect("nothing is in flight")
    }

    fn nodes(&self, name: &str) -> Scope {
        Scope::Nodes([self.id(name)].into())
    }
}

fn enter(root: &Rc<Root>, kind: RequestKind) -> Option<Request> {
    root.try_enter(kind, 0, 0)
}

#[test]
fn sections_nest_and_requests_go_on_with_the_last_end() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    let outer = bench.drained(bench.nodes("disk"));
    let inner = bench.drained(Scope::All);
    assert!(enter(&root, RequestKind::Read).is_none());
    drop(outer);
    bench.settle();
    assert!(enter(&root, RequestKind::Read).is_none());
    drop(inner);
    bench.settle();
    assert!(enter(&root, RequestKind::Read).is_some());
    assert!(!bench.control.is_drained());
}

#[test]
fn every_kind_of_request_is_waited_for() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    for kind in [
        RequestKind::Read,
        RequestKind::Write,
        RequestKind::WriteZeroes,
        RequestKind::Discard,
        RequestKind::Flush,
        RequestKind::Truncate,
        RequestKind::Other,
    ] {
        let request = enter(&root, kind).unwrap();
        let begun = bench.draining(bench.nodes("disk"));
        assert!(begun.borrow().is_none(), "{kind:?} is under way");
        assert!(enter(&root, RequestKind::Read).is_none());
        drop(request);
        bench.settle();
        assert!(begun.take().is_some(), "{kind:?} has ended");
        bench.settle();
    }
}

#[test]
fn a_request_that_comes_meanwhile_waits_and_does_not_fail() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    let section = bench.drained(bench.nodes("disk"));
    let done = Rc::new(RefCell::new(None));
    let (inner, place) = (Rc::clone(&root), Rc::clone(&done));
    bench.worker.context().spawn(async move {
        let from = Segments::allocate(512, 512);
        let written = inner.write(0, from, WriteFlags::empty()).await;
        place.replace(Some(written));
    });
    bench.settle();
    assert_eq!(*done.borrow(), None);
    drop(section);
    bench.settle();
    assert_eq!(*done.borrow(), Some(Ok(())));
}

#[test]
fn a_section_holds_every_user_above_its_node_and_nobody_else() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=base,read-only=on");
    bench.add("driver=pass,node-name=one,read-only=on,file=base");
    bench.add("driver=pass,node-name=two,read-only=on,file=base");
    bench.add("driver=memory,node-name=other");
    let roots = ["one", "two", "base", "other"].map(|name| bench.root(name, reader()));
    let held = || roots.each_ref().map(|root| root.is_held());
    let section = bench.drained(bench.nodes("base"));
    assert_eq!(held(), [true, true, true, false]);
    drop(section);
    bench.settle();
    let section = bench.drained(bench.nodes("one"));
    assert_eq!(held(), [true, false, false, false]);
    drop(section);
    bench.settle();
    // Whoever reaches what is below.
    let section = bench.drained(Scope::Subtrees([bench.id("one")].into()));
    assert_eq!(held(), [true, true, true, false]);
    drop(section);
    bench.settle();
    assert_eq!(held(), [false; 4]);
}

#[test]
fn a_user_that_comes_to_be_above_a_drained_node_is_held_from_its_first_moment() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let section = bench.drained(bench.nodes("disk"));
    let root = bench.root("disk", writer());
    assert!(root.is_held());
    let late = bench.root("disk", easy_reader());
    drop(section);
    bench.settle();
    assert!(!root.is_held() && !late.is_held());
}

#[test]
fn a_node_opened_while_all_are_drained_is_drained_too() {
    let bench = Bench::new();
    let section = bench.drained(Scope::All);
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    assert!(root.is_held());
    assert_eq!(told_of("drain"), ["disk drain begin"]);
    drop(section);
    bench.settle();
    assert!(!root.is_held());
    assert_eq!(told_of("drain"), ["disk drain end"]);
}

#[test]
fn a_node_that_goes_while_all_are_drained_takes_nothing_with_it() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=gone");
    bench.add("driver=memory,node-name=disk");
    let root = bench.root("disk", writer());
    let section = bench.drained(Scope::All);
    bench.remove("gone").unwrap();
    drop(section);
    bench.settle();
    assert!(!root.is_held());
    assert!(!bench.control.is_drained());
}

#[test]
fn drivers_are_told_once_however_many_sections_nest() {
    let bench = Bench::new();
    bench.add("driver=pass,node-name=top,file.driver=memory,file.node-name=disk");
    let _root = bench.root("top", writer());
    told();
    let outer = bench.drained(bench.nodes("top"));
    let inner = bench.drained(bench.nodes("disk"));
    drop(outer);
    bench.settle();
    assert_eq!(told_of("drain"), ["disk drain begin"]);
    drop(inner);
    bench.settle();
    assert_eq!(told_of("drain"), ["disk drain end"]);
}

#[test]
fn a_section_waits_for_what_a_driver_does_by_itself() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk,can=busy");
    let before = bench.simulation.now();
    let control = bench.control.clone();
    let scope = bench.nodes("disk");
    bench.run(async move { drop(control.drain(scope).await) });
    // It said once that it was busy, and was looked at again.
    assert!(bench.simulation.now() - before >= Duration::from_micros(200));
}

#[test]
fn a_worker_that_is_gone_is_not_waited_for() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let id = bench.try_root("disk", writer()).unwrap();
    let other = bench.simulation.worker();
    let (control, handle) = (bench.control.clone(), other.context().handle().clone());
    bench
        .run(async move { control.attach(id, &handle).await })
        .unwrap();
    let request = other
        .context()
        .root(id)
        .unwrap()
        .try_enter(RequestKind::Read, 0, 0);
    let begun = bench.draining(bench.nodes("disk"));
    assert!(begun.borrow().is_none(), "the other worker has a request");
    other.context().abandon();
    drop(request);
    bench.settle();
    assert!(begun.borrow().is_some());
}

#[test]
fn each_worker_that_serves_a_user_is_waited_for() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    let id = bench.try_root("disk", writer()).unwrap();
    let workers = [0, 1, 2].map(|_| bench.simulation.worker());
    let mut requests = Vec::new();
    for worker in &workers {
        let (control, handle) = (bench.control.clone(), worker.context().handle().clone());
        bench
            .run(async move { control.attach(id, &handle).await })
            .unwrap();
        let root = worker.context().root(id).unwrap();
        requests.push(enter(&root, RequestKind::Write).unwrap());
    }
    let begun = bench.draining(Scope::All);
    while let Some(request) = requests.pop() {
        assert!(begun.borrow().is_none());
        drop(request);
        bench.settle();
    }
    assert!(begun.borrow().is_some());
}

#[test]
fn a_change_drains_whom_it_moves_and_nobody_else() {
    let bench = Bench::new();
    bench.add("driver=memory,node-name=disk");
    bench.add("driver=memory,node-name=other");
    let moved = bench.root("disk", writer());
    let stays = bench.root("other", writer());
    let requests = [&moved, &stays].map(|root| enter(root, RequestKind::Write).unwrap());
    let done = Rc::new(RefCell::new(false));
    let (control, place) = (bench.control.clone(), Rc::clone(&done));
    bench.worker.context().spawn(async move {
        let mut change = control.begin().await;
        let disk = change.find("disk").unwrap();
        let filter = options("driver=pass,node-name=filter,file=disk");
        let filter = change.add(filter, None).await.unwrap();
        change.replace_node(disk, filter).unwrap();
        change
            .prepare()
            .await
            .unwrap()
            .commit()
            .finish()
            .await
            .unwrap();
        place.replace(true);
    });
    bench.settle();
    assert!(moved.is_held() && !stays.is_held());
    assert!(!*done.borrow());
    let [first, second] = requests;
    drop(first);
    bench.settle();
    assert!(*done.borrow());
    assert!(!moved.is_held());
    drop(second);
}
