//! The vmm's requests ("Vhost-user Protocol", QEMU's specification): features, guest memory, the queues.
//!
//! The vmm is trusted no further than its guest: it passes the guest's values on, so addresses and sizes are checked
//! here again.

use std::{fs::File, io, sync::Arc};

use vhost::{
    VhostUserMemoryRegionBase,
    vhost_user::{
        Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
        message::{
            VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
            VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
            VhostUserVringAddrFlags, VhostUserVringState,
        },
    },
};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};
use vmm_sys_util::{epoll::Epoll, eventfd::EventFd};

use super::{
    addresses::{GUEST_MAC, MTU},
    events::{self, Token},
    ring::{MAX_QUEUE_SIZE, Ring},
};
use bulkhead_queue::GuestRam;

/// Index of the queue of frames for the guest.
pub(super) const RX: usize = 0;
/// Index of the queue of the guest's frames.
pub(super) const TX: usize = 1;

/// Features that the driver may negotiate: offloads both ways, frames in several buffers, and vhost-user's own bit.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A range of guest memory, at its address in the vmm and in the guest.
struct Range {
    frontend: u64,
    guest: u64,
    len: u64,
}

/// The device as the vmm has set it up.
pub(crate) struct Device {
    pub(super) memory: Option<Arc<GuestRam>>,
    pub(crate) rings: [Ring; 2],
    features: u64,
    ranges: Vec<Range>,
    epoll: Arc<Epoll>,
}

impl Device {
    pub(crate) fn new(epoll: Arc<Epoll>) -> io::Result<Self> {
        let ring = || Ring::new().map_err(io::Error::other);
        Ok(Self { memory: None, rings: [ring()?, ring()?], features: 0, ranges: Vec::new(), epoll })
    }

    /// True if the driver has negotiated a virtio feature.
    pub(super) fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Translates an address of the vmm's. Ring addresses come as such, not as the guest's.
    fn guest_address(&self, frontend: u64) -> Result<u64> {
        self.ranges
            .iter()
            .find_map(|range| {
                let offset = frontend.checked_sub(range.frontend)?;
                (offset < range.len).then(|| range.guest + offset)
            })
            .ok_or(Error::InvalidParam)
    }

    fn drop_kick(&mut self, index: usize) {
        if let Some(kick) = self.rings.get_mut(index).and_then(|ring| ring.kick.take()) {
            // The vmm has the same eventfd open, so closing this descriptor alone would leave it registered with epoll.
            events::unwatch(&self.epoll, &kick);
        }
    }
}

/// The answer to requests that this device does not need.
fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not supported"))
}

