//! One front-end's connection: what it negotiated, its memory and its rings.
//!
//! The state of a ring here is what the front-end has said of it; whether it runs follows from that
//! and is brought about in [`Session::settle`]. What a front-end may change while rings run (memory,
//! addresses, features, kick descriptors) stops the rings concerned, with nothing in flight, and
//! starts them again from the index they had reached.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::memory::{GuestMap, MAX_REGIONS, Region, RegionSpec};
use super::socket::{self, Closed, Message, request};
use crate::daemon::ControlHandle;
use crate::export::QueueSetup;
use crate::virtio::blk::{self, DiskInfo};
use crate::virtio::queue::{RingState, area_bytes, check_size};

/// The flag of a front-end's write to the configuration space (vhost-user, `VHOST_USER_SET_CONFIG`).
const CONFIG_FROM_GUEST: u32 = 0;

/// The session's end for whoever must tell the front-end something.
pub(crate) struct BackendChannel {
    socket: UnixStream,
}

impl BackendChannel {
    /// Tells the front-end that the configuration space has changed. Does not wait: a front-end that
    /// does not read learns it when it asks.
    pub(crate) fn config_changed(&self) {
        let mut bytes = Vec::with_capacity(socket::HEADER_BYTES);
        for word in [request::BACKEND_CONFIG_CHANGE, socket::VERSION, 0] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
        if let Err(error) = rustix::net::send(&self.socket, &bytes, flags) {
            tracing::warn!(%error, "cannot tell a front-end of a changed configuration");
        }
    }
}

/// Serves one front-end until it goes, breaks the protocol, or the daemon stops.
pub(super) fn run(
    stream: UnixStream,
    export: &str,
    control: &ControlHandle,
    stop: &Arc<OwnedFd>,
) -> Closed {
    match serve(stream, export, control, stop) {
        Ok(never) => match never {},
        Err(closed) => closed,
    }
}

fn serve(
    stream: UnixStream,
    export: &str,
    control: &ControlHandle,
    stop: &Arc<OwnedFd>,
) -> std::result::Result<std::convert::Infallible, Closed> {
    let host = |error: std::io::Error| Closed::Broken(error.to_string());
    let (ours, theirs) = UnixStream::pair().map_err(host)?;
    let hang_up = stream.try_clone().map_err(host)?;
    let session = Session::new(export, control.clone(), hang_up)?;
    let session = Arc::new(Mutex::new(session));
    let _ending = Ending(Arc::clone(&session));
    let mut parser = BackendReqHandler::from_stream(theirs, Arc::clone(&session));
    let stop = stop.as_fd();
    loop {
        let message = socket::receive(&stream, stop)?;
        let number = message.request();
        keep_backend_channel(&message, &session)?;
        let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
        socket::send(&ours, stop, &message.bytes, &fds)?;
        let handled = parser.handle_request();
        socket::forward(&ours, &stream, stop)?;
        if let Err(error) = handled {
            let why = lock(&session).refusal.take();
            let why = why.unwrap_or_else(|| error.to_string());
            return Err(Closed::Broken(format!("message {number}: {why}")));
        }
    }
}

fn lock(session: &Mutex<Session>) -> std::sync::MutexGuard<'_, Session> {
    session.lock().expect("a panic aborts the process")
}

/// Keeps a duplicate of the channel that `vhost` takes and does not let us write to.
fn keep_backend_channel(
    message: &Message,
    session: &Mutex<Session>,
) -> std::result::Result<(), Closed> {
    let ([fd], request::SET_BACKEND_REQ_FD) = (message.fds.as_slice(), message.request()) else {
        return Ok(());
    };
    let host = |error: std::io::Error| Closed::Broken(error.to_string());
    let copy = UnixStream::from(fd.try_clone().map_err(host)?);
    lock(session).backend_channel = Some(copy);
    Ok(())
}

/// Stops a session's queues however it ends.
struct Ending(Arc<Mutex<Session>>);

impl Drop for Ending {
    fn drop(&mut self) {
        lock(&self.0).end();
    }
}

/// What a front-end has said of one ring.
#[derive(Default)]
struct Vring {
    size: Option<u16>,
    /// Front-end addresses of descriptor table, available and used ring.
    addresses: Option<[u64; 3]>,
    next: u16,
    /// Set by `SET_VRING_KICK`; the inner `None` is a guest that never kicks.
    kick: Option<Option<Arc<OwnedFd>>>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    enabled: bool,
    running: bool,
    /// Stopped for a change, with its held requests kept.
    suspended: bool,
}

