//! A vhost-user front-end made by hand.
//!
//! It shares no code with the back-end, so that a misreading of the protocol in one of them shows.
//! Every message, header flag, descriptor and ring entry can be made, right or wrong; on top of
//! that, [`Frontend`] is a correct front-end and driver in one, without a virtual machine.
//!
//! Nothing here waits longer than [`LIMIT`]: a hang is a failure that names its place.

pub mod blk;
pub mod connection;
pub mod event;
pub mod memory;
pub mod ring;

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use blk::{Config, Outcome, Request};
pub use connection::{Connection, LIMIT};
use connection::{Verdict, code, protocol};
use memory::{GuestMemory, Region};
use ring::{Part, Ring, Used};

/// Where the first region of a default guest begins. Not zero, so that a forgotten translation
/// hits nothing.
pub const MEMORY_START: u64 = 0x10_0000;
/// How long it is.
pub const MEMORY_BYTES: u64 = 32 << 20;

/// What a front-end asks for. What the back-end does not offer is not negotiated.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Feature bits to take if offered.
    pub features: u64,
    /// Protocol feature bits to take if offered.
    pub protocol_features: u64,
    /// Guest memory: address and length of each region.
    pub memory: Vec<(u64, u64)>,
}

impl Default for Wanted {
    fn default() -> Self {
        Self {
            features: !(blk::feature::NOTIFY_ON_EMPTY
                | blk::feature::LOG_ALL
                | blk::feature::RING_PACKED),
            protocol_features: protocol::MQ
                | protocol::REPLY_ACK
                | protocol::BACKEND_REQ
                | protocol::CONFIG
                | protocol::CONFIGURE_MEM_SLOTS,
            memory: vec![(MEMORY_START, MEMORY_BYTES)],
        }
    }
}

impl Wanted {
    /// Everything but these feature bits.
    pub fn without(mut self, features: u64) -> Self {
        self.features &= !features;
        self
    }

    /// Everything but these protocol feature bits.
    pub fn without_protocol(mut self, features: u64) -> Self {
        self.protocol_features &= !features;
        self
    }

    /// With this memory.
    pub fn with_memory(mut self, layout: &[(u64, u64)]) -> Self {
        self.memory = layout.to_vec();
        self
    }
}

/// Hands out guest memory, front to back. What was taken after a mark can be given back at once.
#[derive(Clone, Copy, Debug)]
pub struct Heap {
    next: u64,
    end: u64,
}

impl Heap {
    /// The addresses from `start` to `end`.
    pub fn new(start: u64, end: u64) -> Self {
        Self { next: start, end }
    }

    /// `bytes` bytes at a multiple of `alignment`.
    #[track_caller]
    pub fn take(&mut self, bytes: u64, alignment: u64) -> u64 {
        let addr = self.next.next_multiple_of(alignment);
        assert!(
            addr + bytes <= self.end,
            "the test takes more guest memory than there is"
        );
        self.next = addr + bytes;
        addr
    }

    /// Leaves out what is left before `addr`.
    pub fn skip_to(&mut self, addr: u64) {
        self.next = self.next.max(addr);
    }

    /// Where the next allocation may begin.
    pub fn mark(&self) -> u64 {
        self.next
    }

    /// Gives back all that was taken since `mark`.
    pub fn release(&mut self, mark: u64) {
        self.next = mark;
    }
}

/// A request that is with the device: where its answer will be.
#[derive(Clone, Debug)]
pub struct Pending {
    /// Head of its chain.
    pub head: u16,
    /// Guest address of the data that the device writes.
    pub input: u64,
    /// How much that is.
    pub input_bytes: usize,
    /// Guest address of the status byte.
    pub status: u64,
}

/// A connected front-end with its guest memory.
#[derive(Debug)]
pub struct Frontend {
    /// The socket.
    pub connection: Connection,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// What is left of it for rings and buffers.
    pub heap: Heap,
    /// Negotiated feature bits.
    pub features: u64,
    /// Negotiated protocol feature bits.
    pub protocol_features: u64,
}

impl Frontend {
    /// Connects, negotiates all that is offered and shares memory.
    #[track_caller]
    pub fn connect(socket: &Path) -> Self {
        Self::connect_with(socket, &Wanted::default())
    }

