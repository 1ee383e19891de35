//! The ring: one split virtqueue of a guest, owned by the worker that serves it.
//!
//! Everything in the ring is the guest's and may change at any time: each value is loaded once and
//! checked after it was loaded. Completions are stored as they come and published together, so that a
//! guest that polls the used index is not disturbed by each.
//!
//! `virtio-queue` is the oracle in tests; it costs three times what this does, and its iterator makes
//! a broken chain look like one that ended.
//!
//! Threads: one worker at a time. The state that a ring can be made of again is [`RingState`].

use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use blockcore::io::buffer::Segments;

use crate::vhost_user::memory::{Area, GuestMap, GuestView};

/// Largest ring that split virtqueues can have.
pub const MAX_SIZE: u32 = 32768;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: without event index, the driver polls.
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`: without event index, the device polls.
const NO_NOTIFY: u16 = 1;
/// `VIRTQ_DESC_F_NEXT`: the chain goes on.
const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes.
const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: a table of descriptors.
const INDIRECT: u16 = 4;

/// Where things are in the available and the used ring.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ENTRIES: usize = 4;
const DESCRIPTOR_BYTES: u32 = 16;

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
#[derive(Debug, Default)]
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
    state: RingState,
    descriptors: Area,
    available: Area,
    used: Area,
    view: Rc<GuestView>,
    max_chain: u16,
    next_used: u16,
    /// The used index that the guest has last been shown.
    published: u16,
    /// The used index when the guest's wish to be called was last looked at.
    announced: u16,
    kicks_suppressed: bool,
    in_flight: Vec<bool>,
}

/// One entry of a descriptor table.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn new(address: u64, rest: u64) -> Self {
        Self {
            address,
            bytes: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The table that a chain is in.
enum Table<'a> {
    Ring(&'a Area),
    Indirect(Area),
    /// In several regions, or not aligned: read piece by piece.
    Scattered(u64),
}

impl Ring {
    /// A ring from its state. A chain may have `max_chain` descriptors.
    ///
    /// # Errors
    ///
    /// As [`RingState::check`], or the areas are not aligned in our memory.
    pub fn new(state: RingState, view: Rc<GuestView>, max_chain: u16) -> Result<Self, String> {
        state.check(view.map())?;
        let [descriptors, available, used] = state.areas().map(|(what, address, bytes, unit)| {
            let area = view.area(address, bytes, unit as usize);
            area.ok_or_else(|| {
                format!("{what} at guest address {address:#x} cannot be used in place")
            })
        });
        Ok(Self {
            state,
            descriptors: descriptors?,
            available: available?,
            used: used?,
            view,
            max_chain,
            next_used: state.next,
            published: state.next,
            announced: state.next,
            kicks_suppressed: false,
            in_flight: vec![false; usize::from(state.size)],
        })
    }

    /// Counts `heads` as taken and not completed, as they were when the state was that of an earlier ring
    /// of the same size.
    pub fn take_along(&mut self, heads: impl IntoIterator<Item = u16>) {
        for head in heads {
            let place = &mut self.in_flight[usize::from(head)];
            assert!(!std::mem::replace(place, true), "taken once");
            self.next_used = self.next_used.wrapping_sub(1);
        }
        self.published = self.next_used;
        self.announced = self.next_used;
    }

    /// The state, with nothing in flight but what another ring will [take along](Self::take_along).
    pub fn state(&self) -> RingState {
        self.state
    }

    /// The guest's memory.
    pub fn view(&self) -> &Rc<GuestView> {
        &self.view
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.state.size
    }

    fn entry(&self, index: u16, bytes: usize) -> usize {
        ENTRIES + usize::from(index & (self.state.size - 1)) * bytes
    }

    /// Where the driver's wish to be called is: after the available ring.
    fn used_event(&self) -> usize {
        ENTRIES + usize::from(self.state.size) * 2
    }

    /// Where our wish to be kicked is: after the used ring.
    fn available_event(&self) -> usize {
        ENTRIES + usize::from(self.state.size) * 8
    }

    /// Takes the next request into `chain`; `false` if there is none.
    ///
    /// # Errors
    ///
    /// The ring is broken: nothing more may be taken from it. It is where it was before the call.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let index = self.available.load_u16(INDEX, Ordering::Acquire);
        let waiting = index.wrapping_sub(self.state.next);
        if waiting == 0 {
            return Ok(false);
        }
        if waiting > self.state.size {
            return Err(RingError::IndexJump);
        }
        let place = self.entry(self.state.next, 2);
        let head = self.available.load_u16(place, Ordering::Relaxed);
        match self.in_flight.get(usize::from(head)) {
            None => return Err(RingError::NoSuchDescriptor(head)),
            Some(true) => return Err(RingError::HeadInFlight(head)),
            Some(false) => {}
        }
        self.walk(head, chain)?;
        self.in_flight[usize::from(head)] = true;
        self.state.next = self.state.next.wrapping_add(1);
        Ok(true)
    }

    /// Walks the chain of a request that was taken and not completed once more.
    ///
    /// # Errors
    ///
    /// The guest has changed it into one that no request has: the ring is broken.
    pub fn take_again(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        debug_assert!(self.in_flight[usize::from(head)], "taken before");
        self.walk(head, chain)
    }

    /// Undoes the last [`pop`](Self::pop), of a chain that turned out to be no request. What was not
    /// completed does not count as taken, or the used ring would get a gap when it is made anew.
    pub fn put_back(&mut self, head: u16) {
        self.in_flight[usize::from(head)] = false;
        self.state.next = self.state.next.wrapping_sub(1);
    }

    /// Follows a chain through its table, and through the indirect table that may end it.
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.head = head;
        chain.outside = false;
        chain.status_inside = false;
        self.view.reset(&mut chain.readable);
        self.view.reset(&mut chain.writable);
        let mut table = Table::Ring(&self.descriptors);
        let mut entries = u32::from(self.state.size);
        let mut index = u32::from(head);
        let mut left = self.max_chain;
        let mut writing = false;
        loop {
            let indirect = !matches!(table, Table::Ring(_));
            if index >= entries {
                return Err(match indirect {
                    true => RingError::BadIndirect(head),
                    false => RingError::NoSuchDescriptor(index as u16),
                });
            }
            let descriptor = self.load(&table, index)?;
            if descriptor.has(INDIRECT) {
                let bytes = descriptor.bytes;
                let whole = bytes != 0 && bytes.is_multiple_of(DESCRIPTOR_BYTES);
                if indirect || descriptor.has(NEXT) || !whole {
                    return Err(RingError::BadIndirect(head));
                }
                let area = self.view.area(descriptor.address, u64::from(bytes), 8);
                table = area.map_or(Table::Scattered(descriptor.address), Table::Indirect);
                entries = bytes / DESCRIPTOR_BYTES;
                index = 0;
                continue;
            }
            // Longer tables are legal, but no chain uses more of one than it may be long.
            left = left.checked_sub(1).ok_or(RingError::EndlessChain(head))?;
            if descriptor.has(WRITE) {
                writing = true;
            } else if writing {
                return Err(RingError::BadOrder(head));
            }
            self.add(chain, descriptor);
            if !descriptor.has(NEXT) {
                return Ok(());
            }
            index = u32::from(descriptor.next);
        }
    }

    fn load(&self, table: &Table<'_>, index: u32) -> Result<Descriptor, RingError> {
        let offset = (index * DESCRIPTOR_BYTES) as usize;
        let area = match table {
            Table::Ring(area) => area,
            Table::Indirect(area) => area,
            Table::Scattered(address) => {
                let mut place = self.view.segments();
                let address = address.wrapping_add(offset as u64);
                let found = self.view.append(&mut place, address, DESCRIPTOR_BYTES);
                found.map_err(|_| RingError::OutsideMemory)?;
                let mut raw = [0; DESCRIPTOR_BYTES as usize];
                place.copy_to(&mut raw);
                let (address, rest) = raw.split_at(8);
                let word = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("eight bytes"));
                return Ok(Descriptor::new(word(address), word(rest)));
            }
        };
        Ok(Descriptor::new(
            area.load_u64(offset),
            area.load_u64(offset + 8),
        ))
    }

    fn add(&self, chain: &mut Chain, descriptor: Descriptor) {
        let (address, bytes) = (descriptor.address, descriptor.bytes);
        if !descriptor.has(WRITE) {
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

    /// Gives a request back to the guest, with how many bytes were written to its memory. The guest
    /// sees it after [`publish`](Self::publish).
    pub fn push(&mut self, head: u16, written: u32) {
        let place = &mut self.in_flight[usize::from(head)];
        assert!(std::mem::replace(place, false), "completed exactly once");
        let place = self.entry(self.next_used, 8);
        self.used.store_u32(place, u32::from(head));
        self.used.store_u32(place + 4, written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// How many completions the guest has not been shown.
    pub fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    /// Shows the guest what was pushed; returns whether it wants to be called for it.
    pub fn publish(&mut self) -> bool {
        if self.unpublished() == 0 {
            return false;
        }
        self.published = self.next_used;
        self.used
            .store_u16(INDEX, self.next_used, Ordering::Release);
        // Orders the used index before the look at what the driver wishes.
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.announced, self.next_used);
        if !self.state.event_index {
            return self.available.load_u16(FLAGS, Ordering::Relaxed) & NO_INTERRUPT == 0;
        }
        let event = self
            .available
            .load_u16(self.used_event(), Ordering::Relaxed);
        let since_event = self.next_used.wrapping_sub(event).wrapping_sub(1);
        since_event < self.next_used.wrapping_sub(before)
    }

    /// Asks the guest not to kick: the worker looks by itself. With an event index there is nothing to
    /// do, as the guest kicks once and then not before it is asked again.
    pub fn suppress_kicks(&mut self) {
        if !self.state.event_index && !std::mem::replace(&mut self.kicks_suppressed, true) {
            self.used.store_u16(FLAGS, NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks the guest to kick for what it makes available from now on; returns whether something
    /// became available meanwhile, for which no kick may come.
    pub fn want_kicks(&mut self) -> bool {
        if self.state.event_index {
            let place = self.available_event();
            self.used
                .store_u16(place, self.state.next, Ordering::Relaxed);
        } else {
            self.kicks_suppressed = false;
            self.used.store_u16(FLAGS, 0, Ordering::Relaxed);
        }
        // Orders the wish before the look at what is available.
        fence(Ordering::SeqCst);
        self.available.load_u16(INDEX, Ordering::Relaxed) != self.state.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::memory::Region;
    use std::sync::Arc;
    use virtio_queue::desc::RawDescriptor;
    use virtio_queue::desc::split::Descriptor as RawSplit;
    use vm_memory::{Bytes, GuestAddress};

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
        let ring = Ring::new(state, GuestView::new(Arc::clone(&map)), 6).unwrap();
        Guest {
            map,
            ring,
            available: 0,
        }
    }

    impl Guest {
        fn describe(&self, table: u64, index: u64, descriptor: (u64, u32, u16, u16)) {
            let (address, bytes, flags, next) = descriptor;
            let raw = RawDescriptor::from(RawSplit::new(address, bytes, flags, next));
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
            self.pop()
        }

        fn pop(&mut self) -> Result<Option<Chain>, RingError> {
            let mut chain = Chain::default();
            Ok(self.ring.pop(&mut chain)?.then_some(chain))
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
        assert!(guest.pop().unwrap().is_none());
        guest.ring.push(3, 513);
        assert!(guest.ring.publish());
        assert!(!guest.ring.publish());
    }

    #[test]
    fn a_ring_made_anew_goes_on_with_the_heads_that_it_takes_along() {
        let mut guest = guest();
        for head in [3, 5] {
            guest.describe(0x1000, u64::from(head), (0x6000, 513, WRITE, 0));
            guest.offer(head).unwrap().unwrap();
        }
        guest.ring.push(3, 1);
        guest.ring.publish();
        let view = GuestView::new(Arc::clone(&guest.map));
        guest.ring = Ring::new(guest.ring.state(), view, 6).unwrap();
        guest.ring.take_along([5]);
        assert_eq!(guest.offer(5).unwrap_err(), RingError::HeadInFlight(5));
        let mut chain = Chain::default();
        guest.ring.take_again(5, &mut chain).unwrap();
        assert_eq!((chain.head, chain.writable.bytes()), (5, 513));
        guest.ring.push(5, 513);
        guest.ring.publish();
        // The second entry of the used ring, and an index of two.
        let used: [u32; 2] = guest
            .map
            .memory()
            .read_obj(GuestAddress(0x3000 + 4 + 8))
            .unwrap();
        let index: u16 = guest.map.memory().read_obj(GuestAddress(0x3002)).unwrap();
        assert_eq!((used, index), ([5, 513], 2));
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
    }

    #[test]
    fn a_head_that_does_not_exist_is_none_and_stays_next() {
        let mut guest = guest();
        for _ in 0..2 {
            assert_eq!(guest.offer(9).unwrap_err(), RingError::NoSuchDescriptor(9));
            assert_eq!(guest.ring.state().next, 0);
        }
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
        assert_eq!(guest.pop().unwrap_err(), RingError::IndexJump);
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

    /// Takes the same chains from the same ring as `virtio-queue` does, and wants the guest called
    /// when it does.
    #[test]
    fn whole_chains_and_calls_are_those_of_virtio_queue() {
        use virtio_queue::{Queue, QueueOwnedT, QueueT};
        for seed in 0..300 {
            let mut random = blockcore::engine::sim::Random::new(seed);
            let event_index = random.chance(500);
            let next = random.below(65536) as u16;
            let region = Region::anonymous(0, 0x10000).unwrap();
            let map = GuestMap::new(vec![region]).unwrap();
            let memory = map.memory();
            let state = RingState {
                size: 16,
                descriptors: 0x1000,
                available: 0x2000,
                used: 0x3000,
                next,
                event_index,
            };
            let mut ring = Ring::new(state, GuestView::new(Arc::clone(&map)), 16).unwrap();
            let mut oracle = Queue::new(16).unwrap();
            oracle.set_desc_table_address(Some(0x1000), None);
            oracle.set_avail_ring_address(Some(0x2000), None);
            oracle.set_used_ring_address(Some(0x3000), None);
            oracle.set_event_idx(event_index);
            oracle.set_next_avail(next);
            oracle.set_next_used(next);
            oracle.set_ready(true);
            let put =
                |table: u64, index: u64, (address, bytes, flags, next): (u64, u32, u16, u16)| {
                    let raw = RawDescriptor::from(RawSplit::new(address, bytes, flags, next));
                    memory
                        .write_obj(raw, GuestAddress(table + index * 16))
                        .unwrap();
                };
            let mut available = next;
            for round in 0..20_u64 {
                // One chain of up to five descriptors, in the ring or in an indirect table.
                let count = random.between(1, 5) as u16;
                let readable = random.below(u64::from(count) + 1) as u16;
                let indirect = random.chance(300);
                let table = if indirect { 0x8000 } else { 0x1000 };
                let first = if indirect { 0 } else { random.below(16) as u16 };
                let place = |i: u16| if indirect { i } else { (first + i) % 16 };
                for i in 0..count {
                    let bytes = random.between(1, 600) as u32;
                    let address = 0x4000 + random.below(0x3000);
                    let write = if i >= readable { WRITE } else { 0 };
                    let more = if i + 1 < count { NEXT } else { 0 };
                    put(
                        table,
                        u64::from(place(i)),
                        (address, bytes, write | more, place(i + 1)),
                    );
                }
                let head = if indirect {
                    random.below(16) as u16
                } else {
                    first
                };
                if indirect {
                    put(
                        0x1000,
                        u64::from(head),
                        (0x8000, u32::from(count) * 16, INDIRECT, 0),
                    );
                }
                let entry = 0x2004 + u64::from(available % 16) * 2;
                memory.write_obj(head, GuestAddress(entry)).unwrap();
                available = available.wrapping_add(1);
                memory.write_obj(available, GuestAddress(0x2002)).unwrap();

                let mut chain = Chain::default();
                assert!(ring.pop(&mut chain).unwrap(), "seed {seed} round {round}");
                let theirs = oracle.iter(memory).unwrap().next().unwrap();
                assert_eq!(chain.head, theirs.head_index());
                let (mut read, mut write) = (0, 0);
                for descriptor in theirs {
                    let bytes = u64::from(descriptor.len());
                    *(if descriptor.is_write_only() {
                        &mut write
                    } else {
                        &mut read
                    }) += bytes;
                }
                assert_eq!(
                    (chain.readable.bytes(), chain.writable.bytes()),
                    (read, write)
                );

                // What the guest wishes, as its driver would write it.
                let event = available.wrapping_sub(random.between(0, 3) as u16);
                memory.write_obj(event, GuestAddress(0x2004 + 32)).unwrap();
                ring.push(head, 7);
                if random.chance(600) {
                    let call = ring.publish();
                    let index: u16 = memory.read_obj(GuestAddress(0x3002)).unwrap();
                    oracle.set_next_used(ring.published.wrapping_sub(1));
                    oracle.add_used(memory, head, 7).unwrap();
                    assert_eq!(index, oracle.next_used());
                    // The oracle has counted one completion; more make a call more likely.
                    let wanted = oracle.needs_notification(memory).unwrap();
                    assert!(call || !wanted, "seed {seed} round {round}");
                }
            }
        }
    }
}
