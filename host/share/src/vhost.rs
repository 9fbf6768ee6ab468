//! The file system device as the vmm sets it up: its configuration, and queues that are served by threads.

use std::{io, sync::Arc};

use bulkhead_vhost_user::{Result, VhostUserProtocolFeatures};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use bulkhead_queue::{GuestRam, SplitQueue};

use crate::{
    REQUEST_QUEUES, TAG, events,
    parked::Parked,
    worker::{Ring, Role, Worker},
};

/// Length of the tag in the configuration space, in bytes (virtio 1.3, 5.11.4).
const TAG_LEN: usize = 36;

/// A queue as the vmm sets it up.
struct Slot {
    worker: Worker,
    /// The queue while its thread does not serve it.
    idle: Option<SplitQueue>,
    call: Option<EventFd>,
    enabled: bool,
}

/// Index of the high priority queue.
const FORGETS: usize = 0;
/// Index of the notification queue, which is one for requests with drivers that do not use it.
const NOTIFICATIONS: usize = 1;

/// The device as the vmm has set it up.
pub(crate) struct Device {
    slots: Vec<Slot>,
    /// The driver has a notification queue.
    notifies: bool,
}

impl Device {
    /// A device whose queues are served by these threads.
    pub(crate) fn new(workers: Vec<Worker>) -> io::Result<Self> {
        let slot = |worker| {
            let queue = Queue::new(<Self as bulkhead_vhost_user::Device>::MAX_QUEUE_SIZE).map_err(io::Error::other)?;
            Ok(Slot { worker, idle: Some(SplitQueue::new(queue)), call: None, enabled: false })
        };
        Ok(Self { notifies: false, slots: workers.into_iter().map(slot).collect::<io::Result<_>>()? })
    }
}

impl Slot {
    /// Takes the queue from its thread, with the requests that wait or without.
    fn stop(&mut self, forget: bool) -> Option<Ring> {
        if self.idle.is_some() { None } else { self.worker.stop(forget) }
    }
}

impl bulkhead_vhost_user::Device for Device {
    const FEATURES: u64 = events::FEATURE;
    /// The number of queues.
    const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ;
    const MAX_QUEUE_SIZE: u16 = 1024;

    fn queues(&self) -> usize {
        self.slots.len()
    }

    fn queue(&mut self, index: usize) -> Option<&mut SplitQueue> {
        self.slots[index].idle.as_mut()
    }

    fn set_features(&mut self, features: u64, event_idx: bool, enabled: bool) {
        self.notifies = features & events::FEATURE != 0;
        for slot in &mut self.slots {
            if let Some(queue) = &mut slot.idle {
                queue.queue_mut().set_event_idx(event_idx);
            }
            slot.enabled = enabled;
        }
    }

    fn set_memory(&mut self, memory: &Arc<GuestRam>) {
        // Threads hold the old mapping until they are given the new one.
        for slot in &mut self.slots {
            if let Some(ring) = slot.stop(false) {
                slot.worker.start(Ring { memory: Arc::clone(memory), ..ring });
            }
        }
    }

    fn start(&mut self, index: usize, kick: EventFd, memory: &Arc<GuestRam>) -> io::Result<()> {
        let role = match index {
            FORGETS => Role::Forgets,
            NOTIFICATIONS if self.notifies => Role::Notifications,
            _ => Role::Requests,
        };
        let slot = &mut self.slots[index];
        if let Some(queue) = slot.idle.take() {
            let (memory, call) = (Arc::clone(memory), slot.call.take());
            slot.worker.start(Ring {
                queue,
                memory,
                kick,
                call,
                enabled: slot.enabled,
                role,
                parked: Parked::default(),
            });
        }
        Ok(())
    }

    fn stop(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if let Some(ring) = slot.stop(true) {
            (slot.idle, slot.call) = (Some(ring.queue), ring.call);
        }
    }

    fn set_call(&mut self, index: usize, call: Option<EventFd>) {
        let slot = &mut self.slots[index];
        if slot.idle.is_some() {
            slot.call = call;
        } else {
            slot.worker.set_call(call);
        }
    }

    fn set_enabled(&mut self, index: usize, enabled: bool) {
        let slot = &mut self.slots[index];
        slot.enabled = enabled;
        if slot.idle.is_none() {
            slot.worker.enable(enabled);
        }
    }

    /// Tag, number of request queues, size of a notification's buffer (virtio 1.3, 5.11.4).
    fn config(&self) -> Vec<u8> {
        let mut config = TAG.as_bytes().to_vec();
        config.resize(TAG_LEN, 0);
        config.extend((REQUEST_QUEUES as u32).to_le_bytes());
        config.extend((events::BUFFER as u32).to_le_bytes());
        config
    }

    /// No field can be written (virtio 1.3, 5.11.4), and the driver's writes have no effect.
    fn write_config(&mut self) -> Result<()> {
        Ok(())
    }
}
