//! The network device as the vmm sets it up: its features, configuration and two queues.

use std::{io, sync::Arc};

use bulkhead_vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_queue::QueueT;
use vmm_sys_util::{epoll::Epoll, eventfd::EventFd};

use super::{
    addresses::{GUEST_MAC, MTU},
    events::{self, Token},
    ring::{self, Ring},
};
use bulkhead_queue::{GuestRam, SplitQueue};

/// Index of the queue of frames for the guest.
pub(super) const RX: usize = 0;
/// Index of the queue of the guest's frames.
pub(super) const TX: usize = 1;

/// The device as the vmm has set it up.
pub(crate) struct Device {
    pub(super) memory: Option<Arc<GuestRam>>,
    pub(crate) rings: [Ring; 2],
    features: u64,
    epoll: Arc<Epoll>,
}

impl Device {
    pub(crate) fn new(epoll: Arc<Epoll>) -> io::Result<Self> {
        let ring = || Ring::new().map_err(io::Error::other);
        Ok(Self { memory: None, rings: [ring()?, ring()?], features: 0, epoll })
    }

    /// True if the driver has negotiated a virtio feature.
    pub(super) fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

impl bulkhead_vhost_user::Device for Device {
    /// Offloads both ways, and frames in several buffers.
    const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_GUEST_CSUM
        | 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_GUEST_TSO4
        | 1 << VIRTIO_NET_F_GUEST_TSO6
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_MRG_RXBUF;
    const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::empty();
    const MAX_QUEUE_SIZE: u16 = ring::MAX_QUEUE_SIZE;

    fn queues(&self) -> usize {
        self.rings.len()
    }

    /// Frames move only between two requests, so a queue can be set up at any time.
    fn queue(&mut self, index: usize) -> Option<&mut SplitQueue> {
        self.rings.get_mut(index).map(|ring| &mut ring.queue)
    }

    fn set_features(&mut self, features: u64, event_idx: bool, enabled: bool) {
        self.features = features;
        for ring in &mut self.rings {
            ring.queue.queue_mut().set_event_idx(event_idx);
            ring.enabled = enabled;
        }
    }

    fn set_memory(&mut self, memory: &Arc<GuestRam>) {
        self.memory = Some(Arc::clone(memory));
    }

    fn start(&mut self, index: usize, kick: EventFd, _memory: &Arc<GuestRam>) -> io::Result<()> {
        events::watch(&self.epoll, &kick, Token::Kick(index))?;
        self.rings[index].kick = Some(kick);
        Ok(())
    }

    fn stop(&mut self, index: usize) {
        if let Some(kick) = self.rings[index].kick.take() {
            // The vmm has the same eventfd open, so closing this descriptor alone would leave it registered with epoll.
            events::unwatch(&self.epoll, &kick);
        }
    }

    fn set_call(&mut self, index: usize, call: Option<EventFd>) {
        self.rings[index].call = call;
    }

    fn set_enabled(&mut self, index: usize, enabled: bool) {
        self.rings[index].enabled = enabled;
    }

    /// MAC address, status, queue pairs, MTU (virtio 1.3, 5.1.4).
    fn config(&self) -> Vec<u8> {
        let mut config = GUEST_MAC.to_vec();
        // VIRTIO_NET_S_LINK_UP, one pair of queues.
        config.extend([1, 0, 1, 0]);
        config.extend(MTU.to_le_bytes());
        config
    }
}
