//! The vmm's requests ("Vhost-user Protocol", QEMU's specification): features, guest memory, the queues.
//!
//! The vmm is trusted no further than its guest: it passes the guest's values on, so addresses and sizes are checked
//! here again. The network process has the same for its device; they differ in that queues here are served by threads.

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
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use bulkhead_queue::{GuestRam, SplitQueue};

use crate::{
    REQUEST_QUEUES, TAG,
    worker::{Ring, Worker},
};

/// Largest queue size, in descriptors.
const MAX_QUEUE_SIZE: u16 = 1024;

/// Length of the tag in the configuration space, in bytes (virtio 1.3, 5.11.4).
const TAG_LEN: usize = 36;

/// Features that the driver may negotiate, and vhost-user's own bit.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A range of guest memory, at its address in the vmm and in the guest.
struct Range {
    frontend: u64,
    guest: u64,
    len: u64,
}

/// A queue as the vmm sets it up.
struct Slot {
    worker: Worker,
    /// The queue while its thread does not serve it.
    idle: Option<SplitQueue>,
    call: Option<EventFd>,
    enabled: bool,
}

/// The device as the vmm has set it up.
pub(crate) struct Device {
    memory: Option<Arc<GuestRam>>,
    slots: Vec<Slot>,
    ranges: Vec<Range>,
}

impl Device {
    /// A device whose queues are served by these threads.
    pub(crate) fn new(workers: Vec<Worker>) -> io::Result<Self> {
        let slot = |worker| {
            let queue = Queue::new(MAX_QUEUE_SIZE).map_err(io::Error::other)?;
            Ok(Slot { worker, idle: Some(SplitQueue::new(queue)), call: None, enabled: false })
        };
        let slots = workers.into_iter().map(slot).collect::<io::Result<_>>()?;
        Ok(Self { memory: None, slots, ranges: Vec::new() })
    }

    fn slot(&mut self, index: u32) -> Result<&mut Slot> {
        self.slots.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// The queue while it is not served.
    fn idle(&mut self, index: u32) -> Result<&mut SplitQueue> {
        self.slot(index)?.idle.as_mut().ok_or(Error::InvalidParam)
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

impl Slot {
    /// Takes the queue from its thread.
    fn stop(&mut self) -> Option<Ring> {
        if self.idle.is_some() { None } else { self.worker.stop() }
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
        // Stops all queues.
        for index in 0..self.slots.len() {
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
        for slot in &mut self.slots {
            if let Some(queue) = &mut slot.idle {
                queue.queue_mut().set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            }
            // Without protocol features there is no SET_VRING_ENABLE, and rings start enabled.
            slot.enabled = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
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
        // Refuses overlapping regions.
        let memory = Arc::new(GuestRam::from_regions(mapped).map_err(|_| Error::InvalidParam)?);
        // Threads hold the old mapping until they are given the new one.
        for slot in &mut self.slots {
            if let Some(ring) = slot.stop() {
                slot.worker.start(Ring { memory: Arc::clone(&memory), ..ring });
            }
        }
        self.memory = Some(memory);
        self.ranges = ranges;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        // Split queues have a size that is a power of two (virtio 1.3, 2.7).
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE);
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
        let memory = self.memory.clone().ok_or(Error::InvalidParam)?;
        let queue = self.idle(index)?.queue_mut();
        queue.try_set_desc_table_address(descriptor).map_err(|_| Error::InvalidParam)?;
        queue.try_set_avail_ring_address(available).map_err(|_| Error::InvalidParam)?;
        queue.try_set_used_ring_address(used).map_err(|_| Error::InvalidParam)?;
        // The used ring is continued where it stands, which is not zero after a process that died. Its index is the
        // field after `flags`.
        let at = used.0.checked_add(2).ok_or(Error::InvalidParam)?;
        let used = memory.read_obj::<u16>(GuestAddress(at)).map_err(|_| Error::InvalidParam)?;
        self.idle(index)?.restart(u16::from_le(used));
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // Any value will do: it is compared with the driver's index, which may be anything, too.
        self.idle(index)?.rewind(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // This request also stops the queue ("Starting and stopping rings"), after the request that is being served.
        let slot = self.slot(index)?;
        if let Some(ring) = slot.stop() {
            slot.idle = Some(ring.queue);
        }
        // A stopped queue must not signal: the vmm may have given the interrupt to another one.
        slot.call = None;
        slot.enabled = false;
        let queue = self.idle(index)?;
        queue.queue_mut().set_ready(false);
        Ok(VhostUserVringState::new(index, u32::from(queue.position())))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let memory = self.memory.clone().ok_or(Error::InvalidParam)?;
        let kick = event(fd.ok_or(Error::InvalidParam)?);
        let slot = self.slot(u32::from(index))?;
        if let Some(ring) = slot.stop() {
            (slot.idle, slot.call) = (Some(ring.queue), ring.call);
        }
        // A kick starts the queue. Its addresses are checked only now, when all of them are known.
        let mut queue = slot.idle.take().ok_or(Error::InvalidParam)?;
        queue.queue_mut().set_ready(true);
        if !queue.queue().is_valid(&*memory) {
            queue.queue_mut().set_ready(false);
            slot.idle = Some(queue);
            return Err(Error::InvalidParam);
        }
        slot.worker.start(Ring { queue, memory, kick, call: slot.call.take(), enabled: slot.enabled });
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let slot = self.slot(u32::from(index))?;
        let call = fd.map(event);
        if slot.idle.is_some() {
            slot.call = call;
        } else {
            slot.worker.set_call(call);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        // Errors of a queue are its driver's own loss, and are not reported.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        // GET_CONFIG for the tag; replies to requests, so that the vmm learns of a refused one; the number of queues.
        Ok(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.slots.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let slot = self.slot(index)?;
        slot.enabled = enable;
        if slot.idle.is_none() {
            slot.worker.enable(enable);
        }
        Ok(())
    }

    /// Reads the configuration: tag, number of request queues (virtio 1.3, 5.11.4).
    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut config = TAG.as_bytes().to_vec();
        config.resize(TAG_LEN, 0);
        config.extend((REQUEST_QUEUES as u32).to_le_bytes());
        // The vmm may read beyond the fields, which are zeros then, but not make this allocate at will.
        let end = offset.checked_add(size).ok_or(Error::InvalidParam)? as usize;
        if end > 4096 {
            return Err(Error::InvalidParam);
        }
        config.resize(config.len().max(end), 0);
        Ok(config[offset as usize..end].to_vec())
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // No field can be written (virtio 1.3, 5.11.4), and the driver's writes have no effect.
        Ok(())
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
