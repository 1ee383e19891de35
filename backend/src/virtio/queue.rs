//! The ring: one virtqueue of a guest, owned by the worker that serves it.
//!
//! `virtio-queue` keeps the indexes; chains are walked here, because its iterator makes a broken chain
//! look like one that ended. Everything in the ring is the guest's and may change at any time: each
//! value is read once and checked after it was read.
//!
//! Threads: one worker at a time. The state that a ring can be made of again is [`RingState`].

use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use blockcore::io::buffer::Segments;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::vhost_user::memory::{GuestMap, GuestView};

/// Largest ring that split virtqueues can have.
pub const MAX_SIZE: u32 = 32768;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: without event index, the driver polls.
const NO_INTERRUPT: u16 = 1;

/// Where a ring is and how far it has got: enough to make it anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Descriptors; a power of two.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Next entry of the available ring to take, and (with nothing in flight) of the used ring to
    /// fill.
    pub next: u16,
    /// Whether `VIRTIO_F_RING_EVENT_IDX` was negotiated.
    pub event_index: bool,
}

impl RingState {
    /// Checks size, alignment and that each of the three areas is in one region of `map`.
    ///
    /// # Errors
    ///
    /// What is wrong, for a person.
    pub fn check(&self, map: &GuestMap) -> Result<(), String> {
        check_size(u32::from(self.size))?;
        for (what, address, bytes, alignment) in self.areas() {
            if !address.is_multiple_of(alignment) {
                return Err(format!(
                    "{what} at guest address {address:#x} is not aligned to {alignment}"
                ));
            }
            if !map.contains(address, bytes) {
                return Err(format!(
                    "{what} at guest address {address:#x} ({bytes} bytes) is not in the guest's memory"
                ));
            }
        }
        Ok(())
    }

    /// Each area's name, address, length and alignment (virtio, "Split Virtqueues").
    fn areas(&self) -> [(&'static str, u64, u64, u64); 3] {
        let lengths = area_bytes(self.size);
        [
            ("descriptor table", self.descriptors, lengths[0], 16),
            ("available ring", self.available, lengths[1], 2),
            ("used ring", self.used, lengths[2], 4),
        ]
    }
}

/// Lengths of descriptor table, available ring and used ring, with their event fields.
pub fn area_bytes(size: u16) -> [u64; 3] {
    let size = u64::from(size);
    [size * 16, size * 2 + 6, size * 8 + 6]
}

/// Whether a ring may have so many descriptors.
///
/// # Errors
///
/// What is wrong, for a person.
pub fn check_size(size: u32) -> Result<u16, String> {
    if !size.is_power_of_two() || size > MAX_SIZE {
        return Err(format!(
            "{size} descriptors: a ring has a power of two of them, at most {MAX_SIZE}"
        ));
    }
    Ok(size as u16)
}

/// Why a ring cannot go on: its guest broke a rule, and what it meant is anybody's guess.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The available index jumped further than the ring is long.
    IndexJump,
    /// A head or next field names a descriptor that does not exist.
    NoSuchDescriptor(u16),
    /// One head was made available again while its request is in flight.
    HeadInFlight(u16),
    /// A chain runs in a circle or is longer than any request may be.
    EndlessChain(u16),
    /// An indirect table is empty, not a whole number of descriptors, nested or has a successor.
    BadIndirect(u16),
    /// A device-readable descriptor follows a device-writable one.
    BadOrder(u16),
    /// A chain has no byte for the status, or none in the guest's memory.
    NoStatus(u16),
    /// The ring itself or an indirect table is not in the guest's memory.
    OutsideMemory,
}

impl std::fmt::Display for RingError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::IndexJump => write!(f, "the available index jumped past the ring's size"),
            Self::NoSuchDescriptor(index) => write!(f, "descriptor {index} does not exist"),
            Self::HeadInFlight(head) => {
                write!(f, "head {head} was made available while it is in flight")
            }
            Self::EndlessChain(head) => {
                write!(f, "the chain at head {head} is circular or too long")
            }
            Self::BadIndirect(head) => {
                write!(f, "the chain at head {head} has a bad indirect table")
            }
            Self::BadOrder(head) => write!(
                f,
                "the chain at head {head} has readable descriptors after writable ones"
            ),
            Self::NoStatus(head) => write!(f, "the chain at head {head} has no status byte"),
            Self::OutsideMemory => write!(f, "part of the ring is not in the guest's memory"),
        }
    }
}