struct Session {
    export: String,
    control: ControlHandle,
    hang_up: Arc<dyn Fn() + Send + Sync>,
    offered: u64,
    features: u64,
    owned: bool,
    regions: Vec<Arc<Region>>,
    memory: Arc<GuestMap>,
    vrings: Vec<Vring>,
    backend_channel: Option<UnixStream>,
    /// Why the last message was refused, in more words than `vhost` has.
    refusal: Option<String>,
}

impl Session {
    fn new(
        export: &str,
        control: ControlHandle,
        stream: UnixStream,
    ) -> std::result::Result<Self, Closed> {
        let id = export.to_owned();
        let info = control.export(&id, |export| export.info());
        let info = info.ok_or(Closed::Stopping)?;
        let memory = GuestMap::new(Vec::new()).expect("no regions, no conflict");
        Ok(Self {
            export: id,
            control,
            hang_up: Arc::new(move || {
                let _ = stream.shutdown(Shutdown::Both);
            }),
            offered: offered_features(&info),
            features: 0,
            owned: false,
            regions: Vec::new(),
            memory,
            vrings: (0..info.queues).map(|_| Vring::default()).collect(),
            backend_channel: None,
            refusal: None,
        })
    }

    fn info(&self) -> Result<DiskInfo> {
        let info = self.control.export(&self.export, |export| export.info());
        info.ok_or(Error::Disconnected)
    }

    fn refuse<T>(&mut self, why: impl Into<String>) -> Result<T> {
        self.refusal = Some(why.into());
        Err(Error::InvalidParam)
    }

    fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    fn negotiated_protocol(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let count = self.vrings.len();
        if index as usize >= count {
            return self.refuse(format!("queue {index} of {count} does not exist"));
        }
        Ok(&mut self.vrings[index as usize])
    }

    /// Starts the ring if everything is there that it needs.
    fn settle(&mut self, index: usize) -> Result<()> {
        let enabled_by_default = !self.negotiated_protocol();
        let vring = &self.vrings[index];
        let (Some(size), Some(addresses), Some(kick)) = (vring.size, vring.addresses, &vring.kick)
        else {
            return Ok(());
        };
        if vring.running || !(vring.enabled || enabled_by_default) {
            return Ok(());
        }
        let lengths = area_bytes(size);
        let translate = |area: usize| self.memory.guest_address(addresses[area], lengths[area]);
        let (Some(descriptors), Some(available), Some(used)) =
            (translate(0), translate(1), translate(2))
        else {
            // The memory may come later, region by region; the ring waits for it.
            return Ok(());
        };
        let ring = RingState {
            size,
            descriptors,
            available,
            used,
            next: vring.next,
            event_index: self.has(VIRTIO_RING_F_EVENT_IDX),
        };
        let setup = QueueSetup {
            ring,
            memory: Arc::clone(&self.memory),
            kick: kick.clone(),
            call: vring.call.clone(),
            error: vring.error.clone(),
            guest_flushes: self.has(VIRTIO_BLK_F_FLUSH) || self.has(VIRTIO_BLK_F_CONFIG_WCE),
            hang_up: Arc::clone(&self.hang_up),
        };
        let started = self.control.queue(&self.export, move |export| async move {
            export.start_queue(index as u16, setup).await
        });
        match started {
            Some(Ok(())) => {}
            Some(Err(why)) => return self.refuse(format!("queue {index}: {why}")),
            None => return Err(Error::Disconnected),
        }
        let vring = &mut self.vrings[index];
        (vring.running, vring.suspended) = (true, false);
        Ok(())
    }

    fn settle_all(&mut self) -> Result<()> {
        (0..self.vrings.len()).try_for_each(|index| self.settle(index))
    }

    /// Stops a ring with nothing in flight, keeping the index that it has reached. Held requests complete
    /// with the failures that they met.
    fn stop(&mut self, index: usize) {
        let vring = &mut self.vrings[index];
        let ran = std::mem::take(&mut vring.running);
        if !std::mem::take(&mut vring.suspended) && !ran {
            return;
        }
        let state = self.control.queue(&self.export, move |export| async move {
            export.stop_queue(index as u16).await
        });
        if let Some(Some(state)) = state {
            self.vrings[index].next = state.next;
        }
    }

