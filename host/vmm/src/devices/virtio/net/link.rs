//! The conversation with a vhost-user backend ("Vhost-user Protocol", QEMU's specification).

use std::{io, os::unix::net::UnixStream, sync::Arc, time::Duration};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_bindings::{
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{CONFIG_LEN, QUEUES};
use crate::{devices::virtio::ActiveQueue, memory::GuestRam};

/// How long the backend may take for one answer: a vCPU may be waiting for it.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Virtio features that reach the driver when the backend offers them.
const PASSED_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Why a backend cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A request failed or was refused.
    #[error("the network process failed to {what}")]
    Request {
        /// What was asked, as the end of a sentence.
        what: &'static str,
        /// What vhost-user said.
        #[source]
        source: vhost::Error,
    },
    /// It offers less than its predecessor.
    #[error("the network process lacks features that the guest already uses")]
    Features,
    /// A queue lies outside of guest memory.
    #[error("a network queue lies outside of guest memory")]
    Queue,
    /// The host refused a descriptor.
    #[error("cannot get a descriptor or event from the host")]
    Host(#[from] io::Error),
}

fn failed(what: &'static str) -> impl FnOnce(vhost::Error) -> LinkError {
    move |source| LinkError::Request { what, source }
}

/// Where one queue is and how it is signalled.
struct Ring {
    size: u16,
    descriptors: GuestAddress,
    driver: GuestAddress,
    device: GuestAddress,
    kick: EventFd,
    call: EventFd,
}

/// The queues as the driver set them up, for this backend and its successors.
pub(super) struct Rings {
    memory: Arc<GuestRam>,
    features: u64,
    each: Vec<Ring>,
}

impl Rings {
    pub(super) fn new(memory: Arc<GuestRam>, features: u64, queues: &[ActiveQueue]) -> io::Result<Self> {
        let ring = |active: &ActiveQueue| {
            Ok(Ring {
                size: active.queue.size(),
                descriptors: GuestAddress(active.queue.desc_table()),
                driver: GuestAddress(active.queue.avail_ring()),
                device: GuestAddress(active.queue.used_ring()),
                kick: active.kick.try_clone()?,
                // Nobody listens to what belongs to no vector.
                call: active.interrupt.event().map_or_else(|| EventFd::new(EFD_NONBLOCK), Ok)?,
            })
        };
        Ok(Self { memory, features, each: queues.iter().map(ring).collect::<io::Result<_>>()? })
    }

    /// Kicks the backend and interrupts the driver, for each queue: at worst for nothing.
    pub(super) fn signal_all(&self) {
        for ring in &self.each {
            // A write fails when the event is raised to its limit, which tells as well.
            let _ = ring.kick.write(1);
            let _ = ring.call.write(1);
        }
    }
}

/// A connected backend.
pub(super) struct Link {
    frontend: Frontend,
    offered: u64,
    protocol: VhostUserProtocolFeatures,
}

impl Link {
    /// Greets the backend.
    pub(super) fn connect(stream: UnixStream) -> Result<Self, LinkError> {
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut frontend = Frontend::from_stream(stream, QUEUES as u64);
        frontend.set_owner().map_err(failed("answer"))?;
        let offered = frontend.get_features().map_err(failed("report its features"))?;
        let mut protocol = VhostUserProtocolFeatures::empty();
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            protocol = frontend.get_protocol_features().map_err(failed("report its protocol features"))?
                & (VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK);
            frontend.set_protocol_features(protocol).map_err(failed("accept the protocol features"))?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        Ok(Self { frontend, offered, protocol })
    }

    /// What the driver is offered.
    pub(super) fn features(&self) -> u64 {
        let configured = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU;
        let unknown = if self.protocol.contains(VhostUserProtocolFeatures::CONFIG) { 0 } else { configured };
        self.offered & PASSED_FEATURES & !unknown
    }

    /// The device's configuration space; zeros from a backend that has none.
    pub(super) fn config(&mut self) -> Result<[u8; CONFIG_LEN], LinkError> {
        let mut config = [0; CONFIG_LEN];
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            let (_, payload) = self
                .frontend
                .get_config(0, CONFIG_LEN as u32, VhostUserConfigFlags::WRITABLE, &config)
                .map_err(failed("report its configuration"))?;
            for (to, from) in config.iter_mut().zip(payload) {
                *to = from;
            }
        }
        Ok(config)
    }

    /// Hands memory and queues over. They continue where the used rings say that they stand: the backend serves in
    /// order, so after a crash only chains that nobody has answered are served again.
    pub(super) fn start(&mut self, rings: &Rings) -> Result<(), LinkError> {
        let extra = self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(rings.features | extra).map_err(failed("accept the driver's features"))?;
        let regions = rings.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions = regions.collect::<Result<Vec<_>, _>>().map_err(failed("get a description of guest memory"))?;
        self.frontend.set_mem_table(&regions).map_err(failed("map guest memory"))?;
        for (index, ring) in rings.each.iter().enumerate() {
            let host = |address| rings.memory.get_host_address(address).map(|p| p as u64).map_err(|_| LinkError::Queue);
            let used = ring.device.0.checked_add(2).ok_or(LinkError::Queue)?;
            let base: u16 = rings.memory.read_obj(GuestAddress(used)).map_err(|_| LinkError::Queue)?;
            let addresses = VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: host(ring.descriptors)?,
                used_ring_addr: host(ring.device)?,
                avail_ring_addr: host(ring.driver)?,
                log_addr: None,
            };
            self.frontend.set_vring_num(index, ring.size).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_addr(index, &addresses).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_base(index, base).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_call(index, &ring.call).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_kick(index, &ring.kick).map_err(failed("set up a queue"))?;
            if extra != 0 {
                self.frontend.set_vring_enable(index, true).map_err(failed("enable a queue"))?;
            }
        }
        Ok(())
    }

    /// Takes the queues back: once the backend has answered it touches guest memory no more.
    pub(super) fn stop(&mut self) -> Result<(), LinkError> {
        for index in 0..QUEUES {
            self.frontend.get_vring_base(index).map_err(failed("return a queue"))?;
        }
        Ok(())
    }
}