/// A request's memory, as its chain lists it.
#[derive(Debug)]
pub struct Chain {
    /// The descriptor that names it in the used ring.
    pub head: u16,
    /// What the device may read.
    pub readable: Segments,
    /// What the device may write.
    pub writable: Segments,
    /// Some of the data is not in the guest's memory, so the lists above have gaps: only the last
    /// writable byte may be used, and only if `status_inside`.
    pub outside: bool,
    /// The last writable descriptor is in the guest's memory.
    pub status_inside: bool,
}

/// See the module's header.
pub struct Ring {
    queue: Queue,
    view: Rc<GuestView>,
    max_chain: u16,
    in_flight: Vec<bool>,
    /// Completions published and not yet announced.
    unannounced: u16,
}

impl Ring {
    /// A ring from its state, which [`RingState::check`] has accepted for this memory. A chain may
    /// have `max_chain` descriptors.
    pub fn new(state: RingState, view: Rc<GuestView>, max_chain: u16) -> Self {
        let mut queue = Queue::new(MAX_SIZE as u16).expect("a permitted size");
        let split = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        queue.set_size(state.size);
        let (low, high) = split(state.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = split(state.available);
        queue.set_avail_ring_address(low, high);
        let (low, high) = split(state.used);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(state.event_index);
        queue.set_next_avail(state.next);
        queue.set_next_used(state.next);
        queue.set_ready(true);
        Self {
            queue,
            view,
            max_chain,
            in_flight: vec![false; usize::from(state.size)],
            unannounced: 0,
        }
    }

    /// The state, with nothing in flight.
    pub fn state(&self) -> RingState {
        RingState {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            available: self.queue.avail_ring(),
            used: self.queue.used_ring(),
            next: self.queue.next_avail(),
            event_index: self.queue.event_idx_enabled(),
        }
    }

    /// The guest's memory.
    pub fn view(&self) -> &Rc<GuestView> {
        &self.view
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the guest has made something available: one load.
    pub fn has_available(&self) -> bool {
        let index = self
            .queue
            .avail_idx(self.view.map().memory(), Ordering::Acquire);
        index.is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Takes the next request.
    ///
    /// # Errors
    ///
    /// The ring is broken: nothing more may be taken from it.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let head = {
            let memory = self.view.map().memory();
            let mut heads = self.queue.iter(memory).map_err(|error| match error {
                virtio_queue::Error::InvalidAvailRingIndex => RingError::IndexJump,
                _ => RingError::OutsideMemory,
            })?;
            match heads.next() {
                Some(chain) => chain.head_index(),
                None => return Ok(None),
            }
        };
        let place = self
            .in_flight
            .get_mut(usize::from(head))
            .ok_or(RingError::NoSuchDescriptor(head))?;
        if std::mem::replace(place, true) {
            return Err(RingError::HeadInFlight(head));
        }
        self.walk(head).map(Some)
    }

    /// Follows a chain through its table, and through the indirect table that may end it.
    fn walk(&self, head: u16) -> Result<Chain, RingError> {
        let mut chain = Chain {
            head,
            readable: self.view.segments(),
            writable: self.view.segments(),
            outside: false,
            status_inside: false,
        };
        let mut table = GuestAddress(self.queue.desc_table());
        let mut entries = u32::from(self.queue.size());
        let mut index = u32::from(head);
        let mut indirect = false;
        let mut writing = false;
        let mut left = self.max_chain;
        loop {
            if index >= entries {
                return Err(match indirect {
                    true => RingError::BadIndirect(head),
                    false => RingError::NoSuchDescriptor(index as u16),
                });
            }
            let descriptor: Descriptor = self
                .view
                .map()
                .memory()
                .read_obj(GuestAddress(table.0.wrapping_add(u64::from(index) * 16)))
                .map_err(|_| RingError::OutsideMemory)?;
            if descriptor.refers_to_indirect_table() {
                let bytes = descriptor.len();
                let whole = bytes != 0 && bytes.is_multiple_of(16);
                if indirect || descriptor.has_next() || !whole {
                    return Err(RingError::BadIndirect(head));
                }
                table = descriptor.addr();
                // Longer tables are legal, but no chain uses more of one than it may be long.
                entries = bytes / 16;
                index = 0;
                indirect = true;
                continue;
            }
            left = left.checked_sub(1).ok_or(RingError::EndlessChain(head))?;
            if descriptor.is_write_only() {
                writing = true;
            } else if writing {
                return Err(RingError::BadOrder(head));
            }
            self.add(&mut chain, &descriptor);
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = u32::from(descriptor.next());
        }
    }

    fn add(&self, chain: &mut Chain, descriptor: &Descriptor) {
        let (address, bytes) = (descriptor.addr().0, descriptor.len());
        if !descriptor.is_write_only() {
            let added = self.view.append(&mut chain.readable, address, bytes);
            chain.outside |= added.is_err();
            return;
        }
        let added = self.view.append(&mut chain.writable, address, bytes);
        chain.outside |= added.is_err();
        if bytes > 0 {
            chain.status_inside = added.is_ok();
        }
    }

    /// Gives a request back to the guest, with how many bytes were written to its memory.
    ///
    /// # Errors
    ///
    /// The used ring is no longer in memory.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let place = &mut self.in_flight[usize::from(head)];
        assert!(std::mem::replace(place, false), "completed exactly once");
        self.unannounced += 1;
        self.queue
            .add_used(self.view.map().memory(), head, written)
            .map_err(|_| RingError::OutsideMemory)
    }