    /// As [`connect`](Self::connect), with less or other memory.
    #[track_caller]
    pub fn connect_with(socket: &Path, wanted: &Wanted) -> Self {
        let mut frontend = Self::unshared(socket, wanted);
        frontend.share_memory();
        frontend
    }

    /// Connects and negotiates, and does not share memory yet.
    #[track_caller]
    pub fn unshared(socket: &Path, wanted: &Wanted) -> Self {
        let mut connection = Connection::open(socket);
        let (features, protocol_features) = negotiate(&mut connection, wanted);
        let memory = GuestMemory::new(&wanted.memory);
        let start = wanted.memory.first().map_or(0, |first| first.0);
        let mut end = start;
        for &(addr, bytes) in &wanted.memory {
            if addr == end {
                end = addr + bytes;
            }
        }
        Self {
            connection,
            memory,
            heap: Heap::new(start, end),
            features,
            protocol_features,
        }
    }

    /// Tells the back-end of all memory, region by region if it can do that.
    #[track_caller]
    pub fn share_memory(&mut self) {
        if self.protocol_features & protocol::CONFIGURE_MEM_SLOTS == 0 {
            self.set_memory_table();
            return;
        }
        for region in self.memory.regions() {
            self.share_region(&region);
        }
    }

    /// Tells the back-end of all memory at once, in place of what it knows.
    #[track_caller]
    pub fn set_memory_table(&self) {
        let regions = self.memory.regions();
        let entries: Vec<_> = regions.iter().map(|region| region.entry).collect();
        let files: Vec<_> = regions.iter().map(|region| region.file()).collect();
        self.connection.tell(
            code::SET_MEM_TABLE,
            &connection::memory_table(entries.len() as u32, &entries),
            &files,
        );
    }

    /// Tells the back-end of one region more.
    #[track_caller]
    pub fn share_region(&self, region: &Region) {
        self.connection.tell(
            code::ADD_MEM_REG,
            &connection::memory_region(region.entry),
            &[region.file()],
        );
    }

    /// Takes a region away from the back-end and the guest.
    #[track_caller]
    pub fn remove_region(&self, guest_addr: u64) -> Arc<Region> {
        let region = self.memory.remove(guest_addr);
        self.connection.tell(
            code::REM_MEM_REG,
            &connection::memory_region(region.entry),
            &[],
        );
        region
    }

    /// Whether a feature bit was negotiated.
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    /// A ring in this guest's memory, not known to the back-end yet.
    pub fn new_ring(&mut self, queue: u32, size: u16) -> Ring {
        let event_idx = self.has(blk::feature::EVENT_IDX);
        Ring::new(&self.memory, &mut self.heap, queue, size, event_idx)
    }

    /// A ring, started.
    #[track_caller]
    pub fn start_queue(&mut self, queue: u32, size: u16) -> Ring {
        let ring = self.new_ring(queue, size);
        self.start(&ring, 0);
        ring
    }

    /// Starts a ring at `base`: size, base, addresses, events; enables it where rings begin
    /// disabled.
    #[track_caller]
    pub fn start(&self, ring: &Ring, base: u16) {
        self.set_up(ring, base);
        if self.has(blk::feature::PROTOCOL_FEATURES) {
            self.enable(ring.queue, true);
        }
    }

    /// As [`start`](Self::start), but for enabling it.
    #[track_caller]
    pub fn set_up(&self, ring: &Ring, base: u16) {
        let verdict = self.try_set_up(ring, base);
        assert_eq!(verdict, Verdict::Accepted, "starting queue {}", ring.queue);
    }

    /// As [`set_up`](Self::set_up), stopping at the first message that is refused.
    #[track_caller]
    pub fn try_set_up(&self, ring: &Ring, base: u16) -> Verdict {
        let [kick, call, error] = ring.events();
        let queue = u64::from(ring.queue).to_le_bytes();
        let state = |number: u32| connection::ring_state(ring.queue, number);
        for (code, body, fds) in [
            (code::SET_VRING_NUM, state(u32::from(ring.size)), vec![]),
            (code::SET_VRING_BASE, state(u32::from(base)), vec![]),
            (code::SET_VRING_ADDR, self.ring_addresses(ring), vec![]),
            (code::SET_VRING_CALL, queue.to_vec(), vec![call]),
            (code::SET_VRING_ERR, queue.to_vec(), vec![error]),
            (code::SET_VRING_KICK, queue.to_vec(), vec![kick]),
        ] {
            let verdict = self.connection.try_tell(code, &body, &fds);
            if verdict.is_refusal() {
                return verdict;
            }
        }
        Verdict::Accepted
    }

