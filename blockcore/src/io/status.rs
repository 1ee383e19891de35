//! What ranges of a node are: data, zero, somewhere, or for the backing node to say.

use std::sync::{Mutex, MutexGuard};

use futures_util::FutureExt;

use super::{Io, IoFuture, align};
use crate::IoError;
use crate::driver::{DriverKind, Place, Status, StatusFlags};

/// The latest range of a protocol node that is known to be data: finding out again is slow on some
/// hosts. Its end is the end of what is known, not the beginning of zeroes.
#[derive(Default)]
pub(crate) struct StatusCache {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    begin: u64,
    end: u64,
    /// How often something was invalidated: an answer from before must not come in after.
    invalidations: u64,
}

impl StatusCache {
    /// How far from `offset` on there is data, if that is known; else what to fill in an answer with.
    fn look(&self, offset: u64) -> Result<u64, u64> {
        let known = self.known();
        match known.begin <= offset && offset < known.end {
            true => Ok(known.end - offset),
            false => Err(known.invalidations),
        }
    }

    /// Keeps an answer, unless something was invalidated since the look.
    fn fill(&self, offset: u64, bytes: u64, looked: u64) {
        let mut known = self.known();
        if known.invalidations == looked {
            (known.begin, known.end) = (offset, offset + bytes);
        }
    }

    /// Forgets what overlaps a range.
    pub(crate) fn invalidate(&self, offset: u64, bytes: u64) {
        let mut known = self.known();
        known.invalidations += 1;
        if known.begin < offset.saturating_add(bytes) && offset < known.end {
            (known.begin, known.end) = (0, 0);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no panic while looking")
    }
}

impl<'a> Io<'a> {
    /// What a driver that says nothing of it answers.
    pub(crate) fn default_status(self, offset: u64, bytes: u64) -> IoFuture<'a, Status> {
        let node = self.node();
        let filtered = |child: &Option<super::plan::PlanChild>| {
            let is_filter = node.kind == DriverKind::Filter;
            child.is_some_and(|c| is_filter && c.role.contains(crate::driver::Role::FILTERED))
        };
        let status = match node.children.iter().position(filtered) {
            Some(index) => Status {
                flags: StatusFlags::PLACE | StatusFlags::RAW,
                bytes,
                place: Place {
                    child: Some(index),
                    offset,
                },
            },
            None if node.kind == DriverKind::Protocol => Status {
                flags: StatusFlags::DATA | StatusFlags::PLACE,
                bytes,
                place: Place {
                    child: None,
                    offset,
                },
            },
            None => Status::new(StatusFlags::DATA, bytes),
        };
        async move { Ok(status) }.boxed_local()
    }