    /// Stops a ring that is to be started again, set up another way; held requests go on being held.
    fn suspend(&mut self, index: usize) {
        if !std::mem::take(&mut self.vrings[index].running) {
            return;
        }
        let state = self.control.queue(&self.export, move |export| async move {
            export.suspend_queue(index as u16).await
        });
        self.vrings[index].suspended = true;
        if let Some(Some(state)) = state {
            self.vrings[index].next = state.next;
        }
    }

    fn stop_all(&mut self) {
        (0..self.vrings.len()).for_each(|index| self.stop(index));
    }

    /// Stops every ring, changes something, and starts those again that still can run.
    fn with_rings_stopped(&mut self, change: impl FnOnce(&mut Self)) -> Result<()> {
        (0..self.vrings.len()).for_each(|index| self.suspend(index));
        change(self);
        self.settle_all()
    }

    fn set_regions(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
        let memory = match GuestMap::new(regions.clone()) {
            Ok(memory) => memory,
            Err(error) => return self.refuse(error.to_string()),
        };
        let ran: Vec<_> = self.vrings.iter().map(|vring| vring.running).collect();
        self.with_rings_stopped(|session| {
            session.regions = regions;
            session.memory = memory;
        })?;
        let lost = |(ran, vring): (&bool, &Vring)| *ran && !vring.running;
        match ran.iter().zip(&self.vrings).position(lost) {
            Some(index) => self.refuse(format!("queue {index} runs in memory that was taken away")),
            None => Ok(()),
        }
    }

    fn map(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<Arc<Region>> {
        match Region::map(spec_of(region), OwnedFd::from(file)) {
            Ok(region) => Ok(region),
            Err(error) => self.refuse(error.to_string()),
        }
    }

    /// A descriptor to kick or be told by. Never waited on, whatever it is.
    fn adopt(&mut self, file: Option<File>) -> Result<Option<Arc<OwnedFd>>> {
        let Some(file) = file else {
            return Ok(None);
        };
        let fd = OwnedFd::from(file);
        // As it is known here: asking its file system could block for ever.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let kind = match statx(&fd, c"", flags, StatxFlags::TYPE) {
            Ok(found) => FileType::from_raw_mode(u32::from(found.stx_mode)),
            Err(error) => return self.refuse(format!("a descriptor cannot be examined: {error}")),
        };
        match kind {
            // Holding the front-end's own end of the connection would hide that it goes away.
            FileType::Socket => return self.refuse("a socket cannot be kicked or called by"),
            // These block whatever their flags say, a worker too, if their file system does.
            FileType::RegularFile | FileType::Directory | FileType::BlockDevice => {
                return self.refuse("a file cannot be kicked or called by");
            }
            _ => {}
        }
        let set = fcntl_getfl(&fd).and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK));
        match set {
            Ok(()) => Ok(Some(Arc::new(fd))),
            Err(error) => self.refuse(format!("a descriptor cannot be made non-blocking: {error}")),
        }
    }

    fn end(&mut self) {
        self.stop_all();
        self.control.set_backend_channel(&self.export, None);
    }

    fn publish_backend_channel(&mut self) {
        if let Some(socket) = self.backend_channel.take() {
            let channel = BackendChannel { socket };
            self.control
                .set_backend_channel(&self.export, Some(channel));
        }
    }
}

