//! Drained sections: holding requests back from part of the graph while it is changed.
//!
//! From the return of [`Control::drain`] until the [`Drained`] it gave out is dropped, no request is in
//! flight through the nodes of the section, and none starts. New requests wait with whoever made them;
//! none fails. Sections nest and overlap; a root is let go when the last one that holds it ends.
//!
//! Two-sided: first every root above is held, on every worker that serves it, and every driver in the
//! way lets go what it holds back itself; then what is in flight ends. Requests are counted where they
//! enter, at roots, so every kind of them counts, and a node has no counter of its own. A request that
//! was unwound and parked has not entered: no section waits for it.
//!
//! What a section holds is worked out from the graph's shape and kept up to date: a root that comes to
//! be above a drained node is held from its first moment, one that no longer is is let go. A change
//! drains the roots that it moves, so a root that comes under a section has nothing in flight then.
//!
//! Threads: control thread only. A worker is told by posts, and answers one once nothing is in flight;
//! nobody there waits. Dropping a [`Drained`] only posts.
//!
//! Not here: ordering of requests that do run ([`crate::io::tracked`]), and durability. A drained node
//! may still hold unflushed data.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::FutureExt;

use crate::graph::{Control, Graph, NodeId, RootId};
use crate::io::ContextHandle;

/// When a section that has not begun says what it waits for.
const STUCK: Duration = Duration::from_secs(1);
/// How often drivers with work of their own are looked at.
const BUSY_LOOK: Duration = Duration::from_micros(200);

/// Names a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SectionId(u64);

/// What a section covers.
#[derive(Clone, Debug)]
pub enum Scope {
    /// Every root from which one of these nodes can be reached.
    Nodes(BTreeSet<NodeId>),
    /// Also those from which a node below one of these can be reached.
    Subtrees(BTreeSet<NodeId>),
    /// These roots.
    Roots(BTreeSet<RootId>),
    /// Every root.
    All,
}

/// What all sections together hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) roots: BTreeSet<RootId>,
    /// Nodes that requests of these roots pass through, and those that sections name.
    pub(crate) nodes: BTreeSet<NodeId>,
}

/// A drained section; dropping it ends it. See the module's header.
#[must_use = "the section ends when this is dropped"]
pub struct Drained {
    control: Control,
    id: SectionId,
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.control.change(|graph| {
            graph.sections.remove(&self.id);
            graph.update_held();
        });
    }
}

impl Control {
    /// Begins a drained section. Whoever has a request of their own in flight in it must not wait for
    /// this: it waits for the request.
    ///
    /// # Cancellation
    ///
    /// The section ends.
    pub async fn drain(&self, scope: Scope) -> Drained {
        let (id, mut waits) = self.change(|graph| {
            let id = SectionId(graph.next_id());
            let held = graph.held_by(&scope);
            graph.sections.insert(id, scope);
            graph.update_held();
            let waits: Vec<_> = graph
                .contexts_of(&held.roots)
                .map(|(root, _, context)| Wait::new(root, &context))
                .collect();
            (id, waits)
        });
        let drained = Drained {
            control: self.clone(),
            id,
        };
        self.until_quiet(&mut waits).await;
        while self.read(|graph| graph.is_busy(id)) {
            self.context().delay(BUSY_LOOK).await;
        }
        drained
    }

    /// Whether a drained section is open, or about to begin; for tests and queries.
    pub fn is_drained(&self) -> bool {
        self.read(|graph| !graph.sections.is_empty())
    }

    async fn until_quiet(&self, waits: &mut [Wait]) {
        let begun = self.context().engine().now();
        let all = async {
            for wait in waits.iter_mut() {
                wait.quiet().await;
            }
        };
        let report = self.context().delay(STUCK);
        let (mut all, mut report) = (std::pin::pin!(all), std::pin::pin!(report.fuse()));
        let stuck = futures_util::future::select(&mut all, &mut report).await;
        if matches!(stuck, futures_util::future::Either::Left(_)) {
            return;
        }
        let asked: Vec<_> = self.read(|graph| {
            let roots: BTreeSet<_> = graph.held.roots.clone();
            graph
                .contexts_of(&roots)
                .map(|(root, who, context)| (who, in_flight(root, &context)))
                .collect()
        });
        let seconds = (self.context().engine().now() - begun).as_secs();
        for (who, answer) in asked {
            let Ok(requests) = answer.await else { continue };
            if !requests.is_empty() {
                tracing::warn!(%who, ?requests, seconds, "a drained section still waits for requests");
            }
        }
        all.await;
    }
}

