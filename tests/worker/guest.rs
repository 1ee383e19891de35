//! The simulated guest: its memory, its driver's rings, and what it thinks of each answer.
//!
//! It kicks only when the ring asks for it and looks at a ring only when it was called (or polls, if
//! the seed says so). So a kick or a call that is not asked for or not made leaves the simulation
//! with nothing to do, which it reports.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use backend::export::QueueSetup;
use backend::vhost_user::memory::{GuestMap, Region, RegionSpec};
use backend::virtio::queue::RingState;
use blockcore::engine::sim::{Simulation, Turn};
use harness::frontend::Heap;
use harness::frontend::blk::{self, HEADER_BYTES, UNTOUCHED};
use harness::frontend::event::Event;
use harness::frontend::memory::GuestMemory;
use harness::frontend::ring::{Part, Ring, Used};

use crate::Test;
use crate::request::{Request, Verdict};

/// Where the guest's memory begins.
const START: u64 = 0x4000_0000;
/// Nothing is there.
pub(crate) const OUTSIDE: u64 = 0x10;
/// Longest transfer.
pub(crate) const MAX_BYTES: u64 = 65536;
/// Memory of one request: its data twice over, for gaps, with its header, status and indirect table.
const SLOT_BYTES: u64 = 2 * MAX_BYTES + 4 * PAGE;
/// Most pieces of a request's data; its table then fits a page.
const MAX_PIECES: usize = 100;
const PAGE: u64 = 4096;
/// What a request's memory holds once the guest uses it for something else.
const SCRIBBLE: u8 = 0xdd;

/// See the module's header.
pub(crate) struct Guest {
    test: Rc<Test>,
    memory: GuestMemory,
    map: Arc<GuestMap>,
    queues: Vec<Queue>,
}

struct Queue {
    ring: Ring,
    /// What the device watches; none if this queue never kicks.
    kick: Option<Arc<OwnedFd>>,
    event_index: bool,
    /// Looks by itself instead of being called.
    polls: bool,
    /// In the middle of looking at completions.
    looking: bool,
    /// No request is made: the queue is broken.
    broken: bool,
    slots: Vec<u64>,
    descriptors: usize,
    asked: BTreeMap<u16, Asked>,
}

/// A request that is with the device.
struct Asked {
    request: Request,
    slot: u64,
    descriptors: usize,
    laid: Laid,
}

/// Where a request lies.
struct Laid {
    parts: Vec<Part>,
    /// Address and length of each piece of data.
    data: Vec<(u64, u32)>,
    status: u64,
    /// All memory from the first piece to the last.
    span: (u64, u64),
}

impl Guest {
    /// A guest with memory of zeroes, whose queues have not been started.
    pub(crate) fn new(test: Rc<Test>) -> Rc<RefCell<Self>> {
        let case = &test.case;
        let slots = (case.queues * case.depth) as u64;
        // Two regions that adjoin, so that buffers cross from one into the other.
        let first = (1 << 20) + slots / 2 * SLOT_BYTES + 9 * PAGE;
        let second = (slots - slots / 2) * SLOT_BYTES;
        let layout = [(START, first), (START + first, second)];
        let memory = GuestMemory::new(&layout);
        let regions = memory.regions();
        let regions = regions.iter().map(|region| {
            let file = region.file().try_clone_to_owned().expect("a duplicate");
            let spec = RegionSpec {
                guest_address: region.entry.guest_addr,
                bytes: region.entry.bytes,
                user_address: region.entry.user_addr,
                file_offset: region.entry.mmap_offset,
            };
            Region::map(spec, file).expect("memory can be mapped")
        });
        let map = GuestMap::new(regions.collect()).expect("they do not overlap");
        let mut heap = Heap::new(START, START + first + second);
        let queues = (0..case.queues).map(|index| {
            let mut ring = Ring::new(&memory, &mut heap, index as u32, case.ring, false);
            ring.set_event_idx(case.event_index);
            ring.set_base(test.below(1 << 16) as u16);
            let kick = ring.events()[0].try_clone_to_owned().expect("a duplicate");
            Queue {
                ring,
                kick: (!test.chance(case.unkicked_permille)).then(|| Arc::new(kick)),
                event_index: case.event_index,
                polls: test.chance(150),
                // Asks to be called when it finds nothing.
                looking: true,
                broken: false,
                slots: Vec::new(),
                descriptors: usize::from(case.ring),
                asked: BTreeMap::new(),
            }
        });
        let mut queues: Vec<_> = queues.collect();
        for queue in &mut queues {
            for _ in 0..case.depth {
                queue.slots.push(heap.take(SLOT_BYTES, PAGE));
            }
        }
        Rc::new(RefCell::new(Self {
            test,
            memory,
            map,
            queues,
        }))
    }