    /// Body of `SET_VRING_ADDR` for a ring.
    pub fn ring_addresses(&self, ring: &Ring) -> Vec<u8> {
        let user = |addr: u64| addr.wrapping_add(memory::USER_OFFSET);
        connection::ring_addresses(
            ring.queue,
            0,
            user(ring.areas.descriptors),
            user(ring.areas.used),
            user(ring.areas.available),
        )
    }

    /// Enables or disables a ring.
    #[track_caller]
    pub fn enable(&self, queue: u32, on: bool) {
        self.connection.tell(
            code::SET_VRING_ENABLE,
            &connection::ring_state(queue, u32::from(on)),
            &[],
        );
    }

    /// Stops a ring and returns the index at which it can go on.
    #[track_caller]
    pub fn stop_queue(&self, ring: &Ring) -> u16 {
        let answer = self
            .connection
            .ask(code::GET_VRING_BASE, &connection::ring_state(ring.queue, 0));
        assert_eq!(answer.body.len(), 8, "answer to GET_VRING_BASE");
        let number = answer.number();
        assert_eq!(
            number as u32, ring.queue,
            "GET_VRING_BASE answered for another queue"
        );
        u16::try_from(number >> 32).expect("a split ring's base has 16 bits")
    }

    /// `bytes` bytes of the configuration space from `offset` on.
    #[track_caller]
    pub fn config_bytes(&self, offset: u32, bytes: u32) -> Vec<u8> {
        let body = connection::config_access(offset, bytes, 0, &vec![0; bytes as usize]);
        let answer = self.connection.ask(code::GET_CONFIG, &body);
        assert_eq!(
            answer.body.len(),
            12 + bytes as usize,
            "GET_CONFIG of {bytes} bytes at {offset} failed"
        );
        answer.body[12..].to_vec()
    }

    /// The configuration space.
    #[track_caller]
    pub fn config(&self) -> Config {
        Config::parse(&self.config_bytes(0, blk::CONFIG_BYTES))
    }

    /// Writes the cache mode to the configuration space.
    #[track_caller]
    pub fn set_writeback(&self, writeback: u8) {
        let body = connection::config_access(blk::WRITEBACK_OFFSET, 1, 0, &[writeback]);
        self.connection.tell(code::SET_CONFIG, &body, &[]);
    }

