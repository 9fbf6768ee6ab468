//! The connection to a vhost-user backend (QEMU documentation, "Vhost-user Protocol").

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

/// Time that the backend has for a reply. A vCPU may be waiting for it, in the middle of a register access.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Virtio features of the backend that are offered to the driver. Others need parts that this frontend does not have: a
/// control queue, several queue pairs, the packed ring.
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

/// An error in using a backend.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A request failed or was rejected.
    #[error("the network process failed to {what}")]
    Request {
        /// The operation: a verb and its object.
        what: &'static str,
        /// The error of the protocol.
        #[source]
        source: vhost::Error,
    },
    /// The backend offers less than its predecessor.
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

/// Addresses and signals of a queue.
struct Ring {
    size: u16,
    descriptors: GuestAddress,
    driver: GuestAddress,
    device: GuestAddress,
    kick: EventFd,
    call: EventFd,
}

/// The queues as the driver configured them, kept for the backend's successors.
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
                // Without a vector the backend still needs an event to write to. Nothing reads it.
                call: active.interrupt.event().map_or_else(|| EventFd::new(EFD_NONBLOCK), Ok)?,
            })
        };
        Ok(Self { memory, features, each: queues.iter().map(ring).collect::<io::Result<_>>()? })
    }

    /// Kicks the backend and interrupts the driver for each queue. Both have to accept spurious notifications (virtio
    /// 1.3, 2.7.7.1 and 2.7.10.2).
    pub(super) fn signal_all(&self) {
        for ring in &self.each {
            // A write fails only when the counter is full, and then the event is raised anyway.
            let _ = ring.kick.write(1);
            let _ = ring.call.write(1);
        }
    }
}

/// A connected backend.
pub(super) struct Link {
    frontend: Frontend,
    /// The backend's features, those of the protocol included.
    offered: u64,
    protocol: VhostUserProtocolFeatures,
}

impl Link {
    /// Connects to the backend and negotiates the protocol.
    pub(super) fn connect(stream: UnixStream) -> Result<Self, LinkError> {
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut frontend = Frontend::from_stream(stream, QUEUES as u64);
        // The first message of a session.
        frontend.set_owner().map_err(failed("answer"))?;
        let offered = frontend.get_features().map_err(failed("report its features"))?;
        // CONFIG lets the backend supply the configuration space. With REPLY_ACK each request is confirmed, so an error
        // is seen at the request that caused it.
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

    /// The features to offer to the driver.
    pub(super) fn features(&self) -> u64 {
        // MAC address and MTU come from the configuration space; without one there is nothing behind these features.
        let configured = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU;
        let unknown = if self.protocol.contains(VhostUserProtocolFeatures::CONFIG) { 0 } else { configured };
        self.offered & PASSED_FEATURES & !unknown
    }

    /// Reads the device's configuration space; zeroes if the backend has none.
    pub(super) fn config(&mut self) -> Result<[u8; CONFIG_LEN], LinkError> {
        let mut config = [0; CONFIG_LEN];
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            let (_, payload) = self
                .frontend
                .get_config(0, CONFIG_LEN as u32, VhostUserConfigFlags::WRITABLE, &config)
                .map_err(failed("report its configuration"))?;
            // The reply may be shorter than asked for.
            for (to, from) in config.iter_mut().zip(payload) {
                *to = from;
            }
        }
        Ok(config)
    }

    /// Hands guest memory and the queues to the backend.
    ///
    /// Each queue continues at its used index. Backends complete chains in order, so after a crash of the predecessor
    /// exactly the chains that were not completed are served again.
    pub(super) fn start(&mut self, rings: &Rings) -> Result<(), LinkError> {
        // The bit for protocol features is acknowledged here and is not one of virtio's; the driver never sees it.
        let extra = self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(rings.features | extra).map_err(failed("accept the driver's features"))?;
        // Before the addresses of queues, which refer to this table. Each region goes with its memfd.
        let regions = rings.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions = regions.collect::<Result<Vec<_>, _>>().map_err(failed("get a description of guest memory"))?;
        self.frontend.set_mem_table(&regions).map_err(failed("map guest memory"))?;
        for (index, ring) in rings.each.iter().enumerate() {
            // vhost-user has addresses of this process, which the backend translates by the table of regions. The
            // driver's are validated, yet translated with a check.
            let host = |address| rings.memory.get_host_address(address).map(|p| p as u64).map_err(|_| LinkError::Queue);
            // `used.idx` follows `flags` (virtio 1.3, 2.7.8).
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
            // The kick comes last: a backend starts a ring when it receives its kick event.
            self.frontend.set_vring_num(index, ring.size).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_addr(index, &addresses).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_base(index, base).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_call(index, &ring.call).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_kick(index, &ring.kick).map_err(failed("set up a queue"))?;
            // With protocol features a ring starts disabled, without them enabled.
            if extra != 0 {
                self.frontend.set_vring_enable(index, true).map_err(failed("enable a queue"))?;
            }
        }
        Ok(())
    }

    /// Takes the queues back. The backend's reply means that it touches guest memory no more.
    pub(super) fn stop(&mut self) -> Result<(), LinkError> {
        // The index in the reply is not needed: the driver resets the queues.
        for index in 0..QUEUES {
            self.frontend.get_vring_base(index).map_err(failed("return a queue"))?;
        }
        Ok(())
    }
}