/// The eventfd of a kick or an interrupt.
fn event(file: File) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is owned by the file, which gives it up here.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        // The stream belongs to one vmm from the start.
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated by the specification, which lets it be ignored.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        // Stops both queues.
        for index in 0..self.rings.len() {
            self.get_vring_base(index as u32)?;
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        // A driver must not accept what was not offered (virtio 1.3, 2.2.1).
        if features & !FEATURES != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        let event_idx = self.has(VIRTIO_RING_F_EVENT_IDX);
        for ring in &mut self.rings {
            ring.queue.queue_mut().set_event_idx(event_idx);
            // Without protocol features there is no SET_VRING_ENABLE, and rings start enabled.
            ring.enabled = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::new();
        let mut ranges = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let (guest, len) = (region.guest_phys_addr, region.memory_size);
            // `guest_address` adds an offset below `len` to it.
            guest.checked_add(len).ok_or(Error::InvalidParam)?;
            // Fails for a file shorter than the region. A file that shrinks later would kill this process with SIGBUS,
            // which only the vmm, the owner of the memory, could bring about.
            let mapping = region.mmap_region(file)?;
            exclude_from_cores(&mapping).map_err(Error::ReqHandlerError)?;
            mapped.push(GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(Error::InvalidParam)?);
            ranges.push(Range { frontend: region.user_addr, guest, len });
        }
        // Refuses overlapping regions. Frames move only between two requests, so nothing uses the old mapping
        // meanwhile.
        let memory = GuestRam::from_regions(mapped).map_err(|_| Error::InvalidParam)?;
        self.memory = Some(Arc::new(memory));
        self.ranges = ranges;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        // Split queues have a size that is a power of two (virtio 1.3, 2.7).
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE);
        self.ring(index)?.queue.queue_mut().set_size(size.ok_or(Error::InvalidParam)?);
        Ok(())
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
        // Only the first byte of each part is checked here; `set_vring_kick` checks them whole.
        let descriptor = GuestAddress(self.guest_address(descriptor)?);
        let available = GuestAddress(self.guest_address(available)?);
        let used = GuestAddress(self.guest_address(used)?);
        let memory = self.memory.clone().ok_or(Error::InvalidParam)?;
        let queue = self.ring(index)?.queue.queue_mut();
        queue.try_set_desc_table_address(descriptor).map_err(|_| Error::InvalidParam)?;
        queue.try_set_avail_ring_address(available).map_err(|_| Error::InvalidParam)?;
        queue.try_set_used_ring_address(used).map_err(|_| Error::InvalidParam)?;
        // The used ring is continued where it stands, which is not zero after a process that died. Its index is the
        // field after `flags`.
        let at = used.0.checked_add(2).ok_or(Error::InvalidParam)?;
        let used = memory.read_obj::<u16>(GuestAddress(at)).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.set_used(u16::from_le(used));
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // Any value will do: it is compared with the driver's index, which may be anything, too.
        self.ring(index)?.queue.rewind(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // This request also stops the queue ("Starting and stopping rings").
        self.drop_kick(index as usize);
        let ring = self.ring(index)?;
        ring.queue.queue_mut().set_ready(false);
        // A stopped queue must not signal: the vmm may have given the interrupt to another one.
        ring.call = None;
        ring.enabled = false;
        Ok(VhostUserVringState::new(index, u32::from(ring.queue.position())))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.drop_kick(usize::from(index));
        let memory = self.memory.clone().ok_or(Error::InvalidParam)?;
        let kick = event(fd.ok_or(Error::InvalidParam)?);
        events::watch(&self.epoll, &kick, Token::Kick(usize::from(index))).map_err(Error::ReqHandlerError)?;
        // A kick starts the queue. Its addresses are checked only now, when all of them are known.
        let ring = self.ring(u32::from(index))?;
        ring.kick = Some(kick);
        ring.queue.queue_mut().set_ready(true);
        if !ring.queue.queue().is_valid(&*memory) {
            ring.queue.queue_mut().set_ready(false);
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?.call = fd.map(event);
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        // Errors of a queue are its driver's own loss, and are not reported.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        // GET_CONFIG for the MAC address and MTU; replies to requests, so that the vmm learns of a refused one.
        Ok(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    /// Reads the configuration: MAC address, status, queue pairs, MTU (virtio 1.3, 5.1.4).
    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut config = GUEST_MAC.to_vec();
        // VIRTIO_NET_S_LINK_UP, one pair of queues.
        config.extend([1, 0, 1, 0]);
        config.extend(MTU.to_le_bytes());
        // The vmm may read beyond the fields, which are zeros then, but not make this allocate at will.
        let end = offset.checked_add(size).ok_or(Error::InvalidParam)? as usize;
        if end > 4096 {
            return Err(Error::InvalidParam);
        }
        config.resize(config.len().max(end), 0);
        Ok(config[offset as usize..end].to_vec())
    }

    // Optional requests, which the vmm makes only if their protocol features are negotiated.

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        unsupported()
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unsupported()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        unsupported()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}

/// Keeps guest memory out of core dumps, whatever the limits of the process are: it holds what containers hold.
fn exclude_from_cores(mapping: &MmapRegion) -> io::Result<()> {
    // SAFETY: the range is exactly one mapping of this process, and MADV_DONTDUMP changes no contents.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_DONTDUMP) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
