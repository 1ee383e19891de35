//! What the host copies from one place to another, and what is written compressed.

use std::rc::Rc;

use blockcore::IoError;
use blockcore::driver::CopyFlags;
use harness::history::{self, Outcome};

use crate::guest::Asking;

impl Asking {
    /// Another user's request that has entered on the same worker, at once: with one that has, waiting could
    /// be for a section that waits for that.
    fn beside(&self) -> Option<Self> {
        let roots = self.life.roots.borrow();
        let user = &roots[self.life.test.below(roots.len() as u64) as usize];
        if user.id == self.user.id {
            return None;
        }
        self.another(user)
    }

    /// Has the host copy a range to another place of the same node, or to another's.
    pub(crate) async fn copy(self) {
        let test = Rc::clone(&self.life.test);
        let other = self.beside();
        let to = other.as_ref().unwrap_or(&self);
        let unit = self.user.unit.max(to.user.unit);
        let cells = self.view.bytes.min(to.view.bytes) / unit;
        if !to.user.writes || cells == 0 {
            return self.read().await;
        }
        let count = 1 + test.below(cells.min((16384 / unit).max(1)));
        let any = || test.below(cells - count + 1) * unit;
        let (from, into, bytes) = (any(), any(), count * unit);
        let (source, target) = (self.view.disk, to.view.disk);
        let (at, to_at) = (self.on_disk(from), to.on_disk(into));
        if source == target && at < to_at + bytes && to_at < at + bytes {
            // The host refuses it, or does as it likes.
            return self.read().await;
        }
        let read = test.history(source).begin_read(at, bytes);
        let copy = test.history(target).begin_copy(to_at, bytes);
        let flags = CopyFlags::empty();
        let copied = self
            .request
            .copy_range(from, &to.request, into, bytes, flags);
        let result = copied.await;
        let found = test.history(source).end_found(read);
        let outcome = match result {
            Ok(()) => Outcome::Done,
            Err(_) => Outcome::Failed,
        };
        test.history(target).end_copy(copy, at, found, outcome);
        match result {
            Ok(()) => {
                self.life.expect_marks(&to.view, to_at, bytes);
                test.count(|totals| &mut totals.copies);
            }
            // What has to be done by hand.
            Err(IoError::Unsupported) => {}
            // Either may have been cut.
            Err(IoError::OutOfRange) if to.is_cut() => {}
            Err(_) => self.check("a copy", result),
        }
    }

    /// Writes a cluster compressed, where the format can do that.
    pub(crate) async fn compress(self) {
        let test = Rc::clone(&self.life.test);
        let disk = &test.case.disks[self.view.disk];
        let cluster = disk.cluster.filter(|_| self.request.io().can_compress());
        let Some(cluster) = cluster.filter(|_| self.user.writes) else {
            return self.write().await;
        };
        let offset = test.below(self.view.bytes.div_ceil(cluster)) * cluster;
        let bytes = cluster.min(self.view.bytes - offset);
        let tag = test.next_tag.replace(test.next_tag.get() + 1);
        let (from, at) = (self.memory(bytes), self.on_disk(offset));
        from.copy_from(&history::data(tag, at, bytes));
        let write = test.history(self.view.disk).begin_write(tag, at, bytes);
        let result = self.request.io().write_compressed(offset, from).await;
        if result.is_ok() {
            test.count(|totals| &mut totals.compressed);
        }
        let flags = blockcore::driver::WriteFlags::empty();
        self.end_write("a compressed write", write, result, flags, (at, bytes));
    }
}