    /// What the bytes from `offset` on are in this node, for at most `bytes`: how many of them are alike
    /// is in the answer. With `exact`, zeroes are looked for; else a long answer is worth more, and
    /// zeroes may be called data. Past the end the answer has no bytes.
    ///
    /// The driver answers for its own layer; the core adds what follows from that:
    /// [`StatusFlags::ALLOCATED`] where this layer decides, zeroes where no backing node, or a shorter
    /// one, is deferred to, and [`StatusFlags::END`].
    pub async fn block_status(
        self,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<Status, IoError> {
        let length = self.bytes();
        if offset >= length || bytes == 0 {
            let at_end = if offset >= length {
                StatusFlags::END
            } else {
                StatusFlags::empty()
            };
            return Ok(Status::new(at_end, 0));
        }
        let bytes = bytes.min(length - offset);
        let mut status = self.layer_status(exact, offset, bytes).await?;
        status.bytes = status.bytes.min(bytes);
        if status.flags.contains(StatusFlags::RAW) {
            status = self.raw_status(exact, status).await?;
        } else {
            self.deduce(exact, offset, &mut status);
            self.look_below(exact, &mut status).await;
        }
        let end = offset + status.bytes == length;
        status.flags.set(StatusFlags::END, end);
        Ok(status)
    }

    /// The driver's answer, which may be longer than the question.
    async fn layer_status(self, exact: bool, offset: u64, bytes: u64) -> Result<Status, IoError> {
        let node = self.node();
        let cached = node.kind == DriverKind::Protocol && node.children.is_empty();
        let looked = match cached.then(|| node.state.status_cache.look(offset)) {
            Some(Ok(bytes)) => {
                return Ok(Status {
                    flags: StatusFlags::DATA | StatusFlags::PLACE,
                    bytes,
                    place: Place {
                        child: None,
                        offset,
                    },
                });
            }
            Some(Err(looked)) => looked,
            None => 0,
        };
        let unit = self.unit();
        let begin = align::down(offset, unit);
        let end = align::up(offset + bytes, unit);
        let status = node.io.block_status(self, exact, begin, end - begin);
        let mut status = status.await?;
        if status.bytes == 0 || !status.bytes.is_multiple_of(unit) {
            debug_assert!(false, "a driver's answer is aligned and not empty");
            return Err(IoError::Failed);
        }
        let data = StatusFlags::DATA | StatusFlags::PLACE;
        // A long answer may call zeroes data, and would hide them from who asks exactly later.
        if cached && exact && status.flags == data && status.place.offset == begin {
            node.state.status_cache.fill(begin, status.bytes, looked);
        }
        let skipped = offset - begin;
        status.bytes -= skipped;
        status.place.offset += skipped;
        Ok(status)
    }

    /// The child's answer in place of this node's.
    async fn raw_status(self, exact: bool, status: Status) -> Result<Status, IoError> {
        debug_assert_eq!(status.flags, StatusFlags::RAW | StatusFlags::PLACE);
        let index = status.place.child.unwrap_or(0);
        // Boxed: the recursion has no bound that the compiler could see.
        let below = Box::pin(self.child(index).block_status(
            exact,
            status.place.offset,
            status.bytes,
        ));
        let below = below.await?;
        if below.bytes == 0 {
            // Past the child's end: reads as zero.
            let flags = StatusFlags::ZERO | StatusFlags::ALLOCATED;
            return Ok(Status::new(flags, status.bytes));
        }
        Ok(Status {
            place: Place {
                child: Some(index),
                offset: status.place.offset,
            },
            ..below
        })
    }

    fn deduce(self, exact: bool, offset: u64, status: &mut Status) {
        let flags = &mut status.flags;
        if flags.intersects(StatusFlags::DATA | StatusFlags::ZERO) {
            flags.insert(StatusFlags::ALLOCATED);
            return;
        }
        if !exact || self.node().kind == DriverKind::Protocol {
            // What a protocol says nothing of is nothing that anybody has put there.
            return;
        }
        match self.backing() {
            None => flags.insert(StatusFlags::ZERO),
            Some(backing) => {
                let length = backing.bytes();
                if offset >= length {
                    flags.insert(StatusFlags::ZERO);
                }
            }
        }
    }

    /// Looks whether the child knows of zeroes where this node only knows of data.
    async fn look_below(self, exact: bool, status: &mut Status) {
        let wanted = StatusFlags::RECURSE | StatusFlags::DATA | StatusFlags::PLACE;
        let recurse = exact && status.flags.contains(wanted);
        status.flags.remove(StatusFlags::RECURSE);
        let Some(index) = status.place.child.filter(|_| recurse) else {
            return;
        };
        let child = self.child(index);
        // An error here only leaves the answer as it is.
        let below = Box::pin(child.block_status(true, status.place.offset, status.bytes)).await;
        let Ok(below) = below else { return };
        if below.bytes == 0 {
            // Past the end of the file: the rest reads as zero.
            status.flags.insert(StatusFlags::ZERO);
            return;
        }
        let to_end = below.flags.contains(StatusFlags::END | StatusFlags::ZERO);
        if !to_end {
            status.bytes = below.bytes;
        }
        status.flags |= below.flags & StatusFlags::ZERO;
    }

    /// As [`block_status`](Self::block_status), of this node and the chain below it down to, and
    /// without, the node that `is_base` names (all of it if it names none): the answer of the first layer
    /// that decides, with how many layers below this one it is.
    pub async fn status_above(
        self,
        is_base: impl Fn(Io<'_>) -> bool,
        exact: bool,
        offset: u64,
        bytes: u64,
    ) -> Result<(Status, usize), IoError> {
        let mut status = self.block_status(exact, offset, bytes).await?;
        let mut end = None;
        if status.flags.contains(StatusFlags::END) {
            end = Some(offset + status.bytes);
        }
        let (mut layer, mut depth) = (self, 0);
        while status.bytes > 0 && !status.flags.contains(StatusFlags::ALLOCATED) {
            let Some(next) = layer.next_in_chain().filter(|next| !is_base(*next)) else {
                break;
            };
            let asked = status.bytes;
            (layer, depth) = (next, depth + 1);
            let below = layer.block_status(exact, offset, asked).await?;
            status = below;
            status.flags.remove(StatusFlags::END);
            if status.bytes == 0 {
                // This layer is short: zeroes past its end are its own.
                let flags = StatusFlags::ZERO | StatusFlags::ALLOCATED;
                status = Status::new(flags, asked);
            }
        }
        let at_end = end == Some(offset + status.bytes);
        status.flags.set(StatusFlags::END, at_end);
        Ok((status, depth))
    }

    /// Whether this layer decides what is read from `offset` on, and for how many of `bytes` that
    /// holds.
    pub async fn is_allocated(self, offset: u64, bytes: u64) -> Result<(bool, u64), IoError> {
        let status = self.block_status(false, offset, bytes).await?;
        Ok((status.flags.contains(StatusFlags::ALLOCATED), status.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_invalidated_since_the_look_is_not_filled_in() {
        let cache = StatusCache::default();
        let looked = cache.look(0).unwrap_err();
        cache.fill(0, 8192, looked);
        assert_eq!(cache.look(4096), Ok(4096));
        let looked = cache.look(8192).unwrap_err();
        cache.invalidate(4096, 512);
        assert!(cache.look(0).is_err());
        // The answer to the earlier look comes late.
        cache.fill(0, 8192, looked);
        assert!(cache.look(0).is_err());
    }

    #[test]
    fn what_does_not_overlap_stays_known() {
        let cache = StatusCache::default();
        let looked = cache.look(0).unwrap_err();
        cache.fill(4096, 4096, looked);
        cache.invalidate(0, 4096);
        cache.invalidate(8192, u64::MAX);
        assert_eq!(cache.look(4096), Ok(4096));
    }
}