/// Asks a worker what a root has in flight there.
fn in_flight(root: RootId, context: &ContextHandle) -> oneshot::Receiver<Vec<String>> {
    let (reply, answer) = oneshot::channel();
    context.post(move |context| {
        let now = context.engine().now();
        let requests = context
            .any_root(root)
            .map_or_else(Vec::new, |root| root.requests());
        let lines = requests.into_iter().map(|request| {
            let millis = (now.saturating_sub(request.since)).as_millis();
            format!("{request}, for {millis} ms")
        });
        let _ = reply.send(lines.collect());
    });
    answer
}

/// A worker's answer that nothing is in flight.
struct Wait {
    answer: Option<oneshot::Receiver<()>>,
}

impl Wait {
    fn new(root: RootId, context: &ContextHandle) -> Self {
        let (reply, answer) = oneshot::channel();
        context.post(move |context| {
            if let Some(root) = context.any_root(root) {
                root.when_quiet(reply);
            }
        });
        Self {
            answer: Some(answer),
        }
    }

    async fn quiet(&mut self) {
        if let Some(answer) = &mut self.answer {
            // A worker that is gone has nothing in flight.
            let _ = answer.await;
        }
        self.answer = None;
    }
}

impl Graph {
    /// What one section holds, by the graph's shape now.
    fn held_by(&self, scope: &Scope) -> Held {
        let roots = match scope {
            Scope::All => self.root_ids().collect(),
            Scope::Roots(roots) => roots.clone(),
            Scope::Nodes(nodes) => self.roots_above(nodes),
            Scope::Subtrees(nodes) => self.roots_above(&self.below(nodes.iter().copied())),
        };
        let mut nodes = self.below(roots.iter().filter_map(|root| self.node_of_root(*root)));
        match scope {
            Scope::All => nodes.extend(self.nodes().map(crate::graph::Node::id)),
            Scope::Nodes(named) | Scope::Subtrees(named) => nodes.extend(named),
            Scope::Roots(_) => {}
        }
        Held { roots, nodes }
    }

    /// Works out what all sections hold, and tells those for whom that changed.
    pub(crate) fn update_held(&mut self) {
        let mut held = Held::default();
        for scope in self.sections.values() {
            let by_this = self.held_by(scope);
            held.roots.extend(by_this.roots);
            held.nodes.extend(by_this.nodes);
        }
        held.nodes.retain(|id| self.node_by_id(*id).is_some());
        let before = std::mem::replace(&mut self.held, held);
        let gone = &before.roots - &self.held.roots;
        let new = &self.held.roots - &before.roots;
        for (roots, hold) in [(new, true), (gone, false)] {
            for (root, _, context) in self.contexts_of(&roots) {
                context.post(move |context| {
                    if let Some(root) = context.any_root(root) {
                        root.hold(hold);
                    }
                });
            }
        }
        for id in &self.held.nodes - &before.nodes {
            self.each_half(id, |io| io.drain_begin());
        }
        for id in &before.nodes - &self.held.nodes {
            self.each_half(id, |io| io.drain_end());
        }
    }

    fn each_half(&self, id: NodeId, tell: impl Fn(&dyn crate::driver::DriverIo)) {
        if let Some(node) = self.node_by_id(id) {
            tell(&**node.io());
        }
    }

    /// Whether a driver in a section still does something by itself.
    fn is_busy(&self, id: SectionId) -> bool {
        let Some(scope) = self.sections.get(&id) else {
            return false;
        };
        let held = self.held_by(scope);
        let mut nodes = held.nodes.iter().filter_map(|id| self.node_by_id(*id));
        nodes.any(|node| node.io().is_busy())
    }

    /// Every worker on which one of these roots is attached.
    pub(crate) fn contexts_of<'a>(
        &'a self,
        roots: &'a BTreeSet<RootId>,
    ) -> impl Iterator<Item = (RootId, String, ContextHandle)> + 'a {
        roots.iter().flat_map(|root| {
            let who = self.who_is(*root);
            let contexts = self.root_contexts(*root).iter();
            contexts.map(move |context| (*root, who.clone(), context.clone()))
        })
    }
}
