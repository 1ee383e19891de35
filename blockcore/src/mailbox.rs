//! Wake-ups across workers: a mailbox anybody may post to, and the sleep that it ends.
//!
//! A worker owns one [`Sleeper`] and any number of [`Mailbox`]es that share it. Posting pushes the
//! item, then wakes the owner if it sleeps. Before sleeping the owner announces it, looks at all of
//! its mailboxes once more, and only then waits; so no item is posted to a worker that goes on
//! sleeping.
//!
//! Threads: [`Mailbox::post`] from any; [`Mailbox::take`] and the sleep functions by the owner only.
//! The lock is held for a push or a swap. Nobody waits for the owner here: posting never blocks.
//!
//! Modelled: `RUSTFLAGS="--cfg loom" cargo test -p blockcore --release mailbox`.

use crate::sync::{Arc, AtomicBool, Mutex, Ordering, fence};

/// How a sleeping worker is woken, by whoever holds its mailbox.
pub trait Wake: Send + Sync {
    /// Ends the owner's current or next wait. Must not block.
    fn wake(&self);
}

/// Whether a worker sleeps, and how to end that.
pub struct Sleeper {
    asleep: AtomicBool,
    wake: Box<dyn Wake>,
}

impl Sleeper {
    /// A sleeper that is awake, woken by `wake`.
    pub fn new(wake: Box<dyn Wake>) -> Arc<Self> {
        Arc::new(Self {
            asleep: AtomicBool::new(false),
            wake,
        })
    }

    /// Announces that the owner is about to sleep. It must look at every mailbox once more before it
    /// does, and call [`awake`](Self::awake) afterwards in any case.
    pub fn falling_asleep(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        // Orders the announcement before the owner's last look; pairs with the fence in `notify`.
        fence(Ordering::SeqCst);
    }

    /// The owner runs again.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Something was put where the owner looks before it sleeps.
    pub fn notify(&self) {
        // Orders the caller's push before the look at `asleep`; pairs with `falling_asleep`.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.wake.wake();
        }
    }
}

/// A queue of items for one worker.
///
/// Unbounded by itself: each kind of item is bounded by whoever posts it (one runnable per task, one
/// command per waiting caller).
pub struct Mailbox<T> {
    items: Mutex<Vec<T>>,
    full: AtomicBool,
    sleeper: Arc<Sleeper>,
}

impl<T> Mailbox<T> {
    /// An empty mailbox whose owner sleeps in `sleeper`.
    pub fn new(sleeper: Arc<Sleeper>) -> Arc<Self> {
        Arc::new(Self {
            items: Mutex::new(Vec::new()),
            full: AtomicBool::new(false),
            sleeper,
        })
    }

    /// Adds `item` at the end and wakes the owner if it sleeps.
    pub fn post(&self, item: T) {
        {
            let mut items = self.items.lock().expect("no panic while posting");
            items.push(item);
            self.full.store(true, Ordering::Release);
        }
        self.sleeper.notify();
    }

    /// Moves everything that was posted to the end of `into`, in order.
    pub fn take(&self, into: &mut Vec<T>) {
        if !self.full.load(Ordering::Acquire) {
            return;
        }
        let mut items = self.items.lock().expect("no panic while posting");
        self.full.store(false, Ordering::Relaxed);
        into.append(&mut items);
    }

    /// Whether nothing waits; the owner's last look before it sleeps.
    #[inline]
    pub fn is_empty(&self) -> bool {
        !self.full.load(Ordering::Acquire)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    struct Count(std::sync::Arc<std::sync::atomic::AtomicUsize>);

    impl Wake for Count {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn only_a_sleeping_owner_is_woken_and_only_once() {
        let count = std::sync::Arc::default();
        let sleeper = Sleeper::new(Box::new(Count(std::sync::Arc::clone(&count))));
        let mailbox = Mailbox::new(Arc::clone(&sleeper));
        mailbox.post(1);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        sleeper.falling_asleep();
        mailbox.post(2);
        mailbox.post(3);
        assert_eq!(count.load(Ordering::SeqCst), 1);
        let mut items = Vec::new();
        mailbox.take(&mut items);
        assert_eq!(items, [1, 2, 3]);
        assert!(mailbox.is_empty());
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;

    struct Flag(Arc<AtomicBool>);

    impl Wake for Flag {
        fn wake(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn an_item_posted_while_the_owner_falls_asleep_is_seen_or_wakes_it() {
        loom::model(|| {
            let woken = Arc::new(AtomicBool::new(false));
            let sleeper = Sleeper::new(Box::new(Flag(Arc::clone(&woken))));
            let mailbox = Mailbox::new(Arc::clone(&sleeper));
            let other = Arc::clone(&mailbox);
            let poster = loom::thread::spawn(move || other.post(7));
            sleeper.falling_asleep();
            let seen = !mailbox.is_empty();
            poster.join().unwrap();
            assert!(seen || woken.load(Ordering::SeqCst));
            let mut items = Vec::new();
            mailbox.take(&mut items);
            assert_eq!(items, [7]);
        });
    }
}