    /// What the device is told to start a queue from `next` on.
    pub(crate) fn setup(&self, index: usize, next: u16) -> QueueSetup {
        let queue = &self.queues[index];
        let [_, call, error] = queue.ring.events();
        let areas = queue.ring.areas;
        QueueSetup {
            ring: RingState {
                size: queue.ring.size,
                descriptors: areas.descriptors,
                available: areas.available,
                used: areas.used,
                next,
                event_index: queue.event_index,
            },
            memory: Arc::clone(&self.map),
            kick: queue.kick.clone(),
            call: Some(Arc::new(call.try_clone_to_owned().expect("a duplicate"))),
            error: Some(Arc::new(error.try_clone_to_owned().expect("a duplicate"))),
            guest_flushes: true,
            hang_up: Arc::new(|| panic!("this guest cuts no memory short")),
        }
    }

    /// The memory, as the device has it.
    pub(crate) fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// Where a queue's completions stand.
    pub(crate) fn used_index(&self, index: usize) -> u16 {
        self.queues[index].ring.used_index()
    }

    /// How many requests have no answer.
    pub(crate) fn outstanding(&self) -> usize {
        self.queues.iter().map(|queue| queue.asked.len()).sum()
    }

    /// Makes up to `count` requests available at once on a queue.
    pub(crate) fn submit(&mut self, simulation: &Simulation, index: usize, count: u64) {
        let mut offered = false;
        for _ in 0..count {
            if self.outstanding() >= self.test.case.depth || self.queues[index].broken {
                break;
            }
            let request = Request::random(&self.test);
            offered |= self.offer(index, request);
        }
        let queue = &mut self.queues[index];
        if offered {
            queue.ring.publish();
            queue.kick(simulation);
        }
    }

    /// Makes a head available that does not exist. The queue is broken until it is [reset].
    ///
    /// [reset]: Self::reset
    pub(crate) fn break_queue(&mut self, simulation: &Simulation, index: usize) {
        let queue = &mut self.queues[index];
        queue.broken = true;
        queue.ring.offer(queue.ring.size + 3);
        queue.ring.publish();
        queue.kick(simulation);
    }

    /// Whether a queue's ring has room for one more entry, even if the device has taken none yet.
    pub(crate) fn has_room(&self, index: usize) -> bool {
        let queue = &self.queues[index];
        queue.asked.len() < usize::from(queue.ring.size)
    }

    /// Whether a queue is broken.
    pub(crate) fn is_broken(&self, index: usize) -> bool {
        self.queues[index].broken
    }

    /// Whether the device has said that a queue is broken.
    pub(crate) fn told_broken(&self, index: usize) -> bool {
        self.queues[index].ring.error.take() > 0
    }

    /// Begins anew with a queue that is not served: what was made available before the break has been
    /// answered.
    pub(crate) fn reset(&mut self, index: usize) {
        self.look(index, u64::MAX);
        let queue = &mut self.queues[index];
        if !queue.asked.is_empty() {
            let left = queue.asked.len();
            let why = format!("{left} requests of queue {index} were popped and not completed");
            self.test.fail(why);
        }
        queue.ring.reset();
        queue.broken = false;
        queue.looking = true;
    }

    /// Sets a queue that is not served up in another way.
    pub(crate) fn change(&mut self, index: usize) {
        // All that was completed is looked at: how calls are asked for may change.
        self.look(index, u64::MAX);
        let case = &self.test.case;
        let queue = &mut self.queues[index];
        if self.test.chance(500) {
            queue.event_index = case.event_index && self.test.chance(500);
            queue.ring.set_event_idx(queue.event_index);
        }
        if self.test.chance(500) {
            queue.ring.replace_kick(Event::new());
            let kick = queue.ring.events()[0].try_clone_to_owned();
            let kicks = !self.test.chance(case.unkicked_permille);
            queue.kick = kicks.then(|| Arc::new(kick.expect("a duplicate")));
        }
        queue.polls = self.test.chance(150);
        // Looks once more after it has asked to be called.
        queue.looking = true;
    }

