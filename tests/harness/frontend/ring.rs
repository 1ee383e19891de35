//! A split virtqueue laid out by hand, from the driver's side.
//!
//! Two layers again: [`Ring::set_descriptor`], [`Ring::offer`] and [`Ring::publish`] write
//! whatever they are told, right or wrong; [`Ring::submit`] and [`Ring::pop`] are a correct
//! driver, which kicks only when the back-end asked for it and sleeps until it is called. So a
//! back-end that forgets to ask, or to call, is found out by the time limit.
//!
//! Layout and notification rules: virtio specification, "Split Virtqueues".

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::Heap;
use super::connection::LIMIT;
use super::event::Event;
use super::memory::GuestMemory;

/// Descriptor flag: `next` is valid.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes here.
pub const WRITE: u16 = 2;
/// Descriptor flag: a table of descriptors is here.
pub const INDIRECT: u16 = 4;

/// Available ring flag: do not call (only without `EVENT_IDX`).
const NO_INTERRUPT: u16 = 1;
/// Used ring flag: do not kick (only without `EVENT_IDX`).
const NO_NOTIFY: u16 = 1;

/// One descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `NEXT`, `WRITE`, `INDIRECT`.
    pub flags: u16,
    /// Index of the next one in the chain.
    pub next: u16,
}

impl Descriptor {
    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it, rather than reads it.
    pub writable: bool,
}

impl Part {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            writable: true,
        }
    }
}

/// The descriptors of a well-formed chain over `parts`, numbered by `indexes`.
pub fn chain(parts: &[Part], indexes: &[u16]) -> Vec<Descriptor> {
    parts
        .iter()
        .enumerate()
        .map(|(position, part)| {
            let next = indexes.get(position + 1).copied();
            Descriptor {
                addr: part.addr,
                len: part.len,
                flags: if part.writable { WRITE } else { 0 } | next.map_or(0, |_| NEXT),
                next: next.unwrap_or(0),
            }
        })
        .collect()
}

/// Guest addresses of the three areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Areas {
    /// The descriptor table: 16 bytes each.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// First descriptor of the completed chain.
    pub head: u32,
    /// How many bytes the device says it wrote.
    pub length: u32,
}

/// A virtqueue and the driver's view of it.
#[derive(Debug)]
pub struct Ring {
    /// Its number.
    pub queue: u32,
    /// Its number of descriptors.
    pub size: u16,
    /// Where it lies.
    pub areas: Areas,
    /// Driver to device.
    pub kick: Event,
    /// Device to driver.
    pub call: Event,
    /// Device to driver: this queue is broken.
    pub error: Event,
    memory: GuestMemory,
    event_idx: bool,
    next_available: u16,
    kicked_at: u16,
    last_used: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl Ring {
    /// A ring of `size` descriptors in memory taken from `heap`, empty, its indexes at zero.
    pub fn new(
        memory: &GuestMemory,
        heap: &mut Heap,
        queue: u32,
        size: u16,
        event_idx: bool,
    ) -> Self {
        let entries = u64::from(size);
        let areas = Areas {
            descriptors: heap.take(16 * entries, 16),
            available: heap.take(6 + 2 * entries, 2),
            used: heap.take(6 + 8 * entries, 4),
        };
        memory.write(areas.available, &vec![0; 6 + 2 * entries as usize]);
        memory.write(areas.used, &vec![0; 6 + 8 * entries as usize]);
        Self {
            queue,
            size,
            areas,
            kick: Event::new(),
            call: Event::new(),
            error: Event::new(),
            memory: memory.clone(),
            event_idx,
            next_available: 0,
            kicked_at: 0,
            last_used: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// Moves all indexes to `base`, as of a ring that has served that many requests. Only
    /// before it is started.
    pub fn set_base(&mut self, base: u16) {
        assert!(
            self.chains.is_empty(),
            "a ring with requests cannot be moved"
        );
        self.next_available = base;
        self.kicked_at = base;
        self.last_used = base;
        self.memory.store_u16(self.areas.available + 2, base);
        self.memory.store_u16(self.areas.used + 2, base);
        // Where the device would have asked to be kicked next.
        let event = self.areas.used + 4 + 8 * u64::from(self.size);
        self.memory.store_u16(event, base);
    }

    /// Turns `EVENT_IDX` on or off, as another negotiation would. Only while it is stopped.
    pub fn set_event_idx(&mut self, on: bool) {
        self.event_idx = on;
    }

    /// How many requests were made available, modulo 2^16.
    pub fn available_index(&self) -> u16 {
        self.next_available
    }

    /// How many completions were taken, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        self.last_used
    }

    /// How many chains are with the device.
    pub fn in_flight(&self) -> usize {
        self.chains.len()
    }

    /// Writes descriptor `index` of the table, whatever it holds.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        let at = self.areas.descriptors + 16 * u64::from(index);
        self.memory.write(at, &descriptor.to_bytes());
    }

    /// Writes `head` to the next slot of the available ring. [`publish`](Self::publish) makes
    /// it visible.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.memory
            .store_u16(self.areas.available + 4 + 2 * slot, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Makes what was offered available.
    pub fn publish(&self) {
        self.publish_index(self.next_available);
    }

    /// Writes any available index.
    pub fn publish_index(&self, index: u16) {
        self.memory.store_u16(self.areas.available + 2, index);
    }

    /// Kicks, if the device wants that for what was published since the last time.
    pub fn kick_if_wanted(&mut self) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self
                .memory
                .load_u16(self.areas.used + 4 + 8 * u64::from(self.size));
            needs_event(event, self.next_available, self.kicked_at)
        } else {
            self.memory.load_u16(self.areas.used) & NO_NOTIFY == 0
        };
        self.kicked_at = self.next_available;
        if wanted {
            self.kick.signal();
        }
    }