fn spec_of(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_address: region.guest_phys_addr,
        bytes: region.memory_size,
        user_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

fn offered_features(info: &DiskInfo) -> u64 {
    info.features()
        | 1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

fn offered_protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::BACKEND_REQ
}

/// Bits that the front-end and the ring use without an offer of ours to be acknowledged by the guest.
fn unknown_bits(acknowledged: u64, offered: u64) -> u64 {
    acknowledged & !offered
}

const NOT_OFFERED: Error = Error::InvalidOperation("a feature that was not offered");

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        if self.owned {
            return self.refuse("the connection has an owner already");
        }
        self.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all();
        self.owned = false;
        self.features = 0;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = unknown_bits(features, self.offered);
        if unknown != 0 {
            return self.refuse(format!("features {unknown:#x} were not offered"));
        }
        // Front-ends repeat this while rings run; only a change is one.
        if features == self.features {
            return Ok(());
        }
        self.with_rings_stopped(|session| session.features = features)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mut mapped = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            mapped.push(self.map(region, file)?);
        }
        self.set_regions(mapped)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let running = self.vring(index)?.running;
        match check_size(num) {
            Err(why) => self.refuse(format!("queue {index}: {why}")),
            Ok(_) if running => self.refuse(format!("queue {index} runs: its size is fixed")),
            Ok(size) => {
                self.vring(index)?.size = Some(size);
                self.settle(index as usize)
            }
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = [descriptor, available, used];
        let vring = self.vring(index)?;
        // Front-ends repeat this while rings run, to change what is logged; the indexes stay.
        if vring.addresses == Some(addresses) {
            return Ok(());
        }
        let size = vring.size;
        let lengths = area_bytes(size.unwrap_or(1));
        for ((address, bytes), what) in addresses.into_iter().zip(lengths).zip([
            "descriptor table",
            "available ring",
            "used ring",
        ]) {
            let known = self.memory.guest_address(address, bytes).is_some();
            if !known && !self.regions.is_empty() {
                return self.refuse(format!(
                    "queue {index}: {what} at {address:#x} ({bytes} bytes) is not in the guest's \
                     memory"
                ));
            }
        }
        self.suspend(index as usize);
        self.vring(index)?.addresses = Some(addresses);
        self.settle(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        if self.vring(index)?.running {
            return self.refuse(format!("queue {index} runs: its index is its own"));
        }
        let Ok(next) = u16::try_from(base) else {
            return self.refuse(format!("queue {index}: index {base} of a split ring"));
        };
        self.vring(index)?.next = next;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop(index as usize);
        let vring = self.vring(index)?;
        // The ring is stopped until it gets another kick descriptor.
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.next)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        self.vring(index)?;
        let kick = self.adopt(fd)?;
        self.suspend(index as usize);
        self.vring(index)?.kick = Some(kick);
        self.settle(index as usize)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        self.vring(index)?;
        let call = self.adopt(fd)?;
        let vring = self.vring(index)?;
        vring.call.clone_from(&call);
        if !vring.running {
            return Ok(());
        }
        let set = self.control.queue(&self.export, move |export| async move {
            export.set_call(index as u16, call).await;
        });
        set.ok_or(Error::Disconnected)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        self.vring(index)?;
        let error = self.adopt(fd)?;
        // Rings that run keep the old one: front-ends set it before they start them.
        self.vring(index)?.error = error;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(offered_protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = unknown_bits(features, offered_protocol_features().bits());
        if unknown != 0 {
            return self.refuse(format!("protocol features {unknown:#x} were not offered"));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            return self.settle(index as usize);
        }
        self.stop(index as usize);
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // Front-ends ask for all of the structure they know; what ours lacks reads as zero.
        const WHOLE: usize = 256;
        let mut config = self.info()?.config().to_vec();
        config.resize(WHOLE, 0);
        let range = offset as usize..offset as usize + size as usize;
        match config.get(range) {
            Some(part) => Ok(part.to_vec()),
            None => self.refuse(format!(
                "{size} bytes at {offset} are outside the configuration space"
            )),
        }
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], flags: VhostUserConfigFlags) -> Result<()> {
        if flags.bits() != CONFIG_FROM_GUEST {
            return self.refuse("the configuration space is not restored from a migration");
        }
        let writeback = match buf {
            [writeback @ (0 | 1)] if offset as usize == blk::CONFIG_WRITEBACK => *writeback == 1,
            _ => {
                return self.refuse(format!(
                    "{} bytes at {offset} of the configuration space: only 'writeback' (a byte at \
                     {}, 0 or 1) can be written",
                    buf.len(),
                    blk::CONFIG_WRITEBACK
                ));
            }
        };
        let set = self.control.queue(&self.export, move |export| async move {
            export.set_writeback(writeback).await
        });
        match set {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => self.refuse(format!(
                "what was written before could not be flushed: {error}"
            )),
            None => Err(Error::Disconnected),
        }
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        // `vhost` has accepted it as a socket; ours is the duplicate that was kept.
        self.publish_backend_channel();
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(NOT_OFFERED)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let region = self.map(region, fd)?;
        let mut regions = self.regions.clone();
        regions.push(region);
        self.set_regions(regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let mut regions = self.regions.clone();
        let place = regions.iter().position(|known| {
            let known = known.spec();
            known.guest_address == region.guest_phys_addr
                && known.bytes == region.memory_size
                && known.user_address == region.user_addr
        });
        let Some(place) = place else {
            return self.refuse(format!(
                "there is no memory region of {:#x} bytes at guest address {:#x}",
                { region.memory_size },
                { region.guest_phys_addr }
            ));
        };
        regions.remove(place);
        self.set_regions(regions)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}