    /// How many completions the guest has not been told of.
    pub fn unannounced(&self) -> u16 {
        self.unannounced
    }

    /// Whether the guest wants to be told of what was pushed since the last call.
    pub fn wants_call(&mut self) -> bool {
        if std::mem::take(&mut self.unannounced) == 0 {
            return false;
        }
        let memory = self.view.map().memory();
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(memory).unwrap_or(true);
        }
        // Orders the used index before the look at the driver's flag.
        fence(Ordering::SeqCst);
        let flags = memory.load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
        flags.map_or(true, |flags| u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Asks the guest not to kick: the worker looks by itself.
    pub fn suppress_kicks(&mut self) {
        let _ = self.queue.disable_notification(self.view.map().memory());
    }

    /// Asks the guest to kick for what it makes available from now on; returns whether something
    /// became available meanwhile, for which no kick may come.
    pub fn want_kicks(&mut self) -> bool {
        let memory = self.view.map().memory();
        self.queue.enable_notification(memory).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::memory::Region;
    use std::sync::Arc;
    use virtio_queue::desc::RawDescriptor;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    struct Guest {
        map: Arc<GuestMap>,
        ring: Ring,
        available: u16,
    }

    fn guest() -> Guest {
        let region = Region::anonymous(0, 0x10000).unwrap();
        let map = GuestMap::new(vec![region]).unwrap();
        let state = RingState {
            size: 8,
            descriptors: 0x1000,
            available: 0x2000,
            used: 0x3000,
            next: 0,
            event_index: false,
        };
        state.check(&map).unwrap();
        let ring = Ring::new(state, GuestView::new(Arc::clone(&map)), 6);
        Guest {
            map,
            ring,
            available: 0,
        }
    }

    impl Guest {
        fn describe(&self, table: u64, index: u64, descriptor: (u64, u32, u16, u16)) {
            let (address, bytes, flags, next) = descriptor;
            let raw = RawDescriptor::from(Descriptor::new(address, bytes, flags, next));
            let place = GuestAddress(table + index * 16);
            self.map.memory().write_obj(raw, place).unwrap();
        }

        fn offer(&mut self, head: u16) -> Result<Option<Chain>, RingError> {
            let memory = self.map.memory();
            let place = 0x2004 + u64::from(self.available % 8) * 2;
            memory.write_obj(head, GuestAddress(place)).unwrap();
            self.available = self.available.wrapping_add(1);
            memory
                .write_obj(self.available, GuestAddress(0x2002))
                .unwrap();
            self.ring.pop()
        }
    }

    #[test]
    fn a_chain_lists_readable_and_writable_memory_in_order() {
        let mut guest = guest();
        guest.describe(0x1000, 3, (0x5000, 16, NEXT, 1));
        guest.describe(0x1000, 1, (0x6000, 512, NEXT | WRITE, 4));
        guest.describe(0x1000, 4, (0x7000, 1, WRITE, 0));
        let chain = guest.offer(3).unwrap().unwrap();
        assert_eq!(
            (chain.head, chain.readable.bytes(), chain.writable.bytes()),
            (3, 16, 513)
        );
        assert!(!chain.outside && chain.status_inside);
        assert!(guest.ring.pop().unwrap().is_none());
        guest.ring.push(3, 513).unwrap();
        assert!(guest.ring.wants_call());
        assert!(!guest.ring.wants_call());
    }

    #[test]
    fn an_indirect_table_ends_a_chain() {
        let mut guest = guest();
        guest.describe(0x1000, 0, (0x8000, 32, INDIRECT, 0));
        guest.describe(0x8000, 0, (0x5000, 16, NEXT, 1));
        guest.describe(0x8000, 1, (0x6000, 1, WRITE, 0));
        let chain = guest.offer(0).unwrap().unwrap();
        assert_eq!((chain.readable.bytes(), chain.writable.bytes()), (16, 1));
    }

    #[test]
    fn every_way_to_break_a_chain_has_its_name() {
        type Table = &'static [(u64, u64, (u64, u32, u16, u16))];
        let cases: [(Table, RingError); 9] = [
            // A circle.
            (
                &[(0x1000, 0, (0x5000, 16, NEXT, 0))],
                RingError::EndlessChain(0),
            ),
            // A successor that does not exist.
            (
                &[(0x1000, 0, (0x5000, 16, NEXT, 8))],
                RingError::NoSuchDescriptor(8),
            ),
            // An indirect table inside an indirect table.
            (
                &[
                    (0x1000, 0, (0x8000, 32, INDIRECT, 0)),
                    (0x8000, 0, (0x9000, 16, INDIRECT, 0)),
                ],
                RingError::BadIndirect(0),
            ),
            // One that goes on after it.
            (
                &[(0x1000, 0, (0x8000, 32, INDIRECT | NEXT, 1))],
                RingError::BadIndirect(0),
            ),
            // One that is empty, or not whole.
            (
                &[(0x1000, 0, (0x8000, 0, INDIRECT, 0))],
                RingError::BadIndirect(0),
            ),
            (
                &[(0x1000, 0, (0x8000, 24, INDIRECT, 0))],
                RingError::BadIndirect(0),
            ),
            // One that is nowhere.
            (
                &[(0x1000, 0, (0xf_0000, 32, INDIRECT, 0))],
                RingError::OutsideMemory,
            ),
            // One whose chain leaves it.
            (
                &[
                    (0x1000, 0, (0x8000, 16, INDIRECT, 0)),
                    (0x8000, 0, (0x5000, 16, NEXT, 1)),
                ],
                RingError::BadIndirect(0),
            ),
            // Readable after writable.
            (
                &[
                    (0x1000, 0, (0x5000, 16, NEXT | WRITE, 1)),
                    (0x1000, 1, (0x6000, 16, 0, 0)),
                ],
                RingError::BadOrder(0),
            ),
        ];
        for (table, expected) in cases {
            let mut guest = guest();
            for (base, index, descriptor) in table {
                guest.describe(*base, *index, *descriptor);
            }
            assert_eq!(guest.offer(0).unwrap_err(), expected, "{table:?}");
        }
    }

    #[test]
    fn a_head_in_flight_cannot_be_offered_again() {
        let mut guest = guest();
        guest.describe(0x1000, 2, (0x5000, 1, WRITE, 0));
        guest.offer(2).unwrap().unwrap();
        assert_eq!(guest.offer(2).unwrap_err(), RingError::HeadInFlight(2));
        assert_eq!(guest.offer(9).unwrap_err(), RingError::NoSuchDescriptor(9));
    }

    #[test]
    fn data_outside_memory_leaves_the_status_usable() {
        let mut guest = guest();
        guest.describe(0x1000, 0, (0x5000, 16, NEXT, 1));
        guest.describe(0x1000, 1, (0xffff_0000, 512, NEXT | WRITE, 2));
        guest.describe(0x1000, 2, (0x7000, 1, WRITE, 0));
        let chain = guest.offer(0).unwrap().unwrap();
        assert!(chain.outside && chain.status_inside);
    }

    #[test]
    fn an_available_index_that_jumps_breaks_the_ring() {
        let mut guest = guest();
        guest
            .map
            .memory()
            .write_obj(9_u16, GuestAddress(0x2002))
            .unwrap();
        assert_eq!(guest.ring.pop().unwrap_err(), RingError::IndexJump);
    }

    #[test]
    fn rings_of_impossible_size_or_place_are_refused() {
        let guest = guest();
        let good = guest.ring.state();
        for size in [0, 3, 65536, u32::MAX] {
            assert!(check_size(size).is_err());
        }
        let bad = [
            RingState {
                descriptors: 0x1008,
                ..good
            },
            RingState {
                available: 0x2001,
                ..good
            },
            RingState {
                used: 0x3002,
                ..good
            },
            RingState {
                used: 0xfff0,
                ..good
            },
            RingState {
                descriptors: u64::MAX - 15,
                ..good
            },
        ];
        for state in bad {
            assert!(state.check(&guest.map).is_err(), "{state:?}");
        }
    }
}