    /// Gives the back-end a channel for messages of its own, and returns our end.
    #[track_caller]
    pub fn open_backend_channel(&self) -> Connection {
        let (ours, theirs) = UnixStream::pair().expect("no socket pair");
        self.connection
            .tell(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        Connection::from_stream(ours)
    }

    /// Puts a request's parts into memory: header, output, input, status, each in one piece.
    #[track_caller]
    pub fn place(&mut self, request: &Request) -> (Vec<Part>, Pending) {
        let header = self.heap.take(u64::from(blk::HEADER_BYTES), 16);
        self.memory
            .write(header, &blk::header(request.kind, request.sector));
        let mut parts = vec![Part::readable(header, blk::HEADER_BYTES)];
        if !request.output.is_empty() {
            let output = self.heap.take(request.output.len() as u64, 512);
            self.memory.write(output, &request.output);
            parts.push(Part::readable(output, request.output.len() as u32));
        }
        let input = self.heap.take(request.input_bytes as u64, 512);
        if request.input_bytes > 0 {
            self.memory
                .write(input, &vec![blk::UNTOUCHED; request.input_bytes]);
            parts.push(Part::writable(input, request.input_bytes as u32));
        }
        let status = self.heap.take(1, 1);
        self.memory.write(status, &[blk::UNTOUCHED]);
        parts.push(Part::writable(status, 1));
        let pending = Pending {
            head: 0,
            input,
            input_bytes: request.input_bytes,
            status,
        };
        (parts, pending)
    }

    /// Sends a request. Its memory is taken until the caller releases the heap.
    #[track_caller]
    pub fn submit(&mut self, ring: &mut Ring, request: &Request) -> Pending {
        let (parts, pending) = self.place(request);
        let head = ring.submit(&parts);
        Pending { head, ..pending }
    }

    /// What the device answered.
    #[track_caller]
    pub fn outcome(&self, pending: &Pending, used: Used) -> Outcome {
        assert_eq!(
            used.head,
            u32::from(pending.head),
            "another chain was completed"
        );
        Outcome {
            status: self.memory.read(pending.status, 1)[0],
            used_length: used.length,
            data: self.memory.read(pending.input, pending.input_bytes),
        }
    }

    /// Sends a request and waits for its end. Nothing else may be in flight in the ring.
    #[track_caller]
    pub fn request(&mut self, ring: &mut Ring, request: &Request) -> Outcome {
        assert_eq!(ring.in_flight(), 0, "other requests are in flight");
        let mark = self.heap.mark();
        let pending = self.submit(ring, request);
        let used = ring.pop();
        let outcome = self.outcome(&pending, used);
        self.heap.release(mark);
        outcome
    }

    /// Sends all requests at once and waits for all; outcomes in the order of `requests`.
    #[track_caller]
    pub fn request_all(&mut self, ring: &mut Ring, requests: &[Request]) -> Vec<Outcome> {
        let mark = self.heap.mark();
        let pending: Vec<Pending> = requests
            .iter()
            .map(|request| self.submit(ring, request))
            .collect();
        let mut used: HashMap<u32, Used> = HashMap::new();
        for _ in requests {
            let entry = ring.pop();
            used.insert(entry.head, entry);
        }
        let outcomes = pending
            .iter()
            .map(|pending| self.outcome(pending, used[&u32::from(pending.head)]))
            .collect();
        self.heap.release(mark);
        outcomes
    }

    /// Reads, which must succeed with the right used length.
    #[track_caller]
    pub fn read(&mut self, ring: &mut Ring, sector: u64, bytes: usize) -> Vec<u8> {
        let outcome = self.request(ring, &Request::read(sector, bytes));
        assert_eq!(
            (outcome.status, outcome.used_length),
            (blk::OK, bytes as u32 + 1),
            "reading {bytes} bytes at sector {sector}: status and used length"
        );
        outcome.data
    }

    /// Writes, which must succeed with the right used length.
    #[track_caller]
    pub fn write(&mut self, ring: &mut Ring, sector: u64, data: &[u8]) {
        let outcome = self.request(ring, &Request::write(sector, data));
        assert_eq!(
            (outcome.status, outcome.used_length),
            (blk::OK, 1),
            "writing {} bytes at sector {sector}: status and used length",
            data.len()
        );
    }

    /// A request without data, which must succeed with the right used length.
    #[track_caller]
    pub fn succeed(&mut self, ring: &mut Ring, request: &Request) {
        let outcome = self.request(ring, request);
        assert_eq!(
            (outcome.status, outcome.used_length),
            (blk::OK, request.input_bytes as u32 + 1),
            "{request:?}: status and used length"
        );
    }

    /// The status of a request, which must have been set.
    #[track_caller]
    pub fn status(&mut self, ring: &mut Ring, request: &Request) -> u8 {
        let outcome = self.request(ring, request);
        assert_ne!(
            outcome.status,
            blk::UNTOUCHED,
            "the status of {request:?} was not written"
        );
        assert!(
            outcome.used_length as usize <= request.input_bytes + 1,
            "used length {} of {request:?} is longer than what the device may write",
            outcome.used_length
        );
        outcome.status
    }
}

/// Negotiates in the order in which QEMU does. Returns features and protocol features.
#[track_caller]
fn negotiate(connection: &mut Connection, wanted: &Wanted) -> (u64, u64) {
    let offered = connection.ask(code::GET_FEATURES, &[]).number();
    let features = offered & wanted.features;
    let mut protocol_features = 0;
    if features & blk::feature::PROTOCOL_FEATURES != 0 {
        let offered = connection.ask(code::GET_PROTOCOL_FEATURES, &[]).number();
        protocol_features = offered & wanted.protocol_features;
        connection.tell(
            code::SET_PROTOCOL_FEATURES,
            &protocol_features.to_le_bytes(),
            &[],
        );
        connection.acknowledges = protocol_features & protocol::REPLY_ACK != 0;
    }
    connection.tell(code::SET_OWNER, &[], &[]);
    connection.tell(code::SET_FEATURES, &features.to_le_bytes(), &[]);
    (features, protocol_features)
}