    /// Lays out a chain over `parts` in free descriptors; its head is the first.
    ///
    /// # Panics
    ///
    /// If there are too few free descriptors.
    #[track_caller]
    pub fn lay_out(&mut self, parts: &[Part]) -> u16 {
        assert!(
            parts.len() <= self.free.len(),
            "queue {} has {} free descriptors, {} are needed",
            self.queue,
            self.free.len(),
            parts.len()
        );
        let indexes = self.free.split_off(self.free.len() - parts.len());
        for (descriptor, index) in chain(parts, &indexes).into_iter().zip(&indexes) {
            self.set_descriptor(*index, descriptor);
        }
        let head = indexes[0];
        self.chains.insert(head, indexes);
        head
    }

    /// Lays out a table of descriptors over `parts` at `table`, and one descriptor for it.
    #[track_caller]
    pub fn lay_out_indirect(&mut self, table: u64, parts: &[Part]) -> u16 {
        let indexes: Vec<u16> = (0..parts.len() as u16).collect();
        let entries = chain(parts, &indexes);
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|descriptor| descriptor.to_bytes())
            .collect();
        self.memory.write(table, &bytes);
        let head = self.lay_out(&[Part::readable(table, bytes.len() as u32)]);
        self.set_descriptor(
            head,
            Descriptor {
                addr: table,
                len: bytes.len() as u32,
                flags: INDIRECT,
                next: 0,
            },
        );
        head
    }

    /// Sends one request: lays it out, makes it available, kicks if wanted.
    #[track_caller]
    pub fn submit(&mut self, parts: &[Part]) -> u16 {
        let head = self.lay_out(parts);
        self.offer(head);
        self.publish();
        self.kick_if_wanted();
        head
    }

    /// The next completion, if there is one.
    ///
    /// # Panics
    ///
    /// If the device completed more than was made available, or a chain that it does not have.
    #[track_caller]
    pub fn try_pop(&mut self) -> Option<Used> {
        let used = self.peek()?;
        let head = u16::try_from(used.head).unwrap_or(u16::MAX);
        let indexes = self.chains.remove(&head).unwrap_or_else(|| {
            panic!(
                "queue {} completed chain {}, which is not in flight",
                self.queue, used.head
            )
        });
        self.free.extend(indexes);
        self.last_used = self.last_used.wrapping_add(1);
        Some(used)
    }

    /// The next completion as the used ring has it, believed or not, without taking it.
    #[track_caller]
    pub fn peek(&self) -> Option<Used> {
        let index = self.memory.load_u16(self.areas.used + 2);
        if index == self.last_used {
            return None;
        }
        let behind = index.wrapping_sub(self.last_used);
        assert!(
            behind <= self.size,
            "the used index of queue {} jumped from {} to {index}",
            self.queue,
            self.last_used
        );
        let slot = u64::from(self.last_used % self.size);
        let entry = self.memory.read(self.areas.used + 4 + 8 * slot, 8);
        let field =
            |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
        Some(Used {
            head: field(0),
            length: field(4),
        })
    }

    /// Counts a completion as taken and keeps its chain laid out, to be offered again.
    pub fn skip_used(&mut self) {
        self.last_used = self.last_used.wrapping_add(1);
    }

    /// Waits for a completion as a driver does: asks to be called, sleeps until it is. None
    /// after `limit`, or once the device has signalled that the queue is broken.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> Option<Used> {
        let end = Instant::now() + limit;
        loop {
            if let Some(used) = self.try_pop() {
                return Some(used);
            }
            self.ask_for_call(self.last_used);
            if self.peek().is_some() {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            // Short turns, so that a signal on the other descriptor is seen soon.
            if self.call.wait(left.min(Duration::from_millis(20))) {
                self.call.take();
                continue;
            }
            if let Some(used) = self.peek() {
                // The device may publish between our look and its call: give it a moment.
                assert!(
                    self.call.wait(LIMIT),
                    "queue {}: {used:?} was published without a call",
                    self.queue
                );
                continue;
            }
            if self.error.wait(Duration::ZERO) {
                return None;
            }
        }
    }

    /// The next completion, waiting up to [`LIMIT`].
    ///
    /// # Panics
    ///
    /// If none comes, or the device says that the queue is broken.
    #[track_caller]
    pub fn pop(&mut self) -> Used {
        self.wait(LIMIT).unwrap_or_else(|| {
            panic!(
                "queue {}: no completion ({} in flight, available index {}, used index {}, {})",
                self.queue,
                self.in_flight(),
                self.next_available,
                self.last_used,
                if self.error.wait(Duration::ZERO) {
                    "the queue was reported broken"
                } else {
                    "time limit passed"
                }
            )
        })
    }

    /// Asks for a call when the completion number `index` has been published; with `EVENT_IDX`.
    pub fn ask_for_call(&self, index: u16) {
        if self.event_idx {
            let at = self.areas.available + 4 + 2 * u64::from(self.size);
            self.memory.store_u16(at, index);
            fence(Ordering::SeqCst);
        }
    }

    /// Asks for no calls at all, or for all; without `EVENT_IDX`.
    pub fn suppress_calls(&self, on: bool) {
        let flags = if on { NO_INTERRUPT } else { 0 };
        self.memory.store_u16(self.areas.available, flags);
    }

    /// Throws away all that is in flight and begins anew at index zero, as a driver does after
    /// a reset of the device.
    pub fn reset(&mut self) {
        self.chains.clear();
        self.free = (0..self.size).rev().collect();
        self.set_base(0);
        self.call.take();
        self.error.take();
    }

    /// Takes a new kick eventfd, for the caller to hand over.
    pub fn replace_kick(&mut self, kick: Event) -> Event {
        std::mem::replace(&mut self.kick, kick)
    }

    /// Takes a new call eventfd, for the caller to hand over.
    pub fn replace_call(&mut self, call: Event) -> Event {
        std::mem::replace(&mut self.call, call)
    }

    /// The descriptors behind the three events: kick, call, error.
    pub fn events(&self) -> [std::os::fd::BorrowedFd<'_>; 3] {
        [self.kick.as_fd(), self.call.as_fd(), self.error.as_fd()]
    }
}

/// Whether going from `old` to `new` passes `event`: virtio specification, "Available Buffer
/// Notification Suppression".
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_needed_only_when_it_is_passed() {
        assert!(needs_event(5, 6, 5));
        assert!(!needs_event(6, 6, 5));
        assert!(!needs_event(4, 6, 5));
        assert!(needs_event(0xffff, 1, 0xfffe));
        assert!(!needs_event(1, 1, 0xfffe));
    }

    #[test]
    fn a_chain_names_its_next_descriptor_and_ends() {
        let parts = [
            Part::readable(1, 2),
            Part::writable(3, 4),
            Part::writable(5, 6),
        ];
        let chain = chain(&parts, &[7, 2, 9]);
        assert_eq!(
            chain
                .iter()
                .map(|entry| (entry.flags, entry.next))
                .collect::<Vec<_>>(),
            [(NEXT, 2), (NEXT | WRITE, 9), (WRITE, 0)]
        );
    }
}