    /// A new descriptor to be called by; what the old one was told is forgotten.
    pub(crate) fn replace_call(&mut self, index: usize) -> OwnedFd {
        let ring = &mut self.queues[index].ring;
        drop(ring.replace_call(Event::new()));
        let call = ring.events()[1].try_clone_to_owned();
        call.expect("a duplicate")
    }

    /// Lays a request out and puts it into the available ring; `false` if there is no room.
    fn offer(&mut self, index: usize, request: Request) -> bool {
        let indirect = self.test.case.indirect && self.test.chance(400);
        let room = self.queues[index].descriptors;
        let Some(slot) = self.queues[index].slots.pop() else {
            request.forget(&self.test);
            return false;
        };
        let most = match indirect {
            true if self.test.chance(30) => MAX_PIECES,
            true => 8,
            // Header and status may take three descriptors.
            false => room.saturating_sub(3).min(8),
        };
        let needed = if indirect { 1 } else { 4 };
        if room < needed {
            self.queues[index].slots.push(slot);
            request.forget(&self.test);
            return false;
        }
        let laid = self.lay(slot, &request, most);
        let queue = &mut self.queues[index];
        let (head, descriptors) = match indirect {
            true => {
                // Tables need not be aligned.
                let table = slot + SLOT_BYTES - PAGE + 4 * self.test.below(3);
                (queue.ring.lay_out_indirect(table, &laid.parts), 1)
            }
            false => (queue.ring.lay_out(&laid.parts), laid.parts.len()),
        };
        queue.ring.offer(head);
        queue.descriptors -= descriptors;
        let asked = Asked {
            request,
            slot,
            descriptors,
            laid,
        };
        queue.asked.insert(head, asked);
        true
    }

    /// Puts a request's header, data and status into the memory of `slot`, in pieces and with gaps.
    fn lay(&self, slot: u64, request: &Request, most: usize) -> Laid {
        let test = &self.test;
        let bytes = match request.output.len() {
            0 => request.input_bytes,
            output => output as u64,
        };
        let writable = request.output.is_empty();
        let unit = [1, 16, 512, 4096][test.below(4) as usize];
        let begin = slot + PAGE + test.below(PAGE / unit) * unit;
        let mut data = Vec::new();
        let (mut at, mut left) = (begin, bytes);
        while left > 0 {
            let cut = data.len() + 1 < most && (most > 8 || test.chance(400));
            let piece = match cut {
                true => (1 + test.below(left)).next_multiple_of(unit).min(left),
                false => left,
            };
            data.push((at, piece as u32));
            left -= piece;
            let gap = test.below(3) * unit;
            let gaps = at - begin + piece + gap + left <= 2 * MAX_BYTES;
            at += piece + if gaps && left > 0 { gap } else { 0 };
        }
        let span = (begin, at - begin);
        let fill = vec![UNTOUCHED; span.1 as usize];
        self.memory.write(begin, &fill);
        let mut output = request.output.as_slice();
        for &(at, piece) in data.iter().filter(|_| !writable) {
            let (now, later) = output.split_at(piece as usize);
            self.memory.write(at, now);
            output = later;
        }
        let mut parts: Vec<_> = data
            .iter()
            .map(|&(addr, len)| Part {
                addr,
                len,
                writable,
            })
            .collect();
        if request.outside {
            let last = parts.last_mut().expect("outside requests have data");
            last.addr = OUTSIDE;
        }
        let status = self.frame(slot, request, &mut parts, at);
        Laid {
            parts,
            data,
            status,
            span,
        }
    }

    /// Puts header and status around the data, together with it or apart; returns where the status is.
    fn frame(&self, slot: u64, request: &Request, parts: &mut Vec<Part>, end: u64) -> u64 {
        let test = &self.test;
        let header = blk::header(request.kind, request.sector);
        let whole = !request.outside && test.chance(300);
        match parts.first_mut() {
            Some(first) if whole && !first.writable => {
                first.addr -= u64::from(HEADER_BYTES);
                first.len += HEADER_BYTES;
                self.memory.write(first.addr, &header);
            }
            _ => {
                self.memory.write(slot, &header);
                let cut = if test.chance(200) { 7 } else { HEADER_BYTES };
                let halves = [(0, cut), (cut, HEADER_BYTES - cut)];
                let halves = halves.into_iter().filter(|(_, bytes)| *bytes > 0);
                let halves =
                    halves.map(|(from, bytes)| Part::readable(slot + u64::from(from), bytes));
                parts.splice(0..0, halves);
            }
        }
        let status = match parts.last_mut() {
            Some(last) if whole && last.writable => {
                last.len += 1;
                end
            }
            _ => {
                let apart = slot + 64 + test.below(64);
                parts.push(Part::writable(apart, 1));
                apart
            }
        };
        self.memory.write(status, &[UNTOUCHED]);
        status
    }

