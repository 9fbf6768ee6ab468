//! The answers to the vmm's requests.

use std::{
    fs::File,
    io,
    ops::{Deref, DerefMut},
    sync::Arc,
};

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
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use bulkhead_queue::{GuestRam, SplitQueue};

/// Features of every device, vhost-user's own bit among them.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A device, which serves its queues in its own way. Indices of queues are below [`Self::queues`].
pub trait Device {
    /// Features of this kind of device that the driver may negotiate.
    const FEATURES: u64;
    /// Optional parts of the protocol, besides GET_CONFIG and replies to requests, by which the vmm learns of a refused one.
    const PROTOCOL: VhostUserProtocolFeatures;
    /// Largest queue size, in descriptors.
    const MAX_QUEUE_SIZE: u16;

    /// Number of queues.
    fn queues(&self) -> usize;

    /// A queue, to be set up; `None` while it is served by another thread.
    fn queue(&mut self, index: usize) -> Option<&mut SplitQueue>;

    /// Takes the features that the driver has negotiated. `event_idx` is for the queues, which are all `enabled` or not.
    fn set_features(&mut self, features: u64, event_idx: bool, enabled: bool);

    /// Replaces the guest's memory.
    fn set_memory(&mut self, memory: &Arc<GuestRam>);

    /// Serves a queue, which is set up and valid, at its kicks.
    fn start(&mut self, index: usize, kick: EventFd, memory: &Arc<GuestRam>) -> io::Result<()>;

    /// Serves a queue no longer, after the request that is being served.
    fn stop(&mut self, index: usize);

    /// Replaces the event that interrupts the driver.
    fn set_call(&mut self, index: usize, call: Option<EventFd>);

    /// Lets a queue's requests be served or wait.
    fn set_enabled(&mut self, index: usize, enabled: bool);

    /// The configuration space.
    fn config(&self) -> Vec<u8>;

    /// Takes the driver's write to the configuration space.
    fn write_config(&mut self) -> Result<()> {
        unsupported()
    }
}

/// A range of guest memory, at its address in the vmm and in the guest.
struct Range {
    frontend: u64,
    guest: u64,
    len: u64,
}

/// A device as the vmm has set it up.
pub struct Backend<D> {
    device: D,
    mapped: Option<Arc<GuestRam>>,
    ranges: Vec<Range>,
}

impl<D> Deref for Backend<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.device
    }
}

impl<D> DerefMut for Backend<D> {
    fn deref_mut(&mut self) -> &mut D {
        &mut self.device
    }
}

impl<D: Device> Backend<D> {
    /// A device that the vmm has yet to set up.
    pub fn new(device: D) -> Self {
        Self { device, mapped: None, ranges: Vec::new() }
    }

    fn index(&self, index: u32) -> Result<usize> {
        let index = index as usize;
        if index < self.device.queues() { Ok(index) } else { Err(Error::InvalidParam) }
    }

    /// A queue while it is not served.
    fn idle(&mut self, index: u32) -> Result<&mut SplitQueue> {
        let index = self.index(index)?;
        self.device.queue(index).ok_or(Error::InvalidParam)
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
}

/// The answer to requests that no device here needs.
fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not supported"))
}

/// The eventfd of a kick or an interrupt.
fn event(file: File) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is owned by the file, which gives it up here.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

impl<D: Device> VhostUserBackendReqHandlerMut for Backend<D> {
    fn set_owner(&mut self) -> Result<()> {
        // The stream belongs to one vmm from the start.
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated by the specification, which lets it be ignored.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        // Stops all queues.
        for index in 0..self.device.queues() {
            self.get_vring_base(index as u32)?;
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES | D::FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        // A driver must not accept what was not offered (virtio 1.3, 2.2.1).
        if features & !(FEATURES | D::FEATURES) != 0 {
            return Err(Error::InvalidParam);
        }
        // Without protocol features there is no SET_VRING_ENABLE, and rings start enabled.
        let enabled = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        self.device.set_features(features, features & 1 << VIRTIO_RING_F_EVENT_IDX != 0, enabled);
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
        // Refuses overlapping regions.
        let memory = Arc::new(GuestRam::from_regions(mapped).map_err(|_| Error::InvalidParam)?);
        self.device.set_memory(&memory);
        self.mapped = Some(memory);
        self.ranges = ranges;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        // Split queues have a size that is a power of two (virtio 1.3, 2.7).
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= D::MAX_QUEUE_SIZE);
        self.idle(index)?.queue_mut().set_size(size.ok_or(Error::InvalidParam)?);
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
        let memory = self.mapped.clone().ok_or(Error::InvalidParam)?;
        let queue = self.idle(index)?;
        queue.queue_mut().try_set_desc_table_address(descriptor).map_err(|_| Error::InvalidParam)?;
        queue.queue_mut().try_set_avail_ring_address(available).map_err(|_| Error::InvalidParam)?;
        queue.queue_mut().try_set_used_ring_address(used).map_err(|_| Error::InvalidParam)?;
        // The used ring is continued where it stands, which is not zero after a process that died. Its index is the
        // field after `flags`. Signals for earlier elements are the vmm's to give when it hands the queue over.
        let at = used.0.checked_add(2).ok_or(Error::InvalidParam)?;
        let used = memory.read_obj::<u16>(GuestAddress(at)).map_err(|_| Error::InvalidParam)?;
        queue.restart(u16::from_le(used));
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // Any value will do: it is compared with the driver's index, which may be anything, too.
        self.idle(index)?.rewind(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // This request also stops the queue ("Starting and stopping rings").
        let at = self.index(index)?;
        self.device.stop(at);
        // A stopped queue must not signal: the vmm may have given the interrupt to another one.
        self.device.set_call(at, None);
        self.device.set_enabled(at, false);
        let queue = self.idle(index)?;
        queue.queue_mut().set_ready(false);
        Ok(VhostUserVringState::new(index, u32::from(queue.position())))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let at = self.index(index.into())?;
        let memory = self.mapped.clone().ok_or(Error::InvalidParam)?;
        let kick = event(fd.ok_or(Error::InvalidParam)?);
        self.device.stop(at);
        // A kick starts the queue. Its addresses are checked only now, when all of them are known.
        let queue = self.idle(index.into())?.queue_mut();
        queue.set_ready(true);
        if !queue.is_valid(&*memory) {
            queue.set_ready(false);
            return Err(Error::InvalidParam);
        }
        self.device.start(at, kick, &memory).map_err(Error::ReqHandlerError)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.index(index.into())?;
        self.device.set_call(index, fd.map(event));
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        // Errors of a queue are its driver's own loss, and are not reported.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK | D::PROTOCOL)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.queues() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let index = self.index(index)?;
        self.device.set_enabled(index, enable);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut config = self.device.config();
        // The vmm may read beyond the fields, which are zeros then, but not make this allocate at will.
        let end = offset.checked_add(size).ok_or(Error::InvalidParam)? as usize;
        if end > 4096 {
            return Err(Error::InvalidParam);
        }
        config.resize(config.len().max(end), 0);
        Ok(config[offset as usize..end].to_vec())
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config()
    }

    // Optional requests, which the vmm makes only if their protocol features are negotiated.

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