    /// Takes up to `limit` completions of a queue.
    fn look(&mut self, index: usize, limit: u64) -> bool {
        let mut any = false;
        for _ in 0..limit {
            let Some(used) = self.queues[index].ring.try_pop() else {
                break;
            };
            self.completed(index, used);
            any = true;
        }
        any
    }

    fn completed(&mut self, index: usize, used: Used) {
        let queue = &mut self.queues[index];
        let asked = queue.asked.remove(&(used.head as u16));
        let asked = asked.expect("the ring knows what is in flight");
        queue.descriptors += asked.descriptors;
        queue.slots.push(asked.slot);
        let laid = &asked.laid;
        let status = self.memory.read(laid.status, 1)[0];
        let mut input = Vec::new();
        if asked.request.output.is_empty() {
            for &(at, bytes) in &laid.data {
                input.extend(self.memory.read(at, bytes as usize));
            }
        }
        if !self.gaps_are_whole(laid, &asked.request) {
            self.test
                .fail("memory that is no part of a request was changed".into());
        }
        let verdict = Verdict {
            status,
            length: used.length,
            input,
        };
        asked.request.judge(&self.test, index, &verdict);
        // The memory is the guest's again. Whoever still looks at it or writes to it is found out.
        let (begin, bytes) = asked.laid.span;
        self.memory.write(begin, &vec![SCRIBBLE; bytes as usize]);
    }

    /// Whether what lies between a request's pieces, and the data that the device reads, is as it was.
    fn gaps_are_whole(&self, laid: &Laid, request: &Request) -> bool {
        let mut expected = vec![UNTOUCHED; laid.span.1 as usize];
        let mut found = self.memory.read(laid.span.0, expected.len());
        let mut output = request.output.as_slice();
        for &(at, bytes) in &laid.data {
            let place = (at - laid.span.0) as usize..(at - laid.span.0) as usize + bytes as usize;
            if request.output.is_empty() {
                found[place].fill(UNTOUCHED);
                continue;
            }
            let (now, later) = output.split_at(bytes as usize);
            expected[place].copy_from_slice(now);
            output = later;
        }
        found == expected
    }

    /// One turn of a queue's driver: completions, if it was called.
    fn turn(&mut self, index: usize) -> bool {
        let queue = &mut self.queues[index];
        let called = queue.ring.call.take() > 0;
        if !(called || queue.looking || queue.polls) {
            return false;
        }
        if called && !queue.looking && !queue.polls {
            queue.looking = true;
            queue.suppress_calls(true);
        }
        let limit = 1 + self.test.below(8);
        if self.look(index, limit) {
            return true;
        }
        let queue = &mut self.queues[index];
        if !std::mem::take(&mut queue.looking) || queue.polls {
            return called;
        }
        queue.suppress_calls(false);
        queue.ring.ask_for_call(queue.ring.used_index());
        queue.looking = queue.ring.peek().is_some();
        true
    }
}

impl Queue {
    fn kick(&mut self, simulation: &Simulation) {
        self.ring.kick_if_wanted();
        if self.ring.kick.take() > 0
            && let Some(kick) = &self.kick
        {
            simulation.kick(kick);
        }
    }

    fn suppress_calls(&self, on: bool) {
        if !self.event_index {
            self.ring.suppress_calls(on);
        }
    }
}

/// The guest's processors, which look at completions.
pub(crate) struct Driver(pub(crate) Rc<RefCell<Guest>>);

impl Turn for Driver {
    fn turn(&mut self) -> bool {
        let mut guest = self.0.borrow_mut();
        let mut progress = false;
        for index in 0..guest.queues.len() {
            progress |= guest.turn(index);
        }
        progress
    }

    fn pending(&self) -> String {
        let guest = self.0.borrow();
        let queues = guest.queues.iter().map(|queue| {
            format!(
                "{} unanswered (available {}, used {}, published {})",
                queue.asked.len(),
                queue.ring.available_index(),
                queue.ring.used_index(),
                queue.ring.peek().is_some(),
            )
        });
        queues.collect::<Vec<_>>().join("; ")
    }
}
